//! The gateway's part of the config file: text in, settings out, or every mistake with its line and a way out.
//!
//! [`tables`] is the file's shape, [`build`] what it means and which settings contradict each other. It reads no
//! environment and opens nothing: credentials are named here and fetched by [`crate::gateway`]. Invariant: a
//! [`GatewayConfig`] names no upstream, guardrail or tenant that it does not hold, and no `local-only` tenant with a way out.

mod build;
mod tables;
#[cfg(test)]
mod tests;

use std::{path::PathBuf, sync::Arc, time::Duration};

use crate::{
    audit::AuditConfig,
    failure::OnFailure,
    guardrails::GuardrailConfig,
    keys::IssuerOptions,
    ledger::Budget,
    limits::RateLimits,
    money::Money,
    names::TenantId,
    policy::{Router, TenantRouting},
    providers::{ModelEntry, Provider, UnmappedFields},
    store::{Durability, StoreUrl},
};

/// Sections of the config file that are read here.
pub const SECTIONS: [&str; 8] = ["store", "local", "upstreams", "tenants", "routes", "guardrails", "audit", "identity"];

/// What is wrong with a file, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Counts from 1.
    pub line: Option<usize>,
    /// The value and the rule.
    pub message: String,
    /// The next step.
    pub hint: Option<String>,
}

/// All that the file says about the gateway.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// Where keys, budgets and the ledger are kept; None where the file names no store.
    pub store: Option<StoreConfig>,
    /// What an hour of this node costs; prices local tokens.
    pub local_cost_per_hour: Option<Money>,
    /// The upstream model that local answers are compared with ("saved").
    pub reference: Option<ModelEntry>,
    /// In the file's order.
    pub upstreams: Vec<UpstreamConfig>,
    /// Likewise.
    pub tenants: Vec<TenantConfig>,
    /// Rules.
    pub router: Router,
    /// Of the whole file; policies name them.
    pub guardrails: Vec<GuardrailConfig>,
    /// None: nothing is logged.
    pub audit: Option<AuditConfig>,
    /// JWT issuers.
    pub issuers: Vec<IssuerOptions>,
}

/// `[store]`
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Where.
    pub url: StoreUrl,
    /// Against what a write is safe.
    pub durability: Durability,
    /// The file grows no further.
    pub max_bytes: Option<u64>,
    /// Rows of the ledger older than this are deleted.
    pub keep: Option<Duration>,
    /// What happens to local requests whose row cannot be written. What costs money upstream is refused in any case.
    pub on_failure: OnFailure,
}

/// Where a credential is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CredentialSource {
    /// There is none.
    None,
    /// An API key in an environment variable.
    KeyEnv(String),
    /// An API key in a file.
    KeyFile(PathBuf),
    /// A bearer token in an environment variable (Entra).
    TokenEnv(String),
    /// A bearer token in a file that someone renews.
    TokenFile(PathBuf),
}

/// `[[upstreams]]`
#[derive(Clone, Debug)]
pub struct UpstreamConfig {
    /// What targets call it.
    pub name: Arc<str>,
    /// Its wire.
    pub provider: Provider,
    /// In place of the provider's own address.
    pub base_url: Option<String>,
    /// How it knows us.
    pub credential: CredentialSource,
    /// OpenAI's headers.
    pub account: (Option<String>, Option<String>),
    /// The models it is asked for.
    pub models: Vec<ModelEntry>,
    /// All tenants' together.
    pub budgets: Vec<Budget>,
    /// How long it is waited for.
    pub patience: Patience,
}

/// How long an upstream is waited for, and how often it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// To open a connection.
    pub connect: Duration,
    /// From the request to the head of the response.
    pub first_byte: Duration,
    /// Between two pieces of an answer.
    pub idle: Duration,
    /// In all, of attempts that cost nothing; of others there are two at most.
    pub max_attempts: u32,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            // A reasoning model may think for minutes before it says a word.
            first_byte: Duration::from_mins(10),
            idle: Duration::from_mins(5),
            max_attempts: 3,
        }
    }
}

impl UpstreamConfig {
    /// Whether its credential, and prompts, cross a network that anybody on the way can read.
    pub fn is_in_the_clear(&self) -> bool {
        let Some(url) = self.base_url.as_deref().and_then(|url| url.trim().parse::<url::Url>().ok()) else {
            return false;
        };
        let is_here = match url.host() {
            Some(url::Host::Domain(name)) => name == "localhost",
            Some(url::Host::Ipv4(address)) => address.is_loopback(),
            Some(url::Host::Ipv6(address)) => address.is_loopback(),
            None => false,
        };
        url.scheme() == "http" && !is_here && self.credential != CredentialSource::None
    }
}

/// `[[tenants]]`
#[derive(Clone, Debug)]
pub struct TenantConfig {
    /// Its name.
    pub id: TenantId,
    /// Where its requests may go.
    pub routing: TenantRouting,
    /// A key of its own from the environment, besides those in the store.
    pub api_key_env: Option<String>,
    /// Its own.
    pub limits: RateLimits,
    /// Its own.
    pub budgets: Vec<Budget>,
    /// Of what overflows.
    pub overflow_budgets: Vec<Budget>,
    /// Names, in the order of checking.
    pub guardrails: Vec<String>,
    /// The longest answer where a request says nothing.
    pub max_output_tokens: Option<u64>,
    /// What happens to fields that an upstream has no counterpart for.
    pub fields: UnmappedFields,
    /// Its share of this machine beside others'.
    pub weight: u32,
    /// The audit log keeps its prompts and answers, encrypted.
    pub store_contents: bool,
}

impl GatewayConfig {
    /// Whether the file says nothing about the gateway: then there is none, and every request goes its short way.
    pub fn is_empty(&self) -> bool {
        let Self { store, local_cost_per_hour, reference: _, upstreams, tenants, router, guardrails, audit, issuers } =
            self;
        store.is_none()
            && local_cost_per_hour.is_none()
            && upstreams.is_empty()
            && tenants.is_empty()
            && router.virtual_models.is_empty()
            && guardrails.is_empty()
            && audit.is_none()
            && issuers.is_empty()
    }

    /// Reads the sections of [`SECTIONS`]; others are someone else's.
    ///
    /// # Errors
    /// Every mistake that can be found at once.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        build::build(tables::File::parse(text).map_err(|problem| vec![problem])?, text)
    }
}
