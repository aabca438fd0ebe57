//! Anthropic's Messages API, also as Azure hosts it under `/anthropic`.
//!
//! `request` makes the body, `answer` reads whole answers and errors, `stream` reads events. Invariant: a stream ends with
//! `message_stop`, nothing else.

mod answer;
mod request;
mod stream;

pub(super) use answer::{counted, error};
pub(super) use request::chat;
pub(crate) use stream::Reader;

/// Of the API: the last one under which models that take sampling fields take them.
pub(super) const VERSION: &str = "2023-06-01";

/// How the answer's JSON was asked for, and so where it will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// As it comes; the provider promises JSON itself, or nobody asked for any.
    Text,
    /// The prompt asks for an object: to be checked.
    CheckedJson,
    /// As the input of a tool of this name, which the model has to call.
    ForcedTool(String),
}
