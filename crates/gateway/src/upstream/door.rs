//! Sends one request, as often as that can help, and reads the head of its reply.
//!
//! Knows HTTP and time, no provider. Invariant: redirects are not followed (a key would follow them), an answer's size is
//! bounded while it is read, and every attempt leaves its verdict with the upstream's breaker, a dropped one included.

use std::{
    borrow::Cow,
    error::Error as _,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use chrono::Utc;
use futures::future::BoxFuture;
use http::{HeaderMap, StatusCode, header};
use reqwest::{Client, Response, redirect};

use super::{
    AnswerStream, Departure, LeavesPremises, Limits,
    breaker::{Breaker, BreakerLimits, BreakerState, Pass, Verdict},
    retry::Failed,
};
use crate::providers::{
    Answer, AnswerReader, Outgoing, OutgoingRequest, Reply, Secret, UpstreamError,
    error::{Cause, Fault, Spent},
};

/// The way out. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Door {
    client: Client,
    limits: Arc<Limits>,
}

/// The HTTP client cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("the HTTP client for upstreams cannot be made ({0}); check the system's certificates")]
pub struct DoorError(#[from] reqwest::Error);

/// One upstream's health, shared by all requests to it.
#[derive(Clone, Debug)]
pub struct Upstream {
    name: Arc<str>,
    breaker: Arc<Mutex<Breaker>>,
    renew: Option<Arc<dyn Renew>>,
}

/// Where a fresh credential may be found after an upstream has refused one.
pub trait Renew: fmt::Debug + Send + Sync {
    /// The refused request's headers with another credential; None: there is no other.
    fn renew<'a>(&'a self, refused: &'a HeaderMap) -> BoxFuture<'a, Option<Renewed>>;
}

/// A fresh credential.
#[derive(Debug)]
pub struct Renewed {
    /// Of the request, the credential among them.
    pub headers: HeaderMap,
    /// Its text, to keep it out of what the upstream says.
    pub secret: Option<Secret>,
}

/// What came back.
#[derive(Debug)]
pub enum Received {
    /// Everything.
    Whole(Box<Answer>),
    /// The beginning; the rest is to be asked for.
    Stream(Box<AnswerStream>),
}

impl Upstream {
    /// A healthy one.
    pub fn new(name: &str, limits: BreakerLimits) -> Self {
        Self { name: name.into(), breaker: Arc::new(Mutex::new(Breaker::new(limits))), renew: None }
    }

    /// With somewhere to look for a fresh credential when one is refused.
    #[must_use]
    pub fn with_renewal(mut self, renew: Arc<dyn Renew>) -> Self {
        self.renew = Some(renew);
        self
    }

    async fn renewed(&self, refused: &HeaderMap) -> Option<Renewed> {
        self.renew.as_ref()?.renew(refused).await
    }

    /// As the config calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether requests pass.
    pub fn state(&self) -> BreakerState {
        self.lock().state()
    }

    /// A breaker is whole after every call: a panic elsewhere cannot have left it half changed.
    fn lock(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass(&self) -> Result<Attempt, UpstreamError> {
        match self.lock().try_pass(Instant::now()) {
            Ok(pass) => Ok(Attempt { upstream: self.clone(), pass: Some(pass) }),
            Err(wait) => {
                let message = format!("the upstream `{}` failed repeatedly and is left alone for a while", self.name);
                let mut error = UpstreamError::new(Cause::Unreachable, message);
                error.retry_after = Some(wait);
                Err(error.having_spent(Spent::NotSent))
            }
        }
    }
}

/// An attempt that was let through: it leaves its verdict, at the latest when it is dropped.
#[derive(Debug)]
pub(super) struct Attempt {
    upstream: Upstream,
    pass: Option<Pass>,
}

impl Attempt {
    pub(super) fn begun(&self) {
        if let Some(pass) = &self.pass {
            self.upstream.lock().begun(pass);
        }
    }

    pub(super) fn succeeded(&mut self) {
        self.record(Verdict::Healthy);
    }

    pub(super) fn failed(&mut self, error: &UpstreamError) {
        self.record(match (error.cause, error.fault()) {
            // Turned away unread, as a server does that ends a connection in good order.
            _ if matches!(error.spent, Spent::NotSent) => Verdict::Healthy,
            (_, Fault::Caller) | (Cause::RateLimited | Cause::ModelUnavailable | Cause::Unfit, _) => Verdict::Healthy,
            // It may be about one model, or one place: others must not be shut out for it.
            (Cause::Auth, _) if error.native.status == Some(403) => Verdict::Healthy,
            (_, Fault::Operator) => Verdict::Fatal,
            (_, Fault::Upstream) => Verdict::Failing,
        });
    }

    fn record(&mut self, verdict: Verdict) {
        if let Some(pass) = self.pass.take() {
            self.upstream.lock().record(pass, verdict, Instant::now());
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.record(Verdict::Unknown);
    }
}

impl Door {
    /// With bounds.
    pub fn new(limits: Limits) -> Result<Self, DoorError> {
        let client = Client::builder()
            .connect_timeout(limits.connect)
            .redirect(redirect::Policy::none())
            .user_agent(concat!("bindery/", env!("CARGO_PKG_VERSION")))
            .build()?;
        Ok(Self::with_client(client, limits))
    }

    /// Through another client: for tests of what the usual one cannot be brought to.
    pub(super) fn with_client(client: Client, limits: Limits) -> Self {
        Self { client, limits: Arc::new(limits) }
    }

    /// Sends a request and waits for its answer, or for the first piece of it. Dropping the future, or the stream it gives,
    /// ends the call upstream. What failed and cost nothing is tried again here; what may have cost something is handed back
    /// at once, for whoever pays to decide ([`Door::wait_to_pay_again`]). `departure` says at any moment whether the call can have
    /// cost something, for where the future is dropped.
    pub async fn send(
        &self,
        permit: LeavesPremises,
        upstream: &Upstream,
        outgoing: Outgoing,
        (departure, time_left): (&Departure, Duration),
    ) -> Result<Received, UpstreamError> {
        let deadline = tokio::time::Instant::now() + time_left;
        let body = serde_json::to_vec(&outgoing.request.body)
            .map(Bytes::from)
            .map_err(|error| UpstreamError::new(Cause::Invalid, format!("the request cannot be written: {error}")))?;
        let call = CallOut { request: &outgoing.request, body, reader: &outgoing.reader, permit, departure };
        let mut attempt = 1;
        let mut failed_before: Option<UpstreamError> = None;
        loop {
            let tried = tokio::time::timeout_at(deadline, self.attempt(upstream, &call, deadline)).await;
            let error = match tried.unwrap_or_else(|_| Err(Tried::Failed(late().having_spent(departure.give_up())))) {
                Ok(received) => return Ok(received),
                // Waiting for a breaker would be waiting for someone else's probe. What was tried before is what happened.
                Err(Tried::NotLetThrough(error)) => return Err(failed_before.unwrap_or(error)),
                Err(Tried::Failed(error)) => error,
            };
            if !error.spent.may_cost() {
                departure.begin_another();
            }
            let time_left = deadline.saturating_duration_since(tokio::time::Instant::now());
            let failed = Failed { error: &error, attempt, time_left, random: fastrand::f64() };
            let Some(wait) = self.limits.retry.wait(&failed) else { return Err(error) };
            tracing::debug!(
                upstream = upstream.name(),
                attempt,
                ?wait,
                code = error.code(),
                "an upstream call is tried again"
            );
            failed_before = Some(error);
            tokio::time::sleep(wait).await;
            attempt += 1;
        }
    }

    /// How long to wait before a failed attempt is paid for a second time; `None`: it is not.
    pub fn wait_to_pay_again(&self, error: &UpstreamError, attempt: u32, time_left: Duration) -> Option<Duration> {
        self.limits.retry.wait_to_pay_again(&Failed { error, attempt, time_left, random: fastrand::f64() })
    }

    async fn attempt(
        &self,
        upstream: &Upstream,
        call: &CallOut<'_>,
        deadline: tokio::time::Instant,
    ) -> Result<Received, Tried> {
        let mut attempt = upstream.pass().map_err(Tried::NotLetThrough)?;
        match self.call(upstream, call).await {
            Ok(Begun::Whole(answer)) => {
                attempt.succeeded();
                Ok(Received::Whole(answer))
            }
            Ok(Begun::Stream(mut stream)) => {
                // Until the first piece is there, all of this may be done again.
                match stream.begin().await {
                    Ok(()) => {
                        stream.keep(attempt, deadline);
                        Ok(Received::Stream(stream))
                    }
                    Err(error) => {
                        attempt.failed(&error);
                        Err(Tried::Failed(error))
                    }
                }
            }
            Err(error) => {
                attempt.failed(&error);
                Err(Tried::Failed(error))
            }
        }
    }

    async fn call(&self, upstream: &Upstream, call: &CallOut<'_>) -> Result<Begun, UpstreamError> {
        let mut response = self.head(call, &call.request.headers).await?;
        let mut reader = Cow::Borrowed(call.reader);
        // A credential that has run out: once more with the next one, if there is one, before anything else is made of it.
        if response.status() == StatusCode::UNAUTHORIZED
            && let Some(Renewed { headers, secret }) = upstream.renewed(&call.request.headers).await
        {
            tracing::debug!(upstream = upstream.name(), "an upstream call is sent again with a fresh credential");
            call.departure.begin_another();
            response = self.head(call, &headers).await?;
            reader = Cow::Owned(call.reader.clone().with_secret(secret));
        }
        let status = response.status().as_u16();
        let is_stream = response
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .is_some_and(|kind| kind.trim_start().to_ascii_lowercase().starts_with("text/event-stream"));
        if response.status().is_success() && is_stream && reader.is_streamed() {
            let stream = AnswerStream::new(response, reader.into_owned(), Arc::clone(&self.limits));
            return Ok(Begun::Stream(Box::new(stream)));
        }
        let headers = response.headers().clone();
        let max_bytes =
            if response.status().is_success() { self.limits.max_answer_bytes } else { self.limits.max_error_bytes };
        let body = match self.body(response, max_bytes).await {
            Ok(body) => body,
            Err(error) if (200..300).contains(&status) => return Err(error.having_spent(Spent::Unknown)),
            // The status says enough.
            Err(_) => Vec::new(),
        };
        let answer = reader.whole(&Reply { status, headers: &headers, body: &body, at: Utc::now() })?;
        if reader.is_streamed() {
            // Some servers, and some proxies, do not stream. It is all there, and paid for.
            let ended = reader.in_pieces(answer);
            let stream = AnswerStream::ended(reader.into_owned(), ended, Arc::clone(&self.limits));
            return Ok(Begun::Stream(Box::new(stream)));
        }
        Ok(Begun::Whole(Box::new(answer)))
    }

    /// Holding a [`CallOut`], and so its permit, is what allows this.
    async fn head(&self, call: &CallOut<'_>, headers: &HeaderMap) -> Result<Response, UpstreamError> {
        let CallOut { request, body, permit: LeavesPremises { .. }, departure, .. } = call;
        let body = reqwest::Body::wrap(departure.watch(body.clone()));
        let sending = self.client.post(request.url.clone()).headers(headers.clone()).body(body).send();
        match tokio::time::timeout(self.limits.first_byte, sending).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) if was_refused_unread(&error) => {
                let message = "the upstream closed the connection before it read the request";
                Err(UpstreamError::new(Cause::Failed, message).having_spent(Spent::NotSent))
            }
            Ok(Err(error)) => Err(transport(&error, departure.give_up())),
            Err(_) => {
                let message = format!("the upstream did not begin to answer within {:?}", self.limits.first_byte);
                Err(UpstreamError::new(Cause::Timeout, message).having_spent(departure.give_up()))
            }
        }
    }

    async fn body(&self, mut response: Response, max_bytes: usize) -> Result<Vec<u8>, UpstreamError> {
        let mut body = Vec::new();
        loop {
            let piece = match tokio::time::timeout(self.limits.idle, response.chunk()).await {
                Ok(Ok(Some(piece))) => piece,
                Ok(Ok(None)) => return Ok(body),
                Ok(Err(error)) => return Err(transport(&error, Spent::Unknown)),
                Err(_) => return Err(idle(self.limits.idle)),
            };
            if body.len() + piece.len() > max_bytes {
                let message = format!("the upstream's answer is longer than {max_bytes} bytes");
                return Err(UpstreamError::new(Cause::Unfit, message));
            }
            body.extend_from_slice(&piece);
        }
    }
}

/// What an attempt needs.
struct CallOut<'a> {
    request: &'a OutgoingRequest,
    body: Bytes,
    reader: &'a AnswerReader,
    permit: LeavesPremises,
    departure: &'a Departure,
}

enum Begun {
    Whole(Box<Answer>),
    Stream(Box<AnswerStream>),
}

enum Tried {
    NotLetThrough(UpstreamError),
    Failed(UpstreamError),
}

/// No time left.
pub(super) fn late() -> UpstreamError {
    UpstreamError::new(Cause::Timeout, "the upstream did not answer before the request's deadline")
}

/// Silence in the middle of a body.
pub(super) fn idle(limit: Duration) -> UpstreamError {
    UpstreamError::new(Cause::Timeout, format!("the upstream fell silent for {limit:?} in the middle of its answer"))
}

/// HTTP/2's two ways to say that a request was not looked at (RFC 9113, 8.7): servers do so as they end a connection in good order.
/// The client would send such a request again by itself if its body were not watched.
fn was_refused_unread(error: &reqwest::Error) -> bool {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            let reason = error.reason();
            return error.is_remote()
                && (error.is_go_away() && reason == Some(h2::Reason::NO_ERROR)
                    || error.is_reset() && reason == Some(h2::Reason::REFUSED_STREAM));
        }
        cause = error.source();
    }
    false
}

/// What the HTTP client says; its text names URLs, so it is not repeated. `spent`: where there was a connection.
pub(super) fn transport(error: &reqwest::Error, spent: Spent) -> UpstreamError {
    if error.is_connect() {
        return UpstreamError::new(Cause::Unreachable, "the upstream cannot be reached");
    }
    let error = if error.is_timeout() {
        UpstreamError::new(Cause::Timeout, "the upstream did not answer in time")
    } else if error.is_body() || error.is_decode() {
        UpstreamError::new(Cause::Cut, "the upstream's answer was cut before its end")
    } else {
        UpstreamError::new(Cause::Failed, "the connection to the upstream failed")
    };
    error.having_spent(spent)
}
