//! A model's own chat template: OpenAI messages in, the prompt's text out, as transformers' `apply_chat_template` renders it.
//!
//! It must not know HTTP or tokens. Templates come with the model and are untrusted: a render has a bound on its steps,
//! its memory and its output, and every failure is an error.
//!
//! Four things are done to messages before the template sees them, as vLLM and transformers do:
//! - **Content as an array of parts** is passed on where the template reads parts, else its texts are joined by line
//!   feeds. Whether it reads them is found out once, at load, by rendering a probe ([`ContentFormat`]).
//! - **Content that is null or absent** stays so where the template knows `tool_calls` (such messages have none), else
//!   it becomes the empty string.
//! - **Arguments of tool calls**, a JSON string on OpenAI's wire, become the object they spell.
//! - **Reasoning** of earlier answers is known under all names in use (`reasoning_content`, `thinking`, `reasoning`).

use std::{collections::BTreeMap, io, path::Path, thread};

use bindery_model::weights::gguf::GgufFile;
use chrono::NaiveDateTime;
use minijinja::{Environment, ErrorKind, Value};
use serde_json::{Map, Value as Json, json};

use super::{
    template,
    tokenizer::{Tokenizer, read_bounded, read_json},
};
use crate::EngineError;

/// Longest template source; published ones stay below 40 kB.
pub const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// Longest rendered prompt: what may be tokenised.
pub const MAX_RENDERED_BYTES: usize = super::tokenizer::MAX_TEXT_BYTES;
/// Named templates a model may have.
const MAX_TEMPLATES: usize = 64;
/// Steps that any render may take; a step is an instruction or 64 bytes of text.
const BASE_FUEL: u64 = 1_000_000;
/// Further steps for each message, so that a long conversation may be walked several times.
const FUEL_PER_MESSAGE: u64 = 1_000;
/// Further steps for the text of a request: it may be copied sixteen times.
const BYTES_PER_FUEL: u64 = 4;
/// Most steps, whatever the request: under half a second, and 256 MB.
const MAX_FUEL: u64 = 4_000_000;
/// Stack per step. A template can nest a value one level deeper for every two to three steps, and minijinja prints, compares
/// and drops nested values by recursion, which took at most 640 bytes a level where it was measured.
const STACK_BYTES_PER_FUEL: u64 = 512;
/// Stack for compiling: an expression of [`MAX_TEMPLATE_BYTES`] can be half as many levels deep.
const COMPILE_STACK_BYTES: u64 = 1 << 29;

/// A model's own chat template, rendered as transformers does.
pub struct ChatTemplate {
    environment: Environment<'static>,
    sources: BTreeMap<String, String>,
    named_tokens: BTreeMap<String, String>,
    content_format: ContentFormat,
    /// The template reads `tool_calls`, so it expects messages without content.
    knows_tool_calls: bool,
}

/// What one request asks a template to render.
#[derive(Clone, Debug, Default)]
pub struct RenderRequest {
    /// OpenAI messages as JSON objects, key order kept.
    pub messages: Vec<Json>,
    /// Tool definitions as JSON objects, key order kept.
    pub tools: Option<Vec<Json>>,
    /// Ends with the beginning of an assistant's turn.
    pub add_generation_prompt: bool,
    /// vLLM's chat_template_kwargs, and reasoning_effort.
    pub kwargs: Map<String, Json>,
}

/// The form of `content` that a template reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentFormat {
    /// Strings only: parts are joined.
    Text,
    /// Both.
    TextOrParts,
    /// Parts only: strings are wrapped in one.
    Parts,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("names", &self.sources.keys())
            .field("content_format", &self.content_format)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// A model folder's template: `chat_template.jinja` (further ones in `additional_chat_templates/`), else
    /// `chat_template.json`, else `chat_template` in `tokenizer_config.json` (one, or a list with names). `None`: the
    /// model has none.
    pub fn from_dir(path: &Path, tokenizer: &Tokenizer) -> Result<Option<Self>, EngineError> {
        let mut sources = BTreeMap::new();
        let limit = MAX_TEMPLATE_BYTES as u64;
        let as_text = |path: &Path, bytes: Vec<u8>| {
            String::from_utf8(bytes).map_err(|_| EngineError::Text(format!("{} is not UTF-8", path.display())))
        };
        let main = path.join("chat_template.jinja");
        if let Some(bytes) = read_bounded(&main, limit)? {
            sources.insert(DEFAULT.to_owned(), as_text(&main, bytes)?);
        }
        for entry in std::fs::read_dir(path.join("additional_chat_templates")).into_iter().flatten().take(MAX_TEMPLATES)
        {
            let Ok(entry) = entry else { continue };
            let file = entry.path();
            let name = file.file_stem().map(|name| name.to_string_lossy().into_owned());
            if let (Some(name), Some("jinja")) = (name, file.extension().and_then(|extension| extension.to_str()))
                && let Some(bytes) = read_bounded(&file, limit)?
            {
                sources.insert(name, as_text(&file, bytes)?);
            }
        }
        for file in ["chat_template.json", "tokenizer_config.json"] {
            if sources.is_empty() {
                let config = read_json(&path.join(file))?.unwrap_or_default();
                sources = named_sources(&config["chat_template"]);
            }
        }
        Self::from_sources(sources, tokenizer)
    }

    /// A GGUF file's `tokenizer.chat_template`, with the further ones that `tokenizer.chat_templates` names. `None`: the
    /// file has none.
    pub fn from_gguf(file: &GgufFile, tokenizer: &Tokenizer) -> Result<Option<Self>, EngineError> {
        Self::from_sources(gguf_sources(file), tokenizer)
    }

    /// One template given as text, such as a user's own.
    pub fn from_source(source: &str, tokenizer: &Tokenizer) -> Result<Self, EngineError> {
        Self::compile(BTreeMap::from([(DEFAULT.to_owned(), source.to_owned())]), tokenizer.named_tokens().clone())
    }

    fn from_sources(sources: BTreeMap<String, String>, tokenizer: &Tokenizer) -> Result<Option<Self>, EngineError> {
        if sources.is_empty() { Ok(None) } else { Self::compile(sources, tokenizer.named_tokens().clone()).map(Some) }
    }

    fn compile(sources: BTreeMap<String, String>, named_tokens: BTreeMap<String, String>) -> Result<Self, EngineError> {
        if sources.len() > MAX_TEMPLATES {
            let num_templates = sources.len();
            return Err(EngineError::Text(format!(
                "the model has {num_templates} chat templates, the limit is {MAX_TEMPLATES}"
            )));
        }
        let mut environment = template::environment()?;
        for (name, source) in &sources {
            if source.len() > MAX_TEMPLATE_BYTES {
                let num_bytes = source.len();
                return Err(EngineError::Text(format!(
                    "the model's chat template {name:?} has {num_bytes} bytes, the limit is {MAX_TEMPLATE_BYTES}"
                )));
            }
            let failed = |reason: String| {
                EngineError::Text(format!("the model's chat template {name:?} is not valid Jinja: {reason}"))
            };
            on_deep_stack(COMPILE_STACK_BYTES, || {
                template::prepared_source(source)
                    .and_then(|prepared| environment.add_template_owned(name.clone(), prepared))
                    .map_err(|error| describe(&error))
            })
            .unwrap_or_else(|reason| Err(reason.to_owned()))
            .map_err(failed)?;
        }
        let knows_tool_calls = sources.values().any(|source| source.contains("tool_calls"));
        let mut template =
            Self { environment, sources, named_tokens, content_format: ContentFormat::TextOrParts, knows_tool_calls };
        template.content_format = template.probe_content_format();
        Ok(template)
    }

    /// Renders the messages at the present time.
    pub fn render(&self, request: &RenderRequest) -> Result<String, EngineError> {
        self.render_at(request, chrono::Local::now().naive_local())
    }

    /// The same at a given time, which only templates that print the date notice.
    pub fn render_at(&self, request: &RenderRequest, now: NaiveDateTime) -> Result<String, EngineError> {
        let messages = request.messages.iter().enumerate().map(|(index, message)| self.prepare(index, message));
        let messages: Vec<Json> = messages.collect::<Result<_, _>>()?;
        self.render_prepared(&messages, request, now)
    }

    /// The source of the template that a plain conversation uses.
    pub fn source(&self) -> Option<&str> {
        self.sources.get(DEFAULT).map(String::as_str)
    }

    /// What `content` may be without being converted.
    pub fn content_format(&self) -> ContentFormat {
        self.content_format
    }

    /// transformers' choice among named templates: `tool_use` for a request with tools, else `default`.
    fn name_for(&self, request: &RenderRequest) -> Result<&str, EngineError> {
        let wanted = if request.tools.is_some() && self.sources.contains_key(TOOL_USE) { TOOL_USE } else { DEFAULT };
        let only = || if self.sources.len() == 1 { self.sources.keys().next() } else { None };
        self.sources.get_key_value(wanted).map(|(name, _)| name).or_else(only).map(String::as_str).ok_or_else(|| {
            let names: Vec<_> = self.sources.keys().map(String::as_str).collect();
            EngineError::Text(format!("the model has no default chat template, only {}", names.join(", ")))
        })
    }

    fn render_prepared(
        &self,
        messages: &[Json],
        request: &RenderRequest,
        now: NaiveDateTime,
    ) -> Result<String, EngineError> {
        let list = |values: &[Json]| -> Value { values.iter().map(template::to_template_value).collect() };
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        for (name, token) in &self.named_tokens {
            context.insert(name, Value::from(token.as_str()));
        }
        context.insert("documents", Value::from(()));
        context.insert("strftime_now", template::strftime_now(now));
        for (name, value) in &request.kwargs {
            context.insert(name, template::to_template_value(value));
        }
        context.insert("messages", list(messages));
        context.insert("tools", request.tools.as_deref().map_or(Value::from(()), list));
        context.insert("add_generation_prompt", Value::from(request.add_generation_prompt));
        let context = Value::from_pairs(context);

        let name = self.name_for(request)?;
        let num_bytes: usize = messages.iter().chain(request.tools.iter().flatten()).map(json_weight).sum();
        let fuel = BASE_FUEL + FUEL_PER_MESSAGE * messages.len() as u64 + num_bytes as u64 / BYTES_PER_FUEL;
        let fuel = fuel.min(MAX_FUEL);
        on_deep_stack(fuel * STACK_BYTES_PER_FUEL, || {
            let mut environment = self.environment.clone();
            environment.set_fuel(Some(fuel));
            let mut out = BoundedText { bytes: Vec::new() };
            environment
                .get_template(name)
                .and_then(|template| template.render_captured_to(context, &mut out).map(drop))
                .map_err(|error| failure(&error))?;
            String::from_utf8(out.bytes)
                .map_err(|_| invalid("The model's chat template prints invalid text".to_owned()))
        })
        .unwrap_or_else(|reason| Err(invalid(format!("The model's chat template fails on these messages: {reason}"))))
    }

    /// A message as the template expects it.
    fn prepare(&self, index: usize, message: &Json) -> Result<Json, EngineError> {
        let Json::Object(fields) = message else {
            return Err(invalid(format!("messages[{index}] is no object: send an object with role and content")));
        };
        let mut fields = fields.clone();
        let reasoning = ["reasoning_content", "thinking", "reasoning"]
            .iter()
            .find_map(|name| fields.get(*name).filter(|v| !v.is_null()));
        if let Some(reasoning) = reasoning.cloned() {
            if !fields.contains_key("thinking") {
                fields.shift_insert(0, "thinking".to_owned(), reasoning.clone());
            }
            fields.insert("reasoning_content".to_owned(), reasoning);
        }
        let content = fields.get("content").unwrap_or(&Json::Null);
        let content = match (content, self.content_format) {
            (Json::Null, _) if !self.knows_tool_calls => Some(Json::from("")),
            (Json::Array(parts), ContentFormat::Text) => Some(Json::from(joined_text(index, parts)?)),
            (Json::String(text), ContentFormat::Parts) => Some(json!([{"type": "text", "text": text}])),
            _ => None,
        };
        if let Some(content) = content {
            fields.insert("content".to_owned(), content);
        }
        for (call_index, call) in
            fields.get_mut("tool_calls").and_then(Json::as_array_mut).into_iter().flatten().enumerate()
        {
            // `["function"]` would insert a missing key.
            let Some(arguments) = call.get_mut("function").and_then(|function| function.get_mut("arguments")) else {
                continue;
            };
            let Json::String(text) = arguments else { continue };
            *arguments = match text.trim() {
                "" => json!({}),
                text => serde_json::from_str(text).map_err(|error| {
                    invalid(format!(
                        "messages[{index}].tool_calls[{call_index}].function.arguments is no valid JSON: {error}"
                    ))
                })?,
            };
        }
        Ok(Json::Object(fields))
    }

    /// Renders one message as text and as parts and looks which comes out as it should.
    fn probe_content_format(&self) -> ContentFormat {
        const NEEDLE: &str = "Bindery probes this template";
        let request = |content: Json| RenderRequest {
            messages: vec![json!({"role": "user", "content": content})],
            add_generation_prompt: true,
            ..RenderRequest::default()
        };
        let shows = |content: Json, traces: &[&str]| {
            let request = request(content);
            let rendered = self.render_prepared(&request.messages, &request, NaiveDateTime::default());
            rendered.is_ok_and(|text| text.contains(NEEDLE) && !traces.iter().any(|trace| text.contains(trace)))
        };
        // A list printed whole shows its keys in quotes.
        let reads_parts =
            shows(json!([{"type": "text", "text": NEEDLE}]), &["'type'", "\"type\"", "'text'", "\"text\""]);
        let reads_text = shows(json!(NEEDLE), &[]);
        match (reads_text, reads_parts) {
            (true, true) => ContentFormat::TextOrParts,
            (false, true) => ContentFormat::Parts,
            (_, false) => ContentFormat::Text,
        }
    }
}

/// Runs `work` on a thread with that much stack, of which only the part in use takes memory. A panic is an error.
fn on_deep_stack<T: Send>(stack_bytes: u64, work: impl FnOnce() -> T + Send) -> Result<T, &'static str> {
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("chat-template".to_owned()).stack_size(stack_bytes as usize);
        let thread = builder.spawn_scoped(scope, work).map_err(|_| "no thread can be started")?;
        thread.join().map_err(|_| "the template engine failed")
    })
}

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// `chat_template`: a string, or a list of `{name, template}`.
/// A GGUF file's templates by name.
pub(crate) fn gguf_sources(file: &GgufFile) -> BTreeMap<String, String> {
    let mut sources = BTreeMap::new();
    if let Some(source) = file.str("tokenizer.chat_template") {
        sources.insert(DEFAULT.to_owned(), source.to_owned());
    }
    for name in file.strings("tokenizer.chat_templates").unwrap_or_default() {
        if let Some(source) = file.str(&format!("tokenizer.chat_template.{name}")) {
            sources.entry(name.clone()).or_insert_with(|| source.to_owned());
        }
    }
    sources
}

fn named_sources(value: &Json) -> BTreeMap<String, String> {
    if let Some(source) = value.as_str() {
        return BTreeMap::from([(DEFAULT.to_owned(), source.to_owned())]);
    }
    let pair = |entry: &Json| Some((entry["name"].as_str()?.to_owned(), entry["template"].as_str()?.to_owned()));
    value.as_array().into_iter().flatten().filter_map(pair).collect()
}

fn joined_text(index: usize, parts: &[Json]) -> Result<String, EngineError> {
    let mut texts = Vec::with_capacity(parts.len());
    for (part_index, part) in parts.iter().enumerate() {
        let text = part.as_str().or_else(|| part["text"].as_str().filter(|_| is_text_part(part)));
        texts.push(text.ok_or_else(|| {
            let kind = part["type"].as_str().unwrap_or("nothing");
            invalid(format!(
                "messages[{index}].content[{part_index}] is of type {kind}, the model's chat template takes text only"
            ))
        })?);
    }
    Ok(texts.join("\n"))
}

fn is_text_part(part: &Json) -> bool {
    part.get("type").is_none_or(|kind| kind == "text" || kind == "input_text" || kind == "output_text")
}

/// About how many bytes a value has; walks it once.
fn json_weight(value: &Json) -> usize {
    match value {
        Json::String(text) => text.len() + 8,
        Json::Array(items) => items.iter().map(json_weight).sum::<usize>() + 8,
        Json::Object(entries) => entries.iter().map(|(key, value)| key.len() + json_weight(value)).sum::<usize>() + 8,
        _ => 8,
    }
}

fn invalid(message: String) -> EngineError {
    EngineError::Invalid { param: "messages", message }
}

/// An error with its causes, in one line.
fn describe(error: &minijinja::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn failure(error: &minijinja::Error) -> EngineError {
    if let Some(message) = template::RaisedByTemplate::find(error) {
        return invalid(message.to_owned());
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return invalid(
            "The model's chat template needs too many steps for these messages: send fewer or shorter ones".to_owned(),
        );
    }
    invalid(format!("The model's chat template cannot render these messages: {}", describe(error)))
}

/// Takes text up to [`MAX_RENDERED_BYTES`].
struct BoundedText {
    bytes: Vec<u8>,
}

impl io::Write for BoundedText {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + text.len() > MAX_RENDERED_BYTES {
            return Err(io::Error::other(format!("the rendered prompt is longer than {MAX_RENDERED_BYTES} bytes")));
        }
        self.bytes.extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
