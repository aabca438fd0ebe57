//! Broken adapters, each made from a good one: refused, and the reason says which tensor or key, which value and which limit.

use bindery_model::{
    AdapterLimits, AdapterTarget, ModelError, OpenedAdapter,
    config::{DecoderConfig, RopeStyle},
};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::{
    folder::{Draft, LIMITS, Stored, adapter, base, written},
    goldens::{ADAPTERS, golden, open, read},
};

const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj";

/// Queries and values of the tiny Llama, rank 8.
fn good() -> Draft {
    Draft::of("llama-qv")
}

fn a(module: &str) -> String {
    format!("{module}.lora_A.weight")
}

fn b(module: &str) -> String {
    format!("{module}.lora_B.weight")
}

/// Mapped, such a file would end the process with a bus error, and every request in it.
#[test]
fn a_file_that_is_written_over_in_place_is_read_as_it_was_opened() {
    let base = base("tiny-llama");
    let temp = tempfile::tempdir().unwrap();
    for (name, weights) in [(".", "adapter_model.safetensors"), ("adapter.gguf", "adapter.gguf")] {
        for file in ["adapter_config.json", weights] {
            std::fs::copy(adapter("llama-qv").join(file), temp.path().join(file)).unwrap();
        }
        let opened = OpenedAdapter::open(&temp.path().join(name), &base, &LIMITS).unwrap();
        let query = |opened: &OpenedAdapter| opened.read(Some(0), AdapterTarget::Query, RopeStyle::Neox).unwrap();
        let before = query(&opened);
        assert!(before.is_some());
        // As a copy over it begins.
        std::fs::OpenOptions::new().write(true).open(temp.path().join(weights)).unwrap().set_len(0).unwrap();
        assert_eq!(query(&opened), before, "{weights}");
        let error = OpenedAdapter::open(&temp.path().join(name), &base, &LIMITS).unwrap_err().to_string();
        assert!(error.contains("the file is empty"), "{error}");
    }
}

/// A pair of zeros, rank 8.
fn pair(copy: Draft, module: &str, outputs: usize, inputs: usize) -> Draft {
    copy.with(&a(module), Stored::zeros(&[8, inputs])).with(&b(module), Stored::zeros(&[outputs, 8]))
}

fn refused_on(base: &DecoderConfig, copy: &Draft, expected: &str) {
    let error = match copy.open_on(base) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("taken, though {expected:?}"),
    };
    assert!(error.contains(expected), "{expected:?} is not in {error:?}");
    assert!(error.contains("adapter_config.json") || error.contains("adapter_model.safetensors"), "{error}");
}

fn refused(copy: Draft, expected: &str) {
    refused_on(&base("tiny-llama"), &copy, expected);
}

#[test]
fn good_ones_are_taken_under_every_usual_name() {
    let expected: Vec<_> = open("llama-qv").targets().collect();
    assert_eq!(expected.len(), 4);
    for copy in [
        good(),
        good().renamed(|name| name.replace("base_model.model.", "")),
        good().renamed(|name| name.replace("base_model.model.model.", "base_model.model.")),
        good().renamed(|name| name.replace("model.model.model.", "model.model.language_model.model.")),
        good().renamed(|name| name.replace("model.model.model.", "model.model.model.language_model.")),
        good().renamed(|name| name.replace(".weight", ".default.weight")),
    ] {
        let opened = copy.open_on(&base("tiny-llama")).unwrap();
        assert!(opened.targets().eq(expected.iter().copied()), "{:?}", copy.tensors.keys());
        let layer = Some(1);
        assert_eq!(
            read(&opened, layer, AdapterTarget::Value, RopeStyle::Neox),
            read(&open("llama-qv"), layer, AdapterTarget::Value, RopeStyle::Neox)
        );
    }
}

#[test]
fn other_methods_are_refused_by_their_keys() {
    for (key, value, expected) in [
        ("peft_type", json!("LOHA"), "peft_type is \"LOHA\", which is not supported; \"LORA\" is"),
        ("peft_type", json!(null), "peft_type is missing"),
        ("peft_type", json!(3), "peft_type is 3"),
        ("use_dora", json!(true), "use_dora is set: DoRA"),
        ("use_qalora", json!(true), "use_qalora is set: QALoRA"),
        ("lora_bias", json!(true), "lora_bias is set"),
        ("fan_in_fan_out", json!(true), "fan_in_fan_out is set"),
        ("use_bdlora", json!({"nblocks": 2}), "use_bdlora is set"),
        ("modules_to_save", json!(["embed_tokens"]), "modules_to_save is set: modules trained whole"),
        ("trainable_token_indices", json!([1, 2]), "trainable_token_indices is set"),
        ("target_parameters", json!(["mlp.experts.down_proj"]), "target_parameters is set"),
        ("layer_replication", json!([[0, 1]]), "layer_replication is set"),
        ("alora_invocation_tokens", json!([5]), "alora_invocation_tokens is set"),
        (
            "init_lora_weights",
            json!("pissa_niter_4"),
            "init_lora_weights is \"pissa_niter_4\", so the adapter belongs to a changed",
        ),
        ("init_lora_weights", json!("olora"), "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", json!(4), "init_lora_weights is 4; true, false or a name is expected"),
    ] {
        refused(good().set(key, value), expected);
    }
    for (key, value) in [
        ("init_lora_weights", json!("eva")),
        ("init_lora_weights", json!("gaussian")),
        ("init_lora_weights", json!(false)),
        ("modules_to_save", json!([])),
        ("bias", json!("all")),
        ("use_dora", json!(false)),
        ("kasa_config", json!(null)),
        ("some_day", json!({"a": 1})),
    ] {
        let opened = good().set(key, value.clone()).open_on(&base("tiny-llama"));
        assert!(opened.is_ok(), "{key} {value}: {:?}", opened.err());
    }
}

#[test]
fn wrong_values_are_refused_by_key_and_value() {
    for (key, value, expected) in [
        ("r", json!(0), "r is 0; a whole number from 1 is expected"),
        ("r", json!(-8), "r is -8"),
        ("r", json!(8.5), "r is 8.5"),
        ("r", json!(u64::MAX), "have rank 8, adapter_config.json says 18446744073709551615"),
        ("r", json!(16), "have rank 8, adapter_config.json says 16"),
        ("lora_alpha", json!("16"), "lora_alpha is \"16\"; a number is expected"),
        ("lora_alpha", json!(1e300), "is scaled by"),
        ("use_rslora", json!("yes"), "use_rslora is \"yes\"; true or false is expected"),
        ("rank_pattern", json!({"q_proj": 0}), "rank_pattern[\"q_proj\"] is 0"),
        ("rank_pattern", json!({"q_proj": 4}), "have rank 8, adapter_config.json says 4"),
        ("rank_pattern", json!([4]), "rank_pattern is a list of 1; an object is expected"),
        ("alpha_pattern", json!({"(?<!k)_proj": 4}), "cannot be read as Python reads it"),
        ("alpha_pattern", json!({"q_proj": [1]}), "alpha_pattern[\"q_proj\"] is a list of 1"),
        ("target_modules", json!(7), "target_modules is 7; a list of names or an expression is expected"),
        ("target_modules", json!(["q_proj", 7]), "target_modules is 7; names of modules is expected"),
        ("layers_to_transform", json!("0"), "layers_to_transform is \"0\""),
        ("layers_to_transform", json!([-1]), "layers_to_transform is -1"),
        ("layers_pattern", json!([1]), "layers_pattern is 1; an expression or a list of them is expected"),
        (
            "layers_pattern",
            json!("(?=layers)layers"),
            "layers_pattern[\"(?=layers)layers\"]: this expression cannot be read",
        ),
        ("layers_pattern", json!(vec!["layers"; 300]), "layers_pattern has 300 expressions; at most 256 are read"),
    ] {
        refused(good().set(key, value), expected);
    }
    let many: serde_json::Map<String, Value> = (0..9000).map(|i| (format!("layers.{i}"), json!(4))).collect();
    refused(good().set("rank_pattern", Value::Object(many)), "rank_pattern has 9000 entries; at most 8192 are read");
    let many: serde_json::Map<String, Value> = (0..300).map(|i| (format!("(layers).{i}"), json!(4))).collect();
    refused(good().set("alpha_pattern", Value::Object(many)), "alpha_pattern has more than 256 regular expressions");
}

#[test]
fn tensors_that_peft_would_leave_out_are_refused() {
    for (key, value, expected) in [
        ("target_modules", json!(["v_proj"]), "target_modules does not name it, so peft leaves them out"),
        ("target_modules", json!(["proj", "v_proj"]), "target_modules does not name it"),
        ("target_modules", json!(r".*\.self_attn\.v_proj"), "target_modules does not name it"),
        ("target_modules", json!("q_proj|v_proj"), "target_modules does not name it"),
        ("exclude_modules", json!(["q_proj"]), "exclude_modules names it"),
        ("exclude_modules", json!(r".*\.0\..*"), "exclude_modules names it"),
        ("layers_to_transform", json!([1]), "layers_to_transform does not list its layer"),
        ("layers_to_transform", json!(1), "layers_to_transform does not list its layer"),
    ] {
        refused(good().set(key, value), expected);
    }
    for (key, value) in [
        ("target_modules", json!("all-linear")),
        ("target_modules", json!(null)),
        ("target_modules", json!(r".*\.(q|v)_proj")),
        // Looking ahead is Python's alone: not checked.
        ("target_modules", json!(r"^(?!.*vision).*\.(q|v)_proj")),
        ("exclude_modules", json!(["vision_tower", "lm_head"])),
        ("layers_to_transform", json!([0, 1])),
        ("layers_to_transform", json!([])),
    ] {
        let opened = good().set(key, value.clone()).open_on(&base("tiny-llama"));
        assert!(opened.is_ok(), "{key} {value}: {:?}", opened.err());
    }
}

/// As peft 0.21's `check_target_module_exists` decides for `model.layers.0.self_attn.q_proj` and its like.
#[test]
fn layers_are_numbered_by_what_layers_pattern_finds() {
    let with = |pattern: Value, layers: Value| good().set("layers_pattern", pattern).set("layers_to_transform", layers);
    for (pattern, layers) in [
        (json!("layers"), json!([0, 1])),
        (json!(["h", "layers"]), json!([0, 1])),
        (json!("lay.*"), json!([0, 1, 7])),
        (json!("(h|layers)"), json!([0, 1])),
        (json!("model.layers"), json!([0, 1])),
        (json!(""), json!([0, 1])),
        (json!([]), json!([0, 1])),
        // Without layers_to_transform it says nothing.
        (json!("h"), json!([])),
    ] {
        let opened = with(pattern.clone(), layers.clone()).open_on(&base("tiny-llama"));
        assert!(opened.is_ok(), "{pattern} {layers}: {:?}", opened.err());
    }
    for (pattern, layers, expected) in [
        (json!("layers"), json!([1]), "layers_to_transform does not list its layer"),
        (json!("h"), json!([0]), "layers_pattern finds no layer's number in its name"),
        (json!(["h", "blocks"]), json!([0]), "layers_pattern finds no layer's number in its name"),
        (json!("model"), json!([0]), "layers_pattern finds no layer's number in its name"),
        (json!("ayers"), json!([0]), "layers_pattern finds no layer's number in its name"),
        // Without brackets the bar parts the whole expression in two.
        (json!("h|layers"), json!([0]), "layers_pattern finds no layer's number in its name"),
        (json!("model|layers"), json!([0]), "layers_pattern finds no layer's number in its name"),
    ] {
        refused(with(pattern, layers), expected);
    }
}

#[test]
fn other_tensors_are_refused_by_name() {
    let other = |name: &str, shape: &[usize]| good().with(name, Stored::zeros(shape));
    for (copy, expected) in [
        (other(&format!("{Q}.lora_magnitude_vector"), &[64]), "lora_magnitude_vector\" is a magnitude of DoRA"),
        (other(&format!("{Q}.lora_B.bias"), &[64]), "lora_B.bias\" is a bias"),
        (other(&format!("{Q}.bias"), &[64]), "q_proj.bias\" is a bias"),
        (other("base_model.model.model.embed_tokens.lora_embedding_A", &[8, 128]), "is an adapter of the embeddings"),
        (other("base_model.model.model.embed_tokens.weight", &[128, 64]), "is neither lora_A nor lora_B of a module"),
        (other("base_model.model.lm_head.weight", &[128, 64]), "is neither lora_A nor lora_B of a module"),
        (
            other("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", &[2, 64]),
            "is embeddings of some tokens",
        ),
        (pair(good(), "base_model.model.model.embed_tokens", 64, 64), "changes the embeddings, which is not supported"),
        (
            pair(good(), "base_model.model.model.layers.0.self_attn.c_attn", 64, 64),
            "which the base (llama, 2 layers) does not have; what an adapter may change in it: q_proj, ",
        ),
        (
            pair(good(), "base_model.model.transformer.h.0.self_attention.dense", 64, 64),
            "does not have; what an adapter",
        ),
        (
            pair(good(), "base_model.model.model.vision_tower.layers.0.fc1", 64, 64),
            "does not have; what an adapter may",
        ),
        (
            pair(good(), "base_model.model.model.layers.2.self_attn.q_proj", 64, 64),
            "is of layer 2, which the base (llama, 2 layers) does not have: this adapter was made for another model",
        ),
        (pair(good(), "base_model.model.model.layers.-1.self_attn.q_proj", 64, 64), "is of layer -1, which"),
        (pair(good(), "base_model.model.model.layers.99999999999999999999.self_attn.q_proj", 64, 64), "does not have"),
        (
            good().with("base_model.model.lm_head.base_layer.weight", Stored::zeros(&[130, 64])),
            "of shape [130, 64] is a weight of the base that the base (llama, 2 layers) does not have in this shape",
        ),
    ] {
        refused(copy, expected);
    }
}

#[test]
fn experts_are_refused_and_attention_beside_them_is_not() {
    let mixture = base("tiny-qwen3-moe");
    let good = Draft::of("qwen3-moe-attention");
    assert!(good.open_on(&mixture).is_ok());
    for module in
        ["mlp.gate", "mlp.experts.0.gate_proj", "mlp.experts", "mlp.experts.base_layer", "mlp.shared_expert.up_proj"]
    {
        let copy = pair(good.clone(), &format!("base_model.model.model.layers.0.{module}"), 64, 64);
        refused_on(
            &mixture,
            &copy,
            "changes a router or experts, which is not supported yet; adapters of the attention",
        );
    }
    let copy = pair(good, "base_model.model.model.layers.0.block_sparse_moe.experts.1.w2", 64, 64);
    refused_on(&base("tiny-mixtral"), &copy, "changes a router or experts");
}

#[test]
fn wrong_tensors_are_refused_by_name_and_shape() {
    let numbers = |dtype: Dtype, bytes: usize| Stored { dtype, shape: vec![8, 64], bytes: vec![0; 8 * 64 * bytes] };
    for (copy, expected) in [
        (good().without(&b(Q)), "q_proj.lora_A.weight\" has no lora_B beside it"),
        (good().without(&a(Q)), "q_proj.lora_B.weight\" has no lora_A beside it"),
        (
            good().with(&a(Q), Stored::zeros(&[8, 63])),
            "change a matrix of 64 x 63; in the base (llama, 2 layers) it is 64 x 64",
        ),
        (good().with(&b(Q), Stored::zeros(&[65, 8])), "of shape [65, 8] change a matrix of 65 x 64; in the base"),
        (
            good().with(&b(Q), Stored::zeros(&[64, 4])),
            "do not fit each other: rows of the first are columns of the second",
        ),
        (good().with(&a(Q), Stored::zeros(&[8, 64, 1])), "has the shape [8, 64, 1]; a matrix has two sizes"),
        (good().with(&a(Q), Stored::zeros(&[512])), "has the shape [512]; a matrix has two sizes"),
        (
            good().with(&a(Q), Stored::zeros(&[0, 64])).with(&b(Q), Stored::zeros(&[64, 0])),
            "is empty: its shape is [0, 64]",
        ),
        (
            good().with(&a(Q), Stored::zeros(&[65, 64])).with(&b(Q), Stored::zeros(&[64, 65])),
            "rank 65 is over the limit of 64",
        ),
        (good().with(&a(Q), numbers(Dtype::F64, 8)), "is stored as F64, which is not supported; F32, F16 and BF16 are"),
        (good().with(&a(Q), numbers(Dtype::I8, 1)), "is stored as I8"),
        (
            good().with(&a(&Q["base_model.model.".len()..]), numbers(Dtype::F32, 4)),
            "are the same half of \"model.layers.0.self_attn.q_proj\"",
        ),
        (
            good().with(&format!("{Q}.lora_A.other.weight"), numbers(Dtype::F32, 4)),
            "are the same half of \"model.layers.0.self_attn.q_proj\"",
        ),
        (
            good().renamed(|name| {
                name.replace(".weight", if name.contains("q_proj") { ".one.weight" } else { ".two.weight" })
            }),
            "tensors of two adapters are in this file, \"one\" and \"two\"",
        ),
        // A second pair for the same queries, by another name for the same layer.
        (
            pair(good().set("target_modules", json!(null)), "layers.0.self_attn.q_proj", 64, 64),
            "both change the query of one layer",
        ),
        (
            pair(good().set("target_modules", json!(null)), "model.layers.0.self_attn.qkv_proj", 128, 64),
            "both change the",
        ),
    ] {
        refused(copy, expected);
    }
    let none = Draft { tensors: std::collections::BTreeMap::new(), ..good() };
    refused(none, "there is no lora_A and lora_B in this file");
}

#[test]
fn another_base_is_told_by_layers_names_and_shapes() {
    for (base_name, expected) in [
        ("tiny-mistral", "it is 96 x 64: this adapter was made for another model"),
        ("tiny-llama-bias", "this adapter was made for another model"),
        (
            "tiny-falcon-7b",
            "which the base (falcon, 2 layers) does not have; what an adapter may change in it: query_key_value",
        ),
    ] {
        refused_on(&base(base_name), &good(), expected);
    }
    refused_on(&base("tiny-llama"), &Draft::of("falcon-7b"), "which the base (llama, 2 layers) does not have");
    // Six layers onto two.
    let one = Draft::of("gemma3-all");
    assert!(one.open_on(&base("tiny-gemma2")).is_err());
    // What it is said to be made for is nobody's business.
    let elsewhere = good().set("base_model_name_or_path", json!("C:\\models\\quite-another"));
    let opened = elsewhere.open_on(&base("tiny-llama")).unwrap();
    assert_eq!(opened.info().base_model_name_or_path.as_deref(), Some("C:\\models\\quite-another"));
    assert!(good().set("base_model_name_or_path", json!(["x"])).open_on(&base("tiny-llama")).is_ok());
}

#[test]
fn numbers_that_are_not_finite_are_refused_when_they_are_read() {
    for (half, value, expected) in [
        (a(Q), f32::NAN, "lora_A.weight\": row 2 holds NaN"),
        (b(Q), f32::INFINITY, "lora_B.weight\": row 16 holds inf"),
        (b(Q), f32::MAX, "scaled by 1.5 it holds inf"),
    ] {
        let mut copy = good();
        let bytes = &mut copy.tensors.get_mut(&half).unwrap().bytes;
        bytes[130 * 4..131 * 4].copy_from_slice(&value.to_le_bytes());
        let folder = copy.write();
        let opened = OpenedAdapter::open(folder.path(), &base("tiny-llama"), &LIMITS).unwrap();
        let error = opened.read(Some(0), AdapterTarget::Query, RopeStyle::Neox).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected:?} is not in {error:?}");
        assert!(opened.read(Some(0), AdapterTarget::Value, RopeStyle::Neox).is_ok());
    }
}

#[test]
fn limits_hold_for_rank_and_bytes() {
    for name in ADAPTERS {
        let (config, info) = (base(&golden(name).base), open(name).info().clone());
        let open = |limits: AdapterLimits| OpenedAdapter::open(&adapter(name), &config, &limits);
        let exact = AdapterLimits { max_rank: info.rank.max(8), max_bytes: info.num_bytes_in_f32, within: None };
        assert!(open(exact.clone()).is_ok(), "{name}");
        let error =
            open(AdapterLimits { max_bytes: info.num_bytes_in_f32 - 1, ..exact.clone() }).unwrap_err().to_string();
        assert!(error.contains(&format!("takes {} bytes in f32, the limit is", info.num_bytes_in_f32)), "{error}");
        let error = open(AdapterLimits { max_rank: info.rank - 1, ..exact }).unwrap_err().to_string();
        assert!(error.contains("is over the limit of"), "{error}");
    }
}

/// A path that was looked at may be a link to elsewhere by the time it is opened, so it is the opened file that is asked.
#[cfg(target_os = "linux")]
#[test]
fn a_file_opened_outside_of_the_folders_is_refused() {
    let (base, temp) = (base("tiny-llama"), tempfile::tempdir().unwrap());
    let outside = temp.path().canonicalize().unwrap();
    let root = outside.join("root");
    for folder in ["inside", "config", "weights"] {
        std::fs::create_dir_all(root.join(folder)).unwrap();
    }
    let copy = |name: &str, to: &std::path::Path| std::fs::copy(adapter("llama-qv").join(name), to).unwrap();
    let names = ["adapter_config.json", "adapter_model.safetensors", "adapter.gguf"];
    for name in names {
        copy(name, &outside.join(name));
        for folder in ["inside", "config", "weights"] {
            copy(name, &root.join(folder).join(name));
        }
    }
    let link = |folder: &str, name: &str| {
        std::fs::remove_file(root.join(folder).join(name)).unwrap();
        std::os::unix::fs::symlink(outside.join(name), root.join(folder).join(name)).unwrap();
    };
    link("config", names[0]);
    link("weights", names[1]);
    link("weights", names[2]);
    std::os::unix::fs::symlink(root.join("inside"), root.join("linked")).unwrap();
    let limits = AdapterLimits { within: Some([root.clone()].into()), ..LIMITS };
    let open = |path: &str| OpenedAdapter::open(&root.join(path), &base, &limits);
    for taken in ["inside", "inside/adapter.gguf", "linked"] {
        open(taken).unwrap_or_else(|error| panic!("{taken}: {error}"));
    }
    for refused in ["config", "weights", "weights/adapter.gguf"] {
        let Err(error) = open(refused) else { panic!("{refused} leads out") };
        let ModelError::Io { source, .. } = &error else { panic!("{error}") };
        assert_eq!(source.kind(), std::io::ErrorKind::PermissionDenied, "{error}");
    }
    assert!(OpenedAdapter::open(&root.join("weights"), &base, &LIMITS).is_ok(), "links are no mistake in themselves");
}

#[test]
fn what_is_no_adapter_says_what_an_adapter_is() {
    let base = base("tiny-llama");
    let open = |path: &std::path::Path| OpenedAdapter::open(path, &base, &LIMITS).unwrap_err().to_string();
    let folder = good().write();
    let inside = |name: &str| folder.path().join(name);
    assert!(open(&inside("adapter_model.safetensors")).contains("name the folder that holds it"));
    assert!(open(&inside("adapter_config.json")).contains("this is not a GGUF file"));
    assert!(open(&inside("nowhere")).contains("cannot read"));
    std::fs::rename(inside("adapter_model.safetensors"), inside("kept")).unwrap();
    assert!(open(folder.path()).contains("there is no adapter_model.safetensors in this folder"));
    std::fs::write(inside("adapter_model.bin"), b"PK").unwrap();
    assert!(open(folder.path()).contains("convert it once: python -c"));
    std::fs::rename(inside("kept"), inside("adapter_model.safetensors")).unwrap();
    std::fs::remove_file(inside("adapter_config.json")).unwrap();
    assert!(open(folder.path()).contains("there is no adapter_config.json in this folder"));
}

#[test]
fn hostile_files_are_errors() {
    let base = base("tiny-llama");
    let (config, weights) = (serde_json::to_vec(&good().config).unwrap(), good().weights());
    let open = |config: &[u8], weights: &[u8]| -> Result<OpenedAdapter, ModelError> {
        OpenedAdapter::open(written(config, weights).path(), &base, &LIMITS)
    };
    assert!(open(&config, &weights).is_ok());
    let deep = "[".repeat(100_000);
    let header = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let tensor = |from: usize, to: usize| {
        format!(r#"{{"dtype":"F32","shape":[1,{}],"data_offsets":[{from},{to}]}}"#, (to - from) / 4)
    };
    let twice = format!(r#"{{"{0}":{1},"{0}":{2}}}"#, a(Q), tensor(0, 8), tensor(8, 16));
    for (config, weights, expected) in [
        (deep.as_bytes(), &weights[..], "this is not valid JSON"),
        (&b"[]"[..], &weights[..], "this is not a JSON object"),
        (&b"\xff\xfe"[..], &weights[..], "is not UTF-8 text"),
        (&b""[..], &weights[..], "this is not valid JSON"),
        (&config[..], &weights[..weights.len() - 1], "not a sound safetensors file"),
        (&config[..], &weights[..4], "not a sound safetensors file"),
        (&config[..], &b""[..], "the file is empty"),
        (&config[..], &[0xff; 64][..], "not a sound safetensors file"),
        (&config[..], &header(&deep)[..], "not a sound safetensors file"),
        // The same name twice leaves a part of the file that nobody owns.
        (&config[..], &[header(&twice), vec![0; 16]].concat()[..], "not a sound safetensors file"),
    ] {
        let error = open(config, weights).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected:?} is not in {error:?}");
        assert!(error.len() < 2000, "{}", error.len());
    }
    // A name as long as the file is not repeated whole.
    let long = good().with(&"x".repeat(1 << 20), Stored::zeros(&[1]));
    let error = long.open_on(&base).unwrap_err().to_string();
    assert!(error.len() < 2000, "{}", error.len());
}
