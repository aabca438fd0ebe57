"""Makes tests/quantized: tiny checkpoints in the published layouts of integer weights.

    golden-venv/bin/pip install compressed-tensors==0.20.0
    golden-venv/bin/python tests/golden/quantized.py

Codes, scales and zero points are random; each is packed here bit by bit as its format describes it, from outside to inside
(a value, its place, its bits), which is not how the reader goes about it. What compressed-tensors packs is held against
that package's own functions. expected.json holds for each matrix the FNV-1a hash of `scale * (code - zero)` in f32, row by
row, and the log-probabilities of transformers in f32 on exactly these weights.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve().parent.parent / "quantized"
TOKENS = [1, 7, 30, 4, 12, 12, 25, 3, 9, 18, 2, 31, 5, 6, 27, 11, 8, 20, 1]


def put(words, at, bits, value):
    """Writes `value` into bits at.. of a row of words, lowest first."""
    for bit in range(bits):
        if value >> bit & 1:
            words[(at + bit) // 32] |= np.uint32(1 << (at + bit) % 32)


def stream(rows, bits):
    """Each row as a stream of bits."""
    words = np.zeros((rows.shape[0], rows.shape[1] * bits // 32), np.uint32)
    for row, values in enumerate(rows):
        for i, value in enumerate(values):
            put(words[row], i * bits, bits, int(value))
    return words


def awq(rows):
    """Eight values a word: those numbered 0 2 4 6 1 3 5 7 one after the other."""
    words = np.zeros((rows.shape[0], rows.shape[1] // 8), np.uint32)
    for row, values in enumerate(rows):
        for word in range(len(values) // 8):
            for place, number in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                put(words[row], word * 32 + place * 4, 4, int(values[word * 8 + number]))
    return words


def tensor(array):
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array.view(np.int32) if array.dtype == np.uint32 else array)


def matrix(rng, rows, cols, layout):
    """The parts of a matrix, and what they mean in f32."""
    bits, method = layout["bits"], layout["method"]
    group = cols if layout["group"] == -1 else layout["group"]
    groups = -(-cols // group)
    index = np.arange(cols) // group
    if layout.get("act_order"):
        index = rng.permutation(index)
    codes = rng.integers(0, 1 << bits, (rows, cols))
    middle = 1 << (bits - 1)
    symmetric = layout["symmetric"]
    low = 1 if layout.get("plus") else 0
    zeros = np.full((rows, groups), middle) if symmetric else rng.integers(low, 1 << bits, (rows, groups))
    scales = torch.from_numpy(rng.uniform(0.5, 1.5, (rows, groups)) * 0.35 / (1 << bits)).to(layout["scales"])
    means = scales.float().numpy()[:, index] * (codes - zeros[:, index]).astype(np.float32)
    if method == "gptq":
        parts = {
            "qweight": tensor(stream(codes, bits).T),
            "qzeros": tensor(stream((zeros - layout["plus"]).T, bits)),
            "scales": scales.T.contiguous(),
            "g_idx": tensor(index.astype(np.int32)),
        }
    elif method == "awq":
        parts = {"qweight": tensor(awq(codes.T)), "qzeros": tensor(awq(zeros.T)), "scales": scales.T.contiguous()}
    else:
        signed = torch.from_numpy((codes - middle).astype(np.int8))
        signed_zeros = torch.from_numpy((zeros - middle).astype(np.int8))
        parts = {"weight_scale": scales}
        if layout["format"] == "pack-quantized":
            parts["weight_packed"] = tensor(stream(codes, bits))
            assert torch.equal(parts["weight_packed"], pack_to_int32(signed, bits))
            parts["weight_shape"] = torch.tensor([rows, cols], dtype=torch.int64)
            if not symmetric:
                parts["weight_zero_point"] = tensor(stream(zeros.T, bits).T)
                assert torch.equal(parts["weight_zero_point"], pack_to_int32(signed_zeros, bits, packed_dim=0))
        else:
            parts["weight"] = signed
            if not symmetric:
                parts["weight_zero_point"] = signed_zeros
    return parts, means.astype(np.float32)


def gptq(bits, group, symmetric=True, plus=1, **keys):
    return {"method": "gptq", "bits": bits, "group": group, "symmetric": symmetric, "plus": plus,
            "scales": torch.float16, **keys}


def compressed(bits, group, form, symmetric=True):
    return {"method": "compressed-tensors", "bits": bits, "group": group, "symmetric": symmetric, "format": form,
            "scales": torch.bfloat16}


# `kept` is in how many bits a code is kept by the cpu backend; 0 where it is unpacked.
LAYOUTS = {
    "gptq4": gptq(4, 32, kept=4),
    "gptq4-asymmetric": gptq(4, 64, symmetric=False, kept=5),
    "gptq4-v2-row": gptq(4, -1, plus=0, kept=4, inner=112),
    "gptq4-act-order": gptq(4, 32, act_order=True, kept=0),
    "gptq8": gptq(8, 32, kept=8),
    "gptq3": gptq(3, 32, symmetric=False, kept=4),
    "gptq2": gptq(2, 32, symmetric=False, plus=0, kept=4),
    "awq": {"method": "awq", "bits": 4, "group": 32, "symmetric": False, "scales": torch.float16, "kept": 5},
    "w4a16": {**compressed(4, 32, "pack-quantized"), "kept": 4},
    "w4a16-asymmetric": {**compressed(4, 32, "pack-quantized", symmetric=False), "kept": 5},
    "w8a16": {**compressed(8, -1, "pack-quantized"), "kept": 8},
    "w8a8": {**compressed(8, -1, "int-quantized"), "kept": 8},
}


def quantization_config(layout):
    method, bits, group = layout["method"], layout["bits"], layout["group"]
    if method == "gptq":
        return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": layout["symmetric"],
                "desc_act": bool(layout.get("act_order")), "checkpoint_format": "gptq" if layout["plus"] else "gptq_v2"}
    if method == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True,
                "modules_to_not_convert": ["lm_head"]}
    weights = {"num_bits": bits, "type": "int", "symmetric": layout["symmetric"],
               "strategy": "channel" if group == -1 else "group", "group_size": None if group == -1 else group}
    return {"quant_method": "compressed-tensors", "format": layout["format"], "quantization_status": "compressed",
            "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}}, "ignore": ["lm_head"]}


def fnv(array):
    value = 0xCBF29CE484222325
    for byte in array.tobytes():
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def main():
    expected = {}
    for seed, (name, layout) in enumerate(LAYOUTS.items()):
        rng = np.random.default_rng(seed + 1)
        # 96 inputs are no multiple of 64, and 112 none of 32.
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=64, intermediate_size=layout.get("inner", 96), num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).float().eval()
        tensors, hashes = {}, {}
        with torch.no_grad():
            for key, value in model.named_parameters():
                if key.endswith("_proj.weight"):
                    parts, means = matrix(rng, *value.shape, layout)
                    module = key.removesuffix(".weight")
                    tensors |= {f"{module}.{part}": parts[part] for part in parts}
                    value.copy_(torch.from_numpy(means))
                    hashes[module.rsplit(".", 1)[1]] = fnv(means)
                else:
                    offset, width = (1.0, 0.3) if value.dim() == 1 else (0.0, 0.5)
                    stored = (torch.randn(value.shape) * width + offset).half()
                    value.copy_(stored.float())
                    tensors[key] = stored.clone()
            logprobs = model(torch.tensor([TOKENS])).logits[0, -1].double().log_softmax(-1)
        folder = HERE / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
        text = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float16",
                "quantization_config": quantization_config(layout)}
        (folder / "config.json").write_text(json.dumps(text, indent=1) + "\n")
        expected[name] = {"kept_bits": layout["kept"], "fnv1a": hashes,
                          "logprobs": [round(value, 6) for value in logprobs.tolist()]}
        print(name, (folder / "model.safetensors").stat().st_size, "bytes", expected[name]["logprobs"][:4])
    made_with = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    text = json.dumps({"made_with": made_with, "tokens": TOKENS, "layouts": expected})
    (HERE / "expected.json").write_text(text.replace('{"kept_bits"', '\n{"kept_bits"') + "\n")


if __name__ == "__main__":
    main()
