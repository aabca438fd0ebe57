//! Sixteen f32 in a 512-bit register.

#[allow(clippy::wildcard_imports, reason = "dozens of intrinsics, whose names cannot be mistaken")]
use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::cpu::avx2::sum_i8;
use crate::cpu::generic::{Lanes, lane_functions};

#[derive(Clone, Copy)]
pub(super) struct Lanes512(__m512);

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

impl Lanes for Lanes512 {
    lane_functions! {
        fn splat(x: f32) -> Self = Self(_mm512_set1_ps(x));
        fn load(from: *const f32) -> Self = Self(_mm512_loadu_ps(from));
        fn load_f16(from: *const f16) -> Self = Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast())));
        fn load_bf16(from: *const bf16) -> Self = {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
        };
        fn load_i8(from: *const i8) -> Self =
            Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))));
        fn store(self: Self, to: *mut f32) = _mm512_storeu_ps(to, self.0);
        fn store_i8(self: Self, to: *mut i8) =
            _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(self.0)));
        fn add(self: Self, other: Self) -> Self = Self(_mm512_add_ps(self.0, other.0));
        fn sub(self: Self, other: Self) -> Self = Self(_mm512_sub_ps(self.0, other.0));
        fn mul(self: Self, other: Self) -> Self = Self(_mm512_mul_ps(self.0, other.0));
        fn div(self: Self, other: Self) -> Self = Self(_mm512_div_ps(self.0, other.0));
        fn mul_add(self: Self, b: Self, c: Self) -> Self = Self(_mm512_fmadd_ps(self.0, b.0, c.0));
        fn neg_mul_add(self: Self, b: Self, c: Self) -> Self = Self(_mm512_fnmadd_ps(self.0, b.0, c.0));
        fn max(self: Self, other: Self) -> Self = Self(_mm512_max_ps(self.0, other.0));
        fn abs(self: Self) -> Self = Self(_mm512_abs_ps(self.0));
        fn max_bits(self: Self, other: Self) -> Self = Self(_mm512_castsi512_ps(_mm512_max_epi32(
            _mm512_castps_si512(self.0),
            _mm512_castps_si512(other.0)
        )));
        fn round(self: Self) -> Self = Self(_mm512_roundscale_ps::<NEAREST>(self.0));
        fn exp2_int(self: Self) -> Self = {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent)))
        };
        fn select_less(a: Self, b: Self, yes: Self, no: Self) -> Self =
            Self(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a.0, b.0), no.0, yes.0));
        fn join_add(self: Self) -> f32 = {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        };
        fn join_max(self: Self) -> f32 = _mm512_reduce_max_ps(self.0);
        fn join_max_bits(self: Self) -> f32 =
            f32::from_bits(_mm512_reduce_max_epi32(_mm512_castps_si512(self.0)).cast_unsigned());
        fn sum_i8(from: *const i8) -> i32 = sum_i8(_mm_loadu_si128(from.cast()));
    }
}
