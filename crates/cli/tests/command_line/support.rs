//! Runs the binary in a machine of its own, and a scripted server that speaks OpenAI's streams.

use std::{
    path::Path,
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex},
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures::StreamExt as _;
use serde_json::{Value, json};

/// A checkpoint of two small layers and 128 tokens, without a tokenizer.
pub(crate) const TINY_LLAMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/checkpoints/tiny-llama");

/// What a run left behind.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// The binary with empty caches, no network and no variable of the machine that runs the test.
pub(crate) fn bindery(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bindery"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("BINDERY_") || name.starts_with("HF_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command
        .env("BINDERY_CACHE", home.join("cache"))
        .env("BINDERY_CARDS", home.join("cards"))
        .env("HF_HOME", home.join("hf"))
        .env("HF_HUB_OFFLINE", "1")
        .current_dir(home)
        .stdin(Stdio::null());
    command
}

/// Runs it with these arguments and nothing else.
pub(crate) fn run(arguments: &[&str]) -> Ended {
    let home = tempfile::tempdir().unwrap();
    bindery(home.path()).args(arguments).output().unwrap().into()
}

/// How the scripted server answers.
#[derive(Clone, Default)]
pub(crate) struct Script {
    /// Pieces of every answer.
    pub(crate) pieces: Vec<&'static str>,
    /// Told in the last event, where set and asked for.
    pub(crate) usage: Option<(u64, u64)>,
    /// Every n-th request (from 1) is refused with 503.
    pub(crate) refuse_every: Option<usize>,
    /// Streams end without `[DONE]`.
    pub(crate) cuts: bool,
    pub(crate) key: Option<&'static str>,
    pub(crate) refuses_ignore_eos: bool,
    /// Every request is refused with 400 and this error object.
    pub(crate) bad_request: Option<Value>,
}

/// What it was asked: route and body.
pub(crate) type Asked = Arc<Mutex<Vec<(String, Value)>>>;

pub(crate) struct Server {
    pub(crate) url: String,
    asked: Asked,
    // Serves until it is dropped.
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    pub(crate) fn start(script: Script) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let asked = Asked::default();
        let router = Router::new()
            .route("/v1/models", get(|| async { Json(json!({"data": [{"id": "scripted"}]})) }))
            .route("/v1/completions", post(completions))
            .route("/v1/chat/completions", post(chat))
            .with_state((script, Arc::clone(&asked)));
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, asked, _runtime: runtime }
    }

    pub(crate) fn asked(&self) -> Vec<(String, Value)> {
        self.asked.lock().unwrap().clone()
    }
}

type Shared = State<(Script, Asked)>;

async fn completions(state: Shared, headers: HeaderMap, Json(body): Json<Value>) -> Response {
    answer("completions", state, &headers, &body, |piece| json!({"choices": [{"index": 0, "text": piece}]}))
}

async fn chat(state: Shared, headers: HeaderMap, Json(body): Json<Value>) -> Response {
    answer("chat", state, &headers, &body, |piece| json!({"choices": [{"index": 0, "delta": {"content": piece}}]}))
}

fn answer(
    route: &str,
    State((script, asked)): Shared,
    headers: &HeaderMap,
    body: &Value,
    event: impl Fn(&str) -> Value,
) -> Response {
    let refuse =
        |status: StatusCode, message: &str| (status, Json(json!({"error": {"message": message}}))).into_response();
    let sent_key = headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
    if script.key.is_some_and(|key| sent_key != format!("Bearer {key}")) {
        return refuse(StatusCode::UNAUTHORIZED, "no such key");
    }
    if script.refuses_ignore_eos && body.get("ignore_eos").is_some() {
        return refuse(StatusCode::BAD_REQUEST, "unknown field ignore_eos");
    }
    if let Some(error) = script.bad_request {
        return (StatusCode::BAD_REQUEST, Json(json!({"error": error}))).into_response();
    }
    let number = {
        let mut asked = asked.lock().unwrap();
        asked.push((route.to_owned(), body.clone()));
        asked.len()
    };
    if script.refuse_every.is_some_and(|every| number.is_multiple_of(every)) {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "the queue is full");
    }
    let mut events: Vec<String> = script.pieces.iter().map(|piece| event(piece).to_string()).collect();
    if body["stream_options"]["include_usage"] == true
        && let Some((prompt, completion)) = script.usage
    {
        events.push(
            json!({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}).to_string(),
        );
    }
    if !script.cuts {
        events.push("[DONE]".to_owned());
    }
    let stream = futures::stream::iter(events)
        .map(|data| Ok::<_, std::convert::Infallible>(Bytes::from(format!("data: {data}\n\n"))));
    Response::builder().header("content-type", "text/event-stream").body(Body::from_stream(stream)).unwrap()
}
