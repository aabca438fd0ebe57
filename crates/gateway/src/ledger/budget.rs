//! Budgets: how much money may be spent, by whom, in which day or month (UTC).
//!
//! A budget is a ceiling over `spent + reserved` of one scope in one period. Raising or lowering it acts at the next
//! reservation; what is spent stays spent. Local requests draw from no budget: the machine costs the same whether it is
//! used or not, and a budget limits what leaves the house.
//!
//! **Invariant**: the words that name a budget's row are made here alone, and no two budgets share them.

use std::{fmt, time::Duration};

use crate::{clock::UnixMillis, money::Money, names::TenantId};

/// The largest amount of one reservation, one price and one ceiling: far above any, and no sum of a few overflows.
pub const MAX_AMOUNT: Money = Money::from_nanos(1_000_000_000_000_000_000);

/// Whose money.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BudgetScope {
    /// All upstream calls of a tenant.
    Tenant(TenantId),
    /// All calls of an upstream, whoever asks.
    Upstream(String),
    /// A tenant's calls that would have run locally had there been room.
    Overflow(TenantId),
}

impl fmt::Display for BudgetScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tenant(tenant) => write!(f, "tenant:{tenant}"),
            Self::Upstream(name) => write!(f, "upstream:{name}"),
            Self::Overflow(tenant) => write!(f, "overflow:{tenant}"),
        }
    }
}

/// When it renews.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Period {
    /// At midnight.
    Day,
    /// At midnight before the first.
    Month,
}

impl Period {
    /// `2026-11-28` or `2026-11`.
    pub(super) fn name(self, now: UnixMillis) -> String {
        match self {
            Self::Day => now.day(),
            Self::Month => now.month(),
        }
    }

    pub(super) fn renews_at(self, now: UnixMillis) -> UnixMillis {
        match self {
            Self::Day => now.next_day(),
            Self::Month => now.next_month(),
        }
    }
}

/// A ceiling.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Whose.
    pub scope: BudgetScope,
    /// Of which time.
    pub per: Period,
    /// How much.
    pub ceiling: Money,
}

impl Budget {
    /// What may still be spent and reserved.
    pub fn left(&self, standing: &Standing) -> Money {
        self.ceiling.saturating_sub(standing.spent).saturating_sub(standing.reserved)
    }

    pub(super) fn key(&self, now: UnixMillis) -> BudgetKey {
        BudgetKey { scope: self.scope.to_string(), period: self.per.name(now) }
    }
}

/// The name of a budget's row.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct BudgetKey {
    pub(super) scope: String,
    pub(super) period: String,
}

impl BudgetKey {
    /// What several nodes lock before they change the row.
    pub(super) fn lock(&self) -> String {
        format!("budget {} {}", self.period, self.scope)
    }

    /// As the store keeps the list.
    pub(super) fn write_all(keys: &[Self]) -> String {
        let pairs: Vec<_> = keys.iter().map(|key| (&key.scope, &key.period)).collect();
        serde_json::to_string(&pairs).unwrap_or_else(|_| "[]".to_owned())
    }

    pub(super) fn read_all(text: &str) -> Option<Vec<Self>> {
        let pairs: Vec<(String, String)> = serde_json::from_str(text).ok()?;
        Some(pairs.into_iter().map(|(scope, period)| Self { scope, period }).collect())
    }
}

/// How a budget stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Settled.
    pub spent: Money,
    /// For calls under way.
    pub reserved: Money,
}

/// Why a reservation is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the budget of {scope} for {period} (UTC) is {ceiling}: {} is spent, {} is reserved for calls under way, and this request may \
     cost up to {asked}; {}", .standing.spent, .standing.reserved, self.advice()
)]
pub struct OverBudget {
    /// Whose.
    pub scope: String,
    /// Which day or month.
    pub period: String,
    /// The limit.
    pub ceiling: Money,
    /// How it stood.
    pub standing: Standing,
    /// The upper bound of the request.
    pub asked: Money,
    /// When all of it is there again.
    pub renews_at: UnixMillis,
}

/// When a call that is under way may have ended.
const SETTLED_AFTER: Duration = Duration::from_secs(5);

impl OverBudget {
    /// When the same request may pass; None: never, for it may cost more than the whole budget.
    pub fn retry_after(&self, now: UnixMillis) -> Option<Duration> {
        if self.asked > self.ceiling {
            return None;
        }
        let renewal = self.renews_at.since(now);
        Some(if self.is_held() { renewal.min(SETTLED_AFTER) } else { renewal })
    }

    /// Whether it is short only of what calls under way have set aside.
    fn is_held(&self) -> bool {
        self.standing.spent.saturating_add(self.asked) <= self.ceiling
    }

    fn advice(&self) -> String {
        if self.asked > self.ceiling {
            "that is more than the whole of it: ask for fewer tokens (max_tokens), or have the budget raised".to_owned()
        } else if self.is_held() {
            "ask for fewer tokens, or again once calls under way have ended: what they do not use is given back"
                .to_owned()
        } else {
            format!("ask for fewer tokens, wait until {}, or have the budget raised", self.renews_at)
        }
    }
}
