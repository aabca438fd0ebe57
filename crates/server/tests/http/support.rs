//! A server on port 0, a client for it, and a way to wait for a condition without sleeping.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bindery_engine::{
    ChatTemplate, EngineStats, LocalModel,
    adapters::AdapterRoots,
    testing::{FakeModelOptions, GateKeeper, fake_local_model, fake_local_model_with_template, small_limits},
};
use bindery_server::{Limits, ModelSlot, ServerConfig, run_with_limits};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::oneshot,
    task::JoinHandle,
};

pub(crate) const MODEL: &str = "fake-model";
/// Longer than anything here takes; reaching it is a failure, not a measurement.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// In the manner of published templates; refuses what the tests want refused.
const TEMPLATE: &str = "{% for message in messages %}\
    {% if message.content == 'RAISE' %}{{ raise_exception('this conversation is refused') }}{% endif %}\
    <{{ message.role }}>{{ message.content }}\n{% endfor %}\
    {% if reasoning_effort %}<effort {{ reasoning_effort }}>{% endif %}\
    {% if add_generation_prompt %}<assistant>{% endif %}";

/// What a test wants of its server.
pub(crate) struct Setup {
    pub(crate) model: FakeModelOptions,
    pub(crate) engine: bindery_scheduler::Limits,
    pub(crate) config: ServerConfig,
    pub(crate) limits: Limits,
    pub(crate) has_template: bool,
    pub(crate) starts_loaded: bool,
    /// Of the accepted sockets, bytes; `None`: the system's.
    pub(crate) send_buffer: Option<u32>,
}

impl Setup {
    pub(crate) fn new() -> Self {
        let config = ServerConfig {
            served_model_names: vec![MODEL.into(), "org/alias".into()],
            api_keys: Vec::new(),
            tenants: Vec::new(),
            admin_key: None,
            max_body_bytes: 12 << 20,
            shutdown_timeout: PATIENCE,
            digest: Arc::new("abc".to_owned().into()),
            license: Some("Apache-2.0".into()),
            adapter_roots: AdapterRoots::default(),
            gateway: None,
        };
        Self {
            model: FakeModelOptions { eos_bias: -1000.0, ..FakeModelOptions::default() },
            engine: small_limits(),
            limits: Limits::new(&config),
            config,
            has_template: true,
            starts_loaded: true,
            send_buffer: None,
        }
    }

    pub(crate) fn start(self) -> Server {
        let socket = TcpSocket::new_v4().unwrap();
        if let Some(bytes) = self.send_buffer {
            socket.set_send_buffer_size(bytes).unwrap();
        }
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener: TcpListener = socket.listen(256).unwrap();
        let address = listener.local_addr().unwrap();
        let mut model = fake_local_model(self.engine.clone(), self.model.clone()).unwrap();
        if self.has_template {
            let template = ChatTemplate::from_source(TEMPLATE, &model.tokenizer).unwrap();
            model = fake_local_model_with_template(self.engine, self.model, Some(template)).unwrap();
        }
        let model = Arc::new(model);
        let slot = ModelSlot::default();
        if self.starts_loaded {
            slot.set(Arc::clone(&model));
        }
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async {
            let _ = stopped.await;
        };
        let task = tokio::spawn(run_with_limits(listener, self.config, self.limits, slot.clone(), shutdown));
        Server { address, model, slot, stop: Some(stop), task: Some(task), client: client() }
    }
}

fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap()
}

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) model: Arc<LocalModel>,
    pub(crate) slot: ModelSlot,
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<std::io::Result<()>>>,
    pub(crate) client: reqwest::Client,
}

impl Server {
    pub(crate) fn start() -> Self {
        Setup::new().start()
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("http://{}{path}", self.address))
    }

    pub(crate) async fn get(&self, path: &str) -> Response {
        self.request(Method::GET, path).send().await.unwrap()
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Response {
        self.request(Method::POST, path).json(body).send().await.unwrap()
    }

    /// Bytes as they are, with a JSON content type.
    pub(crate) async fn post_bytes(&self, path: &str, body: impl Into<reqwest::Body>) -> Response {
        self.request(Method::POST, path).header("content-type", "application/json").body(body).send().await.unwrap()
    }

    /// The JSON of an answer that must be a success.
    pub(crate) async fn ok(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body).await;
        let status = response.status();
        let value: Value = response.json().await.unwrap();
        assert_eq!(status, StatusCode::OK, "{body}: {value}");
        value
    }

    /// The events of a stream that must end with `[DONE]`.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let (events, done) = self.stream_to_end(path, body).await;
        assert!(done, "the stream ended without [DONE]: {events:?}");
        events
    }

    /// The events of a stream, and whether `[DONE]` came.
    pub(crate) async fn stream_to_end(&self, path: &str, body: &Value) -> (Vec<Value>, bool) {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let response = self.post(path, &body).await;
        assert_eq!(response.status(), StatusCode::OK, "{body}");
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        events(&response.text().await.unwrap())
    }

    pub(crate) fn stats(&self) -> EngineStats {
        self.model.engine.stats()
    }

    /// Waits for a snapshot of the engine's statistics.
    pub(crate) async fn wait_for_stats(&self, what: &str, wanted: impl FnMut(&EngineStats) -> bool) {
        let waiting = self.model.engine.stats_when(wanted);
        tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("{what}: {:?}", self.stats()));
    }

    /// Waits until nothing runs, waits or holds a block.
    pub(crate) async fn wait_until_empty(&self) {
        tokio::time::timeout(PATIENCE, self.model.engine.idle()).await.expect("the engine becomes idle");
        self.wait_for_stats("the engine is empty", |stats| {
            stats.num_requests_running == 0 && stats.num_requests_waiting == 0 && stats.num_used_blocks == 0
        })
        .await;
    }

    /// Sends the signal to stop.
    pub(crate) fn begin_shutdown(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }

    /// Waits for `run` to return.
    pub(crate) async fn wait_stopped(&mut self) {
        let task = self.task.take().unwrap();
        tokio::time::timeout(PATIENCE, task).await.expect("run returns").unwrap().unwrap();
    }

    pub(crate) async fn metric(&self, series: &str) -> f64 {
        let text = self.get("/metrics").await.text().await.unwrap();
        let line = text.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("{series} in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
}

/// The events of a stream's text, and whether `[DONE]` came last.
pub(crate) fn events(text: &str) -> (Vec<Value>, bool) {
    let mut events = Vec::new();
    let mut done = false;
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with(':')) {
        let data = line.strip_prefix("data: ").unwrap_or_else(|| panic!("no data line: {line}"));
        assert!(!done, "something follows [DONE]: {line}");
        if data == "[DONE]" {
            done = true;
        } else {
            events.push(serde_json::from_str(data).unwrap());
        }
    }
    (events, done)
}

/// Asks again and again, giving way to others in between.
pub(crate) async fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let asking = async {
        while !condition() {
            tokio::task::yield_now().await;
            std::thread::yield_now();
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| panic!("not reached: {what}"));
}

/// Waits until a step stands at the gate, beside the runtime's threads.
pub(crate) async fn wait_for_step(keeper: GateKeeper) -> GateKeeper {
    let waiting = tokio::task::spawn_blocking(move || {
        keeper.wait_for_step();
        keeper
    });
    waiting.await.unwrap()
}

/// Checks an error answer: status, OpenAI's shape, param. Returns its code.
pub(crate) async fn check_error(response: Response, status: u16, param: Option<&str>, about: &str) -> Option<String> {
    let got = response.status().as_u16();
    let request_id = response.headers().get("x-request-id").map(|id| !id.is_empty());
    let body: Value =
        serde_json::from_slice(&response.bytes().await.unwrap()).unwrap_or_else(|e| panic!("{about}: {e}"));
    assert_eq!(got, status, "{about}: {body}");
    assert_eq!(request_id, Some(true), "{about}: no request id");
    let error = body["error"].as_object().unwrap_or_else(|| panic!("{about}: {body}"));
    assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"], "{about}");
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{about}: {body}");
    assert!(error["type"].is_string(), "{about}: {body}");
    assert_eq!(error["param"].as_str(), param, "{about}: {body}");
    error["code"].as_str().map(str::to_owned)
}
