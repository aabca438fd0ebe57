//! The file's shape: one struct a table, every key of it.
//!
//! Knows TOML and types, not what settings mean together. Invariant: a key that is not here is an error, and an error
//! repeats no value, since a value may be a secret in the wrong place.

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::Spanned;

use super::Problem;
use crate::{
    audit::AuditConfig, failure::OnFailure, guardrails::GuardrailConfig, providers::catalogue::PriceOverride,
    store::Durability,
};

/// The sections that are read here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct File {
    pub(super) store: Option<Spanned<Store>>,
    pub(super) local: Option<Spanned<Local>>,
    pub(super) upstreams: Vec<Spanned<Upstream>>,
    pub(super) tenants: Vec<Spanned<Tenant>>,
    pub(super) routes: Vec<Spanned<Route>>,
    pub(super) guardrails: Vec<Spanned<GuardrailConfig>>,
    pub(super) audit: Option<Spanned<AuditConfig>>,
    pub(super) identity: Vec<Spanned<Identity>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Store {
    pub(super) url: Spanned<String>,
    pub(super) durability: Option<Durability>,
    pub(super) max_bytes: Option<u64>,
    pub(super) keep_days: Option<u64>,
    #[serde(default)]
    pub(super) on_failure: OnFailure,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Local {
    pub(super) cost_per_hour: Option<Spanned<f64>>,
    pub(super) compare_with: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Upstream {
    pub(super) name: Spanned<String>,
    pub(super) kind: Spanned<String>,
    pub(super) base_url: Option<Spanned<String>>,
    pub(super) api_key_env: Option<Spanned<String>>,
    pub(super) api_key_file: Option<String>,
    pub(super) token_env: Option<Spanned<String>>,
    pub(super) token_file: Option<String>,
    pub(super) organization: Option<String>,
    pub(super) project: Option<String>,
    pub(super) api_version: Option<String>,
    pub(super) models: Spanned<Vec<Spanned<String>>>,
    #[serde(default)]
    pub(super) prices: BTreeMap<String, PriceOverride>,
    #[serde(default)]
    pub(super) deployments: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) describe: BTreeMap<String, Described>,
    pub(super) connect_timeout: Option<Spanned<String>>,
    pub(super) first_byte_timeout: Option<Spanned<String>>,
    pub(super) idle_timeout: Option<Spanned<String>>,
    pub(super) max_attempts: Option<Spanned<u32>>,
    pub(super) budget: Option<Spanned<Ceilings>>,
}

/// What the table of models does not know, or not as it is there.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Described {
    pub(super) like: Option<String>,
    pub(super) max_input: Option<u64>,
    pub(super) max_output: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Ceilings {
    pub(super) usd_per_day: Option<f64>,
    pub(super) usd_per_month: Option<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tenant {
    pub(super) name: Spanned<String>,
    pub(super) api_key_env: Option<Spanned<String>>,
    pub(super) privacy: Option<Spanned<String>>,
    pub(super) models: Option<Spanned<Vec<String>>>,
    pub(super) weight: Option<Spanned<u32>>,
    pub(super) limits: Option<Spanned<crate::limits::RateLimits>>,
    pub(super) budget: Option<Spanned<Ceilings>>,
    #[serde(default)]
    pub(super) guardrails: Vec<Spanned<String>>,
    pub(super) overflow: Option<Spanned<Overflow>>,
    pub(super) max_output_tokens: Option<Spanned<u64>>,
    #[serde(default)]
    pub(super) strict_params: bool,
    pub(super) store_contents: Option<Spanned<bool>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Overflow {
    pub(super) when_ttft_over: Spanned<String>,
    pub(super) to: Spanned<String>,
    pub(super) usd_per_day: Option<f64>,
    pub(super) usd_per_month: Option<f64>,
    #[serde(default)]
    pub(super) adapters: Vec<String>,
    pub(super) otherwise: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Route {
    pub(super) model: Spanned<String>,
    pub(super) rules: Vec<Spanned<Rule>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Rule {
    #[serde(default)]
    pub(super) when: When,
    pub(super) to: Spanned<To>,
}

/// One place, or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum To {
    One(String),
    Chain(Vec<Link>),
}

/// A place of a chain, or a draw between several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Link {
    One(String),
    Weighted(BTreeMap<String, u32>),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct When {
    pub(super) tenant: Option<Spanned<Words>>,
    pub(super) privacy: Option<Spanned<Words>>,
    pub(super) task: Option<Words>,
    pub(super) reasoning_effort: Option<Spanned<Words>>,
    pub(super) tools: Option<bool>,
    pub(super) images: Option<bool>,
    pub(super) over_local_context: Option<bool>,
    pub(super) prompt_tokens_over: Option<usize>,
    pub(super) pii: Option<bool>,
    pub(super) language: Option<Spanned<Words>>,
    pub(super) ttft_over: Option<Spanned<String>>,
    pub(super) budget_left_under: Option<Spanned<f64>>,
    pub(super) time: Option<Spanned<String>>,
    pub(super) weekdays: Option<Spanned<Words>>,
}

/// A word, or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Words {
    One(String),
    Several(Vec<String>),
}

impl Words {
    pub(super) fn list(&self) -> Vec<String> {
        match self {
            Self::One(word) => vec![word.clone()],
            Self::Several(words) => words.clone(),
        }
    }
}

/// `[[identity]]`: who signs tokens that name a tenant.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Identity {
    pub(super) issuer: String,
    pub(super) audience: Words,
    pub(super) jwks_url: Option<String>,
    pub(super) tenant: Option<Spanned<String>>,
    pub(super) tenant_claim: Option<String>,
    #[serde(default)]
    pub(super) tenants: BTreeMap<String, Spanned<String>>,
}

/// The line of a place in the text, from 1.
pub(super) fn line_of(text: &str, offset: usize) -> usize {
    text.get(..offset).unwrap_or(text).matches('\n').count() + 1
}

impl File {
    pub(super) fn parse(text: &str) -> Result<Self, Problem> {
        toml::from_str(text).map_err(|error| {
            let message = error.message().trim().to_owned();
            let is_key = ["`api_key`", "`key`", "`api_keys`", "`token`", "`password`"];
            let hint = if is_key.iter().any(|name| message.contains(&format!("unknown field {name}"))) {
                "a key itself is refused in a config file: put it into the environment, and the variable's name here, as api_key_env"
            } else {
                "`bindery check --explain` documents every key"
            };
            let line = error.span().map(|span| line_of(text, span.start));
            Problem { line, message, hint: Some(hint.to_owned()) }
        })
    }
}
