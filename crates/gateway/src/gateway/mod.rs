//! The parts of this crate as one: what a server asks of a request from its key to its last byte.
//!
//! [`Gateway`] is what all requests share, [`Exchange`] one request: limits and guardrails on its way in, the places it may
//! go, the call upstream, what it cost. It must not know HTTP servers, engines or block tables: the server says what would
//! happen here and carries out what is local. Invariant: nothing is sent upstream without a committed reservation where
//! there is a store, and what was sent is settled, if not in time then later.

mod choice;
mod exchange;
pub mod facts;
mod filters;
#[cfg(test)]
mod guardrail_tests;
mod judging;
mod start;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

pub use exchange::{Asked, Exchange, LocalModel, LocalUse, Sent, UpstreamStream, WireRoute};
pub use filters::{AnswerFilters, MAX_HELD_BYTES};
pub use judging::{LocalAnswer, LocalJudge, LocalQuestion};
pub use start::{StartError, Surroundings};

use crate::{
    audit::{Audit, AuditError},
    clock::UnixMillis,
    config::{TenantConfig, UpstreamConfig},
    guardrails::Policy,
    keys::{AuthError, Authenticator, Credential, Identity, JwtVerifier},
    ledger::{Ledger, LedgerError},
    limits::{Limiter, Refused as LimitRefused},
    money::Money,
    names::TenantId,
    policy::{Moment, PrivacyClass, Refused, Router},
    providers::{Endpoint, ModelEntry, Refusal, UpstreamError},
    upstream::{BreakerState, Door, Upstream},
};

/// The longest a call upstream may take in all, where the request sets no deadline of its own.
pub const MAX_CALL: Duration = Duration::from_mins(15);

/// What all requests share. Cheap to clone.
#[derive(Clone)]
pub struct Gateway(Arc<Inner>);

struct Inner {
    tenants: HashMap<TenantId, Arc<Tenant>>,
    /// Of requests that belong to nobody in particular.
    anonymous: Arc<Tenant>,
    door_of_keys: Option<Authenticator>,
    door_of_tokens: Option<JwtVerifier>,
    limiter: Limiter,
    router: Router,
    upstreams: BTreeMap<Arc<str>, LiveUpstream>,
    door: Door,
    ledger: Option<Ledger>,
    audit: Option<Audit>,
    local: LocalCosts,
    /// Looks for personal data where rules ask and no guardrail of the tenant does.
    personal_data: Policy,
    /// Given by the server once it has a model; until then a local judge is silent.
    local_judge: OnceLock<Arc<dyn LocalJudge>>,
}

/// A tenant, ready.
struct Tenant {
    config: TenantConfig,
    policy: Policy,
}

/// An upstream, ready.
struct LiveUpstream {
    config: UpstreamConfig,
    endpoint: Endpoint,
    health: Upstream,
}

/// What local tokens cost, and what they are compared with.
struct LocalCosts {
    per_hour: Option<Money>,
    reference: Option<ModelEntry>,
}

/// Why a request goes no further, by what its sender can do about it.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// 429
    #[error(transparent)]
    Limited(#[from] Box<LimitRefused>),
    /// 400: a guardrail.
    #[error("the request was blocked by the guardrail {guardrail:?}: {because}")]
    Blocked {
        /// Which.
        guardrail: Arc<str>,
        /// What it found, or that it could not look.
        because: BlockedBecause,
    },
    /// By the decision.
    #[error(transparent)]
    Route(#[from] Refused),
    /// 400: what the upstream's wire cannot carry.
    #[error(transparent)]
    Refusal(#[from] Refusal),
    /// By the upstream's own mapping.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    /// 429 for a budget, 503 for a store, 400 for a price.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// 503: what must be logged cannot be.
    #[error("the audit log cannot be written, so this server answers nothing: {0}")]
    Audit(Arc<AuditError>),
    /// 500
    #[error("{0}")]
    Internal(String),
}

/// Why a guardrail blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockedBecause {
    /// It found something.
    Found,
    /// Whoever it asks said nothing, and that counts as found.
    Silence,
}

impl fmt::Display for BlockedBecause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Found => "change its text",
            Self::Silence => {
                "whoever it asks gave no verdict, which is configured to count as a block; try again later, or tell whoever \
                 runs this server"
            }
        })
    }
}

impl GatewayError {
    /// HTTP status, `type` and `code` of OpenAI's error object.
    pub fn shown(&self) -> (u16, &'static str, String) {
        let fixed = |status, kind, code: &str| (status, kind, code.to_owned());
        match self {
            Self::Limited(_) => fixed(429, "rate_limit_error", "rate_limit_exceeded"),
            Self::Blocked { .. } => fixed(400, "invalid_request_error", "content_filter"),
            Self::Route(Refused::UnknownModel { .. }) => fixed(404, "invalid_request_error", "model_not_found"),
            Self::Route(Refused::NotAllowed { .. }) => fixed(403, "permission_error", "forbidden"),
            Self::Route(Refused::NoPlace { .. }) => fixed(400, "invalid_request_error", "no_place"),
            Self::Route(Refused::CannotTake(_)) => fixed(400, "invalid_request_error", "unsupported_parameter"),
            Self::Route(Refused::TooSlow { .. }) => fixed(429, "rate_limit_error", "overloaded"),
            Self::Refusal(refusal) => fixed(400, "invalid_request_error", refusal.code()),
            Self::Upstream(error) => (error.status(), error.kind(), error.code().to_owned()),
            Self::Ledger(LedgerError::OverBudget(_)) => fixed(429, "insufficient_quota", "budget_exceeded"),
            Self::Ledger(LedgerError::NoPrice { .. }) => fixed(400, "invalid_request_error", "model_without_price"),
            Self::Ledger(_) => fixed(503, "service_unavailable_error", "store_unavailable"),
            Self::Audit(_) => fixed(503, "service_unavailable_error", "audit_unavailable"),
            Self::Internal(_) => fixed(500, "server_error", "internal_error"),
        }
    }

    /// The field that is wrong.
    pub fn param(&self) -> Option<String> {
        match self {
            Self::Refusal(refusal) => Some(refusal.param().to_owned()),
            Self::Upstream(error) => error.param.clone(),
            Self::Route(Refused::UnknownModel { .. } | Refused::NotAllowed { .. }) => Some("model".to_owned()),
            Self::Blocked { .. } => Some("messages".to_owned()),
            Self::Route(Refused::CannotTake(what)) => Some(what.field.clone()),
            _ => None,
        }
    }

    /// When to try again.
    pub fn retry_after(&self, now: UnixMillis) -> Option<Duration> {
        match self {
            Self::Limited(refused) => refused.retry_after_seconds().map(Duration::from_secs),
            Self::Route(Refused::TooSlow { retry_after, .. }) => Some(*retry_after),
            Self::Upstream(error) => error.retry_after,
            Self::Ledger(LedgerError::OverBudget(over)) => Some(over.renews_at.since(now)),
            Self::Ledger(LedgerError::Store(_)) | Self::Audit(_) => Some(Duration::from_secs(5)),
            _ => None,
        }
    }

    /// Headers that tell of limits.
    pub fn rate_headers(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Limited(refused) => refused.headers.pairs(),
            _ => Vec::new(),
        }
    }

    /// Whether the next place of a route may be tried.
    pub fn lets_others_try(&self) -> bool {
        match self {
            Self::Upstream(error) => error.retry() != crate::providers::error::Retry::Never,
            // Another upstream may be able to carry the field, or be paid from another budget.
            Self::Refusal(_) | Self::Ledger(LedgerError::OverBudget(_) | LedgerError::NoPrice { .. }) => true,
            _ => false,
        }
    }
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let upstreams: Vec<&str> = self.0.upstreams.keys().map(AsRef::as_ref).collect();
        f.debug_struct("Gateway")
            .field("num_tenants", &self.0.tenants.len())
            .field("upstreams", &upstreams)
            .finish_non_exhaustive()
    }
}

impl Gateway {
    /// Whose a key or token is. `None`: neither keys in a store nor issuers are configured here.
    pub async fn authenticate(&self, presented: &str, now: UnixMillis) -> Option<Result<Identity, AuthError>> {
        if let Some(keys) = &self.0.door_of_keys {
            return Some(keys.authenticate(presented, now).await);
        }
        let tokens = self.0.door_of_tokens.as_ref()?;
        Some(tokens.verify(presented, now).await.map_err(AuthError::from))
    }

    /// Whether every model route needs a key because of what is stored or configured here: a tenant, an issuer, a key.
    pub fn needs_key(&self) -> bool {
        !self.0.tenants.is_empty()
            || self.0.door_of_tokens.is_some()
            || self.0.door_of_keys.as_ref().is_some_and(Authenticator::has_keys)
    }

    /// Whether a name is that of a configured tenant.
    pub fn knows(&self, tenant: &str) -> bool {
        TenantId::new(tenant).is_ok_and(|id| self.0.tenants.contains_key(&id))
    }

    /// Models beside the local ones that a tenant may name: virtual ones and upstreams', each with what it is.
    pub fn models(&self, tenant: Option<&str>) -> Vec<(String, &'static str)> {
        let tenant = self.tenant(tenant);
        let routing = &tenant.config.routing;
        let may = |name: &str| routing.models.iter().any(|pattern| crate::policy::target::fits(pattern, name));
        let virtual_models = self.0.router.virtual_models.keys().map(|name| (name.to_string(), "virtual"));
        let leaves = routing.privacy.leave().is_some();
        let upstream =
            self.0.router.upstream_models.iter().filter(|_| leaves).map(|target| (target.to_string(), "upstream"));
        virtual_models.chain(upstream).filter(|(name, _)| may(name)).collect()
    }

    /// Each upstream and whether requests pass.
    pub fn health(&self) -> Vec<(Arc<str>, BreakerState)> {
        self.0.upstreams.iter().map(|(name, upstream)| (Arc::clone(name), upstream.health.state())).collect()
    }

    /// The ledger's counts, for metrics.
    pub fn ledger_counts(&self) -> Option<crate::ledger::LedgerCounts> {
        self.0.ledger.as_ref().map(Ledger::counts)
    }

    /// Settles what is open. For the very end.
    pub async fn close(&self) {
        if let Some(ledger) = &self.0.ledger
            && let Err(error) = ledger.close().await
        {
            tracing::warn!(%error, "the ledger could not be closed: what is open is charged at the next start");
        }
    }

    /// An upstream and a model that it offers.
    fn offer(&self, upstream: &str, model: &str) -> Result<(&LiveUpstream, ModelEntry), GatewayError> {
        let internal = |what: &str| GatewayError::Internal(what.to_owned());
        let live =
            self.0.upstreams.get(upstream).ok_or_else(|| internal("a route names an upstream that is not there"))?;
        let entry = live.config.models.iter().find(|entry| entry.id == model);
        let entry = entry.ok_or_else(|| internal("a route names a model that its upstream does not offer"))?;
        Ok((live, entry.clone()))
    }

    fn tenant(&self, name: Option<&str>) -> &Arc<Tenant> {
        let id = name.and_then(|name| TenantId::new(name).ok());
        id.and_then(|id| self.0.tenants.get(&id)).unwrap_or(&self.0.anonymous)
    }
}

/// A moment as rules ask for it.
pub fn moment(now: UnixMillis) -> Moment {
    const MINUTES_PER_DAY: i64 = 24 * 60;
    let minutes = now.0.div_euclid(60_000);
    // 1 January 1970 was a Thursday.
    let weekday = (minutes.div_euclid(MINUTES_PER_DAY) + 3).rem_euclid(7);
    Moment { minute_of_day: minutes.rem_euclid(MINUTES_PER_DAY) as u16, weekday: weekday as u8 }
}

/// The class of a request: its tenant's, tightened by what its header asks for; `Err`: not the name of a class.
fn class_of(own: PrivacyClass, header: Option<&str>) -> Result<PrivacyClass, GatewayError> {
    let Some(header) = header else { return Ok(own) };
    let asked = PrivacyClass::parse(header.trim()).ok_or_else(|| {
        let shown: String = header.chars().take(40).collect();
        GatewayError::Refusal(Refusal::invalid(
            "x-bindery-privacy",
            format!("x-bindery-privacy is {shown:?}: it must be local-only, local-first or any"),
        ))
    })?;
    Ok(own.tightened_by(asked))
}

/// A credential that is none of the store's: of the configuration, or of nobody.
pub fn configured_credential() -> Credential {
    Credential::Key(crate::names::KeyId::new("configured").expect("a plain word is a name"))
}
