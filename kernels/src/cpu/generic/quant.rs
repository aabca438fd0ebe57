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
//! For many rows (three panels of them and more) a tile's codes and scales are unpacked once, some groups at a time, into
//! memory that stays in the first-level cache, and every panel passes over that; the sums are the same ones in the same
//! order.
//!
//! What pays (figures in `benches/RESULTS.md`): weights are asked for some groups ahead; N rows' sums advance in turns,
//! held in place by `in_order`, because the chain of a single row's eight dependent products is longer than a core looks
//! ahead; a panel's activations lie together, so one pointer and fixed distances serve N rows, where N pointers would not
//! fit the registers; accumulators leave for memory before the long loop that stores outputs, which would keep them
//! there throughout. The unpacking of a group is shared by N rows; codes are kept unsigned, as the instructions want
//! them, and what was added to make them so is taken off by the activations' sum before a group's sums begin; pair sums of short
//! codes fit 16 bits several times over (8 of at most 2 * 15 * 127 for four bits, a whole group), so sets without a
//! four-way product widen once for all of those, not once a load; the minimum's term is one multiply-add, since the
//! activations' group sums were made once. Rows are shared out evenly (9 rows with N = 8 go as 5 and 4), because a pass
//! over the weights costs the same for one row as for three; `Panels` does that.
//!
//! Tried: codes of 5, 6 and 3 bits as nibbles (or pairs) and a plane of what is left. Every quad then needs two pieces,
//! where now most need one; a lone row took 15 to 34 per cent longer. Five rows at a time on AVX2 spill. Unpacking once for
//! two panels: 25 per cent slower than unpacking twice, as nothing is multiplied while the weights come.

use half::f16;

use super::QuantLanes;
use crate::cpu::prefetch::{LINE_BYTES, prefetch};
use crate::cpu::task::{Line, Output, QuantGroup, QuantTask};
use crate::pack::{CodeBits, GROUP, QuantFormat, Quantized, SUPER_GROUP, Scaling};

/// One width of codes.
pub(in crate::cpu) trait Codes {
    const BITS: CodeBits;
    /// Weights that share a scale.
    const GROUP: usize;
    /// Passes over a tile from which on it pays to unpack it once for all of them.
    const MIN_PANEL_PASSES: usize;

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

    /// As `add_pair`, from codes that `unpack` wrote: a vector a quad.
    ///
    /// # Safety
    /// As `add_pair`; `codes` is a whole activation group's, unpacked.
    unsafe fn add_unpacked<Q: QuantLanes, const N: usize, const J: usize>(
        codes: *const u8,
        x: &[*const i8; N],
        sums: &mut Sums<Q, N>,
    );

    /// Lays an activation group's codes out as a vector a quad.
    ///
    /// # Safety
    /// As [`QuantLanes`]; `codes` is a whole activation group's, `to` has room for eight vectors.
    unsafe fn unpack<Q: QuantLanes>(codes: *const u8, to: *mut u8);

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
                unsafe fn add_unpacked<Q: QuantLanes, const N: usize, const J: usize>(
                    codes: *const u8,
                    x: &[*const i8; N],
                    sums: &mut Sums<Q, N>,
                ) {
                    // SAFETY: the caller's duties; there are eight quads of codes and of activations.
                    unsafe {
                        let first = Q::load_codes(codes.add(2 * J * 4 * Q::ROWS));
                        let second = Q::load_codes(codes.add((2 * J + 1) * 4 * Q::ROWS));
                        Q::dot_two(&mut sums.narrow, first, second, &x.map(|x| x.add(8 * J)));
                        if (J + 1).is_multiple_of($pairs) {
                            sums.widen();
                        }
                    }
                }

                #[inline(always)]
                unsafe fn unpack<Q: QuantLanes>(codes: *const u8, to: *mut u8) {
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
    /// There is nothing to unpack.
    const MIN_PANEL_PASSES: usize = usize::MAX;

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

    /// Bytes are unpacked as they lie.
    #[inline(always)]
    unsafe fn add_unpacked<Q: QuantLanes, const N: usize, const J: usize>(
        codes: *const u8,
        x: &[*const i8; N],
        sums: &mut Sums<Q, N>,
    ) {
        // SAFETY: the caller's duties are the same.
        unsafe { Self::add_pair::<Q, N, J>(codes, x, sums) };
    }

    #[inline(always)]
    unsafe fn unpack<Q: QuantLanes>(codes: *const u8, to: *mut u8) {
        // SAFETY: the caller's duties; a group has eight vectors.
        unsafe { codes.copy_to_nonoverlapping(to, 8 * 4 * Q::ROWS) };
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
            9 if $max >= 9 => $body::<$q, $codes, $scales, 9>($($argument),*),
            10 if $max >= 10 => $body::<$q, $codes, $scales, 10>($($argument),*),
            11 if $max >= 11 => $body::<$q, $codes, $scales, 11>($($argument),*),
            12 if $max >= 12 => $body::<$q, $codes, $scales, 12>($($argument),*),
            13 if $max >= 13 => $body::<$q, $codes, $scales, 13>($($argument),*),
            14 if $max >= 14 => $body::<$q, $codes, $scales, 14>($($argument),*),
            15 if $max >= 15 => $body::<$q, $codes, $scales, 15>($($argument),*),
            16 if $max >= 16 => $body::<$q, $codes, $scales, 16>($($argument),*),
            _ => unreachable!("a panel of more rows than the table has columns"),
        }
    };
}

/// Product with codes of one width and one kind of scales, up to `N` activation rows at a time.
///
/// # Safety
/// As [`QuantLanes`]; the task's ranges lie within its buffers; the matrix lies in tiles of `Q::ROWS`.
#[inline(always)]
pub(in crate::cpu) unsafe fn multiply<Q: QuantLanes, C: Codes, S: Scales, const N: usize>(task: &mut QuantTask<'_>) {
    let format = QuantFormat { bits: C::BITS, scaling: S::SCALING, with_mins: S::WITH_MINS };
    assert_eq!(task.weights.format, format, "a kernel met another format");
    let lens = TileLens::new(task.weights);
    // Without inputs there is nothing to unpack, and no last group to store the sums after.
    if task.panels.len() >= C::MIN_PANEL_PASSES && task.weights.groups() > 0 {
        for tile in task.tiles.clone() {
            // SAFETY: the caller's duties are the same.
            unsafe { by_panels::<Q, C, S, N>(task, &lens, tile) };
        }
        return;
    }
    for tile in task.tiles.clone() {
        for panel in task.panels.clone() {
            let num_rows = task.x.panels.rows_of(panel).len();
            // SAFETY: the caller's duties; `num_rows <= N`, as panels are made for the table that this is in.
            unsafe { with_columns!(num_rows, N, rows::<Q, C, S>(task, &lens, tile, panel)) };
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

/// Where a tile's codes and scales begin.
pub(in crate::cpu) struct Pointers {
    codes: *const u8,
    scales: *const f16,
    /// What the matrix does not have is an empty slice's pointer, here and below.
    mins: *const f16,
    sub_scales: *const i8,
    sub_mins: *const i8,
}

impl Pointers {
    /// Checks bounds here, so that the loops need not.
    #[inline(always)]
    fn new(task: &QuantTask<'_>, lens: &TileLens, tile: usize) -> Self {
        let w = task.weights;
        assert_eq!(w.groups(), task.x.panels.groups, "activations and weights differ in length");
        Self {
            codes: w.codes[tile * lens.codes..(tile + 1) * lens.codes].as_ptr(),
            scales: w.scales[tile * lens.scales..(tile + 1) * lens.scales].as_ptr(),
            mins: w.mins[tile * lens.mins..(tile + 1) * lens.mins].as_ptr(),
            sub_scales: w.sub_scales[tile * lens.sub_scales..(tile + 1) * lens.sub_scales].as_ptr(),
            sub_mins: w.sub_mins[tile * lens.sub_mins..(tile + 1) * lens.sub_mins].as_ptr(),
        }
    }
}

/// A panel's activations of one group, `[N]`.
///
/// # Safety
/// `x` is valid for N groups.
#[inline(always)]
unsafe fn group_of_rows<const N: usize>(x: *const QuantGroup) -> ([*const QuantGroup; N], [*const i8; N]) {
    let (mut rows, mut codes) = ([x; N], [x.cast::<i8>(); N]);
    for n in 0..N {
        // SAFETY: the caller's duty.
        rows[n] = unsafe { x.add(n) };
        codes[n] = rows[n].cast();
    }
    (rows, codes)
}

/// One way of keeping scales and minimums, known when compiling, so that the loop over groups asks nothing.
pub(in crate::cpu) trait Scales {
    const SCALING: Scaling;
    const WITH_MINS: bool;

    /// Scales of groups number `index` of a tile.
    ///
    /// # Safety
    /// As [`QuantLanes`]; the pointers are into a matrix of this scaling with codes of `C`, which has so many groups.
    unsafe fn scales<Q: QuantLanes, C: Codes>(pointers: &Pointers, index: usize) -> Q::Floats;

    /// Their minimums.
    ///
    /// # Safety
    /// As `scales`, and the matrix has minimums.
    unsafe fn mins<Q: QuantLanes, C: Codes>(pointers: &Pointers, index: usize) -> Q::Floats;
}

/// [`Scaling::Single`].
pub(in crate::cpu) struct Single<const MINS: bool>;

impl<const MINS: bool> Scales for Single<MINS> {
    const SCALING: Scaling = Scaling::Single;
    const WITH_MINS: bool = MINS;

    #[inline(always)]
    unsafe fn scales<Q: QuantLanes, C: Codes>(pointers: &Pointers, index: usize) -> Q::Floats {
        // SAFETY: the caller's duties; a group has ROWS scales.
        unsafe { Q::load_scales(pointers.scales.add(index * Q::ROWS)) }
    }

    #[inline(always)]
    unsafe fn mins<Q: QuantLanes, C: Codes>(pointers: &Pointers, index: usize) -> Q::Floats {
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
    unsafe fn scales<Q: QuantLanes, C: Codes>(pointers: &Pointers, index: usize) -> Q::Floats {
        // SAFETY: the caller's duties; a group has ROWS sub-scales, and 256 weights have ROWS upper ones.
        unsafe {
            let upper = Q::load_scales(pointers.scales.add(upper::<Q, C>(index)));
            Q::mul(upper, Q::load_sub_scales(pointers.sub_scales.add(index * Q::ROWS)))
        }
    }

    #[inline(always)]
    unsafe fn mins<Q: QuantLanes, C: Codes>(pointers: &Pointers, index: usize) -> Q::Floats {
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
    unsafe fn scales<Q: QuantLanes, C: Codes>(pointers: &Pointers, index: usize) -> Q::Floats {
        // SAFETY: the caller's duties; a group has ROWS bytes, and 256 weights have ROWS upper scales.
        unsafe {
            let upper = Q::load_scales(pointers.scales.add(upper::<Q, C>(index)));
            Q::mul(upper, Q::load_sub_nibbles(pointers.sub_scales.add(index * Q::ROWS)).0)
        }
    }

    #[inline(always)]
    unsafe fn mins<Q: QuantLanes, C: Codes>(pointers: &Pointers, index: usize) -> Q::Floats {
        // SAFETY: as above.
        unsafe {
            let upper = Q::load_scales(pointers.mins.add(upper::<Q, C>(index)));
            Q::mul(upper, Q::load_sub_nibbles(pointers.sub_scales.add(index * Q::ROWS)).1)
        }
    }
}

/// # Safety
/// As [`multiply`]; the panel, of N rows, and the tile are the task's.
#[inline(always)]
unsafe fn rows<Q: QuantLanes, C: Codes, S: Scales, const N: usize>(
    task: &QuantTask<'_>,
    lens: &TileLens,
    tile: usize,
    panel: usize,
) {
    let groups = task.weights.groups();
    let pointers = Pointers::new(task, lens, tile);
    let first_x = task.x.panel(panel)[..groups * N].as_ptr();
    // SAFETY: all pointers come from slices of exactly one tile or one row, and every offset stays below their
    // `groups`; the rest is the caller's duty.
    unsafe {
        let mut acc = [Q::zero(); N];
        for group in 0..groups {
            let codes = pointers.codes.add(group * C::BITS.count() * 4 * Q::ROWS);
            prefetch_group::<Q, C, S>(&pointers, group + AHEAD_GROUPS);
            let (x, x_codes) = group_of_rows::<N>(first_x.add(group * N));
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
        let first_row = task.x.panels.rows_of(panel).start;
        // Through memory: a loop as long as this one would keep the accumulators there all the time.
        let mut finished = [0.0; 16 * MAX_COLUMNS];
        for n in 0..N {
            Q::store(acc[n], finished.as_mut_ptr().add(n * Q::ROWS));
        }
        for n in 0..N {
            store::<Q>(task.out, first_row + n, tile, Q::load(finished.as_ptr().add(n * Q::ROWS)));
        }
    }
}

/// Activation rows at a time at most.
const MAX_COLUMNS: usize = 16;

/// Activation groups of a tile that are unpacked together: with their scales they should stay in the first-level cache
/// while the rows pass over them.
const PANEL_GROUPS: usize = 48;

/// Some groups of a tile, unpacked.
struct Panel {
    /// `[groups, 8, ROWS, 4]`
    codes: *mut u8,
    /// `[groups of weights, ROWS]`
    scales: *mut f32,
    /// Likewise; not touched where the format has no minimums.
    mins: *mut f32,
}

/// All of the task's rows by one tile, whose groups are unpacked some at a time; between panels a row's sums wait in
/// memory.
///
/// # Safety
/// As [`multiply`]; the tile is the task's.
#[inline(always)]
unsafe fn by_panels<Q: QuantLanes, C: Codes, S: Scales, const N: usize>(
    task: &mut QuantTask<'_>,
    lens: &TileLens,
    tile: usize,
) {
    let groups = task.weights.groups();
    let per_group = GROUP / C::GROUP;
    let panel_groups = PANEL_GROUPS.min(groups);
    let scale_lines = panel_groups * per_group * Q::ROWS / 16;
    let code_lines = panel_groups * 8 * Q::ROWS * 4 / 64;
    let num_rows = task.x.panels.rows_of(task.panels.end - 1).end - task.x.panels.rows_of(task.panels.start).start;
    let sum_lines = num_rows * Q::ROWS / 16 + 1;
    let num_lines = code_lines + 2 * scale_lines + 2 + sum_lines;
    if task.scratch.len() < num_lines {
        task.scratch.resize(num_lines, Line::default());
    }
    let weights = Pointers::new(task, lens, tile);
    // SAFETY: the scratch has room for all four parts, one after the other; groups are the tile's; rows are the task's.
    unsafe {
        let lines = task.scratch.as_mut_ptr();
        let panel = Panel {
            codes: lines.cast(),
            scales: lines.add(code_lines).cast(),
            mins: lines.add(code_lines + scale_lines + 1).cast(),
        };
        let waiting: *mut f32 = lines.add(code_lines + 2 * scale_lines + 2).cast();
        let mut first = 0;
        while first < groups {
            let count = panel_groups.min(groups - first);
            for group in 0..count {
                let from = weights.codes.add((first + group) * C::BITS.count() * 4 * Q::ROWS);
                C::unpack::<Q>(from, panel.codes.add(group * 8 * 4 * Q::ROWS));
                for part in 0..per_group {
                    let (index, to) = ((first + group) * per_group + part, (group * per_group + part) * Q::ROWS);
                    Q::store(S::scales::<Q, C>(&weights, index), panel.scales.add(to));
                    if S::WITH_MINS {
                        Q::store(S::mins::<Q, C>(&weights, index), panel.mins.add(to));
                    }
                }
            }
            let part = PanelPart { first, count, is_first: first == 0, is_last: first + count == groups, waiting };
            for rows in task.panels.clone() {
                let num_rows = task.x.panels.rows_of(rows).len();
                with_columns!(num_rows, N, panel_rows::<Q, C, S>(task, &weights, &panel, &part, tile, rows));
            }
            first += count;
        }
    }
}

/// Which groups a panel holds, and where sums wait for the next one, `[rows, ROWS]`.
struct PanelPart {
    first: usize,
    count: usize,
    is_first: bool,
    is_last: bool,
    waiting: *mut f32,
}

/// As [`rows`], for a panel's groups.
///
/// # Safety
/// As [`rows`]; the panel holds the groups that `part` says, whose sums have room to wait.
#[inline(always)]
unsafe fn panel_rows<Q: QuantLanes, C: Codes, S: Scales, const N: usize>(
    task: &QuantTask<'_>,
    weights: &Pointers,
    panel: &Panel,
    part: &PanelPart,
    tile: usize,
    rows: usize,
) {
    let first_x = task.x.panel(rows)[part.first * N..(part.first + part.count) * N].as_ptr();
    let first_row = task.x.panels.rows_of(rows).start;
    // SAFETY: the pointer above has `count` groups of N rows, the panel too; the rest is the caller's duty.
    unsafe {
        let waiting = part.waiting.add((first_row - task.x.panels.rows_of(task.panels.start).start) * Q::ROWS);
        let mut acc = [Q::zero(); N];
        if !part.is_first {
            for n in 0..N {
                acc[n] = Q::load(waiting.add(n * Q::ROWS));
            }
        }
        for group in 0..part.count {
            let codes = panel.codes.add(group * 8 * 4 * Q::ROWS).cast_const();
            if rows == task.panels.start {
                prefetch_group::<Q, C, S>(weights, part.first + part.count + group);
            }
            let (x, x_codes) = group_of_rows::<N>(first_x.add(group * N));
            if C::GROUP == GROUP {
                let mut sums = Sums::<Q, N>::start::<C, S>(&x, Part::Whole);
                C::add_unpacked::<Q, N, 0>(codes, &x_codes, &mut sums);
                C::add_unpacked::<Q, N, 1>(codes, &x_codes, &mut sums);
                C::add_unpacked::<Q, N, 2>(codes, &x_codes, &mut sums);
                C::add_unpacked::<Q, N, 3>(codes, &x_codes, &mut sums);
                finish_panel::<Q, S, N>(panel, group, Part::Whole, &x, &sums, &mut acc);
            } else {
                let mut sums = Sums::<Q, N>::start::<C, S>(&x, Part::First);
                C::add_unpacked::<Q, N, 0>(codes, &x_codes, &mut sums);
                C::add_unpacked::<Q, N, 1>(codes, &x_codes, &mut sums);
                finish_panel::<Q, S, N>(panel, 2 * group, Part::First, &x, &sums, &mut acc);
                let mut sums = Sums::<Q, N>::start::<C, S>(&x, Part::Second);
                C::add_unpacked::<Q, N, 2>(codes, &x_codes, &mut sums);
                C::add_unpacked::<Q, N, 3>(codes, &x_codes, &mut sums);
                finish_panel::<Q, S, N>(panel, 2 * group + 1, Part::Second, &x, &sums, &mut acc);
            }
        }
        for n in 0..N {
            Q::store(acc[n], waiting.add(n * Q::ROWS));
        }
        if part.is_last {
            for n in 0..N {
                store::<Q>(task.out, first_row + n, tile, Q::load(waiting.add(n * Q::ROWS)));
            }
        }
    }
}

/// # Safety
/// As [`finish`].
#[inline(always)]
unsafe fn finish_panel<Q: QuantLanes, S: Scales, const N: usize>(
    panel: &Panel,
    index: usize,
    part: Part,
    x: &[*const QuantGroup; N],
    sums: &Sums<Q, N>,
    acc: &mut [Q::Floats; N],
) {
    // SAFETY: the caller's duties are the same.
    unsafe {
        let scales = Q::load(panel.scales.add(index * Q::ROWS));
        let mins = if S::WITH_MINS { Q::load(panel.mins.add(index * Q::ROWS)) } else { Q::zero() };
        take_in::<Q, S, N>(scales, mins, part, x, sums, acc);
    }
}

/// How many groups ahead of the one at hand weights are asked for.
const AHEAD_GROUPS: usize = 24;

/// Asks for a group's codes and scales, of this tile or, where the number is too high, of the one behind it.
#[inline(always)]
fn prefetch_group<Q: QuantLanes, C: Codes, S: Scales>(pointers: &Pointers, group: usize) {
    let bytes = C::BITS.count() * 4 * Q::ROWS;
    for line in 0..bytes.div_ceil(LINE_BYTES) {
        prefetch(pointers.codes.wrapping_add(group * bytes + line * LINE_BYTES));
    }
    if S::SCALING == Scaling::Single {
        prefetch(pointers.scales.wrapping_add(group * Q::ROWS).cast());
        if S::WITH_MINS {
            prefetch(pointers.mins.wrapping_add(group * Q::ROWS).cast());
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
    pointers: &Pointers,
    index: usize,
    part: Part,
    x: &[*const QuantGroup; N],
    sums: &Sums<Q, N>,
    acc: &mut [Q::Floats; N],
) {
    // SAFETY: the caller's duties are the same.
    unsafe {
        let scales = S::scales::<Q, C>(pointers, index);
        let mins = if S::WITH_MINS { S::mins::<Q, C>(pointers, index) } else { Q::zero() };
        take_in::<Q, S, N>(scales, mins, part, x, sums, acc);
    }
}

/// # Safety
/// As [`finish`].
#[inline(always)]
unsafe fn take_in<Q: QuantLanes, S: Scales, const N: usize>(
    scales: Q::Floats,
    mins: Q::Floats,
    part: Part,
    x: &[*const QuantGroup; N],
    sums: &Sums<Q, N>,
    acc: &mut [Q::Floats; N],
) {
    // SAFETY: the caller's duties are the same.
    unsafe {
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
        if first_row + Q::ROWS > out.rows.end {
            let mut tail = [0.0; 16];
            Q::store(sums, tail.as_mut_ptr());
            out.store(m, first_row, &tail[..Q::ROWS]);
            return;
        }
        let start = out.index(m, first_row);
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
