//! Text on both sides of the engine: what goes in (chat template, tokenizer) and what comes out (detokenizer, stop strings).
//!
//! It must not know HTTP, the scheduler's plans or tensors. Model files are untrusted here: a broken vocabulary or
//! template is an error with a name, never a panic, an endless loop or an unbounded allocation.
//!
//! Reading order: [`tokenizer`], [`gguf_vocabulary`] and [`pre_tokenizer`] for GGUF files, `decoder` token bytes to text,
//! [`detokenize`] the same one token at a time, [`stop`] stop strings, [`chat`] templates, `template` their Python-like parts.

pub mod chat;
mod decoder;
pub mod detokenize;
pub mod gguf_vocabulary;
pub mod pre_tokenizer;
pub mod stop;
mod template;
mod token_table;
pub mod tokenizer;
