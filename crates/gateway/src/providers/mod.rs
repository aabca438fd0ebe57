//! Translation between OpenAI's API and what each provider speaks: requests out, answers, streams and errors in.
//!
//! Pure: no socket, no clock, no randomness; [`crate::upstream`] is the one door that sends what is made here. A request
//! becomes an [`Outgoing`]: what to send, what was left out, and the [`AnswerReader`] that understands the reply. What a
//! model can do is asked of its [`catalogue::ModelEntry`], never of its name. Must not know tenants, budgets or routes.
//!
//! **Invariant**: a stream is complete only after [`AnswerReader::end`] has said so, which it does only where the provider's
//! own end mark came; no chunk before that carries a finish reason. So a cut answer never looks complete.
//!
//! Reading order: [`Provider`], [`Call`], [`Outgoing`], [`AnswerReader`] (`reader`), then [`chat`], [`answer`], [`error`],
//! [`verdict`], [`catalogue`], and one file or folder per provider.

pub mod answer;
pub mod catalogue;
pub mod chat;
pub mod completions;
pub mod endpoint;
pub mod error;
pub mod reader;
pub mod refusal;
pub mod reply;
pub mod secret;
pub mod usage;
pub mod verdict;

mod anthropic;
mod azure;
mod compatible;
mod conversation;
pub(crate) mod fields;
mod gemini;
mod media;
mod openai;
mod openai_wire;
mod translation;

use chrono::{DateTime, Utc};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde_json::{Map, Value};
use url::Url;

pub use answer::{Answer, Chunk, FinishReason};
pub use catalogue::{Catalogue, ModelEntry};
pub use chat::ChatRequest;
pub use completions::CompletionRequest;
pub use endpoint::{Credential, Endpoint};
pub use error::UpstreamError;
pub use reader::{AnswerReader, Ended, SseEvent};
pub use refusal::Refusal;
pub use reply::Reply;
pub use secret::Secret;
pub use usage::Usage;
pub use verdict::{Warning, Warnings};

/// Who answers, by the wire they speak.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Provider {
    /// OpenAI's chat completions.
    OpenAi,
    /// Anthropic's messages; also as Azure hosts them.
    Anthropic,
    /// Google's generateContent; also on Vertex.
    Gemini,
    /// OpenAI's API as Azure hosts it.
    Azure(AzureForm),
    /// Any other server with OpenAI's API: another Bindery, vLLM, llama.cpp.
    Compatible,
}

/// Azure's two forms of URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AzureForm {
    /// `/openai/v1/`: the deployment's name stands in the body.
    V1,
    /// `/openai/deployments/NAME/`: the older form.
    Dated {
        /// `YYYY-MM-DD`, with or without `-preview`.
        api_version: String,
    },
}

/// One call, apart from the request itself.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Where to.
    pub endpoint: &'a Endpoint,
    /// Which model.
    pub model: &'a ModelEntry,
    /// The tenant's own limit of an answer; the request's stands before it, the model's behind it.
    pub max_output_tokens: Option<u64>,
    /// An upper bound of the prompt, for an answer whose usage never comes.
    pub max_prompt_tokens: u64,
    /// What to do with fields that would be dropped.
    pub fields: UnmappedFields,
    /// Now: stands in the answer as `created`.
    pub at: DateTime<Utc>,
}

/// What happens to fields that are hints and have no counterpart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnmappedFields {
    /// Left out, and named in a warning.
    Drop,
    /// The request is refused (`strict_params`).
    Refuse,
}

/// A request ready to be sent, and all that is known about its answer.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// What to send.
    pub request: OutgoingRequest,
    /// What was left out or changed.
    pub warnings: Warnings,
    /// Most tokens of all answers together, as the upstream was told; `None`: it was not.
    pub max_output_tokens: Option<u64>,
    /// What understands the reply.
    pub reader: AnswerReader,
}

/// A `POST`.
#[derive(Clone, Debug)]
pub struct OutgoingRequest {
    /// Where to; carries no credential.
    pub url: Url,
    /// Credentials among them are marked sensitive.
    pub headers: HeaderMap,
    /// JSON.
    pub body: Map<String, Value>,
}

/// A translated body and what belongs to it: what each provider's file gives back.
struct Translated {
    path: Url,
    body: Map<String, Value>,
    warnings: Warnings,
    max_output_tokens: Option<u64>,
    wire: reader::Wire,
}

impl Provider {
    /// Its address, unless told otherwise.
    pub fn default_base_url(&self) -> Option<&'static str> {
        match self {
            Self::OpenAi => Some("https://api.openai.com/v1"),
            Self::Anthropic => Some("https://api.anthropic.com"),
            Self::Gemini => Some("https://generativelanguage.googleapis.com"),
            Self::Azure(_) | Self::Compatible => None,
        }
    }

    /// As a config calls it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::OpenAi => "openai",
            Self::Anthropic => "anthropic",
            Self::Gemini => "gemini",
            Self::Azure(_) => "azure",
            Self::Compatible => "openai-compatible",
        }
    }

    /// Where an API key goes.
    fn key_header(&self, key: &Secret) -> (HeaderName, Secret) {
        match self {
            Self::OpenAi | Self::Compatible => {
                (header::AUTHORIZATION, Secret::new(&format!("Bearer {}", key.expose())))
            }
            Self::Anthropic => (HeaderName::from_static("x-api-key"), key.clone()),
            Self::Gemini => (HeaderName::from_static("x-goog-api-key"), key.clone()),
            Self::Azure(_) => (HeaderName::from_static("api-key"), key.clone()),
        }
    }

    /// Translates a chat request.
    pub fn chat(&self, call: &Call, request: &ChatRequest) -> Result<Outgoing, Refusal> {
        let translated = match self {
            Self::OpenAi => openai::chat(call, request),
            Self::Anthropic => anthropic::chat(call, request),
            Self::Gemini => gemini::chat(call, request),
            Self::Azure(form) => azure::chat(form, call, request),
            Self::Compatible => compatible::chat(call, request),
        }?;
        let facts = reader::Facts {
            shape: answer::Shape::Chat,
            model: request.model.clone(),
            usage_chunk: reader::UsageChunk::of(&request.delivery),
            is_streamed: request.is_streamed(),
            ..reader::Facts::of(call)
        };
        self.finish(call, translated, facts)
    }

    /// Translates a completions request; providers without that route refuse it.
    pub fn completion(&self, call: &Call, request: &CompletionRequest) -> Result<Outgoing, Refusal> {
        let translated = match self {
            Self::OpenAi => openai::completion(call, request),
            Self::Anthropic | Self::Gemini => Err(Refusal::unsupported(
                "prompt",
                format!("{} has no completions route; send the prompt as a chat message instead", self.kind()),
            )),
            Self::Azure(form) => azure::completion(form, call, request),
            Self::Compatible => compatible::completion(call, request),
        }?;
        let facts = reader::Facts {
            shape: answer::Shape::Text,
            model: request.model.clone(),
            usage_chunk: reader::UsageChunk::of(&request.delivery),
            is_streamed: request.is_streamed(),
            ..reader::Facts::of(call)
        };
        self.finish(call, translated, facts)
    }

    fn finish(&self, call: &Call, translated: Translated, facts: reader::Facts) -> Result<Outgoing, Refusal> {
        let Translated { path, body, warnings, max_output_tokens, wire } = translated;
        if call.fields == UnmappedFields::Refuse
            && let Some(field) = warnings.dropped().next()
        {
            let message = "it has no counterpart there, and this tenant's requests drop no fields; leave it out";
            return Err(Refusal::unsupported(field, message));
        }
        let facts = reader::Facts { max_output_tokens, ..facts };
        let mut headers = call.endpoint.headers();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if matches!(self, Self::Anthropic) {
            headers.insert(HeaderName::from_static("anthropic-version"), HeaderValue::from_static(anthropic::VERSION));
        }
        Ok(Outgoing {
            request: OutgoingRequest { url: path, headers, body },
            warnings,
            max_output_tokens,
            reader: AnswerReader::new(facts, wire),
        })
    }
}

#[cfg(test)]
mod tests;
