//! What the audit log holds of requests: every one of them, also those whose process was killed, and of whom it is configured their
//! texts.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};

use super::{
    tests::{ACME, CONTENTS, ask, asked, begin_stream, body, gateway, idle, local, store, upstream},
    *,
};
use crate::{
    audit::record::ModelUsed,
    config::GatewayConfig,
    ledger::{Call, LedgerOptions, LedgerRoute, RequestStatus, ReserveRequest},
    names::NodeId,
    store::{LogWriter, StoreHeads},
};

/// Where a log is to lie, and its key beside it; all of it goes with the first.
fn log_folder() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (path, key_file) = (folder.path().join("log"), folder.path().join("key"));
    std::fs::write(&key_file, "ab".repeat(32)).unwrap();
    (folder, path, key_file)
}

/// All that its files hold.
fn written(path: &Path) -> String {
    let files = std::fs::read_dir(path).unwrap();
    files.map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap_or_default()).collect()
}

/// A prompt has left, the process is killed: the log of the next one says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_a_crash_cut_off_is_in_the_log() {
    let double = upstream().await;
    let (_log, path, key_file) = log_folder();
    let audit = format!("{ACME}[audit]\npath = {path:?}\nkey_file = {key_file:?}\n");
    let (gateway, folder) = gateway(&double, &audit).await;
    // What another process of this node had reserved and sent before it was killed.
    let options = LedgerOptions {
        node: NodeId::new("test").unwrap(),
        beat_every: Duration::from_mins(1),
        lease: Duration::from_mins(10),
        keep: None,
        when_orphaned: None,
    };
    let text = std::fs::read_to_string(folder.path().join("config.toml")).unwrap();
    gateway.close().await;
    drop(gateway);
    let killed = Ledger::open(store(&folder).await, options, UnixMillis::now()).await.unwrap();
    let call = Call {
        tenant: TenantId::new("acme").unwrap(),
        credential: configured_credential(),
        model: "gpt-4.1".to_owned(),
        adapter: None,
        route: LedgerRoute::Upstream("up".to_owned()),
    };
    let request = ReserveRequest { call, at_most: Some(Money::from_nanos(5)), budgets: Vec::new() };
    std::mem::forget(killed.reserve(request, UnixMillis::now()).await.unwrap());
    let env = |name: &str| (name == "UP_KEY").then(|| "sk-test".to_owned());
    let surroundings = Surroundings { env: &env, node: NodeId::new("test").unwrap(), host: "here" };
    let next = Gateway::start(GatewayConfig::parse(&text).unwrap(), &surroundings, UnixMillis::now()).await.unwrap();
    next.close().await;
    drop(next);
    let text = written(&path);
    for expected in ["\"outcome\":\"unsettled\"", "\"to\":\"up\"", "\"name\":\"gpt-4.1\"", "\"tenant\":\"acme\""] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_is_in_a_log_that_verifies() {
    use crate::audit::{AuditKey, HeadStore, verify};

    let double = upstream().await;
    let (_log, path, key_file) = log_folder();
    let rest = format!(
        "{ACME}[audit]\npath = {path:?}\nkey_file = {key_file:?}\n[[guardrails]]\nname = \"words\"\nkind = \"blocklist\"\n\
         action = \"block\"\nphrases = [\"swordfish\"]\n[[tenants]]\nname = \"strict\"\nprivacy = \"any\"\nguardrails = [\"words\"]\n"
    );
    let (gateway, folder) = gateway(&double, &rest).await;
    ask(&gateway, asked("acme", &body("up/gpt-4.1", "hello"), None)).await.unwrap();
    let mut streamed = body("up/gpt-4.1", "hello");
    streamed["stream"] = json!(true);
    ask(&gateway, asked("acme", &streamed, None)).await.unwrap();
    ask(&gateway, asked("acme", &body("up/gpt-4.1", "fail"), None)).await.unwrap_err();
    ask(&gateway, asked("strict", &body("base", "swordfish"), None)).await.unwrap_err();
    // Stopped in its answer, refused for its model, and for its budget; and one whose client left.
    let answer = ask(&gateway, asked("strict", &streamed, None)).await.unwrap();
    assert_eq!(answer["finish"], "content_filter");
    ask(&gateway, asked("acme", &body("nobody", "hi"), None)).await.unwrap_err();
    let mut dear = body("up/gpt-4.1", "hello");
    dear["max_tokens"] = json!(30_000);
    ask(&gateway, asked("acme", &dear, None)).await.unwrap_err();
    drop(gateway.begin(asked("acme", &body("base", "hi"), None)).unwrap());
    let mut local_one = gateway.begin(asked("acme", &body("base", "hi"), None)).unwrap();
    local_one.route(idle(), UnixMillis::now(), &local).await.unwrap();
    let model = ModelUsed { name: "base".to_owned(), digest: Some("sha256:1".to_owned()), ..ModelUsed::default() };
    let used = LocalUse { num_prompt_tokens: 3, num_completion_tokens: 2, machine_time: Duration::ZERO };
    local_one.settle_local(used, RequestStatus::Completed, model, UnixMillis::now()).await.unwrap();

    let log = format!("here:{}", path.display());
    let writer = LogWriter { log: &log, writer: "test" };
    let heads = StoreHeads::new(store(&folder).await, tokio::runtime::Handle::current(), writer);
    let report = tokio::task::spawn_blocking(move || {
        let head = heads.load().unwrap();
        let key = AuditKey::from_file(&key_file, &path).unwrap();
        let text = written(&path);
        (verify(&path, &key, head).unwrap(), text)
    });
    let (report, text) = report.await.unwrap();
    // The first one tells of the log itself.
    assert!(report.problems.is_empty() && report.num_records == 10, "{report:?}");
    for expected in [
        "\"to\":\"up\"",
        "\"to\":\"local\"",
        "content_filter",
        "\"failed\"",
        "sha256:1",
        "\"prompt\":1000",
        "names up/gpt-4.1",
        "\"guardrail\":\"words\"",
        "model_not_found",
        "\"asked\":\"nobody\"",
        "budget_exceeded",
        "cancelled",
        "\"side\":\"answer\"",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    assert!(!text.contains("swordfish") && !text.contains("hello"), "no text of anybody's: {text}");
}

/// A tenant's policy decides; what is kept is what the client got, and nobody reads it in the log's files.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prompts_and_answers_are_kept_of_whom_it_is_configured_for_and_after_guardrails() {
    use crate::audit::{
        AuditKey, ContentsKey, ContentsKeys, ExportFilter, ExportFormat, export, export::ExportKeys, verify,
    };

    let double = upstream().await;
    let (_log, path, key_file) = log_folder();
    let rest = format!(
        "[audit]\npath = {path:?}\nkey_file = {key_file:?}\ncontents = \"encrypted\"\ncontents_key_env = \"CONTENTS\"\n\
         [[guardrails]]\nname = \"pii\"\nkind = \"pii\"\naction = \"redact\"\n\
         [[guardrails]]\nname = \"words\"\nkind = \"blocklist\"\naction = \"block\"\nphrases = [\"swordfish\"]\n\
         [[tenants]]\nname = \"kept\"\nprivacy = \"any\"\nstore_contents = true\nguardrails = [\"pii\", \"words\"]\n\
         [[tenants]]\nname = \"plain\"\nprivacy = \"any\"\nstore_contents = true\n\
         [[tenants]]\nname = \"unkept\"\nprivacy = \"any\"\n"
    );
    let (gateway, _folder) = gateway(&double, &rest).await;
    let streamed = |text: &str| {
        let mut body = body("up/gpt-4.1", text);
        body["stream"] = json!(true);
        body
    };
    for tenant in ["kept", "plain", "unkept"] {
        let told = body("up/gpt-4.1", "I am jo@example.org");
        ask(&gateway, Asked { request_id: "whole", ..asked(tenant, &told, None) }).await.unwrap();
        ask(&gateway, Asked { request_id: "streamed", ..asked(tenant, &streamed("hello"), None) }).await.unwrap();
    }
    ask(&gateway, Asked { request_id: "blocked", ..asked("kept", &body("base", "say swordfish"), None) })
        .await
        .unwrap_err();
    // A client that leaves after the first piece.
    let left = Asked { request_id: "left", ..asked("plain", &streamed("hello"), None) };
    let (mut stream, mut exchange) = begin_stream(&gateway, left).await;
    stream.next(&mut exchange).await.unwrap().unwrap();
    drop((stream, exchange));
    // What runs here, as a server hands it on.
    let mut local_one =
        gateway.begin(Asked { request_id: "local", ..asked("plain", &body("base", "hi"), None) }).unwrap();
    local_one.route(idle(), UnixMillis::now(), &local).await.unwrap();
    let answer = json!({"choices": [{"index": 0, "message": {"content": "from here"}, "finish_reason": "stop"}]});
    local_one.filters().unwrap().whole(&mut local_one, answer).await.unwrap();
    let used = LocalUse { num_prompt_tokens: 3, num_completion_tokens: 2, machine_time: Duration::ZERO };
    local_one.settle_local(used, RequestStatus::Completed, ModelUsed::default(), UnixMillis::now()).await.unwrap();
    gateway.close().await;

    let files = std::fs::read_dir(&path).unwrap().map(|entry| std::fs::read(entry.unwrap().path()).unwrap());
    let bytes: Vec<u8> = files.flatten().collect();
    for text in ["jo@example.org", "you said", "from here", "swordfish", "hello", "the word is"] {
        assert!(!bytes.windows(text.len()).any(|part| part == text.as_bytes()), "{text} is in the log");
    }
    let key = AuditKey::from_file(&key_file, &path).unwrap();
    assert!(verify(&path, &key, None).unwrap().is_intact());
    let keys = ContentsKeys(vec![ContentsKey::parse(CONTENTS).unwrap()]);
    let mut out = Vec::new();
    let keys = ExportKeys { key: &key, contents: Some(&keys) };
    export(&path, keys, (&ExportFilter::default(), ExportFormat::JsonLines), &mut out).unwrap();
    let rows: Vec<Value> =
        String::from_utf8(out).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let contents = |tenant: &str, id: &str| {
        let row = rows.iter().find(|row| row["tenant"] == tenant && row["request_id"] == id);
        let row = row.unwrap_or_else(|| panic!("{tenant} {id} in {rows:?}"));
        let text = |name: &str| row["contents"][name].as_str().map(str::to_owned);
        (text("prompt"), text("answer"), row["outcome"].as_str().unwrap_or_default().to_owned())
    };
    let (prompt, answer, _) = contents("kept", "whole");
    assert!(!prompt.unwrap().contains("jo@example.org"), "redacted before it was kept");
    assert!(!answer.unwrap().contains("jo@example.org"));
    let (_, answer, _) = contents("kept", "streamed");
    assert!(!answer.unwrap().contains("swo"), "the client did not get it");
    assert!(contents("kept", "blocked").0.unwrap().contains("say "), "what was blocked is there to be looked at");
    let (prompt, answer, _) = contents("plain", "whole");
    assert!(prompt.unwrap().contains("I am jo@example.org"));
    assert_eq!(answer.as_deref(), Some("you said I am jo@example.org"));
    assert_eq!(contents("plain", "streamed").1.as_deref(), Some("the word is swordfish, friend"));
    assert_eq!(
        contents("plain", "left"),
        (contents("plain", "streamed").0, Some("the word is swo".to_owned()), "cancelled".to_owned())
    );
    assert_eq!(contents("plain", "local").1.as_deref(), Some("from here"));
    for id in ["whole", "streamed"] {
        assert_eq!(contents("unkept", id), (None, None, "completed".to_owned()), "its policy stores nothing");
    }
}

#[test]
fn what_a_tenant_has_stored_needs_a_log_that_keeps_it() {
    for audit in ["", "[audit]\npath = \"log\"\n"] {
        let text = format!("{audit}[[tenants]]\nname = \"a\"\nstore_contents = true\n");
        let problems = GatewayConfig::parse(&text).unwrap_err();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_eq!(problems[0].line, Some(text.lines().count()));
        assert!(problems[0].hint.as_deref().unwrap().contains("contents = \"encrypted\""), "{problems:?}");
    }
}
