//! The head of an audit log, kept in the store: a row a log, so that who can write the log's folder cannot make it
//! forget how far it went.
//!
//! The log's writer is a plain thread and waits; the store is asked on a runtime, which must go on running meanwhile.
//! Knows nothing of what a log holds. Logs are told apart by their names, so nodes that share a store lie side by side. Whoever
//! saves first after having read the newest head owns the log from then on, until another does the same: a process that was
//! restarted takes over at once, and of two that write one log the earlier learns of it at its next save.
//!
//! **Invariant**: a save that was answered is committed, and follows no head that its process has not read or saved.

use std::sync::{Arc, Mutex, PoisonError, mpsc};

use futures::{FutureExt as _, future::BoxFuture};
use sqlx::{AnyConnection, Row as _};
use tokio::runtime::Handle;

use super::{Operation, Store, StoreError};
use crate::audit::{Head, HeadStore, HeadStoreError, line::Mac};

/// Which log, and who writes it.
#[derive(Clone, Copy, Debug)]
pub struct LogWriter<'a> {
    /// Its name, of which there is one a store.
    pub log: &'a str,
    /// As people call the process.
    pub writer: &'a str,
}

/// Heads of one log in a store. Clones are the same writer.
#[derive(Clone)]
pub struct StoreHeads {
    store: Store,
    runtime: Handle,
    log: String,
    writer: String,
    /// Made up for this writer.
    owner: String,
    /// The head that was there when it was loaded.
    loaded: Arc<Mutex<Option<Head>>>,
}

impl StoreHeads {
    /// `runtime` runs what is asked of the store.
    pub fn new(store: Store, runtime: Handle, LogWriter { log, writer }: LogWriter<'_>) -> Self {
        let owner = uuid::Uuid::new_v4().to_string();
        let (log, writer, loaded) = (log.to_owned(), writer.to_owned(), Arc::default());
        Self { store, runtime, log, writer, owner, loaded }
    }

    /// The head that was saved last, for who can wait without blocking.
    pub async fn newest(&self) -> Result<Option<Head>, HeadStoreError> {
        let log = self.log.clone();
        let read = self.store.read(move |connection| async move { load(connection, &log).await }.boxed());
        match read.await.map_err(|error| failed("read from", &error))? {
            None => Ok(None),
            Some(Row { seq, mac, .. }) => head(seq, &mac).map(Some),
        }
    }

    /// Runs on the runtime and waits here. Unlike `block_on` it may be called wherever blocking may.
    fn wait<T: Send + 'static>(
        &self,
        doing: &'static str,
        work: impl Future<Output = Result<T, HeadStoreError>> + Send + 'static,
    ) -> Result<T, HeadStoreError> {
        let (answer, answered) = mpsc::sync_channel(1);
        self.runtime.spawn(async move {
            // The one who waits is there until it is answered.
            let _ = answer.send(work.await);
        });
        answered.recv().unwrap_or_else(|_| {
            Err(HeadStoreError::Failed { doing, why: "the process is ending and asks it nothing more".to_owned() })
        })
    }
}

impl HeadStore for StoreHeads {
    fn load(&self) -> Result<Option<Head>, HeadStoreError> {
        let this = self.clone();
        let newest = self.wait("read from", async move { this.newest().await })?;
        *self.loaded.lock().unwrap_or_else(PoisonError::into_inner) = newest;
        Ok(newest)
    }

    fn save(&self, head: &Head) -> Result<(), HeadStoreError> {
        let loaded = *self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let (log, writer, owner) = (self.log.clone(), self.writer.clone(), self.owner.clone());
        let (store, save) = (self.store.clone(), Save { log: log.clone(), writer, owner, loaded, head: *head });
        self.wait("written to", async move {
            match store.submit(save).await.map_err(|error| failed("written to", &error))? {
                Saved::Yes => Ok(()),
                Saved::TooLarge { why } => Err(HeadStoreError::Failed { doing: "written to", why }),
                Saved::OtherWriter { writer } => Err(HeadStoreError::OtherWriter { log, writer }),
            }
        })
    }
}

fn failed(doing: &'static str, error: &StoreError) -> HeadStoreError {
    HeadStoreError::Failed { doing, why: error.to_string() }
}

fn head(seq: i64, mac: &str) -> Result<Head, HeadStoreError> {
    let seq = u64::try_from(seq).ok();
    seq.zip(Mac::parse(mac)).map(|(seq, mac)| Head { seq, mac }).ok_or_else(|| HeadStoreError::Failed {
        doing: "read from",
        why: "its row in audit_heads was changed by hand".to_owned(),
    })
}

struct Row {
    seq: i64,
    mac: String,
    owner: Option<String>,
    writer: Option<String>,
}

async fn load(connection: &mut AnyConnection, log: &str) -> Result<Option<Row>, sqlx::Error> {
    let row = sqlx::query("SELECT seq, mac, owner, writer FROM audit_heads WHERE log = $1").bind(log.to_owned());
    let row = row.fetch_optional(connection).await?;
    row.map(|row| {
        Ok(Row { seq: row.try_get(0)?, mac: row.try_get(1)?, owner: row.try_get(2)?, writer: row.try_get(3)? })
    })
    .transpose()
}

struct Save {
    log: String,
    writer: String,
    owner: String,
    loaded: Option<Head>,
    head: Head,
}

enum Saved {
    Yes,
    TooLarge { why: String },
    OtherWriter { writer: String },
}

impl Save {
    /// Whether the row is this writer's already, or still what it has read.
    fn may_follow(&self, row: Option<&Row>) -> bool {
        match (row, self.loaded) {
            (None, loaded) => loaded.is_none(),
            (Some(row), _) if row.owner.as_ref() == Some(&self.owner) => true,
            (Some(row), loaded) => loaded
                .is_some_and(|loaded| u64::try_from(row.seq) == Ok(loaded.seq) && row.mac == loaded.mac.to_string()),
        }
    }
}

impl Operation for Save {
    type Output = Saved;

    fn locks(&self) -> Vec<String> {
        vec![format!("audit_heads {}", self.log)]
    }

    fn run<'a>(&'a self, connection: &'a mut AnyConnection) -> BoxFuture<'a, Result<Self::Output, sqlx::Error>> {
        const SAVE: &str = "INSERT INTO audit_heads (log, seq, mac, owner, writer) VALUES ($1, $2, $3, $4, $5) \
                            ON CONFLICT (log) DO UPDATE SET seq = excluded.seq, mac = excluded.mac, \
                            owner = excluded.owner, writer = excluded.writer";
        async move {
            let Ok(seq) = i64::try_from(self.head.seq) else {
                let why = format!("{} is above the largest number, {}", self.head.seq, i64::MAX);
                return Ok(Saved::TooLarge { why });
            };
            let row = load(connection, &self.log).await?;
            if !self.may_follow(row.as_ref()) {
                let writer = row.and_then(|row| row.writer).unwrap_or_else(|| "whose name is not known".to_owned());
                return Ok(Saved::OtherWriter { writer });
            }
            sqlx::query(SAVE)
                .bind(self.log.clone())
                .bind(seq)
                .bind(self.head.mac.to_string())
                .bind(self.owner.clone())
                .bind(self.writer.clone())
                .execute(connection)
                .await?;
            Ok(Saved::Yes)
        }
        .boxed()
    }
}
