//! The newest record's number and HMAC, kept where whoever can write the log cannot.
//!
//! **Invariant**: a saved head names a record that is on disk, so a log that ends before it was cut.

use std::sync::{Arc, Mutex, PoisonError};

use super::line::Mac;

/// The newest record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its number.
    pub seq: u64,
    /// Its HMAC.
    pub mac: Mac,
}

/// The head could not be read or saved.
#[derive(Debug, thiserror::Error)]
pub enum HeadStoreError {
    /// The store has failed.
    #[error("its head cannot be {doing} the store: {why}; see to the store")]
    Failed {
        /// `read from` or `written to`.
        doing: &'static str,
        /// The store's reason.
        why: String,
    },
    /// Somebody else has saved a head of this log since this process read it.
    #[error(
        "another process ({writer}) writes the log {log} now, so this one writes it no more; give each node a folder and a \
         `[audit] name` of its own, and restart"
    )]
    OtherWriter {
        /// Its name in the store.
        log: String,
        /// As that process calls itself.
        writer: String,
    },
}

/// Where the head is kept. Called by the writer's thread, which may block.
pub trait HeadStore: Send {
    /// The head that was saved last; none where no log was begun.
    fn load(&self) -> Result<Option<Head>, HeadStoreError>;

    /// Replaces it, durably; refused where another process has replaced it since it was loaded.
    fn save(&self, head: &Head) -> Result<(), HeadStoreError>;
}

/// Forgets it with the process: for tests, and where truncation need not show.
#[derive(Clone, Debug, Default)]
pub struct MemoryHeadStore(Arc<Mutex<Option<Head>>>);

impl MemoryHeadStore {
    /// What was saved last.
    pub fn head(&self) -> Option<Head> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HeadStore for MemoryHeadStore {
    fn load(&self) -> Result<Option<Head>, HeadStoreError> {
        Ok(self.head())
    }

    fn save(&self, head: &Head) -> Result<(), HeadStoreError> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(*head);
        Ok(())
    }
}
