//! Which tokens may come next, as a grammar sees it: one bit a token.
//!
//! It must not know how a grammar works; it is the seam between one and the sampler. Tokens beyond its length are
//! forbidden (a model's vocabulary may be padded beyond its tokenizer's).

/// A set of allowed tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenMask {
    words: Vec<u32>,
}

impl TokenMask {
    /// Nothing allowed, room for `vocab_size` tokens.
    pub fn none(vocab_size: usize) -> Self {
        Self { words: vec![0; vocab_size.div_ceil(32)] }
    }

    /// From a bit set of 32-bit words, lowest bit first.
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// Allows one token; one beyond the mask's length is ignored.
    pub fn allow(&mut self, token: bindery_scheduler::TokenId) {
        if let Some(word) = self.words.get_mut(token.0 as usize / 32) {
            *word |= 1 << (token.0 % 32);
        }
    }

    /// Whether the token may come next.
    pub fn allows(&self, token: bindery_scheduler::TokenId) -> bool {
        self.words.get(token.0 as usize / 32).is_some_and(|word| word >> (token.0 % 32) & 1 == 1)
    }

    /// Whether nothing but some of `tokens` may come next.
    pub fn allows_only<'a>(&self, tokens: impl Iterator<Item = &'a bindery_scheduler::TokenId>) -> bool {
        let mut others = self.clone();
        for token in tokens {
            if let Some(word) = others.words.get_mut(token.0 as usize / 32) {
                *word &= !(1 << (token.0 % 32));
            }
        }
        others.words.iter().all(|&word| word == 0)
    }

    /// Sets forbidden tokens to minus infinity.
    pub(super) fn apply(&self, logits: &mut [f32]) {
        let mut words = self.words.iter();
        for chunk in logits.chunks_mut(32) {
            let word = words.next().copied().unwrap_or(0);
            if word == u32::MAX {
                continue;
            }
            for (bit, logit) in chunk.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}
