//! Prompts of random words: no two alike, so no cache helps, and the same for a seed, so two servers get the same.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng as _, SeedableRng as _},
};

/// Frequent English words: most tokenizers give each one token, so words tell tokens fairly well.
const WORDS: &str = "the of and to in is you that it he was for on are as with his they at be this have from or one had by \
    word but not what all were we when your can said there use an each which she do how their if will up other about out \
    many then them these so some her would make like him into time has look two more write go see number no way could \
    people my than first water been call who oil its now find long down day did get come made may part over new sound \
    take only little work know place year live me back give most very after thing our just name good sentence man think \
    say great where help through much before line right too mean old any same tell boy follow came want show also around \
    form three small set put end does another well large must big even such because turn here why ask went men read need \
    land different home us move try kind hand picture again change off play spell air away animal house point page letter \
    mother answer found study still learn should world high every near add food between own below country plant last \
    school father keep tree never start city earth eye light thought head under story saw left few while along might \
    close something seem next hard open example begin life always those both paper together got group often run";

/// A source of prompts.
#[derive(Clone, Debug)]
pub(crate) struct Prompts {
    seed: u64,
    num_words: u32,
    words: Vec<&'static str>,
}

impl Prompts {
    pub(crate) fn new(seed: u64, num_words: u32) -> Self {
        Self { seed, num_words, words: WORDS.split_whitespace().collect() }
    }

    /// The prompt with this number.
    pub(crate) fn get(&self, number: u64) -> String {
        let mut random = generator(self.seed, number);
        let words: Vec<&str> =
            (0..self.num_words).map(|_| self.words[random.next_u32() as usize % self.words.len()]).collect();
        words.join(" ")
    }
}

/// Numbers for one purpose: the same for (seed, purpose).
pub(crate) fn generator(seed: u64, purpose: u64) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(purpose);
    random
}

/// Seconds to the next arrival of a Poisson process.
pub(crate) fn exponential(random: &mut ChaCha8Rng, rate: f64) -> f64 {
    // In (0, 1], so that the logarithm is finite.
    let uniform = (f64::from(random.next_u32()) + 1.0) / (f64::from(u32::MAX) + 1.0);
    -uniform.ln() / rate
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_have_the_words_asked_for_are_distinct_and_repeat_with_their_seed() {
        let prompts = Prompts::new(7, 110);
        let all: std::collections::BTreeSet<String> = (0..500).map(|number| prompts.get(number)).collect();
        assert_eq!(all.len(), 500);
        assert!(all.iter().all(|prompt| prompt.split(' ').count() == 110));
        assert_eq!(prompts.get(3), Prompts::new(7, 110).get(3));
        assert_ne!(prompts.get(3), Prompts::new(8, 110).get(3));
    }

    #[test]
    fn arrivals_come_at_the_rate_asked_for() {
        let mut random = generator(1, 2);
        let gaps: Vec<f64> = (0..20_000).map(|_| exponential(&mut random, 4.0)).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        // The mean of 20,000 exponential gaps of 0.25 s deviates by 0.0018 s; five of that.
        assert!((mean - 0.25).abs() < 0.009, "{mean}");
        // A share of exp(-1) of them is longer than the mean.
        let share = gaps.iter().filter(|gap| **gap > 0.25).count() as f64 / gaps.len() as f64;
        assert!((share - (-1.0f64).exp()).abs() < 0.02, "{share}");
    }
}
