//! Typed access to the keys of a JSON object.
//!
//! It must not know which keys a model needs. Its invariant: a value of another kind is an error that names the key, the
//! value in short, and what is expected; nothing is coerced.

use serde_json::{Map, Value};

use super::super::{ConfigError, bad, check_size};

pub(super) type Outcome<T> = Result<T, ConfigError>;

/// The top level, or an object in it. An absent key and null are the same unless asked.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    pub(super) fn of(value: &'a Value) -> Option<Self> {
        value.as_object().map(|map| Self { map })
    }

    pub(super) fn is_empty(self) -> bool {
        self.map.is_empty()
    }

    /// An object of these keys and, where it has none of a name, those of `base`.
    pub(super) fn over(self, base: Option<Self>) -> Value {
        let mut merged = base.map_or_else(Map::new, |base| base.map.clone());
        merged.extend(self.map.iter().map(|(key, value)| (key.clone(), value.clone())));
        Value::Object(merged)
    }

    pub(super) fn get(self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn is_null(self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// All keys.
    pub(super) fn names(self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    /// The first key whose value is an object.
    pub(super) fn first_object(self) -> Option<&'a str> {
        self.map.iter().find(|(_, value)| value.is_object()).map(|(key, _)| key.as_str())
    }

    pub(super) fn size(self, key: &str, limit: usize) -> Outcome<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(count) => check_size(key, count, limit).map(Some),
            None => bad(format!("{key} is {}; a whole number from 1 to {limit} is expected", short(value))),
        }
    }

    pub(super) fn required_size(self, key: &str, limit: usize) -> Outcome<usize> {
        self.size(key, limit)?.ok_or_else(|| ConfigError::Bad(format!("{key} is missing")))
    }

    /// A number for which zero is a fair value. Beyond what this machine can count it is as good as infinite.
    pub(super) fn count(self, key: &str) -> Outcome<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(count) => Ok(Some(usize::try_from(count).unwrap_or(usize::MAX))),
            None => bad(format!("{key} is {}; a whole number is expected", short(value))),
        }
    }

    pub(super) fn number(self, key: &str) -> Outcome<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => bad(format!("{key} is {}; a number is expected", short(value))),
        }
    }

    pub(super) fn truth(self, key: &str) -> Outcome<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_bool() {
            Some(truth) => Ok(Some(truth)),
            None => bad(format!("{key} is {}; true or false is expected", short(value))),
        }
    }

    pub(super) fn text(self, key: &str) -> Outcome<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_str() {
            Some(text) => Ok(Some(text)),
            None => bad(format!("{key} is {}; a text is expected", short(value))),
        }
    }

    pub(super) fn array(self, key: &str) -> Outcome<Option<&'a [Value]>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_array() {
            Some(values) => Ok(Some(values)),
            None => bad(format!("{key} is {}; an array is expected", short(value))),
        }
    }

    pub(super) fn object(self, key: &str) -> Outcome<Option<Self>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_object() {
            Some(map) => Ok(Some(Self { map })),
            None => bad(format!("{key} is {}; an object is expected", short(value))),
        }
    }

    /// An id or a list of ids; `default` where the key is absent, none where it is null.
    pub(super) fn token_ids(self, key: &str, default: Option<u32>) -> Outcome<Vec<u64>> {
        let values = match self.map.get(key) {
            None => return Ok(default.map(u64::from).into_iter().collect()),
            Some(Value::Null) => &[],
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        values
            .iter()
            .map(|value| match value.as_u64() {
                Some(id) => Ok(id),
                None => bad(format!("{key} is {}; a token id or a list of them is expected", short(value))),
            })
            .collect()
    }

    /// Whether the key is there, null or not.
    pub(super) fn has(self, key: &str) -> bool {
        self.map.contains_key(key)
    }
}

/// A value as it fits a message.
pub(super) fn short(value: &Value) -> String {
    const MAX_CHARS: usize = 60;
    match value {
        Value::Array(values) => format!("an array of {}", values.len()),
        Value::Object(map) => format!("an object of {} keys", map.len()),
        other => {
            let text = other.to_string();
            match text.char_indices().nth(MAX_CHARS) {
                Some((end, _)) => format!("{}…", &text[..end]),
                None => text,
            }
        }
    }
}
