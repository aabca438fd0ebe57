//! The texts of a request's body: every string of OpenAI's JSON, wherever a client may put one.
//!
//! Messages, prompts, tools with their schemas, names and ids, what is told beside them (`user`, `metadata`, `stop`) and fields that only
//! some upstream knows: whatever is sent is read. Not read are words of the protocol ([`WORDS`]) and images, sounds and
//! files as data, unless the data is a text. Texts that stand side by side in one message are read together, too, since a model reads them so. Arguments of
//! tools are JSON in a string: their leaves are read as texts, so that what is put there leaves them valid; a number that is
//! redacted becomes a string. Names of members are read where they are a client's own ([`FREE`]).
//!
//! **Invariant**: every string that reaches a prompt is visited; everything else stays as it was, byte by byte.

use data_encoding::BASE64;
use serde_json::{Map, Value};

/// Fields whose strings are words of the protocol, as long as they are one.
const WORDS: [&str; 2] = ["role", "type"];
/// Where data in base64 stands, and how it is called there.
const DATA: [(&str, &str); 2] = [("input_audio", "data"), ("file", "file_data")];
/// Fields of a body in which names of members are the protocol's, but for those below [`FREE`].
const KNOWN: [&str; 24] = [
    "messages",
    "prompt",
    "suffix",
    "system",
    "instructions",
    "prediction",
    "tools",
    "functions",
    "documents",
    "response_format",
    "tool_choice",
    "function_call",
    "stop",
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "stream_options",
    "logit_bias",
    "modalities",
    "audio",
    "reasoning",
    "reasoning_effort",
    "service_tier",
    "web_search_options",
];
/// Fields of which the members are named by whoever writes them.
const FREE: [&str; 7] =
    ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependentRequired", "metadata"];
/// Fields that hold a schema, in which all names but [`KEYWORDS`] are somebody's own.
const SCHEMAS: [&str; 3] = ["parameters", "schema", "input_schema"];
/// JSON Schema's (2020-12, and the older names that are in use).
const KEYWORDS: [&str; 49] = [
    "$schema",
    "$id",
    "$ref",
    "$defs",
    "$anchor",
    "$comment",
    "additionalItems",
    "additionalProperties",
    "allOf",
    "anyOf",
    "const",
    "contains",
    "contentEncoding",
    "contentMediaType",
    "default",
    "definitions",
    "dependentRequired",
    "dependentSchemas",
    "deprecated",
    "description",
    "else",
    "enum",
    "examples",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "if",
    "items",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minItems",
    "minLength",
    "minProperties",
    "minimum",
    "multipleOf",
    "not",
    "nullable",
    "oneOf",
    "pattern",
    "patternProperties",
    "prefixItems",
    "properties",
    "propertyNames",
    "required",
    "then",
    "title",
    "type",
];
/// Numbers of fewer digits are nobody's.
const MIN_DIGITS: usize = 8;
/// The longest `data:` and media type before data.
const MAX_MEDIA_TYPE_BYTES: usize = 200;

/// What a text is beside others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Of {
    /// One by itself.
    Alone,
    /// One of several that stand side by side.
    PartOfRun,
    /// All of those, after them, as one.
    Run,
}

/// Is offered every text; what it returns takes the text's place.
pub(super) type Reader<'a> = dyn FnMut(&str, Of) -> Option<String> + 'a;

/// Texts that are checked together.
#[derive(Debug)]
pub(super) enum Texts<'a> {
    /// All of a request's body.
    Body(&'a mut Value),
    /// One, wherever it comes from.
    One(Part<'a>),
}

impl Texts<'_> {
    /// Offers every text.
    pub(super) fn rewrite(&mut self, reader: &mut Reader<'_>) {
        match self {
            Self::Body(body) => rewrite_body(body, reader),
            Self::One(part) => part.rewrite(&mut |text| reader(text, Of::Alone)),
        }
    }

    /// Shows every text.
    pub(super) fn read(&mut self, mut read: impl FnMut(&str, Of)) {
        self.rewrite(&mut |text, of| {
            read(text, of);
            None
        });
    }
}

fn rewrite_body(body: &mut Value, reader: &mut Reader<'_>) {
    let Value::Object(members) = body else { return };
    for (name, member) in members.iter_mut().filter(|(name, _)| *name != "model") {
        let names = if KNOWN.contains(&name.as_str()) { Names::OfProtocol } else { Names::Free };
        // A body's own numbers are settings.
        if !member.is_number() {
            rewrite_field(name, member, names, reader);
        }
    }
}

/// Whose words the names of members are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Names {
    OfProtocol,
    OfSchema,
    Free,
}

impl Names {
    fn below(self, field: &str) -> Self {
        if self == Self::OfProtocol && SCHEMAS.contains(&field) { Self::OfSchema } else { self }
    }

    /// Whether a member's name below `field` is to be read.
    fn is_own(self, field: &str, name: &str) -> bool {
        match self {
            _ if FREE.contains(&field) => true,
            Self::Free => true,
            Self::OfSchema => !KEYWORDS.contains(&name),
            Self::OfProtocol => !is_word(name),
        }
    }
}

/// As the protocol's own are: short, in one piece, without digits.
fn is_word(text: &str) -> bool {
    text.len() <= 32 && text.bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b'_')
}

/// The parser bounds the depth.
fn rewrite_field(field: &str, value: &mut Value, names: Names, reader: &mut Reader<'_>) {
    match value {
        Value::String(text) => rewrite_string(field, text, reader),
        Value::Number(number) => {
            let number = number.to_string();
            if number.len() >= MIN_DIGITS
                && let Some(rewritten) = reader(&number, Of::Alone)
            {
                *value = Value::String(rewritten);
            }
        }
        Value::Array(items) if field == "content" => rewrite_content(items, names, reader),
        Value::Array(items) => items.iter_mut().for_each(|item| rewrite_field(field, item, names, reader)),
        Value::Object(members) => {
            for (name, member) in members.iter_mut() {
                rewrite_member(field, name, member, names, reader);
            }
            rewrite_names(field, members, names.below(field), reader);
        }
        Value::Null | Value::Bool(_) => {}
    }
}

fn rewrite_member(field: &str, name: &str, member: &mut Value, names: Names, reader: &mut Reader<'_>) {
    let names = names.below(field);
    match member {
        Value::String(text) if DATA.contains(&(field, name)) => rewrite_data(text, reader),
        // Of a client's own names none is the protocol's.
        Value::String(text) if names.is_own(field, name) && WORDS.contains(&name) => rewrite_string("", text, reader),
        member => rewrite_field(name, member, names, reader),
    }
}

fn rewrite_string(field: &str, text: &mut String, reader: &mut Reader<'_>) {
    if WORDS.contains(&field) && is_word(text) {
        return;
    }
    if field == "url" && text.starts_with("data:") {
        return rewrite_data(text, reader);
    }
    let mut part = if field == "arguments" { Part::Json(text) } else { Part::Plain(text) };
    part.rewrite(&mut |text| reader(text, Of::Alone));
}

/// Data as a URL or by itself: what is a text in base64 is read as one, pictures and sounds are not, and anything else as it stands.
fn rewrite_data(text: &mut String, reader: &mut Reader<'_>) {
    let head_end =
        text.find(";base64,").filter(|end| *end < MAX_MEDIA_TYPE_BYTES).map_or(0, |end| end + ";base64,".len());
    let (head, data) = text.split_at(head_end);
    let Ok(bytes) = BASE64.decode(data.trim_ascii().as_bytes()) else {
        return Part::Plain(text).rewrite(&mut |text| reader(text, Of::Alone));
    };
    let Ok(decoded) = std::str::from_utf8(&bytes) else { return };
    if let Some(rewritten) = reader(decoded, Of::Alone) {
        *text = head.to_owned() + &BASE64.encode(rewritten.as_bytes());
    }
}

fn rewrite_names(field: &str, members: &mut Map<String, Value>, names: Names, reader: &mut Reader<'_>) {
    let read = |name: &String| if names.is_own(field, name) { reader(name, Of::Alone) } else { None };
    let renamed: Vec<Option<String>> = members.keys().map(read).collect();
    if renamed.iter().any(Option::is_some) {
        let old = std::mem::take(members);
        *members = old.into_iter().zip(renamed).map(|((name, member), new)| (new.unwrap_or(name), member)).collect();
    }
}

/// The parts of a message.
fn rewrite_content(items: &mut Vec<Value>, names: Names, reader: &mut Reader<'_>) {
    let mut from = 0;
    while from < items.len() {
        let num_texts = items[from..].iter().take_while(|item| text_of(item).is_some()).count();
        if num_texts < 2 {
            rewrite_field("content", &mut items[from], names, reader);
            from += 1;
            continue;
        }
        for item in &mut items[from..from + num_texts] {
            for (name, member) in item.as_object_mut().into_iter().flatten().filter(|(name, _)| *name != "text") {
                rewrite_member("content", name, member, names, reader);
            }
            if let Some(rewritten) = text_of(item).and_then(|text| reader(text, Of::PartOfRun)) {
                item["text"] = Value::String(rewritten);
            }
        }
        from += rewrite_run(items, from, num_texts, reader);
    }
}

/// Of a part that is a text.
fn text_of(item: &Value) -> Option<&str> {
    let is_text = item.get("type").is_none_or(|kind| kind == "text");
    item.get("text").filter(|_| is_text)?.as_str()
}

/// Reads texts side by side as one; how many are left. What was found over the border of two moves to the first of them, and a text of
/// which nothing is left goes, since providers refuse empty ones.
fn rewrite_run(items: &mut Vec<Value>, from: usize, num_texts: usize, reader: &mut Reader<'_>) -> usize {
    let whole: String = items[from..from + num_texts].iter().filter_map(text_of).collect();
    let Some(rewritten) = reader(&whole, Of::Run) else { return num_texts };
    let same_before = whole.bytes().zip(rewritten.bytes()).take_while(|(old, new)| old == new).count();
    let shorter = whole.len().min(rewritten.len()) - same_before;
    let same_after =
        whole.bytes().rev().zip(rewritten.bytes().rev()).take(shorter).take_while(|(old, new)| old == new).count();
    let after = items.split_off(from + num_texts);
    let (mut border, mut cut) = (0, 0);
    for mut item in items.split_off(from) {
        let had_text = text_of(&item).map_or(0, str::len);
        border += had_text;
        let end = if border <= same_before {
            border
        } else if whole.len() - border <= same_after {
            rewritten.len() - (whole.len() - border)
        } else {
            rewritten.len() - same_after
        };
        let end = rewritten.ceil_char_boundary(end.max(cut));
        if end > cut || had_text == 0 {
            item["text"] = Value::String(rewritten[cut..end].to_owned());
            items.push(item);
        }
        cut = end;
    }
    let num_left = items.len() - from;
    items.extend(after);
    num_left
}

/// A string and how it is read.
#[derive(Debug)]
pub(super) enum Part<'a> {
    /// As it stands.
    Plain(&'a mut String),
    /// JSON, where it parses.
    Json(&'a mut String),
}

impl Part<'_> {
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn seen(body: &mut Value) -> Vec<(String, Of)> {
        let mut seen = Vec::new();
        Texts::Body(body).read(|text, of| seen.push((text.to_owned(), of)));
        seen
    }

    #[test]
    fn every_string_that_a_client_may_write_is_visited() {
        let mut body = json!({
            "model": "no", "user": "t14", "prompt": ["t1", "t2"], "suffix": "t3", "seed": 4_111_111_111_u64,
            "stop": ["t15"], "metadata": {"t16": "t17"}, "prediction": {"type": "content", "content": "t18"},
            "an_upstreams_own": {"t19": [{"t20": "t21", "data": "t32"}]},
            "more": {"url": "data:text/plain,t33"},
            "messages": [
                {"role": "system", "content": "t4"},
                {"role": "user", "name": "t5", "content": [
                    {"type": "text", "text": "t6"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,/+7/"}},
                    {"type": "input_audio", "input_audio": {"data": "/+7/", "format": "wav"}},
                    {"type": "image_url", "image_url": {"url": "https://t22"}},
                    {"type": "file", "file": {"filename": "t23", "file_data": "data:text/plain;base64,dDM0"}},
                ]},
                {"role": "assistant", "content": null, "reasoning_content": "t7", "tool_calls": [
                    {"id": "t24", "type": "function", "function": {"name": "t25", "arguments": "{\"a\": [\"t8\", 1]}"}},
                    {"id": "x", "type": "custom", "custom": {"name": "y", "input": "t13"}},
                ]},
                {"role": "tool", "tool_call_id": "t26", "content": "t9"},
                {"role": "assistant", "data": "t35", "type": "t36 x", "content": [
                    {"type": "refusal", "refusal": "t37", "text": "t38"},
                    {"type": "text", "text": "t39", "note": "t40"},
                    {"type": "text", "text": "x"},
                ]},
                {"role": "function", "function_call": {"arguments": "not json t10"}},
            ],
            "tools": [{"type": "function", "function": {"name": "t27", "description": "t11", "parameters": {"t41": {}, "data": "t42",
                "properties": {"t28": {"type": "string", "description": "t12", "enum": ["t29"], "default": 41_111_111},
                    "role": {"const": "t30"}}, "required": ["t31"]}}}],
        });
        let seen = seen(&mut body);
        for number in 1..=42 {
            let name = format!("t{number}");
            let is_name = |(text, _): &&(String, Of)| text.split([' ', '/', ',']).any(|word| word == name);
            assert_eq!(seen.iter().filter(is_name).count(), 1, "{name}: {seen:?}");
        }
        assert!(seen.iter().any(|(text, _)| text == "41111111"));
        for unread in
            ["no", "data:image/png;base64,/+7/", "/+7/", "4111111111", "user", "function", "content", "properties"]
        {
            assert!(!seen.iter().any(|(text, _)| text == unread), "{unread}: {seen:?}");
        }
    }

    #[test]
    fn arguments_stay_json_and_untouched_ones_stay_as_they_were() {
        let body = |arguments: &str| json!({"messages": [{"tool_calls": [{"function": {"arguments": arguments}}]}]});
        let rewritten = |arguments: &str| {
            let mut body = body(arguments);
            Texts::Body(&mut body).rewrite(&mut |text, _| text.contains("42").then(|| "[X_1]".to_owned()));
            body["messages"][0]["tool_calls"][0]["function"]["arguments"].as_str().unwrap().to_owned()
        };
        assert_eq!(rewritten("{ \"a\" : 1 }"), "{ \"a\" : 1 }");
        assert_eq!(rewritten("{ \"a\" : 42, \"b\\u0034\": \"\\u00342\" }"), "{\"a\":\"[X_1]\",\"b4\":\"[X_1]\"}");
    }

    #[test]
    fn texts_side_by_side_are_one() {
        let content = |texts: &[&str]| {
            let parts: Vec<Value> = texts.iter().map(|text| json!({"type": "text", "text": text})).collect();
            json!({"messages": [{"role": "user", "content": parts}]})
        };
        for (before, after) in [
            (&["a 4", "2 b"][..], &["a X", " b"][..]),
            (&["4", "2"], &["X"]),
            (&["a ", "4", "2", " b"], &["a ", "X", " b"]),
            (&["42 a 4", "2", "b 42"], &["X a X", "b X"]),
            (&["42 a", "b 42"], &["X a", "b X"]),
            (&["é4", "2é"], &["éX", "é"]),
            (&["a", "b"], &["a", "b"]),
        ] {
            let mut body = content(before);
            Texts::Body(&mut body).rewrite(&mut |text, _| text.contains("42").then(|| text.replace("42", "X")));
            let text = |body: &Value| -> Vec<String> {
                let parts = body["messages"][0]["content"].as_array().unwrap();
                parts.iter().map(|part| part["text"].as_str().unwrap().to_owned()).collect()
            };
            assert_eq!(text(&body).concat(), after.concat(), "{before:?}");
            assert_eq!(text(&body).len(), after.len(), "{before:?}: {:?}", text(&body));
        }
        let mut apart = json!({"messages": [{"content": [
            {"type": "text", "text": "4"}, {"type": "image_url", "image_url": {"url": "data:x"}}, {"type": "text", "text": "2"}]}]});
        assert!(seen(&mut apart).iter().all(|(_, of)| *of == Of::Alone));
    }
}
