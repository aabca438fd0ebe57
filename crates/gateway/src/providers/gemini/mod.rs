//! Google's generateContent, also on Vertex.
//!
//! `request` makes the body, `schema` knows which JSON schemas it takes, `answer` reads answers and errors (an event of a
//! stream has the shape of a whole answer). Invariant: a stream has no end mark but its last finish reasons, so it is
//! complete when every candidate has one and the connection ended in good order.

mod answer;
mod request;
mod schema;

pub(crate) use answer::Reader;
pub(super) use answer::{counted, error};
pub(super) use request::chat;

/// Where a signature of thoughts rides in a tool call, as Google's own OpenAI endpoint has it.
const EXTRA_CONTENT: &str = "extra_content";
