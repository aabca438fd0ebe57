//! Health, metrics, version, description.

use serde_json::{Value, json};

use crate::support::{MODEL, Server};

#[tokio::test(flavor = "multi_thread")]
async fn probes_answer() {
    let server = Server::start();
    for (route, key, value) in [
        ("/health", "status", json!("ok")),
        ("/ready", "status", json!("ready")),
        ("/version", "version", json!(env!("CARGO_PKG_VERSION"))),
        ("/openapi.json", "openapi", json!("3.1.0")),
    ] {
        let body: Value = server.get(route).await.json().await.unwrap();
        assert_eq!(body[key], value, "{route}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_what_happened() {
    let server = Server::start();
    let label = |name: &str| format!("{name}{{model_name=\"{MODEL}\"}}");
    let histograms = [
        "vllm:time_to_first_token_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds",
        "vllm:request_prefill_time_seconds",
        "vllm:request_decode_time_seconds",
    ];
    for name in histograms {
        assert_eq!(server.metric(&label(&format!("{name}_count"))).await, 0.0, "{name}");
    }
    let answer = server.ok("/v1/completions", &json!({"prompt": "hello", "max_tokens": 6, "n": 2})).await;
    let chunks = server.stream("/v1/completions", &json!({"prompt": "hello", "max_tokens": 6})).await;
    assert!(!chunks.is_empty());
    for name in histograms {
        assert_eq!(server.metric(&label(&format!("{name}_count"))).await, 2.0, "{name}");
    }
    // Three choices of six tokens each have five gaps.
    assert_eq!(server.metric(&label("vllm:inter_token_latency_seconds_count")).await, 15.0);
    let success = format!("vllm:request_success_total{{finished_reason=\"length\",model_name=\"{MODEL}\"}}");
    assert_eq!(server.metric(&success).await, 3.0);
    server.wait_until_empty().await;
    assert_eq!(server.metric(&label("vllm:generation_tokens_total")).await, 18.0);
    let prompt_tokens = answer["usage"]["prompt_tokens"].as_f64().unwrap();
    assert_eq!(server.metric(&label("vllm:prompt_tokens_total")).await, 2.0 * prompt_tokens);
    assert_eq!(server.metric("vllm:cache_config_info{block_size=\"4\",num_gpu_blocks=\"512\"}").await, 1.0);
    assert!(server.metric(&label("vllm:iteration_tokens_total_count")).await > 0.0);
    assert_eq!(server.metric(&label("vllm:kv_cache_usage_perc")).await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_in_the_text_format() {
    let server = Server::start();
    server.ok("/v1/completions", &json!({"prompt": "hello"})).await;
    let response = server.get("/metrics").await;
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
    let text = response.text().await.unwrap();
    let mut typed = std::collections::BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(typed.insert(name.to_owned()), "{name} is there twice");
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').unwrap();
            value.parse::<f64>().unwrap_or_else(|_| panic!("{line}"));
            let name = series.split('{').next().unwrap();
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
            assert!(typed.contains(name) || base.is_some_and(|base| typed.contains(base)), "{line} has no type");
        }
    }
}
