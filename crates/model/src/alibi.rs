//! Attention with linear biases: from a family's slopes to what is added to each score.
//!
//! It knows heads and positions, not scores. The only family here that has them is Falcon, whose code (transformers'
//! `build_alibi_tensor`) makes them in bfloat16, and models were trained so: the product of slope and position is rounded
//! to 8 bits, which is far from linear. Invariant: a bias depends on its head and the key's position alone.

use half::bf16;

use crate::{config::DecoderConfig, error::ModelError};

/// Added to the scaled scores of head number `head` with the key at `position`; the configuration has ALiBi.
pub(crate) fn bias(config: &DecoderConfig, head: usize, position: usize) -> f32 {
    let slopes = config.alibi.as_ref().map_or(&[][..], |alibi| &alibi.slopes);
    let round = |x: f32| bf16::from_f32(x).to_f32();
    // The slope as the code has it, before scores are scaled: a number of bfloat16, which rounding brings back exactly.
    let slope = round(slopes[head] / config.attention_scale);
    round(slope * round(position as f32)) * config.attention_scale
}

/// All of them, `[num_heads, num_positions]`, in place of what was there. An error where there is no memory for them.
pub(crate) fn fill(config: &DecoderConfig, num_positions: usize, biases: &mut Vec<f32>) -> Result<(), ModelError> {
    biases.clear();
    let len = config.num_heads.saturating_mul(num_positions);
    biases.try_reserve_exact(len).map_err(|_| {
        ModelError::OutOfMemory(format!(
            "no memory for {len} ALiBi biases ({} heads, {num_positions} positions): lower --max-model-len",
            config.num_heads
        ))
    })?;
    for head in 0..config.num_heads {
        biases.extend((0..num_positions).map(|position| bias(config, head, position)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Alibi, decoder::tests::small_config};

    #[test]
    fn products_are_rounded_to_eight_bits() {
        let slope = bf16::from_f32(std::f32::consts::FRAC_1_SQRT_2).to_f32();
        assert_eq!(slope, 0.707_031_25);
        let config = DecoderConfig { alibi: Some(Alibi { slopes: vec![slope * 0.5; 4] }), ..small_config() };
        let mut biases = Vec::new();
        fill(&config, 128, &mut biases).unwrap();
        assert_eq!(biases.len(), 4 * 128);
        // 0.70703125 * 3 = 2.12109375, between 2.109375 and 2.125; * 75 = 53.02734375, between 53 and 53.25.
        assert_eq!((biases[0], biases[128 + 3], biases[75]), (0.0, 2.125 * 0.5, 53.0 * 0.5));
    }
}
