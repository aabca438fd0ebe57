//! One tensor of an opened model, whatever it is stored in.

use std::ops::Range;

use super::{
    TensorRole, WeightFormat, blocks,
    dummy::Generator,
    grouped::{Grouped, Tile},
    mmap::MappedFile,
    names::TensorKind,
    native::Native,
};
use crate::ModelError;

/// A matrix (rows = outputs, cols = inputs) or vector (rows = 1) in a mapped file, or a made-up one. Shapes are checked
/// when the store opens.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    /// As the file names it.
    pub name: &'a str,
    /// Outputs; 1 for a vector.
    pub rows: usize,
    /// Inputs, or the length of a vector; a multiple of the format's block.
    pub cols: usize,
    /// How the elements are stored.
    pub format: WeightFormat,
    pub(super) kind: TensorKind,
    /// What it does in a model; none for what lies outside of one, as adapters' halves do.
    pub(super) role: Option<TensorRole>,
    pub(super) data: TensorData<'a>,
    /// Which rows (of a vector: elements) of the stored tensor these are.
    pub(super) rows_at: RowsAt,
    /// Inputs of the stored tensor: `cols`, but for a part of a vector.
    pub(super) stored_cols: usize,
    /// Rows (of a vector: elements) come in another order than they are stored in.
    pub(super) halves: Option<Halves>,
}

/// Which rows of a stored tensor a view has: several matrices may lie in one (fused projections, stacked experts). Rows are
/// whole numbers of blocks in every format, so nothing has to be copied to take some of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowsAt {
    /// Row r is row `first + r`.
    From(usize),
    /// Runs of `run` rows, each run `stride` further than the one before.
    Runs { first: usize, run: usize, stride: usize },
}

impl RowsAt {
    /// All of them.
    pub(super) const WHOLE: Self = Self::From(0);

    /// The stored number of row `row`. It grows with `row`.
    pub(crate) fn stored(self, row: usize) -> usize {
        match self {
            Self::From(first) => first + row,
            Self::Runs { first, run, stride } => first + row / run * stride + row % run,
        }
    }
}

/// Heads whose rotated elements are stored as pairs (2 i, 2 i + 1) and handed over as halves (i, i + rotary_dim / 2).
///
/// Where both queries and keys come so, attention is the same: it sees nothing but their dot products.
#[derive(Clone, Copy, Debug)]
pub(super) struct Halves {
    head_dim: usize,
    rotary_dim: usize,
}

impl Halves {
    /// Where what is handed over as number `row` is stored.
    fn stored(self, row: usize) -> usize {
        let (head, i, half) = (row / self.head_dim, row % self.head_dim, self.rotary_dim / 2);
        let stored = match i {
            i if i < half => 2 * i,
            i if i < self.rotary_dim => 2 * (i - half) + 1,
            i => i,
        };
        head * self.head_dim + stored
    }
}

/// Where the elements come from.
#[derive(Clone, Debug)]
pub(super) enum TensorData<'a> {
    /// `range` of `file`: as many bytes as format and shape need.
    Mapped { file: &'a MappedFile, range: Range<usize> },
    /// Made when read, and rounded to the format.
    Generated(Generator),
    /// Codes, scales and zero points, each a tensor of its own.
    Grouped(Grouped<'a>),
    /// The same in our own layout.
    Native(Native<'a>),
}

impl TensorView<'_> {
    /// A query or key projection (or its bias) with each head's rotated pairs as halves; see [`Halves`].
    pub(crate) fn with_halves(self, head_dim: usize, rotary_dim: usize) -> Self {
        Self { halves: Some(Halves { head_dim, rotary_dim }), ..self }
    }

    /// Bytes as stored (for made-up weights: what they would take).
    pub fn num_bytes(&self) -> u64 {
        match &self.data {
            TensorData::Grouped(grouped) => return grouped.num_bytes(self.rows),
            TensorData::Native(native) => return native.num_bytes(self.rows),
            TensorData::Mapped { .. } | TensorData::Generated(_) => {}
        }
        match self.kind {
            TensorKind::Matrix => self.rows as u64 * self.row_bytes() as u64,
            // A share of the stored vector.
            TensorKind::Vector => self.row_bytes() as u64 * self.cols as u64 / self.stored_cols as u64,
        }
    }

    /// Elements.
    pub(super) fn num_elements(&self) -> u64 {
        self.rows as u64 * self.cols as u64
    }

    /// One row dequantised, `out: [cols]`. An error for a row that is not there or another length of `out`.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) -> Result<(), ModelError> {
        if row >= self.rows || out.len() != self.cols {
            return Err(ModelError::Step(format!(
                "row {row} of tensor {:?} was asked for into {} elements; it has {} rows of {}",
                self.name,
                out.len(),
                self.rows,
                self.cols
            )));
        }
        self.read_row(row, &mut Tile::default(), out);
        Ok(())
    }

    /// All of it in f32, `[rows * cols]`: norms, biases, the reference backend. An error where a number is not finite.
    pub fn to_f32(&self) -> Result<Vec<f32>, ModelError> {
        let mut values = Vec::new();
        values
            .try_reserve_exact(self.rows * self.cols)
            .map_err(|_| ModelError::OutOfMemory(format!("no memory for tensor {:?} in f32", self.name)))?;
        values.resize(self.rows * self.cols, 0.0);
        self.check_unchanged()?;
        let mut pages = self.pages(0..self.rows);
        for (row, out) in values.chunks_exact_mut(self.cols).enumerate() {
            pages.reach(row);
            self.read_row(row, &mut pages.tile, out);
            if let Some(value) = out.iter().find(|value| !value.is_finite()) {
                return Err(self.bad(format!("row {} holds {value}; {}", self.stored_place(row), super::MAKE_AGAIN)));
            }
        }
        if let (Some(halves), TensorKind::Vector) = (self.halves, self.kind) {
            return Ok((0..values.len()).map(|i| values[halves.stored(i)]).collect());
        }
        Ok(values)
    }

    /// `row < rows` and `out: [cols]`; `tile` is of this tensor, and empty at first.
    pub(super) fn read_row(&self, row: usize, tile: &mut Tile, out: &mut [f32]) {
        if self.stored_cols != self.cols {
            // Part of a vector: small, and not cut at blocks.
            let mut stored = vec![0.0; self.stored_cols];
            blocks::dequantize(self.format, self.stored_row(row), &mut stored);
            for (i, out) in out.iter_mut().enumerate() {
                *out = stored[self.rows_at.stored(i)];
            }
            return;
        }
        match &self.data {
            TensorData::Mapped { .. } => blocks::dequantize(self.format, self.stored_row(row), out),
            TensorData::Generated(generator) => {
                generator.fill_row(self.stored_place(row), out);
                round_to(self.format, out);
            }
            TensorData::Grouped(grouped) => grouped.read_row(self.stored_place(row), tile, out),
            TensorData::Native(native) => native.read_row(self.stored_place(row), out),
        }
    }

    /// The bytes of a row as stored; empty for made-up weights and those in several tensors.
    pub(super) fn stored_row(&self, row: usize) -> &[u8] {
        match &self.data {
            TensorData::Mapped { file, range } => {
                let (row, row_bytes) = (self.stored_place(row), self.row_bytes());
                &file.bytes()[range.clone()][row * row_bytes..][..row_bytes]
            }
            TensorData::Generated(_) | TensorData::Grouped(_) | TensorData::Native(_) => &[],
        }
    }

    /// The row's number in the file.
    pub(super) fn stored_place(&self, row: usize) -> usize {
        if self.kind == TensorKind::Vector {
            return 0;
        }
        self.rows_at.stored(self.halves.map_or(row, |halves| halves.stored(row)))
    }

    fn row_bytes(&self) -> usize {
        self.stored_cols / self.format.block_elements() * self.format.block_bytes()
    }

    /// An error where the file has changed since it was opened: asked before a tensor is read.
    pub(super) fn check_unchanged(&self) -> Result<(), ModelError> {
        match &self.data {
            TensorData::Mapped { file, .. } => file.check_unchanged(),
            TensorData::Grouped(grouped) => grouped.check_unchanged(),
            TensorData::Native(native) => native.check_unchanged(),
            TensorData::Generated(_) => Ok(()),
        }
    }

    /// These rows will be read now, in ascending order, as they are handed over.
    pub(super) fn pages(&self, rows: Range<usize>) -> Pages<'_> {
        // Within a head the order in the file may be another one.
        let step = self.halves.map_or(1, |halves| halves.head_dim);
        // A vector is one row.
        let rows_at = if self.kind == TensorKind::Vector { RowsAt::WHOLE } else { self.rows_at };
        let mut pages = Pages { source: None, rows_at, step, tile: Tile::default() };
        let walked = match &self.data {
            TensorData::Mapped { file, range } => Some((*file, range, self.row_bytes())),
            // Codes are most of it; the rest is given back at the end.
            TensorData::Native(native) => Some(native.codes_at()),
            TensorData::Generated(_) | TensorData::Grouped(_) => None,
        };
        if let Some((file, range, row_bytes)) = walked {
            let after =
                |row: usize| range.start + row.checked_sub(1).map_or(0, |last| rows_at.stored(last) + 1) * row_bytes;
            let used = range.start + rows_at.stored(rows.start) * row_bytes..after(rows.end);
            pages.source = Some(MappedPages::new(file, range.start, used, after(self.rows), row_bytes));
        }
        pages
    }

    /// An error about this tensor's content.
    pub(crate) fn bad(&self, what: impl std::fmt::Display) -> ModelError {
        let what = format!("tensor {:?}: {what}", self.name);
        match &self.data {
            TensorData::Mapped { file, .. } => ModelError::bad_file(file.path(), what),
            TensorData::Grouped(grouped) => ModelError::bad_file(grouped.file().path(), what),
            TensorData::Native(native) => ModelError::bad_file(native.codes_at().0.path(), what),
            TensorData::Generated(_) => ModelError::BadOption(what),
        }
    }
}

/// Walks along a tensor's pages while it is read: asks for those ahead, gives back those behind, so that a large tensor
/// is never resident whole. The rest is given back when this goes.
pub(super) struct Pages<'a> {
    /// None for made-up weights.
    source: Option<MappedPages<'a>>,
    rows_at: RowsAt,
    /// Rows that may be read in any order among themselves.
    step: usize,
    /// What is unpacked of a matrix whose rows are not stored one by one.
    pub(super) tile: Tile,
}

struct MappedPages<'a> {
    file: &'a MappedFile,
    row_bytes: usize,
    /// Where the stored row 0 begins, and the last one that anybody will read ends.
    tensor: Range<usize>,
    /// Of the rows to be read, not yet given back.
    kept: Range<usize>,
}

/// Bytes between two steps of that walk: large enough for the disk, small beside a model.
const WINDOW: usize = 8 << 20;

impl Pages<'_> {
    /// Row `row` is read next.
    pub(super) fn reach(&mut self, row: usize) {
        if let Some(pages) = &mut self.source {
            pages.reach(self.rows_at.stored(row / self.step * self.step));
        }
    }
}

impl<'a> MappedPages<'a> {
    /// Rows begin at `start`; those in `used` will be read now, those up to `end` next.
    fn new(file: &'a MappedFile, start: usize, used: Range<usize>, end: usize, row_bytes: usize) -> Self {
        file.prefetch(&(used.start..end.min(used.start + 2 * WINDOW)));
        Self { file, row_bytes, tensor: start..end, kept: used }
    }

    fn reach(&mut self, row: usize) {
        let here = self.tensor.start + row * self.row_bytes;
        if here >= self.kept.start + WINDOW {
            self.file.release(&(self.kept.start..here));
            let end = self.tensor.end;
            self.file.prefetch(&((here + WINDOW).min(end)..(here + 2 * WINDOW).min(end)));
            self.kept.start = here;
        }
    }
}

impl Drop for MappedPages<'_> {
    fn drop(&mut self) {
        self.file.release(&self.kept);
    }
}

fn round_to(format: WeightFormat, values: &mut [f32]) {
    match format {
        WeightFormat::F16 => values.iter_mut().for_each(|x| *x = half::f16::from_f32(*x).to_f32()),
        WeightFormat::Bf16 => values.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32()),
        _ => {}
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests; clippy only knows a plain cfg(test)")]
    use super::*;

    /// The kernel's own account of how much of a mapped file is resident.
    fn resident_bytes(path: &std::path::Path) -> usize {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|line| !line.ends_with(path.to_str().unwrap()));
        lines.next().unwrap();
        let resident = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
        resident.trim().trim_end_matches(" kB").trim().parse::<usize>().unwrap() * 1024
    }

    #[test]
    fn a_large_tensor_is_never_resident_whole() {
        const ROW: usize = 1 << 20;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("large");
        std::fs::write(&path, vec![1; 64 * ROW]).unwrap();
        let file = MappedFile::open(&path).unwrap();
        let mut pages = MappedPages::new(&file, ROW, ROW..64 * ROW, 64 * ROW, ROW);
        let mut largest = 0;
        for row in 0..63 {
            pages.reach(row);
            let bytes = &file.bytes()[ROW + row * ROW..][..ROW];
            assert_eq!(bytes.iter().map(|&byte| byte as usize).sum::<usize>(), ROW);
            largest = largest.max(resident_bytes(&path));
        }
        // The window in use, a row more, and what the system maps around a fault.
        assert!((WINDOW..=WINDOW + 3 * ROW).contains(&largest), "{largest}");
        drop(pages);
        assert!(resident_bytes(&path) < ROW);
    }
}
