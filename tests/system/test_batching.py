"""Many requests at once: what a request gets must not depend on who shares its steps."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

from conftest import FULL

WORDS = "river stone lamp window garden copper silent morning paper travel engine forest simple yellow music".split()


def words(seed, count):
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(count))


def complete(client, prompt, **options):
    options = {"max_tokens": 24, "temperature": 0, **options}
    return client.completions.create(model="smollm2-135m", prompt=prompt, extra_body={"ignore_eos": True}, **options)


def test_alone_and_in_a_batch_of_32_the_same_greedy_tokens(client):
    prompts = [words(seed, 5 + 3 * seed) for seed in range(32)]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts[:6]]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda prompt: complete(client, prompt).choices[0].text, prompts))
    assert together[:6] == alone


def test_a_seeded_sample_does_not_depend_on_the_batch(client):
    options = dict(temperature=1.0, top_p=0.95, seed=11, n=3)
    alone = [c.text for c in complete(client, words(1, 30), **options).choices]
    with ThreadPoolExecutor(16) as pool:
        noise = [pool.submit(complete, client, words(seed, 40), temperature=1.0) for seed in range(15)]
        together = [c.text for c in complete(client, words(1, 30), **options).choices]
        for future in noise:
            future.result()
    assert together == alone
    assert len(set(alone)) == 3, "each sample has its own random numbers"


def test_64_streams_with_random_disconnects_leave_nothing_behind(server, client):
    generator = random.Random(3)
    plans = [(seed, generator.choice([0, 1, 3, 10, None])) for seed in range(64)]
    finished = []
    lock = threading.Lock()

    def stream(plan):
        seed, leave_after = plan
        events = client.completions.create(
            model="smollm2-135m", prompt=words(seed, 20), max_tokens=32, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )
        with events:
            for index, event in enumerate(events):
                if leave_after is not None and index >= leave_after:
                    return
                if event.choices and event.choices[0].finish_reason:
                    with lock:
                        finished.append(seed)

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(stream, plans))
    assert sorted(finished) == [seed for seed, leave_after in plans if leave_after is None]
    server.wait_idle()


def test_churn_leaves_nothing_behind_and_answers_stay_right(server, client):
    """Requests of every size that finish, stop reading or vanish, for a while; `--full` makes the while long."""
    expected = complete(client, words(0, 12), max_tokens=16).choices[0].text
    rounds = 60 if FULL else 3
    generator = random.Random(17)
    for _ in range(rounds):
        plans = [(generator.randrange(1000), generator.choice([0, 2, 7, None]), generator.choice([5, 60, 400])) for _ in range(24)]

        def visit(plan):
            seed, leave_after, length = plan
            events = client.completions.create(
                model="smollm2-135m", prompt=words(seed, length), max_tokens=20, n=1 + seed % 3, stream=True, seed=seed
            )
            with events:
                for index, _ in enumerate(events):
                    if leave_after is not None and index >= leave_after:
                        return

        with ThreadPoolExecutor(24) as pool:
            probe = pool.submit(complete, client, words(0, 12), max_tokens=16)
            list(pool.map(visit, plans))
            assert probe.result().choices[0].text == expected
        server.wait_idle()


def test_a_small_cache_preempts_and_loses_nothing(start, client):
    """Blocks for about five of the sixteen requests: the others give way and are recomputed, to the same tokens."""
    small = start("--kv-cache-memory", "12MiB", "--max-model-len", "256", "--max-num-seqs", "16")
    prompts = [words(seed, 30) for seed in range(16)]
    expected = [complete(client, prompt, max_tokens=64).choices[0].text for prompt in prompts]
    num_before = small.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda prompt: complete(small.client(), prompt, max_tokens=64).choices[0].text, prompts))
    assert got == expected
    # Requests that come slowly may find room one after the other; the samples of one request are there at once.
    samples = dict(max_tokens=64, n=8, temperature=1.0, seed=5)
    expected = [choice.text for choice in complete(client, prompts[0], **samples).choices]
    assert [choice.text for choice in complete(small.client(), prompts[0], **samples).choices] == expected
    assert small.metric("vllm:num_preemptions_total") > num_before
    small.wait_idle()
    assert small.stop() == 0
