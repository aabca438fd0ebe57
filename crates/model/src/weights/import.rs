//! Stored tensors to the packed matrices of the `cpu` backend.
//!
//! Quantised sources keep their codes, scales and minimums exactly, in as many bits as the file spends on codes and with
//! scales as compact as there. Dense sources become the dtype asked for, or are quantised. Rows pass through one at a time
//! a thread; the only copy of the whole is the packed one. It must not know which layer a tensor belongs to. Its invariant: a
//! matrix that is returned holds finite numbers only.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use bindery_kernels::{Cpu, Dense, DenseElement, Matrix, QuantFormat, QuantRow, Quantized};
use half::{bf16, f16};

use super::{
    TensorView, WeightFormat, blocks,
    names::TensorKind,
    native::RowBuffers,
    quantize::{self, Effort, RowQuantizer},
    view::{Pages, TensorData},
};
use crate::{Dtype, ModelError, Quantize};

const TOO_LARGE: &str = "holds values too large for f16 scales, so it cannot be quantised";

/// What a tensor becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// Codes and scales as stored.
    Keep(QuantFormat),
    F32,
    F16,
    Bf16,
    /// Quantised now.
    Quantize(QuantFormat),
}

impl TensorView<'_> {
    /// Packed for the `cpu` backend. Norms and biases become f32. Quantised stays quantised as stored: whoever made the
    /// file chose its bits tensor by tensor, and rounding twice loses more than rounding once. Dense becomes `quantize`
    /// (see [`TensorView::is_quantized_by`]), or `dtype` (Auto: as stored). Source pages are released as it goes.
    ///
    /// Errors name the tensor: a scale or element that is not finite, a value too large for
    /// the target, a file that changed.
    pub fn import(&self, cpu: &Cpu, dtype: Dtype, quantize: Quantize) -> Result<Matrix, ModelError> {
        self.import_as(cpu, self.target(dtype, quantize))
    }

    /// Dense f32, whatever it is stored as.
    pub fn import_f32(&self, cpu: &Cpu) -> Result<Matrix, ModelError> {
        self.import_as(cpu, Target::F32)
    }

    fn import_as(&self, cpu: &Cpu, target: Target) -> Result<Matrix, ModelError> {
        self.check_unchanged()?;
        match target {
            Target::Keep(format) => self.keep(cpu, format),
            Target::F32 => self.dense(cpu, |value| value, "f32").map(Matrix::F32),
            Target::F16 => self.dense(cpu, f16::from_f32, "f16; use bf16 or f32").map(Matrix::F16),
            Target::Bf16 => self.dense(cpu, bf16::from_f32, "bf16; use f32").map(Matrix::Bf16),
            Target::Quantize(format) => {
                let effort = match self.data {
                    TensorData::Mapped { .. } | TensorData::Grouped(_) | TensorData::Native(_) => Effort::Search,
                    TensorData::Generated(_) => Effort::Plain,
                };
                self.quantized(cpu, &RowQuantizer::new(format, None, effort))
            }
        }
        .inspect(|_| self.release())
        .map_err(|what| self.bad(what))
    }

    /// Pages of a matrix in several tensors; what lies row by row has given its own back on the way.
    pub(super) fn release(&self) {
        match &self.data {
            TensorData::Grouped(grouped) => grouped.release(),
            TensorData::Native(native) => native.release(),
            TensorData::Mapped { .. } | TensorData::Generated(_) => {}
        }
    }

    /// What keeps it as it is stored. None for dense tensors, and for codes that no kernel computes as they are: those of
    /// inputs ordered by activation, of groups that 32 does not divide, of eight bits around other zero points than the
    /// middle. They are unpacked as if they were f16.
    fn stored_quant_format(&self) -> Option<QuantFormat> {
        match &self.data {
            TensorData::Grouped(grouped) => grouped.quant_format(),
            TensorData::Native(native) => Some(native.quant_format()),
            TensorData::Mapped { .. } | TensorData::Generated(_) => self.format.quant_format(),
        }
    }

    /// Whether import quantises it: a dense matrix whose inputs are a multiple of 32, if anything is to be quantised.
    pub fn is_quantized_by(&self, quantize: Quantize) -> bool {
        self.quantized_by(quantize).is_some()
    }

    /// What import quantises it to, if it does.
    pub(super) fn quantized_by(&self, quantize: Quantize) -> Option<QuantFormat> {
        if self.kind != TensorKind::Matrix || self.stored_quant_format().is_some() {
            return None;
        }
        quantize::format_for(self.role, self.cols, quantize)
    }

    fn target(&self, dtype: Dtype, quantize: Quantize) -> Target {
        if self.kind == TensorKind::Vector {
            return Target::F32;
        }
        match (self.stored_quant_format(), self.quantized_by(quantize)) {
            (Some(stored), _) => Target::Keep(stored),
            (None, Some(format)) => Target::Quantize(format),
            (None, None) => match (dtype, self.format) {
                (Dtype::F32, _) | (Dtype::Auto, WeightFormat::F32) => Target::F32,
                (Dtype::Bf16, _) | (Dtype::Auto, WeightFormat::Bf16) => Target::Bf16,
                (Dtype::F16 | Dtype::Auto, _) => Target::F16,
            },
        }
    }

    fn keep(&self, cpu: &Cpu, format: QuantFormat) -> Result<Matrix, String> {
        let problem = Problem::default();
        let packed = Quantized::pack_parallel(cpu, self.rows, self.cols, format, |rows| {
            let mut pages = self.pages(rows);
            let problem = &problem;
            move |row, mut out| {
                pages.reach(row);
                match &self.data {
                    TensorData::Grouped(grouped) => {
                        grouped.unpack_row(self.stored_place(row), &mut pages.tile, out.codes, out.scales);
                    }
                    TensorData::Native(native) => native.unpack_row(self.stored_place(row), &mut out),
                    TensorData::Mapped { .. } | TensorData::Generated(_) => {
                        blocks::unpack(self.format, self.stored_row(row), &mut out);
                    }
                }
                problem.check_scales(row, out.scales, out.mins);
            }
        });
        problem.or(packed).map(Matrix::Quantized)
    }

    /// `narrow` rounds to what is kept; an element that becomes infinite is too large for it, and `limit` says for what.
    fn dense<E: DenseElement>(
        &self,
        cpu: &Cpu,
        narrow: impl Fn(f32) -> E + Sync,
        limit: &str,
    ) -> Result<Dense<E>, String> {
        let problem = Problem::default();
        let packed = Dense::pack_parallel(cpu, self.rows, self.cols, |rows| {
            let mut values = self.values(rows, &problem);
            let (problem, narrow) = (&problem, &narrow);
            move |row, out: &mut [E]| {
                for (out, &value) in out.iter_mut().zip(values.read(row)) {
                    *out = narrow(value);
                    if out.to_f32().is_infinite() {
                        problem.note(row, || format!("holds {value}, too large for {limit}"));
                    }
                }
            }
        });
        problem.or(packed)
    }

    fn quantized(&self, cpu: &Cpu, quantizer: &RowQuantizer) -> Result<Matrix, String> {
        let problem = Problem::default();
        let packed = Quantized::pack_parallel(cpu, self.rows, self.cols, quantizer.format, |rows| {
            let mut values = self.values(rows, &problem);
            let problem = &problem;
            move |row, mut out: QuantRow<'_>| {
                if quantizer.quantize(values.read(row), &mut out).is_none() {
                    problem.note(row, || TOO_LARGE.to_owned());
                }
            }
        });
        problem.or(packed).map(Matrix::Quantized)
    }

    /// The same rows unpacked: `each` is handed the source's values and what became of them.
    pub(super) fn quantize_rows(
        &self,
        rows: Range<usize>,
        quantizer: &RowQuantizer,
        mut each: impl FnMut(&[f32], &RowBuffers),
    ) -> Result<(), ModelError> {
        self.check_unchanged()?;
        let problem = Problem::default();
        let mut values = self.values(rows.clone(), &problem);
        let mut buffers = RowBuffers::new(quantizer.format, self.cols);
        for row in rows {
            let values = values.read(row);
            if quantizer.quantize(values, &mut buffers.as_row()).is_none() {
                problem.note(row, || TOO_LARGE.to_owned());
            }
            each(values, &buffers);
        }
        drop(values);
        problem.or(()).map_err(|what| self.bad(what))
    }

    /// Reads these rows one by one, ascending.
    fn values<'a>(&'a self, rows: Range<usize>, problem: &'a Problem) -> Values<'a> {
        Values { view: self, pages: self.pages(rows), row: vec![0.0; self.cols], problem }
    }
}

/// Rows on their way through one thread, in f32.
struct Values<'a> {
    view: &'a TensorView<'a>,
    pages: Pages<'a>,
    row: Vec<f32>,
    problem: &'a Problem,
}

impl Values<'_> {
    /// A row, checked: what is not finite is noted.
    fn read(&mut self, row: usize) -> &[f32] {
        self.pages.reach(row);
        self.view.read_row(row, &mut self.pages.tile, &mut self.row);
        self.problem.check_values(row, &self.row);
        &self.row
    }
}

/// What is wrong with the first row that has something wrong, while rows pass through on several threads.
#[derive(Default)]
struct Problem(Mutex<Option<(usize, String)>>);

impl Problem {
    fn note(&self, row: usize, what: impl FnOnce() -> String) {
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if first.as_ref().is_none_or(|&(known, _)| row < known) {
            *first = Some((row, what()));
        }
    }

    fn check_values(&self, row: usize, values: &[f32]) {
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            self.note(row, || format!("holds {value}"));
        }
    }

    fn check_scales(&self, row: usize, scales: &[f16], mins: &[f16]) {
        if let Some(scale) = scales.iter().chain(mins).find(|scale| !scale.is_finite()) {
            self.note(row, || format!("has a scale or minimum of {scale}"));
        }
    }

    fn or<T>(self, value: T) -> Result<T, String> {
        match self.0.into_inner().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(value),
            Some((row, what)) => Err(format!("row {row} {what}")),
        }
    }
}
