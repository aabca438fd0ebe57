//! Repetition, presence and frequency penalties.
//!
//! Repetition (Keskar et al. 2019, as transformers and vLLM apply it): the logit of every token that occurs in prompt
//! or output is divided by the penalty if positive, multiplied if not. Presence and frequency (OpenAI): subtracted
//! once, and once for each occurrence, over the output alone. Only tokens that occur are visited.

use super::{PreparedSampling, SampleState};

/// Changes `logits` in place.
pub(super) fn apply(logits: &mut [f32], prepared: &PreparedSampling, state: &SampleState) {
    let repetition = prepared.repetition_penalty;
    if repetition != 1.0 {
        let only_in_output =
            state.output_counts.keys().filter(|token| prepared.prompt_tokens.binary_search(token).is_err());
        for token in prepared.prompt_tokens.iter().chain(only_in_output) {
            if let Some(logit) = logits.get_mut(token.0 as usize) {
                *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            }
        }
    }
    if prepared.counts_output() {
        for (token, &count) in &state.output_counts {
            if let Some(logit) = logits.get_mut(token.0 as usize) {
                *logit -= prepared.frequency_penalty * count as f32 + prepared.presence_penalty;
            }
        }
    }
}
