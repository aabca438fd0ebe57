//! A client of OpenAI's API, as much as `chat`, `bench` and `adapters` need: the list of models, streams of text, and JSON
//! of other routes.

use std::time::Duration;

use eventsource_stream::Eventsource as _;
use futures::{Stream, StreamExt as _};
use serde_json::Value;

use crate::failure::Failure;

/// Kept of a server's error object: a reason names files, tensors and shapes, and what to do comes last.
const MAX_ERROR_CHARS: usize = 4000;
/// Kept of an answer that is no such object, a page of a proxy's for one.
const MAX_BODY_CHARS: usize = 300;

/// One server. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: String,
    key: Option<String>,
}

/// One event of a stream that matters here.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Chunk {
    /// New text; may be empty.
    pub(crate) text: String,
    /// Why the answer ended, with its last chunk.
    pub(crate) finish_reason: Option<String>,
    /// Prompt and answer tokens, in the last event where asked for.
    pub(crate) usage: Option<Usage>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
}

/// What went wrong with one request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// Nobody listens, or the name is unknown.
    #[error("cannot connect to {url}: {why}")]
    Connect { url: String, why: String },
    /// The server said no.
    #[error("{status}: {message}")]
    Refused {
        status: u16,
        /// OpenAI's `code`, where the server gives one as text.
        code: Option<String>,
        message: String,
    },
    /// An error inside a stream that had begun.
    #[error("error in the stream: {0}")]
    InStream(String),
    /// The connection ended before the stream did.
    #[error("the stream was cut: {0}")]
    Cut(String),
    /// Something that is no OpenAI API.
    #[error("the server's answer cannot be read: {0}")]
    Unreadable(String),
}

impl Client {
    /// `url` with or without `/v1` at its end.
    pub(crate) fn new(url: &str, key: Option<&str>) -> anyhow::Result<Self> {
        let base = url.trim_end_matches('/').trim_end_matches("/v1").trim_end_matches('/').to_owned();
        let is_http =
            ["http://", "https://"].iter().any(|scheme| base.strip_prefix(scheme).is_some_and(|rest| !rest.is_empty()));
        if !is_http {
            return Err(Failure::usage(format!("{url} is not the URL of a server"))
                .hint("write it like http://127.0.0.1:8000")
                .into());
        }
        let http = reqwest::Client::builder()
            .connect_timeout(Duration::from_secs(10))
            .user_agent(concat!("bindery/", env!("CARGO_PKG_VERSION")))
            .build()?;
        // The variable of a server may hold several keys; any of them opens it.
        let key = key.and_then(|keys| keys.split(',').map(str::trim).find(|key| !key.is_empty())).map(str::to_owned);
        Ok(Self { http, base, key })
    }

    /// With one key, as it stands.
    pub(crate) fn with_key(url: &str, key: &str) -> anyhow::Result<Self> {
        Ok(Self { key: Some(key.trim().to_owned()), ..Self::new(url, None)? })
    }

    pub(crate) fn url(&self) -> &str {
        &self.base
    }

    /// The first model the server lists: the one it serves.
    pub(crate) async fn first_model(&self) -> Result<String, ClientError> {
        let answer =
            self.send(self.http.get(format!("{}/v1/models", self.base)).timeout(Duration::from_secs(30))).await?;
        let list: Value = answer.json().await.map_err(|error| ClientError::Unreadable(error.to_string()))?;
        list["data"][0]["id"]
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| ClientError::Unreadable("its list of models is empty".to_owned()))
    }

    /// Asks for JSON: a GET where there is no body.
    pub(crate) async fn json(&self, path: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        let url = format!("{}{path}", self.base);
        let request = match body {
            Some(body) => self.http.post(url).json(body),
            None => self.http.get(url).timeout(Duration::from_secs(30)),
        };
        let answer = self.send(request).await?;
        answer.json().await.map_err(|error| ClientError::Unreadable(error.to_string()))
    }

    /// The server's metrics in Prometheus' text.
    pub(crate) async fn metrics(&self) -> Result<String, ClientError> {
        let answer =
            self.send(self.http.get(format!("{}/metrics", self.base)).timeout(Duration::from_secs(30))).await?;
        answer.text().await.map_err(|error| ClientError::Unreadable(error.to_string()))
    }

    /// Posts to `/v1/<route>` and reads the answer's events until `[DONE]`.
    pub(crate) async fn stream(
        &self,
        route: &str,
        body: &Value,
    ) -> Result<impl Stream<Item = Result<Chunk, ClientError>> + use<>, ClientError> {
        let answer = self.send(self.http.post(format!("{}/v1/{route}", self.base)).json(body)).await?;
        let is_stream = answer
            .headers()
            .get("content-type")
            .and_then(|value| value.to_str().ok())
            .is_some_and(|kind| kind.starts_with("text/event-stream"));
        if !is_stream {
            return Err(ClientError::Unreadable("it did not answer with a stream of events".to_owned()));
        }
        let events = answer.bytes_stream().eventsource();
        // Ends after `[DONE]` or an error; a stream that just stops has been cut.
        Ok(futures::stream::unfold(Some(events), |events| async move {
            let mut events = events?;
            loop {
                return match events.next().await {
                    None => Some((Err(ClientError::Cut("it ended without [DONE]".to_owned())), None)),
                    Some(Err(error)) => Some((Err(ClientError::Cut(error.to_string())), None)),
                    Some(Ok(event)) if event.data.trim() == "[DONE]" => None,
                    Some(Ok(event)) if event.data.trim().is_empty() => continue,
                    Some(Ok(event)) => match parse_chunk(&event.data) {
                        Ok(chunk) => Some((Ok(chunk), Some(events))),
                        Err(error) => Some((Err(error), None)),
                    },
                };
            }
        }))
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<reqwest::Response, ClientError> {
        let request = match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        let answer = request.send().await.map_err(|error| self.explain(&error))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let text = answer.text().await.unwrap_or_default();
        Err(ClientError::Refused { status: status.as_u16(), code: error_code(&text), message: error_message(&text) })
    }

    fn explain(&self, error: &reqwest::Error) -> ClientError {
        let mut source: &dyn std::error::Error = error;
        while let Some(inner) = source.source() {
            source = inner;
        }
        if error.is_connect() || error.is_timeout() {
            ClientError::Connect { url: self.base.clone(), why: source.to_string() }
        } else {
            ClientError::Cut(source.to_string())
        }
    }
}

/// OpenAI's error object, or the beginning of whatever came.
fn error_message(text: &str) -> String {
    let object: Option<Value> = serde_json::from_str(text).ok();
    let message = object.as_ref().and_then(|object| object["error"]["message"].as_str());
    let (message, max_chars) = message.map_or((text, MAX_BODY_CHARS), |message| (message, MAX_ERROR_CHARS));
    match message.trim() {
        "" => "no reason given".to_owned(),
        message => message.chars().take(max_chars).collect(),
    }
}

fn error_code(text: &str) -> Option<String> {
    let object: Value = serde_json::from_str(text).ok()?;
    object["error"]["code"].as_str().map(str::to_owned)
}

/// Chat and completions differ only in where the text stands.
fn parse_chunk(data: &str) -> Result<Chunk, ClientError> {
    let value: Value = serde_json::from_str(data)
        .map_err(|error| ClientError::Unreadable(format!("an event is no JSON ({error})")))?;
    if !value["error"].is_null() {
        return Err(ClientError::InStream(error_message(data)));
    }
    let choice = &value["choices"][0];
    let text = choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str()).unwrap_or_default();
    let count = |name: &str| value["usage"][name].as_u64();
    Ok(Chunk {
        text: text.to_owned(),
        finish_reason: choice["finish_reason"].as_str().map(str::to_owned),
        usage: count("completion_tokens")
            .map(|completion_tokens| Usage { completion_tokens, prompt_tokens: count("prompt_tokens").unwrap_or(0) }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_of_both_routes_are_read() {
        let chat = parse_chunk(r#"{"choices":[{"delta":{"content":"hi"},"finish_reason":null}]}"#).unwrap();
        assert_eq!(chat, Chunk { text: "hi".into(), ..Chunk::default() });
        let completion = parse_chunk(r#"{"choices":[{"text":"hi","finish_reason":"length"}]}"#).unwrap();
        assert_eq!(completion, Chunk { text: "hi".into(), finish_reason: Some("length".into()), usage: None });
        let usage = parse_chunk(r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}"#).unwrap();
        assert_eq!(usage.usage, Some(Usage { prompt_tokens: 7, completion_tokens: 3 }));
        assert!(
            matches!(parse_chunk(r#"{"error":{"message":"no"}}"#), Err(ClientError::InStream(text)) if text == "no")
        );
        assert!(matches!(parse_chunk("<html>"), Err(ClientError::Unreadable(_))));
    }

    #[test]
    fn a_base_url_is_taken_with_and_without_its_v1() {
        for url in ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"] {
            assert_eq!(Client::new(url, None).unwrap().url(), "http://h:1");
        }
        assert!(Client::new("localhost:8000", None).is_err());
        assert!(Client::new("http://", None).is_err());
    }
}
