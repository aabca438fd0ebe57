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

use std::mem::discriminant;

use super::QuantLanes;
use super::codes::{Codes, Part, Sums};
use super::scales::{Pointers, Scales, TileLens};
use crate::cpu::prefetch::{LINE_BYTES, prefetch};
use crate::cpu::task::{Line, Output, QuantGroup, QuantTask};
use crate::quant_format::{CodeBook, GROUP, QuantFormat, Scaling};

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
            prefetch_group::<Q, C, S>(&pointers, group + AHEAD_GROUPS);
            add_group::<Q, C, S, _, N>(&pointers, group, first_x.add(group * N), &mut acc);
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
const MAX_COLUMNS: usize = 12;

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
    let all_rows = task.x.panels.rows_of_all(&task.panels);
    let sum_lines = all_rows.len() * Q::ROWS / 16 + 1;
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
                C::unpack::<Q>(from, weights.book, panel.codes.add(group * 8 * 4 * Q::ROWS));
                for part in 0..per_group {
                    let (index, to) = ((first + group) * per_group + part, (group * per_group + part) * Q::ROWS);
                    Q::store(S::scales::<Q, C>(&weights, index), panel.scales.add(to));
                    if S::WITH_MINS {
                        Q::store(S::mins::<Q, C>(&weights, index), panel.mins.add(to));
                    }
                }
            }
            let part = PanelPart { first, count, waiting };
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
        if part.first > 0 {
            for n in 0..N {
                acc[n] = Q::load(waiting.add(n * Q::ROWS));
            }
        }
        for group in 0..part.count {
            if rows == task.panels.start {
                prefetch_group::<Q, C, S>(weights, part.first + part.count + group);
            }
            add_group::<Q, C, S, _, N>(panel, group, first_x.add(group * N), &mut acc);
        }
        for n in 0..N {
            Q::store(acc[n], waiting.add(n * Q::ROWS));
        }
        if part.first + part.count == task.weights.groups() {
            for n in 0..N {
                store::<Q>(task.out, first_row + n, tile, Q::load(waiting.add(n * Q::ROWS)));
            }
        }
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

/// Where groups of weights come from: a tile as it is packed, or some of it unpacked.
///
/// # Safety
/// Every function's duty: as [`QuantLanes`], and there is such a group.
trait Source<Q: QuantLanes, C: Codes, S: Scales> {
    /// As [`Codes::add_pair`], for activation group number `group`.
    unsafe fn add_pair<const N: usize, const J: usize>(&self, group: usize, x: &[*const i8; N], sums: &mut Sums<Q, N>);
    /// Scales of groups number `index` of the weights.
    unsafe fn scales(&self, index: usize) -> Q::Floats;
    /// Their minimums, where the format has them.
    unsafe fn mins(&self, index: usize) -> Q::Floats;
}

impl<Q: QuantLanes, C: Codes, S: Scales> Source<Q, C, S> for Pointers {
    #[inline(always)]
    unsafe fn add_pair<const N: usize, const J: usize>(&self, group: usize, x: &[*const i8; N], sums: &mut Sums<Q, N>) {
        // SAFETY: the caller's duties are the same.
        unsafe { C::add_pair::<Q, N, J>(self.codes.add(group * C::BITS.count() * 4 * Q::ROWS), self.book, x, sums) };
    }

    #[inline(always)]
    unsafe fn scales(&self, index: usize) -> Q::Floats {
        // SAFETY: the caller's duties are the same.
        unsafe { S::scales::<Q, C>(self, index) }
    }

    #[inline(always)]
    unsafe fn mins(&self, index: usize) -> Q::Floats {
        // SAFETY: the caller's duties are the same.
        unsafe { S::mins::<Q, C>(self, index) }
    }
}

impl<Q: QuantLanes, C: Codes, S: Scales> Source<Q, C, S> for Panel {
    #[inline(always)]
    unsafe fn add_pair<const N: usize, const J: usize>(&self, group: usize, x: &[*const i8; N], sums: &mut Sums<Q, N>) {
        // SAFETY: the caller's duties are the same.
        unsafe { C::add_unpacked::<Q, N, J>(self.codes.add(group * 8 * 4 * Q::ROWS), x, sums) };
    }

    #[inline(always)]
    unsafe fn scales(&self, index: usize) -> Q::Floats {
        // SAFETY: the caller's duties are the same.
        unsafe { Q::load(self.scales.add(index * Q::ROWS)) }
    }

    #[inline(always)]
    unsafe fn mins(&self, index: usize) -> Q::Floats {
        // SAFETY: the caller's duties are the same.
        unsafe { Q::load(self.mins.add(index * Q::ROWS)) }
    }
}

/// Takes an activation group of N rows, `x: [N]`, into their accumulators.
///
/// # Safety
/// As [`Source`]; `x` is valid for N groups.
#[inline(always)]
unsafe fn add_group<Q: QuantLanes, C: Codes, S: Scales, W: Source<Q, C, S>, const N: usize>(
    weights: &W,
    group: usize,
    x: *const QuantGroup,
    acc: &mut [Q::Floats; N],
) {
    // SAFETY: the caller's duties are the same.
    unsafe {
        let (mut rows, mut codes) = ([x; N], [x.cast::<i8>(); N]);
        for n in 0..N {
            rows[n] = x.add(n);
            codes[n] = rows[n].cast();
        }
        if C::GROUP == GROUP {
            let mut sums = Sums::<Q, N>::start::<C, S>(&rows, Part::Whole);
            weights.add_pair::<N, 0>(group, &codes, &mut sums);
            weights.add_pair::<N, 1>(group, &codes, &mut sums);
            weights.add_pair::<N, 2>(group, &codes, &mut sums);
            weights.add_pair::<N, 3>(group, &codes, &mut sums);
            finish::<Q, C, S, W, N>(weights, group, Part::Whole, &rows, &sums, acc);
        } else {
            let mut sums = Sums::<Q, N>::start::<C, S>(&rows, Part::First);
            weights.add_pair::<N, 0>(group, &codes, &mut sums);
            weights.add_pair::<N, 1>(group, &codes, &mut sums);
            finish::<Q, C, S, W, N>(weights, 2 * group, Part::First, &rows, &sums, acc);
            let mut sums = Sums::<Q, N>::start::<C, S>(&rows, Part::Second);
            weights.add_pair::<N, 2>(group, &codes, &mut sums);
            weights.add_pair::<N, 3>(group, &codes, &mut sums);
            finish::<Q, C, S, W, N>(weights, 2 * group + 1, Part::Second, &rows, &sums, acc);
        }
    }
}

/// Takes group number `index` of the weights, whose sums are whole, into the accumulators.
///
/// # Safety
/// As [`Source`]; `x[n]` is the activations' group that it meets.
#[inline(always)]
unsafe fn finish<Q: QuantLanes, C: Codes, S: Scales, W: Source<Q, C, S>, const N: usize>(
    weights: &W,
    index: usize,
    part: Part,
    x: &[*const QuantGroup; N],
    sums: &Sums<Q, N>,
    acc: &mut [Q::Floats; N],
) {
    // SAFETY: the caller's duties are the same.
    unsafe {
        let scales = weights.scales(index);
        let mins = if S::WITH_MINS { weights.mins(index) } else { Q::zero() };
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
