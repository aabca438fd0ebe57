//! JWTs of an identity provider (OpenID Connect) as a second way in.
//!
//! The token's `iss` chooses among the configured issuers before anything is trusted; then the signature is checked with
//! that issuer's key by an algorithm that its configuration names, then `aud`, `exp` and `nbf` against the clock passed
//! in. Which algorithms exist here is an enum without symmetric ones and without `none`: they cannot be configured.
//!
//! **Invariant**: no claim is used before the signature over it was checked, but `iss`, which only chooses the key.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jsonwebtoken::{Algorithm, Validation};
use serde_json::Value;

use super::{Credential, Identity, jwks::IssuerKeys};
use crate::{clock::UnixMillis, names::TenantId};

/// A longer token is refused unread.
const MAX_TOKEN_BYTES: usize = 16 << 10;

/// The algorithms there are: all have a public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[allow(missing_docs, reason = "the names of RFC 7518 and RFC 8037")]
pub enum SigningAlgorithm {
    RS256,
    RS384,
    RS512,
    PS256,
    PS384,
    PS512,
    ES256,
    ES384,
    EdDSA,
}

impl SigningAlgorithm {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::RS256,
        Self::RS384,
        Self::RS512,
        Self::PS256,
        Self::PS384,
        Self::PS512,
        Self::ES256,
        Self::ES384,
        Self::EdDSA,
    ];

    fn algorithm(self) -> Algorithm {
        match self {
            Self::RS256 => Algorithm::RS256,
            Self::RS384 => Algorithm::RS384,
            Self::RS512 => Algorithm::RS512,
            Self::PS256 => Algorithm::PS256,
            Self::PS384 => Algorithm::PS384,
            Self::PS512 => Algorithm::PS512,
            Self::ES256 => Algorithm::ES256,
            Self::ES384 => Algorithm::ES384,
            Self::EdDSA => Algorithm::EdDSA,
        }
    }
}

/// How a token's tenant is found.
#[derive(Clone, Debug)]
pub enum TenantFrom {
    /// Whoever the issuer vouches for belongs to this one.
    Fixed(TenantId),
    /// The claim is the tenant's name.
    Claim(String),
    /// The claim, or one of its values, is looked up here. Two that match are refused.
    Map {
        /// The claim: its name, or a JSON pointer where it begins with a slash (`/realm_access/roles`).
        claim: String,
        /// Value to tenant.
        tenants: BTreeMap<String, TenantId>,
    },
}

/// An issuer that is trusted.
#[derive(Clone, Debug)]
pub struct IssuerOptions {
    /// Exactly the `iss` of its tokens.
    pub issuer: String,
    /// One of these must be in `aud`.
    pub audiences: Vec<String>,
    /// Where its keys lie; none: where its OpenID configuration says.
    pub jwks_url: Option<String>,
    /// By which its tokens may be signed.
    pub algorithms: Vec<SigningAlgorithm>,
    /// How the tenant is found.
    pub tenant: TenantFrom,
    /// By how much clocks may differ.
    pub leeway: Duration,
}

/// Why a token opens nothing, or an issuer cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JwtError {
    /// Not a token at all.
    #[error("this is no token that can be read: {0}; ask your identity provider for a new one")]
    Malformed(&'static str),
    /// Nobody trusts it.
    #[error("the token's issuer is not one that this server trusts")]
    UnknownIssuer,
    /// Its algorithm.
    #[error("the token's algorithm is not one that this server accepts from its issuer")]
    Algorithm,
    /// Its key.
    #[error("the token's key is not among its issuer's keys")]
    UnknownKey,
    /// Its signature.
    #[error("the token's signature is wrong")]
    Signature,
    /// Its audience.
    #[error("the token is not for this server (`aud`)")]
    Audience,
    /// Its time is over.
    #[error("the token has expired; get a new one")]
    Expired,
    /// Its time has not come.
    #[error("the token is not valid yet; check the clocks")]
    NotYet,
    /// Its tenant.
    #[error("the token names no tenant of this server (claim `{claim}`)")]
    NoTenant {
        /// The claim.
        claim: String,
    },
    /// Its issuer's keys.
    #[error("the keys of {issuer} cannot be had, so its tokens cannot be checked: {why}")]
    KeysUnavailable {
        /// Whose.
        issuer: String,
        /// The network's words.
        why: String,
    },
    /// A setting.
    #[error("the issuer `{issuer}` cannot be used: {why}")]
    BadIssuer {
        /// As configured.
        issuer: String,
        /// What is wrong, and the next step.
        why: String,
    },
}

struct Issuer {
    options: IssuerOptions,
    keys: IssuerKeys,
}

/// The trusted issuers. Cheap to clone.
#[derive(Clone)]
pub struct JwtVerifier(Arc<Vec<Issuer>>);

impl JwtVerifier {
    /// Checks the settings; fetches nothing.
    pub fn new(issuers: Vec<IssuerOptions>) -> Result<Self, JwtError> {
        let mut checked: Vec<Issuer> = Vec::with_capacity(issuers.len());
        for options in issuers {
            let bad = |why: &str| Err(JwtError::BadIssuer { issuer: options.issuer.clone(), why: why.to_owned() });
            if options.audiences.is_empty() {
                return bad("it names no audience; without one, tokens made for other services would open this one");
            }
            if options.algorithms.is_empty() {
                return bad("it names no algorithm; name those its tokens are signed by, as RS256");
            }
            if checked.iter().any(|other| other.options.issuer == options.issuer) {
                return bad("it is configured twice; keep one");
            }
            let keys = IssuerKeys::new(options.issuer.clone(), options.jwks_url.clone())?;
            checked.push(Issuer { options, keys });
        }
        Ok(Self(Arc::new(checked)))
    }

    /// Who the token speaks for. Waits for the network only where its key was not met before.
    pub async fn verify(&self, token: &str, now: UnixMillis) -> Result<Identity, JwtError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(JwtError::Malformed("it is longer than 16 KiB"));
        }
        // What a token says of itself before it is believed: which issuer's rules apply.
        let unchecked: Value = jsonwebtoken::dangerous::insecure_decode_claims(token)
            .map_err(|_| JwtError::Malformed("it is not three parts of JSON"))?;
        let named = unchecked.get("iss").and_then(Value::as_str).ok_or(JwtError::UnknownIssuer)?;
        let issuer = self.0.iter().find(|issuer| issuer.options.issuer == named).ok_or(JwtError::UnknownIssuer)?;
        // `none` and what else is no algorithm of the library's ends here.
        let header = jsonwebtoken::decode_header(token).map_err(|_| JwtError::Algorithm)?;
        if header.crit.is_some() {
            return Err(JwtError::Malformed("it has critical extensions, and none is known here"));
        }
        if !issuer.options.algorithms.iter().any(|allowed| allowed.algorithm() == header.alg) {
            return Err(JwtError::Algorithm);
        }
        let public = issuer.keys.find(header.kid.as_deref(), header.alg, now).await?;
        let claims: Value = jsonwebtoken::decode(token, &public.key, &issuer.options.validation(header.alg))
            .map_err(|error| refusal(&error))?
            .claims;
        issuer.options.check_times(&claims, now)?;
        let tenant = issuer.options.tenant_of(&claims)?;
        let subject = claims.get("sub").and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok(Identity { tenant, credential: Credential::Jwt { issuer: named.to_owned(), subject }, grant: None })
    }
}

impl IssuerOptions {
    /// The library checks signature, issuer and audience; the times are checked by the clock that was passed in.
    fn validation(&self, algorithm: Algorithm) -> Validation {
        let mut validation = Validation::new(algorithm);
        validation.set_issuer(&[&self.issuer]);
        validation.set_audience(&self.audiences);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        validation.validate_exp = false;
        validation.validate_nbf = false;
        validation
    }

    fn check_times(&self, claims: &Value, now: UnixMillis) -> Result<(), JwtError> {
        let millis = |name: &str| match claims.get(name) {
            None | Some(Value::Null) => Ok(None),
            // NumericDate may have a fraction (RFC 7519, 2). `as` saturates, so no number is out of reach.
            Some(value) => match value.as_f64() {
                Some(seconds) => Ok(Some(UnixMillis((seconds * 1000.0) as i64))),
                None => Err(JwtError::Malformed("a time in it is no number")),
            },
        };
        let end = millis("exp")?.ok_or(JwtError::Malformed("it has no end (`exp`)"))?;
        if now >= end.after(self.leeway) {
            return Err(JwtError::Expired);
        }
        match millis("nbf")? {
            Some(begin) if now.after(self.leeway) < begin => Err(JwtError::NotYet),
            _ => Ok(()),
        }
    }

    fn tenant_of(&self, claims: &Value) -> Result<TenantId, JwtError> {
        let claim = match &self.tenant {
            TenantFrom::Fixed(tenant) => return Ok(tenant.clone()),
            TenantFrom::Claim(claim) | TenantFrom::Map { claim, .. } => claim,
        };
        let none = || JwtError::NoTenant { claim: claim.clone() };
        let value = if claim.starts_with('/') { claims.pointer(claim) } else { claims.get(claim) };
        let value = value.ok_or_else(none)?;
        let TenantFrom::Map { tenants, .. } = &self.tenant else {
            return value.as_str().and_then(|name| TenantId::new(name).ok()).ok_or_else(none);
        };
        let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let mut found: Vec<_> =
            values.iter().filter_map(Value::as_str).filter_map(|value| tenants.get(value)).collect();
        found.dedup();
        match found.as_slice() {
            [tenant] => Ok((*tenant).clone()),
            _ => Err(none()),
        }
    }
}

fn refusal(error: &jsonwebtoken::errors::Error) -> JwtError {
    use jsonwebtoken::errors::ErrorKind;
    match error.kind() {
        ErrorKind::InvalidAudience => JwtError::Audience,
        ErrorKind::InvalidIssuer => JwtError::UnknownIssuer,
        ErrorKind::InvalidAlgorithm | ErrorKind::UnsupportedAlgorithm => JwtError::Algorithm,
        ErrorKind::MissingRequiredClaim(claim) if claim == "aud" => JwtError::Audience,
        ErrorKind::MissingRequiredClaim(_) => JwtError::Malformed("it has no end (`exp`)"),
        ErrorKind::InvalidClaimFormat(_) | ErrorKind::Json(_) | ErrorKind::Base64(_) | ErrorKind::Utf8(_) => {
            JwtError::Malformed("its claims cannot be read")
        }
        _ => JwtError::Signature,
    }
}
