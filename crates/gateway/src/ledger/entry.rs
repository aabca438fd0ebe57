//! What the ledger says of one request.
//!
//! Counts and names only: no prompt, no answer, no key. **Invariant**: an entry's id is made here and by no client, so no
//! two requests share a row.

use std::{fmt, time::Duration};

use crate::{keys::Credential, money::Money, names::TenantId};

/// Where a request was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LedgerRoute {
    /// By the model in this process.
    Local,
    /// By the upstream of this name.
    Upstream(String),
}

impl fmt::Display for LedgerRoute {
    /// As the header `x-bindery-route` says it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("local"),
            Self::Upstream(name) => write!(f, "upstream:{name}"),
        }
    }
}

/// A request before it is answered.
#[derive(Clone, Debug)]
pub struct Call {
    /// Who pays.
    pub tenant: TenantId,
    /// What opened the door.
    pub credential: Credential,
    /// As it was served, not as it was asked for.
    pub model: String,
    /// The adapter, if one was used.
    pub adapter: Option<String>,
    /// Where.
    pub route: LedgerRoute,
}

/// Tokens of a request. The cached are among the prompt's, the reasoning among the completion's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_field_names, reason = "the project's vocabulary")]
pub struct TokenCounts {
    /// Of the prompt.
    pub num_prompt_tokens: u64,
    /// Of those, read from a cache.
    pub num_cached_tokens: u64,
    /// Of the answer.
    pub num_completion_tokens: u64,
    /// Of those, thought and not said.
    pub num_reasoning_tokens: u64,
    /// Nobody counted them: they are a bound or a guess.
    pub is_estimated: bool,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestStatus {
    /// It was answered.
    Completed,
    /// The client left.
    Cancelled,
    /// It failed after it had begun to cost.
    Failed,
}

impl RequestStatus {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }
}

/// A request after it was answered.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// How it ended.
    pub status: RequestStatus,
    /// What it used.
    pub tokens: TokenCounts,
    /// From the first byte in to the last byte out.
    pub latency: Duration,
    /// What it cost.
    pub price: Money,
    /// What the reference model upstream would have cost; for what ran locally.
    pub reference_price: Option<Money>,
}

/// The words for a credential in the store: a key's id, or issuer and subject.
pub(super) fn credential_words(credential: &Credential) -> String {
    match credential {
        Credential::Key(id) => id.to_string(),
        Credential::Jwt { issuer, subject } => format!("jwt:{issuer}#{subject}").chars().take(400).collect(),
    }
}
