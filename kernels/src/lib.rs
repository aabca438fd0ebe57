//! Bindery's compute kernels: slices in, slices out.
//!
//! This crate exists so that the hot arithmetic can be tested and timed alone. It must not know models, requests,
//! clocks or any tensor library: whoever calls it brings plain buffers and shapes.
//!
//! Invariant: **a row's result does not depend on its neighbours**. For one instruction set, an output row has the
//! same bits alone, in any batch, in any chunking and with any number of threads. How it is kept:
//!
//! - matrix products split weight rows over threads, the inner dimension never; every output has ONE f32 accumulator
//!   that walks the inner dimension (dense) or its groups of 32 (quantised) in ascending order;
//! - attention walks keys in tiles and spans that start at multiples of fixed counts of absolute positions;
//! - every other sum over a row has 16 lanes and one fixed tree that joins them.
//!
//! Because all instruction sets follow the same order with the same fused multiply-adds, they agree bit for bit too;
//! the tests hold them to that, with the scalar twin as the specification.
//!
//! # Map
//!
//! | path | what |
//! |---|---|
//! | `memory.rs` | zeroed, lazily mapped, page-aligned buffers; failure is an error |
//! | `pack.rs`, `matrix.rs` | weight families and their interleaved layouts |
//! | `kv.rs` | the paged key/value cache |
//! | `cpu/mod.rs` and its siblings | the safe operations: check shapes, split work, call the table |
//! | `cpu/dispatch.rs` | the only place that asks the CPU what it can do; the table of function pointers |
//! | `cpu/pool.rs` | the worker pool |
//! | `cpu/scalar/` | the specification, written to be read |
//! | `cpu/generic/` | each fast algorithm once, over the traits `Lanes` and `QuantLanes` |
//! | `cpu/avx2/`, `cpu/avx512/` | those traits in intrinsics, and the table entries made from them |
//!
//! # Layouts
//!
//! Weights are interleaved so that one activation, broadcast, meets a whole vector of rows. `R` is the rows of a tile:
//! 8 for the 256-bit sets and the scalar twin, 16 for the 512-bit ones; the last tile is padded with zero rows.
//!
//! ```text
//! W4 codes   [tiles, groups, 4, R, 4] bytes    byte (j, r, b) of a group: code[row r][8 j + b]          low nibble
//!                                                                         code[row r][8 j + 4 + b]      high nibble
//!            so one load of 4 R bytes unpacks (and, shift) into two vectors of R rows x 4 consecutive inputs
//! W8 codes   [tiles, groups, 8, R, 4] bytes    byte (t, r, b): code[row r][4 t + b]
//! scales     [tiles, groups, R] f16            minimums likewise, where the family has them
//! dense      [tiles, cols, 16] elements        element (k, r): weight[row r][k]
//! keys       [layers, blocks, kv_heads, head_dim, block_size]    a vector holds one component of 16 keys
//! values     [layers, blocks, kv_heads, block_size, head_dim]    a vector holds 16 components of one value
//! ```
//!
//! # Instruction sets
//!
//! | name (`BINDERY_ISA`) | needs | state |
//! |---|---|---|
//! | `scalar` | nothing | the specification; runs everywhere |
//! | `avx2` | AVX2, FMA, F16C | run and held against `scalar` |
//! | `avx512` | the above and AVX-512 F, BW, VL, DQ | run and held against `scalar` |
//! | `avx512vnni` | the above and AVX-512 VNNI | run and held against `scalar` |
//! | `neon` | | named, not written yet: refused with an error |
//!
//! A name means exactly that set. Without the variable the best set of the machine is taken. The three x86 sets have run
//! on one machine (AMD, Zen 5); the property tests skip aloud what a machine lacks.
#![expect(
    unsafe_code,
    reason = "intrinsics, buffers shared by threads and memory maps; each block names the check that discharges it"
)]

mod cpu;
mod error;
mod kv;
mod matrix;
mod memory;
mod pack;

pub use cpu::activations::Activations;
pub use cpu::attention::{AttentionArgs, AttentionSequence};
pub use cpu::dispatch::{ISA_VARIABLE, Isa};
pub use cpu::logits::TopEntry;
pub use cpu::rope::{RopeArgs, RopeStyle};
pub use cpu::{Cpu, MAX_THREADS};
pub use error::KernelError;
pub use kv::{KvCache, KvDtype, KvShape};
pub use matrix::{Dense, DenseBf16, DenseElement, DenseF16, DenseF32, Matrix};
pub use pack::{GROUP, PackedW4, PackedW8, RowW4, RowW8};
