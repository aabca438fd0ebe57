//! A call upstream from its reservation to its settlement.
//!
//! Knows what a call may cost and what came of it; it must not know what was asked, nor how it travels. Invariant: money set
//! aside for a call that was sent is settled or charged in full, by its drop at the latest.

use std::sync::{Arc, Mutex, PoisonError};

use chrono::{DateTime, Utc};

use super::meters::CallMeter;
use crate::{
    audit::record::ModelUsed,
    clock::UnixMillis,
    guardrails::Verdict,
    ledger::{Outcome, RequestStatus, Reservation, TokenCounts},
    money::Money,
    providers::{self, Usage, catalogue::Cost, error::Spent},
    upstream::Departure,
};

/// What is known of an exchange's end, by the last call that knew. Its stream and the exchange itself may drop in any order.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    /// What was found in an answer that was left in the middle.
    pub(super) verdicts: Vec<Verdict>,
    pub(super) model: ModelUsed,
    pub(super) to: String,
    pub(super) usage: Usage,
    /// None: it is under way.
    pub(super) outcome: Option<String>,
}

pub(super) type SharedTold = Arc<Mutex<Told>>;

/// A call that is under way and is to be settled. Dropped before, it is charged in full unless nothing of it has left: it may have
/// cost that.
pub(super) struct OpenCall {
    pub(super) reservation: Option<Reservation>,
    /// The upstream's name.
    pub(super) to: String,
    pub(super) model: providers::ModelEntry,
    pub(super) at: DateTime<Utc>,
    pub(super) started: UnixMillis,
    /// The most it can use.
    pub(super) bound: Usage,
    /// Whom it is told to; None: nobody, or it is settled.
    pub(super) told: Option<SharedTold>,
    /// None: it is settled.
    pub(super) meter: Option<CallMeter>,
    /// Whether any of it has left.
    pub(super) departure: Departure,
}

impl OpenCall {
    pub(super) fn model_used(&self) -> ModelUsed {
        ModelUsed { name: format!("{}/{}", self.to, self.model.id), ..ModelUsed::default() }
    }

    /// What was used, where it may have been anything.
    pub(super) fn used(&self, spent: &Spent) -> Usage {
        match spent {
            Spent::NotSent | Spent::Nothing => Usage::default(),
            Spent::Known(usage) => **usage,
            Spent::Unknown => self.bound,
        }
    }

    pub(super) async fn settle(&mut self, spent: Spent, status: RequestStatus) {
        self.tell(&spent, status);
        let outcome = self.outcome(&spent, status);
        let Some(reservation) = self.reservation.take() else { return };
        let settled = match spent {
            // No row for what never was a call.
            Spent::NotSent => reservation.release().await,
            Spent::Nothing | Spent::Known(_) | Spent::Unknown => reservation.settle(outcome).await.map(|_| ()),
        };
        if let Err(error) = settled {
            tracing::warn!(%error, "an upstream call's settlement waits for the store");
        }
    }

    /// The same where nobody can wait: in a drop.
    pub(super) fn settle_later(&mut self, spent: &Spent, status: RequestStatus) {
        self.tell(spent, status);
        let outcome = self.outcome(spent, status);
        let Some(reservation) = self.reservation.take() else { return };
        reservation.settle_later(outcome);
    }

    /// What the books are to hold, counted once.
    fn outcome(&mut self, spent: &Spent, status: RequestStatus) -> Outcome {
        let reserved = self.reservation.as_ref().map_or(Money::ZERO, Reservation::amount);
        let price = match spent {
            Spent::NotSent | Spent::Nothing => Money::ZERO,
            Spent::Known(usage) => self.model.price(usage, self.at).map_or(reserved, money),
            Spent::Unknown => reserved,
        };
        let (usage, latency) = (self.used(spent), UnixMillis::now().since(self.started));
        if let Some(meter) = self.meter.take().filter(|_| !matches!(spent, Spent::NotSent)) {
            meter.end(&self.to, outcome_word(status), &usage, price);
        }
        Outcome { status, tokens: counts(&usage), latency, price, reference_price: None }
    }

    fn tell(&mut self, spent: &Spent, status: RequestStatus) {
        let Some(told) = self.told.take() else { return };
        let (model, to, usage) = (self.model_used(), self.to.clone(), self.used(spent));
        let outcome = Some(outcome_word(status).to_owned());
        let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
        let verdicts = std::mem::take(&mut told.verdicts);
        *told = Told { verdicts, model, to, usage, outcome };
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        // Left in the middle of the call: once it has begun to leave, nobody knows how far it came.
        self.settle_later(&self.departure.give_up(), RequestStatus::Cancelled);
    }
}

pub(super) fn outcome_word(status: RequestStatus) -> &'static str {
    match status {
        RequestStatus::Completed => "completed",
        RequestStatus::Cancelled => "cancelled",
        RequestStatus::Failed => "failed",
    }
}

pub(super) fn date(at: UnixMillis) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(at.0).unwrap_or_default()
}

pub(super) fn money(cost: Cost) -> Money {
    Money::from_nanos(i64::try_from(cost.nanodollars()).unwrap_or(i64::MAX))
}

pub(super) fn counts(usage: &Usage) -> TokenCounts {
    TokenCounts {
        num_prompt_tokens: usage.prompt,
        num_cached_tokens: usage.cached,
        num_completion_tokens: usage.completion,
        num_reasoning_tokens: usage.reasoning,
        is_estimated: usage.estimated,
    }
}
