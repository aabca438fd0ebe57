//! The server over a real socket, in front of the engine with its fake model: what clients see, and what is left of a
//! request when it is over.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

mod access;
mod adapters;
mod answers;
mod disconnects;
mod fair;
mod gateway;
mod hostile;
mod lifecycle;
mod log;
mod operations;
mod outside;
