//! Gated activation: silu(gate) * up with silu(x) = x / (1 + exp(-x)).

use super::exp::exp;
use super::quantize::quantize;
use crate::cpu::task::GatedTask;

/// # Safety
/// The task's outputs belong to it.
pub(super) unsafe fn gated(task: &GatedTask<'_>) {
    let mut joined = vec![0.0; task.cols.len()];
    for (index, row) in task.m.clone().enumerate() {
        let products = index * task.stride..index * task.stride + joined.len();
        for ((out, &gate), &up) in joined.iter_mut().zip(&task.gate[products.clone()]).zip(&task.up[products]) {
            *out = gate / (1.0 + exp(-gate)) * up;
        }
        if let Some(rows) = &task.out.rows {
            let start = row * task.out.cols + task.cols.start;
            // SAFETY: the caller's duty.
            unsafe { rows.slice(start..start + joined.len()) }.copy_from_slice(&joined);
        }
        if let Some(groups) = task.out.groups_of(row, task.cols.start / crate::quant_format::GROUP) {
            // SAFETY: the caller's duty.
            unsafe { quantize(&joined, &groups) };
        }
    }
}
