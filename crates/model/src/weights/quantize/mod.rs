//! Dense rows to codes, at load (`--quantize`) and ahead (`bindery quantize`).
//!
//! [`format_for`] says what a matrix becomes, [`RowQuantizer`] makes it, row by row; `search` finds a group's scale and
//! minimum. Three kinds are made. Eight bits: `scale * code`, codes -127 to 127, the scale set by the largest element. Four or
//! five bits where 256 divides the inputs: `scale * code + min` in groups of 32, scales and minimums six bits each that are
//! multiplied with f16s of 256 inputs. Four or five bits elsewhere: `scale * code` around zero. These have the bits of ggml's
//! Q8_0, Q4_K, Q5_K, Q4_0 and Q5_0; minimums with an f16 a group (Q4_1, 5 bits a weight) leave twice the error that codes
//! around zero would leave at the same size.
//!
//! It must not know files. Its invariant: what is made of a row depends on the row, the format, the weights of errors and
//! the effort alone, so a folder made ahead and a load that quantises agree bit for bit.

mod search;

use bindery_kernels::{CodeBits, CodeBook, GROUP, QuantFormat, QuantRow, SUPER_GROUP, Scaling};
use half::f16;

pub(super) use self::search::Effort;
use self::search::{Group, Line, finite, inverse, round};
use super::{LayerTensor, TensorRole};
use crate::Quantize;

/// What `Quantize::Int8` makes.
pub(crate) const INT8: QuantFormat =
    QuantFormat { bits: CodeBits::Eight, scaling: Scaling::Single, with_mins: false, book: CodeBook::Linear };
const FOUR: QuantFormat = QuantFormat { bits: CodeBits::Four, ..INT8 };
const FIVE: QuantFormat = QuantFormat { bits: CodeBits::Five, ..INT8 };
const FOUR_TWO_LEVEL: QuantFormat =
    QuantFormat { bits: CodeBits::Four, scaling: Scaling::TwoLevel, with_mins: true, book: CodeBook::Linear };
const FIVE_TWO_LEVEL: QuantFormat = QuantFormat { bits: CodeBits::Five, ..FOUR_TWO_LEVEL };

/// What matrices of `cols` inputs can become, a multiple of a group: 4.5, 5.5 and 8.5 bits a weight.
pub(super) fn formats(cols: usize) -> [QuantFormat; 3] {
    if cols.is_multiple_of(SUPER_GROUP) { [FOUR_TWO_LEVEL, FIVE_TWO_LEVEL, INT8] } else { [FOUR, FIVE, INT8] }
}

/// Whether a matrix stays dense: routers, which are tiny and decide much, and inputs that are no multiple of a group.
pub(super) fn stays_dense(role: TensorRole, cols: usize) -> bool {
    use LayerTensor as T;
    matches!(role, TensorRole::Layer(_, T::Router | T::SharedExpertGate)) || !cols.is_multiple_of(GROUP)
}

/// What a dense matrix of `cols` inputs becomes; none where it stays dense.
///
/// int4 is 4.5 bits a weight where 256 divides the inputs, and 5.5 where it does not (small models, which have the least to
/// spare) and for the sensitive: embedding, head and values. On SmolLM2-135M a fifth bit for the values, 3 % of the weights,
/// took a fifth off the KL divergence; down projections gained nothing by one, and eight bits for the tied head took off 8 %
/// for three bits of a fifth of the weights.
pub(super) fn format_for(role: TensorRole, cols: usize, quantize: Quantize) -> Option<QuantFormat> {
    use LayerTensor as T;
    if stays_dense(role, cols) {
        return None;
    }
    let [four, five, eight] = formats(cols);
    let is_sensitive = matches!(role, TensorRole::Embedding | TensorRole::Head | TensorRole::Layer(_, T::V));
    match quantize {
        Quantize::None => None,
        Quantize::Int8 => Some(eight),
        Quantize::Int4 if is_sensitive || !cols.is_multiple_of(SUPER_GROUP) => Some(five),
        Quantize::Int4 => Some(four),
    }
}

/// Share of the mean weight that every input's error weighs at least: a text in which an input was silent says little
/// about others.
const LEAST_WEIGHT: f32 = 0.01;

/// Rows of numbers to rows of codes.
#[derive(Clone, Debug)]
pub(super) struct RowQuantizer {
    pub(super) format: QuantFormat,
    effort: Effort,
    /// `[inputs]`: what the squared error of each weighs, one on average; none where all weigh the same.
    weights: Option<Vec<f32>>,
}

impl RowQuantizer {
    /// `format` is one of [`formats`], `importance` the mean square of each input.
    pub(super) fn new(format: QuantFormat, importance: Option<&[f32]>, effort: Effort) -> Self {
        let weights = importance.and_then(|squares| {
            let mean = squares.iter().map(|&square| f64::from(square)).sum::<f64>() / squares.len() as f64;
            let weight = |&square: &f32| (f64::from(square) / mean) as f32 + LEAST_WEIGHT;
            (mean.is_finite() && mean > 0.0).then(|| squares.iter().map(weight).collect())
        });
        Self { format, effort, weights }
    }

    /// Quantises a row of finite numbers, whole groups of them. None where a scale or minimum leaves the range of f16.
    pub(super) fn quantize(&self, values: &[f32], out: &mut QuantRow<'_>) -> Option<()> {
        match (self.format.bits, self.format.scaling) {
            (CodeBits::Eight, _) => {
                let groups = values.as_chunks::<GROUP>().0.iter().zip(out.codes.as_chunks_mut::<GROUP>().0);
                for ((group, codes), scale) in groups.zip(&mut *out.scales) {
                    *scale = int8(group, codes)?;
                }
            }
            (_, Scaling::Single) => {
                for index in 0..values.len() / GROUP {
                    let group = self.group(values, index);
                    let Line { scale, .. } = group.search_around_zero(self.effort)?;
                    out.scales[index] = f16::from_f32(scale);
                    group.write_codes_around_zero(scale, codes_of(out, index));
                }
            }
            // `formats` gives no third way.
            _ => {
                (0..values.len() / SUPER_GROUP).try_for_each(|index| self.two_levels(values, index, out))?;
            }
        }
        Some(())
    }

    /// Number `index` of the groups of a row. Errors of large numbers weigh somewhat more, as in ggml's quantisers: that left
    /// a tenth less KL divergence (0.305 instead of 0.343, SmolLM2-135M in 4.5 bits) for 2 % more squared error.
    fn group<'a>(&self, values: &'a [f32], index: usize) -> Group<'a> {
        let values = &values.as_chunks::<GROUP>().0[index];
        let mut weights = search::weights_of(values);
        if let Some(of_inputs) = &self.weights {
            let of_inputs = &of_inputs.as_chunks::<GROUP>().0[index];
            weights.iter_mut().zip(of_inputs).for_each(|(weight, of_input)| *weight *= of_input);
        }
        Group { values, weights, max_code: f32::from(*self.format.codes().end()) }
    }

    /// 256 inputs whose scales share an f16, and whose minimums share another.
    fn two_levels(&self, values: &[f32], index: usize, out: &mut QuantRow<'_>) -> Option<()> {
        const GROUPS: usize = SUPER_GROUP / GROUP;
        let mut lines = [(0.0, 0.0); GROUPS];
        for (i, line) in lines.iter_mut().enumerate() {
            let found = self.group(values, index * GROUPS + i).search(self.effort)?;
            *line = (found.scale, found.min);
        }
        let uppers = Uppers::of(&lines)?;
        (out.scales[index], out.mins[index]) = (uppers.scale, uppers.min);
        for (i, line) in lines.into_iter().enumerate() {
            let group_index = index * GROUPS + i;
            let group = self.group(values, group_index);
            let (sub_scale, sub_min) = uppers.subs(&group, line, self.effort)?;
            (out.sub_scales[group_index], out.sub_mins[group_index]) = (sub_scale, sub_min);
            let (scale, min) = uppers.times(sub_scale, sub_min);
            group.write_codes(scale, min, codes_of(out, group_index));
        }
        Some(())
    }
}

/// What sub-scales and sub-minimums reach to: six bits.
const MAX_SUB: f32 = 63.0;

/// The f16s that the scales and minimums of several groups share.
struct Uppers {
    scale: f16,
    min: f16,
}

impl Uppers {
    fn of(lines: &[(f32, f32)]) -> Option<Self> {
        let farthest = |far: f32, value: f32| if value.abs() > far.abs() { value } else { far };
        let scale = lines.iter().map(|line| line.0).fold(0.0, f32::max) / MAX_SUB;
        // Of the sign that the farthest has: nearly always below zero.
        let min = lines.iter().map(|line| line.1).fold(0.0, farthest) / MAX_SUB;
        Some(Self { scale: finite(scale)?, min: finite(min)? })
    }

    fn times(&self, sub_scale: i8, sub_min: i8) -> (f32, f32) {
        (self.scale.to_f32() * f32::from(sub_scale), self.min.to_f32() * f32::from(sub_min))
    }

    /// The pair closest to the group, among the neighbours of the line's own scale, each with the minimum that suits it.
    fn subs(&self, group: &Group<'_>, (scale, min): (f32, f32), effort: Effort) -> Option<(i8, i8)> {
        let sub_min = |min: f32| sub(min, self.min);
        let nearest = sub(scale, self.scale);
        let mut best = (nearest, sub_min(min));
        if effort == Effort::Plain {
            return Some(best);
        }
        let mut least = f32::INFINITY;
        for sub_scale in [nearest, nearest - 1, nearest + 1] {
            if !(0.0..=MAX_SUB).contains(&f32::from(sub_scale)) {
                continue;
            }
            let mut sub_min = sub_min(min);
            for _ in 0..2 {
                let (scale, min) = self.times(sub_scale, sub_min);
                let line = group.line(scale, min)?;
                if line.error < least {
                    (best, least) = ((sub_scale, sub_min), line.error);
                }
                sub_min = sub(group.best_min(&line), self.min);
            }
        }
        Some(best)
    }
}

fn sub(value: f32, upper: f16) -> i8 {
    round((value * inverse(upper.to_f32())).clamp(0.0, MAX_SUB)) as i8
}

const INT8_MAX: f32 = 127.0;

fn codes_of<'a>(out: &'a mut QuantRow<'_>, index: usize) -> &'a mut [i8; GROUP] {
    &mut out.codes.as_chunks_mut::<GROUP>().0[index]
}

/// Quantises a group of finite numbers. None where the scale leaves the range of f16.
pub(crate) fn int8(group: &[f32; GROUP], codes: &mut [i8; GROUP]) -> Option<f16> {
    let largest = group.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let scale = finite(largest / INT8_MAX)?;
    let inverse = inverse(scale.to_f32());
    for (code, x) in codes.iter_mut().zip(group) {
        *code = round((x * inverse).clamp(-INT8_MAX, INT8_MAX)) as i8;
    }
    Some(scale)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests; clippy only knows a plain cfg(test)")]
    use candle_core::{
        Device, Tensor,
        quantized::{GgmlDType, QTensor},
    };
    use proptest::prelude::*;

    use super::{super::native::RowBuffers, *};

    const ALL: [QuantFormat; 5] = [INT8, FOUR, FIVE, FOUR_TWO_LEVEL, FIVE_TWO_LEVEL];

    /// What a row becomes, in f32.
    fn rounded(row: &[f32], quantizer: &RowQuantizer) -> Option<Vec<f32>> {
        let mut buffers = RowBuffers::new(quantizer.format, row.len());
        quantizer.quantize(row, &mut buffers.as_row())?;
        let mut values = vec![0.0; row.len()];
        buffers.dequantize(quantizer.format, &mut values);
        Some(values)
    }

    fn error(row: &[f32], rounded: &[f32], weights: impl Fn(usize) -> f64) -> f64 {
        row.iter().zip(rounded).enumerate().map(|(i, (a, b))| weights(i) * f64::from(a - b).powi(2)).sum()
    }

    fn searched(format: QuantFormat, effort: Effort) -> RowQuantizer {
        RowQuantizer::new(format, None, effort)
    }

    /// Normal numbers by Box and Muller, and the same made heavy-tailed: divided by a chi of 4 degrees, Student's t.
    fn numbers(count: usize, with_tails: fn(f64, [f64; 4]) -> f64) -> Vec<f32> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut unit = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            ((state >> 33) as f64 + 0.5) / (1_u64 << 31) as f64
        };
        let mut normal = || (-2.0 * unit().ln()).sqrt() * (std::f64::consts::TAU * unit()).cos();
        (0..count).map(|_| (0.02 * with_tails(normal(), std::array::from_fn(|_| normal()))) as f32).collect()
    }

    fn normal(x: f64, _: [f64; 4]) -> f64 {
        x
    }

    fn student(x: f64, others: [f64; 4]) -> f64 {
        x / (others.iter().map(|other| other * other).sum::<f64>() / 4.0).sqrt()
    }

    fn row() -> impl Strategy<Value = Vec<f32>> {
        (prop::collection::vec(-1.0f32..1.0, SUPER_GROUP), -12i32..12, 0.0f32..3.0).prop_map(|(xs, exponent, power)| {
            // A power above one makes tails heavy, which is where the search matters.
            xs.iter().map(|x| x.signum() * x.abs().powf(1.0 + power) * 2f32.powi(exponent)).collect()
        })
    }

    proptest! {
        #[test]
        fn int8_is_within_half_a_step(row in row()) {
            let rounded = rounded(&row, &searched(INT8, Effort::Search)).unwrap();
            for (group, rounded) in row.chunks(GROUP).zip(rounded.chunks(GROUP)) {
                let scale = group.iter().fold(0.0f32, |largest, x| largest.max(x.abs())) / 127.0;
                // Half a step, and what rounding the scale to f16 (subnormal below 6e-5) can move the largest code by.
                let slack = 127.0 * f32::from(f16::EPSILON) * scale + 128.0 * 2f32.powi(-25);
                for (x, rounded) in group.iter().zip(rounded) {
                    prop_assert!((x - rounded).abs() <= 0.5 * scale + slack, "{x} {rounded} {scale}");
                }
            }
        }

        #[test]
        fn codes_around_zero_are_never_worse_than_the_plain_range(row in row()) {
            for format in [FOUR, FIVE] {
                let weights: Vec<f32> =
                    row.as_chunks::<GROUP>().0.iter().flat_map(search::weights_of).collect();
                let [plain, searched, thorough] = [Effort::Plain, Effort::Search, Effort::Thorough].map(|effort| {
                    let rounded = rounded(&row, &searched(format, effort)).unwrap();
                    error(&row, &rounded, |i| f64::from(weights[i]))
                });
                // Candidates are compared by f32 sums; their rounding may tip a tie.
                prop_assert!(searched.max(thorough) <= plain * (1.0 + 1e-5) + 1e-30, "{searched} {thorough} {plain}");
            }
        }

        #[test]
        fn a_group_on_a_grid_around_zero_comes_back_exactly(
            codes in prop::collection::vec(-16i8..16, GROUP), scale in 0x0400u16..0x4C00,
        ) {
            let mut codes = codes;
            codes[3] = -16;
            let scale = f16::from_bits(scale).to_f32();
            let row: Vec<f32> = codes.iter().map(|&code| scale * f32::from(code)).collect();
            prop_assert_eq!(rounded(&row, &searched(FIVE, Effort::Search)).unwrap(), row);
        }
    }

    /// The same bits as ggml's formats, whose error candle's port of its quantisers gives.
    #[test]
    fn no_format_leaves_more_error_than_ggmls_of_the_same_bits() {
        for (name, tails) in [("normal", normal as fn(f64, [f64; 4]) -> f64), ("student", student)] {
            let row = numbers(1 << 16, tails);
            for (format, theirs, bits) in [
                (INT8, GgmlDType::Q8_0, 8.5),
                (FOUR, GgmlDType::Q4_0, 4.5),
                (FIVE, GgmlDType::Q5_0, 5.5),
                (FOUR_TWO_LEVEL, GgmlDType::Q4K, 4.5),
                (FIVE_TWO_LEVEL, GgmlDType::Q5K, 5.5),
            ] {
                let ours = error(&row, &rounded(&row, &searched(format, Effort::Search)).unwrap(), |_| 1.0);
                let tensor = Tensor::from_slice(&row, (1, row.len()), &Device::Cpu).unwrap();
                let tensor = QTensor::quantize(&tensor, theirs).unwrap();
                let their_bits = tensor.storage_size_in_bytes() as f64 * 8.0 / row.len() as f64;
                assert!((their_bits - bits).abs() < 1e-3, "{theirs:?} {their_bits}");
                let values = tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let theirs_error = error(&row, &values, |_| 1.0);
                // int8 is the same rule; its scales are rounded before codes are found, not after.
                assert!(ours <= theirs_error * 1.0001, "{name} {format:?}: {ours}, {theirs:?} {theirs_error}");
            }
        }
    }

    #[test]
    fn errors_are_moved_to_where_they_weigh_little() {
        let row = numbers(SUPER_GROUP * 16, normal);
        let importance: Vec<f32> = (0..row.len()).map(|i| if i % 4 == 0 { 16.0 } else { 0.5 }).collect();
        for format in [FOUR, FIVE, FOUR_TWO_LEVEL, FIVE_TWO_LEVEL] {
            let weigh = |rounded: &[f32]| error(&row, rounded, |i| f64::from(importance[i]));
            let plain = weigh(&rounded(&row, &searched(format, Effort::Thorough)).unwrap());
            let weighted =
                weigh(&rounded(&row, &RowQuantizer::new(format, Some(&importance), Effort::Thorough)).unwrap());
            assert!(weighted < 0.9 * plain, "{format:?}: {weighted} {plain}");
        }
        // Weights that say nothing are as none.
        for nothing in [0.0, f32::INFINITY, f32::NAN] {
            let quantizer = RowQuantizer::new(FIVE, Some(&vec![nothing; row.len()]), Effort::Search);
            assert_eq!(rounded(&row, &quantizer), rounded(&row, &searched(FIVE, Effort::Search)));
        }
    }

    #[test]
    fn constant_and_zero_groups_come_back() {
        for format in ALL {
            for value in [0.0, 1.0, -0.375] {
                for row in rounded(&[value; SUPER_GROUP], &searched(format, Effort::Search)).unwrap() {
                    assert!((row - value).abs() <= 2e-3 * value.abs(), "{format:?} {value} {row}");
                }
            }
        }
    }

    #[test]
    fn what_f16_cannot_hold_is_refused() {
        for format in ALL {
            let mut row = [0.0; SUPER_GROUP];
            row[5] = -3e9;
            assert_eq!(rounded(&row, &searched(format, Effort::Search)), None, "{format:?}");
            (row[5], row[6]) = (f32::MAX, f32::MIN);
            assert_eq!(rounded(&row, &searched(format, Effort::Plain)), None, "{format:?}");
        }
    }
}
