//! The built binary, as a user meets it: what it prints where, what it refuses, how it ends.
#![allow(clippy::unwrap_used, reason = "tests")]

mod adapters;
mod bench;
mod chat;
mod config;
mod fidelity;
mod inspect;
mod perplexity;
mod quantize;
mod serving;
mod support;
mod usage;
