//! `[audit]` of the config file.
//!
//! **Invariant**: keys are named here, never given.

use std::{path::PathBuf, time::Duration};

use serde::Deserialize;

use super::{AuditError, AuditKey, ContentsKey, ContentsKeys, Fsync, JournalConfig, Retention, key::Env};
use crate::failure::OnFailure;

/// The variable of the key that signs records, unless the config names another.
const KEY_ENV: &str = "BINDERY_AUDIT_KEY";
const MAX_QUEUED: usize = 4096;
/// Kept of a prompt, and of an answer, unless the config says otherwise.
const MAX_CONTENTS_BYTES: usize = 256 * 1024;
/// A shorter segment would hold a record or two.
const MIN_SEGMENT_BYTES: u64 = 4096;
const HOUR: Duration = Duration::from_hours(1);

/// What is kept of prompts and answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeepContents {
    /// Nothing.
    #[default]
    None,
    /// Their texts, encrypted.
    Encrypted,
}

/// When records are made to last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FsyncWhen {
    /// Before they are acknowledged.
    #[default]
    Always,
    /// Every `fsync_ms`.
    Interval,
    /// When the system does it.
    Never,
}

/// The table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditConfig {
    /// The log's folder.
    pub path: PathBuf,
    /// The log's name in the store; absent: the machine's name and the folder's absolute path.
    pub name: Option<String>,
    /// The environment variable that holds the signing key; absent: `BINDERY_AUDIT_KEY`.
    pub key_env: Option<String>,
    /// A file that holds it, outside the folder.
    pub key_file: Option<PathBuf>,
    /// What is kept of prompts and answers.
    #[serde(default)]
    pub contents: KeepContents,
    /// The environment variable that holds the key of contents.
    pub contents_key_env: Option<String>,
    /// Variables of keys that sealed contents before; they open, and seal nothing.
    #[serde(default)]
    pub contents_old_key_envs: Vec<String>,
    /// The longest prompt and the longest answer that are kept.
    pub max_contents_bytes: Option<usize>,
    /// When records are made to last.
    #[serde(default)]
    pub fsync: FsyncWhen,
    /// `interval`: how often.
    pub fsync_ms: Option<u64>,
    /// What happens when the log cannot be written.
    #[serde(default)]
    pub on_failure: OnFailure,
    /// The most records that wait.
    pub max_queued: Option<usize>,
    /// A segment ends when it is so long.
    pub max_segment_bytes: Option<u64>,
    /// A segment ends when it is so old.
    pub max_segment_hours: Option<u64>,
    /// Segments older than this go.
    pub keep_days: Option<u64>,
    /// The most segments.
    pub keep_segments: Option<u64>,
}

/// How the writer's thread is started.
#[derive(Clone, Copy, Debug)]
pub struct WriterConfig {
    /// What happens to requests whose record cannot be kept.
    pub on_failure: OnFailure,
    /// The most records that wait.
    pub max_queued: usize,
}

impl AuditConfig {
    /// What the log is called in the store, where the logs of several nodes lie side by side.
    pub fn log_name(&self, host: &str) -> String {
        self.name.clone().unwrap_or_else(|| {
            // A path that cannot be made absolute names a folder that cannot be opened either.
            let path = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
            format!("{host}:{}", path.display())
        })
    }

    /// The key that signs records.
    pub fn key(&self, env: Env<'_>) -> Result<AuditKey, AuditError> {
        self.check()?;
        match (&self.key_file, &self.key_env) {
            (Some(path), _) => AuditKey::from_file(path, &self.path),
            (None, name) => AuditKey::from_env(name.as_deref().unwrap_or(KEY_ENV), env),
        }
    }

    /// The key that encrypts contents; none where they are not kept.
    pub fn contents_key(&self, env: Env<'_>) -> Result<Option<ContentsKey>, AuditError> {
        self.check()?;
        let name = self.contents_key_env.as_ref().filter(|_| self.contents == KeepContents::Encrypted);
        name.map(|name| ContentsKey::from_env(name, env)).transpose()
    }

    /// Every key that may open contents, the newest first; none where no key is named.
    pub fn opening_keys(&self, env: Env<'_>) -> Result<Option<ContentsKeys>, AuditError> {
        let names = self.contents_key_env.iter().chain(&self.contents_old_key_envs);
        let keys = names.map(|name| ContentsKey::from_env(name, env)).collect::<Result<Vec<_>, _>>()?;
        Ok((!keys.is_empty()).then_some(ContentsKeys(keys)))
    }

    /// The longest prompt, and the longest answer, that are kept; none where they are not.
    pub fn contents_bytes(&self) -> Option<usize> {
        (self.contents == KeepContents::Encrypted).then(|| self.max_contents_bytes.unwrap_or(MAX_CONTENTS_BYTES))
    }

    /// What can be wrong with it without a look at any key.
    ///
    /// # Errors
    /// [`AuditError::Config`]
    pub fn check(&self) -> Result<(), AuditError> {
        let wrong = |what: String| Err(AuditError::Config(what));
        self.fsync()?;
        if self.key_file.is_some() && self.key_env.is_some() {
            return wrong("it has both `key_env` and `key_file`; keep one of them".to_owned());
        }
        match (self.contents, &self.contents_key_env) {
            (KeepContents::None, Some(_)) => {
                return wrong(
                    "`contents_key_env` means nothing with `contents = \"none\"`; remove one of them".to_owned(),
                );
            }
            (KeepContents::Encrypted, None) => {
                return wrong(
                    "`contents = \"encrypted\"` needs `contents_key_env`, the variable that holds 32 random bytes"
                        .to_owned(),
                );
            }
            (KeepContents::None, None) | (KeepContents::Encrypted, Some(_)) => {}
        }
        let max_contents_bytes = self.max_contents_bytes.unwrap_or(MAX_CONTENTS_BYTES);
        // Escapes may make a text six times longer, and base64 by a third: two texts must fit into a line.
        if max_contents_bytes > 400 * 1024 {
            return wrong(format!("`max_contents_bytes` is {max_contents_bytes} and the limit is {}", 400 * 1024));
        }
        let none = [
            ("keep_segments", self.keep_segments),
            ("keep_days", self.keep_days),
            ("max_segment_hours", self.max_segment_hours),
            ("max_queued", self.max_queued.map(|count| count as u64)),
        ];
        if let Some((name, _)) = none.iter().find(|(_, value)| *value == Some(0)) {
            return wrong(format!("`{name}` is 0 and must be 1 or more"));
        }
        if let Some(bytes) = self.max_segment_bytes.filter(|bytes| *bytes < MIN_SEGMENT_BYTES) {
            return wrong(format!("`max_segment_bytes` is {bytes} and must be {MIN_SEGMENT_BYTES} or more"));
        }
        Ok(())
    }

    fn fsync(&self) -> Result<Fsync, AuditError> {
        match (self.fsync, self.fsync_ms) {
            (FsyncWhen::Interval, Some(ms)) if (1..=60_000).contains(&ms) => {
                Ok(Fsync::Every(Duration::from_millis(ms)))
            }
            (FsyncWhen::Interval, _) => {
                Err(AuditError::Config("`fsync = \"interval\"` needs `fsync_ms`, 1 to 60000".to_owned()))
            }
            (_, Some(_)) => {
                Err(AuditError::Config("`fsync_ms` means nothing without `fsync = \"interval\"`".to_owned()))
            }
            (FsyncWhen::Always, None) => Ok(Fsync::EveryBatch),
            (FsyncWhen::Never, None) => Ok(Fsync::Never),
        }
    }

    /// Reads the keys and checks the limits.
    pub fn journal(&self, env: Env<'_>) -> Result<JournalConfig, AuditError> {
        self.check()?;
        let fsync = self.fsync()?;
        let max_contents_bytes = self.max_contents_bytes.unwrap_or(MAX_CONTENTS_BYTES);
        Ok(JournalConfig {
            path: self.path.clone(),
            key: self.key(env)?,
            contents_key: self.contents_key(env)?,
            max_contents_bytes,
            fsync,
            max_segment_bytes: self.max_segment_bytes.unwrap_or(64 << 20),
            max_segment_age: HOUR.saturating_mul(self.max_segment_hours.unwrap_or(24).try_into().unwrap_or(u32::MAX)),
            retention: Retention {
                max_segments: self.keep_segments,
                max_age: self
                    .keep_days
                    .map(|days| HOUR.saturating_mul(days.saturating_mul(24).try_into().unwrap_or(u32::MAX))),
            },
        })
    }

    /// How the thread is started.
    pub fn writer(&self) -> WriterConfig {
        WriterConfig { on_failure: self.on_failure, max_queued: self.max_queued.unwrap_or(MAX_QUEUED) }
    }
}
