//! Who may ask, where it runs, what it costs.
//!
//! Everything between a request that was understood and the place that answers it: keys and tenants, privacy, rules,
//! upstream providers, budgets and the ledger. Knows no tensors, no block tables and no HTTP server; the server asks it
//! questions and hands it bytes.
//!
//! **Invariant**: no byte of a request leaves this process but through [`upstream::Door`], which
//! takes what only the request's privacy class can make.
#![forbid(unsafe_code)]

pub mod audit;
pub mod clock;
pub mod config;
pub mod failure;
pub mod families;
pub mod gateway;
pub mod guardrails;
pub mod keys;
pub mod ledger;
pub mod limits;
pub mod money;
pub mod names;
pub mod policy;
pub mod providers;
pub mod store;
pub mod upstream;
