//! The scalar twin against plain mathematics in f64: the specification computes what its names say.
//!
//! Everything else is held against the scalar twin, in `properties.rs`. Miri runs these tests too: it interprets, some thousand times
//! slower, so shapes are smaller there, but no format's product and no cache's attention is left out.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

mod common;

use bindery_kernels::{
    Activation, Activations, AttentionArgs, AttentionSequence, CodeBits, CodeBook, Cpu, Form, GatedProduct, Isa,
    KvCache, KvDtype, KvShape, LayerNorm, Matrix, Norm, Product, Projection, QuantFormat, Quantized, RopeStyle,
    Scaling, SparseBlocks,
};
use common::{Family, Paged, Random, W4, W4_WITH_MINS, W8, gate_and_up, gated, product, rows_of};
use half::f16;

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
    let shapes = [(1, 1, 32_usize), (3, 17, 96), (5, 40, 320), (2, 9, 112), (2, 9, 5)];
    for family in Family::all() {
        for &(m, rows, cols) in if cfg!(miri) { &[(2, 2, 40)] } else { &shapes[..] } {
            let cols = cols.next_multiple_of(family.span());
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
    let w = W4.matrix(cpu.isa(), 11, 64, 3);
    let x = Random(2).vec(2 * 64);
    let fresh = product(&cpu, &x, 2, &w, None);
    let mut activations = Activations::default();
    cpu.prepare(&x, 2, 64, Form::Int8, &mut activations);
    let mut out = vec![0.5; 22];
    cpu.matmul_add(&activations, &w, None, &mut out);
    assert_eq!(out, fresh.iter().map(|x| 0.5 + x).collect::<Vec<_>>());
}

/// In one region, with any number of threads: the bits are those of each product alone.
#[test]
fn products_together_are_those_of_each_alone() {
    let mut random = Random(5);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        for threads in [1, 3] {
            let cpu = Cpu::new(isa, threads);
            let shapes = [(1, [700, 40, 3]), (7, [64, 513, 1]), (0, [5, 6, 7]), (150, [33, 300, 65])];
            for &(m, rows) in if cfg!(miri) { &[(2, [9, 3, 1])] } else { &shapes[..] } {
                let x = random.vec(m * 96);
                let weights = [
                    &W4.matrix(isa, rows[0], 96, 9),
                    &W8.matrix(isa, rows[1], 96, 10),
                    &W4_WITH_MINS.matrix(isa, rows[2], 96, 11),
                ];
                let bias = random.vec(rows[1]);
                let biases = [None, Some(&bias[..]), None];
                let mut outs = rows.map(|rows| vec![f32::NAN; m * rows]);
                let mut activations = Activations::default();
                cpu.prepare(&x, m, 96, Form::Int8, &mut activations);
                let [a, b, c] = &mut outs;
                let wanted = |at: usize, out| Product { weights: weights[at], bias: biases[at], out };
                cpu.matmul_all(&activations, [wanted(0, a), wanted(1, b), wanted(2, c)], None);
                for at in 0..3 {
                    let alone = product(&cpu, &x, m, weights[at], biases[at]);
                    assert_eq!(outs[at], alone, "{isa} {m} {rows:?}");
                }
            }
        }
    }
}

/// Sets with equal tiles may take different numbers of rows at a time: the product is right, or refused aloud.
#[test]
fn activations_of_another_instruction_set_give_the_product_or_a_panic() {
    let (m, rows) = if cfg!(miri) { (3, 9) } else { (12, 20) };
    let x = Random(8).vec(m * 64);
    let available = || Isa::ALL.into_iter().filter(|isa| isa.is_available());
    for theirs in available() {
        for ours in available() {
            let (cpu, mut activations) = (Cpu::new(ours, 1), Activations::default());
            Cpu::new(theirs, 1).prepare(&x, m, 64, Form::Int8, &mut activations);
            let w = W4.matrix(ours, rows, 64, 3);
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let mut out = vec![f32::NAN; m * rows];
                cpu.matmul(&activations, &w, None, &mut out);
                out
            }));
            match result {
                Ok(out) => assert_eq!(out, product(&cpu, &x, m, &w, None), "{theirs} to {ours}"),
                Err(_) => assert_ne!(theirs, ours),
            }
        }
    }
}

#[test]
fn norms_norm() {
    let cpu = scalar();
    let mut random = Random(3);
    for &k in if cfg!(miri) { &[1, 7, 16, 33][..] } else { &[1, 7, 16, 576, 1001] } {
        // Far from zero, so that a variance by the difference of two large numbers would show.
        let x: Vec<f32> = random.vec(3 * k).iter().map(|x| x + 100.0).collect();
        let (weight, bias) = (random.vec(k), random.vec(k));
        let mut out = Activations::default();
        let f64s = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let mean = |x: &[f64]| x.iter().sum::<f64>() / k as f64;
        cpu.norm(&x, 3, &Norm::Rms { weight: &weight, eps: 1e-5 }, Form::F32, &mut out);
        for (x, out) in x.chunks_exact(k).zip(out.rows().chunks_exact(k)) {
            let square = mean(&f64s(x).iter().map(|x| x * x).collect::<Vec<_>>());
            for i in 0..k {
                let truth = f64::from(x[i]) / (square + 1e-5).sqrt() * f64::from(weight[i]);
                assert!((f64::from(out[i]) - truth).abs() <= 1e-5, "{k}");
            }
        }
        let norm = LayerNorm { weight: &weight, bias: &bias, eps: 1e-5 };
        cpu.norm(&x, 3, &Norm::Layer(norm), Form::F32, &mut out);
        for (x, out) in x.chunks_exact(k).zip(out.rows().chunks_exact(k)) {
            let x = f64s(x);
            let centre = mean(&x);
            let variance = mean(&x.iter().map(|x| (x - centre).powi(2)).collect::<Vec<_>>());
            for i in 0..k {
                let truth = (x[i] - centre) / (variance + 1e-5).sqrt() * f64::from(weight[i]) + f64::from(bias[i]);
                // The mean of numbers near 100 is off by some 1e-5.
                assert!((f64::from(out[i]) - truth).abs() <= 1e-4, "{k}: {} {truth}", out[i]);
            }
        }
    }
}

#[test]
fn logits_are_scaled_and_capped() {
    let cpu = scalar();
    let logits: Vec<f32> = (-2000..2000).step_by(if cfg!(miri) { 37 } else { 1 }).map(|i| i as f32 * 0.1).collect();
    let (mut scaled, mut capped) = (logits.clone(), logits.clone());
    cpu.scale_and_cap(&mut scaled, 0.25, None);
    cpu.scale_and_cap(&mut capped, 0.25, Some(30.0));
    for ((x, scaled), capped) in logits.iter().zip(scaled).zip(capped) {
        assert_eq!(scaled, x * 0.25);
        let truth = 30.0 * (f64::from(*x) * 0.25 / 30.0).tanh();
        // 30 times the bound of tanh.
        assert!((f64::from(capped) - truth).abs() <= 30.0 * 2.0_f64.powi(-22), "{x}: {capped} {truth}");
    }
}

/// Enough of them for both threads, some twice and the last ones of a tile that is not full.
#[test]
fn rows_are_taken_by_number() {
    let cpu = Cpu::new(Isa::Scalar, 2);
    let (rows, cols) = (37, 64);
    for family in [W4, W8] {
        let matrix = family.matrix(Isa::Scalar, rows, cols, 5);
        let numbers: Vec<u32> = (0..if cfg!(miri) { 10 } else { 600 }).map(|i| [36, 0, 35, 17, 17][i % 5]).collect();
        let mut taken = vec![0.0; numbers.len() * cols];
        cpu.take_rows(&matrix, &numbers, 0.5, &mut taken);
        let mut expected = vec![0.0; cols];
        for (&number, row) in numbers.iter().zip(taken.chunks(cols)) {
            matrix.row(number as usize, &mut expected);
            assert!(row.iter().zip(&expected).all(|(row, expected)| *row == expected * 0.5), "row {number}");
        }
    }
}

#[test]
#[should_panic(expected = "row 37 of a matrix of 37 rows")]
fn rows_beyond_a_matrix_are_refused() {
    let matrix = W8.matrix(Isa::Scalar, 37, 64, 5);
    scalar().take_rows(&matrix, &[36, 37], 1.0, &mut [0.0; 128]);
}

#[test]
fn activations_shrink_and_grow_again() {
    let cpu = scalar();
    let w = W4_WITH_MINS.matrix(cpu.isa(), 5, 64, 9);
    let x = Random(13).vec(6 * 64);
    let mut reused = Activations::default();
    for (m, form) in [(6, Form::Both), (1, Form::F32), (3, Form::Int8), (2, Form::F32), (6, Form::Int8)] {
        cpu.prepare(&x[..m * 64], m, 64, form, &mut reused);
        assert_eq!((reused.num_rows(), reused.cols(), reused.form()), (m, 64, form));
        if form.has_f32() {
            assert_eq!(reused.rows(), &x[..m * 64]);
        }
    }
    let mut out = vec![0.0; 30];
    cpu.matmul(&reused, &w, None, &mut out);
    assert_eq!(out, product(&cpu, &x, 6, &w, None));
}

#[test]
#[should_panic(expected = "needs a multiple of 32 inputs, got 33")]
fn ragged_quantised_matrices_are_refused() {
    W4.matrix(Isa::Scalar, 1, 33, 0);
}

#[test]
#[should_panic(expected = "packed for another instruction set")]
fn matrices_of_another_instruction_set_are_refused() {
    product(&scalar(), &[0.0; 32], 1, &W4.matrix(Isa::Avx512, 1, 32, 0), None);
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
    let args = AttentionArgs { num_heads: 1, scale: 1.0, window: None, blocks: None, soft_cap: None, biases: None };
    let sequence = AttentionSequence { rows: 0..1, context_len: 9, block_table: &[0, 1] };
    scalar().attention(&[0.0; 2], &cache, 0, &[sequence], &args, &mut [0.0; 2]);
}

#[test]
fn a_large_component_costs_its_own_group_of_an_int8_cache_alone() {
    let cpu = scalar();
    // Groups of 32, 32 and 6; the large one stands in the second.
    let shape = KvShape { num_layers: 1, num_kv_heads: 1, head_dim: 70, block_size: 3, dtype: KvDtype::Int8 };
    assert_eq!(shape.block_bytes(), Some(2 * 3 * (70 + 3 * 2)));
    let mut cache = KvCache::new(shape, 1).unwrap();
    let mut v = Random(3).vec(70);
    v[40] = 1e7;
    cpu.write_kv(&mut cache, 0, &[0.5; 70], &v, &[0]);
    let args = AttentionArgs { num_heads: 1, scale: 1.0, window: None, blocks: None, soft_cap: None, biases: None };
    // One key has all the weight, so what comes out is its value as stored.
    let mut out = vec![f32::NAN; 70];
    let sequence = AttentionSequence { rows: 0..1, context_len: 1, block_table: &[0] };
    cpu.attention(&[1.0; 70], &cache, 0, &[sequence], &args, &mut out);
    for (v, out) in v.chunks(32).zip(out.chunks(32)) {
        let largest = v.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        for (v, out) in v.iter().zip(out) {
            // Half a step of 1/127; the step's own rounding to bf16 is at most 1/256 of it.
            assert!((v - out).abs() <= 0.5 / 127.0 * (1.0 + 1.0 / 128.0) * largest, "{v} {out}, largest {largest}");
        }
    }
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
fn gated_products_gate() {
    let gate: Vec<f32> = (-1000..1000).step_by(if cfg!(miri) { 37 } else { 1 }).map(|i| i as f32 * 0.05).collect();
    let up = Random(5).vec(gate.len());
    // One input each: the projections give the columns themselves.
    let cpu = scalar();
    let column = |values: &[f32]| Matrix::pack_f32(cpu.isa(), values.len(), 1, |row, out| out[0] = values[row]);
    let (gates, ups) = (column(&gate), column(&up));
    let out = gated(&cpu, &[1.0], 1, &gate_and_up(&gates, &ups, Activation::Silu));
    for i in 0..gate.len() {
        let g = f64::from(gate[i]);
        let truth = g / (1.0 + (-g).exp()) * f64::from(up[i]);
        assert!((f64::from(out[i]) - truth).abs() <= 1e-6 * (1.0 + truth.abs()), "{g}");
    }
    // Without a gate, and with a bias. (The functions themselves are tested beside them.)
    let bias = Random(6).vec(gate.len());
    let alone = Projection { weights: &gates, bias: Some(&bias) };
    let out = gated(&cpu, &[1.0], 1, &GatedProduct { gate: alone, up: None, activation: Activation::GeluTanh });
    for i in 0..gate.len() {
        let g = f64::from(gate[i] + bias[i]);
        let truth = 0.5 * g * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3))).tanh());
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
            // The pattern, as published: counted in blocks from the start.
            if let Some(SparseBlocks { block_size, num_local_blocks, vertical_stride, head_step }) = args.blocks {
                let (own, block) = (position / block_size, key / block_size);
                if own - block >= num_local_blocks && !(block + head * head_step + 1).is_multiple_of(vertical_stride) {
                    return f64::NEG_INFINITY;
                }
            }
            score + args.biases.map_or(0.0, |biases| f64::from(biases[head * biases.len() / args.num_heads + key]))
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
    let num_positions = if cfg!(miri) { 128_u16 } else { 1344 };
    let biases: Vec<f32> =
        slopes.iter().flat_map(|slope| (0..num_positions).map(move |key| slope * f32::from(key) - 50.0)).collect();
    let plain = AttentionArgs { num_heads: 6, scale: 0.4, window: None, blocks: None, soft_cap: None, biases: None };
    let blocks =
        |block_size, num_local_blocks| SparseBlocks { block_size, num_local_blocks, vertical_stride: 4, head_step: 1 };
    let all_at_once = AttentionArgs {
        window: Some(37),
        soft_cap: Some(2.0),
        biases: Some(&biases),
        blocks: Some(blocks(9, 2)),
        ..plain
    };
    let cases = [
        all_at_once,
        plain,
        AttentionArgs { window: Some(37), ..plain },
        AttentionArgs { window: Some(700), ..plain },
        AttentionArgs { soft_cap: Some(2.0), ..plain },
        AttentionArgs { biases: Some(&biases), ..plain },
        AttentionArgs { blocks: Some(blocks(64, 3)), ..plain },
        AttentionArgs { blocks: Some(blocks(9, 2)), window: Some(700), ..plain },
    ];
    for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8] {
        let (head_dim, contexts, rows): (_, &[_], &[_]) = match dtype {
            // A second tile once, since it is the same for all types.
            KvDtype::F32 if cfg!(miri) => (3, &[3, 66], &[3, 1]),
            _ if cfg!(miri) => (3, &[3, 12], &[3, 1]),
            _ => (10, &[1, 64, 65, 700, 1300], &[1, 64, 2, 5, 3]),
        };
        let shape = KvShape { num_layers: 3, num_kv_heads: 2, head_dim, block_size: 5, dtype };
        let paged = Paged::new(&cpu, shape, 1, 6, contexts, 11);
        for args in if cfg!(miri) { &cases[..1] } else { &cases } {
            let outs = paged.attend(&cpu, rows, args);
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
fn softmax_is_the_share_of_exponentials() {
    let cpu = scalar();
    let mut random = Random(6);
    for len in [1, 2, 15, 16, 17, 100, if cfg!(miri) { 200 } else { 5000 }] {
        let mut row: Vec<f32> = (0..len).map(|_| random.unit() * 12.0).collect();
        if len > 16 {
            row[3] = f32::NEG_INFINITY;
        }
        let largest = row.iter().copied().reduce(f32::max).unwrap();
        assert_eq!(cpu.max(&row), largest);
        let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        let mut softmax = row.clone();
        cpu.softmax(&mut softmax);
        for (&p, &x) in softmax.iter().zip(&row) {
            assert!((f64::from(p) - f64::from(x).exp() / sum).abs() < 1e-6);
        }
    }
    assert_eq!(cpu.max(&[f32::NAN, 1.0]), 1.0);
    assert_eq!(cpu.max(&[]), f32::NEG_INFINITY);
}

#[test]
fn codes_and_scales_come_back_exactly() {
    let shapes = [(1, 1), (7, 2), (8, 1), (17, 3), (33, 5)];
    let sets = [Isa::Scalar, Isa::Avx2, Isa::Avx512];
    for &isa in if cfg!(miri) { &sets[..1] } else { &sets } {
        for format in QuantFormat::all().into_iter().step_by(if cfg!(miri) { 5 } else { 1 }) {
            for &(rows, spans) in if cfg!(miri) { &shapes[..1] } else { &shapes } {
                // Some ends within a group, and within a span.
                let in_spans = matches!(format.scaling, Scaling::Spans(_));
                let cols = spans * if in_spans { 72 } else { format.scale_span() };
                check_round_trip(isa, format, rows, cols);
            }
        }
    }
}

fn check_round_trip(isa: Isa, format: QuantFormat, rows: usize, cols: usize) {
    let (first, num_codes) = (i32::from(*format.codes().start()), 1 << format.bits.count());
    let code = |row: usize, col: usize| first + ((row * 31 + col * 7 + col / 5) % num_codes) as i32;
    let scale = |row: usize, index: usize| f16::from_f32((row as f32 - 3.3) * 0.37 + index as f32);
    let min = |row: usize, index: usize| f16::from_f32(row as f32 * 0.11 - index as f32);
    // In 0..=15, so that every format can hold them; others below 128 or negative where there is room.
    let spread = if format.scaling == Scaling::Nibbles { 0 } else { -100 };
    let sub_scale = |row: usize, group: usize| ((row * 5 + group * 3) % 16) as i32 + spread * (group % 2) as i32;
    let sub_min = |row: usize, group: usize| ((row * 3 + group * 5) % 16) as i32 - spread * (group % 2) as i32;
    let packed = Quantized::pack(isa, rows, cols, format, |row, out| {
        out.codes.iter_mut().enumerate().for_each(|(col, c)| *c = code(row, col) as i8);
        out.scales.iter_mut().enumerate().for_each(|(index, s)| *s = scale(row, index));
        out.mins.iter_mut().enumerate().for_each(|(index, m)| *m = min(row, index));
        out.sub_scales.iter_mut().enumerate().for_each(|(group, s)| *s = sub_scale(row, group) as i8);
        out.sub_mins.iter_mut().enumerate().for_each(|(group, m)| *m = sub_min(row, group) as i8);
    });
    for row in 0..rows {
        for col in 0..cols {
            assert_eq!(i32::from(packed.code(row, col)), code(row, col), "{format:?}");
        }
    }
    let group_len = format.group().unwrap();
    for (row, values) in rows_of(&Matrix::Quantized(packed)).iter().enumerate() {
        for (col, &value) in values.iter().enumerate() {
            let times = |sub: i32| match format.scaling {
                Scaling::Single | Scaling::Wide | Scaling::Spans(_) => 1.0,
                Scaling::TwoLevel | Scaling::Nibbles => sub as f32,
                Scaling::Eighths => sub as f32 / 8.0,
                Scaling::Exponents => 2_f64.powi(i32::from(sub as u8) - 128) as f32,
            };
            let upper = |index| if format.scaling == Scaling::Exponents { 1.0 } else { scale(row, index).to_f32() };
            let (index, group) = (col / format.scale_span(), col / group_len);
            let scale = upper(index) * times(sub_scale(row, group));
            let min = match (format.with_mins, format.scaling) {
                (false, _) => 0.0,
                (true, Scaling::Spans(_)) => -(scale * sub_min(row, index) as f32),
                (true, _) => min(row, index).to_f32() * times(sub_min(row, group)),
            };
            let expected = f32::from(format.book.value(code(row, col) as i8));
            assert_eq!(value, scale * expected + min, "{format:?}");
        }
    }
}

/// The lists as other readers of the formats have them: ggml's `kvalues_iq4nl`; OCP's MX specification 1.0, table of FP4,
/// doubled; the bytes of ggml's grids, and of its signs.
#[test]
fn code_books_hold_what_their_formats_say() {
    let values = |book: CodeBook, count: i8| (0..count).map(|code| i32::from(book.value(code))).collect::<Vec<_>>();
    let iq4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
    assert_eq!(values(CodeBook::Iq4, 16), iq4);
    // Sign, two bits of exponent (bias 1), one of mantissa.
    for code in 0..16 {
        let (sign, exponent, mantissa) = (code >> 3, code >> 1 & 3, code & 1);
        let magnitude = if exponent == 0 { mantissa } else { (2 + mantissa) << (exponent - 1) };
        assert_eq!(values(CodeBook::Fp4, 16)[code as usize], if sign == 1 { -magnitude } else { magnitude });
    }
    for (book, magnitudes) in [
        (CodeBook::Iq3Xxs, &[4, 12, 20, 28, 36, 44, 52, 62][..]),
        (CodeBook::Iq3S, &[1, 3, 5, 7, 9, 11, 13, 15]),
        (CodeBook::Iq2, &[8, 25, 43, 0]),
    ] {
        let signed = |sign: i32| magnitudes.iter().map(move |magnitude| sign * magnitude);
        let expected: Vec<i32> = signed(1).chain(signed(-1)).collect();
        assert_eq!(values(book, expected.len() as i8), expected);
    }
    for (code, value) in values(CodeBook::Iq1, 8).into_iter().enumerate() {
        if code % 4 != 3 {
            assert_eq!(value, 8 * (code as i32 % 4 - 1) + if code < 4 { 1 } else { -1 });
        }
    }
}

/// An order moves inputs and nothing else.
#[test]
fn columns_in_an_order_of_their_own_meet_inputs_in_the_same_order() {
    let mut random = Random(11);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let cpu = Cpu::new(isa, 3);
        let shapes = [(1, 33, 112), (7, 9, 160), (40, 300, 1000)];
        for &(m, rows, cols) in if cfg!(miri) { &[(2, 9, 72)] } else { &shapes[..] } {
            let format = QuantFormat {
                bits: CodeBits::Four,
                scaling: Scaling::Spans(64),
                with_mins: true,
                book: CodeBook::Linear,
            };
            let x = random.vec(m * cols);
            let Matrix::Quantized(packed) = Family::Quantized(format).matrix(isa, rows, cols, 3) else {
                unreachable!("a quantised family")
            };
            let order = common::order(cols, 7);
            let as_packed = rows_of(&Family::Quantized(format).matrix(isa, rows, cols, 3));
            let ordered = Matrix::Quantized(packed.with_order(order.clone()));
            for (ordered, as_packed) in rows_of(&ordered).iter().zip(&as_packed) {
                for (&input, value) in order.places().iter().zip(as_packed) {
                    assert_eq!(ordered[input as usize], *value);
                }
            }
            let mut moved = Vec::new();
            for x in x.chunks_exact(cols) {
                moved.extend(order.places().iter().map(|&input| x[input as usize]));
            }
            let unordered = Family::Quantized(format).matrix(isa, rows, cols, 3);
            assert_eq!(product(&cpu, &x, m, &ordered, None), product(&cpu, &moved, m, &unordered, None), "{isa}");
        }
    }
}

/// What fills the last group has no part in the sum.
#[test]
fn rows_that_end_within_a_group_are_as_if_zeros_followed() {
    let mut random = Random(12);
    let format =
        QuantFormat { bits: CodeBits::Four, scaling: Scaling::Spans(64), with_mins: true, book: CodeBook::Linear };
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let cpu = Cpu::new(isa, 3);
        let rows = if cfg!(miri) { 9 } else { 33 };
        let matrix = |cols| {
            Matrix::Quantized(Quantized::pack(isa, rows, cols, format, |row, out| {
                out.codes.iter_mut().enumerate().for_each(|(col, code)| *code = ((row * 5 + col * 3) % 16) as i8);
                out.scales.iter_mut().enumerate().for_each(|(at, scale)| *scale = f16::from_f32(0.5 + at as f32));
                out.sub_mins.fill(7);
            }))
        };
        for &m in if cfg!(miri) { &[2][..] } else { &[1, 7, 40] } {
            let x = random.vec(m * 112);
            let filled: Vec<f32> = x.chunks_exact(112).flat_map(|x| x.iter().copied().chain([0.0; 16])).collect();
            let ours = product(&cpu, &x, m, &matrix(112), None);
            assert_eq!(ours, product(&cpu, &filled, m, &matrix(128), None), "{isa} {m}");
        }
    }
}

#[test]
fn packed_matrices_are_as_small_as_their_files() {
    /// What padding and alignment may cost beside the bytes of the format.
    const MAX_OVERHEAD: f64 = 1.05;
    let two_level =
        |bits, with_mins| QuantFormat { bits, scaling: Scaling::TwoLevel, with_mins, book: CodeBook::Linear };
    let single = |bits, with_mins| QuantFormat { bits, scaling: Scaling::Single, with_mins, book: CodeBook::Linear };
    let from_book = |book, scaling| QuantFormat { bits: CodeBits::Four, scaling, with_mins: false, book };
    let spans = |bits, span, with_mins| QuantFormat { scaling: Scaling::Spans(span), ..single(bits, with_mins) };
    // Bytes of 256 weights in ggml's files.
    let formats = [
        ("Q4_0", single(CodeBits::Four, false), 8 * 18),
        ("Q4_1", single(CodeBits::Four, true), 8 * 20),
        ("Q5_0", single(CodeBits::Five, false), 8 * 22),
        ("Q5_1", single(CodeBits::Five, true), 8 * 24),
        ("Q8_0", single(CodeBits::Eight, false), 8 * 34),
        (
            "Q2_K",
            QuantFormat { bits: CodeBits::Two, scaling: Scaling::Nibbles, with_mins: true, book: CodeBook::Linear },
            84,
        ),
        ("Q3_K", two_level(CodeBits::Three, false), 110),
        ("Q4_K", two_level(CodeBits::Four, true), 144),
        ("Q5_K", two_level(CodeBits::Five, true), 176),
        ("Q6_K", two_level(CodeBits::Six, false), 210),
        ("IQ4_NL", from_book(CodeBook::Iq4, Scaling::Single), 8 * 18),
        ("IQ4_XS", from_book(CodeBook::Iq4, Scaling::TwoLevel), 136),
        ("MXFP4", from_book(CodeBook::Fp4, Scaling::Exponents), 8 * 17),
        ("TQ2_0", QuantFormat { bits: CodeBits::Two, scaling: Scaling::Wide, ..single(CodeBits::Two, false) }, 66),
        // Codes, an f16 for each span and where there are zero points those, in as many bits as a code.
        ("GPTQ int4, groups of 128", spans(CodeBits::Four, 128, false), 128 + 2 * 2 + 1),
        ("GPTQ int4, groups of 64, asymmetric", spans(CodeBits::Four, 64, true), 128 + 4 * 2 + 2),
        ("AWQ int4, groups of 32", spans(CodeBits::Four, 32, true), 128 + 8 * 2 + 4),
        ("int8 by rows", spans(CodeBits::Eight, 1 << 16, false), 256),
        ("GPTQ int3, groups of 128", spans(CodeBits::Three, 128, true), 96 + 2 * 2 + 1),
        ("GPTQ int2, groups of 64", spans(CodeBits::Two, 64, true), 64 + 4 * 2 + 1),
    ];
    // A size depends on the shape alone; what Miri could pack in time, padding would be most of.
    if cfg!(miri) {
        return;
    }
    for isa in Isa::ALL {
        for (rows, cols) in [(640, 640_usize), (576, 1536), (1536, 576), (256, 2048), (16_384, 256)] {
            for (name, format, block_bytes) in formats {
                if !cols.is_multiple_of(format.cols_multiple()) {
                    continue;
                }
                let file_bytes = (rows * cols / 32 * block_bytes) as f64 / 8.0;
                let ratio = Family::Quantized(format).matrix(isa, rows, cols, 0).size_bytes() as f64 / file_bytes;
                assert!(ratio <= MAX_OVERHEAD, "{isa} {name} {rows} x {cols}: {ratio}");
            }
        }
    }
}

#[test]
fn a_group_with_nan_or_infinity_says_so_and_leaves_other_rows_alone() {
    let cpu = scalar();
    let w = W4_WITH_MINS.matrix(cpu.isa(), 9, 64, 5);
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
    let w = W8.matrix(cpu.isa(), 4, 32, 5);
    for x in [0.0, -0.0, f32::MIN_POSITIVE, 1e-45] {
        assert_eq!(product(&cpu, &[x; 32], 1, &w, None), [0.0; 4]);
    }
}
