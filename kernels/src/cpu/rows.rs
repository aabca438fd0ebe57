//! Operations on rows: preparation of activations, RMS norm, gated activation.
//!
//! Invariant: every row is computed by one thread, by a function of that row alone.

use super::Cpu;
use super::activations::{Activations, Filling};
use super::pool::SharedMut;
use super::task::GroupsMut;

/// Elements that are worth waking another thread for.
const MIN_PIECE_ELEMENTS: usize = 8 * 1024;

impl Cpu {
    /// Takes rows `x: [m, k]` as activations; `quantized` adds the int8 groups that quantised matrices read (k is then
    /// a multiple of 32).
    ///
    /// A group's scale is max|x| / 127 and its codes round to nearest, ties to even. A group whose maximum is below
    /// 2^-100 counts as zero; one that holds NaN or infinity gets the scale NaN, so that the row's results say so.
    pub fn prepare(&self, x: &[f32], m: usize, k: usize, quantized: bool, out: &mut Activations) {
        assert_eq!(x.len(), m * k, "{m} rows of {k} from a buffer of {}", x.len());
        self.fill(m, k, out.reshape(m, k, quantized, self.kernels.columns), |row, out| out.copy_from_slice(&x[row * k..(row + 1) * k]));
    }

    /// RMS norm straight into activations: `x / sqrt(mean(x^2) + eps) * weight`, with x: `[m, weight.len()]`. (A
    /// family's "+ 1" is in the weight already.)
    pub fn rms_norm(&self, x: &[f32], m: usize, weight: &[f32], eps: f32, quantized: bool, out: &mut Activations) {
        let k = weight.len();
        assert_eq!(x.len(), m * k, "{m} rows of {k} from a buffer of {}", x.len());
        self.fill(m, k, out.reshape(m, k, quantized, self.kernels.columns), |row, out| {
            // SAFETY: the table fits the machine; the three slices have `k` elements.
            unsafe { (self.kernels.rms_norm)(&x[row * k..(row + 1) * k], weight, eps, out) };
        });
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

    /// `out = silu(gate) * up`, elementwise, with silu(x) = x / (1 + exp(-x)).
    pub fn silu_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(gate.len() == up.len() && up.len() == out.len(), "gate, up and out differ in length");
        let len = out.len();
        let out = SharedMut::new(out);
        self.split(len, MIN_PIECE_ELEMENTS, |piece| {
            // SAFETY: pieces are disjoint.
            let out = unsafe { out.slice(piece.clone()) };
            // SAFETY: the table fits the machine; the three slices have the piece's length.
            unsafe { (self.kernels.silu_mul)(&gate[piece.clone()], &up[piece], out) };
        });
    }

    /// `silu(gate) * up` straight into activations; gate and up: `[m, k]`.
    pub fn silu_mul_into(&self, gate: &[f32], up: &[f32], m: usize, k: usize, quantized: bool, out: &mut Activations) {
        assert!(gate.len() == m * k && up.len() == m * k, "{m} rows of {k} from {} and {}", gate.len(), up.len());
        self.fill(m, k, out.reshape(m, k, quantized, self.kernels.columns), |row, out| {
            let elements = row * k..(row + 1) * k;
            // SAFETY: the table fits the machine; the three slices have `k` elements.
            unsafe { (self.kernels.silu_mul)(&gate[elements.clone()], &up[elements], out) };
        });
    }

    /// Writes every f32 row by `write(row, out)` and quantises it where that was asked for.
    fn fill(&self, m: usize, k: usize, filling: Filling<'_>, write: impl Fn(usize, &mut [f32]) + Sync) {
        let rows = SharedMut::new(filling.rows);
        let quantized = filling.groups.map(|(panels, groups)| (panels, SharedMut::new(groups)));
        self.split(m, MIN_PIECE_ELEMENTS.div_ceil(k.max(1)), |piece| {
            for row in piece {
                // SAFETY: pieces have disjoint rows.
                let out = unsafe { rows.slice(row * k..(row + 1) * k) };
                write(row, out);
                let Some((panels, elements)) = &quantized else { continue };
                let (first, stride) = panels.place(row);
                // SAFETY: the table fits the machine; pieces have disjoint rows.
                unsafe { (self.kernels.quantize)(out, &GroupsMut { elements, first, stride }) };
            }
        });
    }
}
