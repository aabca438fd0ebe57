//! Operations on rows: preparation of activations, RMS norm.
//!
//! Invariant: every row is computed by one thread, by a function of that row alone.

use std::cell::RefCell;

use super::Cpu;
use super::activations::{Activations, Form};
use super::pool::SharedMut;
use super::task::ActivationsOut;

/// Elements that are worth waking another thread for.
const MIN_PIECE_ELEMENTS: usize = 8 * 1024;

thread_local! {
    /// A row that is wanted in int8 alone, before it is.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
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

    /// RMS norm straight into activations: `x / sqrt(mean(x^2) + eps) * weight`, with x: `[m, weight.len()]`. (A
    /// family's "+ 1" is in the weight already.)
    pub fn rms_norm(&self, x: &[f32], m: usize, weight: &[f32], eps: f32, form: Form, out: &mut Activations) {
        let k = weight.len();
        assert_eq!(x.len(), m * k, "{m} rows of {k} from a buffer of {}", x.len());
        let out = out.reshape(m, k, form, self.kernels.columns);
        self.split(m, MIN_PIECE_ELEMENTS.div_ceil(k.max(1)), |piece| {
            ROW.with_borrow_mut(|scratch| {
                scratch.resize(scratch.len().max(k), 0.0);
                for row in piece {
                    let normed = match &out.rows {
                        // SAFETY: pieces have disjoint rows.
                        Some(rows) => unsafe { rows.slice(row * k..(row + 1) * k) },
                        None => &mut scratch[..k],
                    };
                    // SAFETY: the table fits the machine; the three slices have `k` elements.
                    unsafe { (self.kernels.rms_norm)(&x[row * k..(row + 1) * k], weight, eps, normed) };
                    self.quantize(normed, row, &out);
                }
            });
        });
    }

    /// A row's int8 groups, where they are wanted. The row belongs to the calling task.
    fn quantize(&self, x: &[f32], row: usize, out: &ActivationsOut) {
        if let Some(groups) = out.groups_of(row, 0) {
            // SAFETY: the table fits the machine; every row is one task's.
            unsafe { (self.kernels.quantize)(x, &groups) };
        }
    }

    /// RMS norm of rows in place, for norms that no product follows at once (query and key heads, the final state).
    pub fn rms_norm_in_place(&self, x: &mut [f32], weight: &[f32], eps: f32) {
        let k = weight.len();
        assert!(k > 0 && x.len().is_multiple_of(k), "rows of {k} in a buffer of {}", x.len());
        let rows = x.len() / k;
        let x = SharedMut::new(x);
        self.split(rows, MIN_PIECE_ELEMENTS.div_ceil(k), |piece| {
            let mut input = vec![0.0; k];
            for row in piece {
                // SAFETY: pieces have disjoint rows.
                let out = unsafe { x.slice(row * k..(row + 1) * k) };
                input.copy_from_slice(out);
                // SAFETY: the table fits the machine; the three slices have `k` elements.
                unsafe { (self.kernels.rms_norm)(&input, weight, eps, out) };
            }
        });
    }
}
