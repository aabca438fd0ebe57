//! Where a tile's keys and values lie: in the pages, or copied in f32 to where the products have it easier.
//!
//! It must not know queries or scores. Invariant: pointers are into pages or room that outlives the tile, and a tile holds the keys that
//! it was asked for, whole vectors of them where products read whole vectors.

use std::ops::Range;

use super::{VECTORS, WIDTH};
use crate::cpu::attention::TILE_KEYS;
use crate::cpu::generic::{Element, Lanes};
use crate::cpu::prefetch::prefetch_to_second;
use crate::cpu::task::{KvElement, SpanTask};

/// Some values of a tile.
pub(super) struct Run<E> {
    /// Which of the tile's keys they belong to.
    pub(super) keys: (usize, usize),
    /// Component 0 of the first one.
    pub(super) from: *const E,
    /// Bytes from there to the first of those values in the tile that comes next; 0, to itself, where there is none to ask for.
    pub(super) ahead: isize,
}

impl<E> Clone for Run<E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E> Copy for Run<E> {}

/// A tile's keys and values as the block takes them: rows of at least 16 elements, by pointer.
pub(in crate::cpu) struct Tile<E> {
    /// First position, a multiple of the tile.
    pub(super) start: usize,
    /// Component 0 of each 16 keys; null where no key is held.
    pub(super) keys: [*const E; VECTORS],
    /// Bytes from each to those of the tile that comes next; 0, to itself, where there are none to ask for.
    pub(super) keys_ahead: [isize; VECTORS],
    /// From one component to the next.
    pub(super) key_stride: usize,
    /// Whether vectors of keys follow each other, and components are a tile apart.
    pub(super) keys_follow: bool,
    /// Values that follow each other in memory; `num_runs` of them, in ascending order.
    pub(super) runs: [Run<E>; VECTORS],
    pub(super) num_runs: usize,
    /// From one value to the next.
    pub(super) value_stride: usize,
    /// `[groups, 64]` of the tile's keys, and of its values; null where elements have none.
    pub(super) key_scales: *const f32,
    pub(super) value_scales: *const f32,
}

impl<E> Tile<E> {
    /// Nothing in it yet.
    fn empty(start: usize) -> Self {
        Self {
            start,
            keys: [std::ptr::null(); VECTORS],
            keys_ahead: [0; VECTORS],
            key_stride: 0,
            keys_follow: false,
            runs: [Run { keys: (0, 0), from: std::ptr::null(), ahead: 0 }; VECTORS],
            num_runs: 0,
            value_stride: 0,
            key_scales: std::ptr::null(),
            value_scales: std::ptr::null(),
        }
    }

    /// Copies the scales of the keys `held` to `room`, where the tile then points.
    fn take_scales<S: KvElement>(&mut self, task: &SpanTask<'_, S>, held: Range<usize>, room: &mut Vec<f32>) {
        if !S::HAS_SCALES {
            return;
        }
        let len = task.num_groups() * TILE_KEYS;
        // What is left over in it belongs to keys that no query sees.
        room.resize(room.len().max(2 * len), 0.0);
        let (keys, values) = room.split_at_mut(len);
        let mut position = held.start;
        while position < held.end {
            let count = (task.block_size - position % task.block_size).min(held.end - position);
            for group in 0..task.num_groups() {
                let at = group * TILE_KEYS + position - self.start;
                for (to, half) in [(&mut *keys, task.keys), (&mut *values, task.values)] {
                    let scales = task.scales(half, position, count, group);
                    to[at..at + count].iter_mut().zip(scales).for_each(|(to, scale)| *to = scale);
                }
            }
            position += count;
        }
        (self.key_scales, self.value_scales) = (keys.as_ptr(), values.as_ptr());
    }
}

/// A tile straight from the pages, whose rows fill vectors.
pub(super) fn tile_of_pages<E: Element + KvElement>(
    task: &SpanTask<'_, E>,
    start: usize,
    held: Range<usize>,
    scales: &mut Vec<f32>,
) -> Tile<E> {
    let (block_size, head_dim) = (task.block_size, task.head_dim);
    let mut tile = Tile { key_stride: block_size, value_stride: head_dim, ..Tile::empty(start) };
    tile.take_scales(task, held.clone(), scales);
    for vector in (held.start - start) / WIDTH..(held.end - start).div_ceil(WIDTH) {
        let position = start + vector * WIDTH;
        let at = task.key_index(position);
        tile.keys_ahead[vector] = bytes_between::<E>(at, task.next_index(start, position, |at| task.key_index(at)));
        tile.keys[vector] = task.keys[at..at + (head_dim - 1) * block_size + WIDTH].as_ptr();
    }
    let mut position = held.start;
    while position < held.end {
        let run = (block_size - position % block_size).min(held.end - position);
        let at = task.value_index(position);
        let first = position - start;
        let ahead = bytes_between::<E>(at, task.next_index(start, position, |at| task.value_index(at)));
        tile.runs[tile.num_runs] =
            Run { keys: (first, first + run), from: task.values[at..at + run * head_dim].as_ptr(), ahead };
        tile.num_runs += 1;
        position += run;
    }
    tile
}

/// Asks memory for what lies so many bytes from what was loaded: of the tile that comes next.
#[inline(always)]
pub(super) fn ask<E>(loaded: *const E, ahead: isize) {
    prefetch_to_second(loaded.cast::<u8>().wrapping_offset(ahead));
}

/// 0 where there is nothing to go to.
fn bytes_between<E>(from: usize, to: Option<usize>) -> isize {
    to.map_or(0, |to| (to.wrapping_sub(from) as isize).wrapping_mul(size_of::<E>() as isize))
}

/// A tile copied to `room` in f32 (codes as they are): keys `[head_dim, 64]`, then values `[64, padded head_dim]`.
pub(super) fn lay_out<E: Element + KvElement>(
    task: &SpanTask<'_, E>,
    start: usize,
    held: Range<usize>,
    room: &mut Vec<f32>,
    scales: &mut Vec<f32>,
) -> Tile<f32> {
    let width = task.head_dim.next_multiple_of(WIDTH);
    room.clear();
    room.resize((task.head_dim + width) * TILE_KEYS, 0.0);
    let (keys, values) = room.split_at_mut(task.head_dim * TILE_KEYS);
    for position in held.clone() {
        let (key_at, value_at) = (task.key_index(position), task.value_index(position));
        for i in 0..task.head_dim {
            keys[i * TILE_KEYS + position - start] = task.keys[key_at + i * task.block_size].widen();
            values[(position - start) * width + i] = task.values[value_at + i].widen();
        }
    }
    let mut tile = Tile {
        key_stride: TILE_KEYS,
        keys_follow: true,
        runs: [Run { keys: (0, TILE_KEYS), from: values.as_ptr(), ahead: 0 }; VECTORS],
        num_runs: 1,
        value_stride: width,
        ..Tile::empty(start)
    };
    tile.take_scales(task, held, scales);
    for (vector, pointer) in tile.keys.iter_mut().enumerate() {
        *pointer = keys[vector * WIDTH..].as_ptr();
    }
    tile
}

/// A tile in f32 (codes as they are), in `room`: keys `[head_dim, 64]`, then values `[64, head_dim]`.
///
/// # Safety
/// As [`Lanes`]; the tile holds the keys it names; `head_dim` is a multiple of 16 and the tile has a run at least.
#[inline(always)]
pub(super) unsafe fn convert<L: Lanes, E: Element>(tile: &Tile<E>, head_dim: usize, room: &mut Vec<f32>) -> Tile<f32> {
    // What is left over in it belongs to keys that no query sees.
    room.resize(room.len().max(2 * head_dim * TILE_KEYS), 0.0);
    let (keys, values) = room.split_at_mut(head_dim * TILE_KEYS);
    let (keys, values) = (keys.as_mut_ptr(), values.as_mut_ptr());
    let mut converted = Tile {
        key_stride: TILE_KEYS,
        keys_follow: true,
        value_stride: head_dim,
        key_scales: tile.key_scales,
        value_scales: tile.value_scales,
        ..Tile::empty(tile.start)
    };
    // SAFETY: `room` holds 64 keys and 64 values of `head_dim` components; the tile's rows are the caller's duty.
    unsafe {
        for (vector, from) in tile.keys.iter().enumerate().filter(|(_, from)| !from.is_null()) {
            let to = keys.add(vector * WIDTH);
            for i in 0..head_dim {
                let from = from.add(i * tile.key_stride);
                E::lanes::<L>(from).store(to.add(i * TILE_KEYS));
                ask(from, tile.keys_ahead[vector]);
            }
            converted.keys[vector] = to.cast_const();
        }
        for &Run { keys: (begin, end), from, ahead } in &tile.runs[..tile.num_runs] {
            let to = values.add(begin * head_dim);
            for i in (0..(end - begin) * head_dim).step_by(WIDTH) {
                E::lanes::<L>(from.add(i)).store(to.add(i));
                ask(from.add(i), ahead);
            }
        }
        // They follow each other now.
        let (first, last) = (tile.runs[0], tile.runs[tile.num_runs - 1]);
        let from = values.add(first.keys.0 * head_dim).cast_const();
        converted.runs[0] = Run { keys: (first.keys.0, last.keys.1), from, ahead: 0 };
        converted.num_runs = 1;
    }
    converted
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::cpu::attention::AttentionArgs;
    use crate::cpu::task::Partial;

    /// The last tile has two vectors of keys, so the third and fourth of the one before lead to the next head.
    const CONTEXT: usize = 150;
    const HEAD_DIM: usize = 32;
    const BLOCK_SIZE: usize = 16;
    const NUM_BLOCKS: usize = 10;
    const NUM_KV_HEADS: usize = 2;
    const HEADS_PER_KV: usize = 3;
    const NUM_HEADS: usize = NUM_KV_HEADS * HEADS_PER_KV;

    /// The tile from `start` on that the last position sees, of a sequence whose blocks lie about in `pages`.
    fn tile(pages: &[f16], kv_head: usize, window: Option<usize>, start: usize) -> Tile<f16> {
        tile_of(pages, kv_head, kv_head..kv_head + 1, window, start)
    }

    /// The same where `kv_heads` are walked together.
    fn tile_of(
        pages: &[f16],
        kv_head: usize,
        kv_heads: Range<usize>,
        window: Option<usize>,
        start: usize,
    ) -> Tile<f16> {
        let block_table: Vec<u32> = (0..NUM_BLOCKS as u32).map(|block| block * 3 % NUM_BLOCKS as u32).collect();
        let args =
            AttentionArgs { num_heads: NUM_HEADS, scale: 1.0, window, blocks: None, soft_cap: None, biases: None };
        let task = SpanTask {
            args: &args,
            q: &[0.0; NUM_HEADS * HEAD_DIM],
            rows: 0..1,
            first_position: CONTEXT - 1,
            heads_per_kv: HEADS_PER_KV,
            kv_head,
            kv_heads,
            head_dim: HEAD_DIM,
            block_size: BLOCK_SIZE,
            page_elements: HEAD_DIM * BLOCK_SIZE,
            block_stride: NUM_KV_HEADS * HEAD_DIM * BLOCK_SIZE,
            keys: pages,
            values: pages,
            block_table: &block_table,
            span: 0..CONTEXT,
            partial: Partial { references: &mut [], sums: &mut [], values: &mut [] },
            begins: true,
            scratch: &mut Vec::new(),
            scale_scratch: &mut Vec::new(),
            query_scratch: &mut Vec::new(),
            interleaved: false,
        };
        let visible = task.visible(0);
        tile_of_pages(&task, start, visible.start.max(start)..visible.end.min(start + TILE_KEYS), &mut Vec::new())
    }

    /// Those of `vectors` lead from the first tile to the second, and values with them.
    fn assert_lead(from: &Tile<f16>, to: &Tile<f16>, vectors: Range<usize>) {
        for vector in vectors.clone() {
            assert!(!from.keys[vector].is_null() && !to.keys[vector].is_null());
            assert_eq!(from.keys[vector].wrapping_byte_offset(from.keys_ahead[vector]), to.keys[vector]);
        }
        let run_at = |tile: &Tile<f16>, key| tile.runs[..tile.num_runs].iter().copied().find(|run| run.keys.0 == key);
        for key in vectors.map(|vector| vector * WIDTH) {
            let (run, next) = (run_at(from, key).unwrap(), run_at(to, key).unwrap());
            assert_eq!(run.from.wrapping_byte_offset(run.ahead), next.from);
        }
    }

    /// What is asked for changes no result, so nothing else would tell that it is the wrong place.
    #[test]
    fn what_a_tile_asks_for_is_where_the_tile_that_comes_next_lies() {
        let pages = vec![f16::ZERO; NUM_BLOCKS * NUM_KV_HEADS * HEAD_DIM * BLOCK_SIZE];
        // A window of 76 begins in the second tile, in the middle of its first block.
        for (window, starts) in [(None, &[0, 64, 128][..]), (Some(76), &[64, 128])] {
            let tiles = [0, 1].map(|head| starts.iter().map(|&start| tile(&pages, head, window, start)).collect());
            let [first, second]: [Vec<Tile<f16>>; NUM_KV_HEADS] = tiles;
            if window.is_none() {
                assert_lead(&first[0], &first[1], 0..VECTORS);
                assert_lead(&second[0], &second[1], 0..VECTORS);
                assert_lead(&first[2], &second[0], 0..2);
            } else {
                assert_lead(&first[0], &first[1], 1..2);
                assert_lead(&first[1], &second[0], 1..2);
            }
            let [.., before, last] = &second[..] else { unreachable!() };
            assert!(before.keys_ahead[2..] == [0; 2] && last.keys_ahead == [0; VECTORS]);
            assert!(last.runs.iter().all(|run| run.ahead == 0));
            assert_lead(&first[first.len() - 2], &second[0], 2..VECTORS);
        }
    }

    #[test]
    fn heads_that_are_walked_together_ask_for_each_other() {
        let pages = vec![f16::ZERO; NUM_BLOCKS * NUM_KV_HEADS * HEAD_DIM * BLOCK_SIZE];
        let tile = |head, start| tile_of(&pages, head, 0..NUM_KV_HEADS, None, start);
        assert_lead(&tile(0, 0), &tile(1, 0), 0..VECTORS);
        assert_lead(&tile(1, 0), &tile(0, 64), 0..VECTORS);
        assert_lead(&tile(0, 128), &tile(1, 128), 0..2);
        assert_eq!(tile(1, 128).keys_ahead, [0; VECTORS]);
    }
}
