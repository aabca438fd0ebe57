//! The rules of the pool, without threads or files: who gets a place in memory and in batches, and who gives way.
//!
//! Everything here is a call on plain data; what has to be told to the model thread is collected in [`State::orders`] and
//! sent by the pool while it still holds the lock. Invariants, asserted in debug builds after every call: no more than
//! `max_cpu_loras` versions are in memory, those being read and those draining counted; no more than `max_loras` current
//! ones are resident; a version that requests use is in memory and resident; every version is current or in use.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bindery_model::Adapter;

use self::room::Promise;
use super::{AdapterError, AdapterIdentity, AdapterSpec, AdapterState, AdapterStatus, AdapterUse, read::Fingerprint};

/// After an adapter could not be read, requests for it are told so for this long before it is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// What the model thread is to be told, in this order.
#[derive(Debug)]
pub(super) enum Order {
    Add(u32, Arc<Adapter>),
    Remove(u32),
}

/// What a request that wants an adapter does next.
#[derive(Debug)]
pub(super) enum Next {
    /// It has it: the version's number among all, and its use is counted.
    Use(u32),
    /// Somebody has to read it; the caller does, then asks again.
    Read {
        attempt: u64,
    },
    /// Until something changes. Where it is being read: by which attempt.
    Wait(Option<u64>),
    Fail(AdapterError),
}

/// A request that asks for an adapter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asking<'a> {
    pub(super) name: &'a str,
    /// Whose share of the places it counts to.
    pub(super) who: Option<&'a Arc<str>>,
    /// Of [`State::ticket`]: who came first has the smaller one.
    pub(super) ticket: u64,
    /// The attempt at reading that it has been waiting for.
    pub(super) since: Option<u64>,
    pub(super) now: Instant,
}

#[derive(Debug)]
struct Entry {
    spec: AdapterSpec,
    /// In memory.
    current: Option<u32>,
    /// The attempt that is reading it.
    reading: Option<u64>,
    /// Whose request had it read last.
    reader: Option<Arc<str>>,
    failure: Option<Failure>,
    /// The only state of its files that may be read, where somebody looks after them.
    settled: Option<Fingerprint>,
    num_versions: u32,
    /// Tickets of the requests that wait for it.
    waiting: BTreeSet<u64>,
}

#[derive(Clone, Debug)]
struct Failure {
    attempt: u64,
    at: Instant,
    reason: String,
}

#[derive(Debug)]
struct Version {
    name: String,
    number: u32,
    adapter: Arc<Adapter>,
    identity: Arc<AdapterIdentity>,
    source: String,
    num_users: usize,
    num_running: usize,
    is_resident: bool,
    is_current: bool,
    is_pinned: bool,
    last_used: u64,
    /// Whose share it counts to: who had it read, then who made it resident.
    owner: Option<Arc<str>>,
    promise: Option<Promise>,
}

impl Version {
    fn can_go(&self) -> bool {
        self.num_users == 0 && !self.is_pinned
    }
}

#[derive(Debug)]
pub(super) struct State {
    max_loras: usize,
    max_cpu_loras: usize,
    entries: BTreeMap<String, Entry>,
    versions: BTreeMap<u32, Version>,
    next_id: u32,
    next_attempt: u64,
    next_ticket: u64,
    /// Counts uses.
    clock: u64,
    num_reading: usize,
    orders: Vec<Order>,
}

impl State {
    pub(super) fn new(max_loras: usize, max_cpu_loras: usize) -> Self {
        Self {
            max_loras,
            max_cpu_loras,
            entries: BTreeMap::new(),
            versions: BTreeMap::new(),
            next_id: 0,
            next_attempt: 0,
            next_ticket: 0,
            clock: 0,
            num_reading: 0,
            orders: Vec::new(),
        }
    }

    /// What the model thread has to be told since the last call.
    pub(super) fn orders(&mut self) -> Vec<Order> {
        self.check();
        std::mem::take(&mut self.orders)
    }

    // --- names ---

    /// Makes a name known; nothing is read.
    pub(super) fn register(&mut self, spec: AdapterSpec) -> Result<(), AdapterError> {
        if self.entries.contains_key(&spec.name) {
            return Err(AdapterError::Exists { name: spec.name });
        }
        self.check_pins(&spec)?;
        // Versions of an earlier adapter of the name may still be in use: no two have the same number.
        let draining = self.versions.values().filter(|version| version.name == spec.name);
        let num_versions = draining.map(|version| version.number).max().unwrap_or(0);
        let entry = Entry {
            current: None,
            reading: None,
            reader: None,
            failure: None,
            settled: None,
            num_versions,
            waiting: BTreeSet::new(),
            spec,
        };
        self.entries.insert(entry.spec.name.clone(), entry);
        Ok(())
    }

    /// Whether it may be pinned, if it wants to be: no more are than can be resident.
    pub(super) fn check_pins(&self, spec: &AdapterSpec) -> Result<(), AdapterError> {
        let others = self.entries.values().filter(|entry| entry.spec.pinned && entry.spec.name != spec.name).count();
        if !spec.pinned || others < self.max_loras {
            return Ok(());
        }
        let reason =
            format!("{} adapters are pinned and --max-loras is {}: pin fewer, or raise it", others + 1, self.max_loras);
        Err(AdapterError::NoRoom { reason })
    }

    pub(super) fn spec(&self, name: &str) -> Option<&AdapterSpec> {
        self.entries.get(name).map(|entry| &entry.spec)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &AdapterSpec> {
        self.entries.values().map(|entry| &entry.spec)
    }

    pub(super) fn is_in_memory(&self, name: &str) -> bool {
        self.entries.get(name).is_some_and(|entry| entry.current.is_some())
    }

    pub(super) fn identity(&self, name: &str) -> Option<Arc<AdapterIdentity>> {
        let current = self.entries.get(name)?.current?;
        self.identity_of(current)
    }

    /// None: the version is gone, which none is that somebody holds.
    pub(super) fn identity_of(&self, id: u32) -> Option<Arc<AdapterIdentity>> {
        self.versions.get(&id).map(|version| Arc::clone(&version.identity))
    }

    /// Takes the name away. What it named goes when its last request has ended.
    pub(super) fn forget(&mut self, name: &str) -> Result<(), AdapterError> {
        let entry = self.entries.remove(name).ok_or_else(|| AdapterError::Unknown { name: name.to_owned() })?;
        if let Some(id) = entry.current {
            self.retire(id);
        }
        Ok(())
    }

    /// Requests on any version under the name.
    pub(super) fn num_users(&self, name: &str) -> usize {
        self.versions.values().filter(|version| version.name == name).map(|version| version.num_users).sum()
    }

    // --- use ---

    /// For a request that is about to ask, and keeps it as long as it does.
    pub(super) fn ticket(&mut self) -> u64 {
        self.next_ticket += 1;
        self.next_ticket
    }

    /// A request wants an adapter.
    pub(super) fn acquire(&mut self, asking: &Asking<'_>) -> Next {
        let Asking { name, who, since, now, .. } = *asking;
        // Also of a name that was taken away and given to others while the request waited for it.
        let Some(entry) = self.entries.get(name).filter(|entry| entry.spec.is_for(who)) else {
            return Next::Fail(AdapterError::Unknown { name: name.to_owned() });
        };
        if let Some(id) = entry.current {
            return self.make_use(id, asking);
        }
        if let Some(attempt) = entry.reading {
            return Next::Wait(Some(attempt));
        }
        if let Some(failure) = &entry.failure
            && (since == Some(failure.attempt) || now < failure.at + RETRY_AFTER)
        {
            return Next::Fail(AdapterError::Unreadable { name: name.to_owned(), reason: failure.reason.clone() });
        }
        match self.make_memory_room(Some(asking)).and_then(|has_room| self.begin_if(has_room, name, who)) {
            Ok(Some(attempt)) => Next::Read { attempt },
            Ok(None) => {
                self.promise(asking);
                Next::Wait(None)
            }
            Err(error) => Next::Fail(error),
        }
    }

    fn make_use(&mut self, id: u32, asking: &Asking<'_>) -> Next {
        let version = &self.versions[&id];
        if version.is_resident && version.is_promised_before(asking) {
            return Next::Wait(None);
        }
        if !version.is_resident && !self.make_resident_room(asking) {
            return self.no_place(asking);
        }
        self.break_promise(asking.ticket);
        self.use_now(id, asking.who)
    }

    /// There is a place for it.
    fn use_now(&mut self, id: u32, who: Option<&Arc<str>>) -> Next {
        let version = self.versions.get_mut(&id).expect("an entry's version exists");
        if !version.is_resident {
            version.is_resident = true;
            version.owner = who.cloned();
            self.orders.push(Order::Add(id, Arc::clone(&version.adapter)));
        }
        self.clock += 1;
        version.num_users += 1;
        version.last_used = self.clock;
        Next::Use(id)
    }

    /// The request was scheduled for the first time.
    pub(super) fn started(&mut self, id: u32) {
        if let Some(version) = self.versions.get_mut(&id) {
            version.num_running += 1;
        }
    }

    /// The request has ended.
    pub(super) fn release(&mut self, id: u32, had_started: bool) {
        let Some(version) = self.versions.get_mut(&id) else { return };
        version.num_users -= 1;
        version.num_running -= usize::from(had_started);
        if version.num_users == 0 && !version.is_current {
            self.drop_version(id);
        }
    }

    /// Counts a request in, unless `max_waiting` wait already, for whatever adapters.
    pub(super) fn try_wait(&mut self, name: &str, ticket: u64, max_waiting: usize) -> bool {
        if self.num_waiting() >= max_waiting {
            return false;
        }
        if let Some(entry) = self.entries.get_mut(name) {
            entry.waiting.insert(ticket);
        }
        true
    }

    /// The request waits no more, whatever came of it.
    pub(super) fn end_wait(&mut self, name: &str, ticket: u64) {
        self.break_promise(ticket);
        if let Some(entry) = self.entries.get_mut(name) {
            entry.waiting.remove(&ticket);
        }
    }

    // --- reading ---

    /// A place in memory for another version of a name, for whoever runs the server. None: all are in use for now, and one is promised
    /// to who has that ticket.
    pub(super) fn begin_reading(&mut self, name: &str, ticket: u64) -> Result<Option<u64>, AdapterError> {
        let has_room = self.make_memory_room(None)?;
        if !has_room {
            self.promise_memory(name, ticket);
        }
        self.begin_if(has_room, name, None)
    }

    fn begin_if(&mut self, has_room: bool, name: &str, who: Option<&Arc<str>>) -> Result<Option<u64>, AdapterError> {
        if !has_room {
            return Ok(None);
        }
        let entry = self.entries.get_mut(name).ok_or_else(|| AdapterError::Unknown { name: name.to_owned() })?;
        let attempt = self.next_attempt;
        self.next_attempt += 1;
        self.num_reading += 1;
        entry.reading = Some(attempt);
        entry.reader = who.cloned();
        Ok(Some(attempt))
    }

    /// Puts what has been read under a name, which is made known with it; false where all places in memory are in use for now, and
    /// one is promised to who has that ticket. Unless it is placed nothing else changes.
    pub(super) fn place(
        &mut self,
        spec: &AdapterSpec,
        load_inplace: bool,
        read: (Arc<Adapter>, String),
        ticket: u64,
    ) -> Result<bool, AdapterError> {
        let name = &spec.name;
        if self.entries.contains_key(name) && !load_inplace {
            return Err(AdapterError::Exists { name: name.clone() });
        }
        self.check_pins(spec)?;
        self.check_unpinned_place(spec)?;
        if !self.make_memory_room(None)? {
            self.promise_memory(name, ticket);
            return Ok(false);
        }
        match self.entries.get_mut(name) {
            Some(entry) => {
                // New weights are nobody else's than the old ones were, unless that is asked for.
                let tenants = spec.tenants.clone().or_else(|| entry.spec.tenants.take());
                entry.spec = AdapterSpec { tenants, pinned: spec.pinned || entry.spec.pinned, ..spec.clone() };
                entry.settled = None;
            }
            None => self.register(spec.clone())?,
        }
        if let Some(attempt) = self.begin_if(true, name, None)? {
            self.end_reading(name, attempt, Ok(read), Instant::now());
        }
        self.pin(name);
        Ok(true)
    }

    /// Refuses what no request could ever use, since pinned ones have all places in batches.
    fn check_unpinned_place(&self, spec: &AdapterSpec) -> Result<(), AdapterError> {
        let is_pinned = |entry: &&Entry| entry.spec.pinned;
        let is_itself = self.entries.get(&spec.name).as_ref().is_some_and(is_pinned);
        if spec.pinned || is_itself || self.entries.values().filter(is_pinned).count() < self.max_loras {
            return Ok(());
        }
        Err(self.no_place_but_pinned())
    }

    /// The files of a name that lies at `path` are in this state, and only in this one may they be read; None: nobody looks after
    /// them any more. Whether that is news.
    pub(super) fn settle(&mut self, name: &str, path: &Path, state: Option<&Fingerprint>) -> bool {
        let entry = self.entries.get_mut(name).filter(|entry| entry.spec.source.path() == Some(path));
        let Some(entry) = entry.filter(|entry| entry.settled.as_ref() != state) else { return false };
        entry.settled = state.cloned();
        true
    }

    /// Whether it is this attempt that the name waits for.
    pub(super) fn is_reading(&self, name: &str, attempt: u64) -> bool {
        self.entries.get(name).is_some_and(|entry| entry.reading == Some(attempt))
    }

    pub(super) fn settled(&self, name: &str) -> Option<&Fingerprint> {
        self.entries.get(name)?.settled.as_ref()
    }

    /// Its files are others than those that could not be read: it need not be waited until they are tried again.
    pub(super) fn forget_failure(&mut self, name: &str) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.failure = None;
        }
    }

    /// What came of it. The new version takes the name over; the old one stays with those who use it.
    pub(super) fn end_reading(
        &mut self,
        name: &str,
        attempt: u64,
        result: Result<(Arc<Adapter>, String), String>,
        now: Instant,
    ) {
        self.num_reading -= 1;
        // The name may have been taken away meanwhile, or be read again by somebody else.
        let Some(entry) = self.entries.get_mut(name).filter(|entry| entry.reading == Some(attempt)) else { return };
        entry.reading = None;
        let (adapter, digest) = match result {
            Ok(read) => read,
            Err(reason) => {
                entry.failure = Some(Failure { attempt, at: now, reason });
                return;
            }
        };
        entry.failure = None;
        entry.num_versions += 1;
        let id = self.next_id;
        self.next_id += 1;
        let licence = adapter.info().licence.clone();
        let version = Version {
            name: name.to_owned(),
            number: entry.num_versions,
            adapter,
            identity: Arc::new(AdapterIdentity { name: name.to_owned(), digest, licence }),
            source: entry.spec.source.to_string(),
            num_users: 0,
            num_running: 0,
            is_resident: false,
            is_current: true,
            is_pinned: entry.spec.pinned,
            last_used: self.clock,
            owner: entry.reader.clone(),
            promise: None,
        };
        let old = entry.current.replace(id);
        self.versions.insert(id, version);
        if let Some(old) = old {
            self.retire(old);
        }
    }

    /// Makes it resident where it is to be so from the start.
    pub(super) fn pin(&mut self, name: &str) {
        let Some(id) = self.entries.get(name).filter(|entry| entry.spec.pinned).and_then(|entry| entry.current) else {
            return;
        };
        let ticket = self.ticket();
        let asking = Asking { name, who: None, ticket, since: None, now: Instant::now() };
        if self.versions[&id].is_resident || self.make_resident_room(&asking) {
            self.use_now(id, None);
            self.release(id, false);
        }
    }

    // --- who gives way ---

    fn retire(&mut self, id: u32) {
        let Some(version) = self.versions.get_mut(&id) else { return };
        (version.is_current, version.is_pinned) = (false, false);
        if version.num_users == 0 {
            self.drop_version(id);
        }
    }

    fn drop_version(&mut self, id: u32) {
        let Some(version) = self.versions.remove(&id) else { return };
        if version.is_resident {
            self.orders.push(Order::Remove(id));
        }
        if let Some(entry) = self.entries.get_mut(&version.name).filter(|entry| entry.current == Some(id)) {
            entry.current = None;
        }
    }

    // --- what there is ---

    /// Names in order; of each its newest version, then older ones that are still in use.
    pub(super) fn list(&self) -> Vec<AdapterStatus> {
        let mut list: Vec<AdapterStatus> = self.entries.values().map(|entry| self.status(entry)).collect();
        let draining = self.versions.values().filter(|version| !version.is_current);
        list.extend(draining.map(|version| AdapterStatus {
            name: version.name.clone(),
            version: version.number,
            state: AdapterState::Draining,
            source: version.source.clone(),
            digest: Some(version.identity.digest.clone()),
            tenants: self.entries.get(&version.name).and_then(|entry| entry.spec.tenants.clone()),
            pinned: false,
            num_users: version.num_users,
            num_bytes: version.adapter.num_bytes(),
            info: Some(version.adapter.info().clone()),
            failure: None,
        }));
        list.sort_by(|a, b| (&a.name, b.version).cmp(&(&b.name, a.version)));
        list
    }

    fn status(&self, entry: &Entry) -> AdapterStatus {
        let version = entry.current.map(|id| &self.versions[&id]);
        AdapterStatus {
            name: entry.spec.name.clone(),
            version: version.map_or(entry.num_versions, |version| version.number),
            state: match version {
                Some(version) if version.is_resident => AdapterState::Resident,
                Some(_) => AdapterState::Host,
                None if entry.reading.is_some() => AdapterState::Loading,
                None => AdapterState::Disk,
            },
            source: entry.spec.source.to_string(),
            digest: version.map(|version| version.identity.digest.clone()),
            tenants: entry.spec.tenants.clone(),
            pinned: entry.spec.pinned,
            num_users: version.map_or(0, |version| version.num_users),
            num_bytes: version.map_or(0, |version| version.adapter.num_bytes()),
            info: version.map(|version| version.adapter.info().clone()),
            failure: entry.failure.as_ref().map(|failure| failure.reason.clone()),
        }
    }

    pub(super) fn in_use(&self) -> AdapterUse {
        let names = |of: &dyn Fn(&Version) -> bool| -> BTreeSet<String> {
            self.versions.values().filter(|version| of(version)).map(|version| version.name.clone()).collect()
        };
        let mut waiting = names(&|version| version.num_users > version.num_running);
        waiting.extend(
            self.entries.values().filter(|entry| !entry.waiting.is_empty()).map(|entry| entry.spec.name.clone()),
        );
        AdapterUse {
            running: names(&|version| version.num_running > 0).into_iter().collect(),
            waiting: waiting.into_iter().collect(),
            num_waiting: self.num_waiting(),
        }
    }

    fn num_waiting(&self) -> usize {
        self.entries.values().map(|entry| entry.waiting.len()).sum()
    }

    fn check(&self) {
        if !cfg!(debug_assertions) {
            return;
        }
        let num_resident = self.versions.values().filter(|version| version.is_resident && version.is_current).count();
        assert!(num_resident <= self.max_loras, "{num_resident} residents of {}", self.max_loras);
        let num_in_memory = self.versions.len() + self.num_reading;
        assert!(num_in_memory <= self.max_cpu_loras, "{num_in_memory} in memory of {}", self.max_cpu_loras);
        for (id, version) in &self.versions {
            assert!(version.num_users == 0 || version.is_resident, "{id} is used and not resident");
            assert!(version.is_current || version.num_users > 0, "{id} is kept for nobody");
            assert!(version.num_running <= version.num_users, "{id} runs more than it is used");
            let names_it = self.entries.get(&version.name).is_some_and(|entry| entry.current == Some(*id));
            assert_eq!(version.is_current, names_it, "{id} and its name disagree");
        }
    }
}

mod room;
#[cfg(test)]
mod tests;
