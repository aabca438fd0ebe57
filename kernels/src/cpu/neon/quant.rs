//! Eight weight rows in two 128-bit registers, four to each.
//!
//! - Plain NEON multiplies bytes to 16 bits; codes of up to six bits are summed there, a product a lane, until they must
//!   be widened.
//! - dotprod's `sdot` multiplies four signed codes (short ones are positive, so they are signed too) by four activations
//!   and adds them up in 32 bits.
//! - i8mm's `smmla` multiplies two rows of eight codes by two columns of eight activations. Two quads of codes, zipped,
//!   are such rows; so activation rows go in pairs, whose sums lie in blocks of two by two until they are widened. A
//!   lone row takes `sdot`.
//!
//! The intrinsics of `sdot` and `smmla` are not stable in Rust 1.95, so they are two lines of assembly.

#[allow(clippy::wildcard_imports, reason = "dozens of intrinsics, whose names cannot be mistaken")]
use std::arch::aarch64::*;
use std::arch::asm;

use half::f16;

use crate::cpu::generic::{QuantLanes, lane_functions, move_bits};
use crate::quant_format::HALF_LEAST_NORMAL;

/// Eight rows by widening products.
#[derive(Clone, Copy)]
pub(super) struct Rows8;

/// Eight rows by `sdot`.
#[derive(Clone, Copy)]
pub(super) struct Rows8Dot;

/// Eight rows by `smmla`.
#[derive(Clone, Copy)]
pub(super) struct Rows8Matrix;

/// Rows 0 to 3 and 4 to 7.
#[derive(Clone, Copy)]
pub(super) struct Two<T>(T, T);

/// Products of rows 0 and 1, 2 and 3, 4 and 5, 6 and 7, four a row.
#[derive(Clone, Copy)]
pub(super) struct Products(int16x8_t, int16x8_t, int16x8_t, int16x8_t);

/// Four activations, four times.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn quad(x: *const i8) -> int8x16_t {
    // SAFETY: the caller's duty: four bytes can be read.
    vreinterpretq_s8_s32(vdupq_n_s32(unsafe { x.cast::<i32>().read_unaligned() }))
}

#[target_feature(enable = "neon")]
#[inline]
fn signed(codes: Two<uint8x16_t>) -> Two<int8x16_t> {
    Two(vreinterpretq_s8_u8(codes.0), vreinterpretq_s8_u8(codes.1))
}

/// Sums of four neighbours each, of rows in `a` and then in `b`.
#[target_feature(enable = "neon")]
#[inline]
fn join_quads(a: int16x8_t, b: int16x8_t) -> int32x4_t {
    vpaddq_s32(vpaddlq_s16(a), vpaddlq_s16(b))
}

/// `sums[i] + codes[4 i..4 i + 4] . x[4 i..4 i + 4]`
///
/// # Safety
/// The machine has dotprod.
#[inline(always)]
unsafe fn sdot(mut sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: registers alone; the instruction is the caller's duty.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {codes:v}.16b, {x:v}.16b",
            sums = inout(vreg) sums, codes = in(vreg) codes, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// Of rows a0, a1 (eight codes each) and columns b0, b1: `[a0.b0, a0.b1, a1.b0, a1.b1]`, added to `sums`.
///
/// # Safety
/// The machine has i8mm.
#[inline(always)]
unsafe fn smmla(mut sums: int32x4_t, rows: int8x16_t, columns: int8x16_t) -> int32x4_t {
    // SAFETY: registers alone; the instruction is the caller's duty.
    unsafe {
        asm!(
            "smmla {sums:v}.4s, {rows:v}.16b, {columns:v}.16b",
            sums = inout(vreg) sums, rows = in(vreg) rows, columns = in(vreg) columns,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

#[target_feature(enable = "neon")]
#[inline]
fn add_sums(a: Two<int32x4_t>, b: Two<int32x4_t>) -> Two<int32x4_t> {
    Two(vaddq_s32(a.0, b.0), vaddq_s32(a.1, b.1))
}

/// Adds the products of two quads of codes to the sums of `N` activation rows: pairs of rows by `smmla`, in blocks that
/// [`widen_matrix`] takes apart; what is left over by `sdot`.
///
/// # Safety
/// The machine has dotprod and i8mm; eight activations can be read at each `x`.
#[inline(always)]
unsafe fn dot_matrix<const N: usize>(
    narrow: &mut [Two<int32x4_t>; N],
    first: Two<int8x16_t>,
    second: Two<int8x16_t>,
    x: &[*const i8; N],
) {
    // SAFETY: the caller's duties.
    unsafe {
        let zip = |a: int8x16_t, b: int8x16_t| {
            let (a, b) = (vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b));
            (vreinterpretq_s8_s32(vzip1q_s32(a, b)), vreinterpretq_s8_s32(vzip2q_s32(a, b)))
        };
        let ((rows01, rows23), (rows45, rows67)) = (zip(first.0, second.0), zip(first.1, second.1));
        let mut n = 0;
        while n + 2 <= N {
            let columns = vcombine_s8(vld1_s8(x[n]), vld1_s8(x[n + 1]));
            narrow[n] = Two(smmla(narrow[n].0, rows01, columns), smmla(narrow[n].1, rows23, columns));
            narrow[n + 1] = Two(smmla(narrow[n + 1].0, rows45, columns), smmla(narrow[n + 1].1, rows67, columns));
            n += 2;
        }
        if n < N {
            narrow[n] = Rows8Dot::dot_signed(Rows8Dot::dot_signed(narrow[n], first, x[n]), second, x[n].add(4));
        }
    }
}

impl Rows8Dot {
    /// # Safety
    /// As [`QuantLanes`].
    #[inline(always)]
    unsafe fn dot_signed(sums: Two<int32x4_t>, codes: Two<int8x16_t>, x: *const i8) -> Two<int32x4_t> {
        // SAFETY: the caller's duties.
        unsafe {
            let x = quad(x);
            Two(sdot(sums.0, codes.0, x), sdot(sums.1, codes.1, x))
        }
    }
}

impl QuantLanes for Rows8 {
    const ROWS: usize = 8;
    type Floats = Two<float32x4_t>;
    type Codes = Two<uint8x16_t>;
    type Bytes = Two<int8x16_t>;
    type Sums = Two<int32x4_t>;
    type Narrow = Products;
    const BYTES_OFFSET: i32 = 0;

    lane_functions! {
        fn load_codes(from: *const u8) -> Two<uint8x16_t> = Two(vld1q_u8(from), vld1q_u8(from.add(16)));
        fn field(vector: Two<uint8x16_t>, from: usize, width: usize, to: usize) -> Two<uint8x16_t> = {
            let mask = vdupq_n_u8((((1 << width) - 1) << to) as u8);
            let low = move_bits!(vector.0, from, to, vshrq_n_u8);
            let high = move_bits!(vector.1, from, to, vshrq_n_u8);
            Two(vandq_u8(low, mask), vandq_u8(high, mask))
        };
        fn store_codes(codes: Two<uint8x16_t>, to: *mut u8) = {
            vst1q_u8(to, codes.0);
            vst1q_u8(to.add(16), codes.1);
        };
        fn or(a: Two<uint8x16_t>, b: Two<uint8x16_t>) -> Two<uint8x16_t> = Two(vorrq_u8(a.0, b.0), vorrq_u8(a.1, b.1));
        fn look_up(book: Two<uint8x16_t>, codes: Two<uint8x16_t>) -> Two<uint8x16_t> =
            Two(vqtbl1q_u8(book.0, codes.0), vqtbl1q_u8(book.0, codes.1));
        fn bytes(values: Two<uint8x16_t>) -> Two<int8x16_t> = signed(values);
        fn zero_sums() -> Two<int32x4_t> = Two(vdupq_n_s32(0), vdupq_n_s32(0));
        fn narrow(_sums: Two<int32x4_t>) -> Products = {
            let zero = vdupq_n_s16(0);
            Products(zero, zero, zero, zero)
        };
        fn dot(sums: Products, codes: Two<uint8x16_t>, x: *const i8) -> Products = {
            let (codes, x) = (signed(codes), quad(x));
            Products(
                vmlal_s8(sums.0, vget_low_s8(codes.0), vget_low_s8(x)),
                vmlal_high_s8(sums.1, codes.0, x),
                vmlal_s8(sums.2, vget_low_s8(codes.1), vget_low_s8(x)),
                vmlal_high_s8(sums.3, codes.1, x)
            )
        };
        fn widen(sums: Two<int32x4_t>, narrow: Products) -> Two<int32x4_t> =
            add_sums(sums, Two(join_quads(narrow.0, narrow.1), join_quads(narrow.2, narrow.3)));
        fn dot_bytes(sums: Two<int32x4_t>, codes: Two<int8x16_t>, x: *const i8) -> Two<int32x4_t> = {
            let x = quad(x);
            let products = |codes: int8x16_t| {
                join_quads(vmull_s8(vget_low_s8(codes), vget_low_s8(x)), vmull_high_s8(codes, x))
            };
            add_sums(sums, Two(products(codes.0), products(codes.1)))
        };
        fn splat_sums(sum: i32) -> Two<int32x4_t> = Two(vdupq_n_s32(sum), vdupq_n_s32(sum));
        fn to_floats(sums: Two<int32x4_t>) -> Two<float32x4_t> = Two(vcvtq_f32_s32(sums.0), vcvtq_f32_s32(sums.1));
        fn zero() -> Two<float32x4_t> = Two(vdupq_n_f32(0.0), vdupq_n_f32(0.0));
        fn splat(x: f32) -> Two<float32x4_t> = Two(vdupq_n_f32(x), vdupq_n_f32(x));
        fn load_scales(from: *const f16) -> Two<float32x4_t> = {
            let bits = vld1q_u16(from.cast());
            let half = |bits: uint16x4_t| vcvt_f32_f16(vreinterpret_f16_u16(bits));
            Two(half(vget_low_u16(bits)), half(vget_high_u16(bits)))
        };
        fn load_sub_scales(from: *const i8) -> Two<float32x4_t> = {
            let words = vmovl_s8(vld1_s8(from));
            let half = |words: int16x4_t| vcvtq_f32_s32(vmovl_s16(words));
            Two(half(vget_low_s16(words)), half(vget_high_s16(words)))
        };
        fn load_powers(from: *const u8) -> Two<float32x4_t> = {
            let words = vmovl_u8(vld1_u8(from));
            let least = vdupq_n_u32(HALF_LEAST_NORMAL);
            let half = |words: uint16x4_t| {
                vreinterpretq_f32_u32(vmaxq_u32(vshlq_n_u32::<23>(vmovl_u16(words)), least))
            };
            Two(half(vget_low_u16(words)), half(vget_high_u16(words)))
        };
        fn load_sub_nibbles(from: *const i8) -> (Two<float32x4_t>, Two<float32x4_t>) = {
            let both = vld1_u8(from.cast());
            let floats = |bytes: uint8x8_t| {
                let words = vmovl_u8(bytes);
                let half = |words: uint16x4_t| vcvtq_f32_u32(vmovl_u16(words));
                Two(half(vget_low_u16(words)), half(vget_high_u16(words)))
            };
            (floats(vand_u8(both, vdup_n_u8(15))), floats(vshr_n_u8::<4>(both)))
        };
        fn load(from: *const f32) -> Two<float32x4_t> = Two(vld1q_f32(from), vld1q_f32(from.add(4)));
        fn store(x: Two<float32x4_t>, to: *mut f32) = {
            vst1q_f32(to, x.0);
            vst1q_f32(to.add(4), x.1);
        };
        fn add(a: Two<float32x4_t>, b: Two<float32x4_t>) -> Two<float32x4_t> =
            Two(vaddq_f32(a.0, b.0), vaddq_f32(a.1, b.1));
        fn mul(a: Two<float32x4_t>, b: Two<float32x4_t>) -> Two<float32x4_t> =
            Two(vmulq_f32(a.0, b.0), vmulq_f32(a.1, b.1));
        fn mul_add(a: Two<float32x4_t>, b: Two<float32x4_t>, c: Two<float32x4_t>) -> Two<float32x4_t> =
            Two(vfmaq_f32(c.0, a.0, b.0), vfmaq_f32(c.1, a.1, b.1));
    }
}

/// What does not depend on how products are made is plain NEON's.
macro_rules! as_plain_neon {
    () => {
        const ROWS: usize = Rows8::ROWS;
        type Floats = Two<float32x4_t>;
        type Codes = Two<uint8x16_t>;
        type Bytes = Two<int8x16_t>;
        type Sums = Two<int32x4_t>;
        const BYTES_OFFSET: i32 = Rows8::BYTES_OFFSET;

        lane_functions! {
            fn load_codes(from: *const u8) -> Two<uint8x16_t> = Rows8::load_codes(from);
            fn field(vector: Two<uint8x16_t>, from: usize, width: usize, to: usize) -> Two<uint8x16_t> =
                Rows8::field(vector, from, width, to);
            fn store_codes(codes: Two<uint8x16_t>, to: *mut u8) = Rows8::store_codes(codes, to);
            fn or(a: Two<uint8x16_t>, b: Two<uint8x16_t>) -> Two<uint8x16_t> = Rows8::or(a, b);
            fn look_up(book: Two<uint8x16_t>, codes: Two<uint8x16_t>) -> Two<uint8x16_t> = Rows8::look_up(book, codes);
            fn bytes(values: Two<uint8x16_t>) -> Two<int8x16_t> = Rows8::bytes(values);
            fn zero_sums() -> Two<int32x4_t> = Rows8::zero_sums();
            fn splat_sums(sum: i32) -> Two<int32x4_t> = Rows8::splat_sums(sum);
            fn to_floats(sums: Two<int32x4_t>) -> Two<float32x4_t> = Rows8::to_floats(sums);
            fn zero() -> Two<float32x4_t> = Rows8::zero();
            fn splat(x: f32) -> Two<float32x4_t> = Rows8::splat(x);
            fn load_scales(from: *const f16) -> Two<float32x4_t> = Rows8::load_scales(from);
            fn load_sub_scales(from: *const i8) -> Two<float32x4_t> = Rows8::load_sub_scales(from);
            fn load_powers(from: *const u8) -> Two<float32x4_t> = Rows8::load_powers(from);
            fn load_sub_nibbles(from: *const i8) -> (Two<float32x4_t>, Two<float32x4_t>) =
                Rows8::load_sub_nibbles(from);
            fn load(from: *const f32) -> Two<float32x4_t> = Rows8::load(from);
            fn store(x: Two<float32x4_t>, to: *mut f32) = Rows8::store(x, to);
            fn add(a: Two<float32x4_t>, b: Two<float32x4_t>) -> Two<float32x4_t> = Rows8::add(a, b);
            fn mul(a: Two<float32x4_t>, b: Two<float32x4_t>) -> Two<float32x4_t> = Rows8::mul(a, b);
            fn mul_add(a: Two<float32x4_t>, b: Two<float32x4_t>, c: Two<float32x4_t>) -> Two<float32x4_t> =
                Rows8::mul_add(a, b, c);
        }
    };
}

impl QuantLanes for Rows8Dot {
    /// The 32-bit sums themselves.
    type Narrow = Two<int32x4_t>;

    as_plain_neon!();
    #[inline(always)]
    unsafe fn narrow(sums: Two<int32x4_t>) -> Two<int32x4_t> {
        sums
    }
    #[inline(always)]
    unsafe fn widen(_sums: Two<int32x4_t>, narrow: Two<int32x4_t>) -> Two<int32x4_t> {
        narrow
    }
    lane_functions! {
        fn dot(sums: Two<int32x4_t>, codes: Two<uint8x16_t>, x: *const i8) -> Two<int32x4_t> =
            Self::dot_signed(sums, signed(codes), x);
        fn dot_bytes(sums: Two<int32x4_t>, codes: Two<int8x16_t>, x: *const i8) -> Two<int32x4_t> =
            Self::dot_signed(sums, codes, x);
    }
}

impl QuantLanes for Rows8Matrix {
    /// Of two activation rows n and n + 1: rows 0 to 3 by both in blocks of two by two, then rows 4 to 7; of a last one
    /// alone its sums.
    type Narrow = Two<int32x4_t>;
    const BYTES_ARE_NARROW: bool = true;

    as_plain_neon!();
    lane_functions! {
        fn narrow(_sums: Two<int32x4_t>) -> Two<int32x4_t> = Rows8::zero_sums();
        fn widen(sums: Two<int32x4_t>, narrow: Two<int32x4_t>) -> Two<int32x4_t> = add_sums(sums, narrow);
        fn dot(sums: Two<int32x4_t>, codes: Two<uint8x16_t>, x: *const i8) -> Two<int32x4_t> =
            Rows8Dot::dot(sums, codes, x);
        fn dot_bytes(sums: Two<int32x4_t>, codes: Two<int8x16_t>, x: *const i8) -> Two<int32x4_t> =
            Rows8Dot::dot_bytes(sums, codes, x);
    }

    #[inline(always)]
    unsafe fn dot_two<const N: usize>(
        narrow: &mut [Two<int32x4_t>; N],
        first: Two<uint8x16_t>,
        second: Two<uint8x16_t>,
        x: &[*const i8; N],
    ) {
        // SAFETY: the caller's duties.
        unsafe { dot_matrix(narrow, signed(first), signed(second), x) }
    }

    #[inline(always)]
    unsafe fn dot_two_bytes<const N: usize>(
        _wide: &mut [Two<int32x4_t>; N],
        narrow: &mut [Two<int32x4_t>; N],
        first: Two<int8x16_t>,
        second: Two<int8x16_t>,
        x: &[*const i8; N],
    ) {
        // SAFETY: the caller's duties.
        unsafe { dot_matrix(narrow, first, second, x) }
    }

    #[inline(always)]
    unsafe fn widen_all<const N: usize>(wide: &mut [Two<int32x4_t>; N], narrow: &mut [Two<int32x4_t>; N]) {
        // SAFETY: the caller's duties.
        unsafe {
            let mut n = 0;
            while n + 2 <= N {
                let (Two(rows01, rows23), Two(rows45, rows67)) = (narrow[n], narrow[n + 1]);
                wide[n] = add_sums(wide[n], Two(vuzp1q_s32(rows01, rows23), vuzp1q_s32(rows45, rows67)));
                wide[n + 1] = add_sums(wide[n + 1], Two(vuzp2q_s32(rows01, rows23), vuzp2q_s32(rows45, rows67)));
                n += 2;
            }
            if n < N {
                wide[n] = add_sums(wide[n], narrow[n]);
            }
            *narrow = [Rows8::zero_sums(); N];
        }
    }
}
