"""Answers of a given form, through the official openai package: what a client's own validator says of them."""

import json
import re
from enum import Enum

import openai
import pytest
from pydantic import BaseModel, Field

MODEL = "smollm2-135m"


class Colour(str, Enum):
    red = "red"
    green = "green"


class Fruit(BaseModel):
    name: str = Field(max_length=30)
    colour: Colour
    grams: int = Field(ge=1, le=9999)
    tags: list[str] = Field(max_length=3)


ASK = [{"role": "user", "content": "Describe an apple as JSON with the keys name, colour, grams and tags."}]


def test_parse_gives_the_clients_own_type(client):
    for seed in range(5):
        answer = client.chat.completions.parse(
            model=MODEL, messages=ASK, response_format=Fruit, temperature=1.0, seed=seed, max_tokens=400
        )
        choice = answer.choices[0]
        assert choice.finish_reason == "stop", choice.message.content
        assert isinstance(choice.message.parsed, Fruit)
        assert choice.message.parsed.grams >= 1


def test_a_streamed_answer_is_the_same_json(client):
    options = dict(model=MODEL, messages=ASK, response_format={"type": "json_object"}, temperature=0, max_tokens=200)
    whole = client.chat.completions.create(**options).choices[0]
    text = "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(**options, stream=True))
    assert text == whole.message.content
    assert text.startswith("{")
    if whole.finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_choices_regexes_and_grammars(client):
    def ask(prompt, n=4, **form):
        answer = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=40, n=n, seed=3, temperature=1.0, extra_body={"structured_outputs": form}
        )
        assert all(choice.finish_reason == "stop" for choice in answer.choices)
        return [choice.text for choice in answer.choices]

    moods = ["positive", "negative"]
    assert set(ask("The film was wonderful. Sentiment: ", choice=moods)) <= set(moods)
    for date in ask("The French Revolution began on ", regex=r"\d{4}-\d{2}-\d{2}"):
        assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)
    lark = 'start: "SELECT " NAME " FROM " NAME\nNAME: /[a-z]{1,12}/'
    for query in ask("Write SQL: ", grammar=lark):
        assert re.fullmatch(r"SELECT [a-z]{1,12} FROM [a-z]{1,12}", query)
    for text in ask("JSON: ", json={"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}):
        assert all(isinstance(value, bool) for value in json.loads(text)) and len(json.loads(text)) == 2


def test_logprobs_and_counts_stay_the_models_own(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, logprobs=True, top_logprobs=2, max_tokens=60, temperature=0,
        extra_body={"structured_outputs": {"choice": ["apple pie"]}},
    )
    choice = answer.choices[0]
    assert choice.message.content == "apple pie"
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == "apple pie"
    # The model itself would have begun otherwise: the forced token is not the likeliest of its own distribution.
    assert tokens[0].logprob < tokens[0].top_logprobs[0].logprob
    assert answer.usage.completion_tokens == len(tokens) + 1


def test_an_unusable_form_is_named(client):
    for form, param in [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "poem"}}}}, "response_format"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"], "regex": "b"}}, "structured_outputs"),
    ]:
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model=MODEL, messages=ASK, extra_body=form)
        assert error.value.param == param
