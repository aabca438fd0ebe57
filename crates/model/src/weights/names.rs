//! Which tensors a model has, their shapes, and where each source keeps them.
//!
//! One table for all families: what a family does differently shows in the names themselves, so each role has a short list
//! of places, and the first that a file has is it. A place is a tensor of its own, or some rows of one (fused projections,
//! stacked experts). It must not know how tensors are stored. Its invariant: [`expected`] lists exactly the tensors that the
//! decoder asks for under a config, so what it lists is checked at open and never missing later.

use super::{LayerTensor, TensorRole, view::RowsAt};
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

/// The matrices of one layer that an adapter may change: attention's, and the MLP's where it has no experts.
pub(super) fn projections(config: &DecoderConfig, layer: usize) -> Vec<Expected> {
    let mut tensors = attention(config);
    if config.layers[layer].feed_forward == FeedForward::Dense {
        tensors.extend(dense(config));
    }
    let in_layer = |(tensor, shape)| Expected::new(TensorRole::Layer(layer, tensor), shape);
    tensors.into_iter().map(in_layer).filter(|tensor| tensor.kind == TensorKind::Matrix).collect()
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
    /// transformers' classes.
    HuggingFace(Prefix),
    /// llama.cpp's converter.
    Gguf,
}

/// How names of a Hugging Face checkpoint begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Prefix {
    /// Of everything but the head.
    model: &'static str,
    /// Of the layers, after `model`.
    layers: &'static str,
    embedding: &'static str,
    final_norm: &'static str,
}

impl Prefix {
    const fn plain(model: &'static str) -> Self {
        Self { model, layers: "layers.", embedding: "embed_tokens", final_norm: "norm" }
    }

    const fn falcon(model: &'static str) -> Self {
        Self { model, layers: "h.", embedding: "word_embeddings", final_norm: "ln_f" }
    }

    /// The prefixes in use: a causal model, one saved without its head, Gemma 3 with its vision part as saved by
    /// transformers 4 and 5, Falcon.
    const ALL: [Self; 6] = [
        Self::plain("model."),
        Self::plain(""),
        Self::plain("language_model.model."),
        Self::plain("model.language_model."),
        Self::falcon("transformer."),
        Self::falcon(""),
    ];

    fn embedding_name(self) -> String {
        format!("{}{}.weight", self.model, self.embedding)
    }
}

/// Names of the head, which stands outside of the model proper.
const HEADS: [&str; 3] = ["lm_head", "language_model.lm_head", "model.lm_head"];

/// Where a role's rows may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) name: String,
    /// Of the whole stored tensor, outermost first.
    pub(super) shape: Vec<usize>,
    /// Which of its rows (of a vector: elements).
    pub(super) rows_at: RowsAt,
}

/// A place in a layer, before names and sizes are put in.
#[derive(Clone, Copy)]
enum Kept {
    /// A tensor of its own. `{}` stands for the expert's number.
    Alone(&'static str),
    /// Query, key and value in one, in this order.
    Qkv(&'static str),
    /// By key/value head: its query heads, its key, its value (Falcon in all its layouts: with one key/value head that is
    /// the plain order, with as many as query heads it is query, key, value by turns).
    QkvByHead(&'static str),
    /// Gate, then up.
    GateUp(&'static str),
    /// Rows of gate and up by turns (Phi-3-small).
    GateUpByTurns(&'static str),
    /// All experts, one after the other.
    Stacked(&'static str),
    /// All experts, each gate, then up.
    StackedGateUp(&'static str),
}

/// Layers by Falcon's names. (Phi-3-small has its norms, and names of its own.)
pub(super) fn is_falcon(config: &DecoderConfig) -> bool {
    config.norm.kind == NormKind::Layer && !is_phi3_small(config)
}

pub(super) fn is_phi3_small(config: &DecoderConfig) -> bool {
    config.architecture == "phi3small"
}

impl Naming {
    /// How a Hugging Face checkpoint's names begin; `has` says whether there is a tensor of that name.
    pub(super) fn hugging_face(config: &DecoderConfig, has: impl Fn(&str) -> bool) -> Self {
        let found = Prefix::ALL.into_iter().find(|prefix| has(&prefix.embedding_name()));
        let usual = if is_falcon(config) { Prefix::falcon("transformer.") } else { Prefix::plain("model.") };
        Self::HuggingFace(found.unwrap_or(usual))
    }

    /// Every way in which a checkpoint of this family may begin its names.
    pub(super) fn of_the_family(config: &DecoderConfig) -> impl Iterator<Item = Self> {
        let layers = if is_falcon(config) { Prefix::falcon("").layers } else { Prefix::plain("").layers };
        Prefix::ALL.into_iter().filter(move |prefix| prefix.layers == layers).map(Self::HuggingFace)
    }

    /// Where a tensor may be, most usual place first; never empty.
    pub(super) fn places(self, config: &DecoderConfig, tensor: &Expected) -> Vec<Place> {
        let shape = match tensor.kind {
            TensorKind::Matrix => vec![tensor.rows, tensor.cols],
            TensorKind::Vector => vec![tensor.cols],
        };
        let alone = |name: String| Place { name, shape: shape.clone(), rows_at: RowsAt::WHOLE };
        match (self, tensor.role) {
            (_, TensorRole::Layer(layer, part)) => {
                let prefix = self.layer_prefix(layer);
                let kept = self.kept(config.block, part);
                kept.iter().map(|kept| kept.place(&prefix, config, part, tensor)).collect()
            }
            (Self::HuggingFace(prefix), TensorRole::Embedding) => {
                let mut places = vec![alone(prefix.embedding_name())];
                // Of two tied tensors a file may have either.
                if config.tied_embeddings {
                    places.extend(head_names().map(alone));
                }
                places
            }
            (Self::HuggingFace(_), TensorRole::Head) => head_names().map(alone).collect(),
            (Self::HuggingFace(_), TensorRole::HeadBias) => {
                HEADS.iter().map(|head| alone(format!("{head}.bias"))).collect()
            }
            (Self::HuggingFace(Prefix { model, final_norm, .. }), TensorRole::FinalNorm) => {
                [final_norm, PHI3_SMALL_FINAL_NORM].map(|norm| alone(format!("{model}{norm}.weight"))).to_vec()
            }
            (Self::HuggingFace(Prefix { model, final_norm, .. }), TensorRole::FinalNormBias) => {
                [final_norm, PHI3_SMALL_FINAL_NORM].map(|norm| alone(format!("{model}{norm}.bias"))).to_vec()
            }
            (Self::Gguf, TensorRole::Embedding) => vec![alone("token_embd.weight".to_owned())],
            (Self::Gguf, TensorRole::FinalNorm) => vec![alone("output_norm.weight".to_owned())],
            (Self::Gguf, TensorRole::FinalNormBias) => vec![alone("output_norm.bias".to_owned())],
            (Self::Gguf, TensorRole::Head) => vec![alone("output.weight".to_owned())],
            (Self::Gguf, TensorRole::HeadBias) => vec![alone("output.bias".to_owned())],
        }
    }

    fn layer_prefix(self, layer: usize) -> String {
        match self {
            Self::HuggingFace(prefix) => format!("{}{}{layer}.", prefix.model, prefix.layers),
            Self::Gguf => format!("blk.{layer}."),
        }
    }

    fn kept(self, block: Block, tensor: LayerTensor) -> &'static [Kept] {
        match self {
            Self::HuggingFace(_) => in_hugging_face_layer(block, tensor),
            Self::Gguf => in_gguf_layer(block, tensor),
        }
    }

    /// True for a tensor inside one of the model's layers that is not `used`: it takes part in the computation of some
    /// other architecture, and leaving it out would give wrong answers in silence.
    pub(super) fn is_foreign(self, name: &str, num_layers: usize, used: impl Fn(&str) -> bool) -> bool {
        let Some((layer, tensor)) = self.split_layer(name) else { return false };
        if layer.parse::<usize>().is_ok_and(|layer| layer >= num_layers) || used(name) {
            return false;
        }
        match self {
            Self::HuggingFace(_) => !IGNORED_BY_TRANSFORMERS.contains(&tensor),
            Self::Gguf => true,
        }
    }

    /// Whether a tensor belongs to a layer, the embedding, the final norm or a head.
    pub(super) fn is_of_the_model(self, name: &str) -> bool {
        match self {
            Self::HuggingFace(prefix) => {
                let within = name.strip_prefix(prefix.model).is_some_and(|rest| {
                    [prefix.layers, prefix.embedding, prefix.final_norm, PHI3_SMALL_FINAL_NORM]
                        .iter()
                        .any(|part| rest.starts_with(part))
                });
                within || head_names().any(|head| head == name)
            }
            Self::Gguf => true,
        }
    }

    /// The layer's number and the rest of the name.
    pub(super) fn split_layer(self, name: &str) -> Option<(&str, &str)> {
        let rest = match self {
            Self::HuggingFace(prefix) => name.strip_prefix(prefix.model)?.strip_prefix(prefix.layers)?,
            Self::Gguf => name.strip_prefix("blk.")?,
        };
        rest.split_once('.')
    }
}

/// Tensors in layers that transformers leaves out, too: frequencies that old checkpoints saved along (the config says them
/// as well), and biases that a config does not call for.
const IGNORED_BY_TRANSFORMERS: [&str; 6] = [
    "self_attn.rotary_emb.inv_freq",
    "self_attention.rotary_emb.inv_freq",
    "self_attn.q_proj.bias",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.bias",
    "self_attn.o_proj.bias",
];

pub(super) fn head_names() -> impl Iterator<Item = String> {
    HEADS.iter().map(|head| format!("{head}.weight"))
}

/// Names in transformers' checkpoints, from the classes' modules and `conversion_mapping.py` (transformers 5.23), which
/// tells how experts were named before they were stacked.
fn in_hugging_face_layer(block: Block, tensor: LayerTensor) -> &'static [Kept] {
    use Kept::{Alone, GateUp, GateUpByTurns, Qkv, QkvByHead, Stacked, StackedGateUp};
    use LayerTensor as T;
    match tensor {
        T::AttentionNorm => match block {
            Block::ParallelTwoNorms => &[Alone("ln_attn.weight")],
            Block::PreNorm | Block::SandwichNorm | Block::Parallel => &[Alone("input_layernorm.weight")],
        },
        T::AttentionNormBias => match block {
            Block::ParallelTwoNorms => &[Alone("ln_attn.bias")],
            Block::PreNorm | Block::SandwichNorm | Block::Parallel => &[Alone("input_layernorm.bias")],
        },
        T::MlpNorm => match block {
            Block::ParallelTwoNorms => &[Alone("ln_mlp.weight")],
            Block::SandwichNorm => &[Alone("pre_feedforward_layernorm.weight")],
            Block::PreNorm | Block::Parallel => &[Alone("post_attention_layernorm.weight")],
        },
        T::MlpNormBias => match block {
            Block::ParallelTwoNorms => &[Alone("ln_mlp.bias")],
            Block::PreNorm | Block::SandwichNorm | Block::Parallel => &[Alone("post_attention_layernorm.bias")],
        },
        T::PostAttentionNorm => &[Alone("post_attention_layernorm.weight")],
        T::PostMlpNorm => &[Alone("post_feedforward_layernorm.weight")],
        T::Q => &[Alone("self_attn.q_proj.weight"), Qkv(PHI3_QKV), QkvByHead(FALCON_QKV), QkvByHead(PHI3_SMALL_QKV)],
        T::K => &[Alone("self_attn.k_proj.weight"), Qkv(PHI3_QKV), QkvByHead(FALCON_QKV), QkvByHead(PHI3_SMALL_QKV)],
        T::V => &[Alone("self_attn.v_proj.weight"), Qkv(PHI3_QKV), QkvByHead(FALCON_QKV), QkvByHead(PHI3_SMALL_QKV)],
        T::QBias => &[Alone("self_attn.q_proj.bias"), QkvByHead(FALCON_QKV_BIAS), QkvByHead(PHI3_SMALL_QKV_BIAS)],
        T::KBias => &[Alone("self_attn.k_proj.bias"), QkvByHead(FALCON_QKV_BIAS), QkvByHead(PHI3_SMALL_QKV_BIAS)],
        T::VBias => &[Alone("self_attn.v_proj.bias"), QkvByHead(FALCON_QKV_BIAS), QkvByHead(PHI3_SMALL_QKV_BIAS)],
        T::O => {
            &[Alone("self_attn.o_proj.weight"), Alone("self_attention.dense.weight"), Alone("self_attn.dense.weight")]
        }
        T::OBias => {
            &[Alone("self_attn.o_proj.bias"), Alone("self_attention.dense.bias"), Alone("self_attn.dense.bias")]
        }
        T::QueryNorm => &[Alone("self_attn.q_norm.weight")],
        T::KeyNorm => &[Alone("self_attn.k_norm.weight")],
        T::Gate => {
            &[Alone("mlp.gate_proj.weight"), GateUp("mlp.gate_up_proj.weight"), GateUpByTurns("mlp.up_proj.weight")]
        }
        // Phi-3-small has both under the name of one; the shape tells.
        T::Up => &[
            Alone("mlp.up_proj.weight"),
            GateUp("mlp.gate_up_proj.weight"),
            Alone("mlp.dense_h_to_4h.weight"),
            GateUpByTurns("mlp.up_proj.weight"),
        ],
        T::Down => &[Alone("mlp.down_proj.weight"), Alone("mlp.dense_4h_to_h.weight")],
        T::GateBias => &[Alone("mlp.gate_proj.bias"), GateUpByTurns("mlp.up_proj.bias")],
        T::UpBias => &[Alone("mlp.up_proj.bias"), Alone("mlp.dense_h_to_4h.bias"), GateUpByTurns("mlp.up_proj.bias")],
        T::DownBias => &[Alone("mlp.down_proj.bias"), Alone("mlp.dense_4h_to_h.bias")],
        T::Router => &[Alone("mlp.gate.weight"), Alone("block_sparse_moe.gate.weight")],
        T::ExpertGate(_) => &[
            Alone("mlp.experts.{}.gate_proj.weight"),
            Alone("block_sparse_moe.experts.{}.w1.weight"),
            StackedGateUp("mlp.experts.gate_up_proj"),
        ],
        T::ExpertUp(_) => &[
            Alone("mlp.experts.{}.up_proj.weight"),
            Alone("block_sparse_moe.experts.{}.w3.weight"),
            StackedGateUp("mlp.experts.gate_up_proj"),
        ],
        T::ExpertDown(_) => &[
            Alone("mlp.experts.{}.down_proj.weight"),
            Alone("block_sparse_moe.experts.{}.w2.weight"),
            Stacked("mlp.experts.down_proj"),
        ],
        T::SharedGate => &[Alone("mlp.shared_expert.gate_proj.weight")],
        T::SharedUp => &[Alone("mlp.shared_expert.up_proj.weight")],
        T::SharedDown => &[Alone("mlp.shared_expert.down_proj.weight")],
        T::SharedExpertGate => &[Alone("mlp.shared_expert_gate.weight")],
    }
}

const PHI3_QKV: &str = "self_attn.qkv_proj.weight";
const PHI3_SMALL_QKV: &str = "self_attn.query_key_value.weight";
const PHI3_SMALL_QKV_BIAS: &str = "self_attn.query_key_value.bias";
const PHI3_SMALL_FINAL_NORM: &str = "final_layernorm";
const FALCON_QKV: &str = "self_attention.query_key_value.weight";
const FALCON_QKV_BIAS: &str = "self_attention.query_key_value.bias";

/// Names in llama.cpp's files, from its `llama-arch.cpp` and the loaders in `src/models/`.
fn in_gguf_layer(block: Block, tensor: LayerTensor) -> &'static [Kept] {
    use Kept::{Alone, GateUp, Qkv, Stacked, StackedGateUp};
    use LayerTensor as T;
    match tensor {
        // Falcon 40B: the first norm is the MLP's.
        T::AttentionNorm => match block {
            Block::ParallelTwoNorms => &[Alone("attn_norm_2.weight")],
            Block::PreNorm | Block::SandwichNorm | Block::Parallel => &[Alone("attn_norm.weight")],
        },
        T::AttentionNormBias => match block {
            Block::ParallelTwoNorms => &[Alone("attn_norm_2.bias")],
            Block::PreNorm | Block::SandwichNorm | Block::Parallel => &[Alone("attn_norm.bias")],
        },
        T::MlpNorm => match block {
            Block::ParallelTwoNorms => &[Alone("attn_norm.weight")],
            Block::PreNorm | Block::SandwichNorm | Block::Parallel => &[Alone("ffn_norm.weight")],
        },
        T::MlpNormBias => match block {
            Block::ParallelTwoNorms => &[Alone("attn_norm.bias")],
            Block::PreNorm | Block::SandwichNorm | Block::Parallel => &[Alone("ffn_norm.bias")],
        },
        T::PostAttentionNorm => &[Alone("post_attention_norm.weight")],
        T::PostMlpNorm => &[Alone("post_ffw_norm.weight")],
        T::Q => &[Alone("attn_q.weight"), Qkv("attn_qkv.weight")],
        T::K => &[Alone("attn_k.weight"), Qkv("attn_qkv.weight")],
        T::V => &[Alone("attn_v.weight"), Qkv("attn_qkv.weight")],
        T::QBias => &[Alone("attn_q.bias"), Qkv("attn_qkv.bias")],
        T::KBias => &[Alone("attn_k.bias"), Qkv("attn_qkv.bias")],
        T::VBias => &[Alone("attn_v.bias"), Qkv("attn_qkv.bias")],
        T::O => &[Alone("attn_output.weight")],
        T::OBias => &[Alone("attn_output.bias")],
        T::QueryNorm => &[Alone("attn_q_norm.weight")],
        T::KeyNorm => &[Alone("attn_k_norm.weight")],
        // Phi 3 has both under the name of one; the shape tells.
        T::Gate => &[Alone("ffn_gate.weight"), GateUp("ffn_up.weight")],
        T::Up => &[Alone("ffn_up.weight"), GateUp("ffn_up.weight")],
        T::Down => &[Alone("ffn_down.weight")],
        T::GateBias => &[Alone("ffn_gate.bias")],
        T::UpBias => &[Alone("ffn_up.bias")],
        T::DownBias => &[Alone("ffn_down.bias")],
        T::Router => &[Alone("ffn_gate_inp.weight")],
        // One tensor an expert: files of Mixtral from before experts were stacked.
        T::ExpertGate(_) => {
            &[Stacked("ffn_gate_exps.weight"), StackedGateUp("ffn_gate_up_exps.weight"), Alone("ffn_gate.{}.weight")]
        }
        T::ExpertUp(_) => {
            &[Stacked("ffn_up_exps.weight"), StackedGateUp("ffn_gate_up_exps.weight"), Alone("ffn_up.{}.weight")]
        }
        T::ExpertDown(_) => &[Stacked("ffn_down_exps.weight"), Alone("ffn_down.{}.weight")],
        T::SharedGate => &[Alone("ffn_gate_shexp.weight")],
        T::SharedUp => &[Alone("ffn_up_shexp.weight")],
        T::SharedDown => &[Alone("ffn_down_shexp.weight")],
        T::SharedExpertGate => &[Alone("ffn_gate_inp_shexp.weight")],
    }
}

impl Kept {
    /// `tensor` is what `config` expects of `part`, in the layer whose names begin with `prefix`.
    fn place(self, prefix: &str, config: &DecoderConfig, part: LayerTensor, tensor: &Expected) -> Place {
        use LayerTensor as T;
        let rows = if tensor.kind == TensorKind::Matrix { tensor.rows } else { tensor.cols };
        let expert = match part {
            T::ExpertGate(expert) | T::ExpertUp(expert) | T::ExpertDown(expert) => expert,
            _ => 0,
        };
        let num_experts = config.experts.as_ref().map_or(0, |experts| experts.num_experts);
        let is_up = matches!(part, T::Up | T::UpBias | T::ExpertUp(_));
        // With outputs (of a vector: elements) in place of the role's own.
        let shape = |rows| match tensor.kind {
            TensorKind::Matrix => vec![rows, tensor.cols],
            TensorKind::Vector => vec![rows],
        };
        let (name, shape, rows_at) = match self {
            Self::Alone(name) => (name, shape(rows), RowsAt::WHOLE),
            Self::Qkv(name) => {
                let (q, kv) = qkv_rows(config);
                let first = match part {
                    T::Q | T::QBias => 0,
                    T::K | T::KBias => q,
                    _ => q + kv,
                };
                (name, shape(q + 2 * kv), RowsAt::From(first))
            }
            Self::QkvByHead(name) => {
                let (q, kv) = qkv_rows(config);
                let (queries, width) = (q / config.num_kv_heads, config.head_dim);
                let (first, run) = match part {
                    T::Q | T::QBias => (0, queries),
                    T::K | T::KBias => (queries, width),
                    _ => (queries + width, width),
                };
                (name, shape(q + 2 * kv), RowsAt::Runs { first, run, stride: queries + 2 * width })
            }
            Self::GateUp(name) => (name, shape(2 * rows), RowsAt::From(if is_up { rows } else { 0 })),
            Self::GateUpByTurns(name) => {
                (name, shape(2 * rows), RowsAt::Runs { first: usize::from(is_up), run: 1, stride: 2 })
            }
            Self::Stacked(name) => (name, vec![num_experts, rows, tensor.cols], RowsAt::From(expert * rows)),
            Self::StackedGateUp(name) => {
                let first = 2 * expert * rows + if is_up { rows } else { 0 };
                (name, vec![num_experts, 2 * rows, tensor.cols], RowsAt::From(first))
            }
        };
        Place { name: format!("{prefix}{}", name.replace("{}", &expert.to_string())), shape, rows_at }
    }
}

/// Rows of the queries, and of the keys or the values.
fn qkv_rows(config: &DecoderConfig) -> (usize, usize) {
    (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim)
}
