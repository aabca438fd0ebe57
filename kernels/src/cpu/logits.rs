//! What is done to logits, a model's or a router's: scaled, capped, made probabilities. (Sampling is the engine's.)
//!
//! Knows nothing of tokens or experts. Invariant: results depend on the row alone.

use super::Cpu;
use super::pool::SharedMut;

/// Elements summed in f32 before the sum goes on in f64: keeps the error of a 256k-entry row at some 1e-6.
const SUM_CHUNK: usize = 1024;
/// Elements that are worth waking another thread for.
const MIN_PIECE_ELEMENTS: usize = 8 * 1024;

impl Cpu {
    /// The largest logit, NaN aside; -inf where there is none.
    pub fn max(&self, row: &[f32]) -> f32 {
        // SAFETY: the table fits the machine.
        unsafe { (self.kernels.max)(row) }
    }

    /// Probabilities in place. A row of only -inf becomes NaN, as 0 / 0 is.
    pub fn softmax(&self, row: &mut [f32]) {
        let max = self.max(row);
        let mut total = 0.0;
        for chunk in row.chunks_mut(SUM_CHUNK) {
            // SAFETY: the table fits the machine.
            total += f64::from(unsafe { (self.kernels.exp_sub_sum)(chunk, max) });
        }
        let factor = (1.0 / total) as f32;
        for x in row {
            *x *= factor;
        }
    }

    /// Logits as a family defines them, in place: `scale * x`, or `cap * tanh(scale * x / cap)` where there is a cap.
    pub fn scale_and_cap(&self, logits: &mut [f32], scale: f32, cap: Option<f32>) {
        let (len, logits) = (logits.len(), SharedMut::new(logits));
        self.split(len, MIN_PIECE_ELEMENTS, |piece| {
            // SAFETY: pieces are disjoint.
            let logits = unsafe { logits.slice(piece) };
            match cap {
                // SAFETY: the table fits the machine.
                Some(cap) => unsafe { (self.kernels.soft_cap)(logits, scale, cap) },
                None => {
                    for x in logits {
                        *x *= scale;
                    }
                }
            }
        });
    }
}
