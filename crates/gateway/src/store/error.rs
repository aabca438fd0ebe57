//! What can go wrong with the store, by what the reader can do about it.
//!
//! Every text names the store (its password hidden) and [`StoreError::hint`] is the next step. Clonable, since all who
//! waited for one commit learn of the same failure.
//!
//! **Invariant**: no text holds a password: the store is only ever named by [`StoreUrl`](super::StoreUrl)'s `Display`.

use std::sync::Arc;

/// Errors of the store.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// `[store] url` cannot be used.
    #[error("the store's URL `{url}` cannot be used: {why}")]
    BadUrl {
        /// As given, its password hidden.
        url: String,
        /// What is wrong.
        why: String,
    },
    /// It cannot be opened or reached.
    #[error("the store {store} cannot be reached: {why}")]
    Unreachable {
        /// Which.
        store: Arc<str>,
        /// The database's words.
        why: String,
    },
    /// No write is allowed.
    #[error("the store {store} cannot be written to: {why}")]
    ReadOnly {
        /// Which.
        store: Arc<str>,
        /// The database's words.
        why: String,
    },
    /// No room.
    #[error("the store {store} is full: {why}")]
    Full {
        /// Which.
        store: Arc<str>,
        /// The database's words.
        why: String,
    },
    /// The file is damaged, or no database.
    #[error("the store {store} is damaged or not a database: {why}")]
    Corrupt {
        /// Which.
        store: Arc<str>,
        /// The database's words.
        why: String,
    },
    /// A database of something else.
    #[error("the store {store} holds tables of something else ({table}) and none of Bindery's")]
    Foreign {
        /// Which.
        store: Arc<str>,
        /// One of its tables.
        table: String,
    },
    /// Written by a newer program.
    #[error("the store {store} has schema {found} (`{name}`), and this program knows schemas up to {known}")]
    NewerSchema {
        /// Which.
        store: Arc<str>,
        /// In the store.
        found: i64,
        /// That schema's name.
        name: String,
        /// The newest of this program.
        known: i64,
    },
    /// Too many wait.
    #[error("the store {store} did not keep up: {why}")]
    Busy {
        /// Which.
        store: Arc<str>,
        /// Which bound was met.
        why: String,
    },
    /// The writer is gone.
    #[error("the store {store} is closed")]
    Closed {
        /// Which.
        store: Arc<str>,
    },
    /// What the database refused for a reason that is nobody's but ours.
    #[error("the store {store} refused a statement: {why}")]
    Statement {
        /// Which.
        store: Arc<str>,
        /// The database's words.
        why: String,
    },
}

/// How the writer goes on after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remedy {
    /// The connection is of no more use; another may be.
    Reconnect,
    /// Two transactions were in each other's way: the same again.
    Again,
    /// One operation is at fault, or takes the last room: each by itself.
    Apart,
    /// The store is at fault: every operation would wait for the same failure.
    GiveUp,
}

impl StoreError {
    /// The next step for the person who reads the error.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::BadUrl { .. } => "write [store] url as sqlite://FILE or postgres://USER:PASSWORD@HOST/DATABASE",
            Self::Unreachable { .. } => {
                "check that the folder exists and is yours (SQLite), or host, port, user, password and network (PostgreSQL)"
            }
            Self::ReadOnly { .. } => {
                "let the user that runs Bindery write to the file and to its folder (SQLite keeps two more files beside it)"
            }
            Self::Full { .. } => "free some space or raise [store] max_bytes; until then what costs money is refused",
            Self::Corrupt { .. } => {
                "restore the file from a backup, or move it away to begin with an empty one (its keys and its ledger are then gone)"
            }
            Self::Foreign { .. } => "name another file or database in [store] url",
            Self::NewerSchema { .. } => "run the version of Bindery that wrote it, or a newer one",
            Self::Busy { .. } => {
                "send fewer requests at once, or put the store on a faster disk; end any other program that keeps it locked"
            }
            Self::Closed { .. } => "the server is stopping; ask again once it has started",
            Self::Statement { .. } => "this is a bug in Bindery or a store that was changed by hand; please report it",
        }
    }

    /// Whether the same operation may succeed later without anyone changing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Busy { .. } | Self::Full { .. })
    }

    /// From what the driver says.
    pub(super) fn from_sqlx(store: &Arc<str>, error: &sqlx::Error) -> Self {
        let (store, why) = (Arc::clone(store), words(error));
        let Some(code) = code(error) else {
            return match error {
                sqlx::Error::PoolTimedOut => Self::Busy { store, why: "every connection is in use".to_owned() },
                _ if is_about_the_connection(error) => Self::Unreachable { store, why },
                _ => Self::Statement { store, why },
            };
        };
        match (code.len(), code.parse::<i32>().map(|code| code & 0xff)) {
            // PostgreSQL's codes have five characters, SQLite's are numbers of at most four.
            (5, _) => match code.as_str() {
                "53100" | "53200" => Self::Full { store, why },
                "25006" | "42501" => Self::ReadOnly { store, why },
                "XX001" | "XX002" => Self::Corrupt { store, why },
                "40001" | "40P01" | "55P03" => Self::Busy { store, why },
                code if ["08", "28", "3D", "53", "57"].iter().any(|class| code.starts_with(class)) => {
                    Self::Unreachable { store, why }
                }
                _ => Self::Statement { store, why },
            },
            (_, Ok(SQLITE_FULL)) => Self::Full { store, why },
            (_, Ok(SQLITE_READONLY | SQLITE_PERM)) => Self::ReadOnly { store, why },
            (_, Ok(SQLITE_CORRUPT | SQLITE_NOTADB)) => Self::Corrupt { store, why },
            (_, Ok(SQLITE_BUSY | SQLITE_LOCKED)) => Self::Busy { store, why },
            (_, Ok(SQLITE_CANTOPEN | SQLITE_IOERR)) => Self::Unreachable { store, why },
            _ => Self::Statement { store, why },
        }
    }
}

// https://www.sqlite.org/rescode.html
const SQLITE_PERM: i32 = 3;
const SQLITE_BUSY: i32 = 5;
const SQLITE_LOCKED: i32 = 6;
const SQLITE_READONLY: i32 = 8;
const SQLITE_IOERR: i32 = 10;
const SQLITE_CORRUPT: i32 = 11;
const SQLITE_FULL: i32 = 13;
const SQLITE_CANTOPEN: i32 = 14;
const SQLITE_NOTADB: i32 = 26;

impl Remedy {
    pub(super) fn of(error: &sqlx::Error) -> Self {
        if is_about_the_connection(error) {
            return Self::Reconnect;
        }
        let Some(code) = code(error) else { return Self::Apart };
        if code.len() == 5 {
            return match code.as_str() {
                "40001" | "40P01" => Self::Again,
                // Others held a lock, or a statement ran, for as long as is waited.
                "55P03" | "57014" => Self::GiveUp,
                code if code.starts_with("08") || code.starts_with("57P") || code.starts_with("25P") => Self::Reconnect,
                _ => Self::Apart,
            };
        }
        match code.parse::<i32>().map(|code| code & 0xff) {
            Ok(
                SQLITE_BUSY | SQLITE_LOCKED | SQLITE_READONLY | SQLITE_IOERR | SQLITE_CORRUPT | SQLITE_CANTOPEN
                | SQLITE_NOTADB,
            ) => Self::GiveUp,
            _ => Self::Apart,
        }
    }
}

fn code(error: &sqlx::Error) -> Option<String> {
    error.as_database_error().and_then(sqlx::error::DatabaseError::code).map(std::borrow::Cow::into_owned)
}

fn is_about_the_connection(error: &sqlx::Error) -> bool {
    use sqlx::Error::{Io, PoolClosed, PoolTimedOut, Protocol, Tls, WorkerCrashed};
    matches!(error, Io(_) | Tls(_) | Protocol(_) | PoolTimedOut | PoolClosed | WorkerCrashed)
}

/// The database's own words where it spoke, the driver's otherwise.
fn words(error: &sqlx::Error) -> String {
    error.as_database_error().map_or_else(|| error.to_string(), |error| error.message().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_connection_is_told_from_a_refused_statement() {
        let lost = sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
        assert_eq!(Remedy::of(&lost), Remedy::Reconnect);
        assert_eq!(Remedy::of(&sqlx::Error::RowNotFound), Remedy::Apart);
        let store: Arc<str> = "sqlite://x.db".into();
        let error = StoreError::from_sqlx(&store, &lost);
        assert!(matches!(error, StoreError::Unreachable { .. }) && error.to_string().contains("sqlite://x.db"));
        assert!(error.is_transient() && !error.hint().is_empty());
        assert!(!StoreError::from_sqlx(&store, &sqlx::Error::RowNotFound).is_transient());
    }
}
