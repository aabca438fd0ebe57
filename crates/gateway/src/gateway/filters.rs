//! Answers through their tenant's guardrails: whole ones and chunks, as OpenAI's JSON, wherever they come from. What passes is
//! kept, where the tenant's policy stores it.
//!
//! Knows where text stands in an answer: contents, refusals and thoughts pass as they come, held back only as far as a match could begin;
//! arguments of tools come with their choice's end, since they are checked whole. Where somebody has to be asked about an answer and may
//! block it, all of it is held until then ([`AnswerFilters::end`]), up to [`MAX_HELD_BYTES`].
//!
//! Invariant: of each choice's text nothing passes that a blocking guardrail would have stopped, and after it is stopped nothing of that
//! choice passes any more.

use std::{collections::BTreeMap, sync::Arc};

use futures::{StreamExt as _, stream};
use serde_json::{Map, Value, json};

use super::{
    Exchange, GatewayError,
    choice::{Choice, Passed, Rest, Walk, is_empty, keep_known},
    exchange::aside,
    transcript::Transcript,
};
use crate::guardrails::{Decision, Policy, Side, StreamFilter, Vault, Verdict, outside::OutsideOutcome};

/// The most of an answer that is held: at it, nobody is asked, and that counts as silence.
pub const MAX_HELD_BYTES: usize = 16 << 20;
/// Choices that somebody is asked about at one time.
const MAX_ASKED_AT_ONCE: usize = 8;

/// The filters of one answer.
pub struct AnswerFilters {
    policy: Policy,
    vault: Arc<Vault>,
    choices: BTreeMap<u64, Choice>,
    /// Of those who were asked.
    asked: Vec<Verdict>,
    /// None: nothing is held.
    held: Option<Held>,
    /// A chunk without its choices, for what comes after all others.
    last: Option<Map<String, Value>>,
    /// Nothing more of the answer may pass, of choices neither that have not begun.
    stopped_by: Option<Arc<str>>,
    transcript: Option<Transcript>,
}

/// Chunks that wait for a verdict.
#[derive(Default)]
struct Held {
    chunks: Vec<Value>,
    num_bytes: usize,
}

impl AnswerFilters {
    pub(super) fn new(policy: Policy, vault: Arc<Vault>, transcript: Option<Transcript>) -> Self {
        let held = policy.holds_answers().then(Held::default);
        Self {
            policy,
            vault,
            choices: BTreeMap::new(),
            asked: Vec::new(),
            held,
            last: None,
            stopped_by: None,
            transcript,
        }
    }

    /// What was found so far.
    pub fn verdicts(&self) -> Vec<Verdict> {
        let found = |choice: &Choice| {
            let texts = choice.texts.values().flat_map(StreamFilter::verdicts);
            texts.chain(choice.verdicts.clone()).collect::<Vec<_>>()
        };
        self.choices.values().flat_map(found).chain(self.asked.clone()).collect()
    }

    /// A whole answer; where somebody is to be asked about it, after they have answered. Its verdicts are in the exchange then.
    ///
    /// # Errors
    /// [`GatewayError::Internal`] where a guardrail panics.
    pub async fn whole(self, exchange: &mut Exchange, answer: Value) -> Result<Value, GatewayError> {
        let num_bytes = weight(&answer) as u64;
        let (mut filters, mut answer) = aside(num_bytes, move || self.looked_through(answer)).await?;
        let blocked = filters.ask(exchange).await;
        if let Some(choices) = answer.get_mut("choices").and_then(Value::as_array_mut) {
            for choice in choices.iter_mut().filter(|choice| blocked.contains(&index_of(choice))) {
                empty(choice);
            }
        }
        filters.keep(std::slice::from_ref(&answer));
        exchange.note(filters.verdicts());
        Ok(answer)
    }

    fn looked_through(mut self, mut answer: Value) -> (Self, Value) {
        if self.keeps_from_clients() {
            keep_known(&mut answer);
        }
        if !self.policy.is_empty()
            && let Some(choices) = answer.get_mut("choices").and_then(Value::as_array_mut)
        {
            // A second choice of one index is nobody's.
            choices.retain_mut(|choice| self.choice(choice, Rest::IsNone).0);
        }
        (self, answer)
    }

    /// A chunk of a stream: what may pass, in order.
    pub fn chunk(&mut self, chunk: Value) -> Vec<Value> {
        let mut out = Vec::new();
        if self.policy.is_empty() {
            out.push(chunk);
        } else {
            for chunk in self.pass(chunk, Rest::MayCome) {
                self.hold(chunk, &mut out);
            }
        }
        self.keep(&out);
        out
    }

    /// Whether something of the answer may be kept from the client.
    fn keeps_from_clients(&self) -> bool {
        self.policy.changes_answers() || self.policy.holds_answers()
    }

    fn keep(&self, passed: &[Value]) {
        if let Some(transcript) = &self.transcript {
            for chunk in passed {
                transcript.add(chunk);
            }
        }
    }

    /// The stream is complete: what was held, after those who are asked have answered. Its verdicts are in the exchange then.
    pub async fn end(&mut self, exchange: &mut Exchange) -> Vec<Value> {
        // A stream may end without having said so of each choice.
        let open = self.choices.iter().filter(|(_, choice)| !choice.is_over).map(|(&index, _)| index);
        let open: Vec<u64> = open.collect();
        let mut out = Vec::new();
        for index in open {
            let Some(head) = &self.last else { break };
            let last = with_last_piece(head, index, &Value::Null);
            for chunk in self.pass(last, Rest::IsNone) {
                self.hold(chunk, &mut out);
            }
        }
        let blocked = self.ask(exchange).await;
        exchange.note(self.verdicts());
        out.extend(self.held.take().into_iter().flat_map(|held| held.chunks));
        if !blocked.is_empty() {
            out = without(out, &blocked, self.last.as_ref());
        }
        self.keep(&out);
        out
    }

    /// What the guardrails of this machine let pass of a chunk.
    fn pass(&mut self, mut chunk: Value, rest: Rest) -> Vec<Value> {
        if self.keeps_from_clients() {
            keep_known(&mut chunk);
        }
        let Some(choices) = chunk.get_mut("choices").and_then(Value::as_array_mut) else { return vec![chunk] };
        let had_choices = !choices.is_empty();
        let mut calls = Vec::new();
        choices.retain_mut(|choice| {
            let rest = match choice.get("finish_reason") {
                None | Some(Value::Null) => rest,
                Some(_) => Rest::IsNone,
            };
            let (is_passed, whole_calls) = self.choice(choice, rest);
            calls.extend(whole_calls);
            is_passed
        });
        let has_choices = !choices.is_empty();
        if had_choices && let Some(map) = chunk.as_object() {
            let head = map.iter().filter(|(name, _)| !matches!(name.as_str(), "choices" | "usage"));
            self.last = Some(head.map(|(name, value)| (name.clone(), value.clone())).collect());
        }
        let mut out = Vec::new();
        // Arguments come before the end of their choice, in a chunk of their own: not everybody reads the last one's delta.
        if let (false, Some(head)) = (calls.is_empty(), &self.last) {
            let mut head = head.clone();
            head.insert("choices".to_owned(), Value::Array(calls));
            out.push(Value::Object(head));
        }
        if !had_choices || has_choices {
            out.push(chunk);
        }
        out
    }

    /// What passes of one choice, in place; whether any of it is to be handed on, and in a stream the choice of its whole arguments.
    fn choice(&mut self, choice: &mut Value, rest: Rest) -> (bool, Option<Value>) {
        let index = index_of(choice);
        let progress = self.choices.entry(index).or_default();
        if let Some(guardrail) = &self.stopped_by {
            progress.blocked_by.get_or_insert_with(|| Arc::clone(guardrail));
        }
        if progress.blocked_by.is_some() || progress.is_over {
            return (false, None);
        }
        progress.is_over = rest == Rest::IsNone;
        let is_delta = choice.get("delta").is_some();
        let mut walk = Walk { policy: &self.policy, vault: &self.vault, progress, rest, passed: Passed::default() };
        walk.texts(choice);
        let calls = walk.calls(choice);
        let passed = walk.passed;
        if self.policy.changes_answers() && choice.get("logprobs").is_some_and(|logprobs| !logprobs.is_null()) {
            // They spell the text as it was.
            choice["logprobs"] = Value::Null;
        }
        if progress.blocked_by.is_some() {
            choice["finish_reason"] = json!("content_filter");
            progress.is_over = true;
            if let Some(message) = choice.get_mut("message").and_then(Value::as_object_mut) {
                message.remove("tool_calls");
                message.remove("function_call");
            }
            return (true, None);
        }
        let calls = calls
            .filter(|_| is_delta)
            .map(|delta| json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null}));
        // A piece of which everything is held back says nothing.
        (rest == Rest::IsNone || !passed.had_text || passed.has_text || passed.has_more, calls)
    }

    /// Keeps a chunk where an answer is held, or lets it go.
    fn hold(&mut self, chunk: Value, out: &mut Vec<Value>) {
        let Some(held) = &mut self.held else {
            out.push(chunk);
            return;
        };
        let choices = chunk.get("choices").and_then(Value::as_array);
        let says_nothing = |choice: &Value| {
            let delta = choice.get("delta").and_then(Value::as_object);
            delta.is_some_and(|delta| delta.iter().all(|(name, value)| name == "role" || is_empty(value)))
                && choice.get("finish_reason").is_none_or(Value::is_null)
                && choice.get("logprobs").is_none_or(Value::is_null)
        };
        let is_open = match choices {
            // An error, or what else is no part of an answer.
            None => true,
            // The first chunk tells that the answer has begun.
            Some(choices) => held.chunks.is_empty() && !choices.is_empty() && choices.iter().all(says_nothing),
        };
        if is_open {
            out.push(chunk);
            return;
        }
        held.num_bytes += weight(&chunk);
        held.chunks.push(chunk);
        if held.num_bytes > MAX_HELD_BYTES {
            out.extend(self.give_up());
        }
    }

    /// The answer is longer than may be held: what silence means, decides.
    fn give_up(&mut self) -> Vec<Value> {
        let OutsideOutcome { decision, verdicts } = self.policy.unasked(Side::Answer);
        self.asked.extend(verdicts);
        let chunks = self.held.take().map(|held| held.chunks).unwrap_or_default();
        // Nobody is asked any more.
        let Decision::Block { guardrail } = decision else { return chunks };
        self.stopped_by = Some(Arc::clone(&guardrail));
        let all: Vec<u64> = self.choices.keys().copied().collect();
        for choice in self.choices.values_mut() {
            choice.blocked_by.get_or_insert_with(|| Arc::clone(&guardrail));
            choice.is_over = true;
        }
        without(chunks, &all, self.last.as_ref())
    }

    /// Asks about every choice that has come through; those that are blocked.
    async fn ask(&mut self, exchange: &Exchange) -> Vec<u64> {
        let is_given_up = self.policy.holds_answers() && self.held.is_none();
        if is_given_up || !self.policy.asks_outside(Side::Answer) {
            return Vec::new();
        }
        let texts: Vec<(u64, String)> = self
            .choices
            .iter()
            .filter(|(_, choice)| choice.blocked_by.is_none())
            .map(|(&index, choice)| (index, choice.redacted()))
            .filter(|(_, text)| !text.is_empty())
            .collect();
        let ask = |(index, text): (u64, String)| async move { (index, exchange.ask_about(Side::Answer, &text).await) };
        let outcomes: Vec<(u64, OutsideOutcome)> =
            stream::iter(texts).map(ask).buffered(MAX_ASKED_AT_ONCE).collect().await;
        let mut blocked = Vec::new();
        for (index, outcome) in outcomes {
            self.asked.extend(outcome.verdicts);
            if let (Decision::Block { guardrail }, Some(choice)) = (outcome.decision, self.choices.get_mut(&index)) {
                choice.blocked_by = Some(guardrail);
                blocked.push(index);
            }
        }
        blocked
    }
}

fn index_of(choice: &Value) -> u64 {
    choice.get("index").and_then(Value::as_u64).unwrap_or(0)
}

/// A choice about which somebody said no: nothing of it is left but how it ended.
fn empty(choice: &mut Value) {
    if let Some(choice) = choice.as_object_mut() {
        for (name, value) in choice.iter_mut() {
            match name.as_str() {
                "message" => *value = json!({"role": "assistant", "content": ""}),
                "delta" => *value = json!({}),
                "text" => *value = json!(""),
                "index" => {}
                _ => *value = Value::Null,
            }
        }
        choice.insert("finish_reason".to_owned(), json!("content_filter"));
    }
}

/// The chunks without those choices, of which each gets an end of its own.
fn without(chunks: Vec<Value>, blocked: &[u64], head: Option<&Map<String, Value>>) -> Vec<Value> {
    let mut ended: Vec<u64> = Vec::new();
    let mut out = Vec::new();
    for mut chunk in chunks {
        if let Some(choices) = chunk.get_mut("choices").and_then(Value::as_array_mut) {
            let had_choices = !choices.is_empty();
            choices.retain_mut(|choice| {
                let index = index_of(choice);
                if !blocked.contains(&index) {
                    return true;
                }
                let is_end = choice.get("finish_reason").is_some_and(|reason| !reason.is_null());
                if is_end && !ended.contains(&index) {
                    ended.push(index);
                    empty(choice);
                    return true;
                }
                false
            });
            if had_choices && choices.is_empty() {
                continue;
            }
        }
        out.push(chunk);
    }
    let Some(head) = head else { return out };
    for &index in blocked.iter().filter(|index| !ended.contains(index)) {
        out.push(with_last_piece(head, index, &json!("content_filter")));
    }
    out
}

/// A chunk with a choice's last piece, in the shape that its head names.
fn with_last_piece(head: &Map<String, Value>, index: u64, reason: &Value) -> Value {
    let is_chat = head.get("object").is_none_or(|object| object != "text_completion");
    let (name, nothing) = if is_chat { ("delta", json!({})) } else { ("text", json!("")) };
    let mut chunk = head.clone();
    chunk.insert(
        "choices".to_owned(),
        json!([{"index": index, name: nothing, "logprobs": null, "finish_reason": reason}]),
    );
    Value::Object(chunk)
}

/// What a chunk takes in memory, roughly.
fn weight(value: &Value) -> usize {
    const NODE_BYTES: usize = 32;
    match value {
        Value::String(text) => NODE_BYTES + text.len(),
        Value::Array(items) => NODE_BYTES + items.iter().map(weight).sum::<usize>(),
        Value::Object(map) => {
            NODE_BYTES + map.iter().map(|(name, value)| NODE_BYTES + name.len() + weight(value)).sum::<usize>()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => NODE_BYTES,
    }
}
