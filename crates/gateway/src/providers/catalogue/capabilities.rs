//! What a model accepts beyond plain text: the quirks that would otherwise be `if`s on model names.
//!
//! Invariant: a capability that the table does not grant is absent, so a new model refuses clearly rather than failing
//! upstream.

use std::collections::BTreeSet;

use serde::Deserialize;

use crate::providers::{Provider, chat::Effort};

/// Everything a translation asks about a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Single features.
    pub flags: BTreeSet<Capability>,
    /// temperature, top_p, top_k.
    pub sampling: SamplingSupport,
    /// How thinking is asked for.
    pub thinking: Thinking,
    /// Values of effort it takes; empty where it takes none.
    pub efforts: Efforts,
    /// What the limit is called.
    pub limit_field: LimitField,
    /// Answers in one call.
    pub max_answers: u64,
}

impl Capabilities {
    /// Of a server that speaks OpenAI's API and whose models are its own business.
    pub fn everything() -> Self {
        Self {
            flags: Capability::ALL.into_iter().collect(),
            sampling: SamplingSupport::All,
            thinking: Thinking::Effort,
            efforts: Efforts::all(),
            limit_field: LimitField::MaxTokens,
            max_answers: 128,
        }
    }

    /// Those of them that a provider's wire has words for: what a model that no table knows may be asked for.
    #[must_use]
    pub fn carried_by(mut self, provider: &Provider) -> Self {
        use Capability::{
            Audio, AudioOutput, Completions, LogitBias, Logprobs, ParallelToolCalls, Penalties, Prefill, Seed,
        };
        let (unknown, max_answers): (&[Capability], u64) = match provider {
            Provider::OpenAi | Provider::Azure(_) | Provider::Compatible => return self,
            Provider::Anthropic => (&[Completions, Penalties, LogitBias, Logprobs, Seed, Audio, AudioOutput], 1),
            Provider::Gemini => (&[Completions, LogitBias, AudioOutput, ParallelToolCalls, Prefill], 8),
        };
        self.flags.retain(|flag| !unknown.contains(flag));
        self.max_answers = self.max_answers.min(max_answers);
        // An effort as a word is OpenAI's; how a model here is told to think is known of those in the table.
        if self.thinking == Thinking::Effort {
            (self.thinking, self.efforts) = (Thinking::None, Efforts::default());
        }
        self
    }
}

/// One feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Capability {
    /// Chat.
    Chat,
    /// The older completions route.
    Completions,
    /// Tools at all.
    Tools,
    /// `required`, or a tool by name.
    ForcedToolUse,
    /// Tools may be called in parallel, or told not to be.
    ParallelToolCalls,
    /// A trailing assistant turn that is to be continued.
    Prefill,
    /// JSON of a schema.
    StructuredOutputs,
    /// Presence and frequency.
    Penalties,
    /// A bias on single tokens.
    LogitBias,
    /// Log-probabilities.
    Logprobs,
    /// Stop strings.
    Stop,
    /// A seed.
    Seed,
    /// Pictures.
    Images,
    /// Sound in a prompt.
    Audio,
    /// Spoken answers.
    AudioOutput,
    /// Documents.
    Files,
}

impl Capability {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::Chat,
        Self::Completions,
        Self::Tools,
        Self::ForcedToolUse,
        Self::ParallelToolCalls,
        Self::Prefill,
        Self::StructuredOutputs,
        Self::Penalties,
        Self::LogitBias,
        Self::Logprobs,
        Self::Stop,
        Self::Seed,
        Self::Images,
        Self::Audio,
        Self::AudioOutput,
        Self::Files,
    ];
}

/// Whether temperature and its kin may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SamplingSupport {
    /// All of them.
    All,
    /// temperature or top_p, not both.
    OneOf,
    /// None: they are left out, and named.
    None,
}

/// How a model is told to think.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Thinking {
    /// It does not.
    None,
    /// OpenAI's `reasoning_effort`.
    Effort,
    /// Anthropic's adaptive thinking beside an effort.
    Adaptive,
    /// The same, and it cannot be switched off.
    AlwaysAdaptive,
    /// A budget of tokens.
    Budget,
    /// A budget that cannot be zero.
    AlwaysBudget,
    /// Gemini's levels.
    Level,
}

/// What an answer's limit is called on OpenAI's wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitField {
    /// The older name.
    MaxTokens,
    /// The newer one, which reasoning models insist on.
    MaxCompletionTokens,
}

/// Which efforts a model takes, in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Efforts(BTreeSet<Effort>);

impl Efforts {
    /// Every word there is.
    pub fn all() -> Self {
        Self(<Effort as crate::providers::fields::Word>::ALL.iter().copied().collect())
    }

    pub(super) fn new(efforts: impl IntoIterator<Item = Effort>) -> Self {
        Self(efforts.into_iter().collect())
    }

    /// It takes none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The effort to ask for: the one named where it is known, else the next lower, else the lowest. `None` where the
    /// model takes no effort at all. `none` stands for itself or for the lowest: no more is spent than has to be.
    pub fn nearest(&self, asked: Effort) -> Option<Effort> {
        self.0.range(..=asked).next_back().or_else(|| self.0.first()).copied().map(|found| {
            // From above, "not at all" is no neighbour: who asks for a little thinking gets the least there is.
            if found == Effort::None && asked != Effort::None {
                self.0.range(asked..).next().copied().unwrap_or(found)
            } else {
                found
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_effort_is_below_or_else_the_lowest() {
        let efforts = Efforts::new([Effort::None, Effort::Low, Effort::High]);
        assert_eq!(efforts.nearest(Effort::None), Some(Effort::None));
        assert_eq!(efforts.nearest(Effort::Minimal), Some(Effort::Low));
        assert_eq!(efforts.nearest(Effort::Medium), Some(Effort::Low));
        assert_eq!(efforts.nearest(Effort::Max), Some(Effort::High));
        let thinking = Efforts::new([Effort::Low, Effort::Medium]);
        assert_eq!(thinking.nearest(Effort::None), Some(Effort::Low));
        assert_eq!(thinking.nearest(Effort::Minimal), Some(Effort::Low));
        assert_eq!(Efforts::default().nearest(Effort::High), None);
    }
}
