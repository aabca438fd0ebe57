//! Guardrails that ask, at the sockets: a web hook that allows, blocks, dawdles, talks nonsense or is not there; a judge on this
//! server's own model; and that nothing of a local-only request reaches the hook, counted where connections are accepted.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures::StreamExt;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
};

use crate::{
    gateway::House,
    support::{MODEL, PATIENCE, Setup, check_error, events, wait_until},
};

/// What the hook does with a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    Allow,
    Block,
    /// Half of a JSON text.
    Broken,
    /// A verdict with a long tail.
    Huge,
    /// A status that is no success.
    Fail,
    /// It takes the question and says nothing until the test lets it.
    Gated,
}

/// A web hook that is nothing but a socket.
pub(crate) struct Hook {
    address: SocketAddr,
    seen: Arc<Seen>,
}

struct Seen {
    manner: Mutex<Manner>,
    num_connections: AtomicUsize,
    questions: Mutex<Vec<Value>>,
    gate: Notify,
    /// Connections that the asker closed before it was answered.
    num_dropped: AtomicUsize,
}

impl Hook {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Seen {
            manner: Mutex::new(Manner::Allow),
            num_connections: AtomicUsize::new(0),
            questions: Mutex::default(),
            gate: Notify::new(),
            num_dropped: AtomicUsize::new(0),
        });
        let shared = Arc::clone(&seen);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                shared.num_connections.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(answer(stream, Arc::clone(&shared)));
            }
        });
        Self { address, seen }
    }

    pub(crate) fn set(&self, manner: Manner) {
        *self.seen.manner.lock().unwrap() = manner;
    }

    fn num_questions(&self) -> usize {
        self.seen.questions.lock().unwrap().len()
    }

    pub(crate) fn table(&self, name: &str, more: &str) -> String {
        format!("[[guardrails]]\nname = \"{name}\"\nkind = \"webhook\"\nurl = \"http://{}/x\"\n{more}\n", self.address)
    }
}

/// One question on one connection.
async fn answer(mut stream: TcpStream, seen: Arc<Seen>) {
    let mut bytes = Vec::new();
    let question = loop {
        let mut piece = [0; 4096];
        let count = stream.read(&mut piece).await.unwrap_or(0);
        if count == 0 {
            return;
        }
        bytes.extend_from_slice(&piece[..count]);
        let Some(head) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
        if let Ok(question) = serde_json::from_slice::<Value>(&bytes[head + 4..]) {
            break question;
        }
    };
    seen.questions.lock().unwrap().push(question);
    let manner = *seen.manner.lock().unwrap();
    if manner == Manner::Gated {
        let mut rest = [0; 1];
        tokio::select! {
            () = seen.gate.notified() => {}
            _ = stream.read(&mut rest) => {
                seen.num_dropped.fetch_add(1, Ordering::SeqCst);
                return;
            }
        }
    }
    let (status, body) = match manner {
        Manner::Allow | Manner::Gated => ("200 OK", "{\"found\": false}".to_owned()),
        Manner::Block => ("200 OK", "{\"found\": true}".to_owned()),
        Manner::Broken => ("200 OK", "{\"found\": ".to_owned()),
        Manner::Huge => ("200 OK", format!("{{\"found\": false, \"more\": \"{}\"}}", "x".repeat(200_000))),
        Manner::Fail => ("500 Oh No", "{\"found\": false}".to_owned()),
    };
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
    let _asker_gone = stream.write_all((head + &body).as_bytes()).await;
}

fn tenant(name: &str, more: &str) -> String {
    format!("[[tenants]]\nname = \"{name}\"\n{more}\n")
}

/// The same answer whoever asks.
fn body(stream: bool) -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0,
           "stream": stream})
}

/// Text and finish reason, however it was delivered.
async fn answered(house: &House, key: &str, stream: bool) -> (u16, String, Value) {
    let response = house.chat(key, &body(stream)).send().await.unwrap();
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    if status != 200 || !stream {
        let answer: Value = serde_json::from_str(&text).unwrap();
        let content = answer.pointer("/choices/0/message/content").and_then(Value::as_str).unwrap_or_default();
        let finish = answer.pointer("/choices/0/finish_reason").or_else(|| answer.pointer("/error/code"));
        return (status, content.to_owned(), finish.cloned().unwrap_or_default());
    }
    let (chunks, done) = events(&text);
    assert!(done, "{chunks:?}");
    let content = chunks.iter().filter_map(|chunk| chunk.pointer("/choices/0/delta/content")?.as_str()).collect();
    let finish = chunks.iter().rev().find_map(|chunk| chunk.pointer("/choices/0/finish_reason")?.as_str());
    (status, content, finish.into())
}

#[tokio::test]
async fn a_web_hook_decides_about_prompts_and_answers_and_its_silence_as_configured() {
    let hook = Hook::start().await;
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut rest = String::new();
    for side in ["prompt", "answer"] {
        for on_failure in ["closed", "open"] {
            let more = format!("action = \"block\"\non = [\"{side}\"]\non_failure = \"{on_failure}\"");
            let name = format!("{side}-{on_failure}");
            rest += &(hook.table(&name, &more) + &tenant(&name, &format!("guardrails = [\"{name}\"]")));
            let gone = hook.table(&format!("gone-{name}"), &more).replace(&hook.address.to_string(), &dead.to_string());
            rest += &(gone + &tenant(&format!("gone-{name}"), &format!("guardrails = [\"gone-{name}\"]")));
        }
    }
    let house = House::build(&rest).await;
    let plain = answered(&house, &house.key("acme").await, false).await;
    assert_eq!((plain.0, &plain.2), (200, &json!("length")));
    for side in ["prompt", "answer"] {
        for (on_failure, is_open) in [("closed", false), ("open", true)] {
            let key = house.key(&format!("{side}-{on_failure}")).await;
            let gone = house.key(&format!("gone-{side}-{on_failure}")).await;
            let (found, silent) = if side == "prompt" { (400, 503) } else { (200, 200) };
            let blocked = |status| {
                let code = if status == 503 { "guardrail_unavailable" } else { "content_filter" };
                (status, String::new(), json!(code))
            };
            let (blocked, silent) = (blocked(found), blocked(silent));
            for stream in [false, true] {
                for manner in [Manner::Allow, Manner::Block, Manner::Broken, Manner::Huge, Manner::Fail] {
                    hook.set(manner);
                    let passes = manner == Manner::Allow || (is_open && manner != Manner::Block);
                    let expected = match manner {
                        _ if passes => &plain,
                        Manner::Block => &blocked,
                        _ => &silent,
                    };
                    let got = answered(&house, &key, stream).await;
                    assert_eq!(&got, expected, "{side} {on_failure} {manner:?} {stream}");
                }
                let expected = if is_open { &plain } else { &silent };
                assert_eq!(&answered(&house, &gone, stream).await, expected, "{side} {on_failure} dead {stream}");
            }
        }
    }
    let questions = hook.seen.questions.lock().unwrap().clone();
    assert_eq!(questions.len(), 40);
    for question in questions {
        let expected = if question["side"] == "prompt" { "hello" } else { plain.1.as_str() };
        assert_eq!(question["text"], expected, "{question}");
    }
}

#[tokio::test]
async fn a_hook_that_never_answers_is_waited_for_no_longer_than_its_timeout() {
    let hook = Hook::start().await;
    let rest = hook.table("slow", "action = \"block\"\ntimeout_ms = 30") + &tenant("slow", "guardrails = [\"slow\"]");
    let house = House::build(&rest).await;
    hook.set(Manner::Gated);
    let key = house.key("slow").await;
    let got = answered(&house, &key, true).await;
    assert_eq!((got.0, got.2), (503, json!("guardrail_unavailable")));
    wait_until("the question is withdrawn", || hook.seen.num_dropped.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn an_answer_is_held_until_the_verdict_and_a_client_that_leaves_withdraws_the_question() {
    let hook = Hook::start().await;
    let rest = hook.table("held", "action = \"block\"\non = [\"answer\"]\ntimeout_ms = 100000")
        + &tenant("held", "guardrails = [\"held\"]");
    let house = House::build(&rest).await;
    hook.set(Manner::Gated);
    let key = house.key("held").await;
    let response = house.chat(&key, &body(true)).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let mut pieces = response.bytes_stream();
    let mut text = String::new();
    // Whatever comes is read while the hook has the question.
    let reading = async {
        while hook.num_questions() == 0 {
            tokio::select! {
                Some(piece) = pieces.next() => text += std::str::from_utf8(&piece.unwrap()).unwrap(),
                () = tokio::task::yield_now() => {}
            }
        }
    };
    tokio::time::timeout(PATIENCE, reading).await.expect("the hook is asked");
    assert_eq!(hook.seen.questions.lock().unwrap()[0]["side"], "answer");
    let held = hook.seen.questions.lock().unwrap()[0]["text"].as_str().unwrap().to_owned();
    let (early, done) = events(&text);
    let has_text = |chunk: &Value| {
        chunk.pointer("/choices/0/delta/content").and_then(Value::as_str).is_some_and(|text| !text.is_empty())
    };
    assert!(!done && !early.iter().any(has_text), "{early:?}");
    hook.seen.gate.notify_one();
    while let Some(piece) = pieces.next().await {
        text += std::str::from_utf8(&piece.unwrap()).unwrap();
    }
    let (chunks, done) = events(&text);
    let content: String =
        chunks.iter().filter_map(|chunk| chunk.pointer("/choices/0/delta/content")?.as_str()).collect();
    assert!(done && content == held, "{content:?} {held:?}");

    let response = house.chat(&key, &body(true)).send().await.unwrap();
    wait_for(|| hook.num_questions() == 2).await;
    drop(response);
    wait_for(|| hook.seen.num_dropped.load(Ordering::SeqCst) == 1).await;
    house.server.wait_until_empty().await;
}

async fn wait_for(condition: impl FnMut() -> bool) {
    wait_until("the hook has seen it", condition).await;
}

#[tokio::test]
async fn nothing_of_a_local_only_request_reaches_a_web_hook() {
    let hook = Hook::start().await;
    let here =
        "[[guardrails]]\nname = \"stay\"\nkind = \"blocklist\"\naction = \"route-local\"\nphrases = [\"hello\"]\n";
    let rest = hook.table("closed", "action = \"block\"")
        + &hook.table("open", "action = \"block\"\non_failure = \"open\"")
        + here
        + &tenant("strict", "privacy = \"local-only\"\nguardrails = [\"closed\"]")
        + &tenant("lenient", "privacy = \"local-only\"\nguardrails = [\"open\"]")
        + &tenant("kept", "privacy = \"any\"\nguardrails = [\"stay\", \"open\"]")
        + &tenant("free", "privacy = \"any\"\nguardrails = [\"open\"]");
    let house = House::build(&rest).await;
    for (name, header, status) in [
        ("strict", None, 503),
        ("strict", Some("any"), 503),
        ("lenient", None, 200),
        ("kept", None, 200),
        ("free", Some("local-only"), 200),
    ] {
        let key = house.key(name).await;
        for stream in [false, true] {
            let request = house.chat(&key, &body(stream));
            let request = match header {
                Some(class) => request.header("x-bindery-privacy", class),
                None => request,
            };
            let response = request.send().await.unwrap();
            assert_eq!(response.status().as_u16(), status, "{name}");
            response.text().await.unwrap();
        }
    }
    assert_eq!(hook.seen.num_connections.load(Ordering::SeqCst), 0, "not even a connection");
    let free = house.key("free").await;
    assert_eq!(answered(&house, &free, false).await.0, 200);
    assert_eq!(hook.seen.num_connections.load(Ordering::SeqCst), 2, "the count can be other than nothing");
}

#[tokio::test]
async fn the_servers_own_model_judges_past_limits_and_guardrails() {
    let judge = "[[guardrails]]\nname = \"judge\"\nkind = \"model\"\naction = \"block\"\nmodel = \"local\"\non = [\"prompt\"]\n\
                 timeout_ms = 60000\n";
    let rest = format!(
        "{judge}{}{}",
        tenant("judged", "privacy = \"local-only\"\nguardrails = [\"judge\"]"),
        tenant("once", "privacy = \"local-only\"\nguardrails = [\"judge\"]\nlimits = { requests_per_minute = 1 }")
    );
    let mut setup = Setup::new();
    setup.engine.max_model_len = 4096;
    setup.engine.num_blocks = 4096;
    let house = House::build_with(&rest, setup).await;
    let key = house.key("judged").await;
    let ask = async |key: &str, text: &str| {
        let request = json!({"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 2});
        house.chat(key, &request).send().await.unwrap()
    };
    let mut verdicts = Vec::new();
    for number in 0..12 {
        let text = format!("text {number}");
        let (first, second) = (ask(&key, &text).await.status(), ask(&key, &text).await.status());
        assert_eq!(first, second, "the same text has the same verdict");
        verdicts.push(first.as_u16());
    }
    // The model's words are a hash of what it reads: held to two words, it says either now and then.
    assert!(verdicts.contains(&200) && verdicts.contains(&400), "{verdicts:?}");
    // One request a minute, and its verdict is none of the tenant's requests.
    let once = house.key("once").await;
    let allowed = verdicts.iter().position(|&status| status == 200).unwrap();
    assert_eq!(ask(&once, &format!("text {allowed}")).await.status(), 200);
    assert_eq!(ask(&once, &format!("text {allowed}")).await.status(), 429);
    let rows = house.rows().await;
    assert!(rows.iter().any(|row| row.model.as_deref() == Some("local") && row.requests >= 24), "{rows:?}");
    house.server.wait_until_empty().await;
}

#[tokio::test]
async fn a_picture_goes_where_it_may_be_taken_or_its_field_is_named() {
    let routes = "[[routes]]\nmodel = \"auto\"\nrules = [{ to = [\"local\", \"dead/m\"] }]\n";
    let house = House::build(routes).await;
    let picture = |model: &str| {
        json!({"model": model, "messages": [{"role": "user", "content": [
            {"type": "text", "text": "what is this?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        ]}]})
    };
    let (acme, vault) = (house.key("acme").await, house.key("vault").await);
    let field = Some("messages[0].content[1]");
    for (key, model) in [(&acme, MODEL), (&vault, MODEL), (&vault, "auto")] {
        let response = house.chat(key, &picture(model)).send().await.unwrap();
        let code = check_error(response, 400, field, model).await;
        assert_eq!(code.as_deref(), Some("unsupported_parameter"));
    }
    // It was sent on: what fails is the way there.
    let sent = house.chat(&acme, &picture("auto")).send().await.unwrap();
    assert!(sent.status().is_server_error(), "{}", sent.status());
}
