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
//! order. Tiles go by turns, a part of their groups each, while that part of the activations is in the second-level cache. Sets of few
//! lanes take two tiles at once, so that an activation broadcast once meets both.
//!
//! What pays (figures in `benches/RESULTS.md`): weights are asked for some groups ahead; N rows' sums advance in turns,
//! held in place by `in_order`, because the chain of a single row's eight dependent products is longer than a core looks
//! ahead; a panel's activations lie together, so two pointers and fixed distances serve N rows, where N pointers would not
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
//! two panels: 25 per cent slower than unpacking twice, as nothing is multiplied while the weights come. Of two tiles, a
//! group's sums taken in while the next group's are made, so that the floating-point part hides behind the products: nothing
//! (Zen 2 is bound by its one unit for `maddubs` either way: 72 cycles for 16 rows, 32 inputs and 4 activations, and takes 85).

use std::arch::asm;
use std::mem::discriminant;
use std::ops::Range;

use super::QuantLanes;
use super::codes::{Codes, Part, Sums};
use super::scales::{Pointers, Scales, TileLens};
use crate::cpu::matmul::even_parts;
use crate::cpu::prefetch::{LINE_BYTES, prefetch, prefetch_to_second};
use crate::cpu::task::{
    GroupPointers, GroupScales, Line, Output, PART_GROUPS, QuantTask, room_to_wait, tiles_by_turns,
};
use crate::quant_format::{CodeBook, GROUP, QuantFormat, Scaling};

/// Calls `$body::<.., n>` for a count known only now.
macro_rules! with_columns {
    ($count:expr, $max:expr, $body:ident::<$($generic:ident),*>($($argument:expr),*)) => {
        match $count {
            1 => $body::<$($generic),*, 1>($($argument),*),
            2 => $body::<$($generic),*, 2>($($argument),*),
            3 => $body::<$($generic),*, 3>($($argument),*),
            4 => $body::<$($generic),*, 4>($($argument),*),
            5 if $max >= 5 => $body::<$($generic),*, 5>($($argument),*),
            6 if $max >= 6 => $body::<$($generic),*, 6>($($argument),*),
            7 if $max >= 7 => $body::<$($generic),*, 7>($($argument),*),
            8 if $max >= 8 => $body::<$($generic),*, 8>($($argument),*),
            9 if $max >= 9 => $body::<$($generic),*, 9>($($argument),*),
            10 if $max >= 10 => $body::<$($generic),*, 10>($($argument),*),
            11 if $max >= 11 => $body::<$($generic),*, 11>($($argument),*),
            12 if $max >= 12 => $body::<$($generic),*, 12>($($argument),*),
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
    const { assert!(N <= MAX_COLUMNS) };
    let QuantFormat { bits, scaling, with_mins, book } = task.weights.format;
    let is_its_scaling = discriminant(&scaling) == discriminant(&S::SCALING);
    let met = (bits, with_mins, book != CodeBook::Linear);
    assert!(is_its_scaling && met == (C::BITS, S::WITH_MINS, C::HAS_BOOK), "a kernel met another format");
    let lens = TileLens::new(task.weights);
    // Without inputs there is nothing to unpack, and no last group to store the sums after.
    if task.panels.len() >= C::MIN_PANEL_PASSES && task.weights.groups() > 0 {
        let mut tiles = task.tiles.clone();
        if Q::PANEL_TILES == 2 {
            let in_twos = tiles.start..tiles.start + tiles.len() / 2 * 2;
            tiles.start = in_twos.end;
            // SAFETY: the caller's duties are the same.
            unsafe { by_panels::<Q, C, S, N, 2>(task, &lens, in_twos) };
        }
        // SAFETY: the caller's duties are the same.
        unsafe { by_panels::<Q, C, S, N, 1>(task, &lens, tiles) };
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
    // SAFETY: all pointers come from slices of exactly one tile or one row, and every offset stays below their
    // `groups`; the rest is the caller's duty.
    unsafe {
        let mut acc = [Q::zero(); N];
        let mut x = task.x.panel(panel);
        for group in 0..groups {
            prefetch_group::<Q, C, S>(&pointers, group + AHEAD_BYTES / group_bytes::<Q, C>());
            add_group::<Q, C, S, N>(&pointers, group, x, &mut acc);
            x = next::<N>(x);
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

/// The next group's N rows.
#[inline(always)]
fn next<const N: usize>(x: GroupPointers) -> GroupPointers {
    GroupPointers { codes: opaque(x.codes.wrapping_add(N)), scales: opaque(x.scales.wrapping_add(N)) }
}

/// The same pointer, of which the compiler knows nothing more. It would otherwise keep several, for a group's first, third,
/// ... quads, and add an index to each: an instruction that multiplies what lies at a sum of two registers is two to the
/// core, and a lone row on AVX-512 took up to a tenth longer.
#[inline(always)]
#[allow(clippy::pointers_in_nomem_asm_block, reason = "it holds no instruction that could follow the pointer")]
fn opaque<T>(mut pointer: *const T) -> *const T {
    // SAFETY: it holds no instruction.
    unsafe { asm!("/* {0} */", inout(reg) pointer, options(nomem, nostack, preserves_flags, pure)) };
    pointer
}

/// Activation rows at a time at most.
const MAX_COLUMNS: usize = 12;

/// Some groups of T tiles, unpacked.
struct Panel {
    /// `[groups, T, 8, ROWS, 4]`
    codes: *mut u8,
    /// `[groups of weights, T, ROWS]`
    scales: *mut f32,
    /// Likewise; not touched where the format has no minimums.
    mins: *mut f32,
}

/// All of the task's rows by `tiles`, T at once, whose groups are unpacked some at a time; between these parts a row's sums
/// wait in memory.
///
/// # Safety
/// As [`multiply`]; the tiles are the task's, a multiple of T.
#[inline(always)]
unsafe fn by_panels<Q: QuantLanes, C: Codes, S: Scales, const N: usize, const T: usize>(
    task: &mut QuantTask<'_>,
    lens: &TileLens,
    tiles: Range<usize>,
) {
    let groups = task.weights.groups();
    let per_group = GROUP / C::GROUP;
    let panel_groups = (PART_GROUPS / T).min(groups);
    let scale_lines = panel_groups * per_group * T * Q::ROWS / 16;
    let code_lines = panel_groups * T * 8 * Q::ROWS * 4 / 64;
    let all_rows = task.x.panels.rows_of_all(&task.panels);
    let sum_lines = all_rows.len() * T * Q::ROWS / 16 + 1;
    let by_turns = tiles_by_turns(groups.div_ceil(panel_groups), sum_lines).min(tiles.len() / T);
    let num_lines = code_lines + 2 * scale_lines + 2 + room_to_wait(by_turns, sum_lines);
    if task.scratch.len() < num_lines {
        task.scratch.resize(num_lines, Line::default());
    }
    let pointers_to = |task: &QuantTask<'_>, at: usize| {
        let mut weights = [Pointers::new(task, lens, tiles.start + at * T); T];
        for t in 1..T {
            weights[t] = Pointers::new(task, lens, tiles.start + at * T + t);
        }
        weights
    };
    // SAFETY: the scratch has room for all four parts, one after the other; groups are the tiles'; rows are the task's.
    unsafe {
        let lines = task.scratch.as_mut_ptr();
        let panel = Panel {
            codes: lines.cast(),
            scales: lines.add(code_lines).cast(),
            mins: lines.add(code_lines + scale_lines + 1).cast(),
        };
        let waiting = lines.add(code_lines + 2 * scale_lines + 2);
        for turns in even_parts(0..tiles.len() / T, by_turns) {
            for first in (0..groups).step_by(panel_groups) {
                let count = panel_groups.min(groups - first);
                for at in turns.clone() {
                    let weights = pointers_to(task, at);
                    for group in 0..count {
                        for t in 0..T {
                            unpack_group::<Q, C, S, T>(&weights[t], first + group, &panel, group, t);
                        }
                    }
                    // What comes next: the same part of the tiles behind, the next part of the first ones, or others.
                    let ahead = if at + 1 < turns.end {
                        (weights, groups * T + first)
                    } else if first + count < groups {
                        (pointers_to(task, turns.start), first + count)
                    } else {
                        (weights, groups * T)
                    };
                    let waiting = waiting.add((at - turns.start) * sum_lines).cast();
                    let part = PanelPart { first, count, ahead, waiting };
                    let tile = tiles.start + at * T;
                    for rows in task.panels.clone() {
                        let num_rows = task.x.panels.rows_of(rows).len();
                        with_columns!(num_rows, N, panel_rows::<Q, C, S, T>(task, &panel, &part, tile, rows));
                    }
                }
            }
        }
    }
}

/// Unpacks group number `from` of a tile, the t-th of T, as the panel's group number `to`.
///
/// # Safety
/// As [`QuantLanes`]; there are such groups.
#[inline(always)]
unsafe fn unpack_group<Q: QuantLanes, C: Codes, S: Scales, const T: usize>(
    weights: &Pointers,
    from: usize,
    panel: &Panel,
    to: usize,
    t: usize,
) {
    let per_group = GROUP / C::GROUP;
    // SAFETY: the caller's duties are the same.
    unsafe {
        let codes = weights.codes.add(from * group_bytes::<Q, C>());
        C::unpack::<Q>(codes, weights.book, panel.codes.add((to * T + t) * 8 * 4 * Q::ROWS));
        for part in 0..per_group {
            let (index, at) = (from * per_group + part, ((to * per_group + part) * T + t) * Q::ROWS);
            Q::store(S::scales::<Q, C>(weights, index), panel.scales.add(at));
            if S::WITH_MINS {
                Q::store(S::mins::<Q, C>(weights, index), panel.mins.add(at));
            }
        }
    }
}

/// Which groups a panel holds, and where their sums wait for those of the next one, `[rows, T, ROWS]`.
struct PanelPart<const T: usize> {
    first: usize,
    count: usize,
    /// Which groups are asked for meanwhile: those from a number on, the groups of the tiles behind being numbered on.
    ahead: ([Pointers; T], usize),
    waiting: *mut f32,
}

/// As [`rows`], for a panel's groups.
///
/// # Safety
/// As [`rows`]; the panel holds the groups that `part` says, whose sums have room to wait.
#[inline(always)]
unsafe fn panel_rows<Q: QuantLanes, C: Codes, S: Scales, const T: usize, const N: usize>(
    task: &QuantTask<'_>,
    panel: &Panel,
    part: &PanelPart<T>,
    tile: usize,
    rows: usize,
) {
    let first_row = task.x.panels.rows_of(rows).start;
    // SAFETY: the panel's activations have all groups; the rest is the caller's duty.
    unsafe {
        let waiting = part.waiting.add((first_row - task.x.panels.rows_of(task.panels.start).start) * T * Q::ROWS);
        let mut acc = [[Q::zero(); N]; T];
        if part.first > 0 {
            for n in 0..N {
                for t in 0..T {
                    acc[t][n] = Q::load(waiting.add((n * T + t) * Q::ROWS));
                }
            }
        }
        let mut x = task.x.panel(rows).add(part.first * N);
        for group in 0..part.count {
            if rows == task.panels.start {
                for t in 0..T {
                    prefetch_group::<Q, C, S>(&part.ahead.0[t], part.ahead.1 + group);
                }
            }
            add_panel_group::<Q, C, S, T, N>(panel, group, x, &mut acc);
            x = next::<N>(x);
        }
        for n in 0..N {
            for t in 0..T {
                Q::store(acc[t][n], waiting.add((n * T + t) * Q::ROWS));
            }
        }
        if part.first + part.count == task.weights.groups() {
            for n in 0..N {
                for t in 0..T {
                    store::<Q>(task.out, first_row + n, tile + t, Q::load(waiting.add((n * T + t) * Q::ROWS)));
                }
            }
        }
    }
}

/// How far ahead of the group at hand codes are asked for.
const AHEAD_BYTES: usize = 4096;

/// Bytes of a group's codes.
const fn group_bytes<Q: QuantLanes, C: Codes>() -> usize {
    C::BITS.count() * 4 * Q::ROWS
}

/// Asks for a group's codes and scales, of this tile or, where the number is too high, of the one behind it.
#[inline(always)]
pub(in crate::cpu) fn prefetch_group<Q: QuantLanes, C: Codes, S: Scales>(pointers: &Pointers, group: usize) {
    let ask = |at: *const u8| if Q::ASKS_SECOND_CACHE { prefetch_to_second(at) } else { prefetch(at) };
    let bytes = group_bytes::<Q, C>();
    for line in 0..bytes.div_ceil(LINE_BYTES) {
        ask(pointers.codes.wrapping_add(group * bytes + line * LINE_BYTES));
    }
    if S::SCALING == Scaling::Single {
        ask(pointers.scales.wrapping_add(group * Q::ROWS).cast());
        if S::WITH_MINS {
            ask(pointers.mins.wrapping_add(group * Q::ROWS).cast());
        }
    }
}

/// An activation group of N rows as pointers: to what goes with their codes, and to their codes.
///
/// # Safety
/// `x` is valid for N groups.
#[inline(always)]
unsafe fn pointers_to<const N: usize>(x: GroupPointers) -> ([*const GroupScales; N], [*const i8; N]) {
    let (mut rows, mut codes) = ([x.scales; N], [x.codes.cast::<i8>(); N]);
    for n in 0..N {
        // SAFETY: the caller's duty is the same.
        let row = unsafe { x.add(n) };
        (rows[n], codes[n]) = (row.scales, row.codes.cast());
    }
    (rows, codes)
}

/// Takes an activation group of N rows, `x: [N]`, into their accumulators.
///
/// # Safety
/// As [`QuantLanes`]; there is such a group; `x` is valid for N groups.
#[inline(always)]
unsafe fn add_group<Q: QuantLanes, C: Codes, S: Scales, const N: usize>(
    weights: &Pointers,
    group: usize,
    x: GroupPointers,
    acc: &mut [Q::Floats; N],
) {
    // SAFETY: the caller's duties are the same.
    unsafe {
        let (rows, x) = pointers_to::<N>(x);
        let (codes, book) = (weights.codes.add(group * group_bytes::<Q, C>()), weights.book);
        if C::GROUP == GROUP {
            let mut sums = Sums::<Q, N>::start::<C, S>(&rows, Part::Whole);
            C::add_pair::<Q, N, 0>(codes, book, &x, &mut sums);
            C::add_pair::<Q, N, 1>(codes, book, &x, &mut sums);
            C::add_pair::<Q, N, 2>(codes, book, &x, &mut sums);
            C::add_pair::<Q, N, 3>(codes, book, &x, &mut sums);
            Levels::<Q>::of_tile::<C, S>(weights, group).finish::<S, N>(Part::Whole, &rows, &sums, acc);
        } else {
            let mut sums = Sums::<Q, N>::start::<C, S>(&rows, Part::First);
            C::add_pair::<Q, N, 0>(codes, book, &x, &mut sums);
            C::add_pair::<Q, N, 1>(codes, book, &x, &mut sums);
            Levels::<Q>::of_tile::<C, S>(weights, 2 * group).finish::<S, N>(Part::First, &rows, &sums, acc);
            let mut sums = Sums::<Q, N>::start::<C, S>(&rows, Part::Second);
            C::add_pair::<Q, N, 2>(codes, book, &x, &mut sums);
            C::add_pair::<Q, N, 3>(codes, book, &x, &mut sums);
            Levels::<Q>::of_tile::<C, S>(weights, 2 * group + 1).finish::<S, N>(Part::Second, &rows, &sums, acc);
        }
    }
}

/// As [`add_group`], from T unpacked tiles.
///
/// # Safety
/// As [`add_group`].
#[inline(always)]
unsafe fn add_panel_group<Q: QuantLanes, C: Codes, S: Scales, const T: usize, const N: usize>(
    panel: &Panel,
    group: usize,
    x: GroupPointers,
    acc: &mut [[Q::Floats; N]; T],
) {
    // SAFETY: the caller's duties are the same.
    unsafe {
        let (rows, x) = pointers_to::<N>(x);
        let mut codes = [panel.codes.cast_const(); T];
        for t in 0..T {
            codes[t] = panel.codes.add((group * T + t) * 8 * 4 * Q::ROWS);
        }
        if C::GROUP == GROUP {
            let mut sums = [Sums::<Q, N>::start::<C, S>(&rows, Part::Whole); T];
            C::add_unpacked::<Q, N, T, 0>(codes, &x, &mut sums);
            C::add_unpacked::<Q, N, T, 1>(codes, &x, &mut sums);
            C::add_unpacked::<Q, N, T, 2>(codes, &x, &mut sums);
            C::add_unpacked::<Q, N, T, 3>(codes, &x, &mut sums);
            for t in 0..T {
                let levels = Levels::<Q>::of_panel::<S>(panel, group * T + t);
                levels.finish::<S, N>(Part::Whole, &rows, &sums[t], &mut acc[t]);
            }
        } else {
            let mut sums = [Sums::<Q, N>::start::<C, S>(&rows, Part::First); T];
            C::add_unpacked::<Q, N, T, 0>(codes, &x, &mut sums);
            C::add_unpacked::<Q, N, T, 1>(codes, &x, &mut sums);
            for t in 0..T {
                let levels = Levels::<Q>::of_panel::<S>(panel, 2 * group * T + t);
                levels.finish::<S, N>(Part::First, &rows, &sums[t], &mut acc[t]);
            }
            let mut sums = [Sums::<Q, N>::start::<C, S>(&rows, Part::Second); T];
            C::add_unpacked::<Q, N, T, 2>(codes, &x, &mut sums);
            C::add_unpacked::<Q, N, T, 3>(codes, &x, &mut sums);
            for t in 0..T {
                let levels = Levels::<Q>::of_panel::<S>(panel, (2 * group + 1) * T + t);
                levels.finish::<S, N>(Part::Second, &rows, &sums[t], &mut acc[t]);
            }
        }
    }
}

/// What a group of weights is multiplied with, for ROWS rows.
struct Levels<Q: QuantLanes> {
    scales: Q::Floats,
    /// Zero where the format has none.
    mins: Q::Floats,
}

impl<Q: QuantLanes> Levels<Q> {
    /// Of group number `index` of a tile's weights.
    ///
    /// # Safety
    /// As [`QuantLanes`]; there is such a group.
    #[inline(always)]
    unsafe fn of_tile<C: Codes, S: Scales>(weights: &Pointers, index: usize) -> Self {
        // SAFETY: the caller's duties are the same.
        unsafe {
            let mins = if S::WITH_MINS { S::mins::<Q, C>(weights, index) } else { Q::zero() };
            Self { scales: S::scales::<Q, C>(weights, index), mins }
        }
    }

    /// Number `at` of a panel's.
    ///
    /// # Safety
    /// As above.
    #[inline(always)]
    unsafe fn of_panel<S: Scales>(panel: &Panel, at: usize) -> Self {
        // SAFETY: the caller's duties are the same.
        unsafe {
            let mins = if S::WITH_MINS { Q::load(panel.mins.add(at * Q::ROWS)) } else { Q::zero() };
            Self { scales: Q::load(panel.scales.add(at * Q::ROWS)), mins }
        }
    }

    /// Takes the group, whose sums are whole, into the accumulators.
    ///
    /// # Safety
    /// As above; `x[n]` is the activations' group that it meets.
    #[inline(always)]
    unsafe fn finish<S: Scales, const N: usize>(
        self,
        part: Part,
        x: &[*const GroupScales; N],
        sums: &Sums<Q, N>,
        acc: &mut [Q::Floats; N],
    ) {
        // SAFETY: the caller's duties are the same.
        unsafe {
            for n in 0..N {
                let scale = Q::mul(self.scales, Q::splat((*x[n]).scale));
                acc[n] = Q::mul_add(Q::to_floats(sums.wide[n]), scale, acc[n]);
                if S::WITH_MINS {
                    acc[n] = Q::mul_add(self.mins, Q::splat(part.scaled_sum(&*x[n])), acc[n]);
                }
            }
        }
    }
}

/// # Safety
/// As [`QuantLanes`]; the elements belong to the task.
#[inline(always)]
pub(in crate::cpu) unsafe fn store<Q: QuantLanes>(out: &Output<'_>, m: usize, tile: usize, sums: Q::Floats) {
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
