//! What the verbs of the gateway start from: the config file's tenants, and the store that it names.
//!
//! They work beside a running server, on the same store. It must not serve. Invariant: a store that was opened here is
//! closed before the verb ends, so that what was written is in its file.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bindery_gateway::{
    config::{GatewayConfig, TenantConfig},
    store::{Store, StoreError, StoreOptions, StoreThread},
};
use bindery_hub::card::nearest;

use crate::{
    args::{ConfigArg, ServeArgs},
    config,
    failure::Failure,
};

/// A person waits: long enough for a server's commit, short enough to learn that there is none.
const STORE_TIMEOUT: Duration = Duration::from_secs(10);
/// A verb asks one thing after the other.
const MAX_WAITING: usize = 16;

/// A config file that was read.
pub(crate) struct ConfigFile {
    pub(crate) path: PathBuf,
    pub(crate) gateway: Arc<GatewayConfig>,
    /// All of it, in the form of flags.
    pub(crate) settings: ServeArgs,
}

impl ConfigFile {
    /// The file that was named, which must be.
    pub(crate) fn read(arg: ConfigArg) -> anyhow::Result<Self> {
        let Some(path) = arg.config else {
            return Err(Failure::usage("no config file was named, and this verb works on what one says")
                .hint("give --config FILE, or set BINDERY_CONFIG")
                .into());
        };
        let settings = config::read(&path)?;
        let gateway = settings.tables.gateway.clone();
        let gateway = gateway.ok_or_else(|| Failure::new(format!("{} was not read as a whole", path.display())))?;
        Ok(Self { path, gateway, settings })
    }

    /// The tenant of a name.
    pub(crate) fn tenant(&self, name: &str) -> Result<&TenantConfig, Failure> {
        let tenants = &self.gateway.tenants;
        if let Some(tenant) = tenants.iter().find(|tenant| tenant.id.as_str() == name) {
            return Ok(tenant);
        }
        let shown = self.path.display();
        let known: Vec<&str> = tenants.iter().map(|tenant| tenant.id.as_str()).collect();
        let near = nearest(name, known.iter().copied()).first().map(|near| format!("; did you mean {near:?}?"));
        let message = format!("there is no tenant {name:?} in {shown}{}", near.unwrap_or_default());
        let hint = if known.is_empty() {
            format!("add a [[tenants]] with name = {name:?}; there are none")
        } else {
            format!("the tenants there are: {}", known.join(", "))
        };
        Err(Failure::usage(message).hint(hint))
    }

    /// Opens the store that `[store]` names, for a verb that only reads: one that is not there is not made.
    pub(crate) async fn open_store_to_read(&self) -> anyhow::Result<OpenStore> {
        if let Some(store) = self.gateway.store.as_ref().filter(|store| !store.url.is_there()) {
            return Err(Failure::new(format!("there is no store yet at {}", store.url))
                .hint("`bindery serve` and `bindery keys create` make it; a relative path is taken from the folder that this runs in")
                .into());
        }
        self.open_store().await
    }

    /// Opens the store that `[store]` names, and makes it where there is none.
    pub(crate) async fn open_store(&self) -> anyhow::Result<OpenStore> {
        let Some(store) = self.gateway.store.clone() else {
            return Err(Failure::usage(format!(
                "{} names no store, where keys and costs are kept",
                self.path.display()
            ))
            .hint("add [store] with url = \"sqlite://bindery.db\", or postgres://… for several nodes")
            .into());
        };
        let options = StoreOptions {
            url: store.url,
            durability: store.durability,
            max_bytes: store.max_bytes,
            max_waiting: MAX_WAITING,
            timeout: STORE_TIMEOUT,
        };
        let (store, thread) = Store::open(options).await.map_err(|error| of_store(&error))?;
        Ok(OpenStore { store, thread })
    }
}

/// This machine's name; empty where the system does not tell it there.
pub(crate) fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// A store that a verb has opened.
pub(crate) struct OpenStore {
    pub(crate) store: Store,
    thread: StoreThread,
}

impl OpenStore {
    /// Waits until all is written.
    pub(crate) async fn close(self) -> anyhow::Result<()> {
        drop(self.store);
        Ok(tokio::task::spawn_blocking(|| self.thread.join()).await?)
    }
}

/// With its next step.
pub(crate) fn of_store(error: &StoreError) -> Failure {
    Failure::new(error.to_string()).hint(error.hint())
}
