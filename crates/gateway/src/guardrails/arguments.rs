//! Arguments of a tool call in an answer.
//!
//! They are JSON in a string and of use to nobody before they are whole, so they are checked whole, by the same walk over their leaves as
//! those of a prompt: an escaped letter hides nothing, and what is put in leaves them valid. What does not parse (an answer
//! that was cut) is read as it stands. Knows no wire: which field they came in is its caller's business.
//!
//! **Invariant**: arguments that parse parse afterwards; arguments in which nothing was found stay as they were, byte by byte.

use std::sync::Arc;

use super::{
    Form, Policy, Side, Verdict,
    parts::{Part, Texts},
    policy::Decision,
    scan::End,
    vault::{Restorer, Vault},
};

/// What became of arguments.
#[derive(Debug)]
pub(crate) struct CheckedArguments {
    /// With placeholders: what those who are asked may see.
    pub(crate) redacted: String,
    /// With the prompt's own values, where the policy restores them.
    pub(crate) text: String,
    /// None of it may pass.
    pub(crate) blocked_by: Option<Arc<str>>,
    pub(crate) verdicts: Vec<Verdict>,
}

impl Policy {
    /// Checks the arguments of one call. `prompt` is what the prompt's check returned, `own` what the answer's has put away so far.
    pub(crate) fn check_arguments(
        &self,
        mut text: String,
        form: Form,
        prompt: &Arc<Vault>,
        own: &mut Arc<Vault>,
    ) -> CheckedArguments {
        let part = match form {
            Form::Json => Part::Json(&mut text),
            Form::Plain => Part::Plain(&mut text),
        };
        *own = Vault::over(own);
        // A language is what people read an answer in.
        let (decision, verdicts) = self.check_parts(Side::Answer, &mut Texts::One(part), None, own);
        let blocked_by = match decision {
            Decision::Block { guardrail } => Some(guardrail),
            Decision::Pass | Decision::RouteLocal => None,
        };
        let restored = (self.restores() && !prompt.is_empty())
            .then(|| Restorer::new(Arc::clone(prompt), form).push(&text, End::Last));
        CheckedArguments { text: restored.unwrap_or_else(|| text.clone()), redacted: text, blocked_by, verdicts }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::guardrails::tests::policy;

    #[test]
    fn values_are_found_behind_escapes_and_the_prompts_own_come_back() {
        let pii = policy(
            "[[guardrails]]\nname = \"pii\"\nkind = \"pii\"\naction = \"redact\"\nrestore = true\ndetect = [\"email\", \"card\"]\n",
        );
        let mut body = json!({"prompt": "I am ann@x.org"});
        let prompt = pii.check_prompt(&mut body).vault;
        let arguments =
            r#"{"to": "[EMAIL_1]", "cc": "bob\u0040x.org", "line": "a\neve@x.org", "card": 4111111111111111}"#;
        let mut own = Arc::clone(&prompt);
        let checked = pii.check_arguments(arguments.to_owned(), Form::Json, &prompt, &mut own);
        let read = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!(
            read(&checked.text),
            json!({"to": "ann@x.org", "cc": "[EMAIL_2]", "line": "a\n[EMAIL_3]", "card": "[CARD_1]"})
        );
        assert_eq!(read(&checked.redacted)["to"], "[EMAIL_1]");
        // A second call of the answer gives the same value the same name.
        let again = pii.check_arguments(r#"{"x":"eve@x.org"}"#.to_owned(), Form::Json, &prompt, &mut own);
        assert_eq!(read(&again.text), json!({"x": "[EMAIL_3]"}));
        let untouched = "{ \"a\" : 1.50 }";
        assert_eq!(pii.check_arguments(untouched.to_owned(), Form::Json, &prompt, &mut own).text, untouched);
    }

    #[test]
    fn a_phrase_blocks_whatever_it_is_written_as() {
        let list = policy(
            "[[guardrails]]\nname = \"words\"\nkind = \"blocklist\"\naction = \"block\"\nphrases = [\"blue falcon\"]\n",
        );
        for (arguments, is_blocked) in [
            (r#"{"q": "the blue\u0020falcon"}"#, true),
            (r#"{"blue falcon": 1}"#, true),
            (r#"{"q": "the blue falcon"#, true),
            (r#"{"q": "the falcon"}"#, false),
        ] {
            let checked = list.check_arguments(arguments.to_owned(), Form::Json, &Arc::default(), &mut Arc::default());
            assert_eq!(checked.blocked_by.is_some(), is_blocked, "{arguments}");
        }
    }
}
