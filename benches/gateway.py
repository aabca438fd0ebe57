"""What the gateway costs a local request, and what overflow does for the time to the first token under a load beyond the machine's.

    python3 benches/gateway.py overhead BINDERY MODEL [FLAG ...]
    python3 benches/gateway.py overflow BINDERY MODEL [FLAG ...]

`overhead`: the same short requests to two servers in turns, one without a gateway and one with tenants, limits, a guardrail on prompts and
answers, rules and a ledger in SQLite; p50 of the answer's time, and the process' CPU time a request, by the kernel's count of each
thread. MODEL should be tiny: what is measured is what stands before it.

`overflow`: requests arrive at random (Poisson, the same arrivals for both servers) at twice the rate that the server can do alone, measured
first; an upstream double on loopback answers after 150 ms. Once with overflow, once without. Needs nothing but Python.
"""

import http.client
import http.server
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import threading
import time

TTFT_LIMIT = 1.0
ROUNDS, REQUESTS = 5, 2000


class Server:
    def __init__(self, program, model, folder, config="", flags=()):
        self.log = open(pathlib.Path(folder) / f"{id(self)}.log", "w+")
        if config:
            path = pathlib.Path(folder) / f"{id(self)}.toml"
            path.write_text(config)
            flags = [*flags, "--config", str(path)]
        command = [program, "serve", model, "--port", "0", "--served-model-name", "base", *flags]
        environment = {**os.environ, "ACME_KEY": "k", "NO_COLOR": "1"}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, env=environment)
        started = time.monotonic()
        while not (found := re.search(r"ready: http://([^:]+):(\d+)", self.said())):
            if self.process.poll() is not None or time.monotonic() > started + 120:
                sys.exit(self.said())
            time.sleep(0.02)
        self.address = (found[1], int(found[2]))

    def said(self):
        self.log.seek(0)
        return self.log.read()

    def cpu_ns(self):
        tasks = pathlib.Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)

    def stop(self):
        self.process.terminate()
        self.process.wait()


HEADERS = {"content-type": "application/json", "authorization": "Bearer k"}


def ask(address, count, times):
    body = json.dumps({"model": "base", "prompt": "a b c d e f g h", "max_tokens": 1, "temperature": 0}).encode()
    connection = http.client.HTTPConnection(*address)
    for _ in range(count):
        start = time.perf_counter()
        connection.request("POST", "/v1/completions", body, HEADERS)
        answer = connection.getresponse()
        said = answer.read()
        assert answer.status == 200, said
        times.append(time.perf_counter() - start)


def measured(server, count, clients):
    """p50 of the time of an answer, and CPU time a request, in microseconds."""
    times, before = [], server.cpu_ns()
    threads = [threading.Thread(target=ask, args=(server.address, count // clients, times)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(times)[len(times) // 2] * 1e6, (server.cpu_ns() - before) / len(times) / 1e3


def overhead(program, model, *more):
    tenant = (
        '[[tenants]]\nname = "acme"\napi_key_env = "ACME_KEY"\n'
        "limits = { requests_per_minute = 100000000, tokens_per_minute = 100000000000, concurrent = 64 }\n"
    )
    rules = '[[routes]]\nmodel = "auto"\nrules = [{ to = "local" }]\n'
    pii = '[[guardrails]]\nname = "pii"\nkind = "pii"\naction = "redact"\n'
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--threads", "1", *more)
        store = lambda name, durability: f'[store]\nurl = "sqlite://{folder}/{name}.db"\ndurability = "{durability}"\n'
        servers = {
            "no gateway": Server(program, model, folder, "", flags),
            "tenants, limits, rules": Server(program, model, folder, tenant + rules, flags),
            "and a ledger (process-kill)": Server(program, model, folder, store("a", "process-kill") + tenant + rules, flags),
            "and a guardrail": Server(
                program, model, folder, store("b", "process-kill") + tenant + 'guardrails = ["pii"]\n' + rules + pii, flags
            ),
            "the same, power-loss": Server(
                program, model, folder, store("c", "power-loss") + tenant + 'guardrails = ["pii"]\n' + rules + pii, flags
            ),
        }
        for clients in (1, 16):
            compare(servers, clients)
        for server in servers.values():
            server.stop()


def compare(servers, clients):
    figures = {name: [] for name in servers}
    for server in servers.values():
        measured(server, 500, clients)
    for _ in range(ROUNDS):
        for name, server in servers.items():
            figures[name].append(measured(server, REQUESTS, clients))
    print(f"| one token, clients: {clients}, {ROUNDS} x {REQUESTS}, interleaved | p50 us | CPU us | over none: p50 | CPU |")
    print("|---|---|---|---|---|")
    middle = lambda values: sorted(values)[len(values) // 2]
    base = figures["no gateway"]
    for name, pairs in figures.items():
        # Of each round its own difference.
        p50, cpu = (middle([pair[at] for pair in pairs]) for at in (0, 1))
        more = [middle([pair[at] - none[at] for pair, none in zip(pairs, base)]) for at in (0, 1)]
        print(f"| {name} | {p50:.0f} | {cpu:.0f} | {more[0]:+.0f} | {more[1]:+.0f} |")


class Upstream(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        time.sleep(0.15)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        chunk = {"id": "u", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        deltas = [({"role": "assistant", "content": "word "}, None), ({}, "stop")]
        for delta, reason in deltas:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            self.wfile.write(f"data: {json.dumps({**chunk, 'choices': [choice]})}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True


def chat(server, words, results):
    """Adds (where it ran, seconds to the first text, seconds in all)."""
    body = {"model": "base", "messages": [{"role": "user", "content": words}], "max_tokens": 32, "stream": True, "ignore_eos": True}
    start = time.perf_counter()
    connection = http.client.HTTPConnection(*server.address, timeout=600)
    connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), HEADERS)
    answer = connection.getresponse()
    where, first = answer.headers.get("x-bindery-route", str(answer.status)), None
    while line := answer.readline():
        if first is None and b'"content":"' in line and b'"content":""' not in line:
            first = time.perf_counter() - start
    results.append((where, first, time.perf_counter() - start))


def load(server, arrivals, rng):
    words = [w.strip() for w in "bind page stack glue thread cover spine fold press board cloth paper".split()]
    results, threads, start = [], [], time.perf_counter()
    for at in arrivals:
        time.sleep(max(0.0, start + at - time.perf_counter()))
        prompt = " ".join(rng.choice(words) for _ in range(110))
        threads.append(threading.Thread(target=chat, args=(server, prompt, results)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return results, time.perf_counter() - start


def overflow(program, model, *more):
    double = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=double.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        head = f'[store]\nurl = "sqlite://{folder}/b.db"\n'
        upstream = (
            f'[[upstreams]]\nname = "up"\nkind = "openai-compatible"\nbase_url = "http://127.0.0.1:{double.server_port}/v1"\n'
            'models = ["m"]\nprices = { m = { input = 1.0, output = 1.0 } }\n'
        )
        tenant = '[[tenants]]\nname = "acme"\napi_key_env = "ACME_KEY"\nprivacy = "any"\n'
        over = f'overflow = {{ when_ttft_over = "{TTFT_LIMIT}s", to = "up/m", usd_per_day = 100.0 }}\n'
        flags = ("--max-num-seqs", "8", *more)
        print(f"| load, limit {TTFT_LIMIT:.0f} s | requests | here | up | TTFT here p50 / p95 / most, s | up | all p95 | over the limit here |")
        print("|---|---|---|---|---|---|---|---|")
        rate = None
        for name, config in [("with overflow", head + upstream + tenant + over), ("without", head.replace("b.db", "c.db") + upstream + tenant)]:
            server = Server(program, model, folder, config, flags)
            if rate is None:
                # What it can do: eight at a time, back to back.
                done, took = load(server, [0.0] * 48, random.Random(1))
                here = [result for result in done if result[0] == "local"]
                rate = 2 * 48 / took if len(here) == 48 else None
                if rate is None:
                    # Overflow has taken some of them: the rate of those that stayed.
                    rate = 2 * len(here) / max(total for _, _, total in here)
            rng = random.Random(7)
            arrivals, at = [], 0.0
            while at < 45.0:
                at += rng.expovariate(rate)
                arrivals.append(at)
            results, _ = load(server, arrivals, rng)
            of = lambda place: sorted(first for where, first, _ in results if where == place and first is not None)
            here, up = of("local"), of("upstream:up")
            part = lambda values, share: values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")
            both = sorted(here + up)
            late = sum(first > TTFT_LIMIT for first in here)
            print(
                f"| {rate:.1f}/s, {name} | {len(results)} | {len(here)} | {len(up)} | {part(here, .5):.2f} / {part(here, .95):.2f} / "
                f"{part(here, 1):.2f} | {part(up, .5):.2f} / {part(up, .95):.2f} | {part(both, .95):.2f} | {late} |"
            )
            assert len(here) + len(up) == len(results), {where for where, first, _ in results if first is None}
            server.stop()
    double.shutdown()


if __name__ == "__main__":
    modes = {"overhead": overhead, "overflow": overflow}
    if len(sys.argv) < 4 or sys.argv[1] not in modes:
        sys.exit(__doc__)
    modes[sys.argv[1]](*sys.argv[2:])
