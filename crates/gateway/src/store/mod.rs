//! Where keys, budgets and the ledger are kept: SQLite in one file, or PostgreSQL for several nodes.
//!
//! One set of SQL texts serves both. Writes go through one thread that commits them in groups
//! ([`writer`]); reads have connections of their own. Knows what a transaction is and nothing about what is in it; the one
//! table that has no other home, the audit log's heads, is [`audit_head`]'s.
//!
//! **What a crash can take.** SQLite writes to a log (WAL) beside its file. A commit that was answered survives the
//! death of the process at either [`Durability`]: its bytes are in the system's cache. Only
//! [`PowerLoss`](Durability::PowerLoss) (`synchronous = FULL`: one fsync a group) also survives the death of the machine;
//! at [`ProcessKill`](Durability::ProcessKill) (`NORMAL`) a power cut may take the last commits, in order, and leaves a
//! sound file. With PostgreSQL these are `synchronous_commit = on` and `off` of the server.
//!
//! **When the store cannot be reached**, writes fail and so does all that must be written first: a reservation is
//! refused and nothing is sent upstream. Whether requests that cost nothing upstream go on is configured (`on_failure`).
//!
//! **Invariant**: a write that was answered is committed.

mod audit_head;
mod connect;
mod direct;
mod error;
mod row;
mod schema;
mod url;
mod writer;

pub use audit_head::{LogWriter, StoreHeads};
pub use error::StoreError;
pub(crate) use row::{NewRow, Table, Value, insert};
pub use url::{StoreKind, StoreUrl};
pub(crate) use writer::Operation;

use std::{sync::Arc, thread::JoinHandle, time::Duration};

use futures::future::BoxFuture;
use sqlx::{AnyConnection, AnyPool, any::AnyPoolOptions};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

use connect::Settings;
use writer::{Connections, Inbox, Job, Waiting, Writer};

/// Against what an answered write is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// The death of this process. A power cut may take the last moments: a budget's last charges, a key's revocation.
    ProcessKill,
    /// The death of the machine, too, for one fsync a group of commits.
    PowerLoss,
}

/// How to open a store.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Where it lies.
    pub url: StoreUrl,
    /// Against what a write is safe.
    pub durability: Durability,
    /// The file grows no further (SQLite). At it, writes fail as on a full disk: what costs money is refused.
    pub max_bytes: Option<u64>,
    /// So many operations may wait; at it, callers wait, at most for `timeout`.
    pub max_waiting: usize,
    /// How long anything may take: connecting, a commit, a caller's wait.
    pub timeout: Duration,
}

/// Readers at once; at it, the next waits, at most for the time-out.
const MAX_READERS: u32 = 4;

/// A store that is open. Cheap to clone; the last clone's end is the writer's.
#[derive(Clone)]
pub struct Store {
    settings: Arc<Settings>,
    jobs: mpsc::Sender<Job>,
    readers: AnyPool,
    closing: watch::Sender<bool>,
}

/// The writer's thread; for who wants to see it end.
#[must_use = "joining it is how a process knows that all was written"]
pub struct StoreThread(JoinHandle<()>);

impl StoreThread {
    /// Waits until the store is [closed](Store::close) or all its clones are gone, and all they sent is written. Blocks: not
    /// for an async task.
    pub fn join(self) {
        if self.0.join().is_err() {
            tracing::error!("the store's writer thread panicked");
        }
    }
}

impl Store {
    /// Opens the store, brings it to this program's schema and starts its writer.
    pub async fn open(options: StoreOptions) -> Result<(Self, StoreThread), StoreError> {
        sqlx::any::install_default_drivers();
        let StoreOptions { url, durability, max_bytes, max_waiting, timeout } = options;
        let settings = Arc::new(Settings { url, durability, max_bytes, timeout });
        let (jobs, waiting) = mpsc::channel(max_waiting.max(1));
        let closing = watch::Sender::new(false);
        let thread = start(Arc::clone(&settings), Inbox { jobs: waiting, closing: closing.subscribe() }).await?;
        let readers = readers(&settings);
        Ok((Self { settings, jobs, readers, closing }, StoreThread(thread)))
    }

    /// Takes no more writes, from any clone. What was accepted before is still committed and answered, after which the
    /// writer's thread ends; [`StoreThread::join`] waits for it. Reading goes on.
    pub fn close(&self) {
        self.closing.send_replace(true);
    }

    /// As it may be shown.
    pub fn url(&self) -> &StoreUrl {
        &self.settings.url
    }

    /// Runs an operation in the next group and answers after its commit.
    ///
    /// An error may come although the operation was or will be done (its answer was lost, or came too late): whoever
    /// cannot live with that sends what undoes it, which the writer runs after it.
    pub(crate) async fn submit<O: Operation>(&self, operation: O) -> Result<O::Output, StoreError> {
        let (job, answer) = Waiting::new(operation);
        self.send(Job::Operation(job), answer).await
    }

    /// Inserts a row with the next group and answers after its commit; an error as [`submit`](Self::submit)'s.
    pub(crate) async fn insert(&self, row: Arc<dyn NewRow>) -> Result<(), StoreError> {
        let (answer, answered) = oneshot::channel();
        self.send(Job::Row { row, answer }, answered).await
    }

    async fn send<T>(&self, job: Job, answer: oneshot::Receiver<Result<T, StoreError>>) -> Result<T, StoreError> {
        let all = async {
            self.jobs.send(job).await.map_err(|_| self.closed())?;
            answer.await.map_err(|_| self.closed())?
        };
        let waited = timeout(self.settings.timeout, all).await;
        waited.unwrap_or_else(|_| Err(self.too_slow()))
    }

    /// Reads outside the writer's transactions: sees what is committed and waits for nobody.
    pub(crate) async fn read<T, F>(&self, read: F) -> Result<T, StoreError>
    where
        F: for<'a> FnOnce(&'a mut AnyConnection) -> BoxFuture<'a, Result<T, sqlx::Error>>,
    {
        let all = async {
            let mut connection = self.readers.acquire().await?;
            read(&mut connection).await
        };
        match timeout(self.settings.timeout, all).await {
            Ok(read) => read.map_err(|error| self.settings.error(&error)),
            Err(_) => Err(self.too_slow()),
        }
    }

    pub(crate) fn closed(&self) -> StoreError {
        StoreError::Closed { store: self.settings.shown() }
    }

    fn too_slow(&self) -> StoreError {
        let why = format!("nothing came within {:?}", self.settings.timeout);
        StoreError::Busy { store: self.settings.shown(), why }
    }
}

/// Starts the writer's thread, which has a runtime of its own: nothing the server does delays a commit. Returns when the
/// store is ready.
async fn start(settings: Arc<Settings>, inbox: Inbox) -> Result<JoinHandle<()>, StoreError> {
    let shown = settings.shown();
    let failed = |why: String| StoreError::Unreachable { store: Arc::clone(&shown), why };
    let mut builder = tokio::runtime::Builder::new_current_thread();
    match settings.kind() {
        // It waits for threads alone, and is woken for less than by a socket's poll.
        StoreKind::Sqlite => builder.enable_time(),
        StoreKind::Postgres => builder.enable_all(),
    };
    let runtime = builder.build().map_err(|error| failed(format!("its writer cannot be started: {error}")))?;
    let (ready, is_ready) = oneshot::channel();
    let thread = std::thread::Builder::new()
        .name("bindery-store".to_owned())
        .spawn(move || {
            runtime.block_on(async move {
                match prepare(&settings).await {
                    Ok(connection) => {
                        let _ = ready.send(Ok(()));
                        let connections = Connections::beside(connection, &settings);
                        Writer { settings }.work(connections, inbox).await;
                    }
                    Err(error) => drop(ready.send(Err(error))),
                }
            });
        })
        .map_err(|error| failed(format!("its writer cannot be started: {error}")))?;
    match is_ready.await {
        Ok(ready) => ready.map(|()| thread),
        Err(_) => Err(failed("its writer died at the start".to_owned())),
    }
}

async fn prepare(settings: &Settings) -> Result<AnyConnection, StoreError> {
    let mut connection = connect::open(settings).await?;
    let migrated =
        timeout(settings.timeout * 6, schema::migrate(&mut connection, settings.kind(), settings.url.shown()));
    let Ok(migrated) = migrated.await else {
        let why = format!("the schema was not ready within {:?}", settings.timeout * 6);
        return Err(StoreError::Busy { store: settings.shown(), why });
    };
    migrated.map(|()| connection)
}

fn readers(settings: &Arc<Settings>) -> AnyPool {
    let own = Arc::clone(settings);
    AnyPoolOptions::new()
        .max_connections(MAX_READERS)
        .acquire_timeout(settings.timeout)
        .after_connect(move |connection, _| {
            let own = Arc::clone(&own);
            Box::pin(async move { own.greet(connection).await })
        })
        .connect_lazy_with(settings.url.options().clone())
}
