//! AWQ, as AutoAWQ packs it in version GEMM: four bits.
//!
//! `qweight [in, out / 8]` and `qzeros [groups, out / 8]` hold outputs 0 2 4 6 1 3 5 7 in a word, lowest bits first. It must
//! not know scales' types or groups. Its invariant: the readers stay within what [`resolve`] has checked.
//!
//! Source: `WQLinear_GEMM.from_linear` of AutoAWQ's `gemm.py`.

use safetensors::Dtype;

use super::{
    GroupedPlace, Layout, Tile, Zeros,
    parts::{Codes, Parts},
    word,
};
use crate::weights::safetensors::Entry;

/// Where each of eight outputs lies in a word, in codes.
const PLACES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

pub(super) fn resolve(parts: &Parts<'_>, entry: &Entry, group_size: Option<usize>) -> Result<GroupedPlace, String> {
    let (cols, words) = parts.matrix("qweight", entry, Some(Dtype::I32))?;
    let codes = Codes { entry, bits: 4, rows: words * PLACES.len(), cols, zero_words: words };
    parts.with_rows_innermost(Layout::Awq, &codes, group_size, Zeros::Awq)
}

/// The code of row `row` in its word.
pub(super) fn code(word: u32, row: usize) -> u8 {
    (word >> (4 * PLACES[row % 8]) & 15) as u8
}

/// The codes of some rows from `tile.first` on.
pub(super) fn unpack(place: &GroupedPlace, bytes: &[u8], count: usize, tile: &mut Tile) {
    let &GroupedPlace { rows, cols, .. } = place;
    let words = rows / PLACES.len();
    for input in 0..cols {
        for row in 0..count {
            let word = word(bytes, input * words + (tile.first + row) / PLACES.len());
            tile.codes[row * cols + input] = code(word, tile.first + row);
        }
    }
}
