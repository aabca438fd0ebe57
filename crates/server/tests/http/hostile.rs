//! Bad input to every route: always a 4xx in OpenAI's shape that names the field, never a 5xx, a panic or a hang, and
//! afterwards nothing is left.

use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{MODEL, PATIENCE, Server, Setup, check_error};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
const JSON_ROUTES: [&str; 4] = [COMPLETIONS, CHAT, "/tokenize", "/detokenize"];

/// Checks that a server under attack is as it was.
async fn check_unharmed(server: &Server) {
    server.wait_until_empty().await;
    assert_eq!(server.get("/health").await.status(), 200);
    server.ok(COMPLETIONS, &json!({"prompt": "still there?", "max_tokens": 2})).await;
    let metrics = server.get("/metrics").await.text().await.unwrap();
    let failed: Vec<&str> = metrics
        .lines()
        .filter(|line| line.starts_with("bindery_http_requests_total") && line.contains("status=\"5"))
        .collect();
    assert!(failed.is_empty(), "{failed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_json_object_is_refused_on_every_route() {
    let server = Server::start();
    let deep_array = format!("{}{}", "[".repeat(200_000), "]".repeat(200_000));
    let deep_object = format!("{}1{}", "{\"a\":".repeat(200_000), "}".repeat(200_000));
    let bodies: [&[u8]; 17] = [
        b"",
        b"   ",
        b"{",
        b"}",
        b"null",
        b"true",
        b"7",
        b"\"text\"",
        b"[]",
        b"[\"model\", \"prompt\"]",
        b"{\"prompt\": NaN}",
        b"{\"temperature\": 1e400}",
        b"{\"prompt\": \"\xff\xfe\"}",
        b"{\"prompt\": \"\\ud800\"}",
        b"{\"prompt\": \"a\"} trailing",
        deep_array.as_bytes(),
        deep_object.as_bytes(),
    ];
    for route in JSON_ROUTES {
        for body in bodies {
            let shown = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
            let response = server.post_bytes(route, body.to_vec()).await;
            assert_eq!(response.status(), 400, "{route} {shown}");
            let error: Value = response.json().await.unwrap();
            assert_eq!(error["error"]["type"], "invalid_request_error", "{route} {shown}");
        }
        // Depth in a field that nobody reads costs nothing; in one that is kept it is refused.
        for field in ["surprise", "chat_template_kwargs", "tools", "structured_outputs", "prompt", "messages", "tokens"]
        {
            let deep = format!("{{\"{field}\": {deep_array}}}");
            assert_eq!(server.post_bytes(route, deep).await.status(), 400, "{route} {field}");
        }
        check_error(server.post_bytes(route, "{\"model\": \"a\", \"model\": \"b\"}").await, 400, Some("model"), route)
            .await;
        check_error(server.post(route, &json!({"model": 7})).await, 400, Some("model"), route).await;
        for content_type in ["text/plain", "application/x-www-form-urlencoded", "\u{ff}"] {
            let request =
                server.request(Method::POST, route).header("content-type", content_type.as_bytes()).body("{}");
            check_error(request.send().await.unwrap(), 400, Some("content-type"), route).await;
        }
        for method in [Method::GET, Method::PUT, Method::DELETE, Method::PATCH, Method::OPTIONS] {
            let response = server.request(method.clone(), route).send().await.unwrap();
            assert_eq!(response.headers()["allow"], "POST", "{method} {route}");
            check_error(response, 405, None, route).await;
        }
    }
    check_unharmed(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_models_are_a_404_that_lists_the_known_ones() {
    let server = Server::start();
    for (route, rest) in [
        (COMPLETIONS, json!({"prompt": "a"})),
        (CHAT, json!({"messages": [{"role": "user", "content": "a"}]})),
        ("/tokenize", json!({"prompt": "a"})),
        ("/detokenize", json!({"tokens": []})),
    ] {
        for name in ["gpt-4", "", "Fake-Model", &"x".repeat(100_000)] {
            let mut body = rest.clone();
            body["model"] = json!(name);
            let response = server.post(route, &body).await;
            assert_eq!(response.status(), 404, "{route}");
            let error = response.json::<Value>().await.unwrap()["error"].clone();
            assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
            let message = error["message"].as_str().unwrap();
            assert!(message.contains(MODEL) && message.contains("org/alias") && message.len() < 500, "{message}");
        }
    }
}

/// Fields that both generating routes know, wrong; with the param of the error.
fn wrong_fields() -> Vec<(Value, &'static str)> {
    vec![
        (json!({"n": 0}), "n"),
        (json!({"n": -3}), "n"),
        (json!({"n": 129}), "n"),
        (json!({"n": 1.0}), "n"),
        (json!({"n": 9223372036854775807i64}), "n"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_tokens": 64.5}), "max_tokens"),
        (json!({"max_tokens": "many"}), "max_tokens"),
        (json!({"max_tokens": 9223372036854775807i64}), "max_tokens"),
        (json!({"temperature": -0.1}), "temperature"),
        (json!({"temperature": 2.1}), "temperature"),
        (json!({"temperature": 1e300}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": 1.1}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"top_k": 1e3}), "top_k"),
        (json!({"min_p": -0.1}), "min_p"),
        (json!({"min_p": 2}), "min_p"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"repetition_penalty": 1e300}), "repetition_penalty"),
        (json!({"presence_penalty": 2.5}), "presence_penalty"),
        (json!({"frequency_penalty": -2.5}), "frequency_penalty"),
        (json!({"logit_bias": {"hello": 1}}), "logit_bias.hello"),
        (json!({"logit_bias": {"-1": 1}}), "logit_bias.-1"),
        (json!({"logit_bias": {"99999": 1}}), "logit_bias"),
        (json!({"logit_bias": {"5": 101}}), "logit_bias"),
        (json!({"logit_bias": {"5": -1e300}}), "logit_bias"),
        (json!({"logit_bias": [1, 2]}), "logit_bias"),
        (json!({"seed": 1.5}), "seed"),
        (json!({"seed": 1e30}), "seed"),
        (json!({"stop": 7}), "stop"),
        (json!({"stop": {"a": 1}}), "stop"),
        (json!({"stop": [""]}), "stop"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": vec!["x"; 65]}), "stop"),
        (json!({"stop": "x".repeat(1025)}), "stop"),
        (json!({"stop_token_ids": [264]}), "stop_token_ids"),
        (json!({"min_tokens": -1}), "min_tokens"),
        (json!({"min_tokens": 20, "max_tokens": 10}), "min_tokens"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"stream_options": true}), "stream_options"),
        (json!({"truncate_prompt_tokens": 0}), "truncate_prompt_tokens"),
        (json!({"truncate_prompt_tokens": -2}), "truncate_prompt_tokens"),
        (json!({"prompt_logprobs": 21}), "prompt_logprobs"),
        (json!({"prompt_logprobs": 1, "stream": true}), "prompt_logprobs"),
        (json!({"priority": 3000000000i64}), "priority"),
        (json!({"response_format": {"type": "structural_tag"}}), "response_format"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
        (json!({"response_format": {"type": "json_schema", "json_schema": {}}}), "response_format.json_schema.schema"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": "{"}}}),
            "response_format.json_schema.schema",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "poem"}}}}),
            "response_format",
        ),
        (json!({"response_format": {"type": "poem"}}), "response_format.type"),
        (json!({"response_format": "text"}), "response_format"),
        (json!({"structured_outputs": {}}), "structured_outputs"),
        (json!({"structured_outputs": {"choice": []}}), "structured_outputs"),
        (json!({"structured_outputs": {"choice": ["a", ""]}}), "structured_outputs"),
        (json!({"structured_outputs": {"choice": ["a"], "regex": "a"}}), "structured_outputs"),
        (json!({"structured_outputs": {"choice": [1]}}), "structured_outputs.choice[0]"),
        (json!({"structured_outputs": {"structural_tag": {}}}), "structured_outputs.structural_tag"),
        (json!({"structured_outputs": {"regex": "(a"}}), "structured_outputs"),
        (json!({"structured_outputs": {"grammar": "root ::= \"a\""}}), "structured_outputs"),
        (json!({"structured_outputs": {"json": {"$ref": "http://127.0.0.1/x"}}}), "structured_outputs"),
        (json!({"structured_outputs": {"json": 7}}), "structured_outputs"),
        (json!({"guided_json": [1]}), "guided_json"),
        (json!({"guided_regex": "a*", "guided_choice": ["a"]}), "guided_choice"),
        (json!({"use_beam_search": true}), "use_beam_search"),
    ]
}

fn with(base: &Value, fields: &Value) -> Value {
    let mut body = base.clone();
    for (name, value) in fields.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_fields_of_completions_are_named() {
    let server = Server::start();
    let base = json!({"prompt": "hello", "model": MODEL});
    let own = vec![
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": 7}), "prompt"),
        (json!({"prompt": true}), "prompt"),
        (json!({"prompt": {}}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": ["a", []]}), "prompt"),
        (json!({"prompt": ["a", 1]}), "prompt"),
        (json!({"prompt": [264]}), "prompt"),
        (json!({"prompt": [1, 4294967295u32]}), "prompt"),
        (json!({"prompt": vec!["a"; 1025]}), "prompt"),
        (json!({"prompt": vec!["a"; 20], "n": 128}), "n"),
        (json!({"logprobs": -1}), "logprobs"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"best_of": 0}), "best_of"),
        (json!({"best_of": 2, "n": 3}), "best_of"),
        (json!({"best_of": 129}), "best_of"),
        (json!({"best_of": 2, "stream": true}), "best_of"),
        (json!({"suffix": "the end"}), "suffix"),
        (json!({"echo": "yes"}), "echo"),
    ];
    for (fields, param) in own.into_iter().chain(wrong_fields()) {
        let body = with(&base, &fields);
        check_error(server.post(COMPLETIONS, &body).await, 400, Some(param), &fields.to_string()).await;
    }
    for inside in
        [json!({"prompt": [-1]}), json!({"prompt": [1.5]}), json!({"stop": [1]}), json!({"stop_token_ids": ["a"]})]
    {
        let response = server.post(COMPLETIONS, &with(&base, &inside)).await;
        assert_eq!(response.status(), 400, "{inside}");
        let error: Value = response.json().await.unwrap();
        assert!(error["error"]["param"].as_str().unwrap().ends_with(']'), "{error}");
    }
    check_unharmed(&server).await;
}

/// What every prompt of a request gets a copy of has to be bounded before the copies are made: the engine's own check
/// comes after. That the prompts are wrong as well shows which check was first.
#[tokio::test(flavor = "multi_thread")]
async fn lists_are_bounded_before_they_are_copied_for_every_prompt() {
    let server = Server::start();
    let biases: serde_json::Map<String, Value> = (0..1025).map(|token| (token.to_string(), json!(1))).collect();
    for (fields, param) in [
        (json!({"stop": vec!["x"; 65]}), "stop"),
        (json!({"stop": ["x".repeat(1025)]}), "stop"),
        (json!({"stop": vec!["x".repeat(1000); 9]}), "stop"),
        (json!({"stop": ["a", ""]}), "stop"),
        (json!({"stop_token_ids": vec![1; 257]}), "stop_token_ids"),
        (json!({"logit_bias": biases}), "logit_bias"),
    ] {
        let body = with(&json!({"prompt": []}), &fields);
        let about = format!("{param}: {}", body.to_string().chars().take(60).collect::<String>());
        check_error(server.post(COMPLETIONS, &body).await, 400, Some(param), &about).await;
    }
    check_unharmed(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_fields_of_chats_are_named() {
    let server = Server::start();
    let base = json!({"messages": [{"role": "user", "content": "hello"}], "model": MODEL});
    let message = |message: Value| json!({"messages": [message]});
    let own = vec![
        (json!({"messages": null}), "messages"),
        (json!({"messages": "hello"}), "messages"),
        (json!({"messages": {}}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [7]}), "messages[0]"),
        (json!({"messages": [["user", "hello"]]}), "messages[0]"),
        (message(json!({"role": "robot", "content": "a"})), "messages[0].role"),
        (message(json!({"content": "a"})), "messages[0].role"),
        (message(json!({"role": null, "content": "a"})), "messages[0].role"),
        (message(json!({"role": "user"})), "messages[0].content"),
        (message(json!({"role": "user", "content": 7})), "messages[0].content"),
        (message(json!({"role": "user", "content": {}})), "messages[0].content"),
        (message(json!({"role": "user", "content": ["a"]})), "messages[0].content[0]"),
        (message(json!({"role": "user", "content": [{"text": "a"}]})), "messages[0].content[0].type"),
        (message(json!({"role": "user", "content": [{"type": "image_url"}]})), "messages[0].content[0]"),
        (message(json!({"role": "user", "content": [{"type": "input_audio"}]})), "messages[0].content[0]"),
        (message(json!({"role": "assistant", "tool_calls": 7})), "messages[0].tool_calls"),
        (json!({"tools": [{"type": "function", "function": {"name": "f"}}]}), "tools"),
        (json!({"tools": 7}), "tools"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": {"type": "function", "function": {"name": "f"}}}), "tool_choice"),
        (json!({"functions": []}), "functions"),
        (json!({"function_call": {"name": "f"}}), "function_call"),
        (json!({"logprobs": 3}), "logprobs"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": -1}), "top_logprobs"),
        (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
        (json!({"max_completion_tokens": 1.5}), "max_completion_tokens"),
        (json!({"chat_template_kwargs": 7}), "chat_template_kwargs"),
        (json!({"chat_template": "{{ 1 }}"}), "chat_template"),
        (json!({"documents": []}), "documents"),
        (json!({"continue_final_message": true}), "continue_final_message"),
        (json!({"echo": true}), "echo"),
        (json!({"modalities": ["text", "audio"]}), "modalities"),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"reasoning_effort": 7}), "reasoning_effort"),
    ];
    for (fields, param) in own.into_iter().chain(wrong_fields()) {
        let body = with(&base, &fields);
        check_error(server.post(CHAT, &body).await, 400, Some(param), &fields.to_string()).await;
    }
    for fine in [
        json!({"tool_choice": "none"}),
        json!({"tools": [], "tool_choice": "auto"}),
        json!({"response_format": {"type": "text"}, "modalities": ["text"], "temperature": null, "tools": null}),
        json!({"stop": null, "user": "ann", "store": false, "metadata": {"a": "b"}, "parallel_tool_calls": true}),
    ] {
        server.ok(CHAT, &with(&with(&base, &json!({"max_tokens": 2})), &fine)).await;
    }
    check_unharmed(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_fields_of_tokenize_and_detokenize_are_named() {
    let server = Server::start();
    let chat = json!([{"role": "user", "content": "a"}]);
    for (route, body, param) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": 7}), "prompt"),
        ("/tokenize", json!({"prompt": ["a"]}), "prompt"),
        ("/tokenize", json!({"prompt": "a", "messages": chat}), "prompt"),
        ("/tokenize", json!({"prompt": "x".repeat(5 << 20)}), "prompt"),
        ("/tokenize", json!({"prompt": "a", "add_special_tokens": 1}), "add_special_tokens"),
        ("/tokenize", json!({"messages": []}), "messages"),
        ("/tokenize", json!({"messages": chat, "tools": []}), "tools"),
        ("/tokenize", json!({"messages": chat, "continue_final_message": true}), "continue_final_message"),
        ("/detokenize", json!({}), "tokens"),
        ("/detokenize", json!({"tokens": "a"}), "tokens"),
        ("/detokenize", json!({"tokens": null}), "tokens"),
        ("/detokenize", json!({"tokens": [1, 264]}), "tokens[1]"),
        ("/detokenize", json!({"tokens": [1, -1]}), "tokens[1]"),
        ("/detokenize", json!({"tokens": [1.5]}), "tokens[0]"),
        ("/detokenize", json!({"tokens": vec![1; 2_000_000]}), "tokens"),
    ] {
        let about = format!("{route} {}", body.to_string().chars().take(60).collect::<String>());
        check_error(server.post(route, &body).await, 400, Some(param), &about).await;
    }
    check_unharmed(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_beyond_the_context_are_context_length_exceeded() {
    let server = Server::start();
    let long = "x".repeat(10 << 20);
    let chat = |text: &str| json!({"messages": [{"role": "user", "content": text}]});
    for (route, body, param) in [
        (COMPLETIONS, json!({"prompt": long, "max_tokens": 1}), "prompt"),
        (COMPLETIONS, json!({"prompt": "x".repeat(513), "max_tokens": 1}), "prompt"),
        (COMPLETIONS, json!({"prompt": vec![5; 513], "max_tokens": 1}), "prompt"),
        (COMPLETIONS, json!({"prompt": vec![5; 1_000_000], "max_tokens": 1}), "prompt"),
        (COMPLETIONS, json!({"prompt": "x".repeat(400), "max_tokens": 200}), "prompt"),
        (COMPLETIONS, json!({"prompt": ["a", "x".repeat(600)]}), "prompt"),
        (CHAT, chat(&long), "messages"),
        (CHAT, chat(&"x".repeat(600)), "messages"),
    ] {
        let about = format!("{route} {}", body.to_string().chars().take(60).collect::<String>());
        let response = server.post(route, &body).await;
        assert_eq!(response.status(), 400, "{about}");
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["code"], "context_length_exceeded", "{about}: {error}");
        assert!(error["error"]["param"].as_str().is_some_and(|got| got == param || got == "max_tokens"), "{error}");
    }
    // The byte tokenizer has no begin token that an empty prompt would begin with.
    check_error(server.post(COMPLETIONS, &json!({"prompt": ""})).await, 400, Some("prompt"), "an empty prompt").await;
    check_unharmed(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_over_the_limit_are_413_however_they_come() {
    let mut setup = Setup::new();
    setup.limits.max_body_bytes = 1 << 20;
    setup.limits.max_discarded_bytes = 8 << 20;
    let server = setup.start();
    for route in JSON_ROUTES {
        let body = format!("{{\"prompt\": \"{}\"}}", "x".repeat(2 << 20));
        let code = check_error(server.post_bytes(route, body.clone()).await, 413, None, route).await;
        assert_eq!(code.as_deref(), Some("request_too_large"));
        let told = server.post_bytes(route, body.clone()).await.text().await.unwrap();
        assert!(told.contains("larger than 1048576 bytes") && told.contains("--max-body-size"), "{told}");
        // Without a length: the limit holds while reading.
        let pieces: Vec<Result<Vec<u8>, std::io::Error>> =
            body.as_bytes().chunks(10_000).map(|c| Ok(c.to_vec())).collect();
        let chunked = reqwest::Body::wrap_stream(futures::stream::iter(pieces));
        check_error(server.post_bytes(route, chunked).await, 413, None, route).await;
        // Exactly at the limit is a matter of the JSON.
        let padded = format!("{}{{}}", " ".repeat((1 << 20) - 2));
        assert_ne!(server.post_bytes(route, padded).await.status(), 413, "{route}");
    }
    check_unharmed(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_body_is_refused_by_the_name_of_its_coding() {
    let server = Server::start();
    let post = |route: &str, codings: &[&str]| {
        let request = server.request(Method::POST, route).header("content-type", "application/json");
        let request = codings.iter().fold(request, |request, coding| request.header("content-encoding", *coding));
        request.body(json!({"prompt": "hello", "max_tokens": 1}).to_string()).send()
    };
    for route in JSON_ROUTES {
        for codings in [&["gzip"][..], &["br"], &["deflate"], &["zstd"], &["identity, GZIP"], &["identity", "x-own"]] {
            let response = post(route, codings).await.unwrap();
            assert_eq!(response.headers()["accept-encoding"], "identity", "{route} {codings:?}");
            let code = check_error(response, 415, Some("content-encoding"), &format!("{route} {codings:?}")).await;
            assert_eq!(code.as_deref(), Some("unsupported_content_encoding"));
        }
    }
    let message: Value = post(COMPLETIONS, &["gzip"]).await.unwrap().json().await.unwrap();
    let message = message["error"]["message"].as_str().unwrap();
    assert!(message.contains("'gzip'") && message.contains("send plain JSON"), "{message}");
    for codings in [&["identity"][..], &["Identity", "identity"], &[""]] {
        assert_eq!(post(COMPLETIONS, codings).await.unwrap().status(), 200, "{codings:?}");
    }
    check_unharmed(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_never_comes_is_given_up() {
    let mut setup = Setup::new();
    setup.limits.body_read_timeout = std::time::Duration::from_millis(50);
    let server = setup.start();
    let mut socket = tokio::net::TcpStream::connect(server.address).await.unwrap();
    socket.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"a\"").await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(PATIENCE, socket.read_to_end(&mut answer)).await.unwrap().unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("request_timeout"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_http_close_the_connection() {
    let mut setup = Setup::new();
    setup.limits.header_read_timeout = std::time::Duration::from_millis(200);
    let server = setup.start();
    let huge_head = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(1 << 20));
    let many_headers = format!("GET /health HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(10_000));
    for bytes in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01"[..],
        b"\0\0\0\0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: nine\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        huge_head.as_bytes(),
        many_headers.as_bytes(),
        // A head that never ends.
        b"GET /health HTTP/1.1\r\nhost",
        b"",
    ] {
        let mut socket = tokio::net::TcpStream::connect(server.address).await.unwrap();
        // The server may close before all is written.
        let _ = socket.write_all(bytes).await;
        let mut answer = Vec::new();
        let closed = tokio::time::timeout(PATIENCE, socket.read_to_end(&mut answer)).await;
        assert!(closed.is_ok(), "still open after {:?}", &bytes[..bytes.len().min(20)]);
        assert!(!answer.starts_with(b"HTTP/1.1 5"), "{}", String::from_utf8_lossy(&answer));
    }
    check_unharmed(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_routes_and_methods_are_json_too() {
    let server = Server::start();
    for path in
        ["/", "/v1", "/v1/", "/v1/completion", "/v1/models/", "/v1/completions/", "/%ff", "/v1/embeddings", "/a?b=c"]
    {
        check_error(server.get(path).await, 404, None, path).await;
        check_error(server.post(path, &json!({})).await, 404, None, path).await;
    }
    for path in ["/health", "/ready", "/metrics", "/version", "/openapi.json", "/v1/models", "/v1/models/x"] {
        check_error(server.post(path, &json!({})).await, 405, None, path).await;
    }
    check_error(server.get("/v1/models/%ff%fe").await, 400, Some("id"), "invalid UTF-8 in the path").await;
    for value in ["0", "-5", "soon", "1e300", "99999999999999999999h"] {
        let request = server.request(Method::POST, COMPLETIONS).header("x-request-timeout", value);
        let response = request.json(&json!({"prompt": "a"})).send().await.unwrap();
        check_error(response, 400, Some("x-request-timeout"), value).await;
    }
}

/// Names that mean something to one of the routes, and some that do not.
const FIELDS: [&str; 53] = [
    "model",
    "prompt",
    "messages",
    "tokens",
    "role",
    "content",
    "type",
    "text",
    "n",
    "best_of",
    "echo",
    "logprobs",
    "top_logprobs",
    "stop",
    "seed",
    "logit_bias",
    "stream",
    "stream_options",
    "include_usage",
    "suffix",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "priority",
    "cache_salt",
    "response_format",
    "json_schema",
    "schema",
    "structured_outputs",
    "regex",
    "choice",
    "tools",
    "tool_choice",
    "tool_calls",
    "function",
    "arguments",
    "chat_template_kwargs",
    "reasoning_effort",
    "add_generation_prompt",
    "5",
    "surprise",
];

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3i64..200).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-2.0..3.0).prop_map(Value::from),
        Just(json!(MODEL)),
        prop_oneof![Just("user"), Just("assistant"), Just("tool"), Just("text"), Just("none")].prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 48, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((prop::sample::select(FIELDS.to_vec()), inner), 0..8)
                .prop_map(|fields| fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()),
        ]
    })
}

/// Mostly right, with some fields replaced by anything.
fn any_body() -> impl Strategy<Value = Value> {
    let base = prop_oneof![
        Just(json!({})),
        Just(json!({"prompt": "hello", "max_tokens": 3})),
        Just(json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3})),
        Just(json!({"tokens": [1, 2, 3]})),
    ];
    let changes = prop::collection::vec((prop::sample::select(FIELDS.to_vec()), any_json()), 0..5);
    (base, changes).prop_map(|(mut body, changes)| {
        for (name, value) in changes {
            body[name] = value;
        }
        body
    })
}

/// Ten times as many under `cargo xtask test --full`.
fn num_cases(usual: u32) -> u32 {
    if std::env::var_os("BINDERY_TEST_FULL").is_some() { 10 * usual } else { usual }
}

#[test]
fn arbitrary_json_never_fails_the_server() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let server = runtime.block_on(async { Server::start() });
    let mut runner = TestRunner::new(Config { cases: num_cases(400), failure_persistence: None, ..Config::default() });
    let route = prop::sample::select(JSON_ROUTES.to_vec());
    let checked = runner.run(&(route, any_body()), |(route, body)| {
        let (status, text) = runtime.block_on(async {
            let response = server.post(route, &body).await;
            (response.status().as_u16(), response.text().await.unwrap())
        });
        prop_assert!(status == 200 || status == 400 || status == 404, "{route} {body}: {status} {text}");
        prop_assert!(!text.contains("internal_error"), "{route} {body}: {text}");
        Ok(())
    });
    checked.unwrap();
    runtime.block_on(check_unharmed(&server));
}

#[test]
fn arbitrary_bytes_never_fail_the_server() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let server = runtime.block_on(async { Server::start() });
    let mut runner = TestRunner::new(Config { cases: num_cases(200), failure_persistence: None, ..Config::default() });
    let route = prop::sample::select(JSON_ROUTES.to_vec());
    // A body of the right form, with some bytes replaced.
    let bytes = (any_body(), prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)).prop_map(
        |(body, changes)| {
            let mut bytes = body.to_string().into_bytes();
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            bytes
        },
    );
    let checked = runner.run(&(route, bytes), |(route, bytes)| {
        let shown = String::from_utf8_lossy(&bytes).into_owned();
        let status = runtime.block_on(async { server.post_bytes(route, bytes).await.status().as_u16() });
        prop_assert!(status == 200 || status == 400 || status == 404, "{route} {shown}: {status}");
        Ok(())
    });
    checked.unwrap();
    runtime.block_on(check_unharmed(&server));
}
