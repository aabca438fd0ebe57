//! For probes and operators: health, readiness, metrics, version, the API's description. Never behind a key.

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{error::ApiError, metrics::AdapterLabels, openapi::openapi_json, slot::SlotState, state::SharedState};

/// The state of the server, in a word.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Status {
    /// `ok` or `ready`.
    status: &'static str,
}

/// The version of the server.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Version {
    /// As in its release.
    version: &'static str,
}

/// The process is alive.
#[utoipa::path(get, path = "/health", tag = "operations", responses((status = 200, description = "alive", body = Status)))]
pub(crate) async fn health() -> Json<Status> {
    Json(Status { status: "ok" })
}

/// The model is loaded and requests are taken.
#[utoipa::path(get, path = "/ready", tag = "operations", responses(
    (status = 200, description = "requests are taken", body = Status),
    (status = 503, description = "loading, failed or draining", body = bindery_protocol::openai::ErrorResponse),
))]
pub(crate) async fn ready(State(state): State<SharedState>) -> Result<Json<Status>, ApiError> {
    if state.lifecycle.is_draining() {
        return Err(ApiError::Draining);
    }
    match state.slot.state() {
        SlotState::Ready(_) => Ok(Json(Status { status: "ready" })),
        SlotState::Loading => Err(ApiError::Loading),
        SlotState::Failed(message) => Err(ApiError::LoadFailed { message: message.to_owned() }),
    }
}

/// Counters, gauges and histograms in Prometheus' text format. Where there is an admin key, what tells of tenants is told to it alone.
#[utoipa::path(get, path = "/metrics", tag = "operations",
    responses((status = 200, description = "Prometheus text format", body = String, content_type = "text/plain")))]
pub(crate) async fn metrics(State(state): State<SharedState>, headers: HeaderMap) -> Response {
    let model = state.slot.model();
    let stats = model.map(|model| model.engine.stats());
    let adapters = model
        .map(|model| AdapterLabels { max_loras: model.adapters.config().max_loras, in_use: model.adapters.in_use() });
    let may_see_tenants = matches!(state.keys.check_admin(&headers), Ok(()) | Err(ApiError::NoAdminKey));
    let gateway = state.config.gateway.as_ref().filter(|_| may_see_tenants);
    let mut adapters = adapters.unwrap_or_default();
    if let Some(model) = model.filter(|_| !may_see_tenants) {
        let is_everyones = |name: &String| model.adapters.spec(name).is_none_or(|spec| spec.tenants.is_none());
        adapters.in_use.running.retain(is_everyones);
        adapters.in_use.waiting.retain(is_everyones);
    }
    match state.metrics.render(stats.as_ref(), &adapters, gateway) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "the metrics could not be written");
            let text = "the metrics could not be written: the log has the reason";
            (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
        }
    }
}

/// The version of the server.
#[utoipa::path(get, path = "/version", tag = "operations", responses((status = 200, description = "the version", body = Version)))]
pub(crate) async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

/// This API's description.
#[utoipa::path(get, path = "/openapi.json", tag = "operations",
    responses((status = 200, description = "OpenAPI 3.1", body = Object, content_type = "application/json")))]
pub(crate) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], openapi_json()).into_response()
}
