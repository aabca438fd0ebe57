"""Starts the real binary on a free loopback port and hands tests a client of the official SDK.

The server is seen only from outside: its command line, its HTTP routes, its exit code and what it prints.
"""

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections import deque

import openai
import pytest

BINARY = os.environ.get("BINDERY_BIN", "target/debug/bindery")
MODEL = "smollm2-135m"
FULL = bool(os.environ.get("BINDERY_TEST_FULL"))
READY = re.compile(r"ready: (http://\S+)")


def free_port():
    """For programs that cannot choose one themselves."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def collected(chunks):
    """A stream's text, finish reason and usage."""
    text, reason, usage = "", None, None
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
        usage = chunk.usage or usage
    return text, reason, usage


class Server:
    """One `bindery serve` process."""

    def __init__(self, *flags, model=MODEL, env=None, wait_ready=True):
        command = [BINARY, "serve", model, "--port", "0", *flags]
        environment = {**os.environ, "NO_COLOR": "1", **(env or {})}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, errors="replace"
        )
        self.lines = deque(maxlen=2000)
        self.url = None
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait_ready:
            self.wait_ready()

    def _read(self):
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                if found := READY.search(line):
                    self.url = found[1]
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    @property
    def output(self):
        return "\n".join(self.lines)

    def wait_ready(self, timeout=120):
        deadline = time.monotonic() + timeout
        with self._changed:
            while self.url is None:
                left = deadline - time.monotonic()
                if left <= 0 or (self.process.poll() is not None and not self._reader.is_alive()):
                    raise AssertionError(f"the server did not become ready:\n{self.output}")
                self._changed.wait(min(left, 0.5))

    def client(self, **options):
        options.setdefault("api_key", "unused")
        return openai.OpenAI(base_url=f"{self.url}/v1", max_retries=0, timeout=120, **options)

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read().decode()

    def post(self, path, body, key=None):
        """Plain JSON in and out, for the routes that the SDK does not know."""
        data = json.dumps(body).encode()
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
        question = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(question, timeout=60) as response:
            return json.loads(response.read())

    def metric(self, name, **labels):
        """Sum of a metric's samples whose labels include `labels`; None where it does not exist."""
        total = None
        for line in self.get("/metrics").splitlines():
            if line.startswith("#"):
                continue
            key, _, value = line.rpartition(" ")
            base, _, rest = key.partition("{")
            if base == name and all(f'{k}="{v}"' in rest for k, v in labels.items()):
                total = (total or 0.0) + float(value)
        return total

    def wait_idle(self, timeout=60):
        """Until nothing runs or waits and no block is in use; fails with the levels seen last."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        deadline = time.monotonic() + timeout
        while True:
            levels = {name: self.metric(name) for name in names}
            if all(level == 0 for level in levels.values()):
                return
            assert time.monotonic() < deadline, f"still in use after {timeout} s: {levels}"
            time.sleep(0.02)

    def stop(self, signum=signal.SIGTERM, timeout=60):
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the server did not stop within {timeout} s:\n{self.output}") from None
        self._reader.join(10)
        return code


@pytest.fixture(scope="session")
def server():
    """One server for all tests that leave it as they found it."""
    instance = Server("--max-num-seqs", "64")
    yield instance
    assert instance.stop() == 0, instance.output
    assert "panicked" not in instance.output, instance.output


@pytest.fixture(scope="session")
def client(server):
    return server.client()


@pytest.fixture
def start():
    """Starts servers of a test's own; stops what is left of them."""
    started = []

    def run(*flags, **options):
        instance = Server(*flags, **options)
        started.append(instance)
        return instance

    yield run
    for instance in started:
        if instance.process.poll() is None:
            instance.process.kill()
            instance.process.wait()
