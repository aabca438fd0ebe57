//! The scalar twin against plain mathematics in f64: the specification computes what its names say.
//!
//! Everything else is held against the scalar twin, in `properties.rs`.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

mod common;

use bindery_kernels::{
    Activations, AttentionArgs, AttentionSequence, Cpu, Isa, KvCache, KvDtype, KvShape, RopeStyle, TopEntry,
};
use common::{Family, Paged, Random, product, rows_of};

/// f32 sums of some hundred terms of magnitude one: a few hundred half-units of 2^-24.
const SUM_TOLERANCE: f64 = 2e-5;
/// int8 activations: each is off by at most half a step of 1/127 of its group's maximum, errors that average out over a
/// row. Relative to the product of the rows' norms.
const INT8_TOLERANCE: f64 = 0.01;

fn scalar() -> Cpu {
    Cpu::new(Isa::Scalar, 2)
}

#[test]
fn products_are_dot_products() {
    let cpu = scalar();
    let mut random = Random(1);
    for family in Family::ALL {
        for (m, rows, cols) in [(1, 1, 32), (3, 17, 96), (5, 40, 320)] {
            let w = family.matrix(cpu.isa(), rows, cols, 7);
            let x = random.vec(m * cols);
            let bias = random.vec(rows);
            let out = product(&cpu, &x, m, &w, Some(&bias));
            let weights = rows_of(&w);
            for (i, x) in x.chunks_exact(cols).enumerate() {
                for (r, weights) in weights.iter().enumerate() {
                    let dot: f64 = x.iter().zip(weights).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                    let norm = |v: &[f32]| v.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
                    let tolerance = if family.is_quantized() { INT8_TOLERANCE } else { SUM_TOLERANCE };
                    let error = (f64::from(out[i * rows + r]) - dot - f64::from(bias[r])).abs();
                    assert!(
                        error <= tolerance * (1.0 + norm(x) * norm(weights)),
                        "{family:?} {m} {rows} {cols}: {error}"
                    );
                }
            }
        }
    }
}

#[test]
fn products_add_to_what_is_there() {
    let cpu = scalar();
    let w = Family::W4.matrix(cpu.isa(), 11, 64, 3);
    let x = Random(2).vec(2 * 64);
    let fresh = product(&cpu, &x, 2, &w, None);
    let mut activations = Activations::default();
    cpu.prepare(&x, 2, 64, true, &mut activations);
    let mut out = vec![0.5; 22];
    cpu.matmul_add(&activations, &w, None, &mut out);
    assert_eq!(out, fresh.iter().map(|x| 0.5 + x).collect::<Vec<_>>());
}

#[test]
fn rms_norm_norms() {
    let cpu = scalar();
    let mut random = Random(3);
    for k in [1, 7, 16, 576, 1001] {
        let (x, weight) = (random.vec(3 * k), random.vec(k));
        let mut out = Activations::default();
        cpu.rms_norm(&x, 3, &weight, 1e-5, false, &mut out);
        for (x, out) in x.chunks_exact(k).zip(out.rows().chunks_exact(k)) {
            let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / k as f64;
            for i in 0..k {
                let truth = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                assert!((f64::from(out[i]) - truth).abs() <= 1e-5, "{k}");
            }
        }
    }
}

#[test]
fn rms_norm_in_place_is_rms_norm() {
    let cpu = scalar();
    let mut random = Random(12);
    let (mut x, weight) = (random.vec(40 * 576), random.vec(576));
    let mut out = Activations::default();
    cpu.rms_norm(&x, 40, &weight, 1e-5, false, &mut out);
    cpu.rms_norm_in_place(&mut x, &weight, 1e-5);
    assert_eq!(x, out.rows());
}

#[test]
fn activations_shrink_and_grow_again() {
    let cpu = scalar();
    let w = Family::W4WithMins.matrix(cpu.isa(), 5, 64, 9);
    let x = Random(13).vec(6 * 64);
    let mut reused = Activations::default();
    for (m, quantized) in [(6, true), (1, false), (3, true), (6, true)] {
        cpu.prepare(&x[..m * 64], m, 64, quantized, &mut reused);
        assert_eq!((reused.num_rows(), reused.cols(), reused.is_quantized()), (m, 64, quantized));
        assert_eq!(reused.rows(), &x[..m * 64]);
    }
    let mut out = vec![0.0; 30];
    cpu.matmul(&reused, &w, None, &mut out);
    assert_eq!(out, product(&cpu, &x, 6, &w, None));
}

#[test]
#[should_panic(expected = "needs a multiple of 32 inputs, got 33")]
fn ragged_quantised_matrices_are_refused() {
    Family::W4.matrix(Isa::Scalar, 1, 33, 0);
}

#[test]
#[should_panic(expected = "packed for another instruction set")]
fn matrices_of_another_instruction_set_are_refused() {
    product(&scalar(), &[0.0; 32], 1, &Family::W4.matrix(Isa::Avx512, 1, 32, 0), None);
}

#[test]
#[should_panic(expected = "slot 8 of a cache of 8 slots")]
fn slots_beyond_the_cache_are_refused() {
    let shape = KvShape { num_layers: 1, num_kv_heads: 1, head_dim: 2, block_size: 4, dtype: KvDtype::F32 };
    let mut cache = KvCache::new(shape, 2).unwrap();
    scalar().write_kv(&mut cache, 0, &[0.0; 2], &[0.0; 2], &[8]);
}

#[test]
#[should_panic(expected = "9 tokens need 3 blocks, got 2")]
fn short_block_tables_are_refused() {
    let shape = KvShape { num_layers: 1, num_kv_heads: 1, head_dim: 2, block_size: 4, dtype: KvDtype::F32 };
    let cache = KvCache::new(shape, 4).unwrap();
    let args = AttentionArgs { num_heads: 1, scale: 1.0, window: None, soft_cap: None, alibi_slopes: None };
    let sequence = AttentionSequence { rows: 0..1, context_len: 9, block_table: &[0, 1] };
    scalar().attention(&[0.0; 2], &cache, 0, &[sequence], &args, &mut [0.0; 2]);
}

#[test]
fn rope_turns_pairs_and_leaves_the_rest() {
    let cpu = scalar();
    let (m, heads, head_dim, rotary) = (3, 2, 10, 6);
    let x = Random(4).vec(m * heads * head_dim);
    let angles: Vec<f32> = (0..m * rotary / 2).map(|i| i as f32 * 0.7).collect();
    let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
    let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
    for style in [RopeStyle::Neox, RopeStyle::Interleaved] {
        let mut out = x.clone();
        cpu.rope(&mut out, m, heads, head_dim, rotary, style, &cos, &sin);
        for (head, (x, out)) in x.chunks_exact(head_dim).zip(out.chunks_exact(head_dim)).enumerate() {
            assert_eq!(x[rotary..], out[rotary..]);
            for i in 0..rotary / 2 {
                let (a, b) = if style == RopeStyle::Neox { (i, i + rotary / 2) } else { (2 * i, 2 * i + 1) };
                let angle = f64::from(angles[head / heads * rotary / 2 + i]);
                let (p, q) = (f64::from(x[a]), f64::from(x[b]));
                assert!((f64::from(out[a]) - (p * angle.cos() - q * angle.sin())).abs() < 1e-6);
                assert!((f64::from(out[b]) - (q * angle.cos() + p * angle.sin())).abs() < 1e-6);
            }
        }
    }
}

#[test]
fn silu_mul_gates() {
    let gate: Vec<f32> = (-1000..1000).map(|i| i as f32 * 0.05).collect();
    let up = Random(5).vec(gate.len());
    let mut out = vec![0.0; gate.len()];
    scalar().silu_mul(&gate, &up, &mut out);
    for i in 0..gate.len() {
        let g = f64::from(gate[i]);
        let truth = g / (1.0 + (-g).exp()) * f64::from(up[i]);
        assert!((f64::from(out[i]) - truth).abs() <= 1e-6 * (1.0 + truth.abs()), "{g}");
    }
}

/// What attention means, in f64.
fn naive_attention(paged: &Paged, i: usize, args: &AttentionArgs<'_>, position: usize, head: usize) -> Vec<f64> {
    let shape = paged.cache.shape();
    let (d, kv_heads) = (shape.head_dim, shape.num_kv_heads);
    let kv_head = head / (args.num_heads / kv_heads);
    let query = &paged.queries[i][(position * args.num_heads + head) * d..][..d];
    let first = args.window.map_or(0, |window| (position + 1).saturating_sub(window));
    let at = |key: usize| (key * kv_heads + kv_head) * d;
    let scores: Vec<f64> = (first..=position)
        .map(|key| {
            let keys = &paged.keys[i][at(key)..][..d];
            let dot: f64 = query.iter().zip(keys).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
            let score = dot * f64::from(args.scale);
            let score = args.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
            score + args.alibi_slopes.map_or(0.0, |slopes| f64::from(slopes[head]) * (key as f64 - position as f64))
        })
        .collect();
    let max = scores.iter().copied().fold(f64::MIN, f64::max);
    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    (0..d)
        .map(|c| {
            let weighted = (first..=position)
                .zip(&scores)
                .map(|(key, score)| (score - max).exp() / total * f64::from(paged.values[i][at(key) + c]));
            weighted.sum()
        })
        .collect()
}

#[test]
fn attention_attends() {
    let cpu = scalar();
    let slopes = [0.5, 0.25, 0.125, 0.0625, 0.03, 0.015];
    let plain = AttentionArgs { num_heads: 6, scale: 0.4, window: None, soft_cap: None, alibi_slopes: None };
    let cases = [
        plain,
        AttentionArgs { window: Some(37), ..plain },
        AttentionArgs { window: Some(700), ..plain },
        AttentionArgs { soft_cap: Some(2.0), ..plain },
        AttentionArgs { alibi_slopes: Some(&slopes), ..plain },
    ];
    for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16] {
        let shape = KvShape { num_layers: 1, num_kv_heads: 2, head_dim: 10, block_size: 5, dtype };
        let contexts = [1, 64, 65, 700, 1300];
        let paged = Paged::new(&cpu, shape, 6, &contexts, 11);
        for args in &cases {
            let rows = [1, 64, 2, 5, 3];
            let outs = paged.attend(&cpu, &rows, args);
            for (i, out) in outs.iter().enumerate() {
                for (j, out) in out.chunks_exact(shape.head_dim).enumerate() {
                    let position = contexts[i] - rows[i] + j / 6;
                    let truth = naive_attention(&paged, i, args, position, j % 6);
                    for (&out, truth) in out.iter().zip(truth) {
                        assert!((f64::from(out) - truth).abs() < SUM_TOLERANCE, "{args:?} {i} {j}: {out} {truth}");
                    }
                }
            }
        }
    }
}

#[test]
fn logits_helpers_agree_with_a_sort() {
    let cpu = scalar();
    let mut random = Random(6);
    for len in [1, 2, 15, 16, 17, 100, 5000] {
        // Coarse values, so that there are ties.
        let mut row: Vec<f32> = (0..len).map(|_| (random.unit() * 50.0).round() / 4.0).collect();
        if len > 16 {
            row[3] = f32::NEG_INFINITY;
            row[5] = f32::NAN;
        }
        let mut sorted: Vec<TopEntry> = row
            .iter()
            .enumerate()
            .filter(|(_, x)| !x.is_nan())
            .map(|(index, &value)| TopEntry { index: index as u32, value })
            .collect();
        sorted.sort_by(|a, b| b.value.partial_cmp(&a.value).unwrap());
        assert_eq!(cpu.argmax(&row), Some(sorted[0].index as usize));
        for k in [0, 1, 2, 5, 40, len, 2 * len] {
            let mut top = Vec::new();
            cpu.top_k(&row, k, &mut top);
            assert_eq!(top, sorted[..k.min(sorted.len())], "{len} {k}");
        }
        row.iter_mut().filter(|x| x.is_nan()).for_each(|x| *x = 0.0);
        let truth = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        assert!((f64::from(cpu.log_sum_exp(&row)) - truth).abs() < 1e-5);
        let mut softmax = row.clone();
        cpu.softmax(&mut softmax);
        for (&p, &x) in softmax.iter().zip(&row) {
            assert!((f64::from(p) - (f64::from(x) - truth).exp()).abs() < 1e-6);
        }
    }
    assert_eq!(cpu.argmax(&[]), None);
    assert_eq!(cpu.argmax(&[f32::NAN, f32::NEG_INFINITY]), Some(1));
    assert_eq!(cpu.log_sum_exp(&[f32::NEG_INFINITY; 3]), f32::NEG_INFINITY);
    assert!(cpu.log_sum_exp(&[0.0, f32::NAN]).is_nan());
}

#[test]
fn codes_and_scales_come_back_exactly() {
    use bindery_kernels::{Matrix, PackedW4, PackedW8};
    use half::f16;
    for isa in [Isa::Scalar, Isa::Avx2, Isa::Avx512] {
        for (rows, cols) in [(1, 32), (7, 64), (8, 32), (17, 96), (33, 160)] {
            for with_mins in [false, true] {
                let code = |row: usize, col: usize| (row * 31 + col * 7 + col / 5) % 16;
                let scale = |row: usize, group: usize| f16::from_f32((row as f32 - 3.3) * 0.37 + group as f32);
                let min = |row: usize, group: usize| f16::from_f32(row as f32 * 0.11 - group as f32);
                let w4 = PackedW4::pack(isa, rows, cols, with_mins, |row, out| {
                    out.codes.iter_mut().enumerate().for_each(|(col, c)| *c = code(row, col) as u8);
                    out.scales.iter_mut().enumerate().for_each(|(group, s)| *s = scale(row, group));
                    out.mins.iter_mut().enumerate().for_each(|(group, m)| *m = min(row, group));
                });
                let w8 = PackedW8::pack(isa, rows, cols, with_mins, |row, out| {
                    out.codes.iter_mut().enumerate().for_each(|(col, c)| *c = (code(row, col) * 17) as u8 as i8);
                    out.scales.iter_mut().enumerate().for_each(|(group, s)| *s = scale(row, group));
                    out.mins.iter_mut().enumerate().for_each(|(group, m)| *m = min(row, group));
                });
                for row in 0..rows {
                    for col in 0..cols {
                        assert_eq!(usize::from(w4.code(row, col)), code(row, col));
                        assert_eq!(w8.code(row, col), (code(row, col) * 17) as u8 as i8);
                    }
                }
                let (w4, w8) = (rows_of(&Matrix::W4(w4)), rows_of(&Matrix::W8(w8)));
                for row in 0..rows {
                    for col in 0..cols {
                        let (s, m) = (scale(row, col / 32).to_f32(), min(row, col / 32).to_f32());
                        let m = if with_mins { m } else { 0.0 };
                        let centre = if with_mins { 0.0 } else { 8.0 };
                        assert_eq!(w4[row][col], s * (code(row, col) as f32 - centre) + m);
                        assert_eq!(w8[row][col], s * f32::from((code(row, col) * 17) as u8 as i8) + m);
                    }
                }
            }
        }
    }
}

#[test]
fn packed_matrices_are_as_small_as_their_files() {
    /// What padding and alignment may cost beside the bytes of the format.
    const MAX_OVERHEAD: f64 = 1.05;
    for isa in [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Vnni] {
        for (rows, cols) in [(576, 576), (192, 576), (576, 1536), (1536, 576), (49_152, 576)] {
            // Bytes of 32 weights in Q4_0, Q4_1 and Q8_0 files.
            for (family, block_bytes) in [(Family::W4, 18), (Family::W4WithMins, 20), (Family::W8, 34)] {
                let file_bytes = rows * cols / 32 * block_bytes;
                let ratio = family.matrix(isa, rows, cols, 0).size_bytes() as f64 / file_bytes as f64;
                assert!(ratio <= MAX_OVERHEAD, "{isa} {family:?} {rows} x {cols}: {ratio}");
            }
        }
    }
}

#[test]
fn a_group_with_nan_or_infinity_says_so_and_leaves_other_rows_alone() {
    let cpu = scalar();
    let w = Family::W4WithMins.matrix(cpu.isa(), 9, 64, 5);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = Random(8).vec(2 * 64);
        let good = product(&cpu, &x, 2, &w, None);
        x[64 + 40] = bad;
        let out = product(&cpu, &x, 2, &w, None);
        assert_eq!(out[..9], good[..9]);
        assert!(out[9..].iter().all(|x| x.is_nan()));
    }
}

#[test]
fn tiny_and_zero_groups_are_zero() {
    let cpu = scalar();
    let w = Family::W8.matrix(cpu.isa(), 4, 32, 5);
    for x in [0.0, -0.0, f32::MIN_POSITIVE, 1e-45] {
        assert_eq!(product(&cpu, &[x; 32], 1, &w, None), [0.0; 4]);
    }
}
