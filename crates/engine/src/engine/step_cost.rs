//! What a step costs, learned from the steps there were: so much for being one, so much for each token in it.
//!
//! A mean over all tokens would not do for predictions: where one request decodes, a step's whole cost (the weights are read once)
//! falls on one token, and a prompt of a thousand would seem to take a thousand times that. So steps that compute prompts and steps
//! that only decode are averaged apart, each over its own recent past, and the line through the two averages is the cost. Knows no
//! clock and decides nothing.

/// Seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepCost {
    /// For being a step.
    pub per_step: f64,
    /// For each token in it.
    pub per_token: f64,
}

impl StepCost {
    /// Seconds until `num_tokens` of prompts are computed, where a step holds `max_num_batched_tokens` and `num_decoding` of them
    /// are other requests' next ones.
    pub fn prompt_seconds(&self, num_tokens: usize, num_decoding: usize, max_num_batched_tokens: usize) -> f64 {
        let room = max_num_batched_tokens.saturating_sub(num_decoding).max(1);
        let num_steps = num_tokens.div_ceil(room) as f64;
        num_steps * (self.per_step + self.per_token * num_decoding as f64) + self.per_token * num_tokens as f64
    }
}

/// The two averages.
#[derive(Debug, Default)]
pub(crate) struct StepCosts {
    decoding: Recent,
    prompts: Recent,
}

impl StepCosts {
    /// A step has computed so many tokens in so many seconds, prompts among them or not.
    pub(crate) fn observe(&mut self, num_tokens: usize, seconds: f64, has_prompts: bool) {
        let kind = if has_prompts { &mut self.prompts } else { &mut self.decoding };
        kind.add(num_tokens as f64, seconds);
    }

    /// None before the first step.
    pub(crate) fn cost(&self) -> Option<StepCost> {
        let (short, long) = match (self.decoding.mean(), self.prompts.mean()) {
            (Some(short), Some(long)) => (short, long),
            (short, long) => return short.or(long).map(Mean::all_by_tokens),
        };
        let per_token = (long.seconds - short.seconds) / (long.num_tokens - short.num_tokens);
        let cost = StepCost { per_step: short.seconds - per_token * short.num_tokens, per_token };
        // Where the steps are too much alike to tell the two costs apart, noise decides; the tokens then bear it all.
        let is_told = long.num_tokens > short.num_tokens && cost.per_token > 0.0 && cost.per_step >= 0.0;
        Some(if is_told { cost } else { long.all_by_tokens() })
    }
}

/// Sums over the steps of one kind, older ones counting less and less.
#[derive(Debug, Default)]
struct Recent {
    num_steps: f64,
    num_tokens: f64,
    seconds: f64,
}

impl Recent {
    fn add(&mut self, num_tokens: f64, seconds: f64) {
        /// A step counts half after 22 others of its kind.
        const KEPT: f64 = 31.0 / 32.0;
        self.num_steps = self.num_steps * KEPT + 1.0;
        self.num_tokens = self.num_tokens * KEPT + num_tokens;
        self.seconds = self.seconds * KEPT + seconds;
    }

    fn mean(&self) -> Option<Mean> {
        let mean = Mean { num_tokens: self.num_tokens / self.num_steps, seconds: self.seconds / self.num_steps };
        (self.num_steps > 0.0 && mean.num_tokens > 0.0).then_some(mean)
    }
}

#[derive(Clone, Copy)]
struct Mean {
    num_tokens: f64,
    seconds: f64,
}

impl Mean {
    fn all_by_tokens(self) -> StepCost {
        StepCost { per_step: 0.0, per_token: self.seconds / self.num_tokens }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine that takes 5 ms a step and 0.2 ms a token.
    fn seconds(num_tokens: usize) -> f64 {
        0.005 + 0.0002 * num_tokens as f64
    }

    fn near(found: f64, wanted: f64) -> bool {
        (found - wanted).abs() <= wanted.abs() * 1e-6 + 1e-12
    }

    #[test]
    fn a_prompt_is_told_apart_from_decoding() {
        let mut costs = StepCosts::default();
        assert_eq!(costs.cost(), None);
        costs.observe(100, seconds(100), true);
        let alone = costs.cost().unwrap();
        assert!(near(alone.prompt_seconds(100, 0, 512), seconds(100)), "one step says what one step costs");
        // One request decodes for long: what is known of prompts stays.
        for _ in 0..5_000 {
            costs.observe(1, seconds(1), false);
        }
        let cost = costs.cost().unwrap();
        assert!(near(cost.per_step, 0.005) && near(cost.per_token, 0.0002), "{cost:?}");
        // 1000 tokens, 8 requests decoding, 128 a step: 120 a step, so nine steps.
        assert!(near(cost.prompt_seconds(1000, 8, 128), 9.0 * seconds(8) + 1000.0 * 0.0002));
        assert_eq!(cost.prompt_seconds(0, 8, 128), 0.0);
    }

    #[test]
    fn a_machine_that_got_slower_is_seen() {
        let mut costs = StepCosts::default();
        for slower in [1.0, 3.0] {
            for _ in 0..400 {
                costs.observe(64, slower * seconds(64), true);
                costs.observe(4, slower * seconds(4), false);
            }
        }
        assert!((costs.cost().unwrap().per_token / 0.0006 - 1.0).abs() < 1e-3);
    }

    #[test]
    fn noise_makes_no_cost_negative() {
        for (short, long) in [((4, 0.010), (5, 0.009)), ((8, 0.001), (4, 0.002)), ((1, 0.001), (100, 0.5))] {
            let mut costs = StepCosts::default();
            costs.observe(short.0, short.1, false);
            costs.observe(long.0, long.1, true);
            let cost = costs.cost().unwrap();
            assert!(cost.per_step >= 0.0 && cost.per_token > 0.0, "{cost:?}");
        }
    }
}
