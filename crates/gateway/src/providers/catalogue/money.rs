//! Prices and costs in whole numbers.
//!
//! A list price is dollars per million tokens with a few decimals; a token is then worth whole picodollars, and a request
//! whole nanodollars, rounded up once at its end. Invariant: no float takes part in a sum, and rounding never favours
//! the one who pays.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, de::Error};

/// Decimals of a list price that a [`Rate`] can hold.
const RATE_DECIMALS: usize = 6;
/// Highest list price: a typing error rather than a price.
const MAX_USD_PER_MILLION: u64 = 100_000;

/// A price of one token, in picodollars: one millionth of the dollars per million tokens that price lists show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(u64);

/// A text that is no price.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is no price: write dollars per million tokens, such as 2.5, with at most {RATE_DECIMALS} decimals, up to \
     {MAX_USD_PER_MILLION}"
)]
pub struct RateError {
    text: String,
}

impl Rate {
    /// Picodollars a token.
    pub const fn picodollars(self) -> u64 {
        self.0
    }
}

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Self, RateError> {
        let error = || RateError { text: text.to_owned() };
        let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
        let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() || !digits(whole) || !digits(decimals) || decimals.len() > RATE_DECIMALS {
            return Err(error());
        }
        let dollars: u64 = whole.parse().map_err(|_| error())?;
        if dollars > MAX_USD_PER_MILLION {
            return Err(error());
        }
        let fraction: u64 = format!("{decimals:0<RATE_DECIMALS$}").parse().map_err(|_| error())?;
        Ok(Self(dollars * 10u64.pow(RATE_DECIMALS as u32) + fraction))
    }
}

impl fmt::Display for Rate {
    /// Dollars per million tokens.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let unit = 10u64.pow(RATE_DECIMALS as u32);
        let fraction = format!("{:06}", self.0 % unit);
        match fraction.trim_end_matches('0') {
            "" => write!(f, "{}", self.0 / unit),
            fraction => write!(f, "{}.{fraction}", self.0 / unit),
        }
    }
}

impl<'de> Deserialize<'de> for Rate {
    /// From a string, an integer or a float as its shortest decimal text: the number a person wrote.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Text(String),
            Whole(u64),
            Decimal(f64),
        }
        let text = match Written::deserialize(deserializer)? {
            Written::Text(text) => text,
            Written::Whole(whole) => whole.to_string(),
            Written::Decimal(decimal) => decimal.to_string(),
        };
        text.parse().map_err(D::Error::custom)
    }
}

/// What something costs, in nanodollars.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cost(u64);

impl Cost {
    /// So many nanodollars.
    pub const fn from_nanodollars(nanodollars: u64) -> Self {
        Self(nanodollars)
    }

    /// A sum of tokens times rates, times a factor in thousandths, rounded up.
    pub(super) fn of(picodollars: u128, factor_permille: u32) -> Self {
        let nanodollars = picodollars.saturating_mul(u128::from(factor_permille)).div_ceil(1_000_000);
        Self(u64::try_from(nanodollars).unwrap_or(u64::MAX))
    }

    /// The number.
    pub const fn nanodollars(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "${}.{:09}", self.0 / 1_000_000_000, self.0 % 1_000_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_prices_are_exact() {
        for (text, picodollars) in
            [("2.5", 2_500_000), ("0.075", 75_000), ("0.0375", 37_500), ("150", 150_000_000), ("0", 0), ("0.000001", 1)]
        {
            let rate: Rate = text.parse().unwrap();
            assert_eq!(rate.picodollars(), picodollars);
            assert_eq!(rate.to_string(), text);
        }
        for text in ["", ".5", "-1", "1e3", "0.0000001", "100001", "2,5", "2.5.1", " 1"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_price_may_be_written_as_a_number() {
        #[derive(Deserialize)]
        struct Row {
            rate: Rate,
        }
        for (text, shown) in
            [("rate = 2.5", "2.5"), ("rate = 2", "2"), ("rate = \"0.1\"", "0.1"), ("rate = 0.3", "0.3")]
        {
            assert_eq!(toml::from_str::<Row>(text).unwrap().rate.to_string(), shown);
        }
        assert!(toml::from_str::<Row>("rate = -2.5").is_err());
        assert!(toml::from_str::<Row>("rate = nan").is_err());
    }

    #[test]
    fn costs_round_up_once_and_do_not_overflow() {
        assert_eq!(Cost::of(1, 1000).nanodollars(), 1);
        assert_eq!(Cost::of(1000, 1000).nanodollars(), 1);
        assert_eq!(Cost::of(1001, 500).nanodollars(), 1);
        assert_eq!(Cost::of(u128::MAX, 1000).nanodollars(), u64::MAX);
        assert_eq!(Cost::from_nanodollars(1_250_000_000).to_string(), "$1.250000000");
    }
}
