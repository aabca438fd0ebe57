//! `POST /v1/load_lora_adapter`, `/v1/unload_lora_adapter` and `GET /v1/adapters`: for whoever holds the admin key.

use std::time::Duration;

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
use bindery_engine::adapters::{AdapterSpec, AdapterStatus, Unload, check_name};
use bindery_protocol::openai::{
    AdapterChanged, AdapterEntry, AdapterList, ErrorResponse, LoadAdapterRequest, UnloadAdapterRequest,
};

use crate::{
    body::{ApiJson, Warnings},
    error::ApiError,
    router::Serving,
    routes::refusals::{AdminRefusals, BodyRefusals},
    state::SharedState,
};

/// Loads an adapter, whole, before it answers; nothing changes where that fails.
#[utoipa::path(post, path = "/v1/load_lora_adapter", tag = "adapters", security(("bearer" = [])),
    request_body = LoadAdapterRequest, responses(
    (status = 200, description = "requests may name it", body = AdapterChanged),
    BodyRefusals,
    AdminRefusals,
))]
pub(crate) async fn load(
    State(state): State<SharedState>,
    Extension(serving): Extension<Serving>,
    body: Result<ApiJson<LoadAdapterRequest>, ApiError>,
) -> Result<Response, ApiError> {
    let ApiJson { value: request, warnings, .. } = body?;
    let LoadAdapterRequest { lora_name: name, lora_path, load_inplace, tenants, pinned } = request;
    check_name(&name).map_err(|error| ApiError::from_adapter(&error, "lora_name"))?;
    if state.config.served_model_names.contains(&name) {
        return Err(ApiError::invalid("lora_name", format!("{name:?} is the base's own name: choose another")));
    }
    if state.config.gateway.as_ref().is_some_and(|gateway| gateway.has_name(&name)) {
        let what = format!("{name:?} is a virtual model's or an upstream model's name: choose another");
        return Err(ApiError::invalid("lora_name", what));
    }
    if let Some(stranger) =
        tenants.iter().flatten().find(|tenant| !state.config.tenants.iter().any(|known| known.name == **tenant))
    {
        return Err(ApiError::invalid("tenants", format!("there is no tenant {stranger:?}: the config file has them")));
    }
    if tenants.as_ref().is_some_and(Vec::is_empty) {
        let what = "an empty list of tenants would leave an adapter that nobody could use: name some, or leave it out";
        return Err(ApiError::invalid("tenants", what));
    }
    let is_pinned = || serving.model.adapters.spec(&name).is_some_and(|spec| spec.pinned);
    if load_inplace == Some(true) && pinned == Some(false) && is_pinned() {
        let what = format!("the adapter {name:?} is pinned, and a new version in its place stays so: unload it first");
        return Err(ApiError::invalid("pinned", what));
    }
    let source =
        state.config.adapter_roots.source(&lora_path).map_err(|error| ApiError::from_adapter(&error, "lora_path"))?;
    let spec = AdapterSpec { name: name.clone(), source, tenants, pinned: pinned.unwrap_or(false) };
    serving
        .model
        .adapters
        .load(spec, load_inplace.unwrap_or(false))
        .await
        .map_err(|error| refusal(error, "lora_name"))?;
    tracing::info!(adapter = name, path = lora_path, "an adapter was loaded");
    Ok(changed(format!("Success: LoRA adapter '{name}' added successfully."), &warnings))
}

fn changed(message: String, warnings: &Warnings) -> Response {
    let mut response = Json(AdapterChanged { message }).into_response();
    warnings.write(response.headers_mut());
    response
}

/// A file that cannot be used is the request's mistake here: whoever loads it can mend it.
fn refusal(error: bindery_engine::AdapterError, param: &str) -> ApiError {
    match error {
        bindery_engine::AdapterError::Unreadable { .. } => ApiError::invalid("lora_path", error.to_string()),
        error => ApiError::from_adapter(&error, param),
    }
}

/// Lets an adapter go. Its name is free at once; its memory when the last request that uses it has ended.
#[utoipa::path(post, path = "/v1/unload_lora_adapter", tag = "adapters", security(("bearer" = [])),
    request_body = UnloadAdapterRequest, responses(
    (status = 200, description = "it is gone", body = AdapterChanged),
    (status = 409, description = "requests use it", body = ErrorResponse),
    BodyRefusals,
    AdminRefusals,
))]
pub(crate) async fn unload(
    State(state): State<SharedState>,
    Extension(serving): Extension<Serving>,
    body: Result<ApiJson<UnloadAdapterRequest>, ApiError>,
) -> Result<Response, ApiError> {
    let ApiJson { value: request, warnings, .. } = body?;
    let UnloadAdapterRequest { lora_name: name, mode, timeout_s } = request;
    let timeout = timeout_s.map(|seconds| unload_timeout(seconds, state.limits.max_unload_timeout)).transpose()?;
    let mode = match mode.as_deref() {
        None | Some("wait") => Unload::Wait(timeout),
        Some("refuse") => Unload::RefuseIfUsed,
        Some(other) => {
            return Err(ApiError::invalid("mode", format!("mode is {other:?}: it must be \"wait\" or \"refuse\"")));
        }
    };
    let is_watched = serving.model.adapters.is_watched(&name);
    serving.model.adapters.unload(&name, mode).await.map_err(|error| ApiError::from_adapter(&error, "lora_name"))?;
    tracing::info!(adapter = name, "an adapter was unloaded");
    let mut message = format!("Success: LoRA adapter '{name}' removed successfully.");
    if is_watched {
        message
            .push_str(" Its files are still in a folder that is watched: the next version there has the name again.");
    }
    Ok(changed(message, &warnings))
}

fn unload_timeout(seconds: f64, limit: Duration) -> Result<Duration, ApiError> {
    Duration::try_from_secs_f64(seconds).ok().filter(|timeout| *timeout <= limit).ok_or_else(|| {
        ApiError::invalid("timeout_s", format!("timeout_s is {seconds}: it must be between 0 and {}", limit.as_secs()))
    })
}

/// Every adapter, whoever it belongs to.
#[utoipa::path(get, path = "/v1/adapters", tag = "adapters", security(("bearer" = [])), responses(
    (status = 200, description = "the adapters", body = AdapterList),
    AdminRefusals,
))]
pub(crate) async fn list(Extension(serving): Extension<Serving>) -> Json<AdapterList> {
    let data = serving.model.adapters.list().into_iter().map(entry).collect();
    Json(AdapterList { object: "list".into(), data })
}

fn entry(status: AdapterStatus) -> AdapterEntry {
    let AdapterStatus { name, version, state, source, digest, tenants, pinned, num_users, num_bytes, info, failure } =
        status;
    AdapterEntry {
        name,
        version,
        state: state.as_str().into(),
        source,
        digest,
        tenants,
        pinned,
        users: num_users,
        memory_bytes: num_bytes,
        rank: info.as_ref().map(|info| info.rank),
        targets: info.as_ref().map(|info| info.targets.clone()),
        base_model_name_or_path: info.and_then(|info| info.base_model_name_or_path),
        failure,
    }
}
