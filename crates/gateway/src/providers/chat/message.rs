//! One message of a conversation: every role and every kind of part, read and written without loss.
//!
//! Knows no provider. Invariant: what was read is written back as it came, unknown fields included, except that nulls
//! are left out; so a guardrail may change a text here and whatever is sent follows.

use serde_json::{Map, Value, json};

use crate::providers::{
    fields::{Fields, Word, shorten, words, wrong_type},
    refusal::Refusal,
};

/// A turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Whose, and what it says.
    pub body: MessageBody,
    /// Which participant; which function under the old role.
    pub name: Option<String>,
    /// Fields not known here.
    pub extra: Map<String, Value>,
}

/// What a turn says, by role.
#[derive(Clone, Debug, PartialEq)]
pub enum MessageBody {
    /// Instructions of the operator, for reasoning models.
    Developer(Content),
    /// Instructions of the operator.
    System(Content),
    /// The person.
    User(Content),
    /// The model.
    Assistant(Box<AssistantTurn>),
    /// A tool's answer.
    Tool {
        /// Which call it answers.
        tool_call_id: String,
        /// The answer.
        content: Content,
    },
    /// The old form of a tool's answer.
    Function(Option<String>),
}

/// The model's own turn.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AssistantTurn {
    /// What it said.
    pub content: Option<Content>,
    /// What it declined to say.
    pub refusal: Option<String>,
    /// What it thought (`reasoning_content`, as vLLM and DeepSeek have it).
    pub reasoning: Option<String>,
    /// What it called.
    pub tool_calls: Vec<ToolCall>,
    /// A former spoken answer's id.
    pub audio: Option<Value>,
    /// The old form of `tool_calls`.
    pub function_call: Option<Value>,
    /// What providers want back with the turn: signed thoughts.
    pub extra_content: Option<Map<String, Value>>,
}

/// `content`.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// A text.
    Text(String),
    /// Parts.
    Parts(Vec<Part>),
}

impl Content {
    /// All text of it, joined by nothing; parts that are no text are left out.
    pub fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Parts(parts) => parts.iter().filter_map(|part| part.kind.as_text()).collect(),
        }
    }

    pub(crate) fn to_json(&self) -> Value {
        match self {
            Self::Text(text) => Value::String(text.clone()),
            Self::Parts(parts) => Value::Array(parts.iter().map(Part::to_json).collect()),
        }
    }
}

/// One part of a message.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// What it is.
    pub kind: PartKind,
    /// Fields not known here, such as `prompt_cache_breakpoint`.
    pub extra: Map<String, Value>,
}

/// Kinds of parts.
#[derive(Clone, Debug, PartialEq)]
pub enum PartKind {
    /// A text.
    Text(String),
    /// What the assistant declined to say.
    Refusal(String),
    /// A picture.
    Image {
        /// `https:` or `data:`.
        url: String,
        /// How closely to look.
        detail: Option<String>,
        /// Unknown fields of the inner object.
        extra: Map<String, Value>,
    },
    /// Sound.
    Audio {
        /// Base64.
        data: String,
        /// Its format.
        format: AudioFormat,
        /// Unknown fields of the inner object.
        extra: Map<String, Value>,
    },
    /// A document.
    File {
        /// Of a file uploaded before.
        file_id: Option<String>,
        /// `data:` URL.
        file_data: Option<String>,
        /// Its name.
        filename: Option<String>,
        /// Unknown fields of the inner object.
        extra: Map<String, Value>,
    },
}

words! {
    /// What an `input_audio` part holds.
    pub enum AudioFormat {
        /// RIFF.
        Wav = "wav",
        /// MPEG layer 3.
        Mp3 = "mp3",
    }
}

impl PartKind {
    fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) | Self::Refusal(text) => Some(text),
            Self::Image { .. } | Self::Audio { .. } | Self::File { .. } => None,
        }
    }
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    /// What its answer refers to.
    pub id: String,
    /// What is called.
    pub kind: ToolCallKind,
    /// Fields not known here, such as Google's `extra_content`.
    pub extra: Map<String, Value>,
}

/// What is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolCallKind {
    /// A function with JSON arguments.
    Function {
        /// Its name.
        name: String,
        /// JSON, as text.
        arguments: String,
    },
    /// A tool that takes free text.
    Custom {
        /// Its name.
        name: String,
        /// The text.
        input: String,
    },
}

impl ToolCallKind {
    /// What is called.
    pub fn name(&self) -> &str {
        match self {
            Self::Function { name, .. } | Self::Custom { name, .. } => name,
        }
    }
}

words! {
    /// Whose turn it is.
    pub enum Role {
        /// Instructions of the operator, for reasoning models.
        Developer = "developer",
        /// Instructions of the operator.
        System = "system",
        /// The person.
        User = "user",
        /// The model.
        Assistant = "assistant",
        /// A tool's answer.
        Tool = "tool",
        /// The old name of `tool`.
        Function = "function",
    }
}

/// Which parts a role may have.
#[derive(Clone, Copy, PartialEq)]
enum Allowed {
    Text,
    TextAndRefusal,
    All,
}

impl Message {
    /// Reads one; `path` is where it stands.
    pub(crate) fn read(value: Value, path: String) -> Result<Self, Refusal> {
        let mut fields = Fields::object(value, path)?;
        let role: Role = fields.word("role")?.ok_or_else(|| fields.missing("role"))?;
        let name = fields.text("name")?;
        let body = match role {
            Role::Developer => MessageBody::Developer(required_content(&mut fields, Allowed::Text)?),
            Role::System => MessageBody::System(required_content(&mut fields, Allowed::Text)?),
            Role::User => MessageBody::User(required_content(&mut fields, Allowed::All)?),
            Role::Assistant => MessageBody::Assistant(Box::new(AssistantTurn::read(&mut fields)?)),
            Role::Tool => MessageBody::Tool {
                tool_call_id: fields.required_text("tool_call_id")?,
                content: required_content(&mut fields, Allowed::Text)?,
            },
            Role::Function => {
                if name.is_none() {
                    return Err(fields.missing("name"));
                }
                MessageBody::Function(fields.text("content")?)
            }
        };
        Ok(Self { body, name, extra: fields.rest() })
    }

    /// Whose turn.
    pub fn role(&self) -> Role {
        match &self.body {
            MessageBody::Developer(_) => Role::Developer,
            MessageBody::System(_) => Role::System,
            MessageBody::User(_) => Role::User,
            MessageBody::Assistant(_) => Role::Assistant,
            MessageBody::Tool { .. } => Role::Tool,
            MessageBody::Function(_) => Role::Function,
        }
    }

    /// As it came.
    pub(crate) fn to_json(&self) -> Value {
        let mut map = Map::new();
        map.insert("role".to_owned(), self.role().word().into());
        match &self.body {
            MessageBody::Developer(content) | MessageBody::System(content) | MessageBody::User(content) => {
                map.insert("content".to_owned(), content.to_json());
            }
            MessageBody::Assistant(turn) => turn.write(&mut map),
            MessageBody::Tool { tool_call_id, content } => {
                map.insert("tool_call_id".to_owned(), tool_call_id.as_str().into());
                map.insert("content".to_owned(), content.to_json());
            }
            MessageBody::Function(content) => {
                map.insert("content".to_owned(), content.clone().map_or(Value::Null, Value::String));
            }
        }
        if let Some(name) = &self.name {
            map.insert("name".to_owned(), name.as_str().into());
        }
        map.extend(self.extra.clone());
        Value::Object(map)
    }
}

impl AssistantTurn {
    fn read(fields: &mut Fields) -> Result<Self, Refusal> {
        let tool_calls = fields.list("tool_calls")?.unwrap_or_default();
        let path = fields.path("tool_calls");
        let turn = Self {
            content: read_content(fields, Allowed::TextAndRefusal)?,
            refusal: fields.text("refusal")?,
            reasoning: fields.text("reasoning_content")?,
            tool_calls: tool_calls
                .into_iter()
                .enumerate()
                .map(|(index, call)| ToolCall::read(call, format!("{path}[{index}]")))
                .collect::<Result<_, _>>()?,
            audio: fields.value("audio"),
            function_call: fields.value("function_call"),
            extra_content: fields.free_object("extra_content")?,
        };
        let says_nothing = turn.content.is_none()
            && turn.refusal.is_none()
            && turn.audio.is_none()
            && turn.function_call.is_none()
            && turn.tool_calls.is_empty();
        // Without content a turn must at least call something.
        if says_nothing { Err(fields.missing("content")) } else { Ok(turn) }
    }

    fn write(&self, map: &mut Map<String, Value>) {
        map.insert("content".to_owned(), self.content.as_ref().map_or(Value::Null, Content::to_json));
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                map.insert(name.to_owned(), value);
            }
        };
        put("refusal", self.refusal.clone().map(Value::String));
        put("reasoning_content", self.reasoning.clone().map(Value::String));
        let calls = || Value::Array(self.tool_calls.iter().map(ToolCall::to_json).collect());
        put("tool_calls", (!self.tool_calls.is_empty()).then(calls));
        put("audio", self.audio.clone());
        put("function_call", self.function_call.clone());
        put("extra_content", self.extra_content.clone().map(Value::Object));
    }
}

impl ToolCall {
    fn read(value: Value, path: String) -> Result<Self, Refusal> {
        let mut fields = Fields::object(value, path)?;
        let id = fields.required_text("id")?;
        let kind = match fields.text("type")?.as_deref() {
            None | Some("function") => {
                let mut inner = fields.required_nested("function")?;
                ToolCallKind::Function {
                    name: inner.required_text("name")?,
                    arguments: inner.text("arguments")?.unwrap_or_default(),
                }
            }
            Some("custom") => {
                let mut inner = fields.required_nested("custom")?;
                ToolCallKind::Custom { name: inner.required_text("name")?, input: inner.required_text("input")? }
            }
            Some(other) => return Err(unknown_type(&fields, other, "`function` or `custom`")),
        };
        Ok(Self { id, kind, extra: fields.rest() })
    }

    pub(crate) fn to_json(&self) -> Value {
        let mut value = match &self.kind {
            ToolCallKind::Function { name, arguments } => {
                json!({"id": self.id, "type": "function", "function": {"name": name, "arguments": arguments}})
            }
            ToolCallKind::Custom { name, input } => {
                json!({"id": self.id, "type": "custom", "custom": {"name": name, "input": input}})
            }
        };
        extend(&mut value, &self.extra);
        value
    }
}

impl Part {
    fn read(value: Value, path: String, allowed: Allowed) -> Result<Self, Refusal> {
        let mut fields = Fields::object(value, path)?;
        let kind = fields.required_text("type")?;
        let kind = match (kind.as_str(), allowed) {
            ("text", _) => PartKind::Text(fields.required_text("text")?),
            ("refusal", Allowed::TextAndRefusal) => PartKind::Refusal(fields.required_text("refusal")?),
            ("image_url", Allowed::All) => {
                let mut inner = fields.required_nested("image_url")?;
                PartKind::Image { url: inner.required_text("url")?, detail: inner.text("detail")?, extra: inner.rest() }
            }
            ("input_audio", Allowed::All) => {
                let mut inner = fields.required_nested("input_audio")?;
                PartKind::Audio {
                    data: inner.required_text("data")?,
                    format: inner.word("format")?.ok_or_else(|| inner.missing("format"))?,
                    extra: inner.rest(),
                }
            }
            ("file", Allowed::All) => {
                let mut inner = fields.required_nested("file")?;
                PartKind::File {
                    file_id: inner.text("file_id")?,
                    file_data: inner.text("file_data")?,
                    filename: inner.text("filename")?,
                    extra: inner.rest(),
                }
            }
            (other, Allowed::Text) => return Err(unknown_type(&fields, other, "`text`, all that this role takes")),
            (other, Allowed::TextAndRefusal) => return Err(unknown_type(&fields, other, "`text` or `refusal`")),
            (other, Allowed::All) => {
                return Err(unknown_type(&fields, other, "`text`, `image_url`, `input_audio` or `file`"));
            }
        };
        Ok(Self { kind, extra: fields.rest() })
    }

    fn to_json(&self) -> Value {
        let mut value = match &self.kind {
            PartKind::Text(text) => json!({"type": "text", "text": text}),
            PartKind::Refusal(text) => json!({"type": "refusal", "refusal": text}),
            PartKind::Image { url, detail, extra } => {
                let mut inner = json!({"url": url});
                put(&mut inner, "detail", detail.as_ref());
                extend(&mut inner, extra);
                json!({"type": "image_url", "image_url": inner})
            }
            PartKind::Audio { data, format, extra } => {
                let mut inner = json!({"data": data, "format": format.word()});
                extend(&mut inner, extra);
                json!({"type": "input_audio", "input_audio": inner})
            }
            PartKind::File { file_id, file_data, filename, extra } => {
                let mut inner = json!({});
                put(&mut inner, "file_id", file_id.as_ref());
                put(&mut inner, "file_data", file_data.as_ref());
                put(&mut inner, "filename", filename.as_ref());
                extend(&mut inner, extra);
                json!({"type": "file", "file": inner})
            }
        };
        extend(&mut value, &self.extra);
        value
    }
}

fn put(value: &mut Value, name: &str, text: Option<&String>) {
    if let (Some(map), Some(text)) = (value.as_object_mut(), text) {
        map.insert(name.to_owned(), text.as_str().into());
    }
}

fn extend(value: &mut Value, extra: &Map<String, Value>) {
    if let Some(map) = value.as_object_mut() {
        map.extend(extra.clone());
    }
}

fn required_content(fields: &mut Fields, allowed: Allowed) -> Result<Content, Refusal> {
    read_content(fields, allowed)?.ok_or_else(|| fields.missing("content"))
}

fn read_content(fields: &mut Fields, allowed: Allowed) -> Result<Option<Content>, Refusal> {
    let path = fields.path("content");
    match fields.value("content") {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(Content::Text(text))),
        Some(Value::Array(parts)) => {
            let parts = parts.into_iter().enumerate();
            let parts = parts.map(|(index, part)| Part::read(part, format!("{path}[{index}]"), allowed));
            Ok(Some(Content::Parts(parts.collect::<Result<_, _>>()?)))
        }
        Some(other) => Err(wrong_type(path, "a string or an array of content parts", &other)),
    }
}

fn unknown_type(fields: &Fields, got: &str, known: &str) -> Refusal {
    Refusal::invalid(fields.path("type"), format!("`{}` is not {known}", shorten(got)))
}
