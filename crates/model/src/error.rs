//! What can go wrong with weights and steps, by what the reader can do about it.
//!
//! It must not know HTTP or the command line: those choose the form. Every text names the value, the limit and, where
//! there is one, the next step.

use std::path::{Path, PathBuf};

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file could not be read at all.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file's content is not what its format demands. `what` names the tensor or key, the value and the limit.
    #[error("{}: {what}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// Tensor or key, value, limit.
        what: String,
    },
    /// A model that this version does not run; the text lists what it does.
    #[error("{0}")]
    Unsupported(String),
    /// An option that this model or machine cannot honour.
    #[error("{0}")]
    BadOption(String),
    /// Not enough memory for what was asked.
    #[error("{0}")]
    OutOfMemory(String),
    /// A batch that breaks the contract of `ForwardBatch`, or a failure inside a backend.
    #[error("{0}")]
    Step(String),
}

impl ModelError {
    /// A file whose content is wrong.
    pub(crate) fn bad_file(path: &Path, what: impl Into<String>) -> Self {
        Self::BadFile { path: path.to_owned(), what: clipped(what.into()) }
    }

    /// A file whose content is right but asks for something this version does not do.
    pub(crate) fn unsupported(path: &Path, what: impl std::fmt::Display) -> Self {
        Self::Unsupported(format!("{}: {}", path.display(), clipped(what.to_string())))
    }
}

/// Names and values out of a hostile file may be as long as the file: a message is cut to what a person reads.
fn clipped(mut text: String) -> String {
    const MAX_BYTES: usize = 1000;
    if text.len() > MAX_BYTES {
        let end = (0..=MAX_BYTES).rfind(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}
