//! Each kernel alone, in GB/s or GOP/s (criterion's "elem/s": a multiply-add is two operations).
//!
//! `BINDERY_ISA` picks the instruction set, `BINDERY_BENCH_THREADS` the threads (2). Shapes are SmolLM2-135M's, but for what no
//! cache holds (4 GB of memory; a filter of `beyond` runs it alone). Products of one row are counted in bytes of weights, since
//! memory is their roof; larger ones in operations.

use std::hint::black_box;

use bindery_kernels::{
    Activation, Activations, AttentionArgs, AttentionSequence, CodeBits, CodeBook, Cpu, ExpertWeights, Form,
    GatedProduct, Isa, KvCache, KvDtype, KvShape, LayerNorm, LowRank, LowRankPair, LowRankSegment, Matrix, Mixture,
    Norm, Product, Projection, QuantFormat, Quantized, RopeStyle, RoutingArgs, Scaling, Shares,
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};

fn cpu() -> Cpu {
    let threads = std::env::var("BINDERY_BENCH_THREADS").ok().and_then(|threads| threads.parse().ok()).unwrap_or(2);
    match Isa::from_env() {
        Ok(isa) => Cpu::new(isa, threads),
        Err(error) => panic!("{error}"),
    }
}

/// Numbers in [-1, 1) without a pattern that a kernel could profit from.
fn noise(index: usize) -> f32 {
    (index.wrapping_mul(2_654_435_761) >> 7 & 0xffff) as f32 / 32768.0 - 1.0
}

fn matrix(cpu: &Cpu, family: &str, rows: usize, cols: usize) -> Matrix {
    let isa = cpu.isa();
    if let Some(format) = quant_format(family) {
        let (first, num_codes) = (i32::from(*format.codes().start()), 1 << format.bits.count());
        return Matrix::Quantized(Quantized::pack(isa, rows, cols, format, |row, out| {
            out.codes.iter_mut().enumerate().for_each(|(i, code)| {
                *code = (first + ((row * cols + i).wrapping_mul(40503) >> 3) as i32 % num_codes) as i8;
            });
            out.scales.fill(f16::from_f32(0.01));
            out.mins.fill(f16::from_f32(-0.08));
            out.sub_scales.fill(3);
            out.sub_mins.fill(5);
        }));
    }
    match family {
        "f32" => Matrix::pack_f32(isa, rows, cols, |row, out| {
            out.iter_mut().enumerate().for_each(|(i, x)| *x = noise(row * cols + i));
        }),
        "f16" => Matrix::pack_f16(isa, rows, cols, |row, out| {
            out.iter_mut().enumerate().for_each(|(i, x)| *x = f16::from_f32(noise(row * cols + i)));
        }),
        _ => Matrix::pack_bf16(isa, rows, cols, |row, out| {
            out.iter_mut().enumerate().for_each(|(i, x)| *x = bf16::from_f32(noise(row * cols + i)));
        }),
    }
}

/// Quantised families are named by the GGUF type that is imported so, or by bits and groups.
const FAMILIES: [&str; 24] = [
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
    "iq3_xxs",
    "iq2_s",
    "tq2_0",
    "mxfp4",
    "int4_128",
    "int4_128_zeros",
    "int8_row",
    "int3_128",
    "int2_128",
    "f16",
    "bf16",
    "f32",
];

fn quant_format(family: &str) -> Option<QuantFormat> {
    let from_book = |book, bits, scaling| Some(QuantFormat { bits, scaling, with_mins: false, book });
    let (bits, scaling, with_mins) = match family {
        "q4_0" => (CodeBits::Four, Scaling::Single, false),
        "q4_1" => (CodeBits::Four, Scaling::Single, true),
        "q5_0" => (CodeBits::Five, Scaling::Single, false),
        "q5_1" => (CodeBits::Five, Scaling::Single, true),
        "q8_0" => (CodeBits::Eight, Scaling::Single, false),
        "q2_k" => (CodeBits::Two, Scaling::Nibbles, true),
        "q3_k" => (CodeBits::Three, Scaling::TwoLevel, false),
        "q4_k" => (CodeBits::Four, Scaling::TwoLevel, true),
        "q5_k" => (CodeBits::Five, Scaling::TwoLevel, true),
        "q6_k" => (CodeBits::Six, Scaling::TwoLevel, false),
        "tq2_0" => (CodeBits::Two, Scaling::Wide, false),
        "iq4_nl" => return from_book(CodeBook::Iq4, CodeBits::Four, Scaling::Single),
        "iq4_xs" => return from_book(CodeBook::Iq4, CodeBits::Four, Scaling::TwoLevel),
        "iq3_xxs" => return from_book(CodeBook::Iq3Xxs, CodeBits::Four, Scaling::Eighths),
        "iq2_s" => return from_book(CodeBook::Iq2, CodeBits::Three, Scaling::Eighths),
        "mxfp4" => return from_book(CodeBook::Fp4, CodeBits::Four, Scaling::Exponents),
        "int4_128" => (CodeBits::Four, Scaling::Spans(128), false),
        "int4_128_zeros" => (CodeBits::Four, Scaling::Spans(128), true),
        "int8_row" => (CodeBits::Eight, Scaling::Spans(1 << 16), false),
        "int3_128" => (CodeBits::Three, Scaling::Spans(128), true),
        "int2_128" => (CodeBits::Two, Scaling::Spans(128), true),
        _ => return None,
    };
    Some(QuantFormat { bits, scaling, with_mins, book: CodeBook::Linear })
}

fn products(c: &mut Criterion) {
    let cpu = cpu();
    for family in FAMILIES {
        let mut group = c.benchmark_group(format!("{}/{family}", cpu.isa()));
        // Some types come in 256 inputs.
        let span = quant_format(family).map_or(1, QuantFormat::scale_span);
        let hidden = if span == 256 { 512 } else { 576 };
        for (rows, cols) in [(1536, hidden), (576, 1536), (49_152, hidden)] {
            let w = matrix(&cpu, family, rows, cols);
            for m in [1, 4, 8, 32, 512] {
                if m == 512 && rows == 49_152 {
                    continue;
                }
                let x: Vec<f32> = (0..m * cols).map(noise).collect();
                let mut activations = Activations::default();
                cpu.prepare(&x, m, cols, Form::of([&w]), &mut activations);
                let mut out = vec![0.0; m * rows];
                group.throughput(if m == 1 {
                    Throughput::Bytes(w.size_bytes() as u64)
                } else {
                    Throughput::Elements(2 * (m * rows * cols) as u64)
                });
                group.bench_function(BenchmarkId::new(format!("{rows}x{cols}"), m), |b| {
                    b.iter(|| cpu.matmul(&activations, &w, None, black_box(&mut out)));
                });
            }
        }
        group.finish();
    }
}

fn rows(c: &mut Criterion) {
    let cpu = cpu();
    let mut group = c.benchmark_group(format!("{}/rows", cpu.isa()));
    for m in [1, 512] {
        let (x, weight) = ((0..m * 576).map(noise).collect::<Vec<_>>(), vec![1.0; 576]);
        let norm = Norm::Rms { weight: &weight, eps: 1e-5 };
        let mut activations = Activations::default();
        group.throughput(Throughput::Bytes(4 * (m * 576) as u64));
        group.bench_function(BenchmarkId::new("rms_norm+quantize", m), |b| {
            b.iter(|| cpu.norm(&x, m, &norm, Form::Int8, black_box(&mut activations)));
        });
        let layer_norm = Norm::Layer(LayerNorm { weight: &weight, bias: &weight, eps: 1e-5 });
        group.bench_function(BenchmarkId::new("layer_norm+quantize", m), |b| {
            b.iter(|| cpu.norm(&x, m, &layer_norm, Form::Int8, black_box(&mut activations)));
        });
        let (mut heads, angles) = (x.clone(), vec![0.6; m * 32]);
        group.bench_function(BenchmarkId::new("rope", m), |b| {
            b.iter(|| cpu.rope(black_box(&mut heads), m, 9, 64, 64, RopeStyle::Neox, &angles, &angles));
        });
        let (gate, up) = (matrix(&cpu, "q4_1", 1536, 576), matrix(&cpu, "q4_1", 1536, 576));
        let mut gated = Activations::default();
        for (name, activation) in
            [("silu", Activation::Silu), ("gelu", Activation::Gelu), ("gelu_tanh", Activation::GeluTanh)]
        {
            let [gate, up] = [&gate, &up].map(|weights| Projection { weights, bias: None });
            let product = GatedProduct { gate, up: Some(up), activation };
            group.throughput(Throughput::Elements(2 * 2 * (m * 1536 * 576) as u64));
            group.bench_function(BenchmarkId::new(format!("gate+up+{name}+quantize"), m), |b| {
                b.iter(|| cpu.gated_matmul(&activations, &product, None, Form::Int8, black_box(&mut gated)));
            });
        }
    }
    let mut logits: Vec<f32> = (0..49_152).map(noise).collect();
    group.throughput(Throughput::Bytes(4 * 49_152));
    group.bench_function("cap", |b| b.iter(|| cpu.scale_and_cap(black_box(&mut logits), 1.0, Some(30.0))));
    group.finish();
    let mut group = c.benchmark_group(format!("{}/embedding", cpu.isa()));
    for family in ["q8_0", "f16"] {
        let table = matrix(&cpu, family, 49_152, 576);
        let tokens: Vec<u32> = (0..512_u32).map(|token| token.wrapping_mul(2_654_435_761) % 49_152).collect();
        let mut out = vec![0.0; 512 * 576];
        group.throughput(Throughput::Bytes(4 * 512 * 576));
        group.bench_function(BenchmarkId::new(family, 512), |b| {
            b.iter(|| cpu.take_rows(&table, &tokens, 1.0, black_box(&mut out)));
        });
    }
    group.finish();
}

/// Eight experts of which a row has two; the router's product is not in it.
fn experts(c: &mut Criterion) {
    const NUM_EXPERTS: usize = 8;
    const NUM_CHOSEN: usize = 2;
    let cpu = cpu();
    let mut group = c.benchmark_group(format!("{}/experts", cpu.isa()));
    let experts: Vec<[Matrix; 3]> = (0..NUM_EXPERTS)
        .map(|_| [(1536, 576), (1536, 576), (576, 1536)].map(|(rows, cols)| matrix(&cpu, "q4_1", rows, cols)))
        .collect();
    let expert = |index: usize| {
        let [gate, up, down] = experts[index].each_ref().map(|weights| Projection { weights, bias: None });
        let product = GatedProduct { gate, up: Some(up), activation: Activation::Silu };
        ExpertWeights { product, down }
    };
    let args = RoutingArgs { num_experts: NUM_EXPERTS, num_chosen: NUM_CHOSEN, shares: Shares::OfChosen };
    for m in [1, 32, 512] {
        let x: Vec<f32> = (0..m * 576).map(noise).collect();
        let logits: Vec<f32> = (0..m * NUM_EXPERTS).map(noise).collect();
        let (mut activations, mut mixture, mut out) = (Activations::default(), Mixture::default(), vec![0.0; m * 576]);
        cpu.prepare(&x, m, 576, Form::Int8, &mut activations);
        group.throughput(Throughput::Elements(2 * (3 * m * NUM_CHOSEN * 1536 * 576) as u64));
        group.bench_function(BenchmarkId::new("route+experts q4_1", m), |b| {
            b.iter(|| {
                cpu.route(&mut logits.clone(), &args, &mut mixture);
                cpu.experts(&activations, &mut mixture, expert, black_box(&mut out));
            });
        });
    }
    group.finish();
}

/// A product with and without adapters of rank 16 beside it; operations are those of both.
fn low_rank(c: &mut Criterion) {
    const RANK: usize = 16;
    let cpu = cpu();
    let mut group = c.benchmark_group(format!("{}/low_rank", cpu.isa()));
    let base = matrix(&cpu, "q4_1", 1536, 576);
    let pairs: Vec<[Matrix; 2]> =
        (0..8).map(|_| [matrix(&cpu, "q8_0", RANK, 576), matrix(&cpu, "f16", 1536, RANK)]).collect();
    for (num_adapters, m) in [(0, 1), (1, 1), (0, 32), (1, 32), (8, 32), (0, 512), (1, 512), (8, 512)] {
        let x: Vec<f32> = (0..m * 576).map(noise).collect();
        let (mut activations, mut between, mut out) = (Activations::default(), LowRank::default(), vec![0.0; m * 1536]);
        cpu.prepare(&x, m, 576, Form::Int8, &mut activations);
        let segments: Vec<LowRankSegment<'_, 1>> = (0..num_adapters)
            .map(|at| {
                let [down, up] = &pairs[at];
                let rows = at * m / num_adapters..(at + 1) * m / num_adapters;
                LowRankSegment { rows, pairs: [Some(LowRankPair { down, up })] }
            })
            .collect();
        let of_adapters = if num_adapters > 0 { RANK * (1536 + 576) } else { 0 };
        group.throughput(Throughput::Elements(2 * (m * (1536 * 576 + of_adapters)) as u64));
        group.bench_function(BenchmarkId::new(format!("product+{num_adapters} adapters"), m), |b| {
            b.iter(|| {
                let addends =
                    (num_adapters > 0).then(|| cpu.low_rank(&activations, &segments, black_box(&mut between)));
                cpu.matmul_all(&activations, [Product { weights: &base, bias: None, out: &mut out }], addends);
            });
        });
    }
    group.finish();
}

fn attention(c: &mut Criterion) {
    let cpu = cpu();
    for dtype in [KvDtype::F16, KvDtype::Bf16, KvDtype::F32, KvDtype::Int8] {
        let mut group = c.benchmark_group(format!("{}/attention {dtype:?}", cpu.isa()));
        for (context, m) in [(128, 1), (1024, 1), (8192, 1), (512, 512)] {
            let shape = KvShape { num_layers: 1, num_kv_heads: 3, head_dim: 64, block_size: 16, dtype };
            let mut cache = match KvCache::new(shape, context / 16) {
                Ok(cache) => cache,
                Err(error) => panic!("{error}"),
            };
            let k: Vec<f32> = (0..context * 192).map(noise).collect();
            let slots: Vec<u32> = (0..context as u32).collect();
            cpu.write_kv(&mut cache, 0, &k, &k, &slots);
            let table: Vec<u32> = (0..(context / 16) as u32).collect();
            let q: Vec<f32> = (0..m * 576).map(noise).collect();
            let mut out = vec![0.0; m * 576];
            let args =
                AttentionArgs { num_heads: 9, scale: 0.125, window: None, blocks: None, soft_cap: None, biases: None };
            let visits = if m == 1 { context } else { context * (context + 1) / 2 };
            group.throughput(Throughput::Elements((visits * 9 * 64 * 4) as u64));
            group.bench_function(BenchmarkId::new(format!("context {context}"), m), |b| {
                let sequence = AttentionSequence { rows: 0..m, context_len: context, block_table: &table };
                b.iter(|| cpu.attention(&q, &cache, 0, std::slice::from_ref(&sequence), &args, black_box(&mut out)));
            });
            group.throughput(Throughput::Bytes((2 * m * 192 * dtype.size_bytes()) as u64));
            group.bench_function(BenchmarkId::new(format!("write {m} of {context}"), m), |b| {
                let first = context - m;
                b.iter(|| cpu.write_kv(&mut cache, 0, &k[first * 192..], &k[first * 192..], &slots[first..]));
            });
        }
        group.finish();
    }
}

/// A prompt of 512 rows by LLaMA's layers of 1B to 8B, whose activations no second-level cache holds: down projections, and gates
/// with their up projections. A filter of `wide` runs it alone.
fn wide_layers(c: &mut Criterion) {
    const M: usize = 512;
    let cpu = cpu();
    let mut group = c.benchmark_group(format!("{}/wide", cpu.isa()));
    group.sample_size(10);
    for family in ["q4_0", "q4_1", "q8_0", "f16", "f32"] {
        for (hidden, inner) in [(2048, 8192), (3072, 8192), (4096, 14_336)] {
            let prepared = |w: &Matrix, cols: usize| {
                let x: Vec<f32> = (0..M * cols).map(noise).collect();
                let mut activations = Activations::default();
                cpu.prepare(&x, M, cols, Form::of([w]), &mut activations);
                activations
            };
            let down = matrix(&cpu, family, hidden, inner);
            let x = prepared(&down, inner);
            let mut out = vec![0.0; M * hidden];
            group.throughput(Throughput::Elements(2 * (M * hidden * inner) as u64));
            group.bench_function(BenchmarkId::new(format!("{hidden}x{inner} {family}"), M), |b| {
                b.iter(|| cpu.matmul(&x, &down, None, black_box(&mut out)));
            });
            let [gate, up] = [0, 1].map(|_| matrix(&cpu, family, inner, hidden));
            let projection = |weights| Projection { weights, bias: None };
            let product =
                GatedProduct { gate: projection(&gate), up: Some(projection(&up)), activation: Activation::Silu };
            let (x, mut gated) = (prepared(&gate, hidden), Activations::default());
            group.throughput(Throughput::Elements(4 * (M * hidden * inner) as u64));
            group.bench_function(BenchmarkId::new(format!("gated {inner}x{hidden} {family}"), M), |b| {
                b.iter(|| cpu.gated_matmul(&x, &product, None, Form::of([&down]), black_box(&mut gated)));
            });
        }
    }
    group.finish();
}

/// What no cache holds: 1 to 4 GB of weights of 8B's width, and 8B's KV cache. Both in bytes read.
fn beyond_caches(c: &mut Criterion) {
    const COLS: usize = 4096;
    const ROWS: usize = 32 * 14_336;
    let cpu = cpu();
    let mut group = c.benchmark_group(format!("{}/beyond caches", cpu.isa()));
    group.sample_size(10);
    for family in ["int4_128", "q8_0", "f16"] {
        let w = matrix(&cpu, family, ROWS, COLS);
        group.throughput(Throughput::Bytes(w.size_bytes() as u64));
        for m in [1, 8] {
            let x: Vec<f32> = (0..m * COLS).map(noise).collect();
            let mut activations = Activations::default();
            cpu.prepare(&x, m, COLS, Form::of([&w]), &mut activations);
            let mut out = vec![0.0; m * ROWS];
            group.bench_function(BenchmarkId::new(format!("{ROWS}x{COLS} {family}"), m), |b| {
                b.iter(|| cpu.matmul(&activations, &w, None, black_box(&mut out)));
            });
        }
    }
    const LAYERS: usize = 32;
    const TOKENS: usize = 8192;
    for dtype in [KvDtype::F16, KvDtype::Int8] {
        let shape = KvShape { num_layers: LAYERS, num_kv_heads: 8, head_dim: 128, block_size: 16, dtype };
        let mut cache = match KvCache::new(shape, TOKENS / 16) {
            Ok(cache) => cache,
            Err(error) => panic!("{error}"),
        };
        let k: Vec<f32> = (0..TOKENS * 1024).map(noise).collect();
        let slots: Vec<u32> = (0..TOKENS as u32).collect();
        (0..LAYERS).for_each(|layer| cpu.write_kv(&mut cache, layer, &k, &k, &slots));
        let table: Vec<u32> = (0..(TOKENS / 16) as u32).collect();
        group.throughput(Throughput::Bytes((LAYERS * 2 * 8 * TOKENS * dtype.head_bytes(128)) as u64));
        for streams in [1, 8] {
            let context = TOKENS / streams;
            let sequences: Vec<_> = table
                .chunks(context / 16)
                .enumerate()
                .map(|(at, block_table)| AttentionSequence { rows: at..at + 1, context_len: context, block_table })
                .collect();
            let q: Vec<f32> = (0..streams * 32 * 128).map(noise).collect();
            let mut out = vec![0.0; streams * 32 * 128];
            let args =
                AttentionArgs { num_heads: 32, scale: 0.09, window: None, blocks: None, soft_cap: None, biases: None };
            group.bench_function(BenchmarkId::new(format!("attention {dtype:?} at {context}"), streams), |b| {
                b.iter(|| {
                    (0..LAYERS)
                        .for_each(|layer| cpu.attention(&q, &cache, layer, &sequences, &args, black_box(&mut out)));
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, products, rows, experts, low_rank, attention, wide_layers, beyond_caches);
criterion_main!(benches);
