//! The built binary, as a user meets it: what it prints where, what it refuses, how it ends.
#![allow(clippy::unwrap_used, reason = "tests")]

mod adapters;
mod audit;
mod bench;
mod chat;
mod config;
mod costs;
mod fidelity;
mod gateway;
mod gateway_config;
mod inspect;
mod keys;
mod perplexity;
mod quantize;
mod route;
mod serving;
mod support;
mod usage;
