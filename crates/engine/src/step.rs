//! The loop: plan, forward, sample, emit. It runs on the one thread that owns the model.
//!
//! It must not know text, HTTP or tenants, and works on nothing that grows with a prompt, a stop list or a bias map:
//! that is done before submission and behind the stream. Its invariants: before every plan all commands that have
//! arrived are carried out, so a dropped stream's blocks are free before the next step; readers hear of a step only
//! when the scheduler has recorded it and the statistics show it; a failed step, or a panic in it, costs the requests
//! in that step and nothing else.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use bindery_model::{ForwardBatch, ModelError, RopeRegimes, StepModel};
use bindery_scheduler::{Limits, Pace, Refusal, ScheduledSequence, Scheduler, SeqId, StepPlan};
use tokio::sync::watch;

use crate::{
    EngineError,
    engine::{
        Command, EngineConfig, EngineStats, Submission,
        admission::{Door, QueuePace, RETRY_AFTER_MIN},
        draws::Draws,
        live::{Live, LiveRequests, key_of},
        outcome::Outcome,
        pacing,
        rows::{self, LogitRow},
        stats::{Phase, StatsRecorder},
    },
    sample::SampleError,
};

/// Bytes of logits that exist at one time. A vocabulary's rows are wide (a quarter million floats a row at worst), so a
/// scored prompt or a large batch is worked through in slices of rows.
const LOGITS_BYTES_MAX: usize = 32 << 20;
/// Rows of a slice at most, so that scores of a long prompt arrive in events of a readable size.
const LOGIT_ROWS_MAX: usize = 256;
/// How long a step waits for masks, all together, before it goes on without those who miss one.
const MASK_PATIENCE: Duration = Duration::from_millis(1);
/// Commands carried out between two steps at most. Aborts of what was queued come behind their submissions, so the
/// bound only matters to a caller that submits and drops without end.
const COMMANDS_MAX: usize = 1 << 16;

/// The state of the loop.
pub(crate) struct EngineLoop {
    model: Box<dyn StepModel>,
    rope_regimes: Option<RopeRegimes>,
    scheduler: Scheduler,
    limits: Limits,
    requests: LiveRequests,
    inbox: mpsc::Receiver<Command>,
    door: Arc<Door>,
    pace: QueuePace,
    recorder: StatsRecorder,
    published: watch::Sender<EngineStats>,
    paces_prompts: bool,
    /// The scheduler has work and could not plan any of it: nothing changes until a command or a deadline comes.
    is_stalled: bool,
    /// Sequences whose next mask is not there yet, as far as is known.
    awaiting_masks: Vec<SeqId>,
    // Of one step, reused:
    plan: StepPlan,
    batch: ForwardBatch,
    rows: Vec<LogitRow>,
    order: Vec<usize>,
    copies: Vec<(u32, u32)>,
    logits: Vec<f32>,
    draws: Draws,
    outcome: Outcome,
}

impl EngineLoop {
    /// Everything but the thread.
    pub(crate) fn new(
        model: Box<dyn StepModel>,
        config: &EngineConfig,
        inbox: mpsc::Receiver<Command>,
        door: Arc<Door>,
    ) -> (Self, watch::Receiver<EngineStats>) {
        let limits = config.limits.clone();
        let scheduler = Scheduler::new(limits.clone());
        let recorder = StatsRecorder::new();
        let (published, stats) = watch::channel(recorder.snapshot(&scheduler.stats(), limits.block_size, 0, 0));
        let engine_loop = Self {
            rope_regimes: model.rope_regimes(),
            model,
            scheduler,
            limits,
            requests: LiveRequests::default(),
            inbox,
            door,
            pace: QueuePace::default(),
            recorder,
            published,
            paces_prompts: config.paces_prompts,
            is_stalled: false,
            awaiting_masks: Vec::new(),
            plan: StepPlan::default(),
            batch: ForwardBatch::default(),
            rows: Vec::new(),
            order: Vec::new(),
            copies: Vec::new(),
            logits: Vec::new(),
            draws: Draws::default(),
            outcome: Outcome::default(),
        };
        (engine_loop, stats)
    }

    /// Until it is told to stop.
    pub(crate) fn run(mut self) {
        loop {
            // Only a broken promise of the scheduler can panic out of a turn; see `compute` for the model's panics.
            match catch_unwind(AssertUnwindSafe(|| self.turn())) {
                Ok(Some(())) => {}
                Ok(None) => break,
                Err(panic) => self.start_over(&panic_message(&*panic)),
            }
        }
        for key in self.requests.keys() {
            self.end_request(key, EngineError::ShuttingDown);
        }
        self.publish();
    }

    /// What was asked for since the last step, then a step. None: stop.
    fn turn(&mut self) -> Option<()> {
        self.take_commands()?;
        self.expire_deadlines();
        self.recorder.lap(Phase::Commands);
        self.step();
        Some(())
    }

    /// One step.
    fn step(&mut self) {
        self.recorder.begin_step();
        self.schedule();
        self.recorder.lap(Phase::Schedule);
        if self.plan.is_empty() {
            return;
        }
        match self.compute() {
            Ok(()) => self.commit(),
            Err(message) => self.fail_step(&message),
        }
        self.publish();
        self.emit();
        self.recorder.lap(Phase::Emit);
    }

    /// The scheduler's plan, and the model's batch of it.
    fn schedule(&mut self) {
        self.await_masks();
        let now = Instant::now();
        let cost = self.paces_prompts.then(|| self.recorder.step_cost()).flatten();
        match cost {
            None => self.scheduler.plan(&Pace::NONE, &mut self.plan),
            Some(cost) => {
                let limit = |load| pacing::long_tokens(cost, load);
                self.scheduler.plan(&Pace { short: pacing::short_tokens(cost), limit: &limit }, &mut self.plan);
            }
        }
        self.is_stalled = self.plan.is_empty() && self.scheduler.has_work();
        let mut num_started = 0;
        for sequence in &self.plan.sequences {
            num_started += usize::from(self.requests.start(key_of(sequence.id), now));
        }
        if num_started > 0 {
            self.pace.observe(&self.door, now, num_started);
        }
        rows::fill(&self.plan, &self.requests, self.rope_regimes, &mut self.batch, &mut self.rows, &mut self.order);
    }

    /// Holds the sequences whose masks are not there yet. A mask is usually ready long before the next step, so a moment's
    /// patience, one for all of them, saves most from sitting one out.
    fn await_masks(&mut self) {
        if self.awaiting_masks.is_empty() {
            return;
        }
        let deadline = Instant::now() + MASK_PATIENCE;
        let Self { requests, scheduler, awaiting_masks, .. } = self;
        awaiting_masks.retain(|&id| {
            let Some(grammar) = requests.grammar_mut(id) else { return false };
            let is_ready = grammar.is_ready(deadline);
            scheduler.hold(id, !is_ready);
            !is_ready
        });
    }

    /// Forward pass, logits and sampling. An error or a panic in here leaves the scheduler untouched.
    fn compute(&mut self) -> Result<(), String> {
        self.outcome.clear();
        let computed = catch_unwind(AssertUnwindSafe(|| {
            self.forward()?;
            self.sample()
        }));
        match computed {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(panic) => Err(panic_message(&*panic)),
        }
    }

    fn forward(&mut self) -> Result<(), ModelError> {
        if !self.plan.copies.is_empty() {
            self.copies.clear();
            self.copies.extend(self.plan.copies.iter().map(|copy| (copy.source.0, copy.target.0)));
            self.model.copy_blocks(&self.copies)?;
        }
        let recorder = &mut self.recorder;
        self.model.forward(&self.batch, &mut |phase| recorder.lap(Phase::Model(phase)))
    }

    fn sample(&mut self) -> Result<(), ModelError> {
        let vocab_size = self.model.vocab_size();
        let rows_per_slice = (LOGITS_BYTES_MAX / (vocab_size * size_of::<f32>())).clamp(1, LOGIT_ROWS_MAX);
        let mut start = 0;
        for slice in self.rows.chunks(rows_per_slice) {
            let num_logits = slice.len() * vocab_size;
            bindery_model::make_room(&mut self.logits, num_logits)?;
            let logits = &mut self.logits[..num_logits];
            self.model.logits(start..start + slice.len(), logits)?;
            self.recorder.lap(Phase::Head);
            let model = &*self.model;
            let spread = |num_rows: usize, task: &(dyn Fn(usize) + Sync)| model.spread(num_rows, task);
            self.draws.compute((slice, logits), vocab_size, &self.plan, &mut self.requests, &spread);
            for (at, row) in slice.iter().enumerate() {
                self.outcome.take_row(row, self.draws.row(at), &self.plan, &mut self.requests);
            }
            self.outcome.flush_scores(&mut self.requests);
            self.recorder.lap(Phase::Sample);
            start += slice.len();
        }
        Ok(())
    }

    /// Records a computed step: the scheduler's sequences move on, requests that ended are let go.
    fn commit(&mut self) {
        self.outcome.drop_failed();
        for (key, error) in std::mem::take(&mut self.outcome.failed) {
            // A sample that ended in this very step is none of the request's any more, but still the scheduler's.
            for &id in self.plan.samples.iter().filter(|&&id| key_of(id) == key) {
                self.scheduler.abort(id);
            }
            self.end_request(key, sample_error(&error));
        }
        self.scheduler.commit(&self.plan, &self.outcome.sampled);
        self.recompute_stale();
        // A prompt's chunk may be one token, too.
        let is_prompt = |sequence: &ScheduledSequence| sequence.tokens.len() > 1 || sequence.samples.is_empty();
        let has_prompts = self.plan.sequences.iter().any(is_prompt);
        self.recorder.count_step(self.plan.num_batched_tokens());
        self.recorder.learn_cost(self.plan.num_batched_tokens(), has_prompts);
        self.recorder.count_work(self.batch.logit_rows.len(), self.model.attention_work(&self.batch));
        self.recorder.generation_tokens += self.outcome.sampled.len() as u64;
        self.recorder.num_decoding = self.outcome.sampled.iter().filter(|sampled| !sampled.finished).count();
        self.awaiting_masks.append(&mut self.outcome.advanced);
        for sequence in &self.plan.sequences {
            let key = key_of(sequence.id);
            let num_computed_tokens = sequence.num_computed_tokens + sequence.tokens.len();
            let Some(live) = self.requests.get_mut(key) else { continue };
            self.recorder.prompt_tokens += live.count_prompt_tokens(num_computed_tokens);
            if live.is_scored() {
                self.outcome.scored.push((key, Arc::clone(&live.outbox)));
            }
        }
        for index in 0..self.outcome.scored.len() {
            self.drop_request(self.outcome.scored[index].0);
        }
        for sampled in self.outcome.sampled.iter().filter(|sampled| sampled.finished) {
            self.requests.remove_if_ended(key_of(sampled.id));
        }
    }

    /// Sequences whose new token brings them to a length of other rotary frequencies: their keys are made anew. (None is
    /// ever found in a regime but that of its known tokens, so it is enough to look at those that grew.)
    fn recompute_stale(&mut self) {
        let Some(regimes) = self.rope_regimes else { return };
        for sequence in &self.plan.sequences {
            let rope_len = |num_known_tokens| regimes.rope_len(sequence.num_prompt_tokens, num_known_tokens);
            if rope_len(sequence.num_known_tokens) == rope_len(sequence.num_known_tokens + 1) {
                continue;
            }
            for &id in &self.plan.samples[sequence.samples.clone()] {
                self.scheduler.recompute(id);
            }
        }
    }

    /// The step is lost, and with it every request that was in it.
    fn fail_step(&mut self, message: &str) {
        tracing::error!(num_tokens = self.plan.num_batched_tokens(), message, "a step failed");
        self.outcome.clear();
        self.recorder.count_step(self.plan.num_batched_tokens());
        self.recorder.num_failed_steps += 1;
        let dropped = self.scheduler.fail(&self.plan);
        self.plan.clear();
        for id in dropped {
            self.end_request(key_of(id), EngineError::Step { message: message.to_owned() });
        }
    }

    /// Hands the step's events to their readers.
    fn emit(&mut self) {
        let now = Instant::now();
        let mut has_slow_reader = false;
        let mut events = std::mem::take(&mut self.outcome.events);
        for (outbox, key, event) in events.drain(..) {
            if let Err(full) = outbox.send(now, event) {
                tracing::debug!(key, buffered = full.num_buffered, "a reader is too slow");
                outbox.fail(now, EngineError::SlowReader { buffered: full.num_buffered });
                self.drop_request(key);
                has_slow_reader = true;
            }
        }
        self.outcome.events = events;
        for (_, outbox) in self.outcome.scored.drain(..) {
            outbox.end_scored(now);
        }
        if has_slow_reader {
            self.publish();
        }
    }

    /// Sleeps while there is nothing to do, then carries out what was asked. None: stop.
    fn take_commands(&mut self) -> Option<()> {
        let mut num_taken = 0;
        if !self.scheduler.has_work() || self.is_stalled {
            let first = match self.requests.next_deadline() {
                None => self.inbox.recv().ok()?,
                Some(deadline) => match self.inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                    Ok(command) => command,
                    Err(mpsc::RecvTimeoutError::Timeout) => {
                        self.recorder.wake();
                        return Some(());
                    }
                    Err(mpsc::RecvTimeoutError::Disconnected) => return None,
                },
            };
            self.recorder.wake();
            self.carry_out(first)?;
            num_taken = 1;
        }
        while num_taken < COMMANDS_MAX
            && let Ok(command) = self.inbox.try_recv()
        {
            self.carry_out(command)?;
            num_taken += 1;
        }
        if num_taken > 0 && (!self.scheduler.has_work() || self.is_stalled) {
            self.publish();
        }
        Some(())
    }

    fn carry_out(&mut self, command: Command) -> Option<()> {
        match command {
            Command::Submit(submission) => self.admit(*submission),
            Command::Abort { key } => self.drop_request(key),
            Command::AbortSample { key, sample } => {
                if let Some(id) = self.requests.end_sample(key, sample) {
                    self.scheduler.abort(id);
                    self.requests.remove_if_ended(key);
                }
            }
            Command::Wake => {}
            Command::AddAdapter { id, adapter } => {
                if let Err(error) = self.model.add_adapter(id, &adapter) {
                    tracing::error!(id, %error, "the model refuses an adapter");
                }
            }
            Command::RemoveAdapter { id } => self.model.remove_adapter(id),
            Command::Stop => return None,
        }
        Some(())
    }

    fn admit(&mut self, submission: Submission) {
        let (live, spec) = Live::new(submission);
        tracing::debug!(request_id = live.request_id, num_prompt_tokens = live.num_prompt_tokens, "queued");
        match self.scheduler.add(spec) {
            Ok(()) => self.requests.insert(live),
            Err(refusal) => live.outbox.fail(Instant::now(), refusal_error(&refusal, &self.limits)),
        }
    }

    fn expire_deadlines(&mut self) {
        let now = Instant::now();
        let mut has_expired = false;
        while let Some(key) = self.requests.first_expired(now) {
            let error = self.requests.get_mut(key).map(|live| live.deadline_error());
            self.end_request(key, error.unwrap_or(EngineError::DeadlineExceeded { timeout_ms: 0 }));
            has_expired = true;
        }
        if has_expired {
            self.publish();
        }
    }

    /// Frees what the request holds and tells its reader why.
    fn end_request(&mut self, key: u64, error: EngineError) {
        if let Some(live) = self.drop_request_record(key) {
            tracing::debug!(request_id = live.request_id, %error, "ended");
            live.outbox.fail(Instant::now(), error);
        }
    }

    fn drop_request(&mut self, key: u64) {
        self.drop_request_record(key);
    }

    fn drop_request_record(&mut self, key: u64) -> Option<Live> {
        let live = self.requests.remove(key)?;
        for id in live.sequences() {
            self.scheduler.abort(id);
        }
        Some(live)
    }

    /// The scheduler broke one of its own promises: its state cannot be trusted, so everything in it fails, and a new
    /// one goes on.
    fn start_over(&mut self, message: &str) {
        tracing::error!(message, "the scheduler failed; all requests are lost, starting over");
        self.scheduler = Scheduler::new(self.limits.clone());
        self.recorder.num_failed_steps += 1;
        self.outcome.clear();
        self.plan.clear();
        self.is_stalled = false;
        for key in self.requests.keys() {
            self.end_request(key, EngineError::Step { message: message.to_owned() });
        }
        self.publish();
    }

    fn publish(&self) {
        let snapshot = self.recorder.snapshot(
            &self.scheduler.stats(),
            self.limits.block_size,
            self.requests.num_started(),
            self.door.num_queued(),
        );
        self.published.send_replace(snapshot);
    }
}

/// What a request is told whose row gave no token, by whose mistake it is.
fn sample_error(error: &SampleError) -> EngineError {
    let message = error.to_string();
    match error {
        SampleError::NotFinite { .. } => EngineError::Step { message },
        SampleError::NothingAllowed { .. } => EngineError::Invalid { param: "logit_bias", message },
        SampleError::Grammar { param, .. } => EngineError::Invalid { param, message },
    }
}

/// What a refused request is told. The door decides by the same rules, so that a refusal need not wait for this thread.
pub(crate) fn refusal_error(refusal: &Refusal, limits: &Limits) -> EngineError {
    match *refusal {
        Refusal::QueueFull { num_queued_requests, max_queued_requests } => EngineError::QueueFull {
            num_asked: 1,
            num_queued: num_queued_requests,
            max_queued: max_queued_requests,
            retry_after: RETRY_AFTER_MIN,
        },
        Refusal::TooLong { num_tokens, max_model_len } => EngineError::ContextLengthExceeded {
            param: "prompt",
            message: format!(
                "This model's maximum context length is {max_model_len} tokens. However, you requested {num_tokens} tokens \
                 with prompt and completion. Please reduce the length of the prompt or completion."
            ),
        },
        Refusal::NeverFits { num_blocks_needed, num_blocks } => {
            let num_tokens = num_blocks * limits.block_size;
            EngineError::Invalid {
                param: "max_tokens",
                message: format!(
                    "prompt and max_tokens need {num_blocks_needed} blocks of the KV cache, which has {num_blocks} \
                     ({num_tokens} tokens): shorten the prompt, lower max_tokens, or start the server with a larger \
                     --kv-cache-memory"
                ),
            }
        }
        Refusal::Invalid { reason } => EngineError::Invalid { param: "prompt", message: reason.to_owned() },
    }
}

/// What a panic said.
fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("panicked: {}", text.unwrap_or_else(|| "no message".to_owned()))
}
