//! `POST /v1/chat/completions`: a conversation, through the model's own template, to answers.

use std::collections::VecDeque;

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
use bindery_engine::{Prompt, RenderRequest};
use bindery_protocol::{
    json::ModeOrObject,
    openai::{
        ChatCompletion, ChatCompletionChoice, ChatCompletionChunk, ChatCompletionChunkChoice, ChatCompletionRequest,
        ChatContent, ChatDelta, ChatLogprobs, ChatMessage, ChatResponseMessage, Role, completions::UsageField,
    },
};
use serde_json::{Map, Value, json};

use crate::{
    body::ApiJson,
    config::Limits,
    context::RequestContext,
    error::{ApiError, quote},
    generation::{Event, Generation, PromptText},
    logprobs::{TokenStyle, chat_logprobs, prompt_logprobs},
    router::Serving,
    routes::refusals::{BodyRefusals, GateRefusals},
    sampling::{DefaultMaxTokens, Delivery, RequestPrompt, RouteRules, Sampling, UsageInStream, num_logprobs},
    sse::{self, ChunkEncoder},
    state::{Job, SharedState, unix_seconds},
};

/// Answers a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "generation", security((), ("bearer" = [])),
    request_body = ChatCompletionRequest, responses(
    (status = 200, description = "answers; with `stream`, server-sent events of `chat.completion.chunk`", body = ChatCompletion),
    BodyRefusals,
    GateRefusals,
))]
pub(crate) async fn create(
    State(state): State<SharedState>,
    Extension(serving): Extension<Serving>,
    tenants_default: Option<Extension<DefaultMaxTokens>>,
    body: Result<ApiJson<ChatCompletionRequest>, ApiError>,
) -> Result<Response, ApiError> {
    let ApiJson { value: mut request, mut warnings, timeout, context } = body?;
    let named = serving.resolve(&state, request.model.take())?;
    let _ = context.counts.model.set(named.name.clone());
    refuse_unsupported(&request)?;
    let max_tokens_param = match request.max_completion_tokens {
        Some(newer) => {
            request.max_tokens = Some(newer);
            "max_completion_tokens"
        }
        None => "max_tokens",
    };
    let rules = RouteRules {
        default_max_tokens: None,
        least_max_tokens: 1,
        tenants_default: tenants_default.map(|Extension(default)| default),
        max_tokens_param,
        max_model_len: serving.model.max_model_len,
    };
    let mut sampling = Sampling::new(request.take_sampling(), &rules, &context, &mut warnings)?;
    sampling.params.logprobs = logprobs(request.logprobs, request.top_logprobs)?;
    let mut kwargs = request.chat_template_kwargs.unwrap_or_default();
    if let Some(effort) = request.reasoning_effort {
        kwargs.entry("reasoning_effort").or_insert(Value::String(effort));
    }
    let render = RenderRequest {
        messages: template_messages(request.messages, template_source(&serving)?, &state.limits)?,
        tools: None,
        add_generation_prompt: request.add_generation_prompt.unwrap_or(true),
        kwargs,
    };
    let text = render_chat(&state, &serving, render, &context).await?;
    let prompt = Prompt::Text { text, add_special_tokens: sampling.add_special_tokens.unwrap_or(false) };
    let engine_request = sampling.request(RequestPrompt {
        request_id: context.id.to_string(),
        prompt,
        param: "messages",
        best_of: None,
        timeout,
    });

    let generation =
        Generation::start(&state, &serving, &named, &context, vec![engine_request], PromptText::NotWanted).await?;
    let answer = Answer {
        id: format!("chatcmpl-{}", uuid::Uuid::new_v4().simple()),
        created: unix_seconds(),
        model: named.name,
        logprobs: sampling.params.logprobs.map(|_| TokenStyle::new(sampling.tokens_as_ids)),
        wants_prompt_logprobs: sampling.params.prompt_logprobs.is_some(),
    };
    let mut response = match sampling.delivery {
        Delivery::Stream(usage) => {
            let num_choices = generation.num_choices();
            sse::respond(generation, ChunkWriter { answer, usage, num_choices }, context)
        }
        Delivery::Whole => whole_answer(generation, answer).await?,
    };
    warnings.write(response.headers_mut());
    Ok(response)
}

fn refuse_unsupported(request: &ChatCompletionRequest) -> Result<(), ApiError> {
    let mode_is_set = |choice: &Option<ModeOrObject>| {
        !matches!(choice, None | Some(ModeOrObject::Mode(_))) || {
            matches!(choice, Some(ModeOrObject::Mode(mode)) if mode != "none" && mode != "auto")
        }
    };
    for (param, present, message) in [
        (
            "tools",
            request.tools.as_ref().is_some_and(|tools| !tools.is_empty()),
            "tools are not supported yet: leave them out",
        ),
        // Without tools "auto" and "none" ask for what happens anyway.
        (
            "tool_choice",
            mode_is_set(&request.tool_choice),
            "tool_choice can only be none or auto, as tools are not supported yet: leave it out",
        ),
        (
            "functions",
            request.functions.is_some(),
            "functions, the old form of tools, are not supported: leave them out",
        ),
        (
            "function_call",
            mode_is_set(&request.function_call),
            "function_call, the old form of tool_choice, is not supported: leave it out",
        ),
        (
            "chat_template",
            request.chat_template.is_some(),
            "chat_template is not supported: leave it out, and the model's own template is used",
        ),
        ("documents", request.documents.is_some(), "documents are not supported yet: put the texts into messages"),
        (
            "continue_final_message",
            request.continue_final_message == Some(true),
            "continue_final_message is not supported yet: use /v1/completions to continue a text",
        ),
        ("echo", request.echo == Some(true), "echo is not supported here: use /v1/completions"),
        (
            "modalities",
            request.modalities.as_ref().is_some_and(|kinds| kinds.iter().any(|kind| kind != "text")),
            "modalities can only be text: this server answers in nothing else",
        ),
        ("audio", request.audio.is_some(), "audio is not supported, as this server answers in text: leave it out"),
    ] {
        if present {
            return Err(ApiError::unsupported(param, message));
        }
    }
    Ok(())
}

fn logprobs(logprobs: Option<bool>, top_logprobs: Option<i64>) -> Result<Option<u32>, ApiError> {
    let top = top_logprobs.map(|count| num_logprobs("top_logprobs", count)).transpose()?;
    match (logprobs.unwrap_or(false), top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs: set it to true")),
    }
}

/// The conversation as templates read it; `template` is the source of the model's own.
pub(crate) fn template_messages(
    messages: Vec<ChatMessage>,
    template: &str,
    limits: &Limits,
) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages is empty: send at least one message"));
    }
    if messages.len() > limits.max_messages {
        let (len, limit) = (messages.len(), limits.max_messages);
        return Err(ApiError::invalid("messages", format!("messages has {len} messages, the limit is {limit}")));
    }
    messages.into_iter().enumerate().map(|(at, message)| template_message(at, message, template)).collect()
}

fn template_message(at: usize, message: ChatMessage, template: &str) -> Result<Value, ApiError> {
    // Templates know the roles their models were trained with, and many drop a turn of another role without a word.
    let role = match message.role {
        Role::Developer if !["'developer'", "\"developer\""].iter().any(|name| template.contains(name)) => Role::System,
        Role::Function => Role::Tool,
        other => other,
    };
    let has_tool_calls = message.tool_calls.as_ref().is_some_and(|calls| !calls.is_empty());
    let content = match (message.content, message.refusal) {
        (Some(content), _) => Some(template_content(at, content)?),
        (None, Some(refusal)) => Some(refusal.into()),
        (None, None) => None,
    };
    if content.is_none() && !(role == Role::Assistant && has_tool_calls) {
        return Err(ApiError::invalid(
            format!("messages[{at}].content"),
            format!("messages[{at}].content is missing: only an assistant's message with tool_calls may have none"),
        ));
    }
    let mut out = Map::new();
    out.insert("role".into(), role.as_str().into());
    out.insert("content".into(), content.unwrap_or(Value::Null));
    for (key, value) in [
        ("name", message.name),
        ("tool_call_id", message.tool_call_id),
        ("reasoning_content", message.reasoning_content),
    ] {
        if let Some(value) = value {
            out.insert(key.into(), value.into());
        }
    }
    if let Some(calls) = message.tool_calls.filter(|calls| !calls.is_empty()) {
        out.insert("tool_calls".into(), calls.into_iter().map(Value::Object).collect());
    }
    Ok(Value::Object(out))
}

/// Only text; whether a template reads parts or one text is the template's business.
fn template_content(message: usize, content: ChatContent) -> Result<Value, ApiError> {
    let parts = match content {
        ChatContent::Text(text) => return Ok(text.into()),
        ChatContent::Parts(parts) => parts,
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (at, part) in parts.into_iter().enumerate() {
        let param = format!("messages[{message}].content[{at}]");
        let (kind, text) = match part.kind.as_str() {
            "text" => ("text", part.text),
            "refusal" => ("refusal", part.refusal),
            "image_url" | "input_audio" | "file" | "video_url" | "audio_url" | "image" | "audio" => {
                let kind = part.kind;
                return Err(ApiError::unsupported(
                    param.clone(),
                    format!("{param} is {kind}: this server reads text only"),
                ));
            }
            other => {
                let message = format!("{param}.type is {}, it must be text or refusal", quote(other));
                return Err(ApiError::invalid(format!("{param}.type"), message));
            }
        };
        match text {
            Some(text) => texts.push(json!({"type": "text", "text": text})),
            None => return Err(ApiError::invalid(format!("{param}.{kind}"), format!("{param}.{kind} is missing"))),
        }
    }
    Ok(Value::Array(texts))
}

/// The source of the model's own template, or the error that it has none.
pub(crate) fn template_source(serving: &Serving) -> Result<&str, ApiError> {
    let template = serving.model.template.as_ref();
    template
        .map(|template| template.source().unwrap_or_default())
        .ok_or_else(|| ApiError::invalid("messages", "this model has no chat template: use /v1/completions"))
}

/// Renders the template on a blocking thread: its time depends on what the client sent.
pub(crate) async fn render_chat(
    state: &SharedState,
    serving: &Serving,
    request: RenderRequest,
    context: &RequestContext,
) -> Result<String, ApiError> {
    let model = serving.model.clone();
    let rendered = state.run_blocking(Job::Render, move || model.render_chat(&request)).await;
    rendered
        .ok_or_else(|| ApiError::internal(&context.id, &"the template engine panicked"))?
        // The template is the model's; what it stumbles over is the conversation (two turns of one role, say).
        .map_err(|error| ApiError::invalid("messages", error.to_string()))
}

/// What both deliveries share.
struct Answer {
    id: String,
    created: u64,
    model: String,
    /// How tokens are written, where log-probabilities were asked for.
    logprobs: Option<TokenStyle>,
    wants_prompt_logprobs: bool,
}

/// Collects the whole answer.
async fn whole_answer(mut generation: Generation, answer: Answer) -> Result<Response, ApiError> {
    let mut choices: Vec<ChatCompletionChoice> = (0..generation.num_choices())
        .map(|index| ChatCompletionChoice {
            index,
            message: ChatResponseMessage { role: Role::Assistant, content: Some(String::new()), refusal: None },
            logprobs: answer.logprobs.map(|_| ChatLogprobs { content: Some(Vec::new()) }),
            finish_reason: None,
            stop_reason: None,
        })
        .collect();
    let mut prompt = None;
    while let Some(event) = generation.next().await {
        match event? {
            Event::Prompt { tokens, .. } => {
                prompt = answer.wants_prompt_logprobs.then(|| prompt_logprobs(&tokens));
            }
            Event::Delta { choice, text, tokens } => {
                let choice = &mut choices[choice];
                if let Some(content) = &mut choice.message.content {
                    content.push_str(&text);
                }
                if let (Some(style), Some(ChatLogprobs { content: Some(all) })) =
                    (answer.logprobs, &mut choice.logprobs)
                {
                    all.extend(chat_logprobs(&tokens, style).content.unwrap_or_default());
                }
            }
            Event::Finished { choice, finish_reason, stop_reason } => {
                choices[choice].finish_reason = Some(finish_reason.to_owned());
                choices[choice].stop_reason = stop_reason;
            }
        }
    }
    let completion = ChatCompletion {
        id: answer.id,
        object: "chat.completion".into(),
        created: answer.created,
        model: answer.model,
        choices,
        usage: generation.usage(),
        prompt_logprobs: prompt,
    };
    let mut response = Json(completion).into_response();
    generation.write_server_timing(response.headers_mut());
    Ok(response)
}

/// Encodes the pieces of a streamed answer.
struct ChunkWriter {
    answer: Answer,
    usage: UsageInStream,
    num_choices: usize,
}

impl ChunkWriter {
    fn chunk(&self, choices: Vec<ChatCompletionChunkChoice>, usage: UsageField) -> String {
        sse::to_json(&ChatCompletionChunk {
            id: self.answer.id.clone(),
            object: "chat.completion.chunk".into(),
            created: self.answer.created,
            model: self.answer.model.clone(),
            choices,
            usage,
        })
    }
}

impl ChunkEncoder for ChunkWriter {
    fn event(&mut self, event: Event, generation: &Generation, out: &mut VecDeque<String>) {
        let usage = self.usage.of_chunk(generation);
        let piece = |index, delta| ChatCompletionChunkChoice {
            index,
            delta,
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
        };
        match event {
            Event::Prompt { .. } => {
                let delta = ChatDelta { role: Some(Role::Assistant), content: Some(String::new()) };
                for index in 0..self.num_choices {
                    out.push_back(self.chunk(vec![piece(index, delta.clone())], usage));
                }
            }
            Event::Delta { choice, text, tokens } => {
                let logprobs =
                    self.answer.logprobs.filter(|_| !tokens.is_empty()).map(|style| chat_logprobs(&tokens, style));
                // Text held back (half a character, the beginning of a stop string) is no news yet.
                if !text.is_empty() || logprobs.is_some() {
                    let delta = ChatDelta { role: None, content: Some(text) };
                    out.push_back(
                        self.chunk(vec![ChatCompletionChunkChoice { logprobs, ..piece(choice, delta) }], usage),
                    );
                }
            }
            Event::Finished { choice, finish_reason, stop_reason } => {
                let last = ChatCompletionChunkChoice {
                    finish_reason: Some(finish_reason.to_owned()),
                    stop_reason,
                    ..piece(choice, ChatDelta::default())
                };
                out.push_back(self.chunk(vec![last], usage));
            }
        }
    }

    fn end(&mut self, generation: &Generation, out: &mut VecDeque<String>) {
        if self.usage != UsageInStream::Never {
            out.push_back(self.chunk(Vec::new(), UsageField::Counted(generation.usage())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits::new(&crate::ServerConfig {
            served_model_names: Vec::new(),
            api_keys: Vec::new(),
            tenants: Vec::new(),
            admin_key: None,
            max_body_bytes: 1 << 20,
            shutdown_timeout: std::time::Duration::ZERO,
            digest: std::sync::Arc::default(),
            license: None,
            adapter_roots: bindery_engine::adapters::AdapterRoots::default(),
            gateway: None,
        })
    }

    fn rendered(messages: Value, template: &str) -> Result<Value, (Option<String>, String)> {
        let messages: Vec<ChatMessage> = serde_json::from_value(messages).unwrap();
        template_messages(messages, template, &limits()).map(Value::Array).map_err(|error| {
            let body = error.to_body().error;
            (body.param, body.message)
        })
    }

    #[test]
    fn what_is_refused_is_refused_in_a_sentence() {
        let refused = |fields: Value| {
            let mut body = json!({"messages": []});
            body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            let request: ChatCompletionRequest = serde_json::from_value(body).unwrap();
            refuse_unsupported(&request).map_err(|error| error.to_body().error.message).unwrap_err()
        };
        let choice = "tool_choice can only be none or auto, as tools are not supported yet: leave it out";
        assert_eq!(refused(json!({"tool_choice": "required"})), choice);
        assert_eq!(refused(json!({"tool_choice": {"type": "function"}})), choice);
        for (field, value) in [
            ("tools", json!([{}])),
            ("functions", json!([])),
            ("function_call", json!({"name": "f"})),
            ("chat_template", json!("")),
            ("documents", json!([])),
            ("continue_final_message", json!(true)),
            ("echo", json!(true)),
            ("modalities", json!(["audio"])),
            ("audio", json!({})),
        ] {
            let message = refused(json!({field: value}));
            assert!(message.starts_with(field) && message.contains(": "), "{message}");
        }
    }

    #[test]
    fn templates_get_texts_and_the_roles_they_know() {
        let messages = json!([
            {"role": "developer", "content": "be brief"},
            {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "function", "name": "f", "content": "42"},
            {"role": "assistant", "refusal": "no"},
        ]);
        let expected = |developer: &str| {
            json!([
                {"role": developer, "content": "be brief"},
                {"role": "user", "name": "ann",
                 "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": null,
                 "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "name": "f", "content": "42"},
                {"role": "assistant", "content": "no"},
            ])
        };
        assert_eq!(rendered(messages.clone(), "{{ messages }}"), Ok(expected("system")));
        assert_eq!(rendered(messages, "{% if role == 'developer' %}"), Ok(expected("developer")));
    }

    #[test]
    fn what_is_not_text_is_refused_by_its_place() {
        for (messages, param) in [
            (json!([]), "messages"),
            (json!([{"role": "user"}]), "messages[0].content"),
            (json!([{"role": "assistant", "tool_calls": []}]), "messages[0].content"),
            (
                json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
                "messages[0].content[0]",
            ),
            (json!([{"role": "user", "content": [{"type": "smell"}]}]), "messages[0].content[0].type"),
            (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
        ] {
            assert_eq!(rendered(messages, "").unwrap_err().0.as_deref(), Some(param));
        }
    }
}
