//! Which format each matrix gets when a folder may take so many bits a weight (`bindery quantize --bits-per-weight`).
//!
//! Every matrix starts with the fewest bits; then the step that takes most off the expected loss for its bytes is taken
//! again and again, until no step fits. What a step takes off is measured on some rows of the matrix: its relative squared
//! error, times how much of the logits' noise the matrix stands for, [`share`].
//!
//! Tried: errors weighed by a text's inputs for the choice, too. Inputs that go together make outputs larger than their mean
//! squares say, most of all attention's, which got bits that the head needed: SmolLM2-135M in 6.17 bits, calibrated, had a KL
//! divergence of 0.032 instead of 0.021 (0.0438 instead of 0.0426 with noise on its weights).
//!
//! It must not know how rows are quantised or written. Its invariant: the same source and bits give the same choice, whatever
//! the number of threads, and what is chosen takes no more than was asked for.

use std::ops::Range;

use super::checkpoint::{Chunk, Form, Planned};
use crate::{
    ModelError,
    weights::{
        LayerTensor, TensorRole, TensorView, WeightStore,
        quantize::{self, Effort, RowQuantizer},
    },
};

/// What to choose by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mix {
    /// Over all tensors, scales counted.
    pub(super) bits_per_weight: f64,
    pub(super) threads: usize,
}

/// Rows that are looked at: so many pieces of so many rows, spread over the matrix. Of 128 rows of 576 inputs the relative
/// error is known to a percent, and formats are a factor of four apart.
const PIECES: usize = 8;
const PIECE_ROWS: usize = 16;

/// A matrix in one of its formats.
#[derive(Clone, Copy, Debug)]
struct Rung {
    form: Form,
    bytes: u64,
    loss: f64,
}

/// Gives every quantised matrix of `plan` its format. `stopped` is asked between matrices.
///
/// # Errors
/// Bits that the smallest formats do not fit in; rows that hold what cannot be quantised; a stop.
pub(super) fn choose(
    plan: &mut [Planned<'_>],
    store: &WeightStore,
    mix: Mix,
    stopped: &mut dyn FnMut() -> bool,
) -> Result<(), ModelError> {
    let num_parameters: u64 = plan.iter().map(|planned| planned.view.num_elements()).sum();
    let num_bits = |bytes: u64| bytes as f64 * 8.0 / num_parameters.max(1) as f64;
    let mut ladders = Vec::new();
    let mut dense_bytes = 0;
    for (index, planned) in plan.iter_mut().enumerate() {
        if stopped() {
            return Err(ModelError::Step("quantising was stopped".to_owned()));
        }
        if matches!(planned.form, Form::Quantized(_)) {
            ladders.push((index, ladder(planned, store, mix)?));
        } else {
            dense_bytes += planned.num_bytes();
        }
    }
    let rungs: Vec<&[Rung]> = ladders.iter().map(|(_, ladder)| ladder.as_slice()).collect();
    let budget = (mix.bits_per_weight / 8.0 * num_parameters as f64) as u64;
    let Some(chosen) = climb(&rungs, budget.saturating_sub(dense_bytes)) else {
        let least = dense_bytes + rungs.iter().map(|ladder| ladder[0].bytes).sum::<u64>();
        let what = format!(
            "{} bits a weight were asked for, and the smallest formats take {:.3} here; ask for more",
            mix.bits_per_weight,
            num_bits(least)
        );
        return Err(ModelError::unsupported(store.path(), what));
    };
    for ((index, ladder), rung) in ladders.iter().zip(chosen) {
        plan[*index].form = ladder[rung].form;
    }
    Ok(())
}

/// Index of the rung of each ladder, within `budget` bytes; none where the lowest rungs do not fit. Rungs cost more and lose
/// less from one to the next, and less for a byte.
fn climb(ladders: &[&[Rung]], budget: u64) -> Option<Vec<usize>> {
    let mut left = budget.checked_sub(ladders.iter().map(|ladder| ladder[0].bytes).sum())?;
    let mut chosen = vec![0; ladders.len()];
    loop {
        // Where the best does not fit, a smaller one may. What is exact already needs no more bits.
        let steps = ladders.iter().zip(&chosen).enumerate().filter_map(|(index, (ladder, &at))| {
            let (now, next) = (ladder[at], ladder.get(at + 1)?);
            let cost = next.bytes.saturating_sub(now.bytes);
            let gain = (now.loss - next.loss) / cost.max(1) as f64;
            (cost <= left && gain > 0.0).then_some((index, cost, gain))
        });
        // The first of equals.
        let best = steps.reduce(|best, step| if step.2 > best.2 { step } else { best });
        let Some((index, cost, _)) = best else { return Some(chosen) };
        chosen[index] += 1;
        left -= cost;
    }
}

/// A matrix in each of its formats, the smallest first.
fn ladder(planned: &mut Planned<'_>, store: &WeightStore, mix: Mix) -> Result<Vec<Rung>, ModelError> {
    let share = share(planned.role, store);
    let mut ladder = Vec::new();
    for format in quantize::formats(planned.view.cols) {
        let quantizer = RowQuantizer::new(format, None, Effort::Search);
        planned.form = Form::Quantized(format);
        let loss = share * relative_error(&planned.view, &quantizer, mix.threads)?;
        ladder.push(Rung { form: planned.form, bytes: planned.num_bytes(), loss });
    }
    Ok(ladder)
}

/// How much of the logits' noise comes of a matrix whose outputs have a relative error of one.
///
/// The head's error is theirs. The stream of residuals that comes before it is the sum of what two blocks a layer add to it,
/// each about as much, so a matrix of a block has half of a layer's part. That was found to hold: on SmolLM2-135M (60 blocks) the
/// KL divergence fell by 18 for a unit of the head's relative error, by 0.24 for one of a matrix in a layer (1 / 75), by 0.44 for
/// one of the values, whose error comes out as it is, where that of queries and keys is softened.
fn share(role: TensorRole, store: &WeightStore) -> f64 {
    use LayerTensor as T;
    let config = store.config();
    let block = 1.0 / (2 * config.num_layers()) as f64;
    match role {
        TensorRole::Head => 1.0,
        TensorRole::Embedding if config.tied_embeddings => 1.0,
        TensorRole::Layer(_, T::V) => 2.0 * block,
        TensorRole::Layer(_, T::ExpertGate(_) | T::ExpertUp(_) | T::ExpertDown(_)) => {
            block / config.experts.as_ref().map_or(1, |experts| experts.num_experts.max(1)) as f64
        }
        _ => block,
    }
}

/// Of some rows.
fn relative_error(view: &TensorView<'_>, quantizer: &RowQuantizer, threads: usize) -> Result<f64, ModelError> {
    let chunks = Chunk::quantized_each(view, &pieces(view.rows), quantizer, threads)?;
    let sum = |of: fn(&Chunk) -> f64| chunks.iter().map(of).sum::<f64>();
    let (error, squares) = (sum(|chunk| chunk.squared_error), sum(|chunk| chunk.squared));
    Ok(if squares > 0.0 { error / squares } else { 0.0 })
}

/// Some rows of so many: all of few.
fn pieces(rows: usize) -> Vec<Range<usize>> {
    if rows <= PIECES * PIECE_ROWS {
        return (0..rows).step_by(PIECE_ROWS).map(|start| start..(start + PIECE_ROWS).min(rows)).collect();
    }
    let start = |piece: usize| piece * (rows - PIECE_ROWS) / (PIECES - 1);
    (0..PIECES).map(|piece| start(piece)..start(piece) + PIECE_ROWS).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests; clippy only knows a plain cfg(test)")]
    use proptest::prelude::*;

    use super::*;

    /// Costs and losses of what is above the first rung, as steps.
    fn ladders() -> impl Strategy<Value = Vec<Vec<Rung>>> {
        let ladder = prop::collection::vec((1u64..50, 0.0f64..0.9), 2).prop_map(|steps| {
            let mut ladder = vec![Rung { form: Form::Dense, bytes: 10, loss: 1.0 }];
            for (cost, kept) in steps {
                let last = ladder[ladder.len() - 1];
                ladder.push(Rung { bytes: last.bytes + cost, loss: last.loss * kept, ..last });
            }
            ladder
        });
        prop::collection::vec(ladder, 1..5)
    }

    fn sums(ladders: &[&[Rung]], chosen: &[usize]) -> (u64, f64) {
        let rungs = || ladders.iter().zip(chosen).map(|(ladder, &rung)| ladder[rung]);
        (rungs().map(|rung| rung.bytes).sum(), rungs().map(|rung| rung.loss).sum())
    }

    proptest! {
        /// Against every choice there is: none that fits can lose less by more than one step, which is what taking steps by
        /// their gain for a byte can miss.
        #[test]
        fn a_choice_fits_and_is_within_a_step_of_the_best(ladders in ladders(), extra in 0u64..400) {
            let ladders: Vec<&[Rung]> = ladders.iter().map(Vec::as_slice).collect();
            // The bound is one of convex ladders.
            prop_assume!(ladders.iter().all(|ladder| {
                let gain = |at: usize| {
                    (ladder[at].loss - ladder[at + 1].loss) / (ladder[at + 1].bytes - ladder[at].bytes) as f64
                };
                gain(0) >= gain(1)
            }));
            let budget = 10 * ladders.len() as u64 + extra;
            let chosen = climb(&ladders, budget).unwrap();
            let (bytes, loss) = sums(&ladders, &chosen);
            prop_assert!(bytes <= budget);
            let mut best = f64::INFINITY;
            for number in 0..3usize.pow(ladders.len() as u32) {
                let choice: Vec<usize> = (0..ladders.len()).map(|i| number / 3usize.pow(i as u32) % 3).collect();
                let (bytes, loss) = sums(&ladders, &choice);
                if bytes <= budget {
                    best = best.min(loss);
                }
            }
            let largest_step = ladders.iter().flat_map(|ladder| ladder.windows(2)).map(|step| step[0].loss - step[1].loss);
            let largest_step = largest_step.fold(0.0, f64::max);
            prop_assert!(loss <= best + largest_step + 1e-12, "{loss} {best}");
        }
    }

    #[test]
    fn nothing_is_chosen_where_the_lowest_rungs_do_not_fit() {
        let ladder = [Rung { form: Form::Dense, bytes: 10, loss: 1.0 }];
        assert_eq!(climb(&[&ladder, &ladder], 19), None);
        assert_eq!(climb(&[&ladder, &ladder], 20), Some(vec![0, 0]));
    }

    #[test]
    fn bits_are_not_spent_on_what_is_exact_already() {
        let exact = [10, 12].map(|bytes| Rung { form: Form::Dense, bytes, loss: 0.0 });
        let other = [(10, 1.0), (50, 0.5)].map(|(bytes, loss)| Rung { form: Form::Dense, bytes, loss });
        assert_eq!(climb(&[&exact, &other], 100), Some(vec![0, 1]));
    }

    #[test]
    fn rows_that_are_looked_at_are_spread_and_within_the_matrix() {
        for rows in [1, 15, 16, 17, 127, 128, 129, 130, 1000, 100_003] {
            let pieces = pieces(rows);
            assert_eq!(pieces[0].start, 0);
            assert_eq!(pieces.last().unwrap().end, rows);
            assert!(pieces.windows(2).all(|pair| pair[0].end <= pair[1].start), "{rows}: {pieces:?}");
            assert_eq!(pieces.iter().map(Range::len).sum::<usize>(), rows.min(PIECES * PIECE_ROWS));
        }
    }
}
