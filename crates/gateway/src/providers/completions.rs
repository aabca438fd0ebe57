//! OpenAI's older completions request: one or several prompts to continue.
//!
//! Offered by OpenAI, Azure and compatible servers alone; the others refuse it. Knows no provider. Invariant: as for
//! chat, reading what was written gives the same request.

use serde_json::{Map, Value};

use super::{
    chat::{self, Delivery, Sampling},
    fields::{Fields, wrong_type},
    refusal::Refusal,
};

/// Prompts to continue.
#[derive(Clone, Debug, PartialEq)]
pub struct CompletionRequest {
    /// As asked for.
    pub model: String,
    /// What to continue.
    pub prompt: Prompt,
    /// How tokens are chosen; its `logprobs` stay empty.
    pub sampling: Sampling,
    /// Most tokens of one continuation.
    pub max_tokens: Option<u64>,
    /// Continuations to choose from.
    pub best_of: Option<u64>,
    /// The prompt in front of the answer.
    pub echo: Option<bool>,
    /// Log-probabilities of this many candidates.
    pub logprobs: Option<u64>,
    /// What comes after the gap.
    pub suffix: Option<String>,
    /// Whole or in pieces.
    pub delivery: Delivery,
    /// Who the person is.
    pub user: Option<String>,
    /// vLLM's fields that came.
    pub vllm: Map<String, Value>,
    /// Fields not known here.
    pub extra: Map<String, Value>,
}

/// `prompt` in its four forms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// One text.
    Text(String),
    /// Several.
    Texts(Vec<String>),
    /// One, as token ids.
    Tokens(Vec<u32>),
    /// Several.
    TokenLists(Vec<Vec<u32>>),
}

impl CompletionRequest {
    /// Reads a body.
    pub fn read(body: Map<String, Value>) -> Result<Self, Refusal> {
        let mut fields = Fields::root(body);
        let request = Self {
            model: fields.required_text("model")?,
            prompt: read_prompt(&mut fields)?,
            sampling: Sampling::read_common(&mut fields)?,
            max_tokens: fields.count("max_tokens", 0)?,
            best_of: fields.integer("best_of", 1..=128)?.map(i64::unsigned_abs),
            echo: fields.flag("echo")?,
            logprobs: fields.integer("logprobs", 0..=20)?.map(i64::unsigned_abs),
            suffix: fields.text("suffix")?,
            delivery: chat::read_delivery(&mut fields)?,
            user: fields.text("user")?,
            vllm: chat::collect(&mut fields, &[&chat::VLLM_HINTS[..], &chat::VLLM_MEANINGS[..]].concat()),
            extra: fields.rest(),
        };
        if request.best_of.is_some_and(|best_of| best_of < request.num_answers_each()) {
            return Err(Refusal::invalid("best_of", "it is below `n`"));
        }
        Ok(request)
    }

    /// Answers in all: those of each prompt times the prompts.
    pub fn num_answers(&self) -> u64 {
        self.num_answers_each() * self.prompt.len() as u64
    }

    fn num_answers_each(&self) -> u64 {
        self.sampling.n.unwrap_or(1)
    }

    /// Whether the caller wants chunks.
    pub fn is_streamed(&self) -> bool {
        matches!(self.delivery, Delivery::Stream(_))
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
        put("prompt", Some(self.prompt.to_json()));
        self.sampling.write(&mut put);
        put("max_tokens", self.max_tokens.map(Value::from));
        put("best_of", self.best_of.map(Value::from));
        put("echo", self.echo.map(Value::from));
        put("logprobs", self.logprobs.map(Value::from));
        put("suffix", self.suffix.clone().map(Value::from));
        if let Delivery::Stream(options) = &self.delivery {
            put("stream", Some(true.into()));
            // A stream without options stays one; the provider adds its own.
            if *options != chat::StreamOptions::default() {
                put("stream_options", Some(chat::stream_options(options)));
            }
        }
        put("user", self.user.clone().map(Value::from));
        body.extend(self.vllm.clone());
        body.extend(self.extra.clone());
        body
    }
}

impl Prompt {
    /// Prompts there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Text(_) | Self::Tokens(_) => 1,
            Self::Texts(texts) => texts.len(),
            Self::TokenLists(lists) => lists.len(),
        }
    }

    /// No prompt at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn to_json(&self) -> Value {
        match self {
            Self::Text(text) => text.as_str().into(),
            Self::Texts(texts) => texts.clone().into(),
            Self::Tokens(tokens) => tokens.clone().into(),
            Self::TokenLists(lists) => lists.clone().into(),
        }
    }
}

fn read_prompt(fields: &mut Fields) -> Result<Prompt, Refusal> {
    const PARAM: &str = "prompt";
    const FORMS: &str = "a string, an array of strings, an array of token ids or an array of such arrays";
    let list = match fields.value(PARAM) {
        None => return Err(fields.missing(PARAM)),
        Some(Value::String(text)) => return Ok(Prompt::Text(text)),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong_type(PARAM.to_owned(), FORMS, &other)),
    };
    match list.first() {
        None => Err(Refusal::invalid(PARAM, "the list is empty: send at least one prompt")),
        Some(Value::String(_)) => Ok(Prompt::Texts(chat::strings(list, PARAM)?)),
        Some(Value::Number(_)) => Ok(Prompt::Tokens(tokens(list, PARAM)?)),
        Some(Value::Array(_)) => {
            let lists = list.into_iter().enumerate().map(|(index, value)| match value {
                Value::Array(list) => tokens(list, &format!("{PARAM}[{index}]")),
                other => Err(wrong_type(format!("{PARAM}[{index}]"), "an array of token ids", &other)),
            });
            Ok(Prompt::TokenLists(lists.collect::<Result<_, _>>()?))
        }
        Some(other) => Err(wrong_type(format!("{PARAM}[0]"), "a string, a token id or an array of them", other)),
    }
}

fn tokens(list: Vec<Value>, path: &str) -> Result<Vec<u32>, Refusal> {
    list.into_iter()
        .enumerate()
        .map(|(index, value)| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| wrong_type(format!("{path}[{index}]"), "a token id", &value))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: Value) -> Result<CompletionRequest, Refusal> {
        let Value::Object(body) = body else { panic!("an object") };
        CompletionRequest::read(body)
    }

    #[test]
    fn every_form_of_prompt_is_read_and_written_back() {
        for prompt in [json!("a"), json!(["a", "b"]), json!([1, 2]), json!([[1, 2], [3]])] {
            let body = json!({"model": "davinci-002", "prompt": prompt, "echo": true, "stream": true,
                "stream_options": {"include_usage": true}, "logprobs": 3, "n": 2, "min_tokens": 4, "novel": [1]});
            let request = read(body.clone()).unwrap();
            assert_eq!(read(Value::Object(request.to_json())).unwrap(), request);
            assert_eq!(Value::Object(request.to_json()), body);
            assert_eq!(request.num_answers(), 2 * request.prompt.len() as u64);
        }
    }

    #[test]
    fn a_wrong_prompt_is_named_by_its_place() {
        let param = |prompt: Value| read(json!({"model": "m", "prompt": prompt})).unwrap_err().param().to_owned();
        assert_eq!(param(json!(null)), "prompt");
        assert_eq!(param(json!([])), "prompt");
        assert_eq!(param(json!(["a", 1])), "prompt[1]");
        assert_eq!(param(json!([1, -2])), "prompt[1]");
        assert_eq!(param(json!([[1], ["x"]])), "prompt[1][0]");
        let best_of = read(json!({"model": "m", "prompt": "a", "n": 3, "best_of": 2})).unwrap_err();
        assert_eq!(best_of.param(), "best_of");
    }
}
