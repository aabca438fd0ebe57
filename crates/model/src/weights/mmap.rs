//! The one place that maps files and talks to the kernel's page cache: all unsafe code of weight reading is here.
//!
//! A mapping is read-only and private. It must not know what the bytes mean. Its invariant: `bytes()` is exactly the
//! file's length at the time of opening. A file that another process truncates while it is mapped makes reads past the
//! new end fail with SIGBUS, as for every program that maps files; [`MappedFile::check_unchanged`] narrows that window to
//! the import of one tensor and turns the usual case (a download that replaces the file in place) into an error. Replace
//! weight files by renaming a new one over them: a mapping keeps the old content. What is opened while requests run (an
//! adapter's file) is not mapped but copied by [`MappedFile::read_whole`]: who writes over it must not end the server.

#![allow(unsafe_code, reason = "mapping a file and dropping its pages are system calls without a safe form")]

use std::{
    fs::{self, File},
    io::{self, Read},
    ops::Range,
    path::{Path, PathBuf},
};

use memmap2::Mmap;

use crate::ModelError;

/// A file's bytes, mapped for reading or copied.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Mapped { file: File, map: Mmap },
    Copied(Vec<u8>),
}

impl MappedFile {
    /// Maps a regular, non-empty file.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let file = open_regular(path, None)?;
        if file_len(&file, path)? == 0 {
            return Err(ModelError::bad_file(path, "the file is empty"));
        }
        // SAFETY: the map is read-only and never handed out as anything but `&[u8]` of plain bytes, for which every bit
        // pattern is valid. What remains is another process changing the file: content then changes under us (all
        // parsing is done once, on checked copies of offsets; weights would be garbage numbers, never bad memory), or
        // the file shrinks (SIGBUS, see the head of this file). That is the accepted price of mapping files.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| io_error(path, source))?;
        Ok(Self { path: path.to_owned(), bytes: Bytes::Mapped { file, map } })
    }

    /// Copies a regular, non-empty file of at most `max_bytes` into memory. Whatever becomes of it afterwards, this stays.
    pub(crate) fn read_whole(path: &Path, max_bytes: u64, within: Within<'_>) -> Result<Self, ModelError> {
        let file = open_regular(path, within)?;
        let len = file_len(&file, path)?;
        if len == 0 {
            return Err(ModelError::bad_file(path, "the file is empty"));
        }
        if len > max_bytes {
            return Err(ModelError::bad_file(
                path,
                format!("the file has {len} bytes, the limit for it is {max_bytes}"),
            ));
        }
        let mut bytes = Vec::new();
        usize::try_from(len)
            .ok()
            .and_then(|len| bytes.try_reserve_exact(len).ok())
            .ok_or_else(|| ModelError::OutOfMemory(format!("no memory for the {len} bytes of {}", path.display())))?;
        // One byte more, so that a file that grows meanwhile is seen too.
        let now = file.take(len + 1).read_to_end(&mut bytes).map_err(|source| io_error(path, source))?;
        if now as u64 != len {
            return Err(changed(path, len, now as u64));
        }
        Ok(Self { path: path.to_owned(), bytes: Bytes::Copied(bytes) })
    }

    pub(crate) fn path(&self) -> &PathBuf {
        &self.path
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped { map, .. } => map,
            Bytes::Copied(bytes) => bytes,
        }
    }

    /// An error where a mapped file is no longer as long as it was when it was mapped.
    pub(crate) fn check_unchanged(&self) -> Result<(), ModelError> {
        let Bytes::Mapped { file, map } = &self.bytes else { return Ok(()) };
        let now = file_len(file, &self.path)?;
        if now == map.len() as u64 { Ok(()) } else { Err(changed(&self.path, map.len() as u64, now)) }
    }

    /// Asks the system to read `range` ahead. A hint: failure only costs time.
    pub(crate) fn prefetch(&self, range: &Range<usize>) {
        #[cfg(unix)]
        if let Bytes::Mapped { map, .. } = &self.bytes
            && !range.is_empty()
            && let Err(error) = map.advise_range(memmap2::Advice::WillNeed, range.start, range.len())
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
        if let Bytes::Mapped { map, .. } = &self.bytes
            && !range.is_empty()
        {
            // SAFETY: DONTNEED is unsafe because it discards changes of private pages. This map is read-only, so there
            // are none: a page that is read again comes back from the file with the same content.
            let outcome =
                unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
            if let Err(error) = outcome {
                tracing::debug!(%error, "releasing pages was refused");
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Folders, by their real paths, that a file must lie in; None: anywhere.
pub type Within<'a> = Option<&'a [PathBuf]>;

/// Refuses an opened file that lies in none of the folders. It is the file that is asked for its place, not its path: a link on that
/// may lead elsewhere since it was looked at.
///
/// # Errors
/// [`io::ErrorKind::PermissionDenied`], and where the system does not tell a file's place.
pub fn check_within(file: &File, path: &Path, within: Within<'_>) -> io::Result<()> {
    let Some(folders) = within else { return Ok(()) };
    #[cfg(target_os = "linux")]
    let place = {
        let _ = path;
        fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file)))?
    };
    // No better is to be had: whoever changes links between two calls is not found out.
    #[cfg(not(target_os = "linux"))]
    let place = {
        let _ = file;
        path.canonicalize()?
    };
    if folders.iter().any(|folder| place.starts_with(folder)) {
        return Ok(());
    }
    let what = "the file does not lie in the folders that adapters may be read from; put it there whole, without links";
    Err(io::Error::new(io::ErrorKind::PermissionDenied, what))
}

/// Reads a small text file whole; more than `max_bytes` is refused before it is read.
pub(crate) fn read_text(path: &Path, max_bytes: u64) -> Result<String, ModelError> {
    read_text_within(path, max_bytes, None)
}

/// The same of a file that must lie in some folders.
pub(crate) fn read_text_within(path: &Path, max_bytes: u64, within: Within<'_>) -> Result<String, ModelError> {
    let file = open_regular(path, within)?;
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

/// Opens a regular file, which must lie in some folders. The kind is asked before opening: opening a pipe would wait for its writer.
fn open_regular(path: &Path, within: Within<'_>) -> Result<File, ModelError> {
    let metadata = fs::metadata(path).map_err(|source| io_error(path, source))?;
    if !metadata.is_file() {
        return Err(ModelError::bad_file(path, "this is not a regular file"));
    }
    let opened = File::open(path).and_then(|file| check_within(&file, path, within).map(|()| file));
    opened.map_err(|source| io_error(path, source))
}

fn changed(path: &Path, before: u64, now: u64) -> ModelError {
    let what = format!(
        "the file changed while it was read ({before} bytes at first, {now} now); replace weights by renaming a whole file \
         over the old one, then load them again"
    );
    ModelError::bad_file(path, what)
}

fn file_len(file: &File, path: &Path) -> Result<u64, ModelError> {
    Ok(file.metadata().map_err(|source| io_error(path, source))?.len())
}

fn io_error(path: &Path, source: io::Error) -> ModelError {
    ModelError::Io { path: path.to_owned(), source }
}
