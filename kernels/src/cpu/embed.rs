//! Rows of a packed matrix by their numbers: what tokens are embedded as.
//!
//! A row's weights lie among those of the other rows of its tile, so each row is ten kilobytes and more that nobody has read
//! lately, at a place that no processor foresees: threads share the rows, and the next one is asked for while one is unpacked.
//! It knows matrices and numbers, not tokens.

use super::Cpu;
use super::pool::SharedMut;
use crate::matrix::Matrix;

/// Elements that are worth waking another thread for.
const MIN_PIECE_ELEMENTS: usize = 8 * 1024;

impl Cpu {
    /// The rows `numbers` of a matrix, each element times `factor`: `[numbers.len(), cols]`.
    pub fn take_rows(&self, matrix: &Matrix, numbers: &[u32], factor: f32, out: &mut [f32]) {
        let cols = matrix.cols();
        assert_eq!(out.len(), numbers.len() * cols, "{} rows of {cols} into a buffer of {}", numbers.len(), out.len());
        let out = SharedMut::new(out);
        self.split(numbers.len(), MIN_PIECE_ELEMENTS.div_ceil(cols.max(1)), |piece| {
            for at in piece.clone() {
                if at + 1 < piece.end {
                    matrix.prefetch_row(numbers[at + 1] as usize);
                }
                // SAFETY: every row of the output is one piece's.
                let row = unsafe { out.slice(at * cols..(at + 1) * cols) };
                matrix.row(numbers[at] as usize, row);
                if factor != 1.0 {
                    for x in row {
                        *x *= factor;
                    }
                }
            }
        });
    }
}
