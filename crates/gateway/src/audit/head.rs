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

/// The store has failed.
#[derive(Debug, thiserror::Error)]
#[error("its head cannot be {doing} the store: {why}; see to the store")]
pub struct HeadStoreError {
    /// `read from` or `written to`.
    pub doing: &'static str,
    /// The store's reason.
    pub why: String,
}

/// Where the head is kept. Called by the writer's thread, which may block.
pub trait HeadStore: Send {
    /// The head that was saved last; none where no log was begun.
    fn load(&self) -> Result<Option<Head>, HeadStoreError>;

    /// Replaces it, durably.
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
