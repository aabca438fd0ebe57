//! Whether to try again, and after how long.
//!
//! Pure: attempts, time left and a random number come in. Invariant: the wait ends before the deadline, and is never
//! shorter than what the upstream asked for; what may have cost something is tried again once, and only by whoever pays.

use std::time::Duration;

use crate::providers::error::{Cause, Retry, UpstreamError};

/// In all, of attempts that may have cost something: each is paid.
const MAX_PAID_ATTEMPTS: u32 = 2;

/// Bounds of trying again.
#[derive(Clone, Debug, PartialEq)]
pub struct RetryLimits {
    /// In all, the first included.
    pub max_attempts: u32,
    /// Before the second attempt; it doubles with each.
    pub first_wait: Duration,
    /// The longest of our own waits.
    pub max_wait: Duration,
    /// An upstream that asks for more is not waited for: another can be asked meanwhile.
    pub max_retry_after: Duration,
}

/// An attempt that failed.
#[derive(Clone, Copy, Debug)]
pub struct Failed<'a> {
    /// How.
    pub error: &'a UpstreamError,
    /// Counts from 1.
    pub attempt: u32,
    /// Until the request's deadline.
    pub time_left: Duration,
    /// From 0 to 1: spreads the waits of requests that failed together.
    pub random: f64,
}

impl RetryLimits {
    /// How long to wait before the next attempt of one that cost nothing; `None`: there is none.
    pub fn wait(&self, failed: &Failed) -> Option<Duration> {
        let may_be_tried = !failed.error.spent.may_cost() && failed.attempt < self.max_attempts;
        if may_be_tried { self.delay(failed) } else { None }
    }

    /// The same after an attempt that may have cost something. Silence is not asked twice: it costs most and says least.
    pub fn wait_to_pay_again(&self, failed: &Failed) -> Option<Duration> {
        let may_be_tried = failed.error.spent.may_cost()
            && failed.error.cause != Cause::Timeout
            && failed.attempt < self.max_attempts.min(MAX_PAID_ATTEMPTS);
        if may_be_tried { self.delay(failed) } else { None }
    }

    fn delay(&self, failed: &Failed) -> Option<Duration> {
        if failed.error.retry() != Retry::Here {
            return None;
        }
        let doublings = failed.attempt.saturating_sub(1).min(31);
        let most = self.first_wait.saturating_mul(1 << doublings).min(self.max_wait);
        // Half of it for sure, the other half by chance.
        let ours = most.mul_f64(0.5 + failed.random.clamp(0.0, 1.0) / 2.0);
        let wait = match failed.error.retry_after {
            Some(asked) if asked > self.max_retry_after => return None,
            Some(asked) => asked.saturating_add(ours.mul_f64(0.25)),
            None => ours,
        };
        (wait < failed.time_left).then_some(wait)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::providers::error::Spent;

    const LIMITS: RetryLimits = RetryLimits {
        max_attempts: 4,
        first_wait: Duration::from_millis(500),
        max_wait: Duration::from_secs(8),
        max_retry_after: Duration::from_mins(1),
    };

    fn wait(cause: Cause, retry_after: Option<u64>, attempt: u32, left: u64) -> Option<Duration> {
        let mut error = UpstreamError::new(cause, "x");
        error.retry_after = retry_after.map(Duration::from_secs);
        LIMITS.wait(&Failed { error: &error, attempt, time_left: Duration::from_secs(left), random: 1.0 })
    }

    #[test]
    fn only_what_another_try_may_help_is_tried_again() {
        for cause in
            [Cause::Failed, Cause::Overloaded, Cause::RateLimited, Cause::Timeout, Cause::Unreachable, Cause::Malformed]
        {
            assert_eq!(wait(cause, None, 1, 100), Some(Duration::from_millis(500)), "{cause:?}");
        }
        for cause in [
            Cause::Invalid,
            Cause::ContextLength,
            Cause::ContentFilter,
            Cause::Auth,
            Cause::Quota,
            Cause::ModelUnavailable,
        ] {
            assert_eq!(wait(cause, None, 1, 100), None, "{cause:?}");
        }
        assert_eq!(wait(Cause::Failed, None, 4, 100), None);
        assert_eq!(wait(Cause::Failed, None, 3, 100), Some(Duration::from_secs(2)));
    }

    #[test]
    fn an_upstream_s_wait_is_kept_or_not_waited_for() {
        assert!(wait(Cause::RateLimited, Some(7), 1, 100).unwrap() >= Duration::from_secs(7));
        assert_eq!(wait(Cause::RateLimited, Some(7), 1, 7), None);
        assert_eq!(wait(Cause::RateLimited, Some(61), 1, 1000), None);
    }

    #[test]
    fn what_may_have_cost_something_is_paid_for_twice_at_most() {
        let limits = RetryLimits { max_attempts: 9, ..LIMITS };
        let waits = |cause: Cause, spent: Spent, attempt| {
            let error = UpstreamError::new(cause, "x").having_spent(spent);
            let failed = Failed { error: &error, attempt, time_left: Duration::from_secs(99), random: 1.0 };
            (limits.wait(&failed).is_some(), limits.wait_to_pay_again(&failed).is_some())
        };
        assert_eq!(waits(Cause::Malformed, Spent::Nothing, 1), (true, false));
        assert_eq!(waits(Cause::Malformed, Spent::Unknown, 1), (false, true));
        assert_eq!(waits(Cause::Unfit, Spent::Unknown, 2), (false, false));
        assert_eq!(waits(Cause::Timeout, Spent::Unknown, 1), (false, false));
        assert_eq!(waits(Cause::Auth, Spent::Unknown, 1), (false, false));
    }

    proptest! {
        #[test]
        fn a_wait_is_within_its_bounds(attempt in 1u32..50, random in 0.0f64..=1.0, left in 0u64..100, asked in prop::option::of(0u64..100)) {
            let mut error = UpstreamError::new(Cause::Failed, "x");
            error.retry_after = asked.map(Duration::from_secs);
            let limits = RetryLimits { max_attempts: 100, ..LIMITS };
            let time_left = Duration::from_secs(left);
            if let Some(wait) = limits.wait(&Failed { error: &error, attempt, time_left, random }) {
                prop_assert!(wait < time_left);
                prop_assert!(wait >= error.retry_after.unwrap_or_default());
                prop_assert!(wait <= error.retry_after.unwrap_or_default() + limits.max_wait);
            }
        }
    }
}
