//! What every translation decides the same way: limits, sampling, thinking, hints.
//!
//! One rule for all providers: refuse what changes the meaning or the shape of an answer, drop and name what is only a
//! hint, and neither where a value is the default anyway. Knows no provider's field names. Invariant: each function
//! looks at one field of the request and at the model's capabilities, nothing else.

use serde_json::{Map, Value};

use super::{
    Call, Refusal, Warnings,
    catalogue::{Capability, SamplingSupport},
    chat::{ChatRequest, Effort, JsonSchema, Mode, ResponseFormat, Sampling, ToolChoice, ToolKind},
};

/// A translation in progress.
pub(crate) struct Translation<'a> {
    pub(crate) call: &'a Call<'a>,
    pub(crate) request: &'a ChatRequest,
    pub(crate) warnings: Warnings,
}

/// Sampling fields that may be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct ChosenSampling {
    pub(crate) temperature: Option<f64>,
    pub(crate) top_p: Option<f64>,
    pub(crate) top_k: Option<i64>,
}

/// What is wanted of an answer's shape.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum WantedFormat {
    Text,
    JsonObject,
    JsonSchema(Box<JsonSchema>),
}

impl<'a> Translation<'a> {
    pub(crate) fn new(call: &'a Call<'a>, request: &'a ChatRequest) -> Self {
        Self { call, request, warnings: Warnings::default() }
    }

    /// Whether the model can do something.
    pub(crate) fn can(&self, capability: Capability) -> bool {
        self.call.model.can(capability)
    }

    /// Refuses a field that the model cannot honour.
    pub(crate) fn refuse(&self, param: &str, instead: &str) -> Refusal {
        Refusal::unsupported(param, format!("`{}` cannot do this; {instead}", self.call.model.id))
    }

    /// The answer's limit: the request's, the tenant's, the model's; never above what the model can.
    pub(crate) fn output_limit(&mut self) -> Option<u64> {
        let (name, asked) = match (self.request.max_completion_tokens, self.request.max_tokens) {
            (Some(limit), _) => ("max_completion_tokens", Some(limit)),
            (None, limit) => ("max_tokens", limit),
        };
        let most = self.call.model.max_output_tokens;
        match (asked, most) {
            (Some(asked), Some(most)) if asked > most => {
                self.warnings.adjust(name, format!("{asked} sent as {most} (the most of this model)"));
                Some(most)
            }
            (Some(asked), _) => Some(asked),
            (None, Some(most)) => Some(self.call.max_output_tokens.unwrap_or(most).min(most)),
            (None, None) => self.call.max_output_tokens,
        }
    }

    /// Number of answers.
    pub(crate) fn num_answers(&self) -> Result<u64, Refusal> {
        let n = self.request.num_answers();
        let most = self.call.model.capabilities.max_answers;
        if n > most {
            let message = format!("`{}` gives at most {most} in one call, not {n}; ask {n} times", self.call.model.id);
            return Err(Refusal::unsupported("n", message));
        }
        Ok(n)
    }

    /// temperature, top_p, top_k, as far as the model takes them.
    pub(crate) fn sampling(&mut self) -> ChosenSampling {
        let sampling = &self.request.sampling;
        let mut chosen = ChosenSampling {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k.filter(|k| *k > 0),
        };
        match self.call.model.capabilities.sampling {
            SamplingSupport::All => {}
            SamplingSupport::OneOf => {
                if chosen.temperature.is_some_and(|value| value != 1.0) && chosen.top_p.is_some() {
                    self.drop_other_than(&1.0, "top_p", chosen.top_p);
                    chosen.top_p = None;
                } else if chosen.top_p.is_some_and(|value| value != 1.0) {
                    // A temperature of 1 is the default: left out, so that top_p can stand.
                    chosen.temperature = None;
                } else {
                    chosen.top_p = None;
                }
            }
            SamplingSupport::None => {
                self.drop_sampling(sampling);
                chosen = ChosenSampling::default();
            }
        }
        chosen
    }

    /// Names the sampling fields that are not the defaults.
    pub(crate) fn drop_sampling(&mut self, sampling: &Sampling) {
        self.drop_other_than(&1.0, "temperature", sampling.temperature);
        self.drop_other_than(&1.0, "top_p", sampling.top_p);
        self.drop_other_than(&0, "top_k", sampling.top_k.map(|k| k.max(0)));
    }

    /// Names a field that was left out, unless it says what is done anyway.
    pub(crate) fn drop_other_than<T: PartialEq>(&mut self, default: &T, field: &str, sent: Option<T>) {
        if sent.is_some_and(|sent| sent != *default) {
            self.warnings.drop(field);
        }
    }

    /// Names a field that was left out.
    pub(crate) fn drop_present<T>(&mut self, field: &str, sent: Option<&T>) {
        if sent.is_some() {
            self.warnings.drop(field);
        }
    }

    /// Stop strings.
    pub(crate) fn stop(&self) -> Result<&'a [String], Refusal> {
        if !self.request.sampling.stop.is_empty() && !self.can(Capability::Stop) {
            return Err(self.refuse("stop", "leave it out and cut the text yourself"));
        }
        Ok(&self.request.sampling.stop)
    }

    /// Presence and frequency penalty.
    pub(crate) fn penalties(&mut self) -> (Option<f64>, Option<f64>) {
        let sampling = &self.request.sampling;
        if self.can(Capability::Penalties) {
            return (sampling.presence_penalty, sampling.frequency_penalty);
        }
        self.drop_other_than(&0.0, "presence_penalty", sampling.presence_penalty);
        self.drop_other_than(&0.0, "frequency_penalty", sampling.frequency_penalty);
        (None, None)
    }

    /// The seed.
    pub(crate) fn seed(&mut self) -> Option<i64> {
        if !self.can(Capability::Seed) {
            self.drop_present("seed", self.request.sampling.seed.as_ref());
            return None;
        }
        self.request.sampling.seed
    }

    /// A bias on tokens, and log-probabilities: refused where the model has none.
    pub(crate) fn check_token_fields(&self) -> Result<(), Refusal> {
        let sampling = &self.request.sampling;
        if !sampling.logit_bias.is_empty() && !self.can(Capability::LogitBias) {
            return Err(self.refuse("logit_bias", "leave it out"));
        }
        if sampling.logprobs == Some(true) && !self.can(Capability::Logprobs) {
            return Err(self.refuse("logprobs", "leave it out"));
        }
        Ok(())
    }

    /// The effort to ask for. Where the model does not think, not thinking is no wish that was dropped.
    pub(crate) fn effort(&mut self) -> Option<Effort> {
        let asked = self.request.reasoning_effort?;
        let Some(found) = self.call.model.capabilities.efforts.nearest(asked) else {
            self.drop_other_than(&Effort::None, "reasoning_effort", Some(asked));
            return None;
        };
        if found != asked {
            self.warnings.adjust("reasoning_effort", format!("{} sent as {}", asked.as_str(), found.as_str()));
        }
        Some(found)
    }

    /// Tools, and the choice among them, as far as it concerns every provider.
    pub(crate) fn check_tools(&self) -> Result<(), Refusal> {
        if !self.request.tools.is_empty() && !self.can(Capability::Tools) {
            return Err(self.refuse("tools", "name a model that calls tools"));
        }
        let is_forced = match &self.request.tool_choice {
            None | Some(ToolChoice::Mode(Mode::None | Mode::Auto)) => false,
            Some(ToolChoice::Mode(Mode::Required) | ToolChoice::Function(_) | ToolChoice::Custom(_)) => true,
            Some(ToolChoice::Allowed { mode, .. }) => *mode == Mode::Required,
        };
        if is_forced && !self.can(Capability::ForcedToolUse) {
            return Err(self.refuse("tool_choice", "send `auto` and say in the prompt what to call"));
        }
        Ok(())
    }

    /// Tools of free text exist at OpenAI alone.
    pub(crate) fn check_only_functions(&self) -> Result<(), Refusal> {
        let custom = self.request.tools.iter().position(|tool| matches!(tool.kind, ToolKind::Custom { .. }));
        match custom {
            Some(index) => Err(self.refuse(&format!("tools[{index}].type"), "offer a function instead")),
            None => Ok(()),
        }
    }

    /// The answer's shape; vLLM's ways to ask for JSON count as a schema.
    pub(crate) fn format(&self) -> Result<WantedFormat, Refusal> {
        let wanted = match (&self.request.response_format, self.guided_json()?) {
            (None | Some(ResponseFormat::Text), None) => WantedFormat::Text,
            (Some(ResponseFormat::JsonObject), None) => WantedFormat::JsonObject,
            (Some(ResponseFormat::JsonSchema(schema)), None) => WantedFormat::JsonSchema(schema.clone()),
            (None, Some(schema)) => WantedFormat::JsonSchema(Box::new(schema)),
            (Some(_), Some(_)) => {
                return Err(Refusal::invalid("response_format", "a schema is given twice; send one of them"));
            }
        };
        Ok(wanted)
    }

    fn guided_json(&self) -> Result<Option<JsonSchema>, Refusal> {
        let vllm = &self.request.vllm;
        let nested = vllm.get("structured_outputs").and_then(|outputs| outputs.get("json"));
        let (param, found) = match vllm.get("guided_json") {
            Some(schema) => ("guided_json", schema),
            None => match nested {
                Some(schema) => ("structured_outputs.json", schema),
                None => return Ok(None),
            },
        };
        // vLLM takes the schema as an object or as its text.
        let schema = match found {
            Value::Object(map) => Some(map.clone()),
            Value::String(text) => serde_json::from_str::<Map<String, Value>>(text).ok(),
            _ => None,
        };
        let schema = schema.ok_or_else(|| Refusal::invalid(param, "it is not a JSON schema"))?;
        Ok(Some(JsonSchema { name: "answer".to_owned(), description: None, schema: Some(schema), strict: Some(true) }))
    }

    /// vLLM's fields, for providers that are not vLLM.
    pub(crate) fn vllm(&mut self) -> Result<(), Refusal> {
        for (name, value) in &self.request.vllm {
            let is_off = match value {
                Value::Bool(flag) => !flag,
                Value::Array(list) => list.is_empty(),
                Value::Number(number) => number.as_f64() == Some(neutral(name)),
                Value::Null | Value::String(_) | Value::Object(_) => false,
            };
            let is_schema = name == "guided_json"
                || name == "structured_outputs"
                    && value.as_object().is_some_and(|outputs| outputs.keys().all(|key| key == "json"));
            if is_off || is_schema || (name == "skip_special_tokens" && value == true) {
                continue;
            }
            if super::chat::VLLM_HINTS.contains(&name.as_str()) {
                self.warnings.drop(name);
            } else {
                return Err(self.refuse(name, "leave it out, or name a local model"));
            }
        }
        Ok(())
    }

    /// Fields that a provider without OpenAI's own ways has no use for.
    pub(crate) fn foreign_fields(&mut self) -> Result<(), Refusal> {
        if let Some(name) = self.request.legacy_functions.keys().next() {
            return Err(self.refuse(name, "send `tools` and `tool_choice` instead"));
        }
        if self.request.modalities.iter().any(|modality| modality != "text") {
            return Err(self.refuse("modalities", "ask for text"));
        }
        if self.request.audio.is_some() {
            return Err(self.refuse("audio", "ask for text"));
        }
        if self.request.web_search_options.is_some() {
            return Err(self.refuse("web_search_options", "leave it out"));
        }
        for (name, value) in &self.request.hints {
            let is_default = match value {
                Value::Bool(flag) => !flag,
                Value::Object(map) => map.is_empty(),
                Value::String(word) => name == "verbosity" && word == "medium",
                Value::Null | Value::Number(_) | Value::Array(_) => false,
            };
            if !is_default {
                self.warnings.drop(name);
            }
        }
        for name in self.request.extra.keys() {
            self.warnings.drop(name);
        }
        Ok(())
    }
}

/// The value of a vLLM field that changes nothing.
fn neutral(name: &str) -> f64 {
    if name == "repetition_penalty" { 1.0 } else { 0.0 }
}
