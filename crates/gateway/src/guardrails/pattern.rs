//! Regexes of a config, made such that every match is bounded.
//!
//! A stream has to know how long a match can get: a repetition without a bound (`\d+`, `.*`) repeats at most
//! [`MAX_REPEAT`] times more than it must, and a longer run is several matches side by side, which count as one. Word
//! boundaries are those of ASCII, for an automaton cannot look at letters of several bytes. Of matches at one place the
//! longest counts (laziness has no say).
//!
//! Held back at most: [`MAX_MATCH_BYTES`]. **Invariant**: a pattern that compiles takes at most [`MAX_AUTOMATON_BYTES`] twice over, and at
//! most [`MAX_MATCH_BYTES`] steps at any place of a text.

use regex_syntax::hir::{Capture, Hir, HirKind, Look, Repetition};

use super::{
    GuardrailError,
    anchored::{MAX_RULES, Rule, compile_lazy},
    checks,
};

/// How often a repetition without a bound repeats beyond its minimum.
const MAX_REPEAT: u32 = 64;
/// The longest match that a pattern may have.
const MAX_MATCH_BYTES: usize = 1024;
/// The largest automaton of a pattern, and the largest cache of its states.
const MAX_AUTOMATON_BYTES: usize = 2 << 20;
/// The longest pattern as written.
const MAX_PATTERN_BYTES: usize = 4096;

pub(super) fn rules(guardrail: &str, patterns: &[String]) -> Result<Vec<Rule>, GuardrailError> {
    let bad = |why: String| GuardrailError::Config { guardrail: guardrail.to_owned(), why };
    if patterns.is_empty() || patterns.len() > MAX_RULES {
        return Err(bad(format!("it has {} patterns; give 1 to {MAX_RULES} under `patterns`", patterns.len())));
    }
    patterns
        .iter()
        .map(|pattern| {
            let hir = bounded(pattern).map_err(|why| bad(format!("pattern {pattern:.80}: {why}")))?;
            let engine = compile_lazy(&hir, MAX_AUTOMATON_BYTES)
                .map_err(|why| bad(format!("pattern {pattern:.80}: {why}; use smaller classes, like (?-u:\\w)")))?;
            Ok(Rule { label: "match", engine, may_follow: |_| true, is_valid: checks::any })
        })
        .collect()
}

fn bounded(pattern: &str) -> Result<Hir, String> {
    if pattern.len() > MAX_PATTERN_BYTES {
        return Err(format!("it is {} bytes long and the limit is {MAX_PATTERN_BYTES}; split it", pattern.len()));
    }
    let hir = regex_syntax::parse(pattern).map_err(|error| format!("it cannot be read: {error}"))?;
    let hir = bound(&hir);
    match (hir.properties().minimum_len(), hir.properties().maximum_len()) {
        (Some(0), _) => Err("it matches an empty text; ask for one character at least".to_owned()),
        (_, Some(longest)) if longest <= MAX_MATCH_BYTES => Ok(hir),
        (_, Some(longest)) => Err(format!(
            "a match may be {longest} bytes long (an unbounded repetition counts {MAX_REPEAT} times) and the limit is \
             {MAX_MATCH_BYTES}; bound its repetitions, like \\d{{1,20}}"
        )),
        (_, None) => Err("it matches nothing".to_owned()),
    }
}

/// The same expression with every repetition bounded and every word boundary ASCII's. The parser bounds the depth.
fn bound(hir: &Hir) -> Hir {
    match hir.kind() {
        HirKind::Empty => Hir::empty(),
        HirKind::Literal(literal) => Hir::literal(literal.0.clone()),
        HirKind::Class(class) => Hir::class(class.clone()),
        HirKind::Look(look) => Hir::look(match look {
            Look::WordUnicode => Look::WordAscii,
            Look::WordUnicodeNegate => Look::WordAsciiNegate,
            Look::WordStartUnicode => Look::WordStartAscii,
            Look::WordEndUnicode => Look::WordEndAscii,
            Look::WordStartHalfUnicode => Look::WordStartHalfAscii,
            Look::WordEndHalfUnicode => Look::WordEndHalfAscii,
            other => *other,
        }),
        HirKind::Repetition(repetition) => Hir::repetition(Repetition {
            min: repetition.min,
            max: Some(repetition.max.unwrap_or_else(|| repetition.min.saturating_add(MAX_REPEAT))),
            greedy: repetition.greedy,
            sub: Box::new(bound(&repetition.sub)),
        }),
        HirKind::Capture(Capture { sub, .. }) => bound(sub),
        HirKind::Concat(parts) => Hir::concat(parts.iter().map(bound).collect()),
        HirKind::Alternation(parts) => Hir::alternation(parts.iter().map(bound).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_that_could_match_without_end_are_bounded_or_refused() {
        assert_eq!(bounded(r"(?-u)id-\d+").unwrap().properties().maximum_len(), Some(3 + 1 + 64));
        for (pattern, expected) in [
            ("a*", "empty text"),
            (r"(\d+x)+y", "a match may be"),
            (r"\p{L}{900}", "a match may be"),
            ("(", "cannot be read"),
            (r"[^\s\S]", "matches nothing"),
        ] {
            let said = bounded(pattern).unwrap_err();
            assert!(said.contains(expected), "{pattern}: {said}");
        }
    }

    #[test]
    fn a_pattern_that_compiles_too_large_is_refused() {
        let said = rules("big", &[r"(?:\w{1,15}\W{0,15}){8}".to_owned()]).unwrap_err().to_string();
        assert!(said.contains("`big`") && said.contains("smaller classes"), "{said}");
    }
}
