//! Clients, a memory and a fake model around one scheduler: the oracle.
//!
//! The value written for a token is a hash of that token and of the value READ, through the block table, for the
//! token before. So one wrong slot, one missing copy, one block handed out too early changes every value after it, and
//! the world, which keeps its own books in plain vectors and recomputes everything from them, sees it in the same
//! step. Sampled tokens are drawn from the memory too. It must not look into the scheduler: it knows plans, answers
//! and statistics, nothing else. Every broken promise is a panic that names it.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU32,
};

use super::random::mix;
use crate::{
    AdapterId, BlockId, Limits, LogitsWanted, Marks, Pace, Refusal, Sampled, Scheduler, SeqId, SequenceSpec, Share,
    StepPlan, TenantId, TokenId,
};

/// What the fake model writes for a token that follows `before`.
fn value_of(before: u64, token: TokenId) -> u64 {
    mix(before ^ mix(u64::from(token.0) + 1))
}

/// What must stand in the memory for each of `tokens`, had they been computed alone and at once.
fn values_of(tokens: &[TokenId]) -> Vec<u64> {
    let mut before = 0;
    tokens
        .iter()
        .map(|&token| {
            before = value_of(before, token);
            before
        })
        .collect()
}

/// The token that `sample` draws after `value`.
fn sampled_from(value: u64, sample: u32) -> TokenId {
    TokenId((mix(value ^ u64::from(sample)) % 50_000) as u32)
}

/// A request as a client of the world makes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientRequest {
    /// Tokens of its prompt; the world invents them.
    pub num_prompt_tokens: usize,
    /// Parallel samples.
    pub num_samples: usize,
    /// Told to the scheduler.
    pub max_new_tokens: usize,
    /// Where its samples end in truth, at most `max_new_tokens`.
    pub num_new_tokens: usize,
    /// Lower runs first.
    pub priority: i32,
    /// Whose it is; its number is its tenant's weight less one.
    pub tenant: u32,
    /// Whether the prompt's logits are wanted.
    pub prompt_logits: bool,
}

/// What happens to a step between plan and commit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepFate {
    /// Cancelled meanwhile: the n-th live sample, modulo their number.
    pub aborted: Vec<usize>,
    /// The step fails and leaves garbage in all that it would have written.
    pub has_failed: bool,
    /// Tokens that make no long prompt yet, and those that long ones get beside who decodes; None: any number.
    pub pace: Option<(usize, usize)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Waits for a sibling to compute the prompt.
    Pending,
    Waiting,
    Running,
    Preempted,
    Gone,
}

#[derive(Debug)]
struct Request {
    asked: ClientRequest,
    prompt: Vec<TokenId>,
    adapter: Option<AdapterId>,
    samples: Vec<usize>,
    /// Prompt positions whose logits came so far.
    num_prompt_rows: usize,
    was_scheduled: bool,
    /// The step before which it came.
    first_step: usize,
    /// Its turn, and what that moved its tenant's counter by.
    turn: u64,
    charged: u64,
}

/// What the world keeps of a tenant: when it is next, when it was last, how long its answers were.
#[derive(Clone, Copy, Debug)]
struct Tenant {
    next: u64,
    last: u64,
    num_answers: u64,
    num_tokens: u64,
}

/// A tenant's counter moves by this for some tokens: 1 for a prompt's, 2 for an answer's, over its weight.
fn counted(tenant: u32, num_prompt_tokens: usize, num_new_tokens: u64) -> u64 {
    (num_prompt_tokens as u64 + 2 * num_new_tokens) * 65_536 / (u64::from(tenant) + 1)
}

#[derive(Debug)]
struct Sample {
    request: usize,
    /// Which of the request's samples.
    number: u32,
    standing: Standing,
    generated: Vec<TokenId>,
    num_computed_tokens: usize,
    blocks: Vec<BlockId>,
    is_held: bool,
}

/// What a run did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Requests the scheduler took.
    pub num_accepted: usize,
    /// Requests it refused.
    pub num_refused: usize,
    /// Samples that ended by themselves.
    pub num_finished: usize,
    /// Samples that were cancelled.
    pub num_aborted: usize,
    /// Samples that a failed step took with it.
    pub num_failed: usize,
    /// Steps, failed ones included.
    pub num_steps: usize,
    /// Tokens computed, again and again where preempted.
    pub num_computed_tokens: usize,
    /// A hash of every plan in order: equal runs have equal ones.
    pub plans_hash: u64,
    /// The scheduler's rare branches.
    pub marks: Marks,
}

/// See the module.
#[derive(Debug)]
pub struct World {
    scheduler: Scheduler,
    plan: StepPlan,
    memory: Vec<u64>,
    requests: Vec<Request>,
    /// By sequence id.
    samples: Vec<Sample>,
    /// Indices of those that are not gone, ascending.
    live: Vec<usize>,
    /// By number, those that ever asked.
    tenants: BTreeMap<u32, Tenant>,
    virtual_time: u64,
    report: Report,
}

impl World {
    /// A scheduler with these limits and an empty memory.
    pub fn new(limits: Limits) -> Self {
        let num_slots = limits.num_blocks * limits.block_size;
        Self {
            scheduler: Scheduler::new(limits),
            plan: StepPlan::default(),
            memory: vec![0; num_slots],
            requests: Vec::new(),
            samples: Vec::new(),
            live: Vec::new(),
            tenants: BTreeMap::new(),
            virtual_time: 0,
            report: Report::default(),
        }
    }

    /// What happened so far.
    pub fn report(&self) -> Report {
        Report { marks: *self.scheduler.marks(), ..self.report.clone() }
    }

    /// The last plan.
    pub fn plan(&self) -> &StepPlan {
        &self.plan
    }

    /// Whether anybody is alive.
    pub fn has_work(&self) -> bool {
        !self.live.is_empty()
    }

    /// Steps since the oldest live request came.
    pub fn num_steps_of_oldest(&self) -> usize {
        let oldest = self.live.iter().map(|&at| self.requests[self.samples[at].request].first_step).min();
        oldest.map_or(0, |first_step| self.report.num_steps - first_step)
    }

    /// Steps that suffice for all that is alive, if nobody comes: the first in order ends after as many steps as it
    /// has tokens, whatever happens to the others.
    pub fn num_steps_max(&self) -> usize {
        self.live
            .iter()
            .map(|&at| {
                let asked = &self.requests[self.samples[at].request].asked;
                asked.num_prompt_tokens + asked.max_new_tokens
            })
            .sum()
    }

    /// A client asks. The world's own rules say whether it must be taken or refused, and why.
    pub fn add(&mut self, asked: ClientRequest) -> Result<(), Refusal> {
        let request_index = self.requests.len();
        let salt = mix(request_index as u64);
        let prompt: Vec<TokenId> = (0..asked.num_prompt_tokens as u64)
            .map(|position| TokenId((mix(salt ^ position) % 50_000) as u32))
            .collect();
        let first = self.samples.len();
        let ids: Vec<usize> = (first..first + asked.num_samples).collect();
        let adapter = salt.is_multiple_of(3).then_some(AdapterId(request_index as u32));
        let expected = self.expected_refusal(&asked);
        let answer = self.scheduler.add(SequenceSpec {
            samples: ids.iter().map(|&id| SeqId(id as u64)).collect(),
            prompt: prompt.clone(),
            max_new_tokens: asked.max_new_tokens,
            priority: asked.priority,
            share: Share { tenant: TenantId(asked.tenant), weight: NonZeroU32::MIN.saturating_add(asked.tenant) },
            adapter,
            prompt_logits: asked.prompt_logits,
        });
        assert_eq!(answer.as_ref().err(), expected.as_ref(), "admission of {asked:?}");
        if answer.is_err() {
            self.report.num_refused += 1;
            self.check();
            return answer;
        }
        for (number, &id) in (0..).zip(&ids) {
            self.samples.push(Sample {
                request: request_index,
                number,
                standing: if number == 0 { Standing::Waiting } else { Standing::Pending },
                generated: Vec::new(),
                num_computed_tokens: 0,
                blocks: Vec::new(),
                is_held: false,
            });
            self.live.push(id);
        }
        let (turn, charged) = self.take_turn(&asked);
        self.requests.push(Request {
            turn,
            charged,
            asked,
            prompt,
            adapter,
            samples: ids,
            num_prompt_rows: 0,
            was_scheduled: false,
            first_step: self.report.num_steps,
        });
        self.report.num_accepted += 1;
        self.check();
        Ok(())
    }

    /// The turn of a request that was taken, and what it is charged.
    fn take_turn(&mut self, asked: &ClientRequest) -> (u64, u64) {
        let fresh = Tenant { next: 0, last: 0, num_answers: 1, num_tokens: 128 };
        let tenant = self.tenants.entry(asked.tenant).or_insert(fresh);
        if tenant.num_answers >= 64 {
            (tenant.num_answers, tenant.num_tokens) = (tenant.num_answers / 2, tenant.num_tokens / 2);
        }
        let guess = (tenant.num_tokens / tenant.num_answers).min(asked.max_new_tokens as u64);
        let charged = counted(asked.tenant, asked.num_prompt_tokens, guess * asked.num_samples as u64);
        tenant.last = [tenant.next, tenant.last, self.virtual_time].into_iter().max().unwrap_or(0);
        tenant.next = tenant.last + charged;
        (tenant.last, charged)
    }

    /// A request whose samples are all gone: its tenant pays what was computed.
    fn settle(&mut self, request: usize) {
        let Request { asked, samples, charged, was_scheduled, .. } = &self.requests[request];
        let num_new_tokens: usize = samples.iter().map(|&at| self.samples[at].generated.len()).sum();
        let num_prompt_tokens = if *was_scheduled { asked.num_prompt_tokens } else { 0 };
        if let Some(tenant) = self.tenants.get_mut(&asked.tenant) {
            tenant.next = tenant.next + counted(asked.tenant, num_prompt_tokens, num_new_tokens as u64) - charged;
            if num_new_tokens > 0 {
                tenant.num_answers += samples.len() as u64;
                tenant.num_tokens += num_new_tokens as u64;
            }
        }
        if self.live.is_empty() {
            let highest = self.tenants.values().map(|tenant| tenant.next.max(tenant.last)).max().unwrap_or(0);
            self.virtual_time = self.virtual_time.max(highest);
            self.tenants.values_mut().for_each(|tenant| (tenant.next, tenant.last) = (0, 0));
        }
    }

    fn expected_refusal(&self, asked: &ClientRequest) -> Option<Refusal> {
        let Limits { block_size, num_blocks, max_model_len, max_queued_requests, .. } = *self.scheduler.limits();
        let num_tokens = asked.num_prompt_tokens + asked.max_new_tokens;
        let num_blocks_needed = num_tokens / block_size + usize::from(!num_tokens.is_multiple_of(block_size));
        let num_queued_requests = self.with_standing(Standing::Waiting).count();
        if asked.num_prompt_tokens == 0 {
            Some(Refusal::Invalid { reason: "the prompt is empty" })
        } else if asked.num_samples == 0 {
            Some(Refusal::Invalid { reason: "there are no samples" })
        } else if asked.max_new_tokens == 0 && !asked.prompt_logits {
            Some(Refusal::Invalid { reason: "max_new_tokens is 0 and no prompt logits are wanted" })
        } else if num_tokens > max_model_len {
            Some(Refusal::TooLong { num_tokens, max_model_len })
        } else if num_blocks_needed > num_blocks {
            Some(Refusal::NeverFits { num_blocks_needed, num_blocks })
        } else if num_queued_requests >= max_queued_requests {
            Some(Refusal::QueueFull { num_queued_requests, max_queued_requests })
        } else {
            None
        }
    }

    /// Cancels the n-th live sample, modulo their number; false where there is none.
    pub fn abort_nth(&mut self, n: usize) -> bool {
        if self.live.is_empty() {
            return false;
        }
        self.abort(self.live[n % self.live.len()]);
        self.check();
        true
    }

    /// Holds the n-th live sample, modulo their number, or lets it go on.
    pub fn hold_nth(&mut self, n: usize, is_held: bool) {
        if !self.live.is_empty() {
            self.hold(self.live[n % self.live.len()], is_held);
            self.check();
        }
    }

    /// The n-th live sample, modulo their number, is computed again.
    pub fn recompute_nth(&mut self, n: usize) {
        if self.live.is_empty() {
            return;
        }
        let at = self.live[n % self.live.len()];
        let sample = &mut self.samples[at];
        let has_begun = sample.standing != Standing::Pending && sample.num_computed_tokens > 0;
        assert_eq!(self.scheduler.recompute(SeqId(at as u64)), has_begun, "who has something to forget");
        sample.num_computed_tokens = 0;
        sample.blocks.clear();
        self.check();
    }

    fn hold(&mut self, at: usize, is_held: bool) {
        self.scheduler.hold(SeqId(at as u64), is_held);
        let sample = &mut self.samples[at];
        sample.is_held = is_held && !sample.generated.is_empty();
    }

    fn abort(&mut self, at: usize) {
        assert!(self.scheduler.abort(SeqId(at as u64)), "a live sample can be aborted");
        assert!(!self.scheduler.abort(SeqId(at as u64)), "but once");
        self.report.num_aborted += 1;
        let heir = self.is_carrier(at).then(|| self.pending_siblings(at).next()).flatten();
        if let Some(heir) = heir {
            let Sample { standing, num_computed_tokens, ref mut blocks, .. } = self.samples[at];
            let blocks = std::mem::take(blocks);
            let sample = &mut self.samples[heir];
            (sample.standing, sample.num_computed_tokens, sample.blocks) = (standing, num_computed_tokens, blocks);
        }
        self.bury(at);
    }

    fn bury(&mut self, at: usize) {
        let sample = &mut self.samples[at];
        sample.standing = Standing::Gone;
        sample.blocks.clear();
        self.live.retain(|&live| live != at);
        let request = self.samples[at].request;
        if self.requests[request].samples.iter().all(|&at| self.samples[at].standing == Standing::Gone) {
            self.settle(request);
        }
    }

    /// It computes a prompt that siblings wait for.
    fn is_carrier(&self, at: usize) -> bool {
        !matches!(self.samples[at].standing, Standing::Pending | Standing::Gone)
            && self.pending_siblings(at).next().is_some()
    }

    fn pending_siblings(&self, at: usize) -> impl Iterator<Item = usize> {
        let siblings = &self.requests[self.samples[at].request].samples;
        siblings.iter().copied().filter(|&sibling| self.samples[sibling].standing == Standing::Pending)
    }

    fn with_standing(&self, standing: Standing) -> impl Iterator<Item = usize> {
        self.live.iter().copied().filter(move |&at| self.samples[at].standing == standing)
    }

    fn known_tokens(&self, at: usize) -> Vec<TokenId> {
        let sample = &self.samples[at];
        [&self.requests[sample.request].prompt[..], &sample.generated[..]].concat()
    }

    fn num_uncomputed_tokens(&self, at: usize) -> usize {
        self.known_tokens(at).len() - self.samples[at].num_computed_tokens
    }

    /// A held one stops short of the token it would be sampled after.
    fn num_wanted_tokens(&self, at: usize) -> usize {
        self.num_uncomputed_tokens(at) - usize::from(self.samples[at].is_held)
    }

    /// The world's order: priority, its tenant's turn, arrival, sample.
    fn order(&self, at: usize) -> (i32, u64, usize, u32) {
        let sample = &self.samples[at];
        let request = &self.requests[sample.request];
        (request.asked.priority, request.turn, sample.request, sample.number)
    }

    /// One step: plan, compute in the fake memory, commit or fail. Everything about it is checked.
    pub fn step(&mut self, fate: &StepFate) {
        let mut plan = std::mem::take(&mut self.plan);
        let (short, limit) = fate.pace.unwrap_or((usize::MAX, usize::MAX));
        self.scheduler.plan(&Pace { short, limit: &|_| limit }, &mut plan);
        self.report.num_steps += 1;
        self.report.num_computed_tokens += plan.num_batched_tokens();
        self.hash_plan(&plan);
        if self.live.iter().all(|&at| !self.samples[at].is_held) {
            assert!(plan.is_empty() != self.has_work(), "a plan is empty where nobody is alive, and only there");
        }
        assert!(plan.samples.iter().all(|id| !self.samples[id.0 as usize].is_held), "who is held is not sampled");
        self.check_policy(&plan, fate);
        self.take_over_plan(&plan);
        self.check_books();
        if fate.has_failed {
            self.spoil(&plan);
        } else {
            self.compute(&plan);
        }

        // Who a planned sequence is by now: an heir of its prompt, or nobody.
        let mut planned: Vec<Option<usize>> = plan.sequences.iter().map(|one| Some(one.id.0 as usize)).collect();
        for &n in &fate.aborted {
            if self.live.is_empty() {
                break;
            }
            let at = self.live[n % self.live.len()];
            let heir = self.is_carrier(at).then(|| self.pending_siblings(at).next()).flatten();
            self.abort(at);
            for one in &mut planned {
                if *one == Some(at) {
                    *one = heir;
                }
            }
        }
        if fate.has_failed {
            self.fail(&plan, &planned);
        } else {
            self.commit(&plan, &planned);
        }
        self.check();
        self.plan = plan;
    }

    fn hash_plan(&mut self, plan: &StepPlan) {
        let mut hash = self.report.plans_hash;
        let mut add = |value: u64| hash = mix(hash ^ value);
        plan.tokens.iter().for_each(|token| add(u64::from(token.0)));
        plan.slots.iter().for_each(|slot| add(u64::from(slot.0)));
        plan.sequences.iter().for_each(|one| add(one.id.0));
        plan.preempted.iter().for_each(|id| add(id.0));
        plan.copies.iter().for_each(|copy| add(u64::from(copy.source.0) << 32 | u64::from(copy.target.0)));
        self.report.plans_hash = hash;
    }

    /// The rules of who runs, each recomputed from the world's own books as they stood before the plan.
    fn check_policy(&self, plan: &StepPlan, fate: &StepFate) {
        let limits = self.scheduler.limits().clone();
        let is_planned = |at: usize| plan.sequences.iter().any(|one| one.id.0 as usize == at);
        let was_preempted_now = |at: usize| plan.preempted.contains(&SeqId(at as u64));
        let running: Vec<usize> = self
            .with_standing(Standing::Running)
            .chain(plan.sequences.iter().map(|one| one.id.0 as usize))
            .filter(|&at| !was_preempted_now(at))
            .collect::<BTreeSet<usize>>()
            .into_iter()
            .collect();

        assert!(plan.num_batched_tokens() <= limits.max_num_batched_tokens, "the token budget");
        assert!(plan.sequences.len() <= limits.max_num_seqs, "the seats");
        for id in &plan.preempted {
            let at = id.0 as usize;
            assert!(self.samples[at].standing == Standing::Running, "only a running one gives way: {id:?}");
            assert!(!is_planned(at), "one that gave way is not planned: {id:?}");
            for &other in &running {
                assert!(self.order(other) < self.order(at), "{id:?} gave way before the later {other}");
            }
        }
        let wanting = || running.iter().copied().filter(|&at| self.num_wanted_tokens(at) > 0);
        if let Some(first) = wanting().min_by_key(|&at| self.order(at)) {
            let comes_after_a_held = running.iter().any(|&at| self.order(at) < self.order(first));
            let is_excused = comes_after_a_held && self.scheduler.stats().num_free_blocks == 0;
            assert!(is_planned(first) || is_excused, "the first in order, {first}, is planned");
        }
        for id in &plan.first_scheduled {
            let at = id.0 as usize;
            let request = &self.requests[self.samples[at].request];
            assert!(is_planned(at) && !request.was_scheduled, "{id:?} is first scheduled once");
            for preempted in self.with_standing(Standing::Preempted).filter(|&other| !is_planned(other)) {
                let passed = &self.requests[self.samples[preempted].request];
                assert!(request.asked.priority < passed.asked.priority, "{id:?} passed the preempted {preempted}");
            }
        }
        // Where neither blocks nor seats were short, the tokens went as they should. (One that starts ahead of running
        // ones finds the tokens shared out and takes what it gets; its turn is the next step.)
        let is_short = !plan.preempted.is_empty() || self.scheduler.stats().num_free_blocks == 0;
        let last = self.with_standing(Standing::Running).map(|at| self.order(at)).max();
        let has_late = running.iter().any(|&at| {
            self.samples[at].standing != Standing::Running && last.is_some_and(|last| self.order(at) < last)
        });
        if !is_short && !has_late && wanting().count() <= limits.max_num_seqs {
            self.check_tokens(plan, &running, fate);
        }
    }

    /// No token of the budget is wasted; decodes come first; a prompt that does not end is passed by prompts that do.
    fn check_tokens(&self, plan: &StepPlan, running: &[usize], fate: &StepFate) {
        let num_planned =
            |at: usize| plan.sequences.iter().find(|one| one.id.0 as usize == at).map_or(0, |one| one.tokens.len());
        let ends = |at: usize| num_planned(at) == self.num_wanted_tokens(at);
        let is_decode =
            |at: usize| self.samples[at].standing == Standing::Running && self.num_uncomputed_tokens(at) == 1;
        let (short, limit) = fate.pace.unwrap_or((usize::MAX, usize::MAX));
        let would_be_long = |at: &usize| self.num_wanted_tokens(*at) > short.max(1);
        let queued = self.with_standing(Standing::Waiting).chain(self.with_standing(Standing::Preempted));
        let best = running.iter().copied().chain(queued).filter(would_be_long).map(|at| self.order(at).0).min();
        let holds_back = |at: usize| best.is_some_and(|best| self.order(at).0 <= best);
        let is_paced = running.iter().any(|&at| is_decode(at) && num_planned(at) > 0 && holds_back(at));
        let (short, limit) = if is_paced { (short, limit) } else { (usize::MAX, usize::MAX) };
        let is_long = |at: usize| self.num_wanted_tokens(at) > short.max(1);
        let wanted = |is_of: &dyn Fn(usize) -> bool| -> usize {
            running.iter().filter(|&&at| is_of(at)).map(|&at| self.num_wanted_tokens(at)).sum()
        };
        let num_long = wanted(&is_long).min(limit.max(1));
        let num_expected = self.scheduler.limits().max_num_batched_tokens.min(wanted(&|at| !is_long(at)) + num_long);
        // One that comes back, or before others, has a token of its own; two have two at least.
        let num_new = plan.sequences.iter().filter(|one| is_long(one.id.0 as usize) && one.tokens.len() == 1).count();
        let num_planned_tokens = plan.num_batched_tokens();
        assert!(
            (num_expected..=num_expected + num_new).contains(&num_planned_tokens),
            "no token of the budget is wasted: {num_planned_tokens} of {num_expected}"
        );
        let is_better = |at: usize, other: usize| self.order(at).0 < self.order(other).0;
        let first =
            running.iter().copied().filter(|&at| self.num_wanted_tokens(at) > 0).min_by_key(|&at| self.order(at));
        for &at in running.iter().filter(|&&at| !ends(at) && !is_long(at)) {
            for other in plan.sequences.iter().map(|one| one.id.0 as usize) {
                if is_decode(at) {
                    assert!(self.order(other) < self.order(at), "{other} got a token before {at}, which needs one");
                    let is_first = Some(other) == first && num_planned(other) == 1;
                    assert!(is_decode(other) || is_first || is_better(other, at), "{other} has tokens before {at}");
                } else if self.order(other) > self.order(at) {
                    // A long one that came back may have had its part before.
                    assert!(ends(other) || is_long(other), "{other} passed the longer {at}, but does not end");
                }
            }
        }
    }

    /// The books after the plan: who runs, who gave way, who holds which blocks.
    fn take_over_plan(&mut self, plan: &StepPlan) {
        for id in &plan.preempted {
            let sample = &mut self.samples[id.0 as usize];
            sample.standing = Standing::Preempted;
            sample.num_computed_tokens = 0;
            sample.blocks.clear();
        }
        let mut first_scheduled = Vec::new();
        for one in &plan.sequences {
            let at = one.id.0 as usize;
            let num_uncomputed_tokens = self.num_uncomputed_tokens(at);
            let sample = &mut self.samples[at];
            assert!(
                matches!(sample.standing, Standing::Waiting | Standing::Running | Standing::Preempted),
                "{at} cannot run: {:?}",
                sample.standing
            );
            sample.standing = Standing::Running;
            sample.blocks.clear();
            sample.blocks.extend_from_slice(&plan.block_tables[one.block_table.clone()]);
            let sample = &self.samples[at];
            let request = &self.requests[sample.request];
            if !request.was_scheduled {
                first_scheduled.push(one.id);
            }
            let end = one.num_computed_tokens + one.tokens.len();
            assert_eq!(one.num_computed_tokens, sample.num_computed_tokens, "{at} goes on where it was");
            assert_eq!(plan.tokens[one.tokens.clone()], self.known_tokens(at)[one.num_computed_tokens..end], "of {at}");
            assert_eq!(one.adapter, request.adapter, "of {at}");
            let num_known_tokens = self.known_tokens(at).len();
            assert_eq!(
                (one.num_prompt_tokens, one.num_known_tokens),
                (request.prompt.len(), num_known_tokens),
                "of {at}"
            );

            let samples = plan.samples[one.samples.clone()].iter().map(|id| id.0 as usize);
            let expected = std::iter::once(at).chain(self.pending_siblings(at));
            let ends = one.tokens.len() == num_uncomputed_tokens && request.asked.max_new_tokens > 0;
            assert!(samples.eq(expected.filter(|_| ends)), "who samples from {at}");
            let num_rows = request.num_prompt_rows;
            let wants_rows = request.asked.prompt_logits && num_rows < end && num_rows < request.prompt.len();
            let expected = match (wants_rows, ends) {
                (true, _) => LogitsWanted::All { first_row: num_rows - one.num_computed_tokens.min(num_rows) },
                (false, true) => LogitsWanted::Last,
                (false, false) => LogitsWanted::None,
            };
            assert_eq!(one.logits, expected, "of {at}, {num_rows} prompt rows have come");
        }
        first_scheduled.sort_unstable();
        let mut told = plan.first_scheduled.clone();
        told.sort_unstable();
        assert_eq!(told, first_scheduled, "who is scheduled for the first time");
        for id in told {
            let request = self.samples[id.0 as usize].request;
            self.requests[request].was_scheduled = true;
            self.virtual_time = self.virtual_time.max(self.requests[request].turn);
        }
    }

    fn slot(&self, table: &[BlockId], position: usize) -> usize {
        let block_size = self.scheduler.limits().block_size;
        table[position / block_size].0 as usize * block_size + position % block_size
    }

    fn copy_blocks(&mut self, plan: &StepPlan) {
        let block_size = self.scheduler.limits().block_size;
        // Last first: their order must not matter.
        for copy in plan.copies.iter().rev() {
            let source = copy.source.0 as usize * block_size;
            self.memory.copy_within(source..source + block_size, copy.target.0 as usize * block_size);
        }
    }

    /// The fake model; then every scheduled sequence must read back its whole history.
    fn compute(&mut self, plan: &StepPlan) {
        self.copy_blocks(plan);
        for one in &plan.sequences {
            let table = &plan.block_tables[one.block_table.clone()];
            for at in one.tokens.clone() {
                let position = plan.positions[at] as usize;
                let before = if position == 0 { 0 } else { self.memory[self.slot(table, position - 1)] };
                self.memory[plan.slots[at].0 as usize] = value_of(before, plan.tokens[at]);
            }
        }
        for one in &plan.sequences {
            let table = &plan.block_tables[one.block_table.clone()];
            let end = one.num_computed_tokens + one.tokens.len();
            let read: Vec<u64> = (0..end).map(|position| self.memory[self.slot(table, position)]).collect();
            let known = self.known_tokens(one.id.0 as usize);
            assert_eq!(read, values_of(&known[..end]), "{:?} reads back its history", one.id);
        }
    }

    /// A failed step has written anything anywhere it was allowed to.
    fn spoil(&mut self, plan: &StepPlan) {
        self.copy_blocks(plan);
        for slot in &plan.slots {
            self.memory[slot.0 as usize] = 0xDEAD;
        }
    }

    fn fail(&mut self, plan: &StepPlan, planned: &[Option<usize>]) {
        let mut dropped: Vec<usize> = self.scheduler.fail(plan).into_iter().map(|id| id.0 as usize).collect();
        let mut expected: Vec<usize> =
            planned.iter().flatten().flat_map(|&at| std::iter::once(at).chain(self.pending_siblings(at))).collect();
        dropped.sort_unstable();
        expected.sort_unstable();
        assert_eq!(dropped, expected, "a failed step drops whoever was in it, and nobody else");
        self.report.num_failed += dropped.len();
        for at in dropped {
            self.bury(at);
        }
    }

    fn commit(&mut self, plan: &StepPlan, planned: &[Option<usize>]) {
        let mut sampled = Vec::new();
        let mut scored = Vec::new();
        for (one, &now) in plan.sequences.iter().zip(planned) {
            let Some(at) = now else { continue };
            let end = one.num_computed_tokens + one.tokens.len();
            self.samples[at].num_computed_tokens = end;
            let value = self.memory[plan.slots[one.tokens.end - 1].0 as usize];
            let request_index = self.samples[at].request;
            if let LogitsWanted::All { first_row } = one.logits {
                let request = &mut self.requests[request_index];
                assert_eq!(one.num_computed_tokens + first_row, request.num_prompt_rows, "prompt rows come in order");
                request.num_prompt_rows = end;
                assert!(end <= request.prompt.len(), "rows of the prompt only");
            }
            let request = &self.requests[request_index];
            if end < request.prompt.len() || self.num_uncomputed_tokens(at) > 0 {
                continue;
            }
            assert!(!request.asked.prompt_logits || request.num_prompt_rows == request.prompt.len(), "all rows came");
            let heirs: Vec<usize> = self.pending_siblings(at).collect();
            let table = self.samples[at].blocks.clone();
            for &heir in &heirs {
                self.samples[heir].num_computed_tokens = end;
                self.samples[heir].blocks.clone_from(&table);
                self.samples[heir].standing = Standing::Running;
            }
            for sample_at in std::iter::once(at).chain(heirs) {
                let asked = &self.requests[request_index].asked;
                if asked.max_new_tokens == 0 {
                    scored.push(sample_at);
                    continue;
                }
                let sample = &mut self.samples[sample_at];
                let token = sampled_from(value, sample.number);
                sample.generated.push(token);
                let finished = sample.generated.len() >= asked.num_new_tokens;
                sampled.push(Sampled { id: SeqId(sample_at as u64), token, finished });
            }
        }
        // The order in which tokens are handed over must not matter, and late ones for the dead do no harm.
        if self.report.num_steps.is_multiple_of(2) {
            sampled.reverse();
        }
        for id in &plan.samples {
            if self.samples[id.0 as usize].standing == Standing::Gone {
                sampled.push(Sampled { id: *id, token: TokenId(0), finished: false });
            }
        }
        let mut ended: Vec<usize> = self.scheduler.commit(plan, &sampled).iter().map(|id| id.0 as usize).collect();
        ended.sort_unstable();
        scored.sort_unstable();
        assert_eq!(ended, scored, "who ends without a token");
        for at in ended {
            self.report.num_finished += 1;
            self.bury(at);
        }
        for one in sampled.iter().filter(|one| one.finished) {
            let at = one.id.0 as usize;
            self.check_alone(at);
            self.report.num_finished += 1;
            self.bury(at);
        }
    }

    /// What a sample drew is what it would have drawn alone.
    fn check_alone(&self, at: usize) {
        let sample = &self.samples[at];
        let request = &self.requests[sample.request];
        let mut tokens = request.prompt.clone();
        let mut value = *values_of(&tokens).last().expect("a prompt has a token");
        for _ in 0..request.asked.num_new_tokens {
            tokens.push(sampled_from(value, sample.number));
            value = value_of(value, tokens[tokens.len() - 1]);
        }
        assert_eq!(sample.generated, tokens[request.prompt.len()..], "{at} drew what it would have drawn alone");
    }

    /// Safety, after every call.
    fn check(&self) {
        self.scheduler.check_invariants();
        assert_eq!(self.scheduler.has_work(), self.has_work());
        self.check_books();
    }

    /// The scheduler's numbers are those that the world counts for itself.
    fn check_books(&self) {
        let stats = self.scheduler.stats();
        let block_size = self.scheduler.limits().block_size;
        let mut num_filled = vec![None; stats.num_blocks];
        for &at in &self.live {
            let sample = &self.samples[at];
            for (n, block) in sample.blocks.iter().enumerate() {
                let filled = sample.num_computed_tokens.saturating_sub(n * block_size).min(block_size);
                let known = num_filled[block.0 as usize].get_or_insert(filled);
                assert_eq!(*known, filled, "{block:?} is one thing to all its holders");
            }
        }
        let num_held = num_filled.iter().flatten().count();
        let num_unused: usize = num_filled.iter().flatten().map(|filled| block_size - filled).sum();
        assert_eq!((stats.num_free_blocks, stats.num_unused_slots), (stats.num_blocks - num_held, num_unused));
        let num_running = self.with_standing(Standing::Running).count();
        let num_queued = self.with_standing(Standing::Waiting).count();
        let num_waiting = num_queued + self.with_standing(Standing::Preempted).count();
        assert_eq!((stats.num_running, stats.num_waiting), (num_running, num_waiting));
        assert_eq!(stats.num_queued_requests, num_queued);
        let requests: BTreeSet<usize> = self.live.iter().map(|&at| self.samples[at].request).collect();
        let running: BTreeSet<usize> =
            self.with_standing(Standing::Running).map(|at| self.samples[at].request).collect();
        assert_eq!(stats.num_running_requests, running.len());
        assert_eq!(stats.num_waiting_requests, requests.len() - running.len());
        if self.live.is_empty() {
            assert_eq!(stats.num_free_blocks, stats.num_blocks, "where nobody is alive, nothing is held");
        }
    }

    /// Liveness: without new requests, and with nobody held, all that was accepted ends.
    pub fn drain(&mut self) {
        for at in self.live.clone() {
            self.hold(at, false);
        }
        let num_steps_max = self.num_steps_max();
        let mut num_steps = 0;
        while self.has_work() {
            assert!(num_steps <= num_steps_max, "{} still live after {num_steps} steps", self.live.len());
            self.step(&StepFate::default());
            num_steps += 1;
        }
        self.step(&StepFate::default());
    }
}
