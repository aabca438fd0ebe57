//! `quantization_config`: which published layout a checkpoint's integer weights are in.
//!
//! It must not know tensors: which modules are quantised shows in their names, so lists of modules to leave alone need no
//! reading. Its invariant: a layout that [`StoredQuantization`] cannot say is refused by name, with what is read.

use super::keys::{Keys, Outcome};
use crate::config::{bad, unsupported};

/// What is read, for every refusal.
const SUPPORTED: &str = "read are gptq (2, 3, 4, 8 bits; checkpoint_format gptq or gptq_v2), awq (4 bits, version gemm), \
                         auto-round in either layout, compressed-tensors (pack-quantized int4 and int8, int-quantized \
                         int8) and what `bindery quantize` makes; from GGUF the formats in the README; --quantize int8 \
                         or int4 quantises f32, f16 and bf16 at load";

/// How a checkpoint keeps the weights that it quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StoredQuantization {
    /// AutoGPTQ's and GPTQModel's.
    Gptq {
        /// Of a code.
        bits: usize,
        /// Inputs that share a scale; none for all of a row.
        group_size: Option<usize>,
        /// How zero points are stored.
        zeros: GptqZeros,
        /// The order of inputs is in `g_idx`, which must be there.
        act_order: bool,
    },
    /// AutoAWQ's, version GEMM, of four bits.
    Awq {
        /// Inputs that share a scale; none for all of a row.
        group_size: Option<usize>,
    },
    /// compressed-tensors'; each tensor's shapes say the rest.
    CompressedTensors,
    /// Our own, made by `bindery quantize`; each tensor's shapes say the rest.
    Bindery,
}

/// Of our own layout; goes up when an older reader would misunderstand.
const BINDERY_VERSION: usize = 1;

/// How GPTQ's zero points are stored: in version 1 of the layout less one, which the packers do not all take off alike
/// where codes straddle words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GptqZeros {
    /// Version 2.
    AsStored,
    /// AutoGPTQ's version 1.
    LessOne,
    /// GPTQModel's, whose 3-bit constants are others.
    LessGptqModels,
}

pub(super) fn stored(keys: Keys<'_>) -> Outcome<Option<StoredQuantization>> {
    let newer = keys.object("quantization_config")?;
    let Some(keys) = newer.map_or_else(|| keys.object("compression_config"), |keys| Ok(Some(keys)))? else {
        return Ok(None);
    };
    match keys.text("quant_method")?.unwrap_or("of an unnamed method") {
        "gptq" => gptq(keys),
        "awq" => awq(keys),
        "auto-round" | "intel/auto-round" => auto_round(keys),
        "compressed-tensors" => compressed_tensors(keys),
        "bindery" => match keys.required_size("version", usize::MAX)? {
            BINDERY_VERSION => Ok(StoredQuantization::Bindery),
            other => refuse(&format!("version {other} of our own layout")),
        },
        other => refuse(&format!("the method {other}")),
    }
    .map(Some)
}

fn refuse<T>(what: &str) -> Outcome<T> {
    unsupported(format!("the weights are quantised: {what} is not supported; {SUPPORTED}"))
}

fn gptq(keys: Keys<'_>) -> Outcome<StoredQuantization> {
    let zeros = match keys.text("checkpoint_format")?.unwrap_or("gptq") {
        "gptq" if is_made_by_gptqmodel(keys)? => GptqZeros::LessGptqModels,
        "gptq" => GptqZeros::LessOne,
        "gptq_v2" => GptqZeros::AsStored,
        other => return refuse(&format!("the gptq checkpoint_format {other:?}")),
    };
    if keys.truth("is_marlin_format")? == Some(true) {
        return refuse("the marlin layout of gptq (is_marlin_format)");
    }
    if let Some(word) = keys.text("pack_dtype")?
        && word != "int32"
    {
        return refuse(&format!("the gptq pack_dtype {word:?}"));
    }
    let bits = gptq_bits(keys)?;
    let act_order = keys.truth("desc_act")?.unwrap_or(false);
    Ok(StoredQuantization::Gptq { bits, group_size: group_size(keys, "group_size")?, zeros, act_order })
}

/// GPTQModel writes its name into `meta.quantizer`, as a text or in a list.
fn is_made_by_gptqmodel(keys: Keys<'_>) -> Outcome<bool> {
    let Some(quantizer) = keys.object("meta")?.and_then(|meta| meta.get("quantizer")) else { return Ok(false) };
    let names = quantizer.as_array().map_or(std::slice::from_ref(quantizer), Vec::as_slice);
    Ok(names.iter().filter_map(|name| name.as_str()).any(|name| name.starts_with("gptqmodel")))
}

fn awq(keys: Keys<'_>) -> Outcome<StoredQuantization> {
    let version = keys.text("version")?.unwrap_or("gemm");
    if !version.eq_ignore_ascii_case("gemm") {
        return refuse(&format!("the awq version {version:?}"));
    }
    if let Some(backend) = keys.text("backend")?
        && backend != "autoawq"
    {
        return refuse(&format!("the awq backend {backend:?}"));
    }
    let bits = if keys.has("bits") { keys.required_size("bits", 8)? } else { keys.required_size("w_bit", 8)? };
    if bits != 4 {
        return refuse(&format!("awq of {bits} bits"));
    }
    let key = if keys.has("group_size") { "group_size" } else { "q_group_size" };
    Ok(StoredQuantization::Awq { group_size: group_size(keys, key)? })
}

/// AutoRound has no layout of its own: it writes GPTQ's, of either version, or AWQ's.
fn auto_round(keys: Keys<'_>) -> Outcome<StoredQuantization> {
    if let Some(kind) = keys.text("data_type")?
        && kind != "int"
    {
        return refuse(&format!("the auto-round data_type {kind:?}"));
    }
    let zeros = match keys.text("packing_format")?.unwrap_or("auto_round:auto_gptq") {
        "auto_round:auto_gptq" => GptqZeros::LessOne,
        "auto_round" | "auto_round:gptqmodel" => GptqZeros::AsStored,
        "auto_round:auto_awq" | "auto_round:awq" => return awq(keys),
        other => return refuse(&format!("the auto-round packing_format {other:?}")),
    };
    let bits = gptq_bits(keys)?;
    Ok(StoredQuantization::Gptq { bits, group_size: group_size(keys, "group_size")?, zeros, act_order: false })
}

fn gptq_bits(keys: Keys<'_>) -> Outcome<usize> {
    let bits = keys.required_size("bits", 8)?;
    if ![2, 3, 4, 8].contains(&bits) {
        return refuse(&format!("gptq of {bits} bits"));
    }
    Ok(bits)
}

fn compressed_tensors(keys: Keys<'_>) -> Outcome<StoredQuantization> {
    let format = keys.text("format")?.unwrap_or("absent");
    // What is mixed says it group by group.
    if format != "mixed-precision" {
        compressed_format(format)?;
    }
    // Frozen is what a model is before it is compressed; some files were written with the word.
    if let Some(status) = keys.text("quantization_status")?
        && !["compressed", "frozen"].contains(&status)
    {
        return refuse(&format!("the compressed-tensors quantization_status {status:?}"));
    }
    for key in ["sparsity_config", "transform_config"] {
        if keys.object(key)?.is_some_and(|inner| !inner.is_empty()) {
            return refuse(&format!("{key} in compressed-tensors"));
        }
    }
    let Some(groups) = keys.object("config_groups")? else {
        return bad("quantization_config: config_groups is missing, which says how weights are quantised");
    };
    for name in groups.names() {
        let Some(group) = groups.object(name)? else { continue };
        let Some(weights) = group.object("weights")? else { continue };
        if let Some(format) = group.text("format")? {
            compressed_format(format)?;
        }
        let bits = weights.required_size("num_bits", 64)?;
        let kind = weights.text("type")?.unwrap_or("int");
        let strategy = weights.text("strategy")?.unwrap_or("tensor");
        if kind != "int" || ![4, 8].contains(&bits) {
            return refuse(&format!("compressed-tensors {kind} of {bits} bits ({name})"));
        }
        if !["tensor", "channel", "group"].contains(&strategy) {
            return refuse(&format!("the compressed-tensors strategy {strategy:?} of weights ({name})"));
        }
    }
    Ok(StoredQuantization::CompressedTensors)
}

fn compressed_format(format: &str) -> Outcome<()> {
    // Which one it is shows in the tensors' names and types.
    match format {
        "pack-quantized" | "int-quantized" | "naive-quantized" => Ok(()),
        other => refuse(&format!("the compressed-tensors format {other:?}")),
    }
}

/// A whole number from 1, or -1 for all of a row.
fn group_size(keys: Keys<'_>, key: &str) -> Outcome<Option<usize>> {
    match keys.number(key)? {
        Some(-1.0) => Ok(None),
        Some(_) => keys.required_size(key, crate::config::Limits::WIDTH).map(Some),
        None => {
            bad(format!("quantization_config: {key} is missing; a whole number from 1, or -1 for rows, is expected"))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use serde_json::{Value, json};

    use super::*;

    fn read(quantization: &Value) -> Result<StoredQuantization, String> {
        let config = json!({"quantization_config": quantization});
        stored(Keys::of(&config).unwrap()).map(Option::unwrap).map_err(|error| format!("{error:?}"))
    }

    /// The shapes that published checkpoints have their keys in.
    #[test]
    fn published_gptq_configs_are_read() {
        let gptq = |bits, group_size, zeros, act_order| StoredQuantization::Gptq { bits, group_size, zeros, act_order };
        // AutoGPTQ's own.
        let trurl_2_7b = json!({
            "bits": 8, "group_size": -1, "damp_percent": 0.1, "desc_act": true, "sym": true, "true_sequential": true,
            "model_name_or_path": null, "model_file_base_name": "model", "quant_method": "gptq",
        });
        assert_eq!(read(&trurl_2_7b), Ok(gptq(8, None, GptqZeros::LessOne, true)));
        let meta_llama_3_70b = json!({
            "bits": 4, "damp_percent": 0.01, "desc_act": true, "group_size": 128, "is_marlin_format": false,
            "model_file_base_name": null, "model_name_or_path": null, "quant_method": "gptq", "static_groups": false,
            "sym": true, "true_sequential": true,
        });
        assert_eq!(read(&meta_llama_3_70b), Ok(gptq(4, Some(128), GptqZeros::LessOne, true)));
        // As transformers writes it, and Qwen publishes it.
        let of_transformers = json!({
            "batch_size": 1, "bits": 4, "block_name_to_quantize": null, "cache_block_outputs": true, "damp_percent": 0.01,
            "dataset": null, "desc_act": false, "exllama_config": {"version": 1}, "group_size": 128,
            "max_input_length": null, "model_seqlen": null, "module_name_preceding_first_block": null,
            "modules_in_block_to_quantize": [["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"]],
            "pad_token_id": null, "quant_method": "gptq", "sym": true, "tokenizer": null, "true_sequential": true,
            "use_cuda_fp16": false, "use_exllama": true,
        });
        assert_eq!(read(&of_transformers), Ok(gptq(4, Some(128), GptqZeros::LessOne, false)));
        // GPTQModel's.
        let smollm_360m_2bit = json!({
            "bits": 2, "group_size": 128, "desc_act": true, "sym": true, "lm_head": false, "quant_method": "gptq",
            "checkpoint_format": "gptq", "pack_dtype": "int32", "meta": {
                "quantizer": ["gptqmodel:4.0.0-dev"], "uri": "https://github.com/modelcloud/gptqmodel",
                "damp_percent": 0.01, "static_groups": false, "true_sequential": true, "mse": 0.0, "v2": false,
            },
        });
        assert_eq!(read(&smollm_360m_2bit), Ok(gptq(2, Some(128), GptqZeros::LessGptqModels, true)));
        let tinyllama_dynamic = json!({
            "bits": 4, "dynamic": {
                "-:model\\.layers\\.([2-9]\\d*)\\..*": {}, ".*\\.1\\..*": {"bits": 8, "group_size": 32, "desc_act": false},
            },
            "group_size": 128, "desc_act": true, "sym": true, "lm_head": false, "quant_method": "gptq",
            "checkpoint_format": "gptq_v2", "meta": {"quantizer": "gptqmodel:1.5.1-dev"},
        });
        assert_eq!(read(&tinyllama_dynamic), Ok(gptq(4, Some(128), GptqZeros::AsStored, true)));
    }

    #[test]
    fn auto_rounds_configs_name_the_layout_of_others() {
        let config = |format: &str, kind: &str| {
            json!({
                "quant_method": "auto-round", "packing_format": format, "bits": 4, "group_size": 128, "sym": true,
                "data_type": kind, "iters": 200, "autoround_version": "0.14.2", "block_name_to_quantize": null,
                "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}},
            })
        };
        let gptq = |zeros| StoredQuantization::Gptq { bits: 4, group_size: Some(128), zeros, act_order: false };
        assert_eq!(read(&config("auto_round:auto_gptq", "int")), Ok(gptq(GptqZeros::LessOne)));
        assert_eq!(read(&config("auto_round", "int")), Ok(gptq(GptqZeros::AsStored)));
        let awq = StoredQuantization::Awq { group_size: Some(128) };
        assert_eq!(read(&config("auto_round:auto_awq", "int")), Ok(awq));
        for (config, word) in
            [(config("auto_round:llm_compressor", "int"), "llm_compressor"), (config("auto_round", "nv_fp"), "nv_fp")]
        {
            let error = read(&config).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn published_awq_configs_are_read() {
        let short = json!({
            "bits": 4, "group_size": 128, "modules_to_not_convert": null, "quant_method": "awq", "version": "gemm",
            "zero_point": true,
        });
        let of_transformers = json!({
            "backend": "autoawq", "bits": 4, "do_fuse": false, "exllama_config": null, "fuse_max_seq_len": null,
            "group_size": 128, "modules_to_fuse": null, "modules_to_not_convert": null, "quant_method": "awq",
            "version": "gemm", "zero_point": true,
        });
        let older =
            json!({"quant_method": "awq", "zero_point": true, "q_group_size": 128, "w_bit": 4, "version": "GEMM"});
        for config in [short, of_transformers, older] {
            assert_eq!(read(&config), Ok(StoredQuantization::Awq { group_size: Some(128) }));
        }
    }

    #[test]
    fn published_compressed_tensors_configs_are_read() {
        let weights = |bits: u32, strategy: &str, actorder: Value| {
            json!({
                "actorder": actorder, "block_structure": null, "dynamic": false,
                "group_size": if strategy == "group" { json!(128) } else { Value::Null }, "num_bits": bits,
                "observer": "minmax", "observer_kwargs": {}, "strategy": strategy, "symmetric": true, "type": "int",
            })
        };
        let config = |format: &str, status: &str, weights: Value, inputs: Value| {
            json!({
                "config_groups": {"group_0": {
                    "input_activations": inputs, "output_activations": null, "targets": ["Linear"], "weights": weights,
                }},
                "format": format, "global_compression_ratio": 1.24, "ignore": ["lm_head"], "kv_cache_scheme": null,
                "quant_method": "compressed-tensors", "quantization_status": status,
            })
        };
        let per_token = json!({"dynamic": true, "num_bits": 8, "strategy": "token", "symmetric": true, "type": "int"});
        let w8 = weights(8, "channel", Value::Null);
        let mut mixed = config("mixed-precision", "compressed", w8.clone(), Value::Null);
        mixed["config_groups"]["group_0"]["format"] = json!("int-quantized");
        for config in [
            config("pack-quantized", "compressed", weights(4, "group", json!("group")), Value::Null),
            config("pack-quantized", "frozen", weights(4, "group", json!("weight")), Value::Null),
            config("pack-quantized", "compressed", w8.clone(), Value::Null),
            config("int-quantized", "compressed", w8.clone(), per_token.clone()),
            config("int-quantized", "frozen", w8.clone(), per_token),
            mixed.clone(),
        ] {
            assert_eq!(read(&config), Ok(StoredQuantization::CompressedTensors));
        }
        mixed["config_groups"]["group_0"]["format"] = json!("nvfp4-pack-quantized");
        for (config, word) in [
            (mixed, "nvfp4-pack-quantized"),
            (config("marlin-24", "compressed", w8.clone(), Value::Null), "marlin-24"),
            (config("int-quantized", "initialized", w8, Value::Null), "initialized"),
        ] {
            let error = read(&config).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
