//! Rotary embeddings of a config.json: older keys (`rope_theta`, `rope_scaling`), newer `rope_parameters`, by layer type or
//! not.
//!
//! It must not know how angles are computed. Its invariant: precedence and defaults are those of transformers 5.23's
//! `modeling_rope_utils.py` (`convert_rope_params_to_dict`, `standardize_rope_params`, `_compute_*_parameters`) and of the
//! overrides in the configuration classes of Phi 3 and Gemma 3; what they would not compute is refused by name.

use serde_json::Value;

use super::{
    super::{ConfigError, Limits, RopeScaling, RopeStyle, Rotary, bad, check_size, unsupported},
    families::{Family, FamilyRotary},
    keys::{Keys, Outcome, short},
};

/// The rotary embeddings that layers choose from: for Gemma 3 that of full attention, then that of sliding windows.
pub(super) fn rotaries(
    keys: Keys<'_>,
    family: &Family,
    head_dim: usize,
    max_position_embeddings: usize,
) -> Outcome<Vec<Rotary>> {
    let reader = Reader { keys, head_dim, max_position_embeddings };
    match family.rotary {
        FamilyRotary::One { theta } => {
            refuse_partial(keys)?;
            Ok(vec![reader.one(theta, Kinds::All)?])
        }
        FamilyRotary::Falcon => Ok(vec![reader.one(10_000.0, Kinds::All)?]),
        FamilyRotary::Phi3 => Ok(vec![reader.one(10_000.0, Kinds::Phi3)?]),
        FamilyRotary::Gemma3 => reader.gemma3(),
        FamilyRotary::Phi3Small => Ok(vec![reader.phi3_small()?]),
    }
}

struct Reader<'a> {
    keys: Keys<'a>,
    head_dim: usize,
    max_position_embeddings: usize,
}

/// Which scalings a family's class takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kinds {
    All,
    /// None or longrope, which older configs call "su" or "yarn", and a part of each head.
    Phi3,
}

impl Reader<'_> {
    fn one(&self, default_theta: f64, kinds: Kinds) -> Outcome<Rotary> {
        // Of the two, `rope_scaling` wins where it holds anything; the other is not looked at then.
        let scaling = self.keys.object("rope_scaling")?.filter(|keys| !keys.is_empty());
        let parameters = match scaling {
            Some(scaling) => Some(scaling),
            None => self.keys.object("rope_parameters")?,
        };
        if let Some(kind) = parameters.and_then(Keys::first_object) {
            return unsupported(format!(
                "rotary parameters by layer type ({kind}) are not supported in this architecture, nor does \
                 transformers compute them"
            ));
        }
        let dim = match kinds {
            Kinds::Phi3 => self.partial_dim(parameters)?,
            Kinds::All => {
                parameters.map_or(Ok(()), |parameters| refuse_partial(parameters))?;
                self.head_dim
            }
        };
        let base = self.theta(parameters, "rope_theta", default_theta)?;
        let scaling = parameters.map_or(Ok(RopeScaling::None), |keys| self.scaling(keys, kinds))?;
        Ok(Rotary { style: RopeStyle::Neox, dim, base: base as f32, scaling })
    }

    /// `rope_embedding_base`, positions divided by `rope_position_scale`, or longrope with `short_mscale` and `long_mscale`.
    fn phi3_small(&self) -> Outcome<Rotary> {
        const NO_SCALING: [&str; 2] = ["default", "linear"];
        let scaling = self.keys.object("rope_scaling")?.filter(|keys| !keys.is_empty());
        let parameters = match scaling {
            Some(scaling) => Some(scaling),
            None => self.keys.object("rope_parameters")?,
        };
        let kind = |keys: Keys<'_>| -> Outcome<String> {
            let newer = keys.text("rope_type")?;
            Ok(newer.or(keys.text("type")?).unwrap_or(NO_SCALING[0]).to_owned())
        };
        let kind = parameters.map_or(Ok(NO_SCALING[0].to_owned()), kind)?;
        let scaling = match (kind.as_str(), parameters) {
            ("longrope" | "su", Some(keys)) => {
                let original = match keys.size("original_max_position_embeddings", Limits::POSITIONS)? {
                    Some(original) => original,
                    None => self.original_length(keys, Kinds::All)?,
                };
                RopeScaling::LongRope {
                    short: numbers(keys, "short_factor")?,
                    long: numbers(keys, "long_factor")?,
                    original_max_position_embeddings: original,
                    attention_factor: required(keys, "short_mscale")?,
                    long_attention_factor: required(keys, "long_mscale")?,
                }
            }
            (kind, _) if NO_SCALING.contains(&kind) => match self.keys.number("rope_position_scale")? {
                None | Some(1.0) => RopeScaling::None,
                Some(factor) => RopeScaling::Linear { factor: factor as f32 },
            },
            (other, _) => {
                return unsupported(format!(
                    "the rotary scaling {other:?} is not supported in this architecture; longrope is"
                ));
            }
        };
        let base = self.keys.number("rope_embedding_base")?.unwrap_or(1_000_000.0);
        Ok(Rotary { style: RopeStyle::Neox, dim: self.head_dim, base: base as f32, scaling })
    }

    fn theta(&self, parameters: Option<Keys<'_>>, key: &str, default: f64) -> Outcome<f64> {
        let inside = parameters.map_or(Ok(None), |parameters| parameters.number("rope_theta"))?;
        Ok(match inside {
            Some(theta) => theta,
            None => self.keys.number(key)?.unwrap_or(default),
        })
    }

    /// Full attention, then sliding windows. Older configs give `rope_theta`, `rope_local_base_freq` and a `rope_scaling`
    /// that is for full attention only.
    fn gemma3(&self) -> Outcome<Vec<Rotary>> {
        refuse_partial(self.keys)?;
        let by_type = self.keys.object("rope_parameters")?;
        if let Some(parameters) = by_type
            && !parameters.is_empty()
            && parameters.first_object().is_none()
        {
            return unsupported(
                "rope_parameters are not given by layer type (full_attention, sliding_attention), which this \
                 architecture's are",
            );
        }
        let of = |kind| by_type.map_or(Ok(None), |parameters| parameters.object(kind));
        let (full, sliding) = (of("full_attention")?, of("sliding_attention")?);
        let scaling = self.keys.object("rope_scaling")?.filter(|keys| !keys.is_empty());
        let updated = scaling.map_or(Ok(None), |scaling| updated_full(by_type, full, scaling).map(Some))?;
        let full = updated.as_ref().and_then(Keys::of).or(full);
        let full_theta = self.theta(full, "rope_theta", 1_000_000.0)?;
        let sliding_theta = self.theta(sliding, "rope_local_base_freq", 10_000.0)?;
        let rotary = |parameters: Option<Keys<'_>>, theta: f64| {
            parameters.map_or(Ok(()), |parameters| refuse_partial(parameters))?;
            let mut scaling = parameters.map_or(Ok(RopeScaling::None), |keys| self.scaling(keys, Kinds::All))?;
            // transformers looks for it beside the layer types, where it never is.
            if let RopeScaling::Yarn { truncate, .. } = &mut scaling {
                *truncate = true;
            }
            Ok(Rotary { style: RopeStyle::Neox, dim: self.head_dim, base: theta as f32, scaling })
        };
        Ok(vec![rotary(full, full_theta)?, rotary(sliding, sliding_theta)?])
    }

    fn partial_dim(&self, parameters: Option<Keys<'_>>) -> Outcome<usize> {
        let inside = parameters.map_or(Ok(None), |parameters| parameters.number("partial_rotary_factor"))?;
        let factor = match inside {
            Some(factor) => factor,
            None => self.keys.number("partial_rotary_factor")?.unwrap_or(1.0),
        };
        if !(0.0..=1.0).contains(&factor) {
            return bad(format!("partial_rotary_factor is {factor}; 0 to 1 is possible"));
        }
        // Rounded down, as there; the check of the whole config refuses zero and odd widths.
        Ok((self.head_dim as f64 * factor) as usize)
    }

    /// `keys` is `rope_scaling`, `rope_parameters`, or an entry of the latter.
    fn scaling(&self, keys: Keys<'_>, kinds: Kinds) -> Outcome<RopeScaling> {
        for key in ["mrope_section", "alpha", "short_mscale", "long_mscale", "llama_4_scaling_beta"] {
            if let Some(value) = keys.get(key) {
                return unsupported(format!("{key} ({}) in the rotary parameters is not supported", short(value)));
            }
        }
        let kind = match keys.text("rope_type")? {
            Some(kind) => kind,
            None => keys.text("type")?.unwrap_or("default"),
        };
        match (kind, kinds) {
            ("default", _) => Ok(RopeScaling::None),
            ("longrope", _) | ("su" | "yarn", Kinds::Phi3) => self.long_rope(keys, kinds),
            ("linear", Kinds::All) => Ok(RopeScaling::Linear { factor: required(keys, "factor")? }),
            ("dynamic", Kinds::All) => Ok(RopeScaling::Dynamic {
                factor: required(keys, "factor")?,
                original_max_position_embeddings: self.max_position_embeddings,
            }),
            ("llama3", Kinds::All) => Ok(RopeScaling::Llama3 {
                factor: required(keys, "factor")?,
                low_freq_factor: required(keys, "low_freq_factor")?,
                high_freq_factor: required(keys, "high_freq_factor")?,
                original_max_position_embeddings: self.original_length(keys, kinds)?,
            }),
            ("yarn", Kinds::All) => self.yarn(keys),
            (other, Kinds::All) => unsupported(format!(
                "the rotary scaling {other:?} is not supported; default, linear, dynamic, yarn, longrope and llama3 are"
            )),
            (other, Kinds::Phi3) => unsupported(format!(
                "the rotary scaling {other:?} is not supported in this architecture, nor does transformers compute it; \
                 default and longrope are"
            )),
        }
    }

    /// The length before scaling. Beside the rotary parameters it wins over that within.
    fn original_length(&self, keys: Keys<'_>, kinds: Kinds) -> Outcome<usize> {
        const KEY: &str = "original_max_position_embeddings";
        // Phi 3's class has a default for it.
        let beside = self.keys.size(KEY, Limits::POSITIONS)?.or((kinds == Kinds::Phi3).then_some(4096));
        Ok(match beside {
            Some(length) => length,
            None => keys.size(KEY, Limits::POSITIONS)?.unwrap_or(self.max_position_embeddings),
        })
    }

    fn long_rope(&self, keys: Keys<'_>, kinds: Kinds) -> Outcome<RopeScaling> {
        let original = self.original_length(keys, kinds)?;
        let factor = self.factor(keys, original)?;
        let attention_factor = keys.number("attention_factor")?.unwrap_or(if factor <= 1.0 {
            1.0
        } else {
            (1.0 + factor.ln() / (original as f64).ln()).sqrt()
        });
        Ok(RopeScaling::LongRope {
            short: numbers(keys, "short_factor")?,
            long: numbers(keys, "long_factor")?,
            original_max_position_embeddings: original,
            attention_factor: attention_factor as f32,
            long_attention_factor: attention_factor as f32,
        })
    }

    /// `factor`, else by how much the context has grown.
    fn factor(&self, keys: Keys<'_>, original: usize) -> Outcome<f64> {
        Ok(keys.number("factor")?.unwrap_or(self.max_position_embeddings as f64 / original as f64))
    }

    fn yarn(&self, keys: Keys<'_>) -> Outcome<RopeScaling> {
        let original = self.original_length(keys, Kinds::All)?;
        let factor = self.factor(keys, original)?;
        let or_default = |key, default| -> Outcome<f32> {
            Ok(keys.number(key)?.filter(|&value| value != 0.0).unwrap_or(default) as f32)
        };
        let scale = |key: &str| -> Outcome<Option<f64>> { Ok(keys.number(key)?.filter(|&value| value != 0.0)) };
        let attention_factor = match (keys.number("attention_factor")?, scale("mscale")?, scale("mscale_all_dim")?) {
            (Some(factor), _, _) => factor,
            (None, Some(mscale), Some(all)) => yarn_attention(factor, mscale) / yarn_attention(factor, all),
            (None, _, _) => yarn_attention(factor, 1.0),
        };
        Ok(RopeScaling::Yarn {
            factor: factor as f32,
            beta_fast: or_default("beta_fast", 32.0)?,
            beta_slow: or_default("beta_slow", 1.0)?,
            original_max_position_embeddings: original,
            attention_factor: attention_factor as f32,
            // Null is no truth there, unlike absence.
            truncate: keys.truth("truncate")?.unwrap_or(!keys.is_null("truncate")),
        })
    }
}

/// Gemma 3's parameters of full attention with what `rope_scaling` says on top of them, key by key.
fn updated_full(by_type: Option<Keys<'_>>, full: Option<Keys<'_>>, scaling: Keys<'_>) -> Outcome<Value> {
    if by_type.is_some() && full.is_none() {
        return unsupported(
            "rope_scaling is given beside rope_parameters without full_attention, which it is for; transformers does not \
             compute that",
        );
    }
    let (stored, default) =
        (full.map_or(Ok(None), |full| full.text("rope_type"))?, by_type.is_none().then_some("default"));
    // An older name beside a newer one is not read. Where the two are at odds, transformers 4 and 5 are, too.
    if let (None, Some(older), Some(kind)) = (scaling.text("rope_type")?, scaling.text("type")?, stored.or(default))
        && older != kind
    {
        return unsupported(format!(
            "rope_scaling has the type {older:?} where rope_type is {kind:?}, which transformers 5 goes by; name the one \
             that is meant rope_type"
        ));
    }
    Ok(scaling.over(full))
}

fn refuse_partial(keys: Keys<'_>) -> Outcome<()> {
    match keys.number("partial_rotary_factor")? {
        None | Some(1.0) => Ok(()),
        Some(factor) => unsupported(format!(
            "partial_rotary_factor is {factor}, which is not supported in this architecture, nor does transformers \
             compute it"
        )),
    }
}

/// The temperature that YaRN recommends (Peng et al. 2023, eq. 22), on cosines and sines.
pub(in crate::config) fn yarn_attention(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

fn required(keys: Keys<'_>, key: &str) -> Outcome<f32> {
    match keys.number(key)? {
        Some(number) => Ok(number as f32),
        None => Err(ConfigError::Bad(format!("{key} is missing in the rotary scaling"))),
    }
}

/// A list with a factor a pair.
fn numbers(keys: Keys<'_>, key: &str) -> Outcome<Vec<f32>> {
    let Some(values) = keys.array(key)? else { return bad(format!("{key} is missing in the rotary scaling")) };
    check_size(&format!("the length of {key}"), values.len() as u64, Limits::HEAD_DIM)?;
    values
        .iter()
        .map(|value| match value {
            Value::Number(number) => Ok(number.as_f64().unwrap_or(f64::NAN) as f32),
            other => bad(format!("{key} holds {}; numbers are expected", short(other))),
        })
        .collect()
}
