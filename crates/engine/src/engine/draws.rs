//! What rows of logits give: tokens and log-probabilities, for all rows of a slice at once, on the model's threads.
//!
//! A row's tokens depend on the row and on what its request has generated, so rows can be worked on in any order; what came
//! of them is recorded afterwards, by the [`Outcome`](super::outcome::Outcome), in the order of the rows. It must not know
//! the model or the readers. Its invariant: the results do not depend on the number of threads.

use std::{
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bindery_scheduler::{StepPlan, TokenId};

use super::{
    live::{Live, LiveRequests, LiveSample, sample_of},
    rows::LogitRow,
};
use crate::{
    TokenLogprobs,
    sample::{PreparedSampling, RawDistribution, SampleError, SampleState, Sampler, TokenMask},
};

/// What came of a row.
#[derive(Debug, Default)]
pub(crate) struct RowDraws {
    /// Of the prompt token that the row predicts, where it is wanted.
    pub(crate) score: Option<TokenLogprobs>,
    /// One for each of the row's samples that has not ended, in their order; with an error it is the last.
    pub(crate) tokens: Vec<Result<DrawnToken, SampleError>>,
    /// The row is of no use to anybody.
    pub(crate) error: Option<SampleError>,
}

/// A sampled token.
#[derive(Debug)]
pub(crate) struct DrawnToken {
    pub(crate) token: TokenId,
    /// Where the request wants them.
    pub(crate) logprobs: Option<TokenLogprobs>,
}

/// Who runs `task(0)` to `task(num_tasks - 1)`, each once, and returns when all are done.
pub(crate) type Spread<'a> = &'a dyn Fn(usize, &(dyn Fn(usize) + Sync));

/// The results of a slice of rows, and what is reused from slice to slice.
#[derive(Debug, Default)]
pub(crate) struct Draws {
    /// One a row; more than the slice has rows where an earlier one had more.
    rows: Vec<Mutex<RowDraws>>,
    /// Not in use; as many as have been at work at a time.
    samplers: Mutex<Vec<Sampler>>,
    /// Empty between slices: their memory.
    jobs: Vec<Option<Job<'static>>>,
    wanting: Vec<Wanting<'static>>,
}

/// What there is to do with one row.
#[derive(Debug)]
struct Job<'a> {
    logits: &'a [f32],
    sampling: &'a PreparedSampling,
    /// The prompt token to be scored, and how many of the best beside it.
    scored: Option<(TokenId, u32)>,
    /// In the list of all samples.
    samples: Range<usize>,
}

/// A sample that wants a token, and its grammar's word or why there is none.
type Wanting<'a> = (&'a SampleState, Result<Option<&'a TokenMask>, SampleError>);

impl Draws {
    /// Works on all `rows`, whose logits are `logits`, `[rows.len(), vocab_size]`. Waits for masks that are not there yet.
    pub(crate) fn compute(
        &mut self,
        (rows, logits): (&[LogitRow], &[f32]),
        vocab_size: usize,
        plan: &StepPlan,
        requests: &mut LiveRequests,
        spread: Spread<'_>,
    ) {
        for id in rows.iter().flat_map(|row| &plan.samples[row.samples.clone()]) {
            if let Some(grammar) = requests.grammar_mut(*id) {
                grammar.wait();
            }
        }
        let mut wanting = emptied(std::mem::take(&mut self.wanting));
        let mut jobs = emptied(std::mem::take(&mut self.jobs));
        let each_row = rows.iter().zip(logits.chunks_exact(vocab_size));
        jobs.extend(
            each_row.map(|(row, logits)| Some(Job::new(row, logits, plan, requests.get(row.key)?, &mut wanting))),
        );
        self.rows.resize_with(self.rows.len().max(rows.len()), Mutex::default);
        let Self { rows: results, samplers, .. } = self;
        spread(jobs.len(), &|at| {
            let mut sampler = lock(samplers).pop().unwrap_or_default();
            let result = &mut *lock(&results[at]);
            *result = RowDraws { tokens: std::mem::take(&mut result.tokens), ..RowDraws::default() };
            result.tokens.clear();
            if let Some(job) = &jobs[at] {
                job.run(&wanting[job.samples.clone()], &mut sampler, result);
            }
            lock(samplers).push(sampler);
        });
        self.jobs = emptied(jobs);
        self.wanting = emptied(wanting);
    }

    /// Of the slice's row `at`.
    pub(crate) fn row(&mut self, at: usize) -> &mut RowDraws {
        self.rows[at].get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> Job<'a> {
    fn new(row: &LogitRow, logits: &'a [f32], plan: &StepPlan, live: &'a Live, wanting: &mut Vec<Wanting<'a>>) -> Self {
        let start = wanting.len();
        for &id in &plan.samples[row.samples.clone()] {
            let Some(LiveSample { state, grammar }) = &live.samples[sample_of(id) as usize] else { continue };
            let (param, position) = (live.grammar_param, state.num_generated_tokens());
            let mask = grammar.as_ref().map(|grammar| grammar.mask()).transpose();
            wanting.push((state, mask.map_err(|reason| SampleError::Grammar { param, position, reason })));
        }
        let scored = row.scored_prompt_index.zip(live.prompt_scores.as_ref());
        Self {
            logits,
            sampling: &live.sampling,
            scored: scored.map(|(index, scores)| (scores.tokens[index], scores.num_top)),
            samples: start..wanting.len(),
        }
    }

    fn run(&self, samples: &[Wanting<'_>], sampler: &mut Sampler, result: &mut RowDraws) {
        let Self { logits, sampling, scored, .. } = *self;
        let distribution = if scored.is_some() || sampling.logprobs.is_some() {
            let distribution = RawDistribution::new(logits);
            if distribution.is_none() {
                let position = samples.first().map_or(0, |(state, _)| state.num_generated_tokens());
                result.error = Some(SampleError::NotFinite { position });
                return;
            }
            distribution
        } else {
            None
        };
        let logprobs_of = |sampler: &mut Sampler, token, num_top| {
            distribution.as_ref().map(|distribution| sampler.logprobs(logits, distribution, token, num_top))
        };
        result.score = scored.and_then(|(token, num_top)| logprobs_of(sampler, token, num_top));
        for (state, mask) in samples {
            let token = mask.clone().and_then(|mask| sampler.sample(logits, sampling, state, mask));
            let drawn = token.map(|token| DrawnToken {
                token,
                logprobs: sampling.logprobs.and_then(|num_top| logprobs_of(sampler, token, num_top)),
            });
            let has_failed = drawn.is_err();
            result.tokens.push(drawn);
            if has_failed {
                break;
            }
        }
    }
}

/// The same memory for what borrows from elsewhere: the two types differ in lifetimes alone, for which the standard library collects
/// in place. (Not promised there, but counted in `tests/no_allocation.rs`.)
fn emptied<A, B>(mut vec: Vec<A>) -> Vec<B> {
    const { assert!(size_of::<A>() == size_of::<B>() && align_of::<A>() == align_of::<B>()) };
    vec.clear();
    vec.into_iter().map(|_| unreachable!("nothing is left in it")).collect()
}

/// What a panic leaves in a result or a sampler is cleared before it is used again.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
