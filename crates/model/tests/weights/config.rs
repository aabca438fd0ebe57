//! config.json and GGUF metadata to `DecoderConfig`: what is honoured, and what is refused by name.

use bindery_model::{
    ModelError,
    config::{Activation, Biases, Block, DecoderConfig, NormKind, RopeScaling, RopeStyle, SparseBlocks},
    weights::{TensorRole, WeightStore},
};
use serde_json::{Value, json};

use crate::builder::{Gguf, config_json, on_disk, value};

/// `config_json` with keys replaced; a null stays a null.
fn with(changes: Value) -> Value {
    let mut config = config_json();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn without(key: &str) -> Value {
    let mut config = config_json();
    config.as_object_mut().unwrap().remove(key);
    config
}

fn read(config: &Value) -> Result<DecoderConfig, ModelError> {
    let disk = on_disk("config.json", &serde_json::to_vec(config).unwrap());
    DecoderConfig::from_json_file(&disk.path)
}

/// Refused, with every one of `words` in the message.
fn refused(config: &Value, words: &[&str]) {
    let error = read(config).expect_err(&config.to_string()).to_string();
    for word in words.iter().chain(&["config.json"]) {
        assert!(error.contains(word), "{error:?} lacks {word:?}");
    }
}

fn windows(config: &DecoderConfig) -> Vec<Option<usize>> {
    config.layers.iter().map(|layer| layer.window).collect()
}

#[test]
fn a_plain_llama() {
    let config = read(&config_json()).unwrap();
    assert_eq!(
        (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size),
        (32, 2, 1, 16, 8)
    );
    assert_eq!((config.mlp.intermediate_size, config.num_layers(), config.max_position_embeddings), (64, 1, 64));
    assert_eq!((config.norm.eps, config.attention_scale), (1e-5, 0.25));
    assert_eq!(
        (config.rotaries[0].style, config.rotaries[0].dim, config.rotaries[0].base),
        (RopeStyle::Neox, 16, 10_000.0)
    );
    assert_eq!((config.biases, config.tied_embeddings), (Biases::default(), false));
    assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(1), &[2][..]));
    assert_eq!(config.architecture, "llama");
}

#[test]
fn absent_and_null_keys_take_the_defaults_of_the_family() {
    assert_eq!(read(&without("num_key_value_heads")).unwrap().num_kv_heads, 2);
    assert_eq!(read(&with(json!({"num_key_value_heads": null}))).unwrap().num_kv_heads, 2);
    assert_eq!(read(&with(json!({"head_dim": null}))).unwrap().head_dim, 16);
    assert_eq!(read(&without("max_position_embeddings")).unwrap().max_position_embeddings, 2048);
    assert_eq!(read(&without("rms_norm_eps")).unwrap().norm.eps, 1e-6);
    assert!(!read(&without("tie_word_embeddings")).unwrap().tied_embeddings);
    let quiet = read(&with(json!({"bos_token_id": null, "eos_token_id": null}))).unwrap();
    assert_eq!((quiet.bos_token_id, quiet.eos_token_ids.len()), (None, 0));
    let mistral = read(&with(json!({"model_type": "mistral", "num_attention_heads": 16, "num_key_value_heads": 4})));
    assert_eq!(windows(&mistral.unwrap()), [Some(4096)]);
}

#[test]
fn head_dim_may_differ_from_the_quotient() {
    let config = read(&with(json!({"head_dim": 64}))).unwrap();
    assert_eq!((config.head_dim, config.rotaries[0].dim, config.attention_scale), (64, 64, 0.125));
}

#[test]
fn older_and_newer_rotary_keys_say_the_same() {
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let parameters = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 8192});
    let mut older = parameters.clone();
    older["rope_type"] = json!("llama3");
    let mut newer = older.clone();
    newer["rope_theta"] = json!(500_000.0);
    for config in [
        with(json!({"rope_theta": 500_000.0, "rope_scaling": older})),
        with(json!({"rope_parameters": newer})),
        // Saved with both: what stands inside wins.
        with(json!({"rope_theta": 7.0, "rope_parameters": newer})),
    ] {
        let rotary = read(&config).unwrap().rotaries.remove(0);
        assert_eq!((rotary.base, &rotary.scaling), (500_000.0, &llama3));
    }
    let linear = RopeScaling::Linear { factor: 2.0 };
    for scaling in [json!({"type": "linear", "factor": 2}), json!({"rope_type": "linear", "factor": 2.0})] {
        assert_eq!(read(&with(json!({"rope_scaling": scaling}))).unwrap().rotaries[0].scaling, linear);
    }
    for none in [json!(null), json!({"rope_type": "default"}), json!({"type": "default"}), json!({})] {
        assert_eq!(read(&with(json!({"rope_scaling": none}))).unwrap().rotaries[0].scaling, RopeScaling::None);
    }
    let theta = read(&with(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}))).unwrap();
    assert_eq!((theta.rotaries[0].base, theta.rotaries[0].scaling.clone()), (1e6, RopeScaling::None));
}

#[test]
fn what_is_not_done_is_refused_by_name() {
    for kind in ["su", "mrope", "proportional"] {
        refused(&with(json!({"rope_scaling": {"type": kind, "factor": 2.0}})), &[kind, "linear", "llama3"]);
        refused(&with(json!({"rope_parameters": {"rope_type": kind}})), &[kind, "linear", "llama3"]);
    }
    let phi3 = |scaling: Value| with(json!({"model_type": "phi3", "rope_scaling": scaling}));
    refused(&phi3(json!({"rope_type": "linear", "factor": 2})), &["linear", "longrope"]);
    refused(&with(json!({"rope_scaling": {"type": "dynamic", "factor": 2, "alpha": 1000}})), &["alpha", "1000"]);
    refused(&with(json!({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}})), &["full_attention"]);
    let gemma3 = json!({"model_type": "gemma3_text", "rope_parameters": {"rope_type": "linear", "factor": 2}});
    refused(&with(gemma3), &["rope_parameters", "layer type"]);
    refused(&with(json!({"hidden_act": "relu"})), &["relu", "silu"]);
    refused(&with(json!({"model_type": "mistral", "mlp_bias": true})), &["mlp_bias"]);
    refused(&with(json!({"model_type": "gemma2", "use_bidirectional_attention": true})), &["use_bidirectional"]);
    let gemma = json!({"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": "silu"});
    refused(&with(gemma), &["hidden_activation", "silu"]);
    refused(&with(json!({"partial_rotary_factor": 0.5})), &["partial_rotary_factor", "0.5"]);
    refused(&with(json!({"quantization_config": {"quant_method": "gptq"}})), &["bits", "missing"]);
    refused(
        &with(json!({"model_type": "gpt_neox"})),
        &["gpt_neox", "llama, mistral, ministral, mixtral, falcon", "gemma3"],
    );
    let mut class = without("model_type");
    class["architectures"] = json!(["BloomForCausalLM"]);
    refused(&class, &["BloomForCausalLM", "llama"]);
    class["architectures"] = json!(["MistralForCausalLM"]);
    assert_eq!(read(&class).unwrap().architecture, "mistral");
    for config in [with(json!({"hidden_act": "relu"})), with(json!({"model_type": "x"}))] {
        assert!(matches!(read(&config), Err(ModelError::Unsupported(_))));
    }
}

#[test]
fn hostile_values_of_newer_keys_are_refused_with_value_and_limit() {
    let family = |name: &str, changes: Value| {
        let mut config = with(json!({"model_type": name}));
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        config
    };
    // 17 layers of 4096 experts are within no limit, nor is one expert more in a layer, nor none at all.
    for (layers, experts, word) in
        [(100, 4096, "all layers"), (1, 4097, "4097"), (1, 0, "experts"), (1, u64::MAX, "18446")]
    {
        let config = family("mixtral", json!({"num_hidden_layers": layers, "num_local_experts": experts}));
        refused(&config, &[word]);
    }
    refused(
        &family("mixtral", json!({"num_local_experts": 4, "num_experts_per_tok": 5})),
        &["compute a token", "5", "4"],
    );
    refused(&family("qwen3_moe", json!({"mlp_only_layers": [-1]})), &["mlp_only_layers", "-1"]);
    refused(&family("qwen3_moe", json!({"decoder_sparse_step": 0})), &["decoder_sparse_step", "0"]);
    for types in [json!([]), json!(["full_attention", "full_attention"])] {
        for name in ["gemma2", "gemma3_text", "qwen2", "qwen3", "qwen2_moe"] {
            refused(&family(name, json!({"layer_types": types})), &["layer_types", "1 layers"]);
        }
    }
    let longrope = |short: Value, long: Value| {
        family("phi3", json!({"rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": long}}))
    };
    let eight = json!([1, 1, 1, 1, 1, 1, 1, 1]);
    assert!(read(&longrope(eight.clone(), eight.clone())).is_ok());
    refused(&longrope(eight.clone(), json!([1, 2])), &["2 long rotary factors", "8 pairs"]);
    refused(&longrope(json!([]), eight.clone()), &["short_factor", "0"]);
    refused(&longrope(json!(null), eight.clone()), &["short_factor", "missing"]);
    refused(&longrope(json!([0, 1, 1, 1, 1, 1, 1, 1]), eight.clone()), &["short rotary factor", "0"]);
    refused(&longrope(json!(["x", 1, 1, 1, 1, 1, 1, 1]), eight.clone()), &["short_factor", "x"]);
    refused(&longrope(json!([1e300, 1, 1, 1, 1, 1, 1, 1]), eight), &["short rotary factor", "inf"]);
    refused(&family("phi3", json!({"partial_rotary_factor": 1.5})), &["partial_rotary_factor", "1.5"]);
    refused(&family("phi3", json!({"partial_rotary_factor": 0.0})), &["rotary width", "0"]);
    let yarn = |changes: Value| {
        let mut scaling = json!({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16});
        scaling.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        with(json!({"rope_scaling": scaling}))
    };
    refused(&yarn(json!({"rope_theta": 1.0})), &["rotary base", "above 1"]);
    refused(&yarn(json!({"factor": -1})), &["factor", "-1"]);
    refused(&yarn(json!({"attention_factor": 1e300})), &["attention factor"]);
    refused(&yarn(json!({"original_max_position_embeddings": 0})), &["original_max_position_embeddings", "0"]);
    refused(&with(json!({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2}})), &["dynamic"]);
    refused(&family("gemma2", json!({"query_pre_attn_scalar": 0})), &["score's scale"]);
    refused(&family("gemma2", json!({"attn_logit_softcapping": 0})), &["soft cap of scores", "0"]);
    refused(&family("gemma3_text", json!({"sliding_window": null})), &["sliding_window"]);
    refused(&family("falcon", json!({"multi_query": false, "num_kv_heads": 1})), &["num_kv_heads", "1"]);
    refused(
        &family("falcon", json!({"new_decoder_architecture": true, "parallel_attn": false})),
        &["new_decoder_architecture", "parallel_attn"],
    );
    refused(&json!({"model_type": "gemma3"}), &["text_config", "missing"]);
    refused(&json!({"model_type": "gemma3", "text_config": {"model_type": "llama4"}}), &["llama4"]);
}

#[test]
fn older_keys_mean_what_they_meant() {
    let phi3 = |kind: &str| {
        let factors = vec![1.5; 8];
        let scaling = json!({"type": kind, "short_factor": factors, "long_factor": factors});
        read(&with(json!({"model_type": "phi3", "max_position_embeddings": 32_768, "rope_scaling": scaling}))).unwrap()
    };
    assert_eq!(phi3("su").rotaries, phi3("longrope").rotaries);
    let RopeScaling::LongRope { original_max_position_embeddings, attention_factor, .. } =
        phi3("su").rotaries[0].scaling
    else {
        panic!("longrope");
    };
    // sqrt(1 + ln 8 / ln 4096), with the class's default for the original length.
    assert_eq!((original_max_position_embeddings, attention_factor), (4096, 1.118_034));

    let old = json!({"model_type": "RefinedWeb", "hidden_size": 32, "n_head": 4, "n_head_kv": 2, "n_layer": 1,
                     "vocab_size": 8, "layer_norm_epsilon": 1e-5, "parallel_attn": true, "alibi": false});
    let new = json!({"model_type": "falcon", "hidden_size": 32, "num_attention_heads": 4, "num_kv_heads": 2,
                     "num_hidden_layers": 1, "vocab_size": 8, "new_decoder_architecture": true});
    assert_eq!(read(&old).unwrap(), read(&new).unwrap());
    let gemma3 = |keys: Value| {
        let mut config = with(json!({"model_type": "gemma3_text", "head_dim": 16, "num_hidden_layers": 6}));
        config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        read(&config).unwrap()
    };
    let scaling = json!({"rope_type": "linear", "factor": 8.0});
    let older = gemma3(json!({"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": scaling,
                              "sliding_window_pattern": 3}));
    let types = ["sliding_attention", "sliding_attention", "full_attention"].repeat(2);
    let newer = gemma3(json!({"layer_types": types, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}}));
    assert_eq!(older, newer);
    assert_eq!(older.rotaries.len(), 2);
}

/// What transformers 5.23's `Gemma3TextConfig` makes of both: `rope_parameters["full_attention"].update(rope_scaling)`.
#[test]
fn gemma_3_puts_rope_scaling_on_top_of_rope_parameters() {
    let config = |scaling: Value, parameters: Value| {
        let mut config =
            with(json!({"model_type": "gemma3_text", "head_dim": 16, "num_hidden_layers": 6, "rope_theta": 9e5,
                                     "rope_scaling": scaling, "rope_parameters": parameters}));
        config.as_object_mut().unwrap().remove("sliding_window");
        config
    };
    let by_type = |full: Value| json!({"full_attention": full, "sliding_attention": {"rope_type": "default"}});
    let linear = |factor| RopeScaling::Linear { factor };
    let (kept, eight) =
        (json!({"rope_type": "default", "rope_theta": 5e5}), json!({"rope_type": "linear", "factor": 8}));
    for (scaling, full, expected) in [
        (eight.clone(), kept.clone(), (5e5, linear(8.0))),
        (eight.clone(), json!({"rope_type": "default"}), (9e5, linear(8.0))),
        (json!({"rope_type": "linear", "factor": 8, "rope_theta": 7e5}), kept.clone(), (7e5, linear(8.0))),
        (json!({"factor": 4}), json!({"rope_type": "linear", "factor": 8, "rope_theta": 5e5}), (5e5, linear(4.0))),
        (json!({"type": "linear", "factor": 8}), json!({"rope_theta": 5e5}), (5e5, linear(8.0))),
        (json!({}), json!({"rope_type": "linear", "factor": 8}), (9e5, linear(8.0))),
        (json!({"rope_type": "default"}), json!({"rope_type": "linear", "factor": 8}), (9e5, RopeScaling::None)),
    ] {
        let read = read(&config(scaling.clone(), by_type(full.clone()))).unwrap();
        let [rotary, sliding] = &read.rotaries[..] else { panic!("two: {read:?}") };
        assert_eq!((rotary.base, rotary.scaling.clone()), expected, "{scaling} {full}");
        assert_eq!((sliding.base, &sliding.scaling), (1e4, &RopeScaling::None));
    }
    // A KeyError there.
    for parameters in [json!({}), json!({"sliding_attention": {"rope_type": "default"}})] {
        refused(&config(eight.clone(), parameters), &["rope_scaling", "full_attention"]);
    }
    // Not read there, and read by transformers 4.
    let older = json!({"type": "linear", "factor": 8});
    refused(&config(older.clone(), by_type(kept)), &["rope_scaling", "linear", "default", "rope_type"]);
    refused(&config(older, json!(null)), &["rope_scaling", "linear", "default", "rope_type"]);
}

/// `FalconConfig` of transformers 5.23, and `RWConfig` as published with falcon-7b.
#[test]
fn the_oldest_falcon_configs_mean_what_their_classes_made_of_them() {
    let falcon = |changes: Value| {
        let mut config = json!({"model_type": "falcon", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1,
                                "vocab_size": 8});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let read = read(&config).unwrap();
        (read.hidden_size, read.num_kv_heads, read.block)
    };
    assert_eq!(falcon(json!({})), (64, 1, Block::Parallel));
    assert_eq!(falcon(json!({"n_embed": 32})).0, 32);
    assert_eq!(falcon(json!({"n_embed": null})).0, 64);
    assert_eq!(falcon(json!({"n_embed": 32, "hidden_size": null})).0, 32);
    assert_eq!(falcon(json!({"parallel_attn": null, "multi_query": null})), (64, 4, Block::PreNorm));
    let old = json!({"model_type": "RefinedWebModel"});
    assert_eq!(falcon(old.clone()), (64, 4, Block::PreNorm));
    assert_eq!(falcon(json!({"model_type": null, "architectures": ["RWForCausalLM"]})), (64, 4, Block::PreNorm));
    let as_published = json!({"model_type": "RefinedWebModel", "multi_query": true, "parallel_attn": true});
    assert_eq!(falcon(as_published), (64, 1, Block::Parallel));
    assert_eq!(falcon(json!({"model_type": "RefinedWeb", "n_head_kv": 2})), (64, 2, Block::ParallelTwoNorms));
}

#[test]
fn messages_stay_short_whatever_the_file_holds() {
    let long = "é".repeat(1_000_000);
    for config in [with(json!({"model_type": long})), with(json!({"hidden_size": long}))] {
        let text = read(&config).unwrap_err().to_string();
        assert!(text.len() < 1_500 && text.contains("éé"), "{}", text.len());
    }
}

#[test]
fn impossible_values_are_refused_with_value_and_limit() {
    for key in ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"] {
        refused(&without(key), &[key, "missing"]);
        refused(&with(json!({key: null})), &[key, "missing"]);
        for wrong in [json!(0), json!(-1), json!(1e30), json!(u64::MAX), json!("32"), json!([32]), json!(32.5)] {
            refused(&with(json!({key: wrong})), &[key]);
        }
    }
    refused(&with(json!({"num_hidden_layers": 4000})), &["num_hidden_layers", "4000", "1024"]);
    refused(&with(json!({"num_attention_heads": 64, "num_key_value_heads": 64})), &["32", "64", "head_dim"]);
    refused(&with(json!({"num_attention_heads": 4, "num_key_value_heads": 3})), &["4 heads", "3 key/value heads"]);
    refused(&with(json!({"num_key_value_heads": 4})), &["2 heads", "4 key/value heads"]);
    refused(&with(json!({"head_dim": 15})), &["15", "even"]);
    refused(&with(json!({"head_dim": 4096, "num_attention_heads": 16384})), &["width of all heads"]);
    refused(&with(json!({"rms_norm_eps": 0})), &["epsilon"]);
    refused(&with(json!({"rms_norm_eps": -1e-5})), &["epsilon"]);
    refused(&with(json!({"rms_norm_eps": "x"})), &["rms_norm_eps"]);
    refused(&with(json!({"rope_theta": 1e300})), &["rotary base"]);
    refused(&with(json!({"rope_theta": 0})), &["rotary base"]);
    refused(&with(json!({"rope_scaling": {"type": "linear"}})), &["factor", "missing"]);
    refused(&with(json!({"rope_scaling": {"type": "linear", "factor": -2}})), &["factor", "-2"]);
    refused(&with(json!({"rope_scaling": "linear"})), &["rope_scaling"]);
    let llama3 = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
                        "original_max_position_embeddings": 8192});
    refused(&with(json!({"rope_scaling": llama3})), &["high_freq_factor", "low_freq_factor"]);
    refused(&with(json!({"tie_word_embeddings": "yes"})), &["tie_word_embeddings"]);
    refused(&with(json!({"eos_token_id": "</s>"})), &["eos_token_id"]);
    refused(&with(json!({"eos_token_id": [1, -2]})), &["eos_token_id"]);
    refused(&with(json!({"model_type": 5})), &["model_type"]);
    refused(&json!([1, 2]), &["not a JSON object"]);
    refused(&json!({}), &["model_type", "architectures"]);
}

#[test]
fn what_is_no_json_is_refused() {
    let deep = "[".repeat(100_000);
    let deep_object = "{\"a\":".repeat(100_000);
    for text in ["", "{", "nul", "{\"hidden_size\": 1e999999}", &deep, &deep_object] {
        let disk = on_disk("config.json", text.as_bytes());
        let error = DecoderConfig::from_json_file(&disk.path).unwrap_err().to_string();
        assert!(error.contains("not valid JSON"), "{error}");
    }
    let disk = on_disk("config.json", b"{\"a\": \"\xff\"}");
    assert!(DecoderConfig::from_json_file(&disk.path).unwrap_err().to_string().contains("UTF-8"));
    let disk = on_disk("config.json", &vec![b' '; (16 << 20) + 1]);
    assert!(DecoderConfig::from_json_file(&disk.path).unwrap_err().to_string().contains("larger than"));
}

#[test]
fn token_ids_may_be_lists_and_those_outside_the_vocabulary_fall_away() {
    let config = read(&with(json!({"eos_token_id": [2, 5, 128_009], "bos_token_id": 128_000}))).unwrap();
    assert_eq!((config.eos_token_ids, config.bos_token_id), (vec![2, 5], None));
}

#[test]
fn biases_follow_config_and_family() {
    let both = read(&with(json!({"attention_bias": true}))).unwrap().biases;
    assert_eq!(both, Biases { qkv: true, output: true, mlp: false });
    let qwen2 = read(&with(json!({"model_type": "qwen2"}))).unwrap();
    assert_eq!(qwen2.biases, Biases { qkv: true, ..Biases::default() });
    assert_eq!(read(&with(json!({"model_type": "mistral"}))).unwrap().biases, Biases::default());
}

#[test]
fn windows_follow_config_and_family() {
    let mistral =
        |window: Value| with(json!({"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": window}));
    assert_eq!(windows(&read(&mistral(json!(7))).unwrap()), [Some(7), Some(7)]);
    assert_eq!(windows(&read(&mistral(json!(null))).unwrap()), [None, None]);
    refused(&mistral(json!(0)), &["sliding_window"]);
    let qwen2 = |changes: Value| {
        let mut config = with(json!({"model_type": "qwen2", "num_hidden_layers": 3, "sliding_window": 9}));
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        config
    };
    assert_eq!(windows(&read(&qwen2(json!({"max_window_layers": 1}))).unwrap()), [None; 3], "not in use");
    let used = qwen2(json!({"use_sliding_window": true, "max_window_layers": 1}));
    assert_eq!(windows(&read(&used).unwrap()), [None, Some(9), Some(9)]);
    let types = json!(["sliding_attention", "full_attention", "sliding_attention"]);
    let typed = qwen2(json!({"use_sliding_window": true, "layer_types": types}));
    assert_eq!(windows(&read(&typed).unwrap()), [Some(9), None, Some(9)]);
    refused(&qwen2(json!({"layer_types": types})), &["sliding_window"]);
    refused(&qwen2(json!({"layer_types": ["full_attention"]})), &["layer_types", "1", "3"]);
    let linear = ["linear_attention"; 3];
    refused(&qwen2(json!({"layer_types": linear})), &["linear_attention"]);
    // A llama has no window, whatever stands there: transformers ignores the key, too.
    assert_eq!(windows(&read(&with(json!({"sliding_window": 9}))).unwrap()), [None]);
}

#[test]
fn smollm3_goes_without_rotary_on_some_layers() {
    let base = json!({"model_type": "smollm3", "num_hidden_layers": 5});
    let rotary = |changes: Value| -> Vec<bool> {
        let mut config = with(base.clone());
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        read(&config).unwrap().layers.iter().map(|layer| layer.rotary.is_some()).collect()
    };
    assert_eq!(rotary(json!({})), [true, true, true, false, true]);
    assert_eq!(rotary(json!({"no_rope_layer_interval": 2})), [true, false, true, false, true]);
    assert_eq!(rotary(json!({"no_rope_layers": [0, 1, 1, 1, 0]})), [false, true, true, true, false]);
    let config = read(&with(base.clone())).unwrap();
    assert_eq!((config.rotaries[0].base, config.tied_embeddings), (2_000_000.0, false));
    let mut wrong = with(base);
    wrong["no_rope_layers"] = json!([1, 0]);
    refused(&wrong, &["no_rope_layers", "2", "5"]);
    wrong["no_rope_layers"] = json!([1, 0, 2, 1, 1]);
    refused(&wrong, &["no_rope_layers", "2"]);
}

// GGUF metadata.

fn gguf(file: &Gguf) -> Result<DecoderConfig, ModelError> {
    let disk = on_disk("m.gguf", &file.bytes());
    Ok(WeightStore::open(&disk.path)?.config().clone())
}

fn gguf_refused(file: &Gguf, words: &[&str]) {
    let error = gguf(file).expect_err(&format!("{words:?}")).to_string();
    for word in words.iter().chain(&["m.gguf"]) {
        assert!(error.contains(word), "{error:?} lacks {word:?}");
    }
}

#[test]
fn a_gguf_llama() {
    let config = gguf(&Gguf::llama()).unwrap();
    assert_eq!(
        (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size),
        (32, 2, 1, 16, 8)
    );
    assert_eq!((config.mlp.intermediate_size, config.num_layers(), config.max_position_embeddings), (64, 1, 64));
    assert_eq!((config.norm.eps, config.attention_scale), (1e-5, 0.25));
    assert_eq!(
        (config.rotaries[0].style, config.rotaries[0].dim, config.rotaries[0].base),
        (RopeStyle::Interleaved, 16, 10_000.0)
    );
    assert_eq!((config.tied_embeddings, config.eos_token_ids.as_slice(), config.bos_token_id), (true, &[2][..], None));
    assert_eq!(config.rotaries[0].scaling, RopeScaling::None);
}

#[test]
fn gguf_head_and_biases_are_found_by_their_tensors() {
    let file = Gguf::llama()
        .f32_tensor("output.weight", &[32, 8])
        .f32_tensor("blk.0.attn_q.bias", &[32])
        .f32_tensor("blk.0.attn_k.bias", &[16])
        .f32_tensor("blk.0.attn_v.bias", &[16]);
    let config = gguf(&file).unwrap();
    assert_eq!((config.tied_embeddings, config.biases), (false, Biases { qkv: true, ..Biases::default() }));
    let disk = on_disk("m.gguf", &file.bytes());
    assert!(WeightStore::open(&disk.path).unwrap().tensor(TensorRole::Head).unwrap().is_some());
    gguf_refused(&file.without_tensor("blk.0.attn_v.bias"), &["blk.0.attn_v.bias", "missing"]);
}

#[test]
fn gguf_rotary_scaling_of_every_kind() {
    let typed = |kind: &[u8]| Gguf::llama().key("llama.rope.scaling.type", value::string(kind));
    let factor = |file: Gguf| file.key("llama.rope.scaling.factor", value::f32(4.0));
    assert_eq!(gguf(&factor(typed(b"linear"))).unwrap().rotaries[0].scaling, RopeScaling::Linear { factor: 4.0 });
    assert_eq!(gguf(&factor(Gguf::llama())).unwrap().rotaries[0].scaling, RopeScaling::Linear { factor: 4.0 });
    assert_eq!(gguf(&factor(typed(b"none"))).unwrap().rotaries[0].scaling, RopeScaling::None);
    let older = Gguf::llama().key("llama.rope.scale_linear", value::f32(2.0));
    assert_eq!(gguf(&older).unwrap().rotaries[0].scaling, RopeScaling::Linear { factor: 2.0 });
    assert_eq!(gguf(&typed(b"linear")).unwrap().rotaries[0].scaling, RopeScaling::None, "nothing says how much");
    gguf_refused(&typed(b"yarn"), &["llama.rope.scaling.factor", "missing"]);
    gguf_refused(&typed(b"dynamic"), &["dynamic", "yarn"]);
    gguf_refused(&typed(b"longrope"), &["rope_factors_long.weight", "missing"]);
    gguf_refused(
        &Gguf::llama().f32_tensor("rope_factors_long.weight", &[8]),
        &["rope_factors_short.weight", "only one"],
    );
    gguf_refused(&Gguf::llama().key("llama.rope.scaling.attn_factor", value::f32(1.5)), &["attn_factor", "1.5"]);
    let yarn = factor(typed(b"yarn")).key("llama.rope.scaling.original_context_length", value::u32(16));
    // 1 + 0.1 ln 4, as transformers has it by default.
    let expected = RopeScaling::Yarn {
        factor: 4.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_max_position_embeddings: 16,
        attention_factor: 1.138_629_4,
        truncate: true,
    };
    assert_eq!(gguf(&yarn).unwrap().rotaries[0].scaling, expected);

    let divisors = [1.0f32, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 8.0];
    let bytes: Vec<u8> = divisors.iter().flat_map(|x| x.to_le_bytes()).collect();
    let file = Gguf::llama().tensor("rope_freqs.weight", &[8], 0, bytes);
    assert_eq!(gguf(&file).unwrap().rotaries[0].scaling, RopeScaling::Factors(divisors.to_vec()));
    let both = divisors.iter().map(|x| x * 4.0).collect();
    assert_eq!(gguf(&factor(file)).unwrap().rotaries[0].scaling, RopeScaling::Factors(both));
    gguf_refused(&Gguf::llama().f32_tensor("rope_freqs.weight", &[16]), &["rope_freqs.weight", "8 f32"]);
    gguf_refused(&Gguf::llama().f32_tensor("rope_freqs.weight", &[8]), &["rotary factor", "-0.25"]);
}

#[test]
fn gguf_keys_that_change_the_model_are_honoured_or_refused() {
    let number = |key: &str, number: u32| Gguf::llama().key(key, value::u32(number));
    gguf_refused(&Gguf::llama().key("general.architecture", value::string(b"bloom")), &["bloom", "llama"]);
    gguf_refused(&Gguf::llama().without_key("general.architecture"), &["general.architecture"]);
    gguf_refused(&number("llama.expert_count", 8), &["llama.expert_used_count", "missing"]);
    let many = number("llama.expert_count", 4096).key("llama.expert_used_count", value::u32(4096));
    gguf_refused(&many, &["experts that compute a token is 4096", "64"]);
    gguf_refused(&number("llama.expert_count", 8).key("llama.expert_used_count", value::u32(9)), &["9", "8"]);
    gguf_refused(&number("llama.expert_count", 1 << 20), &["llama.expert_count", "4096"]);
    gguf_refused(&number("llama.expert_gating_func", 2), &["llama.expert_gating_func", "2"]);
    let float = |key: &str, number: f32| Gguf::llama().key(key, value::f32(number));
    gguf_refused(&float("llama.attn_logit_softcapping", 30.0), &["attn_logit_softcapping", "30"]);
    gguf_refused(&float("llama.attention.temperature_scale", 0.1), &["temperature_scale"]);
    gguf_refused(&float("llama.residual_scale", 0.22), &["residual_scale", "0.2"]);
    assert_eq!(gguf(&float("llama.attention.scale", 0.5)).unwrap().attention_scale, 0.5);
    assert_eq!(gguf(&number("llama.attention.sliding_window", 0)).unwrap().layers[0].window, None);
    gguf_refused(&number("llama.attention.value_length", 8), &["8", "16"]);
    gguf_refused(&number("llama.rope.dimension_count", 17), &["rotary width"]);
    gguf_refused(&number("llama.attention.head_count", 3), &["32", "3"]);
    gguf_refused(&number("llama.attention.head_count", 0), &["llama.attention.head_count", "0"]);
    gguf_refused(&number("llama.block_count", 100_000), &["llama.block_count", "100000", "1024"]);
    gguf_refused(&number("llama.block_count", 2), &["blk.1.attn_norm.weight", "missing"]);
    gguf_refused(&Gguf::llama().key("llama.block_count", value::string(b"1")), &["llama.block_count", "a text"]);
    gguf_refused(&Gguf::llama().without_key("llama.context_length"), &["llama.context_length", "missing"]);
    let per_layer = |counts: &[u32]| {
        let bytes: Vec<u8> = counts.iter().flat_map(|x| x.to_le_bytes()).collect();
        Gguf::llama().key("llama.attention.head_count_kv", value::array(4, counts.len() as u64, &bytes))
    };
    assert_eq!(gguf(&per_layer(&[1, 1])).unwrap().num_kv_heads, 1);
    gguf_refused(&per_layer(&[1, 2]), &["llama.attention.head_count_kv", "differs between layers"]);
    gguf_refused(&per_layer(&[]), &["llama.attention.head_count_kv"]);
    let tokens: Vec<u8> = (0..9).flat_map(|_| [&1u64.to_le_bytes()[..], b"x"].concat()).collect();
    let too_many = Gguf::llama().key("tokenizer.ggml.tokens", value::array(8, 9, &tokens));
    gguf_refused(&too_many, &["tokenizer.ggml.tokens", "9", "8 rows"]);

    assert_eq!(gguf(&number("llama.rope.dimension_count", 8)).unwrap().rotaries[0].dim, 8);
    assert_eq!(gguf(&number("llama.attention.sliding_window", 5)).unwrap().layers[0].window, Some(5));
    let ends = number("tokenizer.ggml.eot_token_id", 3).key("tokenizer.ggml.eom_token_id", value::u32(2));
    assert_eq!(gguf(&ends).unwrap().eos_token_ids, [2, 3]);
    assert_eq!(gguf(&number("tokenizer.ggml.bos_token_id", u32::MAX)).unwrap().bos_token_id, None);
}

/// The config.json that microsoft/Phi-3-small-8k-instruct publishes, as far as it matters.
fn phi3_small() -> Value {
    json!({
        "architectures": ["Phi3SmallForCausalLM"], "model_type": "phi3small", "attention_bias": false,
        "blocksparse_block_size": 64, "blocksparse_homo_head_pattern": false, "blocksparse_num_local_blocks": 16,
        "blocksparse_triton_kernel_block_size": 64, "blocksparse_vert_stride": 8, "bos_token_id": 100_257,
        "dense_attention_every_n_layers": 2, "eos_token_id": 100_257, "ff_dim_multiplier": null,
        "ff_intermediate_size": 14_336, "gegelu_limit": 20.0, "gegelu_pad_to_256": true, "hidden_act": "gegelu",
        "hidden_size": 4096, "layer_norm_epsilon": 1e-5, "max_position_embeddings": 8192, "mup_attn_multiplier": 1.0,
        "mup_embedding_multiplier": 10.0, "mup_use_scaling": true, "mup_width_multiplier": 8.0,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_embedding_base": 1_000_000,
        "rope_position_scale": 1.0, "torch_dtype": "bfloat16", "vocab_size": 100_352
    })
}

#[test]
fn phi3_small_as_published() {
    let config = read(&phi3_small()).unwrap();
    assert_eq!(
        (config.num_layers(), config.num_heads, config.num_kv_heads, config.head_dim, config.mlp.intermediate_size),
        (32, 32, 8, 128, 14_336)
    );
    assert_eq!((config.norm.kind, config.norm.eps), (NormKind::Layer, 1e-5));
    assert_eq!(config.biases, Biases { qkv: true, output: true, mlp: true });
    assert_eq!(config.mlp.activation, Activation::Gegelu { limit: 20.0 });
    assert_eq!((config.attention_scale, config.embedding_scale, config.logit_scale), (1.0 / 128.0, 10.0, 0.125));
    assert_eq!((config.rotaries[0].base, &config.rotaries[0].scaling), (1e6, &RopeScaling::None));
    assert!(config.tied_embeddings && config.mlp.gated);
    let blocks = SparseBlocks { block_size: 64, num_local_blocks: 16, vertical_stride: 8, head_step: 1 };
    for (index, layer) in config.layers.iter().enumerate() {
        assert_eq!(layer.blocks, (index % 2 == 0).then_some(blocks), "layer {index}");
    }
    // <|dummy_id_N|>, <|fim_...|> and <|endofprompt|> of tokenization_phi3_small.py.
    assert_eq!(config.masked_tokens.len(), 91);
    for (token, is_masked) in
        [(100_255, false), (100_256, true), (100_257, false), (100_261, false), (100_266, false), (100_351, true)]
    {
        assert_eq!(config.masked_tokens.contains(&token), is_masked, "{token}");
    }
}

#[test]
fn phi3_smalls_keys_are_honoured_or_refused() {
    let with = |key: &str, value: Value| {
        let mut config = phi3_small();
        config[key] = value;
        config
    };
    let read_with = |key: &str, value: Value| read(&with(key, value)).unwrap();
    let scale = |key: &str, value: Value| {
        let config = read_with(key, value);
        [config.attention_scale, config.embedding_scale, config.logit_scale]
    };
    assert_eq!(scale("mup_use_scaling", json!(false))[0], 1.0 / 128.0_f32.sqrt());
    assert_eq!(scale("mup_attn_multiplier", json!(4.0))[0], 4.0 / 128.0);
    assert_eq!(scale("mup_embedding_multiplier", json!(null))[1], 1.0);
    assert_eq!(scale("mup_embedding_multiplier", json!(0.0))[1], 1.0);
    assert_eq!(scale("mup_width_multiplier", json!(null))[2], 1.0);
    assert_eq!(scale("mup_width_multiplier", json!(2.0))[2], 0.5);
    // 4 * (4096 / 3 * 2), to the next multiple of 256.
    assert_eq!(read_with("ff_intermediate_size", json!(null)).mlp.intermediate_size, 11_008);
    let blocks = |key: &str, value: Value| read_with(key, value).layers[0].blocks.unwrap();
    assert_eq!(blocks("blocksparse_homo_head_pattern", json!(true)).head_step, 0);
    assert_eq!(blocks("blocksparse_vert_stride", json!(80)).head_step, 2);
    assert!(read_with("dense_attention_every_n_layers", json!(null)).layers.iter().all(|layer| layer.blocks.is_some()));
    assert_eq!(read_with("dummy_token_indices", json!([7, 3, 7])).masked_tokens, [3, 7]);
    assert_eq!(read_with("rope_position_scale", json!(4.0)).rotaries[0].scaling, RopeScaling::Linear { factor: 4.0 });
    let factors = vec![1.5; 64];
    let long = json!({
        "type": "su", "short_factor": factors, "long_factor": factors, "short_mscale": 1.0, "long_mscale": 1.25,
        "original_max_position_embeddings": 8192
    });
    assert_eq!(
        read_with("rope_scaling", long.clone()).rotaries[0].scaling,
        RopeScaling::LongRope {
            short: factors.iter().map(|&factor| factor as f32).collect(),
            long: factors.iter().map(|&factor| factor as f32).collect(),
            original_max_position_embeddings: 8192,
            attention_factor: 1.0,
            long_attention_factor: 1.25
        }
    );
    let mut without = long.clone();
    without.as_object_mut().unwrap().remove("long_mscale");
    for (key, value, words) in [
        ("rope_scaling", without, &["long_mscale"][..]),
        ("rope_scaling", json!({"type": "yarn", "factor": 2.0}), &["yarn", "longrope"]),
        ("hidden_act", json!("silu"), &["silu", "gegelu"]),
        ("dummy_token_indices", json!([100_352]), &["100352"]),
        ("blocksparse_vert_stride", json!(0), &["blocksparse_vert_stride", "0"]),
        ("gegelu_limit", json!(-1.0), &["limit", "-1"]),
        ("mup_width_multiplier", json!(-1.0), &["scale", "-1"]),
    ] {
        refused(&with(key, value), words);
    }
}
