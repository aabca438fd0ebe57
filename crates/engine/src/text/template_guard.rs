//! Puts filters around operands that minijinja offers no other way into: those of `+` and `~`, and what is compared.
//!
//! Each operand of a `+` pays for its length. minijinja's fuel covers what a template runs and prints, but it joins lists
//! lazily and copies them out free of charge once some thirty joins are stacked, so that a list doubled forty times took
//! all memory there is (as of 3.1). Each operand of a `~` becomes text as Python writes it, where minijinja would write
//! floats at length.
//!
//! What is compared pays for all that is in it: minijinja's fuel covers the outermost items alone, and two lists that were
//! nested in themselves forty times (`x = [x, x]`) take two to the power of forty steps. A comparison walks two values side by
//! side, so it is enough that one pays: the right operand; the key of a dict and what stands in a subscript, which are
//! hashed; the arguments of `loop.changed`.
//!
//! The source is rewritten before it is compiled: `a + b` becomes `(a)|NAME + (b)|NAME`. Tokens and their places come from
//! minijinja's own lexer; this file must not know what a template is for.
//!
//! Invariant: a rewritten template renders as the original, floats aside, or runs out of fuel; lines keep their numbers.

use minijinja::{
    Error, ErrorKind, State, Value,
    machinery::{Token, tokenize},
    syntax::SyntaxConfig,
    value::ValueKind,
};

/// The filters' names: no template's own. What stands before a `+` or behind one passes through the first.
pub(crate) const JOINED: &str = "bindery_joined";
/// What stands before a `~` or behind one passes through the second.
pub(crate) const SPELLED: &str = "bindery_spelled";
/// What something is compared with passes through the third.
pub(crate) const COMPARED: &str = "bindery_compared";
/// Most tokens between `{{` and `}}`: compiling takes time by their square; published templates stay below 500.
const MAX_TAG_TOKENS: usize = 16_384;
/// Items of a list for a unit of fuel: what 64 bytes are.
const ITEMS_PER_FUEL: u64 = 2;

/// Passes a value on, for a price where it is a list. A list of unknown length is copied out first.
pub(crate) fn joined(state: &mut State, value: Value) -> Result<Value, Error> {
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        return Ok(value);
    }
    if let Some(length) = value.len() {
        state.consume_fuel(length as u64 / ITEMS_PER_FUEL)?;
        return Ok(value);
    }
    let mut items = Vec::new();
    for item in value.try_iter()? {
        state.consume_fuel(1)?;
        items.push(item);
    }
    Ok(Value::from(items))
}

/// Passes a value on, for the price of walking through all of it.
pub(crate) fn compared(state: &mut State, value: Value) -> Result<Value, Error> {
    pay_for_all_of(state, &value)?;
    Ok(value)
}

/// A step for every value in a value, and for every 64 bytes of text; how many there are.
pub(crate) fn pay_for_all_of(state: &State, value: &Value) -> Result<u64, Error> {
    let mut num_values = 0;
    let mut pending = vec![value.clone()];
    while let Some(value) = pending.pop() {
        num_values += 1;
        match value.kind() {
            ValueKind::String => state.consume_fuel(value.as_str().map_or(0, str::len) as u64 / 64)?,
            ValueKind::Seq | ValueKind::Iterable | ValueKind::Map => {
                for item in value.try_iter()? {
                    state.consume_fuel(1)?;
                    if value.kind() == ValueKind::Map {
                        pending.push(value.get_item(&item)?);
                    }
                    pending.push(item);
                }
            }
            _ => {}
        }
    }
    Ok(num_values)
}

/// From the first byte to behind the last.
type Place = (usize, usize);

/// What stands between two operators of an expression that bind as `+` does or less, and its last part between `~`.
#[derive(Clone, Copy, Default)]
struct Term {
    bytes: Option<Place>,
    is_joined: bool,
    part: Option<Place>,
    is_spelled: bool,
    is_compared: bool,
    kind: Kind,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Kind {
    /// A text or a number, as far as read.
    #[default]
    Literal,
    Expression,
}

/// What is inside a pair of brackets.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Inside {
    /// A tag, parentheses, a list, or the arguments of a call.
    #[default]
    Plain,
    /// Names that a loop gives to what it walks over, in front of `in`.
    LoopTarget,
    /// A dict, a subscript, or the arguments of `changed`: some of it is hashed or compared.
    Compared,
}

/// The source with every operand of a `+` and a `~` passed through its filter. An error says what is no token, or that a
/// tag has more than [`MAX_TAG_TOKENS`].
pub(crate) fn guarded(source: &str, syntax: SyntaxConfig) -> Result<String, Error> {
    let mut terms = Terms::default();
    terms.read(source, syntax)?;
    let num_places = terms.joined.len() + terms.spelled.len() + terms.compared.len();
    let mut inserted: Vec<(usize, String)> = Vec::with_capacity(2 * num_places);
    // A part may end where its term does: the sort keeps the order, and parts come first.
    for (places, filter) in [(terms.spelled, SPELLED), (terms.joined, JOINED), (terms.compared, COMPARED)] {
        for (start, end) in places {
            inserted.push((start, "(".to_owned()));
            inserted.push((end, format!(")|{filter}")));
        }
    }
    inserted.sort_by_key(|(at, _)| *at);
    let mut guarded = String::with_capacity(source.len() + inserted.len() * (JOINED.len() + 3) / 2);
    let mut done = 0;
    for (at, text) in inserted {
        guarded.push_str(&source[done..at]);
        guarded.push_str(&text);
        done = at;
    }
    guarded.push_str(&source[done..]);
    Ok(guarded)
}

/// Follows the tokens of a template and keeps the term at each depth of brackets.
#[derive(Default)]
struct Terms {
    open: Vec<Term>,
    /// Of each of those.
    inside: Vec<Inside>,
    /// Whether the last token makes a word a name (`.in`, `|in`), `not` a part of a test (`is not`), or `-` a sign.
    last: Last,
    /// Operands of `+`.
    joined: Vec<Place>,
    /// Operands of `~`.
    spelled: Vec<Place>,
    /// What something is compared with.
    compared: Vec<Place>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Last {
    /// A statement's name comes next.
    Statement,
    /// A name comes next.
    DotOrPipe,
    Is,
    /// An operand comes next.
    Operator,
    /// `.changed`: its arguments come next.
    Changed,
    #[default]
    Other,
}

impl Terms {
    fn read(&mut self, source: &str, syntax: SyntaxConfig) -> Result<(), Error> {
        let mut num_tokens = 0;
        for token in tokenize(source, false, syntax) {
            let (token, span) = token?;
            num_tokens = if matches!(token, Token::VariableStart | Token::BlockStart) { 0 } else { num_tokens + 1 };
            if num_tokens > MAX_TAG_TOKENS {
                let message = format!("a tag in line {} has more than {MAX_TAG_TOKENS} parts", span.start_line);
                return Err(Error::new(ErrorKind::SyntaxError, message));
            }
            self.next(&token, (span.start_offset as usize, span.end_offset as usize));
        }
        Ok(())
    }

    fn next(&mut self, token: &Token<'_>, bytes: Place) {
        let last = std::mem::replace(&mut self.last, Last::Other);
        match token {
            Token::TemplateData(_) => {}
            Token::VariableStart | Token::BlockStart => {
                self.open = vec![Term::default()];
                self.inside = vec![Inside::Plain];
                if matches!(token, Token::BlockStart) {
                    self.last = Last::Statement;
                }
            }
            Token::VariableEnd | Token::BlockEnd => {
                while !self.open.is_empty() {
                    self.close();
                }
            }
            Token::ParenOpen | Token::BracketOpen | Token::BraceOpen => {
                let is_operand = last != Last::Operator && self.open.last().is_some_and(|term| term.bytes.is_some());
                let inside = match token {
                    Token::BraceOpen => Inside::Compared,
                    Token::BracketOpen if is_operand => Inside::Compared,
                    Token::ParenOpen if last == Last::Changed => Inside::Compared,
                    _ => Inside::Plain,
                };
                self.extend(bytes);
                self.open.push(Term { is_compared: inside == Inside::Compared, ..Term::default() });
                self.inside.push(inside);
            }
            Token::ParenClose | Token::BracketClose | Token::BraceClose => {
                self.close();
                self.extend(bytes);
            }
            Token::Plus => {
                let is_compared = self.open.last().is_some_and(|term| term.is_compared);
                if let Some(term) = self.open.last_mut() {
                    term.is_joined = true;
                }
                self.end(Term { is_joined: true, is_compared, ..Term::default() });
            }
            Token::Tilde => {
                if let Some(term) = self.open.last_mut() {
                    term.is_spelled = true;
                }
                self.end_part();
                self.extend(bytes);
                if let Some(term) = self.open.last_mut() {
                    term.part = None;
                }
                self.last = Last::Operator;
            }
            // In front of an operand it is a sign.
            Token::Minus if last == Last::Operator || self.open.last().is_some_and(|term| term.bytes.is_none()) => {
                self.extend_by_literal(bytes);
                self.last = Last::Operator;
            }
            Token::Mul | Token::Div | Token::FloorDiv | Token::Mod | Token::Pow => {
                self.extend(bytes);
                self.last = Last::Operator;
            }
            Token::Eq | Token::Ne | Token::Gt | Token::Gte | Token::Lt | Token::Lte => {
                self.end(Term { is_compared: true, ..Term::default() });
            }
            Token::Minus | Token::Comma | Token::Colon | Token::Assign => self.end_operand(),
            Token::Ident(word) if is_boundary(word, last) => self.word(word, last),
            Token::Ident("is") if last != Last::DotOrPipe => {
                self.extend(bytes);
                self.last = Last::Is;
            }
            Token::Ident("changed") if last == Last::DotOrPipe => {
                self.extend(bytes);
                self.last = Last::Changed;
            }
            Token::Dot | Token::Pipe => {
                self.extend(bytes);
                self.last = Last::DotOrPipe;
            }
            Token::Str(_) | Token::String(_) | Token::Int(_) | Token::Float(_) => self.extend_by_literal(bytes),
            _ => self.extend(bytes),
        }
    }

    /// A word that ends a term.
    fn word(&mut self, word: &str, last: Last) {
        if last == Last::Statement {
            self.end(Term::default());
            if let (Some(inside), "for") = (self.inside.last_mut(), word) {
                *inside = Inside::LoopTarget;
            }
            return;
        }
        match (word, self.inside.last_mut()) {
            ("in", Some(inside)) if *inside == Inside::LoopTarget => {
                *inside = Inside::Plain;
                self.end(Term::default());
            }
            // The test of that name pays for itself.
            ("in", _) if last != Last::Is => self.end(Term { is_compared: true, ..Term::default() }),
            _ => self.end_operand(),
        }
    }

    /// Ends the term at this depth; the next is compared where all is.
    fn end_operand(&mut self) {
        let is_compared = self.inside.last() == Some(&Inside::Compared);
        self.end(Term { is_compared, ..Term::default() });
    }

    /// Ends the term and the brackets around it.
    fn close(&mut self) {
        self.end(Term::default());
        self.open.pop();
        self.inside.pop();
    }

    fn extend(&mut self, (start, end): Place) {
        self.extend_by_literal((start, end));
        if let Some(term) = self.open.last_mut() {
            term.kind = Kind::Expression;
        }
    }

    fn extend_by_literal(&mut self, (start, end): Place) {
        if let Some(term) = self.open.last_mut() {
            for bytes in [&mut term.bytes, &mut term.part] {
                *bytes = Some((bytes.map_or(start, |(first, _)| first), end));
            }
        }
    }

    /// Ends the term at this depth and begins the next.
    fn end(&mut self, next: Term) {
        self.end_part();
        if let Some(term) = self.open.last_mut() {
            let ended = std::mem::replace(term, next);
            self.joined.extend(ended.bytes.filter(|_| ended.is_joined));
            self.compared.extend(ended.bytes.filter(|_| ended.is_compared && ended.kind == Kind::Expression));
        }
    }

    /// Ends the part of a term; a `~` itself belongs to none.
    fn end_part(&mut self) {
        if let Some(term) = self.open.last_mut() {
            let ended = term.part.take();
            self.spelled.extend(ended.filter(|_| term.is_spelled));
        }
    }
}

/// Words that end a term: a statement's own, and operators that bind less than `+`.
fn is_boundary(word: &str, last: Last) -> bool {
    match last {
        Last::Statement => true,
        Last::DotOrPipe => false,
        Last::Is => word != "not" && is_operator(word),
        Last::Operator | Last::Changed | Last::Other => is_operator(word),
    }
}

fn is_operator(word: &str) -> bool {
    matches!(word, "and" | "or" | "not" | "in" | "if" | "else" | "recursive")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(source: &str, expected: &str) {
        let guarded = guarded(source, SyntaxConfig::default()).unwrap();
        let short = guarded.replace(&format!("|{JOINED}"), "!").replace(&format!("|{SPELLED}"), "$");
        let short = short.replace(&format!("|{COMPARED}"), "?");
        assert_eq!(short, expected);
    }

    #[test]
    fn operands_and_nothing_else_are_wrapped() {
        check(
            "a + b {# c + d #} {% raw %}{{ a + b }}{% endraw %}",
            "a + b {# c + d #} {% raw %}{{ a + b }}{% endraw %}",
        );
        check("{{ a }}{{ a - b }}{{ 'a + b' }}", "{{ a }}{{ a - b }}{{ 'a + b' }}");
        check("{{ a + b }}", "{{ (a)! + (b)! }}");
        check("{{- a+b+c -}}", "{{- (a)!+(b)!+(c)! -}}");
        check("{{ a - b + c - d }}", "{{ a - (b)! + (c)! - d }}");
        check("{{ a ~ -b * 2 ~ f(c ~ d)|e ~ [g] }}", "{{ (a)$ ~ (-b * 2)$ ~ (f((c)$ ~ (d)$)|e)$ ~ ([g])$ }}");
        check(
            "{% set x = x ~ (a if b else c ~ d) %}{{ ~ }}",
            "{% set x = (x)$ ~ ((a if b else (c)$ ~ (d)$))$ %}{{ ~ }}",
        );
        check("{{ a * -b + c ** - -d - -e }}", "{{ (a * -b)! + (c ** - -d)! - -e }}");
        check("{{ -a + -b * 2 }}", "{{ (-a)! + (-b * 2)! }}");
        check("{{ a ~ b + c ~ d }}", "{{ ((a)$ ~ (b)$)! + ((c)$ ~ (d)$)! }}");
        check(
            "{{ [a + b] + f(c + d, e)[g + h:] }}",
            "{{ ([(a)! + (b)!])! + (f((c)! + (d)!, e)[((g)!)? + ((h)!)?:])! }}",
        );
        check("{{ {'k': a + b}.k|d(c + d) }}", "{{ {'k': ((a)!)? + ((b)!)?}.k|d((c)! + (d)!) }}");
        check("{{ not a + b == c + d and e }}", "{{ not (a)! + (b)! == ((c)!)? + ((d)!)? and e }}");
        check("{{ a is not none + b.in + c is defined }}", "{{ (a is not none)! + (b.in)! + (c is defined)! }}");
        check("{{ a + b if c + d else e + f }}", "{{ (a)! + (b)! if (c)! + (d)! else (e)! + (f)! }}");
        check("{{ f(x=a + b) }}{{ (a + b) * c }}", "{{ f(x=(a)! + (b)!) }}{{ ((a)! + (b)!) * c }}");
        check("{% set x = x + x %}", "{% set x = (x)! + (x)! %}");
        check(
            "{% for i in a + b if i not in c + d recursive %}",
            "{% for i in (a)! + (b)! if i not in ((c)!)? + ((d)!)? recursive %}",
        );
        check("{% if a + b %}{% elif c|first + 'd' %}", "{% if (a)! + (b)! %}{% elif (c|first)! + ('d')! %}");
        check("{{ a + }} {{ + b }} {{ ) + ( }}", "{{ (a)! + }} {{ + (b)! }} {{ ) + ( }}");
    }

    #[test]
    fn what_something_is_compared_with_is_wrapped() {
        check("{{ a == b }}{{ a != b.c }}{{ a < b <= -c }}", "{{ a == (b)? }}{{ a != (b.c)? }}{{ a < (b)? <= (-c)? }}");
        check(
            "{{ a == 'x' }}{{ a > 1 }}{{ a >= -1 }}{{ a == 'x'|f }}",
            "{{ a == 'x' }}{{ a > 1 }}{{ a >= -1 }}{{ a == ('x'|f)? }}",
        );
        check("{{ a in b and c not in d }}{{ a is in b }}", "{{ a in (b)? and c not in (d)? }}{{ a is in b }}");
        check("{{ a == b * c if d == e else f }}", "{{ a == (b * c)? if d == (e)? else f }}");
        check("{{ a == b - c }}{{ a == (b if c else d) }}", "{{ a == (b)? - c }}{{ a == ((b if c else d))? }}");
        check("{{ a ~ b == c ~ d }}", "{{ (a)$ ~ (b)$ == ((c)$ ~ (d)$)? }}");
        check(
            "{% for a, (b, c) in d %}{% for e in f if e in g %}",
            "{% for a, (b, c) in d %}{% for e in f if e in (g)? %}",
        );
        check("{% if a in b %}{% elif c in [d, e] %}", "{% if a in (b)? %}{% elif c in ([d, e])? %}");
        check(
            "{{ a[b] }}{{ a[0] }}{{ a[-1] }}{{ a['x'] }}{{ a[1:b] }}",
            "{{ a[(b)?] }}{{ a[0] }}{{ a[-1] }}{{ a['x'] }}{{ a[1:(b)?] }}",
        );
        check("{{ a[b if c else d] }}{{ [a][b] }}", "{{ a[(b)? if (c)? else (d)?] }}{{ [a][(b)?] }}");
        check("{{ {'x': 1, a: b} }}{{ f({a: 1}) }}", "{{ {'x': 1, (a)?: (b)?} }}{{ f({(a)?: 1}) }}");
        check("{{ loop.changed(a, b) }}{{ changed(a) }}", "{{ loop.changed((a)?, (b)?) }}{{ changed(a) }}");
    }

    #[test]
    fn what_cannot_be_cut_or_is_too_long_is_refused() {
        assert!(guarded("{{ a + 'unended }}", SyntaxConfig::default()).is_err());
        let long = |count| format!("\n{{{{ 1{} }}}}", " + 1".repeat(count));
        assert!(guarded(&long(8_000), SyntaxConfig::default()).is_ok());
        let error = guarded(&long(9_000), SyntaxConfig::default()).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("16384"), "{error}");
    }
}
