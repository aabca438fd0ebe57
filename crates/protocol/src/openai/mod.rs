//! OpenAI's API as its SDKs speak it, with the fields vLLM adds to it under vLLM's names.
//!
//! Reading order: [`request`] what both generating routes take, [`completions`], [`chat`], [`logprobs`], [`usage`],
//! [`models`], [`tokenize`], [`error`].

pub mod request;

pub mod adapters;
pub mod chat;
pub mod completions;
pub mod error;
pub mod logprobs;
pub mod models;
pub mod tokenize;
pub mod usage;

pub use adapters::{AdapterChanged, AdapterEntry, AdapterList, LoadAdapterRequest, UnloadAdapterRequest};
pub use chat::{
    ChatCompletion, ChatCompletionChoice, ChatCompletionChunk, ChatCompletionChunkChoice, ChatCompletionRequest,
    ChatContent, ChatDelta, ChatMessage, ChatResponseMessage, ContentPart, Role,
};
pub use completions::{Completion, CompletionChoice, CompletionPrompt, CompletionRequest};
pub use error::{ErrorBody, ErrorResponse};
pub use logprobs::{ChatLogprobs, ChatTokenLogprob, ChatTopLogprob, CompletionLogprobs, PromptLogprob, PromptLogprobs};
pub use models::{ModelCard, ModelList};
pub use request::{
    JsonSchemaFormat, LogitBias, ResponseFormat, SamplingFields, StopReason, StreamOptions, StructuredOutputs,
};
pub use tokenize::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse};
pub use usage::{PromptTokensDetails, Usage};
