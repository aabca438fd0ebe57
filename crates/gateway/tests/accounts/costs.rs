//! The sums of the ledger, against sums that were made by hand.

use std::time::Duration;

use bindery_gateway::{
    ledger::{Call, CostColumn, CostQuery, CostReport, LedgerError, LedgerRoute, Outcome, costs},
    money::Money,
    store::{Store, StoreError},
};

use crate::{on_every_store, support::*};

async fn fill(store: &Store) {
    let ledger = ledger(store, "one").await;
    let tomorrow = NOON.after(Duration::from_hours(24));
    for (who, model, at, price) in
        [("acme", "gpt-4.1", NOON, 100), ("acme", "gpt-4.1", tomorrow, 20), ("globex", "claude", NOON, 7)]
    {
        let call = Call { tenant: tenant(who), ..call(model) };
        let mut request = request(200, &[]);
        request.call = call;
        ledger.reserve(request, at).await.unwrap().settle(outcome(price)).await.unwrap();
    }
    let local = Call { route: LedgerRoute::Local, ..call("smollm2") };
    for reference in [Some(50), None] {
        let outcome = Outcome { reference_price: reference.map(Money::from_nanos), ..outcome(3) };
        ledger.record_local(&local, outcome, NOON).await.unwrap();
    }
}

/// `[groups..., requests, cost, saved]`.
fn short(report: &CostReport) -> Vec<Vec<String>> {
    let line = |row| {
        let cells = report.cells(row);
        let groups = report.by.len();
        let nanos = [row.cost.nanos().to_string(), row.saved.nanos().to_string()];
        cells[..=groups].iter().cloned().chain(nanos).collect()
    };
    report.rows.iter().map(line).collect()
}

/// Rows have a connection of their own; whoever asks must hear what the store says, and the row must not be lost.
#[tokio::test]
async fn rows_that_find_the_store_full_wait_until_there_is_room() {
    let place = Place::sqlite();
    let mut options = place.options();
    options.max_bytes = Some(200 << 10);
    let (store, _thread) = Store::open(options).await.unwrap();
    let ledger = ledger(&store, "one").await;
    let local = Call { route: LedgerRoute::Local, ..call(&"m".repeat(8_000)) };
    let mut num_rows = 0;
    let alone = loop {
        match ledger.record_local(&local, outcome(1), NOON).await {
            Ok(()) => num_rows += 1,
            Err(error) => break error,
        }
        assert!(num_rows < 100, "the store never fills");
    };
    let together = futures::future::join_all((0..3).map(|_| ledger.record_local(&local, outcome(1), NOON))).await;
    for error in std::iter::once(alone).chain(together.into_iter().map(Result::unwrap_err)) {
        assert!(matches!(error, LedgerError::Store(StoreError::Full { .. })), "{error}");
    }
    place.execute("DELETE FROM requests").await;
    ledger.keep_house(NOON).await.unwrap();
    let sums = costs(&store, CostQuery::default()).await.unwrap();
    assert_eq!((sums.rows[0].local_requests, ledger.counts().leftovers), (4, 0));
}

/// Another process writes for a while, as a backup or a second node's start does: rows wait for it and are then there.
#[tokio::test]
async fn rows_wait_for_another_process_that_writes() {
    let place = Place::sqlite();
    let (store, _thread) = place.open().await;
    let ledger = ledger(&store, "one").await;
    let local = Call { route: LedgerRoute::Local, ..call("smollm2") };
    let mut other = place.connect().await;
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();
    let row = ledger.record_local(&local, outcome(1), NOON);
    let held = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(place.ask("SELECT COUNT(*) FROM requests").await, [["0"]]);
        sqlx::raw_sql("COMMIT").execute(&mut other).await.unwrap();
    };
    let (row, ()) = tokio::join!(row, held);
    row.unwrap();
    assert_eq!(place.ask("SELECT COUNT(*) FROM requests").await, [["1"]]);
}

on_every_store! {
    /// More than go in one statement; each is there once, whoever left before he was told among them.
    async fn rows_that_come_together_are_each_written_once(place) {
        let (store, _thread) = place.open().await;
        let ledger = ledger(&store, "one").await;
        let local = Call { route: LedgerRoute::Local, ..call("smollm2") };
        let rows = (0..300).map(|price| ledger.record_local(&local, outcome(price), NOON));
        let written = futures::future::join_all(rows).await;
        assert!(written.iter().all(Result::is_ok), "{written:?}");
        let left = ledger.record_local(&local, outcome(1_000), NOON);
        // Asked once, and not again: whether it was written by then or is later, it counts.
        let _ = futures::FutureExt::now_or_never(left);
        ledger.keep_house(NOON).await.unwrap();
        let sums = costs(&store, CostQuery::default()).await.unwrap();
        let row = &sums.rows[0];
        assert_eq!((row.local_requests, row.local_cost.nanos()), (301, (0..300).sum::<i64>() + 1_000));
        assert_eq!(ledger.counts().leftovers, 0);
    }

    async fn sums_by_any_subset_agree(place) {
        let (store, _thread) = place.open().await;
        fill(&store).await;
        let by = |columns: &[CostColumn]| {
            let query = CostQuery { by: columns.to_vec(), ..CostQuery::default() };
            let store = store.clone();
            async move { costs(&store, query).await.unwrap() }
        };
        let all = by(&[]).await;
        assert_eq!(short(&all), [["5", "133", "47"]]);
        let row = &all.rows[0];
        assert_eq!((row.local_requests, row.upstream_cost.nanos(), row.local_cost.nanos()), (2, 127, 6));
        assert_eq!((row.prompt_tokens, row.cached_tokens, row.completion_tokens, row.reasoning_tokens), (50, 20, 25, 10));
        assert_eq!(short(&by(&[CostColumn::Tenant]).await), [["acme", "4", "126", "47"], ["globex", "1", "7", "0"]]);
        let days = short(&by(&[CostColumn::Day]).await);
        assert_eq!(days, [["2026-11-28", "4", "113", "47"], ["2026-11-29", "1", "20", "0"]]);
        // Asked for in any order, shown in one.
        let fine = by(&[CostColumn::Model, CostColumn::Tenant, CostColumn::Day]).await;
        assert_eq!(fine.by, CostColumn::ALL);
        assert_eq!(fine.rows.len(), 4);
        assert_eq!(fine.rows.iter().map(|row| row.cost.nanos()).sum::<i64>(), 133);
        assert_eq!(fine.rows.iter().map(|row| row.requests).sum::<u64>(), 5);
    }

    async fn days_and_tenant_narrow_the_sums(place) {
        let (store, _thread) = place.open().await;
        let day = |text: &str| Some(text.to_owned());
        let none = costs(&store, CostQuery::default()).await.unwrap();
        assert_eq!(short(&none), [["0", "0", "0"]], "an empty ledger sums to nothing");
        fill(&store).await;
        let ask = |query: CostQuery| {
            let store = store.clone();
            async move { short(&costs(&store, query).await.unwrap()) }
        };
        assert_eq!(ask(CostQuery { from: day("2026-11-29"), ..CostQuery::default() }).await, [["1", "20", "0"]]);
        assert_eq!(ask(CostQuery { to: day("2026-11-28"), ..CostQuery::default() }).await, [["4", "113", "47"]]);
        assert_eq!(ask(CostQuery { tenant: Some("globex".to_owned()), ..CostQuery::default() }).await, [["1", "7", "0"]]);
        let injected = Some("' OR '1' = '1".to_owned());
        assert_eq!(ask(CostQuery { tenant: injected, ..CostQuery::default() }).await, [["0", "0", "0"]]);
        for bad in ["2026-13-01", "yesterday", "2026-1-1", "'"] {
            let query = CostQuery { from: day(bad), ..CostQuery::default() };
            assert!(matches!(costs(&store, query).await, Err(LedgerError::BadDay(day)) if day == bad));
        }
    }
}

#[tokio::test]
async fn json_has_the_columns_that_were_asked_for() {
    let place = Place::sqlite();
    let (store, _thread) = place.open().await;
    fill(&store).await;
    let query = CostQuery { by: vec![CostColumn::Tenant], ..CostQuery::default() };
    let json = serde_json::to_value(costs(&store, query).await.unwrap()).unwrap();
    assert_eq!(json["by"], serde_json::json!(["tenant"]));
    assert_eq!(json["rows"][1]["tenant"], "globex");
    assert_eq!(json["rows"][1]["cost"], serde_json::json!(7e-9));
    assert!(json["rows"][1].get("day").is_none());
}
