//! A step no larger than one before allocates nothing: asserted with an allocator that counts.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{alloc::System, path::Path};

use bindery_model::{BackendKind, BatchSequence, ForwardBatch, LoadOptions, Model, Quantize, StepModel as _};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const BLOCK_SIZE: usize = 16;
const BLOCKS_EACH: usize = 6;

/// Four sequences that decode and one whose prompt comes in chunks of eight.
fn batch(step: usize) -> ForwardBatch {
    let mut batch = ForwardBatch::default();
    for sequence in 0..5 {
        let (first, count) = if sequence == 4 { (8 * step, 8) } else { (40 + step, 1) };
        let start = batch.tokens.len();
        let table_start = batch.block_tables.len();
        batch.block_tables.extend((0..BLOCKS_EACH).map(|block| (sequence * BLOCKS_EACH + block) as u32));
        for position in first..first + count {
            batch.tokens.push((7 * position + sequence) as u32 % 90);
            batch.positions.push(position as u32);
            batch.slots.push((sequence * BLOCKS_EACH * BLOCK_SIZE + position) as u32);
        }
        batch.logit_rows.push(batch.tokens.len() as u32 - 1);
        batch.sequences.push(BatchSequence {
            rows: start..batch.tokens.len(),
            block_table: table_start..batch.block_tables.len(),
            context_len: first + count,
            rope_len: 0,
            adapter: None,
        });
    }
    batch
}

#[test]
fn a_step_allocates_nothing_after_the_first_of_its_size() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/checkpoints/tiny-llama");
    for quantize in [Quantize::None, Quantize::Int8, Quantize::Int4] {
        // One thread: which worker first meets a piece of work is chance, and each makes room for its own.
        let options =
            LoadOptions { threads: Some(1), block_size: BLOCK_SIZE, quantize, ..LoadOptions::new(BackendKind::Cpu) };
        let mut model = Model::load(&path, &options, &mut |_, _| ()).unwrap();
        model.allocate_kv(5 * BLOCKS_EACH).unwrap();
        let mut logits = vec![0.0; 5 * model.vocab_size()];
        let batches: Vec<ForwardBatch> = (0..12).map(batch).collect();
        for (step, batch) in batches.iter().enumerate() {
            let region = Region::new(ALLOCATOR);
            model.forward(batch, &mut |_| ()).unwrap();
            model.logits(0..5, &mut logits).unwrap();
            let change = region.change();
            let num_allocations = change.allocations + change.reallocations;
            // The longest context meets one more span of scratch only beyond 512 tokens; all here are within one.
            assert!(step < 2 || num_allocations == 0, "{quantize:?}: step {step} allocated {num_allocations} times");
        }
        assert!(logits.iter().all(|logit| logit.is_finite()));
    }
}
