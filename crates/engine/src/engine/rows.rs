//! From the scheduler's plan to the model's batch, and to the list of rows whose logits are wanted.
//!
//! A translation between two vocabularies of plain data; it decides nothing but which rows of a scored prompt are
//! still missing. Its invariant: `logit_rows` of the batch and `rows` here have the same length and order.

use std::ops::Range;

use bindery_model::{BatchSequence, ForwardBatch, RopeRegimes};
use bindery_scheduler::{LogitsWanted, StepPlan};

use super::live::{LiveRequests, key_of};

/// One row of logits of the step, and who wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogitRow {
    /// The request it belongs to.
    pub(crate) key: u64,
    /// Index of the prompt token that this row predicts, where its log-probability is wanted.
    pub(crate) scored_prompt_index: Option<usize>,
    /// Who samples from it, in [`StepPlan::samples`].
    pub(crate) samples: Range<usize>,
}

/// The length that a request's rotary frequencies go by.
pub(crate) fn rope_len(regimes: Option<RopeRegimes>, num_prompt_tokens: usize, num_known_tokens: usize) -> usize {
    regimes.map_or(0, |regimes| regimes.rope_len(num_prompt_tokens, num_known_tokens))
}

/// Fills `batch` and `rows` from `plan`, keeping their memory, and that of `order_room`.
pub(crate) fn fill(
    plan: &StepPlan,
    requests: &LiveRequests,
    regimes: Option<RopeRegimes>,
    batch: &mut ForwardBatch,
    rows: &mut Vec<LogitRow>,
    order_room: &mut Vec<usize>,
) {
    batch.tokens.clear();
    batch.positions.clear();
    batch.slots.clear();
    batch.block_tables.clear();
    batch.block_tables.extend(plan.block_tables.iter().map(|block| block.0));
    batch.sequences.clear();
    batch.logit_rows.clear();
    rows.clear();
    // Sequences of one adapter follow each other, those of the plain base come first; what a row gives does not depend on
    // where it stands.
    let mut order = std::mem::take(order_room);
    order.clear();
    order.extend(0..plan.sequences.len());
    if plan.sequences.iter().any(|sequence| sequence.adapter.is_some()) {
        order.sort_by_key(|&index| plan.sequences[index].adapter.map(|adapter| adapter.0));
    }
    for sequence in order.iter().map(|&index| &plan.sequences[index]) {
        let planned = sequence.tokens.clone();
        let tokens = batch.tokens.len()..batch.tokens.len() + planned.len();
        batch.tokens.extend(plan.tokens[planned.clone()].iter().map(|token| token.0));
        batch.positions.extend_from_slice(&plan.positions[planned.clone()]);
        batch.slots.extend(plan.slots[planned].iter().map(|slot| slot.0));
        batch.sequences.push(BatchSequence {
            rows: tokens.clone(),
            block_table: sequence.block_table.clone(),
            context_len: sequence.num_computed_tokens + tokens.len(),
            rope_len: rope_len(regimes, sequence.num_prompt_tokens, sequence.num_known_tokens),
            adapter: sequence.adapter.map(|adapter| adapter.0),
        });
        let key = key_of(sequence.id);
        let mut push = |row: usize, scored_prompt_index, samples| {
            batch.logit_rows.push(row as u32);
            rows.push(LogitRow { key, scored_prompt_index, samples });
        };
        let last = tokens.end - 1;
        match sequence.logits {
            LogitsWanted::None => {}
            LogitsWanted::Last => push(last, None, sequence.samples.clone()),
            LogitsWanted::All { .. } => {
                let missing = requests.missing_prompt_scores(key);
                for row in tokens.clone() {
                    // A row predicts the token after it.
                    let predicted = sequence.num_computed_tokens + (row - tokens.start) + 1;
                    let scored_prompt_index = missing.contains(&predicted).then_some(predicted);
                    let samples = if row == last { sequence.samples.clone() } else { 0..0 };
                    if scored_prompt_index.is_some() || !samples.is_empty() {
                        push(row, scored_prompt_index, samples);
                    }
                }
            }
        }
    }
    *order_room = order;
}
