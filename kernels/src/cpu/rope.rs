//! Rotary position embedding, in place.
//!
//! Knows angles as given tables, nothing of how they come about (scaling is the caller's). Invariant: elements beyond
//! the rotated part of a head are untouched.

use super::Cpu;
use super::pool::SharedMut;
use super::task::RopeRow;

/// Which elements of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// (i, i + rotary_dim / 2), as GPT-NeoX and transformers' LLaMA.
    Neox,
    /// (2 i, 2 i + 1), as GPT-J and llama.cpp's LLaMA files.
    Interleaved,
}

/// The shape of a rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeArgs {
    /// Heads of a row.
    pub num_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Leading elements of a head that are rotated; even.
    pub rotary_dim: usize,
    /// Pairing.
    pub style: RopeStyle,
}

/// Elements that are worth waking another thread for.
const MIN_PIECE_ELEMENTS: usize = 16 * 1024;

impl Cpu {
    /// Rotates the first `rotary_dim` elements of each head in place. `x: [m, num_heads * head_dim]`,
    /// `cos, sin: [m, rotary_dim / 2]`.
    #[expect(clippy::too_many_arguments, reason = "shape and tables; `rope_rows` takes them as a struct")]
    pub fn rope(
        &self,
        x: &mut [f32],
        m: usize,
        num_heads: usize,
        head_dim: usize,
        rotary_dim: usize,
        style: RopeStyle,
        cos: &[f32],
        sin: &[f32],
    ) {
        self.rope_rows(x, m, &RopeArgs { num_heads, head_dim, rotary_dim, style }, cos, sin);
    }

    /// As [`Cpu::rope`], the shape as a struct.
    pub fn rope_rows(&self, x: &mut [f32], m: usize, args: &RopeArgs, cos: &[f32], sin: &[f32]) {
        let RopeArgs { num_heads, head_dim, rotary_dim, style } = *args;
        let width = num_heads * head_dim;
        let pairs = rotary_dim / 2;
        assert!(rotary_dim.is_multiple_of(2) && rotary_dim <= head_dim, "{rotary_dim} of {head_dim} cannot be rotated");
        assert_eq!(x.len(), m * width, "{m} rows of {width} in a buffer of {}", x.len());
        assert!(cos.len() == m * pairs && sin.len() == m * pairs, "{m} rows of {pairs} angles from {}", cos.len());
        let x = SharedMut::new(x);
        self.split(m, MIN_PIECE_ELEMENTS.div_ceil(width.max(1)), |piece| {
            for row in piece {
                let angles = row * pairs..(row + 1) * pairs;
                // SAFETY: pieces have disjoint rows.
                let x = unsafe { x.slice(row * width..(row + 1) * width) };
                let mut row = RopeRow { x, head_dim, style, cos: &cos[angles.clone()], sin: &sin[angles] };
                // SAFETY: the table fits the machine; heads and angles were measured above.
                unsafe { (self.kernels.rope)(&mut row) };
            }
        });
    }
}
