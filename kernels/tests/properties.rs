//! One family of properties for every instruction set: each is held against the scalar twin, bit for bit.
//!
//! Equality is asked for, not closeness: all sets follow the scalar twin's order with the same fused operations, so
//! there is no tolerance to choose. NaN counts as equal to NaN. What the machine lacks is skipped aloud.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

mod common;

use std::ops::Range;
use std::sync::OnceLock;

use bindery_kernels::{
    Activation, Activations, AttentionArgs, CodeBook, Cpu, ExpertWeights, Form, GatedProduct, Isa, KvDtype, KvShape,
    LayerNorm, LowRank, LowRankPair, LowRankSegment, Matrix, Mixture, Norm, Product, Projection, QuantFormat,
    Quantized, RopeStyle, RoutingArgs, Scaling, Shares, SparseBlocks,
};
use common::{ACTIVATIONS, Family, Paged, Random, bits, gate_and_up, gated, product};
use half::f16;
use proptest::prelude::*;

/// The set's kernels and the scalar twin's, or none with a word on stderr. Made once: thousands of cases would make thousands of
/// threads, and an emulator keeps something of each.
fn pair(isa: Isa) -> Option<(&'static Cpu, &'static Cpu)> {
    static CPUS: [OnceLock<Cpu>; Isa::ALL.len()] = [const { OnceLock::new() }; Isa::ALL.len()];
    if !isa.is_available() {
        eprintln!("skipped: this machine has no {isa}");
        return None;
    }
    let [cpu, scalar] = [isa, Isa::Scalar].map(|isa| {
        let at = Isa::ALL.iter().position(|&each| each == isa).unwrap();
        CPUS[at].get_or_init(|| Cpu::new(isa, 2))
    });
    Some((cpu, scalar))
}

fn family() -> impl Strategy<Value = Family> {
    proptest::sample::select(Family::all())
}

/// Rows with now and then something that is no number in them.
fn rows(random: &mut Random, len: usize, strange: bool) -> Vec<f32> {
    let mut x = random.vec(len);
    if strange && len > 0 {
        let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38, -1e38, 1e-42, -0.0, f32::MIN_POSITIVE];
        for _ in 0..3 {
            x[random.below(len)] = values[random.below(values.len())];
        }
    }
    x
}

/// About `32 * groups` inputs, as the families take them: dense matrices and those in spans take any number.
fn cols(families: &[Family], groups: usize, random: &mut Random) -> usize {
    match families.iter().map(|family| family.span()).max() {
        Some(span) if span > 1 => (groups * 32).next_multiple_of(span),
        _ => (groups * 32).saturating_sub(random.below(32)),
    }
}

fn check_product(isa: Isa, family: Family, m: usize, rows_len: usize, groups: usize, strange: bool, seed: u64) {
    let Some((cpu, scalar)) = pair(isa) else { return };
    let mut random = Random(seed);
    let cols = cols(&[family], groups, &mut random);
    let x = rows(&mut random, m * cols, strange);
    let bias = random.vec(rows_len);
    let bias = strange.then_some(&bias[..]);
    let ours = product(cpu, &x, m, &family.matrix(isa, rows_len, cols, seed), bias);
    let theirs = product(scalar, &x, m, &family.matrix(Isa::Scalar, rows_len, cols, seed), bias);
    assert_eq!(bits(&ours), bits(&theirs));
}

/// A row alone, in batches, and with other numbers of threads.
fn check_product_independence(isa: Isa, family: Family, m: usize, rows_len: usize, groups: usize, seed: u64) {
    let Some((cpu, _)) = pair(isa) else { return };
    let mut random = Random(seed);
    let cols = cols(&[family], groups, &mut random);
    let w = family.matrix(isa, rows_len, cols, seed);
    let x = random.vec(m * cols);
    let whole = product(cpu, &x, m, &w, None);
    for threads in [1, 3, 4] {
        assert_eq!(bits(&product(&Cpu::new(isa, threads), &x, m, &w, None)), bits(&whole));
    }
    for _ in 0..4 {
        let start = random.below(m);
        let end = start + 1 + random.below(m - start);
        let part = product(cpu, &x[start * cols..end * cols], end - start, &w, None);
        assert_eq!(bits(&part), bits(&whole[start * rows_len..end * rows_len]));
    }
    let row = random.below(m);
    let alone = product(cpu, &x[row * cols..(row + 1) * cols], 1, &w, None);
    assert_eq!(bits(&alone), bits(&whole[row * rows_len..(row + 1) * rows_len]));
}

/// A gated product's projections and function.
#[derive(Clone, Debug)]
struct GatedCase {
    families: [Family; 2],
    has_up: bool,
    has_biases: bool,
    activation: Activation,
}

fn gated_case() -> impl Strategy<Value = GatedCase> {
    let activation = proptest::sample::select(&ACTIVATIONS[..]);
    ([family(), family()], any::<bool>(), any::<bool>(), activation)
        .prop_map(|(families, has_up, has_biases, activation)| GatedCase { families, has_up, has_biases, activation })
}

impl GatedCase {
    /// On one instruction set; `x` has `m` rows.
    fn run(&self, cpu: &Cpu, x: &[f32], m: usize, outputs: usize, seed: u64) -> Vec<f32> {
        let cols = x.len() / m;
        let [gate, up] = self.families.map(|family| {
            let weights = family.matrix(cpu.isa(), outputs, cols, seed ^ family.span() as u64);
            let bias = Random(!seed).vec(outputs);
            (weights, bias)
        });
        let projection = |(weights, bias)| Projection { weights, bias: self.has_biases.then_some(bias) };
        let gate = projection((&gate.0, &gate.1[..]));
        let up = self.has_up.then(|| projection((&up.0, &up.1[..])));
        gated(cpu, x, m, &GatedProduct { gate, up, activation: self.activation })
    }
}

/// Both projections' families, the outputs and the rows of activations are free.
fn check_gated(isa: Isa, case: &GatedCase, m: usize, outputs: usize, groups: usize, strange: bool, seed: u64) {
    let Some((cpu, scalar)) = pair(isa) else { return };
    let mut random = Random(seed);
    let cols = cols(&case.families, groups, &mut random);
    let x = rows(&mut random, m * cols, strange);
    let whole = case.run(cpu, &x, m, outputs, seed);
    assert_eq!(bits(&whole), bits(&case.run(scalar, &x, m, outputs, seed)));
    let (start, len) = (random.below(m), 1 + random.below(m));
    let end = (start + len).min(m);
    for threads in [1, 3] {
        let part = case.run(&Cpu::new(isa, threads), &x[start * cols..end * cols], end - start, outputs, seed);
        assert_eq!(bits(&part), bits(&whole[start * outputs..end * outputs]));
    }
}

/// Experts of some families (several in one mixture are possible), their router's logits random.
#[derive(Clone, Debug)]
struct MixtureCase {
    families: [Family; 3],
    num_experts: usize,
    num_chosen: usize,
    shares: Shares,
    activation: Activation,
    /// Groups of 32 inputs, of the width inside, and outputs.
    sizes: (usize, usize, usize),
}

fn mixture_case() -> impl Strategy<Value = MixtureCase> {
    let shares = prop_oneof![Just(Shares::OfAll), Just(Shares::OfChosen)];
    let sizes = (1..=2_usize, 1..=3_usize, 1..=70_usize);
    let experts = (1..=9_usize, 1..=4_usize);
    let activation = proptest::sample::select(&ACTIVATIONS[..]);
    ([family(), family(), family()], experts, shares, activation, sizes).prop_map(
        |(families, (num_experts, num_chosen), shares, activation, sizes)| {
            let num_chosen = num_chosen.min(num_experts);
            MixtureCase { families, num_experts, num_chosen, shares, activation, sizes }
        },
    )
}

impl MixtureCase {
    /// Inputs of a row and the width inside.
    fn widths(&self) -> (usize, usize) {
        let mut random = Random(self.sizes.2 as u64);
        (cols(&self.families, self.sizes.0, &mut random), cols(&self.families, self.sizes.1, &mut random))
    }

    /// Gate, up and down of every expert; every second one of another family.
    fn experts(&self, isa: Isa, seed: u64) -> Vec<[Matrix; 3]> {
        let (cols, inner) = self.widths();
        let matrix = |expert: usize, which: usize, rows, cols| {
            self.families[(expert + which) % 3].matrix(isa, rows, cols, seed ^ (expert * 3 + which) as u64)
        };
        let expert = |at| [matrix(at, 0, inner, cols), matrix(at, 1, inner, cols), matrix(at, 2, self.sizes.2, inner)];
        (0..self.num_experts).map(expert).collect()
    }

    fn weights<'a>(&self, [gate, up, down]: &'a [Matrix; 3]) -> ExpertWeights<'a> {
        let down = Projection { weights: down, bias: None };
        ExpertWeights { product: gate_and_up(gate, up, self.activation), down }
    }

    fn run(&self, cpu: &Cpu, x: &[f32], logits: &[f32], experts: &[[Matrix; 3]]) -> Vec<f32> {
        let (cols, _) = self.widths();
        let (m, mut activations, mut mixture) = (x.len() / cols, Activations::default(), Mixture::default());
        let (num_experts, num_chosen, shares) = (self.num_experts, self.num_chosen, self.shares);
        let mut probabilities = logits.to_vec();
        cpu.route(&mut probabilities, &RoutingArgs { num_experts, num_chosen, shares }, &mut mixture);
        cpu.prepare(x, m, cols, Form::of(experts.iter().flatten()), &mut activations);
        let mut out = vec![0.0; m * self.sizes.2];
        cpu.experts(&activations, &mut mixture, |expert| self.weights(&experts[expert]), &mut out);
        out
    }
}

/// Against the scalar twin, in batches and alone; and a row is the sum of its experts' own results.
fn check_mixture(isa: Isa, case: &MixtureCase, m: usize, seed: u64) {
    let Some((cpu, scalar)) = pair(isa) else { return };
    let (mut random, (cols, _), width) = (Random(seed), case.widths(), case.sizes.2);
    let (x, logits) = (random.vec(m * cols), random.vec(m * case.num_experts));
    let experts = case.experts(isa, seed);
    let whole = case.run(cpu, &x, &logits, &experts);
    assert_eq!(bits(&whole), bits(&case.run(scalar, &x, &logits, &case.experts(Isa::Scalar, seed))));
    let (start, len) = (random.below(m), 1 + random.below(m));
    let end = (start + len).min(m);
    for threads in [1, 3] {
        let logits = &logits[start * case.num_experts..end * case.num_experts];
        let part = case.run(&Cpu::new(isa, threads), &x[start * cols..end * cols], logits, &experts);
        assert_eq!(bits(&part), bits(&whole[start * width..end * width]));
    }
    let row = random.below(m);
    let expected = naive_mixture(cpu, case, &x[row * cols..(row + 1) * cols], &logits, row, &experts);
    for (&ours, expected) in whole[row * width..(row + 1) * width].iter().zip(expected) {
        assert!((f64::from(ours) - expected).abs() <= 1e-4 * (1.0 + expected.abs()), "{ours} and {expected}");
    }
}

/// One row, expert by expert, the weighting in f64.
fn naive_mixture(
    cpu: &Cpu,
    case: &MixtureCase,
    x: &[f32],
    logits: &[f32],
    row: usize,
    experts: &[[Matrix; 3]],
) -> Vec<f64> {
    let logits = &logits[row * case.num_experts..(row + 1) * case.num_experts];
    let mut order: Vec<usize> = (0..case.num_experts).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    order.truncate(case.num_chosen);
    let among: Vec<usize> = if case.shares == Shares::OfAll { (0..case.num_experts).collect() } else { order.clone() };
    let total: f64 = among.iter().map(|&expert| f64::from(logits[expert]).exp()).sum();
    let mut sum = vec![0.0; case.sizes.2];
    for expert in order {
        let ExpertWeights { product: wanted, down } = case.weights(&experts[expert]);
        let inner = gated(cpu, x, 1, &wanted);
        let out = product(cpu, &inner, 1, down.weights, None);
        let weight = f64::from(logits[expert]).exp() / total;
        sum.iter_mut().zip(out).for_each(|(sum, out)| *sum += weight * f64::from(out));
    }
    sum
}

/// Adapters' rows beside plain ones: three products, or a gated one, of a base in one family, with pairs in some others.
#[derive(Clone, Debug)]
struct LowRankCase {
    base: Family,
    /// Of the first halves; the second ones are dense.
    down: Family,
    up: Family,
    /// Rows and rank of each segment; rows of no segment come first.
    segments: Vec<(usize, usize)>,
    num_plain: usize,
    /// Groups of 32 inputs, and outputs.
    sizes: (usize, usize),
}

fn low_rank_case() -> impl Strategy<Value = LowRankCase> {
    let dense = || proptest::sample::select(&[Family::F32, Family::F16, Family::Bf16][..]);
    let segments = proptest::collection::vec((1..=9_usize, 1..=20_usize), 1..=4);
    let sizes = (1..=4_usize, 1..=4_usize).prop_map(|(groups, outputs)| (groups, outputs * 32));
    let down = family().prop_filter("read inputs in an order", |family| !matches!(family, Family::Ordered(_)));
    (family(), down, dense(), segments, 0..=5_usize, sizes).prop_map(|(base, down, up, segments, num_plain, sizes)| {
        LowRankCase { base, down, up, segments, num_plain, sizes }
    })
}

/// Against each segment's rows by themselves, computed product by product; against the scalar twin; and in a batch of which
/// only a part is there.
fn check_low_rank(isa: Isa, case: &LowRankCase, seed: u64) {
    let Some((cpu, scalar)) = pair(isa) else { return };
    let whole = low_rank(cpu, case, 0..case.segments.len(), seed, true);
    let scalars = low_rank(scalar, case, 0..case.segments.len(), seed, false);
    assert_eq!(whole.each_ref().map(|out| bits(out)), scalars.each_ref().map(|out| bits(out)));
    let first = Random(seed ^ 1).below(case.segments.len());
    let skipped: usize = case.segments[..first].iter().map(|(rows, _)| rows).sum();
    for threads in [1, 3] {
        let part = low_rank(&Cpu::new(isa, threads), case, first..case.segments.len(), seed, false);
        for (part, whole) in part.iter().zip(&whole) {
            // The plain rows, then those of the segments that are there.
            let width = whole.len() / (case.num_plain + case.segments.iter().map(|(rows, _)| rows).sum::<usize>());
            let (plain, own) = part.split_at(case.num_plain * width);
            assert_eq!(bits(plain), bits(&whole[..plain.len()]));
            assert_eq!(bits(own), bits(&whole[(case.num_plain + skipped) * width..]));
        }
    }
}

/// Two products and a gated one, with the segments numbered `range`.
fn low_rank(cpu: &Cpu, case: &LowRankCase, range: Range<usize>, seed: u64, is_checked: bool) -> [Vec<f32>; 3] {
    let isa = cpu.isa();
    let span = case.base.span().max(case.down.span());
    let (cols, outputs) = ((case.sizes.0 * 32).next_multiple_of(span), case.sizes.1);
    let base: [Matrix; 2] = [0, 1].map(|at| case.base.matrix(isa, outputs, cols, seed ^ at));
    let pairs: Vec<[Option<[Matrix; 2]>; 2]> = (0..case.segments.len() as u64)
        .map(|segment| {
            [0, 1].map(|product| {
                let rank = case.segments[segment as usize].1;
                let seed = seed ^ (segment * 2 + product + 10);
                let pair = [case.down.matrix(isa, rank, cols, seed), case.up.matrix(isa, outputs, rank, !seed)];
                // Now and then there is nothing for one of the two.
                (!seed.is_multiple_of(5)).then_some(pair)
            })
        })
        .collect();
    let mut random = Random(seed);
    let mut x = random.vec(case.num_plain * cols);
    let (mut m, mut segments) = (case.num_plain, Vec::new());
    for (at, &(rows, _)) in case.segments.iter().enumerate() {
        let own = random.vec(rows * cols);
        if range.contains(&at) {
            x.extend(own);
            let pairs = pairs[at].each_ref().map(|pair| pair.as_ref().map(|[down, up]| LowRankPair { down, up }));
            segments.push(LowRankSegment { rows: m..m + rows, pairs });
            m += rows;
        }
    }
    let pairs = segments.iter().flat_map(|segment| segment.pairs.iter().flatten().map(|pair| pair.down));
    let (mut activations, mut out, mut between) = <(Activations, Activations, LowRank)>::default();
    cpu.prepare(&x, m, cols, Form::of(pairs.chain(&base)), &mut activations);
    // The first product replaces what is there, the second is added to it.
    let mut sums = [vec![f32::NAN; m * outputs], vec![0.0; m * outputs]];
    let [first, second] = &mut sums;
    let [gate, up] = &base;
    let addends = cpu.low_rank(&activations, &segments, &mut between);
    let wanted = [(gate, first), (up, &mut vec![1.0; m * outputs])];
    cpu.matmul_all(&activations, wanted.map(|(weights, out)| Product { weights, bias: None, out }), Some(addends));
    let wanted = [(gate, &mut vec![1.0; m * outputs]), (up, second)];
    let addends = cpu.low_rank(&activations, &segments, &mut between);
    cpu.matmul_add_all(&activations, wanted.map(|(weights, out)| Product { weights, bias: None, out }), Some(addends));
    let both = gate_and_up(&base[0], &base[1], Activation::Silu);
    let addends = cpu.low_rank(&activations, &segments, &mut between);
    cpu.gated_matmul(&activations, &both, Some(addends), Form::F32, &mut out);
    if is_checked {
        for (product_at, sums) in sums.iter().enumerate() {
            for segment in &segments {
                let Some(pair) = segment.pairs[product_at] else { continue };
                let (rows, x) = (segment.rows.clone(), &x[segment.rows.start * cols..segment.rows.end * cols]);
                let mut expected = product(cpu, x, rows.len(), &base[product_at], None);
                let inner = product(cpu, x, rows.len(), pair.down, None);
                let delta = product(cpu, &inner, rows.len(), pair.up, None);
                expected.iter_mut().zip(delta).for_each(|(sum, delta)| *sum += delta);
                assert_eq!(bits(&sums[rows.start * outputs..rows.end * outputs]), bits(&expected));
            }
        }
        let plain = gated(cpu, &x[..case.num_plain * cols], case.num_plain, &both);
        assert_eq!(bits(&out.rows()[..case.num_plain * outputs]), bits(&plain), "plain rows are as ever");
        for (at, row) in out.rows().iter().enumerate() {
            let [gate, up] = sums.each_ref().map(|sums| f64::from(sums[at]));
            let expected = gate / (1.0 + (-gate).exp()) * up;
            assert!((f64::from(*row) - expected).abs() <= 1e-5 * (1.0 + expected.abs()), "{row} and {expected}");
        }
    }
    let [first, second] = sums;
    [first, second, out.rows().to_vec()]
}

fn check_rows(isa: Isa, m: usize, k: usize, strange: bool, seed: u64) {
    let Some((cpu, scalar)) = pair(isa) else { return };
    let mut random = Random(seed);
    let x = rows(&mut random, m * k, strange);
    let (weight, bias) = (random.vec(k), random.vec(k));
    let (eps, start) = (1e-6, random.vec(m * k));
    let layer = Norm::Layer(LayerNorm { weight: &weight, bias: &bias, eps });
    for norm in [Norm::Rms { weight: &weight, eps }, layer] {
        let normed = |cpu: &Cpu| {
            let (mut out, mut in_place, mut added) = (Activations::default(), x.clone(), start.clone());
            cpu.norm(&x, m, &norm, Form::F32, &mut out);
            cpu.norm_in_place(&mut in_place, &norm);
            assert_eq!(bits(out.rows()), bits(&in_place));
            cpu.norm_add(&x, &norm, &mut added);
            let sums: Vec<f32> = start.iter().zip(&in_place).map(|(start, normed)| start + normed).collect();
            assert_eq!(bits(&added), bits(&sums));
            bits(&in_place)
        };
        assert_eq!(normed(cpu), normed(scalar));
    }
    let factors = random.vec(m);
    let scaled = |cpu: &Cpu| {
        let mut out = start.clone();
        cpu.add_scaled_rows(&x, &factors, &mut out);
        bits(&out)
    };
    assert_eq!(scaled(cpu), scaled(scalar));
    // Values in reach of the exponential's whole range.
    let logits: Vec<f32> = x.iter().map(|x| x * 60.0).collect();
    for cap in [None, Some(30.0)] {
        let capped = |cpu: &Cpu| {
            let mut logits = logits.clone();
            cpu.scale_and_cap(&mut logits, 0.7, cap);
            bits(&logits)
        };
        assert_eq!(capped(cpu), capped(scalar));
    }
    assert_eq!(cpu.argmax(&logits), scalar.argmax(&logits));
    assert_eq!(bits(&[cpu.log_sum_exp(&logits)]), bits(&[scalar.log_sum_exp(&logits)]));
    let soft = |cpu: &Cpu| {
        let mut row = logits.clone();
        cpu.softmax(&mut row);
        bits(&row)
    };
    assert_eq!(soft(cpu), soft(scalar));
}

fn check_rope(isa: Isa, m: usize, heads: usize, head_dim: usize, rotary: usize, seed: u64) {
    let Some((cpu, scalar)) = pair(isa) else { return };
    let rotary = rotary.min(head_dim) / 2 * 2;
    let mut random = Random(seed);
    let x = random.vec(m * heads * head_dim);
    let (cos, sin) = (random.vec(m * rotary / 2), random.vec(m * rotary / 2));
    for style in [RopeStyle::Neox, RopeStyle::Interleaved] {
        let turned = |cpu: &Cpu| {
            let mut x = x.clone();
            cpu.rope(&mut x, m, heads, head_dim, rotary, style, &cos, &sin);
            bits(&x)
        };
        assert_eq!(turned(cpu), turned(scalar));
    }
}

/// The shape of an attention test.
#[derive(Clone, Debug)]
struct AttentionCase {
    shape: KvShape,
    group: usize,
    contexts: Vec<usize>,
    window: Option<usize>,
    blocks: Option<SparseBlocks>,
    soft_cap: Option<f32>,
    has_biases: bool,
    seed: u64,
}

fn attention_case() -> impl Strategy<Value = AttentionCase> {
    let shape = (
        1..=3_usize,
        prop_oneof![Just(16_usize), Just(32), Just(64), Just(80), 1..=70_usize],
        prop_oneof![Just(16_usize), Just(32), 1..=40_usize],
        prop_oneof![Just(KvDtype::F32), Just(KvDtype::F16), Just(KvDtype::Bf16), Just(KvDtype::Int8)],
    );
    let contexts = prop::collection::vec(prop_oneof![1..=70_usize, 1..=200_usize, 500..=1100_usize], 1..=3);
    let block_size = prop_oneof![Just(64_usize), Just(16), 1..=150_usize];
    let blocks = (block_size, 1..=3_usize, 1..=9_usize, 0..=3_usize).prop_map(
        |(block_size, num_local_blocks, vertical_stride, head_step)| SparseBlocks {
            block_size,
            num_local_blocks,
            vertical_stride,
            head_step,
        },
    );
    let keys = (prop::option::of(1..=600_usize), prop::option::of(blocks));
    let scores = (keys, prop::option::of(1.0_f32..=30.0), any::<bool>());
    (shape, 1..=5_usize, contexts, scores, any::<u64>()).prop_map(|(shape, group, contexts, scores, seed)| {
        let (num_kv_heads, head_dim, block_size, dtype) = shape;
        let ((window, blocks), soft_cap, has_biases) = scores;
        let shape = KvShape { num_layers: 1, num_kv_heads, head_dim, block_size, dtype };
        AttentionCase { shape, group, contexts, window, blocks, soft_cap, has_biases, seed }
    })
}

impl AttentionCase {
    fn with<R>(&self, cpu: &Cpu, check: impl FnOnce(&Paged, &AttentionArgs<'_>, &mut Random) -> R) -> R {
        let num_heads = self.shape.num_kv_heads * self.group;
        let num_positions = self.contexts.iter().max().unwrap().next_multiple_of(64);
        let biases: Vec<f32> = Random(self.seed).vec(num_heads * num_positions).iter().map(|x| 5.0 * x).collect();
        let args = AttentionArgs {
            num_heads,
            scale: 1.0 / (self.shape.head_dim as f32).sqrt(),
            window: self.window,
            blocks: self.blocks,
            soft_cap: self.soft_cap,
            biases: self.has_biases.then_some(&biases[..]),
        };
        let paged = Paged::new(cpu, self.shape, num_heads, &self.contexts, self.seed);
        check(&paged, &args, &mut Random(self.seed))
    }
}

fn check_attention(isa: Isa, case: &AttentionCase) {
    let Some((cpu, scalar)) = pair(isa) else { return };
    case.with(cpu, |paged, args, random| {
        let rows: Vec<usize> = case.contexts.iter().map(|&context| 1 + random.below(context.min(40))).collect();
        let ours = paged.attend(cpu, &rows, args).concat();
        assert!(ours.iter().all(|x| x.is_finite()), "a stale slot was read");
        assert_eq!(bits(&ours), bits(&paged.attend(scalar, &rows, args).concat()));
    });
}

/// A sequence alone, with others, in chunks, row by row, and with other numbers of threads.
fn check_attention_independence(isa: Isa, case: &AttentionCase) {
    let Some((cpu, _)) = pair(isa) else { return };
    case.with(cpu, |paged, args, random| {
        let rows: Vec<usize> = case.contexts.iter().map(|&context| context.min(40)).collect();
        let together = paged.attend(cpu, &rows, args);
        for threads in [1, 3, 4] {
            assert_eq!(bits(&paged.attend(&Cpu::new(isa, threads), &rows, args).concat()), bits(&together.concat()));
        }
        for (i, together) in together.iter().enumerate() {
            let range = case.contexts[i] - rows[i]..case.contexts[i];
            let chunk = |range: Range<usize>| paged.attend_chunk(cpu, i, range, args);
            assert_eq!(bits(&chunk(range.clone())), bits(together));
            let mut chunks = Vec::new();
            let mut start = range.start;
            while start < range.end {
                let end = start + 1 + random.below(range.end - start);
                chunks.extend(chunk(start..end));
                start = end;
            }
            assert_eq!(bits(&chunks), bits(together));
            let singles: Vec<f32> = range.flat_map(|position| chunk(position..position + 1)).collect();
            assert_eq!(bits(&singles), bits(together));
        }
    });
}

/// More under `cargo xtask test --full`.
fn num_cases(usual: u32, full: u32) -> u32 {
    if std::env::var_os("BINDERY_TEST_FULL").is_some() { full } else { usual }
}

macro_rules! properties {
    ($($module:ident: $isa:expr;)*) => {
        $(mod $module {
            use super::*;

            proptest! {
                #![proptest_config(ProptestConfig::with_cases(num_cases(48, 1000)))]

                #[test]
                fn products_match_scalar(
                    family in family(), m in 1..=70_usize, rows in 1..=70_usize, groups in 1..=9_usize,
                    strange in any::<bool>(), seed in any::<u64>(),
                ) {
                    check_product($isa, family, m, rows, groups, strange, seed);
                }

                #[test]
                fn a_products_row_does_not_depend_on_its_neighbours(
                    family in family(), m in 1..=70_usize, rows in 1..=300_usize, groups in 1..=9_usize,
                    seed in any::<u64>(),
                ) {
                    check_product_independence($isa, family, m, rows, groups, seed);
                }

                #[test]
                fn gated_products_match_scalar(
                    case in gated_case(), m in 1..=40_usize, outputs in 1..=100_usize,
                    groups in 1..=3_usize, whole in any::<bool>(), strange in any::<bool>(), seed in any::<u64>(),
                ) {
                    // int8 wants whole groups of outputs.
                    let outputs = if whole { outputs.next_multiple_of(32) } else { outputs };
                    check_gated($isa, &case, m, outputs, groups, strange, seed);
                }

                #[test]
                fn mixtures_match_scalar_and_their_experts(
                    case in mixture_case(), m in 1..=40_usize, seed in any::<u64>(),
                ) {
                    check_mixture($isa, &case, m, seed);
                }

                #[test]
                fn low_rank_products_match_scalar_and_each_segment_alone(case in low_rank_case(), seed in any::<u64>()) {
                    check_low_rank($isa, &case, seed);
                }

                #[test]
                fn row_operations_match_scalar(
                    m in 0..=5_usize, k in 1..=700_usize, strange in any::<bool>(), seed in any::<u64>(),
                ) {
                    check_rows($isa, m, k, strange, seed);
                }

                #[test]
                fn rope_matches_scalar(
                    m in 0..=4_usize, heads in 1..=4_usize, head_dim in 2..=130_usize, rotary in 0..=130_usize,
                    seed in any::<u64>(),
                ) {
                    check_rope($isa, m, heads, head_dim, rotary, seed);
                }

                #[test]
                fn attention_matches_scalar(case in attention_case()) {
                    check_attention($isa, &case);
                }

                #[test]
                fn a_sequences_attention_does_not_depend_on_its_neighbours(case in attention_case()) {
                    check_attention_independence($isa, &case);
                }
            }

            /// Every count of rows around the kernels' widths, and every tail of a tile.
            #[test]
            fn small_products_match_scalar_completely() {
                for family in Family::all() {
                    for m in 1..=18 {
                        check_product($isa, family, m, 19, 2, false, m as u64);
                        check_product($isa, family, m, 1, 17, false, m as u64);
                    }
                    for rows in 1..=67 {
                        check_product($isa, family, 1, rows, 1, false, rows as u64);
                        check_product($isa, family, 5, rows, 1, true, rows as u64);
                    }
                }
            }

            /// Rows longer than what is unpacked of a tile at a time, and enough of them that tiles are.
            #[test]
            fn long_products_of_many_rows_match_scalar() {
                for family in Family::all() {
                    for (m, groups) in [(40, 49), (37, 100), (13, 97)] {
                        check_product($isa, family, m, 19, groups, m == 40, m as u64);
                    }
                }
            }

            /// A last panel of one row, of three and of nine: what lies behind it is read with it where panels have sixteen.
            #[test]
            fn products_of_a_short_last_panel_match_scalar() {
                for family in Family::all() {
                    for (m, groups) in [(241, 3), (99, 1), (57, 2)] {
                        check_product($isa, family, m, 17, groups, m == 241, m as u64);
                    }
                }
            }

            /// Codes and activations of largest magnitude: no integer sum may saturate.
            #[test]
            fn extreme_codes_are_exact() {
                let Some((cpu, _)) = pair($isa) else { return };
                extreme_codes(cpu);
            }

            #[test]
            fn nothing_in_nothing_out() {
                let Some((cpu, _)) = pair($isa) else { return };
                for family in Family::all() {
                    assert!(product(cpu, &[], 0, &family.matrix($isa, 5, 256, 1), None).is_empty());
                    assert!(product(cpu, &[0.0; 256], 1, &family.matrix($isa, 0, 256, 1), None).is_empty());
                    for m in [2, 40] {
                        assert_eq!(product(cpu, &[], m, &family.matrix($isa, 3, 0, 1), None), vec![0.0; 3 * m]);
                    }
                }
                let nothing = Family::F32.matrix($isa, 0, 256, 1);
                assert!(gated(cpu, &[0.0; 256], 1, &gate_and_up(&nothing, &nothing, Activation::Silu)).is_empty());
                assert_eq!(cpu.max(&[]), f32::NEG_INFINITY);
            }
        })*
    };
}

fn extreme_codes(cpu: &Cpu) {
    for format in QuantFormat::all() {
        let cols = format.cols_multiple().max(160);
        let unit = match format.scaling {
            Scaling::Exponents => 0.5,
            Scaling::Eighths => 0.125,
            _ => 1.0,
        };
        for code in format.codes() {
            // Between its ends a range that is its own book holds nothing new.
            if format.book == CodeBook::Linear && ![*format.codes().start(), *format.codes().end()].contains(&code) {
                continue;
            }
            let w = Quantized::pack(cpu.isa(), 17, cols, format, |_, row| {
                row.codes.fill(code);
                row.scales.fill(f16::ONE);
                row.mins.fill(f16::ZERO);
                row.sub_scales.fill(if format.scaling == Scaling::Exponents { 127 } else { 1 });
                row.sub_mins.fill(i8::from(!matches!(format.scaling, Scaling::Spans(_))));
            });
            let w = Matrix::Quantized(w);
            for sign in [1, -1] {
                for m in [1, 40] {
                    // Groups whose maximum is 127: the codes are the numbers themselves.
                    let x = vec![(127 * sign) as f32; m * cols];
                    let sum = sign * cols as i32 * 127 * i32::from(format.book.value(code));
                    let sum = sum as f32 * unit;
                    assert_eq!(product(cpu, &x, m, &w, None), vec![sum; m * 17], "{format:?}");
                }
            }
        }
    }
}

properties! {
    scalar: Isa::Scalar;
    neon: Isa::Neon;
    neondot: Isa::NeonDot;
    neoni8mm: Isa::NeonI8mm;
    avx2: Isa::Avx2;
    avx512: Isa::Avx512;
    avxvnni: Isa::AvxVnni;
    avx512vnni: Isa::Avx512Vnni;
    amx: Isa::Amx;
}
