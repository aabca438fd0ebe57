//! What the store, the keys and the ledger promise, on SQLite and, where `BINDERY_TEST_POSTGRES` names a server, on
//! PostgreSQL: nothing answered is lost, nothing is overspent, nobody revoked is let in.
#![allow(clippy::unwrap_used, reason = "tests")]

mod audit_head;
mod broken;
mod budgets;
mod close;
mod costs;
mod crash;
mod jwt;
mod keys;
mod processes;
mod support;
