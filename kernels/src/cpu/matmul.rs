//! Matrix products: splits weight tiles over threads and activation rows into cache blocks.
//!
//! Invariant: the inner dimension is never split. One kernel call computes whole sums, so blocks and pieces only decide
//! when an output is computed, never what it is.

use std::ops::Range;

use super::Cpu;
use super::activations::Activations;
use super::pool::SharedMut;
use super::task::{DenseTask, Output, QuantTask};
use crate::matrix::{Dense, DenseElement, Matrix};

/// Bytes of activations that a block of rows may take: it is read again for every weight tile, so it should stay in
/// the second-level cache, which is at least 256 KiB on every machine in question.
const ROW_BLOCK_BYTES: usize = 192 * 1024;
/// Rows of a block at least, so that an unpacked weight tile is used often enough.
const MIN_BLOCK_ROWS: usize = 32;
/// Multiply-adds that are worth waking another thread for: about two microseconds of one core.
const MIN_PIECE_MACS: usize = 64 * 1024;

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

    fn product(&self, x: &Activations, w: &Matrix, bias: Option<&[f32]>, out: &mut [f32], accumulate: bool) {
        let (m, rows, cols) = (x.num_rows(), w.rows(), w.cols());
        assert_eq!(x.cols(), cols, "activations of {} columns meet a matrix of {cols} inputs", x.cols());
        assert_eq!(out.len(), m * rows, "a product of {m} x {rows} into a buffer of {}", out.len());
        if let Some(bias) = bias {
            assert_eq!(bias.len(), rows, "a bias of {} for {rows} outputs", bias.len());
        }
        let out = &Output { elements: SharedMut::new(out), rows, bias, accumulate };
        let kernels = self.kernels;
        match w {
            Matrix::W4(w) => {
                self.check_tile(w.frame.tile_rows);
                let x = x.quantized_rows();
                self.blocks(w.frame.tiles(), w.frame.tile_rows, m, cols, size_of::<i8>(), |tiles, m| {
                    // SAFETY: the table fits the machine; shapes were checked above; pieces have disjoint tiles.
                    unsafe { (kernels.w4)(&QuantTask { weights: w, x, m, tiles, out }) }
                });
            }
            Matrix::W8(w) => {
                self.check_tile(w.frame.tile_rows);
                let x = x.quantized_rows();
                self.blocks(w.frame.tiles(), w.frame.tile_rows, m, cols, size_of::<i8>(), |tiles, m| {
                    // SAFETY: as for W4.
                    unsafe { (kernels.w8)(&QuantTask { weights: w, x, m, tiles, out }) }
                });
            }
            Matrix::F32(w) => self.dense(kernels.dense_f32, x, w, out),
            Matrix::F16(w) => self.dense(kernels.dense_f16, x, w, out),
            Matrix::Bf16(w) => self.dense(kernels.dense_bf16, x, w, out),
        }
    }

    fn dense<E: DenseElement>(
        &self,
        kernel: unsafe fn(&DenseTask<'_, E>),
        x: &Activations,
        w: &Dense<E>,
        out: &Output<'_>,
    ) {
        let tile_rows = crate::matrix::DENSE_TILE_ROWS;
        self.blocks(w.tiles(), tile_rows, x.num_rows(), w.cols, size_of::<f32>(), |tiles, m| {
            // SAFETY: the table fits the machine; shapes were checked by `product`; pieces have disjoint tiles.
            unsafe { kernel(&DenseTask { weights: w, x: x.rows(), m, tiles, out }) }
        });
    }

    fn check_tile(&self, tile_rows: usize) {
        assert_eq!(
            tile_rows,
            self.isa.quant_tile_rows(),
            "a matrix packed for another instruction set meets {}: pack it for Cpu::isa()",
            self.isa
        );
    }

    /// Calls `block(tiles, rows)` so that every tile meets every activation row once.
    fn blocks(
        &self,
        tiles: usize,
        tile_rows: usize,
        m: usize,
        cols: usize,
        element_bytes: usize,
        block: impl Fn(Range<usize>, Range<usize>) + Sync,
    ) {
        if m == 0 {
            return;
        }
        let block_rows = (ROW_BLOCK_BYTES / (cols * element_bytes).max(1)).max(MIN_BLOCK_ROWS);
        let min_tiles = MIN_PIECE_MACS.div_ceil((tile_rows * cols * m).max(1));
        self.split(tiles, min_tiles, |tiles| {
            let mut start = 0;
            while start < m {
                let end = (start + block_rows).min(m);
                block(tiles.clone(), start..end);
                start = end;
            }
        });
    }
}
