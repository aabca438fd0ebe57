//! `[[routes]]`: virtual models, their rules, and what each asks for.
//!
//! Knows places by name; what of them cannot work is [`reach`](super::reach)'s. Invariant: a rule whose condition or places cannot be
//! read is told, and not there.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use toml::Spanned;

use super::{Builder, File, Rule, TenantConfig, UpstreamConfig, When, all_or_none};
use crate::{
    config::tables::{Link, To, Words},
    policy::{Choice, Condition, Router, Target, TimeOfDay, VirtualModel, route::WEEKDAYS},
    providers::ModelEntry,
};

impl Builder<'_> {
    /// A place that the file knows; what is neither `local` nor an upstream's is a name that is looked up when it is asked for.
    pub(super) fn target(&mut self, text: &str, span: &Range<usize>) -> Option<Target> {
        let target = Target::parse(text, &self.upstreams);
        let is_known = match &target {
            Target::Local => true,
            Target::Upstream { .. } => self.upstream_models.contains(text),
            // A slash is in hub names, too; one that looks like an upstream's and is not there is a mistake.
            Target::LocalModel(name) => !name.is_empty() && !self.virtual_models.contains(name.as_ref()),
        };
        if !is_known {
            self.no_target(text, span);
            return None;
        }
        Some(target)
    }

    pub(super) fn no_target(&mut self, text: &str, span: &Range<usize>) {
        if self.virtual_models.contains(text) {
            let message = format!("{text:?} is a virtual model itself, and rules lead to real ones");
            self.problem(span, message, "name a local model or UPSTREAM/MODEL");
            return;
        }
        let known: Vec<&str> = self.upstream_models.iter().map(String::as_str).take(8).collect();
        let known = if known.is_empty() {
            "there are no [[upstreams]]".to_owned()
        } else {
            format!("known: {}", known.join(", "))
        };
        self.problem(span, format!("no upstream offers {text:?}"), known);
    }

    pub(super) fn router(&mut self, file: &File, upstreams: &[UpstreamConfig], tenants: &[TenantConfig]) -> Router {
        let mut virtual_models = BTreeMap::new();
        let has_budgets = tenants.iter().any(|tenant| !tenant.budgets.is_empty());
        for table in &file.routes {
            let route = table.get_ref();
            let name: Arc<str> = route.model.get_ref().as_str().into();
            if virtual_models.contains_key(&name) || name.is_empty() || &*name == "local" {
                let message = format!("the virtual model {name:?} is there already, or is no name");
                self.problem(&route.model.span(), message, "give each a name of its own");
                continue;
            }
            if self.upstream_models.contains(&*name) {
                let message = format!("the virtual model {name:?} hides the model of an upstream that has this name");
                self.problem(&route.model.span(), message, "give it another name");
            }
            if route.rules.is_empty() {
                let message = format!("the virtual model {name:?} has no rule, so every request for it is refused");
                self.problem(&route.model.span(), message, "add a rule: rules = [{ to = \"local\" }]");
            }
            let rules = self.rules(&route.rules);
            if !has_budgets && rules.iter().any(|rule| rule.when.budget_left_under.is_some()) {
                let message = format!("a rule of {name:?} asks for budget_left_under, and no tenant has a budget");
                self.problem(&route.model.span(), message, "give a tenant a budget, or remove the rule");
            }
            virtual_models.insert(Arc::clone(&name), VirtualModel { name, rules });
        }
        let upstream_models = upstreams
            .iter()
            .flat_map(|upstream| {
                let target = |model: &ModelEntry| Target::Upstream {
                    upstream: Arc::clone(&upstream.name),
                    model: model.id.as_str().into(),
                };
                upstream.models.iter().map(target).collect::<Vec<_>>()
            })
            .collect();
        Router { virtual_models, upstream_models }
    }

    fn rules(&mut self, tables: &[Spanned<Rule>]) -> Vec<crate::policy::Rule> {
        let mut rules: Vec<crate::policy::Rule> = Vec::new();
        for (at, table) in tables.iter().enumerate() {
            let rule = table.get_ref();
            let (when, to) = (self.condition(&rule.when), self.choices(&rule.to));
            let (Some(when), Some(to)) = (when, to) else { continue };
            // The number is its place among those that could be read, which is all of them where this is the only mistake.
            if let Some(before) = rules.iter().position(|before| before.when.covers(&when)) {
                let is_always = rules[before].when.is_always();
                let covers = if is_always { "applies to every request" } else { "applies wherever this one would" };
                let message = format!("rule {} is never asked: rule {}, before it, {covers}", at + 1, before + 1);
                self.problem(&table.span(), message, "put it in front, or remove it");
            }
            let rule = crate::policy::Rule { when, to };
            self.check_rule(at + 1, &table.span(), &rule);
            rules.push(rule);
        }
        rules
    }

    fn choices(&mut self, to: &Spanned<To>) -> Option<Vec<Choice>> {
        let span = to.span();
        let links = match to.get_ref() {
            To::One(text) => return Some(vec![Choice::One(self.target(text, &span)?)]),
            To::Chain(links) => links,
        };
        if links.is_empty() {
            self.problem(&span, "a rule leads nowhere", "name at least one place in to");
        }
        let mut choices = Vec::new();
        for link in links {
            choices.push(match link {
                Link::One(text) => self.target(text, &span).map(Choice::One),
                Link::Weighted(weights) => {
                    if weights.values().all(|&weight| weight == 0) {
                        self.problem(&span, "all weights are 0", "give at least one place a weight above it");
                    }
                    let targets: Vec<_> =
                        weights.iter().map(|(text, &weight)| Some((self.target(text, &span)?, weight))).collect();
                    targets.into_iter().collect::<Option<Vec<_>>>().map(Choice::Weighted)
                }
            });
        }
        choices.into_iter().collect()
    }

    fn condition(&mut self, when: &When) -> Option<Condition> {
        let words = |words: &Option<Spanned<Words>>| words.as_ref().map(|words| words.get_ref().list());
        let mut tenants = None;
        if let Some(names) = &when.tenant {
            let list = names.get_ref().list();
            for name in &list {
                if !self.tenants.contains(name) {
                    let message = format!("the tenant {name:?} is not there, so the rule cannot apply to it");
                    self.problem(&names.span(), message, "add it to [[tenants]], or correct the name");
                }
            }
            tenants = Some(list);
        }
        let mut privacy = None;
        if let Some(names) = &when.privacy {
            let spanned = |word: String| Spanned::new(names.span(), word);
            let classes: Vec<_> = names.get_ref().list().into_iter().map(|word| self.privacy(&spanned(word))).collect();
            privacy = Some(classes.into_iter().collect::<Option<Vec<_>>>());
        }
        // All are read before the first mistake ends it.
        let ttft_over = when.ttft_over.as_ref().map(|text| self.duration(text));
        let budget_left_under =
            when.budget_left_under.as_ref().map(|dollars| self.money(*dollars.get_ref(), &dollars.span()));
        let time = when.time.as_ref().map(|text| self.time_of_day(text));
        let weekdays = when.weekdays.as_ref().map(|words| self.weekdays(words));
        let languages = when.language.as_ref().map(|names| {
            let list = names.get_ref().list();
            let codes: Vec<_> = list.iter().map(|name| self.language(name, &names.span())).collect();
            codes.into_iter().collect::<Option<Vec<String>>>()
        });
        self.check_words(when);
        Some(Condition {
            tenants,
            privacy: all_or_none(privacy)?,
            tasks: when.task.as_ref().map(Words::list),
            reasoning_effort: words(&when.reasoning_effort),
            tools: when.tools,
            images: when.images,
            over_local_context: when.over_local_context,
            prompt_tokens_over: when.prompt_tokens_over,
            personal_data: when.pii,
            languages: all_or_none(languages)?,
            ttft_over: all_or_none(ttft_over)?,
            budget_left_under: all_or_none(budget_left_under)?,
            time: all_or_none(time)?,
            weekdays: all_or_none(weekdays)?,
        })
    }

    /// `22:00-06:00`, UTC.
    fn time_of_day(&mut self, text: &Spanned<String>) -> Option<TimeOfDay> {
        let minute = |text: &str| {
            let (hours, minutes) = text.trim().split_once(':')?;
            let (hours, minutes): (u16, u16) = (hours.parse().ok()?, minutes.parse().ok()?);
            (hours <= 24 && minutes < 60 && hours * 60 + minutes <= 1440).then_some(hours * 60 + minutes)
        };
        let time = text
            .get_ref()
            .split_once('-')
            .and_then(|(from, to)| Some(TimeOfDay { from: minute(from)?, to: minute(to)? }));
        if time.is_none() {
            let message = format!("{:?} is no time of day", text.get_ref());
            self.problem(&text.span(), message, "write it as 22:00-06:00, in UTC");
        }
        if time.is_some_and(|time| time.from == time.to) {
            let message = format!("{:?} ends where it begins, so it is no time at all", text.get_ref());
            self.problem(&text.span(), message, "leave it out for the whole day");
        }
        time
    }

    fn weekdays(&mut self, words: &Spanned<Words>) -> Option<Vec<u8>> {
        let mut days = Vec::new();
        for word in words.get_ref().list() {
            let Some(day) = WEEKDAYS.iter().position(|day| *day == word) else {
                let message = format!("{word:?} is no day of the week");
                self.problem(&words.span(), message, format!("it must be one of {}", WEEKDAYS.join(", ")));
                return None;
            };
            days.push(day as u8);
        }
        Some(days)
    }
}
