//! A model folder without tokenizer.json: the original's own vocabulary file, with what `tokenizer_config.json` adds to it.
//!
//! Two kinds are read: SentencePiece's `tokenizer.model` (LLaMA 1 and 2, Mistral, Gemma, Phi-3) and tiktoken's lists of
//! byte strings in base64 with their ranks (LLaMA 3's `original/tokenizer.model`, `*.tiktoken`). Both become a
//! [`GgufVocabulary`], which builds the tokenizer; this file must not know how. Others are refused with the way to convert.
//!
//! Invariant: a vocabulary from here has the ids that the model was trained with; added tokens stand at the ids that the
//! configuration gives them, or are refused.

use std::path::{Path, PathBuf};

use rustc_hash::FxHashMap;
use serde_json::Value;

use super::{
    decoder::char_of_byte,
    gguf_vocabulary::{GgufVocabulary, MAX_MERGES, MAX_TOKENS},
    sentence_piece_file,
    tokenizer::{read_bounded, read_json},
};
use crate::EngineError;

/// Largest vocabulary file; published ones stay below 20 MB.
const MAX_FILE_BYTES: u64 = 128 << 20;
/// Longest byte string in a tiktoken list whose splits are tried; published ones stay below 130 bytes.
const MAX_RANKED_BYTES: usize = 512;
const NORMAL: i64 = 1;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;

/// The vocabulary of a folder's original file and that file's path; `None`: there is no such file.
pub(crate) fn read(folder: &Path, config: &Value) -> Result<Option<(GgufVocabulary, PathBuf)>, EngineError> {
    for path in candidates(folder) {
        let Some(bytes) = read_bounded(&path, MAX_FILE_BYTES)? else { continue };
        let unusable = |what: String| EngineError::Text(format!("{} is unusable: {what}", path.display()));
        // A tiktoken list begins with a line of base64, a protocol buffer with a byte below the space.
        let vocabulary = if bytes.first().is_some_and(u8::is_ascii_graphic) {
            read_tiktoken(&bytes, config)
        } else {
            sentence_piece_file::read(&bytes)
        };
        let mut vocabulary = vocabulary.map_err(unusable)?;
        if is_phi3_small(config) {
            for (id, text) in phi3_small_tokens() {
                place(&mut vocabulary, id, &text, CONTROL).map_err(unusable)?;
            }
        }
        vocabulary.legacy = config["legacy"].as_bool();
        add_tokens(folder, config, &mut vocabulary, &unusable)?;
        vocabulary.add_bos = config["add_bos_token"].as_bool().or_else(|| adds_bos_unasked(config));
        vocabulary.add_eos = config["add_eos_token"].as_bool();
        return Ok(Some((vocabulary, path)));
    }
    Ok(None)
}

/// What to do about a folder that has none of the files that are read.
pub(crate) fn advice(folder: &Path) -> &'static str {
    let has = |name: &str| folder.join(name).exists();
    if has("tekken.json") {
        "it holds tekken.json, which is not read: take the tokenizer.json of the same model's transformers folder"
    } else if has("vocab.json") || has("merges.txt") {
        "it holds vocab.json and merges.txt, which do not say how text is cut: save the fast tokenizer with transformers \
         (AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
    } else {
        "save the model's fast tokenizer there (transformers: save_pretrained)"
    }
}

fn candidates(folder: &Path) -> Vec<PathBuf> {
    let mut paths = vec![folder.join("tokenizer.model")];
    let listed = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut ranked: Vec<PathBuf> =
        listed.filter(|path| path.extension().is_some_and(|extension| extension == "tiktoken")).take(8).collect();
    ranked.sort();
    paths.append(&mut ranked);
    paths
}

/// Classes of transformers that put the first token before a text unless told otherwise, and LLaMA 3.
fn adds_bos_unasked(config: &Value) -> Option<bool> {
    let bos = &config["bos_token"];
    if bos.as_str().or(bos["content"].as_str()) == Some("<|begin_of_text|>") {
        return Some(true);
    }
    let class = config["tokenizer_class"].as_str()?;
    let family = class.trim_end_matches("Fast").trim_end_matches("Tokenizer");
    ["Llama", "CodeLlama", "Gemma"].contains(&family).then_some(true)
}

/// Whose special tokens are in the code that is published with it, and nowhere in its files.
fn is_phi3_small(config: &Value) -> bool {
    config["tokenizer_class"].as_str() == Some("Phi3SmallTokenizer")
}

/// The special tokens of Phi-3-small beside `cl100k_base`'s ranks; `tokenization_phi3_small.py`, as published.
fn phi3_small_tokens() -> impl Iterator<Item = (u64, String)> {
    const NAMED: [(u64, &str); 12] = [
        (100_256, "<|dummy_id_2|>"),
        (100_257, "<|endoftext|>"),
        (100_258, "<|fim_prefix|>"),
        (100_259, "<|fim_middle|>"),
        (100_260, "<|fim_suffix|>"),
        (100_261, "<|system|>"),
        (100_262, "<|user|>"),
        (100_263, "<|assistant|>"),
        (100_264, "<|dummy_id_0|>"),
        (100_265, "<|dummy_id_1|>"),
        (100_266, "<|end|>"),
        (100_276, "<|endofprompt|>"),
    ];
    let named = NAMED.into_iter().map(|(id, text)| (id, text.to_owned()));
    let dummies = (3..=11).map(|number| (100_264 + number, number));
    let padding = (12..=86).map(|number| (100_265 + number, number));
    named.chain(dummies.chain(padding).map(|(id, number)| (id, format!("<|dummy_id_{number}|>"))))
}

/// Puts `added_tokens.json` (text to id) and `added_tokens_decoder` (id to token, with flags) into the vocabulary.
fn add_tokens(
    folder: &Path,
    config: &Value,
    vocabulary: &mut GgufVocabulary,
    unusable: &impl Fn(String) -> EngineError,
) -> Result<(), EngineError> {
    let plain = read_json(&folder.join("added_tokens.json"))?.unwrap_or_default();
    for (text, id) in plain.as_object().into_iter().flatten() {
        if let Some(id) = id.as_u64() {
            place(vocabulary, id, text, USER_DEFINED).map_err(unusable)?;
        }
    }
    for (id, token) in config["added_tokens_decoder"].as_object().into_iter().flatten() {
        let (Ok(id), Some(text)) = (id.parse::<u64>(), token["content"].as_str()) else { continue };
        let kind = if token["special"] == Value::Bool(true) { CONTROL } else { USER_DEFINED };
        let is_unknown = vocabulary.unknown == Some(id);
        // Spaces are looked for in the text itself, before they are made visible.
        let text = if kind == USER_DEFINED { text.replace('\u{2581}', " ") } else { text.to_owned() };
        if !is_unknown {
            place(vocabulary, id, &text, kind).map_err(unusable)?;
        }
        if token["rstrip"] == Value::Bool(true) {
            vocabulary.strips_after.insert(id as u32);
        }
    }
    Ok(())
}

/// Names one id, and pads the vocabulary up to it with holes.
fn place(vocabulary: &mut GgufVocabulary, id: u64, text: &str, kind: i64) -> Result<(), String> {
    let Some(index) = usize::try_from(id).ok().filter(|&index| index < MAX_TOKENS) else {
        return Err(format!("the added token {text:?} has the id {id}, allowed are fewer than {MAX_TOKENS}"));
    };
    let length = vocabulary.tokens.len().max(index + 1);
    vocabulary.tokens.resize(length, String::new());
    vocabulary.types.resize(length, UNUSED);
    vocabulary.scores.resize(length, 0.0);
    text.clone_into(&mut vocabulary.tokens[index]);
    vocabulary.types[index] = kind;
    Ok(())
}

/// Lines of "base64 rank". A string of bytes is made by merging two others whose ranks are known; as in transformers'
/// converter all such pairs are merges, in the order of what they make and then of their parts. A piece that is a token is
/// taken whole.
fn read_tiktoken(bytes: &[u8], config: &Value) -> Result<GgufVocabulary, String> {
    let mut strings: Vec<Vec<u8>> = Vec::new();
    let mut ids: FxHashMap<Vec<u8>, u32> = FxHashMap::default();
    for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let broken = || format!("line {} is no \"base64 rank\" pair", index + 1);
        let at = line.iter().position(|&byte| byte == b' ').ok_or_else(broken)?;
        let string = from_base64(&line[..at]).ok_or_else(broken)?;
        let rank = std::str::from_utf8(&line[at + 1..]).ok().and_then(|rank| rank.trim().parse::<usize>().ok());
        if rank != Some(strings.len()) {
            return Err(format!("line {} has not the rank {}: ranks count upwards from 0", index + 1, strings.len()));
        }
        if string.is_empty() || string.len() > MAX_RANKED_BYTES || strings.len() == MAX_TOKENS {
            return Err(format!("line {} is empty, longer than {MAX_RANKED_BYTES} bytes or too far down", index + 1));
        }
        if ids.insert(string.clone(), strings.len() as u32).is_some() {
            return Err(format!("line {} repeats an earlier one", index + 1));
        }
        strings.push(string);
    }
    let spelled: Vec<String> =
        strings.iter().map(|string| string.iter().map(|&byte| char_of_byte(byte)).collect()).collect();
    let mut merges = Vec::new();
    for string in &strings {
        let cuts = (1..string.len()).filter_map(|cut| Some((*ids.get(&string[..cut])?, *ids.get(&string[cut..])?)));
        let mut pairs: Vec<(u32, u32)> = cuts.collect();
        pairs.sort_unstable();
        for (left, right) in pairs {
            merges.push(format!("{} {}", spelled[left as usize], spelled[right as usize]));
        }
        if merges.len() > MAX_MERGES {
            return Err(format!("its strings can be made in more than {MAX_MERGES} ways"));
        }
    }
    if !config["added_tokens_decoder"].is_object() && !is_phi3_small(config) {
        return Err("it lists no special tokens, and tokenizer_config.json has no added_tokens_decoder: save the \
                    model's fast tokenizer there (transformers: save_pretrained)"
            .to_owned());
    }
    Ok(GgufVocabulary {
        model: "gpt2".to_owned(),
        // tiktoken's cl100k_base and LLaMA 3 cut alike.
        pre: Some("llama3".to_owned()),
        types: vec![NORMAL; spelled.len()],
        tokens: spelled,
        merges,
        ..GgufVocabulary::default()
    })
}

/// Standard base64 with padding.
pub(super) fn from_base64(text: &[u8]) -> Option<Vec<u8>> {
    let value = |byte: u8| {
        Some(match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        })
    };
    let digits = text.strip_suffix(b"==").or_else(|| text.strip_suffix(b"=")).unwrap_or(text);
    if !text.len().is_multiple_of(4) || digits.len() % 4 == 1 {
        return None;
    }
    let mut bytes = Vec::with_capacity(digits.len() * 3 / 4);
    for group in digits.chunks(4) {
        let mut bits = 0_u32;
        for &digit in group {
            bits = bits << 6 | u32::from(value(digit)?);
        }
        bits <<= 6 * (4 - group.len());
        bytes.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read_as_the_standard_says() {
        // The test vectors of RFC 4648.
        for (text, bytes) in
            [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYg==", "foob"), ("Zm9vYmFy", "foobar")]
        {
            assert_eq!(from_base64(text.as_bytes()).unwrap(), bytes.as_bytes());
        }
        for text in ["Z", "Zg", "Zg=", "Z===", "Zm9v\n", "Z*==", "="] {
            assert_eq!(from_base64(text.as_bytes()), None, "{text}");
        }
    }
}
