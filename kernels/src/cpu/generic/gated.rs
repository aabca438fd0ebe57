//! Gated activations in lanes: a function of the gate, times the up projection where there is one.
//!
//! Functions are types, not closures: closures would not have the instruction set's features. A group of 32 outputs is
//! joined in registers and quantised there.

use super::Lanes;
use super::exp::exp;
use super::rows::{WIDTH, group};
use crate::cpu::gated::Activation;
use crate::cpu::scalar::gated::{QUICK, TAIL, TAIL_STEP, TANH_CUBIC, TANH_LINEAR};
use crate::cpu::task::GatedTask;
use crate::quant_format::GROUP;

/// One activation; the scalar twin's of the same name tells what it computes.
trait Function: Copy {
    /// # Safety
    /// As [`Lanes`].
    unsafe fn of<L: Lanes>(self, x: L) -> L;

    /// What it multiplies.
    ///
    /// # Safety
    /// As [`Lanes`].
    #[inline(always)]
    unsafe fn of_up<L: Lanes>(self, up: L) -> L {
        up
    }
}

#[derive(Clone, Copy)]
struct Silu;
#[derive(Clone, Copy)]
struct Gelu;
#[derive(Clone, Copy)]
struct GeluTanh;
#[derive(Clone, Copy)]
struct Gegelu {
    limit: f32,
}

impl Function for Gegelu {
    #[inline(always)]
    unsafe fn of<L: Lanes>(self, x: L) -> L {
        // SAFETY: the caller's duty is the same.
        unsafe {
            let limit = L::splat(self.limit);
            let x = L::select_less(limit, x, limit, x);
            x.div(L::splat(1.0).add(exp(L::splat(0.0).sub(x.mul(L::splat(QUICK))))))
        }
    }

    #[inline(always)]
    unsafe fn of_up<L: Lanes>(self, up: L) -> L {
        // SAFETY: the caller's duty is the same.
        unsafe {
            let (limit, least) = (L::splat(self.limit), L::splat(-self.limit));
            let up = L::select_less(limit, up, limit, up);
            L::select_less(up, least, least, up).add(L::splat(1.0))
        }
    }
}

impl Function for Silu {
    #[inline(always)]
    unsafe fn of<L: Lanes>(self, x: L) -> L {
        // SAFETY: the caller's duty is the same.
        unsafe { x.div(L::splat(1.0).add(exp(L::splat(0.0).sub(x)))) }
    }
}

impl Function for Gelu {
    #[inline(always)]
    unsafe fn of<L: Lanes>(self, x: L) -> L {
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
    unsafe fn of<L: Lanes>(self, x: L) -> L {
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
            (Activation::Silu, Some(up)) => join::<L, _, true>(task, up, Silu),
            (Activation::Silu, None) => join::<L, _, false>(task, &[], Silu),
            (Activation::Gelu, Some(up)) => join::<L, _, true>(task, up, Gelu),
            (Activation::Gelu, None) => join::<L, _, false>(task, &[], Gelu),
            (Activation::GeluTanh, Some(up)) => join::<L, _, true>(task, up, GeluTanh),
            (Activation::GeluTanh, None) => join::<L, _, false>(task, &[], GeluTanh),
            (Activation::Gegelu { limit }, Some(up)) => join::<L, _, true>(task, up, Gegelu { limit }),
            (Activation::Gegelu { limit }, None) => join::<L, _, false>(task, &[], Gegelu { limit }),
        }
    }
}

/// # Safety
/// As [`gated`].
#[inline(always)]
unsafe fn join<L: Lanes, F: Function, const HAS_UP: bool>(task: &GatedTask<'_>, up: &[f32], function: F) {
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
                let (first, second) = (function.of(L::load(gate)), function.of(L::load(gate.add(WIDTH))));
                if HAS_UP {
                    let (first_up, second_up) = (L::load(up), L::load(up.add(WIDTH)));
                    (first.mul(function.of_up(first_up)), second.mul(function.of_up(second_up)))
                } else {
                    (first, second)
                }
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
