//! Dense product: sixteen weight rows in a vector, activations broadcast.
//!
//! A group of tiles is walked for several activation rows at a time, so that a weight loaded (and widened) once serves
//! all of them; a lone row meets more tiles at once instead, to have enough chains.

use super::block::multiply_add;
use super::{Element, Lanes};
use crate::cpu::prefetch::prefetch;
use crate::cpu::task::{DenseTask, Output};
use crate::matrix::{DENSE_TILE_ROWS, DenseElement};

/// How far ahead of a load weights are asked for.
const AHEAD_BYTES: usize = 2048;

/// `V` tiles at a time for several rows, `R` of them at a time at most, and `W` tiles for a lone row.
///
/// # Safety
/// As [`Lanes`]; the task's ranges lie within its buffers.
#[inline(always)]
pub(in crate::cpu) unsafe fn multiply<
    L: Lanes,
    E: Element + DenseElement,
    const V: usize,
    const W: usize,
    const R: usize,
>(
    task: &DenseTask<'_, E>,
) {
    // SAFETY: the caller's duties are the same.
    unsafe {
        let mut tile = task.tiles.start;
        if task.m.len() == 1 {
            while tile + W <= task.tiles.end {
                rows::<L, E, 1, W, AHEAD_BYTES>(task, tile, task.m.start);
                tile += W;
            }
        } else {
            while V > 1 && tile + V <= task.tiles.end {
                walk_rows::<L, E, V, R>(task, tile);
                tile += V;
            }
        }
        // What is left, or all of it where V = 1.
        while tile < task.tiles.end {
            walk_rows::<L, E, 1, R>(task, tile);
            tile += 1;
        }
    }
}

/// All of the task's rows by the tiles `tile..tile + V`: as many `R`s and fours as leave no lone row if that can be.
///
/// # Safety
/// As [`multiply`]; the tiles are the task's.
#[inline(always)]
unsafe fn walk_rows<L: Lanes, E: Element + DenseElement, const V: usize, const R: usize>(
    task: &DenseTask<'_, E>,
    tile: usize,
) {
    let mut m = task.m.start;
    // SAFETY: the caller's duties; the rows named lie within the task's.
    unsafe {
        // Memory is asked by the first rows (and by the few that may be the first): the others find the tiles in the
        // caches.
        if R > 4 && takes_most(task.m.len(), R) {
            rows::<L, E, R, V, AHEAD_BYTES>(task, tile, m);
            m += R;
        } else if task.m.len() >= 4 && task.m.len() != 5 {
            rows::<L, E, 4, V, AHEAD_BYTES>(task, tile, m);
            m += 4;
        }
        while R > 4 && takes_most(task.m.end - m, R) {
            rows::<L, E, R, V, 0>(task, tile, m);
            m += R;
        }
        while task.m.end - m >= 4 && task.m.end - m != 5 {
            rows::<L, E, 4, V, 0>(task, tile, m);
            m += 4;
        }
        if task.m.end - m >= 3 {
            rows::<L, E, 3, V, AHEAD_BYTES>(task, tile, m);
            m += 3;
        }
        match task.m.end - m {
            2 => rows::<L, E, 2, V, AHEAD_BYTES>(task, tile, m),
            1 => rows::<L, E, 1, V, AHEAD_BYTES>(task, tile, m),
            _ => {}
        }
    }
}

/// Whether `most` rows are taken of these: not where fours and threes alone leave fewer passes half empty.
fn takes_most(num_rows: usize, most: usize) -> bool {
    num_rows >= most && !(most + 1..=most + 2).contains(&num_rows)
}

/// # Safety
/// As [`multiply`]; rows `m..m + Q` and tiles `tile..tile + V` are the task's.
#[inline(always)]
unsafe fn rows<L: Lanes, E: Element + DenseElement, const Q: usize, const V: usize, const AHEAD: usize>(
    task: &DenseTask<'_, E>,
    tile: usize,
    m: usize,
) {
    let cols = task.weights.cols;
    let x = task.x[m * cols..(m + Q) * cols].as_ptr();
    let weights = task.weights.elements[tile * cols * DENSE_TILE_ROWS..(tile + V) * cols * DENSE_TILE_ROWS].as_ptr();
    // SAFETY: the slices above hold Q rows and V tiles, which is all that the pointers reach.
    unsafe {
        let mut a = [x; Q];
        for q in 0..Q {
            a[q] = x.add(q * cols);
        }
        let mut b = [weights; V];
        for v in 0..V {
            b[v] = weights.add(v * cols * DENSE_TILE_ROWS);
        }
        let mut acc = [[L::splat(0.0); V]; Q];
        let ask = |_, at: *const E| {
            if AHEAD > 0 {
                prefetch(at.cast::<u8>().wrapping_add(AHEAD));
            }
        };
        multiply_add::<L, E, Q, V>(|q, i| a[q].add(i), cols, |v, i| b[v].add(i * DENSE_TILE_ROWS), ask, &mut acc);
        store(task.out, m, tile * DENSE_TILE_ROWS, acc);
    }
}

/// The sums of `Q` rows by `V` tiles, finished, where they lie. One check for all of them and nothing but vectors: with less
/// than that it took longer than the product of a low-rank pair itself.
///
/// # Safety
/// As [`Lanes`]; the elements belong to the task.
#[inline(always)]
unsafe fn store<L: Lanes, const Q: usize, const V: usize>(
    out: &Output<'_>,
    m: usize,
    first_row: usize,
    mut sums: [[L; V]; Q],
) {
    let width = V * DENSE_TILE_ROWS;
    // SAFETY: every vector touches elements that `pointer` or a slice has checked; else the caller's duty.
    unsafe {
        if first_row < out.rows.start || first_row + width > out.rows.end {
            for q in 0..Q {
                for v in 0..V {
                    let mut tile = [0.0; DENSE_TILE_ROWS];
                    sums[q][v].store(tile.as_mut_ptr());
                    store_edge(out, m + q, first_row + v * DENSE_TILE_ROWS, &tile);
                }
            }
            return;
        }
        let start = out.index(m, first_row);
        let to = out.elements.pointer(start..start + (Q - 1) * out.stride + width);
        if let Some(bias) = out.bias {
            let bias = bias[first_row..first_row + width].as_ptr();
            for v in 0..V {
                let bias = L::load(bias.add(v * DENSE_TILE_ROWS));
                for q in 0..Q {
                    sums[q][v] = sums[q][v].add(bias);
                }
            }
        }
        if out.accumulate {
            for q in 0..Q {
                for v in 0..V {
                    sums[q][v] = L::load(to.add(q * out.stride + v * DENSE_TILE_ROWS)).add(sums[q][v]);
                }
            }
        }
        for q in 0..Q {
            for v in 0..V {
                sums[q][v].store(to.add(q * out.stride + v * DENSE_TILE_ROWS));
            }
        }
    }
}

/// A tile's sums of one row where not all of them may be asked for.
///
/// # Safety
/// The elements belong to the task.
#[cold]
unsafe fn store_edge(out: &Output<'_>, m: usize, first_row: usize, tile: &[f32; DENSE_TILE_ROWS]) {
    // SAFETY: passed on to the caller.
    unsafe { out.store(m, first_row, tile) };
}
