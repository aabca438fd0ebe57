//! Random numbers without a history.
//!
//! A number is a function of (seed, sample, position): `ChaCha8` is a counter-based generator, the sample chooses its
//! stream and the position its place in the stream. So it matters neither what else is in the batch nor how often a
//! sequence was preempted. It must never keep state.

use std::hash::{BuildHasher, Hasher, RandomState};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

/// 32-bit words of the stream that one number takes.
const WORDS_PER_NUMBER: u128 = 2;

/// A number in [0, 1) with 53 random bits, for the token at `position` (0 is the first generated one) of `sample`.
pub fn uniform(seed: u64, sample: u32, position: usize) -> f64 {
    // The seed is the key's first eight bytes, so that the numbers are plain ChaCha8 and no library's own expansion.
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut stream = ChaCha8Rng::from_seed(key);
    stream.set_stream(u64::from(sample));
    stream.set_word_pos(position as u128 * WORDS_PER_NUMBER);
    const SCALE: f64 = 1.0 / (1_u64 << 53) as f64;
    (stream.next_u64() >> 11) as f64 * SCALE
}

/// A seed for a request that brought none. The standard library keys its hash maps from the system's random source,
/// once a thread, and steps the key with every use; hashing nothing with such a key gives a fresh number each time.
pub(super) fn fresh_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From an implementation of ChaCha8 in Python, written down from its specification. A seed in a user's log must
    /// give the same tokens after an upgrade.
    #[test]
    fn numbers_are_plain_chacha8() {
        assert_eq!(uniform(0, 0, 0), 0.8369197568826472);
        assert_eq!(uniform(0, 0, 1), 0.6314244940665231);
        assert_eq!(uniform(0, 1, 0), 0.7891618892784164);
        assert_eq!(uniform(1, 0, 0), 0.381489413238261);
        assert_eq!(uniform(u64::MAX, 127, 100_001), 0.5175811965696966);
    }

    #[test]
    fn positions_samples_and_seeds_are_independent() {
        // 3 x 3 x 400 numbers in 20 bins: chi-square with 19 degrees of freedom, 43.8 is its 0.1 % point.
        let mut bins = [0_u32; 20];
        let mut all = Vec::new();
        for seed in [0, 7, u64::MAX] {
            for sample in [0, 1, 127] {
                for position in 0..400 {
                    let number = uniform(seed, sample, position);
                    assert!((0.0..1.0).contains(&number));
                    bins[(number * 20.0) as usize] += 1;
                    all.push(number.to_bits());
                }
            }
        }
        let expected = all.len() as f64 / 20.0;
        let chi_square: f64 = bins.iter().map(|&count| (f64::from(count) - expected).powi(2) / expected).sum();
        assert!(chi_square < 43.8, "chi-square {chi_square} over {bins:?}");
        let num_numbers = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), num_numbers, "two places share a number");
    }

    #[test]
    fn fresh_seeds_differ() {
        assert_ne!(fresh_seed(), fresh_seed());
    }
}
