//! Every axis of a configuration, alone and as the families combine them: both backends agree, each axis matters, and a row's
//! result does not depend on its neighbours.
//!
//! Weights are made up, the same for every configuration that has them, so two configurations differ by their axes alone.
#![allow(clippy::unwrap_used, reason = "tests; clippy only knows a plain cfg(test)")]

use bindery_kernels::Cpu;

use super::*;
use crate::{
    backend::{
        cpu::{CpuBackend, ImportOptions},
        reference::ReferenceBackend,
    },
    batch::BatchSequence,
    config::{
        Activation, Alibi, Biases, Experts, FeedForward, LayerConfig, Mlp, Norm, NormKind, RopeScaling, RopeStyle,
        Rotary, SparseBlocks,
    },
    model::{Dtype, KvCacheDtype, Quantize},
};

/// Of logits between the backends: both compute in f32, in other orders.
const TOLERANCE: f32 = 1e-3;
const BLOCK_SIZE: usize = 4;
const NUM_BLOCKS: usize = 40;

fn mlp(intermediate_size: usize) -> Mlp {
    Mlp { intermediate_size, activation: Activation::Silu, gated: true }
}

fn rotary(base: f32, scaling: RopeScaling) -> Rotary {
    Rotary { style: RopeStyle::Neox, dim: 16, base, scaling }
}

/// A LLaMA of one layer, as small as can be.
pub(crate) fn small_config() -> DecoderConfig {
    let rotary = Rotary { dim: 4, ..rotary(10_000.0, RopeScaling::None) };
    DecoderConfig {
        architecture: "made up".into(),
        vocab_size: 10,
        hidden_size: 8,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 4,
        max_position_embeddings: 16,
        norm: Norm { kind: NormKind::Rms, eps: 1e-5, weight_offset: 0.0 },
        block: Block::PreNorm,
        query_key_norm: false,
        rotaries: vec![rotary],
        alibi: None,
        attention_scale: 0.5,
        attention_soft_cap: None,
        mlp: mlp(16),
        experts: None,
        biases: Biases::default(),
        layers: vec![LayerConfig { window: None, blocks: None, rotary: Some(0), feed_forward: FeedForward::Dense }],
        embedding_scale: 1.0,
        tied_embeddings: true,
        head_bias: false,
        logit_scale: 1.0,
        logit_soft_cap: None,
        masked_tokens: Vec::new(),
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    }
}

/// A LLaMA of three layers, the second with a window. Widths are whole groups, so that it can be quantised.
fn llama() -> DecoderConfig {
    let layer = |window| LayerConfig { window, blocks: None, rotary: Some(0), feed_forward: FeedForward::Dense };
    DecoderConfig {
        vocab_size: 100,
        hidden_size: 64,
        head_dim: 16,
        max_position_embeddings: 256,
        rotaries: vec![rotary(10_000.0, RopeScaling::None)],
        attention_scale: 0.25,
        mlp: mlp(96),
        layers: vec![layer(None), layer(Some(5)), layer(None)],
        ..small_config()
    }
}

/// A configuration that differs from [`llama`], and the length that its requests' rotary frequencies go by.
struct Case {
    name: &'static str,
    config: DecoderConfig,
    rope_len: usize,
}

fn case(name: &'static str, change: impl FnOnce(&mut DecoderConfig)) -> Case {
    let mut config = llama();
    change(&mut config);
    config.architecture = name.into();
    Case { name, config, rope_len: 0 }
}

fn with_experts(config: &mut DecoderConfig, normalize_weights: bool, shared: Option<usize>) {
    config.experts = Some(Experts {
        num_experts: 5,
        num_experts_per_token: 2,
        intermediate_size: 32,
        activation: Activation::Silu,
        normalize_weights,
        shared_intermediate_size: shared,
    });
    config.layers[0].feed_forward = FeedForward::Experts;
    config.layers[2].feed_forward = FeedForward::Experts;
}

fn slopes() -> Alibi {
    Alibi { slopes: vec![0.25, 0.0625, 0.015_625, 0.003_906_25] }
}

fn long_rope() -> RopeScaling {
    RopeScaling::LongRope {
        short: (0..8_u8).map(|pair| 1.0 + f32::from(pair) * 0.1).collect(),
        long: (0..8_u8).map(|pair| 2.0 + f32::from(pair)).collect(),
        original_max_position_embeddings: 16,
        attention_factor: 1.2,
        long_attention_factor: 1.3,
    }
}

fn blocks(head_step: usize) -> SparseBlocks {
    SparseBlocks { block_size: 3, num_local_blocks: 1, vertical_stride: 3, head_step }
}

/// One axis each.
fn axes() -> Vec<Case> {
    let scaled = |name, scaling| case(name, |config| config.rotaries[0].scaling = scaling);
    let dynamic = RopeScaling::Dynamic { factor: 4.0, original_max_position_embeddings: 16 };
    let yarn = RopeScaling::Yarn {
        factor: 4.0,
        beta_fast: 8.0,
        beta_slow: 1.0,
        original_max_position_embeddings: 64,
        attention_factor: 1.1,
        truncate: true,
    };
    vec![
        case("sandwich of norms", |config| config.block = Block::SandwichNorm),
        case("parallel branches", |config| config.block = Block::Parallel),
        case("parallel branches with two norms", |config| config.block = Block::ParallelTwoNorms),
        case("layer norm", |config| config.norm.kind = NormKind::Layer),
        case("offset of norms", |config| config.norm.weight_offset = 1.0),
        case("norms of heads", |config| config.query_key_norm = true),
        case("norms of heads without means", |config| {
            config.query_key_norm = true;
            config.norm.kind = NormKind::Layer;
        }),
        case("several rotary embeddings", |config| {
            config.rotaries.push(rotary(100.0, RopeScaling::Linear { factor: 8.0 }));
            config.layers[1].rotary = Some(1);
        }),
        case("a layer without rotation", |config| config.layers[2].rotary = None),
        case("partial rotation", |config| config.rotaries[0].dim = 6),
        case("partial rotation of pairs, heads normed", |config| {
            config.rotaries[0] = Rotary { style: RopeStyle::Interleaved, dim: 6, ..config.rotaries[0].clone() };
            config.query_key_norm = true;
        }),
        case("ALiBi", |config| config.alibi = Some(slopes())),
        case("attention scale", |config| config.attention_scale = 0.1),
        case("attention soft cap", |config| config.attention_soft_cap = Some(0.5)),
        case("logit scale", |config| config.logit_scale = 0.3),
        case("logit soft cap", |config| config.logit_soft_cap = Some(1.5)),
        case("embedding scale", |config| config.embedding_scale = 8.0),
        case("gelu", |config| config.mlp.activation = Activation::Gelu),
        case("gelu by tanh", |config| config.mlp.activation = Activation::GeluTanh),
        case("gegelu", |config| config.mlp.activation = Activation::Gegelu { limit: 0.4 }),
        case("blocks of keys", |config| config.layers[2].blocks = Some(blocks(0))),
        case("blocks of keys by head", |config| config.layers[0].blocks = Some(blocks(1))),
        case("no gate", |config| config.mlp.gated = false),
        case("biases of the MLP", |config| config.biases.mlp = true),
        case("biases of an MLP without gate", |config| {
            config.biases.mlp = true;
            config.mlp.gated = false;
        }),
        case("biases of attention", |config| config.biases = Biases { qkv: true, output: true, mlp: false }),
        case("a head of its own", |config| config.tied_embeddings = false),
        case("bias of the head", |config| config.head_bias = true),
        case("experts", |config| with_experts(config, true, None)),
        case("experts as shares of all", |config| with_experts(config, false, None)),
        case("a shared expert", |config| with_experts(config, true, Some(64))),
        case("experts in a sandwich", |config| {
            with_experts(config, true, Some(64));
            config.block = Block::SandwichNorm;
        }),
        scaled("factors", RopeScaling::Factors((1..=8_u8).map(f32::from).collect())),
        scaled("longrope, short", long_rope()),
        Case { rope_len: 17, ..scaled("longrope, long", long_rope()) },
        Case { rope_len: 24, ..scaled("dynamic", dynamic) },
        scaled("yarn", yarn),
    ]
}

/// As the families combine them.
fn families() -> Vec<Case> {
    let gemma = |config: &mut DecoderConfig| {
        config.block = Block::SandwichNorm;
        config.norm.weight_offset = 1.0;
        config.embedding_scale = 8.0;
        config.mlp.activation = Activation::GeluTanh;
    };
    let falcon = |config: &mut DecoderConfig, block| {
        config.norm.kind = NormKind::Layer;
        config.block = block;
        config.mlp = Mlp { intermediate_size: 256, activation: Activation::Gelu, gated: false };
        config.num_kv_heads = if block == Block::Parallel { 1 } else { 2 };
    };
    vec![
        case("gemma2", |config| {
            gemma(config);
            (config.attention_soft_cap, config.logit_soft_cap) = (Some(5.0), Some(3.0));
        }),
        case("gemma3", |config| {
            gemma(config);
            config.query_key_norm = true;
            config.rotaries.push(rotary(1_000.0, RopeScaling::Linear { factor: 8.0 }));
            config.layers[2].rotary = Some(1);
        }),
        case("falcon 7b", |config| falcon(config, Block::Parallel)),
        case("falcon 40b", |config| falcon(config, Block::ParallelTwoNorms)),
        case("falcon rw", |config| {
            falcon(config, Block::PreNorm);
            config.alibi = Some(slopes());
            config.rotaries.clear();
            config.layers.iter_mut().for_each(|layer| layer.rotary = None);
            config.biases = Biases { qkv: true, output: true, mlp: true };
        }),
        Case {
            rope_len: 17,
            ..case("phi3", |config| {
                let scaling = match long_rope() {
                    RopeScaling::LongRope {
                        short,
                        long,
                        original_max_position_embeddings,
                        attention_factor,
                        long_attention_factor,
                    } => RopeScaling::LongRope {
                        short: short[..6].to_vec(),
                        long: long[..6].to_vec(),
                        original_max_position_embeddings,
                        attention_factor,
                        long_attention_factor,
                    },
                    other => other,
                };
                config.rotaries[0] = Rotary { dim: 12, ..rotary(10_000.0, scaling) };
                config.tied_embeddings = false;
            })
        },
        case("qwen3", |config| {
            config.query_key_norm = true;
            config.rotaries[0].base = 1e6;
        }),
        case("qwen3 moe", |config| {
            config.query_key_norm = true;
            with_experts(config, true, None);
        }),
        case("mixtral", |config| {
            with_experts(config, true, None);
            config.tied_embeddings = false;
            config.layers.iter_mut().for_each(|layer| layer.feed_forward = FeedForward::Experts);
        }),
        case("qwen2 moe", |config| {
            with_experts(config, false, Some(64));
            config.biases.qkv = true;
        }),
    ]
}

fn tokens(seed: usize, len: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * i * 31 + i * 17 + seed * 41 + 3) % 97) as u32).collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // NaN must not get lost.
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |max, x| if x <= max { max } else { x })
}

fn cpu_backend(config: &DecoderConfig, quantize: Quantize, threads: usize) -> CpuBackend {
    let import = ImportOptions { dtype: Dtype::F32, quantize, dequantize: false };
    CpuBackend::new(Cpu::new(Cpu::detect(), threads), config, import, KvCacheDtype::Auto, BLOCK_SIZE)
}

/// Logits of every token of prompts that are computed together, by turns of `chunks` tokens (each prompt takes the next of
/// the list): `[prompts, tokens, vocabulary]`.
fn logits<B: Backend>(case: &Case, backend: B, prompts: &[Vec<u32>], chunks: &[usize]) -> Vec<Vec<f32>> {
    let store = WeightStore::made_up(&case.config);
    let (mut decoder, _) = Decoder::load(&case.config, &store, backend, BLOCK_SIZE, &mut |_, _| ()).unwrap();
    decoder.allocate_kv(NUM_BLOCKS).unwrap();
    let mut computed = vec![0; prompts.len()];
    let mut logits = vec![Vec::new(); prompts.len()];
    let mut chunks = chunks.iter().cycle();
    while computed.iter().zip(prompts).any(|(&computed, prompt)| computed < prompt.len()) {
        let (mut batch, mut who) = (ForwardBatch::default(), Vec::new());
        for (index, prompt) in prompts.iter().enumerate() {
            let positions = computed[index]..(computed[index] + chunks.next().unwrap()).min(prompt.len());
            if positions.is_empty() {
                continue;
            }
            push(&mut batch, index, prompt, positions.clone(), case.rope_len);
            who.push((index, positions.len()));
            computed[index] = positions.end;
        }
        decoder.forward(&batch, &mut |_| ()).unwrap();
        let mut row = 0;
        for (index, num_rows) in who {
            // Old values must be overwritten, so the buffer starts with what no logit is.
            let mut out = vec![f32::NAN; num_rows * case.config.vocab_size];
            decoder.logits(row..row + num_rows, &mut out).unwrap();
            logits[index].extend(out);
            row += num_rows;
        }
    }
    logits
}

/// Prompt number `index` has every fifth block, from the last backwards.
fn push(batch: &mut ForwardBatch, index: usize, prompt: &[u32], positions: Range<usize>, rope_len: usize) {
    let (row, table) = (batch.tokens.len(), batch.block_tables.len());
    let block = |number: usize| NUM_BLOCKS - 1 - (5 * number + index);
    batch.block_tables.extend((0..positions.end.div_ceil(BLOCK_SIZE)).map(|number| block(number) as u32));
    for position in positions.clone() {
        batch.logit_rows.push(batch.tokens.len() as u32);
        batch.tokens.push(prompt[position]);
        batch.positions.push(position as u32);
        batch.slots.push((block(position / BLOCK_SIZE) * BLOCK_SIZE + position % BLOCK_SIZE) as u32);
    }
    batch.sequences.push(BatchSequence {
        rows: row..batch.tokens.len(),
        block_table: table..batch.block_tables.len(),
        context_len: positions.end,
        rope_len,
        adapter: None,
    });
}

#[test]
fn backends_agree_and_every_axis_matters() {
    let prompts = [tokens(1, 20)];
    let mut seen: Vec<(&str, Vec<f32>)> = Vec::new();
    for case in [case("llama", |_| ())].into_iter().chain(axes()).chain(families()) {
        let reference = ReferenceBackend::new(&case.config, candle_core::Device::Cpu, BLOCK_SIZE);
        let expected = logits(&case, reference, &prompts, &[20]).remove(0);
        let actual = logits(&case, cpu_backend(&case.config, Quantize::None, 2), &prompts, &[20]).remove(0);
        let error = largest_difference(&expected, &actual);
        assert!(error < TOLERANCE, "{}: backends differ by {error}", case.name);
        let spread = actual.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        assert!((0.3..1e3).contains(&spread), "{}: logits of at most {spread} tell little", case.name);
        for (name, other) in &seen {
            // Two kinds of gelu are near each other; what only orders of sums change is far below that.
            let difference = largest_difference(&actual, other);
            assert!(difference > 20.0 * error.max(1e-5), "{} is like {name}: {difference}, {error}", case.name);
        }
        seen.push((case.name, actual));
    }
}

#[test]
fn masked_tokens_are_least_and_the_others_as_they_were() {
    let prompts = [tokens(1, 5)];
    let (plain, masked) = (case("plain", |_| ()), case("masked", |config| config.masked_tokens = vec![1, 40]));
    let of = |case: &Case| logits(case, cpu_backend(&case.config, Quantize::None, 2), &prompts, &[5]).remove(0);
    for (index, (plain, masked)) in of(&plain).into_iter().zip(of(&masked)).enumerate() {
        let expected = if [1, 40].contains(&(index % 100)) { f32::MIN } else { plain };
        assert_eq!(masked.to_bits(), expected.to_bits(), "logit {index}");
    }
}

#[test]
fn neighbours_chunks_and_threads_change_no_row_on_any_axis() {
    let prompts = [tokens(1, 22), tokens(2, 1), tokens(3, 9), tokens(4, 30)];
    for case in axes().into_iter().chain(families()) {
        for quantize in [Quantize::None, Quantize::Int8, Quantize::Int4] {
            let backend = |threads| cpu_backend(&case.config, quantize, threads);
            let bits = |rows: &[f32]| rows.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let together = logits(&case, backend(2), &prompts, &[7, 1, 16, 3, 5]);
            let singly = logits(&case, backend(3), &prompts, &[1]);
            for (index, prompt) in prompts.iter().enumerate() {
                let alone = logits(&case, backend(1), std::slice::from_ref(prompt), &[usize::MAX >> 1]).remove(0);
                assert!(alone.iter().all(|logit| logit.is_finite()), "{}", case.name);
                for (what, other) in [("together", &together), ("one by one", &singly)] {
                    assert_eq!(bits(&other[index]), bits(&alone), "{}, {quantize:?}, {what}, {index}", case.name);
                }
            }
        }
    }
}

#[test]
fn requests_of_several_lengths_in_one_batch_are_each_rotated_by_their_own() {
    let prompt = tokens(1, 12);
    let case = axes().into_iter().find(|case| case.name == "longrope, long").unwrap();
    let store = WeightStore::made_up(&case.config);
    let backend = cpu_backend(&case.config, Quantize::None, 2);
    let (mut decoder, _) = Decoder::load(&case.config, &store, backend, BLOCK_SIZE, &mut |_, _| ()).unwrap();
    decoder.allocate_kv(NUM_BLOCKS).unwrap();
    let mut batch = ForwardBatch::default();
    push(&mut batch, 0, &prompt, 0..12, 0);
    push(&mut batch, 1, &prompt, 0..12, 17);
    decoder.forward(&batch, &mut |_| ()).unwrap();
    let mut together = vec![0.0; 24 * case.config.vocab_size];
    decoder.logits(0..24, &mut together).unwrap();
    for (rope_len, together) in [0, 17].into_iter().zip(together.chunks_exact(12 * case.config.vocab_size)) {
        let case = Case { name: case.name, config: case.config.clone(), rope_len };
        let alone =
            logits(&case, cpu_backend(&case.config, Quantize::None, 2), std::slice::from_ref(&prompt), &[12]).remove(0);
        assert_eq!(alone, together);
    }
}
