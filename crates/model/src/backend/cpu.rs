//! The fast path without a GPU: our kernels over plain buffers. Quantised weights stay quantised.
//!
//! It knows which kernels follow each other inside an operation and which buffers lie between them; it must not know
//! instruction sets or layouts (the kernels' part). Invariant: buffers only grow, so a step no larger than one before
//! allocates nothing here; and since each kernel computes a row by itself, so does each operation.

use std::{mem, ops::Range};

use bindery_kernels::{
    Activations, Addends, AttentionArgs, AttentionSequence, Cpu, ExpertWeights, Form, GatedProduct, Isa, KvCache,
    KvDtype, KvShape, LayerNorm, LowRank, LowRankPair, LowRankSegment, Matrix, Mixture, Norm, Product, Projection,
    RoutingArgs, Shares, make_room,
};

use crate::{
    adapter::{
        self, LowRank as LowRankValues,
        weights::{AdapterWeights, Addend, BaseForm, LowRankWeights},
    },
    alibi,
    backend::{
        Adapters, AttentionWeights, Backend, ExpertsWeights, FeedForwardKind, FeedForwardWeights, HeadWeights, Layer,
        Linear, MlpWeights, NormWeights, SharedExpert, Step,
    },
    config::{Activation, DecoderConfig, NormKind, RopeStyle},
    error::ModelError,
    model::{Dtype, KvCacheDtype, Quantize},
    weights::TensorView,
};

/// Positions that biases are made for at least; a multiple of what the kernels want whole.
const MIN_BIASES: usize = 1024;

/// How weights are taken over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ImportOptions {
    /// Of dense weights.
    pub(crate) dtype: Dtype,
    /// Of dense weights.
    pub(crate) quantize: Quantize,
    /// Quantised weights become dense f32.
    pub(crate) dequantize: bool,
}

/// `bindery-kernels` over plain buffers.
pub(crate) struct CpuBackend {
    cpu: Cpu,
    config: DecoderConfig,
    import: ImportOptions,
    kv_shape: KvShape,
    /// None until allocated.
    cache: Option<KvCache>,
    buffers: Buffers,
}

/// Values between kernels; each as long as the largest batch so far needs.
#[derive(Default)]
struct Buffers {
    /// The residual stream, `[rows, hidden_size]`.
    hidden: Vec<f32>,
    /// Input of the products that follow.
    activations: Activations,
    /// `[rows, num_heads * head_dim]`
    queries: Vec<f32>,
    /// `[rows, num_kv_heads * head_dim]`
    keys: Vec<f32>,
    values: Vec<f32>,
    /// `[rows, num_heads * head_dim]`
    attended: Vec<f32>,
    /// Input of the MLP's second half.
    gated: Activations,
    /// What a branch gives before it is normed, or a shared expert before it is weighted: `[rows, hidden_size]`
    branch: Vec<f32>,
    shared: Vec<f32>,
    /// `[rows, num_experts]`
    router_logits: Vec<f32>,
    /// `[rows]`
    shared_gates: Vec<f32>,
    mixture: Mixture,
    /// ALiBi's, `[num_heads, positions]`
    biases: Vec<f32>,
    /// Empty between operations; keeps its memory.
    sequences: Vec<AttentionSequence<'static>>,
    /// Between the halves of the adapters' products.
    low_rank: LowRank,
    /// Empty between operations: the adapters' segments for as many products as read the same activations.
    segments: (Vec<Segment<'static, 1>>, Vec<Segment<'static, 2>>, Vec<Segment<'static, 3>>),
}

type Segment<'a, const N: usize> = LowRankSegment<'a, N>;

impl CpuBackend {
    /// Nothing is allocated yet.
    pub(crate) fn new(
        cpu: Cpu,
        config: &DecoderConfig,
        import: ImportOptions,
        kv_cache_dtype: KvCacheDtype,
        block_size: usize,
    ) -> Self {
        let dtype = match self::kv_cache_dtype(import, kv_cache_dtype) {
            KvCacheDtype::F32 => KvDtype::F32,
            KvCacheDtype::F16 => KvDtype::F16,
            KvCacheDtype::Bf16 => KvDtype::Bf16,
            KvCacheDtype::Int8 => KvDtype::Int8,
            KvCacheDtype::Auto => unreachable!("chosen above"),
        };
        let kv_shape = KvShape {
            num_layers: config.num_layers(),
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            block_size,
            dtype,
        };
        let config = config.clone();
        Self { cpu, config, import, kv_shape, cache: None, buffers: Buffers::default() }
    }
}

/// What keys and values are kept as: what was asked for, or what suits the weights.
pub(crate) fn kv_cache_dtype(import: ImportOptions, wanted: KvCacheDtype) -> KvCacheDtype {
    match wanted {
        KvCacheDtype::Auto if import.dtype == Dtype::F32 || import.dequantize => KvCacheDtype::F32,
        KvCacheDtype::Auto => KvCacheDtype::F16,
        KvCacheDtype::F32 | KvCacheDtype::F16 | KvCacheDtype::Bf16 | KvCacheDtype::Int8 => wanted,
    }
}

/// A buffer's first `len` values, grown where it is shorter. What they hold is left over from earlier.
fn sized(buffer: &mut Vec<f32>, len: usize) -> Result<&mut [f32], ModelError> {
    make_room(buffer, len).map_err(|_| {
        ModelError::OutOfMemory(format!("no memory for {len} activations: lower --max-num-batched-tokens"))
    })?;
    Ok(&mut buffer[..len])
}

/// An empty vector with the memory of another, of a type that differs in its lifetime alone.
fn recycled<T, U>(mut list: Vec<T>) -> Vec<U> {
    list.clear();
    // Collecting in place keeps the allocation, as source and target have one layout.
    list.into_iter().map(|_| unreachable!("it was cleared")).collect()
}

/// The segments of a step for N products of the same activations; rows for which an adapter has nothing are in none.
fn segments<'a, const N: usize>(
    adapters: Adapters<'a, CpuBackend>,
    addends: impl Fn(&'a AdapterWeights<CpuBackend>) -> &'a [Addend<CpuBackend>; N],
    room: &mut Vec<Segment<'static, N>>,
) -> Vec<Segment<'a, N>> {
    let mut segments = recycled(mem::take(room));
    segments.extend(adapters.iter().filter_map(|(rows, weights)| {
        let pairs = addends(weights)
            .each_ref()
            .map(|addend| addend.as_ref().map(|LowRankWeights { down, up }| LowRankPair { down, up }));
        pairs.iter().any(Option::is_some).then_some(LowRankSegment { rows, pairs })
    }));
    segments
}

fn product<'a>(linear: &'a Linear<CpuBackend>, out: &'a mut [f32]) -> Product<'a> {
    Product { weights: &linear.weight, bias: linear.bias.as_deref(), out }
}

fn projection(linear: &Linear<CpuBackend>) -> Projection<'_> {
    Projection { weights: &linear.weight, bias: linear.bias.as_deref() }
}

/// A norm of the configuration's kind.
fn norm<'a>(config: &DecoderConfig, weights: &'a NormWeights<CpuBackend>) -> Norm<'a> {
    let (weight, eps) = (weights.weight.as_slice(), config.norm.eps);
    match (config.norm.kind, &weights.bias) {
        (NormKind::Layer, Some(bias)) => Norm::Layer(LayerNorm { weight, bias, eps }),
        (NormKind::Rms, None) => Norm::Rms { weight, eps },
        _ => unreachable!("the loader gives a bias to layer norms and to no others"),
    }
}

/// `hidden +=` the product and the adapters' beside it, by way of a norm where there is one; `branch` is room for what is
/// normed.
fn add_branch(
    cpu: &Cpu,
    x: &Activations,
    linear: &Linear<CpuBackend>,
    (segments, low_rank): (&[Segment<'_, 1>], &mut LowRank),
    post_norm: Option<Norm<'_>>,
    branch: &mut Vec<f32>,
    hidden: &mut [f32],
) -> Result<(), ModelError> {
    let addends = addends(cpu, x, segments, low_rank);
    let product = |out| [Product { weights: &linear.weight, bias: linear.bias.as_deref(), out }];
    let Some(post_norm) = post_norm else {
        cpu.matmul_add_all(x, product(hidden), addends);
        return Ok(());
    };
    let branch = sized(branch, hidden.len())?;
    cpu.matmul_all(x, product(branch), addends);
    cpu.norm_add(branch, &post_norm, hidden);
    Ok(())
}

/// What the adapters add to the next products of `x`.
fn addends<'a, const N: usize>(
    cpu: &Cpu,
    x: &'a Activations,
    segments: &'a [Segment<'a, N>],
    low_rank: &'a mut LowRank,
) -> Option<Addends<'a, N>> {
    (!segments.is_empty()).then(|| cpu.low_rank(x, segments, low_rank))
}

/// The first half of an MLP.
fn gated_product(mlp: &MlpWeights<CpuBackend>, activation: Activation) -> GatedProduct<'_> {
    match &mlp.gate {
        Some(gate) => GatedProduct { gate: projection(gate), up: Some(projection(&mlp.up)), activation },
        None => GatedProduct { gate: projection(&mlp.up), up: None, activation },
    }
}

/// The matrices that read an MLP's input.
fn first_matrices(mlp: &MlpWeights<CpuBackend>) -> impl Iterator<Item = &Matrix> {
    mlp.gate.iter().chain([&mlp.up]).map(|linear| &linear.weight)
}

/// What reads the normed residual stream.
fn input_form(weights: &FeedForwardKind<CpuBackend>) -> Form {
    match weights {
        FeedForwardKind::Dense(mlp) => Form::of(first_matrices(mlp)),
        FeedForwardKind::Experts(ExpertsWeights { router, experts, shared }) => {
            let shared = shared.iter().flat_map(|shared| first_matrices(&shared.mlp).chain([&shared.gate]));
            Form::of(experts.iter().flat_map(first_matrices).chain(shared).chain([router]))
        }
    }
}

impl CpuBackend {
    /// ALiBi's biases for this many positions at least.
    fn make_biases(&mut self, num_positions: usize) -> Result<(), ModelError> {
        let (config, biases) = (&self.config, &mut self.buffers.biases);
        if config.alibi.is_some() && biases.len() < config.num_heads * num_positions {
            // Tiles of keys are whole, and a context grows by few tokens at a time.
            alibi::fill(config, num_positions.max(MIN_BIASES).next_power_of_two(), biases)?;
        }
        Ok(())
    }

    /// An MLP of `activations` into `hidden`: added to it, by way of a norm where there is one.
    fn mlp(
        &mut self,
        layer: Layer<'_>,
        mlp: &MlpWeights<Self>,
        post_norm: Option<&NormWeights<Self>>,
        step: Step<'_, Self>,
    ) -> Result<(), ModelError> {
        let Self { cpu, config, buffers, .. } = self;
        let Buffers { hidden, activations, gated, branch, low_rank, segments: room, .. } = buffers;
        let hidden = &mut hidden[..step.num_rows * config.hidden_size];
        let product = gated_product(mlp, config.mlp.activation);
        let form = Form::of([&mlp.down.weight]);
        let both = segments(step.adapters, |weights| &weights.layers[layer.index].gated, &mut room.1);
        cpu.gated_matmul(activations, &product, addends(cpu, activations, &both, low_rank), form, gated);
        room.1 = recycled(both);
        let down = segments(step.adapters, |weights| &weights.layers[layer.index].down, &mut room.0);
        let post_norm = post_norm.map(|post_norm| norm(config, post_norm));
        add_branch(cpu, gated, &mlp.down, (&down, low_rank), post_norm, branch, hidden)?;
        room.0 = recycled(down);
        Ok(())
    }

    /// Likewise a mixture of experts.
    fn mixture(
        &mut self,
        weights: &ExpertsWeights<Self>,
        post_norm: Option<&NormWeights<Self>>,
        rows: usize,
    ) -> Result<(), ModelError> {
        let Self { cpu, config, buffers, .. } = self;
        let Buffers { hidden, activations, gated, branch, shared, router_logits, shared_gates, mixture, .. } = buffers;
        let experts = config.experts.as_ref().expect("the decoder has checked that layers with experts have them");
        let hidden = &mut hidden[..rows * config.hidden_size];
        let logits = sized(router_logits, rows * experts.num_experts)?;
        cpu.matmul(activations, &weights.router, None, logits);
        let shares = if experts.normalize_weights { Shares::OfChosen } else { Shares::OfAll };
        let (num_experts, num_chosen) = (experts.num_experts, experts.num_experts_per_token);
        cpu.route(logits, &RoutingArgs { num_experts, num_chosen, shares }, mixture);
        // Without a norm in between, experts add to the residual stream at once.
        let out = if post_norm.is_none() {
            &mut *hidden
        } else {
            let branch = sized(branch, hidden.len())?;
            branch.fill(0.0);
            branch
        };
        let activation = experts.activation;
        let expert = |index: usize| {
            let mlp = &weights.experts[index];
            ExpertWeights { product: gated_product(mlp, activation), down: projection(&mlp.down) }
        };
        cpu.experts(activations, mixture, expert, out);
        if let Some(SharedExpert { mlp, gate }) = &weights.shared {
            cpu.gated_matmul(activations, &gated_product(mlp, activation), None, Form::of([&mlp.down.weight]), gated);
            let shared = sized(shared, out.len())?;
            cpu.matmul(gated, &mlp.down.weight, mlp.down.bias.as_deref(), shared);
            let gates = sized(shared_gates, rows)?;
            cpu.matmul(activations, gate, None, gates);
            for gate in &mut *gates {
                *gate = 1.0 / (1.0 + (-*gate).exp());
            }
            cpu.add_scaled_rows(shared, gates, out);
        }
        if let Some(post_norm) = post_norm {
            cpu.norm_add(&branch[..hidden.len()], &norm(config, post_norm), hidden);
        }
        Ok(())
    }
}

impl Backend for CpuBackend {
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type AdapterImport = Isa;
    /// Halves fill vectors.
    const ROTATES_HALVES: bool = true;

    fn device(&self) -> String {
        format!("cpu ({})", format!("{:?}", self.cpu.isa()).to_lowercase())
    }

    fn threads(&self) -> usize {
        self.cpu.threads()
    }

    fn spread(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.cpu.run(num_tasks, task);
    }

    fn import_matrix(&self, tensor: &TensorView<'_>) -> Result<Matrix, ModelError> {
        if self.import.dequantize {
            return self.import_dense_matrix(tensor);
        }
        tensor.import(&self.cpu, self.import.dtype, self.import.quantize)
    }

    fn import_dense_matrix(&self, tensor: &TensorView<'_>) -> Result<Matrix, ModelError> {
        tensor.import_f32(&self.cpu)
    }

    fn import_vector(&self, values: Vec<f32>) -> Result<Vec<f32>, ModelError> {
        Ok(values)
    }

    fn matrix_bytes(matrix: &Matrix) -> usize {
        matrix.size_bytes()
    }

    fn num_parameters(matrix: &Matrix) -> usize {
        matrix.rows() * matrix.cols()
    }

    fn is_quantized(matrix: &Matrix) -> bool {
        matrix.is_quantized()
    }

    fn vector_bytes(vector: &Vec<f32>) -> usize {
        size_of_val(vector.as_slice())
    }

    fn base_form(matrix: &Matrix) -> BaseForm {
        match matrix {
            Matrix::F32(_) => BaseForm::F32,
            _ if matrix.reads_int8() => BaseForm::Quantized,
            _ => BaseForm::Dense,
        }
    }

    fn adapter_import(&self) -> Isa {
        self.cpu.isa()
    }

    fn import_low_rank(isa: &Isa, low_rank: LowRankValues, base: BaseForm) -> Result<LowRankWeights<Self>, ModelError> {
        Ok(adapter::import::pack(*isa, low_rank, base))
    }

    fn allocate_kv(&mut self, num_blocks: usize) -> Result<(), ModelError> {
        // The old cache goes first: both at once might not fit.
        self.cache = None;
        self.cache =
            Some(KvCache::new(self.kv_shape, num_blocks).map_err(|error| ModelError::OutOfMemory(error.to_string()))?);
        // Now, so that a context which grows while it is decoded finds them.
        self.make_biases(self.config.max_position_embeddings.min(num_blocks * self.kv_shape.block_size))
    }

    fn copy_block(&mut self, source: u32, target: u32) -> Result<(), ModelError> {
        cache(&mut self.cache).copy_block(source, target);
        Ok(())
    }

    fn embed(&mut self, table: &Matrix, step: Step<'_, Self>) -> Result<(), ModelError> {
        let DecoderConfig { hidden_size, embedding_scale, .. } = self.config;
        let hidden = sized(&mut self.buffers.hidden, step.num_rows * hidden_size)?;
        self.cpu.take_rows(table, &step.batch.tokens, embedding_scale, hidden);
        Ok(())
    }

    fn attention_inputs(
        &mut self,
        layer: Layer<'_>,
        weights: &AttentionWeights<Self>,
        step: Step<'_, Self>,
    ) -> Result<(), ModelError> {
        let DecoderConfig { num_heads, num_kv_heads, head_dim, hidden_size, .. } = self.config;
        let (cpu, rows) = (&self.cpu, step.num_rows);
        let Buffers { hidden, activations, queries, keys, values, low_rank, segments: room, .. } = &mut self.buffers;
        let hidden = &hidden[..rows * hidden_size];
        let queries = sized(queries, rows * num_heads * head_dim)?;
        let keys = sized(keys, rows * num_kv_heads * head_dim)?;
        let values = sized(values, rows * num_kv_heads * head_dim)?;

        let projections = [&weights.q, &weights.k, &weights.v];
        let form = Form::of(projections.map(|projection| &projection.weight));
        cpu.norm(hidden, rows, &norm(&self.config, &weights.norm), form, activations);
        let all = segments(step.adapters, |weights| &weights.layers[layer.index].qkv, &mut room.2);
        cpu.matmul_all(
            activations,
            [product(&weights.q, queries), product(&weights.k, keys), product(&weights.v, values)],
            addends(cpu, activations, &all, low_rank),
        );
        room.2 = recycled(all);
        if let Some([query_norm, key_norm]) = &weights.head_norms {
            cpu.norm_in_place(queries, &norm(&self.config, query_norm));
            cpu.norm_in_place(keys, &norm(&self.config, key_norm));
        }
        if let Some((index, rope)) = step.rope(layer) {
            let (dim, style) = (self.config.rotaries[index].dim, RopeStyle::Neox);
            cpu.rope(queries, rows, num_heads, head_dim, dim, style, rope.cos(), rope.sin());
            cpu.rope(keys, rows, num_kv_heads, head_dim, dim, style, rope.cos(), rope.sin());
        }
        cpu.write_kv(cache(&mut self.cache), layer.index, keys, values, &step.batch.slots);
        Ok(())
    }

    fn attention(&mut self, layer: Layer<'_>, step: Step<'_, Self>) -> Result<(), ModelError> {
        if self.config.alibi.is_some() {
            let lengths = step.sequences.iter().map(|sequence| sequence.context_len);
            self.make_biases(lengths.max().unwrap_or(0))?;
        }
        let width = self.config.num_heads * self.config.head_dim;
        let Buffers { queries, attended, sequences, biases, .. } = &mut self.buffers;
        let args = AttentionArgs {
            num_heads: self.config.num_heads,
            scale: self.config.attention_scale,
            window: layer.config.window,
            blocks: layer.config.blocks,
            soft_cap: self.config.attention_soft_cap,
            biases: self.config.alibi.is_some().then_some(biases.as_slice()),
        };
        let queries = &queries[..step.num_rows * width];
        let attended = sized(attended, step.num_rows * width)?;
        let mut step_sequences = recycled(mem::take(sequences));
        step_sequences.extend(step.sequences.iter().map(|sequence| AttentionSequence {
            rows: sequence.rows.clone(),
            context_len: sequence.context_len,
            block_table: &step.batch.block_tables[sequence.block_table.clone()],
        }));
        self.cpu.attention(queries, cache(&mut self.cache), layer.index, &step_sequences, &args, attended);
        *sequences = recycled(step_sequences);
        Ok(())
    }

    fn attention_output(
        &mut self,
        layer: Layer<'_>,
        weights: &AttentionWeights<Self>,
        step: Step<'_, Self>,
    ) -> Result<(), ModelError> {
        let (rows, width) = (step.num_rows, self.config.num_heads * self.config.head_dim);
        let Buffers { hidden, activations, attended, branch, low_rank, segments: room, .. } = &mut self.buffers;
        let hidden = &mut hidden[..rows * self.config.hidden_size];
        let attended = &attended[..rows * width];
        self.cpu.prepare(attended, rows, width, Form::of([&weights.o.weight]), activations);
        let output = segments(step.adapters, |weights| &weights.layers[layer.index].output, &mut room.0);
        let post_norm = weights.post_norm.as_ref().map(|post_norm| norm(&self.config, post_norm));
        add_branch(&self.cpu, activations, &weights.o, (&output, low_rank), post_norm, branch, hidden)?;
        room.0 = recycled(output);
        Ok(())
    }

    fn feed_forward(
        &mut self,
        layer: Layer<'_>,
        norm: &NormWeights<Self>,
        weights: &FeedForwardWeights<Self>,
        step: Step<'_, Self>,
    ) -> Result<(), ModelError> {
        let rows = step.num_rows;
        let Buffers { hidden, activations, .. } = &mut self.buffers;
        let hidden = &hidden[..rows * self.config.hidden_size];
        self.cpu.norm(hidden, rows, &self::norm(&self.config, norm), input_form(&weights.kind), activations);
        match &weights.kind {
            FeedForwardKind::Dense(mlp) => self.mlp(layer, mlp, weights.post_norm.as_ref(), step),
            FeedForwardKind::Experts(experts) => self.mixture(experts, weights.post_norm.as_ref(), rows),
        }
    }

    fn keep_rows(&mut self, rows: &[u32]) -> Result<(), ModelError> {
        let DecoderConfig { num_heads, head_dim, hidden_size, .. } = self.config;
        let Buffers { hidden, queries, .. } = &mut self.buffers;
        for (values, width) in [(hidden, hidden_size), (queries, num_heads * head_dim)] {
            for (to, &row) in rows.iter().enumerate() {
                let from = row as usize * width;
                values.copy_within(from..from + width, to * width);
            }
        }
        Ok(())
    }

    fn head(
        &mut self,
        rows: Range<usize>,
        weights: &HeadWeights<'_, Self>,
        adapters: Adapters<'_, Self>,
        out: &mut [f32],
    ) -> Result<(), ModelError> {
        let DecoderConfig { hidden_size, logit_scale, logit_soft_cap, .. } = self.config;
        let Buffers { hidden, activations, low_rank, segments: room, .. } = &mut self.buffers;
        let hidden = &hidden[rows.start * hidden_size..rows.end * hidden_size];
        let HeadWeights { norm, weight, bias } = *weights;
        self.cpu.norm(hidden, rows.len(), &self::norm(&self.config, norm), Form::of([weight]), activations);
        let head = segments(adapters, |weights| &weights.head, &mut room.0);
        let product = Product { weights: weight, bias: bias.map(Vec::as_slice), out: &mut *out };
        self.cpu.matmul_all(activations, [product], addends(&self.cpu, activations, &head, low_rank));
        room.0 = recycled(head);
        if logit_scale != 1.0 || logit_soft_cap.is_some() {
            self.cpu.scale_and_cap(out, logit_scale, logit_soft_cap);
        }
        Ok(())
    }
}

fn cache(cache: &mut Option<KvCache>) -> &mut KvCache {
    cache.as_mut().expect("the decoder allocates the cache before a step")
}
