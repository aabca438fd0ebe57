//! Matrix products: splits weight tiles over threads and activation rows into cache blocks.
//!
//! Invariant: the inner dimension is never split. One kernel call computes whole sums, so blocks and pieces only decide
//! when an output is computed, never what it is.

use std::cell::RefCell;
use std::ops::Range;

use super::activations::Activations;
use super::pool::SharedMut;
use super::task::{DenseTask, Line, Output, QuantGroup, QuantTask};
use super::{Cpu, PIECES_PER_THREAD};
use crate::matrix::{DENSE_TILE_ROWS, Dense, DenseElement, Matrix};

/// Bytes of activations that a block of rows may take: it is read again for every weight tile, so it should stay in
/// the second-level cache, which is at least 256 KiB on every machine in question.
const ROW_BLOCK_BYTES: usize = 192 * 1024;
/// Rows of a block at least, so that an unpacked weight tile is used often enough.
const MIN_BLOCK_ROWS: usize = 32;
/// Multiply-adds that are worth waking another thread for: about two microseconds of one core.
const MIN_PIECE_MACS: usize = 64 * 1024;

thread_local! {
    /// Memory a thread keeps between calls.
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

impl Cpu {
    /// `out = x . w^T (+ bias)`, `out: [x.num_rows(), w.rows()]`. Each output's sum order depends on the inner
    /// dimension only.
    pub fn matmul(&self, x: &Activations, w: &Matrix, bias: Option<&[f32]>, out: &mut [f32]) {
        self.product(x, w, bias, out, false);
    }

    /// `out += x . w^T (+ bias)`, `out: [x.num_rows(), w.rows()]`.
    pub fn matmul_add(&self, x: &Activations, w: &Matrix, bias: Option<&[f32]>, out: &mut [f32]) {
        self.product(x, w, bias, out, true);
    }

    /// Several products of the same activations in one parallel region: each `out = x . w^T (+ bias)`.
    pub fn matmul_all<const N: usize>(&self, x: &Activations, products: [Product<'_>; N]) {
        self.products(x, &products.map(|Product { weights, bias, out }| self.part(x, weights, bias, out, false)));
    }

    fn product(&self, x: &Activations, w: &Matrix, bias: Option<&[f32]>, out: &mut [f32], accumulate: bool) {
        self.products(x, &[self.part(x, w, bias, out, accumulate)]);
    }

    /// A product, checked.
    fn part<'a>(
        &self,
        x: &Activations,
        w: &'a Matrix,
        bias: Option<&'a [f32]>,
        out: &'a mut [f32],
        accumulate: bool,
    ) -> Part<'a> {
        let (m, rows, cols) = (x.num_rows(), w.rows(), w.cols());
        assert_eq!(x.cols(), cols, "activations of {} columns meet a matrix of {cols} inputs", x.cols());
        assert_eq!(out.len(), m * rows, "a product of {m} x {rows} into a buffer of {}", out.len());
        if let Some(bias) = bias {
            assert_eq!(bias.len(), rows, "a bias of {} for {rows} outputs", bias.len());
        }
        let (tiles, tile_rows) = match w {
            Matrix::Quantized(w) => {
                self.check_tile(w.tile_rows);
                (w.tiles(), w.tile_rows)
            }
            Matrix::F32(w) => (w.tiles(), DENSE_TILE_ROWS),
            Matrix::F16(w) => (w.tiles(), DENSE_TILE_ROWS),
            Matrix::Bf16(w) => (w.tiles(), DENSE_TILE_ROWS),
        };
        let out = Output { elements: SharedMut::new(out), rows, bias, accumulate };
        Part { weights: w, tiles, tile_macs: tile_rows * cols * m, out }
    }

    /// One region for all parts: pieces of tiles, shared out by the work in them.
    fn products<const N: usize>(&self, x: &Activations, parts: &[Part<'_>; N]) {
        if x.num_rows() == 0 {
            return;
        }
        let macs = |part: &Part<'_>| part.tiles * part.tile_macs;
        let total: usize = parts.iter().map(macs).sum();
        let num_wanted = (self.threads() * PIECES_PER_THREAD).min(total / MIN_PIECE_MACS);
        if num_wanted <= 1 || self.threads() == 1 {
            for part in parts {
                self.tiles(x, part, 0..part.tiles);
            }
            return;
        }
        let num_pieces: [usize; N] = std::array::from_fn(|at| {
            let part = &parts[at];
            (num_wanted * macs(part) / total.max(1)).clamp(1, part.tiles.max(1))
        });
        self.pool.run(num_pieces.iter().sum(), |mut index| {
            for (part, &num_pieces) in parts.iter().zip(&num_pieces) {
                if index < num_pieces {
                    let tiles = index * part.tiles / num_pieces..(index + 1) * part.tiles / num_pieces;
                    return self.tiles(x, part, tiles);
                }
                index -= num_pieces;
            }
        });
    }

    /// Every one of `tiles` meets every activation row once.
    fn tiles(&self, x: &Activations, part: &Part<'_>, tiles: Range<usize>) {
        let (kernels, out) = (self.kernels, &part.out);
        match part.weights {
            Matrix::Quantized(w) => {
                let x = x.quantized_rows();
                let row_bytes = x.panels.groups * size_of::<QuantGroup>();
                let block = (ROW_BLOCK_BYTES / row_bytes.max(1)).max(MIN_BLOCK_ROWS).div_ceil(x.panels.panel_rows);
                for start in (0..x.panels.num_panels()).step_by(block) {
                    let panels = start..(start + block).min(x.panels.num_panels());
                    let tiles = tiles.clone();
                    // SAFETY: the table fits the machine; `part` has checked the shapes; pieces have disjoint tiles.
                    SCRATCH.with_borrow_mut(|scratch| unsafe {
                        (kernels.quantized)(&mut QuantTask { weights: w, x, panels, tiles, out, scratch });
                    });
                }
            }
            Matrix::F32(w) => dense(kernels.dense_f32, x, w, out, &tiles),
            Matrix::F16(w) => dense(kernels.dense_f16, x, w, out, &tiles),
            Matrix::Bf16(w) => dense(kernels.dense_bf16, x, w, out, &tiles),
        }
    }

    fn check_tile(&self, tile_rows: usize) {
        assert_eq!(
            tile_rows,
            self.isa.quant_tile_rows(),
            "a matrix packed for another instruction set meets {}: pack it for Cpu::isa()",
            self.isa
        );
    }
}

/// One of several products in a call.
#[derive(Debug)]
pub struct Product<'a> {
    /// `[outputs, inputs]`
    pub weights: &'a Matrix,
    /// `[outputs]`
    pub bias: Option<&'a [f32]>,
    /// `[rows, outputs]`
    pub out: &'a mut [f32],
}

/// A product whose shapes are checked.
struct Part<'a> {
    weights: &'a Matrix,
    tiles: usize,
    /// Multiply-adds of a tile with all activation rows.
    tile_macs: usize,
    out: Output<'a>,
}

fn dense<E: DenseElement>(
    kernel: unsafe fn(&DenseTask<'_, E>),
    x: &Activations,
    w: &Dense<E>,
    out: &Output<'_>,
    tiles: &Range<usize>,
) {
    let block = (ROW_BLOCK_BYTES / (x.cols() * size_of::<f32>()).max(1)).max(MIN_BLOCK_ROWS);
    for start in (0..x.num_rows()).step_by(block) {
        let m = start..(start + block).min(x.num_rows());
        // SAFETY: the table fits the machine; `part` has checked the shapes; pieces have disjoint tiles.
        unsafe { kernel(&DenseTask { weights: w, x: x.rows(), m, tiles: tiles.clone(), out }) }
    }
}
