//! One row of logits to one token.
//!
//! The order of the steps is that of vLLM's users' expectations: penalties, then logit bias, then what is forbidden
//! here (grammar mask, end tokens before `min_tokens`), then temperature, min-p, top-k, top-p, and the draw. The bias
//! comes after the penalties so that a bias of 100 or -100 means the same whatever the repetition penalty is.
//! Log-probabilities are of the model's own distribution, before all of it.
//!
//! This module must not know requests, channels or the scheduler. Its invariant: the token depends on the row of
//! logits, the parameters, the sample's own output so far and the random number at (seed, sample, position), and on
//! nothing else; so a request gets the same tokens alone, in a batch, or recomputed after a preemption. The vocabulary
//! is never sorted: a pass over the row finds the few candidates, and only those are looked at again.

mod filter;
mod logprobs;
mod mask;
mod numeric;
mod penalties;
mod random;

use rustc_hash::FxHashMap;

use bindery_scheduler::TokenId;

pub use filter::Filter;
pub use logprobs::RawDistribution;
pub use mask::TokenMask;
pub use random::uniform;

use crate::request::{FinishReason, SamplingParams};

/// Why a row gives no token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// NaN or plus infinity: a broken model or broken weights.
    #[error(
        "the model computed logits that are not finite numbers at generated token {position}: check its weights; where keys or values \
         are too large for a cache of f16, start with --kv-cache-dtype bf16"
    )]
    NotFinite {
        /// Index of the token that was to be sampled.
        position: usize,
    },
    /// Grammar, bias and `min_tokens` together forbid every token of the vocabulary.
    #[error(
        "no token is allowed at generated token {position}: logit_bias, min_tokens or the grammar exclude all of them"
    )]
    NothingAllowed {
        /// Index of the token that was to be sampled.
        position: usize,
    },
    /// The grammar has become too large to be followed any further.
    #[error("{param} failed at generated token {position}: {reason}; use a simpler one")]
    Grammar {
        /// The wire field it came in.
        param: &'static str,
        /// Index of the token that was to be sampled.
        position: usize,
        /// llguidance's word.
        reason: String,
    },
}

/// [`SamplingParams`] worked up for the model thread: whatever costs time in proportion to a prompt or a map is done
/// where the request is submitted.
#[derive(Clone, Debug)]
pub struct PreparedSampling {
    temperature: f32,
    filter: Filter,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    logit_bias: Vec<(TokenId, f32)>,
    seed: u64,
    min_tokens: usize,
    max_tokens: usize,
    eos_token_ids: Vec<TokenId>,
    stop_token_ids: Vec<TokenId>,
    /// Sorted, without repetitions; empty unless the repetition penalty is on.
    prompt_tokens: Vec<TokenId>,
    /// See [`SamplingParams::logprobs`].
    pub logprobs: Option<u32>,
}

impl PreparedSampling {
    /// `eos_token_ids` are the model's own end tokens. A request without a seed gets one here.
    pub fn new(params: &SamplingParams, prompt: &[TokenId], eos_token_ids: &[TokenId]) -> Self {
        let mut prompt_tokens = Vec::new();
        if params.repetition_penalty != 1.0 {
            prompt_tokens.extend_from_slice(prompt);
            prompt_tokens.sort_unstable();
            prompt_tokens.dedup();
        }
        Self {
            temperature: params.temperature,
            filter: Filter { min_p: params.min_p, top_k: params.top_k, top_p: params.top_p },
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            logit_bias: params.logit_bias.iter().map(|(&token, &bias)| (token, bias)).collect(),
            seed: params.seed.unwrap_or_else(random::fresh_seed),
            min_tokens: params.min_tokens,
            max_tokens: params.max_tokens,
            eos_token_ids: if params.ignore_eos { Vec::new() } else { eos_token_ids.to_vec() },
            stop_token_ids: params.stop_token_ids.clone(),
            prompt_tokens,
            logprobs: params.logprobs,
        }
    }

    /// Only the prompt's log-probabilities are wanted.
    pub(crate) fn generates_nothing(&self) -> bool {
        self.max_tokens == 0
    }

    fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.counts_output()
    }

    fn counts_output(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    fn masks_end_tokens(&self, num_generated_tokens: usize) -> bool {
        num_generated_tokens < self.min_tokens
    }

    /// Whether `token`, as the sample's newest, ends it.
    fn finish_reason(&self, token: TokenId, num_generated_tokens: usize) -> Option<FinishReason> {
        if self.eos_token_ids.contains(&token) {
            Some(FinishReason::EndOfSequence)
        } else if self.stop_token_ids.contains(&token) {
            Some(FinishReason::StopToken(token))
        } else if num_generated_tokens >= self.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}

/// What one sample has generated, as far as the next token depends on it.
#[derive(Clone, Debug)]
pub struct SampleState {
    /// 0..n of its request: the stream of random numbers it draws from.
    index: u32,
    num_generated_tokens: usize,
    /// How often each token occurs in the output; kept only where a penalty asks for it.
    output_counts: FxHashMap<TokenId, u32>,
}

impl SampleState {
    /// The sample with this index, before its first token.
    pub fn new(index: u32) -> Self {
        Self { index, num_generated_tokens: 0, output_counts: FxHashMap::default() }
    }

    /// Tokens recorded so far.
    pub fn num_generated_tokens(&self) -> usize {
        self.num_generated_tokens
    }

    /// Takes a sampled token into account; says why the sample ends with it, if it does.
    pub fn record(&mut self, token: TokenId, prepared: &PreparedSampling) -> Option<FinishReason> {
        self.num_generated_tokens += 1;
        if prepared.has_penalties() {
            *self.output_counts.entry(token).or_default() += 1;
        }
        prepared.finish_reason(token, self.num_generated_tokens)
    }
}

/// Buffers of the size of the vocabulary, reused from row to row.
#[derive(Debug, Default)]
pub struct Sampler {
    /// Changed logits, then weights relative to the likeliest token.
    work: Vec<f32>,
    filter: filter::Scratch,
    cumulative: Vec<f64>,
}

impl Sampler {
    /// Chooses the next token of a sample from the model's logits, `[vocab_size]`. `mask` is a grammar's word on what
    /// may come next.
    pub fn sample(
        &mut self,
        logits: &[f32],
        prepared: &PreparedSampling,
        state: &SampleState,
        mask: Option<&TokenMask>,
    ) -> Result<TokenId, SampleError> {
        let position = state.num_generated_tokens;
        if !numeric::all_below_infinity(logits) {
            return Err(SampleError::NotFinite { position });
        }
        let untouched = !prepared.has_penalties()
            && prepared.logit_bias.is_empty()
            && !prepared.masks_end_tokens(position)
            && mask.is_none();
        if untouched && prepared.is_greedy() {
            return numeric::argmax(logits).map(TokenId).ok_or(SampleError::NothingAllowed { position });
        }
        self.work.clear();
        self.work.extend_from_slice(logits);
        if !untouched {
            self.apply_changes(prepared, state, mask);
        }
        if prepared.is_greedy() {
            return numeric::argmax(&self.work).map(TokenId).ok_or(SampleError::NothingAllowed { position });
        }
        let max = numeric::max(&self.work);
        if max == f32::NEG_INFINITY {
            return Err(SampleError::NothingAllowed { position });
        }
        numeric::to_weights(&mut self.work, max, prepared.temperature);
        if let Some(cutoff) = prepared.filter.cutoff(&self.work, &mut self.filter) {
            cutoff.apply(&mut self.work);
        }
        let uniform = random::uniform(prepared.seed, state.index, position);
        Ok(TokenId(numeric::draw(&self.work, uniform, &mut self.cumulative)))
    }

    /// Penalties, bias and masks, in `work`.
    fn apply_changes(&mut self, prepared: &PreparedSampling, state: &SampleState, mask: Option<&TokenMask>) {
        let work = &mut self.work;
        penalties::apply(work, prepared, state);
        for &(token, bias) in &prepared.logit_bias {
            work[token.0 as usize] += bias;
        }
        if let Some(mask) = mask {
            mask.apply(work);
        }
        if prepared.masks_end_tokens(state.num_generated_tokens) {
            let end_tokens = || prepared.eos_token_ids.iter().chain(&prepared.stop_token_ids);
            if mask.is_some_and(|mask| mask.allows_only(end_tokens())) {
                // Where a grammar has come to its end, min_tokens cannot make the answer longer.
                return;
            }
            for token in end_tokens() {
                if let Some(logit) = work.get_mut(token.0 as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Log-probability and rank of `token` and the `num_top` most likely tokens, of the model's own distribution.
    pub fn logprobs(
        &mut self,
        logits: &[f32],
        distribution: &RawDistribution,
        token: TokenId,
        num_top: u32,
    ) -> crate::request::TokenLogprobs {
        distribution.of_token(logits, token, num_top, &mut self.filter)
    }
}

#[cfg(test)]
mod tests;
