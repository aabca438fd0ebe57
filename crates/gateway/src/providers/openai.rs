//! OpenAI: requests are theirs already, apart from what a model refuses and what is local to vLLM.
//!
//! [`Dialect`] is what Azure and compatible servers differ in; they share the rest. Invariant: a stream is always asked
//! for its usage, and an answer's limit is always sent where any is known.

use super::{
    Call, CompletionRequest, Refusal, Translated,
    catalogue::{Capability, LimitField, Thinking},
    chat::{self, ChatRequest, Content, Delivery, Message, MessageBody, PartKind, ResponseFormat},
    reader::Wire,
    translation::{Translation, WantedFormat},
};

/// Whose server it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    /// OpenAI's own: knows every field of its API, and no others.
    OpenAi,
    /// Azure: no search of the web.
    Azure,
    /// Anyone's: gets every field that came.
    Compatible,
}

/// `POST /chat/completions`.
pub(super) fn chat(call: &Call, request: &ChatRequest) -> Result<Translated, Refusal> {
    chat_to(Dialect::OpenAi, call, request, path(call, &["chat", "completions"]))
}

/// `POST /completions`.
pub(super) fn completion(call: &Call, request: &CompletionRequest) -> Result<Translated, Refusal> {
    completion_parts(Dialect::OpenAi, call, request, path(call, &["completions"]))
}

fn path(call: &Call, route: &[&str]) -> url::Url {
    let base = call.endpoint.base();
    base.with_path(base.segments().into_iter().chain(route.iter().copied()))
}

/// The request for a server of OpenAI's API.
pub(super) fn chat_to(
    dialect: Dialect,
    call: &Call,
    request: &ChatRequest,
    path: url::Url,
) -> Result<Translated, Refusal> {
    let mut translation = Translation::new(call, request);
    check(dialect, &translation)?;
    let mut sent = request.clone();
    call.model.wire_name.clone_into(&mut sent.model);
    let limit = translation.output_limit();
    (sent.max_tokens, sent.max_completion_tokens) = match call.model.capabilities.limit_field {
        LimitField::MaxTokens => (limit, None),
        LimitField::MaxCompletionTokens => (None, limit),
    };
    let sampling = translation.sampling();
    (sent.sampling.temperature, sent.sampling.top_p) = (sampling.temperature, sampling.top_p);
    (sent.sampling.presence_penalty, sent.sampling.frequency_penalty) = translation.penalties();
    sent.sampling.seed = translation.seed();
    sent.reasoning_effort = translation.effort();
    let num_answers = translation.num_answers()?;
    sent.messages = request.messages.iter().map(|message| adapted(dialect, call, message)).collect();
    if dialect != Dialect::Compatible {
        translation.vllm()?;
        translation.drop_other_than(&0, "top_k", request.sampling.top_k.map(|k| k.max(0)));
        sent.sampling.top_k = None;
        sent.vllm.clear();
        sent.response_format = match translation.format()? {
            WantedFormat::Text => request.response_format.clone(),
            WantedFormat::JsonObject => Some(ResponseFormat::JsonObject),
            WantedFormat::JsonSchema(schema) => Some(ResponseFormat::JsonSchema(schema)),
        };
        if matches!(sent.response_format, Some(ResponseFormat::JsonSchema(_)))
            && !call.model.can(Capability::StructuredOutputs)
        {
            return Err(translation.refuse("response_format", "ask for `json_object` and describe it in the prompt"));
        }
    }
    let mut body = sent.to_json();
    keep_back(&mut body, &mut translation.warnings);
    if body.shift_remove("best_of").is_some() {
        translation.warnings.drop("best_of");
    }
    if let Delivery::Stream(options) = &request.delivery {
        body.insert("stream_options".to_owned(), chat::asking_for_usage(options));
    }
    Ok(Translated {
        path,
        body,
        warnings: translation.warnings,
        max_output_tokens: limit.map(|limit| limit.saturating_mul(num_answers)),
        wire: Wire::OpenAi(Box::default()),
    })
}

/// Fields by which servers of OpenAI's API choose another model, another host of it, a longer answer or a service of its own price than
/// was priced and allowed (OpenRouter, LiteLLM, llama.cpp): the gateway routes and bounds itself.
const NOT_PASSED: [&str; 9] = [
    "models",
    "route",
    "fallbacks",
    "context_window_fallback_dict",
    "provider",
    "plugins",
    "extra_body",
    "n_predict",
    "num_predict",
];

fn keep_back(body: &mut serde_json::Map<String, serde_json::Value>, warnings: &mut super::Warnings) {
    for name in NOT_PASSED {
        if body.shift_remove(name).is_some() {
            warnings.drop(name);
        }
    }
}

/// What no server of this kind does with this model.
fn check(dialect: Dialect, translation: &Translation) -> Result<(), Refusal> {
    let request = translation.request;
    translation.stop()?;
    translation.check_token_fields()?;
    translation.check_tools()?;
    if !translation.can(Capability::Chat) {
        return Err(translation.refuse("messages", "send `prompt` to /v1/completions"));
    }
    let speaks = request.audio.is_some() || request.modalities.iter().any(|modality| modality != "text");
    if speaks && !translation.can(Capability::AudioOutput) {
        return Err(translation.refuse("modalities", "ask for text"));
    }
    if request.web_search_options.is_some() && dialect == Dialect::Azure {
        return Err(translation.refuse("web_search_options", "leave it out"));
    }
    for (index, message) in request.messages.iter().enumerate() {
        let MessageBody::User(Content::Parts(parts)) = &message.body else { continue };
        for (part_index, part) in parts.iter().enumerate() {
            let needed = match part.kind {
                PartKind::Text(_) | PartKind::Refusal(_) => continue,
                PartKind::Image { .. } => Capability::Images,
                PartKind::Audio { .. } => Capability::Audio,
                PartKind::File { .. } => Capability::Files,
            };
            if !translation.can(needed) {
                let param = format!("messages[{index}].content[{part_index}]");
                return Err(translation.refuse(&param, "name a model that takes it"));
            }
        }
    }
    Ok(())
}

/// A message as this server knows messages.
fn adapted(dialect: Dialect, call: &Call, message: &Message) -> Message {
    let mut message = message.clone();
    let knows_developer = dialect != Dialect::Compatible && call.model.capabilities.thinking != Thinking::None;
    message.body = match message.body {
        MessageBody::Developer(content) if !knows_developer => MessageBody::System(content),
        MessageBody::Assistant(mut turn) if dialect != Dialect::Compatible => {
            // Thoughts that came from other providers, or from here; OpenAI refuses fields it does not know.
            turn.reasoning = None;
            turn.extra_content = None;
            for call in &mut turn.tool_calls {
                call.extra.shift_remove("extra_content");
            }
            MessageBody::Assistant(turn)
        }
        other => other,
    };
    message
}

/// The request for a server that has the older route.
pub(super) fn completion_parts(
    dialect: Dialect,
    call: &Call,
    request: &CompletionRequest,
    path: url::Url,
) -> Result<Translated, Refusal> {
    let mut warnings = super::Warnings::default();
    let model = call.model;
    if !model.can(Capability::Completions) {
        let message = format!("`{}` has no completions route; send the prompt as a chat message", model.id);
        return Err(Refusal::unsupported("prompt", message));
    }
    let mut sent = request.clone();
    model.wire_name.clone_into(&mut sent.model);
    if dialect != Dialect::Compatible {
        if let Some(name) = request.vllm.keys().find(|name| !chat::VLLM_HINTS.contains(&name.as_str())) {
            return Err(Refusal::unsupported(name, "leave it out, or name a local model"));
        }
        for name in request.vllm.keys() {
            warnings.drop(name);
        }
        if request.sampling.top_k.is_some_and(|k| k > 0) {
            warnings.drop("top_k");
        }
        sent.vllm.clear();
        sent.sampling.top_k = None;
    }
    let limit = request.max_tokens.or(call.max_output_tokens).or(model.max_output_tokens);
    let limit = match (limit, model.max_output_tokens) {
        (Some(limit), Some(most)) if limit > most => {
            warnings.adjust("max_tokens", format!("{limit} sent as {most} (the most of this model)"));
            Some(most)
        }
        (limit, _) => limit,
    };
    sent.max_tokens = limit;
    let mut body = sent.to_json();
    keep_back(&mut body, &mut warnings);
    if let Delivery::Stream(options) = &request.delivery {
        body.insert("stream_options".to_owned(), chat::asking_for_usage(options));
    }
    // `best_of` answers are all computed, and charged.
    let prompts = request.prompt.len() as u64;
    let computed = request.num_answers().max(request.best_of.unwrap_or(1).saturating_mul(prompts));
    Ok(Translated {
        path,
        body,
        warnings,
        max_output_tokens: limit.map(|limit| limit.saturating_mul(computed)),
        wire: Wire::OpenAi(Box::default()),
    })
}
