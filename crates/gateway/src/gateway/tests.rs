//! The whole way of a request upstream, against a double at a socket that counts what reaches it.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{Router as Routes, extract::State, http::StatusCode, response::IntoResponse, routing::post};
use serde_json::{Value, json};

use super::*;
use crate::{
    config::GatewayConfig,
    ledger::RequestStatus,
    names::NodeId,
    policy::{LocalState, Target, route::LocalName},
    store::{Durability, Store, StoreHeads, StoreOptions},
};

pub(super) struct Double {
    pub(super) address: SocketAddr,
    pub(super) num_calls: Arc<AtomicUsize>,
}

/// An upstream that speaks OpenAI's API; a prompt of "fail" is answered with 500, "stream" follows the body.
pub(super) async fn upstream() -> Double {
    let num_calls = Arc::new(AtomicUsize::new(0));
    let answer = |State(calls): State<Arc<AtomicUsize>>, body: axum::Json<Value>| async move {
        calls.fetch_add(1, Ordering::SeqCst);
        let text = body["messages"][0]["content"].as_str().unwrap_or_default().to_owned();
        if text == "fail" {
            return (StatusCode::BAD_REQUEST, axum::Json(json!({"error": {"message": "no", "type": "x"}})))
                .into_response();
        }
        if text.contains("verdict:") {
            let word = text.rsplit(' ').next().unwrap_or_default();
            return axum::Json(json!({"id": "c", "object": "chat.completion", "created": 1, "model": "gpt-4.1",
                "choices": [{"index": 0, "message": {"role": "assistant", "content": word}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}}))
            .into_response();
        }
        if body["stream"] == json!(true) {
            let chunk = |delta: Value, finish: Value| {
                json!({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4.1",
                       "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})
            };
            let usage = json!({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4.1", "choices": [],
                               "usage": {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}});
            let events = [
                chunk(json!({"role": "assistant", "content": "the word is swo"}), Value::Null),
                chunk(json!({"content": "rdfish, friend"}), Value::Null),
                chunk(json!({}), json!("stop")),
                usage,
            ];
            let events = events.map(|event| event.to_string());
            let body = format!("data: {}\n\n", events.join("\n\ndata: "));
            return ([("content-type", "text/event-stream")], body + "data: [DONE]\n\n").into_response();
        }
        axum::Json(json!({"id": "c", "object": "chat.completion", "created": 1, "model": "gpt-4.1",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": format!("you said {text}")}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}}))
        .into_response()
    };
    let routes = Routes::new().route("/v1/chat/completions", post(answer)).with_state(Arc::clone(&num_calls));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() });
    Double { address, num_calls }
}

pub(super) async fn gateway(double: &Double, rest: &str) -> (Gateway, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let text = format!(
        "[store]\nurl = \"sqlite://{}\"\n[[upstreams]]\nname = \"up\"\nkind = \"openai-compatible\"\nbase_url = \"http://{}/v1\"\n\
         api_key_env = \"UP_KEY\"\nmodels = [\"gpt-4.1\"]\n{rest}",
        folder.path().join("b.db").display(),
        double.address
    );
    let config = GatewayConfig::parse(&text).unwrap_or_else(|problems| panic!("{problems:?}"));
    let env = |name: &str| (name == "UP_KEY").then(|| "sk-test".to_owned());
    let surroundings = Surroundings { env: &env, node: NodeId::new("test").unwrap() };
    (Gateway::start(config, &surroundings, UnixMillis::now()).await.unwrap(), folder)
}

pub(super) fn asked<'a>(tenant: &'a str, body: &Value, privacy: Option<&'a str>) -> Asked<'a> {
    Asked {
        tenant: Some(tenant),
        credential: configured_credential(),
        wire: WireRoute::Chat,
        body: body.as_object().unwrap().clone(),
        default_model: "base",
        task: None,
        privacy,
        request_id: "r",
        now: UnixMillis::now(),
    }
}

pub(super) fn local(name: &str) -> LocalName {
    if name == "base" { LocalName::Base } else { LocalName::Unknown }
}

pub(super) fn idle() -> LocalState {
    LocalState { max_prompt_tokens: 1000, ..LocalState::default() }
}

pub(super) fn body(model: &str, text: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 100})
}

/// Follows the route to its end, as a server would.
pub(super) async fn ask(gateway: &Gateway, asked: Asked<'_>) -> Result<Value, GatewayError> {
    let now = UnixMillis::now();
    let mut exchange = gateway.begin(asked)?;
    exchange.ask_about_prompt().await?;
    let route = exchange.route(idle(), now, &local).await?;
    let Target::Upstream { upstream, model } = &route.targets[0] else { return Ok(json!("local")) };
    match exchange.send(upstream, model, false, now).await? {
        (Sent::Whole(answer), _) => Ok(answer),
        (Sent::Stream(mut stream), _) => {
            let mut text = String::new();
            let mut finish = Value::Null;
            while let Some(chunk) = stream.next(&mut exchange).await {
                let chunk = chunk?;
                text.push_str(chunk.pointer("/choices/0/delta/content").and_then(Value::as_str).unwrap_or_default());
                if let Some(reason) = chunk.pointer("/choices/0/finish_reason").filter(|reason| !reason.is_null()) {
                    finish = reason.clone();
                }
            }
            Ok(json!({"text": text, "finish": finish}))
        }
    }
}

/// `(spent, reserved)` of the tenant today, in nano-dollars.
pub(super) async fn standing(gateway: &Gateway, tenant: &str) -> (i64, i64) {
    let id = TenantId::new(tenant).unwrap();
    let budget = gateway.0.tenants[&id].config.budgets[0].clone();
    let standing = gateway.0.ledger.as_ref().unwrap().standing(&budget, UnixMillis::now()).await.unwrap();
    (standing.spent.nanos(), standing.reserved.nanos())
}

const ACME: &str = "[[tenants]]\nname = \"acme\"\nprivacy = \"any\"\nbudget = { usd_per_day = 0.02 }\n";

#[tokio::test]
async fn a_call_upstream_is_answered_and_settled_at_its_price() {
    let double = upstream().await;
    let (gateway, _folder) = gateway(&double, ACME).await;
    let answer = ask(&gateway, asked("acme", &body("up/gpt-4.1", "hello"), None)).await.unwrap();
    assert_eq!(answer["choices"][0]["message"]["content"], "you said hello");
    // 1000 prompt tokens at 2 and 500 completion tokens at 8 dollars a million.
    assert_eq!(standing(&gateway, "acme").await, (6_000_000, 0));
    let mut streamed = body("up/gpt-4.1", "hello");
    streamed["stream"] = json!(true);
    let answer = ask(&gateway, asked("acme", &streamed, None)).await.unwrap();
    assert_eq!(answer, json!({"text": "the word is swordfish, friend", "finish": "stop"}));
    assert_eq!(standing(&gateway, "acme").await, (12_000_000, 0));
}

#[tokio::test]
async fn a_failed_call_costs_nothing_and_what_exceeds_the_budget_is_not_sent() {
    let double = upstream().await;
    let (gateway, _folder) = gateway(&double, ACME).await;
    let failed = ask(&gateway, asked("acme", &body("up/gpt-4.1", "fail"), None)).await.unwrap_err();
    assert_eq!(failed.shown().0, 400, "{failed}");
    assert_eq!(standing(&gateway, "acme").await, (0, 0));
    let before = double.num_calls.load(Ordering::SeqCst);
    let mut dear = body("up/gpt-4.1", "hello");
    dear["max_tokens"] = json!(30_000);
    let refused = ask(&gateway, asked("acme", &dear, None)).await.unwrap_err();
    assert_eq!((refused.shown().0, refused.shown().2), (429, "budget_exceeded".to_owned()), "{refused}");
    assert_eq!(double.num_calls.load(Ordering::SeqCst), before, "it was not sent");
}

#[tokio::test]
async fn what_is_local_only_reaches_no_socket_whatever_it_asks_for() {
    let double = upstream().await;
    let routes = "[[tenants]]\nname = \"vault\"\nprivacy = \"local-only\"\n[[routes]]\nmodel = \"auto\"\n\
                  rules = [{ to = [\"up/gpt-4.1\", \"local\"] }]\n[[routes]]\nmodel = \"out\"\nrules = [{ to = \"up/gpt-4.1\" }]\n";
    let (gateway, _folder) = gateway(&double, &format!("{ACME}{routes}")).await;
    for (tenant, header) in [("vault", None), ("vault", Some("any")), ("acme", Some("local-only"))] {
        for model in ["up/gpt-4.1", "auto", "out", "base"] {
            let outcome = ask(&gateway, asked(tenant, &body(model, "secret"), header)).await;
            assert!(outcome.is_err() || outcome.unwrap() == json!("local"), "{tenant} {model}");
        }
    }
    assert_eq!(double.num_calls.load(Ordering::SeqCst), 0);
    let wrong = ask(&gateway, asked("acme", &body("base", "x"), Some("secret"))).await.unwrap_err();
    assert_eq!(wrong.param().as_deref(), Some("x-bindery-privacy"));
}

#[tokio::test]
async fn guardrails_redact_prompts_and_stop_answers_across_chunks() {
    let double = upstream().await;
    let rest = "[[tenants]]\nname = \"acme\"\nprivacy = \"any\"\nguardrails = [\"pii\", \"words\"]\n\
                [[guardrails]]\nname = \"pii\"\nkind = \"pii\"\naction = \"redact\"\nrestore = true\n\
                [[guardrails]]\nname = \"words\"\nkind = \"blocklist\"\naction = \"block\"\nphrases = [\"swordfish\"]\n";
    let (gateway, _folder) = gateway(&double, rest).await;
    let answer = ask(&gateway, asked("acme", &body("up/gpt-4.1", "I am jo@example.org"), None)).await.unwrap();
    // The double repeats what it was sent; the placeholder comes back as what it stands for.
    assert_eq!(answer["choices"][0]["message"]["content"], "you said I am jo@example.org");
    let mut streamed = body("up/gpt-4.1", "hello");
    streamed["stream"] = json!(true);
    let answer = ask(&gateway, asked("acme", &streamed, None)).await.unwrap();
    assert_eq!(answer["finish"], "content_filter");
    assert!(!answer["text"].as_str().unwrap().contains("swo"), "{answer}");
    let blocked = ask(&gateway, asked("acme", &body("up/gpt-4.1", "say swordfish"), None)).await.unwrap_err();
    assert_eq!((blocked.shown().0, blocked.shown().2), (400, "content_filter".to_owned()));
}

#[tokio::test]
async fn limits_are_met_before_anything_else_and_given_back() {
    let double = upstream().await;
    let rest = "[[tenants]]\nname = \"acme\"\nprivacy = \"any\"\nlimits = { concurrent = 1 }\n";
    let (gateway, _folder) = gateway(&double, rest).await;
    let held = gateway.begin(asked("acme", &body("base", "x"), None)).unwrap();
    let refused = gateway.begin(asked("acme", &body("base", "x"), None)).err().unwrap();
    assert_eq!(refused.shown().0, 429);
    assert!(refused.retry_after(UnixMillis::now()).is_some());
    drop(held);
    assert!(gateway.begin(asked("acme", &body("base", "x"), None)).is_ok());
}

#[tokio::test]
async fn rules_learn_language_and_what_is_left_of_a_budget() {
    let double = upstream().await;
    let rules = "[[routes]]\nmodel = \"auto\"\nrules = [{ when = { language = \"fra\" }, to = \"up/gpt-4.1\" }, \
                 { when = { budget_left_under = 0.01 }, to = \"local\" }, { to = [\"up/gpt-4.1\", \"local\"] }]\n";
    let (gateway, _folder) = gateway(&double, &format!("{ACME}{rules}")).await;
    let route = async |text: &str| {
        let mut exchange = gateway.begin(asked("acme", &body("auto", text), None)).unwrap();
        exchange.route(idle(), UnixMillis::now(), &local).await.unwrap().targets[0].to_string()
    };
    let french = "Bonjour, pourriez-vous m'expliquer comment relier un livre ancien à la maison, s'il vous plaît ?";
    assert_eq!(route(french).await, "up/gpt-4.1");
    assert_eq!(route("hello").await, "up/gpt-4.1", "the budget is whole");
    for _ in 0..2 {
        ask(&gateway, asked("acme", &body("up/gpt-4.1", "hello"), None)).await.unwrap();
    }
    // 0.012 of 0.02 dollars are spent.
    assert_eq!(route("hello").await, "local");
    assert_eq!(route(french).await, "up/gpt-4.1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_is_in_a_log_that_verifies() {
    use crate::audit::{AuditKey, HeadStore, verify};

    let double = upstream().await;
    let log = tempfile::tempdir().unwrap();
    let (path, key_file) = (log.path().join("log"), log.path().join("key"));
    std::fs::write(&key_file, "ab".repeat(32)).unwrap();
    let rest = format!(
        "{ACME}[audit]\npath = {path:?}\nkey_file = {key_file:?}\n[[guardrails]]\nname = \"words\"\nkind = \"blocklist\"\n\
         action = \"block\"\nphrases = [\"swordfish\"]\n[[tenants]]\nname = \"strict\"\nguardrails = [\"words\"]\n"
    );
    let (gateway, folder) = gateway(&double, &rest).await;
    ask(&gateway, asked("acme", &body("up/gpt-4.1", "hello"), None)).await.unwrap();
    let mut streamed = body("up/gpt-4.1", "hello");
    streamed["stream"] = json!(true);
    ask(&gateway, asked("acme", &streamed, None)).await.unwrap();
    ask(&gateway, asked("acme", &body("up/gpt-4.1", "fail"), None)).await.unwrap_err();
    ask(&gateway, asked("strict", &body("base", "swordfish"), None)).await.unwrap_err();
    let mut local_one = gateway.begin(asked("acme", &body("base", "hi"), None)).unwrap();
    local_one.route(idle(), UnixMillis::now(), &local).await.unwrap();
    let model = LocalModel { name: "base".to_owned(), digest: Some("sha256:1".to_owned()), ..LocalModel::default() };
    let used = LocalUse { num_prompt_tokens: 3, num_completion_tokens: 2, machine_time: Duration::ZERO };
    local_one.settle_local(used, RequestStatus::Completed, model, UnixMillis::now()).await.unwrap();

    let options = StoreOptions {
        url: format!("sqlite://{}", folder.path().join("b.db").display()).parse().unwrap(),
        durability: Durability::ProcessKill,
        max_bytes: None,
        max_waiting: 16,
        timeout: Duration::from_secs(20),
    };
    let (store, _thread) = Store::open(options).await.unwrap();
    let heads = StoreHeads::new(store, tokio::runtime::Handle::current(), &path);
    let report = tokio::task::spawn_blocking(move || {
        let head = heads.load().unwrap();
        let key = AuditKey::from_file(&key_file, &path).unwrap();
        let text: String = std::fs::read_dir(&path)
            .unwrap()
            .map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap_or_default())
            .collect();
        (verify(&path, &key, head).unwrap(), text)
    });
    let (report, text) = report.await.unwrap();
    // The first one tells of the log itself.
    assert!(report.problems.is_empty() && report.num_records == 6, "{report:?}");
    for expected in [
        "\"to\":\"up\"",
        "\"to\":\"local\"",
        "content_filter",
        "\"failed\"",
        "sha256:1",
        "\"prompt\":1000",
        "names up/gpt-4.1",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    assert!(!text.contains("swordfish") && !text.contains("hello"), "no text of anybody's: {text}");
}

#[test]
fn draws_are_spread_and_fixed() {
    let draws: Vec<f64> = (0..1000).map(|at| exchange::draw_of(&format!("request-{at}"))).collect();
    assert!(draws.iter().all(|draw| (0.0..1.0).contains(draw)));
    let below = draws.iter().filter(|&&draw| draw < 0.1).count();
    assert!((60..150).contains(&below), "{below} of 1000 in the first tenth");
    assert_eq!(exchange::draw_of("a"), exchange::draw_of("a"));
}

#[test]
fn a_moment_is_of_the_utc_day_and_week() {
    // 2026-11-28 was a Saturday.
    let at = UnixMillis(1_795_867_500_000);
    assert_eq!(moment(at), Moment { minute_of_day: 12 * 60 + 5, weekday: 5 });
}
