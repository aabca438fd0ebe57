//! The one door through which requests leave this machine.
//!
//! [`Door::send`] takes what [`crate::providers`] made, waits no longer than it may, tries again where that can help, and
//! hands back an answer or a stream of chunks. Knows no tenant, price or route. **Invariant**: nothing is sent without a
//! [`LeavesPremises`], which only a privacy class that allows it can make; and once a piece of an answer has been handed
//! on, nothing is tried again.
//!
//! Reading order: [`privacy`], [`Door`] (`door`), [`AnswerStream`] (`stream`), [`breaker`] and [`retry`] (both pure), `sse`,
//! [`Departure`] (`departure`).

pub mod breaker;
pub mod privacy;
pub mod retry;

mod departure;
mod door;
mod sse;
mod stream;

use std::time::Duration;

pub use breaker::{Breaker, BreakerLimits, BreakerState};
pub use departure::Departure;
pub use door::{Door, DoorError, Received, Renew, Renewed, Upstream};
pub use privacy::{LeavesPremises, PrivacyClass};
pub use retry::RetryLimits;
pub use stream::AnswerStream;

/// Every bound of a call.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// To open a connection; then the upstream counts as unreachable.
    pub connect: Duration,
    /// From the request to the head of the response; then the call has timed out.
    pub first_byte: Duration,
    /// Between two pieces of a body; then the call has timed out.
    pub idle: Duration,
    /// Of a whole answer, or of a stream in all; a longer one is an error.
    pub max_answer_bytes: usize,
    /// Of an error's body; what is longer is read no further, and its text is lost.
    pub max_error_bytes: usize,
    /// Of one event of a stream; a longer one is an error.
    pub max_event_bytes: usize,
    /// When to try again.
    pub retry: RetryLimits,
}

#[cfg(test)]
mod tests;
