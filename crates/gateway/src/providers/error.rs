//! What went wrong upstream, in one shape, whoever it was: what the tenant is told, whether another try helps, whose
//! fault it is.
//!
//! Each provider's file finds the [`Cause`]; this file alone says what follows from it. Invariant: the text shown carries
//! no credential, account id or URL of the upstream, and an upstream's 401 or 403 is never shown as one: it is the
//! gateway's key that failed, not the tenant's.

use std::{fmt, sync::LazyLock, time::Duration};

use regex::Regex;
use serde_json::{Map, Value, json};

use super::{secret::Secret, usage::Usage};

/// Kept of an upstream's message.
const MAX_MESSAGE_CHARS: usize = 1000;
/// Kept of an upstream's type or code.
const MAX_WORD_CHARS: usize = 64;

/// Credentials, account ids and addresses as providers write them.
static PRIVATE: LazyLock<Regex> = LazyLock::new(|| {
    const PATTERN: &str = concat!(
        r"(?i)\b(?:bearer\s+\S+",
        r"|(?:sk|pk|rk|sess)-[\w*.-]{6,}",
        r"|AIza[\w-]{10,}",
        r"|ya29\.[\w.-]{10,}",
        r"|eyJ[\w-]{10,}\.[\w.-]+",
        r"|(?:org|proj|asst|user|wrkspc)[-_][a-z0-9]{8,}",
        r"|projects/[\w:.-]+",
        r#"|https?://[^\s"'<>)]+)"#
    );
    Regex::new(PATTERN).expect("a constant pattern, read by every test of this file")
});

/// A failed call, or one that failed half way.
#[derive(Clone, Debug, PartialEq)]
pub struct UpstreamError {
    /// What happened.
    pub cause: Cause,
    /// For people; safe to show.
    pub message: String,
    /// The field at fault, where the upstream names one.
    pub param: Option<String>,
    /// How long the upstream asks to wait.
    pub retry_after: Option<Duration>,
    /// What the upstream called it.
    pub native: Box<Native>,
    /// What else the tenant should have: categories of a content filter.
    pub details: Box<Map<String, Value>>,
    /// What it may have cost all the same.
    pub spent: Spent,
}

/// What a call may have cost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Spent {
    /// Nothing: nothing was sent.
    NotSent,
    /// Nothing: nobody was reached, or the upstream said no.
    #[default]
    Nothing,
    /// What the upstream counted, or what is estimated from what came of the answer.
    Known(Box<Usage>),
    /// Whatever the request can cost at most: it was sent, and nothing that counts came back.
    Unknown,
}

impl Spent {
    /// Whether the upstream may bill anything.
    pub fn may_cost(&self) -> bool {
        matches!(self, Self::Known(_) | Self::Unknown)
    }
}

impl From<Usage> for Spent {
    fn from(usage: Usage) -> Self {
        Self::Known(Box::new(usage))
    }
}

impl From<Option<Usage>> for Spent {
    fn from(usage: Option<Usage>) -> Self {
        usage.map_or(Self::Unknown, Self::from)
    }
}

/// The upstream's own words: for logs and metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Native {
    /// Of the response.
    pub status: Option<u16>,
    /// Of the error object.
    pub kind: Option<String>,
    /// Of the error object.
    pub code: Option<String>,
    /// Of the error object, cleaned: for the operator, where the tenant gets a text of ours.
    pub message: Option<String>,
}

/// What happened, by what follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The request is wrong.
    Invalid,
    /// The prompt is too long.
    ContextLength,
    /// A filter stopped the prompt.
    ContentFilter,
    /// The body is too large.
    TooLarge,
    /// Our credential was refused.
    Auth,
    /// Our account is used up.
    Quota,
    /// No such model or deployment.
    ModelUnavailable,
    /// Too many requests just now.
    RateLimited,
    /// Too many requests of everybody.
    Overloaded,
    /// Too slow.
    Timeout,
    /// It failed.
    Failed,
    /// Nobody could be reached.
    Unreachable,
    /// It answered something that is no answer.
    Malformed,
    /// It answered as it should, and the model did not: something else than was asked for, or too much of it.
    Unfit,
    /// The stream stopped before its end.
    Cut,
}

/// Whether to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// It would fail everywhere: it is the request.
    Never,
    /// Another upstream may do it; this one will not.
    Elsewhere,
    /// This one may do it the next time.
    Here,
}

/// Whose fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The tenant's request.
    Caller,
    /// This gateway's config or account: someone has to be told.
    Operator,
    /// The provider's.
    Upstream,
}

/// What a tenant is told of a cause.
struct Shown {
    status: u16,
    kind: &'static str,
    code: &'static str,
}

impl Cause {
    fn shown(self) -> Shown {
        let (status, kind, code) = match self {
            Self::Invalid => (400, "invalid_request_error", "invalid_value"),
            Self::ContextLength => (400, "invalid_request_error", "context_length_exceeded"),
            Self::ContentFilter => (400, "invalid_request_error", "content_filter"),
            Self::TooLarge => (413, "invalid_request_error", "request_too_large"),
            Self::Auth => (502, "api_error", "upstream_auth"),
            Self::Quota => (503, "service_unavailable_error", "upstream_quota"),
            Self::ModelUnavailable => (502, "api_error", "upstream_model_unavailable"),
            Self::RateLimited => (429, "rate_limit_error", "rate_limit_exceeded"),
            Self::Overloaded => (503, "service_unavailable_error", "overloaded"),
            Self::Timeout => (504, "api_error", "upstream_timeout"),
            Self::Failed => (502, "api_error", "upstream_error"),
            Self::Unreachable => (502, "api_error", "upstream_unreachable"),
            Self::Malformed | Self::Unfit => (502, "api_error", "upstream_malformed_output"),
            Self::Cut => (502, "api_error", "upstream_stream_cut"),
        };
        Shown { status, kind, code }
    }

    /// Whether to try again, before anything was sent to the tenant.
    pub fn retry(self) -> Retry {
        match self {
            Self::Invalid | Self::ContextLength | Self::ContentFilter | Self::TooLarge => Retry::Never,
            Self::Auth | Self::Quota | Self::ModelUnavailable => Retry::Elsewhere,
            Self::RateLimited
            | Self::Overloaded
            | Self::Timeout
            | Self::Failed
            | Self::Unreachable
            | Self::Malformed
            | Self::Unfit
            | Self::Cut => Retry::Here,
        }
    }

    /// Whose fault it is.
    pub fn fault(self) -> Fault {
        match self {
            Self::Invalid | Self::ContextLength | Self::ContentFilter | Self::TooLarge => Fault::Caller,
            Self::Auth | Self::Quota | Self::ModelUnavailable => Fault::Operator,
            Self::RateLimited
            | Self::Overloaded
            | Self::Timeout
            | Self::Failed
            | Self::Unreachable
            | Self::Malformed
            | Self::Unfit
            | Self::Cut => Fault::Upstream,
        }
    }

    /// A text of ours where the upstream's is about the operator's affairs.
    pub(crate) fn own_message(self) -> Option<&'static str> {
        match self {
            Self::Auth => Some("the upstream refused this gateway's credential; tell whoever runs it"),
            Self::Quota => Some("this gateway's account with the upstream is used up; tell whoever runs it"),
            Self::ModelUnavailable => Some("the upstream does not have this model; tell whoever runs this gateway"),
            Self::Invalid
            | Self::ContextLength
            | Self::ContentFilter
            | Self::TooLarge
            | Self::RateLimited
            | Self::Overloaded
            | Self::Timeout
            | Self::Failed
            | Self::Unreachable
            | Self::Malformed
            | Self::Unfit
            | Self::Cut => None,
        }
    }

    /// What a bare status means, where the body says nothing.
    pub(crate) fn of_status(status: u16) -> Self {
        match status {
            401 | 403 => Self::Auth,
            402 => Self::Quota,
            404 | 410 => Self::ModelUnavailable,
            408 | 504 => Self::Timeout,
            // A conflict and a request that the server itself gave up are worth another try.
            409 | 499 => Self::Failed,
            413 => Self::TooLarge,
            429 => Self::RateLimited,
            529 => Self::Overloaded,
            400 | 405..=499 => Self::Invalid,
            _ => Self::Failed,
        }
    }
}

impl UpstreamError {
    /// Of a cause found here, not told by the upstream.
    pub fn new(cause: Cause, message: impl Into<String>) -> Self {
        let message = cause.own_message().map_or_else(|| message.into(), str::to_owned);
        let (native, details) = (Box::default(), Box::default());
        Self { cause, message, param: None, retry_after: None, native, details, spent: Spent::default() }
    }

    /// Of a cause the upstream told; its message is cleaned. `secret` is what must not be in it.
    pub(crate) fn told(cause: Cause, native: &Native, secret: Option<&Secret>) -> Self {
        let clean = |text: &str| clean(text, secret);
        let native = Box::new(Native {
            status: native.status,
            kind: native.kind.as_deref().map(word),
            code: native.code.as_deref().map(word),
            message: native.message.as_deref().map(clean).filter(|text| !text.is_empty()),
        });
        let message = match (cause.own_message(), &native.message) {
            (Some(own), _) => own.to_owned(),
            (None, Some(message)) => message.clone(),
            (None, None) => match native.status {
                Some(status) => format!("the upstream answered {status} without saying why"),
                None => "the upstream failed without saying why".to_owned(),
            },
        };
        let (details, spent) = (Box::default(), Spent::default());
        Self { cause, message, param: None, retry_after: None, native, details, spent }
    }

    /// With what it may have cost.
    #[must_use]
    pub(crate) fn having_spent(mut self, spent: impl Into<Spent>) -> Self {
        self.spent = spent.into();
        self
    }

    /// With the wait the upstream asks for.
    #[must_use]
    pub(crate) fn after(mut self, retry_after: Option<Duration>) -> Self {
        self.retry_after = retry_after;
        self
    }

    /// HTTP status for the tenant.
    pub fn status(&self) -> u16 {
        self.cause.shown().status
    }

    /// OpenAI's `type`.
    pub fn kind(&self) -> &'static str {
        self.cause.shown().kind
    }

    /// OpenAI's `code`: the upstream's own for a wrong request, where it is one.
    pub fn code(&self) -> &str {
        match (&self.native.code, self.cause) {
            (Some(code), Cause::Invalid) if is_word(code) => code,
            _ => self.cause.shown().code,
        }
    }

    /// Whether to try again.
    pub fn retry(&self) -> Retry {
        self.cause.retry()
    }

    /// Whose fault it is.
    pub fn fault(&self) -> Fault {
        self.cause.fault()
    }

    /// OpenAI's error object, for a body or as the last event of a stream.
    pub fn to_json(&self) -> Value {
        let mut error = json!({
            "message": self.message,
            "type": self.kind(),
            "param": self.param,
            "code": self.code(),
        });
        if let Some(map) = error.as_object_mut() {
            map.extend((*self.details).clone());
        }
        json!({"error": error})
    }
}

impl fmt::Display for UpstreamError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.code())
    }
}

impl std::error::Error for UpstreamError {}

/// A code of OpenAI's kind: letters and underscores.
fn is_word(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

fn word(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_WORD_CHARS).collect()
}

/// Without what is nobody's business, and not longer than anyone reads.
fn clean(text: &str, secret: Option<&Secret>) -> String {
    let mut text = text.trim().to_owned();
    if let Some(secret) = secret.map(Secret::expose).filter(|secret| !secret.is_empty()) {
        text = text.replace(secret, "***");
    }
    let text = PRIVATE.replace_all(&text, "***");
    text.chars().take(MAX_MESSAGE_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(cause: Cause, message: &str) -> UpstreamError {
        let native = Native { message: Some(message.to_owned()), ..Native::default() };
        UpstreamError::told(cause, &native, Some(&Secret::new("hunter2hunter2")))
    }

    #[test]
    fn nothing_private_is_shown() {
        let message = "key hunter2hunter2 or sk-proj-abc123456 or AIzaSyA1234567890 of org-AbCdEfGh12 at \
                       https://res.openai.azure.com/openai?x=1 under projects/my-project-1 with Bearer abc.def is bad";
        let shown = told(Cause::Failed, message).message;
        for private in ["hunter2", "abc123", "SyA12", "AbCdEf", "azure", "my-project", "abc.def"] {
            assert!(!shown.contains(private), "{private} in {shown}");
        }
        assert!(shown.starts_with("key *** or *** or ***") && shown.ends_with("is bad"), "{shown}");
    }

    #[test]
    fn what_is_the_operators_affair_is_not_told_to_tenants() {
        for cause in [Cause::Auth, Cause::Quota, Cause::ModelUnavailable] {
            let error = told(cause, "the deployment payroll-gpt does not exist");
            assert!(!error.to_json().to_string().contains("payroll"), "{error}");
            assert_eq!(error.native.message.as_deref(), Some("the deployment payroll-gpt does not exist"));
            assert_eq!((error.fault(), error.retry()), (Fault::Operator, Retry::Elsewhere));
            assert!(error.status() >= 500);
        }
    }

    #[test]
    fn a_caller_s_code_passes_and_an_odd_one_does_not() {
        let of = |code: &str| {
            let native = Native { code: Some(code.to_owned()), ..Native::default() };
            UpstreamError::told(Cause::Invalid, &native, None).code().to_owned()
        };
        assert_eq!(of("unsupported_value"), "unsupported_value");
        assert_eq!(of("400"), "invalid_value");
        assert_eq!(of("Evil\nHeader"), "invalid_value");
    }
}
