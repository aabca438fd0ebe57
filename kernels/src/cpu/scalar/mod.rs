//! The specification: every kernel once in plain Rust, written to be read and never made fast.
//!
//! What these functions compute, bit for bit, is what every instruction set must compute; they also serve machines that
//! have none of the others. Invariant: the order of every sum is spelled out here.

mod attention;
mod dense;
pub(crate) mod exp;
pub(crate) mod gated;
mod logits;
mod norm;
mod peak;
mod quant;
pub(crate) mod quantize;
pub(crate) mod rope;

use super::dispatch::Kernels;

/// Lanes of every sum over a row. Sixteen partial sums fit one 512-bit, two 256-bit or four 128-bit registers.
pub(crate) const LANES: usize = 16;

/// Joins the sixteen lanes of a sum: halves are added, then quarters, and so on.
pub(crate) fn join_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// All entries: what the other sets lack is this.
pub(super) const TABLE: Kernels = Kernels {
    columns: 4,
    quantized: quant::multiply,
    dense_f32: dense::multiply,
    dense_f16: dense::multiply,
    dense_bf16: dense::multiply,
    quantize: quantize::quantize,
    rms_norm: norm::rms_norm,
    layer_norm: norm::layer_norm,
    add_scaled: norm::add_scaled,
    rope: rope::rope,
    gated: gated::gated,
    attention_f32: attention::attend,
    attention_f16: attention::attend,
    attention_bf16: attention::attend,
    attention_i8: attention::attend,
    max: logits::max,
    exp_sub_sum: logits::exp_sub_sum,
    soft_cap: logits::soft_cap,
    spin_f32: peak::spin_f32,
    spin_int8: peak::spin_int8,
};

pub(super) static KERNELS: Kernels = TABLE;
