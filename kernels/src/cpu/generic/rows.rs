//! Row operations in lanes; each is its scalar twin, sixteen elements at a time.
//!
//! A tail is brought to sixteen with values that change nothing: zeroes for sums of squares, -inf for maxima.

use super::Lanes;
use super::exp::exp;
use crate::cpu::rope::RopeStyle;
use crate::cpu::scalar::quantize::SMALLEST_MAGNITUDE;
use crate::cpu::scalar::rope::turn;
use crate::cpu::task::{GatedTask, GroupsMut, QuantGroup, RopeRow};
use crate::quant_format::GROUP;

const WIDTH: usize = 16;

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
unsafe fn group<L: Lanes>(first: L, second: L) -> QuantGroup {
    let mut group = QuantGroup::default();
    // SAFETY: the caller's duty; codes have room for 32.
    unsafe {
        let magnitude = first.abs().max_bits(second.abs()).join_max_bits();
        if magnitude.is_finite() && magnitude >= SMALLEST_MAGNITUDE {
            let factor = L::splat(127.0 / magnitude);
            let (first, second) = (first.mul(factor).round(), second.mul(factor).round());
            first.store_i8(group.codes.as_mut_ptr());
            second.store_i8(group.codes.as_mut_ptr().add(WIDTH));
            // Whole numbers of at most 32 * 127: exact in f32.
            let first_sum = first.join_add();
            let sum = first_sum + second.join_add();
            group.scale = magnitude / 127.0;
            group.sum = sum as i32;
            group.scaled_sum = group.scale * sum;
            group.first_sum = first_sum as i32;
        } else {
            group.scale = if magnitude.is_finite() { 0.0 } else { f32::NAN };
            group.scaled_sum = group.scale * 0.0;
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
unsafe fn silu_mul_lanes<L: Lanes>(gate: L, up: L) -> L {
    // SAFETY: the caller's duty is the same.
    unsafe { gate.div(L::splat(1.0).add(exp(L::splat(0.0).sub(gate)))).mul(up) }
}

/// # Safety
/// As [`Lanes`]; the task's ranges lie within its buffers, and its outputs belong to it.
#[inline(always)]
pub(in crate::cpu) unsafe fn gated<L: Lanes>(task: &GatedTask<'_>) {
    let (num_rows, cols) = (task.m.len(), task.out.cols);
    assert!(task.stride.is_multiple_of(GROUP) && task.cols.len() <= task.stride, "products without whole groups");
    let (gate, up) = (&task.gate[..num_rows * task.stride], &task.up[..num_rows * task.stride]);
    for (index, row) in task.m.clone().enumerate() {
        let groups = task.out.groups_of(row, task.cols.start / GROUP);
        for (number, start) in task.cols.clone().step_by(GROUP).enumerate() {
            let at = index * task.stride + number * GROUP;
            // SAFETY: a row's products are whole groups, checked above.
            let (first, second) = unsafe {
                let (gate, up) = (gate.as_ptr().add(at), up.as_ptr().add(at));
                (
                    silu_mul_lanes(L::load(gate), L::load(up)),
                    silu_mul_lanes(L::load(gate.add(WIDTH)), L::load(up.add(WIDTH))),
                )
            };
            if let Some(rows) = &task.out.rows {
                let mut joined = [0.0; GROUP];
                // SAFETY: the array has 32 elements.
                unsafe {
                    first.store(joined.as_mut_ptr());
                    second.store(joined.as_mut_ptr().add(WIDTH));
                }
                let len = GROUP.min(task.cols.end - start);
                // SAFETY: the outputs are the task's.
                let out = unsafe { rows.slice(row * cols + start..row * cols + start + len) };
                out.copy_from_slice(&joined[..len]);
            }
            if let Some(groups) = &groups {
                // SAFETY: as above.
                unsafe { groups.set(number, group::<L>(first, second)) };
            }
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
pub(in crate::cpu) unsafe fn sum_exp_sub<L: Lanes>(row: &[f32], max: f32) -> f32 {
    let whole = row.len() / WIDTH * WIDTH;
    // SAFETY: every load lies below `whole <= len`, or in an array of 16.
    unsafe {
        let maxes = L::splat(max);
        let mut sum = L::splat(0.0);
        for i in (0..whole).step_by(WIDTH) {
            sum = sum.add(exp(L::load(row.as_ptr().add(i)).sub(maxes)));
        }
        sum = sum.add(L::load(exp_sub_tail(row, maxes).as_ptr()));
        sum.join_add()
    }
}
