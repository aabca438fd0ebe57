//! Rules that are tried at every place of a text: patterns as automata, and a check of what they matched (a check digit, a
//! parser).
//!
//! A rule is stepped byte by byte from a place until its automaton is dead or the text ends. Dead means that nothing
//! which comes later can make a match there; alive at the end means that it could, and the place is where text is held
//! back. Every rule's matches are bounded in length, so that bound times the text bounds the work; most places are
//! skipped by a table of first bytes.
//!
//! Of several matches at one place the longest that passes the check counts, whatever order a pattern lists them in.
//!
//! **Invariant**: what a rule finds at a place depends on the text from the character before it to the byte after the match.

use std::{cell::RefCell, fmt};

use regex_automata::{
    Anchored as AnchoredSearch, Input, MatchKind,
    dfa::{Automaton as _, dense},
    hybrid::dfa as lazy,
    nfa::thompson,
    util::start,
};
use regex_syntax::hir::Hir;

use super::scan::{End, Span, Window};

/// The most rules of one set: a bit each in the table of first bytes.
pub(super) const MAX_RULES: usize = 64;

/// The place where text is tried.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    pub(super) text: &'a str,
    pub(super) start: usize,
    pub(super) end: End,
}

/// What a rule says about a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing begins here, whatever comes.
    Nothing,
    /// Up to this byte.
    Match(usize),
    /// It depends on what comes.
    Unsettled,
}

/// How a rule finds its matches.
pub(super) enum Engine {
    /// Built ahead: small patterns of ASCII.
    Dense(Box<dense::DFA<Vec<u32>>>),
    /// Built as it goes, within a bound: patterns of a config.
    Lazy(Box<lazy::DFA>),
    /// A few lines of code, for matches too long for an automaton; and the bytes it can begin with.
    Code(fn(Place<'_>) -> Outcome, &'static [u8]),
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dense(_) => "Dense",
            Self::Lazy(_) => "Lazy",
            Self::Code(..) => "Code",
        })
    }
}

/// One thing to look for.
#[derive(Debug)]
pub(super) struct Rule {
    pub(super) label: &'static str,
    pub(super) engine: Engine,
    /// Whether a match may begin after this character.
    pub(super) may_follow: fn(Option<char>) -> bool,
    /// Whether a candidate is what it looks like.
    pub(super) is_valid: fn(&str) -> bool,
}

/// Scratch memory of the lazy automata, one for every rule. Belongs to one text.
#[derive(Debug, Default)]
pub(super) struct Caches(Vec<Option<RefCell<lazy::Cache>>>);

/// Rules and the table of the bytes that they can begin with.
#[derive(Debug)]
pub(super) struct RuleSet {
    rules: Vec<Rule>,
    first_bytes: Box<[u64; 256]>,
}

impl RuleSet {
    /// At most [`MAX_RULES`]; the caller has checked.
    pub(super) fn new(rules: Vec<Rule>) -> Self {
        assert!(rules.len() <= MAX_RULES, "{} rules in one set", rules.len());
        let mut first_bytes = Box::new([0; 256]);
        for (index, rule) in rules.iter().enumerate() {
            for byte in 0..=u8::MAX {
                if rule.engine.can_begin_with(byte) {
                    first_bytes[usize::from(byte)] |= 1 << index;
                }
            }
        }
        Self { rules, first_bytes }
    }

    pub(super) fn caches(&self) -> Caches {
        let cache = |rule: &Rule| match &rule.engine {
            Engine::Lazy(dfa) => Some(RefCell::new(dfa.create_cache())),
            Engine::Dense(_) | Engine::Code(..) => None,
        };
        Caches(self.rules.iter().map(cache).collect())
    }

    /// Reports what begins in `window.text[from..]` and is settled; returns up to where.
    pub(super) fn scan(&self, caches: &Caches, from: usize, window: Window<'_>, found: &mut Vec<Span>) -> usize {
        let text = window.text;
        let bytes = text.as_bytes();
        let mut start = from;
        while start < bytes.len() {
            let mut wanted = self.first_bytes[usize::from(bytes[start])];
            if wanted != 0 && text.is_char_boundary(start) {
                let previous = text[..start].chars().next_back();
                let num_found = found.len();
                while wanted != 0 {
                    let index = wanted.trailing_zeros() as usize;
                    wanted &= wanted - 1;
                    let rule = &self.rules[index];
                    if !(rule.may_follow)(previous) {
                        continue;
                    }
                    match rule.try_at(caches.0[index].as_ref(), Place { text, start, end: window.end }) {
                        Outcome::Nothing => {}
                        Outcome::Match(end) => found.push(Span { start, end, label: rule.label }),
                        Outcome::Unsettled => {
                            // The whole place is tried again.
                            found.truncate(num_found);
                            return start;
                        }
                    }
                }
            }
            start += 1;
        }
        start
    }
}

impl Rule {
    fn try_at(&self, cache: Option<&RefCell<lazy::Cache>>, place: Place<'_>) -> Outcome {
        let mut ends = Vec::new();
        let is_settled = match (&self.engine, cache) {
            (Engine::Code(code, _), _) => return code(place),
            (Engine::Dense(dfa), _) => run_dense(dfa, place, &mut ends),
            (Engine::Lazy(dfa), Some(cache)) => run_lazy(dfa, &mut cache.borrow_mut(), place, &mut ends),
            (Engine::Lazy(dfa), None) => run_lazy(dfa, &mut dfa.create_cache(), place, &mut ends),
        };
        if !is_settled {
            return Outcome::Unsettled;
        }
        ends.into_iter()
            .rev()
            .find(|&end| {
                end > place.start && place.text.is_char_boundary(end) && (self.is_valid)(&place.text[place.start..end])
            })
            .map_or(Outcome::Nothing, Outcome::Match)
    }
}

/// Whether the automaton has come to an end that no further text changes.
fn run_dense(dfa: &dense::DFA<Vec<u32>>, place: Place<'_>, ends: &mut Vec<usize>) -> bool {
    let input = Input::new(place.text).range(place.start..).anchored(AnchoredSearch::Yes);
    let Ok(mut state) = dfa.start_state_forward(&input) else { return true };
    for (offset, byte) in place.text.as_bytes()[place.start..].iter().enumerate() {
        state = dfa.next_state(state, *byte);
        if dfa.is_special_state(state) {
            if dfa.is_match_state(state) {
                ends.push(place.start + offset);
            } else if dfa.is_dead_state(state) || dfa.is_quit_state(state) {
                return true;
            }
        }
    }
    if place.end == End::Open {
        return false;
    }
    if dfa.is_match_state(dfa.next_eoi_state(state)) {
        ends.push(place.text.len());
    }
    true
}

fn run_lazy(dfa: &lazy::DFA, cache: &mut lazy::Cache, place: Place<'_>, ends: &mut Vec<usize>) -> bool {
    let input = Input::new(place.text).range(place.start..).anchored(AnchoredSearch::Yes);
    // An error is a full cache that may not be cleared, or a byte to quit at; neither is configured (`compile_lazy`).
    let Ok(mut state) = dfa.start_state_forward(cache, &input) else { return true };
    for (offset, byte) in place.text.as_bytes()[place.start..].iter().enumerate() {
        let Ok(next) = dfa.next_state(cache, state, *byte) else { return true };
        state = next;
        if state.is_match() {
            ends.push(place.start + offset);
        } else if state.is_dead() || state.is_quit() {
            return true;
        }
    }
    if place.end == End::Open {
        return false;
    }
    if dfa.next_eoi_state(cache, state).is_ok_and(|state| state.is_match()) {
        ends.push(place.text.len());
    }
    true
}

/// What a place can stand behind, as far as an automaton asks.
const BEHIND: [Option<u8>; 4] = [None, Some(b'a'), Some(b' '), Some(b'\n')];

impl Engine {
    fn can_begin_with(&self, byte: u8) -> bool {
        let behind = |behind| start::Config::new().look_behind(behind).anchored(AnchoredSearch::Yes);
        match self {
            Self::Code(_, bytes) => bytes.contains(&byte),
            Self::Dense(dfa) => BEHIND.into_iter().any(|before| {
                dfa.start_state(&behind(before)).is_ok_and(|state| !dfa.is_dead_state(dfa.next_state(state, byte)))
            }),
            Self::Lazy(dfa) => {
                let mut cache = dfa.create_cache();
                BEHIND.into_iter().any(|before| {
                    let Ok(state) = dfa.start_state(&mut cache, &behind(before)) else { return true };
                    dfa.next_state(&mut cache, state, byte).map_or(true, |next| !next.is_dead())
                })
            }
        }
    }
}

/// A built-in pattern of ASCII.
pub(super) fn compile_dense(pattern: &str) -> Engine {
    let dfa = dense::Builder::new()
        .syntax(regex_automata::util::syntax::Config::new().unicode(false).utf8(false))
        .configure(
            dense::Config::new()
                .match_kind(MatchKind::All)
                .start_kind(regex_automata::dfa::StartKind::Anchored)
                .accelerate(false),
        )
        .build(pattern)
        .unwrap_or_else(|error| panic!("the built-in pattern {pattern}: {error}"));
    Engine::Dense(Box::new(dfa))
}

/// A pattern of a config, whose matches are bounded. Memory: the automaton within `max_bytes`, and as much for states.
pub(super) fn compile_lazy(hir: &Hir, max_bytes: usize) -> Result<Engine, String> {
    let nfa = thompson::Compiler::new()
        .configure(
            thompson::Config::new().nfa_size_limit(Some(max_bytes)).which_captures(thompson::WhichCaptures::None),
        )
        .build_from_hir(hir)
        .map_err(|error| error.to_string())?;
    let config = lazy::Config::new()
        .match_kind(MatchKind::All)
        .cache_capacity(max_bytes)
        .skip_cache_capacity_check(true)
        .minimum_cache_clear_count(None);
    let dfa = lazy::Builder::new().configure(config).build_from_nfa(nfa).map_err(|error| error.to_string())?;
    Ok(Engine::Lazy(Box::new(dfa)))
}
