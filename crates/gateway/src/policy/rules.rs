//! An operator's conditions on a request, and what a virtual model does by them.
//!
//! **Invariant**: a condition that is not set holds; all that are set must hold; a fact that is not known makes its
//! condition fail, so that no rule fires by accident.

use std::{sync::Arc, time::Duration};

use super::{Facts, Target, route::LocalName};
use crate::money::Money;

/// A model that exists only as rules.
#[derive(Clone, Debug, PartialEq)]
pub struct VirtualModel {
    /// What requests call it.
    pub name: Arc<str>,
    /// The first that holds and whose targets the tenant may use decides.
    pub rules: Vec<Rule>,
}

/// Where to, and when.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// When it applies.
    pub when: Condition,
    /// Places in the order of trying.
    pub to: Vec<Choice>,
}

/// One place of a chain, or a draw between several.
#[derive(Clone, Debug, PartialEq)]
pub enum Choice {
    /// Always this one.
    One(Target),
    /// One of these by weight, for A/B comparisons; weights are above zero.
    Weighted(Vec<(Target, u32)>),
}

/// A part of every day, in minutes; over midnight where the end comes before the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeOfDay {
    /// The first minute.
    pub from: u16,
    /// The first one after it.
    pub to: u16,
}

/// What must hold. See the module's invariant.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Condition {
    /// One of these tenants.
    pub tenants: Option<Vec<String>>,
    /// One of these classes.
    pub privacy: Option<Vec<super::PrivacyClass>>,
    /// `x-bindery-task` is one of these.
    pub tasks: Option<Vec<String>>,
    /// `reasoning_effort` is one of these.
    pub reasoning_effort: Option<Vec<String>>,
    /// The request has (or has not) tools.
    pub tools: Option<bool>,
    /// Likewise images.
    pub images: Option<bool>,
    /// The prompt is (or is not) longer than the local model's context.
    pub over_local_context: Option<bool>,
    /// The prompt has more tokens than this.
    pub prompt_tokens_over: Option<usize>,
    /// Personal data was (or was not) found.
    pub personal_data: Option<bool>,
    /// The prompt's language is one of these, as ISO 639-3 codes.
    pub languages: Option<Vec<String>>,
    /// The predicted local time to first token is above this.
    pub ttft_over: Option<Duration>,
    /// What is left of the tenant's budget is below this.
    pub budget_left_under: Option<Money>,
    /// A part of the UTC day.
    pub time: Option<TimeOfDay>,
    /// Days of the week, Monday is 0.
    pub weekdays: Option<Vec<u8>>,
}

fn one_of(wanted: Option<&Vec<String>>, fact: Option<&str>) -> bool {
    wanted.is_none_or(|wanted| fact.is_some_and(|fact| wanted.iter().any(|wanted| wanted == fact)))
}

fn is_as(wanted: Option<bool>, fact: bool) -> bool {
    wanted.is_none_or(|wanted| wanted == fact)
}

impl Condition {
    /// Whether all that is set holds.
    pub fn holds(&self, facts: &Facts<'_>) -> bool {
        let local = &facts.local;
        one_of(self.tenants.as_ref(), Some(facts.tenant.name.as_ref()))
            && self.privacy.as_ref().is_none_or(|wanted| wanted.contains(&facts.privacy))
            && one_of(self.tasks.as_ref(), facts.task)
            && one_of(self.reasoning_effort.as_ref(), facts.reasoning_effort)
            && is_as(self.tools, facts.has_tools)
            && is_as(self.images, facts.has_images)
            && is_as(self.over_local_context, facts.prompt_tokens > local.max_prompt_tokens)
            && self.prompt_tokens_over.is_none_or(|limit| facts.prompt_tokens > limit)
            && is_as(self.personal_data, facts.has_personal_data)
            && one_of(self.languages.as_ref(), facts.language)
            && self.ttft_over.is_none_or(|limit| local.predicted_ttft.is_some_and(|time| time > limit))
            && self.budget_left_under.is_none_or(|limit| facts.budget_left.is_some_and(|left| left < limit))
            && self.time.is_none_or(|time| time.holds(facts.now.minute_of_day))
            && self.weekdays.as_ref().is_none_or(|days| days.contains(&facts.now.weekday))
    }

    /// Whether it holds for every request for which the other does. False also where that is not plain to see.
    pub fn covers(&self, other: &Self) -> bool {
        fn words(own: Option<&Vec<String>>, other: Option<&Vec<String>>) -> bool {
            own.is_none_or(|own| other.is_some_and(|other| other.iter().all(|word| own.contains(word))))
        }
        fn same<T: PartialEq + Copy>(own: Option<T>, other: Option<T>) -> bool {
            own.is_none() || own == other
        }
        /// Above a lower limit is also what is above a higher one.
        fn over<T: PartialOrd + Copy>(own: Option<T>, other: Option<T>) -> bool {
            own.is_none_or(|own| other.is_some_and(|other| own <= other))
        }
        words(self.tenants.as_ref(), other.tenants.as_ref())
            && self.privacy.as_ref().is_none_or(|own| {
                other.privacy.as_ref().is_some_and(|other| other.iter().all(|class| own.contains(class)))
            })
            && words(self.tasks.as_ref(), other.tasks.as_ref())
            && words(self.reasoning_effort.as_ref(), other.reasoning_effort.as_ref())
            && same(self.tools, other.tools)
            && same(self.images, other.images)
            && same(self.over_local_context, other.over_local_context)
            && over(self.prompt_tokens_over, other.prompt_tokens_over)
            && same(self.personal_data, other.personal_data)
            && words(self.languages.as_ref(), other.languages.as_ref())
            && over(self.ttft_over, other.ttft_over)
            && self.budget_left_under.is_none_or(|own| other.budget_left_under.is_some_and(|other| own >= other))
            && same(self.time, other.time)
            && self.weekdays.as_ref().is_none_or(|own| {
                other.weekdays.as_ref().is_some_and(|other| other.iter().all(|day| own.contains(day)))
            })
    }

    /// Whether it holds for every request, so that no rule after it is ever asked.
    pub fn is_always(&self) -> bool {
        *self == Self::default()
    }
}

impl VirtualModel {
    /// Whether a caller to whom these local names mean something could ever be led anywhere: otherwise the model is nothing to it.
    pub fn leads_somewhere(&self, local_name: &dyn Fn(&str) -> LocalName) -> bool {
        self.rules.iter().flat_map(|rule| &rule.to).flat_map(Choice::targets).any(|target| match target {
            Target::LocalModel(name) => local_name(name) != LocalName::Unknown,
            Target::Local | Target::Upstream { .. } => true,
        })
    }
}

impl TimeOfDay {
    fn holds(self, minute: u16) -> bool {
        let Self { from, to } = self;
        if from <= to { (from..to).contains(&minute) } else { minute >= from || minute < to }
    }
}

impl Choice {
    /// All that it could choose.
    pub fn targets(&self) -> impl Iterator<Item = &Target> {
        let (one, several) = match self {
            Self::One(target) => (Some(target), &[][..]),
            Self::Weighted(targets) => (None, &targets[..]),
        };
        one.into_iter().chain(several.iter().map(|(target, _)| target))
    }

    /// The one that a draw of 0..1 falls on, among those that `may` be used; weights of the others count to nobody.
    pub(super) fn draw(&self, draw: f64, may: impl Fn(&Target) -> bool) -> Option<&Target> {
        match self {
            Self::One(target) => Some(target).filter(|target| may(target)),
            Self::Weighted(targets) => {
                let usable = || targets.iter().filter(|(target, weight)| *weight > 0 && may(target));
                let total: u64 = usable().map(|&(_, weight)| u64::from(weight)).sum();
                let mut left = draw.clamp(0.0, 1.0) * total as f64;
                for (target, weight) in usable() {
                    left -= f64::from(*weight);
                    if left < 0.0 {
                        return Some(target);
                    }
                }
                usable().last().map(|(target, _)| target)
            }
        }
    }
}
