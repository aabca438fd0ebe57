//! min-p, top-k and top-p without sorting the vocabulary.
//!
//! Tokens are ordered by weight, then by lower id, so that no two are equal and every filter keeps a prefix of that
//! order; what all of them keep together is described by its last member, the [`Cutoff`]. How few tokens need looking
//! at:
//! - top-k: cut the row into chunks and take the maximum of each. The k-th largest of these maxima is not above the
//!   k-th largest entry (k entries are at least as large), so everything below it can go, and little more than k stays.
//! - top-p: the entries below (1 - p) * total / size weigh at most (1 - p) * total together, so those above weigh at
//!   least p * total, and the smallest prefix that does so lies among them.
//! - the prefix itself: where candidates are many, their weights are summed in buckets by size, and only the bucket in which
//!   the prefix ends is looked at; in there, quickselect by weight instead of by count: each round halves what is undecided.
//!
//! It must not know tokens' meaning, temperature or randomness: weights in, a cutoff out.

use std::cmp::Ordering;

use super::numeric;

/// Row entries to a maximum. Small enough that k of a few thousand profits, large enough that the maxima are few.
const MAXIMUM_CHUNK: usize = 32;
/// Candidates from which on buckets are worth their sums. Few in tests, whose rows are short.
const BUCKETS_FROM: usize = if cfg!(test) { 8 } else { 1024 };
/// A weight's bucket is its exponent and the upper three bits of its mantissa; of weights up to 1 there are so many.
const NUM_BUCKETS: usize = bucket_of(1.0) + 1;

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
    /// Of weights, by bucket.
    sums: Vec<f64>,
}

/// The last token that is kept, in the order of [`Candidate::order`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cutoff(Candidate);

impl Cutoff {
    /// Takes the weight of everything behind the cutoff.
    pub(super) fn apply(self, weights: &mut [f32]) {
        let Candidate { value, id } = self.0;
        let (before, after) = weights.split_at_mut((id as usize + 1).min(weights.len()));
        numeric::vectorized!((before: &'a mut [f32], after: &'a mut [f32], value: f32) -> () {
            for weight in before {
                *weight = if *weight >= value { *weight } else { 0.0 };
            }
            for weight in after {
                *weight = if *weight > value { *weight } else { 0.0 };
            }
        });
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
            self.num_kept_by_top_p(scratch, None)
        } else {
            let total = (self.min_p == 0.0).then(|| numeric::sum(weights));
            let threshold = total.map_or(self.min_p, |total| self.negligible_weight(total, weights.len()));
            collect_from(weights, threshold, &mut scratch.candidates);
            self.num_kept_by_top_p(scratch, total)
        };
        scratch.candidates[..num_kept].iter().copied().max_by(Candidate::order).map(Cutoff)
    }

    /// All entries below this weigh at most (1 - p) of the total together. Rounded down, so that rounding never costs a
    /// candidate.
    fn negligible_weight(&self, total: f64, num_weights: usize) -> f32 {
        ((1.0 - f64::from(self.top_p)) * total / num_weights as f64 * (1.0 - 1e-6)) as f32
    }

    /// Moves the prefix that top-p keeps to the front; `total` where it is more than the candidates' own.
    fn num_kept_by_top_p(&self, scratch: &mut Scratch, total: Option<f64>) -> usize {
        let Scratch { candidates, sums, .. } = scratch;
        if self.top_p >= 1.0 {
            return candidates.len();
        }
        let total = total.unwrap_or_else(|| candidates.iter().map(|candidate| f64::from(candidate.value)).sum::<f64>());
        prefix_of_weight(candidates, f64::from(self.top_p) * total, sums)
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
    maxima.resize(row.len().div_ceil(MAXIMUM_CHUNK), 0.0);
    let of_chunks = &mut maxima[..];
    numeric::vectorized!((row: &'a [f32], of_chunks: &'a mut [f32]) -> () {
        for (max, chunk) in of_chunks.iter_mut().zip(row.chunks(MAXIMUM_CHUNK)) {
            *max = numeric::max_of_chunk(chunk);
        }
    });
    let descending = |a: &f32, b: &f32| b.partial_cmp(a).unwrap_or(Ordering::Equal);
    *maxima.select_nth_unstable_by(k - 1, descending).1
}

/// Entries of at least `threshold`, by id. Minus infinity is never an entry, whatever the threshold.
fn collect_from(row: &[f32], threshold: f32, candidates: &mut Vec<Candidate>) {
    candidates.clear();
    numeric::vectorized!((row: &'a [f32], threshold: f32, candidates: &'a mut Vec<Candidate>) -> () {
        for (index, chunk) in row.chunks(MAXIMUM_CHUNK).enumerate() {
            // The maximum of a chunk is vector code, and most chunks hold nothing.
            let max = numeric::max_of_chunk(chunk);
            if max >= threshold && max > f32::NEG_INFINITY {
                for (offset, &value) in chunk.iter().enumerate() {
                    if value >= threshold && value > f32::NEG_INFINITY {
                        candidates.push(Candidate { value, id: (index * MAXIMUM_CHUNK + offset) as u32 });
                    }
                }
            }
        }
    });
}

/// Orders `candidates` just far enough that the smallest prefix whose weight reaches `needed` stands in front; returns
/// its length, at least 1 (0 only without candidates).
fn prefix_of_weight(candidates: &mut [Candidate], mut needed: f64, sums: &mut Vec<f64>) -> usize {
    let (mut low, mut high) = (0, candidates.len());
    if high >= BUCKETS_FROM
        && let Some((bucket, left)) = bucket_of_end(candidates, needed, sums)
    {
        low = move_to_front(candidates, |weight| bucket_of(weight) > bucket);
        high = low + move_to_front(&mut candidates[low..], |weight| bucket_of(weight) == bucket);
        needed = left;
    }
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

/// Larger weights are in no smaller bucket.
const fn bucket_of(weight: f32) -> usize {
    (weight.to_bits() >> 20) as usize
}

/// The bucket in which the prefix ends whose weight reaches `needed`, and what is needed of it. `None` where rounding lets all
/// candidates weigh less than that.
fn bucket_of_end(candidates: &[Candidate], mut needed: f64, sums: &mut Vec<f64>) -> Option<(usize, f64)> {
    sums.clear();
    sums.resize(NUM_BUCKETS, 0.0);
    for candidate in candidates {
        sums[bucket_of(candidate.value)] += f64::from(candidate.value);
    }
    for (bucket, &sum) in sums.iter().enumerate().rev() {
        if sum > 0.0 && sum >= needed {
            return Some((bucket, needed));
        }
        needed -= sum;
    }
    None
}

/// Candidates whose weight `is_wanted` before all others; returns how many.
fn move_to_front(candidates: &mut [Candidate], is_wanted: impl Fn(f32) -> bool) -> usize {
    let mut num_wanted = 0;
    for at in 0..candidates.len() {
        if is_wanted(candidates[at].value) {
            candidates.swap(num_wanted, at);
            num_wanted += 1;
        }
    }
    num_wanted
}
