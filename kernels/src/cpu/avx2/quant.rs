//! Eight weight rows in a 256-bit register.
//!
//! W4: `maddubs` multiplies unsigned codes by signed activations and adds pairs; at most 2 * 15 * 127 each, eight of
//! them fit 16 bits, so a whole group is summed there and widened once by `madd` with ones.
//! W8: |code| times the activation with the code's sign; at most 2 * 128 * 127 a pair, so every load is widened.

#[allow(clippy::wildcard_imports, reason = "dozens of intrinsics, whose names cannot be mistaken")]
use std::arch::x86_64::*;

use half::f16;

use crate::cpu::generic::{QuantLanes, lane_functions};

#[derive(Clone, Copy)]
pub(super) struct Rows8;

/// Codes and their magnitudes.
#[derive(Clone, Copy)]
pub(super) struct Bytes {
    codes: __m256i,
    magnitudes: __m256i,
}

impl QuantLanes for Rows8 {
    const ROWS: usize = 8;
    type Floats = __m256;
    type Nibbles = __m256i;
    type Bytes = Bytes;
    /// Sixteen 16-bit sums, two a row.
    type Sums4 = __m256i;
    /// Eight 32-bit sums.
    type Sums8 = __m256i;

    lane_functions! {
        fn load_nibbles(from: *const u8) -> (__m256i, __m256i) = {
            let both = _mm256_loadu_si256(from.cast());
            let mask = _mm256_set1_epi8(15);
            (_mm256_and_si256(both, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(both), mask))
        };
        fn load_bytes(from: *const i8) -> Bytes = {
            let codes = _mm256_loadu_si256(from.cast());
            Bytes { codes, magnitudes: _mm256_abs_epi8(codes) }
        };
        fn zero4() -> __m256i = _mm256_setzero_si256();
        fn zero8() -> __m256i = _mm256_setzero_si256();
        fn dot4(sums: __m256i, codes: __m256i, x: *const i8) -> __m256i = {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, x))
        };
        fn dot8(sums: __m256i, codes: Bytes, x: *const i8) -> __m256i = {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            let pairs = _mm256_maddubs_epi16(codes.magnitudes, _mm256_sign_epi8(x, codes.codes));
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        };
        fn finish4(sums: __m256i) -> __m256 =
            _mm256_cvtepi32_ps(_mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
        fn finish4_centred(sums: __m256i, x_sum: i32) -> __m256 = {
            let dots = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
            _mm256_cvtepi32_ps(_mm256_sub_epi32(dots, _mm256_slli_epi32::<3>(_mm256_set1_epi32(x_sum))))
        };
        fn finish8(sums: __m256i, _x_sum: i32) -> __m256 = _mm256_cvtepi32_ps(sums);
        fn zero() -> __m256 = _mm256_setzero_ps();
        fn splat(x: f32) -> __m256 = _mm256_set1_ps(x);
        fn load_scales(from: *const f16) -> __m256 = _mm256_cvtph_ps(_mm_loadu_si128(from.cast()));
        fn load(from: *const f32) -> __m256 = _mm256_loadu_ps(from);
        fn store(x: __m256, to: *mut f32) = _mm256_storeu_ps(to, x);
        fn add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        fn mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
    }
}
