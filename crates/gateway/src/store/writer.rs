//! The one thread that writes, and the group commit.
//!
//! ```text
//! callers -> bounded channel -> [take all that wait] -> BEGIN, insert the rows, run each operation, COMMIT -> answer each
//! ```
//! While one commit is under way the next group gathers, so a commit's cost is shared by as many as are waiting and
//! nobody waits for more than the commit under way and his own. Nothing is delayed on purpose.
//!
//! Failures: a lost connection is made anew and the group runs once more, which is why an [`Operation`] must be
//! *idempotent* (a commit whose answer was lost may have happened); where one operation fails, the group is rolled back
//! and each runs by itself, so that nobody pays for his neighbour. Knows no table.
//!
//! **Invariant**: an operation is answered with its output only after the commit that holds it has returned.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use sqlx::{AnyConnection, Connection as _};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout},
};

use super::{
    StoreKind, connect,
    direct::Direct,
    error::{Remedy, StoreError},
    row::{self, NewRow},
};

/// At most so many operations share a commit; at it, the rest wait for the next. Bounds how long row locks are held.
pub(super) const MAX_GROUP: usize = 128;

/// How often a group is run anew because of others' transactions.
const MAX_TRIES: usize = 5;

/// While a store cannot be reached, operations are refused at once between two attempts.
const RECONNECT_AFTER: Duration = Duration::from_millis(250);

/// A step of work inside a transaction.
pub(crate) trait Operation: Send + 'static {
    /// What the caller learns. A refusal belongs in here: an `Err` of [`run`](Self::run) is a failure of the store.
    type Output: Send + 'static;

    /// Names of what several nodes change. They are locked in one order before the group runs (PostgreSQL; SQLite has
    /// one writer), so that two groups never wait for each other in a circle.
    fn locks(&self) -> Vec<String> {
        Vec::new()
    }

    /// Runs in a transaction that may be rolled back and run again. Must be idempotent, and must leave nothing behind
    /// where it refuses.
    fn run<'a>(&'a self, connection: &'a mut AnyConnection) -> BoxFuture<'a, Result<Self::Output, sqlx::Error>>;
}

/// What waits to be written, and who waits for it.
pub(super) enum Job {
    /// A row; nothing else is asked of the database.
    Row { row: Arc<dyn NewRow>, answer: oneshot::Sender<Result<(), StoreError>> },
    /// An operation of any kind.
    Operation(Box<dyn AnyOperation>),
}

impl Job {
    fn succeed(self) {
        match self {
            // Whoever asked may have left; the row is there all the same.
            Self::Row { answer, .. } => drop(answer.send(Ok(()))),
            Self::Operation(operation) => operation.succeed(),
        }
    }

    fn fail(self, error: StoreError) {
        match self {
            Self::Row { answer, .. } => drop(answer.send(Err(error))),
            Self::Operation(operation) => operation.fail(error),
        }
    }
}

/// An [`Operation`] without its type.
pub(super) trait AnyOperation: Send {
    fn locks(&self) -> Vec<String>;
    fn run<'a>(&'a mut self, connection: &'a mut AnyConnection) -> BoxFuture<'a, Result<(), sqlx::Error>>;
    fn succeed(self: Box<Self>);
    fn fail(self: Box<Self>, error: StoreError);
}

/// One kind of operation, and who waits for it.
pub(super) struct Waiting<O: Operation> {
    operation: O,
    output: Option<O::Output>,
    answer: oneshot::Sender<Result<O::Output, StoreError>>,
}

impl<O: Operation> Waiting<O> {
    pub(super) fn new(operation: O) -> (Box<Self>, oneshot::Receiver<Result<O::Output, StoreError>>) {
        let (answer, receiver) = oneshot::channel();
        (Box::new(Self { operation, output: None, answer }), receiver)
    }
}

impl<O: Operation> AnyOperation for Waiting<O> {
    fn locks(&self) -> Vec<String> {
        self.operation.locks()
    }

    fn run<'a>(&'a mut self, connection: &'a mut AnyConnection) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        Box::pin(async move {
            self.output = Some(self.operation.run(connection).await?);
            Ok(())
        })
    }

    fn succeed(self: Box<Self>) {
        let output = self.output.expect("a group succeeds after each of its operations has run");
        // Whoever asked may have left; the operation is done all the same.
        let _ = self.answer.send(Ok(output));
    }

    fn fail(self: Box<Self>, error: StoreError) {
        let _ = self.answer.send(Err(error));
    }
}

/// What the writer needs to make a connection.
#[derive(Clone)]
pub(super) struct Writer {
    pub(super) settings: Arc<connect::Settings>,
}

type Group = Vec<Job>;

/// What the writer writes through, one at a time. Made and given up together, so that both are the same file.
pub(super) struct Connections {
    /// For groups of rows alone, where the store is SQLite.
    direct: Option<Direct>,
    /// For all the rest, and for what failed there.
    all: AnyConnection,
}

impl Connections {
    /// Beside one that is ready, what else it takes.
    pub(super) fn beside(all: AnyConnection, settings: &connect::Settings) -> Self {
        Self { direct: Direct::open(settings), all }
    }
}

/// What waits to be written.
pub(super) struct Inbox {
    pub(super) jobs: mpsc::Receiver<Job>,
    /// True once nothing more is taken.
    pub(super) closing: watch::Receiver<bool>,
}

impl Inbox {
    /// The next group; empty: everything that was ever accepted has been handed out.
    async fn next(&mut self) -> Group {
        let mut group = Group::new();
        if !self.jobs.is_closed() {
            tokio::select! {
                biased;
                // Also where the last clone of the store is gone.
                _ = self.closing.wait_for(|is_closing| *is_closing) => self.jobs.close(),
                _ = self.jobs.recv_many(&mut group, MAX_GROUP) => return group,
            }
        }
        // Without waiting: who has a place reserved and sends nothing, as a task that is no longer asked, would be waited for
        // without an end.
        while group.len() < MAX_GROUP
            && let Ok(job) = self.jobs.try_recv()
        {
            group.push(job);
        }
        group
    }
}

impl Writer {
    /// Until every sender is gone or the store is closed; what was sent before is still done.
    pub(super) async fn work(self, connections: Connections, mut inbox: Inbox) {
        let mut connections = Some(connections);
        let mut down: Option<(Instant, StoreError)> = None;
        loop {
            let group = inbox.next().await;
            if group.is_empty() {
                break;
            }
            if let Some((until, error)) = &down
                && Instant::now() < *until
            {
                fail_all(group, error);
                continue;
            }
            down = match self.serve(&mut connections, group).await {
                Ok(()) => None,
                Err(error) => Some((Instant::now() + RECONNECT_AFTER, error)),
            };
        }
        if let Some(Connections { direct, all }) = connections {
            drop(direct);
            // SQLite folds its log into the file; nothing depends on it.
            let _ = timeout(self.settings.timeout, all.close()).await;
        }
    }

    /// Answers everybody in the group; an error says that the store serves nobody now.
    async fn serve(&self, connections: &mut Option<Connections>, mut group: Group) -> Result<(), StoreError> {
        match self.run_group(connections, &mut group).await {
            Ok(()) => {
                succeed_all(group);
                Ok(())
            }
            Err(Failure::Unreachable(error)) => {
                fail_all(group, &error);
                Err(error)
            }
            Err(Failure::Operation(error)) if group.len() == 1 => {
                fail_all(group, &error);
                Ok(())
            }
            Err(Failure::Operation(_)) => {
                for job in group {
                    let mut alone = vec![job];
                    match self.run_group(connections, &mut alone).await {
                        Ok(()) => succeed_all(alone),
                        Err(Failure::Operation(error) | Failure::Unreachable(error)) => fail_all(alone, &error),
                    }
                }
                Ok(())
            }
        }
    }

    /// Runs the group in one transaction, again where that may help.
    async fn run_group(&self, slot: &mut Option<Connections>, group: &mut Group) -> Result<(), Failure> {
        let mut reconnected = false;
        let mut tries = 1;
        loop {
            let mut connections = if let Some(connections) = slot.take() {
                connections
            } else {
                let all = connect::open(&self.settings).await.map_err(Failure::Unreachable)?;
                Connections::beside(all, &self.settings)
            };
            // Put back only after a commit. After a failure nobody knows whether the database has rolled back by itself
            // (SQLite does on a full disk) or is still at it; closing the connection ends either.
            let ran = timeout(self.settings.timeout, transact(&mut connections, self.settings.kind(), group)).await;
            let error = match ran {
                Ok(Ok(())) => {
                    *slot = Some(connections);
                    return Ok(());
                }
                Ok(Err(error)) => error,
                Err(_) => {
                    let why = format!("a commit took longer than {:?}", self.settings.timeout);
                    return Err(Failure::Unreachable(StoreError::Busy { store: self.settings.shown(), why }));
                }
            };
            let told = self.settings.error(&error);
            match Remedy::of(&error) {
                Remedy::Reconnect if reconnected => return Err(Failure::Unreachable(told)),
                Remedy::Reconnect => {
                    tracing::warn!(error = %told, "the store's connection was lost; making a new one");
                    reconnected = true;
                }
                Remedy::Again if tries < MAX_TRIES => tries += 1,
                Remedy::GiveUp => return Err(Failure::Unreachable(told)),
                Remedy::Again | Remedy::Apart => return Err(Failure::Operation(told)),
            }
        }
    }
}

enum Failure {
    /// No operation can be run.
    Unreachable(StoreError),
    /// One of the operations cannot.
    Operation(StoreError),
}

async fn transact(connections: &mut Connections, kind: StoreKind, group: &mut Group) -> Result<(), sqlx::Error> {
    let (mut rows, mut operations): (Vec<&dyn NewRow>, Vec<&mut dyn AnyOperation>) = Default::default();
    for job in group {
        match job {
            Job::Row { row, .. } => rows.push(&**row),
            Job::Operation(operation) => operations.push(&mut **operation),
        }
    }
    if operations.is_empty() {
        if connections.direct.as_mut().is_some_and(|direct| direct.insert(&rows)) {
            return Ok(());
        }
        // A statement is a transaction by itself, and the round trips of one around it are most of what a row costs.
        if row::statements(&rows).count() == 1 {
            return row::insert(&mut connections.all, &rows).await;
        }
    }
    // IMMEDIATE: the write lock is taken where waiting for it is safe, not in the middle.
    let begin = if kind == StoreKind::Sqlite { "BEGIN IMMEDIATE" } else { "BEGIN" };
    let mut transaction = connections.all.begin_with(begin).await?;
    if kind == StoreKind::Postgres {
        let names: BTreeSet<String> = operations.iter().flat_map(|operation| operation.locks()).collect();
        lock(&mut transaction, names).await?;
    }
    // Rows first: nothing depends on whether one that came in the same group is there.
    row::insert(&mut transaction, &rows).await?;
    for operation in operations {
        operation.run(&mut transaction).await?;
    }
    transaction.commit().await
}

/// Locks all names, in the order of their numbers, until the transaction ends.
async fn lock(connection: &mut AnyConnection, names: BTreeSet<String>) -> Result<(), sqlx::Error> {
    let numbers: BTreeSet<i64> = names.iter().map(|name| lock_number(name)).collect();
    if numbers.is_empty() {
        return Ok(());
    }
    // One statement; numbers of ours, no words of anybody's.
    let list: Vec<String> = numbers.iter().map(|number| format!("({number}::bigint)")).collect();
    let text = format!(
        "SELECT pg_advisory_xact_lock(n) FROM (SELECT n FROM (VALUES {}) AS v(n) ORDER BY n) AS o",
        list.join(", ")
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(text)).execute(connection).await?;
    Ok(())
}

/// A number for a name; two names with one number only wait for each other without need.
fn lock_number(name: &str) -> i64 {
    use sha2::{Digest as _, Sha256};
    let digest = Sha256::digest(name.as_bytes());
    i64::from_be_bytes(std::array::from_fn(|index| digest[index]))
}

fn succeed_all(group: Group) {
    for job in group {
        job.succeed();
    }
}

fn fail_all(group: Group, error: &StoreError) {
    for job in group {
        job.fail(error.clone());
    }
}
