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
//! - a row adds the experts that a router chose for it in ascending order;
//! - every other sum over a row has 16 lanes and one fixed tree that joins them.
//!
//! Because all instruction sets follow the same order with the same fused multiply-adds, they agree bit for bit too;
//! the tests hold them to that, with the scalar twin as the specification.
//!
//! # Map
//!
//! | path | what |
//! |---|---|
//! | `memory` | zeroed buffers, the large ones mapped lazily; failure is an error |
//! | `quant_format.rs` | what a quantised weight is made of, and where its bits lie |
//! | `pack.rs`, `matrix.rs` | quantised and dense weights and their interleaved layouts |
//! | `order.rs` | the order in which a matrix reads its inputs |
//! | `kv.rs` | the paged key/value cache |
//! | `cpu/mod.rs` and its siblings | the safe operations: check shapes, split work, call the table |
//! | `cpu/dispatch.rs` | the only place that asks the CPU what it can do; the table of function pointers |
//! | `cpu/pool.rs` | the worker pool |
//! | `cpu/scalar/` | the specification, written to be read |
//! | `cpu/generic/` | each fast algorithm once, over the traits `Lanes` and `QuantLanes` |
//! | `cpu/avx2/`, `cpu/avx512/`, `cpu/neon/` | those traits in intrinsics, and the table entries made from them |
//! | `cpu/amx/` | products of many rows in the matrix unit |
//!
//! # Layouts
//!
//! Weights are interleaved so that one activation, broadcast, meets a whole vector of rows. `R` is the rows of a tile:
//! 8 for the 128- and 256-bit sets and the scalar twin, 16 for the 512-bit ones; the last tile is padded with zero rows.
//!
//! ```text
//! codes      [tiles, groups of 32, B, R, 4] bytes    B vectors of 4 R bytes for codes of B bits
//! scales     [tiles, groups, R] f16                  minimums likewise, where the format has them
//!            or, in two levels, [tiles, groups of 256, R] f16 and [tiles, groups of 32 or 16, R] int8; likewise the
//!            minimums', which share a byte with the scales where both are of four bits
//!            or, in spans, [tiles, spans, R] f16, with as many int8 zero points
//!            or of two levels the upper one alone, or the lower one alone as bytes of exponents
//! dense      [tiles, cols, 16] elements              element (k, r): weight[row r][k]
//! int8 rows  [panels, groups, rows of the panel]     twice: 32 codes, and apart from them a scale and sums
//! cache      [blocks, layers, 2, kv_heads] pages     of keys, then of values
//! keys       a page: [head_dim, block_size]          a vector holds one component of 16 keys
//! values     a page: [block_size, head_dim]          a vector holds 16 components of one value
//!            in int8 with a page's scales behind either: [groups of 32 components, block_size] bf16
//! ```
//!
//! The rows of a panel meet a weight tile together. A block of the cache holds all layers of its tokens.
//!
//! A group of 32 codes of a row is eight quads, codes 4 q to 4 q + 3; byte (r, b) of a vector holds bits of code b of a
//! quad of row r. Which quads' bits, from the lowest (0 to 7 are whole codes; 6.0 is the lowest bit of a code of quad 6):
//!
//! ```text
//! 8 bits    vector q: quad q
//! 4 bits    vector v: quad 2 v, quad 2 v + 1
//! 2 bits    vector v: quads 4 v to 4 v + 3
//! 6 bits    vectors 0 to 2: quad 0, 3.4 3.5 | quad 1, 3.2 3.3 | quad 2, 3.0 3.1;  3 to 5 likewise: quads 4 to 7
//! 5 bits    vectors 0 to 4: quad 0, 5.0 5.1 5.2 | quad 1, 7.3, 5.3 5.4 | quad 2, 6.0 6.1 6.2 | quad 3, 7.4, 6.3 6.4 |
//!           quad 4, 7.0 7.1 7.2
//! 3 bits    vectors 0 to 2: quads 0 and 1, 6.0 6.1 | quads 2 and 3, 7.0 7.1 | quads 4 and 5, 6.2, 7.2
//! ```
//!
//! So most quads cost a load and a mask, or a shift more, to have R rows by 4 consecutive inputs as the four-way products
//! want them; the few that are scattered pay for it. Codes with a book lie in the same way; what they stand for, -127 to
//! 127, is looked up by a shuffle of 16 bytes as they are cut out. Codes of fewer than 8 bits are kept unsigned: what lies
//! around zero has half the range added, and the kernels take that off again by the activations' sum.
//!
//! # Instruction sets
//!
//! | name (`BINDERY_ISA`) | needs | state |
//! |---|---|---|
//! | `scalar` | nothing | the specification; runs everywhere |
//! | `avx2` | AVX2, FMA, F16C | run and held against `scalar` |
//! | `avxvnni` | the above and AVX-VNNI | run and held against `scalar` |
//! | `avx512` | `avx2`'s and AVX-512 F, BW, VL, DQ | run and held against `scalar` |
//! | `avx512vnni` | the above and AVX-512 VNNI | run and held against `scalar` |
//! | `amx` | the above, AMX-TILE and AMX-INT8, and leave from Linux to use them | run and held against `scalar` |
//! | `neon` | NEON | run under emulation and held against `scalar` |
//! | `neondot` | the above and dotprod (ARMv8.2) | run under emulation and held against `scalar` |
//! | `neoni8mm` | the above and i8mm (ARMv8.6) | run under emulation and held against `scalar` |
//!
//! A name means exactly that set. Without the variable the best set of the machine is taken. The x86 sets have run on an
//! AMD (Zen 5; all but `amx`) and on Intel processors (Emerald Rapids, all but `avxvnni` and `amx`; Granite Rapids, all); the
//! ARM sets under qemu alone, so nothing is known of their speed. The property tests skip aloud what a machine lacks.
#![expect(
    unsafe_code,
    reason = "intrinsics, buffers shared by threads and memory maps; each block names the check that discharges it"
)]

mod cpu;
mod error;
mod kv;
mod matrix;
mod memory;
mod order;
mod pack;
mod quant_format;

pub use cpu::activations::{Activations, Form};
pub use cpu::attention::{AttentionArgs, AttentionSequence, SparseBlocks};
pub use cpu::dispatch::{ISA_VARIABLE, Isa};
pub use cpu::experts::{ExpertWeights, Mixture, RoutingArgs, Shares};
pub use cpu::gated::{Activation, GatedProduct, Projection};
pub use cpu::low_rank::{Addends, LowRank, LowRankPair, LowRankSegment};
pub use cpu::matmul::Product;
pub use cpu::peak::ReadTarget;
pub use cpu::rope::{RopeArgs, RopeStyle};
pub use cpu::rows::{LayerNorm, Norm};
pub use cpu::{Cpu, MAX_THREADS};
pub use error::KernelError;
pub use kv::{KvCache, KvDtype, KvShape};
pub use matrix::{Dense, DenseBf16, DenseElement, DenseF16, DenseF32, Matrix};
pub use memory::{give_back_freed, make_room, pack_together, pack_together_within};
pub use order::InputOrder;
pub use pack::{QuantRow, Quantized};
pub use quant_format::{CodeBits, CodeBook, GROUP, QuantFormat, SUPER_GROUP, Scaling};
