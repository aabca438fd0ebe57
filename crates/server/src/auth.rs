//! Who may ask. Keys are kept as digests and compared in constant time, so neither a dump of this struct nor the time
//! of an answer tells a key.

use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::error::ApiError;

/// The keys that open the model routes.
pub(crate) struct ApiKeys {
    digests: Vec<[u8; 32]>,
}

impl ApiKeys {
    pub(crate) fn new(keys: &[String]) -> Self {
        Self { digests: keys.iter().map(|key| digest(key.as_bytes())).collect() }
    }

    /// `Ok` where no key is configured, or the bearer token is one of them.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.digests.is_empty() {
            return Ok(());
        }
        let presented = digest(bearer_token(headers).ok_or(ApiError::MissingKey)?);
        // Every key is compared, also after a match.
        let known = self.digests.iter().fold(Choice::from(0), |known, key| known | key.ct_eq(&presented));
        if bool::from(known) { Ok(()) } else { Err(ApiError::WrongKey) }
    }
}

fn digest(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

/// The token of `Authorization: Bearer TOKEN`; the scheme's case does not matter (RFC 9110, 11.1).
fn bearer_token(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, token) = value.split_at_checked("bearer ".len())?;
    let token = token.trim_ascii();
    (scheme.eq_ignore_ascii_case(b"bearer ") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn check(keys: &[&str], authorization: Option<&str>) -> Result<(), ApiError> {
        let mut headers = HeaderMap::new();
        if let Some(value) = authorization {
            headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        ApiKeys::new(&keys.iter().map(|&key| key.to_owned()).collect::<Vec<_>>()).check(&headers)
    }

    #[test]
    fn without_keys_everyone_may_ask() {
        assert!(check(&[], None).is_ok());
        assert!(check(&[], Some("Bearer whatever")).is_ok());
    }

    #[test]
    fn each_configured_key_opens_and_nothing_else_does() {
        for good in ["Bearer one", "bearer two", "BEARER  two "] {
            assert!(check(&["one", "two"], Some(good)).is_ok(), "{good}");
        }
        for wrong in ["Bearer three", "Bearer on", "Bearer onee", "Bearer ONE"] {
            assert!(matches!(check(&["one", "two"], Some(wrong)), Err(ApiError::WrongKey)), "{wrong}");
        }
        for missing in [None, Some("one"), Some("Basic one"), Some("Bearer"), Some("Bearer "), Some("")] {
            assert!(matches!(check(&["one"], missing), Err(ApiError::MissingKey)), "{missing:?}");
        }
    }
}
