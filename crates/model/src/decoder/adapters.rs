//! Which rows of a batch go through which adapter.
//!
//! It knows batches and the list of loaded adapters, not their weights. Invariant: runs ascend, do not overlap, and name
//! adapters that are there; rows of the plain base are in none.

use std::ops::Range;

use super::DecoderWeights;
use crate::{
    adapter::{
        AdapterTarget,
        weights::{BackendLoader, BaseForm, NUM_LAYER_TARGETS},
    },
    backend::{AdapterRun, Backend, FeedForwardKind, LoadedAdapter},
    batch::{ForwardBatch, violation},
    config::DecoderConfig,
    error::ModelError,
};

/// Sequences of one adapter that follow each other, as rows.
pub(super) fn runs<B: Backend>(
    batch: &ForwardBatch,
    loaded: &[LoadedAdapter<B>],
    runs: &mut Vec<AdapterRun>,
) -> Result<(), ModelError> {
    runs.clear();
    for (at, sequence) in batch.sequences.iter().enumerate() {
        let Some(id) = sequence.adapter else { continue };
        let Some(index) = loaded.iter().position(|adapter| adapter.id == id) else {
            return Err(violation(format!("sequence {at} names adapter {id}, which is not loaded")));
        };
        extend(runs, index, sequence.rows.clone());
    }
    Ok(())
}

/// The same of the rows kept for logits, counted among these.
pub(super) fn kept_runs(runs: &[AdapterRun], logit_rows: &[u32], kept: &mut Vec<AdapterRun>) {
    kept.clear();
    let mut ahead = runs.iter().peekable();
    for (at, &row) in logit_rows.iter().enumerate() {
        while ahead.next_if(|run| run.rows.end <= row as usize).is_some() {}
        if let Some(run) = ahead.peek().filter(|run| run.rows.contains(&(row as usize))) {
            extend(kept, run.index, at..at + 1);
        }
    }
}

/// The part of some runs that lies in `rows`, counted from its first.
pub(super) fn slice_runs(runs: &[AdapterRun], rows: &Range<usize>, slice: &mut Vec<AdapterRun>) {
    slice.clear();
    for run in runs {
        let common = run.rows.start.max(rows.start)..run.rows.end.min(rows.end);
        if !common.is_empty() {
            slice.push(AdapterRun { rows: common.start - rows.start..common.end - rows.start, index: run.index });
        }
    }
}

fn extend(runs: &mut Vec<AdapterRun>, index: usize, rows: Range<usize>) {
    match runs.last_mut() {
        Some(last) if last.index == index && last.rows.end == rows.start => last.rows.end = rows.end,
        _ => runs.push(AdapterRun { rows, index }),
    }
}

/// What reads adapters for these weights.
pub(super) fn loader<B: Backend>(config: &DecoderConfig, weights: &DecoderWeights<B>, backend: &B) -> BackendLoader<B> {
    BackendLoader {
        config: config.clone(),
        import: backend.adapter_import(),
        layer_forms: weights
            .layers
            .iter()
            .map(|layer| {
                let mut forms = [None; NUM_LAYER_TARGETS];
                let mut set = |target: AdapterTarget, matrix| forms[target as usize] = Some(B::base_form(matrix));
                let attention = &layer.attention;
                set(AdapterTarget::Query, &attention.q.weight);
                set(AdapterTarget::Key, &attention.k.weight);
                set(AdapterTarget::Value, &attention.v.weight);
                set(AdapterTarget::Output, &attention.o.weight);
                if let FeedForwardKind::Dense(mlp) = &layer.feed_forward.kind {
                    set(AdapterTarget::Up, &mlp.up.weight);
                    set(AdapterTarget::Down, &mlp.down.weight);
                    if let Some(gate) = &mlp.gate {
                        set(AdapterTarget::Gate, &gate.weight);
                    }
                }
                forms
            })
            .collect(),
        head_form: head_form(weights),
    }
}

fn head_form<B: Backend>(weights: &DecoderWeights<B>) -> BaseForm {
    B::base_form(weights.head.as_ref().unwrap_or(&weights.embedding))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(index: usize, rows: Range<usize>) -> AdapterRun {
        AdapterRun { rows, index }
    }

    #[test]
    fn kept_rows_and_slices_find_their_runs() {
        let runs = [run(1, 2..5), run(0, 5..6), run(1, 8..10)];
        let (mut kept, mut slice) = (Vec::new(), Vec::new());
        kept_runs(&runs, &[0, 3, 4, 5, 7, 9], &mut kept);
        assert_eq!(kept, [run(1, 1..3), run(0, 3..4), run(1, 5..6)]);
        slice_runs(&kept, &(2..6), &mut slice);
        assert_eq!(slice, [run(1, 0..1), run(0, 1..2), run(1, 3..4)]);
        slice_runs(&kept, &(4..5), &mut slice);
        assert_eq!(slice, []);
        kept_runs(&runs, &[], &mut kept);
        assert_eq!(kept, []);
    }
}
