//! An OpenAI chat request as the gateway reads it: all fields, typed where a provider, a rule or a price needs them.
//!
//! Why a second reading beside `bindery-protocol`: the local engine's types end where the engine does (no tools, no
//! pictures yet), while a request that goes up must lose nothing. Knows no provider. Invariant:
//! `read(request.to_json())` gives the same request, unknown fields included.
//!
//! Reading order: [`ChatRequest`], [`message`], [`options`] for tools and formats.

pub mod message;
pub mod options;

use serde_json::{Map, Value, json};

pub use message::{
    AssistantTurn, AudioFormat, Content, Message, MessageBody, Part, PartKind, Role, ToolCall, ToolCallKind,
};
pub use options::{Effort, JsonSchema, Mode, ResponseFormat, ServiceTier, Tool, ToolChoice, ToolKind};

use super::{
    fields::{Fields, wrong_type},
    refusal::Refusal,
};

/// Fields that only steer accounts, caches and speed: an answer means the same without them.
pub(crate) const HINTS: [&str; 8] = [
    "metadata",
    "store",
    "prediction",
    "verbosity",
    "moderation",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
];
/// vLLM's fields that shift an answer a little: dropped where unknown.
pub(crate) const VLLM_HINTS: [&str; 8] = [
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "priority",
    "cache_salt",
    "chat_template_kwargs",
];
/// vLLM's fields that decide what an answer is: refused where unknown.
pub(crate) const VLLM_MEANINGS: [&str; 12] = [
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "prompt_logprobs",
    "stop_token_ids",
    "include_stop_str_in_output",
    "truncate_prompt_tokens",
    "return_tokens_as_token_ids",
    "echo",
    "continue_final_message",
];

/// A conversation to continue.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatRequest {
    /// As asked for.
    pub model: String,
    /// The conversation so far; never empty.
    pub messages: Vec<Message>,
    /// How tokens are chosen, and where an answer ends.
    pub sampling: Sampling,
    /// `max_completion_tokens`: reasoning included.
    pub max_completion_tokens: Option<u64>,
    /// The old name of it.
    pub max_tokens: Option<u64>,
    /// How long to think.
    pub reasoning_effort: Option<Effort>,
    /// What may be called.
    pub tools: Vec<Tool>,
    /// What must be called.
    pub tool_choice: Option<ToolChoice>,
    /// Whether several calls may come in one turn.
    pub parallel_tool_calls: Option<bool>,
    /// The old forms of `tools` and `tool_choice`, kept as they came: `functions`, `function_call`.
    pub legacy_functions: Map<String, Value>,
    /// The answer's shape.
    pub response_format: Option<ResponseFormat>,
    /// Whole or in pieces.
    pub delivery: Delivery,
    /// How fast, at which price.
    pub service_tier: Option<ServiceTier>,
    /// Who the person is (the old field).
    pub user: Option<String>,
    /// Who the person is.
    pub safety_identifier: Option<String>,
    /// `["text"]`, or with `audio`.
    pub modalities: Vec<String>,
    /// Voice and format of a spoken answer.
    pub audio: Option<Map<String, Value>>,
    /// OpenAI's own search of the web.
    pub web_search_options: Option<Map<String, Value>>,
    /// The fields of [`HINTS`] that came.
    pub hints: Map<String, Value>,
    /// vLLM's fields that came.
    pub vllm: Map<String, Value>,
    /// Fields not known here.
    pub extra: Map<String, Value>,
}

/// How tokens are chosen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampling {
    /// 0 to 2.
    pub temperature: Option<f64>,
    /// Above 0, at most 1.
    pub top_p: Option<f64>,
    /// vLLM's: 0 and -1 are off.
    pub top_k: Option<i64>,
    /// Answers to give.
    pub n: Option<u64>,
    /// Strings that end an answer.
    pub stop: Vec<String>,
    /// -2 to 2.
    pub frequency_penalty: Option<f64>,
    /// -2 to 2.
    pub presence_penalty: Option<f64>,
    /// Token id to -100..100.
    pub logit_bias: Map<String, Value>,
    /// For repeatable answers.
    pub seed: Option<i64>,
    /// Log-probabilities of the answer's tokens.
    pub logprobs: Option<bool>,
    /// Of this many candidates at each.
    pub top_logprobs: Option<u64>,
}

/// How an answer comes.
#[derive(Clone, Debug, PartialEq)]
pub enum Delivery {
    /// As one object.
    Whole,
    /// As chunks.
    Stream(StreamOptions),
}

/// What a stream carries besides.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StreamOptions {
    /// A last chunk with the totals.
    pub include_usage: Option<bool>,
    /// Padding against guesses by length.
    pub include_obfuscation: Option<bool>,
    /// Fields not known here.
    pub extra: Map<String, Value>,
}

impl ChatRequest {
    /// Reads a body.
    pub fn read(body: Map<String, Value>) -> Result<Self, Refusal> {
        let mut fields = Fields::root(body);
        let model = fields.required_text("model")?;
        let messages = read_messages(&mut fields)?;
        let sampling = Sampling::read(&mut fields)?;
        let tools = options::read_tools(&mut fields)?;
        let tool_choice = options::read_tool_choice(&mut fields, &tools)?;
        let request = Self {
            model,
            messages,
            sampling,
            max_completion_tokens: fields.count("max_completion_tokens", 1)?,
            max_tokens: fields.count("max_tokens", 1)?,
            reasoning_effort: fields.word("reasoning_effort")?,
            tools,
            tool_choice,
            parallel_tool_calls: fields.flag("parallel_tool_calls")?,
            legacy_functions: collect(&mut fields, &["functions", "function_call"]),
            response_format: options::read_response_format(&mut fields)?,
            delivery: read_delivery(&mut fields)?,
            service_tier: fields.word("service_tier")?,
            user: fields.text("user")?,
            safety_identifier: fields.text("safety_identifier")?,
            modalities: texts(&mut fields, "modalities")?,
            audio: fields.free_object("audio")?,
            web_search_options: fields.free_object("web_search_options")?,
            hints: read_hints(&mut fields)?,
            vllm: collect(&mut fields, &[&VLLM_HINTS[..], &VLLM_MEANINGS[..]].concat()),
            extra: fields.rest(),
        };
        Ok(request)
    }

    /// Most tokens that one answer may have, where the caller says so.
    pub fn output_limit(&self) -> Option<u64> {
        self.max_completion_tokens.or(self.max_tokens)
    }

    /// Answers to give.
    pub fn num_answers(&self) -> u64 {
        self.sampling.n.unwrap_or(1)
    }

    /// Whether the caller wants chunks.
    pub fn is_streamed(&self) -> bool {
        matches!(self.delivery, Delivery::Stream(_))
    }

    /// Whether a last chunk with the totals was asked for.
    pub fn wants_usage_chunk(&self) -> bool {
        matches!(&self.delivery, Delivery::Stream(options) if options.include_usage == Some(true))
    }

    /// Whether any turn shows a picture: a question of routing rules.
    pub fn has_images(&self) -> bool {
        self.messages.iter().any(|message| match &message.body {
            MessageBody::User(Content::Parts(parts)) => {
                parts.iter().any(|part| matches!(part.kind, PartKind::Image { .. }))
            }
            MessageBody::User(Content::Text(_))
            | MessageBody::Developer(_)
            | MessageBody::System(_)
            | MessageBody::Assistant(_)
            | MessageBody::Tool { .. }
            | MessageBody::Function(_) => false,
        })
    }

    /// The request as a body again.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut body = Map::new();
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                body.insert(name.to_owned(), value);
            }
        };
        put("model", Some(self.model.as_str().into()));
        put("messages", Some(self.messages.iter().map(Message::to_json).collect()));
        self.sampling.write(&mut put);
        put("max_completion_tokens", self.max_completion_tokens.map(Value::from));
        put("max_tokens", self.max_tokens.map(Value::from));
        put("reasoning_effort", self.reasoning_effort.map(|effort| effort.as_str().into()));
        put("tools", non_empty(self.tools.iter().map(Tool::to_json).collect()));
        put("tool_choice", self.tool_choice.as_ref().map(ToolChoice::to_json));
        put("parallel_tool_calls", self.parallel_tool_calls.map(Value::from));
        put("response_format", self.response_format.as_ref().map(ResponseFormat::to_json));
        match &self.delivery {
            Delivery::Whole => {}
            Delivery::Stream(options) => {
                put("stream", Some(true.into()));
                put("stream_options", options.to_json());
            }
        }
        put("service_tier", self.service_tier.map(|tier| tier.as_str().into()));
        put("user", self.user.clone().map(Value::from));
        put("safety_identifier", self.safety_identifier.clone().map(Value::from));
        put("modalities", non_empty(self.modalities.iter().cloned().map(Value::from).collect()));
        put("audio", self.audio.clone().map(Value::Object));
        put("web_search_options", self.web_search_options.clone().map(Value::Object));
        for rest in [&self.legacy_functions, &self.hints, &self.vllm, &self.extra] {
            body.extend(rest.clone());
        }
        body
    }
}

impl StreamOptions {
    fn to_json(&self) -> Option<Value> {
        let mut map = Map::new();
        if let Some(flag) = self.include_usage {
            map.insert("include_usage".to_owned(), flag.into());
        }
        if let Some(flag) = self.include_obfuscation {
            map.insert("include_obfuscation".to_owned(), flag.into());
        }
        map.extend(self.extra.clone());
        (!map.is_empty()).then_some(Value::Object(map))
    }
}

impl Sampling {
    /// Shared by both generating routes, except that completions count `logprobs` themselves.
    pub(super) fn read(fields: &mut Fields) -> Result<Self, Refusal> {
        let sampling = Self {
            logprobs: fields.flag("logprobs")?,
            top_logprobs: fields.integer("top_logprobs", 0..=20)?.map(i64::unsigned_abs),
            ..Self::read_common(fields)?
        };
        if sampling.top_logprobs.is_some() && sampling.logprobs != Some(true) {
            return Err(Refusal::invalid("top_logprobs", "it needs `logprobs: true` beside it"));
        }
        Ok(sampling)
    }

    pub(super) fn read_common(fields: &mut Fields) -> Result<Self, Refusal> {
        Ok(Self {
            temperature: fields.number("temperature", 0.0..=2.0)?,
            top_p: fields.number("top_p", 0.0..=1.0)?,
            top_k: fields.integer("top_k", -1..=i64::from(u32::MAX))?,
            n: fields.integer("n", 1..=128)?.map(i64::unsigned_abs),
            stop: read_stop(fields)?,
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?,
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?,
            logit_bias: read_logit_bias(fields)?,
            seed: fields.integer("seed", i64::MIN..=i64::MAX)?,
            logprobs: None,
            top_logprobs: None,
        })
    }

    pub(super) fn write(&self, put: &mut impl FnMut(&str, Option<Value>)) {
        put("temperature", self.temperature.map(Value::from));
        put("top_p", self.top_p.map(Value::from));
        put("top_k", self.top_k.map(Value::from));
        put("n", self.n.map(Value::from));
        put("stop", non_empty(self.stop.iter().cloned().map(Value::from).collect()));
        put("frequency_penalty", self.frequency_penalty.map(Value::from));
        put("presence_penalty", self.presence_penalty.map(Value::from));
        put("logit_bias", (!self.logit_bias.is_empty()).then(|| Value::Object(self.logit_bias.clone())));
        put("seed", self.seed.map(Value::from));
        put("logprobs", self.logprobs.map(Value::from));
        put("top_logprobs", self.top_logprobs.map(Value::from));
    }
}

fn non_empty(list: Vec<Value>) -> Option<Value> {
    (!list.is_empty()).then_some(Value::Array(list))
}

fn read_messages(fields: &mut Fields) -> Result<Vec<Message>, Refusal> {
    let list = fields.list("messages")?.ok_or_else(|| fields.missing("messages"))?;
    if list.is_empty() {
        return Err(Refusal::invalid("messages", "the list is empty: send at least one message"));
    }
    list.into_iter().enumerate().map(|(index, message)| Message::read(message, format!("messages[{index}]"))).collect()
}

fn read_stop(fields: &mut Fields) -> Result<Vec<String>, Refusal> {
    match fields.value("stop") {
        None => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![text]),
        Some(Value::Array(list)) => strings(list, "stop"),
        Some(other) => Err(wrong_type("stop".to_owned(), "a string or an array of strings", &other)),
    }
}

fn read_logit_bias(fields: &mut Fields) -> Result<Map<String, Value>, Refusal> {
    let bias = fields.free_object("logit_bias")?.unwrap_or_default();
    for (token, value) in &bias {
        let param = format!("logit_bias.{}", super::fields::shorten(token));
        let Some(number) = value.as_f64() else { return Err(wrong_type(param, "a number", value)) };
        if token.parse::<u32>().is_err() {
            return Err(Refusal::invalid(param, "the key is not a token id"));
        }
        if !(-100.0..=100.0).contains(&number) {
            return Err(Refusal::invalid(param, format!("{number} is not between -100 and 100")));
        }
    }
    Ok(bias)
}

pub(super) fn read_delivery(fields: &mut Fields) -> Result<Delivery, Refusal> {
    let is_streamed = fields.flag("stream")? == Some(true);
    let options = fields.nested("stream_options")?;
    match (is_streamed, options) {
        (false, None) => Ok(Delivery::Whole),
        (false, Some(_)) => Err(Refusal::invalid("stream_options", "it needs `stream: true` beside it")),
        (true, None) => Ok(Delivery::Stream(StreamOptions::default())),
        (true, Some(mut options)) => Ok(Delivery::Stream(StreamOptions {
            include_usage: options.flag("include_usage")?,
            include_obfuscation: options.flag("include_obfuscation")?,
            extra: options.rest(),
        })),
    }
}

fn read_hints(fields: &mut Fields) -> Result<Map<String, Value>, Refusal> {
    let mut hints = Map::new();
    for name in HINTS {
        let value = match name {
            "metadata" => fields.free_object(name)?.map(Value::Object),
            "store" => fields.flag(name)?.map(Value::Bool),
            "verbosity" => fields.word::<options::Verbosity>(name)?.map(|word| word.as_str().into()),
            "prompt_cache_key" => fields.text(name)?.map(Value::String),
            _ => fields.value(name),
        };
        if let Some(value) = value {
            hints.insert(name.to_owned(), value);
        }
    }
    Ok(hints)
}

pub(super) fn collect(fields: &mut Fields, names: &[&str]) -> Map<String, Value> {
    names.iter().filter_map(|name| fields.value(name).map(|value| ((*name).to_owned(), value))).collect()
}

fn texts(fields: &mut Fields, name: &str) -> Result<Vec<String>, Refusal> {
    let list = fields.list(name)?.unwrap_or_default();
    strings(list, &fields.path(name))
}

pub(super) fn strings(list: Vec<Value>, path: &str) -> Result<Vec<String>, Refusal> {
    list.into_iter()
        .enumerate()
        .map(|(index, value)| match value {
            Value::String(text) => Ok(text),
            other => Err(wrong_type(format!("{path}[{index}]"), "a string", &other)),
        })
        .collect()
}

/// `stream_options` as they came.
pub(super) fn stream_options(options: &StreamOptions) -> Value {
    options.to_json().unwrap_or_else(|| json!({}))
}

/// The `stream_options` that upstreams are always asked with, so that usage is known.
pub(super) fn asking_for_usage(options: &StreamOptions) -> Value {
    let mut value = stream_options(options);
    value["include_usage"] = Value::Bool(true);
    value
}

#[cfg(test)]
mod tests;
