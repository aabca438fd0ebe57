//! The oracle: plain candle operations in f32, on any device that candle has. Slow and obviously right.
//!
//! Every operation allocates its result and no operation is fused; weights are dequantised. It must not share code
//! with the kernels it judges. For calibration it also tells what goes into each matrix (`observe`). Invariant: the same pages and slots as every other backend (slot = block * block_size +
//! offset), so that block tables mean the same thing everywhere.

use std::{cell::RefCell, ops::Range};

use candle_core::{D, Device, Tensor};

use crate::{
    adapter::{
        LowRank,
        weights::{AdapterWeights, Addend, BaseForm, LowRankWeights},
    },
    alibi,
    backend::{
        Adapters, AttentionWeights, Backend, ExpertsWeights, FeedForwardKind, FeedForwardWeights, HeadWeights, Layer,
        Linear, MlpWeights, NormWeights, SharedExpert, Step,
    },
    batch::BatchSequence,
    config::{Activation, DecoderConfig, LayerConfig, NormKind, RopeStyle},
    error::ModelError,
    weights::{Importance, LayerTensor, TensorRole, TensorView},
};

/// candle in f32.
pub(crate) struct ReferenceBackend {
    config: DecoderConfig,
    device: Device,
    block_size: usize,
    cache: Vec<LayerCache>,
    /// Values between two operations; None before the first step.
    activations: Option<Activations>,
    /// The layer whose operations run.
    layer: usize,
    /// What went into each matrix, while somebody wants to know.
    observed: Option<RefCell<Importance>>,
}

/// One layer's keys and values, each `[num_slots, num_kv_heads * head_dim]`.
struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

/// What one operation leaves for the next.
struct Activations {
    /// `[rows, hidden_size]`
    hidden: Tensor,
    /// Queries, after `attention` the attended values: `[rows, num_heads, head_dim]`
    heads: Tensor,
}

impl ReferenceBackend {
    pub(crate) fn new(config: &DecoderConfig, device: Device, block_size: usize) -> Self {
        Self {
            config: config.clone(),
            device,
            block_size,
            cache: Vec::new(),
            activations: None,
            layer: 0,
            observed: None,
        }
    }

    fn tensor(&self, values: &[f32], shape: (usize, usize)) -> candle_core::Result<Tensor> {
        Tensor::from_slice(values, shape, &self.device)
    }

    /// From now on inputs of matrices are added up.
    pub(crate) fn observe(&mut self) {
        self.observed = Some(RefCell::default());
    }

    /// What has been added up; nothing is, from now on.
    pub(crate) fn take_observed(&mut self) -> Option<Importance> {
        self.observed.take().map(RefCell::into_inner)
    }

    /// `x: [rows, inputs]` goes into these matrices of the layer.
    fn note(&self, tensors: &[LayerTensor], x: &Tensor) -> candle_core::Result<()> {
        let roles: Vec<TensorRole> = tensors.iter().map(|&tensor| TensorRole::Layer(self.layer, tensor)).collect();
        self.note_roles(&roles, x)
    }

    fn note_roles(&self, roles: &[TensorRole], x: &Tensor) -> candle_core::Result<()> {
        let Some(observed) = &self.observed else { return Ok(()) };
        let (num_inputs, values) = (x.dim(D::Minus1)?, x.flatten_all()?.to_vec1::<f32>()?);
        let mut observed = observed.borrow_mut();
        for &role in roles {
            observed.add(role, &values, num_inputs);
        }
        Ok(())
    }

    /// `down(activation(gate(x)) * up(x))`, x: `[rows, hidden_size]`; `roles` are those of gate, up and down.
    fn mlp(
        &self,
        x: &Tensor,
        weights: &MlpWeights<Self>,
        activation: Activation,
        [gate, up, down]: [LayerTensor; 3],
    ) -> candle_core::Result<Tensor> {
        self.note(&[gate, up], x)?;
        let inner = inner_of(x, weights, activation)?;
        self.note(&[down], &inner)?;
        linear(&inner, &weights.down)
    }

    /// Likewise that of a layer without experts, with its adapters.
    fn adapted_mlp(
        &self,
        x: &Tensor,
        weights: &MlpWeights<Self>,
        layer: Layer<'_>,
        adapters: Adapters<'_, Self>,
    ) -> candle_core::Result<Tensor> {
        let activation = self.config.mlp.activation;
        self.note(&[LayerTensor::Gate, LayerTensor::Up], x)?;
        let up = linear(x, &weights.up)?;
        let inner = match &weights.gate {
            Some(gate) => {
                let gate = adapted(&linear(x, gate)?, x, adapters, |weights| &weights.layers[layer.index].gated[0])?;
                let up = adapted(&up, x, adapters, |weights| &weights.layers[layer.index].gated[1])?;
                gated(&gate, up, activation)?
            }
            None => activate(&adapted(&up, x, adapters, |weights| &weights.layers[layer.index].gated[0])?, activation)?,
        };
        self.note(&[LayerTensor::Down], &inner)?;
        let down = linear(&inner, &weights.down)?;
        adapted(&down, &inner, adapters, |weights| &weights.layers[layer.index].down[0])
    }

    fn activations(&mut self) -> &mut Activations {
        self.activations.as_mut().expect("`embed` comes first in a step")
    }

    /// x / rms(x) * weight, or (x - mean) / std(x) * weight + bias.
    fn norm(&self, x: &Tensor, weights: &NormWeights<Self>) -> candle_core::Result<Tensor> {
        let x = match self.config.norm.kind {
            NormKind::Rms => x.clone(),
            NormKind::Layer => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
        };
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        let rms = (mean_square + f64::from(self.config.norm.eps))?.sqrt()?;
        let normed = x.broadcast_div(&rms)?.broadcast_mul(&weights.weight)?;
        match &weights.bias {
            Some(bias) => normed.broadcast_add(bias),
            None => Ok(normed),
        }
    }

    /// The norm of what a branch gives, where there is one.
    fn post_norm(&self, x: Tensor, weights: Option<&NormWeights<Self>>) -> candle_core::Result<Tensor> {
        match weights {
            Some(weights) => self.norm(&x, weights),
            None => Ok(x),
        }
    }

    /// Row by row, expert by expert. x: `[rows, hidden_size]`
    fn experts(&self, x: &Tensor, weights: &ExpertsWeights<Self>) -> candle_core::Result<Tensor> {
        use LayerTensor as T;
        let config = self.config.experts.as_ref().expect("the decoder has checked that layers with experts have them");
        let logits = x.matmul(&weights.router.t()?)?.to_vec2::<f32>()?;
        let mut rows = Vec::with_capacity(logits.len());
        for (row, logits) in logits.iter().enumerate() {
            let x = x.narrow(0, row, 1)?;
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exponentials: Vec<f32> = logits.iter().map(|logit| (logit - max).exp()).collect();
            let mut order: Vec<usize> = (0..logits.len()).collect();
            // Stable: the lower number first among equals.
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            let chosen = &order[..config.num_experts_per_token];
            let among: &[usize] = if config.normalize_weights { chosen } else { &order };
            let total: f32 = among.iter().map(|&expert| exponentials[expert]).sum();
            let mut sum = x.zeros_like()?;
            for &expert in chosen {
                let roles = [T::ExpertGate(expert), T::ExpertUp(expert), T::ExpertDown(expert)];
                let out = self.mlp(&x, &weights.experts[expert], config.activation, roles)?;
                sum = (sum + (out * f64::from(exponentials[expert] / total))?)?;
            }
            rows.push(sum);
        }
        let routed = Tensor::cat(&rows, 0)?;
        let Some(SharedExpert { mlp, gate }) = &weights.shared else { return Ok(routed) };
        let gate = x.matmul(&gate.t()?)?;
        // 1 / (1 + exp(-gate))
        let share = (gate.neg()?.exp()? + 1.0)?.recip()?;
        let roles = [T::SharedGate, T::SharedUp, T::SharedDown];
        routed + self.mlp(x, mlp, config.activation, roles)?.broadcast_mul(&share)?
    }

    /// Rotates the first `rotary.dim` elements of each head. x: `[rows, heads, head_dim]`
    fn rotate(&self, x: &Tensor, layer: Layer<'_>, step: Step<'_, Self>) -> candle_core::Result<Tensor> {
        let Some((index, rope)) = step.rope(layer) else { return Ok(x.clone()) };
        let rotary = &self.config.rotaries[index];
        let (rows, heads, head_dim) = x.dims3()?;
        let num_pairs = rotary.dim / 2;
        if num_pairs == 0 {
            return Ok(x.clone());
        }
        let rotated = x.narrow(2, 0, rotary.dim)?;
        let (cos, sin) = (self.tensor(rope.cos(), (rows, num_pairs))?, self.tensor(rope.sin(), (rows, num_pairs))?);
        let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
        // `a` and `b` are the two halves of each pair, `[rows, heads, num_pairs]`.
        let (a, b) = match rotary.style {
            RopeStyle::Neox => (rotated.narrow(2, 0, num_pairs)?, rotated.narrow(2, num_pairs, num_pairs)?),
            RopeStyle::Interleaved => {
                let pairs = rotated.reshape((rows, heads, num_pairs, 2))?;
                (pairs.narrow(3, 0, 1)?.squeeze(3)?, pairs.narrow(3, 1, 1)?.squeeze(3)?)
            }
        };
        let new_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let new_b = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        let rotated = match rotary.style {
            RopeStyle::Neox => Tensor::cat(&[new_a, new_b], 2)?,
            RopeStyle::Interleaved => Tensor::stack(&[new_a, new_b], 3)?.reshape((rows, heads, rotary.dim))?,
        };
        match head_dim - rotary.dim {
            0 => Ok(rotated),
            rest => Tensor::cat(&[rotated, x.narrow(2, rotary.dim, rest)?], 2),
        }
    }

    /// Softmax attention of one sequence. queries, result: `[rows, num_heads, head_dim]`
    fn attend(
        &self,
        queries: &Tensor,
        layer: Layer<'_>,
        keys: &Tensor,
        values: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let DecoderConfig { num_heads, num_kv_heads, head_dim, .. } = self.config;
        let (rows, context_len) = (queries.dim(0)?, keys.dim(0)?);
        // [num_heads, context_len, head_dim]: each key/value head serves a group of query heads.
        let for_each_query_head = |x: &Tensor| -> candle_core::Result<Tensor> {
            let shape = (num_kv_heads, num_heads / num_kv_heads, context_len, head_dim);
            x.reshape((context_len, num_kv_heads, head_dim))?
                .transpose(0, 1)?
                .unsqueeze(1)?
                .broadcast_as(shape)?
                .reshape((num_heads, context_len, head_dim))
        };
        let (keys, values) = (for_each_query_head(keys)?, for_each_query_head(values)?);
        let queries = queries.transpose(0, 1)?.contiguous()?;
        let scores = (queries.matmul(&keys.transpose(1, 2)?)? * f64::from(self.config.attention_scale))?;
        let mut scores = match self.config.attention_soft_cap.map(f64::from) {
            Some(cap) => ((scores / cap)?.tanh()? * cap)?,
            None => scores,
        };
        if self.config.alibi.is_some() {
            let mut biases = Vec::new();
            alibi::fill(&self.config, context_len, &mut biases).map_err(candle_core::Error::wrap)?;
            scores = scores.broadcast_add(&Tensor::from_vec(biases, (num_heads, 1, context_len), &self.device)?)?;
        }
        let scores = scores.broadcast_add(&self.mask(rows, context_len, layer.config)?)?;
        let exponentials = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)?;
        weights.matmul(&values)?.transpose(0, 1)?.contiguous()
    }

    /// 0 where a row sees a key, minus infinity elsewhere: `[heads, rows, context_len]`, one head for all where they see the
    /// same.
    fn mask(&self, rows: usize, context_len: usize, layer: &LayerConfig) -> candle_core::Result<Tensor> {
        let num_heads = if layer.blocks.is_some() { self.config.num_heads } else { 1 };
        let first_position = context_len - rows;
        let mut mask = Vec::with_capacity(num_heads * rows * context_len);
        for head in 0..num_heads {
            for position in first_position..context_len {
                for key in 0..context_len {
                    let visible = key <= position
                        && layer.window.is_none_or(|window| position - key < window)
                        && layer.blocks.is_none_or(|blocks| {
                            let (own, block) = (position / blocks.block_size, key / blocks.block_size);
                            let strided = block + head * blocks.head_step + 1;
                            own - block < blocks.num_local_blocks || strided.is_multiple_of(blocks.vertical_stride)
                        });
                    mask.push(if visible { 0.0 } else { f32::NEG_INFINITY });
                }
            }
        }
        Tensor::from_vec(mask, (num_heads, rows, context_len), &self.device)
    }

    /// Slots of a sequence's tokens, `[context_len]`.
    fn slots(&self, sequence: &BatchSequence, block_tables: &[u32]) -> candle_core::Result<Tensor> {
        let table = &block_tables[sequence.block_table.clone()];
        let slots: Vec<u32> = (0..sequence.context_len)
            .map(|position| {
                table[position / self.block_size] * self.block_size as u32 + (position % self.block_size) as u32
            })
            .collect();
        Tensor::new(slots, &self.device)
    }
}

fn linear(x: &Tensor, linear: &Linear<ReferenceBackend>) -> candle_core::Result<Tensor> {
    let product = x.matmul(&linear.weight.t()?)?;
    match &linear.bias {
        Some(bias) => product.broadcast_add(bias),
        None => Ok(product),
    }
}

/// A product and, for the rows that go through adapters, theirs beside it. x: `[rows, inputs]`
fn adapted<'a>(
    product: &Tensor,
    x: &Tensor,
    adapters: Adapters<'a, ReferenceBackend>,
    addend: impl Fn(&'a AdapterWeights<ReferenceBackend>) -> &'a Addend<ReferenceBackend>,
) -> candle_core::Result<Tensor> {
    let (mut parts, mut done) = (Vec::new(), 0);
    for (rows, weights) in adapters.iter() {
        let Some(LowRankWeights { down, up }) = addend(weights) else { continue };
        if done < rows.start {
            parts.push(product.narrow(0, done, rows.start - done)?);
        }
        let delta = x.narrow(0, rows.start, rows.len())?.matmul(&down.t()?)?.matmul(&up.t()?)?;
        parts.push((product.narrow(0, rows.start, rows.len())? + delta)?);
        done = rows.end;
    }
    if done < product.dim(0)? {
        parts.push(product.narrow(0, done, product.dim(0)? - done)?);
    }
    Tensor::cat(&parts, 0)
}

fn activate(x: &Tensor, activation: Activation) -> candle_core::Result<Tensor> {
    match activation {
        Activation::Silu => x.silu(),
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        Activation::Gegelu { limit } => {
            let x = x.minimum(f64::from(limit))?;
            // x / (1 + exp(-1.702 x))
            &x / ((&x * -1.702)?.exp()? + 1.0)?
        }
    }
}

/// `activation(gate) * up`, of whatever the activation makes of `up`.
fn gated(gate: &Tensor, up: Tensor, activation: Activation) -> candle_core::Result<Tensor> {
    let up = match activation {
        Activation::Silu | Activation::Gelu | Activation::GeluTanh => up,
        Activation::Gegelu { limit } => (up.clamp(-limit, limit)? + 1.0)?,
    };
    activate(gate, activation)? * up
}

/// What the MLP's last product is of: `[rows, width]`. x: `[rows, hidden_size]`
fn inner_of(x: &Tensor, weights: &MlpWeights<ReferenceBackend>, activation: Activation) -> candle_core::Result<Tensor> {
    let up = linear(x, &weights.up)?;
    match &weights.gate {
        Some(gate) => gated(&linear(x, gate)?, up, activation),
        None => activate(&up, activation),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the shape that map_err takes")]
fn failed(error: candle_core::Error) -> ModelError {
    ModelError::Step(format!("the reference backend failed: {error}"))
}

impl Backend for ReferenceBackend {
    type Matrix = Tensor;
    type Vector = Tensor;
    type AdapterImport = Device;
    const ROTATES_HALVES: bool = false;

    fn device(&self) -> String {
        format!("{} (candle, f32)", if self.device.is_cpu() { "cpu" } else { "accelerator" })
    }

    fn threads(&self) -> usize {
        candle_core::utils::get_num_threads()
    }

    fn import_matrix(&self, tensor: &TensorView<'_>) -> Result<Tensor, ModelError> {
        self.tensor(&tensor.to_f32()?, (tensor.rows, tensor.cols)).map_err(failed)
    }

    fn import_dense_matrix(&self, tensor: &TensorView<'_>) -> Result<Tensor, ModelError> {
        self.import_matrix(tensor)
    }

    fn import_vector(&self, values: Vec<f32>) -> Result<Tensor, ModelError> {
        let len = values.len();
        Tensor::from_vec(values, len, &self.device).map_err(failed)
    }

    fn matrix_bytes(matrix: &Tensor) -> usize {
        matrix.elem_count() * size_of::<f32>()
    }

    fn num_parameters(matrix: &Tensor) -> usize {
        matrix.elem_count()
    }

    fn is_quantized(_matrix: &Tensor) -> bool {
        false
    }

    fn vector_bytes(vector: &Tensor) -> usize {
        vector.elem_count() * size_of::<f32>()
    }

    fn base_form(_matrix: &Tensor) -> BaseForm {
        BaseForm::F32
    }

    fn adapter_import(&self) -> Device {
        self.device.clone()
    }

    fn import_low_rank(
        device: &Device,
        low_rank: LowRank,
        _base: BaseForm,
    ) -> Result<LowRankWeights<Self>, ModelError> {
        let LowRank { rank, a, b } = low_rank;
        let (inputs, outputs) = (a.len() / rank, b.len() / rank);
        let tensor = |values, shape: (usize, usize)| Tensor::from_vec(values, shape, device).map_err(failed);
        Ok(LowRankWeights { down: tensor(a, (rank, inputs))?, up: tensor(b, (outputs, rank))? })
    }

    fn allocate_kv(&mut self, num_blocks: usize) -> Result<(), ModelError> {
        self.cache.clear();
        let shape = (num_blocks * self.block_size, self.config.num_kv_heads * self.config.head_dim);
        let refuse = |reason: String| ModelError::OutOfMemory(format!("a KV cache of {num_blocks} blocks: {reason}"));
        // candle aborts the process where the system refuses memory, so the system is asked before.
        let num_elements = [2, self.config.num_layers(), shape.1].into_iter().try_fold(shape.0, usize::checked_mul);
        let asked = num_elements.map(|len| Vec::<f32>::new().try_reserve_exact(len));
        if !matches!(asked, Some(Ok(()))) {
            return Err(refuse("the system has not that much memory: take fewer blocks".into()));
        }
        let zeros =
            || Tensor::zeros(shape, candle_core::DType::F32, &self.device).map_err(|error| refuse(error.to_string()));
        self.cache = (0..self.config.num_layers())
            .map(|_| Ok(LayerCache { keys: zeros()?, values: zeros()? }))
            .collect::<Result<_, ModelError>>()?;
        Ok(())
    }

    fn copy_block(&mut self, source: u32, target: u32) -> Result<(), ModelError> {
        let (source, target) = (source as usize * self.block_size, target as usize * self.block_size);
        for LayerCache { keys, values } in &self.cache {
            for pages in [keys, values] {
                let block = pages.narrow(0, source, self.block_size).and_then(|block| block.copy()).map_err(failed)?;
                pages.slice_set(&block, 0, target).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn embed(&mut self, table: &Tensor, step: Step<'_, Self>) -> Result<(), ModelError> {
        let mut start = || {
            let tokens = Tensor::new(step.batch.tokens.as_slice(), &self.device)?;
            let hidden = (table.index_select(&tokens, 0)? * f64::from(self.config.embedding_scale))?;
            self.activations = Some(Activations { heads: hidden.clone(), hidden });
            Ok(())
        };
        start().map_err(failed)
    }

    fn attention_inputs(
        &mut self,
        layer: Layer<'_>,
        weights: &AttentionWeights<Self>,
        step: Step<'_, Self>,
    ) -> Result<(), ModelError> {
        let DecoderConfig { num_heads, num_kv_heads, head_dim, .. } = self.config;
        let rows = step.num_rows;
        self.layer = layer.index;
        let hidden = self.activations().hidden.clone();
        let compute = || {
            let x = self.norm(&hidden, &weights.norm)?;
            self.note(&[LayerTensor::Q, LayerTensor::K, LayerTensor::V], &x)?;
            let project = |projection, which: usize| {
                let product = linear(&x, projection)?;
                adapted(&product, &x, step.adapters, |weights| &weights.layers[layer.index].qkv[which])
            };
            let mut queries = project(&weights.q, 0)?.reshape((rows, num_heads, head_dim))?;
            let mut keys = project(&weights.k, 1)?.reshape((rows, num_kv_heads, head_dim))?;
            let values = project(&weights.v, 2)?;
            if let Some([query_norm, key_norm]) = &weights.head_norms {
                queries = self.norm(&queries, query_norm)?;
                keys = self.norm(&keys, key_norm)?;
            }
            let queries = self.rotate(&queries, layer, step)?;
            let keys = self.rotate(&keys, layer, step)?;
            let keys = keys.reshape((rows, num_kv_heads * head_dim))?;
            let pages = &self.cache[layer.index];
            for (row, &slot) in step.batch.slots.iter().enumerate() {
                // slice_set copies whole buffers, so a row needs its own.
                pages.keys.slice_set(&keys.narrow(0, row, 1)?.copy()?, 0, slot as usize)?;
                pages.values.slice_set(&values.narrow(0, row, 1)?.copy()?, 0, slot as usize)?;
            }
            Ok(queries)
        };
        let queries = compute().map_err(failed)?;
        self.activations().heads = queries;
        Ok(())
    }

    fn attention(&mut self, layer: Layer<'_>, step: Step<'_, Self>) -> Result<(), ModelError> {
        let queries = self.activations().heads.clone();
        let pages = &self.cache[layer.index];
        let compute = || {
            let mut attended = Vec::with_capacity(step.sequences.len());
            for sequence in step.sequences {
                let slots = self.slots(sequence, &step.batch.block_tables)?;
                let keys = pages.keys.index_select(&slots, 0)?;
                let values = pages.values.index_select(&slots, 0)?;
                let queries = queries.narrow(0, sequence.rows.start, sequence.rows.len())?;
                attended.push(self.attend(&queries, layer, &keys, &values)?);
            }
            Tensor::cat(&attended, 0)
        };
        let attended = compute().map_err(failed)?;
        self.activations().heads = attended;
        Ok(())
    }

    fn attention_output(
        &mut self,
        layer: Layer<'_>,
        weights: &AttentionWeights<Self>,
        step: Step<'_, Self>,
    ) -> Result<(), ModelError> {
        let Activations { hidden, heads } = self.activations();
        let (hidden, heads) = (hidden.clone(), heads.clone());
        let compute = || {
            let heads = heads.flatten_from(1)?;
            self.note(&[LayerTensor::O], &heads)?;
            let product = linear(&heads, &weights.o)?;
            let branch = adapted(&product, &heads, step.adapters, |weights| &weights.layers[layer.index].output[0])?;
            hidden.add(&self.post_norm(branch, weights.post_norm.as_ref())?)
        };
        let hidden = compute().map_err(failed)?;
        self.activations().hidden = hidden;
        Ok(())
    }

    fn feed_forward(
        &mut self,
        layer: Layer<'_>,
        norm: &NormWeights<Self>,
        weights: &FeedForwardWeights<Self>,
        step: Step<'_, Self>,
    ) -> Result<(), ModelError> {
        let hidden = self.activations().hidden.clone();
        let compute = || {
            let x = self.norm(&hidden, norm)?;
            let branch = match &weights.kind {
                FeedForwardKind::Dense(mlp) => self.adapted_mlp(&x, mlp, layer, step.adapters)?,
                FeedForwardKind::Experts(experts) => self.experts(&x, experts)?,
            };
            hidden.add(&self.post_norm(branch, weights.post_norm.as_ref())?)
        };
        let hidden = compute().map_err(failed)?;
        self.activations().hidden = hidden;
        Ok(())
    }

    fn keep_rows(&mut self, rows: &[u32]) -> Result<(), ModelError> {
        if rows.is_empty() {
            return Ok(());
        }
        let rows = Tensor::new(rows, &self.device).map_err(failed)?;
        let Activations { hidden, heads } = self.activations();
        for values in [hidden, heads] {
            *values = values.index_select(&rows, 0).map_err(failed)?;
        }
        Ok(())
    }

    /// What goes into the last layer's matrices would be gathered of fewer rows.
    fn needs_every_row(&self) -> bool {
        self.observed.is_some()
    }

    fn head(
        &mut self,
        rows: Range<usize>,
        weights: &HeadWeights<'_, Self>,
        adapters: Adapters<'_, Self>,
        out: &mut [f32],
    ) -> Result<(), ModelError> {
        let hidden = self.activations().hidden.clone();
        let compute = || {
            let x = self.norm(&hidden.narrow(0, rows.start, rows.len())?, weights.norm)?;
            let role = if self.config.tied_embeddings { TensorRole::Embedding } else { TensorRole::Head };
            self.note_roles(&[role], &x)?;
            let mut logits = x.matmul(&weights.weight.t()?)?;
            logits = adapted(&logits, &x, adapters, |weights| &weights.head[0])?;
            if let Some(bias) = weights.bias {
                logits = logits.broadcast_add(bias)?;
            }
            logits = (logits * f64::from(self.config.logit_scale))?;
            if let Some(cap) = self.config.logit_soft_cap.map(f64::from) {
                logits = ((logits / cap)?.tanh()? * cap)?;
            }
            logits.flatten_all()?.to_vec1::<f32>()
        };
        out.copy_from_slice(&compute().map_err(failed)?);
        Ok(())
    }
}
