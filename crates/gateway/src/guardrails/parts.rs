//! The texts of a request's body: which strings of OpenAI's JSON a model gets to read.
//!
//! Messages' contents (strings and text parts), refusals, reasoning, names, arguments of tools and functions, the
//! descriptions of tools, prompts and suffixes. Arguments are JSON in a string: their leaves are read as texts, so that what is put
//! there leaves them valid; a number that is redacted becomes a string. Image and audio data are no texts.
//!
//! **Invariant**: every string that reaches a prompt is visited; everything else stays as it was, byte by byte.

use serde_json::{Map, Value};

/// A string and how it is read.
#[derive(Debug)]
pub(super) enum Part<'a> {
    /// As it stands.
    Plain(&'a mut String),
    /// JSON, where it parses.
    Json(&'a mut String),
}

impl Part<'_> {
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Plain(text) | Self::Json(text) => text,
        }
    }

    /// Offers every text in it; what comes back takes its place.
    pub(super) fn rewrite(&mut self, rewrite: &mut impl FnMut(&str) -> Option<String>) {
        match self {
            Self::Plain(text) => {
                if let Some(rewritten) = rewrite(text) {
                    **text = rewritten;
                }
            }
            Self::Json(text) => match serde_json::from_str::<Value>(text) {
                Ok(mut value) => {
                    if rewrite_leaves(&mut value, rewrite) == Changed::Yes {
                        **text = value.to_string();
                    }
                }
                Err(_) => Part::Plain(text).rewrite(rewrite),
            },
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Changed {
    No,
    Yes,
}

impl Changed {
    fn or(self, other: Self) -> Self {
        if self == Self::Yes { self } else { other }
    }
}

/// The parser bounds the depth.
fn rewrite_leaves(value: &mut Value, rewrite: &mut impl FnMut(&str) -> Option<String>) -> Changed {
    let text = match &*value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        Value::Array(_) | Value::Object(_) => return rewrite_children(value, rewrite),
        Value::Null | Value::Bool(_) => return Changed::No,
    };
    match rewrite(&text) {
        Some(rewritten) => {
            *value = Value::String(rewritten);
            Changed::Yes
        }
        None => Changed::No,
    }
}

fn rewrite_children(value: &mut Value, rewrite: &mut impl FnMut(&str) -> Option<String>) -> Changed {
    match value {
        Value::Array(items) => {
            items.iter_mut().fold(Changed::No, |changed, item| rewrite_leaves(item, rewrite).or(changed))
        }
        Value::Object(members) => {
            let mut changed = Changed::No;
            let mut rewritten = Map::new();
            for (name, mut member) in std::mem::take(members) {
                changed = rewrite_leaves(&mut member, rewrite).or(changed);
                let new_name = rewrite(&name);
                changed = if new_name.is_some() { Changed::Yes } else { changed };
                rewritten.insert(new_name.unwrap_or(name), member);
            }
            *members = rewritten;
            changed
        }
        _ => Changed::No,
    }
}

/// All texts of a body, in its order.
pub(super) fn texts(body: &mut Value) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    let Value::Object(members) = body else { return parts };
    for (name, member) in members {
        match name.as_str() {
            "messages" => each(member, |message| message_texts(message, &mut parts)),
            "prompt" | "suffix" | "system" | "instructions" => strings(member, &mut parts),
            "prediction" => content_texts(member, &mut parts),
            "tools" | "functions" | "documents" | "response_format" => descriptions(member, &mut parts),
            _ => {}
        }
    }
    parts
}

fn each<'a>(value: &'a mut Value, visit: impl FnMut(&'a mut Value)) {
    if let Value::Array(items) = value {
        items.iter_mut().for_each(visit);
    }
}

/// A string, or strings in an array.
fn strings<'a>(value: &'a mut Value, parts: &mut Vec<Part<'a>>) {
    match value {
        Value::String(text) => parts.push(Part::Plain(text)),
        Value::Array(items) => items.iter_mut().for_each(|item| strings(item, parts)),
        _ => {}
    }
}

fn message_texts<'a>(message: &'a mut Value, parts: &mut Vec<Part<'a>>) {
    let Value::Object(members) = message else { return };
    for (name, member) in members {
        match name.as_str() {
            "content" | "refusal" | "reasoning_content" | "reasoning" | "name" => content_texts(member, parts),
            "tool_calls" => each(member, |call| {
                let Value::Object(members) = call else { return };
                for (name, member) in members {
                    match name.as_str() {
                        "function" => arguments(member, parts),
                        // A custom tool takes a text of any form.
                        "custom" => strings(&mut member["input"], parts),
                        _ => {}
                    }
                }
            }),
            "function_call" => arguments(member, parts),
            _ => {}
        }
    }
}

fn content_texts<'a>(content: &'a mut Value, parts: &mut Vec<Part<'a>>) {
    match content {
        Value::String(text) => parts.push(Part::Plain(text)),
        Value::Array(items) => items.iter_mut().for_each(|item| content_texts(item, parts)),
        Value::Object(members) => {
            for (name, member) in members {
                if matches!(name.as_str(), "text" | "refusal" | "content" | "thinking") {
                    content_texts(member, parts);
                }
            }
        }
        _ => {}
    }
}

fn arguments<'a>(function: &'a mut Value, parts: &mut Vec<Part<'a>>) {
    if let Some(Value::String(text)) = function.get_mut("arguments") {
        parts.push(Part::Json(text));
    }
}

/// Descriptions at any depth of a schema, and texts of documents. A body's depth is bounded by its parser.
fn descriptions<'a>(value: &'a mut Value, parts: &mut Vec<Part<'a>>) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| descriptions(item, parts)),
        Value::Object(members) => {
            for (name, member) in members {
                match (name.as_str(), member) {
                    ("description" | "title" | "text", Value::String(text)) => parts.push(Part::Plain(text)),
                    (_, other) => descriptions(other, parts),
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_text_that_a_model_reads_is_visited() {
        let mut body = json!({
            "model": "no", "user": "no", "prompt": ["t1", "t2"], "suffix": "t3",
            "messages": [
                {"role": "system", "content": "t4"},
                {"role": "user", "name": "t5", "content": [
                    {"type": "text", "text": "t6"},
                    {"type": "image_url", "image_url": {"url": "data:no"}},
                ]},
                {"role": "assistant", "content": null, "reasoning_content": "t7", "tool_calls": [
                    {"id": "no", "type": "function", "function": {"name": "no", "arguments": "{\"a\": [\"t8\", 1]}"}},
                    {"id": "no", "type": "custom", "custom": {"name": "no", "input": "t13"}},
                ]},
                {"role": "tool", "tool_call_id": "no", "content": "t9"},
                {"role": "function", "function_call": {"arguments": "not json t10"}},
            ],
            "tools": [{"type": "function", "function": {"name": "no", "description": "t11", "parameters": {
                "properties": {"x": {"type": "string", "description": "t12"}}}}}],
        });
        let mut seen = Vec::new();
        for part in &mut texts(&mut body) {
            part.rewrite(&mut |text| {
                seen.push(text.to_owned());
                None
            });
        }
        for number in 1..=13 {
            let name = format!("t{number}");
            assert_eq!(
                seen.iter().filter(|text| text.split(' ').any(|word| word == name)).count(),
                1,
                "{name}: {seen:?}"
            );
        }
        assert!(!seen.iter().any(|text| text.contains("no") && !text.contains("not")), "{seen:?}");
    }

    #[test]
    fn arguments_stay_json_and_untouched_ones_stay_as_they_were() {
        let body = |arguments: &str| json!({"messages": [{"tool_calls": [{"function": {"arguments": arguments}}]}]});
        let rewritten = |arguments: &str| {
            let mut body = body(arguments);
            for part in &mut texts(&mut body) {
                part.rewrite(&mut |text| text.contains("42").then(|| "[X_1]".to_owned()));
            }
            body["messages"][0]["tool_calls"][0]["function"]["arguments"].as_str().unwrap().to_owned()
        };
        assert_eq!(rewritten("{ \"a\" : 1 }"), "{ \"a\" : 1 }");
        assert_eq!(rewritten("{ \"a\" : 42, \"b\\u0034\": \"\\u00342\" }"), "{\"a\":\"[X_1]\",\"b4\":\"[X_1]\"}");
    }
}
