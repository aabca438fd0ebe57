//! The requests that have not ended, as the model thread keeps them.
//!
//! It must not know the plan or the model. Its invariant: a request is in here exactly as long as one of its samples
//! may still get a token (or its prompt a score); its ticket and its outbox live and end with it.

use std::{collections::BTreeSet, ops::Range, sync::Arc, time::Instant};

use bindery_scheduler::SeqId;
use rustc_hash::FxHashMap;

use super::{PromptScores, Submission, admission::Ticket, stream::Outbox};
use crate::{
    AdapterLease, EngineError, TokenEvent,
    grammar::GrammarState,
    request::MAX_SAMPLES,
    sample::{PreparedSampling, SampleState},
};

/// Room for [`MAX_SAMPLES`] in the low bits of a [`SeqId`].
const SAMPLE_BITS: u32 = 8;
const _: () = assert!(MAX_SAMPLES <= 1 << SAMPLE_BITS);

/// The sequence of a request's sample.
pub(crate) fn seq_id(key: u64, sample: u32) -> SeqId {
    SeqId(key << SAMPLE_BITS | u64::from(sample))
}

/// The request of a sequence.
pub(crate) fn key_of(id: SeqId) -> u64 {
    id.0 >> SAMPLE_BITS
}

/// Which sample of its request a sequence is.
pub(crate) fn sample_of(id: SeqId) -> u32 {
    (id.0 & ((1 << SAMPLE_BITS) - 1)) as u32
}

/// A request that has not ended.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) request_id: String,
    pub(crate) ticket: Ticket,
    /// Held to its end.
    pub(crate) adapter: Option<AdapterLease>,
    pub(crate) sampling: PreparedSampling,
    /// One a sample; `None` once it has ended.
    pub(crate) samples: Vec<Option<LiveSample>>,
    /// The wire field its grammar came in, for errors.
    pub(crate) grammar_param: &'static str,
    pub(crate) num_prompt_tokens: usize,
    /// Prompt tokens that were computed at least once.
    pub(crate) num_counted_prompt_tokens: usize,
    pub(crate) prompt_scores: Option<PromptScores>,
    /// Prompt tokens whose score has been sent; the first token has none to compute.
    pub(crate) num_scored: usize,
    pub(crate) deadline: Option<Instant>,
    pub(crate) submitted_at: Instant,
    pub(crate) outbox: Arc<Outbox>,
}

/// A sample that has not ended.
#[derive(Debug)]
pub(crate) struct LiveSample {
    pub(crate) state: SampleState,
    pub(crate) grammar: Option<GrammarState>,
}

impl Live {
    /// The record, and the sequence for the scheduler.
    pub(crate) fn new(submission: Submission) -> (Self, bindery_scheduler::SequenceSpec) {
        let mut grammars = submission.grammars.into_iter();
        let samples = (0..submission.spec.samples.len() as u32)
            .map(|index| Some(LiveSample { state: SampleState::new(index), grammar: grammars.next() }))
            .collect();
        let live = Self {
            request_id: submission.request_id,
            ticket: submission.ticket,
            adapter: submission.adapter,
            sampling: submission.sampling,
            samples,
            grammar_param: submission.grammar_param,
            num_prompt_tokens: submission.num_prompt_tokens,
            num_counted_prompt_tokens: 0,
            prompt_scores: submission.prompt_scores,
            num_scored: 0,
            deadline: submission.deadline,
            submitted_at: submission.submitted_at,
            outbox: Arc::new(submission.outbox),
        };
        (live, submission.spec)
    }

    /// Its sequences that have not ended.
    pub(crate) fn sequences(&self) -> impl Iterator<Item = SeqId> {
        let key = self.ticket.key();
        let samples = self.samples.iter().enumerate();
        samples.filter(|(_, state)| state.is_some()).map(move |(index, _)| seq_id(key, index as u32))
    }

    fn has_ended(&self) -> bool {
        self.samples.iter().all(Option::is_none)
    }

    /// The prompt is known to the cache up to `num_computed_tokens`: how many of its tokens are so for the first time.
    pub(crate) fn count_prompt_tokens(&mut self, num_computed_tokens: usize) -> u64 {
        let num_new = num_computed_tokens.min(self.num_prompt_tokens).saturating_sub(self.num_counted_prompt_tokens);
        self.num_counted_prompt_tokens += num_new;
        self.ticket.computed(num_new);
        num_new as u64
    }

    /// It wanted its prompt's scores and no token, and its prompt is computed.
    pub(crate) fn is_scored(&self) -> bool {
        self.sampling.generates_nothing() && self.num_counted_prompt_tokens == self.num_prompt_tokens
    }

    /// What a reader is told when the deadline has passed.
    pub(crate) fn deadline_error(&self) -> EngineError {
        let timeout = self.deadline.map(|deadline| deadline.saturating_duration_since(self.submitted_at));
        EngineError::DeadlineExceeded { timeout_ms: timeout.map_or(0, |timeout| timeout.as_millis() as u64) }
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct LiveRequests {
    by_key: FxHashMap<u64, Live>,
    by_deadline: BTreeSet<(Instant, u64)>,
    num_started: usize,
}

impl LiveRequests {
    pub(crate) fn insert(&mut self, live: Live) {
        let key = live.ticket.key();
        if let Some(deadline) = live.deadline {
            self.by_deadline.insert((deadline, key));
        }
        self.by_key.insert(key, live);
    }

    pub(crate) fn remove(&mut self, key: u64) -> Option<Live> {
        let live = self.by_key.remove(&key)?;
        if let Some(deadline) = live.deadline {
            self.by_deadline.remove(&(deadline, key));
        }
        self.num_started -= usize::from(!live.ticket.is_queued());
        Some(live)
    }

    /// The request is in a plan. True for its first one: it leaves the queue, and its reader hears of it.
    pub(crate) fn start(&mut self, key: u64, now: Instant) -> bool {
        let Some(live) = self.by_key.get_mut(&key) else { return false };
        if !live.ticket.leave_queue() {
            return false;
        }
        self.num_started += 1;
        if let Some(adapter) = &live.adapter {
            adapter.start();
        }
        let mut events = vec![TokenEvent::Scheduled];
        if live.prompt_scores.is_some() {
            // Nothing predicts the first token of a prompt.
            live.num_scored = 1;
            events.push(TokenEvent::PromptLogprobs(vec![None]));
        }
        for event in events {
            let sent = live.outbox.send(now, event);
            debug_assert!(sent.is_ok(), "only generated tokens are counted");
        }
        true
    }

    /// Ends one sample; its sequence, if it had not ended before.
    pub(crate) fn end_sample(&mut self, key: u64, sample: u32) -> Option<SeqId> {
        let state = self.by_key.get_mut(&key)?.samples.get_mut(sample as usize)?;
        state.take().map(|_| seq_id(key, sample))
    }

    /// Lets a request go whose samples have all ended.
    pub(crate) fn remove_if_ended(&mut self, key: u64) {
        if self.by_key.get(&key).is_some_and(Live::has_ended) {
            self.remove(key);
        }
    }

    /// The grammar of a sequence that has not ended.
    pub(crate) fn grammar_mut(&mut self, id: SeqId) -> Option<&mut GrammarState> {
        self.by_key.get_mut(&key_of(id))?.samples.get_mut(sample_of(id) as usize)?.as_mut()?.grammar.as_mut()
    }

    pub(crate) fn get(&self, key: u64) -> Option<&Live> {
        self.by_key.get(&key)
    }

    pub(crate) fn get_mut(&mut self, key: u64) -> Option<&mut Live> {
        self.by_key.get_mut(&key)
    }

    /// Those that have left the queue.
    pub(crate) fn num_started(&self) -> usize {
        self.num_started
    }

    pub(crate) fn keys(&self) -> Vec<u64> {
        self.by_key.keys().copied().collect()
    }

    /// A request whose deadline is not after `now`.
    pub(crate) fn first_expired(&self, now: Instant) -> Option<u64> {
        self.by_deadline.first().filter(|(deadline, _)| *deadline <= now).map(|&(_, key)| key)
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.by_deadline.first().map(|&(deadline, _)| deadline)
    }

    /// Indices of the prompt tokens whose log-probability is wanted and not yet sent; empty for a request that wants
    /// none. A preempted prompt is computed again, but scored once.
    pub(crate) fn missing_prompt_scores(&self, key: u64) -> Range<usize> {
        match self.by_key.get(&key) {
            Some(live) if live.prompt_scores.is_some() => live.num_scored.max(1)..live.num_prompt_tokens,
            _ => 0..0,
        }
    }
}
