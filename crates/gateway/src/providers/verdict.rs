//! What was left out of a request, or changed in it, on the way to a provider.
//!
//! The three verdicts on a field: map it, drop it (a hint: the answer means the same without), or refuse the request
//! (its meaning or shape would change). This file holds the second; [`super::refusal`] the third. Invariant: a field the
//! caller sent is in the outgoing body, or named here, or the request was refused; a value equal to the provider's
//! default counts as sent.

use std::fmt;

/// At most so many are kept: a caller's invention of field names must not fill a header.
const MAX_WARNINGS: usize = 32;
/// Longest field name that is repeated.
const MAX_FIELD_CHARS: usize = 64;

/// One thing the caller should know of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Warning {
    /// Left out.
    Dropped {
        /// The field.
        field: String,
    },
    /// Sent with another value.
    Adjusted {
        /// The field.
        field: String,
        /// For people: "1.5 sent as 1".
        how: String,
    },
}

impl Warning {
    /// The field it is about.
    pub fn field(&self) -> &str {
        match self {
            Self::Dropped { field } | Self::Adjusted { field, .. } => field,
        }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Dropped { field } => write!(f, "dropped {field}"),
            Self::Adjusted { field, how } => write!(f, "{field}: {how}"),
        }
    }
}

/// All warnings of one translation, each field once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Warnings(Vec<Warning>);

impl Warnings {
    /// In the order they came up.
    pub fn iter(&self) -> impl Iterator<Item = &Warning> {
        self.0.iter()
    }

    /// None at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Names of the fields that were left out.
    pub fn dropped(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter(|warning| matches!(warning, Warning::Dropped { .. })).map(Warning::field)
    }

    /// The value of `x-bindery-warning`; `None` where there is nothing to say.
    pub fn header(&self) -> Option<String> {
        (!self.0.is_empty()).then(|| self.0.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))
    }

    pub(crate) fn drop(&mut self, field: impl AsRef<str>) {
        self.push(Warning::Dropped { field: printable(field.as_ref()) });
    }

    pub(crate) fn adjust(&mut self, field: impl AsRef<str>, how: impl Into<String>) {
        self.push(Warning::Adjusted { field: printable(field.as_ref()), how: how.into() });
    }

    fn push(&mut self, warning: Warning) {
        let known = self.0.iter().any(|other| other.field() == warning.field());
        if !known && self.0.len() < MAX_WARNINGS {
            self.0.push(warning);
        }
    }
}

/// A name as a header may carry it.
fn printable(field: &str) -> String {
    field.chars().take(MAX_FIELD_CHARS).map(|c| if c.is_ascii_graphic() && c != ',' { c } else { '?' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_one_header_and_name_a_field_once() {
        let mut warnings = Warnings::default();
        assert_eq!(warnings.header(), None);
        warnings.drop("seed");
        warnings.drop("seed");
        warnings.adjust("temperature", "1.5 sent as 1");
        warnings.drop("ma\nd,ness");
        assert_eq!(warnings.header().unwrap(), "dropped seed, temperature: 1.5 sent as 1, dropped ma?d?ness");
        assert_eq!(warnings.dropped().collect::<Vec<_>>(), ["seed", "ma?d?ness"]);
        for index in 0..1000 {
            warnings.drop(format!("field{index}"));
        }
        assert_eq!(warnings.iter().count(), MAX_WARNINGS);
    }
}
