//! Which tensors a model has, their shapes, and what each source calls them.
//!
//! It must not know how they are stored. Its invariant: [`expected`] lists exactly the tensors that the decoder asks for
//! under a config, so what it lists is checked at open and never missing later.

use super::{LayerTensor, TensorRole};
use crate::config::DecoderConfig;

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
    let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let inner = config.mlp.intermediate_size;
    let matrix = |role, rows, cols| Expected { role, rows, cols, kind: TensorKind::Matrix };
    let vector = |role, cols| Expected { role, rows: 1, cols, kind: TensorKind::Vector };

    let mut tensors = vec![matrix(TensorRole::Embedding, config.vocab_size, hidden)];
    for layer in 0..config.num_layers() {
        let role = |tensor| TensorRole::Layer(layer, tensor);
        tensors.push(vector(role(LayerTensor::AttentionNorm), hidden));
        tensors.push(matrix(role(LayerTensor::Q), q, hidden));
        tensors.push(matrix(role(LayerTensor::K), kv, hidden));
        tensors.push(matrix(role(LayerTensor::V), kv, hidden));
        tensors.push(matrix(role(LayerTensor::O), hidden, q));
        if config.biases.qkv {
            tensors.push(vector(role(LayerTensor::QBias), q));
            tensors.push(vector(role(LayerTensor::KBias), kv));
            tensors.push(vector(role(LayerTensor::VBias), kv));
        }
        if config.biases.output {
            tensors.push(vector(role(LayerTensor::OBias), hidden));
        }
        tensors.push(vector(role(LayerTensor::MlpNorm), hidden));
        tensors.push(matrix(role(LayerTensor::Gate), inner, hidden));
        tensors.push(matrix(role(LayerTensor::Up), inner, hidden));
        tensors.push(matrix(role(LayerTensor::Down), hidden, inner));
    }
    tensors.push(vector(TensorRole::FinalNorm, hidden));
    if !config.tied_embeddings {
        tensors.push(matrix(TensorRole::Head, config.vocab_size, hidden));
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
