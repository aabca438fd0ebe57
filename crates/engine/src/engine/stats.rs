//! What the loop tells about itself: counters, levels and where the time went.
//!
//! It must not decide anything. Its invariant: counters only grow, and a snapshot is of one moment between two steps.

use std::time::{Duration, Instant};

use bindery_model::{AttentionWork, ModelPhase};
use bindery_scheduler::SchedulerStats;

use super::step_cost::{StepCost, StepCosts};

/// Upper bounds of the buckets of tokens per step, ascending; powers of two up to the largest usual token budget.
pub const ITERATION_TOKENS_BOUNDS: [f64; 13] =
    [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// A snapshot, refreshed after every step; monotonic counters and current levels. Plain data, so that a step that tells of itself
/// allocates nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Requests that have been scheduled and have not ended (preempted ones among them).
    pub num_requests_running: usize,
    /// Requests that were never scheduled yet.
    pub num_requests_waiting: usize,
    /// Blocks of the KV cache.
    pub num_blocks: usize,
    /// Of them, held by a sequence.
    pub num_used_blocks: usize,
    /// Tokens a block holds.
    pub block_size: usize,
    /// Slots in used blocks that hold no token.
    pub num_unused_slots: usize,
    /// How often a sequence gave its blocks back to be recomputed later.
    pub num_preemptions: u64,
    /// Prompt tokens computed, each counted once however often a preemption repeats it.
    pub prompt_tokens: u64,
    /// Tokens sampled.
    pub generation_tokens: u64,
    /// Steps that computed something.
    pub num_steps: u64,
    /// Of them, those that failed.
    pub num_failed_steps: u64,
    /// Steps in each bucket of [`ITERATION_TOKENS_BOUNDS`] (not cumulative), and in a last one beyond all bounds.
    pub iteration_tokens_counts: [u64; ITERATION_TOKENS_BOUNDS.len() + 1],
    /// Tokens over all steps.
    pub iteration_tokens_sum: u64,
    /// Seconds spent in each phase of the step since start, in the order of [`STEP_PHASES`].
    pub phase_seconds: [f64; STEP_PHASES.len()],
    /// Steps with rows whose logits could be asked for.
    pub num_logit_steps: u64,
    /// Those rows, over all steps.
    pub num_logit_rows: u64,
    /// What attention had to do at least, over all steps that were computed.
    pub attention: AttentionWork,
    /// What a step costs, by recent ones; None before the first.
    pub step_cost: Option<StepCost>,
    /// Sequences that the newest step gave a token and that go on.
    pub num_decoding: usize,
    /// Prompt tokens looked up in the prefix cache (0 until there is one).
    pub prefix_cache_queries: u64,
    /// Of them, found there.
    pub prefix_cache_hits: u64,
}

impl EngineStats {
    /// Of all steps so far; None before the first.
    pub fn seconds_per_token(&self) -> Option<f64> {
        let busy: f64 = self.phase_seconds.iter().sum();
        (busy > 0.0 && self.iteration_tokens_sum > 0).then(|| busy / self.iteration_tokens_sum as f64)
    }
}

/// A phase of the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Commands,
    Schedule,
    Model(ModelPhase),
    Head,
    Sample,
    Emit,
}

/// Names of the phases of a step, in its order: together all the time that the engine's thread does not sleep. What comes between
/// two steps counts to the second: "commands" are requests that come and go, and deadlines.
pub const STEP_PHASES: [&str; 10] =
    ["commands", "schedule", "embed", "qkv", "attention", "output", "mlp", "head", "sample", "emit"];

impl Phase {
    /// In [`STEP_PHASES`].
    fn index(self) -> usize {
        match self {
            Self::Commands => 0,
            Self::Schedule => 1,
            Self::Model(ModelPhase::Embed) => 2,
            Self::Model(ModelPhase::AttentionInputs) => 3,
            Self::Model(ModelPhase::Attention) => 4,
            Self::Model(ModelPhase::AttentionOutput) => 5,
            Self::Model(ModelPhase::Mlp) => 6,
            Self::Head => 7,
            Self::Sample => 8,
            Self::Emit => 9,
        }
    }
}

/// Counts for [`EngineStats`] on the engine's thread.
#[derive(Debug)]
pub(crate) struct StatsRecorder {
    pub(crate) prompt_tokens: u64,
    pub(crate) generation_tokens: u64,
    pub(crate) num_failed_steps: u64,
    pub(crate) num_decoding: usize,
    step_costs: StepCosts,
    num_steps: u64,
    iteration_tokens_counts: [u64; ITERATION_TOKENS_BOUNDS.len() + 1],
    iteration_tokens_sum: u64,
    num_logit_steps: u64,
    num_logit_rows: u64,
    attention: AttentionWork,
    phase_times: [Duration; STEP_PHASES.len()],
    since: Instant,
    step_started: Instant,
}

impl StatsRecorder {
    pub(crate) fn new() -> Self {
        Self {
            prompt_tokens: 0,
            generation_tokens: 0,
            num_failed_steps: 0,
            num_decoding: 0,
            step_costs: StepCosts::default(),
            num_steps: 0,
            iteration_tokens_counts: [0; ITERATION_TOKENS_BOUNDS.len() + 1],
            iteration_tokens_sum: 0,
            num_logit_steps: 0,
            num_logit_rows: 0,
            attention: AttentionWork::default(),
            phase_times: [Duration::ZERO; STEP_PHASES.len()],
            since: Instant::now(),
            step_started: Instant::now(),
        }
    }

    /// The time since the last lap was slept: what counts begins anew.
    pub(crate) fn wake(&mut self) {
        self.since = Instant::now();
    }

    /// What comes from the last lap on is the next step.
    pub(crate) fn begin_step(&mut self) {
        self.step_started = self.since;
    }

    /// The time since the last lap was spent in `phase`.
    pub(crate) fn lap(&mut self, phase: Phase) {
        let now = Instant::now();
        self.phase_times[phase.index()] += now - self.since;
        self.since = now;
    }

    pub(crate) fn count_step(&mut self, num_batched_tokens: usize) {
        self.num_steps += 1;
        self.iteration_tokens_sum += num_batched_tokens as u64;
        let bucket = ITERATION_TOKENS_BOUNDS.partition_point(|&bound| bound < num_batched_tokens as f64);
        self.iteration_tokens_counts[bucket] += 1;
    }

    /// What a step that was computed had to do at least.
    pub(crate) fn count_work(&mut self, num_logit_rows: usize, attention: AttentionWork) {
        self.num_logit_steps += u64::from(num_logit_rows > 0);
        self.num_logit_rows += num_logit_rows as u64;
        self.attention += attention;
    }

    /// What the step has cost up to its last lap.
    pub(crate) fn learn_cost(&mut self, num_batched_tokens: usize, has_prompts: bool) {
        let seconds = (self.since - self.step_started).as_secs_f64();
        self.step_costs.observe(num_batched_tokens, seconds, has_prompts);
    }

    /// None before the first step.
    pub(crate) fn step_cost(&self) -> Option<StepCost> {
        self.step_costs.cost()
    }

    pub(crate) fn snapshot(
        &self,
        scheduler: &SchedulerStats,
        block_size: usize,
        num_requests_running: usize,
        num_requests_waiting: usize,
    ) -> EngineStats {
        EngineStats {
            num_requests_running,
            num_requests_waiting,
            num_blocks: scheduler.num_blocks,
            num_used_blocks: scheduler.num_blocks - scheduler.num_free_blocks,
            block_size,
            num_unused_slots: scheduler.num_unused_slots,
            num_preemptions: scheduler.num_preemptions,
            prompt_tokens: self.prompt_tokens,
            generation_tokens: self.generation_tokens,
            num_steps: self.num_steps,
            num_failed_steps: self.num_failed_steps,
            iteration_tokens_counts: self.iteration_tokens_counts,
            iteration_tokens_sum: self.iteration_tokens_sum,
            phase_seconds: self.phase_times.map(|time| time.as_secs_f64()),
            num_logit_steps: self.num_logit_steps,
            num_logit_rows: self.num_logit_rows,
            attention: self.attention,
            step_cost: self.step_costs.cost(),
            num_decoding: self.num_decoding,
            prefix_cache_queries: 0,
            prefix_cache_hits: 0,
        }
    }
}
