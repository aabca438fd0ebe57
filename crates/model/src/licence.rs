//! Under which licence whoever published weights has put them, as far as their files say.
//!
//! Two places are in use: the YAML head of a folder's README.md (the hub's model cards) and `general.license` of a GGUF file. It is
//! shown and logged, never checked; what cannot be read says nothing.

use std::{fs::File, io::Read as _, path::Path};

use crate::weights::{
    gguf::GgufFile,
    mmap::{Within, check_within},
};

/// Heads of cards are short; what follows is prose.
const MAX_HEAD_BYTES: u64 = 64 << 10;
const MAX_LICENCE_CHARS: usize = 100;

/// Of a folder, or of a GGUF file. None: nothing is said.
pub fn declared_licence(path: &Path) -> Option<String> {
    if path.is_dir() { of_folder(path, None) } else { of_gguf(&GgufFile::open(path).ok()?) }
}

pub(crate) fn of_folder(path: &Path, within: Within<'_>) -> Option<String> {
    let (mut head, path) = (Vec::new(), path.join("README.md"));
    let file = File::open(&path).ok()?;
    check_within(&file, &path, within).ok()?;
    file.take(MAX_HEAD_BYTES).read_to_end(&mut head).ok()?;
    shown(&of_card(&String::from_utf8_lossy(&head))?)
}

pub(crate) fn of_gguf(file: &GgufFile) -> Option<String> {
    shown(file.str("general.license")?)
}

fn shown(licence: &str) -> Option<String> {
    let licence: String =
        licence.trim().chars().filter(|letter| !letter.is_control()).take(MAX_LICENCE_CHARS).collect();
    (!licence.is_empty()).then_some(licence)
}

/// `license:` of the YAML between the first two lines of dashes; where that says `other`, `license_name:`.
fn of_card(text: &str) -> Option<String> {
    let mut lines = text.lines();
    if lines.next()?.trim_end() != "---" {
        return None;
    }
    let head: Vec<&str> = lines.take_while(|line| line.trim_end() != "---").collect();
    let value = |key: &str| {
        let value = head.iter().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?.trim();
        let value = value.trim_matches(['"', '\'']);
        (!value.is_empty()).then(|| value.to_owned())
    };
    let licence = value("license")?;
    if licence == "other" { value("license_name").or(Some(licence)) } else { Some(licence) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_head_of_a_card_says_it() {
        for (card, expected) in [
            ("---\nlibrary_name: peft\nlicense: apache-2.0\n---\n# x\n", Some("apache-2.0")),
            ("---\r\nlicense: \"mit\"\r\n---\r\n", Some("mit")),
            ("---\nlicense: other\nlicense_name: llama3\n---\n", Some("llama3")),
            ("---\nlicense: other\n---\n", Some("other")),
            ("---\ntags:\n  license: nested\n---\n", None),
            ("---\ntags: x\n---\nlicense: in the prose\n", None),
            ("# no head\nlicense: mit\n", None),
            ("", None),
        ] {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("README.md"), card).unwrap();
            assert_eq!(declared_licence(folder.path()).as_deref(), expected, "{card:?}");
        }
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(declared_licence(folder.path()), None, "no card");
        assert_eq!(declared_licence(&folder.path().join("x.gguf")), None, "no file");
    }
}
