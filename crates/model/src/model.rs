//! The door: a path and options become a [`Model`], and the engine steps it through [`StepModel`].
//!
//! It chooses a backend and data types once, at load; nothing below asks again. It must not know who sends batches.
//! Invariant: an option that cannot be honoured is refused here by name, before any weight is read.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use bindery_kernels::{Cpu, Isa};

use crate::{
    backend::{
        Backend,
        cpu::{CpuBackend, ImportOptions},
        reference::ReferenceBackend,
    },
    batch::ForwardBatch,
    config::DecoderConfig,
    decoder::Decoder,
    error::ModelError,
    threads::physical_cores,
    weights::WeightStore,
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

/// `--quantize`: what dense weights become at load.
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
    /// 8-bit integers with a scale a token and head. Refused until its kernels are there.
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
    /// For people, e.g. "Q4_1 (210 tensors), f32 (61)".
    pub weight_format: String,
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

/// What the engine asks of a model; `Model` is one, test doubles are others.
pub trait StepModel: Send {
    /// Width of a row of logits.
    fn vocab_size(&self) -> usize;
    /// Copies whole blocks (source, target) in every layer, in order, before the next forward.
    fn copy_blocks(&mut self, copies: &[(u32, u32)]) -> Result<(), ModelError>;
    /// Computes a batch: writes its keys and values, keeps the final hidden state of `logit_rows`. A batch that breaks
    /// its contract is refused with [`ModelError::Step`] and changes nothing in the cache.
    fn forward(&mut self, batch: &ForwardBatch) -> Result<(), ModelError>;
    /// Logits of rows `rows` (indices into the last batch's `logit_rows`), `out: [rows.len(), vocab_size]`.
    /// Called in slices, so that tokens x vocabulary never exists at once.
    fn logits(&mut self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ModelError>;
}

/// A loaded model with its KV cache.
pub struct Model {
    decoder: AnyDecoder,
    info: ModelInfo,
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

impl Model {
    /// Reads a `.gguf` file or a directory with config.json and safetensors. `progress(bytes done, bytes in all)` is
    /// called after each tensor.
    pub fn load(path: &Path, options: &LoadOptions, progress: &mut dyn FnMut(u64, u64)) -> Result<Self, ModelError> {
        check_options(options)?;
        let store = if options.dummy { WeightStore::dummy(path)? } else { WeightStore::open(path)? };
        Self::load_from(store, options, progress)
    }

    /// The same from an opened store, for a caller that needs its metadata first. It is closed afterwards.
    #[allow(clippy::needless_pass_by_value, reason = "the mapped file shall not outlive the load")]
    pub fn load_from(
        store: WeightStore,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, ModelError> {
        check_options(options)?;
        let (config, block_size) = (store.config(), options.block_size);
        match options.backend {
            BackendKind::Cpu => {
                let import =
                    ImportOptions { dtype: options.dtype, quantize: options.quantize, dequantize: options.dequantize };
                let isa = Isa::from_env().map_err(|error| ModelError::BadOption(error.to_string()))?;
                let cpu = Cpu::new(isa, options.threads.unwrap_or_else(physical_cores));
                let backend = CpuBackend::new(cpu, config, import, options.kv_cache_dtype, block_size)?;
                let (decoder, weight_bytes) = Decoder::load(config, &store, backend, block_size, progress)?;
                let info = model_info(&store, options, decoder.backend(), weight_bytes);
                Ok(Self { decoder: AnyDecoder::Cpu(Box::new(decoder)), info })
            }
            BackendKind::Reference => {
                let backend = ReferenceBackend::new(config, candle_core::Device::Cpu, block_size);
                let (decoder, weight_bytes) = Decoder::load(config, &store, backend, block_size, progress)?;
                let info = model_info(&store, options, decoder.backend(), weight_bytes);
                Ok(Self { decoder: AnyDecoder::Reference(Box::new(decoder)), info })
            }
        }
    }

    /// What was loaded.
    pub fn info(&self) -> &ModelInfo {
        &self.info
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

    fn copy_blocks(&mut self, copies: &[(u32, u32)]) -> Result<(), ModelError> {
        on_decoder!(self, decoder => decoder.copy_blocks(copies))
    }

    fn forward(&mut self, batch: &ForwardBatch) -> Result<(), ModelError> {
        on_decoder!(self, decoder => decoder.forward(batch))
    }

    fn logits(&mut self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ModelError> {
        on_decoder!(self, decoder => decoder.logits(rows, out))
    }
}

fn check_options(options: &LoadOptions) -> Result<(), ModelError> {
    let refuse = |what: String| Err(ModelError::BadOption(what));
    if options.block_size == 0 || options.block_size > MAX_BLOCK_SIZE {
        return refuse(format!("--block-size {}: a block holds 1 to {MAX_BLOCK_SIZE} tokens", options.block_size));
    }
    if let Some(threads) = options.threads.filter(|threads| !(1..=MAX_THREADS).contains(threads)) {
        return refuse(format!("--threads {threads}: it must be 1 to {MAX_THREADS}"));
    }
    if options.dequantize && options.quantize != Quantize::None {
        return refuse("--quantize and dequantised weights exclude each other".into());
    }
    if options.backend == BackendKind::Reference {
        if !matches!(options.dtype, Dtype::Auto | Dtype::F32) {
            return refuse(format!("the reference backend computes in f32, not in {:?}", options.dtype));
        }
        if !matches!(options.kv_cache_dtype, KvCacheDtype::Auto | KvCacheDtype::F32) {
            return refuse(format!(
                "the reference backend keeps keys and values in f32, not in {:?}",
                options.kv_cache_dtype
            ));
        }
        if options.quantize != Quantize::None {
            return refuse("the reference backend does not quantise: leave --quantize away".into());
        }
    }
    Ok(())
}

fn model_info<B: Backend>(store: &WeightStore, options: &LoadOptions, backend: &B, weight_bytes: u64) -> ModelInfo {
    let config = store.config();
    let kv_cache_dtype = backend.kv_cache_dtype();
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
        weight_format: match options.quantize {
            Quantize::None => store.describe_formats(),
            Quantize::Int8 => format!("quantised to int8 at load, from {}", store.describe_formats()),
            Quantize::Int4 => format!("quantised to int4 at load, from {}", store.describe_formats()),
        },
        weight_bytes,
        stored_weight_bytes: store.num_bytes(),
        kv_bytes_per_token: 2 * config.num_layers() * config.num_kv_heads * config.head_dim * kv_bytes(kv_cache_dtype),
        kv_cache_dtype,
        block_size: options.block_size,
        threads: backend.threads(),
        backend: options.backend,
        device: backend.device(),
        path: store.path().to_owned(),
    }
}

/// None where one layer sees everything.
fn widest_window(config: &DecoderConfig) -> Option<usize> {
    let windows: Option<Vec<usize>> = config.layers.iter().map(|layer| layer.window).collect();
    windows?.into_iter().max()
}

/// Of one element.
fn kv_bytes(dtype: KvCacheDtype) -> usize {
    match dtype {
        KvCacheDtype::F32 => 4,
        KvCacheDtype::F16 | KvCacheDtype::Bf16 => 2,
        KvCacheDtype::Int8 => 1,
        KvCacheDtype::Auto => unreachable!("a backend reports what it chose"),
    }
}
