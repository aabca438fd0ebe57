//! The decoder, written once: how layers follow each other, whoever computes them.
//!
//! It knows the order of operations and the names of weights; it must not know tensors, threads or instruction sets
//! (the backend's part), nor files beyond [`WeightStore`]. Invariant: no backend operation runs before its batch has
//! been checked and the cache allocated, and after a failed step no row counts as kept.

use std::ops::Range;

use crate::{
    backend::{AttentionWeights, Backend, Layer, Linear, MlpWeights, Step},
    batch::{BatchChecker, BatchLimits, ForwardBatch},
    config::{Activation, Block, DecoderConfig, FeedForward, NormKind, RopeStyle},
    error::ModelError,
    model::{ModelPhase, ProductWeights},
    rope::Rope,
    weights::{LayerTensor, TensorRole, TensorView, WeightStore},
};

/// A model on one backend.
pub(crate) struct Decoder<B: Backend> {
    config: DecoderConfig,
    weights: DecoderWeights<B>,
    backend: B,
    rope: Rope,
    block_size: usize,
    /// None until the cache is allocated.
    checker: Option<BatchChecker>,
    /// Rows of the last batch that logits may be asked for.
    num_kept_rows: usize,
}

/// All weights, by what they do.
struct DecoderWeights<B: Backend> {
    embedding: B::Matrix,
    layers: Vec<LayerWeights<B>>,
    final_norm: B::Vector,
    /// None: tied to the embedding.
    head: Option<B::Matrix>,
}

struct LayerWeights<B: Backend> {
    attention: AttentionWeights<B>,
    mlp: MlpWeights<B>,
}

/// What loading has brought into memory.
pub(crate) struct LoadedWeights {
    pub(crate) num_bytes: u64,
    /// See [`crate::ModelInfo::products`].
    pub(crate) products: Vec<ProductWeights>,
}

impl<B: Backend> Decoder<B> {
    /// Takes the weights over one tensor at a time; `progress(bytes done, bytes in all)` counts them as stored.
    pub(crate) fn load(
        config: &DecoderConfig,
        store: &WeightStore,
        backend: B,
        block_size: usize,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(Self, LoadedWeights), ModelError> {
        let rope = Self::check(config)?;
        let mut loader = Loader { store, backend: &backend, config, progress, bytes_done: 0, bytes_held: 0 };
        let weights = loader.load()?;
        let loaded = LoadedWeights { num_bytes: loader.bytes_held, products: products(&weights) };
        let decoder =
            Self { config: config.clone(), weights, backend, rope, block_size, checker: None, num_kept_rows: 0 };
        Ok((decoder, loaded))
    }

    /// Whether the operations can carry the configuration out; the rotary embedding, which has its own rules.
    pub(crate) fn check(config: &DecoderConfig) -> Result<Rope, ModelError> {
        check_config(config)?;
        Rope::new(&config.rotaries[0])
    }

    pub(crate) fn backend(&self) -> &B {
        &self.backend
    }

    pub(crate) fn allocate_kv(&mut self, num_blocks: usize) -> Result<(), ModelError> {
        let block_size = self.block_size;
        // Slots are u32 in a batch.
        let num_slots = num_blocks.checked_mul(block_size).filter(|&slots| u32::try_from(slots).is_ok());
        if num_blocks == 0 || num_slots.is_none() {
            return Err(ModelError::BadOption(format!(
                "a KV cache of {num_blocks} blocks of {block_size} tokens: it must hold 1 to {} tokens",
                u32::MAX
            )));
        }
        self.checker = None;
        self.num_kept_rows = 0;
        self.backend.allocate_kv(num_blocks)?;
        let limits = BatchLimits { vocab_size: self.config.vocab_size, num_blocks, block_size };
        self.checker = Some(BatchChecker::new(limits));
        Ok(())
    }

    pub(crate) fn copy_blocks(&mut self, copies: &[(u32, u32)]) -> Result<(), ModelError> {
        checker(&mut self.checker)?.check_copies(copies)?;
        for &(source, target) in copies {
            self.backend.copy_block(source, target)?;
        }
        Ok(())
    }

    pub(crate) fn forward(
        &mut self,
        batch: &ForwardBatch,
        passed: &mut dyn FnMut(ModelPhase),
    ) -> Result<(), ModelError> {
        self.num_kept_rows = 0;
        checker(&mut self.checker)?.check(batch)?;
        if batch.tokens.is_empty() {
            return Ok(());
        }
        self.rope.compute(&batch.positions);
        let step = Step { batch, cos: self.rope.cos(), sin: self.rope.sin() };
        let backend = &mut self.backend;
        backend.embed(&self.weights.embedding, step)?;
        passed(ModelPhase::Embed);
        for (index, (weights, config)) in self.weights.layers.iter().zip(&self.config.layers).enumerate() {
            let layer = Layer { index, config };
            backend.attention_inputs(layer, &weights.attention, step)?;
            passed(ModelPhase::AttentionInputs);
            backend.attention(layer, step)?;
            passed(ModelPhase::Attention);
            backend.attention_output(&weights.attention, step)?;
            passed(ModelPhase::AttentionOutput);
            backend.mlp(&weights.mlp, step)?;
            passed(ModelPhase::Mlp);
        }
        backend.keep_rows(&batch.logit_rows)?;
        passed(ModelPhase::Embed);
        self.num_kept_rows = batch.logit_rows.len();
        Ok(())
    }

    pub(crate) fn logits(&mut self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ModelError> {
        if rows.start > rows.end || rows.end > self.num_kept_rows {
            return Err(ModelError::Step(format!(
                "logits of rows {rows:?} were asked for, the last batch kept {}",
                self.num_kept_rows
            )));
        }
        let vocab_size = self.config.vocab_size;
        if rows.len().checked_mul(vocab_size) != Some(out.len()) {
            return Err(ModelError::Step(format!(
                "logits of {} rows over a vocabulary of {vocab_size} do not fit a buffer of {}",
                rows.len(),
                out.len()
            )));
        }
        if rows.is_empty() {
            return Ok(());
        }
        let head = self.weights.head.as_ref().unwrap_or(&self.weights.embedding);
        self.backend.head(rows, &self.weights.final_norm, head, out)
    }
}

fn checker(checker: &mut Option<BatchChecker>) -> Result<&mut BatchChecker, ModelError> {
    checker.as_mut().ok_or_else(|| ModelError::Step("the KV cache is not allocated: call allocate_kv first".into()))
}

/// Sizes above this are a mistake, and products of two of them must not overflow.
const MAX_SIZE: usize = 1 << 24;

/// What the operations rely on. A file's own errors are found where it is read; this holds whatever read it.
fn check_config(config: &DecoderConfig) -> Result<(), ModelError> {
    let refuse = |what: String| Err(ModelError::Unsupported(format!("{}: {what}", config.architecture)));
    let sizes = [
        ("vocabulary", config.vocab_size),
        ("hidden size", config.hidden_size),
        ("number of heads", config.num_heads),
        ("number of key/value heads", config.num_kv_heads),
        ("head size", config.head_dim),
        ("MLP size", config.mlp.intermediate_size),
        ("number of layers", config.num_layers()),
    ];
    if let Some((name, size)) = sizes.iter().find(|(_, size)| !(1..=MAX_SIZE).contains(size)) {
        return refuse(format!("the {name} is {size}: it must be 1 to {MAX_SIZE}"));
    }
    if !config.num_heads.is_multiple_of(config.num_kv_heads) {
        return refuse(format!(
            "{} query heads do not divide among {} key/value heads",
            config.num_heads, config.num_kv_heads
        ));
    }
    for rotary in &config.rotaries {
        if rotary.dim > config.head_dim || !rotary.dim.is_multiple_of(2) {
            return refuse(format!(
                "{} rotated elements of a head of {}: they must be even and fit",
                rotary.dim, config.head_dim
            ));
        }
    }
    let not_yet = [
        ("this order of norms", config.block != Block::PreNorm),
        ("norms of query and key heads", config.query_key_norm),
        ("this normalisation", config.norm.kind != NormKind::Rms || config.norm.weight_offset != 0.0),
        ("several rotary embeddings", config.rotaries.len() != 1),
        ("ALiBi", config.alibi.is_some()),
        ("soft caps", config.attention_soft_cap.is_some() || config.logit_soft_cap.is_some()),
        ("this activation", config.mlp.activation != Activation::Silu || !config.mlp.gated),
        ("experts", config.layers.iter().any(|layer| layer.feed_forward == FeedForward::Experts)),
        ("biases in MLP or head", config.biases.mlp || config.head_bias),
        ("scaled embeddings or logits", config.embedding_scale != 1.0 || config.logit_scale != 1.0),
    ];
    if let Some((what, _)) = not_yet.iter().find(|(_, asked)| *asked) {
        return refuse(format!("{what}: not computed yet"));
    }
    if config.layers.iter().any(|layer| layer.window == Some(0)) {
        return refuse("a sliding window of 0 tokens sees nothing".into());
    }
    Ok(())
}

/// The matrices of each part of a pass.
fn products<B: Backend>(weights: &DecoderWeights<B>) -> Vec<ProductWeights> {
    let of = |part, matrices: &mut dyn Iterator<Item = &B::Matrix>| {
        let empty = ProductWeights { part, num_parameters: 0, num_bytes: 0, is_quantized: true };
        matrices.fold(empty, |sum, matrix| ProductWeights {
            part,
            num_parameters: sum.num_parameters + B::num_parameters(matrix) as u64,
            num_bytes: sum.num_bytes + B::matrix_bytes(matrix) as u64,
            is_quantized: sum.is_quantized && B::is_quantized(matrix),
        })
    };
    let layers = &weights.layers;
    vec![
        of("qkv", &mut layers.iter().flat_map(|l| [&l.attention.q, &l.attention.k, &l.attention.v]).map(|l| &l.weight)),
        of("output", &mut layers.iter().map(|layer| &layer.attention.o.weight)),
        of("mlp", &mut layers.iter().flat_map(|layer| [&layer.mlp.gate, &layer.mlp.up, &layer.mlp.down])),
        of("head", &mut std::iter::once(weights.head.as_ref().unwrap_or(&weights.embedding))),
    ]
}

/// Brings every tensor from the store to the backend, checking shapes on the way.
struct Loader<'a, B: Backend> {
    store: &'a WeightStore,
    backend: &'a B,
    config: &'a DecoderConfig,
    progress: &'a mut dyn FnMut(u64, u64),
    bytes_done: u64,
    bytes_held: u64,
}

impl<B: Backend> Loader<'_, B> {
    fn load(&mut self) -> Result<DecoderWeights<B>, ModelError> {
        let DecoderConfig { vocab_size, hidden_size, .. } = *self.config;
        (self.progress)(0, self.store.num_bytes());
        let embedding = self.matrix(TensorRole::Embedding, vocab_size, hidden_size)?;
        let mut layers = Vec::with_capacity(self.config.num_layers());
        for index in 0..self.config.num_layers() {
            layers.push(LayerWeights { attention: self.attention(index)?, mlp: self.mlp(index)? });
        }
        let final_norm = self.vector(TensorRole::FinalNorm, hidden_size)?;
        let head = if self.config.tied_embeddings {
            None
        } else {
            Some(self.matrix(TensorRole::Head, vocab_size, hidden_size)?)
        };
        Ok(DecoderWeights { embedding, layers, final_norm, head })
    }

    fn attention(&mut self, layer: usize) -> Result<AttentionWeights<B>, ModelError> {
        let config = self.config;
        let (hidden, queries) = (config.hidden_size, config.num_heads * config.head_dim);
        let keys = config.num_kv_heads * config.head_dim;
        use LayerTensor as T;
        Ok(AttentionWeights {
            norm: self.vector(TensorRole::Layer(layer, T::AttentionNorm), hidden)?,
            q: self.linear(layer, T::Q, T::QBias, queries, hidden)?,
            k: self.linear(layer, T::K, T::KBias, keys, hidden)?,
            v: self.linear(layer, T::V, T::VBias, keys, hidden)?,
            o: self.linear(layer, T::O, T::OBias, hidden, queries)?,
        })
    }

    fn mlp(&mut self, layer: usize) -> Result<MlpWeights<B>, ModelError> {
        let (hidden, intermediate) = (self.config.hidden_size, self.config.mlp.intermediate_size);
        use LayerTensor as T;
        Ok(MlpWeights {
            norm: self.vector(TensorRole::Layer(layer, T::MlpNorm), hidden)?,
            gate: self.matrix(TensorRole::Layer(layer, T::Gate), intermediate, hidden)?,
            up: self.matrix(TensorRole::Layer(layer, T::Up), intermediate, hidden)?,
            down: self.matrix(TensorRole::Layer(layer, T::Down), hidden, intermediate)?,
        })
    }

    fn linear(
        &mut self,
        layer: usize,
        weight: LayerTensor,
        bias: LayerTensor,
        rows: usize,
        cols: usize,
    ) -> Result<Linear<B>, ModelError> {
        let in_halves = matches!(weight, LayerTensor::Q | LayerTensor::K);
        let weight = self.required(TensorRole::Layer(layer, weight))?;
        let bias = self.store.tensor(TensorRole::Layer(layer, bias))?;
        let (weight, bias) =
            if in_halves { (self.in_halves(weight), bias.map(|bias| self.in_halves(bias))) } else { (weight, bias) };
        let weight = self.import_matrix(&weight, rows, cols)?;
        let bias = bias.map(|bias| self.import_vector(&bias, rows)).transpose()?;
        Ok(Linear { weight, bias })
    }

    fn matrix(&mut self, role: TensorRole, rows: usize, cols: usize) -> Result<B::Matrix, ModelError> {
        let tensor = self.required(role)?;
        self.import_matrix(&tensor, rows, cols)
    }

    /// A query's or key's tensor as the backend rotates it.
    fn in_halves<'b>(&self, tensor: TensorView<'b>) -> TensorView<'b> {
        let rotary = &self.config.rotaries[0];
        if B::ROTATES_HALVES && rotary.style == RopeStyle::Interleaved {
            tensor.with_halves(self.config.head_dim, rotary.dim)
        } else {
            tensor
        }
    }

    fn import_matrix(&mut self, tensor: &TensorView<'_>, rows: usize, cols: usize) -> Result<B::Matrix, ModelError> {
        self.check_shape(tensor, rows, cols)?;
        let matrix = self.backend.import_matrix(tensor)?;
        self.taken(tensor, B::matrix_bytes(&matrix));
        Ok(matrix)
    }

    fn vector(&mut self, role: TensorRole, len: usize) -> Result<B::Vector, ModelError> {
        let tensor = self.required(role)?;
        self.import_vector(&tensor, len)
    }

    fn import_vector(&mut self, tensor: &TensorView<'_>, len: usize) -> Result<B::Vector, ModelError> {
        self.check_shape(tensor, 1, len)?;
        let vector = self.backend.import_vector(tensor)?;
        self.taken(tensor, B::vector_bytes(&vector));
        Ok(vector)
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
        (self.progress)(self.bytes_done, self.store.num_bytes().max(self.bytes_done));
    }
}

impl<'a, B: Backend> Loader<'a, B> {
    fn required(&self, role: TensorRole) -> Result<TensorView<'a>, ModelError> {
        self.store.tensor(role)?.ok_or_else(|| {
            ModelError::Unsupported(format!("{}: the file has no tensor for {role:?}", self.config.architecture))
        })
    }
}

#[cfg(test)]
mod tests {
    use bindery_kernels::Cpu;

    use super::*;
    use crate::backend::{
        cpu::{CpuBackend, ImportOptions},
        reference::ReferenceBackend,
    };
    use crate::batch::BatchSequence;
    use crate::config::{Biases, LayerConfig, Mlp, Norm, RopeScaling, Rotary};
    use crate::model::{Dtype, KvCacheDtype, Quantize};

    fn config() -> DecoderConfig {
        DecoderConfig {
            architecture: "llama".into(),
            vocab_size: 10,
            hidden_size: 8,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 4,
            max_position_embeddings: 16,
            norm: Norm { kind: NormKind::Rms, eps: 1e-5, weight_offset: 0.0 },
            block: Block::PreNorm,
            query_key_norm: false,
            rotaries: vec![Rotary { style: RopeStyle::Neox, dim: 4, base: 10_000.0, scaling: RopeScaling::None }],
            alibi: None,
            attention_scale: 0.5,
            attention_soft_cap: None,
            mlp: Mlp { intermediate_size: 16, activation: Activation::Silu, gated: true },
            experts: None,
            biases: Biases::default(),
            layers: vec![LayerConfig { window: None, rotary: Some(0), feed_forward: FeedForward::Dense }],
            embedding_scale: 1.0,
            tied_embeddings: true,
            head_bias: false,
            logit_scale: 1.0,
            logit_soft_cap: None,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        }
    }

    fn check_refused(expected: &str, break_it: impl FnOnce(&mut DecoderConfig)) {
        let mut config = config();
        break_it(&mut config);
        let message = check_config(&config).expect_err(expected).to_string();
        assert!(message.contains(expected), "{message:?} should contain {expected:?}");
    }

    #[test]
    fn a_configuration_that_the_operations_cannot_carry_out_is_refused() {
        assert!(check_config(&config()).is_ok());
        check_refused("vocabulary is 0", |config| config.vocab_size = 0);
        check_refused("number of layers is 0", |config| config.layers.clear());
        check_refused("head size is 18446744073709551615", |config| config.head_dim = usize::MAX);
        check_refused("4 query heads", |config| config.num_kv_heads = 3);
        check_refused("5 rotated elements", |config| config.rotaries[0].dim = 5);
        check_refused("6 rotated elements of a head of 4", |config| config.rotaries[0].dim = 6);
        check_refused("window of 0", |config| config.layers[0].window = Some(0));
    }

    /// Log-probabilities of every token of a prompt of 20, computed whole.
    fn logits<B: Backend>(config: &DecoderConfig, store: &WeightStore, backend: B) -> Vec<f32> {
        let (mut decoder, _) = Decoder::load(config, store, backend, 16, &mut |_, _| ()).unwrap();
        decoder.allocate_kv(2).unwrap();
        let batch = ForwardBatch {
            tokens: (0..20).map(|i| i * 7 % 100).collect(),
            positions: (0..20).collect(),
            slots: (16..32).chain(0..4).collect(),
            block_tables: vec![1, 0],
            sequences: vec![BatchSequence { rows: 0..20, block_table: 0..2, context_len: 20, adapter: None }],
            logit_rows: (0..20).collect(),
        };
        decoder.forward(&batch, &mut |_| ()).unwrap();
        let mut logits = vec![0.0; 20 * config.vocab_size];
        decoder.logits(0..20, &mut logits).unwrap();
        logits
    }

    #[test]
    fn backends_agree_on_axes_that_no_golden_has() {
        for name in ["tiny-llama", "tiny-llama-bias"] {
            check_axes(name);
        }
    }

    fn check_axes(name: &str) {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/checkpoints").join(name);
        let store = WeightStore::open(&path).unwrap();
        let import = ImportOptions { dtype: Dtype::F32, quantize: Quantize::None, dequantize: true };
        let mut seen: Vec<Vec<f32>> = Vec::new();
        for style in [RopeStyle::Neox, RopeStyle::Interleaved] {
            for dim in [0, 6, store.config().head_dim] {
                let factors = (0..dim / 2).map(|i| 1.0 + i as f32).collect();
                for scaling in [RopeScaling::Linear { factor: 2.0 }, RopeScaling::Factors(factors)] {
                    let mut config = store.config().clone();
                    config.rotaries = vec![Rotary { style, dim, base: 10_000.0, scaling }];
                    config.layers[1].window = Some(3);
                    let reference = ReferenceBackend::new(&config, candle_core::Device::Cpu, 16);
                    let cpu = Cpu::new(Cpu::detect(), 2);
                    let cpu = CpuBackend::new(cpu, &config, import, KvCacheDtype::Auto, 16);
                    let (expected, actual) = (logits(&config, &store, reference), logits(&config, &store, cpu));
                    for (expected, actual) in expected.iter().zip(&actual) {
                        assert!((expected - actual).abs() < 1e-3, "{:?}: {expected} and {actual}", config.rotaries);
                    }
                    // Without rotated elements all settings are one; else each must differ from all others.
                    assert!(dim == 0 || !seen.contains(&actual), "{:?} changed nothing", config.rotaries);
                    seen.push(actual);
                }
            }
        }
    }
}
