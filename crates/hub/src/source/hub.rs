//! The Hugging Face hub, through hf-hub, into the cache that all Hugging Face tools share (`HF_HOME`).
//!
//! hf-hub knows endpoint, token, redirects and the xet store, and streams any byte range of a file. What it does not do
//! is done here: its own `download_file` begins again from nothing after a cut, never looks at a digest and waits
//! without bound. So: ask for size and ETag, stream the missing range into `blobs/<etag>.incomplete` (the name
//! huggingface_hub uses, so either can go on with the other's partial file) under the same lock file, check the digest,
//! rename to `blobs/<etag>`, link it from `snapshots/<commit>/<file>`.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use futures::StreamExt;
use hf_hub::{
    HFClient, HFError,
    repository::{HFRepository, RepoTreeEntry, RepoTypeModel},
};
use tokio::io::AsyncWriteExt;

use crate::{
    FetchOptions, HubError,
    cache::{Cache, Checked, Trust, check_space, lock_file, rename_into_place, write_atomically},
    card::CardFile,
    digest::{self, Digest},
    model_ref::is_safe_relative,
    progress::{SharedProgress, Task},
    source::path::{is_complete_folder, shards_of_index},
};

/// Entries of a repository that are looked at.
const MAX_REPO_FILES: usize = 10_000;
/// Beside the weights, what tokenizer, template and generation defaults are made of.
const SIDE_FILES: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// A repository at a revision.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HubRepo<'a> {
    /// `org/repo`.
    pub(crate) repo: &'a str,
    /// None: `main`.
    pub(crate) revision: Option<&'a str>,
}

/// A file of the hub that lies here.
#[derive(Clone, Debug)]
pub(crate) struct HubFile {
    pub(crate) path: PathBuf,
    pub(crate) digest: Option<Digest>,
    commit: String,
}

impl HubRepo<'_> {
    fn revision(&self) -> &str {
        self.revision.unwrap_or("main")
    }

    fn folder(&self, options: &FetchOptions) -> PathBuf {
        options.hub_cache_dir().join(self.folder_name())
    }

    fn folder_name(&self) -> String {
        format!("models--{}", self.repo.replace('/', "--"))
    }

    /// The folder of the snapshot that is cached for this revision.
    pub(crate) fn cached_snapshot(&self, options: &FetchOptions) -> Option<PathBuf> {
        let folder = self.folder(options);
        let commit = if is_commit(self.revision()) {
            self.revision().to_owned()
        } else {
            std::fs::read_to_string(folder.join("refs").join(self.revision())).ok()?.trim().to_owned()
        };
        if !is_commit(&commit) {
            return None;
        }
        Some(folder.join("snapshots").join(commit)).filter(|snapshot| snapshot.is_dir())
    }
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// What the shared cache holds of one file, checked. The digest is the card's, or the one the blob is named by.
pub(crate) async fn cached_file(
    repo: HubRepo<'_>,
    file: &str,
    card: Option<&CardFile>,
    cache: &Cache,
    options: &FetchOptions,
    trust: Trust,
    progress: &SharedProgress,
) -> Result<(Checked, Option<HubFile>), HubError> {
    let Some(snapshot) = repo.cached_snapshot(options) else { return Ok((Checked::Missing, None)) };
    let path = snapshot.join(file);
    let Ok(blob) = std::fs::canonicalize(&path) else { return Ok((Checked::Missing, None)) };
    let digest = match card {
        Some(card) => Some(Digest::Sha256(card.sha256.clone())),
        None => blob.file_name().and_then(|name| name.to_str()).and_then(Digest::from_etag),
    };
    let commit = snapshot.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let found = HubFile { path, digest: digest.clone(), commit };
    let Some(digest) = digest else {
        // Copied there by other means (no link to a blob): nothing is promised about it, so nothing can be checked.
        return Ok((Checked::Good, Some(found)));
    };
    let checked = cache.check(&blob, card.map(|card| card.size), &digest, trust, progress).await?;
    Ok((checked, Some(found)))
}

/// What the shared cache holds of a whole model: every file of the snapshot checked.
pub(crate) async fn cached_model(
    repo: HubRepo<'_>,
    cache: &Cache,
    options: &FetchOptions,
    trust: Trust,
    progress: &SharedProgress,
) -> Result<(Checked, Option<PathBuf>), HubError> {
    let Some(snapshot) = repo.cached_snapshot(options).filter(|snapshot| is_complete_folder(snapshot)) else {
        return Ok((Checked::Missing, None));
    };
    let entries = std::fs::read_dir(&snapshot).map_err(|error| HubError::io("read", &snapshot, error))?;
    for entry in entries.flatten().take(MAX_REPO_FILES) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_used =
            SIDE_FILES.contains(&name.as_str()) || name.ends_with(".safetensors") || name.ends_with(".index.json");
        if !is_used {
            continue;
        }
        let (checked, _) = cached_file(repo, &name, None, cache, options, trust, progress).await?;
        match checked {
            Checked::Good => {}
            Checked::Missing => return Ok((Checked::Missing, None)),
            Checked::Broken(why) => return Ok((Checked::Broken(format!("{name}: {why}")), Some(snapshot))),
        }
    }
    Ok((Checked::Good, Some(snapshot)))
}

/// A session with the hub: one client, one repository.
pub(crate) struct Hub<'a> {
    api: HFRepository<RepoTypeModel>,
    repo: HubRepo<'a>,
    cache: &'a Cache,
    options: &'a FetchOptions,
    progress: &'a SharedProgress,
}

impl<'a> Hub<'a> {
    pub(crate) fn open(
        repo: HubRepo<'a>,
        cache: &'a Cache,
        options: &'a FetchOptions,
        progress: &'a SharedProgress,
    ) -> Result<Self, HubError> {
        let origin = || format!("hub {}", repo.repo);
        let http = reqwest::Client::builder()
            .user_agent(concat!("bindery/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(options.limits.reach / 2)
            .read_timeout(options.limits.stall)
            .build()
            .map_err(|error| HubError::Unreachable { origin: origin(), why: reason(&error) })?;
        let mut builder = HFClient::builder().client(http).retry_max_attempts(1).cache_dir(options.hub_cache_dir());
        if let Some(endpoint) = &options.hub.endpoint {
            builder = builder.endpoint(endpoint);
        }
        if let Some(token) = &options.hub.token {
            builder = builder.token(token);
        }
        let client = builder.build().map_err(|error| HubError::BadAnswer {
            origin: origin(),
            why: format!("HF_ENDPOINT is no URL ({error})"),
        })?;
        let (owner, name) = hf_hub::split_id(repo.repo);
        Ok(Self { api: client.model(owner, name), repo, cache, options, progress })
    }

    /// One file, from the cache's own partial file on. With a card, size and digest are the card's.
    pub(crate) async fn fetch_file(&self, file: &str, card: Option<&CardFile>) -> Result<HubFile, HubError> {
        self.fetch_file_at(file, self.repo.revision(), card).await
    }

    async fn fetch_file_at(&self, file: &str, revision: &str, card: Option<&CardFile>) -> Result<HubFile, HubError> {
        let remote = self.ask(file, revision, card).await?;
        let folder = self.repo.folder(self.options);
        let blob = folder.join("blobs").join(&remote.etag);
        let lock = self
            .options
            .hub_cache_dir()
            .join(".locks")
            .join(self.repo.folder_name())
            .join(format!("{}.lock", remote.etag));
        let _lock = lock_file(&lock, file, self.progress).await?;
        // Whoever held the lock may have brought it.
        let present = match &remote.digest {
            Some(digest) => self.cache.check(&blob, remote.size, digest, Trust::Records, self.progress).await?,
            None if blob.exists() => Checked::Good,
            None => Checked::Missing,
        };
        if let Checked::Broken(why) = &present {
            self.progress.note(&format!("the cached copy of {file} is broken ({why}): fetching it again"));
        }
        if present != Checked::Good {
            self.bring(file, &remote, &blob).await?;
        }
        let path = self.link(file, &remote, &blob)?;
        Ok(HubFile { path, digest: remote.digest, commit: remote.commit })
    }

    /// Size, digest and commit of a file, checked before anything is built from them.
    async fn ask(&self, file: &str, revision: &str, card: Option<&CardFile>) -> Result<Remote, HubError> {
        let asked = self.api.get_file_metadata().filepath(file).revision(revision).send();
        let answer = self.within_reach(asked).await?;
        let safe_etag = !answer.etag.is_empty()
            && answer.etag.len() <= 128
            && answer.etag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if !safe_etag || !is_commit(&answer.commit_hash) {
            return Err(HubError::BadAnswer {
                origin: self.origin(),
                why: format!("ETag {:?} and commit {:?} for {file}", answer.etag, answer.commit_hash),
            });
        }
        let size = Some(answer.file_size).filter(|size| *size > 0);
        let promised = Digest::from_etag(&answer.etag);
        let digest = match card {
            Some(card) => {
                if let Some(actual) = size.filter(|size| *size != card.size) {
                    let (what, origin, expected) = (file.to_owned(), self.origin(), card.size);
                    return Err(HubError::WrongSize { what, origin, expected, actual });
                }
                if let Some(actual) = promised.as_ref().and_then(Digest::sha256).filter(|sha| *sha != card.sha256) {
                    return Err(HubError::WrongDigest {
                        what: file.to_owned(),
                        origin: self.origin(),
                        expected: format!("sha256:{}", card.sha256),
                        actual: format!("sha256:{actual}"),
                    });
                }
                Some(Digest::Sha256(card.sha256.clone()))
            }
            None => promised,
        };
        let size = card.map_or(size, |card| Some(card.size));
        Ok(Remote { etag: answer.etag, commit: answer.commit_hash, size, digest })
    }

    /// Downloads into the partial file until it is whole, checks it and gives it its name.
    async fn bring(&self, file: &str, remote: &Remote, blob: &Path) -> Result<(), HubError> {
        let partial = blob.with_file_name(format!("{}.incomplete", remote.etag));
        let folder = blob.parent().expect("blobs lie in a folder");
        std::fs::create_dir_all(folder).map_err(|error| HubError::io("create", folder, error))?;
        let had_partial = std::fs::metadata(&partial).is_ok_and(|metadata| metadata.len() > 0);
        let mut may_start_over = had_partial;
        loop {
            self.download(file, remote, &partial).await?;
            let Some(expected) = &remote.digest else { break };
            let actual = digest::of_file(&partial, expected, self.progress)
                .await
                .map_err(|error| HubError::io("read", &partial, error))?;
            if actual == *expected {
                break;
            }
            remove(&partial)?;
            if !may_start_over {
                return Err(HubError::WrongDigest {
                    what: file.to_owned(),
                    origin: self.origin(),
                    expected: expected.to_string(),
                    actual: actual.to_string(),
                });
            }
            self.progress.note(&format!("what an earlier try left of {file} does not fit the rest: starting over"));
            may_start_over = false;
        }
        rename_into_place(&partial, blob)?;
        if let Some(digest) = &remote.digest {
            self.cache.record(blob, digest);
        }
        Ok(())
    }

    /// Fills the partial file, going on after every cut as long as each try brings something. Until the first byte has come
    /// the hub's storage counts as not reached yet (it may be another host than the one that described the file).
    async fn download(&self, file: &str, remote: &Remote, partial: &Path) -> Result<(), HubError> {
        let length = |path: &Path| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
        let mut received = length(partial);
        // Without a known size nothing tells where the partial file ends, so it cannot be gone on with.
        if remote.size.is_none_or(|size| received > size) {
            remove(partial)?;
            received = 0;
        }
        let missing = remote.size.unwrap_or(0).saturating_sub(received);
        check_space(self.options.free_space, partial.parent().expect("it lies in a folder"), missing)?;
        let task = Task::start(self.progress.as_ref(), &format!("downloading {file}"), remote.size);
        task.advance(received);
        let limits = self.options.limits;
        let reach_until = Instant::now() + limits.reach;
        let mut is_reached = false;
        let mut fruitless_tries = 0;
        while remote.size != Some(received) {
            let patience =
                if is_reached { limits.stall } else { reach_until.saturating_duration_since(Instant::now()) };
            let outcome = self.stream_once(file, remote, partial, received, patience, &task).await;
            let now = length(partial);
            is_reached |= now > received;
            match outcome {
                Ok(()) if remote.size.is_none_or(|size| size == now) => return Ok(()),
                Err(error @ (HubError::DiskFull { .. } | HubError::Io { .. } | HubError::WrongSize { .. })) => {
                    return Err(error);
                }
                outcome => {
                    fruitless_tries = if now > received { 0 } else { fruitless_tries + 1 };
                    let pause = limits.retry_pause * fruitless_tries;
                    if fruitless_tries >= limits.max_fruitless_tries
                        || (!is_reached && Instant::now() + pause >= reach_until)
                    {
                        return Err(HubError::Cut {
                            what: file.to_owned(),
                            origin: self.origin(),
                            received: now,
                            total: remote.size.unwrap_or(0),
                            why: outcome
                                .map_or_else(|error| error.to_string(), |()| "the connection was closed".to_owned()),
                        });
                    }
                    tokio::time::sleep(pause).await;
                    received = now;
                    if remote.size.is_none() {
                        remove(partial)?;
                        received = 0;
                    }
                }
            }
        }
        Ok(())
    }

    /// One request; appends what comes. Waits for the first byte as long as `patience`, then for each as long as a stall may
    /// be. The partial file is flushed however it ends, so that its length is true.
    async fn stream_once(
        &self,
        file: &str,
        remote: &Remote,
        partial: &Path,
        offset: u64,
        patience: Duration,
        task: &Task<'_>,
    ) -> Result<(), HubError> {
        let range = remote.size.filter(|_| offset > 0).map(|size| offset..size);
        let asked =
            self.api.download_file_stream().filename(file).revision(remote.commit.as_str()).maybe_range(range).send();
        let asked_at = Instant::now();
        let (length, mut stream) = self.within(patience, asked).await?;
        let mut patience = patience.saturating_sub(asked_at.elapsed());
        let mut written = offset;
        let mut output = if offset > 0 && length != remote.size {
            tokio::fs::OpenOptions::new().append(true).open(partial).await
        } else {
            // The first request; or a server that ignores ranges and sends the whole file again.
            written = 0;
            tokio::fs::File::create(partial).await
        }
        .map_err(|error| HubError::io("open", partial, error))?;
        let mut outcome = Ok(());
        loop {
            let chunk = match tokio::time::timeout(patience, stream.next()).await {
                Ok(Some(Ok(chunk))) => chunk,
                Ok(Some(Err(error))) => {
                    outcome = Err(self.explain(error));
                    break;
                }
                Ok(None) => break,
                Err(_) => {
                    let why = format!("nothing came for {:.0} s", asked_at.elapsed().as_secs_f64());
                    outcome = Err(HubError::Unreachable { origin: self.origin(), why });
                    break;
                }
            };
            patience = self.options.limits.stall;
            written += chunk.len() as u64;
            if let Some(expected) = remote.size.filter(|size| written > *size) {
                drop(output);
                remove(partial)?;
                let (what, origin) = (file.to_owned(), self.origin());
                return Err(HubError::WrongSize { what, origin, expected, actual: written });
            }
            if let Err(error) = output.write_all(&chunk).await {
                outcome = Err(HubError::io("write", partial, error));
                break;
            }
            if written > offset {
                task.advance((chunk.len() as u64).min(written - offset));
            }
        }
        let flushed = match output.flush().await {
            Ok(()) => output.sync_all().await,
            Err(error) => Err(error),
        };
        outcome.and(flushed.map_err(|error| HubError::io("write", partial, error)))
    }

    /// `snapshots/<commit>/<file>` and the branch's name, as every Hugging Face tool expects them.
    fn link(&self, file: &str, remote: &Remote, blob: &Path) -> Result<PathBuf, HubError> {
        let folder = self.repo.folder(self.options);
        let pointer = folder.join("snapshots").join(&remote.commit).join(file);
        let parent = pointer.parent().expect("a file in a snapshot has a folder");
        std::fs::create_dir_all(parent).map_err(|error| HubError::io("create", parent, error))?;
        let points_there = match (std::fs::canonicalize(&pointer), std::fs::canonicalize(blob)) {
            (Ok(target), Ok(blob)) => target == blob,
            _ => false,
        };
        if !points_there {
            let _ = std::fs::remove_file(&pointer);
            place(blob, &pointer, &format!("{}blobs/{}", "../".repeat(file.split('/').count() + 1), remote.etag))
                .map_err(|error| HubError::io("create", &pointer, error))?;
        }
        let revision = self.repo.revision();
        if !is_commit(revision) {
            let reference = folder.join("refs").join(revision);
            write_atomically(&reference, remote.commit.as_bytes())
                .map_err(|error| HubError::io("write", &reference, error))?;
        }
        Ok(pointer)
    }

    /// A whole model: config, tokenizer and safetensors, or the one GGUF file of the repository.
    pub(crate) async fn fetch_model(&self) -> Result<(PathBuf, Option<Digest>), HubError> {
        let files = self.list().await?;
        let has = |name: &str| files.iter().any(|file| file == name);
        if !has("config.json") || !files.iter().any(|file| file.ends_with(".safetensors")) {
            let mut ggufs: Vec<String> =
                files.into_iter().filter(|file| file.to_lowercase().ends_with(".gguf")).collect();
            ggufs.sort();
            return match ggufs.as_slice() {
                [] => Err(HubError::NoWeights { origin: format!("the repository {}", self.repo.repo) }),
                [file] => self.fetch_file(file, None).await.map(|file| (file.path, file.digest)),
                _ => Err(HubError::ChooseFile { repo: self.repo.repo.to_owned(), files: ggufs }),
            };
        }
        // All files of one commit, whatever is pushed meanwhile.
        let config = self.fetch_file("config.json", None).await?;
        let snapshot = config.path.parent().expect("a file in a snapshot has a folder").to_owned();
        let at = |file: String| {
            let commit = config.commit.clone();
            async move { self.fetch_file_at(&file, &commit, None).await }
        };
        for file in SIDE_FILES.into_iter().skip(1).filter(|file| has(file)) {
            at(file.to_owned()).await?;
        }
        let index = "model.safetensors.index.json";
        let shards = if has(index) {
            let file = at(index.to_owned()).await?;
            let text = std::fs::read(&file.path).map_err(|error| HubError::io("read", &file.path, error))?;
            shards_of_index(&text)
                .ok_or_else(|| HubError::BadAnswer { origin: self.origin(), why: format!("{index} lists no files") })?
        } else {
            vec!["model.safetensors".to_owned()]
        };
        for shard in shards {
            at(shard).await?;
        }
        Ok((snapshot, None))
    }

    /// A file and others beside it, all of one commit; their folder.
    pub(crate) async fn fetch_folder(&self, first: &str, others: &[&str]) -> Result<PathBuf, HubError> {
        let first = self.fetch_file(first, None).await?;
        for file in others {
            self.fetch_file_at(file, &first.commit, None).await?;
        }
        Ok(first.path.parent().expect("a file in a snapshot has a folder").to_owned())
    }

    /// Files at the top of the repository.
    pub(crate) async fn list(&self) -> Result<Vec<String>, HubError> {
        let stream = self
            .api
            .list_tree()
            .revision(self.repo.revision())
            .limit(MAX_REPO_FILES)
            .send()
            .map_err(|error| self.explain(error))?;
        let mut stream = std::pin::pin!(stream);
        let mut files = Vec::new();
        loop {
            let next = async { stream.next().await.transpose() };
            match self.within_reach(next).await? {
                None => return Ok(files),
                Some(RepoTreeEntry::File { path, .. }) if is_safe_relative(&path) && !path.contains('/') => {
                    files.push(path);
                }
                Some(_) => {}
            }
        }
    }

    /// The first answer of a source: soon, or the next source's turn.
    async fn within_reach<T>(&self, asked: impl Future<Output = Result<T, HFError>>) -> Result<T, HubError> {
        self.within(self.options.limits.reach, asked).await
    }

    async fn within<T>(&self, limit: Duration, asked: impl Future<Output = Result<T, HFError>>) -> Result<T, HubError> {
        match tokio::time::timeout(limit, asked).await {
            Ok(answer) => answer.map_err(|error| self.explain(error)),
            Err(_) => Err(HubError::Unreachable {
                origin: self.origin(),
                why: format!("no answer within {:.0} s", limit.as_secs_f64()),
            }),
        }
    }

    fn origin(&self) -> String {
        format!("hub {}", self.repo.repo)
    }

    fn explain(&self, error: HFError) -> HubError {
        let repo = self.repo.repo.to_owned();
        match error {
            HFError::AuthRequired { context } => HubError::Gated {
                repo,
                why: match &context.server_message {
                    Some(message) => first_line(message),
                    None => "it is gated, private or does not exist, and no valid token was sent".to_owned(),
                },
            },
            HFError::Forbidden { context } => HubError::Gated {
                repo,
                why: match &context.server_message {
                    Some(message) => first_line(message),
                    None => "the token's account has no access to it".to_owned(),
                },
            },
            HFError::RepoNotFound { .. } => HubError::NotOnHub { what: format!("repository {repo}") },
            HFError::RevisionNotFound { revision, .. } => {
                HubError::NotOnHub { what: format!("revision {revision} of {repo}") }
            }
            HFError::EntryNotFound { path, .. } => {
                HubError::NotOnHub { what: format!("file {path} in {repo} at {}", self.repo.revision()) }
            }
            HFError::Request { source, .. } => HubError::Unreachable { origin: self.origin(), why: reason(&source) },
            HFError::RateLimited { .. } => HubError::RateLimited { origin: self.origin() },
            HFError::Http { context } if context.status.is_server_error() => {
                HubError::Unreachable { origin: self.origin(), why: format!("it answered {}", context.status) }
            }
            error => HubError::BadAnswer { origin: self.origin(), why: first_line(&error.to_string()) },
        }
    }
}

/// A file as the hub describes it.
struct Remote {
    etag: String,
    commit: String,
    size: Option<u64>,
    digest: Option<Digest>,
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().take(300).collect()
}

/// The innermost reason says most ("Connection refused"); what wraps it repeats URLs.
fn reason(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(inner) = innermost.source() {
        innermost = inner;
    }
    innermost.to_string()
}

fn remove(path: &Path) -> Result<(), HubError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(HubError::io("remove", path, error)),
        _ => Ok(()),
    }
}

#[cfg(unix)]
fn place(_blob: &Path, pointer: &Path, relative: &str) -> std::io::Result<()> {
    std::os::unix::fs::symlink(relative, pointer)
}

#[cfg(not(unix))]
fn place(blob: &Path, pointer: &Path, _relative: &str) -> std::io::Result<()> {
    std::fs::hard_link(blob, pointer).or_else(|_| std::fs::copy(blob, pointer).map(drop))
}
