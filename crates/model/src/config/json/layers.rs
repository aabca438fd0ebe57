//! What layers of a config.json do differently: windows, rotation, experts.
//!
//! It must not know sizes. Its invariant: the patterns are those of the configuration classes in transformers 5.23, and a
//! list of the wrong length is refused, as there.

use serde_json::Value;

use super::{
    super::{Activation, Experts, FeedForward, LayerConfig, Limits, bad, unsupported},
    families::{Family, FamilyExperts, FamilyLayers},
    keys::{Keys, Outcome, short},
    phi3_small,
};

/// All layers, with `FeedForward` still `Dense` and the rotary embedding by number as `rotary::rotaries` lists them.
pub(super) fn layers(keys: Keys<'_>, family: &Family, num_layers: usize) -> Outcome<Vec<LayerConfig>> {
    let plain = |window| LayerConfig { window, blocks: None, rotary: Some(0), feed_forward: FeedForward::Dense };
    let windowed = |sliding: Vec<bool>, window: Option<usize>| -> Outcome<Vec<LayerConfig>> {
        sliding.into_iter().map(|sliding| Ok(plain(window_where(sliding, window)?))).collect()
    };
    match family.layers {
        FamilyLayers::Plain => Ok(vec![plain(None); num_layers]),
        FamilyLayers::Windowed => Ok(vec![plain(window(keys, None)?); num_layers]),
        FamilyLayers::Mistral => {
            let window = window(keys, Some(4096))?;
            windowed(sliding(keys, num_layers, |_| window.is_some())?, window)
        }
        FamilyLayers::Qwen3Moe => Ok(vec![plain(optional_window(keys, Some(4096))?); num_layers]),
        FamilyLayers::Qwen2 => {
            let window = optional_window(keys, Some(4096))?;
            let first = keys.count("max_window_layers")?.unwrap_or(28);
            let pattern = |layer| window.is_some() && layer >= first;
            windowed(sliding(keys, num_layers, pattern)?, window)
        }
        FamilyLayers::Qwen2Moe => {
            let window = optional_window(keys, Some(4096))?;
            let end = keys.count("max_window_layers")?.unwrap_or(28);
            let pattern = |layer: usize| window.is_some() && layer.is_multiple_of(2) && layer < end;
            windowed(sliding(keys, num_layers, pattern)?, window)
        }
        FamilyLayers::Gemma2 => {
            let pattern = |layer: usize| layer.is_multiple_of(2);
            windowed(sliding(keys, num_layers, pattern)?, window(keys, Some(4096))?)
        }
        FamilyLayers::Gemma3 => {
            let every = keys.size("sliding_window_pattern", Limits::LAYERS)?.unwrap_or(6);
            let pattern = |layer: usize| !(layer + 1).is_multiple_of(every);
            let mut layers = windowed(sliding(keys, num_layers, pattern)?, window(keys, Some(4096))?)?;
            for layer in &mut layers {
                layer.rotary = Some(usize::from(layer.window.is_some()));
            }
            Ok(layers)
        }
        FamilyLayers::SmolLm3 => smollm3(keys, num_layers),
        FamilyLayers::Phi3Small => phi3_small::layers(keys, num_layers),
    }
}

fn smollm3(keys: Keys<'_>, num_layers: usize) -> Outcome<Vec<LayerConfig>> {
    let window = optional_window(keys, None)?;
    let interval = keys.size("no_rope_layer_interval", Limits::LAYERS)?.unwrap_or(4);
    let rotary: Vec<bool> = match keys.array("no_rope_layers")? {
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
    let sliding = match layer_types(keys, num_layers)? {
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
                blocks: None,
                rotary: rotary.then_some(0),
                feed_forward: FeedForward::Dense,
            })
        })
        .collect()
}

/// True where a layer has the window: as `layer_types` says, else by the family's pattern.
fn sliding(keys: Keys<'_>, num_layers: usize, pattern: impl Fn(usize) -> bool) -> Outcome<Vec<bool>> {
    Ok(match layer_types(keys, num_layers)? {
        Some(sliding) => sliding,
        None => (0..num_layers).map(pattern).collect(),
    })
}

/// `sliding_window`; `absent` where the key is absent, none where it is null.
fn window(keys: Keys<'_>, absent: Option<usize>) -> Outcome<Option<usize>> {
    let default = if keys.is_null("sliding_window") { None } else { absent };
    Ok(keys.size("sliding_window", Limits::POSITIONS)?.or(default))
}

/// The same, where `use_sliding_window` is set.
fn optional_window(keys: Keys<'_>, absent: Option<usize>) -> Outcome<Option<usize>> {
    if keys.truth("use_sliding_window")?.unwrap_or(false) { window(keys, absent) } else { Ok(None) }
}

/// True where a layer has the window.
fn layer_types(keys: Keys<'_>, num_layers: usize) -> Outcome<Option<Vec<bool>>> {
    let Some(types) = keys.array("layer_types")? else { return Ok(None) };
    if types.len() != num_layers {
        return bad(format!("layer_types has {} entries for {num_layers} layers", types.len()));
    }
    types
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

fn window_where(sliding: bool, window: Option<usize>) -> Outcome<Option<usize>> {
    match (sliding, window) {
        (false, _) => Ok(None),
        (true, Some(window)) => Ok(Some(window)),
        (true, None) => {
            bad("layer_types asks for a sliding window, but sliding_window or use_sliding_window is not set")
        }
    }
}

/// The family's experts, and marks the layers that have them.
pub(super) fn experts(
    keys: Keys<'_>,
    family: &Family,
    activation: Activation,
    layers: &mut [LayerConfig],
) -> Outcome<Option<Experts>> {
    match family.experts {
        FamilyExperts::None => Ok(None),
        FamilyExperts::Mixtral => {
            for layer in layers.iter_mut() {
                layer.feed_forward = FeedForward::Experts;
            }
            Ok(Some(Experts {
                num_experts: num_experts(keys, ["num_local_experts", "num_experts"], 8)?,
                num_experts_per_token: keys.size("num_experts_per_tok", Limits::EXPERTS)?.unwrap_or(2),
                intermediate_size: keys.required_size("intermediate_size", Limits::WIDTH)?,
                activation,
                normalize_weights: true,
                shared_intermediate_size: None,
            }))
        }
        FamilyExperts::Qwen { num_experts: number, per_token, intermediate_size, shared_intermediate_size } => {
            let num_experts = num_experts(keys, ["num_experts", "num_local_experts"], number)?;
            if num_experts == 0 {
                return Ok(None);
            }
            mark_sparse_layers(keys, layers)?;
            if layers.iter().all(|layer| layer.feed_forward == FeedForward::Dense) {
                return Ok(None);
            }
            let shared = match shared_intermediate_size {
                None => None,
                Some(default) => Some(keys.size("shared_expert_intermediate_size", Limits::WIDTH)?.unwrap_or(default)),
            };
            Ok(Some(Experts {
                num_experts,
                num_experts_per_token: keys.size("num_experts_per_tok", Limits::EXPERTS)?.unwrap_or(per_token),
                intermediate_size: keys.size("moe_intermediate_size", Limits::WIDTH)?.unwrap_or(intermediate_size),
                activation,
                normalize_weights: keys.truth("norm_topk_prob")?.unwrap_or(false),
                shared_intermediate_size: shared,
            }))
        }
    }
}

/// Both names are one attribute in transformers.
fn num_experts(keys: Keys<'_>, names: [&str; 2], default: usize) -> Outcome<usize> {
    for name in names {
        if let Some(count) = keys.count(name)? {
            return if count <= Limits::EXPERTS {
                Ok(count)
            } else {
                bad(format!("{name} is {count}; up to {} are possible", Limits::EXPERTS))
            };
        }
    }
    Ok(default)
}

fn mark_sparse_layers(keys: Keys<'_>, layers: &mut [LayerConfig]) -> Outcome<()> {
    let step = keys.size("decoder_sparse_step", Limits::LAYERS)?.unwrap_or(1);
    for (index, layer) in layers.iter_mut().enumerate() {
        if (index + 1).is_multiple_of(step) {
            layer.feed_forward = FeedForward::Experts;
        }
    }
    for index in keys.array("mlp_only_layers")?.unwrap_or_default() {
        match index.as_u64().map(usize::try_from) {
            Some(index) => {
                if let Some(layer) = index.ok().and_then(|index| layers.get_mut(index)) {
                    layer.feed_forward = FeedForward::Dense;
                }
            }
            None => return bad(format!("mlp_only_layers holds {}; numbers of layers are expected", short(index))),
        }
    }
    Ok(())
}
