//! `bindery quantize`: a folder computes what quantising at load computes, bit for bit; it is whole or not there; damage is
//! named.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use bindery_engine::{
    EngineError, Tokenizer,
    quantize::{Calibration, Progress, QuantizeOutcome, QuantizeRequest, quantize},
};
use bindery_model::{
    BackendKind, BatchSequence, ForwardBatch, LoadOptions, Model, Quantize, StepModel,
    weights::{LayerTensor, TensorRole, WeightStore},
};
use serde_json::{Value, json};
use tempfile::TempDir;

const NUM_TOKENS: usize = 24;

fn checkpoints() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/checkpoints")
}

/// A tokenizer of bytes for checkpoints that have none: what `byte_tokenizer` is, as a file.
fn with_tokenizer(checkpoint: &Path) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(checkpoint.join(name), folder.path().join(name)).unwrap();
    }
    let letters = ('a'..='z').chain([' ']).enumerate().map(|(id, letter)| (letter.to_string(), json!(id)));
    let vocabulary: serde_json::Map<String, Value> = letters.collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    folder
}

fn made(source: &Path, target: &Path, bits: Quantize, text: Option<&str>) -> Result<QuantizeOutcome, EngineError> {
    let calibration = text.map(|text| Calibration { text, context_len: 16, max_windows: Some(4) });
    let request =
        QuantizeRequest { source, target, quantize: bits, bits_per_weight: None, calibration, threads: Some(2) };
    quantize(&request, &mut |_| ControlFlow::Continue(()))
}

/// Logits of a few tokens.
fn logits(path: &Path, options: &LoadOptions) -> Vec<f32> {
    let options = LoadOptions { threads: Some(2), ..options.clone() };
    let mut model = Model::load(path, &options, &mut |_, _| ()).unwrap();
    model.allocate_kv(NUM_TOKENS.div_ceil(16)).unwrap();
    let mut batch = ForwardBatch::default();
    batch.tokens.extend((0..NUM_TOKENS as u32).map(|i| i * 7 % 26));
    batch.positions.extend(0..NUM_TOKENS as u32);
    batch.slots.extend(0..NUM_TOKENS as u32);
    batch.block_tables.extend(0..NUM_TOKENS.div_ceil(16) as u32);
    let rope_len = model.rope_regimes().map_or(0, |regimes| regimes.rope_len(NUM_TOKENS, NUM_TOKENS));
    let block_table = 0..batch.block_tables.len();
    let rows = 0..NUM_TOKENS;
    batch.sequences.push(BatchSequence { rows, block_table, context_len: NUM_TOKENS, rope_len, adapter: None });
    batch.logit_rows.extend(0..NUM_TOKENS as u32);
    model.forward(&batch, &mut |_| ()).unwrap();
    let mut logits = vec![0.0; NUM_TOKENS * model.vocab_size()];
    model.logits(0..NUM_TOKENS, &mut logits).unwrap();
    logits
}

fn cpu(quantize: Quantize) -> LoadOptions {
    LoadOptions { quantize, ..LoadOptions::new(BackendKind::Cpu) }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A few checkpoints have widths that 32 does not divide.
fn is_too_narrow(error: &EngineError) -> bool {
    error.to_string().contains("none of its matrices can be quantised")
}

/// Every family, with its fused projections, stacked experts and tied heads.
#[test]
fn a_folder_computes_what_quantising_at_load_computes() {
    let mut num_families = 0;
    for name in names(&checkpoints()) {
        let checkpoint = checkpoints().join(&name);
        let has_weights = ["config.json", "model.safetensors"].iter().all(|file| checkpoint.join(file).exists());
        if !has_weights || WeightStore::open(&checkpoint).is_ok_and(|store| store.describe_formats().contains("int")) {
            continue;
        }
        let source = with_tokenizer(&checkpoint);
        let home = tempfile::tempdir().unwrap();
        for (bits, folder) in [(Quantize::Int8, "int8"), (Quantize::Int4, "int4")] {
            let target = home.path().join(folder);
            let outcome = match made(source.path(), &target, bits, None) {
                Ok(outcome) => outcome,
                Err(error) if is_too_narrow(&error) => continue,
                Err(error) => panic!("{name}: {error}"),
            };
            num_families += usize::from(bits == Quantize::Int4);
            let at_load = logits(source.path(), &cpu(bits));
            assert!(logits(&target, &cpu(Quantize::None)) == at_load, "{name} {bits:?}");
            // Quantised already, so the flag changes nothing.
            assert!(logits(&target, &cpu(Quantize::Int4)) == at_load, "{name} {bits:?}");
            let bits_per_weight = outcome.report.total.bits_per_weight();
            assert!(
                bits_per_weight < outcome.report.source_bytes as f64 * 8.0 / outcome.report.total.num_parameters as f64
            );
        }
        assert!(
            names(home.path()).iter().all(|name| ["int4", "int8"].contains(&name.as_str())),
            "nothing else is left"
        );
    }
    assert!(num_families > 12, "{num_families}");
}

/// The description of the decoder takes the place of config.json, and names are made anew.
#[test]
fn a_gguf_file_becomes_a_folder_too() {
    let vocabulary = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/text/byte-level.gguf");
    assert!(Tokenizer::from_gguf(&bindery_model::weights::gguf::GgufFile::open(&vocabulary).unwrap()).is_ok());
    let mut num_files = 0;
    for name in names(&checkpoints()) {
        let source = checkpoints().join(&name).join("model.gguf");
        if !source.exists() {
            continue;
        }
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("made");
        match made(&source, &target, Quantize::Int4, None) {
            Ok(_) => {
                assert!(logits(&target, &cpu(Quantize::None)) == logits(&source, &cpu(Quantize::Int4)), "{name}");
                assert_eq!(
                    names(&target),
                    [
                        "config.json",
                        "generation_config.json",
                        "model.safetensors",
                        "tokenizer.json",
                        "tokenizer_config.json"
                    ]
                );
                num_files += 1;
            }
            Err(error) if is_too_narrow(&error) => assert!(!target.exists()),
            // The tiny files' vocabularies are placeholders in some families.
            Err(EngineError::Text(_)) => assert!(!target.exists()),
            Err(error) => panic!("{name}: {error}"),
        }
    }
    assert!(num_files > 5, "{num_files}");
}

/// Calibration gathers inputs of every matrix of every family; what it makes loads, and differs.
#[test]
fn a_text_calibrates_every_family() {
    let text = "the quick brown fox jumps over the lazy dog and runs away from it as fast as it can ".repeat(2);
    for name in ["tiny-llama", "tiny-mixtral", "tiny-qwen2-moe", "tiny-gemma3", "tiny-falcon-7b", "tiny-phi3"] {
        let checkpoint = checkpoints().join(name);
        if !checkpoint.join("model.safetensors").exists() {
            continue;
        }
        let source = with_tokenizer(&checkpoint);
        let home = tempfile::tempdir().unwrap();
        let [plain, calibrated] = ["plain", "calibrated"].map(|folder| home.path().join(folder));
        made(source.path(), &plain, Quantize::Int4, None).unwrap();
        let outcome = made(source.path(), &calibrated, Quantize::Int4, Some(&text)).unwrap();
        assert!(outcome.calibration_time.is_some());
        let weights = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
        assert_eq!(weights(&plain).len(), weights(&calibrated).len());
        assert!(weights(&plain) != weights(&calibrated), "{name}");
        let config: Value = serde_json::from_slice(&fs::read(calibrated.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["quantization_config"]["calibrated"], true);
        assert!(logits(&calibrated, &cpu(Quantize::None)).iter().all(|logit| logit.is_finite()));
    }
}

/// A folder takes no more bits than were asked for, loses less the more there are, and depends on nothing else.
#[test]
fn a_folder_is_made_in_as_many_bits_as_are_asked_for() {
    let text = "the quick brown fox jumps over the lazy dog and runs away from it as fast as it can ".repeat(2);
    let weights = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
    for name in ["tiny-llama", "tiny-mixtral", "tiny-gemma3"] {
        let checkpoint = checkpoints().join(name);
        if !checkpoint.join("model.safetensors").exists() {
            continue;
        }
        let source = with_tokenizer(&checkpoint);
        let home = tempfile::tempdir().unwrap();
        let make = |name: &str, bits: f64, text: Option<&str>, threads: usize| {
            let target = home.path().join(name);
            let request = QuantizeRequest {
                source: source.path(),
                target: &target,
                quantize: Quantize::Int4,
                bits_per_weight: Some(bits),
                calibration: text.map(|text| Calibration { text, context_len: 16, max_windows: Some(4) }),
                threads: Some(threads),
            };
            quantize(&request, &mut |_| ControlFlow::Continue(())).map(|outcome| (outcome.report, target))
        };
        // Dense tensors weigh in so small a model: what fits is said by the refusal, and fits.
        let refused = make("too-few", 4.0, None, 2).unwrap_err().to_string();
        let (_, least) = refused.split_once("take ").unwrap_or_else(|| panic!("{refused}"));
        let least: f64 = least.split(' ').next().unwrap().parse().unwrap();
        assert!(refused.contains("4 bits a weight were asked for") && least > 4.5, "{refused}");

        // All there is: what int8 makes.
        let (report, largest) = make("largest", 20.0, None, 2).unwrap();
        let int8 = home.path().join("int8");
        made(source.path(), &int8, Quantize::Int8, None).unwrap();
        assert!(weights(&largest) == weights(&int8), "{name}");
        let range = report.total.bits_per_weight() - least;

        let mut errors = Vec::new();
        let mut formats = std::collections::BTreeSet::new();
        for (index, share) in [0.01, 0.3, 0.6, 0.95].into_iter().enumerate() {
            let bits = least + share * range;
            let (report, folder) = make(&format!("{index}"), bits, None, 2).unwrap();
            let used = report.total.bits_per_weight();
            assert!(used <= bits && used > bits - 0.4 * range, "{name}: {used} of {bits}");
            errors.push(report.total.relative_error.unwrap());
            formats.extend(report.groups.iter().map(|group| group.formats.clone()));
            assert!(logits(&folder, &cpu(Quantize::None)).iter().all(|logit| logit.is_finite()));
        }
        assert!(errors.is_sorted_by(|more, less| more > less), "{name}: {errors:?}");
        assert!(formats.len() > 2, "{name}: {formats:?}");

        let bits = least + 0.5 * range;
        let of = |folder, threads| weights(&make(folder, bits, Some(&text), threads).unwrap().1);
        assert!(of("one-thread", 1) == of("three-threads", 3), "{name}");
        let config: Value =
            serde_json::from_slice(&fs::read(home.path().join("one-thread/config.json")).unwrap()).unwrap();
        assert_eq!(config["quantization_config"]["bits_per_weight"], bits);
    }
}

/// Tokens that no training met have rows of next to nothing, often the last ones: however rows are shared out, the matrix is
/// judged as a whole.
#[test]
fn rows_of_next_to_nothing_do_not_keep_a_matrix_from_being_quantised() {
    let source = with_tokenizer(&checkpoints().join("tiny-llama"));
    let path = source.path().join("model.safetensors");
    let (header, mut data) = read_tensors(&path);
    let offsets = &header["lm_head.weight"]["data_offsets"];
    let [start, end] = [0, 1].map(|i| offsets[i].as_u64().unwrap() as usize);
    // The last quarter, in bf16: 2^-27.
    let tiny = data[start..end].len() / 4 * 3;
    data[start + tiny..end].as_chunks_mut::<2>().0.fill(0x3200_u16.to_le_bytes());
    write_tensors(&path, &header, &data);
    for (index, bits_per_weight) in [None, Some(20.0)].into_iter().enumerate() {
        let request = QuantizeRequest {
            source: source.path(),
            target: &source.path().join(format!("{index}")),
            quantize: Quantize::Int4,
            bits_per_weight,
            calibration: None,
            threads: Some(8),
        };
        quantize(&request, &mut |_| ControlFlow::Continue(())).unwrap();
    }
}

#[test]
fn the_observer_sees_the_inputs_of_every_matrix() {
    for name in ["tiny-llama", "tiny-mixtral", "tiny-qwen2-moe", "tiny-falcon-7b"] {
        let checkpoint = checkpoints().join(name);
        if !checkpoint.join("model.safetensors").exists() {
            continue;
        }
        let load = || {
            let options = LoadOptions::new(BackendKind::Reference);
            let mut model = Model::load(&checkpoint, &options, &mut |_, _| ()).unwrap();
            model.allocate_kv(2).unwrap();
            model
        };
        let mut model = load();
        assert!(model.take_importance().is_none());
        model.observe_inputs().unwrap();
        let mut batch = ForwardBatch::default();
        batch.tokens.extend([3, 1, 4, 1, 5]);
        batch.positions.extend(0..5);
        batch.slots.extend(0..5);
        batch.block_tables.push(0);
        let rope_len = model.rope_regimes().map_or(0, |regimes| regimes.rope_len(5, 5));
        batch.sequences.push(BatchSequence { rows: 0..5, block_table: 0..1, context_len: 5, rope_len, adapter: None });
        batch.logit_rows.push(4);
        let mut logits = vec![0.0; model.vocab_size()];
        let mut compute = |model: &mut Model, batch: &ForwardBatch| {
            model.forward(batch, &mut |_| ()).unwrap();
            model.logits(batch.logit_rows.len() - 1..batch.logit_rows.len(), &mut logits).unwrap();
            logits.clone()
        };
        let observed = compute(&mut model, &batch);
        let importance = model.take_importance().unwrap();
        let difference = |other: &[f32]| observed.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference(&compute(&mut load(), &batch)) < 1e-4, "{name}: other logits than unobserved");
        // Every row counts in the last layer, too, as it does where the logits of all are asked for.
        batch.logit_rows = (0..5).collect();
        let mut all_rows = load();
        all_rows.observe_inputs().unwrap();
        assert!(difference(&compute(&mut all_rows, &batch)) < 1e-4, "{name}");
        let of_all_rows = all_rows.take_importance().unwrap();
        let store = WeightStore::open(&checkpoint).unwrap();
        let config = store.config();
        let head = if config.tied_embeddings { TensorRole::Embedding } else { TensorRole::Head };
        assert_eq!(importance.mean_squares(head).unwrap().len(), config.hidden_size, "{name}");
        let mut num_experts = 0;
        for layer in 0..config.num_layers() {
            for tensor in [LayerTensor::Q, LayerTensor::K, LayerTensor::V, LayerTensor::O] {
                let view = store.tensor(TensorRole::Layer(layer, tensor)).unwrap().unwrap();
                let squares = importance.mean_squares(TensorRole::Layer(layer, tensor)).unwrap();
                assert_eq!(
                    squares,
                    of_all_rows.mean_squares(TensorRole::Layer(layer, tensor)).unwrap(),
                    "{name} {tensor:?}"
                );
                assert_eq!(squares.len(), view.cols, "{name} {tensor:?}");
                assert!(squares.iter().any(|&square| square > 0.0));
            }
            let of_layer = |tensor| importance.mean_squares(TensorRole::Layer(layer, tensor));
            match &config.experts {
                Some(experts) => {
                    let seen = |expert: &usize| of_layer(LayerTensor::ExpertDown(*expert)).is_some();
                    num_experts += (0..experts.num_experts).filter(seen).count();
                }
                None => assert_eq!(of_layer(LayerTensor::Down).unwrap().len(), config.mlp.intermediate_size),
            }
        }
        assert!(config.experts.is_none() || num_experts > 0, "{name}");
    }
    let mut cpu = Model::load(&checkpoints().join("tiny-llama"), &cpu(Quantize::None), &mut |_, _| ()).unwrap();
    assert!(cpu.observe_inputs().unwrap_err().to_string().contains("reference"));
}

#[test]
fn what_is_there_or_quantised_already_is_refused() {
    let source = with_tokenizer(&checkpoints().join("tiny-llama"));
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("made");
    made(source.path(), &target, Quantize::Int8, None).unwrap();
    let before = fs::read(target.join("model.safetensors")).unwrap();
    let refused = |source: &Path, target: &Path| made(source, target, Quantize::Int4, None).unwrap_err().to_string();
    assert!(refused(source.path(), &target).contains("is there already"));
    assert!(refused(&target, &home.path().join("again")).contains("quantised already (Bindery int8"));
    assert!(refused(source.path(), Path::new("/")).contains("is there already"));
    assert!(refused(source.path(), &home.path().join("no/such/place")).contains("cannot make a folder"));
    assert!(refused(&home.path().join("nothing"), &home.path().join("other")).contains("nothing"));
    assert_eq!(fs::read(target.join("model.safetensors")).unwrap(), before);
    assert_eq!(names(home.path()), ["made"]);
}

#[test]
fn what_is_stopped_leaves_nothing_and_what_is_unfinished_does_not_load() {
    let source = with_tokenizer(&checkpoints().join("tiny-llama"));
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("made");
    let request = QuantizeRequest {
        source: source.path(),
        target: &target,
        quantize: Quantize::Int4,
        bits_per_weight: None,
        calibration: None,
        threads: None,
    };
    let mut seen = 0;
    let stopped = quantize(&request, &mut |progress| {
        assert!(matches!(progress, Progress::Quantizing { .. }));
        seen += 1;
        if seen < 5 {
            return ControlFlow::Continue(());
        }
        // As a kill would leave it: the folder under another name, without its config.
        let unfinished = home.path().join(&names(home.path())[0]);
        assert!(unfinished.join("model.safetensors").exists());
        assert!(WeightStore::open(&unfinished).unwrap_err().to_string().contains("no config.json"));
        ControlFlow::Break(())
    });
    assert!(stopped.unwrap_err().to_string().contains("stopped"));
    assert!(names(home.path()).is_empty());
}

/// Header and data of a safetensors file.
fn read_tensors(path: &Path) -> (serde_json::Map<String, Value>, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + len]).unwrap(), bytes[8 + len..].to_vec())
}

fn write_tensors(path: &Path, header: &serde_json::Map<String, Value>, data: &[u8]) {
    let header = Value::Object(header.clone()).to_string();
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()).unwrap();
}

#[test]
fn damaged_folders_are_named() {
    let source = with_tokenizer(&checkpoints().join("tiny-llama"));
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("made");
    made(source.path(), &target, Quantize::Int4, None).unwrap();
    let file = target.join("model.safetensors");
    let (header, data) = read_tensors(&file);
    const UP: &str = "model.layers.0.mlp.up_proj.weight";
    let refused = |change: &dyn Fn(&mut serde_json::Map<String, Value>), words: &[&str]| {
        let mut changed = header.clone();
        change(&mut changed);
        write_tensors(&file, &changed, &data);
        let error = WeightStore::open(&target).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    let renamed = |header: &mut serde_json::Map<String, Value>, part: &str, to: &str| {
        let entry = header.remove(&format!("{UP}{part}")).unwrap();
        header.insert(format!("{UP}{to}"), entry);
    };
    refused(&|header| renamed(header, ".scales", ".other"), &[".scales\" is missing"]);
    refused(&|header| renamed(header, ".codes", ".other"), &["up_proj.weight\" is missing"]);
    refused(&|header| renamed(header, ".scales", ".sub_scales"), &["is missing"]);
    refused(&|header| header[&format!("{UP}.scales")]["dtype"] = "BF16".into(), &[".scales", "BF16", "F16"]);
    refused(&|header| header[&format!("{UP}.codes")]["dtype"] = "I8".into(), &[".codes", "I8", "U8"]);
    let reshaped = |part: &'static str| {
        move |header: &mut serde_json::Map<String, Value>| {
            let shape = header[&format!("{UP}{part}")]["shape"].as_array_mut().unwrap();
            let [rows, cols] = [shape[0].as_u64().unwrap(), shape[1].as_u64().unwrap()];
            (shape[0], shape[1]) = ((rows * 2).into(), (cols / 2).into());
        }
    };
    refused(&reshaped(".scales"), &[UP]);
    refused(&reshaped(".codes"), &[UP]);

    // Numbers that are none are found when they are read.
    let start = header[&format!("{UP}.scales")]["data_offsets"][0].as_u64().unwrap() as usize;
    let mut damaged = data.clone();
    damaged[start..start + 2].copy_from_slice(&0x7e00_u16.to_le_bytes());
    write_tensors(&file, &header, &damaged);
    let error = Model::load(&target, &cpu(Quantize::None), &mut |_, _| ()).err().unwrap().to_string();
    assert!(error.contains(UP) && error.contains("NaN"), "{error}");
    // A file that was cut off.
    write_tensors(&file, &header, &data[..data.len() / 2]);
    assert!(WeightStore::open(&target).unwrap_err().to_string().contains("model.safetensors"));
    // A layout of the future.
    write_tensors(&file, &header, &data);
    let path = target.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["quantization_config"]["version"] = 2.into();
    fs::write(&path, config.to_string()).unwrap();
    assert!(WeightStore::open(&target).unwrap_err().to_string().contains("version 2"));
}
