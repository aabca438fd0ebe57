//! The schema and its versions.
//!
//! Each migration is a text that is compiled in, run once, in order, in one transaction with the note that it was run.
//! A store that a newer program wrote is refused by the name of its schema: an older program could break its rules
//! without noticing. Knows no table but its own.
//!
//! **Invariant**: a migration that was released is never changed; what it made is changed by the next.

use std::sync::Arc;

use sqlx::{AnyConnection, Connection as _, Executor as _, Row as _};

use super::{StoreKind, error::StoreError};
use crate::clock::UnixMillis;

/// Version, name, text. Versions count from one without a hole.
const MIGRATIONS: &[(i64, &str, &str)] = &[
    (1, "keys_and_ledger", include_str!("migrations/0001_keys_and_ledger.sql")),
    (2, "audit_heads", include_str!("migrations/0002_audit_heads.sql")),
    (3, "key_grants", include_str!("migrations/0003_key_grants.sql")),
    (4, "audit_writers", include_str!("migrations/0004_audit_writers.sql")),
    (5, "costs_by_time", include_str!("migrations/0005_costs_by_time.sql")),
    (6, "estimates", include_str!("migrations/0006_estimates.sql")),
];

/// Bindery's own, so that two nodes that start at once migrate one after the other (PostgreSQL).
const MIGRATION_LOCK: &str = "SELECT pg_advisory_xact_lock(7236837219837)";

/// Brings the store to this program's schema, or refuses it.
pub(super) async fn migrate(
    connection: &mut AnyConnection,
    kind: StoreKind,
    store: &Arc<str>,
) -> Result<(), StoreError> {
    let failed = |error: sqlx::Error| StoreError::from_sqlx(store, &error);
    if kind == StoreKind::Sqlite {
        refuse_foreign(connection, store).await?;
        // A store of today needs no write lock to be opened (`costs` on a store that is in use, or read-only).
        if version_without_lock(connection, store).await? {
            return Ok(());
        }
    }
    let begin = if kind == StoreKind::Sqlite { "BEGIN IMMEDIATE" } else { "BEGIN" };
    let mut transaction = connection.begin_with(begin).await.map_err(failed)?;
    if kind == StoreKind::Postgres {
        transaction.execute(MIGRATION_LOCK).await.map_err(failed)?;
    }
    transaction
        .execute(
            "CREATE TABLE IF NOT EXISTS bindery_schema \
             (version BIGINT NOT NULL PRIMARY KEY, name TEXT NOT NULL, applied_at BIGINT NOT NULL)",
        )
        .await
        .map_err(failed)?;
    let found = newest(&mut transaction).await.map_err(failed)?;
    refuse_newer(store, found.clone())?;
    let found = found.map_or(0, |(version, _)| version);
    for (version, name, text) in MIGRATIONS.iter().filter(|(version, ..)| *version > found) {
        transaction.execute(sqlx::raw_sql(*text)).await.map_err(failed)?;
        sqlx::query("INSERT INTO bindery_schema (version, name, applied_at) VALUES ($1, $2, $3)")
            .bind(*version)
            .bind(*name)
            .bind(UnixMillis::now().0)
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
    }
    transaction.commit().await.map_err(failed)
}

/// Whether the schema is this program's.
async fn version_without_lock(connection: &mut AnyConnection, store: &Arc<str>) -> Result<bool, StoreError> {
    let failed = |error: sqlx::Error| StoreError::from_sqlx(store, &error);
    let exists = connection
        .fetch_optional("SELECT name FROM sqlite_master WHERE type = 'table' AND name = 'bindery_schema'")
        .await
        .map_err(failed)?;
    if exists.is_none() {
        return Ok(false);
    }
    let found = newest(connection).await.map_err(failed)?;
    refuse_newer(store, found.clone())?;
    Ok(found.is_some_and(|(version, _)| version == MIGRATIONS.len() as i64))
}

async fn newest(connection: &mut AnyConnection) -> Result<Option<(i64, String)>, sqlx::Error> {
    let row =
        connection.fetch_optional("SELECT version, name FROM bindery_schema ORDER BY version DESC LIMIT 1").await?;
    row.map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).transpose()
}

fn refuse_newer(store: &Arc<str>, found: Option<(i64, String)>) -> Result<(), StoreError> {
    let known = MIGRATIONS.len() as i64;
    match found {
        Some((found, name)) if found > known => {
            Err(StoreError::NewerSchema { store: Arc::clone(store), found, name, known })
        }
        _ => Ok(()),
    }
}

/// A file that holds somebody else's tables is not ours to add to.
async fn refuse_foreign(connection: &mut AnyConnection, store: &Arc<str>) -> Result<(), StoreError> {
    let rows = connection
        .fetch_all("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' LIMIT 1000")
        .await
        .map_err(|error| StoreError::from_sqlx(store, &error))?;
    let names: Vec<String> = rows.iter().filter_map(|row| row.try_get(0).ok()).collect();
    match names.first() {
        Some(table) if !names.iter().any(|name| name == "bindery_schema") => {
            Err(StoreError::Foreign { store: Arc::clone(store), table: table.clone() })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn migrations_count_from_one_without_a_hole() {
        for (index, (version, name, text)) in MIGRATIONS.iter().enumerate() {
            assert_eq!(*version, index as i64 + 1);
            assert!(!name.is_empty() && !text.is_empty());
        }
    }
}
