//! Who goes first: the one place that compares sequences.
//!
//! Keys are values, compared field by field; a new rule is a new field. Keys are unique: no two sequences are equal.

use crate::ids::SeqId;

/// The order in which sequences get seats, tokens and blocks: the smallest first. Whoever must give way is the
/// largest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OrderKey {
    /// Lower runs first.
    pub priority: i32,
    /// When its turn would have been on its tenant's share of the machine; see `fair`.
    pub turn: u64,
    /// Counts requests as they are added.
    pub arrival: u64,
    /// Which of the request's samples.
    pub sample: u32,
}

/// Within a priority, those that lost their blocks go ahead of those that never had any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Turn {
    /// Ran before and gave way.
    Again,
    /// Never ran.
    First,
}

/// The order of the waiting queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct WaitingKey {
    pub(crate) priority: i32,
    pub(crate) turn: Turn,
    pub(crate) fair_turn: u64,
    pub(crate) arrival: u64,
    pub(crate) sample: u32,
}

impl WaitingKey {
    pub(crate) fn new(key: OrderKey, turn: Turn) -> Self {
        Self { priority: key.priority, turn, fair_turn: key.turn, arrival: key.arrival, sample: key.sample }
    }
}

/// A sample that has not begun: it waits for the prompt that a sibling computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PendingSample {
    pub(crate) id: SeqId,
    pub(crate) sample: u32,
}
