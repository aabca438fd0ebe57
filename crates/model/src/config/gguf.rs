//! GGUF metadata to [`DecoderConfig`], for the `llama` architecture (LLaMA, Mistral, SmolLM and others under that name).
//!
//! It must not know how tensors are stored, only which are there and their sizes. Its invariant: a key that changes what
//! the model computes is either honoured or refused by name. llama.cpp's converter permutes the rows of q and k, so the
//! rotary pairs are neighbours here, not halves apart.

use super::{
    Activation, Biases, Block, ConfigError, DecoderConfig, FeedForward, LayerConfig, Limits, Mlp, Norm, NormKind,
    RopeScaling, RopeStyle, Rotary, bad, check_size, json::known_architectures, known_tokens, unsupported,
};
use crate::weights::gguf::{GgufFile, MetadataValue};

/// The one architecture of GGUF files that is read.
pub(super) const ARCHITECTURE: &str = "llama";

/// `rope_freqs.weight` is read as f32 only, which is how it is always written.
const F32_TYPE_ID: u32 = 0;
/// Written where a model has no such token.
const NO_TOKEN: u64 = u32::MAX as u64;

type Outcome<T> = Result<T, ConfigError>;

pub(super) fn decoder_config(file: &GgufFile) -> Outcome<DecoderConfig> {
    let keys = Keys { file };
    match keys.text("general.architecture")? {
        Some(ARCHITECTURE) => {}
        Some(other) => {
            return unsupported(format!("the architecture {other:?} is not supported yet; {}", known_architectures()));
        }
        None => return bad("general.architecture is missing, so nothing says what this model is"),
    }
    keys.refuse_what_changes_the_model()?;

    let hidden_size = keys.required_size("llama.embedding_length", Limits::WIDTH)?;
    let num_heads = keys.required_size("llama.attention.head_count", Limits::HEADS)?;
    let num_kv_heads = keys.size("llama.attention.head_count_kv", Limits::HEADS)?.unwrap_or(num_heads);
    let num_layers = keys.required_size("llama.block_count", Limits::LAYERS)?;
    let head_dim = keys.head_dim(hidden_size, num_heads)?;
    let vocab_size = keys.vocab_size()?;
    let window = keys.size("llama.attention.sliding_window", Limits::POSITIONS)?;
    let eos_token_ids = keys.eos_token_ids(vocab_size)?;
    let config = DecoderConfig {
        architecture: ARCHITECTURE.to_owned(),
        vocab_size,
        hidden_size,
        num_heads,
        num_kv_heads,
        head_dim,
        max_position_embeddings: keys.required_size("llama.context_length", Limits::POSITIONS)?,
        norm: Norm {
            kind: NormKind::Rms,
            eps: keys.required_number("llama.attention.layer_norm_rms_epsilon")? as f32,
            weight_offset: 0.0,
        },
        block: Block::PreNorm,
        query_key_norm: false,
        rotaries: vec![keys.rotary(head_dim)?],
        alibi: None,
        attention_scale: (head_dim as f32).sqrt().recip(),
        attention_soft_cap: None,
        mlp: Mlp {
            intermediate_size: keys.required_size("llama.feed_forward_length", Limits::WIDTH)?,
            activation: Activation::Silu,
            gated: true,
        },
        experts: None,
        // No key says it; llama.cpp, too, looks for the tensors.
        biases: Biases {
            qkv: file.tensor("blk.0.attn_q.bias").is_some(),
            output: file.tensor("blk.0.attn_output.bias").is_some(),
            ..Biases::default()
        },
        layers: vec![LayerConfig { window, rotary: Some(0), feed_forward: FeedForward::Dense }; num_layers],
        embedding_scale: 1.0,
        tied_embeddings: file.tensor("output.weight").is_none(),
        head_bias: false,
        logit_scale: 1.0,
        logit_soft_cap: None,
        bos_token_id: keys.token_id("tokenizer.ggml.bos_token_id", vocab_size)?,
        eos_token_ids,
    };
    config.check()?;
    Ok(config)
}

/// Typed access: absent is None, another kind of value is an error.
struct Keys<'a> {
    file: &'a GgufFile,
}

impl<'a> Keys<'a> {
    fn whole(&self, key: &str) -> Outcome<Option<u64>> {
        let Some(value) = self.file.get(key) else { return Ok(None) };
        // Some sizes may be given per layer; where all are alike they are one number.
        if let MetadataValue::Ints(values) = value
            && let Some((&first, rest)) = values.split_first()
        {
            if rest.iter().any(|&other| other != first) {
                return unsupported(format!("{key} differs between layers, which is not supported yet"));
            }
            return match u64::try_from(first) {
                Ok(value) => Ok(Some(value)),
                Err(_) => bad(format!("{key} is {first}; a positive whole number is expected")),
            };
        }
        match self.file.u64(key) {
            Some(value) => Ok(Some(value)),
            None => bad(format!("{key} is {}; a positive whole number is expected", value.kind())),
        }
    }

    fn size(&self, key: &str, limit: usize) -> Outcome<Option<usize>> {
        self.whole(key)?.map(|value| check_size(key, value, limit)).transpose()
    }

    fn required_size(&self, key: &str, limit: usize) -> Outcome<usize> {
        self.size(key, limit)?.ok_or_else(|| ConfigError::Bad(format!("{key} is missing")))
    }

    fn number(&self, key: &str) -> Outcome<Option<f64>> {
        let Some(value) = self.file.get(key) else { return Ok(None) };
        match self.file.f64(key) {
            Some(number) => Ok(Some(number)),
            None => bad(format!("{key} is {}; a number is expected", value.kind())),
        }
    }

    fn required_number(&self, key: &str) -> Outcome<f64> {
        self.number(key)?.ok_or_else(|| ConfigError::Bad(format!("{key} is missing")))
    }

    fn text(&self, key: &str) -> Outcome<Option<&'a str>> {
        let Some(value) = self.file.get(key) else { return Ok(None) };
        match self.file.str(key) {
            Some(text) => Ok(Some(text)),
            None => bad(format!("{key} is {}; a text is expected", value.kind())),
        }
    }

    fn refuse_what_changes_the_model(&self) -> Outcome<()> {
        if let Some(count @ 1..) = self.whole("llama.expert_count")? {
            return unsupported(format!("this is a mixture of {count} experts, which is not supported yet"));
        }
        if self.file.bool("llama.attention.causal") == Some(false) {
            return unsupported("attention in both directions (llama.attention.causal is false) is not supported");
        }
        Ok(())
    }

    fn head_dim(&self, hidden_size: usize, num_heads: usize) -> Outcome<usize> {
        let key_length = self.size("llama.attention.key_length", Limits::HEAD_DIM)?;
        let value_length = self.size("llama.attention.value_length", Limits::HEAD_DIM)?;
        if let Some(value_length) = value_length
            && value_length != key_length.unwrap_or(hidden_size / num_heads)
        {
            return unsupported(format!(
                "values are {value_length} wide and keys {}; different widths are not supported",
                key_length.unwrap_or(hidden_size / num_heads)
            ));
        }
        match key_length {
            Some(width) => Ok(width),
            None if hidden_size.is_multiple_of(num_heads) => Ok(hidden_size / num_heads),
            None => bad(format!(
                "llama.embedding_length {hidden_size} is not a multiple of llama.attention.head_count {num_heads}"
            )),
        }
    }

    /// The embedding decides; llama.vocab_size is absent from older files and wrong in some.
    fn vocab_size(&self) -> Outcome<usize> {
        let Some(embedding) = self.file.tensor("token_embd.weight") else {
            return bad("tensor \"token_embd.weight\" is missing");
        };
        let vocab_size =
            check_size("the vocabulary (rows of token_embd.weight)", embedding.dimensions[1], Limits::VOCAB)?;
        match self.file.strings("tokenizer.ggml.tokens") {
            Some(tokens) if tokens.len() > vocab_size => bad(format!(
                "tokenizer.ggml.tokens has {} entries, but token_embd.weight only {vocab_size} rows",
                tokens.len()
            )),
            _ => Ok(vocab_size),
        }
    }

    fn token_id(&self, key: &'static str, vocab_size: usize) -> Outcome<Option<u32>> {
        let id = self.whole(key)?.filter(|&id| id != NO_TOKEN);
        Ok(known_tokens(key, id.into_iter().collect(), vocab_size).first().copied())
    }

    /// End of text, of turn and of message all end an answer.
    fn eos_token_ids(&self, vocab_size: usize) -> Outcome<Vec<u32>> {
        let mut ids = Vec::new();
        for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
            if let Some(id) = self.token_id(key, vocab_size)?
                && !ids.contains(&id)
            {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    fn rotary(&self, head_dim: usize) -> Outcome<Rotary> {
        let dim = self.size("llama.rope.dimension_count", Limits::HEAD_DIM)?.unwrap_or(head_dim);
        let base = self.number("llama.rope.freq_base")?.unwrap_or(10_000.0) as f32;
        let linear = self.linear_factor()?;
        let scaling = match (self.rope_factors(dim)?, linear) {
            (None, None) => RopeScaling::None,
            (None, Some(factor)) => RopeScaling::Linear { factor },
            // Both stretch: the divisors multiply.
            (Some(mut factors), linear) => {
                for factor in &mut factors {
                    *factor *= linear.unwrap_or(1.0);
                }
                RopeScaling::Factors(factors)
            }
        };
        Ok(Rotary { style: RopeStyle::Interleaved, dim, base, scaling })
    }

    fn linear_factor(&self) -> Outcome<Option<f32>> {
        let factor = match self.text("llama.rope.scaling.type")? {
            Some("none") => None,
            Some("linear") => Some(self.required_number("llama.rope.scaling.factor")?),
            Some(other) => {
                return unsupported(format!(
                    "the rotary scaling {other:?} is not supported yet; none, linear and rope_freqs.weight are"
                ));
            }
            // llama.cpp takes a factor without a type as linear, and so did files before the type existed.
            None => match self.number("llama.rope.scaling.factor")? {
                Some(factor) => Some(factor),
                None => self.number("llama.rope.scale_linear")?,
            },
        };
        // Zero means "not set" in llama.cpp.
        Ok(factor.map(|factor| factor as f32).filter(|&factor| factor != 0.0 && factor != 1.0))
    }

    fn rope_factors(&self, dim: usize) -> Outcome<Option<Vec<f32>>> {
        for name in ["rope_factors_long.weight", "rope_factors_short.weight"] {
            if self.file.tensor(name).is_some() {
                return unsupported(format!("longrope ({name}) is not supported yet"));
            }
        }
        let Some(tensor) = self.file.tensor("rope_freqs.weight") else { return Ok(None) };
        if tensor.type_id != F32_TYPE_ID || tensor.dimensions != [dim as u64 / 2, 1, 1, 1] {
            return bad(format!(
                "tensor \"rope_freqs.weight\" has sizes {:?} and type id {}; {} f32 are expected",
                tensor.dimensions,
                tensor.type_id,
                dim / 2
            ));
        }
        let bytes = &self.file.map().bytes()[tensor.range.clone()];
        let (values, _) = bytes.as_chunks::<4>();
        Ok(Some(values.iter().map(|&value| f32::from_le_bytes(value)).collect()))
    }
}
