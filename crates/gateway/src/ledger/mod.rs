//! What every request cost, and the budgets that keep it within bounds.
//!
//! An upstream call is reserved before it is sent ([`Ledger::reserve`]) and settled before its answer's last byte
//! ([`Reservation::settle`]); a local request writes its row in the same way ([`Ledger::record_local`]). All of it goes
//! through the store's group commit, so waiting is for one commit, shared.
//!
//! **Several processes.** Each has an *incarnation* and gives signs of life. A reservation that a dead process left is
//! charged in full: at once when its node starts again (a node id is one process's at a time), after
//! [`lease`](LedgerOptions::lease) by any other node. Nodes' clocks must agree to within half of that. Where a process
//! was thought dead and was not, its settlement still comes and corrects the charge.
//!
//! **Without the store** nothing is reserved, so nothing is sent upstream: [`Ledger::reserve`] fails closed. Whether what runs here
//! goes on is its caller's choice ([`Ledger::trouble`]).
//!
//! **Invariant**: in no budget and at no moment is `spent + reserved` raised above the ceiling by a reservation.

mod bound;
mod budget;
mod costs;
mod entry;
mod operations;
mod price;
mod reservation;

pub use bound::{PromptSize, max_image_tokens, max_prompt_tokens};
pub use budget::{Budget, BudgetScope, MAX_AMOUNT, OverBudget, Period, Standing};
pub use costs::{CostColumn, CostQuery, CostReport, CostRow, MAX_COST_ROWS, costs};
pub use entry::{Call, LedgerRoute, Outcome, RequestStatus, TokenCounts};
pub use operations::Settled;
pub use price::{local_price, share_of_step};
pub use reservation::Reservation;

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures::FutureExt as _;

use crate::{
    clock::UnixMillis,
    money::Money,
    names::NodeId,
    store::{Store, StoreError},
};
use operations::{Beat, Charge, Held, Prune, Record, Release, Reserve, Search};
use reservation::{Later, Leftover, Leftovers};

/// Budgets of one call; more are refused.
pub const MAX_BUDGETS: usize = 8;

/// Reservations of dead processes that are charged in one transaction.
const CHARGE_AT_ONCE: i64 = 200;

/// Old rows deleted in one transaction.
const PRUNE_AT_ONCE: i64 = 2_000;

/// Processes that hold nothing are forgotten after this.
const FORGET_AFTER: Duration = Duration::from_hours(24);

/// Why nothing is reserved or read.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// No room.
    #[error(transparent)]
    OverBudget(Box<OverBudget>),
    /// A budget and no price.
    #[error(
        "the model {model} has no price, and {scope} has a budget: give it one in the upstream's `prices`, or ask for a model that has one"
    )]
    NoPrice {
        /// Which.
        model: String,
        /// Whose budget.
        scope: String,
    },
    /// An amount beyond reason.
    #[error("a call of {model} may cost {amount}, and no call may cost more than {MAX_AMOUNT}; check its price")]
    TooLarge {
        /// Which model.
        model: String,
        /// The upper bound.
        amount: Money,
    },
    /// Too many budgets.
    #[error("a call draws from {0} budgets, and at most {MAX_BUDGETS} are possible; configure fewer")]
    TooManyBudgets(usize),
    /// A day.
    #[error("`{0}` is no day; write it as 2026-11-28")]
    BadDay(String),
    /// CSV.
    #[error("the table cannot be written as CSV: {0}")]
    Csv(String),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How a process takes part.
#[derive(Clone, Debug)]
pub struct LedgerOptions {
    /// This process's node. No two processes that run have the same.
    pub node: NodeId,
    /// Between two signs of life.
    pub beat_every: Duration,
    /// Without one for so long, a process counts as dead. Several times `beat_every`.
    pub lease: Duration,
    /// Rows of requests older than this are deleted; none: never.
    pub keep: Option<Duration>,
    /// Who is told of the calls of dead processes that are charged.
    pub when_orphaned: Option<WhenOrphaned>,
}

/// A call whose process ended before anybody settled it: something has left, and no other record of it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orphan {
    /// Of its reservation.
    pub id: String,
    /// When it was made.
    pub at: UnixMillis,
    /// Whose.
    pub tenant: String,
    /// The key's id; or a token's issuer and subject.
    pub credential: String,
    /// The model.
    pub model: String,
    /// As `x-bindery-route` says it.
    pub route: String,
}

/// See [`LedgerOptions::when_orphaned`]. Must not wait.
#[derive(Clone)]
pub struct WhenOrphaned(pub Arc<dyn Fn(Orphan) + Send + Sync>);

impl fmt::Debug for WhenOrphaned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WhenOrphaned")
    }
}

/// An upstream call that is to be made.
#[derive(Clone, Debug)]
pub struct ReserveRequest {
    /// Who asks for what.
    pub call: Call,
    /// The most it can cost; none: the model has no price, which is refused where there is a budget.
    pub at_most: Option<Money>,
    /// What it draws from.
    pub budgets: Vec<Budget>,
}

/// For metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LedgerCounts {
    /// Calls that cost more than was reserved.
    pub overruns: u64,
    /// By how much, together.
    pub overrun_nanos: u64,
    /// Calls that were charged in full because nobody settled them.
    pub unsettled: u64,
    /// Calls that wait to be settled, now.
    pub leftovers: u64,
    /// Rows of local requests that were not written and never will be.
    pub lost: u64,
}

/// The ledger. Cheap to clone.
#[derive(Clone)]
pub struct Ledger(Arc<Inner>);

struct Inner {
    store: Store,
    options: LedgerOptions,
    incarnation: String,
    leftovers: Leftovers,
    /// The store's last failure; None: since then it has taken something.
    trouble: Mutex<Option<StoreError>>,
    overruns: AtomicU64,
    overrun_nanos: AtomicU64,
    unsettled: AtomicU64,
}

impl Ledger {
    /// Takes part, and charges what this node's former process left open. [`watch`](Self::watch) does the rest.
    pub async fn open(store: Store, options: LedgerOptions, now: UnixMillis) -> Result<Self, LedgerError> {
        let ledger = Self(Arc::new(Inner {
            store,
            options,
            incarnation: uuid::Uuid::new_v4().to_string(),
            leftovers: Leftovers::default(),
            trouble: Mutex::default(),
            overruns: AtomicU64::new(0),
            overrun_nanos: AtomicU64::new(0),
            unsettled: AtomicU64::new(0),
        }));
        ledger.0.beat(now).await?;
        let node = ledger.0.options.node.to_string();
        ledger.0.charge_orphans(node, now).await?;
        Ok(ledger)
    }

    /// Sets money aside for a call. `Ok` means that it is committed; with anything else nothing may be sent.
    ///
    /// Dropped while it waits, or failed without knowing whether it was committed, the reservation is given back later.
    pub async fn reserve(&self, request: ReserveRequest, now: UnixMillis) -> Result<Reservation, LedgerError> {
        let ReserveRequest { call, at_most, mut budgets } = request;
        if budgets.len() > MAX_BUDGETS {
            return Err(LedgerError::TooManyBudgets(budgets.len()));
        }
        let amount = match (at_most, budgets.first()) {
            (Some(amount), _) if amount > MAX_AMOUNT || amount < Money::ZERO => {
                return Err(LedgerError::TooLarge { model: call.model, amount });
            }
            (Some(amount), _) => amount,
            (None, None) => Money::ZERO,
            (None, Some(budget)) => {
                return Err(LedgerError::NoPrice { model: call.model, scope: budget.scope.to_string() });
            }
        };
        let mut held = Held::new(&self.0.incarnation, &call, now);
        held.amount = amount;
        for budget in &mut budgets {
            budget.ceiling = budget.ceiling.clamp(Money::ZERO, MAX_AMOUNT);
        }
        // One row once: two ceilings over the same money are the lower one.
        budgets.sort_by_key(|budget| (budget.key(now), budget.ceiling));
        budgets.dedup_by_key(|budget| budget.key(now));
        held.budgets = budgets.iter().map(|budget| budget.key(now)).collect();
        let later = Later::new(&self.0, Leftover::Release(Release(held.clone())));
        let reserved = self.0.noting(self.0.store.submit(Reserve { held: held.clone(), budgets }).await)?;
        later.not_needed();
        match reserved {
            Ok(()) => Ok(Reservation::new(Arc::clone(&self.0), held)),
            Err(over) => Err(LedgerError::OverBudget(Box::new(over))),
        }
    }

    /// Writes the row of a request that ran here. To be awaited before the answer's last byte; where it fails, or is
    /// dropped while it waits, it is done later.
    pub async fn record_local(&self, call: &Call, outcome: Outcome, now: UnixMillis) -> Result<(), LedgerError> {
        let record = Arc::new(Record { held: Held::new(&self.0.incarnation, call, now), outcome });
        let later = Later::new(&self.0, Leftover::Record(Arc::clone(&record)));
        self.0.noting(self.0.store.insert(record).await)?;
        later.not_needed();
        Ok(())
    }

    /// Why the store takes no rows at present; None: it does, as far as is known. Housekeeping finds out when that is over.
    pub fn trouble(&self) -> Option<StoreError> {
        self.0.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The same where nobody can wait: in a drop. Housekeeping writes it.
    pub fn record_local_later(&self, call: &Call, outcome: Outcome, now: UnixMillis) {
        let record = Arc::new(Record { held: Held::new(&self.0.incarnation, call, now), outcome });
        self.0.leftovers.push(Leftover::Record(record));
    }

    /// How a budget stands. Reads the store: for people, not for a request's way.
    pub async fn standing(&self, budget: &Budget, now: UnixMillis) -> Result<Standing, LedgerError> {
        standing(&self.0.store, budget, now).await
    }

    /// The least of what is left of some budgets; None where there are none. Reads the store.
    pub async fn least_left(&self, budgets: &[Budget], now: UnixMillis) -> Result<Option<Money>, LedgerError> {
        least_left(&self.0.store, budgets, now).await
    }

    /// For metrics.
    pub fn counts(&self) -> LedgerCounts {
        LedgerCounts {
            overruns: self.0.overruns.load(Relaxed),
            overrun_nanos: self.0.overrun_nanos.load(Relaxed),
            unsettled: self.0.unsettled.load(Relaxed),
            leftovers: self.0.leftovers.len() as u64,
            lost: self.0.leftovers.num_lost(),
        }
    }

    /// One round of housekeeping: what was left over, a sign of life, the reservations of the dead, old rows.
    pub async fn keep_house(&self, now: UnixMillis) -> Result<(), LedgerError> {
        match self.0.clear_leftovers().await {
            // Nothing was asked of it.
            Ok(0) => {}
            done => _ = self.0.noting(done)?,
        }
        self.0.noting(self.0.beat(now).await)?;
        self.0.charge_orphans(String::new(), now).await?;
        if let Some(keep) = self.0.options.keep {
            self.0.store.submit(Prune { before: now.before(keep), max_rows: PRUNE_AT_ONCE }).await?;
        }
        Ok(())
    }

    /// Keeps house until the last clone is gone.
    pub fn watch(&self) {
        tokio::spawn(watch(Arc::downgrade(&self.0), self.0.options.beat_every));
    }

    /// Settles what can be settled before the process ends.
    pub async fn close(&self) -> Result<(), LedgerError> {
        self.0.clear_leftovers().await?;
        Ok(())
    }
}

/// How a budget stands, for who takes no part in the ledger.
pub async fn standing(store: &Store, budget: &Budget, now: UnixMillis) -> Result<Standing, LedgerError> {
    let key = budget.key(now);
    let read = store.read(move |connection| async move { operations::standing(connection, &key).await }.boxed());
    Ok(read.await?)
}

/// [`Ledger::least_left`], for who takes no part in the ledger.
pub async fn least_left(store: &Store, budgets: &[Budget], now: UnixMillis) -> Result<Option<Money>, LedgerError> {
    let mut least: Option<Money> = None;
    for budget in budgets {
        let left = budget.left(&standing(store, budget, now).await?);
        least = Some(least.map_or(left, |least| least.min(left)));
    }
    Ok(least)
}

impl Inner {
    /// Remembers how the store did. What it refuses of one statement alone says nothing of the next.
    fn noting<T>(&self, done: Result<T, StoreError>) -> Result<T, StoreError> {
        let trouble = match &done {
            Err(StoreError::Statement { .. }) => return done,
            Err(error) => Some(error.clone()),
            Ok(_) => None,
        };
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
        done
    }

    async fn beat(&self, now: UnixMillis) -> Result<(), StoreError> {
        let beat = Beat {
            incarnation: self.incarnation.clone(),
            node: self.options.node.to_string(),
            now,
            forget_before: now.before(FORGET_AFTER.max(self.options.lease)),
        };
        self.store.submit(beat).await
    }

    /// Charges the open reservations of dead processes, and of `node`'s former ones.
    async fn charge_orphans(&self, node: String, now: UnixMillis) -> Result<(), StoreError> {
        let search = Search {
            incarnation: self.incarnation.clone(),
            node,
            seen_before: now.before(self.options.lease),
            max_rows: CHARGE_AT_ONCE,
        };
        loop {
            let one = search.clone();
            let read =
                self.store.read(move |connection| async move { operations::orphans(connection, &one).await }.boxed());
            let held = read.await?;
            if held.is_empty() {
                return Ok(());
            }
            // Each round ends what it found, or another process did: this ends.
            let charged = self.store.submit(Charge { held }).await?;
            self.note_charge(&charged);
            if let Some(WhenOrphaned(tell)) = &self.options.when_orphaned {
                for held in charged {
                    tell(held.into_orphan());
                }
            }
        }
    }

    fn note_charge(&self, charged: &[Held]) {
        if !charged.is_empty() {
            self.unsettled.fetch_add(charged.len() as u64, Relaxed);
            let sum = charged.iter().fold(Money::ZERO, |sum, held| sum.saturating_add(held.amount));
            tracing::warn!(calls = charged.len(), %sum, "calls that nobody settled were charged in full");
        }
    }

    fn note_overrun(&self, held: &Held, Settled { overrun }: Settled) {
        if overrun > Money::ZERO {
            self.overruns.fetch_add(1, Relaxed);
            self.overrun_nanos.fetch_add(overrun.nanos().unsigned_abs(), Relaxed);
            tracing::warn!(call = %held.id, tenant = %held.tenant, model = %held.model, reserved = %held.amount, %overrun,
                "a call cost more than was reserved; it is charged in full");
        }
    }
}

async fn watch(ledger: Weak<Inner>, every: Duration) {
    let mut ticks = tokio::time::interval(every.max(Duration::from_millis(1)));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut is_reachable = true;
    let Some(arrived) = ledger.upgrade().map(|inner| Arc::clone(&inner.leftovers.arrived)) else { return };
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            // While the store does not answer, what arrives waits for the tick.
            () = arrived.notified(), if is_reachable => {}
        }
        let Some(inner) = ledger.upgrade() else { return };
        match Ledger(inner).keep_house(UnixMillis::now()).await {
            Ok(()) => is_reachable = true,
            Err(error) if is_reachable => {
                is_reachable = false;
                tracing::warn!(%error, "the ledger's housekeeping failed and is tried again");
            }
            Err(_) => {}
        }
    }
}
