//! Log-probabilities against transformers in f32 on the same weights: the decoder's fidelity.
//!
//! Goldens are made by tests/golden/make_golden.py. Each bound is stated beside what was measured when it was set.

#![allow(clippy::unwrap_used, reason = "tests")]

mod decoder_harness;

use bindery_model::{BackendKind, Dtype, KvCacheDtype, LoadOptions, Quantize};
use decoder_harness::{
    CHECKPOINTS, Golden, Harness, Row, Sequence, argmax, checkpoint, default_model, kl_divergence, repository,
};

/// Reference backend, the same f32 operations in another order. Golden digits end at 1e-6. Measured: 5.6e-5.
const REFERENCE_TOLERANCE: f64 = 1e-3;
/// Kernels in f32: other orders of summation, polynomial exponentials. Measured: 6.9e-5.
const CPU_F32_TOLERANCE: f64 = 5e-3;

// Measured: 1.1e-6, 1.1e-4, 1.6e-6, 6.1e-3, 0.44 and 6.0e-4; Gaussian weights of two layers have nothing that a group of 32 shares.
const BOUND_STORED: f64 = 5e-6;
const BOUND_BF16: f64 = 4e-4;
const BOUND_F16: f64 = 6e-6;
const BOUND_INT8: f64 = 2.5e-2;
const BOUND_INT4: f64 = 1.6;
const BOUND_INT8_CACHE: f64 = 2.5e-3;

/// Blocks of the longest prompt and its continuation.
const NUM_BLOCKS: usize = 32;

fn reference() -> LoadOptions {
    LoadOptions::new(BackendKind::Reference)
}

fn cpu_f32() -> LoadOptions {
    LoadOptions { dtype: Dtype::F32, dequantize: true, ..LoadOptions::new(BackendKind::Cpu) }
}

fn default_golden() -> Golden {
    Golden::read(&repository().join("tests/golden/smollm2-135m.json"))
}

/// Every golden log-probability within `tolerance`, and the same greedy continuation.
fn check(harness: &mut Harness, golden: &Golden, tolerance: f64) {
    for prompt in &golden.prompts {
        let last = prompt.tokens.len() - 1;
        assert!(prompt.wants(last));
        let mut sequence = Sequence::new(&prompt.tokens);
        let rows = harness.prefill(&mut sequence, 128, |position| prompt.wants(position));
        let worst = golden.max_difference(prompt, &rows);
        eprintln_measured(&format!("{} on {}: {worst:.2e}", prompt.name, harness.model.info().device));
        assert!(worst < tolerance, "{}: off by {worst}, the tolerance is {tolerance}", prompt.name);
        let continuation = harness.greedy(&mut sequence, &rows[rows.len() - 1].1, prompt.greedy.len());
        assert_eq!(continuation, prompt.greedy, "{}", prompt.name);
        harness.free(sequence);
    }
}

#[allow(clippy::print_stderr, reason = "measured values are worth reading beside the bound (--nocapture)")]
fn eprintln_measured(what: &str) {
    eprintln!("measured {what}");
}

#[test]
fn tiny_checkpoints_on_the_reference_backend_match_transformers() {
    for name in CHECKPOINTS {
        let golden = Golden::read(&checkpoint(name).join("golden.json"));
        check(&mut Harness::load(&checkpoint(name), &reference(), NUM_BLOCKS), &golden, REFERENCE_TOLERANCE);
    }
}

#[test]
fn tiny_checkpoints_on_the_cpu_backend_match_transformers() {
    for name in CHECKPOINTS {
        let golden = Golden::read(&checkpoint(name).join("golden.json"));
        check(&mut Harness::load(&checkpoint(name), &cpu_f32(), NUM_BLOCKS), &golden, CPU_F32_TOLERANCE);
    }
}

#[test]
fn default_model_on_the_reference_backend_matches_transformers() {
    let Some(path) = default_model("default model, reference backend against transformers") else { return };
    check(&mut Harness::load(&path, &reference(), NUM_BLOCKS), &default_golden(), REFERENCE_TOLERANCE);
}

#[test]
fn default_model_dequantised_on_the_cpu_backend_matches_transformers() {
    let Some(path) = default_model("default model, cpu backend in f32 against transformers") else { return };
    check(&mut Harness::load(&path, &cpu_f32(), NUM_BLOCKS), &default_golden(), CPU_F32_TOLERANCE);
}

/// What users get by default and by flag, on checkpoints whose f32 is held to transformers above: dense weights in half
/// precision with an f16 cache, int8 and int4. The bounds are about four times what was measured.
#[test]
fn tiny_checkpoints_in_the_arithmetic_of_each_flag_stay_near_f32() {
    let cpu = || LoadOptions::new(BackendKind::Cpu);
    let settings = [
        ("as stored", cpu(), BOUND_STORED),
        ("bf16", LoadOptions { dtype: Dtype::Bf16, ..cpu() }, BOUND_BF16),
        ("f16", LoadOptions { dtype: Dtype::F16, ..cpu() }, BOUND_F16),
        ("int8", LoadOptions { quantize: Quantize::Int8, ..cpu() }, BOUND_INT8),
        ("int4", LoadOptions { quantize: Quantize::Int4, ..cpu() }, BOUND_INT4),
        ("int8 cache", LoadOptions { kv_cache_dtype: KvCacheDtype::Int8, ..cpu() }, BOUND_INT8_CACHE),
    ];
    for (what, options, bound) in settings {
        let (mut divergence, mut num_rows) = (0.0, 0);
        for name in CHECKPOINTS {
            let golden = Golden::read(&checkpoint(name).join("golden.json"));
            let mut exact = Harness::load(&checkpoint(name), &reference(), NUM_BLOCKS);
            let mut actual = Harness::load(&checkpoint(name), &options, NUM_BLOCKS);
            for prompt in &golden.prompts {
                let rows = |harness: &mut Harness| {
                    let mut sequence = Sequence::new(&prompt.tokens);
                    let rows = harness.prefill(&mut sequence, 128, |_| true);
                    harness.free(sequence);
                    rows
                };
                for ((_, exact), (_, actual)) in rows(&mut exact).iter().zip(&rows(&mut actual)) {
                    divergence += kl_divergence(exact, actual);
                    num_rows += 1;
                }
            }
        }
        let mean = divergence / num_rows as f64;
        eprintln_measured(&format!("{what}: mean KL divergence {mean:.2e} over {num_rows} rows"));
        assert!(mean < bound, "{what}: mean KL divergence {mean}");
        assert!(mean > 0.0, "{what}: nothing was rounded, so the setting was not in force");
    }
}

#[test]
fn default_model_quantised_stays_near_its_own_f32() {
    // Measured: 0.00266, and 88 of 90. What differs is activations rounded to 8 bits and an f16 cache.
    check_quantized(&LoadOptions::new(BackendKind::Cpu), 0.01);
}

#[test]
fn default_model_with_an_int8_cache_stays_near_its_own_f32() {
    // Measured: 0.00337, and 88 of 90.
    check_quantized(&LoadOptions { kv_cache_dtype: KvCacheDtype::Int8, ..LoadOptions::new(BackendKind::Cpu) }, 0.012);
}

fn check_quantized(quantized: &LoadOptions, bound: f64) {
    let Some(path) = default_model("default model, quantised arithmetic against f32") else { return };
    let golden = default_golden();
    let (mut exact, mut quantized) =
        (Harness::load(&path, &cpu_f32(), NUM_BLOCKS), Harness::load(&path, quantized, NUM_BLOCKS));
    assert!(quantized.model.info().weight_bytes < exact.model.info().weight_bytes / 5, "weights stay quantised");

    let (mut divergence, mut num_rows, mut num_same_greedy, mut num_greedy) = (0.0, 0, 0, 0);
    for prompt in &golden.prompts {
        // The golden continuation as input: each row is judged on the same context.
        let tokens = [prompt.tokens.as_slice(), &prompt.greedy].concat();
        let rows = |harness: &mut Harness| -> Vec<(usize, Row)> {
            let mut sequence = Sequence::new(&tokens);
            let rows = harness.prefill(&mut sequence, 128, |_| true);
            harness.free(sequence);
            rows
        };
        let (exact, quantized) = (rows(&mut exact), rows(&mut quantized));
        for ((position, exact), (_, quantized)) in exact.iter().zip(&quantized) {
            divergence += kl_divergence(exact, quantized);
            num_rows += 1;
            let next = (position + 1).checked_sub(prompt.tokens.len()).and_then(|index| prompt.greedy.get(index));
            if let Some(&token) = next {
                num_greedy += 1;
                num_same_greedy += usize::from(argmax(quantized) == token);
            }
        }
    }
    let mean = divergence / num_rows as f64;
    eprintln_measured(&format!("KL divergence {mean:.5} over {num_rows} rows, greedy {num_same_greedy}/{num_greedy}"));
    assert!(mean < bound, "mean KL divergence {mean}");
    assert!(num_same_greedy * 100 >= num_greedy * 95, "{num_same_greedy} of {num_greedy} greedy tokens are the same");
}
