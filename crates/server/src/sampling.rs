//! The wire's sampling fields to the engine's parameters.
//!
//! Here numbers become whole, absent becomes a default, and what is known but not supported is refused by name. Ranges
//! that depend on the model, or that sampling itself needs, are the engine's to check.

use std::{sync::Arc, time::Duration};

use bindery_engine::{
    Grammar, Prompt, SamplingParams, Share, TextRequest, TokenId, local_model::check_stop, request::MAX_SAMPLES,
};
use bindery_protocol::openai::{SamplingFields, StreamOptions, completions::UsageField};

use crate::{body::Warnings, context::RequestContext, error::ApiError, generation::Generation, structured};

/// Most choices of one prompt.
pub(crate) const MAX_N: i64 = MAX_SAMPLES as i64;
/// Most alternatives in log-probabilities.
const MAX_LOGPROBS: i64 = 20;

/// How the answer is to be sent.
#[derive(Clone, Debug)]
pub(crate) enum Delivery {
    /// One JSON object.
    Whole,
    /// Server-sent events.
    Stream(UsageInStream),
}

/// Which chunks of a stream carry the usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UsageInStream {
    Never,
    /// A last chunk of its own.
    Last,
    /// Every chunk, and a last one of its own.
    Every,
}

impl UsageInStream {
    /// What a chunk before the last one carries. Counting walks all choices, so it is done only where it is wanted.
    pub(crate) fn of_chunk(self, generation: &Generation) -> UsageField {
        match self {
            Self::Never => UsageField::Absent,
            Self::Last => UsageField::Null,
            Self::Every => UsageField::Counted(generation.usage()),
        }
    }
}

/// The shared fields, checked.
#[derive(Clone, Debug)]
pub(crate) struct Sampling {
    pub(crate) params: SamplingParams,
    pub(crate) max_tokens: Option<usize>,
    /// Where there is no `max_tokens`, at most so many.
    pub(crate) longest_default: usize,
    pub(crate) num_samples: u32,
    pub(crate) stop: Vec<String>,
    pub(crate) include_stop_str_in_output: bool,
    pub(crate) skip_special_tokens: bool,
    pub(crate) grammar: Option<(Arc<Grammar>, &'static str)>,
    pub(crate) truncate_prompt_tokens: Option<usize>,
    pub(crate) add_special_tokens: Option<bool>,
    pub(crate) tokens_as_ids: bool,
    pub(crate) priority: i32,
    pub(crate) delivery: Delivery,
}

/// The longest answer of a request that names no limit, by whoever stands before the route: its tenant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DefaultMaxTokens(pub(crate) usize);

/// What the two routes differ in.
pub(crate) struct RouteRules {
    /// `max_tokens` of a request that does not say; None: what fits.
    pub(crate) default_max_tokens: Option<usize>,
    /// At most so many then.
    pub(crate) tenants_default: Option<DefaultMaxTokens>,
    /// 0 with `echo`: only the prompt is scored.
    pub(crate) least_max_tokens: i64,
    /// The field's name, for errors.
    pub(crate) max_tokens_param: &'static str,
    pub(crate) max_model_len: usize,
}

impl Sampling {
    pub(crate) fn new(
        mut fields: SamplingFields,
        rules: &RouteRules,
        context: &RequestContext,
        warnings: &mut Warnings,
    ) -> Result<Self, ApiError> {
        refuse_unsupported(&fields)?;
        let grammar = structured::grammar(&mut fields)?;
        if fields.cache_salt.is_some() {
            warnings.note("cache_salt has no effect yet");
        }
        let longest_default = rules.tenants_default.map_or(usize::MAX, |DefaultMaxTokens(tokens)| tokens);
        let max_tokens = fields
            .max_tokens
            .map(|value| whole(rules.max_tokens_param, value, rules.least_max_tokens, i64::from(u32::MAX)))
            .transpose()?
            .map(|value| value as usize)
            .or(rules.default_max_tokens.map(|tokens| tokens.min(longest_default)));
        let delivery = delivery(fields.stream.unwrap_or(false), fields.stream_options)?;
        let prompt_logprobs = fields
            .prompt_logprobs
            .map(|value| whole("prompt_logprobs", value, 0, MAX_LOGPROBS))
            .transpose()?
            .map(|value| value as u32);
        if prompt_logprobs.is_some() && matches!(delivery, Delivery::Stream(_)) {
            return Err(ApiError::unsupported(
                "prompt_logprobs",
                "prompt_logprobs cannot be streamed: leave out stream",
            ));
        }
        let truncate_prompt_tokens = match fields.truncate_prompt_tokens {
            None => None,
            // vLLM: as many as the model takes, beside what is to be generated.
            Some(-1) => Some(rules.max_model_len.saturating_sub(max_tokens.unwrap_or(1)).max(1)),
            Some(value) => Some(whole("truncate_prompt_tokens", value, 1, rules.max_model_len as i64)? as usize),
        };
        let top_k = match fields.top_k {
            None | Some(0 | -1) => None,
            Some(value) => Some(whole("top_k", value, -1, i64::from(u32::MAX))? as u32),
        };
        let defaults = SamplingParams::default();
        let params = SamplingParams {
            temperature: fields.temperature.map_or(defaults.temperature, |value| value as f32),
            top_p: fields.top_p.map_or(defaults.top_p, |value| value as f32),
            top_k,
            min_p: fields.min_p.map_or(defaults.min_p, |value| value as f32),
            repetition_penalty: fields.repetition_penalty.map_or(defaults.repetition_penalty, |value| value as f32),
            presence_penalty: fields.presence_penalty.map_or(defaults.presence_penalty, |value| value as f32),
            frequency_penalty: fields.frequency_penalty.map_or(defaults.frequency_penalty, |value| value as f32),
            logit_bias: fields
                .logit_bias
                .map(|biases| biases.0.into_iter().map(|(token, bias)| (TokenId(token), bias as f32)).collect())
                .unwrap_or_default(),
            seed: fields.seed.map(|value| value as u64),
            min_tokens: fields.min_tokens.map_or(Ok(0), |value| whole("min_tokens", value, 0, i64::from(u32::MAX)))?
                as usize,
            stop_token_ids: fields.stop_token_ids.unwrap_or_default().into_iter().map(TokenId).collect(),
            ignore_eos: fields.ignore_eos.unwrap_or(false),
            prompt_logprobs,
            ..defaults
        };
        let stop = fields.stop.map(|stop| stop.0).unwrap_or_default();
        // The engine checks them too, but after every prompt has its copy.
        params
            .check_lengths()
            .and_then(|()| check_stop(&stop))
            .map_err(|error| ApiError::from_engine(error, &context.id))?;
        Ok(Self {
            params,
            max_tokens,
            longest_default,
            num_samples: fields.n.map_or(Ok(1), |value| whole("n", value, 1, MAX_N))? as u32,
            stop,
            include_stop_str_in_output: fields.include_stop_str_in_output.unwrap_or(false),
            skip_special_tokens: fields.skip_special_tokens.unwrap_or(true),
            grammar,
            truncate_prompt_tokens,
            add_special_tokens: fields.add_special_tokens,
            tokens_as_ids: fields.return_tokens_as_token_ids.unwrap_or(false),
            priority: fields
                .priority
                .map_or(Ok(0), |value| whole("priority", value, i64::from(i32::MIN), i64::from(i32::MAX)))?
                as i32,
            delivery,
        })
    }

    /// The engine's request for one prompt.
    pub(crate) fn request(&self, prompt: RequestPrompt) -> TextRequest {
        TextRequest {
            request_id: prompt.request_id,
            prompt: prompt.prompt,
            prompt_param: prompt.param,
            params: self.params.clone(),
            max_tokens: self.max_tokens,
            longest_default: self.longest_default,
            num_samples: self.num_samples,
            best_of: prompt.best_of,
            stop: self.stop.clone(),
            include_stop_str_in_output: self.include_stop_str_in_output,
            skip_special_tokens: self.skip_special_tokens,
            grammar: self.grammar.clone(),
            truncate_prompt_tokens: self.truncate_prompt_tokens,
            priority: self.priority,
            share: Share::default(),
            timeout: prompt.timeout,
        }
    }
}

/// What differs between the prompts of one request, and between routes.
pub(crate) struct RequestPrompt {
    pub(crate) request_id: String,
    pub(crate) prompt: Prompt,
    /// The field it came in.
    pub(crate) param: &'static str,
    pub(crate) best_of: Option<u32>,
    pub(crate) timeout: Option<Duration>,
}

/// A whole number in a range, or an error that names all three.
pub(crate) fn whole(param: &'static str, value: i64, least: i64, most: i64) -> Result<i64, ApiError> {
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    Err(ApiError::invalid(param, format!("{param} is {value}, it must be between {least} and {most}")))
}

/// The number of alternatives asked for in log-probabilities.
pub(crate) fn num_logprobs(param: &'static str, value: i64) -> Result<u32, ApiError> {
    Ok(whole(param, value, 0, MAX_LOGPROBS)? as u32)
}

fn delivery(stream: bool, options: Option<StreamOptions>) -> Result<Delivery, ApiError> {
    match (stream, options) {
        (false, None) => Ok(Delivery::Whole),
        (false, Some(_)) => {
            Err(ApiError::invalid("stream_options", "stream_options is only for streams: set stream, or leave it out"))
        }
        (true, options) => {
            let options = options.unwrap_or_default();
            let (last, every) =
                (options.include_usage.unwrap_or(false), options.continuous_usage_stats.unwrap_or(false));
            Ok(Delivery::Stream(match (last, every) {
                (false, _) => UsageInStream::Never,
                (true, false) => UsageInStream::Last,
                (true, true) => UsageInStream::Every,
            }))
        }
    }
}

fn refuse_unsupported(fields: &SamplingFields) -> Result<(), ApiError> {
    for (param, present) in [
        ("use_beam_search", fields.use_beam_search == Some(true)),
        ("logits_processors", fields.logits_processors.is_some()),
    ] {
        if present {
            return Err(ApiError::unsupported(param, format!("{param} is not supported yet: leave it out")));
        }
    }
    Ok(())
}
