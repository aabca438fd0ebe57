//! How a step is chosen. Four passes over the sequences in order, each a short function; nothing is written to the
//! plan before all four agree.
//!
//! 1. `share_tokens`: seats go to the first `max_num_seqs` running ones that have something to compute (one that is
//!    held stops short of its last token, so it needs no seat there). Those one token behind get it first, then prompt
//!    chunks fill the budget. A prompt that cannot end in this step leaves up to half of what there is to later prompts
//!    that can, so a huge one halves its own pace at worst and does not block the small ones behind it. Beside who
//!    decodes long prompts have a limit of their own ([`Pace`]); there the first leaves half to the one with the least
//!    left.
//! 2. `admit`: waiting ones join while seats, tokens and blocks last. Enough blocks means: for all tokens it knows,
//!    beside what the running ones still need for theirs, and a little room for them to grow (the watermark). So a
//!    new prompt does not start a chain of preemptions. Alone, anything that fits runs.
//! 3. `cover_with_blocks`: in order, each takes blocks for its tokens. Where none are left, the last in order gives
//!    all of its blocks back, until the one at hand can compute at least one token; the last itself just sits out.
//! 4. `write`: the plan.
//!
//! A waiting one of a better priority than a running one need not wait for it: it takes the blocks of the last in
//! order (pass 2 preempts for it) and a seat (that one sits out and keeps its blocks). In the step in which it comes it
//! takes the tokens that are left; from the next on it is simply earlier in the order.
//!
//! Why nobody waits for ever. The first in order among the running ones always gets a token (pass 1 keeps one for it)
//! and a block (pass 3 takes from everyone after it), so it ends after finitely many steps. Waiting ones are admitted
//! in order. None passes one that was preempted. At most [`MAX_TIMES_OVERTAKEN`] pass one that never ran and that
//! blocks are lacking for; whoever passes one that only lacks tokens leaves it the blocks it wants. Where nothing runs,
//! the first waiting one starts. (Within a priority, that is: a better one may keep a worse one waiting as long as it
//! keeps coming. Of another tenant, finitely many that come later go before it; `fair` says why.)
//!
//! What preemption costs was measured on 400 requests of 4 to 1000 prompt and 100 to 2000 new tokens in a pool for a
//! few of them: up to 1.9 times the tokens where answers are far longer than prompts, 1.0 to 1.3 times elsewhere. A
//! watermark that grows with each preemption and shrinks with each end brought the worst to 1.4 times, but at up to a
//! quarter more steps, for the pool stood emptier; with a step weighed as 20 tokens neither won, so the rule stays
//! simple.

use crate::{
    ids::{BlockId, SlotId},
    order::Turn,
    plan::{LogitsWanted, ScheduledSequence, StepPlan},
    scheduler::{InFlight, Pace, Scheduler, StepLoad},
    sequence::{Sequence, State},
};

/// Requests that may start ahead of one whose blocks cannot be had yet.
const MAX_TIMES_OVERTAKEN: u32 = 32;

/// Waiting sequences that are looked at for whether their prompts are long.
const MAX_COUNTED: usize = 64;

/// Waiting sequences looked at in one step without being admitted.
const MAX_PASSED_OVER: usize = 16;

/// The watermark never keeps more than this part of the pool free.
const WATERMARK_DIVISOR: usize = 8;

/// What a step may still give away.
#[derive(Debug)]
struct Budget {
    num_tokens: usize,
    num_seats: usize,
    yielded: Option<Yielded>,
    /// Tokens wanted that make no long prompt yet.
    short: usize,
    /// What long prompts may have of the tokens.
    num_long_tokens: usize,
    /// Of these, what is kept for the long prompt that has the least left: one that comes after a huge one is not behind it.
    kept: Option<(u32, usize)>,
    /// What the one with the least left has, of those that run and have this priority.
    least: (i32, usize),
}

/// What a prompt that cannot end in this step leaves to those that can.
#[derive(Debug)]
struct Yielded {
    index: u32,
    priority: i32,
    num_tokens: usize,
}

impl Budget {
    fn is_spent(&self) -> bool {
        self.num_tokens == 0 && self.yielded.as_ref().is_none_or(|yielded| yielded.num_tokens == 0)
    }

    /// Schedules as many of the sequence's tokens as it may have.
    fn offer(&mut self, index: u32, sequence: &mut Sequence) -> OfferOutcome {
        let priority = sequence.key.priority;
        let num_wanted = sequence.num_wanted_tokens();
        let num_yielded = match &self.yielded {
            Some(yielded)
                if priority < yielded.priority
                    || (priority == yielded.priority && num_wanted <= self.num_tokens + yielded.num_tokens) =>
            {
                yielded.num_tokens
            }
            _ => 0,
        };
        let num_available = self.num_tokens + num_yielded;
        if num_available == 0 {
            return OfferOutcome::Nothing;
        }
        if num_wanted > self.short {
            if self.kept.is_some_and(|(kept, _)| kept == index) {
                self.kept = None;
            }
            let num_long = self.num_long_tokens - self.kept.map_or(0, |(_, num_tokens)| num_tokens);
            if num_long < num_available.min(num_wanted) {
                return self.offer_paced(sequence, num_long);
            }
            self.num_long_tokens -= num_available.min(num_wanted);
        }
        if num_wanted > num_available && self.yielded.is_none() {
            let num_tokens = num_available / 2;
            sequence.num_scheduled_tokens = num_available - num_tokens;
            self.num_tokens = 0;
            self.yielded = Some(Yielded { index, priority, num_tokens });
            return OfferOutcome::Scheduled;
        }
        let num_taken = num_wanted.min(num_available);
        let num_unyielded = num_taken.min(self.num_tokens);
        sequence.num_scheduled_tokens = num_taken;
        self.num_tokens -= num_unyielded;
        match &mut self.yielded {
            Some(yielded) if num_taken > num_unyielded => {
                yielded.num_tokens -= num_taken - num_unyielded;
                OfferOutcome::ScheduledInYielded
            }
            _ => OfferOutcome::Scheduled,
        }
    }

    /// A long prompt gets so many tokens at most. What it leaves is there for whoever comes after it.
    fn offer_paced(&mut self, sequence: &mut Sequence, num_tokens: usize) -> OfferOutcome {
        let num_tokens = num_tokens.min(self.num_tokens);
        if num_tokens == 0 {
            return OfferOutcome::Nothing;
        }
        sequence.num_scheduled_tokens = num_tokens;
        self.num_tokens -= num_tokens;
        self.num_long_tokens = self.num_long_tokens.saturating_sub(num_tokens);
        OfferOutcome::Scheduled
    }

    /// The sequence sits this step out after all.
    fn take_back(&mut self, index: u32, sequence: &mut Sequence) {
        if sequence.num_scheduled_tokens == 0 {
            return;
        }
        self.num_tokens += sequence.num_scheduled_tokens;
        if sequence.num_wanted_tokens() > self.short {
            self.num_long_tokens = self.num_long_tokens.saturating_add(sequence.num_scheduled_tokens);
        }
        self.num_seats += 1;
        sequence.num_scheduled_tokens = 0;
        if self.yielded.as_ref().is_some_and(|yielded| yielded.index == index) {
            self.num_tokens += self.yielded.take().map_or(0, |yielded| yielded.num_tokens);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OfferOutcome {
    Nothing,
    Scheduled,
    ScheduledInYielded,
}

impl Scheduler {
    pub(super) fn plan_step(&mut self, pace: &Pace<'_>, plan: &mut StepPlan) {
        let mut budget = self.share_tokens(pace);
        self.admit(&mut budget, plan);
        self.return_yielded(&budget);
        self.cover_with_blocks(plan);
        self.write(plan);
    }

    // --- 1. seats and tokens ---------------------------------------------------------------------------------------

    fn share_tokens(&mut self, pace: &Pace<'_>) -> Budget {
        let (num_passed, num_seated) = self.seated();
        let mut budget = Budget {
            num_tokens: self.limits.max_num_batched_tokens,
            num_seats: self.limits.max_num_seqs - num_seated,
            yielded: None,
            short: usize::MAX,
            num_long_tokens: usize::MAX,
            kept: None,
            least: (i32::MAX, usize::MAX),
        };
        let seated = &self.running[..num_passed];
        let mut wanting = seated.iter().map(|&(_, index)| index).filter(|&index| self.wants_tokens(index));
        let Some(first) = wanting.next() else { return budget };

        let num_kept = usize::from(self.sequences[first].num_uncomputed_tokens() > 1);
        for &(_, index) in &self.running[..num_passed] {
            let sequence = &mut self.sequences[index];
            if sequence.num_uncomputed_tokens() == 1 && !sequence.is_held {
                if budget.num_tokens == num_kept {
                    self.marks.first_in_order_kept_a_token += num_kept as u64;
                    break;
                }
                sequence.num_scheduled_tokens = 1;
                budget.num_tokens -= 1;
            }
        }
        if pace.short < usize::MAX {
            self.hold_long_prompts(pace, num_passed, &mut budget);
        }
        for &(_, index) in &self.running[..num_passed] {
            let sequence = &mut self.sequences[index];
            let is_behind = sequence.num_uncomputed_tokens() > 1;
            if is_behind && budget.offer(index, sequence) == OfferOutcome::ScheduledInYielded {
                self.marks.ended_in_yielded_budget += 1;
            }
        }
        budget
    }

    /// Those that decode have their tokens; how many long prompts may have beside them.
    fn hold_long_prompts(&self, pace: &Pace<'_>, num_passed: usize, budget: &mut Budget) {
        // What decodes is never long.
        let short = pace.short.max(1);
        let num_wanted = |index: u32| self.sequences[index].num_wanted_tokens();
        let long = |queue: &mut dyn Iterator<Item = u32>| -> Vec<u32> {
            queue.filter(|&index| num_wanted(index) > short).collect()
        };
        let running = long(&mut self.running[..num_passed].iter().map(|&(_, index)| index));
        let waiting = long(&mut self.waiting.iter().take(MAX_COUNTED).map(|&(_, index)| index));
        let priority = |index: u32| self.sequences[index].key.priority;
        let Some(best) = running.iter().chain(&waiting).map(|&index| priority(index)).min() else { return };
        // A prompt is not held back by streams that are worse.
        let decodes = |index: u32| self.sequences[index].num_scheduled_tokens == 1 && priority(index) <= best;
        let num_decoding = self.running[..num_passed].iter().filter(|&&(_, index)| decodes(index)).count();
        if num_decoding == 0 {
            return;
        }
        let load = StepLoad { num_decoding, num_long_prompts: running.len() + waiting.len() };
        (budget.short, budget.num_long_tokens) = (short, (pace.limit)(load).max(1));
        let Some(&first) = running.first() else { return };
        let equal = running.iter().filter(|&&index| priority(index) == priority(first));
        let least = equal.copied().min_by_key(|&index| num_wanted(index)).unwrap_or(first);
        budget.least = (priority(first), num_wanted(least));
        if first != least {
            budget.num_long_tokens = budget.num_long_tokens.max(2);
            budget.kept = Some((least, num_wanted(least).min(budget.num_long_tokens / 2)));
        }
    }

    fn wants_tokens(&self, index: u32) -> bool {
        self.sequences[index].num_wanted_tokens() > 0
    }

    /// How many of the running ones are passed until all seats are taken, and how many of those take one.
    fn seated(&self) -> (usize, usize) {
        let mut num_seated = 0;
        for (at, &(_, index)) in self.running.iter().enumerate() {
            if num_seated == self.limits.max_num_seqs {
                return (at, num_seated);
            }
            num_seated += usize::from(self.wants_tokens(index));
        }
        (self.running.len(), num_seated)
    }

    /// What nobody could use of the yielded tokens goes back to the prompt that left them.
    fn return_yielded(&mut self, budget: &Budget) {
        if let Some(yielded) = &budget.yielded {
            let sequence = &mut self.sequences[yielded.index];
            let num_left = sequence.num_wanted_tokens() - sequence.num_scheduled_tokens;
            sequence.num_scheduled_tokens += num_left.min(yielded.num_tokens + budget.num_tokens);
        }
    }

    // --- 2. admission ----------------------------------------------------------------------------------------------

    fn admit(&mut self, budget: &mut Budget, plan: &mut StepPlan) {
        // Blocks that are spoken for: by running ones, and by those that could start but for tokens. Whoever passes
        // the latter must leave them theirs.
        let mut num_promised = self.num_promised_to(self.running.len());
        let mut blocked: Option<u32> = None;
        let mut at = 0;
        while at < MAX_PASSED_OVER {
            let Some(&(key, index)) = self.waiting.get(at) else { break };
            let outranks_last = self.running.last().is_some_and(|(last, _)| last.priority > key.priority);
            if !outranks_last && (budget.is_spent() || budget.num_seats == 0) {
                break;
            }
            let has_blocks = self.has_blocks_for(index, num_promised)
                || (outranks_last && self.try_preempt_for(index, budget, plan));
            if !has_blocks {
                let first_blocked = *blocked.get_or_insert(index);
                if key.turn == Turn::Again || !self.may_be_overtaken(first_blocked) {
                    break;
                }
                at += 1;
                continue;
            }
            while budget.num_seats == 0 || budget.is_spent() {
                if !self.try_unseat_for(key.priority, budget) {
                    return;
                }
            }
            num_promised += self.num_blocks_wanted(index);
            let sequence = &mut self.sequences[index];
            let num_wanted = sequence.num_wanted_tokens();
            let mut outcome = budget.offer(index, sequence);
            let has_least = key.priority <= budget.least.0 && num_wanted < budget.least.1;
            let is_urgent = outranks_last || key.turn == Turn::Again || has_least;
            if outcome == OfferOutcome::Nothing && is_urgent {
                // Other long prompts have all that long ones may have. This one gets its place before them, or has come back and
                // nobody passes it, or has less left than any: from the next step on half is its.
                outcome = budget.offer_paced(sequence, 1);
            }
            if outcome != OfferOutcome::Nothing && num_wanted > budget.short {
                budget.least = budget.least.min((key.priority, num_wanted));
            }
            if outcome == OfferOutcome::Nothing {
                if key.turn == Turn::Again {
                    break;
                }
                at += 1;
            } else {
                self.marks.ended_in_yielded_budget += u64::from(outcome == OfferOutcome::ScheduledInYielded);
                budget.num_seats -= 1;
                self.start_running(at);
                if let Some(blocked) = blocked {
                    self.marks.overtook += 1;
                    self.sequences[blocked].num_times_overtaken += 1;
                    if !self.may_be_overtaken(blocked) {
                        break;
                    }
                }
            }
            if !plan.preempted.is_empty() {
                // The sum of promises is stale, and those who gave way must not come back at once.
                break;
            }
        }
    }

    fn may_be_overtaken(&mut self, index: u32) -> bool {
        let may = self.sequences[index].num_times_overtaken < MAX_TIMES_OVERTAKEN;
        self.marks.overtaking_ended += u64::from(!may);
        may
    }

    /// The waiting sequence at `at` runs.
    fn start_running(&mut self, at: usize) {
        let (_, index) = self.waiting.remove(at).expect("a place in the queue");
        let sequence = &mut self.sequences[index];
        if sequence.state == State::Waiting {
            self.num_queued_requests -= 1;
        }
        sequence.state = State::Running;
        self.insert_running(index);
    }

    /// Blocks a sequence will take to compute all that it knows, and for its samples' first tokens.
    fn num_blocks_wanted(&self, index: u32) -> usize {
        let sequence = &self.sequences[index];
        self.blocks_for(sequence.num_known_tokens()) - sequence.blocks.len()
            + usize::from(self.must_copy(sequence))
            + sequence.pending_samples.len()
    }

    /// The watermark: a block for each of `num_running` sequences to grow into, within reason.
    fn num_blocks_kept(&self, num_running: usize) -> usize {
        num_running.min(self.limits.num_blocks / WATERMARK_DIVISOR)
    }

    fn has_blocks_for(&mut self, index: u32, num_promised: usize) -> bool {
        if self.running.is_empty() {
            // Alone it may have everything: `add` made sure that this is enough.
            return true;
        }
        let num_needed = num_promised + self.num_blocks_wanted(index);
        let num_kept = self.num_blocks_kept(self.running.len());
        let num_free = self.pool.num_free();
        self.marks.held_by_watermark += u64::from(num_needed <= num_free && num_needed + num_kept > num_free);
        num_needed + num_kept <= num_free
    }

    /// Preempts running sequences of a worse priority, last first, until a waiting one has its blocks; or changes
    /// nothing where all of them would not do.
    fn try_preempt_for(&mut self, index: u32, budget: &mut Budget, plan: &mut StepPlan) -> bool {
        let priority = self.sequences[index].key.priority;
        let num_staying = self.running.partition_point(|(key, _)| key.priority <= priority);
        let num_gained = self.num_blocks_freed_without(num_staying);
        let num_needed = self.num_promised_to(num_staying) + self.num_blocks_wanted(index);
        if num_staying > 0 && num_needed + self.num_blocks_kept(num_staying) > self.pool.num_free() + num_gained {
            return false;
        }
        while self.running.len() > num_staying && !self.has_blocks_for(index, self.num_promised_to(self.running.len()))
        {
            let (_, last) = self.running[self.running.len() - 1];
            budget.take_back(last, &mut self.sequences[last]);
            self.preempt_last(plan);
            self.marks.preempted_for_admission += 1;
        }
        let has_blocks = self.has_blocks_for(index, self.num_promised_to(self.running.len()));
        assert!(has_blocks, "the blocks to be gained were counted");
        true
    }

    /// Blocks that nobody would hold any more if only the first `num_staying` went on running.
    fn num_blocks_freed_without(&mut self, num_staying: usize) -> usize {
        let mut blocks = std::mem::take(&mut self.scratch_blocks);
        blocks.clear();
        for &(_, index) in &self.running[num_staying..] {
            blocks.extend_from_slice(&self.sequences[index].blocks);
        }
        blocks.sort_unstable();
        let all_holders_leave = |same: &&[BlockId]| same.len() == self.pool.ref_count(same[0]) as usize;
        let num_freed = blocks.chunk_by(|a, b| a == b).filter(all_holders_leave).count();
        self.scratch_blocks = blocks;
        num_freed
    }

    /// Blocks that the first `num_running` running sequences will take for what they know.
    fn num_promised_to(&self, num_running: usize) -> usize {
        self.running[..num_running].iter().map(|&(_, index)| self.num_blocks_wanted(index)).sum()
    }

    /// The last scheduled sequence of a worse priority sits this step out; it keeps its blocks. False where there is
    /// none.
    fn try_unseat_for(&mut self, priority: i32, budget: &mut Budget) -> bool {
        let num_staying = self.running.partition_point(|(key, _)| key.priority <= priority);
        for &(_, index) in self.running[num_staying..].iter().rev() {
            if self.sequences[index].num_scheduled_tokens > 0 {
                budget.take_back(index, &mut self.sequences[index]);
                self.marks.unseated += 1;
                return true;
            }
        }
        false
    }

    // --- 3. blocks -------------------------------------------------------------------------------------------------

    fn cover_with_blocks(&mut self, plan: &mut StepPlan) {
        let mut at = 0;
        while at < self.running.len() {
            let (_, index) = self.running[at];
            if self.sequences[index].num_scheduled_tokens > 0 {
                let mut num_writable = self.num_writable_tokens(index);
                while num_writable == 0 && at + 1 < self.running.len() {
                    self.preempt_last(plan);
                    num_writable = self.num_writable_tokens(index);
                }
                let sequence = &mut self.sequences[index];
                if num_writable == 0 {
                    assert!(at > 0, "the first in order finds blocks");
                    sequence.num_scheduled_tokens = 0;
                    self.marks.paused_for_blocks += 1;
                } else {
                    if sequence.num_scheduled_tokens > num_writable {
                        sequence.num_scheduled_tokens = num_writable;
                        self.marks.chunk_cut_to_blocks += 1;
                    }
                    self.take_blocks(index, plan);
                }
            }
            at += 1;
        }
    }

    /// The next token goes into a block that others hold too.
    fn must_copy(&self, sequence: &Sequence) -> bool {
        let at = sequence.num_computed_tokens / self.limits.block_size;
        !sequence.num_computed_tokens.is_multiple_of(self.limits.block_size) && self.pool.is_shared(sequence.blocks[at])
    }

    /// Tokens for which there are slots: in the sequence's blocks and all free ones.
    fn num_writable_tokens(&self, index: u32) -> usize {
        let sequence = &self.sequences[index];
        let num_held = sequence.blocks.len() * self.limits.block_size - sequence.num_computed_tokens;
        let num_free = self.pool.num_free();
        if self.must_copy(sequence) {
            // Its slots in the shared block become slots of a fresh one.
            num_free.checked_sub(1).map_or(0, |num_left| num_held + num_left * self.limits.block_size)
        } else {
            num_held + num_free * self.limits.block_size
        }
    }

    fn take_blocks(&mut self, index: u32, plan: &mut StepPlan) {
        let must_copy = self.must_copy(&self.sequences[index]);
        let end = self.sequences[index].num_computed_tokens + self.sequences[index].num_scheduled_tokens;
        let num_wanted = self.blocks_for(end);
        let sequence = &mut self.sequences[index];
        if must_copy {
            let last = sequence.blocks.last_mut().expect("the shared block is the last");
            let copy = self.pool.try_unshare(*last).expect("a block for the copy was counted");
            *last = copy.target;
            plan.copies.push(copy);
            self.marks.copied_on_write += 1;
        }
        let num_missing = num_wanted - sequence.blocks.len();
        assert!(self.pool.try_allocate(num_missing, &mut sequence.blocks), "blocks for the tokens were counted");
    }

    /// The last in order gives its blocks back and waits to be computed again.
    fn preempt_last(&mut self, plan: &mut StepPlan) {
        let (_, index) = self.running.pop().expect("somebody runs");
        self.leave_running(index);
        let sequence = &mut self.sequences[index];
        for block in sequence.blocks.drain(..) {
            // It may be the source of a planned copy, and be written in this very step: copies come before all writes. It
            // is the target of none: only siblings copy, each from what it shares with another, and where the last in order
            // was the last to hold a block, no sibling before it has anything left to copy.
            self.pool.release(block);
        }
        sequence.num_computed_tokens = 0;
        sequence.num_scheduled_tokens = 0;
        sequence.state = State::Preempted;
        plan.preempted.push(sequence.id);
        self.marks.preempted += 1;
        self.insert_waiting(index);
    }

    // --- 4. the plan -----------------------------------------------------------------------------------------------

    fn write(&mut self, plan: &mut StepPlan) {
        for has_one_token in [true, false] {
            for at in 0..self.running.len() {
                let (_, index) = self.running[at];
                let num_scheduled_tokens = self.sequences[index].num_scheduled_tokens;
                if num_scheduled_tokens > 0 && (num_scheduled_tokens == 1) == has_one_token {
                    self.write_sequence(index, plan);
                }
            }
        }
    }

    fn write_sequence(&mut self, index: u32, plan: &mut StepPlan) {
        let block_size = self.limits.block_size;
        let sequence = &mut self.sequences[index];
        self.in_flight.push(InFlight { index, id: sequence.id });
        if !sequence.was_scheduled {
            sequence.was_scheduled = true;
            plan.first_scheduled.push(sequence.id);
            self.fair.start(sequence.key.turn);
            self.requests[sequence.request].charge.num_prompt_tokens = sequence.prompt.len();
        }

        let start = sequence.num_computed_tokens;
        let end = start + sequence.num_scheduled_tokens;
        let tokens_start = plan.tokens.len();
        sequence.extend_with_known(start, end, &mut plan.tokens);
        plan.positions.extend(start as u32..end as u32);
        plan.slots.extend((start..end).map(|position| slot_of(sequence, position, block_size)));
        let table_start = plan.block_tables.len();
        plan.block_tables.extend_from_slice(&sequence.blocks);

        let samples_start = plan.samples.len();
        if sequence.catches_up() && !sequence.is_score_only() {
            plan.samples.extend(sequence.samples());
        }
        let samples = samples_start..plan.samples.len();
        let num_emitted = sequence.num_prompt_logits_emitted;
        let logits = if num_emitted < end.min(sequence.prompt.len()) {
            self.marks.prompt_rows_skipped += u64::from(num_emitted > start);
            LogitsWanted::All { first_row: num_emitted.saturating_sub(start) }
        } else if samples.is_empty() {
            LogitsWanted::None
        } else {
            LogitsWanted::Last
        };
        plan.sequences.push(ScheduledSequence {
            id: sequence.id,
            tokens: tokens_start..plan.tokens.len(),
            block_table: table_start..plan.block_tables.len(),
            num_computed_tokens: start,
            num_prompt_tokens: sequence.prompt.len(),
            num_known_tokens: sequence.num_known_tokens(),
            adapter: sequence.adapter,
            logits,
            samples,
        });
    }
}

fn slot_of(sequence: &Sequence, position: usize, block_size: usize) -> SlotId {
    let block = sequence.blocks[position / block_size];
    SlotId(block.0 * block_size as u32 + (position % block_size) as u32)
}
