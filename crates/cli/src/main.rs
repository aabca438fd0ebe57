//! The `bindery` binary: one file a verb under [`commands`], and what they share beside it.
//!
//! It chooses (defaults, files, environment) and talks to a person; everything that serves is in the libraries. Data
//! goes to stdout, everything else to stderr. Exit codes: 0 done or stopped cleanly, 1 failed, 2 wrong usage.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, reason = "a command-line program talks to its user on stderr")]

mod adapters;
mod args;
mod client;
mod commands;
mod config;
mod failure;
mod gateway;
mod local;
mod logging;
mod settings;
mod signals;
mod terminal;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let parsed = args::Cli::try_parse().unwrap_or_else(|error| args::refuse(&error));
    match commands::run(parsed.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}
