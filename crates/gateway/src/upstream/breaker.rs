//! A circuit breaker: an upstream that keeps failing is left alone for a while, then tried by one request.
//!
//! ```text
//!            max_failures in a row, or a fatal one
//!   closed ----------------------------------------> open (open_for, doubling up to max_open_for)
//!     ^                                                |
//!     | the probe succeeds           time is up, next request
//!     +----------------- half open <-------------------+
//!                             |  the probe fails: open again
//! ```
//!
//! Pure: time comes in as an argument. Invariant: while half open a request is let through at most every [`PROBE_HOLDS`]; one
//! that gives no verdict (given up by the client) leaves the state as if it had not been.

use std::time::{Duration, Instant};

/// A probe that has said nothing for so long may be one of the slow ones: the next request is a probe, too.
pub const PROBE_HOLDS: Duration = Duration::from_secs(5);

/// When it opens, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerLimits {
    /// Failures in a row that open it.
    pub max_failures: u32,
    /// First pause.
    pub open_for: Duration,
    /// Longest pause: each failed probe doubles it up to this.
    pub max_open_for: Duration,
}

/// One upstream's breaker.
#[derive(Clone, Debug)]
pub struct Breaker {
    limits: BreakerLimits,
    state: State,
    /// Raised with each change of state: a verdict from before the change says nothing about now.
    era: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed { num_failures: u32 },
    Open { until: Instant, pause: Duration },
    HalfOpen { next_probe: Instant, pause: Duration },
}

/// What metrics show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// Requests pass.
    Closed,
    /// None does.
    Open,
    /// One does.
    HalfOpen,
}

/// A request that was let through; its verdict is owed.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a breaker waits for the verdict"]
pub struct Pass {
    era: u64,
}

/// How a request ended, as far as the upstream's health goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It answered, be it with a no.
    Healthy,
    /// It failed.
    Failing,
    /// It will fail until someone does something: a refused key, an empty account.
    Fatal,
    /// Nobody waited for the answer.
    Unknown,
}

impl Breaker {
    /// Closed.
    pub fn new(limits: BreakerLimits) -> Self {
        Self { limits, state: State::Closed { num_failures: 0 }, era: 0 }
    }

    /// Lets a request through, or says how long none will be.
    pub fn try_pass(&mut self, now: Instant) -> Result<Pass, Duration> {
        match self.state {
            State::Closed { .. } => Ok(Pass { era: self.era }),
            State::Open { until, pause } if until <= now => {
                self.enter(State::HalfOpen { next_probe: now + PROBE_HOLDS, pause });
                Ok(Pass { era: self.era })
            }
            State::Open { until, .. } => Err(until - now),
            // All probes are of one era: the first verdict counts, whosever it is.
            State::HalfOpen { next_probe, pause } if next_probe <= now => {
                self.state = State::HalfOpen { next_probe: now + PROBE_HOLDS, pause };
                Ok(Pass { era: self.era })
            }
            State::HalfOpen { next_probe, .. } => Err(next_probe - now),
        }
    }

    /// The upstream has begun to answer: enough for a probe, whose answer may take minutes. In a closed breaker the
    /// verdict stays open to the answer's end.
    pub fn begun(&mut self, pass: &Pass) {
        if pass.era == self.era && matches!(self.state, State::HalfOpen { .. }) {
            self.enter(State::Closed { num_failures: 0 });
        }
    }

    /// Takes a request's verdict.
    #[expect(clippy::needless_pass_by_value, reason = "a pass is used up by its verdict")]
    pub fn record(&mut self, pass: Pass, verdict: Verdict, now: Instant) {
        if pass.era != self.era {
            return;
        }
        match (self.state, verdict) {
            (State::Closed { .. }, Verdict::Healthy) => self.state = State::Closed { num_failures: 0 },
            (State::Closed { num_failures }, Verdict::Failing) if num_failures + 1 < self.limits.max_failures => {
                self.state = State::Closed { num_failures: num_failures + 1 };
            }
            (State::Closed { .. }, Verdict::Failing | Verdict::Fatal) => self.open(self.limits.open_for, now),
            (State::HalfOpen { .. }, Verdict::Healthy) => self.enter(State::Closed { num_failures: 0 }),
            (State::HalfOpen { pause, .. }, Verdict::Failing | Verdict::Fatal) => {
                self.open((pause * 2).min(self.limits.max_open_for), now);
            }
            // As if it had not been: the next request is the probe.
            (State::HalfOpen { pause, .. }, Verdict::Unknown) => self.enter(State::Open { until: now, pause }),
            // Nothing was learnt; and while it is open no pass is given.
            (State::Closed { .. }, Verdict::Unknown) | (State::Open { .. }, _) => {}
        }
    }

    /// What it is at a moment.
    pub fn state(&self) -> BreakerState {
        match self.state {
            State::Closed { .. } => BreakerState::Closed,
            State::Open { .. } => BreakerState::Open,
            State::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    fn open(&mut self, pause: Duration, now: Instant) {
        self.enter(State::Open { until: now + pause, pause });
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.era += 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: BreakerLimits =
        BreakerLimits { max_failures: 3, open_for: Duration::from_secs(10), max_open_for: Duration::from_secs(40) };

    fn fail(breaker: &mut Breaker, now: Instant, times: u32) {
        for _ in 0..times {
            let pass = breaker.try_pass(now).unwrap();
            breaker.record(pass, Verdict::Failing, now);
        }
    }

    #[test]
    fn failures_in_a_row_open_it_and_a_success_between_does_not() {
        let (mut breaker, now) = (Breaker::new(LIMITS), Instant::now());
        for _ in 0..5 {
            fail(&mut breaker, now, 2);
            let pass = breaker.try_pass(now).unwrap();
            breaker.record(pass, Verdict::Healthy, now);
        }
        fail(&mut breaker, now, 3);
        assert_eq!(breaker.try_pass(now), Err(LIMITS.open_for));
        let pass = Breaker::new(LIMITS).try_pass(now).unwrap();
        let mut fatal = Breaker::new(LIMITS);
        fatal.record(pass, Verdict::Fatal, now);
        assert_eq!(fatal.state(), BreakerState::Open);
    }

    #[test]
    fn one_probe_decides_and_the_pause_doubles_up_to_its_bound() {
        let (mut breaker, mut now) = (Breaker::new(LIMITS), Instant::now());
        fail(&mut breaker, now, 3);
        for pause in [10, 20, 40, 40] {
            let pause = Duration::from_secs(pause);
            assert_eq!(breaker.try_pass(now), Err(pause));
            now += pause;
            let probe = breaker.try_pass(now).unwrap();
            assert_eq!(breaker.state(), BreakerState::HalfOpen);
            assert!(breaker.try_pass(now).is_err(), "a second probe");
            breaker.record(probe, Verdict::Failing, now);
        }
        now += LIMITS.max_open_for;
        let probe = breaker.try_pass(now).unwrap();
        breaker.record(probe, Verdict::Healthy, now);
        assert_eq!(breaker.state(), BreakerState::Closed);
        fail(&mut breaker, now, 3);
        assert_eq!(breaker.try_pass(now), Err(LIMITS.open_for), "the pause starts over");
    }

    #[test]
    fn a_probe_that_nobody_waited_for_does_not_block_the_next() {
        let (mut breaker, mut now) = (Breaker::new(LIMITS), Instant::now());
        fail(&mut breaker, now, 3);
        now += LIMITS.open_for;
        let probe = breaker.try_pass(now).unwrap();
        breaker.record(probe, Verdict::Unknown, now);
        assert!(breaker.try_pass(now).is_ok());
    }

    #[test]
    fn a_slow_probe_does_not_hold_the_others_out() {
        let (mut breaker, mut now) = (Breaker::new(LIMITS), Instant::now());
        fail(&mut breaker, now, 3);
        now += LIMITS.open_for;
        let slow = breaker.try_pass(now).unwrap();
        now += Duration::from_secs(2);
        assert_eq!(breaker.try_pass(now), Err(Duration::from_secs(3)), "and the wait is the true one");
        now += PROBE_HOLDS;
        let second = breaker.try_pass(now).unwrap();
        assert!(breaker.try_pass(now).is_err());
        breaker.record(slow, Verdict::Healthy, now);
        assert_eq!(breaker.state(), BreakerState::Closed);
        breaker.record(second, Verdict::Failing, now);
        assert!(breaker.try_pass(now).is_ok(), "too late to count");
    }

    #[test]
    fn a_probe_that_has_begun_to_answer_lets_the_others_in() {
        let (mut breaker, mut now) = (Breaker::new(LIMITS), Instant::now());
        fail(&mut breaker, now, 3);
        now += LIMITS.open_for;
        let probe = breaker.try_pass(now).unwrap();
        breaker.begun(&probe);
        assert_eq!(breaker.state(), BreakerState::Closed);
        fail(&mut breaker, now, 2);
        breaker.record(probe, Verdict::Healthy, now);
        fail(&mut breaker, now, 1);
        assert_eq!(breaker.state(), BreakerState::Open, "the old verdict changed nothing");
    }

    #[test]
    fn a_late_verdict_says_nothing() {
        let (mut breaker, mut now) = (Breaker::new(LIMITS), Instant::now());
        let late = breaker.try_pass(now).unwrap();
        fail(&mut breaker, now, 3);
        now += LIMITS.open_for;
        let _probe = breaker.try_pass(now).unwrap();
        breaker.record(late, Verdict::Healthy, now);
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
    }

    proptest! {
        /// However requests come and end: never two probes at once, never a pause beyond the bound, never stuck.
        #[test]
        fn it_always_opens_again(steps in prop::collection::vec((0u8..4, 0u64..30), 0..60)) {
            let (mut breaker, mut now) = (Breaker::new(LIMITS), Instant::now());
            let mut under_way: Vec<Pass> = Vec::new();
            for (step, seconds) in steps {
                now += Duration::from_secs(seconds);
                let was = breaker.state();
                match breaker.try_pass(now) {
                    Ok(pass) => under_way.push(pass),
                    Err(wait) => prop_assert!(wait <= LIMITS.max_open_for),
                }
                prop_assert!(was != BreakerState::HalfOpen || breaker.state() == BreakerState::HalfOpen);
                if step > 0 && !under_way.is_empty() {
                    let verdict = [Verdict::Healthy, Verdict::Failing, Verdict::Unknown][usize::from(step) - 1];
                    breaker.record(under_way.remove(0), verdict, now);
                }
            }
            for pass in under_way {
                breaker.record(pass, Verdict::Unknown, now);
            }
            now += LIMITS.max_open_for;
            prop_assert!(breaker.try_pass(now).is_ok());
        }
    }
}
