//! What the scheduler promises, one small story each. Pools are tiny, so every number can be followed by hand.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::panic::{AssertUnwindSafe, catch_unwind};

use bindery_scheduler::{
    BlockCopy, BlockId, Limits, LogitsWanted, Pace, Refusal, Sampled, Scheduler, SeqId, SequenceSpec, Share, SlotId,
    StepPlan, TokenId,
};

fn limits() -> Limits {
    Limits {
        block_size: 4,
        num_blocks: 16,
        max_num_seqs: 8,
        max_num_batched_tokens: 16,
        max_model_len: 64,
        max_queued_requests: 8,
    }
}

fn request(id: u64, num_prompt_tokens: u32, max_new_tokens: usize) -> SequenceSpec {
    SequenceSpec {
        samples: vec![SeqId(id)],
        prompt: (0..num_prompt_tokens).map(TokenId).collect(),
        max_new_tokens,
        priority: 0,
        share: Share::default(),
        adapter: None,
        prompt_logits: false,
    }
}

/// Plans, samples token 100 for everyone, commits. A sequence ends when `ends` says so.
fn step(scheduler: &mut Scheduler, ends: impl Fn(SeqId) -> bool) -> StepPlan {
    let mut plan = StepPlan::default();
    scheduler.plan(&Pace::NONE, &mut plan);
    let sampled: Vec<Sampled> =
        plan.samples.iter().map(|&id| Sampled { id, token: TokenId(100), finished: ends(id) }).collect();
    scheduler.commit(&plan, &sampled);
    plan
}

/// `(id, number of tokens)` of each scheduled sequence.
fn scheduled(plan: &StepPlan) -> Vec<(u64, usize)> {
    plan.sequences.iter().map(|one| (one.id.0, one.tokens.len())).collect()
}

#[test]
fn a_lone_request_goes_from_prompt_to_end() {
    let mut scheduler = Scheduler::new(limits());
    scheduler.add(request(7, 5, 2)).unwrap();
    let plan = step(&mut scheduler, |_| false);
    assert_eq!(plan.tokens, [0, 1, 2, 3, 4].map(TokenId));
    assert_eq!(plan.positions, [0, 1, 2, 3, 4]);
    assert_eq!(plan.slots, [0, 1, 2, 3, 4].map(SlotId));
    assert_eq!(plan.block_tables, [BlockId(0), BlockId(1)]);
    assert_eq!(plan.samples, [SeqId(7)]);
    assert_eq!(plan.first_scheduled, [SeqId(7)]);
    assert_eq!(plan.sequences[0].logits, LogitsWanted::Last);
    assert_eq!(scheduler.stats().num_unused_slots, 3);

    let plan = step(&mut scheduler, |_| true);
    assert_eq!((plan.tokens, plan.positions, plan.slots), (vec![TokenId(100)], vec![5], vec![SlotId(5)]));
    assert!(plan.first_scheduled.is_empty());
    assert!(!scheduler.has_work());
    assert_eq!(scheduler.stats().num_free_blocks, 16);
    assert!(step(&mut scheduler, |_| true).is_empty());
}

#[test]
fn decodes_come_first_and_a_long_prompt_fills_the_rest_in_chunks() {
    let mut scheduler = Scheduler::new(limits());
    scheduler.add(request(1, 3, 20)).unwrap();
    step(&mut scheduler, |_| false);
    scheduler.add(request(2, 34, 4)).unwrap();
    assert_eq!(scheduled(&step(&mut scheduler, |_| false)), [(1, 1), (2, 15)]);
    assert_eq!(scheduled(&step(&mut scheduler, |_| false)), [(1, 1), (2, 15)]);
    let plan = step(&mut scheduler, |_| false);
    assert_eq!(scheduled(&plan), [(1, 1), (2, 4)]);
    assert_eq!(plan.sequences[1].num_computed_tokens, 30);
    assert_eq!(plan.samples, [SeqId(1), SeqId(2)]);
    assert_eq!(scheduled(&step(&mut scheduler, |_| false)), [(1, 1), (2, 1)]);
}

#[test]
fn refusals_name_the_numbers_and_change_nothing() {
    let mut scheduler = Scheduler::new(Limits { num_blocks: 4, max_queued_requests: 1, ..limits() });
    assert_eq!(scheduler.add(request(1, 60, 5)), Err(Refusal::TooLong { num_tokens: 65, max_model_len: 64 }));
    assert_eq!(
        scheduler.add(request(1, 1, usize::MAX)),
        Err(Refusal::TooLong { num_tokens: usize::MAX, max_model_len: 64 })
    );
    assert_eq!(scheduler.add(request(1, 13, 4)), Err(Refusal::NeverFits { num_blocks_needed: 5, num_blocks: 4 }));
    for (spec, reason) in [
        (request(1, 0, 4), "the prompt is empty"),
        (request(1, 4, 0), "max_new_tokens is 0 and no prompt logits are wanted"),
        (SequenceSpec { samples: vec![], ..request(1, 4, 4) }, "there are no samples"),
        (SequenceSpec { samples: vec![SeqId(1), SeqId(1)], ..request(1, 4, 4) }, "two samples have one id"),
    ] {
        assert_eq!(scheduler.add(spec), Err(Refusal::Invalid { reason }));
    }
    assert!(!scheduler.has_work());
    scheduler.add(request(1, 12, 4)).unwrap();
    assert_eq!(scheduler.add(request(1, 4, 4)), Err(Refusal::Invalid { reason: "a sample's id is alive" }));
    assert_eq!(
        scheduler.add(request(2, 4, 4)),
        Err(Refusal::QueueFull { num_queued_requests: 1, max_queued_requests: 1 })
    );
    step(&mut scheduler, |_| false);
    scheduler.add(request(2, 4, 4)).unwrap();
}

#[test]
fn samples_share_the_prompt_and_copy_its_partly_filled_block_before_writing() {
    let mut scheduler = Scheduler::new(limits());
    scheduler.add(SequenceSpec { samples: [1, 2, 3].map(SeqId).to_vec(), ..request(0, 6, 8) }).unwrap();
    let plan = step(&mut scheduler, |_| false);
    assert_eq!(plan.samples, [1, 2, 3].map(SeqId));
    assert_eq!(scheduler.stats().num_free_blocks, 14, "two blocks hold the prompt for all three");

    let plan = step(&mut scheduler, |_| false);
    assert_eq!(scheduled(&plan), [(1, 1), (2, 1), (3, 1)]);
    let copy = |target| BlockCopy { source: BlockId(1), target: BlockId(target) };
    assert_eq!(plan.copies, [copy(2), copy(3)], "the last holder writes in place");
    assert_eq!(plan.block_tables, [0, 2, 0, 3, 0, 1].map(BlockId));
    assert_eq!(plan.slots, [10, 14, 6].map(SlotId));
    assert!(step(&mut scheduler, |_| true).copies.is_empty());
    assert_eq!(scheduler.stats().num_free_blocks, 16);
}

#[test]
fn the_newest_gives_way_and_is_computed_again_with_what_it_had() {
    let mut scheduler = Scheduler::new(Limits { num_blocks: 4, ..limits() });
    scheduler.add(request(1, 7, 9)).unwrap();
    scheduler.add(request(2, 7, 9)).unwrap();
    step(&mut scheduler, |_| false);
    step(&mut scheduler, |_| false);
    let plan = step(&mut scheduler, |_| true);
    assert_eq!((scheduled(&plan), plan.preempted), (vec![(1, 1)], vec![SeqId(2)]));
    let plan = step(&mut scheduler, |_| true);
    assert_eq!(scheduled(&plan), [(2, 9)]);
    assert_eq!(plan.tokens[6..], [TokenId(6), TokenId(100), TokenId(100)], "what was sampled is known");
    assert!(plan.first_scheduled.is_empty());
    assert!(!scheduler.has_work());
}

#[test]
fn long_prompts_are_held_to_their_limit_beside_who_decodes_and_only_there() {
    let mut scheduler = Scheduler::new(Limits { num_blocks: 64, ..limits() });
    let mut asked = Vec::new();
    // Longer than three is long.
    let mut paced = |scheduler: &mut Scheduler, limit: usize| {
        let load = std::cell::Cell::new(None);
        let mut plan = StepPlan::default();
        let limit = |found| {
            load.set(Some(found));
            limit
        };
        scheduler.plan(&Pace { short: 3, limit: &limit }, &mut plan);
        let sampled = plan.samples.iter().map(|&id| Sampled { id, token: TokenId(100), finished: false });
        scheduler.commit(&plan, &sampled.collect::<Vec<_>>());
        asked.push(load.get().map(|load| (load.num_decoding, load.num_long_prompts)));
        scheduled(&plan)
    };
    scheduler.add(request(1, 6, 9)).unwrap();
    assert_eq!(paced(&mut scheduler, 1), [(1, 6)], "nobody decodes");
    scheduler.add(request(2, 3, 9)).unwrap();
    assert_eq!(paced(&mut scheduler, 1), [(1, 1), (2, 3)], "no prompt is long");
    scheduler.add(request(3, 20, 9)).unwrap();
    scheduler.add(request(4, 20, 9)).unwrap();
    assert_eq!(paced(&mut scheduler, 5), [(1, 1), (2, 1), (3, 5)]);
    // Short ones pass.
    scheduler.add(request(5, 2, 9)).unwrap();
    assert_eq!(paced(&mut scheduler, 0), [(1, 1), (2, 1), (3, 1), (5, 2)], "one token at least");
    assert_eq!(paced(&mut scheduler, 11), [(1, 1), (2, 1), (5, 1), (3, 11)]);
    // The end of a long one is short; the next one has its turn, and half is for one that has less left.
    scheduler.add(request(6, 9, 9)).unwrap();
    assert_eq!(paced(&mut scheduler, 6), [(1, 1), (2, 1), (5, 1), (6, 1), (3, 3), (4, 6)]);
    assert_eq!(paced(&mut scheduler, 6), [(1, 1), (2, 1), (3, 1), (5, 1), (4, 3), (6, 3)]);
    assert_eq!(asked, [None, None, Some((2, 2)), Some((2, 2)), Some((3, 2)), Some((3, 2)), Some((4, 2))]);
}

#[test]
fn a_better_long_prompt_gets_its_place_before_a_worse_one() {
    let mut scheduler = Scheduler::new(Limits { num_blocks: 64, ..limits() });
    let paced = |scheduler: &mut Scheduler| {
        let mut plan = StepPlan::default();
        scheduler.plan(&Pace { short: 3, limit: &|_| 4 }, &mut plan);
        let sampled = plan.samples.iter().map(|&id| Sampled { id, token: TokenId(100), finished: false });
        scheduler.commit(&plan, &sampled.collect::<Vec<_>>());
        scheduled(&plan)
    };
    let better = |id, length| SequenceSpec { priority: -1, ..request(id, length, 9) };
    scheduler.add(better(1, 6)).unwrap();
    paced(&mut scheduler);
    scheduler.add(request(2, 20, 9)).unwrap();
    assert_eq!(paced(&mut scheduler), [(1, 1), (2, 4)]);
    scheduler.add(better(3, 20)).unwrap();
    assert_eq!(paced(&mut scheduler), [(1, 1), (3, 1), (2, 4)]);
    assert_eq!(paced(&mut scheduler), [(1, 1), (3, 4)]);
    // Streams that are worse hold nothing back.
    scheduler.add(SequenceSpec { priority: -2, ..request(4, 9, 9) }).unwrap();
    assert_eq!(paced(&mut scheduler), [(1, 1), (4, 9)]);
}

#[test]
fn a_scored_prompt_ends_without_a_token() {
    let mut scheduler = Scheduler::new(limits());
    let samples = [4, 5].map(SeqId).to_vec();
    scheduler.add(SequenceSpec { samples: samples.clone(), prompt_logits: true, ..request(0, 20, 0) }).unwrap();
    let mut plan = StepPlan::default();
    scheduler.plan(&Pace::NONE, &mut plan);
    assert_eq!((plan.sequences[0].logits, plan.samples.len()), (LogitsWanted::All { first_row: 0 }, 0));
    assert!(scheduler.commit(&plan, &[]).is_empty());
    scheduler.plan(&Pace::NONE, &mut plan);
    assert_eq!((scheduled(&plan), plan.sequences[0].logits), (vec![(4, 4)], LogitsWanted::All { first_row: 0 }));
    assert!(plan.samples.is_empty());
    assert_eq!(scheduler.commit(&plan, &[]), samples);
    assert!(!scheduler.has_work());
}

#[test]
fn more_samples_than_seats_take_turns() {
    let mut scheduler = Scheduler::new(Limits { max_num_seqs: 2, ..limits() });
    scheduler.add(SequenceSpec { samples: (1..=5).map(SeqId).collect(), ..request(0, 6, 3) }).unwrap();
    let plan = step(&mut scheduler, |_| false);
    assert_eq!(plan.samples.len(), 5, "a sample needs no seat to draw its first token");
    let mut turns = Vec::new();
    while scheduler.has_work() {
        let plan = step(&mut scheduler, |_| turns.len() % 2 == 1);
        turns.push(scheduled(&plan));
    }
    let pair = |a, b| vec![(a, 1), (b, 1)];
    assert_eq!(turns, [pair(1, 2), pair(1, 2), pair(3, 4), pair(3, 4), vec![(5, 1)], vec![(5, 1)]]);
}

#[test]
fn a_failed_step_drops_whoever_was_in_it_and_nobody_else() {
    let mut scheduler = Scheduler::new(Limits { max_num_seqs: 1, ..limits() });
    scheduler.add(SequenceSpec { samples: [1, 2].map(SeqId).to_vec(), ..request(0, 20, 3) }).unwrap();
    scheduler.add(request(3, 4, 3)).unwrap();
    let mut plan = StepPlan::default();
    scheduler.plan(&Pace::NONE, &mut plan);
    assert_eq!(scheduler.fail(&plan), [SeqId(1), SeqId(2)], "who waits for the prompt goes with it");
    assert_eq!(scheduler.stats().num_free_blocks, 16);
    assert_eq!(scheduled(&step(&mut scheduler, |_| true)), [(3, 4)]);
}

#[test]
fn aborting_frees_at_once_even_while_a_step_is_computed() {
    let mut scheduler = Scheduler::new(limits());
    scheduler.add(request(1, 6, 3)).unwrap();
    scheduler.add(request(2, 6, 3)).unwrap();
    let mut plan = StepPlan::default();
    scheduler.plan(&Pace::NONE, &mut plan);
    assert_eq!(scheduler.stats().num_free_blocks, 12);
    assert!(scheduler.abort(SeqId(1)));
    assert!(!scheduler.abort(SeqId(1)));
    assert_eq!(scheduler.stats().num_free_blocks, 14);
    scheduler.add(request(1, 3, 3)).unwrap();
    let token = |id| Sampled { id: SeqId(id), token: TokenId(9), finished: false };
    scheduler.commit(&plan, &[token(1), token(2)]);
    let plan = step(&mut scheduler, |_| true);
    assert_eq!(scheduled(&plan), [(2, 1), (1, 3)], "the new 1 starts from its own prompt");
}

#[test]
fn late_tokens_do_not_reach_a_namesake_that_waits_for_another_prompt() {
    let mut scheduler = Scheduler::new(limits());
    scheduler.add(SequenceSpec { samples: [1, 2, 3].map(SeqId).to_vec(), ..request(0, 6, 3) }).unwrap();
    let mut plan = StepPlan::default();
    scheduler.plan(&Pace::NONE, &mut plan);
    scheduler.abort(SeqId(2));
    scheduler.add(SequenceSpec { samples: [9, 2].map(SeqId).to_vec(), ..request(0, 5, 3) }).unwrap();
    let token = |id| Sampled { id: SeqId(id), token: TokenId(50 + id as u32), finished: false };
    scheduler.commit(&plan, &[token(1), token(2), token(3)]);
    let plan = step(&mut scheduler, |_| true);
    assert_eq!(scheduled(&plan), [(1, 1), (3, 1), (9, 5)]);
    assert_eq!(plan.samples, [1, 3, 9, 2].map(SeqId), "2 begins with the prompt of 9");
}

#[test]
fn stats_count_requests_apart_from_sequences() {
    let mut scheduler = Scheduler::new(Limits { max_num_seqs: 3, ..limits() });
    scheduler.add(SequenceSpec { samples: [1, 2, 3].map(SeqId).to_vec(), ..request(0, 5, 3) }).unwrap();
    let stats = scheduler.stats();
    assert_eq!((stats.num_queued_requests, stats.num_waiting_requests, stats.num_waiting), (1, 1, 1));
    step(&mut scheduler, |_| false);
    scheduler.add(request(4, 5, 3)).unwrap();
    step(&mut scheduler, |_| false);
    let stats = scheduler.stats();
    assert_eq!((stats.num_running, stats.num_running_requests), (3, 1));
    assert_eq!((stats.num_waiting, stats.num_waiting_requests, stats.num_queued_requests), (1, 1, 1));
    // Three hold the first block together and have one each for two tokens.
    assert_eq!((stats.num_blocks - stats.num_free_blocks, stats.num_unused_slots), (4, 6));
    assert!(scheduler.is_alive(SeqId(3)) && !scheduler.is_alive(SeqId(5)));
}

/// What the caller breaks is said before anything has changed: the step can still be failed.
fn check_broken_commit(tokens: impl Fn(&StepPlan) -> Vec<Sampled>, expected: &str) {
    let mut scheduler = Scheduler::new(limits());
    scheduler.add(request(1, 4, 1)).unwrap();
    scheduler.add(request(2, 4, 5)).unwrap();
    let mut plan = StepPlan::default();
    scheduler.plan(&Pace::NONE, &mut plan);
    let sampled = tokens(&plan);
    let panic = catch_unwind(AssertUnwindSafe(|| scheduler.commit(&plan, &sampled))).unwrap_err();
    let text = panic.downcast_ref::<String>().cloned().or(panic.downcast_ref::<&str>().map(ToString::to_string));
    assert!(text.as_ref().unwrap().contains(expected), "{text:?}");
    scheduler.check_invariants();
    assert_eq!(scheduler.fail(&plan), [SeqId(1), SeqId(2)]);
    assert_eq!(scheduler.stats().num_free_blocks, 16);
}

#[test]
fn broken_commits_are_caught() {
    let token = |id, finished| Sampled { id: SeqId(id), token: TokenId(9), finished };
    let one_each = "each live sample of the plan gets exactly one token";
    check_broken_commit(|_| vec![token(1, true)], one_each);
    check_broken_commit(|_| vec![token(1, true), token(1, true)], one_each);
    check_broken_commit(|_| vec![token(1, true), token(2, false), token(2, false)], one_each);
    check_broken_commit(|_| vec![token(1, false), token(2, false)], "goes on past its max_new_tokens of 1");
}

#[test]
#[should_panic(expected = "neither committed nor failed")]
fn a_second_plan_must_wait_for_the_first() {
    let mut scheduler = Scheduler::new(limits());
    scheduler.add(request(1, 4, 1)).unwrap();
    scheduler.plan(&Pace::NONE, &mut StepPlan::default());
    scheduler.plan(&Pace::NONE, &mut StepPlan::default());
}

#[test]
#[should_panic(expected = "not the last one made")]
fn only_the_last_plan_can_be_committed() {
    let mut scheduler = Scheduler::new(limits());
    scheduler.add(request(1, 4, 1)).unwrap();
    scheduler.plan(&Pace::NONE, &mut StepPlan::default());
    scheduler.commit(&StepPlan::default(), &[]);
}

#[test]
fn a_held_sequence_sits_out_and_the_others_go_on() {
    let mut scheduler = Scheduler::new(limits());
    scheduler.add(request(1, 3, 20)).unwrap();
    scheduler.add(request(2, 3, 20)).unwrap();
    step(&mut scheduler, |_| false);
    scheduler.hold(SeqId(1), true);
    scheduler.hold(SeqId(77), true);
    scheduler.add(request(3, 5, 20)).unwrap();
    assert_eq!(scheduled(&step(&mut scheduler, |_| false)), [(2, 1), (3, 5)], "the first in order is held");
    // It keeps what it holds, and nothing moves while all are held.
    scheduler.hold(SeqId(2), true);
    scheduler.hold(SeqId(3), true);
    let num_free_blocks = scheduler.stats().num_free_blocks;
    assert!(step(&mut scheduler, |_| false).is_empty());
    assert!(scheduler.has_work());
    assert_eq!(scheduler.stats().num_free_blocks, num_free_blocks);
    // Released, it goes on where it was: position 3 is its fourth.
    scheduler.hold(SeqId(1), false);
    let plan = step(&mut scheduler, |_| false);
    assert_eq!((scheduled(&plan), plan.positions), (vec![(1, 1)], vec![3]));
    assert!(scheduler.abort(SeqId(2)) && scheduler.abort(SeqId(3)));
    step(&mut scheduler, |_| true);
    assert!(!scheduler.has_work());
    assert_eq!(scheduler.stats().num_free_blocks, 16);
}

#[test]
fn a_held_sequence_gives_way_like_any_other() {
    let mut scheduler = Scheduler::new(Limits { num_blocks: 4, ..limits() });
    scheduler.add(request(1, 7, 8)).unwrap();
    scheduler.add(request(2, 3, 8)).unwrap();
    step(&mut scheduler, |_| false);
    scheduler.hold(SeqId(2), true);
    let mut num_preempted = 0;
    for _ in 0..6 {
        num_preempted += step(&mut scheduler, |_| false).preempted.len();
    }
    assert_eq!(num_preempted, 1, "the first needs all four blocks");
    // The last token of the first: then the other one is computed again, but for the token it would be sampled after.
    step(&mut scheduler, |id| id == SeqId(1));
    assert_eq!(scheduled(&step(&mut scheduler, |_| panic!("a held one was sampled"))), [(2, 3)]);
    assert!(step(&mut scheduler, |_| false).is_empty(), "and sits out");
    scheduler.hold(SeqId(2), false);
    assert_eq!(scheduled(&step(&mut scheduler, |_| true)), [(2, 1)]);
    assert!(!scheduler.has_work());
}

/// However many are held, they take no seat from those who can go on.
#[test]
fn held_sequences_take_no_seats() {
    let mut scheduler = Scheduler::new(Limits { max_num_seqs: 2, ..limits() });
    scheduler.add(request(1, 3, 20)).unwrap();
    scheduler.add(request(2, 3, 20)).unwrap();
    step(&mut scheduler, |_| false);
    scheduler.hold(SeqId(1), true);
    scheduler.hold(SeqId(2), true);
    scheduler.add(request(3, 3, 20)).unwrap();
    assert_eq!(scheduled(&step(&mut scheduler, |_| false)), [(3, 3)]);
    // Released, the earlier ones have their seats again, and the third keeps its blocks meanwhile.
    scheduler.hold(SeqId(1), false);
    scheduler.hold(SeqId(2), false);
    assert_eq!(scheduled(&step(&mut scheduler, |_| false)), [(1, 1), (2, 1)]);
    assert_eq!(scheduler.stats().num_running, 3);
}

/// Random holds and releases over random requests: whoever is held gets no token, and once all are released everything
/// ends with every block free.
#[test]
fn holds_at_random_lose_nothing() {
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut random = move |bound: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % bound
    };
    for _ in 0..200 {
        let mut scheduler = Scheduler::new(Limits { num_blocks: 8 + random(12) as usize, ..limits() });
        let mut num_tokens_left: Vec<u64> = (0..6).map(|_| 1 + random(14)).collect();
        for (id, &num_tokens) in (0..).zip(&num_tokens_left) {
            scheduler.add(request(id, 1 + random(12) as u32, num_tokens as usize)).unwrap();
        }
        let mut has_tokens = [false; 6];
        let mut plan = StepPlan::default();
        for at in 0..400 {
            let held: Vec<bool> = (0..6).map(|_| at < 200 && random(3) == 0).collect();
            (0..).zip(&held).for_each(|(id, &is_held)| scheduler.hold(SeqId(id), is_held));
            scheduler.plan(&Pace::NONE, &mut plan);
            let sample = |&id: &SeqId| {
                let num_left = &mut num_tokens_left[id.0 as usize];
                let has_tokens = std::mem::replace(&mut has_tokens[id.0 as usize], true);
                assert!(!held[id.0 as usize] || !has_tokens, "{id:?} is held, yet it is sampled");
                *num_left -= 1;
                Sampled { id, token: TokenId(7), finished: *num_left == 0 }
            };
            let sampled: Vec<Sampled> = plan.samples.iter().map(sample).collect();
            scheduler.commit(&plan, &sampled);
        }
        assert!(!scheduler.has_work(), "all were released for 200 steps");
        let stats = scheduler.stats();
        assert_eq!(stats.num_free_blocks, stats.num_blocks);
    }
}
