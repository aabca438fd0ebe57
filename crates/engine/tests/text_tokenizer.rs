//! Tokenizers against their originals, and everything a broken or hostile vocabulary can be.
//!
//! The files in `text/` and the script that makes them (`tests/text/make_tokenizer_goldens.py` at the top) say what the
//! originals are: the Python `tokenizers` package, `sentencepiece`'s C++ code, and a naive encoder for the default model.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
};

use bindery_engine::{
    Detokenizer, EngineError, Tokenizer,
    text::{gguf_vocabulary::GgufVocabulary, tokenizer::MAX_TEXT_BYTES},
};
use bindery_model::weights::gguf::GgufFile;
use bindery_scheduler::TokenId;
use proptest::prelude::*;
use serde::Deserialize;

/// One family's manner of tokenizer.json.
#[derive(Deserialize)]
struct FileCase {
    file: serde_json::Value,
    /// "hi" with the special tokens that the file itself adds.
    with_special: Vec<u32>,
    cases: Vec<Case>,
}

#[derive(Clone, Deserialize)]
struct Case {
    text: Option<String>,
    ids: Vec<u32>,
    /// Absent: the text itself.
    decoded: Option<String>,
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/text").join(name)
}

fn goldens<T: serde::de::DeserializeOwned>(name: &str) -> T {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

fn vocabulary(name: &str) -> GgufVocabulary {
    GgufVocabulary::from_file(&GgufFile::open(&fixture(name)).unwrap()).unwrap()
}

fn byte_level(pre: &str) -> Tokenizer {
    Tokenizer::from_vocabulary(&GgufVocabulary { pre: Some(pre.into()), ..vocabulary("byte-level.gguf") }).unwrap()
}

fn sentence_piece(name: &str) -> Tokenizer {
    Tokenizer::from_gguf(&GgufFile::open(&fixture(name)).unwrap()).unwrap()
}

fn tokens(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}

fn ids(tokens: &[TokenId]) -> Vec<u32> {
    tokens.iter().map(|token| token.0).collect()
}

fn streamed(tokenizer: &Arc<Tokenizer>, prompt: &[TokenId], tokens: &[TokenId], skip: bool) -> String {
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), prompt, skip);
    let mut text: String = tokens.iter().map(|&token| detokenizer.push(token)).collect();
    text.push_str(&detokenizer.finish());
    text
}

fn check(tokenizer: Tokenizer, cases: &[Case]) {
    let tokenizer = Arc::new(tokenizer);
    for case in cases {
        if let Some(text) = &case.text {
            assert_eq!(ids(&tokenizer.encode(text, false).unwrap()), case.ids, "encoding {text:?}");
            assert!(tokenizer.min_tokens_for(text) <= case.ids.len() || case.decoded.is_some(), "bound for {text:?}");
        }
        let expected = case.decoded.as_ref().or(case.text.as_ref()).unwrap();
        let tokens = tokens(&case.ids);
        assert_eq!(&tokenizer.decode(&tokens, false).unwrap(), expected, "decoding {:?}", case.ids);
        assert_eq!(&streamed(&tokenizer, &[], &tokens, false), expected, "streaming {:?}", case.ids);
    }
}

#[test]
fn byte_level_families_cut_as_the_originals() {
    let families: BTreeMap<String, Vec<Case>> = goldens("byte-level.json");
    assert_eq!(families.len(), 4);
    let shared = families["gpt-2"].clone();
    assert!(shared.len() > 40);
    for (family, own) in families {
        let own_texts: Vec<_> = own.iter().map(|case| case.text.clone()).collect();
        let cases: Vec<Case> =
            shared.iter().filter(|case| !own_texts.contains(&case.text)).chain(&own).cloned().collect();
        check(byte_level(&family), &cases);
    }
}

#[test]
fn sentencepiece_vocabularies_encode_and_decode_as_sentencepiece() {
    for name in ["sentencepiece", "sentencepiece-no-prefix"] {
        let cases: Vec<Case> = goldens(&format!("{name}.json"));
        assert!(cases.len() > 100);
        check(sentence_piece(&format!("{name}.gguf")), &cases);
    }
}

#[test]
fn the_default_model_encodes_as_the_originals() {
    let Some(path) = std::env::var_os("BINDERY_TEST_MODEL") else {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("SKIPPED: BINDERY_TEST_MODEL (the default model's file) is not set");
        }
        return;
    };
    let cases: Vec<Case> = goldens("default-model.json");
    assert!(cases.len() > 40);
    let tokenizer = Tokenizer::from_gguf(&GgufFile::open(Path::new(&path)).unwrap()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 49_152);
    assert_eq!(tokenizer.bos_token_id(), Some(TokenId(1)));
    assert_eq!(ids(tokenizer.eos_token_ids()), [0, 2]);
    assert_eq!(tokenizer.encode("hi", true).unwrap(), tokenizer.encode("hi", false).unwrap());
    check(tokenizer, &cases);
}

#[test]
fn a_folder_gives_the_same_tokens_as_the_gguf_file() {
    let folder = Tokenizer::from_dir(&fixture("folder")).unwrap();
    let families: BTreeMap<String, Vec<Case>> = goldens("byte-level.json");
    check(Tokenizer::from_dir(&fixture("folder")).unwrap(), &families["smollm"]);
    assert_eq!(folder.bos_token_id(), Some(TokenId(1)));
    assert_eq!(ids(folder.eos_token_ids()), [0, 2]);
    assert_eq!(folder.named_tokens()["eos_token"], "<|im_end|>");
    // tokenizer_config.json adds a token that tokenizer.json lacks.
    let later = folder.encode("a<later>", false).unwrap()[1];
    assert_eq!(folder.token_str(later), Some("<later>"));
    assert!(folder.is_special(later));
    assert_eq!(folder.vocab_size(), later.0 as usize + 1);
}

/// LLaMA 2's legacy normaliser, Metaspace before the first word only, Gemma's and Falcon's cuts, Phi-3's markers that
/// swallow white space, a first token from a post-processor.
#[test]
fn tokenizer_files_of_every_manner_are_read() {
    let manners: BTreeMap<String, FileCase> = goldens("tokenizer-files.json");
    assert_eq!(manners.len(), 6);
    let folder = tempfile::tempdir().unwrap();
    for (name, manner) in manners {
        std::fs::write(folder.path().join("tokenizer.json"), manner.file.to_string()).unwrap();
        let tokenizer = Arc::new(Tokenizer::from_dir(folder.path()).unwrap());
        assert!(tokenizer.spells_bytes(), "{name}: streaming goes by bytes");
        assert_eq!(ids(&tokenizer.encode("hi", true).unwrap()), manner.with_special, "{name}");
        for case in &manner.cases {
            let text = case.text.as_ref().unwrap();
            assert_eq!(ids(&tokenizer.encode(text, false).unwrap()), case.ids, "{name}: {text:?}");
            let expected = case.decoded.as_ref().unwrap_or(text);
            let tokens = tokens(&case.ids);
            assert_eq!(&tokenizer.decode(&tokens, false).unwrap(), expected, "{name}: {:?}", case.ids);
            assert_eq!(&streamed(&tokenizer, &[], &tokens, false), expected, "{name}: {:?}", case.ids);
        }
    }
}

/// Folders with nothing but the original's own file.
#[test]
fn original_files_are_read_where_tokenizer_json_is_missing() {
    let folder = |name: &str| Tokenizer::from_dir(&fixture(name)).unwrap();
    check(folder("sentencepiece-folder"), &goldens::<Vec<Case>>("sentencepiece.json"));
    let cases = goldens::<Vec<Case>>("unigram.json");
    assert!(cases.len() > 80);
    check(folder("unigram-folder"), &cases);
    let cases = goldens::<Vec<Case>>("tiktoken.json");
    assert!(cases.len() > 40);
    check(folder("tiktoken-folder"), &cases);

    let tokenizer = folder("sentencepiece-folder");
    assert_eq!((tokenizer.bos_token_id(), ids(tokenizer.eos_token_ids())), (Some(TokenId(1)), vec![2]));
    assert_eq!(tokenizer.named_tokens()["unk_token"], "<unk>");
    let bare = tokenizer.encode("the house", false).unwrap();
    assert_eq!(tokenizer.encode("the house", true).unwrap(), [&[TokenId(1)], &bare[..]].concat());

    let tokenizer = folder("tiktoken-folder");
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    assert_eq!(tokenizer.eos_token_ids(), [end]);
    assert_eq!(end.0 as usize + 1, tokenizer.vocab_size(), "the added tokens stand where the configuration says");
    assert_eq!(tokenizer.token_str(TokenId(end.0 - 3)), None, "before them is a hole");
    assert_eq!(tokenizer.encode("", true).unwrap(), [tokenizer.token_id("<|endoftext|>").unwrap()]);
}

/// Phi-3-small's special tokens are in its code alone; its list of ranks is `cl100k_base`'s.
#[test]
fn phi3_smalls_special_tokens_are_known_by_its_class() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let ranks = std::fs::read_dir(fixture("tiktoken-folder")).unwrap().map(|entry| entry.unwrap().path());
    let ranks = ranks.filter(|path| path.extension().is_some_and(|extension| extension == "tiktoken"));
    std::fs::copy(ranks.last().unwrap(), file("cl100k_base.tiktoken")).unwrap();
    let config = serde_json::json!({
        "tokenizer_class": "Phi3SmallTokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"
    });
    std::fs::write(file("tokenizer_config.json"), config.to_string()).unwrap();
    let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
    assert_eq!((tokenizer.vocab_size(), ids(tokenizer.eos_token_ids())), (100_352, vec![100_257]));
    // tokenization_phi3_small.py, SPECIAL_TOKENS.
    for (text, id) in [
        ("<|dummy_id_2|>", 100_256),
        ("<|system|>", 100_261),
        ("<|user|>", 100_262),
        ("<|assistant|>", 100_263),
        ("<|end|>", 100_266),
        ("<|dummy_id_3|>", 100_267),
        ("<|dummy_id_11|>", 100_275),
        ("<|endofprompt|>", 100_276),
        ("<|dummy_id_12|>", 100_277),
        ("<|dummy_id_86|>", 100_351),
    ] {
        assert_eq!(tokenizer.encode(text, true).unwrap(), [TokenId(id)], "{text}");
    }
    let words = folder_tokens("tiktoken-folder", "the house");
    let framed = tokenizer.encode("<|user|>the house<|end|>", true).unwrap();
    assert_eq!(framed, [&[TokenId(100_262)], &words[..], &[TokenId(100_266)]].concat());
}

/// A text's tokens by a fixture, without special ones.
fn folder_tokens(name: &str, text: &str) -> Vec<TokenId> {
    Tokenizer::from_dir(&fixture(name)).unwrap().encode(text, false).unwrap()
}

/// tokenizer_config.json beside a tokenizer.model: added tokens at their ids, and where the first space goes.
#[test]
fn a_configuration_adds_to_a_sentencepiece_model() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    std::fs::copy(fixture("sentencepiece-folder/tokenizer.model"), file("tokenizer.model")).unwrap();
    let open = |config: serde_json::Value| {
        std::fs::write(file("tokenizer_config.json"), config.to_string()).unwrap();
        Tokenizer::from_dir(folder.path())
    };
    let added = serde_json::json!({
        "0": {"content": "<unk>", "special": true}, "1": {"content": "<s>", "special": true},
        "625": {"content": "<|user|>", "special": true, "rstrip": true}, "626": {"content": "\u{2581}\u{2581}\u{2581}", "special": false},
    });
    let tokenizer =
        open(serde_json::json!({"added_tokens_decoder": added, "legacy": false, "add_bos_token": false})).unwrap();
    assert_eq!(tokenizer.vocab_size(), 627);
    let (user, house) = (TokenId(625), tokenizer.encode("house", true).unwrap());
    assert_eq!(tokenizer.token_str(house[0]).unwrap().chars().next(), Some('\u{2581}'));
    // White space after the marker is its own, and no second space is put after it.
    let found = tokenizer.encode("<|user|> \n house", false).unwrap();
    assert_eq!(found[0], user);
    assert_eq!(tokenizer.decode(&found[1..], false).unwrap(), "house");
    assert_ne!(found[1..], house);
    assert!(tokenizer.encode("a   b", false).unwrap().contains(&TokenId(626)), "spaces are matched in the text itself");

    let legacy = open(serde_json::json!({"added_tokens_decoder": added, "legacy": true})).unwrap();
    assert_eq!(legacy.encode("<|user|>house", false).unwrap(), [&[user], &house[..]].concat());
    let far = serde_json::json!({"added_tokens_decoder": {"99999999999": {"content": "x"}}});
    let error = open(far).unwrap_err().to_string();
    assert!(error.contains("99999999999") && error.contains("tokenizer.model"), "{error}");
    for (bytes, expected) in [
        (&b"\x0a\xff\x01"[..], "255 bytes"),
        (b"QQ== 0\nQg== 7\n", "line 2 has not the rank 1"),
        (b"QQ== 0\nQQ== 1\n", "line 2 repeats"),
        (b"*** 0\n", "line 1 is no"),
    ] {
        std::fs::write(file("tokenizer.model"), bytes).unwrap();
        let error = open(serde_json::json!({})).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("tokenizer.model"), "{error}");
    }
    std::fs::write(file("tokenizer.model"), "QQ== 0\n").unwrap();
    let error = open(serde_json::json!({})).unwrap_err().to_string();
    assert!(error.contains("added_tokens_decoder"), "{error}");
}

#[test]
fn files_that_are_not_read_are_named() {
    let folder = tempfile::tempdir().unwrap();
    for (name, expected) in [("merges.txt", "AutoTokenizer"), ("tekken.json", "tekken.json")] {
        std::fs::write(folder.path().join(name), "{}").unwrap();
        let error = Tokenizer::from_dir(folder.path()).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("tokenizer.json"), "{error}");
    }
}

#[test]
fn tokens_know_their_bytes_names_and_roles() {
    let tokenizer = byte_level("smollm");
    let house = tokenizer.encode(" \u{e9}", false).unwrap();
    let bytes: Vec<u8> = house.iter().flat_map(|&token| tokenizer.token_bytes(token)).copied().collect();
    assert_eq!(bytes, " \u{e9}".as_bytes());
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    assert_eq!(tokenizer.token_bytes(end), b"<|im_end|>");
    assert!(tokenizer.is_special(end));
    let tool = tokenizer.token_id("<tool>").unwrap();
    assert!(!tokenizer.is_special(tool), "user-defined tokens are text");
    assert_eq!(tokenizer.decode(&[tool, end], true).unwrap(), "<tool>");
    assert_eq!(tokenizer.decode(&[tool, end], false).unwrap(), "<tool><|im_end|>");
    // Outside the vocabulary there is nothing, and nothing breaks.
    let outside = TokenId(u32::MAX);
    assert_eq!(tokenizer.token_bytes(outside), b"");
    assert_eq!(tokenizer.token_str(outside), None);
    assert_eq!(tokenizer.decode(&[outside, tool], false).unwrap(), "<tool>");

    let tokenizer = sentence_piece("sentencepiece.gguf");
    let euro = tokenizer.encode("\u{20ac}", false).unwrap();
    let bytes: Vec<u8> = euro.iter().flat_map(|&token| tokenizer.token_bytes(token)).copied().collect();
    assert_eq!(bytes, " \u{20ac}".as_bytes());
    assert_eq!(ids(tokenizer.eos_token_ids()), [2]);
}

#[test]
fn special_tokens_go_around_a_text_only_when_asked_for() {
    let plain = vocabulary("sentencepiece.gguf");
    let tokenizer = Tokenizer::from_vocabulary(&plain).unwrap();
    let bare = tokenizer.encode("the house", false).unwrap();
    let with = tokenizer.encode("the house", true).unwrap();
    assert_eq!(with, [&[TokenId(1)], &bare[..]].concat());
    let both = GgufVocabulary { add_bos: None, add_eos: Some(true), ..plain.clone() };
    let with = Tokenizer::from_vocabulary(&both).unwrap().encode("the house", true).unwrap();
    assert_eq!(with, [&[TokenId(1)], &bare[..], &[TokenId(2)]].concat());
    let neither = GgufVocabulary { add_bos: Some(false), ..plain };
    assert_eq!(Tokenizer::from_vocabulary(&neither).unwrap().encode("the house", true).unwrap(), bare);
}

#[test]
fn special_tokens_in_a_text_are_recognised_as_transformers_does() {
    let tokenizer = sentence_piece("sentencepiece.gguf");
    let found = tokenizer.encode("a</s>b", false).unwrap();
    assert!(found.contains(&TokenId(2)));
    // Each section between special tokens gets its own leading space, as in Llama 2's tokenizer.json.
    assert_eq!(tokenizer.decode(&found, true).unwrap(), "a b");
}

#[test]
fn a_word_after_a_prompt_keeps_its_space() {
    let tokenizer = Arc::new(sentence_piece("sentencepiece.gguf"));
    let house = tokenizer.encode("house", false).unwrap();
    assert_eq!(streamed(&tokenizer, &[], &house, true), "house");
    assert_eq!(streamed(&tokenizer, &[TokenId(1)], &house, true), "house", "a skipped prompt is no text");
    let prompt = tokenizer.encode("the", false).unwrap();
    assert_eq!(streamed(&tokenizer, &prompt, &house, true), " house");
}

/// A generation may complete a character that the prompt's last token began.
#[test]
fn a_character_begun_by_the_prompt_is_completed() {
    let tokenizer = Arc::new(sentence_piece("sentencepiece.gguf"));
    let euro = tokenizer.encode("x\u{20ac}", false).unwrap();
    let (prompt, rest) = euro.split_at(euro.len() - 1);
    assert_eq!(streamed(&tokenizer, prompt, rest, true), "\u{20ac}");
    assert_eq!(streamed(&tokenizer, prompt, &[], true), "", "what only the prompt holds is the prompt's");
}

fn edited(name: &str, edit: impl FnOnce(&mut GgufVocabulary)) -> String {
    let mut vocabulary = vocabulary(name);
    edit(&mut vocabulary);
    match Tokenizer::from_vocabulary(&vocabulary) {
        Ok(_) => "accepted".to_owned(),
        Err(EngineError::Text(message)) => message,
        Err(other) => panic!("{other:?} is no complaint about a model file"),
    }
}

#[test]
fn broken_vocabularies_are_refused_by_name() {
    type Edit = fn(&mut GgufVocabulary);
    let cases: &[(&str, Edit, &[&str])] = &[
        ("byte-level.gguf", |v| v.model = "bert".into(), &["\"bert\"", "gpt2", "llama", "gemma4", "t5"]),
        ("byte-level.gguf", |v| v.pre = Some("wolpertinger".into()), &["\"wolpertinger\"", "qwen2", "smollm"]),
        ("byte-level.gguf", |v| v.tokens.clear(), &["tokens", "empty"]),
        ("byte-level.gguf", |v| v.tokens[300] = v.tokens[299].clone(), &["twice", "299", "300"]),
        ("byte-level.gguf", |v| v.types.truncate(5), &["token_type", "5"]),
        ("byte-level.gguf", |v| v.types[7] = 77, &["token_type", "77", "token 7"]),
        ("byte-level.gguf", |v| v.merges[3] = "nospace".into(), &["merges", "entry 3", "nospace"]),
        ("byte-level.gguf", |v| v.merges[3] = "zzz qqq".into(), &["merges", "entry 3", "\"zzz\"", "no token"]),
        ("byte-level.gguf", |v| v.merges[3] = String::new(), &["merges", "entry 3"]),
        // Both parts are tokens, what they make is not: this is an index out of bounds inside the library.
        ("byte-level.gguf", |v| v.merges[0] = "<|endoftext|> <|endoftext|>".into(), &["merges", "entry 0", "no token"]),
        ("byte-level.gguf", |v| v.eos = Some(1_000_000), &["eos_token_id", "1000000"]),
        ("byte-level.gguf", |v| v.bos = Some(702), &["bos_token_id"]),
        ("sentencepiece.gguf", |v| v.scores.clear(), &["scores", "0 entries"]),
        ("sentencepiece.gguf", |v| v.scores[400] = f32::NAN, &["scores", "400"]),
        (
            "sentencepiece.gguf",
            |v| {
                v.model = "t5".into();
                v.tokens[9].clear();
            },
            &["tokens", "entry 9 is empty"],
        ),
        ("sentencepiece.gguf", |v| v.precompiled_charsmap = vec![9; 9], &["precompiled_charsmap", "broken"]),
        ("byte-level.gguf", |v| v.model = "t5".into(), &["scores", "0 entries"]),
        ("sentencepiece.gguf", |v| v.tokens[400] = "x".repeat(100_000), &["tokens", "400", "100000"]),
    ];
    for (name, edit, expected) in cases {
        let message = edited(name, edit);
        assert!(expected.iter().all(|part| message.contains(part)), "{message:?} lacks one of {expected:?}");
    }
}

#[test]
fn harmless_oddities_are_accepted() {
    assert_eq!(edited("byte-level.gguf", |v| v.bos = Some(u64::from(u32::MAX))), "accepted");
    assert_eq!(edited("byte-level.gguf", |v| v.pre = None), "accepted");
    assert_eq!(edited("byte-level.gguf", |v| v.types.clear()), "accepted");
    // Holes in the id space.
    assert_eq!(
        edited("sentencepiece.gguf", |v| {
            v.tokens[600].clear();
            v.tokens[601].clear();
        }),
        "accepted"
    );
}

#[test]
fn control_tokens_with_well_known_names_end_a_generation() {
    let mut vocabulary = vocabulary("byte-level.gguf");
    vocabulary.eos = Some(0);
    let tokenizer = Tokenizer::from_vocabulary(&vocabulary).unwrap();
    assert_eq!(ids(tokenizer.eos_token_ids()), [0, 2], "<|im_end|> ends a turn whatever eos_token_id says");
    vocabulary.types[2] = 1;
    let tokenizer = Tokenizer::from_vocabulary(&vocabulary).unwrap();
    assert_eq!(ids(tokenizer.eos_token_ids()), [0], "as ordinary text the name means nothing");
    vocabulary.types[2] = 3;
    (vocabulary.tokens[1], vocabulary.tokens[2]) = ("<end_of_turn>".into(), "</s>".into());
    let tokenizer = Tokenizer::from_vocabulary(&vocabulary).unwrap();
    assert_eq!(ids(tokenizer.eos_token_ids()), [0, 1], "a tag of HTML ends nothing in Gemma's vocabularies");
}

#[test]
fn unusable_folders_say_which_file() {
    let folder = tempfile::tempdir().unwrap();
    let message = |tokenizer: &str, config: &str| {
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        Tokenizer::from_dir(folder.path()).unwrap_err().to_string()
    };
    assert!(Tokenizer::from_dir(folder.path()).unwrap_err().to_string().contains("tokenizer.json is missing"));
    assert!(message("{", "{}").contains("tokenizer.json is unusable"));
    assert!(message("\u{0}", "{}").contains("tokenizer.json is unusable"));
    let good = std::fs::read_to_string(fixture("folder/tokenizer.json")).unwrap();
    assert!(message(&good, "[").contains("tokenizer_config.json is no valid JSON"));
    let far = r#"{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"ab":4000000000},"merges":[]}}"#;
    let error = message(far, "{}");
    assert!(error.contains("tokenizer.json is unusable"), "{error}");
    // The library copies both parts of a merge into a buffer sized for the longest token.
    let merge = r#"{"type":"BPE","vocab":{"ab":0,"cd":1},"merges":[["ab","cd"]]}"#;
    let broken = format!(r#"{{"version":"1.0","added_tokens":[],"model":{merge}}}"#);
    assert!(message(&broken, "{}").contains("tokenizer.json is unusable"));
}

/// A map of single characters: each to a text.
fn character_map(entries: &[(char, &str)]) -> Vec<u8> {
    // A double array: units are labels and offsets, children of a node lie at its place xor their byte. Every node has 256
    // places of its own here.
    let (mut units, mut texts) = (vec![0_u32; 512], Vec::new());
    let mut nodes = std::collections::BTreeMap::from([(Vec::new(), 256_usize)]);
    units[0] = 256 << 10;
    for (character, text) in entries {
        let key = character.to_string().into_bytes();
        for (depth, &byte) in key.iter().enumerate() {
            let parent = nodes[&key[..depth]];
            let child = *nodes.entry(key[..=depth].to_vec()).or_insert_with(|| {
                units.resize(units.len() + 256, 0);
                units.len() - 256
            });
            let place = parent ^ usize::from(byte);
            let leaf = u32::from(depth + 1 == key.len()) << 8;
            units[place] = u32::from(byte) | leaf | ((place ^ child) as u32) << 10;
            if leaf != 0 {
                // A value is no label of a child.
                units[child] = texts.len() as u32 | 1 << 31;
            }
        }
        texts.extend_from_slice(text.as_bytes());
        texts.push(0);
    }
    let trie = units.iter().flat_map(|unit| unit.to_le_bytes());
    (4 * units.len() as u32).to_le_bytes().into_iter().chain(trie).chain(texts).collect()
}

/// As SentencePiece's own maps do: full forms become plain ones, other spaces become spaces, some are dropped.
fn with_character_map(remove_extra_whitespaces: bool) -> Tokenizer {
    let map =
        [('\u{1}', ""), ('\u{200b}', ""), ('\u{3000}', " "), ('\t', " "), ('\u{ff21}', "A"), ('\u{fdfa}', "abcdefg")];
    let mut vocabulary = vocabulary("sentencepiece.gguf");
    vocabulary.precompiled_charsmap = character_map(&map);
    vocabulary.remove_extra_whitespaces = Some(remove_extra_whitespaces);
    Tokenizer::from_vocabulary(&vocabulary).unwrap()
}

#[test]
fn a_giant_text_under_a_character_map_is_known_to_be_one() {
    for removes in [false, true] {
        let tokenizer = with_character_map(removes);
        let ids = |text: &str| ids(&tokenizer.encode(text, false).unwrap());
        assert_eq!(ids("a\u{ff21}\u{200b}\t\u{3000}b"), ids(if removes { "aA b" } else { "aA  b" }));
        assert!(tokenizer.min_tokens_for(&"word ".repeat(2_000_000)) > 10_000);
        assert!(tokenizer.min_tokens_for(&"\u{ff21}".repeat(2_000_000)) > 10_000);
        // Nothing is left of it.
        assert_eq!(tokenizer.min_tokens_for(&"\u{200b}".repeat(1_000_000)), 0);
        assert_eq!(tokenizer.min_tokens_for(&" ".repeat(1_000_000)) == 0, removes);
    }
}

/// Long runs are what regular expressions and merge queues are slow or recursive at.
#[test]
fn long_runs_of_one_character_are_tokenised() {
    for tokenizer in [byte_level("smollm"), byte_level("llama-bpe"), sentence_piece("sentencepiece.gguf")] {
        for unit in [" ", "a", "\n", "7", "!", "\u{e9}", "\u{1f600}", "<|im_end|>", " \n"] {
            let text = unit.repeat(200_000 / unit.len());
            let tokens = tokenizer.encode(&text, false).unwrap();
            assert!(tokens.len() >= tokenizer.min_tokens_for(&text));
            assert_eq!(tokenizer.decode(&tokens, false).unwrap(), text, "{unit:?} repeated");
        }
    }
}

/// The regex engine gives up after ten million retries, by a panic.
#[test]
fn a_run_too_long_for_the_regex_engine_is_the_texts_fault() {
    let result = byte_level("llama-bpe").encode(&" ".repeat(11_000_000), false);
    assert!(matches!(result, Err(EngineError::Invalid { param: "prompt", .. })));
    let result = byte_level("smollm").encode(&"x".repeat(MAX_TEXT_BYTES + 1), false);
    assert!(matches!(result, Err(EngineError::Invalid { param: "prompt", .. })));
}

fn any_tokenizer() -> impl Strategy<Value = Arc<Tokenizer>> {
    prop::sample::select(vec![
        Arc::new(byte_level("smollm")),
        Arc::new(sentence_piece("sentencepiece.gguf")),
        Arc::new(sentence_piece("sentencepiece-no-prefix.gguf")),
    ])
}

/// Mostly tokens of single bytes, so that characters are cut and broken often.
fn token_sequence() -> impl Strategy<Value = Vec<TokenId>> {
    let token = prop_oneof![3 => 0_u32..270, 1 => 0_u32..710, 1 => Just(2)];
    prop::collection::vec(token.prop_map(TokenId), 0..40)
}

/// A decoder without a byte-exact rule here: tokens show their spaces as `▁`, and the first token drops them.
fn metaspace() -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let names = ["\u{2581}the", "\u{2581}", "a", "b\u{2581}c", "\u{20ac}", "\u{fffd}", "<end>"];
    let vocabulary: serde_json::Map<String, serde_json::Value> =
        names.iter().enumerate().map(|(id, name)| ((*name).to_owned(), id.into())).collect();
    let end = serde_json::json!({
        "id": 6, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true
    });
    let file = serde_json::json!({
        "version": "1.0",
        "added_tokens": [end],
        "decoder": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"},
    });
    std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
    Tokenizer::from_dir(folder.path()).unwrap()
}

#[test]
fn other_decoders_stream_what_the_library_decodes() {
    let tokenizer = Arc::new(metaspace());
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let ids = prop::collection::vec((0_u32..8).prop_map(TokenId), 0..80);
    runner
        .run(&(ids, any::<bool>()), |(ids, skip)| {
            prop_assert_eq!(streamed(&tokenizer, &[], &ids, skip), tokenizer.decode(&ids, skip).unwrap());
            Ok(())
        })
        .unwrap();
    let (the, a) = (TokenId(0), TokenId(2));
    assert_eq!(streamed(&tokenizer, &[], &[the, the], false), "the the");
    assert_eq!(streamed(&tokenizer, &[a], &[the], false), " the", "after a prompt the space stays");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn streaming_equals_decoding_at_once(tokenizer in any_tokenizer(), tokens in token_sequence(), skip: bool) {
        prop_assert_eq!(streamed(&tokenizer, &[], &tokens, skip), tokenizer.decode(&tokens, skip).unwrap());
    }

    /// The prompt's finished text and the stream's together are the text of the whole.
    #[test]
    fn streaming_continues_a_prompt(
        tokenizer in any_tokenizer(), prompt in token_sequence(), tokens in token_sequence(), skip: bool
    ) {
        let mut before = Detokenizer::new(Arc::clone(&tokenizer), &[], skip);
        let mut text: String = prompt.iter().map(|&token| before.push(token)).collect();
        let added = streamed(&tokenizer, &prompt, &tokens, skip);
        let whole = tokenizer.decode(&[&prompt[..], &tokens[..]].concat(), skip).unwrap();
        let is_text = |&token: &TokenId| {
            let is_skipped = skip && tokenizer.is_special(token);
            !is_skipped && !tokenizer.token_bytes(token).is_empty()
        };
        if tokens.iter().any(is_text) {
            text.push_str(&added);
            prop_assert_eq!(text, whole);
        } else {
            prop_assert_eq!(added, "");
        }
    }

    /// But for a written `▁` where that character stands for a space, as it does in SentencePiece's own library.
    #[test]
    fn encoding_then_decoding_gives_the_text_back(tokenizer in any_tokenizer(), text in "(\\PC|[ \\n\\t\u{2581}]){0,60}") {
        let tokens = tokenizer.encode(&text, false).unwrap();
        let is_sentence_piece = tokenizer.token_id("<0x0A>").is_some();
        let expected = if is_sentence_piece { text.replace('\u{2581}', " ") } else { text.clone() };
        prop_assert_eq!(tokenizer.decode(&tokens, false).unwrap(), expected);
        prop_assert!(tokens.len() >= tokenizer.min_tokens_for(&text));
    }

    #[test]
    fn no_text_under_a_character_map_takes_fewer_tokens_than_said(
        text in "[ab \\t\u{1}\u{200b}\u{3000}\u{ff21}\u{fdfa}\u{301}]{0,80}", removes: bool,
    ) {
        static BOTH: LazyLock<[Tokenizer; 2]> = LazyLock::new(|| [false, true].map(with_character_map));
        let tokenizer = &BOTH[usize::from(removes)];
        let tokens = tokenizer.encode(&text, false).unwrap();
        prop_assert!(tokens.len() >= tokenizer.min_tokens_for(&text), "{text:?}: {}", tokens.len());
    }

    /// Another implementation of the whole decoding: the library's own.
    #[test]
    fn byte_level_decoding_equals_the_library(tokens in token_sequence(), skip: bool) {
        static BOTH: LazyLock<(tokenizers::Tokenizer, Tokenizer)> = LazyLock::new(|| {
            (tokenizers::Tokenizer::from_file(fixture("folder/tokenizer.json")).unwrap(), byte_level("smollm"))
        });
        let (library, ours) = &*BOTH;
        prop_assert_eq!(ours.decode(&tokens, skip).unwrap(), library.decode(&ids(&tokens), skip).unwrap());
    }

    /// Whatever a file says, loading ends with a tokenizer or an error, and a tokenizer works.
    #[test]
    fn mangled_vocabularies_never_panic(
        sentence_piece: bool,
        edits in prop::collection::vec((0_usize..710, 0_u8..10, any::<u32>(), "\\PC{0,4}"), 1..8),
        text in "\\PC{0,30}",
    ) {
        let mut vocabulary = vocabulary(if sentence_piece { "sentencepiece.gguf" } else { "byte-level.gguf" });
        for (at, what, number, name) in edits {
            let at = at % vocabulary.tokens.len();
            match what {
                0 => vocabulary.tokens[at] = name,
                1 => vocabulary.types[at] = i64::from(number % 8),
                2 if !vocabulary.merges.is_empty() => {
                    let count = vocabulary.merges.len();
                    vocabulary.merges[at % count] = format!("{name} {}", vocabulary.tokens[at]);
                }
                3 if !vocabulary.scores.is_empty() => vocabulary.scores[at] = f32::from_bits(number),
                4 => vocabulary.eos = Some(u64::from(number % 800)),
                5 => vocabulary.unknown = Some(u64::from(number % 800)),
                6 => {
                    vocabulary.add_space_prefix = Some(number % 2 == 0);
                    vocabulary.remove_extra_whitespaces = Some(number % 3 == 0);
                    vocabulary.legacy = Some(number % 5 == 0);
                    vocabulary.strips_after.insert(at as u32);
                }
                9 if sentence_piece => vocabulary.model = ["t5", "gemma4", "llama"][number as usize % 3].into(),
                7 => vocabulary.tokens.truncate(at.max(1)),
                _ => vocabulary.bos = Some(u64::from(number % 800)),
            }
        }
        if let Ok(tokenizer) = Tokenizer::from_vocabulary(&vocabulary) {
            let tokens = tokenizer.encode(&text, true).unwrap();
            let tokenizer = Arc::new(tokenizer);
            prop_assert_eq!(streamed(&tokenizer, &[], &tokens, false), tokenizer.decode(&tokens, false).unwrap());
        }
    }
}
