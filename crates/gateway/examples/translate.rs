//! Translates requests and replies without sending anything: one JSON object a line in, one out.
//!
//! Exists for `tests/gateway/`, where the providers' own SDKs judge what this crate makes. Must not hold logic of its own.
//! In: `{provider, model, request}`, and of a reply either `{status, answer}` or `{events: [{event, data}]}`. Out: `{url,
//! body, dropped}` or `{refusal}`, and `{answer}`, `{chunks, usage}` or `{error}`.

use std::io::{self, BufRead as _, Write as _};

use anyhow::{Context as _, bail};
use bindery_gateway::providers::{
    Call, Catalogue, ChatRequest, Chunk, Credential, Endpoint, ModelEntry, Outgoing, Provider, Reply, Secret, SseEvent,
    UnmappedFields, UpstreamError,
};
use http::HeaderMap;
use serde_json::{Map, Value, json};

fn main() -> anyhow::Result<()> {
    let catalogue = Catalogue::built_in()?;
    let mut out = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let job: Value = serde_json::from_str(&line?)?;
        writeln!(out, "{}", translate(&catalogue, &job)?)?;
        out.flush()?;
    }
    Ok(())
}

fn translate(catalogue: &Catalogue, job: &Value) -> anyhow::Result<Value> {
    let (provider, base) = match job["provider"].as_str() {
        Some("openai") => (Provider::OpenAi, None),
        Some("anthropic") => (Provider::Anthropic, None),
        Some("gemini") => (Provider::Gemini, None),
        Some("openai-compatible") => (Provider::Compatible, Some("http://127.0.0.1:1/v1")),
        other => bail!("{other:?} is no provider"),
    };
    let endpoint = Endpoint::new(&provider, base, Credential::Key(Secret::new("key")))?;
    let name = job["model"].as_str().context("`model` is a name")?;
    let model = catalogue.find_ever(name).cloned().unwrap_or_else(|| ModelEntry::open(name));
    let at = "2026-11-28T12:00:00Z".parse()?;
    let call = Call {
        endpoint: &endpoint,
        model: &model,
        max_output_tokens: None,
        max_prompt_tokens: 1000,
        fields: UnmappedFields::Drop,
        at,
    };
    let request = job["request"].as_object().context("`request` is an object")?.clone();
    let outgoing = match ChatRequest::read(request).and_then(|request| provider.chat(&call, &request)) {
        Ok(outgoing) => outgoing,
        Err(refusal) => return Ok(json!({"refusal": refusal.to_json()["error"]})),
    };
    let mut result = Map::new();
    result.insert("url".to_owned(), outgoing.request.url.as_str().into());
    result.insert("body".to_owned(), Value::Object(outgoing.request.body.clone()));
    result.insert("dropped".to_owned(), outgoing.warnings.dropped().collect::<Vec<_>>().into());
    if let Some(answer) = job.get("answer") {
        let status = job["status"].as_u64().map_or(Ok(200), u16::try_from)?;
        let headers = HeaderMap::new();
        let body = answer.to_string();
        match outgoing.reader.whole(&Reply { status, headers: &headers, body: body.as_bytes(), at }) {
            Ok(answer) => result.insert("answer".to_owned(), answer.to_json()),
            Err(error) => result.insert("error".to_owned(), error.to_json()),
        };
    }
    if let Some(events) = job["events"].as_array() {
        match chunks(outgoing, events) {
            Ok(chunks) => result.insert("chunks".to_owned(), chunks),
            Err(error) => result.insert("error".to_owned(), error.to_json()),
        };
    }
    Ok(Value::Object(result))
}

fn chunks(outgoing: Outgoing, events: &[Value]) -> Result<Value, UpstreamError> {
    let mut reader = outgoing.reader;
    let mut chunks = Vec::new();
    for event in events {
        let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        chunks.extend(reader.event(&SseEvent { event: text("event"), data: text("data") })?);
    }
    chunks.extend(reader.end()?.chunks);
    Ok(chunks.iter().map(Chunk::to_json).collect())
}
