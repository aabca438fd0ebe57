//! Clients that go away or do not read: what they asked for is dropped, and its blocks are free.

use std::time::Duration;

use bindery_engine::testing::gate;
use futures::StreamExt;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

use crate::support::{PATIENCE, Server, Setup, events, wait_for_step};

const COMPLETIONS: &str = "/v1/completions";

fn raw_request(body: &serde_json::Value) -> Vec<u8> {
    let body = body.to_string();
    format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// Contexts long enough that nothing ends by itself while a test looks.
fn endless() -> Setup {
    let mut setup = Setup::new();
    setup.engine.max_model_len = 4096;
    setup.engine.num_blocks = 4096;
    setup
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_nobody_reads_any_more_is_aborted() {
    let (gate, keeper) = gate();
    let mut setup = endless();
    setup.model.gate = Some(gate);
    let server = setup.start();
    let body = json!({"prompt": "hello", "max_tokens": 4000, "stream": true, "n": 3});
    let mut stream = server.post(COMPLETIONS, &body).await.bytes_stream();
    let keeper = wait_for_step(keeper).await;
    keeper.let_go();
    stream.next().await.unwrap().unwrap();
    let keeper = wait_for_step(keeper).await;
    assert!(server.stats().num_used_blocks > 0);
    drop(stream);
    wait_until_metric(&server, "vllm:request_success_total{finished_reason=\"abort\"", 3.0).await;
    // Now the step that held it may end; the request is gone with it.
    drop(keeper);
    server.wait_until_empty().await;
    assert!(server.stats().generation_tokens <= 3 * 2, "{:?}", server.stats());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_answer_nobody_waits_for_is_aborted() {
    let (gate, keeper) = gate();
    let mut setup = endless();
    setup.model.gate = Some(gate);
    let server = setup.start();
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    socket.write_all(&raw_request(&json!({"prompt": "hello", "max_tokens": 4000}))).await.unwrap();
    let keeper = wait_for_step(keeper).await;
    drop(socket);
    wait_until_metric(&server, "vllm:request_success_total{finished_reason=\"abort\"", 1.0).await;
    // Now the step that held it may end; the request is gone with it.
    drop(keeper);
    server.wait_until_empty().await;
    assert!(server.stats().generation_tokens <= 1, "{:?}", server.stats());
    wait_until_metric(
        &server,
        "bindery_http_requests_total{method=\"POST\",route=\"/v1/completions\",status=\"499\"}",
        1.0,
    )
    .await;
}

async fn wait_until_metric(server: &Server, series: &str, value: f64) {
    let asking = async {
        while server.get("/metrics").await.text().await.unwrap().lines().all(|line| {
            !(line.starts_with(series) && line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() >= value)
        }) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| panic!("{series} never reached {value}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn after_64_streams_with_random_disconnects_no_block_is_held() {
    let mut setup = endless();
    // Not room for all: some wait, some are preempted.
    setup.engine.num_blocks = 400;
    setup.engine.max_model_len = 400;
    let server = setup.start();
    let mut clients = tokio::task::JoinSet::new();
    // A linear congruential generator: the same disconnects in every run.
    let mut state = 12345u64;
    for at in 0..64u64 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let draw = state >> 33;
        let body = json!({"prompt": format!("client {at}"), "max_tokens": 40 + draw % 60, "stream": at % 4 != 3, "seed": at,
            "n": 1 + at % 2});
        let request = server.request(reqwest::Method::POST, COMPLETIONS).json(&body).send();
        // A third stays to the end, the others leave after some pieces, or before the answer begins.
        let leaves_after = (!draw.is_multiple_of(3)).then_some(draw % 30);
        clients.spawn(async move {
            match leaves_after {
                Some(0) => {
                    let _ = tokio::time::timeout(Duration::from_millis(1), request).await;
                }
                Some(pieces) if at % 4 != 3 => {
                    let mut stream = request.await.unwrap().bytes_stream();
                    for _ in 0..pieces {
                        if stream.next().await.is_none() {
                            break;
                        }
                    }
                }
                Some(pieces) => {
                    let _ = tokio::time::timeout(Duration::from_millis(pieces), request).await;
                }
                None => {
                    let response = request.await.unwrap();
                    assert_eq!(response.status(), 200);
                    let text = response.text().await.unwrap();
                    assert!(text.contains("length"), "{text}");
                }
            }
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    server.wait_until_empty().await;
    assert_eq!(server.metric("vllm:kv_cache_usage_perc").await, 0.0);
    assert_eq!(server.metric("vllm:num_requests_running").await, 0.0);
    assert_eq!(server.metric("bindery_kv_slots_wasted").await, 0.0);
    server.ok(COMPLETIONS, &json!({"prompt": "still there?"})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stalls_is_cancelled_and_told() {
    let mut setup = endless();
    setup.send_buffer = Some(4096);
    let server = setup.start();
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut socket = socket.connect(server.address).await.unwrap();
    let body = json!({"prompt": "hello", "max_tokens": 4000, "stream": true, "logprobs": 20});
    socket.write_all(&raw_request(&body)).await.unwrap();
    server.wait_for_stats("the request has begun", |stats| stats.num_steps > 0).await;
    // Nothing is read: the buffers fill, then the engine's, then it gives up.
    server.wait_until_empty().await;
    assert!(server.stats().generation_tokens < 4000, "{:?}", server.stats());
    let mut answer = Vec::new();
    let mut buffer = vec![0; 65536];
    // The connection stays open for another request: read until the last chunk.
    while !answer.ends_with(b"\r\n0\r\n\r\n") {
        let count = tokio::time::timeout(PATIENCE, socket.read(&mut buffer)).await.unwrap().unwrap();
        assert_ne!(count, 0, "closed before the end");
        answer.extend_from_slice(&buffer[..count]);
    }
    let text = String::from_utf8_lossy(&answer);
    let last = text.lines().rev().find(|line| line.starts_with("data: ")).unwrap();
    let (events, done) = events(last);
    assert!(!done);
    assert_eq!(events[0]["error"]["code"], "slow_reader", "{last}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_takes_nothing_is_closed() {
    let mut setup = endless();
    setup.send_buffer = Some(4096);
    setup.limits.write_timeout = Duration::from_millis(200);
    let server = setup.start();
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut socket = socket.connect(server.address).await.unwrap();
    let body = json!({"prompt": "hello", "max_tokens": 4000, "stream": true, "logprobs": 20});
    socket.write_all(&raw_request(&body)).await.unwrap();
    server.wait_until_empty().await;
    wait_until_metric(
        &server,
        "bindery_http_requests_total{method=\"POST\",route=\"/v1/completions\",status=\"200\"}",
        1.0,
    )
    .await;
    let mut answer = Vec::new();
    let read = tokio::time::timeout(PATIENCE, socket.read_to_end(&mut answer)).await.expect("the connection is closed");
    assert!(read.is_err() || !answer.ends_with(b"0\r\n\r\n"), "the stream cannot have come whole");
}
