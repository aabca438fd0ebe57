//! Quantised products of many rows in the matrix unit: 16 activation rows by a weight tile in one instruction.
//!
//! ```text
//! once a task: activations laid out as tiles, 16 rows each      the last one filled up with zeros
//! for each weight tile, for some groups at a time:
//!     unpack codes (signed) and scales
//!     for each 16 activation rows:
//!         for group in ascending order:
//!             sums[16, 16] = x tile . weight tile                the unit, two groups ahead
//!             for n in 0..16: acc[n] += float(sums[n]) * (scale * x_scale[n]) [+ min * x_scaled_sum[n]]
//! ```
//!
//! The sums are exact integers and the last line is that of `generic/quant.rs`, so the bits are the same; which of both
//! computes a row is a question of speed alone. A group has 32 inputs (or 16) and the unit takes 64 at a time, but it needs as long
//! for fewer: the unit is half idle, and most of the time goes to the last line. Sums get to the vector registers through
//! memory, hence the distance between a product and its use.
//!
//! It knows tasks and formats; the instructions are `tiles.rs`'s.

use std::arch::x86_64::{__m512, _mm512_loadu_si512, _mm512_set1_epi8, _mm512_storeu_si512, _mm512_sub_epi8};

use super::tiles::{self, TILE_ROWS};
use crate::cpu::avx512::Rows16Vnni as Lanes;
use crate::cpu::generic::QuantLanes;
use crate::cpu::generic::codes::{Codes, Part};
use crate::cpu::generic::quant::{prefetch_group, store};
use crate::cpu::generic::scales::{Pointers, Scales, TileLens};
use crate::cpu::task::{Line, QuantGroup, QuantTask};
use crate::quant_format::{CodeBits, GROUP};

/// Activation groups whose weights are unpacked together, an even number; with their scales and the sums under way they stay in the first-level cache.
const PANEL_GROUPS: usize = 48;
/// Elements of a product's sums, or of a panel's accumulators.
const TILE_SUMS: usize = TILE_ROWS * 16;

/// Where the parts of a task's scratch begin.
struct Places {
    /// `[panels, pairs, 16, 2, weight group]`
    x: *mut i8,
    /// `[panels, 2 pairs, 16]`: of activation groups whose halves are weight groups twice each.
    x_scales: *mut f32,
    /// Likewise; not touched where the format has no minimums.
    x_sums: *mut f32,
    /// `[2 pairs of some groups, weight group / 4, 16, 4]`; not touched where codes are bytes already.
    codes: *mut u8,
    /// `[2 pairs of some groups, 16]`
    scales: *mut f32,
    /// Likewise.
    mins: *mut f32,
    /// `[2, 16, 16]`
    sums: *mut i32,
    /// `[panels, 16, 16]`: accumulators, where those of some groups wait for the next ones.
    waiting: *mut f32,
}

/// Sizes of a task. Its weight groups go by pairs, with one of zeros where their number is odd.
#[derive(Clone, Copy)]
struct Sizes {
    panels: usize,
    pairs: usize,
    /// Pairs that are unpacked together.
    part_pairs: usize,
}

impl Sizes {
    fn new<C: Codes>(task: &QuantTask<'_>) -> Self {
        let pairs = (task.weights.groups() * (GROUP / C::GROUP)).div_ceil(2);
        let part_pairs = (PANEL_GROUPS * GROUP / C::GROUP / 2).min(pairs);
        Self { panels: task.panels.len(), pairs, part_pairs }
    }

    /// Divides scratch memory, which grows where it is too small. All parts are whole lines.
    fn places<C: Codes, S: Scales>(self, scratch: &mut Vec<Line>) -> Places {
        let x = self.panels * self.pairs * pair_bytes::<C>() / 64;
        let x_scales = self.panels * 2 * self.pairs;
        let x_sums = if S::WITH_MINS { x_scales } else { 0 };
        let codes = self.part_pairs * 2 * C::GROUP * 16 / 64;
        let scales = self.part_pairs * 2;
        let (sums, waiting) = (2 * TILE_ROWS, self.panels * TILE_ROWS);
        let lines = x + x_scales + x_sums + codes + 2 * scales + sums + waiting;
        if scratch.len() < lines {
            scratch.resize(lines, Line::default());
        }
        let mut next = scratch.as_mut_ptr();
        let mut take = |lines: usize| {
            let start = next;
            next = next.wrapping_add(lines);
            start
        };
        Places {
            x: take(x).cast(),
            x_scales: take(x_scales).cast(),
            x_sums: take(x_sums).cast(),
            codes: take(codes).cast(),
            scales: take(scales).cast(),
            mins: take(scales).cast(),
            sums: take(sums).cast(),
            waiting: take(waiting).cast(),
        }
    }
}

/// Bytes of two weight groups' worth of 16 activation rows.
const fn pair_bytes<C: Codes>() -> usize {
    TILE_ROWS * 2 * C::GROUP
}

/// Product with codes of one width and one kind of scales; `Q` and `N` are the other products' and not used.
///
/// # Safety
/// As [`QuantLanes`], and the process may use tiles; the task's ranges lie within its buffers; the matrix lies in tiles of 16.
#[inline(always)]
pub(super) unsafe fn multiply<Q: QuantLanes, C: Codes, S: Scales, const N: usize>(task: &mut QuantTask<'_>) {
    let sizes = Sizes::new::<C>(task);
    let places = sizes.places::<C, S>(task.scratch);
    let lens = TileLens::new(task.weights);
    // SAFETY: the scratch has room for what `Sizes` says; the rest is the caller's duty.
    unsafe {
        lay_out::<C, S>(task, sizes, &places);
        tiles::shape(C::GROUP);
        for tile in task.tiles.clone() {
            let weights = Pointers::new(task, &lens, tile);
            if sizes.pairs == 0 {
                // Sums of nothing are stored like others.
                for row in task.x.panels.rows_of_all(&task.panels) {
                    store::<Lanes>(task.out, row, tile, Lanes::zero());
                }
            }
            let mut first = 0;
            while first < sizes.pairs {
                let pairs = sizes.part_pairs.min(sizes.pairs - first);
                let part = unpack::<C, S>(task, &weights, first, pairs, &places);
                all_rows::<C, S>(task, &weights, &part, sizes, &places, tile);
                first += pairs;
            }
        }
        tiles::release();
    }
}

/// Lays the activations out as tiles.
///
/// # Safety
/// As [`multiply`]; the scratch has room.
#[inline(always)]
unsafe fn lay_out<C: Codes, S: Scales>(task: &QuantTask<'_>, sizes: Sizes, places: &Places) {
    let groups = task.weights.groups();
    // Where there is no such row or group, zeros: what is multiplied with them must not be slow, nor change a sum.
    let nothing = [QuantGroup::default(); TILE_ROWS];
    for (index, panel) in task.panels.clone().enumerate() {
        let num_rows = task.x.panels.rows_of(panel).len();
        let from = task.x.panel(panel);
        for group in 0..sizes.pairs * 2 * C::GROUP / GROUP {
            let rows = if group < groups { &from[group * num_rows..(group + 1) * num_rows] } else { &[] };
            // SAFETY: panels and groups are those that `Sizes` counts; rows are at most 16.
            unsafe {
                lay_out_rows::<C, S>(rows, 0, sizes, places, index, group);
                lay_out_rows::<C, S>(&nothing[rows.len()..], rows.len(), sizes, places, index, group);
            }
        }
    }
}

/// Some rows of an activation group, from number `first` of a panel on.
///
/// # Safety
/// As [`lay_out`]; there are such rows, groups and panels.
#[inline(always)]
unsafe fn lay_out_rows<C: Codes, S: Scales>(
    rows: &[QuantGroup],
    first: usize,
    sizes: Sizes,
    places: &Places,
    panel: usize,
    group: usize,
) {
    let unit = panel * 2 * sizes.pairs + group * (GROUP / C::GROUP);
    // SAFETY: the caller's duties.
    unsafe {
        let codes = places.x.add(unit / 2 * pair_bytes::<C>() + unit % 2 * C::GROUP);
        let (scales, sums) = (places.x_scales.add(unit * TILE_ROWS), places.x_sums.wrapping_add(unit * TILE_ROWS));
        for (n, x) in (first..).zip(rows) {
            codes.add(n * 2 * C::GROUP).cast::<[i8; GROUP]>().write_unaligned(x.codes);
            scales.add(n).write(x.scale);
            if C::GROUP == GROUP {
                if S::WITH_MINS {
                    sums.add(n).write(Part::Whole.scaled_sum(x));
                }
            } else {
                scales.add(TILE_ROWS + n).write(x.scale);
                if S::WITH_MINS {
                    sums.add(n).write(Part::First.scaled_sum(x));
                    sums.add(TILE_ROWS + n).write(Part::Second.scaled_sum(x));
                }
            }
        }
    }
}

/// Some pairs of weight groups of a tile, unpacked.
struct PanelPart {
    first: usize,
    pairs: usize,
    /// `[2 pairs, weight group / 4, 16, 4]`, signed.
    codes: *const u8,
}

/// Unpacks pairs of weight groups of a tile from number `first` on.
///
/// # Safety
/// As [`multiply`]; there are such pairs, at most `Sizes::part_pairs`, which make whole activation groups but for the last.
#[inline(always)]
unsafe fn unpack<C: Codes, S: Scales>(
    task: &QuantTask<'_>,
    weights: &Pointers,
    first: usize,
    pairs: usize,
    places: &Places,
) -> PanelPart {
    let per_group = GROUP / C::GROUP;
    let all = task.weights.groups() * per_group;
    let count = (2 * pairs).min(all - 2 * first);
    // SAFETY: the caller's duties.
    unsafe {
        for at in 0..count {
            Lanes::store(S::scales::<Lanes, C>(weights, 2 * first + at), places.scales.add(at * 16));
            if S::WITH_MINS {
                Lanes::store(S::mins::<Lanes, C>(weights, 2 * first + at), places.mins.add(at * 16));
            }
        }
        if count < 2 * pairs {
            // Of zeros; whatever the codes beside them are.
            Lanes::store(Lanes::zero(), places.scales.add(count * 16));
            Lanes::store(Lanes::zero(), places.mins.add(count * 16));
        }
        let codes = weights.codes.add(2 * first / per_group * C::BITS.count() * 64);
        // The last group of an odd number has none behind it, so it must be a copy.
        if C::BITS == CodeBits::Eight && count == 2 * pairs {
            return PanelPart { first, pairs, codes };
        }
        // What was added to make short codes unsigned; what is looked up is signed, and so are bytes.
        let offset = if C::HAS_BOOK || C::BITS == CodeBits::Eight { 0 } else { C::offset::<Lanes>(S::WITH_MINS) };
        for group in 0..count / per_group {
            let to = places.codes.add(group * GROUP * 16);
            C::unpack::<Lanes>(codes.add(group * C::BITS.count() * 64), weights.book, to);
            if offset != 0 {
                for quad in 0..8 {
                    let at = to.add(quad * 64).cast();
                    let signed = _mm512_sub_epi8(_mm512_loadu_si512(at), _mm512_set1_epi8(offset as i8));
                    _mm512_storeu_si512(at.cast(), signed);
                }
            }
        }
        PanelPart { first, pairs, codes: places.codes }
    }
}

/// All activation rows by the groups that are unpacked. Pairs follow each other over the ends of panels: while the sums of one are
/// taken in, the unit multiplies the next.
///
/// # Safety
/// As [`multiply`]; tiles are shaped; the scratch holds what `part` and `lay_out` say.
#[inline(always)]
unsafe fn all_rows<C: Codes, S: Scales>(
    task: &QuantTask<'_>,
    weights: &Pointers,
    part: &PanelPart,
    sizes: Sizes,
    places: &Places,
    tile: usize,
) {
    // Two weight groups of each row follow each other.
    let (group_bytes, x_stride) = (C::GROUP * 16, 2 * C::GROUP);
    let (is_first_part, is_last_part) = (part.first == 0, part.first + part.pairs == sizes.pairs);
    // SAFETY: the caller's duties; pairs and panels are those counted.
    unsafe {
        let x_of = |panel: usize| places.x.add((panel * sizes.pairs + part.first) * pair_bytes::<C>()).cast_const();
        let (first_sums, second_sums) = (places.sums, places.sums.add(TILE_SUMS));
        let (mut x, mut codes) = (x_of(0), part.codes);
        tiles::multiply::<0>(x, x_stride, codes);
        tiles::multiply::<1>(x.add(C::GROUP), x_stride, codes.add(group_bytes));
        tiles::store::<0>(first_sums);
        for index in 0..sizes.panels {
            let mut at = (index * sizes.pairs + part.first) * 2 * TILE_ROWS;
            let waiting = places.waiting.add(index * TILE_SUMS);
            let mut acc = [Lanes::zero(); TILE_ROWS];
            if !is_first_part {
                for n in 0..TILE_ROWS {
                    acc[n] = Lanes::load(waiting.add(n * 16));
                }
            }
            for pair in 0..part.pairs {
                if index == 0 {
                    let ahead = 2 * (part.first + part.pairs + pair) * C::GROUP / GROUP;
                    prefetch_group::<Lanes, C, S>(weights, ahead);
                    if C::GROUP == GROUP {
                        prefetch_group::<Lanes, C, S>(weights, ahead + 1);
                    }
                }
                (x, codes) = if pair + 1 < part.pairs {
                    (x.add(pair_bytes::<C>()), codes.add(2 * group_bytes))
                } else {
                    // Past the end the last panel comes again, for nobody: cheaper than to ask.
                    (x_of((index + 1).min(sizes.panels - 1)), part.codes)
                };
                tiles::multiply::<0>(x, x_stride, codes);
                tiles::store::<1>(second_sums);
                finish::<S>(places, 2 * pair, at, first_sums, &mut acc);
                tiles::multiply::<1>(x.add(C::GROUP), x_stride, codes.add(group_bytes));
                tiles::store::<0>(first_sums);
                finish::<S>(places, 2 * pair + 1, at + TILE_ROWS, second_sums, &mut acc);
                at += 2 * TILE_ROWS;
            }
            // Also on the way out: a loop as long as this one would keep the accumulators in memory all the time.
            for n in 0..TILE_ROWS {
                Lanes::store(acc[n], waiting.add(n * 16));
            }
            if is_last_part {
                for (n, row) in task.x.panels.rows_of(task.panels.start + index).enumerate() {
                    store::<Lanes>(task.out, row, tile, Lanes::load(waiting.add(n * 16)));
                }
            }
        }
    }
}

/// Takes a weight group's sums into 16 rows' accumulators.
///
/// # Safety
/// As [`multiply`]; `weights` and `x` are places of a group in what was unpacked and laid out; `sums` is `[16, 16]`.
#[inline(always)]
unsafe fn finish<S: Scales>(
    places: &Places,
    weights: usize,
    x: usize,
    sums: *const i32,
    acc: &mut [__m512; TILE_ROWS],
) {
    // SAFETY: the caller's duties.
    unsafe {
        let (scales, x_scales) = (Lanes::load(places.scales.add(weights * 16)), places.x_scales.add(x));
        if S::WITH_MINS {
            let (mins, x_sums) = (Lanes::load(places.mins.add(weights * 16)), places.x_sums.add(x));
            tiles::finish_with_mins(sums, scales, x_scales, mins, x_sums, acc);
        } else {
            tiles::finish(sums, scales, x_scales, acc);
        }
    }
}
