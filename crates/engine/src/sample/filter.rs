//! min-p, top-k and top-p without sorting the vocabulary.
//!
//! Tokens are ordered by weight, then by lower id, so that no two are equal and every filter keeps a prefix of that
//! order; what all of them keep together is described by its last member, the [`Cutoff`]. How few tokens need looking
//! at:
//! - top-k: cut the row into chunks and take the maximum of each. The k-th largest of these maxima is not above the
//!   k-th largest entry (k entries are at least as large), so everything below it can go, and little more than k stays.
//! - top-p: the entries below (1 - p) * total / size weigh at most (1 - p) * total together, so those above weigh at
//!   least p * total, and the smallest prefix that does so lies among them.
//! - the prefix itself: quickselect by weight instead of by count; each round halves what is still undecided.
//!
//! It must not know tokens' meaning, temperature or randomness: weights in, a cutoff out.

use std::cmp::Ordering;

use super::numeric;

/// Row entries to a maximum. Small enough that k of a few thousand profits, large enough that the maxima are few.
const MAXIMUM_CHUNK: usize = 32;

/// Which tokens may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Filter {
    /// Keep tokens at least this likely relative to the best; 0 is off.
    pub min_p: f32,
    /// Keep the k most likely of what is left, ties by lower id.
    pub top_k: Option<u32>,
    /// Keep the smallest prefix of what is left that holds this share of its probability; 1 is off.
    pub top_p: f32,
}

/// A token that may be kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub(super) value: f32,
    pub(super) id: u32,
}

impl Candidate {
    /// Best first: larger value, then lower id. Values are never NaN here.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape that sort_by and max_by take")]
    pub(super) fn order(&self, other: &Self) -> Ordering {
        other.value.partial_cmp(&self.value).unwrap_or(Ordering::Equal).then(self.id.cmp(&other.id))
    }
}

/// Reused memory.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) candidates: Vec<Candidate>,
    maxima: Vec<f32>,
}

/// The last token that is kept, in the order of [`Candidate::order`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cutoff(Candidate);

impl Cutoff {
    /// Takes the weight of everything behind the cutoff.
    pub(super) fn apply(self, weights: &mut [f32]) {
        let Candidate { value, id } = self.0;
        let (before, after) = weights.split_at_mut((id as usize + 1).min(weights.len()));
        for weight in before {
            *weight = if *weight >= value { *weight } else { 0.0 };
        }
        for weight in after {
            *weight = if *weight > value { *weight } else { 0.0 };
        }
    }
}

impl Filter {
    /// `weights` are relative to the likeliest token, which has 1. None: everything stays.
    pub(super) fn cutoff(&self, weights: &[f32], scratch: &mut Scratch) -> Option<Cutoff> {
        let top_k = self.top_k.map(|k| k as usize).filter(|&k| k < weights.len());
        if top_k.is_none() && self.top_p >= 1.0 {
            return (self.min_p > 0.0).then_some(Cutoff(Candidate { value: self.min_p, id: u32::MAX - 1 }));
        }
        let num_kept = if let Some(k) = top_k {
            collect_top(weights, k, self.min_p, scratch);
            self.num_kept_by_top_p(&mut scratch.candidates, None)
        } else {
            let total = (self.min_p == 0.0).then(|| numeric::sum(weights));
            let threshold = total.map_or(self.min_p, |total| self.negligible_weight(total, weights.len()));
            collect_from(weights, threshold, &mut scratch.candidates);
            self.num_kept_by_top_p(&mut scratch.candidates, total)
        };
        scratch.candidates[..num_kept].iter().copied().max_by(Candidate::order).map(Cutoff)
    }

    /// All entries below this weigh at most (1 - p) of the total together. Rounded down, so that rounding never costs a
    /// candidate.
    fn negligible_weight(&self, total: f64, num_weights: usize) -> f32 {
        ((1.0 - f64::from(self.top_p)) * total / num_weights as f64 * (1.0 - 1e-6)) as f32
    }

    /// Moves the prefix that top-p keeps to the front; `total` where it is more than the candidates' own.
    fn num_kept_by_top_p(&self, candidates: &mut [Candidate], total: Option<f64>) -> usize {
        if self.top_p >= 1.0 {
            return candidates.len();
        }
        let total = total.unwrap_or_else(|| candidates.iter().map(|candidate| f64::from(candidate.value)).sum::<f64>());
        prefix_of_weight(candidates, f64::from(self.top_p) * total)
    }
}

/// Fills `scratch.candidates` with the `k` best entries (fewer if fewer are positive and at least `floor`), unordered.
pub(super) fn collect_top(row: &[f32], k: usize, floor: f32, scratch: &mut Scratch) {
    let threshold = lower_bound_of_kth(row, k, &mut scratch.maxima).max(floor);
    collect_from(row, threshold, &mut scratch.candidates);
    if k == 0 {
        scratch.candidates.clear();
    } else if scratch.candidates.len() > k {
        scratch.candidates.select_nth_unstable_by(k - 1, Candidate::order);
        scratch.candidates.truncate(k);
    }
}

/// A value not above the k-th largest of the row, from the maxima of its chunks; minus infinity where k is too large
/// for that.
fn lower_bound_of_kth(row: &[f32], k: usize, maxima: &mut Vec<f32>) -> f32 {
    if k == 0 || k > row.len() / MAXIMUM_CHUNK {
        return f32::NEG_INFINITY;
    }
    maxima.clear();
    maxima.extend(row.chunks(MAXIMUM_CHUNK).map(numeric::max));
    let descending = |a: &f32, b: &f32| b.partial_cmp(a).unwrap_or(Ordering::Equal);
    *maxima.select_nth_unstable_by(k - 1, descending).1
}

/// Entries of at least `threshold`, by id. Minus infinity is never an entry, whatever the threshold.
fn collect_from(row: &[f32], threshold: f32, candidates: &mut Vec<Candidate>) {
    candidates.clear();
    let chunks = row.chunks(MAXIMUM_CHUNK).enumerate();
    for (index, chunk) in chunks {
        // The maximum of a chunk is vector code, and most chunks hold nothing.
        let max = numeric::max(chunk);
        if max >= threshold && max > f32::NEG_INFINITY {
            let start = index * MAXIMUM_CHUNK;
            candidates.extend(
                chunk
                    .iter()
                    .enumerate()
                    .filter(|&(_, &value)| value >= threshold && value > f32::NEG_INFINITY)
                    .map(|(offset, &value)| Candidate { value, id: (start + offset) as u32 }),
            );
        }
    }
}

/// Orders `candidates` just far enough that the smallest prefix whose weight reaches `needed` stands in front; returns
/// its length, at least 1 (0 only without candidates).
fn prefix_of_weight(candidates: &mut [Candidate], mut needed: f64) -> usize {
    let (mut low, mut high) = (0, candidates.len());
    // Invariant: candidates[..low] are all kept and the prefix ends in low + 1..=high.
    while high - low > 1 {
        let middle = usize::midpoint(low, high);
        candidates[low..high].select_nth_unstable_by(middle - low, Candidate::order);
        let upper: f64 = candidates[low..middle].iter().map(|candidate| f64::from(candidate.value)).sum();
        if upper >= needed {
            high = middle;
        } else {
            needed -= upper;
            low = middle;
        }
    }
    high
}
