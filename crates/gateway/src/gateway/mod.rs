//! The parts of this crate as one: what a server asks of a request from its key to its last byte.
//!
//! [`Gateway`] is what all requests share, [`Exchange`] one request: limits and guardrails on its way in, the places it may
//! go, the call upstream, what it cost. It must not know HTTP servers, engines or block tables: the server says what would
//! happen here and carries out what is local. Invariant: nothing is sent upstream without a committed reservation where
//! there is a store, and what was sent is settled, if not in time then later.

mod admission;
mod call;
mod choice;
mod credential;
mod exchange;
pub mod facts;
mod filters;
#[cfg(test)]
mod guardrail_tests;
mod judging;
#[cfg(test)]
mod log_tests;
mod meters;
mod send;
mod start;
#[cfg(test)]
mod tests;
mod transcript;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    num::NonZeroU32,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

pub use admission::{Asked, DEFAULT_COMPLETION_TOKENS, TurnedAway, Unreadable, WireRoute};
use credential::LiveEndpoint;
pub use exchange::{Exchange, LocalUse};
pub use filters::{AnswerFilters, MAX_HELD_BYTES};
pub use judging::{LocalAnswer, LocalJudge, LocalQuestion};
use meters::Meters;
pub use send::{Sent, UpstreamStream};
pub use start::{StartError, Surroundings};

use crate::{
    audit::{Audit, AuditError},
    clock::UnixMillis,
    config::{TenantConfig, UpstreamConfig},
    failure::OnFailure,
    guardrails::Policy,
    keys::{AuthError, Authenticator, Credential, Identity, JwtVerifier, KeyGrant, NameOf},
    ledger::{Ledger, LedgerError, local_price},
    limits::{Limiter, Refused as LimitRefused},
    money::Money,
    names::TenantId,
    policy::{Moment, PrivacyClass, Refused, Router, Target, route::LocalName, target::fits},
    providers::{ModelEntry, Refusal, UpstreamError},
    store::{Store, StoreThread},
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
    ledger: Option<Ledger>,
    on_store_failure: OnFailure,
    audit: Option<Arc<Audit>>,
    /// The longest prompt, and answer, that the log keeps of tenants who have them stored; None: it keeps none.
    max_contents_bytes: Option<usize>,
    /// The store, and its writer's thread until somebody has waited for it.
    store: Option<(Store, Mutex<Option<StoreThread>>)>,
    local: LocalCosts,
    /// Looks for personal data where rules ask and no guardrail of the tenant does.
    personal_data: Policy,
    /// Given by the server once it has a model; until then a local judge is silent.
    local_judge: OnceLock<Arc<dyn LocalJudge>>,
    meters: Meters,
}

/// A tenant, ready.
struct Tenant {
    config: TenantConfig,
    policy: Policy,
    /// Counted from 1; 0: everyone who belongs to none.
    number: u32,
}

impl Tenant {
    fn share(&self) -> LocalShare {
        let weight = NonZeroU32::new(self.config.weight).unwrap_or(NonZeroU32::MIN);
        LocalShare { tenant: self.number, weight }
    }
}

/// What a tenant may claim of the local machine while others want it, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalShare {
    /// Tenants by number; 0: everyone who belongs to none.
    pub tenant: u32,
    /// Tokens go in proportion to it.
    pub weight: NonZeroU32,
}

/// An upstream, ready.
struct LiveUpstream {
    config: UpstreamConfig,
    endpoint: LiveEndpoint,
    health: Upstream,
    door: Door,
}

/// A model that a tenant may name and that does not run here, or not always.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedModel {
    /// As requests name it.
    pub name: String,
    /// `virtual` or `upstream`.
    pub owner: &'static str,
    /// The longest prompt, where the table of models or the config says.
    pub max_context_tokens: Option<u64>,
}

/// What local tokens cost, and what they are compared with.
struct LocalCosts {
    per_hour: Option<Money>,
    reference: Option<ModelEntry>,
}

impl LocalCosts {
    /// Nothing, where nobody has said what an hour costs.
    fn price(&self, used: &LocalUse) -> Money {
        self.per_hour.and_then(|cost| local_price(cost, used.machine_time)).unwrap_or(Money::ZERO)
    }
}

/// Why a request goes no further, by what its sender can do about it.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// 403: whose key it is, nobody has configured.
    #[error("the key is of the tenant {name:?}, which this server's config does not name: ask whoever runs the server")]
    UnknownTenant {
        /// As the store or the token has it.
        name: String,
    },
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
            Self::UnknownTenant { .. } => fixed(403, "permission_error", "unknown_tenant"),
            Self::Limited(_) => fixed(429, "rate_limit_error", "rate_limit_exceeded"),
            // Nothing was found: whoever is asked is silent, and may speak again.
            Self::Blocked { because: BlockedBecause::Silence, .. } => {
                fixed(503, "service_unavailable_error", "guardrail_unavailable")
            }
            Self::Blocked { because: BlockedBecause::Found, .. } => {
                fixed(400, "invalid_request_error", "content_filter")
            }
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
            Self::Blocked { because: BlockedBecause::Found, .. } => Some("messages".to_owned()),
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
            Self::Ledger(LedgerError::OverBudget(over)) => over.retry_after(now),
            Self::Ledger(LedgerError::Store(_))
            | Self::Audit(_)
            | Self::Blocked { because: BlockedBecause::Silence, .. } => Some(Duration::from_secs(5)),
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
            // Another upstream may be able to carry the field, or be paid from another budget; what runs here may need no store.
            Self::Refusal(_)
            | Self::Ledger(LedgerError::OverBudget(_) | LedgerError::NoPrice { .. } | LedgerError::Store(_)) => true,
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

    /// Whether a tenant, by this key of its, may name something that is served here: for the routes that ask no router.
    pub fn may_name(&self, tenant: Option<&str>, grant: Option<&KeyGrant>, (name, of): (&str, NameOf)) -> bool {
        let Ok(tenant) = self.tenant(tenant) else { return false };
        tenant.config.routing.models.iter().any(|pattern| fits(pattern, name))
            && grant.is_none_or(|grant| grant.admits(name, of))
    }

    /// Whether a virtual model or one of an upstream has this name, whoever may use that.
    pub fn has_name(&self, name: &str) -> bool {
        let router = &self.0.router;
        router.virtual_models.contains_key(name)
            || router.upstream_models.iter().any(|target| target.to_string() == name)
    }

    /// Models beside the local ones that a tenant, by this key of its, may name: virtual ones and upstreams'. None for a
    /// stranger. `local_name` says what a name stands for here, for this caller.
    pub fn models(
        &self,
        tenant: Option<&str>,
        grant: Option<&KeyGrant>,
        local_name: &dyn Fn(&str) -> LocalName,
    ) -> Vec<ListedModel> {
        let may = |name: &str| self.may_name(tenant, grant, (name, NameOf::Model));
        let Ok(tenant) = self.tenant(tenant) else { return Vec::new() };
        let routing = &tenant.config.routing;
        let rules = self.0.router.virtual_models.values().filter(|model| model.leads_somewhere(local_name));
        let virtual_models =
            rules.map(|model| ListedModel { name: model.name.to_string(), owner: "virtual", max_context_tokens: None });
        let leaves = routing.privacy.leave().is_some();
        let upstream = self.0.router.upstream_models.iter().filter(|_| leaves).map(|target| ListedModel {
            name: target.to_string(),
            owner: "upstream",
            max_context_tokens: self.entry(target).and_then(|entry| entry.max_input_tokens),
        });
        virtual_models.chain(upstream).filter(|model| may(&model.name)).collect()
    }

    /// Each upstream and whether requests pass.
    pub fn health(&self) -> Vec<(Arc<str>, BreakerState)> {
        self.0.upstreams.iter().map(|(name, upstream)| (Arc::clone(name), upstream.health.state())).collect()
    }

    /// Whether what is asked here is logged.
    pub fn keeps_log(&self) -> bool {
        self.0.audit.is_some()
    }

    /// The ledger's counts, for metrics.
    pub fn ledger_counts(&self) -> Option<crate::ledger::LedgerCounts> {
        self.0.ledger.as_ref().map(Ledger::counts)
    }

    /// Settles what is open, writes every record that waits, and returns once all that the store has accepted is committed.
    /// For the very end: nothing is written after it, whoever else still holds a clone.
    pub async fn close(&self) {
        if let Some(ledger) = &self.0.ledger
            && let Err(error) = ledger.close().await
        {
            tracing::warn!(%error, "the ledger could not be closed: what is open is charged at the next start");
        }
        // The log's thread writes its head into the store, so it ends first. Both are waited for beside the runtime's threads.
        let gateway = self.clone();
        let audit_ended = tokio::task::spawn_blocking(move || {
            if let Some(audit) = &gateway.0.audit {
                audit.finish();
            }
        });
        let thread = self.0.store.as_ref().and_then(|(store, thread)| {
            let thread = thread.lock().unwrap_or_else(PoisonError::into_inner).take();
            thread.map(|thread| (store.clone(), thread))
        });
        let ended = async {
            audit_ended.await?;
            let Some((store, thread)) = thread else { return Ok(()) };
            store.close();
            tokio::task::spawn_blocking(|| thread.join()).await
        };
        if let Err(error) = ended.await {
            tracing::error!(%error, "what waited for the store or the audit log may not be written");
        }
    }

    /// What a caller may claim of the local machine.
    pub fn local_share(&self, tenant: Option<&str>) -> LocalShare {
        // A stranger gets no further than the gate.
        self.tenant(tenant).unwrap_or(&self.0.anonymous).share()
    }

    fn entry(&self, target: &Target) -> Option<&ModelEntry> {
        let Target::Upstream { upstream, model } = target else { return None };
        self.0.upstreams.get(upstream)?.config.models.iter().find(|entry| entry.id == **model)
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

    /// Nobody's in particular is what nobody was named for; a name that is not configured is nobody at all.
    fn tenant(&self, name: Option<&str>) -> Result<&Arc<Tenant>, GatewayError> {
        let Some(name) = name else { return Ok(&self.0.anonymous) };
        let found = TenantId::new(name).ok().and_then(|id| self.0.tenants.get(&id));
        found.ok_or_else(|| GatewayError::UnknownTenant { name: name.to_owned() })
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

/// The class of a request: its tenant's, tightened by all that its header asks for; `Err`: not the name of a class.
fn class_of(own: PrivacyClass, header: Option<&str>) -> Result<PrivacyClass, GatewayError> {
    let Some(header) = header else { return Ok(own) };
    header.split(',').try_fold(own, |class, word| {
        let asked = PrivacyClass::parse(word.trim()).ok_or_else(|| {
            let shown: String = header.chars().take(40).collect();
            GatewayError::Refusal(Refusal::invalid(
                "x-bindery-privacy",
                format!("x-bindery-privacy is {shown:?}: it must be local-only, local-first or any"),
            ))
        })?;
        Ok(class.tightened_by(asked))
    })
}

/// A credential that is none of the store's: of the configuration, or of nobody.
pub fn configured_credential() -> Credential {
    Credential::Key(crate::names::KeyId::new("configured").expect("a plain word is a name"))
}
