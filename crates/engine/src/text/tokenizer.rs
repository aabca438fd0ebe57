//! Text to tokens and back, with a table of what every token stands for.
//!
//! Cutting and merging is the `tokenizers` crate's work. Around it stand the checks that untrusted model files need, the
//! tokens that begin and end a generation, and a decoder that agrees with the incremental one by construction.
//!
//! **Special tokens in a text** are recognised wherever they stand, as transformers does: `<|im_end|>` typed by a user
//! becomes the same token that the chat template writes. Callers who must not allow that filter texts beforehand.
//!
//! It must not know requests, the context's length or templates. Invariant: nothing here panics on any file or text;
//! `decode` equals what [`super::detokenize::Detokenizer`] gives token by token.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use bindery_model::weights::gguf::GgufFile;
use bindery_scheduler::TokenId;
use serde_json::Value;
use tokenizers::AddedToken;

use super::{
    decoder::{ByteStream, DecoderKind},
    gguf_vocabulary::{BuiltVocabulary, COMPLAINT, GgufVocabulary, MAX_TOKENS, MAX_VOCABULARY_BYTES},
    original,
    shrink::Shrink,
    token_table::{TokenPiece, TokenTable},
};
use crate::EngineError;

/// Longest text that is tokenised, in bytes: four million tokens' worth of words. The worst texts (megabytes of spaces or
/// of digits) take about ten seconds a megabyte, so callers check [`Tokenizer::min_tokens_for`] first and keep this work
/// off the threads that others wait for.
pub const MAX_TEXT_BYTES: usize = 16 << 20;
/// Largest tokenizer.json; published ones stay below 40 MB.
const MAX_TOKENIZER_FILE_BYTES: u64 = 512 << 20;
/// Largest of the small JSON files beside it.
const MAX_CONFIG_FILE_BYTES: u64 = 64 << 20;

/// A model's tokenizer with a table of every token's bytes.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    table: TokenTable,
    decoder: DecoderKind,
    bos: Option<TokenId>,
    eos: Vec<TokenId>,
    /// Put before a text whose special tokens are added, where `inner` has no rule of its own.
    prefix: Option<TokenId>,
    /// Put after it.
    suffix: Option<TokenId>,
    /// `bos_token`, `eos_token`, `unk_token`, `pad_token`, ...: the names templates use.
    named_tokens: BTreeMap<String, String>,
    /// What normalisation leaves of a text at least; `None`: no such bound.
    shrink: Option<Shrink>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("decoder", &self.decoder)
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// A model folder's tokenizer: `tokenizer.json`, else the original's own file (`tokenizer.model`, `*.tiktoken`), with
    /// `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json` and `config.json` for the tokens that
    /// begin and end a generation.
    ///
    /// Which special tokens are added is `tokenizer.json`'s post-processor's word, as in transformers; only where it has
    /// none do `add_bos_token` and `add_eos_token` of `tokenizer_config.json` count. A generation ends at `eos_token`
    /// and at every `eos_token_id` of `generation_config.json` (of `config.json` where that file is missing).
    pub fn from_dir(path: &Path) -> Result<Self, EngineError> {
        let config = read_json(&path.join("tokenizer_config.json"))?.unwrap_or_default();
        let Folder { mut inner, file, built_in, mut add_bos, mut add_eos } = Folder::open(path, &config)?;
        let unusable =
            |what: &dyn std::fmt::Display| EngineError::Text(format!("{} is unusable: {what}", file.display()));

        let special_map = read_json(&path.join("special_tokens_map.json"))?.unwrap_or_default();
        let model_config = read_json(&path.join("config.json"))?.unwrap_or_default();
        let generation = read_json(&path.join("generation_config.json"))?;
        let mut named_tokens = named_tokens(&special_map, &config);
        for (role, token) in built_in {
            named_tokens.entry(role).or_insert(token);
        }
        // An original's vocabulary has the configuration's tokens already, at the ids that it gives.
        let listed = if file.ends_with("tokenizer.json") { &config } else { &Value::Null };
        add_missing_tokens(&mut inner, listed, &named_tokens).map_err(|error| unusable(&error))?;

        let id_of = |name: &str| named_tokens.get(name).and_then(|token| inner.token_to_id(token));
        let id_in = |config: &Value, key: &str| ids_of(&config[key]).first().copied();
        let bos = id_of("bos_token")
            .or_else(|| generation.as_ref().and_then(|generation| id_in(generation, "bos_token_id")))
            .or_else(|| id_in(&model_config, "bos_token_id"));
        let main_eos = id_of("eos_token");
        let listed = ids_of(&generation.as_ref().unwrap_or(&model_config)["eos_token_id"]);
        let eos: Vec<u32> = main_eos.into_iter().chain(listed).collect();
        if inner.get_post_processor().is_some() {
            (add_bos, add_eos) = (false, false);
        }
        let prefix = bos.filter(|_| add_bos);
        let suffix = main_eos.or(eos.first().copied()).filter(|_| add_eos);
        Self::assemble(inner, Specials { bos, eos, prefix, suffix, named_tokens }).map_err(|error| unusable(&error))
    }

    /// A GGUF file's vocabulary.
    pub fn from_gguf(file: &GgufFile) -> Result<Self, EngineError> {
        Self::from_vocabulary(&GgufVocabulary::from_file(file)?)
    }

    /// The same from a vocabulary in memory. See [`GgufVocabulary`] for the kinds that are known.
    pub fn from_vocabulary(vocabulary: &GgufVocabulary) -> Result<Self, EngineError> {
        let built: BuiltVocabulary = vocabulary.build()?;
        let named_tokens = built.named_tokens(vocabulary);
        let specials = Specials {
            bos: built.bos,
            prefix: built.bos.filter(|_| built.add_bos),
            suffix: built.main_eos.filter(|_| built.add_eos),
            eos: built.eos,
            named_tokens,
        };
        Self::assemble(built.tokenizer, specials)
            .map_err(|error| EngineError::Text(format!("the GGUF file's vocabulary is unusable: {error}")))
    }

    /// Fills the table and the flags from a finished `tokenizers` tokenizer.
    fn assemble(inner: tokenizers::Tokenizer, specials: Specials) -> Result<Self, String> {
        let Specials { bos, mut eos, prefix, suffix, named_tokens } = specials;
        let decoder = inner.get_decoder().map_or(Ok(DecoderKind::Opaque), |decoder| {
            serde_json::to_value(decoder).map(|decoder| DecoderKind::of(&decoder)).map_err(|error| error.to_string())
        })?;
        let shrink = inner.get_normalizer().map_or(Ok(Some(Shrink::none())), |normalizer| {
            serde_json::to_value(normalizer)
                .map(|normalizer| Shrink::of(&normalizer))
                .map_err(|error| error.to_string())
        })?;

        let vocabulary = inner.get_vocab(true);
        let num_ids = vocabulary.values().max().map_or(0, |&id| id as usize + 1);
        if num_ids == 0 || num_ids > MAX_TOKENS {
            return Err(format!("its token ids reach {num_ids}, allowed are 1 to {MAX_TOKENS}"));
        }
        let num_bytes: usize = vocabulary.keys().map(String::len).sum();
        if num_bytes > MAX_VOCABULARY_BYTES {
            return Err(format!("its tokens have {num_bytes} bytes of names, the limit is {MAX_VOCABULARY_BYTES}"));
        }
        let mut names: Vec<Option<&str>> = vec![None; num_ids];
        for (name, &id) in &vocabulary {
            names[id as usize] = Some(name);
        }
        let added = inner.get_added_tokens_decoder();
        let mut table = TokenTable::default();
        for (id, name) in names.into_iter().enumerate() {
            // An added token may rename an id of the model's own vocabulary; decoding uses the added name.
            let added = added.get(&(id as u32));
            let name = added.map_or(name, |added| Some(added.content.as_str()));
            let (bytes, is_fragment) = name.map(|name| decoder.bytes_of(name)).unwrap_or_default();
            table.push(name.map(|name| (name, &bytes[..])), added.is_some_and(|added| added.special), is_fragment);
        }
        eos.sort_unstable();
        eos.dedup();
        Ok(Self {
            inner,
            table,
            decoder,
            bos: bos.map(TokenId),
            eos: eos.into_iter().map(TokenId).collect(),
            prefix: prefix.map(TokenId),
            suffix: suffix.map(TokenId),
            named_tokens,
            shrink,
        })
    }

    /// The tokens of a text. `add_special_tokens` puts the model's own beginning (and end) around it, as for a plain
    /// prompt; a rendered chat template brings its own. Bytes that the vocabulary cannot spell are dropped, or become
    /// its unknown token where it has one, as in transformers.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, EngineError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(EngineError::Invalid {
                param: "prompt",
                message: format!("The text has {} bytes, the limit is {MAX_TEXT_BYTES}: send less text", text.len()),
            });
        }
        // The regex engine panics when it gives up on a text (its retry limit); that is the text's fault.
        let encoding = catch_unwind(AssertUnwindSafe(|| self.inner.encode_fast(text, add_special_tokens)))
            .map_err(|_| "a run of equal characters is too long to be cut into words".to_owned())
            .and_then(|encoding| encoding.map_err(|error| error.to_string()))
            .map_err(|reason| EngineError::Invalid {
                param: "prompt",
                message: format!("The text cannot be tokenised: {reason}"),
            })?;
        let prefix = self.prefix.filter(|_| add_special_tokens);
        let suffix = self.suffix.filter(|_| add_special_tokens);
        let ids = encoding.get_ids();
        let mut tokens = Vec::with_capacity(ids.len() + 2);
        tokens.extend(prefix);
        tokens.extend(ids.iter().copied().map(TokenId));
        tokens.extend(suffix);
        Ok(tokens)
    }

    /// The text of a whole sequence. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary are nothing.
    pub fn decode(&self, tokens: &[TokenId], skip_special_tokens: bool) -> Result<String, EngineError> {
        let Some(mut stream) = ByteStream::new(self.decoder) else {
            let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
            return self.decode_opaque(&ids, skip_special_tokens);
        };
        let mut text = String::new();
        for &token in tokens {
            if let Some(piece) = self.text_piece(token, skip_special_tokens) {
                stream.push(piece, &mut text);
            }
        }
        stream.finish(&mut text);
        Ok(text)
    }

    /// `tokenizers`' own decoding.
    pub(crate) fn decode_opaque(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, EngineError> {
        let failed = |reason: String| EngineError::Text(format!("the tokens cannot be decoded: {reason}"));
        catch_unwind(AssertUnwindSafe(|| self.inner.decode(ids, skip_special_tokens)))
            .map_err(|_| failed("the tokenizer's decoder fails on them".to_owned()))?
            .map_err(|error| failed(error.to_string()))
    }

    /// What a token adds to a text; nothing for a hole in the vocabulary and for a special token that is to be skipped.
    pub(crate) fn text_piece(&self, token: TokenId, skip_special_tokens: bool) -> Option<TokenPiece<'_>> {
        self.table.piece(token).filter(|_| !(skip_special_tokens && self.table.is_special(token)))
    }

    pub(crate) fn decoder(&self) -> DecoderKind {
        self.decoder
    }

    /// The raw bytes one token stands for (special tokens: their text); empty for an id outside the vocabulary.
    pub fn token_bytes(&self, token: TokenId) -> &[u8] {
        self.table.piece(token).map_or(&[], |piece| piece.bytes)
    }

    /// Whether [`Tokenizer::token_bytes`] of a sequence's tokens, put together, are its text.
    pub fn spells_bytes(&self) -> bool {
        self.decoder != DecoderKind::Opaque
    }

    /// As it stands in the vocabulary ("Ġthe", "<|im_end|>").
    pub fn token_str(&self, token: TokenId) -> Option<&str> {
        self.table.name(token)
    }

    /// The id of a token by its name in the vocabulary.
    pub fn token_id(&self, name: &str) -> Option<TokenId> {
        self.inner.token_to_id(name).map(TokenId)
    }

    /// Whether `skip_special_tokens` leaves it out of an answer.
    pub fn is_special(&self, token: TokenId) -> bool {
        self.table.is_special(token)
    }

    /// One more than the largest id. A model's output may have more rows (padding), never tokens.
    pub fn vocab_size(&self) -> usize {
        self.table.len()
    }

    /// Begins a sequence.
    pub fn bos_token_id(&self) -> Option<TokenId> {
        self.bos
    }

    /// All tokens that end a generation, ascending.
    pub fn eos_token_ids(&self) -> &[TokenId] {
        &self.eos
    }

    /// `bos_token`, `eos_token` and their like by the names that templates use, with the tokens' text.
    pub fn named_tokens(&self) -> &BTreeMap<String, String> {
        &self.named_tokens
    }

    /// Lower bound of a text's tokens (by the longest token), to refuse a giant prompt before tokenising it. It counts on
    /// every byte that normalisation leaves being spelled: a text made of characters that the vocabulary drops, or of white
    /// space that an added token swallows, may take fewer.
    pub fn min_tokens_for(&self, text: &str) -> usize {
        match &self.shrink {
            Some(shrink) => shrink.kept_bytes(text).div_ceil(self.table.num_bytes_max().max(1)),
            None => usize::from(!text.is_empty()),
        }
    }
}

/// What a model folder's tokenizer file holds.
struct Folder {
    inner: tokenizers::Tokenizer,
    file: PathBuf,
    /// Tokens with a role that the file itself names.
    built_in: BTreeMap<String, String>,
    add_bos: bool,
    add_eos: bool,
}

impl Folder {
    fn open(path: &Path, config: &Value) -> Result<Self, EngineError> {
        let file = path.join("tokenizer.json");
        let Some(bytes) = read_bounded(&file, MAX_TOKENIZER_FILE_BYTES)? else {
            return Self::open_original(path, config);
        };
        let unusable =
            |what: &dyn std::fmt::Display| EngineError::Text(format!("{} is unusable: {what}", file.display()));
        // Broken merges make the crate index out of bounds, so a panic counts as a broken file.
        let mut inner = catch_unwind(|| tokenizers::Tokenizer::from_bytes(&bytes))
            .map_err(|_| unusable(&"its vocabulary and merges contradict each other"))?
            .map_err(|error| unusable(&error))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| unusable(&error))?;
        let adds = |key: &str| config[key] == Value::Bool(true);
        let (add_bos, add_eos) = (adds("add_bos_token"), adds("add_eos_token"));
        Ok(Self { inner, file, built_in: BTreeMap::new(), add_bos, add_eos })
    }

    fn open_original(path: &Path, config: &Value) -> Result<Self, EngineError> {
        let Some((vocabulary, file)) = original::read(path, config)? else {
            let missing = path.join("tokenizer.json");
            return Err(EngineError::Text(format!("{} is missing: {}", missing.display(), original::advice(path))));
        };
        let built = vocabulary.build().map_err(|error| {
            let text = error.to_string();
            EngineError::Text(format!("{} is unusable: its {}", file.display(), text.trim_start_matches(COMPLAINT)))
        })?;
        let built_in = built.named_tokens(&vocabulary);
        // The first token may be one that only the configuration names.
        let (add_bos, add_eos) = (vocabulary.add_bos.unwrap_or(built.add_bos), built.add_eos);
        Ok(Self { inner: built.tokenizer, file, built_in, add_bos, add_eos })
    }
}

/// What a tokenizer says about the tokens around a text.
struct Specials {
    bos: Option<u32>,
    eos: Vec<u32>,
    prefix: Option<u32>,
    suffix: Option<u32>,
    named_tokens: BTreeMap<String, String>,
}

/// A file's bytes, `None` if there is no such file.
pub(crate) fn read_bounded(path: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>, EngineError> {
    let failed = |error: std::io::Error| EngineError::Text(format!("{} cannot be read: {error}", path.display()));
    let num_bytes = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    if num_bytes > max_bytes {
        return Err(EngineError::Text(format!(
            "{} has {num_bytes} bytes, the limit is {max_bytes}: it is not a file of this kind",
            path.display()
        )));
    }
    std::fs::read(path).map(Some).map_err(failed)
}

/// A small JSON file, `None` if there is no such file.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>, EngineError> {
    read_bounded(path, MAX_CONFIG_FILE_BYTES)?
        .map(|bytes| serde_json::from_slice(&bytes))
        .transpose()
        .map_err(|error| EngineError::Text(format!("{} is no valid JSON: {error}", path.display())))
}

/// A token id or a list of them.
fn ids_of(value: &Value) -> Vec<u32> {
    let single = std::slice::from_ref(value);
    let values = value.as_array().map_or(single, Vec::as_slice);
    values.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).collect()
}

/// A token's text: plain, or an object with `content`.
fn text_of(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// The tokens with a role, from both files; `tokenizer_config.json` has the last word.
fn named_tokens(special_map: &Value, config: &Value) -> BTreeMap<String, String> {
    const ROLES: [&str; 7] =
        ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
    let mut named = BTreeMap::new();
    for source in [special_map, config] {
        for role in ROLES {
            if let Some(text) = text_of(&source[role]) {
                named.insert(role.to_owned(), text.to_owned());
            }
        }
    }
    named
}

/// transformers adds what `tokenizer_config.json` lists and `tokenizer.json` lacks: `added_tokens_decoder` by id, then
/// the tokens with a role, which are always special.
fn add_missing_tokens(
    inner: &mut tokenizers::Tokenizer,
    config: &Value,
    named_tokens: &BTreeMap<String, String>,
) -> tokenizers::Result<()> {
    let present = inner.get_added_vocabulary().get_vocab().clone();
    let mut listed: Vec<(u64, AddedToken)> = Vec::new();
    for (id, token) in config["added_tokens_decoder"].as_object().into_iter().flatten() {
        let (Ok(id), Some(content)) = (id.parse(), token["content"].as_str()) else { continue };
        let flag = |name: &str, default: bool| token[name].as_bool().unwrap_or(default);
        let special = flag("special", false);
        let added = AddedToken::from(content, special)
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !special));
        listed.push((id, added));
    }
    listed.sort_by_key(|(id, _)| *id);
    let mut missing: Vec<AddedToken> = listed.into_iter().map(|(_, token)| token).collect();
    missing.extend(named_tokens.values().map(|content| AddedToken::from(content.as_str(), true)));
    missing.retain(|token| !present.contains_key(&token.content));
    let mut seen = std::collections::BTreeSet::new();
    missing.retain(|token| seen.insert(token.content.clone()));
    if !missing.is_empty() {
        inner.add_tokens(missing)?;
    }
    Ok(())
}
