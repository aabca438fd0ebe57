//! What is said of a model before it is loaded, against what loading it then takes.
//!
//! The figures of a loaded model come from the buffers that were allocated, those of a file from its own header.

#![allow(clippy::unwrap_used, reason = "tests")]

mod decoder_harness;

use std::{
    fs,
    path::{Path, PathBuf},
};

use bindery_model::{
    BackendKind, Dtype, KvCacheDtype, LoadOptions, Model, Quantize, TensorPart,
    weights::{HeldAs, gguf::GgufFile},
};
use decoder_harness::repository;
use safetensors::SafeTensors;

/// Every model of tests/checkpoints and tests/quantized: folders, and the GGUF files in them.
fn models() -> Vec<PathBuf> {
    let mut models = Vec::new();
    for parent in ["tests/checkpoints", "tests/quantized"] {
        for entry in fs::read_dir(repository().join(parent)).unwrap() {
            let folder = entry.unwrap().path();
            if !folder.is_dir() {
                continue;
            }
            let files = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
            models.extend(files.filter(|path| path.extension().is_some_and(|extension| extension == "gguf")));
            // One is only there as a GGUF file.
            if folder.join("config.json").exists() {
                models.push(folder);
            }
        }
    }
    assert!(models.len() > 40, "{}", models.len());
    models
}

fn options() -> Vec<LoadOptions> {
    let cpu = LoadOptions { threads: Some(1), ..LoadOptions::new(BackendKind::Cpu) };
    vec![
        cpu.clone(),
        LoadOptions { quantize: Quantize::Int4, ..cpu.clone() },
        LoadOptions { quantize: Quantize::Int8, kv_cache_dtype: KvCacheDtype::Int8, ..cpu.clone() },
        LoadOptions { dtype: Dtype::Bf16, ..cpu.clone() },
        LoadOptions { dtype: Dtype::F32, dequantize: true, ..cpu.clone() },
        LoadOptions { dummy: true, ..cpu },
        LoadOptions::new(BackendKind::Reference),
    ]
}

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn real_model() -> Option<PathBuf> {
    let path = std::env::var_os("BINDERY_TEST_MODEL").map(PathBuf::from);
    if path.is_none() {
        eprintln!("SKIPPED: BINDERY_TEST_MODEL is not set, so the default model is not reported on");
    }
    path
}

fn check(path: &Path, options: &LoadOptions) {
    let what = format!("{} {options:?}", path.display());
    let opened = Model::open(path, options).unwrap();
    let report = opened.report().unwrap();
    let model = opened.load(&mut |_, _| ()).unwrap();
    let info = model.info();
    assert_eq!(report.weight_bytes, info.weight_bytes, "{what}");
    assert_eq!(report.stored_bytes, info.stored_weight_bytes, "{what}");
    assert_eq!(report.num_parameters, info.num_parameters, "{what}");
    assert_eq!(report.kv_cache_dtype, info.kv_cache_dtype, "{what}");
    assert!(report.kv_bytes_per_token.contains(&(info.kv_cache_dtype, info.kv_bytes_per_token)), "{what}");
    // What a pass multiplies one row with: all but what stands in no product.
    let in_part = |wanted: &[TensorPart], figure: fn(&bindery_model::TensorGroup) -> u64| -> u64 {
        report.groups.iter().filter(|group| wanted.contains(&group.part)).map(figure).sum()
    };
    let product = |part| info.products.iter().find(|product| product.part == part).unwrap();
    assert_eq!(
        in_part(&[TensorPart::Attention], |group| group.held_bytes),
        product("qkv").num_bytes + product("output").num_bytes,
        "{what}"
    );
    let vectors = in_part(&[TensorPart::Norms], |group| group.num_parameters);
    let table = if info.tied_embeddings { 0 } else { (info.vocab_size * info.hidden_size) as u64 };
    let multiplied: u64 = info.products.iter().map(|product| product.num_parameters).sum();
    assert_eq!(report.num_active_parameters, multiplied + vectors + table, "{what}");
    // What only rows with logits meet: the last layer behind its keys and values, and the head.
    let (qkv, output, mlp, head) = (product("qkv"), product("output"), product("mlp"), product("head"));
    assert_eq!((qkv.num_kept_parameters, qkv.num_kept_bytes), (0, 0), "{what}");
    assert_eq!(output.num_kept_parameters * info.num_layers as u64, output.num_parameters, "{what}");
    assert_eq!((head.num_kept_parameters, head.num_kept_bytes), (head.num_parameters, head.num_bytes), "{what}");
    for product in [output, mlp] {
        assert!(product.num_kept_parameters > 0 && product.num_kept_bytes > 0, "{what}");
        assert!(product.num_kept_bytes <= product.num_bytes, "{what}");
    }
}

#[test]
fn what_a_model_is_said_to_take_is_what_loading_it_takes() {
    for path in models() {
        for options in options() {
            check(&path, &options);
        }
    }
    if let Some(path) = real_model() {
        check(&path, &options()[0]);
    }
}

/// The headers of the files, by other readers.
#[test]
fn stored_bytes_are_those_of_the_files_tensors() {
    // Rotary factors are no weights; nor are shapes, groups of inputs that lie in order, and packers' biases of zeros.
    let is_weight = |name: &str| !["rope_", "weight_shape"].iter().any(|part| name.contains(part));
    let is_in_order = |groups: &[u8]| groups.as_chunks().0.is_sorted_by_key(|&group| i32::from_le_bytes(group));
    for path in models() {
        let report = Model::open(&path, &LoadOptions::new(BackendKind::Cpu)).unwrap().report().unwrap();
        let stored: usize = if path.is_dir() {
            let bytes = fs::read(path.join("model.safetensors")).unwrap();
            let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
            let is_packed = tensors.iter().any(|(name, _)| name.ends_with(".qweight"));
            let used = |name: &str, bytes: &[u8]| {
                let is_idle_index = name.contains("g_idx") && is_in_order(bytes);
                let is_idle_bias =
                    is_packed && name.rsplit('.').next() == Some("bias") && bytes.iter().all(|&byte| byte == 0);
                is_weight(name) && !is_idle_index && !is_idle_bias
            };
            tensors.iter().filter(|(name, view)| used(name, view.data())).map(|(_, view)| view.data().len()).sum()
        } else {
            let file = GgufFile::open(&path).unwrap();
            file.tensors().filter(|(name, _)| is_weight(name)).map(|(_, tensor)| tensor.range.len()).sum()
        };
        assert_eq!(report.stored_bytes, stored as u64, "{}", path.display());
        assert_eq!(report.groups.iter().map(|group| group.stored_bytes).sum::<u64>(), report.stored_bytes);
    }
}

#[test]
fn groups_say_what_becomes_of_their_tensors() {
    let groups = |options: &LoadOptions| {
        let path = repository().join("tests/checkpoints/tiny-mixtral");
        Model::open(&path, options).unwrap().report().unwrap().groups
    };
    let cpu = LoadOptions::new(BackendKind::Cpu);
    let parts: Vec<TensorPart> = groups(&cpu).iter().map(|group| group.part).collect();
    let expected = [
        TensorPart::Embedding,
        TensorPart::Attention,
        TensorPart::Router,
        TensorPart::Experts,
        TensorPart::Head,
        TensorPart::Norms,
    ];
    assert_eq!(parts, expected);
    for group in groups(&LoadOptions { quantize: Quantize::Int4, ..cpu }) {
        let held = match group.part {
            TensorPart::Router | TensorPart::Norms => HeldAs::F32,
            _ => HeldAs::Int4,
        };
        assert!(group.held == held || group.held == HeldAs::Stored, "{group:?}");
        if held == HeldAs::Int4 {
            // An f16 for 32 codes of 5 bits, since 256 does not divide the inputs, and rows that fill a tile.
            let bits = group.held_bytes as f64 * 8.0 / group.num_parameters as f64;
            assert!((5.0..6.0).contains(&bits), "{bits}: {group:?}");
        }
    }
}
