//! What a key may use beside what its tenant may: limits of its own, and names of models and adapters.
//!
//! Knows names and numbers; not what a name stands for. Invariant: a grant only ever takes away: what a tenant may not do,
//! none of its keys may.

use super::KeyError;
use crate::{limits::RateLimits, names::MAX_NAME_BYTES, policy::target::fits};

/// The most names in a list.
pub const MAX_PATTERNS: usize = 100;

/// Limits and lists of one key. The default takes nothing away.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct KeyGrant {
    /// Its own, beside the tenant's.
    #[serde(flatten)]
    pub limits: RateLimits,
    /// Models that it may name or be sent to: names, or beginnings with `*`. None: all of the tenant's.
    pub models: Option<Vec<String>>,
    /// Adapters that it may name. None: an adapter is a model, and `models` decides.
    pub adapters: Option<Vec<String>>,
}

/// What a name stands for, as far as lists ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameOf {
    /// A base model, a virtual one or an upstream's.
    Model,
    /// An adapter of a local model.
    Adapter,
}

impl KeyGrant {
    /// Whether the key's lists hold the name.
    pub fn admits(&self, name: &str, of: NameOf) -> bool {
        let list = match of {
            NameOf::Model => self.models.as_ref(),
            NameOf::Adapter => self.adapters.as_ref().or(self.models.as_ref()),
        };
        list.is_none_or(|patterns| patterns.iter().any(|pattern| fits(pattern, name)))
    }

    /// Whether it has a limit of its own.
    pub fn is_limited(&self) -> bool {
        self.limits != RateLimits::default()
    }

    pub(super) fn check(&self) -> Result<(), KeyError> {
        for (what, list) in [("models", &self.models), ("adapters", &self.adapters)] {
            let Some(list) = list else { continue };
            if list.is_empty() || list.len() > MAX_PATTERNS {
                return Err(KeyError::BadList { what, count: list.len() });
            }
            let is_bad = |name: &&String| {
                name.trim().is_empty() || name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control)
            };
            if list.iter().any(|name| is_bad(&name)) {
                return Err(KeyError::BadPattern { what });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn an_adapter_is_a_model_unless_it_has_a_list_of_its_own() {
        let models = KeyGrant { models: Some(list(&["base", "fr-*"])), ..KeyGrant::default() };
        assert!(models.admits("base", NameOf::Model) && !models.admits("openai/gpt-4.1", NameOf::Model));
        assert!(models.admits("fr-legal", NameOf::Adapter) && !models.admits("de", NameOf::Adapter));
        let adapters = KeyGrant { adapters: Some(list(&["de"])), ..models.clone() };
        assert!(adapters.admits("de", NameOf::Adapter) && !adapters.admits("fr-legal", NameOf::Adapter));
        assert!(!adapters.admits("de", NameOf::Model), "the list of adapters opens no model");
        let only = KeyGrant { adapters: Some(list(&["de"])), ..KeyGrant::default() };
        assert!(only.admits("anything", NameOf::Model) && !only.admits("fr", NameOf::Adapter));
    }

    #[test]
    fn lists_are_bounded() {
        let of = |models| KeyGrant { models, ..KeyGrant::default() }.check();
        assert!(of(Some(list(&["a", "b*"]))).is_ok() && of(None).is_ok());
        assert!(matches!(of(Some(list(&[]))), Err(KeyError::BadList { .. })));
        assert!(matches!(of(Some(vec!["a".to_owned(); 101])), Err(KeyError::BadList { count: 101, .. })));
        assert!(matches!(of(Some(list(&["a\n"]))), Err(KeyError::BadPattern { .. })));
    }
}
