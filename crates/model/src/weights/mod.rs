//! Bytes on disk to named tensors.
//!
//! A [`WeightStore`] is an opened model: mapped files, a [`DecoderConfig`], and a table from what a tensor does to where it
//! lies. One file per container (`gguf`, `safetensors`, `dummy`; `grouped` for integer weights in several tensors), one table
//! of names (`names`, resolved against a file by `table`), `native` for the folders that we write, one file per step from stored blocks to packed matrices
//! (`blocks`, `quantize`, `import`). It must not know a backend's buffers or the forward pass. Its invariant: once a store
//! is open, every tensor that the config calls for is there, in a format that can be read, with the shape the config
//! demands.

mod blocks;
mod dummy;
mod format;
pub mod gguf;
mod grids;
mod grouped;
pub(crate) mod import;
mod importance;
mod iq_blocks;
pub(crate) mod loose;
pub(crate) mod mmap;
pub(crate) mod modules;
mod names;
mod native;
pub(crate) mod quantize;
mod safetensors;
mod table;
mod view;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ops::Range,
    path::{Path, PathBuf},
};

pub use self::mmap::{Within, check_within};
pub(crate) use self::view::RowsAt;
use self::{
    dummy::Generator,
    gguf::{GgmlType, GgufFile},
    grouped::{Grouped, GroupedPlace},
    mmap::MappedFile,
    names::{Expected, Naming, TensorKind, expected},
    native::{Native, NativePlace},
    safetensors::Checkpoint,
    table::{Found, build_table},
    view::TensorData,
};
pub use self::{
    format::WeightFormat,
    import::HeldAs,
    importance::Importance,
    native::{CheckpointRequest, QuantizedGroup, QuantizedReport, is_dense_source, write_checkpoint},
    view::TensorView,
};
use crate::{
    ModelError, Quantize,
    config::{DecoderConfig, StoredQuantization},
};

/// What there is to do about numbers that are none.
const MAKE_AGAIN: &str = "the file is damaged, or the training that made it failed: fetch or make it again";

/// A tensor by what it does; a table per source maps its names to these. A role may be some rows of what is stored (one of
/// three in a fused projection, one expert of a stack): its view has the shape given here all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorRole {
    /// `[vocabulary, hidden]`; the head too, where embeddings are tied.
    Embedding,
    /// Before the head, `[hidden]`.
    FinalNorm,
    /// `[hidden]`, under `NormKind::Layer`.
    FinalNormBias,
    /// `[vocabulary, hidden]`, where embeddings are not tied.
    Head,
    /// `[vocabulary]`, under `DecoderConfig::head_bias`.
    HeadBias,
    /// In layer number `.0`.
    Layer(usize, LayerTensor),
}

/// A tensor of one layer. What each block order has of norms: all have `AttentionNorm`; all but `Block::Parallel` have
/// `MlpNorm`; `Block::SandwichNorm` has the two `Post` norms; under `NormKind::Layer` each has its bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerTensor {
    /// Before attention, `[hidden]`; before the MLP, too, under `Block::Parallel`.
    AttentionNorm,
    /// `[hidden]`, under `NormKind::Layer`.
    AttentionNormBias,
    /// `[heads * head_dim, hidden]`.
    Q,
    /// `[kv_heads * head_dim, hidden]`.
    K,
    /// `[kv_heads * head_dim, hidden]`.
    V,
    /// `[hidden, heads * head_dim]`.
    O,
    /// `[heads * head_dim]`, under `Biases::qkv`.
    QBias,
    /// `[kv_heads * head_dim]`.
    KBias,
    /// `[kv_heads * head_dim]`.
    VBias,
    /// `[hidden]`, under `Biases::output`.
    OBias,
    /// Of each query head before the rotation, `[head_dim]`, under `DecoderConfig::query_key_norm`. Elements stand in the
    /// order of the file, as those of `Q`: who reorders the rows of a head reorders these alike.
    QueryNorm,
    /// Of each key head, `[head_dim]`.
    KeyNorm,
    /// Of what attention gives, `[hidden]`, under `Block::SandwichNorm`.
    PostAttentionNorm,
    /// Before the MLP or the experts, `[hidden]`.
    MlpNorm,
    /// `[hidden]`, under `NormKind::Layer`.
    MlpNormBias,
    /// Of what the MLP gives, `[hidden]`, under `Block::SandwichNorm`.
    PostMlpNorm,
    /// `[intermediate, hidden]`, where the MLP is gated.
    Gate,
    /// `[intermediate, hidden]`.
    Up,
    /// `[hidden, intermediate]`.
    Down,
    /// `[intermediate]`, where the MLP is gated and under `Biases::mlp`.
    GateBias,
    /// `[intermediate]`, under `Biases::mlp`.
    UpBias,
    /// `[hidden]`, under `Biases::mlp`.
    DownBias,
    /// `[experts, hidden]`, in layers of `FeedForward::Experts`, as all below.
    Router,
    /// Expert number `.0`: `[Experts::intermediate_size, hidden]`.
    ExpertGate(usize),
    /// Expert number `.0`: `[Experts::intermediate_size, hidden]`.
    ExpertUp(usize),
    /// Expert number `.0`: `[hidden, Experts::intermediate_size]`.
    ExpertDown(usize),
    /// `[shared_intermediate_size, hidden]`, where `Experts::shared_intermediate_size` is set.
    SharedGate,
    /// `[shared_intermediate_size, hidden]`.
    SharedUp,
    /// `[hidden, shared_intermediate_size]`.
    SharedDown,
    /// One row, `[1, hidden]`: the shared expert is multiplied with the sigmoid of its product.
    SharedExpertGate,
}

/// An opened model: mapped files and the table of their tensors. Nothing is copied until it is imported.
#[derive(Debug)]
pub struct WeightStore {
    path: PathBuf,
    config: DecoderConfig,
    source: Source,
    tensors: HashMap<TensorRole, StoredTensor>,
}

#[derive(Debug)]
enum Source {
    Gguf(GgufFile),
    Safetensors(Checkpoint),
    Dummy,
}

#[derive(Debug)]
struct StoredTensor {
    name: String,
    rows: usize,
    cols: usize,
    kind: TensorKind,
    format: WeightFormat,
    rows_at: RowsAt,
    stored_cols: usize,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// `file` counts the source's files (always 0 for GGUF).
    File {
        file: usize,
        range: Range<usize>,
    },
    Generated(Generator),
    /// Codes, scales and zero points of a checkpoint's files.
    Grouped(Box<GroupedPlace>),
    /// The same in our own layout.
    Native(Box<NativePlace>),
}

impl WeightStore {
    /// A `.gguf` file or a directory (config.json + model.safetensors or its sharded index).
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        if path.is_dir() { Self::open_directory(path) } else { Self::open_gguf(path) }
    }

    /// Random weights of the config's shapes (`--load-format dummy`); `path` is a config.json, the directory of one, or a
    /// `.gguf` file (whose own weights are not read; the made-up ones are bf16).
    pub fn dummy(path: &Path) -> Result<Self, ModelError> {
        let is_gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        let (config, dtype) = if is_gguf && !path.is_dir() {
            (DecoderConfig::from_gguf(&GgufFile::open(path)?)?, None)
        } else {
            let file = if path.is_dir() { path.join(CONFIG_FILE) } else { path.to_owned() };
            let read = crate::config::read_json_file(&file)?;
            (read.decoder, read.dtype)
        };
        let format = dtype.unwrap_or(WeightFormat::Bf16);
        // No file, so names as a causal model has them.
        let naming = Naming::hugging_face(&config, |_| false);
        let name = |tensor: &Expected| naming.places(&config, tensor).swap_remove(0).name;
        // Where one is added to the norms' weights, they lie around zero.
        let tensors = generated(&config, format, 1.0 - config.norm.weight_offset, name);
        Ok(Self { path: path.to_owned(), config, source: Source::Dummy, tensors })
    }

    /// Random f32 weights of any configuration, for tests of what no file at hand has. What is made up for a role depends
    /// on the role alone.
    #[cfg(test)]
    pub(crate) fn made_up(config: &DecoderConfig) -> Self {
        let tensors = generated(config, WeightFormat::F32, 1.0, |tensor| format!("{:?}", tensor.role));
        Self { path: "made up".into(), config: config.clone(), source: Source::Dummy, tensors }
    }

    fn open_gguf(path: &Path) -> Result<Self, ModelError> {
        let file = GgufFile::open(path)?;
        let config = DecoderConfig::from_gguf(&file)?;
        let names: Vec<&str> = file.tensors().map(|(name, _)| name).collect();
        let lookup = |name: &str| match file.tensor(name) {
            None => Ok(None),
            Some(tensor) => {
                let format = WeightFormat::from_ggml_id(tensor.type_id)
                    .ok_or_else(|| ModelError::unsupported(path, unreadable_type(name, tensor.type_id)))?;
                Ok(Some(Found {
                    shape: gguf_shape(tensor),
                    format,
                    place: Place::File { file: 0, range: tensor.range.clone() },
                }))
            }
        };
        let tensors = build_table(path, &config, Naming::Gguf, &names, lookup)?;
        Ok(Self { path: path.to_owned(), config, source: Source::Gguf(file), tensors })
    }

    fn open_directory(path: &Path) -> Result<Self, ModelError> {
        let config_path = path.join(CONFIG_FILE);
        if !config_path.exists() {
            let what = "there is no config.json in this folder; a model is a folder with config.json and safetensors, \
                        or a .gguf file";
            return Err(ModelError::bad_file(path, what));
        }
        let read = crate::config::read_json_file(&config_path)?;
        let (mut config, quantization) = (read.decoder, read.quantization);
        let checkpoint = Checkpoint::open(path)?;
        let naming = Naming::hugging_face(&config, |name| native::has(&checkpoint, name));
        if config.tied_embeddings && table::has_head_of_its_own(&checkpoint, &config, naming) {
            tracing::warn!(
                "{}: the config ties the head to the embedding, but the file has a head with other values, which is used",
                path.display()
            );
            config.tied_embeddings = false;
        }
        let is_idle = |name: &&str| quantization.is_some() && grouped::is_idle(&checkpoint, name);
        let names: Vec<&str> = checkpoint.entries.keys().map(String::as_str).filter(|name| !is_idle(name)).collect();
        let quantized = |name: &str| match quantization {
            None => Ok(None),
            Some(quantization) => {
                grouped::resolve(&checkpoint, quantization, name).map_err(|what| ModelError::bad_file(path, what))
            }
        };
        let dense = |name: &str| match checkpoint.get(name).map_err(|what| ModelError::bad_file(path, what))? {
            None => Ok(None),
            Some(entry) => {
                let format = entry.format().ok_or_else(|| {
                    let what = format!(
                        "tensor {name:?} is stored as {:?}, which is not supported; F32, F16 and BF16 are",
                        entry.dtype
                    );
                    ModelError::unsupported(checkpoint.files[entry.file].path(), what)
                })?;
                let place = Place::File { file: entry.file, range: entry.range.clone() };
                Ok(Some(Found { shape: entry.shape.clone(), format, place }))
            }
        };
        let native = |name: &str| match quantization {
            Some(StoredQuantization::Bindery) => {
                native::resolve(&checkpoint, name).map_err(|what| ModelError::bad_file(path, what))
            }
            _ => Ok(None),
        };
        let dense = |name: &str| match native(name)? {
            None => dense(name),
            Some(place) => {
                let (shape, format) = (place.shape(), place.format());
                Ok(Some(Found { shape, format, place: Place::Native(Box::new(place)) }))
            }
        };
        let lookup = |name: &str| match quantized(name)? {
            None => dense(name),
            Some(place) => {
                let (shape, format) = (place.shape(), place.format());
                Ok(Some(Found { shape, format, place: Place::Grouped(Box::new(place)) }))
            }
        };
        let tensors = build_table(path, &config, naming, &names, lookup)?;
        let has_odd_groups =
            |tensor: &&StoredTensor| matches!(&tensor.place, Place::Grouped(place) if place.has_odd_groups());
        match tensors.values().filter(has_odd_groups).count() {
            0 => {}
            count => tracing::warn!(
                "{}: {count} matrices have groups of scales that 32 does not divide, or of different sizes; they are \
                 unpacked to f16, which takes several times the file's size, or quantised anew by --quantize",
                path.display()
            ),
        }
        Ok(Self { path: path.to_owned(), config, source: Source::Safetensors(checkpoint), tensors })
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's structure.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The GGUF file behind it, if it is one (tokenizer and template live in its metadata).
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.source {
            Source::Gguf(file) => Some(file),
            Source::Safetensors(_) | Source::Dummy => None,
        }
    }

    /// None where the model has no such tensor (biases, tied head). What the config calls for was found at open, so an
    /// error means a role outside the config: a layer that is not there.
    pub fn tensor(&self, role: TensorRole) -> Result<Option<TensorView<'_>>, ModelError> {
        if let TensorRole::Layer(layer, _) = role
            && layer >= self.config.num_layers()
        {
            let what = format!("layer {layer} was asked for; the model has {}", self.config.num_layers());
            return Err(ModelError::Step(what));
        }
        Ok(self.tensors.get(&role).map(|tensor| self.view(role, tensor)))
    }

    /// All tensors that the model uses, in no order; a tied head comes once, as the embedding.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (TensorRole, TensorView<'_>)> {
        self.tensors.iter().map(|(&role, tensor)| (role, self.view(role, tensor)))
    }

    fn view<'a>(&'a self, role: TensorRole, tensor: &'a StoredTensor) -> TensorView<'a> {
        let data = match &tensor.place {
            Place::File { file, range } => TensorData::Mapped { file: &self.files()[*file], range: range.clone() },
            Place::Generated(generator) => TensorData::Generated(*generator),
            Place::Grouped(place) => TensorData::Grouped(Grouped { files: self.files(), place }),
            Place::Native(place) => TensorData::Native(Native { files: self.files(), place }),
        };
        let StoredTensor { ref name, rows, cols, kind, format, rows_at, stored_cols, .. } = *tensor;
        TensorView { name, rows, cols, format, kind, role: Some(role), data, rows_at, stored_cols, halves: None }
    }

    /// What places count.
    fn files(&self) -> &[MappedFile] {
        match &self.source {
            Source::Gguf(file) => std::slice::from_ref(file.map()),
            Source::Safetensors(checkpoint) => &checkpoint.files,
            Source::Dummy => &[],
        }
    }

    /// Elements of all tensors that the model uses; a tied head counts once.
    pub fn num_parameters(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.rows as u64 * tensor.cols as u64).sum()
    }

    /// Bytes of all tensors that the model uses, as stored.
    pub fn num_bytes(&self) -> u64 {
        self.tensors.iter().map(|(&role, tensor)| self.view(role, tensor).num_bytes()).sum()
    }

    /// Tensors that import quantises; a tied head counts once.
    pub fn num_quantized_by(&self, quantize: Quantize) -> usize {
        let views = self.tensors.iter().map(|(&role, tensor)| self.view(role, tensor));
        views.filter(|tensor| tensor.is_quantized_by(quantize)).count()
    }

    /// "Q4_1 (210), F32 (61)": formats by how many tensors have them, most first.
    pub fn describe_formats(&self) -> String {
        let mut counts: BTreeMap<WeightFormat, usize> = BTreeMap::new();
        // Several roles may share a stored tensor.
        let stored: HashSet<_> = self.tensors.values().map(|tensor| (tensor.name.as_str(), tensor.format)).collect();
        for (_, format) in stored {
            *counts.entry(format).or_default() += 1;
        }
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
        counts.iter().map(|(format, count)| format!("{format} ({count})")).collect::<Vec<_>>().join(", ")
    }
}

impl TensorRole {
    fn is_bias(self) -> bool {
        use LayerTensor as T;
        match self {
            Self::FinalNormBias | Self::HeadBias => true,
            Self::Embedding | Self::FinalNorm | Self::Head => false,
            Self::Layer(_, tensor) => matches!(
                tensor,
                T::QBias
                    | T::KBias
                    | T::VBias
                    | T::OBias
                    | T::GateBias
                    | T::UpBias
                    | T::DownBias
                    | T::AttentionNormBias
                    | T::MlpNormBias
            ),
        }
    }
}

/// Made-up tensors.
fn generated(
    config: &DecoderConfig,
    format: WeightFormat,
    norm_center: f32,
    name: impl Fn(&Expected) -> String,
) -> HashMap<TensorRole, StoredTensor> {
    let stored = |tensor| {
        let name = name(&tensor);
        let Expected { role, rows, cols, kind } = tensor;
        let generator = match (kind, role) {
            (TensorKind::Matrix, _) => Generator::matrix(&name, cols),
            (TensorKind::Vector, role) if role.is_bias() => Generator::bias(&name),
            (TensorKind::Vector, _) => Generator::norm(&name, norm_center),
        };
        let (rows_at, place) = (RowsAt::WHOLE, Place::Generated(generator));
        (role, StoredTensor { name, rows, cols, kind, format, rows_at, stored_cols: cols, place })
    };
    expected(config).into_iter().map(stored).collect()
}

const CONFIG_FILE: &str = "config.json";

/// Outermost first.
fn gguf_shape(tensor: &gguf::GgufTensor) -> Vec<usize> {
    let sizes = tensor.dimensions.iter().rev().map(|&size| usize::try_from(size).unwrap_or(usize::MAX));
    sizes.skip_while(|&size| size == 1).collect()
}

fn unreadable_type(name: &str, type_id: u32) -> String {
    let stored = match GgmlType::from_id(type_id) {
        Some(ty) => format!("stored as {}, which is not supported; llama-quantize can write it anew", ty.name),
        None => format!("of type id {type_id}, which is unknown"),
    };
    format!("tensor {name:?} is {stored}; supported are {}", WeightFormat::list(WeightFormat::ALL))
}
