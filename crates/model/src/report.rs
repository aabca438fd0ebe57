//! What a model is made of and what it takes, from the metadata of its files alone.
//!
//! Its figures are those of loading: formats and bytes come from the functions that loading goes by, so what is reported
//! before is what [`crate::ModelInfo`] says after. It must not know who serves it or what memory there is. Invariant: no
//! weight is read, and nothing is allocated in proportion to one.

use std::collections::BTreeMap;

use bindery_kernels::Isa;

use crate::{
    config::DecoderConfig,
    model::{BackendKind, KvCacheDtype, LoadOptions, kv_bytes_per_token},
    weights::{HeldAs, LayerTensor, TensorRole, TensorView, WeightFormat, WeightStore},
};

/// What a model takes when it is served, and what its parameters are stored as. Sizes in bytes unless named otherwise.
#[derive(Clone, Debug)]
pub struct ModelReport {
    /// The model's structure.
    pub config: DecoderConfig,
    /// Weights, counted once where tied.
    pub num_parameters: u64,
    /// Of those, what one token is computed with: of a mixture's experts, as many as are chosen.
    pub num_active_parameters: u64,
    /// By what tensors do and what they are stored and held as.
    pub groups: Vec<TensorGroup>,
    /// Weights as stored.
    pub stored_bytes: u64,
    /// Weights as held in memory; [`crate::ModelInfo::weight_bytes`] once the model is loaded.
    pub weight_bytes: u64,
    /// What keys and values are kept as under the options; never `Auto`.
    pub kv_cache_dtype: KvCacheDtype,
    /// Keys and values of one token in all layers, for each type that the backend can keep them in. A layer with a sliding
    /// window keeps those of all tokens, too.
    pub kv_bytes_per_token: Vec<(KvCacheDtype, usize)>,
}

/// Tensors of one kind with one format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorGroup {
    /// What they do.
    pub part: TensorPart,
    /// What they are stored as.
    pub stored: WeightFormat,
    /// What they become at load.
    pub held: HeldAs,
    /// Their elements.
    pub num_parameters: u64,
    /// Scales counted.
    pub stored_bytes: u64,
    /// Scales and padding counted.
    pub held_bytes: u64,
}

/// What tensors do, in the order of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum TensorPart {
    /// The table of tokens; the head, too, where they are tied.
    Embedding,
    /// Query, key, value and output projections.
    Attention,
    /// Projections of layers without experts.
    Mlp,
    /// What chooses experts.
    Router,
    /// Experts of which some are chosen.
    Experts,
    /// Experts that compute every token.
    SharedExpert,
    /// Where it is not the embedding.
    Head,
    /// Vectors: all norms, and biases of all parts.
    Norms,
}

impl TensorPart {
    fn of(role: TensorRole, tensor: &TensorView<'_>) -> Self {
        use LayerTensor as T;
        if !tensor.is_matrix() {
            return Self::Norms;
        }
        match role {
            TensorRole::Embedding => Self::Embedding,
            TensorRole::Head => Self::Head,
            TensorRole::FinalNorm | TensorRole::FinalNormBias | TensorRole::HeadBias => Self::Norms,
            TensorRole::Layer(_, part) => match part {
                T::Q | T::K | T::V | T::O => Self::Attention,
                T::Gate | T::Up | T::Down => Self::Mlp,
                T::Router | T::SharedExpertGate => Self::Router,
                T::ExpertGate(_) | T::ExpertUp(_) | T::ExpertDown(_) => Self::Experts,
                T::SharedGate | T::SharedUp | T::SharedDown => Self::SharedExpert,
                T::AttentionNorm
                | T::AttentionNormBias
                | T::QBias
                | T::KBias
                | T::VBias
                | T::OBias
                | T::QueryNorm
                | T::KeyNorm
                | T::PostAttentionNorm
                | T::MlpNorm
                | T::MlpNormBias
                | T::PostMlpNorm
                | T::GateBias
                | T::UpBias
                | T::DownBias => Self::Norms,
            },
        }
    }
}

/// See [`crate::OpenedModel::report`].
pub(crate) fn report(
    store: &WeightStore,
    options: &LoadOptions,
    isa: Isa,
    kv_cache_dtype: KvCacheDtype,
) -> ModelReport {
    let config = store.config();
    let mut groups = BTreeMap::new();
    for (role, tensor) in store.tensors() {
        let part = TensorPart::of(role, &tensor);
        let (held, bytes) = held(part, &tensor, options, isa);
        let empty =
            TensorGroup { part, stored: tensor.format, held, num_parameters: 0, stored_bytes: 0, held_bytes: 0 };
        let group = groups.entry((part, tensor.format, held)).or_insert(empty);
        group.num_parameters += tensor.rows as u64 * tensor.cols as u64;
        group.stored_bytes += tensor.num_bytes();
        group.held_bytes += bytes;
    }
    let groups: Vec<TensorGroup> = groups.into_values().collect();
    let sum = |figure: fn(&TensorGroup) -> u64| groups.iter().map(figure).sum();
    let num_parameters: u64 = sum(|group| group.num_parameters);
    let choices: &[KvCacheDtype] = match options.backend {
        BackendKind::Cpu => &[KvCacheDtype::F32, KvCacheDtype::F16, KvCacheDtype::Bf16, KvCacheDtype::Int8],
        BackendKind::Reference => &[KvCacheDtype::F32],
    };
    ModelReport {
        num_parameters,
        num_active_parameters: num_parameters - num_idle(config, &groups),
        stored_bytes: sum(|group| group.stored_bytes),
        weight_bytes: sum(|group| group.held_bytes),
        kv_cache_dtype,
        kv_bytes_per_token: choices.iter().map(|&dtype| (dtype, kv_bytes_per_token(config, dtype))).collect(),
        config: config.clone(),
        groups,
    }
}

/// What the loader and its backend make of a tensor: vectors and routers are dense f32 always.
fn held(part: TensorPart, tensor: &TensorView<'_>, options: &LoadOptions, isa: Isa) -> (HeldAs, u64) {
    match (options.backend, part) {
        (BackendKind::Reference, _) | (BackendKind::Cpu, TensorPart::Norms) => tensor.widened(),
        (BackendKind::Cpu, TensorPart::Router) => tensor.imported_f32(),
        (BackendKind::Cpu, _) if options.dequantize => tensor.imported_f32(),
        (BackendKind::Cpu, _) => tensor.imported(isa, options.dtype, options.quantize),
    }
}

/// Parameters of experts that a token does not choose. All experts of a layer have one size.
fn num_idle(config: &DecoderConfig, groups: &[TensorGroup]) -> u64 {
    let Some(experts) = &config.experts else { return 0 };
    let of_experts = groups.iter().filter(|group| group.part == TensorPart::Experts);
    let num_parameters: u64 = of_experts.map(|group| group.num_parameters).sum();
    let (all, chosen) = (experts.num_experts as u64, experts.num_experts_per_token as u64);
    num_parameters / all * (all - chosen)
}
