//! GPTQ, as AutoGPTQ and GPTQModel pack it.
//!
//! `qweight [in * bits / 32, out]` holds a column of ours as a stream of bits along the inputs; `qzeros
//! [groups, out * bits / 32]` holds zero points as a stream along the outputs. Version 1 of the layout stores zero points
//! less one. It must not know scales' types or groups. Its invariant: the readers stay within what [`resolve`] has checked.
//!
//! Sources: `QuantLinear.pack` of AutoGPTQ's `qlinear_cuda.py`; `convert_gptq_v1_to_v2_format_module` of GPTQModel's
//! `utils/model.py` for what is added to zero points.

use safetensors::Dtype;

use super::{
    GroupedPlace, Layout, TILE_ROWS, Tile, Zeros, in_stream,
    parts::{Codes, Parts},
    word,
};
use crate::{config::GptqZeros, weights::safetensors::Entry};

/// Bits of a code that are read.
const BITS: [usize; 4] = [2, 3, 4, 8];

pub(super) fn resolve(
    parts: &Parts<'_>,
    entry: &Entry,
    configured_bits: usize,
    group_size: Option<usize>,
    plus: GptqZeros,
    act_order: bool,
) -> Result<GroupedPlace, String> {
    let (words, rows) = parts.matrix("qweight", entry, Some(Dtype::I32))?;
    if act_order {
        parts.required("g_idx")?;
    }
    // Single modules may have other bits than the config says of all: zero points have as many as codes.
    let by_zeros = parts.optional("qzeros")?.and_then(|zeros| match zeros.shape[..] {
        [_, words] => whole(words, 32, rows).filter(|bits| BITS.contains(bits)),
        _ => None,
    });
    let bits = by_zeros.unwrap_or(configured_bits);
    let cols = whole(words, 32, bits).filter(|&cols| cols > 0);
    let (Some(cols), Some(zero_words)) = (cols, whole(rows, bits, 32)) else {
        let name = parts.name("qweight");
        return Err(format!("tensor {name:?} has the shape {:?}, which {bits} bits a code do not fill", entry.shape));
    };
    let codes = Codes { entry, bits, rows, cols, zero_words };
    parts.with_rows_innermost(Layout::Gptq, &codes, group_size, |part| Zeros::Gptq { part, plus })
}

/// `count * times / by`, where that is a whole number.
fn whole(count: usize, times: usize, by: usize) -> Option<usize> {
    count.checked_mul(times).filter(|product| product.is_multiple_of(by)).map(|product| product / by)
}

/// The zero point of row `row`, of whose group `word` reads the words.
pub(super) fn zero(words: impl Fn(usize) -> u32, row: usize, bits: usize, plus: GptqZeros) -> i32 {
    match plus {
        GptqZeros::AsStored => i32::from(in_stream(words, row, bits)),
        GptqZeros::LessOne if bits == 3 => i32::from(in_stream(words, row, bits)) + 1,
        // In one addition for a word: one that underflowed when it was stored has borrowed from the next.
        GptqZeros::LessOne => {
            let ones = (0..32).step_by(bits).fold(0, |ones, bit| ones | 1 << bit);
            i32::from(in_stream(|at| words(at).wrapping_add(ones), row, bits))
        }
        // Bits in every third place, though they are the codes' lowest in the second of three words alone: what GPTQModel
        // takes off when it stores three bits in version 1, and adds when it reads them.
        GptqZeros::LessGptqModels if bits == 3 => {
            let offset = |at: usize| [0x2492_4924, 0x9249_2492, 0x4924_9249][at % 3];
            i32::from(in_stream(|at| words(at).wrapping_add(offset(at)), row, bits))
        }
        GptqZeros::LessGptqModels => zero(words, row, bits, GptqZeros::LessOne),
    }
}

/// The codes of some rows from `tile.first` on.
pub(super) fn unpack(place: &GroupedPlace, bytes: &[u8], count: usize, tile: &mut Tile) {
    let &GroupedPlace { rows, cols, bits, .. } = place;
    let words = cols * bits / 32;
    tile.words.resize(TILE_ROWS * words, 0);
    for at in 0..words {
        for row in 0..count {
            tile.words[row * words + at] = word(bytes, at * rows + tile.first + row);
        }
    }
    for (codes, words) in tile.codes.chunks_exact_mut(cols).zip(tile.words.chunks_exact(words)).take(count) {
        codes.iter_mut().enumerate().for_each(|(i, code)| *code = in_stream(|at| words[at], i, bits));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn zeros(words: [u32; 3], bits: usize, plus: GptqZeros) -> Vec<i32> {
        (0..96 / bits).map(|row| zero(|at| words[at], row, bits, plus)).collect()
    }

    proptest! {
        /// What GPTQModel takes off a word to store it in version 1 comes back, zeros that borrow from the next included.
        #[test]
        fn zero_points_of_version_1_come_back(words in any::<[u32; 3]>()) {
            let as_stored = |bits| zeros(words, bits, GptqZeros::AsStored);
            for (bits, ones) in [(2, 0x5555_5555_u32), (4, 0x1111_1111), (8, 0x0101_0101)] {
                for plus in [GptqZeros::LessOne, GptqZeros::LessGptqModels] {
                    prop_assert_eq!(zeros(words.map(|word| word.wrapping_sub(ones)), bits, plus), as_stored(bits));
                }
            }
            let offsets = [0x2492_4924_u32, 0x9249_2492, 0x4924_9249];
            let less = std::array::from_fn(|at| words[at].wrapping_sub(offsets[at]));
            prop_assert_eq!(zeros(less, 3, GptqZeros::LessGptqModels), as_stored(3));
            // AutoGPTQ takes one off each code before it packs them.
            let plus_one: Vec<i32> = as_stored(3).iter().map(|zero| zero + 1).collect();
            prop_assert_eq!(zeros(words, 3, GptqZeros::LessOne), plus_one);
        }
    }
}
