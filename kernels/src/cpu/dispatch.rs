//! Chooses the kernels: the only place of this crate that asks the CPU what it can do, and asks once.
//!
//! Every instruction set fills one table of function pointers; what a set has no version of is the scalar twin's
//! entry. Invariant: a table is handed out only if the machine has every feature its functions were compiled for,
//! which is the duty of all their unsafe signatures.

use std::sync::OnceLock;

use half::{bf16, f16};

use super::rows::LayerNorm;
use super::task::{DenseTask, GatedTask, GroupsMut, QuantTask, RopeRow, SpanTask};
use crate::KernelError;

/// The environment variable that forces an instruction set.
pub const ISA_VARIABLE: &str = "BINDERY_ISA";

/// Instruction sets, from plain to wide. A name means exactly that set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Portable Rust: the specification.
    Scalar,
    /// NEON, which every 64-bit ARM processor has.
    Neon,
    /// The same with the dot products of ARMv8.2.
    NeonDot,
    /// The same with the matrix products of ARMv8.6.
    NeonI8mm,
    /// AVX2, FMA, F16C.
    Avx2,
    /// The same with the 256-bit form of VNNI's dot products (AVX-VNNI).
    AvxVnni,
    /// AVX-512 F, BW, VL, DQ.
    Avx512,
    /// The same with VNNI's dot products.
    Avx512Vnni,
    /// The same with the int8 products of the matrix unit (AMX).
    Amx,
}

impl Isa {
    /// Every set that has a name.
    pub const ALL: [Self; 9] = [
        Self::Scalar,
        Self::Neon,
        Self::NeonDot,
        Self::NeonI8mm,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Avx512Vnni,
        Self::Amx,
    ];

    /// As written in `BINDERY_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::NeonDot => "neondot",
            Self::NeonI8mm => "neoni8mm",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
            Self::Amx => "amx",
        }
    }

    /// Whether this machine and this build have it; stays true once true.
    pub fn is_available(self) -> bool {
        Kernels::of(self).is_some()
    }

    /// The best set of this machine.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Self::Scalar))
    }

    /// What `BINDERY_ISA` asks for, or the best set of this machine where it is unset or empty.
    pub fn from_env() -> Result<Self, KernelError> {
        match std::env::var_os(ISA_VARIABLE) {
            Some(value) if !value.is_empty() => Self::parse(&value.to_string_lossy()),
            _ => Ok(Self::best()),
        }
    }

    /// A set by its name, if the machine has it.
    pub fn parse(name: &str) -> Result<Self, KernelError> {
        let isa = Self::ALL
            .into_iter()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| KernelError::UnknownIsa { name: name.to_owned(), known: names(Self::ALL.into_iter()) })?;
        if isa.is_available() {
            return Ok(isa);
        }
        let available = names(Self::ALL.into_iter().filter(|isa| isa.is_available()));
        Err(KernelError::UnavailableIsa { name: isa.name(), available })
    }

    /// Rows of a quantised tile.
    pub(crate) fn quant_tile_rows(self) -> usize {
        match self {
            Self::Scalar | Self::Neon | Self::NeonDot | Self::NeonI8mm | Self::Avx2 | Self::AvxVnni => 8,
            Self::Avx512 | Self::Avx512Vnni | Self::Amx => 16,
        }
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

fn names(sets: impl Iterator<Item = Isa>) -> String {
    sets.map(Isa::name).collect::<Vec<_>>().join(", ")
}

/// One instruction set's kernels. Each entry's common duty (`# Safety`): the machine has the set's features, and the
/// task's ranges lie within its buffers (the constructors in `task.rs` and the safe operations check them).
pub(crate) struct Kernels {
    /// Activation rows that a weight tile meets at a time, at most.
    pub(crate) columns: usize,
    pub(crate) quantized: unsafe fn(&mut QuantTask<'_>),
    pub(crate) dense_f32: unsafe fn(&DenseTask<'_, f32>),
    pub(crate) dense_f16: unsafe fn(&DenseTask<'_, f16>),
    pub(crate) dense_bf16: unsafe fn(&DenseTask<'_, bf16>),
    /// Row to int8 groups.
    pub(crate) quantize: unsafe fn(&[f32], &GroupsMut<'_>),
    /// Row, weight, eps, normalised row.
    pub(crate) rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    /// Row, weight, bias and eps, normalised row.
    pub(crate) layer_norm: unsafe fn(&[f32], &LayerNorm<'_>, &mut [f32]),
    /// Adds a row times a factor to another.
    pub(crate) add_scaled: unsafe fn(&mut [f32], &[f32], f32),
    pub(crate) rope: unsafe fn(&mut RopeRow<'_>),
    pub(crate) gated: unsafe fn(&GatedTask<'_>),
    pub(crate) attention_f32: unsafe fn(&mut SpanTask<'_, f32>),
    pub(crate) attention_f16: unsafe fn(&mut SpanTask<'_, f16>),
    pub(crate) attention_bf16: unsafe fn(&mut SpanTask<'_, bf16>),
    pub(crate) attention_i8: unsafe fn(&mut SpanTask<'_, i8>),
    /// Largest element, NaN aside; -inf for an empty row.
    pub(crate) max: unsafe fn(&[f32]) -> f32,
    /// Row and its maximum: writes exp(x - max) over x, returns the sum.
    pub(crate) exp_sub_sum: unsafe fn(&mut [f32], f32) -> f32,
    /// Row, scale and cap: writes cap * tanh(scale * x / cap) over x.
    pub(crate) soft_cap: unsafe fn(&mut [f32], f32, f32),
    /// Rounds of f32 multiply-adds to operations.
    pub(crate) spin_f32: unsafe fn(usize) -> u64,
    /// Rounds of int8 dot products to operations.
    pub(crate) spin_int8: unsafe fn(usize) -> u64,
}

impl Kernels {
    /// The table of a set, if the machine has it.
    pub(crate) fn of(isa: Isa) -> Option<&'static Self> {
        match isa {
            Isa::Scalar => Some(&super::scalar::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::has_avx2().then_some(&super::avx2::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => (x86::has_avx2() && x86::has_avx_vnni()).then_some(&super::avx2::KERNELS_VNNI),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::has_avx512().then_some(&super::avx512::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => (x86::has_avx512() && x86::has_vnni()).then_some(&super::avx512::KERNELS_VNNI),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => (x86::has_avx512() && x86::has_vnni() && super::amx::may_use()).then_some(&super::amx::KERNELS),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => arm::has_neon().then_some(&super::neon::KERNELS),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => (arm::has_neon() && arm::has_dotprod()).then_some(&super::neon::KERNELS_DOT),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => {
                (arm::has_neon() && arm::has_dotprod() && arm::has_i8mm()).then_some(&super::neon::KERNELS_I8MM)
            }
            _ => None,
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    //! The standard library caches these answers.

    use std::arch::is_aarch64_feature_detected;

    pub(super) fn has_neon() -> bool {
        is_aarch64_feature_detected!("neon")
    }

    pub(super) fn has_dotprod() -> bool {
        is_aarch64_feature_detected!("dotprod")
    }

    pub(super) fn has_i8mm() -> bool {
        is_aarch64_feature_detected!("i8mm")
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The standard library caches these answers.

    pub(super) fn has_avx2() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    }

    pub(super) fn has_avx_vnni() -> bool {
        is_x86_feature_detected!("avxvnni")
    }

    pub(super) fn has_avx512() -> bool {
        has_avx2()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
    }

    pub(super) fn has_vnni() -> bool {
        is_x86_feature_detected!("avx512vnni")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_and_unknown_ones_are_explained() {
        assert_eq!(Isa::parse("scalar"), Ok(Isa::Scalar));
        let error = Isa::parse("sse9").unwrap_err();
        assert!(error.to_string().contains("'sse9'") && error.to_string().contains("avx2"), "{error}");
        for isa in Isa::ALL {
            assert_eq!(Isa::parse(isa.name()).is_ok(), isa.is_available());
        }
        let foreign = if cfg!(target_arch = "aarch64") { "avx2" } else { "neon" };
        assert!(matches!(Isa::parse(foreign), Err(KernelError::UnavailableIsa { name, .. }) if name == foreign));
        assert!(Isa::best().is_available());
    }
}
