//! Who may ask. Keys are kept as digests and compared in constant time, so neither a dump of this struct nor the time
//! of an answer tells a key.

use std::sync::Arc;

use axum::http::{HeaderMap, header};
use bindery_gateway::{
    clock::UnixMillis,
    gateway::{Gateway, GatewayError, configured_credential},
    keys::{AuthError, Credential, KeyError, KeyGrant},
};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::{config::Tenant, error::ApiError};

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    /// None: nobody in particular, who sees what is everybody's.
    pub(crate) tenant: Option<Arc<str>>,
    /// What it showed, for the books.
    pub(crate) credential: Credential,
    /// What its key takes away of what the tenant may; None: nothing.
    pub(crate) grant: Option<Arc<KeyGrant>>,
}

impl Default for Caller {
    fn default() -> Self {
        Self { tenant: None, credential: configured_credential(), grant: None }
    }
}

/// The keys that open the model routes, and the one that opens the routes that change the server.
pub(crate) struct ApiKeys {
    keys: Vec<([u8; 32], Caller)>,
    admin: Option<[u8; 32]>,
}

impl ApiKeys {
    pub(crate) fn new(keys: &[String], tenants: &[Tenant], admin: Option<&String>) -> Self {
        let mut all: Vec<_> = keys.iter().map(|key| (digest(key.as_bytes()), Caller::default())).collect();
        for Tenant { name, api_keys } in tenants {
            let caller = Caller { tenant: Some(name.as_str().into()), ..Caller::default() };
            all.extend(api_keys.iter().map(|key| (digest(key.as_bytes()), caller.clone())));
        }
        Self { keys: all, admin: admin.map(|key| digest(key.as_bytes())) }
    }

    /// Whose key it is, whether configured or known to the gateway; anybody's where neither has any. A tenant that the
    /// gateway does not know has no limits, no budget and no privacy class, so its key opens nothing.
    pub(crate) async fn check_all(&self, gateway: Option<&Gateway>, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let Some(gateway) = gateway else { return self.check(headers) };
        let caller = self.identify(gateway, headers).await?;
        match &caller.tenant {
            Some(tenant) if !gateway.knows(tenant) => {
                let error = GatewayError::UnknownTenant { name: tenant.to_string() };
                Err(ApiError::from_gateway(&error, UnixMillis::now()))
            }
            _ => Ok(caller),
        }
    }

    async fn identify(&self, gateway: &Gateway, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let is_open = self.keys.is_empty() && !gateway.needs_key();
        if is_open {
            return Ok(Caller::default());
        }
        let token = bearer_token(headers).ok_or(ApiError::MissingKey)?;
        if !self.keys.is_empty()
            && let Ok(caller) = self.check(headers)
        {
            return Ok(caller);
        }
        let presented = std::str::from_utf8(token).map_err(|_| ApiError::WrongKey)?;
        match gateway.authenticate(presented, UnixMillis::now()).await {
            Some(Ok(identity)) => {
                let tenant = Some(identity.tenant.as_str().into());
                Ok(Caller { tenant, credential: identity.credential, grant: identity.grant })
            }
            // Why is for the log, where it is told once for all who ask: these may be anybody.
            Some(Err(error)) if error.is_ours() => Err(ApiError::KeysUnavailable),
            // Only who holds a key that was one is told more.
            Some(Err(error @ AuthError::Key(KeyError::Revoked { .. } | KeyError::Expired { .. }))) => {
                Err(ApiError::KeyEnded { message: error.to_string() })
            }
            Some(Err(_)) | None => Err(ApiError::WrongKey),
        }
    }

    /// Whose key it is; anybody's where no key is configured.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        if self.keys.is_empty() {
            return Ok(Caller::default());
        }
        let presented = digest(bearer_token(headers).ok_or(ApiError::MissingKey)?);
        // Every key is compared, also after a match.
        let mut found = None;
        for (key, caller) in &self.keys {
            if bool::from(key.ct_eq(&presented)) {
                found = Some(caller);
            }
        }
        found.cloned().ok_or(ApiError::WrongKey)
    }

    /// `Ok` with the admin key alone.
    pub(crate) fn check_admin(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let admin = self.admin.ok_or(ApiError::NoAdminKey)?;
        let presented = digest(bearer_token(headers).ok_or(ApiError::MissingKey)?);
        if bool::from(admin.ct_eq(&presented)) { Ok(()) } else { Err(ApiError::NotAdmin) }
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

    fn headers(authorization: Option<&str>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if let Some(value) = authorization {
            headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn check(keys: &[&str], authorization: Option<&str>) -> Result<Caller, ApiError> {
        let keys: Vec<String> = keys.iter().map(|&key| key.to_owned()).collect();
        ApiKeys::new(&keys, &[], None).check(&headers(authorization))
    }

    #[test]
    fn a_tenants_key_says_whose_it_is_and_closes_the_door_to_others() {
        let tenant = |name: &str, keys: &[&str]| Tenant {
            name: name.to_owned(),
            api_keys: keys.iter().map(|&key| key.to_owned()).collect(),
        };
        let keys = ApiKeys::new(&["all".to_owned()], &[tenant("a", &["a1", "a2"]), tenant("b", &["b1"])], None);
        let who = |key: &str| keys.check(&headers(Some(&format!("Bearer {key}")))).map(|caller| caller.tenant);
        assert_eq!(who("a2").unwrap().as_deref(), Some("a"));
        assert_eq!(who("b1").unwrap().as_deref(), Some("b"));
        assert_eq!(who("all").unwrap(), None);
        assert!(matches!(who("c"), Err(ApiError::WrongKey)));
        let only_tenants = ApiKeys::new(&[], &[tenant("a", &["a1"])], None);
        assert!(matches!(only_tenants.check(&headers(None)), Err(ApiError::MissingKey)));
    }

    #[test]
    fn only_the_admin_key_opens_the_routes_that_change_the_server() {
        let keys = ApiKeys::new(&["user".to_owned()], &[], Some(&"boss".to_owned()));
        assert!(keys.check_admin(&headers(Some("Bearer boss"))).is_ok());
        assert!(matches!(keys.check_admin(&headers(Some("Bearer user"))), Err(ApiError::NotAdmin)));
        assert!(matches!(keys.check_admin(&headers(None)), Err(ApiError::MissingKey)));
        assert!(
            matches!(keys.check(&headers(Some("Bearer boss"))), Err(ApiError::WrongKey)),
            "it opens no model route"
        );
        let none = ApiKeys::new(&[], &[], None);
        assert!(matches!(none.check_admin(&headers(Some("Bearer boss"))), Err(ApiError::NoAdminKey)));
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
