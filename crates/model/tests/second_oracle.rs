//! A second oracle: candle-transformers' own models over the tiny checkpoints, where it has the family.
//!
//! The goldens come from transformers; whoever read its code wrong in the same way as we would not be found by them. candle's
//! models were written by others, in Rust. Known here are only its own gaps, which are taken out of the configuration that both
//! read; the goldens hold us to the whole of it. Invariant: what is compared is the last row of a prompt computed from nothing.

#![allow(clippy::unwrap_used, reason = "tests")]

mod decoder_harness;

use std::{collections::HashMap, fs, path::PathBuf};

use bindery_model::{BackendKind, LoadOptions};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{
    falcon, gemma, gemma2, gemma3, llama, mistral, mixtral, phi3, qwen2, qwen2_moe, qwen3, qwen3_moe, smol::smollm3,
};
use decoder_harness::{Golden, Harness, Sequence, checkpoint, log_softmax};
use serde_json::{Map, Value, json};

/// Both compute in f32. Measured: at most 2.5e-5.
const TOLERANCE: f64 = 1e-3;
const NUM_BLOCKS: usize = 32;

/// The last row's logits of a prompt.
type Oracle = Box<dyn FnMut(&Tensor) -> Result<Tensor>>;

struct Case {
    family: &'static str,
    /// What candle does not know of it is taken out of the configuration that both read.
    alter: fn(&mut Map<String, Value>),
    /// Where it reads a key differently.
    adapt: fn(&mut Map<String, Value>),
    load: fn(Value, VarBuilder<'static>) -> Result<Oracle>,
}

impl Case {
    fn new(family: &'static str, load: fn(Value, VarBuilder<'static>) -> Result<Oracle>) -> Self {
        Self { family, alter: |_| (), adapt: |_| (), load }
    }

    fn altered(self, alter: fn(&mut Map<String, Value>)) -> Self {
        Self { alter, ..self }
    }

    fn adapted(self, adapt: fn(&mut Map<String, Value>)) -> Self {
        Self { adapt, ..self }
    }

    fn file(&self, name: &str) -> PathBuf {
        checkpoint(self.family).join(name)
    }

    /// The configuration that both read.
    fn config(&self) -> Map<String, Value> {
        let text = fs::read_to_string(self.file("config.json")).unwrap();
        let mut config = serde_json::from_str(&text).unwrap();
        (self.alter)(&mut config);
        config
    }
}

/// A model whose configuration is its `config.json` and whose `forward` takes ids and an offset.
macro_rules! by_config {
    ($model:ty, $config:ty $(, $first:expr)?) => {
        |config, tensors| {
            let config: $config = serde_json::from_value(config).map_err(candle_core::Error::wrap)?;
            let mut model = <$model>::new($($first,)? &config, tensors)?;
            Ok(Box::new(move |ids: &Tensor| model.forward(ids, 0)) as Oracle)
        }
    };
}

fn load_llama(config: Value, tensors: VarBuilder<'static>) -> Result<Oracle> {
    let config: llama::LlamaConfig = serde_json::from_value(config).map_err(candle_core::Error::wrap)?;
    let config = config.into_config(false);
    let model = llama::Llama::load(tensors, &config)?;
    Ok(Box::new(move |ids| {
        let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
        model.forward(ids, 0, &mut cache)
    }))
}

fn load_falcon(config: Value, tensors: VarBuilder<'static>) -> Result<Oracle> {
    let config: falcon::Config = serde_json::from_value(config).map_err(candle_core::Error::wrap)?;
    let mut model = falcon::Falcon::load(tensors, config)?;
    Ok(Box::new(move |ids| model.forward(ids)))
}

/// candle's windows leave the row's own token out of the count.
fn window_without_own(config: &mut Map<String, Value>) {
    let window = config["sliding_window"].as_u64().unwrap();
    config.insert("sliding_window".to_owned(), json!(window - 1));
}

/// It applies a window where the configuration says not to.
fn no_window(config: &mut Map<String, Value>) {
    config.insert("sliding_window".to_owned(), json!(1 << 20));
}

/// It has windows in every layer or in none, and the head's size where the configuration has another number to scale by.
fn gemma2_as_candle_knows_it(config: &mut Map<String, Value>) {
    let layers = config["num_hidden_layers"].as_u64().unwrap();
    config.insert("layer_types".to_owned(), json!(vec!["sliding_attention"; layers as usize]));
    config.insert("query_pre_attn_scalar".to_owned(), config["head_dim"].clone());
}

/// It has no scaling of long positions, and the head's size as above.
fn gemma3_as_candle_knows_it(config: &mut Map<String, Value>) {
    config["rope_parameters"]["full_attention"] = json!({"rope_type": "default", "rope_theta": 20000.0});
    config.insert("query_pre_attn_scalar".to_owned(), config["head_dim"].clone());
}

fn gemma3_names(config: &mut Map<String, Value>) {
    window_without_own(config);
    let rope = config["rope_parameters"].clone();
    config.insert("rope_theta".to_owned(), rope["full_attention"]["rope_theta"].clone());
    config.insert("rope_local_base_freq".to_owned(), rope["sliding_attention"]["rope_theta"].clone());
    config.remove("rope_scaling");
}

/// It multiplies by longrope's factors where they divide, and knows no attention factor: plain rotation is left.
fn plain_rope(config: &mut Map<String, Value>) {
    config.insert("rope_parameters".to_owned(), json!({"rope_type": "default", "rope_theta": 10000.0}));
}

/// It has windows in every layer, the configuration in some.
fn window_everywhere(config: &mut Map<String, Value>) {
    let layers = config["num_hidden_layers"].as_u64().unwrap();
    config.insert("layer_types".to_owned(), json!(vec!["sliding_attention"; layers as usize]));
    config.insert("max_window_layers".to_owned(), json!(0));
}

/// It has the approximate GELU alone.
fn tanh_gelu(config: &mut Map<String, Value>) {
    config.insert("activation".to_owned(), json!("gelu_pytorch_tanh"));
}

fn cases() -> Vec<Case> {
    vec![
        Case::new("tiny-llama2", load_llama),
        Case::new("tiny-llama31", load_llama),
        Case::new("tiny-llama32", load_llama),
        Case::new("tiny-mistral", by_config!(mistral::Model, mistral::Config)).adapted(window_without_own),
        Case::new("tiny-mixtral", by_config!(mixtral::Model, mixtral::Config)),
        Case::new("tiny-falcon-7b", load_falcon).altered(tanh_gelu),
        Case::new("tiny-gemma", by_config!(gemma::Model, gemma::Config, false)),
        Case::new("tiny-gemma2", by_config!(gemma2::Model, gemma2::Config, false))
            .altered(gemma2_as_candle_knows_it)
            .adapted(window_without_own),
        Case::new("tiny-gemma3", by_config!(gemma3::Model, gemma3::Config, false))
            .altered(gemma3_as_candle_knows_it)
            .adapted(gemma3_names),
        Case::new("tiny-phi3", by_config!(phi3::Model, phi3::Config)).altered(plain_rope),
        Case::new("tiny-qwen2", by_config!(qwen2::ModelForCausalLM, qwen2::Config))
            .altered(window_everywhere)
            .adapted(window_without_own),
        Case::new("tiny-qwen2-moe", by_config!(qwen2_moe::Model, qwen2_moe::Config)).adapted(no_window),
        Case::new("tiny-qwen3", by_config!(qwen3::ModelForCausalLM, qwen3::Config)),
        Case::new("tiny-qwen3-moe", by_config!(qwen3_moe::ModelForCausalLM, qwen3_moe::Config)),
        Case::new("tiny-smollm3", by_config!(smollm3::ModelForCausalLM, smollm3::Config)),
    ]
}

/// The configuration with the keys that candle reads: the older ones, at the top.
fn candles_config(case: &Case) -> Value {
    let mut config = case.config();
    config.retain(|_, value| !value.is_null());
    let rope = config["rope_parameters"].clone();
    config.insert("rope_theta".to_owned(), rope["rope_theta"].clone());
    if rope["rope_type"].is_string() && rope["rope_type"] != "default" {
        let mut scaling = rope;
        scaling["type"] = scaling["rope_type"].clone();
        config.insert("rope_scaling".to_owned(), scaling);
    }
    // What some of its structures ask for although the models do not use it.
    for (key, value) in [
        ("use_flash_attn", json!(false)),
        ("sliding_window", json!(1 << 20)),
        ("max_window_layers", json!(0)),
        ("use_sliding_window", json!(false)),
        ("num_experts", config.get("num_local_experts").cloned().unwrap_or(Value::Null)),
        ("use_cache", json!(false)),
        ("initializer_range", json!(0.02)),
        ("attention_dropout", json!(0.0)),
        ("hidden_dropout", json!(0.0)),
        ("bos_token_id", json!(1)),
        ("eos_token_id", json!(2)),
    ] {
        config.entry(key).or_insert(value);
    }
    (case.adapt)(&mut config);
    Value::Object(config)
}

/// The checkpoint's tensors in f32; a tied head is named apart where candle looks for it.
fn tensors(case: &Case) -> VarBuilder<'static> {
    let mut tensors: HashMap<String, Tensor> =
        candle_core::safetensors::load(case.file("model.safetensors"), &Device::Cpu).unwrap();
    for embedding in ["model.embed_tokens.weight", "transformer.word_embeddings.weight"] {
        if let (Some(tied), false) = (tensors.get(embedding).cloned(), tensors.contains_key("lm_head.weight")) {
            tensors.insert("lm_head.weight".to_owned(), tied);
        }
    }
    VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)
}

#[test]
#[allow(clippy::print_stderr, reason = "measured values are worth reading beside the bound (--nocapture)")]
fn candles_own_models_agree() {
    let mut wrong = Vec::new();
    for case in cases() {
        let golden = Golden::read(&case.file("golden.json"));
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), serde_json::to_string(&case.config()).unwrap()).unwrap();
        fs::copy(case.file("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
        let options = LoadOptions::new(BackendKind::Reference);
        let mut harness = Harness::load(folder.path(), &options, NUM_BLOCKS);
        let (mut worst, mut num_compared): (f64, usize) = (0.0, 0);
        for prompt in &golden.prompts {
            let ids = Tensor::new(prompt.tokens.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            // A model of its own for every prompt: some keep keys and values from one call to the next.
            let theirs = (case.load)(candles_config(&case), tensors(&case)).and_then(|mut oracle| oracle(&ids));
            let theirs = match theirs {
                Ok(theirs) => theirs,
                Err(error) => {
                    wrong.push(format!("{}: {error}", case.family));
                    break;
                }
            };
            let theirs: Vec<f32> = theirs.flatten_all().unwrap().to_vec1().unwrap();
            let mut sequence = Sequence::new(&prompt.tokens);
            let last = prompt.tokens.len() - 1;
            let ours = harness.prefill(&mut sequence, prompt.tokens.len(), |position| position == last);
            harness.free(sequence);
            let (ours, theirs) = (log_softmax(&ours[0].1), log_softmax(&theirs));
            assert_eq!(ours.len(), theirs.len(), "{}", case.family);
            assert!(ours.iter().chain(&theirs).all(|logprob| logprob.is_finite()), "{}", case.family);
            worst = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(worst, f64::max);
            num_compared += 1;
        }
        if num_compared == 0 {
            wrong.push(format!("{}: nothing was compared", case.family));
        }
        eprintln!("measured {}: {worst:.2e} over {num_compared} prompts", case.family);
        if worst >= TOLERANCE {
            wrong.push(format!("{}: off by {worst:.2e}", case.family));
        }
    }
    assert!(wrong.is_empty(), "candle's models differ:\n{}", wrong.join("\n"));
}
