//! `/tokenize` and `/detokenize`, in vLLM's shapes.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::chat::{ChatMessage, optional_messages};
use crate::json::{Present, free_object, from_object};

/// A text or a conversation to turn into tokens: exactly one of `prompt` and `messages`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct TokenizeRequest {
    /// The served model where absent.
    #[serde(default)]
    pub model: Option<String>,
    /// A text.
    #[serde(default)]
    pub prompt: Option<String>,
    /// A conversation; the chat template turns it into a text.
    #[serde(default, deserialize_with = "optional_messages")]
    pub messages: Option<Vec<ChatMessage>>,
    /// Default true for `prompt`, false for `messages` (the template writes them itself).
    #[serde(default)]
    pub add_special_tokens: Option<bool>,
    /// End with the opening of the assistant's turn (default true).
    #[serde(default)]
    pub add_generation_prompt: Option<bool>,
    /// Not supported yet.
    #[serde(default)]
    pub continue_final_message: Option<bool>,
    /// Further variables of the template.
    #[serde(default, deserialize_with = "free_object")]
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// Not supported.
    #[serde(default)]
    pub chat_template: Option<Present>,
    /// Not supported yet.
    #[serde(default)]
    pub tools: Option<Present>,
    /// Each token as it stands in the vocabulary, too.
    #[serde(default)]
    pub return_token_strs: Option<bool>,
}

/// Tokens of a text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenizeResponse {
    /// How many.
    pub count: usize,
    /// How many one sequence may have.
    pub max_model_len: usize,
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Where asked for.
    pub token_strs: Option<Vec<String>>,
}

/// Tokens to turn into a text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct DetokenizeRequest {
    /// The served model where absent.
    #[serde(default)]
    pub model: Option<String>,
    /// Token ids.
    pub tokens: Vec<u32>,
}

from_object! {
    TokenizeRequest: "a JSON object with `prompt` or `messages`",
    DetokenizeRequest: "a JSON object with `tokens`",
}

/// The text of tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DetokenizeResponse {
    /// The text.
    pub prompt: String,
}
