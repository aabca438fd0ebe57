//! What all requests share.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::sync::Semaphore;

use crate::{
    auth::ApiKeys,
    config::{Limits, ServerConfig},
    error::ApiError,
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
    /// Who may run a long job on a blocking thread.
    pub(crate) blocking_jobs: Arc<Semaphore>,
    /// Unix seconds.
    pub(crate) started_at: u64,
}

impl AppState {
    pub(crate) fn new(config: ServerConfig, limits: Limits, slot: ModelSlot) -> SharedState {
        Arc::new(Self {
            keys: ApiKeys::new(&config.api_keys),
            metrics: Metrics::new(config.primary_model_name()),
            blocking_jobs: Arc::new(Semaphore::new(limits.max_blocking_jobs)),
            lifecycle: Arc::new(Lifecycle::new()),
            started_at: unix_seconds(),
            config,
            limits,
            slot,
        })
    }

    /// The name a request is answered under: the one it asked for, or the first where it named none.
    pub(crate) fn resolve_model(&self, asked: Option<String>) -> Result<String, ApiError> {
        match asked {
            None => Ok(self.config.primary_model_name().to_owned()),
            Some(name) if self.config.served_model_names.contains(&name) => Ok(name),
            Some(asked) => Err(ApiError::UnknownModel { asked, offered: self.config.served_model_names.clone() }),
        }
    }

    /// Runs a long job on a blocking thread, when its turn comes. `None`: it panicked.
    pub(crate) async fn run_blocking<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let turn = Arc::clone(&self.blocking_jobs).acquire_owned().await.ok()?;
        tokio::task::spawn_blocking(move || {
            let _turn = turn;
            job()
        })
        .await
        .ok()
    }
}

/// Now, for `created`.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
