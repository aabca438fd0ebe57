"""One tiny random checkpoint a family: its configuration, and what must be felt in its results.

A family is a row of `FAMILIES`. `keys` are those of its class in transformers. `felt` names what is switched on beside the
keys that switch it off again: making the golden fails unless each changes the log-probabilities by much more than the
bound, so that no golden passes a model which leaves it out. `published` is a config.json as found on the hub before
transformers 5, which must give the same results. `twin` are the keys that llama.cpp's converter loses or llama.cpp fixes
itself: the GGUF twin's golden is made with them. `lengths` are those of the prompts; they cross blocks (16), windows and the
lengths at which rotary scaling begins.
"""

from dataclasses import dataclass, field

import torch
import transformers as tf

import phi3_small

# Specials, bytes and a few merges: tokenizer.json beside the checkpoints.
VOCAB_SIZE = 264
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LENGTHS = (3, 16, 41, 75)


@dataclass
class Family:
    config_class: type
    keys: dict
    dtype: torch.dtype = torch.bfloat16
    felt: dict = field(default_factory=dict)
    published: dict | None = None
    # Of transformers.
    attention: str = "eager"
    twin: dict | None = field(default_factory=dict)
    # Keys of config.json that the converter must find otherwise.
    convert: dict = field(default_factory=dict)
    # Why the twin differs from the checkpoint, or why there is none.
    twin_note: str = ""
    lengths: tuple = LENGTHS
    # Positions whose rows are kept beside those that every prompt keeps.
    positions: tuple = ()
    # A continuation of the prompt of this length must reach that length.
    crossing: tuple | None = None

    def config(self, overrides=None):
        return self.config_class(**{**self.keys, **(overrides or {})})


def rope(theta=10000.0, rope_type="default", **keys):
    return {"rope_type": rope_type, "rope_theta": theta, **keys}


def sizes(**keys):
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        **TOKENS,
        **keys,
    }


def older(config_class, model_type, **keys):
    """What published files have in common."""
    base = {"architectures": [config_class], "model_type": model_type, "torch_dtype": "bfloat16", "use_cache": True}
    return {**base, "transformers_version": "4.38.0", **keys}


# Distinct and uneven, growing with the wavelength as published ones do.
SHORT_FACTORS = [1.0, 1.05, 1.1, 1.25, 1.3, 1.5, 1.75, 2.0]
LONG_FACTORS = [1.0, 1.4, 2.1, 3.3, 4.5, 7.0, 9.5, 12.0]

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

FAMILIES = {
    # Untied head, grouped heads, llama3 scaling whose three regions all occur within the context.
    "tiny-llama": Family(
        tf.LlamaConfig,
        {
            **sizes(vocab_size=128, intermediate_size=128, rms_norm_eps=1e-5, tie_word_embeddings=False),
            "pad_token_id": None,
            "rope_parameters": rope(rope_type="llama3", **{**LLAMA3, "factor": 4.0, "original_max_position_embeddings": 64}),
        },
        felt={"llama3 scaling": {"rope_parameters": rope()}},
    ),
    # A sliding window much shorter than the prompt, heads wider than hidden / heads.
    "tiny-mistral": Family(
        tf.MistralConfig,
        {
            **sizes(vocab_size=128, num_hidden_layers=3, num_key_value_heads=1, head_dim=24, sliding_window=11),
            "pad_token_id": None,
            "rms_norm_eps": 1e-6,
            "rope_parameters": rope(500.0),
            "tie_word_embeddings": False,
        },
        dtype=torch.float16,
        felt={"the window": {"sliding_window": None}, "rope_theta": {"rope_parameters": rope()}},
        published=older(
            "MistralForCausalLM", "mistral", vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=1, head_dim=24, sliding_window=11, max_position_embeddings=256,
            rms_norm_eps=1e-6, rope_theta=500.0, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
            hidden_act="silu", attention_dropout=0.0, torch_dtype="float16",
        ),
        twin={"sliding_window": None},
        twin_note="llama.cpp's converter does not write a LLaMA-like model's window, and llama.cpp knows none",
        positions=(9, 10, 11, 12, 22),
    ),
    # Full attention between windows, as Ministral 8B has it; published as a Mistral with layer_types.
    "tiny-ministral": Family(
        tf.MinistralConfig,
        {
            **sizes(vocab_size=128, num_hidden_layers=3, head_dim=24, sliding_window=13),
            "pad_token_id": None,
            "rms_norm_eps": 1e-5,
            "rope_parameters": rope(2000.0),
            "tie_word_embeddings": False,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        felt={"the window": {"layer_types": ["full_attention"] * 3},
              "its layers": {"layer_types": ["sliding_attention"] * 3}},
        published=older(
            "MistralForCausalLM", "mistral", vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=24, sliding_window=13, max_position_embeddings=256,
            layer_types=["full_attention", "sliding_attention", "full_attention"], rms_norm_eps=1e-5, rope_theta=2000.0,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, hidden_act="silu", attention_dropout=0.0,
        ),
        twin=None,
        twin_note="llama.cpp's converter does not know it",
        positions=(11, 12, 13, 14, 26),
    ),
    # Biases on q, k, v and o, a tied head, linear scaling, sizes that are multiples of nothing.
    "tiny-llama-bias": Family(
        tf.LlamaConfig,
        {
            **sizes(vocab_size=101, hidden_size=36, intermediate_size=70, num_attention_heads=6, head_dim=10),
            "pad_token_id": None,
            "rms_norm_eps": 1e-5,
            "rope_parameters": rope(1000.0, "linear", factor=4.0),
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        dtype=torch.float32,
        felt={"linear scaling": {"rope_parameters": rope(1000.0)}, "rope_theta": {"rope_parameters": rope(1e4, "linear", factor=4.0)}},
    ),
    # Biases on q, k and v alone; full attention in the first layer, a window in the others.
    "tiny-qwen2": Family(
        tf.Qwen2Config,
        {
            **sizes(vocab_size=128, num_hidden_layers=3, use_sliding_window=True, sliding_window=9, max_window_layers=1),
            "pad_token_id": None,
            "rms_norm_eps": 1e-6,
            "rope_parameters": rope(1000.0),
            "tie_word_embeddings": True,
        },
        felt={"the window": {"use_sliding_window": False}, "its layers": {"max_window_layers": 0}},
        twin={"use_sliding_window": False},
        twin_note="llama.cpp's converter does not write Qwen's window, and llama.cpp knows none",
        positions=(7, 8, 9, 10, 18),
    ),
    # Every second layer without rotary embedding.
    "tiny-smollm3": Family(
        tf.SmolLM3Config,
        {
            **sizes(vocab_size=128, num_hidden_layers=4, no_rope_layer_interval=2),
            "rms_norm_eps": 1e-6,
            "rope_parameters": rope(1000.0),
            "tie_word_embeddings": True,
        },
        felt={"layers without rotation": {"no_rope_layer_interval": 4}},
        twin={"no_rope_layer_interval": 4},
        twin_note="llama.cpp leaves out the rotation of every fourth layer, whatever the config says",
    ),
    # As many key heads as query heads, an inner width (112) that is no multiple of a group.
    "tiny-llama2": Family(
        tf.LlamaConfig,
        {**sizes(intermediate_size=112, num_key_value_heads=4, rms_norm_eps=1e-5), "rope_parameters": rope(), "tie_word_embeddings": False},
        dtype=torch.float16,
        felt={"epsilon": {"rms_norm_eps": 1e-1}},
        published=older(
            "LlamaForCausalLM", "llama", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=112, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=256, rms_norm_eps=1e-5, rope_scaling=None, pretraining_tp=1,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, hidden_act="silu", torch_dtype="float16",
            initializer_range=0.02,
        ),
    ),
    "tiny-llama31": Family(
        tf.LlamaConfig,
        {**sizes(rms_norm_eps=1e-5), "rope_parameters": rope(rope_type="llama3", **LLAMA3), "tie_word_embeddings": False},
        felt={"llama3 scaling": {"rope_parameters": rope()}, "its ramp": {"rope_parameters": rope(rope_type="llama3", **{**LLAMA3, "high_freq_factor": 1.5})}},
        published=older(
            "LlamaForCausalLM", "llama", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=10000.0,
            rope_scaling={**LLAMA3, "rope_type": "llama3"}, attention_bias=False, mlp_bias=False, pretraining_tp=1,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=[2, 3], hidden_act="silu", attention_dropout=0.0,
        ),
    ),
    # A tied head and a factor of 32.
    "tiny-llama32": Family(
        tf.LlamaConfig,
        {
            **sizes(rms_norm_eps=1e-5, head_dim=16),
            "rope_parameters": rope(500000.0, "llama3", **{**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 48}),
            "tie_word_embeddings": True,
        },
        felt={"llama3 scaling": {"rope_parameters": rope(500000.0)}},
    ),
    "tiny-mixtral": Family(
        tf.MixtralConfig,
        {
            **sizes(intermediate_size=32, num_local_experts=5, num_experts_per_tok=2, rms_norm_eps=1e-5, sliding_window=None),
            "rope_parameters": rope(1e6),
            "tie_word_embeddings": False,
        },
        felt={"two experts a token": {"num_experts_per_tok": 1}},
        published=older(
            "MixtralForCausalLM", "mixtral", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=1e6,
            num_local_experts=5, num_experts_per_tok=2, output_router_logits=False, router_aux_loss_coef=0.02,
            sliding_window=None, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, hidden_act="silu", attention_dropout=0.0,
        ),
    ),
    # One key head for all, attention and MLP side by side after one norm.
    "tiny-falcon-7b": Family(
        tf.FalconConfig,
        {
            "vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **TOKENS,
            "multi_query": True, "parallel_attn": True, "bias": False, "rope_parameters": rope(), "max_position_embeddings": 256,
        },
        felt={"side by side": {"parallel_attn": False}, "the activation": {"activation": "relu"}, "rotation": {"rope_parameters": rope(100.0)}},
        published=older(
            "FalconForCausalLM", "falcon", vocab_size=VOCAB_SIZE, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
            alibi=False, apply_residual_connection_post_layernorm=False, attention_dropout=0.0, bias=False, bos_token_id=1,
            eos_token_id=2, hidden_dropout=0.0, initializer_range=0.02, layer_norm_epsilon=1e-5, multi_query=True,
            new_decoder_architecture=False, parallel_attn=True,
        ),
        # transformers 5 fills the key in with the number of heads; with older ones the converter found it absent.
        convert={"num_kv_heads": 1},
    ),
    # Groups of heads interleaved in one matrix, a norm each for attention and MLP, an untied head.
    "tiny-falcon-40b": Family(
        tf.FalconConfig,
        {
            "vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_kv_heads": 2, **TOKENS,
            "new_decoder_architecture": True, "bias": False, "rope_parameters": rope(), "max_position_embeddings": 256,
            "tie_word_embeddings": False,
        },
        dtype=torch.float16,
        felt={"rotation": {"rope_parameters": rope(100.0)}},
        published=older(
            "FalconForCausalLM", "falcon", vocab_size=VOCAB_SIZE, hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
            num_kv_heads=2, alibi=False, attention_dropout=0.0, bias=False, bos_token_id=1, eos_token_id=2, hidden_dropout=0.0,
            initializer_range=0.02, layer_norm_epsilon=1e-5, multi_query=True, new_decoder_architecture=True, parallel_attn=True,
            torch_dtype="float16", tie_word_embeddings=False,
        ),
    ),
    # As 40B with one norm for both.
    "tiny-falcon-11b": Family(
        tf.FalconConfig,
        {
            "vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, **TOKENS,
            "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "bias": False, "rope_parameters": rope(),
            "max_position_embeddings": 256, "layer_norm_epsilon": 1e-3,
        },
        felt={"epsilon": {"layer_norm_epsilon": 1e-1}},
    ),
    # ALiBi with slopes that bf16 rounds (16 heads), biases everywhere, attention and MLP one after the other.
    "tiny-falcon-rw": Family(
        tf.FalconConfig,
        {
            "vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16, **TOKENS,
            "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "max_position_embeddings": 512,
            "ffn_hidden_size": 96,
        },
        # In 5.23 the plain attention adds ALiBi's biases a second time to a mask that has them already.
        attention="sdpa",
        # Positions above 256 are rounded to bf16 before they are multiplied.
        lengths=(3, 16, 41, 300),
        positions=(255, 256, 257, 290),
        felt={"ALiBi": {"alibi": False, "rope_parameters": rope(1e9)}},
        twin=None,
        twin_note="llama.cpp's converter fails on the bias of Falcon's fused projection, and llama.cpp has no ALiBi for it",
    ),
    # The norm's 1 + weight, an embedding scaled by 8, wide heads, one key head.
    "tiny-gemma": Family(
        tf.GemmaConfig,
        {**sizes(head_dim=24, num_key_value_heads=1, rms_norm_eps=1e-6), "rope_parameters": rope()},
        felt={"the activation": {"hidden_act": "silu"}},
        published=older(
            "GemmaForCausalLM", "gemma", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=1, head_dim=24, max_position_embeddings=256, rms_norm_eps=1e-6,
            rope_scaling=None, rope_theta=10000.0, hidden_act="gelu", hidden_activation=None, attention_bias=False,
            attention_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
    ),
    # Caps low enough to bend, a window in every other layer, a scale of its own, four norms a layer.
    "tiny-gemma2": Family(
        tf.Gemma2Config,
        {
            **sizes(head_dim=24, num_hidden_layers=3, intermediate_size=64, sliding_window=13, rms_norm_eps=1e-6),
            "query_pre_attn_scalar": 10, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 7.0, "rope_parameters": rope(),
        },
        felt={
            "the cap of scores": {"attn_logit_softcapping": None}, "the cap of logits": {"final_logit_softcapping": None},
            "the window": {"sliding_window": 256}, "the window's layers": {"layer_types": ["full_attention", "sliding_attention"] * 1 + ["full_attention"]},
            "the scale": {"query_pre_attn_scalar": 24},
        },
        published=older(
            "Gemma2ForCausalLM", "gemma2", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=24, max_position_embeddings=256, rms_norm_eps=1e-6,
            sliding_window=13, query_pre_attn_scalar=10, attn_logit_softcapping=2.0, final_logit_softcapping=7.0,
            rope_theta=10000.0, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", attention_bias=False,
            attention_dropout=0.0, cache_implementation="hybrid", pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        twin={"query_pre_attn_scalar": 24},
        twin_note="llama.cpp takes the width of a head for the scale of every Gemma 2 but the 27B",
        positions=(11, 12, 13, 14, 26),
    ),
    # A base and a scaling for each kind of layer, norms of queries and keys, every third layer whole.
    "tiny-gemma3": Family(
        tf.Gemma3TextConfig,
        {
            **sizes(hidden_size=48, intermediate_size=64, head_dim=16, num_hidden_layers=6, num_attention_heads=3, num_key_value_heads=1),
            "rms_norm_eps": 1e-6, "sliding_window": 12, "sliding_window_pattern": 3, "query_pre_attn_scalar": 10,
            "rope_parameters": {"full_attention": rope(20000.0, "linear", factor=8.0), "sliding_attention": rope(100.0)},
        },
        felt={
            "the window": {"sliding_window": 256}, "the pattern": {"sliding_window_pattern": 6}, "the scale": {"query_pre_attn_scalar": 16},
            "the global factor": {"rope_parameters": {"full_attention": rope(20000.0), "sliding_attention": rope(100.0)}},
            "the local base": {"rope_parameters": {"full_attention": rope(20000.0, "linear", factor=8.0), "sliding_attention": rope(20000.0)}},
        },
        published=older(
            "Gemma3ForCausalLM", "gemma3_text", vocab_size=VOCAB_SIZE, hidden_size=48, intermediate_size=64, num_hidden_layers=6,
            num_attention_heads=3, num_key_value_heads=1, head_dim=16, max_position_embeddings=256, rms_norm_eps=1e-6,
            sliding_window=12, sliding_window_pattern=3, query_pre_attn_scalar=10, attn_logit_softcapping=None,
            final_logit_softcapping=None, rope_theta=20000.0, rope_local_base_freq=100.0,
            rope_scaling={"factor": 8.0, "rope_type": "linear"}, hidden_activation="gelu_pytorch_tanh", attention_bias=False,
            attention_dropout=0.0, cache_implementation="hybrid", pad_token_id=0, bos_token_id=1, eos_token_id=[2, 3],
        ),
        twin={"query_pre_attn_scalar": 16, "sliding_window_pattern": 6},
        twin_note="llama.cpp takes the width of a head for the scale of every Gemma 3 but the 27B, and every sixth layer as whole",
        positions=(10, 11, 12, 13, 24),
    ),
    # Fused projections; longrope whose original length lies within the prompts.
    "tiny-phi3": Family(
        tf.Phi3Config,
        {
            **sizes(num_key_value_heads=4, original_max_position_embeddings=40, max_position_embeddings=160, rms_norm_eps=1e-5),
            "rope_parameters": rope(rope_type="longrope", short_factor=SHORT_FACTORS, long_factor=LONG_FACTORS, original_max_position_embeddings=40),
            "tie_word_embeddings": False,
        },
        felt={"the factors": {"rope_parameters": rope()}},
        published=older(
            "Phi3ForCausalLM", "phi3", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=160, original_max_position_embeddings=40,
            rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling={"type": "longrope", "short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS},
            sliding_window=256, hidden_act="silu", attention_bias=False, attention_dropout=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
            tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        lengths=(7, 34, 40, 41, 75),
        positions=(33, 38, 39, 40),
        crossing=(34, 44),
    ),
    "tiny-phi3-window": Family(
        tf.Phi3Config,
        {**sizes(sliding_window=13, original_max_position_embeddings=256, rms_norm_eps=1e-5), "rope_parameters": rope(), "tie_word_embeddings": False},
        dtype=torch.float16,
        felt={"the window": {"sliding_window": None}},
        twin_note="the window is in the file, but llama.cpp leaves it out ('Phi SWA is currently disabled'); the golden keeps it",
        positions=(11, 12, 13, 14, 26),
    ),
    # Three quarters of a head rotated, longrope, a tied head, grouped heads.
    "tiny-phi4-mini": Family(
        tf.Phi3Config,
        {
            **sizes(original_max_position_embeddings=40, max_position_embeddings=160, rms_norm_eps=1e-5),
            "rope_parameters": rope(
                rope_type="longrope", short_factor=SHORT_FACTORS[:6], long_factor=LONG_FACTORS[:6],
                original_max_position_embeddings=40, partial_rotary_factor=0.75,
            ),
            "tie_word_embeddings": True,
        },
        felt={"the factors": {"rope_parameters": rope(partial_rotary_factor=0.75)}, "the rotated part": {"rope_parameters": rope(partial_rotary_factor=1.0)}},
        published=older(
            "Phi3ForCausalLM", "phi3", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=160, original_max_position_embeddings=40,
            rms_norm_eps=1e-5, rope_theta=10000.0, partial_rotary_factor=0.75, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False,
            rope_scaling={"type": "longrope", "short_factor": SHORT_FACTORS[:6], "long_factor": LONG_FACTORS[:6]},
            sliding_window=256, hidden_act="silu", attention_bias=False, mlp_bias=False, attention_dropout=0.0, embd_pdrop=0.0,
            resid_pdrop=0.0, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        lengths=(7, 34, 40, 41, 75),
        positions=(33, 38, 39, 40),
        crossing=(34, 44),
    ),
    "tiny-qwen25-yarn": Family(
        tf.Qwen2Config,
        {
            **sizes(rms_norm_eps=1e-6),
            "rope_parameters": rope(10000.0, "yarn", factor=4.0, original_max_position_embeddings=64),
            "tie_word_embeddings": False,
        },
        felt={"yarn": {"rope_parameters": rope()}, "its attention factor": {"rope_parameters": rope(10000.0, "yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.0)}},
        published=older(
            "Qwen2ForCausalLM", "qwen2", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, max_window_layers=2, rms_norm_eps=1e-6,
            rope_theta=10000.0, rope_scaling={"factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn"},
            sliding_window=64, use_sliding_window=False, hidden_act="silu", attention_dropout=0.0, tie_word_embeddings=False,
            bos_token_id=1, eos_token_id=2,
        ),
    ),
    # Norms of queries and keys, wide heads.
    "tiny-qwen3": Family(
        tf.Qwen3Config,
        {**sizes(head_dim=24, rms_norm_eps=1e-6), "rope_parameters": rope(1e6), "tie_word_embeddings": True},
        dtype=torch.float16,
        felt={"rope_theta": {"rope_parameters": rope(1e3)}},
        published=older(
            "Qwen3ForCausalLM", "qwen3", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=24, max_position_embeddings=256, max_window_layers=2,
            rms_norm_eps=1e-6, rope_theta=1000000, rope_scaling=None, sliding_window=None, use_sliding_window=False,
            hidden_act="silu", attention_bias=False, attention_dropout=0.0, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
            torch_dtype="float16",
        ),
    ),
    # A shared expert behind a gate; weights of the chosen experts as they are.
    "tiny-qwen2-moe": Family(
        tf.Qwen2MoeConfig,
        {
            **sizes(intermediate_size=64, moe_intermediate_size=32, shared_expert_intermediate_size=48),
            "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": False,
            "rms_norm_eps": 1e-6, "rope_parameters": rope(1e6), "tie_word_embeddings": False,
        },
        felt={"weights as they are": {"norm_topk_prob": True}, "two experts a token": {"num_experts_per_tok": 3}},
        published=older(
            "Qwen2MoeForCausalLM", "qwen2_moe", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, max_window_layers=1, rms_norm_eps=1e-6,
            rope_theta=1000000.0, sliding_window=64, use_sliding_window=False, decoder_sparse_step=1, moe_intermediate_size=32,
            shared_expert_intermediate_size=48, norm_topk_prob=False, num_experts=5, num_experts_per_tok=2,
            output_router_logits=False, router_aux_loss_coef=0.001, hidden_act="silu", attention_dropout=0.0,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        ),
    ),
    # Experts in the second of four layers alone: every second, and the last is excepted.
    "tiny-qwen2-moe-mixed": Family(
        tf.Qwen2MoeConfig,
        {
            **sizes(hidden_size=32, num_hidden_layers=4, intermediate_size=48, moe_intermediate_size=32),
            "shared_expert_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 2,
            "mlp_only_layers": [3], "norm_topk_prob": True, "rms_norm_eps": 1e-6, "rope_parameters": rope(1e4), "tie_word_embeddings": True,
        },
        felt={"weights of sum one": {"norm_topk_prob": False}},
        twin=None,
        twin_note="llama.cpp's converter knows no name for a dense layer of this family",
    ),
    # More experts, their weights scaled to a sum of one; norms of queries and keys.
    "tiny-qwen3-moe": Family(
        tf.Qwen3MoeConfig,
        {
            **sizes(head_dim=24, intermediate_size=64, moe_intermediate_size=32, num_experts=6, num_experts_per_tok=3),
            "norm_topk_prob": True, "rms_norm_eps": 1e-6, "rope_parameters": rope(1e6), "tie_word_embeddings": False,
        },
        felt={"weights of sum one": {"norm_topk_prob": False}, "three experts a token": {"num_experts_per_tok": 2}},
        published=older(
            "Qwen3MoeForCausalLM", "qwen3_moe", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=24, max_position_embeddings=256, max_window_layers=2,
            rms_norm_eps=1e-6, rope_theta=1000000.0, rope_scaling=None, sliding_window=None, use_sliding_window=False,
            decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=32, norm_topk_prob=True, num_experts=6,
            num_experts_per_tok=3, output_router_logits=False, router_aux_loss_coef=0.001, hidden_act="silu", attention_bias=False,
            attention_dropout=0.0, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        ),
    ),
    # Frequencies that change with every token beyond 40; biases of attention and MLP.
    "tiny-llama-dynamic": Family(
        tf.LlamaConfig,
        {
            **sizes(max_position_embeddings=40, rms_norm_eps=1e-5, attention_bias=True, mlp_bias=True),
            "rope_parameters": rope(rope_type="dynamic", factor=3.0), "tie_word_embeddings": False,
        },
        felt={"dynamic scaling": {"rope_parameters": rope()}},
        twin={"rope_parameters": rope()},
        twin_note="llama.cpp's converter does not write dynamic scaling for LLaMA",
        lengths=(7, 34, 40, 41, 75),
        positions=(33, 38, 39, 40),
        crossing=(34, 44),
    ),
    # Blocks of keys that differ by head, a dense layer between, gegelu that is cut off, muP's multipliers, longrope with a
    # factor of its own in each regime, tokens that mean nothing.
    "tiny-phi3-small": Family(
        phi3_small.Phi3SmallConfig,
        {
            **{key: value for key, value in sizes(num_hidden_layers=3).items() if key != "intermediate_size"},
            "bos_token_id": None, "pad_token_id": None, "ff_intermediate_size": 96, "gegelu_limit": 1.5,
            "rope_embedding_base": 1e4, "blocksparse_block_size": 8, "blocksparse_num_local_blocks": 2,
            "blocksparse_vert_stride": 9, "blocksparse_triton_kernel_block_size": 8, "dense_attention_every_n_layers": 2,
            "mup_attn_multiplier": 3.0, "mup_embedding_multiplier": 4.0, "mup_width_multiplier": 1.5,
            "dummy_token_indices": [50, 200],
            "long_rope": {
                "type": "longrope", "short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS, "short_mscale": 1.1,
                "long_mscale": 1.35, "original_max_position_embeddings": 32,
            },
        },
        felt={
            "blocks": {"dense_attention_every_n_layers": 1},
            "dense layers": {"dense_attention_every_n_layers": None},
            "blocks by head": {"blocksparse_homo_head_pattern": True},
            "the stride": {"blocksparse_vert_stride": 1000},
            "the limit": {"gegelu_limit": 20.0},
            "attention by muP": {"mup_use_scaling": False},
            "the embedding's multiplier": {"mup_embedding_multiplier": None},
            "the logits' divisor": {"mup_width_multiplier": None},
            "longrope": {"long_rope": None},
        },
        twin=None,
        twin_note="llama.cpp's converter and llama.cpp know Phi-3 mini and medium only",
        crossing=(27, 36),
        lengths=(3, 16, 27, 41, 75, 110),
        positions=(40, 72, 80, 81, 96),
    ),
    # Wide enough for K types; committed quantised alone.
    "tiny-llama-wide": Family(
        tf.LlamaConfig,
        {
            **sizes(vocab_size=128, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_key_value_heads=1, rms_norm_eps=1e-5),
            "rope_parameters": rope(), "tie_word_embeddings": True,
        },
    ),
    # As wide, for types with code books and grids, of which there are more than a layer has matrices.
    "tiny-llama-books": Family(
        tf.LlamaConfig,
        {
            **sizes(vocab_size=128, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_key_value_heads=1, rms_norm_eps=1e-5),
            "rope_parameters": rope(), "tie_word_embeddings": True,
        },
    ),
}

# Those whose checkpoint is in the repository.
COMMITTED = [name for name in FAMILIES if name not in ("tiny-llama-wide", "tiny-llama-books")]
