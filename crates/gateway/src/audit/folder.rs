//! The log's files: their names, their order, and who may write them.
//!
//! **Invariant**: a segment's number is in its name and in its first record; segments are read in the order of numbers.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use super::AuditError;

const PREFIX: &str = "segment-";
const SUFFIX: &str = ".jsonl";

/// A segment of the log.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Segment {
    pub(super) number: u64,
    pub(super) path: PathBuf,
}

impl Segment {
    pub(super) fn new(folder: &Path, number: u64) -> Self {
        Self { number, path: folder.join(format!("{PREFIX}{number:08}{SUFFIX}")) }
    }

    pub(super) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

/// All segments, in order. Other files are none.
pub(super) fn segments(folder: &Path) -> Result<Vec<Segment>, AuditError> {
    let mut segments = Vec::new();
    for entry in fs::read_dir(folder).map_err(AuditError::io("list", folder))? {
        let name = entry.map_err(AuditError::io("list", folder))?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.parse().ok());
        if let Some(number) = number {
            let segment = Segment::new(folder, number);
            if segment.path.file_name() == Some(&name) {
                segments.push(segment);
            }
        }
    }
    segments.sort();
    Ok(segments)
}

/// Whether anything of a log is there.
pub(crate) fn has_segments(folder: &Path) -> bool {
    segments(folder).is_ok_and(|segments| !segments.is_empty())
}

/// Held as long as the log is written.
#[derive(Debug)]
pub(super) struct FolderLock(#[expect(dead_code, reason = "its drop is what it is for")] File);

pub(super) fn lock(folder: &Path) -> Result<FolderLock, AuditError> {
    let path = folder.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(AuditError::io("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(FolderLock(file)),
        Err(TryLockError::WouldBlock) => Err(AuditError::InUse { path: folder.to_path_buf() }),
        Err(TryLockError::Error(error)) => Err(AuditError::io("lock", &path)(error)),
    }
}

/// Makes new names and removed ones last.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// A segment that is being written. A trait, for a disk that is full has to be played in tests.
pub(super) trait SegmentFile: Send {
    /// One write at the end; how much was taken.
    fn append(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// Takes back what was appended beyond this length.
    fn truncate(&mut self, length: u64) -> io::Result<()>;
    /// Makes it last.
    fn sync(&mut self) -> io::Result<()>;
}

impl SegmentFile for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}

/// Opens a segment for appending.
pub(super) fn open_file(path: &Path) -> io::Result<Box<dyn SegmentFile>> {
    let mut options = OpenOptions::new();
    options.create(true).append(true);
    // Whom a request concerned is nobody's business but the operator's.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    Ok(Box::new(options.open(path)?))
}
