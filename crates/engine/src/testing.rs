//! Doubles for tests of this crate and of those above it: a model that cannot be right by luck, and all that it takes to
//! serve it.
//!
//! [`FakeModel`] computes no network, but it keeps the promises a model must keep: every token is stored at the slot it
//! is given, and the logits of a row are a hash of the whole history read back through the block table. So a wrong slot,
//! table, position, copy or leftover gives other tokens, and [`expected_logits`] says independently what is right.
//! Nothing in here sleeps: a [`Gate`] lets a test hold a step and let it go.
//!
//! Not part of the public interface; it must never be reached from a served request.

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use bindery_model::{
    Adapter, AdapterFormat, AdapterInfo, AdapterLimits, AttentionShape, AttentionWork, BackendKind, BatchSequence,
    ForwardBatch, KvCacheDtype, ModelError, ModelInfo, ModelPhase, RopeRegimes, StepModel,
};
use bindery_scheduler::{Limits, TokenId};

use crate::{
    AdapterPoolConfig, ChatTemplate, EngineError, LocalModel, ReadAdapter, grammar::GrammarCompiler,
    load::byte_tokenizer, local_model::LocalModelParts,
};

/// 256 bytes, an end token, a beginning token, a plain special token, and padding.
pub const VOCAB_SIZE: usize = 264;
/// Ends a generation.
pub const EOS: TokenId = TokenId(256);
/// Longer than any step is on its way; reaching it is a failure, not a measurement.
const PATIENCE: Duration = Duration::from_mins(1);

/// What the double does besides its duty.
#[derive(Clone, Debug, Default)]
pub struct FakeModelOptions {
    /// `forward` fails when a batch holds this token.
    pub fail_on: Option<TokenId>,
    /// `forward` panics when a batch holds this token.
    pub panic_on: Option<TokenId>,
    /// The row of this token has a NaN among its logits.
    pub nan_on: Option<TokenId>,
    /// Added to the end token's logit: large makes every answer short, very negative makes it never end by itself.
    pub eos_bias: f32,
    /// Every `forward` waits here.
    pub gate: Option<Gate>,
    /// What each token of a `forward` takes at least.
    pub token_time: Duration,
    /// Every grammar thread waits here after each mask it has computed, and computes no other meanwhile.
    pub mask_gate: Option<Gate>,
    /// What the model says of its rotary frequencies. It notices keys of another regime than their request's.
    pub rope_regimes: Option<RopeRegimes>,
    /// How many adapters there may be.
    pub adapters: AdapterPoolConfig,
    /// Reads them.
    pub reader: FakeReader,
    /// Every batch is noted here.
    pub batches: Option<Arc<Mutex<Vec<ForwardBatch>>>>,
}

/// Holds steps until a test lets them go.
#[derive(Clone, Debug)]
pub struct Gate {
    arrived: mpsc::Sender<()>,
    permits: Arc<Mutex<mpsc::Receiver<()>>>,
}

/// The test's side of a [`Gate`]. Dropping it opens the gate for good.
#[derive(Debug)]
pub struct GateKeeper {
    arrived: mpsc::Receiver<()>,
    permits: mpsc::Sender<()>,
}

/// A closed gate.
pub fn gate() -> (Gate, GateKeeper) {
    let (arrived_tx, arrived_rx) = mpsc::channel();
    let (permits_tx, permits_rx) = mpsc::channel();
    let gate = Gate { arrived: arrived_tx, permits: Arc::new(Mutex::new(permits_rx)) };
    (gate, GateKeeper { arrived: arrived_rx, permits: permits_tx })
}

impl Gate {
    fn pass(&self) {
        let _nobody_watches = self.arrived.send(());
        let permits = self.permits.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let _keeper_gone = permits.recv();
    }
}

impl GateKeeper {
    /// Blocks until a step stands at the gate.
    ///
    /// # Panics
    ///
    /// Where none comes: a test that waits for ever says nothing.
    pub fn wait_for_step(&self) {
        match self.arrived.recv_timeout(PATIENCE) {
            Ok(()) => {}
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("no step came to the gate within {PATIENCE:?}"),
            Err(mpsc::RecvTimeoutError::Disconnected) => panic!("the model is gone: no step will come to the gate"),
        }
    }

    /// Lets one step pass.
    pub fn let_go(&self) {
        let _engine_gone = self.permits.send(());
    }
}

/// The double.
#[derive(Debug)]
pub struct FakeModel {
    options: FakeModelOptions,
    block_size: usize,
    /// What each slot holds.
    slots: Vec<Option<Stored>>,
    /// The histories of the last batch's logit rows, as [`expected_logits`] takes them.
    rows: Vec<Vec<u32>>,
    /// Each adapter's tag, which stands before the histories of its rows.
    adapters: Vec<(u32, u32)>,
}

/// A token in the cache.
#[derive(Clone, Copy, Debug)]
struct Stored {
    token: u32,
    position: u32,
    rope_len: usize,
    adapter: Option<u32>,
}

impl FakeModel {
    /// With a cache of `num_blocks` blocks of `block_size` tokens.
    pub fn new(block_size: usize, num_blocks: usize, options: FakeModelOptions) -> Self {
        Self { options, block_size, slots: vec![None; block_size * num_blocks], rows: Vec::new(), adapters: Vec::new() }
    }

    fn write(&mut self, batch: &ForwardBatch) -> Result<(), ModelError> {
        let num_tokens = batch.tokens.len();
        if batch.positions.len() != num_tokens || batch.slots.len() != num_tokens {
            return Err(violation("tokens, positions and slots differ in number"));
        }
        let covered: Vec<usize> = batch.sequences.iter().flat_map(|sequence| sequence.rows.clone()).collect();
        if covered != (0..num_tokens).collect::<Vec<_>>() {
            return Err(violation("the sequences do not tile the batch"));
        }
        let mut written = batch.slots.clone();
        written.sort_unstable();
        written.dedup();
        if written.len() != num_tokens {
            return Err(violation("a slot is written twice"));
        }
        for sequence in &batch.sequences {
            for row in sequence.rows.clone() {
                let slot = self.slots.get_mut(batch.slots[row] as usize).ok_or_else(|| violation("no such slot"))?;
                let (token, position) = (batch.tokens[row], batch.positions[row]);
                let (rope_len, adapter) = (sequence.rope_len, sequence.adapter);
                *slot = Some(Stored { token, position, rope_len, adapter });
            }
        }
        Ok(())
    }

    /// The tokens at positions 0..=`row`'s, read through the block table.
    fn history(&self, batch: &ForwardBatch, row: usize) -> Result<Vec<u32>, ModelError> {
        let sequence = batch.sequences.iter().find(|sequence| sequence.rows.contains(&row));
        let sequence = sequence.ok_or_else(|| violation("a logit row is in no sequence"))?;
        let table = &batch.block_tables[sequence.block_table.clone()];
        let length = sequence.context_len - (sequence.rows.end - 1 - row);
        let tag = match sequence.adapter {
            None => None,
            Some(id) => match self.adapters.iter().find(|(known, _)| *known == id) {
                Some(&(_, tag)) => Some(Ok(tag)),
                None => return Err(violation("an adapter is named that was not added")),
            },
        };
        let tokens = (0..length).map(|position| {
            let block = table.get(position / self.block_size).ok_or_else(|| violation("a table is too short"))?;
            let slot = *block as usize * self.block_size + position % self.block_size;
            match self.slots.get(slot) {
                Some(&Some(Stored { position: at, rope_len, .. }))
                    if at as usize == position && rope_len != sequence.rope_len =>
                {
                    Err(violation("a key was rotated for another length of its request"))
                }
                Some(&Some(Stored { position: at, adapter, .. }))
                    if at as usize == position && adapter != sequence.adapter =>
                {
                    Err(violation("a key was computed through another adapter"))
                }
                Some(&Some(Stored { token, position: at, .. })) if at as usize == position => Ok(token),
                _ => Err(violation("a slot does not hold its position")),
            }
        });
        tag.into_iter().chain(tokens).collect()
    }
}

fn violation(what: &str) -> ModelError {
    ModelError::Step(format!("the batch breaks its contract: {what}"))
}

impl StepModel for FakeModel {
    /// On two threads and from the far end, since a model owes no order.
    fn spread(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let half = num_tasks / 2;
        std::thread::scope(|scope| {
            scope.spawn(move || (0..half).rev().for_each(task));
            (half..num_tasks).rev().for_each(task);
        });
    }

    fn vocab_size(&self) -> usize {
        VOCAB_SIZE
    }

    fn rope_regimes(&self) -> Option<RopeRegimes> {
        self.options.rope_regimes
    }

    /// One head of one element in one layer, a byte a key.
    fn attention_work(&self, batch: &ForwardBatch) -> AttentionWork {
        let num_keys = |sequence: &BatchSequence| sequence.context_len as u64;
        let num_rows = batch.tokens.len() as u64;
        AttentionWork { read_bytes: batch.sequences.iter().map(num_keys).sum(), operations: num_rows }
    }

    fn add_adapter(&mut self, id: u32, adapter: &Arc<Adapter>) -> Result<(), ModelError> {
        if self.adapters.iter().any(|(known, _)| *known == id) {
            return Err(violation("an adapter was added twice"));
        }
        self.adapters.push((id, adapter_tag(adapter)));
        Ok(())
    }

    fn remove_adapter(&mut self, id: u32) {
        self.adapters.retain(|(known, _)| *known != id);
    }

    fn copy_blocks(&mut self, copies: &[(u32, u32)]) -> Result<(), ModelError> {
        for &(source, target) in copies {
            let source = source as usize * self.block_size;
            self.slots.copy_within(source..source + self.block_size, target as usize * self.block_size);
        }
        Ok(())
    }

    fn forward(&mut self, batch: &ForwardBatch, passed: &mut dyn FnMut(ModelPhase)) -> Result<(), ModelError> {
        if let Some(batches) = &self.options.batches {
            batches.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(batch.clone());
        }
        if let Some(gate) = &self.options.gate {
            gate.pass();
        }
        if !self.options.token_time.is_zero() {
            std::thread::sleep(self.options.token_time * batch.tokens.len() as u32);
        }
        let holds = |token: Option<TokenId>| token.is_some_and(|token| batch.tokens.contains(&token.0));
        assert!(!holds(self.options.panic_on), "the fake model was told to panic");
        if holds(self.options.fail_on) {
            return Err(ModelError::Step("the fake model was told to fail".to_owned()));
        }
        self.write(batch)?;
        passed(ModelPhase::Embed);
        self.rows = batch.logit_rows.iter().map(|&row| self.history(batch, row as usize)).collect::<Result<_, _>>()?;
        use ModelPhase::{Attention, AttentionInputs, AttentionOutput, Mlp};
        [AttentionInputs, Attention, AttentionOutput, Mlp].into_iter().for_each(passed);
        Ok(())
    }

    fn logits(&mut self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ModelError> {
        if out.len() != rows.len() * VOCAB_SIZE || rows.end > self.rows.len() {
            return Err(violation("rows of logits were asked for that are not there"));
        }
        for (history, out) in self.rows[rows].iter().zip(out.chunks_exact_mut(VOCAB_SIZE)) {
            expected_logits(history, self.options.eos_bias, out);
            if self.options.nan_on.is_some_and(|token| history.last() == Some(&token.0)) {
                out[7] = f32::NAN;
            }
        }
        Ok(())
    }
}

/// Reads the double's adapters: a folder whose adapter_model.safetensors holds a number, which is the adapter's tag. A file that
/// holds something else is broken.
#[derive(Clone, Debug, Default)]
pub struct FakeReader {
    /// Every reading waits here.
    pub gate: Option<Gate>,
    /// Readings under way, and the most there were at one time.
    pub num_readings: Arc<Mutex<(usize, usize)>>,
}

impl ReadAdapter for FakeReader {
    fn read(&self, path: &Path, _limits: &AdapterLimits) -> Result<Adapter, ModelError> {
        let readings = || self.num_readings.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        {
            let mut readings = readings();
            readings.0 += 1;
            readings.1 = readings.1.max(readings.0);
        }
        if let Some(gate) = &self.gate {
            gate.pass();
        }
        readings().0 -= 1;
        let path = path.join("adapter_model.safetensors");
        let refuse = |what: String| ModelError::Unsupported(format!("{}: {what}", path.display()));
        let text = fs::read_to_string(&path).map_err(|error| refuse(error.to_string()))?;
        let tag: u32 = text.trim().parse().map_err(|_| refuse(format!("{text:?} is no tag")))?;
        Ok(Adapter::without_weights(fake_adapter_info(), u64::from(tag)))
    }
}

/// What the double's adapters say about themselves.
pub fn fake_adapter_info() -> AdapterInfo {
    AdapterInfo {
        format: AdapterFormat::Peft,
        rank: 1,
        alpha: 1.0,
        targets: "none".to_owned(),
        base_model_name_or_path: None,
        licence: Some("mit".to_owned()),
        num_parameters: 0,
        num_bytes: 0,
        num_bytes_in_f32: 0,
    }
}

/// What stands before the histories of rows that go through an adapter, see [`expected_logits`].
fn adapter_tag(adapter: &Adapter) -> u32 {
    adapter.num_bytes() as u32
}

/// What the model computes after `history` (the tokens, and before them the tag of the adapter where there is one): each logit is drawn from [0, 8) by a hash of history and token; padding is
/// minus infinity.
pub fn expected_logits(history: &[u32], eos_bias: f32, out: &mut [f32]) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for &token in history {
        state = mix(state ^ u64::from(token));
    }
    for (token, logit) in out.iter_mut().enumerate() {
        *logit = (mix(state ^ token as u64) >> 40) as f32 / (1_u64 << 24) as f32 * 8.0;
    }
    out[EOS.0 as usize] += eos_bias;
    out[259..].fill(f32::NEG_INFINITY);
}

/// SplitMix64's finaliser.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Limits that suit small tests; change what a test is about.
pub fn small_limits() -> Limits {
    Limits {
        block_size: 4,
        num_blocks: 512,
        max_num_seqs: 64,
        max_num_batched_tokens: 64,
        max_model_len: 512,
        max_queued_requests: 256,
    }
}

/// A whole [`LocalModel`] over the double with a byte-level tokenizer.
pub fn fake_local_model(limits: Limits, options: FakeModelOptions) -> Result<LocalModel, EngineError> {
    fake_local_model_with_template(limits, options, None)
}

/// The same with a chat template.
pub fn fake_local_model_with_template(
    limits: Limits,
    options: FakeModelOptions,
    template: Option<ChatTemplate>,
) -> Result<LocalModel, EngineError> {
    let mask_gate = options.mask_gate.clone();
    let (options_of_pool, reader) = (options.adapters.clone(), options.reader.clone());
    let model = FakeModel::new(limits.block_size, limits.num_blocks, options);
    let parts = LocalModelParts {
        tokenizer: byte_tokenizer()?,
        template,
        info: fake_info(&limits),
        limits,
        max_buffered_tokens: 1024,
        paces_prompts: false,
        adapters: (options_of_pool, Box::new(reader)),
    };
    let mut local = LocalModel::from_parts(Box::new(model), parts)?;
    if let Some(gate) = mask_gate {
        let wake = local.engine.waker();
        let gated = move || {
            gate.pass();
            wake();
        };
        local.grammars = Arc::new(GrammarCompiler::new(Arc::clone(&local.tokenizer), Arc::new(gated)));
    }
    Ok(local)
}

/// What the double says about itself.
pub fn fake_info(limits: &Limits) -> ModelInfo {
    ModelInfo {
        architecture: "fake".to_owned(),
        vocab_size: VOCAB_SIZE,
        num_layers: 1,
        hidden_size: 1,
        num_heads: 1,
        num_kv_heads: 1,
        head_dim: 1,
        intermediate_size: 1,
        window: None,
        tied_embeddings: true,
        max_position_embeddings: limits.max_model_len,
        bos_token_id: None,
        eos_token_ids: vec![EOS.0],
        num_parameters: 0,
        weight_format: "none".to_owned(),
        num_quantized_tensors: 0,
        products: Vec::new(),
        attention: AttentionShape::default(),
        weight_bytes: 0,
        stored_weight_bytes: 0,
        kv_bytes_per_token: 8,
        kv_cache_dtype: KvCacheDtype::F32,
        block_size: limits.block_size,
        threads: 1,
        backend: BackendKind::Reference,
        device: "none".to_owned(),
        path: PathBuf::from("fake"),
    }
}
