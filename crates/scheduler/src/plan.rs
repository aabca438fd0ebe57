//! The step plan: plain data that says all the next layer needs. A plan can be printed, compared, saved and replayed.
//! It must not need the scheduler to be understood.
//!
//! Ranges index the plan's own flat vectors, so that a plan is refilled without allocating once its vectors have grown.

use std::ops::Range;

use crate::ids::{AdapterId, BlockId, SeqId, SlotId, TokenId};

/// What one step computes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Tokens to compute, all sequences concatenated.
    pub tokens: Vec<TokenId>,
    /// Position of each token in its sequence.
    pub positions: Vec<u32>,
    /// Where each token's keys and values are written.
    pub slots: Vec<SlotId>,
    /// Block tables of the scheduled sequences, concatenated; each covers every token known to the cache after this step.
    pub block_tables: Vec<BlockId>,
    /// The sequences that run: those with one token in this step before those with several, each part in the
    /// scheduler's order.
    pub sequences: Vec<ScheduledSequence>,
    /// Sequences that take a sampled token from a row of this step; see [`ScheduledSequence::samples`].
    pub samples: Vec<SeqId>,
    /// Blocks whose content must be copied before anything is written (copy-on-write of parallel samples). No block is
    /// the target of two copies, nor source of one and target of another: they may run in any order or at once.
    pub copies: Vec<BlockCopy>,
    /// Sequences that gave their blocks back while this plan was made. They wait and are recomputed later; nothing
    /// that was sampled for them is lost.
    pub preempted: Vec<SeqId>,
    /// Requests that run for the first time, each by the sample that carries its prompt.
    pub first_scheduled: Vec<SeqId>,
}

/// One sequence's part of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScheduledSequence {
    /// The sequence whose tokens are computed.
    pub id: SeqId,
    /// Its tokens in [`StepPlan::tokens`], `positions` and `slots`.
    pub tokens: Range<usize>,
    /// Its blocks in [`StepPlan::block_tables`].
    pub block_table: Range<usize>,
    /// Tokens in the cache before this step; the first scheduled token has this position.
    pub num_computed_tokens: usize,
    /// Tokens of its prompt.
    pub num_prompt_tokens: usize,
    /// Tokens it knows, of the prompt and sampled, whether this step gets to them or not.
    pub num_known_tokens: usize,
    /// The adapter its rows go through.
    pub adapter: Option<AdapterId>,
    /// Which of its rows need logits.
    pub logits: LogitsWanted,
    /// Who samples from its last row, in [`StepPlan::samples`]: empty for a chunk that does not end the known tokens
    /// and for a prompt that is only scored; itself; or, when a prompt with `n` samples ends, all `n` that are alive.
    pub samples: Range<usize>,
}

/// Which rows of a scheduled sequence need logits. Row `r` of a sequence is token `tokens.start + r` of the plan and
/// stands at position `num_computed_tokens + r`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsWanted {
    /// None: a prefill chunk in the middle of a prompt.
    None,
    /// The last row: a token is sampled from it.
    Last,
    /// Rows of the prompt: prompt log-probabilities were asked for. All rows from `first_row` to the last, and the
    /// last row is also sampled from where `samples` is not empty.
    ///
    /// Over the committed steps of a request these rows are every prompt position once, in ascending order, whatever
    /// was preempted in between: a prompt that is computed again starts at the first position that no committed step
    /// had, so `first_row` may be greater than 0. They belong to the request: where the sample that carries the
    /// prompt is aborted between plan and commit, they still count as emitted for its siblings.
    All {
        /// The first wanted row.
        first_row: usize,
    },
}

/// Copy one whole block of keys and values, in every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// Shared block to read.
    pub source: BlockId,
    /// Fresh block to write.
    pub target: BlockId,
}

impl StepPlan {
    /// Nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Tokens of the step.
    pub fn num_batched_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Empties the plan, keeping its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.block_tables.clear();
        self.sequences.clear();
        self.samples.clear();
        self.copies.clear();
        self.preempted.clear();
        self.first_scheduled.clear();
    }
}
