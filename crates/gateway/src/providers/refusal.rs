//! Why a request is answered with a 400 before anything is sent.
//!
//! Two sources: a field that is wrong by OpenAI's own rules (found while reading), and a field that the chosen provider
//! cannot honour (found while translating). Knows no HTTP server. Invariant: whoever reads the message knows which
//! field, what came, and what to do instead.

use serde_json::{Value, json};

/// The request as it stands is not sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A field that must be there is not.
    #[error("missing required parameter: `{param}`")]
    Missing {
        /// The field.
        param: String,
    },
    /// JSON of another type.
    #[error("`{param}` must be {expected}, got {got}")]
    WrongType {
        /// The field.
        param: String,
        /// For people: "a string".
        expected: &'static str,
        /// For people: "an array".
        got: &'static str,
    },
    /// The right type, but not a value that is possible.
    #[error("invalid value for `{param}`: {message}")]
    Invalid {
        /// The field.
        param: String,
        /// The value, the limit, the next step.
        message: String,
    },
    /// The model that was chosen cannot do this, and leaving the field out would change what the answer means.
    #[error("`{param}` is not supported by this model: {message}")]
    Unsupported {
        /// The field.
        param: String,
        /// Why, and what to do.
        message: String,
    },
}

impl Refusal {
    /// A value out of range.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { param: param.into(), message: message.into() }
    }

    /// A field the provider has no counterpart for.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Unsupported { param: param.into(), message: message.into() }
    }

    /// The field at fault, as a path: `messages[0].content`.
    pub fn param(&self) -> &str {
        match self {
            Self::Missing { param }
            | Self::WrongType { param, .. }
            | Self::Invalid { param, .. }
            | Self::Unsupported { param, .. } => param,
        }
    }

    /// OpenAI's `code`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "missing_required_parameter",
            Self::WrongType { .. } => "invalid_type",
            Self::Invalid { .. } => "invalid_value",
            Self::Unsupported { .. } => "unsupported_parameter",
        }
    }

    /// OpenAI's error object.
    pub fn to_json(&self) -> Value {
        json!({"error": {
            "message": self.to_string(),
            "type": "invalid_request_error",
            "param": self.param(),
            "code": self.code(),
        }})
    }
}
