//! Texts of a request before those who are asked about them: web hooks, and models as judges.
//!
//! A judge of this process runs by what the server has given ([`Gateway::set_local_judge`]); one upstream goes through the door as every
//! call does, with money set aside first, charged to the tenant whose request is judged. Neither counts under the tenant's
//! limits, and nothing that a judge reads or writes is checked by guardrails again. It must not know engines or HTTP
//! servers.
//!
//! Invariant: what a local-only request holds, or one that a guardrail keeps here, reaches no web hook and no upstream judge.

use std::sync::Arc;

use futures::future::BoxFuture;
use serde_json::{Map, Value, json};

use super::{
    BlockedBecause, Exchange, Gateway, GatewayError, LocalShare, LocalUse,
    call::{counts, date, outcome_word},
    exchange::{internal, kept},
    facts,
    meters::LOCAL,
};
use crate::{
    audit::{
        Audit,
        record::{ModelUsed, RequestRecord, RouteTaken},
    },
    clock::UnixMillis,
    guardrails::{
        Decision, Judge, JudgeFailed, JudgePlace, Policy, Question, Side, Verdict,
        outside::{Asking, OutsideOutcome},
    },
    ledger::{self, LedgerRoute, Outcome, RequestStatus},
    policy::PrivacyClass,
    providers::{self, ChatRequest, UnmappedFields, Usage},
    upstream::{Departure, LeavesPremises, Received},
};

/// The longest verdict upstream: a reasoning model thinks in it, too.
const MAX_VERDICT_TOKENS: u64 = 2048;

/// What a judge of this process is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalQuestion {
    /// A base's or an adapter's name; None: the base.
    pub model: Option<String>,
    /// One user message.
    pub text: String,
    /// The only answers that make sense; empty: anything may come.
    pub answers: &'static [&'static str],
    /// Of the request that is judged.
    pub request_id: String,
    /// Of whoever's request is judged: it computes at their share.
    pub share: LocalShare,
}

/// What it says.
#[derive(Clone, Debug, Default)]
pub struct LocalAnswer {
    /// The text.
    pub text: String,
    /// What it took.
    pub used: LocalUse,
    /// Which weights it was.
    pub model: ModelUsed,
}

/// Runs a judge's question on the models of this process, past every limit and guardrail. Dropping the future cancels it.
pub trait LocalJudge: Send + Sync {
    /// One answer.
    fn ask(&self, question: LocalQuestion) -> BoxFuture<'_, Result<LocalAnswer, JudgeFailed>>;
}

impl Gateway {
    /// The server's way to its own models. The first one stays.
    pub fn set_local_judge(&self, judge: Arc<dyn LocalJudge>) {
        let _first_one_stays = self.0.local_judge.set(judge);
    }

    /// Whose a judge's name is, by the rule of targets: an upstream's name and a slash in front decide.
    fn upstream_of<'a>(&self, model: &'a str) -> Option<(&'a str, &'a str)> {
        model.split_once('/').filter(|(upstream, model)| self.0.upstreams.contains_key(*upstream) && !model.is_empty())
    }
}

impl Exchange {
    /// Has those asked about the prompt whom the tenant's guardrails ask. Where there are none this costs nothing.
    ///
    /// # Errors
    /// [`GatewayError::Blocked`].
    pub async fn ask_about_prompt(&mut self) -> Result<(), GatewayError> {
        if !self.tenant.policy.asks_outside(Side::Prompt) {
            return Ok(());
        }
        let text = Policy::prompt_text(&mut self.body);
        let OutsideOutcome { decision, verdicts } = self.ask_about(Side::Prompt, &text).await;
        let is_silence = verdicts.last().is_some_and(Verdict::is_silence);
        self.note(verdicts);
        match decision {
            Decision::Pass => Ok(()),
            Decision::RouteLocal => {
                self.must_stay = true;
                Ok(())
            }
            Decision::Block { guardrail } => {
                let because = if is_silence { BlockedBecause::Silence } else { BlockedBecause::Found };
                Err(GatewayError::Blocked { guardrail, because })
            }
        }
    }

    /// What those say who are to be asked about a text of this request.
    pub(super) async fn ask_about(&self, side: Side, text: &str) -> OutsideOutcome {
        let class = if self.must_stay { PrivacyClass::LocalOnly } else { self.privacy };
        self.tenant.policy.ask_outside(side, text, Asking { judge: &Bench(self), class }).await
    }
}

/// The judges, for one request.
struct Bench<'a>(&'a Exchange);

impl Judge for Bench<'_> {
    fn place(&self, model: &str) -> JudgePlace {
        if self.0.gateway.upstream_of(model).is_some() { JudgePlace::Outside } else { JudgePlace::Local }
    }

    fn ask<'a>(
        &'a self,
        model: &'a str,
        question: Question,
        leaves: Option<LeavesPremises>,
    ) -> BoxFuture<'a, Result<String, JudgeFailed>> {
        Box::pin(async move {
            match (self.0.gateway.upstream_of(model), leaves) {
                (Some((upstream, model)), Some(leaves)) => {
                    let answer = self.ask_upstream((upstream, model), question, leaves).await;
                    answer.map_err(|error| JudgeFailed(error.to_string()))
                }
                (Some(_), None) => Err(JudgeFailed("it is elsewhere, and the request must stay here".to_owned())),
                (None, _) => self.ask_here(model, question).await,
            }
        })
    }

    fn watch_hook<'a>(
        &'a self,
        guardrail: &'a str,
        host: &'a str,
        call: BoxFuture<'a, Result<bool, String>>,
    ) -> BoxFuture<'a, Result<bool, String>> {
        Box::pin(async move {
            let why = format!("the guardrail {guardrail} asks it");
            let record = self.open_record((ModelUsed::default(), &format!("webhook:{host}")), why, None);
            let said = call.await;
            let outcome = if said.is_ok() { "judged" } else { "failed" };
            record.end(&Usage::default(), outcome).await.map_err(|error| error.to_string())?;
            said
        })
    }
}

/// A text is out to be judged. The log learns of it even where nobody waits for the verdict any more.
struct OpenRecord<'a> {
    audit: Option<&'a Audit>,
    /// None: it is in the log, or there is nothing to tell.
    record: Option<RequestRecord>,
    /// None: it went at once.
    departure: Option<Departure>,
}

impl OpenRecord<'_> {
    async fn end(mut self, usage: &Usage, outcome: &str) -> Result<(), GatewayError> {
        let (Some(audit), Some(mut record)) = (self.audit, self.record.take()) else { return Ok(()) };
        record.tokens = (*usage).into();
        outcome.clone_into(&mut record.outcome);
        kept(audit.record(record, None)).await
    }

    /// Nothing went out.
    fn forget(mut self) {
        self.record = None;
    }
}

impl Drop for OpenRecord<'_> {
    fn drop(&mut self) {
        let has_left = self.departure.as_ref().is_none_or(Departure::has_left);
        if let (Some(audit), Some(mut record), true) = (self.audit, self.record.take(), has_left) {
            outcome_word(RequestStatus::Cancelled).clone_into(&mut record.outcome);
            let _nobody_waits = audit.record(record, None);
        }
    }
}

impl Bench<'_> {
    async fn ask_here(&self, model: &str, question: Question) -> Result<String, JudgeFailed> {
        let exchange = self.0;
        let judge = exchange.gateway.0.local_judge.get();
        let judge = judge.ok_or_else(|| JudgeFailed("this process has no model yet".to_owned()))?;
        let asked = UnixMillis::now();
        let local = LocalQuestion {
            model: (model != "local").then(|| model.to_owned()),
            text: question.text,
            answers: question.answers,
            request_id: exchange.request_id.clone(),
            share: exchange.tenant.share(),
        };
        let LocalAnswer { text, used, model: weights } = judge.ask(local).await?;
        let usage = self.enter_local(model, &used, asked).await;
        let model = ModelUsed { name: model.to_owned(), ..weights };
        let record = self.open_record((model, LOCAL), as_judge(&question.guardrail), None);
        record.end(&usage, "judged").await.map(|()| text).map_err(|error| JudgeFailed(error.to_string()))
    }

    /// The ledger's row of a local verdict; what it has used.
    async fn enter_local(&self, model: &str, used: &LocalUse, asked: UnixMillis) -> Usage {
        let exchange = self.0;
        let now = UnixMillis::now();
        let usage = used.usage();
        let outcome = Outcome {
            status: RequestStatus::Completed,
            tokens: counts(&usage),
            latency: now.since(asked),
            price: exchange.gateway.0.local.price(used),
            reference_price: None,
        };
        exchange.gateway.0.meters.spend(exchange.tenant.config.id.as_str(), LOCAL, &usage, outcome.price);
        let call = exchange.call(LedgerRoute::Local, model.to_owned(), None);
        if let Some(ledger) = &exchange.gateway.0.ledger
            && let Err(error) = ledger.record_local(&call, outcome, now).await
        {
            tracing::warn!(%error, "the row of a judge's verdict waits for the store");
        }
        usage
    }

    /// A call like any other: translated, paid for, through the door, settled. Dropped on its way it is charged in full.
    async fn ask_upstream(
        &self,
        (upstream, model): (&str, &str),
        question: Question,
        leaves: LeavesPremises,
    ) -> Result<String, GatewayError> {
        let exchange = self.0;
        let gateway = exchange.gateway.clone();
        let (live, entry) = gateway.offer(upstream, model)?;
        let now = UnixMillis::now();
        let body = json!({
            "model": format!("{upstream}/{model}"), "messages": [{"role": "user", "content": question.text}],
            "max_completion_tokens": MAX_VERDICT_TOKENS,
        });
        let max_prompt_tokens = ledger::max_prompt_tokens(facts::size_of(&body), 0);
        let endpoint = live.endpoint.current();
        let call = providers::Call {
            endpoint: &endpoint,
            model: &entry,
            max_output_tokens: Some(MAX_VERDICT_TOKENS),
            max_prompt_tokens,
            fields: UnmappedFields::Drop,
            at: date(now),
        };
        let body: Map<String, Value> = match body {
            Value::Object(body) => body,
            _ => return Err(internal("a judge's question is no object")),
        };
        let outgoing = live.config.provider.chat(&call, &ChatRequest::read(body)?)?;
        let reservation = exchange.reserve(live, &entry, &outgoing, (Some(max_prompt_tokens), false), now).await?;
        let most = (max_prompt_tokens, outgoing.max_output_tokens.unwrap_or(MAX_VERDICT_TOKENS));
        // Of its end the log learns here: the exchange's own record tells of the answer.
        let mut open = exchange.open_call((upstream, entry), reservation, most, (now, now));
        let departure = open.departure.clone();
        let why = as_judge(&question.guardrail);
        let record = self.open_record((open.model_used(), &open.to), why, Some(departure.clone()));
        match live.door.send(leaves, &live.health, outgoing, (&departure, exchange.max_call(now))).await {
            Ok(Received::Whole(answer)) => {
                open.settle(answer.usage.into(), RequestStatus::Completed).await;
                record.end(&answer.usage, "judged").await?;
                let content = answer.choices.into_iter().next().and_then(|choice| choice.message.content);
                Ok(content.unwrap_or_default())
            }
            Ok(Received::Stream(_)) => Err(internal("a judge answered in pieces, and was not asked to")),
            Err(error) => {
                open.settle(error.spent.clone(), RequestStatus::Failed).await;
                if departure.has_left() {
                    record.end(&open.used(&error.spent), "failed").await?;
                } else {
                    record.forget();
                }
                Err(GatewayError::Upstream(error))
            }
        }
    }

    /// A text goes out to be judged: the log says where to, beside the record of its request.
    fn open_record(&self, (model, to): (ModelUsed, &str), why: String, departure: Option<Departure>) -> OpenRecord<'_> {
        let exchange = self.0;
        let audit = exchange.gateway.0.audit.as_deref();
        let record = audit.map(|_| RequestRecord {
            model,
            route: RouteTaken { to: to.to_owned(), why },
            ..exchange.blank_record()
        });
        OpenRecord { audit, record, departure }
    }
}

fn as_judge(guardrail: &str) -> String {
    format!("the guardrail {guardrail} asks it as its judge")
}
