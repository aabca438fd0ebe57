"""Makes tests/adapters: tiny LoRA adapters over the tiny checkpoints, and what peft computes with them in f32.

    golden-venv/bin/pip install -r tests/golden/requirements.txt
    golden-venv/bin/python tests/golden/adapters.py [--llama-cpp path/to/llama.cpp] [NAME...]

An adapter is a row of `ADAPTERS`: its base and the keys of peft's LoraConfig. Its matrices are random and as wide as the
base's own, so that each is felt: making a golden fails unless taking any one target away changes the log-probabilities by
much more than the bound. With --llama-cpp, whose source holds convert_lora_to_gguf.py, those whose row says so are converted
to adapter.gguf, too.

golden.json has what a checkpoint's has (make_golden.py says what), and besides: `base`, the checkpoint's folder; `moved`, how
far the adapter moves log-probabilities from the base's; and `merged`, for each matrix by layer and target the product of a
fixed vector with the base's weight after peft has merged the adapter into it. Which rows of a fused matrix are which is taken
from transformers: its own code splits a product in which every output is its own number.
"""

import argparse
import copy
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch

from families import FAMILIES
from judging import logprobs_of
from make_golden import CHECKPOINTS, MIN_FELT, load, tiny_golden, write

ADAPTERS_FOLDER = CHECKPOINTS.parent / "adapters"
LENGTHS = (3, 17, 41)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

# Rank 8 with alpha 12 unless a row says otherwise: a scaling that is not 1.
ADAPTERS = {
    "llama-qv": {"base": "tiny-llama", "gguf": "f32", "target_modules": ["q_proj", "v_proj"]},
    "llama-all-rslora": {"base": "tiny-llama", "r": 16, "target_modules": "all-linear", "use_rslora": True},
    "llama-patterns": {
        "base": "tiny-llama", "r": 4, "lora_alpha": 6, "target_modules": [*ATTENTION, "gate_proj", "down_proj"],
        "rank_pattern": {"self_attn.k_proj": 2, "layers.1.mlp.down_proj": 8, r"^model\.layers\.0\.mlp\.(gate|down)_proj": 3},
        "alpha_pattern": {"q_proj": 3, r".*\.1\.mlp\..*": 11.5, "mlp.down_proj": 5},
    },
    "llama-scattered": {
        "base": "tiny-llama31", "gguf": "f16", "dtype": torch.float16,
        "target_modules": r".*\.0\.self_attn\.(q|k)_proj|.*\.1\.mlp\.(up|down)_proj|lm_head",
    },
    "llama-bias": {"base": "tiny-llama-bias", "r": 5, "target_modules": ATTENTION},
    "mistral-layers": {
        "base": "tiny-mistral", "gguf": "bf16", "dtype": torch.bfloat16, "r": 4, "target_modules": [*ATTENTION, "up_proj"],
        "layers_to_transform": [0, 2],
    },
    "qwen3-tied-head": {"base": "tiny-qwen3", "r": 6, "target_modules": ["q_proj", "k_proj", "lm_head"]},
    "gemma3-all": {"base": "tiny-gemma3", "gguf": "f32", "r": 4, "target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    "phi3-fused": {"base": "tiny-phi3", "gguf": "f32", "r": 4, "target_modules": ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]},
    "phi4-mini-fused": {"base": "tiny-phi4-mini", "target_modules": ["qkv_proj", "gate_up_proj"]},
    "falcon-7b": {"base": "tiny-falcon-7b", "r": 4, "target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
    "falcon-40b": {"base": "tiny-falcon-40b", "gguf": "f32", "r": 4, "target_modules": ["query_key_value", "dense_4h_to_h"]},
    "falcon-rw": {"base": "tiny-falcon-rw", "r": 4, "target_modules": ["query_key_value", "dense"]},
    "qwen3-moe-attention": {"base": "tiny-qwen3-moe", "r": 4, "target_modules": ATTENTION},
    "mixtral-attention": {"base": "tiny-mixtral", "gguf": "f32", "r": 4, "target_modules": ATTENTION},
}
OURS = {"base", "gguf", "dtype"}


def adapted(name):
    """The base with the adapter's layers in it, and peft's model around it."""
    row = ADAPTERS[name]
    keys = {"r": 8, "lora_alpha": 12, "task_type": "CAUSAL_LM", **{key: value for key, value in row.items() if key not in OURS}}
    model = load(CHECKPOINTS / row["base"])
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**keys)).eval()
    wrapped.peft_config["default"].base_model_name_or_path = f"somewhere/{row['base']}"
    # As wide as the bases are made (make_golden.recreate).
    torch.manual_seed(sum(name.encode()))
    dtype = row.get("dtype", torch.float32)
    for layer in lora_layers(model).values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        rank, inputs = a.shape
        a.data = (torch.randn(a.shape) / inputs**0.5).to(dtype).float()
        b.data = (torch.randn(b.shape) * 0.5 / (layer.scaling["default"] * rank**0.5)).to(dtype).float()
    return model, wrapped


def lora_layers(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)}


def difference(one, other):
    return float((one - other).abs().max())


def check_felt(name, model, tokens):
    """How far the whole adapter moves the results; an error where one of its targets hardly does."""
    whole = logprobs_of(model, tokens)
    layers = lora_layers(model)
    told = {}
    for target in sorted({layer.rsplit(".", 1)[-1] for layer in layers}):
        mine = [layers[layer].lora_B["default"].weight for layer in layers if layer.rsplit(".", 1)[-1] == target]
        kept = [weight.data for weight in mine]
        for weight in mine:
            weight.data = torch.zeros_like(weight.data)
        told[target] = difference(whole, logprobs_of(model, tokens))
        for weight, data in zip(mine, kept):
            weight.data = data
        assert told[target] > MIN_FELT, f"{name}: {target} moves log-probabilities by {told[target]} only"
    base = load(CHECKPOINTS / ADAPTERS[name]["base"])
    moved = difference(whole, logprobs_of(base, tokens))
    print(f"{name}: moves log-probabilities by {moved:.2f}; " + ", ".join(f"{target} {value:.2f}" for target, value in told.items()))
    return round(moved, 3)


def split(model, module, weight):
    """The base's matrices in a module's weight, by target: rows of a fused one are told by transformers itself."""
    config, last = model.config, module.rsplit(".", 1)[-1]
    plain = {
        "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output", "dense": "output", "gate_proj": "gate",
        "up_proj": "up", "down_proj": "down", "dense_h_to_4h": "up", "dense_4h_to_h": "down", "lm_head": "head",
    }
    if last in plain:
        return {plain[last]: weight}
    numbers = torch.arange(len(weight))
    if last == "query_key_value":
        attention = model.get_submodule(module.rsplit(".", 1)[0])
        heads = attention._split_heads(numbers.float()[None, None])
        rows = {target: head.reshape(-1).long() for target, head in zip(("query", "key", "value"), heads)}
        # The newer layout repeats keys and values for every query head, the older with one key head does not.
        width = attention.head_dim
        for target in ("key", "value"):
            groups = rows[target].reshape(-1, width)
            rows[target] = torch.cat([group for i, group in enumerate(groups) if not any(group.equal(earlier) for earlier in groups[:i])])
        return {target: weight[numbers] for target, numbers in rows.items()}
    if last == "qkv_proj":
        # Phi3Attention.forward.
        width = config.hidden_size // config.num_attention_heads
        queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
        return {"query": weight[:queries], "key": weight[queries : queries + keys], "value": weight[queries + keys :]}
    assert last == "gate_up_proj", module
    # Phi3MLP.forward.
    gate, up = weight.chunk(2, dim=0)
    return {"gate": gate, "up": up}


def probe(inputs):
    return torch.tensor([(i * 37 + 11) % 101 / 50 - 1 for i in range(inputs)], dtype=torch.float64)


def merged_products(name, folder):
    """Of a base into which peft has merged the adapter as it was saved."""
    model = load(CHECKPOINTS / ADAPTERS[name]["base"])
    # Merged into a tied head it would change the embeddings, too.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    wrapped = peft.PeftModel.from_pretrained(model, folder)
    modules = list(lora_layers(model))
    merged = wrapped.merge_and_unload()
    products = {}
    for module in modules:
        weight = merged.get_submodule(module).weight.detach().double()
        layer = next((part for part in module.split(".") if part.isdigit()), None)
        for target, rows in split(merged, module, weight).items():
            product = rows @ probe(rows.shape[1])
            products[target if layer is None else f"{layer}.{target}"] = [float(f"{value:.6g}") for value in product]
    return merged, products


def save(name, wrapped, folder):
    """As save_pretrained does it, and the numbers in the dtype of the row."""
    shutil.rmtree(folder, ignore_errors=True)
    dtype = ADAPTERS[name].get("dtype", torch.float32)
    for layer in lora_layers(wrapped).values():
        for matrix in (layer.lora_A, layer.lora_B):
            matrix["default"].weight.data = matrix["default"].weight.data.to(dtype)
    wrapped.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    # Sets have no order of their own.
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config[key], list):
            config[key] = sorted(config[key])
    file.write_text(json.dumps(config, indent=2) + "\n")
    (folder / "adapter_model.safetensors").chmod(0o644)


def to_gguf(name, llama_cpp, folder):
    row = ADAPTERS[name]
    with tempfile.TemporaryDirectory() as parent:
        config = json.loads((CHECKPOINTS / row["base"] / "config.json").read_text())
        (pathlib.Path(parent) / "config.json").write_text(json.dumps({**config, **FAMILIES[row["base"]].convert}))
        command = [sys.executable, llama_cpp / "convert_lora_to_gguf.py", "--base", parent, "--outtype", row["gguf"]]
        command += ["--outfile", folder / "adapter.gguf", folder]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)


def make(name, llama_cpp):
    row, folder = ADAPTERS[name], ADAPTERS_FOLDER / name
    model, wrapped = adapted(name)
    golden = tiny_golden(model, FAMILIES[row["base"]], LENGTHS)
    longest = golden["prompts"][-1]["tokens"]
    moved = check_felt(name, model, longest)
    expected = logprobs_of(model, longest)
    rounding = difference(expected, logprobs_of(copy.deepcopy(model).double(), longest))
    assert rounding < 1e-4, f"{name}: f32 itself is off by {rounding}"
    save(name, wrapped, folder)
    merged, products = merged_products(name, folder)
    off = difference(expected, logprobs_of(merged, longest))
    assert off < 1e-3, f"{name}: merged it differs by {off}"
    golden["made_with"]["peft"] = peft.__version__
    write(folder / "golden.json", {"base": row["base"], "moved": moved, **golden, "merged": products})
    if llama_cpp and "gguf" in row:
        to_gguf(name, llama_cpp, folder)
    print(f"{name}: f32 is within {rounding:.1e} of f64; " + ", ".join(f"{file.name} {file.stat().st_size}" for file in sorted(folder.iterdir())))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=pathlib.Path, help="its source: convert_lora_to_gguf.py is there")
    parser.add_argument("names", nargs="*", help="these only: " + ", ".join(ADAPTERS))
    arguments = parser.parse_args()
    for name in arguments.names or ADAPTERS:
        make(name, arguments.llama_cpp)


if __name__ == "__main__":
    main()
