//! The committed adapters, and copies of them with something changed.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use bindery_model::{AdapterLimits, ModelError, OpenedAdapter, config::DecoderConfig};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tempfile::TempDir;

/// Beyond all committed adapters.
pub(crate) const LIMITS: AdapterLimits = AdapterLimits { max_rank: 64, max_bytes: 1 << 20, within: None };

pub(crate) fn tests_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests")
}

pub(crate) fn adapter(name: &str) -> PathBuf {
    tests_folder().join("adapters").join(name)
}

pub(crate) fn checkpoint(name: &str) -> PathBuf {
    tests_folder().join("checkpoints").join(name)
}

pub(crate) fn base(name: &str) -> DecoderConfig {
    DecoderConfig::from_json_file(&checkpoint(name).join("config.json")).unwrap()
}

/// A tensor of a copy.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Stored {
    pub(crate) fn zeros(shape: &[usize]) -> Self {
        let bytes = vec![0; shape.iter().product::<usize>() * 4];
        Self { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }
}

/// An adapter in memory, to be changed and written.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, Stored>,
}

impl Draft {
    pub(crate) fn of(name: &str) -> Self {
        let folder = adapter(name);
        let config = serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
        let bytes = std::fs::read(folder.join("adapter_model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let stored = |tensor: safetensors::tensor::TensorView<'_>| Stored {
            dtype: tensor.dtype(),
            shape: tensor.shape().to_vec(),
            bytes: tensor.data().to_vec(),
        };
        let tensors = file.tensors().into_iter().map(|(name, tensor)| (name, stored(tensor))).collect();
        Self { config, tensors }
    }

    pub(crate) fn set(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    pub(crate) fn with(mut self, name: &str, tensor: Stored) -> Self {
        self.tensors.insert(name.to_owned(), tensor);
        self
    }

    pub(crate) fn without(mut self, name: &str) -> Self {
        assert!(self.tensors.remove(name).is_some(), "{name}");
        self
    }

    /// Every name goes through `rename`.
    pub(crate) fn renamed(self, rename: impl Fn(&str) -> String) -> Self {
        let tensors = self.tensors.into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect();
        Self { tensors, ..self }
    }

    pub(crate) fn weights(&self) -> Vec<u8> {
        let views: Vec<_> = self
            .tensors
            .iter()
            .map(|(name, tensor)| {
                let view = safetensors::tensor::TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
                (name, view.unwrap())
            })
            .collect();
        safetensors::serialize(views, None).unwrap()
    }

    pub(crate) fn write(&self) -> TempDir {
        written(&serde_json::to_vec(&self.config).unwrap(), &self.weights())
    }

    pub(crate) fn open_on(&self, base: &DecoderConfig) -> Result<OpenedAdapter, ModelError> {
        OpenedAdapter::open(self.write().path(), base, &LIMITS)
    }
}

/// An adapter's folder of these files.
pub(crate) fn written(config: &[u8], weights: &[u8]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("adapter_config.json"), config).unwrap();
    std::fs::write(folder.path().join("adapter_model.safetensors"), weights).unwrap();
    folder
}
