//! Rotary embeddings of a GGUF file.
//!
//! It must not know how angles are computed. Its invariant: what `llama-model.cpp` and `llama-context.cpp` make of the same
//! keys and tensors comes out, but for two things that follow the model as it was published: longrope's factors are chosen by
//! a request's length, not by the context that was allocated, and an attention factor or a beta that the converter wrote down
//! for YaRN is used in every architecture.

use super::{
    super::{Limits, RopeScaling, RopeStyle, Rotary, bad, json::yarn_attention, unsupported},
    keys::{Keys, Outcome},
};

/// Factors are read as f32 only, which is how they are always written.
const F32_TYPE_ID: u32 = 0;

/// That of layers without a window of their own.
pub(super) fn rotary(keys: Keys<'_>, style: RopeStyle, head_dim: usize, context: usize) -> Outcome<Rotary> {
    let dim = keys.size("rope.dimension_count", Limits::HEAD_DIM)?.unwrap_or(head_dim);
    let base = keys.number("rope.freq_base")?.unwrap_or(10_000.0) as f32;
    Ok(Rotary { style, dim, base, scaling: scaling(keys, dim, context)? })
}

fn scaling(keys: Keys<'_>, dim: usize, context: usize) -> Outcome<RopeScaling> {
    keys.refuse_number("rope.scaling.alpha", &[0.0])?;
    let kind = keys.text("rope.scaling.type")?;
    let original = keys.size("rope.scaling.original_context_length", Limits::POSITIONS)?.unwrap_or(context);
    let attention_factor = keys.number("rope.scaling.attn_factor")?.unwrap_or(1.0);
    let long = factors(keys, "rope_factors_long.weight", dim)?;
    let short = factors(keys, "rope_factors_short.weight", dim)?;
    let scaling = match (kind, long, short) {
        (Some("yarn"), None, None) if keys.file.tensor("rope_freqs.weight").is_some() => {
            return unsupported("rope_freqs.weight beside YaRN is not supported");
        }
        (Some("yarn"), None, None) => return yarn(keys, original, attention_factor),
        (Some("longrope") | None, Some(long), Some(short)) => {
            keys.refuse_number("rope.scaling.factor", &[0.0, 1.0])?;
            return Ok(RopeScaling::LongRope {
                short,
                long,
                original_max_position_embeddings: original,
                attention_factor: attention_factor as f32,
                long_attention_factor: attention_factor as f32,
            });
        }
        (kind, None, None) => match (factors(keys, "rope_freqs.weight", dim)?, linear_factor(keys, kind)?) {
            (None, None) => RopeScaling::None,
            (None, Some(factor)) => RopeScaling::Linear { factor },
            // Both stretch: the divisors multiply.
            (Some(mut factors), linear) => {
                for factor in &mut factors {
                    *factor *= linear.unwrap_or(1.0);
                }
                RopeScaling::Factors(factors)
            }
        },
        (Some("longrope") | None, ..) => {
            return bad("of rope_factors_long.weight and rope_factors_short.weight only one is there");
        }
        (Some(kind), ..) => {
            return unsupported(format!("longrope's factors beside the rotary scaling {kind:?} are not supported"));
        }
    };
    // Without longrope or YaRN nothing here carries it.
    keys.refuse_number("rope.scaling.attn_factor", &[1.0])?;
    Ok(scaling)
}

fn linear_factor(keys: Keys<'_>, kind: Option<&str>) -> Outcome<Option<f32>> {
    let factor = match kind {
        Some("none") => None,
        // llama.cpp takes a factor without a type as linear, and so did files before the type existed; without a factor
        // nothing is scaled.
        Some("linear") | None => match keys.number("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => keys.number("rope.scale_linear")?,
        },
        Some("longrope") => return bad("rope_factors_long.weight and rope_factors_short.weight are missing"),
        Some(other) => {
            return unsupported(format!(
                "the rotary scaling {other:?} is not supported; none, linear, yarn, longrope and rope_freqs.weight are"
            ));
        }
    };
    // Zero means "not set" in llama.cpp.
    Ok(factor.map(|factor| factor as f32).filter(|&factor| factor != 0.0 && factor != 1.0))
}

fn yarn(keys: Keys<'_>, original: usize, attention_factor: f64) -> Outcome<RopeScaling> {
    // How much of the ramp is mixed in; below zero means "not set".
    match keys.number("rope.scaling.yarn_ext_factor")? {
        Some(factor) if factor >= 0.0 && factor != 1.0 => {
            return unsupported(format!("rope.scaling.yarn_ext_factor is {factor}, which is not supported; 1 is"));
        }
        _ => {}
    }
    let factor = keys.required_number("rope.scaling.factor")?;
    let log_multiplier = keys.number("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0);
    let computed = match log_multiplier {
        0.0 => yarn_attention(factor, 1.0),
        multiplier => yarn_attention(factor, 1.0) / yarn_attention(factor, multiplier),
    };
    let given = keys.number("rope.scaling.yarn_attn_factor")?.filter(|&factor| factor >= 0.0);
    let beta = |key, default: f64| -> Outcome<f32> { Ok(keys.number(key)?.unwrap_or(default) as f32) };
    Ok(RopeScaling::Yarn {
        factor: factor as f32,
        beta_fast: beta("rope.scaling.yarn_beta_fast", 32.0)?,
        beta_slow: beta("rope.scaling.yarn_beta_slow", 1.0)?,
        original_max_position_embeddings: original,
        attention_factor: (given.unwrap_or(computed) * attention_factor) as f32,
        truncate: true,
    })
}

/// Divisors, one a pair.
fn factors(keys: Keys<'_>, name: &str, dim: usize) -> Outcome<Option<Vec<f32>>> {
    let Some(tensor) = keys.file.tensor(name) else { return Ok(None) };
    if tensor.type_id != F32_TYPE_ID || tensor.dimensions != [dim as u64 / 2, 1, 1, 1] {
        return bad(format!(
            "tensor {name:?} has sizes {:?} and type id {}; {} f32 are expected",
            tensor.dimensions,
            tensor.type_id,
            dim / 2
        ));
    }
    let bytes = &keys.file.map().bytes()[tensor.range.clone()];
    let (values, _) = bytes.as_chunks::<4>();
    Ok(Some(values.iter().map(|&value| f32::from_le_bytes(value)).collect()))
}
