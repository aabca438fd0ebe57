//! The oracle: plain candle operations in f32, on any device that candle has. Slow and obviously right.
//!
//! Every operation allocates its result and no operation is fused; weights are dequantised. It must not share code
//! with the kernels it judges. Invariant: the same pages and slots as every other backend (slot = block * block_size +
//! offset), so that block tables mean the same thing everywhere.

use std::ops::Range;

use candle_core::{D, Device, Tensor};

use crate::{
    backend::{AttentionWeights, Backend, Layer, Linear, MlpWeights, Step},
    batch::BatchSequence,
    config::{Activation, DecoderConfig, RopeStyle},
    error::ModelError,
    weights::TensorView,
};

/// candle in f32.
pub(crate) struct ReferenceBackend {
    config: DecoderConfig,
    device: Device,
    block_size: usize,
    cache: Vec<LayerCache>,
    /// Values between two operations; None before the first step.
    activations: Option<Activations>,
    /// `[kept rows, hidden_size]`
    kept: Option<Tensor>,
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
    /// `[rows, rotary dim / 2]`
    cos: Tensor,
    sin: Tensor,
    /// Queries, after `attention` the attended values: `[rows, num_heads, head_dim]`
    heads: Tensor,
}

impl ReferenceBackend {
    pub(crate) fn new(config: &DecoderConfig, device: Device, block_size: usize) -> Self {
        Self { config: config.clone(), device, block_size, cache: Vec::new(), activations: None, kept: None }
    }

    fn tensor(&self, values: &[f32], shape: (usize, usize)) -> candle_core::Result<Tensor> {
        Tensor::from_slice(values, shape, &self.device)
    }

    fn activations(&mut self) -> &mut Activations {
        self.activations.as_mut().expect("`embed` comes first in a step")
    }

    /// x / rms(x) * weight
    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        let rms = (mean_square + f64::from(self.config.norm.eps))?.sqrt()?;
        x.broadcast_div(&rms)?.broadcast_mul(weight)
    }

    /// Rotates the first `rotary.dim` elements of each head. x: `[rows, heads, head_dim]`
    fn rotate(&self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> candle_core::Result<Tensor> {
        let rotary = &self.config.rotaries[0];
        let (rows, heads, head_dim) = x.dims3()?;
        let num_pairs = rotary.dim / 2;
        if num_pairs == 0 {
            return Ok(x.clone());
        }
        let rotated = x.narrow(2, 0, rotary.dim)?;
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
        let scores = scores.broadcast_add(&self.mask(rows, context_len, layer.config.window)?)?;
        let exponentials = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)?;
        weights.matmul(&values)?.transpose(0, 1)?.contiguous()
    }

    /// 0 where a row sees a key, minus infinity elsewhere: `[rows, context_len]`.
    fn mask(&self, rows: usize, context_len: usize, window: Option<usize>) -> candle_core::Result<Tensor> {
        let first_position = context_len - rows;
        let mut mask = Vec::with_capacity(rows * context_len);
        for position in first_position..context_len {
            for key in 0..context_len {
                let visible = key <= position && window.is_none_or(|window| position - key < window);
                mask.push(if visible { 0.0 } else { f32::NEG_INFINITY });
            }
        }
        self.tensor(&mask, (rows, context_len))
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

#[expect(clippy::needless_pass_by_value, reason = "the shape that map_err takes")]
fn failed(error: candle_core::Error) -> ModelError {
    ModelError::Step(format!("the reference backend failed: {error}"))
}

impl Backend for ReferenceBackend {
    type Matrix = Tensor;
    type Vector = Tensor;
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

    fn import_vector(&self, tensor: &TensorView<'_>) -> Result<Tensor, ModelError> {
        Tensor::from_vec(tensor.to_f32()?, tensor.cols, &self.device).map_err(failed)
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

    fn embed(&mut self, table: &Tensor, step: Step<'_>) -> Result<(), ModelError> {
        let mut start = || {
            let tokens = Tensor::new(step.batch.tokens.as_slice(), &self.device)?;
            let hidden = table.index_select(&tokens, 0)?;
            let angles = (step.num_rows(), self.config.rotaries[0].dim / 2);
            let (cos, sin) = (self.tensor(step.cos, angles)?, self.tensor(step.sin, angles)?);
            self.activations = Some(Activations { heads: hidden.clone(), hidden, cos, sin });
            Ok(())
        };
        start().map_err(failed)
    }

    fn attention_inputs(
        &mut self,
        layer: Layer<'_>,
        weights: &AttentionWeights<Self>,
        step: Step<'_>,
    ) -> Result<(), ModelError> {
        let DecoderConfig { num_heads, num_kv_heads, head_dim, .. } = self.config;
        let rows = step.num_rows();
        let Activations { hidden, cos, sin, .. } = self.activations();
        let (hidden, cos, sin) = (hidden.clone(), cos.clone(), sin.clone());
        let compute = || {
            let x = self.rms_norm(&hidden, &weights.norm)?;
            let mut queries = linear(&x, &weights.q)?.reshape((rows, num_heads, head_dim))?;
            let mut keys = linear(&x, &weights.k)?.reshape((rows, num_kv_heads, head_dim))?;
            let values = linear(&x, &weights.v)?;
            if layer.config.rotary.is_some() {
                queries = self.rotate(&queries, &cos, &sin)?;
                keys = self.rotate(&keys, &cos, &sin)?;
            }
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

    fn attention(&mut self, layer: Layer<'_>, step: Step<'_>) -> Result<(), ModelError> {
        let queries = self.activations().heads.clone();
        let pages = &self.cache[layer.index];
        let compute = || {
            let mut attended = Vec::with_capacity(step.batch.sequences.len());
            for sequence in &step.batch.sequences {
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

    fn attention_output(&mut self, weights: &AttentionWeights<Self>, _step: Step<'_>) -> Result<(), ModelError> {
        let Activations { hidden, heads, .. } = self.activations();
        let compute = || hidden.add(&linear(&heads.flatten_from(1)?, &weights.o)?);
        *hidden = compute().map_err(failed)?;
        Ok(())
    }

    fn mlp(&mut self, weights: &MlpWeights<Self>, _step: Step<'_>) -> Result<(), ModelError> {
        let hidden = self.activations().hidden.clone();
        let compute = || {
            let x = self.rms_norm(&hidden, &weights.norm)?;
            let gate = x.matmul(&weights.gate.t()?)?;
            let gate = match self.config.mlp.activation {
                Activation::Silu => gate.silu()?,
                Activation::Gelu | Activation::GeluTanh => unreachable!("refused at load"),
            };
            let up = x.matmul(&weights.up.t()?)?;
            hidden.add(&(gate * up)?.matmul(&weights.down.t()?)?)
        };
        let hidden = compute().map_err(failed)?;
        self.activations().hidden = hidden;
        Ok(())
    }

    fn keep_rows(&mut self, rows: &[u32]) -> Result<(), ModelError> {
        self.kept = None;
        if rows.is_empty() {
            return Ok(());
        }
        let rows = Tensor::new(rows, &self.device).map_err(failed)?;
        self.kept = Some(self.activations().hidden.index_select(&rows, 0).map_err(failed)?);
        Ok(())
    }

    fn head(&mut self, rows: Range<usize>, norm: &Tensor, head: &Tensor, out: &mut [f32]) -> Result<(), ModelError> {
        let kept = self.kept.as_ref().expect("the decoder asks for rows that were kept");
        let compute = || {
            let x = self.rms_norm(&kept.narrow(0, rows.start, rows.len())?, norm)?;
            x.matmul(&head.t()?)?.flatten_all()?.to_vec1::<f32>()
        };
        out.copy_from_slice(&compute().map_err(failed)?);
        Ok(())
    }
}
