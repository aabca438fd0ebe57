//! Every failure, as OpenAI's error object. No other file builds one.
//!
//! Variants go by what the reader can do about it. Invariant: the caller's mistake is never a 5xx and never a 422; ours
//! shows nothing but the request id, the rest is in the log.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use bindery_engine::{AdapterError, EngineError};
use bindery_gateway::{clock::UnixMillis, gateway::GatewayError};
use bindery_protocol::openai::{ErrorBody, ErrorResponse};

/// Seconds after which a probe or a client may ask again while the weights load.
const RETRY_LOADING: Duration = Duration::from_secs(2);
/// Seconds after which another replica, or this one started again, may answer.
const RETRY_DRAINING: Duration = Duration::from_secs(5);

/// Seconds after which fewer requests may wait for adapters: reading one takes less than that.
const RETRY_ADAPTERS: Duration = Duration::from_secs(2);

/// What a handler fails with.
#[derive(Debug)]
pub(crate) enum ApiError {
    /// A field (or header) is wrong: change the request.
    Invalid { param: Option<String>, message: String },
    /// A known field that this version cannot honour: leave it out.
    Unsupported { param: String, message: String },
    /// The prompt is too long: shorten it.
    ContextLength { param: String, message: String },
    /// No key came with the request.
    MissingKey,
    /// The key is none of ours.
    WrongKey,
    /// It was one: it was revoked, or its time is over.
    KeyEnded { message: String },
    /// Keys cannot be checked now.
    KeysUnavailable,
    /// A route that changes the server, and no admin key is configured.
    NoAdminKey,
    /// Another key than the admin's.
    NotAdmin,
    /// It may not be done: say it otherwise.
    Forbidden { param: String, message: String },
    /// It contradicts what is there.
    Conflict { message: String },
    /// The adapter is known, and its files cannot be used: tell whoever runs the server.
    AdapterUnreadable { message: String },
    /// No adapter of this name: an operator's mistake.
    UnknownAdapter { message: String },
    /// The model is not offered here: name one of `offered`.
    UnknownModel { asked: String, offered: Vec<String> },
    /// No such route.
    UnknownRoute { method: Method, path: String },
    /// The route exists, but not for this method.
    MethodNotAllowed { method: Method, path: String },
    /// The body is compressed.
    ContentEncoding { coding: String },
    /// The body is over the limit.
    BodyTooLarge { limit_bytes: usize },
    /// The body did not arrive.
    BodyTimeout { timeout: Duration },
    /// The request's own deadline passed.
    DeadlineExceeded { message: String },
    /// The response was not read.
    SlowReader { message: String },
    /// Too much waits already.
    QueueFull { message: String, retry_after: Duration },
    /// What the gateway says, in its own words: a limit, a budget, a guardrail, an upstream.
    Gateway(Box<GatewayRefusal>),
    /// The weights are loading.
    Loading,
    /// The weights did not load.
    LoadFailed { message: String },
    /// The server stops: no new requests.
    Draining,
    /// The server stopped before this request was done.
    CutByShutdown,
    /// Ours. What happened is in the log, under the request id.
    Internal { request_id: String },
}

/// See [`ApiError::Gateway`].
#[derive(Debug)]
pub(crate) struct GatewayRefusal {
    status: StatusCode,
    kind: &'static str,
    code: String,
    param: Option<String>,
    message: String,
    retry_after: Option<Duration>,
    headers: Vec<(&'static str, String)>,
}

impl ApiError {
    /// What the gateway says about a request.
    pub(crate) fn from_gateway(error: &GatewayError, now: UnixMillis) -> Self {
        let (status, kind, code) = error.shown();
        Self::Gateway(Box::new(GatewayRefusal {
            status: StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY),
            kind,
            code,
            param: error.param(),
            message: error.to_string(),
            retry_after: error.retry_after(now),
            headers: error.rate_headers(),
        }))
    }

    /// A field out of range.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { param: Some(param.into()), message: message.into() }
    }

    /// A known field that is not supported yet.
    pub(crate) fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Unsupported { param: param.into(), message: message.into() }
    }

    /// Our mistake: logged here with its cause, shown with the request id alone.
    pub(crate) fn internal(request_id: &str, cause: &dyn std::fmt::Display) -> Self {
        tracing::error!(request_id, cause = %cause, "a request failed inside the server");
        Self::Internal { request_id: request_id.to_owned() }
    }

    /// What the engine says about a request.
    pub(crate) fn from_engine(error: EngineError, request_id: &str) -> Self {
        match error {
            EngineError::Invalid { param, message } => Self::invalid(param, message),
            EngineError::ContextLengthExceeded { param, message } => {
                Self::ContextLength { param: param.to_owned(), message }
            }
            EngineError::QueueFull { retry_after, .. } => Self::QueueFull { message: error.to_string(), retry_after },
            EngineError::ShuttingDown => Self::Draining,
            EngineError::SlowReader { .. } => Self::SlowReader { message: error.to_string() },
            EngineError::DeadlineExceeded { .. } => Self::DeadlineExceeded { message: error.to_string() },
            other => Self::internal(request_id, &other),
        }
    }

    /// What the pool says about an adapter that a request named or an operator works on.
    pub(crate) fn from_adapter(error: &AdapterError, param: &str) -> Self {
        let message = error.to_string();
        match error {
            AdapterError::Unknown { .. } => Self::UnknownAdapter { message },
            AdapterError::Exists { .. } | AdapterError::BadName { .. } => Self::invalid(param, message),
            AdapterError::Forbidden { .. } => Self::Forbidden { param: param.to_owned(), message },
            AdapterError::InUse { .. } | AdapterError::StillDraining { .. } | AdapterError::NoRoom { .. } => {
                Self::Conflict { message }
            }
            AdapterError::Unreadable { .. } => Self::AdapterUnreadable { message },
            AdapterError::QueueFull { .. } => Self::QueueFull { message, retry_after: RETRY_ADAPTERS },
        }
    }

    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Invalid { .. } | Self::Unsupported { .. } | Self::ContextLength { .. } => StatusCode::BAD_REQUEST,
            Self::MissingKey | Self::WrongKey | Self::KeyEnded { .. } => StatusCode::UNAUTHORIZED,
            Self::NoAdminKey | Self::NotAdmin | Self::Forbidden { .. } => StatusCode::FORBIDDEN,
            Self::Conflict { .. } => StatusCode::CONFLICT,
            Self::UnknownModel { .. } | Self::UnknownAdapter { .. } | Self::UnknownRoute { .. } => {
                StatusCode::NOT_FOUND
            }
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::ContentEncoding { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTimeout { .. } | Self::DeadlineExceeded { .. } | Self::SlowReader { .. } => {
                StatusCode::REQUEST_TIMEOUT
            }
            Self::QueueFull { .. }
            | Self::Loading
            | Self::LoadFailed { .. }
            | Self::AdapterUnreadable { .. }
            | Self::KeysUnavailable
            | Self::Draining
            | Self::CutByShutdown => StatusCode::SERVICE_UNAVAILABLE,
            Self::Gateway(refusal) => refusal.status,
            Self::Internal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::QueueFull { retry_after, .. } => Some(*retry_after),
            Self::Gateway(refusal) => refusal.retry_after,
            Self::Loading | Self::KeysUnavailable => Some(RETRY_LOADING),
            Self::Draining | Self::CutByShutdown => Some(RETRY_DRAINING),
            _ => None,
        }
    }

    /// OpenAI's `code`.
    fn code(&self) -> Option<&str> {
        match self {
            Self::Invalid { .. } => None,
            Self::Gateway(refusal) => Some(&refusal.code),
            Self::Unsupported { .. } => Some("unsupported_parameter"),
            Self::ContextLength { .. } => Some(CONTEXT_LENGTH_EXCEEDED),
            Self::MissingKey | Self::WrongKey | Self::KeyEnded { .. } => Some("invalid_api_key"),
            Self::KeysUnavailable => Some("keys_unavailable"),
            Self::NoAdminKey | Self::NotAdmin => Some("admin_key_required"),
            Self::Forbidden { .. } => Some("forbidden"),
            Self::Conflict { .. } => Some("conflict"),
            Self::AdapterUnreadable { .. } => Some("adapter_unreadable"),
            Self::UnknownModel { .. } | Self::UnknownAdapter { .. } => Some("model_not_found"),
            Self::UnknownRoute { .. } => Some("unknown_url"),
            Self::MethodNotAllowed { .. } => Some("method_not_allowed"),
            Self::ContentEncoding { .. } => Some("unsupported_content_encoding"),
            Self::BodyTooLarge { .. } => Some("request_too_large"),
            Self::BodyTimeout { .. } | Self::DeadlineExceeded { .. } => Some("request_timeout"),
            Self::SlowReader { .. } => Some("slow_reader"),
            Self::QueueFull { .. } => Some("queue_full"),
            Self::Loading => Some("model_loading"),
            Self::LoadFailed { .. } => Some("model_load_failed"),
            Self::Draining | Self::CutByShutdown => Some("shutting_down"),
            Self::Internal { .. } => Some("internal_error"),
        }
    }

    /// OpenAI's `type`.
    fn kind(&self) -> &'static str {
        match self {
            Self::MissingKey | Self::WrongKey | Self::KeyEnded { .. } => "authentication_error",
            Self::NoAdminKey | Self::NotAdmin | Self::Forbidden { .. } => "permission_error",
            Self::BodyTimeout { .. } | Self::DeadlineExceeded { .. } | Self::SlowReader { .. } => "timeout_error",
            Self::QueueFull { .. }
            | Self::Loading
            | Self::LoadFailed { .. }
            | Self::AdapterUnreadable { .. }
            | Self::KeysUnavailable
            | Self::Draining
            | Self::CutByShutdown => "service_unavailable_error",
            Self::Internal { .. } => "server_error",
            Self::Gateway(refusal) => refusal.kind,
            _ => "invalid_request_error",
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            Self::Invalid { param, .. } => param.as_deref(),
            Self::Unsupported { param, .. } | Self::ContextLength { param, .. } | Self::Forbidden { param, .. } => {
                Some(param)
            }
            Self::UnknownModel { .. } => Some("model"),
            Self::Gateway(refusal) => refusal.param.as_deref(),
            Self::ContentEncoding { .. } => Some("content-encoding"),
            _ => None,
        }
    }

    fn message(&self) -> String {
        match self {
            Self::Invalid { message, .. }
            | Self::Unsupported { message, .. }
            | Self::ContextLength { message, .. }
            | Self::DeadlineExceeded { message }
            | Self::Forbidden { message, .. }
            | Self::Conflict { message }
            | Self::UnknownAdapter { message }
            | Self::AdapterUnreadable { message }
            | Self::KeyEnded { message }
            | Self::SlowReader { message }
            | Self::QueueFull { message, .. } => message.clone(),
            Self::Gateway(refusal) => refusal.message.clone(),
            Self::KeysUnavailable => {
                "keys and tokens cannot be checked just now: try again in a moment; the server's log tells why".into()
            }
            Self::MissingKey => "no API key: send one in the header `Authorization: Bearer KEY`".into(),
            Self::WrongKey => "the API key is not known to this server: check the key after `Bearer`".into(),
            Self::NoAdminKey => {
                "this route changes the server and needs the admin key, and none is configured: start the server with \
                 --admin-key"
                    .into()
            }
            Self::NotAdmin => {
                "this route changes the server and needs the admin key: the key that came is another".into()
            }
            Self::UnknownModel { asked, offered } => {
                format!("the model {} does not exist here: this server offers {}", quote(asked), list(offered))
            }
            Self::UnknownRoute { method, path } => {
                format!("there is no {method} {}: GET /openapi.json lists the routes", shorten(path))
            }
            Self::MethodNotAllowed { method, path } => {
                format!(
                    "{} does not take {method}: the `allow` header and GET /openapi.json say what it takes",
                    shorten(path)
                )
            }
            Self::ContentEncoding { coding } => format!(
                "the body's content-encoding is {}, and this server takes no compressed bodies: send plain JSON, without a \
                 content-encoding",
                quote(coding)
            ),
            Self::BodyTooLarge { limit_bytes } => {
                format!(
                    "the body is larger than {limit_bytes} bytes: send less, or start the server with a larger --max-body-size"
                )
            }
            Self::BodyTimeout { timeout } => {
                format!("the body did not arrive within {} s: send the request again", timeout.as_secs())
            }
            Self::Loading => "the model is still loading: try again in a moment, GET /ready tells when".into(),
            Self::LoadFailed { message } => format!("the model could not be loaded: {message}"),
            Self::Draining => "the server is shutting down: try again, or another replica".into(),
            Self::CutByShutdown => "the server shut down before the answer was complete: try again".into(),
            Self::Internal { request_id } => {
                format!("something failed inside the server: its log tells more under request id {request_id}")
            }
        }
    }

    /// The wire form.
    pub(crate) fn to_body(&self) -> ErrorResponse {
        ErrorResponse {
            error: ErrorBody {
                message: self.message(),
                kind: self.kind().to_owned(),
                param: self.param().map(str::to_owned),
                code: self.code().map(str::to_owned),
            },
        }
    }

    /// The wire form as JSON text, for an event in a stream.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(&self.to_body()).expect("strings serialise")
    }
}

/// OpenAI's code of a prompt that does not fit.
pub(crate) const CONTEXT_LENGTH_EXCEEDED: &str = "context_length_exceeded";

/// An error's code, beside its body for whoever handles the answer before it is sent: `code`, or `type` where it has none.
#[derive(Clone, Debug)]
pub(crate) struct ErrorCode(pub(crate) String);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Body::from(self.to_json())).into_response();
        let code = self.code().unwrap_or_else(|| self.kind()).to_owned();
        response.extensions_mut().insert(ErrorCode(code));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(retry_after) = self.retry_after() {
            // Whole seconds, and at least one: 0 would mean "at once".
            headers.insert(header::RETRY_AFTER, HeaderValue::from(retry_after.as_secs_f64().ceil().max(1.0) as u64));
        }
        if let Self::Gateway(refusal) = &self {
            for (name, value) in &refusal.headers {
                if let Ok(value) = HeaderValue::from_str(value) {
                    headers.insert(HeaderName::from_static(name), value);
                }
            }
        }
        if matches!(self, Self::ContentEncoding { .. }) {
            // RFC 9110, 15.5.16: what would have been accepted.
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        if matches!(self, Self::MissingKey | Self::WrongKey | Self::KeyEnded { .. }) {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// Longest piece of a client's own text that an error repeats.
const MAX_QUOTED_CHARS: usize = 120;

/// A client's text, cut to a bounded length.
pub(crate) fn shorten(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTED_CHARS) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

/// A client's text in quotes, cut to a bounded length.
pub(crate) fn quote(text: &str) -> String {
    format!("'{}'", shorten(text))
}

fn list(names: &[String]) -> String {
    names.iter().map(|name| quote(name)).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_of_clients_are_cut_at_a_character() {
        let shown = shorten(&"ä".repeat(1000));
        assert_eq!(shown.chars().count(), MAX_QUOTED_CHARS + 1);
        assert_eq!(shorten("short"), "short");
    }

    #[test]
    fn an_unknown_model_lists_what_is_offered() {
        let error = ApiError::UnknownModel { asked: "gpt-4".into(), offered: vec!["a".into(), "b".into()] };
        assert_eq!(error.status(), StatusCode::NOT_FOUND);
        let body = error.to_body().error;
        assert_eq!(body.code.as_deref(), Some("model_not_found"));
        assert_eq!(body.message, "the model 'gpt-4' does not exist here: this server offers 'a', 'b'");
    }

    #[test]
    fn our_own_failures_show_the_request_id_alone() {
        let error = ApiError::from_engine(EngineError::Step { message: "secret".into() }, "id-1");
        let body = error.to_body().error;
        assert!(body.message.contains("id-1") && !body.message.contains("secret"), "{}", body.message);
        assert_eq!(error.status(), StatusCode::INTERNAL_SERVER_ERROR);
    }

    #[test]
    fn retry_after_is_at_least_a_second() {
        let error = ApiError::QueueFull { message: String::new(), retry_after: Duration::from_millis(1) };
        assert_eq!(error.into_response().headers()[header::RETRY_AFTER], "1");
    }
}
