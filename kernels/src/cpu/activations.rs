//! Input rows of matrix products, prepared once and used by every matrix that reads them.
//!
//! f32 always; int8 groups with scales and sums where a quantised matrix will read them. Buffers only grow, so a step
//! after warm-up allocates nothing. Invariant: all buffers hold `num_rows` whole rows of the same input.

use super::task::{QuantGroup, QuantRows};
use crate::pack::GROUP;

/// Input rows of a product; reused between steps.
#[derive(Debug, Default)]
pub struct Activations {
    num_rows: usize,
    cols: usize,
    quantized: bool,
    /// `[num_rows, cols]`
    rows: Vec<f32>,
    /// `[num_rows, cols / 32]`, empty where not asked for.
    groups: Vec<QuantGroup>,
}

/// The mutable halves of [`Activations`], for filling.
pub(crate) struct Filling<'a> {
    pub(crate) rows: &'a mut [f32],
    pub(crate) groups: Option<&'a mut [QuantGroup]>,
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
        &self.rows
    }

    /// Whether quantised matrices can read them.
    pub fn is_quantized(&self) -> bool {
        self.quantized
    }

    /// Takes a shape and gives the buffers of that size, contents left over.
    pub(crate) fn reshape(&mut self, num_rows: usize, cols: usize, quantized: bool) -> Filling<'_> {
        assert!(
            !quantized || cols.is_multiple_of(GROUP),
            "quantised activations need a multiple of {GROUP} columns, got {cols}"
        );
        let groups = if quantized { num_rows * (cols / GROUP) } else { 0 };
        (self.num_rows, self.cols, self.quantized) = (num_rows, cols, quantized);
        self.rows.resize(num_rows * cols, 0.0);
        self.groups.resize(groups, QuantGroup::default());
        Filling { rows: &mut self.rows, groups: quantized.then_some(&mut self.groups[..]) }
    }

    /// The int8 groups; panics where they were not asked for.
    pub(crate) fn quantized_rows(&self) -> QuantRows<'_> {
        assert!(
            self.quantized,
            "a quantised matrix met activations prepared for dense ones: prepare them with quantized"
        );
        QuantRows { groups: self.cols / GROUP, rows: &self.groups }
    }
}
