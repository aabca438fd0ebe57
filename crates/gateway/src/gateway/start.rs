//! From settings to a gateway that runs: credentials fetched, the store opened, what a dead process left charged.
//!
//! Knows the environment and files by the functions it is given. Invariant: whatever is wrong is said before the first
//! request, with the setting's name and without its value.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use super::{
    Gateway, Inner, LiveEndpoint, LiveUpstream, LocalCosts, Meters, Tenant,
    credential::{CredentialError, CredentialFile},
    facts,
};
use tokio::runtime::Handle;

use crate::{
    audit::{
        Audit, AuditConfig, AuditError, HeadStore, Journal, MemoryHeadStore,
        config::WriterConfig,
        has_segments,
        record::{ModelUsed, RequestRecord, RouteTaken, TokenCounts},
    },
    clock::UnixMillis,
    config::{CredentialSource, GatewayConfig, Patience, StoreConfig, TenantConfig, UpstreamConfig},
    failure::OnFailure,
    guardrails::{GuardrailError, Policy},
    keys::{Authenticator, JwtError, JwtVerifier, KeyError, KeyRing, RingOptions},
    ledger::{Ledger, LedgerError, LedgerOptions, Orphan, WhenOrphaned},
    limits::{Limiter, RateLimits},
    names::{NodeId, TenantId},
    providers::{Credential, Endpoint, Secret, UnmappedFields, endpoint::EndpointError},
    store::{LogWriter, Store, StoreError, StoreHeads, StoreOptions},
    upstream::{BreakerLimits, Door, DoorError, Limits, Renew, RetryLimits, Upstream},
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
    /// The machine's name, which tells its audit log from other machines'.
    pub host: &'a str,
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
        let anonymous = anonymous();
        let ids: Vec<&str> = tenants.iter().chain([&anonymous.config]).map(|tenant| tenant.id.as_str()).collect();
        let meters = Meters::new(&ids, &upstreams, &guardrails);
        let compiled = Policy::compile(&guardrails, surroundings.env)?;
        let mut ready = HashMap::new();
        for (number, config) in (1..).zip(tenants) {
            let policy = Policy::named(&compiled, &config.guardrails)?;
            ready.insert(config.id.clone(), Arc::new(Tenant { config, policy, number }));
        }
        let mut live = BTreeMap::new();
        for config in upstreams {
            live.insert(Arc::clone(&config.name), live_upstream(config, surroundings)?);
        }
        let tokens = if issuers.is_empty() { None } else { Some(JwtVerifier::new(issuers)?) };
        let mut on_store_failure = OnFailure::default();
        let (mut door_of_keys, mut door_of_tokens, mut ledger, mut opened, mut log) = (None, None, None, None, None);
        let max_contents_bytes = audit.as_ref().and_then(AuditConfig::contents_bytes);
        if let Some(StoreConfig { url, durability, max_bytes, keep, on_failure }) = store {
            on_store_failure = on_failure;
            let options = StoreOptions { url, durability, max_bytes, max_waiting: MAX_WAITING, timeout: STORE_TIMEOUT };
            let (store, thread) = Store::open(options).await?;
            let ring =
                KeyRing::open(store.clone(), RingOptions { poll_every: POLL_KEYS, stale_after: KEYS_STALE_AFTER }, now)
                    .await?;
            ring.watch();
            for (tenant, num_keys) in ring.num_live_by_tenant(now) {
                if !ready.contains_key(&tenant) {
                    tracing::warn!(%tenant, num_keys, "keys in the store are of a tenant that the config does not name: they open nothing");
                }
            }
            door_of_keys = Some(Authenticator::new(ring, tokens));
            if let Some(config) = audit.clone() {
                log = Some(Arc::new(open_log(config, surroundings, Some(store.clone())).await?));
            }
            let options = LedgerOptions {
                node: surroundings.node.clone(),
                beat_every: BEAT,
                lease: LEASE,
                keep,
                when_orphaned: log.as_ref().map(tell_of_orphans),
            };
            let books = Ledger::open(store.clone(), options, now).await?;
            books.watch();
            ledger = Some(books);
            opened = Some((store, Mutex::new(Some(thread))));
        } else {
            door_of_tokens = tokens;
            if let Some(config) = audit {
                log = Some(Arc::new(open_log(config, surroundings, None).await?));
            }
        }
        Ok(Self(Arc::new(Inner {
            tenants: ready,
            anonymous: Arc::new(anonymous),
            door_of_keys,
            door_of_tokens,
            limiter: Limiter::new(),
            router,
            upstreams: live,
            ledger,
            on_store_failure,
            max_contents_bytes,
            audit: log,
            store: opened,
            local: LocalCosts { per_hour: local_cost_per_hour, reference },
            personal_data: facts::personal_data()?,
            local_judge: OnceLock::new(),
            meters,
        })))
    }
}

/// What a process that was killed had sent has its record from whoever finds its reservation.
fn tell_of_orphans(log: &Arc<Audit>) -> WhenOrphaned {
    // The log ends with the gateway, not with its ledger.
    let log = Arc::downgrade(log);
    WhenOrphaned(Arc::new(move |orphan: Orphan| {
        let Some(log) = log.upgrade() else { return };
        let Orphan { id, at, tenant, credential, model, route } = orphan;
        let to = route.strip_prefix("upstream:").unwrap_or(&route).to_owned();
        let record = RequestRecord {
            request_id: id,
            tenant,
            key_id: Some(credential),
            model: ModelUsed { name: model, ..ModelUsed::default() },
            route: RouteTaken { to, why: format!("sent at {at}; its process ended before its answer did") },
            tokens: TokenCounts { estimated: true, ..TokenCounts::default() },
            outcome: "unsettled".to_owned(),
            ..RequestRecord::default()
        };
        // Written all the same; nobody waits for it.
        drop(log.record(record, None));
    }))
}

/// The audit log. Its head is kept in the store, so that a log cut at its end shows.
async fn open_log(
    config: AuditConfig,
    surroundings: &Surroundings<'_>,
    store: Option<Store>,
) -> Result<Audit, StartError> {
    let (journal, WriterConfig { on_failure, max_queued }) = (config.journal(surroundings.env)?, config.writer());
    let heads: Box<dyn HeadStore> = if let Some(store) = store {
        let log = config.log_name(surroundings.host);
        let heads =
            StoreHeads::new(store, Handle::current(), LogWriter { log: &log, writer: surroundings.node.as_str() });
        if heads.newest().await.map_err(AuditError::from)?.is_none() && has_segments(&config.path) {
            tracing::warn!(
                log,
                "the store knows no head of this audit log, which has records: that its end was cut off before now would \
                 not show (was the machine renamed, or the folder moved? [audit] name fixes the log's name)"
            );
        }
        Box::new(heads)
    } else {
        tracing::warn!("the audit log has no store for its head: that its end was cut off would not show");
        Box::new(MemoryHeadStore::default())
    };
    // Opening reads what is there and asks the store, which may not be waited for on this thread.
    let opened =
        tokio::task::spawn_blocking(move || Audit::start(Journal::open(journal, heads)?, on_failure, max_queued));
    Ok(opened.await.map_err(|error| AuditError::Config(format!("opening it failed: {error}")))??)
}

/// Bounds of an upstream's calls.
fn limits(patience: Patience) -> Limits {
    let Patience { connect, first_byte, idle, max_attempts } = patience;
    Limits {
        connect,
        first_byte,
        idle,
        max_answer_bytes: 64 << 20,
        max_error_bytes: 1 << 20,
        max_event_bytes: 8 << 20,
        retry: RetryLimits {
            max_attempts,
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
        store_contents: false,
    };
    Tenant { config, policy: Policy::default(), number: 0 }
}

fn live_upstream(config: UpstreamConfig, surroundings: &Surroundings<'_>) -> Result<LiveUpstream, StartError> {
    let upstream = || config.name.to_string();
    let variable = |name: &String| {
        (surroundings.env)(name)
            .map(|text| Secret::new(&text))
            .ok_or_else(|| StartError::NoVariable { upstream: upstream(), variable: name.clone() })
    };
    let fail = |source| StartError::Endpoint { upstream: upstream(), source };
    let fixed = |credential| {
        let endpoint = endpoint(&config, credential).map_err(fail)?;
        Ok::<_, StartError>(LiveEndpoint::Fixed(Arc::new(endpoint)))
    };
    let from_file = |path: &PathBuf, form: fn(Secret) -> Credential| {
        let own = config.clone();
        let make = Box::new(move |secret| endpoint(&own, form(secret)));
        let file = CredentialFile::open(Arc::clone(&config.name), path.clone(), make).map_err(|error| match error {
            CredentialError::Endpoint(source) => fail(source),
            CredentialError::Unreadable(why) => {
                StartError::NoFile { upstream: upstream(), path: path.display().to_string(), why }
            }
        })?;
        file.watch();
        Ok(LiveEndpoint::File(file))
    };
    let endpoint = match &config.credential {
        CredentialSource::None => fixed(Credential::None),
        CredentialSource::KeyEnv(name) => fixed(Credential::Key(variable(name)?)),
        CredentialSource::TokenEnv(name) => fixed(Credential::Bearer(variable(name)?)),
        CredentialSource::KeyFile(path) => from_file(path, Credential::Key),
        CredentialSource::TokenFile(path) => from_file(path, Credential::Bearer),
    }?;
    let breaker =
        BreakerLimits { max_failures: 5, open_for: Duration::from_secs(10), max_open_for: Duration::from_mins(5) };
    let mut health = Upstream::new(&config.name, breaker);
    if let LiveEndpoint::File(file) = &endpoint {
        health = health.with_renewal(Arc::clone(file) as Arc<dyn Renew>);
    }
    let door = Door::new(limits(config.patience))?;
    Ok(LiveUpstream { config, endpoint, health, door })
}

fn endpoint(config: &UpstreamConfig, credential: Credential) -> Result<Endpoint, EndpointError> {
    let (organization, project) = &config.account;
    Endpoint::new(&config.provider, config.base_url.as_deref(), credential)?
        .with_account(organization.as_deref(), project.as_deref())
}
