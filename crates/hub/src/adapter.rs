//! Where adapters come from: a folder or file that is here, or a repository of the hub, fetched as models are.
//!
//! It knows which files make an adapter and nothing of what is in them. Invariant: all files of one adapter are of one
//! commit of its repository.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use crate::{
    FetchOptions, HubError, ModelRef, SharedProgress,
    cache::{Cache, Checked, Trust},
    model_ref::parse_hub,
    source::hub::{Hub, HubRepo, cached_file},
};

/// What makes an adapter of a folder, in the order they are fetched.
const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// Where an adapter lies, as a user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdapterRef {
    /// A folder as peft saves it, or a `.gguf` file; it exists.
    Path(PathBuf),
    /// A repository on the hub.
    Hub {
        /// `org/repo`.
        repo: String,
        /// Branch, tag or commit; None: `main`.
        revision: Option<String>,
        /// A GGUF file of it; None: peft's two files at its top.
        file: Option<String>,
    },
}

impl AdapterRef {
    /// Reads a path or `org/repo[@revision][:file.gguf]`. What begins like a path or exists as one is one.
    ///
    /// # Errors
    /// [`HubError::NoSuchAdapter`] for what is neither.
    pub fn parse(asked: &str) -> Result<Self, HubError> {
        let missing = || HubError::NoSuchAdapter { asked: asked.chars().take(200).collect() };
        if asked.trim().is_empty() || asked.len() > 4096 || asked.contains('\0') {
            return Err(missing());
        }
        let path = match asked.strip_prefix("~/") {
            Some(rest) => dirs::home_dir().ok_or_else(missing)?.join(rest),
            None => PathBuf::from(asked),
        };
        if path.exists() {
            return Ok(Self::Path(path));
        }
        let is_path = ["/", "./", "../", "~/"].iter().any(|prefix| asked.starts_with(prefix));
        match parse_hub(asked) {
            Some(ModelRef::Hub { repo, revision, file }) if !is_path => Ok(Self::Hub { repo, revision, file }),
            _ => Err(missing()),
        }
    }
}

impl fmt::Display for AdapterRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Hub { repo, revision, file } => {
                f.write_str(repo)?;
                revision.iter().try_for_each(|revision| write!(f, "@{revision}"))?;
                file.iter().try_for_each(|file| write!(f, ":{file}"))
            }
        }
    }
}

/// Where the adapter's files lie, after fetching what is missing.
///
/// # Errors
/// As [`crate::resolve`]; [`HubError::NoAdapter`] for a repository of something else.
pub async fn resolve_adapter(
    adapter: &AdapterRef,
    options: &FetchOptions,
    progress: &SharedProgress,
) -> Result<PathBuf, HubError> {
    let (repo, file) = match adapter {
        AdapterRef::Path(path) => return Ok(path.clone()),
        AdapterRef::Hub { repo, revision, file } => (HubRepo { repo, revision: revision.as_deref() }, file.as_deref()),
    };
    let cache = Cache::new(&options.cache_dir);
    if let Some(path) = cached(repo, file, &cache, options, progress).await? {
        return Ok(path);
    }
    if options.offline {
        let missing = file.map_or_else(|| FILES.join(" and "), str::to_owned);
        let bring = format!(
            "fetch {missing} of {} on a machine with a network, and give the path of their folder here, or of the file, \
             in its place",
            repo.repo
        );
        return Err(HubError::Offline { model: adapter.to_string(), missing, bring });
    }
    let hub = Hub::open(repo, &cache, options, progress)?;
    if let Some(file) = file {
        return hub.fetch_file(file, None).await.map(|file| file.path);
    }
    let there = hub.list().await?;
    if let Some(why) = what_is_missing(&there) {
        return Err(HubError::NoAdapter { origin: format!("the repository {}", repo.repo), why });
    }
    hub.fetch_folder(FILES[0], &FILES[1..]).await
}

/// Where it lies on this machine, by presence alone; None where it would have to be fetched.
pub fn locate_adapter(adapter: &AdapterRef, options: &FetchOptions) -> Option<PathBuf> {
    match adapter {
        AdapterRef::Path(path) => Some(path.clone()),
        AdapterRef::Hub { repo, revision, file } => {
            let snapshot = HubRepo { repo, revision: revision.as_deref() }.cached_snapshot(options)?;
            match file {
                Some(file) => Some(snapshot.join(file)).filter(|path| path.is_file()),
                None => Some(snapshot).filter(|folder| FILES.iter().all(|file| folder.join(file).is_file())),
            }
        }
    }
}

/// The files in the shared cache, where all are there and good.
async fn cached(
    repo: HubRepo<'_>,
    file: Option<&str>,
    cache: &Cache,
    options: &FetchOptions,
    progress: &SharedProgress,
) -> Result<Option<PathBuf>, HubError> {
    let mut last = None;
    let wanted: Vec<&str> = file.map_or_else(|| FILES.to_vec(), |file| vec![file]);
    for name in wanted {
        let (checked, found) = cached_file(repo, name, None, cache, options, Trust::Records, progress).await?;
        if let Checked::Broken(why) = &checked {
            progress.note(&format!("the cached copy of {name} of {} is broken and is not used: {why}", repo.repo));
        }
        match found {
            Some(found) if checked == Checked::Good => last = Some(found.path),
            _ => return Ok(None),
        }
    }
    Ok(match file {
        Some(_) => last,
        None => last.as_deref().and_then(Path::parent).map(Path::to_owned),
    })
}

fn what_is_missing(there: &[String]) -> Option<String> {
    let has = |name: &str| there.iter().any(|file| file == name);
    if FILES.iter().all(|file| has(file)) {
        None
    } else if has("adapter_config.json") && has("adapter_model.bin") {
        Some("its weights are a pickle (adapter_model.bin), which can run code and is never read; save it as safetensors".to_owned())
    } else {
        let missing = FILES.iter().filter(|file| !has(file)).copied().collect::<Vec<_>>().join(" and ");
        Some(format!("it has no {missing}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_repositories_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path().to_str().unwrap();
        assert_eq!(AdapterRef::parse(here).unwrap(), AdapterRef::Path(folder.path().to_owned()));
        for name in ["org/repo", "org/repo@v1", "org/repo@v1:a.gguf", "org/repo:a.gguf"] {
            let parsed = AdapterRef::parse(name).unwrap();
            assert!(matches!(&parsed, AdapterRef::Hub { repo, .. } if repo == "org/repo"), "{parsed:?}");
            assert_eq!(parsed.to_string(), name);
        }
        for nothing in ["", "./org/repo", "/org/repo", "name", "a/b/c", "org/repo@../x", "~/no-such-adapter-here"] {
            let error = AdapterRef::parse(nothing).unwrap_err();
            assert!(matches!(error, HubError::NoSuchAdapter { .. }), "{nothing}: {error}");
        }
    }
}
