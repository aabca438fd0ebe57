//! Rotary position embedding (Su et al. 2021): each pair (a, b) turns by its angle.

use crate::cpu::rope::RopeStyle;
use crate::cpu::task::RopeRow;

/// # Safety
/// Safe in fact; unsafe to fit the table.
pub(super) unsafe fn rope(row: &mut RopeRow<'_>) {
    let pairs = row.cos.len();
    for head in row.x.chunks_exact_mut(row.head_dim) {
        for i in 0..pairs {
            let (first, second) = match row.style {
                RopeStyle::Neox => (i, i + pairs),
                RopeStyle::Interleaved => (2 * i, 2 * i + 1),
            };
            (head[first], head[second]) = turn(head[first], head[second], row.cos[i], row.sin[i]);
        }
    }
}

/// (a cos - b sin, b cos + a sin), the first product fused.
#[inline(always)]
pub(crate) fn turn(a: f32, b: f32, cos: f32, sin: f32) -> (f32, f32) {
    (a.mul_add(cos, -(b * sin)), b.mul_add(cos, a * sin))
}
