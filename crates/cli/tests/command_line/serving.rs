//! `serve` while it serves: a small model with random weights, asked over HTTP; its log is read from stderr.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, ChildStderr, Stdio},
};

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::support::bindery;

struct Serving {
    child: Child,
    log: BufReader<ChildStderr>,
    url: String,
    client: reqwest::Client,
    runtime: tokio::runtime::Runtime,
    _home: tempfile::TempDir,
}

impl Serving {
    /// Returns when it takes requests.
    fn start(flags: &[&str], environment: &[(&str, &str)]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/checkpoints/tiny-llama");
        let mut child = bindery(home.path())
            .args(["serve", model, "--load-format", "dummy", "--port", "0", "--threads", "1"])
            .args(flags)
            .envs(environment.iter().copied())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let mut serving = Self { child, log, url: String::new(), client, runtime, _home: home };
        let ready = serving.lines_until("ready: http").pop().unwrap();
        serving.url.push_str(ready.trim_start_matches("ready: "));
        serving
    }

    /// What it has logged since the last call, up to the line that holds this.
    fn lines_until(&mut self, last: &str) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            assert_ne!(self.log.read_line(&mut line).unwrap(), 0, "it ended before {last:?}: {lines:?}");
            lines.push(line.trim_end().to_owned());
            if line.contains(last) {
                return lines;
            }
        }
    }

    fn get(&self, path: &str) -> StatusCode {
        let request = self.client.get(format!("{}{path}", self.url));
        self.runtime.block_on(async { request.send().await.unwrap().status() })
    }

    fn post(&self, body: &Value) -> (StatusCode, Value) {
        let request = self.client.post(format!("{}/v1/completions", self.url)).json(body);
        self.runtime.block_on(async {
            let answer = request.send().await.unwrap();
            (answer.status(), answer.json().await.unwrap())
        })
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // Where it has ended already, there is nothing to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_body_limit_is_the_operators() {
    let of_size = |bytes: usize| {
        let frame = json!({"prompt": "", "max_tokens": 1}).to_string().len();
        json!({"prompt": "x".repeat(bytes - frame), "max_tokens": 1})
    };
    for (flags, environment) in [
        (&["--max-body-size", "256B"][..], &[("BINDERY_MAX_BODY_SIZE", "2KiB")][..]),
        (&[], &[("BINDERY_MAX_BODY_SIZE", "256B")]),
    ] {
        let serving = Serving::start(flags, environment);
        let (status, answer) = serving.post(&of_size(257));
        assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains("larger than 256 bytes") && message.contains("--max-body-size"), "{message}");
        let (status, answer) = serving.post(&of_size(256));
        assert_eq!(status, StatusCode::OK, "{answer}");
    }
}

#[test]
fn the_log_tells_requests_and_passes_over_probes() {
    let mut serving = Serving::start(&["--api-key", "k"], &[]);
    for probe in ["/health", "/ready", "/metrics"] {
        assert_eq!(serving.get(probe), StatusCode::OK, "{probe}");
    }
    // Refused before it had a prompt.
    assert_eq!(serving.get("/v1/models"), StatusCode::UNAUTHORIZED);
    let lines = serving.lines_until("request done");
    let line = lines.last().unwrap();
    assert!(line.contains("INFO") && line.contains("/v1/models") && line.contains("status=401"), "{lines:?}");
    assert!(!line.contains("_tokens="), "{line}");

    let mut serving = Serving::start(&[], &[("RUST_LOG", "debug")]);
    assert_eq!(serving.post(&json!({"prompt": "hello", "max_tokens": 3, "ignore_eos": true})).0, StatusCode::OK);
    let line = serving.lines_until("request done").pop().unwrap();
    assert!(
        line.contains("INFO") && line.contains("completion_tokens=3") && line.contains("prompt_tokens=5"),
        "{line}"
    );
    assert_eq!(serving.get("/health"), StatusCode::OK);
    let line = serving.lines_until("request done").pop().unwrap();
    assert!(line.contains("DEBUG") && line.contains("/health") && !line.contains("_tokens="), "{line}");
}
