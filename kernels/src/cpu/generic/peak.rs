//! The two inner loops that everything else is measured by, on registers alone.

use std::hint::black_box;

use super::{Lanes, QuantLanes};

/// Chains of the integer loop: enough to hide the latency of one product behind the others.
const INT8_CHAINS: usize = 8;
/// Dot products added up before they are widened: eight of four-bit codes fit 16 bits.
const DOTS: usize = 8;

/// `rounds` times `N` chains of one multiply-add in sixteen lanes. Returns operations, two a multiply-add.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(in crate::cpu) unsafe fn spin_f32<L: Lanes, const N: usize>(rounds: usize) -> u64 {
    // SAFETY: the caller's duty is the same; the array has sixteen elements.
    unsafe {
        let factor = L::splat(black_box(0.5));
        let mut sums = [L::splat(1.0); N];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = sum.mul_add(factor, factor);
            }
        }
        let mut out = [0.0_f32; 16];
        for sum in sums {
            sum.store(out.as_mut_ptr());
            black_box(&out);
        }
    }
    (rounds * N * 16 * 2) as u64
}

/// `rounds` times eight dot products in each of several chains, and what it takes to widen them: the inner loop of a
/// product with 4-bit codes. Returns operations, two a multiply-add.
///
/// # Safety
/// As [`QuantLanes`].
#[inline(always)]
pub(in crate::cpu) unsafe fn spin_int8<Q: QuantLanes>(rounds: usize) -> u64 {
    let (codes, x) = (black_box([3_u8; 64]), black_box([5_i8; 4]));
    // SAFETY: the caller's duty is the same; a plane's vector has at most 64 bytes, an activation quad four.
    unsafe {
        let codes = Q::load_codes(codes.as_ptr());
        let mut sums = [Q::zero_sums(); INT8_CHAINS];
        for _ in 0..rounds {
            let mut narrow = [Q::narrow(sums[0]); INT8_CHAINS];
            for (narrow, sums) in narrow.iter_mut().zip(&sums) {
                *narrow = Q::narrow(*sums);
            }
            for _ in 0..DOTS {
                for narrow in &mut narrow {
                    *narrow = Q::dot(*narrow, codes, x.as_ptr());
                }
            }
            for (sums, narrow) in sums.iter_mut().zip(narrow) {
                *sums = Q::widen(*sums, narrow);
            }
        }
        let mut out = [0.0_f32; 16];
        for sums in sums {
            Q::store(Q::to_floats(sums), out.as_mut_ptr());
            black_box(&out);
        }
    }
    (rounds * INT8_CHAINS * DOTS * Q::ROWS * 4 * 2) as u64
}
