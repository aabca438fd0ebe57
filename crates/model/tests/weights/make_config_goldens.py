"""Makes config_goldens.json: what transformers understands by configs of every family.

    python -m venv venv && venv/bin/pip install torch transformers==5.23.0
    venv/bin/python make_config_goldens.py > config_goldens.json

Each entry holds a config.json and what came of it: sizes, windows, scales, experts and biases as the modules have them, the
number of parameters (counted on the meta device), and inverse frequencies and attention factors as the rotary modules
compute them. The configs are the published ones, cut to keys that matter, and variants that switch on what those leave out.
"""

import itertools
import json
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def configs():
    """(name, config) pairs."""
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 256, "pad_token_id": 0}
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
              "rope_type": "llama3"}
    yield "llama-2-7b", {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "pretraining_tp": 1, "rope_scaling": None,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"}
    yield "llama-3.1-8b", {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": llama3,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009]}
    yield "llama-3.2-1b", {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": {**llama3, "factor": 32.0}, "tie_word_embeddings": True}
    yield "llama with every bias", {"model_type": "llama", **tiny, "attention_bias": True, "mlp_bias": True}
    yield "llama dynamic", {"model_type": "llama", **tiny, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    yield "llama linear, new keys", {"model_type": "llama", **tiny, "rope_parameters":
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0}}
    yield "llama, both keys", {"model_type": "llama", **tiny, "rope_theta": 30000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}
    yield "llama longrope", {"model_type": "llama", **tiny, "rope_scaling": {"rope_type": "longrope", "factor": 4.0,
        "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 64}}
    yield "llama yarn, mscale", {"model_type": "llama", **tiny, "rope_parameters": {"rope_type": "yarn", "factor": 8.0,
        "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 16, "beta_slow": 2,
        "truncate": False, "rope_theta": 10000.0}}
    yield "llama yarn, attention factor", {"model_type": "llama", **tiny, "rope_scaling": {"rope_type": "yarn",
        "factor": 8.0, "original_max_position_embeddings": 32, "attention_factor": 1.25}}
    yield "mistral-7b-v0.1", {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": False}
    yield "mistral-nemo", {"model_type": "mistral", "hidden_size": 5120, "intermediate_size": 14336, "head_dim": 128,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 131072,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": False}
    yield "mistral with layer_types", {"model_type": "mistral", **tiny, "head_dim": 16, "sliding_window": 24,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    yield "mistral without layer_types, by name", {"model_type": "mistral", **tiny, "head_dim": 16, "sliding_window": 24, "layer_types": None}
    yield "ministral", {"model_type": "ministral", **tiny, "head_dim": 24, "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    yield "ministral, no window", {"model_type": "ministral", **tiny, "head_dim": 16, "sliding_window": None}
    yield "llama yarn, truncate null", {"model_type": "llama", **tiny, "rope_parameters": {"rope_type": "yarn", "factor": 8.0,
        "original_max_position_embeddings": 32, "beta_fast": 16, "beta_slow": 2, "truncate": None, "rope_theta": 10000.0}}
    yield "gemma3 yarn, truncate", {"model_type": "gemma3_text", **tiny, "head_dim": 24,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "rope_parameters": {
        "full_attention": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 16,
            "beta_slow": 2, "truncate": False, "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
    yield "qwen2, hidden size no multiple of heads", {"model_type": "qwen2", **tiny, "hidden_size": 66}
    yield "mixtral-8x7b", {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        "max_position_embeddings": 32768, "num_experts_per_tok": 2, "num_local_experts": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0, "sliding_window": None, "output_router_logits": False,
        "router_aux_loss_coef": 0.02, "tie_word_embeddings": False}
    yield "mixtral, defaults and a window", {"model_type": "mixtral", **tiny, "sliding_window": 24}
    yield "falcon-7b", {"model_type": "falcon", "alibi": False, "apply_residual_connection_post_layernorm": False,
        "bias": False, "bos_token_id": 11, "eos_token_id": 11, "hidden_size": 4544, "layer_norm_epsilon": 1e-05,
        "multi_query": True, "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32,
        "parallel_attn": True, "vocab_size": 65024}
    yield "falcon-40b", {"model_type": "falcon", "alibi": False, "bias": False, "hidden_size": 8192,
        "layer_norm_epsilon": 1e-05, "multi_query": True, "new_decoder_architecture": True, "num_attention_heads": 128,
        "num_hidden_layers": 60, "num_kv_heads": 8, "parallel_attn": True, "vocab_size": 65024}
    yield "falcon-11b", {"model_type": "falcon", "activation": "gelu", "alibi": False, "bias": False,
        "ffn_hidden_size": 16384, "hidden_size": 4096, "layer_norm_epsilon": 1e-05, "max_position_embeddings": 8192,
        "multi_query": True, "new_decoder_architecture": True, "num_attention_heads": 32, "num_hidden_layers": 60,
        "num_kv_heads": 8, "num_ln_in_parallel_attn": 1, "parallel_attn": True, "rope_scaling": None,
        "rope_theta": 500042, "vocab_size": 65024, "tie_word_embeddings": False}
    yield "falcon-rw-1b", {"model_type": "falcon", "alibi": True, "bias": True, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_size": 2048, "layer_norm_epsilon": 1e-05, "multi_query": False, "new_decoder_architecture": False,
        "num_attention_heads": 32, "num_hidden_layers": 24, "parallel_attn": False, "vocab_size": 50304}
    yield "falcon, 12 heads with alibi", {"model_type": "falcon", "alibi": True, "bias": True, "hidden_size": 96,
        "multi_query": False, "num_attention_heads": 12, "num_hidden_layers": 2, "parallel_attn": False,
        "vocab_size": 100}
    yield "gemma-2b", {"model_type": "gemma", "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256,
        "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048, "intermediate_size": 16384,
        "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "vocab_size": 256000}
    yield "gemma-2-9b", {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 3584, "intermediate_size": 14336, "max_position_embeddings": 8192, "num_attention_heads": 16,
        "num_hidden_layers": 42, "num_key_value_heads": 8, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096, "vocab_size": 256000}
    yield "gemma-2-27b", {"model_type": "gemma2", "head_dim": 128, "hidden_size": 4608, "intermediate_size": 36864,
        "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16, "query_pre_attn_scalar": 144,
        "vocab_size": 256000}
    yield "gemma2 without caps", {"model_type": "gemma2", **tiny, "head_dim": 24, "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "query_pre_attn_scalar": 32, "sliding_window": 5, "attention_bias": True,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "tie_word_embeddings": False}
    yield "gemma-3-1b", {"model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "bos_token_id": 2, "eos_token_id": [1, 106], "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "vocab_size": 262144}
    yield "gemma-3-4b", {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106], "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
        "model_type": "gemma3_text", "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024}}
    yield "gemma3, new keys", {"model_type": "gemma3_text", **tiny, "head_dim": 24, "final_logit_softcapping": 20.0,
        "query_pre_attn_scalar": 32, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}}}
    yield "phi-3-mini-4k", {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000.0, "sliding_window": 2047, "vocab_size": 32064}
    yield "phi-3-mini-128k", {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0 + i / 64 for i in range(48)],
                         "long_factor": [1.0 + i * 1.25 for i in range(48)]},
        "sliding_window": 262144, "vocab_size": 32064}
    yield "phi-3-medium-4k", {"model_type": "phi3", "hidden_size": 5120, "intermediate_size": 17920,
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "num_attention_heads": 40,
        "num_hidden_layers": 40, "num_key_value_heads": 10, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 2047, "vocab_size": 32064}
    yield "phi-4-mini", {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "attention_bias": False,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "num_attention_heads": 24,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "partial_rotary_factor": 0.75, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48,
                         "long_factor": [1.0 + i * 1.5 for i in range(48)]},
        "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064, "eos_token_id": 199999,
        "bos_token_id": 199999}
    yield "phi3, factors given", {"model_type": "phi3", **tiny, "original_max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                            "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0],
                            "original_max_position_embeddings": 64, "attention_factor": 1.5}}
    yield "qwen2.5-7b", {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 32768, "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 152064, "bos_token_id": 151643,
        "eos_token_id": 151645}
    yield "qwen2.5 with yarn", {"model_type": "qwen2", **tiny, "rope_theta": 1000000.0, "use_sliding_window": True,
        "sliding_window": 8, "max_window_layers": 1,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn"}}
    yield "qwen3-0.6b", {"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936}
    yield "qwen3, defaults", {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 32, "vocab_size": 100, "attention_bias": True}
    yield "qwen1.5-moe-a2.7b", {"model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_size": 2048,
        "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936}
    yield "qwen2_moe, mixed", {"model_type": "qwen2_moe", **tiny, "num_hidden_layers": 4, "decoder_sparse_step": 2,
        "mlp_only_layers": [1], "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48, "norm_topk_prob": True, "qkv_bias": False, "use_sliding_window": True,
        "sliding_window": 7, "max_window_layers": 3}
    yield "qwen3-30b-a3b", {"model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1,
        "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936}
    yield "qwen3_moe, a window and one dense layer", {"model_type": "qwen3_moe", **tiny, "mlp_only_layers": [0],
        "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "use_sliding_window": True,
        "sliding_window": 7}
    yield "smollm3-3b", {"model_type": "smollm3", "attention_bias": False, "bos_token_id": None,
        "eos_token_id": 128012, "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 65536,
        "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4, "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256}
    yield "smollm3 with windows", {"model_type": "smollm3", **tiny, "num_hidden_layers": 4, "mlp_bias": True,
        "use_sliding_window": True, "sliding_window": 6, "no_rope_layer_interval": 2}


def samples(values):
    n = len(values)
    return [[i, float(values[i])] for i in sorted({0, 1, n // 3, n // 2, n - 1})]


def rotary(config, layer_type):
    """What the rotary module holds: scalings that depend on the length at the original length and far beyond."""
    module = transformers_rotary(config)
    if layer_type is None:
        inv_freq, scaling, parameters = module.inv_freq, module.attention_scaling, config.rope_parameters
        kind = module.rope_type
    else:
        inv_freq = getattr(module, f"{layer_type}_inv_freq")
        scaling = getattr(module, f"{layer_type}_attention_scaling")
        parameters, kind = config.rope_parameters[layer_type], module.rope_type[layer_type]
    entry = {"kind": kind, "num_pairs": len(inv_freq), "theta": float(parameters["rope_theta"]),
             "inverse_frequencies": samples(inv_freq), "attention_factor": float(scaling)}
    if kind in ("longrope", "dynamic"):
        length = 4 * max(config.max_position_embeddings, parameters.get("original_max_position_embeddings", 0))
        far, _ = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=length, layer_type=layer_type)
        entry["far_length"], entry["far_inverse_frequencies"] = length, samples(far)
        entry["original"] = int(parameters.get("original_max_position_embeddings", config.max_position_embeddings))
    return entry


def transformers_rotary(config):
    module = sys.modules[AutoModelForCausalLM._model_mapping[type(config)].__module__]
    name = next(name for name in dir(module) if name.endswith("RotaryEmbedding") and "Vision" not in name)
    return getattr(module, name)(config)


def describe(config):
    """config: of the language model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = model.transformer.h if config.model_type == "falcon" else model.model.layers
    names = dict(model.named_parameters())
    falcon = config.model_type == "falcon"
    entry = {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_layers": len(layers),
        "num_heads": config.num_attention_heads,
        "num_kv_heads": layers[0].self_attention.num_kv_heads if falcon else config.num_key_value_heads,
        "head_dim": layers[0].self_attention.head_dim if falcon else layers[0].self_attn.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "tied": bool(config.tie_word_embeddings),
        "eps": float(config.layer_norm_epsilon if falcon else config.rms_norm_eps),
        "attention_scale": layers[0].self_attention.inv_norm_factor if falcon else float(layers[0].self_attn.scaling),
        "qkv_bias": any(n.endswith(("q_proj.bias", "query_key_value.bias")) for n in names),
        "output_bias": any(n.endswith(("o_proj.bias", "self_attention.dense.bias")) for n in names),
        "mlp_bias": any(n.endswith(("up_proj.bias", "dense_h_to_4h.bias")) for n in names),
        "query_key_norm": any(n.endswith("q_norm.weight") for n in names),
        "norms_in_layer": sum(n.startswith(("model.layers.0.", "transformer.h.0.")) and n.endswith("weight")
                              and "q_norm" not in n and "k_norm" not in n
                              and ("layernorm" in n or "ln_" in n) for n in names),
        "embedding_scale": float(getattr(getattr(model, "model", None), "embed_tokens", None).scalar_embed_scale)
        if config.model_type.startswith("gemma") else 1.0,
        "attention_soft_cap": getattr(config, "attn_logit_softcapping", None) if config.model_type == "gemma2" else None,
        "logit_soft_cap": getattr(config, "final_logit_softcapping", None),
        "bos": config.bos_token_id,
        "eos": config.eos_token_id,
        "layers": [],
    }
    if falcon:
        entry["parallel"] = bool(config.parallel_attn)
        entry["activation"] = config.activation
    else:
        entry["activation"] = getattr(config, "hidden_activation", None) or config.hidden_act
    if falcon and config.alibi:
        from transformers.models.falcon.modeling_falcon import build_alibi_tensor
        alibi = build_alibi_tensor(torch.ones(1, 200), config.num_attention_heads, torch.float32)
        entry["alibi_at_1"] = (alibi / (config.head_dim ** 0.5))[:, 0, 1].tolist()
    for index, layer in enumerate(layers):
        mlp = layer.mlp
        experts = getattr(mlp, "experts", None)
        attention = layer.self_attention if falcon else layer.self_attn
        types = getattr(config, "layer_types", None)
        if config.model_type in ("mistral", "mixtral", "phi3"):
            window = config.sliding_window
        elif config.model_type == "qwen2_moe":
            window = config.sliding_window if types[index] == "sliding_attention" else None
        else:
            window = getattr(attention, "sliding_window", None)
        kind = types[index] if config.model_type == "gemma3_text" else None
        rotates = not (falcon and config.alibi) and bool(getattr(attention, "use_rope", True))
        entry["layers"].append({
            "window": window,
            "rotary": (kind or "all") if rotates else None,
            "experts": None if experts is None else {
                "num": experts.num_experts, "per_token": mlp.gate.top_k, "width": experts.intermediate_dim,
                "normalized": bool(getattr(mlp.gate, "norm_topk_prob", True)),
                "shared": mlp.shared_expert.intermediate_size if hasattr(mlp, "shared_expert") else None},
        })
    kinds = {layer["rotary"] for layer in entry["layers"]} - {None}
    # Runs of equal layers: [how many, layer].
    entry["layers"] = [[len(list(run)), layer] for layer, run in itertools.groupby(entry["layers"])]
    entry["rotaries"] = {kind: rotary(config, None if kind == "all" else kind) for kind in sorted(kinds)}
    return entry


def main():
    goldens = []
    for name, config in configs():
        # What AutoConfig.from_pretrained does.
        kind = "ministral" if config["model_type"] == "mistral" and "layer_types" in config else config["model_type"]
        loaded = AutoConfig.for_model(kind, **{
            key: json.loads(json.dumps(value)) for key, value in config.items() if key != "model_type"})
        text = loaded.get_text_config()
        entry = describe(text)
        if loaded is not text:
            entry["tied"], entry["eos"] = bool(loaded.tie_word_embeddings), loaded.eos_token_id
        goldens.append({"name": name, "config": config, "expected": entry})
    head = {"made by": "make_config_goldens.py", "transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({**head, "goldens": goldens}, indent=None, separators=(",", ":")).replace('{"name"', '\n{"name"'))


main()
