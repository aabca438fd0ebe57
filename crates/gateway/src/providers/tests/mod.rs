//! Translations against the documented wire formats: requests out, recorded answers, streams and errors in.
//!
//! The shapes are written from the providers' type definitions. A stream's chunks are put together again the way OpenAI's
//! SDK does it (`gathered`), which knows nothing of our types.

mod anthropic;
mod azure;
mod gemini;
mod openai;
mod streams;

use http::HeaderMap;
use serde_json::{Map, Value, json};

use super::*;
use crate::providers::{
    answer::Answer,
    error::{Cause, Spent},
};

/// Long before any retirement that matters here.
pub(super) fn now() -> DateTime<Utc> {
    "2026-11-28T12:00:00Z".parse().unwrap()
}

pub(super) fn object(value: Value) -> Map<String, Value> {
    let Value::Object(map) = value else { panic!("an object: {value}") };
    map
}

pub(super) fn entry(model: &str) -> ModelEntry {
    // As a config that lists it.
    let listed = crate::providers::catalogue::ModelOverride { id: model.to_owned(), ..Default::default() };
    let catalogue = Catalogue::built_in().unwrap().with_overrides(&[listed]).unwrap();
    catalogue.find_ever(model).cloned().unwrap()
}

/// What a test asks of whom.
pub(super) struct Asked {
    pub(super) provider: Provider,
    pub(super) base: Option<&'static str>,
    pub(super) model: ModelEntry,
    pub(super) fields: UnmappedFields,
}

impl Asked {
    pub(super) fn of(provider: Provider, model: &str) -> Self {
        let base = match &provider {
            Provider::OpenAi | Provider::Anthropic | Provider::Gemini => None,
            Provider::Azure(_) => Some("https://res.openai.azure.com"),
            Provider::Compatible => Some("http://127.0.0.1:8000/v1"),
        };
        Self { provider, base, model: entry(model), fields: UnmappedFields::Drop }
    }

    pub(super) fn endpoint(&self) -> Endpoint {
        Endpoint::new(&self.provider, self.base, Credential::Key(Secret::new("hunter2hunter2"))).unwrap()
    }

    pub(super) fn send(&self, body: Value) -> Result<Outgoing, Refusal> {
        let endpoint = self.endpoint();
        let call = self.call(&endpoint);
        self.provider.chat(&call, &ChatRequest::read(object(body))?)
    }

    pub(super) fn complete(&self, body: Value) -> Result<Outgoing, Refusal> {
        let endpoint = self.endpoint();
        let call = self.call(&endpoint);
        self.provider.completion(&call, &CompletionRequest::read(object(body))?)
    }

    pub(super) fn call<'a>(&'a self, endpoint: &'a Endpoint) -> Call<'a> {
        Call {
            endpoint,
            model: &self.model,
            max_output_tokens: None,
            max_prompt_tokens: 1000,
            fields: self.fields,
            at: now(),
        }
    }
}

/// The body that is sent for a user's "hi" and what is added to it.
pub(super) fn hi(more: Value) -> Value {
    let mut body = json!({"model": "asked-for", "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().unwrap().extend(object(more));
    body
}

pub(super) fn dropped(outgoing: &Outgoing) -> Vec<String> {
    outgoing.warnings.dropped().map(str::to_owned).collect()
}

pub(super) fn refused(result: Result<Outgoing, Refusal>) -> (String, &'static str) {
    let refusal = result.map(|outgoing| outgoing.request.body).unwrap_err();
    (refusal.param().to_owned(), refusal.code())
}

pub(super) fn whole(outgoing: &Outgoing, body: &Value) -> Result<Answer, UpstreamError> {
    reply(outgoing, 200, &HeaderMap::new(), body)
}

pub(super) fn reply(
    outgoing: &Outgoing,
    status: u16,
    headers: &HeaderMap,
    body: &Value,
) -> Result<Answer, UpstreamError> {
    outgoing.reader.whole(&Reply { status, headers, body: body.to_string().as_bytes(), at: now() })
}

/// An error response, read.
pub(super) fn failed(outgoing: &Outgoing, status: u16, body: &Value) -> UpstreamError {
    reply(outgoing, status, &HeaderMap::new(), body).unwrap_err()
}

/// One event; its name is its `type`, as Anthropic has it.
pub(super) fn event(data: &Value) -> SseEvent {
    SseEvent { event: data["type"].as_str().unwrap_or_default().to_owned(), data: data.to_string() }
}

pub(super) fn done() -> SseEvent {
    SseEvent { event: String::new(), data: "[DONE]".to_owned() }
}

/// A stream that ended well.
pub(super) struct Streamed {
    pub(super) chunks: Vec<Value>,
    pub(super) usage: Usage,
}

pub(super) fn stream(mut reader: AnswerReader, events: &[SseEvent]) -> Result<Streamed, UpstreamError> {
    let mut chunks = Vec::new();
    for event in events {
        chunks.extend(reader.event(event)?);
    }
    assert!(chunks.iter().flat_map(|chunk| &chunk.choices).all(|choice| choice.finish.is_none()), "a finish too early");
    let ended = reader.end()?;
    chunks.extend(ended.chunks);
    Ok(Streamed { chunks: chunks.iter().map(Chunk::to_json).collect(), usage: ended.usage })
}

/// Chunks put together as OpenAI's SDK does: texts are joined, entries of lists found by their index, the rest replaced.
pub(super) fn gathered(chunks: &[Value]) -> Value {
    let mut choices: Vec<Value> = Vec::new();
    for choice in chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()) {
        let index = choice["index"].as_u64().unwrap() as usize;
        if choices.len() <= index {
            choices.resize_with(index + 1, || json!({"message": {}, "finish_reason": null}));
        }
        merge(&mut choices[index]["message"], &choice["delta"]);
        if !choice["finish_reason"].is_null() {
            assert!(choices[index]["finish_reason"].is_null(), "two ends");
            choices[index]["finish_reason"] = choice["finish_reason"].clone();
        }
    }
    choices.into()
}

fn merge(to: &mut Value, delta: &Value) {
    for (name, new) in delta.as_object().unwrap() {
        let old = &mut to[name.as_str()];
        match (&mut *old, new) {
            (Value::String(old), Value::String(new)) if !matches!(name.as_str(), "role" | "type" | "id") => {
                old.push_str(new);
            }
            (Value::Object(_), Value::Object(_)) => merge(old, new),
            (Value::Array(_) | Value::Null, Value::Array(new)) if name == "tool_calls" => {
                if old.is_null() {
                    *old = json!([]);
                }
                for entry in new {
                    let index = entry["index"].as_u64().unwrap() as usize;
                    let list = old.as_array_mut().unwrap();
                    assert!(index <= list.len(), "a call was skipped");
                    if index == list.len() {
                        list.push(json!({}));
                    }
                    merge(&mut list[index], entry);
                }
            }
            (old, new) => *old = new.clone(),
        }
    }
}

#[test]
fn credentials_go_where_each_provider_wants_them_and_do_not_show() {
    for (provider, model, header, value) in [
        (Provider::OpenAi, "gpt-5.5", "authorization", "Bearer hunter2hunter2"),
        (Provider::Anthropic, "claude-opus-5-5", "x-api-key", "hunter2hunter2"),
        (Provider::Gemini, "gemini-3.8-flash", "x-goog-api-key", "hunter2hunter2"),
        (Provider::Azure(AzureForm::V1), "gpt-5.5", "api-key", "hunter2hunter2"),
        (Provider::Compatible, "llama", "authorization", "Bearer hunter2hunter2"),
    ] {
        let outgoing = Asked::of(provider.clone(), model).send(hi(json!({}))).unwrap();
        assert_eq!(outgoing.request.headers[header].to_str().unwrap(), value);
        assert_eq!(outgoing.request.headers["content-type"], "application/json");
        assert!(!format!("{outgoing:?}").contains("hunter2"), "{provider:?}");
        assert!(!outgoing.request.url.as_str().contains("hunter2"));
        let asked = Asked::of(provider.clone(), model);
        let token = Endpoint::new(&provider, asked.base, Credential::Bearer(Secret::new("entra"))).unwrap();
        let request = ChatRequest::read(object(hi(json!({})))).unwrap();
        let outgoing = provider.chat(&asked.call(&token), &request).unwrap();
        assert_eq!(outgoing.request.headers["authorization"].to_str().unwrap(), "Bearer entra");
        assert_eq!(outgoing.request.headers.len(), if provider == Provider::Anthropic { 3 } else { 2 });
    }
}

#[test]
fn a_tenant_s_limit_is_sent_where_the_request_has_none_and_the_model_s_is_never_passed() {
    let asked = Asked::of(Provider::OpenAi, "gpt-5.5");
    let endpoint = asked.endpoint();
    let limit = |max_output_tokens, body: Value| {
        let call = Call { max_output_tokens, ..asked.call(&endpoint) };
        let request = ChatRequest::read(object(hi(body))).unwrap();
        asked.provider.chat(&call, &request).unwrap()
    };
    assert_eq!(limit(None, json!({})).request.body["max_completion_tokens"], 128_000);
    assert_eq!(limit(Some(500), json!({})).request.body["max_completion_tokens"], 500);
    assert_eq!(limit(Some(500), json!({"max_tokens": 900, "n": 3})).max_output_tokens, Some(2700));
    let high = limit(None, json!({"max_tokens": 900_000}));
    assert_eq!(high.request.body["max_completion_tokens"], 128_000);
    assert!(high.warnings.header().unwrap().contains("900000 sent as 128000"));
}

#[test]
fn strict_tenants_get_a_refusal_instead_of_a_drop() {
    let mut asked = Asked::of(Provider::Anthropic, "claude-opus-5-5");
    let body = hi(json!({"seed": 7}));
    assert_eq!(dropped(&asked.send(body.clone()).unwrap()), ["seed"]);
    asked.fields = UnmappedFields::Refuse;
    assert_eq!(refused(asked.send(body)), ("seed".to_owned(), "unsupported_parameter"));
    assert!(asked.send(hi(json!({}))).is_ok());
}

#[test]
fn an_answer_that_is_none_is_an_error_and_not_an_empty_success() {
    for (provider, model) in [
        (Provider::OpenAi, "gpt-5.5"),
        (Provider::Anthropic, "claude-opus-5-5"),
        (Provider::Gemini, "gemini-3.8-flash"),
        (Provider::Compatible, "llama"),
    ] {
        let outgoing = Asked::of(provider, model).send(hi(json!({}))).unwrap();
        for body in [
            json!({}),
            json!([]),
            json!("hi"),
            json!({"choices": []}),
            json!({"content": []}),
            json!({"candidates": []}),
        ] {
            assert!(whole(&outgoing, &body).is_err(), "{body}");
        }
        let reply = |status, body: &[u8]| {
            let headers = HeaderMap::new();
            outgoing.reader.whole(&Reply { status, headers: &headers, body, at: now() }).unwrap_err().cause
        };
        assert_eq!(reply(200, b"<html>"), Cause::Malformed);
        assert_eq!(reply(200, b""), Cause::Malformed);
        assert_eq!(reply(503, b"<html>"), Cause::Failed);
        assert_eq!(reply(429, b""), Cause::RateLimited);
        assert_eq!(reply(302, b""), Cause::Failed);
        assert_eq!(reply(401, b"{\"error\":null}"), Cause::Auth);
    }
}
