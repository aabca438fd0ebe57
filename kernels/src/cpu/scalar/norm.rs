//! RMS norm (Zhang and Sennrich 2019) and layer norm (Ba et al. 2016). Sums have sixteen lanes: element i goes to lane i
//! mod 16.

use super::{LANES, join_lanes};
use crate::cpu::rows::LayerNorm;

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

/// The variance is that of the differences from the mean, taken in a second pass: nothing cancels.
///
/// # Safety
/// Safe in fact; unsafe to fit the table.
pub(super) unsafe fn layer_norm(x: &[f32], norm: &LayerNorm<'_>, out: &mut [f32]) {
    let mut lanes = [0.0_f32; LANES];
    for (i, &x) in x.iter().enumerate() {
        lanes[i % LANES] += x;
    }
    let mean = join_lanes(lanes) / x.len() as f32;
    let mut lanes = [0.0_f32; LANES];
    for (i, &x) in x.iter().enumerate() {
        lanes[i % LANES] = (x - mean).mul_add(x - mean, lanes[i % LANES]);
    }
    let factor = 1.0 / (join_lanes(lanes) / x.len() as f32 + norm.eps).sqrt();
    for (((out, &x), &weight), &bias) in out.iter_mut().zip(x).zip(norm.weight).zip(norm.bias) {
        *out = ((x - mean) * factor).mul_add(weight, bias);
    }
}

/// `into += factor * x`, fused.
///
/// # Safety
/// Safe in fact; unsafe to fit the table.
pub(super) unsafe fn add_scaled(into: &mut [f32], x: &[f32], factor: f32) {
    for (into, &x) in into.iter_mut().zip(x) {
        *into = x.mul_add(factor, *into);
    }
}
