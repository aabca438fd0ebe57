//! A model in this process: fetched, loaded off the async threads, with a bar for each.

use std::sync::Arc;

use anyhow::Context as _;
use bindery_engine::{
    LocalModel,
    local_model::{LoadReport, LocalModelConfig},
};
use bindery_hub::{FetchOptions, LocalFiles, SharedProgress};

use crate::{
    settings::ModelSettings,
    terminal::{self, FetchProgress},
};

/// Finds or downloads the files of the model.
pub(crate) async fn fetch(settings: &ModelSettings) -> anyhow::Result<LocalFiles> {
    let options = FetchOptions::from_env(settings.offline)?;
    let progress: SharedProgress = Arc::new(FetchProgress::default());
    let files = Box::pin(bindery_hub::resolve(&settings.source, &options, &progress)).await?;
    if let Some(note) = &files.note {
        terminal::note(&format!("{}: {note}", files.name));
    }
    Ok(files)
}

/// Loads it and starts its engine.
pub(crate) async fn load(
    files: &LocalFiles,
    config: &LocalModelConfig,
) -> anyhow::Result<(Arc<LocalModel>, LoadReport)> {
    let (path, config) = (files.path.clone(), config.clone());
    let loaded = tokio::task::spawn_blocking(move || {
        let bar = terminal::byte_bar("loading weights", Some(0));
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
