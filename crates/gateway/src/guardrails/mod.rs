//! Checks on what people write and what models answer, and what is done about it.
//!
//! A [`Policy`] is a tenant's ordered list of [`Guardrail`]s. [`Policy::check_prompt`] goes through every text of a request;
//! a [`StreamFilter`] goes through one choice of an answer while it is written, and holds back only what could still
//! become part of a match. Guardrails that have to ask someone (a web hook, a judge) come after all others and see the
//! redacted text: [`Policy::ask_outside`].
//!
//! Reading order: [`policy`] and [`config`] what there is; [`stream`] and [`stage`] how a text goes through; [`scan`] what
//! detectors have in common; then the detectors. Knows no engine, no provider and no HTTP server. Texts are never logged and never part of a verdict.
//!
//! **Invariant**: what a text becomes does not depend on the pieces that it comes in, and nothing of a forbidden match is
//! let go before the match is known to be none.

mod anchored;
mod arguments;
mod blocklist;
mod checks;
pub mod config;
mod injection;
pub mod language;
mod normalise;
pub mod outside;
mod parts;
mod pattern;
mod pii;
mod plain;
pub mod policy;
mod scan;
mod stage;
pub mod stream;
#[cfg(test)]
mod tests;
mod vault;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use self::{
    blocklist::WordMatch,
    config::GuardrailConfig,
    outside::{Judge, JudgeFailed, JudgePlace, Question, no_secrets},
    pii::PiiKind,
    policy::{Decision, Guardrail, Policy, PromptOutcome},
    stream::{Released, StreamFilter},
    vault::Vault,
};

/// What happens when something is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// A prompt is refused (400); an answer ends (`content_filter`).
    Block,
    /// A placeholder takes its place.
    Redact,
    /// The request may only run on this machine.
    RouteLocal,
    /// It is counted, and nothing else.
    Flag,
}

/// Which way a text goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// To the model.
    Prompt,
    /// From it.
    Answer,
}

/// What a text is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As people read it.
    Plain,
    /// JSON, as arguments of tools are: what is put into it must leave it valid.
    Json,
}

/// How often something was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What: `email`, `phrase`. Never the text.
    pub label: &'static str,
    /// How often.
    pub count: u64,
}

/// What one guardrail found, for audit and metrics.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The guardrail's name.
    #[serde(serialize_with = "as_text")]
    pub guardrail: Arc<str>,
    /// Its kind: `pii`, `blocklist`.
    pub kind: &'static str,
    /// Where.
    pub side: Side,
    /// What was done.
    pub action: Action,
    /// What was found, by label.
    pub findings: Vec<Finding>,
}

impl Verdict {
    /// Whether nobody found anything: whoever was asked said nothing, and that counts as found.
    pub fn is_silence(&self) -> bool {
        self.findings.iter().all(|finding| finding.label == outside::NO_VERDICT)
    }
}

/// serde knows shared strings only with a feature that no other crate here needs.
fn as_text<S: serde::Serializer>(name: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(name)
}

/// What is wrong with a guardrail.
#[derive(Debug, thiserror::Error)]
pub enum GuardrailError {
    /// Its configuration.
    #[error("guardrail `{guardrail}`: {why}")]
    Config {
        /// Its name.
        guardrail: String,
        /// What, the limit, and the next step.
        why: String,
    },
    /// A policy names one that is not there.
    #[error("no guardrail is called `{name}`; there are: {known}; write a [[guardrails]] table for it")]
    Unknown {
        /// As it was written.
        name: String,
        /// Those that are there.
        known: String,
    },
}
