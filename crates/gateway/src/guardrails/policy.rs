//! Guardrails by name, and a tenant's ordered list of them.
//!
//! Prompts are checked here, whole: every text of a request body, in the order of the guardrails. Knows no tenant: whoever asks has
//! chosen the policy. **Invariant**: a body is changed by redaction only, and the first block ends the check.

use std::{collections::HashMap, sync::Arc};

use serde_json::Value;

use super::{
    Action, Finding, Form, GuardrailConfig, GuardrailError, Side, Verdict,
    language::{self, Languages},
    outside::{MAX_TEXT_BYTES, Outside, Secrets},
    parts::{Of, Texts},
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

    fn asks_language(&self) -> bool {
        matches!(self.detector(), Some(Detector::Languages(_)))
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

    /// All guardrails of a config, compiled; `secrets` gives the tokens of web hooks.
    pub fn compile(
        configs: &[GuardrailConfig],
        secrets: Secrets<'_>,
    ) -> Result<HashMap<String, Arc<Guardrail>>, GuardrailError> {
        let mut known = HashMap::new();
        for config in configs {
            let guardrail = config.compile(secrets)?;
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
        let sample =
            self.on(Side::Prompt).any(|guardrail| guardrail.asks_language()).then(|| language::sample_of(body));
        let mut vault = Arc::new(Vault::default());
        let mut texts = Texts::Body(body);
        if self.on(Side::Prompt).any(|guardrail| guardrail.action == Action::Redact) {
            let vault = Arc::make_mut(&mut vault);
            texts.read(|text, _| vault.reserve(text));
        }
        let (decision, verdicts) = self.check_parts(Side::Prompt, &mut texts, sample.as_deref(), &mut vault);
        PromptOutcome { decision, verdicts, vault }
    }

    /// Goes through all guardrails of a side that look on this machine. Languages are told by the sample; without one nobody looks
    /// for them.
    pub(super) fn check_parts(
        &self,
        side: Side,
        texts: &mut Texts<'_>,
        sample: Option<&str>,
        vault: &mut Arc<Vault>,
    ) -> (Decision, Vec<Verdict>) {
        let (mut decision, mut verdicts) = (Decision::Pass, Vec::new());
        for guardrail in self.on(side) {
            let Some(detector) = guardrail.detector() else { continue };
            let (findings, is_blocked) = match detector {
                Detector::MaxChars(max) => check_length(*max, texts),
                Detector::Languages(languages) => check_sample(languages, sample.unwrap_or_default()),
                Detector::Rules(_) | Detector::Shapes(_) | Detector::Blocklists(_) => {
                    check_texts(guardrail, detector, texts, vault)
                }
            };
            let has_findings = !findings.is_empty();
            verdicts.extend(guardrail.verdict(side, findings));
            if is_blocked || (has_findings && guardrail.action == Action::Block) {
                decision = Decision::Block { guardrail: Arc::clone(&guardrail.name) };
                break;
            }
            if has_findings && guardrail.action == Action::RouteLocal {
                decision = Decision::RouteLocal;
            }
        }
        (decision, verdicts)
    }

    /// All texts of a request that its model reads, for those who are asked about them: as they stand in the body.
    pub fn prompt_text(body: &mut Value) -> String {
        let mut all = String::new();
        Texts::Body(body).read(|text, of| {
            // More is too long to be asked about in any case.
            if of == Of::PartOfRun || all.len() > MAX_TEXT_BYTES {
                return;
            }
            if !all.is_empty() {
                all.push_str("\n\n");
            }
            all.push_str(text);
        });
        all
    }

    /// Whether anybody looks at prompts.
    pub fn reads_prompts(&self) -> bool {
        self.on(Side::Prompt).next().is_some()
    }

    /// Whether answers come out other than they went in, so that what tells of their tokens must not pass beside them.
    pub fn changes_answers(&self) -> bool {
        let changes = |guardrail: &Arc<Guardrail>| {
            guardrail.detector().is_some() && matches!(guardrail.action, Action::Block | Action::Redact)
        };
        self.on(Side::Answer).any(changes) || self.restores()
    }
}

/// All texts together count.
fn check_length(max: u64, texts: &mut Texts<'_>) -> (Vec<Finding>, bool) {
    let mut num_chars = 0;
    texts.read(|text, of| num_chars += if of == Of::PartOfRun { 0 } else { text.chars().count() as u64 });
    let findings = if num_chars > max { vec![Finding { label: "length", count: 1 }] } else { Vec::new() };
    (findings, false)
}

/// All of the sample counts.
fn check_sample(languages: &Languages, sample: &str) -> (Vec<Finding>, bool) {
    let is_admitted = languages.admit(sample);
    (if is_admitted { Vec::new() } else { vec![Finding { label: "language", count: 1 }] }, false)
}

fn check_texts(
    guardrail: &Arc<Guardrail>,
    detector: &Detector,
    texts: &mut Texts<'_>,
    vault: &mut Arc<Vault>,
) -> (Vec<Finding>, bool) {
    let mut findings: Vec<Finding> = Vec::new();
    let (mut is_blocked, mut have_parts_found) = (false, false);
    let redacts = guardrail.action == Action::Redact;
    texts.rewrite(&mut |text, of| {
        if is_blocked {
            return None;
        }
        let (rewritten, found, blocked) = filter_whole(guardrail, detector, text, vault);
        is_blocked |= blocked;
        let has_found = !found.is_empty();
        // What was found in a part and stays there is found in its run again.
        let is_new = of != Of::Run || redacts || !have_parts_found;
        have_parts_found = of == Of::PartOfRun && (has_found || have_parts_found);
        for finding in found.into_iter().filter(|_| is_new) {
            match findings.iter_mut().find(|known| known.label == finding.label) {
                Some(known) => known.count += finding.count,
                None => findings.push(finding),
            }
        }
        (has_found && redacts).then_some(rewritten)
    });
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
