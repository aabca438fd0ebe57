//! A small world around the very scheduler that serves: clients, a memory, failures; everything from one seed.
//!
//! [`run`] drives a [`World`] with seeded arrivals, cancels, failed steps, paced prompts and memory pressure, checks
//! safety after every call and liveness at the end, and panics at the first broken promise. There is no clock and no
//! randomness besides the seed: a failure is replayed by its number.

mod random;
mod world;

pub use random::Random;
pub use world::{ClientRequest, Report, StepFate, World};

use crate::Limits;

/// The weather of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// The scheduler's.
    pub limits: Limits,
    /// Requests that clients make.
    pub num_requests: usize,
    /// Chance of another arrival before each step, repeated until it fails.
    pub arrival_percent: usize,
    /// Chance that somebody cancels between two steps.
    pub abort_percent: usize,
    /// Chance that somebody cancels while a step is computed.
    pub abort_in_flight_percent: usize,
    /// Chance that what is computed of somebody becomes stale between two steps.
    pub recompute_percent: usize,
    /// Chance that a step fails.
    pub failure_percent: usize,
    /// The longest prompt that clients send; longer than fits is refused.
    pub num_prompt_tokens_max: usize,
    /// The longest answer.
    pub max_new_tokens_max: usize,
    /// Most samples of a request.
    pub num_samples_max: usize,
    /// Priorities are 0 to below this.
    pub num_priorities: usize,
    /// Tenants are 0 to below this.
    pub num_tenants: usize,
}

impl Scenario {
    /// Tiny pools, where everything rare is common.
    pub fn random(random: &mut Random, num_requests: usize) -> Self {
        let block_size = [1, 2, 3, 4, 8, 16][random.between(0, 5)];
        let num_blocks = random.between(1, 48);
        let num_slots = num_blocks * block_size;
        let mut percent = |most: usize| if random.chance(50) { 0 } else { random.between(1, most) };
        let (abort_percent, abort_in_flight_percent, failure_percent) = (percent(30), percent(20), percent(8));
        let recompute_percent = percent(10);
        Self {
            limits: Limits {
                block_size,
                num_blocks,
                max_num_seqs: random.between(1, 12),
                max_num_batched_tokens: random.between(1, 48),
                max_model_len: random.between(1, num_slots + num_slots / 4 + 1),
                max_queued_requests: random.between(1, 24),
            },
            num_requests,
            arrival_percent: random.between(5, 60),
            abort_percent,
            abort_in_flight_percent,
            recompute_percent,
            failure_percent,
            num_prompt_tokens_max: random.between(1, num_slots.min(96)),
            max_new_tokens_max: random.between(1, 24),
            num_samples_max: random.between(1, 5),
            num_priorities: random.between(1, 3),
            num_tenants: random.between(1, 3),
        }
    }

    fn request(&self, random: &mut Random) -> ClientRequest {
        let max_new_tokens = random.between(0, self.max_new_tokens_max);
        let shortest = usize::from(!random.chance(1));
        let longest = if random.chance(25) { self.num_prompt_tokens_max } else { self.num_prompt_tokens_max.min(8) };
        ClientRequest {
            num_prompt_tokens: random.between(shortest, longest),
            num_samples: random.between(1, self.num_samples_max),
            max_new_tokens,
            num_new_tokens: random.between(1.min(max_new_tokens), max_new_tokens),
            priority: random.between(0, self.num_priorities - 1) as i32,
            tenant: random.between(0, self.num_tenants - 1) as u32,
            prompt_logits: max_new_tokens == 0 && !random.chance(5) || random.chance(30),
        }
    }
}

/// Runs a scenario to its end: all requests made, everything ended or cancelled, nothing held.
///
/// # Panics
/// At the first broken promise.
pub fn run(seed: u64, scenario: &Scenario) -> Report {
    let mut random = Random::new(seed);
    let mut world = World::new(scenario.limits.clone());
    let mut num_made = 0;
    while num_made < scenario.num_requests {
        while num_made < scenario.num_requests && random.chance(scenario.arrival_percent) {
            // A refusal has been checked against the world's own rules; a client that is refused goes away.
            let _refused = world.add(scenario.request(&mut random)).is_err();
            num_made += 1;
        }
        if random.chance(scenario.abort_percent) {
            world.abort_nth(random.next_u64() as usize);
        }
        if random.chance(scenario.recompute_percent) {
            world.recompute_nth(random.next_u64() as usize);
        }
        let num_aborted = usize::from(random.chance(scenario.abort_in_flight_percent)) * random.between(1, 3);
        let fate = StepFate {
            aborted: (0..num_aborted).map(|_| random.next_u64() as usize).collect(),
            has_failed: random.chance(scenario.failure_percent),
            pace: random.chance(50).then(|| (random.between(0, 24), random.between(0, 16))),
        };
        world.step(&fate);
    }
    world.drain();
    let report = world.report();
    assert_eq!(report.num_accepted + report.num_refused, num_made);
    report
}
