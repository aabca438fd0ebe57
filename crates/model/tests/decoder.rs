//! A row's result does not depend on its neighbours, its chunk, its blocks or the threads: held as equality of bits on
//! the `cpu` backend and within a tolerance on `reference`. And a batch that breaks its contract does no harm.

#![allow(clippy::unwrap_used, reason = "tests")]

mod decoder_harness;

use bindery_model::{
    BackendKind, BatchSequence, ForwardBatch, KvCacheDtype, LoadOptions, Model, ModelError, StepModel,
};
use decoder_harness::{CHECKPOINTS, Harness, Row, Sequence, checkpoint, default_model, kl_divergence, log_softmax};
use proptest::{prelude::*, strategy::ValueTree as _, test_runner::TestRunner};

const NUM_BLOCKS: usize = 64;

/// candle's products may sum in another order for another number of rows.
const REFERENCE_TOLERANCE: f64 = 1e-4;

fn options(backend: BackendKind, threads: usize) -> LoadOptions {
    LoadOptions { block_size: 4, threads: Some(threads), ..LoadOptions::new(backend) }
}

fn tokens(len: usize, seed: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * i * 31 + i * 17 + seed * 41 + 3) % 97) as u32).collect()
}

/// A permutation of the blocks that puts neighbours far apart.
fn scattered() -> Vec<u32> {
    (0..NUM_BLOCKS as u32).map(|i| (i * 23 + 40) % NUM_BLOCKS as u32).collect()
}

fn check_same(backend: BackendKind, what: &str, expected: &[(usize, Row)], actual: &[(usize, Row)]) {
    assert_eq!(expected.len(), actual.len(), "{what}");
    for ((position, expected), (_, actual)) in expected.iter().zip(actual) {
        match backend {
            // Equal bits, not merely equal values: -0 and NaN count.
            BackendKind::Cpu => {
                let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(expected), bits(actual), "{what}: position {position}");
            }
            BackendKind::Reference => {
                for (a, b) in log_softmax(expected).iter().zip(log_softmax(actual)) {
                    assert!((a - b).abs() < REFERENCE_TOLERANCE, "{what}: position {position}: {a} and {b}");
                }
            }
        }
    }
}

/// One prompt, alone and whole: what everything else must equal.
fn alone(name: &str, backend: BackendKind, prompt: &[u32]) -> Vec<(usize, Row)> {
    let mut harness = Harness::load(&checkpoint(name), &options(backend, 1), NUM_BLOCKS);
    harness.prefill(&mut Sequence::new(prompt), usize::MAX, |_| true)
}

#[test]
fn chunks_blocks_and_threads_change_no_row() {
    let prompt = tokens(45, 1);
    for backend in [BackendKind::Cpu, BackendKind::Reference] {
        for name in CHECKPOINTS {
            let expected = alone(name, backend, &prompt);
            for threads in [1, 2, 3] {
                for chunk in [1, 7, 16, 45] {
                    let options = options(backend, threads);
                    let mut harness = Harness::with_blocks(&checkpoint(name), &options, NUM_BLOCKS, scattered());
                    let rows = harness.prefill(&mut Sequence::new(&prompt), chunk, |_| true);
                    check_same(backend, &format!("{name}, {threads} threads, chunks of {chunk}"), &expected, &rows);
                }
            }
        }
    }
}

#[test]
fn block_size_changes_no_row() {
    let prompt = tokens(45, 1);
    for backend in [BackendKind::Cpu, BackendKind::Reference] {
        for name in CHECKPOINTS {
            let expected = alone(name, backend, &prompt);
            for block_size in [1, 5, 16, 64] {
                let options = LoadOptions { block_size, ..options(backend, 2) };
                let mut harness = Harness::load(&checkpoint(name), &options, NUM_BLOCKS);
                let rows = harness.prefill(&mut Sequence::new(&prompt), 16, |_| true);
                check_same(backend, &format!("{name}, blocks of {block_size}"), &expected, &rows);
            }
        }
    }
}

/// Prompts computed together, by turns of `chunks` tokens (each sequence takes the next of the list): the wanted rows of each.
fn together(
    harness: &mut Harness,
    prompts: &[Vec<u32>],
    chunks: &[usize],
    wanted: impl Fn(usize) -> bool,
) -> Vec<Vec<(usize, Row)>> {
    let mut sequences: Vec<_> = prompts.iter().map(|prompt| Sequence::new(prompt)).collect();
    let mut rows: Vec<Vec<(usize, Row)>> = vec![Vec::new(); sequences.len()];
    let mut chunks = chunks.iter().cycle();
    while sequences.iter().any(|sequence| sequence.num_uncomputed_tokens() > 0) {
        let (mut work, mut who) = (Vec::new(), Vec::new());
        for (index, sequence) in sequences.iter_mut().enumerate() {
            let num_tokens = (*chunks.next().unwrap()).min(sequence.num_uncomputed_tokens());
            if num_tokens > 0 {
                work.push((sequence, num_tokens));
                who.push(index);
            }
        }
        for (sequence, position, row) in harness.step(&mut work, &wanted) {
            rows[who[sequence]].push((position, row));
        }
    }
    for sequence in sequences {
        harness.free(sequence);
    }
    rows
}

/// Sequences of `lengths`, each as if it were alone. Logits are asked for at every so-many-th position.
fn check_batched(name: &str, backend: BackendKind, threads: usize, lengths: &[usize], chunks: &[usize], every: usize) {
    let wanted = |position| position % every == every - 1;
    let mut harness = Harness::with_blocks(&checkpoint(name), &options(backend, threads), NUM_BLOCKS, scattered());
    let prompts: Vec<_> = lengths.iter().enumerate().map(|(seed, &len)| tokens(len, seed)).collect();
    let rows = together(&mut harness, &prompts, chunks, wanted);
    for (seed, (prompt, rows)) in prompts.iter().zip(&rows).enumerate() {
        let mut expected = alone(name, backend, prompt);
        expected.retain(|(position, _)| wanted(*position));
        check_same(backend, &format!("{name}, sequence {seed} of {lengths:?}"), &expected, rows);
    }
}

#[test]
fn neighbours_change_no_row() {
    for backend in [BackendKind::Cpu, BackendKind::Reference] {
        for name in CHECKPOINTS {
            check_batched(name, backend, 2, &[45, 3, 1, 30, 17], &[16, 1, 1, 9, 4], 1);
            check_batched(name, backend, 1, &[8; 9], &[1], 1);
        }
    }
}

/// The last layer computes those rows alone whose logits are asked for.
#[test]
fn rows_that_nobody_asks_for_change_no_other() {
    let prompt = tokens(45, 1);
    for backend in [BackendKind::Cpu, BackendKind::Reference] {
        for name in CHECKPOINTS {
            let expected = alone(name, backend, &prompt);
            let some: [fn(usize) -> bool; 4] = [
                |position| position == 44,
                |position| position < 5 || position == 20,
                |position| position % 3 == 1,
                |position| position != 30,
            ];
            for (index, wanted) in some.into_iter().enumerate() {
                for chunk in [16, 45] {
                    let mut harness = Harness::load(&checkpoint(name), &options(backend, 2), NUM_BLOCKS);
                    let rows = harness.prefill(&mut Sequence::new(&prompt), chunk, wanted);
                    let mut expected = expected.clone();
                    expected.retain(|(position, _)| wanted(*position));
                    check_same(backend, &format!("{name}, rows {index}, chunks of {chunk}"), &expected, &rows);
                }
            }
        }
    }
}

/// More under `cargo xtask test --full`.
fn num_cases(usual: u32, full: u32) -> u32 {
    if std::env::var_os("BINDERY_TEST_FULL").is_some() { full } else { usual }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: num_cases(24, 400), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_composition_of_batches_changes_a_row(
        lengths in proptest::collection::vec(1_usize..40, 1..6),
        chunks in proptest::collection::vec(1_usize..20, 1..8),
        checkpoint in 0..CHECKPOINTS.len(),
        threads in 1_usize..4,
        every in 1_usize..5,
    ) {
        check_batched(CHECKPOINTS[checkpoint], BackendKind::Cpu, threads, &lengths, &chunks, every);
    }
}

/// Prompts from one token to several chunks of context, chunks from one token to all of a prompt, caches of every width.
#[test]
fn no_composition_of_batches_changes_a_row_of_the_default_model() {
    const BLOCKS: u32 = 240;
    // Beyond 512 keys attention is computed in spans.
    const LONGEST: usize = 600;
    let Some(path) = default_model("default model, bits alone, chunked and batched") else { return };
    let wanted: fn(usize) -> bool = |position| position % 8 == 5;
    let lengths = proptest::collection::vec(prop_oneof![1_usize..24, 24..LONGEST], 1..7);
    let chunk = prop_oneof![3 => 1_usize..2, 1 => 2_usize..13, 1 => 13_usize..100, 1 => LONGEST..LONGEST + 1];
    let compositions = (lengths, proptest::collection::vec(chunk, 1..9));
    let mut runner = TestRunner::deterministic();
    for (index, kv_cache_dtype) in
        [KvCacheDtype::Auto, KvCacheDtype::F32, KvCacheDtype::Bf16, KvCacheDtype::Int8].into_iter().enumerate()
    {
        let load = |threads| {
            let options = LoadOptions { threads: Some(threads), kv_cache_dtype, ..LoadOptions::new(BackendKind::Cpu) };
            let order = (0..BLOCKS).map(|i| (i * 23 + 40) % BLOCKS).collect();
            Harness::with_blocks(&path, &options, BLOCKS as usize, order)
        };
        let (mut single, mut harness) = (load(1), load(2 + index % 2));
        for _ in 0..num_cases(1, 25) {
            let (lengths, chunks) = compositions.new_tree(&mut runner).unwrap().current();
            let start = lengths.iter().sum::<usize>() as u32;
            let token = |who: usize, i: usize| 100 + (start + (i * i * 37 + i * 11 + who * 991) as u32) % 40_000;
            // Half of them begin alike, as prompts with a system turn do.
            let prompt =
                |(who, &len): (usize, &usize)| (0..len).map(|i| token(if i < 20 { who % 2 } else { who }, i)).collect();
            let prompts: Vec<Vec<u32>> = lengths.iter().enumerate().map(prompt).collect();
            let rows = together(&mut harness, &prompts, &chunks, wanted);
            for (who, (prompt, rows)) in prompts.iter().zip(&rows).enumerate() {
                let mut sequence = Sequence::new(prompt);
                let expected = single.prefill(&mut sequence, usize::MAX, wanted);
                single.free(sequence);
                let what = format!("{kv_cache_dtype:?}, sequence {who} of {lengths:?} in chunks of {chunks:?}");
                check_same(BackendKind::Cpu, &what, &expected, rows);
            }
        }
    }
}

#[test]
fn a_copied_block_continues_like_its_source() {
    let prompt = tokens(11, 2);
    let (continuation, other) = (tokens(6, 3), tokens(6, 4));
    for backend in [BackendKind::Cpu, BackendKind::Reference] {
        for name in CHECKPOINTS {
            let mut harness = Harness::with_blocks(&checkpoint(name), &options(backend, 2), NUM_BLOCKS, scattered());
            let mut first = Sequence::new(&prompt);
            harness.prefill(&mut first, 8, |_| true);
            // The fork shares the full blocks (0 to 7) and owns a copy of the last, which both then write to.
            let mut fork = first.clone();
            let copy = harness.take_block();
            harness.model.copy_blocks(&[(fork.block_table[2], copy)]).unwrap();
            fork.block_table[2] = copy;
            first.tokens.extend(&continuation);
            fork.tokens.extend(&other);
            let (mut first_rows, mut fork_rows) = (Vec::new(), Vec::new());
            while first.num_uncomputed_tokens() > 0 {
                for (who, position, row) in harness.step(&mut [(&mut first, 1), (&mut fork, 1)], |_| true) {
                    [&mut first_rows, &mut fork_rows][who].push((position, row));
                }
            }
            for (rows, tail) in [(&first_rows, &continuation), (&fork_rows, &other)] {
                let expected = alone(name, backend, &[prompt.as_slice(), tail].concat());
                check_same(backend, name, &expected[prompt.len()..], rows);
            }
        }
    }
}

#[test]
fn a_chain_of_copies_runs_in_order() {
    let prompt = tokens(4, 5);
    for backend in [BackendKind::Cpu, BackendKind::Reference] {
        let mut harness = Harness::load(&checkpoint("tiny-llama"), &options(backend, 1), NUM_BLOCKS);
        let mut sequence = Sequence::new(&[prompt.as_slice(), &[9, 8]].concat());
        harness.step(&mut [(&mut sequence, 4)], |_| false);
        let source = sequence.block_table[0];
        harness.model.copy_blocks(&[(source, 50), (50, 51), (51, 52)]).unwrap();
        sequence.block_table[0] = 52;
        let rows: Vec<_> =
            harness.step(&mut [(&mut sequence, 2)], |_| true).into_iter().map(|(_, p, row)| (p, row)).collect();
        let expected = alone("tiny-llama", backend, &sequence.tokens);
        check_same(backend, "the copy of a copy", &expected[4..], &rows);
    }
}

#[test]
fn narrower_caches_stay_near_the_f32_one() {
    // Random weights with sharp scores amplify a rounding. Measured worst row: f16 8.5e-6, bf16 6.5e-4.
    for (kv_cache_dtype, tolerance) in [(KvCacheDtype::F16, 1e-4), (KvCacheDtype::Bf16, 5e-3)] {
        for name in CHECKPOINTS {
            let rows = |kv_cache_dtype| {
                let options = LoadOptions { kv_cache_dtype, ..options(BackendKind::Cpu, 2) };
                let mut harness = Harness::load(&checkpoint(name), &options, NUM_BLOCKS);
                assert_eq!(harness.model.info().kv_cache_dtype, kv_cache_dtype);
                harness.prefill(&mut Sequence::new(&tokens(45, 1)), 16, |_| true)
            };
            let (exact, narrow) = (rows(KvCacheDtype::F32), rows(kv_cache_dtype));
            assert_ne!(exact, narrow, "{name}: {kv_cache_dtype:?} was not stored as such");
            for ((position, exact), (_, narrow)) in exact.iter().zip(&narrow) {
                let divergence = kl_divergence(exact, narrow);
                assert!(divergence < tolerance, "{name}, {kv_cache_dtype:?}, position {position}: {divergence}");
            }
        }
    }
}

#[test]
fn a_batchs_attention_is_counted_by_rows_contexts_and_who_has_logits() {
    let mut harness = Harness::load(&checkpoint("tiny-llama"), &options(BackendKind::Cpu, 1), NUM_BLOCKS);
    let (mut chunk, mut other) = (Sequence::new(&tokens(9, 1)), Sequence::new(&tokens(1, 2)));
    harness.step(&mut [(&mut chunk, 4)], |_| false);
    // Positions 4 to 6 of one sequence, none with logits, and position 0 of another, which has them.
    let (batch, _) = harness.batch(&mut [(&mut chunk, 3), (&mut other, 1)], |position| position == 0);
    let (work, info) = (harness.model.attention_work(&batch), harness.model.info());
    let key_visits = (info.num_layers - 1) * (7 + 1) + 1;
    assert_eq!(work.read_bytes as usize, key_visits * info.kv_bytes_per_token / info.num_layers);
    let scores = (info.num_layers - 1) * (5 + 6 + 7 + 1) + 1;
    assert_eq!(work.operations as usize, scores * info.num_heads * 2 * 2 * info.head_dim);
}

fn step_message(result: Result<(), ModelError>) -> String {
    match result {
        Err(ModelError::Step(message)) => message,
        other => panic!("{other:?} is not a refused step"),
    }
}

fn one_token_batch(token: u32) -> ForwardBatch {
    ForwardBatch {
        tokens: vec![token],
        positions: vec![0],
        slots: vec![0],
        block_tables: vec![0],
        sequences: vec![BatchSequence { rows: 0..1, block_table: 0..1, context_len: 1, rope_len: 0, adapter: None }],
        logit_rows: vec![0],
    }
}

#[test]
fn a_bad_batch_is_refused_and_the_next_good_one_runs() {
    for backend in [BackendKind::Cpu, BackendKind::Reference] {
        let mut model = Model::load(&checkpoint("tiny-llama"), &options(backend, 2), &mut |_, _| ()).unwrap();
        let vocab_size = model.vocab_size();
        let mut logits = vec![0.0; vocab_size];

        assert!(step_message(model.forward(&one_token_batch(1), &mut |_| ())).contains("allocate_kv"));
        assert!(step_message(model.copy_blocks(&[(0, 1)])).contains("allocate_kv"));
        model.allocate_kv(2).unwrap();
        assert!(step_message(model.logits(0..1, &mut logits)).contains("the last batch kept 0"));

        model.forward(&one_token_batch(1), &mut |_| ()).unwrap();
        model.logits(0..1, &mut logits).unwrap();
        assert!(logits.iter().all(|logit| logit.is_finite()));
        let good = logits.clone();

        assert!(
            step_message(model.forward(&one_token_batch(vocab_size as u32), &mut |_| ()))
                .contains("outside the vocabulary")
        );
        // The rows of the batch before are gone too: they are not this batch's.
        assert!(step_message(model.logits(0..1, &mut logits)).contains("kept 0"));
        let mut far = one_token_batch(1);
        far.block_tables[0] = 2;
        far.slots[0] = 8;
        assert!(step_message(model.forward(&far, &mut |_| ())).contains("block 2"));
        assert!(step_message(model.copy_blocks(&[(0, 2)])).contains("block 0 to 2"));

        model.forward(&one_token_batch(1), &mut |_| ()).unwrap();
        assert!(step_message(model.logits(0..2, &mut logits)).contains("kept 1"));
        assert!(step_message(model.logits(0..1, &mut logits[1..])).contains("do not fit"));
        assert!(model.logits(1..1, &mut []).is_ok());
        model.logits(0..1, &mut logits).unwrap();
        assert_eq!(logits, good);

        model.forward(&ForwardBatch::default(), &mut |_| ()).unwrap();
        assert!(step_message(model.logits(0..1, &mut logits)).contains("kept 0"));
        assert!(model.allocate_kv(0).is_err());
        assert!(model.allocate_kv(usize::MAX).is_err());
        model.forward(&one_token_batch(1), &mut |_| ()).unwrap();
    }
}

#[test]
fn a_cache_larger_than_memory_is_an_error_and_a_smaller_one_then_works() {
    for backend in [BackendKind::Cpu, BackendKind::Reference] {
        let options = LoadOptions { block_size: 16, ..options(backend, 1) };
        let mut model = Model::load(&checkpoint("tiny-llama"), &options, &mut |_, _| ()).unwrap();
        // Just under 2^32 slots of 256 bytes or more: a terabyte.
        let refused = model.allocate_kv((1 << 28) - 1);
        assert!(matches!(refused, Err(ModelError::OutOfMemory(_))), "{backend:?}: {refused:?}");
        assert!(step_message(model.forward(&one_token_batch(1), &mut |_| ())).contains("allocate_kv"));
        model.allocate_kv(1).unwrap();
        model.forward(&one_token_batch(1), &mut |_| ()).unwrap();
    }
}

#[test]
fn options_that_cannot_be_honoured_are_refused_by_name() {
    let check = |expected: &str, options: LoadOptions| {
        let Err(ModelError::BadOption(message)) = Model::load(&checkpoint("tiny-llama"), &options, &mut |_, _| ())
        else {
            panic!("{options:?} was not refused as an option");
        };
        assert!(message.contains(expected), "{message:?} should contain {expected:?}");
    };
    let (cpu, reference) = (LoadOptions::new(BackendKind::Cpu), LoadOptions::new(BackendKind::Reference));
    check("Int8", LoadOptions { kv_cache_dtype: KvCacheDtype::Int8, ..reference.clone() });
    check("--block-size 0", LoadOptions { block_size: 0, ..cpu.clone() });
    check("--threads 0", LoadOptions { threads: Some(0), ..cpu.clone() });
    check("--threads 100000", LoadOptions { threads: Some(100_000), ..cpu.clone() });
    check("Bf16", LoadOptions { dtype: bindery_model::Dtype::Bf16, ..reference.clone() });
    check("F16", LoadOptions { kv_cache_dtype: KvCacheDtype::F16, ..reference.clone() });
    check("quantise", LoadOptions { quantize: bindery_model::Quantize::Int8, ..reference });
    check("exclude", LoadOptions { quantize: bindery_model::Quantize::Int8, dequantize: true, ..cpu });
}

#[test]
fn info_tells_how_many_tensors_were_quantised() {
    let load = |quantize| {
        let options = LoadOptions { quantize, ..options(BackendKind::Cpu, 1) };
        let model = Model::load(&checkpoint("tiny-llama"), &options, &mut |_, _| ()).unwrap();
        (model.info().num_quantized_tensors, model.info().weight_format.clone())
    };
    let (num, stored) = load(bindery_model::Quantize::None);
    assert_eq!(num, 0);
    let (num, quantised) = load(bindery_model::Quantize::Int4);
    assert!(num > 0);
    assert_eq!(quantised, format!("{stored}; {num} quantised to int4 at load"));
}

#[test]
fn info_tells_what_was_loaded_and_progress_reaches_the_end() {
    let mut calls = Vec::new();
    let path = checkpoint("tiny-mistral");
    let model =
        Model::load(&path, &options(BackendKind::Cpu, 2), &mut |done, total| calls.push((done, total))).unwrap();
    let info = model.info();
    assert_eq!((info.vocab_size, info.num_layers, info.hidden_size), (128, 3, 64));
    assert_eq!((info.num_heads, info.num_kv_heads, info.head_dim, info.intermediate_size), (4, 1, 24, 96));
    assert_eq!((info.window, info.tied_embeddings, info.max_position_embeddings), (Some(11), false, 256));
    assert_eq!((info.bos_token_id, info.eos_token_ids.as_slice()), (Some(1), &[2_u32][..]));
    assert_eq!((info.kv_cache_dtype, info.kv_bytes_per_token), (KvCacheDtype::F16, 2 * 3 * 24 * 2));
    assert_eq!((info.threads, info.block_size, info.path.as_path()), (2, 4, path.as_path()));
    assert_eq!(info.num_parameters * 2, info.stored_weight_bytes);
    assert!(info.device.starts_with("cpu ("), "{}", info.device);

    assert_eq!(calls.first(), Some(&(0, info.stored_weight_bytes)));
    assert_eq!(calls.last(), Some(&(info.stored_weight_bytes, info.stored_weight_bytes)));
    assert!(calls.is_sorted());
    assert!(calls.len() > 20, "one call a tensor");
}
