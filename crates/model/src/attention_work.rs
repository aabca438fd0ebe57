//! What attention has to do at least, for shares of the machine's roofs. Arithmetic alone: it knows no kernel and no clock.

use std::iter::Sum;
use std::ops::{Add, AddAssign, Mul, Range};

use bindery_kernels::SparseBlocks;

use crate::config::LayerConfig;

/// What some attention takes at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttentionWork {
    /// Keys and values read from the cache: each that a sequence's rows see once, however many rows see it.
    pub read_bytes: u64,
    /// Two a multiply-add: those of the scores and of the sums of values. The softmax between is not counted.
    pub operations: u64,
}

impl Add for AttentionWork {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { read_bytes: self.read_bytes + other.read_bytes, operations: self.operations + other.operations }
    }
}

/// As many times, e.g. for sequences of one length.
impl Mul<u64> for AttentionWork {
    type Output = Self;

    fn mul(self, times: u64) -> Self {
        Self { read_bytes: times * self.read_bytes, operations: times * self.operations }
    }
}

impl AddAssign for AttentionWork {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for AttentionWork {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), Add::add)
    }
}

/// What a model's attention has to do for one key that a row sees, and how many keys that is in each layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttentionShape {
    /// All but the last.
    layers: Vec<AlikeLayers>,
    last: Option<AlikeLayers>,
    /// A token's keys and values in one layer.
    bytes_per_key: u64,
    /// One row and one key, all heads.
    operations_per_score: u64,
}

/// Layers whose rows see the same keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct AlikeLayers {
    number: u64,
    window: Option<usize>,
    blocks: Option<SparseBlocks>,
}

impl AttentionShape {
    /// `bytes_per_key`: a token's keys and values in one layer.
    pub(crate) fn new(layers: &[LayerConfig], num_heads: usize, head_dim: usize, bytes_per_key: usize) -> Self {
        let mut alike: Vec<AlikeLayers> = Vec::new();
        let one = |layer: &LayerConfig| AlikeLayers { number: 1, window: layer.window, blocks: layer.blocks };
        let (last, others) = layers.split_last().unzip();
        for layer in others.into_iter().flatten().map(one) {
            match alike.iter_mut().find(|seen| (seen.window, seen.blocks) == (layer.window, layer.blocks)) {
                Some(seen) => seen.number += 1,
                None => alike.push(layer),
            }
        }
        // A multiply-add of each element of a head for the score, and one for the sum of values.
        let operations_per_score = 4 * (num_heads * head_dim) as u64;
        Self { layers: alike, last: last.map(one), bytes_per_key: bytes_per_key as u64, operations_per_score }
    }

    /// Of the last `num_rows` tokens of a context of `context_len`, in all layers; in the last one of the last `num_kept` of them,
    /// whose logits may be asked for. Of a block pattern it takes the share that is seen in the mean, not the blocks.
    pub fn work(&self, context_len: usize, num_rows: usize, num_kept: usize) -> AttentionWork {
        let last = self.last.iter().map(|last| (last, num_kept));
        let of_layers = |(layers, num_rows): (&AlikeLayers, usize)| {
            let rows = context_len.saturating_sub(num_rows) as u64..context_len as u64;
            let seen = layers.seen(&rows);
            let read_bytes = seen.keys * self.bytes_per_key;
            AttentionWork { read_bytes, operations: seen.scores * self.operations_per_score } * layers.number
        };
        self.layers.iter().map(|layers| (layers, num_rows)).chain(last).map(of_layers).sum()
    }
}

/// What the rows of one sequence see in one layer.
#[derive(Clone, Copy)]
struct Seen {
    /// Keys that some row sees.
    keys: u64,
    /// Pairs of a row and a key that it sees.
    scores: u64,
}

impl Seen {
    /// By rows at these positions, one at least, each of which sees the `window` keys up to its own.
    fn within(window: u64, rows: &Range<u64>) -> Self {
        let num_rows = rows.end - rows.start;
        // Rows that see all keys before them: one more each.
        let growing = rows.start..rows.end.min(window).max(rows.start);
        let num_growing = growing.end - growing.start;
        let of_growing = num_growing * (growing.start + 1 + growing.end) / 2;
        Self {
            keys: rows.end.min((num_rows - 1).saturating_add(window)),
            scores: of_growing + (num_rows - num_growing) * window,
        }
    }
}

impl AlikeLayers {
    fn seen(&self, rows: &Range<u64>) -> Seen {
        if rows.is_empty() {
            return Seen { keys: 0, scores: 0 };
        }
        let window = self.window.map_or(rows.end, |window| rows.end.min(window as u64));
        let all = Seen::within(window, rows);
        let Some(blocks) = self.blocks else { return all };
        let local = window.min((blocks.num_local_blocks * blocks.block_size) as u64);
        let near = Seen::within(local, rows);
        let stride = blocks.vertical_stride as u64;
        Seen {
            keys: near.keys + (all.keys - near.keys) / stride,
            scores: near.scores + (all.scores - near.scores) / stride,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::FeedForward;

    fn shape(layers: Vec<AlikeLayers>) -> AttentionShape {
        AttentionShape { layers, last: None, bytes_per_key: 1000, operations_per_score: 10 }
    }

    /// Counted one by one.
    fn counted(window: Option<usize>, context_len: usize, num_rows: usize) -> AttentionWork {
        let sees = |row: usize, key: usize| key <= row && window.is_none_or(|window| row - key < window);
        let rows = || context_len - num_rows..context_len;
        let keys = (0..context_len).filter(|&key| rows().any(|row| sees(row, key))).count();
        let scores: usize = rows().map(|row| (0..context_len).filter(|&key| sees(row, key)).count()).sum();
        AttentionWork { read_bytes: 1000 * keys as u64, operations: 10 * scores as u64 }
    }

    #[test]
    fn as_much_as_counting_keys_one_by_one_gives() {
        for window in [None, Some(1), Some(3), Some(8), Some(40)] {
            for context_len in [1, 2, 7, 8, 9, 23] {
                for num_rows in [1, 2, 7, 8, 23] {
                    if num_rows > context_len {
                        continue;
                    }
                    let layers = AlikeLayers { number: 1, window, blocks: None };
                    assert_eq!(
                        shape(vec![layers]).work(context_len, num_rows, 0),
                        counted(window, context_len, num_rows),
                        "window {window:?}, {num_rows} rows of {context_len}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_models_layers_are_counted_by_what_they_see() {
        let layer = |window| LayerConfig { window, blocks: None, rotary: None, feed_forward: FeedForward::Dense };
        let shape = AttentionShape::new(&[layer(Some(4)), layer(None), layer(Some(4)), layer(None)], 2, 8, 100);
        // Keys of a row at the end of ten: 4, 10, 4 and 10; two multiply-adds for each of 16 elements.
        assert_eq!(shape.work(10, 1, 1), AttentionWork { read_bytes: 2_800, operations: 28 * 64 });
        assert_eq!(shape.work(10, 1, 0), AttentionWork { read_bytes: 1_800, operations: 18 * 64 });
    }

    #[test]
    fn layers_add_up_and_a_pattern_sees_a_share_of_what_is_far() {
        let windowed = AlikeLayers { number: 5, window: Some(4), blocks: None };
        let full = AlikeLayers { number: 1, window: None, blocks: None };
        let both = shape(vec![windowed, full]).work(100, 1, 1);
        assert_eq!(both, AttentionWork { read_bytes: 120_000, operations: 1_200 });
        let blocks = SparseBlocks { block_size: 4, num_local_blocks: 5, vertical_stride: 8, head_step: 0 };
        let sparse = AlikeLayers { number: 1, window: None, blocks: Some(blocks) };
        assert_eq!(shape(vec![sparse]).work(100, 1, 1), AttentionWork { read_bytes: 30_000, operations: 300 });
        assert_eq!(shape(vec![sparse]).work(20, 1, 1), AttentionWork { read_bytes: 20_000, operations: 200 });
        assert_eq!(AttentionShape::default().work(100, 1, 1), AttentionWork::default());
        // Two rows of three in the last layer, then none.
        let shape = AttentionShape { last: Some(full), ..shape(vec![windowed]) };
        assert_eq!(shape.work(3, 3, 2), AttentionWork { read_bytes: 18_000, operations: 350 });
        assert_eq!(shape.work(3, 3, 0), AttentionWork { read_bytes: 15_000, operations: 300 });
    }
}
