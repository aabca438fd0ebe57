//! OpenAI and compatible servers.

use super::*;

fn openai(model: &str) -> Asked {
    Asked::of(Provider::OpenAi, model)
}

fn answer() -> Value {
    json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 5, "model": "gpt-5.5-2026-04-01",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello", "refusal": null, "annotations": []},
            "logprobs": null, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30,
            "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 15}},
        "system_fingerprint": "fp", "service_tier": "flex"
    })
}

#[test]
fn a_request_passes_with_the_model_s_own_name_and_limit() {
    let outgoing = openai("gpt-4o-2024-08-06")
        .send(hi(json!({"max_tokens": 9, "stop": "x", "seed": 1, "metadata": {"a": "b"}, "novel": true})))
        .unwrap();
    assert_eq!(outgoing.request.url.as_str(), "https://api.openai.com/v1/chat/completions");
    let expected = json!({"model": "gpt-4o-2024-08-06", "messages": [{"role": "user", "content": "hi"}], "stop": ["x"], "seed": 1,
        "max_completion_tokens": 9, "metadata": {"a": "b"}, "novel": true});
    assert_eq!(Value::Object(outgoing.request.body.clone()), expected);
    assert!(outgoing.warnings.is_empty());
}

#[test]
fn a_reasoning_model_loses_its_hints_and_refuses_what_matters() {
    let asked = openai("gpt-5");
    let outgoing = asked
        .send(hi(json!({"temperature": 0.2, "top_p": 1, "presence_penalty": 1, "frequency_penalty": 0, "top_k": 5,
            "reasoning_effort": "none", "min_p": 0.5, "ignore_eos": false})))
        .unwrap();
    assert_eq!(dropped(&outgoing), ["temperature", "top_k", "presence_penalty", "min_p"]);
    assert_eq!(outgoing.request.body["reasoning_effort"], "minimal");
    assert!(outgoing.warnings.header().unwrap().contains("none sent as minimal"));
    for name in ["temperature", "top_p", "top_k", "presence_penalty", "min_p", "ignore_eos"] {
        assert!(!outgoing.request.body.contains_key(name), "{name}");
    }
    for (field, value) in [
        ("stop", json!("x")),
        ("logit_bias", json!({"1": 1})),
        ("logprobs", json!(true)),
        ("guided_regex", json!("a+")),
        ("modalities", json!(["audio"])),
        ("n", json!(9)),
    ] {
        assert_eq!(refused(asked.send(hi(json!({field: value})))), (field.to_owned(), "unsupported_parameter"));
    }
}

#[test]
fn vllm_s_schema_becomes_a_response_format() {
    let outgoing = openai("gpt-5.5").send(hi(json!({"guided_json": "{\"type\":\"object\"}"}))).unwrap();
    assert_eq!(
        outgoing.request.body["response_format"],
        json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": true}})
    );
    let nested = openai("gpt-5.5").send(hi(json!({"structured_outputs": {"json": {"type": "object"}}}))).unwrap();
    assert_eq!(nested.request.body["response_format"]["type"], "json_schema");
    let old = openai("gpt-4").send(hi(json!({"guided_json": {"type": "object"}})));
    assert_eq!(refused(old).0, "response_format");
}

#[test]
fn instructions_and_carried_thoughts_fit_the_server() {
    let body = json!({"model": "m", "messages": [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a", "reasoning_content": "hm", "extra_content": {"anthropic": {}},
         "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}, "extra_content": {"google": {}}}]},
        {"role": "tool", "tool_call_id": "c", "content": "r"},
    ]});
    let sent = openai("gpt-5.5").send(body.clone()).unwrap().request.body;
    assert_eq!(sent["messages"][0]["role"], "developer");
    let expected = json!({"role": "assistant", "content": "a",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]});
    assert_eq!(sent["messages"][2], expected);
    assert_eq!(openai("gpt-4o").send(body.clone()).unwrap().request.body["messages"][0]["role"], "system");
    let compatible = Asked::of(Provider::Compatible, "llama").send(body.clone()).unwrap().request.body;
    assert_eq!(compatible["messages"][0]["role"], "system");
    assert_eq!(compatible["messages"][2], body["messages"][2]);
}

#[test]
fn a_compatible_server_gets_every_field() {
    let body = hi(
        json!({"top_k": 3, "min_p": 0.5, "guided_regex": "a+", "max_tokens": 5, "temperature": 0.1, "novel": {"x": 1}}),
    );
    let outgoing = Asked::of(Provider::Compatible, "org/llama").send(body.clone()).unwrap();
    let mut expected = body;
    expected["model"] = "org/llama".into();
    assert_eq!(Value::Object(outgoing.request.body.clone()), {
        let order = ["model", "messages", "temperature", "top_k", "max_tokens", "min_p", "guided_regex", "novel"];
        assert_eq!(outgoing.request.body.keys().collect::<Vec<_>>(), order);
        expected
    });
    assert_eq!(outgoing.request.url.as_str(), "http://127.0.0.1:8000/v1/chat/completions");
    let mut bare = Asked::of(Provider::Compatible, "llama");
    bare.base = Some("http://127.0.0.1:8000");
    assert_eq!(bare.send(hi(json!({}))).unwrap().request.url.path(), "/v1/chat/completions");
    bare.base = Some("http://127.0.0.1:8000/proxy/openai/");
    assert_eq!(bare.send(hi(json!({}))).unwrap().request.url.path(), "/proxy/openai/chat/completions");
}

#[test]
fn pictures_are_refused_by_place_where_the_model_is_blind() {
    let body = json!({"model": "m", "messages": [{"role": "user", "content": [
        {"type": "text", "text": "t"}, {"type": "image_url", "image_url": {"url": "https://h/a.png"}}]}]});
    assert_eq!(refused(openai("gpt-4").send(body.clone())).0, "messages[0].content[1]");
    let sent = openai("gpt-4o").send(body.clone()).unwrap().request.body;
    assert_eq!(sent["messages"], body["messages"]);
}

#[test]
fn a_whole_answer_keeps_what_it_has_and_is_counted() {
    let outgoing = openai("gpt-5.5").send(hi(json!({}))).unwrap();
    let answer_ = whole(&outgoing, &answer()).unwrap();
    assert_eq!((answer_.usage.prompt, answer_.usage.cached, answer_.usage.completion), (10, 4, 20));
    assert_eq!((answer_.usage.reasoning, answer_.usage.tier), (15, catalogue::ServedTier::Flex));
    let mut expected = answer();
    expected["model"] = "asked-for".into();
    expected["created"] = now().timestamp().into();
    assert_eq!(answer_.to_json(), expected);
}

#[test]
fn a_server_that_does_not_count_is_estimated() {
    let outgoing = Asked::of(Provider::Compatible, "llama").send(hi(json!({}))).unwrap();
    let mut body = answer();
    body.as_object_mut().unwrap().shift_remove("usage");
    let usage = whole(&outgoing, &body).unwrap().usage;
    assert!(usage.estimated && usage.prompt == 1000 && usage.completion > 0);
    // By its text, not by what JSON puts around it; and no more than was allowed.
    let message = |text: &str| json!({"id": "x", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]});
    assert_eq!(whole(&outgoing, &message("one two")).unwrap().usage.completion, 3);
    let limited = Asked::of(Provider::Compatible, "llama").send(hi(json!({"max_tokens": 20}))).unwrap();
    assert_eq!(whole(&limited, &message(&"x".repeat(999))).unwrap().usage.completion, 20);
}

pub(super) fn chunk(delta: &Value, finish: Option<&str>) -> SseEvent {
    let choice = json!({"index": 0, "delta": delta, "finish_reason": finish, "logprobs": null});
    event(&json!({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": "x",
        "choices": [choice], "usage": null, "system_fingerprint": "fp"}))
}

pub(super) fn recorded() -> Vec<SseEvent> {
    vec![
        chunk(&json!({"role": "assistant", "content": ""}), None),
        chunk(&json!({"content": "Hel"}), None),
        chunk(&json!({"content": "lo"}), None),
        chunk(
            &json!({"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}]}),
            None,
        ),
        chunk(&json!({"tool_calls": [{"index": 0, "function": {"arguments": "{\"a\""}}]}), None),
        chunk(&json!({"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]}), None),
        chunk(
            &json!({"tool_calls": [{"index": 1, "id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}}]}),
            None,
        ),
        chunk(&json!({}), Some("tool_calls")),
        event(
            &json!({"id": "chatcmpl-1", "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}}),
        ),
        done(),
    ]
}

#[test]
fn a_stream_is_read_and_usage_given_only_where_asked() {
    let asked = openai("gpt-5.5");
    let outgoing = asked.send(hi(json!({"stream": true}))).unwrap();
    assert_eq!(outgoing.request.body["stream_options"], json!({"include_usage": true}));
    let streamed = stream(outgoing.reader, &recorded()).unwrap();
    assert_eq!((streamed.usage.prompt, streamed.usage.completion), (7, 9));
    assert!(streamed.chunks.iter().all(|chunk| chunk.get("usage").is_none()));
    assert!(streamed.chunks.iter().all(|chunk| !chunk["choices"].as_array().unwrap().is_empty()));
    for chunk in &streamed.chunks {
        assert_eq!((&chunk["id"], &chunk["model"]), (&json!("chatcmpl-1"), &json!("asked-for")));
        assert_eq!(chunk["created"], now().timestamp());
    }
    let expected = json!([{"message": {"role": "assistant", "content": "Hello", "tool_calls": [
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}},
        {"index": 1, "id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}}]},
        "finish_reason": "tool_calls"}]);
    assert_eq!(gathered(&streamed.chunks), expected);

    let outgoing = asked.send(hi(json!({"stream": true, "stream_options": {"include_usage": true}}))).unwrap();
    let chunks = stream(outgoing.reader, &recorded()).unwrap().chunks;
    let (last, before) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"], json!({"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}));
    assert!(before.iter().all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some()));
}

#[test]
fn vllm_s_last_delta_and_its_reasoning_are_kept() {
    let outgoing = Asked::of(Provider::Compatible, "llama").send(hi(json!({"stream": true}))).unwrap();
    let events = [
        chunk(&json!({"role": "assistant", "reasoning": "hm"}), None),
        chunk(&json!({"reasoning_content": "m"}), None),
        chunk(&json!({"content": "end"}), Some("abort")),
        done(),
    ];
    let streamed = stream(outgoing.reader, &events).unwrap();
    let expected = json!([{"message": {"role": "assistant", "reasoning_content": "hmm", "content": "end"}, "finish_reason": "stop"}]);
    assert_eq!(gathered(&streamed.chunks), expected);
    let last = streamed.chunks.last().unwrap();
    assert_eq!(last["choices"][0]["native_finish_reason"], "abort");
    assert!(streamed.usage.estimated);
}

#[test]
fn an_error_in_a_stream_is_one_and_nothing_follows() {
    let outgoing = openai("gpt-5.5").send(hi(json!({"stream": true}))).unwrap();
    let mut reader = outgoing.reader;
    reader.event(&recorded()[0]).unwrap();
    let error = event(
        &json!({"error": {"message": "slow down sk-abc123456", "type": "server_error", "code": "server_is_overloaded"}}),
    );
    let error = reader.event(&error).unwrap_err();
    assert_eq!((error.cause, error.status()), (Cause::Overloaded, 503));
    assert_eq!(error.message, "slow down ***");
    assert_eq!(reader.event(&recorded()[1]).unwrap_err().cause, Cause::Cut);
    assert_eq!(reader.end().unwrap_err().cause, Cause::Cut);
}

#[test]
fn done_without_a_finish_reason_is_no_end() {
    let outgoing = openai("gpt-5.5").send(hi(json!({"stream": true}))).unwrap();
    let events = [recorded()[0].clone(), recorded()[1].clone(), done()];
    assert_eq!(stream(outgoing.reader.clone(), &events).err().unwrap().cause, Cause::Cut);
    assert_eq!(stream(outgoing.reader, &[done()]).err().unwrap().cause, Cause::Cut);
}

#[test]
fn errors_are_told_apart_by_code_and_status() {
    let outgoing = openai("gpt-5.5").send(hi(json!({}))).unwrap();
    let error = |status, kind: &str, code: Value| {
        failed(&outgoing, status, &json!({"error": {"message": "m", "type": kind, "param": "messages", "code": code}}))
    };
    let check = |error: UpstreamError, cause: Cause, status: u16, code: &str| {
        assert_eq!((error.cause, error.status(), error.code()), (cause, status, code));
    };
    let invalid = "invalid_request_error";
    check(error(400, invalid, json!("unsupported_value")), Cause::Invalid, 400, "unsupported_value");
    check(error(400, invalid, json!("context_length_exceeded")), Cause::ContextLength, 400, "context_length_exceeded");
    check(error(401, invalid, json!("invalid_api_key")), Cause::Auth, 502, "upstream_auth");
    check(error(403, invalid, json!("unsupported_country_region_territory")), Cause::Auth, 502, "upstream_auth");
    check(error(404, invalid, json!("model_not_found")), Cause::ModelUnavailable, 502, "upstream_model_unavailable");
    check(error(429, "tokens", json!("rate_limit_exceeded")), Cause::RateLimited, 429, "rate_limit_exceeded");
    check(error(429, "insufficient_quota", json!("insufficient_quota")), Cause::Quota, 503, "upstream_quota");
    check(error(429, "requests", json!("credit_balance_exhausted")), Cause::Quota, 503, "upstream_quota");
    check(error(500, "server_error", Value::Null), Cause::Failed, 502, "upstream_error");
    check(error(503, "x", json!("server_is_overloaded")), Cause::Overloaded, 503, "overloaded");
    check(error(504, "x", Value::Null), Cause::Timeout, 504, "upstream_timeout");
    assert_eq!(error(400, invalid, Value::Null).param.as_deref(), Some("messages"));
    assert_eq!(error(401, invalid, Value::Null).param, None);
}

#[test]
fn errors_of_compatible_servers_are_read_in_their_own_shapes() {
    let outgoing = Asked::of(Provider::Compatible, "llama").send(hi(json!({}))).unwrap();
    let message = "This model's maximum context length is 4096 tokens";
    let old = json!({"object": "error", "message": message, "type": "BadRequestError", "param": null, "code": 400});
    let error = failed(&outgoing, 400, &old);
    assert_eq!((error.cause, error.message.as_str()), (Cause::ContextLength, message));
    let detail = failed(&outgoing, 422, &json!({"detail": "bad field"}));
    assert_eq!((detail.cause, detail.message.as_str()), (Cause::Invalid, "bad field"));
    let text = failed(&outgoing, 500, &json!({"error": "it broke"}));
    assert_eq!((text.cause, text.message.as_str()), (Cause::Failed, "it broke"));
    // A 200 that is none.
    let hidden = whole(&outgoing, &json!({"error": {"message": "gone", "code": 404}})).unwrap_err();
    assert_eq!(hidden.cause, Cause::ModelUnavailable);
}

#[test]
fn the_upstream_s_wait_is_kept() {
    let outgoing = openai("gpt-5.5").send(hi(json!({}))).unwrap();
    let mut headers = HeaderMap::new();
    headers.insert("retry-after-ms", "1500".parse().unwrap());
    let error = reply(&outgoing, 429, &headers, &json!({"error": {"message": "m"}})).unwrap_err();
    assert_eq!(error.retry_after, Some(std::time::Duration::from_millis(1500)));
    assert_eq!(error.retry(), crate::providers::error::Retry::Here);
}

#[test]
fn legacy_completions_pass_where_the_route_exists() {
    let body = json!({"model": "m", "prompt": ["a", "b"], "n": 2, "best_of": 3, "max_tokens": 10, "echo": true, "logprobs": 2, "stream": true});
    let outgoing = openai("gpt-3.5-turbo-instruct").complete(body.clone()).unwrap();
    assert_eq!(outgoing.request.url.path(), "/v1/completions");
    assert_eq!(outgoing.request.body["model"], "gpt-3.5-turbo-instruct");
    assert_eq!(outgoing.request.body["prompt"], json!(["a", "b"]));
    // Three for each of two prompts are computed.
    assert_eq!(outgoing.max_output_tokens, Some(60));
    let text = |index: u32, text: &str, finish: Option<&str>| {
        event(&json!({"id": "cmpl-1", "object": "text_completion", "choices": [
            {"index": index, "text": text, "logprobs": null, "finish_reason": finish}]}))
    };
    let events =
        [text(0, "x", None), text(1, "y", None), text(0, "z", Some("stop")), text(1, "", Some("length")), done()];
    let chunks = stream(outgoing.reader, &events).unwrap().chunks;
    let of = |index: u64| -> String {
        let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
        choices.filter(|choice| choice["index"] == index).map(|choice| choice["text"].as_str().unwrap()).collect()
    };
    assert_eq!((of(0), of(1)), ("xz".to_owned(), "y".to_owned()));
    assert!(chunks.iter().all(|chunk| chunk["object"] == "text_completion"));
    for (provider, model) in [
        (Provider::OpenAi, "gpt-5.5"),
        (Provider::Anthropic, "claude-opus-5-5"),
        (Provider::Gemini, "gemini-3.8-flash"),
    ] {
        assert_eq!(
            refused(Asked::of(provider, model).complete(body.clone())),
            ("prompt".to_owned(), "unsupported_parameter")
        );
    }
}

/// Fields by which other gateways and servers run a dearer model or write a longer answer than was reserved for.
#[test]
fn what_would_choose_another_model_or_length_is_not_passed() {
    let body =
        hi(json!({"models": ["dear"], "route": "fallback", "fallbacks": ["dear"], "n_predict": 100_000, "min_p": 0.1}));
    let outgoing = Asked::of(Provider::Compatible, "llama").send(body).unwrap();
    for name in ["models", "route", "fallbacks", "n_predict"] {
        assert!(!outgoing.request.body.contains_key(name), "{name}");
    }
    assert!(outgoing.request.body.contains_key("min_p"));
    assert_eq!(dropped(&outgoing), ["models", "route", "fallbacks", "n_predict"]);
    let body = json!({"model": "m", "prompt": "hi", "models": ["dear"], "n_predict": 100_000, "best_of": 2,
        "plugins": [{"id": "web"}]});
    let outgoing = Asked::of(Provider::Compatible, "llama").complete(body).unwrap();
    assert!(["models", "n_predict", "plugins"].iter().all(|name| !outgoing.request.body.contains_key(*name)));
    assert_eq!(outgoing.request.body["best_of"], 2, "it is counted there");
}

#[test]
fn content_in_parts_is_text_and_thoughts() {
    let outgoing = Asked::of(Provider::Compatible, "magistral").send(hi(json!({}))).unwrap();
    let mut body = answer();
    body["choices"][0]["message"]["content"] = json!([
        {"type": "thinking", "thinking": [{"type": "text", "text": "so "}, {"type": "text", "text": "then"}]},
        {"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]);
    let message = &whole(&outgoing, &body).unwrap().choices[0].message;
    assert_eq!((message.content.as_deref(), message.reasoning.as_deref()), (Some("hello"), Some("so then")));
    body["choices"][0]["message"]["content"] = json!([{"type": "riddle"}]);
    assert_eq!(whole(&outgoing, &body).unwrap_err().cause, Cause::Malformed);
}

#[test]
fn choices_without_numbers_are_numbered() {
    let outgoing = Asked::of(Provider::Compatible, "llama").send(hi(json!({"n": 2}))).unwrap();
    let mut body = answer();
    let mut choice = body["choices"][0].clone();
    choice.as_object_mut().unwrap().remove("index");
    body["choices"] = json!([choice, choice]);
    let indices: Vec<u32> = whole(&outgoing, &body).unwrap().choices.iter().map(|choice| choice.index).collect();
    assert_eq!(indices, [0, 1]);
}
