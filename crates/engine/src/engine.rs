//! The engine's outside: the handle through which everything else talks to the one thread that owns the model.
//!
//! Commands go in through a channel: submit, abort, abort a sample, stop. It needs no bound of its own, because each
//! command in it is paid for: a submission holds one of the places counted by [`admission`], and a submitted request
//! sends at most one abort and one per sample. Events come out through one bounded [`stream`] a request. Whether a
//! request is queued or refused is decided on the caller's side, so the answer never waits for a step.
//!
//! This module must not know text, nor compute anything itself; [`crate::step`] does.

pub(crate) mod admission;
pub(crate) mod draws;
pub(crate) mod live;
pub(crate) mod outcome;
pub(crate) mod pacing;
pub(crate) mod rows;
pub(crate) mod stats;
pub(crate) mod step_cost;
pub(crate) mod stream;

use std::{
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use bindery_model::{Adapter, StepModel};
use bindery_scheduler::{AdapterId, Limits, Refusal, SequenceSpec, StepLoad, TokenId};
use tokio::sync::watch;

use self::{
    admission::{Door, Ticket},
    stream::Outbox,
};
pub use self::{
    stats::{EngineStats, ITERATION_TOKENS_BOUNDS, STEP_PHASES},
    step_cost::StepCost,
    stream::TokenStream,
};
use crate::{
    AdapterLease, AdapterPool, AdapterPoolConfig, EngineError, ReadAdapter, TokenRequest,
    grammar::{CompiledGrammar, GrammarState, Wake},
    request::{MAX_SAMPLES, token_in_vocabulary},
    sample::PreparedSampling,
    step::{EngineLoop, refusal_error},
};

/// What the engine is started with.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Of the scheduler.
    pub limits: Limits,
    /// The model's own end tokens.
    pub eos_token_ids: Vec<TokenId>,
    /// Tokens of one sample that its reader may leave unread before the request is cancelled.
    pub max_buffered_tokens: usize,
    /// Long prompts are paced beside sequences that decode; otherwise they have whatever of a step is left.
    pub paces_prompts: bool,
}

/// Owns the thread; dropping it stops the engine.
#[derive(Debug)]
pub struct Engine {
    commands: mpsc::Sender<Command>,
    door: Arc<Door>,
    thread: Option<thread::JoinHandle<()>>,
}

/// Cheap to clone; the way in from any thread.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    door: Arc<Door>,
    stats: watch::Receiver<EngineStats>,
    shared: Arc<Shared>,
}

/// What does not change while the engine runs.
#[derive(Debug)]
struct Shared {
    config: EngineConfig,
    vocab_size: usize,
}

/// What the model thread is told.
#[derive(Debug)]
pub(crate) enum Command {
    Submit(Box<Submission>),
    /// The reader has gone.
    Abort {
        key: u64,
    },
    /// A stop string was found.
    AbortSample {
        key: u64,
        sample: u32,
    },
    /// A mask has become ready: whoever was held for it may go on.
    Wake,
    /// Requests that come after may use it.
    AddAdapter {
        id: u32,
        adapter: Arc<Adapter>,
    },
    /// The last request that used it has ended.
    RemoveAdapter {
        id: u32,
    },
    Stop,
}

/// A request, checked and worked up so that the model thread only moves it.
#[derive(Debug)]
pub(crate) struct Submission {
    pub(crate) ticket: Ticket,
    pub(crate) request_id: String,
    pub(crate) adapter: Option<AdapterLease>,
    pub(crate) spec: SequenceSpec,
    pub(crate) sampling: PreparedSampling,
    /// One a sample, or none.
    pub(crate) grammars: Vec<GrammarState>,
    /// The wire field they came in.
    pub(crate) grammar_param: &'static str,
    pub(crate) num_prompt_tokens: usize,
    pub(crate) prompt_scores: Option<PromptScores>,
    pub(crate) deadline: Option<Instant>,
    pub(crate) submitted_at: Instant,
    pub(crate) outbox: Outbox,
}

/// Log-probabilities of the prompt are wanted.
#[derive(Debug)]
pub(crate) struct PromptScores {
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) num_top: u32,
}

impl Engine {
    /// Starts the thread that owns the model.
    pub fn start(model: Box<dyn StepModel>, config: EngineConfig) -> Result<(Self, EngineHandle), EngineError> {
        let vocab_size = model.vocab_size();
        check_limits(&config, vocab_size)?;
        let (commands, inbox) = mpsc::channel();
        let door = Door::new(config.limits.max_queued_requests);
        let (engine_loop, stats) = EngineLoop::new(model, &config, inbox, Arc::clone(&door));
        let thread = thread::Builder::new()
            .name("bindery-engine".to_owned())
            .spawn(move || engine_loop.run())
            .map_err(|error| EngineError::Step { message: format!("the engine's thread did not start: {error}") })?;
        let shared = Arc::new(Shared { config, vocab_size });
        let handle = EngineHandle { commands: commands.clone(), door: Arc::clone(&door), stats, shared };
        Ok((Self { commands, door, thread: Some(thread) }, handle))
    }

    /// Aborts what runs ([`EngineError::ShuttingDown`] to its readers) and joins the thread, which takes as long as the
    /// step it is in.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.door.close();
        let _already_gone = self.commands.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _panic_was_reported = thread.join();
        }
    }
}

fn check_limits(config: &EngineConfig, vocab_size: usize) -> Result<(), EngineError> {
    let limits = &config.limits;
    let values = [
        ("block_size", limits.block_size),
        ("num_blocks", limits.num_blocks),
        ("max_num_seqs", limits.max_num_seqs),
        ("max_num_batched_tokens", limits.max_num_batched_tokens),
        ("max_model_len", limits.max_model_len),
        ("max_queued_requests", limits.max_queued_requests),
        ("max_buffered_tokens", config.max_buffered_tokens),
        ("vocab_size", vocab_size),
    ];
    match values.iter().find(|(_, value)| *value == 0) {
        Some(&(param, _)) => {
            Err(EngineError::Invalid { param, message: format!("{param} is 0, it must be at least 1") })
        }
        None => Ok(()),
    }
}

impl EngineHandle {
    /// Queued at once or refused; the answer never waits for a step.
    ///
    /// Refused are: values out of range and token ids outside the vocabulary ([`EngineError::Invalid`]), a prompt that
    /// with its `max_tokens` exceeds the context ([`EngineError::ContextLengthExceeded`]) or the whole KV cache, a full
    /// queue ([`EngineError::QueueFull`]) and anything after [`EngineHandle::drain`] ([`EngineError::ShuttingDown`]).
    pub async fn submit(&self, request: TokenRequest) -> Result<TokenStream, EngineError> {
        Ok(self.submit_all(vec![request]).await?.pop().expect("each request has its stream"))
    }

    /// [`EngineHandle::submit`] for several at once: all are queued, or none is and no place in the queue was taken.
    #[expect(
        clippy::unused_async,
        reason = "a remote engine will have to wait for its answer; callers need not change"
    )]
    pub async fn submit_all(&self, requests: Vec<TokenRequest>) -> Result<Vec<TokenStream>, EngineError> {
        for request in &requests {
            request.params.validate(self.shared.vocab_size)?;
            self.check_request(request)?;
        }
        let tickets = self.door.enter(requests.len())?;
        requests.into_iter().zip(tickets).map(|(request, ticket)| self.send(request, ticket)).collect()
    }

    fn send(&self, request: TokenRequest, mut ticket: Ticket) -> Result<TokenStream, EngineError> {
        let config = &self.shared.config;
        let TokenRequest { request_id, prompt, mut params, grammar, adapter, num_samples, priority, share, deadline } =
            request;
        params.ignore_eos &= grammar.is_none();
        let max_buffered = config.max_buffered_tokens * num_samples as usize;
        let key = ticket.key();
        ticket.expect(prompt.len());
        let (outbox, stream) = stream::channel(self.commands.clone(), key, num_samples, max_buffered);
        let submission = Submission {
            ticket,
            request_id,
            sampling: PreparedSampling::new(&params, &prompt, &config.eos_token_ids),
            grammar_param: grammar.as_ref().map_or("", |grammar| grammar.param),
            grammars: (0..num_samples).filter_map(|_| grammar.as_ref().map(CompiledGrammar::state)).collect(),
            num_prompt_tokens: prompt.len(),
            prompt_scores: params.prompt_logprobs.map(|num_top| PromptScores { tokens: prompt.clone(), num_top }),
            spec: SequenceSpec {
                samples: (0..num_samples).map(|sample| live::seq_id(key, sample)).collect(),
                prompt,
                max_new_tokens: params.max_tokens,
                priority,
                share,
                adapter: adapter.as_ref().map(|adapter| AdapterId(adapter.id())),
                prompt_logits: params.prompt_logprobs.is_some(),
            },
            adapter,
            deadline,
            submitted_at: Instant::now(),
            outbox,
        };
        self.commands.send(Command::Submit(Box::new(submission))).map_err(|_| EngineError::ShuttingDown)?;
        Ok(stream)
    }

    /// What depends on the limits, and on no other request.
    fn check_request(&self, request: &TokenRequest) -> Result<(), EngineError> {
        let Shared { config, vocab_size } = &*self.shared;
        let limits = &config.limits;
        if request.prompt.is_empty() {
            return Err(EngineError::Invalid {
                param: "prompt",
                message: "the prompt has no tokens, it must have at least one".to_owned(),
            });
        }
        if !(1..=MAX_SAMPLES).contains(&request.num_samples) {
            let n = request.num_samples;
            return Err(EngineError::Invalid {
                param: "n",
                message: format!("n is {n}, it must be between 1 and {MAX_SAMPLES}"),
            });
        }
        let num_prompt_tokens = request.prompt.len();
        let max_tokens = request.params.max_tokens;
        let num_tokens = num_prompt_tokens.saturating_add(max_tokens);
        if num_tokens > limits.max_model_len {
            let max_model_len = limits.max_model_len;
            return Err(refusal_error(&Refusal::TooLong { num_tokens, max_model_len }, limits));
        }
        let num_blocks_needed = num_tokens.div_ceil(limits.block_size);
        if num_blocks_needed > limits.num_blocks {
            return Err(refusal_error(
                &Refusal::NeverFits { num_blocks_needed, num_blocks: limits.num_blocks },
                limits,
            ));
        }
        for &token in &request.prompt {
            token_in_vocabulary("prompt", token, *vocab_size)?;
        }
        Ok(())
    }

    /// A pool of adapters for the model of this engine.
    pub(crate) fn adapter_pool(&self, config: AdapterPoolConfig, reader: Box<dyn ReadAdapter>) -> AdapterPool {
        AdapterPool::new(config, reader, self.commands.clone(), self.max_queued_requests())
    }

    /// Wakes the loop where it sleeps because all that it has is held for masks.
    pub(crate) fn waker(&self) -> Wake {
        let commands = self.commands.clone();
        Arc::new(move || {
            let _engine_gone = commands.send(Command::Wake);
        })
    }

    /// Most requests that wait at one time.
    pub fn max_queued_requests(&self) -> usize {
        self.door.max_queued_requests()
    }

    /// Tokens of prompts that are neither computed nor given up: what a new request's prompt stands behind. Of this
    /// moment, not of the newest step's end as [`EngineHandle::stats`].
    pub fn num_pending_prompt_tokens(&self) -> usize {
        self.door.num_pending_tokens()
    }

    /// When a request of now with so long a prompt would have its first token. None: nothing was computed yet, so nothing is
    /// predicted.
    ///
    /// First the prompts before it, each step shared with the sequences that decode as of the newest one; or, where all seats
    /// are taken, until the queue has come so far at its recent pace; whichever is later. Then its own prompt. Where long prompts are paced,
    /// at the pace of one, or of two where such wait or are computed already.
    /// Blind to what a preempted sequence computes again, and to decoding that begins meanwhile.
    pub fn predicted_ttft(&self, num_prompt_tokens: usize) -> Option<Duration> {
        const MAX_SECONDS: f64 = 86_400.0;
        let Limits { max_num_batched_tokens, max_num_seqs, .. } = self.shared.config.limits;
        let stats = self.stats.borrow();
        let cost = stats.step_cost?;
        let num_queued = self.door.num_queued();
        // The statistics are those of the newest step: nothing may have followed it.
        let num_decoding = if self.door.num_unfinished() == 0 { 0 } else { stats.num_decoding };
        let num_pending = self.num_pending_prompt_tokens();
        let num_before = usize::from(num_pending > pacing::short_tokens(cost));
        let load = StepLoad { num_decoding, num_long_prompts: num_before + 1 };
        let is_paced = self.shared.config.paces_prompts && load.num_decoding > 0;
        let computed = |num_tokens| {
            let is_long = is_paced && num_tokens > pacing::short_tokens(cost);
            let limit = if is_long { pacing::long_tokens(cost, load).max(1) } else { usize::MAX };
            let step_len = max_num_batched_tokens.min(limit.saturating_add(load.num_decoding));
            cost.prompt_seconds(num_tokens, load.num_decoding, step_len)
        };
        let seat = if self.door.num_unfinished() >= max_num_seqs {
            self.door.time_for(num_queued.saturating_add(1))
        } else {
            Duration::ZERO
        };
        let seconds = computed(num_pending).max(seat.as_secs_f64()) + computed(num_prompt_tokens);
        Some(Duration::from_secs_f64(seconds.clamp(0.0, MAX_SECONDS)))
    }

    /// The state after the newest step.
    pub fn stats(&self) -> EngineStats {
        *self.stats.borrow()
    }

    /// Waits for a snapshot of which `wanted` is true, and returns it; the newest one if the engine ends before.
    pub async fn stats_when(&self, mut wanted: impl FnMut(&EngineStats) -> bool) -> EngineStats {
        let mut stats = self.stats.clone();
        let found = stats.wait_for(|stats| wanted(stats)).await.map(|found| *found);
        found.unwrap_or_else(|_| self.stats())
    }

    /// Waits until no request is queued or running, and the statistics show it. After [`EngineHandle::drain`] it stays so.
    pub async fn idle(&self) {
        // The count alone runs ahead of the statistics: a request gives its place back before the snapshot that shows
        // its blocks free is published.
        self.stats_when(|stats| {
            let is_empty = (stats.num_requests_running, stats.num_requests_waiting, stats.num_used_blocks) == (0, 0, 0);
            is_empty && self.num_unfinished() == 0
        })
        .await;
    }

    /// No new requests; running and queued ones go on.
    pub fn drain(&self) {
        self.door.close();
    }

    /// Whether [`EngineHandle::drain`] was called, or the engine was stopped.
    pub fn is_draining(&self) -> bool {
        self.door.is_closed()
    }

    /// Requests that are queued or running.
    pub fn num_unfinished(&self) -> usize {
        self.door.num_unfinished()
    }
}
