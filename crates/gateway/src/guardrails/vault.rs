//! Placeholders for what was redacted, and their way back.
//!
//! One vault belongs to one request, and each text of its answer goes on with an own one *over* it: the prompt's values, which may be
//! many, are shared and never copied. The same value has the same placeholder wherever it stands, so that a model can still tell two people
//! apart. Where the policy says so, the answer gets the prompt's values back ([`Restorer`]); what was redacted in the answer
//! itself stays hidden. A prompt may hold a text like `[EMAIL_1]` of its own: such numbers are not given out.
//!
//! Never logged: `Debug` tells counts. **Invariant**: a placeholder stands for one value, and no text of the prompt looked like it.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::Arc,
};

use super::{Form, scan::End};

/// The most values of one request; more get a placeholder without a number, which is not restored.
const MAX_VALUES: usize = 10_000;
/// The longest placeholder: held back at most by a [`Restorer`].
const MAX_PLACEHOLDER_BYTES: usize = 40;

/// What was redacted in a request's prompt, or in an answer to it.
#[derive(Clone, Default)]
pub struct Vault {
    /// Of the prompt, where this is an answer's. It goes no deeper.
    prompt: Option<Arc<Vault>>,
    /// By placeholder.
    values: HashMap<String, String>,
    /// By label and value.
    placeholders: HashMap<(&'static str, String), String>,
    next: HashMap<&'static str, usize>,
    taken: HashSet<String>,
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vault({} values)", self.num_values())
    }
}

impl Vault {
    /// Nothing was redacted.
    pub fn is_empty(&self) -> bool {
        self.num_values() == 0
    }

    /// For an answer: what is put away in it is kept beside the prompt's own values. Of an answer's vault it is another of the
    /// same kind, with what that one has.
    pub(crate) fn over(vault: &Arc<Self>) -> Arc<Self> {
        match vault.prompt {
            Some(_) => Arc::clone(vault),
            None => Arc::new(Self { prompt: Some(Arc::clone(vault)), ..Self::default() }),
        }
    }

    fn num_values(&self) -> usize {
        self.values.len() + self.prompt.as_ref().map_or(0, |prompt| prompt.values.len())
    }

    /// This one and the prompt's.
    fn layers(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(self.prompt.as_deref())
    }

    /// Keeps numbers free that the prompt itself writes.
    pub(super) fn reserve(&mut self, text: &str) {
        for (start, _) in text.match_indices('[') {
            if let Some(placeholder) = placeholder_at(&text[start..]) {
                self.taken.insert(placeholder.to_owned());
            }
            if self.taken.len() >= MAX_VALUES {
                return;
            }
        }
    }

    /// The value's placeholder.
    pub(super) fn placeholder(&mut self, label: &'static str, value: &str) -> String {
        let word = label.to_ascii_uppercase().replace('-', "_");
        let key = (label, value.to_owned());
        if let Some(known) = self.layers().find_map(|layer| layer.placeholders.get(&key)) {
            return known.clone();
        }
        if self.num_values() >= MAX_VALUES {
            return format!("[{word}]");
        }
        let mut number = self.layers().find_map(|layer| layer.next.get(label)).copied().unwrap_or(0);
        let placeholder = loop {
            number += 1;
            let placeholder = format!("[{word}_{number}]");
            if !self.layers().any(|layer| layer.taken.contains(&placeholder)) {
                break placeholder;
            }
        };
        self.next.insert(label, number);
        self.placeholders.insert(key, placeholder.clone());
        self.values.insert(placeholder.clone(), value.to_owned());
        placeholder
    }
}

/// `[`, capitals and underscores, `_`, a number, `]` at the begin of the text.
fn placeholder_at(text: &str) -> Option<&str> {
    let length = text.bytes().take(MAX_PLACEHOLDER_BYTES).position(|byte| byte == b']')? + 1;
    let inner = &text[1..length - 1];
    let (word, number) = inner.rsplit_once('_')?;
    let is_placeholder = !word.is_empty()
        && word.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_')
        && !number.is_empty()
        && number.bytes().all(|byte| byte.is_ascii_digit());
    is_placeholder.then(|| &text[..length])
}

/// Puts a prompt's values back into a stream of text.
#[derive(Clone, Debug)]
pub(super) struct Restorer {
    vault: Arc<Vault>,
    form: Form,
    held: String,
}

impl Restorer {
    pub(super) fn new(vault: Arc<Vault>, form: Form) -> Self {
        Self { vault, form, held: String::new() }
    }

    /// What can be let go.
    pub(super) fn push(&mut self, text: &str, end: End) -> String {
        self.held.push_str(text);
        let text = std::mem::take(&mut self.held);
        let mut released = String::with_capacity(text.len());
        let mut rest = text.as_str();
        while let Some(start) = rest.find('[') {
            released.push_str(&rest[..start]);
            rest = &rest[start..];
            let known =
                placeholder_at(rest).and_then(|placeholder| Some((placeholder, self.vault.values.get(placeholder)?)));
            if let Some((placeholder, value)) = known {
                released.push_str(&self.written(value));
                rest = &rest[placeholder.len()..];
            } else if end == End::Open && self.is_begun(rest) {
                rest.clone_into(&mut self.held);
                return released;
            } else {
                released.push('[');
                rest = &rest[1..];
            }
        }
        released.push_str(rest);
        released
    }

    /// Whether some placeholder begins like this and is longer.
    fn is_begun(&self, text: &str) -> bool {
        text.len() < MAX_PLACEHOLDER_BYTES && self.vault.values.keys().any(|placeholder| placeholder.starts_with(text))
    }

    fn written(&self, value: &str) -> String {
        match self.form {
            Form::Plain => value.to_owned(),
            // Placeholders stand inside strings: what is put there is escaped as strings are.
            Form::Json => {
                let quoted = serde_json::Value::from(value).to_string();
                quoted[1..quoted.len() - 1].to_owned()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_answer_s_vault_goes_on_with_the_prompt_s_and_shares_it() {
        let mut prompt = Vault::default();
        prompt.reserve("[EMAIL_2]");
        prompt.placeholder("email", "a@x.org");
        let prompt = Arc::new(prompt);
        let mut one = Vault::over(&prompt);
        let mut other = Vault::over(&prompt);
        assert_eq!(Arc::make_mut(&mut one).placeholder("email", "a@x.org"), "[EMAIL_1]", "the prompt's own value");
        assert_eq!(Arc::make_mut(&mut one).placeholder("email", "b@x.org"), "[EMAIL_3]", "2 stands in the prompt");
        assert_eq!(Arc::make_mut(&mut one).placeholder("email", "c@x.org"), "[EMAIL_4]");
        assert_eq!(Arc::make_mut(&mut one).placeholder("email", "b@x.org"), "[EMAIL_3]");
        assert_eq!(Arc::make_mut(&mut other).placeholder("email", "c@x.org"), "[EMAIL_3]", "another answer's own");
        let more = Vault::over(&one);
        assert!(Arc::ptr_eq(&more, &one), "an answer's vault is gone on with as it is");
        let shared = |vault: &Arc<Vault>| vault.prompt.as_ref().is_some_and(|inner| Arc::ptr_eq(inner, &prompt));
        assert!(shared(&one) && shared(&other), "nothing of the prompt's values is copied");
        let mut copy = Arc::clone(&one);
        Arc::make_mut(&mut copy).placeholder("email", "d@x.org");
        assert!(shared(&copy), "nor where an answer's vault is");
    }

    #[test]
    fn a_value_has_one_placeholder_and_a_prompts_own_text_none() {
        let mut vault = Vault::default();
        vault.reserve("as in [EMAIL_1] or [x] or [EMAIL_]");
        assert_eq!(vault.placeholder("email", "a@x.org"), "[EMAIL_2]");
        assert_eq!(vault.placeholder("email", "b@x.org"), "[EMAIL_3]");
        assert_eq!(vault.placeholder("email", "a@x.org"), "[EMAIL_2]");
        assert_eq!(vault.placeholder("us-ssn", "a@x.org"), "[US_SSN_1]");
        assert!(!format!("{vault:?}").contains("x.org"));
    }

    #[test]
    fn values_are_escaped_where_they_go_into_json() {
        let mut vault = Vault::default();
        let placeholder = vault.placeholder("secret", "a\n\"b\"");
        let mut restorer = Restorer::new(Arc::new(vault), Form::Json);
        let text = restorer.push(&format!("{{\"key\":\"{placeholder}\"}}"), End::Last);
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap()["key"], "a\n\"b\"");
    }

    proptest! {
        #[test]
        fn a_streams_pieces_restore_like_the_whole(
            parts in prop::collection::vec(prop::sample::select(vec![
                "[EMAIL_1]", "[EMAIL_2]", "[EMAIL_", "[", "]", "EMAIL_1]", "x", "[[EMAIL_1", "é", "[CARD_1]",
            ]), 0..12),
            cuts in prop::collection::vec(0_usize..80, 0..8),
        ) {
            let mut vault = Vault::default();
            vault.placeholder("email", "a@x.org");
            let vault = Arc::new(vault);
            let text = parts.concat();
            let mut restorer = Restorer::new(Arc::clone(&vault), Form::Plain);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).filter(|cut| text.is_char_boundary(*cut)).collect();
            cuts.sort_unstable();
            let mut released = String::new();
            let mut from = 0;
            for cut in cuts {
                released += &restorer.push(&text[from..cut], End::Open);
                prop_assert!(restorer.held.len() < MAX_PLACEHOLDER_BYTES);
                from = cut;
            }
            released += &restorer.push(&text[from..], End::Last);
            prop_assert_eq!(released, text.replace("[EMAIL_1]", "a@x.org"));
        }
    }
}
