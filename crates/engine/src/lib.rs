//! The loop that joins scheduler and model: plan, forward, sample, emit; and text on both sides of it.
//!
//! One thread owns the model. Everything else talks to it through channels. This crate must not know HTTP, tenants or prices.
//!
//! Reading order: [`step`](crate::Engine) the loop's one screen (`src/step.rs`), [`engine`] the way in, [`request`] what
//! goes in and comes out, [`sample`] a row of logits to a token, [`grammar`]
//! which tokens a form allows, [`adapters`] whose weights stand beside the base's, [`text`] tokenizer, detokenizer and templates,
//! [`local_model`] all of it joined for a server, `load` how it comes into being, [`inspect`] what it would take,
//! [`perplexity`] how good a model is, [`quantize`] a model made smaller ahead.

#![forbid(unsafe_code)]

mod step;

pub mod adapters;
pub mod engine;
pub mod error;
pub mod grammar;
pub mod inspect;
mod load;
pub mod local_model;
pub mod perplexity;
pub mod quantize;
pub mod request;
pub mod sample;
#[doc(hidden)]
pub mod testing;
pub mod text;

pub use adapters::{AdapterError, AdapterIdentity, AdapterLease, AdapterPool, AdapterPoolConfig, ReadAdapter};
pub use bindery_scheduler::{Share, TenantId, TokenId};
pub use engine::{Engine, EngineConfig, EngineHandle, EngineStats, StepCost, TokenStream};
pub use error::EngineError;
pub use grammar::Grammar;
pub use local_model::{
    LoadReport, LocalModel, LocalModelConfig, PreparedRequest, Prompt, RequestTimings, StopReason, TextEvent,
    TextRequest, TextStream, TokenText, TopToken,
};
pub use request::{FinishReason, SamplingParams, TokenEvent, TokenLogprobs, TokenRequest};
pub use text::{
    chat::{ChatTemplate, RenderRequest},
    detokenize::Detokenizer,
    tokenizer::Tokenizer,
};
