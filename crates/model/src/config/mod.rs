//! One decoder, many families: a family is a value of [`DecoderConfig`].
//!
//! `config.json` (older keys and the newer `rope_parameters`) and GGUF metadata both become one. An axis that only a family
//! not yet in needs is added with that family; what cannot be expressed is refused by name, never approximated. It must
//! not know tensors. Its invariant: a `DecoderConfig` made here has passed `DecoderConfig::check`, so sizes are within
//! `Limits` and fit each other.

mod gguf;
mod json;

use std::path::Path;

use serde_json::Value;

use crate::{
    ModelError,
    weights::{WeightFormat, gguf::GgufFile, mmap::read_text},
};

/// A config.json larger than this is not one (those in use have a few kB, with label tables a few MB).
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Everything the decoder needs to know about a model besides its weights. Sizes in elements.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// As the file names it: "llama", "mistral", "qwen2".
    pub architecture: String,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head (explicit, or hidden_size / num_heads).
    pub head_dim: usize,
    /// Longest context the model was made for, tokens.
    pub max_position_embeddings: usize,
    /// Normalisation before attention, MLP and head.
    pub norm: Norm,
    /// Rotary embedding.
    pub rotary: Rotary,
    /// Scores are multiplied by this (1 / sqrt(head_dim) unless a family says otherwise).
    pub attention_scale: f32,
    /// The MLP of every layer.
    pub mlp: Mlp,
    /// Biases of the attention's projections.
    pub biases: Biases,
    /// Per-layer differences, `[num_layers]`.
    pub layers: Vec<LayerConfig>,
    /// The head shares the embedding's matrix.
    pub tied_embeddings: bool,
    /// From the file; generation_config.json wins in the engine.
    pub bos_token_id: Option<u32>,
    /// From the file.
    pub eos_token_ids: Vec<u32>,
}

/// Which projections of the attention add a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// Query, key and value.
    pub qkv: bool,
    /// Output.
    pub output: bool,
}

/// What one layer does differently.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConfig {
    /// Sliding window: a row at p sees keys in (p - window, p].
    pub window: Option<usize>,
    /// False: this layer has no rotary embedding (SmolLM3).
    pub rotary: bool,
}

/// Normalisation.
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    /// Added to the mean square.
    pub eps: f32,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    /// Which elements form a pair. Hugging Face checkpoints: Neox; GGUF files of the llama architecture: Interleaved
    /// (llama.cpp's converter permutes q and k).
    pub style: RopeStyle,
    /// Rotated elements of each head (head_dim unless partial).
    pub dim: usize,
    /// theta.
    pub base: f32,
    /// How positions beyond the original length are handled.
    pub scaling: RopeScaling,
}

pub use bindery_kernels::RopeStyle;

/// Scaling of rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// > 1 stretches.
        factor: f32,
    },
    /// LLaMA 3.1: low frequencies divided by `factor`, high ones kept, smooth in between.
    Llama3 {
        /// Of the low frequencies.
        factor: f32,
        /// Wavelengths above original / this are scaled fully.
        low_freq_factor: f32,
        /// Wavelengths below original / this are kept.
        high_freq_factor: f32,
        /// Context before scaling.
        original_max_position_embeddings: usize,
    },
    /// Divisors given by the file, one a pair (GGUF `rope_freqs.weight`).
    Factors(Vec<f32>),
}

/// The MLP.
#[derive(Clone, Debug, PartialEq)]
pub struct Mlp {
    /// Width inside.
    pub intermediate_size: usize,
    /// Of the gate.
    pub activation: Activation,
}

/// Activation functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(x).
    Silu,
}

/// Why a model description is not taken.
#[derive(Debug, PartialEq)]
enum ConfigError {
    /// It breaks its own rules.
    Bad(String),
    /// It is fine, but asks for something that is not there.
    Unsupported(String),
}

impl ConfigError {
    fn in_file(self, path: &Path) -> ModelError {
        match self {
            Self::Bad(what) => ModelError::bad_file(path, what),
            Self::Unsupported(what) => ModelError::unsupported(path, what),
        }
    }
}

fn bad<T>(what: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError::Bad(what.into()))
}

fn unsupported<T>(what: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError::Unsupported(what.into()))
}

/// Sizes beyond these are damage or malice: each is many times that of the largest model known.
struct Limits;
impl Limits {
    const VOCAB: usize = 1 << 24;
    const WIDTH: usize = 1 << 20;
    const LAYERS: usize = 1024;
    const HEADS: usize = 1 << 14;
    const HEAD_DIM: usize = 1 << 12;
    const POSITIONS: usize = 1 << 28;
}

impl DecoderConfig {
    /// Layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Reads a config.json as Hugging Face's transformers understands it.
    pub fn from_json_file(path: &Path) -> Result<Self, ModelError> {
        Ok(read_json_file(path)?.0)
    }

    /// Reads the metadata of a GGUF file (and the sizes of its embedding and rotary factors).
    pub fn from_gguf(file: &GgufFile) -> Result<Self, ModelError> {
        gguf::decoder_config(file).map_err(|error| error.in_file(file.path()))
    }

    /// Sizes are there, within limits, and fit each other. The text of an error names the value and the limit.
    fn check(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("the vocabulary", self.vocab_size, Limits::VOCAB),
            ("the hidden size", self.hidden_size, Limits::WIDTH),
            ("the intermediate size", self.mlp.intermediate_size, Limits::WIDTH),
            ("the number of layers", self.num_layers(), Limits::LAYERS),
            ("the number of heads", self.num_heads, Limits::HEADS),
            ("the number of key/value heads", self.num_kv_heads, Limits::HEADS),
            ("the width of a head", self.head_dim, Limits::HEAD_DIM),
            ("the width of all heads", self.num_heads.saturating_mul(self.head_dim), Limits::WIDTH),
            ("the context length", self.max_position_embeddings, Limits::POSITIONS),
            ("the rotary width", self.rotary.dim, self.head_dim),
        ];
        for (name, value, limit) in sizes {
            check_size(name, value as u64, limit)?;
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return bad(format!(
                "{} heads cannot be shared evenly by {} key/value heads",
                self.num_heads, self.num_kv_heads
            ));
        }
        if !self.rotary.dim.is_multiple_of(2) {
            return bad(format!(
                "the rotary width is {}; it must be even, since elements turn in pairs",
                self.rotary.dim
            ));
        }
        for window in self.layers.iter().filter_map(|layer| layer.window) {
            check_size("the sliding window", window as u64, Limits::POSITIONS)?;
        }
        check_positive("the norm's epsilon", self.norm.eps)?;
        check_positive("the rotary base", self.rotary.base)?;
        self.rotary.scaling.check(self.rotary.dim)
    }
}

impl RopeScaling {
    fn check(&self, rotary_dim: usize) -> Result<(), ConfigError> {
        match self {
            Self::None => Ok(()),
            Self::Linear { factor } => check_positive("the rotary scaling's factor", *factor),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                check_positive("the rotary scaling's factor", *factor)?;
                check_positive("low_freq_factor", *low_freq_factor)?;
                check_positive("high_freq_factor", *high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    return bad(format!(
                        "high_freq_factor is {high_freq_factor}; it must be above low_freq_factor, {low_freq_factor}"
                    ));
                }
                check_size(
                    "original_max_position_embeddings",
                    *original_max_position_embeddings as u64,
                    Limits::POSITIONS,
                )?;
                Ok(())
            }
            Self::Factors(factors) if factors.len() != rotary_dim / 2 => {
                bad(format!("{} rotary factors are given for {} pairs", factors.len(), rotary_dim / 2))
            }
            Self::Factors(factors) => factors.iter().try_for_each(|&factor| check_positive("a rotary factor", factor)),
        }
    }
}

/// 1 to `limit`, as a size of this machine.
fn check_size(name: &str, value: u64, limit: usize) -> Result<usize, ConfigError> {
    match usize::try_from(value) {
        Ok(value @ 1..) if value <= limit => Ok(value),
        _ => bad(format!("{name} is {value}; 1 to {limit} is possible")),
    }
}

fn check_positive(name: &str, value: f32) -> Result<(), ConfigError> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    bad(format!("{name} is {value}; a positive number within the range of f32 is expected"))
}

/// Token ids that the model can produce. One outside the vocabulary can never appear (configs shrunk for tests carry
/// them), so it is dropped, with a line in the log.
fn known_tokens(name: &str, ids: Vec<u64>, vocab_size: usize) -> Vec<u32> {
    ids.into_iter()
        .filter_map(|id| match u32::try_from(id) {
            Ok(known) if (known as usize) < vocab_size => Some(known),
            _ => {
                tracing::warn!("{name} {id} is outside the vocabulary of {vocab_size} and is ignored");
                None
            }
        })
        .collect()
}

/// The config, and the dtype it says the weights are stored in (what `--load-format dummy` makes up).
pub(crate) fn read_json_file(path: &Path) -> Result<(DecoderConfig, Option<WeightFormat>), ModelError> {
    let text = read_text(path, MAX_CONFIG_BYTES)?;
    // serde_json refuses more than 128 levels of nesting, so a deep file cannot exhaust the stack.
    let value: Value =
        serde_json::from_str(&text).map_err(|error| ModelError::bad_file(path, format!("not valid JSON: {error}")))?;
    json::decoder_config(&value).map_err(|error| error.in_file(path))
}
