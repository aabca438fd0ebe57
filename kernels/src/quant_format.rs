//! What a quantised weight is made of, and where its bits lie.
//!
//! A [`QuantFormat`] names the arithmetic (codes times int8 activations), not a file format. It knows a group's bits,
//! nothing of matrices. Invariant: every bit of a group's vectors is one bit of one code.

/// Inputs of an activation group; no group of weights is longer.
pub const GROUP: usize = 32;
/// Inputs that share the upper scale of two-level scales.
pub const SUPER_GROUP: usize = 256;
/// Codes that lie together in every layout: what one broadcast of activations meets.
pub(crate) const QUAD: usize = 4;
/// Quads of an activation group.
pub(crate) const QUADS: usize = GROUP / QUAD;
/// Vectors of a group's codes at most: as many as a code has bits.
pub(crate) const MAX_VECTORS: usize = 8;

/// Bits that a code takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CodeBits {
    /// 0..=3, or -2..=1 where there are no minimums.
    Two,
    /// 0..=7, or -4..=3.
    Three,
    /// 0..=15, or -8..=7.
    Four,
    /// 0..=31, or -16..=15.
    Five,
    /// 0..=63, or -32..=31.
    Six,
    /// -128..=127.
    Eight,
}

impl CodeBits {
    /// Every width.
    pub const ALL: [Self; 6] = [Self::Two, Self::Three, Self::Four, Self::Five, Self::Six, Self::Eight];

    /// As a number.
    pub const fn count(self) -> usize {
        match self {
            Self::Two => 2,
            Self::Three => 3,
            Self::Four => 4,
            Self::Five => 5,
            Self::Six => 6,
            Self::Eight => 8,
        }
    }

    /// Where the bits of a group's quads lie; drawn in the crate's head.
    pub(crate) const fn pieces(self) -> &'static [Piece] {
        match self {
            Self::Two => const { &whole_quads(2) },
            Self::Three => {
                const {
                    &[
                        piece(0, 0, 0, 3, 0),
                        piece(1, 0, 3, 3, 0),
                        piece(2, 1, 0, 3, 0),
                        piece(3, 1, 3, 3, 0),
                        piece(4, 2, 0, 3, 0),
                        piece(5, 2, 3, 3, 0),
                        piece(6, 0, 6, 2, 0),
                        piece(6, 2, 6, 1, 2),
                        piece(7, 1, 6, 2, 0),
                        piece(7, 2, 7, 1, 2),
                    ]
                }
            }
            Self::Four => const { &whole_quads(4) },
            Self::Five => {
                const {
                    &[
                        piece(0, 0, 0, 5, 0),
                        piece(1, 1, 0, 5, 0),
                        piece(2, 2, 0, 5, 0),
                        piece(3, 3, 0, 5, 0),
                        piece(4, 4, 0, 5, 0),
                        piece(5, 0, 5, 3, 0),
                        piece(5, 1, 6, 2, 3),
                        piece(6, 2, 5, 3, 0),
                        piece(6, 3, 6, 2, 3),
                        piece(7, 4, 5, 3, 0),
                        piece(7, 1, 5, 1, 3),
                        piece(7, 3, 5, 1, 4),
                    ]
                }
            }
            Self::Six => {
                const {
                    &[
                        piece(0, 0, 0, 6, 0),
                        piece(1, 1, 0, 6, 0),
                        piece(2, 2, 0, 6, 0),
                        piece(3, 0, 6, 2, 4),
                        piece(3, 1, 6, 2, 2),
                        piece(3, 2, 6, 2, 0),
                        piece(4, 3, 0, 6, 0),
                        piece(5, 4, 0, 6, 0),
                        piece(6, 5, 0, 6, 0),
                        piece(7, 3, 6, 2, 4),
                        piece(7, 4, 6, 2, 2),
                        piece(7, 5, 6, 2, 0),
                    ]
                }
            }
            Self::Eight => const { &whole_quads(8) },
        }
    }
}

/// Some bits of a quad's codes: bits `to..to + width` of the codes are bits `from..from + width` of a vector's bytes.
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) quad: usize,
    pub(crate) vector: usize,
    pub(crate) from: usize,
    pub(crate) width: usize,
    pub(crate) to: usize,
}

const fn piece(quad: usize, vector: usize, from: usize, width: usize, to: usize) -> Piece {
    Piece { quad, vector, from, width, to }
}

/// Codes that divide a byte, one after the other.
const fn whole_quads(width: usize) -> [Piece; QUADS] {
    let mut pieces = [piece(0, 0, 0, width, 0); QUADS];
    let mut quad = 0;
    while quad < QUADS {
        pieces[quad] = piece(quad, quad * width / 8, quad * width % 8, width, 0);
        quad += 1;
    }
    pieces
}

/// Lengths of spans that stand for all in [`QuantFormat::all`].
const SOME_SPANS: [u32; 3] = [32, 96, 1 << 16];

/// How scales (and minimums, where there are some) are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scaling {
    /// An f16 for 32 weights.
    Single,
    /// An f16 for 256 weights times an int8 for each group of them: 32 weights for codes of four and five bits, 16 for
    /// three and six.
    TwoLevel,
    /// An f16 for so many weights, a multiple of 32; the last of a row may have fewer. A minimum is an integer zero point
    /// here, a byte for as many weights: `scale * (code - zero)`.
    Spans(u32),
    /// An f16 for 256 weights times 0..=15 for each 16 of them; scale and minimum share a byte. For codes of two bits.
    Nibbles,
}

/// What a weight is made of: `scale * code`, plus `min` where the format has minimums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuantFormat {
    /// Bits of a code.
    pub bits: CodeBits,
    /// How scales and minimums are kept.
    pub scaling: Scaling,
    /// Whether codes count up from a minimum instead of lying around zero.
    pub with_mins: bool,
}

impl QuantFormat {
    /// Every format that the kernels compute, of spans some lengths: the shortest, one that is no power of two, and one
    /// that no row of a test is as long as.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for bits in CodeBits::ALL {
            let spans = SOME_SPANS.map(Scaling::Spans);
            for scaling in [Scaling::Single, Scaling::TwoLevel, Scaling::Nibbles].into_iter().chain(spans) {
                for with_mins in [false, true] {
                    let format = Self { bits, scaling, with_mins };
                    if format.group().is_some() {
                        all.push(format);
                    }
                }
            }
        }
        all
    }

    /// Weights that a kernel multiplies with a scale at a time, all those that share it but for spans; none for a
    /// combination that no kernel computes.
    pub fn group(self) -> Option<usize> {
        match (self.bits, self.scaling, self.with_mins) {
            (_, Scaling::Spans(span), _) if span == 0 || !span.is_multiple_of(GROUP as u32) => None,
            (CodeBits::Four | CodeBits::Five, Scaling::Single, _)
            | (CodeBits::Eight, Scaling::Single, false)
            | (CodeBits::Four | CodeBits::Five, Scaling::TwoLevel, true)
            | (CodeBits::Four | CodeBits::Eight, Scaling::Spans(_), _) => Some(32),
            (CodeBits::Three | CodeBits::Six, Scaling::TwoLevel, false)
            | (CodeBits::Two, Scaling::Nibbles, true)
            | (CodeBits::Two | CodeBits::Three, Scaling::Spans(_), true) => Some(16),
            _ => None,
        }
    }

    /// The codes that the format holds.
    pub fn codes(self) -> std::ops::RangeInclusive<i8> {
        let offset = self.offset();
        match self.bits {
            CodeBits::Eight => i8::MIN..=i8::MAX,
            bits => -offset..=(1 << bits.count()) - 1 - offset,
        }
    }

    /// Inputs that share an f16 scale.
    pub fn scale_span(self) -> usize {
        match self.scaling {
            Scaling::Single => GROUP,
            Scaling::TwoLevel | Scaling::Nibbles => SUPER_GROUP,
            Scaling::Spans(span) => span as usize,
        }
    }

    /// What the inputs of a matrix must be a multiple of. In spans any number will do: codes of zero fill the last group.
    pub fn cols_multiple(self) -> usize {
        match self.scaling {
            Scaling::Spans(_) => 1,
            Scaling::Single | Scaling::TwoLevel | Scaling::Nibbles => self.scale_span(),
        }
    }

    /// What is added to codes to store them: short codes are kept unsigned.
    pub(crate) fn offset(self) -> i8 {
        if self.with_mins || self.bits == CodeBits::Eight { 0 } else { 1 << (self.bits.count() - 1) }
    }
}

/// Quads of codes to words of vectors.
#[inline(always)]
pub(crate) fn cut(pieces: &[Piece], quads: &[u32; QUADS]) -> [u32; MAX_VECTORS] {
    let mut words = [0; MAX_VECTORS];
    for &Piece { quad, vector, from, width, to } in pieces {
        words[vector] |= (quads[quad] >> to & in_every_byte(width)) << from;
    }
    words
}

/// The lowest `width` bits of each of four bytes.
pub(crate) const fn in_every_byte(width: usize) -> u32 {
    u32::from_le_bytes([u8::MAX >> (8 - width); QUAD])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_of_a_groups_vectors_is_one_bit_of_one_code() {
        for bits in CodeBits::ALL {
            let mut in_vectors = [0_u8; MAX_VECTORS];
            let mut in_codes = [0_u8; QUADS];
            for &Piece { quad, vector, from, width, to } in bits.pieces() {
                let mask = u8::MAX >> (8 - width);
                assert_eq!(in_vectors[vector] & mask << from, 0, "{bits:?}");
                assert_eq!(in_codes[quad] & mask << to, 0, "{bits:?}");
                in_vectors[vector] |= mask << from;
                in_codes[quad] |= mask << to;
            }
            assert!(in_vectors[..bits.count()].iter().all(|&used| used == u8::MAX), "{bits:?}");
            assert!(in_codes.iter().all(|&used| used == u8::MAX >> (8 - bits.count())), "{bits:?}");
        }
    }
}
