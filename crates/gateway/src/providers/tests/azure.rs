//! Azure: addresses, fields by version, the content filter.

use super::*;

fn dated(version: &str) -> Asked {
    let provider = Provider::Azure(AzureForm::Dated { api_version: version.to_owned() });
    let mut asked = Asked::of(provider, "gpt-4o");
    asked.model = asked.model.deployed_as("my chat/gpt");
    asked
}

fn v1() -> Asked {
    let mut asked = Asked::of(Provider::Azure(AzureForm::V1), "gpt-4o");
    asked.model = asked.model.deployed_as("prod");
    asked
}

#[test]
fn both_forms_of_address_are_built_from_any_spelling() {
    for base in [
        "https://res.openai.azure.com",
        "https://res.openai.azure.com/",
        "https://res.openai.azure.com/openai",
        "https://res.openai.azure.com/openai/v1/",
    ] {
        let mut asked = v1();
        asked.base = Some(base);
        let outgoing = asked.send(hi(json!({}))).unwrap();
        assert_eq!(outgoing.request.url.as_str(), "https://res.openai.azure.com/openai/v1/chat/completions");
        assert_eq!(outgoing.request.body["model"], "prod");
        let mut asked = dated("2024-10-21");
        asked.base = Some(base);
        let expected =
            "https://res.openai.azure.com/openai/deployments/my%20chat%2Fgpt/chat/completions?api-version=2024-10-21";
        assert_eq!(asked.send(hi(json!({}))).unwrap().request.url.as_str(), expected);
    }
}

#[test]
fn a_dated_version_gets_no_field_that_came_later() {
    let body = hi(json!({"verbosity": "low", "service_tier": "flex", "user": "u", "store": true}));
    let outgoing = dated("2024-10-21").send(body.clone()).unwrap();
    assert_eq!(dropped(&outgoing), ["verbosity", "service_tier"]);
    assert_eq!(outgoing.request.body["user"], "u");
    assert!(v1().send(body.clone()).unwrap().warnings.is_empty());
    assert!(dated("2025-04-01-preview").send(body).unwrap().warnings.is_empty());
    assert_eq!(refused(v1().send(hi(json!({"web_search_options": {}})))).0, "web_search_options");
}

#[test]
fn reports_of_the_filter_ride_on_chunks_that_have_choices() {
    let outgoing = v1().send(hi(json!({"stream": true}))).unwrap();
    let safe = json!({"hate": {"filtered": false, "severity": "safe"}});
    let events = [
        event(
            &json!({"id": "", "choices": [], "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": safe}]}),
        ),
        super::openai::chunk(&json!({"role": "assistant", "content": ""}), None),
        super::openai::chunk(&json!({"content": "hi"}), None),
        event(
            &json!({"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "content_filter_results": safe}]}),
        ),
        done(),
    ];
    let chunks = stream(outgoing.reader, &events).unwrap().chunks;
    assert!(chunks.iter().all(|chunk| !chunk["choices"].as_array().unwrap().is_empty()));
    assert_eq!(chunks[0]["prompt_filter_results"][0]["content_filter_results"], safe);
    assert!(chunks.iter().any(|chunk| chunk["choices"][0]["content_filter_results"] == safe));
    assert!(chunks.iter().all(|chunk| chunk["id"] == "chatcmpl-1"));
    assert_eq!(gathered(&chunks)[0]["message"]["content"], "hi");
}

#[test]
fn a_filtered_prompt_keeps_its_categories() {
    let outgoing = v1().send(hi(json!({}))).unwrap();
    let inner = json!({"code": "ResponsibleAIPolicyViolation", "content_filter_result": {"violence": {"filtered": true, "severity": "high"}}});
    let body = json!({"error": {"message": "filtered", "type": null, "param": "prompt", "code": "content_filter", "status": 400, "innererror": inner}});
    let error = failed(&outgoing, 400, &body);
    assert_eq!(
        (error.cause, error.code(), error.param.as_deref()),
        (Cause::ContentFilter, "content_filter", Some("prompt"))
    );
    assert_eq!(error.to_json()["error"]["innererror"], inner);
}

#[test]
fn errors_of_the_gateway_before_the_model_are_read() {
    let outgoing = v1().send(hi(json!({}))).unwrap();
    let cause = |status, body: Value| failed(&outgoing, status, &body).cause;
    assert_eq!(
        cause(404, json!({"error": {"code": "DeploymentNotFound", "message": "no prod"}})),
        Cause::ModelUnavailable
    );
    assert_eq!(cause(401, json!({"statusCode": 401, "message": "bad key"})), Cause::Auth);
    assert_eq!(cause(403, json!({"error": {"code": "403", "message": "network"}})), Cause::Auth);
    assert_eq!(cause(429, json!({"error": {"code": "429", "message": "slow"}})), Cause::RateLimited);
    assert_eq!(cause(503, json!({})), Cause::Failed);
}
