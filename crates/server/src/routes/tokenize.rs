//! `POST /tokenize` and `/detokenize`, in vLLM's shapes.
//!
//! Both work on blocking threads, a bounded number at a time, on a bounded amount of text.

use axum::{Extension, Json, extract::State};
use bindery_engine::{RenderRequest, TokenId};
use bindery_protocol::openai::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse};

use crate::{
    body::{ApiJson, Warnings},
    context::RequestContext,
    error::ApiError,
    router::Serving,
    routes::{
        chat::{render_chat, template_messages, template_source},
        refusals::{BodyRefusals, GateRefusals},
    },
    state::{Job, SharedState},
};

/// A JSON answer with its warnings.
type Answer<T> = (axum::http::HeaderMap, Json<T>);

fn answer<T>(value: T, warnings: &Warnings) -> Answer<T> {
    let mut headers = axum::http::HeaderMap::new();
    warnings.write(&mut headers);
    (headers, Json(value))
}

/// A text or a conversation to tokens.
#[utoipa::path(post, path = "/tokenize", tag = "text", security((), ("bearer" = [])),
    request_body = TokenizeRequest, responses(
    (status = 200, description = "the tokens", body = TokenizeResponse),
    BodyRefusals,
    GateRefusals,
))]
pub(crate) async fn tokenize(
    State(state): State<SharedState>,
    Extension(serving): Extension<Serving>,
    body: Result<ApiJson<TokenizeRequest>, ApiError>,
) -> Result<Answer<TokenizeResponse>, ApiError> {
    let ApiJson { value: request, warnings, context, .. } = body?;
    serving.resolve_or_base(&state, request.model.clone())?;
    let wants_strings = request.return_token_strs.unwrap_or(false);
    let (param, text, add_special_tokens) = text_of(request, &state, &serving, &context).await?;
    if text.len() > state.limits.max_tokenize_bytes {
        let (len, limit) = (text.len(), state.limits.max_tokenize_bytes);
        return Err(ApiError::invalid(param, format!("{param} has {len} bytes, the limit is {limit}")));
    }
    let model = serving.model.clone();
    let tokenized = state
        .run_blocking(Job::Tokenize, move || {
            let tokens = model.tokenizer.encode(&text, add_special_tokens)?;
            let string = |token: &TokenId| model.tokenizer.token_str(*token).unwrap_or_default().to_owned();
            let token_strs = wants_strings.then(|| tokens.iter().map(string).collect());
            Ok::<_, bindery_engine::EngineError>(TokenizeResponse {
                count: tokens.len(),
                max_model_len: model.max_model_len,
                tokens: tokens.into_iter().map(|token| token.0).collect(),
                token_strs,
            })
        })
        .await
        .ok_or_else(|| ApiError::internal(&context.id, &"the tokenizer panicked"))?;
    let tokenized = tokenized.map_err(|error| ApiError::from_engine(error, &context.id))?;
    Ok(answer(tokenized, &warnings))
}

/// The field it came in, the text, and whether special tokens are added to it.
async fn text_of(
    request: TokenizeRequest,
    state: &SharedState,
    serving: &Serving,
    context: &RequestContext,
) -> Result<(&'static str, String, bool), ApiError> {
    for (param, present) in [
        ("tools", request.tools.is_some()),
        ("chat_template", request.chat_template.is_some()),
        ("continue_final_message", request.continue_final_message == Some(true)),
    ] {
        if present {
            return Err(ApiError::unsupported(param, format!("{param} is not supported yet: leave it out")));
        }
    }
    match (request.prompt, request.messages) {
        (Some(prompt), None) => Ok(("prompt", prompt, request.add_special_tokens.unwrap_or(true))),
        (None, Some(messages)) => {
            let render = RenderRequest {
                messages: template_messages(messages, template_source(serving)?, &state.limits)?,
                tools: None,
                add_generation_prompt: request.add_generation_prompt.unwrap_or(true),
                kwargs: request.chat_template_kwargs.unwrap_or_default(),
            };
            let text = render_chat(state, serving, render, context).await?;
            Ok(("messages", text, request.add_special_tokens.unwrap_or(false)))
        }
        (None, None) => Err(ApiError::invalid("prompt", "send prompt (a text) or messages (a conversation)")),
        (Some(_), Some(_)) => Err(ApiError::invalid("prompt", "send prompt or messages, not both")),
    }
}

/// Tokens to their text.
#[utoipa::path(post, path = "/detokenize", tag = "text", security((), ("bearer" = [])),
    request_body = DetokenizeRequest, responses(
    (status = 200, description = "the text", body = DetokenizeResponse),
    BodyRefusals,
    GateRefusals,
))]
pub(crate) async fn detokenize(
    State(state): State<SharedState>,
    Extension(serving): Extension<Serving>,
    body: Result<ApiJson<DetokenizeRequest>, ApiError>,
) -> Result<Answer<DetokenizeResponse>, ApiError> {
    let ApiJson { value: request, warnings, context, .. } = body?;
    serving.resolve_or_base(&state, request.model)?;
    let num_tokens = request.tokens.len();
    let max_tokens = state.limits.max_tokenize_bytes / size_of::<u32>();
    if num_tokens > max_tokens {
        return Err(ApiError::invalid("tokens", format!("tokens has {num_tokens} entries, the limit is {max_tokens}")));
    }
    let vocab_size = serving.model.tokenizer.vocab_size();
    if let Some((at, id)) = request.tokens.iter().enumerate().find(|&(_, &id)| id as usize >= vocab_size) {
        return Err(ApiError::invalid(
            format!("tokens[{at}]"),
            format!("{id} is not a token id: the vocabulary has {vocab_size} tokens, counted from 0"),
        ));
    }
    let tokens: Vec<TokenId> = request.tokens.into_iter().map(TokenId).collect();
    let model = serving.model.clone();
    let text = state
        .run_blocking(Job::Tokenize, move || model.tokenizer.decode(&tokens, false))
        .await
        .ok_or_else(|| ApiError::internal(&context.id, &"the tokenizer panicked"))?;
    let text = text.map_err(|error| ApiError::from_engine(error, &context.id))?;
    Ok(answer(DetokenizeResponse { prompt: text }, &warnings))
}
