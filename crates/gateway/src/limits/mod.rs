//! How much at once and a minute: requests, tokens, concurrency; for a tenant and for each of its keys.
//!
//! A request is admitted under all its limits or under none. Its tokens are charged by an upper bound at once and
//! corrected when they are known ([`Permit::settle`]); its place among the concurrent ones is free when the [`Permit`]
//! drops, however the request ended. Pure but for the lock: the time is passed in.
//!
//! **Invariant**: a refused request has changed nothing, and every admitted one gives its place back exactly once.

mod bucket;
mod headers;

pub use headers::{Meter, RateHeaders};

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{
    clock::UnixMillis,
    names::{KeyId, TenantId},
};
use bucket::{Bucket, Short};

/// What a tenant or a key may use; none: as much as it likes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimits {
    /// Requests a minute.
    pub requests_per_minute: Option<u64>,
    /// Tokens a minute, prompt and answer.
    pub tokens_per_minute: Option<u64>,
    /// Requests at once.
    pub concurrent: Option<u32>,
}

/// Who is limited.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Limited {
    /// All requests of a tenant together.
    Tenant(TenantId),
    /// Those by one key.
    Key(KeyId),
}

impl fmt::Display for Limited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tenant(tenant) => write!(f, "tenant {tenant}"),
            Self::Key(key) => write!(f, "key {key}"),
        }
    }
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Ask<'a> {
    /// Under whose limits; each at most once.
    pub under: &'a [(Limited, RateLimits)],
    /// The most tokens the request can use.
    pub max_tokens: u64,
}

/// Which limit was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitKind {
    /// Requests a minute.
    Requests,
    /// Tokens a minute.
    Tokens,
    /// Requests at once.
    Concurrent,
}

/// Why a request is not admitted now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.text())]
pub struct Refused {
    /// Whose limit.
    pub whose: Limited,
    /// Which.
    pub kind: LimitKind,
    /// The limit.
    pub limit: u64,
    /// What was asked of it.
    pub asked: u64,
    /// After so long it would pass if nothing else came between. None: not while the limits are as they are.
    pub retry_after: Option<Duration>,
    /// For the answer.
    pub headers: RateHeaders,
}

/// When a place becomes free nobody knows; who is refused for want of one may ask again after this.
const CONCURRENCY_RETRY: Duration = Duration::from_secs(1);

impl Refused {
    fn text(&self) -> String {
        let Self { whose, limit, asked, .. } = self;
        let what = match self.kind {
            LimitKind::Concurrent => {
                return format!("{whose} has {limit} requests under way, which is its limit; wait for one to end");
            }
            LimitKind::Requests => format!("{whose} has used its {limit} requests a minute"),
            LimitKind::Tokens => {
                format!("{whose} has not enough left of its {limit} tokens a minute: this request may use {asked}")
            }
        };
        match self.retry_after {
            Some(wait) => format!("{what}; try again in {}", headers::duration(wait)),
            None => format!("{what}, more than a whole minute's; ask for fewer (max_tokens), or have the limit raised"),
        }
    }

    /// The `retry-after` header: whole seconds, none too few. None where trying again is of no use.
    pub fn retry_after_seconds(&self) -> Option<u64> {
        self.retry_after.map(|wait| wait.as_millis().div_ceil(1000).max(1) as u64)
    }
}

/// The state of all limits. Cheap to clone.
#[derive(Clone, Default)]
pub struct Limiter(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// One entry for a tenant or key that is in use; others are as good as full and are swept out.
    used: HashMap<Limited, Used>,
    sweep_at: usize,
}

/// Below this many entries nothing is swept.
const MIN_SWEEP: usize = 1024;

#[derive(Default)]
struct Used {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    concurrent: u32,
}

/// A request that was admitted. Its place is free when this drops.
#[must_use = "the place is given back when this drops"]
pub struct Permit {
    limiter: Limiter,
    under: Vec<Limited>,
    charged: u64,
    headers: RateHeaders,
}

impl Limiter {
    /// Nothing used yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Admits the request under all its limits, or says which one stands in the way for longest.
    pub fn admit(&self, ask: &Ask<'_>, now: UnixMillis) -> Result<Permit, Box<Refused>> {
        let mut state = self.state();
        state.sweep(now);
        for (whose, limits) in ask.under {
            state.used.entry(whose.clone()).or_default().follow(limits, now);
        }
        let in_the_way = ask.under.iter().filter_map(|(whose, limits)| {
            state.used[whose].short(limits, ask.max_tokens).map(|(kind, limit, wait)| (whose, kind, limit, wait))
        });
        // None, which is never, counts as longest.
        let worst = in_the_way.max_by_key(|(.., wait)| wait.unwrap_or(Duration::MAX));
        if let Some((whose, kind, limit, retry_after)) = worst {
            let asked = if kind == LimitKind::Tokens { ask.max_tokens } else { 1 };
            let headers = state.headers(ask.under);
            return Err(Box::new(Refused { whose: whose.clone(), kind, limit, asked, retry_after, headers }));
        }
        for (whose, _) in ask.under {
            state.used.entry(whose.clone()).or_default().take(ask.max_tokens);
        }
        let under = ask.under.iter().map(|(whose, _)| whose.clone()).collect();
        let headers = state.headers(ask.under);
        drop(state);
        Ok(Permit { limiter: self.clone(), under, charged: ask.max_tokens, headers })
    }

    /// Requests under way.
    pub fn under_way(&self, whose: &Limited) -> u32 {
        self.state().used.get(whose).map_or(0, |used| used.concurrent)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Permit {
    /// For the answer's head.
    pub fn headers(&self) -> &RateHeaders {
        &self.headers
    }

    /// Corrects the charge to what was used. To be called when it is known; without it the upper bound stays charged.
    pub fn settle(&mut self, used_tokens: u64, now: UnixMillis) {
        let mut state = self.limiter.state();
        for whose in &self.under {
            let Some(tokens) = state.used.get_mut(whose).and_then(|used| used.tokens.as_mut()) else { continue };
            tokens.refill(now);
            tokens.give_back(self.charged.saturating_sub(used_tokens));
            tokens.take(used_tokens.saturating_sub(self.charged));
        }
        drop(state);
        self.charged = used_tokens;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.limiter.state();
        for whose in &self.under {
            if let Some(used) = state.used.get_mut(whose) {
                used.concurrent = used.concurrent.saturating_sub(1);
            }
        }
    }
}

impl State {
    /// Forgets what is as good as new, each time the number of entries has doubled. What is left is in use, so there are
    /// no more entries than tenants and keys that asked within a minute.
    fn sweep(&mut self, now: UnixMillis) {
        if self.used.len() < self.sweep_at.max(MIN_SWEEP) {
            return;
        }
        self.used.retain(|_, used| {
            let mut is_idle = used.concurrent == 0;
            for bucket in used.requests.iter_mut().chain(&mut used.tokens) {
                bucket.refill(now);
                is_idle &= bucket.is_full();
            }
            !is_idle
        });
        self.sweep_at = self.used.len() * 2;
    }

    fn headers(&self, under: &[(Limited, RateLimits)]) -> RateHeaders {
        let used = || under.iter().filter_map(|(whose, _)| self.used.get(whose));
        RateHeaders {
            requests: used()
                .filter_map(|used| used.requests.as_ref())
                .map(Meter::of)
                .min_by_key(|meter| meter.remaining),
            tokens: used().filter_map(|used| used.tokens.as_ref()).map(Meter::of).min_by_key(|meter| meter.remaining),
        }
    }
}

impl Used {
    /// As of now, under these limits.
    fn follow(&mut self, limits: &RateLimits, now: UnixMillis) {
        for (bucket, limit) in
            [(&mut self.requests, limits.requests_per_minute), (&mut self.tokens, limits.tokens_per_minute)]
        {
            match (bucket.as_mut(), limit) {
                (_, None) => *bucket = None,
                (None, Some(limit)) => *bucket = Some(Bucket::full(limit, now)),
                (Some(bucket), Some(limit)) => {
                    bucket.refill(now);
                    if bucket.per_minute() != limit {
                        bucket.resize(limit);
                    }
                }
            }
        }
    }

    /// The limit that stands in the way for longest.
    fn short(&self, limits: &RateLimits, max_tokens: u64) -> Option<(LimitKind, u64, Option<Duration>)> {
        let bucket = |kind, bucket: &Option<Bucket>, count| {
            let bucket = bucket.as_ref()?;
            match bucket.check(count) {
                Ok(()) => None,
                Err(Short::Wait(wait)) => Some((kind, bucket.per_minute(), Some(wait))),
                Err(Short::Never) => Some((kind, bucket.per_minute(), None)),
            }
        };
        let full = limits.concurrent.filter(|limit| self.concurrent >= *limit);
        [
            bucket(LimitKind::Requests, &self.requests, 1),
            bucket(LimitKind::Tokens, &self.tokens, max_tokens),
            full.map(|limit| (LimitKind::Concurrent, u64::from(limit), (limit > 0).then_some(CONCURRENCY_RETRY))),
        ]
        .into_iter()
        .flatten()
        .max_by_key(|(.., wait)| wait.unwrap_or(Duration::MAX))
    }

    fn take(&mut self, max_tokens: u64) {
        self.requests.iter_mut().for_each(|bucket| bucket.take(1));
        self.tokens.iter_mut().for_each(|bucket| bucket.take(max_tokens));
        self.concurrent += 1;
    }
}

#[cfg(test)]
mod tests;
