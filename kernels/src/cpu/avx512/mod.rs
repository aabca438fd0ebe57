//! AVX-512 (F, BW, VL, DQ), with and without VNNI: sixteen lanes are one register, a quantised tile has sixteen rows.

mod lanes;
mod quant;

use lanes::Lanes512;
use quant::Rows16;
pub(super) use quant::Rows16Vnni;

use super::dispatch::Kernels;
use super::generic::quant::multiply;
use super::generic::{kernel_table, quant_table};
use super::scalar;

kernel_table!(
    LANES, Lanes512, "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq", block: 4, wide_block: 8,
    queries: 6, rest: scalar::TABLE
);
quant_table!(TABLE, Rows16, "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq", columns: 8, product: multiply, rest: LANES);
quant_table!(
    TABLE_VNNI, Rows16Vnni, "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", columns: 12, product: multiply, rest: LANES
);

pub(super) static KERNELS: Kernels = TABLE;
pub(super) static KERNELS_VNNI: Kernels = TABLE_VNNI;
