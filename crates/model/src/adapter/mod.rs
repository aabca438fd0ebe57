//! Adapters: low-rank changes of a base's matrices, from peft's folders and llama.cpp's files.
//!
//! An adapter is opened against a base's configuration and checked whole: what can be refused without a forward pass is
//! refused in [`OpenedAdapter::open`] ([`LowRank`] values that are not finite in [`OpenedAdapter::read`]). It must not know
//! who asks for it or where it is computed. Its invariant: an opened adapter fits its base, matrix by matrix, and whatever is
//! in its files beyond that has been refused by name.
//!
//! Reading order: here what it is, `peft` and `gguf` what the files say of scaling, `names` what tensors are called,
//! `pattern` how modules are matched, `pairs` the check against the base, `read` the numbers; then `weights` what a backend
//! holds of them, and `import` how the `cpu` backend packs it.

mod gguf;
pub(crate) mod import;
mod names;
mod pairs;
mod pattern;
mod peft;
mod read;
pub(crate) mod weights;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

pub use self::weights::{Adapter, AdapterLoader};
use self::{
    gguf::GgufAdapter,
    pairs::{Pairs, Slot},
    peft::PeftConfig,
    read::HeadRows,
};
use crate::{
    ModelError,
    config::{DecoderConfig, RopeStyle},
    licence,
    weights::{gguf::GgufFile, loose::LooseTensors, mmap::Within, modules::ModuleNames},
};

const CONFIG_FILE: &str = "adapter_config.json";
const TENSOR_FILE: &str = "adapter_model.safetensors";
const PICKLE_FILE: &str = "adapter_model.bin";
/// Beside pairs, whose size has a limit of its own, peft may save the head's and the embeddings' weights once more.
const MAX_FILE_BYTES: u64 = 8 << 30;

/// Where an adapter's product is added. MLPs without a gate have `Up` and `Down`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AdapterTarget {
    /// Queries, `[num_heads * head_dim, hidden_size]`.
    Query,
    /// Keys, `[num_kv_heads * head_dim, hidden_size]`.
    Key,
    /// Values, `[num_kv_heads * head_dim, hidden_size]`.
    Value,
    /// The attention's output, `[hidden_size, num_heads * head_dim]`.
    Output,
    /// The MLP's gate, `[intermediate_size, hidden_size]`.
    Gate,
    /// The MLP's other input product, `[intermediate_size, hidden_size]`.
    Up,
    /// The MLP's output, `[hidden_size, intermediate_size]`.
    Down,
    /// The head, `[vocab_size, hidden_size]`; of a tied head, the head alone.
    Head,
}

impl fmt::Display for AdapterTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Query => "query",
            Self::Key => "key",
            Self::Value => "value",
            Self::Output => "output",
            Self::Gate => "gate",
            Self::Up => "up",
            Self::Down => "down",
            Self::Head => "head",
        })
    }
}

/// What an adapter may be at most. More is refused when it is opened, before a number is read.
#[derive(Clone, Debug)]
pub struct AdapterLimits {
    /// `--max-lora-rank`.
    pub max_rank: usize,
    /// Of all that [`OpenedAdapter::read`] hands out, in f32.
    pub max_bytes: u64,
    /// Folders, by their real paths, that its files must lie in when they are opened; None: anywhere.
    pub within: Option<Arc<[PathBuf]>>,
}

impl Default for AdapterLimits {
    fn default() -> Self {
        Self { max_rank: 64, max_bytes: 4 << 30, within: None }
    }
}

impl AdapterLimits {
    fn check_rank(&self, rank: usize) -> Result<(), String> {
        if rank <= self.max_rank {
            return Ok(());
        }
        Err(format!("rank {rank} is over the limit of {}; raise --max-lora-rank to serve it", self.max_rank))
    }
}

/// Who wrote the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterFormat {
    /// A folder of adapter_config.json and adapter_model.safetensors.
    Peft,
    /// A GGUF file of llama.cpp's converter.
    Gguf,
}

impl fmt::Display for AdapterFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Peft => "peft",
            Self::Gguf => "gguf",
        })
    }
}

/// What is known about an opened adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterInfo {
    /// Who wrote the files.
    pub format: AdapterFormat,
    /// The largest of any matrix.
    pub rank: usize,
    /// As the config says it for matrices that no pattern names; a GGUF file without one has 0.
    pub alpha: f64,
    /// For people: "query, value".
    pub targets: String,
    /// A path or name on the machine that trained it: worth showing, never compared.
    pub base_model_name_or_path: Option<String>,
    /// As its files tell it.
    pub licence: Option<String>,
    /// Elements of all pairs as stored.
    pub num_parameters: u64,
    /// Bytes of all pairs as stored.
    pub num_bytes: u64,
    /// Bytes of all that [`OpenedAdapter::read`] hands out.
    pub num_bytes_in_f32: u64,
}

/// An adapter's files, opened and checked against a base: all that can be refused without a forward pass has been refused.
#[derive(Debug)]
pub struct OpenedAdapter {
    info: AdapterInfo,
    tensors: LooseTensors,
    pairs: Pairs,
    heads: HeadRows,
}

/// `delta = b (a x)`: what is added to a base matrix's product.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// Rows of `a`.
    pub rank: usize,
    /// `[rank, inputs]`
    pub a: Vec<f32>,
    /// `[outputs, rank]`, the adapter's scaling in it.
    pub b: Vec<f32>,
}

/// What the two formats tell beyond tensors.
enum Described {
    Peft(Box<PeftConfig>),
    Gguf(GgufAdapter),
}

impl OpenedAdapter {
    /// Opens a folder as peft's `save_pretrained` writes it, or a GGUF file as llama.cpp's convert_lora_to_gguf.py does, and
    /// checks it against the base's configuration. Errors name the file, the tensor or key, the value and the limit.
    pub fn open(path: &Path, base: &DecoderConfig, limits: &AdapterLimits) -> Result<Self, ModelError> {
        let within = limits.within.as_deref();
        let (tensors, described) =
            if path.is_dir() { open_folder(path, within)? } else { open_file(path, base, within)? };
        let names = match described {
            Described::Peft(_) => ModuleNames::HuggingFace,
            Described::Gguf(_) => ModuleNames::Gguf,
        };
        let pairs = pairs::collect(&tensors, &described, names, base, limits)?;
        let (format, alpha, base_name, style) = match &described {
            Described::Peft(config) => (AdapterFormat::Peft, config.alpha, config.base.clone(), RopeStyle::Neox),
            Described::Gguf(file) => (AdapterFormat::Gguf, file.alpha, file.base.clone(), file.style),
        };
        let licence = match &described {
            Described::Peft(_) => licence::of_folder(path, within),
            // Not by its path: the file may have been written over since it was read.
            Described::Gguf(file) => file.licence.clone(),
        };
        let info = AdapterInfo {
            format,
            rank: pairs.max_rank(),
            alpha,
            targets: pairs.describe(),
            base_model_name_or_path: base_name.map(|name| name.chars().take(MAX_NAME_CHARS).collect()),
            licence,
            num_parameters: pairs.num_parameters(),
            num_bytes: pairs.num_bytes(&tensors)?,
            num_bytes_in_f32: pairs.num_bytes_in_f32(),
        };
        Ok(Self { info, tensors, pairs, heads: HeadRows::new(base, style) })
    }

    /// What is known about it.
    pub fn info(&self) -> &AdapterInfo {
        &self.info
    }

    /// The matrices it changes, ascending by layer, then target; the head comes last and has no layer.
    pub fn targets(&self) -> impl Iterator<Item = (Option<usize>, AdapterTarget)> {
        self.pairs.slots().map(|(slot, _)| (slot.layer(), slot.target()))
    }

    /// A matrix's pair; None where the adapter does not change it. `order` is that of the rotated elements in the rows of
    /// queries and keys: `Neox` for a backend that rotates halves, the base's own style for one that rotates as the base does.
    /// Other targets have no order. An error where a number is not finite. The file may have changed since it was opened: what
    /// it held then is read.
    pub fn read(
        &self,
        layer: Option<usize>,
        target: AdapterTarget,
        order: RopeStyle,
    ) -> Result<Option<LowRank>, ModelError> {
        let Some(slot) = Slot::new(layer, target) else { return Ok(None) };
        self.pairs.get(slot).map(|(pair, part)| self.heads.read(&self.tensors, pair, part, target, order)).transpose()
    }
}

/// Shown, so no longer than somebody reads.
const MAX_NAME_CHARS: usize = 200;

fn open_folder(path: &Path, within: Within<'_>) -> Result<(LooseTensors, Described), ModelError> {
    let config = path.join(CONFIG_FILE);
    if !config.exists() {
        let what = format!(
            "there is no {CONFIG_FILE} in this folder; an adapter is a folder with {CONFIG_FILE} and {TENSOR_FILE} as peft \
             saves it, or a .gguf file"
        );
        return Err(ModelError::bad_file(path, what));
    }
    let config = PeftConfig::read(&config, within)?;
    let tensors = path.join(TENSOR_FILE);
    if !tensors.exists() {
        let what = if path.join(PICKLE_FILE).exists() {
            format!(
                "the weights are in {PICKLE_FILE}, which can run code when it is read, so it is not; convert it once: python \
                 -c \"import torch, safetensors.torch as s; s.save_file({{k: v.contiguous().clone() for k, v in \
                 torch.load('{PICKLE_FILE}', map_location='cpu', weights_only=True).items()}}, '{TENSOR_FILE}')\""
            )
        } else {
            format!("there is no {TENSOR_FILE} in this folder; fetch the adapter again")
        };
        return Err(ModelError::bad_file(path, what));
    }
    Ok((LooseTensors::read_safetensors(&tensors, MAX_FILE_BYTES, within)?, Described::Peft(Box::new(config))))
}

fn open_file(path: &Path, base: &DecoderConfig, within: Within<'_>) -> Result<(LooseTensors, Described), ModelError> {
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("safetensors")) {
        let what = format!("this is a file of weights alone; name the folder that holds it and {CONFIG_FILE}");
        return Err(ModelError::bad_file(path, what));
    }
    let file = GgufFile::read_whole(path, MAX_FILE_BYTES, within)?;
    let described = GgufAdapter::read(&file, base)?;
    Ok((LooseTensors::Gguf(file), Described::Gguf(described)))
}
