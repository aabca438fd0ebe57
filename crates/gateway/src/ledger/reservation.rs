//! Money that is set aside for one call, and what becomes of it when nobody says what the call cost.
//!
//! ```text
//! reserve ─► held ──► mark_sent ──► settle          what it cost
//!              │           └─ dropped ────────────► charged in full: it may have cost that
//!              └─ release, or dropped ────────────► given back: nothing was sent
//! ```
//! Work that cannot wait for the store (a drop) or that the store failed (a settlement during an outage) goes to the
//! *leftovers*, a bounded list that the ledger's housekeeping sends again. What does not fit there stays reserved and is
//! charged in full when the next process starts: never is less counted than was spent.
//!
//! **Invariant**: a reservation that exists is committed in the store.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    Inner, LedgerError,
    entry::Outcome,
    operations::{Charge, Held, Record, Release, Settle, Settled},
};
use crate::{money::Money, store::StoreError};

/// At it, leftovers are dropped: they stay reserved until a process starts.
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
    Record(Record),
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
    /// Rung when something arrives.
    pub(super) arrived: Arc<tokio::sync::Notify>,
}

impl Leftovers {
    pub(super) fn push(&self, work: Leftover) {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        if list.len() >= MAX_LEFTOVERS {
            tracing::error!(
                limit = MAX_LEFTOVERS,
                "too many calls wait to be settled; one stays reserved until the next start"
            );
            return;
        }
        list.push_back(work);
        drop(list);
        self.arrived.notify_one();
    }

    pub(super) fn len(&self) -> usize {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn pop(&self) -> Option<Leftover> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn put_back(&self, work: Leftover) {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).push_front(work);
    }
}

impl Inner {
    /// Does what is left over, in order, until the store fails.
    pub(super) async fn clear_leftovers(&self) -> Result<(), StoreError> {
        // What arrives meanwhile is for the next time, so this ends.
        for _ in 0..self.leftovers.len() {
            let Some(work) = self.leftovers.pop() else { break };
            // Put back where this future is dropped while it waits, too: each of these may be done twice.
            let done = match &work {
                Leftover::Release(release) => self.store.submit(release.clone()).await,
                Leftover::Settle(settle) => {
                    self.store.submit(settle.clone()).await.map(|settled| self.note_overrun(&settle.held, settled))
                }
                Leftover::Record(record) => self.store.submit(record.clone()).await,
                Leftover::Charge(charge) => {
                    self.store.submit(charge.clone()).await.map(|charged| self.note_charge(charged))
                }
            };
            match done {
                Ok(()) => {}
                Err(error @ StoreError::Statement { .. }) => {
                    tracing::error!(%error, "a call cannot be settled; it stays reserved until the next start");
                }
                Err(error) => {
                    self.leftovers.put_back(work);
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}
