//! Products of low rank beside those of a base matrix: `out += up (down x)` for the rows of one adapter, `out += ...` of
//! another's for the next rows, in one go (LoRA, arXiv:2106.09685; segments of rows as in Punica, arXiv:2310.18547).
//!
//! It knows rows, matrices and buffers, not adapters or layers. Both halves belong to the base product's parallel region: the
//! first pieces of it are those of the first half, and a piece of the base adds the second half to its own outputs while they
//! are in the caches; it waits until the first half is there, which others have begun before it. So a step has no region more
//! for its adapters, and nobody idles between the halves. Rows that no segment names are neither read nor written.
//! Invariant: what a row gets depends on its own segment's matrices alone, not on where the row stands or on who else is
//! there.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Cpu;
use super::activations::{Activations, Form, Inputs};
use super::pool::{SharedMut, share_of, wait_until};
use super::task::{ActivationsOut, Output, Panels, QuantRows, SPARE_GROUPS};
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

/// What N products of the same activations are to add: what [`Cpu::low_rank`] gives. Nothing of it is computed yet.
pub struct Addends<'a, const N: usize> {
    segments: &'a [LowRankSegment<'a, N>],
    x: Inputs<'a>,
    /// Of the segments whose rows share a panel of `x` with others.
    gathered: &'a Activations,
    /// Of the activations: the one that comes first in `gathered`.
    first_gathered: usize,
    inner: SharedMut<f32>,
    places: &'a [usize],
    num_pieces: usize,
    /// Multiply-adds of all first halves.
    macs: usize,
    num_done: AtomicUsize,
}

impl<const N: usize> std::fmt::Debug for Addends<'_, N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Addends").field("segments", &self.segments).finish_non_exhaustive()
    }
}

/// The first half of a pair for a segment's rows.
struct Job<'a> {
    /// The segment's rows alone.
    x: Inputs<'a>,
    weights: &'a Matrix,
    out: Output<'a>,
}

impl Job<'_> {
    fn macs(&self) -> usize {
        self.x.num_rows() * self.weights.rows() * self.weights.cols()
    }

    fn num_tiles(&self, cpu: &Cpu) -> usize {
        self.weights.rows().div_ceil(cpu.tile_rows(self.weights))
    }

    fn run(&self, cpu: &Cpu, tiles: Range<usize>) {
        cpu.tiles(&self.x, self.weights, tiles, 0..self.x.panels().num_panels(), &self.out);
    }
}

/// Counts a piece of the first half as done, also where it unwinds: nobody shall wait for it then.
struct Done<'a>(&'a AtomicUsize);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Release);
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

    /// A piece of the first half.
    fn run_piece(&self, cpu: &Cpu, mut piece: usize) {
        let _done = Done(&self.num_done);
        for job in self.jobs(cpu) {
            let (num_tiles, num_pieces) = (job.num_tiles(cpu), self.pieces_of(cpu, &job));
            if self.num_pieces == 1 {
                job.run(cpu, 0..num_tiles);
            } else if piece < num_pieces {
                return job.run(cpu, share_of(num_tiles, num_pieces, piece));
            } else {
                piece -= num_pieces;
            }
        }
    }

    fn pieces_of(&self, cpu: &Cpu, job: &Job<'_>) -> usize {
        let num_wanted = cpu.pieces_for(self.macs);
        (num_wanted * job.macs() / self.macs.max(1)).clamp(1, job.num_tiles(cpu).max(1))
    }

    fn jobs(&self, cpu: &Cpu) -> impl Iterator<Item = Job<'_>> {
        let columns = cpu.kernels.columns;
        (0..self.segments.len() * N).filter_map(move |index| {
            let segment = &self.segments[index / N];
            let weights = segment.pairs[index % N]?.down;
            let (rank, place) = (weights.rows(), self.places[index]);
            let elements = self.inner.part(place..place + segment.rows.len() * rank);
            let out = Output { elements, stride: rank, first_m: 0, rows: 0..rank, bias: None, accumulate: false };
            Some(Job { x: self.inputs(&segment.rows, weights, columns), weights, out })
        })
    }

    /// A segment's rows, as such a matrix reads them; panels have `columns` rows at most.
    fn inputs(&self, rows: &Range<usize>, weights: &Matrix, columns: usize) -> Inputs<'_> {
        let x = &self.x;
        match weights {
            Matrix::Quantized(_) => x.whole_panels(rows).unwrap_or_else(|| {
                let rows = rows.start - self.first_gathered..rows.end - self.first_gathered;
                self.gathered.segment(rows, columns)
            }),
            _ => Inputs::dense(rows.len(), x.cols(), &x.rows()[rows.start * x.cols()..rows.end * x.cols()]),
        }
    }

    /// Adds to the outputs `cols` of the rows `rows`, which are the calling task's, what their segments have for product
    /// number `product`. All pieces of the first half have been begun.
    pub(super) fn add(&self, cpu: &Cpu, product: usize, rows: &Range<usize>, cols: &Range<usize>, out: &Output<'_>) {
        wait_until(|| self.num_done.load(Ordering::Acquire) >= self.num_pieces);
        for (index, segment) in self.segments.iter().enumerate() {
            let common = segment.rows.start.max(rows.start)..segment.rows.end.min(rows.end);
            let Some(pair) = segment.pairs[product].filter(|_| !common.is_empty()) else { continue };
            let rank = pair.up.cols();
            let first = self.places[index * N + product] + (common.start - segment.rows.start) * rank;
            // SAFETY: nobody writes it any more: the first half is done.
            let inner = unsafe { self.inner.read(first..first + common.len() * rank) };
            let x = Inputs::dense(common.len(), rank, inner);
            let start = out.index(common.start, cols.start);
            let elements = out.elements.part(start..start + (common.len() - 1) * out.stride + cols.len());
            let out = Output { elements, first_m: 0, rows: cols.clone(), bias: None, accumulate: true, ..*out };
            let tiles = cols.start / DENSE_TILE_ROWS..cols.end.div_ceil(DENSE_TILE_ROWS);
            cpu.tiles(&x, pair.up, tiles, 0..x.panels().num_panels(), &out);
        }
    }
}

impl Cpu {
    /// Products of low rank of `x`, for [`Cpu::matmul_all`] and its like, which compute them: `low_rank` is room for what lies
    /// between. Segments ascend and do not overlap.
    pub fn low_rank<'a, const N: usize>(
        &self,
        x: &'a Activations,
        segments: &'a [LowRankSegment<'a, N>],
        low_rank: &'a mut LowRank,
    ) -> Addends<'a, N> {
        let LowRank { gathered, inner, places } = low_rank;
        let len = self.place(x, segments, places);
        // What is left over from earlier is overwritten.
        inner.resize(inner.len().max(len), 0.0);
        let (x, first_gathered) = (x.inputs(), segments.first().map_or(0, |segment| segment.rows.start));
        let is_quantized = |pair: &LowRankPair<'_>| pair.down.is_quantized();
        let must_gather = |segment: &LowRankSegment<'_, N>| {
            segment.pairs.iter().flatten().any(is_quantized) && x.whole_panels(&segment.rows).is_none()
        };
        if segments.iter().any(must_gather) {
            self.gather_segments(&x, segments.iter().filter(|segment| must_gather(segment)), first_gathered, gathered);
        }
        let inner = SharedMut::new(&mut inner[..len]);
        let num_done = AtomicUsize::new(0);
        let mut addends =
            Addends { segments, x, gathered, first_gathered, inner, places, num_pieces: 1, macs: 0, num_done };
        addends.macs = addends.jobs(self).map(|job| job.macs()).sum();
        if self.pieces_for(addends.macs) > 1 {
            addends.num_pieces = addends.jobs(self).map(|job| addends.pieces_of(self, &job)).sum();
        }
        addends
    }

    /// Runs the pieces of a product, those of the first half of what is added to it before all others: in one parallel region,
    /// unless the product is one piece, which no other thread is worth.
    pub(super) fn run_beside<const N: usize>(
        &self,
        addends: Option<&Addends<'_, N>>,
        num_pieces: usize,
        piece: impl Fn(usize) + Sync,
    ) {
        let num_first = addends.map_or(0, |addends| addends.num_pieces);
        let run = |index: usize| match addends {
            Some(addends) if index < num_first => addends.run_piece(self, index),
            _ => piece(index - num_first),
        };
        if num_pieces == 1 {
            return (0..=num_first).for_each(run);
        }
        self.pool.run_in_two(num_first, num_pieces, run);
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

    /// The int8 groups of these segments' rows, each by themselves, as if there were no others.
    fn gather_segments<'a, const N: usize>(
        &self,
        x: &Inputs<'_>,
        segments: impl Iterator<Item = &'a LowRankSegment<'a, N>>,
        first: usize,
        gathered: &mut Activations,
    ) {
        let columns = self.kernels.columns;
        let out = gathered.reshape(x.num_rows() - first, x.cols(), Form::Int8, columns);
        for segment in segments {
            let out = out.segment(segment.rows.start - first..segment.rows.end - first, columns);
            for (to, from) in segment.rows.clone().enumerate() {
                copy_groups(x, from, &out, to);
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
        unsafe { groups.set(group, x.group(from, group)) };
    }
}

impl<'a> Inputs<'a> {
    /// Rows in f32.
    fn dense(num_rows: usize, cols: usize, rows: &'a [f32]) -> Self {
        let panels = Panels::new(num_rows, 0, num_rows.max(1));
        Self { num_rows, cols, form: Form::F32, rows, groups: QuantRows { panels, codes: &[], scales: &[] } }
    }

    /// The int8 groups of some rows where they lie; none if they share a panel with others.
    fn whole_panels(&self, rows: &Range<usize>) -> Option<Self> {
        let QuantRows { panels, codes, scales } = self.quantized_rows();
        let part = panels.part(rows)?;
        let range = rows.start * panels.groups..rows.end * panels.groups + SPARE_GROUPS;
        let groups = QuantRows { panels: part, codes: &codes[range.clone()], scales: &scales[range] };
        Some(Self { num_rows: rows.len(), cols: self.cols, form: Form::Int8, rows: &[], groups })
    }
}
