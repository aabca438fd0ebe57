//! Tenants on a busy machine: who floods it waits behind who does not, and nobody goes ahead by its own word.

use std::sync::{Arc, Mutex};

use bindery_engine::testing::gate;
use bindery_gateway::{
    clock::UnixMillis,
    config::GatewayConfig,
    gateway::{Gateway, Surroundings},
    names::NodeId,
};
use bindery_server::Tenant;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{MODEL, Setup, check_error, wait_for_step};

const TENANTS: [&str; 2] = ["crowd", "lone"];

async fn gateway() -> Gateway {
    let text = "[[tenants]]\nname = \"crowd\"\n[[tenants]]\nname = \"lone\"\nweight = 2\n";
    let config = GatewayConfig::parse(text).unwrap_or_else(|problems| panic!("{problems:?}"));
    let surroundings = Surroundings { env: &|_| None, node: NodeId::new("test").unwrap(), host: "here" };
    Gateway::start(config, &surroundings, UnixMillis::now()).await.unwrap()
}

async fn setup() -> Setup {
    let mut setup = Setup::new();
    setup.config.tenants = TENANTS.map(|name| Tenant { name: name.to_owned(), api_keys: vec![name.to_owned()] }).into();
    setup.config.gateway = Some(gateway().await);
    setup
}

fn body(priority: i64) -> Value {
    json!({"model": MODEL, "prompt": [1, 2, 3, 4], "max_tokens": 500, "priority": priority})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_floods_the_queue_waits_behind_one_that_does_not() {
    let (gate, keeper) = gate();
    let mut setup = setup().await;
    setup.engine.max_num_seqs = 1;
    setup.model.gate = Some(gate);
    let server = Arc::new(setup.start());
    let order = Arc::new(Mutex::new(Vec::new()));
    let ask = |tenant: &'static str| {
        let (server, order) = (Arc::clone(&server), Arc::clone(&order));
        tokio::spawn(async move {
            let request = server.request(Method::POST, "/v1/completions").bearer_auth(tenant).json(&body(0));
            assert_eq!(request.send().await.unwrap().status(), 200);
            order.lock().unwrap().push(tenant);
        })
    };
    // Step by step, until all have come: the first of the crowd is long enough for that, and those after it for whoever notes when
    // one has ended.
    let mut keeper = keeper;
    let mut tasks = Vec::new();
    for (tenant, count) in [("crowd", 5), ("lone", 1)] {
        tasks.extend((0..count).map(|_| ask(tenant)));
        let have_come = || server.stats().num_requests_running + server.stats().num_requests_waiting == tasks.len();
        while !have_come() {
            keeper = wait_for_step(keeper).await;
            keeper.let_go();
        }
    }
    drop(keeper);
    for task in tasks {
        task.await.unwrap();
    }
    let order = order.lock().unwrap().clone();
    let at = order.iter().position(|&tenant| tenant == "lone").unwrap();
    assert!(at <= 2, "the one request of the other came as number {at}: {order:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_may_go_later_but_not_ahead_of_others() {
    let server = setup().await.start();
    let send = async |priority: i64| {
        let request = server.request(Method::POST, "/v1/completions").bearer_auth("lone").json(&body(priority));
        request.send().await.unwrap()
    };
    assert_eq!(send(5).await.status(), 200);
    check_error(send(-1).await, 400, Some("priority"), "priority is -1").await;
}
