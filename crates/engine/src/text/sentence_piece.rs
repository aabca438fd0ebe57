//! SentencePiece's ways of cutting text, as `tokenizers` models: merging by score, merging by a list over characters, and
//! the likeliest path of a unigram model.
//!
//! It must not know files or roles of tokens; it sees names, scores and kinds that are already checked
//! ([`GgufVocabulary`]). Spaces are written as `▁` and merge like any character, so nothing is split beforehand.
//! Sources: Kudo and Richardson 2018 (SentencePiece); its normalizer's and encoders' published code for the order of
//! steps; transformers' converters for how `tokenizers` says the same.
//!
//! Invariant: decoding is [`super::decoder::DecoderKind::ByteFallback`], so a stream of tokens gives the whole's bytes.

use rustc_hash::FxHashMap;
use tokenizers::{
    DecoderWrapper, ModelWrapper, NormalizerWrapper, Tokenizer,
    decoders::{byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as Decoders, strip::Strip},
    models::{
        bpe::{BPE, Merges},
        unigram::Unigram,
    },
    normalizers::{Precompiled, Prepend, Replace, Sequence as Normalizers, replace::ReplacePattern},
    pre_tokenizers::metaspace::{Metaspace, PrependScheme},
};

use super::{
    decoder::METASPACE,
    gguf_vocabulary::{GgufVocabulary, MAX_MERGES, SpacePrefix, TokenKind, wrong},
};
use crate::EngineError;

/// Longest name of a SentencePiece token whose splits are tried; published ones stay below 200 bytes.
const MAX_PIECE_BYTES: usize = 1024;
/// Score of unigram tokens that no text is cut into (bytes, markers, padding): below any path of real ones.
const OUT_OF_REACH: f64 = -1e4;

/// SentencePiece BPE: the adjacent pair whose joined piece scores highest is merged first, so every split of every piece
/// into two pieces is a merge, ranked by the score of what it makes. Splits of one piece rank longer left part first, as
/// in transformers' conversion of the same vocabularies.
pub(crate) fn merged_by_score(vocabulary: &GgufVocabulary, kinds: &[TokenKind]) -> Result<Tokenizer, EngineError> {
    check_scores(vocabulary)?;
    let pieces: FxHashMap<&str, u32> = (vocabulary.tokens.iter().enumerate())
        .filter(|(id, token)| kinds[*id] == TokenKind::Normal && !token.is_empty())
        .map(|(id, token)| (token.as_str(), id as u32))
        .collect();
    let mut splits: Vec<(f32, &str, &str)> = Vec::new();
    for (&piece, &id) in &pieces {
        if piece.len() > MAX_PIECE_BYTES {
            let num_bytes = piece.len();
            return Err(wrong("tokens", format!("entry {id} has {num_bytes} bytes, the limit is {MAX_PIECE_BYTES}")));
        }
        for (cut, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(cut);
            if pieces.contains_key(left) && pieces.contains_key(right) {
                splits.push((vocabulary.scores[id as usize], left, right));
            }
        }
        if splits.len() > MAX_MERGES {
            return Err(wrong("tokens", format!("can be split in more than {MAX_MERGES} ways")));
        }
    }
    splits.sort_unstable_by(|a, b| {
        let by_score = b.0.total_cmp(&a.0);
        by_score.then(b.1.len().cmp(&a.1.len())).then(b.2.len().cmp(&a.2.len())).then((a.1, a.2).cmp(&(b.1, b.2)))
    });
    let merges = splits.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect();
    with_byte_fallback(vocabulary, kinds, merges)
}

/// BPE over characters with the merges listed, best first (Gemma 4).
pub(crate) fn merged_by_list(
    vocabulary: &GgufVocabulary,
    kinds: &[TokenKind],
    merges: Merges,
) -> Result<Tokenizer, EngineError> {
    with_byte_fallback(vocabulary, kinds, merges)
}

fn with_byte_fallback(
    vocabulary: &GgufVocabulary,
    kinds: &[TokenKind],
    merges: Merges,
) -> Result<Tokenizer, EngineError> {
    let mut builder =
        BPE::builder().vocab_and_merges(vocabulary.ids_by_name(), merges).byte_fallback(true).fuse_unk(true);
    if let Some(id) = unknown_id(vocabulary, kinds)?.filter(|&id| !vocabulary.tokens[id].is_empty()) {
        builder = builder.unk_token(vocabulary.tokens[id].clone());
    }
    let model = builder.build().map_err(|error| wrong("tokens", format!("do not merge: {error}")))?;
    assemble(vocabulary, ModelWrapper::BPE(model))
}

/// Unigram: the path of pieces with the highest sum of scores (log-probabilities).
pub(crate) fn likeliest_path(vocabulary: &GgufVocabulary, kinds: &[TokenKind]) -> Result<Tokenizer, EngineError> {
    check_scores(vocabulary)?;
    let has_bytes = kinds.contains(&TokenKind::Byte);
    let mut pieces = Vec::with_capacity(vocabulary.tokens.len());
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if token.is_empty() {
            return Err(wrong("tokens", format!("entry {id} is empty, which a unigram vocabulary cannot have")));
        }
        let is_text = matches!(kinds[id], TokenKind::Normal | TokenKind::UserDefined);
        pieces.push((token.clone(), if is_text { f64::from(vocabulary.scores[id]) } else { OUT_OF_REACH }));
    }
    let unknown = unknown_id(vocabulary, kinds)?;
    if unknown.is_none() && !has_bytes {
        return Err(wrong("unknown_token_id", "is missing, and there are no byte tokens: some texts have no tokens"));
    }
    let model = Unigram::from(pieces, unknown, has_bytes)
        .map_err(|error| wrong("tokens", format!("are no unigram model: {error}")))?;
    assemble(vocabulary, ModelWrapper::Unigram(model))
}

fn unknown_id(vocabulary: &GgufVocabulary, kinds: &[TokenKind]) -> Result<Option<usize>, EngineError> {
    let unknown = vocabulary.unknown_id()?.map(|id| id as usize);
    Ok(unknown.or_else(|| kinds.iter().position(|&kind| kind == TokenKind::Unknown)))
}

fn check_scores(vocabulary: &GgufVocabulary) -> Result<(), EngineError> {
    if vocabulary.scores.len() != vocabulary.tokens.len() {
        let (num_scores, num_tokens) = (vocabulary.scores.len(), vocabulary.tokens.len());
        return Err(wrong("scores", format!("has {num_scores} entries for {num_tokens} tokens")));
    }
    if let Some(id) = vocabulary.scores.iter().position(|score| score.is_nan()) {
        return Err(wrong("scores", format!("is not a number for token {id}")));
    }
    Ok(())
}

/// Spaces that `remove_extra_whitespaces` takes away. (`^` and `$` would be ends of lines.)
pub(super) const EDGE_SPACES: &str = r"\A +| +\z";
/// Spaces of which it leaves one.
pub(super) const SPACE_RUNS: &str = " {2,}";

/// The steps around the model, in SentencePiece's order: characters mapped, superfluous spaces dropped, one space put
/// before the text, spaces made visible.
fn assemble(vocabulary: &GgufVocabulary, model: ModelWrapper) -> Result<Tokenizer, EngineError> {
    let mut tokenizer = Tokenizer::new(model);
    let prefix = vocabulary.space_prefix();
    let mut stages: Vec<NormalizerWrapper> = Vec::new();
    if !vocabulary.precompiled_charsmap.is_empty() {
        check_charsmap(&vocabulary.precompiled_charsmap)?;
        let map = Precompiled::from(&vocabulary.precompiled_charsmap)
            .map_err(|error| wrong("precompiled_charsmap", format!("is unusable: {error}")))?;
        stages.push(map.into());
    }
    let replace = |pattern: ReplacePattern, by: &str| {
        Replace::new(pattern, by).map(NormalizerWrapper::from).map_err(|error| wrong("model", error))
    };
    if vocabulary.remove_extra_whitespaces.unwrap_or(false) {
        stages.push(replace(ReplacePattern::Regex(EDGE_SPACES.to_owned()), "")?);
        stages.push(replace(ReplacePattern::Regex(SPACE_RUNS.to_owned()), " ")?);
    }
    if prefix == SpacePrefix::EachSection {
        stages.push(Prepend::new(METASPACE.to_owned()).into());
    }
    if prefix == SpacePrefix::FirstSection {
        let visible = METASPACE.chars().next().unwrap_or(' ');
        tokenizer.with_pre_tokenizer(Some(Metaspace::new(visible, PrependScheme::First, false)));
    } else {
        stages.push(replace(ReplacePattern::String(" ".to_owned()), METASPACE)?);
    }
    let normalizer: Option<NormalizerWrapper> = match (stages.len(), stages.pop()) {
        (1, only) => only,
        (_, Some(last)) => {
            stages.push(last);
            Some(Normalizers::new(stages).into())
        }
        (_, None) => None,
    };
    tokenizer.with_normalizer(normalizer).map_err(|error| wrong("model", error))?;
    let spaces = Replace::new(METASPACE, " ").map_err(|error| wrong("model", error))?;
    let mut decoders: Vec<DecoderWrapper> = vec![spaces.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix != SpacePrefix::None {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    Ok(tokenizer)
}

fn check_charsmap(map: &[u8]) -> Result<(), EngineError> {
    walk_charsmap(map, |_, _| ()).map_err(|what| wrong("precompiled_charsmap", format!("is broken: {what}")))
}

/// A character map is a little-endian length, that many bytes of a double-array trie, and texts that end with a zero
/// byte. The reader indexes without checks, so every step that a text can take is taken here once. `visit` is given what is
/// replaced (its first four bytes) and the texts from its replacement on.
pub(super) fn walk_charsmap(map: &[u8], mut visit: impl FnMut(&[u8], &[u8])) -> Result<(), &'static str> {
    let Some((header, rest)) = map.split_first_chunk::<4>() else { return Err("it has no length") };
    let num_bytes = u32::from_le_bytes(*header) as usize;
    if num_bytes == 0 || !num_bytes.is_multiple_of(4) || num_bytes > rest.len() {
        return Err("its trie is longer than the map, or empty");
    }
    let (trie, texts) = rest.split_at(num_bytes);
    let units: Vec<u32> =
        trie.chunks_exact(4).map(|unit| u32::from_le_bytes([unit[0], unit[1], unit[2], unit[3]])).collect();
    let Ok(texts) = std::str::from_utf8(texts) else { return Err("its texts are not UTF-8") };
    // Where the children of a node begin: its offset, moved by its own place.
    let offset = |unit: u32| ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize;
    let mut is_seen = vec![false; units.len()];
    let mut pending = vec![(offset(units[0]), [0; 4], 0)];
    while let Some((node, key, key_len)) = pending.pop() {
        // A text's next byte may be any, and all 256 places share the node's upper bits.
        if node | 0xff >= units.len() {
            return Err("a node lies outside the trie");
        }
        for byte in 1..=u8::MAX {
            let place = node ^ usize::from(byte);
            let unit = units[place];
            if unit & (1 << 31 | 0xff) != u32::from(byte) || std::mem::replace(&mut is_seen[place], true) {
                continue;
            }
            let next = place ^ offset(unit);
            if next >= units.len() {
                return Err("a node lies outside the trie");
            }
            let (mut key, key_len) = (key, key_len + 1);
            if let Some(last) = key.get_mut(key_len - 1) {
                *last = byte;
            }
            if unit >> 8 & 1 == 1 {
                let Some(replacement) = texts.get((units[next] & ((1 << 31) - 1)) as usize..) else {
                    return Err("a replacement lies outside the texts");
                };
                visit(&key[..key_len.min(key.len())], replacement.as_bytes());
            }
            pending.push((next, key, key_len));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_character_maps_are_refused() {
        let map = |trie: &[u32], texts: &[u8]| {
            let length = (trie.len() as u32 * 4).to_le_bytes();
            let trie = trie.iter().flat_map(|unit| unit.to_le_bytes());
            length.into_iter().chain(trie).chain(texts.iter().copied()).collect::<Vec<u8>>()
        };
        let refused = |map: &[u8]| check_charsmap(map).unwrap_err().to_string();
        assert!(refused(&[1, 2]).contains("no length"));
        assert!(refused(&[0, 0, 0, 0]).contains("empty"));
        assert!(refused(&u32::MAX.to_le_bytes()).contains("longer"));
        assert!(refused(&map(&[1 << 10], b"")).contains("outside the trie"));
        // An empty trie that covers every byte, then one with 'a' that leads astray, then one with a far replacement.
        let mut trie = vec![0_u32; 512];
        trie[0] = 256 << 10;
        assert!(check_charsmap(&map(&trie, b"")).is_ok());
        trie[256 ^ 0x61] = 0x61 | 0x7fff << 10;
        assert!(refused(&map(&trie, b"")).contains("outside the trie"));
        trie[256 ^ 0x61] = 0x61 | 1 << 8 | 0x61 << 10;
        trie[256] = 7;
        assert!(refused(&map(&trie, b"x\0")).contains("replacement"));
        assert!(check_charsmap(&map(&trie, b"0123456789\0")).is_ok());
        assert!(refused(&map(&trie, b"\xff\0")).contains("UTF-8"));
    }
}
