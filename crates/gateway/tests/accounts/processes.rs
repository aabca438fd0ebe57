//! Several processes on one store, and those that die.

use std::time::Duration;

use bindery_gateway::{clock::UnixMillis, ledger::Ledger};

use crate::{on_every_store, support::*};

fn later(seconds: u64) -> UnixMillis {
    NOON.after(Duration::from_secs(seconds))
}

on_every_store! {
    async fn a_node_that_starts_again_charges_what_it_left_open(place) {
        let (store, _thread) = place.open().await;
        let before = ledger(&store, "one").await;
        let left = before.reserve(request(70, &[daily(1_000)]), NOON).await.unwrap();
        let other = ledger(&store, "two").await;
        let _others = other.reserve(request(5, &[daily(1_000)]), NOON).await.unwrap();
        assert_eq!(other.counts().unsettled, 0, "one is alive");
        let after = ledger(&store, "one").await;
        assert_eq!(after.counts().unsettled, 1);
        assert_eq!(standing(&after, &daily(1_000)).await, (70, 5), "and two's is left alone");
        assert_eq!(place.ask("SELECT price, settlement, model FROM requests").await, [["70", "unsettled", "gpt-4.1"]]);
        // Had it only been thought dead, its settlement corrects the charge.
        left.settle(outcome(20)).await.unwrap();
        assert_eq!(standing(&after, &daily(1_000)).await, (20, 5));
        assert_eq!(place.ask("SELECT price, settlement FROM requests").await, [["20", "settled"]]);
    }

    async fn a_dead_nodes_reservations_are_charged_when_its_lease_is_over(place) {
        let (store, _thread) = place.open().await;
        let dead = ledger(&store, "dead").await;
        let mut reservation = dead.reserve(request(40, &[daily(1_000)]), NOON).await.unwrap();
        reservation.mark_sent();
        let alive = ledger(&store, "alive").await;
        alive.keep_house(later(29)).await.unwrap();
        assert_eq!(standing(&alive, &daily(1_000)).await, (0, 40), "within its lease it is alive");
        dead.keep_house(later(20)).await.unwrap();
        alive.keep_house(later(45)).await.unwrap();
        assert_eq!(standing(&alive, &daily(1_000)).await, (0, 40), "it gave a sign of life");
        alive.keep_house(later(51)).await.unwrap();
        assert_eq!(standing(&alive, &daily(1_000)).await, (40, 0));
        assert_eq!(alive.counts().unsettled, 1);
        // As a kill would leave it: no destructor of the dead process runs.
        std::mem::forget(reservation);
    }

    async fn old_rows_go_and_open_budgets_stay(place) {
        let (store, _thread) = place.open().await;
        let mut options = node("one");
        options.keep = Some(Duration::from_hours(24));
        let ledger = Ledger::open(store.clone(), options, NOON).await.unwrap();
        ledger.reserve(request(10, &[daily(1_000)]), NOON).await.unwrap().settle(outcome(10)).await.unwrap();
        ledger.keep_house(later(3600)).await.unwrap();
        assert_eq!(place.ask("SELECT CAST(COUNT(*) AS BIGINT) FROM requests").await, [["1"]]);
        ledger.keep_house(later(40 * 24 * 3600)).await.unwrap();
        assert_eq!(place.ask("SELECT CAST(COUNT(*) AS BIGINT) FROM requests").await, [["0"]]);
        assert!(place.ask("SELECT period FROM budget_use").await.is_empty());
    }

    /// Groups of two nodes that name the same budgets in other orders never wait in a circle.
    async fn nodes_that_share_budgets_do_not_block_each_other(place) {
        use bindery_gateway::ledger::{Budget, BudgetScope};
        let (one, _one) = place.open().await;
        let (two, _two) = place.open().await;
        let ledgers = [ledger(&one, "one").await, ledger(&two, "two").await];
        let budget = |index: usize| Budget {
            scope: BudgetScope::Upstream(format!("u{}", index % 5)),
            ..daily(1_000_000)
        };
        let work = (0..200usize).map(|index| {
            let ledger = ledgers[index % 2].clone();
            let budgets = [budget(index), budget(index * 3 + 1)];
            tokio::spawn(async move {
                let reservation = ledger.reserve(request(10, &budgets), NOON).await.unwrap();
                reservation.settle(outcome(3)).await.unwrap();
            })
        });
        for done in futures::future::join_all(work).await {
            done.unwrap();
        }
        let sums = place.ask("SELECT CAST(SUM(spent) AS BIGINT), CAST(SUM(reserved) AS BIGINT) FROM budget_use").await;
        // index and 3 index + 1 name one budget where they agree modulo 5: for index = 2 (mod 5).
        assert_eq!(sums, [[(3 * (160 * 2 + 40)).to_string(), "0".to_owned()]]);
    }
}
