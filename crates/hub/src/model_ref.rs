//! What MODEL on the command line can be, and how an ambiguous one is read.
//!
//! - begins with `/`, `./`, `../` or `~/`: a path, and nothing else;
//! - contains a separator and exists on disk as given: a path (so `org/repo` in the working folder wins over the hub);
//! - `org/repo`, `org/repo@revision`, `org/repo:file.gguf`, `org/repo@revision:file.gguf`: the hub;
//! - ends in `.gguf`: a file;
//! - anything else is a card's name; a folder of that name is meant only when written `./name`.

use std::path::{Path, PathBuf};

use crate::HubError;

/// A parsed MODEL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelRef {
    /// The name of a card.
    Card(String),
    /// A repository on the hub.
    Hub {
        /// `org/repo`.
        repo: String,
        /// Branch, tag or commit; None: `main`.
        revision: Option<String>,
        /// One file of it; None: the whole model.
        file: Option<String>,
    },
    /// A folder with `config.json` and safetensors.
    Directory(PathBuf),
    /// A `.gguf` file.
    File(PathBuf),
}

impl ModelRef {
    /// Reads MODEL; looks at the disk for what may be a path.
    pub fn parse(model: &str) -> Result<Self, HubError> {
        let bad = |why: &str| HubError::BadReference { model: model.chars().take(200).collect(), why: why.to_owned() };
        if model.trim().is_empty() {
            return Err(bad("it is empty"));
        }
        if model.len() > 4096 || model.contains('\0') {
            return Err(bad("it is no name, repository or path"));
        }
        if let Some(rest) = model.strip_prefix("~/") {
            let home = dirs::home_dir().ok_or_else(|| bad("this user has no home folder"))?;
            return Self::of_path(home.join(rest), model);
        }
        if ["/", "./", "../"].iter().any(|prefix| model.starts_with(prefix)) || matches!(model, "." | "..") {
            return Self::of_path(PathBuf::from(model), model);
        }
        let path = Path::new(model);
        if model.contains(std::path::MAIN_SEPARATOR) && path.exists() {
            return Self::of_path(path.to_owned(), model);
        }
        if let Some(hub) = parse_hub(model) {
            return Ok(hub);
        }
        if has_gguf_suffix(path) {
            return Self::of_path(path.to_owned(), model);
        }
        if model.contains('/') || model.contains('\\') {
            return Err(bad("there is no such path, and a repository is written org/repo[@revision][:file.gguf]"));
        }
        Ok(Self::Card(model.to_owned()))
    }

    /// What the model is called when it is served: the card's name, `org/repo`, or the name of file or folder.
    pub fn served_name(&self) -> String {
        match self {
            Self::Card(name) => name.clone(),
            Self::Hub { repo, .. } => repo.clone(),
            Self::Directory(path) | Self::File(path) => {
                let absolute = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                let named =
                    if matches!(self, Self::Directory(_)) { absolute.file_name() } else { absolute.file_stem() };
                named.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
            }
        }
    }

    fn of_path(path: PathBuf, model: &str) -> Result<Self, HubError> {
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => Ok(Self::Directory(path)),
            Ok(_) if has_gguf_suffix(&path) => Ok(Self::File(path)),
            Ok(_) => Err(HubError::BadReference {
                model: model.to_owned(),
                why: "the file does not end in .gguf; a safetensors model is named by its folder".to_owned(),
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(HubError::NoSuchPath { path }),
            Err(source) => Err(HubError::Io { what: "look at", path, source }),
        }
    }
}

fn has_gguf_suffix(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// None where the text is no hub reference. `org/x.gguf` without a colon is taken for a mistyped path.
pub(crate) fn parse_hub(model: &str) -> Option<ModelRef> {
    let (head, file) = match model.split_once(':') {
        Some((head, file)) => (head, Some(file)),
        None => (model, None),
    };
    let (repo, revision) = match head.split_once('@') {
        Some((repo, revision)) => (repo, Some(revision)),
        None => (head, None),
    };
    let (owner, name) = repo.split_once('/')?;
    let is_name = |text: &str| {
        !text.is_empty()
            && text.len() <= 96
            && !text.starts_with(['.', '-'])
            && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    if !is_name(owner) || !is_name(name) || (file.is_none() && revision.is_none() && has_gguf_suffix(Path::new(name))) {
        return None;
    }
    if revision.is_some_and(|revision| !is_safe_relative(revision)) || file.is_some_and(|file| !is_safe_relative(file))
    {
        return None;
    }
    Some(ModelRef::Hub { repo: repo.to_owned(), revision: revision.map(str::to_owned), file: file.map(str::to_owned) })
}

/// A relative path of ordinary components: what a repository may call a file or a branch without leaving its folder.
pub(crate) fn is_safe_relative(path: &str) -> bool {
    !path.is_empty()
        && path.len() <= 512
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
        && !path.chars().any(|c| c.is_control() || "\\:*?\"<>|".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(repo: &str, revision: Option<&str>, file: Option<&str>) -> ModelRef {
        ModelRef::Hub { repo: repo.into(), revision: revision.map(Into::into), file: file.map(Into::into) }
    }

    #[test]
    fn names_and_repositories_are_told_apart() {
        assert_eq!(ModelRef::parse("smollm2-135m").unwrap(), ModelRef::Card("smollm2-135m".into()));
        assert_eq!(ModelRef::parse("org/repo").unwrap(), hub("org/repo", None, None));
        assert_eq!(ModelRef::parse("org/repo@v1.0").unwrap(), hub("org/repo", Some("v1.0"), None));
        assert_eq!(ModelRef::parse("org/repo:a/b.gguf").unwrap(), hub("org/repo", None, Some("a/b.gguf")));
        assert_eq!(
            ModelRef::parse("org/repo@refs/pr/1:x.gguf").unwrap(),
            hub("org/repo", Some("refs/pr/1"), Some("x.gguf"))
        );
    }

    #[test]
    fn what_exists_with_a_separator_is_a_path() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("m.gguf");
        std::fs::write(&file, "x").unwrap();
        assert_eq!(ModelRef::parse(file.to_str().unwrap()).unwrap(), ModelRef::File(file.clone()));
        let text = folder.path().to_str().unwrap();
        assert_eq!(ModelRef::parse(text).unwrap(), ModelRef::Directory(folder.path().to_owned()));
    }

    #[test]
    fn a_missing_path_is_said_to_be_missing_and_never_looked_for_on_the_hub() {
        for model in ["/no/such/model.gguf", "./no-such", "no-such.gguf", "models/no-such.gguf"] {
            assert!(matches!(ModelRef::parse(model), Err(HubError::NoSuchPath { .. })), "{model}");
        }
    }

    #[test]
    fn a_file_of_another_kind_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        std::fs::write(&file, "x").unwrap();
        let error = ModelRef::parse(file.to_str().unwrap()).unwrap_err();
        assert!(error.to_string().contains("named by its folder"), "{error}");
    }

    #[test]
    fn nothing_leaves_its_folder() {
        for model in [
            "org/repo:../../etc/passwd.gguf",
            "org/repo@../x",
            "../..:x",
            "org/..",
            "a/b/c",
            "org/repo:/x.gguf",
            "",
            " ",
        ] {
            assert!(
                !matches!(ModelRef::parse(model), Ok(ModelRef::Hub { .. } | ModelRef::Card(_) | ModelRef::File(_))),
                "{model}"
            );
        }
    }
}
