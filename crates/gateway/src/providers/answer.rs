//! Answers in OpenAI's shape, whole and in chunks, typed as far as guardrails, ledger and tests look into them.
//!
//! Knows no provider. Invariant: [`Chunk`]s of one answer share id, model and time; a finish reason stands only in chunks
//! that [`super::AnswerReader::end`] gave out.

use serde_json::{Map, Value, json};

use super::{
    chat::{ToolCall, ToolCallKind},
    usage::Usage,
};

/// Which route's shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `chat.completion`.
    Chat,
    /// `text_completion`: content is called text.
    Text,
}

super::fields::words! {
    /// Why an answer ended.
    pub enum FinishReason {
        /// It was done, or met a stop string.
        Stop = "stop",
        /// The limit.
        Length = "length",
        /// It calls tools.
        ToolCalls = "tool_calls",
        /// Something was withheld.
        ContentFilter = "content_filter",
        /// The old form of `tool_calls`.
        FunctionCall = "function_call",
    }
}

/// What is the same in all chunks of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Which route's.
    pub shape: Shape,
    /// Of the answer.
    pub id: String,
    /// Unix seconds.
    pub created: i64,
    /// As asked for.
    pub model: String,
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Whose.
    pub head: Head,
    /// By index.
    pub choices: Vec<Choice>,
    /// What it used.
    pub usage: Usage,
    /// The upstream's own `usage` object, where it is OpenAI's shape already.
    pub usage_json: Option<Value>,
    /// Fields not known here.
    pub extra: Map<String, Value>,
}

/// One answer of `n`.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Which.
    pub index: u32,
    /// The assistant's turn.
    pub message: AnswerMessage,
    /// Why it ended.
    pub finish: Finish,
    /// Where asked for.
    pub logprobs: Option<Value>,
    /// Fields not known here.
    pub extra: Map<String, Value>,
}

/// Why an answer ended, in our words and the upstream's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finish {
    /// OpenAI's word.
    pub reason: FinishReason,
    /// The upstream's, where it is another.
    pub native: Option<String>,
}

impl Finish {
    /// OpenAI's word alone.
    pub fn plain(reason: FinishReason) -> Self {
        Self { reason, native: None }
    }

    fn write(&self, map: &mut Map<String, Value>) {
        map.insert("finish_reason".to_owned(), self.reason.as_str().into());
        if let Some(native) = &self.native {
            map.insert("native_finish_reason".to_owned(), native.as_str().into());
        }
    }
}

/// The assistant's turn.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AnswerMessage {
    /// What it says; absent where there is no text.
    pub content: Option<String>,
    /// What it declines to say.
    pub refusal: Option<String>,
    /// What it thought.
    pub reasoning: Option<String>,
    /// What it calls.
    pub tool_calls: Vec<ToolCall>,
    /// Fields not known here; signed thoughts.
    pub extra: Map<String, Value>,
}

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunk {
    /// Whose.
    pub head: Head,
    /// Usually one.
    pub choices: Vec<ChunkChoice>,
    /// `null` or the totals; absent where not asked for.
    pub usage: Option<Value>,
    /// Fields not known here.
    pub extra: Map<String, Value>,
}

/// A piece of one answer of `n`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChunkChoice {
    /// Which.
    pub index: u32,
    /// What is new.
    pub delta: Delta,
    /// With the last piece.
    pub finish: Option<Finish>,
    /// Where asked for.
    pub logprobs: Option<Value>,
    /// Fields not known here.
    pub extra: Map<String, Value>,
}

/// What is new.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// In the first chunk of a choice: `assistant`.
    pub opens: bool,
    /// More of what it says.
    pub content: Option<String>,
    /// More of what it declines to say.
    pub refusal: Option<String>,
    /// More of what it thinks.
    pub reasoning: Option<String>,
    /// More of what it calls.
    pub tool_calls: Vec<ToolCallDelta>,
    /// Fields not known here; signed thoughts.
    pub extra: Map<String, Value>,
}

/// More of one call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolCallDelta {
    /// Which call of the turn.
    pub index: u32,
    /// Once, in the first piece.
    pub id: Option<String>,
    /// `function` or `custom`: once, in the first piece.
    pub kind: Option<String>,
    /// Once, in the first piece.
    pub name: Option<String>,
    /// More of a function's arguments.
    pub arguments: Option<String>,
    /// Fields not known here.
    pub extra: Map<String, Value>,
}

impl Delta {
    /// Nothing new at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Bytes of text in it, of any kind: for estimates.
    pub fn num_bytes(&self) -> usize {
        let texts = [&self.content, &self.refusal, &self.reasoning];
        let spoken: usize = texts.iter().filter_map(|text| text.as_ref()).map(String::len).sum();
        let called = self
            .tool_calls
            .iter()
            .map(|call| call.arguments.as_ref().map_or(0, String::len) + call.name.as_ref().map_or(0, String::len));
        spoken + called.sum::<usize>()
    }

    fn to_json(&self) -> Value {
        let mut map = Map::new();
        if self.opens {
            map.insert("role".to_owned(), "assistant".into());
        }
        let texts = [("content", &self.content), ("refusal", &self.refusal), ("reasoning_content", &self.reasoning)];
        for (name, text) in texts {
            if let Some(text) = text {
                map.insert(name.to_owned(), text.as_str().into());
            }
        }
        if !self.tool_calls.is_empty() {
            map.insert("tool_calls".to_owned(), self.tool_calls.iter().map(ToolCallDelta::to_json).collect());
        }
        map.extend(self.extra.clone());
        Value::Object(map)
    }
}

impl ToolCall {
    fn in_one_piece(self, index: u32) -> ToolCallDelta {
        let Self { id, kind, mut extra } = self;
        let of = |kind: &str, name, arguments, extra| ToolCallDelta {
            index,
            id: Some(id),
            kind: Some(kind.to_owned()),
            name,
            arguments,
            extra,
        };
        match kind {
            ToolCallKind::Function { name, arguments } => of("function", Some(name), Some(arguments), extra),
            ToolCallKind::Custom { name, input } => {
                extra.insert("custom".to_owned(), json!({"name": name, "input": input}));
                of("custom", None, None, extra)
            }
        }
    }
}

impl ToolCallDelta {
    fn to_json(&self) -> Value {
        let mut map = Map::new();
        map.insert("index".to_owned(), self.index.into());
        if let Some(id) = &self.id {
            map.insert("id".to_owned(), id.as_str().into());
        }
        if let Some(kind) = &self.kind {
            map.insert("type".to_owned(), kind.as_str().into());
        }
        let mut function = Map::new();
        if let Some(name) = &self.name {
            function.insert("name".to_owned(), name.as_str().into());
        }
        if let Some(arguments) = &self.arguments {
            function.insert("arguments".to_owned(), arguments.as_str().into());
        }
        if !function.is_empty() {
            map.insert("function".to_owned(), Value::Object(function));
        }
        map.extend(self.extra.clone());
        Value::Object(map)
    }
}

impl Head {
    fn write(&self, object: &'static str) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("id".to_owned(), self.id.as_str().into());
        map.insert("object".to_owned(), object.into());
        map.insert("created".to_owned(), self.created.into());
        map.insert("model".to_owned(), self.model.as_str().into());
        map
    }
}

impl Answer {
    /// As OpenAI writes it.
    pub fn to_json(&self) -> Value {
        let object = match self.head.shape {
            Shape::Chat => "chat.completion",
            Shape::Text => "text_completion",
        };
        let mut map = self.head.write(object);
        map.insert("choices".to_owned(), self.choices.iter().map(|choice| choice.to_json(self.head.shape)).collect());
        map.insert("usage".to_owned(), self.usage_json.clone().unwrap_or_else(|| self.usage.to_json()));
        map.extend(self.extra.clone());
        Value::Object(map)
    }
}

impl Choice {
    /// As two pieces of a stream: all that it says, and its end.
    pub(super) fn in_pieces(self) -> (ChunkChoice, ChunkChoice) {
        let Self { index, message, finish, logprobs, extra } = self;
        let AnswerMessage { content, refusal, reasoning, tool_calls, extra: said } = message;
        let tool_calls = (0_u32..).zip(tool_calls).map(|(at, call)| call.in_one_piece(at)).collect();
        let delta = Delta { opens: true, content, refusal, reasoning, tool_calls, extra: said };
        let all = ChunkChoice { index, delta, finish: None, logprobs, extra };
        (all, ChunkChoice { index, finish: Some(finish), ..ChunkChoice::default() })
    }

    fn to_json(&self, shape: Shape) -> Value {
        let mut map = Map::new();
        map.insert("index".to_owned(), self.index.into());
        match shape {
            Shape::Chat => map.insert("message".to_owned(), self.message.to_json()),
            Shape::Text => map.insert("text".to_owned(), self.message.content.clone().unwrap_or_default().into()),
        };
        map.insert("logprobs".to_owned(), self.logprobs.clone().unwrap_or(Value::Null));
        self.finish.write(&mut map);
        map.extend(self.extra.clone());
        Value::Object(map)
    }
}

impl AnswerMessage {
    /// Bytes of text in it, of any kind: for estimates.
    pub fn num_bytes(&self) -> usize {
        let texts = [&self.content, &self.refusal, &self.reasoning];
        let spoken: usize = texts.iter().filter_map(|text| text.as_ref()).map(String::len).sum();
        let called = self.tool_calls.iter().map(|call| match &call.kind {
            ToolCallKind::Function { name, arguments: text } | ToolCallKind::Custom { name, input: text } => {
                name.len() + text.len()
            }
        });
        spoken + called.sum::<usize>()
    }

    /// As OpenAI writes it.
    pub fn to_json(&self) -> Value {
        let mut value = json!({"role": "assistant", "content": self.content, "refusal": self.refusal});
        if let Some(map) = value.as_object_mut() {
            if let Some(reasoning) = &self.reasoning {
                map.insert("reasoning_content".to_owned(), reasoning.as_str().into());
            }
            if !self.tool_calls.is_empty() {
                map.insert("tool_calls".to_owned(), self.tool_calls.iter().map(ToolCall::to_json).collect());
            }
            map.extend(self.extra.clone());
        }
        value
    }
}

impl Chunk {
    /// As OpenAI writes it.
    pub fn to_json(&self) -> Value {
        let object = match self.head.shape {
            Shape::Chat => "chat.completion.chunk",
            Shape::Text => "text_completion",
        };
        let mut map = self.head.write(object);
        map.insert("choices".to_owned(), self.choices.iter().map(|choice| choice.to_json(self.head.shape)).collect());
        if let Some(usage) = &self.usage {
            map.insert("usage".to_owned(), usage.clone());
        }
        map.extend(self.extra.clone());
        Value::Object(map)
    }
}

impl ChunkChoice {
    fn to_json(&self, shape: Shape) -> Value {
        let mut map = Map::new();
        map.insert("index".to_owned(), self.index.into());
        match shape {
            Shape::Chat => map.insert("delta".to_owned(), self.delta.to_json()),
            Shape::Text => map.insert("text".to_owned(), self.delta.content.clone().unwrap_or_default().into()),
        };
        map.insert("logprobs".to_owned(), self.logprobs.clone().unwrap_or(Value::Null));
        match &self.finish {
            Some(finish) => finish.write(&mut map),
            None => {
                map.insert("finish_reason".to_owned(), Value::Null);
            }
        }
        map.extend(self.extra.clone());
        Value::Object(map)
    }
}
