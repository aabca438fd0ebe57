//! `POST /v1/completions`: prompts to continuations.
//!
//! Several prompts are several engine requests; choice `prompt * n + sample` is sample `sample` of prompt `prompt`.

use std::collections::VecDeque;

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
use bindery_engine::{Prompt, TokenId, TokenText};
use bindery_gateway::gateway::DEFAULT_COMPLETION_TOKENS;
use bindery_protocol::openai::{
    Completion, CompletionChoice, CompletionLogprobs, CompletionPrompt, CompletionRequest, PromptLogprobs, StopReason,
    completions::UsageField,
};

use crate::{
    body::ApiJson,
    config::Limits,
    error::ApiError,
    generation::{Event, Generation, PromptText},
    logprobs::{CompletionLogprobsWriter, TokenStyle, prompt_logprobs},
    router::Serving,
    routes::refusals::{BodyRefusals, GateRefusals},
    sampling::{
        DefaultMaxTokens, Delivery, MAX_N, RequestPrompt, RouteRules, Sampling, UsageInStream, num_logprobs, whole,
    },
    sse::{self, ChunkEncoder},
    state::{SharedState, unix_seconds},
};

/// OpenAI's and vLLM's default of this route.
const DEFAULT_MAX_TOKENS: usize = DEFAULT_COMPLETION_TOKENS as usize;
const OBJECT: &str = "text_completion";

/// Continues prompts.
#[utoipa::path(post, path = "/v1/completions", tag = "generation", security((), ("bearer" = [])),
    request_body = CompletionRequest, responses(
    (status = 200, description = "continuations; with `stream`, server-sent events of the same shape", body = Completion),
    BodyRefusals,
    GateRefusals,
))]
pub(crate) async fn create(
    State(state): State<SharedState>,
    Extension(serving): Extension<Serving>,
    tenants_default: Option<Extension<DefaultMaxTokens>>,
    body: Result<ApiJson<CompletionRequest>, ApiError>,
) -> Result<Response, ApiError> {
    let ApiJson { value: mut request, mut warnings, timeout, context } = body?;
    let named = serving.resolve(&state, request.model.take())?;
    let _ = context.counts.model.set(named.name.clone());
    if request.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::unsupported("suffix", "suffix is not supported: put the whole text into prompt"));
    }
    let echo = request.echo.unwrap_or(false);
    let rules = RouteRules {
        default_max_tokens: Some(DEFAULT_MAX_TOKENS),
        least_max_tokens: i64::from(!echo),
        tenants_default: tenants_default.map(|Extension(default)| default),
        max_tokens_param: "max_tokens",
        max_model_len: serving.model.max_model_len,
    };
    let mut sampling = Sampling::new(request.take_sampling(), &rules, &context, &mut warnings)?;
    let best_of = best_of(request.best_of, &sampling)?;
    let logprobs = request.logprobs.map(|count| num_logprobs("logprobs", count)).transpose()?;
    let wants_prompt_logprobs = sampling.params.prompt_logprobs.is_some();
    sampling.params.logprobs = logprobs;
    if echo {
        // The larger of what the two fields ask for; each shape takes what it needs.
        sampling.params.prompt_logprobs = sampling.params.prompt_logprobs.max(logprobs);
    }
    let prompts = prompts(request.prompt, &sampling, best_of, &state.limits)?;
    let requests = prompts
        .into_iter()
        .map(|prompt| {
            sampling.request(RequestPrompt {
                request_id: context.id.to_string(),
                prompt,
                param: "prompt",
                best_of,
                timeout,
            })
        })
        .collect();

    let generation = Generation::start(&state, &serving, &named, &context, requests, PromptText::wanted(echo)).await?;
    let style = TokenStyle::new(sampling.tokens_as_ids);
    let writer = logprobs.map(|num_top| CompletionLogprobsWriter::new(style, num_top));
    let answer = Answer {
        head: Completion {
            id: format!("cmpl-{}", uuid::Uuid::new_v4().simple()),
            object: OBJECT.into(),
            created: unix_seconds(),
            model: named.name,
            choices: Vec::new(),
            usage: UsageField::Absent,
        },
        num_samples: sampling.num_samples as usize,
        writers: vec![writer; generation.num_choices()],
        echo,
        wants_prompt_logprobs,
    };
    let mut response = match sampling.delivery {
        Delivery::Stream(usage) => sse::respond(generation, ChunkWriter { answer, usage }, context),
        Delivery::Whole => whole_answer(generation, answer).await?,
    };
    warnings.write(response.headers_mut());
    Ok(response)
}

fn best_of(best_of: Option<i64>, sampling: &Sampling) -> Result<Option<u32>, ApiError> {
    let Some(value) = best_of else { return Ok(None) };
    let best_of = whole("best_of", value, i64::from(sampling.num_samples), MAX_N)? as u32;
    if best_of > sampling.num_samples && matches!(sampling.delivery, Delivery::Stream(_)) {
        return Err(ApiError::invalid(
            "best_of",
            "best_of cannot be streamed where it is larger than n: leave out stream",
        ));
    }
    Ok((best_of > sampling.num_samples).then_some(best_of))
}

fn prompts(
    prompt: Option<CompletionPrompt>,
    sampling: &Sampling,
    best_of: Option<u32>,
    limits: &Limits,
) -> Result<Vec<Prompt>, ApiError> {
    let add_special_tokens = sampling.add_special_tokens.unwrap_or(true);
    let text = |text| Prompt::Text { text, add_special_tokens };
    let tokens = |ids: Vec<u32>| Prompt::Tokens(ids.into_iter().map(TokenId).collect());
    let num_prompts = match &prompt {
        None => return Err(ApiError::invalid("prompt", "prompt is missing: send a text or token ids")),
        Some(CompletionPrompt::Text(_) | CompletionPrompt::Tokens(_)) => 1,
        Some(CompletionPrompt::Texts(texts)) => texts.len(),
        Some(CompletionPrompt::TokenLists(lists)) => lists.len(),
    };
    if num_prompts == 0 {
        return Err(ApiError::invalid("prompt", "prompt is an empty array: send at least one text or token id"));
    }
    if num_prompts > limits.max_prompts {
        let limit = limits.max_prompts;
        return Err(ApiError::invalid(
            "prompt",
            format!("prompt holds {num_prompts} prompts, the limit is {limit}: send several requests"),
        ));
    }
    let num_choices = num_prompts * best_of.unwrap_or(sampling.num_samples) as usize;
    if num_choices > limits.max_choices {
        let limit = limits.max_choices;
        return Err(ApiError::invalid(
            "n",
            format!(
                "{num_prompts} prompts ask for {num_choices} choices together, the limit is {limit}: send several requests"
            ),
        ));
    }
    Ok(match prompt {
        None => Vec::new(),
        Some(CompletionPrompt::Text(prompt)) => vec![text(prompt)],
        Some(CompletionPrompt::Tokens(ids)) => vec![tokens(ids)],
        Some(CompletionPrompt::Texts(texts)) => texts.into_iter().map(text).collect(),
        Some(CompletionPrompt::TokenLists(lists)) => lists.into_iter().map(tokens).collect(),
    })
}

/// What both deliveries share.
struct Answer {
    /// Without choices.
    head: Completion,
    num_samples: usize,
    /// One a choice, where log-probabilities were asked for.
    writers: Vec<Option<CompletionLogprobsWriter>>,
    /// The prompts' texts come before their continuations.
    echo: bool,
    wants_prompt_logprobs: bool,
}

/// A piece of a choice.
struct Piece {
    choice: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish: Option<(&'static str, Option<StopReason>)>,
    prompt_logprobs: Option<PromptLogprobs>,
}

impl Answer {
    /// What an event adds, choice by choice.
    fn pieces(&mut self, event: Event) -> Vec<Piece> {
        match event {
            Event::Prompt { prompt, text, tokens } => {
                if !self.echo && !self.wants_prompt_logprobs {
                    return Vec::new();
                }
                (prompt * self.num_samples..(prompt + 1) * self.num_samples)
                    .map(|choice| Piece {
                        choice,
                        logprobs: if self.echo { self.logprobs(choice, &tokens) } else { None },
                        text: if self.echo { text.clone() } else { String::new() },
                        finish: None,
                        prompt_logprobs: self.wants_prompt_logprobs.then(|| prompt_logprobs(&tokens)),
                    })
                    .collect()
            }
            Event::Delta { choice, text, tokens } => {
                let logprobs = self.logprobs(choice, &tokens);
                vec![Piece { choice, text, logprobs, finish: None, prompt_logprobs: None }]
            }
            Event::Finished { choice, finish_reason, stop_reason } => vec![Piece {
                choice,
                text: String::new(),
                logprobs: None,
                finish: Some((finish_reason, stop_reason)),
                prompt_logprobs: None,
            }],
        }
    }

    fn logprobs(&mut self, choice: usize, tokens: &[TokenText]) -> Option<CompletionLogprobs> {
        let mut logprobs = CompletionLogprobs::default();
        self.writers[choice].as_mut()?.append(&mut logprobs, tokens);
        Some(logprobs)
    }
}

/// Collects the whole answer.
async fn whole_answer(mut generation: Generation, mut answer: Answer) -> Result<Response, ApiError> {
    let mut choices: Vec<CompletionChoice> = (0..generation.num_choices())
        .map(|index| CompletionChoice {
            index,
            text: String::new(),
            logprobs: answer.writers[index].as_ref().map(|_| CompletionLogprobs::default()),
            finish_reason: None,
            stop_reason: None,
            prompt_logprobs: None,
        })
        .collect();
    while let Some(event) = generation.next().await {
        for piece in answer.pieces(event?) {
            let choice = &mut choices[piece.choice];
            choice.text.push_str(&piece.text);
            if let (Some(all), Some(new)) = (&mut choice.logprobs, piece.logprobs) {
                all.tokens.extend(new.tokens);
                all.text_offset.extend(new.text_offset);
                all.token_logprobs.extend(new.token_logprobs);
                all.top_logprobs.extend(new.top_logprobs);
            }
            if let Some((finish_reason, stop_reason)) = piece.finish {
                choice.finish_reason = Some(finish_reason.to_owned());
                choice.stop_reason = stop_reason;
            }
            if piece.prompt_logprobs.is_some() {
                choice.prompt_logprobs = piece.prompt_logprobs;
            }
        }
    }
    let completion = Completion { choices, usage: UsageField::Counted(generation.usage()), ..answer.head };
    let mut response = Json(completion).into_response();
    generation.write_server_timing(response.headers_mut());
    Ok(response)
}

/// Encodes the pieces of a streamed answer.
struct ChunkWriter {
    answer: Answer,
    usage: UsageInStream,
}

impl ChunkWriter {
    fn chunk(&self, choices: Vec<CompletionChoice>, usage: UsageField) -> String {
        sse::to_json(&Completion { choices, usage, ..self.answer.head.clone() })
    }
}

impl ChunkEncoder for ChunkWriter {
    fn event(&mut self, event: Event, generation: &Generation, out: &mut VecDeque<String>) {
        let usage = self.usage.of_chunk(generation);
        for piece in self.answer.pieces(event) {
            let has_logprobs = piece.logprobs.as_ref().is_some_and(|logprobs| !logprobs.tokens.is_empty());
            // Text held back (half a character, the beginning of a stop string) is no news yet.
            if piece.text.is_empty() && !has_logprobs && piece.finish.is_none() {
                continue;
            }
            let (finish_reason, stop_reason) =
                piece.finish.map_or((None, None), |(finish, stop)| (Some(finish.to_owned()), stop));
            let choice = CompletionChoice {
                index: piece.choice,
                text: piece.text,
                logprobs: piece.logprobs,
                finish_reason,
                stop_reason,
                prompt_logprobs: piece.prompt_logprobs,
            };
            out.push_back(self.chunk(vec![choice], usage));
        }
    }

    fn end(&mut self, generation: &Generation, out: &mut VecDeque<String>) {
        if self.usage != UsageInStream::Never {
            out.push_back(self.chunk(Vec::new(), UsageField::Counted(generation.usage())));
        }
    }
}
