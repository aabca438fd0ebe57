//! `bindery completions SHELL`

use clap::CommandFactory as _;

use crate::{args::Cli, terminal};

pub(crate) fn run(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "bindery", &mut script);
    terminal::print(&String::from_utf8_lossy(&script))?;
    Ok(())
}
