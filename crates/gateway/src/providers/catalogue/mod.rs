//! Which models the providers have, what they can do, what they cost and until when.
//!
//! All of it is data: `models.toml`, embedded, over which an operator's own prices and models merge. No translation
//! names a model; it asks an entry's capabilities. Knows no request and no clock: a date comes in. Invariant: a model
//! without a price for a date has no cost, never a cost of zero.
//!
//! Reading order: [`ModelEntry`], [`Catalogue`], [`price`], [`money`], `table` (the file's shape).

mod capabilities;
pub mod money;
pub mod price;
mod table;

use std::collections::BTreeMap;

use chrono::{DateTime, NaiveDate, Utc};

pub use capabilities::{Capabilities, Capability, Efforts, LimitField, SamplingSupport, Thinking};
pub use money::{Cost, Rate};
pub use price::{Bound, Price, PriceError, ServedTier};
pub use table::{ModelOverride, PriceOverride, TableError};

/// The table that comes with this version.
const BUILT_IN: &str = include_str!("../models.toml");

/// One model of one provider.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelEntry {
    /// What the table calls it.
    pub id: String,
    /// What the provider is to be asked for: the id, or the name of a deployment.
    pub wire_name: String,
    /// Whose it is.
    pub family: Family,
    /// Most tokens of a prompt, where known.
    pub max_input_tokens: Option<u64>,
    /// Most tokens of an answer, where known.
    pub max_output_tokens: Option<u64>,
    /// The day it stops, where announced.
    pub retires: Option<NaiveDate>,
    /// What it can do.
    pub capabilities: Capabilities,
    /// Dated; empty: unknown.
    pub prices: Vec<Price>,
}

crate::providers::fields::words! {
    /// Who made a model: decides which provider kinds may carry it.
    pub enum Family {
        /// OpenAI, also on Azure.
        OpenAi = "openai",
        /// Anthropic.
        Anthropic = "anthropic",
        /// Google.
        Gemini = "gemini",
        /// Whatever a compatible server has.
        Open = "open",
    }
}

impl ModelEntry {
    /// A model that no table knows, on a server that speaks OpenAI's API: everything is passed on, nothing has a price.
    pub fn open(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            wire_name: id.to_owned(),
            family: Family::Open,
            max_input_tokens: None,
            max_output_tokens: None,
            retires: None,
            capabilities: Capabilities::everything(),
            prices: Vec::new(),
        }
    }

    /// The same model under another name on the wire, as Azure's deployments have one.
    #[must_use]
    pub fn deployed_as(mut self, wire_name: &str) -> Self {
        wire_name.clone_into(&mut self.wire_name);
        self
    }

    /// The day on which its provider has switched it off, where that has come.
    pub fn retired_on(&self, at: DateTime<Utc>) -> Option<NaiveDate> {
        self.retires.filter(|on| *on <= at.date_naive())
    }

    /// Whether it can do something.
    pub fn can(&self, capability: Capability) -> bool {
        self.capabilities.flags.contains(&capability)
    }
}

/// Why a name leads to no model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// Its provider has switched it off.
    #[error("the model `{id}` was retired by its provider on {on}; {}", instead(.successor.as_deref()))]
    Retired {
        /// As asked for.
        id: String,
        /// The day.
        on: NaiveDate,
        /// What the table suggests.
        successor: Option<String>,
    },
    /// No table knows it.
    #[error("the model `{id}` is not in the catalogue; describe it with its prices under its upstream in the config")]
    Unknown {
        /// As asked for.
        id: String,
    },
}

fn instead(successor: Option<&str>) -> String {
    successor.map_or_else(|| "name another".to_owned(), |successor| format!("`{successor}` takes its place"))
}

/// All models, by id and by alias.
#[derive(Clone, Debug, PartialEq)]
pub struct Catalogue {
    models: BTreeMap<String, Listed>,
    /// Other spellings of an id.
    aliases: BTreeMap<String, String>,
    as_of: NaiveDate,
}

#[derive(Clone, Debug, PartialEq)]
struct Listed {
    entry: ModelEntry,
    successor: Option<String>,
}

impl Catalogue {
    /// The embedded table.
    pub fn built_in() -> Result<Self, TableError> {
        table::read(BUILT_IN)
    }

    /// The day the table was written.
    pub fn as_of(&self) -> NaiveDate {
        self.as_of
    }

    /// The model of a name on a day.
    pub fn find(&self, name: &str, at: DateTime<Utc>) -> Result<&ModelEntry, LookupError> {
        let id = self.aliases.get(name).map_or(name, String::as_str);
        let unknown = || LookupError::Unknown { id: name.to_owned() };
        let listed = self.models.get(id).ok_or_else(unknown)?;
        match listed.entry.retired_on(at) {
            Some(on) => Err(LookupError::Retired { id: name.to_owned(), on, successor: listed.successor.clone() }),
            None => Ok(&listed.entry),
        }
    }

    /// The model of a name, whether or not it still runs: for old ledgers.
    pub fn find_ever(&self, name: &str) -> Option<&ModelEntry> {
        let id = self.aliases.get(name).map_or(name, String::as_str);
        self.models.get(id).map(|listed| &listed.entry)
    }

    /// Every model, by id.
    pub fn iter(&self) -> impl Iterator<Item = &ModelEntry> {
        self.models.values().map(|listed| &listed.entry)
    }

    /// With an operator's models and prices over it.
    pub fn with_overrides(mut self, overrides: &[ModelOverride]) -> Result<Self, TableError> {
        for change in overrides {
            let entry = change.apply(self.find_ever(change.like.as_deref().unwrap_or(&change.id)))?;
            let successor = self.models.get(&change.id).and_then(|listed| listed.successor.clone());
            self.aliases.remove(&change.id);
            self.models.insert(change.id.clone(), Listed { entry, successor });
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests;
