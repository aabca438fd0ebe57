//! Answers through their tenant's guardrails: whole ones and chunks, as OpenAI's JSON, wherever they come from. What passes is
//! kept, where the tenant's policy stores it.
//!
//! Knows where text stands in an answer. Invariant: of each choice's text nothing passes that a blocking guardrail would
//! have stopped, and after it is stopped nothing of that choice passes any more.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::{Value, json};

use super::transcript::Transcript;
use crate::guardrails::{Form, Policy, StreamFilter, Vault, Verdict, stream::Released};

/// The filters of one answer, a choice each.
pub struct AnswerFilters {
    policy: Policy,
    vault: Arc<Vault>,
    choices: BTreeMap<u64, StreamFilter>,
    transcript: Option<Transcript>,
}

impl AnswerFilters {
    pub(super) fn new(policy: Policy, vault: Arc<Vault>, transcript: Option<Transcript>) -> Self {
        Self { policy, vault, choices: BTreeMap::new(), transcript }
    }

    /// What was found so far.
    pub fn verdicts(&self) -> Vec<Verdict> {
        self.choices.values().flat_map(StreamFilter::verdicts).collect()
    }

    fn of(&mut self, index: u64) -> &mut StreamFilter {
        let (policy, vault) = (&self.policy, &self.vault);
        self.choices.entry(index).or_insert_with(|| StreamFilter::new(policy, vault, Form::Plain))
    }

    /// A whole answer, in place.
    pub fn whole(&mut self, answer: &mut Value) {
        if !self.policy.is_empty() {
            self.filter_whole(answer);
        }
        self.keep(answer);
    }

    fn keep(&self, answer: &Value) {
        if let Some(transcript) = &self.transcript {
            transcript.add(answer);
        }
    }

    fn filter_whole(&mut self, answer: &mut Value) {
        let Some(choices) = answer.get_mut("choices").and_then(Value::as_array_mut) else { return };
        for choice in choices {
            let index = choice.get("index").and_then(Value::as_u64).unwrap_or(0);
            let filter = self.of(index);
            let place = if choice.get("message").is_some() { "/message/content" } else { "/text" };
            let Some(text) = choice.pointer_mut(place) else { continue };
            let Some(before) = text.as_str() else { continue };
            let mut released = filter.push(before);
            released.extend(filter.finish());
            let (passed, is_blocked) = join(released);
            *text = Value::String(passed);
            if is_blocked {
                choice["finish_reason"] = json!("content_filter");
            }
        }
    }

    /// A chunk of a stream: what may pass of it, and with a choice's last one what was held back.
    pub fn chunk(&mut self, chunk: Value) -> Option<Value> {
        let passed = if self.policy.is_empty() { Some(chunk) } else { self.filter_chunk(chunk) };
        if let Some(chunk) = &passed {
            self.keep(chunk);
        }
        passed
    }

    fn filter_chunk(&mut self, mut chunk: Value) -> Option<Value> {
        let Some(choices) = chunk.get_mut("choices").and_then(Value::as_array_mut) else { return Some(chunk) };
        let had_choices = !choices.is_empty();
        choices.retain_mut(|choice| self.choice(choice));
        (!had_choices || !choices.is_empty()).then_some(chunk)
    }

    /// Whether anything of the choice is to be handed on.
    fn choice(&mut self, choice: &mut Value) -> bool {
        let index = choice.get("index").and_then(Value::as_u64).unwrap_or(0);
        let filter = self.of(index);
        if filter.blocked_by().is_some() {
            return false;
        }
        let place = if choice.get("delta").is_some() { "/delta/content" } else { "/text" };
        let is_last = choice.get("finish_reason").is_some_and(|reason| !reason.is_null());
        let text = choice.pointer(place).and_then(Value::as_str).map(str::to_owned);
        let mut released = text.as_deref().map_or_else(Vec::new, |text| filter.push(text));
        if is_last {
            released.extend(filter.finish());
        }
        let (passed, is_blocked) = join(released);
        if is_blocked {
            choice["finish_reason"] = json!("content_filter");
        }
        let had_text = text.as_deref().is_some_and(|text| !text.is_empty());
        match choice.pointer_mut(place) {
            Some(slot) => *slot = Value::String(passed.clone()),
            None if !passed.is_empty() => match choice.get_mut("delta") {
                Some(delta) => delta["content"] = Value::String(passed.clone()),
                None => choice["text"] = Value::String(passed.clone()),
            },
            None => {}
        }
        // A piece of which everything is held back says nothing.
        is_last || is_blocked || !had_text || !passed.is_empty()
    }
}

fn join(released: Vec<Released>) -> (String, bool) {
    let (mut text, mut is_blocked) = (String::new(), false);
    for piece in released {
        match piece {
            Released::Text(piece) => text.push_str(&piece),
            Released::Blocked { .. } => is_blocked = true,
        }
    }
    (text, is_blocked)
}
