//! Quantised products of many rows in the matrix unit: 16 activation rows by a weight tile in one instruction.
//!
//! ```text
//! for some groups at a time, for each weight tile:
//!     unpack codes (signed) and scales
//!     for each panel of up to 16 activation rows:
//!         for group in ascending order:
//!             sums[16, 16] = x . weight tile                     the unit, two groups ahead
//!             for n in 0..16: acc[n] += float(sums[n]) * (scale * x_scale[n]) [+ min * x_scaled_sum[n]]
//! ```
//!
//! The sums are exact integers and the last line is that of `generic/quant.rs`, so the bits are the same; which of both
//! computes a row is a question of speed alone. A group has 32 inputs (or 16) and the unit takes 64 at a time, but it needs as long
//! for fewer: the unit is half idle, and most of the time goes to the last line. Sums get to the vector registers through
//! memory, hence the distance between a product and its use. Activations are taken as they lie; of a panel with fewer rows, sixteen
//! all the same, of which the last ones are what lies behind it and their sums are nobody's.
//!
//! Tried: activations laid out anew for the unit, pairs of groups in a line and scales by themselves. Each task does that again, and a
//! quarter of a long prompt's products went there.
//!
//! It knows tasks and formats; the instructions are `tiles.rs`'s.

use std::arch::x86_64::{__m512, _mm512_loadu_si512, _mm512_set1_epi8, _mm512_storeu_si512, _mm512_sub_epi8};

use super::tiles::{self, TILE_ROWS};
use crate::cpu::avx512::Rows16Vnni as Lanes;
use crate::cpu::generic::QuantLanes;
use crate::cpu::generic::codes::{Codes, Part};
use crate::cpu::generic::quant::{prefetch_group, store};
use crate::cpu::generic::scales::{Pointers, Scales, TileLens};
use crate::cpu::matmul::even_parts;
use crate::cpu::task::{
    GroupCodes, GroupPointers, GroupScales, Line, PART_GROUPS, QuantTask, SPARE_GROUPS, room_to_wait, tiles_by_turns,
};
use crate::quant_format::{CodeBits, GROUP};

/// Elements of a product's sums, or of a panel's accumulators.
const TILE_SUMS: usize = TILE_ROWS * 16;

/// Where the parts of a task's scratch begin.
struct Places {
    /// `[2 pairs of some groups, weight group / 4, 16, 4]`; not touched where codes are bytes already.
    codes: *mut u8,
    /// `[2 pairs of some groups, 16]`
    scales: *mut f32,
    /// Likewise; not touched where the format has no minimums.
    mins: *mut f32,
    /// `[2, 16, 16]`
    sums: *mut i32,
    /// `[tiles, panels, 16, 16]`: accumulators, where those of some groups wait for the next ones.
    waiting: *mut f32,
}

/// Sizes of a task. Its weight groups go by pairs, of which the last has one where their number is odd.
#[derive(Clone, Copy)]
struct Sizes {
    panels: usize,
    /// Tiles that go by turns.
    tiles: usize,
    /// Weight groups.
    groups: usize,
    pairs: usize,
    /// Pairs that are unpacked together.
    part_pairs: usize,
}

impl Sizes {
    fn new<C: Codes>(task: &QuantTask<'_>) -> Self {
        let groups = task.weights.groups() * (GROUP / C::GROUP);
        let pairs = groups.div_ceil(2);
        let part_pairs = (PART_GROUPS * GROUP / C::GROUP / 2).min(pairs);
        let panels = task.panels.len();
        let num_parts = pairs.div_ceil(part_pairs.max(1));
        let tiles = tiles_by_turns(num_parts, panels * TILE_ROWS).min(task.tiles.len());
        Self { panels, tiles, groups, pairs, part_pairs }
    }

    /// Divides scratch memory, which grows where it is too small. All parts are whole lines.
    fn places<C: Codes>(self, scratch: &mut Vec<Line>) -> Places {
        let codes = self.part_pairs * 2 * C::GROUP * 16 / 64;
        let scales = self.part_pairs * 2;
        let (sums, waiting) = (2 * TILE_ROWS, room_to_wait(self.tiles, self.panels * TILE_ROWS));
        let lines = codes + 2 * scales + sums + waiting;
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
            codes: take(codes).cast(),
            scales: take(scales).cast(),
            mins: take(scales).cast(),
            sums: take(sums).cast(),
            waiting: take(waiting).cast(),
        }
    }
}

/// Product with codes of one width and one kind of scales; `Q` and `N` are the other products' and not used.
///
/// # Safety
/// As [`QuantLanes`], and the process may use tiles; the task's ranges lie within its buffers; the matrix lies in tiles of 16.
#[inline(always)]
pub(super) unsafe fn multiply<Q: QuantLanes, C: Codes, S: Scales, const N: usize>(task: &mut QuantTask<'_>) {
    let sizes = Sizes::new::<C>(task);
    let places = sizes.places::<C>(task.scratch);
    let lens = TileLens::new(task.weights);
    // SAFETY: the scratch has room for what `Sizes` says; the rest is the caller's duty.
    unsafe {
        tiles::shape(C::GROUP);
        if sizes.pairs == 0 {
            // Sums of nothing are stored like others.
            for tile in task.tiles.clone() {
                for row in task.x.panels.rows_of_all(&task.panels) {
                    store::<Lanes>(task.out, row, tile, Lanes::zero());
                }
            }
        }
        for tiles in even_parts(task.tiles.clone(), sizes.tiles) {
            for first in (0..sizes.pairs).step_by(sizes.part_pairs.max(1)) {
                let pairs = sizes.part_pairs.min(sizes.pairs - first);
                for tile in tiles.clone() {
                    let weights = Pointers::new(task, &lens, tile);
                    let part = unpack::<C, S>(task, &weights, first, pairs, &places);
                    // What comes next: the same part of the tile behind, the next part of the first one, or other tiles.
                    let next = if tile + 1 < tiles.end {
                        Ahead { weights, first: sizes.groups + 2 * first }
                    } else if first + pairs < sizes.pairs {
                        Ahead { weights: Pointers::new(task, &lens, tiles.start), first: 2 * (first + pairs) }
                    } else {
                        Ahead { weights, first: sizes.groups }
                    };
                    all_rows::<C, S>(task, &part, &next, sizes, &places, (tile, tile - tiles.start));
                }
            }
        }
        tiles::release();
    }
}

/// Which weight groups are asked for while others are multiplied: from number `first` on, the groups of the tile behind being
/// numbered on.
struct Ahead {
    weights: Pointers,
    first: usize,
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
    let count = (2 * pairs).min(task.weights.groups() * per_group - 2 * first);
    // SAFETY: the caller's duties.
    unsafe {
        for at in 0..count {
            Lanes::store(S::scales::<Lanes, C>(weights, 2 * first + at), places.scales.add(at * 16));
            if S::WITH_MINS {
                Lanes::store(S::mins::<Lanes, C>(weights, 2 * first + at), places.mins.add(at * 16));
            }
        }
        let codes = weights.codes.add(2 * first / per_group * C::BITS.count() * 64);
        if C::BITS == CodeBits::Eight {
            return PanelPart { first, pairs, codes };
        }
        // What was added to make short codes unsigned; what is looked up is signed.
        let offset = if C::HAS_BOOK { 0 } else { C::offset::<Lanes>(S::WITH_MINS) };
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

/// All activation rows by the groups that are unpacked, of a tile, whose place among those that go by turns is told. Pairs follow
/// each other over the ends of panels: while the sums of one are taken in, the unit multiplies the next.
///
/// # Safety
/// As [`multiply`]; tiles are shaped; the scratch holds what `part` says.
#[inline(always)]
unsafe fn all_rows<C: Codes, S: Scales>(
    task: &QuantTask<'_>,
    part: &PanelPart,
    next_weights: &Ahead,
    sizes: Sizes,
    places: &Places,
    (tile, turn): (usize, usize),
) {
    let first_panel = task.panels.start;
    let (is_first_part, is_last_part) = (part.first == 0, part.first + part.pairs == sizes.pairs);
    let is_odd = is_last_part && !sizes.groups.is_multiple_of(2);
    // SAFETY: the caller's duties; pairs and panels are those counted; what is read behind a panel is there.
    unsafe {
        let (first_sums, second_sums) = (places.sums, places.sums.add(TILE_SUMS));
        let has_second = |pair: usize| !is_odd || pair + 1 < part.pairs;
        let start_first = |x: XPair, pair: usize| {
            tiles::multiply::<0>(x.at.codes.cast(), part.codes.add(2 * pair * C::GROUP * 16));
        };
        let start_second = |x: XPair, pair: usize| {
            if has_second(pair) {
                tiles::multiply::<1>(x.second::<C>().0, part.codes.add((2 * pair + 1) * C::GROUP * 16));
            }
        };
        let mut next = (XPair::new::<C>(task, first_panel, part.first), 0);
        start_first(next.0, 0);
        start_second(next.0, 0);
        tiles::store::<0>(first_sums);
        for index in 0..sizes.panels {
            let waiting = places.waiting.add((turn * sizes.panels + index) * TILE_SUMS);
            let mut acc = [Lanes::zero(); TILE_ROWS];
            if !is_first_part {
                for n in 0..TILE_ROWS {
                    acc[n] = Lanes::load(waiting.add(n * 16));
                }
            }
            for pair in 0..part.pairs {
                if index == 0 {
                    let Ahead { weights, first } = next_weights;
                    let ahead = (first + 2 * pair) * C::GROUP / GROUP;
                    prefetch_group::<Lanes, C, S>(weights, ahead);
                    if C::GROUP == GROUP {
                        prefetch_group::<Lanes, C, S>(weights, ahead + 1);
                    }
                }
                let x = next.0;
                next = if pair + 1 < part.pairs {
                    (x.next::<C>(), pair + 1)
                } else {
                    // Past the end the last panel comes again, for nobody: cheaper than to ask.
                    (XPair::new::<C>(task, first_panel + (index + 1).min(sizes.panels - 1), part.first), 0)
                };
                start_first(next.0, next.1);
                tiles::store::<1>(second_sums);
                finish::<C, S>(places, 2 * pair, x.at.scales, false, &mut acc);
                start_second(next.0, next.1);
                tiles::store::<0>(first_sums);
                if has_second(pair) {
                    finish::<C, S>(places, 2 * pair + 1, x.second::<C>().1, true, &mut acc);
                }
            }
            // Also on the way out: a loop as long as this one would keep the accumulators in memory all the time.
            for n in 0..TILE_ROWS {
                Lanes::store(acc[n], waiting.add(n * 16));
            }
            if is_last_part {
                for (n, row) in task.x.panels.rows_of(first_panel + index).enumerate() {
                    store::<Lanes>(task.out, row, tile, Lanes::load(waiting.add(n * 16)));
                }
            }
        }
    }
}

/// A panel's activations that meet a pair of weight groups: two groups, or one whose halves they meet.
#[derive(Clone, Copy)]
struct XPair {
    at: GroupPointers,
    /// Rows of the panel.
    rows: usize,
}

impl XPair {
    /// Those that meet pair number `pair`.
    ///
    /// # Safety
    /// There is such a pair.
    #[inline(always)]
    unsafe fn new<C: Codes>(task: &QuantTask<'_>, panel: usize, pair: usize) -> Self {
        let rows = task.x.panels.rows_of(panel).len();
        // SAFETY: the caller's duty.
        unsafe { Self { at: task.x.panel(panel).add(pair * 2 * C::GROUP / GROUP * rows), rows } }
    }

    /// Those that meet the next pair.
    ///
    /// # Safety
    /// There is one.
    #[inline(always)]
    unsafe fn next<C: Codes>(self) -> Self {
        // SAFETY: the caller's duty.
        unsafe { Self { at: self.at.add(2 * C::GROUP / GROUP * self.rows), ..self } }
    }

    /// The codes and the scales that meet the pair's second group.
    ///
    /// # Safety
    /// It has one.
    #[inline(always)]
    unsafe fn second<C: Codes>(self) -> (*const i8, *const GroupScales) {
        // SAFETY: the caller's duty; a half of a group has as many codes as a group of such weights.
        unsafe {
            if C::GROUP == GROUP {
                let second = self.at.add(self.rows);
                (second.codes.cast(), second.scales)
            } else {
                (self.at.codes.cast::<i8>().add(C::GROUP), self.at.scales)
            }
        }
    }
}

/// Takes the sums of a pair's first or second group into 16 rows' accumulators.
///
/// # Safety
/// As [`multiply`]; `weights` is the number of the group among those unpacked; its sums are stored; `x` is what it meets, of 16 rows.
#[inline(always)]
unsafe fn finish<C: Codes, S: Scales>(
    places: &Places,
    weights: usize,
    x: *const GroupScales,
    is_second: bool,
    acc: &mut [__m512; TILE_ROWS],
) {
    const { assert!(size_of::<GroupScales>() == tiles::SCALE_STRIDE && size_of::<GroupCodes>() == tiles::X_STRIDE) };
    const { assert!(TILE_ROWS - 1 <= SPARE_GROUPS) };
    // SAFETY: the caller's duties.
    unsafe {
        let sums = if is_second { places.sums.add(TILE_SUMS) } else { places.sums };
        let (scales, x_scales) = (Lanes::load(places.scales.add(weights * 16)), &raw const (*x).scale);
        if !S::WITH_MINS {
            return tiles::finish(sums, scales, x_scales, acc);
        }
        let mins = Lanes::load(places.mins.add(weights * 16));
        let mut halves = [GroupScales::default(); TILE_ROWS];
        let x_sums = if C::GROUP == GROUP {
            &raw const (*x).scaled_sum
        } else {
            let half = if is_second { Part::Second } else { Part::First };
            for n in 0..TILE_ROWS {
                halves[n].scaled_sum = half.scaled_sum(&*x.add(n));
            }
            &raw const halves[0].scaled_sum
        };
        tiles::finish_with_mins(sums, scales, x_scales, mins, x_sums, acc);
    }
}
