//! What weight reading promises: right files are read exactly, wrong ones give an error that names what is wrong.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(clippy::needless_pass_by_value, reason = "json!() in place reads better without references")]

mod builder;
mod config;
mod config_goldens;
mod fuzz;
mod gguf;
mod import;
mod mutations;
mod places;
mod real_model;
mod safetensors_files;
