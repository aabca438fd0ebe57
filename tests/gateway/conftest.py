"""Runs the gateway's translations (crates/gateway/examples/translate.rs), one request a line; sends nothing anywhere."""

import json
import os
import subprocess

import pytest


class Translator:
    def __init__(self, program):
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, provider, model, request, **reply):
        job = {"provider": provider, "model": model, "request": {"model": model, **request}, **reply}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the translator has died"
        return json.loads(line)


@pytest.fixture(scope="session")
def translate():
    """BINDERY_TRANSLATE names the built example; without it the tests are skipped, aloud."""
    program = os.environ.get("BINDERY_TRANSLATE")
    if not program:
        pytest.skip("BINDERY_TRANSLATE is not set: cargo build -p bindery-gateway --example translate")
    translator = Translator(program)
    yield translator
    translator.process.stdin.close()
    assert translator.process.wait(timeout=10) == 0
