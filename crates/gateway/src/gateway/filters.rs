//! Answers through their tenant's guardrails: whole ones and chunks, as OpenAI's JSON, wherever they come from.
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

use super::Exchange;
use crate::guardrails::{
    Action, Decision, Finding, Form, Policy, Side, StreamFilter, Vault, Verdict, outside::OutsideOutcome,
    stream::Released,
};

/// The most of an answer that is held: at it, nobody is asked, and that counts as silence.
pub const MAX_HELD_BYTES: usize = 16 << 20;
/// The longest arguments of one call. Longer ones end their choice: what is not checked does not pass.
const MAX_ARGUMENT_BYTES: usize = 1 << 20;
/// Choices that somebody is asked about at one time.
const MAX_ASKED_AT_ONCE: usize = 8;
/// Texts of a message or delta, as people read them.
const TEXTS: [&str; 4] = ["content", "refusal", "reasoning_content", "reasoning"];

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
}

/// Chunks that wait for a verdict.
#[derive(Default)]
struct Held {
    chunks: Vec<Value>,
    num_bytes: usize,
}

/// One choice's way.
#[derive(Default)]
struct Choice {
    /// By their field.
    texts: BTreeMap<&'static str, StreamFilter>,
    /// By their number in the answer.
    calls: BTreeMap<u64, Call>,
    /// What those who are asked see of arguments.
    redacted_calls: String,
    verdicts: Vec<Verdict>,
    blocked_by: Option<Arc<str>>,
    is_over: bool,
}

/// Arguments that are not whole yet.
struct Call {
    place: CallPlace,
    arguments: String,
}

/// Where arguments stand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum CallPlace {
    /// `tool_calls[i].function.arguments`
    Function,
    /// `tool_calls[i].custom.input`
    Custom,
    /// `function_call.arguments`, the old form. There is one at most.
    Old,
}

/// The number of the old form's only call among the calls of a choice.
const OLD_CALL: u64 = u64::MAX;

impl CallPlace {
    fn form(self) -> Form {
        match self {
            Self::Function | Self::Old => Form::Json,
            Self::Custom => Form::Plain,
        }
    }

    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Function => ("function", "arguments"),
            Self::Custom => ("custom", "input"),
            Self::Old => ("function_call", "arguments"),
        }
    }
}

/// Whether more of a choice may come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rest {
    MayCome,
    IsNone,
}

impl AnswerFilters {
    pub(super) fn new(policy: Policy, vault: Arc<Vault>) -> Self {
        let held = policy.holds_answers().then(Held::default);
        Self { policy, vault, choices: BTreeMap::new(), asked: Vec::new(), held, last: None }
    }

    /// What was found so far.
    pub fn verdicts(&self) -> Vec<Verdict> {
        let found = |choice: &Choice| {
            let texts = choice.texts.values().flat_map(StreamFilter::verdicts);
            texts.chain(choice.verdicts.clone()).collect::<Vec<_>>()
        };
        self.choices.values().flat_map(found).chain(self.asked.clone()).collect()
    }

    /// A whole answer, in place; where somebody is to be asked about it, after they have answered.
    pub async fn whole(&mut self, exchange: &mut Exchange, answer: &mut Value) {
        if let Some(choices) = answer.get_mut("choices").and_then(Value::as_array_mut) {
            for choice in choices.iter_mut() {
                self.choice(choice, Rest::IsNone);
            }
        }
        let blocked = self.ask(exchange).await;
        if let Some(choices) = answer.get_mut("choices").and_then(Value::as_array_mut) {
            for choice in choices.iter_mut().filter(|choice| blocked.contains(&index_of(choice))) {
                empty(choice);
            }
        }
        exchange.note(self.verdicts());
    }

    /// A chunk of a stream: what may pass, in order.
    pub fn chunk(&mut self, chunk: Value) -> Vec<Value> {
        let passed = self.pass(chunk, Rest::MayCome);
        let mut out = Vec::new();
        for chunk in passed {
            self.hold(chunk, &mut out);
        }
        out
    }

    /// The stream is complete: what was held, after those who are asked have answered. Its verdicts are in the exchange then.
    pub async fn end(&mut self, exchange: &mut Exchange) -> Vec<Value> {
        // A stream may end without having said so of each choice.
        let open = self.choices.iter().filter(|(_, choice)| !choice.is_over).map(|(&index, _)| index);
        let open: Vec<u64> = open.collect();
        let mut out = Vec::new();
        for index in open {
            let Some(head) = &self.last else { break };
            let last = with_last_piece(head, index, Value::Null);
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
        out
    }

    /// What the guardrails of this machine let pass of a chunk.
    fn pass(&mut self, mut chunk: Value, rest: Rest) -> Vec<Value> {
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

impl Choice {
    /// Arguments are longer than is checked.
    fn stop_at_bound(&mut self) {
        let guardrail: Arc<str> = "the bound on arguments".into();
        self.verdicts.push(Verdict {
            guardrail: Arc::clone(&guardrail),
            kind: "length",
            side: Side::Answer,
            action: Action::Block,
            findings: vec![Finding { label: "arguments", count: 1 }],
        });
        self.blocked_by.get_or_insert(guardrail);
    }

    /// All of it as those see it who are asked.
    fn redacted(&self) -> String {
        let texts = self.texts.values().map(StreamFilter::redacted).chain([self.redacted_calls.as_str()]);
        texts.filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n\n")
    }
}

/// What a piece of a choice held, and what is left of it.
#[derive(Default)]
struct Passed {
    had_text: bool,
    has_text: bool,
    /// Anything but texts: a role, the beginning of a call.
    has_more: bool,
}

/// One piece of one choice on its way.
struct Walk<'a> {
    policy: &'a Policy,
    vault: &'a Arc<Vault>,
    progress: &'a mut Choice,
    rest: Rest,
    passed: Passed,
}

impl Walk<'_> {
    /// Texts, in place.
    fn texts(&mut self, choice: &mut Value) {
        let Some(choice) = choice.as_object_mut() else { return };
        let place = if choice.contains_key("message") { "message" } else { "delta" };
        let Some(holder) = choice.get_mut(place).and_then(Value::as_object_mut) else {
            self.text(choice, "text");
            return;
        };
        for name in TEXTS {
            self.text(holder, name);
        }
        let is_more = |(name, value): (&String, &Value)| !TEXTS.contains(&name.as_str()) && !is_empty(value);
        self.passed.has_more |= holder.iter().any(is_more);
    }

    fn text(&mut self, holder: &mut Map<String, Value>, name: &'static str) {
        let text = holder.get(name).and_then(Value::as_str).map(str::to_owned);
        let is_known = self.progress.texts.contains_key(name);
        if self.progress.blocked_by.is_some() {
            // Another text of this piece has ended the choice.
            if text.is_some() {
                holder.insert(name.to_owned(), Value::String(String::new()));
            }
            return;
        }
        if text.is_none() && !(is_known && self.rest == Rest::IsNone) {
            return;
        }
        let (policy, vault) = (self.policy, self.vault);
        let filter = self.progress.texts.entry(name).or_insert_with(|| StreamFilter::new(policy, vault, Form::Plain));
        let mut released = text.as_deref().map_or_else(Vec::new, |text| filter.push(text));
        if self.rest == Rest::IsNone {
            released.extend(filter.finish());
        }
        let mut passed = String::new();
        for piece in released {
            match piece {
                Released::Text(piece) => passed.push_str(&piece),
                Released::Blocked { guardrail } => self.progress.blocked_by = Some(guardrail),
            }
        }
        self.passed.had_text |= text.as_deref().is_some_and(|text| !text.is_empty());
        self.passed.has_text |= !passed.is_empty();
        if text.is_some() || !passed.is_empty() {
            holder.insert(name.to_owned(), Value::String(passed));
        }
    }

    /// Takes arguments out of a piece; with the choice's end what they have become, in place of a message's or as a delta of their own.
    fn calls(&mut self, choice: &mut Value) -> Option<Value> {
        let place = if choice.get("message").is_some() { "message" } else { "delta" };
        let holder = choice.get_mut(place)?.as_object_mut()?;
        let had_calls = holder.contains_key("tool_calls") || holder.contains_key("function_call");
        if let Some(Value::Array(calls)) = holder.get_mut("tool_calls") {
            for (at, call) in calls.iter_mut().enumerate() {
                let index = call.get("index").and_then(Value::as_u64).unwrap_or(at as u64);
                for place in [CallPlace::Function, CallPlace::Custom] {
                    let (kind, field) = place.names();
                    self.take(call.get_mut(kind).and_then(|kind| kind.get_mut(field)), index, place);
                }
            }
            if place == "delta" {
                calls.retain(begins_a_call);
            }
        }
        self.take(holder.get_mut("function_call").and_then(|call| call.get_mut("arguments")), OLD_CALL, CallPlace::Old);
        if had_calls && place == "delta" {
            drop_empty_calls(holder);
            let is_more = |(name, value): (&String, &Value)| !TEXTS.contains(&name.as_str()) && !is_empty(value);
            self.passed.has_more = holder.iter().any(is_more);
            // What was taken out comes later.
            self.passed.had_text = true;
        }
        if self.rest == Rest::MayCome || self.progress.blocked_by.is_some() {
            return None;
        }
        let checked = self.check_calls()?;
        if place == "delta" {
            return Some(as_delta(checked));
        }
        put_back(holder, checked);
        None
    }

    fn take(&mut self, slot: Option<&mut Value>, index: u64, place: CallPlace) {
        let Some(Value::String(piece)) = slot else { return };
        let call = self.progress.calls.entry(index).or_insert_with(|| Call { place, arguments: String::new() });
        if call.arguments.len() + piece.len() > MAX_ARGUMENT_BYTES {
            self.progress.stop_at_bound();
        } else {
            call.arguments.push_str(piece);
        }
        piece.clear();
    }

    /// None: there are none, or one of them is blocked.
    fn check_calls(&mut self) -> Option<Vec<(u64, CallPlace, String)>> {
        let calls = std::mem::take(&mut self.progress.calls);
        if calls.is_empty() {
            return None;
        }
        let of_content = self.progress.texts.get_mut("content").map(|filter| Arc::clone(filter.vault_mut()));
        let mut own = of_content.unwrap_or_else(|| Arc::clone(self.vault));
        let mut checked = Vec::new();
        for (index, Call { place, arguments }) in calls {
            let outcome = self.policy.check_arguments(arguments, place.form(), self.vault, &mut own);
            self.progress.verdicts.extend(outcome.verdicts);
            if let Some(guardrail) = outcome.blocked_by {
                self.progress.blocked_by = Some(guardrail);
                return None;
            }
            self.progress.redacted_calls.push_str(&outcome.redacted);
            self.progress.redacted_calls.push('\n');
            checked.push((index, place, outcome.text));
        }
        Some(checked)
    }
}

fn index_of(choice: &Value) -> u64 {
    choice.get("index").and_then(Value::as_u64).unwrap_or(0)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

/// Whether a piece of a call says more than its arguments, which were taken out.
fn begins_a_call(call: &Value) -> bool {
    call.as_object().is_some_and(|call| {
        call.iter().any(|(name, value)| match name.as_str() {
            "index" => false,
            "function" | "custom" => value.get("name").is_some_and(|name| !is_empty(name)),
            _ => !is_empty(value),
        })
    })
}

fn drop_empty_calls(holder: &mut Map<String, Value>) {
    if holder.get("tool_calls").is_some_and(is_empty) {
        holder.remove("tool_calls");
    }
    if holder.get("function_call").is_some_and(|call| call.get("name").is_none_or(is_empty)) {
        holder.remove("function_call");
    }
}

fn as_delta(calls: Vec<(u64, CallPlace, String)>) -> Value {
    let mut delta = Map::new();
    let mut list = Vec::new();
    for (index, place, text) in calls {
        let (kind, field) = place.names();
        match place {
            CallPlace::Old => {
                delta.insert(kind.to_owned(), json!({field: text}));
            }
            CallPlace::Function | CallPlace::Custom => list.push(json!({"index": index, kind: {field: text}})),
        }
    }
    if !list.is_empty() {
        delta.insert("tool_calls".to_owned(), Value::Array(list));
    }
    Value::Object(delta)
}

fn put_back(message: &mut Map<String, Value>, calls: Vec<(u64, CallPlace, String)>) {
    for (index, place, text) in calls {
        let (kind, field) = place.names();
        let slot = match place {
            CallPlace::Old => message.get_mut(kind),
            CallPlace::Function | CallPlace::Custom => {
                let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
                let at = |(at, call): &(usize, &mut Value)| {
                    call.get("index").and_then(Value::as_u64).unwrap_or(*at as u64) == index
                };
                calls.and_then(|calls| calls.iter_mut().enumerate().find(at)?.1.get_mut(kind))
            }
        };
        if let Some(slot) = slot.and_then(|call| call.get_mut(field)) {
            *slot = Value::String(text);
        }
    }
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
        out.push(with_last_piece(head, index, json!("content_filter")));
    }
    out
}

/// A chunk with a choice's last piece, in the shape that its head names.
fn with_last_piece(head: &Map<String, Value>, index: u64, reason: Value) -> Value {
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
