//! Which tensors a model has, their shapes, and what each source calls them.
//!
//! It must not know how they are stored. Its invariant: [`expected`] lists exactly the tensors that the decoder asks for
//! under a config, so what it lists is checked at open and never missing later.

use super::{LayerTensor, TensorRole};
use crate::config::{Block, DecoderConfig, Experts, FeedForward, NormKind};

/// A tensor that a config calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Expected {
    pub(super) role: TensorRole,
    /// Outputs; 1 for a vector.
    pub(super) rows: usize,
    /// Inputs, or the length of a vector.
    pub(super) cols: usize,
    pub(super) kind: TensorKind,
}

/// What a tensor is used as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TensorKind {
    /// Multiplied with: may be quantised.
    Matrix,
    /// Norm or bias: stays f32 whatever is asked for.
    Vector,
}

/// All tensors of a model, in the order of the forward pass.
pub(super) fn expected(config: &DecoderConfig) -> Vec<Expected> {
    let hidden = config.hidden_size;
    let mut tensors = vec![matrix(TensorRole::Embedding, config.vocab_size, hidden)];
    for (index, layer) in config.layers.iter().enumerate() {
        let in_layer = |(tensor, shape)| Expected::new(TensorRole::Layer(index, tensor), shape);
        tensors.extend(attention(config).into_iter().map(in_layer));
        tensors.extend(
            match (layer.feed_forward, &config.experts) {
                (FeedForward::Experts, Some(experts)) => mixture(hidden, experts),
                _ => dense(config),
            }
            .into_iter()
            .map(in_layer),
        );
    }
    tensors.push(vector(TensorRole::FinalNorm, hidden));
    if config.norm.kind == NormKind::Layer {
        tensors.push(vector(TensorRole::FinalNormBias, hidden));
    }
    if !config.tied_embeddings {
        tensors.push(matrix(TensorRole::Head, config.vocab_size, hidden));
    }
    if config.head_bias {
        tensors.push(vector(TensorRole::HeadBias, config.vocab_size));
    }
    tensors
}

/// What a tensor is used as, its rows and its columns.
type Shape = (TensorKind, usize, usize);

impl Expected {
    fn new(role: TensorRole, (kind, rows, cols): Shape) -> Self {
        Self { role, rows, cols, kind }
    }
}

fn matrix(role: TensorRole, rows: usize, cols: usize) -> Expected {
    Expected::new(role, (TensorKind::Matrix, rows, cols))
}

fn vector(role: TensorRole, cols: usize) -> Expected {
    Expected::new(role, (TensorKind::Vector, 1, cols))
}

/// Norms and projections of attention.
fn attention(config: &DecoderConfig) -> Vec<(LayerTensor, Shape)> {
    use LayerTensor as T;
    let hidden = config.hidden_size;
    let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let matrix = |rows, cols| (TensorKind::Matrix, rows, cols);
    let vector = |cols| (TensorKind::Vector, 1, cols);
    let mut tensors = vec![(T::AttentionNorm, vector(hidden))];
    if config.norm.kind == NormKind::Layer {
        tensors.push((T::AttentionNormBias, vector(hidden)));
    }
    tensors.extend([
        (T::Q, matrix(q, hidden)),
        (T::K, matrix(kv, hidden)),
        (T::V, matrix(kv, hidden)),
        (T::O, matrix(hidden, q)),
    ]);
    if config.biases.qkv {
        tensors.extend([(T::QBias, vector(q)), (T::KBias, vector(kv)), (T::VBias, vector(kv))]);
    }
    if config.biases.output {
        tensors.push((T::OBias, vector(hidden)));
    }
    if config.query_key_norm {
        tensors.extend([(T::QueryNorm, vector(config.head_dim)), (T::KeyNorm, vector(config.head_dim))]);
    }
    if config.block == Block::SandwichNorm {
        tensors.extend([(T::PostAttentionNorm, vector(hidden)), (T::PostMlpNorm, vector(hidden))]);
    }
    if config.block != Block::Parallel {
        tensors.push((T::MlpNorm, vector(hidden)));
        if config.norm.kind == NormKind::Layer {
            tensors.push((T::MlpNormBias, vector(hidden)));
        }
    }
    tensors
}

/// The MLP of a layer without experts.
fn dense(config: &DecoderConfig) -> Vec<(LayerTensor, Shape)> {
    use LayerTensor as T;
    let (hidden, inner) = (config.hidden_size, config.mlp.intermediate_size);
    let mut tensors =
        vec![(T::Up, (TensorKind::Matrix, inner, hidden)), (T::Down, (TensorKind::Matrix, hidden, inner))];
    if config.mlp.gated {
        tensors.push((T::Gate, (TensorKind::Matrix, inner, hidden)));
    }
    if config.biases.mlp {
        tensors.extend([(T::UpBias, (TensorKind::Vector, 1, inner)), (T::DownBias, (TensorKind::Vector, 1, hidden))]);
        if config.mlp.gated {
            tensors.push((T::GateBias, (TensorKind::Vector, 1, inner)));
        }
    }
    tensors
}

/// Router and experts of a layer that has them.
fn mixture(hidden: usize, experts: &Experts) -> Vec<(LayerTensor, Shape)> {
    use LayerTensor as T;
    let matrix = |rows, cols| (TensorKind::Matrix, rows, cols);
    let inner = experts.intermediate_size;
    let mut tensors = vec![(T::Router, matrix(experts.num_experts, hidden))];
    tensors.extend((0..experts.num_experts).flat_map(|expert| {
        [
            (T::ExpertGate(expert), matrix(inner, hidden)),
            (T::ExpertUp(expert), matrix(inner, hidden)),
            (T::ExpertDown(expert), matrix(hidden, inner)),
        ]
    }));
    if let Some(shared) = experts.shared_intermediate_size {
        tensors.extend([
            (T::SharedGate, matrix(shared, hidden)),
            (T::SharedUp, matrix(shared, hidden)),
            (T::SharedDown, matrix(hidden, shared)),
            (T::SharedExpertGate, matrix(1, hidden)),
        ]);
    }
    tensors
}

/// Who wrote the names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    /// transformers' LLaMA classes; `prefix` is "model." or, for a bare base model, empty.
    HuggingFace { prefix: &'static str },
    /// llama.cpp's converter.
    Gguf,
}

impl Naming {
    /// The name of a role's tensor.
    pub(super) fn name(self, role: TensorRole) -> String {
        match (self, role) {
            (Self::HuggingFace { prefix }, TensorRole::Embedding) => format!("{prefix}embed_tokens.weight"),
            (Self::HuggingFace { prefix }, TensorRole::FinalNorm) => format!("{prefix}norm.weight"),
            (Self::HuggingFace { .. }, TensorRole::Head) => "lm_head.weight".to_owned(),
            (Self::Gguf, TensorRole::Embedding) => "token_embd.weight".to_owned(),
            (Self::Gguf, TensorRole::FinalNorm) => "output_norm.weight".to_owned(),
            (Self::Gguf, TensorRole::Head) => "output.weight".to_owned(),
            (_, TensorRole::FinalNormBias) => "output_norm.bias".to_owned(),
            (_, TensorRole::HeadBias) => "output.bias".to_owned(),
            (_, TensorRole::Layer(layer, tensor)) => format!("{}{}", self.layer_prefix(layer), self.in_layer(tensor)),
        }
    }

    fn layer_prefix(self, layer: usize) -> String {
        match self {
            Self::HuggingFace { prefix } => format!("{prefix}layers.{layer}."),
            Self::Gguf => format!("blk.{layer}."),
        }
    }

    fn in_layer(self, tensor: LayerTensor) -> &'static str {
        let (hugging_face, gguf) = match tensor {
            LayerTensor::AttentionNorm => ("input_layernorm.weight", "attn_norm.weight"),
            LayerTensor::Q => ("self_attn.q_proj.weight", "attn_q.weight"),
            LayerTensor::K => ("self_attn.k_proj.weight", "attn_k.weight"),
            LayerTensor::V => ("self_attn.v_proj.weight", "attn_v.weight"),
            LayerTensor::O => ("self_attn.o_proj.weight", "attn_output.weight"),
            LayerTensor::QBias => ("self_attn.q_proj.bias", "attn_q.bias"),
            LayerTensor::KBias => ("self_attn.k_proj.bias", "attn_k.bias"),
            LayerTensor::VBias => ("self_attn.v_proj.bias", "attn_v.bias"),
            LayerTensor::OBias => ("self_attn.o_proj.bias", "attn_output.bias"),
            LayerTensor::MlpNorm => ("post_attention_layernorm.weight", "ffn_norm.weight"),
            LayerTensor::Gate => ("mlp.gate_proj.weight", "ffn_gate.weight"),
            LayerTensor::Up => ("mlp.up_proj.weight", "ffn_up.weight"),
            LayerTensor::Down => ("mlp.down_proj.weight", "ffn_down.weight"),
            // Their families are not read yet.
            _ => ("", ""),
        };
        match self {
            Self::HuggingFace { .. } => hugging_face,
            Self::Gguf => gguf,
        }
    }

    /// True for a tensor inside one of the model's layers that no table knows: it takes part in the computation of some
    /// other architecture, and leaving it out would give wrong answers in silence.
    pub(super) fn is_foreign(self, name: &str, num_layers: usize) -> bool {
        let rest = match self {
            Self::HuggingFace { prefix } => name.strip_prefix(prefix).and_then(|name| name.strip_prefix("layers.")),
            Self::Gguf => name.strip_prefix("blk."),
        };
        let Some((layer, tensor)) = rest.and_then(|rest| rest.split_once('.')) else { return false };
        if layer.parse::<usize>().is_ok_and(|layer| layer >= num_layers) {
            return false;
        }
        // Frequencies that old checkpoints saved along; the config says them, too.
        tensor != "self_attn.rotary_emb.inv_freq" && !LAYER_TENSORS.iter().any(|&known| self.in_layer(known) == tensor)
    }
}

const LAYER_TENSORS: [LayerTensor; 13] = [
    LayerTensor::AttentionNorm,
    LayerTensor::Q,
    LayerTensor::K,
    LayerTensor::V,
    LayerTensor::O,
    LayerTensor::QBias,
    LayerTensor::KBias,
    LayerTensor::VBias,
    LayerTensor::OBias,
    LayerTensor::MlpNorm,
    LayerTensor::Gate,
    LayerTensor::Up,
    LayerTensor::Down,
];
