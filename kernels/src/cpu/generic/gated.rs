//! Gated activations in lanes: a function of the gate, times the up projection where there is one.
//!
//! Functions are types, not closures: closures would not have the instruction set's features. A group of 32 outputs is
//! joined in registers and quantised there.

use super::Lanes;
use super::exp::exp;
use super::rows::{WIDTH, group};
use crate::cpu::gated::Activation;
use crate::cpu::scalar::gated::{TAIL, TAIL_STEP, TANH_CUBIC, TANH_LINEAR};
use crate::cpu::task::GatedTask;
use crate::quant_format::GROUP;

/// One activation; the scalar twin's of the same name tells what it computes.
trait Function {
    /// # Safety
    /// As [`Lanes`].
    unsafe fn of<L: Lanes>(x: L) -> L;
}

struct Silu;
struct Gelu;
struct GeluTanh;

impl Function for Silu {
    #[inline(always)]
    unsafe fn of<L: Lanes>(x: L) -> L {
        // SAFETY: the caller's duty is the same.
        unsafe { x.div(L::splat(1.0).add(exp(L::splat(0.0).sub(x)))) }
    }
}

impl Function for Gelu {
    #[inline(always)]
    unsafe fn of<L: Lanes>(x: L) -> L {
        // SAFETY: the caller's duty is the same.
        unsafe {
            let (magnitude, one) = (x.abs(), L::splat(1.0));
            let t = one.div(magnitude.mul_add(L::splat(TAIL_STEP), one));
            let mut polynomial = L::splat(TAIL[0]);
            for &coefficient in &TAIL[1..] {
                polynomial = polynomial.mul_add(t, L::splat(coefficient));
            }
            let tail = t.mul(exp(magnitude.mul(L::splat(-0.5)).mul_add(magnitude, polynomial)));
            x.mul(L::select_less(x, L::splat(0.0), tail, one.sub(tail)))
        }
    }
}

impl Function for GeluTanh {
    #[inline(always)]
    unsafe fn of<L: Lanes>(x: L) -> L {
        // SAFETY: the caller's duty is the same.
        unsafe {
            let inner = x.mul(x.mul(x).mul_add(L::splat(TANH_CUBIC), L::splat(TANH_LINEAR)));
            x.div(L::splat(1.0).add(exp(L::splat(0.0).sub(inner))))
        }
    }
}

/// # Safety
/// As [`Lanes`]; the task's ranges lie within its buffers, and its outputs belong to it.
#[inline(always)]
pub(in crate::cpu) unsafe fn gated<L: Lanes>(task: &GatedTask<'_>) {
    // SAFETY: the caller's duties are the same.
    unsafe {
        match (task.activation, task.up) {
            (Activation::Silu, Some(up)) => join::<L, Silu, true>(task, up),
            (Activation::Silu, None) => join::<L, Silu, false>(task, &[]),
            (Activation::Gelu, Some(up)) => join::<L, Gelu, true>(task, up),
            (Activation::Gelu, None) => join::<L, Gelu, false>(task, &[]),
            (Activation::GeluTanh, Some(up)) => join::<L, GeluTanh, true>(task, up),
            (Activation::GeluTanh, None) => join::<L, GeluTanh, false>(task, &[]),
        }
    }
}

/// # Safety
/// As [`gated`].
#[inline(always)]
unsafe fn join<L: Lanes, F: Function, const HAS_UP: bool>(task: &GatedTask<'_>, up: &[f32]) {
    let (num_rows, cols) = (task.m.len(), task.out.cols);
    assert!(task.stride.is_multiple_of(GROUP) && task.cols.len() <= task.stride, "products without whole groups");
    let gate = &task.gate[..num_rows * task.stride];
    let up = if HAS_UP { &up[..num_rows * task.stride] } else { gate };
    for (index, row) in task.m.clone().enumerate() {
        let groups = task.out.groups_of(row, task.cols.start / GROUP);
        for (number, start) in task.cols.clone().step_by(GROUP).enumerate() {
            let at = index * task.stride + number * GROUP;
            // SAFETY: a row's products are whole groups, checked above.
            let (first, second) = unsafe {
                let (gate, up) = (gate.as_ptr().add(at), up.as_ptr().add(at));
                let (first, second) = (F::of(L::load(gate)), F::of(L::load(gate.add(WIDTH))));
                if HAS_UP { (first.mul(L::load(up)), second.mul(L::load(up.add(WIDTH)))) } else { (first, second) }
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
