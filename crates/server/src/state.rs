//! What all requests share.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::sync::Semaphore;

use crate::{
    auth::ApiKeys,
    config::{Limits, ServerConfig},
    judge::HouseJudge,
    lifecycle::Lifecycle,
    metrics::Metrics,
    slot::ModelSlot,
};

/// Cheap to clone.
pub(crate) type SharedState = Arc<AppState>;

/// What all requests share.
pub(crate) struct AppState {
    pub(crate) config: ServerConfig,
    pub(crate) limits: Limits,
    pub(crate) slot: ModelSlot,
    pub(crate) keys: ApiKeys,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) metrics: Metrics,
    /// Turns at long jobs on blocking threads, by kind.
    pub(crate) turns: Turns,
    /// Unix seconds.
    pub(crate) started_at: u64,
}

impl AppState {
    pub(crate) fn new(config: ServerConfig, limits: Limits, slot: ModelSlot) -> SharedState {
        let state = Arc::new(Self {
            keys: ApiKeys::new(&config.api_keys, &config.tenants, config.admin_key.as_ref()),
            metrics: Metrics::new(config.primary_model_name()),
            turns: Turns::new(limits.max_blocking_jobs),
            lifecycle: Arc::new(Lifecycle::new()),
            started_at: unix_seconds(),
            config,
            limits,
            slot,
        });
        if let Some(gateway) = &state.config.gateway {
            gateway.set_local_judge(Arc::new(HouseJudge::new(&state)));
        }
        state
    }

    /// Runs a long job on a blocking thread, when its turn comes. `None`: it panicked.
    pub(crate) async fn run_blocking<T: Send + 'static>(
        &self,
        kind: Job,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let turn = Arc::clone(self.turns.of(kind)).acquire_owned().await.ok()?;
        tokio::task::spawn_blocking(move || {
            let _turn = turn;
            job()
        })
        .await
        .ok()
    }
}

/// What takes its time in proportion to what a client sent. Each kind has turns of its own: texts that are slow to
/// tokenise hold up no body that wants to be parsed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Job {
    /// A large body.
    Parse,
    /// A conversation through its template.
    Render,
    /// A text to tokens, or back.
    Tokenize,
}

/// See [`Job`].
#[derive(Debug)]
pub(crate) struct Turns {
    parse: Arc<Semaphore>,
    render: Arc<Semaphore>,
    tokenize: Arc<Semaphore>,
}

impl Turns {
    fn new(max_blocking_jobs: usize) -> Self {
        let turns = || Arc::new(Semaphore::new(max_blocking_jobs));
        Self { parse: turns(), render: turns(), tokenize: turns() }
    }

    fn of(&self, kind: Job) -> &Arc<Semaphore> {
        match kind {
            Job::Parse => &self.parse,
            Job::Render => &self.render,
            Job::Tokenize => &self.tokenize,
        }
    }
}

/// Now, for `created`.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
