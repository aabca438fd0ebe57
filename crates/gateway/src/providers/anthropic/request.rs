//! A chat request as `POST /v1/messages`.
//!
//! Invariant: `max_tokens` is always there; whatever thinking asks for fits below it, or is left out and named.

use std::collections::BTreeMap;

use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Map, Value, json};
use sha2::Sha256;

use super::{Format, Reader};
use crate::providers::{
    Call, Refusal, Translated,
    catalogue::{Capability, Thinking},
    chat::{ChatRequest, Effort, JsonSchema, Mode, ServiceTier, Tool, ToolChoice, ToolKind},
    conversation::{AssistantPart, Conversation, Turn, UserKind, UserPart},
    endpoint::EndUsers,
    media::{DataUrl, MediaUrl},
    reader::Wire,
    translation::{Translation, WantedFormat},
};

/// Where neither request nor tenant nor table has a limit: the field is required.
const DEFAULT_MAX_TOKENS: u64 = 4096;
/// The least budget that thinking takes.
const MIN_BUDGET_TOKENS: u64 = 1024;
/// Pictures it reads.
const IMAGE_TYPES: [&str; 4] = ["image/jpeg", "image/png", "image/gif", "image/webp"];
/// Whoever asks for a JSON object gets this beside the instructions.
const JSON_INSTRUCTION: &str = "Answer with one JSON object and nothing else: no explanation, no code fence.";
/// Of the user's hash, in hex digits.
const USER_ID_CHARS: usize = 32;

/// Translates.
pub(crate) fn chat(call: &Call, request: &ChatRequest) -> Result<Translated, Refusal> {
    let mut translation = Translation::new(call, request);
    translation.num_answers()?;
    translation.check_token_fields()?;
    translation.check_tools()?;
    translation.check_only_functions()?;
    translation.foreign_fields()?;
    translation.vllm()?;
    translation.penalties();
    translation.seed();
    let limit = translation.output_limit().unwrap_or(DEFAULT_MAX_TOKENS);
    let mut conversation = Conversation::of(request, &mut translation.warnings)?;
    check_prefill(&translation, &conversation)?;
    let AskedFormat { format, mut output_config, tool } = AskedFormat::of(&translation, &mut conversation)?;
    let tools = Tools::choose(&translation, tool)?;
    let thinks = thinking(&mut translation, &conversation, &tools, limit);
    let mut body = Map::new();
    let mut put = |name: &str, value: Value| body.insert(name.to_owned(), value);
    put("model", call.model.wire_name.as_str().into());
    put("max_tokens", limit.into());
    if !conversation.system.is_empty() {
        put("system", conversation.system.as_str().into());
    }
    put("messages", Blocks { call, ids: Ids::default(), thinks }.messages(&conversation)?);
    sampling(&mut translation, &thinks, &mut put);
    let stop = stop_sequences(&mut translation)?;
    if !stop.is_empty() {
        put("stop_sequences", stop.into());
    }
    tools.write(&mut put);
    thinks.write(&mut output_config, &mut put);
    if !output_config.is_empty() {
        put("output_config", Value::Object(output_config));
    }
    account(&mut translation, &mut put);
    if request.is_streamed() {
        put("stream", true.into());
    }
    Ok(Translated {
        path: path(call),
        body,
        warnings: translation.warnings,
        max_output_tokens: Some(limit),
        wire: Wire::Anthropic(Box::new(Reader::new(format, &call.model.wire_name))),
    })
}

/// The SDK's base URL has no version, so `/v1` is added; one that has it is taken as it is.
fn path(call: &Call) -> url::Url {
    let base = call.endpoint.base();
    let mut segments = base.segments();
    if segments.last() != Some(&"v1") {
        segments.push("v1");
    }
    base.with_path(segments.into_iter().chain(["messages"]))
}

fn check_prefill(translation: &Translation, conversation: &Conversation) -> Result<(), Refusal> {
    let is_prefill = matches!(conversation.turns.last(), Some(Turn::Assistant(_)));
    if is_prefill && !translation.can(Capability::Prefill) {
        let last = translation.request.messages.len() - 1;
        return Err(translation.refuse(&format!("messages[{last}]"), "end with a user message"));
    }
    Ok(())
}

/// The answer's shape: where it will be, and what is sent to ask for it.
struct AskedFormat {
    format: Format,
    output_config: Map<String, Value>,
    /// That has to be called.
    tool: Option<Value>,
}

impl AskedFormat {
    fn of(translation: &Translation, conversation: &mut Conversation) -> Result<Self, Refusal> {
        let mut asked = Self { format: Format::Text, output_config: Map::new(), tool: None };
        match translation.format()? {
            WantedFormat::Text => {}
            WantedFormat::JsonObject => {
                if !conversation.system.is_empty() {
                    conversation.system.push('\n');
                }
                conversation.system.push_str(JSON_INSTRUCTION);
                asked.format = Format::CheckedJson;
            }
            WantedFormat::JsonSchema(schema) if translation.can(Capability::StructuredOutputs) => {
                let schema = schema.schema.unwrap_or_else(any_object);
                asked.output_config.insert("format".to_owned(), json!({"type": "json_schema", "schema": schema}));
            }
            WantedFormat::JsonSchema(schema) => {
                if !translation.request.tools.is_empty() || !translation.can(Capability::ForcedToolUse) {
                    return Err(translation.refuse("response_format", "leave out `tools`, or name a newer model"));
                }
                asked.tool = Some(answer_tool(&schema));
                asked.format = Format::ForcedTool(schema.name);
            }
        }
        Ok(asked)
    }
}

/// For models without structured outputs: a tool whose input is the answer.
fn answer_tool(schema: &JsonSchema) -> Value {
    let description = schema.description.as_deref().unwrap_or("Gives the answer in the form that was asked for.");
    json!({
        "name": schema.name,
        "description": description,
        "input_schema": schema.schema.clone().unwrap_or_else(any_object),
    })
}

fn any_object() -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("type".to_owned(), "object".into());
    map
}

/// What may be called, and what must.
struct Tools {
    tools: Vec<Value>,
    choice: Option<Value>,
}

impl Tools {
    fn choose(translation: &Translation, forced: Option<Value>) -> Result<Self, Refusal> {
        let request = translation.request;
        if let Some(tool) = forced {
            let choice = json!({"type": "tool", "name": tool["name"]});
            return Ok(Self { tools: vec![tool], choice: Some(choice) });
        }
        let allowed = |tool: &Tool| match &request.tool_choice {
            Some(ToolChoice::Allowed { names, .. }) => names.iter().any(|name| name == tool.name()),
            None | Some(ToolChoice::Mode(_) | ToolChoice::Function(_) | ToolChoice::Custom(_)) => true,
        };
        let tools = request.tools.iter().filter(|tool| allowed(tool));
        let tools: Vec<Value> = tools.filter_map(|tool| write_tool(tool, translation)).collect();
        if tools.is_empty() {
            return Ok(Self { tools, choice: None });
        }
        let kind = match &request.tool_choice {
            None => None,
            Some(ToolChoice::Mode(Mode::None)) => Some("none"),
            Some(ToolChoice::Mode(Mode::Auto) | ToolChoice::Allowed { mode: Mode::Auto, .. }) => Some("auto"),
            Some(ToolChoice::Mode(Mode::Required) | ToolChoice::Allowed { .. }) => Some("any"),
            Some(ToolChoice::Function(_)) => Some("tool"),
            Some(ToolChoice::Custom(_)) => return Err(translation.refuse("tool_choice", "name a function")),
        };
        let one_at_a_time = request.parallel_tool_calls == Some(false);
        let mut choice = kind.or(one_at_a_time.then_some("auto")).map(|kind| json!({"type": kind}));
        if let Some(choice) = &mut choice {
            if let Some(ToolChoice::Function(name)) = &request.tool_choice {
                choice["name"] = name.as_str().into();
            }
            if one_at_a_time && kind != Some("none") {
                choice["disable_parallel_tool_use"] = true.into();
            }
        }
        Ok(Self { tools, choice })
    }

    /// Thinking goes with a free choice only.
    fn are_forced(&self) -> bool {
        let kind = self.choice.as_ref().and_then(|choice| choice["type"].as_str());
        matches!(kind, Some("any" | "tool"))
    }

    fn write(self, put: &mut impl FnMut(&str, Value) -> Option<Value>) {
        if !self.tools.is_empty() {
            put("tools", self.tools.into());
        }
        if let Some(choice) = self.choice {
            put("tool_choice", choice);
        }
    }
}

fn write_tool(tool: &Tool, translation: &Translation) -> Option<Value> {
    let ToolKind::Function { name, description, parameters, strict } = &tool.kind else { return None };
    let schema = parameters.clone().filter(|schema| !schema.is_empty());
    let schema = schema.map_or_else(|| json!({"type": "object", "properties": {}}), Value::Object);
    let mut value = json!({"name": name, "input_schema": schema});
    if let Some(description) = description {
        value["description"] = description.as_str().into();
    }
    if *strict == Some(true) && translation.can(Capability::StructuredOutputs) {
        value["strict"] = true.into();
    }
    Some(value)
}

/// How thinking is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thinks {
    /// Nothing is said.
    Unsaid,
    Disabled,
    Adaptive(Effort),
    /// A model that always thinks and is told how much.
    Effort(Effort),
    Budget(u64),
}

impl Thinks {
    /// Whether signed thoughts of earlier turns go along.
    fn replays(self) -> bool {
        matches!(self, Self::Adaptive(_) | Self::Effort(_) | Self::Budget(_))
    }

    fn write(self, output_config: &mut Map<String, Value>, put: &mut impl FnMut(&str, Value) -> Option<Value>) {
        let mut effort = |effort: Effort| output_config.insert("effort".to_owned(), effort.as_str().into());
        match self {
            Self::Unsaid => {}
            Self::Disabled => {
                put("thinking", json!({"type": "disabled"}));
            }
            Self::Adaptive(level) => {
                put("thinking", json!({"type": "adaptive"}));
                effort(level);
            }
            Self::Effort(level) => {
                effort(level);
            }
            Self::Budget(budget_tokens) => {
                put("thinking", json!({"type": "enabled", "budget_tokens": budget_tokens}));
            }
        }
    }
}

fn thinking(translation: &mut Translation, conversation: &Conversation, tools: &Tools, limit: u64) -> Thinks {
    let Some(effort) = translation.effort() else { return Thinks::Unsaid };
    let kind = translation.call.model.capabilities.thinking;
    if effort == Effort::None {
        return match kind {
            Thinking::Adaptive => Thinks::Disabled,
            // Off unless asked for, never on, or always on.
            Thinking::Budget
            | Thinking::None
            | Thinking::AlwaysAdaptive
            | Thinking::AlwaysBudget
            | Thinking::Effort
            | Thinking::Level => Thinks::Unsaid,
        };
    }
    match kind {
        Thinking::AlwaysAdaptive => Thinks::Effort(effort),
        Thinking::Adaptive | Thinking::Budget | Thinking::AlwaysBudget if tools.are_forced() => {
            translation.warnings.drop("reasoning_effort");
            Thinks::Unsaid
        }
        Thinking::Adaptive => Thinks::Adaptive(effort),
        Thinking::Budget | Thinking::AlwaysBudget => {
            // Thoughts count against the limit, so some of it is left for the answer; a turn that is still at work must start with its
            // signed thoughts.
            let budget = budget(effort).min(limit.saturating_mul(3) / 4);
            let model = &translation.call.model.wire_name;
            if budget < MIN_BUDGET_TOKENS || is_at_work_without_thoughts(conversation, model) {
                translation.warnings.drop("reasoning_effort");
                return Thinks::Unsaid;
            }
            Thinks::Budget(budget)
        }
        Thinking::None | Thinking::Effort | Thinking::Level => Thinks::Unsaid,
    }
}

fn budget(effort: Effort) -> u64 {
    match effort {
        Effort::None | Effort::Minimal | Effort::Low => 1024,
        Effort::Medium => 2048,
        Effort::High => 4096,
        Effort::XHigh => 8192,
        Effort::Max => 16_384,
    }
}

/// The last assistant turn called tools, and its thoughts were not sent back.
fn is_at_work_without_thoughts(conversation: &Conversation, model: &str) -> bool {
    let last = conversation.turns.iter().rev().find_map(|turn| match turn {
        Turn::Assistant(parts) => Some(parts),
        Turn::User(_) => None,
    });
    last.is_some_and(|parts| {
        parts.iter().any(|part| matches!(part, AssistantPart::Call { .. }))
            && !parts
                .iter()
                .any(|part| matches!(part, AssistantPart::Carried(extra) if thoughts(extra, model).is_some()))
    })
}

/// Signed thoughts carried along, if this very model wrote them.
fn thoughts<'a>(extra: &'a Map<String, Value>, model: &str) -> Option<&'a Vec<Value>> {
    let ours = extra.get("anthropic")?;
    (ours["model"] == model).then(|| ours["thinking_blocks"].as_array()).flatten()
}

fn sampling(translation: &mut Translation, thinks: &Thinks, put: &mut impl FnMut(&str, Value) -> Option<Value>) {
    if thinks.replays() {
        let sampling = translation.request.sampling.clone();
        translation.drop_sampling(&sampling);
        return;
    }
    let chosen = translation.sampling();
    if let Some(temperature) = chosen.temperature {
        if temperature > 1.0 {
            translation.warnings.adjust("temperature", format!("{temperature} sent as 1 (the most of this provider)"));
        }
        put("temperature", temperature.min(1.0).into());
    }
    if let Some(top_p) = chosen.top_p {
        put("top_p", top_p.into());
    }
    if let Some(top_k) = chosen.top_k {
        put("top_k", top_k.into());
    }
}

fn stop_sequences(translation: &mut Translation) -> Result<Vec<Value>, Refusal> {
    let stop = translation.stop()?;
    let (kept, blank): (Vec<&String>, Vec<&String>) = stop.iter().partition(|text| !text.trim().is_empty());
    if !blank.is_empty() {
        translation.warnings.adjust("stop", "strings of white space alone are left out");
    }
    Ok(kept.into_iter().map(|text| text.as_str().into()).collect())
}

fn account(translation: &mut Translation, put: &mut impl FnMut(&str, Value) -> Option<Value>) {
    let request = translation.request;
    match request.service_tier {
        None => {}
        Some(ServiceTier::Auto) => {
            put("service_tier", "auto".into());
        }
        Some(ServiceTier::Default) => {
            put("service_tier", "standard_only".into());
        }
        Some(ServiceTier::Flex | ServiceTier::Scale | ServiceTier::Priority | ServiceTier::Fast) => {
            translation.warnings.drop("service_tier");
        }
    }
    let (field, person) = match (&request.safety_identifier, &request.user) {
        (Some(person), _) => ("safety_identifier", person),
        (None, Some(person)) => ("user", person),
        (None, None) => return,
    };
    match translation.call.endpoint.end_users() {
        EndUsers::Unnamed => translation.warnings.drop(field),
        EndUsers::Hashed(key) => {
            put("metadata", json!({"user_id": hashed(key.expose(), person)}));
        }
    }
}

/// The same person gives the same text, and nobody without the key can tell whose it is.
fn hashed(key: &str, person: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(key.as_bytes()).expect("HMAC takes a key of any length");
    mac.update(person.as_bytes());
    let digest = mac.finalize().into_bytes();
    let digits = digest.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.filter_map(|digit| char::from_digit(u32::from(digit), 16)).take(USER_ID_CHARS).collect()
}

#[derive(Clone, Copy, PartialEq)]
enum Place {
    Middle,
    /// At the end, to be continued: white space behind it is refused.
    Prefill,
}

/// Ids of calls: letters, digits, `_` and `-` alone. Others are numbered; the provider sees them only within one request.
#[derive(Default)]
struct Ids(BTreeMap<String, String>);

impl Ids {
    fn of(&mut self, id: &str) -> String {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
        if !id.is_empty() && id.bytes().all(fits) && !id.starts_with("bindery_call_") {
            return id.to_owned();
        }
        let next = format!("bindery_call_{}", self.0.len());
        self.0.entry(id.to_owned()).or_insert(next).clone()
    }
}

/// Writes messages.
struct Blocks<'a> {
    call: &'a Call<'a>,
    ids: Ids,
    thinks: Thinks,
}

impl Blocks<'_> {
    fn messages(mut self, conversation: &Conversation) -> Result<Value, Refusal> {
        let mut written = Vec::new();
        let last = conversation.turns.len().saturating_sub(1);
        for (index, turn) in conversation.turns.iter().enumerate() {
            let (role, blocks) = match turn {
                Turn::User(parts) => {
                    let blocks = parts.iter().map(|part| self.user_block(part));
                    ("user", blocks.collect::<Result<Vec<_>, _>>()?)
                }
                Turn::Assistant(parts) => {
                    let place = if index == last { Place::Prefill } else { Place::Middle };
                    ("assistant", self.assistant_blocks(parts, place))
                }
            };
            written.push(json!({"role": role, "content": blocks}));
        }
        Ok(written.into())
    }

    fn user_block(&mut self, part: &UserPart) -> Result<Value, Refusal> {
        let model = self.call.model;
        let check = |capability: Capability| {
            let refusal = || Refusal::unsupported(&part.param, format!("`{}` does not take it", model.id));
            if model.can(capability) { Ok(()) } else { Err(refusal()) }
        };
        match &part.kind {
            UserKind::Text(text) => Ok(json!({"type": "text", "text": text})),
            UserKind::Image(url) => {
                check(Capability::Images)?;
                Ok(json!({"type": "image", "source": image_source(url, &part.param)?}))
            }
            UserKind::Audio { .. } => {
                Err(Refusal::unsupported(&part.param, "this provider takes no sound; send its text"))
            }
            UserKind::File { data, filename } => {
                check(Capability::Files)?;
                let mut block = json!({"type": "document", "source": document_source(data, &part.param)?});
                if let Some(filename) = filename {
                    block["title"] = (*filename).into();
                }
                Ok(block)
            }
            UserKind::FileId => Err(Refusal::unsupported(
                format!("{}.file.file_id", part.param),
                "the file lies at another provider; send it as `file_data`",
            )),
            UserKind::ToolResult { id, text, .. } => {
                let mut block = json!({"type": "tool_result", "tool_use_id": self.ids.of(id)});
                if !text.is_empty() {
                    block["content"] = text.as_str().into();
                }
                Ok(block)
            }
        }
    }

    fn assistant_blocks(&mut self, parts: &[AssistantPart], place: Place) -> Vec<Value> {
        let mut blocks = Vec::new();
        let last_text = parts.iter().rposition(|part| matches!(part, AssistantPart::Text(_)));
        for (index, part) in parts.iter().enumerate() {
            match part {
                // Only the model that wrote them takes thoughts back, and only while it thinks.
                AssistantPart::Carried(extra) if self.thinks.replays() => {
                    blocks.extend(thoughts(extra, &self.call.model.wire_name).into_iter().flatten().cloned());
                }
                AssistantPart::Carried(_) => {}
                AssistantPart::Text(text) => {
                    let ends_prefill = place == Place::Prefill && Some(index) == last_text;
                    let text = if ends_prefill { text.trim_end() } else { text };
                    if !text.trim().is_empty() {
                        blocks.push(json!({"type": "text", "text": text}));
                    }
                }
                AssistantPart::Call { id, name, arguments, .. } => {
                    blocks.push(json!({"type": "tool_use", "id": self.ids.of(id), "name": name, "input": arguments}));
                }
            }
        }
        blocks
    }
}

fn image_source(url: &MediaUrl, param: &str) -> Result<Value, Refusal> {
    match url {
        MediaUrl::Data(DataUrl { media_type, data }) if IMAGE_TYPES.contains(media_type) => {
            Ok(json!({"type": "base64", "media_type": media_type, "data": data}))
        }
        MediaUrl::Data(DataUrl { media_type, .. }) => {
            let message = format!("`{media_type}` is none of {}", IMAGE_TYPES.join(", "));
            Err(Refusal::unsupported(format!("{param}.image_url.url"), message))
        }
        MediaUrl::Remote(url) => Ok(json!({"type": "url", "url": url})),
        MediaUrl::Unusable => {
            Err(Refusal::invalid(format!("{param}.image_url.url"), "it is neither a https: nor a base64 data: URL"))
        }
    }
}

fn document_source(data: &MediaUrl, param: &str) -> Result<Value, Refusal> {
    match data {
        MediaUrl::Data(DataUrl { media_type: "application/pdf", data }) => {
            Ok(json!({"type": "base64", "media_type": "application/pdf", "data": data}))
        }
        MediaUrl::Data(_) | MediaUrl::Remote(_) => {
            Err(Refusal::unsupported(format!("{param}.file.file_data"), "only application/pdf can be passed on"))
        }
        MediaUrl::Unusable => Err(Refusal::invalid(format!("{param}.file.file_data"), "it is not a base64 data: URL")),
    }
}
