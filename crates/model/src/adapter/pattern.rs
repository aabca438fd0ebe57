//! Names matched as peft matches them: by Python's `re`, on names of modules.
//!
//! Most keys are plain names, and an adapter may have one for each of its modules, so those are compared as they stand; only
//! the others become expressions. It must not know what a match means. Its invariant: what the `regex` crate cannot express
//! as Python means it (looking around, references back) is an error, never a guess.

use regex::{Captures, Regex, RegexBuilder};

/// Memory of a compiled expression. Those in use take some kB.
const MAX_COMPILED_BYTES: usize = 1 << 20;
/// Characters of an expression. Those in use have some hundreds.
const MAX_EXPRESSION_BYTES: usize = 16 << 10;

/// A key of rank_pattern or alpha_pattern: `re.match(rf"(.*\.)?({key})$", name)` (peft's `get_pattern_key`; before 0.15 the
/// part in front had to be there, so whatever matched then matches now).
#[derive(Debug)]
pub(super) enum SuffixPattern {
    /// Letters, digits, underscores and points; a point is any character.
    Plain(String),
    Expression(Regex),
}

impl SuffixPattern {
    /// The text of an error says what is wrong with the expression.
    pub(super) fn new(key: &str) -> Result<Self, String> {
        if key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'.') {
            return Ok(Self::Plain(key.to_owned()));
        }
        compiled(key, &format!(r"^(?:.*\.)?(?:{key})$")).map(Self::Expression)
    }

    pub(super) fn matches(&self, name: &str) -> bool {
        match self {
            Self::Plain(key) => {
                let Some(start) = name.len().checked_sub(key.len()) else { return false };
                let (front, end) = name.as_bytes().split_at(start);
                let same = end.iter().zip(key.bytes()).all(|(&byte, key)| key == b'.' || byte == key);
                same && front.last().is_none_or(|&last| last == b'.')
            }
            Self::Expression(regex) => regex.is_match(name),
        }
    }

    pub(super) fn is_expression(&self) -> bool {
        matches!(self, Self::Expression(_))
    }
}

/// `re.fullmatch(expression, name)`, as target_modules and exclude_modules are matched where they are one text.
pub(super) fn whole(expression: &str) -> Result<Regex, String> {
    compiled(expression, &format!("^(?:{expression})$"))
}

/// Finds the layer's number in the name of a module, as layers_pattern is matched.
pub(super) fn layer(pattern: &str) -> Result<Regex, String> {
    compiled(pattern, &format!(r"(?:^|.*?\.){pattern}\.(?<layer>[0-9]+)\."))
}

/// By the first of such expressions that fits; `re.match` looks at the start of the name alone. None: it finds no number.
pub(super) fn layer_of(module: &str, layers: &[Regex]) -> Option<u64> {
    let at_start = |found: &Captures<'_>| found.get(0).is_some_and(|whole| whole.start() == 0);
    let found = layers.iter().find_map(|regex| regex.captures(module).filter(at_start))?;
    found.name("layer")?.as_str().parse().ok()
}

fn compiled(expression: &str, whole: &str) -> Result<Regex, String> {
    if expression.len() > MAX_EXPRESSION_BYTES {
        return Err(format!("it has {} bytes; at most {MAX_EXPRESSION_BYTES} are read", expression.len()));
    }
    // The crate's own text draws the expression over several lines; its last line says what is wrong.
    RegexBuilder::new(whole).size_limit(MAX_COMPILED_BYTES).build().map_err(|error| {
        let text = error.to_string();
        text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned()
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests; clippy only knows a plain cfg(test)")]
    use super::*;

    const Q: &str = "model.layers.10.self_attn.q_proj";

    #[test]
    fn keys_match_as_in_peft() {
        // Expected values: re.match(rf"(.*\.)?({key})$", name) in Python.
        for (key, name, expected) in [
            ("q_proj", Q, true),
            ("proj", Q, false),
            ("self_attn.q_proj", Q, true),
            ("0.self_attn.q_proj", Q, false),
            ("layers.10.self_attn.q_proj", Q, true),
            (Q, Q, true),
            ("x.model.layers.10.self_attn.q_proj", Q, false),
            // Points are any character in the key.
            ("self_attn.q.proj", Q, true),
            ("", Q, false),
            ("^model.layers.10.self_attn.q_proj", Q, true),
            ("^layers.10.self_attn.q_proj", Q, false),
            (r"layers\.1\d\..*", Q, true),
            (r"layers\.\d\..*", Q, false),
            ("(q|k)_proj", Q, true),
            ("q_proj|v_proj", Q, true),
            (".*q_proj", Q, true),
            ("q_pro", Q, false),
            ("[qv]_proj", "q_proj", true),
            ("q_proj", "q_proj", true),
        ] {
            assert_eq!(SuffixPattern::new(key).unwrap().matches(name), expected, "{key:?}");
        }
    }

    #[test]
    fn a_plain_key_means_what_it_means_as_an_expression() {
        for key in
            ["q_proj", "proj", "0.self_attn.q_proj", "layers.10.self_attn.q_proj", "n.q.proj", "", ".", "....._proj"]
        {
            let plain = SuffixPattern::new(key).unwrap();
            assert!(!plain.is_expression());
            let expression = Regex::new(&format!(r"^(?:.*\.)?(?:{key})$")).unwrap();
            for name in [Q, "q_proj", "", "model", "a.q_proj"] {
                assert_eq!(plain.matches(name), expression.is_match(name), "{key:?} on {name:?}");
            }
        }
    }

    #[test]
    fn what_cannot_be_expressed_is_an_error() {
        for key in ["(?!q)k_proj", r"(q)\1_proj", "(", "a{1000000000}", &"(a)".repeat(10_000)] {
            assert!(SuffixPattern::new(key).is_err(), "{key:.20}");
        }
        assert!(whole("(?<=x)y").unwrap_err().contains("look-around"));
        assert!(whole(r".*\.(q|v)_proj").unwrap().is_match(Q));
        assert!(!whole(r"(q|v)_proj").unwrap().is_match(Q));
    }
}
