//! `bindery pull MODEL`: the path alone goes to stdout, so that scripts can use it.

use std::sync::Arc;

use bindery_hub::{FetchOptions, SharedProgress};

use crate::{
    args::PullArgs,
    failure::Interrupted,
    signals::StopSignals,
    terminal::{self, FetchProgress},
};

pub(crate) async fn run(args: PullArgs) -> anyhow::Result<()> {
    let mut signals = StopSignals::listen()?;
    let options = FetchOptions { refresh: true, ..FetchOptions::from_env(args.offline)? };
    let progress: SharedProgress = Arc::new(FetchProgress::default());
    let files = signals
        .unless_stopped(Box::pin(bindery_hub::resolve(&args.model, &options, &progress)))
        .await
        .ok_or(Interrupted)??;
    if let Some(note) = &files.note {
        terminal::note(&format!("{}: {note}", files.name));
    }
    let path = std::path::absolute(&files.path)?;
    terminal::print(&format!("{}\n", path.display()))?;
    Ok(())
}
