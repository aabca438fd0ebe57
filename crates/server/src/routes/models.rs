//! `GET /v1/models` and `/v1/models/{id}`.

use axum::{
    Extension, Json,
    extract::{Path, State},
};
use bindery_engine::adapters::AdapterSpec;
use bindery_gateway::gateway::ListedModel;
use bindery_protocol::openai::{ErrorResponse, ModelCard, ModelList};

use crate::{
    adapters::NamedKind,
    error::ApiError,
    router::Serving,
    routes::refusals::GateRefusals,
    state::{AppState, SharedState},
};

/// The models you may name, the served base first.
#[utoipa::path(get, path = "/v1/models", tag = "models", security((), ("bearer" = [])), responses(
    (status = 200, description = "the models", body = ModelList),
    GateRefusals,
))]
pub(crate) async fn list(State(state): State<SharedState>, Extension(serving): Extension<Serving>) -> Json<ModelList> {
    let bases = serving.caller.bases(&state).map(|name| card(&state, &serving, name));
    let mut adapters = serving.caller.adapters(&state);
    // The base's own names win.
    adapters.retain(|spec| !state.config.served_model_names.contains(&spec.name));
    let adapters = adapters.iter().map(|spec| adapter_card(&state, &serving, spec));
    let elsewhere = serving.caller.elsewhere(&state).into_iter().map(|model| elsewhere_card(&state, &serving, model));
    let data = bases.chain(adapters).chain(elsewhere).collect();
    Json(ModelList { object: "list".into(), data })
}

/// One model.
#[utoipa::path(get, path = "/v1/models/{id}", tag = "models", security((), ("bearer" = [])),
    params(("id" = String, Path, description = "the model's name; it may contain slashes")), responses(
    (status = 200, description = "the model", body = ModelCard),
    (status = 404, description = "no such model", body = ErrorResponse),
    GateRefusals,
))]
pub(crate) async fn get(
    State(state): State<SharedState>,
    Extension(serving): Extension<Serving>,
    id: Result<Path<String>, axum::extract::rejection::PathRejection>,
) -> Result<Json<ModelCard>, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::invalid("id", "the model's name in the path is not UTF-8"))?;
    if serving.caller.kind_of(&state, &id).is_none()
        && let Some(model) = serving.caller.elsewhere(&state).into_iter().find(|model| model.name == id)
    {
        return Ok(Json(elsewhere_card(&state, &serving, model)));
    }
    let named = serving.resolve(&state, Some(id))?;
    let spec = match named.kind {
        NamedKind::Base => None,
        NamedKind::Adapter => serving.model.adapters.spec(&named.name),
    };
    Ok(Json(match spec {
        Some(spec) => adapter_card(&state, &serving, &spec),
        None => card(&state, &serving, &named.name),
    }))
}

fn card(state: &AppState, serving: &Serving, name: &str) -> ModelCard {
    ModelCard {
        id: name.to_owned(),
        object: "model".into(),
        created: state.started_at,
        owned_by: "bindery".into(),
        root: Some(state.config.primary_model_name().to_owned()),
        parent: None,
        max_model_len: Some(serving.model.max_model_len),
        digest: state.config.digest.get().cloned(),
        license: state.config.license.clone(),
    }
}

/// A model that does not run here, or not always: `owned_by` says `upstream` or `virtual`.
fn elsewhere_card(state: &AppState, serving: &Serving, model: ListedModel) -> ModelCard {
    ModelCard {
        id: model.name,
        owned_by: model.owner.to_owned(),
        root: None,
        max_model_len: model.max_context_tokens.and_then(|tokens| usize::try_from(tokens).ok()),
        digest: None,
        license: None,
        ..card(state, serving, "")
    }
}

/// vLLM's fields: `root` is where the adapter came from, `parent` the base it stands beside.
fn adapter_card(state: &AppState, serving: &Serving, spec: &AdapterSpec) -> ModelCard {
    let identity = serving.model.adapters.identity(&spec.name);
    ModelCard {
        id: spec.name.clone(),
        root: Some(spec.source.to_string()),
        parent: Some(state.config.primary_model_name().to_owned()),
        digest: identity.as_ref().map(|identity| identity.digest.clone()),
        license: identity.and_then(|identity| identity.licence.clone()),
        ..card(state, serving, &spec.name)
    }
}
