//! RMS norm (Zhang and Sennrich 2019). The sum of squares has sixteen lanes: element i goes to lane i mod 16.

use super::{LANES, join_lanes};

/// # Safety
/// Safe in fact; unsafe to fit the table.
pub(super) unsafe fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mut lanes = [0.0_f32; LANES];
    for (i, &x) in x.iter().enumerate() {
        lanes[i % LANES] = x.mul_add(x, lanes[i % LANES]);
    }
    let factor = 1.0 / (join_lanes(lanes) / x.len() as f32 + eps).sqrt();
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * factor * weight;
    }
}
