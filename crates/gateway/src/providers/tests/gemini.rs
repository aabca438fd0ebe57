//! Google's generateContent.

use super::*;

fn gemini(model: &str) -> Asked {
    Asked::of(Provider::Gemini, model)
}

fn sent(model: &str, body: Value) -> Value {
    Value::Object(gemini(model).send(body).unwrap().request.body)
}

#[test]
fn a_plain_request_has_its_address_and_shape() {
    let outgoing = gemini("gemini-3.8-flash").send(hi(json!({"max_tokens": 9}))).unwrap();
    let base = "https://generativelanguage.googleapis.com/v1beta/models/gemini-3.8-flash";
    assert_eq!(outgoing.request.url.as_str(), format!("{base}:generateContent"));
    let expected =
        json!({"contents": [{"role": "user", "parts": [{"text": "hi"}]}], "generationConfig": {"maxOutputTokens": 9}});
    assert_eq!(Value::Object(outgoing.request.body), expected);
    let streamed = gemini("gemini-3.8-flash").send(hi(json!({"stream": true}))).unwrap();
    assert_eq!(streamed.request.url.as_str(), format!("{base}:streamGenerateContent?alt=sse"));
    let mut vertex = gemini("gemini-2.5-pro");
    vertex.base = Some("https://eu-aiplatform.googleapis.com/v1/projects/p/locations/eu/publishers/google");
    let path = "/v1/projects/p/locations/eu/publishers/google/models/gemini-2.5-pro:generateContent";
    assert_eq!(vertex.send(hi(json!({}))).unwrap().request.url.path(), path);
}

#[test]
fn every_sampling_field_of_an_older_model_is_mapped() {
    let config = sent(
        "gemini-2.5-flash",
        hi(json!({"temperature": 1.5, "top_p": 0.5, "top_k": 4, "n": 2, "stop": ["a", "b"], "seed": 7, "presence_penalty": 1,
            "frequency_penalty": -1, "logprobs": true, "top_logprobs": 3, "max_completion_tokens": 10})),
    )["generationConfig"]
        .clone();
    let expected = json!({"maxOutputTokens": 10, "temperature": 1.5, "topP": 0.5, "topK": 4, "candidateCount": 2,
        "stopSequences": ["a", "b"], "presencePenalty": 1.0, "frequencyPenalty": -1.0, "seed": 7, "responseLogprobs": true, "logprobs": 3});
    assert_eq!(config, expected);
    let new =
        gemini("gemini-3.8-flash").send(hi(json!({"temperature": 0.1, "presence_penalty": 1, "seed": 7}))).unwrap();
    assert_eq!(dropped(&new), ["temperature", "presence_penalty"]);
    assert_eq!(refused(gemini("gemini-3.8-flash").send(hi(json!({"logprobs": true})))).0, "logprobs");
    assert_eq!(refused(gemini("gemini-3.8-flash").send(hi(json!({"n": 2})))).0, "n");
    assert_eq!(refused(gemini("gemini-2.5-pro").send(hi(json!({"stop": ["1", "2", "3", "4", "5", "6"]})))).0, "stop");
    assert_eq!(refused(gemini("gemini-2.5-pro").send(hi(json!({"seed": 1u64 << 40})))).0, "seed");
}

#[test]
fn effort_becomes_a_level_or_a_budget() {
    let of = |model: &str, effort: &str| {
        sent(model, hi(json!({"reasoning_effort": effort})))["generationConfig"]["thinkingConfig"].clone()
    };
    assert_eq!(of("gemini-3.8-flash", "none"), json!({"includeThoughts": true, "thinkingLevel": "MINIMAL"}));
    assert_eq!(of("gemini-3.1-pro-preview", "minimal")["thinkingLevel"], "LOW");
    assert_eq!(of("gemini-3.8-flash", "max")["thinkingLevel"], "HIGH");
    assert_eq!(of("gemini-4-argon", "max")["thinkingLevel"], "HIGH");
    assert_eq!(of("gemini-2.5-flash", "none"), json!({"thinkingBudget": 0}));
    assert_eq!(of("gemini-2.5-flash", "medium"), json!({"includeThoughts": true, "thinkingBudget": 2048}));
    assert_eq!(of("gemini-2.5-pro", "none")["thinkingBudget"], 512);
    let none = gemini("gemini-2.0-flash").send(hi(json!({"reasoning_effort": "high"}))).unwrap();
    assert_eq!(dropped(&none), ["reasoning_effort"]);
}

fn conversation(signature: Option<&str>) -> Value {
    let mut first =
        json!({"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"Oslo\"}"}});
    if let Some(signature) = signature {
        first["extra_content"] = json!({"google": {"thought_signature": signature}});
    }
    hi(json!({
        "tools": [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}},
            {"type": "function", "function": {"name": "time"}}],
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "t", "tool_calls": [first, {"id": "c2", "type": "function", "function": {"name": "time", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c2", "content": "noon"},
            {"role": "tool", "tool_call_id": "c1", "content": "{\"sky\":\"grey\"}"}
        ]
    }))
}

#[test]
fn calls_and_results_become_parts() {
    let body = sent("gemini-3.8-flash", conversation(Some("c2ln")));
    assert_eq!(body["systemInstruction"], json!({"parts": [{"text": "s"}]}));
    let expected = json!([
        {"role": "user", "parts": [{"text": "u"}]},
        {"role": "model", "parts": [{"text": "t"},
            {"functionCall": {"id": "c1", "name": "weather", "args": {"city": "Oslo"}}, "thoughtSignature": "c2ln"},
            {"functionCall": {"id": "c2", "name": "time", "args": {}}}]},
        {"role": "user", "parts": [
            {"functionResponse": {"id": "c2", "name": "time", "response": {"output": "noon"}}},
            {"functionResponse": {"id": "c1", "name": "weather", "response": {"sky": "grey"}}}]},
    ]);
    assert_eq!(body["contents"], expected);
    let tools = json!([{"functionDeclarations": [
        {"name": "weather", "description": "d", "parametersJsonSchema": {"type": "object"}}, {"name": "time"}]}]);
    assert_eq!(body["tools"], tools);
}

#[test]
fn a_lost_signature_is_replaced_in_the_turn_at_work_alone() {
    let lost = "c2tpcF90aG91Z2h0X3NpZ25hdHVyZV92YWxpZGF0b3I=";
    let call = |body: &Value| body["contents"][1]["parts"][1].clone();
    assert_eq!(call(&sent("gemini-3.8-flash", conversation(None)))["thoughtSignature"], lost);
    assert!(call(&sent("gemini-2.5-flash", conversation(None))).get("thoughtSignature").is_none());
    let mut later = conversation(None);
    later["messages"].as_array_mut().unwrap().push(json!({"role": "user", "content": "and now?"}));
    // The person has spoken since, in the same turn as the results: that turn is over.
    assert!(call(&sent("gemini-3.8-flash", later)).get("thoughtSignature").is_none());
}

#[test]
fn a_choice_of_tools_is_said_in_google_s_words() {
    let of = |choice: Value| {
        let mut body = conversation(None);
        body["tool_choice"] = choice;
        sent("gemini-3.8-flash", body)["toolConfig"]["functionCallingConfig"].clone()
    };
    assert_eq!(of(json!("none")), json!({"mode": "NONE"}));
    assert_eq!(of(json!("auto")), json!({"mode": "AUTO"}));
    assert_eq!(of(json!("required")), json!({"mode": "ANY"}));
    let named = json!({"type": "function", "function": {"name": "time"}});
    assert_eq!(of(named.clone()), json!({"mode": "ANY", "allowedFunctionNames": ["time"]}));
    let allowed = |mode: &str| json!({"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named]}});
    assert_eq!(of(allowed("auto")), json!({"mode": "VALIDATED", "allowedFunctionNames": ["time"]}));
    assert_eq!(of(allowed("required")), json!({"mode": "ANY", "allowedFunctionNames": ["time"]}));
    let mut serial = conversation(None);
    serial["parallel_tool_calls"] = false.into();
    assert_eq!(dropped(&gemini("gemini-3.8-flash").send(serial).unwrap()), ["parallel_tool_calls"]);
}

#[test]
fn media_are_passed_inline_and_never_fetched() {
    let with = |part: Value| hi(json!({"messages": [{"role": "user", "content": [part]}]}));
    let part = |body: Value| sent("gemini-3.8-flash", body)["contents"][0]["parts"][0].clone();
    let inline = |kind: &str| json!({"inlineData": {"mimeType": kind, "data": "aGk="}});
    let image = |url: &str| with(json!({"type": "image_url", "image_url": {"url": url}}));
    assert_eq!(part(image("data:image/webp;base64,aGk=")), inline("image/webp"));
    assert_eq!(
        part(with(json!({"type": "input_audio", "input_audio": {"data": "aGk=", "format": "mp3"}}))),
        inline("audio/mp3")
    );
    assert_eq!(
        part(with(json!({"type": "file", "file": {"file_data": "data:application/pdf;base64,aGk="}}))),
        inline("application/pdf")
    );
    for (body, param) in [
        (image("https://h/a.png"), "messages[0].content[0].image_url.url"),
        (image("data:text/html;base64,aGk="), "messages[0].content[0].image_url.url"),
        (with(json!({"type": "file", "file": {"file_id": "f"}})), "messages[0].content[0].file.file_id"),
    ] {
        assert_eq!(refused(gemini("gemini-3.8-flash").send(body)).0, param);
    }
}

#[test]
fn a_schema_is_sent_as_it_is_or_refused_where_strict_would_be_a_lie() {
    let format = |schema: Value, strict: bool| {
        hi(
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": strict}}}),
        )
    };
    let schema = json!({"type": "object", "properties": {"a": {"type": "string", "pattern": "x"}}});
    let config = sent("gemini-3.8-flash", format(schema.clone(), false))["generationConfig"].clone();
    assert_eq!((&config["responseMimeType"], &config["responseJsonSchema"]), (&json!("application/json"), &schema));
    let strict = refused(gemini("gemini-3.8-flash").send(format(schema, true)));
    assert_eq!(strict.0, "response_format.json_schema.schema.properties.a.pattern");
    let object = sent("gemini-3.8-flash", hi(json!({"response_format": {"type": "json_object"}})));
    assert_eq!(object["generationConfig"]["responseMimeType"], "application/json");
}

fn candidate(parts: &Value, finish: Option<&str>) -> Value {
    let mut value = json!({"index": 0, "content": {"role": "model", "parts": parts}});
    if let Some(finish) = finish {
        value["finishReason"] = finish.into();
    }
    value
}

fn answer(candidates: &Value) -> Value {
    json!({"candidates": candidates, "modelVersion": "gemini", "responseId": "r1",
        "usageMetadata": {"promptTokenCount": 10, "cachedContentTokenCount": 4, "candidatesTokenCount": 5, "thoughtsTokenCount": 6,
            "toolUsePromptTokenCount": 1, "totalTokenCount": 22}})
}

#[test]
fn a_whole_answer_becomes_openai_s() {
    let outgoing = gemini("gemini-3.8-flash").send(hi(json!({}))).unwrap();
    let parts = json!([{"text": "hm", "thought": true}, {"text": "it "}, {"text": "rains"},
        {"functionCall": {"name": "weather", "args": {"city": "Oslo"}}, "thoughtSignature": "c2ln"},
        {"functionCall": {"id": "own", "name": "time"}}]);
    let answer_ = whole(&outgoing, &answer(&json!([candidate(&parts, Some("STOP"))]))).unwrap();
    let expected = json!({"id": "chatcmpl-r1", "object": "chat.completion", "created": now().timestamp(), "model": "asked-for",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "it rains", "refusal": null, "reasoning_content": "hm",
            "tool_calls": [
                {"id": "call_r1_0_0", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"Oslo\"}"},
                 "extra_content": {"google": {"thought_signature": "c2ln"}}},
                {"id": "own", "type": "function", "function": {"name": "time", "arguments": "{}"}}]},
            "logprobs": null, "finish_reason": "tool_calls", "native_finish_reason": "STOP"}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 11, "total_tokens": 22,
            "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 6}}});
    assert_eq!(answer_.to_json(), expected);
}

#[test]
fn an_answer_without_an_id_gets_one_that_no_other_has() {
    let call = json!([{"functionCall": {"name": "time"}}]);
    let mut body = answer(&json!([candidate(&call, Some("STOP"))]));
    body.as_object_mut().unwrap().shift_remove("responseId");
    let ids = || {
        let outgoing = gemini("gemini-3.8-flash").send(hi(json!({}))).unwrap();
        let answer = whole(&outgoing, &body).unwrap().to_json();
        let id = |pointer: &str| answer.pointer(pointer).unwrap().as_str().unwrap().to_owned();
        (id("/id"), id("/choices/0/message/tool_calls/0/id"))
    };
    let (first, second) = (ids(), ids());
    assert!(first.0.len() > "chatcmpl-".len() && first.0 != second.0, "{first:?} {second:?}");
    assert_ne!(first.1, second.1);
}

#[test]
fn every_ending_has_its_word_or_is_an_error() {
    let outgoing = gemini("gemini-3.8-flash").send(hi(json!({}))).unwrap();
    let end = |reason: &str| whole(&outgoing, &answer(&json!([candidate(&json!([{"text": "x"}]), Some(reason))])));
    for (native, word) in [
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
        ("CONTINUATION", "length"),
        ("SAFETY", "content_filter"),
        ("RECITATION", "content_filter"),
        ("IMAGE_SAFETY", "content_filter"),
        ("OTHER", "content_filter"),
        ("FROM_THE_FUTURE", "stop"),
    ] {
        let choice = end(native).unwrap().to_json()["choices"][0].clone();
        assert_eq!((&choice["finish_reason"], &choice["native_finish_reason"]), (&json!(word), &json!(native)));
    }
    for native in [
        "MALFORMED_FUNCTION_CALL",
        "UNEXPECTED_TOOL_CALL",
        "MALFORMED_RESPONSE",
        "TOO_MANY_TOOL_CALLS",
        "MISSING_THOUGHT_SIGNATURE",
    ] {
        let error = end(native).unwrap_err();
        assert_eq!((error.cause, error.code()), (Cause::Unfit, "upstream_malformed_output"));
        assert!(matches!(error.spent, Spent::Known(usage) if usage.prompt > 0), "what was counted is told");
        assert!(error.message.contains(native));
    }
    assert_eq!(end("PUP_LIMITED_DISABLED").unwrap_err().cause, Cause::Auth);
    assert_eq!(whole(&outgoing, &answer(&json!([candidate(&json!([]), None)]))).unwrap_err().cause, Cause::Malformed);
}

#[test]
fn a_blocked_prompt_is_a_withheld_answer() {
    let body = json!({"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "responseId": "r", "usageMetadata": {"promptTokenCount": 3, "totalTokenCount": 3}});
    let outgoing = gemini("gemini-3.8-flash").send(hi(json!({"stream": true}))).unwrap();
    let choice = whole(&outgoing, &body).unwrap().to_json()["choices"][0].clone();
    assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&json!("content_filter"), &Value::Null));
    assert!(choice["message"]["refusal"].as_str().unwrap().contains("PROHIBITED_CONTENT"));
    let streamed = stream(outgoing.reader, &[event(&body)]).unwrap();
    assert_eq!(gathered(&streamed.chunks)[0]["finish_reason"], "content_filter");
    assert_eq!((streamed.usage.prompt, streamed.usage.completion), (3, 0));
}

#[test]
fn log_probabilities_become_openai_s() {
    let outgoing = gemini("gemini-2.5-flash").send(hi(json!({"logprobs": true, "top_logprobs": 1}))).unwrap();
    let mut candidate = candidate(&json!([{"text": "é"}]), Some("STOP"));
    candidate["logprobsResult"] = json!({"chosenCandidates": [{"token": "é", "tokenId": 5, "logProbability": -0.5}],
        "topCandidates": [{"candidates": [{"token": "é", "logProbability": -0.5}]}]});
    let logprobs = whole(&outgoing, &answer(&json!([candidate]))).unwrap().to_json()["choices"][0]["logprobs"].clone();
    let entry = json!({"token": "é", "logprob": -0.5, "bytes": [195, 169]});
    let mut first = entry.clone();
    first["top_logprobs"] = json!([entry]);
    assert_eq!(logprobs, json!({"content": [first], "refusal": null}));
}

pub(super) fn recorded() -> Vec<SseEvent> {
    let usage = |count: u64| json!({"promptTokenCount": 10, "candidatesTokenCount": count, "thoughtsTokenCount": 2, "totalTokenCount": 12 + count});
    let chunk = |parts: Value, finish: Option<&str>, count: u64| {
        event(&json!({"candidates": [candidate(&parts, finish)], "responseId": "r1", "usageMetadata": usage(count)}))
    };
    vec![
        chunk(json!([{"text": "hm", "thought": true}]), None, 1),
        chunk(json!([{"text": "it "}]), None, 2),
        chunk(json!([{"text": "rains"}]), None, 3),
        chunk(
            json!([{"functionCall": {"name": "weather", "args": {"city": "Oslo"}}, "thoughtSignature": "c2ln"}]),
            None,
            4,
        ),
        chunk(json!([{"functionCall": {"name": "time", "args": {}}}, {"text": ""}]), Some("STOP"), 5),
    ]
}

#[test]
fn a_stream_gives_what_the_whole_answer_would() {
    let outgoing = gemini("gemini-3.8-flash").send(hi(json!({"stream": true}))).unwrap();
    let streamed = stream(outgoing.reader, &recorded()).unwrap();
    assert_eq!((streamed.usage.prompt, streamed.usage.completion, streamed.usage.reasoning), (10, 7, 2));
    let expected = json!([{"message": {"role": "assistant", "content": "it rains", "reasoning_content": "hm",
        "tool_calls": [
            {"index": 0, "id": "call_r1_0_0", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"Oslo\"}"},
             "extra_content": {"google": {"thought_signature": "c2ln"}}},
            {"index": 1, "id": "call_r1_0_1", "type": "function", "function": {"name": "time", "arguments": "{}"}}]},
        "finish_reason": "tool_calls"}]);
    assert_eq!(gathered(&streamed.chunks), expected);
}

#[test]
fn every_candidate_must_end() {
    let outgoing = gemini("gemini-2.5-flash").send(hi(json!({"stream": true, "n": 2}))).unwrap();
    let of = |index: u64, finish: Option<&str>| {
        let mut candidate = candidate(&json!([{"text": "x"}]), finish);
        candidate["index"] = index.into();
        event(&json!({"candidates": [candidate], "responseId": "r"}))
    };
    let both = [of(0, None), of(1, Some("STOP")), of(0, Some("MAX_TOKENS"))];
    let chunks = stream(outgoing.reader.clone(), &both).unwrap().chunks;
    let gathered = gathered(&chunks);
    assert_eq!((&gathered[0]["finish_reason"], &gathered[1]["finish_reason"]), (&json!("length"), &json!("stop")));
    assert_eq!(stream(outgoing.reader.clone(), &both[..2]).err().unwrap().cause, Cause::Cut);
    assert_eq!(stream(outgoing.reader, &[of(2, Some("STOP"))]).err().unwrap().cause, Cause::Malformed);
}

#[test]
fn errors_are_told_apart_by_status_and_details() {
    let outgoing = gemini("gemini-3.8-flash").send(hi(json!({}))).unwrap();
    let error = |code: u16, status: &str, message: &str, details: Value| {
        failed(
            &outgoing,
            code,
            &json!({"error": {"code": code, "status": status, "message": message, "details": details}}),
        )
    };
    let none = json!([]);
    assert_eq!(error(400, "INVALID_ARGUMENT", "bad", none.clone()).cause, Cause::Invalid);
    let long = "The input token count (9) exceeds the maximum number of tokens allowed (8).";
    assert_eq!(error(400, "INVALID_ARGUMENT", long, none.clone()).cause, Cause::ContextLength);
    let key = json!([{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]);
    assert_eq!(error(400, "INVALID_ARGUMENT", "bad key", key).cause, Cause::Auth);
    assert_eq!(error(403, "PERMISSION_DENIED", "no", none.clone()).cause, Cause::Auth);
    assert_eq!(error(404, "NOT_FOUND", "no model", none.clone()).cause, Cause::ModelUnavailable);
    assert_eq!(error(500, "INTERNAL", "oops", none.clone()).cause, Cause::Failed);
    assert_eq!(error(503, "UNAVAILABLE", "The model is overloaded.", none.clone()).cause, Cause::Overloaded);
    assert_eq!(error(504, "DEADLINE_EXCEEDED", "late", none.clone()).cause, Cause::Timeout);
    let wait = json!([{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "46s"}]);
    let limited = error(429, "RESOURCE_EXHAUSTED", "slow", wait);
    assert_eq!((limited.cause, limited.retry_after), (Cause::RateLimited, Some(std::time::Duration::from_secs(46))));
    let daily = json!([{"violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel"}]}]);
    assert_eq!(error(429, "RESOURCE_EXHAUSTED", "slow", daily).cause, Cause::Quota);
    assert_eq!(error(429, "RESOURCE_EXHAUSTED", "limit: 0", none).cause, Cause::Quota);
    // In a list of one, as streams without events have it.
    let listed = failed(&outgoing, 503, &json!([{"error": {"code": 503, "status": "UNAVAILABLE", "message": "x"}}]));
    assert_eq!((listed.cause, listed.message.as_str()), (Cause::Failed, "x"));
}
