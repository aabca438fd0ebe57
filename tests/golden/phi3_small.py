"""Phi-3-small, for which transformers has no class: a naive model of it, registered under its published names.

Written from what microsoft/Phi-3-small-8k-instruct publishes (configuration_phi3_small.py, modeling_phi3_small.py and
positional_embedding.py, Hugging Face) and from vLLM's phi3_small.py and blocksparse_attention/utils.py, which describe the
same independently. Everything is computed as it is defined: whole matrices of scores, a mask of tokens made from a matrix
of blocks, heads cut out of the fused projection one by one. There is no cache.
"""

import math

import torch
import transformers as tf
from torch import nn


class Phi3SmallConfig(tf.PretrainedConfig):
    model_type = "phi3small"

    def __init__(
        self,
        vocab_size=100352,
        max_position_embeddings=8192,
        rope_embedding_base=10**6,
        rope_position_scale=1.0,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        hidden_act="gegelu",
        gegelu_limit=20.0,
        ff_intermediate_size=None,
        blocksparse_homo_head_pattern=False,
        blocksparse_block_size=64,
        blocksparse_num_local_blocks=16,
        blocksparse_vert_stride=8,
        layer_norm_epsilon=1e-5,
        mup_use_scaling=True,
        mup_width_multiplier=8.0,
        mup_embedding_multiplier=10.0,
        mup_attn_multiplier=1.0,
        dense_attention_every_n_layers=None,
        dummy_token_indices=None,
        long_rope=None,
        **kwargs,
    ):
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        self.rope_embedding_base, self.rope_position_scale = rope_embedding_base, rope_position_scale
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.hidden_act, self.gegelu_limit, self.ff_intermediate_size = hidden_act, gegelu_limit, ff_intermediate_size
        self.blocksparse_homo_head_pattern = blocksparse_homo_head_pattern
        self.blocksparse_block_size = blocksparse_block_size
        self.blocksparse_num_local_blocks = blocksparse_num_local_blocks
        self.blocksparse_vert_stride = blocksparse_vert_stride
        self.layer_norm_epsilon = layer_norm_epsilon
        self.mup_use_scaling, self.mup_attn_multiplier = mup_use_scaling, mup_attn_multiplier
        self.mup_width_multiplier, self.mup_embedding_multiplier = mup_width_multiplier, mup_embedding_multiplier
        self.dense_attention_every_n_layers = dense_attention_every_n_layers
        self.dummy_token_indices = dummy_token_indices
        # The published key is rope_scaling, which transformers 5 would rewrite: it is put back where the file is written.
        self.long_rope = long_rope
        super().__init__(**{"tie_word_embeddings": True, **kwargs})


def published(config):
    """The config.json as published files have it."""
    config = {key: value for key, value in config.items() if value is not None}
    if "long_rope" in config:
        config["rope_scaling"] = config.pop("long_rope")
    return config


def block_mask(config, head, length):
    """[length, length], true where a token is seen, causality aside: a matrix of blocks, each spread over its tokens."""
    size, stride = config.blocksparse_block_size, config.blocksparse_vert_stride
    step = 0 if config.blocksparse_homo_head_pattern else max(1, int(stride / config.num_attention_heads))
    num_blocks = -(-length // size)
    blocks = torch.zeros(num_blocks, num_blocks)
    for query in range(num_blocks):
        for key in range(query + 1):
            is_local = query - key < config.blocksparse_num_local_blocks
            blocks[query, key] = is_local or (key + head * step + 1) % stride == 0
    return torch.kron(blocks, torch.ones(size, size))[:length, :length].bool()


def rotated(x, config):
    """x: [tokens, head_dim], all of them, from position 0."""
    length, dim = x.shape
    divisors, factor = torch.ones(dim // 2, dtype=torch.float64), 1.0
    if config.long_rope:
        kind = "long" if length > config.long_rope["original_max_position_embeddings"] else "short"
        divisors = torch.tensor(config.long_rope[f"{kind}_factor"], dtype=torch.float64)
        factor = config.long_rope[f"{kind}_mscale"]
    frequencies = 1.0 / (divisors * config.rope_embedding_base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
    positions = torch.arange(length, dtype=torch.float64) / config.rope_position_scale
    angles = positions[:, None] * frequencies
    cos, sin = (factor * angles.cos()).to(x.dtype), (factor * angles.sin()).to(x.dtype)
    first, second = x[:, : dim // 2], x[:, dim // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def gegelu(x, limit):
    """Even columns through x sigmoid(1.702 x), odd ones linear."""
    gate, linear = x[..., ::2], x[..., 1::2]
    gate = torch.where(torch.isinf(gate), gate, gate.clamp(max=limit))
    linear = torch.where(torch.isinf(linear), linear, linear.clamp(min=-limit, max=limit))
    return gate * torch.sigmoid(1.702 * gate) * (linear + 1)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        every = config.dense_attention_every_n_layers
        self.is_dense = bool(every) and (layer + 1) % every == 0
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.query_key_value = nn.Linear(config.hidden_size, heads * self.head_dim)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        config, length = self.config, x.shape[0]
        per_group = config.num_attention_heads // config.num_key_value_heads
        # Groups one after the other, each its queries, its key, its value.
        heads = self.query_key_value(x).split(self.head_dim, dim=-1)
        scale = config.mup_attn_multiplier / self.head_dim if config.mup_use_scaling else 1 / math.sqrt(self.head_dim)
        causal = torch.ones(length, length).tril().bool()
        attended = []
        for group in range(config.num_key_value_heads):
            *queries, key, value = heads[group * (per_group + 2) : (group + 1) * (per_group + 2)]
            key = rotated(key, config)
            for query in queries:
                scores = rotated(query, config) @ key.T * scale
                seen = causal if self.is_dense else causal & block_mask(config, len(attended), length)
                attended.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value)
        return self.dense(torch.cat(attended, dim=-1))


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.limit = config.gegelu_limit
        self.up_proj = nn.Linear(config.hidden_size, 2 * config.ff_intermediate_size)
        self.down_proj = nn.Linear(config.ff_intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(gegelu(self.up_proj(x), self.limit))


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, layer), Mlp(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, layer) for layer in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)


class Phi3SmallForCausalLM(tf.PreTrainedModel):
    config_class = Phi3SmallConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, use_cache=False):
        assert input_ids.shape[0] == 1 and not use_cache
        config = self.config
        x = self.model.embed_tokens(input_ids[0])
        if config.mup_embedding_multiplier is not None and config.mup_embedding_multiplier > 0.0:
            x = x * config.mup_embedding_multiplier
        for layer in self.model.layers:
            x = layer(x)
        logits = self.lm_head(self.model.final_layernorm(x))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if config.mup_width_multiplier:
            logits = logits / config.mup_width_multiplier
        if config.dummy_token_indices:
            logits[:, config.dummy_token_indices] = torch.finfo(torch.float32).min
        return tf.modeling_outputs.CausalLMOutput(logits=logits[None])


tf.AutoConfig.register("phi3small", Phi3SmallConfig)
tf.AutoModelForCausalLM.register(Phi3SmallConfig, Phi3SmallForCausalLM)
