//! The engine's tokens in the three shapes log-probabilities have on the wire.

use std::collections::BTreeMap;

use bindery_engine::{TokenId, TokenText, local_model::TopToken};
use bindery_protocol::openai::{
    ChatLogprobs, ChatTokenLogprob, ChatTopLogprob, CompletionLogprobs, PromptLogprob, PromptLogprobs,
};

/// JSON has no infinity: a token that cannot be gets this (vLLM's number).
const LEAST_LOGPROB: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { LEAST_LOGPROB } else { logprob.clamp(LEAST_LOGPROB, 0.0) }
}

/// How a token is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenStyle {
    /// Its text.
    Text,
    /// `token_id:N`, which is exact where several tokens have one text.
    Id,
}

impl TokenStyle {
    pub(crate) fn new(tokens_as_ids: bool) -> Self {
        if tokens_as_ids { Self::Id } else { Self::Text }
    }

    fn write(self, id: TokenId, text: &str) -> String {
        match self {
            Self::Text => text.to_owned(),
            Self::Id => format!("token_id:{}", id.0),
        }
    }

    /// Completions have no `bytes` beside a token: half a character is written as OpenAI's older API does,
    /// `bytes:\xe2\x82`, so that different tokens stay different.
    fn write_exact(self, id: TokenId, bytes: &[u8]) -> String {
        match (self, std::str::from_utf8(bytes)) {
            (Self::Id, _) => self.write(id, ""),
            (Self::Text, Ok(text)) => text.to_owned(),
            (Self::Text, Err(_)) => bytes.iter().fold("bytes:".to_owned(), |mut out, byte| {
                use std::fmt::Write;
                // Writing to a string cannot fail.
                let _ = write!(out, "\\x{byte:02x}");
                out
            }),
        }
    }
}

/// `logprobs` of a piece of a chat answer.
pub(crate) fn chat_logprobs(tokens: &[TokenText], style: TokenStyle) -> ChatLogprobs {
    ChatLogprobs { content: Some(tokens.iter().map(|token| chat_token(token, style)).collect()) }
}

fn chat_token(token: &TokenText, style: TokenStyle) -> ChatTokenLogprob {
    let top = |top: &TopToken| ChatTopLogprob {
        token: style.write(top.id, &top.text),
        logprob: finite(top.logprob),
        bytes: Some(top.bytes.clone()),
    };
    ChatTokenLogprob {
        token: style.write(token.id, &token.text),
        logprob: finite(token.logprob.unwrap_or(LEAST_LOGPROB)),
        bytes: Some(token.bytes.clone()),
        top_logprobs: token.top.iter().map(top).collect(),
    }
}

/// Writes a completion choice's `logprobs`, piece by piece: offsets go on from the last piece.
#[derive(Clone, Debug)]
pub(crate) struct CompletionLogprobsWriter {
    style: TokenStyle,
    /// How many most likely tokens were asked for.
    num_top: usize,
    /// Characters begun so far.
    num_chars: usize,
}

impl CompletionLogprobsWriter {
    pub(crate) fn new(style: TokenStyle, num_top: u32) -> Self {
        Self { style, num_top: num_top as usize, num_chars: 0 }
    }

    /// Appends tokens.
    pub(crate) fn append(&mut self, out: &mut CompletionLogprobs, tokens: &[TokenText]) {
        for token in tokens {
            let begins_inside = token.bytes.first().copied().is_some_and(is_continuation);
            out.text_offset.push(self.num_chars.saturating_sub(usize::from(begins_inside)));
            self.num_chars += token.bytes.iter().filter(|&&byte| !is_continuation(byte)).count();
            out.tokens.push(self.style.write_exact(token.id, &token.bytes));
            out.token_logprobs.push(token.logprob.map(finite));
            out.top_logprobs.push(token.logprob.map(|logprob| self.top_logprobs(token, logprob)));
        }
    }

    /// The most likely tokens, and the token itself where it is none of them, as OpenAI and vLLM do.
    fn top_logprobs(&self, token: &TokenText, logprob: f32) -> BTreeMap<String, f32> {
        let mut top = BTreeMap::new();
        if self.num_top > 0 {
            for candidate in token.top.iter().take(self.num_top) {
                // Two tokens may be written alike: the likelier one, which comes first, stays.
                top.entry(self.style.write_exact(candidate.id, &candidate.bytes)).or_insert(finite(candidate.logprob));
            }
            top.entry(self.style.write_exact(token.id, &token.bytes)).or_insert(finite(logprob));
        }
        top
    }
}

/// In UTF-8, a byte that begins no character.
fn is_continuation(byte: u8) -> bool {
    byte & 0b1100_0000 == 0b1000_0000
}

/// vLLM's `prompt_logprobs`.
pub(crate) fn prompt_logprobs(tokens: &[TokenText]) -> PromptLogprobs {
    let places = tokens
        .iter()
        .map(|token| {
            let logprob = token.logprob?;
            let mut candidates: BTreeMap<String, PromptLogprob> = BTreeMap::new();
            for (at, top) in token.top.iter().enumerate() {
                let candidate = PromptLogprob {
                    logprob: finite(top.logprob),
                    rank: u32::try_from(at + 1).ok(),
                    decoded_token: Some(top.text.clone()),
                };
                candidates.insert(top.id.0.to_string(), candidate);
            }
            candidates.entry(token.id.0.to_string()).or_insert_with(|| PromptLogprob {
                logprob: finite(logprob),
                rank: token.rank,
                decoded_token: Some(token.text.clone()),
            });
            Some(candidates)
        })
        .collect();
    PromptLogprobs(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32, bytes: &[u8], logprob: Option<f32>) -> TokenText {
        TokenText {
            id: TokenId(id),
            text: String::from_utf8_lossy(bytes).into_owned(),
            bytes: bytes.to_vec(),
            logprob,
            rank: logprob.map(|_| 3),
            top: logprob
                .map(|_| TopToken { id: TokenId(9), text: "x".into(), bytes: b"x".to_vec(), logprob: -0.5 })
                .into_iter()
                .collect(),
        }
    }

    #[test]
    fn offsets_count_characters_across_tokens_that_split_one() {
        let mut writer = CompletionLogprobsWriter::new(TokenStyle::Text, 0);
        let mut out = CompletionLogprobs::default();
        // "aé" in two tokens, the second character split between them; then "€b" with the euro sign split.
        writer.append(&mut out, &[token(1, b"a\xc3", None), token(2, b"\xa9", Some(-1.0))]);
        writer.append(&mut out, &[token(3, b"\xe2\x82", Some(-1.0)), token(4, b"\xacb", Some(f32::NEG_INFINITY))]);
        assert_eq!(out.text_offset, [0, 1, 2, 2]);
        assert_eq!(out.tokens, ["bytes:\\x61\\xc3", "bytes:\\xa9", "bytes:\\xe2\\x82", "bytes:\\xac\\x62"]);
        assert_eq!(out.token_logprobs, [None, Some(-1.0), Some(-1.0), Some(-9999.0)]);
        assert_eq!(out.top_logprobs, [None, Some(BTreeMap::new()), Some(BTreeMap::new()), Some(BTreeMap::new())]);
    }

    #[test]
    fn the_chosen_token_is_among_the_most_likely_ones() {
        let mut out = CompletionLogprobs::default();
        CompletionLogprobsWriter::new(TokenStyle::Text, 1).append(&mut out, &[token(1, b"a", Some(-2.0))]);
        let top = out.top_logprobs[0].as_ref().unwrap();
        assert_eq!(
            top.iter().map(|(text, logprob)| (text.as_str(), *logprob)).collect::<Vec<_>>(),
            [("a", -2.0), ("x", -0.5)]
        );
    }

    #[test]
    fn tokens_can_be_written_as_ids() {
        let tokens = [token(7, b"\xe2", Some(-2.0))];
        let mut out = CompletionLogprobs::default();
        CompletionLogprobsWriter::new(TokenStyle::Id, 0).append(&mut out, &tokens);
        assert_eq!(out.tokens, ["token_id:7"]);
        let chat = chat_logprobs(&tokens, TokenStyle::Id).content.unwrap();
        assert_eq!((chat[0].token.as_str(), chat[0].top_logprobs[0].token.as_str()), ("token_id:7", "token_id:9"));
    }

    #[test]
    fn prompt_logprobs_hold_the_candidates_and_the_token_with_ranks() {
        let PromptLogprobs(lists) = prompt_logprobs(&[token(1, b"a", None), token(2, b"b", Some(-2.0))]);
        assert_eq!(lists[0], None);
        let second = lists[1].as_ref().unwrap();
        assert_eq!(second["9"].rank, Some(1));
        assert_eq!((second["2"].rank, second["2"].logprob), (Some(3), -2.0));
    }
}
