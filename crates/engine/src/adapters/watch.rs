//! A folder in which adapters appear, change and vanish.
//!
//! It is looked at again and again, since notices of changes do not reach across network file systems. An adapter that is put
//! there whole, by renaming its folder or file, counts once two looks in a row saw the same; one that changes where it lies, once
//! nothing of it has changed for [`QUIET`], since whoever copies file by file may pause between two that belong together. The
//! pool reads its files in no other state than the one that counted last, so that half of a version is never used, whoever asks
//! when. It has vanished once two looks in a row did not see it: to put a folder in another's place takes two renames, and a look
//! may fall between them. It must not know what an adapter is, beyond which files make one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::task::JoinSet;

use super::{
    AdapterError, AdapterPool, AdapterRoots, AdapterSpec,
    read::{Fingerprint, fingerprint},
};

/// How long an adapter that changes where it lies has to have been left alone.
const QUIET: Duration = Duration::from_secs(10);

/// Whether something else has a name, so that no request for it would reach an adapter.
pub type IsTaken = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// A folder whose adapters are known to a pool. Every folder in it with an adapter_config.json and weights, and every `.gguf` file,
/// is known by its name without the ending; a dot in front hides it. A name that is known already stays what it is.
pub struct AdapterFolder {
    pool: AdapterPool,
    path: PathBuf,
    roots: AdapterRoots,
    tenants: Option<Vec<String>>,
    is_taken: IsTaken,
    watched: Watched,
    /// Names here that an adapter from elsewhere had: they are tried again when that is gone.
    shadowed: BTreeSet<String>,
    /// Names here that were given by name, to others or pinned: unloaded by hand, they do not come back for whom the folder is.
    given: BTreeSet<String>,
}

/// What a folder had in it now: names and places, in the order of the names. Blocking.
///
/// # Errors
/// Where the folder cannot be read.
pub fn adapters_in(folder: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let whole = scan(folder)?.into_iter().filter(|(_, seen)| seen.is_whole);
    Ok(whole.map(|(name, seen)| (name, seen.path)).collect())
}

impl AdapterFolder {
    /// A folder whose adapters are for these tenants (None: for everyone), of which the pool knows nothing yet. What leads out of it
    /// and of `roots` by a link is not taken.
    pub fn new(
        pool: AdapterPool,
        path: PathBuf,
        roots: AdapterRoots,
        tenants: Option<Vec<String>>,
        is_taken: IsTaken,
    ) -> Self {
        let roots = roots.with(&path);
        Self {
            pool,
            path,
            roots,
            tenants,
            is_taken,
            watched: Watched::default(),
            shadowed: BTreeSet::new(),
            given: BTreeSet::new(),
        }
    }

    /// Makes known what is there now; where it will be watched, its files are read in this state alone until [`Self::watch`] sees
    /// another. Blocking.
    ///
    /// # Errors
    /// Where the folder cannot be read.
    pub fn install(&mut self, is_watched: bool) -> io::Result<()> {
        self.watched = Watched::from_first(scan(&self.path)?, Instant::now());
        let names: Vec<String> = self.watched.known.keys().cloned().collect();
        for name in names {
            self.make_known(&name, is_watched);
        }
        self.note_given();
        if is_watched {
            // Also what was given by name and lies here.
            self.pool.settle(self.watched.known.iter());
        }
        Ok(())
    }

    /// Looks at it until the future is dropped. New versions are read beside the looks: one that waits for a place in memory keeps no
    /// other from being seen.
    pub async fn watch(mut self, interval: Duration) {
        let mut refreshes = JoinSet::new();
        let mut problem = None;
        loop {
            let path = self.path.clone();
            let seen = tokio::task::spawn_blocking(move || scan(&path)).await;
            match seen.unwrap_or_else(|_| Err(io::Error::other("looking at it failed"))) {
                Ok(seen) => {
                    problem = None;
                    self.look(seen, &mut refreshes);
                }
                Err(error) => {
                    // Said once, not with every look.
                    let text = error.to_string();
                    if problem.as_ref() != Some(&text) {
                        tracing::warn!(folder = %self.path.display(), error = text, "the adapters' folder cannot be read");
                        problem = Some(text);
                    }
                }
            }
            while refreshes.try_join_next().is_some() {}
            tokio::time::sleep(interval).await;
        }
    }

    fn look(&mut self, seen: BTreeMap<String, Seen>, refreshes: &mut JoinSet<()>) {
        for change in self.watched.look(seen, Instant::now()) {
            self.carry_out(change, refreshes);
        }
        let free: Vec<String> = self.shadowed.iter().filter(|name| self.pool.spec(name).is_none()).cloned().collect();
        for name in free {
            self.shadowed.remove(&name);
            self.make_known(&name, true);
        }
        self.note_given();
        // All, since one may have been loaded anew by hand meanwhile.
        self.pool.settle(self.watched.known.iter());
    }

    fn note_given(&mut self) {
        let is_given = |(name, (path, _)): &(&String, &(PathBuf, Fingerprint))| {
            self.is_known_from(name, path) && !self.is_as_registered(name, path)
        };
        let given: Vec<String> = self.watched.known.iter().filter(is_given).map(|(name, _)| name.clone()).collect();
        self.given.extend(given);
    }

    fn carry_out(&mut self, change: Change, refreshes: &mut JoinSet<()>) {
        match change {
            // What was unloaded by hand comes back with its next version.
            Change::Changed(name, _) if self.pool.spec(&name).is_none() => self.make_known(&name, true),
            Change::Appeared(name, path) if !self.is_known_from(&name, &path) => self.make_known(&name, true),
            Change::Changed(name, path) if !self.is_known_from(&name, &path) => {
                tracing::info!(
                    adapter = name,
                    "a new version is not used: the adapter was loaded from elsewhere since"
                );
            }
            // Read when it is asked for.
            Change::Changed(name, _) | Change::Appeared(name, _) if !self.pool.is_in_memory(&name) => {
                self.pool.forget_failure(&name);
            }
            Change::Changed(name, _) | Change::Appeared(name, _) => {
                // Its state is settled at the end of the look, which the reading waits for.
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
                self.shadowed.remove(&name);
                if self.pool.spec(&name).is_none() {
                    self.given.remove(&name);
                }
                if self.is_as_registered(&name, &path) {
                    let _gone_already = self.pool.forget(&name);
                    tracing::info!(adapter = name, "an adapter vanished");
                } else {
                    // Given by name, to others perhaps: whose it is must not be forgotten.
                    self.pool.unsettle(&name, &path);
                }
            }
        }
    }

    /// Whether the name is known as it would be from here: it may be forgotten and come back.
    fn is_as_registered(&self, name: &str, path: &Path) -> bool {
        let is_ours = |spec: &AdapterSpec| spec.tenants == self.tenants && !spec.pinned;
        self.pool.spec(name).is_some_and(|spec| spec.source.path() == Some(path) && is_ours(&spec))
    }

    fn make_known(&mut self, name: &str, is_watched: bool) {
        let Some((path, files)) = self.watched.known.get(name) else { return };
        if self.given.contains(name) {
            tracing::info!(
                adapter = name,
                "a new version is not used: the adapter was given by name, and unloaded by hand"
            );
            return;
        }
        if self.appeared(name, path, is_watched.then_some(files)) == Appearance::Shadowed {
            self.shadowed.insert(name.to_owned());
        }
    }

    fn is_known_from(&self, name: &str, path: &Path) -> bool {
        self.pool.spec(name).is_some_and(|spec| spec.source.path() == Some(path))
    }

    fn appeared(&self, name: &str, path: &Path, settled: Option<&Fingerprint>) -> Appearance {
        if (self.is_taken)(name) {
            tracing::warn!(
                adapter = name,
                path = %path.display(),
                "an adapter is not used: its name is that of the base or of a model elsewhere; give its folder or file another"
            );
            return Appearance::Done;
        }
        let registered = self.roots.source(&path.to_string_lossy()).and_then(|source| {
            let (name, tenants) = (name.to_owned(), self.tenants.clone());
            self.pool.register_settled(AdapterSpec { name, source, tenants, pinned: false }, path, settled)
        });
        match registered {
            Ok(()) => tracing::info!(adapter = name, "an adapter appeared"),
            // Given by name: that one counts, with its tenants.
            Err(AdapterError::Exists { .. }) if self.is_known_from(name, path) => {}
            // Likewise, or in an earlier folder.
            Err(AdapterError::Exists { .. }) => return Appearance::Shadowed,
            Err(error) => tracing::warn!(adapter = name, %error, "an adapter appeared and cannot be used"),
        }
        Appearance::Done
    }
}

/// What became of an adapter that appeared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Appearance {
    Done,
    /// Something else has its name.
    Shadowed,
}

/// What a look found.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    Appeared(String, PathBuf),
    Changed(String, PathBuf),
    Vanished(String, PathBuf),
}

/// An adapter, or what may become one, as a look saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    path: PathBuf,
    files: Fingerprint,
    /// A config alone is one whose weights are still being copied.
    is_whole: bool,
}

impl Seen {
    /// Whether it lies where that lay and has become something else: file by file, not put there as a whole.
    fn grew_out_of(&self, path: &Path, files: &Fingerprint) -> bool {
        self.path == path && self.files.is_in_place_of(files) && self.files != *files
    }
}

/// What the last look saw, and since when it has been like that.
#[derive(Debug)]
struct Last {
    seen: Seen,
    since: Instant,
    /// It changes where it lies: it counts after [`QUIET`].
    is_growing: bool,
}

/// What earlier looks found.
#[derive(Debug, Default)]
struct Watched {
    last: BTreeMap<String, Last>,
    /// As they are known to the pool.
    known: BTreeMap<String, (PathBuf, Fingerprint)>,
    /// Known, and not seen by the last look.
    missed: BTreeSet<String>,
}

impl Watched {
    /// What is whole counts at once.
    fn from_first(seen: BTreeMap<String, Seen>, now: Instant) -> Self {
        let whole = seen.iter().filter(|(_, seen)| seen.is_whole);
        let known = whole.map(|(name, seen)| (name.clone(), (seen.path.clone(), seen.files.clone()))).collect();
        let last = seen.into_iter().map(|(name, seen)| (name, Last { seen, since: now, is_growing: false })).collect();
        Self { last, known, missed: BTreeSet::new() }
    }

    fn look(&mut self, seen: BTreeMap<String, Seen>, now: Instant) -> Vec<Change> {
        let mut changes = self.vanished(&seen);
        let mut before = std::mem::take(&mut self.last);
        for (name, seen) in seen {
            let before = before.remove(&name);
            if let Some(last) = before.as_ref().filter(|last| last.seen == seen) {
                if last.is_at_rest(now) {
                    changes.extend(self.settle(&name, &seen));
                }
                self.last.extend(before.map(|last| (name, last)));
                continue;
            }
            let is_growing = match &before {
                Some(last) => seen.grew_out_of(&last.seen.path, &last.seen.files),
                // The last look missed it.
                None => self.known.get(&name).is_some_and(|(path, files)| seen.grew_out_of(path, files)),
            };
            self.last.insert(name, Last { seen, since: now, is_growing });
        }
        changes
    }

    fn vanished(&mut self, seen: &BTreeMap<String, Seen>) -> Vec<Change> {
        let mut changes = Vec::new();
        let missed_before = std::mem::take(&mut self.missed);
        self.known.retain(|name, (path, _)| {
            let is_there = seen.get(name).is_some_and(|seen| seen.is_whole);
            let has_vanished = !is_there && missed_before.contains(name);
            if has_vanished {
                changes.push(Change::Vanished(name.clone(), path.clone()));
            } else if !is_there {
                self.missed.insert(name.clone());
            }
            !has_vanished
        });
        changes
    }

    /// What is news of what came to rest.
    fn settle(&mut self, name: &str, seen: &Seen) -> Vec<Change> {
        let (name, path) = (name.to_owned(), seen.path.clone());
        match self.known.insert(name.clone(), (path.clone(), seen.files.clone())) {
            None => vec![Change::Appeared(name, path)],
            // A file in a folder's place, or the other way round: another adapter under the name.
            Some((before, _)) if before != path => {
                vec![Change::Vanished(name.clone(), before), Change::Appeared(name, path)]
            }
            Some((_, files)) if files != seen.files => vec![Change::Changed(name, path)],
            Some(_) => Vec::new(),
        }
    }
}

impl Last {
    /// Seen a second time.
    fn is_at_rest(&self, now: Instant) -> bool {
        self.seen.is_whole && (!self.is_growing || now.saturating_duration_since(self.since) >= QUIET)
    }
}

fn is_whole_folder(path: &Path) -> bool {
    let has = |name: &str| path.join(name).is_file();
    has("adapter_config.json") && (has("adapter_model.safetensors") || has("adapter_model.bin"))
}

fn scan(folder: &Path) -> io::Result<BTreeMap<String, Seen>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let is_folder = path.is_dir();
        let is_file = !is_folder && path.extension().is_some_and(|extension| extension == "gguf") && path.is_file();
        let name = if is_folder { path.file_name() } else { path.file_stem() };
        let Some(name) = name.and_then(|name| name.to_str()).filter(|name| !name.starts_with('.')) else { continue };
        if !is_folder && !is_file {
            continue;
        }
        let is_whole = is_file || is_whole_folder(&path);
        // What vanishes between two calls is seen at the next look.
        let Ok(files) = fingerprint(&path) else { continue };
        let name = name.to_owned();
        // Of two with one name what is an adapter, of two adapters the folder.
        let comes_before = |other: &Seen| is_whole && (is_folder || !other.is_whole);
        if found.get(&name).is_none_or(comes_before) {
            found.insert(name, Seen { path, files, is_whole });
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
        let start = Instant::now();
        let mut looks = 0;
        // One every second.
        let mut look = || {
            looks += 1;
            watched.look(scan(root).unwrap(), start + Duration::from_secs(looks))
        };
        assert_eq!(look(), []);
        write(&root.join("a"), "one");
        write(&root.join(".hidden"), "one");
        fs::write(root.join("notes.txt"), "no adapter").unwrap();
        fs::create_dir(root.join("empty")).unwrap();
        fs::create_dir(root.join("half")).unwrap();
        fs::write(root.join("half/adapter_config.json"), "{}").unwrap();
        fs::write(root.join("b.gguf"), "x").unwrap();
        assert_eq!(look(), [], "it may still be growing");
        fs::write(root.join(".b.gguf"), "xx").unwrap();
        fs::rename(root.join(".b.gguf"), root.join("b.gguf")).unwrap();
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
        let mut later = Vec::new();
        for _ in 0..=QUIET.as_secs() {
            later.extend(look());
        }
        assert_eq!(later, [Change::Appeared("half".into(), root.join("half"))], "its weights had not come before");
    }

    #[test]
    fn what_changes_where_it_lies_counts_when_it_has_been_left_alone() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path();
        let path = root.join("a");
        write(&path, "old");
        let start = Instant::now();
        let mut watched = Watched::from_first(scan(root).unwrap(), start);
        let settled = |watched: &Watched| watched.known["a"].1.clone();
        let old = settled(&watched);
        assert_eq!(old, fingerprint(&path).unwrap());
        let mut at = |seconds| {
            let changes = watched.look(scan(root).unwrap(), start + Duration::from_secs(seconds));
            (changes, settled(&watched))
        };
        // One file, a pause, the other, as `cp` does beside a slow disk.
        fs::write(path.join("adapter_config.json"), "{ }").unwrap();
        for second in 1..10 {
            assert_eq!(at(second), (vec![], old.clone()), "half of it is new");
        }
        fs::write(path.join("adapter_model.safetensors"), "newer").unwrap();
        for second in 10..20 {
            assert_eq!(at(second), (vec![], old.clone()), "there may be more to come");
        }
        let new = fingerprint(&path).unwrap();
        assert_eq!(at(20), (vec![Change::Changed("a".into(), path.clone())], new.clone()));
        // File by file, each put there whole: the folder still is the same.
        fs::write(path.join("new"), "{  }").unwrap();
        fs::rename(path.join("new"), path.join("adapter_config.json")).unwrap();
        assert_eq!(at(21), (vec![], new.clone()));
        assert_eq!(at(30), (vec![], new));
        // Another folder in its place ends the waiting.
        write(&root.join(".b"), "newest");
        fs::rename(&path, root.join(".old")).unwrap();
        fs::rename(root.join(".b"), &path).unwrap();
        assert_eq!(at(31).0, []);
        assert_eq!(at(32), (vec![Change::Changed("a".into(), path.clone())], fingerprint(&path).unwrap()));
    }
}
