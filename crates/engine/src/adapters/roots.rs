//! Where adapters may be read from when a request to load one names a path.
//!
//! Paths are followed to where they really lead, symbolic links and all, before they are compared; and the files inside are,
//! too. It must not know who asks.

use std::path::{Path, PathBuf};

use super::{AdapterError, AdapterSource, read};

/// Folders, as they really are.
#[derive(Clone, Debug, Default)]
pub struct AdapterRoots {
    roots: Vec<PathBuf>,
}

impl AdapterRoots {
    /// Folders that exist; the others are left out and given back with the reason.
    pub fn new(folders: &[PathBuf]) -> (Self, Vec<String>) {
        let (mut roots, mut problems) = (Vec::new(), Vec::new());
        for folder in folders {
            match folder.canonicalize() {
                Ok(root) if root.is_dir() => roots.push(root),
                Ok(_) => problems.push(format!("{} is not a folder", folder.display())),
                Err(error) => problems.push(format!("{}: {error}", folder.display())),
            }
        }
        (Self { roots }, problems)
    }

    /// Whether nothing may be read.
    pub fn is_empty(&self) -> bool {
        self.roots.is_empty()
    }

    /// Where a path leads, if that is in one of the folders. A relative one is looked for in each of them. What lies outside and
    /// what does not exist get the same answer, so that nobody learns of files outside.
    ///
    /// # Errors
    /// [`AdapterError::Forbidden`] says where adapters may lie.
    pub fn resolve(&self, asked: &str) -> Result<PathBuf, AdapterError> {
        let path = Path::new(asked);
        let candidates: Vec<PathBuf> = if path.is_absolute() {
            vec![path.to_owned()]
        } else {
            self.roots.iter().map(|root| root.join(path)).collect()
        };
        candidates.iter().find_map(|candidate| self.inside(candidate)).ok_or_else(|| self.refusal(asked))
    }

    /// The same as a source that asks again whenever it is read.
    ///
    /// # Errors
    /// As [`AdapterRoots::resolve`].
    pub fn source(&self, asked: &str) -> Result<AdapterSource, AdapterError> {
        let path = self.resolve(asked)?;
        // A link in a folder is known by its own place.
        let path = if Path::new(asked).is_absolute() { PathBuf::from(asked) } else { path };
        Ok(AdapterSource::Confined { path, asked: asked.to_owned(), roots: self.clone() })
    }

    /// The folders, by their real paths.
    pub(super) fn folders(&self) -> &[PathBuf] {
        &self.roots
    }

    /// These folders and one more, which exists.
    #[must_use]
    pub fn with(mut self, folder: &Path) -> Self {
        self.roots.extend(folder.canonicalize().ok().filter(|root| !self.roots.contains(root)));
        self
    }

    /// The path's real place, where it and the files of an adapter there lie in one of the folders.
    fn inside(&self, path: &Path) -> Option<PathBuf> {
        let real = path.canonicalize().ok()?;
        let is_inside = |path: &Path| self.roots.iter().any(|root| path.starts_with(root) && path != root);
        let files = read::files(&real);
        let all_inside = files.iter().all(|file| file.canonicalize().is_ok_and(|file| is_inside(&file)));
        (is_inside(&real) && all_inside).then_some(real)
    }

    fn refusal(&self, asked: &str) -> AdapterError {
        let roots: Vec<String> = self.roots.iter().map(|root| root.display().to_string()).collect();
        let reason = if roots.is_empty() {
            format!(
                "no adapter may be loaded from {asked:?}: no folder is open to loading at run time; start the server with \
                 --adapter-root DIR"
            )
        } else {
            format!(
                "there is no adapter at {asked:?} in the folders that are open to loading: {}; put it into one of them, or \
                 start the server with another --adapter-root",
                roots.join(", ")
            )
        };
        AdapterError::Forbidden { reason }
    }
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn adapter(folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("adapter_config.json"), "{}").unwrap();
        fs::write(folder.join("adapter_model.safetensors"), "x").unwrap();
    }

    #[test]
    fn only_what_really_lies_in_a_root_is_found() {
        let temp = tempfile::tempdir().unwrap();
        let base = temp.path().canonicalize().unwrap();
        let root = base.join("root");
        adapter(&root.join("good"));
        adapter(&root.join("deep/er"));
        adapter(&base.join("outside"));
        symlink(base.join("outside"), root.join("linked")).unwrap();
        symlink(root.join("good"), base.join("way-in")).unwrap();
        fs::create_dir(root.join("sneaky")).unwrap();
        symlink(base.join("outside/adapter_model.safetensors"), root.join("sneaky/adapter_model.safetensors")).unwrap();
        let (roots, problems) = AdapterRoots::new(&[root.clone(), base.join("missing")]);
        assert_eq!(problems.len(), 1, "{problems:?}");
        let found = |asked: &str| roots.resolve(asked).ok();
        assert_eq!(found("good"), Some(root.join("good")));
        assert_eq!(found("deep/er"), Some(root.join("deep/er")));
        assert_eq!(found(root.join("good").to_str().unwrap()), Some(root.join("good")));
        assert_eq!(found(base.join("way-in").to_str().unwrap()), Some(root.join("good")), "it leads into the root");
        for refused in
            ["../outside", "linked", "sneaky", "missing", "", ".", "good/../..", "/etc", "good/../../outside"]
        {
            let error = roots.resolve(refused).unwrap_err();
            let AdapterError::Forbidden { reason } = error else { panic!("{error:?}") };
            assert!(reason.contains("root"), "{reason}");
        }
        let outside = base.join("outside");
        assert_eq!(found(outside.to_str().unwrap()), None);
    }

    #[test]
    fn without_roots_nothing_is_found_and_the_flag_is_named() {
        let (roots, _) = AdapterRoots::new(&[]);
        assert!(roots.resolve("/tmp").unwrap_err().to_string().contains("--adapter-root"));
    }
}
