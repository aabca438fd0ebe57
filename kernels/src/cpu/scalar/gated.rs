//! Gated activation: activation(gate) * up, or activation(gate) alone.
//!
//! The three functions are x times a share between 0 and 1. Bounds hold for finite x and are tested against f64.

use super::exp::exp;
use super::quantize::quantize;
use crate::cpu::gated::Activation;
use crate::cpu::task::GatedTask;

/// Of `gelu_tanh`: 2 sqrt(2 / pi).
pub(crate) const TANH_LINEAR: f32 = 1.595_769;
/// Of `gelu_tanh`: 2 sqrt(2 / pi) * 0.044715.
pub(crate) const TANH_CUBIC: f32 = 0.071_354_816;
/// Of `gelu`: the tail is a function of 1 / (1 + this * |x|).
pub(crate) const TAIL_STEP: f32 = 0.4;
/// Of `gelu`: ln(tail / t) + x^2 / 2 as a polynomial in t, highest power first. Our own Chebyshev fit for |x| up to 14, off by
/// 1.5e-7 at most.
pub(crate) const TAIL: [f32; 9] = [
    0.200_037_65,
    -1.019_930_3,
    2.035_457_7,
    -1.844_754,
    0.601_893_4,
    -0.204_621_96,
    0.377_408_8,
    0.996_448_34,
    -1.835_086_7,
];

/// x / (1 + exp(-x)): within 2^-21 |x| of the truth.
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// x * Phi(x), Phi the normal distribution's: within 2^-21 |x| of the truth.
///
/// The tail below -|x| is `t * exp(-x^2 / 2 + polynomial(t))` with t = 1 / (1 + 0.4 |x|), the form of Numerical Recipes'
/// `erfcc`: small tails keep their digits, and there is one branch, at the sign.
fn gelu(x: f32) -> f32 {
    let magnitude = x.abs();
    let t = 1.0 / magnitude.mul_add(TAIL_STEP, 1.0);
    let polynomial = TAIL[1..].iter().fold(TAIL[0], |sum, &coefficient| sum.mul_add(t, coefficient));
    let tail = t * exp((magnitude * -0.5).mul_add(magnitude, polynomial));
    x * if x < 0.0 { tail } else { 1.0 - tail }
}

/// x / 2 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel 2016), written with the sigmoid that it is:
/// within 2^-21 |x| of the truth.
fn gelu_tanh(x: f32) -> f32 {
    x / (1.0 + exp(-(x * (x * x).mul_add(TANH_CUBIC, TANH_LINEAR))))
}

/// Of `gegelu`: the steepness of its sigmoid.
pub(crate) const QUICK: f32 = 1.702;

/// x / (1 + exp(-1.702 x)) of an x cut off above; NaN passes.
fn gegelu(x: f32, limit: f32) -> f32 {
    let x = if limit < x { limit } else { x };
    x / (1.0 + exp(-(x * QUICK)))
}

/// What the activation multiplies.
fn of_up(activation: Activation, up: f32) -> f32 {
    match activation {
        Activation::Silu | Activation::Gelu | Activation::GeluTanh => up,
        Activation::Gegelu { limit } => {
            let up = if limit < up { limit } else { up };
            (if up < -limit { -limit } else { up }) + 1.0
        }
    }
}

fn activate(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Gegelu { limit } => gegelu(x, limit),
        Activation::Silu => silu(x),
        Activation::Gelu => gelu(x),
        Activation::GeluTanh => gelu_tanh(x),
    }
}

/// # Safety
/// The task's outputs belong to it.
pub(super) unsafe fn gated(task: &GatedTask<'_>) {
    let mut joined = vec![0.0; task.cols.len()];
    for (index, row) in task.m.clone().enumerate() {
        let products = index * task.stride..index * task.stride + joined.len();
        for (out, &gate) in joined.iter_mut().zip(&task.gate[products.clone()]) {
            *out = activate(task.activation, gate);
        }
        if let Some(up) = task.up {
            joined.iter_mut().zip(&up[products]).for_each(|(out, &up)| *out *= of_up(task.activation, up));
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Of |x|, see the functions.
    const TOLERANCE: f64 = 1.0 / (1 << 21) as f64;

    /// Phi by the series sum of x^(2n+1) / (1 * 3 * ... * (2n+1)) (Marsaglia 2004): for |x| up to 7 good to 1e-15 and better.
    fn normal_distribution(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= x * x / f64::from(2 * n + 1);
            sum += term;
        }
        0.5 + sum * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt()
    }

    fn check(activation: Activation, truth: impl Fn(f64) -> f64) {
        // Miri interprets, some thousand times slower.
        for i in (-700_000..=700_000).step_by(if cfg!(miri) { 9_973 } else { 1 }) {
            let x = i as f32 * 1e-5;
            let (ours, truth) = (f64::from(activate(activation, x)), truth(f64::from(x)));
            let error = (ours - truth).abs();
            assert!(error <= TOLERANCE * f64::from(x).abs(), "{activation:?} of {x}: {ours}, {truth}");
        }
        for x in [7.5, 20.0, 300.0, 1e10, f32::MAX] {
            assert_eq!(activate(activation, x), if x < 10.0 { activate(activation, x) } else { x });
            assert!(activate(activation, -x).abs() <= x * 6e-4, "{activation:?} of {}", -x);
        }
        assert_eq!(activate(activation, 0.0), 0.0);
        assert_eq!(activate(activation, f32::INFINITY), f32::INFINITY);
        assert!(activate(activation, f32::NAN).is_nan());
    }

    #[test]
    fn activations_are_close_to_the_truth() {
        check(Activation::Silu, |x| x / (1.0 + (-x).exp()));
        check(Activation::Gelu, |x| x * normal_distribution(x));
        check(Activation::GeluTanh, |x| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        });
    }

    #[test]
    fn gegelu_cuts_off_and_adds_one() {
        let limit = 2.5_f64;
        let activation = Activation::Gegelu { limit: limit as f32 };
        for i in -700..=700 {
            let x = i as f32 * 0.01;
            let cut = f64::from(x).min(limit);
            let truth = cut / (1.0 + (-1.702 * cut).exp());
            assert!((f64::from(activate(activation, x)) - truth).abs() <= TOLERANCE * f64::from(x).abs(), "{x}");
            let truth = f64::from(x).clamp(-limit, limit) + 1.0;
            assert!((f64::from(of_up(activation, x)) - truth).abs() <= 1e-6, "{x}");
        }
        assert!(activate(activation, f32::NAN).is_nan() && of_up(activation, f32::NAN).is_nan());
        assert_eq!(of_up(Activation::Silu, 7.0), 7.0);
    }

    #[test]
    fn small_tails_keep_their_digits() {
        // Phi(-x) from tables of the complementary error function: erfc(x / sqrt(2)) / 2.
        for (x, tail) in [
            (-3.0_f32, 1.349_898_031_630_094_5e-3),
            (-5.0, 2.866_515_718_791_939e-7),
            (-8.0, 6.220_960_574_271_785e-16),
        ] {
            let relative = f64::from(gelu(x)) / (f64::from(x) * tail) - 1.0;
            assert!(relative.abs() < 5e-6, "{x}: {relative}");
        }
    }
}
