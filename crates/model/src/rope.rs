//! Rotary angles: from a family's settings to the cosines and sines of a batch's positions.
//!
//! It knows positions and frequencies, not heads or tensors. Invariant: a row's angles depend on its position alone,
//! so that a token is rotated by the same bits in every batch.
//!
//! The arithmetic follows transformers' `modeling_rope_utils.py`: inverse frequencies rounded to f32, and the angle an
//! f32 product of position and frequency. (A product in f64 would be nearer the ideal, and further from the models'
//! training.) Frequencies are computed in f64 before that one rounding.

use std::f64::consts::TAU;

use crate::{
    config::{RopeScaling, Rotary},
    error::ModelError,
};

/// Cosines and sines of one batch at a time. Keeps its memory between batches.
#[derive(Debug)]
pub(crate) struct Rope {
    /// One a rotated pair, `[dim / 2]`.
    inverse_frequencies: Vec<f32>,
    /// `[rows, dim / 2]` of the batch last computed.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    /// Fails where the file's own divisors do not match the rotated width.
    pub(crate) fn new(rotary: &Rotary) -> Result<Self, ModelError> {
        let inverse_frequencies = inverse_frequencies(rotary)?;
        Ok(Self { inverse_frequencies, cos: Vec::new(), sin: Vec::new() })
    }

    /// Computes the angles of `positions`, one row each.
    pub(crate) fn compute(&mut self, positions: &[u32]) {
        self.cos.clear();
        self.sin.clear();
        for &position in positions {
            for &frequency in &self.inverse_frequencies {
                let angle = f64::from(position as f32 * frequency);
                let (sin, cos) = angle.sin_cos();
                self.cos.push(cos as f32);
                self.sin.push(sin as f32);
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

fn inverse_frequencies(rotary: &Rotary) -> Result<Vec<f32>, ModelError> {
    let num_pairs = rotary.dim / 2;
    let base = f64::from(rotary.base);
    let as_trained = (0..num_pairs).map(|pair| base.powf(-((2 * pair) as f64 / rotary.dim as f64)));
    Ok(match &rotary.scaling {
        RopeScaling::None => as_trained.map(|frequency| frequency as f32).collect(),
        RopeScaling::Linear { factor } => as_trained.map(|frequency| (frequency / f64::from(*factor)) as f32).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let scale = Llama3 {
                factor: f64::from(*factor),
                low: f64::from(*low_freq_factor),
                high: f64::from(*high_freq_factor),
                original: *original_max_position_embeddings as f64,
            };
            as_trained.map(|frequency| scale.apply(frequency) as f32).collect()
        }
        RopeScaling::LongRope { .. } | RopeScaling::Dynamic { .. } | RopeScaling::Yarn { .. } => {
            return Err(ModelError::Unsupported("this rotary scaling is not computed yet".into()));
        }
        RopeScaling::Factors(divisors) => {
            if divisors.len() != num_pairs {
                return Err(ModelError::Unsupported(format!(
                    "the file gives {} rotary factors for {num_pairs} rotated pairs a head: convert the model again",
                    divisors.len()
                )));
            }
            as_trained.zip(divisors).map(|(frequency, &divisor)| (frequency / f64::from(divisor)) as f32).collect()
        }
    })
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
    use crate::config::RopeStyle;

    fn rotary(dim: usize, base: f32, scaling: RopeScaling) -> Rotary {
        Rotary { style: RopeStyle::Neox, dim, base, scaling }
    }

    fn check_frequencies(rotary: &Rotary, expected: &[f64]) {
        let frequencies = inverse_frequencies(rotary).unwrap();
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

    #[test]
    fn factors_of_another_width_are_refused() {
        let error = Rope::new(&rotary(8, 10_000.0, RopeScaling::Factors(vec![1.0; 3]))).unwrap_err();
        assert!(error.to_string().contains("3 rotary factors for 4"), "{error}");
    }

    #[test]
    fn a_row_depends_on_its_position_alone() {
        let mut rope = Rope::new(&rotary(4, 100.0, RopeScaling::None)).unwrap();
        rope.compute(&[5]);
        let alone = (rope.cos().to_vec(), rope.sin().to_vec());
        rope.compute(&[0, 5, 4_000_000_000]);
        assert_eq!(rope.cos()[..2], [1.0, 1.0]);
        assert_eq!(rope.sin()[..2], [0.0, 0.0]);
        assert_eq!((rope.cos()[2..4].to_vec(), rope.sin()[2..4].to_vec()), alone);
        assert_eq!(alone.0, [5.0_f64.cos() as f32, f64::from(5.0_f32 * 0.1_f32).cos() as f32]);
        assert!(rope.cos().iter().chain(rope.sin()).all(|value| value.abs() <= 1.0));
    }
}
