//! `scalar::exp` in lanes; the head of that file tells how it works.

use super::Lanes;
use crate::cpu::scalar::exp::{HIGHEST, LN_2_HIGH, LN_2_LOW, LOG2_E, LOWEST, POLYNOMIAL};

/// exp(x).
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(super) unsafe fn exp<L: Lanes>(x: L) -> L {
    // SAFETY: the caller's duty is the same.
    unsafe { L::select_less(L::splat(HIGHEST), x, L::splat(f32::INFINITY), exp_below_highest(x)) }
}

/// exp(x) where no lane is above `HIGHEST`: what is left of a maximum, for example.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(super) unsafe fn exp_below_highest<L: Lanes>(x: L) -> L {
    // SAFETY: the caller's duty is the same.
    unsafe {
        let n = x.mul(L::splat(LOG2_E)).round();
        let r = n.neg_mul_add(L::splat(LN_2_LOW), n.neg_mul_add(L::splat(LN_2_HIGH), x));
        let mut polynomial = L::splat(POLYNOMIAL[0]);
        for &coefficient in &POLYNOMIAL[1..] {
            polynomial = polynomial.mul_add(r, L::splat(coefficient));
        }
        let fraction = polynomial.mul_add(r.mul(r), r).add(L::splat(1.0));
        let result = fraction.mul(n.exp2_int());
        L::select_less(x, L::splat(LOWEST), L::splat(0.0), result)
    }
}

/// tanh(x).
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(super) unsafe fn tanh<L: Lanes>(x: L) -> L {
    // SAFETY: the caller's duty is the same.
    unsafe {
        let one = L::splat(1.0);
        one.sub(L::splat(2.0).div(exp(x.add(x)).add(one)))
    }
}
