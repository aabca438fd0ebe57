//! From files to an adapter in memory. Blocking, on threads that may.
//!
//! It knows paths and digests, not what becomes of an adapter. Its invariant: an adapter and its digest are of one state of
//! the files; where those change meanwhile (a folder renamed over), all is read again.

use std::{
    ffi::OsString,
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    time::SystemTime,
};

use bindery_model::{
    Adapter, AdapterLimits, AdapterLoader, ModelError,
    weights::{Within, check_within},
};
use sha2::{Digest, Sha256};

use super::AdapterSource;

/// Makes adapters of files for the model that is being served; doubles of models bring their own.
pub trait ReadAdapter: Send + Sync {
    /// Reads and checks the files at `path`.
    ///
    /// # Errors
    /// Which file, what is wrong, what to do.
    fn read(&self, path: &Path, limits: &AdapterLimits) -> Result<Adapter, ModelError>;
}

impl ReadAdapter for AdapterLoader {
    fn read(&self, path: &Path, limits: &AdapterLimits) -> Result<Adapter, ModelError> {
        self.load(path, limits)
    }
}

/// What was read.
pub(super) struct Loaded {
    pub(super) adapter: Adapter,
    pub(super) digest: String,
}

/// Why nothing was read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unread {
    #[error("its files are not in the state that they have to be in")]
    NotSettled,
    #[error("{0}")]
    Failed(String),
}

impl From<String> for Unread {
    fn from(reason: String) -> Self {
        Self::Failed(reason)
    }
}

/// Brings an adapter into memory; where its files have to be in a `settled` state, only that.
pub(super) fn read(
    reader: &dyn ReadAdapter,
    source: &AdapterSource,
    settled: Option<&Fingerprint>,
    limits: &AdapterLimits,
) -> Result<Loaded, Unread> {
    let mut limits = limits.clone();
    let path = match source {
        AdapterSource::Path(path) => path.clone(),
        AdapterSource::Confined { asked, roots, .. } => {
            limits.within = Some(roots.folders().into());
            roots.resolve(asked).map_err(|error| error.to_string())?
        }
        AdapterSource::Remote { fetch, .. } => fetch()?,
    };
    let mut before = fingerprint(&path).ok();
    for _ in 0..MAX_READINGS {
        if settled.is_some() && before.as_ref() != settled {
            return Err(Unread::NotSettled);
        }
        let loaded = read_once(reader, &path, &limits);
        let after = fingerprint(&path).ok();
        if before == after {
            return Ok(loaded?);
        }
        before = after;
    }
    Err(Unread::Failed(format!(
        "{}: its files changed while they were read, {MAX_READINGS} times in a row; {BY_RENAMING}, and load it again",
        path.display()
    )))
}

/// What to do about files that change.
pub(super) const BY_RENAMING: &str = "put a new version there whole, by renaming its folder or file";

/// Somebody who writes an adapter anew does not do it all the time.
const MAX_READINGS: usize = 3;

fn read_once(reader: &dyn ReadAdapter, path: &Path, limits: &AdapterLimits) -> Result<Loaded, String> {
    let adapter = reader.read(path, limits).map_err(|error| error.to_string())?;
    let digest = digest(path, limits.within.as_deref()).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(Loaded { adapter, digest })
}

/// What tells one state of an adapter's files from another. Links are followed: what counts is what is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fingerprint {
    /// Of the folder, or the file that is the adapter: another one was put in its place whole.
    which: FileId,
    files: Vec<FileState>,
}

/// Device and number of the file on it, where the system has those.
type FileId = (u64, u64);

#[derive(Clone, Debug, PartialEq, Eq)]
struct FileState {
    name: OsString,
    which: FileId,
    len: u64,
    modified: Option<SystemTime>,
}

impl Fingerprint {
    /// Whether one of the two became the other where it lies, file by file.
    pub(super) fn is_in_place_of(&self, other: &Self) -> bool {
        self.which == other.which
    }
}

pub(super) fn fingerprint(path: &Path) -> io::Result<Fingerprint> {
    let is_folder = path.is_dir();
    let one = |file: PathBuf| {
        let metadata = fs::metadata(&file)?;
        // A file that is the adapter may be called otherwise where a link leads to it.
        let name = if is_folder { file.file_name().unwrap_or_default().to_owned() } else { OsString::new() };
        Ok(FileState { name, which: file_id(&metadata), len: metadata.len(), modified: metadata.modified().ok() })
    };
    let files = files(path).into_iter().map(one).collect::<io::Result<_>>()?;
    Ok(Fingerprint { which: file_id(&fs::metadata(path)?), files })
}

#[cfg(unix)]
fn file_id(metadata: &fs::Metadata) -> FileId {
    use std::os::unix::fs::MetadataExt;
    (metadata.dev(), metadata.ino())
}

#[cfg(not(unix))]
fn file_id(_: &fs::Metadata) -> FileId {
    (0, 0)
}

/// Files of an adapter, in the order of their names.
pub(super) fn files(path: &Path) -> Vec<PathBuf> {
    if !path.is_dir() {
        return vec![path.to_owned()];
    }
    // What is read of a PEFT folder; others may lie beside them (a README, a tokenizer).
    let names = ["adapter_config.json", "adapter_model.safetensors"];
    names.iter().map(|name| path.join(name)).filter(|file| file.exists()).collect()
}

/// "sha256:..." over the contents of all files, one after the other.
fn digest(path: &Path, within: Within<'_>) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    for path in files(path) {
        let mut file = File::open(&path)?;
        check_within(&file, &path, within)?;
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                len => hash.update(&buffer[..len]),
            }
        }
    }
    let mut text = "sha256:".to_owned();
    for byte in hash.finalize() {
        let _never_fails = write!(text, "{byte:02x}");
    }
    Ok(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::testing::fake_adapter_info;

    fn write(folder: &Path, tag: u64) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("adapter_config.json"), tag.to_string()).unwrap();
        fs::write(folder.join("adapter_model.safetensors"), tag.to_string()).unwrap();
    }

    /// Reads a number from either file; between the two, another version is renamed over the folder, as often as is said.
    struct Overtaken {
        left: AtomicUsize,
    }

    impl ReadAdapter for Overtaken {
        fn read(&self, path: &Path, _limits: &AdapterLimits) -> Result<Adapter, ModelError> {
            let number = |name: &str| fs::read_to_string(path.join(name)).unwrap().parse::<u64>().unwrap();
            let config = number("adapter_config.json");
            let left = self.left.load(Ordering::SeqCst);
            if left > 0 {
                self.left.store(left - 1, Ordering::SeqCst);
                let new = path.with_extension("new");
                write(&new, config + 1);
                fs::rename(path, path.with_extension(config.to_string())).unwrap();
                fs::rename(&new, path).unwrap();
            }
            Ok(Adapter::without_weights(fake_adapter_info(), config * 1000 + number("adapter_model.safetensors")))
        }
    }

    #[test]
    fn a_version_renamed_over_what_is_being_read_is_never_mixed_with_it() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("a");
        write(&path, 1);
        let source = AdapterSource::Path(path.clone());
        let overtaken =
            |times| read(&Overtaken { left: AtomicUsize::new(times) }, &source, None, &AdapterLimits::default());
        let loaded = overtaken(2).unwrap();
        assert_eq!(loaded.adapter.num_bytes(), 3003, "config and weights are of the third version");
        assert_eq!(loaded.digest, digest(&path, None).unwrap());
        let Err(Unread::Failed(refused)) = overtaken(MAX_READINGS) else { panic!("it never was the same twice") };
        assert!(refused.contains("changed while they were read"), "{refused}");
        assert_eq!(overtaken(0).unwrap().adapter.num_bytes(), 6006);
    }

    #[test]
    fn only_the_settled_state_of_files_is_read() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("a");
        write(&path, 1);
        let source = AdapterSource::Path(path.clone());
        let settled = fingerprint(&path).unwrap();
        let overtaken = |times, settled: &Fingerprint| {
            let reader = Overtaken { left: AtomicUsize::new(times) };
            read(&reader, &source, Some(settled), &AdapterLimits::default())
        };
        assert_eq!(overtaken(0, &settled).unwrap().adapter.num_bytes(), 1001);
        assert!(matches!(overtaken(1, &settled), Err(Unread::NotSettled)), "it was another before it had been read");
        assert!(matches!(overtaken(0, &settled), Err(Unread::NotSettled)), "and still is");
        let now = fingerprint(&path).unwrap();
        assert!(!now.is_in_place_of(&settled), "another folder under the name");
        fs::write(path.join("adapter_config.json"), "30").unwrap();
        assert!(matches!(overtaken(0, &now), Err(Unread::NotSettled)), "half of it is new");
        let half_new = fingerprint(&path).unwrap();
        assert!(half_new.is_in_place_of(&now) && half_new != now);
    }

    /// Found where a watcher looked at the link and the reader at where it leads: the two never were the same.
    #[cfg(unix)]
    #[test]
    fn a_link_and_where_it_leads_are_one_state() {
        let temp = tempfile::tempdir().unwrap();
        let (file, folder) = (temp.path().join(".v2.gguf"), temp.path().join(".v2"));
        fs::write(&file, "x").unwrap();
        write(&folder, 1);
        for real in [file, folder] {
            let link = temp.path().join("adapter.gguf");
            std::os::unix::fs::symlink(&real, &link).unwrap();
            assert_eq!(fingerprint(&link).unwrap(), fingerprint(&real).unwrap());
            fs::remove_file(link).unwrap();
        }
    }
}
