//! Eight weight rows in a 256-bit register.
//!
//! Short codes: `maddubs` multiplies unsigned codes by signed activations and adds pairs in 16 bits, which `madd` with
//! ones widens; eight pairs of four-bit codes, at most 2 * 15 * 127 each, fit, so a whole group is widened once.
//! Bytes: |code| times the activation with the code's sign; at most 2 * 128 * 127 a pair, so every load is widened.
//!
//! With AVX-VNNI (desktop processors without AVX-512 have it) one instruction multiplies four unsigned codes by four
//! signed activations and adds them up in 32 bits; bytes are shifted into unsigned range by 128, which the group's
//! activation sum takes off again, exactly.

use std::arch::asm;
#[allow(clippy::wildcard_imports, reason = "dozens of intrinsics, whose names cannot be mistaken")]
use std::arch::x86_64::*;

use half::f16;

use crate::cpu::generic::{QuantLanes, lane_functions, move_bits};
use crate::quant_format::HALF_LEAST_NORMAL;

/// Eight rows by `maddubs`.
#[derive(Clone, Copy)]
pub(super) struct Rows8;

/// Eight rows by AVX-VNNI's `dpbusd`.
#[derive(Clone, Copy)]
pub(super) struct Rows8Vnni;

/// Codes and their magnitudes.
#[derive(Clone, Copy)]
pub(super) struct Bytes {
    codes: __m256i,
    magnitudes: __m256i,
}

/// Computed here, not before and not after what is kept in place around it: blocks of assembly keep their order.
///
/// # Safety
/// The machine has AVX2.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn keep_place(mut vector: __m256i) -> __m256i {
    // SAFETY: it holds no instruction.
    unsafe { asm!("/* {0} */", inout(ymm_reg) vector, options(nomem, nostack, preserves_flags)) };
    vector
}

impl QuantLanes for Rows8 {
    const ROWS: usize = 8;
    type Floats = __m256;
    type Codes = __m256i;
    type Bytes = Bytes;
    type Sums = __m256i;
    /// Sixteen 16-bit sums, two a row.
    type Narrow = __m256i;
    const BYTES_OFFSET: i32 = 0;
    const PANEL_TILES: usize = 2;

    #[inline(always)]
    unsafe fn in_order(narrow: __m256i) -> __m256i {
        // SAFETY: the caller's duty is the same.
        unsafe { keep_place(narrow) }
    }

    /// A quad meets all rows before the next one comes: left alone, the compiler finishes row after row, and keeps the codes of a
    /// whole group in memory for that.
    #[inline(always)]
    unsafe fn dot_two_bytes<const N: usize>(
        wide: &mut [__m256i; N],
        _narrow: &mut [__m256i; N],
        first: Bytes,
        second: Bytes,
        x: &[*const i8; N],
    ) {
        // SAFETY: the caller's duties.
        unsafe {
            for (codes, from) in [(first, 0), (second, 4)] {
                for n in 0..N {
                    let x = _mm256_set1_epi32(x[n].add(from).cast::<i32>().read_unaligned());
                    let pairs = _mm256_maddubs_epi16(codes.magnitudes, _mm256_sign_epi8(x, codes.codes));
                    let quads = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                    wide[n] = keep_place(_mm256_add_epi32(wide[n], quads));
                }
            }
        }
    }

    lane_functions! {
        fn load_codes(from: *const u8) -> __m256i = _mm256_loadu_si256(from.cast());
        fn field(vector: __m256i, from: usize, width: usize, to: usize) -> __m256i = {
            let moved = move_bits!(vector, from, to, _mm256_srli_epi16);
            // What came over from the neighbouring byte is masked away.
            _mm256_and_si256(moved, _mm256_set1_epi8((((1 << width) - 1) << to) as i8))
        };
        fn store_codes(codes: __m256i, to: *mut u8) = _mm256_storeu_si256(to.cast(), codes);
        fn or(a: __m256i, b: __m256i) -> __m256i = _mm256_or_si256(a, b);
        fn look_up(book: __m256i, codes: __m256i) -> __m256i = _mm256_shuffle_epi8(book, codes);
        fn bytes(signed: __m256i) -> Bytes = Bytes { codes: signed, magnitudes: _mm256_abs_epi8(signed) };
        fn zero_sums() -> __m256i = _mm256_setzero_si256();
        fn narrow(_sums: __m256i) -> __m256i = _mm256_setzero_si256();
        fn dot(sums: __m256i, codes: __m256i, x: *const i8) -> __m256i = {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, x))
        };
        fn dot_bytes(sums: __m256i, codes: Bytes, x: *const i8) -> __m256i = {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            let pairs = _mm256_maddubs_epi16(codes.magnitudes, _mm256_sign_epi8(x, codes.codes));
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        };
        fn widen(sums: __m256i, narrow: __m256i) -> __m256i =
            _mm256_add_epi32(sums, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
        fn splat_sums(sum: i32) -> __m256i = _mm256_set1_epi32(sum);
        fn to_floats(sums: __m256i) -> __m256 = _mm256_cvtepi32_ps(sums);
        fn zero() -> __m256 = _mm256_setzero_ps();
        fn splat(x: f32) -> __m256 = _mm256_set1_ps(x);
        fn load_scales(from: *const f16) -> __m256 = _mm256_cvtph_ps(_mm_loadu_si128(from.cast()));
        fn load_sub_scales(from: *const i8) -> __m256 =
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast())));
        fn load_powers(from: *const u8) -> __m256 = {
            let bits = _mm256_slli_epi32::<23>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast())));
            _mm256_castsi256_ps(_mm256_max_epi32(bits, _mm256_set1_epi32(HALF_LEAST_NORMAL.cast_signed())))
        };
        fn load_sub_nibbles(from: *const i8) -> (__m256, __m256) = {
            let both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
            let low = _mm256_and_si256(both, _mm256_set1_epi32(15));
            (_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(both)))
        };
        fn load(from: *const f32) -> __m256 = _mm256_loadu_ps(from);
        fn store(x: __m256, to: *mut f32) = _mm256_storeu_ps(to, x);
        fn add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        fn mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
    }
}

impl QuantLanes for Rows8Vnni {
    const ROWS: usize = 8;
    type Floats = __m256;
    type Codes = __m256i;
    /// Codes shifted by 128, unsigned.
    type Bytes = __m256i;
    type Sums = __m256i;
    /// The 32-bit sums themselves.
    type Narrow = __m256i;
    const BYTES_OFFSET: i32 = 128;

    #[inline(always)]
    unsafe fn in_order(narrow: __m256i) -> __m256i {
        // SAFETY: the caller's duty is the same.
        unsafe { keep_place(narrow) }
    }

    #[inline(always)]
    unsafe fn narrow(sums: __m256i) -> __m256i {
        sums
    }
    #[inline(always)]
    unsafe fn widen(_sums: __m256i, narrow: __m256i) -> __m256i {
        narrow
    }
    lane_functions! {
        fn load_codes(from: *const u8) -> __m256i = Rows8::load_codes(from);
        fn field(vector: __m256i, from: usize, width: usize, to: usize) -> __m256i =
            Rows8::field(vector, from, width, to);
        fn store_codes(codes: __m256i, to: *mut u8) = Rows8::store_codes(codes, to);
        fn or(a: __m256i, b: __m256i) -> __m256i = Rows8::or(a, b);
        fn look_up(book: __m256i, codes: __m256i) -> __m256i = Rows8::look_up(book, codes);
        fn bytes(signed: __m256i) -> __m256i = _mm256_xor_si256(signed, _mm256_set1_epi8(-128));
        fn zero_sums() -> __m256i = Rows8::zero_sums();
        fn dot(sums: __m256i, codes: __m256i, x: *const i8) -> __m256i =
            _mm256_dpbusd_avx_epi32(sums, codes, _mm256_set1_epi32(x.cast::<i32>().read_unaligned()));
        fn dot_bytes(sums: __m256i, codes: __m256i, x: *const i8) -> __m256i =
            _mm256_dpbusd_avx_epi32(sums, codes, _mm256_set1_epi32(x.cast::<i32>().read_unaligned()));
        fn splat_sums(sum: i32) -> __m256i = Rows8::splat_sums(sum);
        fn to_floats(sums: __m256i) -> __m256 = Rows8::to_floats(sums);
        fn zero() -> __m256 = Rows8::zero();
        fn splat(x: f32) -> __m256 = Rows8::splat(x);
        fn load_scales(from: *const f16) -> __m256 = Rows8::load_scales(from);
        fn load_sub_scales(from: *const i8) -> __m256 = Rows8::load_sub_scales(from);
        fn load_powers(from: *const u8) -> __m256 = Rows8::load_powers(from);
        fn load_sub_nibbles(from: *const i8) -> (__m256, __m256) = Rows8::load_sub_nibbles(from);
        fn load(from: *const f32) -> __m256 = Rows8::load(from);
        fn store(x: __m256, to: *mut f32) = Rows8::store(x, to);
        fn add(a: __m256, b: __m256) -> __m256 = Rows8::add(a, b);
        fn mul(a: __m256, b: __m256) -> __m256 = Rows8::mul(a, b);
        fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 = Rows8::mul_add(a, b, c);
    }
}
