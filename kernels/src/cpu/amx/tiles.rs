//! The matrix unit's instructions (Intel SDM, volume 1, chapter 18), and leave to use it.
//!
//! A tile register is 16 rows of 64 bytes. `tdpbssd` adds to a tile of sums `[rows, 16] i32` what an int8 tile
//! `[rows, k]` and a tile `[k / 4, 16, 4]` give: the second is just how a quantised weight tile lies. The intrinsics are not
//! stable, so the instructions are written out; what each tile holds is fixed here.
//!
//! It must not know formats or tasks. Invariant: registers keep what they hold from one call to the next, as no compiled code
//! uses them (a compiler takes tiles only where it is asked for, and nobody here does).

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, __m512, _xgetbv};
use std::sync::OnceLock;

/// Rows of a tile of activations and of its sums.
pub(super) const TILE_ROWS: usize = 16;
/// Bytes from one row of weights or sums to the next.
const STRIDE: usize = 64;

/// Bytes from one row of activations to the next, whatever of it is read.
pub(super) const X_STRIDE: usize = 32;
/// Bytes from what goes with one row of activations to the next row's.
pub(super) const SCALE_STRIDE: usize = 16;

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

/// Shapes the eight tiles for products over `k` inputs, a multiple of 4, at most 64: sums in 0 to 3, activations in 4 and 5,
/// weights in 6 and 7.
///
/// # Safety
/// The process may use tiles, see [`may_use`].
#[inline(always)]
pub(super) unsafe fn shape(k: usize) {
    let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], bytes_per_row: [0; 16], rows: [0; 16] };
    for tile in 0..8 {
        (shapes.rows[tile], shapes.bytes_per_row[tile]) = match tile {
            0..4 => (TILE_ROWS as u8, 64),
            4 | 5 => (TILE_ROWS as u8, k as u16),
            _ => ((k / 4) as u8, 64),
        };
    }
    // SAFETY: the caller's duty; it reads the 64 bytes of `shapes`, which are a valid configuration.
    unsafe { asm!("ldtilecfg [{0}]", in(reg) &raw const shapes, options(nostack, preserves_flags, readonly)) };
}

/// Empties the tiles, so that no switch of threads saves them.
///
/// # Safety
/// As [`shape`].
#[inline(always)]
pub(super) unsafe fn release() {
    // SAFETY: the caller's duty.
    unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
}

/// Two sets of registers, used in turns so that one product's loads do not wait for another's.
macro_rules! tile_sets {
    ($($set:literal: $sums:literal, $x:literal, $weights:literal;)*) => {
        /// Begins the sums of set number `SET` anew, with the product of 16 rows of activations, [`X_STRIDE`] from each other, and a
        /// group of a weight tile.
        ///
        /// # Safety
        /// As [`shape`], which was called for such groups; both are valid for all rows.
        #[inline(always)]
        pub(super) unsafe fn multiply<const SET: usize>(x: *const i8, weights: *const u8) {
            // SAFETY: the caller's duties.
            unsafe {
                match SET {
                    $($set => asm!(
                        concat!("tileloadd tmm", $weights, ", [{weights} + {stride}]"),
                        concat!("tileloadd tmm", $x, ", [{x} + {x_stride}]"),
                        concat!("tilezero tmm", $sums),
                        concat!("tdpbssd tmm", $sums, ", tmm", $x, ", tmm", $weights),
                        x = in(reg) x, weights = in(reg) weights, stride = in(reg) STRIDE, x_stride = in(reg) X_STRIDE,
                        options(nostack, preserves_flags, readonly)
                    ),)*
                    _ => unreachable!("there are two sets"),
                }
            }
        }

        /// Stores the sums of set number `SET`, `[16, 16]`.
        ///
        /// # Safety
        /// As [`shape`], which was called; `to` has room for them.
        #[inline(always)]
        pub(super) unsafe fn store<const SET: usize>(to: *mut i32) {
            // SAFETY: the caller's duties.
            unsafe {
                match SET {
                    $($set => asm!(
                        concat!("tilestored [{to} + {stride}], tmm", $sums),
                        to = in(reg) to, stride = in(reg) STRIDE,
                        options(nostack, preserves_flags)
                    ),)*
                    _ => unreachable!("there are two sets"),
                }
            }
        }
    };
}

tile_sets! {
    0: "0", "4", "6";
    1: "1", "5", "7";
}

/// Row `n` of sums into its accumulator, by way of two registers: rows that follow each other have their own.
macro_rules! finish_row {
    ($n:literal, $sums:literal, $scale:literal) => {
        concat!(
            "vcvtdq2ps ",
            $sums,
            ", zmmword ptr [{sums} + 64*",
            $n,
            "]\n",
            "vmulps ",
            $scale,
            ", {scales}, dword ptr [{x_scales} + {scale_stride}*",
            $n,
            "]{{1to16}}\n",
            "vfmadd231ps {a",
            $n,
            "}, ",
            $sums,
            ", ",
            $scale
        )
    };
}

/// The same, and the minimums' part.
macro_rules! finish_row_with_mins {
    ($n:literal, $sums:literal, $scale:literal) => {
        concat!(
            finish_row!($n, $sums, $scale),
            "\n",
            "vfmadd231ps {a",
            $n,
            "}, {mins}, dword ptr [{x_sums} + {scale_stride}*",
            $n,
            "]{{1to16}}"
        )
    };
}

/// All sixteen rows, by one of the macros above.
macro_rules! finish_rows {
    ($row:ident, $acc:ident, $($operand:tt)*) => {
        asm!(
            $row!("0", "zmm24", "zmm28"), $row!("1", "zmm25", "zmm29"), $row!("2", "zmm26", "zmm30"), $row!("3", "zmm27", "zmm31"),
            $row!("4", "zmm24", "zmm28"), $row!("5", "zmm25", "zmm29"), $row!("6", "zmm26", "zmm30"), $row!("7", "zmm27", "zmm31"),
            $row!("8", "zmm24", "zmm28"), $row!("9", "zmm25", "zmm29"), $row!("10", "zmm26", "zmm30"), $row!("11", "zmm27", "zmm31"),
            $row!("12", "zmm24", "zmm28"), $row!("13", "zmm25", "zmm29"), $row!("14", "zmm26", "zmm30"), $row!("15", "zmm27", "zmm31"),
            $($operand)*
            scale_stride = const SCALE_STRIDE,
            a0 = inout(zmm_reg) $acc[0], a1 = inout(zmm_reg) $acc[1], a2 = inout(zmm_reg) $acc[2], a3 = inout(zmm_reg) $acc[3],
            a4 = inout(zmm_reg) $acc[4], a5 = inout(zmm_reg) $acc[5], a6 = inout(zmm_reg) $acc[6], a7 = inout(zmm_reg) $acc[7],
            a8 = inout(zmm_reg) $acc[8], a9 = inout(zmm_reg) $acc[9], a10 = inout(zmm_reg) $acc[10], a11 = inout(zmm_reg) $acc[11],
            a12 = inout(zmm_reg) $acc[12], a13 = inout(zmm_reg) $acc[13], a14 = inout(zmm_reg) $acc[14], a15 = inout(zmm_reg) $acc[15],
            out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
            out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
            options(nostack, preserves_flags, readonly)
        )
    };
}

/// Takes a weight group's sums into 16 rows' accumulators: `acc[n] += float(sums[n]) * (scales * x_scales[n])`, each rounded
/// as a fused multiply-add is. Written out, because a compiler moves every accumulator from register to register, and a unit of
/// work took half as long again.
///
/// # Safety
/// The machine has AVX-512 F; `sums` is `[16, 16]`; `x_scales` are 16, [`SCALE_STRIDE`] from each other.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn finish(sums: *const i32, scales: __m512, x_scales: *const f32, acc: &mut [__m512; TILE_ROWS]) {
    // SAFETY: the caller's duties.
    unsafe {
        finish_rows!(
            finish_row, acc,
            sums = in(reg) sums, x_scales = in(reg) x_scales, scales = in(zmm_reg) scales,
        );
    }
}

/// As [`finish`], then `acc[n] += mins * x_sums[n]`.
///
/// # Safety
/// As [`finish`]; `x_sums` are 16, likewise.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn finish_with_mins(
    sums: *const i32,
    scales: __m512,
    x_scales: *const f32,
    mins: __m512,
    x_sums: *const f32,
    acc: &mut [__m512; TILE_ROWS],
) {
    // SAFETY: the caller's duties.
    unsafe {
        finish_rows!(
            finish_row_with_mins, acc,
            sums = in(reg) sums, x_scales = in(reg) x_scales, x_sums = in(reg) x_sums,
            scales = in(zmm_reg) scales, mins = in(zmm_reg) mins,
        );
    }
}

/// `rounds` products in each of four tiles of sums, of tiles as [`shape`] was told. Returns how many that were.
///
/// # Safety
/// As [`shape`], which was called.
#[inline(always)]
pub(super) unsafe fn spin(rounds: usize) -> usize {
    for _ in 0..rounds {
        // SAFETY: the caller's duties; it touches no memory.
        unsafe {
            asm!(
                "tdpbssd tmm0, tmm4, tmm6",
                "tdpbssd tmm1, tmm4, tmm7",
                "tdpbssd tmm2, tmm5, tmm6",
                "tdpbssd tmm3, tmm5, tmm7",
                options(nostack, preserves_flags, nomem)
            );
        }
    }
    4 * rounds
}

/// Whether the processor has tiles and their int8 products, the system saves them, and this process may use them: Linux wants
/// to be asked first, once for all threads, and may refuse.
pub(in crate::cpu) fn may_use() -> bool {
    static MAY_USE: OnceLock<bool> = OnceLock::new();
    *MAY_USE.get_or_init(|| has_unit() && ask())
}

fn has_unit() -> bool {
    const TILE_AND_INT8: u32 = 1 << 24 | 1 << 25;
    const OSXSAVE: u32 = 1 << 27;
    // Both halves of the tiles' state: shapes and contents.
    const TILE_STATE: u64 = 1 << 17 | 1 << 18;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 || __cpuid_count(7, 0).edx & TILE_AND_INT8 != TILE_AND_INT8 {
        return false;
    }
    // SAFETY: the system has enabled the instruction, as OSXSAVE says.
    unsafe { xsave_state() & TILE_STATE == TILE_STATE }
}

/// States that the system saves.
///
/// # Safety
/// The machine has `xgetbv`.
#[target_feature(enable = "xsave")]
unsafe fn xsave_state() -> u64 {
    // SAFETY: the caller's duty.
    unsafe { _xgetbv(0) }
}

#[cfg(target_os = "linux")]
fn ask() -> bool {
    // Linux, arch/x86/include/uapi/asm/prctl.h; the number of the tiles' contents among the states.
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call takes two integers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn ask() -> bool {
    false
}
