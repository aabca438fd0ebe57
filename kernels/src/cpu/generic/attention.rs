//! Attention of one span, a tile of keys at a time, some queries at a time.
//!
//! ```text
//! for each tile of 64 positions:
//!     for 4 or 6 queries (rows and heads that share the key/value head):
//!         scores[q][key]  = sum over components of q * key       vectors of 16 keys, from the transposed key pages
//!         scale, cap, bias; -inf where not visible
//!         maximum, weights = exp(score - maximum), their sum
//!         values[q][c]    = values * rescale + sum over keys of weight * value    vectors of 16 components
//! ```
//!
//! Both products are the block of `block.rs`, straight from the pages in the cache's own type; a dozen queries and more
//! have a tile converted to f32 once. Only where a page's rows do not fill vectors (a block size or head dimension that
//! is no multiple of 16) is a tile first laid out in f32; the same code then runs on that. Where elements are codes, the
//! components of a group make a dot product of their own, which a key's scale multiplies as it joins the score; and the
//! weights are multiplied with the values' scales of a group before that group's components are summed.
//! They share the loads of those values that all of them see; what only some see, at the edges of the diagonal
//! and of a window, goes one by one, so that none touches a value it must not see.
//!
//! Tried: asking for the next tile's pages ahead. It gave nothing at contexts of 128 and cost 5 per cent at 32 times 1024,
//! where memory is busy anyway.

use std::ops::Range;

use super::block::multiply_add;
use super::exp::{exp_below_highest, exps_below_highest, tanh};
use super::{Element, Lanes};
use crate::cpu::attention::TILE_KEYS;
use crate::cpu::scalar;
use crate::cpu::task::{KvElement, SpanTask};
use crate::kv::SCALE_GROUP;

const WIDTH: usize = 16;
/// The most queries that share a key vector's load; how many do, an instruction set's registers say.
const MAX_QUERIES: usize = 6;

/// Vectors of keys in a tile.
const VECTORS: usize = TILE_KEYS / WIDTH;

type Scores = [[f32; TILE_KEYS]; MAX_QUERIES];

/// Some values of a tile.
struct Run<E> {
    /// Which of the tile's keys they belong to.
    keys: (usize, usize),
    /// Component 0 of the first one.
    from: *const E,
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
    start: usize,
    /// Component 0 of each 16 keys; null where no key is held.
    keys: [*const E; VECTORS],
    /// From one component to the next.
    key_stride: usize,
    /// Values that follow each other in memory; `num_runs` of them, in ascending order.
    runs: [Run<E>; VECTORS],
    num_runs: usize,
    /// From one value to the next.
    value_stride: usize,
    /// `[groups, 64]` of the tile's keys, and of its values; null where elements have none.
    key_scales: *const f32,
    value_scales: *const f32,
}

impl<E> Tile<E> {
    /// Nothing in it yet.
    fn empty(start: usize) -> Self {
        Self {
            start,
            keys: [std::ptr::null(); VECTORS],
            key_stride: 0,
            runs: [Run { keys: (0, 0), from: std::ptr::null() }; VECTORS],
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

/// Calls `$body` with 1 to 6 queries; one alone takes `$wide` vectors at a time.
macro_rules! with_queries {
    ($count:expr, $body:ident::<$l:ty, $e:ty, $v:ident, $wide:ident>($($argument:expr),*)) => {
        match $count {
            1 => $body::<$l, $e, 1, $wide>($($argument),*),
            2 => $body::<$l, $e, 2, $v>($($argument),*),
            3 => $body::<$l, $e, 3, $v>($($argument),*),
            4 => $body::<$l, $e, 4, $v>($($argument),*),
            5 if Q > 4 => $body::<$l, $e, 5, $v>($($argument),*),
            _ if Q > 4 => $body::<$l, $e, 6, $v>($($argument),*),
            count => unreachable!("{count} queries in a block of {Q}"),
        }
    };
}

/// [`walk_queries`] compiled for an element type and an instruction set.
pub(in crate::cpu) type Walk<E> = unsafe fn(&mut SpanTask<'_, E>, &Tile<E>);

/// An instruction set's walks, and how many queries they take at a time.
pub(in crate::cpu) struct Walks<E> {
    pub(in crate::cpu) pages: Walk<E>,
    pub(in crate::cpu) laid_out: Walk<f32>,
    pub(in crate::cpu) block_queries: usize,
}

/// From which number of queries a block on their components lie side by side: with fewer, one pointer each is not too
/// many for the registers.
const MIN_INTERLEAVED: usize = 5;

/// How many queries a block has: all the same, since a last one of few would leave most of the units idle.
fn block_of(num_queries: usize, at_most: usize) -> usize {
    num_queries.div_ceil(num_queries.div_ceil(at_most))
}

/// Copies the queries to `room`, block by block `[head_dim, MAX_QUERIES]`: a component of all of them is read at one
/// pointer and constant distances.
fn interleave<E>(task: &SpanTask<'_, E>, block: usize, room: &mut Vec<f32>) {
    let num_queries = task.num_queries();
    let len = task.head_dim * MAX_QUERIES;
    room.resize(room.len().max(num_queries.div_ceil(block) * len), 0.0);
    for query in 0..num_queries {
        let to = room[query / block * len + query % block..].iter_mut().step_by(MAX_QUERIES);
        to.zip(task.query(query)).for_each(|(to, &component)| *to = component);
    }
}

/// The span tile by tile: from the pages where they serve, else laid out.
///
/// # Safety
/// - Both walks are compiled for instructions that the machine has.
/// - The task's ranges lie within its buffers, and its block table names blocks of the cache.
pub(in crate::cpu) unsafe fn attend<E: Element + KvElement>(task: &mut SpanTask<'_, E>, walks: &Walks<E>) {
    let num_queries = task.num_queries();
    let width = task.head_dim.next_multiple_of(WIDTH);
    task.partial.max.fill(f32::NEG_INFINITY);
    task.partial.sum.fill(0.0);
    task.partial.values.fill(0.0);
    assert!(
        task.partial.max.len() == num_queries
            && task.partial.sum.len() == num_queries
            && task.partial.values.len() == num_queries * width,
        "room for another number of queries"
    );
    if num_queries == 0 {
        return;
    }
    let block = block_of(num_queries, walks.block_queries);
    task.interleaved = block >= MIN_INTERLEAVED && num_queries >= MIN_CONVERT_QUERIES;
    if task.interleaved {
        let mut room = std::mem::take(task.query_scratch);
        interleave(task, block, &mut room);
        *task.query_scratch = room;
    }
    let span = task.visible(0).start..task.visible(num_queries - 1).end;
    let nobody_sees = |task: &SpanTask<'_, E>, keys: &Range<usize>| {
        task.args.blocks.is_some() && (0..num_queries).all(|query| task.sees_none(query, keys))
    };
    let pages_serve = task.block_size.is_multiple_of(WIDTH) && task.head_dim.is_multiple_of(WIDTH);
    let mut start = span.start / TILE_KEYS * TILE_KEYS;
    while start < span.end {
        let held = start.max(span.start)..(start + TILE_KEYS).min(span.end);
        if nobody_sees(task, &held) {
            start += TILE_KEYS;
            continue;
        }
        let mut scales = std::mem::take(task.scale_scratch);
        // SAFETY: the caller's duties; the tiles hold the keys `held`, which are those that any query sees, and `scales`
        // lives as long as they.
        unsafe {
            if pages_serve {
                (walks.pages)(task, &tile_of_pages(task, start, held, &mut scales));
            } else {
                let mut room = std::mem::take(task.scratch);
                let tile = lay_out(task, start, held, &mut room, &mut scales);
                (walks.laid_out)(&mut task.without_pages(), &tile);
                *task.scratch = room;
            }
        }
        *task.scale_scratch = scales;
        start += TILE_KEYS;
    }
}

/// A tile straight from the pages, whose rows fill vectors.
fn tile_of_pages<E: Element + KvElement>(
    task: &SpanTask<'_, E>,
    start: usize,
    held: Range<usize>,
    scales: &mut Vec<f32>,
) -> Tile<E> {
    let (block_size, head_dim) = (task.block_size, task.head_dim);
    let mut tile = Tile { key_stride: block_size, value_stride: head_dim, ..Tile::empty(start) };
    tile.take_scales(task, held.clone(), scales);
    for vector in (held.start - start) / WIDTH..(held.end - start).div_ceil(WIDTH) {
        let at = task.key_index(start + vector * WIDTH);
        tile.keys[vector] = task.keys[at..at + (head_dim - 1) * block_size + WIDTH].as_ptr();
    }
    let mut position = held.start;
    while position < held.end {
        let run = (block_size - position % block_size).min(held.end - position);
        let at = task.value_index(position);
        let first = position - start;
        tile.runs[tile.num_runs] =
            Run { keys: (first, first + run), from: task.values[at..at + run * head_dim].as_ptr() };
        tile.num_runs += 1;
        position += run;
    }
    tile
}

/// A tile copied to `room` in f32 (codes as they are): keys `[head_dim, 64]`, then values `[64, padded head_dim]`.
fn lay_out<E: Element + KvElement>(
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
        runs: [Run { keys: (0, TILE_KEYS), from: values.as_ptr() }; VECTORS],
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

/// Queries from which on a tile is converted to f32 once, instead of for every few of them.
const MIN_CONVERT_QUERIES: usize = 12;

/// All queries of the task over one tile of pages.
///
/// # Safety
/// As [`walk_queries`].
#[inline(always)]
pub(in crate::cpu) unsafe fn walk_pages<
    L: Lanes,
    E: Element + KvElement,
    const Q: usize,
    const V: usize,
    const W: usize,
>(
    task: &mut SpanTask<'_, E>,
    tile: &Tile<E>,
) {
    // SAFETY: the caller's duties are the same; the converted tile lies in `room`, which lives as long.
    unsafe {
        if size_of::<E>() == size_of::<f32>() || task.num_queries() < MIN_CONVERT_QUERIES {
            return walk_queries::<L, E, Q, V, W>(task, tile);
        }
        let mut room = std::mem::take(task.scratch);
        let converted = convert::<L, E>(tile, task.head_dim, &mut room);
        walk_queries::<L, f32, Q, V, W>(&mut task.without_pages(), &converted);
        *task.scratch = room;
    }
}

/// A tile in f32 (codes as they are), in `room`: keys `[head_dim, 64]`, then values `[64, head_dim]`.
///
/// # Safety
/// As [`walk_queries`]; `head_dim` is a multiple of 16 and the tile has a run at least.
#[inline(always)]
unsafe fn convert<L: Lanes, E: Element>(tile: &Tile<E>, head_dim: usize, room: &mut Vec<f32>) -> Tile<f32> {
    // What is left over in it belongs to keys that no query sees.
    room.resize(room.len().max(2 * head_dim * TILE_KEYS), 0.0);
    let (keys, values) = room.split_at_mut(head_dim * TILE_KEYS);
    let (keys, values) = (keys.as_mut_ptr(), values.as_mut_ptr());
    let mut converted = Tile {
        key_stride: TILE_KEYS,
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
                E::lanes::<L>(from.add(i * tile.key_stride)).store(to.add(i * TILE_KEYS));
            }
            converted.keys[vector] = to.cast_const();
        }
        for &Run { keys: (begin, end), from } in &tile.runs[..tile.num_runs] {
            let to = values.add(begin * head_dim);
            for i in (0..(end - begin) * head_dim).step_by(WIDTH) {
                E::lanes::<L>(from.add(i)).store(to.add(i));
            }
        }
        // They follow each other now.
        let (first, last) = (tile.runs[0], tile.runs[tile.num_runs - 1]);
        let from = values.add(first.keys.0 * head_dim).cast_const();
        converted.runs[0] = Run { keys: (first.keys.0, last.keys.1), from };
        converted.num_runs = 1;
    }
    converted
}

/// All queries of the task over one tile, at most `Q` at a time: `V` vectors at a time for several of them, `W` for one.
///
/// # Safety
/// As [`Lanes`]; the tile holds every key of its positions that a query sees.
#[inline(always)]
pub(in crate::cpu) unsafe fn walk_queries<L: Lanes, T: Element, const Q: usize, const V: usize, const W: usize>(
    task: &mut SpanTask<'_, T>,
    tile: &Tile<T>,
) {
    let num_queries = task.num_queries();
    let head_dim = task.head_dim;
    let width = head_dim.next_multiple_of(WIDTH);
    let mut scores: Scores = [[0.0; TILE_KEYS]; MAX_QUERIES];
    let block = block_of(num_queries, Q);
    let mut first = 0;
    while first < num_queries {
        let count = (num_queries - first).min(block);
        let mut visible = [const { 0..0 }; MAX_QUERIES];
        let mut queries = [std::ptr::null(); MAX_QUERIES];
        for q in 0..count {
            let keys = task.visible(first + q);
            let start = keys.start.clamp(tile.start, tile.start + TILE_KEYS) - tile.start;
            let end = keys.end.clamp(tile.start, tile.start + TILE_KEYS) - tile.start;
            visible[q] = start..end.max(start);
            if task.sees_none(first + q, &(tile.start + start..tile.start + visible[q].end)) {
                visible[q] = start..start;
            }
            queries[q] = task.query(first + q).as_ptr();
        }
        let some = || visible[..count].iter().filter(|keys| !keys.is_empty());
        let seen = some().map(|keys| keys.start).min().unwrap_or(0)..some().map(|keys| keys.end).max().unwrap_or(0);
        if seen.is_empty() {
            first += count;
            continue;
        }
        let vectors = seen.start / WIDTH..seen.end.div_ceil(WIDTH);
        // SAFETY: the caller's duties; vectors and keys named lie within the tile and hold keys that a query sees;
        // queries have head_dim components, values have `width` floats a query.
        unsafe {
            if Q >= MIN_INTERLEAVED && task.interleaved && count == block {
                let components = task.query_scratch[first / block * head_dim * MAX_QUERIES..].as_ptr();
                for (q, query) in queries.iter_mut().enumerate() {
                    *query = components.add(q);
                }
                if count == MIN_INTERLEAVED {
                    score_by::<L, T, MIN_INTERLEAVED, V, MAX_QUERIES>(tile, &queries, head_dim, vectors, &mut scores);
                } else {
                    score_by::<L, T, MAX_QUERIES, V, MAX_QUERIES>(tile, &queries, head_dim, vectors, &mut scores);
                }
            } else {
                with_queries!(count, score::<L, T, V, W>(tile, &queries, head_dim, vectors, &mut scores));
            }
            // In two passes, so that no query waits for the maximum of the one before it.
            let mut maxes = [0.0; MAX_QUERIES];
            for q in 0..count {
                if !visible[q].is_empty() {
                    maxes[q] = finish_scores::<L, T>(task, tile, first + q, visible[q].clone(), &mut scores[q]);
                }
            }
            for q in 0..count {
                if !visible[q].is_empty() {
                    weigh::<L, T>(task, first + q, visible[q].clone(), maxes[q], &mut scores[q]);
                }
            }
            let to = &mut task.partial.values[first * width..(first + count) * width];
            if tile.value_scales.is_null() {
                add_queries::<L, T, Q, V, W>(tile, &scores, &visible[..count], to, 0..width);
            } else {
                for group in 0..head_dim.div_ceil(SCALE_GROUP) {
                    let scales = tile.value_scales.add(group * TILE_KEYS);
                    let weights = scaled::<L>(&scores, &visible[..count], scales);
                    let components = group * SCALE_GROUP..((group + 1) * SCALE_GROUP).min(width);
                    add_queries::<L, T, Q, V, W>(tile, &weights, &visible[..count], to, components);
                }
            }
        }
        first += count;
    }
}

/// The weights of what queries see, multiplied with a group's scales.
///
/// # Safety
/// As [`Lanes`]; `scales` is valid for a tile's.
#[inline(always)]
unsafe fn scaled<L: Lanes>(weights: &Scores, visible: &[Range<usize>], scales: *const f32) -> Scores {
    let mut scaled: Scores = [[0.0; TILE_KEYS]; MAX_QUERIES];
    for (q, keys) in visible.iter().enumerate() {
        for vector in keys.start / WIDTH..keys.end.div_ceil(WIDTH) {
            // SAFETY: visible keys lie within the tile.
            unsafe {
                let weight = L::load(weights[q].as_ptr().add(vector * WIDTH));
                weight.mul(L::load(scales.add(vector * WIDTH))).store(scaled[q].as_mut_ptr().add(vector * WIDTH));
            }
        }
    }
    scaled
}

/// Adds some components of the tile's values, weighted, to the queries that `visible` has: what all of them see goes
/// together, what lies before and behind it one by one, each query's in order.
///
/// # Safety
/// As [`walk_queries`]; `to` has as many floats for each query, and the components are whole vectors of these.
#[inline(always)]
unsafe fn add_queries<L: Lanes, T: Element, const Q: usize, const V: usize, const W: usize>(
    tile: &Tile<T>,
    scores: &Scores,
    visible: &[Range<usize>],
    to: &mut [f32],
    components: Range<usize>,
) {
    let count = visible.len();
    let width = to.len() / count;
    let (mut start, mut end) = (0, TILE_KEYS);
    for keys in visible {
        (start, end) = (start.max(keys.start), end.min(keys.end));
    }
    let shared = if start < end { start..end } else { TILE_KEYS..TILE_KEYS };
    let mut weights = [std::ptr::null(); MAX_QUERIES];
    // SAFETY: the caller's duties; keys named lie within the tile.
    unsafe {
        for q in 0..count {
            weights[q] = scores[q].as_ptr();
            let own = visible[q].start..visible[q].end.min(shared.start);
            let to = Values { to: to[q * width..].as_mut_ptr(), width, components: components.clone() };
            add_values::<L, T, 1, W>(tile, &[weights[q]; MAX_QUERIES], own, to);
        }
        let together = Values { to: to.as_mut_ptr(), width, components: components.clone() };
        with_queries!(count, add_values::<L, T, V, W>(tile, &weights, shared.clone(), together));
        for q in 0..count {
            let own = visible[q].start.max(shared.end)..visible[q].end;
            let to = Values { to: to[q * width..].as_mut_ptr(), width, components: components.clone() };
            add_values::<L, T, 1, W>(tile, &[weights[q]; MAX_QUERIES], own, to);
        }
    }
}

/// Where weighted values are added to.
struct Values {
    /// Component 0 of the first query.
    to: *mut f32,
    /// From one query to the next.
    width: usize,
    /// Whole vectors of them.
    components: Range<usize>,
}

/// Dot products of `Q` queries, each with its components one after the other, with the tile's key vectors.
///
/// # Safety
/// As [`score_by`].
#[inline(always)]
unsafe fn score<L: Lanes, T: Element, const Q: usize, const V: usize>(
    tile: &Tile<T>,
    queries: &[*const f32; MAX_QUERIES],
    head_dim: usize,
    vectors: Range<usize>,
    scores: &mut Scores,
) {
    // SAFETY: the caller's duties.
    unsafe { score_by::<L, T, Q, V, 1>(tile, queries, head_dim, vectors, scores) }
}

/// As [`score`], with `STEP` floats from one component to the next.
///
/// # Safety
/// As [`walk_queries`]: the first Q pointers are valid for `head_dim` floats `STEP` apart, the vectors are held by the tile.
#[inline(always)]
unsafe fn score_by<L: Lanes, T: Element, const Q: usize, const V: usize, const STEP: usize>(
    tile: &Tile<T>,
    queries: &[*const f32; MAX_QUERIES],
    head_dim: usize,
    vectors: Range<usize>,
    scores: &mut Scores,
) {
    // SAFETY: the caller's duties; `vector + V` stays within `vectors`.
    unsafe {
        let mut vector = vectors.start;
        while vector + V <= vectors.end {
            score_vectors::<L, T, Q, V, STEP>(tile, queries, head_dim, vector, scores);
            vector += V;
        }
        // With V = 1 nothing is left; the condition keeps the compiler from making the same loop twice.
        while V > 1 && vector < vectors.end {
            score_vectors::<L, T, Q, 1, STEP>(tile, queries, head_dim, vector, scores);
            vector += 1;
        }
    }
}

/// # Safety
/// As [`score_by`], for the vectors `vector..vector + V`.
#[inline(always)]
unsafe fn score_vectors<L: Lanes, T: Element, const Q: usize, const V: usize, const STEP: usize>(
    tile: &Tile<T>,
    queries: &[*const f32; MAX_QUERIES],
    head_dim: usize,
    vector: usize,
    scores: &mut Scores,
) {
    // SAFETY: the caller's duties; scores have room for a tile.
    unsafe {
        let mut acc = [[L::splat(0.0); V]; Q];
        let mut from = [tile.keys[vector]; V];
        from.copy_from_slice(&tile.keys[vector..vector + V]);
        let mut a = [queries[0]; Q];
        a.copy_from_slice(&queries[..Q]);
        if tile.key_scales.is_null() {
            multiply_add::<L, _, Q, V, 0, STEP>(a, head_dim, from, tile.key_stride, &mut acc);
        } else {
            for group in 0..head_dim.div_ceil(SCALE_GROUP) {
                let first = group * SCALE_GROUP;
                let len = (head_dim - first).min(SCALE_GROUP);
                let (mut a, mut from) = (a, from);
                for a in &mut a {
                    *a = a.add(first * STEP);
                }
                for from in &mut from {
                    *from = from.add(first * tile.key_stride);
                }
                let mut sums = [[L::splat(0.0); V]; Q];
                multiply_add::<L, _, Q, V, 0, STEP>(a, len, from, tile.key_stride, &mut sums);
                for v in 0..V {
                    let scale = L::load(tile.key_scales.add(group * TILE_KEYS + (vector + v) * WIDTH));
                    for q in 0..Q {
                        acc[q][v] = sums[q][v].mul_add(scale, acc[q][v]);
                    }
                }
            }
        }
        for q in 0..Q {
            for v in 0..V {
                acc[q][v].store(scores[q].as_mut_ptr().add((vector + v) * WIDTH));
            }
        }
    }
}

/// One query's dot products to scores: scaled, capped, biased, -inf where not visible. Gives the largest of them and of
/// those before.
///
/// # Safety
/// As [`walk_queries`]; `visible` is not empty and lies within the tile.
#[inline(always)]
unsafe fn finish_scores<L: Lanes, E: Element>(
    task: &SpanTask<'_, E>,
    tile: &Tile<E>,
    query: usize,
    visible: Range<usize>,
    scores: &mut [f32; TILE_KEYS],
) -> f32 {
    let args = *task.args;
    let vectors = visible.start / WIDTH..visible.end.div_ceil(WIDTH);
    let to = scores.as_mut_ptr();
    // SAFETY: vectors lie within the tile.
    unsafe {
        let scale = L::splat(args.scale);
        for vector in vectors.clone() {
            let mut score = L::load(to.add(vector * WIDTH)).mul(scale);
            if let Some(cap) = args.soft_cap {
                score = tanh(score.div(L::splat(cap))).mul(L::splat(cap));
            }
            if let Some(biases) = args.biases {
                let at = task.head(query) * args.num_biases() + tile.start + vector * WIDTH;
                score = score.add(L::load(biases[at..at + WIDTH].as_ptr()));
            }
            score.store(to.add(vector * WIDTH));
        }
        scores[vectors.start * WIDTH..visible.start].fill(f32::NEG_INFINITY);
        scores[visible.end..vectors.end * WIDTH].fill(f32::NEG_INFINITY);
        if args.blocks.is_some() {
            for key in visible {
                if !task.sees(query, tile.start + key) {
                    scores[key] = f32::NEG_INFINITY;
                }
            }
        }

        let to = scores.as_mut_ptr();
        let mut maxes = L::splat(task.partial.max[query]);
        for vector in vectors {
            maxes = L::load(to.add(vector * WIDTH)).max(maxes);
        }
        maxes.join_max()
    }
}

/// One query's scores to softmax weights; brings maximum, sum and values to the new maximum.
///
/// # Safety
/// As [`walk_queries`]; `visible` lies within the tile.
#[inline(always)]
unsafe fn weigh<L: Lanes, E: Element>(
    task: &mut SpanTask<'_, E>,
    query: usize,
    visible: Range<usize>,
    new_max: f32,
    scores: &mut [f32; TILE_KEYS],
) {
    let vectors = visible.start / WIDTH..visible.end.div_ceil(WIDTH);
    let to = scores.as_mut_ptr();
    let old_max = task.partial.max[query];
    // SAFETY: vectors lie within the tile; a query's values are `width` floats, a multiple of 16.
    unsafe {
        let (mut sums, highest) = (L::splat(0.0), L::splat(new_max));
        let mut vector = vectors.start;
        while vector + 2 <= vectors.end {
            let to = to.add(vector * WIDTH);
            let weights = exps_below_highest([L::load(to).sub(highest), L::load(to.add(WIDTH)).sub(highest)]);
            sums = sums.add(weights[0]).add(weights[1]);
            weights[0].store(to);
            weights[1].store(to.add(WIDTH));
            vector += 2;
        }
        if vector < vectors.end {
            let to = to.add(vector * WIDTH);
            let weights = exp_below_highest(L::load(to).sub(highest));
            sums = sums.add(weights);
            weights.store(to);
        }
        // exp(0) is exactly 1.
        let rescale = if new_max == old_max { 1.0 } else { scalar::exp::exp(old_max - new_max) };
        task.partial.sum[query] = task.partial.sum[query].mul_add(rescale, sums.join_add());
        task.partial.max[query] = new_max;
        if rescale != 1.0 {
            let width = task.head_dim.next_multiple_of(WIDTH);
            let values = task.partial.values[query * width..(query + 1) * width].as_mut_ptr();
            for i in (0..width).step_by(WIDTH) {
                L::load(values.add(i)).mul(L::splat(rescale)).store(values.add(i));
            }
        }
    }
}

/// Adds some components of the values of the tile's keys `visible`, weighted, to `Q` queries.
///
/// # Safety
/// As [`walk_queries`]: the first Q pointers are valid for a tile's weights, `values` for Q queries; all of them see exactly
/// the keys `visible`.
#[inline(always)]
unsafe fn add_values<L: Lanes, T: Element, const Q: usize, const V: usize>(
    tile: &Tile<T>,
    weights: &[*const f32; MAX_QUERIES],
    visible: Range<usize>,
    values: Values,
) {
    let Values { to, width, components } = values;
    if visible.is_empty() {
        return;
    }
    for run in 0..tile.num_runs {
        let Run { keys: (begin, end), from } = tile.runs[run];
        let keys = begin.max(visible.start)..end.min(visible.end);
        if keys.is_empty() {
            continue;
        }
        // SAFETY: the caller's duties; the run holds `keys`, whose first lies `keys.start - begin` values into it;
        // components stay below `width`.
        unsafe {
            let from = from.add((keys.start - begin) * tile.value_stride);
            let mut a = [weights[0]; Q];
            for q in 0..Q {
                a[q] = weights[q].add(keys.start);
            }
            let mut component = components.start;
            while component + V * WIDTH <= components.end {
                let (from, to) = (from.add(component), to.add(component));
                add_components::<L, T, Q, V>(a, keys.len(), from, tile.value_stride, to, width);
                component += V * WIDTH;
            }
            // What scales have in common is a pair of vectors, which one accumulator each would make wait.
            while V > 2 && component + 2 * WIDTH <= components.end {
                let (from, to) = (from.add(component), to.add(component));
                add_components::<L, T, Q, 2>(a, keys.len(), from, tile.value_stride, to, width);
                component += 2 * WIDTH;
            }
            while V > 1 && component < components.end {
                let (from, to) = (from.add(component), to.add(component));
                add_components::<L, T, Q, 1>(a, keys.len(), from, tile.value_stride, to, width);
                component += WIDTH;
            }
        }
    }
}

/// `to[q] += sum over run of weights[q] * from`, for `16 * V` components.
///
/// # Safety
/// As [`Lanes`]; `weights[q]` is valid for `run` floats, `from` for `run` rows `stride` apart, `to` for Q rows `width`
/// apart, all of `16 * V` components.
#[inline(always)]
unsafe fn add_components<L: Lanes, E: Element, const Q: usize, const V: usize>(
    weights: [*const f32; Q],
    run: usize,
    from: *const E,
    stride: usize,
    to: *mut f32,
    width: usize,
) {
    // SAFETY: the caller's duties.
    unsafe {
        let mut acc = [[L::splat(0.0); V]; Q];
        let mut vectors = [from; V];
        for v in 0..V {
            vectors[v] = from.add(v * WIDTH);
            for q in 0..Q {
                acc[q][v] = L::load(to.add(q * width + v * WIDTH));
            }
        }
        multiply_add::<L, _, Q, V, 0, 1>(weights, run, vectors, stride, &mut acc);
        for q in 0..Q {
            for v in 0..V {
                acc[q][v].store(to.add(q * width + v * WIDTH));
            }
        }
    }
}
