//! Whether a request may leave this machine.
//!
//! Knows no tenant; someone else says which class a request has. Invariant: a [`LeavesPremises`] exists only for a request
//! whose class allows it, since nothing else can make one; a class is only ever tightened.

use serde::Deserialize;

/// How far a request may travel, from anywhere to nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrivacyClass {
    /// Anywhere.
    Any,
    /// To an upstream where this machine cannot answer in time.
    LocalFirst,
    /// Nowhere, whatever fails.
    LocalOnly,
}

/// This request may leave. Made for one sending, and used up by it.
///
/// ```compile_fail
/// let forged = bindery_gateway::upstream::LeavesPremises(());
/// ```
#[derive(Debug)]
#[must_use = "without being used it allows nothing"]
pub struct LeavesPremises(());

impl PrivacyClass {
    /// As on the wire and in a config.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Any => "any",
            Self::LocalFirst => "local-first",
            Self::LocalOnly => "local-only",
        }
    }

    /// Reads a word.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Any, Self::LocalFirst, Self::LocalOnly].into_iter().find(|class| class.as_str() == word)
    }

    /// The stricter of two: what a request says beside what its tenant says.
    #[must_use]
    pub fn tightened_by(self, other: Self) -> Self {
        self.max(other)
    }

    /// The way out, where there is one.
    pub fn leave(self) -> Option<LeavesPremises> {
        match self {
            Self::Any | Self::LocalFirst => Some(LeavesPremises(())),
            Self::LocalOnly => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_is_tightened_and_never_loosened() {
        let all = [PrivacyClass::Any, PrivacyClass::LocalFirst, PrivacyClass::LocalOnly];
        for own in all {
            for other in all {
                let both = own.tightened_by(other);
                assert!(both >= own && both >= other);
                assert_eq!(both.leave().is_some(), own.leave().is_some() && other.leave().is_some());
            }
            assert_eq!(PrivacyClass::parse(own.as_str()), Some(own));
        }
        assert_eq!(PrivacyClass::parse("Local-Only"), None);
        assert!(PrivacyClass::LocalOnly.leave().is_none());
    }
}
