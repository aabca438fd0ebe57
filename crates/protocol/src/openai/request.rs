//! What both generating routes take: sampling, stopping, streaming.
//!
//! The two request structs share these fields. serde's `flatten` would buffer the body and lose the path of an error,
//! so a macro writes them into both structs, and `take_sampling` hands them over as one value.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error, MapAccess, Visitor},
};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{
        RefOr, Schema,
        schema::{ObjectBuilder, Type},
    },
};

use crate::json::from_object;

/// Defines a request struct with the given fields and the shared ones, and [`SamplingFields`]' way out of it.
macro_rules! generating_request {
    ($(#[$attribute:meta])* pub struct $name:ident { $($own:tt)* }) => {
        $crate::openai::request::generating_request! { @fields $(#[$attribute])* pub struct $name { $($own)* } {
            /// 0 is greedy; 0 to 2.
            temperature: f64,
            /// Nucleus sampling: above 0, at most 1.
            top_p: f64,
            /// Keep the k most likely tokens; 0 or -1 keeps all.
            top_k: i64,
            /// Keep tokens at least this likely relative to the best: 0 to 1.
            min_p: f64,
            /// Above 0; 1 is off. Over prompt and output.
            repetition_penalty: f64,
            /// -2 to 2.
            presence_penalty: f64,
            /// -2 to 2.
            frequency_penalty: f64,
            /// Token id to a value from -100 to 100, added to its logit.
            logit_bias: $crate::openai::request::LogitBias,
            /// The same seed gives the same tokens, whatever else the server does.
            seed: i64,
            /// Strings that end a choice.
            stop: $crate::json::OneOrMany,
            /// Tokens that end a choice, besides the model's own.
            stop_token_ids: Vec<u32>,
            /// Most tokens to generate.
            max_tokens: i64,
            /// No end before this many tokens.
            min_tokens: i64,
            /// The model's own end tokens do not end a choice.
            ignore_eos: bool,
            /// Special tokens are left out of the text (default true).
            skip_special_tokens: bool,
            /// The stop string found stays in the text.
            include_stop_str_in_output: bool,
            /// Choices for each prompt: 1 to 128.
            n: i64,
            /// Server-sent events instead of one answer.
            stream: bool,
            /// What a stream carries besides.
            stream_options: $crate::openai::request::StreamOptions,
            /// Keep only the last tokens of the prompt, this many.
            truncate_prompt_tokens: i64,
            /// Log-probabilities of the prompt's tokens, and of this many most likely ones at each.
            prompt_logprobs: i64,
            /// Tokens in log-probabilities are written `token_id:N`.
            return_tokens_as_token_ids: bool,
            /// The model's special tokens (such as its begin token) are added to a text prompt.
            add_special_tokens: bool,
            /// Lower runs first.
            priority: i64,
            /// Accepted; without effect until there is a prefix cache to salt.
            cache_salt: String,
            /// The form of the answer: text, any JSON object, or JSON by a schema.
            response_format: $crate::openai::request::ResponseFormat,
            /// The form of the answer (vLLM): JSON by a schema, a regular expression, a choice, a grammar.
            structured_outputs: $crate::openai::request::StructuredOutputs,
            /// The older form of `structured_outputs.json` (vLLM).
            guided_json: $crate::json::FreeValue,
            /// The older form of `structured_outputs.regex` (vLLM).
            guided_regex: String,
            /// The older form of `structured_outputs.choice` (vLLM).
            guided_choice: Vec<String>,
            /// The older form of `structured_outputs.grammar` (vLLM).
            guided_grammar: String,
            /// Not supported.
            use_beam_search: bool,
            /// Not supported.
            logits_processors: $crate::json::Present,
        } }
    };
    (@fields $(#[$attribute:meta])* pub struct $name:ident { $($own:tt)* }
        { $($(#[$doc:meta])* $field:ident: $type:ty,)* }
    ) => {
        $(#[$attribute])*
        pub struct $name {
            $($own)*
            $($(#[$doc])* #[serde(default)] pub $field: Option<$type>,)*
        }
        impl $name {
            /// Moves the shared fields out.
            #[must_use]
            pub fn take_sampling(&mut self) -> $crate::openai::request::SamplingFields {
                $crate::openai::request::SamplingFields { $($field: self.$field.take(),)* }
            }
        }
    };
}
pub(crate) use generating_request;

generating_request! {
    /// The fields both generating routes share; `None` where the client sent nothing or `null`.
    #[derive(Clone, Debug, Default, PartialEq, Deserialize)]
    pub struct SamplingFields {}
}

/// `stream_options`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct StreamOptions {
    /// A last chunk without choices that carries the usage.
    #[serde(default)]
    pub include_usage: Option<bool>,
    /// Usage so far in every chunk (vLLM).
    #[serde(default)]
    pub continuous_usage_stats: Option<bool>,
}

/// `response_format`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct ResponseFormat {
    /// `text`, `json_object` or `json_schema`.
    #[serde(rename = "type")]
    pub kind: String,
    /// With `json_schema`.
    #[serde(default)]
    pub json_schema: Option<JsonSchemaFormat>,
}

/// `response_format.json_schema`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct JsonSchemaFormat {
    /// For the client's own use.
    #[serde(default)]
    pub name: Option<String>,
    /// For the client's own use.
    #[serde(default)]
    pub description: Option<String>,
    /// The schema.
    #[serde(default)]
    pub schema: Option<crate::json::FreeValue>,
    /// Accepted; the schema is kept to in any case.
    #[serde(default)]
    pub strict: Option<bool>,
}

/// `structured_outputs` (vLLM): one of its first five fields.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct StructuredOutputs {
    /// A JSON schema, as an object or as its text.
    #[serde(default)]
    pub json: Option<crate::json::FreeValue>,
    /// A regular expression that the whole answer matches.
    #[serde(default)]
    pub regex: Option<String>,
    /// The answer is one of these.
    #[serde(default)]
    pub choice: Option<Vec<String>>,
    /// A grammar in llguidance's variant of Lark's syntax.
    #[serde(default)]
    pub grammar: Option<String>,
    /// Any JSON object.
    #[serde(default)]
    pub json_object: Option<bool>,
    /// No white space between the tokens of JSON.
    #[serde(default)]
    pub disable_any_whitespace: Option<bool>,
    /// A regular expression for the white space between the tokens of JSON.
    #[serde(default)]
    pub whitespace_pattern: Option<String>,
    /// Not supported yet.
    #[serde(default)]
    pub structural_tag: Option<crate::json::Present>,
    /// Not supported yet.
    #[serde(default)]
    pub disable_additional_properties: Option<bool>,
}

from_object! {
    StreamOptions: "an object such as {\"include_usage\": true}",
    ResponseFormat: "an object such as {\"type\": \"text\"}",
    JsonSchemaFormat: "an object such as {\"name\": \"answer\", \"schema\": {\"type\": \"object\"}}",
    StructuredOutputs: "an object such as {\"choice\": [\"yes\", \"no\"]}",
}

/// `logit_bias`: an object from token ids (as strings, JSON has no other keys) to numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogitBias(pub BTreeMap<u32, f64>);

impl<'de> Deserialize<'de> for LogitBias {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TokenKey(u32);
        impl<'de> Deserialize<'de> for TokenKey {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct TokenKeyVisitor;
                impl Visitor<'_> for TokenKeyVisitor {
                    type Value = TokenKey;
                    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                        f.write_str("a token id as the key")
                    }
                    fn visit_str<E: Error>(self, key: &str) -> Result<TokenKey, E> {
                        key.parse().map(TokenKey).map_err(|_| {
                            let shown: String = key.chars().take(32).collect();
                            E::custom(format!("key {shown:?} is not a token id (a whole number in quotes)"))
                        })
                    }
                }
                deserializer.deserialize_str(TokenKeyVisitor)
            }
        }
        struct LogitBiasVisitor;
        impl<'de> Visitor<'de> for LogitBiasVisitor {
            type Value = LogitBias;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object from token ids to numbers")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LogitBias, A::Error> {
                let mut biases = BTreeMap::new();
                while let Some((key, bias)) = map.next_entry::<TokenKey, f64>()? {
                    biases.insert(key.0, bias);
                }
                Ok(LogitBias(biases))
            }
        }
        deserializer.deserialize_map(LogitBiasVisitor)
    }
}

impl PartialSchema for LogitBias {
    fn schema() -> RefOr<Schema> {
        let number = ObjectBuilder::new().schema_type(Type::Number);
        ObjectBuilder::new().schema_type(Type::Object).additional_properties(Some(number)).into()
    }
}
impl ToSchema for LogitBias {}

/// vLLM's `stop_reason`: the string or the token id that ended a choice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum StopReason {
    /// A stop string.
    Text(String),
    /// One of `stop_token_ids`.
    Token(u32),
}
