//! What a step brought: sampled tokens for the scheduler, events for the readers, requests that failed alone.
//!
//! Filled row by row while logits are at hand, handed out only when the step as a whole has succeeded: a failed step
//! sends nothing. It must not know the model. Its invariant: `sampled` has one entry for each sampling sequence of the
//! plan, except those of requests in `failed`.

use std::sync::Arc;

use bindery_scheduler::{Sampled, SeqId, StepPlan};

use super::{
    draws::{DrawnToken, RowDraws},
    live::{Live, LiveRequests, LiveSample, key_of, sample_of},
    rows::LogitRow,
    stream::Outbox,
};
use crate::{TokenEvent, TokenLogprobs, sample::SampleError};

/// Reused from step to step.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) sampled: Vec<Sampled>,
    pub(crate) events: Vec<(Arc<Outbox>, u64, TokenEvent)>,
    pub(crate) failed: Vec<(u64, SampleError)>,
    /// Sequences whose next mask a worker has begun with.
    pub(crate) advanced: Vec<SeqId>,
    /// Requests that end with this step without generating anything.
    pub(crate) scored: Vec<(u64, Arc<Outbox>)>,
    scores: Vec<Option<TokenLogprobs>>,
    scores_key: u64,
}

impl Outcome {
    pub(crate) fn clear(&mut self) {
        self.sampled.clear();
        self.events.clear();
        self.failed.clear();
        self.advanced.clear();
        self.scored.clear();
        self.scores.clear();
    }

    pub(crate) fn has_failed(&self, key: u64) -> bool {
        self.failed.iter().any(|(failed, _)| *failed == key)
    }

    /// Takes over what came of `row`: the prompt token's score, the samples' tokens.
    pub(crate) fn take_row(
        &mut self,
        row: &LogitRow,
        draws: &mut RowDraws,
        plan: &StepPlan,
        requests: &mut LiveRequests,
    ) {
        if self.scores_key != row.key {
            self.flush_scores(requests);
        }
        let Some(live) = requests.get_mut(row.key).filter(|_| !self.has_failed(row.key)) else { return };
        if let Err(error) = self.try_row(row, draws, plan, live) {
            self.failed.push((row.key, error));
        }
    }

    fn try_row(
        &mut self,
        row: &LogitRow,
        draws: &mut RowDraws,
        plan: &StepPlan,
        live: &mut Live,
    ) -> Result<(), SampleError> {
        if let Some(error) = draws.error.take() {
            return Err(error);
        }
        if row.scored_prompt_index.is_some() && live.prompt_scores.is_some() {
            self.scores_key = row.key;
            self.scores.push(draws.score.take());
        }
        if !row.samples.is_empty() {
            // A reader gets its prompt's scores before the first token.
            self.send_scores(live);
        }
        let mut tokens = draws.tokens.drain(..);
        for &id in &plan.samples[row.samples.clone()] {
            let sample = sample_of(id);
            let Some(LiveSample { state, grammar }) = &mut live.samples[sample as usize] else { continue };
            let Some(drawn) = tokens.next() else { break };
            let DrawnToken { token, logprobs } = drawn?;
            let finish = state.record(token, &live.sampling);
            if finish.is_some() {
                live.samples[sample as usize] = None;
            } else if let Some(grammar) = grammar {
                grammar.advance(token);
                self.advanced.push(id);
            }
            self.sampled.push(Sampled { id, token, finished: finish.is_some() });
            let event = TokenEvent::Token { sample, token, logprobs, finish };
            self.events.push((Arc::clone(&live.outbox), row.key, event));
        }
        Ok(())
    }

    /// Makes an event of the scores gathered so far. To be called between slices of rows, so that a slice of a long
    /// prompt travels as one event.
    pub(crate) fn flush_scores(&mut self, requests: &mut LiveRequests) {
        if !self.scores.is_empty() {
            match requests.get_mut(self.scores_key) {
                Some(live) => self.send_scores(live),
                None => self.scores.clear(),
            }
        }
    }

    /// The scores at hand are those of `live`.
    fn send_scores(&mut self, live: &mut Live) {
        if !self.scores.is_empty() {
            let scores = std::mem::take(&mut self.scores);
            live.num_scored += scores.len();
            self.events.push((Arc::clone(&live.outbox), live.ticket.key(), TokenEvent::PromptLogprobs(scores)));
        }
    }

    /// Forgets what requests that failed alone had sampled.
    pub(crate) fn drop_failed(&mut self) {
        let failed = std::mem::take(&mut self.failed);
        if !failed.is_empty() {
            self.sampled.retain(|sampled| failed.iter().all(|(key, _)| *key != key_of(sampled.id)));
            self.events.retain(|(_, key, _)| failed.iter().all(|(failed_key, _)| failed_key != key));
        }
        self.failed = failed;
    }
}
