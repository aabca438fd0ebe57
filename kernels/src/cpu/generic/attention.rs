//! Attention of one span, a tile of keys at a time, some queries at a time.
//!
//! ```text
//! for each tile of 64 positions:
//!     for 4 or 6 queries (rows and heads that share the key/value head):
//!         scores[q][key]  = sum over components of q * key       vectors of 16 keys, from the transposed key pages
//!         scale, cap, bias; -inf where not visible
//!     where the highest score of any of them is more than MAX_RISE above its query's reference:
//!         that becomes the reference; sums and values are rescaled                seldom but in the first tile
//!     for the same queries:
//!         weights = exp(score - reference), and their sums                        sixteen lanes of them
//!         values[q][c]    = values + sum over keys of weight * value              vectors of 16 components
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
//! A few queries would spend their time waiting for memory, since a block's page ends where the processors' own prefetchers
//! have hardly begun: what is loaded from a page (but f32 for many queries) asks for what lies at the same place of the tile
//! that comes next, into the second-level cache (a tile's pages would fill the first). Measured: 1.3 to 1.7
//! (`benches/RESULTS.md`).
//!
//! It must not know where a tile lies (`tile.rs`) nor how products are computed (`products.rs`).

mod products;
mod tile;

use std::ops::Range;

use products::{add_one, add_queries, score, score_interleaved};
pub(in crate::cpu) use tile::Tile;
use tile::{convert, lay_out, tile_of_pages};

use super::exp::{exps_below_highest, tanh};
use super::{Element, Lanes};
use crate::cpu::attention::{MANY_QUERIES, MAX_RISE, TILE_KEYS};
use crate::cpu::scalar;
use crate::cpu::task::{KvElement, Partial, SpanTask};
use crate::kv::SCALE_GROUP;

const WIDTH: usize = 16;
/// The most queries that share a key vector's load; how many do, an instruction set's registers say.
const MAX_QUERIES: usize = 6;

/// Vectors of keys in a tile.
const VECTORS: usize = TILE_KEYS / WIDTH;

type Scores = [[f32; TILE_KEYS]; MAX_QUERIES];

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
    for (first, to) in (0..num_queries).step_by(block).zip(room.chunks_exact_mut(len)) {
        let to = to.as_chunks_mut::<MAX_QUERIES>().0;
        for q in 0..block.min(num_queries - first).min(MAX_QUERIES) {
            for (to, &component) in to.iter_mut().zip(task.query(first + q)) {
                to[q] = component;
            }
        }
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
    if task.begins {
        task.partial.references.fill(f32::NEG_INFINITY);
        task.partial.sums.fill(0.0);
        task.partial.values.fill(0.0);
    }
    assert!(
        task.partial.references.len() == num_queries
            && task.partial.sums.len() == num_queries * WIDTH
            && task.partial.values.len() == num_queries * width,
        "room for another number of queries"
    );
    if num_queries == 0 {
        return;
    }
    let block = block_of(num_queries, walks.block_queries);
    let interleaves = block >= MIN_INTERLEAVED && num_queries >= MANY_QUERIES;
    if interleaves && !task.interleaved {
        let mut room = std::mem::take(task.query_scratch);
        interleave(task, block, &mut room);
        *task.query_scratch = room;
    }
    task.interleaved = interleaves;
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
        if task.num_queries() < MANY_QUERIES {
            return walk_queries::<L, E, Q, V, W, true>(task, tile);
        }
        if size_of::<E>() == size_of::<f32>() {
            return walk_queries::<L, E, Q, V, W, false>(task, tile);
        }
        let mut room = std::mem::take(task.scratch);
        let converted = convert::<L, E>(tile, task.head_dim, &mut room);
        walk_queries::<L, f32, Q, V, W, false>(&mut task.without_pages(), &converted);
        *task.scratch = room;
    }
}

/// All queries of the task over one tile, at most `Q` at a time: `V` vectors at a time for several of them, `W` for one. `ASKS`: the
/// next tile is asked for, where the tile says where it lies.
///
/// # Safety
/// As [`Lanes`]; the tile holds every key of its positions that a query sees.
#[inline(always)]
pub(in crate::cpu) unsafe fn walk_queries<
    L: Lanes,
    T: Element,
    const Q: usize,
    const V: usize,
    const W: usize,
    const ASKS: bool,
>(
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
                score_interleaved::<L, T, V>(tile, components, count, head_dim, vectors, &mut scores);
            } else {
                score::<L, T, Q, V, W, ASKS>(tile, &queries, count, head_dim, vectors, &mut scores);
            }
            // In passes, so that no query waits for the one before it.
            let lowest = L::splat(f32::NEG_INFINITY);
            let (mut highest, mut rise) = ([lowest; MAX_QUERIES], lowest);
            for q in 0..count {
                if !visible[q].is_empty() {
                    highest[q] = finish_scores::<L, T>(task, tile, first + q, visible[q].clone(), &mut scores[q]);
                    rise = highest[q].sub(L::splat(task.partial.references[first + q])).max(rise);
                }
            }
            if rise.join_max() > MAX_RISE {
                for q in 0..count {
                    raise::<L, T>(task, first + q, highest[q].join_max());
                }
            }
            for q in 0..count {
                if !visible[q].is_empty() {
                    weigh::<L, T, V>(task, first + q, visible[q].clone(), &mut scores[q]);
                }
            }
            if tile.value_scales.is_null() {
                add_block::<L, T, Q, V, W, ASKS>(task, tile, first, &scores, &visible[..count], 0..width);
            } else {
                for group in 0..head_dim.div_ceil(SCALE_GROUP) {
                    let scales = tile.value_scales.add(group * TILE_KEYS);
                    let weights = scaled::<L>(&scores, &visible[..count], scales);
                    let components = group * SCALE_GROUP..((group + 1) * SCALE_GROUP).min(width);
                    add_block::<L, T, Q, V, W, ASKS>(task, tile, first, &weights, &visible[..count], components);
                }
            }
        }
        first += count;
    }
}

/// Adds some components of the tile's values, weighted, to the queries from `first` on that `visible` has.
///
/// # Safety
/// As [`add_queries`].
#[inline(always)]
unsafe fn add_block<L: Lanes, T: Element, const Q: usize, const V: usize, const W: usize, const ASKS: bool>(
    task: &mut SpanTask<'_, T>,
    tile: &Tile<T>,
    first: usize,
    weights: &Scores,
    visible: &[Range<usize>],
    components: Range<usize>,
) {
    let width = task.head_dim.next_multiple_of(WIDTH);
    if !task.hides_within_tiles() {
        let to = &mut task.partial.values[first * width..(first + visible.len()) * width];
        // SAFETY: the caller's duties.
        unsafe { add_queries::<L, T, Q, V, W, ASKS>(tile, weights, visible, to, components) };
        return;
    }
    // The weight of a hidden key is 0, but a value that is no finite number would make it none.
    for (q, keys) in visible.iter().enumerate() {
        let mut rest = keys.clone();
        while let Some(keys) = task.next_seen(first + q, tile.start, &mut rest) {
            let to = &mut task.partial.values[(first + q) * width..(first + q + 1) * width];
            // SAFETY: the caller's duties; the keys are some of those that the query sees.
            unsafe { add_one::<L, T, W, ASKS>(tile, &weights[q..], keys, to, components.clone()) };
        }
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

/// One query's dot products to scores: scaled, capped, biased, -inf where not visible. Gives the highest of them in each lane.
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
) -> L {
    // Not copied: what is read from a copy in other pieces than it was written in waits until it has left the core.
    let args = task.args;
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
        let mut highest = L::splat(f32::NEG_INFINITY);
        for vector in vectors {
            highest = L::load(to.add(vector * WIDTH)).max(highest);
        }
        highest
    }
}

/// Makes a tile's highest score a query's reference, if it is too far above the one that it has.
///
/// # Safety
/// As [`Lanes`]; a query's values are a multiple of 16.
#[inline(always)]
unsafe fn raise<L: Lanes, E: Element>(task: &mut SpanTask<'_, E>, query: usize, highest: f32) {
    let width = task.head_dim.next_multiple_of(WIDTH);
    let Partial { references, sums, values } = &mut task.partial;
    let reference = references[query];
    // Not where both are -inf, either: a query that sees nothing, or no number.
    if highest - reference > MAX_RISE {
        references[query] = highest;
        if reference == f32::NEG_INFINITY {
            // Nothing has been added to them yet.
            return;
        }
        let rescale = scalar::exp::exp(reference - highest);
        let (sums, values) = (&mut sums[query * WIDTH..][..WIDTH], &mut values[query * width..][..width]);
        for x in [sums, values].into_iter().flat_map(|x| x.chunks_exact_mut(WIDTH)) {
            // SAFETY: a chunk has 16 floats.
            unsafe { L::load(x.as_ptr()).mul(L::splat(rescale)).store(x.as_mut_ptr()) };
        }
    }
}

/// One query's scores to softmax weights, which are added to its sums.
///
/// # Safety
/// As [`walk_queries`]; `visible` lies within the tile.
#[inline(always)]
unsafe fn weigh<L: Lanes, E: Element, const V: usize>(
    task: &mut SpanTask<'_, E>,
    query: usize,
    visible: Range<usize>,
    scores: &mut [f32; TILE_KEYS],
) {
    let vectors = visible.start / WIDTH..visible.end.div_ceil(WIDTH);
    let to = scores.as_mut_ptr();
    let sums = task.partial.sums[query * WIDTH..][..WIDTH].as_mut_ptr();
    // SAFETY: vectors lie within the tile; `sums` are 16 floats.
    unsafe {
        let (mut sum, reference) = (L::load(sums), L::splat(task.partial.references[query]));
        let mut vector = vectors.start;
        // As many together as there are registers for.
        while V >= 4 && vector + 4 <= vectors.end {
            sum = weigh_vectors::<L, 4>(to.add(vector * WIDTH), reference, sum);
            vector += 4;
        }
        while vector + 2 <= vectors.end {
            sum = weigh_vectors::<L, 2>(to.add(vector * WIDTH), reference, sum);
            vector += 2;
        }
        if vector < vectors.end {
            sum = weigh_vectors::<L, 1>(to.add(vector * WIDTH), reference, sum);
        }
        sum.store(sums);
    }
}

/// Some vectors of scores to weights. Gives `sum` with these added.
///
/// # Safety
/// As [`Lanes`]; `scores` are N vectors.
#[inline(always)]
unsafe fn weigh_vectors<L: Lanes, const N: usize>(scores: *mut f32, reference: L, mut sum: L) -> L {
    // SAFETY: the caller's duties.
    unsafe {
        let mut weights = [reference; N];
        for n in 0..N {
            weights[n] = L::load(scores.add(n * WIDTH)).sub(reference);
        }
        weights = exps_below_highest(weights);
        for n in 0..N {
            sum = sum.add(weights[n]);
            weights[n].store(scores.add(n * WIDTH));
        }
        sum
    }
}
