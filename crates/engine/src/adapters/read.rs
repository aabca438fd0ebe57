//! From files to an adapter in memory. Blocking, on threads that may.
//!
//! It knows paths and digests, not what becomes of an adapter. Its invariant: an adapter and its digest are of one state of
//! the files; where those change meanwhile (a folder renamed over), all is read again.

use std::{
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

/// Brings an adapter into memory.
pub(super) fn read(reader: &dyn ReadAdapter, source: &AdapterSource, limits: &AdapterLimits) -> Result<Loaded, String> {
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
        let loaded = read_once(reader, &path, &limits);
        let after = fingerprint(&path).ok();
        if before == after {
            return loaded;
        }
        before = after;
    }
    Err(format!(
        "{}: its files changed while they were read, {MAX_READINGS} times in a row; put a new version there whole, by renaming \
         its folder or file, and load it again",
        path.display()
    ))
}

/// Somebody who writes an adapter anew does not do it all the time.
const MAX_READINGS: usize = 3;

fn read_once(reader: &dyn ReadAdapter, path: &Path, limits: &AdapterLimits) -> Result<Loaded, String> {
    let adapter = reader.read(path, limits).map_err(|error| error.to_string())?;
    let digest = digest(path, limits.within.as_deref()).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(Loaded { adapter, digest })
}

/// What tells one state of an adapter's files from another: name, length, time of change, and which file it is.
pub(super) type Fingerprint = Vec<(PathBuf, u64, Option<SystemTime>, u64)>;

pub(super) fn fingerprint(path: &Path) -> io::Result<Fingerprint> {
    let one = |file: PathBuf| {
        let metadata = fs::metadata(&file)?;
        #[cfg(unix)]
        let which = std::os::unix::fs::MetadataExt::ino(&metadata);
        #[cfg(not(unix))]
        let which = 0;
        Ok((file, metadata.len(), metadata.modified().ok(), which))
    };
    files(path).into_iter().map(one).collect()
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
        let overtaken = |times| read(&Overtaken { left: AtomicUsize::new(times) }, &source, &AdapterLimits::default());
        let loaded = overtaken(2).unwrap();
        assert_eq!(loaded.adapter.num_bytes(), 3003, "config and weights are of the third version");
        assert_eq!(loaded.digest, digest(&path, None).unwrap());
        let Err(refused) = overtaken(MAX_READINGS) else { panic!("it never was the same twice") };
        assert!(refused.contains("changed while they were read"), "{refused}");
        assert_eq!(overtaken(0).unwrap().adapter.num_bytes(), 6006);
    }
}
