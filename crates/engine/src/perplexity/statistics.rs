//! The arithmetic of perplexity and KL divergence: a row of logits to a figure, and figures to estimates.
//!
//! Everything is summed in f64 over whole rows: nothing is clipped, rounded to 16 bits or left out, so that two settings
//! that differ in the last bit of a float can be told apart. It must not know models, texts or windows. Its invariant: a
//! figure depends on its row alone, and an estimate on its figures alone, in their order.

/// What one setting's row of logits says about the token that came next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct ScoredToken {
    /// Negative log-likelihood, nats.
    pub(super) nll: f64,
    /// None where there is nothing to compare with.
    pub(super) against_base: Option<AgainstBase>,
}

/// The same row held against the base's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct AgainstBase {
    /// The base's negative log-likelihood, nats.
    pub(super) nll: f64,
    /// KL divergence of the row's distribution from the base's, nats: sum of p_base (ln p_base - ln p).
    pub(super) kl_divergence: f64,
    /// Both hold the same token for the likeliest (the lowest of equal ones).
    pub(super) is_same_top: bool,
}

/// A distribution over the vocabulary, by its logits.
#[derive(Clone, Copy)]
struct Distribution<'a> {
    logits: &'a [f32],
    /// ln of the sum of exp(logit).
    log_normalizer: f64,
    /// Index of the largest logit.
    top: usize,
}

impl<'a> Distribution<'a> {
    /// `None` where a logit is NaN or plus infinity, or all are minus infinity.
    fn new(logits: &'a [f32]) -> Option<Self> {
        let (mut top, mut max) = (0, f32::NEG_INFINITY);
        for (index, &logit) in logits.iter().enumerate() {
            if logit.is_nan() || logit == f32::INFINITY {
                return None;
            }
            if logit > max {
                (top, max) = (index, logit);
            }
        }
        if max == f32::NEG_INFINITY {
            return None;
        }
        let max = f64::from(max);
        let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
        Some(Self { logits, log_normalizer: max + sum.ln(), top })
    }

    fn nll(self, token: usize) -> f64 {
        self.log_normalizer - f64::from(self.logits[token])
    }

    /// From `base` to `self`, nats.
    fn kl_divergence_from(self, base: Self) -> f64 {
        let offset = self.log_normalizer - base.log_normalizer;
        let terms = self.logits.iter().zip(base.logits).map(|(&logit, &base_logit)| {
            let base_probability = (f64::from(base_logit) - base.log_normalizer).exp();
            // A token that the base excludes adds nothing, whatever the other makes of it.
            if base_probability == 0.0 {
                return 0.0;
            }
            base_probability * (f64::from(base_logit) - f64::from(logit) + offset)
        });
        terms.sum()
    }
}

/// Scores `token` by a row of logits, and the row against the base's where there is one (of equal length).
/// `None` where a row is no distribution: a logit is NaN or plus infinity.
pub(super) fn score(logits: &[f32], base: Option<&[f32]>, token: usize) -> Option<ScoredToken> {
    let own = Distribution::new(logits)?;
    let against_base = match base {
        Some(base) => {
            let base = Distribution::new(base)?;
            Some(AgainstBase {
                nll: base.nll(token),
                kl_divergence: own.kl_divergence_from(base),
                is_same_top: own.top == base.top,
            })
        }
        None => None,
    };
    Some(ScoredToken { nll: own.nll(token), against_base })
}

/// A figure with its standard error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The figure.
    pub value: f64,
    /// Its standard error, as if tokens were independent of each other.
    pub standard_error: f64,
}

impl Estimate {
    /// The mean of at least two values.
    fn mean(values: impl Iterator<Item = f64> + Clone) -> Self {
        let count = values.clone().count() as f64;
        let mean = values.clone().sum::<f64>() / count;
        let variance = values.map(|value| (value - mean).powi(2)).sum::<f64>() / count;
        Self { value: mean, standard_error: (variance / (count - 1.0)).sqrt() }
    }

    /// The exponential, its error to first order.
    fn exp(self) -> Self {
        let value = self.value.exp();
        Self { value, standard_error: value * self.standard_error }
    }

    /// The root, its error to first order; of nothing, nothing.
    fn sqrt(self) -> Self {
        let value = self.value.sqrt();
        let standard_error = if value == 0.0 { 0.0 } else { 0.5 / value * self.standard_error };
        Self { value, standard_error }
    }
}

/// How values are spread, beside their mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Of all values.
    pub mean: Estimate,
    /// The least.
    pub min: f64,
    /// Half of the values are below it; between two values by straight line, as all percentiles here.
    pub median: f64,
    /// 90 % are below it.
    pub p90: f64,
    /// 95 % are below it.
    pub p95: f64,
    /// 99 % are below it.
    pub p99: f64,
    /// 99.9 % are below it.
    pub p99_9: f64,
    /// The greatest.
    pub max: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64> + Clone) -> Self {
        let mean = Estimate::mean(values.clone());
        let mut sorted: Vec<f64> = values.collect();
        sorted.sort_unstable_by(f64::total_cmp);
        let at = |fraction| percentile(&sorted, fraction);
        Self {
            mean,
            min: at(0.0),
            median: at(0.5),
            p90: at(0.9),
            p95: at(0.95),
            p99: at(0.99),
            p99_9: at(0.999),
            max: at(1.0),
        }
    }
}

/// Of sorted values, at least one: `fraction` of the way from the first to the last, between two values by straight line.
fn percentile(sorted: &[f64], fraction: f64) -> f64 {
    let place = fraction * (sorted.len() - 1) as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    let share = place - below as f64;
    // Not a weighted sum: of two equal values that could differ in the last bit.
    sorted[below] + share * (sorted[above] - sorted[below])
}

/// How far a setting is from its base, by what llama-perplexity reports under the same names.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// The base's perplexity over the same tokens.
    pub base_perplexity: Estimate,
    /// ln(perplexity / the base's): the mean difference of the log-likelihoods. Its error is far below the perplexities'
    /// own, since both are taken over the same tokens.
    pub ln_perplexity_ratio: Estimate,
    /// perplexity / the base's
    pub perplexity_ratio: Estimate,
    /// KL divergence from the base, nats a token.
    pub kl_divergence: Spread,
    /// Share of tokens before which both hold the same token for the likeliest.
    pub same_top: Estimate,
    /// Probability of the token that came, less the base's.
    pub mean_delta_p: Estimate,
    /// Root of the mean square of that difference.
    pub rms_delta_p: Estimate,
}

/// Perplexity of at least two tokens.
pub(super) fn perplexity(tokens: &[ScoredToken]) -> Estimate {
    Estimate::mean(tokens.iter().map(|token| token.nll)).exp()
}

/// Of at least two tokens; `None` where one of them was held against nothing.
pub(super) fn compare(tokens: &[ScoredToken]) -> Option<Comparison> {
    let pairs: Option<Vec<(f64, AgainstBase)>> =
        tokens.iter().map(|token| Some((token.nll, token.against_base?))).collect();
    let pairs = pairs?;
    let each = || pairs.iter();
    let delta_p = || each().map(|(nll, base)| (-nll).exp() - (-base.nll).exp());
    let ln_perplexity_ratio = Estimate::mean(each().map(|(nll, base)| nll - base.nll));
    Some(Comparison {
        base_perplexity: Estimate::mean(each().map(|(_, base)| base.nll)).exp(),
        ln_perplexity_ratio,
        perplexity_ratio: ln_perplexity_ratio.exp(),
        kl_divergence: Spread::of(each().map(|(_, base)| base.kl_divergence)),
        same_top: Estimate::mean(each().map(|(_, base)| f64::from(u8::from(base.is_same_top)))),
        mean_delta_p: Estimate::mean(delta_p()),
        rms_delta_p: Estimate::mean(delta_p().map(|delta| delta * delta)).sqrt(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Softmax by its definition: no maximum taken off, no logarithm kept.
    fn naive_softmax(logits: &[f32]) -> Vec<f64> {
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        logits.iter().map(|&logit| f64::from(logit).exp() / sum).collect()
    }

    fn close(actual: f64, expected: f64) -> bool {
        (actual - expected).abs() <= 1e-11 * (1.0 + expected.abs())
    }

    /// Negative log-likelihoods of both, KL divergence, same top token.
    type Drawn = (f64, f64, f64, bool);

    proptest! {
        #[test]
        fn a_row_agrees_with_the_definitions(
            rows in prop::collection::vec((-30.0_f32..30.0, -30.0_f32..30.0), 1..300),
            token in any::<prop::sample::Index>(),
        ) {
            let (logits, base): (Vec<f32>, Vec<f32>) = rows.into_iter().unzip();
            let token = token.index(logits.len());
            let (p, q) = (naive_softmax(&base), naive_softmax(&logits));
            let scored = score(&logits, Some(&base), token).unwrap();
            let against = scored.against_base.unwrap();
            prop_assert!(close(scored.nll, -q[token].ln()));
            prop_assert!(close(against.nll, -p[token].ln()));
            let naive: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
            prop_assert!(close(against.kl_divergence, naive), "{} {naive}", against.kl_divergence);
            let top = |row: &[f64]| (0..row.len()).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
            prop_assert_eq!(against.is_same_top, top(&p) == top(&q));
            prop_assert_eq!(score(&logits, None, token).unwrap().nll, scored.nll);
        }

        #[test]
        fn estimates_agree_with_sums_of_squares_and_covariances(
            values in prop::collection::vec((0.0_f64..9.0, 0.0_f64..9.0, 0.0_f64..2.0, any::<bool>()), 2..200),
        ) {
            let tokens: Vec<ScoredToken> = values
                .iter()
                .map(|&(nll, base_nll, kl_divergence, is_same_top)| ScoredToken {
                    nll,
                    against_base: Some(AgainstBase { nll: base_nll, kl_divergence, is_same_top }),
                })
                .collect();
            let n = values.len() as f64;
            let mean = |of: fn(&Drawn) -> f64| values.iter().map(of).sum::<f64>() / n;
            // As llama-perplexity computes them.
            let variance = |a: f64, of_square: f64| ((of_square - a * a) / (n - 1.0)).max(0.0);
            let (a, b) = (mean(|v| v.0), mean(|v| v.1));
            let (var_a, var_b) = (variance(a, mean(|v| v.0 * v.0)), variance(b, mean(|v| v.1 * v.1)));
            let covariance = (mean(|v| v.0 * v.1) - a * b) / (n - 1.0);

            let comparison = compare(&tokens).unwrap();
            let near = |estimate: Estimate, value: f64, variance: f64| {
                close(estimate.value, value) && (estimate.standard_error.powi(2) - variance).abs() < 1e-9 * (1.0 + variance)
            };
            prop_assert!(near(perplexity(&tokens), a.exp(), var_a * (2.0 * a).exp()));
            prop_assert!(near(comparison.base_perplexity, b.exp(), var_b * (2.0 * b).exp()));
            prop_assert!(near(comparison.ln_perplexity_ratio, a - b, var_a + var_b - 2.0 * covariance));
            prop_assert!(close(comparison.perplexity_ratio.value, a.exp() / b.exp()));
            let same = mean(|v| f64::from(u8::from(v.3)));
            prop_assert!(near(comparison.same_top, same, same * (1.0 - same) / (n - 1.0)));
            let delta: fn(&Drawn) -> f64 = |v| (-v.0).exp() - (-v.1).exp();
            prop_assert!(close(comparison.mean_delta_p.value, mean(delta)));
            prop_assert!(close(comparison.rms_delta_p.value.powi(2), mean(|v| ((-v.0).exp() - (-v.1).exp()).powi(2))));

            let spread = comparison.kl_divergence;
            let mut sorted: Vec<f64> = values.iter().map(|v| v.2).collect();
            sorted.sort_unstable_by(f64::total_cmp);
            prop_assert_eq!((spread.min, spread.max), (sorted[0], sorted[sorted.len() - 1]));
            let middle = sorted.len() / 2;
            let median = if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) };
            prop_assert!(close(spread.median, median));
            let ascending = [spread.min, spread.median, spread.p90, spread.p95, spread.p99, spread.p99_9, spread.max];
            prop_assert!(ascending.is_sorted());
        }
    }

    #[test]
    fn percentiles_lie_on_straight_lines_between_values() {
        let sorted: Vec<f64> = (0..=1000).map(f64::from).collect();
        for (fraction, expected) in [(0.0, 0.0), (0.5, 500.0), (0.95, 950.0), (0.999, 999.0), (1.0, 1000.0)] {
            assert!(close(percentile(&sorted, fraction), expected), "{fraction}");
        }
        assert!(close(percentile(&[1.0, 2.0, 4.0], 0.75), 3.0));
        assert_eq!(percentile(&[7.0], 0.9), 7.0);
    }

    /// The logits of real models differ by less than an f32's steps near 30; what is the same must not seem to differ.
    #[test]
    fn equal_rows_do_not_diverge_and_shifted_ones_hardly() {
        let row: Vec<f32> = (0..49_152_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as f32 / 200.0).collect();
        let same = score(&row, Some(&row), 5).unwrap().against_base.unwrap();
        assert_eq!((same.kl_divergence, same.is_same_top), (0.0, true));
        let shifted: Vec<f32> = row.iter().map(|logit| logit + 64.0).collect();
        let shifted = score(&shifted, Some(&row), 5).unwrap().against_base.unwrap();
        assert!(shifted.kl_divergence.abs() < 1e-9, "{}", shifted.kl_divergence);
    }

    #[test]
    fn what_is_no_distribution_is_none_and_excluded_tokens_are_fine() {
        let good = [0.0, 1.0, f32::NEG_INFINITY];
        for bad in [[f32::NAN, 0.0, 0.0], [0.0, f32::INFINITY, 0.0], [f32::NEG_INFINITY; 3]] {
            assert_eq!(score(&bad, None, 0), None);
            assert_eq!(score(&good, Some(&bad), 0), None);
        }
        let against = score(&good, Some(&good), 1).unwrap().against_base.unwrap();
        assert_eq!(against.kl_divergence, 0.0);
        // The base allows what the other excludes: infinitely far.
        let against = score(&good, Some(&[0.0, 1.0, 2.0]), 1).unwrap().against_base.unwrap();
        assert_eq!(against.kl_divergence, f64::INFINITY);
    }

    #[test]
    fn without_a_base_there_is_no_comparison() {
        let token = ScoredToken { nll: 2.0, against_base: None };
        assert_eq!(compare(&[token, token]), None);
        assert_eq!(perplexity(&[token, token]), Estimate { value: 2.0_f64.exp(), standard_error: 0.0 });
    }
}
