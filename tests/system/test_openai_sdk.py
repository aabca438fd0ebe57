"""The official openai package: completions, chat, streaming, log-probabilities, errors."""

import math

import openai
import pytest

PROMPT = "The capital of France is"
CHAT = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


def test_chat_answers_sensibly(client):
    answer = client.chat.completions.create(model="smollm2-135m", messages=CHAT, temperature=0, max_completion_tokens=32)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"


def test_streamed_chat_equals_the_whole_answer(client):
    options = dict(model="smollm2-135m", messages=CHAT, temperature=0.8, seed=7, max_tokens=48)
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    finishes = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert finishes == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_conversation_reaches_the_model(client):
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "My name is Zebulon. Remember it."},
        {"role": "assistant", "content": "Hello Zebulon, I will remember your name."},
        {"role": "user", "content": [{"type": "text", "text": "What is my name?"}]},
    ]
    answer = client.chat.completions.create(model="smollm2-135m", messages=messages, temperature=0, max_tokens=32)
    assert "Zebulon" in answer.choices[0].message.content


def test_completion_of_several_prompts_and_samples(client):
    answer = client.completions.create(
        model="smollm2-135m", prompt=[PROMPT, "One, two, three,"], n=2, max_tokens=8, temperature=1.0, seed=1
    )
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens <= 4 * 8
    assert all(c.finish_reason in ("length", "stop") for c in answer.choices)


def test_token_id_prompts_are_used_as_given(client, server):
    ids = server.post("/tokenize", {"model": "smollm2-135m", "prompt": PROMPT})["tokens"]
    text = client.completions.create(model="smollm2-135m", prompt=PROMPT, max_tokens=12, temperature=0)
    tokens = client.completions.create(model="smollm2-135m", prompt=ids, max_tokens=12, temperature=0)
    assert text.choices[0].text == tokens.choices[0].text
    assert text.usage.prompt_tokens == len(ids)


def test_same_seed_same_tokens(client):
    def sample(seed):
        return client.completions.create(
            model="smollm2-135m", prompt=PROMPT, max_tokens=24, temperature=1.0, top_p=0.9, seed=seed
        ).choices[0].text

    assert sample(5) == sample(5)
    assert len({sample(seed) for seed in range(6)}) > 1


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model="smollm2-135m", messages=CHAT, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    text = b"".join(bytes(t.bytes) for t in content).decode()
    assert text.startswith(answer.choices[0].message.content[: len(text)])
    for token in content:
        assert len(token.top_logprobs) == 3
        probabilities = [t.logprob for t in token.top_logprobs]
        assert probabilities == sorted(probabilities, reverse=True)
        assert math.isclose(token.logprob, probabilities[0], abs_tol=1e-6), "greedy takes the most likely token"
        assert sum(map(math.exp, probabilities)) <= 1 + 1e-6


def test_echo_scores_the_prompt(client):
    answer = client.completions.create(
        model="smollm2-135m", prompt=PROMPT, max_tokens=4, temperature=0, echo=True, logprobs=2
    )
    choice = answer.choices[0]
    assert choice.text.startswith(PROMPT)
    logprobs = choice.logprobs
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    assert len(logprobs.tokens) == answer.usage.total_tokens
    assert "".join(logprobs.tokens) == choice.text


def test_scores_of_a_generation_match_the_same_text_as_prompt(client):
    """Decoding token by token and prefill of the whole must give the same log-probabilities."""
    extra = {"ignore_eos": True, "return_tokens_as_token_ids": True}
    first = client.completions.create(
        model="smollm2-135m", prompt=PROMPT, max_tokens=40, temperature=0, logprobs=1, echo=True, extra_body=extra
    )
    ids = [int(token.removeprefix("token_id:")) for token in first.choices[0].logprobs.tokens]
    again = client.completions.create(
        model="smollm2-135m", prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True
    )
    scored = again.choices[0].logprobs.token_logprobs[: len(ids)]
    assert scored[1:] == first.choices[0].logprobs.token_logprobs[1:], "to the bit: a row does not depend on its batch"


def test_stop_strings(client):
    free = client.completions.create(model="smollm2-135m", prompt="1, 2, 3, 4,", max_tokens=30, temperature=0)
    assert " 7" in free.choices[0].text
    stopped = client.completions.create(
        model="smollm2-135m", prompt="1, 2, 3, 4,", max_tokens=30, temperature=0, stop=[" 7", "zzz"]
    )
    assert stopped.choices[0].text == free.choices[0].text.split(" 7")[0]
    assert stopped.choices[0].finish_reason == "stop"
    streamed = client.completions.create(
        model="smollm2-135m", prompt="1, 2, 3, 4,", max_tokens=30, temperature=0, stop=[" 7", "zzz"], stream=True
    )
    assert "".join(c.choices[0].text for c in streamed if c.choices) == stopped.choices[0].text


def test_models(client):
    models = client.models.list().data
    assert models[0].id == "smollm2-135m"
    model = client.models.retrieve("smollm2-135m")
    assert model.id == "smollm2-135m"
    assert model.max_model_len >= 2048


def test_unknown_model_lists_those_there_are(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=CHAT)
    assert caught.value.code == "model_not_found"
    assert "smollm2-135m" in caught.value.message


def test_prompt_longer_than_the_context(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="smollm2-135m", prompt="word " * 20000, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"


def test_a_value_out_of_range_names_its_field(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="smollm2-135m", messages=CHAT, temperature=3)
    assert caught.value.param == "temperature"


def test_what_is_not_supported_yet_says_so(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="smollm2-135m", messages=CHAT, tools=[tool])
    assert caught.value.param == "tools"


def test_unicode_streams_whole_characters(client):
    chunks = client.chat.completions.create(
        model="smollm2-135m",
        messages=[{"role": "user", "content": "Repeat exactly: 日本語 ünïcödé 🦀🚀"}],
        max_tokens=48,
        temperature=0,
        stream=True,
    )
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    whole = client.chat.completions.create(
        model="smollm2-135m",
        messages=[{"role": "user", "content": "Repeat exactly: 日本語 ünïcödé 🦀🚀"}],
        max_tokens=48,
        temperature=0,
    )
    assert "".join(pieces) == whole.choices[0].message.content
    assert any(ord(character) > 127 for character in "".join(pieces))


def test_tokenize_and_detokenize_are_inverse(server):
    text = "naïve café 🦀\n\tif x:  return 42"
    tokens = server.post("/tokenize", {"model": "smollm2-135m", "prompt": text, "add_special_tokens": False})
    assert tokens["count"] == len(tokens["tokens"])
    assert server.post("/detokenize", {"model": "smollm2-135m", "tokens": tokens["tokens"]})["prompt"] == text


def test_the_chat_template_can_be_seen(server):
    rendered = server.post("/tokenize", {"model": "smollm2-135m", "messages": CHAT, "add_generation_prompt": True})
    text = server.post("/detokenize", {"model": "smollm2-135m", "tokens": rendered["tokens"]})["prompt"]
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert CHAT[0]["content"] in text
