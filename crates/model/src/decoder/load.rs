//! Brings every tensor from the store to a backend, one at a time.
//!
//! It knows which tensors a configuration calls for and what is done to them on the way: shapes are checked, a family's
//! offset is added to the weights of its norms, rotated pairs are put in the backend's order. It must not know how they
//! are stored or held. Invariant: what a configuration has no tensor for is absent, never made up.

use super::{DecoderWeights, LayerWeights, LoadedWeights};
use crate::{
    backend::{
        AttentionWeights, Backend, ExpertsWeights, FeedForwardKind, FeedForwardWeights, Linear, MlpWeights,
        NormWeights, SharedExpert,
    },
    config::{Block, DecoderConfig, Experts, FeedForward, NormKind, RopeStyle},
    error::ModelError,
    model::ProductWeights,
    weights::{LayerTensor, TensorRole, TensorView, WeightStore},
};

/// All weights; `progress(bytes done, bytes in all)` counts them as stored.
pub(super) fn weights<B: Backend>(
    config: &DecoderConfig,
    store: &WeightStore,
    backend: &B,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(DecoderWeights<B>, LoadedWeights), ModelError> {
    // Once: it is a sum over all tensors, and mixtures have tens of thousands.
    let bytes_total = store.num_bytes();
    let mut loader = Loader { store, backend, config, progress, bytes_total, bytes_done: 0, bytes_held: 0 };
    let weights = loader.load()?;
    let loaded = LoadedWeights { num_bytes: loader.bytes_held, products: products(config, &weights) };
    Ok((weights, loaded))
}

/// The matrices of each part of a pass.
fn products<B: Backend>(config: &DecoderConfig, weights: &DecoderWeights<B>) -> Vec<ProductWeights> {
    let of = |part, matrices: &mut dyn Iterator<Item = &B::Matrix>| {
        let empty = ProductWeights {
            part,
            num_parameters: 0,
            num_kept_parameters: 0,
            num_bytes: 0,
            num_kept_bytes: 0,
            is_quantized: true,
        };
        matrices.fold(empty, |sum, matrix| ProductWeights {
            num_parameters: sum.num_parameters + B::num_parameters(matrix) as u64,
            num_bytes: sum.num_bytes + B::matrix_bytes(matrix) as u64,
            is_quantized: sum.is_quantized && B::is_quantized(matrix),
            ..sum
        })
    };
    let layers = &weights.layers;
    let in_attention = layers.iter().map(|layer| &layer.attention);
    let output = |layers: &[LayerWeights<B>]| of("output", &mut layers.iter().map(|layer| &layer.attention.o.weight));
    let mlp = |layers: &[LayerWeights<B>]| {
        let mut mlp = of("mlp", &mut layers.iter().flat_map(|layer| always(&layer.feed_forward.kind)));
        // Of the experts, what one row uses.
        let experts = of("mlp", &mut layers.iter().flat_map(|layer| experts(&layer.feed_forward.kind)));
        if let Some(Experts { num_experts, num_experts_per_token, .. }) = config.experts
            && experts.num_parameters > 0
        {
            let share = |count: u64| count / num_experts as u64 * num_experts_per_token as u64;
            mlp.num_parameters += share(experts.num_parameters);
            mlp.num_bytes += share(experts.num_bytes);
            // Routers are dense; what counts is what most is multiplied with.
            mlp.is_quantized = experts.is_quantized;
        }
        mlp
    };
    let last = &layers[layers.len().saturating_sub(1)..];
    let with_kept = |all: ProductWeights, kept: ProductWeights| ProductWeights {
        num_kept_parameters: kept.num_parameters,
        num_kept_bytes: kept.num_bytes,
        ..all
    };
    let head = of("head", &mut std::iter::once(weights.head.as_ref().unwrap_or(&weights.embedding)));
    vec![
        of("qkv", &mut in_attention.flat_map(|attention| [&attention.q, &attention.k, &attention.v]).map(weight)),
        with_kept(output(layers), output(last)),
        with_kept(mlp(layers), mlp(last)),
        with_kept(head, head),
    ]
}

fn weight<B: Backend>(linear: &Linear<B>) -> &B::Matrix {
    &linear.weight
}

fn matrices<B: Backend>(mlp: &MlpWeights<B>) -> impl Iterator<Item = &B::Matrix> {
    mlp.gate.iter().chain([&mlp.up, &mlp.down]).map(weight)
}

/// What every row is multiplied with.
fn always<B: Backend>(kind: &FeedForwardKind<B>) -> Vec<&B::Matrix> {
    match kind {
        FeedForwardKind::Dense(mlp) => matrices(mlp).collect(),
        FeedForwardKind::Experts(ExpertsWeights { router, shared, .. }) => {
            let shared = shared.iter().flat_map(|shared| matrices(&shared.mlp).chain([&shared.gate]));
            shared.chain([router]).collect()
        }
    }
}

/// What only some rows are multiplied with.
fn experts<B: Backend>(kind: &FeedForwardKind<B>) -> Vec<&B::Matrix> {
    match kind {
        FeedForwardKind::Dense(_) => Vec::new(),
        FeedForwardKind::Experts(weights) => weights.experts.iter().flat_map(matrices).collect(),
    }
}

struct Loader<'a, B: Backend> {
    store: &'a WeightStore,
    backend: &'a B,
    config: &'a DecoderConfig,
    progress: &'a mut dyn FnMut(u64, u64),
    bytes_total: u64,
    bytes_done: u64,
    bytes_held: u64,
}

/// A matrix and its bias by their roles.
type LinearRoles = (LayerTensor, Option<LayerTensor>);

/// The roles of an MLP's projections.
#[derive(Clone, Copy)]
struct MlpRoles {
    gate: Option<LinearRoles>,
    up: LinearRoles,
    down: LinearRoles,
}

impl<'a, B: Backend> Loader<'a, B> {
    fn load(&mut self) -> Result<DecoderWeights<B>, ModelError> {
        let DecoderConfig { vocab_size, hidden_size, tied_embeddings, head_bias, .. } = *self.config;
        (self.progress)(0, self.bytes_total);
        let embedding = self.matrix(TensorRole::Embedding, vocab_size, hidden_size)?;
        let mut layers = Vec::with_capacity(self.config.num_layers());
        for index in 0..self.config.num_layers() {
            layers.push(LayerWeights { attention: self.attention(index)?, feed_forward: self.feed_forward(index)? });
        }
        let final_norm = self.norm(TensorRole::FinalNorm, Some(TensorRole::FinalNormBias), hidden_size)?;
        let head = if tied_embeddings { None } else { Some(self.matrix(TensorRole::Head, vocab_size, hidden_size)?) };
        let head_bias = if head_bias { Some(self.vector(TensorRole::HeadBias, vocab_size)?) } else { None };
        Ok(DecoderWeights { embedding, layers, final_norm, head, head_bias })
    }

    fn attention(&mut self, layer: usize) -> Result<AttentionWeights<B>, ModelError> {
        use LayerTensor as T;
        let config = self.config;
        let (hidden, queries) = (config.hidden_size, config.num_heads * config.head_dim);
        let keys = config.num_kv_heads * config.head_dim;
        let role = |tensor| TensorRole::Layer(layer, tensor);
        let qkv_bias = |tensor| config.biases.qkv.then_some(tensor);
        let norm = self.norm(role(T::AttentionNorm), Some(role(T::AttentionNormBias)), hidden)?;
        let q = self.linear(layer, (T::Q, qkv_bias(T::QBias)), queries, hidden)?;
        let k = self.linear(layer, (T::K, qkv_bias(T::KBias)), keys, hidden)?;
        let v = self.linear(layer, (T::V, qkv_bias(T::VBias)), keys, hidden)?;
        let o = self.linear(layer, (T::O, config.biases.output.then_some(T::OBias)), hidden, queries)?;
        let head_norms = if config.query_key_norm {
            Some([self.head_norm(layer, T::QueryNorm)?, self.head_norm(layer, T::KeyNorm)?])
        } else {
            None
        };
        let post_norm = self.post_norm(role(T::PostAttentionNorm))?;
        Ok(AttentionWeights { norm, q, k, v, o, head_norms, post_norm })
    }

    fn feed_forward(&mut self, layer: usize) -> Result<FeedForwardWeights<B>, ModelError> {
        use LayerTensor as T;
        let config = self.config;
        let role = |tensor| TensorRole::Layer(layer, tensor);
        let norm = match config.block {
            Block::Parallel => None,
            Block::PreNorm | Block::SandwichNorm | Block::ParallelTwoNorms => {
                Some(self.norm(role(T::MlpNorm), Some(role(T::MlpNormBias)), config.hidden_size)?)
            }
        };
        let kind = match (config.layers[layer].feed_forward, &config.experts) {
            (FeedForward::Experts, Some(experts)) => FeedForwardKind::Experts(self.experts(layer, experts)?),
            (FeedForward::Dense | FeedForward::Experts, _) => {
                let bias = |tensor| config.biases.mlp.then_some(tensor);
                let roles = MlpRoles {
                    gate: config.mlp.gated.then(|| (T::Gate, bias(T::GateBias))),
                    up: (T::Up, bias(T::UpBias)),
                    down: (T::Down, bias(T::DownBias)),
                };
                FeedForwardKind::Dense(self.mlp(layer, roles, config.mlp.intermediate_size)?)
            }
        };
        let post_norm = self.post_norm(role(T::PostMlpNorm))?;
        Ok(FeedForwardWeights { norm, kind, post_norm })
    }

    fn experts(&mut self, layer: usize, config: &Experts) -> Result<ExpertsWeights<B>, ModelError> {
        use LayerTensor as T;
        let hidden = self.config.hidden_size;
        let router = self.dense_matrix(TensorRole::Layer(layer, T::Router), config.num_experts, hidden)?;
        let roles = |gate, up, down| MlpRoles { gate: Some((gate, None)), up: (up, None), down: (down, None) };
        let mut experts = Vec::with_capacity(config.num_experts);
        for expert in 0..config.num_experts {
            let roles = roles(T::ExpertGate(expert), T::ExpertUp(expert), T::ExpertDown(expert));
            experts.push(self.mlp(layer, roles, config.intermediate_size)?);
        }
        let shared = match config.shared_intermediate_size {
            None => None,
            Some(width) => {
                let mlp = self.mlp(layer, roles(T::SharedGate, T::SharedUp, T::SharedDown), width)?;
                let gate = self.dense_matrix(TensorRole::Layer(layer, T::SharedExpertGate), 1, hidden)?;
                Some(SharedExpert { mlp, gate })
            }
        };
        Ok(ExpertsWeights { router, experts, shared })
    }

    fn mlp(&mut self, layer: usize, roles: MlpRoles, width: usize) -> Result<MlpWeights<B>, ModelError> {
        let hidden = self.config.hidden_size;
        let gate = roles.gate.map(|gate| self.linear(layer, gate, width, hidden)).transpose()?;
        let up = self.linear(layer, roles.up, width, hidden)?;
        Ok(MlpWeights { gate, up, down: self.linear(layer, roles.down, hidden, width)? })
    }

    fn linear(
        &mut self,
        layer: usize,
        (weight, bias): LinearRoles,
        rows: usize,
        cols: usize,
    ) -> Result<Linear<B>, ModelError> {
        let in_halves = matches!(weight, LayerTensor::Q | LayerTensor::K);
        let in_order = |loader: &Self, tensor| if in_halves { loader.in_halves(tensor) } else { tensor };
        let weight = in_order(self, self.required(TensorRole::Layer(layer, weight))?);
        let weight = self.import_matrix(&weight, rows, cols, B::import_matrix)?;
        let bias = match bias {
            None => None,
            Some(bias) => {
                let bias = in_order(self, self.required(TensorRole::Layer(layer, bias))?);
                Some(self.import_vector(&bias, rows, 0.0)?)
            }
        };
        Ok(Linear { weight, bias })
    }

    fn matrix(&mut self, role: TensorRole, rows: usize, cols: usize) -> Result<B::Matrix, ModelError> {
        let tensor = self.required(role)?;
        self.import_matrix(&tensor, rows, cols, B::import_matrix)
    }

    fn dense_matrix(&mut self, role: TensorRole, rows: usize, cols: usize) -> Result<B::Matrix, ModelError> {
        let tensor = self.required(role)?;
        self.import_matrix(&tensor, rows, cols, B::import_dense_matrix)
    }

    fn import_matrix(
        &mut self,
        tensor: &TensorView<'_>,
        rows: usize,
        cols: usize,
        import: impl FnOnce(&B, &TensorView<'_>) -> Result<B::Matrix, ModelError>,
    ) -> Result<B::Matrix, ModelError> {
        self.check_shape(tensor, rows, cols)?;
        let matrix = import(self.backend, tensor)?;
        self.taken(tensor, B::matrix_bytes(&matrix));
        Ok(matrix)
    }

    /// With a bias where norms of the configuration's kind have one.
    fn norm(&mut self, weight: TensorRole, bias: Option<TensorRole>, len: usize) -> Result<NormWeights<B>, ModelError> {
        let weight = self.required(weight)?;
        self.norm_of(&weight, bias, len)
    }

    fn post_norm(&mut self, role: TensorRole) -> Result<Option<NormWeights<B>>, ModelError> {
        if self.config.block != Block::SandwichNorm {
            return Ok(None);
        }
        self.norm(role, None, self.config.hidden_size).map(Some)
    }

    /// A query or key head's. Its elements stand in the order of the head's.
    fn head_norm(&mut self, layer: usize, tensor: LayerTensor) -> Result<NormWeights<B>, ModelError> {
        let weight = self.in_halves(self.required(TensorRole::Layer(layer, tensor))?);
        self.norm_of(&weight, None, self.config.head_dim)
    }

    fn norm_of(
        &mut self,
        weight: &TensorView<'_>,
        bias: Option<TensorRole>,
        len: usize,
    ) -> Result<NormWeights<B>, ModelError> {
        let weight = self.import_vector(weight, len, self.config.norm.weight_offset)?;
        let bias = match (self.config.norm.kind, bias) {
            (NormKind::Rms, _) => None,
            (NormKind::Layer, Some(bias)) => Some(self.vector(bias, len)?),
            // A layer norm without a bias is one whose bias is 0.
            (NormKind::Layer, None) => Some(self.backend.import_vector(vec![0.0; len])?),
        };
        Ok(NormWeights { weight, bias })
    }

    fn vector(&mut self, role: TensorRole, len: usize) -> Result<B::Vector, ModelError> {
        let tensor = self.required(role)?;
        self.import_vector(&tensor, len, 0.0)
    }

    fn import_vector(&mut self, tensor: &TensorView<'_>, len: usize, offset: f32) -> Result<B::Vector, ModelError> {
        self.check_shape(tensor, 1, len)?;
        let mut values = tensor.to_f32()?;
        for value in &mut values {
            *value += offset;
        }
        let vector = self.backend.import_vector(values)?;
        self.taken(tensor, B::vector_bytes(&vector));
        Ok(vector)
    }

    /// A query's or key's tensor as the backend rotates it.
    fn in_halves<'b>(&self, tensor: TensorView<'b>) -> TensorView<'b> {
        match self.config.rotaries.first() {
            Some(rotary) if B::ROTATES_HALVES && rotary.style == RopeStyle::Interleaved => {
                tensor.with_halves(self.config.head_dim, rotary.dim)
            }
            _ => tensor,
        }
    }

    fn check_shape(&self, tensor: &TensorView<'_>, rows: usize, cols: usize) -> Result<(), ModelError> {
        if (tensor.rows, tensor.cols) == (rows, cols) {
            return Ok(());
        }
        Err(ModelError::Unsupported(format!(
            "{}: tensor {} is {} x {}, the configuration needs {rows} x {cols}",
            self.config.architecture, tensor.name, tensor.rows, tensor.cols
        )))
    }

    fn taken(&mut self, tensor: &TensorView<'_>, bytes_held: usize) {
        self.bytes_done += tensor.num_bytes();
        self.bytes_held += bytes_held as u64;
        (self.progress)(self.bytes_done, self.bytes_total.max(self.bytes_done));
    }

    fn required(&self, role: TensorRole) -> Result<TensorView<'a>, ModelError> {
        self.store.tensor(role)?.ok_or_else(|| {
            ModelError::Unsupported(format!("{}: the file has no tensor for {role:?}", self.config.architecture))
        })
    }
}
