//! What the ledger does inside the store's transactions.
//!
//! ```text
//! reserve   row in `reservations`, and `reserved` of each budget grows if it stays under its ceiling
//! release   row gone, `reserved` shrinks
//! settle    row gone, `reserved` shrinks, `spent` grows by the price, row in `requests`
//! charge    the same with the whole reservation as the price, marked `unsettled` (nobody said what was used)
//! ```
//! The check and the reservation are one statement, so no two reservers see the same room. Everything is idempotent by
//! the call's id; a settlement that comes after a charge corrects it.
//!
//! **Invariant**: `reserved` of a budget is the sum of the open reservations that name it.

use futures::{FutureExt as _, future::BoxFuture};
use sqlx::{AnyConnection, Row as _, any::AnyRow};

use super::{
    Orphan,
    budget::{Budget, BudgetKey, OverBudget, Standing},
    entry::{Call, Outcome, credential_words},
};
use crate::{
    clock::UnixMillis,
    money::Money,
    store::{self, NewRow, Operation, Table, Value},
};

/// A call with all that its rows say.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) id: String,
    pub(super) incarnation: String,
    pub(super) at: UnixMillis,
    pub(super) tenant: String,
    pub(super) credential: String,
    pub(super) model: String,
    pub(super) adapter: String,
    pub(super) route: String,
    pub(super) amount: Money,
    pub(super) budgets: Vec<BudgetKey>,
}

impl Held {
    pub(super) fn new(incarnation: &str, call: &Call, at: UnixMillis) -> Self {
        Self {
            // In the order of time, so that new rows go to the end of the index and not all over it.
            id: uuid::Uuid::now_v7().to_string(),
            incarnation: incarnation.to_owned(),
            at,
            tenant: call.tenant.to_string(),
            credential: credential_words(&call.credential),
            model: call.model.clone(),
            adapter: call.adapter.clone().unwrap_or_default(),
            route: call.route.to_string(),
            amount: Money::ZERO,
            budgets: Vec::new(),
        }
    }

    fn locks(&self) -> Vec<String> {
        self.budgets.iter().map(BudgetKey::lock).collect()
    }

    pub(super) fn into_orphan(self) -> Orphan {
        let Self { id, at, tenant, credential, model, route, .. } = self;
        Orphan { id, at, tenant, credential, model, route }
    }
}

/// Reserves `held.amount` under all budgets or under none.
#[derive(Clone)]
pub(super) struct Reserve {
    pub(super) held: Held,
    pub(super) budgets: Vec<Budget>,
}

impl Operation for Reserve {
    type Output = Result<(), OverBudget>;

    fn locks(&self) -> Vec<String> {
        self.held.locks()
    }

    fn run<'a>(&'a self, connection: &'a mut AnyConnection) -> BoxFuture<'a, Result<Self::Output, sqlx::Error>> {
        async move {
            let held = &self.held;
            if !insert_reservation(connection, held).await? {
                return Ok(Ok(()));
            }
            for (index, (budget, key)) in self.budgets.iter().zip(&held.budgets).enumerate() {
                if held.amount <= budget.ceiling && grow_reserved(connection, key, held.amount, budget.ceiling).await? {
                    continue;
                }
                for before in &held.budgets[..index] {
                    change_budget(connection, before, Change { spent: 0, reserved: -held.amount.nanos() }).await?;
                }
                delete_reservation(connection, &held.id).await?;
                return Ok(Err(OverBudget {
                    scope: key.scope.clone(),
                    period: key.period.clone(),
                    ceiling: budget.ceiling,
                    standing: standing(connection, key).await?,
                    asked: held.amount,
                    renews_at: budget.per.renews_at(held.at),
                }));
            }
            Ok(Ok(()))
        }
        .boxed()
    }
}

/// Gives a reservation back: nothing was sent.
#[derive(Clone)]
pub(super) struct Release(pub(super) Held);

impl Operation for Release {
    type Output = ();

    fn locks(&self) -> Vec<String> {
        self.0.locks()
    }

    fn run<'a>(&'a self, connection: &'a mut AnyConnection) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        async move {
            if let Some(amount) = delete_reservation(connection, &self.0.id).await? {
                for key in &self.0.budgets {
                    change_budget(connection, key, Change { spent: 0, reserved: -amount }).await?;
                }
            }
            Ok(())
        }
        .boxed()
    }
}

/// What a settlement found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settled {
    /// By how much the price was above the reservation. It is charged in full.
    pub overrun: Money,
}

/// Says what a reserved call cost.
#[derive(Clone)]
pub(super) struct Settle {
    pub(super) held: Held,
    pub(super) outcome: Outcome,
}

impl Operation for Settle {
    type Output = Settled;

    fn locks(&self) -> Vec<String> {
        self.held.locks()
    }

    fn run<'a>(&'a self, connection: &'a mut AnyConnection) -> BoxFuture<'a, Result<Settled, sqlx::Error>> {
        async move {
            let Self { held, outcome } = self;
            let price = outcome.price.nanos();
            let overrun = outcome.price.saturating_sub(held.amount).max(Money::ZERO);
            let open = delete_reservation(connection, &held.id).await?;
            let charged = if open.is_none() { charged_before(connection, &held.id).await? } else { None };
            let change = match (open, charged) {
                (Some(amount), _) => Change { spent: price, reserved: -amount },
                // Already so: a settlement whose answer was lost.
                (None, Some(Charged::Settled)) => return Ok(Settled { overrun }),
                (None, Some(Charged::Unsettled(before))) => {
                    delete_request(connection, &held.id).await?;
                    Change { spent: price - before, reserved: 0 }
                }
                // The reservation never came to be; what was used is owed all the same.
                (None, None) => Change { spent: price, reserved: 0 },
            };
            for key in &held.budgets {
                change_budget(connection, key, change).await?;
            }
            insert_request(connection, Row { held, outcome, settlement: "settled", overrun }).await?;
            Ok(Settled { overrun })
        }
        .boxed()
    }
}

/// A local request's row.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) held: Held,
    pub(super) outcome: Outcome,
}

impl NewRow for Record {
    fn table(&self) -> &'static Table {
        &REQUESTS
    }

    fn values(&self) -> Vec<Value<'_>> {
        let Self { held, outcome } = self;
        Row { held, outcome, settlement: "local", overrun: Money::ZERO }.into_values()
    }
}

/// Charges open reservations in full: those who made them are gone.
#[derive(Clone)]
pub(super) struct Charge {
    pub(super) held: Vec<Held>,
}

impl Operation for Charge {
    /// Those of them that were still open.
    type Output = Vec<Held>;

    fn locks(&self) -> Vec<String> {
        self.held.iter().flat_map(Held::locks).collect()
    }

    fn run<'a>(&'a self, connection: &'a mut AnyConnection) -> BoxFuture<'a, Result<Vec<Held>, sqlx::Error>> {
        async move {
            let mut charged = Vec::new();
            for held in &self.held {
                let Some(amount) = delete_reservation(connection, &held.id).await? else { continue };
                for key in &held.budgets {
                    change_budget(connection, key, Change { spent: amount, reserved: -amount }).await?;
                }
                insert_unsettled(connection, held, amount).await?;
                charged.push(Held { amount: Money::from_nanos(amount), ..held.clone() });
            }
            Ok(charged)
        }
        .boxed()
    }
}

/// A process's sign of life.
#[derive(Clone)]
pub(super) struct Beat {
    pub(super) incarnation: String,
    pub(super) node: String,
    pub(super) now: UnixMillis,
    /// Processes that were last seen before this and hold nothing are forgotten.
    pub(super) forget_before: UnixMillis,
}

impl Operation for Beat {
    type Output = ();

    fn run<'a>(&'a self, connection: &'a mut AnyConnection) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        async move {
            sqlx::query(
                "INSERT INTO processes (incarnation, node, started_at, seen_at) VALUES ($1, $2, $3, $3) \
                 ON CONFLICT (incarnation) DO UPDATE SET seen_at = excluded.seen_at",
            )
            .bind(self.incarnation.clone())
            .bind(self.node.clone())
            .bind(self.now.0)
            .execute(&mut *connection)
            .await?;
            sqlx::query(
                "DELETE FROM processes WHERE seen_at < $1 AND NOT EXISTS \
                 (SELECT 1 FROM reservations WHERE reservations.incarnation = processes.incarnation)",
            )
            .bind(self.forget_before.0)
            .execute(connection)
            .await?;
            Ok(())
        }
        .boxed()
    }
}

/// Deletes old rows, some at a time.
pub(super) struct Prune {
    pub(super) before: UnixMillis,
    pub(super) max_rows: i64,
}

impl Operation for Prune {
    type Output = u64;

    fn run<'a>(&'a self, connection: &'a mut AnyConnection) -> BoxFuture<'a, Result<u64, sqlx::Error>> {
        async move {
            const OLD: &str =
                "DELETE FROM requests WHERE id IN (SELECT id FROM requests WHERE at < $1 ORDER BY at LIMIT $2)";
            let done = sqlx::query(OLD).bind(self.before.0).bind(self.max_rows).execute(&mut *connection).await?;
            // `2026-11` sorts after all days and months before November and before its own days: what goes is what is
            // wholly before the month.
            sqlx::query("DELETE FROM budget_use WHERE period < $1 AND reserved = 0")
                .bind(self.before.month())
                .execute(connection)
                .await?;
            Ok(done.rows_affected())
        }
        .boxed()
    }
}

/// Nano-dollars to add.
#[derive(Clone, Copy)]
struct Change {
    spent: i64,
    reserved: i64,
}

/// False where it is there already.
async fn insert_reservation(connection: &mut AnyConnection, held: &Held) -> Result<bool, sqlx::Error> {
    let done = sqlx::query(
        "INSERT INTO reservations (id, incarnation, at, tenant, credential, model, adapter, route, amount, budgets) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT (id) DO NOTHING",
    )
    .bind(held.id.clone())
    .bind(held.incarnation.clone())
    .bind(held.at.0)
    .bind(held.tenant.clone())
    .bind(held.credential.clone())
    .bind(held.model.clone())
    .bind(held.adapter.clone())
    .bind(held.route.clone())
    .bind(held.amount.nanos())
    .bind(BudgetKey::write_all(&held.budgets))
    .execute(connection)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// The amount of the reservation that is gone now, if it was there.
async fn delete_reservation(connection: &mut AnyConnection, id: &str) -> Result<Option<i64>, sqlx::Error> {
    let row = sqlx::query("DELETE FROM reservations WHERE id = $1 RETURNING amount").bind(id.to_owned());
    row.fetch_optional(connection).await?.map(|row| row.try_get(0)).transpose()
}

/// The check and the reservation in one statement, under the row's lock. False where there is no room. (Where the row is
/// new nothing is compared: the caller has compared the amount with the ceiling.)
async fn grow_reserved(
    connection: &mut AnyConnection,
    key: &BudgetKey,
    amount: Money,
    ceiling: Money,
) -> Result<bool, sqlx::Error> {
    let row = sqlx::query(
        "INSERT INTO budget_use (scope, period, spent, reserved, ceiling) VALUES ($1, $2, 0, $3, $4) \
         ON CONFLICT (scope, period) DO UPDATE \
         SET reserved = budget_use.reserved + excluded.reserved, ceiling = excluded.ceiling \
         WHERE budget_use.spent + budget_use.reserved + excluded.reserved <= excluded.ceiling \
         RETURNING reserved",
    )
    .bind(key.scope.clone())
    .bind(key.period.clone())
    .bind(amount.nanos())
    .bind(ceiling.nanos());
    Ok(row.fetch_optional(connection).await?.is_some())
}

async fn change_budget(connection: &mut AnyConnection, key: &BudgetKey, change: Change) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE budget_use SET spent = spent + $1, reserved = reserved + $2 WHERE scope = $3 AND period = $4")
        .bind(change.spent)
        .bind(change.reserved)
        .bind(key.scope.clone())
        .bind(key.period.clone())
        .execute(connection)
        .await?;
    Ok(())
}

pub(super) async fn standing(connection: &mut AnyConnection, key: &BudgetKey) -> Result<Standing, sqlx::Error> {
    let row = sqlx::query("SELECT spent, reserved FROM budget_use WHERE scope = $1 AND period = $2")
        .bind(key.scope.clone())
        .bind(key.period.clone())
        .fetch_optional(connection)
        .await?;
    let Some(row) = row else { return Ok(Standing::default()) };
    Ok(Standing { spent: Money::from_nanos(row.try_get(0)?), reserved: Money::from_nanos(row.try_get(1)?) })
}

enum Charged {
    Settled,
    Unsettled(i64),
}

async fn charged_before(connection: &mut AnyConnection, id: &str) -> Result<Option<Charged>, sqlx::Error> {
    let row = sqlx::query("SELECT settlement, price FROM requests WHERE id = $1").bind(id.to_owned());
    let Some(row) = row.fetch_optional(connection).await? else { return Ok(None) };
    let settlement: String = row.try_get(0)?;
    Ok(Some(if settlement == "unsettled" { Charged::Unsettled(row.try_get(1)?) } else { Charged::Settled }))
}

async fn delete_request(connection: &mut AnyConnection, id: &str) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM requests WHERE id = $1").bind(id.to_owned()).execute(connection).await?;
    Ok(())
}

#[derive(Clone, Copy)]
struct Row<'a> {
    held: &'a Held,
    outcome: &'a Outcome,
    settlement: &'static str,
    overrun: Money,
}

static REQUESTS: Table = Table::new(
    "requests",
    "id",
    &[
        "id",
        "at",
        "day",
        "tenant",
        "credential",
        "model",
        "adapter",
        "route",
        "status",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "reasoning_tokens",
        "latency_ms",
        "price",
        "reference_price",
        "settlement",
        "overrun",
        "estimated",
    ],
);

impl NewRow for Row<'_> {
    fn table(&self) -> &'static Table {
        &REQUESTS
    }

    fn values(&self) -> Vec<Value<'_>> {
        self.into_values()
    }
}

impl<'a> Row<'a> {
    fn into_values(self) -> Vec<Value<'a>> {
        let Self { held, outcome, settlement, overrun } = self;
        let count = |tokens: u64| i64::try_from(tokens).unwrap_or(i64::MAX).into();
        let tokens = &outcome.tokens;
        vec![
            held.id.as_str().into(),
            held.at.0.into(),
            held.at.day().into(),
            held.tenant.as_str().into(),
            held.credential.as_str().into(),
            held.model.as_str().into(),
            held.adapter.as_str().into(),
            held.route.as_str().into(),
            outcome.status.word().into(),
            count(tokens.num_prompt_tokens),
            count(tokens.num_cached_tokens),
            count(tokens.num_completion_tokens),
            count(tokens.num_reasoning_tokens),
            i64::try_from(outcome.latency.as_millis()).unwrap_or(i64::MAX).into(),
            outcome.price.nanos().into(),
            outcome.reference_price.map(Money::nanos).into(),
            settlement.into(),
            overrun.nanos().into(),
            i64::from(tokens.is_estimated).into(),
        ]
    }
}

async fn insert_request(connection: &mut AnyConnection, row: Row<'_>) -> Result<(), sqlx::Error> {
    store::insert(connection, &[&row]).await
}

async fn insert_unsettled(connection: &mut AnyConnection, held: &Held, amount: i64) -> Result<(), sqlx::Error> {
    let outcome = Outcome {
        status: super::entry::RequestStatus::Failed,
        tokens: super::entry::TokenCounts { is_estimated: true, ..super::entry::TokenCounts::default() },
        latency: std::time::Duration::ZERO,
        price: Money::from_nanos(amount),
        reference_price: None,
    };
    insert_request(connection, Row { held, outcome: &outcome, settlement: "unsettled", overrun: Money::ZERO }).await
}

/// Whose open reservations are looked for.
#[derive(Clone)]
pub(super) struct Search {
    /// This process: its own are left alone.
    pub(super) incarnation: String,
    /// At a process's start: its node, of which it is the only process from now on. Empty: none.
    pub(super) node: String,
    /// Processes that were last seen before this are dead.
    pub(super) seen_before: UnixMillis,
    pub(super) max_rows: i64,
}

/// Open reservations of dead processes.
pub(super) async fn orphans(connection: &mut AnyConnection, search: &Search) -> Result<Vec<Held>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT r.id, r.incarnation, r.at, r.tenant, r.credential, r.model, r.adapter, r.route, r.amount, r.budgets \
         FROM reservations r LEFT JOIN processes p ON p.incarnation = r.incarnation \
         WHERE r.incarnation <> $1 AND (p.incarnation IS NULL OR p.node = $2 OR p.seen_at < $3) ORDER BY r.id LIMIT $4",
    )
    .bind(search.incarnation.clone())
    .bind(search.node.clone())
    .bind(search.seen_before.0)
    .bind(search.max_rows)
    .fetch_all(connection)
    .await?;
    rows.iter().map(held).collect()
}

fn held(row: &AnyRow) -> Result<Held, sqlx::Error> {
    let budgets: String = row.try_get(9)?;
    let unreadable = || sqlx::Error::Decode(format!("reservations.budgets holds `{budgets}`").into());
    Ok(Held {
        id: row.try_get(0)?,
        incarnation: row.try_get(1)?,
        at: UnixMillis(row.try_get(2)?),
        tenant: row.try_get(3)?,
        credential: row.try_get(4)?,
        model: row.try_get(5)?,
        adapter: row.try_get(6)?,
        route: row.try_get(7)?,
        amount: Money::from_nanos(row.try_get(8)?),
        budgets: BudgetKey::read_all(&budgets).ok_or_else(unreadable)?,
    })
}
