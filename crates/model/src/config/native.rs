//! A `config.json` of our own: the [`DecoderConfig`] itself, for what `bindery quantize` makes of a GGUF file.
//!
//! A GGUF file's metadata need not have a counterpart among transformers' keys (rotary factors of its own, norms whose offset
//! is added already), so the decoder's description is written down as it is, under `decoder`, beside `model_type:
//! "bindery"`. It must not touch files. Its invariant: what is read back has passed the checks of every other config, and
//! what lists refer to is there.

use bindery_kernels::{Activation, RopeStyle};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{CheckpointConfig, ConfigError, DecoderConfig, FeedForward, bad, json::stored_quantization, unsupported};

/// What `model_type` says.
const MODEL_TYPE: &str = "bindery";
/// Goes up when an older reader would misunderstand.
const VERSION: u64 = 1;

#[derive(Serialize, Deserialize)]
#[serde(remote = "Activation", rename_all = "snake_case")]
pub(super) enum ActivationName {
    Silu,
    Gelu,
    GeluTanh,
    Gegelu { limit: f32 },
}

/// A pattern of blocks, or none.
pub(super) mod sparse_blocks {
    use bindery_kernels::SparseBlocks;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Pattern {
        block_size: usize,
        num_local_blocks: usize,
        vertical_stride: usize,
        head_step: usize,
    }

    #[expect(clippy::ref_option, reason = "the shape that serde calls")]
    pub(in super::super) fn serialize<S: Serializer>(blocks: &Option<SparseBlocks>, to: S) -> Result<S::Ok, S::Error> {
        let pattern = blocks.map(|SparseBlocks { block_size, num_local_blocks, vertical_stride, head_step }| Pattern {
            block_size,
            num_local_blocks,
            vertical_stride,
            head_step,
        });
        pattern.serialize(to)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SparseBlocks>, D::Error> {
        let pattern = Option::<Pattern>::deserialize(from)?;
        Ok(pattern.map(|Pattern { block_size, num_local_blocks, vertical_stride, head_step }| SparseBlocks {
            block_size,
            num_local_blocks,
            vertical_stride,
            head_step,
        }))
    }
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "RopeStyle", rename_all = "snake_case")]
pub(super) enum RopeStyleName {
    Neox,
    Interleaved,
}

/// The whole `config.json`, but for what a writer adds.
pub(crate) fn of_decoder(config: &DecoderConfig) -> Result<Value, String> {
    let decoder = serde_json::to_value(config).map_err(|error| error.to_string())?;
    Ok(json!({"model_type": MODEL_TYPE, "version": VERSION, "decoder": decoder}))
}

pub(super) fn is_native(value: &Value) -> bool {
    value["model_type"] == MODEL_TYPE
}

pub(super) fn decoder_config(value: &Value) -> Result<CheckpointConfig, ConfigError> {
    match value["version"].as_u64() {
        Some(VERSION) => {}
        version => return unsupported(format!("version is {version:?}; this version of Bindery reads {VERSION}")),
    }
    let decoder = DecoderConfig::deserialize(&value["decoder"])
        .map_err(|error| ConfigError::Bad(format!("decoder: {error}; `bindery quantize` makes the file anew")))?;
    // Divisions and look-ups of the checks themselves rely on these.
    if decoder.num_kv_heads == 0 || decoder.rotaries.len() > decoder.num_layers().max(1) {
        return bad("decoder: num_kv_heads is 0, or there are more rotaries than layers");
    }
    decoder.check()?;
    check_references(&decoder)?;
    Ok(CheckpointConfig { decoder, dtype: None, quantization: stored_quantization(value)? })
}

/// What other configs have by how they are made.
fn check_references(config: &DecoderConfig) -> Result<(), ConfigError> {
    let num_rotaries = config.rotaries.len();
    if let Some(index) = config.layers.iter().filter_map(|layer| layer.rotary).find(|&index| index >= num_rotaries) {
        return bad(format!("decoder: a layer rotates by embedding {index}, there are {num_rotaries}"));
    }
    let first = config.rotaries.first();
    if config
        .rotaries
        .iter()
        .any(|rotary| Some((rotary.style, rotary.dim)) != first.map(|first| (first.style, first.dim)))
    {
        return bad("decoder: rotaries differ in style or dim");
    }
    if config.experts.is_none() && config.layers.iter().any(|layer| layer.feed_forward == FeedForward::Experts) {
        return bad("decoder: a layer has experts, and experts is null");
    }
    if let Some(alibi) = &config.alibi
        && (alibi.slopes.len() != config.num_heads || alibi.slopes.iter().any(|slope| !slope.is_finite()))
    {
        return bad(format!("decoder: {} finite slopes are expected, one a head", config.num_heads));
    }
    let numbers = [config.norm.weight_offset, config.logit_scale];
    if let Some(number) = numbers.iter().find(|number| !number.is_finite()) {
        return bad(format!("decoder: {number} is no finite number"));
    }
    let tokens = config.eos_token_ids.iter().chain(&config.bos_token_id);
    match tokens.into_iter().find(|&&token| token as usize >= config.vocab_size) {
        Some(token) => bad(format!("decoder: token {token} is outside the vocabulary of {}", config.vocab_size)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests; clippy only knows a plain cfg(test)")]
    use super::*;
    use crate::config::{Alibi, RopeScaling};

    fn configs() -> Vec<DecoderConfig> {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/checkpoints");
        let read = |entry: std::io::Result<std::fs::DirEntry>| {
            let path = entry.unwrap().path().join("config.json");
            path.exists().then(|| DecoderConfig::from_json_file(&path).unwrap())
        };
        std::fs::read_dir(folder).unwrap().filter_map(read).collect()
    }

    #[test]
    fn every_familys_config_comes_back_as_it_was() {
        let mut configs = configs();
        assert!(configs.len() > 15, "{}", configs.len());
        let factors = RopeScaling::Factors((0..configs[0].rotaries[0].dim / 2).map(|i| 1.0 + i as f32 / 3.0).collect());
        let mut with_factors = configs[0].clone();
        with_factors.rotaries[0].scaling = factors;
        with_factors.rotaries[0].style = RopeStyle::Interleaved;
        configs.push(with_factors);
        for config in configs {
            // As text, since that is what is written.
            let text = of_decoder(&config).unwrap().to_string();
            let read = decoder_config(&serde_json::from_str(&text).unwrap()).unwrap();
            assert_eq!(read.decoder, config);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let config = configs().into_iter().find(|config| !config.rotaries.is_empty()).unwrap();
        let refused = |change: &dyn Fn(&mut Value)| {
            let mut value = of_decoder(&config).unwrap();
            change(&mut value);
            match decoder_config(&value).map(|read| read.decoder) {
                Err(ConfigError::Bad(what) | ConfigError::Unsupported(what)) => what,
                Ok(config) => panic!("{config:?}"),
            }
        };
        assert!(refused(&|value| value["version"] = 2.into()).contains("reads 1"));
        assert!(refused(&|value| value["decoder"] = Value::Null).contains("decoder"));
        assert!(refused(&|value| value["decoder"]["num_kv_heads"] = 0.into()).contains("num_kv_heads"));
        assert!(refused(&|value| value["decoder"]["vocab_size"] = 0.into()).contains("vocabulary"));
        assert!(refused(&|value| value["decoder"]["novelty"] = 1.into()).contains("novelty"));
        assert!(refused(&|value| value["decoder"]["layers"][0]["rotary"] = 9.into()).contains("embedding 9"));
        assert!(refused(&|value| value["decoder"]["layers"][0]["feed_forward"] = "experts".into()).contains("experts"));
        assert!(refused(&|value| value["decoder"]["eos_token_ids"] = json!([1 << 30])).contains("outside"));
        let slopes = serde_json::to_value(Alibi { slopes: vec![0.5] }).unwrap();
        assert!(refused(&|value| value["decoder"]["alibi"] = slopes.clone()).contains("slopes"));
    }
}
