//! The sampler against a naive twin (f64, everything sorted) and against what it promises.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const EOS: TokenId = TokenId(2);

/// One step of sampling as the documentation says it, in f64, with full sorts and no thought of speed.
mod naive {
    use super::*;

    pub(super) struct Twin {
        /// Probability of each token, 0 where it may not be drawn.
        pub(super) probabilities: Vec<f64>,
        /// How close a decision of a filter was: below some 1e-5, f32 may decide otherwise.
        pub(super) margin: f64,
    }

    pub(super) fn changed_logits(
        logits: &[f32],
        params: &SamplingParams,
        prompt: &[TokenId],
        output: &[TokenId],
    ) -> Vec<f64> {
        let mut changed: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
        for (id, logit) in changed.iter_mut().enumerate() {
            let token = TokenId(id as u32);
            let count = output.iter().filter(|&&other| other == token).count() as f64;
            if prompt.contains(&token) || count > 0.0 {
                let penalty = f64::from(params.repetition_penalty);
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
            *logit -= f64::from(params.frequency_penalty) * count;
            if count > 0.0 {
                *logit -= f64::from(params.presence_penalty);
            }
            *logit += params.logit_bias.get(&token).map_or(0.0, |&bias| f64::from(bias));
            let ends = (token == EOS && !params.ignore_eos) || params.stop_token_ids.contains(&token);
            if ends && output.len() < params.min_tokens {
                *logit = f64::NEG_INFINITY;
            }
        }
        changed
    }

    pub(super) fn twin(logits: &[f64], params: &SamplingParams) -> Twin {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let max = logits[order[0]];
        let weight = |id: usize| ((logits[id] - max) / f64::from(params.temperature)).exp();
        let mut margin = f64::INFINITY;
        for &id in &order {
            margin = margin.min((weight(id) - f64::from(params.min_p)).abs());
        }
        order.retain(|&id| weight(id) >= f64::from(params.min_p));
        if let Some(k) = params.top_k {
            if let Some(&next) = order.get(k as usize) {
                let (kept, next) = (weight(order[k as usize - 1]), weight(next));
                // Equal logits are equal in f32, too; nearly equal ones may not stay apart.
                margin = margin.min(if kept == next { f64::INFINITY } else { kept - next });
            }
            order.truncate(k as usize);
        }
        let total: f64 = order.iter().map(|&id| weight(id)).sum();
        let mut kept = Vec::new();
        let mut before = 0.0;
        for &id in &order {
            if params.top_p < 1.0 {
                margin = margin.min((before / total - f64::from(params.top_p)).abs());
                if before / total >= f64::from(params.top_p) {
                    break;
                }
            }
            kept.push(id);
            before += weight(id);
        }
        let total: f64 = kept.iter().map(|&id| weight(id)).sum();
        let mut probabilities = vec![0.0; logits.len()];
        for id in kept {
            probabilities[id] = weight(id) / total;
        }
        Twin { probabilities, margin }
    }

    pub(super) fn logprobs(logits: &[f32]) -> Vec<f64> {
        let max = logits.iter().fold(f64::NEG_INFINITY, |max, &logit| max.max(f64::from(logit)));
        let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
        logits.iter().map(|&logit| f64::from(logit) - max - sum.ln()).collect()
    }
}

fn state_after(output: &[TokenId], prepared: &PreparedSampling) -> SampleState {
    let mut state = SampleState::new(0);
    for &token in output {
        state.record(token, prepared);
    }
    state
}

fn sample(logits: &[f32], params: &SamplingParams) -> Result<TokenId, SampleError> {
    let prepared = PreparedSampling::new(params, &[], &[EOS]);
    Sampler::default().sample(logits, &prepared, &SampleState::new(0), None)
}

/// Logits with many ties (multiples of 0.25) and some forbidden ones.
fn row() -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![
        10 => (-40_i32..40).prop_map(|quarter| quarter as f32 * 0.25),
        10 => -10.0_f32..10.0,
        1 => Just(f32::NEG_INFINITY),
    ];
    prop::collection::vec(logit, 3..400).prop_map(|mut row| {
        row[0] = 0.5;
        row
    })
}

fn some_params() -> impl Strategy<Value = SamplingParams> {
    let penalties = (
        prop_oneof![Just(1.0_f32), 0.5_f32..3.0],
        prop_oneof![Just(0.0_f32), -2.0_f32..=2.0],
        prop_oneof![Just(0.0_f32), -2.0_f32..=2.0],
    );
    let filters = (
        prop_oneof![Just(0.0_f32), 0.0_f32..=1.0],
        prop_oneof![Just(None), (1_u32..60).prop_map(Some), (60_u32..500).prop_map(Some)],
        prop_oneof![Just(1.0_f32), 0.01_f32..1.0],
    );
    let biases = prop::collection::btree_map((0_u32..3).prop_map(TokenId), -5.0_f32..5.0, 0..3);
    (0.05_f32..2.0, penalties, filters, biases, any::<u64>(), 0_usize..4).prop_map(
        |(temperature, (repetition, presence, frequency), (min_p, top_k, top_p), logit_bias, seed, min_tokens)| {
            SamplingParams {
                temperature,
                repetition_penalty: repetition,
                presence_penalty: presence,
                frequency_penalty: frequency,
                min_p,
                top_k,
                top_p,
                logit_bias,
                seed: Some(seed),
                min_tokens,
                ..SamplingParams::default()
            }
        },
    )
}

fn history() -> impl Strategy<Value = Vec<TokenId>> {
    prop::collection::vec((0_u32..3).prop_map(TokenId), 0..6)
}

/// More under `cargo xtask test --full`.
fn num_cases(usual: u32, full: u32) -> u32 {
    if std::env::var_os("BINDERY_TEST_FULL").is_some() { full } else { usual }
}

proptest! {
    // Half of all cases are too near to a tie for the twin to decide; proptest gives up after a thousand of them, which
    // many cases reach.
    #![proptest_config(ProptestConfig { max_global_rejects: 1 << 20, ..ProptestConfig::with_cases(num_cases(600, 20_000)) })]

    /// The token drawn is the one at whose share of the naive distribution the random number falls.
    #[test]
    fn the_token_is_the_naive_twins(logits in row(), params in some_params(), prompt in history(), output in history()) {
        let prepared = PreparedSampling::new(&params, &prompt, &[EOS]);
        let state = state_after(&output, &prepared);
        let token = Sampler::default().sample(&logits, &prepared, &state, None).unwrap();
        let changed = naive::changed_logits(&logits, &params, &prompt, &output);
        let twin = naive::twin(&changed, &params);
        prop_assume!(twin.margin > 1e-5);
        let before: f64 = twin.probabilities[..token.0 as usize].iter().sum();
        let own = twin.probabilities[token.0 as usize];
        let drawn = uniform(params.seed.unwrap(), 0, output.len());
        prop_assert!(own > 0.0, "{token:?} may not be drawn");
        prop_assert!(drawn >= before - 1e-5 && drawn < before + own + 1e-5, "{drawn} is not in {before} + {own}");
    }

    /// Greedy is the naive argmax, and so is top-k of one at any temperature.
    #[test]
    fn greedy_is_the_lowest_of_the_naive_maxima(logits in row(), mut params in some_params(), output in history()) {
        let prepare = |params: &SamplingParams| PreparedSampling::new(params, &[], &[EOS]);
        params.min_p = 0.0;
        params.top_p = 1.0;
        params.top_k = Some(1);
        let state = state_after(&output, &prepare(&params));
        let top_1 = Sampler::default().sample(&logits, &prepare(&params), &state, None).unwrap();
        params.temperature = 0.0;
        params.top_k = None;
        let greedy = Sampler::default().sample(&logits, &prepare(&params), &state, None).unwrap();
        let changed = naive::changed_logits(&logits, &params, &[], &output);
        let best = changed.iter().fold(f64::NEG_INFINITY, |best, &logit| best.max(logit));
        prop_assert!(best - changed[greedy.0 as usize] <= 1e-5);
        // Ties that f32 arithmetic makes or breaks are left aside.
        let first = changed.iter().position(|&logit| best - logit <= 1e-5).unwrap();
        if changed.iter().filter(|&&logit| best - logit <= 1e-5).all(|&logit| logit == best) {
            prop_assert_eq!(greedy.0 as usize, first);
        }
        prop_assert_eq!(greedy, top_1);
    }

    #[test]
    fn logprobs_are_those_of_the_naive_softmax(logits in row(), num_top in 0_u32..100, pick in any::<prop::sample::Index>()) {
        let token = TokenId(pick.index(logits.len()) as u32);
        let distribution = RawDistribution::new(&logits).unwrap();
        let found = Sampler::default().logprobs(&logits, &distribution, token, num_top);
        let expected = naive::logprobs(&logits);
        let own = expected[token.0 as usize];
        prop_assert!(f64::from(found.logprob) == own || (f64::from(found.logprob) - own).abs() < 1e-5);
        let better = logits.iter().filter(|&&logit| logit > logits[token.0 as usize]).count();
        prop_assert_eq!(found.rank as usize, better + 1);
        let mut order: Vec<u32> = (0..logits.len() as u32).filter(|&id| logits[id as usize] > f32::NEG_INFINITY).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        order.truncate(num_top as usize);
        prop_assert_eq!(found.top.iter().map(|(id, _)| id.0).collect::<Vec<_>>(), order);
        for (id, logprob) in found.top {
            prop_assert!((f64::from(logprob) - expected[id.0 as usize]).abs() < 1e-5);
        }
    }

    /// Filters and penalties, too, have their own passes.
    #[test]
    fn every_vector_width_draws_the_same(logits in row(), params in some_params(), output in history()) {
        let prepared = PreparedSampling::new(&params, &[], &[EOS]);
        let state = state_after(&output, &prepared);
        let distribution = RawDistribution::new(&logits).unwrap();
        let drawn = numeric::tests::on_every_width(|| {
            let mut sampler = Sampler::default();
            let token = sampler.sample(&logits, &prepared, &state, None).unwrap();
            let logprobs = sampler.logprobs(&logits, &distribution, token, 20);
            let bits: Vec<u32> = logprobs.top.iter().map(|(_, logprob)| logprob.to_bits()).collect();
            (token, logprobs.logprob.to_bits(), logprobs.rank, bits)
        });
        prop_assert!(drawn.iter().all(|other| other == &drawn[0]), "{drawn:?}");
    }

    /// What a sampler keeps in its buffers from one row to the next does not show.
    #[test]
    fn rows_do_not_influence_each_other(rows in prop::collection::vec((row(), some_params()), 1..8)) {
        let mut shared = Sampler::default();
        for (logits, params) in &rows {
            let prepared = PreparedSampling::new(params, &[], &[EOS]);
            let state = SampleState::new(0);
            let alone = Sampler::default().sample(logits, &prepared, &state, None).unwrap();
            prop_assert_eq!(shared.sample(logits, &prepared, &state, None).unwrap(), alone);
        }
    }
}

/// Draws many tokens with the parameters and compares their frequencies to the twin's probabilities.
fn check_distribution(logits: &[f32], params: &SamplingParams) {
    const NUM_DRAWS: usize = 20_000;
    let mut counts = vec![0_u32; logits.len()];
    let mut sampler = Sampler::default();
    let prepared = PreparedSampling::new(params, &[], &[]);
    let mut state = SampleState::new(3);
    for _ in 0..NUM_DRAWS {
        let token = sampler.sample(logits, &prepared, &state, None).unwrap();
        counts[token.0 as usize] += 1;
        state.record(token, &prepared);
    }
    let changed: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
    let probabilities = naive::twin(&changed, params).probabilities;
    let mut chi_square = 0.0;
    let mut degrees_of_freedom = -1.0;
    for (&count, probability) in counts.iter().zip(probabilities) {
        let expected = probability * NUM_DRAWS as f64;
        assert!(expected > 0.0 || count == 0, "a forbidden token was drawn");
        if expected > 0.0 {
            chi_square += (f64::from(count) - expected).powi(2) / expected;
            degrees_of_freedom += 1.0;
        }
    }
    // Wilson and Hilferty: the 0.1 % point of chi-square.
    let z = 3.09;
    let term: f64 = 2.0 / (9.0 * degrees_of_freedom);
    let limit = degrees_of_freedom * (1.0 - term + z * term.sqrt()).powi(3);
    assert!(chi_square < limit, "chi-square {chi_square} is above {limit}");
}

#[test]
fn frequencies_follow_the_distribution() {
    let logits: Vec<f32> = (0..12).map(|id| (id * 5 % 12) as f32 * 0.3).collect();
    let params = SamplingParams { seed: Some(11), max_tokens: usize::MAX, ..SamplingParams::default() };
    check_distribution(&logits, &params);
    check_distribution(&logits, &SamplingParams { temperature: 0.5, ..params.clone() });
    check_distribution(&logits, &SamplingParams { temperature: 2.0, ..params.clone() });
    check_distribution(&logits, &SamplingParams { top_k: Some(5), ..params.clone() });
    check_distribution(&logits, &SamplingParams { top_p: 0.7, ..params.clone() });
    check_distribution(&logits, &SamplingParams { min_p: 0.3, ..params.clone() });
    check_distribution(&logits, &SamplingParams { min_p: 0.1, top_k: Some(6), top_p: 0.8, ..params });
}

#[test]
fn top_p_keeps_the_token_that_reaches_the_share() {
    // Probabilities 1/2, 1/4, 1/8, 1/8.
    let logits: Vec<f32> = [8.0_f32, 4.0, 2.0, 2.0].iter().map(|weight| weight.ln()).collect();
    for (top_p, num_kept) in [(0.01, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.87, 3), (0.88, 4), (1.0, 4)] {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let params = SamplingParams { top_p, seed: Some(seed), ..SamplingParams::default() };
            seen.insert(sample(&logits, &params).unwrap().0);
        }
        assert_eq!(seen, (0..num_kept).collect(), "top_p {top_p}");
    }
}

#[test]
fn top_k_keeps_exactly_k_of_equal_tokens() {
    for k in 1..=6 {
        let params = SamplingParams { top_k: Some(k), ..SamplingParams::default() };
        let seen: std::collections::BTreeSet<u32> = (0..300)
            .map(|seed| sample(&[1.0; 6], &SamplingParams { seed: Some(seed), ..params.clone() }).unwrap().0)
            .collect();
        assert_eq!(seen, (0..k).collect());
    }
}

#[test]
fn end_tokens_wait_for_min_tokens() {
    let params = SamplingParams {
        temperature: 0.0,
        min_tokens: 2,
        max_tokens: 10,
        stop_token_ids: vec![TokenId(1)],
        ..SamplingParams::default()
    };
    let logits = [0.0, 5.0, 9.0, 1.0];
    let prepared = PreparedSampling::new(&params, &[], &[EOS]);
    let mut sampler = Sampler::default();
    let mut state = SampleState::new(0);
    let mut tokens = Vec::new();
    loop {
        let token = sampler.sample(&logits, &prepared, &state, None).unwrap();
        tokens.push(token.0);
        if let Some(reason) = state.record(token, &prepared) {
            assert_eq!(reason, FinishReason::EndOfSequence);
            break;
        }
    }
    assert_eq!(tokens, [3, 3, 2]);
    // With ignore_eos the end token is a token like any other, a stop token still waits and still stops.
    let prepared = PreparedSampling::new(&SamplingParams { ignore_eos: true, ..params }, &[], &[EOS]);
    let mut state = SampleState::new(0);
    assert_eq!(sampler.sample(&logits, &prepared, &state, None), Ok(TokenId(2)));
    assert_eq!(state.record(TokenId(2), &prepared), None);
    assert_eq!(state.record(TokenId(1), &prepared), Some(FinishReason::StopToken(TokenId(1))));
}

#[test]
fn the_last_token_is_a_matter_of_length() {
    let params = SamplingParams { max_tokens: 2, ..SamplingParams::default() };
    let prepared = PreparedSampling::new(&params, &[], &[EOS]);
    let mut state = SampleState::new(0);
    assert_eq!(state.record(TokenId(5), &prepared), None);
    assert_eq!(state.clone().record(TokenId(5), &prepared), Some(FinishReason::Length));
    assert_eq!(state.record(EOS, &prepared), Some(FinishReason::EndOfSequence), "an end token counts as such");
}

#[test]
fn penalties_by_hand() {
    let logits = [2.0, -2.0, 1.0, 0.5];
    let params = SamplingParams {
        temperature: 0.0,
        repetition_penalty: 2.0,
        presence_penalty: 0.25,
        frequency_penalty: 0.5,
        logit_bias: BTreeMap::from([(TokenId(3), 0.5)]),
        ..SamplingParams::default()
    };
    // Prompt 0 and 1, output 2, 2: 2/2 = 1, -2*2 = -4, 1/2 - 2*0.5 - 0.25 = -0.75, 0.5 + 0.5 = 1: the tie goes to 0.
    let prepared = PreparedSampling::new(&params, &[TokenId(0), TokenId(1)], &[]);
    let state = state_after(&[TokenId(2), TokenId(2)], &prepared);
    let mut sampler = Sampler::default();
    assert_eq!(sampler.sample(&logits, &prepared, &state, None), Ok(TokenId(0)));
    assert_eq!(sampler.work, [1.0, -4.0, -0.75, 1.0]);
}

#[test]
fn a_mask_allows_what_it_names_and_nothing_else() {
    let logits: Vec<f32> = (0..100).map(|id| id as f32).collect();
    let prepared = PreparedSampling::new(&SamplingParams { temperature: 0.0, ..SamplingParams::default() }, &[], &[]);
    let state = SampleState::new(0);
    let mut mask = TokenMask::none(64);
    let mut sampler = Sampler::default();
    assert_eq!(
        sampler.sample(&logits, &prepared, &state, Some(&mask)),
        Err(SampleError::NothingAllowed { position: 0 })
    );
    for token in [3, 31, 32, 63, 64, 99] {
        mask.allow(TokenId(token));
    }
    assert_eq!(sampler.sample(&logits, &prepared, &state, Some(&mask)), Ok(TokenId(63)), "64 is beyond the mask");
    assert!(mask.allows(TokenId(32)) && !mask.allows(TokenId(33)) && !mask.allows(TokenId(99)));
    let all = TokenMask::from_words(vec![u32::MAX; 4]);
    assert_eq!(sampler.sample(&logits, &prepared, &state, Some(&all)), Ok(TokenId(99)));
}

#[test]
fn rows_that_are_no_distribution_are_errors() {
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    for params in [greedy, SamplingParams::default()] {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = vec![0.0; 50];
            logits[31] = bad;
            assert_eq!(sample(&logits, &params), Err(SampleError::NotFinite { position: 0 }));
            assert_eq!(RawDistribution::new(&logits), None);
        }
        assert_eq!(sample(&[f32::NEG_INFINITY; 50], &params), Err(SampleError::NothingAllowed { position: 0 }));
    }
    assert_eq!(RawDistribution::new(&[f32::NEG_INFINITY; 50]), None);
}

#[test]
fn a_flat_row_of_a_large_vocabulary_works() {
    let logits = vec![1.5; 300_000];
    for (top_k, top_p) in [(None, 0.5), (Some(100_000), 1.0), (Some(3), 0.999), (Some(200_000), 0.3)] {
        let kept = top_k.unwrap_or(300_000) as f32 * top_p;
        for seed in 0..5 {
            let params = SamplingParams { top_k, top_p, seed: Some(seed), ..SamplingParams::default() };
            assert!((sample(&logits, &params).unwrap().0 as f32) < kept.ceil());
        }
    }
}

#[test]
fn samples_of_one_seed_are_streams_of_their_own() {
    let logits = vec![0.0; 1000];
    let prepared = PreparedSampling::new(&SamplingParams { seed: Some(5), ..SamplingParams::default() }, &[], &[]);
    let mut sampler = Sampler::default();
    let mut draw = |index| sampler.sample(&logits, &prepared, &SampleState::new(index), None).unwrap();
    let drawn: std::collections::BTreeSet<TokenId> = (0..16).map(&mut draw).collect();
    assert!(drawn.len() > 12);
    assert_eq!(draw(7), draw(7));
}
