//! The way of an exchange to an upstream and back.
//!
//! Knows requests as JSON and answers as providers tell them; it must not know sockets. Invariant: nothing is sent without the
//! right to leave and, where there is a ledger, a committed reservation; nothing ends before its settlement and its record.

use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError},
    time::Duration,
};

use serde_json::Value;

use super::{
    AnswerFilters, Exchange, GatewayError, LiveUpstream, MAX_CALL, WireRoute,
    call::{OpenCall, date, money},
    exchange::{internal, loses_logprobs},
    facts,
    meters::CallMeter,
};
use crate::{
    clock::UnixMillis,
    guardrails::Verdict,
    ledger::{self, Budget, LedgerRoute, RequestStatus, Reservation, ReserveRequest},
    providers::{
        self, ChatRequest, CompletionRequest, ModelEntry, Outgoing, Refusal, UpstreamError, Usage,
        catalogue::{Bound, Thinking},
        error::Cause,
    },
    upstream::{AnswerStream, Departure, Received},
};

/// Has an upstream look things up, for a fee of its own.
const WEB_SEARCH: &str = "web_search_options";

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

impl Exchange {
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
            let door = self.gateway.0.upstreams.get(upstream).map(|live| &live.door);
            let Some(wait) = door.and_then(|door| door.wait_to_pay_again(&error, attempt, time_left)) else {
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
        let mut outgoing = self.translate(live, &entry, max_prompt_tokens, now)?;
        if loses_logprobs(&self.tenant, &self.body) {
            outgoing.warnings.drop("logprobs");
        }
        if let Some(on) = entry.retired_on(date(now)) {
            outgoing.warnings.adjust("model", format!("{} was retired by its provider on {on}", entry.id));
        }
        let warning = outgoing.warnings.header();
        let reservation = self.reserve(live, &entry, &outgoing, (most, overflows), now).await?;
        let most = (max_prompt_tokens, outgoing.max_output_tokens.unwrap_or(0));
        let mut open = self.open_call((upstream, entry), reservation, most, (now, self.started));
        open.told = Some(Arc::clone(&self.told));
        let departure = open.departure.clone();
        match live.door.send(leaves, &live.health, outgoing, (&departure, time_left)).await {
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
                self.why = format!("{}; {upstream}/{model} failed: {}", self.why, error.code());
                Err(GatewayError::Upstream(error))
            }
        }
    }

    /// The longest a call may take that begins now.
    pub(super) fn max_call(&self, now: UnixMillis) -> Duration {
        let left = self.time_left.map(|time| time.saturating_sub(now.since(self.started)));
        left.map_or(MAX_CALL, |left| left.min(MAX_CALL))
    }

    /// A call that goes out now, of which nobody is told: to an upstream's model, with the most tokens that its prompt and its
    /// answer can have.
    pub(super) fn open_call(
        &self,
        (upstream, model): (&str, ModelEntry),
        mut reservation: Option<Reservation>,
        (prompt, completion): (u64, u64),
        (now, started): (UnixMillis, UnixMillis),
    ) -> OpenCall {
        if let Some(reservation) = &mut reservation {
            reservation.mark_sent();
        }
        OpenCall {
            reservation,
            to: upstream.to_owned(),
            model,
            at: date(now),
            started,
            bound: Usage { prompt, completion, ..Usage::estimate(0, 0) },
            told: None,
            meter: Some(CallMeter::new(self.gateway.clone(), &self.tenant.config)),
            departure: Departure::default(),
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
        if outgoing.request.body.contains_key(WEB_SEARCH) && !budgets.is_empty() {
            let message = format!(
                "`{WEB_SEARCH}` costs a fee a search that no price of `{}` tells, and a budget has to hold; leave it out",
                entry.id
            );
            return Err(Refusal::unsupported(WEB_SEARCH, message).into());
        }
        let tier = facts::asked_tier(&self.body);
        // An answer without a limit has no bound, and a budget could not hold.
        let bound = max_prompt_tokens.zip(outgoing.max_output_tokens);
        let bound =
            bound.map(|(max_prompt_tokens, max_output_tokens)| Bound { max_prompt_tokens, max_output_tokens, tier });
        let most = bound.and_then(|bound| entry.upper_bound(&bound, date(now)).ok());
        if outgoing.max_output_tokens.is_none() && !entry.prices.is_empty() && !budgets.is_empty() {
            let message = format!(
                "how long an answer of `{}` can be is not known, and a budget has to hold: set max_tokens, or have \
                 max_output_tokens of the tenant or `describe` of the upstream set",
                entry.id
            );
            return Err(Refusal::unsupported("max_tokens", message).into());
        }
        let name = format!("{}/{}", live.config.name, entry.id);
        let call = self.call(LedgerRoute::Upstream(live.config.name.to_string()), name, None);
        let request = ReserveRequest { call, at_most: most.map(money), budgets };
        Ok(Some(ledger.reserve(request, now).await?))
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

    /// What it has used. Of a stream that was left or cut nobody knows how much a model has
    /// thought, unless the provider counts as it goes: that counts as all it might have been.
    fn usage(&self) -> Usage {
        let usage = self.stream.usage();
        let thinks = self.open.model.capabilities.thinking != Thinking::None;
        if self.stream.is_complete() || !thinks || usage.reasoning > 0 {
            return usage;
        }
        Usage { completion: usage.completion.max(self.open.bound.completion), estimated: true, ..usage }
    }

    fn verdicts(&self) -> Vec<Verdict> {
        self.filters.as_ref().map(AnswerFilters::verdicts).unwrap_or_default()
    }

    async fn end(&mut self, exchange: &mut Exchange, status: RequestStatus) -> Result<(), GatewayError> {
        self.stage = StreamStage::Over;
        let usage = self.usage();
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
        let usage = self.usage();
        self.open.settle_later(&usage.into(), RequestStatus::Cancelled);
    }
}
