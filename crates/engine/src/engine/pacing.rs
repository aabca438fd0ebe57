//! How much of a step long prompts get beside sequences that decode.
//!
//! A long prompt that is computed at once makes every stream wait for it: seconds, on a machine without an accelerator. One that gets
//! what decoding leaves over waits as long itself. So long prompts get as much of a step's time as decoding does, and streams go on
//! at half their pace beside one; but the more requests with such prompts wait for their first token, each of which is somebody who sees
//! nothing yet, the larger is the prompts' part. A short one is computed at once: spread over steps it would disturb more tokens of the
//! streams, none of them less than anybody sees. All is reckoned in time and not in tokens, by what steps have cost lately, so that it
//! fits whatever model and machine. (Sarathi-Serve, arXiv:2403.02310, has a fixed number of tokens in its place, vLLM's
//! `long_prefill_token_threshold` one for what is long.) Knows no clock.

use bindery_scheduler::StepLoad;

use super::step_cost::StepCost;

/// A prompt that takes no longer is short. Streams that stand still for so long look as if they go on.
const SHORT_SECONDS: f64 = 0.25;
/// A step with streams in it takes no longer for the sake of long prompts, unless decoding alone takes half of that.
const MAX_STEP_SECONDS: f64 = 0.5;
/// With so many times as many long prompts as streams, prompts have all but one part in so many of the time.
const URGENCY: f64 = 32.0;

/// Tokens that make no long prompt yet, where steps cost so much.
pub(crate) fn short_tokens(cost: StepCost) -> usize {
    // What is infinite becomes the largest number.
    (SHORT_SECONDS / cost.per_token) as usize
}

/// Tokens of long prompts that a step may have with these sequences in it.
pub(crate) fn long_tokens(cost: StepCost, load: StepLoad) -> usize {
    let decoding = cost.per_step + cost.per_token * load.num_decoding as f64;
    let urgency = URGENCY * load.num_long_prompts.saturating_sub(1) as f64 / load.num_decoding as f64;
    let seconds = (decoding * urgency).min(MAX_STEP_SECONDS - decoding).max(decoding);
    ((seconds / cost.per_token) as usize).max(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(per_step: f64, per_token: f64, num_decoding: usize, num_long_prompts: usize) -> usize {
        long_tokens(StepCost { per_step, per_token }, StepLoad { num_decoding, num_long_prompts })
    }

    #[test]
    fn one_prompt_gets_as_much_time_as_the_streams() {
        // 6 + 8 ms of decoding; and 100 + 4 x 20 ms on a larger model.
        assert_eq!(limit(0.006, 0.001, 8, 1), 14);
        assert_eq!(limit(0.100, 0.020, 4, 1), 9);
    }

    #[test]
    fn the_more_wait_the_more_prompts_get_up_to_half_a_second() {
        let limits = [1, 2, 3, 5, 20, 1000].map(|num_prompts| limit(0.006, 0.001, 8, num_prompts));
        assert!(limits.is_sorted() && limits[0] == 14, "{limits:?}");
        assert_eq!(limits[5], 486, "14 ms are decoding's");
        // Where decoding alone takes longer, prompts still have half.
        assert_eq!(limit(0.1, 0.1, 9, 100), 10);
    }

    #[test]
    fn what_is_short_is_a_matter_of_time() {
        let short = |per_token| short_tokens(StepCost { per_step: 0.1, per_token });
        assert_eq!([short(0.001), short(0.1), short(1.0), short(0.0)], [250, 2, 0, usize::MAX]);
    }
}
