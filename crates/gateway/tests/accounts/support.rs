//! Stores to test with: a SQLite file of its own for each test, or a PostgreSQL database of its own.

use std::{str::FromStr as _, sync::atomic::AtomicU32, sync::atomic::Ordering::Relaxed, time::Duration};

use bindery_gateway::{
    clock::UnixMillis,
    keys::Credential,
    ledger::{
        Budget, BudgetScope, Call, Ledger, LedgerOptions, LedgerRoute, Outcome, Period, RequestStatus, ReserveRequest,
        TokenCounts,
    },
    money::Money,
    names::{KeyId, NodeId, TenantId},
    store::{Durability, Store, StoreOptions, StoreThread, StoreUrl},
};
use sqlx::{AnyConnection, Connection as _, Row as _};

/// 2026-11-28T12:00:00Z.
pub(crate) const NOON: UnixMillis = UnixMillis(1_795_867_200_000);

/// Where a test's store lies; gone with it.
pub(crate) struct Place {
    pub(crate) url: String,
    folder: Option<tempfile::TempDir>,
}

impl Place {
    pub(crate) fn sqlite() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { url: format!("sqlite://{}/bindery.db", folder.path().display()), folder: Some(folder) }
    }

    /// A new database on the server that `BINDERY_TEST_POSTGRES` names (its user must be allowed to create databases).
    #[expect(clippy::print_stderr, reason = "a skipped test says so")]
    pub(crate) async fn postgres() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let Ok(server) = std::env::var("BINDERY_TEST_POSTGRES") else {
            eprintln!("SKIPPED: BINDERY_TEST_POSTGRES (postgres://USER@HOST:PORT/DATABASE) is not set");
            return None;
        };
        sqlx::any::install_default_drivers();
        let name = format!("bindery_test_{}_{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
        let mut admin = AnyConnection::connect(&server).await.unwrap();
        let create = format!("CREATE DATABASE {name}");
        sqlx::raw_sql(sqlx::AssertSqlSafe(create)).execute(&mut admin).await.unwrap();
        let (base, _) = server.rsplit_once('/').unwrap();
        Some(Self { url: format!("{base}/{name}"), folder: None })
    }

    pub(crate) fn path(&self) -> std::path::PathBuf {
        self.folder.as_ref().unwrap().path().join("bindery.db")
    }

    pub(crate) fn options(&self) -> StoreOptions {
        options(&self.url)
    }

    pub(crate) async fn open(&self) -> (Store, StoreThread) {
        Store::open(self.options()).await.unwrap()
    }

    /// A connection that is none of the store's.
    pub(crate) async fn connect(&self) -> AnyConnection {
        sqlx::any::install_default_drivers();
        AnyConnection::connect(&self.url).await.unwrap()
    }

    /// Changes it behind the store's back.
    pub(crate) async fn execute(&self, sql: &'static str) {
        sqlx::raw_sql(sql).execute(&mut self.connect().await).await.unwrap();
    }

    /// What the database itself says.
    pub(crate) async fn ask(&self, sql: &'static str) -> Vec<Vec<String>> {
        let mut connection = self.connect().await;
        let rows = sqlx::query(sql).fetch_all(&mut connection).await.unwrap();
        let cell = |row: &sqlx::any::AnyRow, index: usize| {
            row.try_get::<i64, _>(index)
                .map(|number| number.to_string())
                .or_else(|_| row.try_get::<String, _>(index))
                .unwrap()
        };
        rows.iter().map(|row| (0..row.len()).map(|index| cell(row, index)).collect()).collect()
    }
}

pub(crate) fn options(url: &str) -> StoreOptions {
    StoreOptions {
        url: StoreUrl::from_str(url).unwrap(),
        durability: Durability::ProcessKill,
        max_bytes: None,
        max_waiting: 256,
        timeout: Duration::from_secs(20),
    }
}

pub(crate) fn node(name: &str) -> LedgerOptions {
    LedgerOptions {
        node: NodeId::new(name).unwrap(),
        beat_every: Duration::from_secs(2),
        lease: Duration::from_secs(30),
        keep: None,
        when_orphaned: None,
    }
}

pub(crate) async fn ledger(store: &Store, name: &str) -> Ledger {
    Ledger::open(store.clone(), node(name), NOON).await.unwrap()
}

pub(crate) fn tenant(name: &str) -> TenantId {
    TenantId::new(name).unwrap()
}

pub(crate) fn call(model: &str) -> Call {
    Call {
        tenant: tenant("acme"),
        credential: Credential::Key(KeyId::new("abcdefghijklmnop").unwrap()),
        model: model.to_owned(),
        adapter: None,
        route: LedgerRoute::Upstream("openai".to_owned()),
    }
}

pub(crate) fn daily(ceiling: i64) -> Budget {
    Budget { scope: BudgetScope::Tenant(tenant("acme")), per: Period::Day, ceiling: Money::from_nanos(ceiling) }
}

pub(crate) fn request(amount: i64, budgets: &[Budget]) -> ReserveRequest {
    ReserveRequest { call: call("gpt-4.1"), at_most: Some(Money::from_nanos(amount)), budgets: budgets.to_vec() }
}

pub(crate) fn outcome(price: i64) -> Outcome {
    Outcome {
        status: RequestStatus::Completed,
        tokens: TokenCounts {
            num_prompt_tokens: 10,
            num_cached_tokens: 4,
            num_completion_tokens: 5,
            num_reasoning_tokens: 2,
            is_estimated: false,
        },
        latency: Duration::from_millis(1500),
        price: Money::from_nanos(price),
        reference_price: None,
    }
}

/// `(spent, reserved)` in nano-dollars.
pub(crate) async fn standing(ledger: &Ledger, budget: &Budget) -> (i64, i64) {
    let standing = ledger.standing(budget, NOON).await.unwrap();
    (standing.spent.nanos(), standing.reserved.nanos())
}

/// Each test twice: on a file, and on a server where there is one.
#[macro_export]
macro_rules! on_every_store {
    ($($(#[doc = $doc:literal])* async fn $name:ident($place:ident) $body:block)*) => {
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::bodies::$name($crate::support::Place::sqlite()).await;
                }
            )*
        }
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    if let Some(place) = $crate::support::Place::postgres().await {
                        super::bodies::$name(place).await;
                    }
                }
            )*
        }
        mod bodies {
            #[allow(clippy::wildcard_imports, reason = "the test's own file")]
            use super::*;
            $($(#[doc = $doc])* pub(super) async fn $name($place: $crate::support::Place) $body)*
        }
    };
}
