//! Wire types of the APIs Bindery speaks: what a client writes and reads, field by field.
//!
//! serde only: a type here knows its JSON and nothing else: no defaults of the server, no ranges, no tokenizer. A value
//! that has the wrong JSON type is an error of the field it stands in; a value out of range is the server's to refuse,
//! because only the server knows the range. Numbers are therefore read wide (`i64`, `f64`).
//!
//! Invariant: `null` means absent wherever a field is optional (SDKs send it), a struct is read from an object only
//! (never from an array of its fields), and nothing unknown is an error: who wants to name unknown fields wraps the
//! deserializer (`serde_ignored`).
//!
//! Reading order: [`openai`], then [`json`], the helpers behind it.
#![forbid(unsafe_code)]

pub mod json;
pub mod openai;
