//! An answer on its way out, through all guardrails of a policy, piece by piece.
//!
//! Guardrails are stages in a row: what one lets go is what the next one sees; last, the prompt's own values take the place
//! of their placeholders. Each choice of an answer, and each tool call's arguments, has a filter of its own.
//!
//! Held back at most: the sum of what the stages hold back ([`super::stage`]). **Invariant**: the pieces let go, put
//! together, are the same for any cut of the text; after a block nothing comes.

use std::sync::Arc;

use super::{
    Form, Side, Verdict,
    outside::MAX_TEXT_BYTES,
    policy::Policy,
    scan::End,
    stage::Stage,
    vault::{Restorer, Vault},
};

/// What a filter lets go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Released {
    /// Text, never empty.
    Text(String),
    /// The answer ends here, with `content_filter`.
    Blocked {
        /// By this guardrail.
        guardrail: Arc<str>,
    },
}

/// The guardrails of one choice.
#[derive(Debug)]
pub struct StreamFilter {
    stages: Vec<Stage>,
    restorer: Option<Restorer>,
    /// The prompt's values, and what was put away in this answer.
    vault: Arc<Vault>,
    /// What has passed the stages, before values were put back: for those who are asked about the whole. None: nobody is.
    redacted: Option<String>,
    blocked_by: Option<Arc<str>>,
    is_finished: bool,
}

impl StreamFilter {
    /// A filter for one text of an answer. `vault` is what the prompt's check returned.
    pub fn new(policy: &Policy, vault: &Arc<Vault>, form: Form) -> Self {
        let stages = policy
            .on(Side::Answer)
            .filter_map(|guardrail| {
                let detector = guardrail.detector()?;
                Some(Stage::new(Arc::clone(guardrail), detector, form))
            })
            .collect();
        let restorer = (policy.restores() && !vault.is_empty()).then(|| Restorer::new(Arc::clone(vault), form));
        let redacted = policy.asks_outside(Side::Answer).then(String::new);
        Self { stages, restorer, vault: Vault::over(vault), redacted, blocked_by: None, is_finished: false }
    }

    /// What the prompt's check and this text have put away so far; other texts of the same answer go on with it.
    pub(crate) fn vault_mut(&mut self) -> &mut Arc<Vault> {
        &mut self.vault
    }

    /// What has passed so far as those see it who are asked about it, with placeholders; a bit more than may be asked at most.
    pub(crate) fn redacted(&self) -> &str {
        self.redacted.as_deref().unwrap_or_default()
    }

    /// Takes a piece of the answer.
    pub fn push(&mut self, piece: &str) -> Vec<Released> {
        self.advance(piece, End::Open)
    }

    /// The answer is complete: lets go what was held back. More pieces give nothing.
    pub fn finish(&mut self) -> Vec<Released> {
        self.advance("", End::Last)
    }

    /// The guardrail that ended the answer.
    pub fn blocked_by(&self) -> Option<&Arc<str>> {
        self.blocked_by.as_ref()
    }

    /// What was found so far.
    pub fn verdicts(&self) -> Vec<Verdict> {
        self.stages.iter().filter_map(|stage| stage.guardrail().verdict(Side::Answer, stage.findings())).collect()
    }

    fn advance(&mut self, piece: &str, end: End) -> Vec<Released> {
        if self.is_finished || self.blocked_by.is_some() {
            return Vec::new();
        }
        self.is_finished = end == End::Last;
        let mut end = end;
        let mut text = piece.to_owned();
        for stage in &mut self.stages {
            let step = stage.push(&text, end, &mut self.vault);
            text = step.text;
            if step.is_blocked {
                // What the later stages hold back is the end of what there is. If one of them blocks earlier in the text,
                // it is the one that ends the answer.
                end = End::Last;
                self.blocked_by = Some(Arc::clone(stage.guardrail().name()));
            }
        }
        if let Some(redacted) = self.redacted.as_mut().filter(|redacted| redacted.len() <= MAX_TEXT_BYTES) {
            redacted.push_str(&text);
        }
        if let Some(restorer) = &mut self.restorer {
            text = restorer.push(&text, end);
        }
        let mut released = Vec::new();
        if !text.is_empty() {
            released.push(Released::Text(text));
        }
        released.extend(self.blocked_by.clone().map(|guardrail| Released::Blocked { guardrail }));
        released
    }
}
