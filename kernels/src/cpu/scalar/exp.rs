//! The exponential that softmax and activations share.
//!
//! exp(x) = 2^n * exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2; ln 2 is taken off in two parts so that r keeps
//! its last bits, and exp(r) is the degree-6 polynomial of Cephes' `expf` (Moshier). At most 2 units in the last place
//! from the true value (tested over the whole range). Below -87.33 the result is 0: no subnormal is ever made, they are
//! slow and weigh nothing. Above 88.37 it is infinite. NaN stays NaN.

/// 1 / ln 2.
pub(crate) const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// Upper part of ln 2: few bits, so that its product with n is exact.
pub(crate) const LN_2_HIGH: f32 = 0.693_359_4;
/// What is missing to ln 2.
pub(crate) const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Below this the result is 0 (just above the logarithm of the smallest normal number).
pub(crate) const LOWEST: f32 = -87.336_54;
/// Above this the result is infinite (2^127.5, so that 2^n is a number).
pub(crate) const HIGHEST: f32 = 88.376_26;
/// Coefficients, highest power first; r^2 * polynomial + r + 1.
pub(crate) const POLYNOMIAL: [f32; 6] = [1.987_569_2e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];

/// exp(x), see the head. Inlined, so that it is compiled with its caller's instructions.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let n = (x * LOG2_E).round_ties_even();
    let r = (-n).mul_add(LN_2_LOW, (-n).mul_add(LN_2_HIGH, x));
    let polynomial = POLYNOMIAL[1..].iter().fold(POLYNOMIAL[0], |sum, &coefficient| sum.mul_add(r, coefficient));
    let fraction = polynomial.mul_add(r * r, r) + 1.0;
    let power = f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23);
    if x < LOWEST {
        0.0
    } else if x > HIGHEST {
        f32::INFINITY
    } else {
        fraction * power
    }
}

/// tanh(x) = 1 - 2 / (exp(2 x) + 1), for score caps: absolute error below 2^-22. Inlined as `exp` is.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(x + x) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Units in the last place that `exp` may be away, see the head.
    const MAX_ULPS: f64 = 2.0;

    #[test]
    fn exp_is_within_two_units_of_the_truth() {
        let mut worst = 0.0_f64;
        // Miri interprets, some thousand times slower.
        for i in (-8_730_000..=8_837_000).step_by(if cfg!(miri) { 40_009 } else { 1 }) {
            let x = i as f32 * 1e-5;
            let truth = f64::from(x).exp();
            let unit = f64::from(f32::from_bits((truth as f32).to_bits() + 1)) - f64::from(truth as f32);
            worst = worst.max((f64::from(exp(x)) - truth).abs() / unit);
        }
        assert!(worst <= MAX_ULPS, "{worst} units");
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!([exp(f32::NEG_INFINITY), exp(-1e30), exp(-88.0)], [0.0; 3]);
        assert_eq!([exp(f32::INFINITY), exp(1e30), exp(89.0)], [f32::INFINITY; 3]);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(LOWEST).is_normal() && exp(HIGHEST).is_normal());
    }

    #[test]
    fn tanh_is_close() {
        for i in (-20_000..=20_000).step_by(if cfg!(miri) { 101 } else { 1 }) {
            let x = i as f32 * 1e-3;
            assert!((f64::from(tanh(x)) - f64::from(x).tanh()).abs() < 2.0_f64.powi(-22), "{x}");
        }
        assert_eq!([tanh(f32::INFINITY), tanh(f32::NEG_INFINITY)], [1.0, -1.0]);
    }
}
