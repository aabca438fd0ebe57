//! Quantised matrices and their packing.
//!
//! Importers bring neutral codes, scales and minimums of a [`QuantFormat`], row by row. Codes take the bits they have, scales stay as compact as files keep them. The
//! layouts are drawn in the crate's head. Invariant: [`Quantized::code`] and [`Matrix::row`](crate::Matrix::row) give back
//! exactly what the importer wrote; rows that pad the last tile are zero.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use half::f16;

use crate::cpu::Cpu;
use crate::cpu::arranged::Arrangement;
use crate::cpu::dispatch::Isa;
use crate::cpu::prefetch::prefetch_tile;
use crate::memory::{Buffer, Use};
use crate::order::InputOrder;
use crate::quant_format::{CodeBits, GROUP, MAX_VECTORS, Piece, QUAD, QUADS, QuantFormat, Scaling, cut, in_every_byte};

/// One row as an importer hands it over. Every element must be written: the buffers hold the row before.
#[derive(Debug)]
pub struct QuantRow<'a> {
    /// `[cols]`, in the format's range (what lies beyond is cut off).
    pub codes: &'a mut [i8],
    /// `[cols / scale span]`, rounded up where scales come in spans; empty where they are exponents.
    pub scales: &'a mut [f16],
    /// As many as scales, or empty where the matrix has no minimums or they are zero points.
    pub mins: &'a mut [f16],
    /// `[cols / group]`: what multiplies the scales where they have two levels, or the exponents' bytes, else empty.
    pub sub_scales: &'a mut [i8],
    /// Likewise for the minimums; in spans, as many zero points as scales.
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
    /// `[tiles, cols / 32 or 256 or a span, tile_rows]`
    pub(crate) scales: Buffer<f16>,
    /// As scales, or empty; here and below as in [`QuantRow`].
    pub(crate) mins: Buffer<f16>,
    /// `[tiles, cols / group, tile_rows]`, or empty. Where nibbles share a byte, the minimum's is the high one.
    pub(crate) sub_scales: Buffer<i8>,
    /// As those, or empty; in spans as scales.
    pub(crate) sub_mins: Buffer<i8>,
    /// The order in which it reads its inputs, where that is not theirs.
    pub(crate) order: Option<InputOrder>,
}

impl Quantized {
    /// Packs row by row for `isa`; `fill(row, out)` writes one row's codes, scales and minimums. Rows come in order.
    /// Panics for a format that no kernel computes, and for inputs that are no multiple of its
    /// [what the format wants](QuantFormat::cols_multiple).
    pub fn pack(
        isa: Isa,
        rows: usize,
        cols: usize,
        format: QuantFormat,
        fill: impl FnMut(usize, QuantRow<'_>),
    ) -> Self {
        let mut packed = Self::zeroed(isa, rows, cols, format);
        let strides = packed.strides();
        if let Some(whole) = packed.parts(&strides, rows).next() {
            strides.pack(0..rows, whole, fill);
        }
        packed
    }

    /// As [`Quantized::pack`], on all threads of `cpu` and for its instruction set: `fill(rows)` makes what writes these
    /// rows, which come in order there. What is packed does not depend on who packed it.
    pub fn pack_parallel<F: FnMut(usize, QuantRow<'_>)>(
        cpu: &Cpu,
        rows: usize,
        cols: usize,
        format: QuantFormat,
        fill: impl Fn(Range<usize>) -> F + Sync,
    ) -> Self {
        let mut packed = Self::zeroed(cpu.isa(), rows, cols, format);
        let strides = packed.strides();
        let rows_per_part = rows_per_part(cpu.threads(), rows, cols, packed.tile_rows);
        let parts = packed.parts(&strides, rows_per_part);
        cpu.pack_parts(rows, rows_per_part, parts, |rows, out| strides.pack(rows.clone(), out, fill(rows)));
        packed
    }

    /// Bytes that a matrix packed for `isa` holds, padding included; what [`Matrix::size_bytes`](crate::Matrix::size_bytes)
    /// says once there is one. None of it is allocated.
    pub fn packed_bytes(isa: Isa, rows: usize, cols: usize, format: QuantFormat) -> usize {
        let strides = Strides::new(format, cols, isa.quant_tile_rows());
        let halves = strides.scales + strides.mins;
        let row_bytes = strides.code_bytes + halves * size_of::<f16>() + strides.sub_scales + strides.stored_sub_mins();
        rows.next_multiple_of(strides.tile_rows) * row_bytes
    }

    fn zeroed(isa: Isa, rows: usize, cols: usize, format: QuantFormat) -> Self {
        assert!(format.group().is_some(), "no kernel computes {format:?}");
        let multiple = format.cols_multiple();
        assert!(
            cols.is_multiple_of(multiple),
            "a quantised matrix needs a multiple of {multiple} inputs, got {cols}; keep this one dense"
        );
        let tile_rows = isa.quant_tile_rows();
        let strides = Strides::new(format, cols, tile_rows);
        let padded_rows = rows.next_multiple_of(tile_rows);
        Self {
            format,
            rows,
            cols,
            tile_rows,
            codes: weights_buffer(padded_rows * strides.code_bytes),
            scales: weights_buffer(padded_rows * strides.scales),
            mins: weights_buffer(padded_rows * strides.mins),
            sub_scales: weights_buffer(padded_rows * strides.sub_scales),
            sub_mins: weights_buffer(padded_rows * strides.stored_sub_mins()),
            order: None,
        }
    }

    /// The same matrix with its columns understood in another order: what was packed as column i stands for input
    /// `order[i]`. Panics for an order of another number of inputs.
    #[must_use]
    pub fn with_order(mut self, order: InputOrder) -> Self {
        assert_eq!(order.len(), self.cols, "an order of {} for {} inputs", order.len(), self.cols);
        self.order = Some(order);
        self
    }

    /// The order in which it reads its inputs, where that is not theirs.
    pub fn order(&self) -> Option<&InputOrder> {
        self.order.as_ref()
    }

    /// How it wants its inputs, where not as they come: in its order, or filled up to whole groups.
    pub(crate) fn arrangement(&self) -> Option<Arrangement<'_>> {
        let order = self.order.as_ref();
        (order.is_some() || !self.cols.is_multiple_of(GROUP)).then_some(Arrangement { order })
    }

    fn strides(&self) -> Strides {
        Strides::new(self.format, self.cols, self.tile_rows)
    }

    /// Cut after every `rows_per_part` rows, a multiple of a tile's (or all of them).
    fn parts(&mut self, strides: &Strides, rows_per_part: usize) -> impl Iterator<Item = Part<'_>> {
        let rows = rows_per_part.next_multiple_of(self.tile_rows);
        let codes = cut_every(rows * strides.code_bytes, &mut self.codes);
        let scales = cut_every(rows * strides.scales, &mut self.scales);
        let mins = cut_every(rows * strides.mins, &mut self.mins);
        let sub_scales = cut_every(rows * strides.sub_scales, &mut self.sub_scales);
        let sub_mins = cut_every(rows * strides.sub_mins, &mut self.sub_mins);
        let lines = scales.zip(mins).zip(sub_scales.zip(sub_mins));
        codes.zip(lines).map(|(codes, ((scales, mins), (sub_scales, sub_mins)))| Part {
            codes,
            scales,
            mins,
            sub_scales,
            sub_mins,
        })
    }

    /// What its weights are made of.
    pub fn format(&self) -> QuantFormat {
        self.format
    }

    /// Activation groups of a row.
    pub(crate) fn groups(&self) -> usize {
        self.cols.div_ceil(GROUP)
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

    /// What they stand for.
    pub(crate) fn values(&self, row: usize, group: usize) -> [i8; GROUP] {
        self.group(row, group).map(|code| self.format.book.value(code))
    }

    /// The code at (row, col), columns as they were packed.
    pub fn code(&self, row: usize, col: usize) -> i8 {
        self.group(row, col / GROUP)[col % GROUP]
    }

    /// The scale of a row's weights `index * group_len..`: exact, 11 bits by at most 8.
    pub(crate) fn scale(&self, row: usize, index: usize) -> f32 {
        let stored = || self.sub_scales[self.sub_index(row, index)];
        let sub = match self.format.scaling {
            Scaling::Exponents => return Scaling::power(stored().cast_unsigned()),
            Scaling::Single | Scaling::Wide | Scaling::Spans(_) => None,
            Scaling::TwoLevel => Some(f32::from(stored())),
            Scaling::Nibbles => Some(f32::from(stored() & 15)),
            Scaling::Eighths => Some(f32::from(stored()) / 8.0),
        };
        self.times_upper(&self.scales, row, index, sub)
    }

    /// The minimum of the same weights, likewise exact; none where codes lie around zero.
    pub(crate) fn min(&self, row: usize, index: usize) -> Option<f32> {
        if !self.format.with_mins {
            return None;
        }
        let sub = match self.format.scaling {
            Scaling::Single | Scaling::Wide | Scaling::Eighths | Scaling::Exponents => None,
            Scaling::TwoLevel => Some(f32::from(self.sub_mins[self.sub_index(row, index)])),
            Scaling::Nibbles => Some(f32::from(self.sub_scales[self.sub_index(row, index)] >> 4 & 15)),
            Scaling::Spans(_) => {
                let zero = self.sub_mins[self.upper_index(row, index)];
                return Some(-(self.scale(row, index) * f32::from(zero)));
            }
        };
        Some(self.times_upper(&self.mins, row, index, sub))
    }

    fn sub_index(&self, row: usize, index: usize) -> usize {
        self.scale_index(row, index, self.cols / self.group_len())
    }

    fn times_upper(&self, upper: &[f16], row: usize, index: usize, sub: Option<f32>) -> f32 {
        let upper = upper[self.upper_index(row, index)].to_f32();
        sub.map_or(upper, |sub| upper * sub)
    }

    fn upper_index(&self, row: usize, index: usize) -> usize {
        let span = self.format.scale_span();
        self.scale_index(row, index * self.group_len() / span, self.cols.div_ceil(span))
    }

    pub(crate) fn size_bytes(&self) -> usize {
        let scales = self.scales.size_bytes() + self.mins.size_bytes();
        let order = self.order.as_ref().map_or(0, |order| size_of_val(order.places()));
        self.codes.size_bytes() + scales + self.sub_scales.size_bytes() + self.sub_mins.size_bytes() + order
    }

    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        for group in 0..self.groups() {
            let cols = group * GROUP..((group + 1) * GROUP).min(self.cols);
            let values = &self.dequantized_group(row, group)[..cols.len()];
            match &self.order {
                None => out[cols].copy_from_slice(values),
                Some(order) => {
                    for (&input, &value) in order.places()[cols].iter().zip(values) {
                        out[input as usize] = value;
                    }
                }
            }
        }
    }

    /// Asks memory for what [`Self::row`] is going to read.
    pub(crate) fn prefetch_row(&self, row: usize) {
        let (tile, num_tiles) = (row / self.tile_rows, self.tiles());
        prefetch_tile(&self.codes, tile, num_tiles);
        for upper in [&self.scales, &self.mins] {
            prefetch_tile(upper, tile, num_tiles);
        }
        for sub in [&self.sub_scales, &self.sub_mins] {
            prefetch_tile(sub, tile, num_tiles);
        }
    }

    /// A row's weights that meet an activation group.
    fn dequantized_group(&self, row: usize, group: usize) -> [f32; GROUP] {
        let (stored, group_len, mut weights) = (self.values(row, group), self.group_len(), [0.0; GROUP]);
        for (part, (weights, values)) in weights.chunks_mut(group_len).zip(stored.chunks(group_len)).enumerate() {
            let index = group * (GROUP / group_len) + part;
            // The last group may be filled up beyond the last scale.
            if index * group_len >= self.cols {
                break;
            }
            let (scale, min) = (self.scale(row, index), self.min(row, index));
            for (weight, &value) in weights.iter_mut().zip(values) {
                let product = scale * f32::from(value);
                *weight = min.map_or(product, |min| product + min);
            }
        }
        weights
    }
}

/// What a row takes of each of a matrix's buffers, in elements.
struct Strides {
    format: QuantFormat,
    tile_rows: usize,
    cols: usize,
    groups: usize,
    code_bytes: usize,
    scales: usize,
    mins: usize,
    sub_scales: usize,
    /// As handed over; where nibbles share a byte, none are stored.
    sub_mins: usize,
}

/// Consecutive whole tiles of a matrix being packed; its buffers as in [`Quantized`].
struct Part<'a> {
    codes: &'a mut [u8],
    scales: &'a mut [f16],
    mins: &'a mut [f16],
    sub_scales: &'a mut [i8],
    sub_mins: &'a mut [i8],
}

impl Strides {
    fn new(format: QuantFormat, cols: usize, tile_rows: usize) -> Self {
        let groups = cols.div_ceil(GROUP);
        let scales = if format.scaling == Scaling::Exponents { 0 } else { cols.div_ceil(format.scale_span()) };
        let sub_scales = match format.group() {
            Some(group) if format.has_sub_scales() => cols / group,
            _ => 0,
        };
        let of_mins = |count| if format.with_mins { count } else { 0 };
        let are_zeros = matches!(format.scaling, Scaling::Spans(_));
        let (mins, sub_mins) = if are_zeros { (0, scales) } else { (scales, sub_scales) };
        Self {
            format,
            tile_rows,
            cols,
            groups,
            code_bytes: groups * QUAD * format.bits.count(),
            scales,
            mins: of_mins(mins),
            sub_scales,
            sub_mins: of_mins(sub_mins),
        }
    }

    fn stored_sub_mins(&self) -> usize {
        if self.format.scaling == Scaling::Nibbles { 0 } else { self.sub_mins }
    }

    /// Packs `rows`, the first of which is the first of `out`.
    fn pack(&self, rows: Range<usize>, out: Part<'_>, mut fill: impl FnMut(usize, QuantRow<'_>)) {
        let Part { codes: out_codes, scales: out_scales, mins: out_mins, sub_scales: out_subs, sub_mins: out_sub_mins } =
            out;
        // Those that fill the last group stay zero.
        let mut codes = vec![0_i8; self.groups * GROUP];
        let (mut scales, mut mins) = (vec![f16::ZERO; self.scales], vec![f16::ZERO; self.mins]);
        let (mut sub_scales, mut sub_mins) = (vec![0_i8; self.sub_scales], vec![0_i8; self.sub_mins]);
        for (place, row) in rows.enumerate() {
            let line = QuantRow {
                codes: &mut codes[..self.cols],
                scales: &mut scales,
                mins: &mut mins,
                sub_scales: &mut sub_scales,
                sub_mins: &mut sub_mins,
            };
            fill(row, line);
            self.set_codes(place, &codes, out_codes);
            self.scatter(place, &scales, out_scales);
            self.scatter(place, &mins, out_mins);
            if self.format.scaling == Scaling::Nibbles {
                for (sub_scale, sub_min) in sub_scales.iter_mut().zip(&sub_mins) {
                    *sub_scale = *sub_scale & 15 | sub_min << 4;
                }
            } else {
                self.scatter(place, &sub_mins, out_sub_mins);
            }
            self.scatter(place, &sub_scales, out_subs);
        }
    }

    fn set_codes(&self, place: usize, codes: &[i8], out: &mut [u8]) {
        let (offset, stride) = (self.format.offset(), self.tile_rows * QUAD);
        let (first, bits) = (self.first(place, self.groups * self.format.bits.count()), self.format.bits.count());
        for (group, codes) in codes.as_chunks::<GROUP>().0.iter().enumerate() {
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
            for (vector, word) in words[..bits].iter().enumerate() {
                out[first * QUAD + (group * bits + vector) * stride..][..QUAD].copy_from_slice(&word.to_le_bytes());
            }
        }
    }

    /// Where a row's first element lies among those of its tile, of which each row has `per_row`.
    fn first(&self, place: usize, per_row: usize) -> usize {
        place / self.tile_rows * per_row * self.tile_rows + place % self.tile_rows
    }

    /// Writes a row's values to where they lie between those of its tile's other rows.
    fn scatter<T: bytemuck::Pod>(&self, place: usize, values: &[T], target: &mut [T]) {
        let first = self.first(place, values.len());
        for (i, &value) in values.iter().enumerate() {
            target[first + i * self.tile_rows] = value;
        }
    }
}

/// Weights that a thread packs at a time, at most: some milliseconds' work.
const MAX_PART_WEIGHTS: usize = 1 << 20;
/// At least: more than handing it over costs. (Miri interprets, and shall see several parts.)
const MIN_PART_WEIGHTS: usize = if cfg!(miri) { 1 << 9 } else { 1 << 15 };
/// Parts that a thread should find on average, so that a slow one is helped out by the others.
const PARTS_PER_THREAD: usize = 4;

/// Rows of a part: whole tiles.
pub(crate) fn rows_per_part(threads: usize, rows: usize, cols: usize, tile_rows: usize) -> usize {
    let cols = cols.max(1);
    let wanted = (rows * cols / (threads * PARTS_PER_THREAD)).clamp(MIN_PART_WEIGHTS, MAX_PART_WEIGHTS);
    (wanted / cols).max(1).next_multiple_of(tile_rows)
}

/// Consecutive parts of `len` elements, then empty ones without end.
pub(crate) fn cut_every<T>(len: usize, slice: &mut [T]) -> impl Iterator<Item = &mut [T]> {
    slice.chunks_mut(len.max(1)).chain(std::iter::repeat_with(|| &mut [][..]))
}

impl Cpu {
    /// Hands consecutive parts of `rows_per_part` rows, with where they go, to `pack`, on all threads.
    pub(crate) fn pack_parts<P: Send>(
        &self,
        rows: usize,
        rows_per_part: usize,
        parts: impl Iterator<Item = P>,
        pack: impl Fn(Range<usize>, P) + Sync,
    ) {
        let parts: Vec<Mutex<Option<P>>> =
            parts.take(rows.div_ceil(rows_per_part)).map(|part| Mutex::new(Some(part))).collect();
        self.run(parts.len(), |index| {
            let part = parts[index].lock().unwrap_or_else(PoisonError::into_inner).take();
            let first = index * rows_per_part;
            pack(first..(first + rows_per_part).min(rows), part.expect("each part is drawn once"));
        });
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
    use crate::quant_format::SUPER_GROUP;

    /// Some number for each place that fits the format.
    fn fill(format: QuantFormat, row: usize, out: &mut QuantRow<'_>) {
        let number = |i: usize| (row * 31 + i * 7) as i8;
        let codes = format.codes();
        let span = i16::from(*codes.end()) - i16::from(*codes.start()) + 1;
        for (i, code) in out.codes.iter_mut().enumerate() {
            *code = (i16::from(*codes.start()) + i16::from(number(i)).rem_euclid(span)) as i8;
        }
        for (i, scale) in out.scales.iter_mut().chain(out.mins.iter_mut()).enumerate() {
            *scale = f16::from_f32(f32::from(number(i)) / 16.0);
        }
        let most = if format.scaling == Scaling::Nibbles { 15 } else { 63 };
        for (i, sub) in out.sub_scales.iter_mut().chain(out.sub_mins.iter_mut()).enumerate() {
            *sub = number(i) & most;
        }
    }

    #[test]
    fn several_threads_pack_what_one_packs() {
        let (cpu, cols) = (Cpu::new(Isa::Scalar, 3), SUPER_GROUP);
        // Miri interprets; a few of the formats have every layout of codes and scales.
        let (row_counts, step): (&[usize], _) = if cfg!(miri) { (&[19], 5) } else { (&[0, 17, 1603], 1) };
        for format in QuantFormat::all().into_iter().step_by(step) {
            for &rows in row_counts {
                let one = Quantized::pack(Isa::Scalar, rows, cols, format, |row, mut out| fill(format, row, &mut out));
                let several = Quantized::pack_parallel(&cpu, rows, cols, format, |_| {
                    |row, mut out: QuantRow<'_>| fill(format, row, &mut out)
                });
                assert!(*one.codes == *several.codes && *one.scales == *several.scales && *one.mins == *several.mins);
                assert!(*one.sub_scales == *several.sub_scales && *one.sub_mins == *several.sub_mins);
                assert_eq!(one.size_bytes(), Quantized::packed_bytes(Isa::Scalar, rows, cols, format), "{format:?}");
                let mut expected = [vec![0_i8; cols], vec![0; cols], vec![0; cols]];
                for row in (0..rows).step_by(if cfg!(miri) { 3 } else { 97 }) {
                    let [codes, sub_scales, sub_mins] = &mut expected;
                    let (scales, mins) = (&mut [f16::ZERO; 8], &mut [f16::ZERO; 8]);
                    fill(format, row, &mut QuantRow { codes, scales, mins, sub_scales, sub_mins });
                    for col in 0..cols {
                        assert_eq!(several.code(row, col), expected[0][col], "{format:?} row {row} col {col}");
                    }
                }
            }
        }
    }
}
