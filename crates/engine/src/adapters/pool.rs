//! The pool as everything else sees it: asynchronous, shared, told to the model thread.
//!
//! The rules are [`super::state`]'s; here is who waits for what, and which thread reads files. Invariant: what the model
//! thread is told is sent while the state is locked, so that it hears of an adapter before any request that uses it, and
//! of its end after the last.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use bindery_model::Adapter;
use tokio::{
    sync::{Notify, Semaphore},
    time::timeout_at,
};

use super::{
    AdapterError, AdapterIdentity, AdapterPoolConfig, AdapterSource, AdapterSpec, AdapterStatus, AdapterUse,
    ReadAdapter, Unload, check_name,
    read::{self, BY_RENAMING, Fingerprint, Unread},
    state::{Asking, Next, Order, State},
};
use crate::engine::Command;

/// Adapters that are read at one time: what is being read counts nowhere yet, so its memory is bounded here.
const MAX_READINGS: usize = 4;
/// Loads that somebody asked for at one time, each with an adapter that may have to wait for its place; others wait unread.
const MAX_LOADS: usize = 4;

/// How long reading waits for files to come to rest. Until then it has a place in memory that others want.
const SETTLE_PATIENCE: Duration = Duration::from_secs(30);

/// How long a load waits for its place while requests use all of them.
const LOAD_PATIENCE: Duration = Duration::from_secs(30);

/// Cheap to clone.
#[derive(Clone)]
pub struct AdapterPool(Arc<Shared>);

struct Shared {
    config: AdapterPoolConfig,
    reader: Box<dyn ReadAdapter>,
    commands: mpsc::Sender<Command>,
    /// Requests that may wait for adapters at one time.
    max_waiting: usize,
    state: Mutex<State>,
    /// Something was read, let go or made idle.
    changed: Notify,
    /// The files of an adapter have come to rest.
    settled: Notify,
    readings: Semaphore,
    /// Apart from the readings, since a load that waits for its place may wait for a reading.
    loads: Semaphore,
}

/// A request's hold on one version of an adapter. Clones hold the same; the last one lets go.
#[derive(Clone, Debug)]
pub struct AdapterLease(Arc<Hold>);

struct Hold {
    pool: AdapterPool,
    id: u32,
    has_started: AtomicBool,
}

impl std::fmt::Debug for AdapterPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdapterPool").field("config", &self.0.config).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "adapter {}", self.id)
    }
}

impl AdapterLease {
    /// The version's number among all that were ever loaded: what batches name it by, and part of what keys and values
    /// belong to.
    pub fn id(&self) -> u32 {
        self.0.id
    }

    /// Which weights it holds; None never, as a version that is held stays.
    pub fn identity(&self) -> Option<Arc<AdapterIdentity>> {
        self.0.pool.lock().identity_of(self.0.id)
    }

    /// The request is in a plan for the first time.
    pub(crate) fn start(&self) {
        if !self.0.has_started.swap(true, Ordering::AcqRel) {
            self.0.pool.change(|state| state.started(self.0.id));
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let had_started = self.has_started.load(Ordering::Acquire);
        self.pool.change(|state| state.release(self.id, had_started));
        self.pool.0.changed.notify_waiters();
    }
}

/// Counts a request among those that wait, as long as it does.
struct Waiting<'a> {
    pool: &'a AdapterPool,
    name: &'a str,
    ticket: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.pool.change(|state| state.end_wait(self.name, self.ticket));
        // What was promised to it is there for others.
        self.pool.0.changed.notify_waiters();
    }
}

/// A place in memory may be promised to it, as long as it is there.
struct Promised<'a> {
    pool: &'a AdapterPool,
    ticket: u64,
}

impl Drop for Promised<'_> {
    fn drop(&mut self) {
        self.pool.change(|state| state.break_promise(self.ticket));
        self.pool.0.changed.notify_waiters();
    }
}

impl AdapterPool {
    pub(crate) fn new(
        config: AdapterPoolConfig,
        reader: Box<dyn ReadAdapter>,
        commands: mpsc::Sender<Command>,
        max_waiting: usize,
    ) -> Self {
        let state = Mutex::new(State::new(config.max_loras, config.max_cpu_loras));
        let (readings, loads) = (Semaphore::new(MAX_READINGS), Semaphore::new(MAX_LOADS));
        Self(Arc::new(Shared {
            config,
            reader,
            commands,
            max_waiting,
            state,
            changed: Notify::new(),
            settled: Notify::new(),
            readings,
            loads,
        }))
    }

    /// What it was made with.
    pub fn config(&self) -> &AdapterPoolConfig {
        &self.0.config
    }

    /// Makes a name known; it is read when a request first asks for it.
    ///
    /// # Errors
    /// [`AdapterError::Exists`], [`AdapterError::BadName`]; [`AdapterError::NoRoom`] for one pinned too many.
    pub fn register(&self, spec: AdapterSpec) -> Result<(), AdapterError> {
        check_name(&spec.name)?;
        self.change(|state| state.register(spec))
    }

    /// Reads a known adapter now (again, where it is in memory: a new version). Pinned ones become resident.
    ///
    /// # Errors
    /// [`AdapterError::Unknown`], [`AdapterError::Unreadable`]: what was there before stays.
    pub async fn refresh(&self, name: &str) -> Result<(), AdapterError> {
        let promised = self.promised();
        let attempt = loop {
            let changed = self.0.changed.notified();
            if let Some(attempt) = self.change(|state| state.begin_reading(name, promised.ticket))? {
                break attempt;
            }
            changed.await;
        };
        drop(promised);
        let Some(spec) = self.spec(name) else {
            self.give_up(name, attempt);
            return Err(AdapterError::Unknown { name: name.to_owned() });
        };
        self.read(spec, attempt).await
    }

    /// Loads an adapter under a name, at once and whole: who asks for the name before gets what was there, who asks after
    /// gets the new one. What is replaced stays with the tenants that it is for, unless the new one is for others, and pinned if
    /// it was.
    ///
    /// # Errors
    /// [`AdapterError::Exists`] where the name is taken and is not to be replaced. [`AdapterError::Unreadable`]: what was
    /// there stays as it was. [`AdapterError::NoRoom`] where requests use all places in memory for half a minute.
    pub async fn load(&self, spec: AdapterSpec, load_inplace: bool) -> Result<(), AdapterError> {
        let name = spec.name.clone();
        tokio::time::timeout(LOAD_PATIENCE, self.load_now(spec, load_inplace)).await.unwrap_or_else(|_| {
            let (max, seconds) = (self.0.config.max_cpu_loras, LOAD_PATIENCE.as_secs());
            Err(AdapterError::NoRoom {
                reason: format!(
                    "the adapter {name:?} found no place in memory within {seconds} s: requests use all {max} \
                     (--max-cpu-loras); try again when fewer run, or raise it"
                ),
            })
        })
    }

    async fn load_now(&self, spec: AdapterSpec, load_inplace: bool) -> Result<(), AdapterError> {
        check_name(&spec.name)?;
        // Read before the name is touched: a broken file changes nothing.
        let name = spec.name.clone();
        if !load_inplace && self.spec(&name).is_some() {
            return Err(AdapterError::Exists { name });
        }
        // Nobody closes it.
        let _turn = self.0.loads.acquire().await;
        let unreadable = |reason| AdapterError::Unreadable { name: spec.name.clone(), reason };
        let (adapter, digest) = self.read_now(&spec.source).await.map_err(unreadable)?;
        let promised = self.promised();
        loop {
            let changed = self.0.changed.notified();
            let read = (Arc::clone(&adapter), digest.clone());
            if self.change(|state| state.place(&spec, load_inplace, read, promised.ticket))? {
                self.name_has_changed();
                return Ok(());
            }
            changed.await;
        }
    }

    fn promised(&self) -> Promised<'_> {
        Promised { pool: self, ticket: self.change(State::ticket) }
    }

    /// Takes a name away. Requests that use it finish on what they have; its memory is freed with the last.
    ///
    /// # Errors
    /// [`AdapterError::Unknown`]; [`AdapterError::InUse`] or [`AdapterError::StillDraining`], as was asked for.
    pub async fn unload(&self, name: &str, mode: Unload) -> Result<(), AdapterError> {
        self.change(|state| {
            let num_users = state.num_users(name);
            if mode == Unload::RefuseIfUsed && num_users > 0 && state.spec(name).is_some() {
                return Err(AdapterError::InUse { name: name.to_owned(), num_users });
            }
            state.forget(name)
        })?;
        self.name_has_changed();
        let deadline = match mode {
            Unload::Wait(Some(time)) => Instant::now().checked_add(time),
            Unload::Wait(None) | Unload::RefuseIfUsed => None,
        };
        loop {
            let changed = self.0.changed.notified();
            let num_users = self.lock().num_users(name);
            if num_users == 0 || self.spec(name).is_some() {
                return Ok(());
            }
            match deadline {
                None => changed.await,
                Some(deadline) => {
                    if timeout_at(deadline.into(), changed).await.is_err() {
                        return Err(AdapterError::StillDraining { name: name.to_owned(), num_users });
                    }
                }
            }
        }
    }

    /// Takes a name away, and waits for nobody.
    ///
    /// # Errors
    /// [`AdapterError::Unknown`]
    pub(super) fn forget(&self, name: &str) -> Result<(), AdapterError> {
        self.change(|state| state.forget(name))?;
        self.name_has_changed();
        Ok(())
    }

    /// A name is gone, or another's: whoever waits for it looks again.
    fn name_has_changed(&self) {
        self.0.changed.notify_waiters();
        self.0.settled.notify_waiters();
    }

    /// Waits until the adapter is in memory and has a place in batches, reading it where it is not. `who` is whose share of
    /// the places it counts to. Dropping the future ends the wait, not the reading.
    ///
    /// # Errors
    /// [`AdapterError::Unknown`], [`AdapterError::Unreadable`], [`AdapterError::NoRoom`]; [`AdapterError::QueueFull`] where it
    /// would have to wait and too many do.
    pub async fn acquire(&self, name: &str, who: Option<&Arc<str>>) -> Result<AdapterLease, AdapterError> {
        let (mut since, mut waiting) = (None, None);
        let ticket = self.change(State::ticket);
        loop {
            let changed = self.0.changed.notified();
            match self.change(|state| state.acquire(&Asking { name, who, ticket, since, now: Instant::now() })) {
                Next::Use(id) => {
                    let has_started = AtomicBool::new(false);
                    return Ok(AdapterLease(Arc::new(Hold { pool: self.clone(), id, has_started })));
                }
                Next::Fail(error) => return Err(error),
                Next::Wait(attempt) => {
                    since = attempt.or(since);
                    if waiting.is_none() {
                        waiting = Some(self.waiting(name, ticket)?);
                    }
                    changed.await;
                }
                Next::Read { attempt } => {
                    since = Some(attempt);
                    if let Some(spec) = self.spec(name) {
                        // On a task of its own: who comes after waits for it, also when this request is gone.
                        let pool = self.clone();
                        let _detached = tokio::spawn(async move {
                            let _told_to_those_who_wait = pool.read(spec, attempt).await;
                        });
                    } else {
                        self.give_up(name, attempt);
                    }
                    if waiting.is_none() {
                        waiting = Some(self.waiting(name, ticket)?);
                    }
                    changed.await;
                }
            }
        }
    }

    fn waiting<'a>(&'a self, name: &'a str, ticket: u64) -> Result<Waiting<'a>, AdapterError> {
        let max_waiting = self.0.max_waiting;
        if !self.change(|state| state.try_wait(name, ticket, max_waiting)) {
            self.change(|state| state.break_promise(ticket));
            return Err(AdapterError::QueueFull { max_waiting });
        }
        Ok(Waiting { pool: self, name, ticket })
    }

    /// The name was taken away before anything was read.
    fn give_up(&self, name: &str, attempt: u64) {
        self.change(|state| state.end_reading(name, attempt, Err(String::new()), Instant::now()));
        self.0.changed.notify_waiters();
    }

    async fn read(&self, spec: AdapterSpec, attempt: u64) -> Result<(), AdapterError> {
        let result = self.read_settled(&spec, attempt).await;
        let failure = result.as_ref().err().cloned();
        if let Some(reason) = &failure {
            tracing::warn!(adapter = spec.name, reason, "an adapter cannot be loaded");
        }
        self.change(|state| {
            state.end_reading(&spec.name, attempt, result, Instant::now());
            state.pin(&spec.name);
        });
        self.0.changed.notify_waiters();
        failure.map_or(Ok(()), |reason| Err(AdapterError::Unreadable { name: spec.name, reason }))
    }

    /// A known adapter, as soon as its files are at rest where somebody looks after them.
    async fn read_settled(&self, spec: &AdapterSpec, attempt: u64) -> Result<(Arc<Adapter>, String), String> {
        let deadline = Instant::now() + SETTLE_PATIENCE;
        loop {
            let news = self.0.settled.notified();
            let settled = self.lock().settled(&spec.name).cloned();
            match self.read_files(&spec.source, settled).await {
                Ok(read) => return Ok(read),
                Err(Unread::Failed(reason)) => return Err(reason),
                Err(Unread::NotSettled) => {}
            }
            if !self.lock().is_reading(&spec.name, attempt) {
                return Err("it was taken away or replaced while its files were changing".to_owned());
            }
            if timeout_at(deadline.into(), news).await.is_err() {
                return Err(format!(
                    "{}: its files have not come to rest, or could not be looked at, for {} s; {BY_RENAMING}",
                    spec.source,
                    SETTLE_PATIENCE.as_secs()
                ));
            }
        }
    }

    /// What is there now, in whatever state.
    async fn read_now(&self, source: &AdapterSource) -> Result<(Arc<Adapter>, String), String> {
        self.read_files(source, None).await.map_err(|unread| unread.to_string())
    }

    /// An adapter and its digest, off the async threads.
    async fn read_files(
        &self,
        source: &AdapterSource,
        settled: Option<Fingerprint>,
    ) -> Result<(Arc<Adapter>, String), Unread> {
        let (shared, source) = (Arc::clone(&self.0), source.clone());
        let _turn = self.0.readings.acquire().await;
        let work = tokio::task::spawn_blocking(move || {
            read::read(&*shared.reader, &source, settled.as_ref(), &shared.config.limits)
        });
        let loaded = work.await.unwrap_or_else(|_| Err(Unread::Failed("reading it failed".to_owned())))?;
        Ok((Arc::new(loaded.adapter), loaded.digest))
    }

    /// Makes a name known whose files are in this state, and may be read in no other.
    pub(super) fn register_settled(
        &self,
        spec: AdapterSpec,
        path: &Path,
        files: Option<&Fingerprint>,
    ) -> Result<(), AdapterError> {
        check_name(&spec.name)?;
        let name = spec.name.clone();
        self.change(|state| {
            state.register(spec)?;
            state.settle(&name, path, files);
            Ok(())
        })
    }

    /// These adapters' files are at rest, each in this state: in any other they are not read.
    pub(super) fn settle<'a>(&self, files: impl Iterator<Item = (&'a String, &'a (PathBuf, Fingerprint))>) {
        let mut state = self.lock();
        let news = files.filter(|(name, (path, files))| state.settle(name, path, Some(files))).count();
        drop(state);
        if news > 0 {
            self.0.settled.notify_waiters();
        }
    }

    /// Nobody looks after an adapter's files any more: they may be read in whatever state.
    pub(super) fn unsettle(&self, name: &str, path: &Path) {
        self.change(|state| state.settle(name, path, None));
        self.0.settled.notify_waiters();
    }

    /// Whether somebody looks after its files, and reads a new version by itself.
    pub fn is_watched(&self, name: &str) -> bool {
        self.lock().settled(name).is_some()
    }

    /// The files of a known adapter have changed: if they could not be read before, the next request tries again.
    pub(super) fn forget_failure(&self, name: &str) {
        self.change(|state| state.forget_failure(name));
    }

    /// What is known of a name.
    pub fn spec(&self, name: &str) -> Option<AdapterSpec> {
        self.lock().spec(name).cloned()
    }

    /// All that are known, in the order of their names.
    pub fn specs(&self) -> Vec<AdapterSpec> {
        self.lock().names().cloned().collect()
    }

    /// Of its newest version, where that is in memory.
    pub fn identity(&self, name: &str) -> Option<Arc<AdapterIdentity>> {
        self.lock().identity(name)
    }

    /// Whether its newest version is in memory.
    pub fn is_in_memory(&self, name: &str) -> bool {
        self.lock().is_in_memory(name)
    }

    /// Everything about everyone, in the order of the names.
    pub fn list(&self) -> Vec<AdapterStatus> {
        self.lock().list()
    }

    /// Which adapters requests are for.
    pub fn in_use(&self) -> AdapterUse {
        self.lock().in_use()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Its invariants are asserted, so a panic leaves it as good as it was.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let result = change(&mut state);
        for order in state.orders() {
            let command = match order {
                Order::Add(id, adapter) => Command::AddAdapter { id, adapter },
                Order::Remove(id) => Command::RemoveAdapter { id },
            };
            let _engine_gone = self.0.commands.send(command);
        }
        result
    }
}
