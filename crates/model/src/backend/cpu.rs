//! The fast path without a GPU: our kernels over plain buffers. Quantised weights stay quantised.
//!
//! It knows which kernels follow each other inside an operation and which buffers lie between them; it must not know
//! instruction sets or layouts (the kernels' part). Invariant: buffers only grow, so a step no larger than one before
//! allocates nothing here; and since each kernel computes a row by itself, so does each operation.

use std::{mem, ops::Range};

use bindery_kernels::{
    Activations, AttentionArgs, AttentionSequence, Cpu, Form, KvCache, KvDtype, KvShape, Matrix, Product,
};

use crate::{
    backend::{AttentionWeights, Backend, Layer, Linear, MlpWeights, Step},
    config::{Activation, DecoderConfig, RopeStyle},
    error::ModelError,
    model::{Dtype, KvCacheDtype, Quantize},
    weights::TensorView,
};

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
    /// Rows for the head, `[kept rows, hidden_size]`.
    kept: Vec<f32>,
    /// Empty between operations; keeps its memory.
    sequences: Vec<AttentionSequence<'static>>,
}

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
    if buffer.len() < len {
        buffer.try_reserve_exact(len - buffer.len()).map_err(|_| {
            ModelError::OutOfMemory(format!("no memory for {len} activations: lower --max-num-batched-tokens"))
        })?;
        buffer.resize(len, 0.0);
    }
    Ok(&mut buffer[..len])
}

/// An empty vector with the memory of another and a lifetime of its own.
fn recycled<'b>(mut sequences: Vec<AttentionSequence<'_>>) -> Vec<AttentionSequence<'b>> {
    sequences.clear();
    // Collecting in place keeps the allocation, as source and target have one layout.
    sequences.into_iter().map(|_| unreachable!("it was cleared")).collect()
}

fn product<'a>(linear: &'a Linear<CpuBackend>, out: &'a mut [f32]) -> Product<'a> {
    Product { weights: &linear.weight, bias: linear.bias.as_deref(), out }
}

impl Backend for CpuBackend {
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    /// Halves fill vectors.
    const ROTATES_HALVES: bool = true;

    fn device(&self) -> String {
        format!("cpu ({})", format!("{:?}", self.cpu.isa()).to_lowercase())
    }

    fn threads(&self) -> usize {
        self.cpu.threads()
    }

    fn import_matrix(&self, tensor: &TensorView<'_>) -> Result<Matrix, ModelError> {
        if !self.import.dequantize {
            return tensor.import(self.cpu.isa(), self.import.dtype, self.import.quantize);
        }
        let mut result = Ok(());
        let matrix = Matrix::pack_f32(self.cpu.isa(), tensor.rows, tensor.cols, |row, out| {
            if let Err(error) = tensor.dequantize_row(row, out) {
                result = Err(error);
            }
        });
        result.map(|()| matrix)
    }

    fn import_vector(&self, tensor: &TensorView<'_>) -> Result<Vec<f32>, ModelError> {
        tensor.to_f32()
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

    fn allocate_kv(&mut self, num_blocks: usize) -> Result<(), ModelError> {
        // The old cache goes first: both at once might not fit.
        self.cache = None;
        self.cache =
            Some(KvCache::new(self.kv_shape, num_blocks).map_err(|error| ModelError::OutOfMemory(error.to_string()))?);
        Ok(())
    }

    fn copy_block(&mut self, source: u32, target: u32) -> Result<(), ModelError> {
        cache(&mut self.cache).copy_block(source, target);
        Ok(())
    }

    fn embed(&mut self, table: &Matrix, step: Step<'_>) -> Result<(), ModelError> {
        let hidden_size = self.config.hidden_size;
        let hidden = sized(&mut self.buffers.hidden, step.num_rows() * hidden_size)?;
        for (&token, row) in step.batch.tokens.iter().zip(hidden.chunks_exact_mut(hidden_size)) {
            table.row(token as usize, row);
        }
        Ok(())
    }

    fn attention_inputs(
        &mut self,
        layer: Layer<'_>,
        weights: &AttentionWeights<Self>,
        step: Step<'_>,
    ) -> Result<(), ModelError> {
        let DecoderConfig { num_heads, num_kv_heads, head_dim, hidden_size, .. } = self.config;
        let (cpu, rows) = (&self.cpu, step.num_rows());
        let Buffers { hidden, activations, queries, keys, values, .. } = &mut self.buffers;
        let hidden = &hidden[..rows * hidden_size];
        let queries = sized(queries, rows * num_heads * head_dim)?;
        let keys = sized(keys, rows * num_kv_heads * head_dim)?;
        let values = sized(values, rows * num_kv_heads * head_dim)?;

        let projections = [&weights.q, &weights.k, &weights.v];
        let form = Form::of(projections.map(|projection| &projection.weight));
        cpu.rms_norm(hidden, rows, &weights.norm, self.config.norm.eps, form, activations);
        cpu.matmul_all(
            activations,
            [product(&weights.q, queries), product(&weights.k, keys), product(&weights.v, values)],
        );
        let rotary = &self.config.rotaries[0];
        if layer.config.rotary.is_some() && rotary.dim > 0 {
            let style = RopeStyle::Neox;
            cpu.rope(queries, rows, num_heads, head_dim, rotary.dim, style, step.cos, step.sin);
            cpu.rope(keys, rows, num_kv_heads, head_dim, rotary.dim, style, step.cos, step.sin);
        }
        cpu.write_kv(cache(&mut self.cache), layer.index, keys, values, &step.batch.slots);
        Ok(())
    }

    fn attention(&mut self, layer: Layer<'_>, step: Step<'_>) -> Result<(), ModelError> {
        let width = self.config.num_heads * self.config.head_dim;
        let args = AttentionArgs {
            num_heads: self.config.num_heads,
            scale: self.config.attention_scale,
            window: layer.config.window,
            soft_cap: None,
            alibi_slopes: None,
        };
        let Buffers { queries, attended, sequences, .. } = &mut self.buffers;
        let queries = &queries[..step.num_rows() * width];
        let attended = sized(attended, step.num_rows() * width)?;
        let mut step_sequences = recycled(mem::take(sequences));
        step_sequences.extend(step.batch.sequences.iter().map(|sequence| AttentionSequence {
            rows: sequence.rows.clone(),
            context_len: sequence.context_len,
            block_table: &step.batch.block_tables[sequence.block_table.clone()],
        }));
        self.cpu.attention(queries, cache(&mut self.cache), layer.index, &step_sequences, &args, attended);
        *sequences = recycled(step_sequences);
        Ok(())
    }

    fn attention_output(&mut self, weights: &AttentionWeights<Self>, step: Step<'_>) -> Result<(), ModelError> {
        let (rows, width) = (step.num_rows(), self.config.num_heads * self.config.head_dim);
        let Buffers { hidden, activations, attended, .. } = &mut self.buffers;
        let hidden = &mut hidden[..rows * self.config.hidden_size];
        let attended = &attended[..rows * width];
        self.cpu.prepare(attended, rows, width, Form::of([&weights.o.weight]), activations);
        self.cpu.matmul_add(activations, &weights.o.weight, weights.o.bias.as_deref(), hidden);
        Ok(())
    }

    fn mlp(&mut self, weights: &MlpWeights<Self>, step: Step<'_>) -> Result<(), ModelError> {
        let (cpu, rows) = (&self.cpu, step.num_rows());
        let Buffers { hidden, activations, gated, .. } = &mut self.buffers;
        let hidden = &mut hidden[..rows * self.config.hidden_size];

        let form = Form::of([&weights.gate, &weights.up]);
        cpu.rms_norm(hidden, rows, &weights.norm, self.config.norm.eps, form, activations);
        let form = Form::of([&weights.down]);
        match self.config.mlp.activation {
            Activation::Silu => cpu.gated_matmul(activations, &weights.gate, &weights.up, form, gated),
            Activation::Gelu | Activation::GeluTanh => unreachable!("refused at load"),
        }
        cpu.matmul_add(gated, &weights.down, None, hidden);
        Ok(())
    }

    fn keep_rows(&mut self, rows: &[u32]) -> Result<(), ModelError> {
        let hidden_size = self.config.hidden_size;
        let Buffers { hidden, kept, .. } = &mut self.buffers;
        let kept = sized(kept, rows.len() * hidden_size)?;
        for (&row, kept) in rows.iter().zip(kept.chunks_exact_mut(hidden_size)) {
            kept.copy_from_slice(&hidden[row as usize * hidden_size..][..hidden_size]);
        }
        Ok(())
    }

    fn head(&mut self, rows: Range<usize>, norm: &Vec<f32>, head: &Matrix, out: &mut [f32]) -> Result<(), ModelError> {
        let hidden_size = self.config.hidden_size;
        let Buffers { activations, kept, .. } = &mut self.buffers;
        let kept = &kept[rows.start * hidden_size..rows.end * hidden_size];
        self.cpu.rms_norm(kept, rows.len(), norm, self.config.norm.eps, Form::of([head]), activations);
        self.cpu.matmul(activations, head, None, out);
        Ok(())
    }
}

fn cache(cache: &mut Option<KvCache>) -> &mut KvCache {
    cache.as_mut().expect("the decoder allocates the cache before a step")
}
