//! Money that is set aside for one call, and what becomes of it when nobody says what the call cost.
//!
//! ```text
//! reserve ─► held ──► mark_sent ──► settle          what it cost
//!              │           └─ dropped ────────────► charged in full: it may have cost that
//!              └─ release, or dropped ────────────► given back: nothing was sent
//! ```
//! Work that cannot wait for the store (a drop) or that the store failed (a settlement during an outage) goes to the
//! *leftovers*, a bounded list that the ledger's housekeeping sends again. What does not fit there stays reserved and is
//! charged in full when the next process starts: never is less counted than was spent. Only rows of local requests, which have no
//! reservation, are lost there; they are counted.
//!
//! **Invariant**: a reservation that exists is committed in the store.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

use super::{
    Inner, LedgerError,
    entry::Outcome,
    operations::{Charge, Held, Record, Release, Settle, Settled},
};
use crate::{money::Money, store::StoreError};

/// At it, leftovers are dropped: they stay reserved until a process starts, or, where nothing was reserved, are lost.
const MAX_LEFTOVERS: usize = 10_000;

/// Money set aside.
#[must_use = "a reservation that drops is given back or charged in full"]
pub struct Reservation {
    ledger: Arc<Inner>,
    held: Held,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Held,
    Sent,
    Done,
}

impl Reservation {
    pub(super) fn new(ledger: Arc<Inner>, held: Held) -> Self {
        Self { ledger, held, stage: Stage::Held }
    }

    /// Of the ledger's row.
    pub fn id(&self) -> &str {
        &self.held.id
    }

    /// How much is set aside.
    pub fn amount(&self) -> Money {
        self.held.amount
    }

    /// To be called before the first byte goes out: from now on the call may cost something.
    pub fn mark_sent(&mut self) {
        self.stage = Stage::Sent;
    }

    /// Says what the call cost; the rest is free again. Committed when this returns `Ok`; where it fails, or is dropped
    /// while it waits, it is done later.
    pub async fn settle(mut self, outcome: Outcome) -> Result<Settled, LedgerError> {
        self.stage = Stage::Done;
        let outcome = Outcome { price: outcome.price.clamp(Money::ZERO, super::MAX_AMOUNT), ..outcome };
        let settle = Settle { held: self.held.clone(), outcome };
        let later = Later::new(&self.ledger, Leftover::Settle(settle.clone()));
        let settled = self.ledger.store.submit(settle).await?;
        later.not_needed();
        self.ledger.note_overrun(&self.held, settled);
        Ok(settled)
    }

    /// The same where nobody can wait: in a drop. The ledger's housekeeping does it.
    pub fn settle_later(mut self, outcome: Outcome) {
        self.stage = Stage::Done;
        let outcome = Outcome { price: outcome.price.clamp(Money::ZERO, super::MAX_AMOUNT), ..outcome };
        self.ledger.leftovers.push(Leftover::Settle(Settle { held: self.held.clone(), outcome }));
    }

    /// Gives it back: nothing was sent.
    pub async fn release(mut self) -> Result<(), LedgerError> {
        self.stage = Stage::Done;
        let release = Release(self.held.clone());
        let later = Later::new(&self.ledger, Leftover::Release(release.clone()));
        self.ledger.store.submit(release).await?;
        later.not_needed();
        Ok(())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let held = || self.held.clone();
        match self.stage {
            Stage::Done => {}
            Stage::Held => self.ledger.leftovers.push(Leftover::Release(Release(held()))),
            Stage::Sent => {
                tracing::warn!(call = %self.held.id, amount = %self.held.amount, "a call ended without a settlement and is charged in full");
                self.ledger.leftovers.push(Leftover::Charge(Charge { held: vec![held()] }));
            }
        }
    }
}

/// Work for later.
pub(super) enum Leftover {
    Release(Release),
    Settle(Settle),
    Charge(Charge),
    Record(Arc<Record>),
}

/// Puts the work among the leftovers unless it turns out to be done.
pub(super) struct Later<'a> {
    ledger: &'a Inner,
    work: Option<Leftover>,
}

impl<'a> Later<'a> {
    pub(super) fn new(ledger: &'a Inner, work: Leftover) -> Self {
        Self { ledger, work: Some(work) }
    }

    pub(super) fn not_needed(mut self) {
        self.work = None;
    }
}

impl Drop for Later<'_> {
    fn drop(&mut self) {
        if let Some(work) = self.work.take() {
            self.ledger.leftovers.push(work);
        }
    }
}

/// The list of work for later.
#[derive(Default)]
pub(super) struct Leftovers {
    list: Mutex<VecDeque<Leftover>>,
    num_taken: AtomicUsize,
    lost: AtomicU64,
    /// Rung when something arrives.
    pub(super) arrived: Arc<tokio::sync::Notify>,
}

impl Leftovers {
    pub(super) fn push(&self, work: Leftover) {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        if list.len() >= MAX_LEFTOVERS {
            self.drop_for_good(&work, &format!("{MAX_LEFTOVERS} wait already"));
            return;
        }
        list.push_back(work);
        drop(list);
        self.arrived.notify_one();
    }

    fn drop_for_good(&self, work: &Leftover, why: &str) {
        if let Leftover::Record(record) = work {
            self.lost.fetch_add(1, Relaxed);
            tracing::error!(call = %record.held.id, tenant = %record.held.tenant, why, "a local request's row is lost");
        } else {
            tracing::error!(why, "a call cannot be settled; it stays reserved until the next start");
        }
    }

    pub(super) fn num_lost(&self) -> u64 {
        self.lost.load(Relaxed)
    }

    pub(super) fn len(&self) -> usize {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.len() + self.num_taken.load(Relaxed)
    }

    fn take(&self) -> Option<Taken<'_>> {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let work = list.pop_front()?;
        // Under the lock, so that nobody sees it nowhere.
        self.num_taken.fetch_add(1, Relaxed);
        drop(list);
        Some(Taken { leftovers: self, work: Some(work) })
    }
}

/// Work that somebody is at. Dropped before it is done, it is the first in the list again: each of these may be done twice.
struct Taken<'a> {
    leftovers: &'a Leftovers,
    /// None: it is done.
    work: Option<Leftover>,
}

impl Taken<'_> {
    fn done(mut self) {
        self.work = None;
    }

    fn drop_for_good(mut self, why: &str) {
        if let Some(work) = self.work.take() {
            self.leftovers.drop_for_good(&work, why);
        }
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut list = self.leftovers.list.lock().unwrap_or_else(PoisonError::into_inner);
        self.leftovers.num_taken.fetch_sub(1, Relaxed);
        if let Some(work) = self.work.take() {
            list.push_front(work);
        }
    }
}

impl Inner {
    /// Does what is left over, in order, until the store fails. How much the store has taken.
    pub(super) async fn clear_leftovers(&self) -> Result<usize, StoreError> {
        let mut num_done = 0;
        // What arrives meanwhile is for the next time, so this ends.
        for _ in 0..self.leftovers.len() {
            let Some(taken) = self.leftovers.take() else { break };
            let Some(work) = &taken.work else { break };
            let done = match work {
                Leftover::Release(release) => self.store.submit(release.clone()).await,
                Leftover::Settle(settle) => {
                    self.store.submit(settle.clone()).await.map(|settled| self.note_overrun(&settle.held, settled))
                }
                Leftover::Record(record) => self.store.insert(Arc::clone(record) as _).await,
                Leftover::Charge(charge) => {
                    self.store.submit(charge.clone()).await.map(|charged| self.note_charge(&charged))
                }
            };
            match done {
                Ok(()) => {
                    taken.done();
                    num_done += 1;
                }
                Err(error @ StoreError::Statement { .. }) => taken.drop_for_good(&error.to_string()),
                Err(error) => return Err(error),
            }
        }
        Ok(num_done)
    }
}
