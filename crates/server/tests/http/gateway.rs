//! The gateway behind a socket: tenants by stored keys, an upstream that is another server of this very program, fallback,
//! privacy, and what the ledger holds afterwards.

use std::time::Duration;

use bindery_gateway::{
    clock::UnixMillis,
    config::GatewayConfig,
    gateway::{Gateway, Surroundings},
    keys::{NewKey, table},
    ledger::{CostColumn, CostQuery, CostRow, costs},
    money::Money,
    names::{KeyId, NodeId, TenantId},
    store::{Durability, Store, StoreOptions},
};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use crate::support::{MODEL, Server, Setup, check_error, events};

/// A server with a gateway, the server it may send to, and the store that both a test and the gateway have open.
pub(crate) struct House {
    pub(crate) server: Server,
    pub(crate) upstream: Server,
    store: Store,
    _folder: tempfile::TempDir,
}

const TENANTS: &str = "[[tenants]]\nname = \"acme\"\nprivacy = \"any\"\n\
                       [[tenants]]\nname = \"vault\"\nprivacy = \"local-only\"\n\
                       [[tenants]]\nname = \"small\"\nlimits = { requests_per_minute = 1 }\n";

impl House {
    pub(crate) async fn build(rest: &str) -> Self {
        Self::build_with(rest, Setup::new()).await
    }

    pub(crate) async fn build_with(rest: &str, mut setup: Setup) -> Self {
        let upstream = Server::start();
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}", folder.path().join("b.db").display());
        // A port on which nobody listens any more.
        let dead = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let text = format!(
            "[store]\nurl = \"{url}\"\n[local]\ncost_per_hour = 3600.0\n\
             [[upstreams]]\nname = \"up\"\nkind = \"openai-compatible\"\nbase_url = \"http://{}/v1\"\nmodels = [\"{MODEL}\"]\n\
             prices = {{ \"{MODEL}\" = {{ input = 1.0, output = 2.0 }} }}\n\
             [[upstreams]]\nname = \"dead\"\nkind = \"openai-compatible\"\nbase_url = \"http://{dead}/v1\"\nmodels = [\"m\"]\n\
             {TENANTS}{rest}",
            upstream.address
        );
        let config = GatewayConfig::parse(&text).unwrap_or_else(|problems| panic!("{problems:?}"));
        let surroundings = Surroundings { env: &|_| None, node: NodeId::new("test").unwrap() };
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
        Self { server: setup.start(), upstream, store, _folder: folder }
    }

    /// A new key of a tenant, once the server knows it.
    pub(crate) async fn key(&self, tenant: &str) -> String {
        let new = NewKey { tenant: TenantId::new(tenant).unwrap(), name: "test".to_owned(), expires_at: None };
        let key = table::create(&self.store, new, UnixMillis::now()).await.unwrap();
        let text = key.expose().to_owned();
        self.wait_for_status(&text, 200).await;
        text
    }

    async fn wait_for_status(&self, key: &str, status: u16) {
        loop {
            let response = self.server.request(Method::GET, "/v1/models").bearer_auth(key).send().await.unwrap();
            if response.status() == status {
                return;
            }
            tokio::task::yield_now().await;
        }
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
