//! Quantised products: a tile's rows in a vector, four activations broadcast.
//!
//! ```text
//! for each tile, for N activation rows:
//!     for group in ascending order:
//!         for each quarter-vector of the group's codes:      loaded and unpacked once
//!             for n in 0..N: sums[n] += dot of 4 (codes, broadcast x[n])      exact integers
//!         for n in 0..N: acc[n] += float(sums[n]) * (scale * x_scale[n]) [+ min * x_scaled_sum[n]]
//! ```
//!
//! What pays: the unpacking of a group is shared by N rows; W4's integer sums fit 16 bits for a whole group
//! (8 pair sums of at most 2 * 15 * 127 stay below 2^15), so 256-bit sets widen once a group, not once a load; the
//! minimum's term is one multiply-add, since the activations' group sums were made once.
//! Rows are shared out evenly (9 rows with N = 8 go as 5 and 4), because a pass over the weights costs the same for
//! one row as for three.

use super::QuantLanes;
use crate::cpu::task::{Output, QuantGroup, QuantRows, QuantTask};
use crate::pack::{Frame, GROUP, PackedW4, PackedW8};

/// Calls `$body::<.., n>` for a count known only now.
macro_rules! with_columns {
    ($count:expr, $max:expr, $body:ident::<$q:ty>($($argument:expr),*)) => {
        match $count {
            1 => $body::<$q, 1>($($argument),*),
            2 => $body::<$q, 2>($($argument),*),
            3 => $body::<$q, 3>($($argument),*),
            4 => $body::<$q, 4>($($argument),*),
            5 if $max >= 5 => $body::<$q, 5>($($argument),*),
            6 if $max >= 6 => $body::<$q, 6>($($argument),*),
            7 if $max >= 7 => $body::<$q, 7>($($argument),*),
            8 if $max >= 8 => $body::<$q, 8>($($argument),*),
            _ => {}
        }
    };
}

/// W4 product, up to `N` (4 to 8) activation rows at a time.
///
/// # Safety
/// As [`QuantLanes`]; the task's ranges lie within its buffers; the matrix is packed in tiles of `Q::ROWS`.
#[inline(always)]
pub(in crate::cpu) unsafe fn w4<Q: QuantLanes, const N: usize>(task: &QuantTask<'_, PackedW4>) {
    for tile in task.tiles.clone() {
        let passes = task.m.len().div_ceil(N);
        for pass in 0..passes {
            let m = task.m.start + pass * task.m.len() / passes;
            let count = task.m.start + (pass + 1) * task.m.len() / passes - m;
            // SAFETY: the caller's duties; rows `m..m + count` are the task's and `count <= N`.
            unsafe { with_columns!(count, N, w4_rows::<Q>(task, tile, m)) };
        }
    }
}

/// W8 product, up to `N` (4 to 8) activation rows at a time.
///
/// # Safety
/// As [`w4`].
#[inline(always)]
pub(in crate::cpu) unsafe fn w8<Q: QuantLanes, const N: usize>(task: &QuantTask<'_, PackedW8>) {
    for tile in task.tiles.clone() {
        let passes = task.m.len().div_ceil(N);
        for pass in 0..passes {
            let m = task.m.start + pass * task.m.len() / passes;
            let count = task.m.start + (pass + 1) * task.m.len() / passes - m;
            // SAFETY: the caller's duties; rows `m..m + count` are the task's and `count <= N`.
            unsafe { with_columns!(count, N, w8_rows::<Q>(task, tile, m)) };
        }
    }
}

/// Where a tile's scales and `N` activation rows begin.
struct Pointers<const N: usize> {
    scales: *const half::f16,
    /// Dangling where the matrix has none.
    mins: *const half::f16,
    x: [*const QuantGroup; N],
}

impl<const N: usize> Pointers<N> {
    /// Checks bounds here, so that the loops need not.
    #[inline(always)]
    fn new(frame: &Frame, x: &QuantRows<'_>, tile: usize, m: usize) -> Self {
        let groups = frame.groups();
        let tile_scales = tile * groups * frame.tile_rows..(tile + 1) * groups * frame.tile_rows;
        let mut pointers = Self {
            scales: frame.scales.scales[tile_scales.clone()].as_ptr(),
            mins: frame.scales.mins.as_ref().map_or(std::ptr::dangling(), |mins| mins[tile_scales].as_ptr()),
            x: [std::ptr::null(); N],
        };
        assert_eq!(groups, x.groups, "activations and weights differ in length");
        for n in 0..N {
            pointers.x[n] = x.rows[(m + n) * groups..(m + n + 1) * groups].as_ptr();
        }
        pointers
    }
}

/// # Safety
/// As [`w4`]; rows `m..m + N` and the tile are the task's.
#[inline(always)]
unsafe fn w4_rows<Q: QuantLanes, const N: usize>(task: &QuantTask<'_, PackedW4>, tile: usize, m: usize) {
    let frame = &task.weights.frame;
    let groups = frame.groups();
    let group_bytes = Q::ROWS * GROUP / 2;
    let pointers = Pointers::<N>::new(frame, &task.x, tile, m);
    let codes = task.weights.codes[tile * groups * group_bytes..(tile + 1) * groups * group_bytes].as_ptr();
    // SAFETY: all pointers come from slices of exactly one tile or one row, and every offset stays below their
    // `groups`; the rest is the caller's duty.
    unsafe {
        let has_mins = frame.scales.mins.is_some();
        let mut acc = [Q::zero(); N];
        for group in 0..groups {
            let codes = codes.add(group * group_bytes);
            let mut sums = [Q::zero4(); N];
            for j in 0..4 {
                let (low, high) = Q::load_nibbles(codes.add(j * 4 * Q::ROWS));
                for n in 0..N {
                    let x = pointers.x[n].add(group).cast::<i8>().add(8 * j);
                    sums[n] = Q::dot4(Q::dot4(sums[n], low, x), high, x.add(4));
                }
            }
            let scales = Q::load_scales(pointers.scales.add(group * Q::ROWS));
            if has_mins {
                let mins = Q::load_scales(pointers.mins.add(group * Q::ROWS));
                for n in 0..N {
                    let x = &*pointers.x[n].add(group);
                    let scale = Q::mul(scales, Q::splat(x.scale));
                    acc[n] = Q::mul_add(Q::finish4(sums[n]), scale, acc[n]);
                    acc[n] = Q::mul_add(mins, Q::splat(x.scaled_sum), acc[n]);
                }
            } else {
                for n in 0..N {
                    let x = &*pointers.x[n].add(group);
                    let scale = Q::mul(scales, Q::splat(x.scale));
                    acc[n] = Q::mul_add(Q::finish4_centred(sums[n], x.sum), scale, acc[n]);
                }
            }
        }
        for n in 0..N {
            store::<Q>(task.out, m + n, tile, acc[n]);
        }
    }
}

/// # Safety
/// As [`w8`]; rows `m..m + N` and the tile are the task's.
#[inline(always)]
unsafe fn w8_rows<Q: QuantLanes, const N: usize>(task: &QuantTask<'_, PackedW8>, tile: usize, m: usize) {
    let frame = &task.weights.frame;
    let groups = frame.groups();
    let group_bytes = Q::ROWS * GROUP;
    let pointers = Pointers::<N>::new(frame, &task.x, tile, m);
    let codes = task.weights.codes[tile * groups * group_bytes..(tile + 1) * groups * group_bytes].as_ptr();
    // SAFETY: as in `w4_rows`.
    unsafe {
        let has_mins = frame.scales.mins.is_some();
        let mut acc = [Q::zero(); N];
        for group in 0..groups {
            let codes = codes.add(group * group_bytes);
            let mut sums = [Q::zero8(); N];
            for t in 0..8 {
                let bytes = Q::load_bytes(codes.add(t * 4 * Q::ROWS));
                for n in 0..N {
                    sums[n] = Q::dot8(sums[n], bytes, pointers.x[n].add(group).cast::<i8>().add(4 * t));
                }
            }
            let scales = Q::load_scales(pointers.scales.add(group * Q::ROWS));
            for n in 0..N {
                let x = &*pointers.x[n].add(group);
                let scale = Q::mul(scales, Q::splat(x.scale));
                acc[n] = Q::mul_add(Q::finish8(sums[n], x.sum), scale, acc[n]);
            }
            if has_mins {
                let mins = Q::load_scales(pointers.mins.add(group * Q::ROWS));
                for n in 0..N {
                    acc[n] = Q::mul_add(mins, Q::splat((*pointers.x[n].add(group)).scaled_sum), acc[n]);
                }
            }
        }
        for n in 0..N {
            store::<Q>(task.out, m + n, tile, acc[n]);
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
