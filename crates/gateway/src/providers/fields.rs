//! Reads a JSON object field by field, so that an error names its path the way OpenAI does (`messages[0].content`).
//!
//! serde's derive would lose the path as soon as unknown fields are kept (`flatten` buffers). Knows no field by name.
//! Invariant: `null` means absent; what nobody took is in [`Fields::rest`], in the caller's order.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::refusal::Refusal;

/// An object that is being read.
pub(crate) struct Fields {
    map: Map<String, Value>,
    path: String,
}

impl Fields {
    /// The body itself: its fields have no prefix.
    pub(crate) fn root(map: Map<String, Value>) -> Self {
        Self { map, path: String::new() }
    }

    /// An object at a path.
    pub(crate) fn object(value: Value, path: String) -> Result<Self, Refusal> {
        match value {
            Value::Object(map) => Ok(Self { map, path }),
            other => Err(wrong_type(path, "an object", &other)),
        }
    }

    /// Path of a field of this object.
    pub(crate) fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Any JSON but null.
    pub(crate) fn value(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    /// A string.
    pub(crate) fn text(&mut self, name: &str) -> Result<Option<String>, Refusal> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(self.path(name), "a string", &other)),
        }
    }

    /// A string that must be there.
    pub(crate) fn required_text(&mut self, name: &str) -> Result<String, Refusal> {
        self.text(name)?.ok_or_else(|| self.missing(name))
    }

    /// `true` or `false`.
    pub(crate) fn flag(&mut self, name: &str) -> Result<Option<bool>, Refusal> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(wrong_type(self.path(name), "true or false", &other)),
        }
    }

    /// A finite number of a range.
    pub(crate) fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, Refusal> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let Some(number) = value.as_f64() else { return Err(wrong_type(self.path(name), "a number", &value)) };
        if range.contains(&number) {
            return Ok(Some(number));
        }
        let message = format!("{number} is not between {} and {}", range.start(), range.end());
        Err(Refusal::invalid(self.path(name), message))
    }

    /// A whole number of a range.
    pub(crate) fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, Refusal> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let Some(number) = value.as_i64() else {
            return Err(match &value {
                Value::Number(number) => {
                    Refusal::invalid(self.path(name), format!("{number} is not an integer of 64 bits"))
                }
                other => wrong_type(self.path(name), "an integer", other),
            });
        };
        if range.contains(&number) {
            return Ok(Some(number));
        }
        let message = format!("{number} is not between {} and {}", range.start(), range.end());
        Err(Refusal::invalid(self.path(name), message))
    }

    /// A count from `least` on.
    pub(crate) fn count(&mut self, name: &str, least: u32) -> Result<Option<u64>, Refusal> {
        let most = i64::from(u32::MAX);
        Ok(self.integer(name, i64::from(least)..=most)?.map(i64::unsigned_abs))
    }

    /// An array.
    pub(crate) fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, Refusal> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(wrong_type(self.path(name), "an array", &other)),
        }
    }

    /// An object, to be read further.
    pub(crate) fn nested(&mut self, name: &str) -> Result<Option<Self>, Refusal> {
        let path = self.path(name);
        self.value(name).map(|value| Self::object(value, path)).transpose()
    }

    /// An object that must be there.
    pub(crate) fn required_nested(&mut self, name: &str) -> Result<Self, Refusal> {
        self.nested(name)?.ok_or_else(|| self.missing(name))
    }

    /// An object kept as it is.
    pub(crate) fn free_object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, Refusal> {
        Ok(self.nested(name)?.map(|fields| fields.map))
    }

    /// One of a few words.
    pub(crate) fn word<T: Word>(&mut self, name: &str) -> Result<Option<T>, Refusal> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        T::from_word(&text).map(Some).ok_or_else(|| unknown_word::<T>(self.path(name), &text))
    }

    /// The field is not there.
    pub(crate) fn missing(&self, name: &str) -> Refusal {
        Refusal::Missing { param: self.path(name) }
    }

    /// What nobody took; nulls are gone.
    pub(crate) fn rest(mut self) -> Map<String, Value> {
        self.map.retain(|_, value| !value.is_null());
        self.map
    }
}

/// A closed set of words on the wire.
pub(crate) trait Word: Copy + Sized + 'static {
    /// All of them.
    const ALL: &'static [Self];
    /// As on the wire.
    fn word(self) -> &'static str;
    /// The one that is written so.
    fn from_word(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|value| value.word() == text)
    }
}

/// An enum each of whose values is one word on the wire.
macro_rules! words {
    ($(#[$attribute:meta])* $visibility:vis enum $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        $visibility enum $name { $($(#[$doc])* $variant,)* }
        impl $name {
            /// As on the wire.
            $visibility fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }
        impl $crate::providers::fields::Word for $name {
            const ALL: &'static [Self] = &[$(Self::$variant,)*];
            fn word(self) -> &'static str { self.as_str() }
        }
    };
}
pub(crate) use words;

/// A word outside the set.
pub(crate) fn unknown_word<T: Word>(path: String, text: &str) -> Refusal {
    let known = T::ALL.iter().map(|value| format!("`{}`", value.word())).collect::<Vec<_>>().join(", ");
    Refusal::invalid(path, format!("`{}` is none of {known}", shorten(text)))
}

/// Enough of a caller's text to recognise it.
pub(crate) fn shorten(text: &str) -> String {
    const MAX_CHARS: usize = 64;
    let mut short: String = text.chars().take(MAX_CHARS).collect();
    if short.len() < text.len() {
        short.push_str("...");
    }
    short
}

/// JSON of another type than expected.
pub(crate) fn wrong_type(param: String, expected: &'static str, got: &Value) -> Refusal {
    Refusal::WrongType { param, expected, got: kind(got) }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
