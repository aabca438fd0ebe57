//! `quantization_config`: which published layout a checkpoint's integer weights are in.
//!
//! It must not know tensors: which modules are quantised shows in their names, so lists of modules to leave alone need no
//! reading. Its invariant: a layout that [`StoredQuantization`] cannot say is refused by name, with what is read.

use super::keys::{Keys, Outcome};
use crate::config::{bad, unsupported};

/// What is read, for every refusal.
const SUPPORTED: &str = "read are gptq (2, 3, 4, 8 bits; checkpoint_format gptq or gptq_v2), awq (4 bits, version gemm) \
                         and compressed-tensors (pack-quantized int4 and int8, int-quantized int8), and what \
                         `bindery quantize` makes; from GGUF the formats in the README; --quantize int8 or int4 quantises f32, f16 and bf16 at load";

/// How a checkpoint keeps the weights that it quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StoredQuantization {
    /// AutoGPTQ's and GPTQModel's.
    Gptq {
        /// Of a code.
        bits: usize,
        /// Inputs that share a scale; none for all of a row.
        group_size: Option<usize>,
        /// What is added to stored zero points: 1 in the first version of the layout.
        zeros_plus: i32,
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

pub(super) fn stored(keys: Keys<'_>) -> Outcome<Option<StoredQuantization>> {
    let newer = keys.object("quantization_config")?;
    let Some(keys) = newer.map_or_else(|| keys.object("compression_config"), |keys| Ok(Some(keys)))? else {
        return Ok(None);
    };
    match keys.text("quant_method")?.unwrap_or("of an unnamed method") {
        "gptq" => gptq(keys),
        "awq" => awq(keys),
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
    let zeros_plus = match keys.text("checkpoint_format")?.unwrap_or("gptq") {
        "gptq" => 1,
        "gptq_v2" => 0,
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
    let bits = keys.required_size("bits", 8)?;
    if ![2, 3, 4, 8].contains(&bits) {
        return refuse(&format!("gptq of {bits} bits"));
    }
    let act_order = keys.truth("desc_act")?.unwrap_or(false);
    Ok(StoredQuantization::Gptq { bits, group_size: group_size(keys, "group_size")?, zeros_plus, act_order })
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

fn compressed_tensors(keys: Keys<'_>) -> Outcome<StoredQuantization> {
    match keys.text("format")?.unwrap_or("absent") {
        "pack-quantized" | "int-quantized" => {}
        other => return refuse(&format!("the compressed-tensors format {other:?}")),
    }
    if let Some(status) = keys.text("quantization_status")?
        && status != "compressed"
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
        let weights = match groups.object(name)? {
            Some(group) => group.object("weights")?,
            None => None,
        };
        let Some(weights) = weights else { continue };
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
