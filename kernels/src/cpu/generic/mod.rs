//! Each fast algorithm once, over two small traits.
//!
//! [`Lanes`] is sixteen f32: one 512-bit register or two 256-bit ones. [`QuantLanes`] is a tile's rows: the integer dot
//! products of quantised weights. An instruction set implements both in intrinsics and makes its table with
//! `kernel_table!`, which compiles every algorithm once more with that set's features. Everything here is
//! `inline(always)`, so that the intrinsics end up in functions that have the features; for the same reason closures hold
//! no intrinsics.
//!
//! Invariant: the order of operations on every single output is that of the scalar twin, so the bits are too.

pub(super) mod attention;
pub(super) mod block;
pub(super) mod codes;
pub(super) mod dense;
pub(super) mod exp;
pub(super) mod gated;
pub(super) mod peak;
pub(super) mod quant;
pub(super) mod rows;
pub(super) mod scales;

use bytemuck::Pod;
use half::{bf16, f16};

/// Sixteen f32 lanes.
///
/// # Safety
/// Every function's duty: the machine has the instruction set, and pointers are valid for what they load or store
/// (16 elements unless said otherwise, at any alignment).
pub(super) trait Lanes: Copy {
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn load_f16(from: *const f16) -> Self;
    unsafe fn load_bf16(from: *const bf16) -> Self;
    unsafe fn load_i8(from: *const i8) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// To nearest, ties to even; lanes are in -128..=127 then.
    unsafe fn store_i8(self, to: *mut i8);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// self * b + c, rounded once.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// c - self * b, rounded once.
    unsafe fn neg_mul_add(self, b: Self, c: Self) -> Self;
    /// `if self > other { self } else { other }`: a NaN in self gives way.
    unsafe fn max(self, other: Self) -> Self;
    unsafe fn abs(self) -> Self;
    /// The larger as integers: magnitudes with NaN above infinity.
    unsafe fn max_bits(self, other: Self) -> Self;
    /// To nearest, ties to even.
    unsafe fn round(self) -> Self;
    /// 2^self for integers in -126..=127.
    unsafe fn exp2_int(self) -> Self;
    /// Per lane `if a < b { yes } else { no }`.
    unsafe fn select_less(a: Self, b: Self, yes: Self, no: Self) -> Self;
    /// As `scalar::join_lanes`.
    unsafe fn join_add(self) -> f32;
    unsafe fn join_max(self) -> f32;
    /// The largest as integers.
    unsafe fn join_max_bits(self) -> f32;
    /// The sum of sixteen codes.
    unsafe fn sum_i8(from: *const i8) -> i32;
}

/// The rows of a quantised tile in integer registers.
///
/// # Safety
/// Every function's duty: the machine has the instruction set, and pointers are valid for what they load: `4 * ROWS`
/// bytes of weights, 4 bytes of activations, ROWS scales.
pub(super) trait QuantLanes: Copy {
    /// Rows of a tile: 8 or 16.
    const ROWS: usize;
    /// ROWS f32.
    type Floats: Copy;
    /// `[ROWS, 4]` unsigned codes, short enough that some dot products fit `Narrow`.
    type Codes: Copy;
    /// `[ROWS, 4]` codes of -128..=127, ready for `dot_bytes`.
    type Bytes: Copy;
    /// ROWS dot products in 32 bits.
    type Sums: Copy;
    /// Dot products being summed, in whatever width is quickest: 16 bits where that saves widening.
    type Narrow: Copy;
    /// What `bytes` adds to codes: sets that multiply unsigned by signed shift them into range.
    const BYTES_OFFSET: i32;
    /// Unpacked tiles that meet many rows together: 1 or 2. Two share what is broadcast, and take twice the accumulators.
    const PANEL_TILES: usize = 1;
    /// Weights are asked into the second-level cache, not the first: where that one is large, and its core has much under way.
    const ASKS_SECOND_CACHE: bool = false;

    /// A vector of codes as it lies there.
    unsafe fn load_codes(from: *const u8) -> Self::Codes;
    /// In every byte, bits `from..from + width` moved down to `to`, all others clear. The three are constants.
    unsafe fn field(vector: Self::Codes, from: usize, width: usize, to: usize) -> Self::Codes;
    unsafe fn or(a: Self::Codes, b: Self::Codes) -> Self::Codes;
    unsafe fn store_codes(codes: Self::Codes, to: *mut u8);
    /// What each code, below 16, has in a book: `CodeBook::values`, loaded as codes are. The values are signed.
    unsafe fn look_up(book: Self::Codes, codes: Self::Codes) -> Self::Codes;
    /// A vector of signed bytes, made ready.
    unsafe fn bytes(signed: Self::Codes) -> Self::Bytes;
    unsafe fn zero_sums() -> Self::Sums;
    unsafe fn splat_sums(sum: i32) -> Self::Sums;
    /// Begins a narrow sum that `widen` will add to these.
    unsafe fn narrow(sums: Self::Sums) -> Self::Narrow;
    /// Adds the dot products of each row's four codes with the four activations at `x`. Pair sums of all that is added
    /// before `widen` stay below 2^15.
    unsafe fn dot(sums: Self::Narrow, codes: Self::Codes, x: *const i8) -> Self::Narrow;
    /// Adds a narrow sum to those it was begun with.
    unsafe fn widen(sums: Self::Sums, narrow: Self::Narrow) -> Self::Sums;
    unsafe fn dot_bytes(sums: Self::Sums, codes: Self::Bytes, x: *const i8) -> Self::Sums;

    /// Whether `dot_two_bytes` adds to narrow sums, which then must be widened.
    const BYTES_ARE_NARROW: bool = false;

    /// The same sums, computed before those that this is called for later. Compilers like to finish one row's sums before
    /// they begin the next one's, and such a chain of dependent products is several times as long as a core can look
    /// ahead.
    #[inline(always)]
    unsafe fn in_order(narrow: Self::Narrow) -> Self::Narrow {
        narrow
    }

    /// Two quads of codes and the eight activations at each `x`, for sets that multiply them in one go.
    #[inline(always)]
    unsafe fn dot_two<const N: usize>(
        narrow: &mut [Self::Narrow; N],
        first: Self::Codes,
        second: Self::Codes,
        x: &[*const i8; N],
    ) {
        // SAFETY: the caller's duties.
        unsafe {
            for n in 0..N {
                narrow[n] = Self::in_order(Self::dot(narrow[n], first, x[n]));
            }
            for n in 0..N {
                narrow[n] = Self::in_order(Self::dot(narrow[n], second, x[n].add(4)));
            }
        }
    }

    /// As `dot_two`, of bytes.
    #[inline(always)]
    unsafe fn dot_two_bytes<const N: usize>(
        wide: &mut [Self::Sums; N],
        _narrow: &mut [Self::Narrow; N],
        first: Self::Bytes,
        second: Self::Bytes,
        x: &[*const i8; N],
    ) {
        for n in 0..N {
            // SAFETY: the caller's duties.
            wide[n] = unsafe { Self::dot_bytes(Self::dot_bytes(wide[n], first, x[n]), second, x[n].add(4)) };
        }
    }

    /// Widens all narrow sums and begins new ones.
    #[inline(always)]
    unsafe fn widen_all<const N: usize>(wide: &mut [Self::Sums; N], narrow: &mut [Self::Narrow; N]) {
        for n in 0..N {
            // SAFETY: the caller's duties.
            unsafe {
                wide[n] = Self::widen(wide[n], narrow[n]);
                narrow[n] = Self::narrow(wide[n]);
            }
        }
    }

    unsafe fn to_floats(sums: Self::Sums) -> Self::Floats;

    unsafe fn zero() -> Self::Floats;
    unsafe fn splat(x: f32) -> Self::Floats;
    unsafe fn load_scales(from: *const f16) -> Self::Floats;
    /// ROWS bytes.
    unsafe fn load_sub_scales(from: *const i8) -> Self::Floats;
    /// ROWS bytes e: 2^(e - 127).
    unsafe fn load_powers(from: *const u8) -> Self::Floats;
    /// ROWS bytes: low nibbles, high nibbles.
    unsafe fn load_sub_nibbles(from: *const i8) -> (Self::Floats, Self::Floats);
    unsafe fn load(from: *const f32) -> Self::Floats;
    unsafe fn store(x: Self::Floats, to: *mut f32);
    unsafe fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// a * b + c, rounded once.
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
}

/// An element type that loads into lanes.
pub(super) trait Element: Pod {
    /// # Safety
    /// As [`Lanes::load`].
    unsafe fn lanes<L: Lanes>(from: *const Self) -> L;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const Self) -> L {
        // SAFETY: the caller's duty is the same.
        unsafe { L::load(from) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const Self) -> L {
        // SAFETY: the caller's duty is the same.
        unsafe { L::load_f16(from) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const Self) -> L {
        // SAFETY: the caller's duty is the same.
        unsafe { L::load_bf16(from) }
    }
}

impl Element for i8 {
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const Self) -> L {
        // SAFETY: the caller's duty is the same.
        unsafe { L::load_i8(from) }
    }
}

/// Functions of an implementation of [`Lanes`] or [`QuantLanes`], one expression each.
macro_rules! lane_functions {
    ($($(#[$attribute:meta])* fn $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)? = $body:expr;)*) => {
        $(
            $(#[$attribute])*
            #[inline(always)]
            unsafe fn $name($($argument: $type),*) $(-> $result)? {
                // SAFETY: the trait hands the duties to the caller: the machine has the instruction set and pointers
                // are valid.
                unsafe { $body }
            }
        )*
    };
}
pub(super) use lane_functions;

/// The bits at `from` of every byte moved down to `to` by a shift of 16-bit lanes, whose count must be a literal; both
/// places are constants at every call, so one arm is left.
macro_rules! move_bits {
    ($vector:expr, $from:expr, $to:expr, $right:ident) => {
        match $from - $to {
            0 => $vector,
            1 => $right::<1>($vector),
            2 => $right::<2>($vector),
            3 => $right::<3>($vector),
            4 => $right::<4>($vector),
            5 => $right::<5>($vector),
            6 => $right::<6>($vector),
            7 => $right::<7>($vector),
            _ => unreachable!("a byte has eight bits"),
        }
    };
}
pub(super) use move_bits;

/// One instruction set's table: each algorithm over [`Lanes`] compiled with its features, the others taken from `rest`.
///
/// `block` is how many vectors several broadcasts (`queries` at most) meet in dense products and attention, `wide_block`
/// how many one broadcast meets; in `quant_table!`, `columns` is how many activation rows meet an unpacked weight tile: as many as the
/// registers hold.
macro_rules! kernel_table {
    (
        $table:ident, $lanes:ty, $features:literal, block: $block:literal, wide_block: $wide_block:literal,
        queries: $queries:literal, rest: $rest:expr
    ) => {
        pub(in crate::cpu) const $table: crate::cpu::dispatch::Kernels = {
            use half::{bf16, f16};

            use crate::cpu::dispatch::Kernels;
            use crate::cpu::generic::{attention, dense, gated, peak, rows};
            use crate::cpu::rows::LayerNorm;
            use crate::cpu::task::{DenseTask, GatedTask, GroupsMut, RopeRow, SpanTask};

            /// A function with the set's features around a generic one.
            macro_rules! entry {
                ($name:ident($arguments:ty) = $body:expr) => {
                    #[target_feature(enable = $features)]
                    unsafe fn $name(task: $arguments) {
                        // SAFETY: the table's duty: the machine has the features, the task's ranges are right.
                        unsafe { $body(task) }
                    }
                };
            }
    entry!(dense_f32(&DenseTask<'_, f32>) = dense::multiply::<$lanes, f32, $block, $wide_block, $queries>);
    entry!(dense_f16(&DenseTask<'_, f16>) = dense::multiply::<$lanes, f16, $block, $wide_block, $queries>);
    entry!(dense_bf16(&DenseTask<'_, bf16>) = dense::multiply::<$lanes, bf16, $block, $wide_block, $queries>);
    entry!(rope(&mut RopeRow<'_>) = rows::rope::<$lanes>);
    entry!(gated(&GatedTask<'_>) = gated::gated::<$lanes>);

            /// One element type's attention: the walk over queries has the features, the walk over tiles needs none.
            macro_rules! attention_entry {
                ($name:ident, $walk:ident, $element:ty) => {
                    #[target_feature(enable = $features)]
                    unsafe fn $walk(task: &mut SpanTask<'_, $element>, tile: &attention::Tile<$element>) {
                        // SAFETY: the table's duty, as above.
                        unsafe { attention::walk_pages::<$lanes, $element, $queries, $block, $wide_block>(task, tile) }
                    }
                    unsafe fn $name(task: &mut SpanTask<'_, $element>) {
                        const WALKS: attention::Walks<$element> =
                            attention::Walks { pages: $walk, laid_out: walk_f32, block_queries: $queries };
                        // SAFETY: the table's duty, as above; both walks are this set's.
                        unsafe { attention::attend(task, &WALKS) }
                    }
                };
            }
            attention_entry!(attention_f32, walk_f32, f32);
            attention_entry!(attention_f16, walk_f16, f16);
            attention_entry!(attention_bf16, walk_bf16, bf16);
            attention_entry!(attention_i8, walk_i8, i8);

            #[target_feature(enable = $features)]
            unsafe fn quantize(x: &[f32], out: &GroupsMut<'_>) {
                // SAFETY: the table's duty, as above.
                unsafe { rows::quantize::<$lanes>(x, out) }
            }
            #[target_feature(enable = $features)]
            unsafe fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
                // SAFETY: the table's duty, as above.
                unsafe { rows::rms_norm::<$lanes>(x, weight, eps, out) }
            }
            #[target_feature(enable = $features)]
            unsafe fn layer_norm(x: &[f32], norm: &LayerNorm<'_>, out: &mut [f32]) {
                // SAFETY: the table's duty, as above.
                unsafe { rows::layer_norm::<$lanes>(x, norm, out) }
            }
            #[target_feature(enable = $features)]
            unsafe fn add_scaled(into: &mut [f32], x: &[f32], factor: f32) {
                // SAFETY: the table's duty, as above.
                unsafe { rows::add_scaled::<$lanes>(into, x, factor) }
            }
            #[target_feature(enable = $features)]
            unsafe fn soft_cap(row: &mut [f32], scale: f32, cap: f32) {
                // SAFETY: the table's duty, as above.
                unsafe { rows::soft_cap::<$lanes>(row, scale, cap) }
            }
            #[target_feature(enable = $features)]
            unsafe fn max(row: &[f32]) -> f32 {
                // SAFETY: the table's duty, as above.
                unsafe { rows::max::<$lanes>(row) }
            }
            #[target_feature(enable = $features)]
            unsafe fn exp_sub_sum(row: &mut [f32], max: f32) -> f32 {
                // SAFETY: the table's duty, as above.
                unsafe { rows::exp_sub_sum::<$lanes>(row, max) }
            }

            #[target_feature(enable = $features)]
            unsafe fn spin_f32(rounds: usize) -> u64 {
                // SAFETY: the table's duty, as above.
                unsafe { peak::spin_f32::<$lanes, { 4 + 2 * $block }>(rounds) }
            }

            Kernels {
                dense_f32,
                dense_f16,
                dense_bf16,
                quantize,
                rms_norm,
                layer_norm,
                add_scaled,
                rope,
                gated,
                attention_f32,
                attention_f16,
                attention_bf16,
                attention_i8,
                max,
                exp_sub_sum,
                soft_cap,
                spin_f32,
                ..$rest
            }
        };
    };
}
pub(super) use kernel_table;

/// As `kernel_table!`, for the quantised products alone; the rest is another set's.
macro_rules! quant_table {
    (
        $table:ident, $quant:ty, $features:literal, columns: $columns:literal, product: $multiply:ident, rest: $rest:expr
    ) => {
        pub(in crate::cpu) const $table: crate::cpu::dispatch::Kernels = {
            use crate::cpu::dispatch::Kernels;
            use crate::cpu::generic::codes::{Eight, Five, Four, FourFromBook, Six, Three, ThreeFromBook, Two};
            use crate::cpu::generic::peak;
            use crate::cpu::generic::scales::{Eighths, Exponents, Nibbles, Single, Spans, TwoLevel, Wide};
            use crate::cpu::task::QuantTask;
            use crate::quant_format::{CodeBits, CodeBook, Scaling};

            /// One format, a function of its own: profiles name it, and compiling stays quick.
            macro_rules! entry {
                ($name:ident, $codes:ty, $scales:ty) => {
                    #[inline(never)]
                    #[target_feature(enable = $features)]
                    unsafe fn $name(task: &mut QuantTask<'_>) {
                        // SAFETY: the table's duty: the machine has the features, the task's ranges are right.
                        unsafe { $multiply::<$quant, $codes, $scales, $columns>(task) }
                    }
                };
            }
            entry!(two_nibbles_mins, Two, Nibbles);
            entry!(three_two_level, Three, TwoLevel<false>);
            entry!(four_single, Four, Single<false>);
            entry!(four_single_mins, Four, Single<true>);
            entry!(four_two_level_mins, Four, TwoLevel<true>);
            entry!(five_single, Five, Single<false>);
            entry!(five_single_mins, Five, Single<true>);
            entry!(five_two_level_mins, Five, TwoLevel<true>);
            entry!(six_two_level, Six, TwoLevel<false>);
            entry!(eight_single, Eight, Single<false>);
            entry!(two_spans_zeros, Two, Spans<true>);
            entry!(three_spans_zeros, Three, Spans<true>);
            entry!(four_spans, Four, Spans<false>);
            entry!(four_spans_zeros, Four, Spans<true>);
            entry!(eight_spans, Eight, Spans<false>);
            entry!(eight_spans_zeros, Eight, Spans<true>);
            entry!(two_wide, Two, Wide);
            entry!(four_from_book_single, FourFromBook, Single<false>);
            entry!(four_from_book_two_level, FourFromBook, TwoLevel<false>);
            entry!(four_from_book_eighths, FourFromBook, Eighths);
            entry!(four_from_book_exponents, FourFromBook, Exponents);
            entry!(three_from_book_eighths, ThreeFromBook, Eighths);

            unsafe fn from_book(task: &mut QuantTask<'_>) {
                let format = task.weights.format;
                // SAFETY: the table's duty, as above.
                unsafe {
                    match (format.bits, format.scaling, format.with_mins) {
                        (CodeBits::Four, Scaling::Single, false) => four_from_book_single(task),
                        (CodeBits::Four, Scaling::TwoLevel, false) => four_from_book_two_level(task),
                        (CodeBits::Four, Scaling::Eighths, false) => four_from_book_eighths(task),
                        (CodeBits::Four, Scaling::Exponents, false) => four_from_book_exponents(task),
                        (CodeBits::Three, Scaling::Eighths, false) => three_from_book_eighths(task),
                        _ => unreachable!("`Quantized::pack` refuses formats that `QuantFormat::group` does not know"),
                    }
                }
            }

            unsafe fn quantized(task: &mut QuantTask<'_>) {
                let format = task.weights.format;
                // SAFETY: the table's duty, as above.
                unsafe {
                    if format.book != CodeBook::Linear {
                        return from_book(task);
                    }
                    match (format.bits, format.scaling, format.with_mins) {
                        (CodeBits::Two, Scaling::Nibbles, true) => two_nibbles_mins(task),
                        (CodeBits::Three, Scaling::TwoLevel, false) => three_two_level(task),
                        (CodeBits::Four, Scaling::Single, false) => four_single(task),
                        (CodeBits::Four, Scaling::Single, true) => four_single_mins(task),
                        (CodeBits::Four, Scaling::TwoLevel, true) => four_two_level_mins(task),
                        (CodeBits::Five, Scaling::Single, false) => five_single(task),
                        (CodeBits::Five, Scaling::Single, true) => five_single_mins(task),
                        (CodeBits::Five, Scaling::TwoLevel, true) => five_two_level_mins(task),
                        (CodeBits::Six, Scaling::TwoLevel, false) => six_two_level(task),
                        (CodeBits::Eight, Scaling::Single, false) => eight_single(task),
                        (CodeBits::Two, Scaling::Spans(_), true) => two_spans_zeros(task),
                        (CodeBits::Three, Scaling::Spans(_), true) => three_spans_zeros(task),
                        (CodeBits::Four, Scaling::Spans(_), false) => four_spans(task),
                        (CodeBits::Four, Scaling::Spans(_), true) => four_spans_zeros(task),
                        (CodeBits::Eight, Scaling::Spans(_), false) => eight_spans(task),
                        (CodeBits::Eight, Scaling::Spans(_), true) => eight_spans_zeros(task),
                        (CodeBits::Two, Scaling::Wide, false) => two_wide(task),
                        _ => unreachable!("`Quantized::pack` refuses formats that `QuantFormat::group` does not know"),
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn spin_int8(rounds: usize) -> u64 {
                // SAFETY: the table's duty, as above.
                unsafe { peak::spin_int8::<$quant, { $columns + 4 }>(rounds) }
            }

            Kernels { columns: $columns, quantized, spin_int8, ..$rest }
        };
    };
}
pub(super) use quant_table;
