//! Who carries out the decoder's operations.
//!
//! [`Backend`] is a dozen coarse operations, each of which a fused implementation fits behind: a backend may keep any
//! intermediate value in any form, since nobody reads one between two operations. It must not know how layers follow
//! each other (the decoder's part) or where weights come from (the loader's).
//!
//! Invariant: operations are called with batches that [`crate::batch::BatchChecker`] has passed and with weights of the
//! configuration's shapes, in the order in which the trait lists them.

pub(crate) mod cpu;
pub(crate) mod reference;

use std::{ops::Range, sync::Arc};

use crate::{
    adapter::{
        LowRank,
        weights::{AdapterWeights, BaseForm, LowRankWeights},
    },
    batch::{BatchSequence, ForwardBatch},
    config::LayerConfig,
    error::ModelError,
    rope::Rope,
    weights::TensorView,
};

/// One step as every operation sees it.
pub(crate) struct Step<'a, B: Backend> {
    /// Checked. Once rows are left out by [`Backend::keep_rows`], nothing in it but its block tables is the step's any more, nor are
    /// the angles below.
    pub(crate) batch: &'a ForwardBatch,
    /// Rows of the step.
    pub(crate) num_rows: usize,
    /// The step's rows as sequences, with block tables in the batch's.
    pub(crate) sequences: &'a [BatchSequence],
    /// The batch's angles, one a rotary embedding; None for one that no layer uses.
    pub(crate) ropes: &'a [Option<Rope>],
    /// Rows that go through adapters: products with a base weight get those of the adapters beside them, in the same
    /// operation.
    pub(crate) adapters: Adapters<'a, B>,
}

impl<B: Backend> Clone for Step<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Step<'_, B> {}

/// Which rows go through which adapter.
pub(crate) struct Adapters<'a, B: Backend> {
    /// Ascending, without overlap.
    pub(crate) runs: &'a [AdapterRun],
    /// Those that are loaded.
    pub(crate) loaded: &'a [LoadedAdapter<B>],
}

impl<B: Backend> Clone for Adapters<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Adapters<'_, B> {}

/// Rows that follow each other and go through one adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AdapterRun {
    pub(crate) rows: Range<usize>,
    /// Which of those that are loaded.
    pub(crate) index: usize,
}

/// An adapter that batches may name.
pub(crate) struct LoadedAdapter<B: Backend> {
    /// As in [`crate::BatchSequence::adapter`].
    pub(crate) id: u32,
    pub(crate) weights: Arc<AdapterWeights<B>>,
}

impl<'a, B: Backend> Adapters<'a, B> {
    /// Each run with its weights.
    pub(crate) fn iter(self) -> impl Iterator<Item = (Range<usize>, &'a AdapterWeights<B>)> {
        self.runs.iter().map(move |run| (run.rows.clone(), &*self.loaded[run.index].weights))
    }
}

impl<'a, B: Backend> Step<'a, B> {
    /// The angles of a layer's rotation, and the number of its embedding; None where it does not rotate.
    pub(crate) fn rope(&self, layer: Layer<'_>) -> Option<(usize, &'a Rope)> {
        let index = layer.config.rotary?;
        Some((index, self.ropes.get(index)?.as_ref()?))
    }
}

/// Which layer an operation belongs to, and what that layer does differently.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layer<'a> {
    pub(crate) index: usize,
    pub(crate) config: &'a LayerConfig,
}

/// A product with a weight and its bias.
pub(crate) struct Linear<B: Backend> {
    /// `[outputs, inputs]`
    pub(crate) weight: B::Matrix,
    /// `[outputs]`
    pub(crate) bias: Option<B::Vector>,
}

/// A norm of the configuration's kind; a family's offset is in the weight already.
pub(crate) struct NormWeights<B: Backend> {
    /// `[width]`
    pub(crate) weight: B::Vector,
    /// `[width]`, under `NormKind::Layer`.
    pub(crate) bias: Option<B::Vector>,
}

/// Attention's weights in one layer.
pub(crate) struct AttentionWeights<B: Backend> {
    pub(crate) norm: NormWeights<B>,
    pub(crate) q: Linear<B>,
    pub(crate) k: Linear<B>,
    pub(crate) v: Linear<B>,
    pub(crate) o: Linear<B>,
    /// Of each query head, `[head_dim]`, and of each key head.
    pub(crate) head_norms: Option<[NormWeights<B>; 2]>,
    /// Of what the output projection gives.
    pub(crate) post_norm: Option<NormWeights<B>>,
}

/// The MLP's weights in one layer, with what stands around it.
pub(crate) struct FeedForwardWeights<B: Backend> {
    /// None: that of attention, of the same input.
    pub(crate) norm: Option<NormWeights<B>>,
    pub(crate) kind: FeedForwardKind<B>,
    /// Of what it gives.
    pub(crate) post_norm: Option<NormWeights<B>>,
}

/// What stands where the MLP stands.
pub(crate) enum FeedForwardKind<B: Backend> {
    Dense(MlpWeights<B>),
    Experts(ExpertsWeights<B>),
}

/// `down(activation(gate(x)) * up(x))`, or, without a gate, `down(activation(up(x)))`.
pub(crate) struct MlpWeights<B: Backend> {
    pub(crate) gate: Option<Linear<B>>,
    pub(crate) up: Linear<B>,
    pub(crate) down: Linear<B>,
}

/// A mixture of experts.
pub(crate) struct ExpertsWeights<B: Backend> {
    /// `[num_experts, hidden_size]`, dense.
    pub(crate) router: B::Matrix,
    pub(crate) experts: Vec<MlpWeights<B>>,
    pub(crate) shared: Option<SharedExpert<B>>,
}

/// An expert that computes every token.
pub(crate) struct SharedExpert<B: Backend> {
    pub(crate) mlp: MlpWeights<B>,
    /// `[1, hidden_size]`, dense: the expert is multiplied with the sigmoid of its product.
    pub(crate) gate: B::Matrix,
}

/// The head, as it is asked for logits.
pub(crate) struct HeadWeights<'a, B: Backend> {
    pub(crate) norm: &'a NormWeights<B>,
    pub(crate) weight: &'a B::Matrix,
    pub(crate) bias: Option<&'a B::Vector>,
}

/// Carries out the decoder's operations over its own buffers. Between operations it holds the residual stream
/// (`[num_rows, hidden_size]`) and the step's queries and attended values.
pub(crate) trait Backend: Send + Sized + 'static {
    /// A weight matrix as this backend computes with it.
    type Matrix: Send + Sync;
    /// A norm's weight or a bias.
    type Vector;
    /// See [`Self::adapter_import`].
    type AdapterImport: Send + Sync + 'static;
    /// Whether rotated elements always come as halves (`RopeStyle::Neox`): query and key rows that the file stores in pairs
    /// are then handed over in that order, and the configuration's style is not asked for.
    const ROTATES_HALVES: bool;

    // --- what it is ---

    /// For people: "cpu (avx2)".
    fn device(&self) -> String;
    /// Threads that compute.
    fn threads(&self) -> usize;
    /// See [`crate::StepModel::spread`].
    fn spread(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..num_tasks).for_each(task);
    }

    // --- loading ---

    /// Takes a matrix over from the file.
    fn import_matrix(&self, tensor: &TensorView<'_>) -> Result<Self::Matrix, ModelError>;
    /// As [`Self::import_matrix`], for matrices so small and so sensitive that they stay dense f32, whatever the file has and
    /// whatever is asked for (a router's).
    fn import_dense_matrix(&self, tensor: &TensorView<'_>) -> Result<Self::Matrix, ModelError>;
    /// Takes a vector over.
    fn import_vector(&self, values: Vec<f32>) -> Result<Self::Vector, ModelError>;
    /// Memory held by a matrix.
    fn matrix_bytes(matrix: &Self::Matrix) -> usize;
    /// Elements of a matrix.
    fn num_parameters(matrix: &Self::Matrix) -> usize;
    /// Whether its products are integer ones.
    fn is_quantized(matrix: &Self::Matrix) -> bool;
    /// Memory held by a vector.
    fn vector_bytes(vector: &Self::Vector) -> usize;
    /// How a matrix is held.
    fn base_form(matrix: &Self::Matrix) -> BaseForm;
    /// What takes adapters over, on other threads.
    fn adapter_import(&self) -> Self::AdapterImport;
    /// Takes an adapter's product over, which will stand beside a matrix of this form.
    fn import_low_rank(
        import: &Self::AdapterImport,
        low_rank: LowRank,
        base: BaseForm,
    ) -> Result<LowRankWeights<Self>, ModelError>;
    /// Replaces the cache by an empty one of `num_blocks` blocks.
    fn allocate_kv(&mut self, num_blocks: usize) -> Result<(), ModelError>;

    // --- between steps ---

    /// Copies a block in every layer.
    fn copy_block(&mut self, source: u32, target: u32) -> Result<(), ModelError>;

    // --- a step, in this order ---

    /// Residual stream = embedding rows of the step's tokens, scaled.
    fn embed(&mut self, table: &Self::Matrix, step: Step<'_, Self>) -> Result<(), ModelError>;
    /// Norm, queries, keys and values, norms of heads, rotary embedding; keys and values go to their pages.
    fn attention_inputs(
        &mut self,
        layer: Layer<'_>,
        weights: &AttentionWeights<Self>,
        step: Step<'_, Self>,
    ) -> Result<(), ModelError>;
    /// Attention of the queries over their sequences' pages.
    fn attention(&mut self, layer: Layer<'_>, step: Step<'_, Self>) -> Result<(), ModelError>;
    /// Residual stream += [norm of] output projection of the attended values.
    fn attention_output(
        &mut self,
        layer: Layer<'_>,
        weights: &AttentionWeights<Self>,
        step: Step<'_, Self>,
    ) -> Result<(), ModelError>;
    /// Residual stream += [norm of] MLP or experts of norm(residual stream). In blocks whose branches are parallel this
    /// comes before `attention_output`, and so sees the same residual stream as attention did.
    fn feed_forward(
        &mut self,
        layer: Layer<'_>,
        norm: &NormWeights<Self>,
        weights: &FeedForwardWeights<Self>,
        step: Step<'_, Self>,
    ) -> Result<(), ModelError>;
    /// Leaves out all rows of the residual stream and the queries but these, which ascend: from now on they are the step's.
    /// Once a step at most, after the last layer's `attention_inputs` or after its end.
    fn keep_rows(&mut self, rows: &[u32]) -> Result<(), ModelError>;
    /// Whether every row must go through the last layer, although nobody asks for its logits.
    fn needs_every_row(&self) -> bool {
        false
    }

    // --- after a step, any number of times ---

    /// Logits of some of the step's last rows: head(norm(row)), scaled and capped. `out: [rows.len(), vocab_size]`; the adapters'
    /// runs count from the first of these rows.
    fn head(
        &mut self,
        rows: Range<usize>,
        weights: &HeadWeights<'_, Self>,
        adapters: Adapters<'_, Self>,
        out: &mut [f32],
    ) -> Result<(), ModelError>;
}
