//! Tensor names of adapters: a half of a pair, something to leave alone, or a reason to refuse.
//!
//! peft: `base_model.model.` + module + `.lora_A.weight` (with the adapter's name before `weight` where a training script
//! saved the state itself). llama.cpp: module + `.weight.lora_a`. It must not know which modules a base has. Its invariant: a
//! tensor that takes part in what peft or llama.cpp computes is never left alone.

/// Which matrix of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    /// `[rank, inputs]`.
    A,
    /// `[outputs, rank]`.
    B,
}

/// What a tensor is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Named<'a> {
    /// A half of a module's pair; `adapter` where the name tells it.
    Half { module: &'a str, half: Half, adapter: Option<&'a str> },
    /// A module's own weight, saved along with its pair (peft does so for the head).
    BaseCopy { module: &'a str },
    /// Something else, and what to do about it.
    Other(&'static str),
}

const EMBEDDINGS: &str = "an adapter of the embeddings, which is not supported; train without embed_tokens among the target \
                          modules, or merge the adapter into its base with peft's merge_and_unload";
const TOKENS: &str = "embeddings of some tokens, trained along, which is not supported; merge the adapter into its base with \
                      peft's merge_and_unload, and serve the result as a model";
const DORA: &str = "a magnitude of DoRA, which is not supported; merge the adapter into its base with peft's merge_and_unload, \
                    and serve the result as a model";
const BIAS: &str = "a bias, and biases cannot be adapted; train with bias \"none\" and without lora_bias, or merge the adapter \
                    into its base with peft's merge_and_unload";
const WHOLE: &str = "neither lora_A nor lora_B of a module: modules trained whole (modules_to_save, resized embeddings) are not \
                     low-rank; merge the adapter into its base with peft's merge_and_unload, and serve the result as a model";
const GGUF_OTHER: &str = "neither lora_a nor lora_b of a matrix; norms and other tensors cannot be adapted: merge the adapter into \
                          its base with llama-export-lora, and serve the result as a model";

/// In a file of peft's.
pub(super) fn in_peft(name: &str) -> Named<'_> {
    let name = without_wrapper(name);
    if name.contains("lora_embedding_") {
        return Named::Other(EMBEDDINGS);
    }
    if name.contains("trainable_tokens") {
        return Named::Other(TOKENS);
    }
    if name.contains("lora_magnitude_vector") {
        return Named::Other(DORA);
    }
    for (mark, half) in [(".lora_A.", Half::A), (".lora_B.", Half::B)] {
        let Some((module, rest)) = name.rsplit_once(mark) else { continue };
        let (adapter, last) = match rest.split_once('.') {
            None => (None, rest),
            Some((adapter, last)) => (Some(adapter), last),
        };
        match last {
            "weight" => return Named::Half { module, half, adapter },
            "bias" => return Named::Other(BIAS),
            _ => {}
        }
    }
    if name.rsplit('.').next() == Some("bias") {
        return Named::Other(BIAS);
    }
    match name.strip_suffix(".base_layer.weight") {
        Some(module) => Named::BaseCopy { module },
        None => Named::Other(WHOLE),
    }
}

/// The name without what peft's own classes put before it.
fn without_wrapper(name: &str) -> &str {
    name.strip_prefix("base_model.model.").unwrap_or(name)
}

/// In a file of llama.cpp's converter.
pub(super) fn in_gguf(name: &str) -> Named<'_> {
    for (end, half) in [(".weight.lora_a", Half::A), (".weight.lora_b", Half::B)] {
        if let Some(module) = name.strip_suffix(end) {
            return match module {
                "token_embd" => Named::Other(EMBEDDINGS),
                _ => Named::Half { module, half, adapter: None },
            };
        }
    }
    Named::Other(GGUF_OTHER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_told_with_and_without_prefix_and_adapter() {
        let half = |module, half, adapter| Named::Half { module, half, adapter };
        let q = "model.layers.0.self_attn.q_proj";
        for (name, expected) in [
            ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", half(q, Half::A, None)),
            (
                "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight",
                half(q, Half::B, Some("default")),
            ),
            ("model.layers.0.self_attn.q_proj.lora_B.weight", half(q, Half::B, None)),
            ("base_model.model.lm_head.lora_A.weight", half("lm_head", Half::A, None)),
            ("base_model.model.lm_head.base_layer.weight", Named::BaseCopy { module: "lm_head" }),
            ("base_model.model.model.embed_tokens.lora_embedding_A", Named::Other(EMBEDDINGS)),
            ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", Named::Other(TOKENS)),
            ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", Named::Other(DORA)),
            (
                "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight",
                Named::Other(DORA),
            ),
            ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", Named::Other(BIAS)),
            ("base_model.model.model.layers.0.self_attn.q_proj.bias", Named::Other(BIAS)),
            ("base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias", Named::Other(BIAS)),
            ("base_model.model.lm_head.weight", Named::Other(WHOLE)),
            ("base_model.model.model.layers.0.self_attn.q_proj.lora_A", Named::Other(WHOLE)),
            ("base_model.model.model.layers.0.self_attn.q_proj.lora_diag.default", Named::Other(WHOLE)),
            ("", Named::Other(WHOLE)),
        ] {
            assert_eq!(in_peft(name), expected, "{name}");
        }
    }

    #[test]
    fn gguf_halves_are_told() {
        assert_eq!(
            in_gguf("blk.3.attn_q.weight.lora_a"),
            Named::Half { module: "blk.3.attn_q", half: Half::A, adapter: None }
        );
        assert_eq!(in_gguf("output.weight.lora_b"), Named::Half { module: "output", half: Half::B, adapter: None });
        assert_eq!(in_gguf("token_embd.weight.lora_a"), Named::Other(EMBEDDINGS));
        assert_eq!(in_gguf("blk.3.attn_norm.weight"), Named::Other(GGUF_OTHER));
    }
}
