//! `config.json` to [`DecoderConfig`]: what each family's configuration class in transformers means by its keys and by
//! their absence.
//!
//! It must not touch files. Its invariant: a key that changes what the model computes is either honoured or refused by
//! name. Defaults are those of the family's class in transformers (`families`), since a saved config may leave them out.

mod falcon;
mod families;
mod keys;
mod layers;
mod phi3_small;
mod quantization;
mod rotary;

use serde_json::Value;

use self::{
    families::{FAMILIES, Family, FamilyActivation, FamilyBiases, FamilyCaps, FamilyRotary},
    keys::{Keys, Outcome},
};
use super::{Activation, Biases, DecoderConfig, Limits, Mlp, Norm, bad, context, known_tokens, unsupported};
use crate::weights::WeightFormat;

pub(crate) use self::quantization::{GptqZeros, StoredQuantization};
pub(super) use self::rotary::yarn_attention;

/// Gemma 3 with its vision part: the language model's config is inside.
const GEMMA3_MULTIMODAL: (&str, &str) = ("gemma3", "Gemma3ForConditionalGeneration");

/// What a `config.json` says.
pub(crate) struct CheckpointConfig {
    pub(crate) decoder: DecoderConfig,
    /// In which dense weights are said to be stored (what `--load-format dummy` makes up).
    pub(crate) dtype: Option<WeightFormat>,
    /// How the quantised ones are, if some are.
    pub(crate) quantization: Option<StoredQuantization>,
}

/// What `quantization_config` says, of any top level.
pub(super) fn stored_quantization(value: &Value) -> Outcome<Option<StoredQuantization>> {
    Keys::of(value).map_or(Ok(None), quantization::stored)
}

pub(super) fn decoder_config(value: &Value) -> Outcome<CheckpointConfig> {
    let Some(top) = Keys::of(value) else {
        return bad("the top level is not a JSON object");
    };
    let (family, keys) = family(top)?;
    refuse_what_changes_the_model(top, family)?;
    refuse_what_changes_the_model(keys, family)?;
    let quantization = match quantization::stored(top)? {
        None => quantization::stored(keys)?,
        found => found,
    };

    let dimensions = dimensions(keys, family)?;
    let Dimensions { vocab_size, hidden_size, num_heads, num_kv_heads, head_dim, num_layers, intermediate_size } =
        dimensions;
    let is_falcon = matches!(family.rotary, FamilyRotary::Falcon);
    let is_phi3_small = matches!(family.rotary, FamilyRotary::Phi3Small);
    let max_position_embeddings =
        keys.size("max_position_embeddings", Limits::POSITIONS)?.unwrap_or(family.max_position_embeddings);
    let activation = activation(keys, family)?;
    let mut layers = layers::layers(keys, family, num_layers)?;
    let experts = layers::experts(keys, family, activation, &mut layers)?;
    let alibi = if is_falcon { falcon::alibi(keys, num_heads, head_dim)? } else { None };
    let rotaries = if alibi.is_some() {
        for layer in &mut layers {
            layer.rotary = None;
        }
        Vec::new()
    } else {
        rotary::rotaries(keys, family, head_dim, max_position_embeddings)?
    };
    let caps = Caps::read(keys, family, head_dim)?;
    // A nested config leaves these to the outer one.
    let outer = |key| if top.has(key) { top } else { keys };
    let token_ids = |key, default| outer(key).token_ids(key, default);
    let bos_token_ids = token_ids("bos_token_id", family.bos_token_id)?;
    let eos_token_ids = token_ids("eos_token_id", family.eos_token_id)?;
    let mut config = DecoderConfig {
        architecture: family.model_type.to_owned(),
        vocab_size,
        hidden_size,
        num_heads,
        num_kv_heads,
        head_dim,
        max_position_embeddings,
        norm: Norm {
            kind: family.norm.kind,
            eps: keys.number(family.norm.key)?.unwrap_or(family.norm.eps) as f32,
            weight_offset: family.norm.weight_offset,
        },
        block: if is_falcon { falcon::block(keys)? } else { family.block },
        query_key_norm: family.query_key_norm,
        rotaries,
        alibi,
        attention_scale: caps.attention_scale,
        attention_soft_cap: caps.attention_soft_cap,
        mlp: Mlp { intermediate_size, activation, gated: !is_falcon },
        experts,
        biases: biases(keys, family)?,
        layers,
        embedding_scale: if is_phi3_small {
            phi3_small::embedding_scale(keys)?
        } else if family.scaled_embeddings {
            (hidden_size as f64).sqrt() as f32
        } else {
            1.0
        },
        tied_embeddings: outer("tie_word_embeddings").truth("tie_word_embeddings")?.unwrap_or(family.tied_embeddings),
        head_bias: false,
        logit_scale: if is_phi3_small { phi3_small::logit_scale(keys)? } else { 1.0 },
        logit_soft_cap: caps.logit_soft_cap,
        masked_tokens: if is_phi3_small { phi3_small::masked_tokens(keys, vocab_size)? } else { Vec::new() },
        bos_token_id: known_tokens("bos_token_id", bos_token_ids, vocab_size).first().copied(),
        eos_token_ids: known_tokens("eos_token_id", eos_token_ids, vocab_size),
    };
    config.drop_unused_rotaries();
    config.max_position_embeddings = context(&config.rotaries, max_position_embeddings);
    config.check()?;
    let dtype = stored_dtype(top).or_else(|| stored_dtype(keys));
    Ok(CheckpointConfig { decoder: config, dtype, quantization })
}

/// Sizes that tensors have.
struct Dimensions {
    vocab_size: usize,
    hidden_size: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    num_layers: usize,
    intermediate_size: usize,
}

fn dimensions(keys: Keys<'_>, family: &Family) -> Outcome<Dimensions> {
    if matches!(family.rotary, FamilyRotary::Falcon) {
        return falcon::dimensions(keys);
    }
    let size = |key, limit, default: Option<usize>| match default {
        // Null is no size, whatever the default.
        Some(default) if !keys.has(key) => Ok(default),
        _ => keys.required_size(key, limit),
    };
    let sizes = family.sizes.as_ref();
    let hidden_size = size("hidden_size", Limits::WIDTH, sizes.map(|sizes| sizes.hidden_size))?;
    let num_heads = size("num_attention_heads", Limits::HEADS, sizes.map(|sizes| sizes.num_heads))?;
    let num_kv_heads = match keys.size("num_key_value_heads", Limits::HEADS)? {
        Some(count) => count,
        None if keys.is_null("num_key_value_heads") => num_heads,
        None => family.num_kv_heads.unwrap_or(num_heads),
    };
    let default_head_dim = if keys.has("head_dim") { None } else { family.head_dim };
    let head_dim = match keys.size("head_dim", Limits::HEAD_DIM)?.or(default_head_dim) {
        Some(width) => width,
        // Rounded down, as there: projections are `num_heads * head_dim` wide, which need not be `hidden_size`.
        None if hidden_size >= num_heads => hidden_size / num_heads,
        None => {
            return bad(format!(
                "hidden_size {hidden_size} is less than num_attention_heads {num_heads}, and head_dim is absent"
            ));
        }
    };
    Ok(Dimensions {
        vocab_size: size("vocab_size", Limits::VOCAB, sizes.map(|sizes| sizes.vocab_size))?,
        hidden_size,
        num_heads,
        num_kv_heads,
        head_dim,
        num_layers: size("num_hidden_layers", Limits::LAYERS, sizes.map(|sizes| sizes.num_layers))?,
        intermediate_size: match family.rotary {
            FamilyRotary::Phi3Small => phi3_small::intermediate_size(keys, hidden_size)?,
            _ => size("intermediate_size", Limits::WIDTH, sizes.map(|sizes| sizes.intermediate_size))?,
        },
    })
}

/// The family, and the keys of its language model.
fn family(top: Keys<'_>) -> Outcome<(&'static Family, Keys<'_>)> {
    let class = top.array("architectures")?.and_then(|classes| classes.first()).and_then(Value::as_str);
    let model_type = top.text("model_type")?;
    let Some(name) = model_type.or(class) else {
        return bad("neither model_type nor architectures says which architecture this is");
    };
    let (name, keys) = if name == GEMMA3_MULTIMODAL.0 || name == GEMMA3_MULTIMODAL.1 {
        let Some(inner) = top.object("text_config")? else {
            return bad("text_config is missing, which describes the language model");
        };
        (inner.text("model_type")?.unwrap_or("gemma3_text"), inner)
    } else if falcon::OLD_NAMES.contains(&name) {
        ("falcon", top)
    } else {
        (name, top)
    };
    match FAMILIES.iter().find(|family| family.model_type == name || model_type.is_none() && family.class == name) {
        Some(family) => Ok((family, keys)),
        None => unknown_architecture(name),
    }
}

/// Keys that this family does not honour, with a value that means something.
fn refuse_what_changes_the_model(keys: Keys<'_>, family: &Family) -> Outcome<()> {
    let has_mlp_bias = matches!(family.biases, FamilyBiases::AttentionAndMlp);
    for (key, honoured) in [("mlp_bias", has_mlp_bias), ("use_mrope", false), ("use_bidirectional_attention", false)] {
        if !honoured && keys.truth(key)? == Some(true) {
            return unsupported(format!("{key} is true, which is not supported in this architecture"));
        }
    }
    Ok(())
}

fn activation(keys: Keys<'_>, family: &Family) -> Outcome<Activation> {
    let (key, default) = match family.activation {
        FamilyActivation::Phi3Small => return phi3_small::activation(keys),
        FamilyActivation::HiddenAct => ("hidden_act", "silu"),
        FamilyActivation::Gemma => ("hidden_act", "gelu_pytorch_tanh"),
        FamilyActivation::HiddenActivation => ("hidden_activation", "gelu_pytorch_tanh"),
        FamilyActivation::Falcon => ("activation", "gelu"),
    };
    let is_gemma = matches!(family.activation, FamilyActivation::Gemma);
    let named = |name: &str| match name {
        "gelu" if is_gemma => Ok(Activation::GeluTanh),
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" | "gelu_python" => Ok(Activation::Gelu),
        // One formula under many names.
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_python_tanh" | "gelu_fast" | "gelu_accurate" => {
            Ok(Activation::GeluTanh)
        }
        other => unsupported(format!(
            "the activation {other:?} is not supported; silu, gelu, gelu_new and gelu_pytorch_tanh are"
        )),
    };
    let activation = named(keys.text(key)?.unwrap_or(default))?;
    // transformers 4 let the newer key win in Gemma 1, transformers 5 does not read it.
    if is_gemma
        && let Some(newer) = keys.text("hidden_activation")?
        && named(newer)? != activation
    {
        return unsupported(format!("hidden_activation is {newer:?}, and hidden_act says otherwise"));
    }
    Ok(activation)
}

fn biases(keys: Keys<'_>, family: &Family) -> Outcome<Biases> {
    let is_true = |key, default| -> Outcome<bool> { Ok(keys.truth(key)?.unwrap_or(default)) };
    Ok(match family.biases {
        FamilyBiases::None => Biases::default(),
        FamilyBiases::Qkv => Biases { qkv: true, ..Biases::default() },
        FamilyBiases::ConfiguredQkv => Biases { qkv: is_true("qkv_bias", true)?, ..Biases::default() },
        FamilyBiases::Attention => {
            let attention = is_true("attention_bias", false)?;
            Biases { qkv: attention, output: attention, mlp: false }
        }
        FamilyBiases::AttentionAndMlp => {
            let attention = is_true("attention_bias", false)?;
            Biases { qkv: attention, output: attention, mlp: is_true("mlp_bias", false)? }
        }
        FamilyBiases::Always => Biases { qkv: true, output: true, mlp: true },
        FamilyBiases::All => {
            let all = is_true("bias", false)?;
            Biases { qkv: all, output: all, mlp: all }
        }
    })
}

/// The score's scale and the soft caps.
struct Caps {
    attention_scale: f32,
    attention_soft_cap: Option<f32>,
    logit_soft_cap: Option<f32>,
}

impl Caps {
    fn read(keys: Keys<'_>, family: &Family, head_dim: usize) -> Outcome<Self> {
        let cap = |key, absent: Option<f64>| -> Outcome<Option<f32>> {
            let default = if keys.is_null(key) { None } else { absent };
            Ok(keys.number(key)?.or(default).map(|cap| cap as f32))
        };
        let by_scalar =
            || -> Outcome<f32> { Ok(keys.number("query_pre_attn_scalar")?.unwrap_or(256.0).sqrt().recip() as f32) };
        Ok(match family.caps {
            FamilyCaps::None => Self {
                attention_scale: (head_dim as f64).sqrt().recip() as f32,
                attention_soft_cap: None,
                logit_soft_cap: None,
            },
            FamilyCaps::Phi3Small => Self {
                attention_scale: phi3_small::attention_scale(keys, head_dim)?,
                attention_soft_cap: None,
                logit_soft_cap: None,
            },
            FamilyCaps::Gemma2 => Self {
                attention_scale: by_scalar()?,
                attention_soft_cap: cap("attn_logit_softcapping", Some(50.0))?,
                logit_soft_cap: cap("final_logit_softcapping", Some(30.0))?,
            },
            FamilyCaps::Gemma3 => Self {
                attention_scale: by_scalar()?,
                attention_soft_cap: None,
                logit_soft_cap: cap("final_logit_softcapping", None)?,
            },
        })
    }
}

fn stored_dtype(keys: Keys<'_>) -> Option<WeightFormat> {
    // Only a hint for made-up weights: whatever else stands there is no error.
    let name = keys.get("dtype").or_else(|| keys.get("torch_dtype"))?.as_str()?;
    match name.strip_prefix("torch.").unwrap_or(name) {
        "float32" => Some(WeightFormat::F32),
        "float16" => Some(WeightFormat::F16),
        "bfloat16" => Some(WeightFormat::Bf16),
        _ => None,
    }
}

fn unknown_architecture<T>(name: &str) -> Outcome<T> {
    unsupported(format!("the architecture {name:?} is not supported yet; {}", known_architectures()))
}

/// What runs, for the error about what does not.
pub(super) fn known_architectures() -> String {
    let known: Vec<_> = FAMILIES.iter().map(|family| family.model_type).collect();
    format!(
        "known in config.json: {}, {}; in GGUF files: {}",
        known.join(", "),
        GEMMA3_MULTIMODAL.0,
        super::gguf::known_architectures()
    )
}
