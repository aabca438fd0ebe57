//! Thousands of requests in hundreds of small worlds, each from its seed. A failure names the seed and the line that
//! replays it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use bindery_scheduler::{
    Limits, Marks,
    simulate::{ClientRequest, Random, Report, Scenario, StepFate, World, run},
};

/// Replays one world: `BINDERY_SIMULATE_SEED=17 cargo test -p bindery-scheduler --test simulate`.
const SEED_VARIABLE: &str = "BINDERY_SIMULATE_SEED";

fn run_seed(seed: u64, num_requests: usize) -> Report {
    let scenario = Scenario::random(&mut Random::new(!seed), num_requests);
    catch_unwind(AssertUnwindSafe(|| run(seed, &scenario))).unwrap_or_else(|_| {
        panic!(
            "seed {seed} broke a promise (its message stands above) in {scenario:?}; replay: {SEED_VARIABLE}={seed} \
             cargo test -p bindery-scheduler --test simulate"
        )
    })
}

#[test]
fn every_world_keeps_every_promise_and_takes_every_rare_branch() {
    let seeds = match std::env::var(SEED_VARIABLE) {
        Ok(seed) => {
            let seed: u64 = seed.parse().unwrap();
            seed..seed + 1
        }
        Err(_) => 0..if std::env::var_os("BINDERY_TEST_FULL").is_some() { 100_000 } else { 1_500 },
    };
    let is_whole = seeds.end - seeds.start > 1;
    let mut total = Report::default();
    for seed in seeds {
        let report = run_seed(seed, 60);
        total.num_accepted += report.num_accepted;
        total.num_finished += report.num_finished;
        total.num_failed += report.num_failed;
        total.num_aborted += report.num_aborted;
        total.num_refused += report.num_refused;
        add_marks(&mut total.marks, &report.marks);
    }
    if is_whole {
        assert!(total.num_accepted > 40_000 && total.num_finished > 40_000, "{total:?}");
        assert!(total.num_failed > 2_000 && total.num_aborted > 5_000 && total.num_refused > 5_000, "{total:?}");
        // Enough of everything rare. (That overtaking ends takes a longer story; it has one in tests/marks.rs.)
        let marks = format!("{:?}", Marks { overtaking_ended: 1, ..total.marks });
        assert!(!marks.contains(": 0,") && !marks.contains(": 0 "), "a rare branch was never taken: {marks}");
    }
}

fn add_marks(total: &mut Marks, marks: &Marks) {
    let Marks {
        preempted,
        preempted_for_admission,
        paused_for_blocks,
        chunk_cut_to_blocks,
        copied_on_write,
        prompt_inherited,
        held_by_watermark,
        overtook,
        overtaking_ended,
        ended_in_yielded_budget,
        unseated,
        first_in_order_kept_a_token,
        prompt_rows_skipped,
        recomputed,
    } = *marks;
    total.preempted += preempted;
    total.preempted_for_admission += preempted_for_admission;
    total.paused_for_blocks += paused_for_blocks;
    total.chunk_cut_to_blocks += chunk_cut_to_blocks;
    total.copied_on_write += copied_on_write;
    total.prompt_inherited += prompt_inherited;
    total.held_by_watermark += held_by_watermark;
    total.overtook += overtook;
    total.overtaking_ended += overtaking_ended;
    total.ended_in_yielded_budget += ended_in_yielded_budget;
    total.unseated += unseated;
    total.first_in_order_kept_a_token += first_in_order_kept_a_token;
    total.prompt_rows_skipped += prompt_rows_skipped;
    total.recomputed += recomputed;
}

#[test]
fn the_same_seed_gives_the_same_plans() {
    for seed in [3, 58, 977] {
        let (one, other) = (run_seed(seed, 200), run_seed(seed, 200));
        assert_eq!(one, other);
        assert_ne!(one.plans_hash, run_seed(seed + 1, 200).plans_hash);
    }
}

#[test]
fn a_server_sized_pool_under_pressure_loses_nothing() {
    let scenario = Scenario {
        limits: Limits {
            block_size: 16,
            num_blocks: 96,
            max_num_seqs: 32,
            max_num_batched_tokens: 128,
            max_model_len: 512,
            max_queued_requests: 64,
        },
        num_requests: 2_000,
        arrival_percent: 30,
        abort_percent: 2,
        abort_in_flight_percent: 2,
        recompute_percent: 1,
        failure_percent: 1,
        num_prompt_tokens_max: 400,
        max_new_tokens_max: 64,
        num_samples_max: 3,
        num_priorities: 2,
        num_tenants: 2,
    };
    let report = run(1, &scenario);
    assert!(report.num_finished > 1_000 && report.marks.preempted > 0, "{report:?}");
}

/// Liveness without mercy: the load never ends, and still everyone's turn comes. A request waits for those before it
/// and for the few that may pass it; alone at the front, each of them needs a step a token at worst. (Seen: some 200.)
#[test]
fn nobody_starves_under_a_load_that_never_ends() {
    const MAX_QUEUED: usize = 8;
    const MAX_TOKENS: usize = 24;
    for seed in 0..8 {
        let mut random = Random::new(seed);
        let mut world = World::new(Limits {
            block_size: 4,
            num_blocks: 12,
            max_num_seqs: 6,
            max_num_batched_tokens: 12,
            max_model_len: 48,
            max_queued_requests: MAX_QUEUED,
        });
        let mut num_steps_max = 0;
        for _ in 0..4_000 {
            // As many as the queue takes, mostly small ones, each as long as it says.
            loop {
                let is_large = random.chance(5);
                let max_new_tokens = random.between(1, if is_large { 24 } else { MAX_TOKENS - 8 });
                let refused = world.add(ClientRequest {
                    num_prompt_tokens: if is_large { 24 } else { random.between(1, 8) },
                    num_samples: random.between(1, 2),
                    max_new_tokens,
                    num_new_tokens: max_new_tokens,
                    priority: 0,
                    tenant: random.between(0, 2) as u32,
                    prompt_logits: false,
                });
                if refused.is_err() {
                    break;
                }
            }
            let pace = random.chance(50).then(|| (random.between(1, 12), random.between(1, 6)));
            world.step(&StepFate { pace, ..StepFate::default() });
            num_steps_max = num_steps_max.max(world.num_steps_of_oldest());
        }
        assert!(world.report().marks.preempted > 100 && world.report().num_finished > 1_000, "a load it is");
        assert!(num_steps_max < 500, "the unluckiest needed {num_steps_max} steps, seed {seed}");
    }
}
