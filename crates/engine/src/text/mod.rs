//! Text on both sides of the engine: what goes in (chat template, tokenizer) and what comes out (detokenizer, stop strings).
//!
//! It must not know HTTP, the scheduler's plans or tensors. Model files are untrusted here: a broken vocabulary or
//! template is an error with a name, never a panic, an endless loop or an unbounded allocation.
//!
//! Reading order: [`tokenizer`]; [`gguf_vocabulary`], [`pre_tokenizer`] and `sentence_piece` for GGUF files, `original` for
//! folders without tokenizer.json; `shrink` what a normaliser leaves of a text; `decoder` token bytes to text,
//! [`detokenize`] the same one token at a time, [`stop`] stop strings, [`chat`] templates, `template` their Python-like parts,
//! `template_guard` what they pay for lists, `export` all of it as files.

pub mod chat;
mod decoder;
pub mod detokenize;
pub(crate) mod export;
pub mod gguf_vocabulary;
mod original;
pub mod pre_tokenizer;
mod sentence_piece;
mod sentence_piece_file;
mod shrink;
pub mod stop;
mod template;
mod template_guard;
mod token_table;
pub mod tokenizer;
