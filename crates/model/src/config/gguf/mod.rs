//! GGUF metadata to [`DecoderConfig`].
//!
//! It must not know how tensors are stored, only which are there and their sizes. Its invariant: a key that changes what
//! the model computes is either honoured or refused by name. What no key says (activations, windows by pattern, whether
//! weights of experts are normalised) llama.cpp has in its code, and the table here with the names it has there; where
//! llama.cpp and the published model differ (Falcon's exact GELU, Phi 3's window), the model is followed.

mod keys;
mod rotary;

use self::keys::{Keys, Outcome};
use super::{
    Activation, Biases, Block, DecoderConfig, Experts, FeedForward, LayerConfig, Limits, Mlp, Norm, NormKind,
    RopeScaling, RopeStyle, Rotary, bad, check_size, context, json, known_tokens, unsupported,
};
use crate::weights::gguf::GgufFile;

/// Written where a model has no such token.
const NO_TOKEN: u64 = u32::MAX as u64;

/// What is fixed by an architecture's name (llama.cpp's `src/models/<name>.cpp` and `llama_model_rope_type`).
struct Architecture {
    name: &'static str,
    style: RopeStyle,
    block: Block,
    norm: NormKind,
    query_key_norm: bool,
    activation: Activation,
    gated: bool,
    scaled_embeddings: bool,
    windows: Windows,
    experts: ArchitectureExperts,
    attention_scale: AttentionScale,
    attention_cap: SoftCap,
    logit_cap: SoftCap,
}

#[derive(Clone, Copy)]
enum SoftCap {
    /// A file that asks for one is refused.
    Never,
    /// What the key says (0: none).
    IfGiven,
    /// Always, by this where the key is absent.
    OrElse(f64),
}

#[derive(Clone, Copy)]
enum Windows {
    /// `attention.sliding_window`, where it is there, in every layer.
    All,
    /// In layers by `attention.sliding_window_pattern`: an array, or the last of so many has none.
    Pattern { pattern: u64, default_window: Option<usize>, own_rotary: OwnRotary },
    /// None, and every fourth layer goes without rotation.
    SmolLm3,
}

/// Which rotary embedding layers with a window have.
#[derive(Clone, Copy)]
enum OwnRotary {
    /// That of all others.
    No,
    /// Another base, and no scaling.
    Base,
}

#[derive(Clone, Copy)]
enum ArchitectureExperts {
    None,
    /// Where `expert_count` is above zero; `feed_forward_length` is their width.
    Mixtral,
    Qwen {
        normalize_weights: bool,
        shared: bool,
    },
}

#[derive(Clone, Copy)]
enum AttentionScale {
    /// 1 / sqrt(head_dim).
    HeadDim,
    /// The same, but 1 / sqrt(hidden / heads) in the one model with so many layers (27B).
    Gemma { layers_of_27b: usize },
}

const LLAMA: Architecture = Architecture {
    name: "llama",
    style: RopeStyle::Interleaved,
    block: Block::PreNorm,
    norm: NormKind::Rms,
    query_key_norm: false,
    activation: Activation::Silu,
    gated: true,
    scaled_embeddings: false,
    windows: Windows::All,
    experts: ArchitectureExperts::Mixtral,
    attention_scale: AttentionScale::HeadDim,
    attention_cap: SoftCap::Never,
    logit_cap: SoftCap::Never,
};

const QWEN2: Architecture =
    Architecture { name: "qwen2", style: RopeStyle::Neox, experts: ArchitectureExperts::None, ..LLAMA };

/// llama.cpp's converter adds the one to the norms' weights.
const GEMMA: Architecture =
    Architecture { name: "gemma", activation: Activation::GeluTanh, scaled_embeddings: true, ..QWEN2 };

const ARCHITECTURES: &[Architecture] = &[
    LLAMA,
    // Newer Mistral models; what they have beyond llama is refused by its key.
    Architecture { name: "mistral3", ..LLAMA },
    Architecture {
        name: "falcon",
        block: Block::Parallel,
        norm: NormKind::Layer,
        activation: Activation::Gelu,
        gated: false,
        ..QWEN2
    },
    GEMMA,
    Architecture {
        name: "gemma2",
        block: Block::SandwichNorm,
        windows: Windows::Pattern { pattern: 2, default_window: Some(4096), own_rotary: OwnRotary::No },
        attention_scale: AttentionScale::Gemma { layers_of_27b: 46 },
        attention_cap: SoftCap::OrElse(50.0),
        logit_cap: SoftCap::OrElse(30.0),
        ..GEMMA
    },
    Architecture {
        name: "gemma3",
        block: Block::SandwichNorm,
        query_key_norm: true,
        windows: Windows::Pattern { pattern: 6, default_window: None, own_rotary: OwnRotary::Base },
        attention_scale: AttentionScale::Gemma { layers_of_27b: 62 },
        logit_cap: SoftCap::IfGiven,
        ..GEMMA
    },
    Architecture { name: "phi3", ..QWEN2 },
    QWEN2,
    Architecture {
        name: "qwen2moe",
        experts: ArchitectureExperts::Qwen { normalize_weights: false, shared: true },
        ..QWEN2
    },
    Architecture { name: "qwen3", query_key_norm: true, ..QWEN2 },
    Architecture {
        name: "qwen3moe",
        query_key_norm: true,
        experts: ArchitectureExperts::Qwen { normalize_weights: true, shared: false },
        ..QWEN2
    },
    Architecture { name: "smollm3", windows: Windows::SmolLm3, experts: ArchitectureExperts::None, ..LLAMA },
];

/// For messages.
pub(super) fn known_architectures() -> String {
    ARCHITECTURES.iter().map(|architecture| architecture.name).collect::<Vec<_>>().join(", ")
}

/// How llama.cpp rotates an architecture's heads, and so the order that its converter puts the rows of queries and keys in.
/// None for an architecture that is not known.
pub(super) fn rope_style(name: &str) -> Option<RopeStyle> {
    ARCHITECTURES.iter().find(|architecture| architecture.name == name).map(|architecture| architecture.style)
}

pub(super) fn decoder_config(file: &GgufFile) -> Outcome<DecoderConfig> {
    let Some(name) = (Keys { file, architecture: "" }).text("general.architecture")? else {
        return bad("general.architecture is missing, so nothing says what this model is");
    };
    let Some(architecture) = ARCHITECTURES.iter().find(|architecture| architecture.name == name) else {
        return unsupported(format!("the architecture {name:?} is not supported yet; {}", json::known_architectures()));
    };
    let keys = Keys { file, architecture: name };
    refuse_what_changes_the_model(keys)?;

    let hidden_size = keys.required_size("embedding_length", Limits::WIDTH)?;
    let num_heads = keys.required_size("attention.head_count", Limits::HEADS)?;
    let num_kv_heads = keys.size("attention.head_count_kv", Limits::HEADS)?.unwrap_or(num_heads);
    let num_layers = keys.required_size("block_count", Limits::LAYERS)?;
    let head_dim = head_dim(keys, hidden_size, num_heads)?;
    let vocab_size = vocab_size(keys)?;
    let max_position_embeddings = keys.required_size("context_length", Limits::POSITIONS)?;
    let full = rotary::rotary(keys, architecture.style, head_dim, max_position_embeddings)?;
    let (layers, rotaries) = layers(keys, architecture, num_layers, full)?;
    let max_position_embeddings = context(&rotaries, max_position_embeddings);
    let mut config = DecoderConfig {
        architecture: name.to_owned(),
        vocab_size,
        hidden_size,
        num_heads,
        num_kv_heads,
        head_dim,
        max_position_embeddings,
        norm: norm(keys, architecture)?,
        block: match architecture.block {
            Block::Parallel if keys.first_layer_has(&["attn_norm_2.weight"]) => Block::ParallelTwoNorms,
            block => block,
        },
        query_key_norm: architecture.query_key_norm,
        rotaries,
        alibi: None,
        attention_scale: attention_scale(keys, architecture, hidden_size, num_heads, head_dim)?,
        attention_soft_cap: cap(keys, "attn_logit_softcapping", architecture.attention_cap)?,
        mlp: Mlp {
            intermediate_size: keys.required_size("feed_forward_length", Limits::WIDTH)?,
            activation: architecture.activation,
            gated: architecture.gated,
        },
        experts: None,
        biases: Biases {
            qkv: keys.first_layer_has(&["attn_q.bias", "attn_qkv.bias"]),
            output: keys.first_layer_has(&["attn_output.bias"]),
            mlp: keys.first_layer_has(&["ffn_up.bias"]),
        },
        layers,
        embedding_scale: if architecture.scaled_embeddings { (hidden_size as f64).sqrt() as f32 } else { 1.0 },
        tied_embeddings: file.tensor("output.weight").is_none(),
        head_bias: file.tensor("output.bias").is_some(),
        logit_scale: 1.0,
        masked_tokens: Vec::new(),
        logit_soft_cap: cap(keys, "final_logit_softcapping", architecture.logit_cap)?,
        bos_token_id: token_id(keys, "tokenizer.ggml.bos_token_id", vocab_size)?,
        eos_token_ids: eos_token_ids(keys, vocab_size)?,
    };
    config.experts = experts(keys, architecture, config.mlp.intermediate_size)?;
    if config.experts.is_some() {
        config.layers.iter_mut().for_each(|layer| layer.feed_forward = FeedForward::Experts);
    }
    config.drop_unused_rotaries();
    config.check()?;
    Ok(config)
}

/// Keys of other architectures, under the name of one that does not have them.
fn refuse_what_changes_the_model(keys: Keys<'_>) -> Outcome<()> {
    if keys.truth("attention.causal")? == Some(false) {
        return unsupported(format!(
            "attention in both directions ({}.attention.causal is false) is not supported",
            keys.architecture
        ));
    }
    // Values of zero say "not used", those of one scale nothing.
    for key in ["logit_scale", "residual_scale", "embedding_scale", "expert_weights_scale", "attention.value_scale"] {
        keys.refuse_number(key, &[0.0, 1.0])?;
    }
    for key in [
        "attention.clamp_kqv",
        "attention.max_alibi_bias",
        "attention.temperature_scale",
        "attention.output_scale",
        "attention.shared_kv_layers",
        "leading_dense_block_count",
        "nextn_predict_layers",
        "interleave_moe_layer_step",
        "router_logit_softcapping",
    ] {
        keys.refuse_number(key, &[0.0])?;
    }
    // Softmax is 1.
    keys.refuse_number("expert_gating_func", &[0.0, 1.0])?;
    for key in ["expert_group_count", "expert_group_used_count"] {
        keys.refuse_number(key, &[0.0, 1.0])?;
    }
    if keys.file.get(&format!("{}.rope.dimension_sections", keys.architecture)).is_some() {
        return unsupported(format!("{}.rope.dimension_sections is set, which is not supported", keys.architecture));
    }
    for (swa, full) in [
        ("attention.key_length_swa", "attention.key_length"),
        ("attention.value_length_swa", "attention.value_length"),
        ("rope.dimension_count_swa", "rope.dimension_count"),
    ] {
        if let Some(width) = keys.whole(swa)?
            && keys.whole(full)? != Some(width)
        {
            return unsupported(format!("{}.{swa} is {width}, unlike that of other layers", keys.architecture));
        }
    }
    Ok(())
}

fn head_dim(keys: Keys<'_>, hidden_size: usize, num_heads: usize) -> Outcome<usize> {
    let key_length = keys.size("attention.key_length", Limits::HEAD_DIM)?;
    let value_length = keys.size("attention.value_length", Limits::HEAD_DIM)?;
    if let Some(value_length) = value_length
        && value_length != key_length.unwrap_or(hidden_size / num_heads)
    {
        return unsupported(format!(
            "values are {value_length} wide and keys {}; different widths are not supported",
            key_length.unwrap_or(hidden_size / num_heads)
        ));
    }
    match key_length {
        Some(width) => Ok(width),
        None if hidden_size.is_multiple_of(num_heads) => Ok(hidden_size / num_heads),
        None => bad(format!(
            "{0}.embedding_length {hidden_size} is not a multiple of {0}.attention.head_count {num_heads}",
            keys.architecture
        )),
    }
}

/// The embedding decides; `vocab_size` is absent from older files and wrong in some.
fn vocab_size(keys: Keys<'_>) -> Outcome<usize> {
    let Some(embedding) = keys.file.tensor("token_embd.weight") else {
        return bad("tensor \"token_embd.weight\" is missing");
    };
    let vocab_size = check_size("the vocabulary (rows of token_embd.weight)", embedding.dimensions[1], Limits::VOCAB)?;
    match keys.file.strings("tokenizer.ggml.tokens") {
        Some(tokens) if tokens.len() > vocab_size => bad(format!(
            "tokenizer.ggml.tokens has {} entries, but token_embd.weight only {vocab_size} rows",
            tokens.len()
        )),
        _ => Ok(vocab_size),
    }
}

fn norm(keys: Keys<'_>, architecture: &Architecture) -> Outcome<Norm> {
    let key = match architecture.norm {
        NormKind::Rms => "attention.layer_norm_rms_epsilon",
        NormKind::Layer => "attention.layer_norm_epsilon",
    };
    Ok(Norm { kind: architecture.norm, eps: keys.required_number(key)? as f32, weight_offset: 0.0 })
}

fn attention_scale(
    keys: Keys<'_>,
    architecture: &Architecture,
    hidden_size: usize,
    num_heads: usize,
    head_dim: usize,
) -> Outcome<f32> {
    if let Some(scale) = keys.number("attention.scale")?.filter(|&scale| scale != 0.0) {
        return Ok(scale as f32);
    }
    let width = match architecture.attention_scale {
        AttentionScale::Gemma { layers_of_27b } if keys.whole("block_count")? == Some(layers_of_27b as u64) => {
            hidden_size / num_heads
        }
        AttentionScale::Gemma { .. } | AttentionScale::HeadDim => head_dim,
    };
    Ok((width as f64).sqrt().recip() as f32)
}

fn cap(keys: Keys<'_>, key: &str, kind: SoftCap) -> Outcome<Option<f32>> {
    let cap = match kind {
        SoftCap::Never => {
            keys.refuse_number(key, &[0.0])?;
            None
        }
        SoftCap::IfGiven => keys.number(key)?.filter(|&cap| cap != 0.0),
        SoftCap::OrElse(default) => Some(keys.number(key)?.unwrap_or(default)),
    };
    Ok(cap.map(|cap| cap as f32))
}

/// Layers with their windows, and the rotary embeddings they choose from; `full` is that of layers that see everything.
fn layers(
    keys: Keys<'_>,
    architecture: &Architecture,
    num_layers: usize,
    full: Rotary,
) -> Outcome<(Vec<LayerConfig>, Vec<Rotary>)> {
    let layer = |window, rotary| LayerConfig { window, blocks: None, rotary, feed_forward: FeedForward::Dense };
    let window = keys.size_above_zero("attention.sliding_window", Limits::POSITIONS)?;
    match architecture.windows {
        Windows::All => Ok((vec![layer(window, Some(0)); num_layers], vec![full])),
        Windows::SmolLm3 => {
            let rotary = |index: usize| (!(index + 1).is_multiple_of(4)).then_some(0);
            Ok(((0..num_layers).map(|index| layer(window, rotary(index))).collect(), vec![full]))
        }
        Windows::Pattern { pattern, default_window, own_rotary } => {
            let Some(window) = window.or(default_window) else {
                return Ok((vec![layer(None, Some(0)); num_layers], vec![full]));
            };
            const PATTERN: &str = "attention.sliding_window_pattern";
            let sliding = if let Some(sliding) = keys.truths(PATTERN, num_layers)? {
                sliding
            } else {
                let pattern = keys.whole(PATTERN)?.unwrap_or(pattern);
                (0..num_layers as u64).map(|index| pattern == 0 || index % pattern < pattern - 1).collect()
            };
            let base = keys.number("rope.freq_base_swa")?.map(|base| base as f32);
            let own = match own_rotary {
                OwnRotary::No => Rotary { base: base.unwrap_or(full.base), ..full.clone() },
                OwnRotary::Base => {
                    Rotary { base: base.unwrap_or(10_000.0), scaling: RopeScaling::None, ..full.clone() }
                }
            };
            let rotaries = if own == full { vec![full] } else { vec![full, own] };
            let last = rotaries.len() - 1;
            let layers = sliding
                .into_iter()
                .map(|sliding| if sliding { layer(Some(window), Some(last)) } else { layer(None, Some(0)) });
            Ok((layers.collect(), rotaries))
        }
    }
}

fn experts(keys: Keys<'_>, architecture: &Architecture, feed_forward: usize) -> Outcome<Option<Experts>> {
    let num_experts = keys.size_above_zero("expert_count", Limits::EXPERTS)?;
    let (num_experts, normalize_weights, width, shared) = match (architecture.experts, num_experts) {
        (ArchitectureExperts::None, Some(count)) => {
            return unsupported(format!("{count} experts are not supported in the architecture {}", architecture.name));
        }
        (ArchitectureExperts::None | ArchitectureExperts::Mixtral, None) => return Ok(None),
        (ArchitectureExperts::Qwen { .. }, None) => return Err(keys.missing("expert_count")),
        (ArchitectureExperts::Mixtral, Some(count)) => {
            keys.refuse_number("expert_shared_feed_forward_length", &[0.0])?;
            (count, true, Some(feed_forward), None)
        }
        (ArchitectureExperts::Qwen { normalize_weights, shared }, Some(count)) => {
            let width = keys.size_above_zero("expert_feed_forward_length", Limits::WIDTH)?;
            let shared_width = keys.size_above_zero("expert_shared_feed_forward_length", Limits::WIDTH)?;
            (count, normalize_weights, width, shared.then_some(shared_width.unwrap_or(feed_forward)))
        }
    };
    let per_token = keys.required_size("expert_used_count", Limits::EXPERTS)?;
    Ok(Some(Experts {
        num_experts,
        num_experts_per_token: per_token,
        intermediate_size: width.unwrap_or(feed_forward / per_token),
        activation: architecture.activation,
        normalize_weights: keys.truth("expert_weights_norm")?.unwrap_or(normalize_weights),
        shared_intermediate_size: shared,
    }))
}

fn token_id(keys: Keys<'_>, key: &'static str, vocab_size: usize) -> Outcome<Option<u32>> {
    let id = keys.whole(key)?.filter(|&id| id != NO_TOKEN);
    Ok(known_tokens(key, id.into_iter().collect(), vocab_size).first().copied())
}

/// End of text, of turn and of message all end an answer.
fn eos_token_ids(keys: Keys<'_>, vocab_size: usize) -> Outcome<Vec<u32>> {
    let mut ids = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        if let Some(id) = token_id(keys, key, vocab_size)?
            && !ids.contains(&id)
        {
            ids.push(id);
        }
    }
    Ok(ids)
}
