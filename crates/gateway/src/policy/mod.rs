//! Where a request runs: a pure decision over facts.
//!
//! [`target`] is a place that answers, [`rules`] an operator's conditions, and
//! [`route`] joins them into the places to try, in order, with the reasons in words. It sends nothing, asks no clock and
//! draws no random number: whoever calls it brings the facts, so `route explain` decides exactly as the server does.
//!
//! **Invariant**: a request of a `local-only` class gets no upstream target, whatever rules, weights and fallbacks say.

pub mod route;
pub mod rules;
pub mod target;
#[cfg(test)]
mod tests;

pub use crate::upstream::PrivacyClass;

pub use self::{
    route::{CannotTake, Facts, LocalState, Moment, Refused, Route, Router, Shortage, TenantRouting},
    rules::{Choice, Condition, Rule, TimeOfDay, VirtualModel},
    target::Target,
};
