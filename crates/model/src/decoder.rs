//! The decoder, written once: how layers follow each other, whoever computes them.
//!
//! It knows the order of operations and the names of weights; it must not know tensors, threads or instruction sets
//! (the backend's part), nor files beyond [`WeightStore`]. Invariant: no backend operation runs before its batch has
//! been checked and the cache allocated, and after a failed step no row counts as kept.

mod adapters;
mod check;
mod kept;
mod load;

use std::{ops::Range, sync::Arc};

use crate::{
    adapter::weights::{AdapterWeights, BackendLoader},
    backend::{
        AdapterRun, Adapters, AttentionWeights, Backend, FeedForwardWeights, HeadWeights, Layer, LoadedAdapter,
        NormWeights, Step,
    },
    batch::{BatchChecker, BatchLimits, BatchSequence, ForwardBatch},
    config::{Block, DecoderConfig},
    error::ModelError,
    model::{ModelPhase, ProductWeights},
    rope::Rope,
    weights::WeightStore,
};

/// A model on one backend.
pub(crate) struct Decoder<B: Backend> {
    config: DecoderConfig,
    weights: DecoderWeights<B>,
    backend: B,
    /// One a rotary embedding; None for one that no layer uses.
    ropes: Vec<Option<Rope>>,
    block_size: usize,
    /// None until the cache is allocated.
    checker: Option<BatchChecker>,
    /// Rows of the last batch that logits may be asked for.
    num_kept_rows: usize,
    /// Those that batches may name.
    adapters: Vec<LoadedAdapter<B>>,
    /// Which rows of the batch go through which of them.
    runs: Vec<AdapterRun>,
    /// The rows kept for logits as sequences.
    kept_sequences: Vec<BatchSequence>,
    /// Which of them go through which adapter, and of a slice of them.
    kept_runs: Vec<AdapterRun>,
    head_runs: Vec<AdapterRun>,
}

/// All weights, by what they do.
struct DecoderWeights<B: Backend> {
    embedding: B::Matrix,
    layers: Vec<LayerWeights<B>>,
    final_norm: NormWeights<B>,
    /// None: tied to the embedding.
    head: Option<B::Matrix>,
    head_bias: Option<B::Vector>,
}

struct LayerWeights<B: Backend> {
    attention: AttentionWeights<B>,
    feed_forward: FeedForwardWeights<B>,
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
        let ropes = Self::check(config)?;
        let (weights, loaded) = load::weights(config, store, &backend, progress)?;
        let decoder = Self {
            config: config.clone(),
            weights,
            backend,
            ropes,
            block_size,
            checker: None,
            num_kept_rows: 0,
            adapters: Vec::new(),
            runs: Vec::new(),
            kept_sequences: Vec::new(),
            kept_runs: Vec::new(),
            head_runs: Vec::new(),
        };
        Ok((decoder, loaded))
    }

    /// Whether the operations can carry the configuration out; the rotary embeddings, which have their own rules.
    pub(crate) fn check(config: &DecoderConfig) -> Result<Vec<Option<Rope>>, ModelError> {
        check::config(config)?;
        let rotaries = config.rotaries.iter().enumerate();
        rotaries.map(|(index, rotary)| config.uses_rotary(index).then(|| Rope::new(rotary)).transpose()).collect()
    }

    /// Lets batches name an adapter that was made for this model.
    pub(crate) fn add_adapter(&mut self, id: u32, weights: Arc<AdapterWeights<B>>) -> Result<(), ModelError> {
        if self.adapters.iter().any(|adapter| adapter.id == id) {
            return Err(ModelError::Step(format!("there is an adapter {id} already")));
        }
        self.adapters.push(LoadedAdapter { id, weights });
        Ok(())
    }

    /// Batches may not name it any more.
    pub(crate) fn remove_adapter(&mut self, id: u32) {
        self.adapters.retain(|adapter| adapter.id != id);
        // Kept rows that name others by their place would be wrong now.
        self.num_kept_rows = 0;
    }

    /// What reads adapters for this model, on other threads.
    pub(crate) fn adapter_loader(&self) -> BackendLoader<B> {
        adapters::loader(&self.config, &self.weights, &self.backend)
    }

    pub(crate) fn backend(&self) -> &B {
        &self.backend
    }

    pub(crate) fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
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
        adapters::runs(batch, &self.adapters, &mut self.runs)?;
        if batch.tokens.is_empty() {
            return Ok(());
        }
        self.ropes.iter_mut().flatten().for_each(|rope| rope.compute(batch));
        let (num_rows, num_kept_rows) = (batch.num_tokens(), batch.logit_rows.len());
        let keeps_some = num_kept_rows < num_rows;
        if keeps_some {
            kept::sequences(batch, &mut self.kept_sequences);
        }
        adapters::kept_runs(&self.runs, &batch.logit_rows, &mut self.kept_runs);
        let adapters = |runs| Adapters { runs, loaded: &self.adapters };
        let all =
            Step { batch, num_rows, sequences: &batch.sequences, ropes: &self.ropes, adapters: adapters(&self.runs) };
        let kept = Step {
            num_rows: num_kept_rows,
            sequences: &self.kept_sequences,
            adapters: adapters(&self.kept_runs),
            ..all
        };
        let mut step = all;
        let backend = &mut self.backend;
        let num_layers = self.weights.layers.len();
        let keeps_early = keeps_some && !backend.needs_every_row();
        backend.embed(&self.weights.embedding, step)?;
        passed(ModelPhase::Embed);
        for (index, (weights, config)) in self.weights.layers.iter().zip(&self.config.layers).enumerate() {
            let layer = Layer { index, config };
            backend.attention_inputs(layer, &weights.attention, step)?;
            passed(ModelPhase::AttentionInputs);
            // Of most of a prompt's rows nothing is needed any more: their keys and values are in the cache.
            if keeps_early && index + 1 == num_layers {
                backend.keep_rows(&batch.logit_rows)?;
                passed(ModelPhase::Embed);
                step = kept;
                if num_kept_rows == 0 {
                    break;
                }
            }
            backend.attention(layer, step)?;
            passed(ModelPhase::Attention);
            let mlp_norm = weights.feed_forward.norm.as_ref().unwrap_or(&weights.attention.norm);
            match self.config.block {
                Block::PreNorm | Block::SandwichNorm => {
                    backend.attention_output(layer, &weights.attention, step)?;
                    passed(ModelPhase::AttentionOutput);
                    backend.feed_forward(layer, mlp_norm, &weights.feed_forward, step)?;
                    passed(ModelPhase::Mlp);
                }
                // Both branches read the residual stream as it is before either is added.
                Block::Parallel | Block::ParallelTwoNorms => {
                    backend.feed_forward(layer, mlp_norm, &weights.feed_forward, step)?;
                    passed(ModelPhase::Mlp);
                    backend.attention_output(layer, &weights.attention, step)?;
                    passed(ModelPhase::AttentionOutput);
                }
            }
        }
        if keeps_some && !keeps_early {
            backend.keep_rows(&batch.logit_rows)?;
            passed(ModelPhase::Embed);
        }
        self.num_kept_rows = num_kept_rows;
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
        let DecoderWeights { embedding, final_norm, head, head_bias, .. } = &self.weights;
        let weight = head.as_ref().unwrap_or(embedding);
        adapters::slice_runs(&self.kept_runs, &rows, &mut self.head_runs);
        let adapters = Adapters { runs: &self.head_runs, loaded: &self.adapters };
        self.backend.head(rows, &HeadWeights { norm: final_norm, weight, bias: head_bias.as_ref() }, adapters, out)?;
        for row in out.chunks_exact_mut(vocab_size) {
            self.config.masked_tokens.iter().for_each(|&token| row[token as usize] = f32::MIN);
        }
        Ok(())
    }
}

fn checker(checker: &mut Option<BatchChecker>) -> Result<&mut BatchChecker, ModelError> {
    checker.as_mut().ok_or_else(|| ModelError::Step("the KV cache is not allocated: call allocate_kv first".into()))
}

#[cfg(test)]
pub(crate) mod tests;
