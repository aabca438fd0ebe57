//! AVX2, FMA and F16C, with and without AVX-VNNI: sixteen lanes are two registers, a quantised tile has eight rows.

mod lanes;
mod quant;

use lanes::Lanes256;
pub(super) use lanes::sum_i8;
use quant::{Rows8, Rows8Vnni};

use super::dispatch::Kernels;
use super::generic::quant::multiply;
use super::generic::{kernel_table, quant_table};
use super::scalar;

kernel_table!(LANES, Lanes256, "avx2,fma,f16c", block: 1, wide_block: 4, queries: 6, rest: scalar::TABLE);
quant_table!(TABLE, Rows8, "avx2,fma,f16c", columns: 4, product: multiply, rest: LANES);
quant_table!(TABLE_VNNI, Rows8Vnni, "avx2,fma,f16c,avxvnni", columns: 4, product: multiply, rest: LANES);

pub(super) static KERNELS: Kernels = TABLE;
pub(super) static KERNELS_VNNI: Kernels = TABLE_VNNI;
