//! The text side of a model as files of a folder: copied from a folder, or made of a GGUF file's vocabulary.
//!
//! It must not know weights. Its invariant: what is written is read back by [`Tokenizer::from_dir`](crate::Tokenizer::from_dir) and
//! [`ChatTemplate::from_dir`](super::chat::ChatTemplate::from_dir) as the same tokens, the same ends and the same templates.

use std::{fs, io, path::Path};

use bindery_model::weights::gguf::GgufFile;
use serde_json::{Map, Value, json};
use tokenizers::processors::template::TemplateProcessing;

use super::{chat, gguf_vocabulary::GgufVocabulary};
use crate::EngineError;

/// Largest file that is taken for one of a tokenizer's, a template or a licence; published ones stay below 40 MB.
const MAX_FILE_BYTES: u64 = 512 << 20;
/// Files of a folder that are copied.
const MAX_FILES: usize = 1000;
/// How names of files about text end.
const ENDINGS: [&str; 5] = ["json", "jinja", "txt", "model", "tiktoken"];
/// What is made anew, or describes weights that are not taken along.
const NOT_COPIED: [&str; 2] = ["config.json", "model.safetensors.index.json"];
/// Folders inside a model's that hold such files, too.
const FOLDERS: [&str; 2] = ["original", "additional_chat_templates"];

/// Copies tokenizer, templates, generation_config.json and licences of a model's folder.
pub(crate) fn copy_files(source: &Path, target: &Path) -> Result<(), EngineError> {
    copy_folder(source, target)?;
    for folder in FOLDERS {
        if source.join(folder).is_dir() {
            let target = target.join(folder);
            fs::create_dir(&target).map_err(|error| cannot_write(&target, &error))?;
            copy_folder(&source.join(folder), &target)?;
        }
    }
    Ok(())
}

fn copy_folder(source: &Path, target: &Path) -> Result<(), EngineError> {
    let cannot_read =
        |path: &Path, error: &io::Error| EngineError::Text(format!("cannot read {}: {error}", path.display()));
    let entries = fs::read_dir(source).map_err(|error| cannot_read(source, &error))?;
    let mut num_files = 0;
    for entry in entries {
        let path = entry.map_err(|error| cannot_read(source, &error))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        let is_licence = ["LICENSE", "LICENCE", "NOTICE", "USE_POLICY"].iter().any(|start| name.starts_with(start));
        if NOT_COPIED.contains(&name) || !(ENDINGS.contains(&ending) || is_licence) {
            continue;
        }
        // A link is followed: the hub's cache is made of links.
        let metadata = fs::metadata(&path).map_err(|error| cannot_read(&path, &error))?;
        if !metadata.is_file() || metadata.len() > MAX_FILE_BYTES {
            continue;
        }
        num_files += 1;
        if num_files > MAX_FILES {
            let what = format!("{} has more than {MAX_FILES} files beside its weights", source.display());
            return Err(EngineError::Text(what));
        }
        let target = target.join(name);
        fs::copy(&path, &target).map_err(|error| cannot_write(&target, &error))?;
    }
    Ok(())
}

/// Writes tokenizer.json, tokenizer_config.json (with the templates) and generation_config.json of a GGUF file.
pub(crate) fn write_files(file: &GgufFile, target: &Path) -> Result<(), EngineError> {
    let vocabulary = GgufVocabulary::from_file(file)?;
    let built = vocabulary.build()?;
    let unusable = |what: &dyn std::fmt::Display| EngineError::Text(format!("the tokenizer cannot be written: {what}"));
    let mut tokenizer = built.tokenizer.clone();
    let (first, last) = (built.bos.filter(|_| built.add_bos), built.main_eos.filter(|_| built.add_eos));
    if first.is_some() || last.is_some() {
        let name = |id: u32| vocabulary.tokens[id as usize].clone();
        let (first, last) = (first.map(|id| (name(id), id)), last.map(|id| (name(id), id)));
        tokenizer.with_post_processor(Some(around(first.as_ref(), last.as_ref()).map_err(|error| unusable(&error))?));
    }
    let text = tokenizer.to_string(false).map_err(|error| unusable(&error))?;
    let mut config = Map::new();
    config.insert("tokenizer_class".to_owned(), "PreTrainedTokenizerFast".into());
    config.extend(built.named_tokens(&vocabulary).into_iter().map(|(role, token)| (role, Value::from(token))));
    let templates = chat::gguf_sources(file);
    if !templates.is_empty() {
        let named = templates.iter().map(|(name, template)| json!({"name": name, "template": template}));
        config.insert("chat_template".to_owned(), Value::Array(named.collect()));
    }
    let generation = json!({"bos_token_id": built.bos, "eos_token_id": built.eos});
    let files = [
        ("tokenizer.json", text),
        ("tokenizer_config.json", format!("{:#}\n", Value::Object(config))),
        ("generation_config.json", format!("{generation:#}\n")),
    ];
    for (name, text) in files {
        let path = target.join(name);
        fs::write(&path, text).map_err(|error| cannot_write(&path, &error))?;
    }
    Ok(())
}

/// Puts these tokens around a text.
fn around(first: Option<&(String, u32)>, last: Option<&(String, u32)>) -> Result<TemplateProcessing, String> {
    // Pieces by themselves, not as one text: a token's name may look like a placeholder.
    let piece = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let special = |(name, id): &(String, u32)| (name.clone(), json!({"id": name, "ids": [id], "tokens": [name]}));
    let template = |sequences: &[&str]| -> Vec<Value> {
        let sequences = sequences.iter().map(|name| json!({"Sequence": {"id": name, "type_id": 0}}));
        let first = first.iter().map(|(name, _)| piece(name));
        first.chain(sequences).chain(last.iter().map(|(name, _)| piece(name))).collect()
    };
    let tokens: Map<String, Value> = first.into_iter().chain(last).map(special).collect();
    let value = json!({
        "type": "TemplateProcessing", "single": template(&["A"]), "pair": template(&["A", "B"]), "special_tokens": tokens,
    });
    serde_json::from_value(value).map_err(|error| error.to_string())
}

fn cannot_write(path: &Path, error: &io::Error) -> EngineError {
    EngineError::Text(format!("cannot write {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests; clippy only knows a plain cfg(test)")]
    use super::*;
    use crate::{ChatTemplate, Tokenizer};

    const TEXT: &str = "Grüße, 世界! The quick <|im_start|>  fox\n\n\tjumped 12345 times. <s> </s> <bos>";

    #[test]
    fn a_gguf_vocabulary_comes_back_from_a_folder() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/text");
        let mut files: Vec<_> = ["byte-level.gguf", "sentencepiece.gguf", "sentencepiece-no-prefix.gguf"]
            .iter()
            .map(|name| folder.join(name))
            .collect();
        files.extend(std::env::var_os("BINDERY_TEST_MODEL").map(std::path::PathBuf::from));
        for path in files {
            let file = GgufFile::open(&path).unwrap();
            let target = tempfile::tempdir().unwrap();
            write_files(&file, target.path()).unwrap();
            let (before, after) = (Tokenizer::from_gguf(&file).unwrap(), Tokenizer::from_dir(target.path()).unwrap());
            assert_eq!(after.vocab_size(), before.vocab_size(), "{}", path.display());
            for text in [TEXT, "", " ", "a", " a"] {
                for around in [true, false] {
                    let (before, after) = (before.encode(text, around).unwrap(), after.encode(text, around).unwrap());
                    assert_eq!(after, before, "{}: {text:?} {around}", path.display());
                }
            }
            let tokens = before.encode(TEXT, true).unwrap();
            for skip in [true, false] {
                assert_eq!(after.decode(&tokens, skip).unwrap(), before.decode(&tokens, skip).unwrap());
            }
            assert_eq!(after.eos_token_ids(), before.eos_token_ids());
            assert_eq!((after.bos_token_id(), after.named_tokens()), (before.bos_token_id(), before.named_tokens()));
            let template = ChatTemplate::from_gguf(&file, &before).unwrap().map(|template| format!("{template:?}"));
            let read = ChatTemplate::from_dir(target.path(), &after).unwrap().map(|template| format!("{template:?}"));
            assert_eq!(read, template);
        }
    }

    #[test]
    fn files_about_text_are_copied_and_weights_are_not() {
        let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let write = |name: &str| fs::write(source.path().join(name), name).unwrap();
        fs::create_dir(source.path().join("additional_chat_templates")).unwrap();
        for name in
            ["tokenizer.json", "vocab.txt", "LICENSE", "generation_config.json", "additional_chat_templates/rag.jinja"]
        {
            write(name);
        }
        for name in ["config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"] {
            write(name);
        }
        copy_files(source.path(), target.path()).unwrap();
        let mut names: Vec<_> = fs::read_dir(target.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let expected =
            ["LICENSE", "additional_chat_templates", "generation_config.json", "tokenizer.json", "vocab.txt"];
        assert_eq!(names, expected);
        assert!(target.path().join("additional_chat_templates/rag.jinja").exists());
    }
}
