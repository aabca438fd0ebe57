//! What an answer used, in counts that a ledger can add and a price can be put on.
//!
//! Knows no price. Invariant: `prompt` includes `cached` and `cache_write`, `completion` includes `reasoning`, whatever
//! the provider's own way of counting.

use serde_json::{Value, json};

use super::catalogue::ServedTier;

/// Bytes of answer text for one token where a stream was cut before the provider counted: below what any tokenizer in
/// use makes of prose (about four), so that an estimate errs on the side of the upstream's bill.
const ESTIMATED_BYTES_PER_TOKEN: u64 = 3;

/// Counts of one answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt, cached ones included.
    pub prompt: u64,
    /// Of them read from the provider's cache.
    pub cached: u64,
    /// Of them written to the provider's cache.
    pub cache_write: u64,
    /// Tokens of the answer, reasoning included.
    pub completion: u64,
    /// Of them thought, not said.
    pub reasoning: u64,
    /// The provider did not count: the stream was cut, or its server does not say.
    pub estimated: bool,
    /// At which price list the provider served it.
    pub tier: ServedTier,
}

impl Usage {
    /// Where nobody counted: the prompt's upper bound, and what came of the answer.
    pub fn estimate(max_prompt_tokens: u64, answer_bytes: u64) -> Self {
        Self {
            prompt: max_prompt_tokens,
            completion: answer_bytes.div_ceil(ESTIMATED_BYTES_PER_TOKEN),
            estimated: true,
            ..Self::default()
        }
    }

    /// Both sides together.
    pub fn total(&self) -> u64 {
        self.prompt.saturating_add(self.completion)
    }

    /// OpenAI's `usage` object.
    pub fn to_json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.total(),
            "prompt_tokens_details": {"cached_tokens": self.cached, "cache_write_tokens": self.cache_write},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        })
    }

    /// OpenAI's `usage` object, read. `None` where it has no counts.
    pub(crate) fn from_openai(usage: &Value) -> Option<Self> {
        let count = |value: &Value| value.as_u64().unwrap_or(0);
        Some(Self {
            prompt: usage["prompt_tokens"].as_u64()?,
            completion: count(&usage["completion_tokens"]),
            cached: count(&usage["prompt_tokens_details"]["cached_tokens"]),
            cache_write: count(&usage["prompt_tokens_details"]["cache_write_tokens"]),
            reasoning: count(&usage["completion_tokens_details"]["reasoning_tokens"]),
            estimated: false,
            tier: ServedTier::default(),
        })
    }
}
