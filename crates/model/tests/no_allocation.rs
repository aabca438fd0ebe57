//! A step no larger than one before allocates nothing: asserted with an allocator that counts.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    alloc::System,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use bindery_model::{
    AdapterLimits, BackendKind, BatchSequence, ForwardBatch, KvCacheDtype, LoadOptions, Model, Quantize, StepModel as _,
};
use serde_json::{Value, json};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const BLOCK_SIZE: usize = 16;
const BLOCKS_EACH: usize = 6;

/// Four sequences that decode and one whose prompt comes in chunks of eight.
fn batch(step: usize, adapters: &[Option<u32>; 5]) -> ForwardBatch {
    let mut batch = ForwardBatch::default();
    for sequence in 0..5 {
        let (first, count) = if sequence == 4 { (8 * step, 8) } else { (40 + step, 1) };
        let start = batch.tokens.len();
        let table_start = batch.block_tables.len();
        batch.block_tables.extend((0..BLOCKS_EACH).map(|block| (sequence * BLOCKS_EACH + block) as u32));
        for position in first..first + count {
            batch.tokens.push((7 * position + sequence) as u32 % 31);
            batch.positions.push(position as u32);
            batch.slots.push((sequence * BLOCKS_EACH * BLOCK_SIZE + position) as u32);
        }
        batch.logit_rows.push(batch.tokens.len() as u32 - 1);
        batch.sequences.push(BatchSequence {
            rows: start..batch.tokens.len(),
            block_table: table_start..batch.block_tables.len(),
            context_len: first + count,
            rope_len: if sequence % 2 == 0 { 0 } else { 65 + sequence },
            adapter: adapters[sequence],
        });
    }
    batch
}

fn check(path: &Path, dummy: bool, adapters: &[(u32, &str)]) {
    for quantize in [Quantize::None, Quantize::Int8, Quantize::Int4] {
        // One thread: which worker first meets a piece of work is chance, and each makes room for its own.
        let plain = LoadOptions::new(BackendKind::Cpu);
        let options = LoadOptions { threads: Some(1), block_size: BLOCK_SIZE, quantize, dummy, ..plain };
        let mut model = Model::load(path, &options, &mut |_, _| ()).unwrap();
        model.allocate_kv(5 * BLOCKS_EACH).unwrap();
        let mut logits = vec![0.0; 5 * model.vocab_size()];
        for (id, name) in adapters {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/adapters").join(name);
            let adapter = model.adapter_loader().load(&path, &AdapterLimits::default()).unwrap();
            model.add_adapter(*id, &Arc::new(adapter)).unwrap();
        }
        let ways = if adapters.is_empty() { [None; 5] } else { [None, Some(1), Some(1), Some(2), Some(2)] };
        let batches: Vec<ForwardBatch> = (0..12).map(|step| batch(step, &ways)).collect();
        for (step, batch) in batches.iter().enumerate() {
            let region = Region::new(ALLOCATOR);
            model.forward(batch, &mut |_| ()).unwrap();
            model.logits(0..5, &mut logits).unwrap();
            let change = region.change();
            let num_allocations = change.allocations + change.reallocations;
            // The longest context meets one more span of scratch only beyond 512 tokens; all here are within one.
            let what = format!("{}, {quantize:?}", path.display());
            assert!(step < 2 || num_allocations == 0, "{what}: step {step} allocated {num_allocations} times");
        }
        assert!(logits.iter().all(|logit| logit.is_finite()));
    }
}

/// Two threads over contexts of several spans: which worker first meets a piece of work is chance, and each makes room for its
/// own, so all that can be said is that it comes to an end.
fn check_threads(path: &Path, kv_cache_dtype: KvCacheDtype) {
    const CONTEXT: usize = 1200;
    const BLOCKS: usize = CONTEXT / BLOCK_SIZE;
    let plain = LoadOptions::new(BackendKind::Cpu);
    let options = LoadOptions {
        threads: Some(2),
        block_size: BLOCK_SIZE,
        quantize: Quantize::Int8,
        kv_cache_dtype,
        dummy: true,
        ..plain
    };
    let mut model = Model::load(path, &options, &mut |_, _| ()).unwrap();
    model.allocate_kv(3 * BLOCKS).unwrap();
    let mut logits = vec![0.0; 3 * model.vocab_size()];
    let mut batch = ForwardBatch::default();
    for sequence in 0..3 {
        batch.block_tables.extend((0..BLOCKS).map(|block| (sequence * BLOCKS + block) as u32));
        batch.tokens.push(sequence as u32);
        batch.positions.push(CONTEXT as u32 - 1);
        batch.slots.push(((sequence + 1) * CONTEXT) as u32 - 1);
        batch.logit_rows.push(sequence as u32);
        batch.sequences.push(BatchSequence {
            rows: sequence..sequence + 1,
            block_table: sequence * BLOCKS..(sequence + 1) * BLOCKS,
            context_len: CONTEXT,
            rope_len: 0,
            adapter: None,
        });
    }
    let mut num_quiet_steps = 0;
    for _ in 0..2000 {
        let region = Region::new(ALLOCATOR);
        model.forward(&batch, &mut |_| ()).unwrap();
        model.logits(0..3, &mut logits).unwrap();
        let change = region.change();
        num_quiet_steps = if change.allocations + change.reallocations == 0 { num_quiet_steps + 1 } else { 0 };
        if num_quiet_steps == 50 {
            return;
        }
    }
    panic!("{kv_cache_dtype:?}: two threads still allocate after 2000 steps of one size");
}

/// A config.json of a small model of another family.
fn config(folder: &Path, family: &Value) -> PathBuf {
    let mut config = json!({
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    });
    config.as_object_mut().unwrap().extend(family.as_object().unwrap().clone());
    let path = folder.join(format!("{}.json", family["model_type"].as_str().unwrap()));
    fs::write(&path, config.to_string()).unwrap();
    path
}

/// A committed checkpoint of integer weights, with room for this test's positions.
fn quantized(folder: &Path, name: &str) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/quantized").join(name);
    let mut config: Value = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    config["max_position_embeddings"] = json!(256);
    let to = folder.join(name);
    fs::create_dir(&to).unwrap();
    fs::write(to.join("config.json"), config.to_string()).unwrap();
    fs::copy(from.join("model.safetensors"), to.join("model.safetensors")).unwrap();
    to
}

/// One test, for what runs beside it would be counted too.
#[test]
fn a_step_allocates_nothing_after_the_first_of_its_size() {
    check(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/checkpoints/tiny-llama"), false, &[]);
    let mixed = [(1, "llama-all-rslora"), (2, "llama-qv")];
    check(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/checkpoints/tiny-llama"), false, &mixed);
    let folder = tempfile::tempdir().unwrap();
    let divisors = |first: f32| (0..8_u8).map(|pair| first + f32::from(pair)).collect::<Vec<_>>();
    let families = [
        json!({"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2}),
        json!({
            "model_type": "qwen2_moe", "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64, "norm_topk_prob": false,
        }),
        json!({"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16}),
        json!({"model_type": "falcon", "new_decoder_architecture": true, "num_kv_heads": 2}),
        json!({
            "model_type": "phi3", "original_max_position_embeddings": 64, "max_position_embeddings": 256,
            "rope_scaling": {"type": "longrope", "short_factor": divisors(1.0), "long_factor": divisors(2.0)},
        }),
        json!({
            "model_type": "llama", "max_position_embeddings": 64,
            "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        }),
    ];
    for family in &families {
        check(&config(folder.path(), family), true, &[]);
    }
    let long = config(folder.path(), &json!({"model_type": "llama", "max_position_embeddings": 2048}));
    for kv_cache_dtype in [KvCacheDtype::F16, KvCacheDtype::Int8] {
        check_threads(&long, kv_cache_dtype);
    }
    // Inputs in orders of their own, shared and not, in experts and where 32 does not divide them.
    for name in ["gptq4-act-order", "gptq4-act-order-112", "gptq4-act-order-experts"] {
        check(&quantized(folder.path(), name), false, &[]);
    }
}
