//! One request, from its admission to what it cost.
//!
//! Knows bodies as JSON and places by name; it must not know sockets or engines. Invariant: whatever becomes of an exchange,
//! its place under the limits is given back, money set aside for a call that was sent is settled or charged in full, and the
//! log has one record of it: from whoever ended it, else from its drop.

use std::{
    collections::VecDeque,
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde_json::{Map, Value};

use super::{
    AnswerFilters, BlockedBecause, Gateway, GatewayError, LiveUpstream, MAX_CALL, Tenant, class_of, facts, moment,
    transcript::Transcript,
};
use crate::{
    audit::{
        self, Contents, Pending,
        record::{AdapterUsed, ModelUsed, RequestRecord, RouteTaken},
    },
    clock::UnixMillis,
    guardrails::{Decision, Vault, Verdict},
    keys::{Credential, KeyGrant},
    ledger::{
        self, Budget, Call, LedgerRoute, Outcome, PromptSize, RequestStatus, Reservation, ReserveRequest, TokenCounts,
    },
    limits::{Ask, Limited, Permit},
    money::Money,
    policy::{Condition, Facts, LocalState, PrivacyClass, Route, Target, route::LocalName},
    providers::{
        self, ChatRequest, CompletionRequest, Outgoing, Refusal, UpstreamError, Usage,
        catalogue::{Bound, Cost},
        error::{Cause, Spent},
    },
    upstream::{AnswerStream, Received},
};

/// Output tokens that are assumed for limits where neither request, tenant nor model says how many there can be.
const ASSUMED_OUTPUT_TOKENS: u64 = 4096;

/// Texts up to this are looked through on the thread that asks: some hundred microseconds.
const MAX_INLINE_BYTES: u64 = 64 << 10;

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

/// One request on its way.
pub struct Exchange {
    pub(super) gateway: Gateway,
    pub(super) tenant: Arc<Tenant>,
    pub(super) credential: Credential,
    grant: Option<Arc<KeyGrant>>,
    wire: WireRoute,
    pub(super) body: Value,
    model: String,
    task: Option<String>,
    pub(super) privacy: PrivacyClass,
    pub(super) must_stay: bool,
    draw: f64,
    size: PromptSize,
    permit: Permit,
    vault: Arc<Vault>,
    pub(super) verdicts: Vec<Verdict>,
    /// None: the tenant has nothing stored.
    transcript: Option<Transcript>,
    pub(super) request_id: String,
    /// Of the route.
    why: String,
    started: UnixMillis,
    /// Tokens of its calls that have ended, failed ones among them.
    num_used_tokens: u64,
    told: SharedTold,
    is_logged: bool,
    /// From then on.
    time_left: Option<Duration>,
}

/// What is known of an exchange's end, by the last call that knew. Its stream and the exchange itself may drop in any order.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    /// What was found in an answer that was left in the middle.
    verdicts: Vec<Verdict>,
    model: ModelUsed,
    to: String,
    usage: Usage,
    /// None: it is under way.
    outcome: Option<String>,
}

pub(super) type SharedTold = Arc<Mutex<Told>>;

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

/// Which weights answered here.
#[derive(Clone, Debug, Default)]
pub struct LocalModel {
    /// The base's name.
    pub name: String,
    /// Its digest, where it is known.
    pub digest: Option<String>,
    /// Its licence.
    pub licence: Option<String>,
    /// The adapter's name and digest.
    pub adapter: Option<(String, String)>,
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

/// What came from upstream.
pub enum Sent {
    /// The answer, as OpenAI writes it.
    Whole(Value),
    /// Its beginning.
    Stream(Box<UpstreamStream>),
}

/// A streamed answer from upstream. Dropped before its end, it is settled for what came of it.
pub struct UpstreamStream {
    stream: AnswerStream,
    open: OpenCall,
    filters: Option<AnswerFilters>,
    /// What has passed the filters.
    ready: VecDeque<Value>,
    stage: StreamStage,
}

/// How far a stream has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum StreamStage {
    Open,
    /// Settled and logged.
    Over,
}

/// A call that was sent and is to be settled. Dropped before, it is charged in full: it may have cost that.
pub(super) struct OpenCall {
    pub(super) reservation: Option<Reservation>,
    /// The upstream's name.
    pub(super) to: String,
    pub(super) model: providers::ModelEntry,
    pub(super) at: DateTime<Utc>,
    pub(super) started: UnixMillis,
    /// The most it can use.
    pub(super) bound: Usage,
    /// Whom it is told to; None: nobody, or it is settled.
    pub(super) told: Option<SharedTold>,
}

/// What is known of a request that may be turned away.
#[derive(Default)]
struct Seen {
    verdicts: Vec<Verdict>,
    contents: Option<Contents>,
}

impl Gateway {
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
            request_id: asked.request_id.to_owned(),
            tenant: tenant.config.id.to_string(),
            key_id: Some(key_id(&asked.credential)),
            ..RequestRecord::default()
        };
        let mut seen = Seen::default();
        self.admit(asked, tenant, &mut seen).map_err(|error| {
            record.outcome = error.shown().2;
            record.verdicts = seen.verdicts;
            let record = self.0.audit.as_ref().map(|audit| audit.record(record, seen.contents));
            TurnedAway { error, record }
        })
    }

    fn admit(&self, asked: Asked<'_>, tenant: Arc<Tenant>, seen: &mut Seen) -> Result<Exchange, GatewayError> {
        let privacy = class_of(tenant.config.routing.privacy, asked.privacy)?;
        let model = asked.body.get("model").and_then(Value::as_str).unwrap_or(asked.default_model).to_owned();
        let mut body = Value::Object(asked.body);
        let size = facts::size_of(&body);
        let max_tokens = ledger::max_prompt_tokens(size, 0) + asked_output(&body).unwrap_or(ASSUMED_OUTPUT_TOKENS);
        let mut under = vec![(Limited::Tenant(tenant.config.id.clone()), tenant.config.limits)];
        // Both must hold; the tighter one is told.
        if let (Some(grant), Credential::Key(key)) = (&asked.grant, &asked.credential)
            && grant.is_limited()
        {
            under.push((Limited::Key(key.clone()), grant.limits));
        }
        let permit = self.0.limiter.admit(&Ask { under: &under, max_tokens }, asked.now)?;
        let (mut vault, mut must_stay) = (Arc::new(Vault::default()), false);
        if !tenant.policy.is_empty() {
            let outcome = tenant.policy.check_prompt(&mut body);
            (vault, seen.verdicts) = (outcome.vault, outcome.verdicts);
            match outcome.decision {
                Decision::Pass => {}
                Decision::RouteLocal => must_stay = true,
                Decision::Block { guardrail } => {
                    seen.contents = self.transcript(&tenant, &body).map(|transcript| transcript.contents());
                    return Err(GatewayError::Blocked { guardrail, because: BlockedBecause::Found });
                }
            }
        }
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

    /// Where the tenant's policy stores prompts and answers, and the log keeps them.
    fn transcript(&self, tenant: &Tenant, body: &Value) -> Option<Transcript> {
        let max_bytes = self.0.max_contents_bytes.filter(|_| tenant.config.store_contents)?;
        Some(Transcript::of(body, max_bytes))
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

    /// Ends it where this machine itself has turned it down: in the log alone, for nothing was computed.
    ///
    /// # Errors
    /// [`GatewayError::Audit`] where the log cannot be written and must be.
    pub async fn turn_down(&mut self) -> Result<(), GatewayError> {
        self.tell(|told| (told.to, told.outcome) = ("local".to_owned(), Some("refused".to_owned())));
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

    /// Accounts for what ran here: committed when this returns, or done later where the store does not answer.
    ///
    /// # Errors
    /// [`GatewayError::Audit`] where the log cannot be written and must be: then the answer must not end well.
    pub async fn settle_local(
        &mut self,
        used: LocalUse,
        status: RequestStatus,
        model: LocalModel,
        now: UnixMillis,
    ) -> Result<(), GatewayError> {
        let (call, outcome) = self.ended_here(&used, status, model, now);
        if let Some(ledger) = &self.gateway.0.ledger
            && let Err(error) = ledger.record_local(&call, outcome, now).await
        {
            tracing::warn!(%error, "a local request's row waits for the store");
        }
        self.log().await
    }

    /// The same where nobody can wait: in a drop.
    pub fn settle_local_later(&mut self, used: LocalUse, status: RequestStatus, model: LocalModel, now: UnixMillis) {
        let (call, outcome) = self.ended_here(&used, status, model, now);
        if let Some(ledger) = &self.gateway.0.ledger {
            ledger.record_local_later(&call, outcome, now);
        }
        let _pending = self.enter();
    }

    /// Counts tokens of a call that has ended.
    fn spend(&mut self, usage: &Usage, now: UnixMillis) {
        self.num_used_tokens = self.num_used_tokens.saturating_add(usage.total());
        self.permit.settle(self.num_used_tokens, now);
    }

    fn tell(&self, tell: impl FnOnce(&mut Told)) {
        tell(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The log's one record, where there is a log.
    async fn log(&mut self) -> Result<(), GatewayError> {
        match self.enter() {
            Some(record) => record.kept().await.map(|_| ()).map_err(GatewayError::Audit),
            None => Ok(()),
        }
    }

    /// Hands the record over, once; None: there is no log, or it has it.
    fn enter(&mut self) -> Option<Pending> {
        let is_logged = std::mem::replace(&mut self.is_logged, true);
        let audit = self.gateway.0.audit.as_ref().filter(|_| !is_logged)?;
        let contents = self.transcript.as_ref().map(Transcript::contents);
        Some(audit.record(self.record(), contents))
    }

    fn record(&self) -> RequestRecord {
        let Told { verdicts, model, to, usage, outcome } =
            self.told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        RequestRecord {
            request_id: self.request_id.clone(),
            tenant: self.tenant.config.id.to_string(),
            key_id: Some(key_id(&self.credential)),
            model,
            route: RouteTaken { to, why: self.why.clone() },
            verdicts: [self.verdicts.clone(), verdicts].concat(),
            tokens: audit::record::TokenCounts {
                prompt: usage.prompt,
                cached: usage.cached,
                completion: usage.completion,
                reasoning: usage.reasoning,
            },
            outcome: outcome.unwrap_or_else(|| outcome_word(RequestStatus::Cancelled).to_owned()),
        }
    }

    /// Takes note of an end on this machine, and says what the ledger is to hold of it.
    fn ended_here(
        &mut self,
        used: &LocalUse,
        status: RequestStatus,
        model: LocalModel,
        now: UnixMillis,
    ) -> (Call, Outcome) {
        let local = &self.gateway.0.local;
        let usage =
            Usage { prompt: used.num_prompt_tokens, completion: used.num_completion_tokens, ..Usage::default() };
        let at = date(self.started);
        let price = local.per_hour.and_then(|cost| ledger::local_price(cost, used.machine_time)).unwrap_or(Money::ZERO);
        let outcome = Outcome {
            status,
            tokens: counts(&usage),
            latency: now.since(self.started),
            price,
            reference_price: local.reference.as_ref().and_then(|model| model.price(&usage, at).ok()).map(money),
        };
        let LocalModel { name, digest, licence, adapter } = model;
        // What ran, by its own name: of a virtual model or an alias the books say nothing.
        let adapter_name = adapter.as_ref().map(|(name, _)| name.clone());
        let call = self.call(LedgerRoute::Local, adapter_name.clone().unwrap_or_else(|| name.clone()), adapter_name);
        let adapter = adapter.map(|(name, digest)| AdapterUsed { name, digest, licence: None });
        let model = ModelUsed { name, digest, licence, adapter };
        let (to, word) = ("local".to_owned(), Some(outcome_word(status).to_owned()));
        self.tell(|told| *told = Told { model, to, usage, outcome: word, ..Told::default() });
        self.spend(&usage, now);
        (call, outcome)
    }

    pub(super) fn call(&self, route: LedgerRoute, model: String, adapter: Option<String>) -> Call {
        Call { tenant: self.tenant.config.id.clone(), credential: self.credential.clone(), model, adapter, route }
    }

    /// Sends the request to an upstream and waits for its answer, or for the first piece of it.
    ///
    /// # Errors
    /// What cannot be translated, paid or answered; [`GatewayError::lets_others_try`] says whether another place may help.
    pub async fn send(
        &mut self,
        upstream: &str,
        model: &str,
        overflows: bool,
        now: UnixMillis,
    ) -> Result<(Sent, Option<String>), GatewayError> {
        let deadline = tokio::time::Instant::now() + self.max_call(now);
        let (mut attempt, mut now) = (1, now);
        let mut failed: Option<UpstreamError> = None;
        loop {
            let time_left = deadline.saturating_duration_since(tokio::time::Instant::now());
            let error = match (self.send_once((upstream, model), overflows, time_left, now).await, failed.take()) {
                (Err(GatewayError::Upstream(error)), _) => error,
                // What the first attempt has cost may be what is missing for the second.
                (Err(GatewayError::Ledger(_)), Some(first)) => return Err(GatewayError::Upstream(first)),
                (done, _) => return done,
            };
            let time_left = deadline.saturating_duration_since(tokio::time::Instant::now());
            let Some(wait) = self.gateway.0.door.wait_to_pay_again(&error, attempt, time_left) else {
                return Err(GatewayError::Upstream(error));
            };
            tokio::time::sleep(wait).await;
            failed = Some(error);
            attempt += 1;
            now = UnixMillis::now();
        }
    }

    /// One call, with its own reservation: what failed and may have cost something is settled, and may be sent again.
    async fn send_once(
        &mut self,
        (upstream, model): (&str, &str),
        overflows: bool,
        time_left: Duration,
        now: UnixMillis,
    ) -> Result<(Sent, Option<String>), GatewayError> {
        let gateway = self.gateway.clone();
        let (live, entry) = gateway.offer(upstream, model)?;
        // The one place where a request gets the right to leave.
        let leaves = self.privacy.leave().filter(|_| !self.must_stay);
        let leaves = leaves.ok_or_else(|| internal("a request that must stay was about to leave"))?;
        // As guardrails left it: that is what is sent.
        let size = facts::size_of(&self.body);
        let most = facts::max_prompt_tokens(size, &entry);
        let max_prompt_tokens =
            most.unwrap_or_else(|| ledger::max_prompt_tokens(size, ledger::max_image_tokens(&entry.id)));
        let outgoing = self.translate(live, &entry, max_prompt_tokens, now)?;
        let warning = outgoing.warnings.header();
        let reservation = self.reserve(live, &entry, &outgoing, (most, overflows), now).await?;
        let bound = Usage {
            prompt: max_prompt_tokens,
            completion: outgoing.max_output_tokens.unwrap_or(0),
            ..Usage::estimate(0, 0)
        };
        let told = Some(Arc::clone(&self.told));
        let (to, at, started) = (upstream.to_owned(), date(now), self.started);
        let mut open = OpenCall { reservation, to, model: entry, at, started, bound, told };
        if let Some(reservation) = &mut open.reservation {
            reservation.mark_sent();
        }
        let door = &gateway.0.door;
        match door.send(leaves, &live.health, outgoing, time_left).await {
            Ok(Received::Whole(answer)) => {
                let usage = answer.usage;
                self.spend(&usage, now);
                open.settle(usage.into(), RequestStatus::Completed).await;
                let mut answer = answer.to_json();
                if let Some(filters) = self.filters() {
                    answer = filters.whole(self, answer).await?;
                }
                self.log().await?;
                Ok((Sent::Whole(answer), warning))
            }
            Ok(Received::Stream(stream)) => {
                let (filters, ready, stage) = (self.filters(), VecDeque::new(), StreamStage::Open);
                Ok((Sent::Stream(Box::new(UpstreamStream { stream: *stream, open, filters, ready, stage })), warning))
            }
            Err(error) => {
                if error.spent.may_cost() {
                    let usage = open.used(&error.spent);
                    self.spend(&usage, now);
                }
                open.settle(error.spent.clone(), RequestStatus::Failed).await;
                self.why = format!("{}; {upstream} failed: {}", self.why, error.code());
                Err(GatewayError::Upstream(error))
            }
        }
    }

    /// The longest a call may take that begins now.
    pub(super) fn max_call(&self, now: UnixMillis) -> Duration {
        let left = self.time_left.map(|time| time.saturating_sub(now.since(self.started)));
        left.map_or(MAX_CALL, |left| left.min(MAX_CALL))
    }

    fn translate(
        &self,
        live: &LiveUpstream,
        entry: &providers::ModelEntry,
        max_prompt_tokens: u64,
        now: UnixMillis,
    ) -> Result<Outgoing, GatewayError> {
        let mut body = self.body.as_object().cloned().unwrap_or_default();
        body.insert("model".to_owned(), Value::String(format!("{}/{}", live.config.name, entry.id)));
        let endpoint = live.endpoint.current();
        let call = providers::Call {
            endpoint: &endpoint,
            model: entry,
            max_output_tokens: self.tenant.config.max_output_tokens,
            max_prompt_tokens,
            fields: self.tenant.config.fields,
            at: date(now),
        };
        Ok(match self.wire {
            WireRoute::Chat => live.config.provider.chat(&call, &ChatRequest::read(body)?)?,
            WireRoute::Completions => live.config.provider.completion(&call, &CompletionRequest::read(body)?)?,
        })
    }

    pub(super) async fn reserve(
        &self,
        live: &LiveUpstream,
        entry: &providers::ModelEntry,
        outgoing: &Outgoing,
        (max_prompt_tokens, overflows): (Option<u64>, bool),
        now: UnixMillis,
    ) -> Result<Option<Reservation>, GatewayError> {
        let Some(ledger) = &self.gateway.0.ledger else { return Ok(None) };
        let tenant = &self.tenant.config;
        let overflow = tenant.overflow_budgets.iter().filter(|_| overflows);
        let budgets: Vec<Budget> = tenant.budgets.iter().chain(overflow).chain(&live.config.budgets).cloned().collect();
        if max_prompt_tokens.is_none() && !budgets.is_empty() {
            let message = format!(
                "how many tokens a document is for `{}` is not known, and a budget has to hold; send its text instead",
                entry.id
            );
            return Err(Refusal::unsupported("messages", message).into());
        }
        let tier = facts::asked_tier(&self.body);
        // An answer without a limit has no bound, and a budget could not hold.
        let bound = max_prompt_tokens.zip(outgoing.max_output_tokens);
        let bound =
            bound.map(|(max_prompt_tokens, max_output_tokens)| Bound { max_prompt_tokens, max_output_tokens, tier });
        let most = bound.and_then(|bound| entry.upper_bound(&bound, date(now)).ok());
        let name = format!("{}/{}", live.config.name, entry.id);
        let call = self.call(LedgerRoute::Upstream(live.config.name.to_string()), name, None);
        let request = ReserveRequest { call, at_most: most.map(money), budgets };
        Ok(Some(ledger.reserve(request, now).await?))
    }
}

impl OpenCall {
    pub(super) fn model_used(&self) -> ModelUsed {
        ModelUsed { name: format!("{}/{}", self.to, self.model.id), ..ModelUsed::default() }
    }

    /// What was used, where it may have been anything.
    pub(super) fn used(&self, spent: &Spent) -> Usage {
        match spent {
            Spent::NotSent | Spent::Nothing => Usage::default(),
            Spent::Known(usage) => **usage,
            Spent::Unknown => self.bound,
        }
    }

    pub(super) async fn settle(&mut self, spent: Spent, status: RequestStatus) {
        self.tell(&spent, status);
        let Some(reservation) = self.reservation.take() else { return };
        let outcome = self.outcome(reservation.amount(), &spent, status);
        let settled = match spent {
            // No row for what never was a call.
            Spent::NotSent => reservation.release().await,
            Spent::Nothing | Spent::Known(_) | Spent::Unknown => reservation.settle(outcome).await.map(|_| ()),
        };
        if let Err(error) = settled {
            tracing::warn!(%error, "an upstream call's settlement waits for the store");
        }
    }

    /// The same where nobody can wait: in a drop.
    fn settle_later(&mut self, spent: &Spent, status: RequestStatus) {
        self.tell(spent, status);
        let Some(reservation) = self.reservation.take() else { return };
        let outcome = self.outcome(reservation.amount(), spent, status);
        reservation.settle_later(outcome);
    }

    fn outcome(&self, reserved: Money, spent: &Spent, status: RequestStatus) -> Outcome {
        let price = match spent {
            Spent::NotSent | Spent::Nothing => Money::ZERO,
            Spent::Known(usage) => self.model.price(usage, self.at).map_or(reserved, money),
            Spent::Unknown => reserved,
        };
        let latency = UnixMillis::now().since(self.started);
        Outcome { status, tokens: counts(&self.used(spent)), latency, price, reference_price: None }
    }

    fn tell(&mut self, spent: &Spent, status: RequestStatus) {
        let Some(told) = self.told.take() else { return };
        let (model, to, usage) = (self.model_used(), self.to.clone(), self.used(spent));
        let outcome = Some(outcome_word(status).to_owned());
        let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
        let verdicts = std::mem::take(&mut told.verdicts);
        *told = Told { verdicts, model, to, usage, outcome };
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        // Left in the middle of the call: nobody knows how far it came.
        self.settle_later(&Spent::Unknown, RequestStatus::Cancelled);
    }
}

impl UpstreamStream {
    /// The next chunk as OpenAI writes it, through the tenant's filters. The last ones come after the settlement; `None`:
    /// complete. After an error, which ends it, it is settled, too.
    pub async fn next(&mut self, exchange: &mut Exchange) -> Option<Result<Value, UpstreamError>> {
        loop {
            // Once all is at hand, nothing goes out before the books are right: a client may leave at its finish reason.
            if (self.stage == StreamStage::Over || !self.stream.is_complete())
                && let Some(chunk) = self.ready.pop_front()
            {
                return Some(Ok(chunk));
            }
            if self.stage == StreamStage::Over {
                return None;
            }
            match self.stream.next().await {
                Some(Ok(chunk)) => self.pass(chunk.to_json()),
                Some(Err(error)) => {
                    self.ready.clear();
                    exchange.note(self.verdicts());
                    let _told_by_the_error = self.end(exchange, RequestStatus::Failed).await;
                    return Some(Err(error));
                }
                None => {
                    // Settled after the last verdict, so that the log holds it, and before the last byte.
                    if let Some(filters) = &mut self.filters {
                        self.ready.extend(filters.end(exchange).await);
                    }
                    if let Err(error) = self.end(exchange, RequestStatus::Completed).await {
                        self.ready.clear();
                        return Some(Err(UpstreamError::new(Cause::Failed, error.to_string())));
                    }
                }
            }
        }
    }

    fn pass(&mut self, chunk: Value) {
        self.ready.extend(match &mut self.filters {
            Some(filters) => filters.chunk(chunk),
            None => vec![chunk],
        });
    }

    fn verdicts(&self) -> Vec<Verdict> {
        self.filters.as_ref().map(AnswerFilters::verdicts).unwrap_or_default()
    }

    async fn end(&mut self, exchange: &mut Exchange, status: RequestStatus) -> Result<(), GatewayError> {
        self.stage = StreamStage::Over;
        let usage = self.stream.usage();
        exchange.spend(&usage, UnixMillis::now());
        self.open.settle(usage.into(), status).await;
        exchange.log().await
    }
}

impl Drop for UpstreamStream {
    fn drop(&mut self) {
        // The client is gone, or the server is: what came is what is known.
        if let (StreamStage::Open, Some(told)) = (self.stage, &self.open.told) {
            told.lock().unwrap_or_else(PoisonError::into_inner).verdicts = self.verdicts();
        }
        self.open.settle_later(&self.stream.usage().into(), RequestStatus::Cancelled);
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let _nobody_waits = self.enter();
    }
}

fn outcome_word(status: RequestStatus) -> &'static str {
    match status {
        RequestStatus::Completed => "completed",
        RequestStatus::Cancelled => "cancelled",
        RequestStatus::Failed => "failed",
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

pub(super) fn date(at: UnixMillis) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(at.0).unwrap_or_default()
}

pub(super) fn money(cost: Cost) -> Money {
    Money::from_nanos(i64::try_from(cost.nanodollars()).unwrap_or(i64::MAX))
}

pub(super) fn counts(usage: &Usage) -> TokenCounts {
    TokenCounts {
        num_prompt_tokens: usage.prompt,
        num_cached_tokens: usage.cached,
        num_completion_tokens: usage.completion,
        num_reasoning_tokens: usage.reasoning,
    }
}

/// The key's id; a token's issuer and subject.
pub(super) fn key_id(credential: &Credential) -> String {
    match credential {
        Credential::Key(id) => id.to_string(),
        Credential::Jwt { issuer, subject } => format!("{issuer}#{subject}"),
    }
}

/// Evenly spread over 0..1, and nothing that a request brings decides it: who could would choose its arm of a comparison.
pub(super) fn draw() -> f64 {
    // Keyed anew at each call, by the process's own random numbers.
    let bits = RandomState::new().hash_one(()) >> 16;
    bits as f64 / (1_u64 << 48) as f64
}

/// What the request asks for, of all its answers together.
fn asked_output(body: &Value) -> Option<u64> {
    let limit = ["max_completion_tokens", "max_tokens"].iter().find_map(|name| body.get(name)?.as_u64())?;
    Some(limit.saturating_mul(body.get("n").and_then(Value::as_u64).unwrap_or(1)))
}
