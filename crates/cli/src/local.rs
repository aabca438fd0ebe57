//! A model in this process: fetched, loaded off the async threads, with a bar for each.

use std::{path::PathBuf, sync::Arc};

use anyhow::Context as _;
use bindery_engine::{
    LocalModel,
    local_model::{CheckReport, LoadReport, LocalModelConfig},
};
use bindery_hub::{FetchOptions, LocalFiles, SharedProgress};

use crate::{
    args::LogFormat,
    settings::ModelSettings,
    terminal::{self, FetchProgress},
};

/// What of a fetch follows from the settings; the rest is the environment's.
pub(crate) fn fetch_options(settings: &ModelSettings) -> anyhow::Result<FetchOptions> {
    Ok(FetchOptions { config_suffices: settings.local.load.dummy, ..FetchOptions::from_env(settings.offline)? })
}

/// Finds or downloads the files of the model. What is told of it is told in `log_format`.
pub(crate) async fn fetch(settings: &ModelSettings, log_format: LogFormat) -> anyhow::Result<LocalFiles> {
    let options = fetch_options(settings)?;
    let progress: SharedProgress = Arc::new(FetchProgress::new(log_format));
    let files = Box::pin(bindery_hub::resolve(&settings.source, &options, &progress)).await?;
    if let Some(note) = &files.note {
        terminal::note_in(log_format, &format!("{}: {note}", files.name));
    }
    Ok(files)
}

/// Refuses what [`load`] would refuse, as far as that can be seen without reading weights.
pub(crate) async fn check(path: PathBuf, config: &LocalModelConfig) -> anyhow::Result<CheckReport> {
    let (config, shown) = (config.clone(), path.display().to_string());
    let checked = tokio::task::spawn_blocking(move || LocalModel::check(&path, &config));
    let checked = checked.await.context("the thread that checks the model failed")?;
    checked.with_context(|| format!("cannot load {shown}"))
}

/// Loads it and starts its engine.
pub(crate) async fn load(
    files: &LocalFiles,
    config: &LocalModelConfig,
    log_format: LogFormat,
) -> anyhow::Result<(Arc<LocalModel>, LoadReport)> {
    let (path, config) = (files.path.clone(), config.clone());
    let loaded = tokio::task::spawn_blocking(move || {
        let bar = terminal::byte_bar("loading weights", Some(0), log_format);
        let result = LocalModel::load(&path, &config, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        result
    })
    .await
    .context("the thread that loads the weights failed")?;
    let (model, report) = loaded.with_context(|| format!("cannot load {}", files.path.display()))?;
    Ok((Arc::new(model), report))
}
