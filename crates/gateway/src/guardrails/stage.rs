//! One guardrail on its way through one text.
//!
//! Text comes in pieces and leaves as soon as the detector has settled it. Spans that overlap or touch are one region, which is
//! replaced as a whole; a region longer than [`MAX_REGION_BYTES`] ends there and another begins.
//!
//! Held back at most: what the detector holds back, and an open region. **Invariant**: what was let go, and the order of the
//! placeholders, is the same however the text was cut.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use super::{
    Action, Finding, Form,
    anchored::{Caches, RuleSet},
    blocklist::{Blocklist, BlocklistCursor},
    language::{Languages, SAMPLE_CHARS},
    normalise::{MAX_SKIPPED, is_invisible},
    plain::Plain,
    policy::Guardrail,
    scan::{End, Span, Window},
    vault::Vault,
};

/// The longest region that is replaced as one.
const MAX_REGION_BYTES: usize = 32 * 1024;

/// What is looked for on this machine.
#[derive(Debug)]
pub(super) enum Detector {
    /// Patterns with a bound, in the text as it stands.
    Rules(RuleSet),
    /// The same, in the text's plain form, too.
    Shapes(RuleSet),
    /// Phrases.
    Blocklists(Vec<Blocklist>),
    /// Texts longer than this.
    MaxChars(u64),
    /// Texts in other languages.
    Languages(Languages),
}

/// Where a detector stands in a text, in bytes of the window.
#[derive(Debug)]
enum Cursor {
    Rules { from: usize, caches: Caches },
    Shapes { from: usize, from_in_plain: usize, caches: Caches },
    Blocklists(Vec<BlocklistCursor>),
    MaxChars { from: usize, num_chars: u64 },
    Languages { is_decided: bool },
}

/// What a piece has let go.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) text: String,
    pub(super) is_blocked: bool,
}

#[derive(Debug)]
pub(super) struct Stage {
    guardrail: Arc<Guardrail>,
    cursor: Cursor,
    /// A character that was let go already, for context, and what is held back.
    text: String,
    num_context_bytes: usize,
    /// By their places.
    pending: VecDeque<Span>,
    counts: BTreeMap<&'static str, u64>,
    json: Option<JsonPlace>,
    is_over: bool,
}

impl Stage {
    /// The guardrail must look on this machine: `detector` is its own.
    pub(super) fn new(guardrail: Arc<Guardrail>, detector: &Detector, form: Form) -> Self {
        let cursor = match detector {
            Detector::Rules(rules) => Cursor::Rules { from: 0, caches: rules.caches() },
            Detector::Shapes(rules) => Cursor::Shapes { from: 0, from_in_plain: 0, caches: rules.caches() },
            Detector::Blocklists(lists) => Cursor::Blocklists(vec![BlocklistCursor::default(); lists.len()]),
            Detector::MaxChars(_) => Cursor::MaxChars { from: 0, num_chars: 0 },
            Detector::Languages(_) => Cursor::Languages { is_decided: false },
        };
        Self {
            guardrail,
            cursor,
            text: String::new(),
            num_context_bytes: 0,
            pending: VecDeque::new(),
            counts: BTreeMap::new(),
            json: (form == Form::Json).then(JsonPlace::default),
            is_over: false,
        }
    }

    pub(super) fn guardrail(&self) -> &Guardrail {
        &self.guardrail
    }

    pub(super) fn findings(&self) -> Vec<Finding> {
        self.counts.iter().map(|(&label, &count)| Finding { label, count }).collect()
    }

    /// Takes a piece and lets go what is settled. After a block nothing more comes.
    pub(super) fn push(&mut self, piece: &str, end: End, vault: &mut Arc<Vault>) -> Step {
        if self.is_over {
            return Step { text: String::new(), is_blocked: false };
        }
        self.text.push_str(piece);
        let settled = self.scan(end);
        let mut step = Step { text: String::new(), is_blocked: false };
        let mut from = self.num_context_bytes;
        let hold = loop {
            let Some(region) = self.first_region() else { break settled };
            if self.guardrail.action == Action::Block && region.start < settled {
                self.let_go(from, region.start, &mut step.text);
                *self.counts.entry(region.label).or_default() += 1;
                step.is_blocked = true;
                self.is_over = true;
                self.text.clear();
                return step;
            }
            if end == End::Open && region.end >= settled {
                break region.start.min(settled);
            }
            self.let_go(from, region.start, &mut step.text);
            self.replace(region, vault, &mut step.text);
            from = region.end;
        };
        let hold = hold.max(from);
        self.let_go(from, hold, &mut step.text);
        self.forget_before(hold);
        if self.passes_unchanged() {
            piece.clone_into(&mut step.text);
        }
        step
    }

    /// A guardrail that only counts holds nothing back.
    fn passes_unchanged(&self) -> bool {
        matches!(self.guardrail.action, Action::Flag | Action::RouteLocal)
    }

    fn scan(&mut self, end: End) -> usize {
        let window = Window { text: &self.text, end };
        let Some(detector) = self.guardrail.detector() else { return self.text.len() };
        let mut found = Vec::new();
        let settled = match (detector, &mut self.cursor) {
            (Detector::Rules(rules), Cursor::Rules { from, caches }) => {
                *from = rules.scan(caches, *from, window, &mut found);
                *from
            }
            (Detector::Shapes(rules), Cursor::Shapes { from, from_in_plain, caches }) => {
                *from = rules.scan(caches, *from, window, &mut found);
                *from_in_plain = match Plain::of(window.text) {
                    None => *from,
                    Some(plain) => scan_plain(rules, caches, &plain, *from_in_plain, window, &mut found),
                };
                (*from).min(*from_in_plain)
            }
            (Detector::Blocklists(lists), Cursor::Blocklists(cursors)) => lists
                .iter()
                .zip(cursors)
                .map(|(list, cursor)| list.scan(cursor, window, &mut found))
                .min()
                .unwrap_or(window.text.len()),
            (Detector::MaxChars(max), Cursor::MaxChars { from, num_chars }) => {
                scan_length(*max, from, num_chars, window, &mut found)
            }
            (Detector::Languages(languages), Cursor::Languages { is_decided }) => {
                scan_language(languages, is_decided, window, &mut found)
            }
            // A stage's cursor is made from its own detector.
            _ => window.text.len(),
        };
        if !found.is_empty() {
            self.pending.extend(found);
            self.pending.make_contiguous().sort_by_key(|span| (span.start, Reverse(span.end)));
        }
        settled
    }

    /// The first spans that overlap or touch.
    fn first_region(&self) -> Option<Span> {
        let mut spans = self.pending.iter();
        let first = spans.next()?;
        let max_bytes = MAX_REGION_BYTES.max(first.end - first.start);
        let mut region = *first;
        for span in spans.take_while(|span| span.end - first.start <= max_bytes) {
            if span.start > region.end {
                break;
            }
            region.end = region.end.max(span.end);
        }
        Some(region)
    }

    /// Puts the placeholder for a region, and forgets its spans.
    fn replace(&mut self, region: Span, vault: &mut Arc<Vault>, released: &mut String) {
        *self.counts.entry(region.label).or_default() += 1;
        let value = &self.text[region.start..region.end];
        if !self.passes_unchanged() {
            let placeholder = Arc::make_mut(vault).placeholder(region.label, value);
            match &mut self.json {
                None => released.push_str(&placeholder),
                Some(json) => {
                    let is_in_string = json.is_in_string;
                    json.advance(value);
                    // What takes the place of a bare number is a string.
                    for part in
                        [if is_in_string { "" } else { "\"" }, &placeholder, if json.is_in_string { "" } else { "\"" }]
                    {
                        released.push_str(part);
                    }
                }
            }
        }
        // What reaches beyond the region goes on behind it; all that comes later is not looked at.
        let mut rest = Vec::new();
        while let Some(span) = self.pending.front().copied().filter(|span| span.start < region.end) {
            self.pending.pop_front();
            if span.end > region.end {
                rest.push(Span { start: region.end, ..span });
            }
        }
        rest.sort_by_key(|span| span.end);
        for span in rest {
            self.pending.push_front(span);
        }
    }

    fn let_go(&mut self, from: usize, to: usize, released: &mut String) {
        let text = &self.text[from..to];
        if let Some(json) = &mut self.json {
            json.advance(text);
        }
        released.push_str(text);
    }

    /// Keeps the character before `hold`, for rules that ask what they stand behind, and what is invisible after it.
    fn forget_before(&mut self, hold: usize) {
        let before = self.text[..hold].chars().rev().take(usize::from(MAX_SKIPPED) + 1);
        let mut context = 0;
        for letter in before {
            context += letter.len_utf8();
            if letter.is_ascii_whitespace() || !is_invisible(letter) {
                break;
            }
        }
        let num_bytes = hold - context;
        self.text.drain(..num_bytes);
        self.num_context_bytes = context;
        for span in &mut self.pending {
            span.start -= num_bytes;
            span.end -= num_bytes;
        }
        match &mut self.cursor {
            Cursor::Rules { from, .. } | Cursor::MaxChars { from, .. } => *from -= num_bytes,
            Cursor::Shapes { from, from_in_plain, .. } => {
                *from -= num_bytes;
                *from_in_plain -= num_bytes;
            }
            Cursor::Blocklists(cursors) => cursors.iter_mut().for_each(|cursor| cursor.shift(num_bytes)),
            Cursor::Languages { .. } => {}
        }
    }
}

/// Scans a text's plain form; spans and what is settled in bytes of the text itself.
fn scan_plain(
    rules: &RuleSet,
    caches: &Caches,
    plain: &Plain,
    from: usize,
    window: Window<'_>,
    found: &mut Vec<Span>,
) -> usize {
    let mut spans = Vec::new();
    let in_plain = Window { text: &plain.text, end: window.end };
    let settled = rules.scan(caches, plain.at(from), in_plain, &mut spans);
    found.extend(spans.into_iter().map(|span| Span {
        start: plain.start(span.start, window.text.len()),
        end: plain.end(span.end),
        label: span.label,
    }));
    plain.start(settled, window.text.len())
}

/// One span, of the first character too many.
fn scan_length(max: u64, from: &mut usize, num_chars: &mut u64, window: Window<'_>, found: &mut Vec<Span>) -> usize {
    for (offset, letter) in window.text[*from..].char_indices() {
        *num_chars += 1;
        if *num_chars == max.saturating_add(1) {
            let start = *from + offset;
            found.push(Span { start, end: start + letter.len_utf8(), label: "length" });
        }
    }
    *from = window.text.len();
    *from
}

fn scan_language(languages: &Languages, is_decided: &mut bool, window: Window<'_>, found: &mut Vec<Span>) -> usize {
    let text = window.text;
    if !*is_decided {
        let sample_end = text.char_indices().nth(SAMPLE_CHARS).map(|(at, _)| at);
        if sample_end.is_none() && window.end == End::Open {
            return 0;
        }
        *is_decided = true;
        let sample = &text[..sample_end.unwrap_or(text.len())];
        if !languages.admit(sample) {
            found.push(Span { start: 0, end: sample.len(), label: "language" });
        }
    }
    text.len()
}

/// Whether a place in JSON is inside a string.
#[derive(Clone, Copy, Debug, Default)]
struct JsonPlace {
    is_in_string: bool,
    is_escaped: bool,
}

impl JsonPlace {
    fn advance(&mut self, text: &str) {
        for byte in text.bytes() {
            match (self.is_in_string, self.is_escaped, byte) {
                (true, true, _) => self.is_escaped = false,
                (true, false, b'\\') => self.is_escaped = true,
                (_, _, b'"') => self.is_in_string = !self.is_in_string,
                _ => {}
            }
        }
    }
}
