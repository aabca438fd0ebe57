//! Quantised products: a tile's rows in a vector, four activations broadcast.
//!
//! ```text
//! for each tile, for N activation rows:
//!     for group in ascending order:
//!         for each pair of vectors of the group's codes:     loaded and unpacked once
//!             for n in 0..N: sums[n] += dot of 4 (codes, broadcast x[n])      exact integers
//!         for n in 0..N: acc[n] += float(sums[n]) * (scale * x_scale[n]) [+ min * x_scaled_sum[n]]
//! ```
//!
//! Formats with a scale for 16 weights do the last line twice, once for each half of a group. A scale of two levels is
//! multiplied out first, which is exact in f32 (11 bits by 8), so the order of roundings is one for all formats.
//!
//! What pays: the unpacking of a group is shared by N rows; codes are kept unsigned, as the instructions want them, and
//! what was added to make them so is taken off by the activations' sum before a group's sums begin; pair sums of short
//! codes fit 16 bits several times over (8 of at most 2 * 15 * 127 for four bits, a whole group), so sets without a
//! four-way product widen once for all of those, not once a load; the minimum's term is one multiply-add, since the
//! activations' group sums were made once. Rows are shared out evenly (9 rows with N = 8 go as 5 and 4), because a pass
//! over the weights costs the same for one row as for three.
//!
//! Tried: codes of 5, 6 and 3 bits as nibbles (or pairs) and a plane of what is left. Every quad then needs two pieces,
//! where now most need one; a lone row took 15 to 34 per cent longer. Five rows at a time on AVX2 spill.

use half::f16;

use super::QuantLanes;
use crate::cpu::task::{Output, QuantGroup, QuantTask};
use crate::pack::{CodeBits, GROUP, QuantFormat, Quantized, SUPER_GROUP, Scaling};

/// One width of codes.
pub(in crate::cpu) trait Codes {
    const BITS: CodeBits;
    /// Weights that share a scale.
    const GROUP: usize;

    /// Adds the dot products of quads `2 J` and `2 J + 1` of an activation group, for each row `x[n]` of activations;
    /// what is added is in `sums.wide` after J = 1 where groups are half as long, and after J = 3.
    ///
    /// # Safety
    /// As [`QuantLanes`]; `codes` is a whole activation group's, each of `x` has 32 codes.
    unsafe fn add_pair<Q: QuantLanes, const N: usize, const J: usize>(
        codes: *const u8,
        x: &[*const i8; N],
        sums: &mut Sums<Q, N>,
    );

    /// What was added to the codes to make them unsigned.
    fn offset<Q: QuantLanes>(with_mins: bool) -> i32;
}

/// A group's integer sums for N rows of activations: those being added to, and those in 32 bits.
pub(in crate::cpu) struct Sums<Q: QuantLanes, const N: usize> {
    narrow: [Q::Narrow; N],
    wide: [Q::Sums; N],
}

impl<Q: QuantLanes, const N: usize> Sums<Q, N> {
    /// For the weights that `part` says: what was added to their codes is taken off before they come.
    ///
    /// # Safety
    /// As [`QuantLanes`]; `x[n]` is valid.
    #[inline(always)]
    unsafe fn start<C: Codes, S: Scales>(x: &[*const QuantGroup; N], part: Part) -> Self {
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

/// Widths whose codes are cut out of vectors, as `CodeBits::pieces` says. `pairs` is how many steps of two quads 16 bits
/// hold: a pair sum is at most 2 * (2^bits - 1) * 127, and a step adds two of them.
macro_rules! short_codes {
    ($($name:ident, group: $group:literal, pairs: $pairs:literal, |$codes:ident, $quad:ident| $join:expr;)*) => {
        $(
            pub(in crate::cpu) struct $name;

            impl Codes for $name {
                const BITS: CodeBits = CodeBits::$name;
                const GROUP: usize = $group;

                #[inline(always)]
                unsafe fn add_pair<Q: QuantLanes, const N: usize, const J: usize>(
                    codes: *const u8,
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
                fn offset<Q: QuantLanes>(with_mins: bool) -> i32 {
                    if with_mins { 0 } else { 1 << (Self::BITS.count() - 1) }
                }
            }
        )*
    };
}

short_codes! {
    Two, group: 16, pairs: 2, |codes, quad| piece::<Q>(codes, quad / 4, 2 * (quad % 4), 2, 0);
    Three, group: 16, pairs: 2, |codes, quad| match quad {
        6 => Q::or(piece::<Q>(codes, 0, 6, 2, 0), piece::<Q>(codes, 2, 6, 1, 2)),
        7 => Q::or(piece::<Q>(codes, 1, 6, 2, 0), piece::<Q>(codes, 2, 7, 1, 2)),
        _ => piece::<Q>(codes, quad / 2, 3 * (quad % 2), 3, 0),
    };
    Four, group: 32, pairs: 4, |codes, quad| piece::<Q>(codes, quad / 2, 4 * (quad % 2), 4, 0);
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

/// 8 bits: a quad is a vector.
pub(in crate::cpu) struct Eight;

impl Codes for Eight {
    const BITS: CodeBits = CodeBits::Eight;
    const GROUP: usize = 32;

    #[inline(always)]
    unsafe fn add_pair<Q: QuantLanes, const N: usize, const J: usize>(
        codes: *const u8,
        x: &[*const i8; N],
        sums: &mut Sums<Q, N>,
    ) {
        // SAFETY: the caller's duties; a group has eight vectors of codes and eight quads of activations.
        unsafe {
            let first = Q::load_bytes(codes.add(2 * J * 4 * Q::ROWS).cast());
            let second = Q::load_bytes(codes.add((2 * J + 1) * 4 * Q::ROWS).cast());
            Q::dot_two_bytes(&mut sums.wide, &mut sums.narrow, first, second, &x.map(|x| x.add(8 * J)));
            if Q::BYTES_ARE_NARROW && J == 3 {
                sums.widen();
            }
        }
    }

    #[inline(always)]
    fn offset<Q: QuantLanes>(_with_mins: bool) -> i32 {
        Q::BYTES_OFFSET
    }
}

/// Calls `$body::<.., n>` for a count known only now.
macro_rules! with_columns {
    ($count:expr, $max:expr, $body:ident::<$q:ty, $codes:ty, $scales:ty>($($argument:expr),*)) => {
        match $count {
            1 => $body::<$q, $codes, $scales, 1>($($argument),*),
            2 => $body::<$q, $codes, $scales, 2>($($argument),*),
            3 => $body::<$q, $codes, $scales, 3>($($argument),*),
            4 => $body::<$q, $codes, $scales, 4>($($argument),*),
            5 if $max >= 5 => $body::<$q, $codes, $scales, 5>($($argument),*),
            6 if $max >= 6 => $body::<$q, $codes, $scales, 6>($($argument),*),
            7 if $max >= 7 => $body::<$q, $codes, $scales, 7>($($argument),*),
            8 if $max >= 8 => $body::<$q, $codes, $scales, 8>($($argument),*),
            _ => {}
        }
    };
}

/// Product with codes of one width and one kind of scales, up to `N` (4 to 8) activation rows at a time.
///
/// # Safety
/// As [`QuantLanes`]; the task's ranges lie within its buffers; the matrix lies in tiles of `Q::ROWS`.
#[inline(always)]
pub(in crate::cpu) unsafe fn multiply<Q: QuantLanes, C: Codes, S: Scales, const N: usize>(task: &QuantTask<'_>) {
    let format = QuantFormat { bits: C::BITS, scaling: S::SCALING, with_mins: S::WITH_MINS };
    assert_eq!(task.weights.format, format, "a kernel met another format");
    let lens = TileLens::new(task.weights);
    for tile in task.tiles.clone() {
        let passes = task.m.len().div_ceil(N);
        for pass in 0..passes {
            let m = task.m.start + pass * task.m.len() / passes;
            let count = task.m.start + (pass + 1) * task.m.len() / passes - m;
            // SAFETY: the caller's duties; rows `m..m + count` are the task's and `count <= N`.
            unsafe { with_columns!(count, N, rows::<Q, C, S>(task, &lens, tile, m)) };
        }
    }
}

/// Elements of a tile in each of a matrix's buffers. Made once a task: divisions in the loop over tiles took
/// a lone row up to a tenth longer.
struct TileLens {
    codes: usize,
    scales: usize,
    mins: usize,
    sub_scales: usize,
    sub_mins: usize,
}

impl TileLens {
    fn new(w: &Quantized) -> Self {
        // A buffer holds a whole number of tiles.
        let tiles = w.tiles().max(1);
        Self {
            codes: w.codes.len() / tiles,
            scales: w.scales.len() / tiles,
            mins: w.mins.len() / tiles,
            sub_scales: w.sub_scales.len() / tiles,
            sub_mins: w.sub_mins.len() / tiles,
        }
    }
}

/// Where a tile's codes and scales and `N` activation rows begin.
pub(in crate::cpu) struct Pointers<const N: usize> {
    codes: *const u8,
    scales: *const f16,
    /// What the matrix does not have is an empty slice's pointer, here and below.
    mins: *const f16,
    sub_scales: *const i8,
    sub_mins: *const i8,
    x: [*const QuantGroup; N],
}

impl<const N: usize> Pointers<N> {
    /// Checks bounds here, so that the loops need not.
    #[inline(always)]
    fn new(task: &QuantTask<'_>, lens: &TileLens, tile: usize, m: usize) -> Self {
        let (w, x) = (task.weights, &task.x);
        let groups = w.groups();
        assert_eq!(groups, x.groups, "activations and weights differ in length");
        let mut pointers = Self {
            codes: w.codes[tile * lens.codes..(tile + 1) * lens.codes].as_ptr(),
            scales: w.scales[tile * lens.scales..(tile + 1) * lens.scales].as_ptr(),
            mins: w.mins[tile * lens.mins..(tile + 1) * lens.mins].as_ptr(),
            sub_scales: w.sub_scales[tile * lens.sub_scales..(tile + 1) * lens.sub_scales].as_ptr(),
            sub_mins: w.sub_mins[tile * lens.sub_mins..(tile + 1) * lens.sub_mins].as_ptr(),
            x: [std::ptr::null(); N],
        };
        for n in 0..N {
            pointers.x[n] = x.rows[(m + n) * groups..(m + n + 1) * groups].as_ptr();
        }
        pointers
    }
}

/// One way of keeping scales and minimums, known when compiling, so that the loop over groups asks nothing.
pub(in crate::cpu) trait Scales {
    const SCALING: Scaling;
    const WITH_MINS: bool;

    /// Scales of groups number `index` of a tile.
    ///
    /// # Safety
    /// As [`QuantLanes`]; the pointers are into a matrix of this scaling with codes of `C`, which has so many groups.
    unsafe fn scales<Q: QuantLanes, C: Codes, const N: usize>(pointers: &Pointers<N>, index: usize) -> Q::Floats;

    /// Their minimums.
    ///
    /// # Safety
    /// As `scales`, and the matrix has minimums.
    unsafe fn mins<Q: QuantLanes, C: Codes, const N: usize>(pointers: &Pointers<N>, index: usize) -> Q::Floats;
}

/// [`Scaling::Single`].
pub(in crate::cpu) struct Single<const MINS: bool>;

impl<const MINS: bool> Scales for Single<MINS> {
    const SCALING: Scaling = Scaling::Single;
    const WITH_MINS: bool = MINS;

    #[inline(always)]
    unsafe fn scales<Q: QuantLanes, C: Codes, const N: usize>(pointers: &Pointers<N>, index: usize) -> Q::Floats {
        // SAFETY: the caller's duties; a group has ROWS scales.
        unsafe { Q::load_scales(pointers.scales.add(index * Q::ROWS)) }
    }

    #[inline(always)]
    unsafe fn mins<Q: QuantLanes, C: Codes, const N: usize>(pointers: &Pointers<N>, index: usize) -> Q::Floats {
        // SAFETY: the caller's duties; a group has ROWS minimums.
        unsafe { Q::load_scales(pointers.mins.add(index * Q::ROWS)) }
    }
}

/// Where the upper scales of groups number `index` lie.
#[inline(always)]
fn upper<Q: QuantLanes, C: Codes>(index: usize) -> usize {
    index / (SUPER_GROUP / C::GROUP) * Q::ROWS
}

/// [`Scaling::TwoLevel`].
pub(in crate::cpu) struct TwoLevel<const MINS: bool>;

impl<const MINS: bool> Scales for TwoLevel<MINS> {
    const SCALING: Scaling = Scaling::TwoLevel;
    const WITH_MINS: bool = MINS;

    #[inline(always)]
    unsafe fn scales<Q: QuantLanes, C: Codes, const N: usize>(pointers: &Pointers<N>, index: usize) -> Q::Floats {
        // SAFETY: the caller's duties; a group has ROWS sub-scales, and 256 weights have ROWS upper ones.
        unsafe {
            let upper = Q::load_scales(pointers.scales.add(upper::<Q, C>(index)));
            Q::mul(upper, Q::load_sub_scales(pointers.sub_scales.add(index * Q::ROWS)))
        }
    }

    #[inline(always)]
    unsafe fn mins<Q: QuantLanes, C: Codes, const N: usize>(pointers: &Pointers<N>, index: usize) -> Q::Floats {
        // SAFETY: as above.
        unsafe {
            let upper = Q::load_scales(pointers.mins.add(upper::<Q, C>(index)));
            Q::mul(upper, Q::load_sub_scales(pointers.sub_mins.add(index * Q::ROWS)))
        }
    }
}

/// [`Scaling::Nibbles`].
pub(in crate::cpu) struct Nibbles;

impl Scales for Nibbles {
    const SCALING: Scaling = Scaling::Nibbles;
    const WITH_MINS: bool = true;

    #[inline(always)]
    unsafe fn scales<Q: QuantLanes, C: Codes, const N: usize>(pointers: &Pointers<N>, index: usize) -> Q::Floats {
        // SAFETY: the caller's duties; a group has ROWS bytes, and 256 weights have ROWS upper scales.
        unsafe {
            let upper = Q::load_scales(pointers.scales.add(upper::<Q, C>(index)));
            Q::mul(upper, Q::load_sub_nibbles(pointers.sub_scales.add(index * Q::ROWS)).0)
        }
    }

    #[inline(always)]
    unsafe fn mins<Q: QuantLanes, C: Codes, const N: usize>(pointers: &Pointers<N>, index: usize) -> Q::Floats {
        // SAFETY: as above.
        unsafe {
            let upper = Q::load_scales(pointers.mins.add(upper::<Q, C>(index)));
            Q::mul(upper, Q::load_sub_nibbles(pointers.sub_scales.add(index * Q::ROWS)).1)
        }
    }
}

/// # Safety
/// As [`multiply`]; rows `m..m + N` and the tile are the task's.
#[inline(always)]
unsafe fn rows<Q: QuantLanes, C: Codes, S: Scales, const N: usize>(
    task: &QuantTask<'_>,
    lens: &TileLens,
    tile: usize,
    m: usize,
) {
    let groups = task.weights.groups();
    let pointers = Pointers::<N>::new(task, lens, tile, m);
    // SAFETY: all pointers come from slices of exactly one tile or one row, and every offset stays below their
    // `groups`; the rest is the caller's duty.
    unsafe {
        let mut acc = [Q::zero(); N];
        for group in 0..groups {
            let codes = pointers.codes.add(group * C::BITS.count() * 4 * Q::ROWS);
            let mut x = [std::ptr::null(); N];
            let mut x_codes = [std::ptr::null(); N];
            for n in 0..N {
                x[n] = pointers.x[n].add(group);
                x_codes[n] = x[n].cast::<i8>();
            }
            if C::GROUP == GROUP {
                let mut sums = Sums::<Q, N>::start::<C, S>(&x, Part::Whole);
                C::add_pair::<Q, N, 0>(codes, &x_codes, &mut sums);
                C::add_pair::<Q, N, 1>(codes, &x_codes, &mut sums);
                C::add_pair::<Q, N, 2>(codes, &x_codes, &mut sums);
                C::add_pair::<Q, N, 3>(codes, &x_codes, &mut sums);
                finish::<Q, C, S, N>(&pointers, group, Part::Whole, &x, &sums, &mut acc);
            } else {
                let mut sums = Sums::<Q, N>::start::<C, S>(&x, Part::First);
                C::add_pair::<Q, N, 0>(codes, &x_codes, &mut sums);
                C::add_pair::<Q, N, 1>(codes, &x_codes, &mut sums);
                finish::<Q, C, S, N>(&pointers, 2 * group, Part::First, &x, &sums, &mut acc);
                let mut sums = Sums::<Q, N>::start::<C, S>(&x, Part::Second);
                C::add_pair::<Q, N, 2>(codes, &x_codes, &mut sums);
                C::add_pair::<Q, N, 3>(codes, &x_codes, &mut sums);
                finish::<Q, C, S, N>(&pointers, 2 * group + 1, Part::Second, &x, &sums, &mut acc);
            }
        }
        for n in 0..N {
            store::<Q>(task.out, m + n, tile, acc[n]);
        }
    }
}

/// Which of an activation group's codes a group of weights meets.
#[derive(Clone, Copy)]
enum Part {
    Whole,
    First,
    Second,
}

impl Part {
    /// The sum of those codes.
    #[inline(always)]
    fn sum(self, x: &QuantGroup) -> i32 {
        match self {
            Self::Whole => x.sum,
            Self::First => x.first_sum,
            Self::Second => x.sum - x.first_sum,
        }
    }

    /// The same times their scale.
    #[inline(always)]
    fn scaled_sum(self, x: &QuantGroup) -> f32 {
        match self {
            Self::Whole => x.scaled_sum,
            Self::First | Self::Second => x.scale * self.sum(x) as f32,
        }
    }
}

/// Takes group number `index` of the weights, whose sums are whole, into the accumulators.
///
/// # Safety
/// As [`rows`]; the tile has such a group, `x[n]` is the activations' that it meets.
#[inline(always)]
unsafe fn finish<Q: QuantLanes, C: Codes, S: Scales, const N: usize>(
    pointers: &Pointers<N>,
    index: usize,
    part: Part,
    x: &[*const QuantGroup; N],
    sums: &Sums<Q, N>,
    acc: &mut [Q::Floats; N],
) {
    // SAFETY: the caller's duties are the same.
    unsafe {
        let scales = S::scales::<Q, C, N>(pointers, index);
        let mins = if S::WITH_MINS { S::mins::<Q, C, N>(pointers, index) } else { Q::zero() };
        for n in 0..N {
            let scale = Q::mul(scales, Q::splat((*x[n]).scale));
            acc[n] = Q::mul_add(Q::to_floats(sums.wide[n]), scale, acc[n]);
            if S::WITH_MINS {
                acc[n] = Q::mul_add(mins, Q::splat(part.scaled_sum(&*x[n])), acc[n]);
            }
        }
    }
}

/// # Safety
/// As [`QuantLanes`]; the elements belong to the task.
#[inline(always)]
unsafe fn store<Q: QuantLanes>(out: &Output<'_>, m: usize, tile: usize, sums: Q::Floats) {
    let first_row = tile * Q::ROWS;
    // SAFETY: the slices have at least ROWS elements where vectors touch them; else the caller's duty.
    unsafe {
        if first_row + Q::ROWS > out.rows {
            let mut tail = [0.0; 16];
            Q::store(sums, tail.as_mut_ptr());
            out.store(m, first_row, &tail[..Q::ROWS]);
            return;
        }
        let start = m * out.rows + first_row;
        let to = out.elements.slice(start..start + Q::ROWS).as_mut_ptr();
        let mut sums = sums;
        if let Some(bias) = out.bias {
            sums = Q::add(sums, Q::load(bias[first_row..first_row + Q::ROWS].as_ptr()));
        }
        if out.accumulate {
            sums = Q::add(Q::load(to), sums);
        }
        Q::store(sums, to);
    }
}
