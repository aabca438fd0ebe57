//! A GGUF file's vocabulary as plain data, and that data as a `tokenizers` tokenizer.
//!
//! GGUF keeps a vocabulary as parallel arrays under `tokenizer.ggml.*` and only names the rules that go with it
//! (keys as in the GGUF specification, kinds as llama.cpp reads them). This file must not know where the data came from:
//! [`GgufVocabulary`] can be filled by hand, so everything below is testable without a model, and `original` fills it from
//! a folder's own files. The data is untrusted; each way it can be wrong is an error that names the key and the entry.
//!
//! Invariant: a tokenizer built here gives token `i` the name `tokens[i]`.

use std::collections::{BTreeMap, BTreeSet, hash_map::Entry};

use bindery_model::weights::gguf::GgufFile;
use rustc_hash::{FxHashMap, FxHashSet};
use tokenizers::{
    AddedToken, ModelWrapper, Tokenizer,
    decoders::byte_level::ByteLevel,
    models::bpe::{BPE, Merges, Vocab},
};

use super::{pre_tokenizer::PreTokenizerRule, sentence_piece};
use crate::EngineError;

/// Most tokens a vocabulary may have: sixteen times the largest published one.
pub const MAX_TOKENS: usize = 1 << 22;
/// Most merges: each makes one token in at most a few ways.
pub const MAX_MERGES: usize = 1 << 24;
/// Most bytes of all token names together.
pub const MAX_VOCABULARY_BYTES: usize = 1 << 28;

/// What a token is for: the values of `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// Made by merging.
    Normal,
    /// Stands for text the vocabulary cannot spell.
    Unknown,
    /// Steers the model; never part of an answer's text.
    Control,
    /// Added text that is one token wherever it stands.
    UserDefined,
    /// Padding of the id space.
    Unused,
    /// One byte of a character that has no token.
    Byte,
}

impl TokenKind {
    fn of(code: i64) -> Option<Self> {
        Some(match code {
            // 0 is "undefined", written by old converters for ordinary tokens.
            0 | 1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

/// The metadata under `tokenizer.ggml.`, unchecked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufVocabulary {
    /// `model`: `gpt2` (byte-level BPE), `llama` (SentencePiece BPE), `gemma4` (BPE over characters with listed merges) or
    /// `t5` (SentencePiece unigram).
    pub model: String,
    /// `pre`: the pre-tokenizer's name (byte-level BPE only).
    pub pre: Option<String>,
    /// `general.architecture`: for what a file says about its vocabulary only by what it is.
    pub architecture: Option<String>,
    /// `tokens`, by id.
    pub tokens: Vec<String>,
    /// `token_type`, by id; empty: all normal.
    pub types: Vec<i64>,
    /// `scores`, by id (SentencePiece only).
    pub scores: Vec<f32>,
    /// `merges`: "left right", best first (`gpt2` and `gemma4`).
    pub merges: Vec<String>,
    /// `bos_token_id`.
    pub bos: Option<u64>,
    /// `eos_token_id`.
    pub eos: Option<u64>,
    /// `eot_token_id`: end of a turn.
    pub eot: Option<u64>,
    /// `eom_token_id`: end of a message that calls a tool.
    pub eom: Option<u64>,
    /// `unknown_token_id`.
    pub unknown: Option<u64>,
    /// `padding_token_id`.
    pub padding: Option<u64>,
    /// `add_bos_token`.
    pub add_bos: Option<bool>,
    /// `add_eos_token`.
    pub add_eos: Option<bool>,
    /// `add_space_prefix` (SentencePiece only).
    pub add_space_prefix: Option<bool>,
    /// False: that space goes only before the whole text, not after special tokens too (transformers' `legacy`).
    pub legacy: Option<bool>,
    /// `remove_extra_whitespaces` (SentencePiece only).
    pub remove_extra_whitespaces: Option<bool>,
    /// `precompiled_charsmap`: SentencePiece's character map, empty for none.
    pub precompiled_charsmap: Vec<u8>,
    /// Added tokens, by id, that swallow the white space after them.
    pub strips_after: BTreeSet<u32>,
}

/// Where SentencePiece's space before a text goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SpacePrefix {
    None,
    /// Before the text and after each special token.
    EachSection,
    FirstSection,
}

/// A tokenizer with what `tokenizers` has no place for.
pub(crate) struct BuiltVocabulary {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) bos: Option<u32>,
    /// Ascending, without repeats.
    pub(crate) eos: Vec<u32>,
    /// `eos_token_id` itself: what `add_eos_token` appends and what templates know as `eos_token`.
    pub(crate) main_eos: Option<u32>,
    pub(crate) padding: Option<u32>,
    pub(crate) unknown: Option<u32>,
    pub(crate) add_bos: bool,
    pub(crate) add_eos: bool,
}

impl BuiltVocabulary {
    /// The tokens with a role, by the names that templates use.
    pub(crate) fn named_tokens(&self, vocabulary: &GgufVocabulary) -> BTreeMap<String, String> {
        let roles = [
            ("bos_token", self.bos),
            ("eos_token", self.main_eos),
            ("unk_token", self.unknown),
            ("pad_token", self.padding),
        ];
        let named = roles.into_iter().filter_map(|(role, id)| Some((role, id?)));
        named.map(|(role, id)| (role.to_owned(), vocabulary.tokens[id as usize].clone())).collect()
    }
}

/// Names under which published models end a turn. A GGUF file often names only one of its ending tokens, while the
/// model's generation_config.json, which it lacks, has them all; so control tokens of these names end a generation too.
const END_NAMES: &[&str] = &[
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|eom|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_utterance>",
    "<EOT>",
    "</s>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// How complaints about a vocabulary begin; the key follows.
pub(crate) const COMPLAINT: &str = "the GGUF file's vocabulary is unusable: tokenizer.ggml.";

pub(crate) fn wrong(key: &str, what: impl std::fmt::Display) -> EngineError {
    EngineError::Text(format!("{COMPLAINT}{key} {what}"))
}

impl GgufVocabulary {
    /// Copies the vocabulary out of a file's metadata.
    pub fn from_file(file: &GgufFile) -> Result<Self, EngineError> {
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let model = file.str(&key("model")).ok_or_else(|| wrong("model", "is missing"))?.to_owned();
        let tokens =
            file.strings(&key("tokens")).ok_or_else(|| wrong("tokens", "is missing or no array of strings"))?;
        let list = |name: &str| file.strings(&key(name)).unwrap_or_default().to_vec();
        let id = |name: &str| file.u64(&key(name));
        // The array's own integers are of 8 bits, signed in some files.
        let charsmap = file.ints(&key("precompiled_charsmap")).unwrap_or_default();
        let mut vocabulary = Self {
            model,
            pre: file.str(&key("pre")).map(str::to_owned),
            architecture: file.str("general.architecture").map(str::to_owned),
            tokens: tokens.to_vec(),
            types: file.ints(&key("token_type")).unwrap_or_default().to_vec(),
            scores: file.floats(&key("scores")).unwrap_or_default().to_vec(),
            merges: list("merges"),
            bos: id("bos_token_id"),
            eos: id("eos_token_id"),
            eot: id("eot_token_id"),
            eom: id("eom_token_id"),
            unknown: id("unknown_token_id"),
            padding: id("padding_token_id"),
            add_bos: file.bool(&key("add_bos_token")),
            add_eos: file.bool(&key("add_eos_token")),
            add_space_prefix: file.bool(&key("add_space_prefix")),
            legacy: None,
            remove_extra_whitespaces: file.bool(&key("remove_extra_whitespaces")),
            precompiled_charsmap: charsmap.iter().map(|&byte| byte as u8).collect(),
            strips_after: BTreeSet::new(),
        };
        vocabulary.fill_in_what_files_leave_out();
        Ok(vocabulary)
    }

    /// What a GGUF file has no key for, or what old files lack.
    fn fill_in_what_files_leave_out(&mut self) {
        if self.model == "llama" {
            // Files from before the keys existed are LLaMA's, whose unknown, first and last tokens are these.
            let is_kind = |id: usize, kind: TokenKind| self.types.get(id).and_then(|&c| TokenKind::of(c)) == Some(kind);
            let missing = |key: Option<u64>, id: usize, kind| key.is_none() && is_kind(id, kind);
            let (unknown, bos, eos) = (
                missing(self.unknown, 0, TokenKind::Unknown),
                missing(self.bos, 1, TokenKind::Control),
                missing(self.eos, 2, TokenKind::Control),
            );
            self.unknown = self.unknown.or(unknown.then_some(0));
            self.bos = self.bos.or(bos.then_some(1));
            self.eos = self.eos.or(eos.then_some(2));
            // Phi-3's tokenizer.json has "rstrip" on its added tokens but for three.
            if self.architecture.as_deref() == Some("phi3") {
                let is_added = |code: &i64| !matches!(TokenKind::of(*code), Some(TokenKind::Normal | TokenKind::Byte));
                let added = self.tokens.iter().zip(&self.types).enumerate().filter(|(_, (_, code))| is_added(code));
                self.strips_after = added
                    .filter(|(_, (token, _))| !["<unk>", "<s>", "<|endoftext|>"].contains(&token.as_str()))
                    .map(|(id, _)| id as u32)
                    .collect();
            }
        }
    }

    /// Checks everything and builds the tokenizer.
    pub(crate) fn build(&self) -> Result<BuiltVocabulary, EngineError> {
        let kinds = self.check()?;
        let (mut tokenizer, add_bos_by_default) = match self.model.as_str() {
            "gpt2" => {
                let rule = PreTokenizerRule::by_name(self.pre.as_deref().or_else(|| self.unwritten_pre()))?;
                (self.build_byte_level(rule)?, rule.add_bos)
            }
            "llama" => (sentence_piece::merged_by_score(self, &kinds)?, true),
            "gemma4" => (sentence_piece::merged_by_list(self, &kinds, self.listed_merges()?)?, true),
            "t5" => (sentence_piece::likeliest_path(self, &kinds)?, false),
            other => {
                return Err(EngineError::Text(format!(
                    "the GGUF file's tokenizer (tokenizer.ggml.model) is {other:?}, which is not known here; known are \
                     gpt2 (byte-level BPE), llama (SentencePiece BPE), gemma4 (BPE over characters) and t5 \
                     (SentencePiece unigram): use the model's folder with tokenizer.json instead"
                )));
            }
        };
        let bos = self.id("bos_token_id", self.bos)?;
        let ends = [("eos_token_id", self.eos), ("eot_token_id", self.eot), ("eom_token_id", self.eom)];
        let mut eos = Vec::new();
        for (key, value) in ends {
            eos.extend(self.id(key, value)?);
        }
        // In the harmony format <|end|> closes one of several messages of an answer, and <|return|> the answer; in Gemma's
        // vocabularies </s> is HTML.
        let has = |name: &str| self.tokens.iter().any(|token| token == name);
        let (has_return, has_turn) = (has("<|return|>"), has("<end_of_turn>") || has("<turn|>"));
        let is_text = |token: &str| (has_return && token == "<|end|>") || (has_turn && token == "</s>");
        for (id, token) in self.tokens.iter().enumerate() {
            let is_added = matches!(kinds[id], TokenKind::Control | TokenKind::UserDefined);
            if is_added && END_NAMES.contains(&token.as_str()) && !is_text(token) {
                eos.push(id as u32);
            }
        }
        eos.sort_unstable();
        eos.dedup();
        self.add_added_tokens(&mut tokenizer, &kinds, bos, &eos)?;
        Ok(BuiltVocabulary {
            tokenizer,
            bos,
            add_bos: self.add_bos.unwrap_or(add_bos_by_default) && bos.is_some(),
            add_eos: self.add_eos.unwrap_or(self.model == "t5"),
            eos,
            main_eos: self.id("eos_token_id", self.eos)?,
            padding: self.id("padding_token_id", self.padding)?,
            unknown: self.unknown_id()?,
        })
    }

    /// `unknown_token_id`, checked.
    pub(crate) fn unknown_id(&self) -> Result<Option<u32>, EngineError> {
        self.id("unknown_token_id", self.unknown)
    }

    /// Only SentencePiece's own model puts a space before a text unless told otherwise.
    pub(crate) fn space_prefix(&self) -> SpacePrefix {
        match (self.add_space_prefix.unwrap_or(self.model != "gemma4"), self.legacy) {
            (false, _) => SpacePrefix::None,
            (true, Some(false)) => SpacePrefix::FirstSection,
            (true, _) => SpacePrefix::EachSection,
        }
    }

    /// Files from before `pre` existed: the family's own rule where the file says which family it is.
    fn unwritten_pre(&self) -> Option<&'static str> {
        Some(match self.architecture.as_deref()? {
            "falcon" => "falcon",
            "qwen2" | "qwen2moe" => "qwen2",
            "starcoder" | "starcoder2" => "starcoder",
            "refact" => "refact",
            "gptneox" | "mpt" => "mpt",
            "command-r" => "command-r",
            "llama" if self.tokens.iter().any(|token| token == "<|begin_of_text|>") => "llama-bpe",
            _ => return None,
        })
    }

    fn id(&self, key: &str, value: Option<u64>) -> Result<Option<u32>, EngineError> {
        match value {
            None => Ok(None),
            Some(id) if id < self.tokens.len() as u64 => Ok(Some(id as u32)),
            // Converters write -1 for "none"; as an unsigned number of 32 or 64 bits.
            Some(id) if id == u64::from(u32::MAX) || id == u64::MAX => Ok(None),
            Some(id) => Err(wrong(key, format!("is {id}, but there are {} tokens", self.tokens.len()))),
        }
    }

    /// Sizes, lengths, repeats; returns the kind of every token.
    fn check(&self) -> Result<Vec<TokenKind>, EngineError> {
        let num_tokens = self.tokens.len();
        if num_tokens == 0 {
            return Err(wrong("tokens", "is empty"));
        }
        if num_tokens > MAX_TOKENS {
            return Err(wrong("tokens", format!("has {num_tokens} entries, the limit is {MAX_TOKENS}")));
        }
        if self.merges.len() > MAX_MERGES {
            return Err(wrong("merges", format!("has {} entries, the limit is {MAX_MERGES}", self.merges.len())));
        }
        let num_bytes: usize = self.tokens.iter().map(String::len).sum();
        if num_bytes > MAX_VOCABULARY_BYTES {
            return Err(wrong(
                "tokens",
                format!("has {num_bytes} bytes of names, the limit is {MAX_VOCABULARY_BYTES}"),
            ));
        }
        let kinds = if self.types.is_empty() {
            vec![TokenKind::Normal; num_tokens]
        } else if self.types.len() == num_tokens {
            let kind = |(id, &code): (usize, &i64)| {
                TokenKind::of(code)
                    .ok_or_else(|| wrong("token_type", format!("is {code} for token {id}, known are 0 to 6")))
            };
            self.types.iter().enumerate().map(kind).collect::<Result<_, _>>()?
        } else {
            let num_types = self.types.len();
            return Err(wrong("token_type", format!("has {num_types} entries for {num_tokens} tokens")));
        };
        let mut seen: FxHashMap<&str, usize> = FxHashMap::default();
        for (id, token) in self.tokens.iter().enumerate().filter(|(_, token)| !token.is_empty()) {
            match seen.entry(token) {
                Entry::Vacant(entry) => {
                    entry.insert(id);
                }
                Entry::Occupied(entry) => {
                    return Err(wrong("tokens", format!("has {token:?} twice, as {} and {id}", entry.get())));
                }
            }
        }
        Ok(kinds)
    }

    /// Name to id. Empty names are holes in the id space, which some converters leave.
    pub(crate) fn ids_by_name(&self) -> Vocab {
        let named = self.tokens.iter().enumerate().filter(|(_, token)| !token.is_empty());
        named.map(|(id, token)| (token.clone(), id as u32)).collect()
    }

    /// `merges`, each cut into its two tokens.
    fn listed_merges(&self) -> Result<Merges, EngineError> {
        let known: FxHashSet<&str> = self.tokens.iter().map(String::as_str).collect();
        let mut merges = Merges::with_capacity(self.merges.len());
        for (index, merge) in self.merges.iter().enumerate() {
            // The left part has at least one character, so a space at the very start belongs to it.
            let first_len = merge.chars().next().map_or(0, char::len_utf8);
            let cut = merge[first_len..].find(' ').map(|at| at + first_len);
            let Some((left, right)) = cut.map(|at| (&merge[..at], &merge[at + 1..])) else {
                return Err(wrong("merges", format!("entry {index} is {merge:?}, which is not two tokens")));
            };
            let joined = format!("{left}{right}");
            if let Some(unknown) = [left, right, &joined].into_iter().find(|part| !known.contains(*part)) {
                return Err(wrong("merges", format!("entry {index} is {merge:?}, but {unknown:?} is no token")));
            }
            merges.push((left.to_owned(), right.to_owned()));
        }
        Ok(merges)
    }

    fn build_byte_level(&self, rule: &PreTokenizerRule) -> Result<Tokenizer, EngineError> {
        let model = BPE::builder()
            .vocab_and_merges(self.ids_by_name(), self.listed_merges()?)
            .ignore_merges(rule.ignore_merges)
            .build()
            .map_err(|error| wrong("merges", format!("do not fit the tokens: {error}")))?;
        let mut tokenizer = Tokenizer::new(ModelWrapper::BPE(model));
        tokenizer.with_normalizer(rule.normalizer()).map_err(|error| wrong("pre", error))?;
        tokenizer.with_pre_tokenizer(Some(rule.pre_tokenizer()?));
        tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
        Ok(tokenizer)
    }

    /// Control and unknown tokens are special (kept out of answers); user-defined ones are ordinary text. All of them
    /// are recognised wherever they stand in a text, as transformers does.
    fn add_added_tokens(
        &self,
        tokenizer: &mut Tokenizer,
        kinds: &[TokenKind],
        bos: Option<u32>,
        eos: &[u32],
    ) -> Result<(), EngineError> {
        let mut added = Vec::new();
        for (id, token) in self.tokens.iter().enumerate().filter(|(_, token)| !token.is_empty()) {
            let is_marker = bos == Some(id as u32) || eos.contains(&(id as u32));
            let is_special = is_marker || matches!(kinds[id], TokenKind::Control | TokenKind::Unknown);
            if is_special || kinds[id] == TokenKind::UserDefined {
                let strips_after = self.strips_after.contains(&(id as u32));
                added.push(AddedToken::from(token.clone(), is_special).normalized(false).rstrip(strips_after));
            }
        }
        tokenizer.add_tokens(added).map_err(|error| wrong("token_type", format!("cannot be applied: {error}")))?;
        Ok(())
    }
}
