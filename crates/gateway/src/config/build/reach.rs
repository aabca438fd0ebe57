//! What is well-formed and cannot work: rules whose requests may go to none of their places, lists that fit nothing, words
//! that no request can hold.
//!
//! Knows upstreams, tenants and classes; not the names of local models and adapters, which come and go. Invariant: nothing
//! is refused that some request could use.

use std::ops::Range;

use toml::Spanned;

use super::{Builder, When};
use crate::{
    policy::{Choice, Condition, PrivacyClass, Rule, Target, TenantRouting, target::fits},
    providers::chat::Effort,
};

impl Builder<'_> {
    /// A tenant's list of models. What is not an upstream's may be a local name of some day.
    pub(super) fn check_models(&mut self, models: &Spanned<Vec<String>>, routing: &TenantRouting) {
        let span = models.span();
        let name = &routing.name;
        if models.get_ref().is_empty() {
            let message = format!("the tenant {name:?} may use no model at all");
            self.problem(&span, message, "name some in models, or leave it out for all of them");
            return;
        }
        let is_upstreams =
            |pattern: &String| pattern.split_once('/').is_some_and(|(upstream, _)| self.upstreams.contains(upstream));
        let known = || self.upstream_models.iter().chain(&self.virtual_models);
        let lost = models.get_ref().iter().filter(|pattern| is_upstreams(pattern));
        let lost: Vec<String> = lost.filter(|pattern| !known().any(|name| fits(pattern, name))).cloned().collect();
        let has_only_upstreams = models.get_ref().iter().all(is_upstreams);
        for pattern in lost {
            let known: Vec<&str> = self.upstream_models.iter().map(String::as_str).take(8).collect();
            let hint = format!("correct it, or add the model to its upstream; known: {}", known.join(", "));
            self.problem(&span, format!("{pattern:?} fits no model of its upstream"), hint);
        }
        if has_only_upstreams && routing.privacy == PrivacyClass::LocalOnly {
            let message =
                format!("the local-only tenant {name:?} may use models of upstreams alone, where it never gets");
            self.problem(&span, message, "add a local model, or choose the class local-first");
        }
    }

    /// Where a tenant's overflow leads is a place that it may use.
    pub(super) fn check_overflow(&mut self, span: &Range<usize>, to: &Target, routing: &TenantRouting) {
        let place = to.to_string();
        if !to.is_local() && !routing.models.iter().any(|pattern| fits(pattern, &place)) {
            let message = format!(
                "the overflow of the tenant {:?} is closed for ever: {place} is not among its models",
                routing.name
            );
            self.problem(span, message, "add it to models");
        }
    }

    /// A rule that applies to somebody leads somewhere.
    pub(super) fn check_rule(&mut self, number: usize, span: &Range<usize>, rule: &Rule) {
        let Condition { tenants, privacy, .. } = &rule.when;
        let leaves = |class: &PrivacyClass| class.leave().is_some();
        let may_leave = privacy.as_ref().is_none_or(|classes| classes.iter().any(leaves));
        let targets: Vec<&Target> = rule.to.iter().flat_map(Choice::targets).collect();
        if targets.is_empty() {
            return;
        }
        if !may_leave && !targets.iter().any(|target| target.is_local()) {
            let message =
                format!("rule {number} leads nowhere: what is local-only stays here, and all its places are upstream");
            self.problem(span, message, "add a local place, or correct privacy");
            return;
        }
        let Some(names) = tenants.as_ref().filter(|names| !names.is_empty()) else { return };
        // One that could not be read is told already.
        let routings: Option<Vec<&TenantRouting>> = names.iter().map(|name| self.routings.get(name)).collect();
        let Some(routings) = routings else { return };
        let has_class = |routing: &&&TenantRouting| {
            let is_possible = |class: &PrivacyClass| routing.privacy.tightened_by(*class) == *class;
            privacy.as_ref().is_none_or(|classes| classes.iter().any(is_possible))
        };
        let may_use = |routing: &&TenantRouting| {
            targets.iter().any(|target| {
                let is_allowed = |name: &str| routing.models.iter().any(|pattern| fits(pattern, name));
                match target {
                    Target::Local => true,
                    Target::LocalModel(name) => is_allowed(name),
                    Target::Upstream { .. } => may_leave && leaves(&routing.privacy) && is_allowed(&target.to_string()),
                }
            })
        };
        let tenants = names.join(", ");
        let (message, hint) = if !routings.iter().any(|routing| has_class(&routing)) {
            let message = format!("rule {number} never applies: no request of {tenants} has such a privacy class");
            (message, "a request can be tighter than its tenant, never looser: correct privacy or tenant")
        } else if !routings.iter().any(may_use) {
            let message = format!("rule {number} leads nowhere: {tenants} may use none of its places");
            (message, "add a place that the tenant may use, or correct its privacy or models")
        } else {
            return;
        };
        self.problem(span, message, hint);
    }

    /// Words of which there are only some.
    pub(super) fn check_words(&mut self, when: &When) {
        let known: Vec<&str> = Effort::words().collect();
        let Some(words) = &when.reasoning_effort else { return };
        for word in words.get_ref().list().iter().filter(|word| !known.contains(&word.as_str())) {
            let message = format!("{word:?} is no reasoning_effort, so the rule never applies to it");
            self.problem(&words.span(), message, format!("it must be one of {}", known.join(", ")));
        }
    }
}
