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

use bindery_kernels::{
    CodeBits, Cpu, Dense, DenseElement, InputOrder, Isa, Matrix, QuantFormat, QuantRow, Quantized, Scaling,
};
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

/// What a tensor is held as in memory, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum HeldAs {
    /// Codes and scales, or dense elements, as in the file.
    Stored,
    /// The file's codes less their zero points, with a scale for every 32.
    Codes {
        /// Of a code.
        bits: u8,
    },
    /// Dense, 4 bytes an element.
    F32,
    /// Dense, 2 bytes.
    F16,
    /// Dense, 2 bytes.
    Bf16,
    /// Quantised at load.
    Int8,
    /// Quantised at load.
    Int4,
}

impl TensorView<'_> {
    /// What [`TensorView::import`] would make of it for `isa`, and the bytes of that, without reading it.
    pub(crate) fn imported(&self, isa: Isa, dtype: Dtype, quantize: Quantize) -> (HeldAs, u64) {
        let (rows, cols) = (self.rows, self.cols);
        let quantized = |format| Quantized::packed_bytes(isa, rows, cols, format);
        let (held, bytes) = match self.target(dtype, quantize) {
            Target::Keep(format) => {
                let codes = HeldAs::Codes { bits: format.bits.count() as u8 };
                let is_native = matches!(self.data, TensorData::Native(_));
                let as_stored = is_native || self.format.quant_format() == Some(format);
                let held = if as_stored { HeldAs::Stored } else { codes };
                (held, quantized(format) + self.stored_order().map_or(0, |order| size_of_val(order.places())))
            }
            Target::F32 => (self.dense_as(WeightFormat::F32, HeldAs::F32), Dense::<f32>::packed_bytes(rows, cols)),
            Target::F16 => (self.dense_as(WeightFormat::F16, HeldAs::F16), Dense::<f16>::packed_bytes(rows, cols)),
            Target::Bf16 => (self.dense_as(WeightFormat::Bf16, HeldAs::Bf16), Dense::<bf16>::packed_bytes(rows, cols)),
            Target::Quantize(format) => {
                let held = if format.bits == CodeBits::Eight { HeldAs::Int8 } else { HeldAs::Int4 };
                (held, quantized(format))
            }
        };
        (held, bytes as u64)
    }

    /// Likewise for [`TensorView::import_f32`].
    pub(crate) fn imported_f32(&self) -> (HeldAs, u64) {
        let bytes = Dense::<f32>::packed_bytes(self.rows, self.cols);
        (self.dense_as(WeightFormat::F32, HeldAs::F32), bytes as u64)
    }

    /// Likewise for [`TensorView::to_f32`].
    pub(crate) fn widened(&self) -> (HeldAs, u64) {
        let bytes = self.rows as u64 * self.cols as u64 * size_of::<f32>() as u64;
        (self.dense_as(WeightFormat::F32, HeldAs::F32), bytes)
    }

    fn dense_as(&self, format: WeightFormat, held: HeldAs) -> HeldAs {
        if self.format == format { HeldAs::Stored } else { held }
    }

    /// Whether it is multiplied with, or added.
    pub(crate) fn is_matrix(&self) -> bool {
        self.kind == TensorKind::Matrix
    }

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
    /// groups that 32 does not divide, or of different sizes. They are unpacked as if they were f16.
    fn stored_quant_format(&self) -> Option<QuantFormat> {
        match &self.data {
            TensorData::Grouped(grouped) => grouped.exact().map(|exact| exact.format),
            TensorData::Native(native) => Some(native.quant_format()),
            TensorData::Mapped { .. } | TensorData::Generated(_) => self.format.quant_format(),
        }
    }

    /// The order in which its columns stand for inputs, where that is not theirs.
    fn stored_order(&self) -> Option<&InputOrder> {
        match &self.data {
            TensorData::Grouped(grouped) => grouped.exact()?.order.as_ref(),
            TensorData::Mapped { .. } | TensorData::Generated(_) | TensorData::Native(_) => None,
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
        quantize::format_for(self.role?, self.cols, quantize)
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

    fn keep(&self, cpu: &Cpu, format: QuantFormat) -> Result<Matrix, ModelError> {
        let problem = Problem::default();
        let packed = Quantized::pack_parallel(cpu, self.rows, self.cols, format, |rows| {
            let mut pages = self.pages(rows);
            let problem = &problem;
            move |row, mut out| {
                pages.reach(row);
                match &self.data {
                    TensorData::Grouped(grouped) => {
                        let exact = grouped.exact().expect("what is kept has a format");
                        grouped.unpack_row(self.stored_place(row), &mut pages.tile, exact, &mut out);
                    }
                    TensorData::Native(native) => native.unpack_row(self.stored_place(row), &mut out),
                    TensorData::Mapped { .. } | TensorData::Generated(_) => {
                        blocks::unpack(self.format, self.stored_row(row), &mut out);
                    }
                }
                problem.check_scales(row, out.scales, out.mins);
                if format.scaling == Scaling::Exponents {
                    problem.check_exponents(row, out.sub_scales);
                }
            }
        });
        let packed = problem.or(self, packed)?;
        Ok(Matrix::Quantized(match self.stored_order() {
            None => packed,
            Some(order) => packed.with_order(order.clone()),
        }))
    }

    /// `narrow` rounds to what is kept; an element that becomes infinite is too large for it, and `limit` says for what.
    fn dense<E: DenseElement>(
        &self,
        cpu: &Cpu,
        narrow: impl Fn(f32) -> E + Sync,
        limit: &str,
    ) -> Result<Dense<E>, ModelError> {
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
        problem.or(self, packed)
    }

    fn quantized(&self, cpu: &Cpu, quantizer: &RowQuantizer) -> Result<Matrix, ModelError> {
        let problem = Problem::default();
        let sums = Mutex::new([0.0; 2]);
        let packed = Quantized::pack_parallel(cpu, self.rows, self.cols, quantizer.format, |rows| {
            let mut values = self.values(rows, &problem);
            let (problem, sums) = (&problem, &sums);
            move |row, mut out: QuantRow<'_>| {
                let values = values.read(row);
                if quantizer.quantize(values, &mut out).is_none() {
                    problem.note(row, || TOO_LARGE.to_owned());
                }
                let (lost, all) = (lost_squares(values, out.scales), squares(values));
                let mut sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
                *sums = [sums[0] + lost, sums[1] + all];
            }
        });
        let packed = problem.or(self, packed)?;
        let [lost, all] = sums.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.check_lost(lost, all)?;
        Ok(Matrix::Quantized(packed))
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
        problem.or(self, ())
    }

    /// An error where scales of 0 cost too much of all squares; of the whole matrix, since some rows may be next to nothing.
    pub(super) fn check_lost(&self, lost: f64, all: f64) -> Result<(), ModelError> {
        if lost <= MOST_LOST * all {
            return Ok(());
        }
        Err(ModelError::Unsupported(format!(
            "tensor {:?} holds weights too small for f16 scales, which would become 0 ({:.1} % of it by squares), so it cannot be \
             quantised; serve it as it is stored",
            self.name,
            100.0 * lost / all
        )))
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

    fn check_exponents(&self, row: usize, exponents: &[i8]) {
        let mut bytes = exponents.iter().map(|exponent| exponent.cast_unsigned());
        if let Some(byte) = bytes.find(|&byte| byte > Scaling::MAX_EXPONENT) {
            self.note(row, || format!("has a scale of byte {byte}, of which {} is the largest", Scaling::MAX_EXPONENT));
        }
    }

    fn or<T>(self, view: &TensorView<'_>, value: T) -> Result<T, ModelError> {
        match self.0.into_inner().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(value),
            Some((row, what)) => Err(view.bad(format!("row {row} {what}; {}", super::MAKE_AGAIN))),
        }
    }
}

/// Share of a matrix' squares that scales of 0 may cost. Rows of tokens that no training ever met are often next to nothing, and
/// may well become nothing; int4 costs half a percent anyway.
const MOST_LOST: f64 = 1e-3;

/// Squares of a row's weights that its scales make 0: f16 has none for groups whose largest weight is below some 4e-6.
pub(super) fn lost_squares(values: &[f32], scales: &[f16]) -> f64 {
    let spans = values.chunks(values.len() / scales.len().max(1)).zip(scales);
    spans.filter(|(_, scale)| **scale == f16::ZERO).map(|(values, _)| squares(values)).sum()
}

/// In sixteen sums, or each would wait for the one before.
fn squares(values: &[f32]) -> f64 {
    let (whole, rest) = values.as_chunks::<16>();
    let mut sums = [0.0f32; 16];
    for chunk in whole {
        sums.iter_mut().zip(chunk).for_each(|(sum, value)| *sum += value * value);
    }
    sums.iter().copied().chain(rest.iter().map(|value| value * value)).map(f64::from).sum()
}
