"""Holds the GGUF twins to their goldens with llama.cpp itself, so that a twin is known to mean what its golden says.

    golden-venv/bin/python tests/golden/check_twins.py --llama-cpp DIR --llama-server PROGRAM [NAME...]

Each twin is converted once more, in f32, and served with an f32 cache and without flash attention: what remains is
llama.cpp's rounding. Printed is the largest difference of any golden log-probability after the last token of each prompt.
"""

import argparse
import json
import math
import pathlib
import socket
import subprocess
import tempfile
import urllib.request

import torch

import twins
from families import COMMITTED, FAMILIES
from make_tokenizer import tokens

CHECKPOINTS = pathlib.Path(__file__).resolve().parent.parent / "checkpoints"


def post(port, path, body):
    question = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(question, timeout=60) as answer:
        return json.loads(answer.read())


def serve(program, file, flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "-m", file, "--host", "127.0.0.1", "--port", port, "-c", 256, "-np", 1, "-t", 1, "-ctk", "f32", "-ctv", "f32",
               "-fa", "off", "--no-warmup", "--no-webui", *flags]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = []
    for line in process.stdout:
        log.append(line)
        if "listening" in line:
            return process, port
    raise AssertionError("llama-server did not start:\n" + "".join(log[-12:]))


def last_row_difference(port, golden, prompt):
    # Some token of ASCII is forced, since the server keeps half a character (and what is told of it) back. What it tells
    # are the probabilities before sampling.
    forced = [[tokens().index("A"), 1000.0]]
    body = {"prompt": prompt["tokens"], "n_predict": 1, "n_probs": golden["vocab_size"], "temperature": -1.0, "cache_prompt": False, "logit_bias": forced}
    answer = post(port, "/completion", body)["completion_probabilities"][0]
    logprobs = {entry["id"]: entry["logprob"] for entry in answer["top_logprobs"]}
    row = prompt["rows"][-1]
    assert row["position"] == len(prompt["tokens"]) - 1
    expected = dict(map(tuple, row["top"])) | dict(zip(golden["fixed_ids"], row["fixed"]))
    return max(abs(logprobs[token] - value) for token, value in expected.items() if token in logprobs and math.isfinite(logprobs[token]))


def check(llama_cpp, program, name, flags=()):
    family, folder = FAMILIES[name], CHECKPOINTS / name
    own = folder / "golden-gguf.json"
    golden = json.loads((own if own.exists() else folder / "golden.json").read_text())
    with tempfile.TemporaryDirectory() as parent:
        file = pathlib.Path(parent) / "model.gguf"
        twins.convert(llama_cpp, folder, file, torch.float32, family.convert)
        process, port = serve(program, file, flags)
        try:
            differences = {len(prompt["tokens"]): last_row_difference(port, golden, prompt) for prompt in golden["prompts"]}
        finally:
            process.terminate()
            process.communicate()
    print(name, *flags, {length: f"{value:.1e}" for length, value in differences.items()}, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=pathlib.Path, required=True)
    parser.add_argument("--llama-server", type=pathlib.Path, required=True)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    for name in arguments.names or COMMITTED:
        family = FAMILIES[name]
        if family.twin is None:
            continue
        flags = ()
        if family.lengths[-1] > family.keys["max_position_embeddings"]:
            flags = ("--override-kv", "llama.context_length=int:256")
        try:
            check(arguments.llama_cpp, arguments.llama_server, name, flags)
            if (family.keys.get("rope_parameters") or {}).get("rope_type") == "longrope":
                # llama.cpp chooses the factors by the size of its context: long ones above, short ones here.
                longer = "phi3.rope.scaling.original_context_length=int:1024"
                check(arguments.llama_cpp, arguments.llama_server, name, ("--override-kv", longer))
        except AssertionError as error:
            print(name, error)


if __name__ == "__main__":
    main()
