//! The two quantised weight families and their packing.
//!
//! `W4` and `W8` name the arithmetic (4-bit or 8-bit codes times int8 activations), not a file format: importers bring
//! neutral codes, scales and minimums, row by row. Scales stay in f16 as in the files. The layouts are drawn in the
//! crate's head. Invariant: [`PackedW4::code`] and its siblings give back exactly what the importer wrote; rows that
//! pad the last tile are zero.

use half::f16;

use crate::cpu::dispatch::Isa;
use crate::memory::{Buffer, Use};

/// Inputs that share a scale, and the length of an activation group.
pub const GROUP: usize = 32;
/// Bytes of one row's codes in one group.
const W4_GROUP_BYTES: usize = GROUP / 2;
const W8_GROUP_BYTES: usize = GROUP;

/// Group scales of a matrix, and minimums where the family has them: one f16 a group each, interleaved by tile.
#[derive(Debug)]
pub(crate) struct Scales {
    /// `[tiles, groups, tile_rows]`
    pub(crate) scales: Buffer<f16>,
    /// `[tiles, groups, tile_rows]`, or none: codes are then centred (W4: 8 is zero).
    pub(crate) mins: Option<Buffer<f16>>,
}

/// What both families share: the shape and the scales.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Rows of a tile.
    pub(crate) tile_rows: usize,
    pub(crate) scales: Scales,
}

impl Frame {
    fn new(isa: Isa, rows: usize, cols: usize, with_mins: bool) -> Self {
        assert!(
            cols.is_multiple_of(GROUP),
            "a quantised matrix needs a multiple of {GROUP} inputs, got {cols}; keep this one dense"
        );
        let tile_rows = isa.quant_tile_rows();
        let scales_len = rows.div_ceil(tile_rows) * tile_rows * (cols / GROUP);
        let mins = with_mins.then(|| weights_buffer(scales_len));
        Self { rows, cols, tile_rows, scales: Scales { scales: weights_buffer(scales_len), mins } }
    }

    pub(crate) fn groups(&self) -> usize {
        self.cols / GROUP
    }

    pub(crate) fn tiles(&self) -> usize {
        self.rows.div_ceil(self.tile_rows)
    }

    fn scale_index(&self, row: usize, group: usize) -> usize {
        (row / self.tile_rows * self.groups() + group) * self.tile_rows + row % self.tile_rows
    }

    fn set_scales(&mut self, row: usize, scales: &[f16], mins: &[f16]) {
        for (group, &scale) in scales.iter().enumerate() {
            let index = self.scale_index(row, group);
            self.scales.scales[index] = scale;
        }
        for (group, &min) in mins.iter().enumerate() {
            let index = self.scale_index(row, group);
            if let Some(target) = &mut self.scales.mins {
                target[index] = min;
            }
        }
    }

    /// Scale of a row's group.
    pub(crate) fn scale(&self, row: usize, group: usize) -> f32 {
        self.scales.scales[self.scale_index(row, group)].to_f32()
    }

    /// Minimum of a row's group; none where codes are centred.
    pub(crate) fn min(&self, row: usize, group: usize) -> Option<f32> {
        self.scales.mins.as_ref().map(|mins| mins[self.scale_index(row, group)].to_f32())
    }

    fn size_bytes(&self) -> usize {
        self.scales.scales.size_bytes() + self.scales.mins.as_ref().map_or(0, Buffer::size_bytes)
    }
}

/// Weights are allocated as `Vec` would: a refusal is a panic with the size in it, caught where models are loaded.
pub(crate) fn weights_buffer<T: bytemuck::Pod>(len: usize) -> Buffer<T> {
    match Buffer::zeroed(len, Use::Whole) {
        Ok(buffer) => buffer,
        Err(error) => panic!("no memory for weights: {error}"),
    }
}

/// One W4 row as an importer hands it over. Every element must be written: the buffers hold the row before.
#[derive(Debug)]
pub struct RowW4<'a> {
    /// `[cols]`, each 0..=15 (higher bits are dropped).
    pub codes: &'a mut [u8],
    /// `[cols / 32]`
    pub scales: &'a mut [f16],
    /// `[cols / 32]`, or empty where the matrix has no minimums.
    pub mins: &'a mut [f16],
}

/// One W8 row as an importer hands it over. Every element must be written: the buffers hold the row before.
#[derive(Debug)]
pub struct RowW8<'a> {
    /// `[cols]`
    pub codes: &'a mut [i8],
    /// `[cols / 32]`
    pub scales: &'a mut [f16],
    /// `[cols / 32]`, or empty where the matrix has no minimums.
    pub mins: &'a mut [f16],
}

/// 4-bit codes in groups of 32. With minimums a weight is `scale * code + min`, without `scale * (code - 8)`.
#[derive(Debug)]
pub struct PackedW4 {
    pub(crate) frame: Frame,
    /// `[tiles, groups, 4, tile_rows, 4]`
    pub(crate) codes: Buffer<u8>,
}

impl PackedW4 {
    /// Packs row by row for `isa`; `fill(row, out)` writes one row's codes, scales and minimums. Rows come in order.
    pub fn pack(isa: Isa, rows: usize, cols: usize, with_mins: bool, mut fill: impl FnMut(usize, RowW4<'_>)) -> Self {
        let frame = Frame::new(isa, rows, cols, with_mins);
        let groups = frame.groups();
        let tile_rows = frame.tile_rows;
        let codes = weights_buffer(frame.tiles() * groups * tile_rows * W4_GROUP_BYTES);
        let mut packed = Self { frame, codes };
        let mut row_codes = vec![0_u8; cols];
        let mut scales = vec![f16::ZERO; groups];
        let mut mins = vec![f16::ZERO; if with_mins { groups } else { 0 }];
        for row in 0..rows {
            fill(row, RowW4 { codes: &mut row_codes, scales: &mut scales, mins: &mut mins });
            for (group, codes) in row_codes.chunks_exact(GROUP).enumerate() {
                for (j, octet) in codes.chunks_exact(8).enumerate() {
                    let at = packed.byte_index(row, group, j);
                    for b in 0..4 {
                        packed.codes[at + b] = octet[b] & 15 | octet[4 + b] << 4;
                    }
                }
            }
            packed.frame.set_scales(row, &scales, &mins);
        }
        packed
    }

    /// Where the four bytes of octet `j` of a row's group begin.
    fn byte_index(&self, row: usize, group: usize, j: usize) -> usize {
        let Frame { tile_rows, .. } = self.frame;
        (((row / tile_rows * self.frame.groups() + group) * 4 + j) * tile_rows + row % tile_rows) * 4
    }

    /// The code at (row, col), 0..=15.
    pub fn code(&self, row: usize, col: usize) -> u8 {
        let byte = self.codes[self.byte_index(row, col / GROUP, col % GROUP / 8) + col % 4];
        if col % 8 < 4 { byte & 15 } else { byte >> 4 }
    }

    pub(crate) fn size_bytes(&self) -> usize {
        self.codes.size_bytes() + self.frame.size_bytes()
    }

    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        for (group, out) in out.chunks_exact_mut(GROUP).enumerate() {
            let scale = self.frame.scale(row, group);
            let min = self.frame.min(row, group);
            for (i, out) in out.iter_mut().enumerate() {
                let code = i32::from(self.code(row, group * GROUP + i));
                // The product is exact (11 by 4 bits), so one rounding remains, as in a fused operation.
                *out = min.map_or_else(|| scale * (code - 8) as f32, |min| scale * code as f32 + min);
            }
        }
    }
}

/// 8-bit codes in groups of 32: a weight is `scale * code`, plus `min` where the matrix has minimums.
#[derive(Debug)]
pub struct PackedW8 {
    pub(crate) frame: Frame,
    /// `[tiles, groups, 8, tile_rows, 4]`
    pub(crate) codes: Buffer<i8>,
}

impl PackedW8 {
    /// Packs row by row for `isa`; `fill(row, out)` writes one row's codes, scales and minimums. Rows come in order.
    pub fn pack(isa: Isa, rows: usize, cols: usize, with_mins: bool, mut fill: impl FnMut(usize, RowW8<'_>)) -> Self {
        let frame = Frame::new(isa, rows, cols, with_mins);
        let groups = frame.groups();
        let tile_rows = frame.tile_rows;
        let codes = weights_buffer(frame.tiles() * groups * tile_rows * W8_GROUP_BYTES);
        let mut packed = Self { frame, codes };
        let mut row_codes = vec![0_i8; cols];
        let mut scales = vec![f16::ZERO; groups];
        let mut mins = vec![f16::ZERO; if with_mins { groups } else { 0 }];
        for row in 0..rows {
            fill(row, RowW8 { codes: &mut row_codes, scales: &mut scales, mins: &mut mins });
            for (group, codes) in row_codes.chunks_exact(GROUP).enumerate() {
                for (t, quad) in codes.chunks_exact(4).enumerate() {
                    let at = packed.byte_index(row, group, t);
                    packed.codes[at..at + 4].copy_from_slice(quad);
                }
            }
            packed.frame.set_scales(row, &scales, &mins);
        }
        packed
    }

    /// Where the four bytes of quad `t` of a row's group begin.
    fn byte_index(&self, row: usize, group: usize, t: usize) -> usize {
        let Frame { tile_rows, .. } = self.frame;
        (((row / tile_rows * self.frame.groups() + group) * 8 + t) * tile_rows + row % tile_rows) * 4
    }

    /// The code at (row, col).
    pub fn code(&self, row: usize, col: usize) -> i8 {
        self.codes[self.byte_index(row, col / GROUP, col % GROUP / 4) + col % 4]
    }

    pub(crate) fn size_bytes(&self) -> usize {
        self.codes.size_bytes() + self.frame.size_bytes()
    }

    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        for (group, out) in out.chunks_exact_mut(GROUP).enumerate() {
            let scale = self.frame.scale(row, group);
            let min = self.frame.min(row, group);
            for (i, out) in out.iter_mut().enumerate() {
                let product = scale * f32::from(self.code(row, group * GROUP + i));
                *out = min.map_or(product, |min| product + min);
            }
        }
    }
}
