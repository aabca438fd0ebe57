//! What Falcon's configs say in their own way: sizes, the order of a block, ALiBi.
//!
//! Names are those of `configuration_falcon.py` in transformers 5.23, and of the first published configs (n_head, n_layer,
//! n_head_kv, "RefinedWeb"), which meant the same. Its invariant: a combination that `modeling_falcon.py` cannot compute is
//! refused by name.

use serde_json::Value;

use super::{
    super::{Alibi, Block, Limits, bad, unsupported},
    Dimensions,
    keys::{Keys, Outcome},
};

/// Model types (of 40B, then of 7B and RW) and class of the first published configs.
pub(super) const OLD_NAMES: [&str; 3] = ["RefinedWeb", "RefinedWebModel", "RWForCausalLM"];

/// Whether key/value heads are shared by groups (40B, 11B, 180B) instead of by all or none.
fn is_new_architecture(keys: Keys<'_>) -> Outcome<bool> {
    let default = keys.text("model_type")? == Some(OLD_NAMES[0]);
    Ok(keys.truth("new_decoder_architecture")?.unwrap_or(default))
}

/// `multi_query` or `parallel_attn`. Absent they are true, but false for the class of the first 7B and RW models (`RWConfig`
/// in their `configuration_RW.py`). Null is as good as false to the code that asks.
fn is_set(keys: Keys<'_>, key: &str) -> Outcome<bool> {
    let class = keys.array("architectures")?.and_then(|classes| classes.first()).and_then(Value::as_str);
    let is_first = OLD_NAMES[1..].contains(&keys.text("model_type")?.or(class).unwrap_or_default());
    Ok(keys.truth(key)?.unwrap_or(!is_first && !keys.is_null(key)))
}

pub(super) fn dimensions(keys: Keys<'_>) -> Outcome<Dimensions> {
    let either = |names: [&str; 2], limit| -> Outcome<usize> {
        match keys.size(names[1], limit)? {
            Some(size) if keys.get(names[0]).is_none() => Ok(size),
            _ => keys.required_size(names[0], limit),
        }
    };
    // Where both stand, the older name wins, in both classes.
    let hidden_size = either(["n_embed", "hidden_size"], Limits::WIDTH)?;
    let num_heads = either(["num_attention_heads", "n_head"], Limits::HEADS)?;
    if !hidden_size.is_multiple_of(num_heads) {
        return bad(format!("hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"));
    }
    let given = match keys.size("num_kv_heads", Limits::HEADS)? {
        Some(count) => Some(count),
        None => keys.size("n_head_kv", Limits::HEADS)?,
    };
    let num_kv_heads = match (is_new_architecture(keys)?, is_set(keys, "multi_query")?) {
        (true, _) => given.unwrap_or(num_heads),
        (false, true) => 1,
        (false, false) => match given {
            None => num_heads,
            Some(count) if count == num_heads => num_heads,
            Some(count) => {
                return unsupported(format!(
                    "num_kv_heads is {count} of {num_heads} heads without new_decoder_architecture and multi_query, which \
                     the published code does not compute"
                ));
            }
        },
    };
    Ok(Dimensions {
        vocab_size: keys.required_size("vocab_size", Limits::VOCAB)?,
        hidden_size,
        num_heads,
        num_kv_heads,
        head_dim: hidden_size / num_heads,
        num_layers: either(["num_hidden_layers", "n_layer"], Limits::LAYERS)?,
        intermediate_size: keys.size("ffn_hidden_size", Limits::WIDTH)?.unwrap_or(4 * hidden_size),
    })
}

pub(super) fn block(keys: Keys<'_>) -> Outcome<Block> {
    if keys.truth("apply_residual_connection_post_layernorm")? == Some(true) {
        return unsupported("apply_residual_connection_post_layernorm is true, which is not supported");
    }
    let parallel = is_set(keys, "parallel_attn")?;
    let num_norms = keys.size("num_ln_in_parallel_attn", Limits::LAYERS)?;
    match (is_new_architecture(keys)?, parallel, num_norms) {
        (true, true, None | Some(2)) => Ok(Block::ParallelTwoNorms),
        (true, true, Some(1)) | (false, true, None | Some(1)) => Ok(Block::Parallel),
        (false, false, _) => Ok(Block::PreNorm),
        (new, parallel, norms) => unsupported(format!(
            "new_decoder_architecture {new}, parallel_attn {parallel} and num_ln_in_parallel_attn {} do not go together",
            norms.map_or("null".to_owned(), |norms| norms.to_string())
        )),
    }
}

/// `build_alibi_tensor`: slopes in bfloat16, and biases that are added before scores are scaled.
pub(super) fn alibi(keys: Keys<'_>, num_heads: usize, head_dim: usize) -> Outcome<Option<Alibi>> {
    if !keys.truth("alibi")?.unwrap_or(false) {
        return Ok(None);
    }
    // Powers of 2^(-8 / n) for a power of two n; for other numbers of heads every second one of the next finer series.
    let series = |n: usize| (-(8.0 / n as f64)).exp2() as f32;
    let power_of_two = 1 << num_heads.ilog2();
    let slopes = (1..=num_heads).map(|head| match head.checked_sub(power_of_two) {
        None | Some(0) => series(power_of_two).powi(head as i32),
        Some(rest) => series(2 * power_of_two).powi(2 * rest as i32 - 1),
    });
    let scale = (head_dim as f32).sqrt();
    Ok(Some(Alibi { slopes: slopes.map(|slope| half::bf16::from_f32(slope).to_f32() / scale).collect() }))
}
