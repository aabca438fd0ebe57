//! Quantised product.
//!
//! One f32 accumulator an output walks the groups of weights in ascending order. Within a group the integer sum is
//! exact, and so is the group's scale; it is multiplied with the activations' first, then one fused multiply-add takes
//! the group in, and one more its minimum.

use crate::cpu::task::{GroupCodes, QuantGroup, QuantTask};
use crate::quant_format::GROUP;

/// # Safety
/// Safe in fact; unsafe to fit the table.
pub(super) unsafe fn multiply(task: &mut QuantTask<'_>) {
    let w = task.weights;
    // Two groups of weights may share a group of activations.
    let parts = GROUP / w.group_len();
    for row in task.tiles.start * w.tile_rows..(task.tiles.end * w.tile_rows).min(w.rows) {
        for m in task.panels.clone().flat_map(|panel| task.x.panels.rows_of(panel)) {
            let mut sum = 0.0_f32;
            for group in 0..w.groups() {
                let QuantGroup { codes: GroupCodes(x_codes), scales: x } = task.x.group(m, group);
                let values = w.values(row, group);
                let parts_of_values = values.chunks(GROUP / parts).zip(x_codes.chunks(GROUP / parts));
                for (part, (values, x_codes)) in parts_of_values.enumerate() {
                    let index = group * parts + part;
                    let dot: i32 = values.iter().zip(x_codes).map(|(&w, &x)| i32::from(w) * i32::from(x)).sum();
                    sum = (dot as f32).mul_add(w.scale(row, index) * x.scale, sum);
                    if let Some(min) = w.min(row, index) {
                        let x_sum: i32 = x_codes.iter().map(|&x| i32::from(x)).sum();
                        sum = min.mul_add(x.scale * x_sum as f32, sum);
                    }
                }
            }
            // SAFETY: the task owns its tiles' rows.
            unsafe { task.out.store(m, row, &[sum]) };
        }
    }
}
