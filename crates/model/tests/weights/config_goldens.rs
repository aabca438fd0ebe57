//! Configs of every family against what transformers makes of them: `config_goldens.json`, whose head and
//! `make_config_goldens.py` say how it was made.

use std::collections::BTreeMap;

use bindery_model::{
    config::{Activation, Block, DecoderConfig, Experts, FeedForward, NormKind, RopeScaling, RopeStyle, Rotary},
    weights::WeightStore,
};
use serde::Deserialize;
use serde_json::Value;

use crate::builder::on_disk;

#[derive(Deserialize)]
struct Goldens {
    transformers: String,
    goldens: Vec<Golden>,
}

#[derive(Deserialize)]
struct Golden {
    name: String,
    config: Value,
    expected: Expected,
}

#[derive(Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "as the file has it")]
struct Expected {
    num_parameters: u64,
    hidden_size: usize,
    vocab_size: usize,
    num_layers: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    max_position_embeddings: usize,
    tied: bool,
    eps: f64,
    attention_scale: f64,
    qkv_bias: bool,
    output_bias: bool,
    mlp_bias: bool,
    query_key_norm: bool,
    norms_in_layer: usize,
    embedding_scale: f64,
    attention_soft_cap: Option<f64>,
    logit_soft_cap: Option<f64>,
    bos: Option<u32>,
    eos: Value,
    parallel: Option<bool>,
    activation: String,
    alibi_at_1: Option<Vec<f32>>,
    layers: Vec<(usize, Layer)>,
    rotaries: BTreeMap<String, ExpectedRotary>,
}

#[derive(Deserialize)]
struct Layer {
    window: Option<usize>,
    rotary: Option<String>,
    experts: Option<LayerExperts>,
}

#[derive(Deserialize)]
struct LayerExperts {
    num: usize,
    per_token: usize,
    width: usize,
    normalized: bool,
    shared: Option<usize>,
}

#[derive(Deserialize)]
struct ExpectedRotary {
    num_pairs: usize,
    theta: f64,
    inverse_frequencies: Vec<(usize, f64)>,
    attention_factor: f64,
    original: Option<usize>,
    far_length: Option<usize>,
    far_inverse_frequencies: Option<Vec<(usize, f64)>>,
}

fn goldens() -> Goldens {
    serde_json::from_str(include_str!("config_goldens.json")).unwrap()
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 2e-6 * b.abs()
}

#[test]
fn every_family_is_understood_as_transformers_understands_it() {
    let Goldens { transformers, goldens } = goldens();
    assert_eq!(transformers, "5.23.0");
    let families: std::collections::BTreeSet<_> =
        goldens.iter().map(|golden| golden.config["model_type"].as_str().unwrap()).collect();
    assert_eq!(families.len(), 15, "{families:?}");
    for Golden { name, config, expected } in &goldens {
        let disk = on_disk("config.json", &serde_json::to_vec(config).unwrap());
        let config = DecoderConfig::from_json_file(&disk.path).unwrap_or_else(|error| panic!("{name}: {error}"));
        check_sizes(name, &config, expected);
        check_axes(name, &config, expected);
        check_layers(name, &config, expected);
        // The made-up weights are those the decoder asks for, no more and no fewer.
        let store = WeightStore::dummy(&disk.path).unwrap();
        assert_eq!(store.num_parameters(), expected.num_parameters, "{name}");
    }
}

fn check_sizes(name: &str, config: &DecoderConfig, expected: &Expected) {
    let ours = [
        config.hidden_size,
        config.vocab_size,
        config.num_layers(),
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
    ];
    let theirs = [
        expected.hidden_size,
        expected.vocab_size,
        expected.num_layers,
        expected.num_heads,
        expected.num_kv_heads,
        expected.head_dim,
    ];
    assert_eq!(ours, theirs, "{name}");
    let context = expected.max_position_embeddings;
    // Scaling that is switched on reaches its factor times as far as the config says; Gemma 3, with two, counts it already.
    let scaling = if let [rotary] = &*config.rotaries { &rotary.scaling } else { &RopeScaling::None };
    let reach = match scaling {
        RopeScaling::Linear { factor } => context as f64 * f64::from(*factor),
        RopeScaling::Dynamic { factor, original_max_position_embeddings: original }
        | RopeScaling::Yarn { factor, original_max_position_embeddings: original, .. } => {
            *original as f64 * f64::from(*factor)
        }
        _ => context as f64,
    };
    assert_eq!(config.max_position_embeddings, context.max(reach as usize), "{name}");
    let known = |id: &u32| (*id as usize) < config.vocab_size;
    assert_eq!(config.bos_token_id, expected.bos.filter(known), "{name}");
    let ends: Vec<u32> = match &expected.eos {
        Value::Array(ids) => ids.iter().map(|id| id.as_u64().unwrap() as u32).collect(),
        id => id.as_u64().map(|id| id as u32).into_iter().collect(),
    };
    assert_eq!(config.eos_token_ids, ends.into_iter().filter(known).collect::<Vec<_>>(), "{name}");
}

fn check_axes(name: &str, config: &DecoderConfig, expected: &Expected) {
    assert_eq!(config.tied_embeddings, expected.tied, "{name}");
    let biases = config.biases;
    assert_eq!(
        (biases.qkv, biases.output, biases.mlp, config.head_bias),
        (expected.qkv_bias, expected.output_bias, expected.mlp_bias, false),
        "{name}"
    );
    assert_eq!(config.query_key_norm, expected.query_key_norm, "{name}");
    let is_falcon = config.architecture == "falcon";
    let (parallel, norms) = match config.block {
        Block::PreNorm => (false, 2),
        Block::SandwichNorm => (false, 4),
        Block::Parallel => (true, 1),
        Block::ParallelTwoNorms => (true, 2),
    };
    assert_eq!((parallel, norms), (expected.parallel.unwrap_or(false), expected.norms_in_layer), "{name}");
    assert_eq!(config.norm.kind, if is_falcon { NormKind::Layer } else { NormKind::Rms }, "{name}");
    assert_eq!(config.norm.weight_offset, f32::from(config.architecture.starts_with("gemma")), "{name}");
    assert_eq!(config.mlp.gated, !is_falcon, "{name}");
    let activation = match expected.activation.as_str() {
        "silu" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_pytorch_tanh" => Activation::GeluTanh,
        other => panic!("{other}"),
    };
    assert_eq!(config.mlp.activation, activation, "{name}");
    for (ours, theirs) in [
        (config.norm.eps, expected.eps),
        (config.attention_scale, expected.attention_scale),
        (config.embedding_scale, expected.embedding_scale),
        (config.logit_scale, 1.0),
    ] {
        assert_eq!(ours, theirs as f32, "{name}");
    }
    let caps = [expected.attention_soft_cap, expected.logit_soft_cap].map(|cap| cap.map(|cap| cap as f32));
    assert_eq!([config.attention_soft_cap, config.logit_soft_cap], caps, "{name}");
    assert_eq!(config.alibi.as_ref().map(|alibi| &alibi.slopes), expected.alibi_at_1.as_ref(), "{name}");
}

fn check_layers(name: &str, config: &DecoderConfig, expected: &Expected) {
    let layers = expected.layers.iter().flat_map(|(count, layer)| std::iter::repeat_n(layer, *count));
    let mut used = vec![false; config.rotaries.len()];
    for (index, (ours, theirs)) in config.layers.iter().zip(layers).enumerate() {
        assert_eq!(ours.window, theirs.window, "{name}, layer {index}");
        assert_eq!(ours.rotary.is_some(), theirs.rotary.is_some(), "{name}, layer {index}");
        if let (Some(rotary), Some(kind)) = (ours.rotary, &theirs.rotary) {
            used[rotary] = true;
            check_rotary(&format!("{name}, {kind}"), &config.rotaries[rotary], &expected.rotaries[kind]);
        }
        let experts = theirs.experts.as_ref().map(|experts| Experts {
            num_experts: experts.num,
            num_experts_per_token: experts.per_token,
            intermediate_size: experts.width,
            activation: config.mlp.activation,
            normalize_weights: experts.normalized,
            shared_intermediate_size: experts.shared,
        });
        match ours.feed_forward {
            FeedForward::Dense => assert_eq!(None, experts, "{name}, layer {index}"),
            FeedForward::Experts => assert_eq!(config.experts, experts, "{name}, layer {index}"),
        }
    }
    assert!(used.iter().all(|&used| used), "{name}: a rotary embedding that no layer uses");
}

fn check_rotary(name: &str, rotary: &Rotary, expected: &ExpectedRotary) {
    assert_eq!((rotary.style, rotary.dim), (RopeStyle::Neox, 2 * expected.num_pairs), "{name}");
    assert_eq!(rotary.base, expected.theta as f32, "{name}");
    let attention_factor = match rotary.scaling {
        RopeScaling::LongRope { attention_factor, .. } | RopeScaling::Yarn { attention_factor, .. } => attention_factor,
        _ => 1.0,
    };
    assert_eq!(attention_factor, expected.attention_factor as f32, "{name}");
    let check = |length: usize, theirs: &[(usize, f64)]| {
        for &(pair, theirs) in theirs {
            let ours = inverse_frequency(rotary, pair, length);
            assert!(close(ours, theirs), "{name}, pair {pair} at length {length}: {ours} and {theirs}");
        }
    };
    check(1, &expected.inverse_frequencies);
    match (expected.far_length, &expected.far_inverse_frequencies, &rotary.scaling) {
        (
            Some(length),
            Some(far),
            RopeScaling::LongRope { original_max_position_embeddings, .. }
            | RopeScaling::Dynamic { original_max_position_embeddings, .. },
        ) => {
            assert_eq!(Some(*original_max_position_embeddings), expected.original, "{name}");
            check(length, far);
        }
        (None, None, _) => {}
        _ => panic!("{name}: {:?}", rotary.scaling),
    }
}

/// A naive reading of the formulas in transformers' `modeling_rope_utils.py`, for a request of `length` tokens.
fn inverse_frequency(rotary: &Rotary, pair: usize, length: usize) -> f64 {
    let dim = rotary.dim as f64;
    let at = |base: f64| base.powf(-((2 * pair) as f64) / dim);
    let base = f64::from(rotary.base);
    match &rotary.scaling {
        RopeScaling::None => at(base),
        RopeScaling::Linear { factor } => at(base) / f64::from(*factor),
        RopeScaling::Factors(factors) => at(base) / f64::from(factors[pair]),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let (factor, low, high) = (f64::from(*factor), f64::from(*low_freq_factor), f64::from(*high_freq_factor));
            let turns = *original_max_position_embeddings as f64 * at(base) / std::f64::consts::TAU;
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            at(base) * (kept + (1.0 - kept) / factor)
        }
        RopeScaling::LongRope { short, long, original_max_position_embeddings, .. } => {
            let factors = if length > *original_max_position_embeddings { long } else { short };
            at(base) / f64::from(factors[pair])
        }
        RopeScaling::Dynamic { factor, original_max_position_embeddings } => {
            let (factor, original) = (f64::from(*factor), *original_max_position_embeddings as f64);
            let grown = factor * (length as f64).max(original) / original - (factor - 1.0);
            at(base * grown.powf(dim / (dim - 2.0)))
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_position_embeddings, truncate, .. } => {
            let original = *original_max_position_embeddings as f64;
            let limit =
                |turns: f32| dim * (original / (f64::from(turns) * std::f64::consts::TAU)).ln() / (2.0 * base.ln());
            let (low, high) = (limit(*beta_fast), limit(*beta_slow));
            let (low, high) = if *truncate { (low.floor(), high.ceil()) } else { (low, high) };
            let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
            if low == high {
                high += 0.001;
            }
            let stretched = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
            at(base) * (1.0 - stretched + stretched / f64::from(*factor))
        }
    }
}
