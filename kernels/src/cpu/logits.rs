//! What sampling asks of a row of logits: maximum, log-sum-exp, softmax, the largest few.
//!
//! Knows nothing of tokens or of sampling rules. Invariant: results depend on the row alone; ties go to the lowest
//! index, and NaN is never chosen.

use std::cmp::Ordering;

use super::Cpu;
use super::pool::SharedMut;

/// Elements summed in f32 before the sum goes on in f64: keeps the error of a 256k-entry row at some 1e-6.
const SUM_CHUNK: usize = 1024;
/// Elements that are worth waking another thread for.
const MIN_PIECE_ELEMENTS: usize = 8 * 1024;

/// A logit and where it stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopEntry {
    /// Index in the row.
    pub index: u32,
    /// The logit.
    pub value: f32,
}

impl TopEntry {
    /// Larger first, lower index first among equals (zeroes of both signs are); NaN never gets here.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape that sorting asks for")]
    fn order(&self, other: &Self) -> Ordering {
        other.value.partial_cmp(&self.value).unwrap_or(Ordering::Equal).then(self.index.cmp(&other.index))
    }
}

impl Cpu {
    /// The largest logit, NaN aside; -inf where there is none.
    pub fn max(&self, row: &[f32]) -> f32 {
        // SAFETY: the table fits the machine.
        unsafe { (self.kernels.max)(row) }
    }

    /// Index of the largest logit, the lowest among equals, NaN aside; 0 where every logit is -inf or NaN; none for an
    /// empty row.
    pub fn argmax(&self, row: &[f32]) -> Option<usize> {
        let max = self.max(row);
        (!row.is_empty()).then(|| row.iter().position(|&x| x == max).unwrap_or(0))
    }

    /// ln(sum(exp(x))); a log-probability is `logit - log_sum_exp`. NaN if a logit is NaN; -inf for an empty row or
    /// one of only -inf.
    pub fn log_sum_exp(&self, row: &[f32]) -> f32 {
        let max = self.max(row);
        if max.is_infinite() {
            // All -inf: no mass. Some +inf: the sum is.
            return if row.iter().any(|x| x.is_nan()) { f32::NAN } else { max };
        }
        // SAFETY: the table fits the machine.
        let sum = |chunk: &[f32]| f64::from(unsafe { (self.kernels.sum_exp_sub)(chunk, max) });
        let total: f64 = row.chunks(SUM_CHUNK).map(sum).sum();
        (f64::from(max) + total.ln()) as f32
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

    /// The `k` largest logits, largest first, into `out`; fewer where the row is shorter or holds NaN. One pass with a
    /// rising threshold: no sort of the row.
    pub fn top_k(&self, row: &[f32], k: usize, out: &mut Vec<TopEntry>) {
        out.clear();
        if k == 0 {
            return;
        }
        let room = k.min(row.len()).saturating_mul(4).max(64);
        // None until `k` entries are known: then what does not exceed the smallest of them cannot enter.
        let mut threshold = None;
        for (index, &value) in row.iter().enumerate() {
            if value.is_nan() || threshold.is_some_and(|threshold| value <= threshold) {
                continue;
            }
            out.push(TopEntry { index: index as u32, value });
            if out.len() >= room && out.len() > k {
                out.select_nth_unstable_by(k - 1, TopEntry::order);
                out.truncate(k);
                threshold = Some(out[k - 1].value);
            }
        }
        if out.len() > k {
            out.select_nth_unstable_by(k - 1, TopEntry::order);
            out.truncate(k);
        }
        out.sort_unstable_by(TopEntry::order);
    }
}
