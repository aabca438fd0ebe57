//! The keys that this process knows, in memory: a request is let in without waiting for a database.
//!
//! A task watches the store's counter of changes and reads what is new, so a revocation by another process acts after at
//! most one interval; one made here acts at once ([`KeyRing::refresh`]).
//!
//! **Invariant**: what is older than `stale_after` opens nothing: a process that has lost its store for so long cannot
//! know what was revoked, and refuses.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, PoisonError, RwLock, Weak,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use subtle::ConstantTimeEq as _;

use super::{ApiKey, KeyError, KeyGrant, table};
use crate::{
    clock::UnixMillis,
    names::{KeyId, TenantId},
    store::Store,
};

/// How often to look, and how long to trust.
#[derive(Clone, Copy, Debug)]
pub struct RingOptions {
    /// Between two looks at the store.
    pub poll_every: Duration,
    /// After so long without one that succeeded, every key is refused.
    pub stale_after: Duration,
}

/// Whose a key is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyOwner {
    /// The tenant.
    pub tenant: TenantId,
    /// Which of its keys.
    pub key: KeyId,
    /// What it may use beside what the tenant may.
    pub grant: Arc<KeyGrant>,
}

/// The known keys. Cheap to clone; the watching task ends with the last clone.
#[derive(Clone)]
pub struct KeyRing(Arc<Inner>);

struct Inner {
    store: Store,
    options: RingOptions,
    known: RwLock<Known>,
    /// One reader at a time, so that an older answer never overwrites a newer.
    refreshing: tokio::sync::Mutex<()>,
    /// When somebody last looked for a key that was not known, in milliseconds.
    looked_at: AtomicI64,
}

struct Known {
    keys: HashMap<String, Entry>,
    counter: i64,
    read_at: UnixMillis,
}

struct Entry {
    digest: [u8; 32],
    owner: KeyOwner,
    expires_at: Option<UnixMillis>,
    revoked_at: Option<UnixMillis>,
}

impl KeyRing {
    /// Reads all keys. [`watch`](Self::watch) keeps them true.
    pub async fn open(store: Store, options: RingOptions, now: UnixMillis) -> Result<Self, KeyError> {
        let known = RwLock::new(Known { keys: HashMap::new(), counter: 0, read_at: now });
        let ring = Self(Arc::new(Inner {
            store,
            options,
            known,
            refreshing: tokio::sync::Mutex::new(()),
            looked_at: AtomicI64::new(i64::MIN),
        }));
        ring.refresh(now).await?;
        Ok(ring)
    }

    /// Looks at the store again and again, until the last clone is gone.
    pub fn watch(&self) {
        let weak = Arc::downgrade(&self.0);
        let every = self.0.options.poll_every;
        tokio::spawn(watch(weak, every));
    }

    /// Reads what changed where a key is not known, which may have been made just now. False: nothing was read, for others have
    /// looked a moment ago (anybody can present keys that do not exist), or the store does not answer.
    pub async fn look_again(&self, now: UnixMillis) -> bool {
        const BETWEEN: i64 = 20;
        const AT_MOST: Duration = Duration::from_secs(1);
        let looked_at = self.0.looked_at.load(Ordering::Relaxed);
        let is_due = now.0.saturating_sub(looked_at) >= BETWEEN;
        if !is_due || self.0.looked_at.compare_exchange(looked_at, now.0, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return false;
        }
        matches!(tokio::time::timeout(AT_MOST, self.refresh(now)).await, Ok(Ok(())))
    }

    /// Reads what changed since it was last read.
    pub async fn refresh(&self, now: UnixMillis) -> Result<(), KeyError> {
        let _alone = self.0.refreshing.lock().await;
        let counter = self.0.known.read().unwrap_or_else(PoisonError::into_inner).counter;
        let rows = table::changed_since(&self.0.store, counter).await?;
        let mut known = self.0.known.write().unwrap_or_else(PoisonError::into_inner);
        for row in rows {
            known.counter = known.counter.max(row.changed);
            if let Some(entry) = Entry::from_row(&row) {
                known.keys.insert(row.id, entry);
            } else {
                tracing::error!(key = %row.id, "a key in the store cannot be read and is refused");
                known.keys.remove(&row.id);
            }
        }
        known.read_at = now;
        Ok(())
    }

    /// Whose the key is. Waits for nothing; takes the same steps whatever part of a key is wrong.
    pub fn authenticate(&self, presented: &str, now: UnixMillis) -> Result<KeyOwner, KeyError> {
        let key = ApiKey::parse(presented)?;
        let digest = key.digest();
        let known = self.0.known.read().unwrap_or_else(PoisonError::into_inner);
        let age = now.since(known.read_at);
        if age > self.0.options.stale_after {
            return Err(KeyError::Stale { age, limit: self.0.options.stale_after });
        }
        let entry = known.keys.get(key.id_str());
        // An unknown id is compared as well, with what no key has.
        let expected = entry.map_or([0; 32], |entry| entry.digest);
        let is_equal = bool::from(expected.ct_eq(&digest));
        let Some(entry) = entry.filter(|_| is_equal) else {
            return Err(KeyError::Unknown);
        };
        // Only who holds the key learns more.
        if let Some(at) = entry.revoked_at {
            return Err(KeyError::Revoked { id: entry.owner.key.clone(), at });
        }
        match entry.expires_at {
            Some(at) if at <= now => Err(KeyError::Expired { id: entry.owner.key.clone(), at }),
            _ => Ok(entry.owner.clone()),
        }
    }

    /// How many keys in force each tenant has, as far as they were read.
    pub fn num_live_by_tenant(&self, now: UnixMillis) -> BTreeMap<TenantId, usize> {
        let mut by_tenant = BTreeMap::new();
        let known = self.0.known.read().unwrap_or_else(PoisonError::into_inner);
        for entry in known.keys.values() {
            if entry.revoked_at.is_none() && entry.expires_at.is_none_or(|end| end > now) {
                *by_tenant.entry(entry.owner.tenant.clone()).or_default() += 1;
            }
        }
        by_tenant
    }

    /// Whether any key is known, revoked or not: then every route asks for one.
    pub fn is_empty(&self) -> bool {
        self.0.known.read().unwrap_or_else(PoisonError::into_inner).keys.is_empty()
    }
}

impl Entry {
    fn from_row(row: &table::CachedRow) -> Option<Self> {
        Some(Self {
            digest: data_encoding::HEXLOWER.decode(row.digest.as_bytes()).ok()?.try_into().ok()?,
            owner: KeyOwner {
                tenant: TenantId::new(&row.tenant).ok()?,
                key: KeyId::new(&row.id).ok()?,
                // A grant that cannot be read would be one that takes nothing away.
                grant: Arc::new(row.grant.read()?),
            },
            expires_at: row.expires_at.map(UnixMillis),
            revoked_at: row.revoked_at.map(UnixMillis),
        })
    }
}

async fn watch(ring: Weak<Inner>, every: Duration) {
    let mut ticks = tokio::time::interval(every.max(Duration::from_millis(1)));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut is_reachable = true;
    loop {
        ticks.tick().await;
        let Some(ring) = ring.upgrade() else { return };
        match KeyRing(ring).refresh(UnixMillis::now()).await {
            Ok(()) if is_reachable => {}
            Ok(()) => {
                is_reachable = true;
                tracing::info!("the store answers again; keys are up to date");
            }
            Err(error) if is_reachable => {
                is_reachable = false;
                tracing::warn!(%error, "the store does not answer; keys stay as they are and will be refused if this lasts");
            }
            Err(_) => {}
        }
    }
}
