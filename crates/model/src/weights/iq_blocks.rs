//! The blocks of ggml's formats without evenly spaced codes: values from a code book, points of a grid with signs, trits.
//!
//! It must not know tensors or files. Its invariant: what a block's bits mean is kept exactly. Weights that share a grid
//! point are written out as a code each (three bits where the file spends about two, four where it spends three), since
//! the kernels multiply weight by weight; scales stay in as many levels as there.
//!
//! Source: the block structures of `ggml-common.h`, drawn above each reader; held against the Python `gguf` package.

use bindery_kernels::{GROUP, SUPER_GROUP};
use half::f16;

use super::blocks::{Block, half_at, nibble, two_bits};
use super::grids;

/// Weights that share a point of the grids of eight.
const POINT: usize = 8;

impl Block {
    // scale f16 | 32 nibbles
    pub(super) fn iq4_nl(&mut self, block: &[u8]) {
        self.scale = half_at(block, 0);
        self.set_codes::<GROUP>(0, |i| nibble(&block[2..18], i));
    }

    // scale f16 | 8 x upper 2 bits of a scale | 8 x lower 4 bits | 256 nibbles, 32 as in IQ4_NL
    pub(super) fn iq4_xs(&mut self, block: &[u8]) {
        self.scale = half_at(block, 0);
        let upper = word_at(block, 2);
        for group in 0..8 {
            let low = half_byte(&block[4..8], group);
            let high = (upper >> (2 * group) & 3) as u8;
            self.sub_scales[group] = (low | high << 4).cast_signed() - 32;
        }
        self.set_codes::<SUPER_GROUP>(0, |i| nibble(&block[8 + 16 * (i / 32)..][..16], i % 32));
    }

    // exponent u8 | 32 nibbles
    pub(super) fn mxfp4(&mut self, block: &[u8]) {
        self.sub_scales[0] = block[0].cast_signed();
        self.set_codes::<GROUP>(0, |i| nibble(&block[1..17], i));
    }

    // 256 x 2 bits | scale f16
    pub(super) fn tq2_0(&mut self, block: &[u8]) {
        self.ternary(half_at(block, 64), |i| two_bits(&block[..64], i));
    }

    // 240 trits, five a byte: of 32 bytes, then of 16 | 16 trits, four a byte | scale f16
    pub(super) fn tq1_0(&mut self, block: &[u8]) {
        const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
        let trit = |byte: u8, place: usize| ((u16::from(byte.wrapping_mul(POWERS[place])) * 3) >> 8) as u8;
        self.ternary(half_at(block, 52), |i| match i {
            0..160 => trit(block[i % 32], i / 32),
            160..240 => trit(block[32 + i % 16], (i - 160) / 16),
            _ => trit(block[48 + i % 4], (i - 240) / 4),
        });
    }

    /// Weights `scale * (stored - 1)`. Both factors' signs are turned, for two bits around zero are -2 to 1, and what is
    /// stored may be 0 to 3.
    fn ternary(&mut self, scale: f16, stored: impl Fn(usize) -> u8) {
        self.scale = -scale;
        for (i, code) in self.codes.iter_mut().enumerate() {
            *code = 1 - stored(i).cast_signed();
        }
    }

    // scale f16 | 8 x (4 x point u8, 4 x 7 bits of signs and 4 of scale)
    pub(super) fn iq2_xxs(&mut self, block: &[u8]) {
        self.scale = half_at(block, 0);
        let rest = |group: usize| long_at(block, 2 + 8 * group + 4);
        for group in 0..8 {
            self.set_both_halves(group, odd(rest(group) >> 28));
        }
        self.set_points(&grids::IQ2_XXS, |at| {
            let signs = even_signs(rest(at / 4) >> (7 * (at % 4)));
            (block[2 + 8 * (at / 4) + at % 4].into(), signs)
        });
    }

    // scale f16 | 32 x (9 bits of point, 7 of signs) | 16 x 4 bits of scale
    pub(super) fn iq2_xs(&mut self, block: &[u8]) {
        self.scale = half_at(block, 0);
        self.set_sixteen(|group| odd(half_byte(&block[66..74], group).into()));
        self.set_points(&grids::IQ2_XS, |at| {
            let both = word_at(block, 2 + 2 * at);
            (usize::from(both & 511), even_signs(u32::from(both >> 9)))
        });
    }

    // scale f16 | 32 x lower 8 bits of a point | 32 x 8 signs | 32 x upper 2 bits | 16 x 4 bits of scale
    pub(super) fn iq2_s(&mut self, block: &[u8]) {
        self.scale = half_at(block, 0);
        self.set_sixteen(|group| odd(half_byte(&block[74..82], group).into()));
        self.set_points(&grids::IQ2_S, |at| {
            let upper = block[66 + at / 4] >> (2 * (at % 4)) & 3;
            (usize::from(block[2 + at]) | usize::from(upper) << 8, block[34 + at])
        });
    }

    // scale f16 | 64 x point u8 | 8 x (4 x 7 bits of signs and 4 of scale)
    pub(super) fn iq3_xxs(&mut self, block: &[u8]) {
        self.scale = half_at(block, 0);
        let rest = |group: usize| long_at(block, 66 + 4 * group);
        for group in 0..8 {
            // Quarters, counted in eighths.
            self.sub_scales[group] = 2 * odd(rest(group) >> 28);
        }
        self.set_short_points(&grids::IQ3_XXS, |at| {
            let signs = even_signs(rest(at / 8) >> (7 * (at / 2 % 4)));
            (block[2 + at].into(), signs >> (4 * (at % 2)))
        });
    }

    // scale f16 | 64 x lower 8 bits of a point | 64 x ninth bit | 32 x 8 signs | 8 x 4 bits of scale
    pub(super) fn iq3_s(&mut self, block: &[u8]) {
        self.scale = half_at(block, 0);
        for group in 0..8 {
            self.sub_scales[group] = odd(half_byte(&block[106..110], group).into());
        }
        self.set_short_points(&grids::IQ3_S, |at| {
            let ninth = block[66 + at / 8] >> (at % 8) & 1;
            (usize::from(block[2 + at]) | usize::from(ninth) << 8, block[74 + at / 2] >> (4 * (at % 2)))
        });
    }

    // scale f16 | 32 x lower 8 bits of a point | 8 x (4 x upper 3 bits, 3 of scale, sign of the shift)
    pub(super) fn iq1_s(&mut self, block: &[u8]) {
        self.scale = half_at(block, 0);
        let rest = |group: usize| word_at(block, 34 + 2 * group);
        for group in 0..8 {
            self.set_both_halves(group, odd(u32::from(rest(group) >> 12 & 7)));
        }
        self.set_shifted_points(|at| {
            let upper = rest(at / 4) >> (3 * (at % 4)) & 7;
            (usize::from(block[2 + at]) | usize::from(upper) << 8, rest(at / 4) >> 15 != 0)
        });
    }

    // 32 x lower 8 bits of a point | 32 x (upper 3 bits, sign of the shift) | 4 x (4 x 3 bits of scale, 4 of the f16)
    pub(super) fn iq1_m(&mut self, block: &[u8]) {
        let words: [u16; 4] = std::array::from_fn(|i| word_at(block, 48 + 2 * i));
        let bits = words.iter().enumerate().map(|(i, word)| word >> 12 << (4 * i)).sum();
        self.scale = f16::from_bits(bits);
        self.set_sixteen(|group| odd(u32::from(words[group / 4] >> (3 * (group % 4)) & 7)));
        self.set_shifted_points(|at| {
            let rest = half_byte(&block[32..48], at);
            (usize::from(block[at]) | usize::from(rest & 7) << 8, rest & 8 != 0)
        });
    }

    /// The scale of 32 weights, where the kernels have one for 16.
    fn set_both_halves(&mut self, group: usize, scale: i8) {
        self.sub_scales[2 * group..2 * group + 2].fill(scale);
    }

    fn set_sixteen(&mut self, scale: impl Fn(usize) -> i8) {
        for (group, sub_scale) in self.sub_scales.iter_mut().enumerate() {
            *sub_scale = scale(group);
        }
    }

    /// Codes of points of eight: two bits of magnitude, then a sign. `point(at)` gives a point's number and its signs.
    fn set_points(&mut self, grid: &[u16], point: impl Fn(usize) -> (usize, u8)) {
        for (at, codes) in self.codes.as_chunks_mut::<POINT>().0.iter_mut().enumerate() {
            let (number, signs) = point(at);
            for (i, code) in codes.iter_mut().enumerate() {
                *code = ((grid[number] >> (2 * i) & 3) as u8 | (signs >> i & 1) << 2).cast_signed();
            }
        }
    }

    /// Likewise of points of four: three bits of magnitude, then a sign.
    fn set_short_points(&mut self, grid: &[u16], point: impl Fn(usize) -> (usize, u8)) {
        for (at, codes) in self.codes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let (number, signs) = point(at);
            for (i, code) in codes.iter_mut().enumerate() {
                *code = ((grid[number] >> (3 * i) & 7) as u8 | (signs >> i & 1) << 3).cast_signed();
            }
        }
    }

    /// Likewise of points of eight that lie an eighth above their places, or below.
    fn set_shifted_points(&mut self, point: impl Fn(usize) -> (usize, bool)) {
        for (at, codes) in self.codes.as_chunks_mut::<POINT>().0.iter_mut().enumerate() {
            let (number, is_below) = point(at);
            for (i, code) in codes.iter_mut().enumerate() {
                *code = ((grids::IQ1[number] >> (2 * i) & 3) as u8 | u8::from(is_below) << 2).cast_signed();
            }
        }
    }
}

/// 2 x + 1, of at most four bits.
fn odd(x: u32) -> i8 {
    (2 * (x & 15) + 1) as i8
}

/// Seven signs, and an eighth that makes the number of negative ones even.
fn even_signs(seven: u32) -> u8 {
    let seven = (seven & 127) as u8;
    seven | ((seven.count_ones() & 1) as u8) << 7
}

/// The nibble number `i`, low ones first.
fn half_byte(packed: &[u8], i: usize) -> u8 {
    packed[i / 2] >> (4 * (i % 2)) & 0xF
}

fn word_at(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

fn long_at(block: &[u8], at: usize) -> u32 {
    u32::from(word_at(block, at)) | u32::from(word_at(block, at + 2)) << 16
}
