//! What the engine thread is asked for and what it answers, in tokens: text stays outside.
//!
//! Every bound on a caller's values stands here and is checked before a request comes near the model thread, which may
//! then rely on it: token ids index into rows of logits, numbers are finite.

use std::{collections::BTreeMap, ops::RangeInclusive, time::Instant};

use bindery_scheduler::{Share, TokenId};

use crate::{AdapterLease, EngineError, grammar::CompiledGrammar};

/// Parallel samples of one request.
pub const MAX_SAMPLES: u32 = 128;
/// Entries of a `logit_bias`.
pub const MAX_LOGIT_BIASES: usize = 1024;
/// Entries of `stop_token_ids`.
pub const MAX_STOP_TOKENS: usize = 256;
/// Most likely tokens listed with each log-probability (OpenAI's wire allows 20 in chats, 5 in completions; the server
/// narrows it).
pub const MAX_LOGPROBS: u32 = 100;
/// Above this a repetition penalty only ever bans.
pub const MAX_REPETITION_PENALTY: f32 = 100.0;

/// How tokens are chosen. Values are checked by [`SamplingParams::validate`] before they come near the model thread.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy. 0..=2.
    pub temperature: f32,
    /// Nucleus: (0, 1].
    pub top_p: f32,
    /// Keep the k most likely; 0 or -1 on the wire means all.
    pub top_k: Option<u32>,
    /// Keep tokens at least this likely relative to the best: [0, 1].
    pub min_p: f32,
    /// > 0; 1 is off. Over prompt and output, as in transformers and vLLM.
    pub repetition_penalty: f32,
    /// -2..=2, once for a token that occurs in the output.
    pub presence_penalty: f32,
    /// -2..=2, for each time a token occurs in the output.
    pub frequency_penalty: f32,
    /// Added to logits; token id -> -100..=100.
    pub logit_bias: BTreeMap<TokenId, f32>,
    /// Same seed, same tokens, whatever else is in the batch. None: drawn at random when the request is admitted.
    pub seed: Option<u64>,
    /// No end-of-sequence or stop token before this many tokens.
    pub min_tokens: usize,
    /// Limit of generated tokens.
    pub max_tokens: usize,
    /// End the sequence; besides the model's own end tokens.
    pub stop_token_ids: Vec<TokenId>,
    /// The model's own end tokens do not end it.
    pub ignore_eos: bool,
    /// Log-probabilities of the chosen token and this many most likely ones (Some(0): the chosen one alone).
    pub logprobs: Option<u32>,
    /// The same for prompt tokens.
    pub prompt_logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: None,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            seed: None,
            min_tokens: 0,
            max_tokens: 16,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Checks every value against its range; the error names the wire field, the value and the range.
    /// [`SamplingParams::max_tokens`] may be 0 only where [`SamplingParams::prompt_logprobs`] is set (score only).
    pub fn validate(&self, vocab_size: usize) -> Result<(), EngineError> {
        in_range("temperature", self.temperature, 0.0..=2.0)?;
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(invalid("top_p", format!("top_p is {}, it must be above 0 and at most 1", self.top_p)));
        }
        if self.top_k == Some(0) {
            return Err(invalid("top_k", "top_k is 0, it must be at least 1, or absent for all tokens".to_owned()));
        }
        in_range("min_p", self.min_p, 0.0..=1.0)?;
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty <= MAX_REPETITION_PENALTY) {
            let value = self.repetition_penalty;
            return Err(invalid(
                "repetition_penalty",
                format!("repetition_penalty is {value}, it must be above 0 and at most {MAX_REPETITION_PENALTY}"),
            ));
        }
        in_range("presence_penalty", self.presence_penalty, -2.0..=2.0)?;
        in_range("frequency_penalty", self.frequency_penalty, -2.0..=2.0)?;
        self.check_lengths()?;
        for (&token, &bias) in &self.logit_bias {
            token_in_vocabulary("logit_bias", token, vocab_size)?;
            in_range("logit_bias", bias, -100.0..=100.0)?;
        }
        for &token in &self.stop_token_ids {
            token_in_vocabulary("stop_token_ids", token, vocab_size)?;
        }
        if self.max_tokens == 0 && self.prompt_logprobs.is_none() {
            return Err(invalid("max_tokens", "max_tokens is 0, it must be at least 1".to_owned()));
        }
        if self.min_tokens > self.max_tokens {
            let (min, max) = (self.min_tokens, self.max_tokens);
            return Err(invalid("min_tokens", format!("min_tokens is {min}, it must not exceed max_tokens, {max}")));
        }
        at_most("logprobs", "tokens", self.logprobs.unwrap_or(0) as usize, MAX_LOGPROBS as usize)?;
        at_most("prompt_logprobs", "tokens", self.prompt_logprobs.unwrap_or(0) as usize, MAX_LOGPROBS as usize)
    }

    /// Only the lengths of the lists, as part of [`SamplingParams::validate`]: for a caller that is about to copy the
    /// parameters for many prompts.
    pub fn check_lengths(&self) -> Result<(), EngineError> {
        at_most("logit_bias", "entries", self.logit_bias.len(), MAX_LOGIT_BIASES)?;
        at_most("stop_token_ids", "entries", self.stop_token_ids.len(), MAX_STOP_TOKENS)
    }
}

fn invalid(param: &'static str, message: String) -> EngineError {
    EngineError::Invalid { param, message }
}

/// NaN is in no range.
fn in_range(param: &'static str, value: f32, range: RangeInclusive<f32>) -> Result<(), EngineError> {
    if range.contains(&value) {
        return Ok(());
    }
    let (low, high) = range.into_inner();
    Err(invalid(param, format!("{param} is {value}, it must be between {low} and {high}")))
}

fn at_most(param: &'static str, of_what: &str, value: usize, limit: usize) -> Result<(), EngineError> {
    if value <= limit {
        return Ok(());
    }
    Err(invalid(param, format!("{param} has {value} {of_what}, the limit is {limit}")))
}

/// `Ok` where the model's vocabulary has the token.
pub(crate) fn token_in_vocabulary(param: &'static str, token: TokenId, vocab_size: usize) -> Result<(), EngineError> {
    if (token.0 as usize) < vocab_size {
        return Ok(());
    }
    let id = token.0;
    Err(invalid(param, format!("token id {id} in {param} is not in the vocabulary, which has {vocab_size} tokens")))
}

/// A request as the engine thread sees it.
#[derive(Clone, Debug)]
pub struct TokenRequest {
    /// For logs: the request id.
    pub request_id: String,
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// How to sample.
    pub params: SamplingParams,
    /// What every sample keeps to. With it, `ignore_eos` has no effect: an answer ends where its grammar does.
    pub grammar: Option<CompiledGrammar>,
    /// The version of an adapter that all its rows go through; None: the plain base.
    pub adapter: Option<AdapterLease>,
    /// Parallel samples, 1..=128.
    pub num_samples: u32,
    /// Lower runs first.
    pub priority: i32,
    /// Whose it is, and what it may claim of a busy machine beside others'.
    pub share: Share,
    /// Cancelled when it passes.
    pub deadline: Option<Instant>,
}

/// What comes back, in order for each sample.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenEvent {
    /// The request was first scheduled (for queue time).
    Scheduled,
    /// Log-probabilities of prompt tokens, in slices, in order; the first token of the prompt has none.
    PromptLogprobs(Vec<Option<TokenLogprobs>>),
    /// A sampled token.
    Token {
        /// 0..num_samples.
        sample: u32,
        /// The token.
        token: TokenId,
        /// Where asked for.
        logprobs: Option<TokenLogprobs>,
        /// Set with the sample's last token.
        finish: Option<FinishReason>,
    },
}

/// Log-probabilities at one position, of the model's own distribution (before temperature and penalties).
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token itself.
    pub logprob: f32,
    /// 1 is the most likely token.
    pub rank: u32,
    /// The most likely tokens, best first.
    pub top: Vec<(TokenId, f32)>,
}

/// Why a sample ended, as the engine knows it (stop strings are found outside).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence token of the model.
    EndOfSequence,
    /// One of `stop_token_ids`.
    StopToken(TokenId),
    /// A stop string (set outside the engine thread).
    StopString,
    /// `max_tokens`, or the context is full.
    Length,
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCAB_SIZE: usize = 100;

    fn check(expected: Option<&str>, change: impl FnOnce(&mut SamplingParams)) {
        let mut params = SamplingParams::default();
        change(&mut params);
        match (params.validate(VOCAB_SIZE), expected) {
            (Ok(()), None) => {}
            (Err(EngineError::Invalid { param, message }), Some(expected)) => {
                assert_eq!(param, expected, "{message}");
                assert!(message.contains(param), "{message} names its field");
            }
            (found, expected) => panic!("{found:?} instead of {expected:?} for {params:?}"),
        }
    }

    #[test]
    fn the_ends_of_every_range_are_good() {
        check(None, |_| {});
        check(None, |p| (p.temperature, p.min_p, p.presence_penalty, p.frequency_penalty) = (0.0, 0.0, -2.0, -2.0));
        check(None, |p| (p.temperature, p.min_p, p.presence_penalty, p.frequency_penalty) = (2.0, 1.0, 2.0, 2.0));
        check(None, |p| (p.top_p, p.repetition_penalty) = (f32::MIN_POSITIVE, MAX_REPETITION_PENALTY));
        check(None, |p| (p.top_k, p.min_tokens, p.max_tokens) = (Some(u32::MAX), 7, 7));
        check(None, |p| (p.max_tokens, p.prompt_logprobs, p.logprobs) = (0, Some(MAX_LOGPROBS), Some(MAX_LOGPROBS)));
        check(None, |p| p.logit_bias = [(TokenId(0), -100.0), (TokenId(99), 100.0)].into());
        check(None, |p| p.stop_token_ids = vec![TokenId(99); MAX_STOP_TOKENS]);
    }

    #[test]
    fn beyond_the_ends_and_no_number_are_refused_by_name() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.001, 2.001] {
            check(Some("temperature"), |p| p.temperature = bad);
        }
        for bad in [f32::NAN, f32::INFINITY, 0.0, -0.5, 1.001] {
            check(Some("top_p"), |p| p.top_p = bad);
        }
        for bad in [f32::NAN, -0.001, 1.001] {
            check(Some("min_p"), |p| p.min_p = bad);
        }
        for bad in [f32::NAN, f32::INFINITY, 0.0, -1.0, 100.1] {
            check(Some("repetition_penalty"), |p| p.repetition_penalty = bad);
        }
        for bad in [f32::NAN, -2.001, 2.001] {
            check(Some("presence_penalty"), |p| p.presence_penalty = bad);
            check(Some("frequency_penalty"), |p| p.frequency_penalty = bad);
        }
        for (token, bias) in [(100, 0.0), (u32::MAX, 0.0), (1, f32::NAN), (1, 100.5), (1, -100.5)] {
            check(Some("logit_bias"), |p| p.logit_bias = [(TokenId(token), bias)].into());
        }
        let many: BTreeMap<_, _> = (0..=MAX_LOGIT_BIASES as u32).map(|token| (TokenId(token), 0.0)).collect();
        check(Some("logit_bias"), |p| p.logit_bias = many);
        check(Some("top_k"), |p| p.top_k = Some(0));
        check(Some("max_tokens"), |p| p.max_tokens = 0);
        check(Some("min_tokens"), |p| (p.min_tokens, p.max_tokens) = (8, 7));
        check(Some("stop_token_ids"), |p| p.stop_token_ids = vec![TokenId(100)]);
        check(Some("stop_token_ids"), |p| p.stop_token_ids = vec![TokenId(1); MAX_STOP_TOKENS + 1]);
        check(Some("logprobs"), |p| p.logprobs = Some(MAX_LOGPROBS + 1));
        check(Some("prompt_logprobs"), |p| p.prompt_logprobs = Some(MAX_LOGPROBS + 1));
    }
}
