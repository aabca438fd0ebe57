//! Inputs for the kernels' tests: seeded numbers, matrices of every family, filled caches.
//!
//! Knows the public interface only.
#![allow(dead_code, reason = "each test file uses its part")]

use bindery_kernels::{
    Activation, Activations, AttentionSequence, CodeBits, CodeBook, Cpu, Form, GatedProduct, InputOrder, Isa, KvCache,
    KvDtype, KvShape, Matrix, Projection, QuantFormat, QuantRow, Quantized, Scaling,
};
use half::{bf16, f16};

/// SplitMix64 (Steele et al. 2014): small, seeded, good enough for test data.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// In [-1, 1).
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.unit()).collect()
    }
}

/// Families of weight matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Quantized(QuantFormat),
    /// Its columns in one of a few orders.
    Ordered(QuantFormat),
    F32,
    F16,
    Bf16,
}

pub(crate) const W4: Family = single(CodeBits::Four, false);
pub(crate) const W4_WITH_MINS: Family = single(CodeBits::Four, true);
pub(crate) const W8: Family = single(CodeBits::Eight, false);

/// Of four bits and of those whose groups are half as long, with columns in an order of their own.
const ORDERED: [QuantFormat; 2] = [
    QuantFormat { bits: CodeBits::Four, scaling: Scaling::Spans(128), with_mins: false, book: CodeBook::Linear },
    QuantFormat { bits: CodeBits::Three, scaling: Scaling::Spans(64), with_mins: true, book: CodeBook::Linear },
];

/// An order, the same one for equal arguments.
pub(crate) fn order(cols: usize, seed: u64) -> InputOrder {
    let mut random = Random(seed);
    let mut places: Vec<u32> = (0..cols as u32).collect();
    for at in (1..cols).rev() {
        places.swap(at, random.below(at + 1));
    }
    InputOrder::new(&places).unwrap()
}

const fn single(bits: CodeBits, with_mins: bool) -> Family {
    Family::Quantized(QuantFormat { bits, scaling: Scaling::Single, with_mins, book: CodeBook::Linear })
}

impl Family {
    pub(crate) fn all() -> Vec<Self> {
        let ordered = ORDERED.into_iter().map(Self::Ordered).chain([Self::F32, Self::F16, Self::Bf16]);
        QuantFormat::all().into_iter().map(Self::Quantized).chain(ordered).collect()
    }

    pub(crate) fn is_quantized(self) -> bool {
        matches!(self, Self::Quantized(_) | Self::Ordered(_))
    }

    /// Inputs come in multiples of this.
    pub(crate) fn span(self) -> usize {
        match self {
            Self::Quantized(format) | Self::Ordered(format) => format.cols_multiple(),
            Self::F32 | Self::F16 | Self::Bf16 => 1,
        }
    }

    /// A matrix of random weights; the same numbers for every instruction set.
    pub(crate) fn matrix(self, isa: Isa, rows: usize, cols: usize, seed: u64) -> Matrix {
        let mut random = Random(seed);
        match self {
            Self::Ordered(format) => {
                let Matrix::Quantized(packed) = Self::Quantized(format).matrix(isa, rows, cols, seed) else {
                    unreachable!("a quantised family")
                };
                Matrix::Quantized(packed.with_order(order(cols, seed % 2)))
            }
            Self::Quantized(format) => {
                let (first, num_codes) = (i32::from(*format.codes().start()), 1 << format.bits.count());
                let num_subs = if format.scaling == Scaling::Nibbles { 16 } else { 256 };
                Matrix::Quantized(Quantized::pack(isa, rows, cols, format, |_, row| {
                    let QuantRow { codes, scales, mins, sub_scales, sub_mins } = row;
                    codes.fill_with(|| (first + random.below(num_codes) as i32) as i8);
                    // Weights of about one, whatever the ranges.
                    let upper = if sub_scales.is_empty() { 2.0 } else { 4.0 / num_subs as f32 };
                    let upper = if format.scaling == Scaling::Eighths { 8.0 * upper } else { upper };
                    let largest = format.codes().map(|code| i32::from(format.book.value(code)).abs()).max().unwrap();
                    scales.fill_with(|| f16::from_f32(random.unit() * upper / (2 * largest) as f32));
                    mins.fill_with(|| f16::from_f32(random.unit() * upper / 2.0));
                    // Some exponents are below the normal range.
                    let exponents = [125, 126, 127, 124, 123, 0, 1, 2];
                    let least = (num_subs / 2 * (num_subs / 256)) as i32;
                    let mut sub = || match format.scaling {
                        Scaling::Exponents => exponents[random.below(exponents.len())],
                        _ => (random.below(num_subs) as i32 - least) as i8,
                    };
                    sub_scales.fill_with(&mut sub);
                    sub_mins.fill_with(&mut sub);
                    if let Scaling::Spans(_) = format.scaling {
                        sub_mins.fill_with(|| (first + random.below(num_codes) as i32) as i8);
                    }
                }))
            }
            Self::F32 => Matrix::pack_f32(isa, rows, cols, |_, row| row.fill_with(|| random.unit())),
            Self::F16 => Matrix::pack_f16(isa, rows, cols, |_, row| row.fill_with(|| f16::from_f32(random.unit()))),
            Self::Bf16 => Matrix::pack_bf16(isa, rows, cols, |_, row| row.fill_with(|| bf16::from_f32(random.unit()))),
        }
    }
}

pub(crate) fn rows_of(w: &Matrix) -> Vec<Vec<f32>> {
    (0..w.rows())
        .map(|row| {
            let mut out = vec![0.0; w.cols()];
            w.row(row, &mut out);
            out
        })
        .collect()
}

pub(crate) fn product(cpu: &Cpu, x: &[f32], m: usize, w: &Matrix, bias: Option<&[f32]>) -> Vec<f32> {
    let mut activations = Activations::default();
    cpu.prepare(x, m, w.cols(), Form::of([w]), &mut activations);
    let mut out = vec![f32::NAN; m * w.rows()];
    cpu.matmul(&activations, w, bias, &mut out);
    out
}

/// A gated product in every form that fits, each held against the f32 rows.
pub(crate) fn gated(cpu: &Cpu, x: &[f32], m: usize, wanted: &GatedProduct<'_>) -> Vec<f32> {
    let (mut activations, mut out, mut other) = <(Activations, Activations, Activations)>::default();
    let gate = wanted.gate.weights;
    let matrices = [Some(gate), wanted.up.map(|up| up.weights)].into_iter().flatten();
    cpu.prepare(x, m, gate.cols(), Form::of(matrices), &mut activations);
    cpu.gated_matmul(&activations, wanted, None, Form::F32, &mut out);
    let rows = out.rows().to_vec();
    if gate.rows().is_multiple_of(32) {
        // What a quantised matrix makes of them tells the int8 groups apart.
        let probe = W8.matrix(cpu.isa(), 19, gate.rows(), 5);
        let expected = product(cpu, &rows, m, &probe, None);
        for form in [Form::Int8, Form::Both] {
            cpu.gated_matmul(&activations, wanted, None, form, &mut other);
            let mut product = vec![f32::NAN; expected.len()];
            cpu.matmul(&other, &probe, None, &mut product);
            assert_eq!(bits(&product), bits(&expected), "{form:?}");
        }
        assert_eq!(bits(other.rows()), bits(&rows));
    }
    rows
}

/// All activations.
pub(crate) const ACTIVATIONS: [Activation; 4] =
    [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Gegelu { limit: 0.75 }];

/// Two plain projections and an activation.
pub(crate) fn gate_and_up<'a>(gate: &'a Matrix, up: &'a Matrix, activation: Activation) -> GatedProduct<'a> {
    let [gate, up] = [gate, up].map(|weights| Projection { weights, bias: None });
    GatedProduct { gate, up: Some(up), activation }
}

/// Bits, with every NaN alike.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
}

/// Sequences with contexts of their own in one layer of a cache, their blocks scattered.
pub(crate) struct Paged {
    pub(crate) cache: KvCache,
    /// The layer that attends; the others hold other numbers.
    pub(crate) layer: usize,
    pub(crate) num_heads: usize,
    pub(crate) tables: Vec<Vec<u32>>,
    /// A block that no sequence has.
    pub(crate) unused_block: u32,
    pub(crate) contexts: Vec<usize>,
    /// Per sequence `[context, kv_heads * head_dim]`, rounded as the cache stores them.
    pub(crate) keys: Vec<Vec<f32>>,
    pub(crate) values: Vec<Vec<f32>>,
    /// Per sequence `[context, num_heads * head_dim]`
    pub(crate) queries: Vec<Vec<f32>>,
}

impl Paged {
    /// Tables, queries, keys and values are the same for equal seeds, whichever layer they are in and however many there are.
    pub(crate) fn new(
        cpu: &Cpu,
        shape: KvShape,
        layer: usize,
        num_heads: usize,
        contexts: &[usize],
        seed: u64,
    ) -> Self {
        let (mut random, mut others) = (Random(seed), Random(!seed));
        let blocks: Vec<usize> = contexts.iter().map(|context| context.div_ceil(shape.block_size)).collect();
        let num_blocks = blocks.iter().sum::<usize>() + 1;
        let mut free: Vec<u32> = (0..num_blocks as u32).collect();
        let mut cache = KvCache::new(shape, num_blocks).unwrap();
        // What lies beyond a context must never matter: stale slots hold NaN.
        let width = shape.num_kv_heads * shape.head_dim;
        let all_slots: Vec<u32> = (0..(num_blocks * shape.block_size) as u32).collect();
        let stale = vec![f32::NAN; all_slots.len() * width];
        for each in 0..shape.num_layers {
            cpu.write_kv(&mut cache, each, &stale, &stale, &all_slots);
        }
        let (mut tables, mut keys, mut values, mut queries) = (vec![], vec![], vec![], vec![]);
        for (&context, &num_blocks) in contexts.iter().zip(&blocks) {
            let table: Vec<u32> = (0..num_blocks).map(|_| free.swap_remove(random.below(free.len()))).collect();
            let k = random.vec(context * width);
            let v = random.vec(context * width);
            let slots = slots(&table, shape.block_size, 0..context);
            // Some layers are written before it and some after it: what one wrote in another's place would be found.
            for each in 0..shape.num_layers {
                if each == layer {
                    cpu.write_kv(&mut cache, each, &k, &v, &slots);
                } else {
                    let [k, v] = [(); 2].map(|()| others.vec(context * width));
                    cpu.write_kv(&mut cache, each, &k, &v, &slots);
                }
            }
            tables.push(table);
            keys.push(stored(&k, shape.dtype, shape.head_dim));
            values.push(stored(&v, shape.dtype, shape.head_dim));
            queries.push(random.vec(context * num_heads * shape.head_dim));
        }
        let unused_block = free[0];
        Self { cache, layer, num_heads, tables, unused_block, contexts: contexts.to_vec(), keys, values, queries }
    }

    /// What a window does to a sequence as it moves on: keys and values of these positions turn to NaN, and where a whole
    /// block lies before their end, the table names one that is not the sequence's.
    pub(crate) fn leave_behind(&mut self, cpu: &Cpu, i: usize, positions: std::ops::Range<usize>) {
        let left = positions.end / self.cache.shape().block_size;
        self.spoil(cpu, i, positions);
        self.tables[i][..left].fill(self.unused_block);
    }

    /// Keys and values of these positions of a sequence turn to NaN.
    pub(crate) fn spoil(&mut self, cpu: &Cpu, i: usize, positions: impl Iterator<Item = usize>) {
        let KvShape { num_kv_heads, head_dim, block_size, .. } = *self.cache.shape();
        let slots = slots(&self.tables[i], block_size, positions);
        let nan = vec![f32::NAN; slots.len() * num_kv_heads * head_dim];
        cpu.write_kv(&mut self.cache, self.layer, &nan, &nan, &slots);
    }

    /// Attention of the last `rows[i]` tokens of each sequence i, all in one call; one output a sequence.
    pub(crate) fn attend(&self, cpu: &Cpu, rows: &[usize], args: &bindery_kernels::AttentionArgs<'_>) -> Vec<Vec<f32>> {
        let width = self.num_heads * self.cache.shape().head_dim;
        let mut q = Vec::new();
        let mut sequences = Vec::new();
        for (i, &rows) in rows.iter().enumerate() {
            let start = q.len() / width;
            q.extend_from_slice(&self.queries[i][(self.contexts[i] - rows) * width..]);
            sequences.push(AttentionSequence {
                rows: start..start + rows,
                context_len: self.contexts[i],
                block_table: &self.tables[i],
            });
        }
        let mut out = vec![f32::NAN; q.len()];
        cpu.attention(&q, &self.cache, self.layer, &sequences, args, &mut out);
        sequences.iter().map(|s| out[s.rows.start * width..s.rows.end * width].to_vec()).collect()
    }

    /// Attention of positions `range` of sequence `i` alone, as a chunk of a prefill would compute it.
    pub(crate) fn attend_chunk(
        &self,
        cpu: &Cpu,
        i: usize,
        range: std::ops::Range<usize>,
        args: &bindery_kernels::AttentionArgs<'_>,
    ) -> Vec<f32> {
        let width = self.num_heads * self.cache.shape().head_dim;
        let q = &self.queries[i][range.start * width..range.end * width];
        let mut out = vec![f32::NAN; q.len()];
        let sequence = AttentionSequence { rows: 0..range.len(), context_len: range.end, block_table: &self.tables[i] };
        cpu.attention(q, &self.cache, self.layer, &[sequence], args, &mut out);
        out
    }
}

/// Where positions of a sequence lie in a cache.
fn slots(table: &[u32], block_size: usize, positions: impl Iterator<Item = usize>) -> Vec<u32> {
    positions.map(|p| table[p / block_size] * block_size as u32 + (p % block_size) as u32).collect()
}

/// Rows of heads as the cache gives them back.
fn stored(x: &[f32], dtype: KvDtype, head_dim: usize) -> Vec<f32> {
    match dtype {
        KvDtype::F32 => x.to_vec(),
        KvDtype::F16 => x.iter().map(|&x| f16::from_f32(x).to_f32()).collect(),
        KvDtype::Bf16 => x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect(),
        KvDtype::Int8 => x.chunks(head_dim).flat_map(|head| head.chunks(32)).flat_map(stored_in_int8).collect(),
    }
}

/// A group of a token's head in steps of a 127th of its largest magnitude, that step as a bf16.
fn stored_in_int8(group: &[f32]) -> Vec<f32> {
    let step = bf16::from_f32(group.iter().fold(0.0_f32, |max, x| max.max(x.abs())) / 127.0).to_f32();
    group.iter().map(|x| if step == 0.0 { 0.0 } else { (x / step).round() * step }).collect()
}
