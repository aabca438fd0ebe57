//! Activations to int8: a group's scale is max|x| / 127, its codes are x * (127 / max|x|), rounded to nearest even.

use crate::cpu::task::{GroupScales, GroupsMut, QuantGroup};
use crate::quant_format::GROUP;

/// Groups whose largest magnitude is below this count as zero: 127 / max|x| must be a number, and nothing so small can
/// matter beside any weight.
pub(crate) const SMALLEST_MAGNITUDE: f32 = 1.0 / (1u128 << 100) as f32;

/// A group's scale, and the factor that brings its elements to codes: 0 where all codes are 0.
pub(crate) fn scale_and_factor(x: &[f32]) -> (f32, f32) {
    // Magnitudes compare as integers; so NaN counts as larger than infinity and is not lost.
    let magnitude = x.iter().map(|x| x.abs().to_bits()).max().map_or(0.0, f32::from_bits);
    if !magnitude.is_finite() {
        (f32::NAN, 0.0)
    } else if magnitude < SMALLEST_MAGNITUDE {
        (0.0, 0.0)
    } else {
        (magnitude / 127.0, 127.0 / magnitude)
    }
}

/// An element's code.
pub(crate) fn code(x: f32, factor: f32) -> i8 {
    if factor == 0.0 { 0 } else { (x * factor).round_ties_even() as i8 }
}

/// # Safety
/// The row that `out` names belongs to the calling task.
pub(super) unsafe fn quantize(x: &[f32], out: &GroupsMut<'_>) {
    for (index, x) in x.chunks_exact(GROUP).enumerate() {
        let mut group = QuantGroup::default();
        let (scale, factor) = scale_and_factor(x);
        let codes = &mut group.codes.0;
        for (target, &x) in codes.iter_mut().zip(x) {
            *target = code(x, factor);
        }
        let sum = codes.iter().map(|&code| i32::from(code)).sum();
        let first_sum = codes[..GROUP / 2].iter().map(|&code| i32::from(code)).sum();
        group.scales = GroupScales { scale, scaled_sum: scale * sum as f32, sum, first_sum };
        // SAFETY: the caller's row.
        unsafe { out.set(index, group) };
    }
}
