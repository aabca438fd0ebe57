//! The decisions, as one struct of plain state: requests come in, plans go out, computed steps come back.
//!
//! It must not know what a step computes, what a token means or what time it is. Its rhythm is `plan`, then `commit`
//! or `fail`, in turn; `add` and `abort` come whenever they like. Its invariants have names and one home, the module
//! `invariants`.
//!
//! How a step is chosen is told in `planning`; this file keeps the books.

mod planning;

use std::{collections::VecDeque, sync::Arc};

use rustc_hash::FxHashMap;

use crate::{
    block_pool::BlockPool,
    fair::{Charge, FairShares, Share},
    ids::{AdapterId, BlockId, SeqId, TokenId},
    invariants,
    marks::Marks,
    order::{OrderKey, PendingSample, WaitingKey},
    plan::StepPlan,
    sequence::{Sequence, State},
    slab::Slab,
};

/// Bounds; all > 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens a block holds.
    pub block_size: usize,
    /// Blocks in the pool.
    pub num_blocks: usize,
    /// Sequences in one step.
    pub max_num_seqs: usize,
    /// Tokens in one step.
    pub max_num_batched_tokens: usize,
    /// Prompt plus generated tokens of one sequence.
    pub max_model_len: usize,
    /// Requests that wait (never yet scheduled; preempted ones do not count).
    pub max_queued_requests: usize,
}

/// How long prompts are held back in steps in which others decode. Short ones are not.
#[derive(Clone, Copy)]
pub struct Pace<'a> {
    /// Tokens left to compute that make no long prompt yet.
    pub short: usize,
    /// Tokens that all long prompts of a step get together; one is the least, two where there are two.
    pub limit: &'a dyn Fn(StepLoad) -> usize,
}

impl Pace<'_> {
    /// Prompts may have whatever of a step is left.
    pub const NONE: Pace<'static> = Pace { short: usize::MAX, limit: &|_| usize::MAX };
}

impl std::fmt::Debug for Pace<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pace").field("short", &self.short).finish_non_exhaustive()
    }
}

/// Who wants tokens of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLoad {
    /// Sequences that get their next token, of no worse priority than the best long prompt; > 0.
    pub num_decoding: usize,
    /// Long prompts, running or among the first that wait; > 0.
    pub num_long_prompts: usize,
}

/// A new request.
#[derive(Clone, Debug)]
pub struct SequenceSpec {
    /// One id a sample, at least one. The first one carries the prompt; the others fork from it when the prompt is
    /// computed.
    pub samples: Vec<SeqId>,
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// At least 1; prompt + this must not exceed `max_model_len`. (0 is allowed where `prompt_logits`: score only.)
    pub max_new_tokens: usize,
    /// Lower runs first (vLLM's meaning). A better priority takes seats and blocks from a worse one.
    pub priority: i32,
    /// Whose it is: within a priority tenants get tokens in proportion to their weights.
    pub share: Share,
    /// What its rows go through.
    pub adapter: Option<AdapterId>,
    /// Logits of every prompt row are wanted (echo with logprobs, prompt_logprobs).
    pub prompt_logits: bool,
}

/// Why a request is not admitted. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Too many wait already; later it may be admitted.
    QueueFull {
        /// Requests that have never been scheduled.
        num_queued_requests: usize,
        /// The bound.
        max_queued_requests: usize,
    },
    /// Longer than the model's context.
    TooLong {
        /// Prompt + `max_new_tokens`.
        num_tokens: usize,
        /// The bound.
        max_model_len: usize,
    },
    /// Even alone one of its samples could not be held.
    NeverFits {
        /// Blocks for prompt + `max_new_tokens`.
        num_blocks_needed: usize,
        /// The whole pool.
        num_blocks: usize,
    },
    /// The caller's mistake: empty prompt, no samples, an id that is alive.
    Invalid {
        /// Which.
        reason: &'static str,
    },
}

/// A token sampled in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampled {
    /// For whom.
    pub id: SeqId,
    /// What.
    pub token: TokenId,
    /// The caller ends the sequence with this token (eos, stop token, length). It must do so with token number
    /// `max_new_tokens`.
    pub finished: bool,
}

/// Levels and counters at this moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Sequences that may be scheduled in any step.
    pub num_running: usize,
    /// Sequences that wait for blocks or a seat: never scheduled, or preempted. Samples whose prompt is not computed
    /// yet are not counted apart from their carrier.
    pub num_waiting: usize,
    /// Requests with a running sequence.
    pub num_running_requests: usize,
    /// Requests without one.
    pub num_waiting_requests: usize,
    /// Requests that have never run: what `max_queued_requests` bounds.
    pub num_queued_requests: usize,
    /// Blocks nobody holds.
    pub num_free_blocks: usize,
    /// Blocks of the pool.
    pub num_blocks: usize,
    /// Slots in allocated blocks holding nothing.
    pub num_unused_slots: usize,
    /// How often a sequence gave its blocks back, since the start.
    pub num_preemptions: u64,
}

/// A request: what its samples share.
#[derive(Debug)]
pub(crate) struct Request {
    /// Samples that are alive, pending ones included.
    pub(crate) num_live: usize,
    /// Sequences of it that run.
    pub(crate) num_running: usize,
    /// What its tenant pays for it.
    pub(crate) charge: Charge,
}

/// A sequence of the step in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InFlight {
    /// Its index; the entry there may be gone or another one by the time of the commit.
    pub(crate) index: u32,
    /// The id it was planned under.
    pub(crate) id: SeqId,
}

/// Who runs in the next step. See the module.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) limits: Limits,
    pub(crate) pool: BlockPool,
    pub(crate) sequences: Slab<Sequence>,
    pub(crate) requests: Slab<Request>,
    /// Every live sample, pending ones too (at their carrier's index). Never iterated over.
    pub(crate) index_of: FxHashMap<SeqId, u32>,
    /// Sorted.
    pub(crate) running: Vec<(OrderKey, u32)>,
    /// Sorted.
    pub(crate) waiting: VecDeque<(WaitingKey, u32)>,
    /// Sequences of the plan that was neither committed nor failed yet.
    pub(crate) in_flight: Vec<InFlight>,
    /// Means nothing between calls; kept for its memory.
    pub(crate) scratch_blocks: Vec<BlockId>,
    pub(crate) fair: FairShares,
    pub(crate) num_arrivals: u64,
    pub(crate) num_queued_requests: usize,
    pub(crate) num_running_requests: usize,
    pub(crate) marks: Marks,
}

impl Scheduler {
    /// An idle scheduler.
    ///
    /// # Panics
    /// Where a limit is zero, or the pool has more slots than a `u32` can name.
    pub fn new(limits: Limits) -> Self {
        let Limits { block_size, num_blocks, max_num_seqs, max_num_batched_tokens, max_model_len, max_queued_requests } =
            limits;
        assert!(max_num_seqs > 0, "max_num_seqs must be > 0");
        assert!(max_num_batched_tokens > 0, "max_num_batched_tokens must be > 0");
        assert!(max_model_len > 0, "max_model_len must be > 0");
        assert!(max_queued_requests > 0, "max_queued_requests must be > 0");
        Self {
            pool: BlockPool::new(num_blocks, block_size),
            limits,
            sequences: Slab::new(),
            requests: Slab::new(),
            index_of: FxHashMap::default(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            in_flight: Vec::new(),
            scratch_blocks: Vec::new(),
            fair: FairShares::default(),
            num_arrivals: 0,
            num_queued_requests: 0,
            num_running_requests: 0,
            marks: Marks::default(),
        }
    }

    /// The bounds it was made with.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Admits a request to the queue, or changes nothing. What can never run is refused before what cannot wait now.
    pub fn add(&mut self, spec: SequenceSpec) -> Result<(), Refusal> {
        self.check_spec(&spec)?;
        let SequenceSpec { samples, prompt, max_new_tokens, priority, share, adapter, prompt_logits } = spec;

        let (turn, charge) = self.fair.admit(share, prompt.len(), max_new_tokens, samples.len());
        let request = self.requests.insert(Request { num_live: samples.len(), num_running: 0, charge });
        let key = OrderKey { priority, turn, arrival: self.num_arrivals, sample: 0 };
        self.num_arrivals += 1;
        let pending_samples: Vec<PendingSample> =
            (1..).zip(&samples[1..]).map(|(sample, &id)| PendingSample { id, sample }).collect();
        let index = self.sequences.insert(Sequence {
            id: samples[0],
            request,
            key,
            state: State::Waiting,
            num_prompt_logits_emitted: if prompt_logits { 0 } else { prompt.len() },
            prompt: Arc::new(prompt),
            generated: Vec::new(),
            max_new_tokens,
            adapter,
            blocks: Vec::new(),
            num_computed_tokens: 0,
            num_scheduled_tokens: 0,
            pending_samples,
            is_held: false,
            was_scheduled: false,
            num_times_overtaken: 0,
        });
        for &id in &samples {
            self.index_of.insert(id, index);
        }
        self.num_queued_requests += 1;
        self.insert_waiting(index);
        self.debug_check();
        Ok(())
    }

    /// Fills `plan` with the next step. Cannot fail; an empty plan means that nothing can run.
    ///
    /// Whenever something is alive and nothing is held, the plan is not empty, and the first in order is in it. Where some
    /// are held, the first in order of the others is in it, unless earlier ones that are held have all the blocks. A plan that is not empty must be given to [`Self::commit`] or [`Self::fail`] before the next one is made: until then the step may still
    /// write to blocks that an [`Self::abort`] frees, which is safe because only `plan` hands blocks out.
    ///
    /// `pace` is what holds long prompts back by a clock, which the scheduler has none of; [`Pace::NONE`] where nothing does.
    ///
    /// # Panics
    /// Where the last plan was neither committed nor failed.
    pub fn plan(&mut self, pace: &Pace<'_>, plan: &mut StepPlan) {
        assert!(self.in_flight.is_empty(), "plan: the last plan was neither committed nor failed");
        plan.clear();
        self.plan_step(pace, plan);
        self.debug_check();
        if cfg!(debug_assertions) {
            invariants::check_plan(plan, &self.limits);
        }
    }

    /// Records a computed step: `sampled` has exactly one entry for each of `plan.samples`, in any order; entries for
    /// samples that were aborted since are allowed and ignored. Samples of a prompt that ended become sequences.
    ///
    /// Returns the samples that ended without a token: those of a request with `max_new_tokens` 0 whose prompt is
    /// computed. All else ends by [`Sampled::finished`] or [`Self::abort`].
    ///
    /// # Panics
    /// Where `plan` is not the last one made, a live sample got no token or two, or one goes on past
    /// `max_new_tokens`. Nothing has changed then, and the step can still be failed.
    pub fn commit(&mut self, plan: &StepPlan, sampled: &[Sampled]) -> Vec<SeqId> {
        self.check_is_last_plan(plan);
        self.check_sampled(plan, sampled);

        // Scores end here: their sequences go, and with them their claim to a sample.
        let mut ended = Vec::new();
        let mut has_forks = false;
        for at in 0..self.in_flight.len() {
            let index = self.in_flight[at].index;
            if !self.is_scheduled(index) {
                continue; // Aborted since the plan.
            }
            self.record_computed(index);
            let sequence = &self.sequences[index];
            has_forks |= !sequence.pending_samples.is_empty();
            if sequence.is_score_only() && sequence.num_uncomputed_tokens() == 0 {
                ended.extend(sequence.samples());
                self.remove(index);
            }
        }
        self.in_flight.clear();

        // Forks first: they take their share of the carrier's blocks before the carrier may end with its first token.
        for sampled in sampled.iter().filter(|_| has_forks) {
            if let Some(&index) = self.index_of.get(&sampled.id) {
                let sequence = &self.sequences[index];
                if sequence.id != sampled.id && sequence.awaits_token() {
                    self.fork(index, *sampled);
                }
            }
        }
        for sampled in sampled {
            if let Some(&index) = self.index_of.get(&sampled.id) {
                let sequence = &mut self.sequences[index];
                if !sequence.awaits_token() {
                    continue; // A fork made above, or a namesake of an aborted one, added since.
                }
                sequence.generated.push(sampled.token);
                self.requests[sequence.request].charge.num_generated += 1;
                if sampled.finished {
                    self.remove(index);
                }
            }
        }
        self.debug_check();
        ended
    }

    /// The step failed: drops every sequence in it (and the samples that wait for its prompt), frees their blocks;
    /// returns who was dropped. Everyone else goes on.
    ///
    /// # Panics
    /// Where `plan` is not the last one made.
    pub fn fail(&mut self, plan: &StepPlan) -> Vec<SeqId> {
        self.check_is_last_plan(plan);
        let mut dropped = Vec::new();
        for at in 0..self.in_flight.len() {
            let index = self.in_flight[at].index;
            if self.is_scheduled(index) {
                dropped.extend(self.sequences[index].samples());
                self.remove(index);
            }
        }
        self.in_flight.clear();
        self.debug_check();
        dropped
    }

    /// Drops a sample in any state at any time (also between plan and commit) and frees its blocks at once. False
    /// where it is not alive.
    ///
    /// Where it carries the prompt of samples that have not begun, the next of them inherits the prompt as far as it
    /// is computed.
    pub fn abort(&mut self, id: SeqId) -> bool {
        let Some(&index) = self.index_of.get(&id) else { return false };
        let sequence = &mut self.sequences[index];
        if let Some(at) = sequence.pending_samples.iter().position(|pending| pending.id == id) {
            sequence.pending_samples.remove(at);
            self.forget_sample(index, id);
        } else if sequence.pending_samples.is_empty() {
            self.remove(index);
        } else {
            sequence.id = sequence.pending_samples.remove(0).id;
            self.marks.prompt_inherited += 1;
            self.forget_sample(index, id);
        }
        self.debug_check();
        true
    }

    /// A sample that is in no plan's [`StepPlan::samples`] from now on, or no longer: what its next token depends on (a
    /// grammar's mask) is not there yet. It keeps its blocks but takes no seat, and may be preempted like any other; then
    /// it is computed again up to its last token but one. Ids that are not alive, and samples without a token yet, are
    /// ignored.
    pub fn hold(&mut self, id: SeqId, is_held: bool) {
        if let Some(&index) = self.index_of.get(&id) {
            let sequence = &mut self.sequences[index];
            if sequence.id == id && !sequence.generated.is_empty() {
                sequence.is_held = is_held;
            }
        }
    }

    /// What is computed of a sample is of no use any more (its keys were made under a rule that no longer holds for it): it
    /// gives its blocks back and is computed again from its first token, as after a preemption, but it keeps its place
    /// among the running ones. Nothing that was sampled is lost. False where nothing is computed, or the sample has not
    /// begun.
    ///
    /// # Panics
    /// Between a plan and its commit: what the step computes would be under the old rule.
    pub fn recompute(&mut self, id: SeqId) -> bool {
        assert!(self.in_flight.is_empty(), "recompute: the last plan was neither committed nor failed");
        let Some(&index) = self.index_of.get(&id) else { return false };
        let sequence = &mut self.sequences[index];
        if sequence.id != id || sequence.num_computed_tokens == 0 {
            return false;
        }
        sequence.num_computed_tokens = 0;
        for block in sequence.blocks.drain(..) {
            self.pool.release(block);
        }
        self.marks.recomputed += 1;
        self.debug_check();
        true
    }

    /// Whether anything is alive: then the next plan is not empty, unless something is held.
    pub fn has_work(&self) -> bool {
        self.sequences.len() > 0
    }

    /// Whether a sample is alive: added, and neither ended, dropped nor aborted.
    pub fn is_alive(&self, id: SeqId) -> bool {
        self.index_of.contains_key(&id)
    }

    /// Levels and counters; costs nothing.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            num_running: self.running.len(),
            num_waiting: self.waiting.len(),
            num_running_requests: self.num_running_requests,
            num_waiting_requests: self.requests.len() - self.num_running_requests,
            num_queued_requests: self.num_queued_requests,
            num_free_blocks: self.pool.num_free(),
            num_blocks: self.pool.num_blocks(),
            num_unused_slots: self.pool.num_unused_slots(),
            num_preemptions: self.marks.preempted,
        }
    }

    /// How often each rare branch was taken.
    pub fn marks(&self) -> &Marks {
        &self.marks
    }

    /// Asserts every invariant of the whole state, by name. Debug builds do so after each call.
    ///
    /// # Panics
    /// Where one does not hold.
    pub fn check_invariants(&self) {
        invariants::check_scheduler(self);
    }

    // --- the caller's side of the contract ---------------------------------------------------------------------

    fn check_spec(&self, spec: &SequenceSpec) -> Result<(), Refusal> {
        let invalid = |reason| Err(Refusal::Invalid { reason });
        if spec.prompt.is_empty() {
            return invalid("the prompt is empty");
        }
        if spec.samples.is_empty() {
            return invalid("there are no samples");
        }
        if spec.max_new_tokens == 0 && !spec.prompt_logits {
            return invalid("max_new_tokens is 0 and no prompt logits are wanted");
        }
        let num_tokens = spec.prompt.len().saturating_add(spec.max_new_tokens);
        let Limits { max_model_len, num_blocks, max_queued_requests, .. } = self.limits;
        if num_tokens > max_model_len {
            return Err(Refusal::TooLong { num_tokens, max_model_len });
        }
        let num_blocks_needed = self.blocks_for(num_tokens);
        if num_blocks_needed > num_blocks {
            return Err(Refusal::NeverFits { num_blocks_needed, num_blocks });
        }
        if spec.samples.iter().any(|id| self.index_of.contains_key(id)) {
            return invalid("a sample's id is alive");
        }
        let mut sorted = spec.samples.clone();
        sorted.sort_unstable();
        if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
            return invalid("two samples have one id");
        }
        let num_queued_requests = self.num_queued_requests;
        if num_queued_requests >= max_queued_requests {
            return Err(Refusal::QueueFull { num_queued_requests, max_queued_requests });
        }
        Ok(())
    }

    fn check_is_last_plan(&self, plan: &StepPlan) {
        let is_last = plan.sequences.len() == self.in_flight.len()
            && plan.sequences.iter().zip(&self.in_flight).all(|(planned, in_flight)| planned.id == in_flight.id);
        assert!(is_last, "the plan is not the last one made");
    }

    fn check_sampled(&self, plan: &StepPlan, sampled: &[Sampled]) {
        let samples_now =
            |id: &SeqId| self.index_of.get(id).map(|&index| &self.sequences[index]).filter(|s| s.catches_up());
        for one in sampled {
            let Some(sequence) = samples_now(&one.id) else { continue };
            assert!(
                one.finished || sequence.generated.len() + 1 < sequence.max_new_tokens,
                "a sequence goes on past its max_new_tokens of {}",
                sequence.max_new_tokens
            );
        }
        let expected = || plan.samples.iter().filter(|id| samples_now(id).is_some());
        let given = || sampled.iter().map(|one| &one.id).filter(|id| samples_now(id).is_some());
        if !expected().eq(given()) {
            let mut expected: Vec<&SeqId> = expected().collect();
            let mut given: Vec<&SeqId> = given().collect();
            expected.sort_unstable();
            given.sort_unstable();
            assert!(expected == given, "each live sample of the plan gets exactly one token");
        }
    }

    fn debug_check(&self) {
        if cfg!(debug_assertions) {
            self.check_invariants();
        }
    }

    // --- the books -----------------------------------------------------------------------------------------------

    /// Blocks that hold `num_tokens` tokens.
    pub(crate) fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.limits.block_size)
    }

    fn is_scheduled(&self, index: u32) -> bool {
        self.sequences.get(index).is_some_and(|sequence| sequence.num_scheduled_tokens > 0)
    }

    /// The scheduled tokens are in the cache now.
    fn record_computed(&mut self, index: u32) {
        let block_size = self.limits.block_size;
        let sequence = &mut self.sequences[index];
        let start = sequence.num_computed_tokens;
        let end = start + sequence.num_scheduled_tokens;
        sequence.num_computed_tokens = end;
        sequence.num_scheduled_tokens = 0;
        let num_prompt_computed = end.min(sequence.prompt.len());
        sequence.num_prompt_logits_emitted = sequence.num_prompt_logits_emitted.max(num_prompt_computed);
        for at in start / block_size..end.div_ceil(block_size) {
            self.pool.set_filled(sequence.blocks[at], (end - at * block_size).min(block_size));
        }
    }

    /// A pending sample becomes a sequence: it holds the carrier's blocks too, and one token of its own.
    fn fork(&mut self, carrier: u32, sampled: Sampled) {
        let sequence = &mut self.sequences[carrier];
        debug_assert!(sequence.generated.is_empty() && sequence.num_uncomputed_tokens() == 0);
        let at = sequence.pending_samples.iter().position(|pending| pending.id == sampled.id);
        let PendingSample { id, sample } = sequence.pending_samples.remove(at.expect("the index of a pending sample"));
        self.requests[sequence.request].charge.num_generated += 1;
        if sampled.finished {
            self.forget_sample(carrier, id);
            return;
        }
        let fork = Sequence {
            id,
            request: sequence.request,
            key: OrderKey { sample, ..sequence.key },
            state: State::Running,
            prompt: Arc::clone(&sequence.prompt),
            generated: vec![sampled.token],
            max_new_tokens: sequence.max_new_tokens,
            adapter: sequence.adapter,
            blocks: sequence.blocks.clone(),
            num_computed_tokens: sequence.num_computed_tokens,
            num_scheduled_tokens: 0,
            num_prompt_logits_emitted: sequence.prompt.len(),
            pending_samples: Vec::new(),
            is_held: false,
            was_scheduled: true,
            num_times_overtaken: 0,
        };
        for &block in &fork.blocks {
            self.pool.share(block);
        }
        let index = self.sequences.insert(fork);
        self.index_of.insert(id, index);
        self.insert_running(index);
    }

    /// A sample that has no sequence (any more) is gone.
    fn forget_sample(&mut self, index: u32, id: SeqId) {
        self.index_of.remove(&id);
        self.requests[self.sequences[index].request].num_live -= 1;
    }

    /// A sequence ends, with the samples that wait for its prompt: it holds nothing any more.
    fn remove(&mut self, index: u32) {
        match self.sequences[index].state {
            State::Running => self.remove_running(index),
            State::Waiting | State::Preempted => self.remove_waiting(index),
        }
        let sequence = self.sequences.remove(index);
        if sequence.state == State::Waiting {
            self.num_queued_requests -= 1;
        }
        for &block in &sequence.blocks {
            self.pool.release(block);
        }
        let mut num_gone = 0;
        for id in sequence.samples() {
            self.index_of.remove(&id);
            num_gone += 1;
        }
        let request = &mut self.requests[sequence.request];
        request.num_live -= num_gone;
        if request.num_live == 0 {
            self.fair.settle(request.charge);
            self.requests.remove(sequence.request);
        }
        if self.requests.len() == 0 {
            self.fair.clear();
        }
    }

    fn insert_running(&mut self, index: u32) {
        let sequence = &self.sequences[index];
        debug_assert!(sequence.state == State::Running);
        let entry = (sequence.key, index);
        let at = self.running.partition_point(|other| *other < entry);
        self.running.insert(at, entry);
        let request = &mut self.requests[sequence.request];
        request.num_running += 1;
        self.num_running_requests += usize::from(request.num_running == 1);
    }

    fn remove_running(&mut self, index: u32) {
        let entry = (self.sequences[index].key, index);
        let at = self.running.binary_search(&entry).expect("a running sequence is in the list");
        self.running.remove(at);
        self.leave_running(index);
    }

    /// The request's count of running sequences, after one has left the list.
    fn leave_running(&mut self, index: u32) {
        let request = &mut self.requests[self.sequences[index].request];
        request.num_running -= 1;
        self.num_running_requests -= usize::from(request.num_running == 0);
    }

    fn insert_waiting(&mut self, index: u32) {
        let sequence = &self.sequences[index];
        let entry = (WaitingKey::new(sequence.key, sequence.turn()), index);
        let at = self.waiting.partition_point(|other| *other < entry);
        self.waiting.insert(at, entry);
    }

    fn remove_waiting(&mut self, index: u32) {
        let sequence = &self.sequences[index];
        let entry = (WaitingKey::new(sequence.key, sequence.turn()), index);
        let at = self.waiting.binary_search(&entry).expect("a waiting sequence is in the queue");
        self.waiting.remove(at);
    }
}
