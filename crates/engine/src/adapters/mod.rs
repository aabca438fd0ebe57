//! Adapters by name: which versions are in memory, which the model may name in a batch, and who uses them.
//!
//! Reading, replacing and letting go happen beside the model thread, which is only told a number and a pointer. A request
//! takes a [`AdapterLease`] on one version and keeps it to its end, through preemption and for all its samples; so a name
//! can be given new weights, or be taken away, while requests finish on the old ones. It must not know HTTP, nor what a
//! tenant is beyond a word that marks whose share an adapter counts to.
//!
//! [`pool`] is the state and its rules, [`read`] how files become adapters, [`roots`] where they may lie, [`watch`] a folder
//! that is looked at.

mod pool;
mod read;
mod roots;
mod state;
mod watch;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bindery_model::{AdapterInfo, AdapterLimits};

pub use self::{
    pool::{AdapterLease, AdapterPool},
    read::ReadAdapter,
    roots::AdapterRoots,
    watch::{AdapterFolder, IsTaken, adapters_in},
};

/// Which weights a version of an adapter is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterIdentity {
    /// Under which it was asked for.
    pub name: String,
    /// "sha256:..." of its files.
    pub digest: String,
    /// As its files tell it.
    pub licence: Option<String>,
}

/// How many adapters there may be, and how large.
#[derive(Clone, Debug)]
pub struct AdapterPoolConfig {
    /// `--max-loras`: adapters that batches may mix at one time.
    pub max_loras: usize,
    /// `--max-cpu-loras`: versions in memory at one time.
    pub max_cpu_loras: usize,
    /// Of each.
    pub limits: AdapterLimits,
}

impl AdapterPoolConfig {
    /// vLLM's names, this server's values.
    pub const DEFAULT_MAX_LORAS: usize = 8;
    /// Likewise.
    pub const DEFAULT_MAX_CPU_LORAS: usize = 64;

    /// Refuses what no request could be served with.
    ///
    /// # Errors
    /// The value, the limit and the next step.
    pub fn check(&self) -> Result<(), crate::EngineError> {
        let Self { max_loras, max_cpu_loras, .. } = self;
        if *max_loras == 0 {
            return Err(crate::EngineError::Invalid {
                param: "max_loras",
                message: "--max-loras is 0, it must be at least 1".to_owned(),
            });
        }
        if max_cpu_loras < max_loras {
            return Err(crate::EngineError::Invalid {
                param: "max_cpu_loras",
                message: format!(
                    "--max-cpu-loras {max_cpu_loras} is less than --max-loras {max_loras}: adapters in batches are in \
                     memory, too; raise the one or lower the other"
                ),
            });
        }
        Ok(())
    }
}

impl Default for AdapterPoolConfig {
    fn default() -> Self {
        Self {
            max_loras: Self::DEFAULT_MAX_LORAS,
            max_cpu_loras: Self::DEFAULT_MAX_CPU_LORAS,
            limits: AdapterLimits::default(),
        }
    }
}

/// Brings an adapter's files to this machine where they are not, and says where they lie. Blocking.
pub type Fetch = Arc<dyn Fn() -> Result<PathBuf, String> + Send + Sync>;

/// Where an adapter comes from.
#[derive(Clone)]
pub enum AdapterSource {
    /// A PEFT folder or a GGUF file.
    Path(PathBuf),
    /// The same, where it may only lie in some folders: those are asked again whenever it is read, which is also after it had to
    /// leave memory, for what lies there may be a link to elsewhere by then; and the opened files are asked, too.
    Confined {
        /// Where it was found.
        path: PathBuf,
        /// As it was asked for.
        asked: String,
        /// Where it may lie.
        roots: AdapterRoots,
    },
    /// Something else, by its name for people ("org/repo"), and how to get it.
    Remote {
        /// As it was given.
        name: String,
        /// Called on a blocking thread, whenever it is to be read.
        fetch: Fetch,
    },
}

impl AdapterSource {
    /// On this machine; None of what is fetched.
    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) | Self::Confined { path, .. } => Some(path),
            Self::Remote { .. } => None,
        }
    }
}

impl std::fmt::Debug for AdapterSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl std::fmt::Display for AdapterSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) | Self::Confined { path, .. } => write!(f, "{}", path.display()),
            Self::Remote { name, .. } => f.write_str(name),
        }
    }
}

/// An adapter that is known by name, in memory or not.
#[derive(Clone, Debug)]
pub struct AdapterSpec {
    /// What requests call it.
    pub name: String,
    /// Where it lies.
    pub source: AdapterSource,
    /// Who may see it; None: everyone.
    pub tenants: Option<Vec<String>>,
    /// In memory and in batches from the start, never to make room.
    pub pinned: bool,
}

impl AdapterSpec {
    /// Whether `tenant` (None: who belongs to none) may know of it.
    pub fn is_for(&self, tenant: Option<&Arc<str>>) -> bool {
        match (&self.tenants, tenant) {
            (None, _) => true,
            (Some(tenants), Some(tenant)) => tenants.iter().any(|name| **name == **tenant),
            (Some(_), None) => false,
        }
    }
}

/// Where an adapter's newest version is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterState {
    /// Known by name only.
    Disk,
    /// Being read.
    Loading,
    /// In memory.
    Host,
    /// In memory, and batches may name it.
    Resident,
    /// Has no name any more; requests are finishing on it.
    Draining,
}

impl AdapterState {
    /// As it is written in answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Loading => "loading",
            Self::Host => "host",
            Self::Resident => "resident",
            Self::Draining => "draining",
        }
    }
}

/// One adapter (or an old version that is still in use), for listings.
#[derive(Clone, Debug)]
pub struct AdapterStatus {
    /// Of requests.
    pub name: String,
    /// Counts from 1 with every load under this name; 0 before the first.
    pub version: u32,
    /// Where it is.
    pub state: AdapterState,
    /// Where it came from.
    pub source: String,
    /// sha256 over the files as they were read; None before.
    pub digest: Option<String>,
    /// Who may see it; None: everyone.
    pub tenants: Option<Vec<String>>,
    /// See [`AdapterSpec::pinned`].
    pub pinned: bool,
    /// Requests that hold it.
    pub num_users: usize,
    /// Memory of its weights; 0 where it is in none.
    pub num_bytes: u64,
    /// What the files say; None before they were read.
    pub info: Option<AdapterInfo>,
    /// Why the last attempt to read it failed, where it did.
    pub failure: Option<String>,
}

/// Adapters that requests are for, by name, each once. For metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterUse {
    /// With a request that has been scheduled.
    pub running: Vec<String>,
    /// With a request that has not, or that waits for the adapter to be read or for a place for it.
    pub waiting: Vec<String>,
    /// Requests that the model does not know of yet, since they wait for their adapter.
    pub num_waiting: usize,
}

/// What a running request's adapter is waited for, when it is unloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unload {
    /// The name is gone at once; the call returns when the last request has ended, or after this time.
    Wait(Option<Duration>),
    /// Refused while requests use it.
    RefuseIfUsed,
}

/// What can go wrong with an adapter, in words for its caller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdapterError {
    /// Nobody knows the name.
    #[error("there is no adapter {name:?}: GET /v1/adapters lists those that there are")]
    Unknown {
        /// As it was asked for.
        name: String,
    },
    /// The name is taken.
    #[error("the adapter {name:?} is there already: unload it first, or load with load_inplace to replace it")]
    Exists {
        /// Of the adapter.
        name: String,
    },
    /// Requests use it.
    #[error("the adapter {name:?} is used by {num_users} requests: wait for them, or unload with mode \"wait\"")]
    InUse {
        /// Of the adapter.
        name: String,
        /// How many.
        num_users: usize,
    },
    /// Requests still used it when the time was up.
    #[error(
        "the adapter {name:?} takes no more requests, but {num_users} that use it had not ended in time; its memory is \
         freed when they have"
    )]
    StillDraining {
        /// Of the adapter.
        name: String,
        /// How many.
        num_users: usize,
    },
    /// Its files are missing, broken, of another model, or too large.
    #[error("the adapter {name:?} cannot be loaded: {reason}")]
    Unreadable {
        /// Of the adapter.
        name: String,
        /// Which file, what is wrong, what to do.
        reason: String,
    },
    /// It may not be read from there.
    #[error("{reason}")]
    Forbidden {
        /// Which path, and where adapters may lie.
        reason: String,
    },
    /// Not a name.
    #[error("{reason}")]
    BadName {
        /// What is wrong with it.
        reason: String,
    },
    /// As many requests as may wait at all wait for adapters.
    #[error(
        "{max_waiting} requests wait for adapters to be read, which is the limit: try again later, or raise \
         --max-queued-requests"
    )]
    QueueFull {
        /// The bound.
        max_waiting: usize,
    },
    /// Every place is taken for good.
    #[error("{reason}")]
    NoRoom {
        /// Which limit, and how to raise it.
        reason: String,
    },
}

/// Longest name of an adapter, bytes.
pub const MAX_NAME_BYTES: usize = 256;

/// Characters that change the direction in which others are shown, or are not shown themselves.
fn turns_text(char: char) -> bool {
    matches!(char, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// Refuses what could not be told apart in a listing, or not be written in a path.
pub fn check_name(name: &str) -> Result<(), AdapterError> {
    let refuse = |reason: String| Err(AdapterError::BadName { reason });
    if name.is_empty() {
        return refuse("an adapter's name is empty: give it one".to_owned());
    }
    if name.len() > MAX_NAME_BYTES {
        return refuse(format!("an adapter's name has {} bytes, the limit is {MAX_NAME_BYTES}", name.len()));
    }
    if name.trim() != name || name.chars().any(|char| char.is_control() || turns_text(char)) {
        return refuse(format!("the adapter's name {name:?} has blanks around it or control characters in it"));
    }
    if name.contains(',') {
        return refuse(format!("the adapter's name {name:?} has a comma in it, which parts names in the metrics"));
    }
    Ok(())
}
