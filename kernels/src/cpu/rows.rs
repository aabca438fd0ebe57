//! Operations on rows: preparation of activations, norms, sums.
//!
//! Invariant: every row is computed by one thread, by a function of that row alone.

use std::cell::RefCell;

use super::Cpu;
use super::activations::{Activations, Form};
use super::pool::SharedMut;
use super::task::ActivationsOut;

/// Elements that are worth waking another thread for.
pub(super) const MIN_PIECE_ELEMENTS: usize = 8 * 1024;

thread_local! {
    /// A row on its way from one kernel to another.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// A norm over the elements of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Norm<'a> {
    /// `x / sqrt(mean(x^2) + eps) * weight`.
    Rms {
        /// One an element.
        weight: &'a [f32],
        /// Added to the mean square.
        eps: f32,
    },
    /// `(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`.
    Layer(LayerNorm<'a>),
}

/// What a layer norm multiplies with and adds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerNorm<'a> {
    /// One an element.
    pub weight: &'a [f32],
    /// One an element.
    pub bias: &'a [f32],
    /// Added to the variance.
    pub eps: f32,
}

impl Norm<'_> {
    /// Elements of a row.
    fn width(&self) -> usize {
        match self {
            Self::Rms { weight, .. } => weight.len(),
            Self::Layer(norm) => norm.weight.len(),
        }
    }

    fn fits(&self, len: usize) -> bool {
        match self {
            Self::Rms { weight, .. } => weight.len() == len,
            Self::Layer(norm) => norm.weight.len() == len && norm.bias.len() == len,
        }
    }
}

impl Cpu {
    /// Takes rows `x: [m, k]` as activations in a form; int8 groups, which quantised matrices read, need a k that is a
    /// multiple of 32.
    ///
    /// A group's scale is max|x| / 127 and its codes round to nearest, ties to even. A group whose maximum is below
    /// 2^-100 counts as zero; one that holds NaN or infinity gets the scale NaN, so that the row's results say so.
    pub fn prepare(&self, x: &[f32], m: usize, k: usize, form: Form, out: &mut Activations) {
        assert_eq!(x.len(), m * k, "{m} rows of {k} from a buffer of {}", x.len());
        let out = out.reshape(m, k, form, self.kernels.columns);
        self.split(m, MIN_PIECE_ELEMENTS.div_ceil(k.max(1)), |piece| {
            for row in piece {
                let x = &x[row * k..(row + 1) * k];
                if let Some(rows) = &out.rows {
                    // SAFETY: pieces have disjoint rows.
                    unsafe { rows.slice(row * k..(row + 1) * k) }.copy_from_slice(x);
                }
                self.quantize(x, row, &out);
            }
        });
    }

    /// A norm straight into activations, x: `[m, norm's width]`. (A family's "+ 1" is in the weight already.)
    pub fn norm(&self, x: &[f32], m: usize, norm: &Norm<'_>, form: Form, out: &mut Activations) {
        let k = norm.width();
        assert_eq!(x.len(), m * k, "{m} rows of {k} from a buffer of {}", x.len());
        let out = out.reshape(m, k, form, self.kernels.columns);
        self.split(m, MIN_PIECE_ELEMENTS.div_ceil(k.max(1)), |piece| {
            with_row(k, |scratch| {
                for row in piece {
                    let normed = match &out.rows {
                        // SAFETY: pieces have disjoint rows.
                        Some(rows) => unsafe { rows.slice(row * k..(row + 1) * k) },
                        None => &mut *scratch,
                    };
                    self.norm_row(&x[row * k..(row + 1) * k], norm, normed);
                    self.quantize(normed, row, &out);
                }
            });
        });
    }

    /// Norm of rows in place, for norms that no product follows at once (query and key heads).
    pub fn norm_in_place(&self, x: &mut [f32], norm: &Norm<'_>) {
        let k = norm.width();
        assert!(k > 0 && x.len().is_multiple_of(k), "rows of {k} in a buffer of {}", x.len());
        let rows = x.len() / k;
        let x = SharedMut::new(x);
        self.split(rows, MIN_PIECE_ELEMENTS.div_ceil(k), |piece| {
            with_row(k, |input| {
                for row in piece {
                    // SAFETY: pieces have disjoint rows.
                    let out = unsafe { x.slice(row * k..(row + 1) * k) };
                    input.copy_from_slice(out);
                    self.norm_row(input, norm, out);
                }
            });
        });
    }

    /// `into += norm(x)`, rows of the norm's width: what a sandwich of norms does with a branch.
    pub fn norm_add(&self, x: &[f32], norm: &Norm<'_>, into: &mut [f32]) {
        let k = norm.width();
        assert!(k > 0 && x.len().is_multiple_of(k), "rows of {k} in a buffer of {}", x.len());
        assert_eq!(x.len(), into.len(), "rows are added to a buffer of another length");
        let (rows, into) = (x.len() / k, SharedMut::new(into));
        self.split(rows, MIN_PIECE_ELEMENTS.div_ceil(k), |piece| {
            with_row(k, |normed| {
                for row in piece {
                    self.norm_row(&x[row * k..(row + 1) * k], norm, normed);
                    // SAFETY: pieces have disjoint rows.
                    self.add_scaled(unsafe { into.slice(row * k..(row + 1) * k) }, normed, 1.0);
                }
            });
        });
    }

    /// Adds each row times its factor: `into[i] += factors[i] * x[i]`, with `x, into: [factors.len(), k]`.
    pub fn add_scaled_rows(&self, x: &[f32], factors: &[f32], into: &mut [f32]) {
        let k = x.len() / factors.len().max(1);
        assert_eq!(x.len(), factors.len() * k, "{} rows in a buffer of {}", factors.len(), x.len());
        assert_eq!(x.len(), into.len(), "rows are added to a buffer of another length");
        let into = SharedMut::new(into);
        self.split(factors.len(), MIN_PIECE_ELEMENTS.div_ceil(k.max(1)), |piece| {
            for row in piece {
                // SAFETY: pieces have disjoint rows.
                self.add_scaled(
                    unsafe { into.slice(row * k..(row + 1) * k) },
                    &x[row * k..(row + 1) * k],
                    factors[row],
                );
            }
        });
    }

    /// `into += factor * x`, each element fused.
    pub(super) fn add_scaled(&self, into: &mut [f32], x: &[f32], factor: f32) {
        assert_eq!(into.len(), x.len(), "a row of {} is added to one of {}", x.len(), into.len());
        // SAFETY: the table fits the machine; both rows have one length.
        unsafe { (self.kernels.add_scaled)(into, x, factor) };
    }

    fn norm_row(&self, x: &[f32], norm: &Norm<'_>, out: &mut [f32]) {
        assert!(x.len() == out.len() && norm.fits(x.len()), "row, norm and output differ in length");
        // SAFETY: the table fits the machine; all slices have one length.
        unsafe {
            match norm {
                Norm::Rms { weight, eps } => (self.kernels.rms_norm)(x, weight, *eps, out),
                Norm::Layer(norm) => (self.kernels.layer_norm)(x, norm, out),
            }
        }
    }

    /// A row's int8 groups, where they are wanted. The row belongs to the calling task.
    pub(super) fn quantize(&self, x: &[f32], row: usize, out: &ActivationsOut) {
        if let Some(groups) = out.groups_of(row, 0) {
            // SAFETY: the table fits the machine; every row is one task's.
            unsafe { (self.kernels.quantize)(x, &groups) };
        }
    }
}

/// A row of memory that the thread keeps between calls, contents left over.
pub(super) fn with_row(len: usize, body: impl FnOnce(&mut [f32])) {
    ROW.with_borrow_mut(|scratch| {
        scratch.resize(scratch.len().max(len), 0.0);
        body(&mut scratch[..len]);
    });
}
