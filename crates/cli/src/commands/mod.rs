//! One file a verb.

mod adapters;
mod audit;
mod bench;
mod chat;
mod check;
mod completions;
mod costs;
mod inspect;
mod keys;
mod models;
mod perplexity;
mod pull;
mod quantize;
mod route;
mod serve;

use std::future::Future;

use crate::args::Command;

/// Runs the verb.
pub(crate) fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(args) => block_on(serve::run(*args)),
        Command::Chat(args) => block_on(chat::run(*args)),
        Command::Bench(args) => block_on(bench::run(*args)),
        Command::Perplexity(args) => block_on(perplexity::run(*args)),
        Command::Quantize(args) => block_on(quantize::run(args)),
        Command::Pull(args) => block_on(pull::run(args)),
        Command::Models(args) => block_on(models::run(args)),
        Command::Adapters(args) => block_on(adapters::run(args)),
        Command::Keys(args) => block_on(keys::run(args)),
        Command::Costs(args) => block_on(costs::run(args)),
        Command::Route(args) => block_on(route::run(args)),
        Command::Audit(args) => block_on(audit::run(args)),
        Command::Check(args) => block_on(check::run(args)),
        Command::Completions { shell } => completions::run(shell),
    }
}

/// The runtime of a verb. What still blocks a thread when the verb is done (a name look-up, a load that was
/// interrupted) is left behind, so that the process ends at once.
fn block_on(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(work);
    runtime.shutdown_background();
    result
}
