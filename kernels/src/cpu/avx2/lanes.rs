//! Sixteen f32 in two 256-bit registers.

#[allow(clippy::wildcard_imports, reason = "dozens of intrinsics, whose names cannot be mistaken")]
use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::cpu::generic::{Lanes, lane_functions};

#[derive(Clone, Copy)]
pub(super) struct Lanes256(__m256, __m256);

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

impl Lanes for Lanes256 {
    lane_functions! {
        fn splat(x: f32) -> Self = Self(_mm256_set1_ps(x), _mm256_set1_ps(x));
        fn load(from: *const f32) -> Self = Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8)));
        fn load_f16(from: *const f16) -> Self = {
            let (low, high) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast()));
            Self(_mm256_cvtph_ps(low), _mm256_cvtph_ps(high))
        };
        fn load_bf16(from: *const bf16) -> Self = {
            let (low, high) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast()));
            Self(widen_bf16(low), widen_bf16(high))
        };
        fn load_i8(from: *const i8) -> Self = {
            let bytes = _mm_loadu_si128(from.cast());
            let widen = |bytes: __m128i| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
            Self(widen(bytes), widen(_mm_srli_si128::<8>(bytes)))
        };
        fn store(self: Self, to: *mut f32) = {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        };
        fn store_i8(self: Self, to: *mut i8) = {
            // Packing works on 128-bit halves; the permutation brings the four quarters back in order.
            let words = _mm256_packs_epi32(_mm256_cvtps_epi32(self.0), _mm256_cvtps_epi32(self.1));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(to.cast(), bytes);
        };
        fn add(self: Self, other: Self) -> Self = Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1));
        fn sub(self: Self, other: Self) -> Self = Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1));
        fn mul(self: Self, other: Self) -> Self = Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1));
        fn div(self: Self, other: Self) -> Self = Self(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1));
        fn mul_add(self: Self, b: Self, c: Self) -> Self =
            Self(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1));
        fn neg_mul_add(self: Self, b: Self, c: Self) -> Self =
            Self(_mm256_fnmadd_ps(self.0, b.0, c.0), _mm256_fnmadd_ps(self.1, b.1, c.1));
        fn max(self: Self, other: Self) -> Self = Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1));
        fn abs(self: Self) -> Self = {
            let sign = _mm256_set1_ps(-0.0);
            Self(_mm256_andnot_ps(sign, self.0), _mm256_andnot_ps(sign, self.1))
        };
        fn max_bits(self: Self, other: Self) -> Self =
            Self(max_bits(self.0, other.0), max_bits(self.1, other.1));
        fn round(self: Self) -> Self = Self(_mm256_round_ps::<NEAREST>(self.0), _mm256_round_ps::<NEAREST>(self.1));
        fn exp2_int(self: Self) -> Self = Self(exp2_int(self.0), exp2_int(self.1));
        fn select_less(a: Self, b: Self, yes: Self, no: Self) -> Self = Self(
            _mm256_blendv_ps(no.0, yes.0, _mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0)),
            _mm256_blendv_ps(no.1, yes.1, _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1))
        );
        fn join_add(self: Self) -> f32 = {
            let eight = _mm256_add_ps(self.0, self.1);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        };
        fn join_max(self: Self) -> f32 = {
            let eight = _mm256_max_ps(self.0, self.1);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        };
        fn join_max_bits(self: Self) -> f32 = {
            let eight = _mm256_castps_si256(max_bits(self.0, self.1));
            let four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
            let two = _mm_max_epi32(four, _mm_shuffle_epi32::<0b00_00_11_10>(four));
            let one = _mm_max_epi32(two, _mm_shuffle_epi32::<0b00_00_00_01>(two));
            _mm_cvtss_f32(_mm_castsi128_ps(one))
        };
        fn sum_i8(from: *const i8) -> i32 = sum_i8(_mm_loadu_si128(from.cast()));
    }
}

/// The sum of sixteen codes, by way of the one instruction that adds bytes, which takes them as unsigned.
#[target_feature(enable = "avx2")]
#[inline]
pub(in crate::cpu) fn sum_i8(codes: __m128i) -> i32 {
    let sums = _mm_sad_epu8(_mm_xor_si128(codes, _mm_set1_epi8(-128)), _mm_setzero_si128());
    _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_unpackhi_epi64(sums, sums))) - 16 * 128
}

#[target_feature(enable = "avx2")]
#[inline]
fn widen_bf16(bits: __m128i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn max_bits(a: __m256, b: __m256) -> __m256 {
    _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn exp2_int(n: __m256) -> __m256 {
    let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
}
