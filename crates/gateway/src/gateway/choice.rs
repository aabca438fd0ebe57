//! One choice of an answer on its way through its tenant's guardrails: which fields hold text, and which arguments of tools.
//!
//! Knows OpenAI's messages and deltas, nothing of streams or of who is asked. Invariant: arguments pass after all of them were
//! checked, or not at all; once a choice is blocked nothing more of it is looked at.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::{Map, Value, json};

use crate::guardrails::{Action, Finding, Form, Policy, Side, StreamFilter, Vault, Verdict, stream::Released};

/// The longest arguments of one call. Longer ones end their choice: what is not checked does not pass.
const MAX_ARGUMENT_BYTES: usize = 1 << 20;
/// Texts of a message or delta, as people read them.
const TEXTS: [&str; 4] = ["content", "refusal", "reasoning_content", "reasoning"];

/// Fields of an answer beside its choices.
const ANSWER_FIELDS: [&str; 9] =
    ["id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier", "error"];
/// Fields of a choice.
const CHOICE_FIELDS: [&str; 7] = ["index", "message", "delta", "text", "finish_reason", "stop_reason", "logprobs"];
/// Fields of a message or delta.
const MESSAGE_FIELDS: [&str; 7] =
    ["role", "content", "refusal", "reasoning_content", "reasoning", "tool_calls", "function_call"];
/// Fields of a call.
const CALL_FIELDS: [&str; 5] = ["index", "id", "type", "function", "custom"];
/// Fields of a function or custom tool that is called.
const CALLED_FIELDS: [&str; 3] = ["name", "arguments", "input"];

/// Leaves of an answer what filters know, where they may have to keep something from the client: what an upstream adds of its own
/// (thoughts in blocks, transcripts, citations) could say it all again.
pub(super) fn keep_known(answer: &mut Value) {
    keep(answer, |name, _| ANSWER_FIELDS.contains(&name));
    let is_chunk = answer["object"] == "chat.completion.chunk";
    for choice in answer.get_mut("choices").and_then(Value::as_array_mut).into_iter().flatten() {
        // One of them is the answer, and the filters look at that.
        let has = |place: &str| choice.get(place).is_some_and(Value::is_object);
        let place = match (has("message"), has("delta")) {
            (true, true) if is_chunk => "delta",
            (true, _) => "message",
            (false, true) => "delta",
            (false, false) => "text",
        };
        keep(choice, |name, _| {
            CHOICE_FIELDS.contains(&name) && (name == place || !["message", "delta", "text"].contains(&name))
        });
        let Some(message) = choice.get_mut(place) else { continue };
        keep(message, |name, value| {
            MESSAGE_FIELDS.contains(&name) && (!TEXTS.contains(&name) || value.is_string() || value.is_null())
        });
        for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
            let is_called = |name: &str| matches!(name, "function" | "custom");
            keep(call, |name, value| CALL_FIELDS.contains(&name) && (!is_called(name) || value.is_object()));
            for kind in ["function", "custom"] {
                call.get_mut(kind).into_iter().for_each(keep_called);
            }
        }
        message.get_mut("function_call").into_iter().for_each(keep_called);
    }
}

fn keep_called(called: &mut Value) {
    keep(called, |name, value| CALLED_FIELDS.contains(&name) && (value.is_string() || value.is_null()));
}

fn keep(object: &mut Value, is_kept: impl Fn(&str, &Value) -> bool) {
    if let Some(object) = object.as_object_mut() {
        object.retain(|name, value| is_kept(name, value));
    }
}

/// One choice's way.
#[derive(Default)]
pub(super) struct Choice {
    /// By their field.
    pub(super) texts: BTreeMap<&'static str, StreamFilter>,
    /// By their number in the answer.
    calls: BTreeMap<u64, Call>,
    /// What those who are asked see of arguments.
    redacted_calls: String,
    /// What its texts have put away, over what the prompt's check has: one place, so that one placeholder is one value in all of
    /// them.
    own: Option<Arc<Vault>>,
    pub(super) verdicts: Vec<Verdict>,
    pub(super) blocked_by: Option<Arc<str>>,
    pub(super) is_over: bool,
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
pub(super) enum Rest {
    MayCome,
    IsNone,
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
    pub(super) fn redacted(&self) -> String {
        let texts = self.texts.values().map(StreamFilter::redacted).chain([self.redacted_calls.as_str()]);
        texts.filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n\n")
    }
}

/// What a piece of a choice held, and what is left of it.
#[derive(Default)]
pub(super) struct Passed {
    pub(super) had_text: bool,
    pub(super) has_text: bool,
    /// Anything but texts: a role, the beginning of a call.
    pub(super) has_more: bool,
}

/// One piece of one choice on its way.
pub(super) struct Walk<'a> {
    pub(super) policy: &'a Policy,
    pub(super) vault: &'a Arc<Vault>,
    pub(super) progress: &'a mut Choice,
    pub(super) rest: Rest,
    pub(super) passed: Passed,
}

impl Walk<'_> {
    /// Texts, in place.
    pub(super) fn texts(&mut self, choice: &mut Value) {
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
        let own = self.progress.own.get_or_insert_with(|| Vault::over(vault));
        std::mem::swap(filter.vault_mut(), own);
        let mut released = text.as_deref().map_or_else(Vec::new, |text| filter.push(text));
        if self.rest == Rest::IsNone {
            released.extend(filter.finish());
        }
        std::mem::swap(filter.vault_mut(), own);
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
    pub(super) fn calls(&mut self, choice: &mut Value) -> Option<Value> {
        let place = if choice.get("message").is_some() { "message" } else { "delta" };
        let holder = choice.get_mut(place)?.as_object_mut()?;
        let had_calls = holder.contains_key("tool_calls") || holder.contains_key("function_call");
        if let Some(Value::Array(calls)) = holder.get_mut("tool_calls") {
            for (at, call) in calls.iter_mut().enumerate() {
                let index = call.get("index").and_then(Value::as_u64).unwrap_or(at as u64);
                for place in [CallPlace::Function, CallPlace::Custom] {
                    let (kind, field) = place.names();
                    if let Some(name) = call.get_mut(kind).and_then(|kind| kind.get_mut("name")) {
                        self.name(name);
                    }
                    if let Some(slot) = call.get_mut(kind).and_then(|kind| kind.get_mut(field)) {
                        self.take(slot, index, place);
                    }
                }
            }
            if place == "delta" {
                calls.retain(begins_a_call);
            }
        }
        if let Some(call) = holder.get_mut("function_call") {
            if let Some(name) = call.get_mut("name") {
                self.name(name);
            }
            if let Some(slot) = call.get_mut("arguments") {
                self.take(slot, OLD_CALL, CallPlace::Old);
            }
        }
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

    /// What is called, which comes whole: a model may write there what it likes.
    fn name(&mut self, slot: &mut Value) {
        let Value::String(name) = slot else { return };
        let own = self.progress.own.get_or_insert_with(|| Vault::over(self.vault));
        let outcome = self.policy.check_arguments(name.clone(), Form::Plain, self.vault, own);
        self.progress.verdicts.extend(outcome.verdicts);
        *name = outcome.text;
        if outcome.blocked_by.is_some() {
            name.clear();
            self.progress.blocked_by = outcome.blocked_by;
        }
    }

    fn take(&mut self, slot: &mut Value, index: u64, place: CallPlace) {
        let Value::String(piece) = slot else { return };
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
        let own = self.progress.own.get_or_insert_with(|| Vault::over(self.vault));
        let mut checked = Vec::new();
        for (index, Call { place, arguments }) in calls {
            let outcome = self.policy.check_arguments(arguments, place.form(), self.vault, own);
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

pub(super) fn is_empty(value: &Value) -> bool {
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
