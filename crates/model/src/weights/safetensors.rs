//! safetensors checkpoints: one file, or shards under an index, mapped.
//!
//! The `safetensors` crate checks headers (sizes, gaps, overlaps, the file's length); this file finds the shards, keeps
//! them inside the model's directory, and names what is wrong. It must not know what a model is. Its invariant: a
//! [`Entry`]'s range lies within its file and fits its shape.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::{Component, Path, PathBuf},
};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::{
    WeightFormat,
    mmap::{MappedFile, read_text},
};
use crate::ModelError;

pub(super) const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
/// Indices in use have up to some MB.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Each shard is an open file; the largest models in use have some 200.
const MAX_SHARDS: usize = 512;
/// The length of the header, before it.
const LENGTH_BYTES: usize = 8;

/// The opened files of a checkpoint and the table of its tensors.
#[derive(Debug)]
pub(super) struct Checkpoint {
    pub(super) files: Vec<MappedFile>,
    pub(super) entries: BTreeMap<String, Entry>,
    /// Tensors that the index promised in a file that does not hold them.
    missing: BTreeMap<String, PathBuf>,
}

/// Where a tensor is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Index into `files`.
    pub(super) file: usize,
    pub(super) range: Range<usize>,
    pub(super) shape: Vec<usize>,
    pub(super) dtype: Dtype,
}

impl Entry {
    /// None for a type that weights are not computed from.
    pub(super) fn format(&self) -> Option<WeightFormat> {
        match self.dtype {
            Dtype::F32 => Some(WeightFormat::F32),
            Dtype::F16 => Some(WeightFormat::F16),
            Dtype::BF16 => Some(WeightFormat::Bf16),
            _ => None,
        }
    }
}

impl Checkpoint {
    /// Opens `model.safetensors`, else all shards of `model.safetensors.index.json`.
    pub(super) fn open(directory: &Path) -> Result<Self, ModelError> {
        let single = directory.join(SINGLE_FILE);
        let index = directory.join(INDEX_FILE);
        let mut checkpoint = Self { files: Vec::new(), entries: BTreeMap::new(), missing: BTreeMap::new() };
        if single.exists() {
            checkpoint.add_file(MappedFile::open(&single)?, |_| true)?;
        } else if index.exists() {
            checkpoint.add_shards(directory, &index)?;
        } else {
            return Err(ModelError::bad_file(
                directory,
                format!(
                    "no weights here: neither {SINGLE_FILE} nor {INDEX_FILE} is in the folder (weights in other forms, \
                     such as pytorch_model.bin, have to be saved as safetensors first)"
                ),
            ));
        }
        Ok(checkpoint)
    }

    /// One file, whatever its name.
    pub(super) fn of_file(file: MappedFile) -> Result<Self, ModelError> {
        let mut checkpoint = Self { files: Vec::new(), entries: BTreeMap::new(), missing: BTreeMap::new() };
        checkpoint.add_file(file, |_| true)?;
        Ok(checkpoint)
    }

    /// A tensor, or which file should have held it.
    pub(super) fn get(&self, name: &str) -> Result<Option<&Entry>, String> {
        match (self.entries.get(name), self.missing.get(name)) {
            (Some(entry), _) => Ok(Some(entry)),
            (None, Some(file)) => {
                Err(format!("tensor {name:?} is missing from {}, where the index places it", file.display()))
            }
            (None, None) => Ok(None),
        }
    }

    /// Whether two tensors consist of the same bytes. Pages are given back on the way: both may be large.
    pub(super) fn hold_the_same(&self, a: &Entry, b: &Entry) -> bool {
        const STEP: usize = 8 << 20;
        a.range.len() == b.range.len()
            && (0..a.range.len()).step_by(STEP).all(|start| {
                let end = (start + STEP).min(a.range.len());
                let [a, b] = [a, b].map(|entry| {
                    let range = entry.range.start + start..entry.range.start + end;
                    (&self.files[entry.file], range)
                });
                let same = a.0.bytes()[a.1.clone()] == b.0.bytes()[b.1.clone()];
                a.0.release(&a.1);
                b.0.release(&b.1);
                same
            })
    }

    fn add_shards(&mut self, directory: &Path, index: &Path) -> Result<(), ModelError> {
        let weight_map = read_index(index)?;
        let shards: BTreeSet<&PathBuf> = weight_map.values().collect();
        if shards.len() > MAX_SHARDS {
            let what = format!("{} shards are named; at most {MAX_SHARDS} are opened", shards.len());
            return Err(ModelError::bad_file(index, what));
        }
        for shard in shards {
            let path = directory.join(shard);
            if !path.exists() {
                let what = format!("the shard {} is missing; fetch the model again", shard.display());
                return Err(ModelError::bad_file(index, what));
            }
            // A name that stands in two shards belongs to the one the index names.
            self.add_file(MappedFile::open(&path)?, |name| weight_map.get(name).is_none_or(|place| place == shard))?;
        }
        self.missing = weight_map.into_iter().filter(|(name, _)| !self.entries.contains_key(name)).collect();
        Ok(())
    }

    fn add_file(&mut self, map: MappedFile, wanted: impl Fn(&str) -> bool) -> Result<(), ModelError> {
        let path = map.path();
        let (header_bytes, header) = SafeTensors::read_metadata(map.bytes()).map_err(|error| {
            ModelError::bad_file(path, format!("not a sound safetensors file: {error}; save or fetch it again"))
        })?;
        let data_start = LENGTH_BYTES + header_bytes;
        let file = self.files.len();
        for (name, info) in header.tensors() {
            if wanted(&name) {
                let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
                // The crate has checked the offsets against the buffer; slicing later relies on it.
                if map.bytes().get(range.clone()).is_none() {
                    return Err(ModelError::bad_file(path, format!("tensor {name:?} lies outside of the file")));
                }
                self.entries.insert(name, Entry { file, range, shape: info.shape.clone(), dtype: info.dtype });
            }
        }
        self.files.push(map);
        Ok(())
    }
}

/// Tensor name to shard, each a path inside the directory.
fn read_index(index: &Path) -> Result<BTreeMap<String, PathBuf>, ModelError> {
    let wrong = |what: String| ModelError::bad_file(index, what);
    let text = read_text(index, MAX_INDEX_BYTES)?;
    let value: Value = serde_json::from_str(&text).map_err(|error| wrong(format!("not valid JSON: {error}")))?;
    let map = value
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| wrong("weight_map is missing or not an object".to_owned()))?;
    map.iter()
        .map(|(name, shard)| {
            let shard = shard.as_str().ok_or_else(|| wrong(format!("the shard of {name:?} is not a text")))?;
            Ok((name.clone(), confined(shard).map_err(wrong)?))
        })
        .collect()
}

/// A path that stays inside the directory it is joined to. (Links inside it may lead out: that is how the hub's cache is
/// built, and whoever can place links there owns the files anyway.)
fn confined(shard: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(shard);
    // Backslashes are separators on Windows only; refusing them everywhere means the same everywhere.
    let inside = path.components().all(|part| matches!(part, Component::Normal(_)));
    if inside && !shard.is_empty() && !shard.contains('\\') && !shard.contains('\0') {
        return Ok(path);
    }
    Err(format!("the shard path {shard:?} leads out of the model's folder; only plain relative paths are followed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_inside_the_folder_are_followed() {
        for good in ["model-00001-of-00002.safetensors", "weights/a.safetensors"] {
            assert_eq!(confined(good), Ok(PathBuf::from(good)));
        }
        for bad in ["", "..", "../x", "a/../../x", "/etc/passwd", "./x", "a\\..\\x", "x\0"] {
            assert!(confined(bad).is_err(), "{bad:?}");
        }
    }
}
