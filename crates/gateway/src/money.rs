//! Money, counted in whole nano-dollars.
//!
//! List prices are dollars per million tokens with up to four decimals, so the price of one token is a whole number of
//! nano-dollars or a short fraction of one; an `i64` of them holds nine thousand million dollars. Knows no prices, tokens'
//! origins or currencies but the one.
//!
//! **Invariant**: no sum wraps and no sum is rounded: what does not fit is `None`, and a price is only ever rounded up.

use std::{fmt, str::FromStr};

const NANOS_PER_DOLLAR: i64 = 1_000_000_000;

/// An amount of US dollars, exact to 10⁻⁹.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Money(i64);

impl Money {
    /// Nothing.
    pub const ZERO: Self = Self(0);
    /// The largest amount.
    pub const MAX: Self = Self(i64::MAX);

    /// From nano-dollars.
    pub const fn from_nanos(nanos: i64) -> Self {
        Self(nanos)
    }

    /// In nano-dollars.
    pub const fn nanos(self) -> i64 {
        self.0
    }

    /// From a float of dollars, as config files hold them; rounded to the nearest nano-dollar.
    pub fn from_dollars(dollars: f64) -> Option<Self> {
        let nanos = (dollars * NANOS_PER_DOLLAR as f64).round();
        // 2^63 itself does not fit, and is the float that `i64::MAX` would become.
        (nanos.is_finite() && nanos.abs() < i64::MAX as f64).then_some(Self(nanos as i64))
    }

    /// `None` where the sum does not fit.
    pub fn checked_add(self, other: Self) -> Option<Self> {
        self.0.checked_add(other.0).map(Self)
    }

    /// `None` where the difference does not fit.
    pub fn checked_sub(self, other: Self) -> Option<Self> {
        self.0.checked_sub(other.0).map(Self)
    }

    /// Of the sum what fits.
    #[must_use]
    pub fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// Of the difference what fits.
    #[must_use]
    pub fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// This amount a million, for so many: what tokens cost at a list price. Rounded up, so that many small requests
    /// never cost less than one large one.
    pub fn per_million(self, count: u64) -> Option<Self> {
        self.proportion(u128::from(count), 1_000_000)
    }

    /// `self * part / whole`, rounded up (towards more).
    pub(crate) fn proportion(self, part: u128, whole: u128) -> Option<Self> {
        let (part, whole) = (i128::try_from(part).ok()?, i128::try_from(whole).ok()?);
        let product = i128::from(self.0).checked_mul(part)?;
        let floor = product.checked_div_euclid(whole)?;
        let up = i128::from(product.checked_rem_euclid(whole)? != 0);
        i64::try_from(floor + up).ok().map(Self)
    }
}

impl fmt::Display for Money {
    /// `$1.25`: two decimals, and more where they say something.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.0 < 0 { "-" } else { "" };
        let nanos = self.0.unsigned_abs();
        let (whole, fraction) = (nanos / NANOS_PER_DOLLAR as u64, nanos % NANOS_PER_DOLLAR as u64);
        let digits = format!("{fraction:09}");
        let shown = digits.trim_end_matches('0').len().max(2);
        f.pad(&format!("{sign}${whole}.{}", &digits[..shown]))
    }
}

impl fmt::Debug for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What is no amount.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no amount of dollars: write digits with at most nine decimals, as 12.50")]
pub struct NotMoney(String);

impl FromStr for Money {
    type Err = NotMoney;

    /// `12.5`, `$12.50` or `-0.000000001`.
    fn from_str(text: &str) -> Result<Self, NotMoney> {
        let not = || NotMoney(text.to_owned());
        let (negative, rest) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
        let rest = rest.strip_prefix('$').unwrap_or(rest);
        let (whole, fraction) = rest.split_once('.').unwrap_or((rest, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(whole) || !digits(fraction) || fraction.len() > 9 {
            return Err(not());
        }
        let nanos: i128 = format!("{whole}{fraction:0<9}").parse().map_err(|_| not())?;
        i64::try_from(if negative { -nanos } else { nanos }).map(Self).map_err(|_| not())
    }
}

impl serde::Serialize for Money {
    /// As a number of dollars, which is what tools that read JSON expect.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0 as f64 / NANOS_PER_DOLLAR as f64)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn amounts_are_shown_as_people_write_them() {
        for (nanos, shown) in [
            (0, "$0.00"),
            (1_250_000_000, "$1.25"),
            (1, "$0.000000001"),
            (-2_500_000_000, "-$2.50"),
            (120_000, "$0.00012"),
            (i64::MIN, "-$9223372036.854775808"),
        ] {
            assert_eq!(Money(nanos).to_string(), shown);
            assert_eq!(shown.parse(), Ok(Money(nanos)), "and read back");
        }
        assert_eq!(format!("{:>8}", Money(1_250_000_000)), "   $1.25");
    }

    #[test]
    fn what_is_no_amount_is_said_to_be_none() {
        for text in ["", "$", "1.", ".5", "1.0000000001", "1e3", "--1", "9223372037", "1,5", "+1", "1.-5"] {
            assert_eq!(text.parse::<Money>(), Err(NotMoney(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn a_list_price_times_tokens_is_exact_and_rounds_up() {
        let price = Money::from_dollars(0.15).unwrap();
        assert_eq!(price.per_million(1_000_000), Some(price));
        assert_eq!(price.per_million(1), Some(Money(150)));
        assert_eq!(Money(1).per_million(1), Some(Money(1)), "a thousandth of a nano-dollar costs one");
        assert_eq!(Money(1).per_million(0), Some(Money::ZERO));
        assert_eq!(Money::MAX.per_million(2_000_000), None, "what does not fit is no small number");
    }

    #[test]
    fn floats_that_are_no_amounts_are_refused() {
        for dollars in [f64::NAN, f64::INFINITY, 1e10, -1e10] {
            assert_eq!(Money::from_dollars(dollars), None);
        }
        assert_eq!(Money::from_dollars(2.10), Some(Money(2_100_000_000)));
    }

    proptest! {
        #[test]
        fn every_amount_survives_its_own_text(nanos: i64) {
            prop_assert_eq!(Money(nanos).to_string().parse(), Ok(Money(nanos)));
        }

        #[test]
        fn a_proportion_is_the_smallest_amount_not_below_the_exact_one(
            nanos in 0..1_000_000_000_000i64, part in 0..10_000_000u64, whole in 1..10_000_000u64,
        ) {
            let got = i128::from(Money(nanos).proportion(part.into(), whole.into()).unwrap().0);
            let exact = i128::from(nanos) * i128::from(part);
            prop_assert!(got * i128::from(whole) >= exact);
            prop_assert!((got - 1) * i128::from(whole) < exact);
        }
    }
}
