//! The shape of `models.toml`, and of an operator's additions to it.
//!
//! Models name a profile of capabilities and say where they differ. Knows no request. Invariant: a table that reads has
//! no model without a known profile, no alias to nowhere, and no two price lists for one model that begin the same day.

use std::collections::{BTreeMap, BTreeSet};

use chrono::NaiveDate;
use serde::Deserialize;

use super::{
    Capabilities, Capability, Catalogue, Efforts, Family, LimitField, Listed, ModelEntry, Rate, SamplingSupport,
    Thinking,
    price::{LongPrompt, Price, Rates},
};
use crate::providers::fields::Word;

/// What is wrong with a table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// Not TOML of this shape.
    #[error("the table of models cannot be read: {0}")]
    Syntax(String),
    /// A word that is not known.
    #[error("model `{model}`: `{value}` is not a known {what}")]
    UnknownWord {
        /// Where.
        model: String,
        /// The word.
        value: String,
        /// Its kind.
        what: &'static str,
    },
    /// One name, two models.
    #[error("the name `{0}` stands for two models; remove one")]
    Duplicate(String),
    /// Nothing there.
    #[error("`{name}` refers to `{to}`, which is not in the table; name a model that is")]
    Dangling {
        /// Who refers.
        name: String,
        /// To what.
        to: String,
    },
    /// Two price lists that begin the same day.
    #[error("model `{0}` has two price lists that begin the same day; give each a `from` of its own")]
    OverlappingPrices(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    as_of: String,
    profile: BTreeMap<String, Profile>,
    model: Vec<Row>,
}

/// Capabilities that several models share.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Profile {
    family: String,
    can: BTreeSet<Capability>,
    sampling: SamplingSupport,
    thinking: Thinking,
    #[serde(default)]
    efforts: Vec<String>,
    limit_field: LimitField,
    max_answers: u64,
    /// Of every price list, unless it says otherwise.
    flex_permille: Option<u32>,
    priority_permille: Option<u32>,
}

/// One model.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    id: String,
    profile: String,
    #[serde(default)]
    aliases: Vec<String>,
    /// What the provider knows it by; absent: the id.
    wire: Option<String>,
    max_input: u64,
    max_output: u64,
    retires: Option<String>,
    successor: Option<String>,
    /// Beyond the profile.
    #[serde(default)]
    can: BTreeSet<Capability>,
    /// Less than the profile.
    #[serde(default)]
    cannot: BTreeSet<Capability>,
    sampling: Option<SamplingSupport>,
    thinking: Option<Thinking>,
    efforts: Option<Vec<String>>,
    max_answers: Option<u64>,
    #[serde(default)]
    price: Vec<PriceRow>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PriceRow {
    from: Option<String>,
    until: Option<String>,
    input: Rate,
    cached: Option<Rate>,
    cache_write: Option<Rate>,
    output: Rate,
    #[serde(default)]
    long: Vec<LongRow>,
    flex_permille: Option<u32>,
    priority_permille: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LongRow {
    above: u64,
    input: Rate,
    cached: Option<Rate>,
    cache_write: Option<Rate>,
    output: Rate,
}

/// A price in an operator's config: it holds on every day.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct PriceOverride(pub Rates);

/// A model in an operator's config: another price for a known one, or one of the operator's own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelOverride {
    /// What requests call it.
    #[serde(default)]
    pub id: String,
    /// The known model whose capabilities, limits and prices it has unless told otherwise.
    pub like: Option<String>,
    /// What the provider is to be asked for; absent: the id.
    pub deployment: Option<String>,
    /// Most tokens of a prompt.
    pub max_input: Option<u64>,
    /// Most tokens of an answer.
    pub max_output: Option<u64>,
    /// In place of all dated prices.
    pub price: Option<PriceOverride>,
}

impl ModelOverride {
    /// `base` is the entry it is like, or of its own name, where there is one.
    pub(super) fn apply(&self, base: Option<&ModelEntry>) -> Result<ModelEntry, TableError> {
        let mut entry = match (base, &self.like) {
            (Some(base), _) => base.clone(),
            (None, Some(to)) => return Err(TableError::Dangling { name: self.id.clone(), to: to.clone() }),
            (None, None) => ModelEntry::open(&self.id),
        };
        if self.like.is_some() {
            // Another host keeps a model as long as it likes, and under a name of its own.
            entry.retires = None;
        }
        if entry.id != self.id {
            // Whoever names a snapshot means that one, not what the family's name stands for at present.
            entry.wire_name.clone_from(&self.id);
        }
        entry.id.clone_from(&self.id);
        if let Some(deployment) = &self.deployment {
            entry.wire_name.clone_from(deployment);
        }
        entry.max_input_tokens = self.max_input.or(entry.max_input_tokens);
        entry.max_output_tokens = self.max_output.or(entry.max_output_tokens);
        if let Some(PriceOverride(rates)) = self.price {
            entry.prices = vec![Price {
                from: None,
                until: None,
                rates,
                long_prompt: Vec::new(),
                flex_permille: None,
                priority_permille: None,
            }];
        }
        Ok(entry)
    }
}

/// Reads a table.
pub(super) fn read(text: &str) -> Result<Catalogue, TableError> {
    let table: Table = toml::from_str(text).map_err(|error| TableError::Syntax(error.to_string()))?;
    let as_of = date("the table", &table.as_of)?;
    let mut models = BTreeMap::new();
    let mut aliases = BTreeMap::new();
    for row in table.model {
        for alias in &row.aliases {
            if aliases.insert(alias.clone(), row.id.clone()).is_some() {
                return Err(TableError::Duplicate(alias.clone()));
            }
        }
        let (id, successor) = (row.id.clone(), row.successor.clone());
        let entry = entry(row, &table.profile)?;
        if models.insert(id.clone(), Listed { entry, successor }).is_some() {
            return Err(TableError::Duplicate(id));
        }
    }
    for alias in aliases.keys() {
        if models.contains_key(alias) {
            return Err(TableError::Duplicate(alias.clone()));
        }
    }
    for (id, listed) in &models {
        if let Some(to) = listed.successor.as_ref().filter(|to| !models.contains_key(*to)) {
            return Err(TableError::Dangling { name: id.clone(), to: to.clone() });
        }
    }
    Ok(Catalogue { models, aliases, as_of })
}

fn entry(row: Row, profiles: &BTreeMap<String, Profile>) -> Result<ModelEntry, TableError> {
    let unknown = |value: &str, what| TableError::UnknownWord { model: row.id.clone(), value: value.to_owned(), what };
    let profile = profiles.get(&row.profile).ok_or_else(|| unknown(&row.profile, "profile"))?;
    let family = Family::from_word(&profile.family).ok_or_else(|| unknown(&profile.family, "family"))?;
    let words = row.efforts.as_ref().unwrap_or(&profile.efforts);
    let efforts = words
        .iter()
        .map(|word| Word::from_word(word).ok_or_else(|| unknown(word, "effort")))
        .collect::<Result<Vec<_>, _>>()?;
    let flags = profile.can.union(&row.can).filter(|flag| !row.cannot.contains(flag)).copied().collect();
    let retires = row.retires.as_deref().map(|text| date(&row.id, text)).transpose()?;
    let prices = row.price.iter().map(|price| price.read(&row.id, profile)).collect::<Result<Vec<_>, _>>()?;
    let beginnings: BTreeSet<_> = prices.iter().map(|price| price.from).collect();
    if beginnings.len() < prices.len() {
        return Err(TableError::OverlappingPrices(row.id));
    }
    Ok(ModelEntry {
        wire_name: row.wire.unwrap_or_else(|| row.id.clone()),
        family,
        max_input_tokens: Some(row.max_input),
        max_output_tokens: Some(row.max_output),
        retires,
        capabilities: Capabilities {
            flags,
            sampling: row.sampling.unwrap_or(profile.sampling),
            thinking: row.thinking.unwrap_or(profile.thinking),
            efforts: Efforts::new(efforts),
            limit_field: profile.limit_field,
            max_answers: row.max_answers.unwrap_or(profile.max_answers),
        },
        prices,
        id: row.id,
    })
}

impl PriceRow {
    fn read(&self, model: &str, profile: &Profile) -> Result<Price, TableError> {
        let day = |text: &Option<String>| text.as_deref().map(|text| date(model, text)).transpose();
        let mut long_prompt: Vec<LongPrompt> = self
            .long
            .iter()
            .map(|row| LongPrompt {
                above_prompt_tokens: row.above,
                rates: Rates { input: row.input, cached: row.cached, cache_write: row.cache_write, output: row.output },
            })
            .collect();
        long_prompt.sort_by_key(|tier| tier.above_prompt_tokens);
        Ok(Price {
            from: day(&self.from)?,
            until: day(&self.until)?,
            rates: Rates { input: self.input, cached: self.cached, cache_write: self.cache_write, output: self.output },
            long_prompt,
            flex_permille: self.flex_permille.or(profile.flex_permille),
            priority_permille: self.priority_permille.or(profile.priority_permille),
        })
    }
}

fn date(model: &str, text: &str) -> Result<NaiveDate, TableError> {
    text.parse().map_err(|_| TableError::UnknownWord {
        model: model.to_owned(),
        value: text.to_owned(),
        what: "date (write 2026-11-30)",
    })
}
