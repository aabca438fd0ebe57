//! The one place that maps files and talks to the kernel's page cache: all unsafe code of weight reading is here.
//!
//! A mapping is read-only and private. It must not know what the bytes mean. Its invariant: `bytes()` is exactly the
//! file's length at the time of opening. A file that another process truncates while it is mapped makes reads past the
//! new end fail with SIGBUS, as for every program that maps files; [`MappedFile::check_unchanged`] narrows that window to
//! the import of one tensor and turns the usual case (a download that replaces the file in place) into an error. Replace
//! weight files by renaming a new one over them: a mapping keeps the old content.

#![allow(unsafe_code, reason = "mapping a file and dropping its pages are system calls without a safe form")]

use std::{
    fs::{self, File},
    io::{self, Read},
    ops::Range,
    path::{Path, PathBuf},
};

use memmap2::Mmap;

use crate::ModelError;

/// A file mapped for reading.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    file: File,
    map: Mmap,
}

impl MappedFile {
    /// Maps a regular, non-empty file.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let file = open_regular(path)?;
        if file_len(&file, path)? == 0 {
            return Err(ModelError::bad_file(path, "the file is empty"));
        }
        // SAFETY: the map is read-only and never handed out as anything but `&[u8]` of plain bytes, for which every bit
        // pattern is valid. What remains is another process changing the file: content then changes under us (all
        // parsing is done once, on checked copies of offsets; weights would be garbage numbers, never bad memory), or
        // the file shrinks (SIGBUS, see the head of this file). That is the accepted price of mapping files.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| io_error(path, source))?;
        Ok(Self { path: path.to_owned(), file, map })
    }

    pub(crate) fn path(&self) -> &PathBuf {
        &self.path
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// An error where the file is no longer as long as it was when it was mapped.
    pub(crate) fn check_unchanged(&self) -> Result<(), ModelError> {
        let now = file_len(&self.file, &self.path)?;
        if now == self.map.len() as u64 {
            return Ok(());
        }
        let what = format!(
            "the file changed while it was read ({} bytes at first, {now} now); replace weights by renaming a whole \
             file over the old one, then start again",
            self.map.len()
        );
        Err(ModelError::bad_file(&self.path, what))
    }

    /// Asks the system to read `range` ahead. A hint: failure only costs time.
    pub(crate) fn prefetch(&self, range: &Range<usize>) {
        #[cfg(unix)]
        if !range.is_empty()
            && let Err(error) = self.map.advise_range(memmap2::Advice::WillNeed, range.start, range.len())
        {
            tracing::debug!(%error, "reading ahead was refused");
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Gives the pages of `range` back to the system, so that a loaded model is not in memory twice. Reading them again
    /// is allowed and reads the file again. A hint: failure only costs memory.
    pub(crate) fn release(&self, range: &Range<usize>) {
        #[cfg(unix)]
        if !range.is_empty() {
            // SAFETY: DONTNEED is unsafe because it discards changes of private pages. This map is read-only, so there
            // are none: a page that is read again comes back from the file with the same content.
            let outcome = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
            };
            if let Err(error) = outcome {
                tracing::debug!(%error, "releasing pages was refused");
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Reads a small text file whole; more than `max_bytes` is refused before it is read.
pub(crate) fn read_text(path: &Path, max_bytes: u64) -> Result<String, ModelError> {
    let file = open_regular(path)?;
    let mut text = String::new();
    // One byte more than allowed, so that a file that grows meanwhile is seen too.
    let read = file.take(max_bytes + 1).read_to_string(&mut text);
    match read {
        Ok(count) if count as u64 <= max_bytes => Ok(text),
        Ok(_) => {
            Err(ModelError::bad_file(path, format!("the file is larger than {max_bytes} bytes, the limit for it")))
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(ModelError::bad_file(path, "the file is not UTF-8 text"))
        }
        Err(source) => Err(io_error(path, source)),
    }
}

/// Opens a regular file. The kind is asked before opening: opening a pipe would wait for its writer.
fn open_regular(path: &Path) -> Result<File, ModelError> {
    let metadata = fs::metadata(path).map_err(|source| io_error(path, source))?;
    if !metadata.is_file() {
        return Err(ModelError::bad_file(path, "this is not a regular file"));
    }
    File::open(path).map_err(|source| io_error(path, source))
}

fn file_len(file: &File, path: &Path) -> Result<u64, ModelError> {
    Ok(file.metadata().map_err(|source| io_error(path, source))?.len())
}

fn io_error(path: &Path, source: io::Error) -> ModelError {
    ModelError::Io { path: path.to_owned(), source }
}
