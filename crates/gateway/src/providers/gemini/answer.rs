//! Answers of generateContent, whole and event by event, its words for endings and its errors.
//!
//! Invariant: a prompt that was blocked is an answer that was withheld, never an empty success; an ending that means the
//! model's output is broken is an error, never `stop`.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::EXTRA_CONTENT;
use crate::providers::{
    answer::{Answer, AnswerMessage, Choice, ChunkChoice, Delta, Finish, FinishReason, ToolCallDelta},
    catalogue::ServedTier,
    chat::{ToolCall, ToolCallKind},
    error::{Cause, Native, UpstreamError},
    reader::{Ending, Facts, MAX_TOOL_CALLS, Piece, SseEvent, cut, malformed, unfit},
    reply::{self, Reply},
    usage::Usage,
};

/// OpenAI's mark for a log-probability that is not known.
const UNKNOWN_LOGPROB: f64 = -9999.0;

/// Reads whole answers and streams.
#[derive(Clone, Debug)]
pub(crate) struct Reader {
    num_answers: u64,
    /// Empty until the first event.
    id: String,
    /// Where the provider gives none.
    own_id: String,
    usage: Option<Usage>,
    candidates: BTreeMap<u32, Candidate>,
}

/// One answer so far.
#[derive(Clone, Debug, Default)]
struct Candidate {
    has_opened: bool,
    num_calls: u32,
    finish: Option<Finish>,
}

impl Reader {
    pub(super) fn new(num_answers: u64) -> Self {
        let own_id = uuid::Uuid::new_v4().simple().to_string();
        Self { num_answers, id: String::new(), own_id, usage: None, candidates: BTreeMap::new() }
    }

    pub(crate) fn id(&self) -> String {
        format!("chatcmpl-{}", self.id)
    }

    pub(crate) fn usage(&self) -> Option<Usage> {
        self.usage
    }

    /// A whole answer is a stream of one event.
    pub(crate) fn whole(&self, facts: &Facts, body: &Value) -> Result<Answer, UpstreamError> {
        let mut reader = self.clone();
        let pieces = reader.read(facts, body)?;
        let ending = reader.end().map_err(|_| malformed("a candidate has no `finishReason`"))?;
        let mut choices: BTreeMap<u32, Choice> = BTreeMap::new();
        for end in ending.choices {
            let finish = end.finish.unwrap_or_else(|| Finish::plain(FinishReason::Stop));
            let (index, message) = (end.index, AnswerMessage::default());
            choices.insert(index, Choice { index, message, finish, logprobs: None, extra: Map::new() });
        }
        for new in pieces.into_iter().flat_map(|piece| piece.choices) {
            if let Some(choice) = choices.get_mut(&new.index) {
                gather(choice, new);
            }
        }
        Ok(Answer {
            head: facts.head(&reader.id()),
            choices: choices.into_values().collect(),
            usage: ending.usage.unwrap_or_default(),
            usage_json: None,
            extra: Map::new(),
        })
    }

    pub(crate) fn event(&mut self, facts: &Facts, event: &SseEvent) -> Result<Vec<Piece>, UpstreamError> {
        if event.data.trim().is_empty() {
            return Ok(Vec::new());
        }
        let value: Value = serde_json::from_str(&event.data).map_err(|_| malformed("an event is not JSON"))?;
        self.read(facts, &value)
    }

    pub(crate) fn end(&mut self) -> Result<Ending, UpstreamError> {
        if self.candidates.is_empty() {
            return Err(cut());
        }
        let choices = std::mem::take(&mut self.candidates).into_iter().map(|(index, candidate)| {
            let finish = candidate.finish.ok_or_else(cut)?;
            Ok(ChunkChoice { index, finish: Some(finish), ..ChunkChoice::default() })
        });
        Ok(Ending { choices: choices.collect::<Result<_, _>>()?, usage: self.usage, usage_json: None })
    }

    fn read(&mut self, facts: &Facts, value: &Value) -> Result<Vec<Piece>, UpstreamError> {
        if value.get("error").is_some_and(|error| !error.is_null()) {
            return Err(told(facts, None, Some(value)));
        }
        if !value.is_object() {
            return Err(malformed("an event is not an object"));
        }
        if self.id.is_empty() {
            let id = value["responseId"].as_str().filter(|id| !id.is_empty());
            self.id = id.unwrap_or(&self.own_id).to_owned();
        }
        if value["usageMetadata"].is_object() {
            self.usage = Some(read_usage(&value["usageMetadata"]));
        }
        if let Some(reason) = value["promptFeedback"]["blockReason"].as_str() {
            return Ok(self.blocked(reason, value["promptFeedback"]["blockReasonMessage"].as_str()));
        }
        let mut pieces = Vec::new();
        for candidate in value["candidates"].as_array().into_iter().flatten() {
            pieces.extend(self.candidate(facts, candidate)?);
        }
        Ok(pieces)
    }

    /// The prompt was stopped by a filter: an answer that is withheld.
    fn blocked(&mut self, reason: &str, message: Option<&str>) -> Vec<Piece> {
        let finish = Finish { reason: FinishReason::ContentFilter, native: Some(reason.to_owned()) };
        self.candidates.entry(0).or_default().finish = Some(finish);
        let refusal = message.map_or_else(|| format!("the prompt was blocked ({reason})"), str::to_owned);
        vec![Piece::of(0, Delta { opens: true, refusal: Some(refusal), ..Delta::default() })]
    }

    fn candidate(&mut self, facts: &Facts, value: &Value) -> Result<Vec<Piece>, UpstreamError> {
        let index = match value.get("index") {
            None | Some(Value::Null) => 0,
            Some(index) => index
                .as_u64()
                .filter(|index| *index < self.num_answers)
                .ok_or_else(|| malformed("it has more candidates than were asked for"))?
                as u32,
        };
        let call_prefix = format!("call_{}_{index}", self.id);
        let candidate = self.candidates.entry(index).or_default();
        let mut deltas = Vec::new();
        for part in value["content"]["parts"].as_array().into_iter().flatten() {
            deltas.extend(candidate.part(part, &call_prefix)?);
        }
        if let Some(reason) = value["finishReason"].as_str() {
            let finish = finish(facts, reason, candidate.num_calls)?;
            if finish.reason == FinishReason::ContentFilter {
                let said = value["finishMessage"].as_str();
                let refusal = said.map_or_else(|| format!("the answer was withheld ({reason})"), str::to_owned);
                deltas.push(Delta { refusal: Some(refusal), ..Delta::default() });
            }
            candidate.finish = Some(finish);
        }
        let logprobs = read_logprobs(&value["logprobsResult"]);
        if logprobs.is_some() && deltas.is_empty() {
            deltas.push(Delta::default());
        }
        if let Some(first) = deltas.first_mut().filter(|_| !candidate.has_opened) {
            first.opens = true;
            candidate.has_opened = true;
        }
        let mut pieces: Vec<Piece> = deltas.into_iter().map(|delta| Piece::of(index, delta)).collect();
        if let Some(choice) = pieces.first_mut().and_then(|piece| piece.choices.first_mut()) {
            choice.logprobs = logprobs;
        }
        Ok(pieces)
    }
}

impl Candidate {
    fn part(&mut self, part: &Value, call_prefix: &str) -> Result<Option<Delta>, UpstreamError> {
        if let Some(text) = part["text"].as_str() {
            let text = Some(text.to_owned()).filter(|text| !text.is_empty());
            let delta = if part["thought"] == true {
                Delta { reasoning: text, ..Delta::default() }
            } else {
                Delta { content: text, ..Delta::default() }
            };
            return Ok(Some(delta).filter(|delta| !delta.is_empty()));
        }
        let call = &part["functionCall"];
        let Some(name) = call["name"].as_str() else { return Ok(None) };
        if self.num_calls as usize >= MAX_TOOL_CALLS {
            return Err(unfit("it has more tool calls than anyone runs"));
        }
        let arguments = match &call["args"] {
            Value::Object(args) => Value::Object(args.clone()).to_string(),
            Value::Null => "{}".to_owned(),
            _ => return Err(malformed("a call's arguments are not an object")),
        };
        let index = self.num_calls;
        self.num_calls += 1;
        let id = call["id"].as_str().filter(|id| !id.is_empty());
        // Without an id: one of ours, the same however often this answer is read.
        let id = id.map_or_else(|| format!("{call_prefix}_{index}"), str::to_owned);
        let mut extra = Map::new();
        if let Some(signature) = part["thoughtSignature"].as_str() {
            extra.insert(EXTRA_CONTENT.to_owned(), json!({"google": {"thought_signature": signature}}));
        }
        let call = ToolCallDelta {
            index,
            id: Some(id),
            kind: Some("function".to_owned()),
            name: Some(name.to_owned()),
            arguments: Some(arguments),
            extra,
        };
        Ok(Some(Delta { tool_calls: vec![call], ..Delta::default() }))
    }
}

/// Adds a piece to a whole answer.
fn gather(choice: &mut Choice, new: ChunkChoice) {
    let add = |to: &mut Option<String>, more: Option<String>| {
        if let Some(more) = more {
            to.get_or_insert_default().push_str(&more);
        }
    };
    let message = &mut choice.message;
    add(&mut message.content, new.delta.content);
    add(&mut message.refusal, new.delta.refusal);
    add(&mut message.reasoning, new.delta.reasoning);
    message.tool_calls.extend(new.delta.tool_calls.into_iter().map(|call| ToolCall {
        id: call.id.unwrap_or_default(),
        kind: ToolCallKind::Function {
            name: call.name.unwrap_or_default(),
            arguments: call.arguments.unwrap_or_default(),
        },
        extra: call.extra,
    }));
    choice.logprobs = new.logprobs.or(choice.logprobs.take());
}

/// OpenAI's word for an ending, or the error that it is. STOP is used for calls, too.
fn finish(facts: &Facts, reason: &str, num_calls: u32) -> Result<Finish, UpstreamError> {
    let word = match reason {
        "STOP" if num_calls > 0 => FinishReason::ToolCalls,
        "MAX_TOKENS" | "CONTINUATION" => FinishReason::Length,
        "SAFETY" | "RECITATION" | "LANGUAGE" | "BLOCKLIST" | "PROHIBITED_CONTENT" | "SPII" | "NO_IMAGE"
        | "ESCALATION" | "MODEL_ARMOR" | "OTHER" => FinishReason::ContentFilter,
        image if image.starts_with("IMAGE_") => FinishReason::ContentFilter,
        "MALFORMED_FUNCTION_CALL"
        | "UNEXPECTED_TOOL_CALL"
        | "MALFORMED_RESPONSE"
        | "TOO_MANY_TOOL_CALLS"
        | "MISSING_THOUGHT_SIGNATURE" => {
            let native = Native { code: Some(reason.to_owned()), ..Native::default() };
            let mut error = facts.told(Cause::Unfit, &native);
            error.message = format!("the model gave an answer that is none ({reason}); ask again");
            return Err(error);
        }
        "PUP_LIMITED_DISABLED" => {
            let native = Native { code: Some(reason.to_owned()), ..Native::default() };
            return Err(facts.told(Cause::Auth, &native));
        }
        _ => FinishReason::Stop,
    };
    Ok(Finish { reason: word, native: Some(reason.to_owned()) })
}

/// What was counted in a whole answer.
pub(crate) fn counted(body: &Value) -> Option<Usage> {
    let usage = &body["usageMetadata"];
    usage.is_object().then(|| read_usage(usage))
}

fn read_usage(usage: &Value) -> Usage {
    let count = |name: &str| usage[name].as_u64().unwrap_or(0);
    let thoughts = count("thoughtsTokenCount");
    let tier = usage["serviceTier"].as_str().or_else(|| usage["trafficType"].as_str());
    Usage {
        prompt: count("promptTokenCount").saturating_add(count("toolUsePromptTokenCount")),
        cached: count("cachedContentTokenCount"),
        cache_write: 0,
        completion: count("candidatesTokenCount").saturating_add(thoughts),
        reasoning: thoughts,
        estimated: false,
        tier: tier.map(ServedTier::from_wire).unwrap_or_default(),
    }
}

/// OpenAI's form of `logprobsResult`; bytes are those of the token's text.
fn read_logprobs(result: &Value) -> Option<Value> {
    let chosen = result["chosenCandidates"].as_array()?;
    let entry = |candidate: &Value| {
        let token = candidate["token"].as_str().unwrap_or_default();
        let logprob = candidate["logProbability"].as_f64().unwrap_or(UNKNOWN_LOGPROB);
        json!({"token": token, "logprob": logprob, "bytes": token.as_bytes()})
    };
    let content: Vec<Value> = chosen
        .iter()
        .enumerate()
        .map(|(index, candidate)| {
            let mut written = entry(candidate);
            let top = result["topCandidates"][index]["candidates"].as_array();
            written["top_logprobs"] = top.into_iter().flatten().map(entry).collect();
            written
        })
        .collect();
    Some(json!({"content": content, "refusal": null}))
}

/// A response that is not a success.
pub(crate) fn error(facts: &Facts, reply: &Reply, body: Option<&Value>) -> UpstreamError {
    told(facts, Some(reply.status), body)
}

fn told(facts: &Facts, status: Option<u16>, body: Option<&Value>) -> UpstreamError {
    // An array of one where the stream is none of events.
    let body = body.map(|body| body.get(0).unwrap_or(body));
    let object = body.map_or(&Value::Null, |body| &body["error"]);
    let details: Vec<&Value> = object["details"].as_array().into_iter().flatten().collect();
    let has_reason = |reason: &str| details.iter().any(|detail| detail["reason"] == reason);
    let text = |name: &str| object[name].as_str().map(str::to_owned);
    let status = status.filter(|status| *status >= 400);
    let status = status.or_else(|| object["code"].as_u64().and_then(|code| u16::try_from(code).ok())).unwrap_or(500);
    let native = Native { status: Some(status), kind: text("status"), code: None, message: text("message") };
    let says = |text: &str| native.message.as_deref().is_some_and(|message| message.contains(text));
    let cause = match native.kind.as_deref() {
        _ if has_reason("API_KEY_INVALID") || says("API key not valid") => Cause::Auth,
        Some("INVALID_ARGUMENT") if says("exceeds the maximum number of tokens") => Cause::ContextLength,
        // "User location is not supported", "billing is not enabled": of the account, not of the request.
        Some("FAILED_PRECONDITION" | "PERMISSION_DENIED" | "UNAUTHENTICATED") => Cause::Auth,
        Some("INVALID_ARGUMENT" | "OUT_OF_RANGE") => Cause::Invalid,
        Some("NOT_FOUND") => Cause::ModelUnavailable,
        Some("RESOURCE_EXHAUSTED") if says("limit: 0") || has_daily_quota(&details) => Cause::Quota,
        Some("RESOURCE_EXHAUSTED") => Cause::RateLimited,
        Some("DEADLINE_EXCEEDED") => Cause::Timeout,
        Some("UNAVAILABLE") if says("overloaded") => Cause::Overloaded,
        Some("INTERNAL" | "UNAVAILABLE" | "CANCELLED" | "UNKNOWN" | "ABORTED") => Cause::Failed,
        _ => Cause::of_status(status),
    };
    let wait = details.iter().find_map(|detail| detail["retryDelay"].as_str()).and_then(reply::duration);
    facts.told(cause, &native).after(wait)
}

/// A quota that no waiting helps: the day's.
fn has_daily_quota(details: &[&Value]) -> bool {
    let quotas = details.iter().flat_map(|detail| detail["violations"].as_array().into_iter().flatten());
    quotas.filter_map(|quota| quota["quotaId"].as_str()).any(|id| id.contains("PerDay"))
}
