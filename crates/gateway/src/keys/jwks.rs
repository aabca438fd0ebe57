//! An issuer's public keys: fetched, kept, fetched again when a token names one that is not there.
//!
//! The set comes from the configured address or from the issuer's own OpenID configuration, over https (or plain http on
//! this very machine), without redirects, bounded in size and time. Symmetric keys and keys for encryption in it are
//! dropped: nothing in a fetched set can make a shared secret of a public key.
//!
//! **Invariant**: however many tokens with unknown keys arrive, an issuer is asked at most once in
//! [`MIN_BETWEEN_FETCHES`], by one request at a time.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use futures::StreamExt as _;
use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse},
};

use super::jwt::JwtError;
use crate::clock::UnixMillis;

/// Between two fetches of one issuer's keys.
pub(super) const MIN_BETWEEN_FETCHES: Duration = Duration::from_secs(10);
/// A set is fetched anew after this, so that a key its issuer withdrew stops opening.
pub(super) const REFRESH_AFTER: Duration = Duration::from_hours(1);
/// A set that could not be fetched anew for so long is not trusted.
pub(super) const STALE_AFTER: Duration = Duration::from_hours(24);

const MAX_BODY_BYTES: usize = 1 << 20;
const MAX_KEYS: usize = 100;
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// A public key and what it may check.
pub(super) struct PublicKey {
    kid: Option<String>,
    algorithms: Vec<Algorithm>,
    pub(super) key: DecodingKey,
}

struct KeySet {
    keys: Vec<Arc<PublicKey>>,
    fetched_at: UnixMillis,
}

/// The keys of one issuer.
pub(super) struct IssuerKeys {
    issuer: String,
    jwks_url: Option<String>,
    client: reqwest::Client,
    current: RwLock<Option<Arc<KeySet>>>,
    /// When the issuer was last asked; held while it is.
    asked: tokio::sync::Mutex<Option<UnixMillis>>,
}

impl IssuerKeys {
    pub(super) fn new(issuer: String, jwks_url: Option<String>) -> Result<Self, JwtError> {
        for url in jwks_url.iter().chain(jwks_url.is_none().then_some(&issuer)) {
            check_url(url).map_err(|why| JwtError::BadIssuer { issuer: issuer.clone(), why })?;
        }
        let client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(FETCH_TIMEOUT)
            .build()
            .map_err(|error| JwtError::BadIssuer { issuer: issuer.clone(), why: error.to_string() })?;
        Ok(Self { issuer, jwks_url, client, current: RwLock::new(None), asked: tokio::sync::Mutex::new(None) })
    }

    /// The key that a token of this algorithm and key id is to be checked with.
    pub(super) async fn find(
        &self,
        kid: Option<&str>,
        algorithm: Algorithm,
        now: UnixMillis,
    ) -> Result<Arc<PublicKey>, JwtError> {
        let found = self.current().filter(|set| now.since(set.fetched_at) <= STALE_AFTER).map(|set| {
            let is_old = now.since(set.fetched_at) > REFRESH_AFTER;
            (set.find(kid, algorithm), is_old)
        });
        match found {
            Some((Some(key), false)) => return Ok(key),
            Some((Some(key), true)) => {
                // One request fetches; the others go on with what is there, and so does it where that fails.
                if let Ok(asked) = self.asked.try_lock() {
                    match self.fetch(asked, now).await {
                        Ok(()) => {}
                        // Which was logged.
                        Err(_) => return Ok(key),
                    }
                } else {
                    return Ok(key);
                }
            }
            Some((None, _)) | None => {
                let before = self.current().map(|set| set.fetched_at);
                let asked = self.asked.lock().await;
                // Somebody may have fetched while this one waited.
                if self.current().map(|set| set.fetched_at) == before {
                    self.fetch(asked, now).await?;
                }
            }
        }
        let set = self.current().ok_or_else(|| self.unavailable("they have not been fetched yet".to_owned()))?;
        set.find(kid, algorithm).ok_or(JwtError::UnknownKey)
    }

    fn current(&self) -> Option<Arc<KeySet>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn unavailable(&self, why: String) -> JwtError {
        JwtError::KeysUnavailable { issuer: self.issuer.clone(), why }
    }

    /// Asks the issuer, unless it was asked a moment ago: then what is there is all there is.
    async fn fetch(
        &self,
        mut asked: tokio::sync::MutexGuard<'_, Option<UnixMillis>>,
        now: UnixMillis,
    ) -> Result<(), JwtError> {
        if asked.is_some_and(|asked| now >= asked && now.since(asked) < MIN_BETWEEN_FETCHES) {
            let usable = self.current().is_some_and(|set| now.since(set.fetched_at) <= STALE_AFTER);
            return if usable { Ok(()) } else { Err(self.unavailable("they were asked for a moment ago".to_owned())) };
        }
        *asked = Some(now);
        // Told once for each time the issuer was asked: whoever sends a token that it might have signed is told nothing.
        self.ask(now)
            .await
            .inspect_err(|error| tracing::warn!(issuer = %self.issuer, %error, "an issuer's keys could not be fetched"))
    }

    async fn ask(&self, now: UnixMillis) -> Result<(), JwtError> {
        let url = match &self.jwks_url {
            Some(url) => url.clone(),
            None => self.discover().await?,
        };
        let body = self.get(&url).await?;
        let keys = body.get("keys").and_then(serde_json::Value::as_array);
        let keys = keys.ok_or_else(|| self.unavailable(format!("{url} has no array `keys`")))?;
        let keys: Vec<_> = keys.iter().take(MAX_KEYS).filter_map(PublicKey::read).map(Arc::new).collect();
        tracing::debug!(issuer = %self.issuer, keys = keys.len(), "fetched an issuer's keys");
        let set = Arc::new(KeySet { keys, fetched_at: now });
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(set);
        Ok(())
    }

    /// OpenID Connect Discovery 1.0, 4.
    async fn discover(&self) -> Result<String, JwtError> {
        let url = format!("{}/.well-known/openid-configuration", self.issuer.trim_end_matches('/'));
        let configuration = self.get(&url).await?;
        if configuration.get("issuer").and_then(serde_json::Value::as_str) != Some(&self.issuer) {
            return Err(self.unavailable(format!("{url} speaks for another issuer")));
        }
        let jwks = configuration.get("jwks_uri").and_then(serde_json::Value::as_str);
        let jwks = jwks.ok_or_else(|| self.unavailable(format!("{url} names no jwks_uri")))?;
        check_url(jwks).map_err(|why| self.unavailable(why))?;
        Ok(jwks.to_owned())
    }

    async fn get(&self, url: &str) -> Result<serde_json::Value, JwtError> {
        let failed = |error: reqwest::Error| self.unavailable(format!("{url}: {}", error.without_url()));
        let response = self.client.get(url).send().await.map_err(failed)?;
        if !response.status().is_success() {
            return Err(self.unavailable(format!("{url} answered {}", response.status())));
        }
        let mut body = Vec::new();
        let mut chunks = response.bytes_stream();
        while let Some(chunk) = chunks.next().await {
            body.extend_from_slice(&chunk.map_err(failed)?);
            if body.len() > MAX_BODY_BYTES {
                return Err(self.unavailable(format!("{url} answered more than {MAX_BODY_BYTES} bytes")));
            }
        }
        serde_json::from_slice(&body).map_err(|error| self.unavailable(format!("{url} answered no JSON: {error}")))
    }
}

impl KeySet {
    fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Option<Arc<PublicKey>> {
        let fits = |key: &&Arc<PublicKey>| key.algorithms.contains(&algorithm);
        let Some(kid) = kid else {
            // Without a name only where there is no choice.
            let mut fitting = self.keys.iter().filter(fits);
            return fitting.next().filter(|_| fitting.next().is_none()).cloned();
        };
        self.keys.iter().filter(fits).find(|key| key.kid.as_deref() == Some(kid)).cloned()
    }
}

impl PublicKey {
    fn read(value: &serde_json::Value) -> Option<Self> {
        let jwk: Jwk = serde_json::from_value(value.clone()).ok()?;
        if matches!(jwk.common.public_key_use, Some(PublicKeyUse::Encryption)) {
            return None;
        }
        let mut algorithms = match &jwk.algorithm {
            AlgorithmParameters::RSA(_) => vec![
                Algorithm::RS256,
                Algorithm::RS384,
                Algorithm::RS512,
                Algorithm::PS256,
                Algorithm::PS384,
                Algorithm::PS512,
            ],
            AlgorithmParameters::EllipticCurve(parameters) => match parameters.curve {
                EllipticCurve::P256 => vec![Algorithm::ES256],
                EllipticCurve::P384 => vec![Algorithm::ES384],
                _ => return None,
            },
            AlgorithmParameters::OctetKeyPair(parameters) if parameters.curve == EllipticCurve::Ed25519 => {
                vec![Algorithm::EdDSA]
            }
            _ => return None,
        };
        // A key that says what it is for is for nothing else.
        if let Some(only) = jwk.common.key_algorithm {
            algorithms.retain(|algorithm| Algorithm::try_from(only).is_ok_and(|only| only == *algorithm));
        }
        let key = DecodingKey::from_jwk(&jwk).ok()?;
        (!algorithms.is_empty()).then_some(Self { kid: jwk.common.key_id, algorithms, key })
    }
}

/// https, or this very machine.
fn check_url(url: &str) -> Result<(), String> {
    let parsed: reqwest::Url = url.parse().map_err(|_| format!("`{url}` is not a URL"))?;
    let is_here = match parsed.host_str() {
        Some("localhost") => true,
        Some(host) => {
            host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
        }
        None => false,
    };
    match parsed.scheme() {
        "https" => Ok(()),
        "http" if is_here => Ok(()),
        _ => Err(format!("`{url}` must begin with https://: whoever can change what it answers can let anybody in")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_come_over_https_or_from_this_machine() {
        for good in ["https://id.example/keys", "http://127.0.0.1:1/k", "http://localhost:8/k", "http://[::1]/k"] {
            assert!(check_url(good).is_ok(), "{good}");
        }
        for bad in ["http://id.example/keys", "file:///etc/passwd", "id.example", "http://127.0.0.1.example/k", ""] {
            assert!(check_url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_public_signing_keys_are_read_from_a_set() {
        let x = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"; // RFC 8037, A.2
        let ed = |more: serde_json::Value| {
            let mut key = json!({"kty": "OKP", "crv": "Ed25519", "x": x, "kid": "a"});
            key.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            PublicKey::read(&key).map(|key| key.algorithms)
        };
        assert_eq!(ed(json!({})), Some(vec![Algorithm::EdDSA]));
        assert_eq!(ed(json!({"use": "sig", "alg": "EdDSA"})), Some(vec![Algorithm::EdDSA]));
        assert_eq!(ed(json!({"use": "enc"})), None);
        assert_eq!(ed(json!({"alg": "HS256"})), None, "a public key is no shared secret");
        assert_eq!(ed(json!({"alg": "ES256"})), None, "another family");
        let symmetric = json!({"kty": "oct", "k": "c2VjcmV0", "kid": "a", "alg": "HS256"});
        assert!(PublicKey::read(&symmetric).is_none());
        assert!(PublicKey::read(&json!({"kty": "new"})).is_none() && PublicKey::read(&json!(7)).is_none());
    }
}
