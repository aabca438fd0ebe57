//! The promises by name. One home: debug builds, property tests and the simulator all call these very functions.
//!
//! Each takes the whole state, recomputes its claim from scratch and panics with its own name in the backtrace and in
//! the text. None of them changes anything or is used by a decision.

use crate::{
    ids::{BlockId, SlotId},
    plan::{LogitsWanted, StepPlan},
    scheduler::{Limits, Scheduler},
    sequence::{Sequence, State},
};

/// All of them.
pub(crate) fn check_scheduler(scheduler: &Scheduler) {
    every_block_is_free_cached_or_referenced(scheduler);
    the_sum_holds(scheduler);
    blocks_cover_computed_tokens(scheduler);
    filled_slots_are_computed_tokens(scheduler);
    no_two_sequences_write_one_slot(scheduler);
    waiting_sequences_hold_nothing(scheduler);
    finished_sequences_hold_nothing(scheduler);
    every_sequence_is_in_one_list_in_order(scheduler);
    every_running_sequence_has_something_to_compute(scheduler);
    requests_count_their_samples(scheduler);
    bounds_hold(scheduler);
}

fn holders(scheduler: &Scheduler) -> Vec<u32> {
    let mut counts = vec![0; scheduler.pool.num_blocks()];
    for (_, sequence) in scheduler.sequences.iter() {
        for block in &sequence.blocks {
            counts[block.0 as usize] += 1;
        }
    }
    counts
}

/// Free, cached or referenced, exactly one of them; and the count is the number of block tables it stands in.
fn every_block_is_free_cached_or_referenced(scheduler: &Scheduler) {
    let mut is_free = vec![false; scheduler.pool.num_blocks()];
    for block in scheduler.pool.free_blocks() {
        assert!(!is_free[block.0 as usize], "every_block_is_free_cached_or_referenced: {block:?} is free twice");
        is_free[block.0 as usize] = true;
    }
    for (at, num_holders) in holders(scheduler).into_iter().enumerate() {
        let block = BlockId(at as u32);
        let ref_count = scheduler.pool.ref_count(block);
        assert!(
            ref_count == num_holders && is_free[at] == (ref_count == 0),
            "every_block_is_free_cached_or_referenced: {block:?} has count {ref_count}, {num_holders} holders, \
             free: {}",
            is_free[at]
        );
    }
}

fn the_sum_holds(scheduler: &Scheduler) {
    let pool = &scheduler.pool;
    let num_held = holders(scheduler).into_iter().filter(|&count| count > 0).count();
    assert!(
        pool.num_free() + num_held == pool.num_blocks() && pool.num_referenced() == num_held,
        "the_sum_holds: {} free + {num_held} referenced of {}",
        pool.num_free(),
        pool.num_blocks()
    );
}

/// Exactly: not one block fewer or more than the tokens computed and scheduled need.
fn blocks_cover_computed_tokens(scheduler: &Scheduler) {
    for (_, sequence) in scheduler.sequences.iter() {
        let num_tokens = sequence.num_computed_tokens + sequence.num_scheduled_tokens;
        assert!(
            sequence.blocks.len() == scheduler.blocks_for(num_tokens) && num_tokens <= sequence.num_known_tokens(),
            "blocks_cover_computed_tokens: {:?} has {} blocks for {num_tokens} tokens, knows {}",
            sequence.id,
            sequence.blocks.len(),
            sequence.num_known_tokens()
        );
    }
}

fn filled_slots_are_computed_tokens(scheduler: &Scheduler) {
    let block_size = scheduler.limits.block_size;
    let mut num_filled = vec![0; scheduler.pool.num_blocks()];
    for (_, sequence) in scheduler.sequences.iter() {
        for (at, block) in sequence.blocks.iter().enumerate() {
            let num_slots = sequence.num_computed_tokens.saturating_sub(at * block_size).min(block_size);
            assert!(
                scheduler.pool.num_filled_slots(*block) == num_slots,
                "filled_slots_are_computed_tokens: {block:?} of {:?} has {num_slots} computed tokens, the pool says {}",
                sequence.id,
                scheduler.pool.num_filled_slots(*block)
            );
            num_filled[block.0 as usize] = num_slots;
        }
    }
    let num_unused = scheduler.pool.num_referenced() * block_size - num_filled.iter().sum::<usize>();
    assert!(scheduler.pool.num_unused_slots() == num_unused, "filled_slots_are_computed_tokens: the total is off");
}

/// What a scheduled sequence writes to, it alone holds.
fn no_two_sequences_write_one_slot(scheduler: &Scheduler) {
    for (_, sequence) in scheduler.sequences.iter() {
        if sequence.num_scheduled_tokens > 0 {
            for block in &sequence.blocks[sequence.num_computed_tokens / scheduler.limits.block_size..] {
                assert!(
                    !scheduler.pool.is_shared(*block),
                    "no_two_sequences_write_one_slot: {:?} writes to the shared {block:?}",
                    sequence.id
                );
            }
        }
    }
}

fn waiting_sequences_hold_nothing(scheduler: &Scheduler) {
    for (_, sequence) in scheduler.sequences.iter() {
        assert!(
            sequence.state == State::Running
                || (sequence.blocks.is_empty()
                    && sequence.num_computed_tokens == 0
                    && sequence.num_scheduled_tokens == 0),
            "waiting_sequences_hold_nothing: {:?}",
            sequence.id
        );
    }
}

/// Every sequence that exists is known by its id, every id that is known exists, and where nothing exists nothing is
/// held.
fn finished_sequences_hold_nothing(scheduler: &Scheduler) {
    let mut num_samples = 0;
    for (index, sequence) in scheduler.sequences.iter() {
        for id in sequence.samples() {
            num_samples += 1;
            assert!(
                scheduler.index_of.get(&id) == Some(&index),
                "finished_sequences_hold_nothing: {id:?} is not known"
            );
        }
    }
    assert!(
        scheduler.index_of.len() == num_samples,
        "finished_sequences_hold_nothing: {} ids for {num_samples} samples",
        scheduler.index_of.len()
    );
    assert!(
        scheduler.sequences.len() > 0 || (scheduler.pool.num_referenced() == 0 && scheduler.requests.len() == 0),
        "finished_sequences_hold_nothing: something is left behind"
    );
}

fn every_sequence_is_in_one_list_in_order(scheduler: &Scheduler) {
    assert!(
        scheduler.running.is_sorted_by(|a, b| a < b) && scheduler.waiting.iter().is_sorted_by(|a, b| a < b),
        "every_sequence_is_in_one_list_in_order: a list is out of order"
    );
    let state_at = |index: u32| scheduler.sequences[index].state;
    assert!(
        scheduler
            .running
            .iter()
            .all(|&(key, index)| { state_at(index) == State::Running && scheduler.sequences[index].key == key })
            && scheduler.waiting.iter().all(|&(_, index)| state_at(index) != State::Running)
            && scheduler.running.len() + scheduler.waiting.len() == scheduler.sequences.len(),
        "every_sequence_is_in_one_list_in_order: a list and a state disagree"
    );
}

/// Else it could never be scheduled again. And only a carrier of an uncomputed prompt has samples waiting for it.
fn every_running_sequence_has_something_to_compute(scheduler: &Scheduler) {
    let is_well = |sequence: &Sequence| {
        sequence.num_uncomputed_tokens() > 0
            && (sequence.pending_samples.is_empty() || sequence.generated.is_empty())
            && (sequence.generated.len() < sequence.max_new_tokens || sequence.is_score_only())
    };
    for (_, sequence) in scheduler.sequences.iter() {
        assert!(is_well(sequence), "every_running_sequence_has_something_to_compute: {:?}", sequence.id);
    }
}

fn requests_count_their_samples(scheduler: &Scheduler) {
    let num_entries = scheduler.requests.iter().last().map_or(0, |(last, _)| last as usize + 1);
    let mut counted = vec![(0, 0); num_entries];
    for (_, sequence) in scheduler.sequences.iter() {
        let (num_live, num_running) = &mut counted[sequence.request as usize];
        *num_live += sequence.samples().count();
        *num_running += usize::from(sequence.state == State::Running);
    }
    let mut num_running_requests = 0;
    for (at, request) in scheduler.requests.iter() {
        let (num_live, num_running) = counted[at as usize];
        assert!(
            num_live == request.num_live && num_running == request.num_running && num_live > 0,
            "requests_count_their_samples: {num_live} live, {num_running} running, the books say {request:?}"
        );
        num_running_requests += usize::from(num_running > 0);
    }
    assert!(scheduler.num_running_requests == num_running_requests, "requests_count_their_samples: running requests");
    let num_queued = scheduler.sequences.iter().filter(|(_, s)| s.state == State::Waiting).count();
    assert!(scheduler.num_queued_requests == num_queued, "requests_count_their_samples: queued requests");
}

fn bounds_hold(scheduler: &Scheduler) {
    assert!(scheduler.num_queued_requests <= scheduler.limits.max_queued_requests, "bounds_hold: queue");
    for (_, sequence) in scheduler.sequences.iter() {
        let num_tokens = sequence.prompt.len() + sequence.max_new_tokens;
        assert!(num_tokens <= scheduler.limits.max_model_len, "bounds_hold: {:?}", sequence.id);
    }
}

/// A plan alone, against the limits: it respects the budget, its ranges tile its vectors, each token's slot is where
/// the block table says, nothing is written twice, and copies do not depend on each other's order.
pub(crate) fn check_plan(plan: &StepPlan, limits: &Limits) {
    plan_respects_the_budget(plan, limits);
    plan_is_well_formed(plan, limits);
    plan_writes_each_slot_once(plan);
    copies_are_independent(plan);
}

fn plan_respects_the_budget(plan: &StepPlan, limits: &Limits) {
    assert!(
        plan.num_batched_tokens() <= limits.max_num_batched_tokens && plan.sequences.len() <= limits.max_num_seqs,
        "plan_respects_the_budget: {} tokens, {} sequences",
        plan.num_batched_tokens(),
        plan.sequences.len()
    );
}

fn plan_is_well_formed(plan: &StepPlan, limits: &Limits) {
    let (mut num_tokens, mut num_blocks, mut num_samples) = (0, 0, 0);
    for one in &plan.sequences {
        let follows = one.tokens.start == num_tokens
            && one.block_table.start == num_blocks
            && one.samples.start == num_samples
            && !one.tokens.is_empty();
        assert!(follows, "plan_is_well_formed: the ranges of {:?} do not follow", one.id);
        (num_tokens, num_blocks, num_samples) = (one.tokens.end, one.block_table.end, one.samples.end);

        let table = &plan.block_tables[one.block_table.clone()];
        for (position, at) in (one.num_computed_tokens..).zip(one.tokens.clone()) {
            let block = table[position / limits.block_size];
            let slot = block.0 as usize * limits.block_size + position % limits.block_size;
            assert!(
                plan.positions[at] as usize == position && plan.slots[at] == SlotId(slot as u32),
                "plan_is_well_formed: token {at} of {:?}",
                one.id
            );
        }
        let has_logits = match one.logits {
            LogitsWanted::None => one.samples.is_empty(),
            LogitsWanted::Last => !one.samples.is_empty(),
            LogitsWanted::All { first_row } => first_row < one.tokens.len(),
        };
        assert!(has_logits, "plan_is_well_formed: logits of {:?}", one.id);
    }
    assert!(
        (num_tokens, num_blocks, num_samples) == (plan.tokens.len(), plan.block_tables.len(), plan.samples.len())
            && plan.positions.len() == num_tokens
            && plan.slots.len() == num_tokens,
        "plan_is_well_formed: the vectors are longer than the ranges"
    );
    assert!(
        plan.sequences.iter().is_sorted_by_key(|one| one.tokens.len() > 1),
        "plan_is_well_formed: one token comes before several"
    );
}

fn plan_writes_each_slot_once(plan: &StepPlan) {
    let mut slots = plan.slots.clone();
    slots.sort_unstable();
    assert!(slots.is_sorted_by(|a, b| a < b), "plan_writes_each_slot_once");
}

fn copies_are_independent(plan: &StepPlan) {
    let mut targets: Vec<BlockId> = plan.copies.iter().map(|copy| copy.target).collect();
    targets.sort_unstable();
    assert!(
        targets.is_sorted_by(|a, b| a < b)
            && plan.copies.iter().all(|copy| targets.binary_search(&copy.source).is_err()),
        "copies_are_independent: {:?}",
        plan.copies
    );
}
