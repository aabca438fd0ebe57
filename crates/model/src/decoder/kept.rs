//! Which rows go on past the last layer's keys and values: those whose logits may be asked for. Nobody reads the others.
//!
//! It knows batches alone. Invariant: runs follow the batch's sequences, and number the kept rows as they lie once the others
//! are gone.

use crate::batch::{BatchSequence, ForwardBatch};

/// The kept rows as sequences: one for each run of neighbours, whose context ends at its last row.
pub(super) fn sequences(batch: &ForwardBatch, kept: &mut Vec<BatchSequence>) {
    kept.clear();
    let mut rows = batch.logit_rows.iter().map(|&row| row as usize).enumerate().peekable();
    for sequence in &batch.sequences {
        let mut expected = None;
        while let Some((at, row)) = rows.next_if(|(_, row)| sequence.rows.contains(row)) {
            let context_len = sequence.context_len - (sequence.rows.end - 1 - row);
            match kept.last_mut() {
                Some(run) if expected == Some(row) => (run.rows.end, run.context_len) = (at + 1, context_len),
                _ => kept.push(BatchSequence { rows: at..at + 1, context_len, ..sequence.clone() }),
            }
            expected = Some(row + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    fn sequence(rows: Range<usize>, block_table: Range<usize>, context_len: usize) -> BatchSequence {
        BatchSequence { rows, block_table, context_len, rope_len: 7, adapter: Some(3) }
    }

    #[test]
    fn each_run_of_kept_rows_ends_its_context_where_its_last_row_stands() {
        let mut batch = ForwardBatch {
            tokens: vec![0; 9],
            sequences: vec![sequence(0..4, 0..3, 10), sequence(4..5, 3..4, 1), sequence(5..9, 4..6, 4)],
            ..ForwardBatch::default()
        };
        let mut kept = Vec::new();
        let mut kept_of = |logit_rows: &[u32]| {
            batch.logit_rows = logit_rows.to_vec();
            sequences(&batch, &mut kept);
            kept.clone()
        };
        assert_eq!(kept_of(&[3]), [sequence(0..1, 0..3, 10)]);
        assert_eq!(
            kept_of(&[0, 1, 3, 4, 5, 7, 8]),
            [
                sequence(0..2, 0..3, 8),
                sequence(2..3, 0..3, 10),
                sequence(3..4, 3..4, 1),
                sequence(4..5, 4..6, 1),
                sequence(5..7, 4..6, 4),
            ]
        );
        assert_eq!(kept_of(&[]), []);
    }
}
