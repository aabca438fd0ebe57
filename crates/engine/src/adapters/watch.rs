//! A folder in which adapters appear, change and vanish.
//!
//! It is looked at again and again, since notices of changes do not reach across network file systems. An adapter counts once
//! two looks in a row saw the same files: one that is put there whole, by renaming its folder, after one interval; one that is
//! being copied, when the copying has ended. It has vanished once two looks in a row did not see it: to put a folder in another's
//! place takes two renames, and a look may fall between them. It must not know what an adapter is, beyond which files make one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    AdapterError, AdapterPool, AdapterSource, AdapterSpec, Unload,
    read::{Fingerprint, fingerprint},
};

/// Looks at a folder until the future is dropped. Every folder in it with an adapter_config.json and weights, and every `.gguf` file,
/// is known by its name without the ending, to these tenants (None: to everyone); a dot in front hides it.
pub async fn watch_folder(pool: AdapterPool, folder: PathBuf, tenants: Option<Vec<String>>, interval: Duration) {
    let mut watched = Watched::default();
    let mut problem = None;
    loop {
        let path = folder.clone();
        let seen = tokio::task::spawn_blocking(move || scan(&path)).await.unwrap_or_else(|_| Ok(BTreeMap::new()));
        match seen {
            Ok(seen) => {
                problem = None;
                for change in watched.look(seen) {
                    carry_out(&pool, change, tenants.as_deref()).await;
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

async fn carry_out(pool: &AdapterPool, change: Change, tenants: Option<&[String]>) {
    match change {
        // What was unloaded by hand comes back with its next version.
        Change::Changed(name, path) if pool.spec(&name).is_none() => appeared(pool, &name, path, tenants),
        Change::Appeared(name, path) => appeared(pool, &name, path, tenants),
        // Read when it is asked for; or given by another path under this name, and that one counts.
        Change::Changed(name, path) if !is_known_from(pool, &name, &path) || !pool.is_in_memory(&name) => {}
        Change::Changed(name, _) => match pool.refresh(&name).await {
            Ok(()) => tracing::info!(adapter = name, "an adapter has a new version"),
            Err(error) => tracing::warn!(adapter = name, %error, "a new version is not used, the old one stays"),
        },
        Change::Vanished(name, path) => {
            if is_known_from(pool, &name, &path) {
                let _gone_already = pool.unload(&name, Unload::Wait(Some(Duration::ZERO))).await;
                tracing::info!(adapter = name, "an adapter vanished");
            }
        }
    }
}

fn is_known_from(pool: &AdapterPool, name: &str, path: &Path) -> bool {
    let is_from = |source| match source {
        AdapterSource::Path(known) | AdapterSource::Confined { path: known, .. } => known == path,
        AdapterSource::Remote { .. } => false,
    };
    pool.spec(name).is_some_and(|spec| is_from(spec.source))
}

fn appeared(pool: &AdapterPool, name: &str, path: PathBuf, tenants: Option<&[String]>) {
    let (source, tenants) = (AdapterSource::Path(path), tenants.map(<[String]>::to_vec));
    let spec = AdapterSpec { name: name.to_owned(), source, tenants, pinned: false };
    match pool.register(spec) {
        Ok(()) => tracing::info!(adapter = name, "an adapter appeared"),
        // Given by name elsewhere: that one counts, with its tenants.
        Err(AdapterError::Exists { .. }) => {}
        Err(error) => tracing::warn!(adapter = name, %error, "an adapter appeared and cannot be used"),
    }
}

/// What a look found.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    Appeared(String, PathBuf),
    Changed(String, PathBuf),
    Vanished(String, PathBuf),
}

/// What earlier looks found.
#[derive(Debug, Default)]
struct Watched {
    /// As the last look saw them.
    last: BTreeMap<String, (PathBuf, Fingerprint)>,
    /// As they are known to the pool.
    known: BTreeMap<String, (PathBuf, Fingerprint)>,
    /// Known, and not seen by the last look.
    missed: BTreeSet<String>,
}

impl Watched {
    fn look(&mut self, seen: BTreeMap<String, (PathBuf, Fingerprint)>) -> Vec<Change> {
        let mut changes = Vec::new();
        let missed_before = std::mem::take(&mut self.missed);
        self.known.retain(|name, (path, _)| {
            let is_there = seen.contains_key(name);
            let has_vanished = !is_there && missed_before.contains(name);
            if has_vanished {
                changes.push(Change::Vanished(name.clone(), path.clone()));
            } else if !is_there {
                self.missed.insert(name.clone());
            }
            !has_vanished
        });
        for (name, state) in &seen {
            if self.last.get(name) != Some(state) {
                continue;
            }
            match self.known.insert(name.clone(), state.clone()) {
                None => changes.push(Change::Appeared(name.clone(), state.0.clone())),
                Some(before) if before != *state => changes.push(Change::Changed(name.clone(), state.0.clone())),
                Some(_) => {}
            }
        }
        self.last = seen;
        changes
    }
}

/// A config alone is one whose weights are still being copied.
fn is_whole_folder(path: &Path) -> bool {
    let has = |name: &str| path.join(name).is_file();
    has("adapter_config.json") && (has("adapter_model.safetensors") || has("adapter_model.bin"))
}

fn scan(folder: &Path) -> io::Result<BTreeMap<String, (PathBuf, Fingerprint)>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let is_gguf = path.extension().is_some_and(|extension| extension == "gguf");
        let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
        let Some(name) = name.and_then(|name| name.to_str()).filter(|name| !name.starts_with('.')) else { continue };
        if !(is_whole_folder(&path) || is_gguf && path.is_file()) {
            continue;
        }
        // What vanishes between two calls is seen at the next look.
        if let Ok(fingerprint) = fingerprint(&path) {
            found.insert(name.to_owned(), (path, fingerprint));
        }
    }
    Ok(found)
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
        fs::create_dir(root.join("half")).unwrap();
        fs::write(root.join("half/adapter_config.json"), "{}").unwrap();
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
        assert_eq!(look(), [Change::Changed("a".into(), root.join("a"))]);
        // A look between the two renames.
        write(&root.join(".a-newer"), "three");
        fs::rename(root.join("a"), root.join(".a-older")).unwrap();
        assert_eq!(look(), [], "the name stays");
        fs::rename(root.join(".a-newer"), root.join("a")).unwrap();
        assert_eq!(look(), []);
        assert_eq!(look(), [Change::Changed("a".into(), root.join("a"))]);
        fs::remove_dir_all(root.join("a")).unwrap();
        assert_eq!(look(), []);
        assert_eq!(look(), [Change::Vanished("a".into(), root.join("a"))]);
        fs::write(root.join("half/adapter_model.safetensors"), "one").unwrap();
        assert_eq!(look(), []);
        assert_eq!(look(), [Change::Appeared("half".into(), root.join("half"))], "its weights had not come before");
    }
}
