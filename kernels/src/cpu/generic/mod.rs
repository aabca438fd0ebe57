//! Each fast algorithm once, over two small traits.
//!
//! [`Lanes`] is sixteen f32: one 512-bit register or two 256-bit ones. [`QuantLanes`] is a tile's rows: the integer dot
//! products of quantised weights. An instruction set implements both in intrinsics and makes its table with
//! `kernel_table!`, which compiles every algorithm once more with that set's features. Everything here is
//! `inline(always)`, so that the intrinsics end up in functions that have the features; closures are avoided for the
//! same reason.
//!
//! Invariant: the order of operations on every single output is that of the scalar twin, so the bits are too.

pub(super) mod attention;
pub(super) mod block;
pub(super) mod dense;
pub(super) mod exp;
pub(super) mod quant;
pub(super) mod rows;

use bytemuck::Pod;
use half::{bf16, f16};

use crate::matrix::DenseElement;

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
    unsafe fn store(self, to: *mut f32);
    /// Lanes are integers in -128..=127.
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
    /// `[ROWS, 4]` codes of 0..=15.
    type Nibbles: Copy;
    /// `[ROWS, 4]` codes of -128..=127, ready for `dot8`.
    type Bytes: Copy;
    /// Sums of one group of W4, in whatever width holds them.
    type Sums4: Copy;
    /// Sums of one group of W8.
    type Sums8: Copy;

    /// One load, two vectors: low nibbles, high nibbles.
    unsafe fn load_nibbles(from: *const u8) -> (Self::Nibbles, Self::Nibbles);
    unsafe fn load_bytes(from: *const i8) -> Self::Bytes;
    unsafe fn zero4() -> Self::Sums4;
    unsafe fn zero8() -> Self::Sums8;
    /// Adds the dot products of each row's four codes with the four activations at `x`.
    unsafe fn dot4(sums: Self::Sums4, codes: Self::Nibbles, x: *const i8) -> Self::Sums4;
    unsafe fn dot8(sums: Self::Sums8, codes: Self::Bytes, x: *const i8) -> Self::Sums8;
    /// A group's dot products.
    unsafe fn finish4(sums: Self::Sums4) -> Self::Floats;
    /// A group's dot products less 8 times the sum of its activations: codes with 8 as zero.
    unsafe fn finish4_centred(sums: Self::Sums4, x_sum: i32) -> Self::Floats;
    /// A group's dot products; the sum of its activations is there for sets that shift codes into unsigned range.
    unsafe fn finish8(sums: Self::Sums8, x_sum: i32) -> Self::Floats;

    unsafe fn zero() -> Self::Floats;
    unsafe fn splat(x: f32) -> Self::Floats;
    unsafe fn load_scales(from: *const f16) -> Self::Floats;
    unsafe fn load(from: *const f32) -> Self::Floats;
    unsafe fn store(x: Self::Floats, to: *mut f32);
    unsafe fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// a * b + c, rounded once.
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
}

/// An element type that loads into lanes.
pub(super) trait Element: DenseElement + Pod {
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

/// One instruction set's table: each algorithm over [`Lanes`] compiled with its features, the others taken from `rest`.
///
/// `block` is how many vectors four broadcasts meet in dense products and attention, `wide_block` how many one broadcast
/// meets; in `quant_table!`, `columns` is how many activation rows meet an unpacked weight tile: as many as the
/// registers hold.
macro_rules! kernel_table {
    (
        $table:ident, $lanes:ty, $features:literal, block: $block:literal, wide_block: $wide_block:literal,
        rest: $rest:expr
    ) => {
        pub(in crate::cpu) const $table: crate::cpu::dispatch::Kernels = {
            use half::{bf16, f16};

            use crate::cpu::dispatch::Kernels;
            use crate::cpu::generic::{attention, dense, rows};
            use crate::cpu::task::{DenseTask, QuantGroup, RopeRow, SpanTask};

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
    entry!(dense_f32(&DenseTask<'_, f32>) = dense::multiply::<$lanes, f32, $block, $wide_block>);
    entry!(dense_f16(&DenseTask<'_, f16>) = dense::multiply::<$lanes, f16, $block, $wide_block>);
    entry!(dense_bf16(&DenseTask<'_, bf16>) = dense::multiply::<$lanes, bf16, $block, $wide_block>);
    entry!(rope(&mut RopeRow<'_>) = rows::rope::<$lanes>);

            /// One element type's attention: the walk over queries has the features, the walk over tiles needs none.
            macro_rules! attention_entry {
                ($name:ident, $walk:ident, $element:ty) => {
                    #[target_feature(enable = $features)]
                    unsafe fn $walk(task: &mut SpanTask<'_, $element>, tile: &attention::Tile<$element>) {
                        // SAFETY: the table's duty, as above.
                        unsafe { attention::walk_queries::<$lanes, $element, $block, $wide_block>(task, tile) }
                    }
                    unsafe fn $name(task: &mut SpanTask<'_, $element>) {
                        // SAFETY: the table's duty, as above; both walks are this set's.
                        unsafe { attention::attend(task, $walk, walk_f32) }
                    }
                };
            }
            attention_entry!(attention_f32, walk_f32, f32);
            attention_entry!(attention_f16, walk_f16, f16);
            attention_entry!(attention_bf16, walk_bf16, bf16);

            #[target_feature(enable = $features)]
            unsafe fn quantize(x: &[f32], out: &mut [QuantGroup]) {
                // SAFETY: the table's duty, as above.
                unsafe { rows::quantize::<$lanes>(x, out) }
            }
            #[target_feature(enable = $features)]
            unsafe fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
                // SAFETY: the table's duty, as above.
                unsafe { rows::rms_norm::<$lanes>(x, weight, eps, out) }
            }
            #[target_feature(enable = $features)]
            unsafe fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
                // SAFETY: the table's duty, as above.
                unsafe { rows::silu_mul::<$lanes>(gate, up, out) }
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
            unsafe fn sum_exp_sub(row: &[f32], max: f32) -> f32 {
                // SAFETY: the table's duty, as above.
                unsafe { rows::sum_exp_sub::<$lanes>(row, max) }
            }

            Kernels {
                dense_f32,
                dense_f16,
                dense_bf16,
                quantize,
                rms_norm,
                rope,
                silu_mul,
                attention_f32,
                attention_f16,
                attention_bf16,
                max,
                exp_sub_sum,
                sum_exp_sub,
                ..$rest
            }
        };
    };
}
pub(super) use kernel_table;

/// As `kernel_table!`, for the quantised products alone; the rest is another set's.
macro_rules! quant_table {
    ($table:ident, $quant:ty, $features:literal, columns: $columns:literal, rest: $rest:expr) => {
        pub(in crate::cpu) const $table: crate::cpu::dispatch::Kernels = {
            use crate::cpu::dispatch::Kernels;
            use crate::cpu::generic::quant;
            use crate::cpu::task::QuantTask;
            use crate::pack::{PackedW4, PackedW8};

            #[target_feature(enable = $features)]
            unsafe fn w4(task: &QuantTask<'_, PackedW4>) {
                // SAFETY: the table's duty: the machine has the features, the task's ranges are right.
                unsafe { quant::w4::<$quant, $columns>(task) }
            }
            #[target_feature(enable = $features)]
            unsafe fn w8(task: &QuantTask<'_, PackedW8>) {
                // SAFETY: the table's duty, as above.
                unsafe { quant::w8::<$quant, $columns>(task) }
            }

            Kernels { w4, w8, ..$rest }
        };
    };
}
pub(super) use quant_table;
