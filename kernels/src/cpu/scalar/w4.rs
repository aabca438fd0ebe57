//! W4 product.
//!
//! One f32 accumulator an output walks the groups in ascending order. Within a group the integer sum is exact; the two
//! scales are multiplied first, then one fused multiply-add takes the group in, and one more its minimum.

use crate::cpu::task::QuantTask;
use crate::pack::{GROUP, PackedW4};

/// # Safety
/// Safe in fact; unsafe to fit the table.
pub(super) unsafe fn multiply(task: &QuantTask<'_, PackedW4>) {
    let frame = &task.weights.frame;
    for tile in task.tiles.clone() {
        for row in tile * frame.tile_rows..((tile + 1) * frame.tile_rows).min(frame.rows) {
            for m in task.m.clone() {
                let mut sum = 0.0_f32;
                for group in 0..frame.groups() {
                    let x = &task.x.rows[m * task.x.groups + group];
                    let dot: i32 = (0..GROUP)
                        .map(|i| {
                            let code = i32::from(task.weights.code(row, group * GROUP + i));
                            code * i32::from(x.codes[i])
                        })
                        .sum();
                    let scale = frame.scale(row, group) * x.scale;
                    sum = match frame.min(row, group) {
                        // (code - 8) * x, summed: the centre of the codes is 8.
                        None => ((dot - 8 * x.sum) as f32).mul_add(scale, sum),
                        Some(min) => min.mul_add(x.scaled_sum, (dot as f32).mul_add(scale, sum)),
                    };
                }
                // SAFETY: the task owns its tiles' rows.
                unsafe { task.out.store(m, row, &[sum]) };
            }
        }
    }
}
