//! The block of fused multiply-adds under dense products and attention.
//!
//! ```text
//! for i in 0..len:                            ascending: the one accumulator of every output
//!     b[v] = load(b(v, i))                    V vectors, widened to f32
//!     for q, v: acc[q][v] += a(q, i) * b[v]   a broadcast meets a vector
//! ```
//!
//! Q broadcasts by V vectors keep Q * V accumulators in registers; each is a chain of its own, and a fused multiply-add
//! takes 4 cycles where two can begin in one, so at least 8 registers of them are wanted (5 cycles and 10 registers on AMD's cores up to Zen 2).

use super::{Element, Lanes};

/// Adds to `acc`, see the head. `a(q, i)` and `b(v, i)` say where numbers and vectors lie: as closures, so that the compiler sees what
/// distances are constant, and one register serves all that are. `ask(v, at)` is told what was loaded, so that it can ask memory for what
/// is going to be.
///
/// # Safety
/// - As [`Lanes`].
/// - For every i below `len`, `a(q, i)` is valid, and `b(v, i)` for 16 elements; they and `ask` hold no
///   intrinsics of the set.
#[inline(always)]
pub(super) unsafe fn multiply_add<L: Lanes, E: Element, const Q: usize, const V: usize>(
    a: impl Fn(usize, usize) -> *const f32,
    len: usize,
    b: impl Fn(usize, usize) -> *const E,
    ask: impl Fn(usize, *const E),
    acc: &mut [[L; V]; Q],
) {
    // SAFETY: the caller's duties cover every pointer used here.
    unsafe {
        let mut local = *acc;
        for i in 0..len {
            let mut vectors = [L::splat(0.0); V];
            for v in 0..V {
                let at = b(v, i);
                vectors[v] = E::lanes::<L>(at);
                ask(v, at);
            }
            for q in 0..Q {
                let x = L::splat(*a(q, i));
                for v in 0..V {
                    local[q][v] = x.mul_add(vectors[v], local[q][v]);
                }
            }
        }
        *acc = local;
    }
}
