//! The API's description, made from the handlers and the wire types, so that it cannot drift from them.

use std::sync::LazyLock;

use bindery_protocol::openai;
use utoipa::{
    Modify, OpenApi,
    openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
};

use crate::routes::{adapters, chat, completions, models, operations, tokenize};

#[derive(OpenApi)]
#[openapi(
    info(title = "Bindery", description = "A self-hosted LLM inference server with OpenAI's API"),
    paths(
        completions::create,
        chat::create,
        models::list,
        models::get,
        adapters::load,
        adapters::unload,
        adapters::list,
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
        (name = "adapters", description = "LoRA adapters, for whoever holds the admin key"),
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
                "/v1/adapters",
                "/v1/chat/completions",
                "/v1/completions",
                "/v1/load_lora_adapter",
                "/v1/models",
                "/v1/models/{id}",
                "/v1/unload_lora_adapter",
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

    /// A client's generator makes a class of each.
    #[test]
    fn components_are_named_for_what_they_are() {
        let api: Value = serde_json::from_str(openapi_json()).unwrap();
        let names: Vec<&str> = api["components"]["schemas"].as_object().unwrap().keys().map(String::as_str).collect();
        // Types of Rust, and those of ours that only say how a field is parsed.
        let strange =
            "Vec Option Box String Value Map BTreeMap HashMap Object FreeValue Present OneOrMany ModeOrObject";
        for name in &names {
            assert!(name.starts_with(char::is_uppercase), "{name}");
            assert!(name.chars().all(|c| c.is_ascii_alphanumeric()), "{name}");
            assert!(strange.split(' ').all(|strange| strange != *name), "{name}");
        }
        let places = &api["components"]["schemas"]["PromptLogprobs"];
        assert_eq!(places["type"], "array", "{places}");
        assert!(places.to_string().contains("#/components/schemas/PromptLogprob\""), "{places}");
        for answer in ["ChatCompletion", "CompletionChoice"] {
            let field = api["components"]["schemas"][answer]["properties"]["prompt_logprobs"].to_string();
            assert!(field.contains("#/components/schemas/PromptLogprobs\""), "{answer}: {field}");
        }
        assert!(names.contains(&"PromptLogprob"), "{names:?}");
    }

    #[test]
    fn every_refusal_of_a_route_is_described() {
        let api: Value = serde_json::from_str(openapi_json()).unwrap();
        let check = |path: &str, method: &str, statuses: &[&str]| {
            let responses = api["paths"][path][method]["responses"].as_object().unwrap();
            assert_eq!(responses.keys().collect::<Vec<_>>(), statuses, "{path}");
            for (status, response) in responses.iter().filter(|(status, _)| *status != "200") {
                let schema = &response["content"]["application/json"]["schema"]["$ref"];
                assert_eq!(schema, "#/components/schemas/ErrorResponse", "{path} {status}");
                assert!(response["description"].as_str().is_some_and(|text| !text.is_empty()), "{path} {status}");
            }
        };
        for path in ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"] {
            check(path, "post", &["200", "400", "401", "403", "404", "408", "413", "415", "503"]);
        }
        check("/v1/models", "get", &["200", "401", "403", "503"]);
        check("/v1/models/{id}", "get", &["200", "401", "403", "404", "503"]);
    }
}
