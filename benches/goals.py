"""The goals of the design that no comparison with a peer measures, on this machine.

    python3 benches/goals.py long-prompt BINDERY MODEL [FLAG ...]
    python3 benches/goals.py streams BINDERY MODEL [FLAG ...]
    python3 benches/goals.py memory BINDERY MODEL [FLAG ...]

`long-prompt`: the time between two tokens of eight streams, while a prompt of 4,096 tokens is computed beside them and while none is. Goal:
p95 under twice its value without.

`streams`: CPU time a token that is not the model's, with 256 streams: of all threads but the engine's and its workers. MODEL should be
tiny (`--load-format dummy`, one layer). Goal: under 20 us.

`memory`: what is resident while 32 requests run (110 words in, 64 tokens out) and after, beside packed weights and keys and values in
use. Goal: within 15 % and 96 MiB of those. And the slots of the cache that were given out and stayed unused. Goal: under 4 %.

Needs nothing but Python.
"""

import http.client
import json
import pathlib
import random
import sys
import tempfile
import threading
import time

from gateway import Server

UNUSED = "bindery_kv_slots_wasted"
ENGINES_OWN = ("bindery-engine", "bindery-cpu")


class Stream(threading.Thread):
    """A completion whose tokens are noted as they come."""

    def __init__(self, server, prompt, max_tokens):
        super().__init__(daemon=True)
        self.server, self.times = server, []
        self.body = {
            "model": "base", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "stream": True,
        }
        self.start()

    def run(self):
        connection = http.client.HTTPConnection(*self.server.address)
        connection.request("POST", "/v1/completions", json.dumps(self.body), {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        for line in answer:
            if line.startswith(b"data: {"):
                self.times.append(time.perf_counter())


def tokens(count, seed):
    """A prompt of that many tokens, which no other has."""
    draw = random.Random(seed)
    return [draw.randrange(100, 500) for _ in range(count)]


def percentile(values, percent):
    values = sorted(values)
    return values[(len(values) - 1) * percent // 100]


def long_prompt(server):
    streams = [Stream(server, tokens(64, at), 1500) for at in range(8)]
    while min(len(stream.times) for stream in streams) < 50:
        time.sleep(0.05)
    spans = {"without": [], "with": []}
    for round in range(3):
        start = time.perf_counter()
        time.sleep(4)
        spans["without"].append((start, time.perf_counter()))
        start = time.perf_counter()
        Stream(server, tokens(4096, 100 + round), 1).join()
        spans["with"].append((start, time.perf_counter()))
    for what, parts in spans.items():
        gaps = []
        for stream in streams:
            times = list(stream.times)
            gaps += [
                b - a for a, b in zip(times, times[1:]) if any(start <= a and b <= end for start, end in parts)
            ]
        seconds = ", ".join(f"{end - start:.1f}" for start, end in parts)
        print(
            f"{what} a prompt of 4,096 ({seconds} s): {len(gaps)} gaps, "
            f"p50 {percentile(gaps, 50) * 1e3:.1f} ms, p95 {percentile(gaps, 95) * 1e3:.1f} ms, "
            f"largest {max(gaps) * 1e3:.1f} ms"
        )


def cpu_of_others(server):
    """CPU time of the threads that are not the model's, ns."""
    total = 0
    for task in pathlib.Path(f"/proc/{server.process.pid}/task").iterdir():
        if not (task / "comm").read_text().strip().startswith(ENGINES_OWN):
            total += int((task / "schedstat").read_text().split()[0])
    return total


def streams(server):
    for count in (1, 16, 256):
        per_token = []
        for round in range(3):
            before = cpu_of_others(server)
            started = [Stream(server, tokens(16, 1000 * round + at), 400) for at in range(count)]
            for stream in started:
                stream.join()
            per_token.append((cpu_of_others(server) - before) / sum(len(stream.times) for stream in started) / 1e3)
        print(f"{count} streams: {', '.join(f'{micros:.1f}' for micros in per_token)} us of CPU a token beside the model")


def cache(server):
    """Blocks in use, and slots in them without a token."""
    connection = http.client.HTTPConnection(*server.address)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    values = {line.split("{")[0]: line for line in lines if not line.startswith("#")}
    blocks = int(values["vllm:cache_config_info"].split('num_gpu_blocks="')[1].split('"')[0])
    used, unused = (float(values[name].split()[-1]) for name in ("vllm:kv_cache_usage_perc", UNUSED))
    return round(used * blocks), unused


def resident(server):
    status = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def memory(server):
    print(f"resident when ready: {resident(server):.0f} MiB")
    for length, round in ((150, 0), (150, 1), (600, 2)):
        started = [Stream(server, tokens(length, 1000 * round + at), 64) for at in range(32)]
        most_blocks, most_resident, unused = 0, 0, []
        while any(stream.is_alive() for stream in started):
            blocks, num_unused = cache(server)
            if all(stream.times for stream in started) and all(stream.is_alive() for stream in started):
                unused.append(num_unused / (16 * blocks))
            most_blocks, most_resident = max(most_blocks, blocks), max(most_resident, resident(server))
            time.sleep(0.02)
        slots = f"{sum(unused) / len(unused) * 100:.1f} %" if unused else "not seen"
        print(
            f"32 requests of {length} tokens: at most {most_blocks} blocks in use, {most_resident:.0f} MiB resident; "
            f"unused slots while all decode: {slots}"
        )


def main():
    scenarios = {"long-prompt": (long_prompt, []), "streams": (streams, ["--max-num-seqs", "256"]), "memory": (memory, [])}
    scenario, program, model, *flags = sys.argv[1:]
    run, own = scenarios[scenario]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(program, model, folder, flags=[*own, *flags])
        try:
            run(server)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
