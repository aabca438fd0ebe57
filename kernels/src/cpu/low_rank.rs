//! Products of low rank beside those of a base matrix: `out += up (down x)` for the rows of one adapter, `out += ...` of
//! another's for the next rows, in one go (LoRA, arXiv:2106.09685; segments of rows as in Punica, arXiv:2310.18547).
//!
//! It knows rows, matrices and buffers, not adapters or layers. The first half of all segments is one parallel region; the
//! second half belongs to the base product's: a piece adds it to its own outputs while they are in the caches. Rows that no
//! segment names are neither read nor written.
//! Invariant: what a row gets depends on its own segment's matrices alone, not on where the row stands or on who else is
//! there.

use std::ops::Range;

use super::activations::{Activations, Form, Inputs};
use super::matmul::MIN_PIECE_MACS;
use super::pool::SharedMut;
use super::task::{ActivationsOut, Output, Panels};
use super::{Cpu, PIECES_PER_THREAD};
use crate::matrix::{DENSE_TILE_ROWS, Matrix};

/// `x -> up (down x)`.
#[derive(Clone, Copy, Debug)]
pub struct LowRankPair<'a> {
    /// `[rank, inputs]`, dense or quantised, of inputs as they come.
    pub down: &'a Matrix,
    /// `[outputs, rank]`, dense.
    pub up: &'a Matrix,
}

/// Rows that share their pairs: one for each of N products that read the same activations.
#[derive(Clone, Debug)]
pub struct LowRankSegment<'a, const N: usize> {
    /// Rows of the activations.
    pub rows: Range<usize>,
    /// None: nothing is added to that product.
    pub pairs: [Option<LowRankPair<'a>>; N],
}

/// What lies between the halves; reused between calls. Buffers only grow.
#[derive(Debug, Default)]
pub struct LowRank {
    /// Rows of quantised activations, segment by segment.
    gathered: Activations,
    /// What the first halves give, one `[rows, rank]` after the other.
    inner: Vec<f32>,
    /// Where in `inner` the one of each segment and product begins, `[segments, N]`.
    places: Vec<usize>,
}

/// Second halves, which N products of as many rows as the activations had are to add: what [`Cpu::low_rank_down`] gives.
#[derive(Clone, Copy, Debug)]
pub struct Addends<'a, const N: usize> {
    segments: &'a [LowRankSegment<'a, N>],
    low_rank: &'a LowRank,
}

impl LowRank {
    /// What a first half gave, as the second reads it.
    fn inputs(&self, place: usize, num_rows: usize, rank: usize) -> Inputs<'_> {
        Inputs::dense(num_rows, rank, &self.inner[place..place + num_rows * rank])
    }
}

impl<const N: usize> Addends<'_, N> {
    /// Panics where a pair has more or fewer outputs than the product it is for.
    pub(super) fn check(&self, product: usize, outputs: usize) {
        for pair in self.segments.iter().filter_map(|segment| segment.pairs[product]) {
            let met = pair.up.rows();
            assert_eq!(met, outputs, "a pair of {met} outputs beside a matrix of {outputs}");
        }
    }

    /// Adds to the outputs `cols` of the rows `rows`, which are the calling task's, what their segments have for product
    /// number `product`.
    pub(super) fn add(&self, cpu: &Cpu, product: usize, rows: &Range<usize>, cols: &Range<usize>, out: &Output<'_>) {
        for (index, segment) in self.segments.iter().enumerate() {
            let common = segment.rows.start.max(rows.start)..segment.rows.end.min(rows.end);
            let Some(pair) = segment.pairs[product].filter(|_| !common.is_empty()) else { continue };
            let rank = pair.up.cols();
            let first = self.low_rank.places[index * N + product] + (common.start - segment.rows.start) * rank;
            let x = self.low_rank.inputs(first, common.len(), rank);
            let start = out.index(common.start, cols.start);
            let elements = out.elements.part(start..start + (common.len() - 1) * out.stride + cols.len());
            let out = Output { elements, first_m: 0, rows: cols.clone(), bias: None, accumulate: true, ..*out };
            let tiles = cols.start / DENSE_TILE_ROWS..cols.end.div_ceil(DENSE_TILE_ROWS);
            cpu.tiles(&x, pair.up, tiles, 0..x.panels().num_panels(), &out);
        }
    }
}

/// The first half of a pair for a segment's rows.
struct Job<'a> {
    x: Inputs<'a>,
    weights: &'a Matrix,
    out: Output<'a>,
}

/// Jobs divided into pieces of tiles by the work in them.
struct Jobs<'a, F> {
    cpu: &'a Cpu,
    len: usize,
    /// None: there is nothing to do.
    job: F,
}

impl<'a, F: Fn(usize) -> Option<Job<'a>> + Sync> Jobs<'a, F> {
    fn run(&self) {
        let macs = |job: &Job<'_>| job.x.num_rows() * job.weights.rows() * job.weights.cols();
        let jobs = || (0..self.len).filter_map(&self.job);
        let total: usize = jobs().map(|job| macs(&job)).sum();
        let num_wanted = (self.cpu.threads() * PIECES_PER_THREAD).min(total / MIN_PIECE_MACS);
        if num_wanted <= 1 || self.cpu.threads() == 1 {
            for job in jobs() {
                self.tiles(&job, 0..self.num_tiles(&job));
            }
            return;
        }
        let num_pieces = |job: &Job<'_>| (num_wanted * macs(job) / total).clamp(1, self.num_tiles(job).max(1));
        self.cpu.pool.run(jobs().map(|job| num_pieces(&job)).sum(), |mut index| {
            for job in jobs() {
                let num_pieces = num_pieces(&job);
                if index < num_pieces {
                    let tiles = self.num_tiles(&job);
                    return self.tiles(&job, index * tiles / num_pieces..(index + 1) * tiles / num_pieces);
                }
                index -= num_pieces;
            }
        });
    }

    fn num_tiles(&self, job: &Job<'_>) -> usize {
        job.weights.rows().div_ceil(self.cpu.tile_rows(job.weights))
    }

    fn tiles(&self, job: &Job<'_>, tiles: Range<usize>) {
        self.cpu.tiles(&job.x, job.weights, tiles, 0..job.x.panels().num_panels(), &job.out);
    }
}

impl Cpu {
    /// The first halves: `down x` of every segment and product, kept in `low_rank`. Segments ascend and do not overlap.
    /// What comes back is for the products of the same activations.
    pub fn low_rank_down<'a, const N: usize>(
        &self,
        x: &Activations,
        segments: &'a [LowRankSegment<'a, N>],
        low_rank: &'a mut LowRank,
    ) -> Addends<'a, N> {
        let LowRank { gathered, inner, places } = &mut *low_rank;
        let len = self.place(x, segments, places);
        // What is left over from earlier is overwritten.
        inner.resize(inner.len().max(len), 0.0);
        let is_quantized = |pair: &LowRankPair<'_>| pair.down.is_quantized();
        let has_quantized = segments.iter().flat_map(|segment| segment.pairs.iter().flatten()).any(is_quantized);
        // One segment of all rows finds its panels as they are.
        let is_whole = |segment: &LowRankSegment<'_, N>| segment.rows == (0..x.num_rows());
        let first = segments.first().map_or(0, |segment| segment.rows.start);
        if has_quantized && !segments.iter().all(is_whole) {
            self.gather_segments(x, segments, first, gathered);
        }
        let (gathered, elements) = (&*gathered, SharedMut::new(&mut inner[..len]));
        Jobs {
            cpu: self,
            len: segments.len() * N,
            job: |index: usize| {
                let segment = &segments[index / N];
                let weights = segment.pairs[index % N]?.down;
                let x = match weights {
                    _ if is_whole(segment) => x.inputs(),
                    Matrix::Quantized(_) => {
                        gathered.segment(segment.rows.start - first..segment.rows.end - first, self.kernels.columns)
                    }
                    _ => {
                        let values = &x.rows()[segment.rows.start * x.cols()..segment.rows.end * x.cols()];
                        Inputs::dense(segment.rows.len(), x.cols(), values)
                    }
                };
                let (rank, place) = (weights.rows(), places[index]);
                let elements = elements.part(place..place + segment.rows.len() * rank);
                let out = Output { elements, stride: rank, first_m: 0, rows: 0..rank, bias: None, accumulate: false };
                Some(Job { x, weights, out })
            },
        }
        .run();
        Addends { segments, low_rank }
    }

    /// Checks the segments and says where their first halves go; how long all are.
    fn place<const N: usize>(
        &self,
        x: &Activations,
        segments: &[LowRankSegment<'_, N>],
        places: &mut Vec<usize>,
    ) -> usize {
        places.clear();
        let (mut len, mut end) = (0, 0);
        for segment in segments {
            let rows = &segment.rows;
            assert!(
                end <= rows.start && rows.start <= rows.end && rows.end <= x.num_rows(),
                "a segment of rows {rows:?} after row {end}, of {} rows",
                x.num_rows()
            );
            end = rows.end;
            for pair in &segment.pairs {
                places.push(len);
                let Some(LowRankPair { down, up }) = pair else { continue };
                self.check(&x.inputs(), down);
                assert!(down.arrangement().is_none(), "the first half of a pair reads its inputs as they come");
                assert!(!up.is_quantized(), "the second half of a pair is dense");
                assert_eq!(down.rows(), up.cols(), "a pair of rank {} and {}", down.rows(), up.cols());
                len += rows.len() * down.rows();
            }
        }
        len
    }

    /// The int8 groups of each segment's rows by themselves, as if there were no others.
    fn gather_segments<const N: usize>(
        &self,
        x: &Activations,
        segments: &[LowRankSegment<'_, N>],
        first: usize,
        gathered: &mut Activations,
    ) {
        let (x, columns) = (x.inputs(), self.kernels.columns);
        let num_rows = segments.last().map_or(0, |segment| segment.rows.end - first);
        let out = gathered.reshape(num_rows, x.cols(), Form::Int8, columns);
        for segment in segments {
            let out = out.segment(segment.rows.start - first..segment.rows.end - first, columns);
            for (to, from) in segment.rows.clone().enumerate() {
                copy_groups(&x, from, &out, to);
            }
        }
    }
}

/// A row's int8 groups from where they lie to a place among others.
pub(super) fn copy_groups(x: &Inputs<'_>, from: usize, out: &ActivationsOut, to: usize) {
    let Some(groups) = out.groups_of(to, 0) else { return };
    let x = x.quantized_rows();
    for group in 0..x.panels.groups {
        // SAFETY: every row is one task's.
        unsafe { groups.set(group, *x.group(from, group)) };
    }
}

impl<'a> Inputs<'a> {
    /// Rows in f32.
    fn dense(num_rows: usize, cols: usize, rows: &'a [f32]) -> Self {
        Self { num_rows, cols, form: Form::F32, panels: Panels::new(num_rows, 0, num_rows.max(1)), rows, groups: &[] }
    }
}
