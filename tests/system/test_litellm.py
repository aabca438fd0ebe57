"""Independent proof of the wires: LiteLLM's proxy plays OpenAI, Anthropic and Gemini, and has another Bindery behind it.

What the gateway writes in a provider's format LiteLLM reads by its own lights, asks the server behind it, and writes the answer in
that format; so the official SDK must get, by way of each provider's format, what the server behind says when it is asked directly.
Runs where BINDERY_LITELLM names the program (`cargo xtask test --full` installs it).
"""

import os
import secrets
import subprocess
import time
import urllib.request

import openai
import pytest

from conftest import MODEL, Server, collected, free_port

LITELLM = os.environ.get("BINDERY_LITELLM")
pytestmark = pytest.mark.skipif(not LITELLM, reason="BINDERY_LITELLM is not set: only with --full")

PLACES = ["oa/gpt-4.1", "claude/claude-3-haiku-20240307", "google/gemini-2.5-flash"]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does a bookbinder do?"},
]


@pytest.fixture(scope="module")
def houses(tmp_path_factory):
    """A client of the server behind, and one of the gateway in front of LiteLLM."""
    folder = tmp_path_factory.mktemp("litellm")
    key, port = "sk-" + secrets.token_hex(24), free_port()
    behind = Server()
    models = "".join(
        f'  - model_name: {place.split("/")[1]}\n'
        f'    litellm_params: {{model: openai/{MODEL}, api_base: "{behind.url}/v1", api_key: none}}\n'
        for place in PLACES
    )
    busy = "  - model_name: gpt-4o\n    litellm_params: {model: openai/x, api_key: none, mock_response: litellm.RateLimitError}\n"
    (folder / "litellm.yaml").write_text(
        f"model_list:\n{models}{busy}general_settings: {{master_key: {key}}}\n"
        "litellm_settings: {use_chat_completions_url_for_anthropic_messages: true, telemetry: false}\n"
    )
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1"}
    with open(folder / "litellm.log", "w") as log:
        proxy = subprocess.Popen(
            [LITELLM, "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
        )
    said = lambda: (folder / "litellm.log").read_text()[-3000:]
    deadline = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveliness", timeout=5)
            break
        except OSError:
            assert proxy.poll() is None and time.monotonic() < deadline, said()
            time.sleep(0.2)
    upstreams = "".join(
        f'[[upstreams]]\nname = "{name}"\nkind = "{kind}"\nbase_url = "http://127.0.0.1:{port}{path}"\n'
        f'api_key_env = "LITELLM_KEY"\nmodels = [{models}]\n'
        for name, kind, path, models in [
            ("oa", "openai", "/v1", '"gpt-4.1", "gpt-4o"'),
            ("claude", "anthropic", "", '"claude-3-haiku-20240307"'),
            ("google", "gemini", "", '"gemini-2.5-flash"'),
        ]
    )
    (folder / "bindery.toml").write_text(f'[store]\nurl = "sqlite://{folder}/bindery.db"\n{upstreams}')
    front = Server("--config", str(folder / "bindery.toml"), env={"LITELLM_KEY": key})
    yield behind.client(), front.client()
    proxy.terminate()
    proxy.wait(30)
    assert front.stop() == 0, front.output
    assert behind.stop() == 0, behind.output


def ask(client, model, **options):
    return client.chat.completions.create(model=model, messages=MESSAGES, **{"max_tokens": 16, "temperature": 0, **options})


@pytest.mark.parametrize("place", PLACES)
def test_an_answer_is_what_the_server_behind_says(houses, place):
    behind, front = houses
    direct, through = ask(behind, MODEL), ask(front, place)
    assert through.choices[0].message.content == direct.choices[0].message.content
    assert through.choices[0].finish_reason == direct.choices[0].finish_reason == "length"
    for kind in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(through.usage, kind) == getattr(direct.usage, kind), kind
    assert through.model == place


@pytest.mark.parametrize("place", PLACES)
def test_a_streamed_answer_is_the_same(houses, place):
    behind, front = houses
    text, reason, usage = collected(ask(front, place, stream=True, stream_options={"include_usage": True}))
    direct = ask(behind, MODEL)
    assert (text, reason) == (direct.choices[0].message.content, "length")
    assert (usage.prompt_tokens, usage.completion_tokens) == (direct.usage.prompt_tokens, 16)


@pytest.mark.parametrize("place", PLACES)
def test_stop_sequences_reach_the_server_behind(houses, place):
    behind, front = houses
    direct = ask(behind, MODEL, max_tokens=40, stop=["book"])
    through = ask(front, place, max_tokens=40, stop=["book"])
    assert direct.choices[0].finish_reason == "stop"
    assert through.choices[0].message.content == direct.choices[0].message.content
    assert through.choices[0].finish_reason == "stop"


def test_schemas_reach_the_server_behind(houses):
    behind, front = houses
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    direct = ask(behind, MODEL, max_tokens=60, response_format=form)
    for place in ("oa/gpt-4.1", "google/gemini-2.5-flash"):
        through = ask(front, place, max_tokens=60, response_format=form)
        assert through.choices[0].message.content == direct.choices[0].message.content, place


def test_errors_of_the_one_between_keep_their_kind(houses):
    _, front = houses
    with pytest.raises(openai.RateLimitError) as refused:
        ask(front, "oa/gpt-4o")
    assert refused.value.response.headers["x-bindery-route"] == "upstream:oa"
