//! The names that requests are counted under.
//!
//! **Invariant**: a name is one that every place can hold: not empty, bounded, printable, without the separators of the
//! store's own words. It is checked once, where it enters.

use std::{fmt, sync::Arc};

/// The longest name, in bytes.
pub const MAX_NAME_BYTES: usize = 200;

/// What is no name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} `{shown}` cannot be used: {why}", shown = .name.chars().take(60).collect::<String>())]
pub struct BadName {
    /// What it was to name.
    pub what: &'static str,
    /// As it was given.
    pub name: String,
    /// The rule and the next step.
    pub why: &'static str,
}

fn checked(what: &'static str, name: &str) -> Result<Arc<str>, BadName> {
    let bad = |why| Err(BadName { what, name: name.to_owned(), why });
    if name.is_empty() {
        return bad("it is empty; give it a name");
    }
    if name.len() > MAX_NAME_BYTES {
        return bad("it is longer than 200 bytes; shorten it");
    }
    if name.trim() != name || name.chars().any(char::is_control) {
        return bad("it begins or ends with a space or holds control characters; remove them");
    }
    Ok(name.into())
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(Arc<str>);

        impl $type {
            /// Checked once, here.
            pub fn new(name: &str) -> Result<Self, BadName> {
                checked($what, name).map(Self)
            }

            /// As it was given.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }
    };
}

name!(
    /// Whose requests are counted, limited and paid together.
    TenantId,
    "the tenant"
);
name!(
    /// The public part of an API key: it names the key and opens nothing.
    KeyId,
    "the key"
);
name!(
    /// One process that serves, among those that share a store.
    NodeId,
    "the node"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_where_they_enter() {
        for good in ["acme", "Équipe 7", "a:b/c"] {
            assert_eq!(TenantId::new(good).unwrap().as_str(), good);
        }
        for bad in ["", " a", "a ", "a\nb", "a\0", &"x".repeat(201)] {
            let error = TenantId::new(bad).unwrap_err().to_string();
            assert!(error.starts_with("the tenant") && error.len() < 200, "{error}");
        }
    }
}
