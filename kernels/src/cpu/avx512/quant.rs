//! Sixteen weight rows in a 512-bit register.
//!
//! Without VNNI the arithmetic is that of AVX2, twice as wide (signs are given by a mask, 512-bit has no `sign`). With
//! VNNI one instruction multiplies four unsigned codes by four signed activations and adds them up in 32 bits; W8 codes
//! are shifted into unsigned range by 128, which the group's activation sum takes off again, exactly.

#[allow(clippy::wildcard_imports, reason = "dozens of intrinsics, whose names cannot be mistaken")]
use std::arch::x86_64::*;

use half::f16;

use crate::cpu::generic::{QuantLanes, lane_functions};

/// Sixteen rows by `maddubs`.
#[derive(Clone, Copy)]
pub(super) struct Rows16;

/// Sixteen rows by VNNI's `dpbusd`.
#[derive(Clone, Copy)]
pub(super) struct Rows16Vnni;

/// Magnitudes of codes, and which are negative.
#[derive(Clone, Copy)]
pub(super) struct Bytes {
    magnitudes: __m512i,
    negative: __mmask64,
}

impl QuantLanes for Rows16 {
    const ROWS: usize = 16;
    type Floats = __m512;
    type Nibbles = __m512i;
    type Bytes = Bytes;
    /// Thirty-two 16-bit sums, two a row.
    type Sums4 = __m512i;
    /// Sixteen 32-bit sums.
    type Sums8 = __m512i;

    lane_functions! {
        fn load_nibbles(from: *const u8) -> (__m512i, __m512i) = {
            let both = _mm512_loadu_si512(from.cast());
            let mask = _mm512_set1_epi8(15);
            (_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(both), mask))
        };
        fn load_bytes(from: *const i8) -> Bytes = {
            let codes = _mm512_loadu_si512(from.cast());
            Bytes { magnitudes: _mm512_abs_epi8(codes), negative: _mm512_movepi8_mask(codes) }
        };
        fn zero4() -> __m512i = _mm512_setzero_si512();
        fn zero8() -> __m512i = _mm512_setzero_si512();
        fn dot4(sums: __m512i, codes: __m512i, x: *const i8) -> __m512i = {
            let x = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
            _mm512_add_epi16(sums, _mm512_maddubs_epi16(codes, x))
        };
        fn dot8(sums: __m512i, codes: Bytes, x: *const i8) -> __m512i = {
            let x = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
            let x = _mm512_mask_sub_epi8(x, codes.negative, _mm512_setzero_si512(), x);
            let pairs = _mm512_maddubs_epi16(codes.magnitudes, x);
            _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        };
        fn finish4(sums: __m512i) -> __m512 =
            _mm512_cvtepi32_ps(_mm512_madd_epi16(sums, _mm512_set1_epi16(1)));
        fn finish4_centred(sums: __m512i, x_sum: i32) -> __m512 = {
            let dots = _mm512_madd_epi16(sums, _mm512_set1_epi16(1));
            _mm512_cvtepi32_ps(_mm512_sub_epi32(dots, _mm512_slli_epi32::<3>(_mm512_set1_epi32(x_sum))))
        };
        fn finish8(sums: __m512i, _x_sum: i32) -> __m512 = _mm512_cvtepi32_ps(sums);
        fn zero() -> __m512 = _mm512_setzero_ps();
        fn splat(x: f32) -> __m512 = _mm512_set1_ps(x);
        fn load_scales(from: *const f16) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()));
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
    type Nibbles = __m512i;
    /// Codes shifted by 128, unsigned.
    type Bytes = __m512i;
    /// Sixteen 32-bit sums.
    type Sums4 = __m512i;
    type Sums8 = __m512i;

    lane_functions! {
        fn load_nibbles(from: *const u8) -> (__m512i, __m512i) = Rows16::load_nibbles(from);
        fn load_bytes(from: *const i8) -> __m512i =
            _mm512_xor_si512(_mm512_loadu_si512(from.cast()), _mm512_set1_epi8(-128));
        fn zero4() -> __m512i = _mm512_setzero_si512();
        fn zero8() -> __m512i = _mm512_setzero_si512();
        fn dot4(sums: __m512i, codes: __m512i, x: *const i8) -> __m512i =
            _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(x.cast::<i32>().read_unaligned()));
        fn dot8(sums: __m512i, codes: __m512i, x: *const i8) -> __m512i =
            _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(x.cast::<i32>().read_unaligned()));
        fn finish4(sums: __m512i) -> __m512 = _mm512_cvtepi32_ps(sums);
        fn finish4_centred(sums: __m512i, x_sum: i32) -> __m512 =
            _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, _mm512_slli_epi32::<3>(_mm512_set1_epi32(x_sum))));
        fn finish8(sums: __m512i, x_sum: i32) -> __m512 =
            _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, _mm512_slli_epi32::<7>(_mm512_set1_epi32(x_sum))));
        fn zero() -> __m512 = Rows16::zero();
        fn splat(x: f32) -> __m512 = Rows16::splat(x);
        fn load_scales(from: *const f16) -> __m512 = Rows16::load_scales(from);
        fn load(from: *const f32) -> __m512 = Rows16::load(from);
        fn store(x: __m512, to: *mut f32) = Rows16::store(x, to);
        fn add(a: __m512, b: __m512) -> __m512 = Rows16::add(a, b);
        fn mul(a: __m512, b: __m512) -> __m512 = Rows16::mul(a, b);
        fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 = Rows16::mul_add(a, b, c);
    }
}
