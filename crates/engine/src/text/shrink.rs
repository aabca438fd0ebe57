//! By how much a normaliser can shorten a text: what a lower bound of its tokens is made from before it is tokenised.
//!
//! It knows normalisers as `tokenizers` writes them to JSON, no vocabulary. Invariant: of any text at least
//! [`Shrink::kept_bytes`] are left after normalisation; a normaliser of which that cannot be said has no `Shrink`.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::{
    original::from_base64,
    sentence_piece::{EDGE_SPACES, SPACE_RUNS, walk_charsmap},
};

/// A character map replaces a grapheme of less than six bytes whole, or a character alone.
const MAX_MAPPED_BYTES: usize = 5;

/// What a normaliser leaves at least.
#[derive(Debug, PartialEq)]
pub(super) struct Shrink {
    /// At most this many bytes of a text become one.
    factor: usize,
    /// Characters of which nothing may be left, with the bytes that may go with each, its own among them.
    swallowed: HashMap<char, usize>,
}

impl Shrink {
    /// No normaliser.
    pub(super) fn none() -> Self {
        Self { factor: 1, swallowed: HashMap::new() }
    }

    /// `None` where no such bound is known.
    pub(super) fn of(normalizer: &Value) -> Option<Self> {
        let mut stages = Vec::new();
        flatten(normalizer, &mut stages)?;
        let drops_spaces = stages.iter().any(|stage| is_space_dropper(stage));
        let mut shrink = Self::none();
        for (index, stage) in stages.iter().enumerate() {
            let is_early =
                stages[..index].iter().all(|stage| stage["type"] == "Precompiled" || is_space_dropper(stage));
            let factor = match stage["type"].as_str()? {
                // What is swallowed is known of characters as they are sent: another stage in front may make new ones.
                "Precompiled" if index == 0 => {
                    let swallowed = swallowed_by_map(stage["precompiled_charsmap"].as_str()?, drops_spaces)?;
                    shrink.swallowed.extend(swallowed.into_iter().map(|first| (first, MAX_MAPPED_BYTES)));
                    MAX_MAPPED_BYTES
                }
                "Replace" if is_early && is_space_dropper(stage) => {
                    shrink.swallowed.entry(' ').or_insert(1);
                    1
                }
                "Replace" => {
                    let pattern = stage["pattern"]["String"].as_str()?;
                    (stage["content"].as_str()?.len() >= pattern.len()).then_some(1)?
                }
                "Prepend" | "NFD" => 1,
                // The Kelvin sign (three bytes) composes to K; three Hangul letters (nine bytes) to one syllable of three.
                "NFC" => 3,
                _ => return None,
            };
            shrink.factor = shrink.factor.saturating_mul(factor);
        }
        Some(shrink)
    }

    /// Bytes of a text that are left at least.
    pub(super) fn kept_bytes(&self, text: &str) -> usize {
        // Most normalisers swallow nothing, and then the text need not be looked at.
        let num_swallowed: usize = if self.swallowed.is_empty() {
            0
        } else {
            text.chars().filter_map(|character| self.swallowed.get(&character)).sum()
        };
        text.len().saturating_sub(num_swallowed).div_ceil(self.factor)
    }
}

fn flatten<'a>(normalizer: &'a Value, stages: &mut Vec<&'a Value>) -> Option<()> {
    if normalizer["type"].as_str()? != "Sequence" {
        stages.push(normalizer);
        return Some(());
    }
    normalizer["normalizers"].as_array()?.iter().try_for_each(|stage| flatten(stage, stages))
}

/// Whether a stage is one of those that SentencePiece's `remove_extra_whitespaces` becomes.
fn is_space_dropper(stage: &Value) -> bool {
    stage["pattern"]["Regex"].as_str().is_some_and(|pattern| [EDGE_SPACES, SPACE_RUNS].contains(&pattern))
}

/// First characters of what a map replaces by nothing, or by spaces where those are dropped. `None` for a map that cuts
/// characters apart.
fn swallowed_by_map(map: &str, drops_spaces: bool) -> Option<HashSet<char>> {
    let map = from_base64(map.as_bytes())?;
    let (mut swallowed, mut is_known) = (HashSet::new(), true);
    let walked = walk_charsmap(&map, |key, replacement| {
        let is_nothing = match replacement.first() {
            None | Some(0) => true,
            // Where a text has that many spaces, its end is not worth looking for.
            Some(b' ') => {
                drops_spaces && replacement.iter().take(64).take_while(|&&byte| byte != 0).all(|&byte| byte == b' ')
            }
            Some(_) => false,
        };
        if is_nothing {
            let valid = key.utf8_chunks().next().and_then(|chunk| chunk.valid().chars().next());
            match valid {
                Some(first) => _ = swallowed.insert(first),
                None => is_known = false,
            }
        }
    });
    walked.ok().filter(|()| is_known).map(|()| swallowed)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn replace(pattern: &Value, content: &str) -> Value {
        json!({"type": "Replace", "pattern": pattern, "content": content})
    }

    #[test]
    fn stages_multiply_and_unknown_ones_have_no_bound() {
        let kept = |normalizer: Value, text: &str| Shrink::of(&normalizer).map(|shrink| shrink.kept_bytes(text));
        assert_eq!(kept(json!({"type": "NFC"}), "abcdefg"), Some(3));
        assert_eq!(kept(json!({"type": "Lowercase"}), "abc"), None);
        assert_eq!(kept(replace(&json!({"String": " "}), "▁"), "a b"), Some(3));
        assert_eq!(kept(replace(&json!({"String": "ab"}), "a"), "a b"), None);
        assert_eq!(kept(replace(&json!({"Regex": "a+"}), "a"), "aaa"), None);
        let spaces = replace(&json!({"Regex": SPACE_RUNS}), " ");
        assert_eq!(kept(spaces.clone(), "aaaaaaaaaa  b"), Some(11));
        let sequence = |stages: Value| json!({"type": "Sequence", "normalizers": stages});
        assert_eq!(kept(sequence(json!([{"type": "NFC"}, {"type": "NFC"}])), "abcdefghij"), Some(2));
        // Composition may make a space.
        assert_eq!(kept(sequence(json!([{"type": "NFC"}, spaces])), "abc"), None);
        assert_eq!(kept(json!({"type": "Precompiled", "precompiled_charsmap": "*"}), "abc"), None);
    }
}
