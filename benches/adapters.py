"""What loading adapters does to streams that run.

    python3 benches/adapters.py BINDERY MODEL ADAPTER_FOLDER [STREAMS]

STREAMS clients (8) stream answers of the base; in every second round an adapter is loaded in place, again and again, as fast as the server takes
it. Printed are the times between two tokens of a stream, quiet and while loading, and how many loads there were. Rounds alternate in one
run, so that the machine's moods fall on both. Needs nothing but Python.
"""

import http.client
import json
import pathlib
import sys
import tempfile
import threading
import time

from gateway import Server

ROUNDS, TOKENS = 6, 96
ADMIN = "the-admin-key"


def stream(address, gaps):
    """Times between the events of one answer, in milliseconds; the first, which has the prompt in it, does not count."""
    body = {"model": "base", "prompt": "Once upon a time", "max_tokens": TOKENS, "temperature": 0, "stream": True, "ignore_eos": True}
    connection = http.client.HTTPConnection(*address)
    connection.request("POST", "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    last, num_events = None, 0
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        now = time.perf_counter()
        if last is not None and num_events > 1:
            gaps.append((now - last) * 1e3)
        last, num_events = now, num_events + 1


def load(address, path, times, stop):
    body = json.dumps({"lora_name": "tuned", "lora_path": str(path), "load_inplace": True}).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {ADMIN}"}
    while not stop.is_set():
        start = time.perf_counter()
        connection = http.client.HTTPConnection(*address)
        connection.request("POST", "/v1/load_lora_adapter", body, headers)
        answer = connection.getresponse()
        said = answer.read()
        assert answer.status == 200, said
        times.append((time.perf_counter() - start) * 1e3)


def at(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * share))]


def main(program, model, folder, num_streams="8"):
    folder = pathlib.Path(folder).resolve()
    size = sum(file.stat().st_size for file in folder.iterdir())
    with tempfile.TemporaryDirectory() as logs:
        server = Server(program, model, logs, "", ("--adapter-root", str(folder.parent), "--admin-key", ADMIN))
        gaps, loads = {False: [], True: []}, []
        for number in range(2 * ROUNDS + 2):
            is_loading, stop = number % 2 == 1, threading.Event()
            mine = []
            threads = [threading.Thread(target=stream, args=(server.address, mine)) for _ in range(int(num_streams))]
            loader = threading.Thread(target=load, args=(server.address, folder, loads, stop))
            if is_loading:
                loader.start()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            stop.set()
            if is_loading:
                loader.join()
            # The first pair warms up.
            if number >= 2:
                gaps[is_loading] += mine
        server.stop()
    print(f"| between two tokens, {num_streams} streams, ms | p50 | p90 | p99 | most | gaps |")
    print("|---|---|---|---|---|---|")
    for is_loading, name in ((False, "quiet"), (True, f"while an adapter of {size >> 20} MiB is loaded over and over")):
        mine = gaps[is_loading]
        print(f"| {name} | {at(mine, 0.5):.1f} | {at(mine, 0.9):.1f} | {at(mine, 0.99):.1f} | {max(mine):.1f} | {len(mine)} |")
    ratios = [at(gaps[True], share) / at(gaps[False], share) for share in (0.5, 0.9, 0.99)]
    print(f"ratios: {' / '.join(f'{ratio:.2f}' for ratio in ratios)}, most {max(gaps[True]) / max(gaps[False]):.2f}")
    print(f"{len(loads)} loads, {at(loads, 0.5):.0f} ms each at p50")


if __name__ == "__main__":
    main(*sys.argv[1:])
