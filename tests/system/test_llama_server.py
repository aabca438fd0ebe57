"""Independent proof of the wire of OpenAI-compatible servers: llama.cpp's llama-server as an upstream, on the same model's file.

What the official SDK gets by way of the gateway must be what llama-server says when it is asked directly. Runs where
BINDERY_LLAMA_SERVER names the program (`cargo xtask test --full` does where `cargo xtask bench-peer` has built it).
"""

import json
import os
import subprocess
import time
import urllib.request

import openai
import pytest

from conftest import Server, collected, free_port

PROGRAM = os.environ.get("BINDERY_LLAMA_SERVER")
WEIGHTS = os.environ.get("BINDERY_TEST_MODEL")
pytestmark = pytest.mark.skipif(not (PROGRAM and WEIGHTS), reason="BINDERY_LLAMA_SERVER is not set: only with --full")

PLACE = "llama/smol"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does a bookbinder do?"},
]


def get(url):
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.loads(response.read())


@pytest.fixture(scope="module")
def houses(tmp_path_factory):
    """A client of llama-server, one of the gateway before it, and llama-server's address."""
    folder = tmp_path_factory.mktemp("llama")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    flags = ["-m", WEIGHTS, "--host", "127.0.0.1", "--port", str(port), "-c", "4096", "-np", "2", "-t", "1", "--jinja"]
    with open(folder / "llama.log", "w") as log:
        peer = subprocess.Popen([PROGRAM, *flags, "--slots"], stdout=log, stderr=subprocess.STDOUT)
    try:
        yield from started(peer, folder, url)
    finally:
        peer.terminate()
        peer.wait(30)


def started(peer, folder, url):
    deadline = time.monotonic() + 120
    while True:
        try:
            get(f"{url}/health")
            break
        except OSError:
            said = (folder / "llama.log").read_text()[-3000:]
            assert peer.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.1)
    (folder / "bindery.toml").write_text(
        f'[store]\nurl = "sqlite://{folder}/bindery.db"\n'
        f'[[upstreams]]\nname = "llama"\nkind = "openai-compatible"\nbase_url = "{url}/v1"\nmodels = ["smol"]\n'
        'prices = { "smol" = { input = 1.0, output = 2.0 } }\n'
    )
    front = Server("--config", str(folder / "bindery.toml"), "--max-num-seqs", "4")
    direct = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    yield direct, front.client(), url
    assert front.stop() == 0, front.output


def ask(client, model, **options):
    # Without its cache of prompts, whose state changes what it computes in the last bits.
    extra = {"cache_prompt": False, **options.pop("extra_body", {})}
    settings = {"max_tokens": 16, "temperature": 0, "extra_body": extra, **options}
    return client.chat.completions.create(model=model, messages=MESSAGES, **settings)


def test_an_answer_is_what_it_says_itself(houses):
    direct, front, _ = houses
    own, through = ask(direct, "smol"), ask(front, PLACE)
    assert through.choices[0].message.content == own.choices[0].message.content
    assert through.choices[0].finish_reason == own.choices[0].finish_reason == "length"
    for kind in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(through.usage, kind) == getattr(own.usage, kind), kind
    assert through.model == PLACE


def test_a_streamed_answer_is_the_same(houses):
    direct, front, _ = houses
    text, reason, usage = collected(ask(front, PLACE, stream=True, stream_options={"include_usage": True}))
    own = ask(direct, "smol")
    assert (text, reason) == (own.choices[0].message.content, "length")
    assert (usage.prompt_tokens, usage.completion_tokens) == (own.usage.prompt_tokens, 16)


def test_stop_sequences_and_schemas_reach_it(houses):
    direct, front, _ = houses
    stopped = {"max_tokens": 40, "stop": ["book"]}
    own, through = ask(direct, "smol", **stopped), ask(front, PLACE, **stopped)
    assert own.choices[0].finish_reason == through.choices[0].finish_reason == "stop"
    assert through.choices[0].message.content == own.choices[0].message.content
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    through = ask(front, PLACE, max_tokens=60, response_format=form)
    assert set(json.loads(through.choices[0].message.content)) == {"yes"}


def test_completions_and_its_own_fields_reach_it(houses):
    direct, front, _ = houses
    options = {"prompt": "The bookbinder", "max_tokens": 12, "temperature": 0, "extra_body": {"cache_prompt": False}}
    own = direct.completions.create(model="smol", **options)
    through = front.completions.create(model=PLACE, **options)
    assert through.choices[0].text == own.choices[0].text


def test_its_errors_keep_their_kind(houses):
    _, front, _ = houses
    long = [{"role": "user", "content": "word " * 6000}]
    with pytest.raises(openai.BadRequestError) as refused:
        front.chat.completions.create(model=PLACE, messages=long, max_tokens=4)
    assert refused.value.code == "context_length_exceeded", refused.value
    assert refused.value.response.headers["x-bindery-route"] == "upstream:llama"


def test_a_stream_that_is_left_ends_there(houses):
    _, front, url = houses
    stream = ask(front, PLACE, max_tokens=3500, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    busy = lambda: [slot for slot in get(f"{url}/slots") if slot["is_processing"]]
    assert busy()
    stream.close()
    last = None
    while slots := busy():
        last = slots[0]
        time.sleep(0.01)
    # Tokens of a slot that ended by itself would be all that were asked for.
    decoded = last["next_token"][0]["n_decoded"] if last else 0
    assert decoded < 3000, f"it goes on for nobody: {last}"
