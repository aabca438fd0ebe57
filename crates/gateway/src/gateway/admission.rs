//! What is asked of a request before it becomes an exchange: its tenant, its limits, the guardrails of its prompt.
//!
//! Knows bodies as JSON. Invariant: who is turned away has a record in the log, and has spent nothing.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
    time::Duration,
};

use serde_json::{Map, Value};

use super::{
    BlockedBecause, Exchange, Gateway, GatewayError, Tenant,
    call::SharedTold,
    class_of,
    exchange::{self, kept, record_of},
    facts,
    transcript::Transcript,
};
use crate::{
    audit::{Contents, Pending, record::RequestRecord},
    clock::UnixMillis,
    guardrails::{Decision, PromptOutcome, Vault, Verdict},
    keys::{Credential, KeyGrant},
    ledger::{self, PromptSize},
    limits::{Ask, Limited},
    providers::{Refusal, UnmappedFields},
};

/// Output tokens that are assumed for limits where neither request, tenant nor model says how many there can be.
const ASSUMED_OUTPUT_TOKENS: u64 = 4096;

/// What `/v1/completions` gives where a request names no limit, by OpenAI's documentation.
pub const DEFAULT_COMPLETION_TOKENS: u64 = 16;

/// Which of OpenAI's routes a request came by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireRoute {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

/// A request as the server has it.
#[derive(Debug)]
pub struct Asked<'a> {
    /// Its tenant's name; None: nobody's in particular.
    pub tenant: Option<&'a str>,
    /// What it showed.
    pub credential: Credential,
    /// What its key takes away of what the tenant may; None: nothing.
    pub grant: Option<Arc<KeyGrant>>,
    /// How it came.
    pub wire: WireRoute,
    /// Its body.
    pub body: Map<String, Value>,
    /// The model's name where the body names none.
    pub default_model: &'a str,
    /// `x-bindery-task`
    pub task: Option<&'a str>,
    /// `x-bindery-privacy`: a class, or several with commas between, the tightest of which counts.
    pub privacy: Option<&'a str>,
    /// Its id.
    pub request_id: &'a str,
    /// How long its sender waits from now; None: as long as it takes.
    pub time_left: Option<Duration>,
    /// Now.
    pub now: UnixMillis,
}

impl Asked<'_> {
    /// The name of the model that it is for.
    fn model(&self) -> &str {
        self.body.get("model").and_then(Value::as_str).unwrap_or(self.default_model)
    }
}

/// A request that is answered by its refusal, and whose record is on its way.
#[derive(Debug)]
pub struct TurnedAway {
    /// Why.
    pub error: GatewayError,
    record: Option<Pending>,
}

impl TurnedAway {
    /// Why, once that is in the log.
    pub async fn told(self) -> GatewayError {
        match self.record {
            Some(record) => record.kept().await.map_or_else(GatewayError::Audit, |_| self.error),
            None => self.error,
        }
    }
}

/// What is known of a request that may be turned away.
#[derive(Default)]
struct Seen {
    verdicts: Vec<Verdict>,
    contents: Option<Contents>,
}

/// What the guardrails of a prompt leave.
#[derive(Default)]
struct Checked {
    vault: Arc<Vault>,
    must_stay: bool,
}

/// A request that cannot be read, so that of it only its sender is known.
#[derive(Clone, Debug)]
pub struct Unreadable<'a> {
    /// Its tenant's name; None: nobody's in particular.
    pub tenant: Option<&'a str>,
    /// What it showed.
    pub credential: &'a Credential,
    /// Its id.
    pub request_id: &'a str,
    /// What is wrong with it, as its error's code.
    pub code: &'a str,
}

impl Gateway {
    /// Has the log tell of a request that is refused before it can be looked at.
    ///
    /// # Errors
    /// [`GatewayError::Audit`]
    pub async fn log_unreadable(&self, asked: Unreadable<'_>) -> Result<(), GatewayError> {
        // A stranger is nobody here, so it is in nobody's log.
        let Ok(tenant) = self.tenant(asked.tenant) else { return Ok(()) };
        self.0.meters.request(tenant.config.id.as_str(), "", asked.code, &[]);
        let Some(audit) = &self.0.audit else { return Ok(()) };
        let outcome = asked.code.to_owned();
        let record = RequestRecord { outcome, ..record_of(asked.request_id, tenant, asked.credential) };
        kept(audit.record(record, None)).await
    }

    /// Admits a request under its tenant's limits and checks its prompt.
    ///
    /// # Errors
    /// A limit that is met, a guardrail that blocks, a header that is none: each in the log.
    pub fn begin(&self, asked: Asked<'_>) -> Result<Exchange, TurnedAway> {
        let tenant = match self.tenant(asked.tenant) {
            Ok(tenant) => Arc::clone(tenant),
            // Nobody here, so nobody's log.
            Err(error) => return Err(TurnedAway { error, record: None }),
        };
        let mut record = RequestRecord {
            asked: exchange::asked(asked.model()),
            ..record_of(asked.request_id, &tenant, &asked.credential)
        };
        let mut seen = Seen::default();
        self.admit(asked, tenant, &mut seen).map_err(|error| {
            record.outcome = error.shown().2;
            self.0.meters.request(&record.tenant, "", &record.outcome, &seen.verdicts);
            record.verdicts = seen.verdicts;
            let record = self.0.audit.as_ref().map(|audit| audit.record(record, seen.contents));
            TurnedAway { error, record }
        })
    }

    fn admit(&self, asked: Asked<'_>, tenant: Arc<Tenant>, seen: &mut Seen) -> Result<Exchange, GatewayError> {
        let privacy = class_of(tenant.config.routing.privacy, asked.privacy)?;
        let model = asked.model().to_owned();
        let mut body = Value::Object(asked.body);
        let size = facts::size_of(&body);
        let mut under = vec![(Limited::Tenant(tenant.config.id.clone()), tenant.config.limits)];
        // Both must hold; the tighter one is told.
        if let (Some(grant), Credential::Key(key)) = (&asked.grant, &asked.credential)
            && grant.is_limited()
        {
            under.push((Limited::Key(key.clone()), grant.limits));
        }
        let least = under.iter().filter_map(|(_, limits)| limits.tokens_per_minute).min();
        let max_tokens = expected_tokens(&body, size, (asked.wire, tenant.config.max_output_tokens), least);
        let mut permit = self.0.limiter.admit(&Ask { under: &under, max_tokens }, asked.now)?;
        // Whoever is turned away has used nothing.
        let checked = self.check(&tenant, &mut body, seen).and_then(|checked| {
            refuse_lost_logprobs(&tenant, &body)?;
            Ok(checked)
        });
        let Checked { vault, must_stay } = checked.inspect_err(|_| permit.settle(0, asked.now))?;
        let transcript = self.transcript(&tenant, &body);
        Ok(Exchange {
            gateway: self.clone(),
            transcript,
            tenant,
            credential: asked.credential,
            grant: asked.grant,
            wire: asked.wire,
            body,
            model,
            task: asked.task.map(str::to_owned),
            privacy,
            must_stay,
            draw: draw(),
            size,
            permit,
            vault,
            verdicts: std::mem::take(&mut seen.verdicts),
            request_id: asked.request_id.to_owned(),
            why: String::new(),
            started: asked.now,
            num_used_tokens: 0,
            told: SharedTold::default(),
            is_logged: false,
            time_left: asked.time_left,
        })
    }

    /// The prompt before its tenant's guardrails.
    fn check(&self, tenant: &Tenant, body: &mut Value, seen: &mut Seen) -> Result<Checked, GatewayError> {
        if tenant.policy.reads_prompts() && facts::has_token_ids(body) {
            let message = "prompt holds token ids, which this tenant's guardrails cannot read: send its text";
            return Err(Refusal::unsupported("prompt", message.to_owned()).into());
        }
        if tenant.policy.is_empty() {
            return Ok(Checked::default());
        }
        let PromptOutcome { decision, verdicts, vault } = tenant.policy.check_prompt(body);
        seen.verdicts = verdicts;
        match decision {
            Decision::Pass => Ok(Checked { vault, must_stay: false }),
            Decision::RouteLocal => Ok(Checked { vault, must_stay: true }),
            Decision::Block { guardrail } => {
                seen.contents = self.transcript(tenant, body).map(|transcript| transcript.contents());
                Err(GatewayError::Blocked { guardrail, because: BlockedBecause::Found })
            }
        }
    }

    /// Where the tenant's policy stores prompts and answers, and the log keeps them.
    fn transcript(&self, tenant: &Tenant, body: &Value) -> Option<Transcript> {
        let max_bytes = self.0.max_contents_bytes.filter(|_| tenant.config.store_contents)?;
        Some(Transcript::of(body, max_bytes))
    }
}

/// Where nothing may be dropped, log-probabilities that the answer's guardrails take away are refused.
fn refuse_lost_logprobs(tenant: &Tenant, body: &Value) -> Result<(), GatewayError> {
    if tenant.config.fields == UnmappedFields::Refuse && exchange::loses_logprobs(tenant, body) {
        let message =
            "this tenant's guardrails may change answers, so their log-probabilities are not told: leave it out";
        return Err(Refusal::unsupported("logprobs", message.to_owned()).into());
    }
    Ok(())
}

/// Evenly spread over 0..1, and nothing that a request brings decides it: who could would choose its arm of a comparison.
pub(super) fn draw() -> f64 {
    // Keyed anew at each call, by the process's own random numbers.
    let bits = RandomState::new().hash_one(()) >> 16;
    bits as f64 / (1_u64 << 48) as f64
}

/// Tokens that a request is charged at its admission: the bound of its prompt and what it asks for in all its answers, or what it
/// gets where it names nothing. What is only assumed never asks for more than a whole minute's worth, which would let nobody in.
fn expected_tokens(
    body: &Value,
    size: PromptSize,
    (wire, default_output): (WireRoute, Option<u64>),
    tokens_per_minute: Option<u64>,
) -> u64 {
    let prompt = ledger::max_prompt_tokens(size, 0);
    let given = facts::named_output(body)
        .or(default_output)
        .or((wire == WireRoute::Completions).then_some(DEFAULT_COMPLETION_TOKENS));
    let num_answers = facts::num_answers(body);
    let output = given.unwrap_or_else(|| {
        let room = tokens_per_minute.map_or(u64::MAX, |limit| limit.saturating_sub(prompt) / num_answers);
        ASSUMED_OUTPUT_TOKENS.min(room)
    });
    prompt.saturating_add(output.saturating_mul(num_answers))
}
