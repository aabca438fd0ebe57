//! The API's description, made from the handlers and the wire types, so that it cannot drift from them.

use std::sync::LazyLock;

use bindery_protocol::openai;
use utoipa::{
    Modify, OpenApi,
    openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
};

use crate::routes::{chat, completions, models, operations, tokenize};

#[derive(OpenApi)]
#[openapi(
    info(title = "Bindery", description = "A self-hosted LLM inference server with OpenAI's API"),
    paths(
        completions::create,
        chat::create,
        models::list,
        models::get,
        tokenize::tokenize,
        tokenize::detokenize,
        operations::health,
        operations::ready,
        operations::metrics,
        operations::version,
        operations::openapi,
    ),
    components(schemas(openai::ChatCompletionChunk, openai::ErrorResponse, openai::Usage)),
    modifiers(&BearerKey),
    tags(
        (name = "generation", description = "Text from prompts and conversations"),
        (name = "models", description = "What can be named in `model`"),
        (name = "text", description = "Texts to tokens and back"),
        (name = "operations", description = "For probes and operators"),
    )
)]
struct Api;

/// Keys come as bearer tokens.
struct BearerKey;

impl Modify for BearerKey {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        let scheme = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
        api.components.get_or_insert_with(Default::default).add_security_scheme("bearer", scheme);
    }
}

/// The description as JSON text.
pub fn openapi_json() -> &'static str {
    static JSON: LazyLock<String> =
        LazyLock::new(|| Api::openapi().to_pretty_json().expect("the description holds strings and numbers only"));
    &JSON
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn every_route_is_described_and_every_reference_resolves() {
        let api: Value = serde_json::from_str(openapi_json()).unwrap();
        let mut paths: Vec<&str> = api["paths"].as_object().unwrap().keys().map(String::as_str).collect();
        paths.sort_unstable();
        assert_eq!(
            paths,
            [
                "/detokenize",
                "/health",
                "/metrics",
                "/openapi.json",
                "/ready",
                "/tokenize",
                "/v1/chat/completions",
                "/v1/completions",
                "/v1/models",
                "/v1/models/{id}",
                "/version",
            ]
        );
        let mut pending = vec![&api];
        let mut num_references = 0;
        while let Some(value) = pending.pop() {
            match value {
                Value::Object(map) => {
                    if let Some(Value::String(reference)) = map.get("$ref") {
                        let pointer = reference.strip_prefix('#').unwrap();
                        assert!(api.pointer(pointer).is_some(), "{reference} leads nowhere");
                        num_references += 1;
                    }
                    pending.extend(map.values());
                }
                Value::Array(items) => pending.extend(items),
                _ => {}
            }
        }
        assert!(num_references > 20, "only {num_references} references");
    }
}
