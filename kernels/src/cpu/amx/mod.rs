//! AMX: the matrix unit of Intel's servers from Sapphire Rapids on, beside AVX-512 with VNNI.
//!
//! Only products of quantised weights with many rows of activations go there; all else is `avx512vnni`'s, whose layout of
//! weights is just what the unit wants.

mod quant;
mod tiles;

use quant::multiply;
pub(super) use tiles::may_use;

use super::avx512::{Rows16Vnni, TABLE_VNNI};
use super::dispatch::Kernels;
use super::generic::quant_table;
use super::task::QuantTask;
use crate::quant_format::GROUP;

quant_table!(
    TILES, Rows16Vnni, "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", columns: 12, product: multiply,
    rest: TABLE_VNNI
);

pub(super) static KERNELS: Kernels = Kernels { columns: tiles::TILE_ROWS, quantized, spin_int8, ..TILES };

/// The unit takes 16 rows at a time, however many of them there are, and as long as VNNI takes for twelve or thirteen.
///
/// # Safety
/// The table's duties.
unsafe fn quantized(task: &mut QuantTask<'_>) {
    let is_full = task.x.panels.panel_rows > TABLE_VNNI.columns;
    let kernel = if is_full { TILES.quantized } else { TABLE_VNNI.quantized };
    // SAFETY: the caller's duties; panels that go to VNNI have no more rows than its table has columns.
    unsafe { kernel(task) }
}

/// The unit's products as quantised groups use it: 32 inputs at a time, where 64 would take it as long.
///
/// # Safety
/// The table's duties.
unsafe fn spin_int8(rounds: usize) -> u64 {
    const MACS: usize = tiles::TILE_ROWS * 16 * GROUP;
    // SAFETY: the caller's duty is the same.
    unsafe {
        tiles::shape(GROUP);
        let products = tiles::spin(rounds);
        tiles::release();
        (products * MACS * 2) as u64
    }
}
