//! `[[guardrails]]` of the config file, and what each kind makes of it.
//!
//! One flat table for all kinds, so that a key that belongs to another kind can be named. **Invariant**: what compiles can be used:
//! a guardrail that could never do what its action says is refused here.

use std::{path::PathBuf, sync::Arc};

use serde::Deserialize;
use toml::Spanned;

use super::{
    Action, GuardrailError, PiiKind, Side, WordMatch,
    anchored::{MAX_RULES, RuleSet},
    blocklist::Blocklist,
    injection,
    language::Languages,
    outside::{Outside, Secrets},
    pattern, pii,
    policy::{Check, Guardrail},
    stage::Detector,
};
use crate::failure::OnFailure;

/// The largest file of phrases.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// What a guardrail looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Personal data and secrets.
    Pii,
    /// Phrases.
    Blocklist,
    /// Patterns.
    Regex,
    /// Length.
    Length,
    /// Language.
    Language,
    /// Texts that pose as instructions.
    PromptInjection,
    /// A service that is asked.
    Webhook,
    /// A model that is asked.
    Model,
}

impl Kind {
    /// As configs, verdicts and metrics name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pii => "pii",
            Self::Blocklist => "blocklist",
            Self::Regex => "regex",
            Self::Length => "length",
            Self::Language => "language",
            Self::PromptInjection => "prompt-injection",
            Self::Webhook => "webhook",
            Self::Model => "model",
        }
    }

    /// Whether it knows where in a text its matches are.
    fn knows_places(self) -> bool {
        matches!(self, Self::Pii | Self::Blocklist | Self::Regex | Self::PromptInjection)
    }
}

/// One table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuardrailConfig {
    /// How policies, verdicts and metrics name it.
    pub name: String,
    /// What it looks for.
    pub kind: Kind,
    /// What happens then.
    pub action: Action,
    /// Where it looks; absent: prompts and answers (`route-local`, `prompt-injection`: prompts).
    pub on: Option<Vec<Side>>,
    /// `redact`: whether answers get the prompt's values back.
    pub restore: Option<bool>,
    /// `pii`: what to look for; absent: everything.
    pub detect: Option<Vec<PiiKind>>,
    /// `blocklist`: the phrases.
    #[serde(default)]
    pub phrases: Vec<String>,
    /// `blocklist`: a file of phrases, one a line.
    pub file: Option<PathBuf>,
    /// `blocklist`: whole words, or anywhere.
    #[serde(rename = "match")]
    pub word_match: Option<WordMatch>,
    /// `regex`: the patterns.
    #[serde(default)]
    pub patterns: Vec<String>,
    /// `length`: the most characters.
    pub max_chars: Option<u64>,
    /// `language`: these and no others.
    #[serde(default)]
    pub allow: Vec<Spanned<String>>,
    /// `language`: all but these.
    #[serde(default)]
    pub deny: Vec<Spanned<String>>,
    /// `webhook`: where to ask.
    pub url: Option<String>,
    /// `webhook`: the environment variable that holds its bearer token.
    pub token_env: Option<String>,
    /// `model`: who to ask: `local`, a local name or `UPSTREAM/MODEL`.
    pub model: Option<Spanned<String>>,
    /// `model`: what to ask, as a Jinja template over `text` and `side`; absent: a built-in one.
    pub template: Option<String>,
    /// `webhook`, `model`: how long to wait, in milliseconds; absent: 2000, 10000.
    pub timeout_ms: Option<u64>,
    /// `webhook`, `model`: what silence means; absent: `closed`.
    pub on_failure: Option<OnFailure>,
}

impl GuardrailConfig {
    /// Checks it and builds what it needs.
    pub(super) fn compile(&self, secrets: Secrets<'_>) -> Result<Guardrail, GuardrailError> {
        self.check_keys()?;
        let check = match self.kind {
            Kind::Webhook => Check::Outside(Outside::webhook(self, secrets)?),
            Kind::Model => Check::Outside(Outside::model(self)?),
            _ => Check::Local(self.detector()?),
        };
        let by_default = match (self.action, self.kind) {
            (Action::RouteLocal, _) | (_, Kind::PromptInjection) => vec![Side::Prompt],
            _ => vec![Side::Prompt, Side::Answer],
        };
        Ok(Guardrail {
            name: Arc::from(self.name.as_str()),
            kind: self.kind.name(),
            action: self.action,
            sides: self.on.clone().unwrap_or(by_default),
            restore: self.restore.unwrap_or(false),
            check,
        })
    }

    pub(super) fn bad(&self, why: impl Into<String>) -> GuardrailError {
        GuardrailError::Config { guardrail: self.name.clone(), why: why.into() }
    }

    /// Keys that mean nothing for this kind or action.
    fn check_keys(&self) -> Result<(), GuardrailError> {
        let is_outside = matches!(self.kind, Kind::Webhook | Kind::Model);
        let keys = [
            ("restore", self.restore.is_some(), self.action == Action::Redact),
            ("detect", self.detect.is_some(), self.kind == Kind::Pii),
            ("phrases", !self.phrases.is_empty(), self.kind == Kind::Blocklist),
            ("file", self.file.is_some(), self.kind == Kind::Blocklist),
            ("match", self.word_match.is_some(), self.kind == Kind::Blocklist),
            ("patterns", !self.patterns.is_empty(), self.kind == Kind::Regex),
            ("max_chars", self.max_chars.is_some(), self.kind == Kind::Length),
            ("allow", !self.allow.is_empty(), self.kind == Kind::Language),
            ("deny", !self.deny.is_empty(), self.kind == Kind::Language),
            ("url", self.url.is_some(), self.kind == Kind::Webhook),
            ("token_env", self.token_env.is_some(), self.kind == Kind::Webhook),
            ("model", self.model.is_some(), self.kind == Kind::Model),
            ("template", self.template.is_some(), self.kind == Kind::Model),
            ("timeout_ms", self.timeout_ms.is_some(), is_outside),
            ("on_failure", self.on_failure.is_some(), is_outside),
        ];
        if let Some((key, ..)) = keys.into_iter().find(|(_, is_there, has_meaning)| *is_there && !has_meaning) {
            let kind = self.kind.name();
            return Err(self.bad(format!("`{key}` means nothing for kind `{kind}` and this action; remove it")));
        }
        if self.name.is_empty() || self.name.len() > 100 {
            return Err(self.bad("its name must have 1 to 100 bytes"));
        }
        if self.action == Action::Redact && !self.kind.knows_places() {
            return Err(self.bad(format!(
                "kind `{}` does not know which words to redact; use block, route-local or flag",
                self.kind.name()
            )));
        }
        match &self.on {
            Some(sides) if sides.is_empty() => Err(self.bad("`on` is empty; name prompt, answer or both")),
            Some(sides) if self.action == Action::RouteLocal && sides.contains(&Side::Answer) => {
                Err(self.bad("an answer has been routed already; `route-local` is for `on = [\"prompt\"]`"))
            }
            _ => Ok(()),
        }
    }

    fn detector(&self) -> Result<Detector, GuardrailError> {
        match self.kind {
            Kind::Pii => {
                let kinds = self.detect.clone().unwrap_or_else(|| PiiKind::ALL.to_vec());
                let rules = pii::rules(&kinds);
                if rules.is_empty() || rules.len() > MAX_RULES {
                    return Err(self.bad("`detect` is empty; name some, or remove it to look for everything"));
                }
                Ok(Detector::Shapes(RuleSet::new(rules)))
            }
            Kind::Regex => Ok(Detector::Rules(RuleSet::new(pattern::rules(&self.name, &self.patterns)?))),
            Kind::Blocklist => {
                let file = self.read_file()?;
                let lines = file.lines().map(str::trim).filter(|line| !line.is_empty());
                let phrases = self.phrases.iter().map(String::as_str).chain(lines);
                let word_match = self.word_match.unwrap_or_default();
                Ok(Detector::Blocklists(vec![Blocklist::new(&self.name, phrases, word_match, "phrase")?]))
            }
            Kind::PromptInjection => {
                let phrases = injection::phrases();
                let phrases = phrases.iter().map(String::as_str);
                Ok(Detector::Blocklists(vec![
                    Blocklist::new(&self.name, phrases, WordMatch::Words, "injection")?,
                    Blocklist::new(&self.name, injection::marks(), WordMatch::Anywhere, "template-mark")?,
                ]))
            }
            Kind::Length => match self.max_chars {
                Some(max) if max > 0 => Ok(Detector::MaxChars(max)),
                _ => Err(self.bad("it needs `max_chars`, the most characters a text may have")),
            },
            Kind::Language => {
                let words =
                    |list: &[Spanned<String>]| list.iter().map(|name| name.get_ref().clone()).collect::<Vec<_>>();
                Ok(Detector::Languages(Languages::new(&self.name, &words(&self.allow), &words(&self.deny))?))
            }
            Kind::Webhook | Kind::Model => Err(self.bad("it looks at no letters")),
        }
    }

    fn read_file(&self) -> Result<String, GuardrailError> {
        let Some(path) = &self.file else { return Ok(String::new()) };
        let shown = path.display();
        let size = std::fs::metadata(path).map_err(|error| self.bad(format!("cannot read {shown}: {error}")))?.len();
        if size > MAX_FILE_BYTES {
            return Err(self.bad(format!("{shown} has {size} bytes and the limit is {MAX_FILE_BYTES}; split it")));
        }
        std::fs::read_to_string(path).map_err(|error| self.bad(format!("cannot read {shown}: {error}")))
    }
}
