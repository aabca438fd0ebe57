//! From files to an adapter in memory. Blocking, on threads that may.
//!
//! It knows paths and digests, not what becomes of an adapter.

use std::{
    fmt::Write as _,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use bindery_model::{Adapter, AdapterLimits, AdapterLoader, ModelError};
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
    let path = match source {
        AdapterSource::Path(path) => path.clone(),
        AdapterSource::Remote { fetch, .. } => fetch()?,
    };
    let adapter = reader.read(&path, limits).map_err(|error| error.to_string())?;
    let digest = digest(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(Loaded { adapter, digest })
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
fn digest(path: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    for file in files(path) {
        let mut file = File::open(file)?;
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
