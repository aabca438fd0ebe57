//! SQLite on the writer's own thread, for rows.
//!
//! sqlx runs SQLite on a thread of its own, and waking it and being woken by it is most of what a row costs. Rows need nothing of
//! sqlx, so a group that holds nothing else is written here, by a second connection to the same file. Only the writer has one, and
//! it never uses both at once.
//!
//! Whatever fails here is done again by sqlx, whose errors are the ones that the store knows and tells. That is sound since a row
//! may be inserted twice.

use rusqlite::{
    Connection, OpenFlags, ToSql, Transaction, TransactionBehavior, params_from_iter,
    types::{ToSqlOutput, ValueRef},
};

use super::{
    connect::Settings,
    row::{NewRow, Value},
};

/// A connection for rows.
pub(super) struct Direct(Connection);

impl Direct {
    /// `None` where the store is no file of SQLite's that may be written, or cannot be opened now: sqlx does it all then.
    pub(super) fn open(settings: &Settings) -> Option<Self> {
        let file = settings.url.writable_file()?;
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let open = || {
            let connection = Connection::open_with_flags(file, flags)?;
            settings.greetings().iter().try_for_each(|greeting| connection.execute_batch(greeting))?;
            Ok(Self(connection))
        };
        open().inspect_err(tell).ok()
    }

    /// True once they are committed, all of them. False: perhaps they are, or none.
    pub(super) fn insert(&mut self, rows: &[&dyn NewRow]) -> bool {
        let done = match rows {
            // One statement is a transaction by itself.
            [row] => insert(&self.0, *row),
            _ => self.insert_many(rows),
        };
        done.inspect_err(tell).is_ok()
    }

    fn insert_many(&mut self, rows: &[&dyn NewRow]) -> rusqlite::Result<()> {
        // IMMEDIATE: the write lock is taken where waiting for it is safe, not in the middle. Dropped before its commit, it rolls back.
        let transaction = Transaction::new(&mut self.0, TransactionBehavior::Immediate)?;
        rows.iter().try_for_each(|row| insert(&transaction, *row))?;
        transaction.commit()
    }
}

fn insert(connection: &Connection, row: &dyn NewRow) -> rusqlite::Result<()> {
    connection.prepare_cached(row.table().insert_one())?.execute(params_from_iter(row.values()))?;
    Ok(())
}

fn tell(error: &rusqlite::Error) {
    tracing::debug!(%error, "rows go the longer way");
}

impl ToSql for Value<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        match self {
            Self::Text(text) => Ok(ToSqlOutput::Borrowed(ValueRef::Text(text.as_bytes()))),
            Self::Integer(number) => number.to_sql(),
        }
    }
}
