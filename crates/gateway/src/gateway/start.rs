//! From settings to a gateway that runs: credentials fetched, the store opened, what a dead process left charged.
//!
//! Knows the environment and files by the functions it is given. Invariant: whatever is wrong is said before the first
//! request, with the setting's name and without its value.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use super::{Gateway, Inner, LiveUpstream, LocalCosts, Tenant, facts};
use tokio::runtime::Handle;

use crate::{
    audit::{
        Audit, AuditConfig, AuditError, HeadStore, Journal, MemoryHeadStore,
        config::{KeepContents, WriterConfig},
    },
    clock::UnixMillis,
    config::{CredentialSource, GatewayConfig, StoreConfig, TenantConfig, UpstreamConfig},
    guardrails::{GuardrailError, Policy},
    keys::{Authenticator, JwtError, JwtVerifier, KeyError, KeyRing, RingOptions},
    ledger::{Ledger, LedgerError, LedgerOptions},
    limits::{Limiter, RateLimits},
    names::{NodeId, TenantId},
    providers::{Credential, Endpoint, Secret, UnmappedFields, endpoint::EndpointError},
    store::{Store, StoreError, StoreHeads, StoreOptions},
    upstream::{BreakerLimits, Door, DoorError, Limits, RetryLimits, Upstream},
};

/// A revocation acts within a second: it is looked for this often.
const POLL_KEYS: Duration = Duration::from_millis(500);
/// Without news from the store for so long, stored keys open nothing: a revoked one might be among them.
const KEYS_STALE_AFTER: Duration = Duration::from_secs(30);
/// The store's operations that may wait, and how long each may take.
const MAX_WAITING: usize = 4096;
const STORE_TIMEOUT: Duration = Duration::from_secs(5);
/// Signs of life of a process that holds reservations, and how long it counts as alive without one.
const BEAT: Duration = Duration::from_secs(5);
const LEASE: Duration = Duration::from_mins(1);

/// What lies outside of a config file.
pub struct Surroundings<'a> {
    /// Reads an environment variable.
    pub env: &'a dyn Fn(&str) -> Option<String>,
    /// This process among those that share a store.
    pub node: NodeId,
}

/// Why there is no gateway.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A variable is not set.
    #[error(
        "the upstream {upstream:?} takes its credential from the environment variable {variable}, which is not set: set it"
    )]
    NoVariable {
        /// Whose.
        upstream: String,
        /// Which.
        variable: String,
    },
    /// A file cannot be read.
    #[error("the credential of the upstream {upstream:?} cannot be read from {path}: {why}")]
    NoFile {
        /// Whose.
        upstream: String,
        /// Which.
        path: String,
        /// The system's words.
        why: String,
    },
    /// An address or a credential that no header can carry.
    #[error("the upstream {upstream:?} cannot be used: {source}")]
    Endpoint {
        /// Which.
        upstream: String,
        /// Why.
        source: EndpointError,
    },
    /// A guardrail.
    #[error(transparent)]
    Guardrail(#[from] GuardrailError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its keys.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// Its ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The audit log.
    #[error("the audit log cannot be opened: {0}")]
    Audit(#[from] AuditError),
    /// A setting that the log itself knows.
    #[error(
        "[audit] contents = \"encrypted\" is not in this version yet, so prompts and answers would be missing: leave it out"
    )]
    ContentsAreNotKept,
    /// An issuer.
    #[error(transparent)]
    Issuer(#[from] JwtError),
    /// The HTTP client.
    #[error(transparent)]
    Door(#[from] DoorError),
}

impl Gateway {
    /// Opens everything.
    ///
    /// # Errors
    /// [`StartError`], naming the setting.
    pub async fn start(
        config: GatewayConfig,
        surroundings: &Surroundings<'_>,
        now: UnixMillis,
    ) -> Result<Self, StartError> {
        let GatewayConfig {
            store,
            local_cost_per_hour,
            reference,
            upstreams,
            tenants,
            router,
            guardrails,
            issuers,
            audit,
        } = config;
        let compiled = Policy::compile(&guardrails, surroundings.env)?;
        let mut ready = HashMap::new();
        for config in tenants {
            let policy = Policy::named(&compiled, &config.guardrails)?;
            ready.insert(config.id.clone(), Arc::new(Tenant { config, policy }));
        }
        let mut live = BTreeMap::new();
        for config in upstreams {
            live.insert(Arc::clone(&config.name), live_upstream(config, surroundings)?);
        }
        let tokens = if issuers.is_empty() { None } else { Some(JwtVerifier::new(issuers)?) };
        let (mut door_of_keys, mut door_of_tokens, mut ledger, mut opened) = (None, None, None, None);
        match store {
            Some(StoreConfig { url, durability, max_bytes, keep }) => {
                let options =
                    StoreOptions { url, durability, max_bytes, max_waiting: MAX_WAITING, timeout: STORE_TIMEOUT };
                let (store, _thread) = Store::open(options).await?;
                let ring = KeyRing::open(
                    store.clone(),
                    RingOptions { poll_every: POLL_KEYS, stale_after: KEYS_STALE_AFTER },
                    now,
                )
                .await?;
                ring.watch();
                door_of_keys = Some(Authenticator::new(ring, tokens));
                let options = LedgerOptions { node: surroundings.node.clone(), beat_every: BEAT, lease: LEASE, keep };
                let books = Ledger::open(store.clone(), options, now).await?;
                books.watch();
                ledger = Some(books);
                opened = Some(store);
            }
            None => door_of_tokens = tokens,
        }
        Ok(Self(Arc::new(Inner {
            tenants: ready,
            anonymous: Arc::new(anonymous()),
            door_of_keys,
            door_of_tokens,
            limiter: Limiter::new(),
            router,
            upstreams: live,
            door: Door::new(limits())?,
            ledger,
            audit: match audit {
                Some(config) => Some(open_log(config, opened).await?),
                None => None,
            },
            local: LocalCosts { per_hour: local_cost_per_hour, reference },
            personal_data: facts::personal_data()?,
            local_judge: OnceLock::new(),
        })))
    }
}

/// The audit log. Its head is kept in the store, so that a log cut at its end shows.
async fn open_log(config: AuditConfig, store: Option<Store>) -> Result<Audit, StartError> {
    if config.contents != KeepContents::None {
        return Err(StartError::ContentsAreNotKept);
    }
    let (journal, WriterConfig { on_failure, max_queued }) = (config.journal()?, config.writer());
    let heads: Box<dyn HeadStore> = if let Some(store) = store {
        Box::new(StoreHeads::new(store, Handle::current(), &config.path))
    } else {
        tracing::warn!("the audit log has no store for its head: that its end was cut off would not show");
        Box::new(MemoryHeadStore::default())
    };
    // Opening reads what is there and asks the store, which may not be waited for on this thread.
    let opened =
        tokio::task::spawn_blocking(move || Audit::start(Journal::open(journal, heads)?, on_failure, max_queued));
    Ok(opened.await.map_err(|error| AuditError::Config(format!("opening it failed: {error}")))??)
}

/// Bounds of every call.
fn limits() -> Limits {
    Limits {
        connect: Duration::from_secs(10),
        // A reasoning model may think for minutes before it says a word.
        first_byte: Duration::from_mins(10),
        idle: Duration::from_mins(5),
        max_answer_bytes: 64 << 20,
        max_error_bytes: 1 << 20,
        max_event_bytes: 8 << 20,
        retry: RetryLimits {
            max_attempts: 3,
            first_wait: Duration::from_millis(500),
            max_wait: Duration::from_secs(8),
            max_retry_after: Duration::from_secs(20),
        },
    }
}

/// Whose requests belong to no tenant: nothing is limited, and nothing overflows.
fn anonymous() -> Tenant {
    let routing = facts::nobodys_routing();
    let id = TenantId::new(&routing.name).expect("a plain word is a name");
    let config = TenantConfig {
        id,
        routing,
        api_key_env: None,
        limits: RateLimits::default(),
        budgets: Vec::new(),
        overflow_budgets: Vec::new(),
        guardrails: Vec::new(),
        max_output_tokens: None,
        fields: UnmappedFields::Drop,
        weight: 1,
    };
    Tenant { config, policy: Policy::default() }
}

fn live_upstream(config: UpstreamConfig, surroundings: &Surroundings<'_>) -> Result<LiveUpstream, StartError> {
    let upstream = || config.name.to_string();
    let variable = |name: &String| {
        (surroundings.env)(name)
            .map(|text| Secret::new(&text))
            .ok_or_else(|| StartError::NoVariable { upstream: upstream(), variable: name.clone() })
    };
    let file = |path: &Path| {
        let text = std::fs::read_to_string(path).map_err(|error| StartError::NoFile {
            upstream: upstream(),
            path: path.display().to_string(),
            why: error.to_string(),
        })?;
        Ok::<_, StartError>(Secret::new(&text))
    };
    let credential = match &config.credential {
        CredentialSource::None => Credential::None,
        CredentialSource::KeyEnv(name) => Credential::Key(variable(name)?),
        CredentialSource::KeyFile(path) => Credential::Key(file(path)?),
        CredentialSource::TokenEnv(name) => Credential::Bearer(variable(name)?),
        CredentialSource::TokenFile(path) => Credential::Bearer(file(path)?),
    };
    let fail = |source| StartError::Endpoint { upstream: upstream(), source };
    let endpoint = Endpoint::new(&config.provider, config.base_url.as_deref(), credential).map_err(fail)?;
    let (organization, project) = &config.account;
    let endpoint = endpoint.with_account(organization.as_deref(), project.as_deref()).map_err(fail)?;
    let breaker =
        BreakerLimits { max_failures: 5, open_for: Duration::from_secs(10), max_open_for: Duration::from_mins(5) };
    Ok(LiveUpstream { health: Upstream::new(&config.name, breaker), endpoint, config })
}
