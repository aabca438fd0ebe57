//! From token bytes to text: which kind of decoder a tokenizer has, and the state that turns a stream of byte pieces
//! into whole characters.
//!
//! It must not know requests or stop strings. Invariant: what comes out depends on the pieces alone, never on how many
//! were pushed at once, so decoding a sequence whole and decoding it token by token give the same text.

use super::token_table::TokenPiece;

/// How a tokenizer's decoder turns tokens into bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DecoderKind {
    /// GPT-2's alphabet of 256 visible characters, one a byte. All pieces are joined, then read as UTF-8.
    ByteLevel,
    /// SentencePiece: `▁` is a space, `<0xE2>` a byte, and one leading space of the whole text may be dropped.
    ByteFallback {
        /// Drops the space that encoding put before the text.
        strip_first_space: bool,
    },
    /// Any other: only `tokenizers` itself can decode it.
    Opaque,
}

impl DecoderKind {
    /// Recognises the two byte-exact kinds in a serialised `tokenizers` decoder.
    pub(crate) fn of(decoder: &serde_json::Value) -> Self {
        match decoder["type"].as_str() {
            Some("ByteLevel") => Self::ByteLevel,
            Some("Sequence") => Self::of_sequence(decoder["decoders"].as_array().map_or(&[], Vec::as_slice)),
            _ => Self::Opaque,
        }
    }

    /// SentencePiece's decoder: `▁` replaced, bytes joined, all fused, and then perhaps the first space stripped.
    fn of_sequence(stages: &[serde_json::Value]) -> Self {
        let mut replaces = false;
        let mut joins_bytes = false;
        let mut fuses = false;
        let mut strip_first_space = false;
        for stage in stages {
            match stage["type"].as_str() {
                Some("ByteLevel") if stages.len() == 1 => return Self::ByteLevel,
                Some("Replace") if !replaces && stage["pattern"]["String"] == METASPACE && stage["content"] == " " => {
                    replaces = true;
                }
                Some("ByteFallback") if !fuses => joins_bytes = true,
                Some("Fuse") => fuses = true,
                Some("Strip") if fuses && stage["content"] == " " && stage["stop"] == 0 => {
                    match stage["start"].as_u64() {
                        Some(0) => {}
                        Some(1) if !strip_first_space => strip_first_space = true,
                        _ => return Self::Opaque,
                    }
                }
                _ => return Self::Opaque,
            }
        }
        if replaces && joins_bytes && fuses { Self::ByteFallback { strip_first_space } } else { Self::Opaque }
    }

    /// The bytes a token stands for, and whether they may be part of a character.
    pub(crate) fn bytes_of(self, name: &str) -> (Vec<u8>, bool) {
        match self {
            Self::ByteLevel => {
                let mapped: Option<Vec<u8>> = name.chars().map(byte_of_char).collect();
                (mapped.unwrap_or_else(|| name.as_bytes().to_vec()), true)
            }
            Self::ByteFallback { .. } => match byte_of_name(name) {
                Some(byte) => (vec![byte], true),
                None => (name.replace(METASPACE, " ").into_bytes(), false),
            },
            Self::Opaque => (name.replace(METASPACE, " ").into_bytes(), false),
        }
    }
}

/// SentencePiece's visible space.
pub(crate) const METASPACE: &str = "\u{2581}";

/// The byte that a character of GPT-2's byte-level alphabet stands for. Visible Latin-1 characters stand for
/// themselves; the 68 other bytes are numbered upwards from U+0100 in ascending order.
pub(crate) fn byte_of_char(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121) as u8 + 0x7f),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// The character of GPT-2's byte-level alphabet that stands for a byte.
pub(crate) fn char_of_byte(byte: u8) -> char {
    let code = u32::from(byte);
    let code = match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x00..=0x20 => 0x100 + code,
        0x7f..=0xa0 => 0x121 + code - 0x7f,
        0xad => 0x143,
    };
    char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The byte that a SentencePiece byte token names, as `tokenizers` reads such names.
pub(crate) fn byte_of_name(name: &str) -> Option<u8> {
    let digits = name.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Turns pieces into text, one at a time. Holds at most three bytes: the beginning of a character.
#[derive(Clone, Debug)]
pub(crate) struct ByteStream {
    pending: Vec<u8>,
    /// The next character that comes out is the first of the sequence and is dropped if it is a space.
    strip_next_space: bool,
    invalid: InvalidBytes,
}

/// How many U+FFFD stand for bytes that are not UTF-8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum InvalidBytes {
    /// One for each longest beginning of a character (Unicode's recommendation, Rust's and Python's lossy decoding).
    OnePerSequence,
    /// One for each byte, as SentencePiece does.
    OnePerByte,
}

impl ByteStream {
    /// The state at the start of a sequence; `None` for a kind that has no byte-exact rule.
    pub(crate) fn new(kind: DecoderKind) -> Option<Self> {
        let (strip_next_space, invalid) = match kind {
            DecoderKind::ByteLevel => (false, InvalidBytes::OnePerSequence),
            DecoderKind::ByteFallback { strip_first_space } => (strip_first_space, InvalidBytes::OnePerByte),
            DecoderKind::Opaque => return None,
        };
        Some(Self { pending: Vec::new(), strip_next_space, invalid })
    }

    /// Appends to `out` what became final with this piece.
    pub(crate) fn push(&mut self, piece: TokenPiece<'_>, out: &mut String) {
        if piece.bytes.is_empty() {
            return;
        }
        if !piece.is_fragment {
            self.finish(out);
        }
        let start = out.len();
        let joined;
        let mut rest = if self.pending.is_empty() {
            piece.bytes
        } else {
            self.pending.extend_from_slice(piece.bytes);
            joined = std::mem::take(&mut self.pending);
            &joined[..]
        };
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    out.push_str(&String::from_utf8_lossy(valid));
                    let Some(num_invalid) = error.error_len() else {
                        self.pending = after.to_vec();
                        break;
                    };
                    self.replace(num_invalid, out);
                    rest = &after[num_invalid..];
                }
            }
        }
        self.strip(start, out);
    }

    /// Appends what was held back: at the end of a sequence the beginning of a character is invalid.
    pub(crate) fn finish(&mut self, out: &mut String) {
        let start = out.len();
        let num_invalid = std::mem::take(&mut self.pending).len();
        if num_invalid > 0 {
            self.replace(num_invalid, out);
        }
        self.strip(start, out);
    }

    /// Marks that text stands before this point, so that a space here is an ordinary space.
    pub(crate) fn continue_after_text(&mut self) {
        self.strip_next_space = false;
    }

    fn replace(&self, num_invalid: usize, out: &mut String) {
        let num_marks = match self.invalid {
            InvalidBytes::OnePerSequence => 1,
            InvalidBytes::OnePerByte => num_invalid,
        };
        out.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, num_marks));
    }

    fn strip(&mut self, start: usize, out: &mut String) {
        if self.strip_next_space && out.len() > start {
            self.strip_next_space = false;
            if out[start..].starts_with(' ') {
                out.remove(start);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        for byte in 0..=255 {
            assert_eq!(byte_of_char(char_of_byte(byte)), Some(byte));
        }
        assert_eq!((0..0x11_0000).filter_map(char::from_u32).filter_map(byte_of_char).count(), 256);
        assert_eq!(char_of_byte(b' '), 'Ġ');
        assert_eq!(char_of_byte(b'\n'), 'Ċ');
    }

    proptest! {
        /// Any cut of any bytes gives what Rust's lossy decoding gives for all of them.
        #[test]
        fn byte_level_pieces_decode_as_the_whole(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..5), 0..40)) {
            let mut stream = ByteStream::new(DecoderKind::ByteLevel).unwrap();
            let mut out = String::new();
            for piece in &pieces {
                stream.push(TokenPiece { bytes: piece, is_fragment: true }, &mut out);
                prop_assert!(stream.pending.len() < 4);
            }
            stream.finish(&mut out);
            prop_assert_eq!(out, String::from_utf8_lossy(&pieces.concat()).into_owned());
        }

        /// Characters cut anywhere come out whole, and never before they are complete.
        #[test]
        fn valid_text_survives_any_cut(text in "\\PC*", cuts in prop::collection::vec(1_usize..4, 1..200)) {
            let mut stream = ByteStream::new(DecoderKind::ByteLevel).unwrap();
            let mut out = String::new();
            let mut rest = text.as_bytes();
            for &cut in cuts.iter().cycle().take(text.len()) {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                stream.push(TokenPiece { bytes: piece, is_fragment: true }, &mut out);
                prop_assert!(text.starts_with(&out));
                rest = after;
            }
            stream.finish(&mut out);
            prop_assert_eq!(out, text);
        }
    }
}
