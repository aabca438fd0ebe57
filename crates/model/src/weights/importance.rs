//! How much each input of a matrix matters: the mean square of what it was on a text (`--calibrate`).
//!
//! An error in a weight comes out multiplied with its input, so errors are weighed by the mean square of the inputs, as
//! llama.cpp's importance matrix does and as the diagonal of GPTQ's Hessian is. It must not know how inputs were gathered.
//! Its invariant: means are finite and not negative, and as many as the matrix has inputs.

use std::collections::HashMap;

use super::TensorRole;

/// Mean squares of inputs, by the matrix they go into.
#[derive(Debug, Default)]
pub struct Importance {
    sums: HashMap<TensorRole, Sums>,
}

#[derive(Debug, Default)]
struct Sums {
    num_rows: u64,
    /// `[inputs]`
    squares: Vec<f64>,
}

impl Importance {
    /// Adds rows of inputs of a matrix, `values: [rows, inputs]`. Rows that hold something else than finite numbers are left
    /// out.
    pub(crate) fn add(&mut self, role: TensorRole, values: &[f32], num_inputs: usize) {
        let sums = self.sums.entry(role).or_default();
        sums.squares.resize(num_inputs, 0.0);
        for row in values.chunks_exact(num_inputs).filter(|row| row.iter().all(|value| value.is_finite())) {
            sums.num_rows += 1;
            sums.squares.iter_mut().zip(row).for_each(|(sum, &value)| *sum += f64::from(value) * f64::from(value));
        }
    }

    /// Mean squares of a matrix' inputs, `[inputs]`; none where it never had any.
    pub fn mean_squares(&self, role: TensorRole) -> Option<Vec<f32>> {
        let sums = self.sums.get(&role).filter(|sums| sums.num_rows > 0)?;
        Some(sums.squares.iter().map(|square| (square / sums.num_rows as f64) as f32).collect())
    }
}
