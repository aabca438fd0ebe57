//! A group's scale, and its minimum where it has one: the line through its codes with the least weighted squared error that
//! was found.
//!
//! Scales somewhat coarser and finer than the range asks for are tried, each followed by the weighted least-squares line
//! through its codes, as ggml's `make_qkx3_quants` and `make_qx_quants` do; the candidate with the smallest error wins. It
//! must not know how scales are kept, but that those of codes around zero are f16s. Its invariant: the result is never
//! further from the source, as errors are weighed, than the plain range (smallest to largest element), and repeats bit for bit on every machine:
//! sums are kept in lanes and added up in one order.

use bindery_kernels::GROUP;
use half::f16;

/// How long to look for a group's scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::weights) enum Effort {
    /// Smallest to largest element: for made-up weights, which have no quality to lose.
    Plain,
    /// Six scales: at load, too.
    Search,
    /// 21 scales: where a calibration has taken minutes anyway.
    Thorough,
}

impl Effort {
    /// By how many codes a scale is made finer than the range asks for, for each candidate.
    fn steps(self) -> &'static [f32] {
        match self {
            Self::Plain => &[],
            Self::Search => &FEW_STEPS,
            Self::Thorough => &MANY_STEPS,
        }
    }
}

/// On Gaussian numbers, all weighing the same, these leave 0.812 of the plain range's squared error with four bits and
/// minimums and 0.888 with four bits around zero; `MANY_STEPS` leave 0.804 and 0.886, in 2.3 times the time.
const FEW_STEPS: [f32; 5] = [-0.6, -0.3, 0.3, 0.6, 0.9];
const MANY_STEPS: [f32; 20] =
    [-1.0, -0.9, -0.8, -0.7, -0.6, -0.5, -0.4, -0.3, -0.2, -0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];

/// A group's numbers and what their squared errors weigh.
pub(super) struct Group<'a> {
    pub(super) values: &'a [f32; GROUP],
    pub(super) weights: [f32; GROUP],
    /// The largest code.
    pub(super) max_code: f32,
}

/// A scale and a minimum, what they cost, and the sums that the least-squares line needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line {
    pub(super) scale: f32,
    pub(super) min: f32,
    /// Weighted squared error of the group.
    pub(super) error: f32,
    codes: f32,
    codes_squared: f32,
    codes_times_x: f32,
}

const LANES: usize = 8;

/// What each number's error weighs by itself: `sqrt(mean square + x^2)`.
pub(super) fn weights_of(values: &[f32; GROUP]) -> [f32; GROUP] {
    let mut squares = [0.0f32; LANES];
    for values in values.as_chunks::<LANES>().0 {
        squares.iter_mut().zip(values).for_each(|(sum, x)| *sum += x * x);
    }
    let mean_square = add(squares) / GROUP as f32;
    // Of zeros, and of numbers whose squares f32 cannot hold, all weigh the same.
    if mean_square.is_normal() { values.map(|x| (mean_square + x * x).sqrt()) } else { [1.0; GROUP] }
}

impl Group<'_> {
    /// The best line found; none where it leaves the range of f16.
    pub(super) fn search(&self, effort: Effort) -> Option<Line> {
        let (low, high) = self.values.iter().fold((f32::MAX, f32::MIN), |(low, high), &x| (low.min(x), high.max(x)));
        let range = high - low;
        let mut best = self.line(range / self.max_code, low)?;
        if effort == Effort::Plain {
            return Some(best);
        }
        let sums = self.sums();
        best.consider(self.refined(&best, sums));
        for &steps in effort.steps() {
            // A step more than the range takes: its ends are clipped, or codes at an end stay unused.
            let line = self.line(range / (self.max_code + steps), low);
            best.consider(line.and_then(|line| self.refined(&line, sums)));
        }
        best.consider(self.refined(&best, sums));
        Some(best)
    }

    /// The best scale of codes around zero, `-max_code - 1..=max_code`; none where it leaves the range of f16.
    pub(super) fn search_around_zero(&self, effort: Effort) -> Option<Line> {
        // The element that is farthest from zero gets the code that is: the scale may be negative.
        let farthest =
            self.values.iter().fold(0.0f32, |farthest, &x| if x.abs() > farthest.abs() { x } else { farthest });
        let least = -self.max_code - 1.0;
        let mut best = self.around_zero(farthest / least)?;
        if effort == Effort::Plain {
            return Some(best);
        }
        for &steps in [0.0].iter().chain(effort.steps()) {
            let line = self.around_zero(farthest / (least - steps));
            best.consider(line);
            best.consider(line.and_then(|line| self.refined_around_zero(&line)));
        }
        best.consider(self.refined_around_zero(&best));
        Some(best)
    }

    /// Judges a scale of codes around zero.
    fn around_zero(&self, scale: f32) -> Option<Line> {
        let scale = finite(scale)?.to_f32();
        let (inverse, least) = (inverse(scale), -self.max_code - 1.0);
        let [mut error, mut squared, mut times] = [[0.0f32; LANES]; 3];
        let chunks = self.values.as_chunks::<LANES>().0.iter().zip(self.weights.as_chunks::<LANES>().0);
        for (values, weights) in chunks {
            for lane in 0..LANES {
                let (x, weight) = (values[lane], weights[lane]);
                let code = round((x * inverse).clamp(least, self.max_code));
                let off = scale * code - x;
                error[lane] += weight * off * off;
                squared[lane] += weight * code * code;
                times[lane] += weight * code * x;
            }
        }
        let (codes_squared, codes_times_x) = (add(squared), add(times));
        Some(Line { scale, min: 0.0, error: add(error), codes: 0.0, codes_squared, codes_times_x })
    }

    fn refined_around_zero(&self, line: &Line) -> Option<Line> {
        if line.codes_squared > 0.0 { self.around_zero(line.codes_times_x / line.codes_squared) } else { None }
    }

    /// The codes around zero of a scale.
    pub(super) fn write_codes_around_zero(&self, scale: f32, codes: &mut [i8; GROUP]) {
        let (inverse, least) = (inverse(scale), -self.max_code - 1.0);
        for (out, &x) in codes.iter_mut().zip(self.values) {
            *out = round((x * inverse).clamp(least, self.max_code)) as i8;
        }
    }

    /// The best minimum for a scale that is given, at the codes of `line`.
    pub(super) fn best_min(&self, line: &Line) -> f32 {
        let (weights, values) = self.sums();
        (values - line.scale * line.codes) / weights
    }

    /// Judges a scale and a minimum.
    pub(super) fn line(&self, scale: f32, min: f32) -> Option<Line> {
        // What f16s are multiplied with makes them no larger than they are.
        finite(scale).and(finite(min))?;
        let inverse = inverse(scale);
        let [mut error, mut codes, mut squared, mut times] = [[0.0f32; LANES]; 4];
        let chunks = self.values.as_chunks::<LANES>().0.iter().zip(self.weights.as_chunks::<LANES>().0);
        for (values, weights) in chunks {
            for lane in 0..LANES {
                let (x, weight) = (values[lane], weights[lane]);
                let code = code(x, min, inverse, self.max_code);
                let off = scale * code + min - x;
                error[lane] += weight * off * off;
                codes[lane] += weight * code;
                squared[lane] += weight * code * code;
                times[lane] += weight * code * x;
            }
        }
        Some(Line {
            scale,
            min,
            error: add(error),
            codes: add(codes),
            codes_squared: add(squared),
            codes_times_x: add(times),
        })
    }

    /// Of the weights, and of the weighted values.
    fn sums(&self) -> (f32, f32) {
        let [mut of_weights, mut of_values] = [[0.0f32; LANES]; 2];
        let chunks = self.values.as_chunks::<LANES>().0.iter().zip(self.weights.as_chunks::<LANES>().0);
        for (values, weights) in chunks {
            for lane in 0..LANES {
                of_weights[lane] += weights[lane];
                of_values[lane] += weights[lane] * values[lane];
            }
        }
        (add(of_weights), add(of_values))
    }

    /// The line closest to the values at the codes of `line`; none where all codes are one.
    fn refined(&self, line: &Line, (weights, values): (f32, f32)) -> Option<Line> {
        let determinant = weights * line.codes_squared - line.codes * line.codes;
        if determinant <= 0.0 {
            return None;
        }
        let scale = (weights * line.codes_times_x - line.codes * values) / determinant;
        self.line(scale, (values - scale * line.codes) / weights)
    }

    /// The codes of a scale and a minimum.
    pub(super) fn write_codes(&self, scale: f32, min: f32, codes: &mut [i8; GROUP]) {
        let inverse = inverse(scale);
        for (out, &x) in codes.iter_mut().zip(self.values) {
            *out = code(x, min, inverse, self.max_code) as i8;
        }
    }
}

impl Line {
    fn consider(&mut self, other: Option<Self>) {
        if let Some(other) = other.filter(|other| other.error < self.error) {
            *self = other;
        }
    }
}

fn add(lanes: [f32; LANES]) -> f32 {
    lanes.iter().sum()
}

fn code(x: f32, min: f32, inverse: f32, max_code: f32) -> f32 {
    round(((x - min) * inverse).clamp(0.0, max_code))
}

/// Nearest whole number (half to even) of a small one, in two additions: `f32::round` does not vectorise on the baseline
/// x86 target.
pub(super) fn round(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: the last bit of a sum with it is worth 1
    (x + SHIFT) - SHIFT
}

/// Zero for a scale of zero, or one too small to divide by: every code is then zero.
pub(super) fn inverse(scale: f32) -> f32 {
    let inverse = scale.recip();
    if inverse.is_finite() { inverse } else { 0.0 }
}

pub(super) fn finite(value: f32) -> Option<f16> {
    Some(f16::from_f32(value)).filter(|half| half.is_finite())
}
