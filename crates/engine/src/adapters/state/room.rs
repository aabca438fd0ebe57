//! Who gives way when places are scarce, and who gets a place next.
//!
//! Part of the rules of the pool: calls on plain data. Invariant: a place that is promised goes to whom it is promised to or to
//! who came before, and there is at most one promise for an adapter, so that what waits gives no more places a rest than it
//! can fill.

use std::{collections::BTreeSet, sync::Arc};

use super::{Asking, Next, Order, State, Version};
use crate::adapters::AdapterError;

/// A place that is in use goes to a request that waits, as soon as those that use it have ended: who comes later does not
/// begin to use it. So nobody waits for ever, however busy the others are.
#[derive(Debug)]
pub(super) struct Promise {
    ticket: u64,
    /// What that request asks for.
    name: String,
}

/// What is scarce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Places {
    /// `max_loras`
    Batches,
    /// `max_cpu_loras`
    Memory,
}

impl Version {
    /// Whether its place is promised to a request that came before.
    pub(super) fn is_promised_before(&self, asking: &Asking<'_>) -> bool {
        self.promise.as_ref().is_some_and(|promise| promise.ticket < asking.ticket && promise.name != asking.name)
    }

    fn is_promised_to(&self, ticket: u64) -> bool {
        self.promise.as_ref().is_some_and(|promise| promise.ticket == ticket)
    }

    fn is_promised_for(&self, name: &str) -> bool {
        self.promise.as_ref().is_some_and(|promise| promise.name == name)
    }
}

impl State {
    /// A place among the residents: a free one, or that of one that is not in use; false where there is none now.
    pub(super) fn make_resident_room(&mut self, asking: &Asking<'_>) -> bool {
        if self.residents().count() < self.max_loras {
            return true;
        }
        let Some(id) = self.idle_resident(asking) else { return false };
        let version = self.versions.get_mut(&id).expect("it was found there");
        (version.is_resident, version.promise) = (false, None);
        self.orders.push(Order::Remove(id));
        true
    }

    fn residents(&self) -> impl Iterator<Item = (&u32, &Version)> {
        self.versions.iter().filter(|(_, version)| version.is_resident && version.is_current)
    }

    /// One whose place can be taken at once: first what was promised.
    fn idle_resident(&self, asking: &Asking<'_>) -> Option<u32> {
        let give_way = |fits: &dyn Fn(&Version) -> bool| self.who_gives_way(asking, Places::Batches, fits);
        give_way(&|version| version.can_go() && version.is_promised_for(asking.name))
            .or_else(|| give_way(&|version| version.can_go() && !version.is_promised_before(asking)))
    }

    /// Who has a place that is not pinned.
    fn holders(&self, places: Places) -> impl Iterator<Item = (&u32, &Version)> {
        self.versions.iter().filter(move |(_, version)| {
            version.is_current && !version.is_pinned && (version.is_resident || places == Places::Memory)
        })
    }

    /// Of the holders that `fits` is true of, the one unused for longest among those that who asks may push out. With places
    /// scarce, each of those who hold some or want one has an equal share of what is not pinned: within it nobody can be
    /// pushed out by others, unless by one who has nothing at all and finds no other place.
    fn who_gives_way(&self, asking: &Asking<'_>, places: Places, fits: impl Fn(&Version) -> bool) -> Option<u32> {
        let who = asking.who;
        let pinned = |version: &&Version| version.is_pinned && (version.is_resident || places == Places::Memory);
        let num_places = match places {
            Places::Batches => self.max_loras,
            Places::Memory => self.max_cpu_loras,
        };
        let num_free = num_places.saturating_sub(self.versions.values().filter(pinned).count());
        let held = |owner: Option<&Arc<str>>| {
            self.holders(places).filter(|(_, version)| version.owner.as_ref() == owner).count()
        };
        let owners: BTreeSet<Option<&Arc<str>>> =
            self.holders(places).map(|(_, version)| version.owner.as_ref()).chain([who]).collect();
        let share = (num_free / owners.len()).max(1);
        let may_go = |version: &Version| {
            let owner = version.owner.as_ref();
            owner == who || held(owner) > share
        };
        let oldest = |of_all: bool| {
            self.holders(places)
                .filter(|(_, version)| fits(version) && (of_all || may_go(version)))
                .min_by_key(|(_, version)| version.last_used)
                .map(|(&id, _)| id)
        };
        oldest(false).or_else(|| if held(who) == 0 { oldest(true) } else { None })
    }

    /// What a request without a place does: it waits, unless there never will be one.
    pub(super) fn no_place(&mut self, asking: &Asking<'_>) -> Next {
        if self.residents().all(|(_, version)| version.is_pinned) {
            return Next::Fail(self.no_place_but_pinned());
        }
        self.promise(asking);
        Next::Wait(None)
    }

    pub(super) fn no_place_but_pinned(&self) -> AdapterError {
        let reason = format!(
            "all {} places for adapters in batches are taken by pinned ones: raise --max-loras, or pin fewer",
            self.max_loras
        );
        AdapterError::NoRoom { reason }
    }

    /// Promises a place to a request, unless one is promised to the adapter it asks for.
    pub(super) fn promise(&mut self, asking: &Asking<'_>) {
        let mut promises = self.versions.values_mut().filter_map(|version| version.promise.as_mut());
        if let Some(promise) = promises.find(|promise| promise.name == asking.name) {
            promise.ticket = promise.ticket.min(asking.ticket);
            return;
        }
        // Who came before comes first, also where another was quicker to ask again.
        let is_to_be_had =
            |version: &Version| version.promise.as_ref().is_none_or(|promise| promise.ticket > asking.ticket);
        let Some(id) = self.who_gives_way(asking, Places::Batches, is_to_be_had) else { return };
        if let Some(version) = self.versions.get_mut(&id) {
            version.promise = Some(Promise { ticket: asking.ticket, name: asking.name.to_owned() });
        }
    }

    /// Likewise to whoever runs the server and wants a place in memory: that of another adapter, so that requests which follow each
    /// other without a pause do not keep a load waiting.
    pub(super) fn promise_memory(&mut self, name: &str, ticket: u64) {
        if self.versions.values().any(|version| version.is_promised_to(ticket)) {
            return;
        }
        let is_to_be_had = |version: &Version| {
            version.name != name && version.promise.as_ref().is_none_or(|promise| promise.ticket > ticket)
        };
        let oldest = self
            .holders(Places::Memory)
            .filter(|(_, version)| is_to_be_had(version))
            .min_by_key(|(_, version)| version.last_used)
            .map(|(&id, _)| id);
        if let Some(version) = oldest.and_then(|id| self.versions.get_mut(&id)) {
            version.promise = Some(Promise { ticket, name: name.to_owned() });
        }
    }

    /// Where there is one.
    pub(in super::super) fn break_promise(&mut self, ticket: u64) {
        for version in self.versions.values_mut() {
            if version.is_promised_to(ticket) {
                version.promise = None;
            }
        }
    }

    /// A place in memory: a free one, or that of one that is not in use, residents last; who asks for no request (None: whoever
    /// runs the server) may push out anybody. What a request that came
    /// before waits for, with its weights there, stays until it has had it.
    pub(super) fn make_memory_room(&mut self, asking: Option<&Asking<'_>>) -> Result<bool, AdapterError> {
        if self.versions.len() + self.num_reading < self.max_cpu_loras {
            return Ok(true);
        }
        // By one who came before who asks.
        let is_awaited = |name: &str| {
            let first = self.entries.get(name).and_then(|entry| entry.waiting.first());
            first.is_some_and(|&first| asking.is_none_or(|asking| first < asking.ticket))
        };
        let is_idle = |version: &Version| version.can_go() && !version.is_resident && !is_awaited(&version.name);
        let found = match asking {
            Some(asking) => self.who_gives_way(asking, Places::Memory, is_idle).or_else(|| self.idle_resident(asking)),
            None => self
                .holders(Places::Memory)
                .filter(|(_, version)| is_idle(version) || version.can_go() && version.is_resident)
                .min_by_key(|(_, version)| (version.is_resident, version.last_used))
                .map(|(&id, _)| id),
        };
        if let Some(id) = found {
            self.drop_version(id);
            return Ok(true);
        }
        if self.num_reading == 0 && self.versions.values().all(|version| version.is_pinned) {
            return Err(AdapterError::NoRoom {
                reason: format!(
                    "all {} places for adapters in memory are taken by pinned ones: raise --max-cpu-loras, or pin fewer",
                    self.max_cpu_loras
                ),
            });
        }
        Ok(false)
    }
}
