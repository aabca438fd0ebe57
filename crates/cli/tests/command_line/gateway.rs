//! What the gateway's verbs are tested on: a folder with a config file, and its store opened beside the binary.

use std::time::Duration;

use bindery_gateway::store::{Durability, Store, StoreOptions, StoreThread};

use crate::support::{Ended, bindery};

/// A folder with a config file, gone with the value.
pub(crate) struct Home {
    pub(crate) folder: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

impl Home {
    pub(crate) fn new(config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("bindery.toml"), config).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Self { folder, runtime }
    }

    /// Runs the binary with this config.
    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        self.run_in(arguments, &[])
    }

    pub(crate) fn run_in(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Ended {
        let mut command = bindery(self.folder.path());
        command.env("BINDERY_CONFIG", "bindery.toml").args(arguments).envs(environment.iter().copied());
        command.output().unwrap().into()
    }

    /// Works on the store as a server would, and closes it.
    pub(crate) fn in_store<T, F: Future<Output = T>>(&self, work: impl FnOnce(Store) -> F) -> T {
        let url = format!("sqlite://{}/bindery.db", self.folder.path().display());
        let options = StoreOptions {
            url: url.parse().unwrap(),
            durability: Durability::ProcessKill,
            max_bytes: None,
            max_waiting: 16,
            timeout: Duration::from_secs(20),
        };
        let (store, thread): (Store, StoreThread) = self.runtime.block_on(Store::open(options)).unwrap();
        let done = self.runtime.block_on(work(store));
        thread.join();
        done
    }
}
