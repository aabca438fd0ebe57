//! Phrases that must not pass, found by one Aho-Corasick automaton over folded text ([`super::normalise`]).
//!
//! The automaton's state after the last byte is the longest begin of a phrase that the text ends in. That is what has to be
//! held back, no more: the place where that begin starts. Its length is known because every state is reached by some begin
//! of some phrase; a table made from the phrases holds it.
//!
//! Held back at most: the longest phrase, with up to [`super::normalise::MAX_SKIPPED`] invisible characters and as many blanks between two
//! letters. **Invariant**: work is one step a folded byte and view, and a rescan of what was held back.

use std::collections::HashMap;

use aho_corasick::{
    Anchored, MatchKind,
    automaton::{Automaton as _, StateID},
    nfa::contiguous::NFA,
};
use serde::Deserialize;

use super::{
    GuardrailError,
    normalise::{BOUNDARY, Before, Folded, View, fold, fold_whole},
    scan::{End, Span, Window},
};

/// The longest phrase, folded.
const MAX_PHRASE_BYTES: usize = 256;
/// The most phrases of one list.
const MAX_PHRASES: usize = 200_000;

/// Where in a word a phrase may stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WordMatch {
    /// As whole words only.
    #[default]
    Words,
    /// Inside words, too.
    Anywhere,
}

/// A compiled list.
#[derive(Debug)]
pub(super) struct Blocklist {
    automaton: NFA,
    depths: HashMap<StateID, usize>,
    start: StateID,
    label: &'static str,
}

/// Where a text's scan stands, for both views.
#[derive(Clone, Debug, Default)]
pub(super) struct BlocklistCursor {
    meant: (usize, Before),
    looks: (usize, Before),
}

impl BlocklistCursor {
    /// The text before `num_bytes` has left the window.
    pub(super) fn shift(&mut self, num_bytes: usize) {
        self.meant.0 -= num_bytes;
        self.looks.0 -= num_bytes;
    }
}

impl Blocklist {
    pub(super) fn new<'a>(
        guardrail: &str,
        phrases: impl IntoIterator<Item = &'a str>,
        word_match: WordMatch,
        label: &'static str,
    ) -> Result<Self, GuardrailError> {
        let bad = |why: String| GuardrailError::Config { guardrail: guardrail.to_owned(), why };
        let mut folded = Vec::new();
        for (index, phrase) in phrases.into_iter().enumerate() {
            if index >= MAX_PHRASES {
                return Err(bad(format!("it has more than {MAX_PHRASES} phrases; split the list over two guardrails")));
            }
            for form in forms(phrase, word_match) {
                match form.iter().filter(|byte| **byte != BOUNDARY).count() {
                    0 => return Err(bad(format!("phrase {} has no visible letter; remove it", index + 1))),
                    1..=MAX_PHRASE_BYTES => folded.push(form),
                    length => {
                        return Err(bad(format!(
                            "phrase {} is {length} bytes long and the limit is {MAX_PHRASE_BYTES}; use its rarest part",
                            index + 1
                        )));
                    }
                }
            }
        }
        if folded.is_empty() {
            return Err(bad("it has no phrases; list some under `phrases`, or a `file` with one a line".to_owned()));
        }
        folded.sort_unstable();
        folded.dedup();
        let automaton = NFA::builder()
            .match_kind(MatchKind::Standard)
            .build(&folded)
            .map_err(|error| bad(format!("its phrases cannot be compiled: {error}; use fewer")))?;
        let start = automaton
            .start_state(Anchored::No)
            .map_err(|error| bad(format!("its phrases cannot be compiled: {error}")))?;
        let mut depths = HashMap::new();
        for phrase in &folded {
            let mut state = start;
            for (index, byte) in phrase.iter().enumerate() {
                state = automaton.next_state(Anchored::No, state, *byte);
                depths.insert(state, index + 1);
            }
        }
        Ok(Self { automaton, depths, start, label })
    }

    /// Reports what is settled and returns up to where.
    pub(super) fn scan(&self, cursor: &mut BlocklistCursor, window: Window<'_>, found: &mut Vec<Span>) -> usize {
        cursor.meant = self.scan_view(View::Meant, cursor.meant, window, found);
        cursor.looks = self.scan_view(View::Looks, cursor.looks, window, found);
        cursor.meant.0.min(cursor.looks.0)
    }

    fn scan_view(
        &self,
        view: View,
        from: (usize, Before),
        window: Window<'_>,
        found: &mut Vec<Span>,
    ) -> (usize, Before) {
        let mut folded = Folded::default();
        let after = fold(view, window.text, from, window.end, &mut folded);
        let units = &folded.units;
        let mut state = self.start;
        let mut seen = Vec::new();
        for (index, unit) in units.iter().enumerate() {
            state = self.automaton.next_state(Anchored::No, state, unit.byte);
            if self.automaton.is_special(state) && self.automaton.is_match(state) {
                // The first is the longest that ends here; the others lie within it.
                let length = self.automaton.pattern_len(self.automaton.match_pattern(state, 0));
                let first = index + 1 - length;
                let last = if unit.byte == BOUNDARY && length > 1 { index - 1 } else { index };
                seen.push(Span { start: units[first].start, end: units[last].end, label: self.label });
            }
        }
        seen.extend(folded.floods.iter().map(|&(start, end)| Span { start, end, label: "hidden-text" }));
        let depth = self.depths.get(&state).copied().unwrap_or(0);
        let resume = match units.get(units.len() - depth) {
            Some(unit) if window.end == End::Open => (unit.start, unit.before),
            _ => (window.text.len(), after),
        };
        // What begins at or after the place where the scan goes on is found again then.
        found.extend(seen.into_iter().filter(|span| span.start < resume.0));
        resume
    }
}

/// The folded forms of a phrase: as it is meant, and as it looks in small letters, in capitals and capitalised (look-alikes of
/// a letter and of its capital differ).
fn forms(phrase: &str, word_match: WordMatch) -> Vec<Vec<u8>> {
    let phrase = phrase.trim();
    let mut capitalised: String = phrase.chars().take(1).flat_map(char::to_uppercase).collect();
    capitalised.extend(phrase.chars().skip(1));
    let mut forms = vec![fold_whole(View::Meant, phrase)];
    for written in [phrase.to_lowercase(), phrase.to_uppercase(), capitalised] {
        forms.push(fold_whole(View::Looks, &written));
    }
    if word_match == WordMatch::Anywhere {
        for form in &mut forms {
            if form.first() == Some(&BOUNDARY) {
                form.remove(0);
            }
            if form.last() == Some(&BOUNDARY) {
                form.pop();
            }
        }
    }
    forms.sort_unstable();
    forms.dedup();
    forms
}
