//! Matrix products: splits weight tiles over threads and activation rows into cache blocks.
//!
//! Invariant: the inner dimension is never split. One kernel call computes whole sums, so blocks and pieces only decide
//! when an output is computed, never what it is.

use std::cell::RefCell;
use std::ops::Range;

use super::activations::{Activations, Inputs};
use super::low_rank::Addends;
use super::pool::{SharedMut, share_of};
use super::task::{DenseTask, GroupCodes, GroupScales, Line, Output, PART_GROUPS, QuantTask};
use super::{Cpu, PIECES_PER_THREAD};
use crate::matrix::{DENSE_TILE_ROWS, Dense, DenseElement, Matrix};

/// Bytes of activations that a block of rows takes, more or less by a panel, of codes those of one part of their groups: they are
/// read again for every weight tile, so they should stay in the second-level cache, which has 512 KiB and more on the machines in
/// question.
const ROW_BLOCK_BYTES: usize = 256 * 1024;
/// Rows of a block of a dense product at least, so that weights are read often enough for what they cost.
const MIN_DENSE_ROWS: usize = 64;
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
        self.matmul_all(x, [Product { weights: w, bias, out }], None);
    }

    /// `out += x . w^T (+ bias)`, `out: [x.num_rows(), w.rows()]`.
    pub fn matmul_add(&self, x: &Activations, w: &Matrix, bias: Option<&[f32]>, out: &mut [f32]) {
        self.matmul_add_all(x, [Product { weights: w, bias, out }], None);
    }

    /// Several products of the same activations in one parallel region: each `out = x . w^T (+ bias) (+ addends)`.
    #[expect(clippy::needless_pass_by_value, reason = "addends are computed once")]
    pub fn matmul_all<const N: usize>(
        &self,
        x: &Activations,
        products: [Product<'_>; N],
        addends: Option<Addends<'_, N>>,
    ) {
        let x = &x.inputs();
        self.products(x, &products.map(|product| self.part(x, product, false)), addends.as_ref());
    }

    /// [`Cpu::matmul_all`], but added to what is there: each `out += x . w^T (+ bias) (+ addends)`.
    #[expect(clippy::needless_pass_by_value, reason = "addends are computed once")]
    pub fn matmul_add_all<const N: usize>(
        &self,
        x: &Activations,
        products: [Product<'_>; N],
        addends: Option<Addends<'_, N>>,
    ) {
        let x = &x.inputs();
        self.products(x, &products.map(|product| self.part(x, product, true)), addends.as_ref());
    }

    /// A product, checked.
    fn part<'a>(&self, x: &Inputs<'_>, product: Product<'a>, accumulate: bool) -> Part<'a> {
        let Product { weights, bias, out } = product;
        let (m, rows) = (x.num_rows(), weights.rows());
        let (tiles, tile_rows) = self.check(x, weights);
        assert_eq!(out.len(), m * rows, "a product of {m} x {rows} into a buffer of {}", out.len());
        if let Some(bias) = bias {
            assert_eq!(bias.len(), rows, "a bias of {} for {rows} outputs", bias.len());
        }
        let out = Output { elements: SharedMut::new(out), stride: rows, first_m: 0, rows: 0..rows, bias, accumulate };
        Part { weights, tiles, tile_rows, out }
    }

    /// A matrix's tiles and their rows; panics where it does not fit the activations or the instruction set.
    pub(super) fn check(&self, x: &Inputs<'_>, w: &Matrix) -> (usize, usize) {
        assert_eq!(x.cols(), w.cols(), "activations of {} columns meet a matrix of {} inputs", x.cols(), w.cols());
        match w {
            Matrix::Quantized(w) => {
                assert_eq!(
                    w.tile_rows,
                    self.isa.quant_tile_rows(),
                    "a matrix packed for another instruction set meets {}: pack it for Cpu::isa()",
                    self.isa
                );
                assert!(
                    x.num_rows() == 0 || x.panels().panel_rows <= self.kernels.columns,
                    "activations prepared for another instruction set meet {}: prepare them with this Cpu",
                    self.isa
                );
                (w.tiles(), w.tile_rows)
            }
            Matrix::F32(w) => (w.tiles(), DENSE_TILE_ROWS),
            Matrix::F16(w) => (w.tiles(), DENSE_TILE_ROWS),
            Matrix::Bf16(w) => (w.tiles(), DENSE_TILE_ROWS),
        }
    }

    /// Rows of a matrix's tiles.
    pub(super) fn tile_rows(&self, w: &Matrix) -> usize {
        if w.is_quantized() { self.isa.quant_tile_rows() } else { DENSE_TILE_ROWS }
    }

    /// One region for all parts: pieces of tiles, shared out by the work in them.
    fn products<const N: usize>(&self, x: &Inputs<'_>, parts: &[Part<'_>; N], addends: Option<&Addends<'_, N>>) {
        if x.num_rows() == 0 {
            return;
        }
        if let Some(addends) = addends {
            for (product, part) in parts.iter().enumerate() {
                addends.check(product, part.weights.rows());
            }
        }
        let weights = parts.each_ref().map(|part| part.weights);
        self.with_inputs(x, weights, |x| self.run_products(&x, parts, addends));
    }

    /// Of what each part reads.
    fn run_products<const N: usize>(
        &self,
        x: &[Inputs<'_>; N],
        parts: &[Part<'_>; N],
        addends: Option<&Addends<'_, N>>,
    ) {
        let piece_of = |at: usize, blocks: Range<usize>| {
            let (x, part) = (&x[at], &parts[at]);
            let tiles = part.tiles_before(blocks.start)..part.tiles_before(blocks.end);
            let cols = tiles.start * part.tile_rows..(tiles.end * part.tile_rows).min(part.weights.rows());
            self.tiles(x, part.weights, tiles, 0..x.panels().num_panels(), &part.out);
            if let Some(addends) = addends {
                addends.add(self, at, &(0..x.num_rows()), &cols, &part.out);
            }
        };
        let macs = |part: &Part<'_>| part.tiles * part.tile_rows * part.weights.cols() * x[0].num_rows();
        // One part's blocks after the other's, so that pieces are of one size whatever the parts': all have as many columns.
        let num_blocks: usize = parts.iter().map(Part::blocks).sum();
        let num_pieces = self.pieces_for(parts.iter().map(macs).sum()).clamp(1, num_blocks.max(1));
        self.run_beside(addends, num_pieces, |piece| {
            let piece = share_of(num_blocks, num_pieces, piece);
            let mut before = 0;
            for (at, part) in parts.iter().enumerate() {
                let own = before..before + part.blocks();
                let common = piece.start.max(own.start)..piece.end.min(own.end);
                if !common.is_empty() {
                    piece_of(at, common.start - before..common.end - before);
                }
                before = own.end;
            }
        });
    }

    /// Pieces that so many multiply-adds are worth: one, or some for each thread.
    pub(super) fn pieces_for(&self, macs: usize) -> usize {
        let most = if self.threads() == 1 { 1 } else { self.threads() * PIECES_PER_THREAD };
        (macs / MIN_PIECE_MACS).clamp(1, most)
    }

    /// Every one of `tiles` meets every row of `panels` once. Shapes are checked, and the outputs are the calling task's.
    pub(super) fn tiles(
        &self,
        x: &Inputs<'_>,
        weights: &Matrix,
        tiles: Range<usize>,
        panels: Range<usize>,
        out: &Output<'_>,
    ) {
        let kernels = self.kernels;
        let rows = x.panels().rows_of_all(&panels);
        match weights {
            Matrix::Quantized(w) => {
                let x = x.quantized_rows();
                let groups = x.panels.groups.min(PART_GROUPS);
                let row_bytes = groups * (size_of::<GroupCodes>() + size_of::<GroupScales>());
                let block = (ROW_BLOCK_BYTES / row_bytes.max(1)).div_ceil(x.panels.panel_rows);
                for panels in even_parts(panels.clone(), block) {
                    let tiles = tiles.clone();
                    // SAFETY: the table fits the machine; the rest is checked, see above.
                    SCRATCH.with_borrow_mut(|scratch| unsafe {
                        (kernels.quantized)(&mut QuantTask { weights: w, x, panels, tiles, out, scratch });
                    });
                }
            }
            Matrix::F32(w) => dense(kernels.dense_f32, x, w, out, &tiles, rows),
            Matrix::F16(w) => dense(kernels.dense_f16, x, w, out, &tiles, rows),
            Matrix::Bf16(w) => dense(kernels.dense_bf16, x, w, out, &tiles, rows),
        }
    }
}

/// A range in as few parts as can be, of at most `max_len`, as even as can be.
pub(super) fn even_parts(range: Range<usize>, max_len: usize) -> impl Iterator<Item = Range<usize>> {
    let parts = range.len().div_ceil(max_len.max(1));
    (0..parts).map(move |part| {
        let share = share_of(range.len(), parts, part);
        range.start + share.start..range.start + share.end
    })
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
    tile_rows: usize,
    out: Output<'a>,
}

impl Part<'_> {
    /// Blocks of as many tiles as a dense tile has rows of. Pieces are whole blocks: what stands beside a product in dense tiles
    /// would have to do those that two pieces share twice and output by output, and tiles that go by twos would be left alone.
    fn blocks(&self) -> usize {
        self.tiles.div_ceil(self.tiles_of_block())
    }

    fn tiles_of_block(&self) -> usize {
        (DENSE_TILE_ROWS / self.tile_rows).max(1)
    }

    /// Tiles of the blocks before this one.
    fn tiles_before(&self, block: usize) -> usize {
        (block * self.tiles_of_block()).min(self.tiles)
    }
}

fn dense<E: DenseElement>(
    kernel: unsafe fn(&DenseTask<'_, E>),
    x: &Inputs<'_>,
    w: &Dense<E>,
    out: &Output<'_>,
    tiles: &Range<usize>,
    rows: Range<usize>,
) {
    let block = (ROW_BLOCK_BYTES / (x.cols() * size_of::<f32>()).max(1)).max(MIN_DENSE_ROWS);
    for m in even_parts(rows.clone(), block) {
        // SAFETY: the table fits the machine; the caller of `tiles` has checked the shapes.
        unsafe { kernel(&DenseTask { weights: w, x: x.rows(), m, tiles: tiles.clone(), out }) }
    }
}
