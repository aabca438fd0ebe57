//! Ways of keeping scales and minimums, and where those of a tile lie.
//!
//! It knows the layouts of [`Quantized`]'s buffers; it must not know how codes are multiplied. Invariant: what comes out
//! is the exact product of a group's levels, so the order of roundings is one for all formats.

use half::f16;

use super::QuantLanes;
use super::codes::Codes;
use crate::cpu::task::QuantTask;
use crate::pack::Quantized;
use crate::quant_format::{SUPER_GROUP, Scaling};

/// Elements of a tile in each of a matrix's buffers. Made once a task: divisions in the loop over tiles took
/// a lone row up to a tenth longer.
pub(in crate::cpu) struct TileLens {
    codes: usize,
    scales: usize,
    mins: usize,
    sub_scales: usize,
    sub_mins: usize,
    groups_to_spans: u64,
}

impl TileLens {
    pub(in crate::cpu) fn new(w: &Quantized) -> Self {
        // A buffer holds a whole number of tiles.
        let tiles = w.tiles().max(1);
        Self {
            codes: w.codes.len() / tiles,
            scales: w.scales.len() / tiles,
            mins: w.mins.len() / tiles,
            sub_scales: w.sub_scales.len() / tiles,
            sub_mins: w.sub_mins.len() / tiles,
            groups_to_spans: match w.format.scaling {
                Scaling::Spans(span) => (1_u64 << SPAN_SHIFT).div_ceil(u64::from(span) / w.group_len() as u64),
                _ => 0,
            },
        }
    }
}

/// A group's number times `2^SPAN_SHIFT / groups of a span`, rounded up, is its span's number shifted so far: exact while
/// the product of both counts stays below the power, and a row of 2^23 inputs would have 2^19 groups.
const SPAN_SHIFT: u32 = 40;

/// Where a tile's codes and scales begin.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Pointers {
    pub(in crate::cpu) codes: *const u8,
    pub(super) scales: *const f16,
    /// What the matrix does not have is an empty slice's pointer, here and below.
    pub(super) mins: *const f16,
    sub_scales: *const i8,
    sub_mins: *const i8,
    groups_to_spans: u64,
    /// What codes stand for, as vectors look it up.
    pub(in crate::cpu) book: *const u8,
}

impl Pointers {
    /// Checks bounds here, so that the loops need not.
    #[inline(always)]
    pub(in crate::cpu) fn new(task: &QuantTask<'_>, lens: &TileLens, tile: usize) -> Self {
        let w = task.weights;
        assert_eq!(w.groups(), task.x.panels.groups, "activations and weights differ in length");
        Self {
            codes: w.codes[tile * lens.codes..(tile + 1) * lens.codes].as_ptr(),
            scales: w.scales[tile * lens.scales..(tile + 1) * lens.scales].as_ptr(),
            mins: w.mins[tile * lens.mins..(tile + 1) * lens.mins].as_ptr(),
            sub_scales: w.sub_scales[tile * lens.sub_scales..(tile + 1) * lens.sub_scales].as_ptr(),
            sub_mins: w.sub_mins[tile * lens.sub_mins..(tile + 1) * lens.sub_mins].as_ptr(),
            groups_to_spans: lens.groups_to_spans,
            book: w.format.book.values().as_ptr(),
        }
    }

    /// The span that group number `index` lies in.
    #[inline(always)]
    fn span_of(&self, index: usize) -> usize {
        ((index as u64 * self.groups_to_spans) >> SPAN_SHIFT) as usize
    }
}

/// One way of keeping scales and minimums, known when compiling, so that the loop over groups asks nothing.
pub(in crate::cpu) trait Scales {
    /// Of spans, whatever their length.
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

/// [`Scaling::Spans`]. A minimum is the scale times the zero point, which is exact as well (11 bits by 8).
pub(in crate::cpu) struct Spans<const ZEROS: bool>;

impl<const ZEROS: bool> Scales for Spans<ZEROS> {
    const SCALING: Scaling = Scaling::Spans(0);
    const WITH_MINS: bool = ZEROS;

    #[inline(always)]
    unsafe fn scales<Q: QuantLanes, C: Codes>(pointers: &Pointers, index: usize) -> Q::Floats {
        // SAFETY: the caller's duties; a span has ROWS scales.
        unsafe { Q::load_scales(pointers.scales.add(pointers.span_of(index) * Q::ROWS)) }
    }

    #[inline(always)]
    unsafe fn mins<Q: QuantLanes, C: Codes>(pointers: &Pointers, index: usize) -> Q::Floats {
        // SAFETY: the caller's duties; a span has ROWS scales and ROWS zero points.
        unsafe {
            let at = pointers.span_of(index) * Q::ROWS;
            let zeros = Q::load_sub_scales(pointers.sub_mins.add(at));
            Q::mul(Q::mul(Q::load_scales(pointers.scales.add(at)), zeros), Q::splat(-1.0))
        }
    }
}

/// [`Scaling::Eighths`].
pub(in crate::cpu) struct Eighths;

impl Scales for Eighths {
    const SCALING: Scaling = Scaling::Eighths;
    const WITH_MINS: bool = false;

    #[inline(always)]
    unsafe fn scales<Q: QuantLanes, C: Codes>(pointers: &Pointers, index: usize) -> Q::Floats {
        // SAFETY: the caller's duties; a group has ROWS sub-scales, and 256 weights have ROWS upper ones.
        unsafe {
            let upper = Q::mul(Q::load_scales(pointers.scales.add(upper::<Q, C>(index))), Q::splat(0.125));
            Q::mul(upper, Q::load_sub_scales(pointers.sub_scales.add(index * Q::ROWS)))
        }
    }

    #[inline(always)]
    unsafe fn mins<Q: QuantLanes, C: Codes>(_pointers: &Pointers, _index: usize) -> Q::Floats {
        // SAFETY: the caller's duty is the same.
        unsafe { Q::zero() }
    }
}

/// [`Scaling::Wide`].
pub(in crate::cpu) struct Wide;

impl Scales for Wide {
    const SCALING: Scaling = Scaling::Wide;
    const WITH_MINS: bool = false;

    #[inline(always)]
    unsafe fn scales<Q: QuantLanes, C: Codes>(pointers: &Pointers, index: usize) -> Q::Floats {
        // SAFETY: the caller's duties; 256 weights have ROWS scales.
        unsafe { Q::load_scales(pointers.scales.add(upper::<Q, C>(index))) }
    }

    #[inline(always)]
    unsafe fn mins<Q: QuantLanes, C: Codes>(_pointers: &Pointers, _index: usize) -> Q::Floats {
        // SAFETY: the caller's duty is the same.
        unsafe { Q::zero() }
    }
}

/// [`Scaling::Exponents`].
pub(in crate::cpu) struct Exponents;

impl Scales for Exponents {
    const SCALING: Scaling = Scaling::Exponents;
    const WITH_MINS: bool = false;

    #[inline(always)]
    unsafe fn scales<Q: QuantLanes, C: Codes>(pointers: &Pointers, index: usize) -> Q::Floats {
        // SAFETY: the caller's duties; a group has ROWS exponents.
        unsafe { Q::mul(Q::load_powers(pointers.sub_scales.add(index * Q::ROWS).cast()), Q::splat(0.5)) }
    }

    #[inline(always)]
    unsafe fn mins<Q: QuantLanes, C: Codes>(_pointers: &Pointers, _index: usize) -> Q::Floats {
        // SAFETY: the caller's duty is the same.
        unsafe { Q::zero() }
    }
}
