//! Stored tensors to the packed matrices of the `cpu` backend.
//!
//! Quantised sources keep their codes, scales and minimums exactly, in as many bits as the file spends on codes and with
//! scales as compact as there. Dense sources become the dtype asked for, or are quantised. One row at a time passes through; the only copy of the whole is the packed one. It must not know which
//! layer a tensor belongs to. Its invariant: a matrix that is returned holds finite numbers only.

use bindery_kernels::{CodeBits, Isa, Matrix, QuantFormat, Quantized, Scaling};
use half::{bf16, f16};

use super::{
    TensorView, WeightFormat, blocks,
    names::TensorKind,
    quantize::{self, Effort, GROUP},
    view::{Pages, TensorData},
};
use crate::{Dtype, ModelError, Quantize};

/// What `Quantize::Int4` makes.
const INT4: QuantFormat = QuantFormat { bits: CodeBits::Four, scaling: Scaling::Single, with_mins: true };
/// What `Quantize::Int8` makes.
const INT8: QuantFormat = QuantFormat { bits: CodeBits::Eight, scaling: Scaling::Single, with_mins: false };

/// What a tensor becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// Codes and scales as stored.
    Keep(QuantFormat),
    F32,
    F16,
    Bf16,
    /// Quantised now.
    Int8,
    Int4,
}

impl TensorView<'_> {
    /// Packed for the `cpu` backend. Norms and biases become f32. Quantised stays quantised as stored: whoever made the
    /// file chose its bits tensor by tensor, and rounding twice loses more than rounding once. Dense becomes `quantize`
    /// (see [`TensorView::is_quantized_by`]), or `dtype` (Auto: as stored). Source pages are released as it goes.
    ///
    /// Errors name the tensor: a scale or element that is not finite, a value too large for
    /// the target, a file that changed.
    pub fn import(&self, isa: Isa, dtype: Dtype, quantize: Quantize) -> Result<Matrix, ModelError> {
        let target = self.target(dtype, quantize);
        let pages = self.start_reading()?;
        match target {
            Target::Keep(format) => self.keep(isa, format, pages),
            Target::F32 => self.dense_f32(isa, pages),
            Target::F16 => self.dense_f16(isa, pages),
            Target::Bf16 => self.dense_bf16(isa, pages),
            Target::Int8 => self.quantized_int8(isa, pages),
            Target::Int4 => self.quantized_int4(isa, pages),
        }
        .map_err(|what| self.bad(what))
    }

    /// Whether import quantises it: a dense matrix whose inputs are a multiple of 32, if anything is to be quantised.
    pub fn is_quantized_by(&self, quantize: Quantize) -> bool {
        let can_be = self.kind == TensorKind::Matrix && self.format.is_dense() && self.cols.is_multiple_of(GROUP);
        can_be && quantize != Quantize::None
    }

    fn target(&self, dtype: Dtype, quantize: Quantize) -> Target {
        if self.kind == TensorKind::Vector {
            return Target::F32;
        }
        match (self.format.quant_format(), quantize) {
            (Some(stored), _) => Target::Keep(stored),
            (None, Quantize::Int8) if self.is_quantized_by(quantize) => Target::Int8,
            (None, Quantize::Int4) if self.is_quantized_by(quantize) => Target::Int4,
            (None, _) => match (dtype, self.format) {
                (Dtype::F32, _) | (Dtype::Auto, WeightFormat::F32) => Target::F32,
                (Dtype::F16, _) | (Dtype::Auto, WeightFormat::F16) => Target::F16,
                (Dtype::Bf16 | Dtype::Auto, _) => Target::Bf16,
            },
        }
    }

    fn keep(&self, isa: Isa, format: QuantFormat, mut pages: Pages<'_>) -> Result<Matrix, String> {
        let mut problem = Problem::default();
        let packed = Quantized::pack(isa, self.rows, self.cols, format, |row, mut out| {
            pages.reach(row);
            blocks::unpack(self.format, self.stored_row(row), &mut out);
            problem.check_scales(row, out.scales, out.mins);
        });
        problem.or(Matrix::Quantized(packed))
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
        let packed = Quantized::pack(isa, self.rows, self.cols, INT8, |row, out| {
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
        problem.or(Matrix::Quantized(packed))
    }

    fn quantized_int4(&self, isa: Isa, mut pages: Pages<'_>) -> Result<Matrix, String> {
        let effort = match self.data {
            TensorData::Mapped { .. } => Effort::Search,
            TensorData::Generated(_) => Effort::Plain,
        };
        let mut problem = Problem::default();
        let mut values = vec![0.0; self.cols];
        let packed = Quantized::pack(isa, self.rows, self.cols, INT4, |row, out| {
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
        problem.or(Matrix::Quantized(packed))
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
