"""Makes tests/quantized: tiny checkpoints in the published layouts of integer weights.

    golden-venv/bin/pip install compressed-tensors==0.20.0 auto-round==0.16.1
    golden-venv/bin/pip install --no-deps auto-gptq==0.7.1
    golden-venv/bin/python tests/golden/quantized.py [NAME ...]

Codes, scales and zero points are random; each is packed here bit by bit as its format describes it, from outside to inside
(a value, its place, its bits), which is not how the reader goes about it. Wherever a published packer takes the shape, it
packs the same matrix, and both must agree bit for bit: AutoGPTQ's `QuantLinear.pack` (whose product with the unit matrix
must be the weights, too), AutoRound's own, which stores zero points as they are, AutoAWQ's `WQLinear_GEMM.from_linear` as AutoRound carries it on, and compressed-tensors'
functions. `gptqmodel` itself needs a compiler and a GPU's headers to install; what it takes off zero points is written
out here. expected.json holds for each matrix the FNV-1a hash of `scale * (code - zero)` in f32, row by
row, and the log-probabilities of transformers in f32 on exactly these weights.
"""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from auto_round.export.export_to_awq.utils import WQLinear_GEMM
from auto_round_extension.torch.qlinear_torch import QuantLinear as AutoRoundLinear
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


def auto_gptq():
    """AutoGPTQ's module without its package, which wants an older transformers."""
    folder = pathlib.Path(importlib.util.find_spec("auto_gptq").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("qlinear_cuda", folder / "nn_modules/qlinear/qlinear_cuda.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.QuantLinear


def linear(means):
    # Uninitialised: what is random here shall not depend on what is checked.
    module = torch.nn.utils.skip_init(torch.nn.Linear, means.shape[1], means.shape[0], bias=False)
    module.weight.data = torch.from_numpy(means)
    return module


def check_against_auto_gptq(parts, means, scales, zeros, index, layout):
    rows, cols = means.shape
    if rows % 32 or cols % 32 or layout["plus"] != 1:
        return 0
    theirs = auto_gptq()(layout["bits"], layout["group"], cols, rows, False, weight_dtype=torch.float32)
    zeros, index = torch.from_numpy(zeros.astype(np.float32)), torch.from_numpy(index.astype(np.int32))
    theirs.pack(linear(means), scales.float(), zeros, index)
    for part in ["qweight", "qzeros", "g_idx"]:
        assert torch.equal(getattr(theirs, part), parts[part]), part
    assert torch.equal(theirs.scales, parts["scales"].float())
    assert torch.equal(theirs(torch.eye(cols)).T, torch.from_numpy(means))
    return 1


def check_against_auto_round(parts, means, scales, zeros, layout):
    rows, cols = means.shape
    group = cols if layout["group"] == -1 else layout["group"]
    if rows % 32 or cols % 32 or layout["plus"] != 0 or layout.get("act_order"):
        return 0
    theirs = AutoRoundLinear(layout["bits"], group, cols, rows, False)
    theirs.device = "cpu"
    theirs.pack(linear(means), scales.float(), torch.from_numpy(zeros.astype(np.float32)), None, "cpu")
    for part in ["qweight", "qzeros", "scales"]:
        assert torch.equal(getattr(theirs, part), parts[part]), part
    return 1


def check_against_awq(parts, means, scales, zeros, layout):
    cols = means.shape[1]
    if layout["group"] != -1 and cols % layout["group"]:
        return 0
    zeros = torch.from_numpy(zeros.T.astype(np.float32))
    theirs = WQLinear_GEMM.from_linear(linear(means), 4, layout["group"], scales=scales.T.float(), zeros=zeros)
    for part in ["qweight", "qzeros", "scales"]:
        assert torch.equal(getattr(theirs, part), parts[part]), part
    return 1


def gptqmodel_zeros(words):
    """What its `convert_gptq_v2_to_v1_format` stores of three bits."""
    offsets = [0b00100100100100100100100100100100, 0b10010010010010010010010010010010, 0b01001001001001001001001001001001]
    return words - np.array([offsets[at % 3] for at in range(words.shape[1])], np.uint32)


CHECKED = {"gptq": 0, "gptq_v2": 0, "awq": 0, "compressed-tensors": 0}


def matrix(rng, rows, cols, layout, order_seed):
    """The parts of a matrix, and what they mean in f32."""
    bits, method = layout["bits"], layout["method"]
    group = cols if layout["group"] == -1 else layout["group"]
    groups = -(-cols // group)
    index = np.arange(cols) // group
    if layout.get("act_order") == "shared":
        # As quantisers have it: one order for all that read the same inputs.
        index = np.random.default_rng(order_seed).permutation(index)
    elif layout.get("act_order"):
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
        CHECKED["gptq"] += check_against_auto_gptq(parts, means, scales, zeros, index, layout)
        CHECKED["gptq_v2"] += check_against_auto_round(parts, means, scales, zeros, layout)
        if layout.get("made_by") == "auto-round":
            del parts["g_idx"]
        if layout.get("made_by") == "gptqmodel":
            parts["qzeros"] = tensor(gptqmodel_zeros(stream(zeros.T, bits)))
        if layout.get("zero_biases"):
            parts["bias"] = torch.zeros(rows, dtype=torch.float16)
    elif method == "awq":
        parts = {"qweight": tensor(awq(codes.T)), "qzeros": tensor(awq(zeros.T)), "scales": scales.T.contiguous()}
        CHECKED[method] += check_against_awq(parts, means, scales, zeros, layout)
    else:
        signed = torch.from_numpy((codes - middle).astype(np.int8))
        signed_zeros = torch.from_numpy((zeros - middle).astype(np.int8))
        parts = {"weight_scale": scales}
        if layout["format"] == "pack-quantized":
            parts["weight_packed"] = tensor(stream(codes, bits))
            assert torch.equal(parts["weight_packed"], pack_to_int32(signed, bits))
            CHECKED[method] += 1
            parts["weight_shape"] = torch.tensor([rows, cols], dtype=torch.int64)
            if not symmetric:
                parts["weight_zero_point"] = tensor(stream(zeros.T, bits).T)
                assert torch.equal(parts["weight_zero_point"], pack_to_int32(signed_zeros, bits, packed_dim=0))
        else:
            parts["weight"] = signed
            if not symmetric:
                parts["weight_zero_point"] = signed_zeros
        if layout.get("act_order"):
            parts["weight_g_idx"] = tensor(index.astype(np.int32))
    return parts, means.astype(np.float32)


def gptq(bits, group, symmetric=True, plus=1, **keys):
    return {"method": "gptq", "bits": bits, "group": group, "symmetric": symmetric, "plus": plus,
            "scales": torch.float16, **keys}


def awq_layout(group, **keys):
    return {"method": "awq", "bits": 4, "group": group, "symmetric": False, "scales": torch.float16, "kept": 4, **keys}


def compressed(bits, group, form, symmetric=True, **keys):
    return {"method": "compressed-tensors", "bits": bits, "group": group, "symmetric": symmetric, "format": form,
            "scales": torch.bfloat16, "kept": bits, **keys}


# `kept` is in how many bits a code is kept by the cpu backend; 0 where it is unpacked. `inner` is the MLP's width: 96 inputs
# are no multiple of 64, 160 none of 128 and 112 none of 32.
LAYOUTS = {
    "gptq4": gptq(4, 32, kept=4),
    "gptq4-asymmetric": gptq(4, 64, symmetric=False, kept=4),
    "gptq4-v2-row": gptq(4, -1, plus=0, kept=4, inner=112),
    "gptq4-act-order": gptq(4, 32, act_order=True, kept=4, zero_biases=True),
    "gptq8": gptq(8, 32, kept=8),
    "gptq3": gptq(3, 32, symmetric=False, kept=3),
    "gptq2": gptq(2, 32, symmetric=False, plus=0, kept=2),
    "awq": awq_layout(32),
    "w4a16": compressed(4, 32, "pack-quantized"),
    "w4a16-asymmetric": compressed(4, 32, "pack-quantized", symmetric=False),
    "w8a16": compressed(8, -1, "pack-quantized"),
    "w8a8": compressed(8, -1, "int-quantized"),
    "gptq4-128-head": gptq(4, 128, kept=4, inner=160, lm_head=True),
    "gptq4-16": gptq(4, 16, kept=0),
    "gptq4-act-order-112": gptq(4, 64, symmetric=False, plus=0, act_order="shared", kept=4, inner=112),
    "gptq4-act-order-experts": gptq(4, 32, act_order=True, kept=4, experts=3),
    "gptq8-act-order": gptq(8, 32, symmetric=False, act_order="shared", kept=8),
    "gptq8-asymmetric-112": gptq(8, 64, symmetric=False, plus=0, kept=8, inner=112),
    "gptq3-gptqmodel": gptq(3, 32, symmetric=False, kept=3, made_by="gptqmodel"),
    "gptq2-act-order": gptq(2, 32, act_order="shared", kept=2),
    "awq-112": awq_layout(-1, inner=112),
    "awq-64": awq_layout(64, inner=128),
    "w4a16-act-order": compressed(4, 32, "pack-quantized", act_order="shared"),
    "w4a16-112": compressed(4, -1, "pack-quantized", inner=112),
    "w8a16-asymmetric": compressed(8, 32, "pack-quantized", symmetric=False),
    "w8a8-asymmetric-112": compressed(8, -1, "int-quantized", symmetric=False, inner=112),
    "auto-round": gptq(4, 32, symmetric=False, plus=0, kept=4, made_by="auto-round"),
    # Three bits are packed 32 at a time, so 112 inputs cannot have them.
    "gptq2-112": gptq(2, -1, symmetric=False, plus=0, kept=2, inner=112),
    "w8a16-112": compressed(8, -1, "pack-quantized", inner=112),
}


def quantization_config(layout):
    method, bits, group = layout["method"], layout["bits"], layout["group"]
    if layout.get("made_by") == "auto-round":
        return {"quant_method": "auto-round", "packing_format": "auto_round", "bits": bits, "group_size": group,
                "sym": layout["symmetric"], "data_type": "int", "autoround_version": "0.16.1"}
    if method == "gptq":
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": layout["symmetric"],
                  "desc_act": bool(layout.get("act_order")), "checkpoint_format": "gptq" if layout["plus"] else "gptq_v2"}
        made_by = {"meta": {"quantizer": [f"{layout['made_by']}:4.1.0"]}} if "made_by" in layout else {}
        return {**config, **made_by}
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


def experts(rng, key, value, layout):
    """The matrices of Mixtral's experts as its files name them, into the stack of them that transformers computes with."""
    tensors, block = {}, key.split(".mlp.")[0] + ".block_sparse_moe.experts"
    for expert, stacked in enumerate(value):
        # Gate over up.
        names = ["w1", "w3"] if key.endswith("gate_up_proj") else ["w2"]
        for name, part in zip(names, stacked.chunk(len(names))):
            parts, means = matrix(rng, *part.shape, layout, part.shape[1])
            tensors |= {f"{block}.{expert}.{name}.{key}": parts[key] for key in parts}
            part.copy_(torch.from_numpy(means))
    return tensors


def tiny(layout):
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": layout.get("inner", 96), "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
             "eos_token_id": 2, "pad_token_id": 0}
    if "experts" in layout:
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(
            **sizes, num_local_experts=layout["experts"], num_experts_per_tok=2))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def main():
    expected = json.loads((HERE / "expected.json").read_text())["layouts"]
    for seed, (name, layout) in enumerate(LAYOUTS.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        rng = np.random.default_rng(seed + 1)
        torch.manual_seed(seed)
        model = tiny(layout).float().eval()
        config = model.config
        tensors, hashes = {}, {}
        with torch.no_grad():
            for key, value in model.named_parameters():
                if ".experts." in key:
                    tensors |= experts(rng, key, value, layout)
                elif key.endswith("_proj.weight") or (key == "lm_head.weight" and layout.get("lm_head")):
                    parts, means = matrix(rng, *value.shape, layout, value.shape[1])
                    module = key.removesuffix(".weight")
                    tensors |= {f"{module}.{part}": parts[part] for part in parts}
                    value.copy_(torch.from_numpy(means))
                    if module != "lm_head":
                        hashes[module.rsplit(".", 1)[1]] = fnv(means)
                else:
                    offset, width = (1.0, 0.3) if value.dim() == 1 else (0.0, 0.5)
                    stored = (torch.randn(value.shape) * width + offset).half()
                    value.copy_(stored.float())
                    tensors[key.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = stored.clone()
            logprobs = model(torch.tensor([TOKENS])).logits[0, -1].double().log_softmax(-1)
        folder = HERE / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
        text = {**config.to_dict(), "architectures": [type(model).__name__], "dtype": "float16",
                "quantization_config": quantization_config(layout)}
        (folder / "config.json").write_text(json.dumps(text, indent=1) + "\n")
        expected[name] = {"kept_bits": layout["kept"], "fnv1a": hashes,
                          "logprobs": [round(value, 6) for value in logprobs.tolist()]}
        print(name, (folder / "model.safetensors").stat().st_size, "bytes", expected[name]["logprobs"][:4])
    print("matrices checked against published packers:", CHECKED)
    expected = {name: expected[name] for name in LAYOUTS}
    made_with = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    text = json.dumps({"made_with": made_with, "tokens": TOKENS, "layouts": expected})
    (HERE / "expected.json").write_text(text.replace('{"kept_bits"', '\n{"kept_bits"') + "\n")


if __name__ == "__main__":
    main()
