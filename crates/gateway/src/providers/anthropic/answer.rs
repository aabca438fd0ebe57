//! Whole answers of the Messages API, its words for endings and its errors.
//!
//! Invariant: counts are turned into OpenAI's sense here and nowhere else: the cache is part of the prompt.

use serde_json::{Map, Value, json};

use super::{Format, Reader};
use crate::providers::{
    answer::{Answer, AnswerMessage, Choice, Finish, FinishReason},
    catalogue::ServedTier,
    chat::{ToolCall, ToolCallKind},
    error::{Cause, Native, UpstreamError},
    reader::{Facts, MAX_TOOL_CALLS, malformed, unfit},
    reply::Reply,
    usage::Usage,
};

impl Reader {
    /// Reads a message.
    pub(crate) fn whole(&self, facts: &Facts, body: &Value) -> Result<Answer, UpstreamError> {
        let blocks = body["content"].as_array().ok_or_else(|| malformed("it has no `content`"))?;
        let stop = body["stop_reason"].as_str().ok_or_else(|| malformed("it has no `stop_reason`"))?;
        let mut message = AnswerMessage::default();
        let mut thoughts = Vec::new();
        for block in blocks {
            self.block(block, &mut message, &mut thoughts)?;
        }
        let finish = self.finish(stop);
        message.refusal = refusal(&finish, body.get("stop_details"));
        if !thoughts.is_empty() {
            message.extra = carried(&self.model, &thoughts);
        }
        let usage = read_usage(&body["usage"], Usage::default());
        Ok(Answer {
            head: facts.head(&answer_id(body["id"].as_str().unwrap_or_default())),
            choices: vec![Choice { index: 0, message, finish, logprobs: None, extra: Map::new() }],
            usage,
            usage_json: None,
            extra: Map::new(),
        })
    }

    fn block(
        &self,
        block: &Value,
        message: &mut AnswerMessage,
        thoughts: &mut Vec<Value>,
    ) -> Result<(), UpstreamError> {
        let text = |name: &str| block[name].as_str().unwrap_or_default();
        match text("type") {
            "text" => message.content.get_or_insert_default().push_str(text("text")),
            "thinking" => {
                message.reasoning.get_or_insert_default().push_str(text("thinking"));
                thoughts.push(block.clone());
            }
            "redacted_thinking" => thoughts.push(block.clone()),
            "tool_use" => {
                let input = block["input"].as_object().ok_or_else(|| malformed("a call's input is not an object"))?;
                let arguments = Value::Object(input.clone()).to_string();
                match &self.format {
                    Format::ForcedTool(name) if *name == text("name") => {
                        message.content.get_or_insert_default().push_str(&arguments);
                    }
                    Format::ForcedTool(_) | Format::Text | Format::CheckedJson => {
                        if message.tool_calls.len() >= MAX_TOOL_CALLS {
                            return Err(unfit("it has more tool calls than anyone runs"));
                        }
                        let kind = ToolCallKind::Function { name: text("name").to_owned(), arguments };
                        message.tool_calls.push(ToolCall { id: text("id").to_owned(), kind, extra: Map::new() });
                    }
                }
            }
            // What the provider's own tools did, and what comes later: no part of a chat answer.
            _ => {}
        }
        Ok(())
    }

    /// OpenAI's word for an ending.
    pub(super) fn finish(&self, stop: &str) -> Finish {
        let reason = match (stop, &self.format) {
            ("tool_use", Format::Text | Format::CheckedJson) => FinishReason::ToolCalls,
            ("max_tokens" | "model_context_window_exceeded" | "pause_turn", _) => FinishReason::Length,
            ("refusal", _) => FinishReason::ContentFilter,
            // end_turn, stop_sequence, a forced tool's call, and what comes later.
            _ => FinishReason::Stop,
        };
        Finish { reason, native: Some(stop.to_owned()) }
    }
}

/// Why it declined, where it did.
pub(super) fn refusal(finish: &Finish, details: Option<&Value>) -> Option<String> {
    if finish.reason != FinishReason::ContentFilter {
        return None;
    }
    let details = details.unwrap_or(&Value::Null);
    let said = details["explanation"].as_str().or_else(|| details["category"].as_str());
    Some(said.unwrap_or("the model declined to answer").to_owned())
}

/// Signed thoughts ride in the message, under the model that wrote them.
pub(super) fn carried(model: &str, thoughts: &[Value]) -> Map<String, Value> {
    let mut extra = Map::new();
    let content = json!({"anthropic": {"model": model, "thinking_blocks": thoughts}});
    extra.insert("extra_content".to_owned(), content);
    extra
}

/// Ids look like OpenAI's.
pub(super) fn answer_id(id: &str) -> String {
    format!("chatcmpl-{id}")
}

/// What was counted in a whole answer.
pub(crate) fn counted(body: &Value) -> Option<Usage> {
    let usage = &body["usage"];
    usage["output_tokens"].is_u64().then(|| read_usage(usage, Usage::default()))
}

/// Counts over earlier ones: a stream repeats them, and leaves out what has not changed.
pub(super) fn read_usage(usage: &Value, before: Usage) -> Usage {
    let count = |value: &Value| value.as_u64();
    let fresh = before.prompt.saturating_sub(before.cached).saturating_sub(before.cache_write);
    let cached = count(&usage["cache_read_input_tokens"]).unwrap_or(before.cached);
    let cache_write = count(&usage["cache_creation_input_tokens"]).unwrap_or(before.cache_write);
    let input = count(&usage["input_tokens"]).unwrap_or(fresh);
    let tier = usage["service_tier"].as_str().map_or(before.tier, ServedTier::from_wire);
    Usage {
        prompt: input.saturating_add(cached).saturating_add(cache_write),
        cached,
        cache_write,
        completion: count(&usage["output_tokens"]).unwrap_or(before.completion),
        reasoning: count(&usage["output_tokens_details"]["thinking_tokens"]).unwrap_or(before.reasoning),
        estimated: false,
        // Its priority tier is capacity bought ahead, not a dearer list.
        tier: if tier == ServedTier::Priority { ServedTier::Standard } else { tier },
    }
}

/// A response that is not a success.
pub(crate) fn error(facts: &Facts, reply: &Reply, body: Option<&Value>) -> UpstreamError {
    told(facts, Some(reply.status), body)
}

/// An error object, in a response or in a stream.
pub(super) fn told(facts: &Facts, status: Option<u16>, body: Option<&Value>) -> UpstreamError {
    let object = body.map_or(&Value::Null, |body| &body["error"]);
    let text = |name: &str| object[name].as_str().map(str::to_owned);
    let native = Native { status, kind: text("type"), code: None, message: text("message") };
    let says = |text: &str| native.message.as_deref().is_some_and(|message| message.contains(text));
    let cause = match native.kind.as_deref() {
        Some("invalid_request_error") if says("prompt is too long") => Cause::ContextLength,
        Some("invalid_request_error") if says("credit balance is too low") => Cause::Quota,
        Some("invalid_request_error") => Cause::Invalid,
        Some("authentication_error" | "permission_error") => Cause::Auth,
        Some("billing_error") => Cause::Quota,
        Some("not_found_error") => Cause::ModelUnavailable,
        Some("request_too_large") => Cause::TooLarge,
        Some("rate_limit_error") => Cause::RateLimited,
        Some("timeout_error") => Cause::Timeout,
        Some("overloaded_error") => Cause::Overloaded,
        Some("api_error" | "conflict_error") => Cause::Failed,
        _ => Cause::of_status(status.filter(|status| *status >= 400).unwrap_or(500)),
    };
    facts.told(cause, &native)
}
