//! Answers of a given form: JSON by a schema, a regular expression, one of some choices, a Lark grammar.
//!
//! llguidance says which tokens may come next; the sampler forbids the others ([`TokenMask`]). Two things are kept off
//! the model thread: a grammar is compiled where its request is checked, and the mask of a sample's next token is
//! computed by a [`worker`]. A sample whose mask is not there when a step is planned sits it out, so a slow grammar costs
//! its own requests and no others. What one mask may cost is bounded by [`LIMITS`].
//!
//! It must not know requests, the scheduler or logits. Its invariant: a [`GrammarState`] has been told every token of
//! its sample, in order, and its mask is never empty.

mod worker;

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use bindery_scheduler::TokenId;
use llguidance::{
    Matcher, ParserFactory,
    api::{GrammarWithLexer, ParserLimits, TopLevelGrammar},
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};
use serde_json::{Value, json};

pub(crate) use self::worker::GrammarState;
use self::worker::Workers;
pub use self::worker::{MAX_WORKERS, Wake};
use crate::{EngineError, Tokenizer, sample::TokenMask};

/// Longest source of a grammar, in bytes. Published JSON schemas of whole products stay below.
pub const MAX_GRAMMAR_BYTES: usize = 256 << 10;
/// Entries of a choice.
pub const MAX_CHOICES: usize = 4096;
/// Digits of a `multipleOf`, as a whole number: its automaton has a state for every remainder. A number of six digits
/// took ten seconds and hundreds of megabytes.
const MAX_MULTIPLE: f64 = 10_000.0;
/// Longest run of white space between two tokens of JSON. Unbounded, a small model can be caught in it until
/// `max_tokens`; this is a line break and an indentation of many levels.
const JSON_WHITESPACE: &str = "[ \\t\\r\\n]{1,64}";
/// Compiled grammars kept for the next request that brings the same one, and how long their sources may be.
const NUM_CACHED: usize = 16;
const MAX_CACHED_BYTES: usize = 32 << 10;
/// Tighter than llguidance's own, so that a hostile grammar keeps a worker busy for some milliseconds a mask, not for
/// hundreds. The work on an ambiguous grammar grows with the square of the items in a row.
const LIMITS: ParserLimits = ParserLimits {
    max_items_in_row: 1000,
    initial_lexer_fuel: 1_000_000,
    step_lexer_fuel: 50_000,
    step_max_items: 20_000,
    max_lexer_states: 20_000,
    max_grammar_size: 200_000,
    precompute_large_lexemes: true,
    verbose_errors: false,
};

/// The form an answer must have.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// JSON that a schema accepts, in the parts of JSON Schema that llguidance knows; others are refused by name.
    JsonSchema {
        /// The schema.
        schema: Value,
        /// White space between tokens, at most [`JSON_WHITESPACE`]; false: none at all.
        any_whitespace: bool,
    },
    /// The whole answer matches, in the syntax of Rust's regex crate (no look-around, no back references).
    Regex(String),
    /// One of these.
    Choice(Vec<String>),
    /// In llguidance's variant of Lark's syntax, starting at `start`.
    Lark(String),
}

impl Grammar {
    /// Any JSON object.
    pub fn json_object() -> Self {
        Self::JsonSchema { schema: json!({"type": "object"}), any_whitespace: true }
    }

    fn num_bytes(&self) -> usize {
        match self {
            Self::JsonSchema { schema, .. } => schema.to_string().len(),
            Self::Regex(source) | Self::Lark(source) => source.len(),
            Self::Choice(choices) => choices.iter().map(String::len).sum(),
        }
    }

    fn to_llguidance(&self) -> Result<TopLevelGrammar, String> {
        Ok(match self {
            Self::JsonSchema { schema, any_whitespace } => {
                let mut schema = match schema {
                    Value::Object(_) => schema.clone(),
                    Value::Bool(true) => json!({}),
                    other => return Err(format!("a JSON schema is an object, not {}", kind_of(other))),
                };
                check_multiples(&schema)?;
                // The caller's own word on white space, in llguidance's extension of JSON Schema, comes first.
                let options = schema.as_object_mut().expect("made an object above").entry("x-guidance");
                options.or_insert_with(|| match any_whitespace {
                    true => json!({"whitespace_pattern": JSON_WHITESPACE}),
                    false => json!({"whitespace_flexible": false}),
                });
                TopLevelGrammar::from_json_schema(schema)
            }
            // \d, \w and \s are ASCII, as in the engines that other servers use: a model left the choice writes digits of
            // any script. (Python's and JSON Schema's users say so with a class of their own.)
            Self::Regex(source) => {
                TopLevelGrammar::from_lark(format!("start: /{}/", llguidance::regex_to_lark(source, "dws")))
            }
            Self::Choice(choices) => {
                if choices.is_empty() || choices.len() > MAX_CHOICES {
                    return Err(format!("it has {} choices, allowed are 1 to {MAX_CHOICES}", choices.len()));
                }
                if choices.iter().any(String::is_empty) {
                    return Err("it has an empty choice, each must have at least one character".to_owned());
                }
                let choices: Vec<String> = choices.iter().map(|choice| lark_string(choice)).collect();
                // A name in capitals is one lexeme: an automaton, whatever the number of choices, not a parser's rule each.
                TopLevelGrammar::from_lark(format!("start: CHOICE\nCHOICE: {}", choices.join(" | ")))
            }
            Self::Lark(source) if source.contains("multipleOf") => {
                return Err("multipleOf is only for JSON schemas, not inside a Lark grammar".to_owned());
            }
            Self::Lark(source) => TopLevelGrammar::from_grammar(GrammarWithLexer::from_lark(source.clone())),
        })
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Bounds every `multipleOf` in a schema.
fn check_multiples(schema: &Value) -> Result<(), String> {
    match schema {
        Value::Object(fields) => {
            if let Some(multiple) = fields.get("multipleOf").and_then(Value::as_f64) {
                // 0.25 has the remainders of 25.
                let digits = multiple.abs().to_string().replace('.', "");
                if digits.contains('e') || digits.parse::<f64>().is_ok_and(|digits| digits > MAX_MULTIPLE) {
                    return Err(format!(
                        "multipleOf is {multiple}, the digits of which must not exceed {MAX_MULTIPLE} as a whole number: \
                         check such multiples afterwards"
                    ));
                }
            }
            fields.values().try_for_each(check_multiples)
        }
        Value::Array(values) => values.iter().try_for_each(check_multiples),
        _ => Ok(()),
    }
}

/// A text as a literal of Lark's: JSON's escapes, which it shares; but DEL, which JSON need not escape, it must.
fn lark_string(text: &str) -> String {
    Value::String(text.to_owned()).to_string().replace('\u{7f}', "\\u007f")
}

/// Compiles grammars for one tokenizer.
pub struct GrammarCompiler {
    tokenizer: Arc<Tokenizer>,
    wake: Wake,
    /// Made with the first grammar: the tables take a moment that a server without grammars need not spend.
    tables: OnceLock<Result<Tables, String>>,
    cached: Mutex<VecDeque<(Grammar, Compiled)>>,
}

impl std::fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrammarCompiler").field("cached", &self.cached).finish_non_exhaustive()
    }
}

struct Tables {
    factory: ParserFactory,
    workers: Arc<Workers>,
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tables").finish_non_exhaustive()
    }
}

/// A grammar at its beginning, ready for the samples of one request.
#[derive(Clone)]
pub struct CompiledGrammar {
    /// The wire field it came in, for errors.
    pub(crate) param: &'static str,
    compiled: Arc<Compiled>,
    workers: Arc<Workers>,
}

struct Compiled {
    matcher: Matcher,
    first_mask: TokenMask,
}

impl std::fmt::Debug for Compiled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiled").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for CompiledGrammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CompiledGrammar").finish_non_exhaustive()
    }
}

impl CompiledGrammar {
    /// For one sample. The samples of a request share what the grammar's lexer learns.
    pub(crate) fn state(&self) -> GrammarState {
        GrammarState::new(self.compiled.matcher.clone(), self.compiled.first_mask.clone(), &self.workers)
    }
}

impl GrammarCompiler {
    /// For texts of this tokenizer; `wake` is called when a mask is ready that a sample may wait for.
    pub fn new(tokenizer: Arc<Tokenizer>, wake: Wake) -> Self {
        Self { tokenizer, wake, tables: OnceLock::new(), cached: Mutex::default() }
    }

    /// Takes milliseconds (the first one of a process some hundred), so call it off the async threads. `param` is the
    /// wire field to name in an error.
    pub fn compile(&self, grammar: &Grammar, param: &'static str) -> Result<CompiledGrammar, EngineError> {
        let invalid = |message: String| EngineError::Invalid { param, message };
        let num_bytes = grammar.num_bytes();
        if num_bytes > MAX_GRAMMAR_BYTES {
            return Err(invalid(format!("{param} has {num_bytes} bytes, the limit is {MAX_GRAMMAR_BYTES}")));
        }
        let tables = self.tables.get_or_init(|| Tables::new(&self.tokenizer, &self.wake)).as_ref();
        let tables = tables.map_err(|reason| invalid(format!("{param} cannot be used with this model: {reason}")))?;
        let compiled = if let Some(compiled) = self.cached(grammar) {
            compiled
        } else {
            let compiled = compile(tables, grammar)
                .map_err(|reason| invalid(format!("{param} cannot be used as a grammar: {}", explain(&reason))))?;
            if num_bytes <= MAX_CACHED_BYTES {
                self.keep(grammar, &compiled);
            }
            compiled
        };
        Ok(CompiledGrammar { param, compiled: Arc::new(compiled), workers: Arc::clone(&tables.workers) })
    }

    /// A copy that shares nothing with other requests, so that what one of them does to its automaton (it grows with
    /// use, up to its limits) is its own affair.
    fn cached(&self, grammar: &Grammar) -> Option<Compiled> {
        let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        let index = cached.iter().position(|(known, _)| known == grammar)?;
        let entry = cached.remove(index)?;
        let copy = entry.1.copy();
        cached.push_back(entry);
        Some(copy)
    }

    fn keep(&self, grammar: &Grammar, compiled: &Compiled) {
        let entry = (grammar.clone(), compiled.copy());
        let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        if cached.len() >= NUM_CACHED {
            cached.pop_front();
        }
        cached.push_back(entry);
    }
}

impl Compiled {
    fn copy(&self) -> Self {
        Self { matcher: self.matcher.deep_clone(), first_mask: self.first_mask.clone() }
    }
}

impl Tables {
    fn new(tokenizer: &Tokenizer, wake: &Wake) -> Result<Self, String> {
        let environment = token_environment(tokenizer)?;
        let mut factory = ParserFactory::new(
            &environment,
            InferenceCapabilities::default(),
            &llguidance::earley::SlicedBiasComputer::general_slices(),
        )
        .map_err(|error| error.to_string())?;
        factory.quiet();
        *factory.limits_mut() = LIMITS;
        let workers = Workers::start(wake).map_err(|error| format!("the grammar threads did not start: {error}"))?;
        Ok(Self { factory, workers })
    }
}

/// The vocabulary as llguidance reads it: bytes of every token, special ones marked so that no text matches them.
fn token_environment(tokenizer: &Tokenizer) -> Result<TokEnv, String> {
    let ends: Vec<u32> = tokenizer.eos_token_ids().iter().map(|token| token.0).collect();
    let Some(&first_end) = ends.first() else {
        return Err("it names no end token, so an answer could not end where its grammar does".to_owned());
    };
    if !tokenizer.spells_bytes() {
        return Err("its tokenizer does not say which text a single token stands for".to_owned());
    }
    let words: Vec<Vec<u8>> = (0..tokenizer.vocab_size() as u32)
        .map(|id| {
            let token = TokenId(id);
            let bytes = tokenizer.token_bytes(token);
            let is_special = tokenizer.is_special(token) || ends.contains(&id);
            let marker = is_special.then_some(TokTrie::SPECIAL_TOKEN_MARKER);
            marker.into_iter().chain(bytes.iter().copied()).collect()
        })
        .collect();
    let info = TokRxInfo::new(words.len() as u32, first_end);
    let trie = TokTrie::from(&info, &words).with_eos_tokens(&ends);
    Ok(Arc::new(ApproximateTokEnv::new(trie)))
}

fn compile(tables: &Tables, grammar: &Grammar) -> Result<Compiled, String> {
    let parser = grammar.to_llguidance().map(|grammar| tables.factory.create_parser(grammar))?;
    let mut matcher = Matcher::new(parser);
    let first_mask = matcher.compute_mask().map_err(|error| error.to_string())?;
    Ok(Compiled { matcher, first_mask: TokenMask::from_words(first_mask.into()) })
}

/// An error of llguidance's in words for whoever sent the grammar, without the listing that may follow it.
fn explain(reason: &str) -> String {
    const MAX_CHARS: usize = 400;
    if reason.contains("NoExtensionBias") {
        return "no text matches it".to_owned();
    }
    if reason.contains("items; max is") {
        return "too many of its alternatives are open at once (such as optional properties of one object)".to_owned();
    }
    let reason = reason.split("\n<").next().unwrap_or(reason).trim();
    let mut shown: String = reason.chars().take(MAX_CHARS).collect();
    if shown.len() < reason.len() {
        shown.push('…');
    }
    shown.split_whitespace().collect::<Vec<_>>().join(" ")
}
