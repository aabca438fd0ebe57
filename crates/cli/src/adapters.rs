//! The adapters that a server starts with: from flags and config file to names in the model's pool.
//!
//! What can be refused without a model is refused in [`AdapterSettings::resolve`], for `serve` and `check` alike; what takes
//! the files, when they are read. It must not know HTTP. Invariant: a name is given once, and where it was given is told with
//! whatever is wrong about it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bindery_engine::{
    AdapterPool, AdapterPoolConfig,
    adapters::{AdapterFolder, AdapterRoots, AdapterSource, AdapterSpec, Fetch, IsTaken, adapters_in, check_name},
};
use bindery_gateway::config::TenantConfig;
use bindery_hub::{AdapterRef, FetchOptions, HubError, NoProgress, SharedProgress, resolve_adapter};
use bindery_server::Tenant;
use tokio::task::JoinHandle;

use crate::{
    args::AdapterArgs,
    config::tables::{AdapterTable, FileTables, FolderTable},
    failure::Failure,
};

/// How often a watched folder is looked at.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// All about adapters that `serve` is told.
#[derive(Clone, Default)]
pub(crate) struct AdapterSettings {
    pub(crate) adapters: Vec<NamedAdapter>,
    pub(crate) folders: Vec<GivenFolder>,
    pub(crate) roots: AdapterRoots,
    pub(crate) tenants: Vec<Tenant>,
}

/// An adapter that is known by its name from the start.
#[derive(Clone, Debug)]
pub(crate) struct NamedAdapter {
    pub(crate) name: String,
    pub(crate) source: AdapterRef,
    pub(crate) tenants: Option<Vec<String>>,
    pub(crate) pinned: bool,
    pub(crate) read: ReadWhen,
    /// Where it was given: a flag, or file and line.
    origin: String,
}

/// When an adapter is read first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadWhen {
    AtStart,
    FirstAskedFor,
}

/// `[adapter_dir]`
#[derive(Clone, Debug)]
pub(crate) struct GivenFolder {
    pub(crate) path: PathBuf,
    pub(crate) watch: bool,
    pub(crate) tenants: Option<Vec<String>>,
}

impl GivenFolder {
    /// What is in it now, by name. Blocking.
    pub(crate) fn adapters(&self) -> Result<Vec<(String, PathBuf)>, Failure> {
        adapters_in(&self.path).map_err(|error| self.unreadable(&error))
    }

    fn unreadable(&self, error: &std::io::Error) -> Failure {
        Failure::new(format!("cannot read the adapters' folder {}: {error}", self.path.display()))
            .hint("let the server's user read it, or correct path in [adapter_dir]")
    }
}

impl AdapterSettings {
    /// `config`: the file that the tables are from.
    pub(crate) fn resolve(
        flags: &AdapterArgs,
        tables: FileTables,
        config: Option<&Path>,
        limits: &AdapterPoolConfig,
    ) -> Result<Self, Failure> {
        let at = |line: usize| config.map_or_else(String::new, |path| format!("{}:{line}", path.display()));
        let mut adapters: Vec<NamedAdapter> = Vec::new();
        let given = flags.all().map(|arg| {
            let origin = format!("--adapter {}={}", arg.name, arg.source);
            check_name(&arg.name).map_err(|error| Failure::usage(format!("{origin}: {error}")))?;
            let source = source_of(&arg.source, &origin)?;
            let (name, read) = (arg.name.clone(), ReadWhen::AtStart);
            Ok(NamedAdapter { name, source, tenants: None, pinned: false, read, origin })
        });
        let configured = tables.adapters.into_iter().map(|table| {
            let AdapterTable { line, name, source, tenants, pinned } = table;
            let (origin, read) = (at(line), if pinned { ReadWhen::AtStart } else { ReadWhen::FirstAskedFor });
            let source = source_of(&source, &origin)?;
            Ok(NamedAdapter { name, source, tenants, pinned, read, origin })
        });
        for adapter in given.chain(configured) {
            let adapter: NamedAdapter = adapter?;
            if let Some(other) = adapters.iter().find(|other| other.name == adapter.name) {
                let (name, first, second) = (&adapter.name, &other.origin, &adapter.origin);
                return Err(Failure::usage(format!("the adapter {name:?} is given twice: by {first} and by {second}"))
                    .hint("give each a name of its own, or leave one out"));
            }
            adapters.push(adapter);
        }
        let pinned: Vec<&NamedAdapter> = adapters.iter().filter(|adapter| adapter.pinned).collect();
        if let Some(first) = pinned.get(limits.max_loras) {
            let (origin, count, max_loras) = (&first.origin, pinned.len(), limits.max_loras);
            return Err(Failure::usage(format!("{origin}: {count} adapters are pinned and max_loras is {max_loras}"))
                .hint("pin fewer, or raise --max-loras"));
        }
        let folders: Vec<GivenFolder> =
            tables.folders.into_iter().map(|table| folder_of(table, at)).collect::<Result<_, _>>()?;
        let roots = roots(&flags.adapter_root, &adapters, &folders)?;
        let line =
            |name: &str| tables.tenants.iter().find(|tenant| tenant.name == name).map_or(1, |tenant| tenant.line);
        let configured = tables.gateway.iter().flat_map(|gateway| &gateway.tenants);
        let tenants =
            configured.map(|tenant| tenant_of(tenant, &at(line(tenant.id.as_str())))).collect::<Result<_, _>>()?;
        Ok(Self { adapters, folders, roots, tenants })
    }

    /// Refuses adapters that requests could not name, as the base has their name.
    pub(crate) fn check_names(&self, of_base: &[String]) -> Result<(), Failure> {
        match self.adapters.iter().find(|adapter| of_base.contains(&adapter.name)) {
            None => Ok(()),
            Some(adapter) => Err(Failure::usage(format!(
                "{}: {:?} is the base's own name, so that no request could ask for the adapter",
                adapter.origin, adapter.name
            ))
            .hint("give the adapter another name, or the base one with --served-model-name")),
        }
    }

    /// What is in the folders now, without names that are taken: by an adapter given by name, or by an earlier folder.
    pub(crate) fn in_folders(&self) -> anyhow::Result<Vec<(String, PathBuf, &GivenFolder)>> {
        let mut found: Vec<(String, PathBuf, &GivenFolder)> = Vec::new();
        for folder in &self.folders {
            for (name, path) in folder.adapters()? {
                let is_given = self.adapters.iter().any(|adapter| adapter.name == name);
                if !is_given && found.iter().all(|(other, ..)| *other != name) {
                    found.push((name, path, folder));
                }
            }
        }
        Ok(found)
    }

    /// Brings those that are read at the start to this machine, so that a hub that cannot be reached is told early.
    pub(crate) async fn fetch(&self, options: &FetchOptions, progress: &SharedProgress) -> anyhow::Result<()> {
        for adapter in self.adapters.iter().filter(|adapter| adapter.read == ReadWhen::AtStart) {
            let fetched = Box::pin(resolve_adapter(&adapter.source, options, progress)).await;
            fetched.map_err(|error| {
                anyhow::Error::new(error).context(format!("cannot fetch the adapter {:?}", adapter.name))
            })?;
        }
        Ok(())
    }

    /// Makes the names known to the model, and reads what is to be read at the start. Gives back the folders that are to be watched.
    pub(crate) async fn install(
        &self,
        pool: &AdapterPool,
        options: &FetchOptions,
        is_taken: IsTaken,
    ) -> anyhow::Result<Vec<AdapterFolder>> {
        for adapter in &self.adapters {
            let NamedAdapter { name, source, tenants, pinned, read, .. } = adapter.clone();
            let spec = AdapterSpec { name, source: source_for_pool(source, options), tenants, pinned };
            match read {
                ReadWhen::AtStart => pool.load(spec, false).await?,
                ReadWhen::FirstAskedFor => pool.register(spec)?,
            }
        }
        let mut watched = Vec::new();
        for given in &self.folders {
            let GivenFolder { path, watch, tenants } = given.clone();
            let mut folder = AdapterFolder::new(pool.clone(), path, self.roots.clone(), tenants, Arc::clone(&is_taken));
            folder.install(watch).map_err(|error| given.unreadable(&error))?;
            watched.extend(watch.then_some(folder));
        }
        Ok(watched)
    }
}

/// Looks at folders until it is aborted.
pub(crate) fn watch(folders: Vec<AdapterFolder>) -> Vec<JoinHandle<()>> {
    folders.into_iter().map(|folder| tokio::spawn(folder.watch(WATCH_INTERVAL))).collect()
}

fn source_of(asked: &str, origin: &str) -> Result<AdapterRef, Failure> {
    AdapterRef::parse(asked).map_err(|error| {
        let failure = Failure::usage(format!("{origin}: {error}"));
        match error.hint() {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    })
}

fn folder_of(table: FolderTable, at: impl Fn(usize) -> String) -> Result<GivenFolder, Failure> {
    let FolderTable { line, path, watch, tenants } = table;
    let path = PathBuf::from(path);
    if !path.is_dir() {
        let what = if path.exists() { "is not a folder" } else { "is not there" };
        return Err(Failure::usage(format!("{}: the adapters' folder {} {what}", at(line), path.display()))
            .hint("create it, or correct path in [adapter_dir]"));
    }
    let path = std::path::absolute(&path).unwrap_or(path);
    Ok(GivenFolder { path, watch, tenants })
}

/// The folders that were named, or those that the adapters lie in.
fn roots(given: &[PathBuf], adapters: &[NamedAdapter], watched: &[GivenFolder]) -> Result<AdapterRoots, Failure> {
    if given.is_empty() {
        let parent = |adapter: &NamedAdapter| match &adapter.source {
            AdapterRef::Path(path) => path.canonicalize().ok()?.parent().map(Path::to_owned),
            AdapterRef::Hub { .. } => None,
        };
        let mut folders: Vec<PathBuf> =
            adapters.iter().filter_map(parent).chain(watched.iter().map(|folder| folder.path.clone())).collect();
        folders.sort();
        folders.dedup();
        // They were there a moment ago.
        return Ok(AdapterRoots::new(&folders).0);
    }
    let (roots, problems) = AdapterRoots::new(given);
    match problems.into_iter().next() {
        None => Ok(roots),
        Some(problem) => Err(Failure::usage(format!("--adapter-root: {problem}"))
            .hint("create the folder, or correct --adapter-root (adapter_root in [server])")),
    }
}

/// Whose keys are in the environment; one that has none there may have some in the store.
fn tenant_of(tenant: &TenantConfig, place: &str) -> Result<Tenant, Failure> {
    let name = tenant.id.as_str();
    let Some(variable) = &tenant.api_key_env else {
        return Ok(Tenant { name: name.to_owned(), api_keys: Vec::new() });
    };
    let refuse = |what: &str| {
        Err(Failure::usage(format!(
            "{place}: the tenant {name:?} has no key: the environment variable {variable} {what}"
        ))
        .hint(format!("put the tenant's key into {variable}, or several with commas between")))
    };
    let Ok(held) = std::env::var(variable) else { return refuse("is not set, or no text") };
    let api_keys: Vec<String> = held.split(',').map(|key| key.trim().to_owned()).collect();
    if api_keys.iter().any(String::is_empty) {
        return refuse("is empty, or has an empty key among its keys");
    }
    Ok(Tenant { name: name.to_owned(), api_keys })
}

/// Adapters of the hub are fetched on the blocking thread that reads them, when they are asked for.
fn source_for_pool(source: AdapterRef, options: &FetchOptions) -> AdapterSource {
    if let AdapterRef::Path(path) = source {
        return AdapterSource::Path(path);
    }
    let (name, options, runtime) = (source.to_string(), options.clone(), tokio::runtime::Handle::current());
    let fetch: Fetch = Arc::new(move || {
        let progress: SharedProgress = Arc::new(NoProgress);
        let fetched = runtime.block_on(Box::pin(resolve_adapter(&source, &options, &progress)));
        fetched.map_err(|error| with_hint(&error))
    });
    AdapterSource::Remote { name, fetch }
}

fn with_hint(error: &HubError) -> String {
    match error.hint() {
        Some(hint) => format!("{error}; {hint}"),
        None => error.to_string(),
    }
}
