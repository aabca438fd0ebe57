//! An upstream's endpoint whose credential lies in a file that someone renews: looked at every second beside the requests, and
//! at once when the upstream refuses what was sent.
//!
//! Knows files and endpoints, no request. Invariant: requests read a pointer and never wait for the file system, and what
//! cannot be read (a file that is gone, empty, half written or no header) never takes the place of a credential that could.

use std::{
    fmt,
    io::Read as _,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, Weak},
    time::{Duration, SystemTime},
};

use futures::{FutureExt as _, future::BoxFuture};
use http::HeaderMap;

use crate::{
    providers::{Endpoint, Secret, endpoint::EndpointError},
    upstream::{Renew, Renewed},
};

/// Between two looks at the file.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The longest credential; a longer file is something else.
const MAX_BYTES: u64 = 64 << 10;

/// An upstream's endpoint now.
pub(super) enum LiveEndpoint {
    /// It stays.
    Fixed(Arc<Endpoint>),
    /// Its credential is read from a file.
    File(Arc<CredentialFile>),
}

impl LiveEndpoint {
    pub(super) fn current(&self) -> Arc<Endpoint> {
        match self {
            Self::Fixed(endpoint) => Arc::clone(endpoint),
            Self::File(file) => file.current(),
        }
    }
}

/// Makes an endpoint with another credential.
pub(super) type MakeEndpoint = Box<dyn Fn(Secret) -> Result<Endpoint, EndpointError> + Send + Sync>;

/// A credential's file, and the endpoint with what was last read from it.
pub(super) struct CredentialFile {
    upstream: Arc<str>,
    path: PathBuf,
    make: MakeEndpoint,
    current: RwLock<Arc<Endpoint>>,
    /// One look at a time, so that an older text never overwrites a newer.
    seen: tokio::sync::Mutex<Seen>,
}

/// What is known of the file.
struct Seen {
    stamp: Stamp,
    /// As it was last told.
    trouble: Option<String>,
}

/// What changes with a file's text: another file under the name, its time, its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    length: u64,
    inode: u64,
}

/// How a file is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    /// It is read where it looks changed.
    IfChanged,
    /// It is read.
    Anyhow,
}

impl fmt::Debug for CredentialFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CredentialFile").field("path", &self.path).finish_non_exhaustive()
    }
}

/// What can be wrong at the start.
#[derive(Debug)]
pub(super) enum CredentialError {
    /// The file.
    Unreadable(String),
    /// What is in it.
    Endpoint(EndpointError),
}

impl CredentialFile {
    /// Reads it for the first time. [`watch`](Self::watch) keeps it fresh.
    pub(super) fn open(upstream: Arc<str>, path: PathBuf, make: MakeEndpoint) -> Result<Arc<Self>, CredentialError> {
        let (stamp, secret) = read(&path).map_err(CredentialError::Unreadable)?;
        let endpoint = make(secret).map_err(CredentialError::Endpoint)?;
        let (current, seen) = (RwLock::new(Arc::new(endpoint)), tokio::sync::Mutex::new(Seen { stamp, trouble: None }));
        Ok(Arc::new(Self { upstream, path, make, current, seen }))
    }

    /// Looks at it again and again, until the last clone is gone.
    pub(super) fn watch(self: &Arc<Self>) {
        let weak = Arc::downgrade(self);
        tokio::spawn(watch(weak));
    }

    fn current(&self) -> Arc<Endpoint> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads what is new. What is wrong is told once, until it is right again.
    async fn look(&self, how: Look) {
        let mut seen = self.seen.lock().await;
        let (path, known) = (self.path.clone(), seen.stamp);
        let read = tokio::task::spawn_blocking(move || {
            if how == Look::IfChanged && Stamp::of(&path).is_ok_and(|stamp| stamp == known) {
                return Ok(None);
            }
            read(&path).map(Some)
        });
        let taken = match read.await {
            Ok(Ok(None)) => Ok(()),
            Ok(Ok(Some((stamp, secret)))) => (self.make)(secret).map_err(|error| error.to_string()).map(|endpoint| {
                seen.stamp = stamp;
                let endpoint = Arc::new(endpoint);
                let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
                if *current != endpoint {
                    tracing::info!(upstream = %self.upstream, path = %self.path.display(), "a new credential was read");
                }
                *current = endpoint;
            }),
            Ok(Err(why)) => Err(why),
            Err(error) => Err(error.to_string()),
        };
        match (taken, &seen.trouble) {
            (Ok(()), None) => {}
            (Ok(()), Some(_)) => {
                tracing::info!(upstream = %self.upstream, path = %self.path.display(), "the credential can be read again");
                seen.trouble = None;
            }
            (Err(why), told) if told.as_ref() == Some(&why) => {}
            (Err(why), _) => {
                tracing::warn!(
                    upstream = %self.upstream,
                    path = %self.path.display(),
                    "the credential cannot be read ({why}): the last one is kept until it can"
                );
                seen.trouble = Some(why);
            }
        }
    }

    /// The headers of a request that was refused, with the newest credential; None: they had it.
    fn instead_of(&self, refused: &HeaderMap) -> Option<Renewed> {
        let endpoint = self.current();
        let mut headers = refused.clone();
        for (name, value) in &endpoint.headers() {
            headers.insert(name, value.clone());
        }
        (headers != *refused).then(|| Renewed { headers, secret: endpoint.secret().cloned() })
    }
}

impl Renew for CredentialFile {
    fn renew<'a>(&'a self, refused: &'a HeaderMap) -> BoxFuture<'a, Option<Renewed>> {
        async move {
            if let Some(renewed) = self.instead_of(refused) {
                // It was renewed after the request was made: of many that were refused together one reads.
                return Some(renewed);
            }
            self.look(Look::Anyhow).await;
            self.instead_of(refused)
        }
        .boxed()
    }
}

impl Stamp {
    fn of(path: &Path) -> std::io::Result<Self> {
        Ok(Self::from(&std::fs::metadata(path)?))
    }
}

impl From<&std::fs::Metadata> for Stamp {
    fn from(file: &std::fs::Metadata) -> Self {
        #[cfg(unix)]
        let inode = std::os::unix::fs::MetadataExt::ino(file);
        #[cfg(not(unix))]
        let inode = 0;
        Self { modified: file.modified().ok(), length: file.len(), inode }
    }
}

/// The text and what the file looked like before it was read. Never an empty one.
fn read(path: &Path) -> Result<(Stamp, Secret), String> {
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let stamp = Stamp::from(&file.metadata().map_err(|error| error.to_string())?);
    let mut text = String::new();
    // What else could be wrong with it must not quote it.
    let length = file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(|error| match error.kind() {
        std::io::ErrorKind::InvalidData => "it is not UTF-8".to_owned(),
        _ => error.to_string(),
    })?;
    if length as u64 > MAX_BYTES {
        return Err(format!("it is longer than {MAX_BYTES} bytes"));
    }
    if text.trim().is_empty() {
        return Err("it is empty".to_owned());
    }
    Ok((stamp, Secret::new(&text)))
}

async fn watch(file: Weak<CredentialFile>) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(file) = file.upgrade() else { return };
        file.look(Look::IfChanged).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::providers::{Credential, Provider};

    fn open(path: &Path) -> Result<Arc<CredentialFile>, CredentialError> {
        let make = |secret| Endpoint::new(&Provider::Compatible, Some("http://h/v1"), Credential::Bearer(secret));
        CredentialFile::open("up".into(), path.to_owned(), Box::new(make))
    }

    fn sent(file: &CredentialFile) -> String {
        file.current().headers()["authorization"].to_str().unwrap().to_owned()
    }

    #[tokio::test]
    async fn a_changed_file_is_read_and_what_is_none_leaves_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        assert!(matches!(open(&path), Err(CredentialError::Unreadable(_))), "at the start there is nothing to keep");
        std::fs::write(&path, " \n").unwrap();
        assert!(matches!(open(&path), Err(CredentialError::Unreadable(why)) if why == "it is empty"));
        std::fs::write(&path, "one\n").unwrap();
        let file = open(&path).unwrap();
        assert_eq!(sent(&file), "Bearer one");
        file.look(Look::IfChanged).await;
        assert_eq!(sent(&file), "Bearer one");
        // As Kubernetes and az do it: another file takes the name.
        std::fs::write(folder.path().join("next"), "two\n").unwrap();
        std::fs::rename(folder.path().join("next"), &path).unwrap();
        file.look(Look::IfChanged).await;
        assert_eq!(sent(&file), "Bearer two");
        // In place.
        std::fs::write(&path, "three and longer\n").unwrap();
        file.look(Look::IfChanged).await;
        assert_eq!(sent(&file), "Bearer three and longer");
        let too_long = "x".repeat(MAX_BYTES as usize + 1);
        for none in [&b""[..], b"a\nb", b"\xff\xfe", too_long.as_bytes()] {
            std::fs::write(&path, none).unwrap();
            file.look(Look::IfChanged).await;
            assert_eq!(sent(&file), "Bearer three and longer");
            assert!(file.seen.lock().await.trouble.is_some(), "and it is told");
        }
        std::fs::remove_file(&path).unwrap();
        file.look(Look::IfChanged).await;
        assert_eq!(sent(&file), "Bearer three and longer");
        std::fs::write(&path, "four\n").unwrap();
        file.look(Look::IfChanged).await;
        assert_eq!((sent(&file).as_str(), file.seen.lock().await.trouble.clone()), ("Bearer four", None));
    }

    #[tokio::test]
    async fn a_refused_credential_is_read_again_at_once_and_another_offered() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "one").unwrap();
        let file = open(&path).unwrap();
        let mut refused = file.current().headers();
        refused.insert("content-type", "application/json".parse().unwrap());
        assert!(file.renew(&refused).await.is_none(), "the file has nothing newer");
        std::fs::write(&path, "two").unwrap();
        let renewed = file.renew(&refused).await.unwrap();
        assert_eq!(
            (&renewed.headers["authorization"], &renewed.headers["content-type"]),
            (&"Bearer two".parse().unwrap(), &refused["content-type"])
        );
        assert_eq!(renewed.secret.unwrap().expose(), "two");
        std::fs::remove_file(&path).unwrap();
        assert!(file.renew(&refused).await.is_some(), "what another request has renewed needs no file");
        assert!(file.renew(&renewed.headers).await.is_none());
    }
}
