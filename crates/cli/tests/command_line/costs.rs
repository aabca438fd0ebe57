//! `bindery costs`, on a ledger whose sums were made by hand.

use std::time::Duration;

use bindery_gateway::{
    clock::UnixMillis,
    keys::Credential,
    ledger::{Call, Ledger, LedgerOptions, LedgerRoute, Outcome, RequestStatus, ReserveRequest, TokenCounts},
    money::Money,
    names::{KeyId, NodeId, TenantId},
};
use serde_json::{Value, json};

use crate::gateway::Home;

const CONFIG: &str = "[store]\nurl = \"sqlite://bindery.db\"\n[local]\ncost_per_hour = 2.0\n";
/// 2026-11-28T12:00:00Z.
const NOON: UnixMillis = UnixMillis(1_795_867_200_000);

fn outcome(dollars: f64, reference: Option<f64>) -> Outcome {
    Outcome {
        status: RequestStatus::Completed,
        tokens: TokenCounts {
            num_prompt_tokens: 1000,
            num_cached_tokens: 100,
            num_completion_tokens: 50,
            num_reasoning_tokens: 5,
            is_estimated: false,
        },
        latency: Duration::from_millis(7),
        price: Money::from_dollars(dollars).unwrap(),
        reference_price: reference.map(|dollars| Money::from_dollars(dollars).unwrap()),
    }
}

fn call(tenant: &str, model: &str, route: LedgerRoute) -> Call {
    Call {
        tenant: TenantId::new(tenant).unwrap(),
        credential: Credential::Key(KeyId::new("abcdefghijklmnop").unwrap()),
        model: model.to_owned(),
        adapter: None,
        route,
    }
}

/// acme: an upstream call of $0.50 and two local ones of $0.01 that would have cost $0.20; globex: $2.00 a day later.
fn home() -> Home {
    let home = Home::new(CONFIG);
    home.in_store(async |store| {
        let options = LedgerOptions {
            node: NodeId::new("one").unwrap(),
            beat_every: Duration::from_secs(2),
            lease: Duration::from_secs(30),
            keep: None,
            when_orphaned: None,
        };
        let ledger = Ledger::open(store, options, NOON).await.unwrap();
        let upstream = || LedgerRoute::Upstream("openai".to_owned());
        for (tenant, dollars, at) in [("acme", 0.5, NOON), ("globex", 2.0, NOON.after(Duration::from_hours(24)))] {
            let call = call(tenant, "openai/gpt-4.1", upstream());
            let request = ReserveRequest { call, at_most: Money::from_dollars(5.0), budgets: Vec::new() };
            ledger.reserve(request, at).await.unwrap().settle(outcome(dollars, None)).await.unwrap();
        }
        for _ in 0..2 {
            let local = call("acme", "smollm2", LedgerRoute::Local);
            ledger.record_local(&local, outcome(0.01, Some(0.2)), NOON).await.unwrap();
        }
    });
    home
}

fn rows(stdout: &str) -> Vec<Vec<&str>> {
    stdout.lines().map(|line| line.split_whitespace().collect()).collect()
}

#[test]
fn the_table_groups_adds_up_and_says_what_was_saved() {
    let home = home();
    let all = home.run(&["costs"]);
    assert_eq!(all.code, 0, "{}", all.stderr);
    let expected = [
        vec!["DAY", "TENANT", "MODEL", "REQUESTS", "LOCAL", "PROMPT", "ANSWER", "UPSTREAM", "HERE", "COST", "SAVED"],
        vec!["2026-11-28", "acme", "openai/gpt-4.1", "1", "0", "1,000", "50", "$0.50", "$0.00", "$0.50", "$0.00"],
        vec!["2026-11-28", "acme", "smollm2", "2", "2", "2,000", "100", "$0.00", "$0.02", "$0.02", "$0.38"],
        vec!["2026-11-29", "globex", "openai/gpt-4.1", "1", "0", "1,000", "50", "$2.00", "$0.00", "$2.00", "$0.00"],
        vec!["total", "4", "2", "4,000", "200", "$2.50", "$0.02", "$2.52", "$0.38"],
    ];
    assert_eq!(rows(&all.stdout), expected, "{}", all.stdout);
    assert!(all.stderr.contains("[local] names no compare_with"), "{}", all.stderr);
    let by_tenant = home.run(&["costs", "--by", "tenant", "--to", "2026-11-28"]);
    let rows = rows(&by_tenant.stdout);
    assert_eq!(rows.len(), 2, "{}", by_tenant.stdout);
    assert_eq!((rows[1][0], rows[1][1], rows[1][7]), ("acme", "3", "$0.52"));
}

#[test]
fn json_and_csv_hold_every_column() {
    let home = home();
    let json: Value =
        serde_json::from_str(&home.run(&["costs", "--by", "day", "--tenant", "acme", "--json"]).stdout).unwrap();
    let row = &json["rows"][0];
    assert_eq!(
        (&row["day"], &row["cached_tokens"], &row["reasoning_tokens"]),
        (&json!("2026-11-28"), &json!(300), &json!(15))
    );
    assert_eq!((&row["cost"], &row["saved"]), (&json!(0.52), &json!(0.38)));
    let csv = home.run(&["costs", "--by", "tenant", "--csv"]).stdout;
    let lines: Vec<&str> = csv.lines().collect();
    assert!(
        lines[0].starts_with("tenant,requests,local_requests,unsettled_requests,estimated_requests,prompt_tokens"),
        "{csv}"
    );
    assert_eq!(lines[2], "globex,1,0,0,0,1000,100,50,5,2.00,0.00,2.00,0.00", "{csv}");
}

#[test]
fn days_that_are_none_and_empty_ledgers_are_told() {
    let home = Home::new(CONFIG);
    let missing = home.run(&["costs"]);
    assert_eq!((missing.code, missing.stdout.as_str()), (1, ""));
    assert!(missing.stderr.contains("there is no store yet at sqlite://bindery.db"), "{}", missing.stderr);
    home.in_store(async |_| ());
    let empty = home.run(&["costs"]);
    assert_eq!((empty.code, empty.stdout.as_str()), (0, "no requests\n"), "{}", empty.stderr);
    let no_day = home.run(&["costs", "--from", "yesterday"]);
    assert_eq!(no_day.code, 2);
    assert!(no_day.stderr.contains("`yesterday` is no day; write it as 2026-11-28"), "{}", no_day.stderr);
    assert_eq!(home.run(&["costs", "--by", "colour"]).code, 2);
    assert_eq!(home.run(&["costs", "--json", "--csv"]).code, 2);
}
