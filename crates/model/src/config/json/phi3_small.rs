//! What Phi-3-small's configs say under names of their own: patterns of attention, the activation's limit, muP's multipliers.
//!
//! It must not know other families. Its invariant: defaults and meanings are those of the published
//! `configuration_phi3_small.py` and `modeling_phi3_small.py` (microsoft/Phi-3-small-8k-instruct), since transformers has no
//! class for it; the pattern of blocks is that of vLLM's `blocksparse_attention/utils.py` besides.

use super::{
    super::{Activation, FeedForward, LayerConfig, Limits, SparseBlocks, bad, unsupported},
    keys::{Keys, Outcome},
};

/// `ff_intermediate_size`, or a multiple of a third of the hidden size.
pub(super) fn intermediate_size(keys: Keys<'_>, hidden_size: usize) -> Outcome<usize> {
    if let Some(size) = keys.size("ff_intermediate_size", Limits::WIDTH)? {
        return Ok(size);
    }
    let size = keys.size("ff_dim_multiplier", Limits::WIDTH)?.unwrap_or(4).saturating_mul(hidden_size / 3 * 2);
    Ok(if keys.truth("gegelu_pad_to_256")?.unwrap_or(true) { size.next_multiple_of(256) } else { size })
}

pub(super) fn activation(keys: Keys<'_>) -> Outcome<Activation> {
    match keys.text("hidden_act")?.unwrap_or("gegelu") {
        "gegelu" => Ok(Activation::Gegelu { limit: keys.number("gegelu_limit")?.unwrap_or(20.0) as f32 }),
        other => unsupported(format!("the activation {other:?} is not supported in this architecture; gegelu is")),
    }
}

/// Blocks of keys in all layers but every `dense_attention_every_n_layers`-th.
pub(super) fn layers(keys: Keys<'_>, num_layers: usize) -> Outcome<Vec<LayerConfig>> {
    let size = |key, default| -> Outcome<usize> { Ok(keys.size(key, Limits::POSITIONS)?.unwrap_or(default)) };
    let vertical_stride = size("blocksparse_vert_stride", 8)?;
    let num_heads = keys.required_size("num_attention_heads", Limits::HEADS)?;
    let is_alike = keys.truth("blocksparse_homo_head_pattern")?.unwrap_or(false);
    let blocks = SparseBlocks {
        block_size: size("blocksparse_block_size", 64)?,
        num_local_blocks: size("blocksparse_num_local_blocks", 16)?,
        vertical_stride,
        head_step: if is_alike { 0 } else { (vertical_stride / num_heads).max(1) },
    };
    // Null and zero: none is dense.
    let every = keys.count("dense_attention_every_n_layers")?.filter(|&every| every > 0);
    let is_dense = |layer: usize| every.is_some_and(|every| (layer + 1).is_multiple_of(every));
    Ok((0..num_layers)
        .map(|layer| LayerConfig {
            window: None,
            blocks: (!is_dense(layer)).then_some(blocks),
            rotary: Some(0),
            feed_forward: FeedForward::Dense,
        })
        .collect())
}

/// `mup_attn_multiplier / head_dim`, or as usual where muP's scaling is switched off.
pub(super) fn attention_scale(keys: Keys<'_>, head_dim: usize) -> Outcome<f32> {
    let head_dim = head_dim as f64;
    Ok(if keys.truth("mup_use_scaling")?.unwrap_or(true) {
        (keys.number("mup_attn_multiplier")?.unwrap_or(1.0) / head_dim) as f32
    } else {
        head_dim.sqrt().recip() as f32
    })
}

/// `mup_embedding_multiplier`, if it is above zero.
pub(super) fn embedding_scale(keys: Keys<'_>) -> Outcome<f32> {
    let absent = if keys.is_null("mup_embedding_multiplier") { 1.0 } else { 10.0 };
    let multiplier = keys.number("mup_embedding_multiplier")?.unwrap_or(absent);
    Ok(if multiplier > 0.0 { multiplier as f32 } else { 1.0 })
}

/// Logits are divided by `mup_width_multiplier`, if it is not zero.
pub(super) fn logit_scale(keys: Keys<'_>) -> Outcome<f32> {
    let absent = if keys.is_null("mup_width_multiplier") { 0.0 } else { 8.0 };
    let multiplier = keys.number("mup_width_multiplier")?.unwrap_or(absent);
    Ok(if multiplier == 0.0 { 1.0 } else { multiplier.recip() as f32 })
}

/// Rows of the published vocabulary: `cl100k_base`'s ranks, special tokens, and what fills it up.
const PUBLISHED_VOCABULARY: usize = 100_352;

/// `dummy_token_indices`: tokens that the tokenizer leaves out. Where the key is absent, those of the published tokenizer,
/// as far as the vocabulary is its.
pub(super) fn masked_tokens(keys: Keys<'_>, vocab_size: usize) -> Outcome<Vec<u32>> {
    let Some(ids) = keys.array("dummy_token_indices")? else {
        let is_absent = !keys.has("dummy_token_indices") && vocab_size == PUBLISHED_VOCABULARY;
        let published =
            [100_256].into_iter().chain(100_258..=100_260).chain(100_264..=100_265).chain(100_267..=100_351);
        return Ok(published.filter(|_| is_absent).collect());
    };
    let known = |id: u64| u32::try_from(id).ok().filter(|&id| (id as usize) < vocab_size);
    let mut tokens = Vec::with_capacity(ids.len());
    for id in ids {
        match id.as_u64().and_then(known) {
            Some(token) => tokens.push(token),
            None => return bad(format!("dummy_token_indices holds {id}; a token below {vocab_size} is expected")),
        }
    }
    tokens.sort_unstable();
    tokens.dedup();
    Ok(tokens)
}
