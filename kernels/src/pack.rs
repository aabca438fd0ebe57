//! Quantised matrices and their packing.
//!
//! A [`QuantFormat`] names the arithmetic (codes times int8 activations), not a file format: importers bring neutral
//! codes, scales and minimums, row by row. Codes take the bits they have, scales stay as compact as files keep them. The
//! layouts are drawn in the crate's head. Invariant: [`Quantized::code`] and [`Matrix::row`](crate::Matrix::row) give back
//! exactly what the importer wrote; rows that pad the last tile are zero.

use half::f16;

use crate::cpu::dispatch::Isa;
use crate::memory::{Buffer, Use};

/// Inputs of an activation group; no group of weights is longer.
pub const GROUP: usize = 32;
/// Inputs that share the upper scale of two-level scales.
pub const SUPER_GROUP: usize = 256;
/// Codes that lie together in every layout: what one broadcast of activations meets.
const QUAD: usize = 4;
/// Quads of an activation group.
const QUADS: usize = GROUP / QUAD;
/// Vectors of a group's codes at most: as many as a code has bits.
const MAX_VECTORS: usize = 8;

/// Bits that a code takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CodeBits {
    /// 0..=3, or -2..=1 where there are no minimums.
    Two,
    /// 0..=7, or -4..=3.
    Three,
    /// 0..=15, or -8..=7.
    Four,
    /// 0..=31, or -16..=15.
    Five,
    /// 0..=63, or -32..=31.
    Six,
    /// -128..=127.
    Eight,
}

impl CodeBits {
    /// Every width.
    pub const ALL: [Self; 6] = [Self::Two, Self::Three, Self::Four, Self::Five, Self::Six, Self::Eight];

    /// As a number.
    pub const fn count(self) -> usize {
        match self {
            Self::Two => 2,
            Self::Three => 3,
            Self::Four => 4,
            Self::Five => 5,
            Self::Six => 6,
            Self::Eight => 8,
        }
    }

    /// Where the bits of a group's quads lie; drawn in the crate's head.
    const fn pieces(self) -> &'static [Piece] {
        match self {
            Self::Two => const { &whole_quads(2) },
            Self::Three => {
                const {
                    &[
                        piece(0, 0, 0, 3, 0),
                        piece(1, 0, 3, 3, 0),
                        piece(2, 1, 0, 3, 0),
                        piece(3, 1, 3, 3, 0),
                        piece(4, 2, 0, 3, 0),
                        piece(5, 2, 3, 3, 0),
                        piece(6, 0, 6, 2, 0),
                        piece(6, 2, 6, 1, 2),
                        piece(7, 1, 6, 2, 0),
                        piece(7, 2, 7, 1, 2),
                    ]
                }
            }
            Self::Four => const { &whole_quads(4) },
            Self::Five => {
                const {
                    &[
                        piece(0, 0, 0, 5, 0),
                        piece(1, 1, 0, 5, 0),
                        piece(2, 2, 0, 5, 0),
                        piece(3, 3, 0, 5, 0),
                        piece(4, 4, 0, 5, 0),
                        piece(5, 0, 5, 3, 0),
                        piece(5, 1, 6, 2, 3),
                        piece(6, 2, 5, 3, 0),
                        piece(6, 3, 6, 2, 3),
                        piece(7, 4, 5, 3, 0),
                        piece(7, 1, 5, 1, 3),
                        piece(7, 3, 5, 1, 4),
                    ]
                }
            }
            Self::Six => {
                const {
                    &[
                        piece(0, 0, 0, 6, 0),
                        piece(1, 1, 0, 6, 0),
                        piece(2, 2, 0, 6, 0),
                        piece(3, 0, 6, 2, 4),
                        piece(3, 1, 6, 2, 2),
                        piece(3, 2, 6, 2, 0),
                        piece(4, 3, 0, 6, 0),
                        piece(5, 4, 0, 6, 0),
                        piece(6, 5, 0, 6, 0),
                        piece(7, 3, 6, 2, 4),
                        piece(7, 4, 6, 2, 2),
                        piece(7, 5, 6, 2, 0),
                    ]
                }
            }
            Self::Eight => const { &whole_quads(8) },
        }
    }
}

/// Some bits of a quad's codes: bits `to..to + width` of the codes are bits `from..from + width` of a vector's bytes.
#[derive(Clone, Copy)]
struct Piece {
    quad: usize,
    vector: usize,
    from: usize,
    width: usize,
    to: usize,
}

const fn piece(quad: usize, vector: usize, from: usize, width: usize, to: usize) -> Piece {
    Piece { quad, vector, from, width, to }
}

/// Codes that divide a byte, one after the other.
const fn whole_quads(width: usize) -> [Piece; QUADS] {
    let mut pieces = [piece(0, 0, 0, width, 0); QUADS];
    let mut quad = 0;
    while quad < QUADS {
        pieces[quad] = piece(quad, quad * width / 8, quad * width % 8, width, 0);
        quad += 1;
    }
    pieces
}

/// How scales (and minimums, where there are some) are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scaling {
    /// An f16 for 32 weights.
    Single,
    /// An f16 for 256 weights times an int8 for each group of them: 32 weights for codes of four and five bits, 16 for
    /// three and six.
    TwoLevel,
    /// An f16 for 256 weights times 0..=15 for each 16 of them; scale and minimum share a byte. For codes of two bits.
    Nibbles,
}

/// What a weight is made of: `scale * code`, plus `min` where the format has minimums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuantFormat {
    /// Bits of a code.
    pub bits: CodeBits,
    /// How scales and minimums are kept.
    pub scaling: Scaling,
    /// Whether codes count up from a minimum instead of lying around zero.
    pub with_mins: bool,
}

impl QuantFormat {
    /// Every format that the kernels compute.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for bits in CodeBits::ALL {
            for scaling in [Scaling::Single, Scaling::TwoLevel, Scaling::Nibbles] {
                for with_mins in [false, true] {
                    let format = Self { bits, scaling, with_mins };
                    if format.group().is_some() {
                        all.push(format);
                    }
                }
            }
        }
        all
    }

    /// Weights that share a scale; none for a combination that no kernel computes.
    pub fn group(self) -> Option<usize> {
        match (self.bits, self.scaling, self.with_mins) {
            (CodeBits::Four | CodeBits::Five, Scaling::Single, _)
            | (CodeBits::Eight, Scaling::Single, false)
            | (CodeBits::Four | CodeBits::Five, Scaling::TwoLevel, true) => Some(32),
            (CodeBits::Three | CodeBits::Six, Scaling::TwoLevel, false) | (CodeBits::Two, Scaling::Nibbles, true) => {
                Some(16)
            }
            _ => None,
        }
    }

    /// The codes that the format holds.
    pub fn codes(self) -> std::ops::RangeInclusive<i8> {
        let offset = self.offset();
        match self.bits {
            CodeBits::Eight => i8::MIN..=i8::MAX,
            bits => -offset..=(1 << bits.count()) - 1 - offset,
        }
    }

    /// Inputs that share an f16 scale; a matrix has a multiple of them.
    pub fn scale_span(self) -> usize {
        match self.scaling {
            Scaling::Single => GROUP,
            Scaling::TwoLevel | Scaling::Nibbles => SUPER_GROUP,
        }
    }

    /// What is added to codes to store them: short codes are kept unsigned.
    pub(crate) fn offset(self) -> i8 {
        if self.with_mins || self.bits == CodeBits::Eight { 0 } else { 1 << (self.bits.count() - 1) }
    }
}

/// One row as an importer hands it over. Every element must be written: the buffers hold the row before.
#[derive(Debug)]
pub struct QuantRow<'a> {
    /// `[cols]`, in the format's range (what lies beyond is cut off).
    pub codes: &'a mut [i8],
    /// `[cols / 32]`, or `[cols / 256]` where scales have two levels.
    pub scales: &'a mut [f16],
    /// As many as scales, or empty where the matrix has no minimums.
    pub mins: &'a mut [f16],
    /// `[cols / group]`: what multiplies the scales where they have two levels, else empty.
    pub sub_scales: &'a mut [i8],
    /// Likewise for the minimums.
    pub sub_mins: &'a mut [i8],
}

/// A matrix of codes, scales and minimums.
#[derive(Debug)]
pub struct Quantized {
    pub(crate) format: QuantFormat,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Rows of a tile.
    pub(crate) tile_rows: usize,
    /// `[tiles, cols / 32, bits, tile_rows, 4]` bytes
    pub(crate) codes: Buffer<u8>,
    /// `[tiles, cols / 32 or 256, tile_rows]`
    pub(crate) scales: Buffer<f16>,
    /// As scales, or empty.
    pub(crate) mins: Buffer<f16>,
    /// `[tiles, cols / group, tile_rows]`, or empty. Where nibbles share a byte, the minimum's is the high one.
    pub(crate) sub_scales: Buffer<i8>,
    /// As those, or empty.
    pub(crate) sub_mins: Buffer<i8>,
}

impl Quantized {
    /// Packs row by row for `isa`; `fill(row, out)` writes one row's codes, scales and minimums. Rows come in order.
    /// Panics for a format that no kernel computes, and for inputs that are no multiple of its
    /// [span](QuantFormat::scale_span).
    pub fn pack(
        isa: Isa,
        rows: usize,
        cols: usize,
        format: QuantFormat,
        mut fill: impl FnMut(usize, QuantRow<'_>),
    ) -> Self {
        let Some(group) = format.group() else { panic!("no kernel computes {format:?}") };
        let span = format.scale_span();
        assert!(
            cols.is_multiple_of(span),
            "a quantised matrix needs a multiple of {span} inputs, got {cols}; keep this one dense"
        );
        let tile_rows = isa.quant_tile_rows();
        // Per row; nothing of what the format does not have.
        let spans = cols / span;
        let spans_of_mins = if format.with_mins { spans } else { 0 };
        let subs = if format.scaling == Scaling::Single { 0 } else { cols / group };
        let subs_of_mins = if format.with_mins { subs } else { 0 };
        let packed_subs_of_mins = if format.scaling == Scaling::Nibbles { 0 } else { subs_of_mins };
        let padded_rows = rows.next_multiple_of(tile_rows);
        let mut packed = Self {
            format,
            rows,
            cols,
            tile_rows,
            codes: weights_buffer(padded_rows * (cols / GROUP) * QUAD * format.bits.count()),
            scales: weights_buffer(padded_rows * spans),
            mins: weights_buffer(padded_rows * spans_of_mins),
            sub_scales: weights_buffer(padded_rows * subs),
            sub_mins: weights_buffer(padded_rows * packed_subs_of_mins),
        };
        let mut codes = vec![0_i8; cols];
        let (mut scales, mut mins) = (vec![f16::ZERO; spans], vec![f16::ZERO; spans_of_mins]);
        let (mut sub_scales, mut sub_mins) = (vec![0_i8; subs], vec![0_i8; subs_of_mins]);
        for row in 0..rows {
            let out = QuantRow {
                codes: &mut codes,
                scales: &mut scales,
                mins: &mut mins,
                sub_scales: &mut sub_scales,
                sub_mins: &mut sub_mins,
            };
            fill(row, out);
            for (group, codes) in codes.as_chunks::<GROUP>().0.iter().enumerate() {
                packed.set_group(row, group, codes);
            }
            if format.scaling == Scaling::Nibbles {
                for (sub_scale, sub_min) in sub_scales.iter_mut().zip(&sub_mins) {
                    *sub_scale = *sub_scale & 15 | sub_min << 4;
                }
                sub_mins.clear();
            }
            let first = |per_row: usize| row / tile_rows * per_row * tile_rows + row % tile_rows;
            scatter(&mut packed.scales, first(spans), tile_rows, &scales);
            scatter(&mut packed.mins, first(spans), tile_rows, &mins);
            scatter(&mut packed.sub_scales, first(subs), tile_rows, &sub_scales);
            scatter(&mut packed.sub_mins, first(subs), tile_rows, &sub_mins);
            sub_mins.resize(subs_of_mins, 0);
        }
        packed
    }

    /// What its weights are made of.
    pub fn format(&self) -> QuantFormat {
        self.format
    }

    /// Activation groups of a row.
    pub(crate) fn groups(&self) -> usize {
        self.cols / GROUP
    }

    pub(crate) fn tiles(&self) -> usize {
        self.rows.div_ceil(self.tile_rows)
    }

    /// Weights that share a scale.
    pub(crate) fn group_len(&self) -> usize {
        self.format.group().expect("`pack` refuses others")
    }

    /// Where the four bytes of a row in the first vector of an activation group begin; those in the next vector lie
    /// `tile_rows` quads further.
    fn byte_index(&self, row: usize, group: usize) -> usize {
        let place = row / self.tile_rows * self.groups() + group;
        (place * self.format.bits.count() * self.tile_rows + row % self.tile_rows) * QUAD
    }

    /// Where a row's scale number `index` of `per_row` lies.
    fn scale_index(&self, row: usize, index: usize, per_row: usize) -> usize {
        (row / self.tile_rows * per_row + index) * self.tile_rows + row % self.tile_rows
    }

    fn set_group(&mut self, row: usize, group: usize, codes: &[i8; GROUP]) {
        let offset = self.format.offset();
        let stored = codes.map(|code| code.wrapping_add(offset).cast_unsigned());
        let quads: [u32; QUADS] = std::array::from_fn(|quad| u32::from_le_bytes(stored.as_chunks().0[quad]));
        // The widths are named so that each is compiled with its own table, as a straight run of shifts.
        let words = match self.format.bits {
            CodeBits::Two => cut(const { CodeBits::Two.pieces() }, &quads),
            CodeBits::Three => cut(const { CodeBits::Three.pieces() }, &quads),
            CodeBits::Four => cut(const { CodeBits::Four.pieces() }, &quads),
            CodeBits::Five => cut(const { CodeBits::Five.pieces() }, &quads),
            CodeBits::Six => cut(const { CodeBits::Six.pieces() }, &quads),
            CodeBits::Eight => cut(const { CodeBits::Eight.pieces() }, &quads),
        };
        let (first, stride) = (self.byte_index(row, group), self.tile_rows * QUAD);
        for (vector, word) in words[..self.format.bits.count()].iter().enumerate() {
            self.codes[first + vector * stride..][..QUAD].copy_from_slice(&word.to_le_bytes());
        }
    }

    /// The codes of a row's activation group.
    pub(crate) fn group(&self, row: usize, group: usize) -> [i8; GROUP] {
        let (first, stride) = (self.byte_index(row, group), self.tile_rows * QUAD);
        let mut words = [0_u32; MAX_VECTORS];
        for (vector, word) in words[..self.format.bits.count()].iter_mut().enumerate() {
            *word = u32::from_le_bytes(self.codes[first + vector * stride..].as_chunks().0[0]);
        }
        let mut quads = [0_u32; QUADS];
        for &Piece { quad, vector, from, width, to } in self.format.bits.pieces() {
            quads[quad] |= (words[vector] >> from & in_every_byte(width)) << to;
        }
        let offset = self.format.offset();
        std::array::from_fn(|i| quads[i / QUAD].to_le_bytes()[i % QUAD].cast_signed() - offset)
    }

    /// The code at (row, col).
    pub fn code(&self, row: usize, col: usize) -> i8 {
        self.group(row, col / GROUP)[col % GROUP]
    }

    /// The scale of a row's weights `index * group_len..`: exact, 11 bits by at most 8.
    pub(crate) fn scale(&self, row: usize, index: usize) -> f32 {
        let sub = match self.format.scaling {
            Scaling::Single => None,
            Scaling::TwoLevel => Some(self.sub_scales[self.sub_index(row, index)]),
            Scaling::Nibbles => Some(self.sub_scales[self.sub_index(row, index)] & 15),
        };
        self.times_upper(&self.scales, row, index, sub)
    }

    /// The minimum of the same weights, likewise exact; none where codes lie around zero.
    pub(crate) fn min(&self, row: usize, index: usize) -> Option<f32> {
        if !self.format.with_mins {
            return None;
        }
        let sub = match self.format.scaling {
            Scaling::Single => None,
            Scaling::TwoLevel => Some(self.sub_mins[self.sub_index(row, index)]),
            Scaling::Nibbles => Some(self.sub_scales[self.sub_index(row, index)] >> 4 & 15),
        };
        Some(self.times_upper(&self.mins, row, index, sub))
    }

    fn sub_index(&self, row: usize, index: usize) -> usize {
        self.scale_index(row, index, self.cols / self.group_len())
    }

    fn times_upper(&self, upper: &[f16], row: usize, index: usize, sub: Option<i8>) -> f32 {
        let span = self.format.scale_span();
        let upper = upper[self.scale_index(row, index * self.group_len() / span, self.cols / span)].to_f32();
        sub.map_or(upper, |sub| upper * f32::from(sub))
    }

    pub(crate) fn size_bytes(&self) -> usize {
        let scales = self.scales.size_bytes() + self.mins.size_bytes();
        self.codes.size_bytes() + scales + self.sub_scales.size_bytes() + self.sub_mins.size_bytes()
    }

    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let group_len = self.group_len();
        for (group, out) in out.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            let codes = self.group(row, group);
            for (part, (out, codes)) in out.chunks_mut(group_len).zip(codes.chunks(group_len)).enumerate() {
                let index = group * (GROUP / group_len) + part;
                let (scale, min) = (self.scale(row, index), self.min(row, index));
                for (out, &code) in out.iter_mut().zip(codes) {
                    let product = scale * f32::from(code);
                    *out = min.map_or(product, |min| product + min);
                }
            }
        }
    }
}

/// Quads of codes to words of vectors.
#[inline(always)]
fn cut(pieces: &[Piece], quads: &[u32; QUADS]) -> [u32; MAX_VECTORS] {
    let mut words = [0; MAX_VECTORS];
    for &Piece { quad, vector, from, width, to } in pieces {
        words[vector] |= (quads[quad] >> to & in_every_byte(width)) << from;
    }
    words
}

/// The lowest `width` bits of each of four bytes.
const fn in_every_byte(width: usize) -> u32 {
    u32::from_le_bytes([u8::MAX >> (8 - width); QUAD])
}

/// Writes a row's values to where they lie between those of its tile's other rows.
fn scatter<T: bytemuck::Pod>(target: &mut [T], first: usize, tile_rows: usize, values: &[T]) {
    for (i, &value) in values.iter().enumerate() {
        target[first + i * tile_rows] = value;
    }
}

/// Weights are allocated as `Vec` would: a refusal is a panic with the size in it, caught where models are loaded.
pub(crate) fn weights_buffer<T: bytemuck::Pod>(len: usize) -> Buffer<T> {
    match Buffer::zeroed(len, Use::Whole) {
        Ok(buffer) => buffer,
        Err(error) => panic!("no memory for weights: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_of_a_groups_vectors_is_one_bit_of_one_code() {
        for bits in CodeBits::ALL {
            let mut in_vectors = [0_u8; MAX_VECTORS];
            let mut in_codes = [0_u8; QUADS];
            for &Piece { quad, vector, from, width, to } in bits.pieces() {
                let mask = u8::MAX >> (8 - width);
                assert_eq!(in_vectors[vector] & mask << from, 0, "{bits:?}");
                assert_eq!(in_codes[quad] & mask << to, 0, "{bits:?}");
                in_vectors[vector] |= mask << from;
                in_codes[quad] |= mask << to;
            }
            assert!(in_vectors[..bits.count()].iter().all(|&used| used == u8::MAX), "{bits:?}");
            assert!(in_codes.iter().all(|&used| used == u8::MAX >> (8 - bits.count())), "{bits:?}");
        }
    }
}
