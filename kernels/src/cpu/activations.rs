//! Input rows of matrix products, prepared once and used by every matrix that reads them.
//!
//! f32, int8 groups with scales and sums, or both, as the matrices that will read them want. Buffers only grow, and what
//! lies beyond the rows at hand is left as it is: a step after warm-up allocates nothing, and nothing is cleared that is
//! written next. Invariant: the buffers of the form at hand hold at least `num_rows` whole rows of the same input, and those of int8
//! groups [`SPARE_GROUPS`] more, which are read with the last panel.

use std::ops::Range;

use super::pool::SharedMut;
use super::task::{ActivationsOut, GroupCodes, GroupScales, Panels, QuantRows, QuantRowsMut, SPARE_GROUPS};
use crate::matrix::Matrix;
use crate::memory::make_room;
use crate::quant_format::GROUP;

/// What a row of activations is kept as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// For dense matrices, and for quantised ones that take their inputs in an order of their own.
    #[default]
    F32,
    /// For quantised ones: int8 groups. Rows are a multiple of 32 then.
    Int8,
    /// For both.
    Both,
}

impl Form {
    /// What these matrices read.
    pub fn of<'a>(matrices: impl IntoIterator<Item = &'a Matrix>) -> Self {
        let (mut dense, mut quantized) = (false, false);
        for matrix in matrices {
            *if matrix.reads_int8() { &mut quantized } else { &mut dense } = true;
        }
        match (dense, quantized) {
            (true, true) => Self::Both,
            (false, true) => Self::Int8,
            _ => Self::F32,
        }
    }

    /// Whether there are f32 rows.
    pub fn has_f32(self) -> bool {
        self != Self::Int8
    }

    /// Whether there are int8 groups.
    pub fn has_int8(self) -> bool {
        self != Self::F32
    }
}

/// Input rows of a product; reused between steps.
#[derive(Debug, Default)]
pub struct Activations {
    num_rows: usize,
    cols: usize,
    form: Form,
    panels: Panels,
    /// `[num_rows, cols]`, and more; left over where not asked for.
    rows: Vec<f32>,
    /// As `panels` says, and spare ones; left over where not asked for.
    codes: Vec<GroupCodes>,
    /// Likewise.
    scales: Vec<GroupScales>,
}

impl Activations {
    /// Rows held.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The rows in f32, `[num_rows, cols]`; panics where they are kept in int8 alone.
    pub fn rows(&self) -> &[f32] {
        self.inputs().rows()
    }

    /// What the rows are kept as.
    pub fn form(&self) -> Form {
        self.form
    }

    /// Takes a shape and gives the buffers of that size, contents left over. Panels have `panel_rows` at most.
    pub(crate) fn reshape(&mut self, num_rows: usize, cols: usize, form: Form, panel_rows: usize) -> ActivationsOut {
        assert!(
            !form.has_int8() || cols.is_multiple_of(GROUP),
            "quantised activations need a multiple of {GROUP} columns, got {cols}"
        );
        let num_elements = if form.has_f32() { num_rows * cols } else { 0 };
        let num_groups = if form.has_int8() { num_rows * (cols / GROUP) } else { 0 };
        let panels = Panels::new(num_rows, cols / GROUP, panel_rows);
        (self.num_rows, self.cols, self.form, self.panels) = (num_rows, cols, form, panels);
        grow(&mut self.rows, num_elements);
        if form.has_int8() {
            grow(&mut self.codes, num_groups + SPARE_GROUPS);
            grow(&mut self.scales, num_groups + SPARE_GROUPS);
        }
        ActivationsOut {
            cols,
            rows: form.has_f32().then(|| SharedMut::new(&mut self.rows[..num_elements])),
            groups: form.has_int8().then(|| QuantRowsMut {
                panels,
                codes: SharedMut::new(&mut self.codes[..num_groups]),
                scales: SharedMut::new(&mut self.scales[..num_groups]),
            }),
        }
    }

    /// All rows, as products read them.
    pub(crate) fn inputs(&self) -> Inputs<'_> {
        self.part(0..self.num_rows, self.panels)
    }

    /// Some rows that were written by themselves, see [`ActivationsOut::segment`].
    pub(crate) fn segment(&self, rows: Range<usize>, panel_rows: usize) -> Inputs<'_> {
        let panels = Panels::new(rows.len(), self.cols / GROUP, panel_rows);
        self.part(rows, panels)
    }

    /// Some rows, whose groups lie as `panels` says.
    fn part(&self, rows: Range<usize>, panels: Panels) -> Inputs<'_> {
        let Self { cols, form, .. } = *self;
        let groups = rows.start * panels.groups..rows.end * panels.groups + SPARE_GROUPS;
        let (codes, scales): (&[_], &[_]) =
            if form.has_int8() { (&self.codes[groups.clone()], &self.scales[groups]) } else { (&[], &[]) };
        let num_rows = rows.len();
        let rows = if form.has_f32() { &self.rows[rows.start * cols..rows.end * cols] } else { &[] };
        Inputs { num_rows, cols, form, rows, groups: QuantRows { panels, codes, scales } }
    }
}

/// [`make_room`], which where there is no memory ends as every list does.
fn grow<T: Copy + Default>(room: &mut Vec<T>, len: usize) {
    if make_room(room, len).is_err() {
        room.resize(len, T::default());
    }
}

/// Input rows as products read them: all of some [`Activations`], or a part that was written by itself.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(super) num_rows: usize,
    pub(super) cols: usize,
    pub(super) form: Form,
    pub(super) rows: &'a [f32],
    pub(super) groups: QuantRows<'a>,
}

impl<'a> Inputs<'a> {
    pub(crate) fn num_rows(&self) -> usize {
        self.num_rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// How rows are shared out over panels, whatever their form.
    pub(crate) fn panels(&self) -> Panels {
        self.groups.panels
    }

    /// `[num_rows, cols]`; panics where they are kept in int8 alone.
    pub(crate) fn rows(&self) -> &'a [f32] {
        assert!(self.form.has_f32(), "activations in int8 alone met a dense matrix: prepare them as Form::Both");
        self.rows
    }

    /// The int8 groups; panics where they were not asked for.
    pub(crate) fn quantized_rows(&self) -> QuantRows<'a> {
        assert!(
            self.form.has_int8(),
            "a quantised matrix met activations in f32 alone: prepare them as Form::Int8 or Form::Both"
        );
        self.groups
    }
}
