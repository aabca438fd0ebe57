//! Models with adapters, against peft and against themselves.
//!
//! The adapters under tests/adapters and what they give were made by peft (tests/golden/adapters.py); tests/adapters.rs holds
//! how they are read, this file what is computed. Invariant: whoever else is in a batch, and in which order, a row's bits are
//! those it has alone.

#![allow(clippy::unwrap_used, reason = "tests")]

mod decoder_harness;

use std::{fs, path::Path, sync::Arc};

use bindery_model::{Adapter, AdapterLimits, BackendKind, Dtype, LoadOptions, ModelError, Quantize, StepModel as _};
use decoder_harness::{Golden, Harness, Row, Sequence, adapter, checkpoint, kl_divergence, repository};

/// As for the families: tests/families.rs.
const REFERENCE_TOLERANCE: f64 = 2e-4;
const CPU_F32_TOLERANCE: f64 = 2e-4;
/// What an adapter may add to what quantising its base costs, as mean divergence of a row, besides as much again: its own first
/// half is in int8. Measured: at most 1.9 times the base's.
const SLACK_QUANTIZED: f64 = 2e-3;
const NUM_BLOCKS: usize = 64;
const CHUNK: usize = 16;
/// Any number will do.
const ID: u32 = 41;

fn reference() -> LoadOptions {
    LoadOptions::new(BackendKind::Reference)
}

fn cpu_f32() -> LoadOptions {
    LoadOptions { dtype: Dtype::F32, dequantize: true, ..LoadOptions::new(BackendKind::Cpu) }
}

#[derive(serde::Deserialize)]
struct Base {
    base: String,
}

/// Every adapter with the name of its base.
fn all() -> Vec<(String, String)> {
    let mut names: Vec<(String, String)> = fs::read_dir(repository().join("tests/adapters"))
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let golden: Base = serde_json::from_slice(&fs::read(path.join("golden.json")).unwrap()).unwrap();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), golden.base)
        })
        .collect();
    names.sort();
    assert!(names.len() > 10, "the adapters are there");
    names
}

fn load(harness: &Harness, path: &Path) -> Result<Arc<Adapter>, ModelError> {
    harness.model.adapter_loader().load(path, &AdapterLimits::default()).map(Arc::new)
}

fn add(harness: &mut Harness, id: u32, path: &Path) {
    let adapter = load(harness, path).unwrap();
    harness.model.add_adapter(id, &adapter).unwrap();
}

/// Rows of a prompt through an adapter.
fn rows(harness: &mut Harness, tokens: &[u32], adapter: Option<u32>, chunk: usize) -> Vec<(usize, Row)> {
    let mut sequence = Sequence::through(tokens, adapter);
    let rows = harness.prefill(&mut sequence, chunk, |_| true);
    harness.free(sequence);
    rows
}

/// The largest difference to a golden, whose continuations have to be the same.
fn check(harness: &mut Harness, golden: &Golden, what: &str) -> f64 {
    let mut worst: f64 = 0.0;
    for prompt in &golden.prompts {
        let rows = rows(harness, &prompt.tokens, Some(ID), CHUNK);
        let wanted: Vec<_> = rows.iter().filter(|(position, _)| prompt.wants(*position)).cloned().collect();
        worst = worst.max(golden.max_difference(prompt, &wanted));
        let mut sequence = Sequence::through(&prompt.tokens, Some(ID));
        let last = harness.prefill(&mut sequence, prompt.tokens.len(), |at| at + 1 == prompt.tokens.len());
        let continuation = harness.greedy(&mut sequence, &last[0].1, prompt.greedy.len());
        harness.free(sequence);
        assert_eq!(continuation, prompt.greedy, "{what}, {}", prompt.name);
    }
    worst
}

#[allow(clippy::print_stderr, reason = "measured values are worth reading beside the bound (--nocapture)")]
fn eprintln_measured(what: &str, worst: f64) {
    eprintln!("measured {what}: {worst:.2e}");
}

#[test]
fn adapters_match_peft() {
    for (options, tolerance) in [(reference(), REFERENCE_TOLERANCE), (cpu_f32(), CPU_F32_TOLERANCE)] {
        for (name, base) in all() {
            let what = format!("{name} on {:?}", options.backend);
            let golden = Golden::read(&adapter(&name).join("golden.json"));
            let mut harness = Harness::load(&checkpoint(&base), &options, NUM_BLOCKS);
            add(&mut harness, ID, &adapter(&name));
            let worst = check(&mut harness, &golden, &what);
            eprintln_measured(&what, worst);
            assert!(worst < tolerance, "{what}: off by {worst:.2e}");
        }
    }
}

/// llama.cpp's converter permutes and renames; bases of either format take adapters of either.
#[test]
fn formats_of_base_and_adapter_mix() {
    let mut num_pairs = 0;
    for (name, base) in all().into_iter().filter(|(name, _)| adapter(name).join("adapter.gguf").exists()) {
        let golden = Golden::read(&adapter(&name).join("golden.json"));
        for (options, tolerance) in [(reference(), REFERENCE_TOLERANCE), (cpu_f32(), CPU_F32_TOLERANCE)] {
            let gguf = checkpoint(&base).join("model.gguf");
            // Where the twin's weights are not the checkpoint's own, it has a golden of its own.
            let has_twin = gguf.exists() && !checkpoint(&base).join("golden-gguf.json").exists();
            for path in [Some(checkpoint(&base)), has_twin.then_some(gguf)].into_iter().flatten() {
                let mut harness = Harness::load(&path, &options, NUM_BLOCKS);
                for adapter_path in [adapter(&name), adapter(&name).join("adapter.gguf")] {
                    let what = format!("{} over {} on {:?}", adapter_path.display(), path.display(), options.backend);
                    add(&mut harness, ID, &adapter_path);
                    let worst = check(&mut harness, &golden, &what);
                    assert!(worst < tolerance, "{what}: off by {worst:.2e}");
                    harness.model.remove_adapter(ID);
                    num_pairs += 1;
                }
            }
        }
    }
    assert!(num_pairs >= 16, "only {num_pairs} pairs");
}

/// Over codes the first half is int8, too.
#[test]
fn adapters_over_quantised_bases_stay_close() {
    for quantize in [Quantize::Int8, Quantize::Int4] {
        for (name, base) in all() {
            let options = LoadOptions { quantize, ..LoadOptions::new(BackendKind::Cpu) };
            let mut quantized = Harness::load(&checkpoint(&base), &options, NUM_BLOCKS);
            add(&mut quantized, ID, &adapter(&name));
            let mut exact = Harness::load(&checkpoint(&base), &cpu_f32(), NUM_BLOCKS);
            add(&mut exact, ID, &adapter(&name));
            let golden = Golden::read(&adapter(&name).join("golden.json"));
            let tokens = &golden.prompts.last().unwrap().tokens;
            // What quantising costs without the adapter is the base's own; with it, it may not be of another order.
            let mut divergence = |adapter| {
                let (ours, theirs) =
                    (rows(&mut quantized, tokens, adapter, CHUNK), rows(&mut exact, tokens, adapter, CHUNK));
                let sum: f64 = theirs.iter().zip(&ours).map(|((_, p), (_, q))| kl_divergence(p, q)).sum();
                sum / ours.len() as f64
            };
            let (alone, adapted) = (divergence(None), divergence(Some(ID)));
            eprintln_measured(&format!("{name} over {quantize:?}, base {alone:.2e}"), adapted);
            let bound = 2.0 * alone + SLACK_QUANTIZED;
            assert!(adapted < bound, "{name} over {quantize:?}: {adapted:.2e}, the base alone {alone:.2e}");
        }
    }
}

/// An adapter of random numbers over every matrix of a small LLaMA's layers.
fn write_adapter(folder: &Path, config: &serde_json::Value) {
    let number = |key: &str| config[key].as_u64().unwrap() as usize;
    let (hidden, inner, layers) = (number("hidden_size"), number("intermediate_size"), number("num_hidden_layers"));
    let keys = hidden / number("num_attention_heads") * number("num_key_value_heads");
    let (rank, mut shuffle) = (4, Shuffle(11));
    let mut tensors = Vec::new();
    for layer in 0..layers {
        for (module, outputs, inputs) in [
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ] {
            for (half, shape) in [("lora_A", [rank, inputs]), ("lora_B", [outputs, rank])] {
                let name = format!("base_model.model.model.layers.{layer}.{module}.{half}.weight");
                let mut unit = || shuffle.next(2001) as f32 / 1000.0 - 1.0;
                let bytes: Vec<u8> = (0..shape[0] * shape[1]).flat_map(|_| (0.3 * unit()).to_le_bytes()).collect();
                tensors.push((name, shape, bytes));
            }
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.as_str(), safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join("adapter_model.safetensors")).unwrap();
    let adapter =
        serde_json::json!({"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"});
    fs::write(folder.join("adapter_config.json"), adapter.to_string()).unwrap();
}

/// Codes in groups of any length and inputs in an order of their own: the adapter reads what the base reads.
#[test]
fn adapters_stand_beside_every_quantised_checkpoint() {
    let mut num_checked = 0;
    for entry in fs::read_dir(repository().join("tests/quantized")).unwrap() {
        let path = entry.unwrap().path();
        let Ok(config) = fs::read(path.join("config.json")) else { continue };
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        if config["model_type"] != "llama" {
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        write_adapter(folder.path(), &config);
        let vocab_size = config["vocab_size"].as_u64().unwrap() as u32;
        let tokens: Vec<u32> = (0..40).map(|i| (i * 31 + 7) % vocab_size).collect();
        let mut ours = Harness::load(&path, &LoadOptions::new(BackendKind::Cpu), NUM_BLOCKS);
        let mut exact = Harness::load(&path, &reference(), NUM_BLOCKS);
        add(&mut ours, ID, folder.path());
        add(&mut exact, ID, folder.path());
        let mut divergence = |ours_through, exact_through| {
            let ours = rows(&mut ours, &tokens, ours_through, CHUNK);
            let exact = rows(&mut exact, &tokens, exact_through, CHUNK);
            exact.iter().zip(&ours).map(|((_, p), (_, q))| kl_divergence(p, q)).sum::<f64>() / ours.len() as f64
        };
        let (alone, adapted, felt) =
            (divergence(None, None), divergence(Some(ID), Some(ID)), divergence(None, Some(ID)));
        eprintln_measured(&format!("{} (base {alone:.2e}, adapter felt {felt:.2e})", path.display()), adapted);
        assert!(felt > 20.0 * adapted, "{}: {felt:.2e} and {adapted:.2e}", path.display());
        assert!(adapted < 3.0 * alone + SLACK_QUANTIZED, "{}: {adapted:.2e}, alone {alone:.2e}", path.display());
        num_checked += 1;
    }
    assert!(num_checked > 15, "only {num_checked} checkpoints");
}

/// Splits of the work into steps: how many tokens of which sequence, in which order.
struct Shuffle(u64);

impl Shuffle {
    /// Below `bound`.
    fn next(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % bound as u64) as usize
    }
}

#[test]
fn mixing_order_and_batch_never_change_a_bit() {
    let quantized = |quantize| LoadOptions { quantize, ..LoadOptions::new(BackendKind::Cpu) };
    for options in [cpu_f32(), quantized(Quantize::None), quantized(Quantize::Int8), quantized(Quantize::Int4)] {
        let threads = |threads| LoadOptions { threads: Some(threads), ..options.clone() };
        let base = checkpoint("tiny-llama");
        let load = |options: &LoadOptions| {
            let mut harness = Harness::load(&base, options, 256);
            for (id, name) in ["llama-qv", "llama-all-rslora", "llama-patterns"].iter().enumerate() {
                add(&mut harness, id as u32, &adapter(name));
            }
            harness
        };
        let ways: Vec<Option<u32>> = vec![None, Some(0), Some(1), Some(2), None, Some(1), Some(0), Some(2)];
        let prompts: Vec<Vec<u32>> =
            (0..ways.len() as u32).map(|at| (0..5 + 6 * at).map(|i| (i * 29 + at * 53) % 128).collect()).collect();
        let mut alone = load(&threads(1));
        let expected: Vec<Vec<(usize, Row)>> =
            prompts.iter().zip(&ways).map(|(tokens, way)| rows(&mut alone, tokens, *way, tokens.len())).collect();
        let distinct = |a: usize, b: usize| {
            let (a, b) = (
                rows(&mut load(&threads(1)), &prompts[3], ways[a], 64),
                rows(&mut load(&threads(1)), &prompts[3], ways[b], 64),
            );
            a != b
        };
        assert!(distinct(0, 1) && distinct(1, 2) && distinct(2, 3), "each adapter is felt");
        let mut shuffle = Shuffle(7);
        for round in 0..6 {
            let mut harness = load(&threads(1 + round % 3));
            // The last layer computes those rows alone whose logits are asked for.
            let wanted = |position: usize| position.is_multiple_of(1 + round % 3);
            let mut sequences: Vec<Sequence> =
                prompts.iter().zip(&ways).map(|(tokens, way)| Sequence::through(tokens, *way)).collect();
            let mut found: Vec<Vec<(usize, Row)>> = vec![Vec::new(); ways.len()];
            loop {
                let mut order: Vec<usize> =
                    (0..ways.len()).filter(|&at| sequences[at].num_uncomputed_tokens() > 0).collect();
                if order.is_empty() {
                    break;
                }
                for at in (1..order.len()).rev() {
                    order.swap(at, shuffle.next(at + 1));
                }
                order.truncate(1 + shuffle.next(order.len()));
                // Runs of one adapter, as the engine makes them, or scattered, as it does not.
                if round % 2 == 0 {
                    order.sort_by_key(|&at| ways[at]);
                }
                let mut by_place: Vec<Option<&mut Sequence>> = sequences.iter_mut().map(Some).collect();
                let mut work: Vec<(&mut Sequence, usize)> = order
                    .iter()
                    .map(|&at| {
                        let sequence = by_place[at].take().unwrap();
                        let num_tokens = 1 + shuffle.next(sequence.num_uncomputed_tokens());
                        (sequence, num_tokens)
                    })
                    .collect();
                for (at, position, row) in harness.step(&mut work, wanted) {
                    found[order[at]].push((position, row));
                }
            }
            let mut expected = expected.clone();
            for rows in &mut expected {
                rows.retain(|(position, _)| wanted(*position));
            }
            assert!(found == expected, "{:?}, round {round}", options.quantize);
        }
    }
}

#[test]
fn an_adapter_that_is_not_there_costs_the_step_and_nothing_else() {
    let mut harness = Harness::load(&checkpoint("tiny-llama"), &cpu_f32(), NUM_BLOCKS);
    let tokens = [3, 1, 4, 1, 5];
    let plain = rows(&mut harness, &tokens, None, 8);
    add(&mut harness, 5, &adapter("llama-qv"));
    let adapted = rows(&mut harness, &tokens, Some(5), 8);
    assert!(plain != adapted);
    let twice = harness.model.add_adapter(5, &load(&harness, &adapter("llama-qv")).unwrap());
    assert!(twice.unwrap_err().to_string().contains("adapter 5"));
    let mut stranger = Sequence::through(&tokens, Some(6));
    let (batch, _) = harness.batch(&mut [(&mut stranger, 5)], |_| true);
    let error = harness.model.forward(&batch, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("names adapter 6, which is not loaded"), "{error}");
    harness.free(stranger);
    assert!(rows(&mut harness, &tokens, Some(5), 8) == adapted);
    harness.model.remove_adapter(5);
    let mut late = Sequence::through(&tokens, Some(5));
    let (batch, _) = harness.batch(&mut [(&mut late, 5)], |_| true);
    harness.model.forward(&batch, &mut |_| ()).unwrap_err();
    assert!(rows(&mut harness, &tokens, None, 8) == plain, "the base is as it was");
}

#[test]
fn an_adapter_of_another_model_or_back_end_is_refused() {
    let llama = Harness::load(&checkpoint("tiny-llama"), &cpu_f32(), NUM_BLOCKS);
    let error = load(&llama, &adapter("mistral-layers")).unwrap_err().to_string();
    assert!(error.contains("adapter_model.safetensors"), "{error}");
    let mut reference = Harness::load(&checkpoint("tiny-llama"), &reference(), NUM_BLOCKS);
    let of_cpu = load(&llama, &adapter("llama-qv")).unwrap();
    assert!(of_cpu.num_bytes() > 0);
    let error = reference.model.add_adapter(1, &of_cpu).unwrap_err().to_string();
    assert!(error.contains("another model"), "{error}");
}
