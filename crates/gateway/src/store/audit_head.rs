//! The head of an audit log, kept in the store: a row a log, so that who can write the log's folder cannot make it
//! forget how far it went.
//!
//! The log's writer is a plain thread and waits; the store is asked on a runtime, which must go on running meanwhile.
//! Knows nothing of what a log holds. Logs are told apart by their folder as it is configured: nodes that share a store
//! need folders of different names.
//!
//! **Invariant**: a save that was answered is committed.

use std::sync::mpsc;

use futures::{FutureExt as _, future::BoxFuture};
use sqlx::{AnyConnection, Row as _};
use tokio::runtime::Handle;

use super::{Operation, Store, StoreError};
use crate::audit::{Head, HeadStore, HeadStoreError, line::Mac};

/// Heads of one log in a store.
#[derive(Clone)]
pub struct StoreHeads {
    store: Store,
    runtime: Handle,
    log: String,
}

impl StoreHeads {
    /// `log` is the folder's path as it is configured; `runtime` runs what is asked of the store.
    pub fn new(store: Store, runtime: Handle, log: &std::path::Path) -> Self {
        Self { store, runtime, log: log.to_string_lossy().into_owned() }
    }

    /// The head that was saved last, for who can wait without blocking.
    pub async fn newest(&self) -> Result<Option<Head>, HeadStoreError> {
        let log = self.log.clone();
        let read = self.store.read(move |connection| async move { load(connection, &log).await }.boxed());
        match read.await.map_err(|error| failed("read from", &error))? {
            None => Ok(None),
            Some((seq, mac)) => head(seq, &mac).map(Some),
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
            Err(HeadStoreError { doing, why: "the process is ending and asks it nothing more".to_owned() })
        })
    }
}

impl HeadStore for StoreHeads {
    fn load(&self) -> Result<Option<Head>, HeadStoreError> {
        let this = self.clone();
        self.wait("read from", async move { this.newest().await })
    }

    fn save(&self, head: &Head) -> Result<(), HeadStoreError> {
        let (store, save) = (self.store.clone(), Save { log: self.log.clone(), head: *head });
        self.wait("written to", async move {
            store
                .submit(save)
                .await
                .map_err(|error| failed("written to", &error))?
                .map_err(|why| HeadStoreError { doing: "written to", why })
        })
    }
}

fn failed(doing: &'static str, error: &StoreError) -> HeadStoreError {
    HeadStoreError { doing, why: error.to_string() }
}

fn head(seq: i64, mac: &str) -> Result<Head, HeadStoreError> {
    let seq = u64::try_from(seq).ok();
    seq.zip(Mac::parse(mac)).map(|(seq, mac)| Head { seq, mac }).ok_or_else(|| HeadStoreError {
        doing: "read from",
        why: "its row in audit_heads was changed by hand".to_owned(),
    })
}

async fn load(connection: &mut AnyConnection, log: &str) -> Result<Option<(i64, String)>, sqlx::Error> {
    let row = sqlx::query("SELECT seq, mac FROM audit_heads WHERE log = $1").bind(log.to_owned());
    let row = row.fetch_optional(connection).await?;
    row.map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).transpose()
}

struct Save {
    log: String,
    head: Head,
}

impl Operation for Save {
    type Output = Result<(), String>;

    fn run<'a>(&'a self, connection: &'a mut AnyConnection) -> BoxFuture<'a, Result<Self::Output, sqlx::Error>> {
        const SAVE: &str = "INSERT INTO audit_heads (log, seq, mac) VALUES ($1, $2, $3) \
                            ON CONFLICT (log) DO UPDATE SET seq = excluded.seq, mac = excluded.mac";
        async move {
            let Ok(seq) = i64::try_from(self.head.seq) else {
                return Ok(Err(format!("{} is above the largest number, {}", self.head.seq, i64::MAX)));
            };
            let mac = self.head.mac.to_string();
            sqlx::query(SAVE).bind(self.log.clone()).bind(seq).bind(mac).execute(connection).await?;
            Ok(Ok(()))
        }
        .boxed()
    }
}
