//! A folder in which adapters appear, change and vanish.
//!
//! It is looked at again and again, since notices of changes do not reach across network file systems. An adapter counts once
//! two looks in a row saw the same files: one that is put there whole, by renaming its folder, after one interval; one that is
//! being copied, when the copying has ended. It must not know what an adapter is, beyond which files make one.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use super::{AdapterError, AdapterPool, AdapterSource, AdapterSpec, Unload, read};

/// What tells one state of an adapter's files from another: name, length, time of change, and which file it is.
type Fingerprint = Vec<(PathBuf, u64, Option<SystemTime>, u64)>;

/// Looks at a folder until the future is dropped. Every folder in it with an adapter_config.json, and every `.gguf` file,
/// is known by its name without the ending; a dot in front hides it.
pub async fn watch_folder(pool: AdapterPool, folder: PathBuf, interval: Duration) {
    let mut watched = Watched::default();
    let mut problem = None;
    loop {
        let path = folder.clone();
        let seen = tokio::task::spawn_blocking(move || scan(&path)).await.unwrap_or_else(|_| Ok(BTreeMap::new()));
        match seen {
            Ok(seen) => {
                problem = None;
                for change in watched.look(seen) {
                    carry_out(&pool, change).await;
                }
            }
            Err(error) => {
                // Said once, not with every look.
                let text = error.to_string();
                if problem.as_ref() != Some(&text) {
                    tracing::warn!(folder = %folder.display(), error = text, "the adapters' folder cannot be read");
                    problem = Some(text);
                }
            }
        }
        tokio::time::sleep(interval).await;
    }
}

/// What [`watch_folder`] would find in a folder now: names and places, in the order of the names. Blocking.
///
/// # Errors
/// Where the folder cannot be read.
pub fn adapters_in(folder: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    Ok(scan(folder)?.into_iter().map(|(name, (path, _))| (name, path)).collect())
}

async fn carry_out(pool: &AdapterPool, change: Change) {
    match change {
        Change::Appeared(name, path) => {
            let source = AdapterSource::Path(path);
            let spec = AdapterSpec { name: name.clone(), source, tenants: None, pinned: false };
            match pool.register(spec) {
                Ok(()) => tracing::info!(adapter = name, "an adapter appeared"),
                // Given by name elsewhere: that one counts, with its tenants.
                Err(AdapterError::Exists { .. }) => {}
                Err(error) => tracing::warn!(adapter = name, %error, "an adapter appeared and cannot be used"),
            }
        }
        Change::Changed(name) if pool.is_in_memory(&name) => match pool.refresh(&name).await {
            Ok(()) => tracing::info!(adapter = name, "an adapter has a new version"),
            Err(error) => tracing::warn!(adapter = name, %error, "a new version is not used, the old one stays"),
        },
        // Read when it is asked for.
        Change::Changed(_) => {}
        Change::Vanished(name, path) => {
            let is_this = |spec: AdapterSpec| matches!(spec.source, AdapterSource::Path(known) if known == path);
            if pool.spec(&name).is_some_and(is_this) {
                let _gone_already = pool.unload(&name, Unload::Wait(Some(Duration::ZERO))).await;
                tracing::info!(adapter = name, "an adapter vanished");
            }
        }
    }
}

/// What a look found.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    Appeared(String, PathBuf),
    Changed(String),
    Vanished(String, PathBuf),
}

/// What earlier looks found.
#[derive(Debug, Default)]
struct Watched {
    /// As the last look saw them.
    last: BTreeMap<String, (PathBuf, Fingerprint)>,
    /// As they are known to the pool.
    known: BTreeMap<String, (PathBuf, Fingerprint)>,
}

impl Watched {
    fn look(&mut self, seen: BTreeMap<String, (PathBuf, Fingerprint)>) -> Vec<Change> {
        let mut changes = Vec::new();
        self.known.retain(|name, (path, _)| {
            let is_there = seen.contains_key(name);
            if !is_there {
                changes.push(Change::Vanished(name.clone(), path.clone()));
            }
            is_there
        });
        for (name, state) in &seen {
            if self.last.get(name) != Some(state) {
                continue;
            }
            match self.known.insert(name.clone(), state.clone()) {
                None => changes.push(Change::Appeared(name.clone(), state.0.clone())),
                Some(before) if before != *state => changes.push(Change::Changed(name.clone())),
                Some(_) => {}
            }
        }
        self.last = seen;
        changes
    }
}

fn scan(folder: &Path) -> io::Result<BTreeMap<String, (PathBuf, Fingerprint)>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let is_gguf = path.extension().is_some_and(|extension| extension == "gguf");
        let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
        let Some(name) = name.and_then(|name| name.to_str()).filter(|name| !name.starts_with('.')) else { continue };
        if !(path.join("adapter_config.json").is_file() || is_gguf && path.is_file()) {
            continue;
        }
        // What vanishes between two calls is seen at the next look.
        if let Ok(fingerprint) = fingerprint(&path) {
            found.insert(name.to_owned(), (path, fingerprint));
        }
    }
    Ok(found)
}

fn fingerprint(path: &Path) -> io::Result<Fingerprint> {
    let one = |file: PathBuf| {
        let metadata = fs::metadata(&file)?;
        #[cfg(unix)]
        let which = std::os::unix::fs::MetadataExt::ino(&metadata);
        #[cfg(not(unix))]
        let which = 0;
        Ok((file, metadata.len(), metadata.modified().ok(), which))
    };
    read::files(path).into_iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, weights: &str) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("adapter_config.json"), "{}").unwrap();
        fs::write(folder.join("adapter_model.safetensors"), weights).unwrap();
    }

    #[test]
    fn what_stays_the_same_for_two_looks_counts() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path();
        let mut watched = Watched::default();
        let mut look = || watched.look(scan(root).unwrap());
        assert_eq!(look(), []);
        write(&root.join("a"), "one");
        write(&root.join(".hidden"), "one");
        fs::write(root.join("notes.txt"), "no adapter").unwrap();
        fs::create_dir(root.join("empty")).unwrap();
        fs::write(root.join("b.gguf"), "x").unwrap();
        assert_eq!(look(), [], "it may still be growing");
        fs::write(root.join("b.gguf"), "xx").unwrap();
        assert_eq!(look(), [Change::Appeared("a".into(), root.join("a"))]);
        assert_eq!(look(), [Change::Appeared("b".into(), root.join("b.gguf"))]);
        assert_eq!(look(), []);
        // A whole new version by renaming: of the same length, even of the same time.
        write(&root.join(".a-new"), "two");
        fs::rename(root.join("a"), root.join(".a-old")).unwrap();
        fs::rename(root.join(".a-new"), root.join("a")).unwrap();
        assert_eq!(look(), []);
        assert_eq!(look(), [Change::Changed("a".into())]);
        fs::remove_dir_all(root.join("a")).unwrap();
        assert_eq!(look(), [Change::Vanished("a".into(), root.join("a"))]);
        assert_eq!(look(), []);
    }
}
