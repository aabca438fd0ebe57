//! One sample's tokens becoming text: detokenised, searched for stop strings, cut where it ends.
//!
//! It must not know the engine or the other samples. Its invariant: the text of all its deltas, joined, is what the
//! tokens decode to, up to the stop string if there is one; after the end there is nothing.

use std::sync::Arc;

use bindery_scheduler::TokenId;

use crate::{
    Detokenizer, FinishReason, Tokenizer,
    local_model::{StopReason, TokenText, TopToken},
    request::TokenLogprobs,
    text::detokenize::StopMatcher,
};

/// A sample on the reader's side.
#[derive(Debug)]
pub(super) struct Answer {
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    pub(super) num_tokens: usize,
    pub(super) sum_logprobs: f64,
}

/// What one token made of the answer.
#[derive(Debug)]
pub(super) struct Progress {
    pub(super) text: String,
    /// Whether the token is part of the answer (an end token is not).
    pub(super) shows_token: bool,
    pub(super) end: Option<(FinishReason, Option<StopReason>)>,
}

/// How answers of a request end.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndRules {
    /// Stop strings count only after this many tokens.
    pub(super) min_tokens: usize,
    pub(super) include_stop: bool,
}

impl Answer {
    pub(super) fn new(detokenizer: Detokenizer, matcher: StopMatcher) -> Self {
        Self { detokenizer, matcher, num_tokens: 0, sum_logprobs: 0.0 }
    }

    /// Takes the next token, and the engine's word on whether it is the last.
    pub(super) fn push(&mut self, token: TokenId, finish: Option<FinishReason>, rules: EndRules) -> Progress {
        self.num_tokens += 1;
        let ended_by_token = matches!(finish, Some(FinishReason::EndOfSequence | FinishReason::StopToken(_)));
        let shows_token = !ended_by_token || rules.include_stop;
        let mut text = String::new();
        let mut stopped = None;
        if shows_token {
            let piece = self.detokenizer.push(token);
            stopped = self.scan(&piece, &mut text, rules);
        }
        if finish.is_some() && stopped.is_none() {
            let rest = self.detokenizer.finish();
            stopped = self.scan(&rest, &mut text, rules);
            if stopped.is_none() {
                text.push_str(&self.matcher.finish());
            }
        }
        let end = match (stopped, finish) {
            (Some(found), _) => Some((FinishReason::StopString, Some(StopReason::Text(found)))),
            (None, Some(FinishReason::StopToken(token))) => {
                Some((FinishReason::StopToken(token), Some(StopReason::Token(token))))
            }
            (None, finish) => finish.map(|reason| (reason, None)),
        };
        Progress { text, shows_token, end }
    }

    /// Appends what is final of `piece` to `text`; the stop string found, if any. The first `min_tokens` tokens are not
    /// searched.
    fn scan(&mut self, piece: &str, text: &mut String, rules: EndRules) -> Option<String> {
        if self.num_tokens <= rules.min_tokens {
            text.push_str(piece);
            return None;
        }
        let scan = self.matcher.push(piece);
        text.push_str(&scan.text);
        scan.stopped
    }

    /// What `best_of` compares.
    pub(super) fn mean_logprob(&self) -> f64 {
        self.sum_logprobs / self.num_tokens.max(1) as f64
    }
}

/// A token for the reader.
pub(super) fn token_text(tokenizer: &Arc<Tokenizer>, id: TokenId, logprobs: Option<TokenLogprobs>) -> TokenText {
    let (text, bytes) = text_of(tokenizer, id);
    let (logprob, rank, top) = match logprobs {
        None => (None, None, Vec::new()),
        Some(TokenLogprobs { logprob, rank, top }) => {
            let top = top.into_iter().map(|(id, logprob)| {
                let (text, bytes) = text_of(tokenizer, id);
                TopToken { id, text, bytes, logprob }
            });
            (Some(logprob), Some(rank), top.collect())
        }
    };
    TokenText { id, text, bytes, logprob, rank, top }
}

fn text_of(tokenizer: &Arc<Tokenizer>, id: TokenId) -> (String, Vec<u8>) {
    let bytes = tokenizer.token_bytes(id).to_vec();
    (String::from_utf8_lossy(&bytes).into_owned(), bytes)
}
