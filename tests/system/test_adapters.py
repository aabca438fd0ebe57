"""Adapters through the official SDK: log-probabilities as peft has them, whoever shares the batch; folders that change
while the server runs; names that belong to tenants; a stop under load.

The goldens in tests/adapters were computed by transformers and peft in f32 (tests/golden/adapters.py).
"""

import hashlib
import json
import random
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from array import array
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai
import pytest
from conftest import FULL

TESTS = Path(__file__).resolve().parent.parent
BASE = "tiny-llama"
ADAPTERS = ["llama-qv", "llama-all-rslora", "llama-patterns"]
FILES = ("adapter_config.json", "adapter_model.safetensors")
ADMIN = "the-admin-key"
# Log-probabilities in f32.
TOLERANCE = 2e-4


def goldens(name):
    """Of a base or of an adapter."""
    folder = TESTS / ("checkpoints" if name.startswith("tiny-") else "adapters") / name
    return json.loads((folder / "golden.json").read_text())["prompts"]


def checkpoint(parent, base):
    """A folder with the base and a tokenizer."""
    folder = parent / "base"
    folder.mkdir()
    for file in (f"{base}/config.json", f"{base}/model.safetensors", "tokenizer.json"):
        shutil.copy(TESTS / "checkpoints" / file, folder)
    return str(folder)


def in_small_steps(base):
    return "--max-num-batched-tokens", "24", "--served-model-name", base


@pytest.fixture
def serve(start, tmp_path):
    """Serves the tiny base, in steps of a few tokens, so that long prompts are computed in chunks beside others' tokens."""
    folder = checkpoint(tmp_path, BASE)
    return lambda *more, **options: start("--dtype", "f32", *in_small_steps(BASE), *more, model=folder, **options)


def given(*names):
    return [word for name in names for word in ("--adapter", f"{name}={TESTS / 'adapters' / name}")]


def score(client, model, prompt, more=0, **options):
    """The prompt's tokens and the greedy ones after it (`more` than the golden has), each with its log-probability."""
    answer = client.completions.create(
        model=model, prompt=prompt["tokens"], max_tokens=len(prompt["greedy"]) + more, temperature=0, echo=True, logprobs=5,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True}, **options,
    )
    assert answer.model == model
    logprobs = answer.choices[0].logprobs
    tokens = [int(token.removeprefix("token_id:")) for token in logprobs.tokens]
    return tokens, logprobs.token_logprobs


def check(model, prompt, scored):
    tokens, logprobs = scored
    where = f"{model}, {prompt['name']}"
    assert tokens == prompt["tokens"] + prompt["greedy"], where
    expected = prompt["next_logprobs"] + prompt["greedy_logprobs"]
    furthest = max(abs(a - b) for a, b in zip(logprobs[1:], expected, strict=True))
    assert furthest < TOLERANCE, f"{where}: {furthest}"


def write(folder, source):
    """An adapter's two files, whole before they have their name."""
    beside = folder.parent / f".{folder.name}-new"
    beside.mkdir()
    for file in FILES:
        shutil.copy(TESTS / "adapters" / source / file, beside / file)
    if folder.exists():
        folder.rename(folder.parent / f".{folder.name}-old")
    beside.rename(folder)
    shutil.rmtree(folder.parent / f".{folder.name}-old", ignore_errors=True)


def eventually(what, condition, timeout=60):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.02)


def says(client, model, name):
    """Whether the model answers as the golden of `name` has it; None where it is not there."""
    prompt = goldens(name)[0]
    try:
        return score(client, model, prompt)[0] == prompt["tokens"] + prompt["greedy"]
    except openai.NotFoundError:
        return None


def serve_two_tenants(serve, tmp_path, tables):
    """With a config of these tables: the server, a client of acme (by the second of its keys) and one of another tenant."""
    config = tmp_path / "bindery.toml"
    config.write_text(
        f'{tables}[[tenants]]\nname = "acme"\napi_key_env = "ACME_KEYS"\n'
        '[[tenants]]\nname = "other"\napi_key_env = "OTHER_KEY"\n'
    )
    server = serve("--config", str(config), env={"ACME_KEYS": "acme-1, acme-2", "OTHER_KEY": "other-1"})
    return server, server.client(api_key="acme-2"), server.client(api_key="other-1")


def test_three_adapters_and_the_base_in_one_batch_answer_as_peft_does(serve):
    server = serve(*given(*ADAPTERS))
    client = server.client()
    names = [BASE, *ADAPTERS]
    listed = {model.id: model.model_dump() for model in client.models.list()}
    assert list(listed) == [BASE, *sorted(ADAPTERS)]
    assert all(listed[name]["parent"] == (None if name == BASE else BASE) for name in names)
    asked = [(name, prompt) for name in names for prompt in goldens(name)] * 4
    random.Random(5).shuffle(asked)
    alone = [score(client, name, prompt) for name, prompt in asked[:8]]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda pair: score(client, *pair), asked))
    for (name, prompt), scored in zip(asked, together, strict=True):
        check(name, prompt, scored)
    assert together[:8] == alone, "not a bit of it depends on who shares the batch"
    server.wait_idle()
    assert server.metric("vllm:lora_requests_info", running_lora_adapters="", waiting_lora_adapters="") is not None


def test_vllms_flags_start_the_same_server(serve):
    module = json.dumps({"name": "qv", "path": str(TESTS / "adapters" / "llama-qv"), "base_model_name": BASE})
    server = serve(
        "--enable-lora", "--lora-modules", module, f"gguf={TESTS / 'adapters' / 'llama-qv' / 'adapter.gguf'}",
        "--max-loras", "2", "--max-lora-rank", "16", "--max-cpu-loras", "4",
    )
    for name in ("qv", "gguf"):
        assert says(server.client(), name, "llama-qv"), name
    assert "qv (rank" in server.output, server.output


def test_a_version_is_replaced_under_running_streams(serve):
    server = serve(*given("llama-qv"), "--adapter-root", str(TESTS / "adapters"), "--admin-key", ADMIN)
    client = server.client()
    prompt = goldens("llama-qv")[0]
    versions = ["llama-patterns", "llama-qv"]
    answers = [p["tokens"] + p["greedy"] for p in (goldens(name)[0] for name in ("llama-qv", *versions[:1]))]
    stop = threading.Event()
    seen = set()

    def ask():
        while not stop.is_set():
            tokens, _ = score(client, "llama-qv", prompt)
            # Goldens share their prompts.
            assert tokens in answers, "an answer of neither version"
            seen.add(answers.index(tokens))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for turn in range(20):
            body = {"lora_name": "llama-qv", "lora_path": versions[turn % 2], "load_inplace": True}
            assert "successfully" in server.post("/v1/load_lora_adapter", body, ADMIN)["message"]
            assert says(client, "llama-qv", versions[turn % 2]), "what comes after gets the new version"
        stop.set()
        for future in asking:
            future.result()
    assert seen == {0, 1}
    server.wait_idle()


def test_a_watched_folder_brings_replaces_and_takes_away(serve, tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    write(folder / "first", "llama-qv")
    config = tmp_path / "bindery.toml"
    config.write_text(f'[adapter_dir]\npath = "{folder}"\n')
    server = serve("--config", str(config))
    client = server.client()
    assert says(client, "first", "llama-qv"), "what is there at the start is known at once"

    # Half an adapter is none.
    (folder / "half").mkdir()
    shutil.copy(TESTS / "adapters/llama-qv/adapter_model.safetensors", folder / "half")
    write(folder / "second", "llama-patterns")
    eventually("the new one is known", lambda: says(client, "second", "llama-patterns"))
    assert [model.id for model in client.models.list()] == [BASE, "first", "second"]

    write(folder / "first", "llama-all-rslora")
    eventually("the new version is in use", lambda: says(client, "first", "llama-all-rslora"))

    # A version that is broken is not taken.
    (folder / "second" / "adapter_model.safetensors").write_bytes(b"not weights")
    eventually("it is noticed", lambda: "a new version is not used" in server.output)
    assert says(client, "second", "llama-patterns")

    # A link to elsewhere is not taken, one within the folder is.
    write(tmp_path / "elsewhere", "llama-qv")
    (folder / "out").symlink_to(tmp_path / "elsewhere")
    (folder / "link").symlink_to(folder / "first")
    eventually("the link is known", lambda: says(client, "link", "llama-all-rslora"))
    assert "out" not in [model.id for model in client.models.list()]
    assert "there is no adapter at" in server.output and str(folder) in server.output
    (folder / "link").unlink()
    eventually("the link is gone", lambda: says(client, "link", "llama-all-rslora") is None)

    # A file in the folder's place is the same name.
    (folder / "first").rename(folder / ".first-old")
    shutil.copy(TESTS / "adapters/llama-qv/adapter.gguf", folder / ".first.gguf")
    (folder / ".first.gguf").rename(folder / "first.gguf")
    eventually("the file is in use", lambda: says(client, "first", "llama-qv"))
    # So is a link to a file.
    (folder / ".store").mkdir()
    shutil.copy(TESTS / "adapters/llama-qv/adapter.gguf", folder / ".store" / "blob")
    (folder / "linked.gguf").symlink_to(folder / ".store" / "blob")
    eventually("the linked file is in use", lambda: says(client, "linked", "llama-qv"))
    (folder / "first.gguf").unlink()
    eventually("it is gone", lambda: says(client, "first", "llama-qv") is None)
    assert says(client, "second", "llama-patterns")
    assert server.stop() == 0


def halves(folder):
    """What makes an adapter's files ones that compute the same: B is doubled and lora_alpha halved."""
    config = json.loads((folder / FILES[0]).read_text())
    config["lora_alpha"] /= 2
    weights = (folder / FILES[1]).read_bytes()
    start = 8 + int.from_bytes(weights[:8], "little")
    header, data = json.loads(weights[8:start]), bytearray(weights[start:])
    for name, tensor in header.items():
        if "lora_B" in name:
            first, end = tensor["data_offsets"]
            doubled = array("f", data[first:end])
            data[first:end] = array("f", [2 * value for value in doubled]).tobytes()
    return {FILES[0]: json.dumps(config).encode(), FILES[1]: weights[:start] + bytes(data)}


def test_half_of_a_new_version_in_a_watched_folder_is_never_used(serve, tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    for name in ("asked", "unasked"):
        write(folder / name, "llama-qv")
    config = tmp_path / "bindery.toml"
    config.write_text(f'[adapter_dir]\npath = "{folder}"\n')
    server = serve("--config", str(config), "--admin-key", ADMIN)
    client = server.client()

    def adapters():
        question = urllib.request.Request(server.url + "/v1/adapters", headers={"authorization": f"Bearer {ADMIN}"})
        with urllib.request.urlopen(question) as answer:
            return json.load(answer)["data"]

    def digest(name):
        return next(entry["digest"] for entry in adapters() if entry["name"] == name)

    assert says(client, "asked", "llama-qv")
    first = digest("asked")
    new = halves(folder / "asked")
    # Either file of the one version fits the other of the other, and half of what either version computes is wrong.
    def put(file):
        for name in ("asked", "unasked"):
            (folder / name / file).write_bytes(new[file])

    put(FILES[0])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(says, client, "unasked", "llama-qv")
        # Longer than two looks, shorter than what counts as left alone.
        end = time.monotonic() + 4
        while time.monotonic() < end:
            assert says(client, "asked", "llama-qv")
            time.sleep(0.1)
        assert not waiting.done(), "it waits for the other half"
        put(FILES[1])
        assert waiting.result()
    eventually("the new version is in use", lambda: digest("asked") != first)
    assert says(client, "asked", "llama-qv") and digest("unasked") == digest("asked")
    message = server.post("/v1/unload_lora_adapter", {"lora_name": "asked"}, ADMIN)["message"]
    assert "in a folder that is watched" in message
    assert says(client, "asked", "llama-qv") is None
    write(folder / "asked", "llama-patterns")
    eventually("the next version has the name again", lambda: says(client, "asked", "llama-patterns"))

    # A name that stands for something else is not taken.
    write(folder / BASE, "llama-qv")
    eventually("it is told", lambda: "its name is that of the base or of a model elsewhere" in server.output)
    assert says(client, BASE, BASE)


def test_a_watched_folder_may_be_a_tenants_own(serve, tmp_path):
    for folder in ("shared", "acmes"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "shared" / "everyones", "llama-qv")
    write(tmp_path / "shared" / "both", "llama-qv")
    # The folder that comes first has the name.
    write(tmp_path / "acmes" / "both", "llama-patterns")
    tables = (
        f'[[adapter_dir]]\npath = "{tmp_path / "shared"}"\n'
        f'[[adapter_dir]]\npath = "{tmp_path / "acmes"}"\ntenants = ["acme"]\n'
    )
    server, acme, other = serve_two_tenants(serve, tmp_path, tables)
    write(tmp_path / "acmes" / "ours", "llama-patterns")
    eventually("it appears", lambda: says(acme, "ours", "llama-patterns"))
    assert [model.id for model in acme.models.list()] == [BASE, "both", "everyones", "ours"]
    assert [model.id for model in other.models.list()] == [BASE, "both", "everyones"]
    assert says(other, "ours", "llama-patterns") is None, "to others it does not exist"
    assert says(other, "both", "llama-qv") and says(acme, "both", "llama-qv")
    # A new version stays its tenant's.
    write(tmp_path / "acmes" / "ours", "llama-all-rslora")
    eventually("the new version is in use", lambda: says(acme, "ours", "llama-all-rslora"))
    assert says(other, "ours", "llama-all-rslora") is None
    shutil.rmtree(tmp_path / "shared" / "both")
    eventually("the name is free", lambda: says(other, "both", "llama-qv") is None)
    assert server.stop() == 0


def test_the_memory_of_an_unloaded_adapter_goes_back(serve):
    server = serve("--adapter-root", str(TESTS / "adapters"), "--admin-key", ADMIN)

    def resident():
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def round_of(names):
        for name in names:
            server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "llama-all-rslora"}, ADMIN)
        full = resident()
        for name in names:
            server.post("/v1/unload_lora_adapter", {"lora_name": name}, ADMIN)
        server.wait_idle()
        return full

    names = [f"a{at}" for at in range(60)]
    # What reading needs besides is there after the first round.
    round_of(names)
    empty = resident()
    full = round_of(names)
    assert full - empty > 60 * 100, f"KiB with none {empty}, with 60 {full}"
    eventually("the memory is free", lambda: resident() - empty < (full - empty) / 4)


def test_adapters_of_tenants_in_a_config_file(serve, tmp_path):
    tables = (
        f'[[adapters]]\nname = "ours"\nsource = "{TESTS / "adapters/llama-qv"}"\ntenants = ["acme"]\n'
        f'[[adapters]]\nname = "all"\nsource = "{TESTS / "adapters/llama-patterns"}"\npinned = true\n'
        '[[routes]]\nmodel = "house"\nrules = [{ to = "ours" }]\n'
    )
    server, acme, other = serve_two_tenants(serve, tmp_path, tables)
    # Without any upstream, too.
    assert server.metric("vllm:lora_requests_info") is not None
    # A model of rules that lead only to what others have is none, too.
    assert [model.id for model in acme.models.list()] == [BASE, "all", "ours", "house"]
    assert [model.id for model in other.models.list()] == [BASE, "all"]
    assert says(acme, "ours", "llama-qv") and says(other, "all", "llama-patterns")
    assert acme.completions.create(model="house", prompt="a", max_tokens=1).choices
    messages = set()
    for name in ("ours", "house", "none"):
        with pytest.raises(openai.NotFoundError) as caught:
            other.completions.create(model=name, prompt="a")
        messages.add(caught.value.body["message"].replace(name, "NAME"))
    assert len(messages) == 1
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="nobody").models.list()


class Hub(BaseHTTPRequestHandler):
    """A hub with one repository, `org/adapter`, at one commit; it counts the files it sends."""

    files = {file: (TESTS / "adapters/llama-qv" / file).read_bytes() for file in FILES}
    sent = []
    commit = "0123456789abcdef0123456789abcdef01234567"

    def answer(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/adapter/tree/"):
            entries = [{"type": "file", "oid": "0", "size": len(b), "path": name} for name, b in self.files.items()]
            return 200, {"content-type": "application/json"}, json.dumps(entries).encode()
        name = path.rpartition("/")[2]
        if not path.startswith("/org/adapter/resolve/") or name not in self.files:
            return 404, {}, b""
        body = self.files[name]
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return 200, {"x-repo-commit": self.commit, "x-linked-etag": etag, "x-linked-size": str(len(body))}, body

    def respond(self, send_body):
        status, headers, body = self.answer()
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if send_body:
            self.wfile.write(body)

    def do_HEAD(self):
        self.respond(False)

    def do_GET(self):
        self.sent.append(self.path.rpartition("/")[2])
        self.respond(True)

    def log_message(self, *_):
        pass


def test_an_adapter_of_the_hub_is_fetched_when_it_is_first_asked_for(serve, tmp_path):
    config = tmp_path / "bindery.toml"
    config.write_text('[[adapters]]\nname = "far"\nsource = "org/adapter"\n')
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    env = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1",
        "BINDERY_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0",
    }
    try:
        server = serve("--config", str(config), env=env)
        assert Hub.sent == [], "nothing is fetched before it is asked for"
        client = server.client()
        assert [(model.id, model.root) for model in client.models.list()][1] == ("far", "org/adapter")
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda _: says(client, "far", "llama-qv"), range(4))) == [True] * 4
        assert sorted(file for file in Hub.sent if file in FILES) == sorted(FILES), "each file once"
        assert server.stop() == 0
    finally:
        hub.shutdown()
    # What was fetched serves without a hub; what was not fails the start.
    server = serve("--adapter", "far=org/adapter", "--offline", env=env)
    assert says(server.client(), "far", "llama-qv")
    other = serve("--adapter", "far=org/other", "--offline", env=env, wait_ready=False)
    assert other.process.wait(60) == 1
    other._reader.join(10)
    assert "org/other is not on this machine and the network may not be used" in other.output, other.output


def test_a_broken_adapter_fails_the_start_with_its_reason(serve, tmp_path):
    write(tmp_path / "cut", "llama-qv")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    server = serve("--adapter", f"cut={tmp_path / 'cut'}", wait_ready=False)
    assert server.process.wait(60) == 1
    server._reader.join(10)
    assert 'the adapter "cut" cannot be loaded' in server.output and "adapter_model.safetensors" in server.output
    assert "ready: " not in server.output

    wrong = serve(*given("mistral-layers"), "--max-lora-rank", "1", wait_ready=False)
    assert wrong.process.wait(60) == 1
    wrong._reader.join(10)
    assert "mistral-layers" in wrong.output, wrong.output


def resident_bytes(server):
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


class Names:
    """Names whose adapters change while they are asked for, and which version an answer may be of."""

    def __init__(self, server, names, sources):
        self.server = server
        self.lock = threading.Lock()
        self.versions = {name: [] for name in names}
        self.newest = dict.fromkeys(names, 0)
        for name in names:
            self.load(name, sources[0])

    def load(self, name, source):
        """Only ever from one thread. From the asking on answers may be of the new version, from its end on none is of an older."""
        with self.lock:
            self.versions[name].append(source)
        body = {"lora_name": name, "lora_path": source, "load_inplace": True}
        self.server.post("/v1/load_lora_adapter", body, ADMIN)
        with self.lock:
            self.newest[name] = len(self.versions[name]) - 1

    def moment(self, name):
        with self.lock:
            return self.newest[name]

    def since(self, name, moment):
        with self.lock:
            return set(self.versions[name][moment:])


def test_churn_over_http_gives_right_answers_and_leaves_nothing(serve, tmp_path):
    """Loads in place, unloadings, first requests for adapters of a watched folder, disconnects and plain requests at random, with
    fewer places than names and a cache that is too small for all: every answer is that of a version the name had meanwhile.
    """
    sources = ["llama-qv", "llama-all-rslora", "llama-patterns"]
    # Adapters' goldens share their prompts; the base has its own.
    answer_of = {source: [p["tokens"] + p["greedy"] for p in goldens(source)] for source in [BASE, *sources]}
    assert len({str(answer_of[source]) for source in sources}) == 3, "each tells itself apart"
    folder = tmp_path / "watched"
    folder.mkdir()
    write(folder / "w0", "llama-qv")
    write(folder / "w1", "llama-patterns")
    config = tmp_path / "bindery.toml"
    config.write_text(f'[adapter_dir]\npath = "{folder}"\n')
    server = serve(
        "--config", str(config), "--adapter-root", str(TESTS / "adapters"), "--admin-key", ADMIN, "--max-loras", "2",
        "--max-cpu-loras", "4", "--max-model-len", "160", "--kv-cache-memory", "96KiB",
    )
    names = Names(server, ["n0", "n1", "n2"], sources)
    rounds = 1500 if FULL else 40
    done = threading.Event()

    def ask(seed):
        random_ = random.Random(seed)
        client = server.client()
        for _ in range(rounds):
            name = random_.choice([BASE, "w0", "w1", "n0", "n1", "n2"])
            fixed = {BASE: BASE, "w0": "llama-qv", "w1": "llama-patterns"}.get(name)
            prompts = goldens(fixed or sources[0])
            number = random_.randrange(len(prompts))
            prompt = prompts[number]
            moment = None if fixed else names.moment(name)
            try:
                if random_.random() < 0.2:
                    events = client.completions.create(
                        model=name, prompt=prompt["tokens"], max_tokens=60, temperature=0, stream=True,
                        extra_body={"ignore_eos": True},
                    )
                    next(iter(events))
                    events.close()
                    continue
                tokens, _ = score(client, name, prompt, more=random_.choice([0, 50]))
            except openai.NotFoundError:
                assert not fixed, f"{name} is never unloaded"
                continue
            # Goldens end where they will.
            possible = [answer_of[source][number] for source in ({fixed} if fixed else names.since(name, moment))]
            assert any(tokens[: len(answer)] == answer for answer in possible), f"{name}: an answer of no version that it had"

    def change():
        random_ = random.Random(99)
        while not done.is_set():
            name = random_.choice(["n0", "n1", "n2"])
            if random_.random() < 0.2:
                try:
                    server.post("/v1/unload_lora_adapter", {"lora_name": name}, ADMIN)
                except urllib.error.HTTPError as error:
                    assert error.code == 409, "running requests hold it"
            names.load(name, random_.choice(sources))

    with ThreadPoolExecutor(9) as pool:
        changing = pool.submit(change)
        try:
            for future in [pool.submit(ask, 100 + number) for number in range(8)]:
                future.result()
            warm = resident_bytes(server)
            for future in [pool.submit(ask, 200 + number) for number in range(8)]:
                future.result()
        finally:
            done.set()
        changing.result()
    server.wait_idle()
    assert server.metric("vllm:num_preemptions_total") > 0, "the cache was too small for all"
    assert server.metric("vllm:lora_requests_info", running_lora_adapters="", waiting_lora_adapters="") is not None
    # As many requests and changes again have left nothing behind: an adapter here is some 50 KiB, a version a change.
    assert resident_bytes(server) < warm + (16 << 20)
    assert server.stop() == 0
    assert "panicked" not in server.output


def test_a_stop_under_load_ends_every_stream_whole(serve):
    server = serve(*given(*ADAPTERS), "--admin-key", ADMIN)
    begun = threading.Semaphore(0)

    def stream(model):
        reasons = []
        events = server.client().completions.create(
            model=model, prompt=[1, 2, 3], max_tokens=180, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        for number, event in enumerate(events):
            if number == 0:
                begun.release()
            reasons += [choice.finish_reason for choice in event.choices if choice.finish_reason]
        return reasons

    with ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(stream, [BASE, *ADAPTERS][number % 4]) for number in range(16)]
        for _ in streams:
            assert begun.acquire(timeout=60)
        # An adapter is being waited for when the signal comes; it must hold up nothing.
        unload = pool.submit(unloaded, server, "llama-qv")
        assert server.stop(signal.SIGTERM) == 0, server.output
        assert [future.result() for future in streams] == [["length"]] * 16
        unload.result()
    assert "panicked" not in server.output


def unloaded(server, name):
    try:
        return server.post("/v1/unload_lora_adapter", {"lora_name": name}, ADMIN)
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        # The server may be gone before it can answer.
        return error
