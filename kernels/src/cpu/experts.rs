//! A mixture of experts: every row is computed by the few experts that a router chose for it.
//!
//! Rows are grouped by expert (a *segment* is one expert's rows), so that an expert's weights are read once for all of them,
//! and only the chosen ones' are. Four regions, however many experts there are: gather, gate and up, down, weighted sum.
//! It knows matrices and probabilities, not where they come from. Invariant: an expert's products are those of its rows
//! alone, and a row adds its experts in ascending order, so a row's result does not depend on its neighbours.

use std::ops::Range;

use super::Cpu;
use super::activations::{Activations, Form, Inputs};
use super::gated::{Call, GatedProduct, Projection};
use super::low_rank::copy_groups;
use super::pool::{SharedMut, share_of};
use super::task::Output;
use crate::matrix::Matrix;
use crate::quant_format::GROUP;

/// Elements that are worth waking another thread for.
const MIN_PIECE_ELEMENTS: usize = 16 * 1024;

/// How experts are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutingArgs {
    /// How many there are.
    pub num_experts: usize,
    /// How many compute a row; at most `num_experts`.
    pub num_chosen: usize,
    /// What a chosen one's output is multiplied with.
    pub shares: Shares,
}

/// What the outputs of chosen experts are multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shares {
    /// Their probabilities among all experts.
    OfAll,
    /// The same divided by the sum over the chosen ones.
    OfChosen,
}

/// One expert's matrices.
#[derive(Clone, Copy, Debug)]
pub struct ExpertWeights<'a> {
    /// To its width inside.
    pub product: GatedProduct<'a>,
    /// And back.
    pub down: Projection<'a>,
}

/// Who computes which rows, and what lies between the products; reused between steps. Buffers only grow.
#[derive(Debug, Default)]
pub struct Mixture {
    num_rows: usize,
    num_chosen: usize,
    /// Experts that have rows, ascending.
    segments: Vec<Segment>,
    /// The rows of all segments, one segment after the other, ascending in each: `[num_rows * num_chosen]`.
    rows: Vec<u32>,
    /// Where in `rows` each row stands, `[num_rows, num_chosen]`, its experts ascending.
    places: Vec<u32>,
    /// What the outputs there are multiplied with, likewise.
    weights: Vec<f32>,
    /// Chosen experts, likewise.
    chosen: Vec<u32>,
    /// Rows of each expert, `[num_experts]`; then where its next row goes.
    counts: Vec<u32>,
    gathered: Activations,
    gated: Activations,
    /// Of segments whose matrices want them otherwise: what gates (and later, down projections) read, and what up
    /// projections read where that is not the same.
    arranged: [Activations; 2],
    /// `[num_rows * num_chosen, outputs]`
    outputs: Vec<f32>,
}

/// An expert and its part of [`Mixture::rows`].
#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment {
    expert: usize,
    rows: Range<usize>,
}

impl Mixture {
    /// Chooses the likeliest experts of each row; among equals the lower number.
    fn choose(&mut self, probabilities: &[f32], num_rows: usize, args: &RoutingArgs) {
        let RoutingArgs { num_experts, num_chosen, shares } = *args;
        (self.num_rows, self.num_chosen) = (num_rows, num_chosen);
        let num_places = num_rows * num_chosen;
        for list in [&mut self.rows, &mut self.places, &mut self.chosen] {
            list.clear();
            list.resize(num_places, 0);
        }
        self.weights.clear();
        self.weights.resize(num_places, 0.0);
        self.counts.clear();
        self.counts.resize(num_experts, 0);
        for (row, probabilities) in probabilities.chunks_exact(num_experts).enumerate() {
            let places = row * num_chosen..(row + 1) * num_chosen;
            let chosen = &mut self.chosen[places.clone()];
            let weights = &mut self.weights[places];
            choose_row(probabilities, chosen);
            for (weight, &expert) in weights.iter_mut().zip(&*chosen) {
                *weight = probabilities[expert as usize];
                self.counts[expert as usize] += 1;
            }
            if shares == Shares::OfChosen {
                let sum: f32 = weights.iter().sum();
                for weight in weights.iter_mut() {
                    *weight /= sum;
                }
            }
        }
        self.group();
    }

    /// Counting sort of the rows by expert.
    fn group(&mut self) {
        self.segments.clear();
        self.segments.reserve(self.counts.len());
        let mut start = 0;
        for (expert, count) in self.counts.iter_mut().enumerate() {
            let len = std::mem::replace(count, start as u32) as usize;
            if len > 0 {
                self.segments.push(Segment { expert, rows: start..start + len });
            }
            start += len;
        }
        for (at, &expert) in self.chosen.iter().enumerate() {
            let place = &mut self.counts[expert as usize];
            self.rows[*place as usize] = (at / self.num_chosen) as u32;
            self.places[at] = *place;
            *place += 1;
        }
    }
}

/// The numbers of the largest probabilities, ascending. A row of NaN takes the first ones: its result says so.
fn choose_row(probabilities: &[f32], chosen: &mut [u32]) {
    for at in 0..chosen.len() {
        let (taken, rest) = chosen.split_at_mut(at);
        let mut best: Option<usize> = None;
        for (expert, probability) in probabilities.iter().enumerate() {
            let is_better = best.is_none_or(|best| *probability > probabilities[best]);
            if is_better && !taken.contains(&(expert as u32)) {
                best = Some(expert);
            }
        }
        rest[0] = best.expect("no more are chosen than there are") as u32;
    }
    chosen.sort_unstable();
}

/// Work on segments, divided into pieces: each segment's units (tiles, groups of outputs) into a number that goes with its
/// rows.
struct Pieces<'a, F> {
    segments: &'a [Segment],
    num_rows: usize,
    num_wanted: usize,
    units: F,
}

impl<F: Fn(usize) -> usize> Pieces<'_, F> {
    fn of(&self, segment: &Segment) -> usize {
        let num_units = (self.units)(segment.expert).max(1);
        (self.num_wanted * segment.rows.len() / self.num_rows).clamp(1, num_units)
    }

    fn total(&self) -> usize {
        self.segments.iter().map(|segment| self.of(segment)).sum()
    }

    /// A piece's segment and units.
    fn piece(&self, mut index: usize) -> (&Segment, Range<usize>) {
        for segment in self.segments {
            let num_pieces = self.of(segment);
            if index < num_pieces {
                let units = (self.units)(segment.expert);
                return (segment, share_of(units, num_pieces, index));
            }
            index -= num_pieces;
        }
        unreachable!("there are {} pieces", self.total())
    }
}

impl Cpu {
    /// Chooses experts by their `logits: [m, num_experts]`, which become probabilities.
    pub fn route(&self, logits: &mut [f32], args: &RoutingArgs, mixture: &mut Mixture) {
        let RoutingArgs { num_experts, num_chosen, .. } = *args;
        assert!((1..=num_experts).contains(&num_chosen), "{num_chosen} of {num_experts} experts");
        assert!(logits.len().is_multiple_of(num_experts), "{num_experts} experts in a buffer of {}", logits.len());
        for row in logits.chunks_exact_mut(num_experts) {
            self.softmax(row);
        }
        mixture.choose(logits, logits.len() / num_experts, args);
    }

    /// `out[row] += weight * down(gated product(x[row]))` of each of the row's experts, ascending, as the last
    /// [`Cpu::route`] chose. `out: [x.num_rows(), outputs]`; all experts have one shape.
    pub fn experts<'a>(
        &self,
        x: &Activations,
        mixture: &mut Mixture,
        expert: impl Fn(usize) -> ExpertWeights<'a> + Sync,
        out: &mut [f32],
    ) {
        let m = x.num_rows();
        assert_eq!(m, mixture.num_rows, "experts were chosen for another number of rows");
        if m == 0 {
            assert!(out.is_empty(), "no rows into a buffer of {}", out.len());
            return;
        }
        let width = out.len() / m;
        assert_eq!(out.len(), m * width, "{m} rows in a buffer of {}", out.len());
        self.gather(x, mixture, &expert);
        self.gate_segments(mixture, &expert);
        self.down_segments(mixture, &expert, width);
        self.sum_experts(mixture, out);
    }

    /// Each segment's rows by themselves.
    fn gather<'a>(&self, x: &Activations, mixture: &mut Mixture, expert: &impl Fn(usize) -> ExpertWeights<'a>) {
        let Mixture { segments, rows, gathered, .. } = mixture;
        let first_products = segments.iter().flat_map(|segment| {
            let GatedProduct { gate, up, .. } = expert(segment.expert).product;
            [Some(gate.weights), up.map(|up| up.weights)].into_iter().flatten()
        });
        let (x, columns) = (x.inputs(), self.kernels.columns);
        let out = gathered.reshape(rows.len(), x.cols(), Form::of(first_products), columns);
        let copy = |segment: &Segment| {
            let out = out.segment(segment.rows.clone(), columns);
            for (to, &from) in rows[segment.rows.clone()].iter().enumerate() {
                let from = from as usize;
                if let Some(rows) = &out.rows {
                    // SAFETY: every row is one task's.
                    let to = unsafe { rows.slice(to * x.cols()..(to + 1) * x.cols()) };
                    to.copy_from_slice(&x.rows()[from * x.cols()..(from + 1) * x.cols()]);
                }
                copy_groups(&x, from, &out, to);
            }
        };
        if rows.len() * x.cols() < 2 * MIN_PIECE_ELEMENTS {
            segments.iter().for_each(copy);
        } else {
            self.pool.run(segments.len(), |index| copy(&segments[index]));
        }
    }

    /// Gate, up and activation of every segment.
    fn gate_segments<'a>(&self, mixture: &mut Mixture, expert: &(impl Fn(usize) -> ExpertWeights<'a> + Sync)) {
        let Mixture { segments, rows, gathered, gated, arranged: [arranged, arranged_up], .. } = mixture;
        let columns = self.kernels.columns;
        let first = expert(segments[0].expert).product;
        let cols = first.gate.weights.rows();
        for segment in &*segments {
            let product = expert(segment.expert).product;
            assert_eq!(product.gate.weights.rows(), cols, "experts differ in width");
            self.check_gated(&gathered.segment(segment.rows.clone(), columns), &product);
        }
        let gate = |index: usize| Some(expert(index).product.gate.weights);
        // What wants the same as the gate reads the gate's.
        let other_up = |index: usize| {
            let GatedProduct { gate, up, .. } = expert(index).product;
            up.map(|up| up.weights).filter(|up| up.arrangement() != gate.weights.arrangement())
        };
        self.arrange_segments(gathered, segments, gate, arranged);
        self.arrange_segments(gathered, segments, other_up, arranged_up);
        let form = Form::of(segments.iter().map(|segment| expert(segment.expert).down.weights));
        let out = gated.reshape(rows.len(), cols, form, columns);
        let num_wanted = self.pieces_for(rows.len() * first.macs());
        let pieces = Pieces { segments, num_rows: rows.len(), num_wanted, units: |_| cols.div_ceil(GROUP) };
        self.run_pieces(&pieces, |segment, groups| {
            let product = expert(segment.expert).product;
            let x = self.segment_inputs(gathered, arranged, segment, product.gate.weights);
            let up_x = other_up(segment.expert).map_or(x, |up| self.segment_inputs(gathered, arranged_up, segment, up));
            let out = out.segment(segment.rows.clone(), columns);
            self.gated_groups(&Call { x, up_x, product, addends: None, out }, groups);
        });
    }

    /// Down projections of every segment.
    fn down_segments<'a>(
        &self,
        mixture: &mut Mixture,
        expert: &(impl Fn(usize) -> ExpertWeights<'a> + Sync),
        width: usize,
    ) {
        let Mixture { segments, rows, gated, outputs, arranged: [arranged, _], .. } = mixture;
        let columns = self.kernels.columns;
        for segment in &*segments {
            let Projection { weights, bias } = expert(segment.expert).down;
            self.check(&gated.segment(segment.rows.clone(), columns), weights);
            assert_eq!(weights.rows(), width, "an expert of {} outputs into rows of {width}", weights.rows());
            assert!(bias.is_none_or(|bias| bias.len() == width), "a bias of another length than {width}");
        }
        self.arrange_segments(gated, segments, |index| Some(expert(index).down.weights), arranged);
        let len = rows.len() * width;
        // What is left over from earlier is overwritten.
        outputs.resize(outputs.len().max(len), 0.0);
        let outputs = SharedMut::new(&mut outputs[..len]);
        let num_macs = len * gated.cols();
        let num_wanted = self.pieces_for(num_macs);
        let tiles = |index: usize| width.div_ceil(self.tile_rows(expert(index).down.weights));
        let pieces = Pieces { segments, num_rows: rows.len(), num_wanted, units: tiles };
        self.run_pieces(&pieces, |segment, tiles| {
            let Projection { weights, bias } = expert(segment.expert).down;
            let x = self.segment_inputs(gated, arranged, segment, weights);
            let elements = outputs.part(segment.rows.start * width..segment.rows.end * width);
            let out = Output { elements, stride: width, first_m: 0, rows: 0..width, bias, accumulate: false };
            self.tiles(&x, weights, tiles, 0..x.panels().num_panels(), &out);
        });
    }

    /// Rows of those segments whose matrix wants them otherwise than they come.
    fn arrange_segments<'a>(
        &self,
        x: &Activations,
        segments: &[Segment],
        matrix: impl Fn(usize) -> Option<&'a Matrix> + Sync,
        out: &mut Activations,
    ) {
        let wanted = |segment: &Segment| matrix(segment.expert).and_then(Matrix::arrangement);
        if segments.iter().all(|segment| wanted(segment).is_none()) {
            return;
        }
        let (k, columns) = (x.cols(), self.kernels.columns);
        let out = self.room_for_arranged(x.num_rows(), k, out);
        let arrange = |segment: &Segment| {
            if let Some(wanted) = wanted(segment) {
                let out = out.segment(segment.rows.clone(), columns);
                for (to, row) in segment.rows.clone().enumerate() {
                    self.arrange_row(&x.rows()[row * k..(row + 1) * k], wanted, to, &out);
                }
            }
        };
        if x.num_rows() * k < 2 * MIN_PIECE_ELEMENTS {
            segments.iter().for_each(arrange);
        } else {
            self.pool.run(segments.len(), |index| arrange(&segments[index]));
        }
    }

    /// What a segment's matrix reads.
    fn segment_inputs<'x>(
        &self,
        x: &'x Activations,
        arranged: &'x Activations,
        segment: &Segment,
        weights: &Matrix,
    ) -> Inputs<'x> {
        let source = if weights.arrangement().is_some() { arranged } else { x };
        source.segment(segment.rows.clone(), self.kernels.columns)
    }

    fn run_pieces<F: Fn(usize) -> usize + Sync>(
        &self,
        pieces: &Pieces<'_, F>,
        run: impl Fn(&Segment, Range<usize>) + Sync,
    ) {
        let task = |index| {
            let (segment, units) = pieces.piece(index);
            run(segment, units);
        };
        if pieces.num_wanted <= 1 || self.threads() == 1 {
            (0..pieces.total()).for_each(task);
        } else {
            self.pool.run(pieces.total(), task);
        }
    }

    /// Adds each row's outputs, weighted.
    fn sum_experts(&self, mixture: &Mixture, out: &mut [f32]) {
        let Mixture { num_rows, num_chosen, places, weights, outputs, .. } = mixture;
        let width = out.len() / num_rows;
        let out = SharedMut::new(out);
        self.split(*num_rows, MIN_PIECE_ELEMENTS.div_ceil((width * num_chosen).max(1)), |piece| {
            for row in piece {
                // SAFETY: pieces have disjoint rows.
                let out = unsafe { out.slice(row * width..(row + 1) * width) };
                let own = row * num_chosen..(row + 1) * num_chosen;
                for (&place, &weight) in places[own.clone()].iter().zip(&weights[own]) {
                    let place = place as usize;
                    self.add_scaled(out, &outputs[place * width..(place + 1) * width], weight);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(probabilities: &[f32], num_rows: usize, num_chosen: usize, shares: Shares) -> Mixture {
        let args = RoutingArgs { num_experts: probabilities.len() / num_rows, num_chosen, shares };
        let mut mixture = Mixture::default();
        mixture.choose(probabilities, num_rows, &args);
        mixture
    }

    #[test]
    fn rows_are_grouped_by_expert() {
        let mixture = choose(&[0.1, 0.6, 0.3, 0.0, 0.5, 0.1, 0.4, 0.0], 2, 2, Shares::OfAll);
        let segment = |expert, rows| Segment { expert, rows };
        assert_eq!(mixture.segments, [segment(0, 0..1), segment(1, 1..2), segment(2, 2..4)]);
        assert_eq!(mixture.rows, [1, 0, 0, 1]);
        assert_eq!(mixture.places, [1, 2, 0, 3]);
        assert_eq!(mixture.weights, [0.6, 0.3, 0.5, 0.4]);
        let mixture = choose(&[0.25, 0.0, 0.75, 0.0], 1, 2, Shares::OfChosen);
        assert_eq!(mixture.weights, [0.25, 0.75]);
        let mixture = choose(&[0.125, 0.25, 0.125, 0.5], 1, 2, Shares::OfChosen);
        assert_eq!((mixture.chosen, mixture.weights), (vec![1, 3], vec![0.25 / 0.75, 0.5 / 0.75]));
    }

    #[test]
    fn among_equals_the_lower_number_is_chosen_and_nan_breaks_nothing() {
        assert_eq!(choose(&[0.2, 0.3, 0.3, 0.2], 1, 3, Shares::OfAll).chosen, [0, 1, 2]);
        assert_eq!(choose(&[0.25; 4], 1, 2, Shares::OfAll).chosen, [0, 1]);
        let mixture = choose(&[f32::NAN; 4], 1, 2, Shares::OfChosen);
        assert_eq!(mixture.chosen, [0, 1]);
        assert!(mixture.weights.iter().all(|weight| weight.is_nan()));
    }
}
