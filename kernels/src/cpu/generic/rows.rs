//! Row operations in lanes; each is its scalar twin, sixteen elements at a time.
//!
//! A tail is brought to sixteen with values that change nothing: zeroes for sums of squares, -inf for maxima.

use super::Lanes;
use super::exp::{exp, tanh};
use crate::cpu::rope::RopeStyle;
use crate::cpu::rows::LayerNorm;
use crate::cpu::scalar;
use crate::cpu::scalar::quantize::SMALLEST_MAGNITUDE;
use crate::cpu::scalar::rope::turn;
use crate::cpu::task::{GroupScales, GroupsMut, QuantGroup, RopeRow};
use crate::quant_format::GROUP;

pub(super) const WIDTH: usize = 16;

/// The row's last `len % 16` elements, the rest `fill`.
#[inline(always)]
fn tail(row: &[f32], fill: f32) -> [f32; WIDTH] {
    let mut tail = [fill; WIDTH];
    let rest = &row[row.len() / WIDTH * WIDTH..];
    tail[..rest.len()].copy_from_slice(rest);
    tail
}

/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(in crate::cpu) unsafe fn rms_norm<L: Lanes>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let whole = x.len() / WIDTH * WIDTH;
    assert!(weight.len() == x.len() && out.len() == x.len(), "row, weight and output differ in length");
    // SAFETY: every load and store lies below `whole <= len`, or in an array of 16.
    unsafe {
        let mut sum = L::splat(0.0);
        for i in (0..whole).step_by(WIDTH) {
            let x = L::load(x.as_ptr().add(i));
            sum = x.mul_add(x, sum);
        }
        if whole < x.len() {
            let x = L::load(tail(x, 0.0).as_ptr());
            sum = x.mul_add(x, sum);
        }
        let factor = 1.0 / (sum.join_add() / x.len() as f32 + eps).sqrt();
        let factors = L::splat(factor);
        for i in (0..whole).step_by(WIDTH) {
            let y = L::load(x.as_ptr().add(i)).mul(factors).mul(L::load(weight.as_ptr().add(i)));
            y.store(out.as_mut_ptr().add(i));
        }
        for i in whole..x.len() {
            out[i] = x[i] * factor * weight[i];
        }
    }
}

/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(in crate::cpu) unsafe fn layer_norm<L: Lanes>(x: &[f32], norm: &LayerNorm<'_>, out: &mut [f32]) {
    let LayerNorm { weight, bias, eps } = *norm;
    let (len, whole) = (x.len(), x.len() / WIDTH * WIDTH);
    assert!(weight.len() == len && bias.len() == len && out.len() == len, "row, weights and output differ in length");
    // SAFETY: every load and store lies below `whole <= len`, or in an array of 16.
    unsafe {
        let mut sum = L::splat(0.0);
        for i in (0..whole).step_by(WIDTH) {
            sum = sum.add(L::load(x.as_ptr().add(i)));
        }
        if whole < len {
            sum = sum.add(L::load(tail(x, 0.0).as_ptr()));
        }
        let mean = sum.join_add() / len as f32;
        let means = L::splat(mean);
        let mut sum = L::splat(0.0);
        for i in (0..whole).step_by(WIDTH) {
            let x = L::load(x.as_ptr().add(i)).sub(means);
            sum = x.mul_add(x, sum);
        }
        if whole < len {
            // What is filled up with differs from the mean by 0, or, where the mean is no number, makes all of it none, as
            // it is already.
            let x = L::load(tail(x, mean).as_ptr()).sub(means);
            sum = x.mul_add(x, sum);
        }
        let factor = 1.0 / (sum.join_add() / len as f32 + eps).sqrt();
        let factors = L::splat(factor);
        for i in (0..whole).step_by(WIDTH) {
            let x = L::load(x.as_ptr().add(i)).sub(means).mul(factors);
            x.mul_add(L::load(weight.as_ptr().add(i)), L::load(bias.as_ptr().add(i))).store(out.as_mut_ptr().add(i));
        }
        for i in whole..len {
            out[i] = ((x[i] - mean) * factor).mul_add(weight[i], bias[i]);
        }
    }
}

/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(in crate::cpu) unsafe fn add_scaled<L: Lanes>(into: &mut [f32], x: &[f32], factor: f32) {
    let whole = x.len() / WIDTH * WIDTH;
    assert_eq!(into.len(), x.len(), "rows differ in length");
    // SAFETY: every load and store lies below `whole <= len`.
    unsafe {
        let factors = L::splat(factor);
        for i in (0..whole).step_by(WIDTH) {
            let to = into.as_mut_ptr().add(i);
            L::load(x.as_ptr().add(i)).mul_add(factors, L::load(to)).store(to);
        }
    }
    for i in whole..x.len() {
        into[i] = x[i].mul_add(factor, into[i]);
    }
}

/// # Safety
/// As [`Lanes`]; the row that `out` names belongs to the calling task.
#[inline(always)]
pub(in crate::cpu) unsafe fn quantize<L: Lanes>(x: &[f32], out: &GroupsMut<'_>) {
    for (index, x) in x.chunks_exact(GROUP).enumerate() {
        // SAFETY: x has 32 elements; the row is the caller's.
        unsafe { out.set(index, group::<L>(L::load(x.as_ptr()), L::load(x.as_ptr().add(WIDTH)))) };
    }
}

/// A group in int8.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(super) unsafe fn group<L: Lanes>(first: L, second: L) -> QuantGroup {
    let mut group = QuantGroup::default();
    // SAFETY: the caller's duty; codes have room for 32.
    unsafe {
        let magnitude = first.abs().max_bits(second.abs()).join_max_bits();
        if magnitude.is_finite() && magnitude >= SMALLEST_MAGNITUDE {
            let factor = L::splat(127.0 / magnitude);
            let codes = group.codes.0.as_mut_ptr();
            first.mul(factor).store_i8(codes);
            second.mul(factor).store_i8(codes.add(WIDTH));
            let first_sum = L::sum_i8(codes);
            let sum = first_sum + L::sum_i8(codes.add(WIDTH));
            let scale = magnitude / 127.0;
            group.scales = GroupScales { scale, scaled_sum: scale * sum as f32, sum, first_sum };
        } else {
            group.scales.scale = if magnitude.is_finite() { 0.0 } else { f32::NAN };
            group.scales.scaled_sum = group.scales.scale * 0.0;
        }
    }
    group
}

/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(in crate::cpu) unsafe fn rope<L: Lanes>(row: &mut RopeRow<'_>) {
    let pairs = row.cos.len();
    let whole = if row.style == RopeStyle::Neox { pairs / WIDTH * WIDTH } else { 0 };
    assert!(row.sin.len() == pairs && 2 * pairs <= row.head_dim, "more angles than pairs");
    for head in row.x.chunks_exact_mut(row.head_dim) {
        for i in (0..whole).step_by(WIDTH) {
            // SAFETY: i + 16 <= pairs, and a head has at least 2 * pairs elements.
            unsafe {
                let (first, second) = (head.as_mut_ptr().add(i), head.as_mut_ptr().add(i + pairs));
                let (a, b) = (L::load(first), L::load(second));
                let (cos, sin) = (L::load(row.cos.as_ptr().add(i)), L::load(row.sin.as_ptr().add(i)));
                let zero = L::splat(-0.0);
                a.mul_add(cos, zero.sub(b.mul(sin))).store(first);
                b.mul_add(cos, a.mul(sin)).store(second);
            }
        }
        for i in whole..pairs {
            let (first, second) = match row.style {
                RopeStyle::Neox => (i, i + pairs),
                RopeStyle::Interleaved => (2 * i, 2 * i + 1),
            };
            (head[first], head[second]) = turn(head[first], head[second], row.cos[i], row.sin[i]);
        }
    }
}

/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(in crate::cpu) unsafe fn max<L: Lanes>(row: &[f32]) -> f32 {
    let whole = row.len() / WIDTH * WIDTH;
    // SAFETY: every load lies below `whole <= len`, or in an array of 16.
    unsafe {
        let mut max = L::splat(f32::NEG_INFINITY);
        for i in (0..whole).step_by(WIDTH) {
            max = L::load(row.as_ptr().add(i)).max(max);
        }
        L::load(tail(row, f32::NEG_INFINITY).as_ptr()).max(max).join_max()
    }
}

/// exp(x - max) of the row's last `len % 16` elements, and zeroes, which change no sum.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
unsafe fn exp_sub_tail<L: Lanes>(row: &[f32], maxes: L) -> [f32; WIDTH] {
    let mut last = [0.0; WIDTH];
    if row.len().is_multiple_of(WIDTH) {
        return last;
    }
    // SAFETY: both arrays have 16 elements; the rest is the caller's duty.
    unsafe { exp(L::load(tail(row, f32::NEG_INFINITY).as_ptr()).sub(maxes)).store(last.as_mut_ptr()) };
    // The filling is not always zero by now (-inf less -inf is NaN).
    last[row.len() % WIDTH..].fill(0.0);
    last
}

/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(in crate::cpu) unsafe fn exp_sub_sum<L: Lanes>(row: &mut [f32], max: f32) -> f32 {
    let whole = row.len() / WIDTH * WIDTH;
    // SAFETY: every load and store lies below `whole <= len`, or in an array of 16.
    unsafe {
        let maxes = L::splat(max);
        let mut sum = L::splat(0.0);
        for i in (0..whole).step_by(WIDTH) {
            let y = exp(L::load(row.as_ptr().add(i)).sub(maxes));
            y.store(row.as_mut_ptr().add(i));
            sum = sum.add(y);
        }
        let last = exp_sub_tail(row, maxes);
        for (x, y) in row[whole..].iter_mut().zip(last) {
            *x = y;
        }
        sum = sum.add(L::load(last.as_ptr()));
        sum.join_add()
    }
}

/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(in crate::cpu) unsafe fn soft_cap<L: Lanes>(row: &mut [f32], scale: f32, cap: f32) {
    let whole = row.len() / WIDTH * WIDTH;
    // SAFETY: every load and store lies below `whole <= len`.
    unsafe {
        let (scales, caps) = (L::splat(scale), L::splat(cap));
        for i in (0..whole).step_by(WIDTH) {
            let at = row.as_mut_ptr().add(i);
            tanh(L::load(at).mul(scales).div(caps)).mul(caps).store(at);
        }
    }
    for x in &mut row[whole..] {
        *x = scalar::exp::tanh(*x * scale / cap) * cap;
    }
}
