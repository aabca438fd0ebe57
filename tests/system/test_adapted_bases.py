"""Adapters beside bases of every manner: families, mixtures of experts, heads that are tied, int8 and int4 weights.

Every request of a batch names another model; the goldens in tests/adapters were computed by transformers and peft in f32
(tests/golden/adapters.py). Asserted beside a quantised base: answers do not depend on who shares the batch, not by a bit,
are as far from peft's as quantising alone moves them, and nearer to their own adapter's than to any other's.
"""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_adapters import TESTS, check, checkpoint, given, goldens, in_small_steps, score

ADAPTERS = sorted(folder.name for folder in (TESTS / "adapters").iterdir() if folder.is_dir())
BASES = {name: json.loads((TESTS / "adapters" / name / "golden.json").read_text())["base"] for name in ADAPTERS}
# How far a token's log-probability may be, in the mean over a prompt. These weights are random and so small that every
# group of them counts. Measured: 0.26 and 1.26 at most (two tokens), both of a base without an adapter.
QUANTISED = {"int8": 0.4, "int4": 1.6}


def serve_base(start, tmp_path, base, *flags):
    """The base with all of its adapters, in steps of a few tokens."""
    names = [name for name in ADAPTERS if BASES[name] == base]
    return start(*in_small_steps(base), *given(*names), *flags, model=checkpoint(tmp_path, base)), names


def all_at_once(client, asked, ask):
    """Each alone, one after the other; then all together, shuffled and four times each."""
    alone = [ask(client, *pair) for pair in asked]
    order = list(range(len(asked))) * 4
    random.Random(7).shuffle(order)
    with ThreadPoolExecutor(len(order)) as pool:
        together = list(pool.map(lambda i: ask(client, *asked[i]), order))
    for i, answer in zip(order, together, strict=True):
        assert answer == alone[i], f"{asked[i][0]}: the answer depends on who shares the batch"
    return alone


@pytest.mark.parametrize("base", sorted(set(BASES.values())))
def test_every_family_answers_as_peft_does(start, tmp_path, base):
    server, names = serve_base(start, tmp_path, base, "--dtype", "f32")
    asked = [(base, prompt) for prompt in goldens(base)[:3]]
    asked += [(name, prompt) for name in names for prompt in goldens(name)]
    for (name, prompt), scored in zip(asked, all_at_once(server.client(), asked, score), strict=True):
        check(name, prompt, scored)
    server.wait_idle()
    assert server.stop() == 0


def given_tokens(client, model, prompt):
    """Log-probabilities of tokens that are all given: an earlier answer has no say in a later one."""
    answer = client.completions.create(
        model=model, prompt=prompt["tokens"] + prompt["greedy"], max_tokens=1, temperature=0, echo=True, logprobs=1,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )
    return answer.choices[0].logprobs.token_logprobs[1:-1]


def away(scored, prompt):
    """In the mean over the prompt's tokens, which models of one base have in common."""
    expected = prompt["next_logprobs"]
    return sum(abs(a - b) for a, b in zip(scored, expected)) / len(expected)


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("base", sorted(set(BASES.values())))
def test_every_family_carries_adapters_over_quantised_weights(start, tmp_path, base, bits):
    server, names = serve_base(start, tmp_path, base, "--quantize", bits)
    asked = [(name, prompt) for name in names for prompt in goldens(name)] + [(base, goldens(base)[0])]
    answers = all_at_once(server.client(), asked, given_tokens)
    for (name, prompt), scored in zip(asked, answers, strict=True):
        distance = away(scored, prompt)
        others = [
            away(scored, other) for other_name in names if other_name != name
            for other in goldens(other_name) if other["tokens"] == prompt["tokens"]
        ]
        assert distance < QUANTISED[bits], f"{name}, {prompt['name']}: {distance}"
        assert all(distance < other for other in others), f"{name}, {prompt['name']}: {distance}, others {others}"
    server.wait_idle()
    assert server.stop() == 0
