//! What a fetch promises, against a hub on loopback and a pip written by the test: the right bytes or a clear error,
//! and nothing broken left behind.
#![allow(clippy::unwrap_used, reason = "tests")]

mod adapters;
mod from_hub;
mod from_wheels;
mod support;
