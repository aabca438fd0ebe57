//! `config.json` to [`DecoderConfig`]: what each family's configuration class in transformers means by its keys and by
//! their absence.
//!
//! It must not touch files. Its invariant: a key that changes what the model computes is either honoured or refused by
//! name. Defaults are those of the family's class in transformers, since a saved config may leave them out.

use serde_json::{Map, Value};

use super::{
    Activation, Biases, Block, ConfigError, DecoderConfig, FeedForward, LayerConfig, Limits, Mlp, Norm, NormKind,
    RopeScaling, RopeStyle, Rotary, bad, check_size, known_tokens, unsupported,
};
use crate::weights::WeightFormat;

/// What families do differently, and the defaults of their classes.
struct Family {
    model_type: &'static str,
    /// Name in `architectures`, for configs without `model_type`.
    class: &'static str,
    /// None: as many as there are heads.
    num_kv_heads: Option<usize>,
    max_position_embeddings: usize,
    rope_theta: f64,
    tied_embeddings: bool,
    biases: FamilyBiases,
    layers: FamilyLayers,
}

enum FamilyBiases {
    /// `attention_bias` says it for all four projections.
    Configured,
    /// Query, key and value always have one.
    Qkv,
    None,
}

enum FamilyLayers {
    /// All alike, no window.
    Plain,
    /// `sliding_window` holds in every layer (4096 where the key is absent, none where it is null).
    Mistral,
    /// `sliding_window` holds from `max_window_layers` on, or as `layer_types` says, where `use_sliding_window` is set.
    Qwen2,
    /// `no_rope_layers`, else every `no_rope_layer_interval`-th layer goes without rotary embedding.
    SmolLm3,
}

const FAMILIES: &[Family] = &[
    Family {
        model_type: "llama",
        class: "LlamaForCausalLM",
        num_kv_heads: None,
        max_position_embeddings: 2048,
        rope_theta: 10_000.0,
        tied_embeddings: false,
        biases: FamilyBiases::Configured,
        layers: FamilyLayers::Plain,
    },
    Family {
        model_type: "mistral",
        class: "MistralForCausalLM",
        num_kv_heads: Some(8),
        max_position_embeddings: 131_072,
        rope_theta: 10_000.0,
        tied_embeddings: false,
        biases: FamilyBiases::None,
        layers: FamilyLayers::Mistral,
    },
    Family {
        model_type: "qwen2",
        class: "Qwen2ForCausalLM",
        num_kv_heads: Some(32),
        max_position_embeddings: 32_768,
        rope_theta: 10_000.0,
        tied_embeddings: false,
        biases: FamilyBiases::Qkv,
        layers: FamilyLayers::Qwen2,
    },
    Family {
        model_type: "smollm3",
        class: "SmolLM3ForCausalLM",
        num_kv_heads: Some(4),
        max_position_embeddings: 32_768,
        rope_theta: 2_000_000.0,
        tied_embeddings: true,
        biases: FamilyBiases::Configured,
        layers: FamilyLayers::SmolLm3,
    },
];

type Outcome<T> = Result<T, ConfigError>;

/// The config and the dtype its weights are said to be stored in.
pub(super) fn decoder_config(value: &Value) -> Outcome<(DecoderConfig, Option<WeightFormat>)> {
    let Some(map) = value.as_object() else {
        return bad("the top level is not a JSON object");
    };
    let keys = Keys { map };
    let family = keys.family()?;
    keys.refuse_what_changes_the_model()?;

    let hidden_size = keys.required_size("hidden_size", Limits::WIDTH)?;
    let num_heads = keys.required_size("num_attention_heads", Limits::HEADS)?;
    let num_layers = keys.required_size("num_hidden_layers", Limits::LAYERS)?;
    let vocab_size = keys.required_size("vocab_size", Limits::VOCAB)?;
    let num_kv_heads = match keys.size("num_key_value_heads", Limits::HEADS)? {
        Some(count) => count,
        None if keys.is_null("num_key_value_heads") => num_heads,
        None => family.num_kv_heads.unwrap_or(num_heads),
    };
    let head_dim = match keys.size("head_dim", Limits::HEAD_DIM)? {
        Some(width) => width,
        None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            return bad(format!(
                "hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, and head_dim is absent"
            ));
        }
    };
    let max_position_embeddings =
        keys.size("max_position_embeddings", Limits::POSITIONS)?.unwrap_or(family.max_position_embeddings);
    let config = DecoderConfig {
        architecture: family.model_type.to_owned(),
        vocab_size,
        hidden_size,
        num_heads,
        num_kv_heads,
        head_dim,
        max_position_embeddings,
        norm: Norm {
            kind: NormKind::Rms,
            eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            weight_offset: 0.0,
        },
        block: Block::PreNorm,
        query_key_norm: false,
        rotaries: vec![keys.rotary(family, head_dim)?],
        alibi: None,
        attention_scale: (head_dim as f32).sqrt().recip(),
        attention_soft_cap: None,
        mlp: Mlp {
            intermediate_size: keys.required_size("intermediate_size", Limits::WIDTH)?,
            activation: keys.activation()?,
            gated: true,
        },
        experts: None,
        biases: keys.biases(family)?,
        layers: keys.layers(family, num_layers)?,
        embedding_scale: 1.0,
        tied_embeddings: keys.truth("tie_word_embeddings")?.unwrap_or(family.tied_embeddings),
        head_bias: false,
        logit_scale: 1.0,
        logit_soft_cap: None,
        bos_token_id: known_tokens("bos_token_id", keys.token_ids("bos_token_id")?, vocab_size).first().copied(),
        eos_token_ids: known_tokens("eos_token_id", keys.token_ids("eos_token_id")?, vocab_size),
    };
    config.check()?;
    Ok((config, keys.stored_dtype()))
}

/// Typed access to the top level, or to an object in it. An absent key and null are the same unless asked.
#[derive(Clone, Copy)]
struct Keys<'a> {
    map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    fn get(self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn is_null(self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    fn size(self, key: &str, limit: usize) -> Outcome<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(count) => check_size(key, count, limit).map(Some),
            None => bad(format!("{key} is {}; a whole number from 1 to {limit} is expected", short(value))),
        }
    }

    fn required_size(self, key: &str, limit: usize) -> Outcome<usize> {
        self.size(key, limit)?.ok_or_else(|| ConfigError::Bad(format!("{key} is missing")))
    }

    fn number(self, key: &str) -> Outcome<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => bad(format!("{key} is {}; a number is expected", short(value))),
        }
    }

    fn required_number(self, key: &str) -> Outcome<f64> {
        self.number(key)?.ok_or_else(|| ConfigError::Bad(format!("{key} is missing in the rotary scaling")))
    }

    fn truth(self, key: &str) -> Outcome<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_bool() {
            Some(truth) => Ok(Some(truth)),
            None => bad(format!("{key} is {}; true or false is expected", short(value))),
        }
    }

    fn text(self, key: &str) -> Outcome<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_str() {
            Some(text) => Ok(Some(text)),
            None => bad(format!("{key} is {}; a text is expected", short(value))),
        }
    }

    fn array(self, key: &str) -> Outcome<Option<&'a [Value]>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_array() {
            Some(values) => Ok(Some(values)),
            None => bad(format!("{key} is {}; an array is expected", short(value))),
        }
    }

    fn object(self, key: &str) -> Outcome<Option<Keys<'a>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_object() {
            Some(map) => Ok(Some(Keys { map })),
            None => bad(format!("{key} is {}; an object is expected", short(value))),
        }
    }

    /// An id or a list of ids.
    fn token_ids(self, key: &str) -> Outcome<Vec<u64>> {
        let values = match self.get(key) {
            None => &[],
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        values
            .iter()
            .map(|value| match value.as_u64() {
                Some(id) => Ok(id),
                None => bad(format!("{key} is {}; a token id or a list of them is expected", short(value))),
            })
            .collect()
    }

    fn family(self) -> Outcome<&'static Family> {
        if let Some(name) = self.text("model_type")? {
            return match FAMILIES.iter().find(|family| family.model_type == name) {
                Some(family) => Ok(family),
                None => unknown_architecture(name),
            };
        }
        let class = self.array("architectures")?.and_then(|classes| classes.first()).and_then(Value::as_str);
        match class.map(|class| (class, FAMILIES.iter().find(|family| family.class == class))) {
            Some((_, Some(family))) => Ok(family),
            Some((class, None)) => unknown_architecture(class),
            None => bad("neither model_type nor architectures says which architecture this is"),
        }
    }

    /// Keys that no family here honours, with the value that means "not used".
    fn refuse_what_changes_the_model(self) -> Outcome<()> {
        if let Some(quantization) = self.object("quantization_config")? {
            let method = quantization.text("quant_method")?.unwrap_or("of an unnamed method");
            return unsupported(format!(
                "the weights are quantised ({method}), which is not supported yet; from safetensors f32, f16 and bf16 \
                 are read (--quantize int8 or int4 quantises them at load), from GGUF the formats in the README"
            ));
        }
        for key in ["mlp_bias", "use_mrope"] {
            if self.truth(key)? == Some(true) {
                return unsupported(format!("{key} is true, which is not supported yet"));
            }
        }
        self.refuse_partial_rotary()
    }

    fn refuse_partial_rotary(self) -> Outcome<()> {
        match self.number("partial_rotary_factor")? {
            None | Some(1.0) => Ok(()),
            Some(factor) => unsupported(format!("partial_rotary_factor is {factor}, which is not supported yet")),
        }
    }

    fn activation(self) -> Outcome<Activation> {
        match self.text("hidden_act")?.unwrap_or("silu") {
            "silu" | "swish" => Ok(Activation::Silu),
            other => unsupported(format!("the activation {other:?} is not supported yet; silu is")),
        }
    }

    fn biases(self, family: &Family) -> Outcome<Biases> {
        Ok(match family.biases {
            FamilyBiases::None => Biases::default(),
            FamilyBiases::Qkv => Biases { qkv: true, ..Biases::default() },
            FamilyBiases::Configured => {
                let all = self.truth("attention_bias")?.unwrap_or(false);
                Biases { qkv: all, output: all, ..Biases::default() }
            }
        })
    }

    fn layers(self, family: &Family, num_layers: usize) -> Outcome<Vec<LayerConfig>> {
        let plain = LayerConfig { window: None, rotary: Some(0), feed_forward: FeedForward::Dense };
        match family.layers {
            FamilyLayers::Plain => Ok(vec![plain; num_layers]),
            FamilyLayers::Mistral => {
                let default = if self.is_null("sliding_window") { None } else { Some(4096) };
                let window = self.size("sliding_window", Limits::POSITIONS)?.or(default);
                Ok(vec![LayerConfig { window, rotary: Some(0), feed_forward: FeedForward::Dense }; num_layers])
            }
            FamilyLayers::Qwen2 => {
                let window = self.optional_window(Some(4096))?;
                // Zero is a fair value here: every layer has the window.
                let first = match self.get("max_window_layers") {
                    None => 28,
                    Some(value) => match value.as_u64() {
                        Some(first) => usize::try_from(first).unwrap_or(usize::MAX),
                        None => {
                            return bad(format!("max_window_layers is {}; a whole number is expected", short(value)));
                        }
                    },
                };
                let sliding = match self.layer_types(num_layers)? {
                    Some(sliding) => sliding,
                    None => (0..num_layers).map(|layer| window.is_some() && layer >= first).collect(),
                };
                sliding
                    .into_iter()
                    .map(|sliding| {
                        Ok(LayerConfig {
                            window: window_where(sliding, window)?,
                            rotary: Some(0),
                            feed_forward: FeedForward::Dense,
                        })
                    })
                    .collect()
            }
            FamilyLayers::SmolLm3 => self.smollm3_layers(num_layers),
        }
    }

    fn smollm3_layers(self, num_layers: usize) -> Outcome<Vec<LayerConfig>> {
        let window = self.optional_window(None)?;
        let interval = self.size("no_rope_layer_interval", Limits::LAYERS)?.unwrap_or(4);
        let rotary: Vec<bool> = match self.array("no_rope_layers")? {
            None => (0..num_layers).map(|layer| !(layer + 1).is_multiple_of(interval)).collect(),
            Some(flags) if flags.len() < num_layers => {
                return bad(format!("no_rope_layers has {} entries for {num_layers} layers", flags.len()));
            }
            Some(flags) => flags[..num_layers]
                .iter()
                .map(|flag| match flag {
                    Value::Bool(flag) => Ok(*flag),
                    Value::Number(flag) if flag.as_u64() == Some(0) => Ok(false),
                    Value::Number(flag) if flag.as_u64() == Some(1) => Ok(true),
                    other => bad(format!("no_rope_layers holds {}; 0 and 1 are expected", short(other))),
                })
                .collect::<Outcome<_>>()?,
        };
        let sliding = match self.layer_types(num_layers)? {
            // transformers looks at layer_types only where use_sliding_window is set.
            Some(sliding) if window.is_some() => sliding,
            Some(_) => vec![false; num_layers],
            None => rotary.iter().map(|&rotary| window.is_some() && !rotary).collect(),
        };
        rotary
            .into_iter()
            .zip(sliding)
            .map(|(rotary, sliding)| {
                Ok(LayerConfig {
                    window: window_where(sliding, window)?,
                    rotary: rotary.then_some(0),
                    feed_forward: FeedForward::Dense,
                })
            })
            .collect()
    }

    /// `sliding_window` where `use_sliding_window` is set.
    fn optional_window(self, default: Option<usize>) -> Outcome<Option<usize>> {
        let default = if self.is_null("sliding_window") { None } else { default };
        let window = self.size("sliding_window", Limits::POSITIONS);
        if self.truth("use_sliding_window")?.unwrap_or(false) { Ok(window?.or(default)) } else { Ok(None) }
    }

    /// True where a layer has the window.
    fn layer_types(self, num_layers: usize) -> Outcome<Option<Vec<bool>>> {
        let Some(types) = self.array("layer_types")? else { return Ok(None) };
        if types.len() < num_layers {
            return bad(format!("layer_types has {} entries for {num_layers} layers", types.len()));
        }
        types[..num_layers]
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(false),
                Some("sliding_attention") => Ok(true),
                _ => unsupported(format!(
                    "layer_types holds {}; full_attention and sliding_attention are supported",
                    short(kind)
                )),
            })
            .collect::<Outcome<Vec<_>>>()
            .map(Some)
    }

    fn rotary(self, family: &Family, head_dim: usize) -> Outcome<Rotary> {
        let parameters = self.object("rope_parameters")?;
        // Where both are there, transformers takes rope_scaling.
        let scaling = self.object("rope_scaling")?.or(parameters);
        let base = [scaling, parameters, Some(self)]
            .into_iter()
            .flatten()
            .find_map(|keys| keys.number("rope_theta").transpose())
            .transpose()?
            .unwrap_or(family.rope_theta);
        let scaling = match scaling {
            None => RopeScaling::None,
            Some(keys) => keys.rope_scaling()?,
        };
        Ok(Rotary { style: RopeStyle::Neox, dim: head_dim, base: base as f32, scaling })
    }

    /// `self` is `rope_scaling` or `rope_parameters`.
    fn rope_scaling(self) -> Outcome<RopeScaling> {
        if let Some((kind, _)) = self.map.iter().find(|(_, value)| value.is_object()) {
            return unsupported(format!("rotary parameters by layer type ({kind}) are not supported yet"));
        }
        self.refuse_partial_rotary()?;
        let kind = match self.text("rope_type")? {
            Some(kind) => kind,
            None => self.text("type")?.unwrap_or("default"),
        };
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: self.required_number("factor")? as f32 }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: self.required_number("factor")? as f32,
                low_freq_factor: self.required_number("low_freq_factor")? as f32,
                high_freq_factor: self.required_number("high_freq_factor")? as f32,
                original_max_position_embeddings: self
                    .required_size("original_max_position_embeddings", Limits::POSITIONS)?,
            }),
            other => unsupported(format!(
                "the rotary scaling {other:?} is not supported yet; default, linear and llama3 are"
            )),
        }
    }

    fn stored_dtype(self) -> Option<WeightFormat> {
        // Only a hint for made-up weights: whatever else stands there is no error.
        let name = self.get("dtype").or_else(|| self.get("torch_dtype"))?.as_str()?;
        match name.strip_prefix("torch.").unwrap_or(name) {
            "float32" => Some(WeightFormat::F32),
            "float16" => Some(WeightFormat::F16),
            "bfloat16" => Some(WeightFormat::Bf16),
            _ => None,
        }
    }
}

fn window_where(sliding: bool, window: Option<usize>) -> Outcome<Option<usize>> {
    match (sliding, window) {
        (false, _) => Ok(None),
        (true, Some(window)) => Ok(Some(window)),
        (true, None) => {
            bad("layer_types asks for a sliding window, but sliding_window or use_sliding_window is not set")
        }
    }
}

fn unknown_architecture<T>(name: &str) -> Outcome<T> {
    unsupported(format!("the architecture {name:?} is not supported yet; {}", known_architectures()))
}

/// What runs, for the error about what does not.
pub(super) fn known_architectures() -> String {
    let known: Vec<_> = FAMILIES.iter().map(|family| family.model_type).collect();
    format!("known in config.json: {}; in GGUF files: {}", known.join(", "), super::gguf::ARCHITECTURE)
}

/// A value as it fits a message.
fn short(value: &Value) -> String {
    const MAX_CHARS: usize = 60;
    match value {
        Value::Array(values) => format!("an array of {}", values.len()),
        Value::Object(map) => format!("an object of {} keys", map.len()),
        other => {
            let text = other.to_string();
            match text.char_indices().nth(MAX_CHARS) {
                Some((end, _)) => format!("{}…", &text[..end]),
                None => text,
            }
        }
    }
}
