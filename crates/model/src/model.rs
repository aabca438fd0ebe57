//! The door: a path and options become a [`Model`], and the engine steps it through [`StepModel`].
//!
//! It chooses a backend and data types once, at load; nothing below asks again. It must not know who sends batches.
//! Invariant: an option that cannot be honoured is refused here by name, before any weight is read.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use bindery_kernels::{Cpu, Isa, pack_together};

use crate::{
    adapter::{
        Adapter, AdapterLoader,
        weights::{AnyAdapter, AnyLoader},
    },
    attention_work::{AttentionShape, AttentionWork},
    backend::{
        Backend,
        cpu::{self, CpuBackend, ImportOptions},
        reference::ReferenceBackend,
    },
    batch::{BatchSequence, ForwardBatch},
    config::DecoderConfig,
    decoder::{Decoder, LoadedWeights},
    error::ModelError,
    report::{self, ModelReport},
    rope::RopeRegimes,
    threads::physical_cores,
    weights::{Importance, WeightStore},
};

/// `--dtype`: what dense weights are computed in. Quantised weights stay as they are stored, whatever it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// As stored.
    Auto,
    /// 32-bit floats; keys and values too unless `--kv-cache-dtype` says otherwise.
    F32,
    /// bfloat16 weights, f32 sums.
    Bf16,
    /// 16-bit float weights, f32 sums.
    F16,
}

/// `--quantize`: what dense weights become at load. Quantised weights stay as they are stored, whatever it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantize {
    /// As stored.
    None,
    /// 8-bit codes.
    Int8,
    /// 4-bit codes.
    Int4,
}

/// `--kv-cache-dtype`: what keys and values are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvCacheDtype {
    /// f32 under `--dtype f32`, else f16.
    Auto,
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit integers with a scale for every 32 components of a token in a head.
    Int8,
}

/// Who computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// Our kernels.
    Cpu,
    /// candle in f32: the oracle. Slow.
    Reference,
}

/// How to load a model.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Who computes.
    pub backend: BackendKind,
    /// Of dense weights.
    pub dtype: Dtype,
    /// Of dense weights.
    pub quantize: Quantize,
    /// Of the cache.
    pub kv_cache_dtype: KvCacheDtype,
    /// Tokens a cache block holds.
    pub block_size: usize,
    /// None: physical cores available to this process. The reference backend has candle's own threads.
    pub threads: Option<usize>,
    /// `--load-format dummy`: random weights of the config's shapes; the path then needs only a config.json.
    pub dummy: bool,
    /// Quantised weights become dense f32 on the `cpu` backend too: for tests and fidelity checks, which want to know
    /// what the quantised arithmetic alone costs.
    pub dequantize: bool,
}

impl LoadOptions {
    /// Everything as stored, blocks of 16 tokens.
    pub fn new(backend: BackendKind) -> Self {
        Self {
            backend,
            dtype: Dtype::Auto,
            quantize: Quantize::None,
            kv_cache_dtype: KvCacheDtype::Auto,
            block_size: 16,
            threads: None,
            dummy: false,
            dequantize: false,
        }
    }

    /// Refuses values out of range, and those that no model could be loaded with.
    pub fn check(&self) -> Result<(), ModelError> {
        let refuse = |what: String| Err(ModelError::BadOption(what));
        if self.block_size == 0 || self.block_size > MAX_BLOCK_SIZE {
            return refuse(format!("--block-size {}: a block holds 1 to {MAX_BLOCK_SIZE} tokens", self.block_size));
        }
        if let Some(threads) = self.threads.filter(|threads| !(1..=MAX_THREADS).contains(threads)) {
            return refuse(format!("--threads {threads}: it must be 1 to {MAX_THREADS}"));
        }
        if self.dequantize && self.quantize != Quantize::None {
            return refuse("--quantize and dequantised weights exclude each other".into());
        }
        if self.backend == BackendKind::Reference {
            if !matches!(self.dtype, Dtype::Auto | Dtype::F32) {
                return refuse(format!("the reference backend computes in f32, not in {:?}", self.dtype));
            }
            if !matches!(self.kv_cache_dtype, KvCacheDtype::Auto | KvCacheDtype::F32) {
                return refuse(format!(
                    "the reference backend keeps keys and values in f32, not in {:?}",
                    self.kv_cache_dtype
                ));
            }
            if self.quantize != Quantize::None {
                return refuse("the reference backend does not quantise: leave --quantize away".into());
            }
        }
        if self.backend == BackendKind::Cpu {
            isa()?;
        }
        Ok(())
    }
}

/// Threads above this are a mistake.
const MAX_THREADS: usize = 1024;

/// Tokens a block may hold. Far above what pays.
const MAX_BLOCK_SIZE: usize = 1024;

/// What is known about a loaded model. Sizes in bytes unless named otherwise.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// As the file names it: "llama".
    pub architecture: String,
    /// Tokens the model knows: the width of a row of logits.
    pub vocab_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// The widest sliding window, where every layer has one: no token sees further back.
    pub window: Option<usize>,
    /// The head shares the embedding's matrix.
    pub tied_embeddings: bool,
    /// Longest context the model was made for, tokens.
    pub max_position_embeddings: usize,
    /// From the file.
    pub bos_token_id: Option<u32>,
    /// From the file; a generation_config.json beside it may say otherwise.
    pub eos_token_ids: Vec<u32>,
    /// Weights, counted once where tied.
    pub num_parameters: u64,
    /// For people, e.g. "Q4_1 (210), F32 (61)".
    pub weight_format: String,
    /// Tensors that [`LoadOptions::quantize`] changed.
    pub num_quantized_tensors: usize,
    /// What the parts of a forward pass multiply with, in the order of a pass; norms and biases are left out.
    pub products: Vec<ProductWeights>,
    /// How much attention has to do.
    pub attention: AttentionShape,
    /// Weights as they are held in memory.
    pub weight_bytes: u64,
    /// Weights as stored in the file.
    pub stored_weight_bytes: u64,
    /// All layers, keys and values, one token.
    pub kv_bytes_per_token: usize,
    /// What was chosen; never `Auto`.
    pub kv_cache_dtype: KvCacheDtype,
    /// Tokens a cache block holds.
    pub block_size: usize,
    /// Threads that compute.
    pub threads: usize,
    /// Who computes.
    pub backend: BackendKind,
    /// For people: "cpu (avx2)".
    pub device: String,
    /// Where it was read from.
    pub path: PathBuf,
}

/// A part of the forward pass; see [`StepModel::forward`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelPhase {
    /// Embedding rows of the tokens, rotary angles, and leaving out rows that nobody asks for logits of.
    Embed,
    /// Norm, queries, keys and values, rotary embedding, writing to the pages.
    AttentionInputs,
    /// Attention over the pages.
    Attention,
    /// Output projection and residual.
    AttentionOutput,
    /// Norm, gate, up, activation, down and residual.
    Mlp,
}

/// The matrices of one part of the forward pass, over all layers; of experts, as many as one row uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProductWeights {
    /// "qkv", "output", "mlp" or "head".
    pub part: &'static str,
    /// Weights: multiply-adds for one row.
    pub num_parameters: u64,
    /// Of them, those that only rows meet whose logits may be asked for: of the last layer, and the head.
    pub num_kept_parameters: u64,
    /// As held in memory: what a step reads, however many rows it has.
    pub num_bytes: u64,
    /// Of them, those of `num_kept_parameters`.
    pub num_kept_bytes: u64,
    /// Codes of at most 8 bits, multiplied with int8 activations (all matrices of the part).
    pub is_quantized: bool,
}

/// Makes `room` at least `len` values long, in memory that is quick to write column by column, as [`StepModel::logits`] does. What
/// it held is lost where it grows.
pub fn make_room(room: &mut Vec<f32>, len: usize) -> Result<(), ModelError> {
    bindery_kernels::make_room(room, len).map_err(|error| ModelError::OutOfMemory(error.to_string()))
}

/// What the engine asks of a model; `Model` is one, test doubles are others.
pub trait StepModel: Send {
    /// Width of a row of logits.
    fn vocab_size(&self) -> usize;
    /// Where rotary frequencies depend on a request's length: which lengths share theirs. A request's
    /// [`crate::BatchSequence::rope_len`] must be the same for all that is in the cache of it.
    fn rope_regimes(&self) -> Option<RopeRegimes>;
    /// Lets batches name an adapter, by a number that no other has or will have. It must be of this model's
    /// [`Model::adapter_loader`]. Costs no time.
    fn add_adapter(&mut self, id: u32, adapter: &Arc<Adapter>) -> Result<(), ModelError>;
    /// Batches may not name it any more; its memory goes with the last who holds it.
    fn remove_adapter(&mut self, id: u32);
    /// Copies whole blocks (source, target) in every layer, in order, before the next forward.
    fn copy_blocks(&mut self, copies: &[(u32, u32)]) -> Result<(), ModelError>;
    /// Computes a batch: writes its keys and values, keeps the final hidden state of `logit_rows`. A batch that breaks
    /// its contract is refused with [`ModelError::Step`] and changes nothing in the cache. `passed` is told each part of
    /// the work as it ends, many times a step: who wants to know where the time goes looks at a clock there.
    fn forward(&mut self, batch: &ForwardBatch, passed: &mut dyn FnMut(ModelPhase)) -> Result<(), ModelError>;
    /// Logits of rows `rows` (indices into the last batch's `logit_rows`), `out: [rows.len(), vocab_size]`.
    /// Called in slices, so that tokens x vocabulary never exists at once.
    fn logits(&mut self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ModelError>;
    /// What attention has to do at least for this batch.
    fn attention_work(&self, batch: &ForwardBatch) -> AttentionWork;
    /// Runs `task(0)` to `task(num_tasks - 1)`, each once, on the threads that the model computes with and that have nothing to
    /// do between two calls; returns when all are done. A panic in a task is raised again here.
    fn spread(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..num_tasks).for_each(task);
    }
}

/// A loaded model with its KV cache.
pub struct Model {
    decoder: AnyDecoder,
    info: ModelInfo,
    rope_regimes: Option<RopeRegimes>,
}

/// The decoder on the backend that was chosen.
enum AnyDecoder {
    Cpu(Box<Decoder<CpuBackend>>),
    Reference(Box<Decoder<ReferenceBackend>>),
}

/// The same call on whichever decoder there is.
macro_rules! on_decoder {
    ($model:expr, $decoder:ident => $call:expr) => {
        match &mut $model.decoder {
            AnyDecoder::Cpu($decoder) => $call,
            AnyDecoder::Reference($decoder) => $call,
        }
    };
}

/// A model's files, opened and checked: all that [`Model::load`] can refuse without reading a weight has been refused.
#[derive(Debug)]
pub struct OpenedModel {
    store: WeightStore,
    options: LoadOptions,
    kv_cache_dtype: KvCacheDtype,
}

impl OpenedModel {
    /// The model's structure.
    pub fn config(&self) -> &DecoderConfig {
        self.store.config()
    }

    /// All layers, keys and values, one token.
    pub fn kv_bytes_per_token(&self) -> usize {
        kv_bytes_per_token(self.config(), self.kv_cache_dtype)
    }

    /// What it is made of and what it takes; no weight is read.
    pub fn report(&self) -> Result<ModelReport, ModelError> {
        Ok(report::report(&self.store, &self.options, isa()?, self.kv_cache_dtype))
    }

    /// Reads the weights. `progress(bytes done, bytes in all)` is called after each tensor. The files are closed then.
    pub fn load(self, progress: &mut dyn FnMut(u64, u64)) -> Result<Model, ModelError> {
        let (config, options) = (self.config(), &self.options);
        let block_size = options.block_size;
        let rope_regimes = RopeRegimes::of(config)?;
        match options.backend {
            BackendKind::Cpu => {
                let cpu = Cpu::new(isa()?, options.threads.unwrap_or_else(physical_cores));
                let backend = CpuBackend::new(cpu, config, import_options(options), self.kv_cache_dtype, block_size);
                let (decoder, weights) =
                    pack_together(|| Decoder::load(config, &self.store, backend, block_size, progress))?;
                let info = self.info(decoder.backend(), weights);
                Ok(Model { decoder: AnyDecoder::Cpu(Box::new(decoder)), info, rope_regimes })
            }
            BackendKind::Reference => {
                let backend = ReferenceBackend::new(config, candle_core::Device::Cpu, block_size);
                let (decoder, weights) = Decoder::load(config, &self.store, backend, block_size, progress)?;
                let info = self.info(decoder.backend(), weights);
                Ok(Model { decoder: AnyDecoder::Reference(Box::new(decoder)), info, rope_regimes })
            }
        }
    }

    fn info<B: Backend>(&self, backend: &B, weights: LoadedWeights) -> ModelInfo {
        let (config, store, options) = (self.config(), &self.store, &self.options);
        let num_quantized_tensors = store.num_quantized_by(options.quantize);
        ModelInfo {
            architecture: config.architecture.clone(),
            vocab_size: config.vocab_size,
            num_layers: config.num_layers(),
            hidden_size: config.hidden_size,
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            intermediate_size: config.mlp.intermediate_size,
            window: widest_window(config),
            tied_embeddings: config.tied_embeddings,
            max_position_embeddings: config.max_position_embeddings,
            bos_token_id: config.bos_token_id,
            eos_token_ids: config.eos_token_ids.clone(),
            num_parameters: store.num_parameters(),
            weight_format: match (options.quantize, num_quantized_tensors) {
                (Quantize::None, _) | (_, 0) => store.describe_formats(),
                (Quantize::Int8, num) => format!("{}; {num} quantised to int8 at load", store.describe_formats()),
                (Quantize::Int4, num) => format!("{}; {num} quantised to int4 at load", store.describe_formats()),
            },
            num_quantized_tensors,
            products: weights.products,
            attention: AttentionShape::new(
                &config.layers,
                config.num_heads,
                config.head_dim,
                kv_bytes_per_layer(config, self.kv_cache_dtype),
            ),
            weight_bytes: weights.num_bytes,
            stored_weight_bytes: store.num_bytes(),
            kv_bytes_per_token: self.kv_bytes_per_token(),
            kv_cache_dtype: self.kv_cache_dtype,
            block_size: options.block_size,
            threads: backend.threads(),
            backend: options.backend,
            device: backend.device(),
            path: store.path().to_owned(),
        }
    }
}

impl Model {
    /// Reads a `.gguf` file or a directory with config.json and safetensors. `progress(bytes done, bytes in all)` is
    /// called after each tensor.
    pub fn load(path: &Path, options: &LoadOptions, progress: &mut dyn FnMut(u64, u64)) -> Result<Self, ModelError> {
        Self::open(path, options)?.load(progress)
    }

    /// The part of [`Model::load`] that costs little: options, metadata and the table of tensors are read and checked.
    pub fn open(path: &Path, options: &LoadOptions) -> Result<OpenedModel, ModelError> {
        options.check()?;
        let store = if options.dummy { WeightStore::dummy(path)? } else { WeightStore::open(path)? };
        Decoder::<CpuBackend>::check(store.config())?;
        let kv_cache_dtype = match options.backend {
            BackendKind::Reference => KvCacheDtype::F32,
            BackendKind::Cpu => cpu::kv_cache_dtype(import_options(options), options.kv_cache_dtype),
        };
        Ok(OpenedModel { store, options: options.clone(), kv_cache_dtype })
    }

    /// What was loaded.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// What reads adapters for this model, on any thread.
    pub fn adapter_loader(&self) -> AdapterLoader {
        AdapterLoader::new(match &self.decoder {
            AnyDecoder::Cpu(decoder) => AnyLoader::Cpu(decoder.adapter_loader()),
            AnyDecoder::Reference(decoder) => AnyLoader::Reference(decoder.adapter_loader()),
        })
    }

    /// From now on the mean square of what goes into each matrix is gathered, until [`Model::take_importance`].
    ///
    /// # Errors
    /// The `cpu` backend does not tell: its fused operations keep no inputs.
    pub fn observe_inputs(&mut self) -> Result<(), ModelError> {
        match &mut self.decoder {
            AnyDecoder::Reference(decoder) => decoder.backend_mut().observe(),
            AnyDecoder::Cpu(_) => {
                return Err(ModelError::BadOption("inputs are gathered by the reference backend only".into()));
            }
        }
        Ok(())
    }

    /// What was gathered; none where nobody asked for it.
    pub fn take_importance(&mut self) -> Option<Importance> {
        match &mut self.decoder {
            AnyDecoder::Reference(decoder) => decoder.backend_mut().take_observed(),
            AnyDecoder::Cpu(_) => None,
        }
    }

    /// Reserves the KV cache; pages are touched on use. Before the first forward; again, it empties the cache.
    pub fn allocate_kv(&mut self, num_blocks: usize) -> Result<(), ModelError> {
        on_decoder!(self, decoder => decoder.allocate_kv(num_blocks))
    }
}

impl StepModel for Model {
    fn vocab_size(&self) -> usize {
        self.info.vocab_size
    }

    fn rope_regimes(&self) -> Option<RopeRegimes> {
        self.rope_regimes
    }

    fn add_adapter(&mut self, id: u32, adapter: &Arc<Adapter>) -> Result<(), ModelError> {
        match (&mut self.decoder, &adapter.weights) {
            (AnyDecoder::Cpu(decoder), AnyAdapter::Cpu(weights)) => decoder.add_adapter(id, Arc::clone(weights)),
            (AnyDecoder::Reference(decoder), AnyAdapter::Reference(weights)) => {
                decoder.add_adapter(id, Arc::clone(weights))
            }
            _ => Err(ModelError::Unsupported(format!("adapter {id} was loaded for another model"))),
        }
    }

    fn remove_adapter(&mut self, id: u32) {
        on_decoder!(self, decoder => decoder.remove_adapter(id));
    }

    fn copy_blocks(&mut self, copies: &[(u32, u32)]) -> Result<(), ModelError> {
        on_decoder!(self, decoder => decoder.copy_blocks(copies))
    }

    fn forward(&mut self, batch: &ForwardBatch, passed: &mut dyn FnMut(ModelPhase)) -> Result<(), ModelError> {
        on_decoder!(self, decoder => decoder.forward(batch, passed))
    }

    fn logits(&mut self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ModelError> {
        on_decoder!(self, decoder => decoder.logits(rows, out))
    }

    fn attention_work(&self, batch: &ForwardBatch) -> AttentionWork {
        let mut logit_rows = batch.logit_rows.iter().peekable();
        let of = |sequence: &BatchSequence| {
            let is_of_it = |row: &&u32| (**row as usize) < sequence.rows.end;
            let num_kept = std::iter::from_fn(|| logit_rows.next_if(is_of_it)).count();
            self.info.attention.work(sequence.context_len, sequence.rows.len(), num_kept)
        };
        batch.sequences.iter().map(of).sum()
    }

    fn spread(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        match &self.decoder {
            AnyDecoder::Cpu(decoder) => decoder.backend().spread(num_tasks, task),
            AnyDecoder::Reference(decoder) => decoder.backend().spread(num_tasks, task),
        }
    }
}

/// The instruction set that the environment allows.
fn isa() -> Result<Isa, ModelError> {
    Isa::from_env().map_err(|error| ModelError::BadOption(error.to_string()))
}

fn import_options(options: &LoadOptions) -> ImportOptions {
    ImportOptions { dtype: options.dtype, quantize: options.quantize, dequantize: options.dequantize }
}

/// None where one layer sees everything.
fn widest_window(config: &DecoderConfig) -> Option<usize> {
    let windows: Option<Vec<usize>> = config.layers.iter().map(|layer| layer.window).collect();
    windows?.into_iter().max()
}

/// Of one token, all layers: windows make no difference, for a layer's pages are those of all others.
pub(crate) fn kv_bytes_per_token(config: &DecoderConfig, dtype: KvCacheDtype) -> usize {
    config.num_layers() * kv_bytes_per_layer(config, dtype)
}

/// Of one token's key and value in one layer.
fn kv_bytes_per_layer(config: &DecoderConfig, dtype: KvCacheDtype) -> usize {
    2 * config.num_kv_heads * kv_head_bytes(dtype, config.head_dim)
}

/// Of one token's key (or value) in one head.
fn kv_head_bytes(dtype: KvCacheDtype, head_dim: usize) -> usize {
    match dtype {
        KvCacheDtype::F32 => 4 * head_dim,
        KvCacheDtype::F16 | KvCacheDtype::Bf16 => 2 * head_dim,
        // Its scales are counted.
        KvCacheDtype::Int8 => bindery_kernels::KvDtype::Int8.head_bytes(head_dim),
        KvCacheDtype::Auto => unreachable!("a backend reports what it chose"),
    }
}
