//! A chat request as `models/NAME:generateContent`.
//!
//! Invariant: every call of a turn that is still at work carries a signature: the one it was issued with, or Google's word
//! for a lost one.

use serde_json::{Map, Value, json};

use super::{EXTRA_CONTENT, Reader, schema};
use crate::providers::{
    Call, Refusal, Translated,
    catalogue::{Capability, Thinking},
    chat::{AudioFormat, ChatRequest, Effort, Mode, ServiceTier, Tool, ToolChoice, ToolKind},
    conversation::{AssistantPart, Conversation, Turn, UserKind, UserPart},
    media::{DataUrl, MediaUrl},
    reader::Wire,
    translation::{Translation, WantedFormat},
};

/// Stop strings it takes (from memory of its documentation).
const MAX_STOP: usize = 5;
/// Base64 of `skip_thought_signature_validator`: what Google's documentation gives for a signature that was lost.
const LOST_SIGNATURE: &str = "c2tpcF90aG91Z2h0X3NpZ25hdHVyZV92YWxpZGF0b3I=";

/// Translates.
pub(crate) fn chat(call: &Call, request: &ChatRequest) -> Result<Translated, Refusal> {
    let mut translation = Translation::new(call, request);
    translation.check_token_fields()?;
    translation.check_tools()?;
    translation.check_only_functions()?;
    translation.foreign_fields()?;
    translation.vllm()?;
    let conversation = Conversation::of(request, &mut translation.warnings)?;
    let num_answers = translation.num_answers()?;
    let (config, limit) = generation_config(&mut translation, num_answers)?;
    let mut body = Map::new();
    let mut put = |name: &str, value: Value| body.insert(name.to_owned(), value);
    if !conversation.system.is_empty() {
        put("systemInstruction", json!({"parts": [{"text": conversation.system}]}));
    }
    put("contents", contents(call, &conversation)?);
    if !config.is_empty() {
        put("generationConfig", Value::Object(config));
    }
    if !request.tools.is_empty() {
        let declarations: Vec<Value> = request.tools.iter().filter_map(declaration).collect();
        put("tools", json!([{"functionDeclarations": declarations}]));
        if let Some(choice) = &request.tool_choice {
            put("toolConfig", json!({"functionCallingConfig": calling_config(&translation, choice)?}));
        }
        // No switch for it; one call at a time is a wish.
        translation.drop_other_than(&true, "parallel_tool_calls", request.parallel_tool_calls);
    }
    match request.service_tier {
        None | Some(ServiceTier::Auto) => {}
        Some(ServiceTier::Default) => drop(put("serviceTier", "standard".into())),
        Some(ServiceTier::Flex) => drop(put("serviceTier", "flex".into())),
        Some(ServiceTier::Priority | ServiceTier::Fast) => drop(put("serviceTier", "priority".into())),
        Some(ServiceTier::Scale) => translation.warnings.drop("service_tier"),
    }
    translation.drop_present("user", request.user.as_ref());
    translation.drop_present("safety_identifier", request.safety_identifier.as_ref());
    Ok(Translated {
        path: path(call, request),
        body,
        warnings: translation.warnings,
        max_output_tokens: limit.map(|limit| limit.saturating_mul(num_answers)),
        wire: Wire::Gemini(Box::new(Reader::new(num_answers))),
    })
}

/// The SDK's base URL has no version, so `/v1beta` is added; one with a path, as Vertex' `.../publishers/google`, is taken as
/// it is.
fn path(call: &Call, request: &ChatRequest) -> url::Url {
    let base = call.endpoint.base();
    let mut segments = base.segments();
    if segments.is_empty() {
        segments.push("v1beta");
    }
    let method = if request.is_streamed() { "streamGenerateContent" } else { "generateContent" };
    let last = format!("{}:{method}", call.model.wire_name);
    let mut url = base.with_path(segments.into_iter().chain(["models", last.as_str()]));
    if request.is_streamed() {
        url.set_query(Some("alt=sse"));
    }
    url
}

fn generation_config(
    translation: &mut Translation,
    num_answers: u64,
) -> Result<(Map<String, Value>, Option<u64>), Refusal> {
    let mut config = Map::new();
    let mut put = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            config.insert(name.to_owned(), value);
        }
    };
    let limit = translation.output_limit();
    put("maxOutputTokens", limit.map(Value::from));
    let sampling = translation.sampling();
    put("temperature", sampling.temperature.map(Value::from));
    put("topP", sampling.top_p.map(Value::from));
    put("topK", sampling.top_k.map(Value::from));
    put("candidateCount", (num_answers > 1).then(|| num_answers.into()));
    let stop = translation.stop()?;
    if stop.len() > MAX_STOP {
        let message = format!("{} strings, and this provider takes {MAX_STOP}; send fewer", stop.len());
        return Err(Refusal::unsupported("stop", message));
    }
    put("stopSequences", (!stop.is_empty()).then(|| stop.into()));
    let (presence, frequency) = translation.penalties();
    put("presencePenalty", presence.map(Value::from));
    put("frequencyPenalty", frequency.map(Value::from));
    put("seed", seed(translation)?.map(Value::from));
    let asked = &translation.request.sampling;
    if asked.logprobs == Some(true) {
        put("responseLogprobs", Some(true.into()));
        put("logprobs", asked.top_logprobs.filter(|count| *count > 0).map(Value::from));
    }
    match translation.format()? {
        WantedFormat::Text => {}
        WantedFormat::JsonObject => put("responseMimeType", Some("application/json".into())),
        WantedFormat::JsonSchema(format) => {
            if !translation.can(Capability::StructuredOutputs) {
                return Err(translation.refuse("response_format", "ask for `json_object`"));
            }
            let unkept = format.schema.as_ref().filter(|_| format.strict == Some(true)).and_then(schema::first_unkept);
            if let Some(path) = unkept {
                let param = format!("response_format.json_schema.schema{path}");
                return Err(translation.refuse(&param, "leave it out, or leave out `strict`"));
            }
            put("responseMimeType", Some("application/json".into()));
            put("responseJsonSchema", format.schema.map(Value::Object));
        }
    }
    put("thinkingConfig", thinking(translation, limit));
    Ok((config, limit))
}

/// Its seeds have 32 bits.
fn seed(translation: &mut Translation) -> Result<Option<i64>, Refusal> {
    let seed = translation.seed();
    match seed {
        Some(value) if i32::try_from(value).is_err() => {
            Err(Refusal::invalid("seed", format!("{value} has more than the 32 bits that this provider takes")))
        }
        seed => Ok(seed),
    }
}

fn thinking(translation: &mut Translation, limit: Option<u64>) -> Option<Value> {
    let effort = translation.effort()?;
    match translation.call.model.capabilities.thinking {
        Thinking::Level => Some(json!({"includeThoughts": true, "thinkingLevel": level(effort)})),
        Thinking::Budget | Thinking::AlwaysBudget if effort == Effort::None => Some(json!({"thinkingBudget": 0})),
        kind @ (Thinking::Budget | Thinking::AlwaysBudget) => {
            // Thoughts count against the answer's limit, so some of it is left for the answer. Unsaid, a model thinks as much as it likes.
            let room = limit.map_or(u64::MAX, |limit| limit.saturating_mul(3) / 4);
            let budget = match (budget(effort), kind) {
                (wanted, _) if wanted <= room => wanted,
                (_, Thinking::AlwaysBudget) => room.max(MIN_BUDGET_TOKENS),
                (_, _) if room < MIN_BUDGET_TOKENS => 0,
                _ => room,
            };
            if budget < self::budget(effort) {
                let how = format!("{} sent as a budget of {budget} tokens (of the answer's limit)", effort.as_str());
                translation.warnings.adjust("reasoning_effort", how);
            }
            Some(json!({"includeThoughts": budget > 0, "thinkingBudget": budget}))
        }
        Thinking::None | Thinking::Effort | Thinking::Adaptive | Thinking::AlwaysAdaptive => None,
    }
}

/// The least beside none at all, by Gemini's documentation of 2.5 Pro; Flash-Lite's is 512.
const MIN_BUDGET_TOKENS: u64 = 512;

fn level(effort: Effort) -> &'static str {
    match effort {
        Effort::None | Effort::Minimal => "MINIMAL",
        Effort::Low => "LOW",
        Effort::Medium => "MEDIUM",
        Effort::High => "HIGH",
        Effort::XHigh | Effort::Max => "XHIGH",
    }
}

fn budget(effort: Effort) -> u64 {
    match effort {
        Effort::None | Effort::Minimal => 512,
        Effort::Low => 1024,
        Effort::Medium => 2048,
        Effort::High => 4096,
        Effort::XHigh => 8192,
        Effort::Max => 16_384,
    }
}

fn declaration(tool: &Tool) -> Option<Value> {
    let ToolKind::Function { name, description, parameters, .. } = &tool.kind else { return None };
    let mut value = json!({"name": name});
    if let Some(description) = description {
        value["description"] = description.as_str().into();
    }
    if let Some(parameters) = parameters.as_ref().filter(|parameters| !parameters.is_empty()) {
        value["parametersJsonSchema"] = Value::Object(parameters.clone());
    }
    Some(value)
}

fn calling_config(translation: &Translation, choice: &ToolChoice) -> Result<Value, Refusal> {
    Ok(match choice {
        ToolChoice::Mode(Mode::None) => json!({"mode": "NONE"}),
        ToolChoice::Mode(Mode::Auto) => json!({"mode": "AUTO"}),
        ToolChoice::Mode(Mode::Required) => json!({"mode": "ANY"}),
        ToolChoice::Function(name) => json!({"mode": "ANY", "allowedFunctionNames": [name]}),
        ToolChoice::Allowed { mode: Mode::Auto, names } => json!({"mode": "VALIDATED", "allowedFunctionNames": names}),
        ToolChoice::Allowed { names, .. } => json!({"mode": "ANY", "allowedFunctionNames": names}),
        ToolChoice::Custom(_) => return Err(translation.refuse("tool_choice", "name a function")),
    })
}

fn contents(call: &Call, conversation: &Conversation) -> Result<Value, Refusal> {
    // The turn at work: everything after the last turn in which the person spoke.
    let spoke = conversation.turns.iter().rposition(|turn| match turn {
        Turn::User(parts) => parts.iter().any(|part| !matches!(part.kind, UserKind::ToolResult { .. })),
        Turn::Assistant(_) => false,
    });
    let signs = call.model.capabilities.thinking == Thinking::Level;
    let mut contents = Vec::new();
    for (index, turn) in conversation.turns.iter().enumerate() {
        contents.push(match turn {
            Turn::User(parts) => {
                let parts = parts.iter().map(|part| user_part(call, part)).collect::<Result<Vec<_>, _>>()?;
                json!({"role": "user", "parts": parts})
            }
            Turn::Assistant(parts) => {
                let is_at_work = spoke.is_none_or(|spoke| index > spoke);
                let lost = (signs && is_at_work).then_some(LOST_SIGNATURE);
                json!({"role": "model", "parts": model_parts(parts, lost)})
            }
        });
    }
    Ok(contents.into())
}

fn model_parts(parts: &[AssistantPart], mut lost: Option<&'static str>) -> Vec<Value> {
    let mut written = Vec::new();
    for part in parts {
        match part {
            AssistantPart::Carried(_) => {}
            AssistantPart::Text(text) => written.push(json!({"text": text})),
            AssistantPart::Call { id, name, arguments, extra } => {
                let mut value = json!({"functionCall": {"id": id, "name": name, "args": arguments}});
                let signature =
                    extra.get(EXTRA_CONTENT).and_then(|extra| extra["google"]["thought_signature"].as_str());
                // The first call of a turn is the one that is signed.
                if let Some(signature) = signature.or(lost) {
                    value["thoughtSignature"] = signature.into();
                }
                lost = None;
                written.push(value);
            }
        }
    }
    written
}

fn user_part(call: &Call, part: &UserPart) -> Result<Value, Refusal> {
    let check = |capability: Capability| {
        let refusal = || Refusal::unsupported(&part.param, format!("`{}` does not take it", call.model.id));
        if call.model.can(capability) { Ok(()) } else { Err(refusal()) }
    };
    let inline = |media_type: &str, data: &str| json!({"inlineData": {"mimeType": media_type, "data": data}});
    match &part.kind {
        UserKind::Text(text) => Ok(json!({"text": text})),
        UserKind::Image(MediaUrl::Data(DataUrl { media_type, data })) if media_type.starts_with("image/") => {
            check(Capability::Images)?;
            Ok(inline(media_type, data))
        }
        UserKind::Image(MediaUrl::Remote(_)) => Err(Refusal::unsupported(
            format!("{}.image_url.url", part.param),
            "this provider fetches no pictures; send it as a data: URL",
        )),
        UserKind::Image(MediaUrl::Data(_) | MediaUrl::Unusable) => {
            Err(Refusal::invalid(format!("{}.image_url.url", part.param), "it is not a base64 data: URL of a picture"))
        }
        UserKind::Audio { data, format } => {
            check(Capability::Audio)?;
            let media_type = match format {
                AudioFormat::Wav => "audio/wav",
                AudioFormat::Mp3 => "audio/mp3",
            };
            Ok(inline(media_type, data))
        }
        UserKind::File { data: MediaUrl::Data(DataUrl { media_type, data }), .. } => {
            check(Capability::Files)?;
            Ok(inline(media_type, data))
        }
        UserKind::File { .. } => {
            Err(Refusal::invalid(format!("{}.file.file_data", part.param), "it is not a base64 data: URL"))
        }
        UserKind::FileId => Err(Refusal::unsupported(
            format!("{}.file.file_id", part.param),
            "the file lies at another provider; send it as `file_data`",
        )),
        UserKind::ToolResult { id, name, text } => {
            let response = match serde_json::from_str::<Value>(text) {
                Ok(Value::Object(object)) => Value::Object(object),
                Ok(_) | Err(_) => json!({"output": text}),
            };
            Ok(json!({"functionResponse": {"id": id, "name": name, "response": response}}))
        }
    }
}
