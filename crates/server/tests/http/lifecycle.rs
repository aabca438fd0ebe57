//! Loading, draining, cutting: what clients see, and that `run` returns whatever they do.

use std::time::Duration;

use bindery_engine::testing::gate;
use futures::StreamExt;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::{MODEL, PATIENCE, Server, Setup, check_error, events, wait_for_step, wait_until};

const COMPLETIONS: &str = "/v1/completions";

/// Checks a 503 with `retry-after`.
async fn check_unavailable(response: reqwest::Response, code: &str) {
    let retry_after: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!(retry_after >= 1);
    assert_eq!(check_error(response, 503, None, code).await.as_deref(), Some(code));
}

#[tokio::test(flavor = "multi_thread")]
async fn until_the_model_is_loaded_there_is_health_but_no_readiness() {
    let mut setup = Setup::new();
    setup.starts_loaded = false;
    let server = setup.start();
    assert_eq!(server.get("/health").await.status(), 200);
    assert_eq!(server.get("/version").await.status(), 200);
    check_unavailable(server.get("/ready").await, "model_loading").await;
    check_unavailable(server.get("/v1/models").await, "model_loading").await;
    for route in [COMPLETIONS, "/v1/chat/completions", "/tokenize", "/detokenize"] {
        check_unavailable(server.post(route, &json!({})).await, "model_loading").await;
    }
    assert_eq!(server.metric("vllm:num_requests_running").await, 0.0);
    server.slot.set(server.model.clone());
    assert_eq!(server.get("/ready").await.status(), 200);
    server.ok(COMPLETIONS, &json!({"prompt": "hello"})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_that_failed_is_told_and_stays() {
    let mut setup = Setup::new();
    setup.starts_loaded = false;
    let server = setup.start();
    server.slot.fail("the file is torn".into());
    server.slot.set(server.model.clone());
    let response = server.get("/ready").await;
    assert!(response.headers().get("retry-after").is_none());
    let body: serde_json::Value = response.json().await.unwrap();
    assert_eq!(body["error"]["code"], "model_load_failed");
    assert!(body["error"]["message"].as_str().unwrap().contains("the file is torn"));
    check_error(server.get("/v1/models").await, 503, None, "models").await;
    assert_eq!(server.get("/health").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_refuses_new_requests_and_finishes_running_ones() {
    let (gate, keeper) = gate();
    let mut setup = Setup::new();
    setup.model.gate = Some(gate);
    let mut server = setup.start();
    let body = json!({"prompt": "hello", "max_tokens": 5, "stream": true});
    let mut running = server.post(COMPLETIONS, &body).await.bytes_stream();
    let whole = server.request(reqwest::Method::POST, COMPLETIONS).json(&json!({"prompt": "hello", "max_tokens": 5}));
    let whole = tokio::spawn(async move { whole.send().await.unwrap().json::<serde_json::Value>().await.unwrap() });
    wait_until("both are queued", || server.model.engine.num_unfinished() >= 2).await;
    server.begin_shutdown();
    // Readiness turns first; until then the answer is the old one.
    let asking = async { while server.get("/ready").await.status() != 503 {} };
    tokio::time::timeout(PATIENCE, asking).await.unwrap();
    check_unavailable(server.get("/ready").await, "shutting_down").await;
    check_unavailable(server.post(COMPLETIONS, &body).await, "shutting_down").await;
    check_unavailable(server.get("/v1/models").await, "shutting_down").await;
    assert_eq!(server.get("/health").await.status(), 200);
    drop(keeper);
    let mut text = String::new();
    while let Some(piece) = running.next().await {
        text.push_str(std::str::from_utf8(&piece.unwrap()).unwrap());
    }
    let (_, done) = events(&text);
    assert!(done, "a running stream ends as it should: {text}");
    assert_eq!(whole.await.unwrap()["usage"]["completion_tokens"], 5);
    server.wait_stopped().await;
    assert!(TcpStream::connect(server.address).await.is_err(), "the port is closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_beyond_the_shutdown_timeout_is_cut_with_an_error() {
    let (gate, keeper) = gate();
    let mut setup = Setup::new();
    setup.model.gate = Some(gate);
    setup.config.shutdown_timeout = Duration::from_millis(100);
    let mut server = setup.start();
    let body = json!({"prompt": "hello", "max_tokens": 5, "stream": true});
    let running = server.post(COMPLETIONS, &body).await;
    assert_eq!(running.status(), 200);
    let whole = server.request(reqwest::Method::POST, COMPLETIONS).json(&json!({"prompt": "hello"}));
    let whole = tokio::spawn(async move { whole.send().await.unwrap() });
    wait_until("both are queued", || server.model.engine.num_unfinished() >= 2).await;
    server.begin_shutdown();
    let (events, done) = events(&running.text().await.unwrap());
    assert!(!done);
    assert_eq!(events.last().unwrap()["error"]["code"], "shutting_down");
    check_unavailable(whole.await.unwrap(), "shutting_down").await;
    server.wait_stopped().await;
    drop(keeper);
    server.wait_until_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn run_returns_whatever_clients_do() {
    let mut setup = Setup::new();
    setup.engine.max_model_len = 4096;
    setup.engine.num_blocks = 4096;
    setup.config.shutdown_timeout = Duration::from_millis(100);
    setup.limits.flush_timeout = Duration::from_millis(200);
    setup.send_buffer = Some(4096);
    let mut server = setup.start();
    // An idle connection, one whose head is half sent, one whose body never comes, and a reader that does not read.
    let mut idle = TcpStream::connect(server.address).await.unwrap();
    ask_health(&mut idle).await;
    let mut half = TcpStream::connect(server.address).await.unwrap();
    half.write_all(b"GET /health HT").await.unwrap();
    let mut bodiless = TcpStream::connect(server.address).await.unwrap();
    bodiless.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{").await.unwrap();
    let stalled = tokio::net::TcpSocket::new_v4().unwrap();
    stalled.set_recv_buffer_size(4096).unwrap();
    let mut stalled = stalled.connect(server.address).await.unwrap();
    let body = json!({"prompt": "hello", "max_tokens": 4000, "stream": true, "logprobs": 20}).to_string();
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    stalled.write_all((head + &body).as_bytes()).await.unwrap();
    server.wait_for_stats("the stalled reader's request has begun", |stats| stats.num_steps > 0).await;
    server.begin_shutdown();
    server.wait_stopped().await;
    server.wait_until_empty().await;
    drop((idle, half, bodiless, stalled));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_a_503_with_retry_after() {
    let (gate, keeper) = gate();
    let mut setup = Setup::new();
    setup.model.gate = Some(gate);
    setup.engine.max_queued_requests = 2;
    setup.engine.max_num_seqs = 1;
    let server = setup.start();
    let body = json!({"model": MODEL, "prompt": "hello", "max_tokens": 2, "stream": true});
    let first = server.post(COMPLETIONS, &body).await;
    let keeper = wait_for_step(keeper).await;
    let second = server.post(COMPLETIONS, &body).await;
    // Several prompts are one request: all or none. The place that one of them could have had stays free, although the
    // step that runs is held.
    check_unavailable(server.post(COMPLETIONS, &json!({"prompt": ["a", "b"]})).await, "queue_full").await;
    let third = server.post(COMPLETIONS, &body).await;
    for stream in [&first, &second, &third] {
        assert_eq!(stream.status(), reqwest::StatusCode::OK);
    }
    check_unavailable(server.post(COMPLETIONS, &body).await, "queue_full").await;
    // More than the whole queue: trying again would never help.
    let hopeless = server.post(COMPLETIONS, &json!({"prompt": ["a", "b", "c"]})).await;
    check_error(hopeless, 400, Some("prompt"), "3 prompts").await;
    drop(keeper);
    for stream in [first, second, third] {
        assert!(events(&stream.text().await.unwrap()).1);
    }
    server.wait_until_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_would_score_too_much_is_refused_before_anything_runs() {
    let mut setup = Setup::new();
    setup.limits.max_prompt_scores = 20;
    let server = setup.start();
    // Three prompts of four tokens, each score beside two alternatives: 36.
    let body = json!({"prompt": ["four", "more", "here"], "prompt_logprobs": 2, "max_tokens": 1});
    check_error(server.post(COMPLETIONS, &body).await, 400, Some("prompt_logprobs"), "36 scores").await;
    server.wait_until_empty().await;
    assert_eq!(server.stats().num_steps, 0, "no prompt was computed");
    server.ok(COMPLETIONS, &json!({"prompt": "four", "prompt_logprobs": 2, "max_tokens": 1})).await;
}

/// A question on a connection that stays open, and its answer, which has no body.
async fn ask_health(connection: &mut TcpStream) {
    connection.write_all(b"HEAD /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let reading = async {
        while !answer.ends_with(b"\r\n\r\n") {
            assert_ne!(connection.read_buf(&mut answer).await.unwrap(), 0, "closed before the end");
        }
    };
    tokio::time::timeout(PATIENCE, reading).await.expect("an answer comes");
    assert!(answer.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&answer));
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_the_limit_wait_their_turn() {
    let mut setup = Setup::new();
    setup.limits.max_connections = 1;
    let server = setup.start();
    let mut held = TcpStream::connect(server.address).await.unwrap();
    ask_health(&mut held).await;
    let mut waiting = TcpStream::connect(server.address).await.unwrap();
    let mut answer = std::pin::pin!(ask_health(&mut waiting));
    // The system takes connection and question, the server neither, however often the one before is answered.
    for _ in 0..20 {
        assert!(futures::poll!(answer.as_mut()).is_pending(), "a second connection was served beside the first");
        ask_health(&mut held).await;
    }
    drop(held);
    answer.await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_requests_stops_at_once() {
    let mut server = Server::start();
    assert_eq!(server.get("/health").await.status(), 200);
    server.begin_shutdown();
    server.wait_stopped().await;
}
