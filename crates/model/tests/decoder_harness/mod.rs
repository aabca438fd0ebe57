//! What the decoder's tests share: sequences with block tables, batches made of them, and the goldens' format.
//!
//! It plays the scheduler's part in the plainest way. Invariant: a block is handed out once, in the order given, so a
//! test decides how scattered the tables are.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::print_stderr, reason = "skips are aloud")]

use std::{
    collections::{HashMap, VecDeque},
    fs,
    path::{Path, PathBuf},
};

use bindery_model::{BatchSequence, ForwardBatch, LoadOptions, Model, RopeRegimes, StepModel};

/// Logit rows fetched at once; odd, so that slices end inside sequences.
const LOGIT_SLICE: usize = 7;

/// A model and its blocks.
pub(crate) struct Harness {
    pub(crate) model: Model,
    pub(crate) block_size: usize,
    free_blocks: VecDeque<u32>,
}

/// A sequence as a scheduler knows it: its tokens, how many are computed, and its blocks.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    pub(crate) tokens: Vec<u32>,
    pub(crate) num_prompt_tokens: usize,
    pub(crate) num_computed_tokens: usize,
    pub(crate) block_table: Vec<u32>,
    /// What its rows go through.
    pub(crate) adapter: Option<u32>,
}

impl Sequence {
    pub(crate) fn new(tokens: &[u32]) -> Self {
        Self {
            tokens: tokens.to_vec(),
            num_prompt_tokens: tokens.len(),
            num_computed_tokens: 0,
            block_table: Vec::new(),
            adapter: None,
        }
    }

    /// The same through an adapter.
    pub(crate) fn through(tokens: &[u32], adapter: Option<u32>) -> Self {
        Self { adapter, ..Self::new(tokens) }
    }

    pub(crate) fn num_uncomputed_tokens(&self) -> usize {
        self.tokens.len() - self.num_computed_tokens
    }

    fn rope_len(&self, regimes: RopeRegimes) -> usize {
        regimes.rope_len(self.num_prompt_tokens, self.tokens.len())
    }

    /// One more known token. Where it brings the sequence into another rotary regime, all of it is computed again.
    pub(crate) fn push(&mut self, token: u32, regimes: Option<RopeRegimes>) {
        let rope_len = regimes.map(|regimes| self.rope_len(regimes));
        self.tokens.push(token);
        if regimes.map(|regimes| self.rope_len(regimes)) != rope_len {
            self.num_computed_tokens = 0;
        }
    }
}

/// Logits of one row.
pub(crate) type Row = Vec<f32>;

impl Harness {
    /// Blocks are handed out in ascending order.
    pub(crate) fn load(path: &Path, options: &LoadOptions, num_blocks: usize) -> Self {
        Self::with_blocks(path, options, num_blocks, (0..num_blocks as u32).collect())
    }

    /// Blocks are handed out in the order given.
    pub(crate) fn with_blocks(path: &Path, options: &LoadOptions, num_blocks: usize, order: Vec<u32>) -> Self {
        let mut model = Model::load(path, options, &mut |_, _| ()).unwrap();
        model.allocate_kv(num_blocks).unwrap();
        Self { model, block_size: options.block_size, free_blocks: order.into() }
    }

    /// The batch that computes the next `num_tokens` of each sequence. Logits are kept for rows at positions that
    /// `wanted` accepts. The sequences are as they will be after the step.
    pub(crate) fn batch(
        &mut self,
        work: &mut [(&mut Sequence, usize)],
        wanted: impl Fn(usize) -> bool,
    ) -> (ForwardBatch, Vec<(usize, usize)>) {
        let mut batch = ForwardBatch::default();
        let mut kept = Vec::new();
        let rope_regimes = self.model.rope_regimes();
        for (index, (sequence, num_tokens)) in work.iter_mut().enumerate() {
            let (row, table) = (batch.tokens.len(), batch.block_tables.len());
            let positions = sequence.num_computed_tokens..sequence.num_computed_tokens + *num_tokens;
            while sequence.block_table.len() * self.block_size < positions.end {
                sequence.block_table.push(self.free_blocks.pop_front().expect("the test allocates enough blocks"));
            }
            for position in positions.clone() {
                if wanted(position) {
                    kept.push((index, position));
                    batch.logit_rows.push(batch.tokens.len() as u32);
                }
                batch.tokens.push(sequence.tokens[position]);
                batch.positions.push(position as u32);
                let block = sequence.block_table[position / self.block_size] as usize;
                batch.slots.push((block * self.block_size + position % self.block_size) as u32);
            }
            batch.block_tables.extend(&sequence.block_table);
            batch.sequences.push(BatchSequence {
                rows: row..batch.tokens.len(),
                block_table: table..batch.block_tables.len(),
                context_len: positions.end,
                rope_len: rope_regimes.map_or(0, |regimes| sequence.rope_len(regimes)),
                adapter: sequence.adapter,
            });
            sequence.num_computed_tokens = positions.end;
        }
        (batch, kept)
    }

    /// Computes the next `num_tokens` of each sequence; returns (sequence, position, logits) of the wanted rows.
    pub(crate) fn step(
        &mut self,
        work: &mut [(&mut Sequence, usize)],
        wanted: impl Fn(usize) -> bool,
    ) -> Vec<(usize, usize, Row)> {
        let (batch, kept) = self.batch(work, wanted);
        self.model.forward(&batch, &mut |_| ()).unwrap();
        let vocab_size = self.model.vocab_size();
        let mut rows = Vec::with_capacity(kept.len());
        for start in (0..kept.len()).step_by(LOGIT_SLICE) {
            let end = (start + LOGIT_SLICE).min(kept.len());
            // Old values must be overwritten, so the buffer starts with what no logit is.
            let mut logits = vec![f32::NAN; (end - start) * vocab_size];
            self.model.logits(start..end, &mut logits).unwrap();
            for (row, &(sequence, position)) in logits.chunks_exact(vocab_size).zip(&kept[start..end]) {
                rows.push((sequence, position, row.to_vec()));
            }
        }
        rows
    }

    /// Logits of the wanted positions of one sequence alone, computed in chunks of `chunk` tokens.
    pub(crate) fn prefill(
        &mut self,
        sequence: &mut Sequence,
        chunk: usize,
        wanted: impl Fn(usize) -> bool,
    ) -> Vec<(usize, Row)> {
        let mut rows = Vec::new();
        while sequence.num_uncomputed_tokens() > 0 {
            let num_tokens = chunk.min(sequence.num_uncomputed_tokens());
            let step = self.step(&mut [(sequence, num_tokens)], &wanted);
            rows.extend(step.into_iter().map(|(_, position, row)| (position, row)));
        }
        rows
    }

    /// Appends the greedy token of the last row, computes it, and so on. Where that changes the frequencies of rotation,
    /// all is computed again, as the engine does.
    pub(crate) fn greedy(&mut self, sequence: &mut Sequence, last_row: &[f32], num_tokens: usize) -> Vec<u32> {
        let mut continuation = vec![argmax(last_row)];
        while continuation.len() < num_tokens {
            sequence.push(continuation[continuation.len() - 1], self.model.rope_regimes());
            let (num_tokens, last) = (sequence.num_uncomputed_tokens(), sequence.tokens.len() - 1);
            let rows = self.step(&mut [(sequence, num_tokens)], |position| position == last);
            continuation.push(argmax(&rows[0].2));
        }
        continuation
    }

    /// Takes a sequence's blocks back.
    pub(crate) fn free(&mut self, sequence: Sequence) {
        self.free_blocks.extend(sequence.block_table);
    }

    /// A block that no sequence has.
    pub(crate) fn take_block(&mut self) -> u32 {
        self.free_blocks.pop_front().expect("the test allocates enough blocks")
    }
}

pub(crate) fn argmax(row: &[f32]) -> u32 {
    let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    best.0 as u32
}

/// In f64: what is compared must not add errors of its own.
pub(crate) fn log_softmax(row: &[f32]) -> Vec<f64> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = row.iter().map(|&x| (x as f64 - max).exp()).sum();
    row.iter().map(|&x| x as f64 - max - sum.ln()).collect()
}

/// Of `q` from `p`, both logits.
pub(crate) fn kl_divergence(p: &[f32], q: &[f32]) -> f64 {
    let (p, q) = (log_softmax(p), log_softmax(q));
    p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// A committed golden; tests/golden/make_golden.py says what is in it.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct Golden {
    pub(crate) vocab_size: usize,
    pub(crate) fixed_ids: Vec<usize>,
    pub(crate) prompts: Vec<GoldenPrompt>,
    #[serde(default)]
    pub(crate) file_sha256: Option<String>,
    /// The frequencies of rotation depend on how long the whole sequence is.
    #[serde(default)]
    pub(crate) rope_depends_on_length: bool,
    /// How far transformers strays from its own f32, by data type. Of the checkpoints' goldens only.
    #[serde(default)]
    pub(crate) errors: HashMap<String, GoldenErrors>,
}

#[derive(Clone, Copy, Debug, serde::Deserialize)]
pub(crate) struct GoldenErrors {
    /// The largest difference of a log-probability.
    pub(crate) max: f64,
    /// The mean divergence of a row.
    pub(crate) kl: f64,
}

#[derive(Debug, serde::Deserialize)]
pub(crate) struct GoldenPrompt {
    pub(crate) name: String,
    pub(crate) tokens: Vec<u32>,
    pub(crate) greedy: Vec<u32>,
    pub(crate) rows: Vec<GoldenRow>,
}

#[derive(Debug, serde::Deserialize)]
pub(crate) struct GoldenRow {
    pub(crate) position: usize,
    pub(crate) top: Vec<(usize, f64)>,
    pub(crate) fixed: Vec<f64>,
}

impl Golden {
    pub(crate) fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_str(&text).unwrap()
    }

    /// The largest difference of any golden log-probability from `rows`' own.
    pub(crate) fn max_difference(&self, prompt: &GoldenPrompt, rows: &[(usize, Row)]) -> f64 {
        assert_eq!(rows.len(), prompt.rows.len());
        let mut worst: f64 = 0.0;
        for ((position, row), golden) in rows.iter().zip(&prompt.rows) {
            assert_eq!((*position, row.len()), (golden.position, self.vocab_size));
            let logprobs = log_softmax(row);
            let fixed = self.fixed_ids.iter().copied().zip(golden.fixed.iter().copied());
            for (id, expected) in golden.top.iter().copied().chain(fixed) {
                let difference = (logprobs[id] - expected).abs();
                assert!(difference.is_finite(), "{}: position {position}, token {id}", prompt.name);
                worst = worst.max(difference);
            }
        }
        worst
    }
}

impl GoldenPrompt {
    pub(crate) fn wants(&self, position: usize) -> bool {
        self.rows.iter().any(|row| row.position == position)
    }
}

/// The repository's top folder.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A committed tiny checkpoint.
pub(crate) fn checkpoint(name: &str) -> PathBuf {
    repository().join("tests/checkpoints").join(name)
}

/// A committed tiny adapter.
pub(crate) fn adapter(name: &str) -> PathBuf {
    repository().join("tests/adapters").join(name)
}

/// All of them.
pub(crate) const CHECKPOINTS: [&str; 5] =
    ["tiny-llama", "tiny-mistral", "tiny-llama-bias", "tiny-qwen2", "tiny-smollm3"];

/// The default model's file, or None after saying so.
pub(crate) fn default_model(test: &str) -> Option<PathBuf> {
    let path = std::env::var_os("BINDERY_TEST_MODEL").map(PathBuf::from);
    if path.is_none() {
        eprintln!("SKIPPED {test}: BINDERY_TEST_MODEL is not set to the default model's GGUF file");
    }
    path
}
