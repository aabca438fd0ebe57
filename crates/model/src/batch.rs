//! One forward pass as plain data. The engine fills it from the scheduler's plan; this crate knows no scheduler.
//!
//! A batch comes from other code, so nothing in it is believed: [`BatchChecker`] holds it against the contract below
//! before a kernel sees an index of it. Invariant: a batch that passes addresses nothing outside the cache, the
//! vocabulary or its own vectors, and no two of its rows write one slot. Whether the adapters it names are there, the decoder
//! says.

use std::ops::Range;

use crate::error::ModelError;

/// Tokens of several sequences, computed together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForwardBatch {
    /// Token ids, `[num_tokens]`, sequences concatenated.
    pub tokens: Vec<u32>,
    /// Position of each token in its sequence, `[num_tokens]`; consecutive within a sequence.
    pub positions: Vec<u32>,
    /// KV slot each token is written to, `[num_tokens]`: `block * block_size + offset`, as the sequence's block table
    /// says for the token's position.
    pub slots: Vec<u32>,
    /// Block tables, concatenated.
    pub block_tables: Vec<u32>,
    /// The sequences, in the order of their tokens.
    pub sequences: Vec<BatchSequence>,
    /// Indices into `tokens` of the rows whose logits may be asked for afterwards, ascending.
    pub logit_rows: Vec<u32>,
}

/// One sequence of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchSequence {
    /// Its rows in `tokens`; at least one.
    pub rows: Range<usize>,
    /// Its blocks in `block_tables`; they cover `context_len` tokens.
    pub block_table: Range<usize>,
    /// Tokens in the cache once this batch is written: position of its last row + 1.
    pub context_len: usize,
    /// The length that decides its rotary frequencies, as [`crate::RopeRegimes::rope_len`] says; 0 for models where none
    /// does. The same for all tokens that a request has in the cache.
    pub rope_len: usize,
    /// The adapter its rows go through, by the number it was added under ([`crate::StepModel::add_adapter`]). Sequences of one
    /// adapter should follow each other: each run of them is computed by itself.
    pub adapter: Option<u32>,
}

impl ForwardBatch {
    /// Rows of the batch.
    pub fn num_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Empties the batch, keeping its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.block_tables.clear();
        self.sequences.clear();
        self.logit_rows.clear();
    }
}

/// What a batch may address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Block ids are below this.
    pub num_blocks: usize,
    /// Tokens a block holds; not 0.
    pub block_size: usize,
}

/// Holds batches against the contract of [`ForwardBatch`]. Keeps its scratch memory between batches.
#[derive(Debug)]
pub struct BatchChecker {
    limits: BatchLimits,
    sorted_slots: Vec<u32>,
}

impl BatchChecker {
    /// A checker for one cache.
    pub fn new(limits: BatchLimits) -> Self {
        Self { limits, sorted_slots: Vec::new() }
    }

    /// What it checks against.
    pub fn limits(&self) -> BatchLimits {
        self.limits
    }

    /// [`ModelError::Step`] names the first violation, its value and the limit.
    pub fn check(&mut self, batch: &ForwardBatch) -> Result<(), ModelError> {
        let num_tokens = batch.num_tokens();
        for (name, len) in [("positions", batch.positions.len()), ("slots", batch.slots.len())] {
            if len != num_tokens {
                return Err(violation(format!("`{name}` has {len} entries for {num_tokens} tokens")));
            }
        }
        let vocab_size = self.limits.vocab_size;
        if let Some(row) = batch.tokens.iter().position(|&token| token as usize >= vocab_size) {
            let token = batch.tokens[row];
            return Err(violation(format!("token {token} of row {row} is outside the vocabulary of {vocab_size}")));
        }
        self.check_sequences(batch)?;
        check_logit_rows(&batch.logit_rows, num_tokens)?;
        self.check_slots_are_distinct(&batch.slots)
    }

    /// (source, target) pairs of [`crate::StepModel::copy_blocks`].
    pub fn check_copies(&self, copies: &[(u32, u32)]) -> Result<(), ModelError> {
        let num_blocks = self.limits.num_blocks;
        for &(source, target) in copies {
            if source as usize >= num_blocks || target as usize >= num_blocks {
                return Err(violation(format!(
                    "copy of block {source} to {target}: the cache has {num_blocks} blocks"
                )));
            }
            if source == target {
                return Err(violation(format!("copy of block {source} to itself")));
            }
        }
        Ok(())
    }

    fn check_sequences(&self, batch: &ForwardBatch) -> Result<(), ModelError> {
        let mut num_covered_rows = 0;
        for (index, sequence) in batch.sequences.iter().enumerate() {
            let rows = &sequence.rows;
            if rows.start != num_covered_rows || rows.end <= rows.start || rows.end > batch.num_tokens() {
                return Err(violation(format!(
                    "sequence {index} has rows {rows:?}: they must start at {num_covered_rows}, not be empty and end within {} tokens",
                    batch.num_tokens()
                )));
            }
            num_covered_rows = rows.end;
            self.check_cache_addresses(batch, index, sequence)?;
        }
        if num_covered_rows != batch.num_tokens() {
            return Err(violation(format!("the sequences cover {num_covered_rows} of {} tokens", batch.num_tokens())));
        }
        Ok(())
    }

    fn check_cache_addresses(
        &self,
        batch: &ForwardBatch,
        index: usize,
        sequence: &BatchSequence,
    ) -> Result<(), ModelError> {
        let BatchLimits { num_blocks, block_size, .. } = self.limits;
        let BatchSequence { rows, block_table, context_len, rope_len: _, adapter: _ } = sequence;
        let Some(table) = batch.block_tables.get(block_table.clone()) else {
            return Err(violation(format!(
                "sequence {index} has the block table {block_table:?} of only {} entries",
                batch.block_tables.len()
            )));
        };
        if let Some(&block) = table.iter().find(|&&block| block as usize >= num_blocks) {
            return Err(violation(format!("sequence {index} names block {block}, the cache has {num_blocks} blocks")));
        }
        if rows.len() > *context_len || context_len.div_ceil(block_size) > table.len() {
            return Err(violation(format!(
                "sequence {index} has {} rows, a context of {context_len} tokens and {} blocks of {block_size}",
                rows.len(),
                table.len()
            )));
        }
        let first_position = context_len - rows.len();
        for (position, row) in (first_position..).zip(rows.clone()) {
            if batch.positions[row] as usize != position {
                let given = batch.positions[row];
                return Err(violation(format!(
                    "row {row} of sequence {index} has position {given}, its place in the context is {position}"
                )));
            }
            // Below 2^32: allocate_kv refuses a cache whose slots are not.
            let slot = table[position / block_size] as usize * block_size + position % block_size;
            if batch.slots[row] as usize != slot {
                let given = batch.slots[row];
                return Err(violation(format!(
                    "row {row} of sequence {index} is written to slot {given}, its block table says {slot}"
                )));
            }
        }
        Ok(())
    }

    fn check_slots_are_distinct(&mut self, slots: &[u32]) -> Result<(), ModelError> {
        self.sorted_slots.clear();
        self.sorted_slots.extend_from_slice(slots);
        self.sorted_slots.sort_unstable();
        match self.sorted_slots.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(violation(format!("slot {} is written by two rows", pair[0]))),
            None => Ok(()),
        }
    }
}

fn check_logit_rows(logit_rows: &[u32], num_tokens: usize) -> Result<(), ModelError> {
    if let Some([row, next]) = logit_rows.windows(2).find(|pair| pair[0] >= pair[1]) {
        return Err(violation(format!("logit row {row} comes before {next}: they must ascend")));
    }
    match logit_rows.last() {
        Some(&last) if last as usize >= num_tokens => {
            Err(violation(format!("logit row {last} of a batch of {num_tokens} tokens")))
        }
        _ => Ok(()),
    }
}

pub(crate) fn violation(mut what: String) -> ModelError {
    what.insert_str(0, "the batch breaks its contract: ");
    ModelError::Step(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: BatchLimits = BatchLimits { vocab_size: 100, num_blocks: 8, block_size: 4 };

    /// Two sequences: a chunk of 3 tokens after 4 computed ones (blocks 5, 2), and a first token (block 0).
    fn good() -> ForwardBatch {
        ForwardBatch {
            tokens: vec![7, 8, 9, 1],
            positions: vec![4, 5, 6, 0],
            slots: vec![8, 9, 10, 0],
            block_tables: vec![5, 2, 0],
            sequences: vec![
                BatchSequence { rows: 0..3, block_table: 0..2, context_len: 7, rope_len: 0, adapter: None },
                BatchSequence { rows: 3..4, block_table: 2..3, context_len: 1, rope_len: 0, adapter: None },
            ],
            logit_rows: vec![2, 3],
        }
    }

    fn check(break_it: impl FnOnce(&mut ForwardBatch)) -> Result<(), String> {
        let mut batch = good();
        break_it(&mut batch);
        BatchChecker::new(LIMITS).check(&batch).map_err(|error| error.to_string())
    }

    fn check_refused(expected: &str, break_it: impl FnOnce(&mut ForwardBatch)) {
        let message = check(break_it).expect_err(expected);
        assert!(message.contains(expected), "{message:?} should contain {expected:?}");
    }

    #[test]
    fn a_good_batch_and_an_empty_one_pass() {
        assert_eq!(check(|_| ()), Ok(()));
        assert_eq!(check(|batch| *batch = ForwardBatch::default()), Ok(()));
    }

    #[test]
    fn every_violation_is_named() {
        check_refused("`positions` has 3 entries", |batch| batch.positions.truncate(3));
        check_refused("`slots` has 5 entries", |batch| batch.slots.push(1));
        check_refused("token 100 of row 1", |batch| batch.tokens[1] = 100);
        check_refused("token 4294967295", |batch| batch.tokens[0] = u32::MAX);
        check_refused("sequence 1 has rows 2..4", |batch| batch.sequences[1].rows = 2..4);
        check_refused("sequence 1 has rows 3..3", |batch| batch.sequences[1].rows = 3..3);
        check_refused("sequence 1 has rows 3..9", |batch| batch.sequences[1].rows = 3..9);
        check_refused("cover 3 of 4", |batch| batch.sequences.truncate(1));
        check_refused("block table 2..9", |batch| batch.sequences[1].block_table = 2..9);
        #[allow(clippy::reversed_empty_ranges, reason = "a hostile range is the case")]
        {
            check_refused("block table 3..2", |batch| batch.sequences[1].block_table = 3..2);
            check_refused("rows 3..1", |batch| batch.sequences[1].rows = 3..1);
        }
        check_refused("names block 8", |batch| batch.block_tables[0] = 8);
        check_refused("a context of 9 tokens and 2 blocks", |batch| batch.sequences[0].context_len = 9);
        check_refused("a context of 18446744073709551615", |batch| batch.sequences[0].context_len = usize::MAX);
        check_refused("3 rows, a context of 2", |batch| batch.sequences[0].context_len = 2);
        check_refused("has position 5, its place in the context is 4", |batch| batch.positions[0] = 5);
        check_refused("slot 20, its block table says 8", |batch| batch.slots[0] = 20);
        check_refused("must ascend", |batch| batch.logit_rows = vec![3, 2]);
        check_refused("must ascend", |batch| batch.logit_rows = vec![2, 2]);
        check_refused("logit row 4 of a batch of 4", |batch| batch.logit_rows = vec![0, 4]);
        check_refused("slot 8 is written by two rows", |batch| {
            batch.block_tables[2] = 2;
            batch.slots[3] = 8;
        });
    }

    #[test]
    fn copies_stay_inside_the_cache() {
        let checker = BatchChecker::new(LIMITS);
        assert!(checker.check_copies(&[(0, 7), (7, 1)]).is_ok());
        for copies in [(0, 8), (8, 0), (3, 3)] {
            assert!(checker.check_copies(&[copies]).is_err(), "{copies:?}");
        }
    }
}
