//! Widths of codes: how a group's quads are cut out of the vectors they lie in, and summed with activations.
//!
//! Codes with a book are bytes once they are looked up, in one shuffle a quad; they are multiplied as bytes are.
//!
//! It knows the places of bits that `CodeBits::pieces` draws; it must not know scales, tiles or rows of outputs.
//! Invariant: a group's integer sum is exact in every set, however its codes are cut out.

use super::QuantLanes;
use super::scales::Scales;
use crate::cpu::task::GroupScales;
use crate::quant_format::CodeBits;

/// One width of codes.
pub(in crate::cpu) trait Codes {
    const BITS: CodeBits;
    /// Weights that share a scale.
    const GROUP: usize;
    /// Passes over a tile from which on it pays to unpack it once for all of them.
    const MIN_PANEL_PASSES: usize;
    /// Whether what codes stand for is looked up.
    const HAS_BOOK: bool;

    /// Adds the dot products of quads `2 J` and `2 J + 1` of an activation group, for each row `x[n]` of activations;
    /// what is added is in `sums.wide` after J = 1 where groups are half as long, and after J = 3.
    ///
    /// # Safety
    /// As [`QuantLanes`]; `codes` is a whole activation group's, each of `x` has 32 codes; `book` is
    /// `CodeBook::values` of the matrix, here and below.
    unsafe fn add_pair<Q: QuantLanes, const N: usize, const J: usize>(
        codes: *const u8,
        book: *const u8,
        x: &[*const i8; N],
        sums: &mut Sums<Q, N>,
    );

    /// As `add_pair`, for T tiles at once, from codes that `unpack` wrote: a vector a quad.
    ///
    /// # Safety
    /// As `add_pair`; each of `codes` is a whole activation group's, unpacked.
    unsafe fn add_unpacked<Q: QuantLanes, const N: usize, const T: usize, const J: usize>(
        codes: [*const u8; T],
        x: &[*const i8; N],
        sums: &mut [Sums<Q, N>; T],
    );

    /// Lays an activation group's codes out as a vector a quad.
    ///
    /// # Safety
    /// As [`QuantLanes`]; `codes` is a whole activation group's, `to` has room for eight vectors.
    unsafe fn unpack<Q: QuantLanes>(codes: *const u8, book: *const u8, to: *mut u8);

    /// What was added to the codes to make them unsigned.
    fn offset<Q: QuantLanes>(with_mins: bool) -> i32;
}

/// A group's integer sums for N rows of activations: those being added to, and those in 32 bits.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Sums<Q: QuantLanes, const N: usize> {
    narrow: [Q::Narrow; N],
    pub(super) wide: [Q::Sums; N],
}

impl<Q: QuantLanes, const N: usize> Sums<Q, N> {
    /// For the weights that `part` says: what was added to their codes is taken off before they come.
    ///
    /// # Safety
    /// As [`QuantLanes`]; `x[n]` is valid.
    #[inline(always)]
    pub(super) unsafe fn start<C: Codes, S: Scales>(x: &[*const GroupScales; N], part: Part) -> Self {
        let offset = C::offset::<Q>(S::WITH_MINS);
        // SAFETY: the caller's duty is the same.
        unsafe {
            let mut wide = [Q::zero_sums(); N];
            let mut narrow = [Q::narrow(wide[0]); N];
            if offset != 0 {
                for n in 0..N {
                    wide[n] = Q::splat_sums(-offset * part.sum(&*x[n]));
                    narrow[n] = Q::narrow(wide[n]);
                }
            }
            Self { narrow, wide }
        }
    }

    /// Adds quads `2 J` and `2 J + 1` of bytes, whose scale is shared by `GROUP` weights.
    ///
    /// # Safety
    /// As [`QuantLanes`]; each of `x` has 32 codes.
    #[inline(always)]
    unsafe fn add_bytes<const J: usize, const GROUP: usize>(
        &mut self,
        first: Q::Bytes,
        second: Q::Bytes,
        x: &[*const i8; N],
    ) {
        // SAFETY: the caller's duties; a group has eight quads of activations.
        unsafe {
            Q::dot_two_bytes(&mut self.wide, &mut self.narrow, first, second, &x.map(|x| x.add(8 * J)));
            if Q::BYTES_ARE_NARROW && (J + 1).is_multiple_of(GROUP / 8) {
                self.widen();
            }
        }
    }

    /// # Safety
    /// As [`QuantLanes`].
    #[inline(always)]
    unsafe fn widen(&mut self) {
        // SAFETY: the caller's duty is the same.
        unsafe { Q::widen_all(&mut self.wide, &mut self.narrow) };
    }
}

/// In each byte, bits `from..from + width` of vector number `vector` of a group, moved down to `to`.
///
/// # Safety
/// As [`QuantLanes`]; `codes` is a whole activation group's, which has that vector.
#[inline(always)]
unsafe fn piece<Q: QuantLanes>(codes: *const u8, vector: usize, from: usize, width: usize, to: usize) -> Q::Codes {
    // SAFETY: the caller's duties are the same.
    unsafe { Q::field(Q::load_codes(codes.add(vector * 4 * Q::ROWS)), from, width, to) }
}

/// A quad of three-bit codes; its number is a constant at every call.
///
/// # Safety
/// As [`QuantLanes`]; `codes` is a whole activation group's.
#[inline(always)]
unsafe fn three_bits<Q: QuantLanes>(codes: *const u8, quad: usize) -> Q::Codes {
    // SAFETY: the caller's duties are the same; there are three vectors.
    unsafe {
        match quad {
            6 => Q::or(piece::<Q>(codes, 0, 6, 2, 0), piece::<Q>(codes, 2, 6, 1, 2)),
            7 => Q::or(piece::<Q>(codes, 1, 6, 2, 0), piece::<Q>(codes, 2, 7, 1, 2)),
            _ => piece::<Q>(codes, quad / 2, 3 * (quad % 2), 3, 0),
        }
    }
}

/// A quad of four-bit codes; its number is a constant at every call.
///
/// # Safety
/// As [`QuantLanes`]; `codes` is a whole activation group's.
#[inline(always)]
unsafe fn four_bits<Q: QuantLanes>(codes: *const u8, quad: usize) -> Q::Codes {
    // SAFETY: the caller's duties are the same; there are four vectors.
    unsafe { piece::<Q>(codes, quad / 2, 4 * (quad % 2), 4, 0) }
}

/// Stores all quads of a group, cut out by an expression that wants each quad's number as a constant.
macro_rules! unpack_quads {
    ($q:ty, $to:expr, $from:expr, |$codes:ident, $quad:ident| $join:expr) => {
        unpack_quads!($q, $to, $from, |$codes, $quad| $join, 0 1 2 3 4 5 6 7)
    };
    ($q:ty, $to:expr, $from:expr, |$codes:ident, $quad:ident| $join:expr, $($number:literal)*) => {
        $({
            let quad = {
                let ($codes, $quad) = ($from, $number);
                $join
            };
            <$q>::store_codes(quad, $to.add($number * 4 * <$q>::ROWS));
        })*
    };
}

/// Adds the dot products of quads `quad` and `quad + 1` of T unpacked tiles with the eight activations at each `x`. Of
/// several tiles those of a row of activations follow each other, so that what was broadcast serves them all.
///
/// # Safety
/// As [`QuantLanes`]; each of `codes` is a whole activation group's, unpacked.
#[inline(always)]
unsafe fn add_quads<Q: QuantLanes, const N: usize, const T: usize>(
    codes: [*const u8; T],
    quad: usize,
    x: &[*const i8; N],
    sums: &mut [Sums<Q, N>; T],
) {
    // SAFETY: the caller's duties are the same.
    unsafe {
        let mut first = [Q::load_codes(codes[0].add(quad * 4 * Q::ROWS)); T];
        let mut second = [Q::load_codes(codes[0].add((quad + 1) * 4 * Q::ROWS)); T];
        if T == 1 {
            Q::dot_two(&mut sums[0].narrow, first[0], second[0], x);
            return;
        }
        for t in 1..T {
            first[t] = Q::load_codes(codes[t].add(quad * 4 * Q::ROWS));
            second[t] = Q::load_codes(codes[t].add((quad + 1) * 4 * Q::ROWS));
        }
        for n in 0..N {
            for t in 0..T {
                sums[t].narrow[n] = Q::in_order(Q::dot(sums[t].narrow[n], first[t], x[n]));
            }
        }
        for n in 0..N {
            for t in 0..T {
                sums[t].narrow[n] = Q::in_order(Q::dot(sums[t].narrow[n], second[t], x[n].add(4)));
            }
        }
    }
}

/// Widths whose codes are cut out of vectors, as `CodeBits::pieces` says. `pairs` is how many steps of two quads 16 bits
/// hold: a pair sum is at most 2 * (2^bits - 1) * 127, and a step adds two of them.
macro_rules! short_codes {
    ($($name:ident, group: $group:literal, pairs: $pairs:literal, |$codes:ident, $quad:ident| $join:expr;)*) => {
        $(
            pub(in crate::cpu) struct $name;

            impl Codes for $name {
                const BITS: CodeBits = CodeBits::$name;
                const GROUP: usize = $group;
                const MIN_PANEL_PASSES: usize = 3;
                const HAS_BOOK: bool = false;

                #[inline(always)]
                unsafe fn add_pair<Q: QuantLanes, const N: usize, const J: usize>(
                    codes: *const u8,
                    _book: *const u8,
                    x: &[*const i8; N],
                    sums: &mut Sums<Q, N>,
                ) {
                    const { assert!(2 * $pairs * 2 * ((1 << Self::BITS.count()) - 1) * 127 < 1 << 15) };
                    // SAFETY: the caller's duties; there are eight quads of codes and of activations.
                    unsafe {
                        let first = {
                            let ($codes, $quad) = (codes, 2 * J);
                            $join
                        };
                        let second = {
                            let ($codes, $quad) = (codes, 2 * J + 1);
                            $join
                        };
                        Q::dot_two(&mut sums.narrow, first, second, &x.map(|x| x.add(8 * J)));
                        if (J + 1).is_multiple_of($pairs) {
                            sums.widen();
                        }
                    }
                }

                #[inline(always)]
                unsafe fn add_unpacked<Q: QuantLanes, const N: usize, const T: usize, const J: usize>(
                    codes: [*const u8; T],
                    x: &[*const i8; N],
                    sums: &mut [Sums<Q, N>; T],
                ) {
                    // SAFETY: the caller's duties; there are eight quads of codes and of activations.
                    unsafe {
                        add_quads::<Q, N, T>(codes, 2 * J, &x.map(|x| x.add(8 * J)), sums);
                        if (J + 1).is_multiple_of($pairs) {
                            for t in 0..T {
                                sums[t].widen();
                            }
                        }
                    }
                }

                #[inline(always)]
                unsafe fn unpack<Q: QuantLanes>(codes: *const u8, _book: *const u8, to: *mut u8) {
                    // SAFETY: the caller's duties; there are eight quads.
                    unsafe {
                        unpack_quads!(Q, to, codes, |$codes, $quad| $join);
                    }
                }

                #[inline(always)]
                fn offset<Q: QuantLanes>(with_mins: bool) -> i32 {
                    if with_mins { 0 } else { 1 << (Self::BITS.count() - 1) }
                }
            }
        )*
    };
}

short_codes! {
    Two, group: 16, pairs: 2, |codes, quad| piece::<Q>(codes, quad / 4, 2 * (quad % 4), 2, 0);
    Three, group: 16, pairs: 2, |codes, quad| three_bits::<Q>(codes, quad);
    Four, group: 32, pairs: 4, |codes, quad| four_bits::<Q>(codes, quad);
    Five, group: 32, pairs: 2, |codes, quad| match quad {
        5 => Q::or(piece::<Q>(codes, 0, 5, 3, 0), piece::<Q>(codes, 1, 6, 2, 3)),
        6 => Q::or(piece::<Q>(codes, 2, 5, 3, 0), piece::<Q>(codes, 3, 6, 2, 3)),
        7 => {
            let upper = Q::or(piece::<Q>(codes, 1, 5, 1, 3), piece::<Q>(codes, 3, 5, 1, 4));
            Q::or(piece::<Q>(codes, 4, 5, 3, 0), upper)
        }
        _ => piece::<Q>(codes, quad, 0, 5, 0),
    };
    Six, group: 16, pairs: 1, |codes, quad| {
        let first = quad / 4 * 3;
        if quad % 4 < 3 {
            piece::<Q>(codes, first + quad % 4, 0, 6, 0)
        } else {
            let lower = Q::or(piece::<Q>(codes, first + 1, 6, 2, 2), piece::<Q>(codes, first + 2, 6, 2, 0));
            Q::or(piece::<Q>(codes, first, 6, 2, 4), lower)
        }
    };
}

/// Widths whose codes are looked up in a book, which gives bytes.
macro_rules! book_codes {
    ($($name:ident, bits: $bits:ident, group: $group:literal, |$codes:ident, $quad:ident| $cut:expr;)*) => {
        $(
            pub(in crate::cpu) struct $name;

            impl Codes for $name {
                const BITS: CodeBits = CodeBits::$bits;
                const GROUP: usize = $group;
                const MIN_PANEL_PASSES: usize = 3;
                const HAS_BOOK: bool = true;

                #[inline(always)]
                unsafe fn add_pair<Q: QuantLanes, const N: usize, const J: usize>(
                    codes: *const u8,
                    book: *const u8,
                    x: &[*const i8; N],
                    sums: &mut Sums<Q, N>,
                ) {
                    // SAFETY: the caller's duties; there are eight quads of codes and of activations.
                    unsafe {
                        let book = Q::load_codes(book);
                        let first = {
                            let ($codes, $quad) = (codes, 2 * J);
                            Q::bytes(Q::look_up(book, $cut))
                        };
                        let second = {
                            let ($codes, $quad) = (codes, 2 * J + 1);
                            Q::bytes(Q::look_up(book, $cut))
                        };
                        sums.add_bytes::<J, $group>(first, second, x);
                    }
                }

                #[inline(always)]
                unsafe fn add_unpacked<Q: QuantLanes, const N: usize, const T: usize, const J: usize>(
                    codes: [*const u8; T],
                    x: &[*const i8; N],
                    sums: &mut [Sums<Q, N>; T],
                ) {
                    // SAFETY: the caller's duties; there are eight vectors of bytes and eight quads of activations.
                    unsafe {
                        for t in 0..T {
                            let first = Q::bytes(Q::load_codes(codes[t].add(2 * J * 4 * Q::ROWS)));
                            let second = Q::bytes(Q::load_codes(codes[t].add((2 * J + 1) * 4 * Q::ROWS)));
                            sums[t].add_bytes::<J, $group>(first, second, x);
                        }
                    }
                }

                #[inline(always)]
                unsafe fn unpack<Q: QuantLanes>(codes: *const u8, book: *const u8, to: *mut u8) {
                    // SAFETY: the caller's duties; there are eight quads.
                    unsafe {
                        let book = Q::load_codes(book);
                        unpack_quads!(Q, to, codes, |$codes, $quad| Q::look_up(book, $cut));
                    }
                }

                #[inline(always)]
                fn offset<Q: QuantLanes>(_with_mins: bool) -> i32 {
                    Q::BYTES_OFFSET
                }
            }
        )*
    };
}

book_codes! {
    ThreeFromBook, bits: Three, group: 16, |codes, quad| three_bits::<Q>(codes, quad);
    FourFromBook, bits: Four, group: 32, |codes, quad| four_bits::<Q>(codes, quad);
}

/// 8 bits: a quad is a vector.
pub(in crate::cpu) struct Eight;

impl Codes for Eight {
    const BITS: CodeBits = CodeBits::Eight;
    const GROUP: usize = 32;
    /// There is nothing to unpack.
    const MIN_PANEL_PASSES: usize = usize::MAX;
    const HAS_BOOK: bool = false;

    #[inline(always)]
    unsafe fn add_pair<Q: QuantLanes, const N: usize, const J: usize>(
        codes: *const u8,
        _book: *const u8,
        x: &[*const i8; N],
        sums: &mut Sums<Q, N>,
    ) {
        // SAFETY: the caller's duties; a group has eight vectors of codes and eight quads of activations.
        unsafe {
            let first = Q::bytes(Q::load_codes(codes.add(2 * J * 4 * Q::ROWS)));
            let second = Q::bytes(Q::load_codes(codes.add((2 * J + 1) * 4 * Q::ROWS)));
            sums.add_bytes::<J, 32>(first, second, x);
        }
    }

    /// Bytes are unpacked as they lie.
    #[inline(always)]
    unsafe fn add_unpacked<Q: QuantLanes, const N: usize, const T: usize, const J: usize>(
        codes: [*const u8; T],
        x: &[*const i8; N],
        sums: &mut [Sums<Q, N>; T],
    ) {
        for t in 0..T {
            // SAFETY: the caller's duties are the same.
            unsafe { Self::add_pair::<Q, N, J>(codes[t], codes[t], x, &mut sums[t]) };
        }
    }

    #[inline(always)]
    unsafe fn unpack<Q: QuantLanes>(codes: *const u8, _book: *const u8, to: *mut u8) {
        // SAFETY: the caller's duties; a group has eight vectors.
        unsafe { codes.copy_to_nonoverlapping(to, 8 * 4 * Q::ROWS) };
    }

    #[inline(always)]
    fn offset<Q: QuantLanes>(_with_mins: bool) -> i32 {
        Q::BYTES_OFFSET
    }
}

/// Which of an activation group's codes a group of weights meets.
#[derive(Clone, Copy)]
pub(in crate::cpu) enum Part {
    Whole,
    First,
    Second,
}

impl Part {
    /// The sum of those codes.
    #[inline(always)]
    fn sum(self, x: &GroupScales) -> i32 {
        match self {
            Self::Whole => x.sum,
            Self::First => x.first_sum,
            Self::Second => x.sum - x.first_sum,
        }
    }

    /// The same times their scale.
    #[inline(always)]
    pub(in crate::cpu) fn scaled_sum(self, x: &GroupScales) -> f32 {
        match self {
            Self::Whole => x.scaled_sum,
            Self::First | Self::Second => x.scale * self.sum(x) as f32,
        }
    }
}
