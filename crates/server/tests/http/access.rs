//! Keys: who gets in, and what is open to everyone.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{Server, Setup, check_error};

const MODEL_ROUTES: [(Method, &str); 6] = [
    (Method::POST, "/v1/completions"),
    (Method::POST, "/v1/chat/completions"),
    (Method::GET, "/v1/models"),
    (Method::GET, "/v1/models/fake-model"),
    (Method::POST, "/tokenize"),
    (Method::POST, "/detokenize"),
];

fn with_keys() -> Server {
    let mut setup = Setup::new();
    setup.config.api_keys = vec!["sk-one".into(), "sk-two".into()];
    setup.config.admin_key = Some("sk-admin".into());
    setup.start()
}

#[tokio::test(flavor = "multi_thread")]
async fn model_routes_need_a_key_and_probes_do_not() {
    let server = with_keys();
    for (method, route) in MODEL_ROUTES {
        let request = || server.request(method.clone(), route).header("content-type", "application/json").body("{}");
        for wrong in [None, Some("Bearer nope"), Some("Basic sk-one"), Some("sk-one"), Some("Bearer sk-admin")] {
            let request = wrong.into_iter().fold(request(), |request, value| request.header("authorization", value));
            let response = request.send().await.unwrap();
            assert_eq!(response.headers()["www-authenticate"], "Bearer", "{route}");
            let code = check_error(response, 401, None, route).await;
            assert_eq!(code.as_deref(), Some("invalid_api_key"));
        }
        for right in ["sk-one", "sk-two"] {
            let status = request().bearer_auth(right).send().await.unwrap().status();
            assert_ne!(status, 401, "{route}");
        }
    }
    for route in ["/health", "/ready", "/metrics", "/version", "/openapi.json"] {
        assert_eq!(server.get(route).await.status(), 200, "{route}");
    }
    let answer: Value = server
        .request(Method::POST, "/v1/completions")
        .bearer_auth("sk-two")
        .json(&json!({"prompt": "hello", "max_tokens": 2}))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(answer["usage"]["completion_tokens"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_admin_key_alone_closes_nothing() {
    let mut setup = Setup::new();
    setup.config.admin_key = Some("sk-admin".into());
    let server = setup.start();
    server.ok("/v1/completions", &json!({"prompt": "hello"})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_is_refused_before_the_body_is_read() {
    let server = with_keys();
    let response = server.post_bytes("/v1/completions", "{ this is no JSON").await;
    check_error(response, 401, None, "no key").await;
}
