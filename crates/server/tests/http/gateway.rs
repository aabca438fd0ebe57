//! The gateway behind a socket: tenants by stored keys, an upstream that is another server of this very program, fallback,
//! privacy, and what the ledger holds afterwards.

use std::time::Duration;

use bindery_engine::testing::{FakeModelOptions, gate};
use bindery_gateway::{
    clock::UnixMillis,
    config::GatewayConfig,
    gateway::{Gateway, Surroundings},
    keys::{KeyGrant, NewKey, table},
    ledger::{CostColumn, CostQuery, CostRow, costs},
    limits::RateLimits,
    money::Money,
    names::{KeyId, NodeId, TenantId},
    store::{Durability, Store, StoreOptions},
};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use crate::support::{MODEL, PATIENCE, Server, Setup, check_error, events, wait_for_step};

/// A server with a gateway, the server it may send to, and the store that both a test and the gateway have open.
pub(crate) struct House {
    pub(crate) server: Server,
    pub(crate) upstream: Server,
    store: Store,
    pub(crate) folder: tempfile::TempDir,
}

const TENANTS: &str = "[[tenants]]\nname = \"acme\"\nprivacy = \"any\"\n\
                       [[tenants]]\nname = \"vault\"\nprivacy = \"local-only\"\n\
                       [[tenants]]\nname = \"small\"\nlimits = { requests_per_minute = 1 }\n";

impl House {
    pub(crate) async fn build(rest: &str) -> Self {
        Self::build_with(rest, Setup::new()).await
    }

    pub(crate) async fn build_with(rest: &str, setup: Setup) -> Self {
        Self::of(setup, ("", &format!("{TENANTS}{rest}")), Server::start()).await
    }

    /// With more in its `[store]`.
    pub(crate) async fn with_store(words: &str) -> Self {
        Self::of(Setup::new(), (words, TENANTS), Server::start()).await
    }

    /// Tenants and all else, and who plays the upstream.
    async fn with(rest: &str, upstream: Server) -> Self {
        Self::of(Setup::new(), ("", rest), upstream).await
    }

    /// `FOLDER` in what is written is a folder of its own, with a key for the log.
    async fn of(mut setup: Setup, (store, rest): (&str, &str), upstream: Server) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("key"), "ab".repeat(32)).unwrap();
        let rest = rest.replace("FOLDER", folder.path().to_str().unwrap());
        let url = format!("sqlite://{}", folder.path().join("b.db").display());
        // A port on which nobody listens any more.
        let dead = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let text = format!(
            "[store]\nurl = \"{url}\"\n{store}[local]\ncost_per_hour = 3600.0\n\
             [[upstreams]]\nname = \"up\"\nkind = \"openai-compatible\"\nbase_url = \"http://{}/v1\"\nmodels = [\"{MODEL}\"]\n\
             prices = {{ \"{MODEL}\" = {{ input = 1.0, output = 2.0 }} }}\n\
             [[upstreams]]\nname = \"dead\"\nkind = \"openai-compatible\"\nbase_url = \"http://{dead}/v1\"\nmodels = [\"m\"]\n\
             {rest}",
            upstream.address
        );
        let config = GatewayConfig::parse(&text).unwrap_or_else(|problems| panic!("{problems:?}"));
        let surroundings = Surroundings { env: &|_| None, node: NodeId::new("test").unwrap(), host: "here" };
        let gateway = Gateway::start(config, &surroundings, UnixMillis::now()).await.unwrap();
        let options = StoreOptions {
            url: url.parse().unwrap(),
            durability: Durability::ProcessKill,
            max_bytes: None,
            max_waiting: 16,
            timeout: Duration::from_secs(20),
        };
        let (store, _thread) = Store::open(options).await.unwrap();
        setup.config.gateway = Some(gateway);
        Self { server: setup.start(), upstream, store, folder }
    }

    /// A new key of a tenant, once the server knows it.
    pub(crate) async fn key(&self, tenant: &str) -> String {
        self.key_that_gets(tenant, KeyGrant::default(), 200).await
    }

    async fn granted_key(&self, tenant: &str, grant: KeyGrant) -> String {
        self.key_that_gets(tenant, grant, 200).await
    }

    /// Likewise, where what it opens may be nothing.
    async fn key_that_gets(&self, tenant: &str, grant: KeyGrant, status: u16) -> String {
        let new = NewKey { tenant: TenantId::new(tenant).unwrap(), name: "test".to_owned(), expires_at: None, grant };
        let key = table::create(&self.store, new, UnixMillis::now()).await.unwrap();
        let text = key.expose().to_owned();
        self.wait_for_status(&text, status).await;
        text
    }

    async fn wait_for_status(&self, key: &str, status: u16) {
        let asking = async {
            loop {
                let response = self.server.request(Method::GET, "/v1/models").bearer_auth(key).send().await.unwrap();
                if response.status() == status {
                    return;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| panic!("a key never got {status}"));
    }

    pub(crate) fn chat(&self, key: &str, body: &Value) -> RequestBuilder {
        self.server.request(Method::POST, "/v1/chat/completions").bearer_auth(key).json(body)
    }

    /// By tenant and model.
    pub(crate) async fn rows(&self) -> Vec<CostRow> {
        let query = CostQuery { by: vec![CostColumn::Tenant, CostColumn::Model], ..CostQuery::default() };
        costs(&self.store, query).await.unwrap().rows
    }

    pub(crate) async fn num_upstream_requests(&self) -> f64 {
        let text = self.upstream.get("/metrics").await.text().await.unwrap();
        let of_chats = |line: &&str| line.starts_with("vllm:request_success_total");
        text.lines().filter(of_chats).map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }
}

fn body(model: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4})
}

#[tokio::test]
async fn a_stored_key_opens_the_door_and_a_revoked_one_does_not() {
    let house = House::build("").await;
    let key = house.key("acme").await;
    // A tenant alone closes the door, before its first key is made.
    let without = house.server.post("/v1/chat/completions", &body(MODEL)).await;
    assert_eq!(check_error(without, 401, None, "no key").await.as_deref(), Some("invalid_api_key"));
    let answer = house.chat(&key, &body(MODEL)).send().await.unwrap();
    assert_eq!((answer.status().as_u16(), &answer.headers()["x-bindery-route"]), (200, &"local".parse().unwrap()));
    let id = KeyId::new(key.split('_').nth(1).unwrap()).unwrap();
    table::revoke(&house.store, &id, UnixMillis::now()).await.unwrap();
    house.wait_for_status(&key, 401).await;
}

#[tokio::test]
async fn an_upstream_answers_whole_and_streamed_and_is_paid() {
    let house = House::build("").await;
    let key = house.key("acme").await;
    let here: Value = house.chat(&key, &body(MODEL)).send().await.unwrap().json().await.unwrap();
    let response = house.chat(&key, &body(&format!("up/{MODEL}"))).send().await.unwrap();
    assert_eq!(response.headers()["x-bindery-route"], "upstream:up");
    let there: Value = response.json().await.unwrap();
    // The same model on both sides, and nothing random asked for twice: the texts differ only by their seeds.
    assert_eq!(there["model"], format!("up/{MODEL}"));
    assert_eq!(there["usage"]["completion_tokens"], here["usage"]["completion_tokens"], "{there}");
    assert_eq!(there["usage"]["prompt_tokens"], here["usage"]["prompt_tokens"], "{there}");
    let mut streamed = body(&format!("up/{MODEL}"));
    streamed["stream"] = json!(true);
    let response = house.chat(&key, &streamed).send().await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let (chunks, done) = events(&response.text().await.unwrap());
    assert!(done, "{chunks:?}");
    assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk"), "{chunks:?}");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
    let rows = house.rows().await;
    let [here_row, there_row] = &rows[..] else { panic!("{rows:?}") };
    assert_eq!((here_row.model.as_deref(), there_row.model.as_deref()), (Some(MODEL), Some("up/fake-model")));
    assert_eq!((here_row.requests, here_row.local_requests, here_row.upstream_cost), (1, 1, Money::ZERO));
    assert!(here_row.local_cost > Money::ZERO, "a machine of a dollar a second: {here_row:?}");
    assert_eq!((there_row.requests, there_row.local_requests, there_row.local_cost), (2, 0, Money::ZERO));
    let (prompt, completion) = (there_row.prompt_tokens as i64, there_row.completion_tokens as i64);
    assert_eq!(prompt, 2 * there["usage"]["prompt_tokens"].as_i64().unwrap());
    assert_eq!(there_row.upstream_cost.nanos(), prompt * 1000 + completion * 2000, "at the operator's price");
}

#[tokio::test]
async fn a_dead_upstream_gives_way_to_the_next_place() {
    let routes = "[[routes]]\nmodel = \"auto\"\nrules = [{ to = [\"dead/m\", \"local\"] }]\n\
                  [[routes]]\nmodel = \"hard\"\nrules = [{ when = { reasoning_effort = \"high\" }, to = \"up/fake-model\" }, { to = \"local\" }]\n";
    let house = House::build(routes).await;
    let key = house.key("acme").await;
    let response = house.chat(&key, &body("auto")).send().await.unwrap();
    assert_eq!((response.status().as_u16(), &response.headers()["x-bindery-route"]), (200, &"local".parse().unwrap()));
    let mut hard = body("hard");
    assert_eq!(house.chat(&key, &hard).send().await.unwrap().headers()["x-bindery-route"], "local");
    hard["reasoning_effort"] = json!("high");
    assert_eq!(house.chat(&key, &hard).send().await.unwrap().headers()["x-bindery-route"], "upstream:up");
    // Named outright there is no next place, and the failure is told as ours.
    let failed = house.chat(&key, &body("dead/m")).send().await.unwrap();
    assert!(failed.status().is_server_error(), "{}", failed.status());
}

#[tokio::test]
async fn a_local_only_tenant_sends_nothing_out() {
    let routes = "[[routes]]\nmodel = \"auto\"\nrules = [{ to = [\"up/fake-model\", \"local\"] }]\n";
    let house = House::build(routes).await;
    let (vault, acme) = (house.key("vault").await, house.key("acme").await);
    for (key, header) in [(&vault, None), (&vault, Some("any")), (&acme, Some("local-only"))] {
        for model in ["auto", "up/fake-model", MODEL] {
            let request = house.chat(key, &body(model));
            let request =
                header.map_or(request.try_clone().unwrap(), |class| request.header("x-bindery-privacy", class));
            let response = request.send().await.unwrap();
            let is_local = response.headers().get("x-bindery-route").is_some_and(|route| route == "local");
            assert!(is_local || response.status() == 403, "{model}: {}", response.status());
        }
    }
    assert_eq!(house.num_upstream_requests().await, 0.0);
    house.chat(&acme, &body("auto")).send().await.unwrap();
    assert_eq!(house.num_upstream_requests().await, 1.0, "the count can be other than nothing");
}

#[tokio::test]
async fn limits_are_told_in_openais_headers() {
    let house = House::build("").await;
    let key = house.key("small").await;
    let first = house.chat(&key, &body(MODEL)).send().await.unwrap();
    assert_eq!(
        (first.status().as_u16(), &first.headers()["x-ratelimit-remaining-requests"]),
        (200, &"0".parse().unwrap())
    );
    let second = house.chat(&key, &body(MODEL)).send().await.unwrap();
    assert!(
        second.headers().contains_key("retry-after") && second.headers().contains_key("x-ratelimit-limit-requests")
    );
    assert_eq!(check_error(second, 429, None, "the second in a minute").await.as_deref(), Some("rate_limit_exceeded"));
}

#[tokio::test]
async fn models_elsewhere_are_listed_for_whom_they_are() {
    let house = House::build("[[routes]]\nmodel = \"auto\"\nrules = [{ to = \"local\" }]\n").await;
    let list = async |key: String| {
        let response = house.server.request(Method::GET, "/v1/models").bearer_auth(key).send().await.unwrap();
        let list: Value = response.json().await.unwrap();
        let names =
            |model: &Value| (model["id"].as_str().unwrap().to_owned(), model["owned_by"].as_str().unwrap().to_owned());
        list["data"].as_array().unwrap().iter().map(names).collect::<Vec<_>>()
    };
    let acme = list(house.key("acme").await).await;
    assert_eq!(acme[0].0, MODEL, "the base stands first");
    assert!(acme.contains(&("up/fake-model".to_owned(), "upstream".to_owned())), "{acme:?}");
    assert!(acme.contains(&("auto".to_owned(), "virtual".to_owned())));
    let vault = list(house.key("vault").await).await;
    assert!(vault.iter().all(|(_, owner)| owner != "upstream"), "{vault:?}");
}

#[tokio::test]
async fn local_requests_have_their_row_before_their_last_byte() {
    let house = House::build("").await;
    let key = house.key("acme").await;
    let mut streamed = body(MODEL);
    streamed["stream"] = json!(true);
    let (chunks, done) = events(&house.chat(&key, &streamed).send().await.unwrap().text().await.unwrap());
    assert!(done && !chunks.is_empty());
    let rows = house.rows().await;
    assert_eq!(rows.len(), 1, "{rows:?}");
    let row = &rows[0];
    assert_eq!((row.tenant.as_deref(), row.requests, row.completion_tokens), (Some("acme"), 1, 4), "{row:?}");
    assert!(row.prompt_tokens > 0);
}

/// A key that may do less than its tenant: limits beside the tenant's, names out of the tenant's.
#[tokio::test]
async fn a_key_is_held_to_its_own_limits_and_lists_beside_its_tenants() {
    let house = House::build("[[routes]]\nmodel = \"auto\"\nrules = [{ to = [\"up/fake-model\", \"local\"] }]\n").await;
    let names = |names: &[&str]| Some(names.iter().map(|&name| name.to_owned()).collect());
    let limits = RateLimits { requests_per_minute: Some(1), ..RateLimits::default() };
    let tight = house.granted_key("acme", KeyGrant { limits, ..KeyGrant::default() }).await;
    let loose = house.key("acme").await;
    assert_eq!(house.chat(&tight, &body(MODEL)).send().await.unwrap().headers()["x-ratelimit-limit-requests"], "1");
    let second = house.chat(&tight, &body(MODEL)).send().await.unwrap();
    assert_eq!(check_error(second, 429, None, "requests a minute").await.as_deref(), Some("rate_limit_exceeded"));
    let other = house.chat(&loose, &body(MODEL)).send().await.unwrap();
    assert_eq!(other.status(), 200, "the tenant's other keys go on");
    assert!(!other.headers().contains_key("x-ratelimit-limit-requests"));

    // Of the tenant's limit of one request a minute nothing is left for a second key of its.
    let grant = || KeyGrant { limits: RateLimits { requests_per_minute: Some(100), ..limits }, ..KeyGrant::default() };
    let (first, next) = (house.granted_key("small", grant()).await, house.granted_key("small", grant()).await);
    let told = house.chat(&first, &body(MODEL)).send().await.unwrap();
    assert_eq!(told.headers()["x-ratelimit-limit-requests"], "1", "the tighter one is told");
    assert_eq!(house.chat(&next, &body(MODEL)).send().await.unwrap().status(), 429);

    let virtual_only = house.granted_key("acme", KeyGrant { models: names(&["auto"]), ..KeyGrant::default() }).await;
    let listed: Value = house
        .server
        .request(Method::GET, "/v1/models")
        .bearer_auth(&virtual_only)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let ids: Vec<&str> = listed["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["auto"]);
    // Its rule leads to an upstream's model that the list does not hold, and so to what is local.
    let auto = house.chat(&virtual_only, &body("auto")).send().await.unwrap();
    assert_eq!((auto.status().as_u16(), &auto.headers()["x-bindery-route"]), (200, &"local".parse().unwrap()));
    let unnamed = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1});
    for request in [body(MODEL), body("up/fake-model"), body("nothing"), unnamed] {
        let refused = house.chat(&virtual_only, &request).send().await.unwrap();
        assert_eq!(
            check_error(refused, 404, Some("model"), &request.to_string()).await.as_deref(),
            Some("model_not_found")
        );
    }
    for (path, request) in
        [("/tokenize", json!({"prompt": "a"})), ("/tokenize", json!({"model": MODEL, "prompt": "a"}))]
    {
        let refused = house.server.request(Method::POST, path).bearer_auth(&virtual_only).json(&request).send().await;
        assert_eq!(refused.unwrap().status(), 404, "{path}");
    }
    for (id, status) in [("auto", 200), (MODEL, 404)] {
        let card = house.server.request(Method::GET, &format!("/v1/models/{id}")).bearer_auth(&virtual_only);
        assert_eq!(card.send().await.unwrap().status(), status, "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_request_that_is_left_before_its_answer_has_its_row() {
    let (gate, keeper) = gate();
    let mut setup = Setup::new();
    setup.model.gate = Some(gate);
    let house = House::build_with("", setup).await;
    let key = house.key("acme").await;
    let asking = tokio::spawn(house.chat(&key, &body(MODEL)).send());
    let keeper = wait_for_step(keeper).await;
    asking.abort();
    assert!(asking.await.unwrap_err().is_cancelled());
    let row = async {
        loop {
            if let [row] = &house.rows().await[..] {
                return (row.requests, row.local_requests);
            }
            tokio::task::yield_now().await;
        }
    };
    let row = tokio::time::timeout(PATIENCE, row).await;
    assert_eq!(row.expect("a row for a client that left"), (1, 1));
    drop(keeper);
}
/// What the routes' own parsers pass over in fields that nobody reads, and no JSON value can hold.
#[tokio::test]
async fn no_body_goes_round_the_gateway() {
    let house = House::build("").await;
    let key = house.key("acme").await;
    let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
    for odd in ["1e999", "\"\\ud800\"", &deep] {
        for (path, prompt) in [
            ("chat/completions", "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]"),
            ("completions", "\"prompt\":\"x\""),
        ] {
            let body = format!("{{\"model\":\"{MODEL}\",{prompt},\"max_tokens\":1,\"zz\":{odd}}}");
            let request = house.server.request(Method::POST, &format!("/v1/{path}")).bearer_auth(&key);
            let response = request.header("content-type", "application/json").body(body).send().await.unwrap();
            assert_eq!(check_error(response, 400, None, odd).await, None, "{path} {odd}");
        }
    }
    for (body, message) in [("[1]", "expected an object"), ("", "the body is empty"), ("{", "not valid JSON")] {
        let request = house.server.request(Method::POST, "/v1/chat/completions").bearer_auth(&key);
        let response = request.header("content-type", "application/json").body(body).send().await.unwrap();
        let error: Value = response.json().await.unwrap();
        assert!(error["error"]["message"].as_str().unwrap().contains(message), "{error}");
    }
    assert!(house.rows().await.is_empty());
}

#[tokio::test]
async fn a_key_of_a_tenant_that_is_not_configured_opens_nothing() {
    let house = House::build("").await;
    let key = house.key_that_gets("ghost", KeyGrant::default(), 403).await;
    for model in [MODEL, "up/fake-model"] {
        let response = house.chat(&key, &body(model)).send().await.unwrap();
        assert_eq!(check_error(response, 403, None, model).await.as_deref(), Some("unknown_tenant"));
    }
    let listed = house.server.request(Method::GET, "/v1/models").bearer_auth(&key).send().await.unwrap();
    assert_eq!(check_error(listed, 403, None, "models").await.as_deref(), Some("unknown_tenant"));
    assert_eq!(house.num_upstream_requests().await, 0.0);
    assert!(house.rows().await.is_empty());
}

/// A form or plain text crosses origins without a question, and a server on loopback may ask for no key.
#[tokio::test]
async fn what_a_web_page_can_send_reaches_no_upstream() {
    let house = House::with("", Server::start()).await;
    let send = async |name: &str, value: &str| {
        let request = house.server.request(Method::POST, "/v1/chat/completions").header(name, value);
        let request = if name == "content-type" { request } else { request.header("content-type", "application/json") };
        request.body(body("up/fake-model").to_string()).send().await.unwrap()
    };
    for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"] {
        check_error(send("content-type", kind).await, 400, Some("content-type"), kind).await;
    }
    // A body without a type needs no question either; programs send it, and no page may.
    for (name, value) in [("origin", "https://elsewhere.example"), ("sec-fetch-site", "cross-site")] {
        let request = house.server.request(Method::POST, "/v1/chat/completions").header(name, value);
        let response = request.body(body("up/fake-model").to_string()).send().await.unwrap();
        check_error(response, 400, Some("content-type"), name).await;
    }
    check_error(send("content-encoding", "gzip").await, 415, Some("content-encoding"), "gzip").await;
    check_error(send("x-request-timeout", "soon").await, 400, Some("x-request-timeout"), "soon").await;
    assert_eq!(house.num_upstream_requests().await, 0.0);
    assert_eq!(send("content-type", "application/json; charset=utf-8").await.status(), 200, "JSON is answered");
}

#[tokio::test]
async fn a_requests_own_deadline_ends_its_call_upstream() {
    let (gate, keeper) = gate();
    let mut slow = Setup::new();
    slow.model = FakeModelOptions { gate: Some(gate), ..slow.model };
    let house = House::with(TENANTS, slow.start()).await;
    let key = house.key("acme").await;
    // No step passes.
    let mut request = body("up/fake-model");
    let response = house.chat(&key, &request).header("x-request-timeout", "100ms").send().await.unwrap();
    assert_eq!(response.headers()["x-bindery-route"], "upstream:up");
    assert_eq!(check_error(response, 408, None, "no step").await.as_deref(), Some("request_timeout"));
    // A stream begins before its first token. Long enough for that, on any machine: else it would be a 408 as well.
    request["stream"] = json!(true);
    let response = house.chat(&key, &request).header("x-request-timeout", "3s").send().await.unwrap();
    assert_eq!(response.status(), 200);
    let (chunks, done) = events(&response.text().await.unwrap());
    assert!(!done && chunks.last().unwrap()["error"]["code"] == "request_timeout", "{chunks:?}");
    drop(keeper);
}

#[tokio::test]
async fn the_tightest_privacy_header_counts_and_an_unreadable_one_is_refused() {
    let house = House::build("").await;
    let key = house.key("acme").await;
    let ask = |classes: &[&[u8]]| {
        let mut request = house.chat(&key, &body("up/fake-model"));
        for class in classes {
            request = request.header("x-bindery-privacy", reqwest::header::HeaderValue::from_bytes(class).unwrap());
        }
        request.send()
    };
    for classes in [&[&b"any"[..], b"local-only"][..], &[b"local-only", b"any"], &[b"any, local-only"]] {
        check_error(ask(classes).await.unwrap(), 403, Some("model"), "one of them is local-only").await;
    }
    for classes in [&[&b"local-\xe9nly"[..]][..], &[b"any", b"\xff"], &[b"any,"], &[b"any", b"secret"]] {
        check_error(ask(classes).await.unwrap(), 400, Some("x-bindery-privacy"), "no class").await;
    }
    assert_eq!(house.num_upstream_requests().await, 0.0);
    assert_eq!(ask(&[b"any", b"local-first"]).await.unwrap().status(), 200);
}

/// Only what a request's own overflow sends up draws on the overflow's budget.
#[tokio::test]
async fn a_chain_that_begins_upstream_is_no_overflow() {
    let rest = "[[tenants]]\nname = \"over\"\nprivacy = \"any\"\n\
                overflow = { when_ttft_over = \"1h\", to = \"up/fake-model\", usd_per_day = 0.0 }\n\
                [[routes]]\nmodel = \"auto\"\nrules = [{ to = [\"up/fake-model\", \"local\"] }]\n";
    let house = House::build(rest).await;
    let key = house.key("over").await;
    let response = house.chat(&key, &body("auto")).send().await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["x-bindery-route"]),
        (200, &"upstream:up".parse().unwrap())
    );
}

/// Tokens are estimated before the local model counts them: where it finds a prompt too long, the next place has it, and the
/// client hears how its limits stand whatever becomes of it.
#[tokio::test]
async fn a_prompt_too_long_for_this_machine_goes_on_and_refusals_tell_limits() {
    let rest = "[[routes]]\nmodel = \"auto\"\nrules = [{ to = [\"local\", \"up/fake-model\"] }]\n";
    let mut setup = Setup::new();
    setup.engine.max_model_len = 64;
    let house = House::build_with(rest, setup).await;
    let acme = house.key("acme").await;
    let long = |model: &str| json!({"model": model, "messages": [{"role": "user", "content": "a b c d ".repeat(40)}], "max_tokens": 1});
    let here = house.chat(&acme, &long(MODEL)).send().await.unwrap();
    check_error(here, 400, Some("messages"), "maximum context length").await;
    let there = house.chat(&acme, &long("auto")).send().await.unwrap();
    assert_eq!((there.status().as_u16(), &there.headers()["x-bindery-route"]), (200, &"upstream:up".parse().unwrap()));
    let small = house.key_that_gets("small", KeyGrant::default(), 200).await;
    let refused = house.chat(&small, &body("nothing")).send().await.unwrap();
    assert_eq!(
        (refused.status().as_u16(), &refused.headers()["x-ratelimit-limit-requests"]),
        (404, &"1".parse().unwrap())
    );
}

#[tokio::test]
async fn a_tenants_longest_answer_holds_for_local_ones_that_name_no_limit() {
    let rest = "[[tenants]]\nname = \"brief\"\nmax_output_tokens = 3\n";
    let house = House::build(rest).await;
    let key = house.key("brief").await;
    let num_tokens = async |request: RequestBuilder| {
        let answer: Value = request.send().await.unwrap().json().await.unwrap();
        answer["usage"]["completion_tokens"].as_u64().unwrap_or_else(|| panic!("{answer}"))
    };
    let unsaid = json!({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]});
    assert_eq!(num_tokens(house.chat(&key, &unsaid)).await, 3);
    let said = json!({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5});
    assert_eq!(num_tokens(house.chat(&key, &said)).await, 5);
    let completion =
        house.server.request(Method::POST, "/v1/completions").bearer_auth(&key).json(&json!({"prompt": "hi"}));
    assert_eq!(num_tokens(completion).await, 3);
}

/// A hybrid that loads its weights for a minute serves what runs elsewhere meanwhile, and overflows to it.
#[tokio::test]
async fn what_runs_elsewhere_is_served_before_the_model_is_loaded() {
    let rest = "[[tenants]]\nname = \"over\"\nprivacy = \"any\"\noverflow = { when_ttft_over = \"1h\", to = \"up/fake-model\" }\n\
                [[routes]]\nmodel = \"auto\"\nrules = [{ to = [\"local\", \"up/fake-model\"] }]\n";
    let house = House::build_with(rest, Setup { starts_loaded: false, ..Setup::new() }).await;
    let [acme, over, vault] =
        ["acme", "over", "vault"].map(|tenant| house.key_that_gets(tenant, KeyGrant::default(), 503));
    let (acme, over, vault) = (acme.await, over.await, vault.await);
    for (key, model) in [(&acme, "up/fake-model"), (&acme, "auto"), (&over, MODEL)] {
        let response = house.chat(key, &body(model)).send().await.unwrap();
        assert_eq!(response.status(), 200, "{model}");
        assert_eq!(response.headers()["x-bindery-route"], "upstream:up", "{model}");
    }
    // What has nowhere else to go hears that it may come back: the name may be an adapter's.
    for (key, model) in [(&acme, MODEL), (&vault, MODEL), (&vault, "auto"), (&acme, "an-adapter")] {
        let refused = house.chat(key, &body(model)).send().await.unwrap();
        assert!(refused.headers().contains_key("retry-after"), "{model}");
        assert_eq!(check_error(refused, 503, None, "still loading").await.as_deref(), Some("model_loading"), "{model}");
    }
    assert_eq!(house.num_upstream_requests().await, 3.0);
    house.server.slot.set(house.server.model.clone());
    let response = house.chat(&over, &body(MODEL)).send().await.unwrap();
    assert_eq!(response.headers()["x-bindery-route"], "local");
    check_error(house.chat(&acme, &body("an-adapter")).send().await.unwrap(), 404, Some("model"), "an-adapter").await;
}

#[tokio::test]
async fn a_route_is_told_only_where_something_ran() {
    let house = House::build("").await;
    let key = house.key("acme").await;
    let route = |response: &reqwest::Response| {
        response.headers().get("x-bindery-route").map(|route| route.to_str().unwrap().to_owned())
    };
    let failed = house.chat(&key, &body("dead/m")).send().await.unwrap();
    assert_eq!(route(&failed).as_deref(), Some("upstream:dead"), "{}", failed.status());
    assert_eq!(route(&house.chat(&key, &body("nothing")).send().await.unwrap()), None);
    assert_eq!(route(&house.chat(&key, &json!({"model": MODEL})).send().await.unwrap()), None);
    assert_eq!(route(&house.chat("wrong", &body(MODEL)).send().await.unwrap()), None);
    let local_only = house.chat(&key, &body("up/fake-model")).header("x-bindery-privacy", "local-only");
    assert_eq!(route(&local_only.send().await.unwrap()), None);
    assert_eq!(route(&house.chat(&key, &body(MODEL)).send().await.unwrap()).as_deref(), Some("local"));
}

#[tokio::test]
async fn each_listed_model_can_be_got_by_its_name() {
    let rest = "[[upstreams]]\nname = \"oa\"\nkind = \"openai-compatible\"\nbase_url = \"http://127.0.0.1:9/v1\"\nmodels = [\"gpt-4o\"]\n\
                [[routes]]\nmodel = \"auto\"\nrules = [{ to = \"local\" }]\n";
    let house = House::build(rest).await;
    let (acme, vault) = (house.key("acme").await, house.key("vault").await);
    let get =
        async |key: &str, path: String| house.server.request(Method::GET, &path).bearer_auth(key).send().await.unwrap();
    let list: Value = get(&acme, "/v1/models".to_owned()).await.json().await.unwrap();
    let context = |name: &str| {
        let models = list["data"].as_array().unwrap();
        models.iter().find(|model| model["id"] == name).unwrap()["max_model_len"].as_u64()
    };
    for listed in list["data"].as_array().unwrap() {
        let got = get(&acme, format!("/v1/models/{}", listed["id"].as_str().unwrap())).await;
        assert_eq!(got.status(), 200, "{listed}");
        assert_eq!(got.json::<Value>().await.unwrap(), *listed);
    }
    assert_eq!(context(MODEL), Some(house.server.model.max_model_len as u64));
    assert_eq!(context("oa/gpt-4o"), Some(128_000), "by the table");
    assert_eq!((context("up/fake-model"), context("auto")), (None, None), "nobody knows");
    check_error(get(&vault, "/v1/models/up/fake-model".to_owned()).await, 404, Some("model"), "not for it").await;
    assert_eq!(get(&vault, "/v1/models/auto".to_owned()).await.status(), 200);
}

#[tokio::test]
async fn the_ledger_calls_local_models_by_their_own_names() {
    let house = House::build("[[routes]]\nmodel = \"auto\"\nrules = [{ to = \"local\" }]\n").await;
    let key = house.key("acme").await;
    for model in ["auto", "org/alias", MODEL] {
        assert_eq!(house.chat(&key, &body(model)).send().await.unwrap().status(), 200, "{model}");
    }
    let rows = house.rows().await;
    let [row] = &rows[..] else { panic!("{rows:?}") };
    assert_eq!((row.model.as_deref(), row.requests), (Some(MODEL), 3));
}

#[tokio::test]
async fn an_issuer_that_fails_is_not_described_to_strangers() {
    let dead = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let issuer = format!(
        "[[identity]]\nissuer = \"https://id.example\"\naudience = \"b\"\njwks_url = \"http://{dead}/set.json\"\ntenant = \"acme\"\n"
    );
    let house = House::build(&issuer).await;
    // {"alg":"RS256","kid":"a"}.{"iss":"https://id.example"}, signed by nobody.
    let token = "eyJhbGciOiJSUzI1NiIsImtpZCI6ImEifQ.eyJpc3MiOiJodHRwczovL2lkLmV4YW1wbGUifQ.c2lnbmF0dXJl";
    let response = house.chat(token, &body(MODEL)).send().await.unwrap();
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    let text = response.text().await.unwrap();
    assert!(text.contains("keys_unavailable"), "{text}");
    for private in ["127.0.0.1", "set.json", "id.example", "connect", "error sending"] {
        assert!(!text.contains(private), "{private}: {text}");
    }
}

/// Every series is there from the start; afterwards each tells of its own tenant and place alone.
#[tokio::test]
async fn requests_tokens_and_cost_are_counted_by_tenant_and_place() {
    let house = House::build(
        "[[guardrails]]\nname = \"words\"\nkind = \"blocklist\"\naction = \"block\"\nphrases = [\"swordfish\"]\n\
         [[tenants]]\nname = \"strict\"\nprivacy = \"any\"\nguardrails = [\"words\"]\n",
    )
    .await;
    let (acme, strict) = (house.key("acme").await, house.key("strict").await);
    let metrics = async || house.server.get("/metrics").await.text().await.unwrap();
    let at_start = metrics().await;
    for series in [
        "bindery_requests_total{outcome=\"completed\",place=\"up\",tenant=\"vault\"} 0",
        "bindery_tenant_tokens_total{kind=\"reasoning\",place=\"dead\",tenant=\"acme\"} 0",
        "bindery_cost_dollars_total{place=\"local\",tenant=\"default\"} 0",
        "bindery_upstream_calls_total{outcome=\"failed\",upstream=\"dead\"} 0",
        "bindery_guardrail_verdicts_total{action=\"block\",guardrail=\"words\",side=\"prompt\"} 0",
        "bindery_upstream_state{upstream=\"up\",state=\"closed\"} 1",
        "bindery_ledger_unsettled_total 0",
    ] {
        assert!(at_start.lines().any(|line| line == series), "{series} in {at_start}");
    }

    let answer: Value = house.chat(&acme, &body("up/fake-model")).send().await.unwrap().json().await.unwrap();
    let usage = |kind: &str| answer["usage"][kind].as_u64().unwrap();
    let mut streamed = body(MODEL);
    streamed["stream"] = json!(true);
    let stream = house.chat(&acme, &streamed).send().await.unwrap().text().await.unwrap();
    assert!(events(&stream).1);
    assert_eq!(house.chat(&acme, &body("dead/m")).send().await.unwrap().status(), 502);
    let mut bad = body(MODEL);
    bad["messages"][0]["content"] = json!("say swordfish");
    assert_eq!(house.chat(&strict, &bad).send().await.unwrap().status(), 400);
    assert_eq!(house.chat(&strict, &body("nothing")).send().await.unwrap().status(), 404);

    let text = metrics().await;
    let value = |series: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{series} in {text}")).parse::<f64>().unwrap()
    };
    let requests = |tenant: &str, place: &str, outcome: &str| {
        value(&format!("bindery_requests_total{{outcome=\"{outcome}\",place=\"{place}\",tenant=\"{tenant}\"}}"))
    };
    let tokens =
        |kind: &str| value(&format!("bindery_tenant_tokens_total{{kind=\"{kind}\",place=\"up\",tenant=\"acme\"}}"));
    assert_eq!((requests("acme", "up", "completed"), requests("acme", "local", "completed")), (1.0, 1.0));
    assert_eq!((requests("acme", "dead", "failed"), requests("strict", "none", "refused")), (1.0, 2.0));
    assert_eq!(tokens("prompt"), usage("prompt_tokens") as f64);
    assert_eq!(tokens("completion"), usage("completion_tokens") as f64);
    // One dollar a million of the prompt, two of the answer.
    let cost = value("bindery_cost_dollars_total{place=\"up\",tenant=\"acme\"}");
    let expected = (usage("prompt_tokens") + 2 * usage("completion_tokens")) as f64 / 1e6;
    assert!((cost - expected).abs() < 1e-12, "{cost} {expected}");
    assert_eq!(value("bindery_upstream_calls_total{outcome=\"completed\",upstream=\"up\"}"), 1.0);
    assert_eq!(value("bindery_upstream_calls_total{outcome=\"failed\",upstream=\"dead\"}"), 1.0);
    assert_eq!(value("bindery_upstream_call_seconds_count{upstream=\"up\"}"), 1.0);
    assert_eq!(value("bindery_guardrail_verdicts_total{action=\"block\",guardrail=\"words\",side=\"prompt\"}"), 1.0);
    assert_eq!(value("bindery_requests_total{outcome=\"refused\",place=\"none\",tenant=\"acme\"}"), 0.0);
}

#[tokio::test]
async fn tenants_numbers_are_told_to_the_admin_key_alone_where_there_is_one() {
    let mut setup = Setup::new();
    setup.config.admin_key = Some("boss".to_owned());
    let house = House::build_with("", setup).await;
    let metrics = async |key: Option<&str>| {
        let request = house.server.request(Method::GET, "/metrics");
        let request = key.into_iter().fold(request, RequestBuilder::bearer_auth);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        response.text().await.unwrap()
    };
    let key = house.key("acme").await;
    for key in [None, Some(key.as_str()), Some("wrong")] {
        let text = metrics(key).await;
        assert!(text.contains("vllm:num_requests_running") && !text.contains("acme"), "{text}");
    }
    assert!(metrics(Some("boss")).await.contains("tenant=\"acme\""));
}

/// A request for such a name could not mean both.
#[tokio::test]
async fn no_adapter_takes_the_name_of_a_virtual_model_or_an_upstreams() {
    let mut setup = Setup::new();
    setup.config.admin_key = Some("boss".to_owned());
    let house = House::build_with("[[routes]]\nmodel = \"smart\"\nrules = [{ to = \"local\" }]\n", setup).await;
    for (name, refused) in [("smart", true), ("up/fake-model", true), ("up/other", false)] {
        let body = json!({"lora_name": name, "lora_path": "nowhere"});
        let request = house.server.request(Method::POST, "/v1/load_lora_adapter").bearer_auth("boss").json(&body);
        let answer: Value = request.send().await.unwrap().json().await.unwrap();
        let param = if refused { "lora_name" } else { "lora_path" };
        assert_eq!(answer["error"]["param"], param, "{name}: {answer}");
    }
}
