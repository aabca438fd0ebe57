//! Dense product: one f32 accumulator an output walks the inputs in ascending order, fused multiply-adds only.

use crate::cpu::task::DenseTask;
use crate::matrix::{DENSE_TILE_ROWS, DenseElement};

/// # Safety
/// Safe in fact; unsafe to fit the table.
pub(super) unsafe fn multiply<E: DenseElement>(task: &DenseTask<'_, E>) {
    let w = task.weights;
    for row in task.tiles.start * DENSE_TILE_ROWS..(task.tiles.end * DENSE_TILE_ROWS).min(w.rows) {
        for m in task.m.clone() {
            let x = &task.x[m * w.cols..(m + 1) * w.cols];
            let sum = x.iter().enumerate().fold(0.0_f32, |sum, (col, &x)| x.mul_add(w.get(row, col).to_f32(), sum));
            // SAFETY: the task owns its tiles' rows.
            unsafe { task.out.store(m, row, &[sum]) };
        }
    }
}
