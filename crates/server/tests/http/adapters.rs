//! Adapters over HTTP: loading, replacing and unloading them, who may see and change them, and requests that name them.
//!
//! The double's adapter is a number in a file, which goes before the histories of its rows; so tokens tell which version
//! computed them.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use bindery_engine::{
    adapters::{AdapterRoots, AdapterSource, AdapterSpec, AdapterState, AdapterStatus},
    testing::{FakeReader, GateKeeper, expected_logits, gate},
};
use bindery_server::Tenant;
use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::support::{MODEL, PATIENCE, Server, Setup, check_error, events, wait_for_step, wait_until};

const COMPLETIONS: &str = "/v1/completions";
const LOAD: &str = "/v1/load_lora_adapter";
const UNLOAD: &str = "/v1/unload_lora_adapter";
const BOSS: &str = "boss";
/// Never the end token.
const EOS_BIAS: f32 = -1000.0;
const PROMPT: [u32; 3] = [104, 105, 33];

/// A folder of adapters that may be loaded, and a folder beside it.
struct Files {
    temp: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let files = Self { temp: tempfile::tempdir().unwrap() };
        fs::create_dir(files.root()).unwrap();
        files
    }

    fn root(&self) -> PathBuf {
        self.temp.path().canonicalize().unwrap().join("root")
    }

    /// An adapter in the root whose weights are this text.
    fn write(&self, name: &str, weights: &str) -> PathBuf {
        write(&self.root().join(name), weights)
    }
}

fn write(folder: &Path, weights: &str) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("adapter_config.json"), "{}").unwrap();
    fs::write(folder.join("adapter_model.safetensors"), weights).unwrap();
    folder.to_owned()
}

/// With an admin key, and the root open to loading.
fn setup(files: &Files) -> Setup {
    let mut setup = Setup::new();
    setup.config.admin_key = Some(BOSS.into());
    setup.config.adapter_roots = AdapterRoots::new(&[files.root()]).0;
    setup.model.eos_bias = EOS_BIAS;
    setup.has_template = false;
    setup
}

fn with_tenants(mut setup: Setup) -> Setup {
    let tenant = |name: &str| Tenant { name: name.into(), api_keys: vec![format!("key-of-{name}")] };
    setup.config.tenants = vec![tenant("a"), tenant("b")];
    setup.config.api_keys = vec!["key-of-all".into()];
    setup
}

impl Server {
    async fn admin(&self, path: &str, body: &Value) -> Response {
        self.request(Method::POST, path).bearer_auth(BOSS).json(body).send().await.unwrap()
    }

    async fn load(&self, name: &str, path: &str) -> Value {
        let response = self.admin(LOAD, &json!({"lora_name": name, "lora_path": path})).await;
        assert_eq!(response.status(), 200, "{name} from {path}");
        response.json().await.unwrap()
    }

    async fn adapters(&self) -> Vec<Value> {
        let response = self.request(Method::GET, "/v1/adapters").bearer_auth(BOSS).send().await.unwrap();
        let list: Value = response.json().await.unwrap();
        list["data"].as_array().unwrap().clone()
    }

    /// Greedy tokens of an answer that must be a success.
    async fn tokens(&self, model: &str, num_tokens: usize) -> Vec<u32> {
        tokens_of(&self.ok(COMPLETIONS, &request(model, num_tokens)).await)
    }

    fn register(&self, name: &str, path: PathBuf) {
        let source = AdapterSource::Path(path);
        let spec = AdapterSpec { name: name.into(), source, tenants: None, pinned: false };
        self.model.adapters.register(spec).unwrap();
    }

    fn status(&self, name: &str) -> AdapterStatus {
        self.model.adapters.list().into_iter().find(|status| status.name == name).unwrap()
    }

    fn in_use(&self) -> (Vec<String>, Vec<String>) {
        let in_use = self.model.adapters.in_use();
        (in_use.running, in_use.waiting)
    }

    /// The labels of `vllm:lora_requests_info`.
    async fn lora_info(&self) -> String {
        let text = self.get("/metrics").await.text().await.unwrap();
        let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("vllm:lora_requests_info{")).collect();
        let [line] = lines[..] else { panic!("one line of it: {lines:?}") };
        let (labels, seconds) = line.trim_start_matches("vllm:lora_requests_info").rsplit_once(' ').unwrap();
        assert!(seconds.parse::<f64>().unwrap() > 1.7e9, "{line}");
        labels.to_owned()
    }
}

fn request(model: &str, num_tokens: usize) -> Value {
    json!({
        "model": model, "prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0, "logprobs": 1,
        "return_tokens_as_token_ids": true,
    })
}

fn tokens_of(answer: &Value) -> Vec<u32> {
    let tokens = answer["choices"][0]["logprobs"]["tokens"].as_array().unwrap_or_else(|| panic!("{answer}"));
    tokens.iter().map(|token| token.as_str().unwrap().strip_prefix("token_id:").unwrap().parse().unwrap()).collect()
}

/// What the double says to the prompt through the adapter with this tag.
fn expected(tag: Option<u32>, num_tokens: usize) -> Vec<u32> {
    let mut history: Vec<u32> = tag.into_iter().chain(PROMPT).collect();
    let known = history.len();
    let mut logits = [0.0; bindery_engine::testing::VOCAB_SIZE];
    for _ in 0..num_tokens {
        expected_logits(&history, EOS_BIAS, &mut logits);
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        history.push(best as u32);
    }
    history.split_off(known)
}

/// A stream of a request that runs in a task of its own.
fn streaming(server: &Server, model: &str, num_tokens: usize) -> tokio::task::JoinHandle<Vec<u32>> {
    let mut body = request(model, num_tokens);
    body["stream"] = json!(true);
    let request = server.request(Method::POST, COMPLETIONS).json(&body);
    tokio::spawn(async move {
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        let (events, done) = events(&response.text().await.unwrap());
        assert!(done, "{events:?}");
        events.iter().filter(|event| event["choices"][0]["logprobs"].is_object()).flat_map(tokens_of).collect()
    })
}

async fn finished<T>(task: tokio::task::JoinHandle<T>) -> T {
    tokio::time::timeout(PATIENCE, task).await.expect("it ends").unwrap()
}

/// Lets so many steps pass; another one stands at the gate then.
async fn let_pass(mut keeper: GateKeeper, num_steps: usize) -> GateKeeper {
    for _ in 0..num_steps {
        keeper = wait_for_step(keeper).await;
        keeper.let_go();
    }
    wait_for_step(keeper).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_is_loaded_listed_used_replaced_and_unloaded() {
    let files = Files::new();
    let path = files.write("fr", "7");
    let server = setup(&files).start();
    let base = expected(None, 8);
    assert_eq!(server.tokens(MODEL, 8).await, base);
    let answer = server.load("french", "fr").await;
    assert_eq!(answer["message"], "Success: LoRA adapter 'french' added successfully.");

    let models: Value = server.get("/v1/models").await.json().await.unwrap();
    let [first, _, adapter] = &models["data"].as_array().unwrap()[..] else { panic!("{models}") };
    assert_eq!((&first["id"], &first["parent"]), (&json!(MODEL), &Value::Null));
    assert_eq!((&adapter["id"], &adapter["parent"]), (&json!("french"), &json!(MODEL)));
    assert_eq!(adapter["root"], path.to_str().unwrap());
    assert!(adapter["digest"].as_str().unwrap().starts_with("sha256:"), "{adapter}");
    let one: Value = server.get("/v1/models/french").await.json().await.unwrap();
    assert_eq!(&one, adapter);

    assert_ne!(expected(Some(7), 8), base);
    assert_eq!(server.tokens("french", 8).await, expected(Some(7), 8));
    assert_eq!(server.tokens(MODEL, 8).await, base, "the base is the base");
    assert_eq!(server.ok(COMPLETIONS, &request("french", 1)).await["model"], "french");
    let [listed] = &server.adapters().await[..] else { panic!("one adapter") };
    assert_eq!((&listed["version"], &listed["state"], &listed["users"]), (&json!(1), &json!("resident"), &json!(0)));

    // A name that is taken stays as it is, unless it is to be replaced.
    files.write("fr-2", "8");
    let again = json!({"lora_name": "french", "lora_path": "fr-2"});
    check_error(server.admin(LOAD, &again).await, 400, Some("lora_name"), "the name is taken").await;
    assert_eq!(server.tokens("french", 8).await, expected(Some(7), 8));
    let inplace = json!({"lora_name": "french", "lora_path": "fr-2", "load_inplace": true});
    assert_eq!(server.admin(LOAD, &inplace).await.status(), 200);
    assert_eq!(server.tokens("french", 8).await, expected(Some(8), 8));
    assert_eq!(server.adapters().await[0]["version"], 2);

    assert_eq!(server.admin(UNLOAD, &json!({"lora_name": "french"})).await.status(), 200);
    check_error(server.post(COMPLETIONS, &request("french", 1)).await, 404, Some("model"), "it is gone").await;
    check_error(server.admin(UNLOAD, &json!({"lora_name": "french"})).await, 404, None, "it is gone").await;
    assert_eq!(server.adapters().await, Vec::<Value>::new());
    server.load("french", "fr").await;
    assert_eq!(server.tokens("french", 8).await, expected(Some(7), 8), "nothing of the other version is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_of_one_batch_and_all_samples_keep_apart() {
    let files = Files::new();
    let (gate, keeper) = gate();
    let mut setup = setup(&files);
    let batches = Arc::new(Mutex::new(Vec::new()));
    (setup.model.gate, setup.model.batches) = (Some(gate), Some(Arc::clone(&batches)));
    let server = setup.start();
    for tag in 1..=4 {
        files.write(&tag.to_string(), &tag.to_string());
        server.load(&format!("adapter-{tag}"), &tag.to_string()).await;
    }
    let of_base = streaming(&server, MODEL, 100);
    let of_adapters: Vec<_> = (1..=4).map(|tag| streaming(&server, &format!("adapter-{tag}"), 100)).collect();
    // Step by step, until all five are in one batch; then they run to their ends.
    let mut keeper = wait_for_step(keeper).await;
    while batches.lock().unwrap().last().is_none_or(|batch| batch.sequences.len() < 5) {
        keeper.let_go();
        keeper = wait_for_step(keeper).await;
    }
    drop(keeper);
    assert_eq!(finished(of_base).await, expected(None, 100));
    for (tag, task) in (1..=4).zip(of_adapters) {
        assert_eq!(finished(task).await, expected(Some(tag), 100), "adapter {tag}");
    }
    let mut several = request("adapter-3", 6);
    several["n"] = json!(2);
    let answer = server.ok(COMPLETIONS, &several).await;
    for choice in answer["choices"].as_array().unwrap() {
        assert_eq!(tokens_of(&json!({"choices": [choice]})), expected(Some(3), 6));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_tenant_may_not_see_does_not_exist_for_it() {
    let files = Files::new();
    files.write("secret", "7");
    let server = with_tenants(setup(&files)).start();
    let load = json!({"lora_name": "secret", "lora_path": "secret", "tenants": ["a"]});
    assert_eq!(server.admin(LOAD, &load).await.status(), 200);
    let asked =
        |who: &str, method: Method, path: &str| server.request(method, path).bearer_auth(format!("key-of-{who}"));
    let names = async |who: &str| {
        let list: Value = asked(who, Method::GET, "/v1/models").send().await.unwrap().json().await.unwrap();
        list["data"].as_array().unwrap().iter().map(|card| card["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names("a").await, [MODEL, "org/alias", "secret"]);
    let answer = asked("a", Method::POST, COMPLETIONS).json(&request("secret", 4)).send().await.unwrap();
    assert_eq!(tokens_of(&answer.json().await.unwrap()), expected(Some(7), 4));
    assert_eq!(asked("a", Method::GET, "/v1/models/secret").send().await.unwrap().status(), 200);

    for who in ["b", "all"] {
        assert_eq!(names(who).await, [MODEL, "org/alias"], "{who}");
        let bodies = [
            (COMPLETIONS, request("NAME", 4)),
            ("/v1/chat/completions", json!({"model": "NAME", "messages": [{"role": "user", "content": "x"}]})),
            ("/tokenize", json!({"model": "NAME", "prompt": "x"})),
            ("/detokenize", json!({"model": "NAME", "tokens": [104]})),
        ];
        for (path, body) in bodies {
            let mut answers = Vec::new();
            // Names of one length: nothing else tells them apart.
            for name in ["secret", "nobody"] {
                let body = body.to_string().replace("NAME", name);
                let request = asked(who, Method::POST, path).header("content-type", "application/json").body(body);
                let response = request.send().await.unwrap();
                assert_eq!(response.status(), 404, "{who} {path} {name}");
                let mut headers: Vec<(String, String)> = response
                    .headers()
                    .iter()
                    .filter(|(name, _)| !["x-request-id", "date"].contains(&name.as_str()))
                    .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
                    .collect();
                headers.sort();
                answers.push((headers, response.text().await.unwrap().replace(name, "NAME")));
            }
            assert_eq!(answers[0], answers[1], "{who} {path}");
            assert!(!answers[0].1.contains("secret"), "it is not offered either: {}", answers[0].1);
        }
        let one = asked(who, Method::GET, "/v1/models/secret").send().await.unwrap();
        check_error(one, 404, Some("model"), who).await;
    }
    assert_eq!(server.status("secret").num_users, 0, "nobody else ever held it");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_admin_key_opens_the_routes_that_change_adapters() {
    let files = Files::new();
    files.write("fr", "7");
    let mut closed = setup(&files);
    closed.config.admin_key = None;
    let closed = closed.start();
    let server = with_tenants(setup(&files)).start();
    let routes = [
        (Method::POST, LOAD, json!({"lora_name": "fr", "lora_path": "fr"})),
        (Method::POST, UNLOAD, json!({"lora_name": "fr"})),
        (Method::GET, "/v1/adapters", Value::Null),
    ];
    for (method, path, body) in routes {
        let ask = async |server: &Server, key: Option<&str>| {
            let request = server.request(method.clone(), path);
            let request = if body.is_null() { request } else { request.json(&body) };
            key.map_or(request.try_clone().unwrap(), |key| request.bearer_auth(key)).send().await.unwrap()
        };
        let code = check_error(ask(&closed, Some(BOSS)).await, 403, None, path).await;
        assert_eq!(code.as_deref(), Some("admin_key_required"));
        check_error(ask(&closed, None).await, 403, None, path).await;
        check_error(ask(&server, None).await, 401, None, path).await;
        for key in ["key-of-all", "key-of-a", "boss2", "bos"] {
            let code = check_error(ask(&server, Some(key)).await, 403, None, path).await;
            assert_eq!(code.as_deref(), Some("admin_key_required"), "{path} {key}");
        }
    }
    assert_eq!(server.adapters().await, Vec::<Value>::new(), "nothing was loaded");
    let with_admins = server.request(Method::POST, COMPLETIONS).bearer_auth(BOSS).json(&request(MODEL, 1));
    check_error(with_admins.send().await.unwrap(), 401, None, "the admin key opens no model route").await;
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn nothing_outside_the_roots_is_loaded_or_told_of() {
    use std::os::unix::fs::symlink;
    let files = Files::new();
    let outside = write(&files.temp.path().canonicalize().unwrap().join("outside"), "9");
    files.write("good", "7");
    symlink(&outside, files.root().join("linked")).unwrap();
    fs::create_dir(files.root().join("sneaky")).unwrap();
    fs::write(files.root().join("sneaky/adapter_config.json"), "{}").unwrap();
    symlink(outside.join("adapter_model.safetensors"), files.root().join("sneaky/adapter_model.safetensors")).unwrap();
    let server = setup(&files).start();
    let refusal = async |path: &str| {
        let response = server.admin(LOAD, &json!({"lora_name": "x", "lora_path": path})).await;
        assert_eq!(response.status(), 403, "{path}");
        let body: Value = response.json().await.unwrap();
        assert_eq!(body["error"]["param"], "lora_path", "{body}");
        body["error"]["message"].as_str().unwrap().replace(&format!("{path:?}"), "PATH")
    };
    let missing = refusal("not-there").await;
    assert!(missing.contains(files.root().to_str().unwrap()) && missing.contains("--adapter-root"), "{missing}");
    for path in [
        "../outside",
        "good/../../outside",
        "linked",
        "sneaky",
        outside.to_str().unwrap(),
        "/etc/passwd",
        "/no/such/place",
        "",
        ".",
        "..",
    ] {
        assert_eq!(refusal(path).await, missing, "what is outside and what is nowhere get one answer: {path}");
    }
    assert_eq!(server.adapters().await, Vec::<Value>::new());
    server.load("x", files.root().join("good").to_str().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_stream_keeps_its_version_and_a_new_request_gets_the_new_one() {
    let files = Files::new();
    files.write("one", "1");
    files.write("two", "2");
    let (gate, keeper) = gate();
    let mut setup = setup(&files);
    setup.model.gate = Some(gate);
    let server = setup.start();
    server.load("x", "one").await;
    let old = streaming(&server, "x", 10);
    let keeper = let_pass(keeper, 3).await;
    // The model thread stands at the gate: loading does not wait for it.
    let inplace = json!({"lora_name": "x", "lora_path": "two", "load_inplace": true});
    assert_eq!(server.admin(LOAD, &inplace).await.status(), 200);
    let states = server.adapters().await;
    let shown: Vec<_> = states.iter().map(|entry| (&entry["version"], &entry["state"], &entry["users"])).collect();
    assert_eq!(shown, [(&json!(2), &json!("host"), &json!(0)), (&json!(1), &json!("draining"), &json!(1))]);
    let new = streaming(&server, "x", 10);
    wait_until("the new request holds the new version", || server.status("x").num_users == 1).await;
    drop(keeper);
    assert_eq!(finished(old).await, expected(Some(1), 10));
    assert_eq!(finished(new).await, expected(Some(2), 10));
    wait_until("the old version is gone", || server.model.adapters.list().len() == 1).await;
    assert_eq!(server.tokens("x", 10).await, expected(Some(2), 10));
}

/// What lay in the root when it was loaded is a link to elsewhere when it is read again.
#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_that_moved_out_of_its_root_is_not_read_again() {
    let files = Files::new();
    let mut setup = setup(&files);
    setup.model.adapters.max_loras = 1;
    setup.model.adapters.max_cpu_loras = 1;
    let server = setup.start();
    files.write("first", "1");
    files.write("second", "2");
    server.load("first", "first").await;
    server.tokens("first", 3).await;
    server.load("second", "second").await;
    server.tokens("second", 3).await;
    assert_eq!(server.status("first").state, AdapterState::Disk, "it had to leave");
    let outside = write(&files.temp.path().join("outside"), "3");
    fs::remove_dir_all(files.root().join("first")).unwrap();
    std::os::unix::fs::symlink(&outside, files.root().join("first")).unwrap();
    let refused = server.post(COMPLETIONS, &request("first", 3)).await;
    check_error(refused, 503, None, "cannot be loaded").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unloading_refuses_waits_or_gives_up_waiting() {
    let files = Files::new();
    files.write("one", "1");
    let (gate, keeper) = gate();
    let mut setup = setup(&files);
    setup.model.gate = Some(gate);
    let server = setup.start();
    server.load("x", "one").await;
    server.load("y", "one").await;
    let (of_x, of_y) = (streaming(&server, "x", 6), streaming(&server, "y", 6));
    let keeper = wait_for_step(keeper).await;
    wait_until("both are held", || server.status("x").num_users + server.status("y").num_users == 2).await;

    let refused = server.admin(UNLOAD, &json!({"lora_name": "x", "mode": "refuse"})).await;
    assert_eq!(check_error(refused, 409, None, "it is in use").await.as_deref(), Some("conflict"));
    assert_eq!(server.status("x").state, AdapterState::Resident, "nothing has changed");
    for (body, param) in [
        (json!({"lora_name": "x", "mode": "later"}), "mode"),
        (json!({"lora_name": "x", "timeout_s": -1}), "timeout_s"),
        (json!({"lora_name": "x", "timeout_s": 1e9}), "timeout_s"),
    ] {
        check_error(server.admin(UNLOAD, &body).await, 400, Some(param), &body.to_string()).await;
    }
    let given_up = server.admin(UNLOAD, &json!({"lora_name": "x", "timeout_s": 0.01})).await;
    check_error(given_up, 409, None, "its user has not ended").await;
    check_error(server.post(COMPLETIONS, &request("x", 1)).await, 404, Some("model"), "its name is gone").await;
    assert_eq!(server.status("x").state, AdapterState::Draining);

    let unload =
        server.request(Method::POST, UNLOAD).bearer_auth(BOSS).json(&json!({"lora_name": "y", "mode": "wait"}));
    let unload = tokio::spawn(async move { unload.send().await.unwrap() });
    wait_until("the name is gone", || server.model.adapters.spec("y").is_none()).await;
    assert!(!unload.is_finished(), "it waits for the stream");
    drop(keeper);
    assert_eq!(finished(of_x).await, expected(Some(1), 6), "what runs ends on what it has");
    assert_eq!(finished(of_y).await, expected(Some(1), 6));
    assert_eq!(finished(unload).await.status(), 200);
    wait_until("all memory is given back", || server.model.adapters.list().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_request_reads_the_adapter_and_nobody_else_waits() {
    let files = Files::new();
    let (gate, keeper) = gate();
    let mut setup = setup(&files);
    setup.model.reader = FakeReader { gate: Some(gate), ..FakeReader::default() };
    let server = setup.start();
    server.register("x", files.write("one", "1"));
    assert_eq!(server.status("x").state, AdapterState::Disk);
    let models: Value = server.get("/v1/models").await.json().await.unwrap();
    assert_eq!(models["data"][2]["id"], "x", "known before it is read");
    let (first, second) = (streaming(&server, "x", 5), streaming(&server, "x", 5));
    let keeper = wait_for_step(keeper).await;
    assert_eq!(server.status("x").state, AdapterState::Loading);
    wait_until("it is waited for", || server.in_use().1 == ["x"]).await;
    assert_eq!(server.lora_info().await, "{max_lora=\"8\",running_lora_adapters=\"\",waiting_lora_adapters=\"x\"}");
    assert_eq!(server.tokens(MODEL, 5).await, expected(None, 5), "others go on");
    keeper.let_go();
    assert_eq!(finished(first).await, expected(Some(1), 5));
    assert_eq!(finished(second).await, expected(Some(1), 5));
    assert_eq!(server.tokens("x", 5).await, expected(Some(1), 5));
    // A second reading would stand at the gate, which is still closed.
    assert_eq!(server.status("x").version, 1, "it was read once");
    wait_until("nobody uses it", || server.in_use() == (vec![], vec![])).await;
    assert_eq!(server.lora_info().await, "{max_lora=\"8\",running_lora_adapters=\"\",waiting_lora_adapters=\"\"}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_loads_at_once_are_read_a_few_at_a_time() {
    let files = Files::new();
    let (gate, keeper) = gate();
    let mut setup = setup(&files);
    setup.model.reader = FakeReader { gate: Some(gate), ..FakeReader::default() };
    let num_readings = Arc::clone(&setup.model.reader.num_readings);
    let server = Arc::new(setup.start());
    files.write("one", "1");
    let loads: Vec<_> = (0..12)
        .map(|at| {
            let server = Arc::clone(&server);
            let load = json!({"lora_name": format!("x{at}"), "lora_path": "one"});
            tokio::spawn(async move { server.admin(LOAD, &load).await.status() })
        })
        .collect();
    let mut keeper = wait_for_step(keeper).await;
    for _ in 0..11 {
        keeper.let_go();
        keeper = wait_for_step(keeper).await;
    }
    drop(keeper);
    for load in loads {
        assert_eq!(load.await.unwrap(), 200);
    }
    let most = num_readings.lock().unwrap().1;
    assert!(most <= 4, "{most} were read at one time");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metric_tells_running_and_waiting_adapters_apart() {
    let files = Files::new();
    let (gate, keeper) = gate();
    let mut setup = setup(&files);
    setup.model.gate = Some(gate);
    setup.engine.max_num_seqs = 1;
    let server = setup.start();
    for name in ["x", "y"] {
        files.write(name, "1");
        server.load(name, name).await;
    }
    let first = streaming(&server, "x", 4);
    let keeper = wait_for_step(keeper).await;
    let second = streaming(&server, "y", 4);
    wait_until("the second waits", || server.in_use() == (vec!["x".into()], vec!["y".into()])).await;
    assert_eq!(server.lora_info().await, "{max_lora=\"8\",running_lora_adapters=\"x\",waiting_lora_adapters=\"y\"}");
    drop(keeper);
    finished(first).await;
    finished(second).await;
    wait_until("nobody uses any", || server.in_use() == (vec![], vec![])).await;
    assert_eq!(server.lora_info().await, "{max_lora=\"8\",running_lora_adapters=\"\",waiting_lora_adapters=\"\"}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_adapter_is_refused_with_its_reason_and_changes_nothing() {
    let files = Files::new();
    files.write("good", "7");
    let broken = files.write("broken", "no tag");
    fs::create_dir(files.root().join("empty")).unwrap();
    let server = setup(&files).start();
    server.load("x", "good").await;
    for (body, about) in [
        (json!({"lora_name": "x", "lora_path": "broken", "load_inplace": true}), "\"no tag\" is no tag"),
        (json!({"lora_name": "new", "lora_path": "broken"}), "\"no tag\" is no tag"),
        (json!({"lora_name": "new", "lora_path": "empty"}), "adapter_model.safetensors"),
    ] {
        let response = server.admin(LOAD, &body).await;
        let status = response.status();
        let error: Value = response.json().await.unwrap();
        assert_eq!((status.as_u16(), &error["error"]["param"]), (400, &json!("lora_path")), "{error}");
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.contains("cannot be loaded") && message.contains(about), "{message}");
    }
    assert_eq!(server.tokens("x", 6).await, expected(Some(7), 6), "the old version serves on");
    let listed = server.adapters().await;
    assert_eq!((listed.len(), &listed[0]["version"]), (1, &json!(1)), "{listed:?}");

    // Known by its name, and found broken by the request that asks for it.
    server.register("later", broken);
    let response = server.post(COMPLETIONS, &request("later", 1)).await;
    let code = check_error(response, 503, None, "its files are broken").await;
    assert_eq!(code.as_deref(), Some("adapter_unreadable"));
    let listed = server.adapters().await;
    assert!(listed[0]["failure"].as_str().unwrap().contains("is no tag"), "{listed:?}");
    assert_eq!(server.tokens("x", 6).await, expected(Some(7), 6));
    assert_eq!(server.tokens(MODEL, 6).await, expected(None, 6));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_adapter_could_be_is_refused_by_its_field() {
    let files = Files::new();
    files.write("good", "7");
    let mut setup = with_tenants(setup(&files));
    setup.model.adapters.max_loras = 1;
    let server = setup.start();
    for (body, status, param) in [
        (json!({"lora_name": "", "lora_path": "good"}), 400, Some("lora_name")),
        (json!({"lora_name": " x", "lora_path": "good"}), 400, Some("lora_name")),
        (json!({"lora_name": "x".repeat(257), "lora_path": "good"}), 400, Some("lora_name")),
        (json!({"lora_name": MODEL, "lora_path": "good"}), 400, Some("lora_name")),
        (json!({"lora_name": "x", "lora_path": "good", "tenants": ["c"]}), 400, Some("tenants")),
        (json!({"lora_name": "x", "lora_path": "good", "tenants": []}), 400, Some("tenants")),
        (json!({"lora_name": "x"}), 400, Some("lora_path")),
        (json!({"lora_name": 3, "lora_path": "good"}), 400, Some("lora_name")),
    ] {
        check_error(server.admin(LOAD, &body).await, status, param, &body.to_string()).await;
    }
    assert_eq!(server.adapters().await, Vec::<Value>::new());
    let pinned = |name: &str| json!({"lora_name": name, "lora_path": "good", "pinned": true});
    assert_eq!(server.admin(LOAD, &pinned("x")).await.status(), 200);
    let response = server.admin(LOAD, &pinned("y")).await;
    assert_eq!(response.status(), 409);
    assert!(response.text().await.unwrap().contains("--max-loras is 1"));
    assert_eq!(server.adapters().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_while_its_adapter_is_read_leaves_nothing_behind() {
    let files = Files::new();
    let (gate, keeper) = gate();
    let mut setup = setup(&files);
    setup.model.reader = FakeReader { gate: Some(gate), ..FakeReader::default() };
    let server = setup.start();
    server.register("x", files.write("one", "1"));
    let request_of_x = server.request(Method::POST, COMPLETIONS).json(&request("x", 5));
    let asking = tokio::spawn(async move { request_of_x.send().await });
    let keeper = wait_for_step(keeper).await;
    wait_until("it is waited for", || server.in_use().1 == ["x"]).await;
    asking.abort();
    wait_until("nobody waits", || server.in_use().1.is_empty()).await;
    // What was begun is ended: who comes next finds it.
    keeper.let_go();
    wait_until("it is in memory", || server.status("x").state == AdapterState::Host).await;
    assert_eq!(server.tokens("x", 5).await, expected(Some(1), 5));
    server.wait_until_empty().await;
    wait_until("nobody holds it", || server.status("x").num_users == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_passes_while_an_adapter_is_read() {
    let files = Files::new();
    let (gate, keeper) = gate();
    let mut setup = setup(&files);
    setup.model.reader = FakeReader { gate: Some(gate), ..FakeReader::default() };
    let server = setup.start();
    server.register("x", files.write("one", "1"));
    for body in [request("x", 5), json!({"model": "x", "prompt": "a", "stream": true})] {
        let late = server.request(Method::POST, COMPLETIONS).header("x-request-timeout", "20ms").json(&body);
        let code = check_error(late.send().await.unwrap(), 408, None, "the deadline").await;
        assert_eq!(code.as_deref(), Some("request_timeout"));
    }
    assert_eq!(server.in_use(), (vec![], vec![]));
    drop(keeper);
    assert_eq!(server.tokens("x", 5).await, expected(Some(1), 5), "the next one is served");
}
