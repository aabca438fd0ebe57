//! AVX2, FMA and F16C: sixteen lanes are two registers, a quantised tile has eight rows.

mod lanes;
mod quant;

use lanes::Lanes256;
use quant::Rows8;

use super::dispatch::Kernels;
use super::generic::{kernel_table, quant_table};
use super::scalar;

kernel_table!(LANES, Lanes256, "avx2,fma,f16c", block: 1, wide_block: 4, rest: scalar::TABLE);
quant_table!(TABLE, Rows8, "avx2,fma,f16c", columns: 4, rest: LANES);

pub(super) static KERNELS: Kernels = TABLE;
