//! WHO runs in the next step.
//!
//! A pure, deterministic state machine: no tensors, no async, no clock, no I/O, no logging. Time and facts come in
//! as arguments, plans go out as data; the same calls give the same plans. It must not know what a token means, what
//! a model is or who waits for an answer.
//!
//! Reading order: [`ids`] the vocabulary, [`plan`] what goes out, [`block_pool`] the sum that always holds, `sequence`
//! what is known and what is computed, [`order`] who goes first, `fair` whose turn it is, [`scheduler`] the decisions, `invariants` the
//! promises by name, [`simulate`] a seeded world around it all.

#![forbid(unsafe_code)]

pub mod block_pool;
mod fair;
pub mod ids;
mod invariants;
pub mod marks;
pub mod order;
pub mod plan;
pub mod scheduler;
mod sequence;
pub mod simulate;
mod slab;

pub use block_pool::BlockPool;
pub use fair::Share;
pub use ids::{AdapterId, BlockId, SeqId, SlotId, TenantId, TokenId};
pub use marks::Marks;
pub use order::OrderKey;
pub use plan::{BlockCopy, LogitsWanted, ScheduledSequence, StepPlan};
pub use scheduler::{Limits, Pace, Refusal, Sampled, Scheduler, SchedulerStats, SequenceSpec, StepLoad};
