//! A model request through the gateway: admitted under its tenant's limits, sent to the places its route names, accounted
//! for before its last byte.
//!
//! It knows bodies and headers; decisions, prices and upstream wires are the gateway's, and what is local goes on to the
//! route's own handler as if it had come in so. Invariant: of an answer whose first byte went out nothing is asked again
//! elsewhere, and no answer ends well before its row is committed or waits for the store.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderName, HeaderValue, StatusCode, header, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use bindery_gateway::{
    clock::UnixMillis,
    gateway::{
        AnswerFilters, Asked, Exchange, Gateway, GatewayError, LocalModel, LocalUse, Sent, UpstreamStream, WireRoute,
        facts,
    },
    ledger::RequestStatus,
    policy::{LocalState, Target, route::LocalName},
};
use futures::{Stream, stream};
use http_body_util::BodyExt;
use serde_json::{Map, Value};

use crate::{
    adapters::NamedKind,
    body::read_body,
    context::RequestContext,
    error::ApiError,
    router::{Serving, X_BINDERY_ROUTE},
    slot::ModelSlot,
    sse,
    state::{AppState, Job, SharedState},
};

const X_BINDERY_WARNING: HeaderName = HeaderName::from_static("x-bindery-warning");
const X_BINDERY_PRIVACY: &str = "x-bindery-privacy";
const X_BINDERY_TASK: &str = "x-bindery-task";
/// The largest answer of a local model that is held whole to be filtered.
const MAX_LOCAL_ANSWER_BYTES: usize = 256 << 20;

/// Prompts that were answered here: what a waiting one is likely to cost.
#[derive(Debug, Default)]
pub(crate) struct PromptMeter {
    num_prompts: AtomicU64,
    num_tokens: AtomicU64,
}

impl PromptMeter {
    fn count(&self, num_tokens: u64) {
        self.num_prompts.fetch_add(1, Ordering::Relaxed);
        self.num_tokens.fetch_add(num_tokens, Ordering::Relaxed);
    }

    fn mean(&self) -> f64 {
        let num_prompts = self.num_prompts.load(Ordering::Relaxed).max(1);
        self.num_tokens.load(Ordering::Relaxed) as f64 / num_prompts as f64
    }
}

/// Stands before the generation routes; without a gateway it is not there.
pub(crate) async fn through_gateway(State(state): State<SharedState>, request: Request, next: Next) -> Response {
    let Some(gateway) = state.config.gateway.clone() else { return next.run(request).await };
    let (parts, body) = request.into_parts();
    match answer(&state, &gateway, parts, body, next).await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    }
}

async fn answer(
    state: &SharedState,
    gateway: &Gateway,
    parts: Parts,
    body: Body,
    next: Next,
) -> Result<Response, ApiError> {
    let (Some(serving), Some(context)) =
        (parts.extensions.get::<Serving>().cloned(), parts.extensions.get::<RequestContext>().cloned())
    else {
        return Err(ApiError::internal("unknown", &"a generation route stands before its gate"));
    };
    let bytes = read_body(&parts.headers, body, &state.limits).await?;
    let Some(object) = parse(state, &bytes).await else {
        // What is no JSON object the route itself refuses, in its own words.
        return Ok(next.run(Request::from_parts(parts, Body::from(bytes))).await);
    };
    let cannot = facts::beyond_text(&object);
    let mut exchange = begin(state, gateway, &parts, (&serving, &context), object).await?;
    exchange.ask_about_prompt().await.map_err(|error| refused(&context, error))?;
    let local = LocalState { cannot, ..local_state(state, &serving) };
    let local_name = |name: &str| match serving.kind_of(state, name) {
        Some(NamedKind::Base) => LocalName::Base,
        Some(NamedKind::Adapter) => LocalName::Adapter,
        None => LocalName::Unknown,
    };
    let route = exchange.route(local, UnixMillis::now(), &local_name).await;
    let route = route.map_err(|error| match error {
        // With the names that may be asked for.
        GatewayError::Route(bindery_gateway::policy::Refused::UnknownModel { asked }) => serving.unknown(state, asked),
        error => refused(&context, error),
    })?;
    tracing::debug!(targets = ?route.targets, why = ?route.why, "routed");
    let rate_headers = exchange.rate_headers();
    let num_targets = route.targets.len();
    let starts_local = route.targets.first().is_some_and(Target::is_local);
    let overflows = !starts_local && route.targets.iter().any(Target::is_local);
    let mut parts = Some(parts);
    for (at, target) in route.targets.iter().enumerate() {
        let is_last = at + 1 == num_targets;
        let mut response = match target {
            Target::Local | Target::LocalModel(_) => {
                let request =
                    local_request(&mut parts, is_last, exchange.local_body(target).unwrap_or_else(|| bytes.clone()))
                        .ok_or_else(|| ApiError::internal(&context.id, &"a request was used up"))?;
                let response = next.clone().run(request).await;
                let may_help =
                    matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
                if may_help && !is_last {
                    continue;
                }
                let adapter = match (target, local_name(&target.to_string())) {
                    (Target::LocalModel(name), LocalName::Adapter) => {
                        Some((name.to_string(), serving.model.adapters.digest(name).unwrap_or_default()))
                    }
                    _ => None,
                };
                let model = LocalModel {
                    name: state.config.primary_model_name().to_owned(),
                    digest: state.config.digest.clone(),
                    licence: state.config.license.clone(),
                    adapter,
                };
                return Ok(decorated(local_answer(state, response, exchange, context, model).await, &rate_headers));
            }
            Target::Upstream { upstream, model } => {
                let _ = context.counts.model.set(target.to_string());
                match exchange.send(upstream, model, overflows && at == 0, UnixMillis::now()).await {
                    Ok((Sent::Whole(answer), warning)) => with_warning(axum::Json(answer).into_response(), warning),
                    Ok((Sent::Stream(stream), warning)) => {
                        with_warning(upstream_stream(*stream, exchange, context.clone(), state), warning)
                    }
                    Err(error) if error.lets_others_try() && !is_last => {
                        tracing::info!(target = %target, error = %error, "the next place of the route is tried");
                        continue;
                    }
                    Err(error) => return Err(refused(&context, error)),
                }
            }
        };
        let name = match target {
            Target::Upstream { upstream, .. } => format!("upstream:{upstream}"),
            Target::Local | Target::LocalModel(_) => "local".to_owned(),
        };
        if let Ok(value) = HeaderValue::from_str(&name) {
            response.headers_mut().insert(X_BINDERY_ROUTE, value);
        }
        return Ok(decorated(response, &rate_headers));
    }
    Err(ApiError::internal(&context.id, &"a route had no target"))
}

/// The body as a JSON object. A large one is parsed on a blocking thread.
async fn parse(state: &AppState, bytes: &Bytes) -> Option<Map<String, Value>> {
    let parse = |bytes: &[u8]| serde_json::from_slice::<Map<String, Value>>(bytes).ok();
    if bytes.len() <= state.limits.max_inline_parse_bytes {
        return parse(bytes);
    }
    let bytes = bytes.clone();
    state.run_blocking(Job::Parse, move || parse(&bytes)).await?
}

/// Limits and guardrails. Those of a large body, whose time is in its length, run on a blocking thread.
async fn begin(
    state: &SharedState,
    gateway: &Gateway,
    parts: &Parts,
    (serving, context): (&Serving, &RequestContext),
    body: Map<String, Value>,
) -> Result<Exchange, ApiError> {
    let text = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let wire = if parts.uri.path().ends_with("/chat/completions") { WireRoute::Chat } else { WireRoute::Completions };
    let (task, privacy) = (text(X_BINDERY_TASK), text(X_BINDERY_PRIVACY));
    let default_model = state.config.primary_model_name().to_owned();
    let (caller, request_id) = (serving.caller.clone(), Arc::clone(&context.id));
    let is_large = parts
        .headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<usize>().ok())
        .is_none_or(|length| length > state.limits.max_inline_parse_bytes);
    let gateway = gateway.clone();
    let begin = move || {
        gateway.begin(Asked {
            tenant: caller.tenant.as_deref(),
            credential: caller.credential,
            wire,
            body,
            default_model: &default_model,
            task: task.as_deref(),
            privacy: privacy.as_deref(),
            request_id: &request_id,
            now: UnixMillis::now(),
        })
    };
    let begun = if is_large {
        let panicked = || ApiError::internal(&context.id, &"the gateway panicked");
        state.run_blocking(Job::Parse, begin).await.ok_or_else(panicked)?
    } else {
        begin()
    };
    begun.map_err(|error| refused(context, error))
}

/// What would happen here now.
fn local_state(state: &AppState, serving: &Serving) -> LocalState {
    let stats = serving.model.engine.stats();
    // Nothing measured yet: nothing is predicted.
    let predicted_ttft = stats.seconds_per_token().map(|seconds_per_token| {
        let num_tokens = (stats.num_requests_waiting + 1) as f64 * state.prompts.mean();
        Duration::from_secs_f64((num_tokens * seconds_per_token).min(86_400.0))
    });
    LocalState {
        max_prompt_tokens: serving.model.max_model_len,
        predicted_ttft,
        is_exhausted: stats.num_used_blocks >= stats.num_blocks && stats.num_requests_waiting > 0,
        cannot: None,
    }
}

/// The request for this process's own route. Only the last place of a route uses the head up.
fn local_request(parts: &mut Option<Parts>, is_last: bool, body: Bytes) -> Option<Request> {
    let mut head = if is_last { parts.take()? } else { parts.as_ref()?.clone() };
    head.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    head.headers.remove(header::TRANSFER_ENCODING);
    Some(Request::from_parts(head, Body::from(body)))
}

fn with_warning(mut response: Response, warning: Option<String>) -> Response {
    if let Some(Ok(value)) = warning.map(|text| HeaderValue::from_str(&text)) {
        response.headers_mut().insert(X_BINDERY_WARNING, value);
    }
    response
}

fn decorated(mut response: Response, rate_headers: &[(&'static str, String)]) -> Response {
    for (name, value) in rate_headers {
        if let Ok(value) = HeaderValue::from_str(value) {
            response.headers_mut().insert(HeaderName::from_static(name), value);
        }
    }
    response
}

fn refused(context: &RequestContext, error: GatewayError) -> ApiError {
    match error {
        GatewayError::Internal(what) => ApiError::internal(&context.id, &what),
        error => ApiError::from_gateway(&error, UnixMillis::now()),
    }
}

// --- answers ---

/// A local answer through its tenant's guardrails, with its row in the ledger before its end.
async fn local_answer(
    state: &SharedState,
    response: Response,
    exchange: Exchange,
    context: RequestContext,
    model: LocalModel,
) -> Response {
    if !response.status().is_success() {
        return response;
    }
    let filters = exchange.filters();
    let account = Account { state: Arc::clone(state), exchange, context, model };
    let is_stream = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    let (parts, body) = response.into_parts();
    if is_stream {
        let is_filtered = filters.is_some();
        let events = local_stream(body, filters, account);
        let body = if is_filtered {
            Body::from_stream(sse::kept_alive(sse::KEEP_ALIVE_INTERVAL, events))
        } else {
            Body::from_stream(events)
        };
        return Response::from_parts(parts, body);
    }
    whole_local_answer(parts, body, filters, account).await
}

async fn whole_local_answer(
    mut parts: axum::http::response::Parts,
    body: Body,
    filters: Option<AnswerFilters>,
    mut account: Account,
) -> Response {
    let Ok(bytes) = axum::body::to_bytes(body, MAX_LOCAL_ANSWER_BYTES).await else {
        return ApiError::internal(&account.context.id, &"a whole answer could not be read").into_response();
    };
    let filtered = match filters {
        Some(filters) => filtered(filters, &mut account.exchange, &bytes).await,
        None => None,
    };
    if let Err(error) = account.settle(RequestStatus::Completed).await {
        return error.into_response();
    }
    let bytes = filtered.unwrap_or(bytes);
    parts.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes.len()));
    Response::from_parts(parts, Body::from(bytes))
}

async fn filtered(mut filters: AnswerFilters, exchange: &mut Exchange, bytes: &[u8]) -> Option<Bytes> {
    let mut answer = serde_json::from_slice(bytes).ok()?;
    filters.whole(exchange, &mut answer).await;
    serde_json::to_vec(&answer).ok().map(Bytes::from)
}

/// What a local request used, for when it ends; one that is dropped before is accounted for all the same.
struct Account {
    state: SharedState,
    exchange: Exchange,
    context: RequestContext,
    model: LocalModel,
}

impl Account {
    async fn settle(&mut self, status: RequestStatus) -> Result<(), ApiError> {
        let counts = &self.context.counts;
        let used = LocalUse {
            num_prompt_tokens: counts.num_prompt_tokens.load(Ordering::Relaxed) as u64,
            num_completion_tokens: counts.num_completion_tokens.load(Ordering::Relaxed) as u64,
            machine_time: Duration::ZERO,
        };
        self.state.prompts.count(used.num_prompt_tokens);
        let used = LocalUse { machine_time: machine_time(&self.state.slot, &used), ..used };
        let model = std::mem::take(&mut self.model);
        let settled = self.exchange.settle_local(used, status, model, UnixMillis::now()).await;
        settled.map_err(|error| refused(&self.context, error))
    }
}

/// A request's share of the time that this machine has computed for all.
pub(crate) fn machine_time(slot: &ModelSlot, used: &LocalUse) -> Duration {
    let Some(model) = slot.model() else { return Duration::ZERO };
    let num_tokens = (used.num_prompt_tokens + used.num_completion_tokens) as f64;
    let seconds_per_token = model.engine.stats().seconds_per_token().unwrap_or_default();
    Duration::try_from_secs_f64(seconds_per_token * num_tokens).unwrap_or_default()
}

/// Our own events, one by one.
fn local_stream(
    body: Body,
    filters: Option<AnswerFilters>,
    account: Account,
) -> impl Stream<Item = Result<Bytes, axum::Error>> + Send {
    let progress = LocalStream { body: Some(body), filters, account: Some(account), text: Vec::new() };
    stream::unfold(progress, |mut progress| async move {
        let piece = progress.next().await?;
        Some((piece, progress))
    })
}

struct LocalStream {
    body: Option<Body>,
    filters: Option<AnswerFilters>,
    /// Taken when it is settled.
    account: Option<Account>,
    /// Of an event that is not whole yet.
    text: Vec<u8>,
}

impl LocalStream {
    async fn next(&mut self) -> Option<Result<Bytes, axum::Error>> {
        loop {
            let frame = match self.body.as_mut()?.frame().await {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => {
                    self.body = None;
                    return Some(Err(error));
                }
                None => {
                    self.body = None;
                    if let Some(mut account) = self.account.take() {
                        account.exchange.note(self.filters.as_ref().map(AnswerFilters::verdicts).unwrap_or_default());
                        let _it_failed_anyway = account.settle(RequestStatus::Failed).await;
                    }
                    return (!self.text.is_empty()).then(|| Ok(Bytes::from(std::mem::take(&mut self.text))));
                }
            };
            let Ok(data) = frame.into_data() else { continue };
            self.text.extend_from_slice(&data);
            let mut out = Vec::new();
            while let Some(end) = self.text.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = self.text.drain(..end + 2).collect();
                self.event(event, &mut out).await;
            }
            if !out.is_empty() {
                return Some(Ok(Bytes::from(out)));
            }
        }
    }

    /// Hands an event on, filtered; the last one after the request's row is written.
    async fn event(&mut self, event: Vec<u8>, out: &mut Vec<u8>) {
        let data = event.strip_prefix(b"data: ").map(<[u8]>::trim_ascii_end);
        if data == Some(b"[DONE]") {
            if let (Some(filters), Some(account)) = (&mut self.filters, &mut self.account) {
                for chunk in filters.end(&mut account.exchange).await {
                    out.extend_from_slice(format!("data: {chunk}\n\n").as_bytes());
                }
            }
            let settled = match self.account.take() {
                Some(mut account) => account.settle(RequestStatus::Completed).await,
                None => Ok(()),
            };
            match settled {
                Ok(()) => out.extend_from_slice(&event),
                // What had to be logged could not be: the answer does not end well.
                Err(error) => out.extend_from_slice(format!("data: {}\n\n", error.to_json()).as_bytes()),
            }
            return;
        }
        let chunk = data.filter(|_| self.filters.is_some()).and_then(|data| serde_json::from_slice::<Value>(data).ok());
        match (chunk, &mut self.filters) {
            (Some(chunk), Some(filters)) => {
                for chunk in filters.chunk(chunk) {
                    out.extend_from_slice(format!("data: {chunk}\n\n").as_bytes());
                }
            }
            _ => out.extend_from_slice(&event),
        }
    }
}

impl Drop for LocalStream {
    fn drop(&mut self) {
        // The client is gone: what was computed is accounted for without it.
        if let (Some(mut account), Ok(runtime)) = (self.account.take(), tokio::runtime::Handle::try_current()) {
            account.exchange.note(self.filters.as_ref().map(AnswerFilters::verdicts).unwrap_or_default());
            runtime.spawn(async move {
                let _nobody_is_there_to_be_told = account.settle(RequestStatus::Cancelled).await;
            });
        }
    }
}

/// An upstream's answer as our own events. Dropping it ends the call.
fn upstream_stream(
    stream: UpstreamStream,
    exchange: Exchange,
    context: RequestContext,
    state: &SharedState,
) -> Response {
    let cut = state.lifecycle.cut_token().clone();
    let progress = Some((stream, exchange, context));
    let texts = stream::unfold(progress, move |progress| {
        let cut = cut.clone();
        async move {
            let (mut stream, mut exchange, context) = progress?;
            let next = tokio::select! {
                biased;
                next = stream.next(&mut exchange) => next,
                () = cut.cancelled() => {
                    let error = ApiError::CutByShutdown;
                    let _ = context.counts.stream_error.set(error.status().as_u16());
                    return Some((error.to_json(), None));
                }
            };
            match next {
                Some(Ok(chunk)) => Some((chunk.to_string(), Some((stream, exchange, context)))),
                Some(Err(error)) => {
                    let _ = context.counts.stream_error.set(error.status());
                    Some((error.to_json().to_string(), None))
                }
                None => Some(("[DONE]".to_owned(), None)),
            }
        }
    });
    sse::events(texts)
}
