//! Sums and maxima over a row of logits. Sums have sixteen lanes: element i goes to lane i mod 16.

use super::exp::{exp, tanh};
use super::{LANES, join_lanes};

/// # Safety
/// Safe in fact; unsafe to fit the table.
pub(super) unsafe fn max(row: &[f32]) -> f32 {
    row.iter().fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max })
}

/// # Safety
/// Safe in fact; unsafe to fit the table.
pub(super) unsafe fn exp_sub_sum(row: &mut [f32], max: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    for (i, x) in row.iter_mut().enumerate() {
        *x = exp(*x - max);
        lanes[i % LANES] += *x;
    }
    join_lanes(lanes)
}

/// Writes cap * tanh(scale * x / cap) over x.
///
/// # Safety
/// Safe in fact; unsafe to fit the table.
pub(super) unsafe fn soft_cap(row: &mut [f32], scale: f32, cap: f32) {
    for x in row {
        *x = tanh(*x * scale / cap) * cap;
    }
}
