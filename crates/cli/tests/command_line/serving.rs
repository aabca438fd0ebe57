//! `serve` while it serves: a small model with random weights, asked over HTTP; its log is read from stderr.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::Path,
    process::{Child, ChildStderr, Command, Stdio},
};

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::support::{TINY_LLAMA, bindery};

/// The binary at work; ended when it is dropped.
pub(crate) struct Serving {
    child: Child,
    log: BufReader<ChildStderr>,
    url: String,
    client: reqwest::Client,
    runtime: tokio::runtime::Runtime,
    _home: tempfile::TempDir,
}

impl Serving {
    /// Returns when it takes requests.
    pub(crate) fn start(flags: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::spawn(flags, environment).until_ready()
    }

    /// The same with a model of the test's choice, whose weights are read.
    pub(crate) fn start_model(path: &Path, flags: &[&str]) -> Self {
        Self::spawn_model(path, flags, &[]).until_ready()
    }

    fn until_ready(mut self) -> Self {
        let ready = self.lines_until("ready: http").pop().unwrap();
        self.url.push_str(ready.trim_start_matches("ready: "));
        self
    }

    /// Returns at once: where it will listen is still to be read from its log.
    fn spawn(flags: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::spawn_model(Path::new(TINY_LLAMA), &[&["--load-format", "dummy"], flags].concat(), environment)
    }

    fn spawn_model(path: &Path, flags: &[&str], environment: &[(&str, &str)]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let mut child = bindery(home.path())
            .arg("serve")
            .arg(path)
            .args(["--port", "0", "--threads", "1"])
            .args(flags)
            .envs(environment.iter().copied())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { child, log, url: String::new(), client, runtime, _home: home }
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

    /// Asks it to stop; the rest of its log, and its exit code.
    fn terminate(mut self) -> (String, Option<i32>) {
        // The standard library sends no signal but SIGKILL; the shell's own `kill` is everywhere.
        let sent = Command::new("sh").args(["-c", "kill -TERM \"$0\"", &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).unwrap();
        (rest, self.child.wait().unwrap().code())
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    fn get(&self, path: &str) -> StatusCode {
        let request = self.client.get(format!("{}{path}", self.url));
        self.runtime.block_on(async { request.send().await.unwrap().status() })
    }

    pub(crate) fn post(&self, body: &Value) -> (StatusCode, Value) {
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

#[test]
fn a_json_log_is_json_from_the_first_line_to_the_last() {
    // An address that is warned about, and a note on what was asked for in vain: both are sentences in a text log.
    let flags = ["--log-format", "json", "--host", "0.0.0.0", "--quantize", "int4"];
    let mut serving = Serving::spawn(&flags, &[]);
    let mut lines = serving.lines_until("\"ready\"");
    let ready: Value = serde_json::from_str(lines.last().unwrap()).unwrap();
    assert_eq!((&ready["model"], &ready["max_model_len"]), (&"tiny-llama".into(), &256.into()), "{ready}");
    serving.url = ready["url"].as_str().unwrap().replace("0.0.0.0", "127.0.0.1");
    assert_eq!(serving.post(&json!({"prompt": "hello", "max_tokens": 3, "ignore_eos": true})).0, StatusCode::OK);
    lines.extend(serving.lines_until("request done"));
    let done: Value = serde_json::from_str(lines.last().unwrap()).unwrap();
    assert_eq!((&done["level"], &done["completion_tokens"]), (&"INFO".into(), &3.into()), "{done}");
    let (rest, code) = serving.terminate();
    assert_eq!(code, Some(0), "{rest}");
    lines.extend(rest.lines().map(str::to_owned));
    let mut told = Vec::new();
    for line in &lines {
        let event: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
        for key in ["timestamp", "level", "target", "message"] {
            assert!(event[key].is_string(), "{key}: {line}");
        }
        told.push(event["message"].as_str().unwrap().to_owned());
    }
    assert!(told.iter().any(|message| message.contains("no key is configured")), "{told:?}");
    assert!(told.iter().any(|message| message.starts_with("SIGTERM: ")), "{told:?}");
    assert_eq!(told.last().map(String::as_str), Some("stopped"));
}

#[test]
fn what_the_page_proposes_is_answered_by_a_model_without_a_chat_template() {
    let mut serving = Serving::spawn(&[], &[]);
    let page = serving.lines_until("ready: http");
    let proposal = page.iter().find(|line| line.trim_start().starts_with("try ")).unwrap();
    assert!(proposal.contains("/v1/completions"), "{proposal}");
    let body = proposal.split_once("-d '").unwrap().1.trim_end_matches('\'');
    let mut body: Value = serde_json::from_str(body).unwrap();
    body["stream"] = json!(false);
    serving.url.push_str(page.last().unwrap().trim_start_matches("ready: "));
    let (status, answer) = serving.post(&body);
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["usage"]["completion_tokens"], 40);
}
