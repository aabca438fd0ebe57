"""Writes tiny.gguf with the Python `gguf` package (made with gguf 0.19.0, numpy 2.4.6): a file by an independent writer.

    python -m venv venv && venv/bin/pip install gguf==0.19.0 && venv/bin/python make_tiny_gguf.py tiny.gguf

A two-layer model of the llama architecture whose tensors are stored in every format that the writer can make, with
metadata of every kind, and one tensor of random Q6_K blocks that no role uses.
"""

import sys

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, INNER, VOCAB, LAYERS = 32, 2, 1, 32, 24, 2
HEAD_DIM = HIDDEN // HEADS
T = gguf.GGMLQuantizationType

rng = np.random.default_rng(2)
writer = gguf.GGUFWriter(sys.argv[1], "llama")
writer.add_block_count(LAYERS)
writer.add_context_length(128)
writer.add_embedding_length(HIDDEN)
writer.add_feed_forward_length(INNER)
writer.add_head_count(HEADS)
writer.add_head_count_kv(KV_HEADS)
writer.add_rope_freq_base(50000.0)
writer.add_rope_dimension_count(HEAD_DIM)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(VOCAB)
writer.add_tokenizer_model("gpt2")
writer.add_token_list([f"token {i} é" for i in range(VOCAB)])
writer.add_token_types([3, 3] + [1] * (VOCAB - 2))
writer.add_token_scores([i / 4 for i in range(VOCAB)])
writer.add_bos_token_id(1)
writer.add_eos_token_id(2)
writer.add_eot_token_id(5)
writer.add_uint8("test.u8", 255)
writer.add_int8("test.i8", -128)
writer.add_uint16("test.u16", 65535)
writer.add_int16("test.i16", -32768)
writer.add_int32("test.i32", -5)
writer.add_uint64("test.u64", 2**64 - 1)
writer.add_int64("test.i64", -(2**63))
writer.add_float64("test.f64", 0.1)
writer.add_bool("test.bool", True)
writer.add_array("test.bools", [True, False])


def add(name, rows, cols, kind):
    data = rng.standard_normal((rows, cols) if rows else (cols,)).astype(np.float32)
    if kind == T.F32:
        writer.add_tensor(name, data)
    else:
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)


add("token_embd.weight", VOCAB, HIDDEN, T.Q8_0)
for layer in range(LAYERS):
    prefix = f"blk.{layer}."
    add(prefix + "attn_norm.weight", 0, HIDDEN, T.F32)
    add(prefix + "attn_q.weight", HIDDEN, HIDDEN, T.Q4_0)
    add(prefix + "attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN, T.Q4_1)
    add(prefix + "attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN, T.Q5_0)
    add(prefix + "attn_output.weight", HIDDEN, HIDDEN, T.Q5_1)
    add(prefix + "ffn_norm.weight", 0, HIDDEN, T.F32)
    add(prefix + "ffn_gate.weight", INNER, HIDDEN, T.F16)
    add(prefix + "ffn_up.weight", INNER, HIDDEN, T.BF16 if layer else T.Q4_1)
    add(prefix + "ffn_down.weight", HIDDEN, INNER, T.F16 if layer else T.Q8_0)
add("output_norm.weight", 0, HIDDEN, T.F32)
writer.add_tensor("rope_freqs.weight", np.linspace(1, 4, HEAD_DIM // 2, dtype=np.float32))
writer.add_tensor("unused", rng.integers(0, 256, (1, 210), dtype=np.uint8), raw_dtype=T.Q6_K)

writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
