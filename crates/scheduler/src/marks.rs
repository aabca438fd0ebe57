//! Counters of rare decisions: each rare branch marks itself here, so that a test can prove it was taken and an
//! operator can see how often it is. Plain numbers in the scheduler's own state: no global, nothing to reset.

/// How often each rare branch was taken since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// A sequence gave its blocks back for an older or more important one.
    pub preempted: u64,
    /// A sequence gave its blocks back so that a waiting one of a better priority could start.
    pub preempted_for_admission: u64,
    /// The newest sequence kept its blocks but found none to grow into, and sat a step out.
    pub paused_for_blocks: u64,
    /// A prompt chunk was cut to the blocks at hand.
    pub chunk_cut_to_blocks: u64,
    /// A shared block was copied before a write.
    pub copied_on_write: u64,
    /// A request's carrier was aborted before its prompt was computed, and the next sample took the prompt over.
    pub prompt_inherited: u64,
    /// A prompt that free blocks could hold was kept waiting to leave running sequences room to grow.
    pub held_by_watermark: u64,
    /// A waiting request started ahead of one that its blocks could not hold yet.
    pub overtook: u64,
    /// Nobody may overtake any more: the blocked one has been overtaken often enough.
    pub overtaking_ended: u64,
    /// A short prompt ended in the half of the budget that a long one left.
    pub ended_in_yielded_budget: u64,
    /// A running sequence of a worse priority lost its seat to a waiting one of a better priority.
    pub unseated: u64,
    /// The first in order was given a token that decodes would have taken.
    pub first_in_order_kept_a_token: u64,
    /// Rows of a prompt were not wanted again: they had been emitted before a preemption.
    pub prompt_rows_skipped: u64,
    /// A sequence was told to be computed again.
    pub recomputed: u64,
}
