//! An adapter beside a base gives what its product gives that is added into the base's own file, on every family.
//!
//! The second oracle of adapters beside peft (tests/adapted.rs): here nothing knows which rows of a fused tensor are which, for a
//! module's product is added to the module's tensor as it is stored. Invariant: every checkpoint of tests/checkpoints is met,
//! and each adapter is felt.

#![allow(clippy::unwrap_used, reason = "tests")]

mod decoder_harness;

use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

use bindery_model::{AdapterLimits, BackendKind, Dtype, LoadOptions, Quantize, StepModel as _};
use decoder_harness::{Harness, Row, Sequence, checkpoint, log_softmax, repository};
use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

/// Merging is in f64, and its sum rounded once; both backends compute in f32. Measured: 3e-5.
const TOLERANCE: f64 = 2e-4;
/// An adapter moves log-probabilities by more than this, or it proves nothing.
const FELT: f64 = 0.1;
const RANK: usize = 3;
const ALPHA: usize = 6;
const ID: u32 = 7;

/// Modules that an adapter may stand beside, by the last part of their names.
const MODULES: [&str; 14] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "qkv_proj",
    "gate_up_proj",
    "query_key_value",
    "dense",
    "dense_h_to_4h",
    "dense_4h_to_h",
    "lm_head",
];

/// A matrix in f64, by rows.
#[derive(Clone, Debug, PartialEq)]
struct Matrix {
    rows: usize,
    cols: usize,
    values: Vec<f64>,
}

/// Numbers in -1..1, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        f64::from((self.0 >> 40) as u32) / f64::from(1_u32 << 23) - 1.0
    }

    /// Values that f32 holds.
    fn matrix(&mut self, rows: usize, cols: usize, width: f64) -> Matrix {
        let values = (0..rows * cols).map(|_| f64::from((self.next() * width) as f32)).collect();
        Matrix { rows, cols, values }
    }
}

impl Matrix {
    fn times(&self, other: &Self) -> Self {
        assert_eq!(self.cols, other.rows);
        let at = |row: usize, col: usize| -> f64 {
            (0..self.cols).map(|k| self.values[row * self.cols + k] * other.values[k * other.cols + col]).sum()
        };
        let values =
            (0..self.rows).flat_map(|row| (0..other.cols).map(move |col| (row, col))).map(|(row, col)| at(row, col));
        Self { rows: self.rows, cols: other.cols, values: values.collect() }
    }

    fn from(view: &TensorView<'_>) -> Option<Self> {
        let &[rows, cols] = view.shape() else { return None };
        let pairs = view.data().chunks_exact(2).map(|pair| [pair[0], pair[1]]);
        let values = match view.dtype() {
            safetensors::Dtype::BF16 => pairs.map(|pair| half::bf16::from_le_bytes(pair).to_f64()).collect(),
            safetensors::Dtype::F16 => pairs.map(|pair| half::f16::from_le_bytes(pair).to_f64()).collect(),
            safetensors::Dtype::F32 => view
                .data()
                .chunks_exact(4)
                .map(|four| f64::from(f32::from_le_bytes(four.try_into().unwrap())))
                .collect(),
            other => panic!("tiny checkpoints are in {other:?}, too"),
        };
        Some(Self { rows, cols, values })
    }

    fn bytes(&self) -> Vec<u8> {
        self.values.iter().flat_map(|&value| (value as f32).to_le_bytes()).collect()
    }
}

/// One low-rank product, by the module's name in the file.
struct Pair {
    module: String,
    a: Matrix,
    b: Matrix,
}

impl Pair {
    /// Felt, and not louder than what it stands beside.
    fn random(module: &str, outputs: usize, inputs: usize, numbers: &mut Numbers) -> Self {
        let a = numbers.matrix(RANK, inputs, 1.0 / (inputs as f64).sqrt());
        Self { module: module.to_owned(), a, b: numbers.matrix(outputs, RANK, 0.25) }
    }

    /// What it adds to its module's weight.
    fn product(&self) -> Matrix {
        let mut product = self.b.times(&self.a);
        product.values.iter_mut().for_each(|value| *value *= (ALPHA / RANK) as f64);
        product
    }
}

fn write_adapter(folder: &Path, pairs: &[Pair]) {
    let halves = pairs.iter().flat_map(|pair| [(pair, "lora_A", &pair.a), (pair, "lora_B", &pair.b)]);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = halves
        .map(|(pair, half, matrix)| {
            let name = format!("base_model.model.{}.{half}.weight", pair.module);
            (name, vec![matrix.rows, matrix.cols], matrix.bytes())
        })
        .collect();
    write_tensors(&folder.join("adapter_model.safetensors"), &tensors);
    let mut targets: Vec<&str> = pairs.iter().map(|pair| last(&pair.module)).collect();
    targets.sort_unstable();
    targets.dedup();
    let config = json!({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets});
    fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
}

fn write_tensors(path: &Path, tensors: &[(String, Vec<usize>, Vec<u8>)]) {
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

fn last(module: &str) -> &str {
    module.rsplit('.').next().unwrap()
}

fn config_of(base: &str) -> Value {
    serde_json::from_slice(&fs::read(checkpoint(base).join("config.json")).unwrap()).unwrap()
}

/// The base's matrices that an adapter may stand beside, by module.
fn modules_of(base: &str) -> BTreeMap<String, Matrix> {
    let bytes = fs::read(checkpoint(base).join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let is_of_experts =
        |name: &str| ["experts", "block_sparse_moe", "shared_expert"].iter().any(|part| name.contains(part));
    file.iter()
        .filter_map(|(name, view)| Some((name.strip_suffix(".weight")?.to_owned(), view)))
        .filter(|(module, _)| MODULES.contains(&last(module)) && !is_of_experts(module))
        .filter_map(|(module, view)| Some((module, Matrix::from(&view)?)))
        .collect()
}

/// The base with what is to be added to its modules' tensors, each as it is stored.
fn write_merged(folder: &Path, base: &str, added: &BTreeMap<String, Matrix>) {
    fs::copy(checkpoint(base).join("config.json"), folder.join("config.json")).unwrap();
    let bytes = fs::read(checkpoint(base).join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut num_merged = 0;
    let owned: Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)> = file
        .iter()
        .map(|(name, view)| match name.strip_suffix(".weight").and_then(|module| added.get(module)) {
            Some(delta) => {
                let mut merged = Matrix::from(&view).unwrap();
                assert_eq!((merged.rows, merged.cols), (delta.rows, delta.cols), "{name}");
                merged.values.iter_mut().zip(&delta.values).for_each(|(value, delta)| *value += delta);
                num_merged += 1;
                (name.to_owned(), safetensors::Dtype::F32, view.shape().to_vec(), merged.bytes())
            }
            None => (name.to_owned(), view.dtype(), view.shape().to_vec(), view.data().to_vec()),
        })
        .collect();
    assert_eq!(num_merged, added.len(), "every product has its tensor");
    let views =
        owned.iter().map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

fn rows(harness: &mut Harness, tokens: &[u32], adapter: Option<u32>) -> Vec<Row> {
    let mut sequence = Sequence::through(tokens, adapter);
    let rows = harness.prefill(&mut sequence, 9, |_| true);
    harness.free(sequence);
    rows.into_iter().map(|(_, row)| row).collect()
}

/// The largest difference of a log-probability that means anything: one token in a million.
fn difference(one: &[Row], other: &[Row]) -> f64 {
    let differences = one.iter().zip(other).flat_map(|(one, other)| {
        let (one, other) = (log_softmax(one), log_softmax(other));
        one.into_iter()
            .zip(other)
            .filter(|(one, other)| one.max(*other) > -14.0)
            .map(|(one, other)| (one - other).abs())
    });
    differences.fold(0.0, f64::max)
}

#[allow(clippy::print_stderr, reason = "measured values are worth reading beside the bound (--nocapture)")]
fn eprintln_measured(what: &str, worst: f64) {
    eprintln!("measured {what}: {worst:.2e}");
}

/// The adapter of `pairs` beside `base`, and `base` with `added` in its file, are one model.
fn check(what: &str, base: &str, pairs: &[Pair], added: &BTreeMap<String, Matrix>) {
    let (adapter, merged) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_adapter(adapter.path(), pairs);
    write_merged(merged.path(), base, added);
    let vocab_size = config_of(base)
        .pointer("/text_config/vocab_size")
        .or(config_of(base).get("vocab_size"))
        .unwrap()
        .as_u64()
        .unwrap();
    let tokens: Vec<u32> = (0..23_u64).map(|at| ((at * at * 7 + 3 * at + 5) % vocab_size) as u32).collect();
    let cpu = LoadOptions { dtype: Dtype::F32, dequantize: true, ..LoadOptions::new(BackendKind::Cpu) };
    for options in [LoadOptions::new(BackendKind::Reference), cpu] {
        let mut beside = Harness::load(&checkpoint(base), &options, 8);
        let loaded = beside.model.adapter_loader().load(adapter.path(), &AdapterLimits::default());
        let loaded = loaded.unwrap_or_else(|error| panic!("{what}: {error}"));
        beside.model.add_adapter(ID, &Arc::new(loaded)).unwrap();
        let (plain, adapted) = (rows(&mut beside, &tokens, None), rows(&mut beside, &tokens, Some(ID)));
        let mut inside = Harness::load(merged.path(), &options, 8);
        let worst = difference(&adapted, &rows(&mut inside, &tokens, None));
        let felt = difference(&adapted, &plain);
        eprintln_measured(&format!("{what} on {:?}, which moves by {felt:.2}", options.backend), worst);
        assert!(felt > FELT, "{what}: moves log-probabilities by {felt:.2e} only");
        assert!(worst < TOLERANCE, "{what} on {:?}: off by {worst:.2e}", options.backend);
    }
}

/// Every module of every checkpoint, fused or not, in whatever order its rows are stored.
#[test]
fn adapters_are_what_merging_them_into_the_file_gives() {
    let mut bases: Vec<String> = fs::read_dir(repository().join("tests/checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("model.safetensors").exists())
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    bases.sort();
    assert!(bases.len() >= 26, "{bases:?}");
    for base in &bases {
        let mut numbers = Numbers(base.bytes().map(u64::from).sum());
        let pairs: Vec<Pair> = modules_of(base)
            .iter()
            .map(|(module, weight)| Pair::random(module, weight.rows, weight.cols, &mut numbers))
            .collect();
        assert!(pairs.len() >= 4, "{base} has modules");
        let added = pairs.iter().map(|pair| (pair.module.clone(), pair.product())).collect();
        check(base, base, &pairs, &added);
    }
}

/// One half large and the other small, by the same power of two: the product is what it was. Found with halves that f16 cannot hold,
/// whose adapter had no effect, silently.
#[test]
fn halves_of_any_size_are_one_product() {
    const BASE: &str = "tiny-llama";
    let tokens: Vec<u32> = (0..23_u32).map(|at| (at * at * 7 + 3 * at + 5) % 128).collect();
    for quantize in [Quantize::None, Quantize::Int8] {
        let options = LoadOptions { dtype: Dtype::F16, quantize, ..LoadOptions::new(BackendKind::Cpu) };
        let adapted = |exponent: i32| {
            let mut numbers = Numbers(5);
            let scaled = |mut matrix: Matrix, exponent: i32| {
                matrix.values.iter_mut().for_each(|value| *value *= f64::from(exponent).exp2());
                matrix
            };
            let pairs: Vec<Pair> = modules_of(BASE)
                .iter()
                .map(|(module, weight)| Pair::random(module, weight.rows, weight.cols, &mut numbers))
                .map(|Pair { module, a, b }| Pair { module, a: scaled(a, exponent), b: scaled(b, -exponent) })
                .collect();
            let folder = tempfile::tempdir().unwrap();
            write_adapter(folder.path(), &pairs);
            let mut harness = Harness::load(&checkpoint(BASE), &options, 8);
            let loaded = harness.model.adapter_loader().load(folder.path(), &AdapterLimits::default()).unwrap();
            harness.model.add_adapter(ID, &Arc::new(loaded)).unwrap();
            rows(&mut harness, &tokens, Some(ID))
        };
        let as_trained = adapted(0);
        for exponent in [-40, -18, -12, 12, 18, 40] {
            let worst = difference(&as_trained, &adapted(exponent));
            eprintln_measured(&format!("halves times 2^{exponent} ({quantize:?})"), worst);
            assert!(worst == 0.0, "halves times 2^{exponent} ({quantize:?}): off by {worst:.2e}");
        }
    }
}

/// `[queries, keys and values]` of a layer, in outputs.
fn qkv_rows(base: &str) -> (usize, usize) {
    let config = config_of(base);
    let number = |key: &str| config[key].as_u64().unwrap() as usize;
    let width = config["head_dim"]
        .as_u64()
        .map_or(number("hidden_size") / number("num_attention_heads"), |width| width as usize);
    (number("num_attention_heads") * width, number("num_key_value_heads") * width)
}

fn below(above: &[Matrix]) -> Matrix {
    let values = above.iter().flat_map(|matrix| matrix.values.iter().copied()).collect();
    Matrix { rows: above.iter().map(|matrix| matrix.rows).sum(), cols: above[0].cols, values }
}

fn cut(matrix: &Matrix, rows: std::ops::Range<usize>) -> Matrix {
    let values = matrix.values[rows.start * matrix.cols..rows.end * matrix.cols].to_vec();
    Matrix { rows: rows.len(), cols: matrix.cols, values }
}

/// Trained on a base whose projections are apart, served beside one that has them in one tensor.
#[test]
fn split_targets_stand_beside_fused_bases() {
    for base in ["tiny-phi3", "tiny-phi4-mini"] {
        let ((q, kv), mut numbers) = (qkv_rows(base), Numbers(23));
        let (mut pairs, mut added) = (Vec::new(), BTreeMap::new());
        for (module, weight) in modules_of(base) {
            let (names, sizes): (&[&str], Vec<usize>) = match last(&module) {
                "qkv_proj" => (&["q_proj", "k_proj", "v_proj"], vec![q, kv, kv]),
                "gate_up_proj" => (&["gate_proj", "up_proj"], vec![weight.rows / 2; 2]),
                _ => continue,
            };
            let parent = module.rsplit_once('.').unwrap().0;
            let apart: Vec<Pair> = names
                .iter()
                .zip(&sizes)
                .map(|(name, &rows)| Pair::random(&format!("{parent}.{name}"), rows, weight.cols, &mut numbers))
                .collect();
            added.insert(module.clone(), below(&apart.iter().map(Pair::product).collect::<Vec<_>>()));
            pairs.extend(apart);
        }
        assert!(!pairs.is_empty());
        check(&format!("split targets beside {base}"), base, &pairs, &added);
    }
}

/// And the other way round.
#[test]
fn fused_targets_stand_beside_split_bases() {
    for base in ["tiny-llama", "tiny-mistral", "tiny-qwen3", "tiny-gemma2"] {
        let ((q, kv), mut numbers) = (qkv_rows(base), Numbers(29));
        let (mut pairs, mut added) = (Vec::new(), BTreeMap::new());
        for (module, weight) in modules_of(base) {
            let (parent, name) = module.rsplit_once('.').unwrap_or(("", &module));
            let (fused, names, sizes): (_, &[&str], Vec<usize>) = match name {
                "q_proj" => ("qkv_proj", &["q_proj", "k_proj", "v_proj"], vec![q, kv, kv]),
                "gate_proj" => ("gate_up_proj", &["gate_proj", "up_proj"], vec![weight.rows; 2]),
                _ => continue,
            };
            let pair = Pair::random(&format!("{parent}.{fused}"), sizes.iter().sum(), weight.cols, &mut numbers);
            let (product, mut first) = (pair.product(), 0);
            for (name, rows) in names.iter().zip(sizes) {
                added.insert(format!("{parent}.{name}"), cut(&product, first..first + rows));
                first += rows;
            }
            pairs.push(pair);
        }
        assert!(!pairs.is_empty());
        check(&format!("fused targets beside {base}"), base, &pairs, &added);
    }
}
