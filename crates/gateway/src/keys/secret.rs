//! What an API key looks like: `bdy_<id>_<secret><check>`.
//!
//! Sixteen characters of id, thirty-two of secret (160 random bits) and eight of a checksum, in the lower-case base32
//! alphabet, so that a key survives being read aloud and is one word to a double click. The prefix and the checksum let a
//! secret scanner, and this server, tell a key from something else (or a torn one) without asking a database.
//!
//! A digest of the whole key is what is stored. It is plain SHA-256: a key's 160 bits cannot be searched, so nothing slow
//! is needed, and nothing slow stands in a request's way.
//!
//! **Invariant**: a key shows itself only where [`ApiKey::expose`] is written.

use std::{fmt, sync::LazyLock};

use data_encoding::{Encoding, Specification};
use sha2::{Digest as _, Sha256};

use super::KeyError;
use crate::names::KeyId;

/// What every key begins with.
pub const PREFIX: &str = "bdy_";

const ID_BYTES: usize = 10;
const SECRET_BYTES: usize = 20;
const CHECK_BYTES: usize = 5;
const ID_CHARS: usize = 16;
const SECRET_CHARS: usize = 32;
const CHECK_CHARS: usize = 8;
const KEY_CHARS: usize = PREFIX.len() + ID_CHARS + 1 + SECRET_CHARS + CHECK_CHARS;

static BASE32: LazyLock<Encoding> = LazyLock::new(|| {
    let mut rules = Specification::new();
    rules.symbols.push_str("abcdefghijklmnopqrstuvwxyz234567");
    rules.encoding().expect("32 distinct symbols are an alphabet")
});

/// A key in the clear.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// A new one from the system's random numbers.
    pub fn generate() -> Result<Self, KeyError> {
        let mut random = [0; ID_BYTES + SECRET_BYTES];
        getrandom::fill(&mut random).map_err(|error| KeyError::NoRandomness(error.to_string()))?;
        let (id, secret) = random.split_at(ID_BYTES);
        let body = format!("{PREFIX}{}_{}", BASE32.encode(id), BASE32.encode(secret));
        Ok(Self(format!("{body}{}", check(&body))))
    }

    /// As a client sent it. Only its shape is checked.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let well_formed = text.len() == KEY_CHARS
            && text.is_ascii()
            && text.starts_with(PREFIX)
            && text.as_bytes()[PREFIX.len() + ID_CHARS] == b'_';
        if !well_formed {
            return Err(KeyError::Malformed);
        }
        let (body, given) = text.split_at(KEY_CHARS - CHECK_CHARS);
        // No secret is compared here: the checksum says no more than the key beside it.
        if check(body) != given {
            return Err(KeyError::Malformed);
        }
        Ok(Self(text.to_owned()))
    }

    /// The part that may be shown and stored.
    pub fn id(&self) -> KeyId {
        KeyId::new(self.id_str()).expect("sixteen base32 characters are a name")
    }

    pub(super) fn id_str(&self) -> &str {
        &self.0[PREFIX.len()..PREFIX.len() + ID_CHARS]
    }

    /// The key itself; to be shown once.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// What is stored of it.
    pub(super) fn digest(&self) -> [u8; 32] {
        Sha256::digest(self.0.as_bytes()).into()
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKey({PREFIX}{}_***)", self.id_str())
    }
}

fn check(body: &str) -> String {
    let digest = Sha256::new().chain_update(b"bindery key checksum:").chain_update(body.as_bytes()).finalize();
    BASE32.encode(&digest[..CHECK_BYTES])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_is_one_word_and_comes_back_from_its_text() {
        let key = ApiKey::generate().unwrap();
        let text = key.expose();
        assert_eq!(text.len(), 61);
        assert!(text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_'), "{text}");
        assert_eq!(ApiKey::parse(text).unwrap(), key);
        assert_ne!(ApiKey::generate().unwrap(), key);
    }

    #[test]
    fn debug_output_holds_the_id_alone() {
        let key = ApiKey::generate().unwrap();
        let shown = format!("{key:?}");
        assert!(shown.contains(key.id().as_str()));
        assert!(!shown.contains(&key.expose()[21..]), "{shown}");
    }

    proptest! {
        #[test]
        fn a_changed_character_is_noticed(at in 0..61usize, with in "[a-z2-7_A-Z]") {
            let key = ApiKey::generate().unwrap();
            let mut text = key.expose().to_owned();
            prop_assume!(text[at..=at] != with);
            text.replace_range(at..=at, &with);
            prop_assert!(ApiKey::parse(&text).is_err());
        }

        #[test]
        fn no_text_is_too_strange_to_be_refused(text in ".{0,80}") {
            prop_assert!(ApiKey::parse(&text).is_err());
        }
    }
}
