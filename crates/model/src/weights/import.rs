//! Stored tensors to the packed matrices of the `cpu` backend.
//!
//! Quantised sources keep their codes and scales where a family of the kernels can hold them exactly (Q4_0 and Q4_1 as
//! W4; Q5_0, Q5_1 and Q8_0 as W8); what it cannot hold is refused by name. Dense sources become the dtype asked for, or are
//! quantised. One row at a time passes through; the only copy of the whole is the packed one. It must not know which
//! layer a tensor belongs to. Its invariant: a matrix that is returned holds finite numbers only.

use bindery_kernels::{Isa, Matrix, PackedW4, PackedW8, RowW4, RowW8};
use half::{bf16, f16};

use super::{
    TensorView, WeightFormat,
    blocks::{five_bits, half_at, nibbles},
    names::TensorKind,
    quantize::{self, Effort, GROUP},
    view::{Pages, TensorData},
};
use crate::{Dtype, ModelError, Quantize};

/// What the `cpu` backend computes.
const COMPUTED: &[WeightFormat] = &[
    WeightFormat::F32,
    WeightFormat::F16,
    WeightFormat::Bf16,
    WeightFormat::Q4_0,
    WeightFormat::Q4_1,
    WeightFormat::Q5_0,
    WeightFormat::Q5_1,
    WeightFormat::Q8_0,
];

/// What a tensor becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// Codes and scales as stored, in the four-bit family.
    KeepW4 {
        mins: bool,
    },
    /// Codes and scales as stored, in the eight-bit family.
    KeepW8 {
        mins: bool,
    },
    F32,
    F16,
    Bf16,
    /// Quantised now.
    Int8,
    Int4,
}

impl TensorView<'_> {
    /// Packed for the `cpu` backend. Norms and biases become f32. Quantised stays quantised as stored, except that
    /// `Quantize::Int4` takes eight-bit sources down too. Dense becomes `quantize`, or `dtype` (Auto: as stored); a dense
    /// matrix whose inputs are not a multiple of 32 is not quantised. Source pages are released as it goes.
    ///
    /// Errors name the tensor: a format without kernels, a scale or element that is not finite, a value too large for
    /// the target, a file that changed.
    pub fn import(&self, isa: Isa, dtype: Dtype, quantize: Quantize) -> Result<Matrix, ModelError> {
        let target = self.target(dtype, quantize)?;
        let pages = self.start_reading()?;
        match target {
            Target::KeepW4 { mins } => self.keep_w4(isa, mins, pages),
            Target::KeepW8 { mins } => self.keep_w8(isa, mins, pages),
            Target::F32 => self.dense_f32(isa, pages),
            Target::F16 => self.dense_f16(isa, pages),
            Target::Bf16 => self.dense_bf16(isa, pages),
            Target::Int8 => self.quantized_int8(isa, pages),
            Target::Int4 => self.quantized_int4(isa, pages),
        }
        .map_err(|what| self.bad(what))
    }

    fn target(&self, dtype: Dtype, quantize: Quantize) -> Result<Target, ModelError> {
        if self.kind == TensorKind::Vector {
            return Ok(Target::F32);
        }
        let divides = self.cols.is_multiple_of(GROUP);
        match (self.format, quantize) {
            (WeightFormat::Q5_0 | WeightFormat::Q5_1 | WeightFormat::Q8_0, Quantize::Int4) => Ok(Target::Int4),
            (WeightFormat::Q4_0, _) => Ok(Target::KeepW4 { mins: false }),
            (WeightFormat::Q4_1, _) => Ok(Target::KeepW4 { mins: true }),
            (WeightFormat::Q5_0 | WeightFormat::Q8_0, _) => Ok(Target::KeepW8 { mins: false }),
            (WeightFormat::Q5_1, _) => Ok(Target::KeepW8 { mins: true }),
            (format, Quantize::Int8) if format.is_dense() && divides => Ok(Target::Int8),
            (format, Quantize::Int4) if format.is_dense() && divides => Ok(Target::Int4),
            (format, _) if format.is_dense() => Ok(match (dtype, format) {
                (Dtype::F32, _) | (Dtype::Auto, WeightFormat::F32) => Target::F32,
                (Dtype::F16, _) | (Dtype::Auto, WeightFormat::F16) => Target::F16,
                (Dtype::Bf16 | Dtype::Auto, _) => Target::Bf16,
            }),
            (format, _) => Err(ModelError::Unsupported(format!(
                "tensor {:?} is stored as {format}, which the cpu backend does not compute yet; it computes {}",
                self.name,
                WeightFormat::list(COMPUTED)
            ))),
        }
    }

    fn keep_w4(&self, isa: Isa, mins: bool, mut pages: Pages<'_>) -> Result<Matrix, String> {
        let mut problem = Problem::default();
        let packed = PackedW4::pack(isa, self.rows, self.cols, mins, |row, out| {
            pages.reach(row);
            let stored = self.stored_row(row);
            if mins {
                unpack_q4_1(stored, &mut *out.codes, &mut *out.scales, &mut *out.mins);
            } else {
                unpack_q4_0(stored, &mut *out.codes, &mut *out.scales);
            }
            problem.check_scales(row, out.scales, out.mins);
        });
        problem.or(Matrix::W4(packed))
    }

    fn keep_w8(&self, isa: Isa, mins: bool, mut pages: Pages<'_>) -> Result<Matrix, String> {
        let mut problem = Problem::default();
        let packed = PackedW8::pack(isa, self.rows, self.cols, mins, |row, out| {
            pages.reach(row);
            let stored = self.stored_row(row);
            match self.format {
                WeightFormat::Q5_0 => unpack_q5_0(stored, &mut *out.codes, &mut *out.scales),
                WeightFormat::Q5_1 => unpack_q5_1(stored, &mut *out.codes, &mut *out.scales, &mut *out.mins),
                _ => unpack_q8_0(stored, &mut *out.codes, &mut *out.scales),
            }
            problem.check_scales(row, out.scales, out.mins);
        });
        problem.or(Matrix::W8(packed))
    }

    fn dense_f32(&self, isa: Isa, mut pages: Pages<'_>) -> Result<Matrix, String> {
        let mut problem = Problem::default();
        let matrix = Matrix::pack_f32(isa, self.rows, self.cols, |row, out| {
            pages.reach(row);
            self.read_row(row, out);
            problem.check_values(row, out);
        });
        problem.or(matrix)
    }

    fn dense_f16(&self, isa: Isa, mut pages: Pages<'_>) -> Result<Matrix, String> {
        let mut problem = Problem::default();
        let mut values = vec![0.0; self.cols];
        let matrix = Matrix::pack_f16(isa, self.rows, self.cols, |row, out| {
            pages.reach(row);
            self.read_row(row, &mut values);
            problem.check_values(row, &values);
            for (out, &value) in out.iter_mut().zip(&values) {
                *out = f16::from_f32(value);
                if out.is_infinite() {
                    problem.note(|| format!("row {row} holds {value}, too large for f16; use bf16 or f32"));
                }
            }
        });
        problem.or(matrix)
    }

    fn dense_bf16(&self, isa: Isa, mut pages: Pages<'_>) -> Result<Matrix, String> {
        let mut problem = Problem::default();
        let mut values = vec![0.0; self.cols];
        let matrix = Matrix::pack_bf16(isa, self.rows, self.cols, |row, out| {
            pages.reach(row);
            self.read_row(row, &mut values);
            problem.check_values(row, &values);
            for (out, &value) in out.iter_mut().zip(&values) {
                *out = bf16::from_f32(value);
                if out.is_infinite() {
                    problem.note(|| format!("row {row} holds {value}, too large for bf16; use f32"));
                }
            }
        });
        problem.or(matrix)
    }

    fn quantized_int8(&self, isa: Isa, mut pages: Pages<'_>) -> Result<Matrix, String> {
        let mut problem = Problem::default();
        let mut values = vec![0.0; self.cols];
        let packed = PackedW8::pack(isa, self.rows, self.cols, false, |row, out: RowW8<'_>| {
            pages.reach(row);
            self.read_row(row, &mut values);
            problem.check_values(row, &values);
            let codes = out.codes.as_chunks_mut::<GROUP>().0;
            for ((group, codes), scale) in values.as_chunks::<GROUP>().0.iter().zip(codes).zip(out.scales) {
                match quantize::int8(group, codes) {
                    Some(found) => *scale = found,
                    None => problem.note_too_large(row),
                }
            }
        });
        problem.or(Matrix::W8(packed))
    }

    fn quantized_int4(&self, isa: Isa, mut pages: Pages<'_>) -> Result<Matrix, String> {
        let effort = match self.data {
            TensorData::Mapped { .. } => Effort::Search,
            TensorData::Generated(_) => Effort::Plain,
        };
        let mut problem = Problem::default();
        let mut values = vec![0.0; self.cols];
        let packed = PackedW4::pack(isa, self.rows, self.cols, true, |row, out: RowW4<'_>| {
            pages.reach(row);
            self.read_row(row, &mut values);
            problem.check_values(row, &values);
            let codes = out.codes.as_chunks_mut::<GROUP>().0;
            let lines = out.scales.iter_mut().zip(out.mins);
            for ((group, codes), (scale, min)) in values.as_chunks::<GROUP>().0.iter().zip(codes).zip(lines) {
                match quantize::int4(group, codes, effort) {
                    Some(found) => (*scale, *min) = found,
                    None => problem.note_too_large(row),
                }
            }
        });
        problem.or(Matrix::W4(packed))
    }
}

/// The first thing found wrong while rows pass through.
#[derive(Default)]
struct Problem(Option<String>);

impl Problem {
    fn note(&mut self, what: impl FnOnce() -> String) {
        if self.0.is_none() {
            self.0 = Some(what());
        }
    }

    fn note_too_large(&mut self, row: usize) {
        self.note(|| format!("row {row} holds values too large for f16 scales, so it cannot be quantised"));
    }

    fn check_values(&mut self, row: usize, values: &[f32]) {
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            self.note(|| format!("row {row} holds {value}"));
        }
    }

    fn check_scales(&mut self, row: usize, scales: &[f16], mins: &[f16]) {
        if let Some(scale) = scales.iter().chain(mins).find(|scale| !scale.is_finite()) {
            self.note(|| format!("row {row} has a scale or minimum of {scale}"));
        }
    }

    fn or<T>(self, value: T) -> Result<T, String> {
        match self.0 {
            None => Ok(value),
            Some(problem) => Err(problem),
        }
    }
}

// Rows as stored to neutral codes; the block layouts are drawn in `blocks`.

fn unpack_q4_0(stored: &[u8], codes: &mut [u8], scales: &mut [f16]) {
    for ((block, codes), scale) in stored.as_chunks::<18>().0.iter().zip(codes.chunks_exact_mut(GROUP)).zip(scales) {
        *scale = half_at(block, 0);
        nibbles(&block[2..], codes);
    }
}

fn unpack_q4_1(stored: &[u8], codes: &mut [u8], scales: &mut [f16], mins: &mut [f16]) {
    let lines = scales.iter_mut().zip(mins);
    for ((block, codes), (scale, min)) in
        stored.as_chunks::<20>().0.iter().zip(codes.chunks_exact_mut(GROUP)).zip(lines)
    {
        (*scale, *min) = (half_at(block, 0), half_at(block, 2));
        nibbles(&block[4..], codes);
    }
}

fn unpack_q5_0(stored: &[u8], codes: &mut [i8], scales: &mut [f16]) {
    for ((block, codes), scale) in stored.as_chunks::<22>().0.iter().zip(codes.chunks_exact_mut(GROUP)).zip(scales) {
        *scale = half_at(block, 0);
        let mut raw = [0; GROUP];
        five_bits(&block[2..6], &block[6..], &mut raw);
        for (code, raw) in codes.iter_mut().zip(raw) {
            *code = raw as i8 - 16;
        }
    }
}

fn unpack_q5_1(stored: &[u8], codes: &mut [i8], scales: &mut [f16], mins: &mut [f16]) {
    let lines = scales.iter_mut().zip(mins);
    for ((block, codes), (scale, min)) in
        stored.as_chunks::<24>().0.iter().zip(codes.chunks_exact_mut(GROUP)).zip(lines)
    {
        (*scale, *min) = (half_at(block, 0), half_at(block, 2));
        let mut raw = [0; GROUP];
        five_bits(&block[4..8], &block[8..], &mut raw);
        for (code, raw) in codes.iter_mut().zip(raw) {
            *code = raw as i8;
        }
    }
}

fn unpack_q8_0(stored: &[u8], codes: &mut [i8], scales: &mut [f16]) {
    for ((block, codes), scale) in stored.as_chunks::<34>().0.iter().zip(codes.chunks_exact_mut(GROUP)).zip(scales) {
        *scale = half_at(block, 0);
        for (code, &byte) in codes.iter_mut().zip(&block[2..]) {
            *code = byte as i8;
        }
    }
}
