//! Weighted fair shares: when a tenant's next request would have had its turn, had every tenant a machine of its own.
//!
//! Start-time fair queueing (Goyal, Vin and Cheng, 1996) over the cost measure of virtual token counters (Sheng et al., "Fairness in
//! Serving Large Language Models", OSDI 2024): a prompt token costs 1, a generated one 2. A request's turn is the later of its
//! tenant's counter and the virtual time (the latest turn of all that ever ran), and the counter moves on by its cost over the
//! tenant's weight. So who has had less than its share comes first, an idle tenant saves nothing up, and with one tenant
//! turns only say again who came first.
//!
//! How long an answer becomes is not known when its request comes, and turns do not change, since the order must not change under
//! the lists that are sorted by it. So the length is guessed from the tenant's answers so far, and what a guess was wrong
//! by moves the counter when the request ends: its next requests pay or are paid back.
//!
//! Invariants: a tenant's turns never fall, so its own requests keep their order; a waiting request is passed by finitely many
//! later ones, since every tenant's turns grow past its own; in which order a step's requests end changes nothing. Four
//! numbers are kept of each tenant that ever asked; whoever makes ids up bounds how many there are.

use std::num::NonZeroU32;

use rustc_hash::FxHashMap;

use crate::ids::TenantId;

/// Virtual units of one token at weight 1: what weights divide.
const UNITS_PER_TOKEN: u64 = 1 << 16;
/// A generated token, in prompt tokens.
const GENERATED_COST: u64 = 2;
/// What an answer's length is guessed to be where a tenant has had none.
const FIRST_GUESS: u64 = 128;
/// Answers that the guess looks back on, more or less: from here on old ones count half.
const MAX_ANSWERS: u64 = 64;

/// Whose a request is, and how much of the machine it may claim beside others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Requests of one tenant share its claim.
    pub tenant: TenantId,
    /// Two tenants that both always have requests waiting get tokens in proportion to their weights.
    pub weight: NonZeroU32,
}

impl Default for Share {
    /// Everyone is one tenant, where nobody tells them apart.
    fn default() -> Self {
        Self { tenant: TenantId(0), weight: NonZeroU32::MIN }
    }
}

/// What a request was charged when it came, and what it turned out to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Charge {
    share: Share,
    /// By the guess, in prompt tokens.
    cost: u64,
    num_samples: usize,
    /// 0 until it runs.
    pub(crate) num_prompt_tokens: usize,
    /// In all of its samples.
    pub(crate) num_generated: u64,
}

#[derive(Clone, Copy, Debug)]
struct Tenant {
    /// Where its next request starts.
    next: u64,
    /// The last turn it was given.
    last: u64,
    /// Answers it had, and tokens in them.
    num_answers: u64,
    num_tokens: u64,
}

/// All tenants' counters.
#[derive(Debug, Default)]
pub(crate) struct FairShares {
    tenants: FxHashMap<TenantId, Tenant>,
    virtual_time: u64,
}

impl FairShares {
    /// The turn of a request that comes now, and what it is charged.
    pub(crate) fn admit(
        &mut self,
        share: Share,
        num_prompt: usize,
        max_new: usize,
        num_samples: usize,
    ) -> (u64, Charge) {
        let fresh = Tenant { next: 0, last: 0, num_answers: 1, num_tokens: FIRST_GUESS };
        let tenant = self.tenants.entry(share.tenant).or_insert(fresh);
        if tenant.num_answers >= MAX_ANSWERS {
            tenant.num_answers /= 2;
            tenant.num_tokens /= 2;
        }
        let num_guessed = (tenant.num_tokens / tenant.num_answers).min(max_new as u64) * num_samples as u64;
        let cost = cost(num_prompt, num_guessed);
        let charge = Charge { share, cost, num_samples, num_prompt_tokens: 0, num_generated: 0 };
        let turn = tenant.next.max(self.virtual_time).max(tenant.last);
        tenant.last = turn;
        tenant.next = turn.saturating_add(units(charge.cost, share));
        (turn, charge)
    }

    /// A request with this turn runs for the first time.
    pub(crate) fn start(&mut self, turn: u64) {
        self.virtual_time = self.virtual_time.max(turn);
    }

    /// A request is gone: its tenant pays for what was computed and for no more.
    pub(crate) fn settle(&mut self, charge: Charge) {
        let Charge { share, cost: charged, num_samples, num_prompt_tokens, num_generated } = charge;
        let Some(tenant) = self.tenants.get_mut(&share.tenant) else { return };
        let actual = cost(num_prompt_tokens, num_generated);
        tenant.next = tenant.next.saturating_add(units(actual, share)).saturating_sub(units(charged, share));
        if num_generated > 0 {
            tenant.num_answers += num_samples as u64;
            tenant.num_tokens += num_generated;
        }
    }

    /// Nobody is alive: all begin alike.
    pub(crate) fn clear(&mut self) {
        let highest = self.tenants.values().map(|tenant| tenant.next.max(tenant.last)).max();
        self.virtual_time = self.virtual_time.max(highest.unwrap_or(0));
        for tenant in self.tenants.values_mut() {
            (tenant.next, tenant.last) = (0, 0);
        }
    }
}

fn cost(num_prompt: usize, num_generated: u64) -> u64 {
    num_prompt as u64 + GENERATED_COST * num_generated
}

fn units(cost: u64, share: Share) -> u64 {
    cost.saturating_mul(UNITS_PER_TOKEN) / u64::from(share.weight.get())
}
