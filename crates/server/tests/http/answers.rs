//! What a good request gets: shapes, indices, counts, and streams that say the same as whole answers.

use std::collections::{BTreeMap, BTreeSet};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{MODEL, Server, Setup, check_error};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

fn conversation() -> Value {
    json!([{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_has_openais_shape() {
    let server = Server::start();
    let answer = server.ok(COMPLETIONS, &json!({"model": MODEL, "prompt": "hello", "max_tokens": 5, "seed": 1})).await;
    assert_eq!(keys(&answer), ["id", "object", "created", "model", "choices", "usage"]);
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(answer["object"], "text_completion");
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(answer["model"], MODEL);
    let choice = &answer["choices"][0];
    assert_eq!(keys(choice), ["index", "text", "logprobs", "finish_reason", "stop_reason"]);
    assert_eq!((&choice["index"], &choice["finish_reason"]), (&json!(0), &json!("length")));
    assert_eq!((&choice["logprobs"], &choice["stop_reason"]), (&Value::Null, &Value::Null));
    assert!(!choice["text"].as_str().unwrap().is_empty());
    let prompt_tokens = server.ok("/tokenize", &json!({"prompt": "hello"})).await["count"].as_u64().unwrap();
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": prompt_tokens, "completion_tokens": 5, "total_tokens": prompt_tokens + 5,
            "prompt_tokens_details": {"cached_tokens": 0}})
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_completion_has_openais_shape() {
    let server = Server::start();
    let body = json!({"model": "org/alias", "messages": conversation(), "max_completion_tokens": 5, "seed": 1});
    let answer = server.ok(CHAT, &body).await;
    assert_eq!(keys(&answer), ["id", "object", "created", "model", "choices", "usage"]);
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!((&answer["object"], &answer["model"]), (&json!("chat.completion"), &json!("org/alias")));
    let choice = &answer["choices"][0];
    assert_eq!(keys(choice), ["index", "message", "logprobs", "finish_reason", "stop_reason"]);
    assert_eq!(keys(&choice["message"]), ["role", "content", "refusal"]);
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(!choice["message"]["content"].as_str().unwrap().is_empty());
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_stream_has_openais_chunks() {
    let server = Server::start();
    let body = json!({"messages": conversation(), "max_tokens": 4, "n": 2, "seed": 1,
        "stream_options": {"include_usage": true}});
    let chunks = server.stream(CHAT, &body).await;
    let id = &chunks[0]["id"];
    for chunk in &chunks {
        assert_eq!(keys(chunk), ["id", "object", "created", "model", "choices", "usage"]);
        assert_eq!((&chunk["id"], &chunk["object"]), (id, &json!("chat.completion.chunk")));
    }
    for index in 0..2 {
        let choice = &chunks[index]["choices"][0];
        assert_eq!(choice["index"], index);
        assert_eq!(choice["delta"], json!({"role": "assistant", "content": ""}));
        assert_eq!(choice["finish_reason"], Value::Null);
    }
    let (last, others) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 8);
    let mut ends = BTreeSet::new();
    for chunk in &others[2..] {
        assert_eq!(chunk["usage"], Value::Null);
        let choice = &chunk["choices"][0];
        let index = choice["index"].as_u64().unwrap();
        assert!(!ends.contains(&index), "choice {index} goes on after its end");
        if choice["finish_reason"] == "length" {
            assert_eq!(choice["delta"], json!({}));
            ends.insert(index);
        } else {
            assert_eq!(keys(&choice["delta"]), ["content"]);
        }
    }
    assert_eq!(ends.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_in_a_stream_comes_as_asked() {
    let server = Server::start();
    let body = |options: Value| json!({"prompt": "hello", "max_tokens": 4, "seed": 1, "stream_options": options});
    for options in [Value::Null, json!({}), json!({"include_usage": false}), json!({"continuous_usage_stats": true})] {
        let chunks = server.stream(COMPLETIONS, &body(options)).await;
        assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none() && chunk["choices"][0]["index"] == 0));
    }
    let chunks = server.stream(COMPLETIONS, &body(json!({"include_usage": true}))).await;
    let (last, others) = chunks.split_last().unwrap();
    assert!(others.iter().all(|chunk| chunk["usage"] == Value::Null));
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(4)));
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let chunks = server.stream(COMPLETIONS, &body(options)).await;
    let counts: Vec<u64> = chunks.iter().map(|c| c["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert!(counts.is_sorted() && counts.last() == Some(&4), "{counts:?}");
}

/// The choices a stream of completions adds up to.
fn joined_completions(chunks: &[Value]) -> BTreeMap<u64, Value> {
    let mut choices: BTreeMap<u64, Value> = BTreeMap::new();
    for choice in chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()) {
        let index = choice["index"].as_u64().unwrap();
        let all = choices.entry(index).or_insert_with(
            || json!({"index": index, "text": "", "logprobs": null, "finish_reason": null, "stop_reason": null}),
        );
        all["text"] = json!(format!("{}{}", all["text"].as_str().unwrap(), choice["text"].as_str().unwrap()));
        if let Value::Object(lists) = &choice["logprobs"] {
            for (name, list) in lists {
                if all["logprobs"].is_null() {
                    all["logprobs"] = json!({});
                }
                let mut joined = all["logprobs"][name].as_array().cloned().unwrap_or_default();
                joined.extend(list.as_array().unwrap().iter().cloned());
                all["logprobs"][name] = json!(joined);
            }
        }
        if !choice["finish_reason"].is_null() {
            all["finish_reason"] = choice["finish_reason"].clone();
            all["stop_reason"] = choice["stop_reason"].clone();
        }
    }
    choices
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_completions_says_what_the_whole_answer_says() {
    let mut setup = Setup::new();
    setup.model.eos_bias = 4.0;
    let server = setup.start();
    for body in [
        json!({"prompt": "a", "temperature": 0}),
        json!({"prompt": ["a", "b", "c"], "n": 3, "seed": 5, "max_tokens": 24}),
        json!({"prompt": [[1, 2, 3], [4]], "n": 2, "seed": 6, "logprobs": 3, "echo": true}),
        json!({"prompt": "hello", "seed": 7, "logprobs": 0, "return_tokens_as_token_ids": true}),
        json!({"prompt": "hello", "seed": 8, "echo": true}),
        json!({"prompt": "hello", "echo": true, "logprobs": 2, "max_tokens": 0}),
        json!({"prompt": "hello", "seed": 9, "max_tokens": 64, "stop": ["a", "e", "1"], "ignore_eos": true}),
        json!({"prompt": "hello", "seed": 9, "max_tokens": 64, "stop": "e", "include_stop_str_in_output": true}),
        json!({"prompt": "hello", "seed": 10, "stop_token_ids": [97, 98, 99, 100, 101, 102, 103], "max_tokens": 90}),
    ] {
        let whole = server.ok(COMPLETIONS, &body).await;
        let mut streamed = body.clone();
        streamed["stream_options"] = json!({"include_usage": true});
        let chunks = server.stream(COMPLETIONS, &streamed).await;
        let joined: Vec<Value> = joined_completions(&chunks).into_values().collect();
        assert_eq!(json!(joined), whole["choices"], "{body}");
        assert_eq!(chunks.last().unwrap()["usage"], whole["usage"], "{body}");
    }
    server.wait_until_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_stream_says_what_the_whole_answer_says() {
    let mut setup = Setup::new();
    setup.model.eos_bias = 4.0;
    let server = setup.start();
    for body in [
        json!({"messages": conversation(), "temperature": 0, "max_tokens": 32}),
        json!({"messages": conversation(), "seed": 3, "n": 4, "max_tokens": 32}),
        json!({"messages": conversation(), "seed": 4, "logprobs": true, "top_logprobs": 2, "max_tokens": 16}),
        json!({"messages": conversation(), "seed": 5, "stop": ["a", "e"], "max_tokens": 64}),
    ] {
        let whole = server.ok(CHAT, &body).await;
        let chunks = server.stream(CHAT, &body).await;
        for choice in whole["choices"].as_array().unwrap() {
            let pieces = || {
                chunks.iter().flat_map(|c| c["choices"].as_array().unwrap()).filter(|c| c["index"] == choice["index"])
            };
            let text: String = pieces().filter_map(|piece| piece["delta"]["content"].as_str()).collect();
            assert_eq!(json!(text), choice["message"]["content"], "{body}");
            let end = pieces().next_back().unwrap();
            assert_eq!(end["finish_reason"], choice["finish_reason"], "{body}");
            assert_eq!(end.get("stop_reason").unwrap_or(&Value::Null), &choice["stop_reason"], "{body}");
            let tokens: Vec<&Value> =
                pieces().filter_map(|piece| piece["logprobs"]["content"].as_array()).flatten().collect();
            match &choice["logprobs"]["content"] {
                Value::Null => assert!(tokens.is_empty(), "{body}"),
                all => assert_eq!(&json!(tokens), all, "{body}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_prompts_are_indexed_by_prompt_then_sample() {
    let server = Server::start();
    let one = |prompt: Value, n: u64| json!({"prompt": prompt, "n": n, "seed": 11, "max_tokens": 8});
    let all = server.ok(COMPLETIONS, &one(json!(["x", "yy"]), 2)).await;
    let mut separate = Vec::new();
    for prompt in ["x", "yy"] {
        let answer = server.ok(COMPLETIONS, &one(json!(prompt), 2)).await;
        separate.extend(answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].clone()));
    }
    let choices = all["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|choice| &choice["index"]).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!(choices.iter().map(|choice| choice["text"].clone()).collect::<Vec<_>>(), separate);
    assert_ne!(separate[0], separate[1], "two samples of one prompt are different draws");
    let tokens = server.ok(COMPLETIONS, &one(json!([[1, 2], [3]]), 1)).await;
    assert_eq!((&tokens["usage"]["prompt_tokens"], &tokens["usage"]["completion_tokens"]), (&json!(3), &json!(16)));
}

#[tokio::test(flavor = "multi_thread")]
async fn echo_with_logprobs_scores_the_prompt() {
    let server = Server::start();
    let body = json!({"prompt": [104, 105, 106], "echo": true, "logprobs": 2, "max_tokens": 2, "temperature": 0});
    let answer = server.ok(COMPLETIONS, &body).await;
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(keys(logprobs), ["text_offset", "token_logprobs", "tokens", "top_logprobs"]);
    assert!(logprobs.as_object().unwrap().values().all(|list| list.as_array().unwrap().len() == 5), "{logprobs}");
    assert_eq!((&logprobs["token_logprobs"][0], &logprobs["top_logprobs"][0]), (&Value::Null, &Value::Null));
    assert!(logprobs["token_logprobs"].as_array().unwrap()[1..].iter().all(|value| value.as_f64().unwrap() <= 0.0));
    assert!(logprobs["top_logprobs"].as_array().unwrap()[1..].iter().all(|top| top.as_object().unwrap().len() >= 2));
    assert!(answer["choices"][0]["text"].as_str().unwrap().starts_with("hij"));
    assert_eq!(logprobs["text_offset"].as_array().unwrap()[..3], [json!(0), json!(1), json!(2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn prompt_logprobs_have_vllms_shape() {
    let server = Server::start();
    let body = json!({"prompt": [104, 105, 106], "prompt_logprobs": 1, "max_tokens": 1});
    let choice = server.ok(COMPLETIONS, &body).await["choices"][0].clone();
    let lists = choice["prompt_logprobs"].as_array().unwrap();
    assert_eq!((lists.len(), &lists[0]), (3, &Value::Null));
    let token = &lists[1]["105"];
    assert_eq!(keys(token), ["logprob", "rank", "decoded_token"]);
    assert_eq!(token["decoded_token"], "i");
    assert!(token["rank"].as_u64().unwrap() >= 1);
    let body = json!({"messages": conversation(), "prompt_logprobs": 0, "max_tokens": 1});
    let answer = server.ok(CHAT, &body).await;
    assert_eq!(answer["prompt_logprobs"].as_array().unwrap().len(), answer["usage"]["prompt_tokens"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn chat_logprobs_carry_bytes_and_alternatives() {
    let server = Server::start();
    let body = json!({"messages": conversation(), "logprobs": true, "top_logprobs": 3, "max_tokens": 4, "seed": 2});
    let answer = server.ok(CHAT, &body).await;
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), 4);
    for token in tokens {
        assert_eq!(keys(token), ["token", "logprob", "bytes", "top_logprobs"]);
        let tops = token["top_logprobs"].as_array().unwrap();
        assert_eq!(tops.len(), 3);
        assert!(tops.iter().map(|top| top["logprob"].as_f64().unwrap()).is_sorted_by(|a, b| a >= b));
        assert!(token["bytes"].is_array());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn best_of_returns_the_best_and_counts_all() {
    let server = Server::start();
    let body = json!({"prompt": "hello", "best_of": 4, "n": 2, "max_tokens": 6, "seed": 1});
    let answer = server.ok(COMPLETIONS, &body).await;
    assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
    assert_eq!(answer["usage"]["completion_tokens"], 24);
    assert_eq!(answer["choices"][0]["logprobs"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_template_gets_what_it_may() {
    let server = Server::start();
    assert_eq!(
        prompt_of(&server, json!({"messages": conversation()})).await,
        "<system>be brief\n<user>hello\n<assistant>"
    );
    let body = json!({"messages": conversation(), "add_generation_prompt": false,
        "chat_template_kwargs": {"reasoning_effort": "low"}});
    assert_eq!(prompt_of(&server, body).await, "<system>be brief\n<user>hello\n<effort low>");
    let mut body = json!({"messages": conversation(), "max_tokens": 1});
    let plain = server.ok(CHAT, &body).await["usage"]["prompt_tokens"].as_u64().unwrap();
    body["reasoning_effort"] = json!("high");
    let effort = server.ok(CHAT, &body).await["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(effort, plain + "<effort high>".len() as u64);
}

/// What the template makes of a conversation.
async fn prompt_of(server: &Server, body: Value) -> String {
    let tokens = server.ok("/tokenize", &body).await["tokens"].clone();
    server.ok("/detokenize", &json!({"tokens": tokens})).await["prompt"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_template_refuses_is_the_callers_mistake() {
    let server = Server::start();
    let response = server.post(CHAT, &json!({"messages": [{"role": "user", "content": "RAISE"}]})).await;
    let status = response.status();
    let body: Value = response.json().await.unwrap();
    assert_eq!((status, &body["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("messages")));
    assert!(body["error"]["message"].as_str().unwrap().contains("this conversation is refused"), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_template_there_is_no_chat() {
    let mut setup = Setup::new();
    setup.has_template = false;
    let server = setup.start();
    let body = json!({"messages": conversation()});
    check_error(server.post(CHAT, &body).await, 400, Some("messages"), "chat").await;
    check_error(server.post("/tokenize", &body).await, 400, Some("messages"), "tokenize").await;
    server.ok(COMPLETIONS, &json!({"prompt": "hello"})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_texts_turn_into_each_other() {
    let server = Server::start();
    let text = "grüße, 世界";
    let body = json!({"model": MODEL, "prompt": text, "add_special_tokens": false, "return_token_strs": true});
    let answer = server.ok("/tokenize", &body).await;
    assert_eq!(keys(&answer), ["count", "max_model_len", "tokens", "token_strs"]);
    assert_eq!((&answer["count"], &answer["max_model_len"]), (&json!(text.len()), &json!(512)));
    assert_eq!(answer["token_strs"].as_array().unwrap().len(), text.len());
    let back = server.ok("/detokenize", &json!({"tokens": answer["tokens"]})).await;
    assert_eq!(back, json!({"prompt": text}));
    assert_eq!(server.ok("/tokenize", &json!({"prompt": ""})).await["token_strs"], Value::Null);
    assert_eq!(server.ok("/detokenize", &json!({"tokens": []})).await, json!({"prompt": ""}));
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_say_what_happened() {
    let server = Server::start();
    let body = json!({"prompt": "hello", "user": "ann", "cache_salt": "x", "stream_options": null});
    let response = server.request(Method::POST, COMPLETIONS).header("x-request-id", "my-id.1").json(&body).send();
    let response = response.await.unwrap();
    let headers = response.headers();
    assert_eq!(headers["x-request-id"], "my-id.1");
    assert_eq!(headers["x-bindery-route"], "local");
    assert_eq!(headers["x-bindery-warning"], "cache_salt has no effect yet; ignored unknown fields: user");
    let timing = headers["server-timing"].to_str().unwrap();
    let names: Vec<&str> = timing.split(", ").map(|part| part.split_once(";dur=").unwrap().0).collect();
    assert_eq!(names, ["queue", "prefill", "decode"]);
    let streamed = server.post(COMPLETIONS, &json!({"prompt": "hello", "stream": true, "mood": 1})).await;
    assert_eq!(streamed.headers()["x-bindery-warning"], "ignored unknown fields: mood");
    assert_eq!(streamed.headers()["cache-control"], "no-cache");
    let plain = server.post(COMPLETIONS, &json!({"prompt": "hello"})).await;
    assert!(plain.headers().get("x-bindery-warning").is_none());
    assert_eq!(plain.headers()["x-request-id"].len(), 32);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_a_request() {
    let (gate, keeper) = bindery_engine::testing::gate();
    let mut setup = Setup::new();
    setup.model.gate = Some(gate);
    let server = setup.start();
    let body = json!({"prompt": "hello", "max_tokens": 100});
    let send = |body: &Value, timeout: &str| {
        server.request(Method::POST, COMPLETIONS).header("x-request-timeout", timeout).json(body).send()
    };
    let code = check_error(send(&body, "50ms").await.unwrap(), 408, None, "whole").await;
    assert_eq!(code.as_deref(), Some("request_timeout"));
    // Long enough for the stream to begin before, on any machine: else it would be a 408 as well.
    let streamed = send(&json!({"prompt": "hello", "max_tokens": 100, "stream": true}), "2s").await.unwrap();
    assert_eq!(streamed.status(), StatusCode::OK);
    let (events, done) = crate::support::events(&streamed.text().await.unwrap());
    assert!(!done);
    assert_eq!(events.last().unwrap()["error"]["code"], "request_timeout");
    drop(keeper);
    server.wait_until_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_step_is_a_500_with_the_request_id_and_others_go_on() {
    let mut setup = Setup::new();
    setup.model.fail_on = Some(bindery_scheduler::TokenId(200));
    setup.model.panic_on = Some(bindery_scheduler::TokenId(201));
    let server = setup.start();
    for token in [200, 201] {
        let body = json!({"prompt": [token], "max_tokens": 2});
        let response = server
            .request(Method::POST, COMPLETIONS)
            .header("x-request-id", "find-me")
            .json(&body)
            .send()
            .await
            .unwrap();
        let status = response.status();
        let error: Value = response.json().await.unwrap();
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
        assert!(error["error"]["message"].as_str().unwrap().contains("find-me"), "{error}");
        let (events, done) = server.stream_to_end(COMPLETIONS, &body).await;
        assert!(!done);
        assert_eq!(events.last().unwrap()["error"]["code"], "internal_error");
    }
    server.wait_until_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed_base_first() {
    let server = Server::start();
    let list: Value = server.get("/v1/models").await.json().await.unwrap();
    assert_eq!(list["object"], "list");
    let card = |id: &str| {
        json!({"id": id, "object": "model", "created": list["data"][0]["created"], "owned_by": "bindery", "root": MODEL,
            "parent": null, "max_model_len": 512, "digest": "abc", "license": "Apache-2.0"})
    };
    assert_eq!(list["data"], json!([card(MODEL), card("org/alias")]));
    let one: Value = server.get("/v1/models/org/alias").await.json().await.unwrap();
    assert_eq!(one, card("org/alias"));
    let code = check_error(server.get("/v1/models/nope").await, 404, Some("model"), "nope").await;
    assert_eq!(code.as_deref(), Some("model_not_found"));
}
