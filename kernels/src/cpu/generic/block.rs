//! The block of fused multiply-adds under dense products and attention.
//!
//! ```text
//! for i in 0..len:                         ascending: the one accumulator of every output
//!     b[v] = load(b_v + i * stride)        V vectors, widened to f32
//!     for q, v: acc[q][v] += a_q[i] * b[v] a broadcast meets a vector
//! ```
//!
//! Q broadcasts by V vectors keep Q * V accumulators in registers; each is a chain of its own, and a fused multiply-add
//! takes 4 cycles where two can begin in one, so at least 8 registers of them are wanted (5 cycles and 10 registers on AMD's cores up to Zen 2).

use super::{Element, Lanes};
use crate::cpu::prefetch::prefetch;

/// Adds to `acc`, see the head. `AHEAD`: bytes from what is loaded to what memory is asked for, 0 for nothing. `STEP`: floats from
/// one number of an `a` to the next.
///
/// # Safety
/// - As [`Lanes`].
/// - `a[q]` is valid for `len` floats `STEP` apart, `b[v] + i * stride` for 16 elements for every i below `len`.
#[inline(always)]
pub(super) unsafe fn multiply_add<
    L: Lanes,
    E: Element,
    const Q: usize,
    const V: usize,
    const AHEAD: usize,
    const STEP: usize,
>(
    a: [*const f32; Q],
    len: usize,
    b: [*const E; V],
    stride: usize,
    acc: &mut [[L; V]; Q],
) {
    // SAFETY: the caller's duties cover every pointer used here.
    unsafe {
        let mut local = *acc;
        for i in 0..len {
            let mut vectors = [L::splat(0.0); V];
            for v in 0..V {
                vectors[v] = E::lanes::<L>(b[v].add(i * stride));
                if AHEAD > 0 {
                    prefetch(b[v].wrapping_add(i * stride).cast::<u8>().wrapping_add(AHEAD));
                }
            }
            for q in 0..Q {
                let x = L::splat(*a[q].add(i * STEP));
                for v in 0..V {
                    local[q][v] = x.mul_add(vectors[v], local[q][v]);
                }
            }
        }
        *acc = local;
    }
}
