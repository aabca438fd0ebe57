//! `POST /v1/chat/completions`.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{SeqAccess, Visitor},
};
use serde_json::{Map, Value};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{
        Ref, RefOr, Schema,
        schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Type},
    },
};

use super::{
    completions::UsageField,
    logprobs::{ChatLogprobs, PromptLogprobs},
    request::{StopReason, generating_request},
    usage::Usage,
};
use crate::json::{
    MAX_FREE_VALUES, ModeOrObject, Present, count_values, free_object, free_objects, from_object, too_many_values,
};

generating_request! {
    /// A conversation to continue.
    #[derive(Clone, Debug, Default, PartialEq, Deserialize, ToSchema)]
    #[serde(remote = "Self")]
    pub struct ChatCompletionRequest {
        /// The served model where absent.
        #[serde(default)]
        pub model: Option<String>,
        /// The conversation so far.
        #[serde(deserialize_with = "messages")]
        pub messages: Vec<ChatMessage>,
        /// Most tokens to generate; the newer name of `max_tokens`.
        #[serde(default)]
        pub max_completion_tokens: Option<i64>,
        /// Log-probabilities of the tokens.
        #[serde(default)]
        pub logprobs: Option<bool>,
        /// With `logprobs`: and of this many most likely ones at each.
        #[serde(default)]
        pub top_logprobs: Option<i64>,
        /// Not supported yet.
        #[serde(default)]
        pub tools: Option<Vec<Present>>,
        /// Only `none` yet.
        #[serde(default)]
        pub tool_choice: Option<ModeOrObject>,
        /// Not supported: the old form of `tools`.
        #[serde(default)]
        pub functions: Option<Present>,
        /// Not supported: the old form of `tool_choice`.
        #[serde(default)]
        pub function_call: Option<ModeOrObject>,
        /// Reaches the template under this name.
        #[serde(default)]
        pub reasoning_effort: Option<String>,
        /// Further variables of the template (vLLM).
        #[serde(default, deserialize_with = "free_object")]
        #[schema(value_type = Option<Object>)]
        pub chat_template_kwargs: Option<Map<String, Value>>,
        /// Not supported: the model's own template is used.
        #[serde(default)]
        pub chat_template: Option<Present>,
        /// Not supported yet.
        #[serde(default)]
        pub documents: Option<Present>,
        /// End the prompt with the opening of the assistant's turn (default true).
        #[serde(default)]
        pub add_generation_prompt: Option<bool>,
        /// Not supported yet.
        #[serde(default)]
        pub continue_final_message: Option<bool>,
        /// Not supported here: see `/v1/completions`.
        #[serde(default)]
        pub echo: Option<bool>,
        /// Only `["text"]`.
        #[serde(default)]
        pub modalities: Option<Vec<String>>,
        /// Not supported.
        #[serde(default)]
        pub audio: Option<Present>,
    }
}

/// One turn. What else a client sends with it is ignored, and named as such.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct ChatMessage {
    /// Whose turn.
    pub role: Role,
    /// Text, or parts of it. Absent beside tool calls.
    #[serde(default)]
    pub content: Option<ChatContent>,
    /// Which participant, or which tool.
    #[serde(default)]
    pub name: Option<String>,
    /// What the assistant called.
    #[serde(default, deserialize_with = "free_objects")]
    #[schema(value_type = Option<Vec<Object>>)]
    pub tool_calls: Option<Vec<Map<String, Value>>>,
    /// Which call a tool's turn answers.
    #[serde(default)]
    pub tool_call_id: Option<String>,
    /// What the assistant thought (vLLM, DeepSeek).
    #[serde(default)]
    pub reasoning_content: Option<String>,
    /// What the assistant refused to say, in place of content.
    #[serde(default)]
    pub refusal: Option<String>,
}

/// A conversation; the `tool_calls` of all its messages together are bounded by [`MAX_FREE_VALUES`] while it is read.
pub(super) fn messages<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ChatMessage>, D::Error> {
    struct MessagesVisitor;
    impl<'de> Visitor<'de> for MessagesVisitor {
        type Value = Vec<ChatMessage>;
        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("a sequence")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<ChatMessage>, A::Error> {
            let mut messages = Vec::new();
            let mut num_values = 0;
            while let Some(message) = seq.next_element::<ChatMessage>()? {
                num_values += message.tool_calls.iter().flatten().map(count_values).sum::<usize>();
                if num_values > MAX_FREE_VALUES {
                    return Err(too_many_values());
                }
                messages.push(message);
            }
            Ok(messages)
        }
    }
    deserializer.deserialize_seq(MessagesVisitor)
}

/// [`messages`] of a field that may be absent or `null`.
pub(super) fn optional_messages<'de, D>(deserializer: D) -> Result<Option<Vec<ChatMessage>>, D::Error>
where
    D: Deserializer<'de>,
{
    struct Messages(Vec<ChatMessage>);
    impl<'de> Deserialize<'de> for Messages {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            messages(deserializer).map(Self)
        }
    }
    Option::<Messages>::deserialize(deserializer).map(|messages| messages.map(|Messages(all)| all))
}

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase", try_from = "String")]
pub enum Role {
    /// Instructions of the operator.
    System,
    /// The newer name of `system`.
    Developer,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// A tool's answer.
    Tool,
    /// The old name of `tool`.
    Function,
}

/// By way of a string, so that whatever is not one is an error of the field (serde takes it for broken JSON).
impl TryFrom<String> for Role {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        Self::ALL.into_iter().find(|role| role.as_str() == name).ok_or_else(|| {
            let known = Self::ALL.map(|role| format!("`{}`", role.as_str())).join(", ");
            format!("unknown role `{name}`, expected one of {known}")
        })
    }
}

impl Role {
    /// Every role there is.
    pub const ALL: [Self; 6] = [Self::System, Self::Developer, Self::User, Self::Assistant, Self::Tool, Self::Function];

    /// As on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Developer => "developer",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
            Self::Function => "function",
        }
    }
}

/// `content` of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChatContent {
    /// A text.
    Text(String),
    /// Parts.
    Parts(Vec<ContentPart>),
}

/// One part of a message.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct ContentPart {
    /// `text` and `refusal` are read; pictures, sound and files are not.
    #[serde(rename = "type")]
    pub kind: String,
    /// With `text`.
    #[serde(default)]
    pub text: Option<String>,
    /// With `refusal`.
    #[serde(default)]
    pub refusal: Option<String>,
}

from_object! {
    ChatCompletionRequest: "a JSON object with `model` and `messages`",
    ChatMessage: "a message object such as {\"role\": \"user\", \"content\": \"...\"}",
    ContentPart: "a content part such as {\"type\": \"text\", \"text\": \"...\"}",
}

impl<'de> Deserialize<'de> for ChatContent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContentVisitor;
        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = ChatContent;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string or an array of content parts")
            }
            fn visit_str<E>(self, text: &str) -> Result<ChatContent, E> {
                Ok(ChatContent::Text(text.to_owned()))
            }
            fn visit_string<E>(self, text: String) -> Result<ChatContent, E> {
                Ok(ChatContent::Text(text))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<ChatContent, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = seq.next_element()? {
                    parts.push(part);
                }
                Ok(ChatContent::Parts(parts))
            }
        }
        deserializer.deserialize_any(ContentVisitor)
    }
}

impl PartialSchema for ChatContent {
    fn schema() -> RefOr<Schema> {
        OneOfBuilder::new()
            .item(ObjectBuilder::new().schema_type(Type::String))
            .item(ArrayBuilder::new().items(Ref::from_schema_name("ContentPart")))
            .into()
    }
}
impl ToSchema for ChatContent {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push((ContentPart::name().into(), ContentPart::schema()));
    }
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatCompletion {
    /// `chatcmpl-...`.
    pub id: String,
    /// `chat.completion`.
    pub object: String,
    /// Unix seconds.
    pub created: u64,
    /// The model as asked for.
    pub model: String,
    /// `n` of them.
    pub choices: Vec<ChatCompletionChoice>,
    /// What it cost.
    pub usage: Usage,
    /// Where asked for (vLLM).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<PromptLogprobs>,
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatCompletionChoice {
    /// Which.
    pub index: usize,
    /// The assistant's turn.
    pub message: ChatResponseMessage,
    /// Where asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    pub finish_reason: Option<String>,
    /// The stop string or token (vLLM).
    pub stop_reason: Option<StopReason>,
}

/// The assistant's turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ChatResponseMessage {
    /// `assistant`.
    pub role: Role,
    /// Its text.
    pub content: Option<String>,
    /// Always null here: the model answers in `content`.
    pub refusal: Option<String>,
}

/// A piece of a streamed answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatCompletionChunk {
    /// `chatcmpl-...`, the same in all chunks.
    pub id: String,
    /// `chat.completion.chunk`.
    pub object: String,
    /// Unix seconds, the same in all chunks.
    pub created: u64,
    /// The model as asked for.
    pub model: String,
    /// Empty in the chunk that carries the usage.
    pub choices: Vec<ChatCompletionChunkChoice>,
    /// Where asked for: null until the last chunk.
    #[serde(default, skip_serializing_if = "UsageField::is_absent")]
    #[schema(value_type = Option<Usage>)]
    pub usage: UsageField,
}

/// A piece of one answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatCompletionChunkChoice {
    /// Which.
    pub index: usize,
    /// What is new.
    pub delta: ChatDelta,
    /// Of the tokens in this piece, where asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Set in the answer's last piece.
    pub finish_reason: Option<String>,
    /// The stop string or token (vLLM), beside `finish_reason`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason>,
}

/// What is new in a piece.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ChatDelta {
    /// In the first piece alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// Text to append.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}
