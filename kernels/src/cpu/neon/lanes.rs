//! Sixteen f32 in four 128-bit registers.

#[allow(clippy::wildcard_imports, reason = "dozens of intrinsics, whose names cannot be mistaken")]
use std::arch::aarch64::*;

use half::{bf16, f16};

use crate::cpu::generic::{Lanes, lane_functions};

#[derive(Clone, Copy)]
pub(super) struct LanesNeon(float32x4_t, float32x4_t, float32x4_t, float32x4_t);

/// The same operation on each register of one, two or three sets of lanes.
macro_rules! each {
    ($function:path, $a:expr) => {
        LanesNeon($function($a.0), $function($a.1), $function($a.2), $function($a.3))
    };
    ($function:path, $a:expr, $b:expr) => {
        LanesNeon($function($a.0, $b.0), $function($a.1, $b.1), $function($a.2, $b.2), $function($a.3, $b.3))
    };
    ($function:path, $a:expr, $b:expr, $c:expr) => {
        LanesNeon(
            $function($a.0, $b.0, $c.0),
            $function($a.1, $b.1, $c.1),
            $function($a.2, $b.2, $c.2),
            $function($a.3, $b.3, $c.3),
        )
    };
}

impl Lanes for LanesNeon {
    lane_functions! {
        fn splat(x: f32) -> Self = {
            let x = vdupq_n_f32(x);
            Self(x, x, x, x)
        };
        fn load(from: *const f32) -> Self =
            Self(vld1q_f32(from), vld1q_f32(from.add(4)), vld1q_f32(from.add(8)), vld1q_f32(from.add(12)));
        fn load_f16(from: *const f16) -> Self = {
            let (low, high) = (vld1q_u16(from.cast()), vld1q_u16(from.add(8).cast()));
            let ((a, b), (c, d)) = (widen_f16(low), widen_f16(high));
            Self(a, b, c, d)
        };
        fn load_bf16(from: *const bf16) -> Self = {
            let (low, high) = (vld1q_u16(from.cast()), vld1q_u16(from.add(8).cast()));
            let ((a, b), (c, d)) = (widen_bf16(low), widen_bf16(high));
            Self(a, b, c, d)
        };
        fn load_i8(from: *const i8) -> Self = {
            let bytes = vld1q_s8(from);
            let widen = |words: int16x4_t| vcvtq_f32_s32(vmovl_s16(words));
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            Self(
                widen(vget_low_s16(low)), widen(vget_high_s16(low)), widen(vget_low_s16(high)), widen(vget_high_s16(high))
            )
        };
        fn store(self: Self, to: *mut f32) = {
            vst1q_f32(to, self.0);
            vst1q_f32(to.add(4), self.1);
            vst1q_f32(to.add(8), self.2);
            vst1q_f32(to.add(12), self.3);
        };
        fn store_i8(self: Self, to: *mut i8) = {
            let low = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(self.0)), vqmovn_s32(vcvtnq_s32_f32(self.1)));
            let high = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(self.2)), vqmovn_s32(vcvtnq_s32_f32(self.3)));
            vst1q_s8(to, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
        };
        fn add(self: Self, other: Self) -> Self = each!(vaddq_f32, self, other);
        fn sub(self: Self, other: Self) -> Self = each!(vsubq_f32, self, other);
        fn mul(self: Self, other: Self) -> Self = each!(vmulq_f32, self, other);
        fn div(self: Self, other: Self) -> Self = each!(vdivq_f32, self, other);
        fn mul_add(self: Self, b: Self, c: Self) -> Self = each!(vfmaq_f32, c, self, b);
        fn neg_mul_add(self: Self, b: Self, c: Self) -> Self = each!(vfmsq_f32, c, self, b);
        fn max(self: Self, other: Self) -> Self = each!(larger, self, other);
        fn abs(self: Self) -> Self = each!(vabsq_f32, self);
        fn max_bits(self: Self, other: Self) -> Self = each!(max_bits, self, other);
        fn round(self: Self) -> Self = each!(vrndnq_f32, self);
        fn exp2_int(self: Self) -> Self = each!(exp2_int, self);
        fn select_less(a: Self, b: Self, yes: Self, no: Self) -> Self = Self(
            vbslq_f32(vcltq_f32(a.0, b.0), yes.0, no.0),
            vbslq_f32(vcltq_f32(a.1, b.1), yes.1, no.1),
            vbslq_f32(vcltq_f32(a.2, b.2), yes.2, no.2),
            vbslq_f32(vcltq_f32(a.3, b.3), yes.3, no.3)
        );
        fn join_add(self: Self) -> f32 = {
            let four = vaddq_f32(vaddq_f32(self.0, self.2), vaddq_f32(self.1, self.3));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        };
        fn join_max(self: Self) -> f32 = {
            let four = larger(larger(self.0, self.2), larger(self.1, self.3));
            let (low, high) = (vget_low_f32(four), vget_high_f32(four));
            let two = vbsl_f32(vcgt_f32(low, high), low, high);
            let (first, second) = (vget_lane_f32::<0>(two), vget_lane_f32::<1>(two));
            if first > second { first } else { second }
        };
        fn join_max_bits(self: Self) -> f32 = {
            let four = max_bits(max_bits(self.0, self.2), max_bits(self.1, self.3));
            f32::from_bits(vmaxvq_s32(vreinterpretq_s32_f32(four)) as u32)
        };
        fn sum_i8(from: *const i8) -> i32 = i32::from(vaddlvq_s8(vld1q_s8(from)));
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn widen_f16(bits: uint16x8_t) -> (float32x4_t, float32x4_t) {
    let half = |bits: uint16x4_t| vcvt_f32_f16(vreinterpret_f16_u16(bits));
    (half(vget_low_u16(bits)), half(vget_high_u16(bits)))
}

#[target_feature(enable = "neon")]
#[inline]
fn widen_bf16(bits: uint16x8_t) -> (float32x4_t, float32x4_t) {
    let half = |bits: uint16x4_t| vreinterpretq_f32_u32(vshll_n_u16::<16>(bits));
    (half(vget_low_u16(bits)), half(vget_high_u16(bits)))
}

/// NEON's own maximum lets a NaN win; here one in `a` gives way, as the trait says.
#[target_feature(enable = "neon")]
#[inline]
fn larger(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    vbslq_f32(vcgtq_f32(a, b), a, b)
}

#[target_feature(enable = "neon")]
#[inline]
fn max_bits(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(a), vreinterpretq_s32_f32(b)))
}

#[target_feature(enable = "neon")]
#[inline]
fn exp2_int(n: float32x4_t) -> float32x4_t {
    let exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
    vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent))
}
