//! One file a route, or a family of routes.

pub(crate) mod adapters;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod models;
pub(crate) mod operations;
pub(crate) mod refusals;
pub(crate) mod tokenize;
