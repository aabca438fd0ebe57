//! What a request costs: dated prices, a dearer list for long prompts, and factors for slower or faster service.
//!
//! Knows no request, only counts. Invariant: [`ModelEntry::upper_bound`] is at least [`ModelEntry::price`] of any usage
//! within its bound on the same day (a property test holds it).

use chrono::{DateTime, NaiveDate, Utc};
use serde::Deserialize;

use super::{Cost, ModelEntry, Rate};
use crate::providers::{chat::ServiceTier, usage::Usage};

/// Thousandths: the list price itself.
const LIST_PRICE: u32 = 1000;

/// Prices for a span of days.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Price {
    /// First day (UTC); absent: since ever.
    pub from: Option<NaiveDate>,
    /// First day on which it no longer holds; absent: open.
    pub until: Option<NaiveDate>,
    /// For prompts of ordinary length.
    pub rates: Rates,
    /// For longer ones, by ascending threshold: the whole request costs these.
    pub long_prompt: Vec<LongPrompt>,
    /// Thousandths of the list price for the slower service; absent: not offered.
    pub flex_permille: Option<u32>,
    /// Thousandths of the list price for the faster service; absent: not offered.
    pub priority_permille: Option<u32>,
}

/// Per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rates {
    /// Of the prompt.
    pub input: Rate,
    /// Of the prompt, from the cache; absent: as `input`.
    #[serde(alias = "cached_input")]
    pub cached: Option<Rate>,
    /// Of the prompt, into the cache; absent: as `input`.
    pub cache_write: Option<Rate>,
    /// Of the answer.
    pub output: Rate,
}

/// A dearer list for prompts above a length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongPrompt {
    /// It holds for longer prompts than this.
    pub above_prompt_tokens: u64,
    /// Per token.
    pub rates: Rates,
}

/// At which price list a request was served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServedTier {
    /// The list price.
    #[default]
    Standard,
    /// Slower, cheaper.
    Flex,
    /// Faster, dearer.
    Priority,
}

impl ServedTier {
    /// What a request's `service_tier` may lead to: for its bound.
    pub fn asked(tier: Option<ServiceTier>) -> Self {
        match tier {
            None | Some(ServiceTier::Auto | ServiceTier::Default | ServiceTier::Scale) => Self::Standard,
            Some(ServiceTier::Flex) => Self::Flex,
            Some(ServiceTier::Priority | ServiceTier::Fast) => Self::Priority,
        }
    }

    /// What an answer's `service_tier` says, in any provider's words.
    pub(crate) fn from_wire(word: &str) -> Self {
        match word.to_ascii_lowercase().as_str() {
            "flex" => Self::Flex,
            "priority" | "fast" => Self::Priority,
            _ => Self::Standard,
        }
    }
}

/// The most a request can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// Of the prompt.
    pub max_prompt_tokens: u64,
    /// Of all answers together, reasoning included.
    pub max_output_tokens: u64,
    /// The service asked for.
    pub tier: ServedTier,
}

/// There is no cost to name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PriceError {
    /// No price at all, or none for that day.
    #[error("the model `{model}` has no price on {on}; give it one under its upstream in the config")]
    Unknown {
        /// Which.
        model: String,
        /// The day.
        on: NaiveDate,
    },
}

impl Price {
    fn holds(&self, on: NaiveDate) -> bool {
        self.from.is_none_or(|from| from <= on) && self.until.is_none_or(|until| on < until)
    }

    fn rates(&self, prompt_tokens: u64) -> &Rates {
        let longer = self.long_prompt.iter().rev().find(|tier| prompt_tokens > tier.above_prompt_tokens);
        longer.map_or(&self.rates, |tier| &tier.rates)
    }

    fn factor(&self, tier: ServedTier) -> u32 {
        match tier {
            ServedTier::Standard => LIST_PRICE,
            ServedTier::Flex => self.flex_permille.unwrap_or(LIST_PRICE),
            // Not in the table, and yet served: the highest factor in use.
            ServedTier::Priority => self.priority_permille.unwrap_or(2 * LIST_PRICE),
        }
    }
}

impl Rates {
    fn cached(&self) -> Rate {
        self.cached.unwrap_or(self.input)
    }

    fn cache_write(&self) -> Rate {
        self.cache_write.unwrap_or(self.input)
    }

    fn picodollars(&self, usage: &Usage) -> u128 {
        let fresh = usage.prompt.saturating_sub(usage.cached).saturating_sub(usage.cache_write);
        let parts = [
            (fresh, self.input),
            (usage.cached, self.cached()),
            (usage.cache_write, self.cache_write()),
            (usage.completion, self.output),
        ];
        parts.iter().map(|(count, rate)| u128::from(*count) * u128::from(rate.picodollars())).sum()
    }
}

impl ModelEntry {
    /// The price list of a day; where two hold, the one that began last.
    pub fn price_list(&self, at: DateTime<Utc>) -> Result<&Price, PriceError> {
        let on = at.date_naive();
        let holding = self.prices.iter().filter(|price| price.holds(on));
        holding.max_by_key(|price| price.from).ok_or_else(|| PriceError::Unknown { model: self.id.clone(), on })
    }

    /// What a request that began at `at` costs.
    pub fn price(&self, usage: &Usage, at: DateTime<Utc>) -> Result<Cost, PriceError> {
        let price = self.price_list(at)?;
        Ok(Cost::of(price.rates(usage.prompt).picodollars(usage), price.factor(usage.tier)))
    }

    /// What a request that begins at `at` can cost at most.
    pub fn upper_bound(&self, bound: &Bound, at: DateTime<Utc>) -> Result<Cost, PriceError> {
        let price = self.price_list(at)?;
        let reachable = price.long_prompt.iter().filter(|tier| bound.max_prompt_tokens > tier.above_prompt_tokens);
        let lists = std::iter::once(&price.rates).chain(reachable.map(|tier| &tier.rates));
        let most = lists.map(|rates| {
            let dearest = rates.input.max(rates.cached()).max(rates.cache_write());
            u128::from(bound.max_prompt_tokens) * u128::from(dearest.picodollars())
                + u128::from(bound.max_output_tokens) * u128::from(rates.output.picodollars())
        });
        // A provider may serve a request at the list price that asked for less.
        let factor = price.factor(bound.tier).max(LIST_PRICE);
        Ok(Cost::of(most.max().unwrap_or(0), factor))
    }
}
