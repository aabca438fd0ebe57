//! The first half of a gated MLP in one region: gate and up projections, activation, and the next product's activations.
//!
//! It knows products by their tiles and the activation by its kernel. The products stay in the caches: a piece computes
//! some outputs of both for some rows into memory of its own, joins them and hands on what the next product reads, so the
//! wide hidden rows are never written out in f32. Invariant: groups of 32 outputs are never divided between pieces.

use std::cell::RefCell;
use std::ops::Range;

use super::Cpu;
use super::activations::{Activations, Form, Inputs};
use super::low_rank::Addends;
use super::matmul::even_parts;
use super::pool::{SharedMut, share_of};
use super::task::{ActivationsOut, GatedTask, Output};
use crate::matrix::Matrix;
use crate::quant_format::GROUP;

/// Rows that a piece computes at a time.
const BLOCK_ROWS: usize = 128;
/// Products of one projection that a piece keeps at a time: two of them and the weights' tile should fit the second-level
/// cache. As many columns as rows read least of weights and activations for what they compute: all rows of a long prompt by few
/// columns at a time took a third longer where 4,096 inputs a row lie beyond that cache.
const SCRATCH_ELEMENTS: usize = BLOCK_ROWS * BLOCK_ROWS;

thread_local! {
    /// Products of both projections, kept between calls.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Activation functions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// x / (1 + exp(-x)).
    Silu,
    /// x * Phi(x), Phi the normal distribution's.
    Gelu,
    /// Its approximation by tanh.
    GeluTanh,
    /// x / (1 + exp(-1.702 x)) of an x that is cut off above `limit`; what it multiplies is cut off below and above, and has
    /// one added (Phi-3-small).
    Gegelu {
        /// Above zero.
        limit: f32,
    },
}

/// A matrix and what is added to its products.
#[derive(Clone, Copy, Debug)]
pub struct Projection<'a> {
    /// `[outputs, inputs]`
    pub weights: &'a Matrix,
    /// `[outputs]`
    pub bias: Option<&'a [f32]>,
}

/// The first half of an MLP: `activation(gate(x)) * up(x)`, or `activation(gate(x))` where there is no up projection.
#[derive(Clone, Copy, Debug)]
pub struct GatedProduct<'a> {
    /// What the activation is a function of.
    pub gate: Projection<'a>,
    /// Of as many outputs as the gate.
    pub up: Option<Projection<'a>>,
    /// The function.
    pub activation: Activation,
}

/// What a call is about, checked.
pub(super) struct Call<'a> {
    /// What the gate reads.
    pub(super) x: Inputs<'a>,
    /// What the up projection reads: the same rows.
    pub(super) up_x: Inputs<'a>,
    pub(super) product: GatedProduct<'a>,
    /// Of the gate and of the up projection.
    pub(super) addends: Option<Addends<'a, 2>>,
    pub(super) out: ActivationsOut,
}

impl GatedProduct<'_> {
    /// Multiply-adds for one row.
    pub(super) fn macs(&self) -> usize {
        let num_matrices = 1 + usize::from(self.up.is_some());
        num_matrices * self.gate.weights.rows() * self.gate.weights.cols()
    }
}

impl Cpu {
    /// The product as activations of `gate.rows()` columns in a form. int8 groups need `gate.rows()` to be a multiple of 32.
    /// Addends, of the gate and of the up projection, come before the activation.
    pub fn gated_matmul(
        &self,
        x: &Activations,
        product: &GatedProduct<'_>,
        addends: Option<Addends<'_, 2>>,
        form: Form,
        out: &mut Activations,
    ) {
        let m = x.num_rows();
        self.check_gated(&x.inputs(), product);
        let cols = product.gate.weights.rows();
        if let Some(addends) = &addends {
            (0..2).for_each(|product| addends.check(product, cols));
        }
        let out = out.reshape(m, cols, form, self.kernels.columns);
        if m == 0 {
            return;
        }
        let groups = cols.div_ceil(GROUP);
        let num_pieces = self.pieces_for(m * product.macs()).min(groups.max(1));
        let gate = product.gate.weights;
        self.with_inputs(&x.inputs(), [gate, product.up.map_or(gate, |up| up.weights)], |[x, up_x]| {
            let call = Call { x, up_x, product: *product, addends, out };
            self.run_beside(call.addends.as_ref(), num_pieces, |piece| {
                self.gated_groups(&call, share_of(groups, num_pieces, piece));
            });
        });
    }

    /// Panics where the matrices do not fit the activations, each other, their biases or the instruction set.
    pub(super) fn check_gated(&self, x: &Inputs<'_>, product: &GatedProduct<'_>) {
        let cols = product.gate.weights.rows();
        for Projection { weights, bias } in [Some(product.gate), product.up].into_iter().flatten() {
            self.check(x, weights);
            assert_eq!(weights.rows(), cols, "a gate of {cols} outputs meets an up projection of {}", weights.rows());
            if let Some(bias) = bias {
                assert_eq!(bias.len(), cols, "a bias of {} for {cols} outputs", bias.len());
            }
        }
    }

    /// Some groups of outputs, as many rows and groups at a time as the scratch has room for.
    pub(super) fn gated_groups(&self, call: &Call<'_>, groups: Range<usize>) {
        let panels = call.x.panels();
        let row_block = (BLOCK_ROWS / panels.panel_rows).max(1);
        SCRATCH.with_borrow_mut(|scratch| {
            for block in even_parts(0..panels.num_panels(), row_block) {
                let rows = panels.rows_of_all(&block);
                let step = (SCRATCH_ELEMENTS / GROUP / rows.len()).max(1);
                for first in groups.clone().step_by(step) {
                    let cols = first * GROUP..((first + step).min(groups.end) * GROUP).min(call.out.cols);
                    let stride = cols.len().next_multiple_of(GROUP);
                    let len = rows.len() * stride;
                    // What is left over in it is beyond the last output.
                    scratch.resize(scratch.len().max(2 * len).max(2 * SCRATCH_ELEMENTS), 0.0);
                    let (gate, up) = scratch[..2 * len].split_at_mut(len);
                    let piece = Piece { panels: block.clone(), rows: rows.clone(), cols: cols.clone(), stride };
                    let GatedProduct { gate: gate_weights, up: up_weights, activation } = &call.product;
                    self.columns(call, (0, &call.x, gate_weights), &piece, gate);
                    let up = up_weights.as_ref().map(|weights| {
                        self.columns(call, (1, &call.up_x, weights), &piece, up);
                        &*up
                    });
                    let (activation, out) = (*activation, &call.out);
                    let task = GatedTask { gate, up, activation, stride, m: rows.clone(), cols, out };
                    // SAFETY: the table fits the machine; the outputs of these groups are this piece's.
                    unsafe { (self.kernels.gated)(&task) };
                }
            }
        });
    }

    /// A piece of a projection, which is the call's first or second and reads `x`.
    fn columns(
        &self,
        call: &Call<'_>,
        (number, x, projection): (usize, &Inputs<'_>, &Projection<'_>),
        piece: &Piece,
        out: &mut [f32],
    ) {
        let Piece { panels, rows, cols, stride } = piece;
        let Projection { weights, bias } = *projection;
        let tile_rows = self.tile_rows(weights);
        let tiles = cols.start / tile_rows..cols.end.div_ceil(tile_rows);
        let elements = SharedMut::new(out);
        let (stride, first_m, accumulate) = (*stride, rows.start, false);
        let out = Output { elements, stride, first_m, rows: cols.clone(), bias, accumulate };
        self.tiles(x, weights, tiles, panels.clone(), &out);
        if let Some(addends) = &call.addends {
            addends.add(self, number, rows, cols, &out);
        }
    }
}

/// What of both products lies in the scratch at a time.
struct Piece {
    panels: Range<usize>,
    /// Theirs.
    rows: Range<usize>,
    /// Outputs, from a multiple of 32 on.
    cols: Range<usize>,
    stride: usize,
}
