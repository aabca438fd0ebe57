//! Dense product: sixteen weight rows in a vector, activations broadcast.
//!
//! A group of tiles is walked for four activation rows at a time, so that a weight loaded (and widened) once serves
//! four of them; a lone row meets more tiles at once instead, to have enough chains.

use super::block::multiply_add;
use super::{Element, Lanes};
use crate::cpu::task::{DenseTask, Output};
use crate::matrix::{DENSE_TILE_ROWS, DenseElement};

/// How far ahead of a load weights are asked for.
const AHEAD_BYTES: usize = 2048;

/// `V` tiles at a time for several rows, `W` for one.
///
/// # Safety
/// As [`Lanes`]; the task's ranges lie within its buffers.
#[inline(always)]
pub(in crate::cpu) unsafe fn multiply<L: Lanes, E: Element + DenseElement, const V: usize, const W: usize>(
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
                walk_rows::<L, E, V>(task, tile);
                tile += V;
            }
        }
        // What is left, or all of it where V = 1.
        while tile < task.tiles.end {
            walk_rows::<L, E, 1>(task, tile);
            tile += 1;
        }
    }
}

/// All of the task's rows by the tiles `tile..tile + V`.
///
/// # Safety
/// As [`multiply`]; the tiles are the task's.
#[inline(always)]
unsafe fn walk_rows<L: Lanes, E: Element + DenseElement, const V: usize>(task: &DenseTask<'_, E>, tile: usize) {
    let mut m = task.m.start;
    // SAFETY: the caller's duties; the rows named lie within the task's.
    unsafe {
        // Memory is asked by the first rows (and by the few that may be the first): the others find the tiles in the
        // caches.
        if m + 4 <= task.m.end {
            rows::<L, E, 4, V, AHEAD_BYTES>(task, tile, m);
            m += 4;
        }
        while m + 4 <= task.m.end {
            rows::<L, E, 4, V, 0>(task, tile, m);
            m += 4;
        }
        match task.m.end - m {
            3 => rows::<L, E, 3, V, AHEAD_BYTES>(task, tile, m),
            2 => rows::<L, E, 2, V, AHEAD_BYTES>(task, tile, m),
            1 => rows::<L, E, 1, V, AHEAD_BYTES>(task, tile, m),
            _ => {}
        }
    }
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
        multiply_add::<L, E, Q, V, AHEAD, 1>(a, cols, b, DENSE_TILE_ROWS, &mut acc);
        for q in 0..Q {
            for v in 0..V {
                store(task.out, m + q, (tile + v) * DENSE_TILE_ROWS, acc[q][v]);
            }
        }
    }
}

/// A tile's sums of row `m`, finished. Element by element took as long as the product of a low-rank pair itself.
///
/// # Safety
/// As [`Lanes`]; the elements belong to the task.
#[inline(always)]
unsafe fn store<L: Lanes>(out: &Output<'_>, m: usize, first_row: usize, sums: L) {
    // SAFETY: the slices have a vector's elements where vectors touch them; else the caller's duty.
    unsafe {
        if first_row < out.rows.start || first_row + DENSE_TILE_ROWS > out.rows.end {
            let mut tail = [0.0; DENSE_TILE_ROWS];
            sums.store(tail.as_mut_ptr());
            out.store(m, first_row, &tail);
            return;
        }
        let start = out.index(m, first_row);
        let to = out.elements.slice(start..start + DENSE_TILE_ROWS).as_mut_ptr();
        let mut sums = sums;
        if let Some(bias) = out.bias {
            sums = sums.add(L::load(bias[first_row..first_row + DENSE_TILE_ROWS].as_ptr()));
        }
        if out.accumulate {
            sums = L::load(to).add(sums);
        }
        sums.store(to);
    }
}
