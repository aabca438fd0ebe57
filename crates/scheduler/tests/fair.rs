//! What tenants get of a busy machine: tokens in proportion to their weights, whoever asks more often.
//!
//! Nothing here knows how turns are computed: it counts tokens that were computed for each tenant while both have requests
//! waiting.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{collections::BTreeMap, num::NonZeroU32};

use bindery_scheduler::{Limits, Pace, Sampled, Scheduler, SeqId, SequenceSpec, Share, StepPlan, TenantId, TokenId};

/// Few seats, so that who waits matters; blocks for all.
fn limits() -> Limits {
    Limits {
        block_size: 16,
        num_blocks: 1024,
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        max_model_len: 512,
        max_queued_requests: 4096,
    }
}

/// A tenant that always has requests waiting, all of one kind.
#[derive(Clone, Copy)]
struct Client {
    weight: u32,
    num_prompt_tokens: u32,
    /// What it says its answers may be.
    max_new_tokens: usize,
    /// What they are.
    num_new_tokens: usize,
    /// How many it keeps waiting.
    num_waiting: usize,
}

/// Tokens of answers and of prompts, the former twice, that each client got in `num_steps` steps.
fn costs(clients: &[Client], num_steps: usize) -> Vec<f64> {
    let mut scheduler = Scheduler::new(limits());
    let mut owners: BTreeMap<SeqId, usize> = BTreeMap::new();
    let mut generated: BTreeMap<SeqId, usize> = BTreeMap::new();
    let mut costs = vec![0.0; clients.len()];
    let mut plan = StepPlan::default();
    let mut next = 0;
    for _ in 0..num_steps {
        for (tenant, client) in clients.iter().enumerate() {
            let alive = |owners: &BTreeMap<SeqId, usize>| owners.values().filter(|&&owner| owner == tenant).count();
            while alive(&owners) < client.num_waiting {
                let id = SeqId(next);
                next += 1;
                let weight = NonZeroU32::new(client.weight).unwrap();
                let spec = SequenceSpec {
                    samples: vec![id],
                    prompt: (0..client.num_prompt_tokens).map(TokenId).collect(),
                    max_new_tokens: client.max_new_tokens,
                    priority: 0,
                    share: Share { tenant: TenantId(tenant as u32), weight },
                    adapter: None,
                    prompt_logits: false,
                };
                scheduler.add(spec).unwrap();
                owners.insert(id, tenant);
            }
        }
        scheduler.plan(&Pace::NONE, &mut plan);
        for one in &plan.sequences {
            let num_prompt = one.tokens.len().min(one.num_prompt_tokens.saturating_sub(one.num_computed_tokens));
            costs[owners[&one.id]] += num_prompt as f64;
        }
        let mut sampled = Vec::new();
        for &id in &plan.samples {
            let owner = owners[&id];
            costs[owner] += 2.0;
            let count = generated.entry(id).or_default();
            *count += 1;
            let finished = *count == clients[owner].num_new_tokens;
            sampled.push(Sampled { id, token: TokenId(1), finished });
            if finished {
                owners.remove(&id);
            }
        }
        scheduler.commit(&plan, &sampled);
    }
    costs
}

const CLIENT: Client =
    Client { weight: 1, num_prompt_tokens: 20, max_new_tokens: 64, num_new_tokens: 20, num_waiting: 12 };

/// The second client's tokens over the first one's.
fn ratio(first: Client, second: Client) -> f64 {
    let costs = costs(&[first, second], 20_000);
    costs[1] / costs[0]
}

#[test]
fn equal_weights_share_alike_however_many_wait() {
    let ratio = ratio(CLIENT, Client { num_waiting: 200, ..CLIENT });
    assert!((ratio - 1.0).abs() < 0.05, "{ratio}");
}

#[test]
fn tokens_go_by_weight() {
    for weight in [2, 3, 7] {
        let ratio = ratio(CLIENT, Client { weight, ..CLIENT });
        assert!((ratio / f64::from(weight) - 1.0).abs() < 0.05, "weight {weight}: {ratio}");
    }
}

#[test]
fn shares_are_of_tokens_and_not_of_requests() {
    let long = Client { num_prompt_tokens: 100, num_new_tokens: 60, ..CLIENT };
    let ratio = ratio(CLIENT, long);
    assert!((ratio - 1.0).abs() < 0.1, "{ratio}");
}

/// Answers that end long before their limit, or never before it, are charged as long as they are.
#[test]
fn a_guess_at_an_answers_length_is_made_good() {
    let ratio = ratio(
        Client { max_new_tokens: 400, num_new_tokens: 2, ..CLIENT },
        Client { max_new_tokens: 400, num_new_tokens: 300, ..CLIENT },
    );
    assert!((ratio - 1.0).abs() < 0.15, "{ratio}");
}

/// One that comes late goes ahead of all that a busy one has waiting, but saves nothing up for the time it was away.
#[test]
fn a_late_tenant_goes_first_and_has_saved_nothing_up() {
    let spec = |id: u64, tenant: u32| SequenceSpec {
        samples: vec![SeqId(id)],
        prompt: (0..60).map(TokenId).collect(),
        max_new_tokens: 1,
        priority: 0,
        share: Share { tenant: TenantId(tenant), ..Share::default() },
        adapter: None,
        prompt_logits: false,
    };
    let mut scheduler = Scheduler::new(Limits { max_num_seqs: 1, ..limits() });
    (0..20).for_each(|id| scheduler.add(spec(id, 0)).unwrap());
    let mut plan = StepPlan::default();
    let mut order = Vec::new();
    for at in 0..30 {
        if at == 5 {
            (100..105).for_each(|id| scheduler.add(spec(id, 1)).unwrap());
        }
        scheduler.plan(&Pace::NONE, &mut plan);
        let sampled: Vec<Sampled> =
            plan.samples.iter().map(|&id| Sampled { id, token: TokenId(1), finished: true }).collect();
        order.extend(plan.first_scheduled.iter().map(|id| id.0));
        scheduler.commit(&plan, &sampled);
    }
    assert_eq!(order.len(), 25, "all were served: {order:?}");
    let late: Vec<usize> = (100..105).map(|id| order.iter().position(|&other| other == id).unwrap()).collect();
    assert!(late[0] <= 6, "it came after five and was served as number {}: {order:?}", late[0]);
    assert!(late[4] - late[0] >= 7, "in turns with the other, not all at once: {order:?}");
    let own: Vec<u64> = order.iter().copied().filter(|id| *id < 100).collect();
    assert!(own.is_sorted(), "a tenant's own keep their order: {own:?}");
}
