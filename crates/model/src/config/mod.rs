//! One decoder, many families: a family is a value of [`DecoderConfig`].
//!
//! `config.json` (older keys and the newer `rope_parameters`) and GGUF metadata both become one. An axis that only a family
//! not yet in needs is added with that family; what cannot be expressed is refused by name, never approximated. It must
//! not know tensors. Its invariant: a `DecoderConfig` made here has passed `DecoderConfig::check`, so sizes are within
//! `Limits` and fit each other.

mod gguf;
mod json;
mod native;

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) use self::{
    json::{CheckpointConfig, GptqZeros, StoredQuantization},
    native::of_decoder,
};
use crate::{
    ModelError,
    weights::{gguf::GgufFile, mmap::read_text},
};

/// A config.json larger than this is not one (those in use have a few kB, with label tables a few MB).
pub(crate) const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Everything the decoder needs to know about a model besides its weights. Sizes in elements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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
    /// Normalisation of the residual stream, and of heads where `query_key_norm` is set.
    pub norm: Norm,
    /// How norms, attention and MLP of a layer follow each other.
    pub block: Block,
    /// Each query and key head is normalised over its `head_dim` elements before the rotation (Qwen 3, Gemma 3).
    pub query_key_norm: bool,
    /// Rotary embeddings that layers choose from (Gemma 3 has two; others one, or none). All have one style and one width.
    pub rotaries: Vec<Rotary>,
    /// Biases by distance instead of a rotation (Falcon RW).
    pub alibi: Option<Alibi>,
    /// Scores are multiplied by this (1 / sqrt(head_dim) unless a family says otherwise).
    pub attention_scale: f32,
    /// Scaled scores become `cap * tanh(score / cap)` (Gemma 2).
    pub attention_soft_cap: Option<f32>,
    /// The MLP of layers that have no experts.
    pub mlp: Mlp,
    /// The experts of layers that have them.
    pub experts: Option<Experts>,
    /// Which projections add a bias.
    pub biases: Biases,
    /// Per-layer differences, `[num_layers]`.
    pub layers: Vec<LayerConfig>,
    /// Embedding rows are multiplied by this (Gemma: sqrt(hidden_size)); the head is not.
    pub embedding_scale: f32,
    /// The head shares the embedding's matrix.
    pub tied_embeddings: bool,
    /// The head adds a bias.
    pub head_bias: bool,
    /// Logits are multiplied by this.
    pub logit_scale: f32,
    /// Scaled logits become `cap * tanh(logit / cap)` (Gemma 2).
    pub logit_soft_cap: Option<f32>,
    /// Tokens that the vocabulary counts and nothing means: their logits become the least f32 (Phi-3-small).
    pub masked_tokens: Vec<u32>,
    /// From the file; generation_config.json wins in the engine.
    pub bos_token_id: Option<u32>,
    /// From the file.
    pub eos_token_ids: Vec<u32>,
}

/// Which projections add a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Biases {
    /// Query, key and value.
    pub qkv: bool,
    /// The attention's output.
    pub output: bool,
    /// All projections of the MLP.
    pub mlp: bool,
}

/// How norms, attention and MLP of a layer follow each other. x is the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Block {
    /// `x += attention(norm(x)); x += mlp(norm(x))`: LLaMA and most others.
    PreNorm,
    /// `x += norm(attention(norm(x))); x += norm(mlp(norm(x)))`, four norms: Gemma 2 and 3.
    SandwichNorm,
    /// `x += attention(n) + mlp(n)`, n = norm(x): Falcon 7B.
    Parallel,
    /// `x += attention(norm(x)) + mlp(norm(x))`, two norms of the same x: Falcon 40B and 11B.
    ParallelTwoNorms,
}

/// What one layer does differently.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerConfig {
    /// Sliding window: a row at p sees keys in (p - window, p].
    pub window: Option<usize>,
    /// A pattern of blocks of keys, of which a row sees some (Phi-3-small). None: all.
    #[serde(with = "native::sparse_blocks", default)]
    pub blocks: Option<SparseBlocks>,
    /// Index into `rotaries`. None: this layer does not rotate (SmolLM3's every fourth, all with ALiBi).
    pub rotary: Option<usize>,
    /// What stands where the MLP stands.
    pub feed_forward: FeedForward,
}

/// What stands where the MLP stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeedForward {
    /// `DecoderConfig::mlp`.
    Dense,
    /// `DecoderConfig::experts`.
    Experts,
}

/// Normalisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Norm {
    /// What is computed.
    pub kind: NormKind,
    /// Added to the mean square (Rms) or the variance (Layer).
    pub eps: f32,
    /// Added to the stored weight at load (Gemma's checkpoints store weight - 1; llama.cpp's converter adds it already).
    pub weight_offset: f32,
}

/// Kinds of normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// `x / rms(x) * weight`.
    Rms,
    /// `(x - mean(x)) / std(x) * weight + bias`: Falcon.
    Layer,
}

/// Attention with linear biases (Press et al. 2021): to each score, `slope(head) * position of the key`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Alibi {
    /// One a query head. What is added to a score that has been scaled: a family that adds before it scales (Falcon) has the
    /// scale in its slopes.
    ///
    /// Falcon, the one family here, multiplies in bfloat16: what transformers adds is `bf16(bf16(slope / attention_scale) *
    /// position) * attention_scale`, where the inner rounding gives its own slope back exactly. For slopes that are powers of
    /// two the product is exact up to position 256; beyond, and for other numbers of heads, it matters.
    pub slopes: Vec<f32>,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotary {
    /// Which elements form a pair. Hugging Face checkpoints: Neox; GGUF files of the llama architecture: Interleaved
    /// (llama.cpp's converter permutes q and k).
    #[serde(with = "native::RopeStyleName")]
    pub style: RopeStyle,
    /// Rotated elements of each head (head_dim unless partial).
    pub dim: usize,
    /// theta.
    pub base: f32,
    /// How positions beyond the original length are handled.
    pub scaling: RopeScaling,
}

pub use bindery_kernels::{Activation, RopeStyle, SparseBlocks};

/// Scaling of rotary frequencies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
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
    /// Phi 3 (LongRoPE, Ding et al. 2024): divisors by pair, one set while a request's known tokens fit the original
    /// length and another beyond it.
    LongRope {
        /// `[dim / 2]`, up to the original length.
        short: Vec<f32>,
        /// `[dim / 2]`, beyond it.
        long: Vec<f32>,
        /// Tokens.
        original_max_position_embeddings: usize,
        /// Cosines and sines are multiplied by this up to the original length.
        attention_factor: f32,
        /// Beyond it; the same in all families but Phi-3-small.
        long_attention_factor: f32,
    },
    /// The base grows with the length of the request (NTK-aware, "dynamic").
    Dynamic {
        /// How much the base grows.
        factor: f32,
        /// Up to this many tokens nothing changes.
        original_max_position_embeddings: usize,
    },
    /// YaRN (Peng et al. 2023), whatever the length, as transformers computes it.
    Yarn {
        /// Of low frequencies.
        factor: f32,
        /// Rotations within the original length above which a pair is kept.
        beta_fast: f32,
        /// Rotations below which a pair is stretched fully.
        beta_slow: f32,
        /// Context before scaling.
        original_max_position_embeddings: usize,
        /// Cosines and sines are multiplied by this.
        attention_factor: f32,
        /// The two limits are rounded to whole pairs.
        truncate: bool,
    },
}

/// The MLP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mlp {
    /// Width inside.
    pub intermediate_size: usize,
    /// Of the gate, or, without a gate, of the only product.
    #[serde(with = "native::ActivationName")]
    pub activation: Activation,
    /// `down(activation(gate(x)) * up(x))`; false: `down(activation(up(x)))` (Falcon).
    pub gated: bool,
}

/// A mixture of experts: `sum over the chosen of weight * expert(x)`, each expert a gated MLP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// How many there are.
    pub num_experts: usize,
    /// How many compute a token.
    pub num_experts_per_token: usize,
    /// Width inside each.
    pub intermediate_size: usize,
    /// Of their gates.
    #[serde(with = "native::ActivationName")]
    pub activation: Activation,
    /// The chosen ones' softmax weights are divided by their sum (Mixtral, Qwen 3); false: they stay shares of all (Qwen 2).
    pub normalize_weights: bool,
    /// Width of an expert that computes every token, times sigmoid of a learned gate (Qwen 2 MoE).
    pub shared_intermediate_size: Option<usize>,
}

/// The order of rotated elements in GGUF files of an architecture; None where the architecture is not known.
pub(crate) fn gguf_rope_style(architecture: &str) -> Option<RopeStyle> {
    gguf::rope_style(architecture)
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
    /// Of one layer, and of all.
    const EXPERTS: usize = 1 << 12;
    /// Choosing them takes the square of their number for each token.
    const EXPERTS_PER_TOKEN: usize = 64;
    const ALL_EXPERTS: usize = 1 << 17;
}

impl DecoderConfig {
    /// Layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Reads a config.json as Hugging Face's transformers understands it.
    pub fn from_json_file(path: &Path) -> Result<Self, ModelError> {
        Ok(read_json_file(path)?.decoder)
    }

    /// Reads the metadata of a GGUF file (and its rotary factors, the sizes of its embedding, and which biases it has).
    pub fn from_gguf(file: &GgufFile) -> Result<Self, ModelError> {
        gguf::decoder_config(file).map_err(|error| error.in_file(file.path()))
    }

    /// The name that llama.cpp has for this architecture (`general.architecture`). A published Mistral or Mixtral is a
    /// `llama` there.
    pub(crate) fn gguf_architecture(&self) -> &str {
        match self.architecture.as_str() {
            "mistral" | "mixtral" => "llama",
            "gemma3_text" => "gemma3",
            "qwen2_moe" => "qwen2moe",
            "qwen3_moe" => "qwen3moe",
            name => name,
        }
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
        for window in self.layers.iter().filter_map(|layer| layer.window) {
            check_size("the sliding window", window as u64, Limits::POSITIONS)?;
        }
        for blocks in self.layers.iter().filter_map(|layer| layer.blocks) {
            check_size("the attention pattern's block", blocks.block_size as u64, Limits::POSITIONS)?;
            check_size(
                "the attention pattern's number of local blocks",
                blocks.num_local_blocks as u64,
                Limits::POSITIONS,
            )?;
            check_size("the attention pattern's stride", blocks.vertical_stride as u64, Limits::POSITIONS)?;
        }
        if let Activation::Gegelu { limit } = self.mlp.activation {
            check_positive("the activation's limit", limit)?;
        }
        check_positive("the logits' scale", self.logit_scale)?;
        check_positive("the norm's epsilon", self.norm.eps)?;
        check_positive("the score's scale", self.attention_scale)?;
        check_positive("the embedding's scale", self.embedding_scale)?;
        for (name, cap) in [("scores", self.attention_soft_cap), ("logits", self.logit_soft_cap)] {
            cap.map_or(Ok(()), |cap| check_positive(&format!("the soft cap of {name}"), cap))?;
        }
        if let Some(experts) = &self.experts {
            experts.check(self.layers.iter().filter(|layer| layer.feed_forward == FeedForward::Experts).count())?;
        }
        self.rotaries.iter().try_for_each(|rotary| rotary.check(self.head_dim))
    }

    /// Whether any layer rotates by the embedding of this number.
    pub(crate) fn uses_rotary(&self, index: usize) -> bool {
        self.layers.iter().any(|layer| layer.rotary == Some(index))
    }

    /// Leaves out rotary embeddings that no layer uses (Gemma 3 with layers of one type only), and counts the rest anew.
    fn drop_unused_rotaries(&mut self) {
        let kept: Vec<usize> = (0..self.rotaries.len()).filter(|&index| self.uses_rotary(index)).collect();
        // A model that rotates nowhere keeps its own: there is nothing to count anew.
        if kept.is_empty() || kept.len() == self.rotaries.len() {
            return;
        }
        for layer in &mut self.layers {
            layer.rotary = layer.rotary.and_then(|index| kept.iter().position(|&kept| kept == index));
        }
        self.rotaries = kept.iter().map(|&index| self.rotaries[index].clone()).collect();
    }
}

impl Experts {
    fn check(&self, num_layers: usize) -> Result<(), ConfigError> {
        check_size("the number of experts", self.num_experts as u64, Limits::EXPERTS)?;
        check_size(
            "the number of experts in all layers",
            self.num_experts.saturating_mul(num_layers) as u64,
            Limits::ALL_EXPERTS,
        )?;
        let most = self.num_experts.min(Limits::EXPERTS_PER_TOKEN);
        check_size("the number of experts that compute a token", self.num_experts_per_token as u64, most)?;
        check_size("the width of an expert", self.intermediate_size as u64, Limits::WIDTH)?;
        if let Some(shared) = self.shared_intermediate_size {
            check_size("the width of the shared expert", shared as u64, Limits::WIDTH)?;
        }
        Ok(())
    }
}

/// Tokens a request may have. Configs whose scaling was switched on later (Qwen's YaRN, Vicuna's linear, dynamic) still
/// say how far the model was trained, and the scaling reaches its factor times as far, as vLLM takes it. LLaMA 3.1,
/// longrope and Gemma 3 (the only one with two rotaries) count it already.
fn context(rotaries: &[Rotary], max_position_embeddings: usize) -> usize {
    let [rotary] = rotaries else { return max_position_embeddings };
    let (trained, factor) = match rotary.scaling {
        RopeScaling::Linear { factor } => (max_position_embeddings, factor),
        RopeScaling::Dynamic { factor, original_max_position_embeddings: original }
        | RopeScaling::Yarn { factor, original_max_position_embeddings: original, .. } => (original, factor),
        RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::Factors(_) | RopeScaling::LongRope { .. } => {
            return max_position_embeddings;
        }
    };
    let reach = (trained as f64 * f64::from(factor)) as usize;
    reach.max(max_position_embeddings).min(Limits::POSITIONS)
}

impl Rotary {
    fn check(&self, head_dim: usize) -> Result<(), ConfigError> {
        check_size("the rotary width", self.dim as u64, head_dim)?;
        if !self.dim.is_multiple_of(2) {
            return bad(format!("the rotary width is {}; it must be even, since elements turn in pairs", self.dim));
        }
        check_positive("the rotary base", self.base)?;
        if matches!(self.scaling, RopeScaling::Yarn { .. }) && self.base <= 1.0 {
            return bad(format!("the rotary base is {}; YaRN takes its logarithm, so it must be above 1", self.base));
        }
        self.scaling.check(self.dim)
    }
}

impl RopeScaling {
    fn check(&self, rotary_dim: usize) -> Result<(), ConfigError> {
        let factors = |name: &str, factors: &[f32]| {
            if factors.len() != rotary_dim / 2 {
                return bad(format!("{} {name}s are given for {} pairs", factors.len(), rotary_dim / 2));
            }
            factors.iter().try_for_each(|&factor| check_positive(&format!("a {name}"), factor))
        };
        let original = |length: usize| {
            check_size("original_max_position_embeddings", length as u64, Limits::POSITIONS).map(|_| ())
        };
        const FACTOR: &str = "the rotary scaling's factor";
        const ATTENTION_FACTOR: &str = "the rotary scaling's attention factor";
        match self {
            Self::None => Ok(()),
            Self::Linear { factor } => check_positive(FACTOR, *factor),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                check_positive(FACTOR, *factor)?;
                check_positive("low_freq_factor", *low_freq_factor)?;
                check_positive("high_freq_factor", *high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    return bad(format!(
                        "high_freq_factor is {high_freq_factor}; it must be above low_freq_factor, {low_freq_factor}"
                    ));
                }
                original(*original_max_position_embeddings)
            }
            Self::Factors(values) => factors("rotary factor", values),
            Self::LongRope {
                short,
                long,
                original_max_position_embeddings,
                attention_factor,
                long_attention_factor,
            } => {
                factors("short rotary factor", short)?;
                factors("long rotary factor", long)?;
                check_positive(ATTENTION_FACTOR, *attention_factor)?;
                check_positive(ATTENTION_FACTOR, *long_attention_factor)?;
                original(*original_max_position_embeddings)
            }
            Self::Dynamic { factor, original_max_position_embeddings } => {
                check_positive(FACTOR, *factor)?;
                if rotary_dim <= 2 {
                    return bad("dynamic rotary scaling needs more than one pair a head");
                }
                original(*original_max_position_embeddings)
            }
            Self::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_max_position_embeddings,
                attention_factor,
                truncate: _,
            } => {
                check_positive(FACTOR, *factor)?;
                check_positive("beta_fast", *beta_fast)?;
                check_positive("beta_slow", *beta_slow)?;
                check_positive(ATTENTION_FACTOR, *attention_factor)?;
                original(*original_max_position_embeddings)
            }
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

/// The config, and what it says of how weights are stored.
pub(crate) fn read_json_file(path: &Path) -> Result<CheckpointConfig, ModelError> {
    let text = read_text(path, MAX_CONFIG_BYTES)?;
    // serde_json refuses more than 128 levels of nesting, so a deep file cannot exhaust the stack.
    let value: Value =
        serde_json::from_str(&text).map_err(|error| ModelError::bad_file(path, format!("not valid JSON: {error}")))?;
    let read = if native::is_native(&value) { native::decoder_config(&value) } else { json::decoder_config(&value) };
    read.map_err(|error| error.in_file(path))
}
