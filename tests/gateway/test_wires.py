"""The providers' own SDKs judge the gateway: bodies against their request types, chunks and answers against OpenAI's.

Every dictionary type is made to refuse fields it does not know, so a field in the wrong place is a failure. Events and
answers of Anthropic and Gemini are built from their SDKs' response types, not from our reading of them.
"""

import importlib
import json
import pkgutil
from collections.abc import Iterator

import anthropic.types
import openai.types.chat
import pytest
from google.genai import types as gemini
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming, MessageCreateParamsStreaming
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import is_typeddict


def forbid_unknown_fields(package):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        for value in vars(importlib.import_module(module.name)).values():
            if is_typeddict(value):
                value.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


forbid_unknown_fields(anthropic.types)
forbid_unknown_fields(openai.types)
REQUESTS = {
    ("openai", False): TypeAdapter(CompletionCreateParamsNonStreaming),
    ("openai", True): TypeAdapter(CompletionCreateParamsStreaming),
    ("anthropic", False): TypeAdapter(MessageCreateParamsNonStreaming),
    ("anthropic", True): TypeAdapter(MessageCreateParamsStreaming),
}
BLOCKS = {
    "text": TypeAdapter(anthropic.types.TextBlockParam),
    "image": TypeAdapter(anthropic.types.ImageBlockParam),
    "document": TypeAdapter(anthropic.types.DocumentBlockParam),
    "thinking": TypeAdapter(anthropic.types.ThinkingBlockParam),
    "tool_use": TypeAdapter(anthropic.types.ToolUseBlockParam),
    "tool_result": TypeAdapter(anthropic.types.ToolResultBlockParam),
}
# Of the API's version 2023-06-01, which the gateway speaks; the SDK's types are of a later one that has dropped them.
SAMPLING = ("temperature", "top_p", "top_k")
TAKES_SAMPLING = ("claude-3-haiku", "claude-haiku-4-5", "claude-opus-4-6")


def check(provider, streamed, body):
    """Lists are validated as they are walked, so they are walked to their ends."""

    def walk(value):
        if isinstance(value, dict):
            value = value.values()
        if not isinstance(value, str) and isinstance(value, (Iterator, list, type({}.values()))):
            for item in value:
                walk(item)

    walk(REQUESTS[provider, streamed].validate_python(body))
    if provider == "anthropic":
        # The SDK takes its own answers' blocks as content, too, and those take unknown fields: each block by its own type.
        for block in (block for message in body["messages"] for block in message["content"]):
            walk(BLOCKS[block["type"]].validate_python(block))


PICTURE = "data:image/png;base64,iVBORw0KGgo="
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
SCHEMA = {"type": "object", "properties": {"sky": {"type": "string"}}, "required": ["sky"], "additionalProperties": False}
CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
    {"id": "call_2", "type": "function", "function": {"name": "clock", "arguments": ""}},
]
USER = {"role": "user", "content": "hi"}
CASES = {
    "plain": {"messages": [USER]},
    "stream": {"messages": [USER], "stream": True},
    "system": {"messages": [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, USER]},
    "picture": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "t"}, {"type": "image_url", "image_url": {"url": PICTURE}}],
            }
        ]
    },
    "document": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBERi0=", "filename": "a.pdf"}}
                ],
            }
        ]
    },
    "tools": {"messages": [USER], "tools": [WEATHER, CLOCK], "tool_choice": "auto", "parallel_tool_calls": False},
    "no tool": {"messages": [USER], "tools": [WEATHER], "tool_choice": "none"},
    "any tool": {"messages": [USER], "tools": [WEATHER], "tool_choice": "required"},
    "that tool": {
        "messages": [USER],
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    },
    "results": {
        "messages": [
            USER,
            {"role": "assistant", "content": "wait", "tool_calls": CALLS},
            {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "grey"}'},
            {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
            {"role": "user", "content": "so?"},
        ],
        "tools": [WEATHER, CLOCK],
    },
    "schema": {
        "messages": [USER],
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}},
    },
    "object": {"messages": [USER], "response_format": {"type": "json_object"}},
    "sampling": {
        "messages": [USER],
        "temperature": 0.3,
        "top_p": 0.9,
        "seed": 4,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "max_tokens": 99,
        "n": 1,
    },
    "stop": {"messages": [USER], "stop": ["a", "b"]},
    "effort": {"messages": [USER], "reasoning_effort": "high", "max_completion_tokens": 9000},
    "no effort": {"messages": [USER], "reasoning_effort": "none"},
    "account": {"messages": [USER], "service_tier": "default", "user": "u", "metadata": {"a": "b"}, "store": True},
}
MODELS = [
    ("openai", "gpt-4o"),
    ("openai", "gpt-5"),
    ("openai", "gpt-6.2-sol"),
    ("anthropic", "claude-3-haiku"),
    ("anthropic", "claude-haiku-4-5"),
    ("anthropic", "claude-opus-4-6"),
    ("anthropic", "claude-opus-5-5"),
    ("anthropic", "claude-fable-5"),
    ("gemini", "gemini-2.5-flash"),
    ("gemini", "gemini-3.8-flash"),
    ("gemini", "gemini-4-argon"),
]
# What the capability table says a model refuses.
REFUSED = {
    ("gpt-5", "stop"): "stop",
    ("gpt-6.2-sol", "stop"): "stop",
    ("claude-3-haiku", "document"): "messages[0].content[0]",
    ("claude-opus-5-5", "any tool"): "tool_choice",
    ("claude-opus-5-5", "that tool"): "tool_choice",
}


def check_gemini(body):
    gemini.Content.model_validate({"parts": [], **body.get("systemInstruction", {})})
    for content in body["contents"]:
        parsed = gemini.Content.model_validate(content)
        assert parsed.role in ("user", "model") and parsed.parts
    gemini.GenerationConfig.model_validate(body.get("generationConfig", {}))
    for tool in body.get("tools", []):
        gemini.Tool.model_validate(tool)
    gemini.ToolConfig.model_validate(body.get("toolConfig", {}))
    known = {"systemInstruction", "contents", "generationConfig", "tools", "toolConfig", "serviceTier"}
    assert set(body) <= known


@pytest.mark.parametrize("place", ["body", "message", "part", "tool"])
def test_the_judge_refuses_unknown_fields(place):
    """Otherwise the tests below would prove little."""
    part = {"type": "text", "text": "x"}
    message = {"role": "user", "content": [part]}
    tool = {"name": "t", "input_schema": {"type": "object"}}
    body = {"model": "m", "max_tokens": 3, "messages": [message], "tools": [tool]}
    check("anthropic", False, body)
    {"body": body, "message": message, "part": part, "tool": tool}[place]["unheard_of"] = 1
    with pytest.raises(ValidationError):
        check("anthropic", False, body)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("provider", "model"), MODELS)
def test_bodies_are_what_the_sdk_would_send(translate, provider, model, case):
    request = CASES[case]
    result = translate(provider, model, request)
    if (model, case) in REFUSED:
        assert result["refusal"]["param"] == REFUSED[model, case]
        return
    assert "refusal" not in result, result
    if provider == "gemini":
        check_gemini(result["body"])
        return
    body = result["body"]
    if model in TAKES_SAMPLING:
        body = {name: value for name, value in body.items() if name not in SAMPLING}
    check(provider, request.get("stream", False), body)


def anthropic_events():
    """A stream built from the SDK's own event types."""
    usage = {"input_tokens": 10, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 2, "output_tokens": 1}
    raw = [
        {
            "type": "message_start",
            "message": {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": "claude-opus-5-5",
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": usage,
            },
        },
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "thinking", "thinking": "", "signature": ""},
        },
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "s"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": "", "citations": None}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "it "}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "rains"}},
        {"type": "content_block_stop", "index": 1},
        {
            "type": "content_block_start",
            "index": 2,
            "content_block": {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}},
        },
        {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": '{"city":'}},
        {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": '"Oslo"}'}},
        {"type": "content_block_stop", "index": 2},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use", "stop_sequence": None},
            "usage": {"output_tokens": 20},
        },
        {"type": "message_stop"},
    ]
    adapter = TypeAdapter(anthropic.types.RawMessageStreamEvent)
    parsed = [adapter.validate_python(event) for event in raw]
    return [{"event": event.type, "data": event.model_dump_json()} for event in parsed]


def gemini_events():
    """A stream built from the SDK's own response type."""

    def response(parts, finish=None):
        value = gemini.GenerateContentResponse.model_validate(
            {
                "candidates": [{"index": 0, "content": {"role": "model", "parts": parts}, "finishReason": finish}],
                "usageMetadata": {"promptTokenCount": 15, "candidatesTokenCount": 12, "thoughtsTokenCount": 8},
                "responseId": "r1",
                "modelVersion": "gemini-3.8-flash",
            }
        )
        return {"event": "", "data": value.model_dump_json(by_alias=True, exclude_none=True)}

    return [
        response([{"text": "hm", "thought": True}]),
        response([{"text": "it "}]),
        response([{"text": "rains"}]),
        response([{"functionCall": {"name": "weather", "args": {"city": "Oslo"}}, "thoughtSignature": "czE="}], "STOP"),
    ]


def openai_events():
    def chunk(delta, finish=None, **more):
        choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
        base = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "x", "choices": choices}
        value = ChatCompletionChunk.model_validate({**base, **more})
        return {"event": "", "data": value.model_dump_json()}

    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    usage = {
        "prompt_tokens": 15,
        "completion_tokens": 20,
        "total_tokens": 35,
        "completion_tokens_details": {"reasoning_tokens": 8},
    }
    return [
        chunk({"role": "assistant", "content": "", "reasoning_content": "hm"}),
        chunk({"content": "it "}),
        chunk({"content": "rains"}),
        chunk({"tool_calls": [call]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"city":"Oslo"}'}}]}),
        chunk({}, "tool_calls"),
        chunk({}, choices=[], usage=usage),
        {"event": "", "data": "[DONE]"},
    ]


STREAMS = {
    ("openai", "gpt-5"): openai_events,
    ("openai-compatible", "llama"): openai_events,
    ("anthropic", "claude-opus-5-5"): anthropic_events,
    ("gemini", "gemini-3.8-flash"): gemini_events,
}


@pytest.mark.parametrize(("provider", "model"), STREAMS)
def test_chunks_are_openai_s(translate, provider, model):
    """The SDK's own accumulator puts the chunks together."""
    from openai.lib.streaming._deltas import accumulate_delta

    request = {"messages": [USER], "tools": [WEATHER], "stream": True, "stream_options": {"include_usage": True}}
    events = STREAMS[provider, model]()
    result = translate(provider, model, request, events=events)
    chunks = [ChatCompletionChunk.model_validate(chunk) for chunk in result["chunks"]]
    message = {}
    for chunk in chunks:
        for choice in chunk.choices:
            message = accumulate_delta(message, choice.delta.model_dump(exclude_unset=True))
    assert message["content"] == "it rains"
    assert message["reasoning_content"] == "hm"
    (call,) = message["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    assert call["function"]["name"] == "weather" and call["id"]
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert ends == ["tool_calls"]
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (15, 20)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    # A stream cut anywhere is no answer.
    for end in range(len(events)):
        assert "error" in translate(provider, model, request, events=events[:end])


def test_whole_answers_are_openai_s(translate):
    message = anthropic.types.Message.model_validate(
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "claude-opus-5-5",
            "content": [
                {"type": "text", "text": "it rains", "citations": None},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}},
            ],
            "stop_reason": "tool_use",
            "stop_sequence": None,
            "usage": {"input_tokens": 15, "output_tokens": 20},
        }
    )
    answers = {
        ("anthropic", "claude-opus-5-5"): json.loads(message.model_dump_json()),
        ("gemini", "gemini-3.8-flash"): {
            "candidates": [
                {
                    "content": {
                        "role": "model",
                        "parts": [
                            {"text": "it rains"},
                            {"functionCall": {"id": "c", "name": "weather", "args": {"city": "Oslo"}}},
                        ],
                    },
                    "finishReason": "STOP",
                }
            ],
            "usageMetadata": {"promptTokenCount": 15, "candidatesTokenCount": 20},
            "responseId": "r1",
        },
    }
    for (provider, model), answer in answers.items():
        result = translate(provider, model, {"messages": [USER]}, answer=answer)
        parsed = ChatCompletion.model_validate(result["answer"])
        choice = parsed.choices[0]
        assert choice.message.content == "it rains" and choice.finish_reason == "tool_calls"
        assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Oslo"}
        assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens) == (15, 20)
        # The answer goes back as the SDK writes it, with its result.
        turn = choice.message.model_dump(exclude_none=True)
        result = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "grey"}
        again = translate(provider, model, {"messages": [USER, turn, result], "tools": [WEATHER]})
        if provider == "gemini":
            check_gemini(again["body"])
        else:
            check(provider, False, again["body"])
