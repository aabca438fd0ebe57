//! What an upstream answered, before anyone has read it: status, headers, bytes; and what its headers say about waiting.
//!
//! Knows no body. Invariant: a wait is only reported where the upstream named one; an absent, negative or unreadable
//! header is no wait of zero.

use std::time::Duration;

use chrono::{DateTime, Utc};
use http::HeaderMap;
use serde_json::Value;

/// One answer's outside.
#[derive(Clone, Copy, Debug)]
pub struct Reply<'a> {
    /// HTTP's.
    pub status: u16,
    /// HTTP's.
    pub headers: &'a HeaderMap,
    /// All of the body.
    pub body: &'a [u8],
    /// When it came.
    pub at: DateTime<Utc>,
}

impl Reply<'_> {
    /// The body as JSON.
    pub(crate) fn json(&self) -> Option<Value> {
        serde_json::from_slice(self.body).ok()
    }

    /// How long the upstream asks to wait: `retry-after-ms`, `retry-after` (seconds or a date), else the reset of a rate
    /// limit that is used up.
    pub fn retry_after(&self) -> Option<Duration> {
        let milliseconds = self.header("retry-after-ms").and_then(|text| text.parse::<f64>().ok());
        let milliseconds = milliseconds.and_then(|value| seconds(value / 1000.0));
        milliseconds.or_else(|| self.header("retry-after").and_then(|text| self.wait(text))).or_else(|| self.reset())
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim)
    }

    /// Seconds, or an HTTP date.
    fn wait(&self, text: &str) -> Option<Duration> {
        match text.parse::<f64>() {
            Ok(value) => seconds(value),
            Err(_) => DateTime::parse_from_rfc2822(text).ok().map(|date| self.until(date.to_utc())),
        }
    }

    /// A moment that has passed is a wait of zero.
    fn until(&self, moment: DateTime<Utc>) -> Duration {
        (moment - self.at).to_std().unwrap_or(Duration::ZERO)
    }

    /// The longest reset of the limits whose remainder is zero.
    fn reset(&self) -> Option<Duration> {
        let openai = ["requests", "tokens"]
            .map(|what| (format!("x-ratelimit-remaining-{what}"), format!("x-ratelimit-reset-{what}")));
        let anthropic = ["requests", "tokens", "input-tokens", "output-tokens"]
            .map(|what| (format!("anthropic-ratelimit-{what}-remaining"), format!("anthropic-ratelimit-{what}-reset")));
        openai
            .iter()
            .chain(&anthropic)
            .filter(|(remaining, _)| self.header(remaining) == Some("0"))
            .filter_map(|(_, reset)| self.reset_time(self.header(reset)?))
            .max()
    }

    /// OpenAI writes `6m0s`, Azure whole seconds (-1 and 0: unknown), Anthropic a time of RFC 3339.
    fn reset_time(&self, text: &str) -> Option<Duration> {
        if let Ok(value) = text.parse::<f64>() {
            return seconds(value).filter(|wait| !wait.is_zero());
        }
        match DateTime::parse_from_rfc3339(text) {
            Ok(moment) => Some(self.until(moment.to_utc())),
            Err(_) => duration(text),
        }
    }
}

/// A number of seconds that is one.
fn seconds(value: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(value).ok()
}

/// A duration as OpenAI and Google write it: `1s`, `6m0s`, `20ms`, `1h2m3.5s`.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    let mut total = 0.0;
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let end = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        total += number
            * match &rest[..end] {
                "ms" => 0.001,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                "d" => 86_400.0,
                _ => return None,
            };
        rest = &rest[end..];
    }
    seconds(total)
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    fn wait(headers: &[(&str, &str)]) -> Option<Duration> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap());
        }
        let at = "2026-11-28T12:00:00Z".parse().unwrap();
        Reply { status: 429, headers: &map, body: b"", at }.retry_after()
    }

    #[test]
    fn waits_are_read_in_every_form_in_use() {
        let millis = |value| Some(Duration::from_millis(value));
        assert_eq!(wait(&[]), None);
        assert_eq!(wait(&[("retry-after", "7")]), millis(7000));
        assert_eq!(wait(&[("retry-after", "1.5")]), millis(1500));
        assert_eq!(wait(&[("retry-after-ms", "250"), ("retry-after", "9")]), millis(250));
        assert_eq!(wait(&[("retry-after", "Sat, 28 Nov 2026 12:00:30 GMT")]), millis(30_000));
        assert_eq!(wait(&[("retry-after", "Sat, 28 Nov 2026 11:00:00 GMT")]), millis(0));
        for nonsense in ["-1", "soon", "NaN", "inf", ""] {
            assert_eq!(wait(&[("retry-after", nonsense)]), None, "{nonsense}");
        }
    }

    #[test]
    fn a_used_up_limit_says_when_it_is_whole_again() {
        let openai = [("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "6m0s")];
        assert_eq!(wait(&openai), Some(Duration::from_mins(6)));
        let azure = [("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "11")];
        assert_eq!(wait(&azure), Some(Duration::from_secs(11)));
        let unknown = [("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "-1")];
        assert_eq!(wait(&unknown), None);
        let anthropic = [
            ("anthropic-ratelimit-tokens-remaining", "0"),
            ("anthropic-ratelimit-tokens-reset", "2026-11-28T12:00:20Z"),
            ("anthropic-ratelimit-requests-remaining", "5"),
            ("anthropic-ratelimit-requests-reset", "2026-11-28T13:00:00Z"),
        ];
        assert_eq!(wait(&anthropic), Some(Duration::from_secs(20)));
    }

    #[test]
    fn durations_are_read_as_written() {
        assert_eq!(duration("20ms"), Some(Duration::from_millis(20)));
        assert_eq!(duration("1h2m3.5s"), Some(Duration::from_millis(3_723_500)));
        assert_eq!(duration("46s"), Some(Duration::from_secs(46)));
        for nonsense in ["", "s", "5", "5x", "1s!", "-1s", "1.2.3s"] {
            assert_eq!(duration(nonsense), None, "{nonsense}");
        }
    }
}
