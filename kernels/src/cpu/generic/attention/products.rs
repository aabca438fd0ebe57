//! The two products of attention over a tile: queries with keys, and weights with values.
//!
//! It must not know what is visible, nor how scores become weights. What queries share is loaded once for all of them.

use std::ops::Range;

use super::tile::{Run, Tile, ask};
use super::{MAX_QUERIES, MIN_INTERLEAVED, Scores, WIDTH};
use crate::cpu::attention::TILE_KEYS;
use crate::cpu::generic::block::multiply_add;
use crate::cpu::generic::{Element, Lanes};
use crate::kv::SCALE_GROUP;

/// Calls `$body` with 1 to 6 queries; one alone takes `$wide` vectors at a time.
macro_rules! with_queries {
    ($count:expr, $body:ident::<$l:ty, $e:ty, $v:ident, $wide:ident, $asks:ident>($($argument:expr),*)) => {
        match $count {
            1 => $body::<$l, $e, 1, $wide, $asks>($($argument),*),
            2 => $body::<$l, $e, 2, $v, $asks>($($argument),*),
            3 => $body::<$l, $e, 3, $v, $asks>($($argument),*),
            4 => $body::<$l, $e, 4, $v, $asks>($($argument),*),
            5 if Q > 4 => $body::<$l, $e, 5, $v, $asks>($($argument),*),
            _ if Q > 4 => $body::<$l, $e, 6, $v, $asks>($($argument),*),
            count => unreachable!("{count} queries in a block of {Q}"),
        }
    };
}

/// Adds some components of the tile's values, weighted, to the queries that `visible` has: what all of them see goes
/// together, what lies before and behind it one by one, each query's in order.
///
/// # Safety
/// As [`Lanes`]; the tile holds the visible keys; `to` has as many floats for each query, and the components are whole vectors of these.
#[inline(always)]
pub(super) unsafe fn add_queries<
    L: Lanes,
    T: Element,
    const Q: usize,
    const V: usize,
    const W: usize,
    const ASKS: bool,
>(
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
    // SAFETY: the caller's duties; keys named lie within the tile.
    unsafe {
        for q in 0..count {
            let own = visible[q].start..visible[q].end.min(shared.start);
            add_one::<L, T, W, ASKS>(tile, &scores[q..], own, &mut to[q * width..], components.clone());
        }
        let together = Values { to: to.as_mut_ptr(), width, components: components.clone() };
        with_queries!(count, add_values::<L, T, V, W, ASKS>(tile, scores, shared.clone(), together));
        for q in 0..count {
            let own = visible[q].start.max(shared.end)..visible[q].end;
            add_one::<L, T, W, ASKS>(tile, &scores[q..], own, &mut to[q * width..], components.clone());
        }
    }
}

/// Adds some components of the values of the tile's keys `visible`, weighted by the first of `weights`, to one query's.
///
/// # Safety
/// As [`add_queries`].
#[inline(always)]
pub(super) unsafe fn add_one<L: Lanes, T: Element, const W: usize, const ASKS: bool>(
    tile: &Tile<T>,
    weights: &[[f32; TILE_KEYS]],
    visible: Range<usize>,
    to: &mut [f32],
    components: Range<usize>,
) {
    // One query has no other to step to.
    let to = Values { to: to.as_mut_ptr(), width: 0, components };
    // SAFETY: the caller's duties.
    unsafe { add_values::<L, T, 1, W, ASKS>(tile, weights, visible, to) };
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

/// Dot products of `count` queries, at most `Q`, each with its components one after the other, with the tile's key vectors.
///
/// # Safety
/// As [`score_by`], of so many queries.
#[inline(always)]
pub(super) unsafe fn score<L: Lanes, T: Element, const Q: usize, const V: usize, const W: usize, const ASKS: bool>(
    tile: &Tile<T>,
    queries: &[*const f32; MAX_QUERIES],
    count: usize,
    head_dim: usize,
    vectors: Range<usize>,
    scores: &mut Scores,
) {
    // SAFETY: the caller's duties.
    unsafe { with_queries!(count, score_plain::<L, T, V, W, ASKS>(tile, queries, head_dim, vectors, scores)) }
}

/// The same of as many queries as a block has, whose components lie side by side, `[head_dim, MAX_QUERIES]` from `components` on.
///
/// # Safety
/// As [`score_by`], of so many queries.
#[inline(always)]
pub(super) unsafe fn score_interleaved<L: Lanes, T: Element, const V: usize>(
    tile: &Tile<T>,
    components: *const f32,
    count: usize,
    head_dim: usize,
    vectors: Range<usize>,
    scores: &mut Scores,
) {
    let queries = &[components; MAX_QUERIES];
    // SAFETY: the caller's duties.
    unsafe {
        match count {
            MIN_INTERLEAVED => {
                score_by::<L, T, MIN_INTERLEAVED, V, MAX_QUERIES, false>(tile, queries, head_dim, vectors, scores);
            }
            MAX_QUERIES => {
                score_by::<L, T, MAX_QUERIES, V, MAX_QUERIES, false>(tile, queries, head_dim, vectors, scores);
            }
            count => unreachable!("{count} queries side by side"),
        }
    }
}

/// [`score_by`] of queries whose components follow each other.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn score_plain<L: Lanes, T: Element, const Q: usize, const V: usize, const ASKS: bool>(
    tile: &Tile<T>,
    queries: &[*const f32; MAX_QUERIES],
    head_dim: usize,
    vectors: Range<usize>,
    scores: &mut Scores,
) {
    // SAFETY: the caller's duties.
    unsafe { score_by::<L, T, Q, V, 1, ASKS>(tile, queries, head_dim, vectors, scores) }
}

/// Dot products of `Q` queries with the tile's key vectors. A query's components lie `STEP` floats apart; where that is more than one,
/// the queries' begin one after the other from the first pointer on.
///
/// # Safety
/// As [`Lanes`]; every query is valid for its components, the vectors are held by the tile.
#[inline(always)]
unsafe fn score_by<L: Lanes, T: Element, const Q: usize, const V: usize, const STEP: usize, const ASKS: bool>(
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
            score_vectors::<L, T, Q, V, STEP, ASKS>(tile, queries, head_dim, vector, scores);
            vector += V;
        }
        // With V = 1 nothing is left; the condition keeps the compiler from making the same loop twice.
        while V > 1 && vector < vectors.end {
            score_vectors::<L, T, Q, 1, STEP, ASKS>(tile, queries, head_dim, vector, scores);
            vector += 1;
        }
    }
}

/// # Safety
/// As [`score_by`], for the vectors `vector..vector + V`.
#[inline(always)]
unsafe fn score_vectors<L: Lanes, T: Element, const Q: usize, const V: usize, const STEP: usize, const ASKS: bool>(
    tile: &Tile<T>,
    queries: &[*const f32; MAX_QUERIES],
    head_dim: usize,
    vector: usize,
    scores: &mut Scores,
) {
    // SAFETY: the caller's duties; scores have room for a tile.
    unsafe {
        let mut acc = [[L::splat(0.0); V]; Q];
        if tile.key_scales.is_null() {
            add_dots::<L, T, Q, V, STEP, ASKS>(tile, queries, 0..head_dim, vector, &mut acc);
        } else {
            for group in 0..head_dim.div_ceil(SCALE_GROUP) {
                let components = group * SCALE_GROUP..((group + 1) * SCALE_GROUP).min(head_dim);
                let mut sums = [[L::splat(0.0); V]; Q];
                add_dots::<L, T, Q, V, STEP, ASKS>(tile, queries, components, vector, &mut sums);
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

/// Adds what some components give to the dot products.
///
/// # Safety
/// As [`score_vectors`]; there are such components.
#[inline(always)]
unsafe fn add_dots<L: Lanes, T: Element, const Q: usize, const V: usize, const STEP: usize, const ASKS: bool>(
    tile: &Tile<T>,
    queries: &[*const f32; MAX_QUERIES],
    components: Range<usize>,
    vector: usize,
    sums: &mut [[L; V]; Q],
) {
    let (first, len, stride) = (components.start, components.len(), tile.key_stride);
    // SAFETY: the caller's duties.
    unsafe {
        let mut from = [tile.keys[vector]; V];
        from.copy_from_slice(&tile.keys[vector..vector + V]);
        let mut a = [queries[0]; Q];
        a.copy_from_slice(&queries[..Q]);
        let (first_key, first_a) = (from[0], a[0]);
        let number = |q: usize, i: usize| {
            if STEP > 1 { first_a.add((first + i) * STEP + q) } else { a[q].add(first + i) }
        };
        if tile.keys_follow {
            let key = |v: usize, i: usize| first_key.add((first + i) * TILE_KEYS + v * WIDTH);
            multiply_add::<L, _, Q, V>(number, len, key, |_, _| (), sums);
        } else {
            let mut ahead = [0; V];
            ahead.copy_from_slice(&tile.keys_ahead[vector..vector + V]);
            let key = |v: usize, i: usize| from[v].add((first + i) * stride);
            let ask = |v: usize, at| {
                if ASKS {
                    ask(at, ahead[v]);
                }
            };
            multiply_add::<L, _, Q, V>(number, len, key, ask, sums);
        }
    }
}

/// Adds some components of the values of the tile's keys `visible`, weighted, to `Q` queries.
///
/// # Safety
/// As [`Lanes`]; the tile holds the visible keys; `weights` are of Q queries at least, and `values` too; all of them see exactly the keys `visible`.
#[inline(always)]
unsafe fn add_values<L: Lanes, T: Element, const Q: usize, const V: usize, const ASKS: bool>(
    tile: &Tile<T>,
    weights: &[[f32; TILE_KEYS]],
    visible: Range<usize>,
    values: Values,
) {
    let Values { to, width, components } = values;
    if visible.is_empty() {
        return;
    }
    for run in 0..tile.num_runs {
        let Run { keys: (begin, end), from, ahead } = tile.runs[run];
        let keys = begin.max(visible.start)..end.min(visible.end);
        if keys.is_empty() {
            continue;
        }
        // SAFETY: the caller's duties; the run holds `keys`, whose first lies `keys.start - begin` values into it;
        // components stay below `width`.
        unsafe {
            let from = from.add((keys.start - begin) * tile.value_stride);
            let a = weights.as_ptr().cast::<f32>().add(keys.start);
            let ask = |at| {
                if ASKS {
                    ask(at, ahead);
                }
            };
            let mut component = components.start;
            while component + V * WIDTH <= components.end {
                let (from, to) = (from.add(component), to.add(component));
                add_components::<L, T, Q, V>(a, keys.len(), from, tile.value_stride, to, width, ask);
                component += V * WIDTH;
            }
            // What scales have in common is a pair of vectors, which one accumulator each would make wait.
            while V > 2 && component + 2 * WIDTH <= components.end {
                let (from, to) = (from.add(component), to.add(component));
                add_components::<L, T, Q, 2>(a, keys.len(), from, tile.value_stride, to, width, ask);
                component += 2 * WIDTH;
            }
            while V > 1 && component < components.end {
                let (from, to) = (from.add(component), to.add(component));
                add_components::<L, T, Q, 1>(a, keys.len(), from, tile.value_stride, to, width, ask);
                component += WIDTH;
            }
        }
    }
}

/// `to[q] += sum over run of weights[q] * from`, for `16 * V` components.
///
/// # Safety
/// As [`Lanes`]; `weights` is valid for Q times `run` floats, a tile apart, `from` for `run` rows `stride` apart, `to` for Q rows `width`
/// apart, all of `16 * V` components.
#[inline(always)]
unsafe fn add_components<L: Lanes, E: Element, const Q: usize, const V: usize>(
    weights: *const f32,
    run: usize,
    from: *const E,
    stride: usize,
    to: *mut f32,
    width: usize,
    ask: impl Fn(*const E),
) {
    // SAFETY: the caller's duties.
    unsafe {
        let mut acc = [[L::splat(0.0); V]; Q];
        for v in 0..V {
            for q in 0..Q {
                acc[q][v] = L::load(to.add(q * width + v * WIDTH));
            }
        }
        let weight = |q: usize, key: usize| weights.add(q * TILE_KEYS + key);
        let value = |v: usize, key: usize| from.add(key * stride + v * WIDTH);
        multiply_add::<L, _, Q, V>(weight, run, value, |_, at| ask(at), &mut acc);
        for q in 0..Q {
            for v in 0..V {
                acc[q][v].store(to.add(q * width + v * WIDTH));
            }
        }
    }
}
