//! The two inner loops that everything else is measured by, on registers alone.

use std::hint::black_box;

use super::{Lanes, QuantLanes};

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

/// `rounds` times eight dot products in each of `N` chains, and what it takes to widen them: the inner loop of a product
/// with 4-bit codes, its activations in the first-level cache. Chains advance in turns, enough of them to hide the
/// latency of a product. Returns operations, two a multiply-add.
///
/// # Safety
/// As [`QuantLanes`].
#[inline(always)]
pub(in crate::cpu) unsafe fn spin_int8<Q: QuantLanes, const N: usize>(rounds: usize) -> u64 {
    let codes = black_box([3_u8; 64]);
    let x = black_box([5_i8; 4 * DOTS * MAX_CHAINS]);
    // SAFETY: the caller's duty is the same; a vector of codes has at most 64 bytes; x has four bytes for every product.
    unsafe {
        let codes = Q::load_codes(codes.as_ptr());
        let mut sums = [Q::zero_sums(); N];
        for _ in 0..rounds {
            // As if they were others every time: equal products would be computed once.
            let x = black_box(x.as_ptr());
            let mut narrow = [Q::narrow(sums[0]); N];
            for n in 0..N {
                narrow[n] = Q::narrow(sums[n]);
            }
            for dot in 0..DOTS {
                for n in 0..N {
                    narrow[n] = Q::in_order(Q::dot(narrow[n], codes, x.add(4 * (dot * N + n))));
                }
            }
            Q::widen_all(&mut sums, &mut narrow);
        }
        let mut out = [0.0_f32; 16];
        for sums in sums {
            Q::store(Q::to_floats(sums), out.as_mut_ptr());
            black_box(&out);
        }
    }
    (rounds * N * DOTS * Q::ROWS * 4 * 2) as u64
}

/// Chains at most.
const MAX_CHAINS: usize = 16;
