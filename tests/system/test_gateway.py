"""The gateway from outside: keys made by the command line, an upstream that is another Bindery, budgets that 64 clients at
once do not overspend, and a log that verifies; all through the official SDK.
"""

import json
import subprocess
import threading
import time

import openai
import pytest

from conftest import BINARY, MODEL

PRICE = 1.0  # dollars a million tokens, in and out


def run(*arguments, **options):
    return subprocess.run([BINARY, *arguments], capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def house(start, tmp_path):
    """A server with a gateway whose only upstream is another server, and a key of each tenant."""

    def build(tenants, rest=""):
        upstream = start("--max-num-seqs", "64")
        config = tmp_path / "bindery.toml"
        key_file = tmp_path / "audit-key"
        key_file.write_text("cd" * 32)
        config.write_text(f"""
[store]
url = "sqlite://{tmp_path}/bindery.db"
[[upstreams]]
name = "up"
kind = "openai-compatible"
base_url = "{upstream.url}/v1"
models = ["{MODEL}"]
prices = {{ "{MODEL}" = {{ input = {PRICE}, output = {PRICE} }} }}
[audit]
path = "{tmp_path}/log"
key_file = "{key_file}"
{tenants}
{rest}
""")
        server = start("--config", str(config), "--max-num-seqs", "64")

        def key(tenant):
            made = run("keys", "create", "--tenant", tenant, "--config", str(config))
            assert made.returncode == 0, made.stderr
            text = made.stdout.strip()
            assert len(made.stdout.splitlines()) == 1 and text.startswith("bdy_"), made.stdout
            client = server.client(api_key=text)
            deadline = time.monotonic() + 30
            while True:
                try:
                    client.models.list()
                    return client
                except openai.AuthenticationError:
                    assert time.monotonic() < deadline, "the server never learnt of the key"

        server.config, server.upstream = str(config), upstream
        return server, key

    return build


def ask(client, model, **options):
    options = {"max_tokens": 8, "temperature": 0, **options}
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": "Name a colour."}], **options
    )
    return raw.headers, raw.parse()


def test_a_request_runs_where_its_rules_say_and_is_accounted_for(house):
    server, key = house(
        '[[tenants]]\nname = "acme"\nprivacy = "any"\n[[tenants]]\nname = "vault"\nprivacy = "local-only"\n',
        f"""[[routes]]
model = "auto"
rules = [{{ when = {{ reasoning_effort = "high" }}, to = ["up/{MODEL}", "local"] }}, {{ to = "local" }}]
""",
    )
    with pytest.raises(openai.AuthenticationError):
        ask(server.client(), MODEL)
    acme, vault = key("acme"), key("vault")
    here_headers, here = ask(acme, "auto")
    there_headers, there = ask(acme, "auto", reasoning_effort="high")
    assert (here_headers["x-bindery-route"], there_headers["x-bindery-route"]) == ("local", "upstream:up")
    # The same weights on both sides, greedy.
    assert here.choices[0].message.content == there.choices[0].message.content
    assert here.usage.completion_tokens == there.usage.completion_tokens == 8
    stream = acme.chat.completions.create(
        model=f"up/{MODEL}", messages=[{"role": "user", "content": "Name a colour."}], max_tokens=8, temperature=0,
        stream=True, stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == here.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 8
    assert ask(vault, "auto", reasoning_effort="high")[0]["x-bindery-route"] == "local"
    with pytest.raises(openai.PermissionDeniedError):
        ask(vault, f"up/{MODEL}")

    costs = run("costs", "--by", "tenant,model", "--json", "--config", server.config)
    assert costs.returncode == 0, costs.stderr
    rows = {(row["tenant"], row["model"]): row for row in json.loads(costs.stdout)["rows"]}
    paid = rows["acme", f"up/{MODEL}"]
    assert (paid["requests"], paid["completion_tokens"]) == (2, 16)
    assert sum(row["requests"] for (tenant, _), row in rows.items() if tenant == "vault") == 1
    assert server.stop() == 0, server.output
    verified = run("audit", "verify", "--config", server.config)
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_64_clients_at_once_end_within_the_budget(house):
    # Room for about twelve calls of up to some 600 tokens reserved each, at a dollar a million.
    ceiling = 0.008
    server, key = house(f'[[tenants]]\nname = "acme"\nprivacy = "any"\nbudget = {{ usd_per_day = {ceiling} }}\n')
    client = key("acme")
    outcomes, lock = [], threading.Lock()

    def one():
        try:
            ask(client, f"up/{MODEL}")
            outcome = "answered"
        except openai.RateLimitError as error:
            outcome = error.code
        with lock:
            outcomes.append(outcome)

    threads = [threading.Thread(target=one) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert set(outcomes) <= {"answered", "budget_exceeded"} and len(outcomes) == 64, outcomes
    assert "answered" in outcomes and "budget_exceeded" in outcomes
    costs = run("costs", "--by", "tenant", "--json", "--config", server.config)
    [row] = json.loads(costs.stdout)["rows"]
    assert row["requests"] == outcomes.count("answered")
    assert 0 < float(row["upstream_cost"]) <= ceiling, row
