//! What the operations rely on in a configuration, whatever read it.
//!
//! A file's own errors are found where it is read; this is the last gate before memory is taken. It knows the
//! configuration's axes, no weights. Invariant: a configuration that passes has sizes whose products do not overflow, and
//! names nothing (a rotary embedding, experts) that it does not have.

use crate::{
    config::{DecoderConfig, FeedForward},
    error::ModelError,
    rope::RopeRegimes,
};

/// Sizes above this are a mistake, and products of two of them must not overflow.
const MAX_SIZE: usize = 1 << 24;

pub(super) fn config(config: &DecoderConfig) -> Result<(), ModelError> {
    sizes(config)
        .and_then(|()| rotaries(config))
        .and_then(|()| scores(config))
        .and_then(|()| experts(config))
        .map_err(|what| ModelError::Unsupported(format!("{}: {what}", config.architecture)))?;
    RopeRegimes::of(config).map(|_| ())
}

fn sizes(config: &DecoderConfig) -> Result<(), String> {
    let sizes = [
        ("vocabulary", config.vocab_size),
        ("hidden size", config.hidden_size),
        ("number of heads", config.num_heads),
        ("number of key/value heads", config.num_kv_heads),
        ("head size", config.head_dim),
        ("MLP size", config.mlp.intermediate_size),
        ("number of layers", config.num_layers()),
    ];
    in_range(&sizes)?;
    if !config.num_heads.is_multiple_of(config.num_kv_heads) {
        return Err(format!(
            "{} query heads do not divide among {} key/value heads",
            config.num_heads, config.num_kv_heads
        ));
    }
    if config.layers.iter().any(|layer| layer.window == Some(0)) {
        return Err("a sliding window of 0 tokens sees nothing".into());
    }
    for blocks in config.layers.iter().filter_map(|layer| layer.blocks) {
        in_range(&[
            ("attention pattern's block", blocks.block_size),
            ("attention pattern's number of local blocks", blocks.num_local_blocks),
            ("attention pattern's stride", blocks.vertical_stride),
        ])?;
    }
    if let Some(token) = config.masked_tokens.iter().find(|&&token| token as usize >= config.vocab_size) {
        return Err(format!("token {token} is masked; the vocabulary has {}", config.vocab_size));
    }
    Ok(())
}

fn in_range(sizes: &[(&str, usize)]) -> Result<(), String> {
    match sizes.iter().find(|(_, size)| !(1..=MAX_SIZE).contains(size)) {
        Some((name, size)) => Err(format!("the {name} is {size}: it must be 1 to {MAX_SIZE}")),
        None => Ok(()),
    }
}

fn rotaries(config: &DecoderConfig) -> Result<(), String> {
    for rotary in &config.rotaries {
        if rotary.dim > config.head_dim || !rotary.dim.is_multiple_of(2) {
            return Err(format!(
                "{} rotated elements of a head of {}: they must be even and fit",
                rotary.dim, config.head_dim
            ));
        }
        // Query and key rows are brought into one order at load.
        let first = &config.rotaries[0];
        if (rotary.style, rotary.dim) != (first.style, first.dim) {
            return Err(format!(
                "rotary embeddings of {} elements ({:?}) and of {} ({:?}) in one model: they must have one shape",
                first.dim, first.style, rotary.dim, rotary.style
            ));
        }
    }
    let num_rotaries = config.rotaries.len();
    match config.layers.iter().filter_map(|layer| layer.rotary).find(|&index| index >= num_rotaries) {
        Some(index) => Err(format!("a layer rotates by embedding {index}; there are {num_rotaries}")),
        None => Ok(()),
    }
}

/// What is done to scores and logits.
fn scores(config: &DecoderConfig) -> Result<(), String> {
    if let Some(alibi) = &config.alibi
        && alibi.slopes.len() != config.num_heads
    {
        return Err(format!("{} ALiBi slopes for {} heads", alibi.slopes.len(), config.num_heads));
    }
    for (name, cap) in [("attention", config.attention_soft_cap), ("logit", config.logit_soft_cap)] {
        if let Some(cap) = cap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
            return Err(format!("the {name} soft cap is {cap}; it must be a positive number"));
        }
    }
    Ok(())
}

fn experts(config: &DecoderConfig) -> Result<(), String> {
    if config.layers.iter().all(|layer| layer.feed_forward == FeedForward::Dense) {
        return Ok(());
    }
    let Some(experts) = &config.experts else { return Err("a layer has experts, the model has none".into()) };
    in_range(&[
        ("number of experts", experts.num_experts),
        ("number of experts a token", experts.num_experts_per_token),
        ("experts' size", experts.intermediate_size),
        ("shared expert's size", experts.shared_intermediate_size.unwrap_or(1)),
    ])?;
    if experts.num_experts_per_token > experts.num_experts {
        return Err(format!(
            "{} of {} experts a token: there are not so many",
            experts.num_experts_per_token, experts.num_experts
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{super::tests::small_config, *};
    use crate::config::{Activation, Alibi, Experts, RopeScaling, RopeStyle, Rotary, SparseBlocks};

    fn check_refused(expected: &str, break_it: impl FnOnce(&mut DecoderConfig)) {
        let mut config = small_config();
        break_it(&mut config);
        let message = super::config(&config).expect_err(expected).to_string();
        assert!(message.contains(expected), "{message:?} should contain {expected:?}");
    }

    #[test]
    fn a_configuration_that_the_operations_cannot_carry_out_is_refused() {
        assert!(config(&small_config()).is_ok());
        check_refused("vocabulary is 0", |config| config.vocab_size = 0);
        check_refused("number of layers is 0", |config| config.layers.clear());
        check_refused("head size is 18446744073709551615", |config| config.head_dim = usize::MAX);
        check_refused("4 query heads", |config| config.num_kv_heads = 3);
        check_refused("5 rotated elements", |config| config.rotaries[0].dim = 5);
        check_refused("6 rotated elements of a head of 4", |config| config.rotaries[0].dim = 6);
        check_refused("stride is 0", |config| {
            let blocks = SparseBlocks { block_size: 4, num_local_blocks: 1, vertical_stride: 0, head_step: 1 };
            config.layers[0].blocks = Some(blocks);
        });
        check_refused("token 10 is masked", |config| config.masked_tokens = vec![3, 10]);
        check_refused("window of 0", |config| config.layers[0].window = Some(0));
        check_refused("by embedding 1; there are 1", |config| config.layers[0].rotary = Some(1));
        check_refused("they must have one shape", |config| {
            let other = Rotary { style: RopeStyle::Interleaved, ..config.rotaries[0].clone() };
            config.rotaries.push(other);
        });
        check_refused("3 ALiBi slopes for 4 heads", |config| config.alibi = Some(Alibi { slopes: vec![0.5; 3] }));
        check_refused("attention soft cap is 0", |config| config.attention_soft_cap = Some(0.0));
        check_refused("logit soft cap is NaN", |config| config.logit_soft_cap = Some(f32::NAN));
        check_refused("the model has none", |config| config.layers[0].feed_forward = FeedForward::Experts);
        let experts = Experts {
            num_experts: 2,
            num_experts_per_token: 3,
            intermediate_size: 8,
            activation: Activation::Silu,
            normalize_weights: true,
            shared_intermediate_size: None,
        };
        check_refused("3 of 2 experts", |config| {
            config.layers[0].feed_forward = FeedForward::Experts;
            config.experts = Some(experts);
        });
        check_refused("in two ways", |config| {
            for original_max_position_embeddings in [8, 9] {
                config.layers.push(config.layers[0].clone());
                config.layers.last_mut().expect("one was pushed").rotary = Some(config.rotaries.len());
                let scaling = RopeScaling::Dynamic { factor: 2.0, original_max_position_embeddings };
                config.rotaries.push(Rotary { scaling, ..config.rotaries[0].clone() });
            }
        });
    }
}
