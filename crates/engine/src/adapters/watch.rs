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

use tokio::task::JoinSet;

use super::{
    AdapterError, AdapterPool, AdapterRoots, AdapterSource, AdapterSpec,
    read::{Fingerprint, fingerprint},
};

/// Looks at a folder until the future is dropped. Every folder in it with an adapter_config.json and weights, and every `.gguf` file,
/// is known by its name without the ending, to these tenants (None: to everyone); a dot in front hides it.
///
/// What leads out of the folder and of `roots` by a link is not taken. New versions are read beside the looks: one that waits for a
/// place in memory keeps no other from being seen.
pub async fn watch_folder(
    pool: AdapterPool,
    folder: PathBuf,
    roots: AdapterRoots,
    tenants: Option<Vec<String>>,
    interval: Duration,
) {
    let mut watched = Watched::default();
    let of = Folder { pool, roots: roots.with(&folder), tenants };
    let mut refreshes = JoinSet::new();
    let mut problem = None;
    loop {
        let path = folder.clone();
        let seen = tokio::task::spawn_blocking(move || scan(&path)).await.unwrap_or_else(|_| Ok(BTreeMap::new()));
        match seen {
            Ok(seen) => {
                problem = None;
                for change in watched.look(seen) {
                    of.carry_out(change, &mut refreshes);
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
        while refreshes.try_join_next().is_some() {}
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

/// What is done with what appears in a folder.
struct Folder {
    pool: AdapterPool,
    roots: AdapterRoots,
    tenants: Option<Vec<String>>,
}

impl Folder {
    fn carry_out(&self, change: Change, refreshes: &mut JoinSet<()>) {
        match change {
            // What was unloaded by hand comes back with its next version.
            Change::Changed(name, path) if self.pool.spec(&name).is_none() => self.appeared(&name, &path),
            Change::Appeared(name, path) => self.appeared(&name, &path),
            Change::Changed(name, path) if !self.is_known_from(&name, &path) => {
                tracing::info!(
                    adapter = name,
                    "a new version is not used: the adapter was loaded from elsewhere since"
                );
            }
            // Read when it is asked for.
            Change::Changed(name, _) if !self.pool.is_in_memory(&name) => self.pool.forget_failure(&name),
            Change::Changed(name, _) => {
                let pool = self.pool.clone();
                refreshes.spawn(async move {
                    match pool.refresh(&name).await {
                        Ok(()) => tracing::info!(adapter = name, "an adapter has a new version"),
                        Err(error) => {
                            tracing::warn!(adapter = name, %error, "a new version is not used, the old one stays");
                        }
                    }
                });
            }
            Change::Vanished(name, path) => {
                if self.is_known_from(&name, &path) {
                    let _gone_already = self.pool.forget(&name);
                    tracing::info!(adapter = name, "an adapter vanished");
                }
            }
        }
    }

    fn is_known_from(&self, name: &str, path: &Path) -> bool {
        let is_from = |source| match source {
            AdapterSource::Path(known) | AdapterSource::Confined { path: known, .. } => known == path,
            AdapterSource::Remote { .. } => false,
        };
        self.pool.spec(name).is_some_and(|spec| is_from(spec.source))
    }

    fn appeared(&self, name: &str, path: &Path) {
        let registered = self.roots.source(&path.to_string_lossy()).and_then(|source| {
            let (name, tenants) = (name.to_owned(), self.tenants.clone());
            self.pool.register(AdapterSpec { name, source, tenants, pinned: false })
        });
        match registered {
            Ok(()) => tracing::info!(adapter = name, "an adapter appeared"),
            // Given by name elsewhere: that one counts, with its tenants.
            Err(AdapterError::Exists { .. }) => {}
            Err(error) => tracing::warn!(adapter = name, %error, "an adapter appeared and cannot be used"),
        }
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
                // A file in a folder's place, or the other way round: another adapter under the name.
                Some(before) if before.0 != state.0 => {
                    changes.push(Change::Vanished(name.clone(), before.0));
                    changes.push(Change::Appeared(name.clone(), state.0.clone()));
                }
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
        // A file takes the folder's place.
        fs::remove_dir_all(root.join("a")).unwrap();
        fs::write(root.join("a.gguf"), "x").unwrap();
        assert_eq!(look(), []);
        let is_replaced = [("a", false), ("a.gguf", true)].map(|(file, is_new)| {
            let change = if is_new { Change::Appeared } else { Change::Vanished };
            change("a".into(), root.join(file))
        });
        assert_eq!(look(), is_replaced);
        fs::remove_file(root.join("a.gguf")).unwrap();
        assert_eq!(look(), []);
        assert_eq!(look(), [Change::Vanished("a".into(), root.join("a.gguf"))]);
        fs::write(root.join("half/adapter_model.safetensors"), "one").unwrap();
        assert_eq!(look(), []);
        assert_eq!(look(), [Change::Appeared("half".into(), root.join("half"))], "its weights had not come before");
    }
}
