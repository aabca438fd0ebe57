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

/// What codes stand for. ggml's smallest formats choose each weight from a short list of values that are not evenly
/// spaced; the list is looked up where codes meet activations, so that weights stay as short as their codes.
///
/// Source of the values: `ggml-common.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CodeBook {
    /// Themselves.
    Linear,
    /// The sixteen values of IQ4_NL and IQ4_XS.
    Iq4,
    /// Twice a four-bit float (E2M1), of MXFP4: three bits of magnitude, then a sign.
    Fp4,
    /// The eight magnitudes of IQ3_XXS, then a sign.
    Iq3Xxs,
    /// The eight odd magnitudes of IQ3_S, then a sign.
    Iq3S,
    /// The three magnitudes of IQ2_XXS, IQ2_XS and IQ2_S in two bits, then a sign.
    Iq2,
    /// Eight times -1, 0 or 1 in two bits, then whether one is taken off instead of added: IQ1_S and IQ1_M.
    Iq1,
}

/// A code book as vectors look things up in: its sixteen values again and again.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Values([i8; 64]);

impl Values {
    const fn new(of: [i8; 16]) -> Self {
        let mut values = [0; 64];
        let mut i = 0;
        while i < 64 {
            values[i] = of[i % 16];
            i += 1;
        }
        Self(values)
    }

    /// As many magnitudes as two or three bits tell apart, then their negatives; twice over where they are four.
    const fn with_signs<const N: usize>(magnitudes: [i8; N]) -> Self {
        let mut values = [0; 16];
        let mut i = 0;
        while i < 16 {
            let magnitude = magnitudes[i % N];
            values[i] = if (i / N).is_multiple_of(2) { magnitude } else { -magnitude };
            i += 1;
        }
        Self::new(values)
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.0.as_ptr().cast()
    }
}

static IDENTITY: Values = Values::new([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
static IQ4: Values = Values::new([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]);
static FP4: Values = Values::with_signs([0, 1, 2, 3, 4, 6, 8, 12]);
static IQ3_XXS: Values = Values::with_signs([4, 12, 20, 28, 36, 44, 52, 62]);
static IQ3_S: Values = Values::with_signs([1, 3, 5, 7, 9, 11, 13, 15]);
static IQ2: Values = Values::with_signs([8, 25, 43, 0]);
static IQ1: Values = Values::new([-7, 1, 9, 0, -9, -1, 7, 0, -7, 1, 9, 0, -9, -1, 7, 0]);

impl CodeBook {
    /// Every one.
    pub const ALL: [Self; 7] = [Self::Linear, Self::Iq4, Self::Fp4, Self::Iq3Xxs, Self::Iq3S, Self::Iq2, Self::Iq1];

    /// What is looked up; nothing looks anything up for `Linear`.
    pub(crate) fn values(self) -> &'static Values {
        match self {
            Self::Linear => &IDENTITY,
            Self::Iq4 => &IQ4,
            Self::Fp4 => &FP4,
            Self::Iq3Xxs => &IQ3_XXS,
            Self::Iq3S => &IQ3_S,
            Self::Iq2 => &IQ2,
            Self::Iq1 => &IQ1,
        }
    }

    /// What a code stands for.
    pub fn value(self, code: i8) -> i8 {
        match self {
            Self::Linear => code,
            _ => self.values().0[usize::from(code.cast_unsigned() & 15)],
        }
    }
}

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
    /// As two levels, but the int8 counts eighths: an eighth of the f16 need not be an f16.
    Eighths,
    /// An f16 for 256 weights and nothing else.
    Wide,
    /// The exponent of a power of two for 32 weights: a byte e says 2^(e - 128), which is half of what OCP's E8M0 says
    /// of it (the values of [`CodeBook::Fp4`] are doubled). It lies where int8 scales do.
    Exponents,
}

impl Scaling {
    /// What an [exponent](Self::Exponents) says; exact, below the normal range too.
    pub fn power(exponent: u8) -> f32 {
        f32::from_bits((u32::from(exponent) << 23).max(HALF_LEAST_NORMAL)) * 0.5
    }

    /// The largest exponent under which every value of [`CodeBook::Fp4`] is finite: 12 * 2^(252 - 128).
    pub const MAX_EXPONENT: u8 = 252;
}

/// Bits of 2^-127, which the exponent 0 stands for before it is halved.
pub(crate) const HALF_LEAST_NORMAL: u32 = 1 << 22;

/// What a weight is made of: `scale * value`, plus `min` where the format has minimums. The value is the code, or what
/// the code book has under it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuantFormat {
    /// Bits of a code.
    pub bits: CodeBits,
    /// How scales and minimums are kept.
    pub scaling: Scaling,
    /// Whether codes count up from a minimum instead of lying around zero.
    pub with_mins: bool,
    /// What codes stand for.
    pub book: CodeBook,
}

impl QuantFormat {
    /// Ways of keeping scales that have no length to choose.
    const FIXED_SCALINGS: [Scaling; 6] =
        [Scaling::Single, Scaling::TwoLevel, Scaling::Nibbles, Scaling::Eighths, Scaling::Wide, Scaling::Exponents];

    /// Every format that the kernels compute, of spans some lengths: the shortest, one that is no power of two, and one
    /// that no row of a test is as long as.
    pub fn all() -> Vec<Self> {
        let scalings: Vec<Scaling> = Self::FIXED_SCALINGS.into_iter().chain(SOME_SPANS.map(Scaling::Spans)).collect();
        let mut all = Vec::new();
        for book in CodeBook::ALL {
            for bits in CodeBits::ALL {
                for &scaling in &scalings {
                    let formats = [false, true].map(|with_mins| Self { bits, scaling, with_mins, book });
                    all.extend(formats.into_iter().filter(|format| format.group().is_some()));
                }
            }
        }
        all
    }

    /// Weights that a kernel multiplies with a scale at a time, all those that share it but for spans; none for a
    /// combination that no kernel computes.
    pub fn group(self) -> Option<usize> {
        match (self.book, self.bits, self.scaling, self.with_mins) {
            (_, _, Scaling::Spans(span), _) if span == 0 || !span.is_multiple_of(GROUP as u32) => None,
            (CodeBook::Linear, CodeBits::Four | CodeBits::Five, Scaling::Single, _)
            | (CodeBook::Linear, CodeBits::Eight, Scaling::Single, false)
            | (CodeBook::Linear, CodeBits::Four | CodeBits::Five, Scaling::TwoLevel, true)
            | (CodeBook::Linear, CodeBits::Four | CodeBits::Eight, Scaling::Spans(_), _)
            | (CodeBook::Iq4, CodeBits::Four, Scaling::Single | Scaling::TwoLevel, false)
            | (CodeBook::Iq3S, CodeBits::Four, Scaling::TwoLevel, false)
            | (CodeBook::Iq3Xxs, CodeBits::Four, Scaling::Eighths, false)
            | (CodeBook::Fp4, CodeBits::Four, Scaling::Exponents, false) => Some(32),
            (CodeBook::Linear, CodeBits::Three | CodeBits::Six, Scaling::TwoLevel, false)
            | (CodeBook::Linear, CodeBits::Two, Scaling::Nibbles, true)
            | (CodeBook::Linear, CodeBits::Two, Scaling::Wide, false)
            | (CodeBook::Linear, CodeBits::Two | CodeBits::Three, Scaling::Spans(_), true)
            | (CodeBook::Iq2 | CodeBook::Iq1, CodeBits::Three, Scaling::Eighths, false) => Some(16),
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

    /// Inputs that share the scale of the upper level (or the exponent).
    pub fn scale_span(self) -> usize {
        match self.scaling {
            Scaling::Single | Scaling::Exponents => GROUP,
            Scaling::TwoLevel | Scaling::Nibbles | Scaling::Eighths | Scaling::Wide => SUPER_GROUP,
            Scaling::Spans(span) => span as usize,
        }
    }

    /// What the inputs of a matrix must be a multiple of. In spans any number will do: codes of zero fill the last group.
    pub fn cols_multiple(self) -> usize {
        if let Scaling::Spans(_) = self.scaling { 1 } else { self.scale_span() }
    }

    /// Whether there are int8 scales (or exponents), one a group.
    pub fn has_sub_scales(self) -> bool {
        match self.scaling {
            Scaling::Single | Scaling::Wide | Scaling::Spans(_) => false,
            Scaling::TwoLevel | Scaling::Nibbles | Scaling::Eighths | Scaling::Exponents => true,
        }
    }

    /// What is added to codes to store them: short codes are kept unsigned.
    pub(crate) fn offset(self) -> i8 {
        let is_unsigned = self.with_mins || self.book != CodeBook::Linear;
        if is_unsigned || self.bits == CodeBits::Eight { 0 } else { 1 << (self.bits.count() - 1) }
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
