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
    unsafe { exps_below_highest([x])[0] }
}

/// The same of several vectors, step by step: one vector's steps wait for each other, and a core looks ahead no further than
/// some three vectors.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(super) unsafe fn exps_below_highest<L: Lanes, const N: usize>(x: [L; N]) -> [L; N] {
    // SAFETY: the caller's duty is the same.
    unsafe {
        let (mut n, mut r) = (x, x);
        let mut polynomial = [L::splat(POLYNOMIAL[0]); N];
        for i in 0..N {
            n[i] = x[i].mul(L::splat(LOG2_E)).round();
        }
        for i in 0..N {
            r[i] = n[i].neg_mul_add(L::splat(LN_2_LOW), n[i].neg_mul_add(L::splat(LN_2_HIGH), x[i]));
        }
        for &coefficient in &POLYNOMIAL[1..] {
            for i in 0..N {
                polynomial[i] = polynomial[i].mul_add(r[i], L::splat(coefficient));
            }
        }
        for i in 0..N {
            let fraction = polynomial[i].mul_add(r[i].mul(r[i]), r[i]).add(L::splat(1.0));
            n[i] = fraction.mul(n[i].exp2_int());
        }
        for i in 0..N {
            n[i] = L::select_less(x[i], L::splat(LOWEST), L::splat(0.0), n[i]);
        }
        n
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
