//! The two inner loops that everything else is measured by, as plain Rust does them.

use std::hint::black_box;

const LANES: usize = 16;

/// `rounds` multiply-adds in sixteen lanes. Returns operations, two a multiply-add.
pub(in crate::cpu) unsafe fn spin_f32(rounds: usize) -> u64 {
    let factor = black_box(0.5_f32);
    let mut sums = [1.0_f32; LANES];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = sum.mul_add(factor, factor);
        }
    }
    black_box(&sums);
    (rounds * LANES * 2) as u64
}

/// `rounds` multiply-adds of int8 codes in sixteen lanes. Returns operations, two a multiply-add.
pub(in crate::cpu) unsafe fn spin_int8(rounds: usize) -> u64 {
    let (codes, x) = (black_box([3_u8; LANES]), black_box([5_i8; LANES]));
    let mut sums = [0_i32; LANES];
    for _ in 0..rounds {
        for lane in 0..LANES {
            sums[lane] = sums[lane].wrapping_add(i32::from(codes[lane]) * i32::from(x[lane]));
        }
        black_box(&sums);
    }
    (rounds * LANES * 2) as u64
}
