//! How a connection to the store is made, for the writer and for readers alike.
//!
//! **Invariant**: every connection has the same settings; none is used before they are set.

use std::{sync::Arc, time::Duration};

use sqlx::{AnyConnection, Connection as _, Executor as _};
use tokio::time::{Instant, timeout};

use super::{Durability, StoreKind, StoreUrl, error::StoreError};

/// SQLite's page size; what [`Settings::max_bytes`] is counted in.
const PAGE_BYTES: u64 = 4096;

/// Between two tries to set up a file that another process is setting up.
const BUSY_PAUSE: Duration = Duration::from_millis(5);

/// What makes a connection.
pub(super) struct Settings {
    pub(super) url: StoreUrl,
    pub(super) durability: Durability,
    pub(super) max_bytes: Option<u64>,
    pub(super) timeout: Duration,
}

impl Settings {
    pub(super) fn kind(&self) -> StoreKind {
        self.url.kind()
    }

    pub(super) fn shown(&self) -> Arc<str> {
        Arc::clone(self.url.shown())
    }

    pub(super) fn error(&self, error: &sqlx::Error) -> StoreError {
        StoreError::from_sqlx(self.url.shown(), error)
    }

    /// What is said first on every connection.
    pub(super) fn greetings(&self) -> Vec<String> {
        let power_loss = self.durability == Durability::PowerLoss;
        match self.kind() {
            StoreKind::Sqlite => {
                let mut greetings = vec![
                    // First: what follows may have to wait for another process.
                    format!("PRAGMA busy_timeout = {}", self.timeout.as_millis() / 2),
                    // Readers never wait for the writer, nor it for them.
                    "PRAGMA journal_mode = WAL".to_owned(),
                    format!("PRAGMA synchronous = {}", if power_loss { "FULL" } else { "NORMAL" }),
                    // Pages of the log after which it is folded into the file: at SQLite's own 1000, that was every 300 rows.
                    "PRAGMA wal_autocheckpoint = 4000".to_owned(),
                    // The log beside the file is cut back to this once it has been folded in.
                    "PRAGMA journal_size_limit = 67108864".to_owned(),
                ];
                if let Some(bytes) = self.max_bytes {
                    greetings.push(format!("PRAGMA max_page_count = {}", (bytes / PAGE_BYTES).max(1)));
                }
                greetings
            }
            StoreKind::Postgres => {
                let half = self.timeout.as_millis() / 2;
                vec![
                    "SET application_name = 'bindery'".to_owned(),
                    "SET TIME ZONE 'UTC'".to_owned(),
                    format!("SET synchronous_commit = {}", if power_loss { "on" } else { "off" }),
                    format!("SET lock_timeout = {half}"),
                    format!("SET statement_timeout = {}", self.timeout.as_millis()),
                    // A node that hangs in a transaction must not hold the others' budgets.
                    format!("SET idle_in_transaction_session_timeout = {}", self.timeout.as_millis()),
                ]
            }
        }
    }

    /// Sets a new connection up.
    pub(super) async fn greet(&self, connection: &mut AnyConnection) -> Result<(), sqlx::Error> {
        // Like `busy_timeout`, which does not hold for all: a new file's journal is changed by a reader that becomes the
        // writer, and of two such SQLite refuses one at once (each would wait for the other for ever).
        let deadline = Instant::now() + self.timeout / 2;
        for greeting in self.greetings() {
            loop {
                let said = connection.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(greeting.clone()))).await;
                let Err(error) = said else { break };
                match self.error(&error) {
                    // A store that is opened read-only keeps the journal it has.
                    StoreError::ReadOnly { .. } if self.url.is_read_only() => break,
                    StoreError::Busy { .. } if self.kind() == StoreKind::Sqlite && Instant::now() < deadline => {
                        tokio::time::sleep(BUSY_PAUSE).await;
                    }
                    _ => return Err(error),
                }
            }
        }
        Ok(())
    }
}

/// A connection that is ready.
pub(super) async fn open(settings: &Settings) -> Result<AnyConnection, StoreError> {
    settings.url.create_file()?;
    let ready = timeout(settings.timeout, async {
        let mut connection = AnyConnection::connect_with(settings.url.options()).await?;
        settings.greet(&mut connection).await?;
        Ok(connection)
    });
    let Ok(ready) = ready.await else {
        let why = format!("it did not answer within {:?}", settings.timeout);
        return Err(StoreError::Unreachable { store: settings.shown(), why });
    };
    ready.map_err(|error| settings.error(&error))
}
