//! What a record says.
//!
//! Names, digests, counts and verdicts; texts only as [`Contents`], which are encrypted before they are written. **Invariant**: what is
//! here can be read by whoever may read the log, so nothing here quotes a prompt.

use std::fmt::Write as _;

use serde::Serialize;

use crate::guardrails::Verdict;

/// One request, from question to answer.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RequestRecord {
    /// The id that the client was told.
    pub request_id: String,
    /// Whose request.
    pub tenant: String,
    /// By which key; the id, never the key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
    /// What answered.
    pub model: ModelUsed,
    /// Where.
    pub route: RouteTaken,
    /// What guardrails found.
    pub verdicts: Vec<Verdict>,
    /// How much.
    pub tokens: TokenCounts,
    /// How it ended: a finish reason, or an error's code.
    pub outcome: String,
}

/// What answered.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ModelUsed {
    /// The model that ran, which need not be the one asked for.
    pub name: String,
    /// The digest of its weights; an upstream's are not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Its licence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub licence: Option<String>,
    /// What it was adapted by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterUsed>,
}

/// An adapter.
#[derive(Clone, Debug, Default, Serialize)]
pub struct AdapterUsed {
    /// Its name.
    pub name: String,
    /// The digest of its weights.
    pub digest: String,
    /// Its licence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub licence: Option<String>,
}

/// Where it ran.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RouteTaken {
    /// `local`, or an upstream's name.
    pub to: String,
    /// The rule or the reason.
    pub why: String,
}

/// How many tokens.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct TokenCounts {
    /// Of the prompt.
    pub prompt: u64,
    /// Of the prompt, those that were cached.
    pub cached: u64,
    /// Of the answer.
    pub completion: u64,
    /// Of the answer, those that were reasoning.
    pub reasoning: u64,
}

/// Prompt and answer as they were, for those policies that keep them.
#[derive(Clone, Default, Serialize, serde::Deserialize)]
pub struct Contents {
    /// The request's messages or prompt.
    pub prompt: String,
    /// The answer's text.
    pub answer: String,
}

impl std::fmt::Debug for Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Contents({} and {} bytes)", self.prompt.len(), self.answer.len())
    }
}

impl Contents {
    /// The same, each text at most this long.
    #[must_use]
    pub(super) fn cut_to(mut self, max_bytes: usize) -> Self {
        for text in [&mut self.prompt, &mut self.answer] {
            if text.len() > max_bytes {
                let num_cut = text.len() - text.floor_char_boundary(max_bytes);
                text.truncate(text.floor_char_boundary(max_bytes));
                // A string takes all that is written to it.
                let _ = write!(text, " [{num_cut} bytes were not kept]");
            }
        }
        self
    }
}
