//! A key or token that does not show itself.
//!
//! Exists so that neither a log line, a panic nor an error text can carry a credential by accident. Knows nothing of
//! headers or providers. Invariant: the text leaves through [`Secret::expose`] alone, which is easy to search for.

use std::fmt;

/// An API key, a bearer token, or a key for hashing.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes the text as it stands, without the white space around it that files and variables end with.
    pub fn new(text: &str) -> Self {
        Self(text.trim().to_owned())
    }

    /// The text itself: for a header or a hash, never for a message.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_shows_itself_in_no_format() {
        let secret = Secret::new("sk-verysecret\n");
        assert_eq!(secret.expose(), "sk-verysecret");
        for shown in [format!("{secret:?}"), format!("{secret}"), format!("{:#?}", Some(secret.clone()))] {
            assert!(!shown.contains("very"), "{shown}");
        }
    }
}
