//! The first half of a gated MLP in one region: gate and up projections, activation, and the next product's activations.
//!
//! It knows products by their tiles and the activation by its kernel. The products stay in the caches: a piece computes
//! some outputs of both for some rows into memory of its own, joins them and hands on what the next product reads, so the
//! wide hidden rows are never written out in f32. Invariant: groups of 32 outputs are never divided between pieces.

use std::cell::RefCell;
use std::ops::Range;

use super::activations::{Activations, Form};
use super::matmul::{MIN_PIECE_MACS, even_parts};
use super::pool::SharedMut;
use super::task::{ActivationsOut, GatedTask, Output};
use super::{Cpu, PIECES_PER_THREAD};
use crate::matrix::Matrix;
use crate::quant_format::GROUP;

/// Products of one projection that a piece keeps at a time: two of them and the weights' tile should fit the second-level
/// cache.
const SCRATCH_ELEMENTS: usize = 16 * 1024;

thread_local! {
    /// Products of both projections, kept between calls.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// What a call is about, checked.
struct Call<'a> {
    x: &'a Activations,
    gate: Projection<'a>,
    up: Projection<'a>,
    out: ActivationsOut,
}

/// A matrix and the rows of its tiles.
struct Projection<'a> {
    weights: &'a Matrix,
    tile_rows: usize,
}

impl Cpu {
    /// `silu(x . gate^T) * (x . up^T)` as activations of `gate.rows()` columns in a form, with silu(x) = x / (1 +
    /// exp(-x)). int8 groups need `gate.rows()` to be a multiple of 32.
    pub fn gated_matmul(&self, x: &Activations, gate: &Matrix, up: &Matrix, form: Form, out: &mut Activations) {
        let (m, cols) = (x.num_rows(), gate.rows());
        assert_eq!(up.rows(), cols, "a gate of {cols} outputs meets an up projection of {}", up.rows());
        let projection = |weights| Projection { weights, tile_rows: self.check(x, weights).1 };
        let (gate, up) = (projection(gate), projection(up));
        let call = Call { x, gate, up, out: out.reshape(m, cols, form, self.kernels.columns) };
        if m == 0 {
            return;
        }
        let groups = cols.div_ceil(GROUP);
        let num_wanted = (self.threads() * PIECES_PER_THREAD).min(2 * m * cols * x.cols() / MIN_PIECE_MACS);
        let num_pieces = if self.threads() == 1 { 1 } else { num_wanted.clamp(1, groups.max(1)) };
        self.pool.run(num_pieces, |piece| {
            self.gated_groups(&call, piece * groups / num_pieces..(piece + 1) * groups / num_pieces);
        });
    }

    /// Some groups of outputs, as many rows and groups at a time as the scratch has room for.
    fn gated_groups(&self, call: &Call<'_>, groups: Range<usize>) {
        let panels = call.x.panels();
        let row_block = (SCRATCH_ELEMENTS / GROUP / panels.panel_rows).max(1);
        SCRATCH.with_borrow_mut(|scratch| {
            for block in even_parts(0..panels.num_panels(), row_block) {
                let rows = panels.rows_of_all(&block);
                let step = (SCRATCH_ELEMENTS / GROUP / rows.len()).max(1);
                for first in groups.clone().step_by(step) {
                    let cols = first * GROUP..((first + step).min(groups.end) * GROUP).min(call.out.cols);
                    let stride = cols.len().next_multiple_of(GROUP);
                    let len = rows.len() * stride;
                    // What is left over in it is beyond the last output.
                    scratch.resize(scratch.len().max(2 * len), 0.0);
                    let (gate, up) = scratch[..2 * len].split_at_mut(len);
                    self.columns(call.x, &call.gate, block.clone(), cols.clone(), stride, gate);
                    self.columns(call.x, &call.up, block.clone(), cols.clone(), stride, up);
                    let task = GatedTask { gate, up, stride, m: rows.clone(), cols, out: &call.out };
                    // SAFETY: the table fits the machine; the outputs of these groups are this piece's.
                    unsafe { (self.kernels.gated)(&task) };
                }
            }
        });
    }

    /// Outputs `cols`, which begin a tile, of the rows of some panels.
    fn columns(
        &self,
        x: &Activations,
        projection: &Projection<'_>,
        panels: Range<usize>,
        cols: Range<usize>,
        stride: usize,
        out: &mut [f32],
    ) {
        let Projection { weights, tile_rows } = *projection;
        let tiles = cols.start / tile_rows..cols.end.div_ceil(tile_rows);
        let first_m = x.panels().rows_of_all(&panels).start;
        let elements = SharedMut::new(out);
        let out = Output { elements, stride, first_m, rows: cols, bias: None, accumulate: false };
        self.tiles(x, weights, tiles, panels, &out);
    }
}
