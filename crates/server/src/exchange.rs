//! A model request through the gateway: admitted under its tenant's limits, sent to the places its route names, accounted
//! for before its last byte.
//!
//! It knows bodies and headers; decisions, prices and upstream wires are the gateway's, and what is local goes on to the
//! route's own handler as if it had come in so. Invariant: of an answer whose first byte went out nothing is asked again
//! elsewhere, and no answer ends well before its row is committed or waits for the store.

use std::{
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use bindery_engine::{AdapterIdentity, LocalModel};
use bindery_gateway::{
    audit::record::{AdapterUsed, ModelUsed},
    clock::UnixMillis,
    gateway::{
        AnswerFilters, Asked, Exchange, Gateway, GatewayError, LocalUse, Sent, Unreadable, UpstreamStream, WireRoute,
        facts,
    },
    ledger::{LedgerError, RequestStatus},
    policy::{CannotTake, LocalState, Shortage, Target, route::LocalName},
};
use futures::{Stream, stream};
use http_body_util::BodyExt;
use serde_json::{Map, Value};

use crate::{
    auth::Caller,
    body::{check_content_encoding, check_content_type, object, read_body, request_timeout},
    context::RequestContext,
    error::{ApiError, CONTEXT_LENGTH_EXCEEDED, ErrorCode},
    generation::Deadline,
    router::X_BINDERY_ROUTE,
    sampling::DefaultMaxTokens,
    slot::ModelSlot,
    sse,
    state::{AppState, Job, SharedState},
};

const X_BINDERY_WARNING: HeaderName = HeaderName::from_static("x-bindery-warning");
const X_BINDERY_PRIVACY: &str = "x-bindery-privacy";
const X_BINDERY_TASK: &str = "x-bindery-task";
/// The largest answer of a local model that is held whole to be filtered.
const MAX_LOCAL_ANSWER_BYTES: usize = 256 << 20;

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
    let (Some(caller), Some(context)) =
        (parts.extensions.get::<Caller>().cloned(), parts.extensions.get::<RequestContext>().cloned())
    else {
        return Err(ApiError::internal("unknown", &"a generation route stands before its gate"));
    };
    let incoming = match read(state, &context, &parts.headers, body).await {
        Ok(incoming) => incoming,
        Err(error) => return Err(unreadable(gateway, (&caller, &context), error).await),
    };
    let (bytes, timeout) = (incoming.bytes.clone(), incoming.timeout);
    let cannot = facts::beyond_text(&incoming.object);
    let exchange = begin(state, gateway, &parts, (&caller, &context), incoming).await?;
    // However it ends, it has counted.
    let rate_headers = exchange.rate_headers();
    let admitted = Admitted { parts, bytes, timeout, cannot };
    let answered = answer_admitted(state, (&caller, &context), exchange, admitted, next).await;
    Ok(decorated(answered.unwrap_or_else(IntoResponse::into_response), &rate_headers))
}

/// A request that its limits let through, beside its exchange.
struct Admitted {
    parts: Parts,
    bytes: Bytes,
    timeout: Option<Duration>,
    /// What no local model reads of it.
    cannot: Option<CannotTake>,
}

async fn answer_admitted(
    state: &SharedState,
    (caller, context): (&Caller, &RequestContext),
    mut exchange: Exchange,
    Admitted { parts, bytes, timeout, cannot }: Admitted,
    next: Next,
) -> Result<Response, ApiError> {
    let is_late = || timeout.is_some_and(|timeout| context.started.elapsed() >= timeout);
    // While the weights load, what runs elsewhere is served.
    let model = state.slot.model();
    if let Err(error) = exchange.ask_about_prompt().await {
        return Err(refused(context, exchange.give_up(error).await));
    }
    let local = LocalState { cannot, ..local_state(model, exchange.estimated_prompt_tokens()) };
    let local_name = |name: &str| caller.local_name(state, name);
    let route = exchange.route(local, UnixMillis::now(), &local_name).await;
    let route = match route {
        Ok(route) => route,
        Err(error) => {
            return Err(match exchange.give_up(error).await {
                // With the names that may be asked for.
                GatewayError::Route(bindery_gateway::policy::Refused::UnknownModel { asked }) => {
                    match state.slot.ready() {
                        Ok(_) => caller.unknown(state, asked),
                        // It may be an adapter's.
                        Err(error) => error,
                    }
                }
                error => refused(context, error),
            });
        }
    };
    tracing::debug!(targets = ?route.targets, why = ?route.why, "routed");
    let num_targets = route.targets.len();
    let mut parts = Some(parts);
    for (at, target) in route.targets.iter().enumerate() {
        if let (true, Some(timeout)) = (is_late(), timeout) {
            exchange.time_out().await.map_err(|error| refused(context, error))?;
            return Err(Deadline::error(timeout));
        }
        let is_last = at + 1 == num_targets;
        let mut response = match target {
            Target::Local | Target::LocalModel(_) => {
                if let Err(error) = exchange.may_run_here() {
                    if !is_last {
                        exchange.passed_over(target, &error.shown().2);
                        continue;
                    }
                    return Err(refused(context, exchange.give_up(error).await));
                }
                let mut request =
                    local_request(&mut parts, is_last, exchange.local_body(target).unwrap_or_else(|| bytes.clone()))
                        .ok_or_else(|| ApiError::internal(&context.id, &"a request was used up"))?;
                if let Some(tokens) = exchange.default_output_tokens() {
                    let tokens = usize::try_from(tokens).unwrap_or(usize::MAX);
                    request.extensions_mut().insert(DefaultMaxTokens(tokens));
                }
                // Which version of an adapter it gets is known once it has one.
                let adapter = match (target, local_name(&target.to_string())) {
                    (Target::LocalModel(name), LocalName::Adapter) => {
                        Some(AdapterUsed { name: name.to_string(), ..AdapterUsed::default() })
                    }
                    _ => None,
                };
                let model = ModelUsed { adapter, ..house_model(state) };
                // From here on whoever leaves is accounted for.
                let (filters, warnings) = (exchange.filters(), exchange.warnings());
                let mut account =
                    Account { state: Arc::clone(state), exchange: Some(exchange), context: context.clone(), model };
                let response = next.clone().run(request).await;
                if !is_last
                    && let Some(code) = given_back(&response)
                    && let Some(returned) = account.exchange.take()
                {
                    exchange = returned;
                    exchange.passed_over(target, &code);
                    continue;
                }
                let answer = local_answer(response, filters, account).await;
                let answer =
                    if answer.status().is_success() { with_warning(answer, warnings.header()) } else { answer };
                return Ok(answer);
            }
            Target::Upstream { upstream, model } => {
                let _ = context.counts.model.set(target.to_string());
                match exchange.send(upstream, model, route.overflows(at), UnixMillis::now()).await {
                    Ok((Sent::Whole(answer), warning)) => with_warning(axum::Json(answer).into_response(), warning),
                    Ok((Sent::Stream(stream), warning)) => {
                        let deadline = timeout.map(|timeout| Deadline::new(context, timeout));
                        with_warning(upstream_stream(*stream, exchange, (context.clone(), deadline), state), warning)
                    }
                    Err(GatewayError::Ledger(LedgerError::OverBudget(_)))
                        if let Some(refused_instead) = route.refused_instead(at) =>
                    {
                        let error = GatewayError::Route(refused_instead.clone());
                        return Err(refused(context, exchange.give_up(error).await));
                    }
                    Err(error) if error.lets_others_try() && !is_last && !is_late() => {
                        tracing::info!(target = %target, error = %error, "the next place of the route is tried");
                        if !matches!(error, GatewayError::Upstream(_)) {
                            exchange.passed_over(target, &error.shown().2);
                        }
                        continue;
                    }
                    Err(error) => match (exchange.give_up(error).await, timeout.filter(|_| is_late())) {
                        // It ran there, or failed to.
                        (GatewayError::Upstream(_), Some(timeout)) => Deadline::error(timeout).into_response(),
                        (error @ (GatewayError::Upstream(_) | GatewayError::Audit(_)), _) => {
                            refused(context, error).into_response()
                        }
                        (error, _) => return Err(refused(context, error)),
                    },
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
        return Ok(response);
    }
    Err(ApiError::internal(&context.id, &"a route had no target"))
}

/// A request as it came: the bytes for the route here, the object for all that decides.
struct Incoming {
    bytes: Bytes,
    object: Map<String, Value>,
    /// From `x-request-timeout`.
    timeout: Option<Duration>,
    /// From `x-bindery-task`.
    task: Option<String>,
    /// From `x-bindery-privacy`.
    privacy: Option<String>,
}

/// What the routes here check of a request before they read it, for requests that may never come to one. What the object
/// cannot hold is refused: no body goes on that was not looked at. A large one is parsed on a blocking thread.
async fn read(
    state: &AppState,
    context: &RequestContext,
    headers: &HeaderMap,
    body: Body,
) -> Result<Incoming, ApiError> {
    check_content_type(headers)?;
    check_content_encoding(headers)?;
    let timeout = request_timeout(headers, &state.limits)?;
    let (task, privacy) = (list(headers, X_BINDERY_TASK)?, list(headers, X_BINDERY_PRIVACY)?);
    let bytes = read_body(headers, body, &state.limits).await?;
    let object = if bytes.len() <= state.limits.max_inline_parse_bytes {
        object(&bytes)
    } else {
        let bytes = bytes.clone();
        let parsed = state.run_blocking(Job::Parse, move || object(&bytes)).await;
        parsed.ok_or_else(|| ApiError::internal(&context.id, &"the parser panicked"))?
    };
    Ok(Incoming { bytes, object: object?, timeout, task, privacy })
}

/// What cannot be read is in its sender's log, too.
async fn unreadable(gateway: &Gateway, (caller, context): (&Caller, &RequestContext), error: ApiError) -> ApiError {
    let body = error.to_body().error;
    let Caller { tenant, credential, .. } = caller;
    let code = body.code.as_deref().unwrap_or("invalid_request");
    let unreadable = Unreadable { tenant: tenant.as_deref(), credential, request_id: &context.id, code };
    match gateway.log_unreadable(unreadable).await {
        Ok(()) => error,
        Err(error) => refused(context, error),
    }
}

/// A header's values as one list (RFC 9110, 5.3). One that cannot be read is refused, for it may be what keeps a request here.
fn list(headers: &HeaderMap, name: &'static str) -> Result<Option<String>, ApiError> {
    let values: Result<Vec<&str>, _> = headers.get_all(name).iter().map(HeaderValue::to_str).collect();
    let values =
        values.map_err(|_| ApiError::invalid(name, format!("{name} holds more than visible ASCII: correct it")))?;
    Ok((!values.is_empty()).then(|| values.join(", ")))
}

/// Limits and guardrails. Those of a large body, whose time is in its length, run on a blocking thread.
async fn begin(
    state: &SharedState,
    gateway: &Gateway,
    parts: &Parts,
    (caller, context): (&Caller, &RequestContext),
    incoming: Incoming,
) -> Result<Exchange, ApiError> {
    let wire = if parts.uri.path().ends_with("/chat/completions") { WireRoute::Chat } else { WireRoute::Completions };
    let Incoming { object: body, timeout, task, privacy, .. } = incoming;
    let time_left = timeout.map(|timeout| timeout.saturating_sub(context.started.elapsed()));
    let default_model = state.config.primary_model_name().to_owned();
    let (caller, request_id) = (caller.clone(), Arc::clone(&context.id));
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
            grant: caller.grant,
            wire,
            body,
            default_model: &default_model,
            task: task.as_deref(),
            privacy: privacy.as_deref(),
            request_id: &request_id,
            time_left,
            now: UnixMillis::now(),
        })
    };
    let begun = if is_large {
        let panicked = || ApiError::internal(&context.id, &"the gateway panicked");
        state.run_blocking(Job::Parse, begin).await.ok_or_else(panicked)?
    } else {
        begin()
    };
    match begun {
        Ok(exchange) => Ok(exchange),
        Err(turned_away) => Err(refused(context, turned_away.told().await)),
    }
}

/// What would happen here now to a prompt of about so many tokens.
fn local_state(model: Option<&Arc<LocalModel>>, num_prompt_tokens: usize) -> LocalState {
    let Some(model) = model else {
        return LocalState { shortage: Some(Shortage::Model), max_prompt_tokens: usize::MAX, ..LocalState::default() };
    };
    let stats = model.engine.stats();
    let is_exhausted = stats.num_used_blocks >= stats.num_blocks && stats.num_requests_waiting > 0;
    LocalState {
        max_prompt_tokens: model.max_model_len,
        predicted_ttft: model.engine.predicted_ttft(num_prompt_tokens),
        shortage: is_exhausted.then_some(Shortage::Blocks),
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

/// The code of an answer that this machine gave before it computed anything, and that another place may do better: it is busy or not
/// ready, or its context is too short for a prompt that was only estimated before.
fn given_back(response: &Response) -> Option<String> {
    let ErrorCode(code) = response.extensions().get()?;
    let may_help = matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
        || code == CONTEXT_LENGTH_EXCEEDED;
    may_help.then(|| code.clone())
}

fn with_warning(mut response: Response, warning: Option<String>) -> Response {
    if let Some(Ok(value)) = warning.map(|text| HeaderValue::from_str(&text)) {
        // A list (RFC 9110, 5.3); what the route itself warns of stays.
        response.headers_mut().append(X_BINDERY_WARNING, value);
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
async fn local_answer(response: Response, filters: Option<AnswerFilters>, mut account: Account) -> Response {
    if !response.status().is_success() {
        return match account.fail().await {
            Ok(()) => response,
            Err(error) => error.into_response(),
        };
    }
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
        let error = ApiError::internal(&account.context.id, &"a whole answer could not be read");
        return account.settle(RequestStatus::Failed).await.err().unwrap_or(error).into_response();
    };
    let bytes = match (filters, &mut account.exchange) {
        (Some(filters), Some(exchange)) => match filtered(filters, exchange, &account.context, &bytes).await {
            Ok(bytes) => bytes,
            Err(error) => return account.settle(RequestStatus::Failed).await.err().unwrap_or(error).into_response(),
        },
        _ => bytes,
    };
    if let Err(error) = account.settle(RequestStatus::Completed).await {
        return error.into_response();
    }
    parts.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes.len()));
    Response::from_parts(parts, Body::from(bytes))
}

/// An answer through its filters. What they cannot read does not pass.
async fn filtered(
    filters: AnswerFilters,
    exchange: &mut Exchange,
    context: &RequestContext,
    bytes: &[u8],
) -> Result<Bytes, ApiError> {
    let answer = serde_json::from_slice(bytes).map_err(|error| ApiError::internal(&context.id, &error))?;
    let answer = filters.whole(exchange, answer).await.map_err(|error| refused(context, error))?;
    serde_json::to_vec(&answer).map(Bytes::from).map_err(|error| ApiError::internal(&context.id, &error))
}

/// What a local request used, for when it ends; one that is dropped before is accounted for all the same.
struct Account {
    state: SharedState,
    /// Taken when it is settled.
    exchange: Option<Exchange>,
    context: RequestContext,
    model: ModelUsed,
}

impl Account {
    async fn settle(&mut self, status: RequestStatus) -> Result<(), ApiError> {
        let Some(mut exchange) = self.exchange.take() else { return Ok(()) };
        let (used, model) = (self.used(), self.model());
        let settled = exchange.settle_local(used, status, model, UnixMillis::now()).await;
        settled.map_err(|error| refused(&self.context, error))
    }

    /// For an answer that is an error: what was computed has its row, and a request that was turned down its record alone.
    async fn fail(&mut self) -> Result<(), ApiError> {
        if self.context.counts.num_prompt_tokens.load(Ordering::Relaxed) > 0 {
            return self.settle(RequestStatus::Failed).await;
        }
        let Some(mut exchange) = self.exchange.take() else { return Ok(()) };
        exchange.turn_down().await.map_err(|error| refused(&self.context, error))
    }

    /// Takes note of what the answer's filters found.
    fn note(&mut self, filters: &AnswerFilters) {
        if let Some(exchange) = &mut self.exchange {
            exchange.note(filters.verdicts());
        }
    }

    /// What ran, the adapter by the version that the request held. One that it held at an earlier place of its route is another.
    fn model(&mut self) -> ModelUsed {
        let mut model = std::mem::take(&mut self.model);
        let held = self.context.counts.adapter.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let (Some(adapter), Some(held)) = (&mut model.adapter, held)
            && adapter.name == held.name
        {
            *adapter = local_adapter(AdapterIdentity::clone(&held));
        }
        model
    }

    fn used(&self) -> LocalUse {
        let counts = &self.context.counts;
        let used = LocalUse {
            num_prompt_tokens: counts.num_prompt_tokens.load(Ordering::Relaxed) as u64,
            num_completion_tokens: counts.num_completion_tokens.load(Ordering::Relaxed) as u64,
            machine_time: Duration::ZERO,
        };
        LocalUse { machine_time: machine_time(&self.state.slot, &used), ..used }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        // The client is gone: what was computed is accounted for without it.
        if let Some(mut exchange) = self.exchange.take() {
            let (used, model) = (self.used(), self.model());
            exchange.settle_local_later(used, RequestStatus::Cancelled, model, UnixMillis::now());
        }
    }
}

/// The base's weights.
pub(crate) fn house_model(state: &AppState) -> ModelUsed {
    ModelUsed {
        name: state.config.primary_model_name().to_owned(),
        digest: state.config.digest.get().cloned(),
        licence: state.config.license.clone(),
        adapter: None,
    }
}

pub(crate) fn local_adapter(identity: AdapterIdentity) -> AdapterUsed {
    let AdapterIdentity { name, digest, licence } = identity;
    AdapterUsed { name, digest, licence }
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
    let progress = LocalStream { body: Some(body), filters, account, text: Vec::new() };
    stream::unfold(progress, |mut progress| async move {
        let piece = progress.next().await?;
        Some((piece, progress))
    })
}

struct LocalStream {
    body: Option<Body>,
    filters: Option<AnswerFilters>,
    account: Account,
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
                    let _it_failed_anyway = self.settle(RequestStatus::Failed).await;
                    return Some(Err(error));
                }
                None => {
                    self.body = None;
                    let _it_failed_anyway = self.settle(RequestStatus::Failed).await;
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

    async fn settle(&mut self, status: RequestStatus) -> Result<(), ApiError> {
        if let Some(filters) = &self.filters {
            self.account.note(filters);
        }
        self.account.settle(status).await
    }

    /// Hands an event on, filtered; the last one after the request's row is written.
    async fn event(&mut self, event: Vec<u8>, out: &mut Vec<u8>) {
        let data = event.strip_prefix(b"data: ").map(<[u8]>::trim_ascii_end);
        if data == Some(b"[DONE]") {
            if let (Some(filters), Some(exchange)) = (&mut self.filters, &mut self.account.exchange) {
                for chunk in filters.end(exchange).await {
                    out.extend_from_slice(format!("data: {chunk}\n\n").as_bytes());
                }
                // Its verdicts are noted.
                self.filters = None;
            }
            match self.settle(RequestStatus::Completed).await {
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
        // What was found is noted before the account, which drops after this, says the rest.
        if let Some(filters) = &self.filters {
            self.account.note(filters);
        }
    }
}

/// An upstream's answer on its way. The fields drop in their order: the call says what it used before the exchange is logged.
struct OpenAnswer {
    stream: UpstreamStream,
    exchange: Exchange,
    context: RequestContext,
    deadline: Option<Deadline>,
}

/// An upstream's answer as our own events. Dropping it ends the call.
fn upstream_stream(
    stream: UpstreamStream,
    exchange: Exchange,
    (context, deadline): (RequestContext, Option<Deadline>),
    state: &SharedState,
) -> Response {
    let cut = state.lifecycle.cut_token().clone();
    let progress = Some(OpenAnswer { stream, exchange, context, deadline });
    let texts = stream::unfold(progress, move |progress| {
        let cut = cut.clone();
        async move {
            let mut open = progress?;
            let next = tokio::select! {
                biased;
                next = open.stream.next(&mut open.exchange) => Ok(next),
                () = cut.cancelled() => Err(ApiError::CutByShutdown),
                error = Deadline::passed(&mut open.deadline) => Err(error),
            };
            let next = match next {
                Ok(next) => next,
                Err(error) => {
                    let _ = open.context.counts.stream_error.set(error.status().as_u16());
                    return Some((error.to_json(), None));
                }
            };
            match next {
                Some(Ok(chunk)) => Some((chunk.to_string(), Some(open))),
                Some(Err(error)) => {
                    let _ = open.context.counts.stream_error.set(error.status());
                    Some((error.to_json().to_string(), None))
                }
                None => Some(("[DONE]".to_owned(), None)),
            }
        }
    });
    sse::events(texts)
}
