//! What an answer says of the limits, as OpenAI writes it: `x-ratelimit-{limit,remaining,reset}-{requests,tokens}`.
//!
//! **Invariant**: of several limits the one with the least left is told, and a reset is never too early.

use std::{fmt::Write as _, time::Duration};

use super::bucket::Bucket;

/// The state of one limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meter {
    /// A minute's worth.
    pub limit: u64,
    /// Left now.
    pub remaining: u64,
    /// Until all of it is there again.
    pub reset_in: Duration,
}

impl Meter {
    pub(super) fn of(bucket: &Bucket) -> Self {
        Self { limit: bucket.per_minute(), remaining: bucket.remaining(), reset_in: bucket.reset_in() }
    }
}

/// The state of both limits; none where there is no such limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateHeaders {
    /// Requests a minute.
    pub requests: Option<Meter>,
    /// Tokens a minute.
    pub tokens: Option<Meter>,
}

impl RateHeaders {
    /// Names and values.
    pub fn pairs(&self) -> Vec<(&'static str, String)> {
        const REQUESTS: [&str; 3] =
            ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"];
        const TOKENS: [&str; 3] =
            ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"];
        let mut pairs = Vec::with_capacity(6);
        for (meter, [limit, remaining, reset]) in [(self.requests, REQUESTS), (self.tokens, TOKENS)] {
            if let Some(meter) = meter {
                pairs.push((limit, meter.limit.to_string()));
                pairs.push((remaining, meter.remaining.to_string()));
                pairs.push((reset, duration(meter.reset_in)));
            }
        }
        pairs
    }
}

/// `20ms`, `1s`, `1.5s`, `6m0s`, `2h0m0s`.
pub(super) fn duration(duration: Duration) -> String {
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if millis < 1000 {
        return format!("{millis}ms");
    }
    let (hours, minutes, millis) = (millis / 3_600_000, millis / 60_000 % 60, millis % 60_000);
    let mut text = String::new();
    // Writing to a String cannot fail.
    if hours > 0 {
        let _ = write!(text, "{hours}h");
    }
    if hours > 0 || minutes > 0 {
        let _ = write!(text, "{minutes}m");
    }
    let _ = write!(text, "{}", millis / 1000);
    if millis % 1000 != 0 {
        let fraction = format!("{:03}", millis % 1000);
        let _ = write!(text, ".{}", fraction.trim_end_matches('0'));
    }
    text.push('s');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_openai_writes_them() {
        for (millis, text) in [
            (0, "0ms"),
            (20, "20ms"),
            (1_000, "1s"),
            (1_500, "1.5s"),
            (59_999, "59.999s"),
            (60_000, "1m0s"),
            (360_000, "6m0s"),
            (7_200_050, "2h0m0.05s"),
        ] {
            assert_eq!(duration(Duration::from_millis(millis)), text);
        }
    }
}
