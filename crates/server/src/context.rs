//! What every request carries: its id, its start, and the log line written when its response has ended.
//!
//! [`observe`] stands before every route. It must not know what a route does; handlers add their counts to
//! [`RequestContext`]. Invariant: every request gets an id and exactly one log line and one count, also when its client
//! goes away or its handler panics; no line holds a prompt or an answer.

use std::{
    any::Any,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method},
    middleware::Next,
    response::{IntoResponse, Response},
};
use bindery_engine::AdapterIdentity;
use futures::FutureExt;
use http_body::{Frame, SizeHint};
use tracing::{Instrument, Level, Span};

use crate::{
    error::ApiError,
    state::{AppState, SharedState},
};

/// Longest request id taken from a client.
const MAX_REQUEST_ID_LEN: usize = 128;
/// The status logged for a client that went away before its answer began (nginx's number).
const CLIENT_GONE: u16 = 499;
/// The route logged where none matched.
const NO_ROUTE: &str = "none";
/// Asked every few seconds by whoever watches the server: their successes would be most of its log.
const PROBES: [&str; 3] = ["/health", "/ready", "/metrics"];

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// One request, for its handler.
#[derive(Clone)]
pub(crate) struct RequestContext {
    /// The client's, or a new one.
    pub(crate) id: Arc<str>,
    /// When its head had arrived.
    pub(crate) started: Instant,
    /// For the log line.
    pub(crate) counts: Arc<RequestCounts>,
}

/// What handlers tell the log line.
#[derive(Default)]
pub(crate) struct RequestCounts {
    pub(crate) model: OnceLock<String>,
    /// The version that it holds, or held last.
    pub(crate) adapter: Mutex<Option<Arc<AdapterIdentity>>>,
    pub(crate) num_prompt_tokens: AtomicUsize,
    pub(crate) num_completion_tokens: AtomicUsize,
    /// Of the error that ended a stream: its status was sent long before.
    pub(crate) stream_error: OnceLock<u16>,
}

/// Gives the request its id, span, log line and counter, and turns a panic into a 500.
pub(crate) async fn observe(State(state): State<SharedState>, mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let context = RequestContext { id: Arc::clone(&id), started: Instant::now(), counts: Arc::default() };
    let route = request.extensions().get::<MatchedPath>().map_or(NO_ROUTE, MatchedPath::as_str).to_owned();
    let span = tracing::info_span!("request", request_id = &*id, method = %request.method(), route);
    let mut record = AccessRecord {
        state,
        context: context.clone(),
        method: request.method().clone(),
        route,
        status: CLIENT_GONE,
        span: span.clone(),
    };
    request.extensions_mut().insert(context);

    let handled = AssertUnwindSafe(next.run(request)).catch_unwind().instrument(span).await;
    let mut response = handled.unwrap_or_else(|panic| {
        ApiError::internal(&id, &format_args!("panic: {}", panic_text(&*panic))).into_response()
    });

    record.status = response.status().as_u16();
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(X_REQUEST_ID, value);
    }
    response.map(|body| Body::new(GuardedBody { body, span: Some(record.span.clone()), guard: record }))
}

/// The client's id where it is short and visible ASCII, else a new one.
fn request_id(headers: &HeaderMap) -> Arc<str> {
    let given = headers
        .get(X_REQUEST_ID)
        .map(HeaderValue::as_bytes)
        .filter(|id| (1..=MAX_REQUEST_ID_LEN).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic));
    match given.map(std::str::from_utf8) {
        Some(Ok(id)) => id.into(),
        _ => uuid::Uuid::new_v4().simple().to_string().into(),
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "no text",
    }
}

/// Writes the log line when it is dropped: with the response body, or with a handler nobody waits for any more.
struct AccessRecord {
    state: Arc<AppState>,
    context: RequestContext,
    method: Method,
    route: String,
    status: u16,
    span: Span,
}

impl Drop for AccessRecord {
    fn drop(&mut self) {
        let counts = &self.context.counts;
        self.state.metrics.count_http_request(&self.method, &self.route, self.status);
        // No prompt has been computed without tokens, so a request without any has nothing to count.
        let num_prompt_tokens = Some(counts.num_prompt_tokens.load(Ordering::Relaxed)).filter(|&count| count > 0);
        let num_completion_tokens = num_prompt_tokens.map(|_| counts.num_completion_tokens.load(Ordering::Relaxed));
        // The level of an event is fixed where it stands in the code.
        macro_rules! log_at {
            ($level:expr) => {
                tracing::event!(
                    $level,
                    status = self.status,
                    stream_error = counts.stream_error.get(),
                    latency_ms = (self.context.started.elapsed().as_secs_f64() * 1e4).round() / 10.0,
                    model = counts.model.get(),
                    prompt_tokens = num_prompt_tokens,
                    completion_tokens = num_completion_tokens,
                    "request done"
                )
            };
        }
        let is_routine = PROBES.contains(&self.route.as_str()) && self.status < 400;
        self.span.in_scope(|| if is_routine { log_at!(Level::DEBUG) } else { log_at!(Level::INFO) });
    }
}

/// A body that owns what must live exactly as long as it does.
pub(crate) struct GuardedBody<G> {
    pub(crate) body: Body,
    /// Entered while the body makes its next piece.
    pub(crate) span: Option<Span>,
    #[expect(dead_code, reason = "held for its drop")]
    pub(crate) guard: G,
}

impl<G: Unpin> HttpBody for GuardedBody<G> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let _entered = self.span.clone().map(Span::entered);
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_id_is_taken_where_it_is_short_and_visible() {
        let id_for = |given: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(X_REQUEST_ID, HeaderValue::from_bytes(given).unwrap());
            request_id(&headers)
        };
        assert_eq!(&*id_for(b"abc-1"), "abc-1");
        let longest = "x".repeat(MAX_REQUEST_ID_LEN);
        assert_eq!(*id_for(longest.as_bytes()), *longest);
        for refused in [&b""[..], b"a b", "x".repeat(MAX_REQUEST_ID_LEN + 1).as_bytes(), "ä".as_bytes()] {
            let id = id_for(refused);
            assert_eq!(id.len(), 32, "{id}");
            assert!(id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{id}");
        }
    }
}
