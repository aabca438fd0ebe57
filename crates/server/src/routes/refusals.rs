//! How routes refuse, for the API's description: once for all of them, so that no route forgets one.
//!
//! Nothing here is ever built: what is sent comes from [`crate::error::ApiError`], whose statuses these are.

use bindery_protocol::openai::ErrorResponse;
use utoipa::IntoResponses;

/// Of the gate before every model route.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "read by the derive alone")]
pub(crate) enum GateRefusals {
    /// No key, or a wrong one.
    #[response(status = 401)]
    Key(ErrorResponse),
    /// A key of a tenant that the config does not name.
    #[response(status = 403)]
    Tenant(ErrorResponse),
    /// The model is loading, the server stops, or too many requests wait.
    #[response(status = 503)]
    Unavailable(ErrorResponse),
}

/// Of the gate before routes that change the server.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "read by the derive alone")]
pub(crate) enum AdminRefusals {
    /// No key.
    #[response(status = 401)]
    Key(ErrorResponse),
    /// Another key than the admin's, or none is configured; or a path outside the folders that are open to loading.
    #[response(status = 403)]
    Forbidden(ErrorResponse),
    /// The model is loading, or the server stops.
    #[response(status = 503)]
    Unavailable(ErrorResponse),
}

/// Of routes that read a JSON body.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "read by the derive alone")]
pub(crate) enum BodyRefusals {
    /// The body is no JSON, or a field of it is wrong.
    #[response(status = 400)]
    Invalid(ErrorResponse),
    /// The model is not offered here.
    #[response(status = 404)]
    UnknownModel(ErrorResponse),
    /// The body did not arrive, or the request's own deadline passed.
    #[response(status = 408)]
    Timeout(ErrorResponse),
    /// The body is too large.
    #[response(status = 413)]
    TooLarge(ErrorResponse),
    /// The body is compressed.
    #[response(status = 415)]
    Compressed(ErrorResponse),
}
