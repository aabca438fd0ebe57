//! Answers with tool calls through their filters, and judges: what passes, what it costs, who is told.

use std::sync::{Mutex, atomic::Ordering};

use serde_json::{Value, json};

use super::{
    tests::{ask, asked, body, gateway, idle, local, standing, upstream},
    *,
};
use crate::{
    audit::record::ModelUsed,
    clock::UnixMillis,
    guardrails::{JudgeFailed, Verdict},
};

const PII: &str = "[[tenants]]\nname = \"acme\"\nprivacy = \"any\"\nguardrails = [\"pii\", \"words\"]\n\
                   [[guardrails]]\nname = \"pii\"\nkind = \"pii\"\naction = \"redact\"\nrestore = true\ndetect = [\"email\"]\n\
                   [[guardrails]]\nname = \"words\"\nkind = \"blocklist\"\naction = \"block\"\nphrases = [\"blue falcon\"]\n";

fn chunk(delta: &Value, finish: &Value) -> Value {
    json!({"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": [
        {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": {"content": [{"token": "as it was"}]}},
    ]})
}

fn call_delta(arguments: &str) -> Value {
    json!({"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]})
}

/// What a client puts together: content, arguments by call, finish reason.
fn joined(chunks: &[Value]) -> (String, BTreeMap<u64, String>, Value) {
    let (mut content, mut calls, mut finish) = (String::new(), BTreeMap::<u64, String>::new(), Value::Null);
    for chunk in chunks {
        assert!(!chunk.to_string().contains("as it was"), "log-probabilities spell what was hidden");
        for choice in chunk["choices"].as_array().unwrap() {
            content += choice["delta"]["content"].as_str().unwrap_or_default();
            for call in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
                let arguments = calls.entry(call["index"].as_u64().unwrap()).or_default();
                *arguments += call["function"]["arguments"].as_str().unwrap_or_default();
            }
            if !choice["finish_reason"].is_null() {
                finish = choice["finish_reason"].clone();
            }
        }
    }
    (content, calls, finish)
}

async fn filtered(rest: &str, prompt: &str, chunks: Vec<Value>) -> (Vec<Value>, Exchange) {
    let (gateway, _folder) = gateway(&upstream().await, rest).await;
    let mut exchange = gateway.begin(asked("acme", &body("base", prompt), None)).unwrap();
    let mut filters = exchange.filters().unwrap();
    let mut out: Vec<Value> = chunks.into_iter().flat_map(|chunk| filters.chunk(chunk)).collect();
    out.extend(filters.end(&mut exchange).await);
    (out, exchange)
}

fn streamed_call(arguments: &str, cut: usize) -> Vec<Value> {
    let begin = json!({"role": "assistant", "content": null, "tool_calls": [
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "send", "arguments": ""}}]});
    let mut chunks = vec![chunk(&begin, &Value::Null)];
    let letters: Vec<char> = arguments.chars().collect();
    chunks.extend(letters.chunks(cut).map(|piece| chunk(&call_delta(&piece.iter().collect::<String>()), &Value::Null)));
    chunks.push(chunk(&json!({}), &json!("tool_calls")));
    chunks
}

#[tokio::test]
async fn arguments_in_any_pieces_are_redacted_and_restored_and_stay_json() {
    let arguments = r#"{"to": "[EMAIL_1]", "cc": "eve\u0040x.org", "text": "say \"hi\"\nbob@x.org"}"#;
    for cut in [1, 3, 1000] {
        let (out, exchange) = filtered(PII, "I am ann@x.org", streamed_call(arguments, cut)).await;
        let (_, calls, finish) = joined(&out);
        let read: Value = serde_json::from_str(&calls[&0]).unwrap();
        assert_eq!(read, json!({"to": "ann@x.org", "cc": "[EMAIL_2]", "text": "say \"hi\"\n[EMAIL_3]"}), "{cut}");
        assert_eq!(finish, "tool_calls");
        // The call's beginning came as it was, its arguments once and before the end.
        assert_eq!(out[0]["choices"][0]["delta"]["tool_calls"][0]["function"]["name"], "send");
        assert_eq!(out.len(), 3, "{out:?}");
        let found = exchange.verdicts().iter().filter(|verdict| verdict.kind == "pii").count();
        assert_eq!(found, 2, "the prompt's and the answer's: {:?}", exchange.verdicts());
    }
}

#[tokio::test]
async fn a_forbidden_phrase_in_arguments_ends_the_choice_and_no_letter_of_them_passes() {
    for cut in [1, 4, 1000] {
        let (out, _) = filtered(PII, "x", streamed_call(r#"{"q": "the blue\u0020falcon"}"#, cut)).await;
        let (_, calls, finish) = joined(&out);
        assert_eq!((calls.get(&0).map(String::as_str), finish), (Some(""), json!("content_filter")), "{out:?}");
    }
    let long = "x".repeat((1 << 20) + 1);
    let (out, exchange) = filtered(PII, "x", streamed_call(&long, 1 << 19)).await;
    assert_eq!(joined(&out).2, "content_filter");
    assert_eq!(exchange.verdicts().last().unwrap().findings[0].label, "arguments");
}

#[tokio::test]
async fn refusals_thoughts_and_whole_answers_pass_the_same_filters() {
    let pieces = ["the blue fal", "con"].map(|piece| chunk(&json!({"reasoning_content": piece}), &Value::Null));
    let (out, _) = filtered(PII, "x", pieces.to_vec()).await;
    assert_eq!(joined(&out).2, "content_filter");
    assert!(!json!(out).to_string().contains("fal"), "{out:?}");

    let (gateway, _folder) = gateway(&upstream().await, PII).await;
    let whole = async |message: Value| {
        let mut exchange = gateway.begin(asked("acme", &body("base", "I am ann@x.org"), None)).unwrap();
        let answer = json!({"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]});
        let answer = exchange.filters().unwrap().whole(&mut exchange, answer).await.unwrap();
        answer["choices"][0].clone()
    };
    let call = |arguments: &str| {
        json!({"role": "assistant", "content": "to [EMAIL_1]", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            {"id": "2", "type": "function", "function": {"name": "f", "arguments": arguments}},
            {"id": "3", "type": "custom", "custom": {"name": "g", "input": "for bob@x.org"}},
        ]})
    };
    let choice = whole(call(r#"{"to":"[EMAIL_1]","cc":"eve@x.org"}"#)).await;
    assert_eq!(choice["message"]["content"], "to ann@x.org");
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    assert_eq!(calls[0]["function"]["arguments"], "{}");
    let read: Value = serde_json::from_str(calls[1]["function"]["arguments"].as_str().unwrap()).unwrap();
    assert_eq!(read, json!({"to": "ann@x.org", "cc": "[EMAIL_2]"}));
    assert_eq!(calls[2]["custom"]["input"], "for [EMAIL_3]");
    let blocked = whole(call(r#"{"q":"blue falcon"}"#)).await;
    assert_eq!(blocked["finish_reason"], "content_filter");
    assert!(blocked["message"].get("tool_calls").is_none(), "{blocked}");
}

#[tokio::test]
async fn a_stream_without_a_last_word_gives_what_was_held_back() {
    let (out, _) = filtered(PII, "x", vec![chunk(&json!({"content": "the blue"}), &Value::Null)]).await;
    assert_eq!(joined(&out).0, "the blue");
}

/// A judge of this process that answers by a script and keeps what it was asked.
#[derive(Default)]
struct Script {
    asked: Mutex<Vec<String>>,
}

impl LocalJudge for Script {
    fn ask(&self, question: LocalQuestion) -> futures::future::BoxFuture<'_, Result<LocalAnswer, JudgeFailed>> {
        let text = if question.text.contains("kestrel") { "block" } else { "allow" }.to_owned();
        self.asked.lock().unwrap().push(question.text);
        Box::pin(async move { Ok(LocalAnswer { text, used: LocalUse::default(), model: ModelUsed::default() }) })
    }
}

fn judged(model: &str, more: &str) -> String {
    format!(
        "[[tenants]]\nname = \"acme\"\nprivacy = \"any\"\nguardrails = [\"pii\", \"judge\"]\nbudget = {{ usd_per_day = 1.0 }}\n\
         [[guardrails]]\nname = \"pii\"\nkind = \"pii\"\naction = \"redact\"\nrestore = true\n\
         [[guardrails]]\nname = \"judge\"\nkind = \"model\"\nmodel = \"{model}\"\n{more}"
    )
}

#[tokio::test]
async fn a_judge_here_sees_redacted_texts_and_an_answer_waits_for_it() {
    let double = upstream().await;
    let (gateway, _folder) = gateway(&double, &judged("local", "action = \"block\"\n")).await;
    let request = || asked("acme", &body("up/gpt-4.1", "I am ann@x.org"), Some("local-only"));
    let silent = ask(&gateway, request()).await.unwrap_err();
    assert!(matches!(silent, GatewayError::Blocked { because: BlockedBecause::Silence, .. }), "{silent}");
    let script = Arc::new(Script::default());
    gateway.set_local_judge(Arc::clone(&script) as Arc<dyn LocalJudge>);
    let answer = ask(&gateway, asked("acme", &body("up/gpt-4.1", "I am ann@x.org"), None)).await.unwrap();
    assert_eq!(answer["choices"][0]["message"]["content"], "you said I am ann@x.org");
    let seen = script.asked.lock().unwrap().clone();
    assert_eq!(seen.len(), 2, "of the prompt and of the answer: {seen:?}");
    assert!(seen.iter().all(|text| text.contains("[EMAIL_1]") && !text.contains("ann@")), "{seen:?}");
    let found = ask(&gateway, asked("acme", &body("up/gpt-4.1", "kestrel"), None)).await.unwrap_err();
    assert!(matches!(found, GatewayError::Blocked { because: BlockedBecause::Found, .. }), "{found}");
    assert_eq!(double.num_calls.load(Ordering::SeqCst), 1, "what is blocked is not sent");
}

#[tokio::test]
async fn a_held_stream_is_let_go_in_order_or_not_at_all() {
    let held = |text: &'static str| async move {
        let (gateway, _folder) =
            gateway(&upstream().await, &judged("local", "action = \"block\"\non = [\"answer\"]\n")).await;
        gateway.set_local_judge(Arc::new(Script::default()));
        let mut exchange = gateway.begin(asked("acme", &body("base", "x"), None)).unwrap();
        let mut filters = exchange.filters().unwrap();
        let first = filters.chunk(chunk(&json!({"role": "assistant", "content": ""}), &Value::Null));
        let mut early = Vec::new();
        for piece in text.split_inclusive(' ') {
            early.extend(filters.chunk(chunk(&json!({"content": piece}), &Value::Null)));
        }
        early.extend(filters.chunk(chunk(&json!({}), &json!("stop"))));
        let usage = json!({"object": "chat.completion.chunk", "choices": [], "usage": {"total_tokens": 3}});
        early.extend(filters.chunk(usage));
        assert_eq!(
            (early.len(), first.len()),
            (0, usize::from(first[0]["choices"][0]["logprobs"].is_null())),
            "{early:?}"
        );
        (filters.end(&mut exchange).await, exchange)
    };
    let (out, _) = held("all is well ").await;
    let (text, _, finish) = joined(&out);
    assert_eq!((text.as_str(), finish), ("all is well ", json!("stop")));
    assert_eq!(out.last().unwrap()["usage"]["total_tokens"], 3);
    let (out, exchange) = held("of the kestrel and more ").await;
    let (text, _, finish) = joined(&out);
    assert_eq!((text.as_str(), finish), ("", json!("content_filter")));
    assert_eq!(out.last().unwrap()["usage"]["total_tokens"], 3, "what was used is told all the same");
    assert_eq!(exchange.verdicts().last().unwrap().kind, "model");
}

#[tokio::test]
async fn what_is_too_long_to_be_held_is_as_if_nobody_had_answered() {
    for (on_failure, passes) in [("closed", false), ("open", true)] {
        let more = format!("action = \"block\"\non = [\"answer\"]\non_failure = \"{on_failure}\"\n");
        let tables = judged("local", &more).replace("[\"pii\", \"judge\"]", "[\"judge\"]");
        let (gateway, _folder) = gateway(&upstream().await, &tables).await;
        let script = Arc::new(Script::default());
        gateway.set_local_judge(Arc::clone(&script) as Arc<dyn LocalJudge>);
        let mut exchange = gateway.begin(asked("acme", &body("base", "x"), None)).unwrap();
        let mut filters = exchange.filters().unwrap();
        let piece = "y".repeat(1 << 20);
        let mut out = Vec::new();
        for _ in 0..20 {
            out.extend(filters.chunk(chunk(&json!({"content": piece}), &Value::Null)));
        }
        out.extend(filters.chunk(chunk(&json!({}), &json!("stop"))));
        out.extend(filters.end(&mut exchange).await);
        // Nothing hides a letter here, so nothing is to be kept from them either.
        for chunk in &mut out {
            chunk["choices"][0]["logprobs"] = Value::Null;
        }
        let (text, _, finish) = joined(&out);
        let expected = if passes { (20 << 20, "stop") } else { (0, "content_filter") };
        assert_eq!((text.len(), finish.as_str().unwrap()), expected);
        assert!(script.asked.lock().unwrap().is_empty());
        assert_eq!(exchange.verdicts().iter().any(Verdict::is_silence), !passes);
    }
}

#[tokio::test]
async fn a_judge_upstream_is_paid_by_whom_it_judges_and_told_nothing_that_must_stay() {
    let double = upstream().await;
    let more = "action = \"block\"\non = [\"prompt\"]\ntemplate = \"verdict: {{ text }}\"\n";
    let (gateway, _folder) = gateway(&double, &judged("up/gpt-4.1", more)).await;
    let begin = async |text: &str, class: Option<&str>| {
        let mut exchange = gateway.begin(asked("acme", &body("base", text), class)).unwrap();
        let outcome = exchange.ask_about_prompt().await;
        (outcome, exchange)
    };
    let (outcome, mut exchange) = begin("please allow", None).await;
    outcome.unwrap();
    assert!(exchange.route(idle(), UnixMillis::now(), &local).await.is_ok());
    // 1000 prompt tokens at 2 and 500 completion tokens at 8 dollars a million.
    assert_eq!(standing(&gateway, "acme").await, (6_000_000, 0));
    let found = begin("please block", None).await.0.unwrap_err();
    assert!(matches!(found, GatewayError::Blocked { because: BlockedBecause::Found, .. }), "{found}");
    assert_eq!((standing(&gateway, "acme").await, double.num_calls.load(Ordering::SeqCst)), ((12_000_000, 0), 2));
    let silent = begin("please allow", Some("local-only")).await.0.unwrap_err();
    assert!(matches!(silent, GatewayError::Blocked { because: BlockedBecause::Silence, .. }), "{silent}");
    assert_eq!(double.num_calls.load(Ordering::SeqCst), 2, "not a byte");
}

#[tokio::test]
async fn a_judge_that_the_budget_does_not_cover_is_not_asked() {
    let double = upstream().await;
    let tables = judged("up/gpt-4.1", "action = \"block\"\non = [\"prompt\"]\ntemplate = \"verdict: {{ text }}\"\n");
    let (gateway, _folder) = gateway(&double, &tables.replace("usd_per_day = 1.0", "usd_per_day = 0.001")).await;
    let silent = ask(&gateway, asked("acme", &body("base", "please allow"), None)).await.unwrap_err();
    assert!(matches!(silent, GatewayError::Blocked { because: BlockedBecause::Silence, .. }), "{silent}");
    assert_eq!((double.num_calls.load(Ordering::SeqCst), standing(&gateway, "acme").await), (0, (0, 0)));
}

#[tokio::test]
async fn what_filters_do_not_know_does_not_pass_beside_them() {
    let secret = "the blue falcon";
    let message = json!({"role": "assistant", "content": "fine", "thinking_blocks": [{"thinking": secret}],
        "audio": {"transcript": secret}, "annotations": [{"title": secret}]});
    let whole = json!({"id": "a", "object": "chat.completion", "model": "m", "prompt_text": secret, "choices": [
        {"index": 0, "message": message, "text": secret, "content_filter_results": secret, "finish_reason": "stop"}]});
    let (gateway, _folder) = gateway(&upstream().await, PII).await;
    let mut exchange = gateway.begin(asked("acme", &body("base", "x"), None)).unwrap();
    let answer = exchange.filters().unwrap().whole(&mut exchange, whole).await.unwrap();
    let expected = json!({"id": "a", "object": "chat.completion", "model": "m", "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "fine"}, "finish_reason": "stop"}]});
    assert_eq!(answer, expected);

    let mut extra = chunk(&json!({"content": "fine", "thinking_blocks": [secret]}), &json!("stop"));
    extra["citations"] = json!([secret]);
    let (out, _) = filtered(PII, "x", vec![extra]).await;
    assert_eq!(joined(&out).0, "fine");
    assert!(!json!(out).to_string().contains("falcon"), "{out:?}");

    // What is called is the model's own words, too.
    let call = json!({"tool_calls": [{"index": 0, "id": "1", "type": "function",
        "function": {"name": "blue falcon", "arguments": "{}"}}]});
    let (out, _) = filtered(PII, "x", vec![chunk(&call, &Value::Null), chunk(&json!({}), &json!("stop"))]).await;
    assert_eq!(joined(&out).2, "content_filter");
    assert!(!json!(out).to_string().contains("falcon"), "{out:?}");
}

#[tokio::test]
async fn an_answer_in_two_places_passes_in_one() {
    let secret = "the blue falcon";
    let (gateway, _folder) = gateway(&upstream().await, PII).await;
    let whole = async |choices: Value| {
        let mut exchange = gateway.begin(asked("acme", &body("base", "x"), None)).unwrap();
        let answer = json!({"object": "chat.completion", "choices": choices});
        exchange.filters().unwrap().whole(&mut exchange, answer).await.unwrap().to_string()
    };
    let (fine, leak) = (json!({"content": "fine"}), json!({"content": secret}));
    for choices in [
        json!([{"index": 0, "message": fine, "delta": leak, "finish_reason": "stop"}]),
        json!([{"index": 0, "message": secret, "delta": secret, "text": "fine", "finish_reason": "stop"}]),
        json!([{"index": 0, "message": {"content": "fine", "reasoning": [{"text": secret}]}, "finish_reason": "stop"}]),
        json!([{"index": 0, "message": {"content": "fine", "tool_calls": [
            {"function": {"name": "f", "arguments": {"x": secret}}, "custom": secret}]}, "finish_reason": "stop"}]),
        json!([{"index": 0, "message": {"content": "fine", "function_call": {"name": "f", "more": secret}}, "finish_reason": "stop"}]),
        json!([{"index": 0, "message": fine, "finish_reason": "stop"}, {"index": 0, "message": leak, "finish_reason": "stop"}]),
    ] {
        let answer = whole(choices).await;
        assert!(answer.contains("fine") && !answer.contains("falcon"), "{answer}");
    }
    // Cumulative text beside the piece, as some servers stream.
    let mut both = chunk(&json!({"content": "fine"}), &Value::Null);
    both["choices"][0]["message"] = json!({"content": secret});
    let (out, _) = filtered(PII, "x", vec![both, chunk(&json!({}), &json!("stop"))]).await;
    assert_eq!(joined(&out).0, "fine");
    assert!(!json!(out).to_string().contains("falcon"));
}

/// Whoever reads a prompt is in the log, on this machine, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_local_judges_verdict_has_its_record() {
    let log = tempfile::tempdir().unwrap();
    let (path, key_file) = (log.path().join("log"), log.path().join("key"));
    std::fs::write(&key_file, "ab".repeat(32)).unwrap();
    let audit = format!("[audit]\npath = {path:?}\nkey_file = {key_file:?}\n");
    let tables = audit + &judged("local", "action = \"block\"\non = [\"prompt\"]\n");
    let (gateway, _folder) = gateway(&upstream().await, &tables).await;
    gateway.set_local_judge(Arc::new(Script::default()));
    let mut exchange = gateway.begin(asked("acme", &body("base", "please allow"), None)).unwrap();
    exchange.ask_about_prompt().await.unwrap();
    drop(exchange);
    gateway.close().await;
    let files = std::fs::read_dir(&path).unwrap().map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap());
    let text: String = files.collect();
    let record = text.lines().find(|line| line.contains("\"judged\"")).unwrap_or_else(|| panic!("{text}"));
    assert!(record.contains("\"to\":\"local\"") && record.contains("asks it as its judge"), "{record}");
    assert!(!text.contains("please allow"));
}
