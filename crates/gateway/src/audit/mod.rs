//! Who asked what of whom, in a log that shows when it was touched.
//!
//! The log is a folder of JSONL segments. Every record is one line, written by one call, and ends in an HMAC-SHA256 over all its
//! other bytes, among them its number and the HMAC of the record before. The key lies outside the folder, and the newest
//! record's number and HMAC (the [`Head`]) in a store outside it, so that neither an edit nor a log cut short or written anew passes
//! [`mod@verify`]. Prompts and answers are kept where a policy says so, encrypted.
//!
//! Reading order: [`record`] what is said, [`mod@line`] its bytes, [`key`] and [`head`] what lies outside, [`folder`] files, [`journal`]
//! appending, rotation, retention and repair, [`writer`] the thread that does it, [`scan`], [`mod@verify`] and [`mod@export`] reading. Knows no HTTP, no
//! engine and no database.
//!
//! **Invariant**: bytes that were acknowledged are never written again; segments go only after a record that says so.

pub mod config;
pub mod export;
mod folder;
pub mod head;
pub mod journal;
pub mod key;
pub mod line;
pub mod record;
mod scan;
pub mod verify;
pub mod writer;

#[cfg(test)]
mod tests;

use std::{io, path::PathBuf};

pub(crate) use self::folder::has_segments;
pub use self::{
    config::AuditConfig,
    export::{ExportFilter, ExportFormat, export},
    head::{Head, HeadStore, HeadStoreError, MemoryHeadStore},
    journal::{Fsync, Journal, JournalConfig, Retention},
    key::{AuditKey, ContentsKey, ContentsKeys},
    record::{AdapterUsed, Contents, ModelUsed, RequestRecord, RouteTaken, TokenCounts},
    verify::{Problem, Report, verify},
    writer::{Audit, Kept, Pending},
};

/// What went wrong with the log.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The disk.
    #[error("audit log: cannot {doing} {path}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// Where.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The log does not fit the key or the head.
    #[error(
        "audit log: {problem}. Nothing is appended to a log that was touched: run `bindery audit verify`; to begin a new one, move \
         the folder away and run `bindery audit forget-head`"
    )]
    Touched {
        /// The first that was found.
        problem: Problem,
    },
    /// The store knows it and the folder has nothing of it.
    #[error(
        "audit log: record {seq} was written, and {path} has no record: the log was moved or emptied, or another node writes one \
         of the same name (then give each its own `[audit] name`). If it was meant to go, `bindery audit forget-head` begins it anew"
    )]
    Vanished {
        /// The newest record that the store knows.
        seq: u64,
        /// The folder.
        path: PathBuf,
    },
    /// It cannot be begun anew where it is.
    #[error("audit log: {path} has records, and a log that is there is not begun anew; move the folder away first")]
    StillThere {
        /// The folder.
        path: PathBuf,
    },
    /// It cannot be begun anew where no other is known.
    #[error("audit log: the store knows no head of it, so there is nothing to forget; a server begins it")]
    NothingToForget,
    /// Another process has it.
    #[error("audit log: {path} is in use by another process; give each its own `[audit] path`")]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// A key.
    #[error("audit log: {0}")]
    Key(String),
    /// The store of the head.
    #[error("audit log: {0}")]
    Head(#[from] HeadStoreError),
    /// A record that cannot be written.
    #[error(
        "audit log: a record of {bytes} bytes is longer than {max}; keep less of the contents (`max_contents_bytes`)"
    )]
    RecordTooLong {
        /// Its length.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The queue.
    #[error("audit log: {max} records wait to be written already; is the disk slow? Raise `max_queued` or wait")]
    QueueFull {
        /// The limit.
        max: usize,
    },
    /// A write failed before and its rest could not be taken back.
    #[error("audit log: a write failed and could not be taken back; free the disk and restart, which repairs the log")]
    Broken,
    /// The thread is gone.
    #[error("audit log: its writer has ended; restart")]
    WriterGone,
    /// A value that cannot be used.
    #[error("audit log: {0}")]
    Config(String),
}

impl AuditError {
    fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }
}
