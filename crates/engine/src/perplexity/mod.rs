//! How well a setting predicts a text, and how far it is from a base: perplexity and KL divergence, as llama-perplexity
//! measures them, so that figures can be laid side by side.
//!
//! A text is cut into windows of `context_len` tokens (what is left over at the end is not used). The first token of a
//! window gives way to the beginning-of-sequence token where the model wants one; the tokens of the second half are
//! scored, each with all tokens of its window before it. A base scores the same tokens, and rows are compared as they
//! are made: no file of logits, and never more than [`MAX_LOGIT_BYTES`] of them a model.
//!
//! It must not know where models come from or how figures are shown. Its invariant: subject and base see the same tokens
//! in the same windows; on the `cpu` backend neither the size of a step nor the number of threads changes a figure.

mod statistics;

use std::{num::NonZero, ops::Range, path::Path};

use bindery_model::{
    BatchSequence, ForwardBatch, LoadOptions, Model, ModelError, ModelInfo, OpenedModel, StepModel, make_room,
};

pub use statistics::{Comparison, Estimate, Spread};

use crate::{EngineError, Tokenizer, engine::rows::rope_len, load};
use statistics::ScoredToken;

/// Shortest window: a few tokens of each are scored, so that every mean has an error.
pub const MIN_CONTEXT_LEN: usize = 8;
/// Logits that lie in memory at a time, a model.
const MAX_LOGIT_BYTES: usize = 16 << 20;
/// Of the scored positions of a window that is only watched, the head is computed for each so many.
const HEAD_ROWS_STEP: usize = 8;
/// Threads for the arithmetic: more gain nothing beside the model.
const MAX_THREADS: usize = 16;

/// A model and how to load it.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// A `.gguf` file, or a folder with config.json and safetensors.
    pub path: &'a Path,
    /// How.
    pub load: &'a LoadOptions,
}

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct PerplexityRequest<'a> {
    /// What is measured.
    pub subject: Side<'a>,
    /// What it is held against.
    pub base: Option<Side<'a>>,
    /// Scored with the subject's tokens.
    pub text: &'a str,
    /// Tokens in a window; at least [`MIN_CONTEXT_LEN`].
    pub context_len: usize,
    /// Windows to score; `None`: all there are.
    pub max_windows: Option<usize>,
    /// Tokens of a step; a longer window is computed in several.
    pub max_num_batched_tokens: usize,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Progress {
    /// Weights are being read, bytes.
    Loading {
        /// Of this model.
        done: u64,
        /// Of this model.
        total: u64,
    },
    /// Windows are being scored.
    Scoring {
        /// Windows.
        done: usize,
        /// Windows.
        total: usize,
        /// Over the windows so far.
        perplexity: f64,
    },
}

/// What came out.
#[derive(Clone, Debug)]
pub struct PerplexityReport {
    /// The subject as it was loaded.
    pub subject: ModelInfo,
    /// The base as it was loaded.
    pub base: Option<ModelInfo>,
    /// Tokens of the whole text.
    pub num_text_tokens: usize,
    /// Windows that were scored.
    pub num_windows: usize,
    /// Tokens that were scored in them.
    pub num_scored_tokens: usize,
    /// Of the subject.
    pub perplexity: Estimate,
    /// With the base.
    pub comparison: Option<Comparison>,
}

/// Loads, scores, compares. `progress` is called after each tensor and each window.
///
/// # Errors
/// A text shorter than two windows, windows longer than the model's context, a base with other tokens, logits that are no
/// numbers; and whatever loading and computing can fail with.
pub fn measure(
    request: &PerplexityRequest<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<PerplexityReport, EngineError> {
    let (subject, tokenizer) = open(request.subject, request.context_len)?;
    let base = request.base.map(|side| open(side, request.context_len)).transpose()?;
    let windows = Windows::cut(&tokenizer, request.text, request.context_len, request.max_windows)?;
    windows.check_vocabulary(subject.config().vocab_size)?;
    if let Some((base, base_tokenizer)) = &base {
        let others = Windows::cut(base_tokenizer, request.text, request.context_len, request.max_windows)?;
        if windows != others || subject.config().vocab_size != base.config().vocab_size {
            return Err(invalid(
                "base",
                "the base has another vocabulary, so its probabilities cannot be compared: name a file of the same model"
                    .to_owned(),
            ));
        }
    }
    drop(tokenizer);
    let mut loading = |done, total| progress(Progress::Loading { done, total });
    let mut subject = Scorer::load(subject, request, &mut loading)?;
    let mut base = base.map(|(base, _)| Scorer::load(base, request, &mut loading)).transpose()?;

    let mut tokens = Vec::new();
    let mut nll = 0.0;
    for (index, window) in windows.iter().enumerate() {
        let first = tokens.len();
        score_window(window, &mut subject, base.as_mut(), &mut tokens)?;
        nll += tokens[first..].iter().map(|token| token.nll).sum::<f64>();
        let perplexity = (nll / tokens.len() as f64).exp();
        progress(Progress::Scoring { done: index + 1, total: windows.len(), perplexity });
    }
    Ok(PerplexityReport {
        subject: subject.model.info().clone(),
        base: base.map(|base| base.model.info().clone()),
        num_text_tokens: windows.num_text_tokens,
        num_windows: windows.len(),
        num_scored_tokens: tokens.len(),
        perplexity: statistics::perplexity(&tokens),
        comparison: statistics::compare(&tokens),
    })
}

/// All that can be refused without reading a weight.
fn open(side: Side<'_>, context_len: usize) -> Result<(OpenedModel, Tokenizer), EngineError> {
    let model = Model::open(side.path, side.load)?;
    let model_len = model.config().max_position_embeddings;
    if context_len < MIN_CONTEXT_LEN || context_len > model_len {
        return Err(invalid(
            "ctx_size",
            format!("--ctx-size is {context_len}, this model takes windows of {MIN_CONTEXT_LEN} to {model_len} tokens"),
        ));
    }
    let (tokenizer, _) = load::load_text(side.path, side.load.dummy)?;
    Ok((model, tokenizer))
}

/// A text's tokens, cut.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Windows {
    /// The windows, one after the other.
    tokens: Vec<u32>,
    context_len: usize,
    num_text_tokens: usize,
}

impl Windows {
    pub(crate) fn cut(
        tokenizer: &Tokenizer,
        text: &str,
        context_len: usize,
        max_windows: Option<usize>,
    ) -> Result<Self, EngineError> {
        let mut tokens: Vec<u32> = tokenizer.encode(text, true)?.into_iter().map(|token| token.0).collect();
        // What stands around no text at all: the model's beginning, its end, both or neither.
        let around = tokenizer.encode("", true)?;
        let bos = tokenizer.bos_token_id().filter(|bos| around.first() == Some(bos));
        // An end that was put there is none of the text's tokens.
        if around.last().is_some_and(|last| bos != Some(*last) && tokenizer.eos_token_ids().contains(last)) {
            tokens.pop();
        }
        Self::of_tokens(tokens, bos.map(|bos| bos.0), context_len, max_windows)
    }

    /// `bos` takes the place of each window's first token.
    fn of_tokens(
        mut tokens: Vec<u32>,
        bos: Option<u32>,
        context_len: usize,
        max_windows: Option<usize>,
    ) -> Result<Self, EngineError> {
        let num_text_tokens = tokens.len();
        // Two at least, as llama-perplexity demands: fewer say nothing.
        if num_text_tokens < 2 * context_len {
            return Err(invalid(
                "file",
                format!(
                    "the text has {num_text_tokens} tokens, two windows of {context_len} need {}: give a longer text or a \
                     smaller --ctx-size",
                    2 * context_len
                ),
            ));
        }
        let num_windows = (num_text_tokens / context_len).min(max_windows.unwrap_or(usize::MAX));
        tokens.truncate(num_windows * context_len);
        if let Some(bos) = bos {
            tokens.chunks_exact_mut(context_len).for_each(|window| window[0] = bos);
        }
        Ok(Self { tokens, context_len, num_text_tokens })
    }

    pub(crate) fn len(&self) -> usize {
        self.tokens.len() / self.context_len
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &[u32]> {
        self.tokens.chunks_exact(self.context_len)
    }

    pub(crate) fn check_vocabulary(&self, vocab_size: usize) -> Result<(), EngineError> {
        match self.tokens.iter().find(|&&token| token as usize >= vocab_size) {
            Some(token) => Err(invalid(
                "file",
                format!(
                    "the text has the token {token}, this model knows only the first {vocab_size}: its tokenizer is \
                     another model's, or the text needs tokens that were added without training"
                ),
            )),
            None => Ok(()),
        }
    }
}

/// Positions of a step whose logits are wanted: each predicts the token after it, and the tokens after the first half of
/// the window are scored.
fn scored_positions(context_len: usize, step: &Range<usize>) -> Range<usize> {
    let start = (context_len / 2).clamp(step.start, step.end);
    start..(context_len - 1).clamp(start, step.end)
}

/// A loaded model and its part of the scratch memory.
pub(crate) struct Scorer {
    model: Model,
    step_len: usize,
    batch: ForwardBatch,
    logits: Vec<f32>,
}

impl Scorer {
    fn load(
        model: OpenedModel,
        request: &PerplexityRequest<'_>,
        loading: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, EngineError> {
        Self::new(model.load(loading)?, request.context_len, request.max_num_batched_tokens)
    }

    /// For windows of `context_len` tokens, in steps of at most `max_num_batched_tokens`.
    pub(crate) fn new(
        mut model: Model,
        context_len: usize,
        max_num_batched_tokens: usize,
    ) -> Result<Self, EngineError> {
        model.allocate_kv(context_len.div_ceil(model.info().block_size))?;
        let step_len = max_num_batched_tokens.clamp(1, context_len);
        Ok(Self { model, step_len, batch: ForwardBatch::default(), logits: Vec::new() })
    }

    /// Computes a window for who watches the model: the layers of all positions, and the head of some.
    pub(crate) fn run(&mut self, window: &[u32]) -> Result<(), EngineError> {
        let step = 0..window.len();
        self.forward(window, &step)?;
        let num_rows = scored_positions(window.len(), &step).len();
        (0..num_rows).step_by(HEAD_ROWS_STEP).try_for_each(|row| self.logits(row..row + 1).map(|_| ()))
    }

    /// When all windows are through.
    pub(crate) fn into_model(self) -> Model {
        self.model
    }

    /// Computes the positions `step` of a window; earlier ones have been. The logits of those that are scored can be
    /// asked for then.
    fn forward(&mut self, window: &[u32], step: &Range<usize>) -> Result<(), EngineError> {
        let num_blocks = window.len().div_ceil(self.model.info().block_size);
        // A window is a prompt whose tokens are all known, whatever the steps it is computed in.
        let rope_len = rope_len(self.model.rope_regimes(), window.len(), window.len());
        let batch = &mut self.batch;
        batch.clear();
        batch.tokens.extend_from_slice(&window[step.clone()]);
        batch.positions.extend(step.clone().map(|position| position as u32));
        // The blocks of the one sequence lie in order, so a token's slot is its position.
        batch.slots.extend_from_slice(&batch.positions);
        batch.block_tables.extend(0..num_blocks as u32);
        batch.sequences.push(BatchSequence {
            rows: 0..step.len(),
            block_table: 0..num_blocks,
            context_len: step.end,
            rope_len,
            adapter: None,
        });
        batch.logit_rows.extend(scored_positions(window.len(), step).map(|position| (position - step.start) as u32));
        Ok(self.model.forward(batch, &mut |_| ())?)
    }

    fn logits(&mut self, rows: Range<usize>) -> Result<&[f32], EngineError> {
        let len = rows.len() * self.model.vocab_size();
        make_room(&mut self.logits, len)?;
        self.model.logits(rows, &mut self.logits[..len])?;
        Ok(&self.logits[..len])
    }
}

/// Adds the window's scored tokens to `tokens`, in order.
fn score_window(
    window: &[u32],
    subject: &mut Scorer,
    mut base: Option<&mut Scorer>,
    tokens: &mut Vec<ScoredToken>,
) -> Result<(), EngineError> {
    let vocab_size = subject.model.vocab_size();
    let rows_at_once = (MAX_LOGIT_BYTES / (vocab_size * size_of::<f32>())).max(1);
    for start in (0..window.len()).step_by(subject.step_len) {
        let step = start..(start + subject.step_len).min(window.len());
        subject.forward(window, &step)?;
        if let Some(base) = &mut base {
            base.forward(window, &step)?;
        }
        let scored = scored_positions(window.len(), &step);
        let targets = &window[scored.start + 1..][..scored.len()];
        for first in (0..targets.len()).step_by(rows_at_once) {
            let rows = first..(first + rows_at_once).min(targets.len());
            let targets = &targets[rows.clone()];
            let logits = subject.logits(rows.clone())?;
            let base_logits = base.as_mut().map(|base| base.logits(rows.clone())).transpose()?;
            score_rows(targets, vocab_size, logits, base_logits, tokens)?;
        }
    }
    Ok(())
}

/// Rows of logits `[targets.len(), vocab_size]`, split over threads.
fn score_rows(
    targets: &[u32],
    vocab_size: usize,
    logits: &[f32],
    base: Option<&[f32]>,
    tokens: &mut Vec<ScoredToken>,
) -> Result<(), EngineError> {
    let num_threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(MAX_THREADS);
    let mut scored: Vec<Option<ScoredToken>> = vec![None; targets.len()];
    let per_thread = targets.len().div_ceil(num_threads).max(1);
    std::thread::scope(|scope| {
        for (part, out) in scored.chunks_mut(per_thread).enumerate() {
            let first = part * per_thread;
            scope.spawn(move || {
                for (row, out) in (first..).zip(out) {
                    let place = row * vocab_size..(row + 1) * vocab_size;
                    let base = base.map(|base| &base[place.clone()]);
                    *out = statistics::score(&logits[place], base, targets[row] as usize);
                }
            });
        }
    });
    for token in scored {
        let no_numbers = "the model's logits are not numbers (NaN or infinite): its weights are damaged, or too large for \
                          the type they are computed in; try --dtype f32";
        tokens.push(token.ok_or_else(|| ModelError::Step(no_numbers.to_owned()))?);
    }
    Ok(())
}

fn invalid(param: &'static str, message: String) -> EngineError {
    EngineError::Invalid { param, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(num_tokens: u32, bos: Option<u32>, context_len: usize, max: Option<usize>) -> Result<Windows, EngineError> {
        Windows::of_tokens((100..100 + num_tokens).collect(), bos, context_len, max)
    }

    #[test]
    fn windows_follow_each_other_and_begin_with_the_beginning_token() {
        let windows = cut(29, Some(1), 9, None).unwrap();
        let expected: [&[u32]; 3] = [
            &[1, 101, 102, 103, 104, 105, 106, 107, 108],
            &[1, 110, 111, 112, 113, 114, 115, 116, 117],
            &[1, 119, 120, 121, 122, 123, 124, 125, 126],
        ];
        assert_eq!(windows.iter().collect::<Vec<_>>(), expected);
        assert_eq!((windows.len(), windows.num_text_tokens), (3, 29));
        let without = cut(29, None, 9, Some(2)).unwrap();
        assert_eq!((without.len(), without.iter().next().unwrap()[0]), (2, 100));
        assert_eq!(cut(18, None, 9, Some(1000)).unwrap().len(), 2);
    }

    #[test]
    fn texts_below_two_windows_are_refused_with_both_figures() {
        let error = cut(17, Some(1), 9, Some(1)).unwrap_err().to_string();
        assert!(error.contains("17 tokens") && error.contains("need 18"), "{error}");
        assert!(cut(0, None, 8, None).is_err());
    }

    #[test]
    fn tokens_beyond_the_models_are_named() {
        let windows = cut(20, Some(1), 8, None).unwrap();
        assert!(windows.check_vocabulary(116).is_ok(), "four tokens at the end are not used");
        let error = windows.check_vocabulary(110).unwrap_err().to_string();
        assert!(error.contains("token 110") && error.contains("first 110"), "{error}");
    }

    /// llama-perplexity: logits from position n/2 on, the last position predicts nothing, n - n/2 - 1 tokens a window.
    #[test]
    fn the_second_half_is_scored_whatever_the_steps() {
        for context_len in [8, 9, 16, 511, 512] {
            for step_len in [1, 2, 3, 7, 256, 512, 1000] {
                let mut scored = Vec::new();
                for start in (0..context_len).step_by(step_len) {
                    let step = start..(start + step_len).min(context_len);
                    let positions = scored_positions(context_len, &step);
                    assert!(step.start <= positions.start && positions.end <= step.end);
                    scored.extend(positions);
                }
                assert_eq!(scored, (context_len / 2..context_len - 1).collect::<Vec<_>>(), "{context_len} {step_len}");
                assert_eq!(scored.len(), context_len - context_len / 2 - 1);
            }
        }
    }
}
