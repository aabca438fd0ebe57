//! Input rows of matrix products, prepared once and used by every matrix that reads them.
//!
//! f32 always; int8 groups with scales and sums where a quantised matrix will read them. Buffers only grow, and what lies
//! beyond the rows at hand is left as it is: a step after warm-up allocates nothing, and nothing is cleared that is written
//! next. Invariant: all buffers hold at least `num_rows` whole rows of the same input.

use super::task::{Panels, QuantGroup, QuantRows};
use crate::pack::GROUP;

/// Input rows of a product; reused between steps.
#[derive(Debug, Default)]
pub struct Activations {
    num_rows: usize,
    cols: usize,
    quantized: bool,
    panels: Panels,
    /// `[num_rows, cols]`, and more.
    rows: Vec<f32>,
    /// As `panels` says, and more; left over where not asked for.
    groups: Vec<QuantGroup>,
}

/// The mutable halves of [`Activations`], for filling.
pub(crate) struct Filling<'a> {
    pub(crate) rows: &'a mut [f32],
    pub(crate) groups: Option<(Panels, &'a mut [QuantGroup])>,
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

    /// The rows in f32, `[num_rows, cols]`.
    pub fn rows(&self) -> &[f32] {
        &self.rows[..self.num_rows * self.cols]
    }

    /// Whether quantised matrices can read them.
    pub fn is_quantized(&self) -> bool {
        self.quantized
    }

    /// Takes a shape and gives the buffers of that size, contents left over. Panels have `panel_rows` at most.
    pub(crate) fn reshape(
        &mut self,
        num_rows: usize,
        cols: usize,
        quantized: bool,
        panel_rows: usize,
    ) -> Filling<'_> {
        assert!(
            !quantized || cols.is_multiple_of(GROUP),
            "quantised activations need a multiple of {GROUP} columns, got {cols}"
        );
        let (num_elements, num_groups) = (num_rows * cols, if quantized { num_rows * (cols / GROUP) } else { 0 });
        let panels = Panels::new(num_rows, cols / GROUP, panel_rows);
        (self.num_rows, self.cols, self.quantized, self.panels) = (num_rows, cols, quantized, panels);
        self.rows.resize(self.rows.len().max(num_elements), 0.0);
        self.groups.resize(self.groups.len().max(num_groups), QuantGroup::default());
        let groups = quantized.then_some((panels, &mut self.groups[..num_groups]));
        Filling { rows: &mut self.rows[..num_elements], groups }
    }

    /// The int8 groups; panics where they were not asked for.
    pub(crate) fn quantized_rows(&self) -> QuantRows<'_> {
        assert!(
            self.quantized,
            "a quantised matrix met activations prepared for dense ones: prepare them with quantized"
        );
        QuantRows { panels: self.panels, elements: &self.groups[..self.num_rows * self.panels.groups] }
    }
}
