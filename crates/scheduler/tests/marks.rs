//! One story for each rare branch; its mark proves that the story took it.

#![allow(clippy::unwrap_used, reason = "tests")]

use bindery_scheduler::{
    Limits, LogitsWanted, Marks, Pace, Sampled, Scheduler, SeqId, SequenceSpec, Share, StepPlan, TokenId,
};

fn limits() -> Limits {
    Limits {
        block_size: 4,
        num_blocks: 64,
        max_num_seqs: 8,
        max_num_batched_tokens: 16,
        max_model_len: 256,
        max_queued_requests: 64,
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

struct Story {
    scheduler: Scheduler,
    /// Tokens sampled for each id, by id; a sequence ends at its `max_new_tokens`.
    num_left: Vec<(SeqId, usize)>,
}

impl Story {
    fn new(limits: Limits) -> Self {
        Self { scheduler: Scheduler::new(limits), num_left: Vec::new() }
    }

    fn add(&mut self, spec: SequenceSpec) {
        self.num_left.extend(spec.samples.iter().map(|&id| (id, spec.max_new_tokens)));
        self.scheduler.add(spec).unwrap();
    }

    fn step(&mut self) -> StepPlan {
        let mut plan = StepPlan::default();
        self.scheduler.plan(&Pace::NONE, &mut plan);
        let mut sampled = Vec::new();
        for &id in &plan.samples {
            let num_left = &mut self.num_left.iter_mut().find(|(other, _)| *other == id).unwrap().1;
            *num_left -= 1;
            sampled.push(Sampled { id, token: TokenId(100), finished: *num_left == 0 });
        }
        self.scheduler.commit(&plan, &sampled);
        plan
    }

    fn drain(&mut self) {
        for _ in 0..10_000 {
            if !self.scheduler.has_work() {
                return;
            }
            self.step();
        }
        panic!("it does not end");
    }

    fn marks(&self) -> Marks {
        *self.scheduler.marks()
    }
}

/// `(id, number of tokens)` of each scheduled sequence.
fn scheduled(plan: &StepPlan) -> Vec<(u64, usize)> {
    plan.sequences.iter().map(|one| (one.id.0, one.tokens.len())).collect()
}

#[test]
fn the_last_in_order_gives_way() {
    let mut story = Story::new(Limits { num_blocks: 4, ..limits() });
    story.add(request(1, 7, 9));
    story.add(request(2, 7, 9));
    story.drain();
    assert!(story.marks().preempted > 0);
    assert_eq!(story.scheduler.stats().num_preemptions, story.marks().preempted);
}

#[test]
fn a_waiting_one_of_better_priority_takes_blocks() {
    let mut story = Story::new(Limits { num_blocks: 4, ..limits() });
    story.add(request(1, 10, 3));
    story.step();
    story.add(SequenceSpec { priority: -1, ..request(2, 10, 3) });
    let plan = story.step();
    assert_eq!((scheduled(&plan), plan.preempted), (vec![(2, 10)], vec![SeqId(1)]));
    assert_eq!(story.marks().preempted_for_admission, 1);
    story.drain();
}

/// What siblings share is free once all of them have given way: it counts once, and only then.
#[test]
fn shared_blocks_are_gained_when_all_siblings_give_way() {
    for (num_prompt_tokens, gains_enough) in [(8, true), (12, true), (13, false)] {
        let mut story = Story::new(Limits { num_blocks: 7, ..limits() });
        story.add(SequenceSpec { priority: -1, ..request(1, 11, 9) });
        story.step();
        story.add(SequenceSpec { samples: [2, 3].map(SeqId).to_vec(), priority: 1, ..request(0, 7, 5) });
        story.step();
        story.add(request(4, num_prompt_tokens, 3));
        let plan = story.step();
        let has_started = plan.first_scheduled == [SeqId(4)];
        assert_eq!(has_started, gains_enough, "{num_prompt_tokens} tokens: {plan:?}");
        assert_eq!(!plan.preempted.is_empty(), gains_enough, "who gives way in vain");
        story.drain();
    }
}

#[test]
fn a_waiting_one_of_equal_priority_takes_no_blocks() {
    let mut story = Story::new(Limits { num_blocks: 4, ..limits() });
    story.add(request(1, 10, 3));
    story.step();
    story.add(request(2, 10, 3));
    assert_eq!(scheduled(&story.step()), [(1, 1)]);
    story.drain();
    assert_eq!(story.marks().preempted, 0);
}

#[test]
fn a_waiting_one_of_better_priority_takes_a_seat() {
    let mut story = Story::new(Limits { max_num_seqs: 2, ..limits() });
    story.add(request(1, 3, 5));
    story.add(request(2, 3, 5));
    story.step();
    story.add(SequenceSpec { priority: -1, ..request(3, 6, 2) });
    assert_eq!(scheduled(&story.step()), [(1, 1), (3, 6)], "2 keeps its blocks and sits out");
    assert_eq!(scheduled(&story.step()), [(3, 1), (1, 1)]);
    assert_eq!(scheduled(&story.step()), [(1, 1), (2, 1)]);
    assert_eq!((story.marks().unseated, story.marks().preempted), (1, 0));
    story.drain();
}

#[test]
fn a_long_prompt_of_worse_priority_delays_a_better_one_by_less_than_a_step() {
    let mut story = Story::new(limits());
    story.add(request(1, 100, 2));
    story.step();
    story.add(SequenceSpec { priority: -1, ..request(2, 30, 2) });
    assert_eq!(scheduled(&story.step()), [(2, 8), (1, 8)], "half of the budget was shared out already");
    assert_eq!(scheduled(&story.step()), [(2, 16)]);
    story.drain();
}

#[test]
fn who_loses_its_seat_leaves_all_its_tokens() {
    let mut story = Story::new(Limits { max_num_seqs: 1, ..limits() });
    story.add(request(1, 100, 2));
    story.step();
    story.add(SequenceSpec { priority: -1, ..request(2, 16, 1) });
    assert_eq!(scheduled(&story.step()), [(2, 16)]);
    assert_eq!(scheduled(&story.step()), [(1, 16)]);
    story.drain();
}

#[test]
fn the_newest_sits_out_before_it_gives_way() {
    let mut story = Story::new(Limits { num_blocks: 3, ..limits() });
    story.add(request(1, 1, 7));
    story.add(request(2, 7, 5));
    story.step();
    assert_eq!(scheduled(&story.step()), [(1, 1), (2, 1)]);
    let plan = story.step();
    assert_eq!((scheduled(&plan), plan.preempted), (vec![(1, 1)], vec![]), "2 needs a block, 1 does not yet");
    assert_eq!(story.marks().paused_for_blocks, 1);
    story.step();
    assert_eq!(story.step().preempted, [SeqId(2)], "now 1 needs one");
    story.drain();
}

#[test]
fn a_chunk_is_cut_to_the_blocks_at_hand() {
    let mut story = Story::new(Limits { num_blocks: 4, max_num_batched_tokens: 4, ..limits() });
    story.add(request(1, 3, 9));
    story.step();
    story.add(request(2, 12, 2));
    assert_eq!(scheduled(&story.step()), [(1, 1), (2, 3)]);
    assert_eq!(scheduled(&story.step()), [(1, 1), (2, 3)]);
    assert_eq!(scheduled(&story.step()), [(1, 1), (2, 2)], "1 has grown into the block that 2 counted on");
    assert_eq!(story.marks().chunk_cut_to_blocks, 1);
    story.drain();
}

#[test]
fn a_shared_block_is_copied_before_the_write() {
    let mut story = Story::new(limits());
    story.add(SequenceSpec { samples: [1, 2].map(SeqId).to_vec(), ..request(0, 5, 3) });
    story.step();
    assert_eq!(story.marks().copied_on_write, 0);
    assert_eq!(story.step().copies.len(), 1);
    assert_eq!(story.marks().copied_on_write, 1);
    story.drain();
}

#[test]
fn a_prompt_of_whole_blocks_is_shared_without_a_copy() {
    let mut story = Story::new(limits());
    story.add(SequenceSpec { samples: [1, 2].map(SeqId).to_vec(), ..request(0, 8, 3) });
    story.drain();
    assert_eq!(story.marks().copied_on_write, 0);
}

#[test]
fn the_next_sample_inherits_a_prompt_as_far_as_it_is_computed() {
    let mut story = Story::new(limits());
    story.add(SequenceSpec { samples: [1, 2, 3].map(SeqId).to_vec(), ..request(0, 20, 2) });
    assert_eq!(scheduled(&story.step()), [(1, 16)]);
    assert!(story.scheduler.abort(SeqId(1)));
    let plan = story.step();
    assert_eq!((scheduled(&plan), &plan.samples[..]), (vec![(2, 4)], &[SeqId(2), SeqId(3)][..]));
    assert_eq!(story.marks().prompt_inherited, 1);
    story.drain();
}

#[test]
fn a_prompt_inherited_between_plan_and_commit_is_not_computed_twice() {
    let mut story = Story::new(limits());
    story.add(SequenceSpec { samples: [1, 2].map(SeqId).to_vec(), prompt_logits: true, ..request(0, 10, 3) });
    let mut plan = StepPlan::default();
    story.scheduler.plan(&Pace::NONE, &mut plan);
    assert_eq!(plan.samples, [SeqId(1), SeqId(2)]);
    assert!(story.scheduler.abort(SeqId(1)));
    let ended = story.scheduler.commit(&plan, &[Sampled { id: SeqId(2), token: TokenId(9), finished: false }]);
    assert!(ended.is_empty());
    let plan = story.step();
    assert_eq!((plan.sequences[0].id, &plan.tokens[..], &plan.positions[..]), (SeqId(2), &[TokenId(9)][..], &[10][..]));
    assert_eq!(plan.sequences[0].logits, LogitsWanted::Last);
}

#[test]
fn the_watermark_keeps_room_to_grow() {
    let mut story = Story::new(Limits { num_blocks: 16, max_num_batched_tokens: 64, ..limits() });
    story.add(request(1, 32, 8));
    story.step();
    story.add(request(2, 32, 8));
    let plan = story.step();
    assert_eq!(scheduled(&plan), [(1, 1)], "7 of 16 blocks are free, the second wants 8");
    assert_eq!(story.marks().held_by_watermark, 0);
    story.drain();

    let mut story = Story::new(Limits { num_blocks: 16, max_num_batched_tokens: 64, ..limits() });
    story.add(request(1, 31, 8));
    story.step();
    story.add(request(2, 32, 8));
    assert_eq!(scheduled(&story.step()), [(1, 1)], "8 of 16 blocks are free, but the first will soon want one");
    assert_eq!(story.marks().held_by_watermark, 1);
    story.drain();
    assert_eq!(story.marks().preempted, 0, "so nobody had to give way");
}

#[test]
fn a_small_request_may_start_while_a_large_one_waits_for_blocks() {
    let mut story = Story::new(Limits { num_blocks: 8, ..limits() });
    story.add(request(1, 14, 10));
    story.step();
    story.add(request(2, 20, 4));
    story.add(request(3, 3, 2));
    let plan = story.step();
    assert_eq!(scheduled(&plan), [(1, 1), (3, 3)]);
    assert_eq!(story.marks().overtook, 1);
    story.drain();
}

/// An endless stream of small requests keeps most of the pool busy; the large one starts all the same.
#[test]
fn a_large_request_starts_in_an_endless_stream_of_small_ones() {
    let mut story = Story::new(Limits { num_blocks: 8, ..limits() });
    story.add(request(0, 4, 5));
    story.add(request(1, 4, 9));
    story.step();
    story.add(request(2, 24, 4));
    let mut num_steps = 0;
    for id in 3.. {
        story.add(request(id, 6, 3));
        num_steps += 1;
        if story.step().first_scheduled.contains(&SeqId(2)) {
            break;
        }
        assert!(num_steps < 60, "starved");
    }
    assert!(story.marks().overtaking_ended > 0, "others may pass it, but not for ever: {:?}", story.marks());
    story.drain();
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one() {
    let mut story = Story::new(Limits { num_blocks: 64, ..limits() });
    story.add(request(1, 200, 2));
    assert_eq!(scheduled(&story.step()), [(1, 16)], "alone it has the whole budget");
    story.add(request(2, 5, 2));
    story.add(request(3, 100, 2));
    let plan = story.step();
    assert_eq!(scheduled(&plan), [(1, 11), (2, 5)], "the short one ends in this step, the other long one waits");
    assert_eq!(story.marks().ended_in_yielded_budget, 1);
    assert_eq!(scheduled(&story.step()), [(2, 1), (1, 15)]);
    story.drain();
}

#[test]
fn the_first_in_order_gets_a_token_where_decodes_would_take_all() {
    let mut story = Story::new(Limits { max_num_batched_tokens: 4, ..limits() });
    for id in 1..=4 {
        story.add(request(id, 1, 9));
    }
    story.step();
    assert_eq!(scheduled(&story.step()), [(1, 1), (2, 1), (3, 1), (4, 1)]);
    story.add(SequenceSpec { priority: -1, ..request(5, 6, 2) });
    assert_eq!(scheduled(&story.step()), [(5, 1), (1, 1), (2, 1), (3, 1)], "5 takes the token of the last");
    assert_eq!(story.marks().first_in_order_kept_a_token, 0);
    assert_eq!(scheduled(&story.step()), [(5, 1), (1, 1), (2, 1), (3, 1)], "4 waits, though it needs but one");
    assert_eq!(story.marks().first_in_order_kept_a_token, 1);
    story.drain();
}

#[test]
fn prompt_rows_come_once_though_the_prompt_is_computed_twice() {
    let mut story = Story::new(Limits { num_blocks: 8, max_num_batched_tokens: 10, ..limits() });
    story.add(SequenceSpec { prompt_logits: true, ..request(1, 24, 2) });
    story.add(request(3, 1, 1));
    let plan = story.step();
    assert_eq!(scheduled(&plan), [(3, 1), (1, 9)]);
    assert_eq!(plan.sequences[1].logits, LogitsWanted::All { first_row: 0 });
    story.add(SequenceSpec { priority: -1, ..request(2, 24, 2) });
    let plan = story.step();
    assert_eq!(plan.preempted, [SeqId(1)]);
    let mut rows = Vec::new();
    while story.scheduler.has_work() {
        let plan = story.step();
        for one in plan.sequences.iter().filter(|one| one.id == SeqId(1)) {
            if let LogitsWanted::All { first_row } = one.logits {
                rows.extend(one.num_computed_tokens + first_row..one.num_computed_tokens + one.tokens.len());
            }
        }
    }
    assert!(story.marks().prompt_rows_skipped > 0);
    assert_eq!(rows, (9..24).collect::<Vec<_>>(), "the first nine came before it gave way");
}

#[test]
fn a_sequence_is_computed_again_when_told_and_keeps_its_place() {
    let mut story = Story::new(Limits { max_num_batched_tokens: 6, ..limits() });
    story.add(request(1, 5, 9));
    story.add(request(2, 1, 9));
    assert_eq!(scheduled(&story.step()), [(2, 1), (1, 5)]);
    assert_eq!(scheduled(&story.step()), [(1, 1), (2, 1)]);
    let num_free_blocks = story.scheduler.stats().num_free_blocks;
    assert!(story.scheduler.recompute(SeqId(1)));
    assert_eq!(story.scheduler.stats().num_free_blocks, num_free_blocks + 2);
    assert!(!story.scheduler.recompute(SeqId(1)), "there is nothing to forget any more");
    assert!(!story.scheduler.recompute(SeqId(77)));
    // Seven known tokens, prompt and sampled ones alike, in chunks; the other one goes on beside them.
    let plan = story.step();
    assert_eq!(scheduled(&plan), [(2, 1), (1, 5)]);
    assert_eq!((plan.sequences[1].num_prompt_tokens, plan.sequences[1].num_known_tokens), (5, 7));
    assert_eq!(plan.samples, [SeqId(2)]);
    let plan = story.step();
    assert_eq!(scheduled(&plan), [(2, 1), (1, 2)]);
    assert_eq!((plan.samples, plan.preempted), (vec![SeqId(2), SeqId(1)], vec![]));
    assert_eq!((story.marks().recomputed, story.marks().preempted), (1, 0));
    story.drain();
}

/// What siblings share stays with those who are not told.
#[test]
fn a_sibling_that_is_computed_again_leaves_shared_blocks_to_the_others() {
    let mut story = Story::new(limits());
    story.add(SequenceSpec { samples: [1, 2].map(SeqId).to_vec(), ..request(0, 8, 9) });
    story.step();
    assert_eq!(story.scheduler.stats().num_free_blocks, 62, "two blocks hold the prompt for both");
    assert!(story.scheduler.recompute(SeqId(2)));
    assert_eq!(story.scheduler.stats().num_free_blocks, 62);
    assert_eq!(scheduled(&story.step()), [(1, 1), (2, 9)]);
    assert_eq!(story.scheduler.stats().num_free_blocks, 58, "each has three of its own, but for the two of before");
    story.drain();
}
