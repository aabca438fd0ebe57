//! Rotary angles: from a family's settings to the cosines and sines of a batch's positions.
//!
//! It knows positions, frequencies and how long a request is, not heads or tensors. Invariant: a row's angles depend on its
//! position and its request's `rope_len` alone, so that a token is rotated by the same bits in every batch.
//!
//! The arithmetic follows transformers' `modeling_rope_utils.py`: inverse frequencies rounded to f32, and the angle an
//! f32 product of position and frequency. (A product in f64 would be nearer the ideal, and further from the models'
//! training.) Frequencies are computed in f64 before that one rounding.
//!
//! # Frequencies that depend on a request's length
//!
//! Under LongRoPE and dynamic scaling a token is rotated by frequencies that depend on how long its request is. transformers
//! takes them from the whole sequence that it is given; so a request must not mix keys of two kinds, whatever the chunks in
//! which it is computed. [`RopeRegimes`] says which lengths share their frequencies: as long as a request's known tokens
//! stay in one regime, its keys stay valid, and when they leave it, all of them are computed again.
//!
//! - LongRoPE has two regimes: up to the original length, and beyond it.
//! - Dynamic scaling has frequencies of its own for every length beyond the original. A request that is admitted beyond it
//!   takes those of its prompt's length, exactly as transformers computes such a prompt. While it grows, exactness would
//!   compute everything again with every token (transformers itself leaves the old keys as they are, which no whole
//!   sequence has). Here it takes the frequencies of a length that is ahead by less than a 64th of the original length, and
//!   changes them when it gets there: exact where the original length is below 128, and elsewhere a token costs some 64
//!   on average beyond the original length. The regime is a function of the prompt's and the present length alone, so that
//!   it is the same after a preemption.

use std::f64::consts::TAU;

use crate::{
    batch::ForwardBatch,
    config::{DecoderConfig, RopeScaling, Rotary},
    error::ModelError,
};

/// Regimes of dynamic scaling within one more original length.
const STEPS_OF_DYNAMIC: usize = 64;

/// Which lengths of a request share their rotary frequencies, for models where these depend on the length; see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeRegimes {
    original: usize,
    kind: RegimeKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RegimeKind {
    LongRope,
    Dynamic,
}

impl RopeRegimes {
    /// LongRoPE's: up to `original` tokens, and beyond.
    pub fn long_rope(original: usize) -> Self {
        Self { original, kind: RegimeKind::LongRope }
    }

    /// Dynamic scaling's: up to `original` tokens, then by the prompt's length and in small steps from there.
    pub fn dynamic(original: usize) -> Self {
        Self { original, kind: RegimeKind::Dynamic }
    }

    /// None where no layer's frequencies depend on the length. Refuses what has no one answer: rotary embeddings that
    /// change at different lengths.
    pub fn of(config: &DecoderConfig) -> Result<Option<Self>, ModelError> {
        let rotaries = config.rotaries.iter().enumerate();
        let rotaries = rotaries.filter(|&(index, _)| config.uses_rotary(index)).map(|(_, rotary)| rotary);
        let mut regimes = rotaries.filter_map(|rotary| match &rotary.scaling {
            RopeScaling::LongRope { original_max_position_embeddings: original, .. } => {
                Some(Self::long_rope(*original))
            }
            RopeScaling::Dynamic { original_max_position_embeddings: original, .. } => Some(Self::dynamic(*original)),
            RopeScaling::None
            | RopeScaling::Linear { .. }
            | RopeScaling::Llama3 { .. }
            | RopeScaling::Factors(_)
            | RopeScaling::Yarn { .. } => None,
        });
        let first = regimes.next();
        if let Some(other) = regimes.find(|regime| Some(*regime) != first) {
            return Err(ModelError::Unsupported(format!(
                "{}: rotary embeddings of one model change with a request's length in two ways, {first:?} and {other:?}",
                config.architecture
            )));
        }
        Ok(first)
    }

    /// What a batch says of a request ([`crate::BatchSequence::rope_len`]): 0 up to the original length, and beyond it the
    /// length whose frequencies its tokens have. `num_known_tokens` counts prompt and sampled tokens, computed or not.
    /// Where the answer differs from that for fewer known tokens, what was computed before must be computed again.
    pub fn rope_len(&self, num_prompt_tokens: usize, num_known_tokens: usize) -> usize {
        if num_known_tokens <= self.original {
            return 0;
        }
        match self.kind {
            RegimeKind::LongRope => self.original + 1,
            RegimeKind::Dynamic => {
                let first = num_prompt_tokens.max(self.original);
                let step = (self.original / STEPS_OF_DYNAMIC).max(1);
                first + num_known_tokens.saturating_sub(first).div_ceil(step).saturating_mul(step)
            }
        }
    }
}

/// Cosines and sines of one batch at a time. Keeps its memory between batches.
#[derive(Debug)]
pub(crate) struct Rope {
    frequencies: Frequencies,
    num_pairs: usize,
    /// Cosines and sines are multiplied by this, up to the length of `Frequencies::LongRope` and beyond it.
    factors: [f32; 2],
    /// `[rows, dim / 2]` of the batch last computed.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Inverse frequencies, one a rotated pair.
#[derive(Debug)]
enum Frequencies {
    /// Whatever the length.
    Fixed(Vec<f32>),
    /// Two sets.
    LongRope { short: Vec<f32>, long: Vec<f32>, original: usize },
    /// Made when a length beyond the original comes up.
    Dynamic { rotary: Rotary, factor: f64, original: usize, within: Vec<f32>, beyond: Vec<f32>, beyond_len: usize },
}

impl Frequencies {
    /// Whether a request with this `rope_len` takes the second of two sets.
    fn is_long(&self, rope_len: usize) -> bool {
        matches!(self, Self::LongRope { original, .. } if rope_len > *original)
    }

    /// Of a request with this `rope_len`.
    fn of(&mut self, rope_len: usize) -> &[f32] {
        match self {
            Self::Fixed(frequencies) => frequencies,
            Self::LongRope { short, long, original } => {
                if rope_len > *original {
                    long
                } else {
                    short
                }
            }
            Self::Dynamic { rotary, factor, original, within, beyond, beyond_len } => {
                if rope_len <= *original {
                    return within;
                }
                if rope_len != *beyond_len {
                    let growth = *factor * rope_len as f64 / *original as f64 - (*factor - 1.0);
                    let dim = rotary.dim as f64;
                    let base = f64::from(rotary.base) * growth.powf(dim / (dim - 2.0));
                    beyond.clear();
                    beyond.extend(as_trained(rotary.dim, base).map(|frequency| frequency as f32));
                    *beyond_len = rope_len;
                }
                beyond
            }
        }
    }
}

impl Rope {
    /// Fails where the file's own divisors do not match the rotated width.
    pub(crate) fn new(rotary: &Rotary) -> Result<Self, ModelError> {
        let factors = match rotary.scaling {
            RopeScaling::LongRope { attention_factor, long_attention_factor, .. } => {
                [attention_factor, long_attention_factor]
            }
            RopeScaling::Yarn { attention_factor, .. } => [attention_factor; 2],
            _ => [1.0; 2],
        };
        let frequencies = frequencies(rotary)?;
        Ok(Self { frequencies, num_pairs: rotary.dim / 2, factors, cos: Vec::new(), sin: Vec::new() })
    }

    /// Computes the angles of a batch, one row a token. A checked batch.
    pub(crate) fn compute(&mut self, batch: &ForwardBatch) {
        self.cos.clear();
        self.sin.clear();
        // In one go: a batch no larger than one before allocates nothing.
        self.cos.reserve(batch.num_tokens() * self.num_pairs);
        self.sin.reserve(batch.num_tokens() * self.num_pairs);
        for sequence in &batch.sequences {
            let factor = self.factors[usize::from(self.frequencies.is_long(sequence.rope_len))];
            let frequencies = self.frequencies.of(sequence.rope_len);
            for &position in &batch.positions[sequence.rows.clone()] {
                for &frequency in frequencies {
                    let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                    self.cos.push(cos as f32 * factor);
                    self.sin.push(sin as f32 * factor);
                }
            }
        }
    }

    /// `[rows, dim / 2]`
    pub(crate) fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// `[rows, dim / 2]`
    pub(crate) fn sin(&self) -> &[f32] {
        &self.sin
    }
}

/// One for every rotated pair.
fn as_trained(dim: usize, base: f64) -> impl Iterator<Item = f64> {
    (0..dim / 2).map(move |pair| base.powf(-((2 * pair) as f64 / dim as f64)))
}

fn frequencies(rotary: &Rotary) -> Result<Frequencies, ModelError> {
    let as_trained = || as_trained(rotary.dim, f64::from(rotary.base));
    let fixed = |scaled: &mut dyn Iterator<Item = f64>| Frequencies::Fixed(scaled.map(|f| f as f32).collect());
    let divided = |divisors: &[f32]| {
        check_factors(divisors, rotary.dim / 2)?;
        let divided = as_trained().zip(divisors).map(|(frequency, &divisor)| frequency / f64::from(divisor));
        Ok(divided.map(|frequency| frequency as f32).collect::<Vec<_>>())
    };
    Ok(match &rotary.scaling {
        RopeScaling::None => fixed(&mut as_trained()),
        RopeScaling::Linear { factor } => fixed(&mut as_trained().map(|frequency| frequency / f64::from(*factor))),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let scale = Llama3 {
                factor: f64::from(*factor),
                low: f64::from(*low_freq_factor),
                high: f64::from(*high_freq_factor),
                original: *original_max_position_embeddings as f64,
            };
            fixed(&mut as_trained().map(|frequency| scale.apply(frequency)))
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_position_embeddings, truncate, .. } => {
            let yarn = Yarn {
                dim: rotary.dim as f64,
                base: f64::from(rotary.base),
                factor: f64::from(*factor),
                original: *original_max_position_embeddings as f64,
                truncate: *truncate,
            };
            let (low, high) = yarn.ramp(f64::from(*beta_fast), f64::from(*beta_slow));
            fixed(&mut as_trained().enumerate().map(|(pair, frequency)| yarn.apply(pair, frequency, low, high)))
        }
        RopeScaling::LongRope { short, long, original_max_position_embeddings: original, .. } => {
            Frequencies::LongRope { short: divided(short)?, long: divided(long)?, original: *original }
        }
        RopeScaling::Dynamic { factor, original_max_position_embeddings: original } => {
            if rotary.dim <= 2 || *original == 0 {
                return Err(ModelError::Unsupported(format!(
                    "dynamic rotary scaling of {} rotated elements from {original} tokens: it needs 4 and 1 or more",
                    rotary.dim
                )));
            }
            Frequencies::Dynamic {
                rotary: rotary.clone(),
                factor: f64::from(*factor),
                original: *original,
                within: as_trained().map(|frequency| frequency as f32).collect(),
                beyond: Vec::with_capacity(rotary.dim / 2),
                beyond_len: 0,
            }
        }
        RopeScaling::Factors(divisors) => Frequencies::Fixed(divided(divisors)?),
    })
}

fn check_factors(divisors: &[f32], num_pairs: usize) -> Result<(), ModelError> {
    if divisors.len() == num_pairs {
        return Ok(());
    }
    Err(ModelError::Unsupported(format!(
        "the file gives {} rotary factors for {num_pairs} rotated pairs a head: convert the model again",
        divisors.len()
    )))
}

/// YaRN's blend by number of rotations (transformers' `_compute_yarn_parameters`).
struct Yarn {
    dim: f64,
    base: f64,
    factor: f64,
    original: f64,
    truncate: bool,
}

impl Yarn {
    /// The pairs between which frequencies are blended.
    fn ramp(&self, beta_fast: f64, beta_slow: f64) -> (f64, f64) {
        let pair = |rotations: f64| self.dim * (self.original / (rotations * TAU)).ln() / (2.0 * self.base.ln());
        let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(self.dim - 1.0));
        // As there: no division by zero.
        (low, if low == high { high + 0.001 } else { high })
    }

    /// Kept below `low`, divided by the factor above `high`.
    fn apply(&self, pair: usize, frequency: f64, low: f64, high: f64) -> f64 {
        let stretched = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
        frequency / self.factor * stretched + frequency * (1.0 - stretched)
    }
}

/// LLaMA 3.1's scaling by wavelength (transformers' `_compute_llama3_parameters`).
struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    original: f64,
}

impl Llama3 {
    fn apply(&self, frequency: f64) -> f64 {
        let wavelength = TAU / frequency;
        if wavelength < self.original / self.high {
            return frequency;
        }
        if wavelength > self.original / self.low {
            return frequency / self.factor;
        }
        let smooth = (self.original / wavelength - self.low) / (self.high - self.low);
        (1.0 - smooth) * frequency / self.factor + smooth * frequency
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{batch::BatchSequence, config::RopeStyle};

    /// One sequence a position, each with a `rope_len`.
    fn batch(rows: &[(u32, usize)]) -> ForwardBatch {
        let sequence = |(row, &(position, rope_len)): (usize, &(u32, usize))| BatchSequence {
            rows: row..row + 1,
            block_table: 0..0,
            context_len: position as usize + 1,
            rope_len,
            adapter: None,
        };
        ForwardBatch {
            positions: rows.iter().map(|&(position, _)| position).collect(),
            tokens: vec![0; rows.len()],
            sequences: rows.iter().enumerate().map(sequence).collect(),
            ..ForwardBatch::default()
        }
    }

    fn rotary(dim: usize, base: f32, scaling: RopeScaling) -> Rotary {
        Rotary { style: RopeStyle::Neox, dim, base, scaling }
    }

    fn check_frequencies(rotary: &Rotary, expected: &[f64]) {
        check_frequencies_of(rotary, 0, expected);
    }

    fn check_frequencies_of(rotary: &Rotary, rope_len: usize, expected: &[f64]) {
        let mut frequencies = frequencies(rotary).unwrap();
        let frequencies = frequencies.of(rope_len);
        assert_eq!(frequencies.len(), expected.len());
        for (frequency, expected) in frequencies.iter().zip(expected) {
            assert!((f64::from(*frequency) / expected - 1.0).abs() < 1e-6, "{frequencies:?} is not {expected:?}");
        }
    }

    #[test]
    fn frequencies_fall_from_one_by_powers_of_the_base() {
        check_frequencies(&rotary(8, 10_000.0, RopeScaling::None), &[1.0, 0.1, 0.01, 0.001]);
        check_frequencies(&rotary(8, 10_000.0, RopeScaling::Linear { factor: 4.0 }), &[0.25, 0.025, 0.0025, 0.000_25]);
        check_frequencies(
            &rotary(8, 10_000.0, RopeScaling::Factors(vec![1.0, 1.0, 2.0, 8.0])),
            &[1.0, 0.1, 0.005, 0.000_125],
        );
        check_frequencies(&rotary(0, 10_000.0, RopeScaling::None), &[]);
    }

    #[test]
    fn llama3_keeps_short_waves_stretches_long_ones_and_blends_between() {
        // Wavelengths 6.28, 62.8, 628 and 6283 tokens against 8192/4 = 2048 (kept below) and 8192/1 (stretched above):
        // the last lies between, smooth = (8192 / 6283.19 - 1) / 3 = 0.101266.
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let blended = 0.001 * ((1.0 - 0.101_266) / 8.0 + 0.101_266);
        check_frequencies(&rotary(8, 10_000.0, scaling.clone()), &[1.0, 0.1, 0.01, blended]);
        // Base 10^8: wavelengths 6.28, 628, 62832, 6.28 million; the last two are stretched by 8.
        check_frequencies(&rotary(8, 1e8, scaling), &[1.0, 0.01, 0.000_1 / 8.0, 0.000_001 / 8.0]);
    }

    /// What transformers 5.23 gives (`ROPE_INIT_FUNCTIONS`) for 16 rotated elements.
    #[test]
    fn yarn_is_transformers_own() {
        let yarn = |base, factor, betas: (f32, f32), original_max_position_embeddings, truncate| {
            let ((beta_fast, beta_slow), attention_factor) = (betas, 1.3);
            let scaling = RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_max_position_embeddings,
                attention_factor,
                truncate,
            };
            rotary(16, base, scaling)
        };
        let truncated = yarn(10_000.0, 4.0, (32.0, 1.0), 1024, true);
        #[rustfmt::skip]
        check_frequencies(&truncated, &[
            1.0, 0.316_227_764, 0.081_250_004_5, 0.019_764_237_1,
            0.004_375_000_02, 0.000_790_569_466, 0.000_250_000_012, 7.905_694_66e-05,
        ]);
        #[rustfmt::skip]
        check_frequencies(&yarn(10_000.0, 4.0, (32.0, 1.0), 1024, false), &[
            1.0, 0.316_227_764, 0.085_398_636_8, 0.019_126_776_6,
            0.003_556_971_44, 0.000_790_569_466, 0.000_250_000_012, 7.905_694_66e-05,
        ]);
        #[rustfmt::skip]
        check_frequencies(&yarn(1e6, 8.0, (8.0, 2.0), 64, true), &[
            1.0, 0.022_228_492_4, 0.003_952_847_33, 0.000_702_926_656,
            0.000_125_000_006, 2.222_849_25e-05, 3.952_846_78e-06, 7.029_266_84e-07,
        ]);
        let mut rope = Rope::new(&truncated).unwrap();
        rope.compute(&batch(&[(0, 0), (3, 0)]));
        assert_eq!((rope.cos()[0], rope.sin()[0]), (1.3, 0.0));
        assert_eq!(rope.cos()[8], 3.0_f64.cos() as f32 * 1.3);
    }

    #[test]
    fn dynamic_frequencies_are_transformers_own_at_every_length() {
        let scaling = RopeScaling::Dynamic { factor: 2.0, original_max_position_embeddings: 64 };
        let dynamic = rotary(16, 10_000.0, scaling);
        let within: [f64; 8] = std::array::from_fn(|pair| 10_f64.powf(-(pair as f64) / 2.0));
        for len in [0, 64] {
            check_frequencies_of(&dynamic, len, &within);
        }
        #[rustfmt::skip]
        check_frequencies_of(&dynamic, 65, &[
            1.0, 0.314_840_704, 0.099_124_662_6, 0.031_208_477_9,
            0.009_825_699_03, 0.003_093_529_96, 0.000_973_969_174, 0.000_306_645_117,
        ]);
        #[rustfmt::skip]
        check_frequencies_of(&dynamic, 1000, &[
            1.0, 0.194_297_776, 0.037_751_622_5, 0.007_335_055_62,
            0.001_425_184_89, 0.000_276_910_228, 5.380_303_99e-05, 1.045_381_03e-05,
        ]);
    }

    #[test]
    fn longrope_takes_the_long_factors_beyond_the_original_length() {
        let scaling = RopeScaling::LongRope {
            short: (0_u8..8).map(|i| 1.0 + f32::from(i) * 0.1).collect(),
            long: (1_u8..=8).map(f32::from).collect(),
            original_max_position_embeddings: 64,
            attention_factor: 1.154_700_5,
            long_attention_factor: 1.154_700_5,
        };
        let long_rope = rotary(16, 10_000.0, scaling);
        #[rustfmt::skip]
        check_frequencies_of(&long_rope, 64, &[
            1.0, 0.287_479_758, 0.083_333_335_8, 0.024_325_214_3,
            0.007_142_857_18, 0.002_108_185_32, 0.000_624_999_986, 0.000_186_016_332,
        ]);
        #[rustfmt::skip]
        check_frequencies_of(&long_rope, 65, &[
            1.0, 0.158_113_882, 0.033_333_335_1, 0.007_905_694_66,
            0.002_000_000_09, 0.000_527_046_33, 0.000_142_857_141, 3.952_847_33e-05,
        ]);
        // Rows of one batch may be in different regimes.
        let mut rope = Rope::new(&long_rope).unwrap();
        rope.compute(&batch(&[(7, 65), (7, 0)]));
        let together = (rope.sin()[..8].to_vec(), rope.sin()[8..].to_vec());
        rope.compute(&batch(&[(7, 65)]));
        assert_eq!(rope.sin(), together.0);
        rope.compute(&batch(&[(7, 0)]));
        assert_eq!(rope.sin(), together.1);
        assert_ne!(together.0, together.1);
    }

    #[test]
    fn regimes_change_at_the_original_length_and_then_in_steps() {
        let long_rope = RopeRegimes::long_rope(64);
        for (prompt, known, expected) in [(1, 1, 0), (64, 64, 0), (64, 65, 65), (65, 65, 65), (900, 901, 65)] {
            assert_eq!(long_rope.rope_len(prompt, known), expected, "{prompt} {known}");
        }
        let dynamic = RopeRegimes::dynamic(256);
        let cases = [
            (10, 256, 0),
            (10, 257, 260),
            (256, 260, 260),
            (10, 261, 264),
            (300, 300, 300),
            (300, 301, 304),
            (300, 304, 304),
            (300, 305, 308),
        ];
        for (prompt, known, expected) in cases {
            assert_eq!(dynamic.rope_len(prompt, known), expected, "{prompt} {known}");
        }
        // Exact where the original length is short.
        for (prompt, known) in [(10, 33), (10, 50), (40, 40), (40, 41)] {
            assert_eq!(RopeRegimes::dynamic(32).rope_len(prompt, known), known);
        }
    }

    #[test]
    fn factors_of_another_width_are_refused() {
        let error = Rope::new(&rotary(8, 10_000.0, RopeScaling::Factors(vec![1.0; 3]))).unwrap_err();
        assert!(error.to_string().contains("3 rotary factors for 4"), "{error}");
    }

    #[test]
    fn a_row_depends_on_its_position_alone() {
        let mut rope = Rope::new(&rotary(4, 100.0, RopeScaling::None)).unwrap();
        rope.compute(&batch(&[(5, 0)]));
        let alone = (rope.cos().to_vec(), rope.sin().to_vec());
        rope.compute(&batch(&[(0, 0), (5, 0), (4_000_000_000, 0)]));
        assert_eq!(rope.cos()[..2], [1.0, 1.0]);
        assert_eq!(rope.sin()[..2], [0.0, 0.0]);
        assert_eq!((rope.cos()[2..4].to_vec(), rope.sin()[2..4].to_vec()), alone);
        assert_eq!(alone.0, [5.0_f64.cos() as f32, f64::from(5.0_f32 * 0.1_f32).cos() as f32]);
        assert!(rope.cos().iter().chain(rope.sin()).all(|value| value.abs() <= 1.0));
    }
}
