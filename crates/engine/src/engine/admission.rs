//! The door: who is let in, decided on the caller's thread.
//!
//! A refusal must not wait for the model thread, which may be in the middle of a long step. So the places in the queue
//! are an atomic count on this side: a request takes one when it is submitted and gives it back when the model thread
//! first schedules it, or drops it. The scheduler keeps the same bound on its side and, since every request it knows
//! holds a place here, never has to refuse for it. The other refusals (too long, never fits, bad values) depend on the
//! limits alone and are decided here too.
//!
//! It must not know what a request asks for. Its invariant: a place is given back exactly once, by [`Ticket`]'s drop at
//! the latest.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::EngineError;

/// What a refused client is told to wait at least and at most.
pub(crate) const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_mins(1);

/// Shared by the handles and the model thread.
#[derive(Debug)]
pub(crate) struct Door {
    closed: AtomicBool,
    max_queued_requests: usize,
    num_queued: AtomicUsize,
    num_unfinished: AtomicUsize,
    /// Of the unfinished ones' prompts, not computed yet.
    num_pending_tokens: AtomicUsize,
    next_key: AtomicU64,
    /// Of [`QueuePace`], in microseconds; 0 before the first one is known.
    interval_us: AtomicU64,
    /// When a request last left the queue, in microseconds since `opened`.
    last_start_us: AtomicU64,
    opened: Instant,
}

impl Door {
    pub(crate) fn new(max_queued_requests: usize) -> Arc<Self> {
        Arc::new(Self {
            closed: AtomicBool::new(false),
            max_queued_requests,
            num_queued: AtomicUsize::new(0),
            num_unfinished: AtomicUsize::new(0),
            num_pending_tokens: AtomicUsize::new(0),
            next_key: AtomicU64::new(0),
            interval_us: AtomicU64::new(0),
            last_start_us: AtomicU64::new(0),
            opened: Instant::now(),
        })
    }

    /// So many places in the queue, or the refusal: a group that does not fit takes none.
    pub(crate) fn enter(self: &Arc<Self>, num_asked: usize) -> Result<Vec<Ticket>, EngineError> {
        if self.is_closed() {
            return Err(EngineError::ShuttingDown);
        }
        let max_queued = self.max_queued_requests;
        let taken = self.num_queued.fetch_update(Ordering::AcqRel, Ordering::Acquire, |queued| {
            queued.checked_add(num_asked).filter(|&queued| queued <= max_queued)
        });
        if let Err(num_queued) = taken {
            let retry_after = self.retry_after(num_queued);
            return Err(EngineError::QueueFull { num_asked, num_queued, max_queued, retry_after });
        }
        self.num_unfinished.fetch_add(num_asked, Ordering::AcqRel);
        let first_key = self.next_key.fetch_add(num_asked as u64, Ordering::Relaxed);
        let keys = first_key..first_key + num_asked as u64;
        let ticket = |key| Ticket { door: Arc::clone(self), key, is_queued: true, num_pending_tokens: 0 };
        Ok(keys.map(ticket).collect())
    }

    /// Lets nobody in any more.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub(crate) fn max_queued_requests(&self) -> usize {
        self.max_queued_requests
    }

    pub(crate) fn num_queued(&self) -> usize {
        self.num_queued.load(Ordering::Acquire)
    }

    pub(crate) fn num_unfinished(&self) -> usize {
        self.num_unfinished.load(Ordering::Acquire)
    }

    /// Prompt tokens that stand before a new request, in the queue or in prompts that are half computed.
    pub(crate) fn num_pending_tokens(&self) -> usize {
        self.num_pending_tokens.load(Ordering::Acquire)
    }

    /// When the queue as it stands will have been worked off at the recent pace.
    fn retry_after(&self, num_queued: usize) -> Duration {
        self.time_for(num_queued).clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX)
    }

    /// Until so many have left the queue, at the recent pace; zero where none is known. A pace that has stalled counts as slow as
    /// the stall is long.
    pub(crate) fn time_for(&self, num_queued: usize) -> Duration {
        let now_us = self.opened.elapsed().as_micros() as u64;
        let stalled_us = now_us.saturating_sub(self.last_start_us.load(Ordering::Relaxed));
        let interval_us = match self.interval_us.load(Ordering::Relaxed) {
            0 => 0,
            interval => interval.max(stalled_us),
        };
        Duration::from_micros(interval_us.saturating_mul(num_queued as u64))
    }
}

/// A request's place, first in the queue, then among the unfinished. Dropping it gives back what it still holds.
#[derive(Debug)]
pub(crate) struct Ticket {
    door: Arc<Door>,
    key: u64,
    is_queued: bool,
    /// Of its prompt, still to be computed.
    num_pending_tokens: usize,
}

impl Ticket {
    /// Unique among all requests of this engine.
    pub(crate) fn key(&self) -> u64 {
        self.key
    }

    pub(crate) fn is_queued(&self) -> bool {
        self.is_queued
    }

    /// So long is its prompt.
    pub(crate) fn expect(&mut self, num_tokens: usize) {
        self.num_pending_tokens += num_tokens;
        self.door.num_pending_tokens.fetch_add(num_tokens, Ordering::AcqRel);
    }

    /// So much of its prompt was computed.
    pub(crate) fn computed(&mut self, num_tokens: usize) {
        let num_tokens = num_tokens.min(self.num_pending_tokens);
        self.num_pending_tokens -= num_tokens;
        self.door.num_pending_tokens.fetch_sub(num_tokens, Ordering::AcqRel);
    }

    /// The request was first scheduled: its place in the queue is free. False where it had been before.
    pub(crate) fn leave_queue(&mut self) -> bool {
        if self.is_queued {
            self.is_queued = false;
            self.door.num_queued.fetch_sub(1, Ordering::AcqRel);
            return true;
        }
        false
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.leave_queue();
        self.computed(self.num_pending_tokens);
        self.door.num_unfinished.fetch_sub(1, Ordering::AcqRel);
    }
}

/// How fast the queue moves, observed on the model thread.
#[derive(Debug, Default)]
pub(crate) struct QueuePace {
    mean_us: f64,
    last_start: Option<Instant>,
    was_backlogged: bool,
}

impl QueuePace {
    /// `num_started` requests (at least one) left the queue at `now`. Only times in which others kept waiting say how
    /// fast the queue moves; the rest say how fast requests arrive.
    pub(crate) fn observe(&mut self, door: &Door, now: Instant, num_started: usize) {
        const WEIGHT_OF_NEWEST: f64 = 0.2;
        if let (Some(last), true) = (self.last_start, self.was_backlogged) {
            let interval_us = (now - last).as_micros() as f64 / num_started as f64;
            self.mean_us = if self.mean_us == 0.0 {
                interval_us
            } else {
                self.mean_us + WEIGHT_OF_NEWEST * (interval_us - self.mean_us)
            };
            door.interval_us.store(self.mean_us.max(1.0) as u64, Ordering::Relaxed);
        }
        door.last_start_us.store((now - door.opened).as_micros() as u64, Ordering::Relaxed);
        self.last_start = Some(now);
        self.was_backlogged = door.num_queued() > 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter_alone(door: &Arc<Door>) -> Result<Ticket, EngineError> {
        door.enter(1).map(|mut tickets| tickets.pop().unwrap())
    }

    #[test]
    fn places_are_bounded_and_come_back() {
        let door = Door::new(2);
        let first = enter_alone(&door).unwrap();
        let mut second = enter_alone(&door).unwrap();
        assert!(matches!(door.enter(1), Err(EngineError::QueueFull { num_queued: 2, max_queued: 2, .. })));
        assert!(second.leave_queue());
        assert!(!second.leave_queue(), "a place is given back once");
        let third = enter_alone(&door).unwrap();
        assert_eq!((door.num_queued(), door.num_unfinished()), (2, 3));
        drop((first, second, third));
        assert_eq!((door.num_queued(), door.num_unfinished()), (0, 0));
        door.close();
        assert!(matches!(door.enter(1), Err(EngineError::ShuttingDown)));
    }

    #[test]
    fn pending_tokens_are_what_was_expected_and_neither_computed_nor_given_up() {
        let door = Door::new(3);
        let (mut first, mut second) = (enter_alone(&door).unwrap(), enter_alone(&door).unwrap());
        first.expect(100);
        second.expect(20);
        assert_eq!(door.num_pending_tokens(), 120);
        first.computed(64);
        assert!(first.leave_queue());
        assert_eq!(door.num_pending_tokens(), 56, "half computed, and out of the queue");
        first.computed(64);
        assert_eq!(door.num_pending_tokens(), 20, "no more than there was");
        drop(second);
        assert_eq!(door.num_pending_tokens(), 0);
    }

    #[test]
    fn a_group_takes_all_its_places_or_none() {
        let door = Door::new(3);
        let alone = enter_alone(&door).unwrap();
        for num_asked in [3, 4, usize::MAX] {
            let refusal = door.enter(num_asked).unwrap_err();
            assert!(matches!(refusal, EngineError::QueueFull { num_queued: 1, .. }), "{refusal:?}");
            assert_eq!((door.num_queued(), door.num_unfinished()), (1, 1), "nothing was taken");
        }
        let group = door.enter(2).unwrap();
        let mut keys: Vec<u64> = group.iter().chain([&alone]).map(Ticket::key).collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!((keys.len(), door.num_queued(), door.num_unfinished()), (3, 3, 3));
        drop((alone, group));
        assert_eq!((door.num_queued(), door.num_unfinished()), (0, 0));
    }

    #[test]
    fn retry_after_follows_the_pace_of_the_queue() {
        let door = Door::new(10);
        let tickets: Vec<_> = (0..10).map(|_| enter_alone(&door).unwrap()).collect();
        let retry_after = || match door.enter(1) {
            Err(EngineError::QueueFull { retry_after, .. }) => retry_after,
            other => panic!("{other:?}"),
        };
        assert_eq!(retry_after(), RETRY_AFTER_MIN, "nothing is known yet");
        let mut pace = QueuePace::default();
        let start = door.opened;
        pace.observe(&door, start, 1);
        pace.observe(&door, start + Duration::from_secs(2), 1);
        assert_eq!(retry_after(), Duration::from_secs(20), "ten places at two seconds each");
        pace.observe(&door, start + Duration::from_secs(2000), 1);
        assert_eq!(retry_after(), RETRY_AFTER_MAX);
        drop(tickets);
    }
}
