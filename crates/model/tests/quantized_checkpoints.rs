//! GPTQ, AWQ and compressed-tensors checkpoints against what their packers meant.
//!
//! tests/golden/quantized.py makes tests/quantized and says how. Nothing here knows where a layout keeps its bits, but for
//! the names of parts that are broken on purpose. Invariant: each folder there is listed in its expected.json.

#![allow(clippy::unwrap_used, reason = "tests")]

mod decoder_harness;

use std::{collections::BTreeMap, fs, path::PathBuf};

use bindery_kernels::{Cpu, Isa, Matrix};
use bindery_model::{
    BackendKind, Dtype, LoadOptions, ModelError, Quantize,
    weights::{LayerTensor as T, TensorRole, WeightStore},
};
use decoder_harness::{Harness, Sequence, log_softmax, repository};
use safetensors::{Dtype as Stored, SafeTensors, tensor::TensorView};
use serde::Deserialize;
use tempfile::TempDir;

#[derive(Deserialize)]
struct Expected {
    tokens: Vec<u32>,
    layouts: BTreeMap<String, Layout>,
}

#[derive(Deserialize)]
struct Layout {
    /// Of a code as the cpu backend keeps it; 0 where it is unpacked.
    kept_bits: usize,
    /// Of each projection's f32 values.
    fnv1a: BTreeMap<String, String>,
    /// After the last token.
    logprobs: Vec<f64>,
}

const PROJECTIONS: [(&str, T); 7] = [
    ("q_proj", T::Q),
    ("k_proj", T::K),
    ("v_proj", T::V),
    ("o_proj", T::O),
    ("gate_proj", T::Gate),
    ("up_proj", T::Up),
    ("down_proj", T::Down),
];

/// f32 operations in another order. Measured: 1.1e-5 on `reference`, 5.3e-6 on `cpu`.
const F32_TOLERANCE: f64 = 1e-3;
/// Mean divergence with activations rounded to eight bits, the only thing rounded. Measured: 3.0e-3 at most.
const QUANTIZED_BOUND: f64 = 1e-2;

fn folder(name: &str) -> PathBuf {
    repository().join("tests/quantized").join(name)
}

fn expected() -> Expected {
    let expected: Expected = serde_json::from_str(&fs::read_to_string(folder("expected.json")).unwrap()).unwrap();
    let folders = fs::read_dir(folder("")).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir()).count();
    assert_eq!(folders, expected.layouts.len());
    expected
}

fn fnv1a(values: &[f32]) -> String {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes());
    let hash =
        bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}

fn rows_of(matrix: &Matrix) -> Vec<f32> {
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    for (row, out) in values.chunks_exact_mut(matrix.cols()).enumerate() {
        matrix.row(row, out);
    }
    values
}

#[test]
fn weights_are_bit_for_bit_what_was_packed_and_stay_so_in_the_kernels_formats() {
    let cpus = [Cpu::new(Isa::Scalar, 1), Cpu::new(Cpu::detect(), 3)];
    for (name, layout) in expected().layouts {
        let store = WeightStore::open(&folder(&name)).unwrap();
        for (projection, role) in PROJECTIONS {
            // Experts are compared by what they answer.
            let Some(hash) = layout.fnv1a.get(projection) else { continue };
            let view = store.tensor(TensorRole::Layer(0, role)).unwrap().unwrap();
            let values = view.to_f32().unwrap();
            assert_eq!(fnv1a(&values), *hash, "{name} {projection}");
            let mut row = vec![0.0; view.cols];
            view.dequantize_row(view.rows - 1, &mut row).unwrap();
            assert_eq!(row, values[values.len() - view.cols..], "{name} {projection}");
            for cpu in &cpus {
                let kept_bits = layout.kept_bits;
                match view.import(cpu, Dtype::Auto, Quantize::None).unwrap() {
                    Matrix::Quantized(packed) => {
                        assert_eq!(packed.format().bits.count(), kept_bits, "{name} {projection}");
                        assert_eq!(rows_of(&Matrix::Quantized(packed)), values, "{name} {projection}");
                    }
                    dense => {
                        assert_eq!(kept_bits, 0, "{name} {projection}");
                        let halves: Vec<f32> = values.iter().map(|&x| half::f16::from_f32(x).to_f32()).collect();
                        assert_eq!(rows_of(&dense), halves, "{name} {projection}");
                    }
                }
                assert_eq!(rows_of(&view.import_f32(cpu).unwrap()), values, "{name} {projection}");
            }
        }
    }
}

fn last_logprobs(name: &str, options: &LoadOptions, tokens: &[u32]) -> Vec<f64> {
    let mut harness = Harness::load(&folder(name), options, 8);
    let mut sequence = Sequence::new(tokens);
    let rows = harness.prefill(&mut sequence, 7, |position| position + 1 == tokens.len());
    log_softmax(&rows[0].1)
}

#[test]
#[allow(clippy::print_stderr, reason = "measured values are worth reading beside the bound (--nocapture)")]
fn answers_are_those_of_transformers_on_the_same_weights() {
    let Expected { tokens, layouts } = expected();
    let cpu = LoadOptions::new(BackendKind::Cpu);
    let exact = LoadOptions { dtype: Dtype::F32, dequantize: true, ..cpu.clone() };
    for (name, layout) in layouts {
        for options in [&LoadOptions::new(BackendKind::Reference), &exact] {
            let logprobs = last_logprobs(&name, options, &tokens);
            let differences = logprobs.iter().zip(&layout.logprobs).map(|(ours, theirs)| (ours - theirs).abs());
            let worst = differences.fold(0.0, f64::max);
            eprintln!("measured {name} {:?}: {worst:.1e}", options.backend);
            assert!(worst <= F32_TOLERANCE, "{name}: {worst}");
        }
        let logprobs = last_logprobs(&name, &cpu, &tokens);
        let divergence: f64 =
            layout.logprobs.iter().zip(&logprobs).map(|(theirs, ours)| theirs.exp() * (theirs - ours)).sum();
        eprintln!("measured {name} as stored: {divergence:.1e}");
        assert!(divergence.abs() <= QUANTIZED_BOUND, "{name}: {divergence}");
    }
}

/// A tensor of a file: name, type, shape, bytes.
type Named = (String, Stored, Vec<usize>, Vec<u8>);

/// A copy of a checkpoint with its tensors changed.
fn changed(name: &str, change: impl FnOnce(&mut Vec<Named>)) -> TempDir {
    let bytes = fs::read(folder(name).join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<Named> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        .collect();
    change(&mut tensors);
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    let copy = tempfile::tempdir().unwrap();
    fs::write(copy.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    fs::copy(folder(name).join("config.json"), copy.path().join("config.json")).unwrap();
    copy
}

fn part<'a>(tensors: &'a mut [Named], name: &str) -> &'a mut Named {
    tensors.iter_mut().find(|tensor| tensor.0.ends_with(name)).unwrap()
}

fn open_error(folder: &TempDir) -> String {
    WeightStore::open(folder.path()).unwrap_err().to_string()
}

#[test]
fn parts_that_do_not_fit_are_named() {
    for (name, missing) in [
        ("gptq4", "v_proj.qzeros"),
        ("gptq4", "v_proj.scales"),
        ("gptq4-act-order", "v_proj.g_idx"),
        ("awq", "v_proj.qzeros"),
        ("w4a16", "v_proj.weight_scale"),
        ("w4a16", "v_proj.weight_shape"),
        ("w8a8", "v_proj.weight_scale"),
    ] {
        let copy = changed(name, |tensors| tensors.retain(|tensor| !tensor.0.ends_with(missing)));
        let error = open_error(&copy);
        assert!(error.contains(missing) && error.contains("missing"), "{error}");
    }
    // The same bytes in another shape.
    for (name, wrong) in [
        ("gptq4", "down_proj.qweight"),
        ("gptq4", "down_proj.qzeros"),
        ("gptq3", "down_proj.scales"),
        ("awq", "down_proj.qweight"),
        ("awq", "down_proj.qzeros"),
        ("w4a16", "down_proj.weight_packed"),
        ("w4a16", "down_proj.weight_scale"),
        ("w4a16-asymmetric", "down_proj.weight_zero_point"),
        ("w8a8", "down_proj.weight"),
    ] {
        let copy = changed(name, |tensors| {
            let shape = &mut part(tensors, wrong).2;
            *shape = vec![shape.iter().product::<usize>() / 2, 2];
        });
        let error = open_error(&copy);
        assert!(error.contains("down_proj"), "{name} {wrong}: {error}");
    }
}

#[test]
fn bad_contents_are_named() {
    for group in [3_i32, -1, i32::MIN] {
        let copy = changed("gptq4-act-order", |tensors| {
            part(tensors, "down_proj.g_idx").3[8..12].copy_from_slice(&group.to_le_bytes());
        });
        let error = open_error(&copy);
        assert!(error.contains("down_proj.g_idx") && error.contains(&group.to_string()), "{error}");
    }
    let copy = changed("w4a16", |tensors| part(tensors, "down_proj.weight_shape").3.fill(0xff));
    assert!(open_error(&copy).contains("down_proj.weight_shape"));
    for (name, scales) in
        [("gptq4", "down_proj.scales"), ("awq", "down_proj.scales"), ("w8a8", "down_proj.weight_scale")]
    {
        // Not a number in f16 and in bf16.
        let copy = changed(name, |tensors| part(tensors, scales).3[..2].copy_from_slice(&0x7fff_u16.to_le_bytes()));
        let store = WeightStore::open(copy.path()).unwrap();
        let view = store.tensor(TensorRole::Layer(0, T::Down)).unwrap().unwrap();
        let cpu = Cpu::new(Isa::Scalar, 1);
        for error in [view.import(&cpu, Dtype::Auto, Quantize::None).unwrap_err(), view.to_f32().unwrap_err()] {
            let text = error.to_string();
            assert!(matches!(error, ModelError::BadFile { .. }), "{text}");
            assert!(text.contains("down_proj") && text.contains("NaN"), "{text}");
        }
    }
}

/// No span fits them, so they are unpacked, and right.
#[test]
fn groups_of_different_sizes_are_unpacked() {
    let copy = changed("gptq4-act-order", |tensors| {
        let index = &mut part(tensors, "down_proj.g_idx").3;
        let other = i32::from(index[0] == 0);
        index[..4].copy_from_slice(&other.to_le_bytes());
    });
    let store = WeightStore::open(copy.path()).unwrap();
    let cpu = Cpu::new(Isa::Scalar, 1);
    let import = |role| {
        let view = store.tensor(TensorRole::Layer(0, role)).unwrap().unwrap();
        (view.import(&cpu, Dtype::Auto, Quantize::None).unwrap(), view.to_f32().unwrap())
    };
    assert!(import(T::Up).0.is_quantized());
    let (down, values) = import(T::Down);
    assert!(!down.is_quantized());
    let halves: Vec<f32> = values.iter().map(|&x| half::f16::from_f32(x).to_f32()).collect();
    assert_eq!(rows_of(&down), halves);
}

#[test]
fn modules_may_have_other_bits_than_the_config_says_of_all() {
    let copy = changed("gptq4", |_| ());
    let text = fs::read_to_string(copy.path().join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["quantization_config"]["bits"] = 8.into();
    fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
    let values = |path: &std::path::Path| {
        let store = WeightStore::open(path).unwrap();
        store.tensor(TensorRole::Layer(0, T::Down)).unwrap().unwrap().to_f32().unwrap()
    };
    assert_eq!(values(copy.path()), values(&folder("gptq4")));
}

#[test]
fn other_methods_are_refused_by_name() {
    let text = fs::read_to_string(folder("gptq4").join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (quantization, words) in [
        (serde_json::json!({"quant_method": "fp8"}), &["fp8", "awq"][..]),
        (serde_json::json!({"quant_method": "bitsandbytes"}), &["bitsandbytes"]),
        (serde_json::json!({"quant_method": "mxfp4"}), &["mxfp4"]),
        (serde_json::json!({"quant_method": "gptq", "bits": 5, "group_size": 32}), &["5 bits", "2, 3, 4, 8"]),
        (serde_json::json!({"quant_method": "gptq", "bits": 4}), &["group_size"]),
        (serde_json::json!({"quant_method": "gptq", "bits": 4, "group_size": 0}), &["group_size", "0"]),
        (serde_json::json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}), &["marlin"]),
        (serde_json::json!({"quant_method": "awq", "bits": 4, "version": "gemv"}), &["gemv"]),
        (serde_json::json!({"quant_method": "compressed-tensors", "format": "float-quantized"}), &["float-quantized"]),
    ] {
        let copy = changed("gptq4", |_| ());
        let mut config = config.clone();
        config["quantization_config"] = quantization;
        fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
        let error = open_error(&copy);
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}
