//! Typed access to the metadata of a GGUF file, most of it under the architecture's name.
//!
//! It must not know which keys a model needs. Its invariant: absent is None, another kind of value is an error that names
//! the key and the kind.

use super::super::{ConfigError, bad, check_size, unsupported};
use crate::weights::gguf::{GgufFile, MetadataValue};

pub(super) type Outcome<T> = Result<T, ConfigError>;

/// Keys that begin with "general." or "tokenizer." are as they are; all others belong to the architecture, whose name stands
/// before them.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    pub(super) file: &'a GgufFile,
    pub(super) architecture: &'a str,
}

impl<'a> Keys<'a> {
    fn full(&self, key: &str) -> String {
        if key.starts_with("general.") || key.starts_with("tokenizer.") {
            return key.to_owned();
        }
        format!("{}.{key}", self.architecture)
    }

    fn get(&self, key: &str) -> Option<&'a MetadataValue> {
        self.file.get(&self.full(key))
    }

    pub(super) fn whole(&self, key: &str) -> Outcome<Option<u64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let key = self.full(key);
        // Some sizes may be given per layer; where all are alike they are one number.
        if let MetadataValue::Ints(values) = value
            && let Some((&first, rest)) = values.split_first()
        {
            if rest.iter().any(|&other| other != first) {
                return unsupported(format!("{key} differs between layers, which is not supported yet"));
            }
            return match u64::try_from(first) {
                Ok(value) => Ok(Some(value)),
                Err(_) => bad(format!("{key} is {first}; a positive whole number is expected")),
            };
        }
        match self.file.u64(&key) {
            Some(value) => Ok(Some(value)),
            None => bad(format!("{key} is {}; a positive whole number is expected", value.kind())),
        }
    }

    pub(super) fn size(&self, key: &str, limit: usize) -> Outcome<Option<usize>> {
        self.whole(key)?.map(|value| check_size(&self.full(key), value, limit)).transpose()
    }

    pub(super) fn required_size(&self, key: &str, limit: usize) -> Outcome<usize> {
        self.size(key, limit)?.ok_or_else(|| self.missing(key))
    }

    /// Zero is how files say "none".
    pub(super) fn size_above_zero(&self, key: &str, limit: usize) -> Outcome<Option<usize>> {
        match self.whole(key)? {
            Some(0) => Ok(None),
            _ => self.size(key, limit),
        }
    }

    pub(super) fn number(&self, key: &str) -> Outcome<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let key = self.full(key);
        match self.file.f64(&key) {
            Some(number) => Ok(Some(number)),
            None => bad(format!("{key} is {}; a number is expected", value.kind())),
        }
    }

    pub(super) fn required_number(&self, key: &str) -> Outcome<f64> {
        self.number(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn text(&self, key: &str) -> Outcome<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value {
            MetadataValue::String(text) => Ok(Some(text)),
            other => bad(format!("{} is {}; a text is expected", self.full(key), other.kind())),
        }
    }

    pub(super) fn truth(&self, key: &str) -> Outcome<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(MetadataValue::Bool(truth)) => Ok(Some(*truth)),
            Some(other) => bad(format!("{} is {}; a truth value is expected", self.full(key), other.kind())),
        }
    }

    /// A truth value a layer.
    pub(super) fn truths(&self, key: &str, count: usize) -> Outcome<Option<Vec<bool>>> {
        let values: Vec<bool> = match self.get(key) {
            Some(MetadataValue::Array(values)) => {
                let truths = values.iter().map(|value| match value {
                    MetadataValue::Bool(truth) => Some(*truth),
                    _ => None,
                });
                match truths.collect() {
                    Some(truths) => truths,
                    None => return bad(format!("{} holds other things than truth values", self.full(key))),
                }
            }
            // Written as numbers by some.
            Some(MetadataValue::Ints(values)) => values.iter().map(|&value| value != 0).collect(),
            _ => return Ok(None),
        };
        if values.len() != count {
            return bad(format!("{} has {} entries for {count} layers", self.full(key), values.len()));
        }
        Ok(Some(values))
    }

    pub(super) fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Bad(format!("{} is missing", self.full(key)))
    }

    /// Refuses a key whose value is not among those that change nothing.
    pub(super) fn refuse_number(&self, key: &str, neutral: &[f64]) -> Outcome<()> {
        match self.number(key)? {
            Some(value) if !neutral.contains(&value) => {
                unsupported(format!("{} is {value}, which is not supported in this architecture", self.full(key)))
            }
            _ => Ok(()),
        }
    }

    /// Whether layer 0 has the tensor: no key says which biases there are; llama.cpp, too, looks for the tensors.
    pub(super) fn first_layer_has(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.file.tensor(&format!("blk.0.{name}")).is_some())
    }
}
