//! The answers of one request as a stream of text events.
//!
//! Works on the reader's side: a token is detokenised when it is read. It must not know the model thread beyond its
//! [`TokenStream`]. Its invariant is the order promised by [`TextEvent`].

use std::{collections::VecDeque, sync::Arc, time::Instant};

use bindery_scheduler::TokenId;

use super::answer::{Answer, EndRules, token_text};
use crate::{
    Detokenizer, EngineError, FinishReason, RequestTimings, StopReason, TextEvent, TokenEvent, TokenLogprobs,
    TokenStream, TokenText, Tokenizer, text::detokenize::StopMatcher,
};

/// What a stream is to make of the engine's tokens.
#[derive(Debug)]
pub(super) struct Answers {
    pub(super) tokenizer: Arc<Tokenizer>,
    /// Answers to return.
    pub(super) num_wanted: u32,
    /// Answers to generate; more than wanted: the best are returned.
    pub(super) num_generated: u32,
    pub(super) shows_logprobs: bool,
    pub(super) rules: EndRules,
    pub(super) skip_special_tokens: bool,
    pub(super) stop: Vec<String>,
    pub(super) prompt: Vec<TokenId>,
    pub(super) prompt_text: Option<String>,
    pub(super) scores_prompt: bool,
    pub(super) timeout_ms: Option<u64>,
}

/// One request's text. Dropping it aborts the request.
#[derive(Debug)]
pub struct TextStream {
    answers: Answers,
    /// `None` where there is nothing to generate, and after the end.
    tokens: Option<TokenStream>,
    ready: VecDeque<TextEvent>,
    prompt_scores: Vec<Option<TokenLogprobs>>,
    samples: Vec<Sample>,
    times: Times,
}

#[derive(Debug)]
struct Sample {
    answer: Answer,
    /// Held back for `best_of`.
    text: String,
    shown: Vec<TokenText>,
    end: Option<(FinishReason, Option<StopReason>)>,
}

#[derive(Debug)]
struct Times {
    submitted: Instant,
    scheduled: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl TextStream {
    pub(super) fn new(answers: Answers, tokens: TokenStream, submitted: Instant) -> Self {
        let detokenizer =
            || Detokenizer::new(Arc::clone(&answers.tokenizer), &answers.prompt, answers.skip_special_tokens);
        let matcher = StopMatcher::new(answers.stop.clone(), answers.rules.include_stop);
        let samples = (0..answers.num_generated)
            .map(|_| Sample {
                answer: Answer::new(detokenizer(), matcher.clone()),
                text: String::new(),
                shown: Vec::new(),
                end: None,
            })
            .collect();
        let mut ready = VecDeque::new();
        if !answers.scores_prompt {
            ready.push_back(TextEvent::Prompt { tokens: Vec::new(), num_tokens: answers.prompt.len() });
        }
        let times = Times { submitted, scheduled: None, first_token: None, last_token: None };
        Self { answers, tokens: Some(tokens), ready, prompt_scores: Vec::new(), samples, times }
    }

    /// Nothing is generated: the prompt, and every answer empty.
    pub(super) fn without_engine(answers: Answers) -> Self {
        let mut ready = VecDeque::new();
        ready.push_back(TextEvent::Prompt { tokens: Vec::new(), num_tokens: answers.prompt.len() });
        ready.extend((0..answers.num_wanted).map(empty_answer));
        let times = Times { submitted: Instant::now(), scheduled: None, first_token: None, last_token: None };
        Self { answers, tokens: None, ready, prompt_scores: Vec::new(), samples: Vec::new(), times }
    }

    /// The next event; `None` after the last answer's end, or after an error. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<TextEvent, EngineError>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            let tokens = self.tokens.as_mut()?;
            match tokens.next().await {
                Some(Ok(event)) => {
                    let at = tokens.last_event_at();
                    self.take(event, at);
                }
                Some(Err(error)) => {
                    self.tokens = None;
                    return Some(Err(with_timeout(error, self.answers.timeout_ms)));
                }
                None => {
                    self.tokens = None;
                    self.end();
                }
            }
        }
    }

    /// Tokens of the prompt as it is computed (after truncation).
    pub fn num_prompt_tokens(&self) -> usize {
        self.answers.prompt.len()
    }

    /// The prompt's text, for an echo: as it came, or decoded where it came in tokens or was truncated.
    pub fn prompt_text(&self) -> Result<String, EngineError> {
        match &self.answers.prompt_text {
            Some(text) => Ok(text.clone()),
            None => self.answers.tokenizer.decode(&self.answers.prompt, self.answers.skip_special_tokens),
        }
    }

    /// The prompt's tokens.
    pub fn prompt_tokens(&self) -> &[TokenId] {
        &self.answers.prompt
    }

    /// Tokens generated so far over all samples, those that `best_of` throws away among them.
    pub fn num_generated_tokens(&self) -> usize {
        self.samples.iter().map(|sample| sample.answer.num_tokens).sum()
    }

    /// As far as they are known.
    pub fn timings(&self) -> RequestTimings {
        let Times { submitted, scheduled, first_token, last_token } = self.times;
        let between = |from: Option<Instant>, to: Option<Instant>| Some(to?.saturating_duration_since(from?));
        RequestTimings {
            queue: between(Some(submitted), scheduled),
            prefill: between(scheduled, first_token),
            decode: between(first_token, last_token),
        }
    }

    fn selects_best(&self) -> bool {
        self.answers.num_generated > self.answers.num_wanted
    }

    fn take(&mut self, event: TokenEvent, at: Instant) {
        match event {
            TokenEvent::Scheduled => self.times.scheduled = Some(at),
            TokenEvent::PromptLogprobs(scores) => {
                self.prompt_scores.extend(scores);
                if self.prompt_scores.len() == self.answers.prompt.len() {
                    let scores = std::mem::take(&mut self.prompt_scores);
                    let prompt = self.answers.prompt.iter().zip(scores);
                    let tokens: Vec<_> =
                        prompt.map(|(&id, score)| token_text(&self.answers.tokenizer, id, score)).collect();
                    self.ready.push_back(TextEvent::Prompt { num_tokens: tokens.len(), tokens });
                }
            }
            TokenEvent::Token { sample, token, logprobs, finish } => {
                self.times.first_token.get_or_insert(at);
                self.times.last_token = Some(at);
                self.take_token(sample, token, logprobs, finish);
            }
        }
    }

    fn take_token(
        &mut self,
        index: u32,
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
        finish: Option<FinishReason>,
    ) {
        let selects_best = self.selects_best();
        let Some(sample) = self.samples.get_mut(index as usize).filter(|sample| sample.end.is_none()) else { return };
        sample.answer.sum_logprobs += logprobs.as_ref().map_or(0.0, |logprobs| f64::from(logprobs.logprob));
        let progress = sample.answer.push(token, finish, self.answers.rules);
        let logprobs = logprobs.filter(|_| self.answers.shows_logprobs);
        let shown = progress.shows_token.then(|| token_text(&self.answers.tokenizer, token, logprobs));
        sample.end.clone_from(&progress.end);
        if progress.end.is_some()
            && finish.is_none()
            && let Some(tokens) = &self.tokens
        {
            tokens.abort_sample(index);
        }
        if selects_best {
            sample.text.push_str(&progress.text);
            sample.shown.extend(shown);
            return;
        }
        self.ready.push_back(TextEvent::Delta {
            sample: index,
            text: progress.text,
            tokens: shown.into_iter().collect(),
            num_tokens: 1,
        });
        if let Some((reason, stop_reason)) = progress.end {
            let num_tokens = sample.answer.num_tokens;
            self.ready.push_back(TextEvent::Finished { sample: index, reason, stop_reason, num_tokens });
        }
    }

    /// All samples have ended.
    fn end(&mut self) {
        if self.samples.iter().all(|sample| sample.answer.num_tokens == 0) {
            // The prompt was scored and nothing was to be generated.
            self.ready.extend((0..self.answers.num_wanted).map(empty_answer));
        } else if self.selects_best() {
            // A stable sort: of equally likely answers, the one generated first.
            let mut order: Vec<usize> = (0..self.samples.len()).collect();
            order.sort_by(|&a, &b| {
                self.samples[b].answer.mean_logprob().total_cmp(&self.samples[a].answer.mean_logprob())
            });
            for (rank, index) in order.into_iter().take(self.answers.num_wanted as usize).enumerate() {
                let sample = &mut self.samples[index];
                let num_tokens = sample.answer.num_tokens;
                let (reason, stop_reason) = sample.end.take().unwrap_or((FinishReason::Length, None));
                self.ready.push_back(TextEvent::Delta {
                    sample: rank as u32,
                    text: std::mem::take(&mut sample.text),
                    tokens: std::mem::take(&mut sample.shown),
                    num_tokens,
                });
                self.ready.push_back(TextEvent::Finished { sample: rank as u32, reason, stop_reason, num_tokens });
            }
        }
    }
}

fn empty_answer(sample: u32) -> TextEvent {
    TextEvent::Finished { sample, reason: FinishReason::Length, stop_reason: None, num_tokens: 0 }
}

/// The engine knows a deadline, the caller gave a duration: the error tells the latter.
fn with_timeout(error: EngineError, timeout_ms: Option<u64>) -> EngineError {
    match (error, timeout_ms) {
        (EngineError::DeadlineExceeded { .. }, Some(timeout_ms)) => EngineError::DeadlineExceeded { timeout_ms },
        (error, _) => error,
    }
}
