//! What adapter reading promises: right files are read exactly, wrong ones give an error that names what is wrong.
//!
//! The adapters under tests/adapters are peft's (tests/golden/adapters.py made them); broken ones are made here from those.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(clippy::needless_pass_by_value, reason = "json!() in place reads better without references")]

#[path = "../weights/builder.rs"]
#[allow(dead_code, reason = "shared with the tests of weights; each uses its part")]
mod builder;
mod folder;
mod fuzz;
mod gguf;
mod goldens;
#[path = "../weights/mutations.rs"]
mod mutations;
mod refusals;
