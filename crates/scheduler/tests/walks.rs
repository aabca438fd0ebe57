//! Walks through the scheduler's state space, with the simulator's world as the judge of every call: random ones,
//! which shrink to a short story when they fail, and all of a small space.

use bindery_scheduler::{
    Limits,
    simulate::{ClientRequest, StepFate, World},
};
use proptest::prelude::*;

/// What a caller can do.
#[derive(Clone, Debug)]
enum Call {
    Add(ClientRequest),
    Step,
    /// Steps in a row: walks that reach deep states stay short.
    Steps(usize),
    /// Likewise, each with long prompts (longer than the first) held to so many tokens (the second) beside who decodes.
    PacedSteps(usize, (usize, usize)),
    Abort(usize),
    Hold(usize, bool),
    Recompute(usize),
    StepWithAborts(Vec<usize>),
    FailedStep(Vec<usize>),
}

fn walk(limits: Limits, calls: &[Call]) -> World {
    let mut world = World::new(limits);
    for call in calls {
        match call {
            Call::Add(asked) => {
                let _refused = world.add(asked.clone()).is_err();
            }
            Call::Step => world.step(&StepFate::default()),
            Call::Steps(num_steps) => (0..*num_steps).for_each(|_| world.step(&StepFate::default())),
            Call::PacedSteps(num_steps, pace) => {
                let fate = StepFate { pace: Some(*pace), ..StepFate::default() };
                (0..*num_steps).for_each(|_| world.step(&fate));
            }
            Call::Abort(n) => {
                let _nobody = !world.abort_nth(*n);
            }
            Call::Hold(n, is_held) => world.hold_nth(*n, *is_held),
            Call::Recompute(n) => world.recompute_nth(*n),
            Call::StepWithAborts(aborted) => {
                world.step(&StepFate { aborted: aborted.clone(), has_failed: false, pace: None });
            }
            Call::FailedStep(aborted) => {
                world.step(&StepFate { aborted: aborted.clone(), has_failed: true, pace: None });
            }
        }
    }
    world.drain();
    world
}

fn limits() -> impl Strategy<Value = Limits> {
    (1_usize..6, 1_usize..14, 1_usize..6, 1_usize..20, 1_usize..60, 1_usize..6).prop_map(
        |(block_size, num_blocks, max_num_seqs, max_num_batched_tokens, max_model_len, max_queued_requests)| Limits {
            block_size,
            num_blocks,
            max_num_seqs,
            max_num_batched_tokens,
            max_model_len,
            max_queued_requests,
        },
    )
}

fn client_request() -> impl Strategy<Value = ClientRequest> {
    let prompts = prop_oneof![4 => 1_usize..6, 2 => 6_usize..40, 1 => Just(0)];
    (prompts, 0_usize..4, 0_usize..12, any::<u8>(), -1_i32..2, 0_u32..3, any::<bool>()).prop_map(
        |(num_prompt_tokens, num_samples, max_new_tokens, part, priority, tenant, prompt_logits)| ClientRequest {
            num_prompt_tokens,
            num_samples,
            max_new_tokens,
            num_new_tokens: (max_new_tokens * usize::from(part)).div_ceil(255).max(1.min(max_new_tokens)),
            priority,
            tenant,
            prompt_logits,
        },
    )
}

fn call() -> impl Strategy<Value = Call> {
    let picks = || prop::collection::vec(0_usize..100, 0..3);
    prop_oneof![
        6 => client_request().prop_map(Call::Add),
        4 => Just(Call::Step),
        4 => (2_usize..9).prop_map(Call::Steps),
        4 => (1_usize..9, (0_usize..12, 0_usize..10)).prop_map(|(num_steps, pace)| Call::PacedSteps(num_steps, pace)),
        2 => (0_usize..100).prop_map(Call::Abort),
        3 => (0_usize..100, any::<bool>()).prop_map(|(n, is_held)| Call::Hold(n, is_held)),
        1 => (0_usize..100).prop_map(Call::Recompute),
        2 => picks().prop_map(Call::StepWithAborts),
        1 => picks().prop_map(Call::FailedStep),
    ]
}

/// Many more under `cargo xtask test --full`.
fn num_cases() -> u32 {
    if std::env::var_os("BINDERY_TEST_FULL").is_some() { 100_000 } else { 3_000 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: num_cases(), failure_persistence: None, ..ProptestConfig::default() })]

    /// Every call keeps every promise, and whatever was left ends.
    #[test]
    fn random_walks_keep_every_promise(limits in limits(), calls in prop::collection::vec(call(), 1..40)) {
        walk(limits, &calls);
    }

    /// The same calls give the same plans.
    #[test]
    fn equal_walks_make_equal_plans(limits in limits(), calls in prop::collection::vec(call(), 1..40)) {
        prop_assert_eq!(walk(limits.clone(), &calls).report(), walk(limits, &calls).report());
    }
}

/// Every walk of a fixed length over a small set of calls that reaches all the machinery.
#[test]
fn every_walk_in_a_small_space_keeps_every_promise() {
    let add = |num_prompt_tokens, num_samples, max_new_tokens, priority| {
        Call::Add(ClientRequest {
            num_prompt_tokens,
            num_samples,
            max_new_tokens,
            num_new_tokens: max_new_tokens,
            priority,
            tenant: num_samples as u32 % 2,
            prompt_logits: max_new_tokens == 0 || num_samples > 1,
        })
    };
    let calls = [
        add(3, 1, 4, 0),
        add(3, 2, 2, 0),
        add(5, 1, 2, -1),
        Call::Step,
        Call::Abort(0),
        Call::StepWithAborts(vec![0]),
        Call::FailedStep(vec![]),
    ];
    let limits = Limits {
        block_size: 2,
        num_blocks: 4,
        max_num_seqs: 2,
        max_num_batched_tokens: 4,
        max_model_len: 7,
        max_queued_requests: 2,
    };
    const LENGTH: u32 = 6;
    let mut story = Vec::new();
    for number in 0..calls.len().pow(LENGTH) {
        story.clear();
        let mut rest = number;
        for _ in 0..LENGTH {
            story.push(calls[rest % calls.len()].clone());
            rest /= calls.len();
        }
        walk(limits.clone(), &story);
    }
}
