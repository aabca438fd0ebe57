//! Answers and errors as OpenAI, Azure and compatible servers write them.
//!
//! Nearly a pass-through: the model's name becomes the one asked for, usage is read for the ledger, finish reasons are
//! held back. Fields not known here stay. Invariant: only `[DONE]`, after a finish reason for every choice seen, is an
//! end.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{
    answer::{Answer, AnswerMessage, Choice, ChunkChoice, Delta, Finish, FinishReason, Shape, ToolCallDelta},
    catalogue::ServedTier,
    chat::{ToolCall, ToolCallKind},
    error::{Cause, Native, UpstreamError},
    fields::Word,
    reader::{Ending, Facts, MAX_CHOICES, Piece, SseEvent, cut, malformed},
    reply::Reply,
    usage::Usage,
};

/// Reads a stream.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reader {
    id: String,
    /// Choices seen, and their ends.
    ends: BTreeMap<u32, Option<Finish>>,
    usage: Option<Usage>,
    usage_json: Option<Value>,
    tier: ServedTier,
    /// Of chunks without choices, such as Azure's report on the prompt: they ride on the next chunk that has some.
    waiting: Map<String, Value>,
    is_done: bool,
}

impl Reader {
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn is_done(&self) -> bool {
        self.is_done
    }

    pub(crate) fn usage(&self) -> Option<Usage> {
        self.usage.map(|usage| Usage { tier: self.tier, ..usage })
    }

    pub(crate) fn event(&mut self, facts: &Facts, event: &SseEvent) -> Result<Vec<Piece>, UpstreamError> {
        let data = event.data.trim();
        if self.is_done || data.is_empty() {
            return Ok(Vec::new());
        }
        if data == "[DONE]" {
            self.is_done = true;
            return Ok(Vec::new());
        }
        let value: Value = serde_json::from_str(data).map_err(|_| malformed("an event is not JSON"))?;
        if value.get("error").is_some_and(|error| !error.is_null()) {
            return Err(told(facts, None, Some(&value)));
        }
        let Value::Object(mut map) = value else { return Err(malformed("an event is not an object")) };
        if let Some(Value::String(id)) = map.get("id")
            && self.id.is_empty()
        {
            self.id.clone_from(id);
        }
        self.take_usage(&mut map);
        let choices = match map.shift_remove("choices") {
            Some(Value::Array(choices)) => choices,
            None | Some(Value::Null) => Vec::new(),
            Some(_) => return Err(malformed("`choices` is not an array")),
        };
        let choices = choices.into_iter().map(|choice| self.choice(facts.shape, choice)).collect::<Result<_, _>>()?;
        Ok(self.piece(choices, rest(map)))
    }

    pub(crate) fn end(&mut self) -> Result<Ending, UpstreamError> {
        if !self.is_done || self.ends.is_empty() {
            return Err(cut());
        }
        let choices = std::mem::take(&mut self.ends).into_iter().map(|(index, finish)| match finish {
            Some(_) => Ok(ChunkChoice { index, finish, ..ChunkChoice::default() }),
            None => Err(cut()),
        });
        let choices = choices.collect::<Result<_, _>>()?;
        Ok(Ending { choices, usage: self.usage(), usage_json: self.usage_json.take() })
    }

    fn take_usage(&mut self, map: &mut Map<String, Value>) {
        if let Some(tier) = map.get("service_tier").and_then(Value::as_str) {
            self.tier = ServedTier::from_wire(tier);
        }
        if let Some(json) = map.shift_remove("usage")
            && let Some(usage) = Usage::from_openai(&json)
        {
            (self.usage, self.usage_json) = (Some(usage), Some(json));
        }
    }

    /// Leaves out what says nothing once its finish reason is held back.
    fn piece(&mut self, choices: Vec<ChunkChoice>, extra: Map<String, Value>) -> Vec<Piece> {
        if choices.is_empty() {
            // A client that indexes choices[0] must not meet an empty list in the middle.
            let reports = extra.into_iter().filter(|(name, _)| name.starts_with("prompt_"));
            self.waiting.extend(reports);
            return Vec::new();
        }
        let choices: Vec<ChunkChoice> = choices.into_iter().filter(says_something).collect();
        if choices.is_empty() {
            return Vec::new();
        }
        let mut extra = extra;
        extra.extend(std::mem::take(&mut self.waiting));
        vec![Piece { choices, extra }]
    }

    fn choice(&mut self, shape: Shape, choice: Value) -> Result<ChunkChoice, UpstreamError> {
        let Value::Object(mut map) = choice else { return Err(malformed("a choice is not an object")) };
        let index = index_of(&map)?;
        map.shift_remove("index");
        let finish = take_finish(&mut map);
        let delta = match shape {
            Shape::Chat => match map.shift_remove("delta") {
                Some(Value::Object(delta)) => read_delta(delta)?,
                None | Some(Value::Null) => Delta::default(),
                Some(_) => return Err(malformed("`delta` is not an object")),
            },
            Shape::Text => Delta { content: take_text(&mut map, "text")?, ..Delta::default() },
        };
        if self.ends.len() >= MAX_CHOICES && !self.ends.contains_key(&index) {
            return Err(malformed("it has more choices than anyone asks for"));
        }
        let end = self.ends.entry(index).or_default();
        if finish.is_some() {
            *end = finish;
        }
        let logprobs = map.shift_remove("logprobs").filter(|logprobs| !logprobs.is_null());
        Ok(ChunkChoice { index, delta, finish: None, logprobs, extra: map })
    }
}

fn says_something(choice: &ChunkChoice) -> bool {
    !choice.delta.is_empty() || choice.logprobs.is_some() || !choice.extra.is_empty()
}

/// Fields of an answer or chunk that stay: all but what its head says.
fn rest(mut map: Map<String, Value>) -> Map<String, Value> {
    map.retain(|name, value| !matches!(name.as_str(), "id" | "object" | "created" | "model") && !value.is_null());
    map
}

fn index_of(map: &Map<String, Value>) -> Result<u32, UpstreamError> {
    match map.get("index") {
        // Some servers leave it out where there is one choice.
        None | Some(Value::Null) => Ok(0),
        Some(value) => value
            .as_u64()
            .and_then(|index| u32::try_from(index).ok())
            .ok_or_else(|| malformed("an `index` is not a small number")),
    }
}

fn take_finish(map: &mut Map<String, Value>) -> Option<Finish> {
    match map.shift_remove("finish_reason") {
        Some(Value::String(word)) => Some(match FinishReason::from_word(&word) {
            Some(reason) => Finish::plain(reason),
            None => Finish { reason: FinishReason::Stop, native: Some(word) },
        }),
        _ => None,
    }
}

fn take_text(map: &mut Map<String, Value>, name: &str) -> Result<Option<String>, UpstreamError> {
    match map.shift_remove(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(malformed("a text is not a string")),
    }
}

/// Text and thoughts. Mistral's reasoning models write both as parts of one list.
fn take_content(map: &mut Map<String, Value>) -> Result<(Option<String>, Option<String>), UpstreamError> {
    if !map.get("content").is_some_and(Value::is_array) {
        return Ok((take_text(map, "content")?, take_reasoning(map)?));
    }
    let (mut content, mut reasoning) = (String::new(), take_reasoning(map)?.unwrap_or_default());
    let parts = map.shift_remove("content");
    for part in parts.iter().filter_map(Value::as_array).flatten() {
        match part["type"].as_str() {
            Some("text") => {
                content.push_str(part["text"].as_str().ok_or_else(|| malformed("a text part has no `text`"))?);
            }
            Some("thinking") => match &part["thinking"] {
                Value::String(thought) => reasoning.push_str(thought),
                thoughts => {
                    let texts =
                        thoughts.as_array().into_iter().flatten().filter_map(|thought| thought["text"].as_str());
                    reasoning.extend(texts);
                }
            },
            _ => return Err(malformed("a part of `content` is neither text nor thinking")),
        }
    }
    Ok((Some(content), Some(reasoning).filter(|reasoning| !reasoning.is_empty())))
}

/// vLLM's newer servers call it `reasoning`.
fn take_reasoning(map: &mut Map<String, Value>) -> Result<Option<String>, UpstreamError> {
    match take_text(map, "reasoning_content")? {
        Some(text) => Ok(Some(text)),
        None if map.get("reasoning").is_some_and(|value| value.is_string() || value.is_null()) => {
            take_text(map, "reasoning")
        }
        None => Ok(None),
    }
}

fn read_delta(mut map: Map<String, Value>) -> Result<Delta, UpstreamError> {
    let opens = map.shift_remove("role").is_some_and(|role| !role.is_null());
    let calls = match map.shift_remove("tool_calls") {
        Some(Value::Array(calls)) => calls,
        None | Some(Value::Null) => Vec::new(),
        Some(_) => return Err(malformed("`tool_calls` is not an array")),
    };
    let (content, reasoning) = take_content(&mut map)?;
    Ok(Delta {
        opens,
        content,
        refusal: take_text(&mut map, "refusal")?,
        reasoning,
        tool_calls: calls.into_iter().map(read_call_delta).collect::<Result<_, _>>()?,
        extra: without_nulls(map),
    })
}

fn without_nulls(mut map: Map<String, Value>) -> Map<String, Value> {
    map.retain(|_, value| !value.is_null());
    map
}

fn read_call_delta(call: Value) -> Result<ToolCallDelta, UpstreamError> {
    let Value::Object(mut map) = call else { return Err(malformed("a tool call is not an object")) };
    let index = index_of(&map)?;
    map.shift_remove("index");
    let (id, kind) = (take_text(&mut map, "id")?, take_text(&mut map, "type")?);
    let (name, arguments) = match map.shift_remove("function") {
        Some(Value::Object(mut function)) => {
            (take_text(&mut function, "name")?, take_text(&mut function, "arguments")?)
        }
        None | Some(Value::Null) => (None, None),
        Some(_) => return Err(malformed("`function` is not an object")),
    };
    Ok(ToolCallDelta { index, id, kind, name, arguments, extra: without_nulls(map) })
}

/// What was counted.
pub(crate) fn counted(body: &Value) -> Option<Usage> {
    let tier = body["service_tier"].as_str().map(ServedTier::from_wire).unwrap_or_default();
    Usage::from_openai(&body["usage"]).map(|usage| Usage { tier, ..usage })
}

/// A whole answer.
pub(crate) fn whole(facts: &Facts, body: Value) -> Result<Answer, UpstreamError> {
    let Value::Object(mut map) = body else { return Err(malformed("it is not an object")) };
    let id = map.get("id").and_then(Value::as_str).unwrap_or_default().to_owned();
    let usage_json = map.shift_remove("usage").filter(|usage| !usage.is_null());
    let tier = map.get("service_tier").and_then(Value::as_str).map(ServedTier::from_wire).unwrap_or_default();
    let usage = usage_json.as_ref().and_then(Usage::from_openai).map(|usage| Usage { tier, ..usage });
    let Some(Value::Array(choices)) = map.shift_remove("choices") else {
        return Err(malformed("it has no `choices`"));
    };
    let choices = (0_u32..).zip(choices).map(|(at, choice)| whole_choice(facts.shape, at, choice));
    let choices = choices.collect::<Result<_, _>>()?;
    Ok(Answer {
        head: facts.head(&id),
        choices,
        usage: usage.unwrap_or_default(),
        usage_json: usage_json.filter(|_| usage.is_some()),
        extra: rest(map),
    })
}

/// Some servers number no choices.
fn whole_choice(shape: Shape, at: u32, choice: Value) -> Result<Choice, UpstreamError> {
    let Value::Object(mut map) = choice else { return Err(malformed("a choice is not an object")) };
    let index = if map.get("index").is_none_or(Value::is_null) { at } else { index_of(&map)? };
    map.shift_remove("index");
    let finish = take_finish(&mut map).ok_or_else(|| malformed("a choice has no `finish_reason`"))?;
    let message = match shape {
        Shape::Chat => match map.shift_remove("message") {
            Some(Value::Object(message)) => read_message(message)?,
            _ => return Err(malformed("a choice has no `message`")),
        },
        Shape::Text => AnswerMessage { content: take_text(&mut map, "text")?, ..AnswerMessage::default() },
    };
    let logprobs = map.shift_remove("logprobs").filter(|logprobs| !logprobs.is_null());
    Ok(Choice { index, message, finish, logprobs, extra: without_nulls(map) })
}

fn read_message(mut map: Map<String, Value>) -> Result<AnswerMessage, UpstreamError> {
    map.shift_remove("role");
    let calls = match map.shift_remove("tool_calls") {
        Some(Value::Array(calls)) => calls,
        _ => Vec::new(),
    };
    let (content, reasoning) = take_content(&mut map)?;
    Ok(AnswerMessage {
        content,
        refusal: take_text(&mut map, "refusal")?,
        reasoning,
        tool_calls: calls.into_iter().map(read_call).collect::<Result<_, _>>()?,
        extra: without_nulls(map),
    })
}

fn read_call(call: Value) -> Result<ToolCall, UpstreamError> {
    let Value::Object(mut map) = call else { return Err(malformed("a tool call is not an object")) };
    let id = take_text(&mut map, "id")?.unwrap_or_default();
    map.shift_remove("type");
    let text = |value: &Value, name: &str| value[name].as_str().unwrap_or_default().to_owned();
    let kind = match (map.shift_remove("function"), map.shift_remove("custom")) {
        (Some(function), _) => {
            ToolCallKind::Function { name: text(&function, "name"), arguments: text(&function, "arguments") }
        }
        (None, Some(custom)) => ToolCallKind::Custom { name: text(&custom, "name"), input: text(&custom, "input") },
        (None, None) => return Err(malformed("a tool call has no `function`")),
    };
    // vLLM numbers them in whole answers, too.
    map.shift_remove("index");
    Ok(ToolCall { id, kind, extra: without_nulls(map) })
}

/// A response that is not a success.
pub(crate) fn error(facts: &Facts, reply: &Reply, body: Option<&Value>) -> UpstreamError {
    told(facts, Some(reply.status), body)
}

/// An error object, in a response or in a stream.
fn told(facts: &Facts, status: Option<u16>, body: Option<&Value>) -> UpstreamError {
    // Proxies put it in a list; older vLLM, and the gateway before Azure's, at the top.
    let body = body.map(|body| body.get(0).unwrap_or(body));
    let object = body.map(|body| body.get("error").filter(|error| !error.is_null()).unwrap_or(body));
    let text = |name: &str| object.and_then(|object| object.get(name)).and_then(as_text);
    let message = match object {
        Some(Value::String(message)) => Some(message.clone()),
        _ => text("message").or_else(|| text("detail")),
    };
    let native = Native { status, kind: text("type"), code: text("code"), message };
    // Without a status, the code may be one.
    let status = status.filter(|status| *status >= 400);
    let status = status.or_else(|| native.code.as_deref().and_then(|code| code.parse().ok())).unwrap_or(500);
    let cause = cause(status, &native);
    let param = text("param");
    let mut details = Map::new();
    if cause == Cause::ContentFilter
        && let Some(inner) = object.and_then(|object| object.get("innererror").or_else(|| object.get("inner_error")))
    {
        details.insert("innererror".to_owned(), inner.clone());
    }
    let mut error = facts.told(cause, &native);
    if cause.own_message().is_none() {
        error.param = param;
    }
    error.details = Box::new(details);
    error
}

/// Codes come as numbers, too.
fn as_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

fn cause(status: u16, native: &Native) -> Cause {
    let says = |text: &str| native.message.as_deref().is_some_and(|message| message.contains(text));
    match native.code.as_deref() {
        Some("context_length_exceeded") => return Cause::ContextLength,
        Some("content_filter" | "content_policy_violation") => return Cause::ContentFilter,
        Some("insufficient_quota" | "credit_balance_exhausted" | "billing_hard_limit_reached") => return Cause::Quota,
        Some("model_not_found" | "DeploymentNotFound") => return Cause::ModelUnavailable,
        Some("rate_limit_exceeded" | "slow_down") => return Cause::RateLimited,
        Some("server_is_overloaded") => return Cause::Overloaded,
        Some("invalid_api_key") => return Cause::Auth,
        _ => {}
    }
    match native.kind.as_deref() {
        Some("insufficient_quota") => Cause::Quota,
        Some("overloaded_error") => Cause::Overloaded,
        Some("invalid_request_error") if status >= 500 => Cause::Invalid,
        // vLLM and llama.cpp give no code for it.
        _ if status == 400 && (says("maximum context length") || says("exceeds the available context size")) => {
            Cause::ContextLength
        }
        _ => Cause::of_status(status),
    }
}
