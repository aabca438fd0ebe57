//! Who asks: API keys that this server made, and JWTs that an identity provider made.
//!
//! Both end as an [`Identity`]: the tenant, and what it was that opened the door. Knows no limits, no budgets and no
//! HTTP but the fetching of an issuer's keys.
//!
//! **Invariant**: what cannot be checked opens nothing.

pub mod grant;
mod jwks;
pub mod jwt;
mod ring;
mod secret;
pub mod table;

pub use grant::{KeyGrant, NameOf};
pub use jwt::{IssuerOptions, JwtError, JwtVerifier, SigningAlgorithm, TenantFrom};
pub use ring::{KeyOwner, KeyRing, RingOptions};
pub use secret::{ApiKey, PREFIX};
pub use table::{KeyInfo, NewKey, Rotation};

use std::{sync::Arc, time::Duration};

use crate::{
    clock::UnixMillis,
    names::{KeyId, TenantId},
    store::StoreError,
};

/// Why a key is refused, or cannot be made.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// Not of the shape of a key.
    #[error("this is no key of this server, or a damaged one; copy it again as a whole (it begins with bdy_)")]
    Malformed,
    /// No such key, or not this secret.
    #[error("this key is not known here; ask for a new one (`bindery keys create`)")]
    Unknown,
    /// It was ended.
    #[error("the key {id} was revoked at {at}; ask for a new one")]
    Revoked {
        /// Which.
        id: KeyId,
        /// When.
        at: UnixMillis,
    },
    /// It has ended.
    #[error("the key {id} expired at {at}; ask for a new one")]
    Expired {
        /// Which.
        id: KeyId,
        /// When.
        at: UnixMillis,
    },
    /// The store was not read for too long.
    #[error(
        "keys were last read {age:?} ago, and after {limit:?} none is trusted: the store does not answer; try again later"
    )]
    Stale {
        /// Since the last reading.
        age: Duration,
        /// As configured.
        limit: Duration,
    },
    /// No such id.
    #[error("there is no key {0}; `bindery keys list` shows the ids")]
    NoSuchKey(KeyId),
    /// Revoked, expired or rotated already.
    #[error("the key {0} is revoked, expired or replaced already; make a new one with `bindery keys create`")]
    NotRotatable(KeyId),
    /// The bound.
    #[error("there are {} keys that are in force, which is the limit; revoke some first", table::MAX_LIVE_KEYS)]
    TooMany,
    /// A name of a key.
    #[error("a key's name has at most 200 bytes and no control characters; choose another")]
    BadName,
    /// A list of models or adapters that is none.
    #[error(
        "a key's list of {what} has 1 to {} names, and this one has {count}; leave it out to allow all",
        grant::MAX_PATTERNS
    )]
    BadList {
        /// Of what.
        what: &'static str,
        /// How many it has.
        count: usize,
    },
    /// A name that no model has.
    #[error(
        "a name in a key's list of {what} is empty, longer than 200 bytes, or holds control characters; correct it"
    )]
    BadPattern {
        /// Of what.
        what: &'static str,
    },
    /// An end in the past.
    #[error("the key would end before it begins; give a later end")]
    EndsBeforeItBegins,
    /// The system gives no random numbers.
    #[error("the system gives no random numbers, so no key can be made: {0}")]
    NoRandomness(String),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What opened the door.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// A key of this server.
    Key(KeyId),
    /// A token of an identity provider.
    Jwt {
        /// Who vouches.
        issuer: String,
        /// For whom.
        subject: String,
    },
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Who is counted, limited and billed.
    pub tenant: TenantId,
    /// By what.
    pub credential: Credential,
    /// What its key takes away of what the tenant may; None: nothing, as of a token.
    pub grant: Option<Arc<KeyGrant>>,
}

/// Why nobody is let in.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AuthError {
    /// A key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A token.
    #[error(transparent)]
    Jwt(#[from] JwtError),
}

impl AuthError {
    /// Not the caller's fault: he may come again with the same.
    pub fn is_ours(&self) -> bool {
        match self {
            Self::Key(error) => matches!(error, KeyError::Stale { .. } | KeyError::Store(_)),
            Self::Jwt(error) => matches!(error, JwtError::KeysUnavailable { .. }),
        }
    }
}

/// Both doors.
#[derive(Clone)]
pub struct Authenticator {
    keys: KeyRing,
    jwt: Option<JwtVerifier>,
}

impl Authenticator {
    /// With tokens where issuers are configured.
    pub fn new(keys: KeyRing, jwt: Option<JwtVerifier>) -> Self {
        Self { keys, jwt }
    }

    /// Whether any key is known, revoked or not, or tokens open the door: then every route asks for one.
    pub fn has_keys(&self) -> bool {
        self.jwt.is_some() || !self.keys.is_empty()
    }

    /// Who presents this. Waits only for an issuer's keys that were not met before, and, where a key is not known, for a look at the
    /// store: it may have been made a moment ago.
    pub async fn authenticate(&self, presented: &str, now: UnixMillis) -> Result<Identity, AuthError> {
        match &self.jwt {
            Some(jwt) if !presented.starts_with(PREFIX) && presented.contains('.') => {
                Ok(jwt.verify(presented, now).await?)
            }
            _ => {
                let known = self.keys.authenticate(presented, now);
                let KeyOwner { tenant, key, grant } = match known {
                    Err(KeyError::Unknown) if self.keys.look_again(now).await => {
                        self.keys.authenticate(presented, now)?
                    }
                    known => known?,
                };
                Ok(Identity { tenant, credential: Credential::Key(key), grant: Some(grant) })
            }
        }
    }
}
