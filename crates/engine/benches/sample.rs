//! What choosing a token costs the model thread: one row of logits through each way of sampling, at the vocabulary sizes
//! of SmolLM2 (49,152) and LLaMA 3 (128,256). `cargo bench -p bindery-engine --bench sample`; criterion's "elem/s" are
//! logits.
//!
//! Rows are peaked as a language model's are: a few tokens share most of the probability, a long tail the rest. Several
//! rows take turns, so that no branch learns one of them by heart.

use std::{collections::BTreeMap, hint::black_box};

use bindery_engine::{
    SamplingParams, TokenId,
    sample::{PreparedSampling, RawDistribution, SampleState, Sampler},
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const NUM_ROWS: usize = 8;

/// In (0, 1], without a pattern.
fn noise(index: usize) -> f32 {
    let mixed = (index as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) + 1) as f32 / (1 << 24) as f32
}

/// A bell of width 2 (the sum of four uniforms) with an exponential upper tail on one token in 64.
fn row(seed: usize, vocab_size: usize) -> Vec<f32> {
    let logit = |token: usize| {
        let draw = |number: usize| noise((seed * vocab_size + token) * 6 + number);
        let bell = (draw(0) + draw(1) + draw(2) + draw(3) - 2.0) * 3.5;
        if draw(4) < 1.0 / 64.0 { bell - 2.0 * draw(5).ln() } else { bell }
    };
    (0..vocab_size).map(logit).collect()
}

fn ways() -> Vec<(&'static str, SamplingParams)> {
    let fixed = || SamplingParams { seed: Some(7), ..SamplingParams::default() };
    vec![
        ("greedy", SamplingParams { temperature: 0.0, ..fixed() }),
        ("temperature", SamplingParams { temperature: 0.7, ..fixed() }),
        ("top_k 40", SamplingParams { temperature: 0.7, top_k: Some(40), ..fixed() }),
        ("top_p 0.9", SamplingParams { temperature: 0.7, top_p: 0.9, ..fixed() }),
        ("top_p 0.999 hot", SamplingParams { temperature: 2.0, top_p: 0.999, ..fixed() }),
        ("min_p 0.05", SamplingParams { temperature: 0.7, min_p: 0.05, ..fixed() }),
        ("all three", SamplingParams { temperature: 0.7, top_k: Some(40), top_p: 0.9, min_p: 0.05, ..fixed() }),
        (
            "penalties and bias",
            SamplingParams {
                temperature: 0.7,
                repetition_penalty: 1.1,
                presence_penalty: 0.5,
                logit_bias: (0..100).map(|token| (TokenId(token * 31), 1.0)).collect::<BTreeMap<_, _>>(),
                ..fixed()
            },
        ),
    ]
}

fn sampling(criterion: &mut Criterion) {
    for vocab_size in [49_152, 128_256] {
        let mut group = criterion.benchmark_group(format!("sample {vocab_size}"));
        group.throughput(Throughput::Elements(vocab_size as u64));
        let rows: Vec<Vec<f32>> = (0..NUM_ROWS).map(|seed| row(seed, vocab_size)).collect();
        let prompt: Vec<TokenId> = (0..512).map(|token| TokenId(token * 7)).collect();
        for (name, params) in ways() {
            let prepared = PreparedSampling::new(&params, &prompt, &[]);
            let (mut sampler, mut next) = (Sampler::default(), 0);
            group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
                let mut state = SampleState::new(0);
                bencher.iter(|| {
                    next = (next + 1) % NUM_ROWS;
                    let token = sampler.sample(black_box(&rows[next]), &prepared, &state, None);
                    // Another random number for the next row; `max_tokens` ends nothing here.
                    state.record(TokenId(next as u32), &prepared);
                    token
                });
            });
        }
        let (mut sampler, mut next) = (Sampler::default(), 0);
        group.bench_function(BenchmarkId::from_parameter("20 log-probabilities"), |bencher| {
            bencher.iter(|| {
                next = (next + 1) % NUM_ROWS;
                let row = black_box(&rows[next]);
                RawDistribution::new(row).map(|raw| sampler.logprobs(row, &raw, TokenId(5), 20))
            });
        });
        group.finish();
    }
}

criterion_group!(benches, sampling);
criterion_main!(benches);
