//! Budgets: never overspent by races, never under-charged by failures.

use std::collections::BTreeMap;

use bindery_gateway::{
    ledger::{Budget, BudgetScope, Ledger, LedgerCounts, LedgerError, OverBudget, Period, Reservation, ReserveRequest},
    money::Money,
    store::StoreError,
};
use futures::future::join_all;
use proptest::prelude::*;

use crate::{on_every_store, support::*};

fn upstream(ceiling: i64) -> Budget {
    Budget {
        scope: BudgetScope::Upstream("openai".to_owned()),
        per: Period::Month,
        ceiling: Money::from_nanos(ceiling),
    }
}

fn refusal(error: LedgerError) -> OverBudget {
    match error {
        LedgerError::OverBudget(over) => *over,
        other => panic!("{other}"),
    }
}

on_every_store! {
    /// Two processes, 64 reservers, room for 40: 40 get in, and after all have settled the sum is what they paid.
    async fn racing_reservers_never_overspend(place) {
        let (one, _one) = place.open().await;
        let (two, _two) = place.open().await;
        let ledgers = [ledger(&one, "one").await, ledger(&two, "two").await];
        let budgets = [daily(4_000), upstream(1_000_000)];
        let reserve = |index: usize| {
            let (ledger, budgets) = (ledgers[index % 2].clone(), budgets.clone());
            tokio::spawn(async move { ledger.reserve(request(100, &budgets), NOON).await })
        };
        let mut reserved = Vec::new();
        for answer in join_all((0..64).map(reserve)).await {
            match answer.unwrap() {
                Ok(reservation) => reserved.push(reservation),
                Err(error) => {
                    let over = refusal(error);
                    assert_eq!((over.scope.as_str(), over.ceiling.nanos(), over.asked.nanos()), ("tenant:acme", 4_000, 100));
                }
            }
        }
        assert_eq!(reserved.len(), 40);
        assert_eq!(standing(&ledgers[0], &budgets[0]).await, (0, 4_000));
        assert_eq!(standing(&ledgers[1], &budgets[1]).await, (0, 4_000), "a refused one left nothing in the other budget");
        let settle = |(index, reservation): (usize, Reservation)| {
            tokio::spawn(async move { reservation.settle(outcome(index as i64)).await.unwrap() })
        };
        join_all(reserved.into_iter().enumerate().map(settle)).await;
        let paid: i64 = (0..40).sum();
        assert_eq!(standing(&ledgers[0], &budgets[0]).await, (paid, 0));
        assert_eq!(standing(&ledgers[0], &budgets[1]).await, (paid, 0));
        let rows = place.ask("SELECT CAST(COUNT(*) AS BIGINT), CAST(SUM(price) AS BIGINT) FROM requests").await;
        assert_eq!(rows, [["40".to_owned(), paid.to_string()]]);
        assert!(place.ask("SELECT id FROM reservations").await.is_empty());
    }

    async fn a_refusal_says_how_the_budget_stands_and_when_it_renews(place) {
        let (store, _thread) = place.open().await;
        let ledger = ledger(&store, "one").await;
        let mut first = ledger.reserve(request(600, &[daily(1_000)]), NOON).await.unwrap();
        first.mark_sent();
        first.settle(outcome(500)).await.unwrap();
        let _held = ledger.reserve(request(300, &[daily(1_000)]), NOON).await.unwrap();
        let over = refusal(ledger.reserve(request(201, &[daily(1_000)]), NOON).await.err().unwrap());
        assert_eq!((over.standing.spent.nanos(), over.standing.reserved.nanos()), (500, 300));
        assert_eq!(over.renews_at.to_string(), "2026-11-29T00:00:00Z");
        let text = over.to_string();
        for part in ["tenant:acme", "2026-11-28", "$0.000001", "$0.0000005", "$0.000000201"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(ledger.reserve(request(200, &[daily(1_000)]), NOON).await.is_ok(), "to the last nano-dollar");
        let tomorrow = over.renews_at;
        assert!(ledger.reserve(request(1_000, &[daily(1_000)]), tomorrow).await.is_ok(), "a new day, a new budget");
    }

    async fn what_is_above_the_reservation_is_charged_in_full_and_counted(place) {
        let (store, _thread) = place.open().await;
        let ledger = ledger(&store, "one").await;
        let reservation = ledger.reserve(request(100, &[daily(100)]), NOON).await.unwrap();
        let settled = reservation.settle(outcome(170)).await.unwrap();
        assert_eq!(settled.overrun.nanos(), 70);
        assert_eq!(standing(&ledger, &daily(100)).await, (170, 0));
        let counts = ledger.counts();
        assert_eq!((counts.overruns, counts.overrun_nanos), (1, 70));
        assert_eq!(place.ask("SELECT overrun FROM requests").await, [["70"]]);
        let over = refusal(ledger.reserve(request(0, &[daily(100)]), NOON).await.err().unwrap());
        assert_eq!(over.standing.spent.nanos(), 170);
    }

    async fn an_unsent_reservation_is_given_back_and_a_sent_one_charged(place) {
        let (store, _thread) = place.open().await;
        let ledger = ledger(&store, "one").await;
        drop(ledger.reserve(request(100, &[daily(1_000)]), NOON).await.unwrap());
        ledger.reserve(request(100, &[daily(1_000)]), NOON).await.unwrap().release().await.unwrap();
        let mut sent = ledger.reserve(request(30, &[daily(1_000)]), NOON).await.unwrap();
        sent.mark_sent();
        drop(sent);
        assert_eq!(ledger.counts().leftovers, 2);
        ledger.keep_house(NOON).await.unwrap();
        assert_eq!(standing(&ledger, &daily(1_000)).await, (30, 0));
        assert_eq!(ledger.counts(), LedgerCounts { unsettled: 1, ..LedgerCounts::default() });
        assert_eq!(place.ask("SELECT price, settlement, status FROM requests").await, [["30", "unsettled", "failed"]]);
    }

    /// A client that leaves while its reservation is being committed.
    async fn a_reservation_nobody_waits_for_is_given_back(place) {
        let (store, _thread) = place.open().await;
        let ledger = ledger(&store, "one").await;
        let mut waited = 0;
        while waited < 20 {
            let mut waiting = Box::pin(ledger.reserve(request(50, &[daily(1_000)]), NOON));
            // Polled once: the operation is on its way, or, where the store was quicker, done and dropped with its answer.
            waited += u32::from(futures::poll!(&mut waiting).is_pending());
            drop(waiting);
        }
        ledger.keep_house(NOON).await.unwrap();
        assert_eq!(standing(&ledger, &daily(1_000)).await, (0, 0));
        assert!(place.ask("SELECT id FROM reservations").await.is_empty());
    }

    /// A settlement dropped while it waits, whether its commit happened or not, counts once.
    async fn a_settlement_nobody_waits_for_counts_once(place) {
        let (store, _thread) = place.open().await;
        let ledger = ledger(&store, "one").await;
        let (mut settled, mut waited) = (0, 0);
        while waited < 20 {
            let reservation = ledger.reserve(request(50, &[daily(100_000)]), NOON).await.unwrap();
            let mut waiting = Box::pin(reservation.settle(outcome(7)));
            // The store may be quicker than the poll; such a one is settled and no case of what is tested.
            waited += u32::from(futures::poll!(&mut waiting).is_pending());
            settled += 1;
            drop(waiting);
        }
        ledger.keep_house(NOON).await.unwrap();
        assert_eq!(standing(&ledger, &daily(100_000)).await, (7 * settled, 0));
        let rows = place.ask("SELECT CAST(COUNT(*) AS BIGINT) FROM requests").await;
        assert_eq!(rows, [[settled.to_string()]]);
    }

    async fn a_budget_without_a_price_refuses_and_none_lets_through(place) {
        let (store, _thread) = place.open().await;
        let ledger = ledger(&store, "one").await;
        let unpriced = |budgets: &[Budget]| ReserveRequest { at_most: None, ..request(0, budgets) };
        let error = ledger.reserve(unpriced(&[daily(1_000)]), NOON).await.err().unwrap();
        assert!(error.to_string().contains("gpt-4.1") && error.to_string().contains("tenant:acme"), "{error}");
        ledger.reserve(unpriced(&[]), NOON).await.unwrap().settle(outcome(0)).await.unwrap();
        let huge = ReserveRequest { at_most: Some(Money::MAX), ..request(0, &[]) };
        assert!(matches!(ledger.reserve(huge, NOON).await, Err(LedgerError::TooLarge { .. })));
    }

    async fn a_lowered_ceiling_acts_at_the_next_reservation(place) {
        let (store, _thread) = place.open().await;
        let ledger = ledger(&store, "one").await;
        let _held = ledger.reserve(request(500, &[daily(1_000)]), NOON).await.unwrap();
        assert!(ledger.reserve(request(1, &[daily(500)]), NOON).await.is_err());
        assert!(ledger.reserve(request(1, &[daily(501)]), NOON).await.is_ok());
        // The same budget twice is one budget with the lower ceiling, and counts once.
        let twice = [daily(2_000), daily(1_000)];
        let _twice = ledger.reserve(request(100, &twice), NOON).await.unwrap();
        assert!(ledger.reserve(request(900, &twice), NOON).await.is_err());
    }
}

/// At the bound of its file the store reserves nothing, and what nobody could set aside is not set aside.
#[tokio::test]
async fn a_full_store_fails_closed_and_recovers() {
    let place = Place::sqlite();
    let mut options = place.options();
    options.max_bytes = Some(200 << 10);
    let (store, _thread) = bindery_gateway::store::Store::open(options).await.unwrap();
    let ledger = ledger(&store, "one").await;
    let long = "m".repeat(8_000);
    let fill = |index: usize| {
        let mut request = request(1, &[daily(1_000_000)]);
        request.call.model = format!("{long}{index}");
        request
    };
    let mut held = Vec::new();
    let error = loop {
        match ledger.reserve(fill(held.len()), NOON).await {
            Ok(reservation) => held.push(reservation),
            Err(error) => break error,
        }
        assert!(held.len() < 100, "the store never fills");
    };
    assert!(matches!(&error, LedgerError::Store(store @ StoreError::Full { .. }) if store.is_transient()), "{error}");
    // Nothing was set aside for the one that was refused.
    assert_eq!(standing(&ledger, &daily(1_000_000)).await, (0, held.len() as i64));
    // What is given back makes room, and the next is served.
    for reservation in held.drain(..).take(5) {
        reservation.release().await.unwrap();
    }
    ledger.keep_house(NOON).await.unwrap();
    assert!(ledger.reserve(request(1, &[daily(1_000_000)]), NOON).await.is_ok());
}

#[derive(Clone, Debug)]
enum Step {
    Reserve { amount: i64, tenant: bool, upstream: bool },
    Settle { which: usize, price: i64 },
    Release { which: usize },
    Abandon { which: usize },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..400i64, any::<bool>(), any::<bool>()).prop_map(|(amount, tenant, upstream)| Step::Reserve { amount, tenant, upstream }),
        3 => (0..8usize, 0..500i64).prop_map(|(which, price)| Step::Settle { which, price }),
        1 => (0..8usize).prop_map(|which| Step::Release { which }),
        1 => (0..8usize).prop_map(|which| Step::Abandon { which }),
    ];
    prop::collection::vec(step, 1..40)
}

/// Two numbers a budget, in a map.
#[derive(Default)]
struct Naive(BTreeMap<&'static str, (i64, i64)>);

impl Naive {
    fn reserve(&mut self, amount: i64, names: &[(&'static str, i64)]) -> bool {
        let fits = names.iter().all(|(name, ceiling)| {
            let (spent, reserved) = self.0.get(name).copied().unwrap_or_default();
            spent + reserved + amount <= *ceiling
        });
        if fits {
            for (name, _) in names {
                self.0.entry(name).or_default().1 += amount;
            }
        }
        fits
    }

    fn end(&mut self, amount: i64, price: i64, names: &[(&'static str, i64)]) {
        for (name, _) in names {
            let budget = self.0.entry(name).or_default();
            budget.1 -= amount;
            budget.0 += price;
        }
    }
}

/// A reservation, its amount, and the twin's names and ceilings of its budgets.
type HeldOne = (Reservation, i64, Vec<(&'static str, i64)>);

async fn walk(ledger: &Ledger, steps: Vec<Step>) {
    let mut twin = Naive::default();
    let mut held: Vec<HeldOne> = Vec::new();
    for step in steps {
        match step {
            Step::Reserve { amount, tenant, upstream: up } => {
                let (mut budgets, mut names) = (Vec::new(), Vec::new());
                if tenant {
                    budgets.push(daily(1_000));
                    names.push(("tenant", 1_000));
                }
                if up {
                    budgets.push(upstream(1_500));
                    names.push(("upstream", 1_500));
                }
                let reserved = ledger.reserve(request(amount, &budgets), NOON).await;
                assert_eq!(reserved.is_ok(), twin.reserve(amount, &names));
                held.extend(reserved.ok().map(|reservation| (reservation, amount, names)));
            }
            Step::Settle { which, price } if which < held.len() => {
                let (reservation, amount, names) = held.swap_remove(which);
                reservation.settle(outcome(price)).await.unwrap();
                twin.end(amount, price, &names);
            }
            Step::Release { which } if which < held.len() => {
                let (reservation, amount, names) = held.swap_remove(which);
                reservation.release().await.unwrap();
                twin.end(amount, 0, &names);
            }
            Step::Abandon { which } if which < held.len() => {
                let (mut reservation, amount, names) = held.swap_remove(which);
                reservation.mark_sent();
                drop(reservation);
                ledger.keep_house(NOON).await.unwrap();
                twin.end(amount, amount, &names);
            }
            _ => {}
        }
        assert_eq!(standing(ledger, &daily(1_000)).await, twin.0.get("tenant").copied().unwrap_or_default());
        assert_eq!(standing(ledger, &upstream(1_500)).await, twin.0.get("upstream").copied().unwrap_or_default());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn budgets_agree_with_a_naive_twin(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let place = Place::sqlite();
            let (store, _thread) = place.open().await;
            walk(&ledger(&store, "one").await, steps).await;
        });
    }
}
