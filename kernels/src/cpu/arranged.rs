//! Activations for the matrices that want them otherwise than they come: in an order of their own, or filled up to whole
//! groups of 32.
//!
//! Whoever prepares activations knows nothing of this: such a matrix counts as a reader of f32 rows ([`Form::of`]), and its
//! product makes int8 groups from those, once for all of a call's matrices that want the same. It must not know how weights
//! lie. Invariant: where no matrix of a call wants it, nothing is done and nothing touched.
//!
//! [`Form::of`]: super::activations::Form::of

use std::cell::RefCell;

use super::Cpu;
use super::activations::{Activations, Form, Inputs};
use super::rows::{MIN_PIECE_ELEMENTS, with_row};
use super::task::ActivationsOut;
use crate::matrix::Matrix;
use crate::order::InputOrder;
use crate::quant_format::GROUP;

thread_local! {
    /// What is made for the matrices of a call, kept between calls.
    static ARRANGED: RefCell<Vec<Activations>> = const { RefCell::new(Vec::new()) };
}

/// How a matrix wants a row before it becomes int8 groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrangement<'a> {
    /// None where the last group is filled up with zeros alone.
    pub(crate) order: Option<&'a InputOrder>,
}

impl Cpu {
    /// Calls `body` with what each of the matrices reads, which have `x`'s columns.
    pub(super) fn with_inputs<const N: usize>(
        &self,
        x: &Inputs<'_>,
        matrices: [&Matrix; N],
        body: impl for<'x> FnOnce([Inputs<'x>; N]),
    ) {
        let wanted = matrices.map(Matrix::arrangement);
        if wanted.iter().all(Option::is_none) {
            return body([*x; N]);
        }
        ARRANGED.with_borrow_mut(|arranged| {
            if arranged.len() < N {
                arranged.resize_with(N, Activations::default);
            }
            // The first of those that want the same makes it.
            let maker = |at: usize| (0..at).find(|&other| wanted[other] == wanted[at]).unwrap_or(at);
            for (at, wanted) in wanted.iter().enumerate() {
                if let Some(wanted) = *wanted
                    && maker(at) == at
                {
                    self.arrange(x, wanted, &mut arranged[at]);
                }
            }
            body(std::array::from_fn(|at| if wanted[at].is_some() { arranged[maker(at)].inputs() } else { *x }));
        });
    }

    fn arrange(&self, x: &Inputs<'_>, wanted: Arrangement<'_>, out: &mut Activations) {
        let (m, k) = (x.num_rows(), x.cols());
        let out = self.room_for_arranged(m, k, out);
        self.split(m, MIN_PIECE_ELEMENTS.div_ceil(k.max(1)), |piece| {
            for row in piece {
                self.arrange_row(&x.rows()[row * k..(row + 1) * k], wanted, row, &out);
            }
        });
    }

    /// Room for arranged rows of `k` inputs.
    pub(super) fn room_for_arranged(&self, num_rows: usize, k: usize, out: &mut Activations) -> ActivationsOut {
        out.reshape(num_rows, k.next_multiple_of(GROUP), Form::Int8, self.kernels.columns)
    }

    /// One row, which belongs to the calling task, as row number `row` of `out`.
    pub(super) fn arrange_row(&self, x: &[f32], wanted: Arrangement<'_>, row: usize, out: &ActivationsOut) {
        with_row(out.cols, |arranged| {
            let (inputs, filling) = arranged.split_at_mut(x.len());
            match wanted.order {
                None => inputs.copy_from_slice(x),
                Some(order) => {
                    for (place, &input) in inputs.iter_mut().zip(order.places()) {
                        *place = x[input as usize];
                    }
                }
            }
            filling.fill(0.0);
            self.quantize(arranged, row, out);
        });
    }
}
