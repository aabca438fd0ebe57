//! A token bucket in whole numbers: it holds a minute's worth and fills evenly.
//!
//! The level is counted in sixty-thousandths of a unit, so that a millisecond adds exactly `per_minute` of them and
//! nothing is ever rounded. What is taken may be corrected later, so the level can fall below zero: a request that used
//! more than was foreseen is paid for by those that follow.
//!
//! **Invariant**: from any moment on, in any span of time no more is taken than a minute's worth plus what flowed in
//! (corrections apart), and the wait that is named is the shortest after which the same taking succeeds.

use std::time::Duration;

use crate::clock::UnixMillis;

/// Parts of a unit: milliseconds a minute.
const PARTS: i128 = 60_000;

/// So much a minute.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    per_minute: u64,
    /// In parts; at most `per_minute * PARTS`.
    level: i128,
    at: UnixMillis,
}

/// Why nothing was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Short {
    /// After so long it is there, if nobody else takes it.
    Wait(Duration),
    /// More than the bucket ever holds.
    Never,
}

impl Bucket {
    pub(super) fn full(per_minute: u64, now: UnixMillis) -> Self {
        Self { per_minute, level: i128::from(per_minute) * PARTS, at: now }
    }

    /// The level as of now. A clock that was set back adds nothing and takes nothing.
    pub(super) fn refill(&mut self, now: UnixMillis) {
        let gained = now.since(self.at).as_millis() as i128 * i128::from(self.per_minute);
        self.level = (self.level + gained).min(self.capacity());
        self.at = self.at.max(now);
    }

    /// Follows a changed setting; what was used stays used.
    pub(super) fn resize(&mut self, per_minute: u64) {
        let used = self.capacity() - self.level;
        self.per_minute = per_minute;
        self.level = self.capacity() - used;
    }

    /// Whether it could be taken as of the last refill.
    pub(super) fn check(&self, count: u64) -> Result<(), Short> {
        let asked = i128::from(count) * PARTS;
        if asked > self.capacity() {
            return Err(Short::Never);
        }
        if asked <= self.level {
            return Ok(());
        }
        Err(Short::Wait(self.time_for(asked - self.level)))
    }

    /// Takes what [`check`](Self::check) allowed, or what was used beyond it. Nobody owes more than a minute's worth: the counts of
    /// others may be anything.
    pub(super) fn take(&mut self, count: u64) {
        self.level = (self.level - i128::from(count) * PARTS).max(-self.capacity());
    }

    /// Gives back, as of the last refill.
    pub(super) fn give_back(&mut self, count: u64) {
        self.level = (self.level + i128::from(count) * PARTS).min(self.capacity());
    }

    pub(super) fn per_minute(&self) -> u64 {
        self.per_minute
    }

    /// Whole units that could be taken.
    pub(super) fn remaining(&self) -> u64 {
        u64::try_from(self.level.max(0) / PARTS).unwrap_or(u64::MAX)
    }

    /// Until it is full again.
    pub(super) fn reset_in(&self) -> Duration {
        self.time_for(self.capacity() - self.level)
    }

    pub(super) fn is_full(&self) -> bool {
        self.level >= self.capacity()
    }

    fn capacity(&self) -> i128 {
        i128::from(self.per_minute) * PARTS
    }

    /// The first whole millisecond by which so many parts have flowed in.
    fn time_for(&self, parts: i128) -> Duration {
        if self.per_minute == 0 {
            return Duration::MAX;
        }
        let per_millisecond = i128::from(self.per_minute);
        let millis = (parts.max(0) + per_millisecond - 1) / per_millisecond;
        Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The same rule, step by step: every millisecond adds its part, and an exact fraction is kept as two numbers.
    struct Naive {
        per_minute: u64,
        whole: i64,
        sixty_thousandths: i64,
    }

    impl Naive {
        fn tick(&mut self) {
            self.sixty_thousandths += self.per_minute as i64;
            while self.sixty_thousandths >= 60_000 {
                self.sixty_thousandths -= 60_000;
                self.whole += 1;
            }
            if self.whole >= self.per_minute as i64 {
                (self.whole, self.sixty_thousandths) = (self.per_minute as i64, 0);
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Pass(u64),
        Take(u64),
        GiveBack(u64),
        Overdraw(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..3_000u64).prop_map(Step::Pass),
            (0..150u64).prop_map(Step::Take),
            (0..20u64).prop_map(Step::GiveBack),
            (0..50u64).prop_map(Step::Overdraw),
        ];
        prop::collection::vec(step, 0..60)
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_naive_twin(per_minute in 1..130u64, steps in steps()) {
            let mut now = UnixMillis(1_000_000);
            let mut bucket = Bucket::full(per_minute, now);
            let mut twin = Naive { per_minute, whole: per_minute as i64, sixty_thousandths: 0 };
            for step in steps {
                bucket.refill(now);
                match step {
                    Step::Pass(millis) => {
                        now = now.after(Duration::from_millis(millis));
                        (0..millis).for_each(|_| twin.tick());
                    }
                    Step::Take(count) => {
                        let allowed = count as i64 <= twin.whole;
                        prop_assert_eq!(bucket.check(count).is_ok(), allowed);
                        if allowed {
                            bucket.take(count);
                            twin.whole -= count as i64;
                        }
                    }
                    Step::GiveBack(count) => {
                        bucket.give_back(count);
                        twin.whole += count as i64;
                        if twin.whole >= per_minute as i64 {
                            (twin.whole, twin.sixty_thousandths) = (per_minute as i64, 0);
                        }
                    }
                    Step::Overdraw(count) => {
                        bucket.take(count);
                        twin.whole -= count as i64;
                        if twin.whole < -(per_minute as i64) {
                            (twin.whole, twin.sixty_thousandths) = (-(per_minute as i64), 0);
                        }
                    }
                }
                bucket.refill(now);
                prop_assert_eq!(bucket.remaining() as i64, twin.whole.max(0));
            }
        }

        #[test]
        fn the_wait_it_names_is_the_shortest_that_helps(per_minute in 1..5_000u64, used in 0..9_000u64, asked in 1..5_000u64) {
            let now = UnixMillis(0);
            let mut bucket = Bucket::full(per_minute, now);
            bucket.take(used);
            match bucket.check(asked) {
                Ok(()) => prop_assert!(asked + used <= per_minute),
                Err(Short::Never) => prop_assert!(asked > per_minute),
                Err(Short::Wait(wait)) => {
                    let at = |millis| {
                        let mut later = bucket.clone();
                        later.refill(UnixMillis(millis));
                        later.check(asked).is_ok()
                    };
                    let wait = wait.as_millis() as i64;
                    prop_assert!(at(wait) && !at(wait - 1));
                }
            }
        }
    }

    #[test]
    fn a_clock_set_back_gives_nothing_twice() {
        let mut bucket = Bucket::full(60, UnixMillis(10_000));
        bucket.take(60);
        bucket.refill(UnixMillis(12_000));
        assert_eq!(bucket.remaining(), 2);
        bucket.refill(UnixMillis(11_000));
        bucket.refill(UnixMillis(12_000));
        assert_eq!(bucket.remaining(), 2);
    }

    #[test]
    fn a_changed_limit_keeps_what_was_used() {
        let mut bucket = Bucket::full(100, UnixMillis(0));
        bucket.take(80);
        bucket.resize(90);
        assert_eq!(bucket.remaining(), 10);
        bucket.resize(50);
        assert_eq!((bucket.remaining(), bucket.reset_in()), (0, Duration::from_secs(96)));
        bucket.resize(0);
        assert_eq!(bucket.reset_in(), Duration::MAX, "nothing flows in, so it never fills");
    }
}
