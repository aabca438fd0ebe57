//! Points in time as the gateway counts them: milliseconds of UTC, and the days and months that budgets renew at.
//!
//! Everything that depends on the time takes it as an argument; only the edges of the process ask [`UnixMillis::now`].
//!
//! **Invariant**: days and months are UTC's, whatever the machine's own zone is, so that nodes agree.

use std::{fmt, time::Duration};

use chrono::{DateTime, Datelike, Months, NaiveDate, SecondsFormat, Utc};

/// Milliseconds since 1970, UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixMillis(pub i64);

impl UnixMillis {
    /// What the machine's clock says.
    pub fn now() -> Self {
        Self(Utc::now().timestamp_millis())
    }

    /// So much later.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)))
    }

    /// So much earlier.
    #[must_use]
    pub fn before(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)))
    }

    /// How long ago `earlier` was; nothing where it lies ahead, as after a clock was set back.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// `2026-11-28`. A time that no calendar holds counts to its first or last day.
    pub fn day(self) -> String {
        self.date().to_string()
    }

    /// Midnight at which the day begins that [`day`](Self::day) calls so.
    pub fn of_day(day: &str) -> Option<Self> {
        let date = NaiveDate::parse_from_str(day, "%Y-%m-%d").ok()?;
        (date.to_string() == day).then(|| Self::midnight(Some(date)))
    }

    /// `2026-11`.
    pub fn month(self) -> String {
        self.date().format("%Y-%m").to_string()
    }

    /// Midnight at which the next day begins.
    #[must_use]
    pub fn next_day(self) -> Self {
        Self::midnight(self.date().succ_opt())
    }

    /// Midnight at which the next month begins.
    #[must_use]
    pub fn next_month(self) -> Self {
        Self::midnight(self.date().with_day(1).and_then(|first| first.checked_add_months(Months::new(1))))
    }

    fn date(self) -> NaiveDate {
        let end = if self.0 < 0 { DateTime::<Utc>::MIN_UTC } else { DateTime::<Utc>::MAX_UTC };
        DateTime::from_timestamp_millis(self.0).unwrap_or(end).date_naive()
    }

    fn midnight(date: Option<NaiveDate>) -> Self {
        let midnight = date.and_then(|date| date.and_hms_opt(0, 0, 0));
        Self(midnight.map_or(i64::MAX, |midnight| midnight.and_utc().timestamp_millis()))
    }
}

impl fmt::Display for UnixMillis {
    /// As RFC 3339 writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match DateTime::<Utc>::from_timestamp_millis(self.0) {
            Some(time) => f.write_str(&time.to_rfc3339_opts(SecondsFormat::Secs, true)),
            None => write!(f, "{} ms after 1970", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2024-02-29T23:59:59.999Z, by `date -u -d ... +%s`.
    const LEAP: UnixMillis = UnixMillis(1_709_251_199_999);

    #[test]
    fn days_and_months_end_at_utc_midnight() {
        assert_eq!((LEAP.day().as_str(), LEAP.month().as_str()), ("2024-02-29", "2024-02"));
        assert_eq!(LEAP.next_day(), UnixMillis(1_709_251_200_000));
        assert_eq!(LEAP.next_month(), LEAP.next_day());
        assert_eq!(LEAP.next_day().day(), "2024-03-01");
        assert_eq!(LEAP.next_day().next_month().to_string(), "2024-04-01T00:00:00Z");
        assert_eq!(UnixMillis::of_day("2024-03-01"), Some(LEAP.next_day()));
        for none in ["2023-02-29", "2024-3-1", "2024-03-01 ", ""] {
            assert_eq!(UnixMillis::of_day(none), None, "{none}");
        }
        // The last day of a long month: the next one has no such day.
        assert_eq!(UnixMillis(1_706_659_200_000).next_month().day(), "2024-02-01");
    }

    #[test]
    fn no_time_is_too_far_for_a_name() {
        for time in [UnixMillis(i64::MIN), UnixMillis(i64::MAX)] {
            assert!(!time.day().is_empty() && !time.to_string().is_empty());
            assert!(time.next_day() >= UnixMillis(i64::MIN));
        }
        assert_eq!(UnixMillis(5).since(UnixMillis(9)), Duration::ZERO, "a clock set back takes no time");
    }
}
