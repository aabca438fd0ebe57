//! `bindery costs`: what requests cost by tenant, model and day, and what running them here has saved.
//!
//! The ledger adds up; here its report becomes a table that fits a terminal. Invariant: JSON and CSV hold every column of
//! the ledger, the table those that people compare, and a total.

use bindery_gateway::{
    ledger::{CostColumn, CostQuery, CostReport, CostRow, LedgerError, costs},
    money::Money,
};
use comfy_table::CellAlignment;

use crate::{
    args::{CostColumnArg, CostsArgs},
    commands::models::{plain_table, show},
    failure::Failure,
    gateway::{ConfigFile, of_store},
    terminal::{self, thousands},
};

pub(crate) async fn run(args: CostsArgs) -> anyhow::Result<()> {
    let CostsArgs { by, from, to, tenant, json, csv, config } = args;
    let file = ConfigFile::read(config)?;
    let columns = by.iter().map(|column| match column {
        CostColumnArg::Tenant => CostColumn::Tenant,
        CostColumnArg::Model => CostColumn::Model,
        CostColumnArg::Day => CostColumn::Day,
    });
    if let (Some(first), Some(last)) = (&from, &to)
        && first > last
    {
        let message = format!("--from {first} is after --to {last}, so no day is between them");
        return Err(Failure::usage(message).hint("--from is the first day, --to the last one").into());
    }
    let stranger = tenant.clone().filter(|name| file.tenant(name).is_err());
    let query = CostQuery { by: columns.collect(), from, to, tenant };
    let open = file.open_store_to_read().await?;
    let report = costs(&open.store, query).await.map_err(of_ledger);
    open.close().await?;
    let report = report?;
    let text = match (json, csv) {
        (true, _) => format!("{}\n", serde_json::to_string_pretty(&report)?),
        (_, true) => report.to_csv().map_err(of_ledger)?,
        _ => table(&report),
    };
    terminal::print(&text)?;
    if let Some(name) = stranger.filter(|_| report.rows.iter().all(|row| row.requests == 0)) {
        terminal::note(&format!("the config names no tenant {name:?}, and the ledger has no request of one"));
    }
    notes(&report, &file);
    Ok(())
}

fn of_ledger(error: LedgerError) -> Failure {
    match error {
        LedgerError::Store(error) => of_store(&error),
        LedgerError::BadDay(_) => Failure::usage(error.to_string()).hint("days are UTC's, as in the table"),
        other => Failure::new(other.to_string()),
    }
}

/// What the figures do not say themselves.
fn notes(report: &CostReport, file: &ConfigFile) {
    if report.is_cut {
        terminal::warn(&format!(
            "only the first {} rows are here: ask for fewer days or columns",
            thousands(report.rows.len() as u64)
        ));
    }
    let total = total(report);
    if total.unsettled_requests > 0 {
        let count = thousands(total.unsettled_requests);
        terminal::note(&format!("{count} upstream calls were charged in full, as nobody said what they used"));
    }
    if total.estimated_requests > total.unsettled_requests {
        let count = thousands(total.estimated_requests - total.unsettled_requests);
        terminal::note(&format!("the tokens of {count} requests are estimates, as their upstream did not count them"));
    }
    if total.local_requests > 0 && file.gateway.local_cost_per_hour.is_none() {
        terminal::note("local requests count as free: [local] names no cost_per_hour");
    }
    if total.local_requests > 0 && file.gateway.reference.is_none() {
        terminal::note("nothing is called saved: [local] names no compare_with, the upstream model to compare with");
    }
}

fn total(report: &CostReport) -> CostRow {
    let mut total = CostRow::default();
    for row in &report.rows {
        total.requests += row.requests;
        total.local_requests += row.local_requests;
        total.unsettled_requests += row.unsettled_requests;
        total.estimated_requests += row.estimated_requests;
        total.prompt_tokens += row.prompt_tokens;
        total.cached_tokens += row.cached_tokens;
        total.completion_tokens += row.completion_tokens;
        total.reasoning_tokens += row.reasoning_tokens;
        total.upstream_cost = total.upstream_cost.saturating_add(row.upstream_cost);
        total.local_cost = total.local_cost.saturating_add(row.local_cost);
        total.cost = total.cost.saturating_add(row.cost);
        total.saved = total.saved.saturating_add(row.saved);
    }
    total
}

fn table(report: &CostReport) -> String {
    if report.rows.iter().all(|row| row.requests == 0) {
        return "no requests\n".to_owned();
    }
    let groups = report.by.len();
    let mut table = plain_table();
    let sums = ["REQUESTS", "LOCAL", "PROMPT", "ANSWER", "UPSTREAM", "HERE", "COST", "SAVED"];
    table.set_header(report.by.iter().map(|column| column.name().to_uppercase()).chain(sums.map(str::to_owned)));
    for row in &report.rows {
        let names = report.cells(row).into_iter().take(groups);
        table.add_row(names.chain(figures(row)).collect::<Vec<_>>());
    }
    if report.rows.len() > 1 {
        let names = (0..groups).map(|at| if at == 0 { "total".to_owned() } else { String::new() });
        table.add_row(names.chain(figures(&total(report))).collect::<Vec<_>>());
    }
    for column in table.column_iter_mut().skip(groups) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("{}\n", show(&mut table))
}

fn figures(row: &CostRow) -> [String; 8] {
    [
        thousands(row.requests),
        thousands(row.local_requests),
        thousands(row.prompt_tokens),
        thousands(row.completion_tokens),
        cents(row.upstream_cost),
        cents(row.local_cost),
        cents(row.cost),
        cents(row.saved),
    ]
}

/// To a hundredth of a cent: finer figures are in JSON and CSV. An amount that is not nothing is not shown as nothing.
fn cents(money: Money) -> String {
    const STEP: i64 = 100_000;
    let nanos = money.nanos();
    let rounded = nanos.saturating_add(nanos.signum() * (STEP / 2)) / STEP * STEP;
    match (nanos.signum(), rounded) {
        (1, 0) => "<$0.0001".to_owned(),
        (-1, 0) => ">-$0.0001".to_owned(),
        _ => Money::from_nanos(rounded).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_rounded_to_a_hundredth_of_a_cent_and_never_to_nothing() {
        for (nanos, shown) in [
            (0, "$0.00"),
            (1, "<$0.0001"),
            (-1, ">-$0.0001"),
            (50_000, "$0.0001"),
            (1_234_567_890, "$1.2346"),
            (-1_234_567_890, "-$1.2346"),
            (2_500_000_000, "$2.50"),
        ] {
            assert_eq!(cents(Money::from_nanos(nanos)), shown);
        }
    }

    #[test]
    fn the_table_ends_with_the_sum_of_its_rows() {
        let row = |tenant: &str, requests, saved| CostRow {
            tenant: Some(tenant.to_owned()),
            requests,
            saved: Money::from_nanos(saved),
            ..CostRow::default()
        };
        let rows = vec![row("acme", 1000, 1_500_000_000), row("globex", 1, -500_000_000)];
        let report = CostReport { by: vec![CostColumn::Tenant], rows, is_cut: false };
        let text = table(&report);
        let last: Vec<&str> = text.lines().last().unwrap().split_whitespace().collect();
        assert_eq!((last[0], last[1], last.last().copied()), ("total", "1,001", Some("$1.00")), "{text}");
        let one = CostReport { rows: vec![row("acme", 1, 0)], ..report.clone() };
        assert_eq!(table(&one).lines().count(), 2, "a head and a row");
        let none = CostReport { rows: vec![CostRow::default()], by: Vec::new(), ..report };
        assert_eq!(table(&none), "no requests\n");
    }
}
