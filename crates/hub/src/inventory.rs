//! What is on this machine: the rows of `bindery models`, and reading everything again for `bindery models verify`.

use std::path::PathBuf;

use crate::{
    Card, Cards, FetchOptions, HubError, ModelRef, SharedProgress,
    cache::{Cache, Checked, Trust},
    card::CardSource,
    digest::Digest,
    fetch::ggufs_in,
    source::{
        hub::{HubRepo, cached_file, cached_model},
        path::{is_complete_folder, is_usable_folder},
    },
};

/// A card, and where its model lies if it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CardRow {
    /// The card.
    pub card: Card,
    /// File or folder; only looked at, not read.
    pub path: Option<PathBuf>,
}

/// All cards in order.
pub fn list(options: &FetchOptions) -> Result<Vec<CardRow>, HubError> {
    let cards = Cards::load(options.cards_dir.as_deref())?;
    Ok(cards.iter().map(|card| CardRow { card: card.clone(), path: locate(card, options) }).collect())
}

/// Where a card's model lies, by size and presence alone.
pub fn locate(card: &Card, options: &FetchOptions) -> Option<PathBuf> {
    let right_size = |path: PathBuf| {
        let size = std::fs::metadata(&path).ok()?.len();
        card.file.as_ref().is_none_or(|file| file.size == size).then_some(path)
    };
    if let Some(file) = &card.file
        && let Some(path) = right_size(Cache::new(&options.cache_dir).model_dir(&card.name).join(&file.name))
    {
        return Some(path);
    }
    card.sources.iter().find_map(|source| match source {
        CardSource::Hub { repo, revision, file } => {
            let snapshot = HubRepo { repo, revision: revision.as_deref() }.cached_snapshot(options)?;
            match file {
                Some(file) => right_size(snapshot.join(file)),
                None => Some(snapshot).filter(|folder| is_complete_folder(folder)),
            }
        }
        CardSource::Path { path } => match &card.file {
            Some(file) => right_size(if path.is_dir() { path.join(&file.name) } else { path.clone() }),
            None => Some(path.clone()).filter(|folder| is_complete_folder(folder)),
        },
        CardSource::Wheel { .. } => None,
    })
}

/// Where the model that MODEL means lies on this machine, by size and presence alone; `None` where it would have to be
/// fetched first.
///
/// # Errors
/// As [`crate::resolve`] has them for a MODEL that cannot be fetched anywhere: no such card or path, a folder without weights.
pub fn locate_model(reference: &ModelRef, options: &FetchOptions) -> Result<Option<PathBuf>, HubError> {
    match reference {
        ModelRef::Card(name) => Ok(locate(Cards::load(options.cards_dir.as_deref())?.find(name)?, options)),
        ModelRef::File(path) => Ok(Some(path.clone())),
        ModelRef::Directory(path) if is_usable_folder(path, options) => Ok(Some(path.clone())),
        ModelRef::Directory(path) => Err(HubError::NoWeights { origin: format!("the folder {}", path.display()) }),
        ModelRef::Hub { repo, revision, file } => {
            let snapshot = HubRepo { repo, revision: revision.as_deref() }.cached_snapshot(options);
            Ok(snapshot.and_then(|snapshot| match file {
                Some(file) => Some(snapshot.join(file)).filter(|path| path.is_file()),
                None if is_complete_folder(&snapshot) => Some(snapshot),
                // A repository of one GGUF file may have been fetched without naming it.
                None => match &ggufs_in(&snapshot)[..] {
                    [only] => Some(snapshot.join(only)),
                    _ => None,
                },
            }))
        }
    }
}

/// Reads every cached byte of a card's model again, whatever the records say.
pub async fn verify(card: &Card, options: &FetchOptions, progress: &SharedProgress) -> Result<Checked, HubError> {
    let cache = Cache::new(&options.cache_dir);
    let Some(path) = locate(card, options) else {
        // A file of the wrong size is not located, and broken all the same.
        let own = card.file.as_ref().map(|file| cache.model_dir(&card.name).join(&file.name));
        return match (own.filter(|path| path.exists()), &card.file) {
            (Some(path), Some(file)) => {
                cache
                    .check(&path, Some(file.size), &Digest::Sha256(file.sha256.clone()), Trust::Nothing, progress)
                    .await
            }
            _ => Ok(Checked::Missing),
        };
    };
    if let Some(file) = &card.file {
        // The blob behind a link is what the records speak of.
        let path = std::fs::canonicalize(&path).unwrap_or(path);
        return cache
            .check(&path, Some(file.size), &Digest::Sha256(file.sha256.clone()), Trust::Nothing, progress)
            .await;
    }
    for source in &card.sources {
        let CardSource::Hub { repo, revision, file } = source else { continue };
        let repo = HubRepo { repo, revision: revision.as_deref() };
        let (checked, _) = match file {
            Some(file) => {
                let (checked, found) = cached_file(repo, file, None, &cache, options, Trust::Nothing, progress).await?;
                (checked, found.map(|file| file.path))
            }
            None => cached_model(repo, &cache, options, Trust::Nothing, progress).await?,
        };
        if checked != Checked::Missing {
            return Ok(checked);
        }
    }
    Ok(Checked::Good)
}

/// Removes a card's weights from Bindery's own cache. False: there were none there (a copy in the hub's shared cache
/// belongs to other tools too and is left alone).
pub fn remove(card: &Card, options: &FetchOptions) -> Result<bool, HubError> {
    let folder = Cache::new(&options.cache_dir).model_dir(&card.name);
    match std::fs::remove_dir_all(&folder) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(HubError::io("remove", folder, error)),
    }
}
