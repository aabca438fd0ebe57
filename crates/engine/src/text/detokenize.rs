//! Text out of tokens while they arrive: never half a character, and together exactly the text of the whole sequence.
//!
//! It must not know stop strings (see [`super::stop`]) or requests. Each token costs its own bytes, whatever came before.
//! Invariant: for an empty prompt, all that `push` and `finish` return, joined, is `Tokenizer::decode` of the tokens;
//! after a prompt it is what they add to the prompt's text (so a word after a prompt keeps its leading space).

use std::sync::Arc;

use bindery_scheduler::TokenId;

pub use super::stop::{StopMatcher, StopScan};
use super::{decoder::ByteStream, tokenizer::Tokenizer};

/// Bytes of the prompt's end that can be the beginning of an unfinished character.
const MAX_CHARACTER_BYTES: usize = 4;
/// Tokens of the prompt's end that an opaque decoder gets to see before the first new one.
const NUM_CONTEXT_TOKENS: usize = 6;
/// Tokens an opaque decoder may hold back before their text is taken as it is. A character has at most four bytes.
const MAX_HELD_TOKENS: usize = 16;

/// Incremental detokenizer of one sequence: never splits a character.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special_tokens: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    Bytes {
        stream: ByteStream,
        /// A prompt's unfinished last character is the prompt's until a token follows it.
        has_tokens: bool,
    },
    Window(Window),
}

/// For decoders without a byte-exact rule: the tokens since a point where the text was complete, decoded with and
/// without the new ones; the difference is new text.
#[derive(Debug)]
struct Window {
    ids: Vec<u32>,
    /// `ids[..num_emitted]` have been returned as text and only give context.
    num_emitted: usize,
}

impl Detokenizer {
    /// The state after `prompt`, whose own text is not returned.
    pub fn new(tokenizer: Arc<Tokenizer>, prompt: &[TokenId], skip_special_tokens: bool) -> Self {
        let state = if let Some(stream) = ByteStream::new(tokenizer.decoder()) {
            let stream = after_prompt(stream, &tokenizer, prompt, skip_special_tokens);
            State::Bytes { stream, has_tokens: false }
        } else {
            let is_visible = |token: &&TokenId| tokenizer.text_piece(**token, skip_special_tokens).is_some();
            let tail = prompt.iter().rev().filter(is_visible).take(NUM_CONTEXT_TOKENS);
            let mut ids: Vec<u32> = tail.map(|token| token.0).collect();
            ids.reverse();
            State::Window(Window { num_emitted: ids.len(), ids })
        };
        Self { tokenizer, skip_special_tokens, state }
    }

    /// The text that became final with this token; may be empty.
    pub fn push(&mut self, token: TokenId) -> String {
        let mut text = String::new();
        let Some(piece) = self.tokenizer.text_piece(token, self.skip_special_tokens) else { return text };
        match &mut self.state {
            State::Bytes { stream, has_tokens } => {
                *has_tokens = true;
                stream.push(piece, &mut text);
            }
            State::Window(window) => {
                window.ids.push(token.0);
                text = window.emit(&self.tokenizer, false);
            }
        }
        text
    }

    /// What was held back, lossily, at the end.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        match &mut self.state {
            State::Bytes { stream, has_tokens: true } => stream.finish(&mut text),
            State::Bytes { .. } => {}
            State::Window(window) => text = window.emit(&self.tokenizer, true),
        }
        text
    }
}

/// Runs a stream over as much of the prompt's end as can matter: UTF-8 finds its way again within one character, and
/// any text before means that no leading space is dropped.
fn after_prompt(mut stream: ByteStream, tokenizer: &Tokenizer, prompt: &[TokenId], skip: bool) -> ByteStream {
    let piece = |token: &TokenId| tokenizer.text_piece(*token, skip);
    let mut num_bytes = 0;
    let mut tail: Vec<_> = (prompt.iter().rev().filter_map(piece))
        .take_while(|piece| {
            let is_needed = num_bytes < MAX_CHARACTER_BYTES;
            num_bytes += piece.bytes.len();
            is_needed
        })
        .collect();
    tail.reverse();
    let mut prompt_text = String::new();
    for piece in tail {
        stream.push(piece, &mut prompt_text);
    }
    if num_bytes > 0 {
        stream.continue_after_text();
    }
    stream
}

impl Window {
    fn emit(&mut self, tokenizer: &Tokenizer, is_last: bool) -> String {
        // Special tokens that are to be skipped never get in here, so nothing is skipped below.
        let decode = |ids: &[u32]| tokenizer.decode_opaque(ids, false).unwrap_or_default();
        let before = decode(&self.ids[..self.num_emitted]);
        let mut after = decode(&self.ids);
        let may_grow =
            after.ends_with(char::REPLACEMENT_CHARACTER) && self.ids.len() - self.num_emitted < MAX_HELD_TOKENS;
        if (may_grow && !is_last) || after.len() <= before.len() || !after.starts_with(&before) {
            if self.ids.len() > NUM_CONTEXT_TOKENS + 2 * MAX_HELD_TOKENS {
                // Tokens without text must not make the window grow for ever.
                self.ids.drain(..MAX_HELD_TOKENS);
                self.num_emitted = self.num_emitted.saturating_sub(MAX_HELD_TOKENS);
            }
            return String::new();
        }
        let text = after.split_off(before.len());
        let num_old = self.ids.len().saturating_sub(NUM_CONTEXT_TOKENS);
        self.ids.drain(..num_old);
        self.num_emitted = self.ids.len();
        text
    }
}
