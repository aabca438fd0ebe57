//! The routes, and what stands before them: the record of every request, and the gate of the model routes.

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderName, HeaderValue},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bindery_engine::LocalModel;

use crate::{
    auth::Caller,
    context::{GuardedBody, observe},
    error::ApiError,
    exchange::through_gateway,
    routes::{adapters, chat, completions, models, operations, tokenize},
    state::SharedState,
};

pub(crate) const X_BINDERY_ROUTE: HeaderName = HeaderName::from_static("x-bindery-route");

/// What a model route works with: present in its request once the gate let it through.
#[derive(Clone)]
pub(crate) struct Serving {
    pub(crate) model: Arc<LocalModel>,
    pub(crate) caller: Caller,
}

pub(crate) fn router(state: &SharedState) -> Router {
    let generation_routes = Router::new()
        .route("/v1/completions", post(completions::create))
        .route("/v1/chat/completions", post(chat::create))
        .route_layer(middleware::from_fn_with_state(Arc::clone(state), needs_model))
        .route_layer(middleware::from_fn_with_state(Arc::clone(state), through_gateway));
    let model_routes = Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::get))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route_layer(middleware::from_fn_with_state(Arc::clone(state), needs_model))
        .merge(generation_routes)
        .route_layer(middleware::from_fn_with_state(Arc::clone(state), gate));
    let admin_routes = Router::new()
        .route("/v1/load_lora_adapter", post(adapters::load))
        .route("/v1/unload_lora_adapter", post(adapters::unload))
        .route("/v1/adapters", get(adapters::list))
        .route_layer(middleware::from_fn_with_state(Arc::clone(state), needs_model))
        .route_layer(middleware::from_fn_with_state(Arc::clone(state), admin_gate));
    Router::new()
        .route("/health", get(operations::health))
        .route("/ready", get(operations::ready))
        .route("/metrics", get(operations::metrics))
        .route("/version", get(operations::version))
        .route("/openapi.json", get(operations::openapi))
        .merge(model_routes)
        .merge(admin_routes)
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(Arc::clone(state), observe))
        .with_state(Arc::clone(state))
}

/// Lets a model request through: who may ask, then whether the server takes requests. The request counts as in flight
/// until its response body has ended; where the server cuts what runs, a handler that has not answered yet is dropped.
async fn gate(State(state): State<SharedState>, mut request: Request, next: Next) -> Response {
    let caller = state.keys.check_all(state.config.gateway.as_ref(), request.headers()).await;
    let admitted = caller.and_then(|caller| Ok((state.lifecycle.admit().ok_or(ApiError::Draining)?, caller)));
    let (in_flight, caller) = match admitted {
        Ok(admitted) => admitted,
        Err(error) => return error.into_response(),
    };
    request.extensions_mut().insert(caller);
    let mut response = tokio::select! {
        biased;
        response = next.run(request) => response,
        () = state.lifecycle.cut_token().cancelled() => ApiError::CutByShutdown.into_response(),
    };
    // What was refused ran nowhere; where an upstream failed, that is said already.
    if response.status().is_success() {
        response.headers_mut().entry(X_BINDERY_ROUTE).or_insert(HeaderValue::from_static("local"));
    }
    response.map(|body| axum::body::Body::new(GuardedBody { body, span: None, guard: in_flight }))
}

/// For routes that work with the model. Inside the gate, and inside the gateway, which has answers from elsewhere before it loads.
async fn needs_model(State(state): State<SharedState>, mut request: Request, next: Next) -> Response {
    let caller = request.extensions().get::<Caller>().cloned().unwrap_or_default();
    match state.slot.ready() {
        Ok(model) => {
            request.extensions_mut().insert(Serving { model: Arc::clone(model), caller });
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

/// As [`gate`] for the routes that change the server, which take the admin key.
async fn admin_gate(State(state): State<SharedState>, request: Request, next: Next) -> Response {
    if let Err(error) = state.keys.check_admin(request.headers()) {
        return error.into_response();
    }
    tokio::select! {
        biased;
        response = next.run(request) => response,
        () = state.lifecycle.cut_token().cancelled() => ApiError::CutByShutdown.into_response(),
    }
}

async fn unknown_route(request: Request) -> ApiError {
    ApiError::UnknownRoute { method: request.method().clone(), path: request.uri().path().to_owned() }
}

async fn method_not_allowed(request: Request) -> ApiError {
    ApiError::MethodNotAllowed { method: request.method().clone(), path: request.uri().path().to_owned() }
}
