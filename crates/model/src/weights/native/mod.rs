//! Our own layout of quantised matrices in safetensors: what `bindery quantize` writes, and every start reads as it is.
//!
//! A matrix `NAME` of `rows` outputs and `cols` inputs is up to five tensors, all in file row order, so that the packing for
//! an instruction set happens at load, on all threads, and a folder fits every machine:
//!
//! | tensor | dtype and shape | content |
//! |---|---|---|
//! | `NAME.codes` | U8 `[rows, cols * bits / 8]` | a row's codes as one stream of bits, the lowest first |
//! | `NAME.scales` | F16 `[rows, cols / span]` | `span` is 32, or 256 where there are sub-scales |
//! | `NAME.mins` | F16, as scales | where codes count up from a minimum |
//! | `NAME.sub_scales` | U8 `[rows, cols / 32 * 6 / 8]` | what multiplies the scale above it: six bits a group, as codes |
//! | `NAME.sub_mins` | U8, as sub-scales | likewise for the minimum |
//!
//! A weight is `scale * sub_scale * code + min * sub_min`, without what is absent. Codes of less than eight bits are stored
//! unsigned: where there are no minimums, half their range has been added. Codes of eight bits are signed bytes. Bits and
//! spans follow from the shapes, and with them the [`QuantFormat`]. What is not quantised is a tensor `NAME` as usual.
//!
//! It must not know roles or how scales were found. Its invariant: once resolved, every row lies within its parts, and
//! format and shapes are ones that the kernels compute.

mod checkpoint;
mod mix;

use std::ops::Range;

use bindery_kernels::{CodeBits, CodeBook, GROUP, QuantFormat, QuantRow, SUPER_GROUP, Scaling};
use half::f16;
use safetensors::Dtype;

use super::{
    WeightFormat,
    mmap::MappedFile,
    safetensors::{Checkpoint, Entry},
};
use crate::ModelError;

pub use self::checkpoint::{CheckpointRequest, QuantizedGroup, QuantizedReport, is_dense_source, write_checkpoint};

const CODES: &str = ".codes";
const SCALES: &str = ".scales";
const MINS: &str = ".mins";
const SUB_SCALES: &str = ".sub_scales";
const SUB_MINS: &str = ".sub_mins";

/// The name of the matrix that a tensor is a part of.
pub(super) fn owner(name: &str) -> Option<&str> {
    [CODES, SCALES, MINS, SUB_SCALES, SUB_MINS].iter().find_map(|part| name.strip_suffix(part))
}

/// Whether a checkpoint has the matrix, quantised or not.
pub(super) fn has(checkpoint: &Checkpoint, name: &str) -> bool {
    checkpoint.entries.contains_key(name) || checkpoint.entries.contains_key(&format!("{name}{CODES}"))
}

/// What a row has of each part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RowSizes {
    code_bytes: usize,
    /// Elements.
    scales: usize,
    mins: usize,
    sub_scale_bytes: usize,
    sub_min_bytes: usize,
}

impl RowSizes {
    /// `cols` is a multiple of the format's span.
    pub(super) fn new(format: QuantFormat, cols: usize) -> Self {
        let scales = cols / format.scale_span();
        let sub_scale_bytes = if format.has_sub_scales() { cols / GROUP * SUB_BITS / 8 } else { 0 };
        let of_mins = |count| if format.with_mins { count } else { 0 };
        let code_bytes = cols / GROUP * group_bytes(format.bits);
        Self { code_bytes, scales, mins: of_mins(scales), sub_scale_bytes, sub_min_bytes: of_mins(sub_scale_bytes) }
    }

    /// Bytes of a row, all parts together.
    fn num_bytes(&self) -> usize {
        self.code_bytes + 2 * (self.scales + self.mins) + self.sub_scale_bytes + self.sub_min_bytes
    }
}

fn group_bytes(bits: CodeBits) -> usize {
    GROUP / 8 * bits.count()
}

/// Of a sub-scale or sub-minimum.
const SUB_BITS: usize = 6;

/// Appends eight numbers of so many bits, the lowest first: as many bytes.
fn push_bits(bits: usize, numbers: [u8; 8], out: &mut Vec<u8>) {
    let word = numbers.iter().rev().fold(0_u64, |word, &number| word << bits | u64::from(number));
    out.extend_from_slice(&word.to_le_bytes()[..bits]);
}

/// The eight numbers of as many bytes as each has bits.
fn read_bits(bytes: &[u8]) -> [u8; 8] {
    let bits = bytes.len();
    let word = bytes.iter().rev().fold(0_u64, |word, &byte| word << 8 | u64::from(byte));
    std::array::from_fn(|i| (word >> (i * bits) & ((1 << bits) - 1)) as u8)
}

/// What is added to codes to store them: none to signed bytes.
fn stored_offset(format: QuantFormat) -> i8 {
    if format.bits == CodeBits::Eight { 0 } else { *format.codes().start() }
}

/// Appends a row's codes as they are stored.
fn push_codes(format: QuantFormat, codes: &[i8], out: &mut Vec<u8>) {
    let offset = stored_offset(format);
    for codes in codes.as_chunks::<8>().0 {
        push_bits(format.bits.count(), codes.map(|code| code.wrapping_sub(offset).cast_unsigned()), out);
    }
}

/// A row's codes.
fn read_codes(format: QuantFormat, bytes: &[u8], out: &mut [i8]) {
    let offset = stored_offset(format);
    for (bytes, codes) in bytes.chunks_exact(format.bits.count()).zip(out.as_chunks_mut::<8>().0) {
        *codes = read_bits(bytes).map(|stored| stored.cast_signed().wrapping_add(offset));
    }
}

/// A tensor in a file.
#[derive(Clone, Debug)]
struct Part {
    file: usize,
    range: Range<usize>,
}

impl From<&Entry> for Part {
    fn from(entry: &Entry) -> Self {
        Self { file: entry.file, range: entry.range.clone() }
    }
}

/// A matrix and where its parts lie.
#[derive(Debug)]
pub(super) struct NativePlace {
    format: QuantFormat,
    rows: usize,
    cols: usize,
    codes: Part,
    scales: Part,
    mins: Option<Part>,
    sub_scales: Option<Part>,
    sub_mins: Option<Part>,
}

/// The quantised matrix of this name, if there is one. Errors name tensor, shape and what is expected.
pub(super) fn resolve(checkpoint: &Checkpoint, name: &str) -> Result<Option<NativePlace>, String> {
    let part = |suffix: &str| checkpoint.get(&format!("{name}{suffix}"));
    let Some(codes) = part(CODES)? else { return Ok(None) };
    let matrix = |suffix: &str, entry: &Entry, dtype: Dtype| match entry.shape[..] {
        [rows, cols] if rows > 0 && cols > 0 && entry.dtype == dtype => Ok((rows, cols)),
        _ => Err(format!("tensor \"{name}{suffix}\" is {:?} {:?}; a matrix of {dtype:?}", entry.dtype, entry.shape)
            + " is expected"),
    };
    let (rows, code_bytes) = matrix(CODES, codes, Dtype::U8)?;
    let Some(scales) = part(SCALES)? else {
        return Err(format!("tensor \"{name}{SCALES}\" is missing, which the codes beside it need"));
    };
    let (_, num_scales) = matrix(SCALES, scales, Dtype::F16)?;
    let (mins, sub_scales, sub_mins) = (part(MINS)?, part(SUB_SCALES)?, part(SUB_MINS)?);
    let span = if sub_scales.is_some() { SUPER_GROUP } else { GROUP };
    let cols = num_scales.checked_mul(span);
    let bits =
        cols.and_then(|cols| CodeBits::ALL.into_iter().find(|&bits| cols / GROUP * group_bytes(bits) == code_bytes));
    let format = bits.map(|bits| {
        let scaling = if sub_scales.is_some() { Scaling::TwoLevel } else { Scaling::Single };
        QuantFormat { bits, scaling, with_mins: mins.is_some(), book: CodeBook::Linear }
    });
    let (Some(cols), Some(format)) = (cols, format.filter(|format| format.group() == Some(GROUP))) else {
        return Err(format!(
            "the parts of {name:?} fit no format: {code_bytes} bytes of codes a row, {num_scales} scales, minimums: {}, \
             sub-scales: {}",
            if mins.is_some() { "yes" } else { "no" },
            if sub_scales.is_some() { "yes" } else { "no" }
        ));
    };
    let sizes = RowSizes::new(format, cols);
    let expected = [
        (SCALES, Some(scales), Dtype::F16, sizes.scales),
        (MINS, mins, Dtype::F16, sizes.mins),
        (SUB_SCALES, sub_scales, Dtype::U8, sizes.sub_scale_bytes),
        (SUB_MINS, sub_mins, Dtype::U8, sizes.sub_min_bytes),
    ];
    for (suffix, entry, dtype, per_row) in expected {
        match entry {
            None if per_row == 0 => {}
            Some(entry) if per_row > 0 && entry.dtype == dtype && entry.shape == [rows, per_row] => {}
            None => {
                return Err(format!(
                    "tensor \"{name}{suffix}\" is missing; {dtype:?} {:?} is expected",
                    [rows, per_row]
                ));
            }
            Some(entry) => {
                let found = format!("tensor \"{name}{suffix}\" is {:?} {:?}", entry.dtype, entry.shape);
                return Err(match per_row {
                    0 => format!("{found}; none is expected beside codes of {} bits", format.bits.count()),
                    _ => format!("{found}; {dtype:?} {:?} is expected", [rows, per_row]),
                });
            }
        }
    }
    Ok(Some(NativePlace {
        format,
        rows,
        cols,
        codes: codes.into(),
        scales: scales.into(),
        mins: mins.map(Part::from),
        sub_scales: sub_scales.map(Part::from),
        sub_mins: sub_mins.map(Part::from),
    }))
}

impl NativePlace {
    /// Outputs and inputs.
    pub(super) fn shape(&self) -> Vec<usize> {
        vec![self.rows, self.cols]
    }

    pub(super) fn format(&self) -> WeightFormat {
        WeightFormat::Bindery { bits: self.format.bits.count() as u8 }
    }
}

/// A matrix in its files.
#[derive(Clone, Copy, Debug)]
pub(super) struct Native<'a> {
    pub(super) files: &'a [MappedFile],
    pub(super) place: &'a NativePlace,
}

impl<'a> Native<'a> {
    pub(super) fn quant_format(&self) -> QuantFormat {
        self.place.format
    }

    fn sizes(&self) -> RowSizes {
        RowSizes::new(self.place.format, self.place.cols)
    }

    /// The file of its codes, where they lie, and the bytes of a row.
    pub(super) fn codes_at(&self) -> (&'a MappedFile, &'a Range<usize>, usize) {
        let codes = &self.place.codes;
        (&self.files[codes.file], &codes.range, self.sizes().code_bytes)
    }

    fn parts(&self) -> impl Iterator<Item = &'a Part> {
        let NativePlace { codes, scales, mins, sub_scales, sub_mins, .. } = self.place;
        [codes, scales].into_iter().chain(mins).chain(sub_scales).chain(sub_mins)
    }

    /// An error where one of its files has changed since it was opened.
    pub(super) fn check_unchanged(&self) -> Result<(), ModelError> {
        self.parts().try_for_each(|part| self.files[part.file].check_unchanged())
    }

    /// Gives the pages of all parts back.
    pub(super) fn release(&self) {
        self.parts().for_each(|part| self.files[part.file].release(&part.range));
    }

    /// Bytes of `rows` of its rows, scales counted.
    pub(super) fn num_bytes(&self, rows: usize) -> u64 {
        rows as u64 * self.sizes().num_bytes() as u64
    }

    /// A row's bytes of a part.
    fn row(&self, part: &Part, row: usize, row_bytes: usize) -> &'a [u8] {
        &self.files[part.file].bytes()[part.range.clone()][row * row_bytes..][..row_bytes]
    }

    fn halves(&self, part: &Part, row: usize, out: &mut [f16]) {
        let bytes = self.row(part, row, 2 * out.len()).as_chunks::<2>().0;
        out.iter_mut().zip(bytes).for_each(|(out, &bytes)| *out = f16::from_le_bytes(bytes));
    }

    fn subs(&self, part: &Part, row: usize, out: &mut [i8]) {
        let bytes = self.row(part, row, out.len() * SUB_BITS / 8).chunks_exact(SUB_BITS);
        out.as_chunks_mut::<8>()
            .0
            .iter_mut()
            .zip(bytes)
            .for_each(|(out, bytes)| *out = read_bits(bytes).map(u8::cast_signed));
    }

    /// A row as the kernels pack it.
    pub(super) fn unpack_row(&self, row: usize, out: &mut QuantRow<'_>) {
        let NativePlace { format, codes, scales, mins, sub_scales, sub_mins, .. } = self.place;
        read_codes(*format, self.row(codes, row, self.sizes().code_bytes), out.codes);
        self.halves(scales, row, out.scales);
        if let Some(mins) = mins {
            self.halves(mins, row, out.mins);
        }
        if let Some(sub_scales) = sub_scales {
            self.subs(sub_scales, row, out.sub_scales);
        }
        if let Some(sub_mins) = sub_mins {
            self.subs(sub_mins, row, out.sub_mins);
        }
    }

    /// A row in f32.
    pub(super) fn read_row(&self, row: usize, out: &mut [f32]) {
        let mut buffers = RowBuffers::new(self.place.format, self.place.cols);
        self.unpack_row(row, &mut buffers.as_row());
        buffers.dequantize(self.place.format, out);
    }
}

/// One row of codes, scales and what else a format has.
pub(super) struct RowBuffers {
    codes: Vec<i8>,
    scales: Vec<f16>,
    mins: Vec<f16>,
    sub_scales: Vec<i8>,
    sub_mins: Vec<i8>,
}

impl RowBuffers {
    pub(super) fn new(format: QuantFormat, cols: usize) -> Self {
        let sizes = RowSizes::new(format, cols);
        Self {
            codes: vec![0; cols],
            scales: vec![f16::ZERO; sizes.scales],
            mins: vec![f16::ZERO; sizes.mins],
            sub_scales: vec![0; sizes.sub_scale_bytes * 8 / SUB_BITS],
            sub_mins: vec![0; sizes.sub_min_bytes * 8 / SUB_BITS],
        }
    }

    pub(super) fn as_row(&mut self) -> QuantRow<'_> {
        QuantRow {
            codes: &mut self.codes,
            scales: &mut self.scales,
            mins: &mut self.mins,
            sub_scales: &mut self.sub_scales,
            sub_mins: &mut self.sub_mins,
        }
    }

    /// In the kernels' order of float operations: upper scale by sub-scale, by code, plus minimum.
    pub(super) fn dequantize(&self, format: QuantFormat, out: &mut [f32]) {
        let groups_per_scale = format.scale_span() / GROUP;
        let times = |upper: f16, subs: &[i8], index: usize| {
            subs.get(index).map_or(upper.to_f32(), |&sub| upper.to_f32() * f32::from(sub))
        };
        for (index, (out, codes)) in out.chunks_mut(GROUP).zip(self.codes.chunks(GROUP)).enumerate() {
            let scale = times(self.scales[index / groups_per_scale], &self.sub_scales, index);
            let min = self.mins.get(index / groups_per_scale).map(|&min| times(min, &self.sub_mins, index));
            for (out, &code) in out.iter_mut().zip(codes) {
                let product = scale * f32::from(code);
                *out = min.map_or(product, |min| product + min);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_every_width_come_back() {
        for format in QuantFormat::all() {
            let span = i16::from(*format.codes().end()) - i16::from(*format.codes().start()) + 1;
            let code = |i: usize| (i16::from(*format.codes().start()) + (i as i16 * 37).rem_euclid(span)) as i8;
            let codes: [i8; GROUP] = std::array::from_fn(code);
            let (mut bytes, mut read) = (Vec::new(), [0; GROUP]);
            push_codes(format, &codes, &mut bytes);
            assert_eq!(bytes.len(), group_bytes(format.bits));
            read_codes(format, &bytes, &mut read);
            assert_eq!(read, codes, "{format:?}");
        }
    }

    /// The layout that the head of this file promises, spelled out.
    #[test]
    fn four_bits_have_the_first_code_in_the_low_nibble() {
        let format =
            QuantFormat { bits: CodeBits::Four, scaling: Scaling::Single, with_mins: true, book: CodeBook::Linear };
        let codes: [i8; GROUP] = std::array::from_fn(|i| (i % 16) as i8);
        let mut bytes = Vec::new();
        push_codes(format, &codes, &mut bytes);
        assert_eq!(bytes[..4], [0x10, 0x32, 0x54, 0x76]);
        let mut signed = Vec::new();
        push_codes(QuantFormat { with_mins: false, ..format }, &codes.map(|code| code - 8), &mut signed);
        assert_eq!(signed, bytes);
    }
}
