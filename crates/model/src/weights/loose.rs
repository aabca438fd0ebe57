//! The tensors of one file by name, without a model that says which there must be: the files of adapters.
//!
//! It must not know what the names mean. Its invariant: a view it hands out is a matrix of a format that can be read, and
//! lies within its file.

use std::path::Path;

use super::{
    Checkpoint, GgufFile, RowsAt, TensorView, WeightFormat, gguf_shape,
    mmap::{MappedFile, Within},
    names::TensorKind,
    unreadable_type,
    view::TensorData,
};
use crate::ModelError;

/// An opened file.
#[derive(Debug)]
pub(crate) enum LooseTensors {
    /// llama.cpp's container.
    Gguf(GgufFile),
    /// Hugging Face's; always of one file.
    Safetensors(Box<OneFile>),
}

/// A safetensors file.
#[derive(Debug)]
pub(crate) struct OneFile(Checkpoint);

impl LooseTensors {
    /// The file's bytes are copied, see [`MappedFile::read_whole`].
    pub(crate) fn read_safetensors(path: &Path, max_bytes: u64, within: Within<'_>) -> Result<Self, ModelError> {
        Checkpoint::of_file(MappedFile::read_whole(path, max_bytes, within)?)
            .map(|file| Self::Safetensors(Box::new(OneFile(file))))
    }

    pub(crate) fn path(&self) -> &Path {
        self.file().path()
    }

    /// Sorted.
    pub(crate) fn names(&self) -> Vec<&str> {
        match self {
            Self::Gguf(file) => file.tensors().map(|(name, _)| name).collect(),
            Self::Safetensors(file) => file.0.entries.keys().map(String::as_str).collect(),
        }
    }

    /// Outermost first, as stored; None where there is no such tensor.
    pub(crate) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match self {
            // The format has no place for how many sizes there are, so a matrix of one row is told from a vector by its use.
            Self::Gguf(file) => file.tensor(name).map(|tensor| {
                let shape = gguf_shape(tensor);
                let missing = 2_usize.saturating_sub(shape.len());
                std::iter::repeat_n(1, missing).chain(shape).collect()
            }),
            Self::Safetensors(file) => file.0.entries.get(name).map(|entry| entry.shape.clone()),
        }
    }

    /// A matrix. An error where there is no such tensor, it is no matrix, or its type cannot be read.
    pub(crate) fn matrix(&self, name: &str) -> Result<TensorView<'_>, ModelError> {
        let path = self.path();
        let (name, format, range) = match self {
            Self::Gguf(file) => {
                let (name, tensor) = file.entry(name).ok_or_else(|| missing(path, name))?;
                let format = WeightFormat::from_ggml_id(tensor.type_id)
                    .ok_or_else(|| ModelError::unsupported(path, unreadable_type(name, tensor.type_id)))?;
                (name, format, tensor.range.clone())
            }
            Self::Safetensors(file) => {
                let (name, entry) = file.0.entries.get_key_value(name).ok_or_else(|| missing(path, name))?;
                let format = entry.format().ok_or_else(|| {
                    let what = format!(
                        "tensor {name:?} is stored as {:?}, which is not supported; F32, F16 and BF16 are",
                        entry.dtype
                    );
                    ModelError::unsupported(path, what)
                })?;
                (name.as_str(), format, entry.range.clone())
            }
        };
        let shape = self.shape(name).unwrap_or_default();
        let &[rows, cols] = shape.as_slice() else {
            return Err(ModelError::bad_file(
                path,
                format!("tensor {name:?} has the shape {shape:?}; a matrix has two sizes"),
            ));
        };
        if rows == 0 || cols == 0 {
            return Err(ModelError::bad_file(path, format!("tensor {name:?} is empty: its shape is {shape:?}")));
        }
        Ok(TensorView {
            name,
            rows,
            cols,
            format,
            kind: TensorKind::Matrix,
            role: None,
            data: TensorData::Mapped { file: self.file(), range },
            rows_at: RowsAt::WHOLE,
            stored_cols: cols,
            halves: None,
        })
    }

    fn file(&self) -> &MappedFile {
        match self {
            Self::Gguf(file) => file.map(),
            Self::Safetensors(file) => &file.0.files[0],
        }
    }
}

fn missing(path: &Path, name: &str) -> ModelError {
    ModelError::bad_file(path, format!("tensor {name:?} is missing"))
}
