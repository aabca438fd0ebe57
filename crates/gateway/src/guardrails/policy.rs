//! Guardrails by name, and a tenant's ordered list of them.
//!
//! Prompts are checked here, whole: every text of a request body, in the order of the guardrails. Knows no tenant: whoever asks has
//! chosen the policy. **Invariant**: a body is changed by redaction only, and the first block ends the check.

use std::{collections::HashMap, sync::Arc};

use serde_json::Value;

use super::{
    Action, Finding, Form, GuardrailConfig, GuardrailError, Side, Verdict,
    language::SAMPLE_CHARS,
    outside::Outside,
    parts::{self, Part},
    scan::End,
    stage::{Detector, Stage},
    vault::Vault,
};

/// How much of a text is looked at in one step: bounds the memory of a check.
const PIECE_BYTES: usize = 16 * 1024;

/// A check and what is done about what it finds.
#[derive(Debug)]
pub struct Guardrail {
    pub(super) name: Arc<str>,
    pub(super) kind: &'static str,
    pub(super) action: Action,
    pub(super) sides: Vec<Side>,
    pub(super) restore: bool,
    pub(super) check: Check,
}

/// Where a guardrail looks.
#[derive(Debug)]
pub(super) enum Check {
    /// On this machine, letter by letter.
    Local(Detector),
    /// It asks someone.
    Outside(Outside),
}

impl Guardrail {
    /// Its name.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(super) fn detector(&self) -> Option<&Detector> {
        match &self.check {
            Check::Local(detector) => Some(detector),
            Check::Outside(_) => None,
        }
    }

    /// Nothing found is no verdict.
    pub(super) fn verdict(&self, side: Side, findings: Vec<Finding>) -> Option<Verdict> {
        (!findings.is_empty()).then(|| Verdict {
            guardrail: Arc::clone(&self.name),
            kind: self.kind,
            side,
            action: self.action,
            findings,
        })
    }
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It goes on.
    Pass,
    /// It goes on, and may not leave this machine.
    RouteLocal,
    /// It is refused.
    Block {
        /// By this guardrail.
        guardrail: Arc<str>,
    },
}

/// What the check of a prompt says.
#[derive(Clone, Debug)]
pub struct PromptOutcome {
    /// What becomes of the request.
    pub decision: Decision,
    /// What was found.
    pub verdicts: Vec<Verdict>,
    /// What was redacted, for the answer's filters.
    pub vault: Arc<Vault>,
}

/// An ordered list of guardrails.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    guardrails: Vec<Arc<Guardrail>>,
}

impl Policy {
    /// The guardrails of these names, out of all that a config has.
    pub fn named(known: &HashMap<String, Arc<Guardrail>>, names: &[String]) -> Result<Self, GuardrailError> {
        let find = |name: &String| {
            known.get(name).cloned().ok_or_else(|| {
                let mut known: Vec<&str> = known.keys().map(String::as_str).collect();
                known.sort_unstable();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                GuardrailError::Unknown { name: name.clone(), known }
            })
        };
        Ok(Self { guardrails: names.iter().map(find).collect::<Result<_, _>>()? })
    }

    /// All guardrails of a config, compiled.
    pub fn compile(configs: &[GuardrailConfig]) -> Result<HashMap<String, Arc<Guardrail>>, GuardrailError> {
        let mut known = HashMap::new();
        for config in configs {
            let guardrail = config.compile()?;
            if known.insert(config.name.clone(), Arc::new(guardrail)).is_some() {
                let why = "there are two of this name; rename one".to_owned();
                return Err(GuardrailError::Config { guardrail: config.name.clone(), why });
            }
        }
        Ok(known)
    }

    /// No guardrails.
    pub fn is_empty(&self) -> bool {
        self.guardrails.is_empty()
    }

    /// Those of one side, in order.
    pub(super) fn on(&self, side: Side) -> impl Iterator<Item = &Arc<Guardrail>> {
        self.guardrails.iter().filter(move |guardrail| guardrail.sides.contains(&side))
    }

    /// Whether answers get the prompt's values back.
    pub(super) fn restores(&self) -> bool {
        self.guardrails.iter().any(|guardrail| guardrail.restore)
    }

    /// Checks and redacts every text of a request's body: messages' texts, arguments and results of tools, prompts. Takes
    /// time in the length of the texts; callers of long ones move it off their async threads.
    pub fn check_prompt(&self, body: &mut Value) -> PromptOutcome {
        let mut vault = Arc::new(Vault::default());
        let mut texts = parts::texts(body);
        if self.on(Side::Prompt).any(|guardrail| guardrail.action == Action::Redact) {
            let vault = Arc::make_mut(&mut vault);
            for text in &texts {
                vault.reserve(text.text());
            }
        }
        let mut outcome = PromptOutcome { decision: Decision::Pass, verdicts: Vec::new(), vault: Arc::clone(&vault) };
        for guardrail in self.on(Side::Prompt) {
            let Some(detector) = guardrail.detector() else { continue };
            let (findings, is_blocked) = match detector {
                Detector::MaxChars(max) => check_length(*max, &texts),
                Detector::Languages(_) => check_sample(guardrail, detector, &texts),
                Detector::Rules(_) | Detector::Blocklists(_) => {
                    check_texts(guardrail, detector, &mut texts, &mut vault)
                }
            };
            let has_findings = !findings.is_empty();
            outcome.verdicts.extend(guardrail.verdict(Side::Prompt, findings));
            if is_blocked || (has_findings && guardrail.action == Action::Block) {
                outcome.decision = Decision::Block { guardrail: Arc::clone(&guardrail.name) };
                break;
            }
            if has_findings && guardrail.action == Action::RouteLocal {
                outcome.decision = Decision::RouteLocal;
            }
        }
        outcome.vault = vault;
        outcome
    }
}

/// All texts together count.
fn check_length(max: u64, texts: &[Part<'_>]) -> (Vec<Finding>, bool) {
    let num_chars: u64 = texts.iter().map(|part| part.text().chars().count() as u64).sum();
    let findings = if num_chars > max { vec![Finding { label: "length", count: 1 }] } else { Vec::new() };
    (findings, false)
}

/// A language is told by what stands in the newest texts.
fn check_sample(guardrail: &Arc<Guardrail>, detector: &Detector, texts: &[Part<'_>]) -> (Vec<Finding>, bool) {
    let mut sample: Vec<&str> = Vec::new();
    let mut num_bytes = 0;
    for part in texts.iter().rev() {
        sample.push(part.text());
        num_bytes += part.text().len();
        if num_bytes > SAMPLE_CHARS * 4 {
            break;
        }
    }
    sample.reverse();
    let mut stage = Stage::new(Arc::clone(guardrail), detector, Form::Plain);
    let step = stage.push(&sample.join("\n"), End::Last, &mut Arc::default());
    (stage.findings(), step.is_blocked)
}

fn check_texts(
    guardrail: &Arc<Guardrail>,
    detector: &Detector,
    texts: &mut [Part<'_>],
    vault: &mut Arc<Vault>,
) -> (Vec<Finding>, bool) {
    let mut findings: Vec<Finding> = Vec::new();
    let mut is_blocked = false;
    for part in texts {
        part.rewrite(&mut |text| {
            if is_blocked {
                return None;
            }
            let (rewritten, found, blocked) = filter_whole(guardrail, detector, text, vault);
            is_blocked |= blocked;
            let has_found = !found.is_empty();
            for finding in found {
                match findings.iter_mut().find(|known| known.label == finding.label) {
                    Some(known) => known.count += finding.count,
                    None => findings.push(finding),
                }
            }
            (has_found && guardrail.action == Action::Redact).then_some(rewritten)
        });
    }
    (findings, is_blocked)
}

fn filter_whole(
    guardrail: &Arc<Guardrail>,
    detector: &Detector,
    text: &str,
    vault: &mut Arc<Vault>,
) -> (String, Vec<Finding>, bool) {
    let mut stage = Stage::new(Arc::clone(guardrail), detector, Form::Plain);
    let mut rewritten = String::new();
    let mut rest = text;
    let mut is_blocked = false;
    while !rest.is_empty() && !is_blocked {
        let (piece, others) = rest.split_at(rest.floor_char_boundary(PIECE_BYTES));
        let end = if others.is_empty() { End::Last } else { End::Open };
        let step = stage.push(piece, end, vault);
        rewritten.push_str(&step.text);
        is_blocked = step.is_blocked;
        rest = others;
    }
    (rewritten, stage.findings(), is_blocked)
}
