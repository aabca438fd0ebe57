//! The keys in the store: made, listed, revoked, rotated.
//!
//! Each change takes the next number of a counter and is marked with it, so that a process that knows number N asks for
//! what is above N and misses nothing: the counter's row is locked until the change is committed.
//!
//! **Invariant**: a row is never deleted and `revoked_at`, once set, never changes.

use std::time::Duration;

use futures::{FutureExt as _, future::BoxFuture};
use sqlx::{AnyConnection, Row as _, any::AnyRow};

use super::{ApiKey, KeyError, KeyGrant};
use crate::{
    clock::UnixMillis,
    limits::RateLimits,
    names::{KeyId, TenantId},
    store::{Operation, Store},
};

/// Keys that are neither revoked nor expired; at it, no more are made. They are held in memory by every process.
pub const MAX_LIVE_KEYS: i64 = 100_000;

/// Rows read at once.
const PAGE_ROWS: i64 = 256;

const LOCK: &str = "api_keys";

/// What is known of a key. Never the key.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct KeyInfo {
    /// Its public part.
    pub id: String,
    /// Whose it is.
    pub tenant: String,
    /// What its maker calls it; may be empty.
    pub name: String,
    /// Milliseconds since 1970, as all times here.
    pub created_at: i64,
    /// From then on it opens nothing.
    pub expires_at: Option<i64>,
    /// Since then it opens nothing.
    pub revoked_at: Option<i64>,
    /// What replaced it.
    pub successor: Option<String>,
    /// What it may use beside what its tenant may. None: its row was changed by hand, and it opens nothing.
    #[serde(flatten)]
    pub grant: Option<KeyGrant>,
}

/// A key that is to be made.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// Whose.
    pub tenant: TenantId,
    /// For people; may be empty.
    pub name: String,
    /// None: never.
    pub expires_at: Option<UnixMillis>,
    /// What it may use beside what its tenant may.
    pub grant: KeyGrant,
}

/// How a key is replaced.
#[derive(Clone, Debug)]
pub struct Rotation {
    /// The old one.
    pub id: KeyId,
    /// So long both open.
    pub overlap: Duration,
    /// When the new one ends. None: never.
    pub expires_at: Option<UnixMillis>,
}

/// Makes a key. It is returned in the clear and nowhere kept.
pub async fn create(store: &Store, new: NewKey, now: UnixMillis) -> Result<ApiKey, KeyError> {
    if new.name.len() > crate::names::MAX_NAME_BYTES || new.name.chars().any(char::is_control) {
        return Err(KeyError::BadName);
    }
    if new.expires_at.is_some_and(|end| end <= now) {
        return Err(KeyError::EndsBeforeItBegins);
    }
    new.grant.check()?;
    let key = ApiKey::generate()?;
    store.submit(Create { key: key.clone(), new, now }).await??;
    Ok(key)
}

/// Ends a key. Every process knows within a second. Says when it was revoked, which may have been before.
pub async fn revoke(store: &Store, id: &KeyId, now: UnixMillis) -> Result<UnixMillis, KeyError> {
    store.submit(Revoke { id: id.clone(), now }).await?
}

/// Replaces a key by a new one of the same tenant, name, limits and lists.
pub async fn rotate(store: &Store, rotation: Rotation, now: UnixMillis) -> Result<ApiKey, KeyError> {
    if rotation.expires_at.is_some_and(|end| end <= now) {
        return Err(KeyError::EndsBeforeItBegins);
    }
    let key = ApiKey::generate()?;
    store.submit(Rotate { key: key.clone(), rotation, now }).await??;
    Ok(key)
}

/// All keys, the oldest first; at most a hundred thousand.
pub async fn list(store: &Store) -> Result<Vec<KeyInfo>, KeyError> {
    const ALL: &str = "SELECT id, tenant, name, created_at, expires_at, revoked_at, successor, requests_per_minute, \
                       tokens_per_minute, concurrent, models, adapters FROM api_keys ORDER BY created_at, id LIMIT 100000";
    let read = store.read(|connection| {
        async move { sqlx::query(ALL).fetch_all(connection).await?.iter().map(info).collect::<Result<Vec<_>, _>>() }
            .boxed()
    });
    Ok(read.await?)
}

fn info(row: &AnyRow) -> Result<KeyInfo, sqlx::Error> {
    Ok(KeyInfo {
        id: row.try_get(0)?,
        tenant: row.try_get(1)?,
        name: row.try_get(2)?,
        created_at: row.try_get(3)?,
        expires_at: row.try_get(4)?,
        revoked_at: row.try_get(5)?,
        successor: row.try_get(6)?,
        grant: StoredGrant::of(row, 7)?.read(),
    })
}

/// A grant as it lies in the store.
pub(super) struct StoredGrant {
    limits: [Option<i64>; 3],
    lists: [Option<String>; 2],
}

impl StoredGrant {
    /// From five columns, the first of them at `at`.
    fn of(row: &AnyRow, at: usize) -> Result<Self, sqlx::Error> {
        Ok(Self {
            limits: [row.try_get(at)?, row.try_get(at + 1)?, row.try_get(at + 2)?],
            lists: [row.try_get(at + 3)?, row.try_get(at + 4)?],
        })
    }

    fn write(grant: &KeyGrant) -> Self {
        // A limit that no number of the store holds is none that anybody meets.
        let number = |limit: Option<u64>| limit.map(|limit| i64::try_from(limit).unwrap_or(i64::MAX));
        let list = |names: &Option<Vec<String>>| names.as_ref().map(|names| serde_json::json!(names).to_string());
        let RateLimits { requests_per_minute, tokens_per_minute, concurrent } = grant.limits;
        Self {
            limits: [number(requests_per_minute), number(tokens_per_minute), concurrent.map(i64::from)],
            lists: [list(&grant.models), list(&grant.adapters)],
        }
    }

    /// None: changed by hand into what is none.
    pub(super) fn read(&self) -> Option<KeyGrant> {
        let number = |limit: Option<i64>| limit.map(u64::try_from).transpose().ok();
        let list = |names: &Option<String>| names.as_deref().map(serde_json::from_str).transpose().ok();
        let [requests, tokens, concurrent] = self.limits;
        let limits = RateLimits {
            requests_per_minute: number(requests)?,
            tokens_per_minute: number(tokens)?,
            concurrent: concurrent.map(u32::try_from).transpose().ok()?,
        };
        Some(KeyGrant { limits, models: list(&self.lists[0])?, adapters: list(&self.lists[1])? })
    }
}

/// What a process keeps of a key.
pub(super) struct CachedRow {
    pub(super) id: String,
    pub(super) tenant: String,
    pub(super) digest: String,
    pub(super) expires_at: Option<i64>,
    pub(super) revoked_at: Option<i64>,
    pub(super) changed: i64,
    pub(super) grant: StoredGrant,
}

/// What changed after the change `known`, oldest first. Reads little where nothing did.
pub(super) async fn changed_since(store: &Store, known: i64) -> Result<Vec<CachedRow>, KeyError> {
    const COUNTER: &str = "SELECT counter FROM changes WHERE name = 'api_keys'";
    const PAGE: &str = "SELECT id, tenant, digest, expires_at, revoked_at, changed, requests_per_minute, \
                        tokens_per_minute, concurrent, models, adapters FROM api_keys \
                        WHERE changed > $1 OR (changed = $1 AND id > $2) ORDER BY changed, id LIMIT $3";
    let read = store.read(move |connection| {
        async move {
            let counter: i64 = sqlx::query(COUNTER).fetch_one(&mut *connection).await?.try_get(0)?;
            let mut rows: Vec<CachedRow> = Vec::new();
            if counter == known {
                return Ok(rows);
            }
            loop {
                let (changed, id) = rows.last().map_or((known + 1, String::new()), |row| (row.changed, row.id.clone()));
                let page = sqlx::query(PAGE).bind(changed).bind(id).bind(PAGE_ROWS).fetch_all(&mut *connection).await?;
                for row in &page {
                    rows.push(cached(row)?);
                }
                if page.len() < PAGE_ROWS as usize {
                    return Ok(rows);
                }
            }
        }
        .boxed()
    });
    Ok(read.await?)
}

fn cached(row: &AnyRow) -> Result<CachedRow, sqlx::Error> {
    Ok(CachedRow {
        id: row.try_get(0)?,
        tenant: row.try_get(1)?,
        digest: row.try_get(2)?,
        expires_at: row.try_get(3)?,
        revoked_at: row.try_get(4)?,
        changed: row.try_get(5)?,
        grant: StoredGrant::of(row, 6)?,
    })
}

/// The number of this change.
async fn next_change(connection: &mut AnyConnection) -> Result<i64, sqlx::Error> {
    const NEXT: &str = "UPDATE changes SET counter = counter + 1 WHERE name = 'api_keys' RETURNING counter";
    sqlx::query(NEXT).fetch_one(connection).await?.try_get(0)
}

async fn insert(
    connection: &mut AnyConnection,
    key: &ApiKey,
    new: &NewKey,
    now: UnixMillis,
) -> Result<(), sqlx::Error> {
    let changed = next_change(connection).await?;
    let StoredGrant { limits: [requests, tokens, concurrent], lists: [models, adapters] } =
        StoredGrant::write(&new.grant);
    sqlx::query(
        "INSERT INTO api_keys (id, tenant, name, digest, created_at, expires_at, revoked_at, successor, changed, \
         requests_per_minute, tokens_per_minute, concurrent, models, adapters) \
         VALUES ($1, $2, $3, $4, $5, $6, NULL, NULL, $7, $8, $9, $10, $11, $12)",
    )
    .bind(key.id_str().to_owned())
    .bind(new.tenant.as_str().to_owned())
    .bind(new.name.clone())
    .bind(data_encoding::HEXLOWER.encode(&key.digest()))
    .bind(now.0)
    .bind(new.expires_at.map(|end| end.0))
    .bind(changed)
    .bind(requests)
    .bind(tokens)
    .bind(concurrent)
    .bind(models)
    .bind(adapters)
    .execute(connection)
    .await?;
    Ok(())
}

/// Whether the key is there already: the transaction that made it was committed and its answer lost.
async fn exists(connection: &mut AnyConnection, key: &ApiKey) -> Result<bool, sqlx::Error> {
    let row = sqlx::query("SELECT 1 FROM api_keys WHERE id = $1").bind(key.id_str().to_owned());
    Ok(row.fetch_optional(connection).await?.is_some())
}

/// Whether one more would be too many.
async fn is_full(connection: &mut AnyConnection, now: UnixMillis) -> Result<bool, sqlx::Error> {
    const LIVE: &str = "SELECT CAST(COUNT(*) AS BIGINT) FROM api_keys \
                        WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > $1)";
    let live: i64 = sqlx::query(LIVE).bind(now.0).fetch_one(connection).await?.try_get(0)?;
    Ok(live >= MAX_LIVE_KEYS)
}

struct Create {
    key: ApiKey,
    new: NewKey,
    now: UnixMillis,
}

impl Operation for Create {
    type Output = Result<(), KeyError>;

    fn locks(&self) -> Vec<String> {
        vec![LOCK.to_owned()]
    }

    fn run<'a>(&'a self, connection: &'a mut AnyConnection) -> BoxFuture<'a, Result<Self::Output, sqlx::Error>> {
        async move {
            if exists(connection, &self.key).await? {
                return Ok(Ok(()));
            }
            if is_full(connection, self.now).await? {
                return Ok(Err(KeyError::TooMany));
            }
            insert(connection, &self.key, &self.new, self.now).await.map(Ok)
        }
        .boxed()
    }
}

struct Revoke {
    id: KeyId,
    now: UnixMillis,
}

impl Operation for Revoke {
    type Output = Result<UnixMillis, KeyError>;

    fn locks(&self) -> Vec<String> {
        vec![LOCK.to_owned()]
    }

    fn run<'a>(&'a self, connection: &'a mut AnyConnection) -> BoxFuture<'a, Result<Self::Output, sqlx::Error>> {
        async move {
            let id = self.id.as_str().to_owned();
            let found = sqlx::query("SELECT revoked_at FROM api_keys WHERE id = $1").bind(id.clone());
            let Some(row) = found.fetch_optional(&mut *connection).await? else {
                return Ok(Err(KeyError::NoSuchKey(self.id.clone())));
            };
            if let Some(before) = row.try_get::<Option<i64>, _>(0)? {
                return Ok(Ok(UnixMillis(before)));
            }
            let changed = next_change(connection).await?;
            sqlx::query("UPDATE api_keys SET revoked_at = $1, changed = $2 WHERE id = $3")
                .bind(self.now.0)
                .bind(changed)
                .bind(id)
                .execute(connection)
                .await?;
            Ok(Ok(self.now))
        }
        .boxed()
    }
}

struct Rotate {
    key: ApiKey,
    rotation: Rotation,
    now: UnixMillis,
}

impl Operation for Rotate {
    type Output = Result<(), KeyError>;

    fn locks(&self) -> Vec<String> {
        vec![LOCK.to_owned()]
    }

    fn run<'a>(&'a self, connection: &'a mut AnyConnection) -> BoxFuture<'a, Result<Self::Output, sqlx::Error>> {
        async move {
            const OLD: &str = "SELECT tenant, name, expires_at, revoked_at, successor, requests_per_minute, \
                               tokens_per_minute, concurrent, models, adapters FROM api_keys WHERE id = $1";
            if exists(connection, &self.key).await? {
                return Ok(Ok(()));
            }
            let id = &self.rotation.id;
            let found = sqlx::query(OLD).bind(id.as_str().to_owned()).fetch_optional(&mut *connection).await?;
            let Some(row) = found else {
                return Ok(Err(KeyError::NoSuchKey(id.clone())));
            };
            let end: Option<i64> = row.try_get(2)?;
            let is_over = row.try_get::<Option<i64>, _>(3)?.is_some() || end.is_some_and(|end| end <= self.now.0);
            if is_over || row.try_get::<Option<String>, _>(4)?.is_some() {
                return Ok(Err(KeyError::NotRotatable(id.clone())));
            }
            if is_full(connection, self.now).await? {
                return Ok(Err(KeyError::TooMany));
            }
            let Ok(tenant) = TenantId::new(&row.try_get::<String, _>(0)?) else {
                return Ok(Err(KeyError::NotRotatable(id.clone())));
            };
            let Some(grant) = StoredGrant::of(&row, 5)?.read() else {
                return Ok(Err(KeyError::NotRotatable(id.clone())));
            };
            let new = NewKey { tenant, name: row.try_get(1)?, expires_at: self.rotation.expires_at, grant };
            insert(connection, &self.key, &new, self.now).await?;
            let overlap = self.now.after(self.rotation.overlap).0;
            let changed = next_change(connection).await?;
            sqlx::query("UPDATE api_keys SET expires_at = $1, successor = $2, changed = $3 WHERE id = $4")
                .bind(end.map_or(overlap, |end| end.min(overlap)))
                .bind(self.key.id_str().to_owned())
                .bind(changed)
                .bind(id.as_str().to_owned())
                .execute(connection)
                .await?;
            Ok(Ok(()))
        }
        .boxed()
    }
}
