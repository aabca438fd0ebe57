//! NEON, with and without the dot products of ARMv8.2 (dotprod) and the matrix products of ARMv8.6 (i8mm): sixteen lanes
//! are four registers, a quantised tile has eight rows in two.

mod lanes;
mod quant;

use lanes::LanesNeon;
use quant::{Rows8, Rows8Dot, Rows8Matrix};

use super::dispatch::Kernels;
use super::generic::quant::multiply;
use super::generic::{kernel_table, quant_table};
use super::scalar;

kernel_table!(LANES, LanesNeon, "neon", block: 1, wide_block: 4, queries: 4, rest: scalar::TABLE);
quant_table!(TABLE, Rows8, "neon", columns: 4, product: multiply, rest: LANES);
quant_table!(TABLE_DOT, Rows8Dot, "neon,dotprod", columns: 6, product: multiply, rest: LANES);
quant_table!(TABLE_I8MM, Rows8Matrix, "neon,dotprod,i8mm", columns: 8, product: multiply, rest: LANES);

pub(super) static KERNELS: Kernels = TABLE;
pub(super) static KERNELS_DOT: Kernels = TABLE_DOT;
pub(super) static KERNELS_I8MM: Kernels = TABLE_I8MM;
