//! The HTTP face: routes, streams, errors, metrics.
//!
//! Thin: it turns a body into a typed request, a request into the engine's words, and the engine's events into JSON or
//! server-sent events. It never sees a tensor, a block table or a step, and it knows one model and its adapters
//! (upstreams come with the gateway).
//!
//! Invariants: every failure leaves as OpenAI's error object, made in [`error`] alone; whatever holds a generation is
//! owned by the response (or by the handler that waits for it), so a client that goes away drops it and its blocks are
//! free; [`run`] returns within the shutdown timeout and a fixed bound, whatever clients do.
//!
//! Reading order: [`config`] what can be set and what is bounded, [`serve`] the life of the server and its connections,
//! [`router`] the routes and what stands before them, [`context`] what every request carries, [`adapters`] which names a caller may use,
//! [`body`] bytes to typed requests, [`routes`], [`generation`] the engine's events for one request, [`sse`], [`metrics`].
#![forbid(unsafe_code)]

mod config;
mod error;
mod exchange;
mod judge;
mod lifecycle;
mod slot;

mod serve;

mod adapters;
mod auth;
mod context;
mod router;
mod state;

mod body;
mod generation;
mod logprobs;
mod openapi;
mod routes;
mod sampling;
mod sse;
mod structured;

mod metrics;

pub use config::{Limits, ServerConfig, Tenant};
pub use openapi::openapi_json;
pub use serve::{run, run_with_limits};
pub use slot::ModelSlot;
