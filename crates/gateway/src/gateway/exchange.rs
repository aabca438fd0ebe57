//! One request, from its admission to what it cost.
//!
//! Knows bodies as JSON and places by name; it must not know sockets or engines. Invariant: whatever becomes of an exchange,
//! its place under the limits is given back, and money set aside for a call that was sent is settled or charged in full.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde_json::{Map, Value};

use super::{
    AnswerFilters, BlockedBecause, Gateway, GatewayError, LiveUpstream, MAX_CALL, Tenant, class_of, facts, moment,
};
use crate::{
    audit::{
        self,
        record::{AdapterUsed, ModelUsed, RequestRecord, RouteTaken},
    },
    clock::UnixMillis,
    guardrails::{Decision, Vault, Verdict},
    keys::Credential,
    ledger::{
        self, Budget, Call, LedgerRoute, Outcome, PromptSize, RequestStatus, Reservation, ReserveRequest, TokenCounts,
    },
    limits::{Ask, Limited, Permit},
    money::Money,
    policy::{Condition, Facts, LocalState, PrivacyClass, Route, Target, route::LocalName},
    providers::{
        self, ChatRequest, CompletionRequest, Outgoing, UpstreamError, Usage,
        catalogue::{Bound, Cost, ServedTier},
        error::Cause,
    },
    upstream::{AnswerStream, Received},
};

/// Output tokens that are assumed for limits where neither request, tenant nor model says how many there can be.
const ASSUMED_OUTPUT_TOKENS: u64 = 4096;

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
    /// How it came.
    pub wire: WireRoute,
    /// Its body.
    pub body: Map<String, Value>,
    /// The model's name where the body names none.
    pub default_model: &'a str,
    /// `x-bindery-task`
    pub task: Option<&'a str>,
    /// `x-bindery-privacy`
    pub privacy: Option<&'a str>,
    /// Its id: decides draws by weight.
    pub request_id: &'a str,
    /// Now.
    pub now: UnixMillis,
}

/// One request on its way.
pub struct Exchange {
    pub(super) gateway: Gateway,
    pub(super) tenant: Arc<Tenant>,
    pub(super) credential: Credential,
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
    pub(super) request_id: String,
    /// Of the route.
    why: String,
    started: UnixMillis,
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

/// A streamed answer from upstream.
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

/// A call that was sent and is to be settled.
pub(super) struct OpenCall {
    pub(super) reservation: Option<Reservation>,
    /// The upstream's name.
    pub(super) to: String,
    pub(super) model: providers::ModelEntry,
    pub(super) at: DateTime<Utc>,
    pub(super) started: UnixMillis,
}

impl Gateway {
    /// Admits a request under its tenant's limits and checks its prompt.
    ///
    /// # Errors
    /// A limit that is met, a guardrail that blocks, a header that is none.
    pub fn begin(&self, asked: Asked<'_>) -> Result<Exchange, GatewayError> {
        let tenant = Arc::clone(self.tenant(asked.tenant));
        let privacy = class_of(tenant.config.routing.privacy, asked.privacy)?;
        let model = asked.body.get("model").and_then(Value::as_str).unwrap_or(asked.default_model).to_owned();
        let mut body = Value::Object(asked.body);
        let size = facts::size_of(&body);
        let max_tokens = ledger::max_prompt_tokens(size, 0) + asked_output(&body).unwrap_or(ASSUMED_OUTPUT_TOKENS);
        let limits = tenant.config.limits;
        let under = [(Limited::Tenant(tenant.config.id.clone()), limits)];
        let permit = self.0.limiter.admit(&Ask { under: &under, max_tokens }, asked.now)?;
        let (mut vault, mut verdicts, mut must_stay) = (Arc::new(Vault::default()), Vec::new(), false);
        if !tenant.policy.is_empty() {
            let outcome = tenant.policy.check_prompt(&mut body);
            (vault, verdicts) = (outcome.vault, outcome.verdicts);
            match outcome.decision {
                Decision::Pass => {}
                Decision::RouteLocal => must_stay = true,
                Decision::Block { guardrail } => {
                    self.log_blocked(&tenant, &asked.credential, asked.request_id, verdicts);
                    return Err(GatewayError::Blocked { guardrail, because: BlockedBecause::Found });
                }
            }
        }
        Ok(Exchange {
            gateway: self.clone(),
            tenant,
            credential: asked.credential,
            wire: asked.wire,
            body,
            model,
            task: asked.task.map(str::to_owned),
            privacy,
            must_stay,
            draw: draw_of(asked.request_id),
            size,
            permit,
            vault,
            verdicts,
            request_id: asked.request_id.to_owned(),
            why: String::new(),
            started: asked.now,
        })
    }

    /// Nobody waits for it: the request ends here in any case.
    pub(super) fn log_blocked(
        &self,
        tenant: &Tenant,
        credential: &Credential,
        request_id: &str,
        verdicts: Vec<Verdict>,
    ) {
        if let Some(audit) = &self.0.audit {
            let record = RequestRecord {
                request_id: request_id.to_owned(),
                tenant: tenant.config.id.to_string(),
                key_id: Some(key_id(credential)),
                verdicts,
                outcome: "content_filter".to_owned(),
                ..RequestRecord::default()
            };
            let _pending = audit.record(record, None);
        }
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
            || wanted(&|when| when.personal_data.is_some()) && self.holds_personal_data();
        let language = if wanted(&|when| when.languages.is_some()) { facts::language(&self.body) } else { None };
        let budget_left =
            if wanted(&|when| when.budget_left_under.is_some()) { self.budget_left(now).await? } else { None };
        let facts = Facts {
            tenant: &self.tenant.config.routing,
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
    fn holds_personal_data(&self) -> bool {
        !self.gateway.0.personal_data.check_prompt(&mut self.body.clone()).verdicts.is_empty()
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

    /// What guardrails said.
    pub fn verdicts(&self) -> &[Verdict] {
        &self.verdicts
    }

    /// The filters of the answer; None: nothing is to be filtered.
    pub fn filters(&self) -> Option<AnswerFilters> {
        let policy = &self.tenant.policy;
        (!policy.is_empty()).then(|| AnswerFilters::new(policy.clone(), Arc::clone(&self.vault)))
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
        self.permit.settle(used.num_prompt_tokens + used.num_completion_tokens, now);
        self.enter_local(&used, status, model.adapter.as_ref().map(|(name, _)| name.clone()), now).await;
        let LocalModel { name, digest, licence, adapter } = model;
        let adapter = adapter.map(|(name, digest)| AdapterUsed { name, digest, licence: None });
        let model = ModelUsed { name, digest, licence, adapter };
        let usage =
            Usage { prompt: used.num_prompt_tokens, completion: used.num_completion_tokens, ..Usage::default() };
        self.log(model, "local", &usage, status).await
    }

    /// The log's record, where there is a log.
    async fn log(&self, model: ModelUsed, to: &str, usage: &Usage, status: RequestStatus) -> Result<(), GatewayError> {
        let Some(audit) = &self.gateway.0.audit else { return Ok(()) };
        let outcome = match status {
            RequestStatus::Completed => "completed",
            RequestStatus::Cancelled => "cancelled",
            RequestStatus::Failed => "failed",
        };
        let record = RequestRecord {
            request_id: self.request_id.clone(),
            tenant: self.tenant.config.id.to_string(),
            key_id: Some(key_id(&self.credential)),
            model,
            route: RouteTaken { to: to.to_owned(), why: self.why.clone() },
            verdicts: self.verdicts.clone(),
            tokens: audit::record::TokenCounts {
                prompt: usage.prompt,
                cached: usage.cached,
                completion: usage.completion,
                reasoning: usage.reasoning,
            },
            outcome: outcome.to_owned(),
        };
        audit.record(record, None).kept().await.map(|_| ()).map_err(GatewayError::Audit)
    }

    /// The ledger's row, where there is a ledger.
    async fn enter_local(&self, used: &LocalUse, status: RequestStatus, adapter: Option<String>, now: UnixMillis) {
        let Some(ledger) = &self.gateway.0.ledger else { return };
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
        let call = self.call(LedgerRoute::Local, self.model.clone(), adapter);
        if let Err(error) = ledger.record_local(&call, outcome, now).await {
            tracing::warn!(%error, "a local request's row waits for the store");
        }
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
        let gateway = self.gateway.clone();
        let (live, entry) = gateway.offer(upstream, model)?;
        // The one place where a request gets the right to leave.
        let leaves = self.privacy.leave().filter(|_| !self.must_stay);
        let leaves = leaves.ok_or_else(|| internal("a request that must stay was about to leave"))?;
        let max_prompt_tokens = ledger::max_prompt_tokens(self.size, ledger::max_image_tokens(&entry.id));
        let outgoing = self.translate(live, &entry, max_prompt_tokens, now)?;
        let warning = outgoing.warnings.header();
        let reservation = self.reserve(live, &entry, &outgoing, (max_prompt_tokens, overflows), now).await?;
        let mut open =
            OpenCall { reservation, to: upstream.to_owned(), model: entry, at: date(now), started: self.started };
        if let Some(reservation) = &mut open.reservation {
            reservation.mark_sent();
        }
        let door = &gateway.0.door;
        match door.send(leaves, &live.health, outgoing, MAX_CALL).await {
            Ok(Received::Whole(answer)) => {
                let usage = answer.usage;
                self.permit.settle(usage.total(), now);
                open.settle(&usage, RequestStatus::Completed).await;
                let mut answer = answer.to_json();
                if let Some(mut filters) = self.filters() {
                    filters.whole(self, &mut answer).await;
                }
                self.log(open.model_used(), &open.to, &usage, RequestStatus::Completed).await?;
                Ok((Sent::Whole(answer), warning))
            }
            Ok(Received::Stream(stream)) => {
                let (filters, ready, stage) = (self.filters(), VecDeque::new(), StreamStage::Open);
                Ok((Sent::Stream(Box::new(UpstreamStream { stream: *stream, open, filters, ready, stage })), warning))
            }
            Err(error) => {
                open.settle(&Usage::default(), RequestStatus::Failed).await;
                self.log(open.model_used(), &open.to, &Usage::default(), RequestStatus::Failed).await?;
                Err(GatewayError::Upstream(error))
            }
        }
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
        let call = providers::Call {
            endpoint: &live.endpoint,
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
        (max_prompt_tokens, overflows): (u64, bool),
        now: UnixMillis,
    ) -> Result<Option<Reservation>, GatewayError> {
        let Some(ledger) = &self.gateway.0.ledger else { return Ok(None) };
        let tenant = &self.tenant.config;
        let overflow = tenant.overflow_budgets.iter().filter(|_| overflows);
        let budgets: Vec<Budget> = tenant.budgets.iter().chain(overflow).chain(&live.config.budgets).cloned().collect();
        let bound = |max_output_tokens| Bound { max_prompt_tokens, max_output_tokens, tier: ServedTier::Standard };
        // An answer without a limit has no bound, and a budget could not hold.
        let most = outgoing.max_output_tokens.and_then(|most| entry.upper_bound(&bound(most), date(now)).ok());
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

    pub(super) async fn settle(&mut self, usage: &Usage, status: RequestStatus) {
        let Some(reservation) = self.reservation.take() else { return };
        let price = match status {
            // Nothing came back, so nothing is owed.
            RequestStatus::Failed if usage.total() == 0 => Money::ZERO,
            _ => self.model.price(usage, self.at).map_or_else(|_| reservation.amount(), money),
        };
        let latency = UnixMillis::now().since(self.started);
        let outcome = Outcome { status, tokens: counts(usage), latency, price, reference_price: None };
        if let Err(error) = reservation.settle(outcome).await {
            tracing::warn!(%error, "an upstream call's settlement waits for the store");
        }
    }
}

impl UpstreamStream {
    /// The next chunk as OpenAI writes it, through the tenant's filters; `None`: complete, and settled. After an error, which ends
    /// it, it is settled, too.
    pub async fn next(&mut self, exchange: &mut Exchange) -> Option<Result<Value, UpstreamError>> {
        loop {
            if let Some(chunk) = self.ready.pop_front() {
                return Some(Ok(chunk));
            }
            if self.stage == StreamStage::Over {
                return None;
            }
            match self.stream.next().await {
                Some(Ok(chunk)) => match &mut self.filters {
                    Some(filters) => self.ready.extend(filters.chunk(chunk.to_json())),
                    None => return Some(Ok(chunk.to_json())),
                },
                Some(Err(error)) => {
                    exchange.note(self.filters.as_ref().map(AnswerFilters::verdicts).unwrap_or_default());
                    let _told_by_the_error = self.end(exchange, RequestStatus::Failed).await;
                    return Some(Err(error));
                }
                None => {
                    // Settled after the last verdict, so that the log holds it, and before the last byte.
                    let held = match &mut self.filters {
                        Some(filters) => filters.end(exchange).await,
                        None => Vec::new(),
                    };
                    if let Err(error) = self.end(exchange, RequestStatus::Completed).await {
                        return Some(Err(UpstreamError::new(Cause::Failed, error.to_string())));
                    }
                    self.ready.extend(held);
                }
            }
        }
    }

    async fn end(&mut self, exchange: &mut Exchange, status: RequestStatus) -> Result<(), GatewayError> {
        let usage = self.stream.usage();
        exchange.permit.settle(usage.total(), UnixMillis::now());
        self.open.settle(&usage, status).await;
        if self.stage == StreamStage::Over {
            return Ok(());
        }
        self.stage = StreamStage::Over;
        exchange.log(self.open.model_used(), &self.open.to, &usage, status).await
    }
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

/// Evenly spread over 0..1, the same for the same id.
pub(super) fn draw_of(request_id: &str) -> f64 {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(request_id.as_bytes());
    let bits = digest.iter().take(6).fold(0_u64, |bits, &byte| bits << 8 | u64::from(byte));
    bits as f64 / (1_u64 << 48) as f64
}

/// What the request asks for, of all its answers together.
fn asked_output(body: &Value) -> Option<u64> {
    let limit = ["max_completion_tokens", "max_tokens"].iter().find_map(|name| body.get(name)?.as_u64())?;
    Some(limit.saturating_mul(body.get("n").and_then(Value::as_u64).unwrap_or(1)))
}
