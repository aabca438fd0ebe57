"""Makes the committed goldens: log-probabilities of transformers in f32.

    python3 -m venv golden-venv
    golden-venv/bin/pip install -r tests/golden/requirements.txt
    golden-venv/bin/python tests/golden/make_golden.py default --gguf path/to/SmolLM2-135M-Instruct.Q4_1.gguf
    golden-venv/bin/python tests/golden/make_golden.py tiny [--recreate] [NAME...]

`default` reads the very GGUF file that Bindery serves through transformers' own GGUF support (every tensor dequantised to
f32, the rows of q and k put back in transformers' order), so a difference to it is ours and not quantisation's.
`tiny` reads the random checkpoints of tests/checkpoints, and with --recreate makes them anew first.

In a golden, `rows` holds for chosen positions the log-probabilities (log-softmax over the whole vocabulary) of the most
likely ids and of a fixed set of ids, so that both ends of the distribution are held; `greedy` holds the greedy
continuation of the prompt.
"""

import argparse
import hashlib
import json
import pathlib

import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
CHECKPOINTS = HERE.parent / "checkpoints"

NUM_TOP = 20
NUM_FIXED = 50
NUM_GREEDY = 32
# Where the best two tokens come closer than this, a rounding error may decide: a continuation ends before.
MIN_MARGIN = 0.02
MIN_GREEDY = 4

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


def logprob_rows(logits, positions, num_top, fixed_ids):
    """Rounded: six digits are 100 times finer than the tightest tolerance."""
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    rows = []
    for position in positions:
        row = logprobs[position]
        top = torch.topk(row, num_top)
        rows.append(
            {
                "position": position,
                "top": [[int(i), round(float(v), 6)] for i, v in zip(top.indices, top.values)],
                "fixed": [round(float(row[i]), 6) for i in fixed_ids],
            }
        )
    return rows


def greedy(model, tokens, num_tokens):
    """The continuation, up to the first near tie. No cache: slow and plain."""
    tokens, continuation = list(tokens), []
    while len(continuation) < num_tokens:
        with torch.no_grad():
            best = torch.topk(model(torch.tensor([tokens + continuation])).logits[0, -1].double(), 2)
        if float(best.values[0] - best.values[1]) < MIN_MARGIN:
            break
        continuation.append(int(best.indices[0]))
    assert len(continuation) >= MIN_GREEDY, f"a near tie after {len(continuation)} tokens: choose another prompt"
    return continuation


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
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        last = len(tokens) - 1
        positions = sorted({0, 1, 2, 7, 15, 16, 17, 31, 32, 47, 63, 64, 100, 127, 128, 200, 255, 256, last - 1, last})
        positions = [position for position in positions if position <= last]
        continuation = greedy(model, tokens, NUM_GREEDY)
        print(f"{name}: {len(tokens)} tokens, {len(continuation)} more: {tokenizer.decode(continuation)!r}")
        rows = logprob_rows(logits, positions, NUM_TOP, fixed_ids)
        golden["prompts"].append({"name": name, "tokens": tokens, "greedy": continuation, "rows": rows})
    write(HERE / "smollm2-135m.json", golden)


# Small, but with every axis that goldens of the default model do not reach.
TINY = {
    # Untied head, grouped heads, llama3 scaling whose three regions all occur within the context. Stored as bf16.
    "tiny-llama": (
        transformers.LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        ),
        torch.bfloat16,
    ),
    # A sliding window much shorter than the prompt, heads wider than hidden / heads. Stored as f16.
    "tiny-mistral": (
        transformers.MistralConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=24,
            sliding_window=11,
            max_position_embeddings=256,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        ),
        torch.float16,
    ),
    # Biases on q, k, v and o, a tied head, linear scaling, sizes that are multiples of nothing. Stored as f32.
    "tiny-llama-bias": (
        transformers.LlamaConfig(
            vocab_size=101,
            hidden_size=36,
            intermediate_size=70,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=10,
            max_position_embeddings=256,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
            attention_bias=True,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        ),
        torch.float32,
    ),
    # Biases on q, k and v alone; full attention in the first layer, a window in the others. Stored as bf16.
    "tiny-qwen2": (
        transformers.Qwen2Config(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=9,
            max_window_layers=1,
            max_position_embeddings=256,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        ),
        torch.bfloat16,
    ),
    # Every second layer without rotary embedding. Stored as bf16.
    "tiny-smollm3": (
        transformers.SmolLM3Config(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            no_rope_layer_interval=2,
            max_position_embeddings=256,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        torch.bfloat16,
    ),
}
NUM_TINY_TOKENS = 75
TINY_POSITIONS = [0, 1, 5, 10, 11, 12, 15, 16, 17, 31, 32, 40, 48, 63, 64, 73, 74]


def recreate(name, config, dtype):
    torch.manual_seed(sum(name.encode()))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for key, value in model.named_parameters():
        # Wide enough that layers matter and logits differ; norms about 1, biases not 0.
        is_head = "lm_head" in key or ("embed" in key and config.tie_word_embeddings)
        scale = 0.3 if value.dim() == 1 else (3.0 if is_head else 1.2) / value.shape[-1] ** 0.5
        offset = 1.0 if "norm" in key else 0.0
        value.data = (torch.randn(value.shape) * scale + offset).to(dtype).float()
    model.to(dtype).save_pretrained(CHECKPOINTS / name)
    (CHECKPOINTS / name / "generation_config.json").unlink(missing_ok=True)


def make_tiny(anew, names):
    for name in names or TINY:
        config, dtype = TINY[name]
        folder = CHECKPOINTS / name
        if anew:
            recreate(name, config, dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        vocab_size = model.config.vocab_size
        tokens = [(i * i * 7 + i * 13 + 5) % vocab_size for i in range(NUM_TINY_TOKENS)]
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        rows = logprob_rows(logits, TINY_POSITIONS, 3, range(vocab_size))
        continuation = greedy(model, tokens, NUM_GREEDY)
        entropy = float(torch.distributions.Categorical(logits=logits).entropy().mean())
        print(f"{name}: {len(continuation)} tokens continue it, mean entropy {entropy:.2f}")
        prompt = {"name": name, "tokens": tokens, "greedy": continuation, "rows": rows}
        golden = {
            "made_with": made_with(),
            "vocab_size": vocab_size,
            "fixed_ids": list(range(vocab_size)),
            "prompts": [prompt],
        }
        write(folder / "golden.json", golden)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    default = commands.add_parser("default", help="the default model, from its GGUF file")
    default.add_argument("--gguf", type=pathlib.Path, required=True)
    tiny = commands.add_parser("tiny", help="the random checkpoints")
    tiny.add_argument("--recreate", action="store_true", help="make the checkpoints anew")
    tiny.add_argument("names", nargs="*", help="these only: " + ", ".join(TINY))
    arguments = parser.parse_args()
    if arguments.command == "default":
        make_default(arguments.gguf)
    else:
        make_tiny(arguments.recreate, arguments.names)


if __name__ == "__main__":
    main()
