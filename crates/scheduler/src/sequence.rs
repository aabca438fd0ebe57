//! One sequence: tokens it KNOWS (prompt, then what was sampled) and tokens it has COMPUTED (in the cache).
//!
//! There is no prefill and no decode here. A sequence runs until computed has caught up with known; then a token is
//! sampled, and it is one behind again. Preemption sets computed to zero and forgets nothing;
//! so does a caller whose keys have become stale ([`crate::Scheduler::recompute`]). It must not know who
//! else exists. Its invariant: between steps its blocks cover its computed tokens exactly.

use std::sync::Arc;

use crate::{
    ids::{AdapterId, BlockId, SeqId, TokenId},
    order::{OrderKey, PendingSample, Turn},
};

/// Where a sequence stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Never scheduled; holds nothing.
    Waiting,
    /// May be scheduled in any step; holds blocks for its computed tokens.
    Running,
    /// Gave its blocks back; holds nothing; waits to be computed again.
    Preempted,
}

#[derive(Debug)]
pub(crate) struct Sequence {
    /// Changes only when a sample inherits the prompt of an aborted one.
    pub(crate) id: SeqId,
    /// Index of its request.
    pub(crate) request: u32,
    pub(crate) key: OrderKey,
    pub(crate) state: State,
    /// Shared by the samples of a request.
    pub(crate) prompt: Arc<Vec<TokenId>>,
    pub(crate) generated: Vec<TokenId>,
    pub(crate) max_new_tokens: usize,
    pub(crate) adapter: Option<AdapterId>,
    pub(crate) blocks: Vec<BlockId>,
    pub(crate) num_computed_tokens: usize,
    /// Tokens of the step being planned or in flight.
    pub(crate) num_scheduled_tokens: usize,
    /// Prompt positions below this need no logits (any more).
    pub(crate) num_prompt_logits_emitted: usize,
    /// Samples that begin when the prompt is computed, in order.
    pub(crate) pending_samples: Vec<PendingSample>,
    /// The caller cannot sample for it yet; see [`crate::Scheduler::hold`].
    pub(crate) is_held: bool,
    /// Whether any plan has named it yet.
    pub(crate) was_scheduled: bool,
    /// Requests that started ahead of it while it was the first that blocks could not hold.
    pub(crate) num_times_overtaken: u32,
}

impl Sequence {
    pub(crate) fn num_known_tokens(&self) -> usize {
        self.prompt.len() + self.generated.len()
    }

    pub(crate) fn num_uncomputed_tokens(&self) -> usize {
        self.num_known_tokens() - self.num_computed_tokens
    }

    /// What a step may compute of it: a held one stops short of the token that it would be sampled after.
    pub(crate) fn num_wanted_tokens(&self) -> usize {
        self.num_uncomputed_tokens() - usize::from(self.is_held)
    }

    /// The step in flight computes the last token it knows.
    pub(crate) fn catches_up(&self) -> bool {
        self.num_scheduled_tokens > 0 && self.num_scheduled_tokens == self.num_uncomputed_tokens()
    }

    /// All that it knows is computed: between a commit's books and its tokens.
    pub(crate) fn awaits_token(&self) -> bool {
        self.state == State::Running && self.num_uncomputed_tokens() == 0
    }

    /// Its prompt's logits are all it is for.
    pub(crate) fn is_score_only(&self) -> bool {
        self.max_new_tokens == 0
    }

    /// Its own id and those of the samples that wait for its prompt.
    pub(crate) fn samples(&self) -> impl Iterator<Item = SeqId> {
        std::iter::once(self.id).chain(self.pending_samples.iter().map(|pending| pending.id))
    }

    pub(crate) fn turn(&self) -> Turn {
        match self.state {
            State::Waiting => Turn::First,
            State::Running | State::Preempted => Turn::Again,
        }
    }

    /// Appends its known tokens in `start..end` to `tokens`.
    pub(crate) fn extend_with_known(&self, start: usize, end: usize, tokens: &mut Vec<TokenId>) {
        let num_prompt_tokens = self.prompt.len();
        tokens.extend_from_slice(&self.prompt[start.min(num_prompt_tokens)..end.min(num_prompt_tokens)]);
        tokens.extend_from_slice(
            &self.generated[start.saturating_sub(num_prompt_tokens)..end.saturating_sub(num_prompt_tokens)],
        );
    }
}
