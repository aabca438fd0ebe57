//! The death of the process in the middle of its work: what was answered is there, and what was open is charged.
//!
//! The test runs its own executable again as the process that is killed; each line that one writes is an answer that it
//! got.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Command, Stdio},
};

use bindery_gateway::ledger::LedgerRoute;

use crate::support::*;

const CHILD: &str = "BINDERY_TEST_CRASH_STORE";
/// Which of the child's lives it is: part of the names of its requests, so that none is used twice.
const LIFE: &str = "BINDERY_TEST_CRASH_LIFE";

/// What the child does until it is killed; as a test it does nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child() {
    let (Ok(url), Ok(life)) = (std::env::var(CHILD), std::env::var(LIFE)) else { return };
    let (store, _thread) = bindery_gateway::store::Store::open(options(&url)).await.unwrap();
    let ledger = ledger(&store, "one").await;
    let say = |line: String| writeln!(std::io::stdout(), "{line}").unwrap();
    let workers = (0..16u64).map(|worker| {
        let (ledger, life) = (ledger.clone(), life.clone());
        tokio::spawn(async move {
            for index in 0.. {
                let model = format!("m-{life}-{worker}-{index}");
                let mut request = request(100, &[daily(i64::MAX)]);
                request.call.model = model.clone();
                let mut local = request.call.clone();
                let mut reservation = ledger.reserve(request, NOON).await.unwrap();
                reservation.mark_sent();
                say(format!("reserved {} {model}", reservation.id()));
                reservation.settle(outcome(7)).await.unwrap();
                say(format!("settled {model}"));
                local.route = LedgerRoute::Local;
                local.model = format!("local-{model}");
                ledger.record_local(&local, outcome(3), NOON).await.unwrap();
                say(format!("settled local-{model}"));
            }
        })
    });
    futures::future::join_all(workers).await;
}

/// Runs the child until it has said so many lines, kills it, and returns all lines that it could say.
fn killed_after(url: &str, life: usize, num_lines: usize) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crash::child", "--nocapture", "--test-threads=1"])
        .env(CHILD, url)
        .env(LIFE, life.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let is_answer = |line: &String| line.starts_with("reserved ") || line.starts_with("settled ");
    let mut said: Vec<String> = lines.by_ref().filter(is_answer).take(num_lines).collect();
    child.kill().unwrap();
    said.extend(lines.filter(is_answer));
    child.wait().unwrap();
    said
}

async fn nothing_answered_is_lost(place: Place) {
    // Three lives on one store, so that recovering is itself followed by a kill.
    let mut said = Vec::new();
    for (life, num_lines) in [50, 400, 150].into_iter().enumerate() {
        said.extend(killed_after(&place.url, life, num_lines));
    }
    let (store, _thread) = place.open().await;
    let ledger = ledger(&store, "one").await;
    let rows = place.ask("SELECT model, settlement, price FROM requests").await;
    let settlements =
        |model: &str| -> Vec<&str> { rows.iter().filter(|row| row[0] == model).map(|row| row[1].as_str()).collect() };
    for line in &said {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["settled", model] if model.starts_with("local-") => assert_eq!(settlements(model), ["local"], "{line}"),
            ["settled", model] => assert_eq!(settlements(model), ["settled"], "{line}"),
            ["reserved", _, model] => {
                assert!(
                    matches!(settlements(model).as_slice(), ["settled" | "unsettled"]),
                    "{line} is neither settled nor charged"
                );
            }
            _ => panic!("{line}"),
        }
    }
    let settled = said.iter().filter(|line| line.starts_with("settled")).count();
    let kept = rows.iter().filter(|row| row[1] != "unsettled").count();
    assert!(kept >= settled && settled > 0, "{kept} rows for {settled} answers");
    assert!(place.ask("SELECT id FROM reservations").await.is_empty(), "nothing stays open");
    let upstream: i64 = rows.iter().filter(|row| row[1] != "local").map(|row| row[2].parse::<i64>().unwrap()).sum();
    assert_eq!(standing(&ledger, &daily(i64::MAX)).await, (upstream, 0), "the budget is the sum of the rows");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_loses_nothing_that_was_answered_on_sqlite() {
    nothing_answered_is_lost(Place::sqlite()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_loses_nothing_that_was_answered_on_postgres() {
    if let Some(place) = Place::postgres().await {
        nothing_answered_is_lost(place).await;
    }
}
