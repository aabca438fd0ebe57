//! How byte-level BPE vocabularies in GGUF files cut text before merging, by the name in `tokenizer.ggml.pre`.
//!
//! A GGUF file carries a name, not a rule. This table maps each name to the normalizer, splits and merge rule of the
//! `tokenizer.json` that the model family published, as llama.cpp's converter assigns the names. A name is listed only
//! when the whole rule is known; any other is refused by name, since a wrong cut silently degrades every answer.
//!
//! Invariant: every rule here builds (tested), and its last stage maps bytes to the byte-level alphabet.

use tokenizers::{
    NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior,
    normalizers::unicode::NFC,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        punctuation::Punctuation,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use crate::EngineError;

/// One way to cut text, as a published `tokenizer.json` states it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Each match of the expression is a piece, and so is what lies between matches.
    Split(&'static str),
    /// Each digit alone.
    EachDigit,
    /// Runs of digits apart from the rest.
    DigitRuns,
    /// Runs of punctuation apart from the rest.
    PunctuationRuns,
    /// GPT-2's expression, then the byte-level alphabet.
    Gpt2,
    /// The byte-level alphabet alone.
    Bytes,
}

/// Everything a name in `tokenizer.ggml.pre` stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreTokenizerRule {
    names: &'static [&'static str],
    stages: &'static [Stage],
    /// The published tokenizer composes characters (Unicode NFC) first.
    nfc: bool,
    /// A piece that is a token as a whole is taken as it is, whatever the merges say.
    pub ignore_merges: bool,
    /// A beginning-of-sequence token goes first unless the file says otherwise.
    pub add_bos: bool,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

const fn rule(names: &'static [&'static str], stages: &'static [Stage]) -> PreTokenizerRule {
    PreTokenizerRule { names, stages, nfc: false, ignore_merges: false, add_bos: false }
}

const RULES: &[PreTokenizerRule] = &[
    rule(&["default", "gpt-2", "phi-2"], &[Stage::Gpt2]),
    PreTokenizerRule { nfc: true, ..rule(&["mpt", "olmo"], &[Stage::Gpt2]) },
    rule(&["smollm", "starcoder", "refact"], &[Stage::EachDigit, Stage::Gpt2]),
    PreTokenizerRule { nfc: true, ..rule(&["command-r"], &[Stage::EachDigit, Stage::Gpt2]) },
    PreTokenizerRule {
        ignore_merges: true,
        add_bos: true,
        ..rule(
            &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2", "midm-2.0", "pixtral"],
            &[Stage::Split(LLAMA3), Stage::Bytes],
        )
    },
    rule(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[Stage::Split(LLAMA3), Stage::Bytes]),
    PreTokenizerRule { ignore_merges: true, ..rule(&["glm4"], &[Stage::Split(LLAMA3), Stage::Bytes]) },
    PreTokenizerRule { nfc: true, ..rule(&["qwen2"], &[Stage::Split(QWEN2), Stage::Bytes]) },
    rule(&["deepseek-r1-qwen"], &[Stage::Split(QWEN2), Stage::Bytes]),
    PreTokenizerRule { nfc: true, ..rule(&["qwen35"], &[Stage::Split(QWEN35), Stage::Bytes]) },
    PreTokenizerRule { ignore_merges: true, add_bos: true, ..rule(&["tekken"], &[Stage::Split(TEKKEN), Stage::Bytes]) },
    rule(&["gpt-4o", "llama4"], &[Stage::Split(GPT4O), Stage::Bytes]),
    rule(
        &["deepseek-v3"],
        &[Stage::Split(r"\p{N}{1,3}"), Stage::Split("[一-龥぀-ゟ゠-ヿ]+"), Stage::Split(DEEPSEEK3), Stage::Bytes],
    ),
    rule(
        &["deepseek-coder"],
        &[
            Stage::Split(r"[\r\n]"),
            Stage::Split(r"\s?\p{L}+"),
            Stage::Split(r"\s?\p{P}+"),
            Stage::Split("[一-龥ࠀ-一가-퟿]+"),
            Stage::EachDigit,
            Stage::Bytes,
        ],
    ),
    rule(&["falcon"], &[Stage::PunctuationRuns, Stage::Gpt2, Stage::DigitRuns, Stage::Split("[0-9][0-9][0-9]")]),
];

impl PreTokenizerRule {
    /// The rule of that name, or an error that lists the known ones. A file without a name has GPT-2's.
    pub fn by_name(name: Option<&str>) -> Result<&'static Self, EngineError> {
        let name = name.unwrap_or("default");
        RULES.iter().find(|rule| rule.names.contains(&name)).ok_or_else(|| {
            EngineError::Text(format!(
                "the GGUF file's pre-tokenizer (tokenizer.ggml.pre) is {name:?}, which is not known here; known are {}: \
                 use the model's folder with tokenizer.json instead",
                known_names().join(", ")
            ))
        })
    }

    /// What happens to the text before it is cut.
    pub(crate) fn normalizer(&self) -> Option<NormalizerWrapper> {
        self.nfc.then(|| NFC.into())
    }

    /// The cuts, as `tokenizers` runs them.
    pub(crate) fn pre_tokenizer(&self) -> Result<PreTokenizerWrapper, EngineError> {
        let mut stages = self.stages.iter().map(Stage::build).collect::<Result<Vec<_>, _>>()?;
        Ok(match (stages.len(), stages.pop()) {
            (1, Some(only)) => only,
            (_, Some(last)) => {
                stages.push(last);
                Sequence::new(stages).into()
            }
            (_, None) => Sequence::new(stages).into(),
        })
    }
}

impl Stage {
    fn build(&self) -> Result<PreTokenizerWrapper, EngineError> {
        Ok(match self {
            Self::Split(expression) => {
                let pattern = SplitPattern::Regex((*expression).to_owned());
                Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                    .map_err(|error| {
                        EngineError::Text(format!("the expression {expression:?} does not compile: {error}"))
                    })?
                    .into()
            }
            Self::EachDigit => Digits::new(true).into(),
            Self::DigitRuns => Digits::new(false).into(),
            Self::PunctuationRuns => Punctuation::new(SplitDelimiterBehavior::Contiguous).into(),
            Self::Gpt2 => ByteLevel::new(false, true, true).into(),
            Self::Bytes => ByteLevel::new(false, true, false).into(),
        })
    }
}

/// Every name this build can do, sorted.
pub fn known_names() -> Vec<&'static str> {
    let mut names: Vec<_> = RULES.iter().flat_map(|rule| rule.names).copied().collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_listed_once_and_every_rule_builds() {
        let names = known_names();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "a name stands for two rules: {names:?}");
        for name in names {
            let rule = PreTokenizerRule::by_name(Some(name)).unwrap();
            rule.pre_tokenizer().unwrap();
            assert!(
                rule.stages.iter().any(|stage| matches!(stage, Stage::Gpt2 | Stage::Bytes)),
                "{name} maps no bytes"
            );
        }
    }

    #[test]
    fn an_unknown_name_is_refused_by_name() {
        let message = PreTokenizerRule::by_name(Some("afmoe")).unwrap_err().to_string();
        assert!(message.contains("\"afmoe\"") && message.contains("smollm"), "{message}");
    }
}
