//! An adapter's products to the packed matrices of the `cpu` backend.
//!
//! The first half reads the same activations as the base matrix that it stands beside, so it takes that one's form: int8 codes
//! where those are int8, else dense. The second half reads `rank` numbers and is dense always. It must not know which layer
//! a product belongs to.

use bindery_kernels::{GROUP, Isa, Matrix, QuantRow, Quantized};
use half::f16;

use super::{
    LowRank,
    weights::{BaseForm, LowRankWeights},
};
use crate::{
    backend::cpu::CpuBackend,
    weights::quantize::{INT8, int8},
};

/// What stands beside a base matrix of this form. Values are finite.
pub(crate) fn pack(isa: Isa, mut low_rank: LowRank, base: BaseForm) -> LowRankWeights<CpuBackend> {
    let LowRank { rank, a, b } = &mut low_rank;
    let (rank, inputs) = (*rank, a.len() / (*rank).max(1));
    if base != BaseForm::F32 {
        // The range of f16 is short, of scales and of elements: rows of about one, whatever they were. What moves is a power of two.
        balance(a, b, rank);
    }
    let down = if base == BaseForm::Quantized && inputs.is_multiple_of(GROUP) {
        int8_matrix(isa, a, rank)
    } else {
        dense(isa, a, rank, base)
    };
    LowRankWeights { down, up: dense(isa, b, b.len() / rank.max(1), base) }
}

/// Brings the largest element of each row of `a` to about one, and the columns of `b` by as much the other way.
fn balance(a: &mut [f32], b: &mut [f32], rank: usize) {
    let inputs = a.len() / rank.max(1);
    for (at, row) in a.chunks_exact_mut(inputs.max(1)).enumerate() {
        let largest = row.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
        if !largest.is_normal() {
            continue;
        }
        // Within what f32 can hold of either factor.
        let exponent = largest.log2().floor().clamp(-60.0, 60.0);
        let (down, up) = ((-exponent).exp2(), exponent.exp2());
        for x in row {
            *x *= down;
        }
        for x in b.iter_mut().skip(at).step_by(rank) {
            *x *= up;
        }
    }
}

fn int8_matrix(isa: Isa, values: &[f32], rows: usize) -> Matrix {
    let cols = values.len() / rows.max(1);
    Matrix::Quantized(Quantized::pack(isa, rows, cols, INT8, |row, out| {
        let QuantRow { codes, scales, .. } = out;
        let groups = values[row * cols..(row + 1) * cols].as_chunks::<GROUP>().0;
        let codes = codes.as_chunks_mut::<GROUP>().0;
        for ((group, codes), scale) in groups.iter().zip(codes).zip(scales) {
            *scale = int8(group, codes).expect("rows are of about one");
        }
    }))
}

/// The least that the largest element of a matrix in f16 may be: what rounding does to elements too small for f16's full precision is
/// then less than 2^-17 of that.
const MIN_LARGEST: f32 = 1.0 / 256.0;

/// In f32 beside a base in f32; else in f16, which is closer to what was trained than bf16, where its range suffices at both ends.
fn dense(isa: Isa, values: &[f32], rows: usize, base: BaseForm) -> Matrix {
    let cols = values.len() / rows.max(1);
    let row_of = |row: usize| &values[row * cols..(row + 1) * cols];
    let largest = values.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    let fits_f16 = largest == 0.0 || largest >= MIN_LARGEST && f16::from_f32(largest).is_finite();
    if base == BaseForm::F32 || !fits_f16 {
        Matrix::pack_f32(isa, rows, cols, |row, out| out.copy_from_slice(row_of(row)))
    } else {
        Matrix::pack_f16(isa, rows, cols, |row, out| {
            out.iter_mut().zip(row_of(row)).for_each(|(out, &x)| *out = f16::from_f32(x));
        })
    }
}
