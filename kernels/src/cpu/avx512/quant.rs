//! Sixteen weight rows in a 512-bit register.
//!
//! Without VNNI the arithmetic is that of AVX2, twice as wide (signs are given by a mask, 512-bit has no `sign`). With
//! VNNI one instruction multiplies four unsigned codes by four signed activations and adds them up in 32 bits; bytes
//! are shifted into unsigned range by 128, which the group's activation sum takes off again, exactly.

use std::arch::asm;
#[allow(clippy::wildcard_imports, reason = "dozens of intrinsics, whose names cannot be mistaken")]
use std::arch::x86_64::*;

use half::f16;

use crate::cpu::generic::{QuantLanes, lane_functions, move_bits};
use crate::quant_format::HALF_LEAST_NORMAL;

/// Sixteen rows by `maddubs`.
#[derive(Clone, Copy)]
pub(super) struct Rows16;

/// Sixteen rows by VNNI's `dpbusd`.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Rows16Vnni;

/// Magnitudes of codes, and which are negative.
#[derive(Clone, Copy)]
pub(super) struct Bytes {
    magnitudes: __m512i,
    negative: __mmask64,
}

/// Computed here, not before and not after what is kept in place around it: blocks of assembly keep their order.
///
/// # Safety
/// The machine has AVX-512 F.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn keep_place(mut vector: __m512i) -> __m512i {
    // SAFETY: it holds no instruction.
    unsafe { asm!("/* {0} */", inout(zmm_reg) vector, options(nomem, nostack, preserves_flags)) };
    vector
}

impl QuantLanes for Rows16 {
    const ROWS: usize = 16;
    type Floats = __m512;
    type Codes = __m512i;
    type Bytes = Bytes;
    type Sums = __m512i;
    /// Thirty-two 16-bit sums, two a row.
    type Narrow = __m512i;
    const BYTES_OFFSET: i32 = 0;
    const ASKS_SECOND_CACHE: bool = true;

    #[inline(always)]
    unsafe fn in_order(narrow: __m512i) -> __m512i {
        // SAFETY: the caller's duty is the same.
        unsafe { keep_place(narrow) }
    }

    lane_functions! {
        fn load_codes(from: *const u8) -> __m512i = _mm512_loadu_si512(from.cast());
        fn field(vector: __m512i, from: usize, width: usize, to: usize) -> __m512i = {
            let moved = move_bits!(vector, from, to, _mm512_srli_epi16);
            // What came over from the neighbouring byte is masked away.
            _mm512_and_si512(moved, _mm512_set1_epi8((((1 << width) - 1) << to) as i8))
        };
        fn store_codes(codes: __m512i, to: *mut u8) = _mm512_storeu_si512(to.cast(), codes);
        fn or(a: __m512i, b: __m512i) -> __m512i = _mm512_or_si512(a, b);
        fn look_up(book: __m512i, codes: __m512i) -> __m512i = _mm512_shuffle_epi8(book, codes);
        fn bytes(signed: __m512i) -> Bytes =
            Bytes { magnitudes: _mm512_abs_epi8(signed), negative: _mm512_movepi8_mask(signed) };
        fn zero_sums() -> __m512i = _mm512_setzero_si512();
        fn narrow(_sums: __m512i) -> __m512i = _mm512_setzero_si512();
        fn dot(sums: __m512i, codes: __m512i, x: *const i8) -> __m512i = {
            let x = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
            _mm512_add_epi16(sums, _mm512_maddubs_epi16(codes, x))
        };
        fn dot_bytes(sums: __m512i, codes: Bytes, x: *const i8) -> __m512i = {
            let x = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
            let x = _mm512_mask_sub_epi8(x, codes.negative, _mm512_setzero_si512(), x);
            let pairs = _mm512_maddubs_epi16(codes.magnitudes, x);
            _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        };
        fn widen(sums: __m512i, narrow: __m512i) -> __m512i =
            _mm512_add_epi32(sums, _mm512_madd_epi16(narrow, _mm512_set1_epi16(1)));
        fn splat_sums(sum: i32) -> __m512i = _mm512_set1_epi32(sum);
        fn to_floats(sums: __m512i) -> __m512 = _mm512_cvtepi32_ps(sums);
        fn zero() -> __m512 = _mm512_setzero_ps();
        fn splat(x: f32) -> __m512 = _mm512_set1_ps(x);
        fn load_scales(from: *const f16) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()));
        fn load_sub_scales(from: *const i8) -> __m512 =
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())));
        fn load_powers(from: *const u8) -> __m512 = {
            let bits = _mm512_slli_epi32::<23>(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast())));
            _mm512_castsi512_ps(_mm512_max_epi32(bits, _mm512_set1_epi32(HALF_LEAST_NORMAL.cast_signed())))
        };
        fn load_sub_nibbles(from: *const i8) -> (__m512, __m512) = {
            let both = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            let low = _mm512_and_si512(both, _mm512_set1_epi32(15));
            (_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(both)))
        };
        fn load(from: *const f32) -> __m512 = _mm512_loadu_ps(from);
        fn store(x: __m512, to: *mut f32) = _mm512_storeu_ps(to, x);
        fn add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        fn mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
    }
}

impl QuantLanes for Rows16Vnni {
    const ROWS: usize = 16;
    type Floats = __m512;
    type Codes = __m512i;
    /// Codes shifted by 128, unsigned.
    type Bytes = __m512i;
    type Sums = __m512i;
    /// The 32-bit sums themselves.
    type Narrow = __m512i;
    const BYTES_OFFSET: i32 = 128;
    const ASKS_SECOND_CACHE: bool = true;

    #[inline(always)]
    unsafe fn in_order(narrow: __m512i) -> __m512i {
        // SAFETY: the caller's duty is the same.
        unsafe { keep_place(narrow) }
    }

    #[inline(always)]
    unsafe fn narrow(sums: __m512i) -> __m512i {
        sums
    }
    #[inline(always)]
    unsafe fn widen(_sums: __m512i, narrow: __m512i) -> __m512i {
        narrow
    }
    lane_functions! {
        fn load_codes(from: *const u8) -> __m512i = Rows16::load_codes(from);
        fn field(vector: __m512i, from: usize, width: usize, to: usize) -> __m512i =
            Rows16::field(vector, from, width, to);
        fn store_codes(codes: __m512i, to: *mut u8) = Rows16::store_codes(codes, to);
        fn or(a: __m512i, b: __m512i) -> __m512i = Rows16::or(a, b);
        fn look_up(book: __m512i, codes: __m512i) -> __m512i = Rows16::look_up(book, codes);
        fn bytes(signed: __m512i) -> __m512i = _mm512_xor_si512(signed, _mm512_set1_epi8(-128));
        fn zero_sums() -> __m512i = Rows16::zero_sums();
        fn dot(sums: __m512i, codes: __m512i, x: *const i8) -> __m512i =
            _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(x.cast::<i32>().read_unaligned()));
        fn dot_bytes(sums: __m512i, codes: __m512i, x: *const i8) -> __m512i =
            _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(x.cast::<i32>().read_unaligned()));
        fn splat_sums(sum: i32) -> __m512i = Rows16::splat_sums(sum);
        fn to_floats(sums: __m512i) -> __m512 = Rows16::to_floats(sums);
        fn zero() -> __m512 = Rows16::zero();
        fn splat(x: f32) -> __m512 = Rows16::splat(x);
        fn load_scales(from: *const f16) -> __m512 = Rows16::load_scales(from);
        fn load_sub_scales(from: *const i8) -> __m512 = Rows16::load_sub_scales(from);
        fn load_powers(from: *const u8) -> __m512 = Rows16::load_powers(from);
        fn load_sub_nibbles(from: *const i8) -> (__m512, __m512) = Rows16::load_sub_nibbles(from);
        fn load(from: *const f32) -> __m512 = Rows16::load(from);
        fn store(x: __m512, to: *mut f32) = Rows16::store(x, to);
        fn add(a: __m512, b: __m512) -> __m512 = Rows16::add(a, b);
        fn mul(a: __m512, b: __m512) -> __m512 = Rows16::mul(a, b);
        fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 = Rows16::mul_add(a, b, c);
    }
}
