//! Gated activation: silu(gate) * up with silu(x) = x / (1 + exp(-x)).

use super::exp::exp;

/// # Safety
/// Safe in fact; unsafe to fit the table.
pub(super) unsafe fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exp(-gate)) * up;
    }
}
