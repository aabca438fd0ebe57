//! Log-probabilities of the model's own distribution: before temperature, penalties, bias and masks.
//!
//! The normaliser is summed in f64, so that a vocabulary of a quarter million entries costs no digits. It must not know
//! how the token was chosen.

use bindery_scheduler::TokenId;

use super::{
    filter::{self, Candidate, Scratch},
    numeric,
};
use crate::request::TokenLogprobs;

/// What is computed once a row, however many tokens' log-probabilities are read from it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RawDistribution {
    /// ln of the sum of exp(logit).
    log_normalizer: f64,
}

impl RawDistribution {
    /// Of a row of logits; `None` where one of them is NaN or plus infinity, or all are minus infinity.
    pub fn new(logits: &[f32]) -> Option<Self> {
        if !numeric::all_below_infinity(logits) {
            return None;
        }
        let max = numeric::max(logits);
        (max > f32::NEG_INFINITY).then(|| Self { log_normalizer: f64::from(max) + numeric::sum_exp(logits, max).ln() })
    }

    fn logprob(self, logit: f32) -> f32 {
        (f64::from(logit) - self.log_normalizer) as f32
    }

    /// The rank is one more than the number of likelier tokens; ties of the `num_top` best stand by lower id.
    pub(super) fn of_token(self, logits: &[f32], token: TokenId, num_top: u32, scratch: &mut Scratch) -> TokenLogprobs {
        let logit = logits[token.0 as usize];
        let top = if num_top == 0 {
            Vec::new()
        } else {
            filter::collect_top(logits, num_top as usize, f32::NEG_INFINITY, scratch);
            scratch.candidates.sort_unstable_by(Candidate::order);
            scratch.candidates.iter().map(|best| (TokenId(best.id), self.logprob(best.value))).collect()
        };
        TokenLogprobs { logprob: self.logprob(logit), rank: 1 + numeric::count_above(logits, logit), top }
    }
}
