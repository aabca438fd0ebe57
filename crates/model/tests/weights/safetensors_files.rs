//! safetensors: folders with one file or shards, right and wrong.

use std::fs;

use bindery_model::weights::{LayerTensor, TensorRole, WeightFormat, WeightStore};
use safetensors::Dtype;
use serde_json::json;
use tempfile::TempDir;

use crate::builder::{config_json, model_folder, named_tensors, safetensors_bytes, write_json};

const Q: TensorRole = TensorRole::Layer(0, LayerTensor::Q);
const Q_NAME: &str = "model.layers.0.self_attn.q_proj.weight";

fn fails(folder: &TempDir, words: &[&str]) {
    let error = WeightStore::open(folder.path()).expect_err(&format!("{words:?}")).to_string();
    for word in words {
        assert!(error.contains(word), "{error:?} lacks {word:?}");
    }
}

#[test]
fn every_dense_type_is_read_as_written() {
    for (dtype, format) in
        [(Dtype::F32, WeightFormat::F32), (Dtype::F16, WeightFormat::F16), (Dtype::BF16, WeightFormat::Bf16)]
    {
        let tensors = named_tensors();
        let folder = model_folder(&config_json(), &safetensors_bytes(&tensors, dtype));
        let store = WeightStore::open(folder.path()).unwrap();
        let q = store.tensor(Q).unwrap().unwrap();
        assert_eq!((q.name, q.rows, q.cols, q.format), (Q_NAME, 32, 32, format));
        let written = &tensors.iter().find(|(name, ..)| name == Q_NAME).unwrap().2;
        let expected: Vec<f32> = written
            .iter()
            .map(|&x| match format {
                WeightFormat::F16 => half::f16::from_f32(x).to_f32(),
                WeightFormat::Bf16 => half::bf16::from_f32(x).to_f32(),
                _ => x,
            })
            .collect();
        assert_eq!(q.to_f32().unwrap(), expected);
        assert_eq!(store.describe_formats(), format!("{format} (12)"));
        assert!(store.gguf().is_none());
        assert!(store.tensor(TensorRole::Head).unwrap().is_some(), "untied");
        assert_eq!(store.num_parameters() as usize, tensors.iter().map(|(_, _, values)| values.len()).sum::<usize>());
    }
}

#[test]
fn a_tied_head_that_the_file_holds_is_used_where_its_values_differ() {
    let mut config = config_json();
    config["tie_word_embeddings"] = json!(true);
    let mut tensors = named_tensors();
    let store = |tensors: &[_]| {
        let folder = model_folder(&config, &safetensors_bytes(tensors, Dtype::F32));
        WeightStore::open(folder.path()).unwrap()
    };
    // transformers 5 does not tie them then.
    let differs = store(&tensors);
    assert!(differs.tensor(TensorRole::Head).unwrap().is_some() && !differs.config().tied_embeddings);
    let embedding = tensors[0].2.clone();
    tensors.last_mut().unwrap().2 = embedding;
    let same = store(&tensors);
    assert!(same.tensor(TensorRole::Head).unwrap().is_none() && same.config().tied_embeddings);
    // Of two tied tensors either may be there.
    tensors.remove(0);
    let head_only = store(&tensors);
    assert_eq!(head_only.tensor(TensorRole::Embedding).unwrap().unwrap().name, "lm_head.weight");
}

#[test]
fn a_base_model_without_prefix_is_read() {
    let mut config = config_json();
    config["tie_word_embeddings"] = json!(true);
    let bare: Vec<_> = named_tensors()
        .into_iter()
        .filter_map(|(name, shape, values)| Some((name.strip_prefix("model.")?.to_owned(), shape, values)))
        .collect();
    let folder = model_folder(&config, &safetensors_bytes(&bare, Dtype::F32));
    WeightStore::open(folder.path()).unwrap();
}

/// Two shards and their index; the first holds the first `split` tensors.
fn sharded(split: usize) -> TempDir {
    let tensors = named_tensors();
    let folder = tempfile::tempdir().unwrap();
    write_json(&folder.path().join("config.json"), &config_json());
    let mut weight_map = serde_json::Map::new();
    for (shard, part) in [("a.safetensors", &tensors[..split]), ("b.safetensors", &tensors[split..])] {
        fs::write(folder.path().join(shard), safetensors_bytes(part, Dtype::BF16)).unwrap();
        weight_map.extend(part.iter().map(|(name, ..)| (name.clone(), json!(shard))));
    }
    write_index(&folder, &json!({"metadata": {"total_size": 1}, "weight_map": weight_map}));
    folder
}

fn write_index(folder: &TempDir, index: &serde_json::Value) {
    write_json(&folder.path().join("model.safetensors.index.json"), index);
}

#[test]
fn shards_are_joined() {
    let whole = model_folder(&config_json(), &safetensors_bytes(&named_tensors(), Dtype::BF16));
    let whole = WeightStore::open(whole.path()).unwrap();
    for split in [1, 3, 11] {
        let folder = sharded(split);
        let store = WeightStore::open(folder.path()).unwrap();
        for role in [TensorRole::Embedding, Q, TensorRole::FinalNorm, TensorRole::Head] {
            let (ours, theirs) = (store.tensor(role).unwrap().unwrap(), whole.tensor(role).unwrap().unwrap());
            assert_eq!(ours.to_f32().unwrap(), theirs.to_f32().unwrap(), "{role:?}");
        }
    }
}

#[test]
fn missing_shards_and_tensors_are_named() {
    let folder = sharded(3);
    fs::remove_file(folder.path().join("b.safetensors")).unwrap();
    fails(&folder, &["index.json", "b.safetensors", "missing"]);

    // The index says one file, the tensor is in neither.
    let folder = sharded(3);
    let without: Vec<_> = named_tensors()[3..].to_vec();
    fs::write(folder.path().join("b.safetensors"), safetensors_bytes(&without[1..], Dtype::BF16)).unwrap();
    fails(&folder, &[&without[0].0, "b.safetensors", "missing"]);

    let tensors: Vec<_> = named_tensors().into_iter().filter(|(name, ..)| name != Q_NAME).collect();
    fails(&model_folder(&config_json(), &safetensors_bytes(&tensors, Dtype::F32)), &[Q_NAME, "missing"]);

    let folder = tempfile::tempdir().unwrap();
    write_json(&folder.path().join("config.json"), &config_json());
    fails(&folder, &["model.safetensors", "pytorch_model.bin"]);
}

#[test]
fn an_index_cannot_lead_out_of_the_folder() {
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret.safetensors");
    fs::write(&secret, safetensors_bytes(&named_tensors(), Dtype::F32)).unwrap();
    for shard in [secret.to_str().unwrap(), "../secret.safetensors", "a/../../b", ""] {
        let folder = sharded(3);
        write_index(&folder, &json!({"weight_map": {Q_NAME: shard}}));
        fails(&folder, &["index.json", "leads out", shard]);
    }
}

#[test]
fn bad_indices_are_errors() {
    for (index, word) in [
        ("{}", "weight_map"),
        ("[]", "weight_map"),
        ("{\"weight_map\": 5}", "weight_map"),
        ("{\"weight_map\": {\"x\": 5}}", "\"x\""),
        ("{\"weight_map\":", "JSON"),
        (&"[".repeat(1_000_000), "JSON"),
    ] {
        let folder = sharded(3);
        fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        fails(&folder, &["index.json", word]);
    }
    let folder = sharded(3);
    let many: serde_json::Map<_, _> = (0..600).map(|i| (format!("t{i}"), json!(format!("{i}.safetensors")))).collect();
    write_index(&folder, &json!({"weight_map": many}));
    fails(&folder, &["600 shards", "512"]);
}

#[test]
fn bad_headers_name_the_file() {
    let good = safetensors_bytes(&named_tensors(), Dtype::F32);
    let header = |json: &str| [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &[0; 64]].concat();
    for (bytes, case) in [
        (vec![], "empty"),
        (vec![1, 2, 3], "too short"),
        (good[..good.len() - 1].to_vec(), "cut by one byte"),
        (good[..good.len() / 2].to_vec(), "cut in half"),
        ([&good[..], &[0]].concat(), "a byte too many"),
        ([&u64::MAX.to_le_bytes()[..], &good[8..]].concat(), "a huge header"),
        ([&(1u64 << 33).to_le_bytes()[..], &good[8..]].concat(), "a large header"),
        (header("{"), "half an object"),
        (header(&"[".repeat(100_000)), "deep"),
        (header("{\"a\":{\"dtype\":\"F32\",\"shape\":[16],\"data_offsets\":[0,65]}}"), "size and shape"),
        (header("{\"a\":{\"dtype\":\"F32\",\"shape\":[17],\"data_offsets\":[0,68]}}"), "beyond the end"),
        (header("{\"a\":{\"dtype\":\"F32\",\"shape\":[16],\"data_offsets\":[64,0]}}"), "backwards"),
        (
            header("{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,4294967296],\"data_offsets\":[0,64]}}"),
            "overflow",
        ),
        (header("{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,64]}}"), "negative"),
        (
            header(
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[8],\"data_offsets\":[0,32]},\
                 \"b\":{\"dtype\":\"F32\",\"shape\":[12],\"data_offsets\":[16,64]}}",
            ),
            "overlap",
        ),
    ] {
        let folder = model_folder(&config_json(), &bytes);
        let error = WeightStore::open(folder.path()).expect_err(case).to_string();
        assert!(error.contains("model.safetensors"), "{case}: {error}");
    }
}

#[test]
fn wrong_shapes_types_and_foreign_tensors_are_named() {
    let change = |name: &str, new_shape: &[usize]| {
        let mut tensors = named_tensors();
        let tensor = tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap();
        tensor.1 = new_shape.to_vec();
        tensor.2.resize(new_shape.iter().product(), 0.5);
        model_folder(&config_json(), &safetensors_bytes(&tensors, Dtype::F32))
    };
    fails(&change(Q_NAME, &[32, 16]), &[Q_NAME, "[32, 16]", "[32, 32]"]);
    fails(&change(Q_NAME, &[1024]), &[Q_NAME, "[1024]", "[32, 32]"]);
    fails(&change("model.norm.weight", &[31]), &["model.norm.weight", "[31]", "[32]"]);
    fails(&change("lm_head.weight", &[9, 32]), &["lm_head.weight", "[9, 32]", "[8, 32]"]);

    let folder = model_folder(&config_json(), &safetensors_bytes(&named_tensors(), Dtype::F64));
    fails(&folder, &["F64", "BF16"]);

    let mut tensors = named_tensors();
    let norm = "model.layers.0.self_attn.q_norm.weight";
    tensors.push((norm.to_owned(), vec![16], vec![1.0; 16]));
    fails(&model_folder(&config_json(), &safetensors_bytes(&tensors, Dtype::F32)), &[norm]);
    // Old checkpoints carry the rotary frequencies along.
    tensors.last_mut().unwrap().0 = "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned();
    WeightStore::open(model_folder(&config_json(), &safetensors_bytes(&tensors, Dtype::F32)).path()).unwrap();
}

#[test]
fn biases_are_required_where_the_config_has_them() {
    let mut config = config_json();
    config["attention_bias"] = json!(true);
    let mut tensors = named_tensors();
    fails(&model_folder(&config, &safetensors_bytes(&tensors, Dtype::F32)), &["q_proj.bias", "missing"]);
    for (name, len) in [("q", 32), ("k", 16), ("v", 16), ("o", 32)] {
        tensors.push((format!("model.layers.0.self_attn.{name}_proj.bias"), vec![len], vec![0.5; len]));
    }
    let folder = model_folder(&config, &safetensors_bytes(&tensors, Dtype::F32));
    let store = WeightStore::open(folder.path()).unwrap();
    let bias = store.tensor(TensorRole::Layer(0, LayerTensor::OBias)).unwrap().unwrap();
    assert_eq!((bias.rows, bias.cols, bias.to_f32().unwrap()), (1, 32, vec![0.5; 32]));
    let plain = model_folder(&config_json(), &safetensors_bytes(&tensors, Dtype::F32));
    let plain = WeightStore::open(plain.path()).unwrap();
    assert!(plain.tensor(TensorRole::Layer(0, LayerTensor::OBias)).unwrap().is_none());
}

#[test]
fn numbers_that_are_not_finite_are_named() {
    let mut tensors = named_tensors();
    tensors.iter_mut().find(|tensor| tensor.0 == "model.norm.weight").unwrap().2[7] = f32::NAN;
    let folder = model_folder(&config_json(), &safetensors_bytes(&tensors, Dtype::F32));
    let store = WeightStore::open(folder.path()).unwrap();
    let error = store.tensor(TensorRole::FinalNorm).unwrap().unwrap().to_f32().unwrap_err().to_string();
    assert!(error.contains("model.norm.weight") && error.contains("NaN"), "{error}");
}

#[test]
fn made_up_weights_have_the_shapes_of_the_config_and_never_change() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    write_json(&path, &config_json());
    let (a, b) = (WeightStore::dummy(&path).unwrap(), WeightStore::dummy(folder.path()).unwrap());
    assert_eq!(a.describe_formats(), "F32 (12)");
    assert_eq!(a.num_bytes(), 4 * a.num_parameters());
    let (qa, qb) = (a.tensor(Q).unwrap().unwrap(), b.tensor(Q).unwrap().unwrap());
    assert_eq!((qa.rows, qa.cols, qa.num_bytes()), (32, 32, 4096));
    let values = qa.to_f32().unwrap();
    assert_eq!(values, qb.to_f32().unwrap());
    assert_ne!(values, a.tensor(TensorRole::Layer(0, LayerTensor::O)).unwrap().unwrap().to_f32().unwrap());
    assert!(values.iter().all(|x| x.abs() < 1.0) && values.iter().any(|&x| x != values[0]));
    let norm = a.tensor(TensorRole::FinalNorm).unwrap().unwrap().to_f32().unwrap();
    assert!(norm.iter().all(|x| (x - 1.0).abs() < 0.1));

    let mut config = config_json();
    config["torch_dtype"] = json!("bfloat16");
    write_json(&path, &config);
    let store = WeightStore::dummy(&path).unwrap();
    let q = store.tensor(Q).unwrap().unwrap();
    assert_eq!((q.format, q.num_bytes()), (WeightFormat::Bf16, 2048));
    for x in q.to_f32().unwrap() {
        assert_eq!(x, half::bf16::from_f32(x).to_f32());
    }
}
