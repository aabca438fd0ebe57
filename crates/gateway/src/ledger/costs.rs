//! What it all cost: sums over the ledger by tenant, model and day, any of them.
//!
//! Rows are plain data; [`CostReport`] knows their columns, so that a table, JSON and CSV show the same.
//!
//! **Invariant**: the sums of a finer grouping add up to those of a coarser one.

use std::ops::Range;

use futures::FutureExt as _;
use sqlx::{AnyConnection, AssertSqlSafe, Row as _, any::AnyRow};

use super::LedgerError;
use crate::{clock::UnixMillis, money::Money, store::Store};

/// At most so many rows are returned; a report of more says that it is cut.
pub const MAX_COST_ROWS: usize = 100_000;

/// What rows are grouped by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CostColumn {
    /// The day, UTC.
    Day,
    /// The tenant.
    Tenant,
    /// The model.
    Model,
}

impl CostColumn {
    /// All, in the order of the table.
    pub const ALL: [Self; 3] = [Self::Day, Self::Tenant, Self::Model];

    /// As it is called in the table and in the store.
    pub fn name(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Tenant => "tenant",
            Self::Model => "model",
        }
    }
}

/// Which sums.
#[derive(Clone, Debug, Default)]
pub struct CostQuery {
    /// One row for each combination of these; none: one row for all.
    pub by: Vec<CostColumn>,
    /// The first day (2026-11-28), if not from the beginning.
    pub from: Option<String>,
    /// The last day, if not to the end.
    pub to: Option<String>,
    /// Only this tenant's.
    pub tenant: Option<String>,
}

/// One sum. Money as dollars in JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct CostRow {
    /// Where grouped by it, as the next two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub day: Option<String>,
    /// The tenant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// The model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Requests, local and upstream.
    pub requests: u64,
    /// Of those, answered locally.
    pub local_requests: u64,
    /// Of those, charged in full because nobody said what they used.
    pub unsettled_requests: u64,
    /// Of all, those whose tokens nobody counted.
    pub estimated_requests: u64,
    /// Tokens, named as OpenAI's usage names them.
    pub prompt_tokens: u64,
    /// Of the prompt's, read from a cache.
    pub cached_tokens: u64,
    /// Of the answers.
    pub completion_tokens: u64,
    /// Of the answers', thought and not said.
    pub reasoning_tokens: u64,
    /// What was paid upstream.
    pub upstream_cost: Money,
    /// What the node's time cost.
    pub local_cost: Money,
    /// Both.
    pub cost: Money,
    /// What the reference model would have cost for what ran locally, less what it cost here; below zero where the node
    /// was dearer.
    pub saved: Money,
}

/// The sums, and what they are by.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct CostReport {
    /// In the order of the table.
    pub by: Vec<CostColumn>,
    /// Sorted by those.
    pub rows: Vec<CostRow>,
    /// There were more than [`MAX_COST_ROWS`].
    pub is_cut: bool,
}

impl CostReport {
    /// The table's head.
    pub fn header(&self) -> Vec<&'static str> {
        let sums = [
            "requests",
            "local_requests",
            "unsettled_requests",
            "estimated_requests",
            "prompt_tokens",
            "cached_tokens",
            "completion_tokens",
            "reasoning_tokens",
            "upstream_cost",
            "local_cost",
            "cost",
            "saved",
        ];
        self.by.iter().map(|column| column.name()).chain(sums).collect()
    }

    /// The table's row, under [`header`](Self::header).
    pub fn cells(&self, row: &CostRow) -> Vec<String> {
        let groups = self.by.iter().map(|column| {
            let value = match column {
                CostColumn::Day => &row.day,
                CostColumn::Tenant => &row.tenant,
                CostColumn::Model => &row.model,
            };
            value.clone().unwrap_or_default()
        });
        let counts = [
            row.requests,
            row.local_requests,
            row.unsettled_requests,
            row.estimated_requests,
            row.prompt_tokens,
            row.cached_tokens,
            row.completion_tokens,
            row.reasoning_tokens,
        ];
        let sums = [row.upstream_cost, row.local_cost, row.cost, row.saved];
        let counts = counts.iter().map(ToString::to_string);
        groups.chain(counts).chain(sums.iter().map(ToString::to_string)).collect()
    }

    /// By RFC 4180, money as plain numbers of dollars.
    pub fn to_csv(&self) -> Result<String, LedgerError> {
        let failed = |error: &dyn std::fmt::Display| LedgerError::Csv(error.to_string());
        let mut writer = csv::WriterBuilder::new().terminator(csv::Terminator::CRLF).from_writer(Vec::new());
        writer.write_record(self.header()).map_err(|error| failed(&error))?;
        for row in &self.rows {
            let mut cells = self.cells(row);
            // Names may hold a dollar sign; the four sums at the end are the money.
            let sums = cells.len() - 4;
            cells[sums..].iter_mut().for_each(|cell| cell.retain(|char| char != '$'));
            writer.write_record(cells).map_err(|error| failed(&error))?;
        }
        let bytes = writer.into_inner().map_err(|error| failed(&error))?;
        String::from_utf8(bytes).map_err(|error| failed(&error))
    }
}

/// Reads the sums.
pub async fn costs(store: &Store, query: CostQuery) -> Result<CostReport, LedgerError> {
    let day = |day: Option<&String>| match day {
        Some(day) => UnixMillis::of_day(day).map(Some).ok_or_else(|| LedgerError::BadDay(day.clone())),
        None => Ok(None),
    };
    let range = Range {
        start: day(query.from.as_ref())?.map_or(i64::MIN, |from| from.0),
        end: day(query.to.as_ref())?.map_or(i64::MAX, |to| to.next_day().0),
    };
    let by: Vec<_> = CostColumn::ALL.into_iter().filter(|column| query.by.contains(column)).collect();
    let columns = by.clone();
    let tenant = query.tenant.unwrap_or_default();
    let read = store.read(move |connection| async move { read(connection, &columns, range, tenant).await }.boxed());
    let mut rows = read.await?;
    let is_cut = rows.len() > MAX_COST_ROWS;
    rows.truncate(MAX_COST_ROWS);
    Ok(CostReport { by, rows, is_cut })
}

async fn read(
    connection: &mut AnyConnection,
    by: &[CostColumn],
    at: Range<i64>,
    tenant: String,
) -> Result<Vec<CostRow>, sqlx::Error> {
    let rows = sqlx::query(AssertSqlSafe(text(by)))
        .bind(at.start)
        .bind(at.end)
        .bind(tenant)
        .bind(MAX_COST_ROWS as i64 + 1)
        .fetch_all(connection)
        .await?;
    rows.iter().map(|row| cost_row(by, row)).collect()
}

/// Put together from words of this file alone.
fn text(by: &[CostColumn]) -> String {
    let names: Vec<_> = by.iter().map(|column| column.name()).collect();
    let group = if names.is_empty() { String::new() } else { format!("GROUP BY {0} ORDER BY {0}", names.join(", ")) };
    let select = if names.is_empty() { String::new() } else { format!("{}, ", names.join(", ")) };
    let sum = |of: &str| format!("CAST(COALESCE(SUM({of}), 0) AS BIGINT)");
    let sums = [
        "CAST(COUNT(*) AS BIGINT)".to_owned(),
        sum("CASE WHEN route = 'local' THEN 1 ELSE 0 END"),
        sum("CASE WHEN settlement = 'unsettled' THEN 1 ELSE 0 END"),
        sum("estimated"),
        sum("prompt_tokens"),
        sum("cached_tokens"),
        sum("completion_tokens"),
        sum("reasoning_tokens"),
        sum("CASE WHEN route = 'local' THEN 0 ELSE price END"),
        sum("CASE WHEN route = 'local' THEN price ELSE 0 END"),
        sum("CASE WHEN reference_price IS NULL THEN 0 ELSE reference_price - price END"),
    ];
    format!(
        "SELECT {select}{} FROM requests WHERE at >= $1 AND at < $2 AND ($3 = '' OR tenant = $3) {group} LIMIT $4",
        sums.join(", ")
    )
}

fn cost_row(by: &[CostColumn], row: &AnyRow) -> Result<CostRow, sqlx::Error> {
    let mut cost = CostRow::default();
    for (index, column) in by.iter().enumerate() {
        let value = Some(row.try_get(index)?);
        match column {
            CostColumn::Day => cost.day = value,
            CostColumn::Tenant => cost.tenant = value,
            CostColumn::Model => cost.model = value,
        }
    }
    let number = |index: usize| row.try_get::<i64, _>(by.len() + index);
    let count = |index| number(index).map(|number| u64::try_from(number).unwrap_or(0));
    cost.requests = count(0)?;
    cost.local_requests = count(1)?;
    cost.unsettled_requests = count(2)?;
    cost.estimated_requests = count(3)?;
    cost.prompt_tokens = count(4)?;
    cost.cached_tokens = count(5)?;
    cost.completion_tokens = count(6)?;
    cost.reasoning_tokens = count(7)?;
    cost.upstream_cost = Money::from_nanos(number(8)?);
    cost.local_cost = Money::from_nanos(number(9)?);
    cost.cost = cost.upstream_cost.saturating_add(cost.local_cost);
    cost.saved = Money::from_nanos(number(10)?);
    Ok(cost)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_quotes_what_needs_it_and_writes_money_as_numbers() {
        let row = CostRow {
            tenant: Some("a \"b\", $5".to_owned()),
            requests: 2,
            cost: Money::from_nanos(1_500_000_000),
            ..CostRow::default()
        };
        let report = CostReport { by: vec![CostColumn::Tenant], rows: vec![row], is_cut: false };
        let csv = report.to_csv().unwrap();
        let expected = "tenant,requests,local_requests,unsettled_requests,estimated_requests,prompt_tokens,cached_tokens,completion_tokens,\
                        reasoning_tokens,upstream_cost,local_cost,cost,saved\r\n\
                        \"a \"\"b\"\", $5\",2,0,0,0,0,0,0,0,0.00,0.00,1.50,0.00\r\n";
        assert_eq!(csv, expected);
    }
}
