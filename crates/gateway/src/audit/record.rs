//! What a record says.
//!
//! Names, digests, counts and verdicts; texts only as [`Contents`], which are encrypted before they are written. **Invariant**: what is
//! here can be read by whoever may read the log, so nothing here quotes a prompt.

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
    /// The model's name as it was asked for, cut to a bounded length; empty where the request could not be read.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub asked: String,
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
    /// The digest of the version that the request held; empty where it came to hold none.
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
    /// Nobody counted them: they are a bound or a guess.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub estimated: bool,
}

/// Prompt and answer as they were, for those policies that keep them.
#[derive(Clone, Default, Serialize, serde::Deserialize)]
pub struct Contents {
    /// The request's messages, as JSON, or its prompt; as the tenant's guardrails left them.
    pub prompt: String,
    /// The answer as the client got it: its text, or JSON of its choices where there is more to it than one text.
    pub answer: String,
    /// The end of the prompt that is not here.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub prompt_bytes_cut: u64,
    /// Likewise of the answer.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub answer_bytes_cut: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl std::fmt::Debug for Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Contents({} and {} bytes)", self.prompt.len(), self.answer.len())
    }
}

impl Contents {
    /// The same, each text at most this long, and what is cut counted.
    #[must_use]
    pub(super) fn cut_to(mut self, max_bytes: usize) -> Self {
        let texts = [(&mut self.prompt, &mut self.prompt_bytes_cut), (&mut self.answer, &mut self.answer_bytes_cut)];
        for (text, num_cut) in texts {
            if text.len() > max_bytes {
                let end = text.floor_char_boundary(max_bytes);
                *num_cut += (text.len() - end) as u64;
                text.truncate(end);
            }
        }
        self
    }
}
