//! The numbers of a pair: dequantised, the scaling in B, rows of queries and keys in the order that is asked for.
//!
//! It must not know names or configs. Its invariant: every number handed out is finite.

use super::{
    AdapterTarget, LowRank,
    pairs::{Pair, Part},
};
use crate::{
    ModelError,
    config::{DecoderConfig, RopeStyle},
    weights::{TensorView, loose::LooseTensors},
};

/// In which order the rows of query and key heads come.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeadRows {
    head_dim: usize,
    /// Elements of a head that are rotated, by the base's configuration.
    rotary_dim: usize,
    /// Of the file.
    style: RopeStyle,
}

impl HeadRows {
    /// Rows are stored in the order of `style`.
    pub(super) fn new(base: &DecoderConfig, style: RopeStyle) -> Self {
        let rotary_dim = base.rotaries.first().map_or(base.head_dim, |rotary| rotary.dim);
        Self { head_dim: base.head_dim, rotary_dim, style }
    }

    /// Where the row that stands at `row` in the wanted order is stored.
    fn stored(self, row: usize, wanted: RopeStyle) -> usize {
        let (head, i) = (row / self.head_dim, row % self.head_dim);
        // As in transformers, whose heads rotate as halves.
        let in_halves = match wanted {
            RopeStyle::Neox => i,
            RopeStyle::Interleaved => half_of(i, self.rotary_dim),
        };
        let stored = match self.style {
            RopeStyle::Neox => in_halves,
            // llama.cpp's converter permutes whole heads (`LlamaModel.permute`).
            RopeStyle::Interleaved => pair_of(in_halves, self.head_dim),
        };
        head * self.head_dim + stored
    }

    /// `part` of `pair`.
    pub(super) fn read(
        self,
        tensors: &LooseTensors,
        pair: &Pair,
        part: &Part,
        target: AdapterTarget,
        wanted: RopeStyle,
    ) -> Result<LowRank, ModelError> {
        let a = tensors.matrix(&pair.a)?.to_f32()?;
        let view = tensors.matrix(&pair.b)?;
        let whole = view.to_f32()?;
        let is_rotated = matches!(target, AdapterTarget::Query | AdapterTarget::Key);
        let mut b = Vec::new();
        b.try_reserve_exact(part.rows * pair.rank)
            .map_err(|_| ModelError::OutOfMemory(format!("no memory for tensor {:?} in f32", pair.b)))?;
        let scaling = pair.scaling as f32;
        for row in 0..part.rows {
            let row = if is_rotated { self.stored(row, wanted) } else { row };
            let row = part.rows_at.stored(row);
            b.extend(whole[row * pair.rank..][..pair.rank].iter().map(|&value| value * scaling));
        }
        check_finite(&b, &view, pair)?;
        Ok(LowRank { rank: pair.rank, a, b })
    }
}

/// What was finite before may not be after it is scaled.
fn check_finite(b: &[f32], view: &TensorView<'_>, pair: &Pair) -> Result<(), ModelError> {
    match b.iter().find(|value| !value.is_finite()) {
        None => Ok(()),
        Some(value) => Err(view
            .bad(format!("scaled by {} it holds {value}; lower lora_alpha, or train the adapter again", pair.scaling))),
    }
}

/// Pairs (2 i, 2 i + 1) to halves (i, i + dim / 2): where element `i` of a head in pairs stands in halves.
fn half_of(i: usize, dim: usize) -> usize {
    if i < dim { i % 2 * (dim / 2) + i / 2 } else { i }
}

/// The other way: where element `i` of a head in halves stands in pairs.
fn pair_of(i: usize, dim: usize) -> usize {
    let half = dim / 2;
    match i {
        i if i < half => 2 * i,
        i if i < 2 * half => 2 * (i - half) + 1,
        i => i,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_and_halves_are_inverse() {
        for dim in [2, 4, 6, 24] {
            for i in 0..dim + 3 {
                assert_eq!(pair_of(half_of(i, dim), dim), i);
                assert_eq!(half_of(pair_of(i, dim), dim), i);
            }
        }
        // transformers: element 1 rotates with element 1 + dim / 2.
        assert_eq!((pair_of(1, 8), pair_of(5, 8)), (2, 3));
    }

    #[test]
    fn a_file_in_the_wanted_order_is_read_as_it_is() {
        for style in [RopeStyle::Neox, RopeStyle::Interleaved] {
            let heads = HeadRows { head_dim: 6, rotary_dim: 6, style };
            for row in 0..18 {
                assert_eq!(heads.stored(row, style), row);
            }
        }
        let heads = HeadRows { head_dim: 4, rotary_dim: 4, style: RopeStyle::Interleaved };
        let halves: Vec<usize> = (0..8).map(|row| heads.stored(row, RopeStyle::Neox)).collect();
        assert_eq!(halves, [0, 2, 1, 3, 4, 6, 5, 7]);
    }
}
