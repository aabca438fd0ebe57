//! Every token's name and bytes in two flat buffers, so that looking one up allocates nothing.
//!
//! It must not know how text is cut or merged. Ids may have holes (a vocabulary need not be dense): a hole has no name,
//! no bytes and is not special.

use bindery_scheduler::TokenId;

/// What one token contributes to text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TokenPiece<'a> {
    pub(crate) bytes: &'a [u8],
    /// The bytes may be part of a character; otherwise they are whole characters.
    pub(crate) is_fragment: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    name: (u32, u32),
    bytes: (u32, u32),
    exists: bool,
    is_special: bool,
    is_fragment: bool,
}

/// Names, bytes and flags by id.
#[derive(Debug, Default)]
pub(crate) struct TokenTable {
    entries: Vec<Entry>,
    names: String,
    bytes: Vec<u8>,
    num_bytes_max: usize,
}

impl TokenTable {
    /// Appends the token of the next id; `None` is a hole.
    ///
    /// Positions are 32 bits: the caller has bounded all names together (see `MAX_VOCABULARY_BYTES`), and bytes are
    /// never longer than names.
    pub(crate) fn push(&mut self, token: Option<(&str, &[u8])>, is_special: bool, is_fragment: bool) {
        let entry = token.map_or_else(Entry::default, |(name, bytes)| {
            let name_start = self.names.len() as u32;
            let bytes_start = self.bytes.len() as u32;
            self.names.push_str(name);
            self.bytes.extend_from_slice(bytes);
            self.num_bytes_max = self.num_bytes_max.max(bytes.len());
            Entry {
                name: (name_start, self.names.len() as u32),
                bytes: (bytes_start, self.bytes.len() as u32),
                exists: true,
                is_special,
                is_fragment,
            }
        });
        self.entries.push(entry);
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn num_bytes_max(&self) -> usize {
        self.num_bytes_max
    }

    fn entry(&self, token: TokenId) -> Option<&Entry> {
        self.entries.get(token.0 as usize).filter(|entry| entry.exists)
    }

    pub(crate) fn name(&self, token: TokenId) -> Option<&str> {
        self.entry(token).map(|entry| &self.names[entry.name.0 as usize..entry.name.1 as usize])
    }

    pub(crate) fn piece(&self, token: TokenId) -> Option<TokenPiece<'_>> {
        self.entry(token).map(|entry| TokenPiece {
            bytes: &self.bytes[entry.bytes.0 as usize..entry.bytes.1 as usize],
            is_fragment: entry.is_fragment,
        })
    }

    pub(crate) fn is_special(&self, token: TokenId) -> bool {
        self.entry(token).is_some_and(|entry| entry.is_special)
    }
}
