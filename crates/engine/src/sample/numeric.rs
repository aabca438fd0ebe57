//! Passes over a whole row, written so that the compiler turns each into vector code, in the widest vectors of the machine.
//!
//! The vocabulary has up to some 260,000 entries and every sequence of a batch needs a row a step, so these loops are
//! what sampling costs. Sums run in sixteen f64 lanes that are added in a fixed order, and the compiler neither reorders nor
//! fuses arithmetic of floats: the result depends on the row alone, and is the same on every machine. Nothing here knows what a
//! logit means.

use std::ops::Range;

/// Of sums in f64: two of the widest vectors, so that an addition need not wait for the one before it.
const SUM_LANES: usize = 16;
/// Of maxima in f32.
const MAX_LANES: usize = 32;
/// Entries that are compared before it is asked whether one was equal.
const FIND_CHUNK: usize = 128;

/// Entries whose sum [`draw`] keeps, so that the walk to the drawn entry is over sums first.
const DRAW_CHUNK: usize = 256;

/// Runs a block over variables of these names and types, which may borrow for `'a`, compiled for the widest vectors that this
/// machine has. What is not inlined stays in the vectors that every machine has: functions that the block calls are
/// `#[inline(always)]`, loops are plain ones, and there are no closures.
macro_rules! vectorized {
    (($($variable:ident: $type:ty),+) -> $result:ty $block:block) => {{
        struct Pass<'a>($($type),+);

        impl<'a> pulp::NullaryFnOnce for Pass<'a> {
            type Output = $result;

            #[inline(always)]
            fn call(self) -> $result {
                let Self($($variable),+) = self;
                $block
            }
        }

        $crate::sample::numeric::arch().dispatch(Pass($($variable),+))
    }};
}
pub(super) use vectorized;

/// The widest vectors of this machine. `BINDERY_ISA` does not reach here: it chooses kernels.
#[inline]
pub(super) fn arch() -> pulp::Arch {
    #[cfg(test)]
    if let Some(arch) = tests::FORCED.get() {
        return arch;
    }
    pulp::Arch::new()
}

/// No NaN and no plus infinity in the row (minus infinity is a forbidden token, and fine).
pub(super) fn all_below_infinity(row: &[f32]) -> bool {
    let num_below = vectorized!((row: &'a [f32]) -> u32 {
        let mut num_below = 0;
        for &value in row {
            num_below += u32::from(value < f32::INFINITY);
        }
        num_below
    });
    num_below as usize == row.len()
}

/// The largest value, minus infinity for an empty row. NaN is the caller's to exclude.
pub(super) fn max(row: &[f32]) -> f32 {
    vectorized!((row: &'a [f32]) -> f32 { max_in_lanes::<MAX_LANES>(row) })
}

/// As [`max`], of the few entries of a chunk: to be called from within a pass.
#[inline(always)]
pub(super) fn max_of_chunk(chunk: &[f32]) -> f32 {
    max_in_lanes::<8>(chunk)
}

/// `N` is a power of two.
#[inline(always)]
fn max_in_lanes<const N: usize>(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; N];
    let chunks = row.chunks_exact(N);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, value);
        }
    }
    let mut width = N / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = larger(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    let mut max = lanes[0];
    for &value in rest {
        max = larger(max, value);
    }
    max
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Index of the largest value, the lowest of equal ones; `None` where every value is minus infinity.
pub(super) fn argmax(row: &[f32]) -> Option<u32> {
    let max = max(row);
    if max == f32::NEG_INFINITY {
        return None;
    }
    let chunk = vectorized!((row: &'a [f32], max: f32) -> Option<usize> {
        for (index, chunk) in row.chunks(FIND_CHUNK).enumerate() {
            let mut num_equal = 0;
            for &value in chunk {
                num_equal += u32::from(value == max);
            }
            if num_equal > 0 {
                return Some(index);
            }
        }
        None
    });
    let start = chunk? * FIND_CHUNK;
    let found = row[start..].iter().position(|&value| value == max)?;
    Some((start + found) as u32)
}

/// `exp(x)` for x <= 0, within 2 units in the last place; 0 below -87, where f32's normal numbers end.
///
/// Cephes' `expf`: x = n ln 2 + r with |r| <= ln(2) / 2, and a polynomial for exp(r). The rounding of n is done by adding
/// 1.5 * 2^23, which leaves n in the low bits of the sum, from where it moves into the exponent.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5e-1;
    let mantissa = p * r * r + r + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    let value = mantissa * scale;
    if x > -87.0 { value } else { 0.0 }
}

/// Logits to weights in place: `exp((logit - max) / temperature)`, so that the likeliest token has weight 1. The
/// difference is taken first: with a temperature near zero it becomes 0 or minus infinity, never NaN.
pub(super) fn to_weights(row: &mut [f32], max: f32, temperature: f32) {
    vectorized!((row: &'a mut [f32], max: f32, temperature: f32) -> () {
        for value in row {
            *value = exp((*value - max) / temperature);
        }
    });
}

/// Sum in f64.
pub(super) fn sum(row: &[f32]) -> f64 {
    vectorized!((row: &'a [f32]) -> f64 { sum_in_lanes(row) })
}

#[inline(always)]
fn sum_in_lanes(row: &[f32]) -> f64 {
    let mut lanes = [0.0_f64; SUM_LANES];
    let chunks = row.chunks_exact(SUM_LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(value);
        }
    }
    let mut sum = 0.0;
    for lane in lanes {
        sum += lane;
    }
    for &value in rest {
        sum += f64::from(value);
    }
    sum
}

/// Sum of `exp(x - max)` over the row, in f64.
pub(super) fn sum_exp(row: &[f32], max: f32) -> f64 {
    vectorized!((row: &'a [f32], max: f32) -> f64 {
        let mut sum = 0.0;
        let mut weights = [0.0_f32; DRAW_CHUNK];
        for chunk in row.chunks(DRAW_CHUNK) {
            let weights = &mut weights[..chunk.len()];
            for (weight, &value) in weights.iter_mut().zip(chunk) {
                *weight = exp(value - max);
            }
            sum += sum_in_lanes(weights);
        }
        sum
    })
}

/// How many values are greater.
pub(super) fn count_above(row: &[f32], value: f32) -> u32 {
    vectorized!((row: &'a [f32], value: f32) -> u32 {
        let mut num_above = 0;
        for &other in row {
            num_above += u32::from(other > value);
        }
        num_above
    })
}

/// The entry at which the running sum of `weights` passes `uniform` (in [0, 1)) of the whole. At least one weight is
/// positive, and only an entry of positive weight is ever drawn.
pub(super) fn draw(weights: &[f32], uniform: f64, sums: &mut Vec<f64>) -> u32 {
    sums.resize(weights.len().div_ceil(DRAW_CHUNK), 0.0);
    let of_chunks = &mut sums[..];
    vectorized!((weights: &'a [f32], of_chunks: &'a mut [f64]) -> () {
        for (sum, chunk) in of_chunks.iter_mut().zip(weights.chunks(DRAW_CHUNK)) {
            *sum = sum_in_lanes(chunk);
        }
    });
    let total: f64 = sums.iter().sum();
    let mut left = uniform * total;
    let mut last_positive = None;
    for (index, &sum) in sums.iter().enumerate() {
        if sum > 0.0 {
            let start = index * DRAW_CHUNK;
            let chunk = start..weights.len().min(start + DRAW_CHUNK);
            if left < sum {
                return draw_in(weights, chunk, left);
            }
            last_positive = Some(chunk);
        }
        left -= sum;
    }
    // Rounding of the sums can leave `left` at the very end: then it is the last entry that can be drawn.
    let chunk = last_positive.expect("a weight is positive");
    draw_in(weights, chunk, f64::INFINITY)
}

/// The same within one chunk that has a positive weight.
fn draw_in(weights: &[f32], chunk: Range<usize>, mut left: f64) -> u32 {
    let mut last_positive = chunk.start;
    for index in chunk {
        let weight = f64::from(weights[index]);
        if weight > 0.0 {
            if left < weight {
                return index as u32;
            }
            last_positive = index;
        }
        left -= weight;
    }
    last_positive as u32
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        /// Vectors to compute in, instead of the widest.
        pub(super) static FORCED: Cell<Option<pulp::Arch>> = const { Cell::new(None) };
    }

    /// What `compute` gives in vectors of every width that this machine has; the first in none at all.
    pub(in crate::sample) fn on_every_width<T>(mut compute: impl FnMut() -> T) -> Vec<T> {
        let mut archs = vec![pulp::Arch::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            archs.extend(pulp::x86::V3::try_new().map(pulp::Arch::V3));
            archs.extend(pulp::x86::V4::try_new().map(pulp::Arch::V4));
        }
        let compute_in = |arch| {
            FORCED.set(Some(arch));
            let computed = compute();
            FORCED.set(None);
            computed
        };
        archs.into_iter().map(compute_in).collect()
    }

    /// Every pass over rows of all lengths, tails among them: the bits of what comes out.
    #[test]
    fn vectors_of_every_width_give_the_same_bits() {
        for len in [1, 7, 8, 15, 16, 17, 31, 33, 127, 128, 129, 255, 256, 257, 1000, 5003] {
            // Logits of no pattern, from -12 to 12.
            let logits: Vec<f32> =
                (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 699_050.0 - 12.0).collect();
            let passes = || {
                let highest = max(&logits);
                let mut weights = logits.clone();
                to_weights(&mut weights, highest, 0.7);
                let mut bits: Vec<u64> = weights.iter().map(|weight| u64::from(weight.to_bits())).collect();
                bits.push(u64::from(highest.to_bits()));
                bits.push(u64::from(all_below_infinity(&logits)));
                bits.push(u64::from(argmax(&logits).unwrap()));
                bits.push(u64::from(count_above(&logits, 1.5)));
                bits.push(sum(&weights).to_bits());
                bits.push(sum_exp(&logits, highest).to_bits());
                let mut sums = Vec::new();
                bits.extend((0..50).map(|i| u64::from(draw(&weights, f64::from(i) * 0.02, &mut sums))));
                bits.extend(sums.iter().map(|sum| sum.to_bits()));
                bits
            };
            let [first, others @ ..] = &on_every_width(passes)[..] else { unreachable!() };
            assert!(others.iter().all(|other| other == first), "{len} logits");
        }
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for step in 0..=870_000 {
            let x = -(step as f32) * 1e-4;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs();
            let ulp = exact * f64::from(f32::EPSILON);
            assert!(x <= -87.0 || error <= 2.0 * ulp, "exp({x}) = {} instead of {exact}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-88.0), 0.0);
    }

    #[test]
    fn the_lowest_of_equal_maxima_wins() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), Some(1));
        assert_eq!(argmax(&[f32::NEG_INFINITY; 9]), None);
        assert_eq!(argmax(&[]), None);
        let mut row = vec![0.0; 100];
        row[97] = 1.0;
        assert_eq!(argmax(&row), Some(97));
        // Each place of a row that is longer than all chunks and a multiple of none.
        let mut row = vec![-1.0; 3 * FIND_CHUNK + 5];
        for index in (0..row.len()).rev() {
            row[index] = 2.0;
            assert_eq!(argmax(&row), Some(index as u32));
            assert_eq!(max(&row), 2.0);
        }
    }

    #[test]
    fn a_temperature_near_zero_gives_no_nan() {
        let mut row = vec![1.0, 0.999_999, f32::NEG_INFINITY];
        to_weights(&mut row, 1.0, 1e-45);
        assert_eq!(row, [1.0, 0.0, 0.0]);
    }

    #[test]
    fn entries_without_weight_are_never_drawn() {
        let mut weights = vec![0.0_f32; 1000];
        weights[300] = 0.5;
        weights[777] = 0.5;
        let mut sums = Vec::new();
        assert_eq!(draw(&weights, 0.0, &mut sums), 300);
        assert_eq!(draw(&weights, 0.499_999, &mut sums), 300);
        assert_eq!(draw(&weights, 0.5, &mut sums), 777);
        assert_eq!(draw(&weights, 1.0 - f64::EPSILON / 2.0, &mut sums), 777);
        // What rounding could bring about at worst:
        assert_eq!(draw(&weights, 1.0, &mut sums), 777);
    }
}
