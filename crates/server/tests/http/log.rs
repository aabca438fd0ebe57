//! What the audit log and the ledger hold of requests over a socket: which version of an adapter answered, what could not even be
//! read, who else saw a text; and that an answer does not end well without its row.

use bindery_engine::adapters::{AdapterSource, AdapterSpec};
use serde_json::{Value, json};

use crate::{
    gateway::House,
    outside::{Hook, Manner},
    support::{MODEL, Setup, events},
};

const AUDIT: &str = "[audit]\npath = \"FOLDER/log\"\nkey_file = \"FOLDER/key\"\n";

fn body(model: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4})
}

impl House {
    /// The log's records of requests, in their order.
    fn records(&self) -> Vec<Value> {
        let folder = std::fs::read_dir(self.folder.path().join("log")).unwrap();
        let mut files: Vec<_> = folder.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let lines = files.iter().flat_map(|file| {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).collect::<Vec<_>>()
        });
        lines.filter_map(|line| find(&line, "request_id").cloned()).collect()
    }
}

/// The object that has this member, wherever it stands.
fn find<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    let map = value.as_object()?;
    if map.contains_key(name) { Some(value) } else { map.values().find_map(|inner| find(inner, name)) }
}

/// A folder written anew, and the name read anew, between two requests: each record names the version that its request held.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_names_the_adapter_s_version_that_answered_and_its_licence() {
    let mut setup = Setup::new();
    setup.model.eos_bias = -1000.0;
    let house = House::build_with(AUDIT, setup).await;
    let (key, pool) = (house.key("vault").await, &house.server.model.adapters);
    let path = house.folder.path().join("fr");
    let spec = |tag: &str| {
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("adapter_config.json"), "{}").unwrap();
        std::fs::write(path.join("adapter_model.safetensors"), tag).unwrap();
        AdapterSpec { name: "fr".into(), source: AdapterSource::Path(path.clone()), tenants: None, pinned: false }
    };
    // Not read before its first request.
    pool.register(spec("1")).unwrap();
    assert!(pool.identity("fr").is_none());
    let first = house.chat(&key, &body("fr")).send().await.unwrap();
    assert_eq!(first.status(), 200);
    let of_first = pool.identity("fr").unwrap().digest.clone();
    pool.load(spec("2"), true).await.unwrap();
    let of_second = pool.identity("fr").unwrap().digest.clone();
    assert_ne!(of_first, of_second);
    assert_eq!(house.chat(&key, &body("fr")).send().await.unwrap().status(), 200);
    assert_eq!(house.chat(&key, &body(MODEL)).send().await.unwrap().status(), 200);
    let records = house.records();
    let adapters: Vec<&Value> = records.iter().map(|record| &record["model"]["adapter"]).collect();
    assert_eq!(adapters[0], &json!({"name": "fr", "digest": of_first, "licence": "mit"}), "{records:?}");
    assert_eq!(adapters[1]["digest"], of_second);
    assert!(adapters[2].is_null(), "{records:?}");
    assert_eq!(
        (&records[2]["model"]["digest"], &records[2]["model"]["licence"]),
        (&json!("abc"), &json!("Apache-2.0"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_in_its_sender_s_log() {
    let house = House::build(AUDIT).await;
    let key = house.key("acme").await;
    let path = "/v1/chat/completions";
    let send = |key: &str, kind: &str, text: &'static str| {
        let request = house.server.request(reqwest::Method::POST, path).bearer_auth(key);
        request.header("content-type", kind).body(text).send()
    };
    assert_eq!(send(&key, "application/json", "{\"model\": ").await.unwrap().status(), 400);
    assert_eq!(send(&key, "text/csv", "a,b").await.unwrap().status(), 400);
    assert_eq!(send("bdy_unknown", "application/json", "{").await.unwrap().status(), 401);
    let records = house.records();
    let told: Vec<(&str, bool, bool)> = records
        .iter()
        .map(|record| {
            let outcome = record["outcome"].as_str().unwrap();
            (
                record["tenant"].as_str().unwrap(),
                !outcome.is_empty() && outcome != "completed",
                record["key_id"].is_string(),
            )
        })
        .collect();
    assert_eq!(told, [("acme", true, true); 2], "a stranger is in nobody's log: {records:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_goes_to_a_web_hook_is_in_the_log() {
    let hook = Hook::start().await;
    let rest = format!(
        "{AUDIT}{}[[tenants]]\nname = \"asked\"\nprivacy = \"any\"\nguardrails = [\"hook\"]\n",
        hook.table("hook", "action = \"block\"\non = [\"prompt\"]")
    );
    let house = House::build(&rest).await;
    let key = house.key("asked").await;
    assert_eq!(house.chat(&key, &body(MODEL)).send().await.unwrap().status(), 200);
    hook.set(Manner::Fail);
    assert_eq!(house.chat(&key, &body(MODEL)).send().await.unwrap().status(), 503);
    let records = house.records();
    let told: Vec<(&str, &str)> = records
        .iter()
        .map(|record| (record["route"]["to"].as_str().unwrap(), record["outcome"].as_str().unwrap()))
        .collect();
    let host = "webhook:127.0.0.1";
    assert_eq!(told, [(host, "judged"), ("local", "completed"), (host, "failed"), ("", "guardrail_unavailable")]);
    assert_eq!(records[0]["request_id"], records[1]["request_id"]);
}

/// The store's file has reached its bound.
#[tokio::test(flavor = "multi_thread")]
async fn without_its_row_a_local_answer_does_not_end_well() {
    let house = House::with_store("max_bytes = 262144\n").await;
    let key = house.key("vault").await;
    let mut streamed = body(MODEL);
    streamed["stream"] = json!(true);
    // Rows hold no text of a request, so it takes some of them.
    let mut num_answered = 0;
    let text = loop {
        let response = house.chat(&key, &streamed).send().await.unwrap();
        let (status, text) = (response.status().as_u16(), response.text().await.unwrap());
        if !text.ends_with("data: [DONE]\n\n") {
            break (status == 200).then_some(text);
        }
        num_answered += 1;
        assert!(num_answered < 5_000, "the store never fills");
    };
    // None where housekeeping was the first to meet the bound.
    if let Some(text) = &text {
        assert_eq!(events(text).0.last().unwrap()["error"]["code"], "store_unavailable", "{text}");
    }
    // From now on it is known, and nothing is computed in vain.
    let response = house.chat(&key, &streamed).send().await.unwrap();
    assert_eq!((response.status().as_u16(), response.headers().contains_key("retry-after")), (503, true));
    let metrics = house.server.get("/metrics").await.text().await.unwrap();
    let ledger: Vec<&str> = metrics.lines().filter(|line| line.contains("ledger")).collect();
    assert!(
        metrics.contains("bindery_ledger_leftovers 1\n"),
        "its row is not given up after {num_answered}: {ledger:#?}"
    );
}
