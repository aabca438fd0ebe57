//! Reading requests: losslessly, and with errors that say where.

use proptest::{prelude::*, string::string_regex};
use serde_json::{Value, json};

use super::*;

fn read(body: Value) -> Result<ChatRequest, Refusal> {
    let Value::Object(body) = body else { panic!("an object") };
    ChatRequest::read(body)
}

/// Every field of the API, in the order they are written back.
fn everything() -> Value {
    serde_json::from_str(
        r#"{
        "model": "gpt-x",
        "messages": [
            {"role": "developer", "content": "be brief", "name": "ops"},
            {"role": "system", "content": [{"type": "text", "text": "be kind"}]},
            {"role": "user", "content": [
                {"type": "text", "text": "look", "prompt_cache_breakpoint": {"mode": "explicit"}},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk=", "detail": "low", "novel": 1}},
                {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}},
                {"type": "file", "file": {"file_id": "file-1", "filename": "a.pdf"}}
            ]},
            {"role": "assistant", "content": null, "reasoning_content": "hm", "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"},
                 "extra_content": {"google": {"thought_signature": "c2ln"}}},
                {"id": "call_2", "type": "custom", "custom": {"name": "g", "input": "free"}}
            ], "extra_content": {"anthropic": {}}},
            {"role": "tool", "tool_call_id": "call_1", "content": "one"},
            {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "two"}]},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "refusal": "no"},
            {"role": "function", "content": "old", "name": "f", "novel": {"a": [1]}}
        ],
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "n": 2, "stop": ["a", "b"],
        "frequency_penalty": -2.0, "presence_penalty": 2.0, "logit_bias": {"50256": -100}, "seed": -7,
        "logprobs": true, "top_logprobs": 20,
        "max_completion_tokens": 100, "max_tokens": 50, "reasoning_effort": "xhigh",
        "tools": [
            {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": true}},
            {"type": "custom", "custom": {"name": "g", "format": {"type": "text"}}}
        ],
        "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}},
        "parallel_tool_calls": false,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "description": "d", "schema": {"type": "object"}, "strict": false}},
        "stream": true, "stream_options": {"include_usage": true, "include_obfuscation": false, "novel": 1},
        "service_tier": "flex", "user": "u", "safety_identifier": "s",
        "modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "mp3"}, "web_search_options": {},
        "functions": [], "function_call": "auto",
        "metadata": {"k": "v"}, "store": true, "prediction": {"type": "content", "content": "x"}, "verbosity": "low",
        "moderation": {"model": "m"}, "prompt_cache_key": "k", "prompt_cache_options": {"mode": "implicit"},
        "prompt_cache_retention": "24h",
        "min_p": 0.1, "guided_json": {"type": "object"},
        "from_the_future": {"deep": [1, 2, {"x": null}]}
    }"#,
    )
    .unwrap()
}

#[test]
fn what_was_read_is_written_back() {
    let body = everything();
    let request = read(body.clone()).unwrap();
    assert_eq!(Value::Object(request.to_json()), body);
    assert_eq!(read(Value::Object(request.to_json())).unwrap(), request);
    assert!(request.has_images() && request.wants_usage_chunk());
    assert_eq!(request.extra.keys().collect::<Vec<_>>(), ["from_the_future"]);
}

#[test]
fn null_means_absent() {
    let Value::Object(mut body) = everything() else { panic!() };
    let keep = ["model", "messages"];
    for (name, value) in &mut body {
        if !keep.contains(&name.as_str()) {
            *value = Value::Null;
        }
    }
    let request = read(Value::Object(body.clone())).unwrap();
    assert_eq!(request.to_json().keys().collect::<Vec<_>>(), keep);
}

#[test]
fn one_stop_string_is_a_list_of_one() {
    let request = read(json!({"model": "m", "messages": [{"role": "user", "content": "x"}], "stop": "\n"})).unwrap();
    assert_eq!(request.sampling.stop, ["\n"]);
}

/// Field by field: the body with one wrong value, and the path that must be named.
#[test]
fn an_error_names_its_place() {
    let user = || json!([{"role": "user", "content": "x"}]);
    let cases: Vec<(Value, &str)> = vec![
        (json!({"messages": []}), "model"),
        (json!({"model": 1, "messages": user()}), "model"),
        (json!({"model": "m"}), "messages"),
        (json!({"model": "m", "messages": []}), "messages"),
        (json!({"model": "m", "messages": "x"}), "messages"),
        (json!({"model": "m", "messages": ["x"]}), "messages[0]"),
        (json!({"model": "m", "messages": [{"content": "x"}]}), "messages[0].role"),
        (json!({"model": "m", "messages": [{"role": "king", "content": "x"}]}), "messages[0].role"),
        (json!({"model": "m", "messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"model": "m", "messages": [{"role": "user", "content": 1}]}), "messages[0].content"),
        (json!({"model": "m", "messages": [{"role": "assistant"}]}), "messages[0].content"),
        (json!({"model": "m", "messages": [{"role": "tool", "content": "x"}]}), "messages[0].tool_call_id"),
        (json!({"model": "m", "messages": [{"role": "function", "content": "x"}]}), "messages[0].name"),
        (
            json!({"model": "m", "messages": [{"role": "user", "content": [{"type": "video"}]}]}),
            "messages[0].content[0].type",
        ),
        (
            json!({"model": "m", "messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
            "messages[0].content[0].type",
        ),
        (
            json!({"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
            "messages[0].content[0].image_url.url",
        ),
        (
            json!({"model": "m", "messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x", "format": "ogg"}}]}]}),
            "messages[0].content[0].input_audio.format",
        ),
        (
            json!({"model": "m", "messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {}}]}]}),
            "messages[0].tool_calls[0].function.name",
        ),
        (json!({"model": "m", "messages": user(), "temperature": 2.5}), "temperature"),
        (json!({"model": "m", "messages": user(), "temperature": "hot"}), "temperature"),
        (json!({"model": "m", "messages": user(), "n": 0}), "n"),
        (json!({"model": "m", "messages": user(), "n": 1.5}), "n"),
        (json!({"model": "m", "messages": user(), "seed": 1e30}), "seed"),
        (json!({"model": "m", "messages": user(), "stop": ["a", 1]}), "stop[1]"),
        (json!({"model": "m", "messages": user(), "logit_bias": {"x": 1}}), "logit_bias.x"),
        (json!({"model": "m", "messages": user(), "logit_bias": {"1": 101}}), "logit_bias.1"),
        (json!({"model": "m", "messages": user(), "top_logprobs": 2}), "top_logprobs"),
        (json!({"model": "m", "messages": user(), "max_tokens": 0}), "max_tokens"),
        (json!({"model": "m", "messages": user(), "stream_options": {}}), "stream_options"),
        (json!({"model": "m", "messages": user(), "reasoning_effort": "huge"}), "reasoning_effort"),
        (json!({"model": "m", "messages": user(), "tool_choice": "required"}), "tool_choice"),
        (
            json!({"model": "m", "messages": user(), "tool_choice": {"type": "function", "function": {"name": "f"}}}),
            "tool_choice",
        ),
        (json!({"model": "m", "messages": user(), "tools": [{"type": "hammer"}]}), "tools[0].type"),
        (json!({"model": "m", "messages": user(), "tools": [{"type": "function"}]}), "tools[0].function"),
        (json!({"model": "m", "messages": user(), "response_format": {"type": "xml"}}), "response_format.type"),
        (
            json!({"model": "m", "messages": user(), "response_format": {"type": "json_schema", "json_schema": {}}}),
            "response_format.json_schema.name",
        ),
        (json!({"model": "m", "messages": user(), "metadata": []}), "metadata"),
    ];
    for (body, param) in cases {
        let error = read(body.clone()).unwrap_err();
        assert_eq!(error.param(), param, "{body}: {error}");
        assert_eq!(error.to_json()["error"]["type"], "invalid_request_error");
    }
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        string_regex("[a-z]{0,6}").unwrap().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(string_regex("[a-z_]{1,12}").unwrap(), inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    /// Whatever one field is replaced by, the request is read or refused by name, and what is read is written back.
    #[test]
    fn any_value_in_any_field_is_read_or_refused(field in 0usize..40, value in json_value()) {
        let Value::Object(mut body) = everything() else { panic!() };
        let names: Vec<String> = body.keys().cloned().collect();
        let name = &names[field % names.len()];
        body.insert(name.clone(), value);
        match ChatRequest::read(body) {
            Ok(request) => {
                let again = ChatRequest::read(request.to_json()).unwrap();
                prop_assert_eq!(again, request);
            }
            Err(error) => prop_assert!(!error.param().is_empty()),
        }
    }
}
