//! Our own bounded, memory-mapped reader of GGUF files (versions 2 and 3, little endian).
//!
//! It opens what people have: a tensor of a type this version does not know only matters once that tensor is needed. It
//! must not know what a model is; `config` and the name table do. Its invariant: every count, length and offset is
//! checked against the file's size before anything is allocated or sliced, so a hostile file gives an error and nothing
//! else.
//!
//! ```text
//! "GGUF"  version u32  tensors u64  keys u64
//! keys    x (name: u64 length + bytes, type u32, value)
//! tensors x (name, dimensions u32, size u64 each (fastest first), type u32, offset u64)
//! padding to the alignment (general.alignment, else 32)
//! data: each tensor at its offset from here, a multiple of the alignment
//! ```
//!
//! Source: the GGUF specification in the ggml repository (docs/gguf.md).

mod cursor;
mod metadata;
mod types;

use std::{
    collections::BTreeMap,
    ops::Range,
    path::{Path, PathBuf},
};

use self::{
    cursor::{Cursor, Outcome},
    metadata::read_value,
};
pub use self::{
    metadata::MetadataValue,
    types::{GgmlType, TYPES},
};
use super::mmap::{MappedFile, Within};
use crate::ModelError;

/// Keys and tensor table together may take this much of the file. The largest in use have some 20 MB (vocabularies).
const MAX_HEADER_BYTES: usize = 256 << 20;
/// And this much memory once decoded.
const MAX_HEADER_MEMORY: u64 = 1 << 30;
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;
const MAX_DIMENSIONS: u32 = 4;
/// Name (length only), dimensions, type and offset.
const MIN_TENSOR_INFO_BYTES: u64 = 8 + 4 + 4 + 8;
/// Name (length only), type and the smallest value.
const MIN_KEY_BYTES: u64 = 8 + 4 + 1;

/// An opened GGUF file: its metadata in memory, its tensors mapped.
#[derive(Debug)]
pub struct GgufFile {
    map: MappedFile,
    header: Header,
}

/// One entry of the tensor table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// Sizes, fastest-running first: a matrix of `nn.Linear` is `[inputs, outputs, 1, 1]`. Unused ones are 1.
    pub dimensions: [u64; MAX_DIMENSIONS as usize],
    /// As written; see [`GgmlType::from_id`].
    pub type_id: u32,
    /// Bytes in the file. Empty where the type is unknown.
    pub range: Range<usize>,
}

impl GgufFile {
    /// Maps and checks a file. Refused by name: version 1, big endian, files that are one part of several.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        Self::of_file(MappedFile::open(path)?)
    }

    /// The same, copied into memory instead of mapped.
    pub(crate) fn read_whole(path: &Path, max_bytes: u64, within: Within<'_>) -> Result<Self, ModelError> {
        Self::of_file(MappedFile::read_whole(path, max_bytes, within)?)
    }

    fn of_file(map: MappedFile) -> Result<Self, ModelError> {
        let header = Header::parse(map.bytes()).map_err(|what| ModelError::bad_file(map.path(), what))?;
        Ok(Self { map, header })
    }

    /// Where it was read from.
    pub fn path(&self) -> &PathBuf {
        self.map.path()
    }

    /// A value by its key.
    pub fn get(&self, key: &str) -> Option<&MetadataValue> {
        self.header.metadata.get(key)
    }

    /// All keys, sorted.
    pub fn keys(&self) -> Vec<&str> {
        self.header.metadata.keys().map(String::as_str).collect()
    }

    /// A text; None where absent or of another kind, as for all getters below.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            MetadataValue::String(value) => Some(value),
            _ => None,
        }
    }

    /// An integer of any width that is not negative.
    pub fn u64(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            MetadataValue::Unsigned(value) => Some(*value),
            MetadataValue::Signed(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// A number: integers count too.
    pub fn f64(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            MetadataValue::Float(value) => Some(*value),
            MetadataValue::Unsigned(value) => Some(*value as f64),
            MetadataValue::Signed(value) => Some(*value as f64),
            _ => None,
        }
    }

    /// A number, narrowed.
    pub fn f32(&self, key: &str) -> Option<f32> {
        Some(self.f64(key)? as f32)
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            MetadataValue::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// Array of strings (tokenizer.ggml.tokens, merges).
    pub fn strings(&self, key: &str) -> Option<&[String]> {
        match self.get(key)? {
            MetadataValue::Strings(values) => Some(values),
            _ => None,
        }
    }

    /// Array of f32 (tokenizer.ggml.scores).
    pub fn floats(&self, key: &str) -> Option<&[f32]> {
        match self.get(key)? {
            MetadataValue::Floats(values) => Some(values),
            _ => None,
        }
    }

    /// Array of integers (tokenizer.ggml.token_type).
    pub fn ints(&self, key: &str) -> Option<&[i64]> {
        match self.get(key)? {
            MetadataValue::Ints(values) => Some(values),
            _ => None,
        }
    }

    /// A tensor's entry.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.header.tensors.get(name)
    }

    /// A tensor's entry under the name that the file has for it.
    pub(crate) fn entry(&self, name: &str) -> Option<(&str, &GgufTensor)> {
        self.header.tensors.get_key_value(name).map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// All entries by name, sorted.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &GgufTensor)> {
        self.header.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    pub(crate) fn map(&self) -> &MappedFile {
        &self.map
    }
}

/// All that stands before the data.
#[derive(Debug)]
struct Header {
    metadata: BTreeMap<String, MetadataValue>,
    tensors: BTreeMap<String, GgufTensor>,
}

impl Header {
    fn parse(file: &[u8]) -> Outcome<Self> {
        let mut cursor = Cursor::new(&file[..file.len().min(MAX_HEADER_BYTES)], MAX_HEADER_MEMORY);
        check_version(&mut cursor)?;
        let num_tensors = cursor.count("tensors", MIN_TENSOR_INFO_BYTES, size_of::<GgufTensor>() as u64)?;
        let num_keys = cursor.count("metadata keys", MIN_KEY_BYTES, size_of::<MetadataValue>() as u64)?;
        let metadata = read_metadata(&mut cursor, num_keys)?;
        if let Some(MetadataValue::Unsigned(parts @ 2..)) = metadata.get("split.count") {
            return Err(format!(
                "this is one of {parts} parts of a split model, which is not supported; join them first with \
                 `llama-gguf-split --merge`"
            ));
        }
        let tensors = read_tensor_table(&mut cursor, num_tensors, &metadata, file.len())?;
        check_overlap(&tensors)?;
        Ok(Self { metadata, tensors })
    }
}

fn check_version(cursor: &mut Cursor<'_>) -> Outcome<()> {
    let magic = cursor.take(4)?;
    if magic != b"GGUF" {
        return Err(format!(
            "this is not a GGUF file: it begins with \"{}\" instead of \"GGUF\"",
            magic.escape_ascii()
        ));
    }
    match cursor.u32()? {
        2 | 3 => Ok(()),
        1 => {
            Err("this is GGUF version 1, which nothing writes any more; convert the model anew (versions 2 and 3 are \
                  read)"
                .to_owned())
        }
        version if version.swap_bytes() <= 0xFFFF => Err(format!(
            "this is a big-endian GGUF file (version {}); only little endian is read",
            version.swap_bytes()
        )),
        version => Err(format!("this is GGUF version {version}; versions 2 and 3 are read")),
    }
}

fn read_metadata(cursor: &mut Cursor<'_>, num_keys: usize) -> Outcome<BTreeMap<String, MetadataValue>> {
    let mut metadata = BTreeMap::new();
    for index in 0..num_keys {
        let key = cursor.string().map_err(|what| format!("metadata key number {index}: {what}"))?;
        let value = read_value(cursor).map_err(|what| format!("metadata key {key:?}: {what}"))?;
        if metadata.contains_key(&key) {
            return Err(format!("metadata key {key:?} appears twice"));
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

fn read_tensor_table(
    cursor: &mut Cursor<'_>,
    num_tensors: usize,
    metadata: &BTreeMap<String, MetadataValue>,
    file_len: usize,
) -> Outcome<BTreeMap<String, GgufTensor>> {
    let alignment = alignment(metadata)?;
    let mut entries = Vec::with_capacity(num_tensors);
    for index in 0..num_tensors {
        let name = cursor.string().map_err(|what| format!("tensor number {index}: {what}"))?;
        let entry = read_tensor_entry(cursor).map_err(|what| format!("tensor {name:?}: {what}"))?;
        entries.push((name, entry));
    }
    // Data begins where the table ends, aligned; offsets count from there.
    let data_start = (cursor.position() as u64).next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    for (name, entry) in entries {
        let tensor =
            entry.locate(data_start, alignment, file_len).map_err(|what| format!("tensor {name:?}: {what}"))?;
        if tensors.contains_key(&name) {
            return Err(format!("tensor {name:?} appears twice"));
        }
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

fn alignment(metadata: &BTreeMap<String, MetadataValue>) -> Outcome<u64> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&MetadataValue::Unsigned(value)) if value.is_power_of_two() && value <= MAX_ALIGNMENT => Ok(value),
        Some(value) => Err(format!("general.alignment is {value:?}; a power of two up to {MAX_ALIGNMENT} is expected")),
    }
}

/// A row of the table before its place in the file is known.
struct TensorEntry {
    dimensions: [u64; MAX_DIMENSIONS as usize],
    type_id: u32,
    offset: u64,
}

fn read_tensor_entry(cursor: &mut Cursor<'_>) -> Outcome<TensorEntry> {
    let num_dimensions = cursor.u32()?;
    if num_dimensions > MAX_DIMENSIONS {
        return Err(format!("{num_dimensions} dimensions; at most {MAX_DIMENSIONS} exist"));
    }
    let mut dimensions = [1; MAX_DIMENSIONS as usize];
    for size in &mut dimensions[..num_dimensions as usize] {
        *size = cursor.u64()?;
    }
    Ok(TensorEntry { dimensions, type_id: cursor.u32()?, offset: cursor.u64()? })
}

impl TensorEntry {
    fn locate(self, data_start: u64, alignment: u64, file_len: usize) -> Outcome<GgufTensor> {
        let Self { dimensions, type_id, offset } = self;
        let elements = dimensions
            .iter()
            .try_fold(1u64, |product, &size| product.checked_mul(size))
            .ok_or_else(|| format!("its sizes {dimensions:?} overflow"))?;
        if !offset.is_multiple_of(alignment) {
            return Err(format!("its offset {offset} is not a multiple of the alignment {alignment}"));
        }
        // An unknown type has an unknown size: it may stand in the file as long as nobody needs it.
        let bytes = match GgmlType::from_id(type_id) {
            None => 0,
            Some(ty) if !dimensions[0].is_multiple_of(ty.block_elements) => {
                return Err(format!(
                    "its first size {} is not a multiple of {}, the block of {}",
                    dimensions[0], ty.block_elements, ty.name
                ));
            }
            Some(ty) => (elements / ty.block_elements)
                .checked_mul(ty.block_bytes)
                .ok_or_else(|| format!("its sizes {dimensions:?} overflow"))?,
        };
        let start = data_start.checked_add(offset).ok_or_else(|| format!("its offset {offset} overflows"))?;
        let end = start.checked_add(bytes).ok_or_else(|| format!("its {bytes} bytes overflow"))?;
        if end > file_len as u64 {
            return Err(format!(
                "it ends at byte {end}, but the file has {file_len}; the file is cut short or damaged, fetch it again"
            ));
        }
        // Both are within the file's length, which fits.
        Ok(GgufTensor { dimensions, type_id, range: start as usize..end as usize })
    }
}

fn check_overlap(tensors: &BTreeMap<String, GgufTensor>) -> Outcome<()> {
    let mut by_place: Vec<_> = tensors.iter().collect();
    by_place.sort_unstable_by_key(|(_, tensor)| (tensor.range.start, tensor.range.end));
    for pair in by_place.windows(2) {
        let ((name, tensor), (next_name, next)) = (pair[0], pair[1]);
        if next.range.start < tensor.range.end {
            return Err(format!("tensors {name:?} and {next_name:?} overlap in the file"));
        }
    }
    Ok(())
}
