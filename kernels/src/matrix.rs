//! Weight matrices as the products take them.
//!
//! A matrix knows its shape, its family and the instruction set's tile it was packed for, nothing of layers or files.
//! Invariant: [`Matrix::row`] dequantises exactly what was packed, whatever the layout.

use std::ops::Range;

use bytemuck::Pod;
use half::{bf16, f16};

use crate::cpu::Cpu;
use crate::cpu::arranged::Arrangement;
use crate::cpu::dispatch::Isa;
use crate::cpu::prefetch::prefetch_tile;
use crate::memory::Buffer;
use crate::pack::{Quantized, cut_every, rows_per_part, weights_buffer};

/// Rows of a dense tile, on every instruction set.
pub(crate) const DENSE_TILE_ROWS: usize = 16;

/// An element of a dense matrix.
pub trait DenseElement: Pod + Send + Sync + std::fmt::Debug {
    /// Widens; exact for every type here.
    fn to_f32(self) -> f32;
}

impl DenseElement for f32 {
    fn to_f32(self) -> f32 {
        self
    }
}

impl DenseElement for f16 {
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
}

impl DenseElement for bf16 {
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
}

/// A dense matrix, 16 rows interleaved: `[tiles, cols, 16]`.
#[derive(Debug)]
pub struct Dense<E: DenseElement> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) elements: Buffer<E>,
}

/// Dense f32.
pub type DenseF32 = Dense<f32>;
/// Dense f16, computed in f32.
pub type DenseF16 = Dense<f16>;
/// Dense bf16, computed in f32.
pub type DenseBf16 = Dense<bf16>;

impl<E: DenseElement> Dense<E> {
    /// Packs row by row; `fill(row, out)` writes all of `out: [cols]`. Rows come in order.
    pub fn pack(rows: usize, cols: usize, fill: impl FnMut(usize, &mut [E])) -> Self {
        let mut packed = Self::zeroed(rows, cols);
        pack_rows(0..rows, cols, &mut packed.elements, fill);
        packed
    }

    /// As [`Dense::pack`], on all threads of `cpu`: `fill(rows)` makes what writes these rows, which come in order there.
    pub fn pack_parallel<F: FnMut(usize, &mut [E])>(
        cpu: &Cpu,
        rows: usize,
        cols: usize,
        fill: impl Fn(Range<usize>) -> F + Sync,
    ) -> Self {
        let mut packed = Self::zeroed(rows, cols);
        let rows_per_part = rows_per_part(cpu.threads(), rows, cols, DENSE_TILE_ROWS);
        let parts = cut_every(rows_per_part * cols, &mut packed.elements);
        cpu.pack_parts(rows, rows_per_part, parts, |rows, out| pack_rows(rows.clone(), cols, out, fill(rows)));
        packed
    }

    /// Bytes that a packed matrix holds, padding included; what [`Matrix::size_bytes`] says once there is one. None of it
    /// is allocated.
    pub fn packed_bytes(rows: usize, cols: usize) -> usize {
        Self::num_elements(rows, cols) * size_of::<E>()
    }

    fn num_elements(rows: usize, cols: usize) -> usize {
        rows.next_multiple_of(DENSE_TILE_ROWS) * cols
    }

    fn zeroed(rows: usize, cols: usize) -> Self {
        Self { rows, cols, elements: weights_buffer(Self::num_elements(rows, cols)) }
    }

    fn index(&self, row: usize, col: usize) -> usize {
        (row / DENSE_TILE_ROWS * self.cols + col) * DENSE_TILE_ROWS + row % DENSE_TILE_ROWS
    }

    /// The element at (row, col).
    pub fn get(&self, row: usize, col: usize) -> E {
        self.elements[self.index(row, col)]
    }

    pub(crate) fn tiles(&self) -> usize {
        self.rows.div_ceil(DENSE_TILE_ROWS)
    }

    fn row(&self, row: usize, out: &mut [f32]) {
        for (col, out) in out.iter_mut().enumerate() {
            *out = self.get(row, col).to_f32();
        }
    }

    fn prefetch_row(&self, row: usize) {
        prefetch_tile(&self.elements, row / DENSE_TILE_ROWS, self.tiles());
    }
}

/// Packs `rows`, the first of which is the first of `out`.
fn pack_rows<E: DenseElement>(rows: Range<usize>, cols: usize, out: &mut [E], mut fill: impl FnMut(usize, &mut [E])) {
    let mut buffer = vec![E::zeroed(); cols];
    for (place, row) in rows.enumerate() {
        fill(row, &mut buffer);
        let first = place / DENSE_TILE_ROWS * cols * DENSE_TILE_ROWS + place % DENSE_TILE_ROWS;
        // Rows without elements have nowhere to go.
        let targets = out.iter_mut().skip(first).step_by(DENSE_TILE_ROWS);
        for (target, &element) in targets.zip(&buffer) {
            *target = element;
        }
    }
}

/// A group-quantised or dense weight matrix, `rows` outputs by `cols` inputs (as `nn.Linear` stores it), packed for
/// one instruction set.
#[derive(Debug)]
pub enum Matrix {
    /// Codes and scales; see [`QuantFormat`](crate::QuantFormat).
    Quantized(Quantized),
    /// Dense f32.
    F32(DenseF32),
    /// Dense f16.
    F16(DenseF16),
    /// Dense bf16.
    Bf16(DenseBf16),
}

impl Matrix {
    /// Outputs.
    pub fn rows(&self) -> usize {
        match self {
            Self::Quantized(w) => w.rows,
            Self::F32(w) => w.rows,
            Self::F16(w) => w.rows,
            Self::Bf16(w) => w.rows,
        }
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        match self {
            Self::Quantized(w) => w.cols,
            Self::F32(w) => w.cols,
            Self::F16(w) => w.cols,
            Self::Bf16(w) => w.cols,
        }
    }

    /// Whether products are integer ones.
    pub fn is_quantized(&self) -> bool {
        matches!(self, Self::Quantized(_))
    }

    /// Whether products take int8 activations as they come.
    pub fn reads_int8(&self) -> bool {
        self.is_quantized() && self.arrangement().is_none()
    }

    /// How it wants its inputs before they become int8, where not as they come.
    pub(crate) fn arrangement(&self) -> Option<Arrangement<'_>> {
        match self {
            Self::Quantized(w) => w.arrangement(),
            Self::F32(_) | Self::F16(_) | Self::Bf16(_) => None,
        }
    }

    /// Bytes held, padding included.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Quantized(w) => w.size_bytes(),
            Self::F32(w) => w.elements.size_bytes(),
            Self::F16(w) => w.elements.size_bytes(),
            Self::Bf16(w) => w.elements.size_bytes(),
        }
    }

    /// A dense f32 matrix; `fill(row, out)` writes one row. (All instruction sets share the dense layout; the argument
    /// is there because that is theirs to change.)
    pub fn pack_f32(_isa: Isa, rows: usize, cols: usize, fill: impl FnMut(usize, &mut [f32])) -> Self {
        Self::F32(Dense::pack(rows, cols, fill))
    }

    /// A dense f16 matrix; `fill(row, out)` writes one row.
    pub fn pack_f16(_isa: Isa, rows: usize, cols: usize, fill: impl FnMut(usize, &mut [f16])) -> Self {
        Self::F16(Dense::pack(rows, cols, fill))
    }

    /// A dense bf16 matrix; `fill(row, out)` writes one row.
    pub fn pack_bf16(_isa: Isa, rows: usize, cols: usize, fill: impl FnMut(usize, &mut [bf16])) -> Self {
        Self::Bf16(Dense::pack(rows, cols, fill))
    }

    /// One row dequantised, `out: [cols]`: embedding lookups (a tied head serves as the table too) and tests.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows(), "row {row} of a matrix of {} rows", self.rows());
        assert_eq!(out.len(), self.cols(), "a row of {} elements into a buffer of {}", self.cols(), out.len());
        match self {
            Self::Quantized(w) => w.row(row, out),
            Self::F32(w) => w.row(row, out),
            Self::F16(w) => w.row(row, out),
            Self::Bf16(w) => w.row(row, out),
        }
    }

    /// Asks memory for what [`Self::row`] is going to read.
    pub(crate) fn prefetch_row(&self, row: usize) {
        match self {
            Self::Quantized(w) => w.prefetch_row(row),
            Self::F32(w) => w.prefetch_row(row),
            Self::F16(w) => w.prefetch_row(row),
            Self::Bf16(w) => w.prefetch_row(row),
        }
    }
}
