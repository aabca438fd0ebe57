//! Anthropic's Messages API.

use super::*;

fn claude(model: &str) -> Asked {
    Asked::of(Provider::Anthropic, model)
}

/// The body sent for a conversation.
fn sent(model: &str, body: Value) -> Value {
    Value::Object(claude(model).send(body).unwrap().request.body)
}

fn weather() -> Value {
    json!([{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}, "strict": true}},
        {"type": "function", "function": {"name": "time"}}])
}

#[test]
fn a_plain_request_has_what_the_api_asks_for() {
    let outgoing = claude("claude-haiku-4-5-20251001").send(hi(json!({}))).unwrap();
    assert_eq!(outgoing.request.url.as_str(), "https://api.anthropic.com/v1/messages");
    assert_eq!(outgoing.request.headers["anthropic-version"], "2023-06-01");
    let expected = json!({"model": "claude-haiku-4-5-20251001", "max_tokens": 64000,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]});
    assert_eq!(Value::Object(outgoing.request.body), expected);
    // Short names that the API does not know go out as what they stand for.
    assert_eq!(sent("claude-3-haiku", hi(json!({})))["model"], "claude-3-haiku-20240307");
    let mut foundry = claude("claude-opus-5-5");
    foundry.base = Some("https://res.services.ai.azure.com/anthropic/");
    let url = foundry.send(hi(json!({}))).unwrap().request.url;
    assert_eq!(url.as_str(), "https://res.services.ai.azure.com/anthropic/v1/messages");
}

#[test]
fn turns_are_merged_and_results_stand_first() {
    let body = json!({"model": "m", "tools": weather(), "messages": [
        {"role": "system", "content": "one"},
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": ""}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "calling", "tool_calls": [
            {"id": "call.1/x", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"Oslo\"}"}},
            {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": ""}}]},
        {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
        {"role": "tool", "tool_call_id": "call.1/x", "content": [{"type": "text", "text": "rain"}]},
        {"role": "developer", "content": "two"},
        {"role": "user", "content": "and?"},
    ]});
    let sent = sent("claude-opus-5-5", body);
    assert_eq!(sent["system"], "one\ntwo");
    let expected = json!([
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [
            {"type": "text", "text": "calling"},
            {"type": "tool_use", "id": "bindery_call_0", "name": "weather", "input": {"city": "Oslo"}},
            {"type": "tool_use", "id": "call_2", "name": "time", "input": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "call_2", "content": "noon"},
            {"type": "tool_result", "tool_use_id": "bindery_call_0", "content": "rain"},
            {"type": "text", "text": "and?"}]},
    ]);
    assert_eq!(sent["messages"], expected);
    let tools = json!([
        {"name": "weather", "description": "d", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}, "strict": true},
        {"name": "time", "input_schema": {"type": "object", "properties": {}}},
    ]);
    assert_eq!(sent["tools"], tools);
    assert!(sent.get("tool_choice").is_none());
}

#[test]
fn calls_and_results_must_match() {
    let call = |id: &str, arguments: &str| json!({"role": "assistant", "tool_calls": [{"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}}]});
    let result = |id: &str| json!({"role": "tool", "tool_call_id": id, "content": "r"});
    let user = json!({"role": "user", "content": "u"});
    for (messages, param) in [
        (vec![user.clone(), result("a")], "messages[1].tool_call_id"),
        (vec![user.clone(), call("a", "{}"), user.clone()], "messages[2]"),
        (vec![user.clone(), call("a", "{}")], "messages"),
        (vec![user.clone(), call("a", "{}"), result("a"), result("a")], "messages[3].tool_call_id"),
        (vec![user.clone(), call("a", "{}"), result("a"), call("a", "{}")], "messages[3].tool_calls[0].id"),
        (vec![user.clone(), call("a", "[1]"), result("a")], "messages[1].tool_calls[0].function.arguments"),
        (vec![json!({"role": "system", "content": "s"})], "messages"),
        (vec![json!({"role": "function", "name": "f", "content": "s"})], "messages[0].role"),
    ] {
        for (provider, model) in [(Provider::Anthropic, "claude-opus-5-5"), (Provider::Gemini, "gemini-3.8-flash")] {
            let asked = Asked::of(provider, model).send(json!({"model": "m", "messages": messages}));
            assert_eq!(refused(asked).0, param, "{messages:?}");
        }
    }
}

#[test]
fn a_choice_of_tools_is_said_in_anthropic_s_words() {
    let choice = |more: Value| {
        let mut body = hi(more);
        body["tools"] = weather();
        sent("claude-haiku-4-5", body)
    };
    let of = |choice_: Value| choice(json!({"tool_choice": choice_}))["tool_choice"].clone();
    assert_eq!(of(json!("none")), json!({"type": "none"}));
    assert_eq!(of(json!("auto")), json!({"type": "auto"}));
    assert_eq!(of(json!("required")), json!({"type": "any"}));
    let named = json!({"type": "function", "function": {"name": "time"}});
    assert_eq!(of(named.clone()), json!({"type": "tool", "name": "time"}));
    let allowed = json!({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}});
    let body = choice(json!({"tool_choice": allowed}));
    assert_eq!(body["tool_choice"], json!({"type": "any"}));
    assert_eq!(body["tools"].as_array().unwrap().len(), 1);
    let serial = choice(json!({"parallel_tool_calls": false}));
    assert_eq!(serial["tool_choice"], json!({"type": "auto", "disable_parallel_tool_use": true}));
    let none = choice(json!({"parallel_tool_calls": false, "tool_choice": "none"}));
    assert_eq!(none["tool_choice"], json!({"type": "none"}));
    let mut forced = hi(json!({"tool_choice": "required"}));
    forced["tools"] = weather();
    assert_eq!(refused(claude("claude-opus-5-5").send(forced)).0, "tool_choice");
}

#[test]
fn sampling_fields_go_where_the_model_takes_them() {
    let all = json!({"temperature": 1.5, "top_p": 0.5, "top_k": 3});
    let old = claude("claude-3-haiku").send(hi(all.clone())).unwrap();
    assert_eq!((&old.request.body["temperature"], &old.request.body["top_p"]), (&json!(1.0), &json!(0.5)));
    assert!(old.warnings.header().unwrap().contains("1.5 sent as 1"));
    let one = claude("claude-haiku-4-5").send(hi(all.clone())).unwrap();
    assert!(one.request.body.contains_key("temperature") && !one.request.body.contains_key("top_p"));
    assert_eq!(dropped(&one), ["top_p"]);
    let only = claude("claude-haiku-4-5").send(hi(json!({"temperature": 1, "top_p": 0.5}))).unwrap();
    assert!(only.warnings.is_empty() && !only.request.body.contains_key("temperature"));
    let new = claude("claude-opus-5-5").send(hi(all)).unwrap();
    assert_eq!(dropped(&new), ["temperature", "top_p", "top_k"]);
    assert!(claude("claude-opus-5-5").send(hi(json!({"temperature": 1, "top_p": 1.0}))).unwrap().warnings.is_empty());
}

#[test]
fn hints_are_dropped_and_meanings_refused() {
    let outgoing = claude("claude-opus-5-5")
        .send(hi(
            json!({"seed": 1, "presence_penalty": 0.5, "frequency_penalty": 0, "metadata": {"a": "b"}, "user": "me@example.com", "store": false, "verbosity": "medium",
            "service_tier": "flex", "prediction": {"type": "content", "content": "x"}, "novel": 1, "stop": ["x", " "]}),
        ))
        .unwrap();
    assert_eq!(
        dropped(&outgoing),
        ["metadata", "prediction", "novel", "presence_penalty", "seed", "service_tier", "user"]
    );
    assert_eq!(outgoing.request.body["stop_sequences"], json!(["x"]));
    assert!(!Value::Object(outgoing.request.body).to_string().contains("example.com"));
    for (field, value) in [
        ("logit_bias", json!({"1": 1})),
        ("logprobs", json!(true)),
        ("n", json!(2)),
        ("modalities", json!(["text", "audio"])),
        ("audio", json!({})),
        ("web_search_options", json!({})),
        ("functions", json!([])),
        ("guided_regex", json!("a")),
    ] {
        assert_eq!(
            refused(claude("claude-opus-5-5").send(hi(json!({field: value})))),
            (field.to_owned(), "unsupported_parameter")
        );
    }
    let custom = hi(json!({"tools": [{"type": "custom", "custom": {"name": "c"}}]}));
    assert_eq!(refused(claude("claude-opus-5-5").send(custom)).0, "tools[0].type");
}

#[test]
fn people_are_named_by_a_keyed_hash_alone() {
    let asked = claude("claude-opus-5-5");
    let hash = |key: &str, body: Value| {
        let endpoint = asked.endpoint().with_end_users(endpoint::EndUsers::Hashed(Secret::new(key)));
        let request = ChatRequest::read(object(hi(body))).unwrap();
        let outgoing = asked.provider.chat(&asked.call(&endpoint), &request).unwrap();
        outgoing.request.body["metadata"]["user_id"].as_str().unwrap().to_owned()
    };
    let me = hash("k1", json!({"user": "me@example.com"}));
    assert_eq!(me.len(), 32);
    assert_eq!(me, hash("k1", json!({"safety_identifier": "me@example.com", "user": "other"})));
    assert_ne!(me, hash("k2", json!({"user": "me@example.com"})));
    assert_ne!(me, hash("k1", json!({"user": "you@example.com"})));
}

#[test]
fn media_are_passed_or_refused_by_place() {
    let with = |part: Value| hi(json!({"messages": [{"role": "user", "content": [part]}]}));
    let image = |url: &str| with(json!({"type": "image_url", "image_url": {"url": url, "detail": "high"}}));
    let block = |body: Value| sent("claude-opus-5-5", body)["messages"][0]["content"][0].clone();
    assert_eq!(
        block(image("data:image/png;base64,aGk=")),
        json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}})
    );
    assert_eq!(
        block(image("https://h/a.png")),
        json!({"type": "image", "source": {"type": "url", "url": "https://h/a.png"}})
    );
    let file = json!({"type": "file", "file": {"file_data": "data:application/pdf;base64,aGk=", "filename": "a.pdf"}});
    let document = json!({"type": "document", "title": "a.pdf", "source": {"type": "base64", "media_type": "application/pdf", "data": "aGk="}});
    assert_eq!(block(with(file)), document);
    for (body, param) in [
        (image("data:image/tiff;base64,aGk="), "messages[0].content[0].image_url.url"),
        (image("ftp://h"), "messages[0].content[0].image_url.url"),
        (
            with(json!({"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}})),
            "messages[0].content[0]",
        ),
        (with(json!({"type": "file", "file": {"file_id": "f"}})), "messages[0].content[0].file.file_id"),
        (
            with(json!({"type": "file", "file": {"file_data": "data:text/csv;base64,aGk="}})),
            "messages[0].content[0].file.file_data",
        ),
    ] {
        assert_eq!(refused(claude("claude-opus-5-5").send(body)).0, param);
    }
}

#[test]
fn a_prefill_is_trimmed_or_refused() {
    let body = hi(json!({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "Sure: "}]}));
    assert_eq!(sent("claude-haiku-4-5", body.clone())["messages"][1]["content"][0]["text"], "Sure:");
    assert_eq!(refused(claude("claude-opus-4-6").send(body)).0, "messages[1]");
}

#[test]
fn effort_becomes_thinking_as_the_model_takes_it() {
    let of = |model: &str, more: Value| sent(model, hi(more));
    let adaptive = of("claude-opus-5", json!({"reasoning_effort": "minimal"}));
    assert_eq!(
        (&adaptive["thinking"], &adaptive["output_config"]),
        (&json!({"type": "adaptive"}), &json!({"effort": "low"}))
    );
    assert_eq!(of("claude-opus-5", json!({"reasoning_effort": "none"}))["thinking"], json!({"type": "disabled"}));
    let always = of("claude-fable-5", json!({"reasoning_effort": "none"}));
    assert!(always.get("thinking").is_none());
    assert_eq!(always["output_config"], json!({"effort": "low"}));
    let budget = |effort: &str, max: u64| {
        of("claude-haiku-4-5", json!({"reasoning_effort": effort, "max_tokens": max, "temperature": 0.5}))
    };
    assert_eq!(budget("medium", 9000)["thinking"], json!({"type": "enabled", "budget_tokens": 2048}));
    assert_eq!(budget("max", 5000)["thinking"]["budget_tokens"], 3750);
    assert!(budget("medium", 9000).get("temperature").is_none());
    let small = claude("claude-haiku-4-5").send(hi(json!({"reasoning_effort": "high", "max_tokens": 1024}))).unwrap();
    assert_eq!(dropped(&small), ["reasoning_effort"]);
    assert!(!small.request.body.contains_key("thinking"));
    let none = claude("claude-3-haiku").send(hi(json!({"reasoning_effort": "none"}))).unwrap();
    assert!(none.warnings.is_empty());
    let mut forced = hi(json!({"reasoning_effort": "high", "tool_choice": "required"}));
    forced["tools"] = weather();
    let forced = claude("claude-haiku-4-5").send(forced).unwrap();
    assert_eq!(dropped(&forced), ["reasoning_effort"]);
}

#[test]
fn signed_thoughts_go_back_to_the_model_that_wrote_them_while_it_thinks() {
    let block = json!({"type": "thinking", "thinking": "hm", "signature": "sig"});
    let body = |model: &str, more: Value| {
        let mut body = hi(json!({"tools": weather(), "messages": [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": null, "extra_content": {"anthropic": {"model": model, "thinking_blocks": [block]}},
             "tool_calls": [{"id": "c", "type": "function", "function": {"name": "time", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "noon"}]}));
        body.as_object_mut().unwrap().extend(object(more));
        body
    };
    let high = json!({"reasoning_effort": "high"});
    let kept = sent("claude-haiku-4-5", body("claude-haiku-4-5", high.clone()));
    assert_eq!(kept["messages"][1]["content"][0], block);
    assert_eq!(kept["thinking"]["type"], "enabled");
    let calm = sent("claude-haiku-4-5", body("claude-haiku-4-5", json!({})));
    assert_eq!(calm["messages"][1]["content"][0]["type"], "tool_use");
    // Another model's: stripped, and thinking cannot go on inside this turn.
    let moved = claude("claude-haiku-4-5").send(body("claude-opus-5-5", high)).unwrap();
    assert_eq!(moved.request.body["messages"][1]["content"][0]["type"], "tool_use");
    assert_eq!(dropped(&moved), ["reasoning_effort"]);
}

#[test]
fn json_is_asked_for_in_three_ways() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    let format = json!({"response_format": {"type": "json_schema", "json_schema": {"name": "shape", "schema": schema, "strict": true}}});
    let new = sent("claude-opus-5-5", hi(format.clone()));
    assert_eq!(new["output_config"], json!({"format": {"type": "json_schema", "schema": schema}}));
    let old = claude("claude-3-haiku").send(hi(format.clone())).unwrap();
    assert_eq!(old.request.body["tool_choice"], json!({"type": "tool", "name": "shape"}));
    assert_eq!(old.request.body["tools"][0]["input_schema"], schema);
    let body = message(&json!([{"type": "tool_use", "id": "t", "name": "shape", "input": {"a": 1}}]), "tool_use");
    let answer = whole(&old, &body).unwrap().to_json();
    assert_eq!(answer["choices"][0]["message"]["content"], "{\"a\":1}");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert!(answer["choices"][0]["message"].get("tool_calls").is_none());
    let mut both = hi(format);
    both["tools"] = weather();
    assert_eq!(refused(claude("claude-3-haiku").send(both)).0, "response_format");

    let object_ = claude("claude-opus-5-5").send(hi(json!({"response_format": {"type": "json_object"}}))).unwrap();
    assert!(object_.request.body["system"].as_str().unwrap().contains("JSON object"));
    let text = |text: &str, stop: &str| message(&json!([{"type": "text", "text": text}]), stop);
    assert!(whole(&object_, &text("{\"a\": 1}", "end_turn")).is_ok());
    let prose = whole(&object_, &text("Sure! {}", "end_turn")).unwrap_err();
    assert_eq!(prose.cause, Cause::Unfit);
    assert!(matches!(prose.spent, Spent::Known(usage) if usage.completion > 0), "what was counted is told");
    // Cut by the limit it cannot be whole, and says so itself.
    assert!(whole(&object_, &text("{\"a\"", "max_tokens")).is_ok());
}

fn message(content: &Value, stop: &str) -> Value {
    json!({"id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "content": content,
        "stop_reason": stop, "stop_sequence": null,
        "usage": {"input_tokens": 10, "cache_creation_input_tokens": 20, "cache_read_input_tokens": 30, "output_tokens": 40,
            "output_tokens_details": {"thinking_tokens": 25}, "service_tier": "standard"}})
}

#[test]
fn a_whole_answer_becomes_openai_s() {
    let outgoing = claude("claude-opus-5-5").send(hi(json!({}))).unwrap();
    let content = json!([
        {"type": "thinking", "thinking": "hm", "signature": "sig"},
        {"type": "text", "text": "it "}, {"type": "text", "text": "rains"},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}},
        {"type": "tool_use", "id": "toolu_2", "name": "time", "input": {}}]);
    let answer = whole(&outgoing, &message(&content, "tool_use")).unwrap();
    let expected = json!({"id": "chatcmpl-msg_1", "object": "chat.completion", "created": now().timestamp(), "model": "asked-for",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "it rains", "refusal": null, "reasoning_content": "hm",
            "tool_calls": [
                {"id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"Oslo\"}"}},
                {"id": "toolu_2", "type": "function", "function": {"name": "time", "arguments": "{}"}}],
            "extra_content": {"anthropic": {"model": "claude-opus-5-5", "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "sig"}]}}},
            "logprobs": null, "finish_reason": "tool_calls", "native_finish_reason": "tool_use"}],
        "usage": {"prompt_tokens": 60, "completion_tokens": 40, "total_tokens": 100,
            "prompt_tokens_details": {"cached_tokens": 30, "cache_write_tokens": 20},
            "completion_tokens_details": {"reasoning_tokens": 25}}});
    assert_eq!(answer.to_json(), expected);
    // An answer goes back as a turn.
    let turn = answer.to_json()["choices"][0]["message"].clone();
    let results: Vec<Value> =
        ["toolu_1", "toolu_2"].map(|id| json!({"role": "tool", "tool_call_id": id, "content": "r"})).into();
    let messages: Vec<Value> = [json!({"role": "user", "content": "u"}), turn].into_iter().chain(results).collect();
    let again =
        sent("claude-opus-5-5", hi(json!({"messages": messages, "tools": weather(), "reasoning_effort": "high"})));
    assert_eq!(
        again["messages"][1]["content"],
        json!([
        {"type": "thinking", "thinking": "hm", "signature": "sig"}, {"type": "text", "text": "it rains"},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}},
        {"type": "tool_use", "id": "toolu_2", "name": "time", "input": {}}])
    );
}

#[test]
fn every_ending_has_its_word() {
    let outgoing = claude("claude-opus-5-5").send(hi(json!({}))).unwrap();
    for (native, word) in [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("tool_use", "tool_calls"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("pause_turn", "length"),
        ("refusal", "content_filter"),
        ("from_the_future", "stop"),
    ] {
        let choice = whole(&outgoing, &message(&json!([]), native)).unwrap().to_json()["choices"][0].clone();
        assert_eq!((&choice["finish_reason"], &choice["native_finish_reason"]), (&json!(word), &json!(native)));
        assert_eq!(choice["message"]["content"], Value::Null);
    }
    let mut refusal = message(&json!([]), "refusal");
    refusal["stop_details"] = json!({"type": "refusal", "category": "cyber", "explanation": "not this"});
    let choice = whole(&outgoing, &refusal).unwrap().to_json()["choices"][0].clone();
    assert_eq!(choice["message"]["refusal"], "not this");
}

pub(super) fn recorded() -> Vec<SseEvent> {
    let start = json!({"type": "message_start", "message": {"id": "msg_1", "type": "message", "role": "assistant", "content": [],
        "model": "claude", "stop_reason": null, "usage": {"input_tokens": 10, "cache_read_input_tokens": 30, "cache_creation_input_tokens": 20, "output_tokens": 1}}});
    let begin =
        |index: u64, block: Value| json!({"type": "content_block_start", "index": index, "content_block": block});
    let more = |index: u64, delta: Value| json!({"type": "content_block_delta", "index": index, "delta": delta});
    let stop = |index: u64| json!({"type": "content_block_stop", "index": index});
    [
        start,
        begin(0, json!({"type": "thinking", "thinking": "", "signature": ""})),
        json!({"type": "ping"}),
        more(0, json!({"type": "thinking_delta", "thinking": "h"})),
        more(0, json!({"type": "thinking_delta", "thinking": "m"})),
        more(0, json!({"type": "signature_delta", "signature": "sig"})),
        stop(0),
        begin(1, json!({"type": "text", "text": ""})),
        more(1, json!({"type": "text_delta", "text": "it "})),
        more(1, json!({"type": "citations_delta", "citation": {}})),
        more(1, json!({"type": "text_delta", "text": "rains"})),
        stop(1),
        begin(2, json!({"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}})),
        more(2, json!({"type": "input_json_delta", "partial_json": ""})),
        more(2, json!({"type": "input_json_delta", "partial_json": "{\"city\":"})),
        more(2, json!({"type": "input_json_delta", "partial_json": "\"Oslo\"}"})),
        stop(2),
        begin(3, json!({"type": "tool_use", "id": "toolu_2", "name": "time", "input": {}})),
        stop(3),
        json!({"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": null},
            "usage": {"output_tokens": 40, "output_tokens_details": {"thinking_tokens": 25}}}),
        json!({"type": "message_stop"}),
    ]
    .iter()
    .map(event)
    .collect()
}

#[test]
fn a_stream_gives_what_the_whole_answer_would() {
    let outgoing = claude("claude-opus-5-5").send(hi(json!({"stream": true}))).unwrap();
    assert_eq!(outgoing.request.body["stream"], true);
    let streamed = stream(outgoing.reader, &recorded()).unwrap();
    let usage = streamed.usage;
    assert_eq!((usage.prompt, usage.cached, usage.cache_write), (60, 30, 20));
    assert_eq!((usage.completion, usage.reasoning, usage.estimated), (40, 25, false));
    let expected = json!([{"message": {"role": "assistant", "content": "it rains", "reasoning_content": "hm",
        "tool_calls": [
            {"index": 0, "id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"Oslo\"}"}},
            {"index": 1, "id": "toolu_2", "type": "function", "function": {"name": "time", "arguments": "{}"}}],
        "extra_content": {"anthropic": {"model": "claude-opus-5-5", "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "sig"}]}}},
        "finish_reason": "tool_calls"}]);
    assert_eq!(gathered(&streamed.chunks), expected);
    let roles = streamed.chunks.iter().filter(|chunk| chunk["choices"][0]["delta"].get("role").is_some());
    assert_eq!(roles.count(), 1);
}

#[test]
fn a_refusal_in_a_stream_says_why() {
    let outgoing = claude("claude-opus-5-5").send(hi(json!({"stream": true}))).unwrap();
    let events: Vec<SseEvent> = [
        json!({"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 1, "output_tokens": 0}}}),
        json!({"type": "message_delta", "delta": {"stop_reason": "refusal", "stop_details": {"type": "refusal", "category": "bio", "explanation": null}}, "usage": {"output_tokens": 0}}),
        json!({"type": "message_stop"}),
    ]
    .iter()
    .map(event)
    .collect();
    let chunks = stream(outgoing.reader, &events).unwrap().chunks;
    assert_eq!(
        gathered(&chunks),
        json!([{"message": {"role": "assistant", "content": "", "refusal": "bio"}, "finish_reason": "content_filter"}])
    );
}

#[test]
fn a_forced_tool_streams_as_text() {
    let format = json!({"stream": true, "response_format": {"type": "json_schema", "json_schema": {"name": "weather", "schema": {"type": "object"}}}});
    let outgoing = claude("claude-3-haiku").send(hi(format)).unwrap();
    let events: Vec<SseEvent> = recorded()
        .into_iter()
        .filter(|event| !event.data.contains("toolu_2") && !event.data.contains("\"index\":3"))
        .collect();
    let chunks = stream(outgoing.reader, &events).unwrap().chunks;
    let gathered = gathered(&chunks);
    assert_eq!(gathered[0]["message"]["content"], "it rains{\"city\":\"Oslo\"}");
    assert_eq!(gathered[0]["finish_reason"], "stop");
    assert!(gathered[0]["message"].get("tool_calls").is_none());
}

#[test]
fn an_object_that_is_none_fails_at_the_end_of_a_stream() {
    let outgoing = claude("claude-opus-5-5")
        .send(hi(json!({"stream": true, "response_format": {"type": "json_object"}})))
        .unwrap();
    let mut events = recorded();
    events.retain(|event| !event.data.contains("\"index\":2") && !event.data.contains("\"index\":3"));
    let last = events.len() - 2;
    events[last] =
        event(&json!({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 4}}));
    assert_eq!(stream(outgoing.reader, &events).err().unwrap().cause, Cause::Unfit);
}

#[test]
fn errors_are_told_apart_by_type() {
    let outgoing = claude("claude-opus-5-5").send(hi(json!({}))).unwrap();
    for (status, kind, message, cause) in [
        (400, "invalid_request_error", "bad", Cause::Invalid),
        (400, "invalid_request_error", "prompt is too long: 3 tokens > 2 maximum", Cause::ContextLength),
        (401, "authentication_error", "invalid x-api-key", Cause::Auth),
        (402, "billing_error", "pay", Cause::Quota),
        (403, "permission_error", "no", Cause::Auth),
        (404, "not_found_error", "model: x", Cause::ModelUnavailable),
        (409, "conflict_error", "again", Cause::Failed),
        (413, "request_too_large", "big", Cause::TooLarge),
        (429, "rate_limit_error", "slow", Cause::RateLimited),
        (500, "api_error", "oops", Cause::Failed),
        (504, "timeout_error", "late", Cause::Timeout),
        (529, "overloaded_error", "busy", Cause::Overloaded),
        (529, "from_the_future", "busy", Cause::Overloaded),
    ] {
        let body = json!({"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"});
        assert_eq!(failed(&outgoing, status, &body).cause, cause, "{kind}");
    }
    let mut reader = claude("claude-opus-5-5").send(hi(json!({"stream": true}))).unwrap().reader;
    for event in &recorded()[..9] {
        reader.event(event).unwrap();
    }
    let error = event(&json!({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}));
    assert_eq!(reader.event(&error).unwrap_err().cause, Cause::Overloaded);
    // The prompt was counted at the start; the answer is estimated.
    let usage = reader.partial_usage();
    assert!(usage.estimated && usage.prompt == 60 && usage.completion > 0);
}
