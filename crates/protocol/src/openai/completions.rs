//! `POST /v1/completions`.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error, SeqAccess, Visitor},
};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{
        RefOr, Schema,
        schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Type},
    },
};

use super::{
    logprobs::{CompletionLogprobs, PromptLogprobs},
    request::{StopReason, generating_request},
    usage::Usage,
};
use crate::json::from_object;

generating_request! {
    /// A prompt to continue.
    #[derive(Clone, Debug, Default, PartialEq, Deserialize, ToSchema)]
    #[serde(remote = "Self")]
    pub struct CompletionRequest {
        /// The served model where absent.
        #[serde(default)]
        pub model: Option<String>,
        /// One prompt or several, as text or token ids.
        #[serde(default)]
        pub prompt: Option<CompletionPrompt>,
        /// Generate this many for each prompt and return the `n` best.
        #[serde(default)]
        pub best_of: Option<i64>,
        /// The prompt comes back before its continuation.
        #[serde(default)]
        pub echo: Option<bool>,
        /// Log-probabilities of the tokens, and of this many most likely ones at each.
        #[serde(default)]
        pub logprobs: Option<i64>,
        /// Not supported: text after the insertion.
        #[serde(default)]
        pub suffix: Option<String>,
    }
}

from_object! { CompletionRequest: "a JSON object with `model` and `prompt`" }

/// The four forms of `prompt`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CompletionPrompt {
    /// One text.
    Text(String),
    /// Several texts (an empty array is this form, too).
    Texts(Vec<String>),
    /// One prompt as token ids.
    Tokens(Vec<u32>),
    /// Several prompts as token ids.
    TokenLists(Vec<Vec<u32>>),
}

const PROMPT_FORMS: &str = "a string, an array of strings, an array of token ids, or an array of arrays of token ids";

impl<'de> Deserialize<'de> for CompletionPrompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// One element of an array prompt.
        enum Element {
            Text(String),
            Token(u32),
            Tokens(Vec<u32>),
        }
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = Element;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string, a token id or an array of token ids")
            }
            fn visit_str<E>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Text(text.to_owned()))
            }
            fn visit_string<E>(self, text: String) -> Result<Element, E> {
                Ok(Element::Text(text))
            }
            fn visit_u64<E: Error>(self, id: u64) -> Result<Element, E> {
                u32::try_from(id).map(Element::Token).map_err(|_| E::custom(format!("{id} is not a token id")))
            }
            fn visit_i64<E: Error>(self, id: i64) -> Result<Element, E> {
                Err(E::custom(format!("{id} is not a token id")))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Element, A::Error> {
                let mut tokens = Vec::new();
                while let Some(token) = seq.next_element()? {
                    tokens.push(token);
                }
                Ok(Element::Tokens(tokens))
            }
        }
        impl<'de> Deserialize<'de> for Element {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(ElementVisitor)
            }
        }

        struct PromptVisitor;
        impl<'de> Visitor<'de> for PromptVisitor {
            type Value = CompletionPrompt;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str(PROMPT_FORMS)
            }
            fn visit_str<E>(self, text: &str) -> Result<CompletionPrompt, E> {
                Ok(CompletionPrompt::Text(text.to_owned()))
            }
            fn visit_string<E>(self, text: String) -> Result<CompletionPrompt, E> {
                Ok(CompletionPrompt::Text(text))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<CompletionPrompt, A::Error> {
                let mut prompt = match seq.next_element()? {
                    None => return Ok(CompletionPrompt::Texts(Vec::new())),
                    Some(Element::Text(text)) => CompletionPrompt::Texts(vec![text]),
                    Some(Element::Token(token)) => CompletionPrompt::Tokens(vec![token]),
                    Some(Element::Tokens(tokens)) => CompletionPrompt::TokenLists(vec![tokens]),
                };
                while let Some(element) = seq.next_element()? {
                    match (&mut prompt, element) {
                        (CompletionPrompt::Texts(texts), Element::Text(text)) => texts.push(text),
                        (CompletionPrompt::Tokens(tokens), Element::Token(token)) => tokens.push(token),
                        (CompletionPrompt::TokenLists(lists), Element::Tokens(tokens)) => lists.push(tokens),
                        _ => {
                            return Err(A::Error::custom(format!("elements of different kinds: send {PROMPT_FORMS}")));
                        }
                    }
                }
                Ok(prompt)
            }
        }
        deserializer.deserialize_any(PromptVisitor)
    }
}

impl PartialSchema for CompletionPrompt {
    fn schema() -> RefOr<Schema> {
        let string = || ObjectBuilder::new().schema_type(Type::String);
        let ids = || ArrayBuilder::new().items(ObjectBuilder::new().schema_type(Type::Integer));
        OneOfBuilder::new()
            .item(string())
            .item(ArrayBuilder::new().items(string()))
            .item(ids())
            .item(ArrayBuilder::new().items(ids()))
            .into()
    }
}
impl ToSchema for CompletionPrompt {}

/// The answer, and each chunk of a streamed one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Completion {
    /// `cmpl-...`, one for the whole answer.
    pub id: String,
    /// `text_completion`.
    pub object: String,
    /// Unix seconds.
    pub created: u64,
    /// The model as asked for.
    pub model: String,
    /// prompt * n + sample is the index.
    pub choices: Vec<CompletionChoice>,
    /// In a stream only where asked for.
    #[serde(default, skip_serializing_if = "UsageField::is_absent")]
    #[schema(value_type = Option<Usage>)]
    pub usage: UsageField,
}

/// `usage` in a stream has three states: not there, `null` (asked for, comes last), there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum UsageField {
    /// Left out.
    #[default]
    #[serde(skip)]
    Absent,
    /// Counted.
    Counted(Usage),
    /// `null`.
    Null,
}

impl UsageField {
    /// Left out.
    pub fn is_absent(&self) -> bool {
        *self == Self::Absent
    }

    /// The counts, where there are any.
    pub fn counted(&self) -> Option<Usage> {
        match self {
            Self::Counted(usage) => Some(*usage),
            Self::Absent | Self::Null => None,
        }
    }
}

/// One continuation, or a piece of one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CompletionChoice {
    /// Which.
    pub index: usize,
    /// Its text.
    pub text: String,
    /// Where asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; null while it goes on.
    pub finish_reason: Option<String>,
    /// The stop string or token (vLLM).
    pub stop_reason: Option<StopReason>,
    /// Where asked for (vLLM).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<PromptLogprobs>,
}
