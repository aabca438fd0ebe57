//! Where families keep their tensors: fused projections, stacked experts, prefixes. What a role reads is held against
//! slices that are cut here from the whole, as the modules in transformers and the loaders in llama.cpp cut them.

use bindery_model::{
    config::Block,
    weights::{LayerTensor as T, TensorRole, WeightStore},
};
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::builder::{Gguf, model_folder, on_disk, safetensors_bytes, value};

type Named = (String, Vec<usize>, Vec<f32>);

/// Values that tell each element of each tensor apart and are exact in f32.
fn tensor(name: &str, shape: &[usize]) -> Named {
    let count = shape.iter().product::<usize>();
    let seed = name.bytes().map(usize::from).sum::<usize>() % 50;
    (name.to_owned(), shape.to_vec(), (0..count).map(|i| (1000 * seed + i) as f32).collect())
}

fn folder(config: &Value, tensors: &[Named]) -> TempDir {
    model_folder(config, &safetensors_bytes(tensors, Dtype::F32))
}

fn read(store: &WeightStore, part: T) -> Vec<f32> {
    let view = store.tensor(TensorRole::Layer(0, part)).unwrap().unwrap_or_else(|| panic!("{part:?}"));
    let values = view.to_f32().unwrap();
    assert_eq!(values.len(), view.rows * view.cols, "{part:?}");
    // Row by row it is the same.
    let mut row = vec![0.0; view.cols];
    view.dequantize_row(view.rows - 1, &mut row).unwrap();
    assert_eq!(row, values[values.len() - view.cols..], "{part:?}");
    values
}

/// Rows of `[rows, width]` by number.
fn rows(values: &[f32], width: usize, numbers: impl IntoIterator<Item = usize>) -> Vec<f32> {
    numbers.into_iter().flat_map(|row| values[row * width..][..width].to_vec()).collect()
}

fn falcon(changes: Value) -> Value {
    let mut config = json!({"model_type": "falcon", "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1,
        "vocab_size": 5, "ffn_hidden_size": 24, "bias": true});
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

/// Everything but the norms inside the layer; `fused` rows of query_key_value.
fn falcon_tensors(fused: usize, norms: &[&str]) -> Vec<Named> {
    let layer = "transformer.h.0.";
    let mut tensors = vec![
        tensor("transformer.word_embeddings.weight", &[5, 16]),
        tensor(&format!("{layer}self_attention.query_key_value.weight"), &[fused, 16]),
        tensor(&format!("{layer}self_attention.query_key_value.bias"), &[fused]),
        tensor(&format!("{layer}self_attention.dense.weight"), &[16, 16]),
        tensor(&format!("{layer}self_attention.dense.bias"), &[16]),
        tensor(&format!("{layer}mlp.dense_h_to_4h.weight"), &[24, 16]),
        tensor(&format!("{layer}mlp.dense_h_to_4h.bias"), &[24]),
        tensor(&format!("{layer}mlp.dense_4h_to_h.weight"), &[16, 24]),
        tensor(&format!("{layer}mlp.dense_4h_to_h.bias"), &[16]),
        tensor("transformer.ln_f.weight", &[16]),
        tensor("transformer.ln_f.bias", &[16]),
    ];
    for norm in norms {
        tensors.push(tensor(&format!("{layer}{norm}.weight"), &[16]));
        tensors.push(tensor(&format!("{layer}{norm}.bias"), &[16]));
    }
    tensors
}

#[test]
fn falcon_splits_its_fused_projection_as_each_layout_has_it() {
    // (config, key/value heads, norms, block); a head is 4 wide.
    let layouts = [
        (json!({}), 1, &["input_layernorm"][..], Block::Parallel),
        (
            json!({"new_decoder_architecture": true, "num_kv_heads": 2}),
            2,
            &["ln_attn", "ln_mlp"],
            Block::ParallelTwoNorms,
        ),
        (
            json!({"new_decoder_architecture": true, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
            2,
            &["input_layernorm"],
            Block::Parallel,
        ),
        (
            json!({"multi_query": false, "parallel_attn": false, "alibi": true}),
            4,
            &["input_layernorm", "post_attention_layernorm"],
            Block::PreNorm,
        ),
    ];
    for (changes, groups, norms, block) in layouts {
        let (queries, width) = (4 / groups, 4);
        let fused = (4 + 2 * groups) * width;
        let tensors = falcon_tensors(fused, norms);
        let store = WeightStore::open(folder(&falcon(changes), &tensors).path()).unwrap();
        assert_eq!((store.config().block, store.config().num_kv_heads), (block, groups));
        // [groups, queries + 2, width], as `_split_heads` views it.
        let pick = |from: usize, to: usize| -> Vec<usize> {
            (0..groups)
                .flat_map(|group| (from..to).map(move |head| group * (queries + 2) + head))
                .flat_map(|head| (0..width).map(move |i| head * width + i))
                .collect()
        };
        let (weight, bias) = (&tensors[1].2, &tensors[2].2);
        for (part, bias_part, numbers) in [
            (T::Q, T::QBias, pick(0, queries)),
            (T::K, T::KBias, pick(queries, queries + 1)),
            (T::V, T::VBias, pick(queries + 1, queries + 2)),
        ] {
            assert_eq!(read(&store, part), rows(weight, 16, numbers.iter().copied()), "{part:?}, {groups}");
            assert_eq!(read(&store, bias_part), rows(bias, 1, numbers), "{part:?}, {groups}");
        }
        assert_eq!(read(&store, T::AttentionNorm), tensors[11].2);
        assert_eq!(read(&store, T::AttentionNormBias), tensors[12].2);
        if norms.len() == 2 {
            assert_eq!(read(&store, T::MlpNorm), tensors[13].2);
            assert_eq!(read(&store, T::MlpNormBias), tensors[14].2);
        } else {
            assert!(store.tensor(TensorRole::Layer(0, T::MlpNorm)).unwrap().is_none());
        }
        assert_eq!(read(&store, T::Up), tensors[5].2);
        assert!(store.tensor(TensorRole::FinalNormBias).unwrap().is_some());
        // A fused tensor counts once.
        assert_eq!(store.num_parameters() as usize, tensors.iter().map(|tensor| tensor.2.len()).sum::<usize>());
        assert_eq!(store.describe_formats(), format!("F32 ({})", tensors.len()));
    }
}

#[test]
fn phi3_splits_both_of_its_fused_projections() {
    let config = json!({"model_type": "phi3", "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 1, "vocab_size": 5, "intermediate_size": 24, "tie_word_embeddings": true});
    let layer = "model.layers.0.";
    let tensors = [
        tensor("model.embed_tokens.weight", &[5, 16]),
        tensor(&format!("{layer}self_attn.qkv_proj.weight"), &[32, 16]),
        tensor(&format!("{layer}mlp.gate_up_proj.weight"), &[48, 16]),
        tensor(&format!("{layer}self_attn.o_proj.weight"), &[16, 16]),
        tensor(&format!("{layer}mlp.down_proj.weight"), &[16, 24]),
        tensor(&format!("{layer}input_layernorm.weight"), &[16]),
        tensor(&format!("{layer}post_attention_layernorm.weight"), &[16]),
        tensor("model.norm.weight", &[16]),
    ];
    let store = WeightStore::open(folder(&config, &tensors).path()).unwrap();
    let (qkv, gate_up) = (&tensors[1].2, &tensors[2].2);
    for (part, whole, range) in [
        (T::Q, qkv, 0..16),
        (T::K, qkv, 16..24),
        (T::V, qkv, 24..32),
        (T::Gate, gate_up, 0..24),
        (T::Up, gate_up, 24..48),
    ] {
        assert_eq!(read(&store, part), rows(whole, 16, range), "{part:?}");
    }
    let mut wrong = tensors.clone();
    wrong[1] = tensor(&format!("{layer}self_attn.qkv_proj.weight"), &[31, 16]);
    let error = WeightStore::open(folder(&config, &wrong).path()).unwrap_err().to_string();
    assert!(error.contains("qkv_proj") && error.contains("[31, 16]") && error.contains("[32, 16]"), "{error}");
    let error = WeightStore::open(folder(&config, &tensors[2..]).path()).unwrap_err().to_string();
    assert!(error.contains("embed_tokens.weight") && error.contains("missing"), "{error}");
}

#[test]
fn experts_are_found_alone_and_in_stacks() {
    let config = json!({"model_type": "mixtral", "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 1, "vocab_size": 5, "intermediate_size": 8, "num_local_experts": 3,
        "num_experts_per_tok": 2, "tie_word_embeddings": true});
    let layer = "model.layers.0.";
    let shared = [
        tensor("model.embed_tokens.weight", &[5, 16]),
        tensor(&format!("{layer}self_attn.q_proj.weight"), &[16, 16]),
        tensor(&format!("{layer}self_attn.k_proj.weight"), &[8, 16]),
        tensor(&format!("{layer}self_attn.v_proj.weight"), &[8, 16]),
        tensor(&format!("{layer}self_attn.o_proj.weight"), &[16, 16]),
        tensor(&format!("{layer}input_layernorm.weight"), &[16]),
        tensor(&format!("{layer}post_attention_layernorm.weight"), &[16]),
        tensor("model.norm.weight", &[16]),
    ];
    let gate_up = tensor(&format!("{layer}mlp.experts.gate_up_proj"), &[3, 16, 16]);
    let down = tensor(&format!("{layer}mlp.experts.down_proj"), &[3, 16, 8]);
    let expected = |expert: usize| {
        [
            (T::ExpertGate(expert), rows(&gate_up.2, 16, 16 * expert..16 * expert + 8)),
            (T::ExpertUp(expert), rows(&gate_up.2, 16, 16 * expert + 8..16 * expert + 16)),
            (T::ExpertDown(expert), rows(&down.2, 8, 16 * expert..16 * expert + 16)),
        ]
    };
    let mut alone = shared.to_vec();
    alone.push(tensor(&format!("{layer}block_sparse_moe.gate.weight"), &[3, 16]));
    for expert in 0..3 {
        for ((_, values), (name, shape)) in
            expected(expert).into_iter().zip([("w1", vec![8, 16]), ("w3", vec![8, 16]), ("w2", vec![16, 8])])
        {
            alone.push((format!("{layer}block_sparse_moe.experts.{expert}.{name}.weight"), shape, values));
        }
    }
    let mut stacked = shared.to_vec();
    stacked.push(tensor(&format!("{layer}mlp.gate.weight"), &[3, 16]));
    stacked.extend([gate_up.clone(), down.clone()]);
    for tensors in [&alone, &stacked] {
        let store = WeightStore::open(folder(&config, tensors).path()).unwrap();
        for (part, values) in (0..3).flat_map(expected) {
            assert_eq!(read(&store, part), values, "{part:?}");
        }
        assert!(store.tensor(TensorRole::Layer(0, T::ExpertGate(3))).unwrap().is_none());
        assert!(store.tensor(TensorRole::Layer(0, T::Gate)).unwrap().is_none());
    }
    // An expert that the config does not have would be left out in silence.
    let mut more = config;
    more["num_local_experts"] = json!(2);
    alone.iter_mut().find(|tensor| tensor.0.ends_with("gate.weight")).unwrap().1 = vec![2, 16];
    alone.iter_mut().find(|tensor| tensor.0.ends_with("gate.weight")).unwrap().2.truncate(32);
    let error = WeightStore::open(folder(&more, &alone).path()).unwrap_err().to_string();
    assert!(error.contains("experts.2."), "{error}");
}

#[test]
fn gemma3_is_found_under_every_prefix_and_its_vision_part_left_alone() {
    let text = json!({"model_type": "gemma3_text", "hidden_size": 16, "num_attention_heads": 4, "head_dim": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 5, "intermediate_size": 24});
    let outer = json!({"model_type": "gemma3", "text_config": text, "vision_config": {}});
    for (config, prefix) in [(&text, "model."), (&outer, "language_model.model."), (&outer, "model.language_model.")] {
        let layer = format!("{prefix}layers.0.");
        let mut tensors = vec![tensor(&format!("{prefix}embed_tokens.weight"), &[5, 16])];
        for (name, shape) in [
            ("self_attn.q_proj", vec![16, 16]),
            ("self_attn.k_proj", vec![8, 16]),
            ("self_attn.v_proj", vec![8, 16]),
            ("self_attn.o_proj", vec![16, 16]),
            ("self_attn.q_norm", vec![4]),
            ("self_attn.k_norm", vec![4]),
            ("mlp.gate_proj", vec![24, 16]),
            ("mlp.up_proj", vec![24, 16]),
            ("mlp.down_proj", vec![16, 24]),
            ("input_layernorm", vec![16]),
            ("post_attention_layernorm", vec![16]),
            ("pre_feedforward_layernorm", vec![16]),
            ("post_feedforward_layernorm", vec![16]),
        ] {
            tensors.push(tensor(&format!("{layer}{name}.weight"), &shape));
        }
        tensors.push(tensor(&format!("{prefix}norm.weight"), &[16]));
        tensors.push(tensor("vision_tower.vision_model.encoder.layers.0.layer_norm1.weight", &[3]));
        let store = WeightStore::open(folder(config, &tensors).path()).unwrap();
        for (part, name) in [
            (T::PostAttentionNorm, "post_attention_layernorm"),
            (T::MlpNorm, "pre_feedforward_layernorm"),
            (T::PostMlpNorm, "post_feedforward_layernorm"),
            (T::QueryNorm, "q_norm"),
            (T::KeyNorm, "k_norm"),
        ] {
            let stored = tensors.iter().find(|tensor| tensor.0.ends_with(&format!("{name}.weight"))).unwrap();
            assert_eq!(read(&store, part), stored.2, "{prefix}{name}");
        }
        let others = tensors.iter().filter(|tensor| !tensor.0.starts_with("vision"));
        assert_eq!(store.num_parameters() as usize, others.map(|tensor| tensor.2.len()).sum::<usize>());
    }
}

/// A GGUF of some architecture: the llama of the builder under another name.
fn renamed(architecture: &str) -> Gguf {
    let mut file = Gguf::llama();
    for (key, _) in &mut file.keys {
        *key = key.replace("llama.", &format!("{architecture}."));
    }
    file.key("general.architecture", value::string(architecture.as_bytes()))
}

fn values_of(file: &Gguf, name: &str) -> Vec<f32> {
    let tensor = file.tensors.iter().find(|tensor| tensor.name == name).unwrap();
    tensor.bytes.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect()
}

#[test]
fn a_gguf_keeps_projections_fused_and_experts_stacked() {
    let mut phi3 =
        renamed("phi3").f32_tensor("blk.0.attn_qkv.weight", &[32, 64]).f32_tensor("blk.0.ffn_up.weight", &[32, 128]);
    for name in ["attn_q", "attn_k", "attn_v", "ffn_gate"] {
        phi3 = phi3.without_tensor(&format!("blk.0.{name}.weight"));
    }
    let disk = on_disk("m.gguf", &phi3.bytes());
    let store = WeightStore::open(&disk.path).unwrap();
    let (qkv, gate_up) = (values_of(&phi3, "blk.0.attn_qkv.weight"), values_of(&phi3, "blk.0.ffn_up.weight"));
    for (part, whole, range) in [
        (T::Q, &qkv, 0..32),
        (T::K, &qkv, 32..48),
        (T::V, &qkv, 48..64),
        (T::Gate, &gate_up, 0..64),
        (T::Up, &gate_up, 64..128),
    ] {
        assert_eq!(read(&store, part), rows(whole, 32, range), "{part:?}");
    }

    let experts = |name: &str| {
        renamed(name)
            .without_tensor("blk.0.ffn_gate.weight")
            .without_tensor("blk.0.ffn_up.weight")
            .without_tensor("blk.0.ffn_down.weight")
            .key(&format!("{name}.expert_count"), value::u32(3))
            .key(&format!("{name}.expert_used_count"), value::u32(2))
            .f32_tensor("blk.0.ffn_gate_inp.weight", &[32, 3])
            .f32_tensor("blk.0.ffn_down_exps.weight", &[64, 32, 3])
    };
    let apart = experts("llama")
        .f32_tensor("blk.0.ffn_gate_exps.weight", &[32, 64, 3])
        .f32_tensor("blk.0.ffn_up_exps.weight", &[32, 64, 3]);
    let disk = on_disk("m.gguf", &apart.bytes());
    let store = WeightStore::open(&disk.path).unwrap();
    for expert in 0..3 {
        let up = rows(&values_of(&apart, "blk.0.ffn_up_exps.weight"), 32, 64 * expert..64 * expert + 64);
        assert_eq!(read(&store, T::ExpertUp(expert)), up);
        let down = rows(&values_of(&apart, "blk.0.ffn_down_exps.weight"), 64, 32 * expert..32 * expert + 32);
        assert_eq!(read(&store, T::ExpertDown(expert)), down);
    }
    let together = experts("llama").f32_tensor("blk.0.ffn_gate_up_exps.weight", &[32, 128, 3]);
    let disk = on_disk("m.gguf", &together.bytes());
    let store = WeightStore::open(&disk.path).unwrap();
    let both = values_of(&together, "blk.0.ffn_gate_up_exps.weight");
    assert_eq!(read(&store, T::ExpertGate(2)), rows(&both, 32, 256..320));
    assert_eq!(read(&store, T::ExpertUp(2)), rows(&both, 32, 320..384));
    // Before experts were stacked each had its own tensor.
    let mut old = experts("llama").without_tensor("blk.0.ffn_down_exps.weight");
    for expert in 0..3 {
        old = old
            .f32_tensor(&format!("blk.0.ffn_gate.{expert}.weight"), &[32, 64])
            .f32_tensor(&format!("blk.0.ffn_up.{expert}.weight"), &[32, 64])
            .f32_tensor(&format!("blk.0.ffn_down.{expert}.weight"), &[64, 32]);
    }
    let disk = on_disk("m.gguf", &old.bytes());
    let store = WeightStore::open(&disk.path).unwrap();
    let view = store.tensor(TensorRole::Layer(0, T::ExpertDown(2))).unwrap().unwrap();
    assert_eq!(view.name, "blk.0.ffn_down.2.weight");
}

#[test]
fn gguf_architectures_have_what_llama_cpp_has_in_its_code() {
    use bindery_model::config::{Activation, RopeScaling, RopeStyle};
    let gemma3 = renamed("gemma3")
        .key("gemma3.attention.sliding_window", value::u32(5))
        .key("gemma3.rope.freq_base", value::f32(1e6))
        .key("gemma3.rope.scaling.type", value::string(b"linear"))
        .key("gemma3.rope.scaling.factor", value::f32(8.0))
        .f32_tensor("blk.0.attn_q_norm.weight", &[16])
        .f32_tensor("blk.0.attn_k_norm.weight", &[16])
        .f32_tensor("blk.0.post_attention_norm.weight", &[32])
        .f32_tensor("blk.0.post_ffw_norm.weight", &[32]);
    let config = |file: &Gguf| {
        let disk = on_disk("m.gguf", &file.bytes());
        WeightStore::open(&disk.path).unwrap().config().clone()
    };
    let gemma3 = config(&gemma3);
    // The only layer is of the sliding kind: base 10000, no scaling.
    assert_eq!((gemma3.rotaries.len(), gemma3.rotaries[0].base), (1, 10_000.0));
    assert_eq!((&gemma3.rotaries[0].scaling, gemma3.rotaries[0].style), (&RopeScaling::None, RopeStyle::Neox));
    assert_eq!((gemma3.layers[0].window, gemma3.block, gemma3.query_key_norm), (Some(5), Block::SandwichNorm, true));
    assert_eq!(
        (gemma3.norm.weight_offset, gemma3.embedding_scale),
        (0.0, 32f32.sqrt()),
        "the file's norms have the one"
    );
    assert_eq!((gemma3.mlp.activation, gemma3.attention_soft_cap), (Activation::GeluTanh, None));

    // Which layers have the window may be written down.
    let pattern = |flags: &[u8]| {
        renamed("gemma2")
            .key("gemma2.attention.sliding_window_pattern", value::array(7, flags.len() as u64, flags))
            .f32_tensor("blk.0.post_attention_norm.weight", &[32])
            .f32_tensor("blk.0.post_ffw_norm.weight", &[32])
    };
    assert_eq!((config(&pattern(&[0])).layers[0].window, config(&pattern(&[1])).layers[0].window), (None, Some(4096)));
    assert_eq!(config(&pattern(&[0])).attention_soft_cap, Some(50.0));
    let disk = on_disk("m.gguf", &pattern(&[1, 0]).bytes());
    let error = WeightStore::open(&disk.path).unwrap_err().to_string();
    assert!(error.contains("sliding_window_pattern") && error.contains("2 entries for 1 layers"), "{error}");

    let long = |name: &str, factor: f32| {
        let bytes = (0..8).flat_map(|i| (factor + i as f32).to_le_bytes()).collect::<Vec<u8>>();
        (name.to_owned(), bytes)
    };
    let mut phi3 = renamed("phi3")
        .key("phi3.rope.scaling.original_context_length", value::u32(32))
        .key("phi3.rope.scaling.attn_factor", value::f32(1.25))
        .key("phi3.attention.sliding_window", value::u32(7));
    for (name, bytes) in [long("rope_factors_short.weight", 1.0), long("rope_factors_long.weight", 2.0)] {
        phi3 = phi3.tensor(&name, &[8], 0, bytes);
    }
    let phi3 = config(&phi3);
    let factors = |first: usize| (first..first + 8).map(|factor| factor as f32).collect::<Vec<_>>();
    assert_eq!(
        phi3.rotaries[0].scaling,
        RopeScaling::LongRope {
            short: factors(1),
            long: factors(2),
            original_max_position_embeddings: 32,
            attention_factor: 1.25,
            long_attention_factor: 1.25
        }
    );
    assert_eq!(phi3.layers[0].window, Some(7));
    for (name, style) in
        [("smollm3", RopeStyle::Interleaved), ("qwen2", RopeStyle::Neox), ("mistral3", RopeStyle::Interleaved)]
    {
        assert_eq!(config(&renamed(name)).rotaries[0].style, style, "{name}");
    }
}
