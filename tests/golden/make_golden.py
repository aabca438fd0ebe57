"""Makes the committed goldens: log-probabilities of transformers in f32.

    python3 -m venv golden-venv
    golden-venv/bin/pip install -r tests/golden/requirements.txt
    golden-venv/bin/python tests/golden/make_golden.py default --gguf path/to/SmolLM2-135M-Instruct.Q4_1.gguf
    golden-venv/bin/python tests/golden/make_golden.py tiny [--recreate] [NAME...]
    golden-venv/bin/python tests/golden/make_golden.py twins --llama-cpp path/to/llama.cpp [NAME...]
    golden-venv/bin/python tests/golden/make_golden.py quantized --llama-cpp ... --llama-quantize path/to/llama-quantize

`default` reads the very GGUF file that Bindery serves through transformers' own GGUF support (every tensor dequantised to
f32, the rows of q and k put back in transformers' order), so a difference to it is ours and not quantisation's.
`tiny` reads the random checkpoints of tests/checkpoints (families.py), and with --recreate makes them anew first.
`twins` converts them to GGUF with llama.cpp's own converter; `quantized` quantises some twins with llama.cpp's own program
and takes transformers on the dequantised tensors as the reference (twins.py says where both come from).

In a golden, `rows` holds for chosen positions the log-probabilities (log-softmax over the whole vocabulary) of the most
likely ids and of a fixed set of ids, so that both ends of the distribution are held; `greedy` holds the greedy
continuation of the prompt; `next_logprobs` and `greedy_logprobs` what a server tells of each token; `errors` how far transformers itself strays from f32 in half precision.
"""

import argparse
import hashlib
import json
import pathlib
import shutil
import tempfile

import torch
import transformers
from safetensors.torch import save_file

import phi3_small
import twins
from families import COMMITTED, FAMILIES
from judging import (
    MIN_EXPERT_MARGIN,
    MIN_GREEDY,
    errors_in,
    expert_margin,
    greedy,
    logits_of,
    logprobs_of,
    next_logprobs,
    rows_of,
)

HERE = pathlib.Path(__file__).resolve().parent
CHECKPOINTS = HERE.parent / "checkpoints"

NUM_TOP = 20
NUM_FIXED = 50
NUM_GREEDY = 32

SHORT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
MIDDLE = (
    "The lighthouse keeper wrote the same three numbers in his book every morning: the height of the tide, the colour of "
    "the sky, and how many ships he could count. On the fourth of March he"
)
LONG = (
    "A binding is the part of a book that nobody reads. It holds the pages together, keeps them in order and lets them be "
    "opened at any place without losing the others. A page may be added or taken out; the reader does not notice, as long "
    "as the numbers at the bottom still follow each other. For centuries the work was done by hand. Sheets were printed "
    "on both sides, folded so that the pages came to lie in sequence, gathered, beaten flat, and sewn through the fold "
    "onto cords that were laced into wooden boards. The boards were covered with leather. A good binder could finish "
    "two or three volumes in a day; a careless one could ruin a whole edition. Paper became cheap in the nineteenth "
    "century, and with it came cloth covers, glue in place of thread, and machines that folded, gathered and cut "
    "ten thousand sheets in an hour.\n\n"
    "def fold(sheet, times):\n    for _ in range(times):\n        sheet = sheet.halved()\n    return sheet.pages * 2 ** times\n\n"
    "| format | folds | pages |\n| --- | --- | --- |\n| folio | 1 | 4 |\n| quarto | 2 | 8 |\n| octavo | 3 | 16 |\n\n"
    "Today most books are bound in a few seconds. The spine is milled off, hot glue is pressed against the edges, and the "
    "cover is folded around it. Such a book costs little and falls apart when it is read too often. Librarians therefore"
)


def made_with():
    return {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}


def write(path, golden):
    # One prompt or row a line: small, and a diff says which changed.
    text = json.dumps(golden, separators=(",", ":")).replace('{"position"', '\n{"position"').replace('{"name"', '\n\n{"name"')
    path.write_text(text + "\n")
    print(f"{path}: {len(text)} bytes")


def make_default(gguf):
    folder, name = str(gguf.parent), gguf.name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    model.config._attn_implementation = "eager"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    vocab_size = model.config.vocab_size
    fixed_ids = [(i * 9973 + 11) % vocab_size for i in range(NUM_FIXED)]
    golden = {
        "made_with": made_with(),
        "file_sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "vocab_size": vocab_size,
        "fixed_ids": fixed_ids,
        "prompts": [],
    }
    for name, text in [("short", SHORT), ("middle", MIDDLE), ("long", LONG)]:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        last = len(tokens) - 1
        positions = sorted({0, 1, 2, 7, 15, 16, 17, 31, 32, 47, 63, 64, 100, 127, 128, 200, 255, 256, last - 1, last})
        positions = [position for position in positions if position <= last]
        continuation, _ = greedy(model, tokens, NUM_GREEDY)
        assert len(continuation) >= MIN_GREEDY, f"a near tie after {len(continuation)} tokens: choose another prompt"
        print(f"{name}: {len(tokens)} tokens, {len(continuation)} more: {tokenizer.decode(continuation)!r}")
        rows = rows_of(logprobs_of(model, tokens), positions, NUM_TOP, fixed_ids)
        golden["prompts"].append({"name": name, "tokens": tokens, "greedy": continuation, "rows": rows})
    write(HERE / "smollm2-135m.json", golden)


NUM_TINY_TOP = 6
NUM_TINY_FIXED = 17
NUM_TINY_GREEDY = 16
# Each feature must move some log-probability by at least this, which is 20 times the widest bound.
MIN_FELT = 0.1
MAX_SEEDS = 200


def recreate(name, folder):
    """Weights wide enough that layers matter and logits differ; norms about 1, biases not 0."""
    family = FAMILIES[name]
    config = family.config()
    torch.manual_seed(sum(name.encode()))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    is_gemma = config.model_type.startswith("gemma")
    for key, value in model.named_parameters():
        is_head = "lm_head" in key or ("embed" in key and config.tie_word_embeddings)
        # Gemma multiplies its embeddings: as wide as others' they would drown the layers. Its last norm makes up for it.
        head_scale = 1.0 if is_gemma else 3.0
        scale = 0.3 if value.dim() == 1 else (head_scale if is_head else 1.2) / value.shape[-1] ** 0.5
        is_norm = value.dim() == 1 and key.endswith("weight") and ("norm" in key or ".ln_" in key)
        offset = 1.0 if is_norm and not is_gemma else 2.0 if key == "model.norm.weight" else 0.0
        value.data = (torch.randn(value.shape) * scale + offset).to(family.dtype).float()
    model.to(family.dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    if config.model_type == "phi3small":
        text = json.dumps(phi3_small.published(json.loads((folder / "config.json").read_text())), indent=2)
        (folder / "config.json").write_text(text + "\n")
    published = folder / "config-published.json"
    published.unlink(missing_ok=True)
    if family.published:
        published.write_text(json.dumps(family.published, indent=2) + "\n")


def load(folder, config=None):
    # Of a class that is not in transformers, the file has keys as published, not as the class.
    is_own = FAMILIES[folder.name].config_class is phi3_small.Phi3SmallConfig
    config = config or (FAMILIES[folder.name].config() if is_own else transformers.AutoConfig.from_pretrained(folder))
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation=FAMILIES[folder.name].attention, experts_implementation="eager"
    ).eval()


def prompt_tokens(seed, num_tokens, vocab_size):
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(0, vocab_size, (num_tokens,), generator=generator)]


def choose_prompt(model, num_tokens, num_greedy, min_greedy):
    """The first prompt, counted by seed, whose continuation is long enough and whose experts are decided."""
    masked = getattr(model.config, "dummy_token_indices", None) or ()
    for seed in range(MAX_SEEDS):
        tokens = prompt_tokens(1000 * num_tokens + seed, num_tokens, model.config.vocab_size)
        # What cannot follow is not asked for either.
        tokens = [token + 1 if token in masked else token for token in tokens]
        continuation, logprobs = greedy(model, tokens, num_greedy)
        if len(continuation) >= min_greedy and expert_margin(model, tokens + continuation) > MIN_EXPERT_MARGIN:
            return {"tokens": tokens, "greedy": continuation, "greedy_logprobs": logprobs}
    raise AssertionError(f"no prompt of {num_tokens} tokens continues for {min_greedy} without a near tie")


def tiny_golden(model, family, lengths):
    vocab_size = model.config.vocab_size
    fixed_ids = [i * (vocab_size - 1) // (NUM_TINY_FIXED - 1) for i in range(NUM_TINY_FIXED)]
    prompts = []
    for length in lengths:
        from_length, to_length = family.crossing or (0, 0)
        min_greedy = to_length - length if length == from_length else 6
        prompt = choose_prompt(model, length, NUM_TINY_GREEDY, min_greedy)
        wanted = {0, 1, 15, 16, 17, 31, 32, 63, 64, length - 2, length - 1, *family.positions}
        positions = sorted(position for position in wanted if 0 <= position < length)
        logprobs = logprobs_of(model, prompt["tokens"])
        rows = rows_of(logprobs, positions, NUM_TINY_TOP, fixed_ids)
        prompt["next_logprobs"] = next_logprobs(logprobs, prompt["tokens"])
        prompts.append({"name": f"{length} tokens", **prompt, "rows": rows})
    rotation = str([getattr(model.config, key, None) for key in ("rope_parameters", "long_rope")])
    depends = "dynamic" in rotation or "longrope" in rotation
    head = {"made_with": made_with(), "rope_depends_on_length": depends, "vocab_size": vocab_size, "fixed_ids": fixed_ids}
    return {**head, "prompts": prompts}


def difference(model, other, tokens):
    return float((logprobs_of(model, tokens) - logprobs_of(other, tokens)).abs().max())


def check_family(name, family, model, prompts):
    """That the golden is precise, that each feature is felt, and that the published config means the same."""
    folder, longest = CHECKPOINTS / name, prompts[-1]
    exact = load(folder).double()
    rounding = max(difference(model, exact, tokens) for tokens in prompts)
    assert rounding < 1e-4, f"{name}: f32 itself is off by {rounding}"
    told = [f"f32 is within {rounding:.1e} of f64"]
    for feature, keys in family.felt.items():
        moved = difference(model, load(folder, family.config(keys)), longest)
        assert moved > MIN_FELT, f"{name}: {feature} moves log-probabilities by {moved} only"
        told.append(f"{feature} {moved:.2f}")
    if family.published:
        # From a file, since that is where a Mistral with layer_types becomes a Ministral.
        config = transformers.AutoConfig.from_pretrained(folder / "config-published.json")
        moved = max(difference(model, load(folder, config), tokens) for tokens in prompts)
        assert moved == 0.0, f"{name}: the published config differs by {moved}"
        told.append("published config agrees")
    print(f"{name}: {', '.join(told)}")


def make_tiny(anew, names):
    for name in names or COMMITTED:
        family = FAMILIES[name]
        if anew:
            recreate(name, CHECKPOINTS / name)
        model = load(CHECKPOINTS / name)
        golden = tiny_golden(model, family, family.lengths)
        prompts = [prompt["tokens"] for prompt in golden["prompts"]]
        check_family(name, family, model, prompts)
        golden["errors"] = {str(dtype).split(".")[1]: errors_in(model, dtype, prompts) for dtype in (torch.bfloat16, torch.float16)}
        logits = logits_of(model, prompts[-1])
        entropy = float(torch.distributions.Categorical(logits=logits).entropy().mean())
        lengths = [len(prompt["greedy"]) for prompt in golden["prompts"]]
        print(f"{name}: continuations of {lengths} tokens, mean entropy {entropy:.2f}, in half precision {golden['errors']}")
        write(CHECKPOINTS / name / "golden.json", golden)


def make_twins(llama_cpp, names):
    """Where llama.cpp's format loses something, the twin has a golden of its own; else the checkpoint's is its too."""
    for name in names or COMMITTED:
        family = FAMILIES[name]
        if family.twin is None:
            print(f"{name}: no twin, {family.twin_note}")
            continue
        folder = CHECKPOINTS / name
        twins.convert(llama_cpp, folder, folder / "model.gguf", family.dtype, family.convert)
        own = folder / "golden-gguf.json"
        own.unlink(missing_ok=True)
        if family.twin:
            golden = tiny_golden(load(folder, family.config(family.twin)), family, family.lengths)
            write(own, {**golden, "differs": family.twin_note})


def make_quantized(llama_cpp, llama_quantize, names):
    """Of a checkpoint that is too wide to commit there is the quantised file alone."""
    for name, types in twins.QUANTIZED.items():
        if names and name not in names:
            continue
        family, folder = FAMILIES[name], CHECKPOINTS / name
        with tempfile.TemporaryDirectory() as parent:
            made = pathlib.Path(parent) / name
            if not (folder / "model.safetensors").exists():
                recreate(name, made)
            else:
                shutil.copytree(folder, made)
            twins.convert(llama_cpp, made, made / "twin.gguf", torch.float32, family.convert)
            folder.mkdir(exist_ok=True)
            twins.quantize(llama_cpp, llama_quantize, made / "twin.gguf", folder / "quantized.gguf", types)
            matrices = twins.dequantized(llama_cpp, made, folder / "quantized.gguf", family.convert)
            save_file(matrices, made / "model.safetensors", {"format": "pt"})
            golden = tiny_golden(load(made, family.config(family.twin)), family, family.lengths)
        write(folder / "golden-quantized.json", golden)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    default = commands.add_parser("default", help="the default model, from its GGUF file")
    default.add_argument("--gguf", type=pathlib.Path, required=True)
    tiny = commands.add_parser("tiny", help="the random checkpoints")
    tiny.add_argument("--recreate", action="store_true", help="make the checkpoints anew")
    as_gguf = commands.add_parser("twins", help="the random checkpoints as GGUF files")
    quantized = commands.add_parser("quantized", help="some of them quantised")
    quantized.add_argument("--llama-quantize", type=pathlib.Path, required=True)
    for command in (as_gguf, quantized):
        command.add_argument("--llama-cpp", type=pathlib.Path, required=True, help="its source: convert_hf_to_gguf.py is there")
    for command in (tiny, as_gguf, quantized):
        command.add_argument("names", nargs="*", help="these only: " + ", ".join(FAMILIES))
    arguments = parser.parse_args()
    if arguments.command == "default":
        make_default(arguments.gguf)
    elif arguments.command == "tiny":
        make_tiny(arguments.recreate, arguments.names)
    elif arguments.command == "twins":
        make_twins(arguments.llama_cpp, arguments.names)
    else:
        make_quantized(arguments.llama_cpp, arguments.llama_quantize, arguments.names)


if __name__ == "__main__":
    main()
