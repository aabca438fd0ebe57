//! The Python around a chat template: the Jinja environment as transformers sets it up, on minijinja.
//!
//! Templates were written for Jinja2 running in Python, so their output depends on Python's `json.dumps`, `str` methods
//! and `strftime`. This file gives minijinja those; it must not know messages or models. Templates are untrusted:
//! everything they can call is bounded by the render's fuel, and nothing reaches files, the network or the process.
//!
//! Known differences: `'...' % x` is an error (`'...' | format(x)` works); a loop over none is empty and a lazy list has a
//! JSON form instead of an error; floats beyond 1e16 or below 1e-4 print in full after `join` and `format`.

#![expect(clippy::needless_pass_by_value, reason = "minijinja hands a filter its arguments by value")]

use std::fmt::Write as _;

use chrono::{NaiveDateTime, format::StrftimeItems};
use minijinja::{
    Environment, Error, ErrorKind, Output, State, Value, filters,
    syntax::SyntaxConfig,
    tests,
    value::{Kwargs, Rest, Tuple, ValueKind, from_args},
};

use super::template_guard;
use crate::EngineError;

/// Deepest nesting that `tojson` follows. JSON from a client is at most 128 deep.
const MAX_JSON_DEPTH: usize = 200;
/// Widest indentation or padding that a template may ask for.
const MAX_WIDTH: usize = 4096;

/// What `raise_exception` throws: the model's author speaks to the caller.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct RaisedByTemplate(String);

impl RaisedByTemplate {
    /// The message, if this is what ended a render.
    pub(crate) fn find(error: &Error) -> Option<&str> {
        let mut next = Some(error as &dyn std::error::Error);
        while let Some(current) = next {
            if let Some(raised) = current.downcast_ref::<Self>() {
                return Some(&raised.0);
            }
            next = current.source();
        }
        None
    }
}

/// An environment as in transformers' `apply_chat_template`: blocks trimmed on both sides, loop controls, its own
/// `tojson` and `raise_exception`. `strftime_now` depends on the time and comes with each render ([`strftime_now`]).
pub(crate) fn environment() -> Result<Environment<'static>, EngineError> {
    let mut environment = Environment::new();
    let syntax = syntax().map_err(|error| EngineError::Text(format!("the template syntax is invalid: {error}")))?;
    environment.set_syntax(syntax);
    minijinja_contrib::add_to_environment(&mut environment);
    environment.set_unknown_method_callback(python_method);
    environment.set_formatter(format_value);
    environment.add_filter(template_guard::JOINED, template_guard::joined);
    environment.add_filter(template_guard::SPELLED, spelled);
    environment.add_filter(template_guard::COMPARED, template_guard::compared);
    add_comparisons(&mut environment);
    environment.add_filter("string", |state: &mut State, value: Value| -> Result<Value, Error> {
        let value = spelled(state, value)?;
        Ok(if value.kind() == ValueKind::String { value } else { Value::from(value.to_string()) })
    });
    // minijinja's own, not Jinja2's, and not paid for by fuel either.
    environment.remove_filter("chain");
    environment.add_filter("tojson", tojson);
    for name in ["default", "d"] {
        environment.add_filter(name, default);
    }
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("truncate", truncate);
    environment.add_filter("center", |text: String, width: Option<usize>| center(&text, width.unwrap_or(80), ' '));
    environment.add_filter("wordcount", |text: String| {
        text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).count()
    });
    // What Python can take the length of and index: strings and dicts too, and Jinja2's undefined values.
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined)
    });
    // minijinja walks over none, Python doesn't.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(RaisedByTemplate(message)))
    });
    Ok(environment)
}

/// Filters and tests that compare: minijinja's own, paid for by all that is in what they walk through. Its fuel covers the
/// outermost items alone, and a list nested in itself has two to the power of its depth.
fn add_comparisons(environment: &mut Environment<'static>) {
    /// A sort looks at an item as often as their number has bits, and twice at most each time.
    fn pay(state: &State, value: &Value) -> Result<(), Error> {
        let num_values = template_guard::pay_for_all_of(state, value)?;
        state.consume_fuel(num_values.saturating_mul(2 * u64::from(num_values.max(1).ilog2())))
    }
    macro_rules! paid_filters {
        ($($name:ident),+) => {
            $(environment.add_filter(stringify!($name), |state: &mut State, value: Value, kwargs: Kwargs| {
                pay(state, &value)?;
                filters::$name(state, value, kwargs)
            });)+
        };
    }
    paid_filters!(sort, min, max, unique);
    environment.add_filter("dictsort", |state: &mut State, value: Value, kwargs: Kwargs| {
        pay(state, &value)?;
        filters::dictsort(&value, kwargs)
    });
    environment.add_filter("groupby", |state: &mut State, value: Value, attribute: Option<&str>, kwargs: Kwargs| {
        pay(state, &value)?;
        filters::groupby(value, attribute, kwargs)
    });
    type Comparison = fn(&Value, &Value) -> bool;
    let comparisons: [(&[&'static str], Comparison); 6] = [
        (&["eq", "equalto", "=="], |value, other| value == other),
        (&["ne", "!="], |value, other| value != other),
        (&["lt", "lessthan", "<"], |value, other| value < other),
        (&["le", "<="], |value, other| value <= other),
        (&["gt", "greaterthan", ">"], |value, other| value > other),
        (&["ge", ">="], |value, other| value >= other),
    ];
    for (names, compare) in comparisons {
        for &name in names {
            environment.add_test(name, move |state: &mut State, value: &Value, other: &Value| -> Result<bool, Error> {
                template_guard::pay_for_all_of(state, other)?;
                Ok(compare(value, other))
            });
        }
    }
    environment.add_test("in", |state: &mut State, value: &Value, other: &Value| {
        template_guard::pay_for_all_of(state, other)?;
        tests::is_in(state, value, other)
    });
}

fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

/// The function of that name, fixed to a point in time.
pub(crate) fn strftime_now(now: NaiveDateTime) -> Value {
    Value::from_function(move |format: String| strftime(now, &format))
}

/// `{% generation %}` marks an assistant's words for training and prints what is inside. minijinja doesn't know the
/// tag; a `with` block prints its body in a scope of its own just so. Texts that look like the tag inside an expression
/// or a comment do not occur in templates, so the tags are found by their form alone.
///
/// Jinja2 also reads every kind of line end as a line feed. Last, joins of lists are made to be paid for.
pub(crate) fn prepared_source(source: &str) -> Result<String, Error> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let inner = &tag[2..end];
        let word = inner.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        let replacement = match word {
            "generation" => "with",
            "endgeneration" => "endwith",
            _ => {
                out.push_str("{%");
                rest = &tag[2..];
                continue;
            }
        };
        out.push_str("{%");
        out.push_str(&inner.replace(word, replacement));
        out.push_str("%}");
        rest = &tag[end + 2..];
    }
    out.push_str(rest);
    template_guard::guarded(&out, syntax()?)
}

/// A JSON value as a template sees it; integers stay integers, key order is kept.
pub(crate) fn to_template_value(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(*value),
        serde_json::Value::Number(number) => (number.as_i64().map(Value::from))
            .or_else(|| number.as_u64().map(Value::from))
            .or_else(|| number.as_f64().map(Value::from))
            .unwrap_or_default(),
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => items.iter().map(to_template_value).collect(),
        serde_json::Value::Object(entries) => {
            Value::from_pairs(entries.iter().map(|(key, value)| (key.as_str(), to_template_value(value))))
        }
    }
}

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// Prints floats as Python does, everything else as minijinja does.
fn format_value(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let spelled = spelled(state, value.clone())?;
    minijinja::escape_formatter(out, state, &spelled)
}

/// A float, or what holds one, as the text that Python prints, where minijinja would print another; else the value.
fn spelled(state: &mut State, value: Value) -> Result<Value, Error> {
    if !has_exponent(state, &value)? {
        return Ok(value);
    }
    let mut text = String::new();
    write_repr(state, &value, &mut text)?;
    Ok(Value::from(text))
}

/// Whether Python writes a number in it with an exponent. The walk pays for all that printing the value takes, which
/// minijinja asks for only after it has printed.
fn has_exponent(state: &mut State, value: &Value) -> Result<bool, Error> {
    let is_walked = |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) && value.len().is_some()
    };
    if !is_walked(value) {
        return Ok(exponent_repr(value).is_some());
    }
    let mut pending = vec![value.clone()];
    while let Some(value) = pending.pop() {
        if !is_walked(&value) {
            state.consume_fuel(value.as_str().map_or(0, str::len) as u64 / 64)?;
            if exponent_repr(&value).is_some() {
                return Ok(true);
            }
            continue;
        }
        for item in value.try_iter()? {
            state.consume_fuel(1)?;
            if value.kind() == ValueKind::Map {
                pending.push(value.get_item(&item)?);
            }
            pending.push(item);
        }
    }
    Ok(false)
}

fn exponent_repr(value: &Value) -> Option<String> {
    let float = f64::try_from(value.clone()).ok().filter(|float| float.is_finite() && !value.is_integer())?;
    Some(float_repr(float)).filter(|text| text.contains('e'))
}

/// Python's `repr` of what [`has_exponent`] walked.
fn write_repr(state: &mut State, value: &Value, text: &mut String) -> Result<(), Error> {
    state.consume_fuel(1)?;
    match value.kind() {
        ValueKind::Map => {
            text.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                text.push_str(if index == 0 { "" } else { ", " });
                write_repr(state, &key, text)?;
                text.push_str(": ");
                write_repr(state, &value.get_item(&key)?, text)?;
            }
            text.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable if value.len().is_some() => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            text.push(open);
            for (index, item) in value.try_iter()?.enumerate() {
                text.push_str(if index == 0 { "" } else { ", " });
                write_repr(state, &item, text)?;
            }
            text.push_str(if value.is_tuple() && value.len() == Some(1) { "," } else { "" });
            text.push(close);
        }
        _ => {
            let repr = exponent_repr(value).unwrap_or_else(|| format!("{value:?}"));
            state.consume_fuel(repr.len() as u64 / 64)?;
            text.push_str(&repr);
        }
    }
    Ok(())
}

/// The arguments of a call by position or by name, as Python binds them; absent ones are undefined.
fn bind<const N: usize>(names: [&str; N], args: &Rest<Value>, kwargs: &Kwargs) -> Result<[Value; N], Error> {
    let mut bound = [const { Value::UNDEFINED }; N];
    if args.len() > N {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    for (index, name) in names.into_iter().enumerate() {
        bound[index] = match args.get(index) {
            Some(value) => value.clone(),
            None => kwargs.get::<Option<Value>>(name)?.unwrap_or_default(),
        };
    }
    kwargs.assert_all_used()?;
    Ok(bound)
}

/// `default(value, default_value='', boolean=false)`.
fn default(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let [otherwise, boolean] = bind(["default_value", "boolean"], &args, &kwargs)?;
    let is_absent = value.is_undefined() || (boolean.is_true() && !value.is_true());
    Ok(match (is_absent, otherwise.is_undefined()) {
        (false, _) => value.clone(),
        (true, false) => otherwise,
        (true, true) => Value::from(""),
    })
}

/// `int(value, default=0, base=10)`: whole numbers, the whole part of floats, else the default.
fn int(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let [otherwise, base] = bind(["default", "base"], &args, &kwargs)?;
    let base = if base.is_undefined() { 10 } else { u32::try_from(base)? };
    if !(2..=36).contains(&base) {
        return Err(invalid(format!("int: the base is {base}, allowed are 2 to 36")));
    }
    let whole = |float: f64| (float.is_finite() && float.abs() < 1e38).then_some(float as i128);
    let found = match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        ValueKind::Number if value.is_integer() => return Ok(value.clone()),
        ValueKind::Number => whole(f64::try_from(value.clone())?),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default().trim().replace('_', "");
            let prefix = match base {
                16 => "0x",
                8 => "0o",
                2 => "0b",
                _ => "",
            };
            let lower = text.to_lowercase();
            let digits = lower.strip_prefix(prefix).unwrap_or(&lower);
            i128::from_str_radix(digits, base).ok().or_else(|| text.parse().ok().and_then(whole))
        }
        _ => None,
    };
    Ok(match found {
        Some(found) => i64::try_from(found).map_or_else(|_| Value::from(found), Value::from),
        None if otherwise.is_undefined() => Value::from(0),
        None => otherwise,
    })
}

/// `float(value, default=0.0)`.
fn float(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let [otherwise] = bind(["default"], &args, &kwargs)?;
    let found = match value.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => Some(f64::try_from(value.clone())?),
        ValueKind::String => value.as_str().unwrap_or_default().trim().replace('_', "").parse().ok(),
        _ => None,
    };
    Ok(match found {
        Some(found) => Value::from(found),
        None if otherwise.is_undefined() => Value::from(0.0),
        None => otherwise,
    })
}

/// `truncate(s, length=255, killwords=false, end='...', leeway=5)`.
fn truncate(text: &str, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let [length, kill_words, end, leeway] = bind(["length", "killwords", "end", "leeway"], &args, &kwargs)?;
    let length = if length.is_undefined() { 255 } else { usize::try_from(length)? };
    let leeway = if leeway.is_undefined() { 5 } else { usize::try_from(leeway)? };
    let end = if end.is_undefined() { "...".to_owned() } else { end.to_string() };
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.to_owned());
    }
    let num_kept =
        length.checked_sub(end.chars().count()).ok_or_else(|| invalid("truncate: the end is longer than length"))?;
    let mut kept: String = text.chars().take(num_kept).collect();
    if !kill_words.is_true() {
        kept.truncate(kept.rfind(' ').unwrap_or(kept.len()));
    }
    Ok(kept + &end)
}

/// Python's `str.center`: where the padding is odd, the extra fill goes left in texts of odd width.
fn center(text: &str, width: usize, fill: char) -> Result<String, Error> {
    if width > MAX_WIDTH {
        return Err(invalid(format!("center: the width is {width}, the limit is {MAX_WIDTH}")));
    }
    let missing = width.saturating_sub(text.chars().count());
    let left = missing / 2 + (missing & width & 1);
    let padding = |count| std::iter::repeat_n(fill, count).collect::<String>();
    Ok(format!("{}{text}{}", padding(left), padding(missing - left)))
}

/// `json.dumps(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn tojson(state: &mut State, value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let [ensure_ascii, indent, separators, sort_keys] =
        bind(["ensure_ascii", "indent", "separators", "sort_keys"], &args, &kwargs)?;
    let indent = match indent.kind() {
        ValueKind::Undefined | ValueKind::None => None,
        ValueKind::String => Some(indent.as_str().unwrap_or_default().to_owned()),
        _ => {
            let width = i64::try_from(indent.clone())?.max(0) as usize;
            if width > MAX_WIDTH {
                return Err(invalid(format!("tojson: indent is {width}, the limit is {MAX_WIDTH}")));
            }
            Some(" ".repeat(width))
        }
    };
    let (item, key) = match separators.kind() {
        ValueKind::Undefined | ValueKind::None => {
            (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned())
        }
        _ => {
            let parts: Vec<Value> = separators.try_iter()?.take(3).collect();
            match &parts[..] {
                [item, key] => (item.to_string(), key.to_string()),
                _ => return Err(invalid("tojson: separators are a pair of strings")),
            }
        }
    };
    let mut dumper = Dumper {
        out: String::new(),
        ensure_ascii: ensure_ascii.is_true(),
        sort_keys: sort_keys.is_true(),
        indent,
        item,
        key,
    };
    dumper.value(state, value, 0)?;
    Ok(Value::from(dumper.out))
}

/// Writes values as Python's `json` module does.
struct Dumper {
    out: String,
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

impl Dumper {
    fn value(&mut self, state: &mut State, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_JSON_DEPTH {
            return Err(invalid(format!("tojson: nested deeper than {MAX_JSON_DEPTH}")));
        }
        state.consume_fuel(1)?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)?),
            ValueKind::String => {
                let text = value.as_str().unwrap_or_default();
                state.consume_fuel(text.len() as u64 / 64)?;
                self.string(text);
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?;
                self.container(state, items, depth, ['[', ']'], |dumper, state, item| {
                    dumper.value(state, &item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.container(state, keys.into_iter(), depth, ['{', '}'], |dumper, state, key| {
                    match key.kind() {
                        ValueKind::String => dumper.string(key.as_str().unwrap_or_default()),
                        ValueKind::Number => dumper.string(&number(&key)?),
                        ValueKind::Bool => dumper.string(if key.is_true() { "true" } else { "false" }),
                        ValueKind::None => dumper.string("null"),
                        kind => return Err(invalid(format!("tojson: a key is a {kind}, JSON keys are strings"))),
                    }
                    dumper.out.push_str(&dumper.key.clone());
                    let entry = value.get_item(&key)?;
                    dumper.value(state, &entry, depth + 1)
                })?;
            }
            kind => return Err(invalid(format!("tojson: a value is {kind}, which JSON cannot say"))),
        }
        Ok(())
    }

    fn container(
        &mut self,
        state: &mut State,
        items: impl Iterator<Item = Value>,
        depth: usize,
        [open, close]: [char; 2],
        mut write: impl FnMut(&mut Self, &mut State, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        let mut is_empty = true;
        for item in items {
            if !is_empty {
                self.out.push_str(&self.item.clone());
            }
            is_empty = false;
            self.new_line(state, depth + 1)?;
            write(self, state, item)?;
        }
        if !is_empty {
            self.new_line(state, depth)?;
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, state: &mut State, depth: usize) -> Result<(), Error> {
        if let Some(indent) = &self.indent {
            state.consume_fuel((indent.len() * depth) as u64 / 64)?;
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
        Ok(())
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            match character {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                ' '..='~' => self.out.push(character),
                _ if self.ensure_ascii || character < ' ' => {
                    for unit in character.encode_utf16(&mut [0; 2]) {
                        // Writing to a string cannot fail.
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                _ => self.out.push(character),
            }
        }
        self.out.push('"');
    }
}

/// A number as Python's `repr` writes it.
fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    let float = f64::try_from(value.clone())?;
    Ok(if float.is_nan() {
        "NaN".to_owned()
    } else if float.is_infinite() {
        if float > 0.0 { "Infinity" } else { "-Infinity" }.to_owned()
    } else {
        float_repr(float)
    })
}

/// The shortest digits that read back as the same number, in positional notation for exponents from -4 to 15.
pub(crate) fn float_repr(float: f64) -> String {
    let scientific = format!("{float:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let positional = format!("{float}");
        if positional.contains('.') { positional } else { positional + ".0" }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs())
    }
}

/// `datetime.strftime` of a time without a zone, in the C locale. Unknown directives stay as they are.
fn strftime(now: NaiveDateTime, format: &str) -> Result<String, Error> {
    if format.len() > MAX_WIDTH {
        return Err(invalid(format!("strftime_now: the format has {} bytes, the limit is {MAX_WIDTH}", format.len())));
    }
    let mut out = String::new();
    let mut rest = format;
    while let Some(start) = rest.find('%') {
        out.push_str(&rest[..start]);
        let directive = &rest[start..];
        let num_flags = directive[1..].chars().take_while(|flag| "-_0^#".contains(*flag)).count();
        let Some(letter) = directive[1 + num_flags..].chars().next() else {
            out.push_str(directive);
            rest = "";
            break;
        };
        let length = 1 + num_flags + letter.len_utf8();
        out.push_str(&one_directive(now, &directive[..length], letter));
        rest = &directive[length..];
    }
    out.push_str(rest);
    Ok(out)
}

fn one_directive(now: NaiveDateTime, directive: &str, letter: char) -> String {
    let flags = &directive[1..directive.len() - letter.len_utf8()];
    let upper = flags.contains('^') || (flags.contains('#') && letter != 'p');
    let padding = flags.chars().rev().find(|flag| "-_0".contains(*flag)).map_or(String::new(), String::from);
    let format = match letter {
        '%' => return "%".to_owned(),
        // Nothing is known about the zone of a naive time.
        'Z' | 'z' => return String::new(),
        // Microseconds; chrono's own %f counts nanoseconds.
        'f' => "%6f".to_owned(),
        'h' => format!("%{padding}b"),
        'P' => "%P".to_owned(),
        'a' | 'A' | 'b' | 'B' | 'c' | 'C' | 'd' | 'D' | 'e' | 'F' | 'g' | 'G' | 'H' | 'I' | 'j' | 'k' | 'l' | 'm'
        | 'M' | 'n' | 'p' | 'r' | 'R' | 'S' | 't' | 'T' | 'u' | 'U' | 'V' | 'w' | 'W' | 'x' | 'X' | 'y' | 'Y' => {
            format!("%{padding}{letter}")
        }
        _ => return directive.to_owned(),
    };
    // Checked before formatting, because chrono's Display reports an unknown item by failing.
    let items: Vec<_> = StrftimeItems::new(&format).collect();
    if items.iter().any(|item| matches!(item, chrono::format::Item::Error)) {
        return directive.to_owned();
    }
    let mut text = String::new();
    if write!(text, "{}", now.format_with_items(items.into_iter())).is_err() {
        return directive.to_owned();
    }
    if upper { text.to_uppercase() } else { text }
}

/// Python's methods of built-in types: those of `minijinja-contrib`, and the string methods it lacks.
fn python_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        let one = || from_args::<(&str,)>(args).map(|(argument,)| argument);
        match method {
            "removeprefix" => return Ok(Value::from(text.strip_prefix(one()?).unwrap_or(text))),
            "removesuffix" => return Ok(Value::from(text.strip_suffix(one()?).unwrap_or(text))),
            "partition" => return Ok(partition(text.split_once(one()?), one()?, [text, "", ""])),
            "rpartition" => return Ok(partition(text.rsplit_once(one()?), one()?, ["", "", text])),
            "title" => {
                from_args::<()>(args)?;
                return Ok(Value::from(title(text)));
            }
            "center" => {
                let (width, fill) = from_args::<(usize, Option<char>)>(args)?;
                return center(text, width, fill.unwrap_or(' ')).map(Value::from);
            }
            "casefold" => return Ok(Value::from(text.to_lowercase())),
            "swapcase" => return Ok(Value::from(swapcase(text))),
            "index" => {
                let found = text.find(one()?).ok_or_else(|| invalid("substring not found"))?;
                return Ok(Value::from(text[..found].chars().count()));
            }
            "zfill" | "ljust" | "rjust" => return pad(text, method, args),
            // Widths and precisions are not paid for by pycompat: `'{:9999999999}'` would be ten gigabytes.
            "format" => state.consume_fuel(sum_of_numbers(text) / 64)?,
            _ => {}
        }
    }
    // What a list's `count` compares, and a dict's `get` hashes.
    match method {
        "count" => _ = template_guard::pay_for_all_of(state, value)?,
        "get" => args.iter().try_for_each(|key| template_guard::pay_for_all_of(state, key).map(|_| ()))?,
        _ => {}
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

fn partition(found: Option<(&str, &str)>, separator: &str, otherwise: [&str; 3]) -> Value {
    let parts = found.map_or(otherwise, |(before, after)| [before, separator, after]);
    Value::from(Tuple::from(parts.map(Value::from)))
}

/// Python's `str.title`: a letter after anything but a letter is upper case, so `they're` becomes `They'Re`.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut is_inside = false;
    for character in text.chars() {
        let is_cased = character.is_lowercase() || character.is_uppercase();
        if is_inside {
            out.extend(character.to_lowercase());
        } else {
            out.extend(character.to_uppercase());
        }
        is_inside = is_cased;
    }
    out
}

/// The sum of all decimal numbers in a text.
fn sum_of_numbers(text: &str) -> u64 {
    let digits = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    digits.fold(0, |sum, digits| sum.saturating_add(digits.parse().unwrap_or(u64::MAX)))
}

fn swapcase(text: &str) -> String {
    let swap = |c: char| if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() };
    text.chars().map(swap).collect()
}

fn pad(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (width, fill) = from_args::<(usize, Option<char>)>(args)?;
    if width > MAX_WIDTH {
        return Err(invalid(format!("{method}: the width is {width}, the limit is {MAX_WIDTH}")));
    }
    let missing = width.saturating_sub(text.chars().count());
    let padding = |fill: char| std::iter::repeat_n(fill, missing).collect::<String>();
    Ok(Value::from(match method {
        "zfill" => {
            let sign = text.find(['+', '-']).filter(|&at| at == 0).map_or(0, |_| 1);
            format!("{}{}{}", &text[..sign], padding('0'), &text[sign..])
        }
        "ljust" => format!("{text}{}", padding(fill.unwrap_or(' '))),
        _ => format!("{}{text}", padding(fill.unwrap_or(' '))),
    }))
}
