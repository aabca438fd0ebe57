//! A file or folder that is already here: used where it lies, checked like any other where a digest is known.

use std::path::{Path, PathBuf};

use crate::{
    HubError,
    cache::{Cache, Checked, Trust},
    card::CardFile,
    digest::Digest,
    options::FetchOptions,
    progress::SharedProgress,
};

/// A card's path source. With `[file]` it is that file, or a folder that holds it.
pub(crate) async fn fetch(
    path: &Path,
    file: Option<&CardFile>,
    cache: &Cache,
    progress: &SharedProgress,
) -> Result<PathBuf, HubError> {
    let Some(file) = file else {
        return if is_complete_folder(path) {
            Ok(path.to_owned())
        } else if path.exists() {
            Err(HubError::NoWeights { origin: path.display().to_string() })
        } else {
            Err(HubError::NoSuchPath { path: path.to_owned() })
        };
    };
    let path = if path.is_dir() { path.join(&file.name) } else { path.to_owned() };
    let expected = Digest::Sha256(file.sha256.clone());
    match cache.check(&path, Some(file.size), &expected, Trust::Records, progress).await? {
        Checked::Good => Ok(path),
        Checked::Missing => Err(HubError::NoSuchPath { path }),
        Checked::Broken(why) => Err(HubError::BadAnswer { origin: path.display().to_string(), why }),
    }
}

/// A folder that MODEL may name.
pub(crate) fn is_usable_folder(folder: &Path, options: &FetchOptions) -> bool {
    is_complete_folder(folder) || (options.config_suffices && folder.join("config.json").exists())
}

/// `config.json` and every safetensors file that the model consists of.
pub(crate) fn is_complete_folder(folder: &Path) -> bool {
    if !folder.join("config.json").exists() {
        return false;
    }
    let index = folder.join("model.safetensors.index.json");
    if !index.exists() {
        return folder.join("model.safetensors").exists();
    }
    std::fs::read(&index)
        .ok()
        .and_then(|text| shards_of_index(&text))
        .is_some_and(|shards| shards.iter().all(|shard| folder.join(shard).exists()))
}

/// The files a sharded model's index names; None where it is no such index.
pub(crate) fn shards_of_index(text: &[u8]) -> Option<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(text).ok()?;
    let mut shards: Vec<String> = index.weight_map.into_values().collect();
    shards.sort();
    shards.dedup();
    (!shards.is_empty() && shards.iter().all(|shard| crate::model_ref::is_safe_relative(shard))).then_some(shards)
}
