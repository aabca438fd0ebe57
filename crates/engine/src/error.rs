//! What can go wrong between a request and its tokens, by whose mistake it is.

use std::time::Duration;

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The caller's mistake: `param` is the wire field, the message names value and limit.
    #[error("{message}")]
    Invalid {
        /// Wire field.
        param: &'static str,
        /// Value, limit, next step.
        message: String,
    },
    /// Prompt (plus the tokens asked for) exceeds the context. Becomes OpenAI's `context_length_exceeded`.
    #[error("{message}")]
    ContextLengthExceeded {
        /// Wire field.
        param: &'static str,
        /// In OpenAI's words: maximum, and what was asked.
        message: String,
    },
    /// The waiting queue is full.
    #[error(
        "{num_queued} requests are waiting and {num_asked} more would exceed the limit of {max_queued}: try again later, or \
         raise --max-queued-requests"
    )]
    QueueFull {
        /// That were to be queued together.
        num_asked: usize,
        /// Waiting now.
        num_queued: usize,
        /// The bound.
        max_queued: usize,
        /// When it may be worth trying again.
        retry_after: Duration,
    },
    /// The engine is stopping.
    #[error("the server is shutting down: try another replica")]
    ShuttingDown,
    /// The reader did not take its tokens; its request was cancelled.
    #[error("the response was not read fast enough ({buffered} tokens buffered): cancelled")]
    SlowReader {
        /// Tokens that waited.
        buffered: usize,
    },
    /// A deadline given with the request passed.
    #[error("the request did not finish within {timeout_ms} ms (x-request-timeout): cancelled")]
    DeadlineExceeded {
        /// The deadline.
        timeout_ms: u64,
    },
    /// Our mistake: the step this request was in failed; other requests go on.
    #[error("this request's step failed inside the engine: {message}")]
    Step {
        /// For the log and the operator.
        message: String,
    },
    /// Tokenizer or template of the model is unusable.
    #[error("{0}")]
    Text(String),
    /// Weights.
    #[error(transparent)]
    Model(#[from] bindery_model::ModelError),
}
