//! Checks of products: alone, gated, of experts, of low rank.

use std::ops::Range;

use bindery_kernels::{
    Activation, Activations, CodeBook, Cpu, ExpertWeights, Form, GatedProduct, Isa, LowRank, LowRankPair,
    LowRankSegment, Matrix, Mixture, Product, Projection, QuantFormat, Quantized, RoutingArgs, Scaling, Shares,
};
use half::f16;
use proptest::prelude::*;

use super::common::{ACTIVATIONS, Family, Random, W4, W8, bits, gate_and_up, gated, product};
use super::{family, pair, rows};

/// About `32 * groups` inputs, as the families take them: dense matrices and those in spans take any number.
fn cols(families: &[Family], groups: usize, random: &mut Random) -> usize {
    match families.iter().map(|family| family.span()).max() {
        Some(span) if span > 1 => (groups * 32).next_multiple_of(span),
        _ => (groups * 32).saturating_sub(random.below(32)),
    }
}

pub(super) fn check_product(
    isa: Isa,
    family: Family,
    m: usize,
    rows_len: usize,
    groups: usize,
    strange: bool,
    seed: u64,
) {
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

/// On one thread: a product is one task.
pub(super) fn check_product_alone(isa: Isa, family: Family, m: usize, rows_len: usize, groups: usize) {
    let Some((_, scalar)) = pair(isa) else { return };
    let mut random = Random(m as u64);
    let cols = cols(&[family], groups, &mut random);
    let x = random.vec(m * cols);
    let ours = product(&Cpu::new(isa, 1), &x, m, &family.matrix(isa, rows_len, cols, 1), None);
    let theirs = product(scalar, &x, m, &family.matrix(Isa::Scalar, rows_len, cols, 1), None);
    assert_eq!(bits(&ours), bits(&theirs));
}

/// Of activations whose buffers have held more rows, of which none was a number.
pub(super) fn check_leftovers(isa: Isa, family: Family, groups: usize) {
    let Some((cpu, _)) = pair(isa) else { return };
    let mut random = Random(1);
    let cols = cols(&[family], groups, &mut random);
    let w = family.matrix(isa, 17, cols, 1);
    let mut activations = Activations::default();
    for m in [1, 14, 33, 99] {
        cpu.prepare(&vec![f32::NAN; 130 * cols], 130, cols, Form::of([&w]), &mut activations);
        let x = random.vec(m * cols);
        cpu.prepare(&x, m, cols, Form::of([&w]), &mut activations);
        let mut out = vec![0.0; m * 17];
        cpu.matmul(&activations, &w, None, &mut out);
        assert_eq!(bits(&out), bits(&product(cpu, &x, m, &w, None)), "{m} rows");
        assert!(out.iter().all(|x| x.is_finite()), "{m} rows");
    }
}

/// A row alone, in batches, and with other numbers of threads.
pub(super) fn check_product_independence(
    isa: Isa,
    family: Family,
    m: usize,
    rows_len: usize,
    groups: usize,
    seed: u64,
) {
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
pub(super) struct GatedCase {
    families: [Family; 2],
    has_up: bool,
    has_biases: bool,
    activation: Activation,
}

pub(super) fn gated_case() -> impl Strategy<Value = GatedCase> {
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
pub(super) fn check_gated(
    isa: Isa,
    case: &GatedCase,
    m: usize,
    outputs: usize,
    groups: usize,
    strange: bool,
    seed: u64,
) {
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

/// Gate and up of one family, with biases.
pub(super) fn check_gated_of(isa: Isa, family: Family, m: usize, outputs: usize, groups: usize) {
    let case = GatedCase { families: [family; 2], has_up: true, has_biases: true, activation: Activation::Silu };
    check_gated(isa, &case, m, outputs, groups, false, m as u64);
}

/// Experts of some families (several in one mixture are possible), their router's logits random.
#[derive(Clone, Debug)]
pub(super) struct MixtureCase {
    families: [Family; 3],
    num_experts: usize,
    num_chosen: usize,
    shares: Shares,
    activation: Activation,
    /// Groups of 32 inputs, of the width inside, and outputs.
    sizes: (usize, usize, usize),
}

pub(super) fn mixture_case() -> impl Strategy<Value = MixtureCase> {
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
pub(super) fn check_mixture(isa: Isa, case: &MixtureCase, m: usize, seed: u64) {
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
pub(super) struct LowRankCase {
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

pub(super) fn low_rank_case() -> impl Strategy<Value = LowRankCase> {
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
pub(super) fn check_low_rank(isa: Isa, case: &LowRankCase, seed: u64) {
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

/// Segments of so many rows.
pub(super) fn check_low_rank_of(isa: Isa, rows: [usize; 2], outputs: usize) {
    let segments = rows.map(|rows| (rows, 8)).to_vec();
    let case = LowRankCase { base: W4, down: W8, up: Family::F16, segments, num_plain: 3, sizes: (2, outputs) };
    check_low_rank(isa, &case, 1);
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

pub(super) fn extreme_codes(cpu: &Cpu) {
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
