//! Whole steps of a model without engine or HTTP, as llama-bench and llama-batched-bench measure them: a prompt in one
//! step, and one token each of several sequences.
//!
//! `cargo bench --bench steps -- --model FILE`, or `--shape 1b --quantize int4` for random weights of a LLaMA's shapes.
//! Every load is timed in turns, so that what disturbs the machine disturbs all alike; rates are medians. Roofs are
//! taken before and after every round of a load, and its share is the median of its rounds' own (see `Gauge`); memory's is read
//! from as much as the step that reads most.
//! `--json` for programs.

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::expect_used, reason = "a tool for people who measure")]

#[path = "common/adapters.rs"]
mod adapters;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bindery_model::{
    AdapterLimits, AttentionWork, BackendKind, BatchSequence, ForwardBatch, Gauge, KvCacheDtype, LoadOptions, Machine,
    Model, ModelPhase, Passes, Quantize, Roofs, StepModel, machine,
};
use clap::Parser;
use serde_json::{Value, json};

const BLOCK_SIZE: usize = 16;
/// Time that a load gets in a round at least, so that short steps are timed many at once.
const MIN_ROUND: Duration = Duration::from_millis(250);

#[derive(Parser)]
struct Args {
    /// A GGUF file or a folder with safetensors.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Random weights of a LLaMA's shapes instead: 1b, 3b or 8b.
    #[arg(long, conflicts_with = "model")]
    shape: Option<String>,
    /// Of dense weights: none, int8 or int4.
    #[arg(long, default_value = "none")]
    quantize: String,
    /// f32, f16, bf16, int8 or auto.
    #[arg(long, default_value = "auto")]
    kv_cache_dtype: String,
    #[arg(long)]
    threads: Option<usize>,
    /// Prompt lengths, each a step of its own.
    #[arg(long, value_delimiter = ',', default_value = "512")]
    prefill: Vec<usize>,
    /// Sequences that decode together.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    decode: Vec<usize>,
    /// Tokens that each of them has in the cache.
    #[arg(long, value_delimiter = ',', default_value = "128")]
    context: Vec<usize>,
    /// Adapters that the sequences are spread over; 0 is the plain base.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    adapters: Vec<usize>,
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// What the adapters stand beside: all or qv.
    #[arg(long, default_value = "all")]
    targets: String,
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    #[arg(long)]
    json: bool,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What a step computes.
#[derive(Clone, Copy)]
enum Load {
    Prefill { len: usize },
    Decode { batch: usize, context: usize },
}

impl Load {
    fn name(self) -> String {
        match self {
            Self::Prefill { len } => format!("prefill {len}"),
            Self::Decode { batch, context } => format!("decode {batch} at {context}"),
        }
    }

    fn num_tokens(self) -> usize {
        match self {
            Self::Prefill { len } => len,
            Self::Decode { batch, .. } => batch,
        }
    }

    /// Sequences whose last row goes through the head.
    fn num_sampled(self) -> usize {
        match self {
            Self::Prefill { .. } => 1,
            Self::Decode { batch, .. } => batch,
        }
    }

    /// What attention has to do at least.
    fn attention_work(self, model: &Model) -> AttentionWork {
        let shape = &model.info().attention;
        match self {
            Self::Prefill { len } => shape.work(len, len, 1),
            Self::Decode { batch, context } => shape.work(context, 1, 1) * batch as u64,
        }
    }

    fn num_blocks(self) -> usize {
        match self {
            Self::Prefill { len } => len.div_ceil(BLOCK_SIZE),
            Self::Decode { batch, context } => batch * context.div_ceil(BLOCK_SIZE),
        }
    }

    fn batch(self, vocab_size: usize, num_adapters: usize) -> ForwardBatch {
        let (sequences, rows, context) = match self {
            Self::Prefill { len } => (1, len, len),
            Self::Decode { batch, context } => (batch, 1, context),
        };
        let blocks = context.div_ceil(BLOCK_SIZE);
        let mut batch = ForwardBatch::default();
        for sequence in 0..sequences {
            let (first_row, first_block) = (batch.tokens.len(), batch.block_tables.len());
            for position in context - rows..context {
                batch.tokens.push(((sequence * 7919 + position * 104_729 + 12_345) % vocab_size) as u32);
                batch.positions.push(position as u32);
                batch.slots.push((first_block * BLOCK_SIZE + position) as u32);
            }
            batch.block_tables.extend((first_block..first_block + blocks).map(|block| block as u32));
            batch.sequences.push(BatchSequence {
                rows: first_row..batch.tokens.len(),
                block_table: first_block..first_block + blocks,
                context_len: context,
                rope_len: 0,
                adapter: (num_adapters > 0).then(|| (sequence * num_adapters / sequences) as u32),
            });
            batch.logit_rows.push(batch.tokens.len() as u32 - 1);
        }
        batch
    }
}

/// Seconds of one step: all of it, and by part.
#[derive(Clone, Default)]
struct Times {
    total: f64,
    parts: [f64; PARTS.len()],
}

/// What a load's rounds gave, each beside the machine's roofs at its time.
#[derive(Default)]
struct Timed(Vec<(Times, Roofs)>);

const PARTS: [&str; 6] = ["embed", "qkv", "attention", "output", "mlp", "head"];

fn part(phase: ModelPhase) -> usize {
    match phase {
        ModelPhase::Embed => 0,
        ModelPhase::AttentionInputs => 1,
        ModelPhase::Attention => 2,
        ModelPhase::AttentionOutput => 3,
        ModelPhase::Mlp => 4,
    }
}

/// Steps for `MIN_ROUND` at least; means over them. Decoding steps follow one that is not timed: on some machines weights that were
/// not read for some seconds take half as long again once (RESULTS), and a stream decodes one step after the other.
fn round(model: &mut Model, batch: &ForwardBatch, logits: &mut [f32]) -> Times {
    if batch.logit_rows.len() == batch.tokens.len() {
        model.forward(batch, &mut |_| ()).expect("a step");
    }
    let mut times = Times::default();
    let begin = Instant::now();
    let mut steps = 0;
    while steps == 0 || begin.elapsed() < MIN_ROUND {
        let mut last = Instant::now();
        let mut tick = |part: usize| {
            let now = Instant::now();
            times.parts[part] += (now - last).as_secs_f64();
            last = now;
        };
        model.forward(batch, &mut |phase| tick(part(phase))).expect("a step");
        model.logits(0..batch.logit_rows.len(), logits).expect("logits");
        tick(5);
        steps += 1;
    }
    times.total = begin.elapsed().as_secs_f64() / f64::from(steps);
    times.parts = times.parts.map(|part| part / f64::from(steps));
    times
}

impl Timed {
    /// The median by total.
    fn median(&self) -> &Times {
        let mut order: Vec<&Times> = self.0.iter().map(|(times, _)| times).collect();
        order.sort_by(|a, b| a.total.total_cmp(&b.total));
        order[order.len() / 2]
    }

    /// Each round, and how quick memory was beside it, by which the states that a machine was in can be told apart.
    fn rounds(&self) -> Vec<Value> {
        let round = |(times, roofs): &(Times, Roofs)| json!({"seconds": times.total, "read_bytes_per_second": roofs.read_bytes});
        self.0.iter().map(round).collect()
    }

    /// The median of the rounds' shares of the roof beside them, and of which.
    fn share(&self, model: &Model, load: Load) -> (f64, &'static str) {
        let share = |(times, roofs): &(Times, Roofs)| {
            let (least, bound) = least(roofs, model, load);
            (least / times.total, bound)
        };
        let mut shares: Vec<_> = self.0.iter().map(share).collect();
        shares.sort_by(|a, b| a.0.total_cmp(&b.0));
        shares[shares.len() / 2]
    }
}

/// Seconds that a step's products and its attention take at least, and what bounds them.
fn least(roofs: &Roofs, model: &Model, load: Load) -> (f64, &'static str) {
    let info = model.info();
    let (mut reading, mut computing) = roofs.attention_seconds(load.attention_work(model));
    for product in &info.products {
        let (num_rows, num_logit_rows) = (load.num_tokens() as f64, load.num_sampled() as f64);
        let seconds = roofs.seconds(product, Passes { num_steps: 1.0, num_rows, num_logit_steps: 1.0, num_logit_rows });
        (reading, computing) = (reading + seconds.0, computing + seconds.1);
    }
    machine::bound(reading, computing)
}

/// Writes into every block. One that never was is a page of zeroes to the system, the same for all of them, which lies in the
/// first caches: contexts would be read from there.
fn fill_kv(model: &mut Model, num_blocks: usize, vocab_size: usize) {
    const BLOCKS_PER_STEP: usize = 512;
    for first in (0..num_blocks).step_by(BLOCKS_PER_STEP) {
        let load = Load::Decode { batch: BLOCKS_PER_STEP.min(num_blocks - first), context: BLOCK_SIZE };
        let mut batch = load.batch(vocab_size, 0);
        batch.block_tables.iter_mut().for_each(|block| *block += first as u32);
        batch.slots.iter_mut().for_each(|slot| *slot += (first * BLOCK_SIZE) as u32);
        model.forward(&batch, &mut |_| ()).expect("a step");
    }
}

/// A config.json with a published LLaMA's shapes.
fn write_shape(name: &str, folder: &Path) {
    let (hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied) = match name {
        "135m" => (576, 1536, 30, 9, 3, 64, 49_152, true),
        "1b" => (2048, 8192, 16, 32, 8, 64, 128_256, true),
        "3b" => (3072, 8192, 28, 24, 8, 128, 128_256, true),
        "8b" => (4096, 14_336, 32, 32, 8, 128, 128_256, false),
        _ => panic!("--shape {name}: 135m, 1b, 3b or 8b"),
    };
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab, "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0, "max_position_embeddings": 131_072, "hidden_act": "silu",
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
    });
    std::fs::write(folder.join("config.json"), config.to_string()).expect("a temporary file");
}

fn main() {
    let args = Args::parse();
    let mut options = LoadOptions::new(BackendKind::Cpu);
    options.block_size = BLOCK_SIZE;
    options.threads = args.threads;
    options.quantize = match args.quantize.as_str() {
        "none" => Quantize::None,
        "int8" => Quantize::Int8,
        "int4" => Quantize::Int4,
        other => panic!("--quantize {other}: none, int8 or int4"),
    };
    options.kv_cache_dtype = match args.kv_cache_dtype.as_str() {
        "auto" => KvCacheDtype::Auto,
        "f32" => KvCacheDtype::F32,
        "f16" => KvCacheDtype::F16,
        "bf16" => KvCacheDtype::Bf16,
        "int8" => KvCacheDtype::Int8,
        other => panic!("--kv-cache-dtype {other}: auto, f32, f16, bf16 or int8"),
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = match (&args.model, &args.shape) {
        (Some(path), _) => path.clone(),
        (None, Some(shape)) => {
            options.dummy = true;
            write_shape(shape, folder.path());
            folder.path().to_owned()
        }
        (None, None) => {
            // `cargo bench` runs every bench of the workspace.
            eprintln!("steps: nothing to do without --model FILE or --shape 1b");
            return;
        }
    };
    let prefills = args.prefill.iter().map(|&len| Load::Prefill { len });
    let decodes =
        args.context.iter().flat_map(|&context| args.decode.iter().map(move |&batch| Load::Decode { batch, context }));
    let loads: Vec<Load> = prefills.chain(decodes).filter(|load| load.num_tokens() > 0).collect();

    let start = Instant::now();
    let clock = || start.elapsed();
    let begin = Instant::now();
    let mut model = Model::load(&path, &options, &mut |_, _| ()).expect("the model");
    let loading = begin.elapsed();
    let vocab_size = model.info().vocab_size;
    let num_blocks = loads.iter().map(|load| load.num_blocks()).max().unwrap_or(1);
    model.allocate_kv(num_blocks).expect("the cache");
    fill_kv(&mut model, num_blocks, vocab_size);
    let most_adapters = args.adapters.iter().copied().max().unwrap_or(0);
    for id in 0..most_adapters {
        let path = folder.path().join(format!("adapter-{id}"));
        adapters::write(&path, model.info(), &args.targets, args.rank, id as u64);
        let limits = AdapterLimits { max_rank: args.rank, ..AdapterLimits::default() };
        let adapter = Arc::new(model.adapter_loader().load(&path, &limits).expect("the adapter"));
        model.add_adapter(id as u32, &adapter).expect("the adapter fits");
    }
    let cases: Vec<(Load, usize)> =
        loads.iter().flat_map(|&load| args.adapters.iter().map(move |&adapters| (load, adapters))).collect();
    let batches: Vec<ForwardBatch> = cases.iter().map(|(load, adapters)| load.batch(vocab_size, *adapters)).collect();
    let most_rows = loads.iter().map(|load| load.num_sampled()).max().unwrap_or(1);
    let mut logits = Vec::new();
    bindery_model::make_room(&mut logits, most_rows * vocab_size).expect("room for the logits");

    // Once all that the steps need is taken, so that half of what is left can be read.
    let product_bytes: u64 = model.info().products.iter().map(|product| product.num_bytes).sum();
    let most_kv_bytes = loads.iter().map(|load| load.attention_work(&model).read_bytes).max().unwrap_or(0);
    let machine = Machine::new(args.threads).expect("the instruction set");
    let gauge = Gauge::new(machine, product_bytes + most_kv_bytes, clock).expect("the roofs");
    let mut results: Vec<Timed> = cases.iter().map(|_| Timed::default()).collect();
    for index in 0..=args.rounds.max(1) {
        let mut before = gauge.glance(clock);
        for (((load, _), batch), result) in cases.iter().zip(&batches).zip(&mut results) {
            let times = round(&mut model, batch, &mut logits[..load.num_sampled() * vocab_size]);
            let after = gauge.glance(clock);
            // The first one warms up.
            if index > 0 {
                result.0.push((times, before.max(after)));
            }
            before = after;
        }
    }
    report(&args, &model, loading, &cases, &results);
}

/// The lowest and the highest of a roof in the whole run.
fn range(results: &[Timed], roof: impl Fn(&Roofs) -> f64) -> [f64; 2] {
    let all = || results.iter().flat_map(|result| &result.0).map(|(_, roofs)| roof(roofs));
    [all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max)]
}

fn report(args: &Args, model: &Model, loading: Duration, cases: &[(Load, usize)], results: &[Timed]) {
    let info = model.info();
    let read = range(results, |roofs| roofs.read_bytes);
    let int8 = range(results, |roofs| roofs.int8_operations);
    let f32 = range(results, |roofs| roofs.f32_operations);
    let int8_note = results.iter().flat_map(|result| &result.0).find_map(|(_, roofs)| roofs.int8_note);
    if args.json {
        let loads: Vec<Value> = cases
            .iter()
            .zip(results)
            .map(|((load, adapters), result)| {
                let (times, (share, bound)) = (result.median(), result.share(model, *load));
                let parts = PARTS.iter().zip(times.parts).map(|(name, part)| ((*name).to_owned(), json!(part)));
                json!({
                    "load": load.name(), "adapters": adapters, "tokens_per_second": load.num_tokens() as f64 / times.total,
                    "seconds": times.total, "parts": parts.collect::<serde_json::Map<_, _>>(),
                    "share_of_roof": share, "bound": bound, "rounds": result.rounds(),
                })
            })
            .collect();
        let result = json!({
            "device": info.device, "threads": info.threads, "weight_bytes": info.weight_bytes,
            "load_seconds": loading.as_secs_f64(),
            "roofs": {
                "read_bytes_per_second": read, "int8_operations_per_second": int8, "f32_operations_per_second": f32,
                "int8_note": int8_note,
            },
            "loads": loads,
        });
        println!("{result}");
        return;
    }
    println!(
        "{}, {} threads; {} in {:.2} s, {:.0} MB of weights, cache in {:?}",
        info.device,
        info.threads,
        info.weight_format,
        loading.as_secs_f64(),
        info.weight_bytes as f64 / 1e6,
        info.kv_cache_dtype
    );
    println!(
        "roofs: {:.1} to {:.1} GB/s read, {:.0} to {:.0} GOP/s int8, {:.0} to {:.0} GFLOP/s f32",
        read[0] / 1e9,
        read[1] / 1e9,
        int8[0] / 1e9,
        int8[1] / 1e9,
        f32[0] / 1e9,
        f32[1] / 1e9
    );
    if let Some(note) = int8_note {
        println!("({note})");
    }
    print!("{:<28} {:>9} {:>9}  {:<14}", "", "tok/s", "ms", "of the roof");
    for part in PARTS {
        print!(" {part:>9}");
    }
    println!("  (ms)");
    for (&(load, adapters), result) in cases.iter().zip(results) {
        let (times, (share, bound)) = (result.median(), result.share(model, load));
        let share = format!("{:.0} % {bound}", 100.0 * share);
        let rate = load.num_tokens() as f64 / times.total;
        let name = if adapters == 0 { load.name() } else { format!("{}, {adapters} LoRA", load.name()) };
        print!("{name:<28} {rate:>9.1} {:>9.2}  {share:<14}", times.total * 1e3);
        for part in times.parts {
            print!(" {:>9.2}", part * 1e3);
        }
        println!();
    }
}
