//! Reads `tokenizer.model`, SentencePiece's own file: a protocol buffer with pieces, how they were trained, and how text is
//! normalised.
//!
//! Only the fields that say how to cut text are read, by their numbers in sentencepiece_model.proto; all others are
//! skipped. It must not know how the pieces are used. The file is untrusted: every length is checked against what is
//! left, and what is kept is bounded by the file's own size.
//!
//! Invariant: reading ends, with a vocabulary or an error that names the place.

use super::gguf_vocabulary::{GgufVocabulary, MAX_TOKENS};

/// One field of a protocol buffer message.
enum Field<'a> {
    Number(u64),
    Float(f32),
    Bytes(&'a [u8]),
}

/// The fields of one message, in the file's order.
struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0_u64;
        for shift in (0..70).step_by(7) {
            let (&byte, rest) = self.rest.split_first().ok_or("it ends inside a number")?;
            self.rest = rest;
            // The tenth byte holds one bit; what overflows is dropped, as protobuf does.
            value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a number has more than ten bytes".to_owned())
    }

    fn take(&mut self, num_bytes: u64) -> Result<&'a [u8], String> {
        let left = self.rest.len();
        let split = usize::try_from(num_bytes).ok().and_then(|num_bytes| self.rest.split_at_checked(num_bytes));
        let (taken, rest) =
            split.ok_or_else(|| format!("a field of {num_bytes} bytes begins where {left} are left"))?;
        self.rest = rest;
        Ok(taken)
    }

    /// The next field's number and value, `None` at the end.
    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, String> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let field = match key & 7 {
            0 => Field::Number(self.varint()?),
            1 => {
                self.take(8)?;
                Field::Number(0)
            }
            2 => {
                let num_bytes = self.varint()?;
                Field::Bytes(self.take(num_bytes)?)
            }
            5 => {
                let bytes = self.take(4)?;
                Field::Float(f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            }
            other => return Err(format!("a field is of wire type {other}, which SentencePiece does not use")),
        };
        Ok(Some((key >> 3, field)))
    }
}

/// What `TrainerSpec` and `NormalizerSpec` say, with their defaults.
struct Specs {
    model_type: u64,
    unknown: i64,
    bos: i64,
    eos: i64,
    padding: i64,
    /// Spaces stand behind words, or are not escaped.
    has_other_spaces: bool,
    charsmap: Vec<u8>,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
}

/// The vocabulary of a `tokenizer.model`.
pub(crate) fn read(bytes: &[u8]) -> Result<GgufVocabulary, String> {
    let mut vocabulary = GgufVocabulary::default();
    let mut specs = Specs {
        model_type: 1,
        unknown: 0,
        bos: 1,
        eos: 2,
        padding: -1,
        has_other_spaces: false,
        charsmap: Vec::new(),
        add_dummy_prefix: true,
        remove_extra_whitespaces: true,
    };
    let mut model = Fields { rest: bytes };
    while let Some((number, field)) = model.next()? {
        match (number, field) {
            (1, Field::Bytes(piece)) => read_piece(piece, &mut vocabulary)?,
            (2, Field::Bytes(trainer)) => read_trainer(trainer, &mut specs)?,
            (3, Field::Bytes(normalizer)) => read_normalizer(normalizer, &mut specs)?,
            _ => {}
        }
    }
    if vocabulary.tokens.is_empty() {
        return Err("it has no pieces: it is no SentencePiece model".to_owned());
    }
    let model = match specs.model_type {
        1 => "t5",
        2 => "llama",
        3 => return Err("it cuts text into words (model type 3); known are 1 (unigram) and 2 (BPE)".to_owned()),
        4 => return Err("it cuts text into characters (model type 4); known are 1 (unigram) and 2 (BPE)".to_owned()),
        other => return Err(format!("its model type is {other}; known are 1 (unigram) and 2 (BPE)")),
    };
    model.clone_into(&mut vocabulary.model);
    if specs.has_other_spaces {
        return Err("it writes spaces behind words or unescaped (treat_whitespace_as_suffix, escape_whitespaces), \
                    which is not known here"
            .to_owned());
    }
    let id = |id: i64| u64::try_from(id).ok().filter(|&id| id < vocabulary.tokens.len() as u64);
    (vocabulary.unknown, vocabulary.bos) = (id(specs.unknown), id(specs.bos));
    (vocabulary.eos, vocabulary.padding) = (id(specs.eos), id(specs.padding));
    vocabulary.add_space_prefix = Some(specs.add_dummy_prefix);
    vocabulary.remove_extra_whitespaces = Some(specs.remove_extra_whitespaces);
    vocabulary.precompiled_charsmap = specs.charsmap;
    Ok(vocabulary)
}

fn read_piece(bytes: &[u8], vocabulary: &mut GgufVocabulary) -> Result<(), String> {
    let id = vocabulary.tokens.len();
    if id == MAX_TOKENS {
        return Err(format!("it has more than {MAX_TOKENS} pieces"));
    }
    let (mut name, mut score, mut kind) = ("", 0.0, 1);
    let mut fields = Fields { rest: bytes };
    while let Some((number, field)) = fields.next()? {
        match (number, field) {
            (1, Field::Bytes(bytes)) => {
                name = std::str::from_utf8(bytes).map_err(|_| format!("piece {id} is not UTF-8"))?;
            }
            (2, Field::Float(value)) => score = value,
            (3, Field::Number(value)) => kind = value as i64,
            _ => {}
        }
    }
    vocabulary.tokens.push(name.to_owned());
    vocabulary.scores.push(score);
    // SentencePiece and GGUF number the kinds alike: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    vocabulary.types.push(kind);
    Ok(())
}

fn read_trainer(bytes: &[u8], specs: &mut Specs) -> Result<(), String> {
    let mut fields = Fields { rest: bytes };
    while let Some((number, field)) = fields.next()? {
        let Field::Number(value) = field else { continue };
        match number {
            3 => specs.model_type = value,
            24 => specs.has_other_spaces |= value != 0,
            40 => specs.unknown = i64::from(value as i32),
            41 => specs.bos = i64::from(value as i32),
            42 => specs.eos = i64::from(value as i32),
            43 => specs.padding = i64::from(value as i32),
            _ => {}
        }
    }
    Ok(())
}

fn read_normalizer(bytes: &[u8], specs: &mut Specs) -> Result<(), String> {
    let mut fields = Fields { rest: bytes };
    while let Some((number, field)) = fields.next()? {
        match (number, field) {
            (2, Field::Bytes(map)) => specs.charsmap = map.to_vec(),
            (3, Field::Number(value)) => specs.add_dummy_prefix = value != 0,
            (4, Field::Number(value)) => specs.remove_extra_whitespaces = value != 0,
            (5, Field::Number(value)) => specs.has_other_spaces |= value == 0,
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(vocabulary) = read(&bytes) {
                prop_assert!(!vocabulary.tokens.is_empty());
            }
        }
    }

    #[test]
    fn what_is_missing_has_the_formats_defaults() {
        // One piece "a" of score -1 and nothing else.
        let piece = [0x0a, 8, 0x0a, 1, b'a', 0x15, 0, 0, 0x80, 0xbf];
        let vocabulary = read(&piece).unwrap();
        assert_eq!(
            (vocabulary.model.as_str(), &vocabulary.scores[..], &vocabulary.types[..]),
            ("t5", &[-1.0][..], &[1][..])
        );
        assert_eq!((vocabulary.unknown, vocabulary.bos, vocabulary.padding), (Some(0), None, None));
        assert_eq!((vocabulary.add_space_prefix, vocabulary.remove_extra_whitespaces), (Some(true), Some(true)));
        let with_trainer = |field: &[u8]| [&piece[..], &[0x12, field.len() as u8], field].concat();
        assert_eq!(read(&with_trainer(&[0x18, 2])).unwrap().model, "llama");
        assert!(read(&with_trainer(&[0x18, 3])).unwrap_err().contains("model type 3"));
        assert!(read(&with_trainer(&[0xc0, 1, 1])).unwrap_err().contains("suffix"));
        assert!(read(&[0x0a, 200, 1]).unwrap_err().contains("200 bytes"));
        assert!(read(b"").unwrap_err().contains("no pieces"));
        assert!(read(&[0x0b]).unwrap_err().contains("wire type 3"));
        assert!(read(&[0xff; 12]).unwrap_err().contains("ten bytes"));
        assert!(read(&[0x0a, 3, 0x0a, 1, 0xff]).unwrap_err().contains("piece 0 is not UTF-8"));
    }
}
