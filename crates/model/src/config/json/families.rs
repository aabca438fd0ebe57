//! What families do differently, and the defaults of their classes in transformers (5.23, `configuration_*.py`), or of the
//! published class where transformers has none.
//!
//! A row a family: it holds facts, no code. Its invariant: a key that is not named here is the same in all families.

use super::super::{Block, NormKind};

/// One row.
pub(super) struct Family {
    pub(super) model_type: &'static str,
    /// Name in `architectures`, for configs without `model_type`.
    pub(super) class: &'static str,
    /// Where sizes may be absent: the class has them, and nested configs leave out what equals the default.
    pub(super) sizes: Option<Sizes>,
    /// None: as many as there are heads.
    pub(super) num_kv_heads: Option<usize>,
    /// None: hidden_size / num_attention_heads.
    pub(super) head_dim: Option<usize>,
    pub(super) max_position_embeddings: usize,
    pub(super) norm: FamilyNorm,
    pub(super) block: Block,
    pub(super) query_key_norm: bool,
    pub(super) rotary: FamilyRotary,
    pub(super) tied_embeddings: bool,
    pub(super) biases: FamilyBiases,
    pub(super) activation: FamilyActivation,
    pub(super) layers: FamilyLayers,
    pub(super) experts: FamilyExperts,
    /// Rows of the embedding are multiplied by sqrt(hidden_size).
    pub(super) scaled_embeddings: bool,
    pub(super) caps: FamilyCaps,
    pub(super) bos_token_id: Option<u32>,
    pub(super) eos_token_id: Option<u32>,
}

pub(super) struct Sizes {
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) num_layers: usize,
    pub(super) num_heads: usize,
}

pub(super) struct FamilyNorm {
    pub(super) kind: NormKind,
    pub(super) key: &'static str,
    pub(super) eps: f64,
    pub(super) weight_offset: f32,
}

pub(super) enum FamilyRotary {
    /// One for all layers.
    One { theta: f64 },
    /// One, of a part of each head, with longrope as the only scaling.
    Phi3,
    /// By layer type: `full_attention` and `sliding_attention`.
    Gemma3,
    /// One, or ALiBi in its place.
    Falcon,
    /// One under names of its own, with longrope whose two regimes have factors of their own.
    Phi3Small,
}

pub(super) enum FamilyBiases {
    /// `attention_bias` says it for all four projections.
    Attention,
    /// That, and `mlp_bias` for the three of the MLP.
    AttentionAndMlp,
    /// Query, key and value always have one.
    Qkv,
    /// `qkv_bias` says it for query, key and value; absent means yes.
    ConfiguredQkv,
    /// `bias` says it for all.
    All,
    /// Everywhere but in the head.
    Always,
    None,
}

pub(super) enum FamilyActivation {
    /// `hidden_act`, silu where absent.
    HiddenAct,
    /// `hidden_act`; "gelu" means its approximation by tanh, which is also what is meant where it is absent.
    Gemma,
    /// `hidden_activation`, gelu_pytorch_tanh where absent.
    HiddenActivation,
    /// `activation`, gelu where absent, and no gate.
    Falcon,
    /// gegelu and nothing else.
    Phi3Small,
}

pub(super) enum FamilyLayers {
    /// All alike, no window.
    Plain,
    /// `sliding_window` holds in every layer, if it is there.
    Windowed,
    /// The same, 4096 where the key is absent; or as `layer_types` says.
    Mistral,
    /// The same, where `use_sliding_window` is set.
    Qwen3Moe,
    /// `sliding_window` holds from `max_window_layers` on, or as `layer_types` says, where `use_sliding_window` is set.
    Qwen2,
    /// In every second layer below `max_window_layers`, or as `layer_types` says.
    Qwen2Moe,
    /// In every second layer from the first, or as `layer_types` says.
    Gemma2,
    /// In all but every `sliding_window_pattern`-th layer, or as `layer_types` says.
    Gemma3,
    /// Patterns of blocks in all but every `dense_attention_every_n_layers`-th.
    Phi3Small,
    /// `no_rope_layers`, else every `no_rope_layer_interval`-th layer goes without rotary embedding.
    SmolLm3,
}

pub(super) enum FamilyExperts {
    None,
    /// Every layer has them; `intermediate_size` is theirs.
    Mixtral,
    /// `decoder_sparse_step` and `mlp_only_layers` say which layers have them.
    Qwen {
        num_experts: usize,
        per_token: usize,
        intermediate_size: usize,
        shared_intermediate_size: Option<usize>,
    },
}

/// Soft caps and the score's scale.
pub(super) enum FamilyCaps {
    /// None, and 1 / sqrt(head_dim).
    None,
    /// None, and a scale by muP.
    Phi3Small,
    /// Both caps, with defaults, and `query_pre_attn_scalar`.
    Gemma2,
    /// A cap on logits only, without a default, and `query_pre_attn_scalar`. (The class reads a cap on scores, too, and its
    /// attention leaves it out.)
    Gemma3,
}

const RMS: FamilyNorm = FamilyNorm { kind: NormKind::Rms, key: "rms_norm_eps", eps: 1e-6, weight_offset: 0.0 };
/// Checkpoints hold the weight minus one.
const GEMMA_RMS: FamilyNorm = FamilyNorm { weight_offset: 1.0, ..RMS };
const RMS_1E5: FamilyNorm = FamilyNorm { eps: 1e-5, ..RMS };

const LLAMA: Family = Family {
    model_type: "llama",
    class: "LlamaForCausalLM",
    sizes: None,
    num_kv_heads: None,
    head_dim: None,
    max_position_embeddings: 2048,
    norm: RMS,
    block: Block::PreNorm,
    query_key_norm: false,
    rotary: FamilyRotary::One { theta: 10_000.0 },
    tied_embeddings: false,
    biases: FamilyBiases::AttentionAndMlp,
    activation: FamilyActivation::HiddenAct,
    layers: FamilyLayers::Plain,
    experts: FamilyExperts::None,
    scaled_embeddings: false,
    caps: FamilyCaps::None,
    bos_token_id: Some(1),
    eos_token_id: Some(2),
};

const MISTRAL: Family = Family {
    model_type: "mistral",
    class: "MistralForCausalLM",
    num_kv_heads: Some(8),
    max_position_embeddings: 131_072,
    biases: FamilyBiases::None,
    layers: FamilyLayers::Mistral,
    ..LLAMA
};

const QWEN2: Family = Family {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    num_kv_heads: Some(32),
    max_position_embeddings: 32_768,
    biases: FamilyBiases::Qkv,
    layers: FamilyLayers::Qwen2,
    bos_token_id: None,
    eos_token_id: None,
    ..LLAMA
};

const GEMMA: Family = Family {
    model_type: "gemma",
    class: "GemmaForCausalLM",
    num_kv_heads: Some(16),
    head_dim: Some(256),
    max_position_embeddings: 8192,
    norm: GEMMA_RMS,
    tied_embeddings: true,
    biases: FamilyBiases::Attention,
    activation: FamilyActivation::Gemma,
    scaled_embeddings: true,
    bos_token_id: Some(2),
    eos_token_id: Some(1),
    ..LLAMA
};

const GEMMA2: Family = Family {
    model_type: "gemma2",
    class: "Gemma2ForCausalLM",
    num_kv_heads: Some(4),
    block: Block::SandwichNorm,
    activation: FamilyActivation::HiddenActivation,
    layers: FamilyLayers::Gemma2,
    caps: FamilyCaps::Gemma2,
    ..GEMMA
};

pub(super) const FAMILIES: &[Family] = &[
    LLAMA,
    MISTRAL,
    // transformers reads a Mistral with `layer_types` as this one.
    Family { model_type: "ministral", class: "MinistralForCausalLM", ..MISTRAL },
    Family {
        model_type: "mixtral",
        class: "MixtralForCausalLM",
        norm: RMS_1E5,
        rotary: FamilyRotary::One { theta: 1_000_000.0 },
        layers: FamilyLayers::Windowed,
        experts: FamilyExperts::Mixtral,
        ..MISTRAL
    },
    Family {
        model_type: "falcon",
        class: "FalconForCausalLM",
        norm: FamilyNorm { kind: NormKind::Layer, key: "layer_norm_epsilon", eps: 1e-5, weight_offset: 0.0 },
        rotary: FamilyRotary::Falcon,
        tied_embeddings: true,
        biases: FamilyBiases::All,
        activation: FamilyActivation::Falcon,
        bos_token_id: Some(11),
        eos_token_id: Some(11),
        ..LLAMA
    },
    GEMMA,
    GEMMA2,
    Family {
        model_type: "gemma3_text",
        class: "Gemma3ForCausalLM",
        sizes: Some(Sizes {
            vocab_size: 262_208,
            hidden_size: 2304,
            intermediate_size: 9216,
            num_layers: 26,
            num_heads: 8,
        }),
        max_position_embeddings: 131_072,
        query_key_norm: true,
        rotary: FamilyRotary::Gemma3,
        layers: FamilyLayers::Gemma3,
        caps: FamilyCaps::Gemma3,
        ..GEMMA2
    },
    Family {
        model_type: "phi3",
        class: "Phi3ForCausalLM",
        max_position_embeddings: 4096,
        norm: RMS_1E5,
        rotary: FamilyRotary::Phi3,
        biases: FamilyBiases::None,
        layers: FamilyLayers::Windowed,
        eos_token_id: Some(32_000),
        ..LLAMA
    },
    // Not a class of transformers: the published `configuration_phi3_small.py`.
    Family {
        model_type: "phi3small",
        class: "Phi3SmallForCausalLM",
        num_kv_heads: Some(8),
        max_position_embeddings: 8192,
        norm: FamilyNorm { kind: NormKind::Layer, key: "layer_norm_epsilon", eps: 1e-5, weight_offset: 0.0 },
        rotary: FamilyRotary::Phi3Small,
        tied_embeddings: true,
        biases: FamilyBiases::Always,
        activation: FamilyActivation::Phi3Small,
        layers: FamilyLayers::Phi3Small,
        caps: FamilyCaps::Phi3Small,
        bos_token_id: None,
        eos_token_id: Some(100_257),
        ..LLAMA
    },
    QWEN2,
    Family {
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        head_dim: Some(128),
        query_key_norm: true,
        biases: FamilyBiases::Attention,
        ..QWEN2
    },
    Family {
        model_type: "qwen2_moe",
        class: "Qwen2MoeForCausalLM",
        num_kv_heads: Some(16),
        biases: FamilyBiases::ConfiguredQkv,
        layers: FamilyLayers::Qwen2Moe,
        experts: FamilyExperts::Qwen {
            num_experts: 60,
            per_token: 4,
            intermediate_size: 1408,
            shared_intermediate_size: Some(5632),
        },
        ..QWEN2
    },
    Family {
        model_type: "qwen3_moe",
        class: "Qwen3MoeForCausalLM",
        num_kv_heads: Some(4),
        query_key_norm: true,
        biases: FamilyBiases::Attention,
        layers: FamilyLayers::Qwen3Moe,
        experts: FamilyExperts::Qwen {
            num_experts: 128,
            per_token: 8,
            intermediate_size: 768,
            shared_intermediate_size: None,
        },
        ..QWEN2
    },
    Family {
        model_type: "smollm3",
        class: "SmolLM3ForCausalLM",
        num_kv_heads: Some(4),
        max_position_embeddings: 32_768,
        rotary: FamilyRotary::One { theta: 2_000_000.0 },
        tied_embeddings: true,
        layers: FamilyLayers::SmolLm3,
        bos_token_id: Some(128_000),
        eos_token_id: Some(128_001),
        ..LLAMA
    },
];
