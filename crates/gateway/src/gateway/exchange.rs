//! One request, from its route to what it cost.
//!
//! Knows bodies as JSON and places by name; it must not know sockets or engines. Invariant: whatever becomes of an exchange,
//! its place under the limits is given back, money set aside for a call that was sent is settled or charged in full, and the
//! log has one record of it: from whoever ended it, else from its drop.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use serde_json::Value;

use super::{
    AnswerFilters, Gateway, GatewayError, Tenant, WireRoute,
    call::{SharedTold, Told, counts, date, money, outcome_word},
    facts,
    meters::LOCAL,
    moment,
    transcript::Transcript,
};
use crate::{
    audit::{
        Pending,
        record::{ModelUsed, RequestRecord, RouteTaken, TokenCounts},
    },
    clock::UnixMillis,
    failure::OnFailure,
    guardrails::{Vault, Verdict},
    keys::{Credential, KeyGrant},
    ledger::{Call, Ledger, LedgerError, LedgerRoute, Outcome, PromptSize, RequestStatus},
    limits::Permit,
    money::Money,
    policy::{Condition, Facts, LocalState, PrivacyClass, Route, Target, route::LocalName},
    providers::{Usage, Warnings},
};

/// Texts up to this are looked through on the thread that asks: some hundred microseconds.
const MAX_INLINE_BYTES: u64 = 64 << 10;

/// One request on its way.
pub struct Exchange {
    pub(super) gateway: Gateway,
    pub(super) tenant: Arc<Tenant>,
    pub(super) credential: Credential,
    pub(super) grant: Option<Arc<KeyGrant>>,
    pub(super) wire: WireRoute,
    pub(super) body: Value,
    pub(super) model: String,
    pub(super) task: Option<String>,
    pub(super) privacy: PrivacyClass,
    pub(super) must_stay: bool,
    pub(super) draw: f64,
    pub(super) size: PromptSize,
    pub(super) permit: Permit,
    pub(super) vault: Arc<Vault>,
    pub(super) verdicts: Vec<Verdict>,
    /// None: the tenant has nothing stored.
    pub(super) transcript: Option<Transcript>,
    pub(super) request_id: String,
    /// Of the route.
    pub(super) why: String,
    pub(super) started: UnixMillis,
    /// Tokens of its calls that have ended, failed ones among them.
    pub(super) num_used_tokens: u64,
    pub(super) told: SharedTold,
    pub(super) is_logged: bool,
    /// From then on.
    pub(super) time_left: Option<Duration>,
}

/// What a request used here.
#[derive(Clone, Copy, Debug, Default)]
pub struct LocalUse {
    /// Of the prompt.
    pub num_prompt_tokens: u64,
    /// Of the answer.
    pub num_completion_tokens: u64,
    /// The share of this machine's time that it took.
    pub machine_time: Duration,
}

impl LocalUse {
    pub(super) fn usage(&self) -> Usage {
        Usage { prompt: self.num_prompt_tokens, completion: self.num_completion_tokens, ..Usage::default() }
    }
}

impl Exchange {
    /// Which places to try, in order.
    ///
    /// # Errors
    /// By what forbids all of them.
    pub async fn route(
        &mut self,
        local: LocalState,
        now: UnixMillis,
        local_name: &(dyn Fn(&str) -> LocalName + Sync),
    ) -> Result<Route, GatewayError> {
        let text = |name: &str| self.body.get(name).and_then(Value::as_str);
        // What takes time is found out only where a rule of the model asks for it.
        let wanted = |asks: &dyn Fn(&Condition) -> bool| {
            let model = self.gateway.0.router.virtual_models.get(self.model.as_str());
            model.is_some_and(|model| model.rules.iter().any(|rule| asks(&rule.when)))
        };
        let personal = self.verdicts.iter().any(|verdict| verdict.kind == "pii")
            || wanted(&|when| when.personal_data.is_some()) && self.holds_personal_data().await?;
        let language = if wanted(&|when| when.languages.is_some()) { facts::language(&self.body) } else { None };
        let budget_left =
            if wanted(&|when| when.budget_left_under.is_some()) { self.budget_left(now).await? } else { None };
        let facts = Facts {
            tenant: &self.tenant.config.routing,
            grant: self.grant.as_deref(),
            privacy: self.privacy,
            task: self.task.as_deref(),
            reasoning_effort: text("reasoning_effort"),
            has_tools: facts::has_tools(&self.body),
            has_images: self.size.num_images > 0,
            prompt_tokens: facts::estimated_tokens(self.size),
            has_personal_data: personal,
            must_stay: self.must_stay,
            language,
            budget_left,
            local,
            now: moment(now),
            draw: self.draw,
        };
        let route = self.gateway.0.router.route(&self.model, &facts, local_name)?;
        self.why = route.why.join("; ");
        Ok(route)
    }

    /// Whether there is personal data that no guardrail of the tenant has looked for.
    async fn holds_personal_data(&self) -> Result<bool, GatewayError> {
        let (gateway, mut body) = (self.gateway.clone(), self.body.clone());
        aside(self.size.num_bytes, move || !gateway.0.personal_data.check_prompt(&mut body).verdicts.is_empty()).await
    }

    /// The least of what is left of the tenant's budgets; None: it has none.
    async fn budget_left(&self, now: UnixMillis) -> Result<Option<Money>, GatewayError> {
        let Some(ledger) = &self.gateway.0.ledger else { return Ok(None) };
        Ok(ledger.least_left(&self.tenant.config.budgets, now).await?)
    }

    /// Headers that tell the tenant how its limits stand.
    pub fn rate_headers(&self) -> Vec<(&'static str, String)> {
        self.permit.headers().pairs()
    }

    /// Tokens of its prompt, about.
    pub fn estimated_prompt_tokens(&self) -> usize {
        facts::estimated_tokens(self.size)
    }

    /// The longest answer where the request names no limit.
    pub fn default_output_tokens(&self) -> Option<u64> {
        self.tenant.config.max_output_tokens
    }

    /// A place of the route is not tried, or gave the request back: the log says why.
    pub fn passed_over(&mut self, place: &Target, why: &str) {
        self.why = format!("{}; {place} is passed over: {why}", self.why);
    }

    /// Fields that the answer's guardrails take away, as `x-bindery-warning` says it.
    pub fn warnings(&self) -> Warnings {
        let mut warnings = Warnings::default();
        if loses_logprobs(&self.tenant, &self.body) {
            warnings.drop("logprobs");
        }
        warnings
    }

    /// What guardrails said.
    pub fn verdicts(&self) -> &[Verdict] {
        &self.verdicts
    }

    /// What the answer passes on its way to the client; None: nothing is to be filtered, and nothing kept of it. An answer
    /// that comes whole from upstream has passed it already.
    pub fn filters(&self) -> Option<AnswerFilters> {
        let policy = &self.tenant.policy;
        let is_needed = !policy.is_empty() || self.transcript.is_some();
        is_needed.then(|| AnswerFilters::new(policy.clone(), Arc::clone(&self.vault), self.transcript.clone()))
    }

    /// Adds what was found in the answer.
    pub fn note(&mut self, verdicts: Vec<Verdict>) {
        self.verdicts.extend(verdicts);
    }

    /// Ends it without an answer: in the log, and then with its error.
    pub async fn give_up(&mut self, error: GatewayError) -> GatewayError {
        let outcome = match &error {
            GatewayError::Upstream(_) => "failed".to_owned(),
            refused => refused.shown().2,
        };
        self.tell(|told| told.outcome = Some(outcome));
        match self.log().await {
            Ok(()) => error,
            Err(unlogged) => unlogged,
        }
    }

    /// Ends it where its own time is up before another place was tried.
    ///
    /// # Errors
    /// [`GatewayError::Audit`] where the log cannot be written and must be.
    pub async fn time_out(&mut self) -> Result<(), GatewayError> {
        self.tell(|told| told.outcome = Some("request_timeout".to_owned()));
        self.log().await
    }

    /// Ends it where this machine itself has turned it down: in the log alone, for nothing was computed.
    ///
    /// # Errors
    /// [`GatewayError::Audit`] where the log cannot be written and must be.
    pub async fn turn_down(&mut self) -> Result<(), GatewayError> {
        self.tell(|told| (told.to, told.outcome) = (LOCAL.to_owned(), Some("refused".to_owned())));
        self.log().await
    }

    /// The body for the local model, as guardrails left it; None: as it came.
    pub fn local_body(&mut self, target: &Target) -> Option<Bytes> {
        if self.tenant.policy.is_empty() && matches!(target, Target::LocalModel(name) if **name == *self.model) {
            return None;
        }
        if let Some(map) = self.body.as_object_mut() {
            match target {
                Target::LocalModel(name) => {
                    map.insert("model".to_owned(), Value::String(name.to_string()));
                }
                // The base, by whatever name it has.
                Target::Local => {
                    map.remove("model");
                }
                Target::Upstream { .. } => {}
            }
        }
        Some(serde_json::to_vec(&self.body).map_or_else(|_| Bytes::new(), Bytes::from))
    }

    /// Whether it may run here now: where an answer needs its row, none is begun that would not get it.
    ///
    /// # Errors
    /// [`GatewayError::Ledger`] while the store does not take rows.
    pub fn may_run_here(&self) -> Result<(), GatewayError> {
        let gateway = &self.gateway.0;
        let trouble = gateway.ledger.as_ref().and_then(Ledger::trouble);
        match trouble.filter(|_| gateway.on_store_failure == OnFailure::Closed) {
            Some(error) => Err(LedgerError::Store(error).into()),
            None => Ok(()),
        }
    }

    /// Accounts for what ran here: committed when this returns, or done later where the store does not answer.
    ///
    /// # Errors
    /// [`GatewayError::Audit`] and [`GatewayError::Ledger`] where log or store cannot be written and must be: then the answer must
    /// not end well.
    pub async fn settle_local(
        &mut self,
        used: LocalUse,
        status: RequestStatus,
        model: ModelUsed,
        now: UnixMillis,
    ) -> Result<(), GatewayError> {
        let (call, outcome) = self.ended_here(&used, status, model, now);
        let Some(ledger) = &self.gateway.0.ledger else { return self.log().await };
        let recorded = ledger.record_local(&call, outcome, now).await;
        let Err(error) = recorded else { return self.log().await };
        tracing::warn!(%error, "a local request's row waits for the store");
        let is_closed = self.gateway.0.on_store_failure == OnFailure::Closed;
        let error = GatewayError::Ledger(error);
        if is_closed {
            // Its sender gets no whole answer.
            self.tell(|told| told.outcome = Some(error.shown().2));
        }
        self.log().await?;
        if is_closed { Err(error) } else { Ok(()) }
    }

    /// The same where nobody can wait: in a drop.
    pub fn settle_local_later(&mut self, used: LocalUse, status: RequestStatus, model: ModelUsed, now: UnixMillis) {
        let (call, outcome) = self.ended_here(&used, status, model, now);
        if let Some(ledger) = &self.gateway.0.ledger {
            ledger.record_local_later(&call, outcome, now);
        }
        let _pending = self.enter();
    }

    /// Counts tokens of a call that has ended.
    pub(super) fn spend(&mut self, usage: &Usage, now: UnixMillis) {
        self.num_used_tokens = self.num_used_tokens.saturating_add(usage.total());
        self.permit.settle(self.num_used_tokens, now);
    }

    pub(super) fn tell(&self, tell: impl FnOnce(&mut Told)) {
        tell(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The log's one record, where there is a log.
    pub(super) async fn log(&mut self) -> Result<(), GatewayError> {
        match self.enter() {
            Some(record) => kept(record).await,
            None => Ok(()),
        }
    }

    /// Hands the record over, once; None: there is no log, or it has it.
    fn enter(&mut self) -> Option<Pending> {
        if std::mem::replace(&mut self.is_logged, true) {
            return None;
        }
        // What was charged at its admission is a bound: whoever was turned away, or left, pays what was used.
        let used = self.told.lock().unwrap_or_else(PoisonError::into_inner).usage.total();
        self.permit.settle(self.num_used_tokens.max(used), UnixMillis::now());
        let record = self.record();
        self.gateway.0.meters.request(&record.tenant, &record.route.to, &record.outcome, &record.verdicts);
        let audit = self.gateway.0.audit.as_ref()?;
        let contents = self.transcript.as_ref().map(Transcript::contents);
        Some(audit.record(record, contents))
    }

    /// A record that says whose request it is and what was asked for, and nothing else yet.
    pub(super) fn blank_record(&self) -> RequestRecord {
        RequestRecord { asked: asked(&self.model), ..record_of(&self.request_id, &self.tenant, &self.credential) }
    }

    fn record(&self) -> RequestRecord {
        let Told { verdicts, model, to, usage, outcome } =
            self.told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        RequestRecord {
            model,
            route: RouteTaken { to, why: self.why.clone() },
            verdicts: [self.verdicts.clone(), verdicts].concat(),
            tokens: usage.into(),
            outcome: outcome.unwrap_or_else(|| outcome_word(RequestStatus::Cancelled).to_owned()),
            ..self.blank_record()
        }
    }

    /// Takes note of an end on this machine, and says what the ledger is to hold of it.
    fn ended_here(
        &mut self,
        used: &LocalUse,
        status: RequestStatus,
        model: ModelUsed,
        now: UnixMillis,
    ) -> (Call, Outcome) {
        let local = &self.gateway.0.local;
        let (usage, at, price) = (used.usage(), date(self.started), local.price(used));
        let outcome = Outcome {
            status,
            tokens: counts(&usage),
            latency: now.since(self.started),
            price,
            reference_price: local.reference.as_ref().and_then(|model| model.price(&usage, at).ok()).map(money),
        };
        let meters = &self.gateway.0.meters;
        meters.spend(self.tenant.config.id.as_str(), LOCAL, &usage, outcome.price);
        if let Some(reference_price) = outcome.reference_price {
            meters.save(self.tenant.config.id.as_str(), reference_price);
        }
        // What ran, by its own name: of a virtual model or an alias the books say nothing.
        let adapter = model.adapter.as_ref().map(|adapter| adapter.name.clone());
        let call = self.call(LedgerRoute::Local, adapter.clone().unwrap_or_else(|| model.name.clone()), adapter);
        let (to, word) = (LOCAL.to_owned(), Some(outcome_word(status).to_owned()));
        self.tell(|told| *told = Told { model, to, usage, outcome: word, ..Told::default() });
        self.spend(&usage, now);
        (call, outcome)
    }

    pub(super) fn call(&self, route: LedgerRoute, model: String, adapter: Option<String>) -> Call {
        Call { tenant: self.tenant.config.id.clone(), credential: self.credential.clone(), model, adapter, route }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let _nobody_waits = self.enter();
    }
}

/// Work whose time is in the length of a text: where that is long, beside the runtime's threads.
pub(super) async fn aside<T: Send + 'static>(
    num_bytes: u64,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, GatewayError> {
    if num_bytes <= MAX_INLINE_BYTES {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await.map_err(|_| internal("a guardrail panicked"))
}

pub(super) fn internal(what: &str) -> GatewayError {
    GatewayError::Internal(what.to_owned())
}

/// A record that says whose request it is, and nothing else yet.
pub(super) fn record_of(request_id: &str, tenant: &Tenant, credential: &Credential) -> RequestRecord {
    RequestRecord {
        request_id: request_id.to_owned(),
        tenant: tenant.config.id.to_string(),
        key_id: Some(key_id(credential)),
        ..RequestRecord::default()
    }
}

/// Log-probabilities spell a text as it was before guardrails changed it.
pub(super) fn loses_logprobs(tenant: &Tenant, body: &Value) -> bool {
    let asked = body.get("logprobs").is_some_and(|asked| !matches!(asked, Value::Null | Value::Bool(false)));
    asked && tenant.policy.changes_answers()
}

/// A model's name as a record holds it: whoever asks may have named anything.
pub(super) fn asked(model: &str) -> String {
    const MAX_CHARS: usize = 256;
    model.chars().take(MAX_CHARS).collect()
}

/// Waits until a record is in the log.
pub(super) async fn kept(record: Pending) -> Result<(), GatewayError> {
    record.kept().await.map(|_| ()).map_err(GatewayError::Audit)
}

impl From<Usage> for TokenCounts {
    fn from(Usage { prompt, cached, completion, reasoning, estimated, .. }: Usage) -> Self {
        Self { prompt, cached, completion, reasoning, estimated }
    }
}

/// The key's id; a token's issuer and subject.
fn key_id(credential: &Credential) -> String {
    match credential {
        Credential::Key(id) => id.to_string(),
        Credential::Jwt { issuer, subject } => format!("{issuer}#{subject}"),
    }
}
