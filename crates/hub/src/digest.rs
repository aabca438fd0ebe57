//! Digests of files: sha256, and git's blob id, which is all the hub tells of its small files.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use crate::progress::{SharedProgress, Task};

/// What a file must hash to. Lower-case hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Digest {
    /// Of the bytes.
    Sha256(String),
    /// sha1 of `blob <length>\0` and the bytes.
    GitBlob(String),
}

impl Digest {
    /// From the hub's ETag: sha256 for files in large-file storage, git's id for others, nothing else is known.
    pub fn from_etag(etag: &str) -> Option<Self> {
        let text = etag.to_ascii_lowercase();
        let is_hex = text.bytes().all(|b| b.is_ascii_hexdigit());
        match text.len() {
            64 if is_hex => Some(Self::Sha256(text)),
            40 if is_hex => Some(Self::GitBlob(text)),
            _ => None,
        }
    }

    /// The digest itself, without its kind.
    pub fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitBlob(hex) => hex,
        }
    }

    /// The sha256, where it is one.
    pub fn sha256(&self) -> Option<&str> {
        match self {
            Self::Sha256(hex) => Some(hex),
            Self::GitBlob(_) => None,
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sha256(hex) => write!(f, "sha256:{hex}"),
            Self::GitBlob(hex) => write!(f, "git:{hex}"),
        }
    }
}

/// `sha256:…` of a model's weights, to tell one from another: of its file, or of `config.json` and all safetensors files of its
/// folder in the order of their names, each after a line with its name and length.
///
/// # Errors
/// A file that cannot be read.
pub fn weights_digest(path: &Path) -> io::Result<String> {
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        let is_weight = |file: &Path| {
            file.file_name().is_some_and(|name| name == "config.json")
                || file.extension().is_some_and(|extension| extension == "safetensors")
        };
        let all = std::fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.path()));
        files = all.filter(|file| file.as_ref().map_or(true, |file| is_weight(file))).collect::<io::Result<_>>()?;
        files.sort();
    }
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    let is_folder = path.is_dir();
    for path in files {
        let mut file = File::open(&path)?;
        if is_folder {
            let name = path.file_name().unwrap_or_default().display().to_string();
            hasher.update(format!("{name:?} {}\n", file.metadata()?.len()));
        }
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                len => hasher.update(&buffer[..len]),
            }
        }
    }
    Ok(Digest::Sha256(hex(&hasher.finalize())).to_string())
}

/// Hashes while bytes pass by.
pub(crate) enum Hasher {
    Sha256(Sha256),
    GitBlob(Sha1),
}

impl Hasher {
    /// For comparing with `expected`; `size` is the length of the whole file.
    pub(crate) fn like(expected: &Digest, size: u64) -> Self {
        match expected {
            Digest::Sha256(_) => Self::Sha256(Sha256::new()),
            Digest::GitBlob(_) => {
                let mut hasher = Sha1::new();
                hasher.update(format!("blob {size}\0"));
                Self::GitBlob(hasher)
            }
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::GitBlob(hasher) => hasher.update(bytes),
        }
    }

    pub(crate) fn finish(self) -> Digest {
        match self {
            Self::Sha256(hasher) => Digest::Sha256(hex(&hasher.finalize())),
            Self::GitBlob(hasher) => Digest::GitBlob(hex(&hasher.finalize())),
        }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Raised when the future that waits for a thread is dropped, so that the thread stops too.
pub(crate) struct CancelOnDrop(Arc<AtomicBool>);

impl CancelOnDrop {
    pub(crate) fn new() -> (Self, CancelFlag) {
        let flag = Arc::new(AtomicBool::new(false));
        (Self(Arc::clone(&flag)), CancelFlag(flag))
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The thread's side of [`CancelOnDrop`].
#[derive(Clone)]
pub(crate) struct CancelFlag(Arc<AtomicBool>);

impl CancelFlag {
    /// An error once nobody waits any more.
    pub(crate) fn check(&self) -> io::Result<()> {
        if self.0.load(Ordering::Relaxed) {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "cancelled"));
        }
        Ok(())
    }
}

/// Reads a whole file on a thread of its own and returns its digest in `expected`'s kind.
pub(crate) async fn of_file(path: &Path, expected: &Digest, progress: &SharedProgress) -> io::Result<Digest> {
    let (guard, cancelled) = CancelOnDrop::new();
    let (path, expected, progress) = (path.to_owned(), expected.clone(), Arc::clone(progress));
    let result = tokio::task::spawn_blocking(move || {
        let mut file = File::open(&path)?;
        let size = file.metadata()?.len();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let task = Task::start(progress.as_ref(), &format!("checking {name}"), Some(size));
        let mut hasher = Hasher::like(&expected, size);
        let mut buffer = vec![0; 1 << 20];
        loop {
            cancelled.check()?;
            let read = file.read(&mut buffer)?;
            if read == 0 {
                return Ok(hasher.finish());
            }
            hasher.update(&buffer[..read]);
            task.advance(read as u64);
        }
    })
    .await
    .map_err(io::Error::other)?;
    drop(guard);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest_of(bytes: &[u8], like: &Digest) -> Digest {
        let mut hasher = Hasher::like(like, bytes.len() as u64);
        hasher.update(bytes);
        hasher.finish()
    }

    #[test]
    fn a_folder_s_weights_are_its_config_and_its_tensors_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("config.json", "hel");
        write("model.safetensors", "lo\n");
        write("README.md", "which may change");
        let hashed = |text: &str| digest_of(text.as_bytes(), &Digest::Sha256(String::new())).to_string();
        let framed = hashed("\"config.json\" 3\nhel\"model.safetensors\" 3\nlo\n");
        assert_eq!(weights_digest(folder.path()).unwrap(), framed);
        write("whole.gguf", "hello\n");
        assert_eq!(weights_digest(&folder.path().join("whole.gguf")).unwrap(), hashed("hello\n"));
        assert!(weights_digest(&folder.path().join("none.gguf")).is_err());
    }

    /// Both values are the published ones for the text "hello\n" (sha256sum; git hash-object).
    #[test]
    fn known_values() {
        let sha = Digest::Sha256("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03".into());
        let git = Digest::GitBlob("ce013625030ba8dba906f756967f9e9ca394464a".into());
        assert_eq!(digest_of(b"hello\n", &sha), sha);
        assert_eq!(digest_of(b"hello\n", &git), git);
        assert_eq!(Digest::from_etag(sha.hex()), Some(sha));
        assert_eq!(Digest::from_etag(git.hex()), Some(git));
        assert_eq!(Digest::from_etag("W/whatever"), None);
    }
}
