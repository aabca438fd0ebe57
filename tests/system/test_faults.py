"""Signals, bad flags, hostile bodies: nothing hangs, nothing panics, every message says what to do."""

import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import urllib.parse

import openai
import pytest
from conftest import BINARY, MODEL

CHAT = [{"role": "user", "content": "Count from one to one hundred in words."}]


def request(server, method, path, body=b"", headers=None, timeout=60):
    address = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=timeout)
    try:
        connection.request(method, path, body, {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


HOSTILE = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"\xff\xfe\x00",
    b'{"model": "smollm2-135m", "prompt": "\xff"}',
    b'{"model": "smollm2-135m", "prompt": "a", "temperature": NaN}',
    b'{"model": "smollm2-135m", "prompt": "a", "temperature": 1e999}',
    b'{"model": "smollm2-135m", "prompt": "a", "temperature": "hot"}',
    b'{"model": "smollm2-135m", "prompt": "a", "max_tokens": -1}',
    b'{"model": "smollm2-135m", "prompt": "a", "max_tokens": 99999999999999999999}',
    b'{"model": "smollm2-135m", "prompt": "a", "max_tokens": 1.5}',
    b'{"model": "smollm2-135m", "prompt": "a", "n": 0}',
    b'{"model": "smollm2-135m", "prompt": "a", "n": 1000000}',
    b'{"model": "smollm2-135m", "prompt": "a", "top_p": 0}',
    b'{"model": "smollm2-135m", "prompt": "a", "top_k": -5}',
    b'{"model": "smollm2-135m", "prompt": "a", "logit_bias": {"x": 1}}',
    b'{"model": "smollm2-135m", "prompt": "a", "logit_bias": {"99999999": 1}}',
    b'{"model": "smollm2-135m", "prompt": "a", "stop": 5}',
    b'{"model": "smollm2-135m", "prompt": "a", "suffix": "b"}',
    b'{"model": "smollm2-135m", "prompt": ""}',
    b'{"model": "smollm2-135m", "prompt": []}',
    b'{"model": "smollm2-135m", "prompt": [[]]}',
    b'{"model": "smollm2-135m", "prompt": [-1]}',
    b'{"model": "smollm2-135m", "prompt": [4294967295]}',
    b'{"model": "smollm2-135m", "prompt": [1, "a"]}',
    b'{"model": "smollm2-135m", "prompt": {"a": 1}}',
    b'{"model": 5, "prompt": "a"}',
    b'{"model": "smollm2-135m", "prompt": ' + b"[" * 100000 + b"]" * 100000 + b"}",
    b'{"model": "smollm2-135m", "messages": []}',
    b'{"model": "smollm2-135m", "messages": "hello"}',
    b'{"model": "smollm2-135m", "messages": [{"role": "alien", "content": "a"}]}',
    b'{"model": "smollm2-135m", "messages": [{"role": "user"}]}',
    b'{"model": "smollm2-135m", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
    b'{"model": "smollm2-135m", "messages": [{"role": "user", "content": "a"}], "top_logprobs": 5}',
    b'{"model": "smollm2-135m", "messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json"}}',
    b'{"model": "smollm2-135m", "messages": [{"role": "user", "content": "a"}], "structured_outputs": {"regex": "(("}}',
    b'{"model": "smollm2-135m", "prompt": "a", "structured_outputs": {"json": {"$ref": "file:///etc/passwd"}}}',
    b'{"model": "smollm2-135m", "tokens": ["a"]}',
    b'{"model": "smollm2-135m", "tokens": [4294967295]}',
]


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_hostile_bodies_are_client_errors(server, route):
    for body in HOSTILE:
        status, headers, answer = request(server, "POST", route, body)
        # A body meant for another route may be fine here or not; it is never the server's fault.
        assert status < 500, (route, body[:80], status, answer[:300])
        if status >= 400:
            error = json.loads(answer)["error"]
            assert error["message"] and error["type"], (route, body[:80], answer[:300])
        assert "x-request-id" in {name.lower() for name in headers}
    server.wait_idle()


def test_a_ten_megabyte_prompt_is_refused_quickly_and_stalls_nobody(server, client):
    body = json.dumps({"model": "smollm2-135m", "prompt": "a b " * 2_600_000}).encode()
    stream = client.completions.create(
        model="smollm2-135m", prompt="Once", max_tokens=256, temperature=0, stream=True, extra_body={"ignore_eos": True},
        stream_options={"include_usage": True},
    )
    chunks = []

    def read():
        for chunk in stream:
            chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    # One after the other for as long as the stream lasts: what comes of it, comes while one of them is worked on.
    num_came_meanwhile = []
    while reader.is_alive():
        num_before = len(chunks)
        status, _, answer = request(server, "POST", "/v1/completions", body)
        assert status == 400, answer[:300]
        assert json.loads(answer)["error"]["code"] == "context_length_exceeded"
        num_came_meanwhile.append(len(chunks) - num_before)
    reader.join()
    assert len(num_came_meanwhile) > 1, "the first was refused before 256 tokens were written"
    assert sum(num_came_meanwhile) > 0, "the stream went on"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 256


def test_scores_of_a_prompt_are_not_multiplied_without_bound(server):
    """A request of 10 KB once gave an answer of 50 MB: every choice repeats the prompt's log-probabilities."""
    body = {"model": "smollm2-135m", "prompt": "word " * 2000, "n": 64, "max_tokens": 1, "echo": True, "logprobs": 20}
    status, _, answer = request(server, "POST", "/v1/completions", json.dumps(body).encode())
    assert status == 400, answer[:300]
    assert json.loads(answer)["error"]["param"] == "prompt_logprobs"
    server.wait_idle()


def test_more_prompts_than_the_queue_holds_is_the_requests_fault(start):
    small = start("--max-queued-requests", "2")
    body = {"model": "smollm2-135m", "prompt": ["a", "b", "c"], "max_tokens": 1}
    status, _, answer = request(small, "POST", "/v1/completions", json.dumps(body).encode())
    assert status == 400, answer[:300]
    assert "--max-queued-requests" in json.loads(answer)["error"]["message"]
    assert small.stop() == 0


def test_a_body_over_the_limit_is_413(server):
    status, _, answer = request(server, "POST", "/v1/completions", b'{"prompt": "' + b"a" * (40 << 20) + b'"}')
    assert status == 413, answer[:300]


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("GET", "/v1/models/nothing", 404), ("DELETE", "/health", 405),
])
def test_wrong_routes_answer_in_the_same_shape(server, method, path, status):
    got, _, answer = request(server, method, path)
    assert got == status
    assert json.loads(answer)["error"]["message"]


def test_unknown_fields_are_named_not_refused(server):
    body = {"model": "smollm2-135m", "prompt": "a", "max_tokens": 1, "no_such_field": 1}
    status, headers, _ = request(server, "POST", "/v1/completions", json.dumps(body).encode())
    assert status == 200
    warning = {name.lower(): value for name, value in headers.items()}["x-bindery-warning"]
    assert "no_such_field" in warning


def test_a_half_sent_request_is_dropped(server):
    address = urllib.parse.urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{\"model\":")
    assert json.loads(server.get("/v1/models"))["data"]
    server.wait_idle()


def test_keys(start):
    guarded = start("--api-key", "first", "--api-key", "second")
    for key in ("first", "second"):
        assert guarded.client(api_key=key).models.list().data
    with pytest.raises(openai.AuthenticationError):
        guarded.client(api_key="third").models.list()
    assert request(guarded, "POST", "/v1/completions", b"{}")[0] == 401
    for open_route in ("/health", "/ready", "/metrics", "/version", "/openapi.json"):
        assert request(guarded, "GET", open_route)[0] == 200, open_route
    assert guarded.stop() == 0


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(start):
    server = start("--shutdown-timeout", "10m")
    stream = server.client().chat.completions.create(
        model="smollm2-135m", messages=CHAT, max_tokens=500, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    first = next(stream)
    assert first.choices
    address = urllib.parse.urlsplit(server.url)
    body = b'{"model": "smollm2-135m", "prompt": "a", "max_tokens": 1}'
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        # A request that is let in and has yet to send its body: while it waits the port is open, however soon the
        # stream ends.
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(body)
        )
        answer = connection.makefile("rb")
        assert answer.readline().split()[1] == b"100"
        assert answer.readline() == b"\r\n"
        server.process.send_signal(signal.SIGTERM)
        while (status := request(server, "GET", "/ready")[0]) != 503:
            assert status == 200
        assert request(server, "POST", "/v1/completions", body)[0] == 503
        connection.sendall(body)
        assert answer.readline().split()[1] == b"200", "what was let in before is answered"
    chunks = list(stream)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length", "the running stream ends whole"
    assert server.process.wait(30) == 0


def test_shutdown_timeout_cuts_what_is_left(start):
    server = start("--shutdown-timeout", "1s")
    errors = []

    def read():
        try:
            for _ in server.client().completions.create(
                model="smollm2-135m", prompt="a", max_tokens=8000, temperature=0, stream=True,
                extra_body={"ignore_eos": True},
            ):
                started.set()
        except openai.APIError as error:
            errors.append(error)

    started = threading.Event()
    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(60)
    assert server.stop(timeout=20) == 0
    reader.join(20)
    assert not reader.is_alive()
    assert errors, "the stream that was cut ended with an error, not as if complete"


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["serve", "smolm2-135m"], 1, ["smollm2-135m"]),
    (["serve", "/no/such/model.gguf"], 1, ["/no/such/model.gguf"]),
    (["serve", MODEL, "--port", "99999"], 2, ["99999"]),
    (["serve", MODEL, "--no-such-flag"], 2, ["--no-such-flag"]),
    (["serve", MODEL, "--max-model-len", "1000000"], 1, ["1000000", "8192"]),
    (["serve", MODEL, "--kv-cache-memory", "1KiB"], 1, ["--kv-cache-memory"]),
    (["serve", MODEL, "--device", "cuda"], 2, ["cuda", "cpu"]),
    (["serve", MODEL, "--adapter", "a=b"], 2, ["--adapter a=b", "there is no adapter"]),
    (["serve", MODEL, "--enable-prefix-caching"], 2, ["not in this version yet"]),
    (["keys", "create"], 2, ["keys create", "--tenant <NAME>"]),
])
def test_bad_command_lines_say_what_to_do(arguments, code, words):
    done = subprocess.run([BINARY, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert "panicked" not in done.stderr


def test_a_taken_port_is_named(server):
    port = str(urllib.parse.urlsplit(server.url).port)
    done = subprocess.run([BINARY, "serve", MODEL, "--port", port], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert port in done.stderr


def test_a_broken_model_file_is_refused_with_its_name(tmp_path):
    broken = tmp_path / "broken.gguf"
    with open(os.environ["BINDERY_TEST_MODEL"], "rb") as whole:
        broken.write_bytes(whole.read(1 << 20))
    done = subprocess.run([BINARY, "serve", str(broken), "--port", "0"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "broken.gguf" in done.stderr
    assert "hint: the file is cut off" in done.stderr
    assert "panicked" not in done.stderr
