//! The engine's events for one HTTP request: one text stream a prompt, merged, counted and timed.
//!
//! Both routes and both deliveries read the same events, so streaming and not streaming cannot differ. Invariant: a
//! [`Generation`] owns its text streams; dropping it aborts whatever has not ended, and every choice is counted once,
//! as stopped, full or aborted.

use std::{
    pin::Pin,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use bindery_engine::{
    EngineError, FinishReason, PreparedRequest, RequestTimings, Share, StopReason as EngineStopReason, TenantId,
    TextEvent, TextRequest, TextStream, TokenText,
};
use bindery_gateway::gateway::LocalShare;
use bindery_protocol::openai::{PromptTokensDetails, StopReason, Usage};
use futures::{
    StreamExt,
    future::try_join_all,
    stream::{self, BoxStream, SelectAll},
};
use tokio::time::{Sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::{
    adapters::Named, context::RequestContext, error::ApiError, metrics::Outcome, router::Serving, state::SharedState,
};

const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// One event, with the choice it belongs to.
pub(crate) enum Event {
    /// A prompt was taken: its text where it was wanted, its tokens where their log-probabilities were asked for.
    Prompt { prompt: usize, text: String, tokens: Vec<TokenText> },
    /// Final text of a choice, possibly empty, and the tokens behind it.
    Delta { choice: usize, text: String, tokens: Vec<TokenText> },
    /// A choice ended.
    Finished { choice: usize, finish_reason: &'static str, stop_reason: Option<StopReason> },
}

/// What one prompt's stream yields.
enum StreamItem {
    Event(TextEvent),
    Failed(EngineError),
    Ended { timings: RequestTimings, num_generated_tokens: usize },
}

/// Whether prompts come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PromptText {
    NotWanted,
    Wanted,
}

impl PromptText {
    pub(crate) fn wanted(echo: bool) -> Self {
        if echo { Self::Wanted } else { Self::NotWanted }
    }
}

/// Progress of one prompt, for the metrics.
#[derive(Default)]
struct PromptProgress {
    /// Empty where it is not wanted.
    text: String,
    num_prompt_tokens: usize,
    has_first_token: bool,
    /// Set at the end: tokens of all samples, those that `best_of` threw away among them.
    num_generated_tokens: Option<usize>,
}

/// Progress of one choice.
#[derive(Default)]
struct ChoiceProgress {
    last_piece: Option<Instant>,
    num_tokens: usize,
    finished: bool,
}

/// All that runs for one HTTP request.
pub(crate) struct Generation {
    streams: SelectAll<BoxStream<'static, (usize, StreamItem)>>,
    prompts: Vec<PromptProgress>,
    choices: Vec<ChoiceProgress>,
    num_samples: usize,
    timings: RequestTimings,
    context: RequestContext,
    state: SharedState,
    cut: CancellationToken,
    deadline: Option<Deadline>,
}

/// When the client no longer wants an answer. The engine keeps it, too, but looks between two steps only.
pub(crate) struct Deadline {
    passes: Pin<Box<Sleep>>,
    timeout: Duration,
}

impl Deadline {
    /// Counted from the request's arrival.
    pub(crate) fn new(context: &RequestContext, timeout: Duration) -> Self {
        Self { passes: Box::pin(sleep_until((context.started + timeout).into())), timeout }
    }

    /// Pending for ever without a deadline.
    pub(crate) async fn passed(deadline: &mut Option<Self>) -> ApiError {
        let Some(deadline) = deadline else { return std::future::pending().await };
        deadline.passes.as_mut().await;
        Self::error(deadline.timeout)
    }

    /// What is told where it has passed.
    pub(crate) fn error(timeout: Duration) -> ApiError {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        ApiError::DeadlineExceeded { message: EngineError::DeadlineExceeded { timeout_ms }.to_string() }
    }
}

/// Log-probabilities that the answer repeats for each token of the prompt: every choice carries them all.
fn scores_per_prompt_token(request: &TextRequest) -> usize {
    request.params.prompt_logprobs.map_or(0, |num_top| (num_top as usize + 1) * request.num_samples as usize)
}

/// What the caller's requests may claim of the machine beside others'.
///
/// # Errors
/// Where a tenant would go ahead of others by its own word.
fn claim_share(state: &SharedState, serving: &Serving, requests: &mut [TextRequest]) -> Result<(), ApiError> {
    let Some(gateway) = &state.config.gateway else { return Ok(()) };
    let LocalShare { tenant, weight } = gateway.local_share(serving.caller.tenant.as_deref());
    for request in requests {
        if serving.caller.tenant.is_some() && request.priority < 0 {
            let message = format!(
                "priority is {}: a tenant's requests take 0 or more (later), since a better one would go ahead of other tenants'",
                request.priority
            );
            return Err(ApiError::invalid("priority", message));
        }
        request.share = Share { tenant: TenantId(tenant), weight };
    }
    Ok(())
}

impl Generation {
    /// Queues every prompt, or none: all are tokenised and what they cost together is checked before the first is queued.
    pub(crate) async fn start(
        state: &SharedState,
        serving: &Serving,
        named: &Named,
        context: &RequestContext,
        mut requests: Vec<TextRequest>,
        prompt_text: PromptText,
    ) -> Result<Self, ApiError> {
        claim_share(state, serving, &mut requests)?;
        let max_queued = serving.model.engine.max_queued_requests();
        if requests.len() > max_queued {
            let message = format!(
                "{} prompts in one request, and the queue holds {max_queued} (--max-queued-requests): send them in smaller requests",
                requests.len()
            );
            return Err(ApiError::invalid("prompt", message));
        }
        let scores_per_token: Vec<usize> = requests.iter().map(scores_per_prompt_token).collect();
        let num_samples = requests.first().map_or(1, |request| request.num_samples as usize);
        let timeout = requests.first().and_then(|request| request.timeout);
        let failed = |error| ApiError::from_engine(error, &context.id);
        let prepared = try_join_all(requests.into_iter().map(|request| serving.model.prepare(request)));
        let mut prepared = prepared.await.map_err(failed)?;
        let scores = |(request, per_token): (&PreparedRequest, &usize)| request.num_prompt_tokens() * per_token;
        let num_scores: usize = prepared.iter().zip(&scores_per_token).map(scores).sum();
        let limit = state.limits.max_prompt_scores;
        if num_scores > limit {
            let message = format!(
                "the answer would hold {num_scores} log-probabilities of prompt tokens, the limit is {limit}: ask for fewer \
                 choices, fewer logprobs or a shorter prompt"
            );
            return Err(ApiError::invalid("prompt_logprobs", message));
        }
        // Only now: what is refused anyway makes nobody read an adapter, or push another out.
        let remaining = timeout.map(|timeout| timeout.saturating_sub(context.started.elapsed()));
        if let Some(adapter) = serving.lease(state, named, remaining).await? {
            *context.counts.adapter.lock().unwrap_or_else(PoisonError::into_inner) = adapter.identity();
            for prepared in &mut prepared {
                prepared.set_adapter(adapter.clone());
            }
        }
        let streams = serving.model.submit_all(prepared).await.map_err(failed)?;
        let progress = |stream: &TextStream| {
            let text = match prompt_text {
                PromptText::NotWanted => String::new(),
                PromptText::Wanted => stream.prompt_text()?,
            };
            Ok(PromptProgress { text, ..PromptProgress::default() })
        };
        let prompts: Result<Vec<_>, _> = streams.iter().map(progress).collect();
        let prompts = prompts.map_err(failed)?;
        let num_choices = streams.len() * num_samples;
        let merged = streams.into_iter().enumerate().map(|(prompt, stream)| items(prompt, stream)).collect();
        Ok(Self {
            streams: merged,
            prompts,
            choices: std::iter::repeat_with(ChoiceProgress::default).take(num_choices).collect(),
            num_samples,
            timings: RequestTimings::default(),
            context: context.clone(),
            cut: state.lifecycle.cut_token().clone(),
            state: Arc::clone(state),
            deadline: timeout.map(|timeout| Deadline::new(context, timeout)),
        })
    }

    pub(crate) fn num_choices(&self) -> usize {
        self.choices.len()
    }

    /// The next event; `None` when every choice has ended. After an error there is nothing more to read.
    pub(crate) async fn next(&mut self) -> Option<Result<Event, ApiError>> {
        loop {
            let next = tokio::select! {
                biased;
                next = self.streams.next() => next,
                () = self.cut.cancelled() => return Some(Err(ApiError::CutByShutdown)),
                error = Deadline::passed(&mut self.deadline) => return Some(Err(error)),
            };
            match next? {
                (prompt, StreamItem::Event(event)) => return Some(Ok(self.on_event(prompt, event))),
                (_, StreamItem::Failed(error)) => {
                    return Some(Err(ApiError::from_engine(error, &self.context.id)));
                }
                (prompt, StreamItem::Ended { timings, num_generated_tokens }) => {
                    self.prompts[prompt].num_generated_tokens = Some(num_generated_tokens);
                    if let Err(error) = self.on_end(prompt, timings) {
                        return Some(Err(error));
                    }
                }
            }
        }
    }

    fn on_event(&mut self, prompt: usize, event: TextEvent) -> Event {
        let counts = &self.context.counts;
        match event {
            TextEvent::Prompt { tokens, num_tokens } => {
                self.prompts[prompt].num_prompt_tokens = num_tokens;
                counts.num_prompt_tokens.fetch_add(num_tokens, Ordering::Relaxed);
                Event::Prompt { prompt, text: std::mem::take(&mut self.prompts[prompt].text), tokens }
            }
            TextEvent::Delta { sample, text, tokens, num_tokens } => {
                let choice = prompt * self.num_samples + sample as usize;
                let now = Instant::now();
                let metrics = &self.state.metrics;
                if !self.prompts[prompt].has_first_token {
                    self.prompts[prompt].has_first_token = true;
                    metrics.time_to_first_token.observe((now - self.context.started).as_secs_f64());
                }
                let progress = &mut self.choices[choice];
                if let Some(last) = progress.last_piece.replace(now) {
                    metrics.inter_token_latency.observe((now - last).as_secs_f64());
                }
                progress.num_tokens += num_tokens;
                counts.num_completion_tokens.fetch_add(num_tokens, Ordering::Relaxed);
                Event::Delta { choice, text, tokens }
            }
            TextEvent::Finished { sample, reason, stop_reason, num_tokens } => {
                let choice = prompt * self.num_samples + sample as usize;
                let progress = &mut self.choices[choice];
                progress.finished = true;
                // The total counts: tokens that gave no text come in no piece.
                counts.num_completion_tokens.fetch_add(num_tokens, Ordering::Relaxed);
                counts.num_completion_tokens.fetch_sub(progress.num_tokens, Ordering::Relaxed);
                progress.num_tokens = num_tokens;
                let (finish_reason, outcome) = match reason {
                    FinishReason::EndOfSequence | FinishReason::StopToken(_) | FinishReason::StopString => {
                        ("stop", Outcome::Stop)
                    }
                    FinishReason::Length => ("length", Outcome::Length),
                };
                self.state.metrics.count_choice(outcome);
                let stop_reason = stop_reason.map(|reason| match reason {
                    EngineStopReason::Text(text) => StopReason::Text(text),
                    EngineStopReason::Token(token) => StopReason::Token(token.0),
                });
                Event::Finished { choice, finish_reason, stop_reason }
            }
        }
    }

    fn on_end(&mut self, prompt: usize, timings: RequestTimings) -> Result<(), ApiError> {
        let choices = &self.choices[prompt * self.num_samples..(prompt + 1) * self.num_samples];
        if !choices.iter().all(|choice| choice.finished) {
            return Err(ApiError::internal(&self.context.id, &"a text stream ended before its choices did"));
        }
        let metrics = &self.state.metrics;
        metrics.request_latency.observe(self.context.started.elapsed().as_secs_f64());
        for (time, histogram) in [
            (timings.queue, &metrics.queue_time),
            (timings.prefill, &metrics.prefill_time),
            (timings.decode, &metrics.decode_time),
        ] {
            if let Some(time) = time {
                histogram.observe(time.as_secs_f64());
            }
        }
        self.timings = RequestTimings {
            queue: self.timings.queue.max(timings.queue),
            prefill: self.timings.prefill.max(timings.prefill),
            decode: self.timings.decode.max(timings.decode),
        };
        Ok(())
    }

    /// Tokens so far.
    pub(crate) fn usage(&self) -> Usage {
        let prompt_tokens = self.prompts.iter().map(|prompt| prompt.num_prompt_tokens).sum();
        let generated = |(prompt, choices): (&PromptProgress, &[ChoiceProgress])| {
            prompt.num_generated_tokens.unwrap_or_else(|| choices.iter().map(|choice| choice.num_tokens).sum())
        };
        let completion_tokens = self.prompts.iter().zip(self.choices.chunks(self.num_samples)).map(generated).sum();
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: Some(PromptTokensDetails { cached_tokens: 0 }),
        }
    }

    /// Writes `server-timing`; of several prompts the longest times count.
    pub(crate) fn write_server_timing(&self, headers: &mut HeaderMap) {
        let RequestTimings { queue, prefill, decode } = self.timings;
        let parts: Vec<String> = [("queue", queue), ("prefill", prefill), ("decode", decode)]
            .into_iter()
            .filter_map(|(name, time)| Some(format!("{name};dur={:.3}", milliseconds(time?))))
            .collect();
        if let (false, Ok(value)) = (parts.is_empty(), HeaderValue::from_str(&parts.join(", "))) {
            headers.insert(SERVER_TIMING, value);
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        for _ in self.choices.iter().filter(|choice| !choice.finished) {
            self.state.metrics.count_choice(Outcome::Abort);
        }
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// One prompt's events, ending with its times or its error.
fn items(prompt: usize, stream: TextStream) -> BoxStream<'static, (usize, StreamItem)> {
    stream::unfold(Some(stream), move |stream| async move {
        let mut stream = stream?;
        match stream.next().await {
            Some(Ok(event)) => Some(((prompt, StreamItem::Event(event)), Some(stream))),
            Some(Err(error)) => Some(((prompt, StreamItem::Failed(error)), None)),
            None => {
                let num_generated_tokens = stream.num_generated_tokens();
                Some(((prompt, StreamItem::Ended { timings: stream.timings(), num_generated_tokens }), None))
            }
        }
    })
    .boxed()
}
