//! Every open family against transformers: tiny random checkpoints on which each feature of the family is felt.
//!
//! Goldens are made by tests/golden/make_golden.py, which says what is in a checkpoint's folder. Nothing here knows how a
//! family is computed. Invariant: each folder under tests/checkpoints is listed, and each file in it has its golden.

#![allow(clippy::unwrap_used, reason = "tests")]

mod decoder_harness;

use std::{fs, path::Path};

use bindery_model::{BackendKind, Dtype, LoadOptions, Model, StepModel as _};
use decoder_harness::{
    Golden, GoldenPrompt, Harness, Row, Sequence, checkpoint, kl_divergence, log_softmax, repository,
};

/// Every folder of tests/checkpoints, so that none is left out by a slip of a path.
const FAMILIES: &[&str] = &[
    "tiny-falcon-11b",
    "tiny-falcon-40b",
    "tiny-falcon-7b",
    "tiny-falcon-rw",
    "tiny-gemma",
    "tiny-gemma2",
    "tiny-gemma3",
    "tiny-llama",
    "tiny-llama-bias",
    "tiny-llama-books",
    "tiny-llama-dynamic",
    "tiny-llama-wide",
    "tiny-llama2",
    "tiny-llama31",
    "tiny-llama32",
    "tiny-ministral",
    "tiny-mistral",
    "tiny-mixtral",
    "tiny-phi3",
    "tiny-phi3-small",
    "tiny-phi3-window",
    "tiny-phi4-mini",
    "tiny-qwen2",
    "tiny-qwen2-moe",
    "tiny-qwen2-moe-mixed",
    "tiny-qwen25-yarn",
    "tiny-qwen3",
    "tiny-qwen3-moe",
    "tiny-smollm3",
];

/// Reference backend: the same f32 operations in another order. Measured: 2.5e-5.
const REFERENCE_TOLERANCE: f64 = 2e-4;
/// Kernels in f32: other orders of summation, polynomial exponentials. Measured: 2.1e-5.
const CPU_F32_TOLERANCE: f64 = 2e-4;
/// Codes times rounded activations, against f32 on the same codes: mean divergence of a row. Measured: 8.8e-3 with
/// experts, 3.0e-3 at most without.
const BOUND_QUANTIZED: f64 = 5e-2;

/// Blocks of the longest prompt and its continuation.
const NUM_BLOCKS: usize = 32;
const CHUNK: usize = 32;

fn reference() -> LoadOptions {
    LoadOptions::new(BackendKind::Reference)
}

fn cpu_f32() -> LoadOptions {
    LoadOptions { dtype: Dtype::F32, dequantize: true, ..LoadOptions::new(BackendKind::Cpu) }
}

/// Both backends in f32, with their bounds.
fn exact_settings() -> [(LoadOptions, f64); 2] {
    [(reference(), REFERENCE_TOLERANCE), (cpu_f32(), CPU_F32_TOLERANCE)]
}

#[allow(clippy::print_stderr, reason = "measured values are worth reading beside the bound (--nocapture)")]
fn eprintln_measured(what: &str) {
    eprintln!("measured {what}");
}

/// The golden of a file in a checkpoint's folder.
fn golden(name: &str, file: &str) -> Golden {
    Golden::read(&checkpoint(name).join(file))
}

/// Every row of a prompt, in chunks of `chunk` tokens.
fn rows(harness: &mut Harness, tokens: &[u32], chunk: usize) -> Vec<(usize, Row)> {
    let mut sequence = Sequence::new(tokens);
    let rows = harness.prefill(&mut sequence, chunk, |_| true);
    harness.free(sequence);
    rows
}

/// The greedy continuation; where it changes the frequencies of rotation, all is computed again.
fn continuation(harness: &mut Harness, prompt: &GoldenPrompt) -> Vec<u32> {
    let mut sequence = Sequence::new(&prompt.tokens);
    let last = harness.prefill(&mut sequence, CHUNK, |position| position + 1 == prompt.tokens.len());
    let continuation = harness.greedy(&mut sequence, &last[0].1, prompt.greedy.len());
    harness.free(sequence);
    continuation
}

/// What is wrong with a model file, or the largest difference to its golden.
fn check(path: &Path, options: &LoadOptions, golden: &Golden, tolerance: f64) -> Result<f64, String> {
    Model::load(path, options, &mut |_, _| ()).map_err(|error| error.to_string())?;
    let mut harness = Harness::load(path, options, NUM_BLOCKS);
    assert_eq!(harness.model.rope_regimes().is_some(), golden.rope_depends_on_length, "{}", path.display());
    let mut worst: f64 = 0.0;
    for prompt in &golden.prompts {
        assert!(prompt.wants(prompt.tokens.len() - 1), "the last row is worth most");
        let rows = rows(&mut harness, &prompt.tokens, CHUNK);
        let wanted: Vec<_> = rows.into_iter().filter(|(position, _)| prompt.wants(*position)).collect();
        let difference = golden.max_difference(prompt, &wanted);
        worst = worst.max(difference);
        if difference >= tolerance {
            return Err(format!("{}: off by {difference:.2e}, the tolerance is {tolerance}", prompt.name));
        }
        let continuation = continuation(&mut harness, prompt);
        if continuation != prompt.greedy {
            return Err(format!("{}: continues with {continuation:?} instead of {:?}", prompt.name, prompt.greedy));
        }
    }
    Ok(worst)
}

/// All families are looked at before the test fails.
fn check_all<'a>(what: &str, cases: impl IntoIterator<Item = (&'a str, Result<f64, String>)>) {
    let mut wrong = Vec::new();
    let mut num_cases = 0;
    for (name, outcome) in cases {
        num_cases += 1;
        match outcome {
            Ok(worst) => eprintln_measured(&format!("{what}, {name}: {worst:.2e}")),
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    assert!(num_cases > 0, "{what}: nothing was checked");
    assert!(wrong.is_empty(), "{what}:\n{}", wrong.join("\n"));
}

/// Files of this name in the folders of families that run, with the golden that is theirs.
fn files(file: &'static str, goldens: &'static [&'static str]) -> Vec<(&'static str, Golden)> {
    let with_file = |name: &&str| checkpoint(name).join(file).exists();
    let golden = |name: &'static str| {
        let own = goldens.iter().find(|golden| checkpoint(name).join(golden).exists());
        (name, golden(name, own.expect("a golden beside the file")))
    };
    FAMILIES.iter().copied().filter(with_file).map(golden).collect()
}

#[test]
fn every_checkpoint_is_listed() {
    let mut folders: Vec<String> = fs::read_dir(repository().join("tests/checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().unwrap().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    folders.sort();
    assert_eq!(folders, FAMILIES);
}

#[test]
fn checkpoints_match_transformers() {
    for (options, tolerance) in exact_settings() {
        let cases = files("model.safetensors", &["golden.json"]);
        check_all(
            &format!("{:?}", options.backend),
            cases.iter().map(|(name, golden)| (*name, check(&checkpoint(name), &options, golden, tolerance))),
        );
    }
}

/// Keys as they were written before transformers 5, on the same weights.
#[test]
fn published_configs_mean_the_same() {
    let cases = files("config-published.json", &["golden.json"]);
    check_all(
        "published configs",
        cases.iter().map(|(name, golden)| {
            let folder = tempfile::tempdir().unwrap();
            fs::copy(checkpoint(name).join("config-published.json"), folder.path().join("config.json")).unwrap();
            fs::copy(checkpoint(name).join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
            (*name, check(folder.path(), &reference(), golden, REFERENCE_TOLERANCE))
        }),
    );
}

/// The same models out of llama.cpp's own converter: what it permutes, shifts, stacks and renames is put right.
#[test]
fn gguf_twins_match_transformers() {
    for (options, tolerance) in exact_settings() {
        let cases = files("model.gguf", &["golden-gguf.json", "golden.json"]);
        check_all(
            &format!("GGUF on {:?}", options.backend),
            cases.iter().map(|(name, golden)| {
                (*name, check(&checkpoint(name).join("model.gguf"), &options, golden, tolerance))
            }),
        );
    }
}

/// llama-quantize's output against transformers on what its codes mean.
#[test]
fn quantised_files_match_transformers_on_their_dequantised_tensors() {
    for (options, tolerance) in exact_settings() {
        let cases = files("quantized.gguf", &["golden-quantized.json"]);
        check_all(
            &format!("dequantised on {:?}", options.backend),
            cases.iter().map(|(name, golden)| {
                (*name, check(&checkpoint(name).join("quantized.gguf"), &options, golden, tolerance))
            }),
        );
    }
}

/// The same files in the arithmetic they are served in: codes as stored, activations rounded to 8 bits.
#[test]
fn quantised_files_as_stored_stay_near_their_own_f32() {
    let cases = files("quantized.gguf", &["golden-quantized.json"]);
    check_all(
        "quantised as stored",
        cases.iter().map(|(name, golden)| {
            let path = checkpoint(name).join("quantized.gguf");
            let (_, divergence) = distance(&path, &LoadOptions::new(BackendKind::Cpu), golden);
            let outcome = match divergence {
                zero if zero <= 0.0 => Err("nothing was rounded, so the codes were not in use".to_owned()),
                small if small < BOUND_QUANTIZED => Ok(small),
                large => Err(format!("mean KL divergence {large:.2e}, the bound is {BOUND_QUANTIZED}")),
            };
            (*name, outcome)
        }),
    );
}

/// Largest difference and mean divergence of our own f32 over all rows of all prompts.
fn distance(path: &Path, options: &LoadOptions, golden: &Golden) -> (f64, f64) {
    let mut exact = Harness::load(path, &reference(), NUM_BLOCKS);
    let mut actual = Harness::load(path, options, NUM_BLOCKS);
    let (mut worst, mut divergence, mut num_rows) = (0.0f64, 0.0, 0);
    for prompt in &golden.prompts {
        let exact = rows(&mut exact, &prompt.tokens, CHUNK);
        let actual = rows(&mut actual, &prompt.tokens, CHUNK);
        for ((_, exact), (_, actual)) in exact.iter().zip(&actual) {
            divergence += kl_divergence(exact, actual);
            num_rows += 1;
            for (a, b) in log_softmax(exact).iter().zip(log_softmax(actual)) {
                worst = worst.max((a - b).abs());
            }
        }
    }
    (worst, divergence / f64::from(num_rows))
}

/// Whether tokens choose experts.
fn has_experts(name: &str) -> bool {
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(checkpoint(name).join("config.json")).unwrap()).unwrap();
    config.get("num_experts").or(config.get("num_local_experts")).is_some()
}

/// In half precision no further from f32 than transformers is, on the same checkpoint and prompts.
#[test]
fn half_precision_strays_no_further_than_transformers() {
    for (dtype, key) in [(Dtype::Bf16, "bfloat16"), (Dtype::F16, "float16")] {
        let options = LoadOptions { dtype, ..LoadOptions::new(BackendKind::Cpu) };
        let cases = files("model.safetensors", &["golden.json"]);
        check_all(
            key,
            cases.iter().map(|(name, golden)| {
                let theirs = golden.errors[key];
                let (worst, divergence) = distance(&checkpoint(name), &options, golden);
                // Where one of both rounds a router's logits past each other, an expert changes and the worst row with it.
                let is_near = (worst <= theirs.max || has_experts(name)) && divergence <= theirs.kl;
                let told =
                    format!("{worst:.2e} and {divergence:.2e}; transformers {:.2e} and {:.2e}", theirs.max, theirs.kl);
                (*name, if is_near { Ok(worst) } else { Err(told) })
            }),
        );
    }
}

/// Prefill in one piece, in chunks and token by token, with logits of all rows or of some: the same bits.
#[test]
fn chunks_change_no_bit_on_the_cpu_backend() {
    let cases = files("model.safetensors", &["golden.json"]);
    check_all(
        "chunks",
        cases.iter().map(|(name, golden)| {
            let longest = &golden.prompts.last().unwrap().tokens;
            let bits = |options: &LoadOptions, chunk: usize, every: usize| -> Vec<Vec<u32>> {
                let mut harness = Harness::load(&checkpoint(name), options, NUM_BLOCKS);
                let rows =
                    harness.prefill(&mut Sequence::new(longest), chunk, |position| position.is_multiple_of(every));
                rows.iter().map(|(_, row)| row.iter().map(|x| x.to_bits()).collect()).collect()
            };
            for options in [cpu_f32(), LoadOptions::new(BackendKind::Cpu)] {
                let whole = bits(&options, usize::MAX, 1);
                for (chunk, every) in [(1, 1), (7, 1), (16, 1), (33, 1), (33, 5), (usize::MAX, 3)] {
                    if !bits(&options, chunk, every).iter().eq(whole.iter().step_by(every)) {
                        return (*name, Err(format!("logits of each {every}th row in chunks of {chunk} are others")));
                    }
                }
            }
            (*name, Ok(0.0))
        }),
    );
}
