//! Text in, text out: tokenizer, template and engine, joined for a server.
//!
//! What costs time in proportion to a text happens here, off the model thread: tokenising on blocking threads (as many
//! at once as there are cores), detokenising and looking for stop strings where the answer is read. It must not know
//! HTTP. Its invariant: every [`TextRequest`] is checked whole before it reaches the engine; a bad one is an error that
//! names the wire field, never a panic and never work in proportion to its size.

mod answer;
mod stream;

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bindery_model::{ModelInfo, StepModel};
use bindery_scheduler::{Limits, Share, TokenId};
use tokio::sync::Semaphore;

use crate::{
    AdapterLease, AdapterPool, AdapterPoolConfig, ChatTemplate, Engine, EngineConfig, EngineError, EngineHandle,
    FinishReason, Grammar, ReadAdapter, RenderRequest, SamplingParams, TokenRequest, Tokenizer,
    grammar::{CompiledGrammar, GrammarCompiler},
    request::{MAX_SAMPLES, token_in_vocabulary},
};

pub use stream::TextStream;

/// Stop strings of one request.
pub const MAX_STOP_STRINGS: usize = 64;
/// Bytes of one stop string.
pub const MAX_STOP_BYTES: usize = 1024;
/// Bytes of all stop strings of a request together: each sample keeps a matcher of a few times this size.
pub const MAX_TOTAL_STOP_BYTES: usize = 8192;

/// A longer prompt is not tokenised only to be truncated (unless the context might hold it whole): at worst, a megabyte
/// of digits or spaces takes a core ten seconds.
pub const MAX_TRUNCATED_BYTES: usize = 1 << 20;

/// A model being served, whole.
#[derive(Debug)]
pub struct LocalModel {
    /// The way to the model thread, and its statistics.
    pub engine: EngineHandle,
    /// The model's own.
    pub tokenizer: Arc<Tokenizer>,
    /// The model's own; base models have none.
    pub template: Option<ChatTemplate>,
    /// Those that requests may name.
    pub adapters: AdapterPool,
    /// What is known about the model.
    pub info: ModelInfo,
    /// Prompt and generated tokens of one sequence (`--max-model-len`).
    pub max_model_len: usize,
    /// Tokens the whole KV cache holds.
    max_cached_tokens: usize,
    pub(crate) grammars: Arc<GrammarCompiler>,
    /// One permit a core.
    tokenizing: Arc<Semaphore>,
    /// One permit: a grammar that takes long to compile holds up other grammars, and nothing else.
    compiling: Arc<Semaphore>,
    thread: Mutex<Option<Engine>>,
}

/// `serve`'s flags as far as they concern the model and the engine.
#[derive(Clone, Debug)]
pub struct LocalModelConfig {
    /// How the weights are read and computed with.
    pub load: bindery_model::LoadOptions,
    /// `--max-model-len`; `None`: the model's, or what fits.
    pub max_model_len: Option<usize>,
    /// `--max-num-seqs`
    pub max_num_seqs: usize,
    /// `--max-num-batched-tokens`
    pub max_num_batched_tokens: usize,
    /// `--prefill-pacing`
    pub paces_prompts: bool,
    /// `--kv-cache-memory` in bytes; `None`: what is free, with a margin.
    pub kv_cache_memory: Option<u64>,
    /// `--max-queued-requests`
    pub max_queued_requests: usize,
    /// Tokens of one sample that may wait for their reader before its request is cancelled.
    pub max_buffered_tokens: usize,
    /// `--max-loras`, `--max-cpu-loras`, `--max-lora-rank`
    pub adapters: AdapterPoolConfig,
}

/// For the start-up report.
#[derive(Clone, Debug)]
pub struct LoadReport {
    /// From the call to a model that answers.
    pub load_time: Duration,
    /// Of the KV cache.
    pub num_blocks: usize,
    /// Tokens they hold.
    pub kv_tokens: usize,
    /// Sequences of full length they hold at a time.
    pub full_length_requests: f64,
    /// What a person should know: a context that had to shrink, a model without an end token.
    pub notes: Vec<String>,
}

/// What [`LocalModel::check`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckReport {
    /// As the file names it.
    pub architecture: String,
    /// Tokens that a sequence will have at most. Where no memory is given for the cache, what is free at the start decides.
    pub max_model_len: usize,
}

/// What [`LocalModel::from_parts`] puts together.
pub struct LocalModelParts {
    /// Of this model.
    pub tokenizer: Tokenizer,
    /// Of this model.
    pub template: Option<ChatTemplate>,
    /// Of this model.
    pub info: ModelInfo,
    /// Its blocks are those the model has allocated.
    pub limits: Limits,
    /// See [`LocalModelConfig::max_buffered_tokens`].
    pub max_buffered_tokens: usize,
    /// See [`LocalModelConfig::paces_prompts`].
    pub paces_prompts: bool,
    /// How adapters for this model are read, and how many.
    pub adapters: (AdapterPoolConfig, Box<dyn ReadAdapter>),
}

/// What is to be continued.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// To be tokenised.
    Text {
        /// The prompt.
        text: String,
        /// With the model's own beginning (and end) tokens; false after a chat template, which brings its own.
        add_special_tokens: bool,
    },
    /// Used as given.
    Tokens(Vec<TokenId>),
}

/// A request in text.
#[derive(Clone, Debug)]
pub struct TextRequest {
    /// For logs.
    pub request_id: String,
    /// What is to be continued.
    pub prompt: Prompt,
    /// Wire field the prompt came in, for errors: "prompt" or "messages".
    pub prompt_param: &'static str,
    /// How to sample. Its `max_tokens` is set from [`TextRequest::max_tokens`].
    pub params: SamplingParams,
    /// `None`: what fits the context. 0 generates nothing (echo of the prompt, with or without its log-probabilities).
    pub max_tokens: Option<usize>,
    /// Where `max_tokens` says nothing: what fits, and no more than this.
    pub longest_default: usize,
    /// Answers wanted.
    pub num_samples: u32,
    /// At least `num_samples`: generates this many and returns the best by mean log-probability, when all have ended.
    pub best_of: Option<u32>,
    /// Stop strings; bounded by [`MAX_STOP_STRINGS`], [`MAX_STOP_BYTES`] and [`MAX_TOTAL_STOP_BYTES`].
    pub stop: Vec<String>,
    /// The text ends with what stopped it instead of before.
    pub include_stop_str_in_output: bool,
    /// Special tokens are not part of the text.
    pub skip_special_tokens: bool,
    /// The form every answer must have, with the wire field it came in, for errors.
    pub grammar: Option<(Arc<Grammar>, &'static str)>,
    /// Keep only the last so many tokens of the prompt.
    pub truncate_prompt_tokens: Option<usize>,
    /// Lower runs first.
    pub priority: i32,
    /// Whose it is, and what it may claim of a busy machine beside others'.
    pub share: Share,
    /// Cancelled when this has passed since [`LocalModel::generate`] was called.
    pub timeout: Option<Duration>,
}

impl TextRequest {
    /// One answer to `prompt`, as long as the context allows, with the defaults of [`SamplingParams`]: fill in the rest by
    /// struct update.
    pub fn new(prompt: Prompt) -> Self {
        Self {
            request_id: String::new(),
            prompt,
            prompt_param: "prompt",
            params: SamplingParams::default(),
            max_tokens: None,
            longest_default: usize::MAX,
            num_samples: 1,
            best_of: None,
            stop: Vec::new(),
            include_stop_str_in_output: false,
            grammar: None,
            skip_special_tokens: true,
            truncate_prompt_tokens: None,
            priority: 0,
            share: Share::default(),
            timeout: None,
        }
    }
}

/// A request that was checked and tokenised and is not queued yet. See [`LocalModel::prepare`].
#[derive(Debug)]
pub struct PreparedRequest {
    answers: stream::Answers,
    /// `None` where there is nothing to compute.
    tokens: Option<TokenRequest>,
}

impl PreparedRequest {
    /// All its rows will go through this version of an adapter; without, through the plain base. See
    /// [`AdapterPool::acquire`].
    pub fn set_adapter(&mut self, adapter: AdapterLease) {
        if let Some(tokens) = &mut self.tokens {
            tokens.adapter = Some(adapter);
        }
    }

    /// Tokens of the prompt as it will be computed (after truncation).
    pub fn num_prompt_tokens(&self) -> usize {
        self.answers.prompt.len()
    }
}

/// Text of one token, with what OpenAI's logprobs need.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenText {
    /// The token.
    pub id: TokenId,
    /// The token's own text, lossily decoded.
    pub text: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Where asked for.
    pub logprob: Option<f32>,
    /// Where asked for: 1 is the most likely token.
    pub rank: Option<u32>,
    /// Where asked for: the most likely tokens, best first.
    pub top: Vec<TopToken>,
}

/// One of the most likely tokens at a position.
#[derive(Clone, Debug, PartialEq)]
pub struct TopToken {
    /// The token.
    pub id: TokenId,
    /// Its own text, lossily decoded.
    pub text: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Of the model's own distribution.
    pub logprob: f32,
}

/// What stopped an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum StopReason {
    /// A stop string.
    Text(String),
    /// One of `stop_token_ids`.
    Token(TokenId),
}

/// What comes back. The order: [`TextEvent::Prompt`] once; then, samples in any order, for each sample one
/// [`TextEvent::Delta`] a token and at last its [`TextEvent::Finished`].
#[derive(Clone, Debug, PartialEq)]
pub enum TextEvent {
    /// First event always.
    Prompt {
        /// With log-probabilities (the first token has none), where `prompt_logprobs` was asked for (the event then
        /// comes after the prompt is computed); else empty. See [`TextStream::prompt_text`] for an echo without.
        tokens: Vec<TokenText>,
        /// Tokens of the prompt as it was computed.
        num_tokens: usize,
    },
    /// Text that is final: no half characters, nothing that may yet become a stop string.
    Delta {
        /// 0..n.
        sample: u32,
        /// Empty while tokens are held back.
        text: String,
        /// The tokens this event accounts for, whose text may be held back. Not among them is the end or stop token
        /// that ended the sample, unless it was to be included in the output.
        tokens: Vec<TokenText>,
        /// How many tokens were generated, an end token among them.
        num_tokens: usize,
    },
    /// The sample's last event.
    Finished {
        /// 0..n.
        sample: u32,
        /// Why.
        reason: FinishReason,
        /// What, where it was a stop string or a token of `stop_token_ids`.
        stop_reason: Option<StopReason>,
        /// Generated tokens of this sample, all of them.
        num_tokens: usize,
    },
}

/// Times of one request, for metrics and server-timing. Measured on the model thread, so a slow reader does not show.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RequestTimings {
    /// From submission until first scheduled.
    pub queue: Option<Duration>,
    /// From there to the first token.
    pub prefill: Option<Duration>,
    /// From there to the last token.
    pub decode: Option<Duration>,
}

impl LocalModel {
    /// Loads weights, tokenizer and template from a `.gguf` file or a directory and starts the engine. Blocking.
    pub fn load(
        path: &Path,
        config: &LocalModelConfig,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(Self, LoadReport), EngineError> {
        crate::load::load(path, config, progress)
    }

    /// Refuses what [`LocalModel::load`] would refuse, by the same checks, as far as that can be seen without reading
    /// weights: options, formats, tokenizer and template, the length of a context, memory that was given for the cache.
    /// Blocking, but short.
    pub fn check(path: &Path, config: &LocalModelConfig) -> Result<CheckReport, EngineError> {
        crate::load::check(path, config)
    }

    /// Puts a loaded model (or a test's double) together with its text side and starts the engine.
    pub fn from_parts(model: Box<dyn StepModel>, parts: LocalModelParts) -> Result<Self, EngineError> {
        let LocalModelParts { tokenizer, template, info, limits, max_buffered_tokens, paces_prompts, adapters } = parts;
        let max_model_len = limits.max_model_len;
        let max_cached_tokens = limits.num_blocks.saturating_mul(limits.block_size);
        let eos_token_ids = tokenizer.eos_token_ids().to_vec();
        let (thread, engine) =
            Engine::start(model, EngineConfig { limits, eos_token_ids, max_buffered_tokens, paces_prompts })?;
        let num_cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let tokenizer = Arc::new(tokenizer);
        Ok(Self {
            adapters: engine.adapter_pool(adapters.0, adapters.1),
            grammars: Arc::new(GrammarCompiler::new(Arc::clone(&tokenizer), engine.waker())),
            engine,
            tokenizer,
            template,
            info,
            max_model_len,
            max_cached_tokens,
            tokenizing: Arc::new(Semaphore::new(num_cores)),
            compiling: Arc::new(Semaphore::new(1)),
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Checks, tokenises (off the async threads), queues; then a stream of text.
    pub async fn generate(&self, request: TextRequest) -> Result<TextStream, EngineError> {
        let prepared = self.prepare(request).await?;
        Ok(self.submit_all(vec![prepared]).await?.pop().expect("each request has its stream"))
    }

    /// Checks and tokenises (off the async threads). What comes back holds no place in the queue: a caller may look at
    /// what it would cost, and drop it.
    pub async fn prepare(&self, request: TextRequest) -> Result<PreparedRequest, EngineError> {
        let deadline = Deadline::new(request.timeout);
        check_samples(&request)?;
        check_stop(&request.stop)?;
        let param = request.prompt_param;
        let tokens = self.prompt_tokens(request.prompt, request.truncate_prompt_tokens, param);
        let (tokens, text) = deadline.within(tokens).await?;
        let mut params = request.params;
        params.max_tokens = self.max_tokens((request.max_tokens, request.longest_default), tokens.len(), param)?;
        deadline.check()?;

        let num_generated = request.best_of.unwrap_or(request.num_samples);
        let shows_logprobs = params.logprobs.is_some();
        if num_generated > request.num_samples {
            params.logprobs.get_or_insert(0);
        }
        let answers = stream::Answers {
            tokenizer: Arc::clone(&self.tokenizer),
            num_wanted: request.num_samples,
            num_generated,
            shows_logprobs,
            rules: answer::EndRules { min_tokens: params.min_tokens, include_stop: request.include_stop_str_in_output },
            skip_special_tokens: request.skip_special_tokens,
            stop: request.stop,
            prompt: tokens,
            prompt_text: text,
            scores_prompt: params.prompt_logprobs.is_some(),
            timeout_ms: deadline.timeout_ms,
        };
        if params.max_tokens == 0 && !answers.scores_prompt {
            // Nothing to compute; the parameters are checked all the same.
            params.max_tokens = 1;
            params.min_tokens = 0;
            params.validate(self.info.vocab_size)?;
            return Ok(PreparedRequest { answers, tokens: None });
        }
        let grammar = match request.grammar {
            None => None,
            Some((grammar, param)) => Some(deadline.within(self.compile(grammar, param)).await?),
        };
        let tokens = TokenRequest {
            request_id: request.request_id,
            prompt: answers.prompt.clone(),
            params,
            grammar,
            adapter: None,
            num_samples: num_generated,
            priority: request.priority,
            share: request.share,
            deadline: deadline.at,
        };
        Ok(PreparedRequest { answers, tokens: Some(tokens) })
    }

    /// Queues all of them or none; then a stream of text each, in the same order.
    pub async fn submit_all(&self, prepared: Vec<PreparedRequest>) -> Result<Vec<TextStream>, EngineError> {
        let submitted_at = Instant::now();
        let mut work = Vec::with_capacity(prepared.len());
        let mut answers = Vec::with_capacity(prepared.len());
        for PreparedRequest { answers: wanted, tokens } in prepared {
            answers.push((wanted, tokens.is_some()));
            work.extend(tokens);
        }
        let mut streams = self.engine.submit_all(work).await?.into_iter();
        let with_stream = |(answers, has_work): (stream::Answers, bool)| {
            if !has_work {
                return TextStream::without_engine(answers);
            }
            TextStream::new(answers, streams.next().expect("each request has its stream"), submitted_at)
        };
        Ok(answers.into_iter().map(with_stream).collect())
    }

    /// Renders the chat template.
    pub fn render_chat(&self, request: &RenderRequest) -> Result<String, EngineError> {
        match &self.template {
            Some(template) => template.render(request),
            None => Err(EngineError::Invalid {
                param: "messages",
                message: "this model has no chat template: use /v1/completions".to_owned(),
            }),
        }
    }

    /// Aborts what runs ([`EngineError::ShuttingDown`] to its readers) and joins the engine's thread, which takes as
    /// long as the step it is in. Blocking; later calls do nothing.
    pub fn stop(&self) {
        let engine = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(engine);
    }

    /// The prompt in tokens, at least one and all of them in the vocabulary; its text, where it came as text.
    async fn prompt_tokens(
        &self,
        prompt: Prompt,
        num_kept: Option<usize>,
        param: &'static str,
    ) -> Result<(Vec<TokenId>, Option<String>), EngineError> {
        let (mut tokens, mut text) = match prompt {
            Prompt::Tokens(tokens) => (tokens, None),
            Prompt::Text { text, add_special_tokens } => {
                let num_tokens_min = self.tokenizer.min_tokens_for(&text);
                if num_tokens_min > self.max_model_len {
                    match num_kept {
                        None => return Err(self.too_long(param, &format!("at least {num_tokens_min}"))),
                        Some(_) if text.len() > MAX_TRUNCATED_BYTES => {
                            return Err(invalid(
                                param,
                                format!(
                                    "{param} has {} bytes, which are tokenised whole before truncate_prompt_tokens takes the \
                                     end: the limit is {MAX_TRUNCATED_BYTES}, send the end alone",
                                    text.len()
                                ),
                            ));
                        }
                        Some(_) => {}
                    }
                }
                let (tokens, text) = self.tokenize(text, add_special_tokens, param).await?;
                (tokens, Some(text))
            }
        };
        if let Some(num_kept) = num_kept {
            if num_kept == 0 {
                return Err(invalid(
                    "truncate_prompt_tokens",
                    "truncate_prompt_tokens is 0, it must be at least 1".to_owned(),
                ));
            }
            if tokens.len() > num_kept {
                tokens.drain(..tokens.len() - num_kept);
                text = None;
            }
        }
        if tokens.is_empty() {
            return Err(invalid(param, format!("{param} is empty, it must have at least one token")));
        }
        if tokens.len() > self.max_model_len {
            return Err(self.too_long(param, &tokens.len().to_string()));
        }
        for &token in &tokens {
            token_in_vocabulary(param, token, self.info.vocab_size)?;
        }
        Ok((tokens, text))
    }

    /// On a blocking thread, at most one a core; the text comes back with its tokens, so that a long one is in memory once.
    /// The permit stays with the work, also when nobody waits for it any more.
    async fn tokenize(
        &self,
        text: String,
        add_special_tokens: bool,
        param: &'static str,
    ) -> Result<(Vec<TokenId>, String), EngineError> {
        let permit = Arc::clone(&self.tokenizing).acquire_owned().await.map_err(|_| EngineError::ShuttingDown)?;
        let tokenizer = Arc::clone(&self.tokenizer);
        let work = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            tokenizer.encode(&text, add_special_tokens).map(|tokens| (tokens, text))
        });
        match work.await {
            Ok(Err(EngineError::Invalid { message, .. })) => Err(EngineError::Invalid { param, message }),
            Ok(result) => result,
            Err(_) => Err(EngineError::Text("the tokenizer failed on this text".to_owned())),
        }
    }

    /// Like [`LocalModel::tokenize`].
    async fn compile(&self, grammar: Arc<Grammar>, param: &'static str) -> Result<CompiledGrammar, EngineError> {
        let permit = Arc::clone(&self.compiling).acquire_owned().await.map_err(|_| EngineError::ShuttingDown)?;
        let grammars = Arc::clone(&self.grammars);
        let work = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            grammars.compile(&grammar, param)
        });
        match work.await {
            Ok(result) => result,
            Err(_) => Err(invalid(param, format!("{param} makes the grammar compiler fail: simplify it"))),
        }
    }

    /// What was asked for if the context holds it, or what fits.
    fn max_tokens(
        &self,
        (wanted, longest_default): (Option<usize>, usize),
        num_prompt_tokens: usize,
        param: &'static str,
    ) -> Result<usize, EngineError> {
        let max_model_len = self.max_model_len;
        match wanted {
            Some(max_tokens) => {
                let num_tokens = num_prompt_tokens.saturating_add(max_tokens);
                if num_tokens <= max_model_len {
                    return Ok(max_tokens);
                }
                let place = if param == "messages" { "messages" } else { "prompt" };
                Err(EngineError::ContextLengthExceeded {
                    param,
                    message: format!(
                        "This model's maximum context length is {max_model_len} tokens. However, you requested \
                         {num_tokens} tokens ({num_prompt_tokens} in the {place}, {max_tokens} in the completion). \
                         Please reduce the length of the {place} or completion."
                    ),
                })
            }
            None => match max_model_len.min(self.max_cached_tokens).saturating_sub(num_prompt_tokens) {
                0 => Err(self.too_long(param, &num_prompt_tokens.to_string())),
                max_tokens => Ok(max_tokens.min(longest_default)),
            },
        }
    }

    fn too_long(&self, param: &'static str, num_tokens: &str) -> EngineError {
        let max_model_len = self.max_model_len;
        let (place, resulted) = if param == "messages" {
            ("messages", "your messages resulted in")
        } else {
            ("prompt", "your prompt resulted in")
        };
        EngineError::ContextLengthExceeded {
            param,
            message: format!(
                "This model's maximum context length is {max_model_len} tokens. However, {resulted} {num_tokens} tokens. \
                 Please reduce the length of the {place}."
            ),
        }
    }
}

/// When a request must have ended, and the words for it.
#[derive(Clone, Copy, Debug)]
struct Deadline {
    at: Option<Instant>,
    timeout_ms: Option<u64>,
}

impl Deadline {
    fn new(timeout: Option<Duration>) -> Self {
        // A deadline beyond the clock's range is none.
        let at = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        Self { at, timeout_ms: timeout.map(|timeout| timeout.as_millis() as u64) }
    }

    /// Waits no longer than until the deadline. Work on another thread goes on to its end, for nobody.
    async fn within<T>(self, work: impl Future<Output = Result<T, EngineError>>) -> Result<T, EngineError> {
        let Some(at) = self.at else { return work.await };
        let passed = EngineError::DeadlineExceeded { timeout_ms: self.timeout_ms.unwrap_or(0) };
        tokio::time::timeout_at(at.into(), work).await.unwrap_or(Err(passed))
    }

    fn check(self) -> Result<(), EngineError> {
        match self.at {
            Some(at) if at <= Instant::now() => {
                Err(EngineError::DeadlineExceeded { timeout_ms: self.timeout_ms.unwrap_or(0) })
            }
            _ => Ok(()),
        }
    }
}

fn invalid(param: &'static str, message: String) -> EngineError {
    EngineError::Invalid { param, message }
}

fn check_samples(request: &TextRequest) -> Result<(), EngineError> {
    let n = request.num_samples;
    if !(1..=MAX_SAMPLES).contains(&n) {
        return Err(invalid("n", format!("n is {n}, it must be between 1 and {MAX_SAMPLES}")));
    }
    match request.best_of {
        Some(best_of) if !(n..=MAX_SAMPLES).contains(&best_of) => {
            Err(invalid("best_of", format!("best_of is {best_of}, it must be between n, {n}, and {MAX_SAMPLES}")))
        }
        _ => Ok(()),
    }
}

/// Whether stop strings can be searched for: as many, and as long, as the limits above allow. [`LocalModel::prepare`]
/// checks them; it is public for a caller that is about to copy them for many prompts.
pub fn check_stop(stop: &[String]) -> Result<(), EngineError> {
    if stop.len() > MAX_STOP_STRINGS {
        let num_strings = stop.len();
        return Err(invalid("stop", format!("stop has {num_strings} strings, the limit is {MAX_STOP_STRINGS}")));
    }
    if stop.iter().any(String::is_empty) {
        return Err(invalid(
            "stop",
            "stop has an empty string, which would end every answer at once: leave it out".to_owned(),
        ));
    }
    if let Some(long) = stop.iter().find(|text| text.len() > MAX_STOP_BYTES) {
        let num_bytes = long.len();
        return Err(invalid("stop", format!("stop has a string of {num_bytes} bytes, the limit is {MAX_STOP_BYTES}")));
    }
    let num_bytes: usize = stop.iter().map(String::len).sum();
    if num_bytes > MAX_TOTAL_STOP_BYTES {
        return Err(invalid(
            "stop",
            format!("the stop strings have {num_bytes} bytes together, the limit is {MAX_TOTAL_STOP_BYTES}"),
        ));
    }
    Ok(())
}
