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
    audit::record::ModelUsed,
    config::GatewayConfig,
    ledger::{self, CostColumn, CostQuery, RequestStatus, costs},
    names::NodeId,
    policy::{LocalState, Target, route::LocalName},
    store::{Durability, Store, StoreOptions},
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
        if text == "broken" {
            return ([("content-type", "application/json")], "{\"id\": ").into_response();
        }
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
    // Another API: always prose, whatever is asked for.
    let prose = |State(calls): State<Arc<AtomicUsize>>| async move {
        calls.fetch_add(1, Ordering::SeqCst);
        axum::Json(json!({"id": "m", "type": "message", "role": "assistant", "model": "claude-sonnet-5",
            "content": [{"type": "text", "text": "Sure!"}], "stop_reason": "end_turn",
            "usage": {"input_tokens": 1000, "output_tokens": 500}}))
    };
    let routes = Routes::new()
        .route("/v1/chat/completions", post(answer))
        .route("/v1/messages", post(prose))
        .with_state(Arc::clone(&num_calls));
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
    std::fs::write(folder.path().join("config.toml"), &text).unwrap();
    let config = GatewayConfig::parse(&text).unwrap_or_else(|problems| panic!("{problems:?}"));
    let env = |name: &str| match name {
        "UP_KEY" => Some("sk-test".to_owned()),
        "CONTENTS" => Some(CONTENTS.to_owned()),
        _ => None,
    };
    let surroundings = Surroundings { env: &env, node: NodeId::new("test").unwrap(), host: "here" };
    (Gateway::start(config, &surroundings, UnixMillis::now()).await.unwrap(), folder)
}

pub(super) fn asked<'a>(tenant: &'a str, body: &Value, privacy: Option<&'a str>) -> Asked<'a> {
    Asked {
        tenant: Some(tenant),
        credential: configured_credential(),
        grant: None,
        wire: WireRoute::Chat,
        body: body.as_object().unwrap().clone(),
        default_model: "base",
        task: None,
        privacy,
        request_id: "r",
        time_left: None,
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
    let mut exchange = match gateway.begin(asked) {
        Ok(exchange) => exchange,
        Err(turned_away) => return Err(turned_away.told().await),
    };
    if let Err(error) = exchange.ask_about_prompt().await {
        return Err(exchange.give_up(error).await);
    }
    let route = match exchange.route(idle(), now, &local).await {
        Ok(route) => route,
        Err(error) => return Err(exchange.give_up(error).await),
    };
    let Target::Upstream { upstream, model } = &route.targets[0] else { return Ok(json!("local")) };
    let sent = match exchange.send(upstream, model, false, now).await {
        Ok((sent, _warning)) => sent,
        Err(error) => return Err(exchange.give_up(error).await),
    };
    match sent {
        Sent::Whole(answer) => Ok(answer),
        Sent::Stream(mut stream) => {
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

/// The key of the log's contents.
pub(super) const CONTENTS: &str = "ff0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

pub(super) const ACME: &str = "[[tenants]]\nname = \"acme\"\nprivacy = \"any\"\nbudget = { usd_per_day = 0.02 }\n";

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

/// The rows of the ledger: model, requests, and what they cost in nano-dollars.
async fn rows(folder: &tempfile::TempDir) -> Vec<(String, u64, i64)> {
    let query = CostQuery { by: vec![CostColumn::Model], ..CostQuery::default() };
    let report = costs(&store(folder).await, query).await.unwrap();
    report.rows.iter().map(|row| (row.model.clone().unwrap(), row.requests, row.upstream_cost.nanos())).collect()
}

/// A stream that has begun, at the upstream that its model names.
pub(super) async fn begin_stream(gateway: &Gateway, asked: Asked<'_>) -> (Box<UpstreamStream>, Exchange) {
    let name = asked.body["model"].as_str().unwrap().to_owned();
    let (upstream, model) = name.split_once('/').unwrap();
    let now = UnixMillis::now();
    let mut exchange = gateway.begin(asked).unwrap();
    exchange.route(idle(), now, &local).await.unwrap();
    let (Sent::Stream(stream), _) = exchange.send(upstream, model, false, now).await.unwrap() else {
        panic!("a stream was asked for")
    };
    (stream, exchange)
}

pub(super) async fn store(folder: &tempfile::TempDir) -> Store {
    store_at(&format!("sqlite://{}", folder.path().join("b.db").display())).await
}

async fn store_at(url: &str) -> Store {
    let options = StoreOptions {
        url: url.parse().unwrap(),
        durability: Durability::ProcessKill,
        max_bytes: None,
        max_waiting: 16,
        timeout: Duration::from_secs(20),
    };
    Store::open(options).await.unwrap().0
}

#[tokio::test]
async fn a_call_that_failed_and_may_have_cost_something_is_charged_and_paid_twice_at_most() {
    let double = upstream().await;
    let claude = format!(
        "[[upstreams]]\nname = \"claude\"\nkind = \"anthropic\"\nbase_url = \"http://{}\"\napi_key_env = \"UP_KEY\"\n\
         models = [\"claude-sonnet-5\"]\n",
        double.address
    );
    let (gateway, folder) = gateway(&double, &format!("{ACME}{claude}")).await;
    let failed = ask(&gateway, asked("acme", &body("up/gpt-4.1", "broken"), None)).await.unwrap_err();
    assert_eq!((failed.shown().0, double.num_calls.load(Ordering::SeqCst)), (502, 2), "{failed}");
    let (spent, reserved) = standing(&gateway, "acme").await;
    // Nobody counted: what was set aside, which is no less than the answer's limit at 8 dollars a million.
    assert!(spent > 2 * 100 * 8_000 && spent % 2 == 0 && reserved == 0, "{spent} {reserved}");
    let mut object = body("claude/claude-sonnet-5", "hello");
    object["max_tokens"] = json!(900);
    object["response_format"] = json!({"type": "json_object"});
    let failed = ask(&gateway, asked("acme", &object, None)).await.unwrap_err();
    assert_eq!(
        (failed.shown().0, double.num_calls.load(Ordering::SeqCst)),
        (502, 3),
        "the budget has no room for more"
    );
    // 1000 tokens at 2 and 500 at 10 dollars a million.
    assert_eq!(standing(&gateway, "acme").await, (spent + 7_000_000, 0));
    let rows = rows(&folder).await;
    assert_eq!(rows, [("claude/claude-sonnet-5".to_owned(), 1, 7_000_000), ("up/gpt-4.1".to_owned(), 2, spent)]);
}

#[tokio::test]
async fn a_stream_that_is_left_costs_what_came_of_it() {
    let double = upstream().await;
    let (gateway, folder) = gateway(&double, ACME).await;
    let mut streamed = body("up/gpt-4.1", "hello");
    streamed["stream"] = json!(true);
    let (mut stream, mut exchange) = begin_stream(&gateway, asked("acme", &streamed, None)).await;
    assert!(stream.next(&mut exchange).await.unwrap().is_ok());
    let (_, reserved) = standing(&gateway, "acme").await;
    drop((stream, exchange));
    gateway.close().await;
    let (spent, left) = standing(&gateway, "acme").await;
    // 15 bytes of an answer are 5 tokens; the prompt counts by its bound.
    assert!(left == 0 && spent < reserved && spent == reserved - (100 - 5) * 8_000, "{spent} of {reserved}");
    assert_eq!(rows(&folder).await, [("up/gpt-4.1".to_owned(), 1, spent)]);
}

#[tokio::test]
async fn a_call_that_is_left_before_it_has_gone_out_costs_nothing() {
    let double = upstream().await;
    // Takes connections, and says nothing in their TLS handshakes.
    let deaf = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let other = format!(
        "[[upstreams]]\nname = \"deaf\"\nkind = \"openai-compatible\"\nbase_url = \"https://{}\"\napi_key_env = \"UP_KEY\"\n\
         models = [\"gpt-4.1\"]\n",
        deaf.local_addr().unwrap()
    );
    let (gateway, folder) = gateway(&double, &format!("{ACME}{other}")).await;
    let asking = ask(&gateway, asked("acme", &body("deaf/gpt-4.1", "hello"), None));
    tokio::select! {
        _ = asking => panic!("nobody answers"),
        connection = deaf.accept() => drop(connection.unwrap()),
    }
    gateway.close().await;
    assert_eq!(standing(&gateway, "acme").await, (0, 0), "what was set aside is free again");
    assert_eq!(rows(&folder).await, [("deaf/gpt-4.1".to_owned(), 1, 0)]);
}

#[tokio::test]
async fn without_its_store_a_local_answer_does_not_end_well_unless_that_is_configured() {
    let now = UnixMillis::now();
    for (words, is_closed) in [("", true), ("on_failure = \"open\"\n", false)] {
        let folder = tempfile::tempdir().unwrap();
        let text = format!(
            "[store]\nurl = \"sqlite://{}\"\n{words}[[tenants]]\nname = \"acme\"\n",
            folder.path().join("b.db").display()
        );
        let surroundings = Surroundings { env: &|_| None, node: NodeId::new("test").unwrap(), host: "here" };
        let config = GatewayConfig::parse(&text).unwrap();
        let gateway = Gateway::start(config, &surroundings, now).await.unwrap();
        let mut exchange = gateway.begin(asked("acme", &body("base", "hi"), None)).unwrap();
        exchange.route(idle(), now, &local).await.unwrap();
        assert!(exchange.may_run_here().is_ok());
        gateway.close().await;
        let used = LocalUse { num_prompt_tokens: 3, num_completion_tokens: 5, ..LocalUse::default() };
        let settled = exchange.settle_local(used, RequestStatus::Completed, ModelUsed::default(), now).await;
        let next = gateway.begin(asked("acme", &body("base", "hi"), None)).unwrap();
        for done in [settled, next.may_run_here()] {
            assert_eq!(done.as_ref().err().map(|error| error.shown().0), is_closed.then_some(503), "{done:?}");
        }
        assert_eq!(gateway.ledger_counts().unwrap().leftovers, 1, "its row is not given up");
    }
}

/// A new model of a known provider: its wire has no words for these, whatever the model can do.
#[tokio::test]
async fn fields_that_a_wire_cannot_carry_are_refused_or_named_for_models_no_table_knows() {
    let double = upstream().await;
    let rest = format!(
        "[[tenants]]\nname = \"acme\"\nprivacy = \"any\"\n[[upstreams]]\nname = \"claude\"\nkind = \"anthropic\"\nbase_url = \"http://{}\"\n\
         models = [\"claude-99\"]\n[[upstreams]]\nname = \"gemini\"\nkind = \"gemini\"\nbase_url = \"http://{}\"\nmodels = [\"gemini-99\"]\n",
        double.address, double.address
    );
    let (gateway, _folder) = gateway(&double, &rest).await;
    for (model, field, value) in [
        ("claude/claude-99", "n", json!(2)),
        ("claude/claude-99", "logit_bias", json!({"5": 1})),
        ("claude/claude-99", "logprobs", json!(true)),
        ("gemini/gemini-99", "logit_bias", json!({"5": 1})),
    ] {
        let mut request = body(model, "hello");
        request[field] = value;
        let refused = ask(&gateway, asked("acme", &request, None)).await.unwrap_err();
        assert_eq!((refused.shown().0, refused.param().as_deref()), (400, Some(field)), "{model}: {refused}");
    }
    assert_eq!(double.num_calls.load(Ordering::SeqCst), 0);
    let mut hints = body("claude/claude-99", "hello");
    for (field, value) in [("seed", json!(5)), ("presence_penalty", json!(1)), ("reasoning_effort", json!("high"))] {
        hints[field] = value;
    }
    let now = UnixMillis::now();
    let mut exchange = gateway.begin(asked("acme", &hints, None)).unwrap();
    exchange.route(idle(), now, &local).await.unwrap();
    let (_, warning) = exchange.send("claude", "claude-99", false, now).await.unwrap();
    let warning = warning.unwrap_or_default();
    for field in ["seed", "presence_penalty", "reasoning_effort"] {
        assert!(warning.contains(field), "{field} in {warning:?}");
    }
}

#[tokio::test]
async fn whoever_is_over_budget_hears_when_it_is_worth_coming_back() {
    let double = upstream().await;
    // gpt-4.1 costs 2 and 8 dollars a million: 100 tokens out and the prompt's bound are some $0.002.
    let tenant = "[[tenants]]\nname = \"acme\"\nprivacy = \"any\"\nbudget = { usd_per_day = 0.003 }\n";
    let (gateway, _folder) = gateway(&double, tenant).await;
    let now = UnixMillis::now();
    let mut held = gateway.begin(asked("acme", &body("up/gpt-4.1", "hello"), None)).unwrap();
    held.route(idle(), now, &local).await.unwrap();
    let mut streamed = body("up/gpt-4.1", "hello");
    streamed["stream"] = json!(true);
    let (stream, exchange) = begin_stream(&gateway, asked("acme", &streamed, None)).await;
    let second = ask(&gateway, asked("acme", &body("up/gpt-4.1", "hello"), None)).await.unwrap_err();
    assert_eq!((second.shown().0, second.retry_after(now)), (429, Some(Duration::from_secs(5))), "{second}");
    assert!(second.to_string().contains("once calls under way have ended"), "{second}");
    drop((stream, exchange));
    let mut dear = body("up/gpt-4.1", "hello");
    dear["max_tokens"] = json!(30_000);
    let never = ask(&gateway, asked("acme", &dear, None)).await.unwrap_err();
    assert_eq!((never.shown().0, never.retry_after(now)), (429, None), "{never}");
    assert!(never.to_string().contains("more than the whole of it"), "{never}");
}

#[tokio::test]
async fn what_an_answer_may_be_is_what_its_limit_is_charged_with() {
    let double = upstream().await;
    let tenants = "[[tenants]]\nname = \"short\"\nlimits = { tokens_per_minute = 1000 }\nmax_output_tokens = 8\n\
                   [[tenants]]\nname = \"open\"\nlimits = { tokens_per_minute = 1000 }\n";
    let (gateway, _folder) = gateway(&double, tenants).await;
    let unsaid = json!({"model": "base", "messages": [{"role": "user", "content": "hello"}]});
    let left = |exchange: Exchange| -> u64 {
        let headers = exchange.rate_headers();
        headers.iter().find(|(name, _)| *name == "x-ratelimit-remaining-tokens").unwrap().1.parse().unwrap()
    };
    let bound = ledger::max_prompt_tokens(facts::size_of(&unsaid), 0);
    assert_eq!(left(gateway.begin(asked("short", &unsaid, None)).unwrap()), 1000 - bound - 8);
    // What is only assumed keeps nobody out for ever.
    assert_eq!(left(gateway.begin(asked("open", &unsaid, None)).unwrap()), 0);
    let completion = Asked { wire: WireRoute::Completions, ..asked("open", &json!({"prompt": "hello", "n": 2}), None) };
    let bound = ledger::max_prompt_tokens(facts::size_of(&json!({"prompt": "hello", "n": 2})), 0);
    assert_eq!(left(gateway.begin(completion).unwrap()), 1000 - bound - 2 * 16);
}

#[tokio::test]
async fn a_search_s_fee_has_no_place_in_a_budget() {
    let double = upstream().await;
    let (gateway, _folder) = gateway(&double, ACME).await;
    let mut searching = body("up/gpt-4.1", "hello");
    searching["web_search_options"] = json!({});
    let refused = ask(&gateway, asked("acme", &searching, None)).await.unwrap_err();
    assert_eq!((refused.shown().0, refused.param().as_deref()), (400, Some("web_search_options")), "{refused}");
    assert_eq!(double.num_calls.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_stream_is_settled_before_its_last_chunk() {
    let double = upstream().await;
    let (gateway, _folder) = gateway(&double, ACME).await;
    let mut streamed = body("up/gpt-4.1", "hello");
    streamed["stream"] = json!(true);
    let (mut stream, mut exchange) = begin_stream(&gateway, asked("acme", &streamed, None)).await;
    loop {
        let chunk = stream.next(&mut exchange).await.unwrap().unwrap();
        if !chunk["choices"][0]["finish_reason"].is_null() {
            break;
        }
    }
    // A client that stops reading here owes what everybody owes.
    assert_eq!(standing(&gateway, "acme").await, (6_000_000, 0));
}

#[tokio::test]
async fn what_is_hidden_in_a_tool_or_costs_more_by_its_tier_is_in_the_bound() {
    let double = upstream().await;
    let (gateway, _folder) = gateway(&double, ACME).await;
    let mut dear = body("up/gpt-4.1", "hello");
    let long = json!({"type": "string", "description": "x".repeat(20_000)});
    dear["tools"] = json!([{"type": "function", "function": {"name": "f",
        "parameters": {"type": "object", "properties": {"image_url": long}}}}]);
    let refused = ask(&gateway, asked("acme", &dear, None)).await.unwrap_err();
    assert_eq!(refused.shown().2, "budget_exceeded", "{refused}");
    let mut fast = body("up/gpt-4.1", "hello");
    fast["max_tokens"] = json!(1500);
    assert!(ask(&gateway, asked("acme", &fast, None)).await.is_ok());
    // 0.014 dollars are left, and 0.012 of an answer and 0.0012 of a prompt are 0.0132; by the faster service, more.
    fast["service_tier"] = json!("priority");
    let refused = ask(&gateway, asked("acme", &fast, None)).await.unwrap_err();
    assert_eq!(refused.shown().2, "budget_exceeded", "{refused}");
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
    assert_eq!(refused.error.shown().0, 429);
    assert!(refused.error.retry_after(UnixMillis::now()).is_some());
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

/// As an Entra token that somebody renews: what the upstream refuses is read again, and nobody notices.
#[tokio::test]
async fn a_token_that_has_run_out_is_read_again_and_the_call_sent_once_more() {
    let valid = Arc::new(std::sync::Mutex::new("one".to_owned()));
    let num_calls = Arc::new(AtomicUsize::new(0));
    let state = (Arc::clone(&valid), Arc::clone(&num_calls));
    let answer = |State((valid, calls)): State<(Arc<std::sync::Mutex<String>>, Arc<AtomicUsize>)>,
                  headers: axum::http::HeaderMap,
                  body: axum::Json<Value>| async move {
        calls.fetch_add(1, Ordering::SeqCst);
        let given = headers["authorization"].to_str().unwrap();
        if given != format!("Bearer {}", valid.lock().unwrap()) {
            let error = json!({"error": {"message": format!("{given} has run out"), "type": "x"}});
            return (StatusCode::UNAUTHORIZED, axum::Json(error)).into_response();
        }
        if body["stream"] == json!(true) {
            let chunk = json!({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4.1",
                "choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]});
            let events = format!("data: {chunk}\n\ndata: [DONE]\n\n");
            return ([("content-type", "text/event-stream")], events).into_response();
        }
        axum::Json(json!({"id": "c", "object": "chat.completion", "created": 1, "model": "gpt-4.1",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]}))
        .into_response()
    };
    let routes = Routes::new().route("/v1/chat/completions", post(answer)).with_state(state);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() });
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "one\n").unwrap();
    let text = format!(
        "[[upstreams]]\nname = \"up\"\nkind = \"openai-compatible\"\nbase_url = \"http://{address}/v1\"\n\
         token_file = {token:?}\nmodels = [\"gpt-4.1\"]\n[[tenants]]\nname = \"acme\"\nprivacy = \"any\"\n"
    );
    let config = GatewayConfig::parse(&text).unwrap_or_else(|problems| panic!("{problems:?}"));
    let surroundings = Surroundings { env: &|_| None, node: NodeId::new("test").unwrap(), host: "here" };
    let gateway = Gateway::start(config, &surroundings, UnixMillis::now()).await.unwrap();
    let whole = body("up/gpt-4.1", "hello");
    let mut streamed = whole.clone();
    streamed["stream"] = json!(true);
    ask(&gateway, asked("acme", &whole, None)).await.unwrap();
    for (next, request) in [("two", &whole), ("three", &streamed)] {
        next.clone_into(&mut valid.lock().unwrap());
        std::fs::write(&token, format!("{next}\n")).unwrap();
        ask(&gateway, asked("acme", request, None)).await.unwrap();
    }
    let health = &gateway.0.upstreams["up"].health;
    assert_eq!(health.state(), BreakerState::Closed, "what was refused once and then taken is no failure");
    // A file that is gone takes nothing away; a token that it cannot help with is told, without its text.
    std::fs::remove_file(&token).unwrap();
    ask(&gateway, asked("acme", &whole, None)).await.unwrap();
    "four".clone_into(&mut valid.lock().unwrap());
    let before = num_calls.load(Ordering::SeqCst);
    let refused = ask(&gateway, asked("acme", &whole, None)).await.unwrap_err();
    assert_eq!((refused.shown().0, refused.shown().2), (502, "upstream_auth".to_owned()));
    assert!(!refused.to_string().contains("three"), "{refused}");
    assert_eq!(num_calls.load(Ordering::SeqCst), before + 1, "the same token is not tried twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closing_writes_what_was_accepted_and_waits_for_nobody_else() {
    let double = upstream().await;
    let (gateway, folder) = gateway(&double, ACME).await;
    let clone = gateway.clone();
    let requests = (0..100).map(|_| {
        let gateway = gateway.clone();
        tokio::spawn(async move {
            let mut exchange = gateway.begin(asked("acme", &body("base", "x"), None)).unwrap();
            exchange.route(idle(), UnixMillis::now(), &local).await.unwrap();
            let used = LocalUse { num_prompt_tokens: 3, num_completion_tokens: 2, machine_time: Duration::ZERO };
            let settled =
                exchange.settle_local(used, RequestStatus::Completed, ModelUsed::default(), UnixMillis::now());
            settled.await.unwrap();
        })
    });
    for request in requests.collect::<Vec<_>>() {
        request.await.unwrap();
    }
    gateway.close().await;
    // Nothing of the process has the file open for writing: what is there is all there is.
    let url = format!("sqlite://{}?mode=ro", folder.path().join("b.db").display());
    let store = store_at(&url).await;
    let rows = crate::ledger::costs(&store, crate::ledger::CostQuery::default()).await.unwrap().rows;
    assert_eq!(rows.iter().map(|row| row.requests).sum::<u64>(), 100, "{rows:?}");
    clone.close().await;
}

#[test]
fn draws_are_spread() {
    let draws: Vec<f64> = (0..10_000).map(|_| admission::draw()).collect();
    assert!(draws.iter().all(|draw| (0.0..1.0).contains(draw)));
    // Fourteen standard deviations to either side.
    let below = draws.iter().filter(|&&draw| draw < 0.1).count();
    assert!((580..1420).contains(&below), "{below} of 10000 in the first tenth");
}

#[tokio::test]
async fn a_client_does_not_choose_its_arm_by_its_requests_id() {
    let double = upstream().await;
    let rules = "[[routes]]\nmodel = \"ab\"\nrules = [{ to = [{ \"up/gpt-4.1\" = 1, \"local\" = 1 }] }]\n";
    let (gateway, _folder) = gateway(&double, &format!("{ACME}{rules}")).await;
    let mut arms = std::collections::BTreeSet::new();
    // Two of the same in each of a hundred draws: less than once in 2^99.
    for _ in 0..100 {
        let mut exchange = gateway.begin(asked("acme", &body("ab", "hello"), None)).unwrap();
        let route = exchange.route(idle(), UnixMillis::now(), &local).await.unwrap();
        arms.insert(route.targets[0].to_string());
    }
    assert_eq!(arms.len(), 2, "{arms:?}");
}

#[tokio::test]
async fn a_tenant_that_is_not_configured_is_nobody() {
    let double = upstream().await;
    let (gateway, _folder) = gateway(&double, ACME).await;
    for stranger in ["ghost", "default", ""] {
        let refused = gateway.begin(asked(stranger, &body("base", "x"), None)).err().unwrap();
        assert_eq!(
            (refused.error.shown().0, refused.error.shown().2),
            (403, "unknown_tenant".to_owned()),
            "{stranger}"
        );
        assert!(gateway.models(Some(stranger), None, &|_| LocalName::Base).is_empty());
    }
    let nobody = Asked { tenant: None, ..asked("acme", &body("base", "x"), None) };
    assert!(gateway.begin(nobody).is_ok());
}

#[test]
fn a_moment_is_of_the_utc_day_and_week() {
    // 2026-11-28 was a Saturday.
    let at = UnixMillis(1_795_867_500_000);
    assert_eq!(moment(at), Moment { minute_of_day: 12 * 60 + 5, weekday: 5 });
}

/// The bound is set aside while a request is under way, and no longer.
#[tokio::test]
async fn only_what_was_used_counts_under_the_limit_of_tokens() {
    let double = upstream().await;
    let rest = "[[guardrails]]\nname = \"words\"\nkind = \"blocklist\"\naction = \"block\"\nphrases = [\"swordfish\"]\n\
                [[tenants]]\nname = \"acme\"\nprivacy = \"any\"\nguardrails = [\"words\"]\n\
                limits = { tokens_per_minute = 20_000 }\n";
    let (gateway, _folder) = gateway(&double, rest).await;
    let of = |model: &str, text: &str| {
        let mut body = body(model, text);
        body["max_tokens"] = json!(15_000);
        body
    };
    let left = || {
        let exchange = gateway.begin(asked("acme", &json!({"model": "base", "max_tokens": 1}), None)).unwrap();
        let headers = exchange.rate_headers();
        let (_, left) = headers.iter().find(|(name, _)| *name == "x-ratelimit-remaining-tokens").unwrap();
        left.parse::<u64>().unwrap()
    };
    for (model, text) in [("nobody", "hi"), ("base", "say swordfish"), ("up/gpt-4.1", "fail")] {
        ask(&gateway, asked("acme", &of(model, text), None)).await.unwrap_err();
        assert!(left() > 19_000, "{model} {text}: {}", left());
    }
    drop(gateway.begin(asked("acme", &of("base", "hi"), None)).unwrap());
    assert!(left() > 19_000, "{}", left());
    // A client that leaves in the middle of a stream has used what came.
    let mut streamed = of("up/gpt-4.1", "hello");
    streamed["stream"] = json!(true);
    let (mut stream, mut exchange) = begin_stream(&gateway, asked("acme", &streamed, None)).await;
    stream.next(&mut exchange).await.unwrap().unwrap();
    drop((stream, exchange));
    assert!((15_000..19_995).contains(&left()), "{}", left());
}

/// A model that thinks may have thought up to its limit when its client leaves: the provider charges for it, so the tenant does.
#[tokio::test]
async fn a_stream_of_a_thinking_model_that_is_left_is_charged_for_its_thoughts() {
    let double = upstream().await;
    let rest = format!(
        "[[tenants]]\nname = \"acme\"\nprivacy = \"any\"\nbudget = {{ usd_per_day = 10.0 }}\n\
         [[upstreams]]\nname = \"thinks\"\nkind = \"openai\"\nbase_url = \"http://{}/v1\"\napi_key_env = \"UP_KEY\"\nmodels = [\"gpt-5\"]\n",
        double.address
    );
    let (gateway, folder) = gateway(&double, &rest).await;
    for (model, most) in [("up/gpt-4.1", 100), ("thinks/gpt-5", 10_000)] {
        let mut streamed = body(model, "hello");
        streamed["stream"] = json!(true);
        streamed["max_completion_tokens"] = json!(10_000);
        streamed.as_object_mut().unwrap().remove("max_tokens");
        let (mut stream, mut exchange) = begin_stream(&gateway, asked("acme", &streamed, None)).await;
        stream.next(&mut exchange).await.unwrap().unwrap();
        drop((stream, exchange));
        let tokens = async {
            loop {
                let query = CostQuery { by: vec![CostColumn::Model], ..CostQuery::default() };
                let report = costs(&store(&folder).await, query).await.unwrap();
                if let Some(row) = report.rows.iter().find(|row| row.model.as_deref() == Some(model)) {
                    return row.completion_tokens;
                }
                tokio::task::yield_now().await;
            }
        };
        let tokens = tokio::time::timeout(Duration::from_mins(1), tokens).await.unwrap();
        assert!(if most == 100 { tokens <= 100 } else { tokens == most }, "{model}: {tokens}");
    }
}
