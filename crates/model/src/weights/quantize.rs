//! Dense rows to int8 and int4 groups of 32, at load (`--quantize`).
//!
//! int8: `scale * code`, codes -127 to 127, the scale set by the largest element. int4: `scale * code + minimum`, codes 0
//! to 15, scale and minimum searched: the range is narrowed at either end (an outlier may be worth clipping), each time
//! followed by the least-squares line through the codes, and the candidate with the smallest squared error wins. Every
//! candidate is judged with its scale and minimum as rounded to f16, since that is what is stored.
//!
//! It must not know tensors. Its invariant: the searched int4 group is never further from the source than the plain one
//! (range from smallest to largest element), and both repeat bit for bit on every machine.

use half::f16;

/// Elements that share a scale.
pub(super) const GROUP: usize = 32;

const INT8_MAX: f32 = 127.0;
const INT4_MAX: f32 = 15.0;

/// How long to look for a group's scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effort {
    /// Smallest to largest element: for made-up weights, which have no quality to lose.
    Plain,
    /// The search above.
    Search,
}

/// Quantises a group of finite numbers. None where the scale leaves the range of f16.
pub(super) fn int8(group: &[f32; GROUP], codes: &mut [i8; GROUP]) -> Option<f16> {
    let largest = group.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let scale = finite(largest / INT8_MAX)?;
    let inverse = inverse(scale);
    for (code, x) in codes.iter_mut().zip(group) {
        *code = round((x * inverse).clamp(-INT8_MAX, INT8_MAX)) as i8;
    }
    Some(scale)
}

/// Quantises a group of finite numbers to codes, scale and minimum. None where one of the two leaves the range of f16.
pub(super) fn int4(group: &[f32; GROUP], codes: &mut [i8; GROUP], effort: Effort) -> Option<(f16, f16)> {
    let (low, high) = group.iter().fold((f32::MAX, f32::MIN), |(low, high), &x| (low.min(x), high.max(x)));
    let range = high - low;
    let mut best = Line::new(group, range / INT4_MAX, low)?;
    if effort == Effort::Search {
        let sum = group.iter().sum::<f32>();
        let mut consider = |line: Option<Line>| {
            if let Some(line) = line.filter(|line| line.error < best.error) {
                best = line;
            }
        };
        for (bottom, top) in NARROWED {
            let mut line = Line::new(group, range * (1.0 - bottom - top) / INT4_MAX, low + range * bottom);
            for _ in 0..REFINEMENTS {
                consider(line);
                line = line.and_then(|line| line.refined(group, sum));
            }
            consider(line);
        }
    }
    best.write_codes(group, codes);
    Some((best.scale, best.min))
}

/// Shares of the range that are cut off at the bottom and the top. With the steps below these are 12 candidates; on
/// Gaussian and heavy-tailed groups they leave 0.81 of the plain range's squared error. The same ends on both sides (15
/// candidates) left 0.84, a grid of 16 ends (48 candidates) 0.79, no least-squares step 0.86.
const NARROWED: [(f32, f32); 4] = [(0.0, 0.0), (0.0, 0.05), (0.05, 0.0), (0.05, 0.05)];
/// Least-squares steps after each.
const REFINEMENTS: usize = 2;

/// A scale and a minimum, what they cost, and the sums that the least-squares line needs.
#[derive(Clone, Copy)]
struct Line {
    scale: f16,
    min: f16,
    /// Squared error of the group.
    error: f32,
    codes: f32,
    codes_squared: f32,
    codes_times_x: f32,
}

/// Sums are kept in as many lanes, added up in a fixed order: the compiler can vectorise, and results never vary.
const LANES: usize = 8;

impl Line {
    fn new(group: &[f32; GROUP], scale: f32, min: f32) -> Option<Self> {
        let (scale, min) = (finite(scale)?, finite(min)?);
        let (inverse, scale_f32, min_f32) = (inverse(scale), scale.to_f32(), min.to_f32());
        let [mut error, mut codes, mut squared, mut times] = [[0.0f32; LANES]; 4];
        for chunk in group.as_chunks::<LANES>().0 {
            for lane in 0..LANES {
                let x = chunk[lane];
                let code = code(x, min_f32, inverse);
                let off = scale_f32 * code + min_f32 - x;
                error[lane] += off * off;
                codes[lane] += code;
                squared[lane] += code * code;
                times[lane] += code * x;
            }
        }
        let add = |lanes: [f32; LANES]| lanes.iter().sum::<f32>();
        Some(Self {
            scale,
            min,
            error: add(error),
            codes: add(codes),
            codes_squared: add(squared),
            codes_times_x: add(times),
        })
    }

    /// The line closest to the group's elements at the present codes; None where all codes are one.
    fn refined(&self, group: &[f32; GROUP], sum: f32) -> Option<Self> {
        let n = GROUP as f32;
        let determinant = n * self.codes_squared - self.codes * self.codes;
        if determinant <= 0.0 {
            return None;
        }
        let scale = (n * self.codes_times_x - self.codes * sum) / determinant;
        Self::new(group, scale, (sum - scale * self.codes) / n)
    }

    fn write_codes(&self, group: &[f32; GROUP], codes: &mut [i8; GROUP]) {
        let (inverse, min) = (inverse(self.scale), self.min.to_f32());
        for (out, &x) in codes.iter_mut().zip(group) {
            *out = code(x, min, inverse) as i8;
        }
    }
}

fn code(x: f32, min: f32, inverse: f32) -> f32 {
    round(((x - min) * inverse).clamp(0.0, INT4_MAX))
}

/// Nearest whole number (half to even) of a small one, in two additions: `f32::round` does not vectorise on the baseline
/// x86 target.
fn round(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: the last bit of a sum with it is worth 1
    (x + SHIFT) - SHIFT
}

/// Zero for a zero scale: every code is then zero.
fn inverse(scale: f16) -> f32 {
    let inverse = scale.to_f32().recip();
    if inverse.is_finite() { inverse } else { 0.0 }
}

fn finite(value: f32) -> Option<f16> {
    Some(f16::from_f32(value)).filter(|half| half.is_finite())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn int4_values(group: &[f32; GROUP], effort: Effort) -> Option<[f32; GROUP]> {
        let mut codes = [0; GROUP];
        let (scale, min) = int4(group, &mut codes, effort)?;
        assert!(codes.iter().all(|code| (0..=15).contains(code)));
        Some(codes.map(|code| scale.to_f32() * f32::from(code) + min.to_f32()))
    }

    fn squared_error(a: &[f32; GROUP], b: &[f32; GROUP]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    fn group() -> impl Strategy<Value = [f32; GROUP]> {
        (prop::array::uniform32(-1.0f32..1.0), -12i32..12, 0.0f32..3.0).prop_map(|(xs, exponent, power)| {
            // A power above one makes tails heavy, which is where the search matters.
            xs.map(|x| x.signum() * x.abs().powf(1.0 + power) * 2f32.powi(exponent))
        })
    }

    proptest! {
        #[test]
        fn int8_is_within_half_a_step(group in group()) {
            let mut codes = [0; GROUP];
            let scale = int8(&group, &mut codes).unwrap().to_f32();
            // Half a step, and what rounding the scale to f16 (subnormal below 6e-5) can move the largest code by.
            let slack = 127.0 * f32::from(f16::EPSILON) * scale + 127.0 * 2f32.powi(-25);
            for (x, code) in group.iter().zip(codes) {
                prop_assert!((x - scale * f32::from(code)).abs() <= 0.5 * scale + slack, "{x} {code} {scale}");
            }
        }

        #[test]
        fn searched_int4_is_never_worse_than_the_plain_range(group in group()) {
            let plain = squared_error(&group, &int4_values(&group, Effort::Plain).unwrap());
            let searched = squared_error(&group, &int4_values(&group, Effort::Search).unwrap());
            // Candidates are compared by f32 sums; their rounding may tip a tie.
            prop_assert!(searched <= plain * (1.0 + 1e-5) + 1e-30, "{searched} {plain}");
        }

        #[test]
        fn a_group_on_an_int4_grid_comes_back_exactly(
            codes in prop::array::uniform32(0u8..16), scale in 1u16..0x4C00, min in -8.0f32..8.0,
        ) {
            let mut codes = codes;
            (codes[3], codes[17]) = (0, 15);
            // Scales of normal f16s, the minimum a multiple of them: f32 then holds every value exactly.
            let scale = f16::from_bits(scale.max(0x0400)).to_f32();
            let min = f16::from_f32(scale * min.round()).to_f32();
            let group = codes.map(|code| scale * f32::from(code) + min);
            prop_assert_eq!(int4_values(&group, Effort::Search).unwrap(), group);
        }
    }

    #[test]
    fn constant_and_zero_groups_come_back_exactly() {
        for value in [0.0, 1.0, -0.375] {
            assert_eq!(int4_values(&[value; GROUP], Effort::Search), Some([value; GROUP]));
        }
        let mut codes = [1; GROUP];
        assert_eq!(int8(&[0.0; GROUP], &mut codes), Some(f16::ZERO));
        assert_eq!(codes, [0; GROUP]);
    }

    #[test]
    fn what_f16_cannot_hold_is_refused() {
        let mut group = [0.0; GROUP];
        group[5] = 1e7;
        assert_eq!(int8(&group, &mut [0; GROUP]), None);
        group[5] = -1e7;
        assert_eq!(int4(&group, &mut [0; GROUP], Effort::Search), None);
        group[5] = f32::MAX;
        group[6] = f32::MIN;
        assert_eq!(int4(&group, &mut [0; GROUP], Effort::Search), None);
    }
}
