//! `bindery route explain`: decisions that the contract's sentences ask for, made from a request's file.

use serde_json::{Value, json};

use crate::{
    gateway::Home,
    support::{Ended, TINY_LLAMA},
};

fn home() -> Home {
    Home::new(&format!(
        r#"
[model]
source = {TINY_LLAMA:?}
load_format = "dummy"
[[adapters]]
name = "support-fr"
source = "./adapter"
tenants = ["acme"]
[[upstreams]]
name = "openai"
kind = "openai"
models = ["gpt-4.1", "house-model"]
[[tenants]]
name = "acme"
privacy = "any"
guardrails = ["names"]
overflow = {{ when_ttft_over = "2s", to = "openai/gpt-4.1" }}
[[tenants]]
name = "vault"
privacy = "local-only"
[[guardrails]]
name = "names"
kind = "blocklist"
action = "route-local"
phrases = ["project kestrel"]
[[routes]]
model = "auto"
rules = [
  {{ when = {{ pii = true }}, to = "local" }},
  {{ when = {{ reasoning_effort = ["medium", "high"] }}, to = "openai/gpt-4.1" }},
  {{ when = {{ task = "summary", weekdays = ["sat"], time = "22:00-06:00" }}, to = "openai/house-model" }},
  {{ when = {{ language = "deu" }}, to = ["openai/gpt-4.1", "local"] }},
  {{ to = "local" }},
]
"#
    ))
}

fn ask(home: &Home, body: &Value, arguments: &[&str]) -> Ended {
    std::fs::write(home.folder.path().join("request.json"), body.to_string()).unwrap();
    home.run(&[&["route", "explain", "request.json"], arguments].concat())
}

fn decision(home: &Home, body: &Value, arguments: &[&str]) -> Value {
    let ended = ask(home, body, &[arguments, &["--json"]].concat());
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    serde_json::from_str(&ended.stdout).unwrap()
}

fn request(model: &str, text: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 5})
}

const ACME: [&str; 2] = ["--tenant", "acme"];

#[test]
fn rules_decide_on_what_stands_in_the_request() {
    let home = home();
    let hard = |text: &str| {
        let mut body = request("auto", text);
        body["reasoning_effort"] = json!("high");
        body
    };
    let german = "Die Bundesregierung hat gestern beschlossen, dass die neuen Regeln erst im nächsten Jahr gelten.";
    let saturday = ["--task", "summary", "--at", "2026-11-28T22:30:00Z"];
    for (body, more, expected) in [
        // The tenant's overflow stands behind the local model, for what is turned away there.
        (request("auto", "hello"), &[][..], &["local", "openai/gpt-4.1"][..]),
        (hard("hello"), &[], &["openai/gpt-4.1"]),
        (hard("write to jane.doe@example.com"), &[], &["local"]),
        (request("auto", "hello"), &saturday, &["openai/house-model"]),
        (
            request("auto", "hello"),
            &["--task", "summary", "--at", "2026-11-27T22:30:00Z"],
            &["local", "openai/gpt-4.1"],
        ),
        (request("auto", german), &["--prompt-tokens", "30"], &["openai/gpt-4.1", "local"]),
        (request("tiny-llama", "hello"), &[], &["tiny-llama", "openai/gpt-4.1"]),
        (request("support-fr", "hello"), &[], &["support-fr"]),
        (request("openai/gpt-4.1", "hello"), &[], &["openai/gpt-4.1"]),
        // Before it waits too long; the local model stays behind.
        (request("tiny-llama", "hello"), &["--ttft", "3s"], &["openai/gpt-4.1", "tiny-llama"]),
        (request("tiny-llama", "hello"), &["--ttft", "1s"], &["tiny-llama", "openai/gpt-4.1"]),
        (request("tiny-llama", "about Project Kestrel"), &["--ttft", "3s"], &["tiny-llama"]),
        (request("tiny-llama", "hello"), &["--ttft", "3s", "--privacy", "local-only"], &["tiny-llama"]),
    ] {
        let decided = decision(&home, &body, &[&ACME, more].concat());
        assert_eq!(decided["targets"], json!(expected), "{body} {more:?}: {decided:#}");
        assert!(!decided["why"].as_array().unwrap().is_empty());
    }
}

#[test]
fn what_may_not_leave_or_is_not_offered_is_refused_with_its_status() {
    let home = home();
    for (tenant, model, status) in
        [("vault", "openai/gpt-4.1", 403), ("vault", "support-fr", 404), ("acme", "nothing", 404)]
    {
        let decided = decision(&home, &request(model, "hello"), &["--tenant", tenant]);
        assert_eq!((&decided["targets"], &decided["refused"]["status"]), (&json!([]), &json!(status)), "{decided:#}");
    }
    // A request may tighten its class and never loosen it.
    let loosened = decision(&home, &request("openai/gpt-4.1", "hello"), &["--tenant", "vault", "--privacy", "any"]);
    assert_eq!(loosened["refused"]["status"], 403, "{loosened:#}");
}

#[test]
fn people_are_told_where_why_and_on_what_it_was_decided_without_the_text() {
    let home = home();
    let ended = ask(&home, &request("auto", "call me on jane.doe@example.com"), &ACME);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    for expected in [
        "A request for auto goes to:\n  1. the model served here (local)\n",
        "rule 1 of auto applies",
        "personal data: yes",
        "privacy: any",
        "local context: 256 tokens",
        "predicted local time to first token: not known",
    ] {
        assert!(ended.stdout.contains(expected), "{expected}: {}", ended.stdout);
    }
    assert!(!ended.stdout.contains("jane"), "{}", ended.stdout);
}

#[test]
fn requests_and_tenants_that_cannot_be_asked_about_are_told() {
    let home = home();
    let nobody = ask(&home, &request("auto", "hello"), &[]);
    assert_eq!((nobody.code, nobody.stdout.as_str()), (2, ""));
    assert!(nobody.stderr.contains("hint: give --tenant, one of acme, vault"), "{}", nobody.stderr);
    let stranger = ask(&home, &request("auto", "hello"), &["--tenant", "vaults"]);
    assert!(stranger.code == 2 && stranger.stderr.contains("did you mean \"vault\"?"), "{}", stranger.stderr);
    let no_model = ask(&home, &json!({"messages": [], "model": 5}), &ACME);
    assert!(no_model.code == 2 && no_model.stderr.contains("a model that is no name"), "{}", no_model.stderr);
    let base = ask(&home, &json!({"messages": []}), &ACME);
    assert!(base.code == 0 && base.stdout.contains("(local)"), "{}{}", base.stdout, base.stderr);
    std::fs::write(home.folder.path().join("broken.json"), "{").unwrap();
    for (file, expected) in [("broken.json", "is no JSON"), ("nowhere.json", "cannot read the request nowhere.json")] {
        let ended = home.run(&["route", "explain", file]);
        assert!(ended.code == 2 && ended.stderr.contains(expected), "{file}: {}", ended.stderr);
    }
}

#[test]
fn what_is_left_of_a_budget_is_read_from_the_store_and_a_target_without_a_price_is_named() {
    let home = Home::new(
        "[store]\nurl = \"sqlite://bindery.db\"\n[[upstreams]]\nname = \"up\"\nkind = \"openai\"\nmodels = [\"own\"]\n\
         [[tenants]]\nname = \"acme\"\nprivacy = \"any\"\nbudget = { usd_per_day = 5.0 }\n\
         [[routes]]\nmodel = \"auto\"\n\
         rules = [{ when = { budget_left_under = 6.0 }, to = \"up/own\" }, { to = \"local\" }]\n",
    );
    let decided = decision(&home, &request("auto", "hello"), &[]);
    assert_eq!((&decided["targets"], &decided["known"]["budget left"]), (&json!(["up/own"]), &json!("$5.00")));
    assert!(decided["notes"].to_string().contains("up/own has no price"), "{decided:#}");
}

#[test]
fn a_picture_goes_up_or_is_refused_by_its_field_as_in_a_server() {
    let home = home();
    let picture = |model: &str| {
        json!({"model": model, "messages": [{"role": "user", "content": [
            {"type": "text", "text": "hello"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        ]}]})
    };
    // The tenant has an overflow.
    let up = decision(&home, &picture("auto"), &ACME);
    assert_eq!(up["targets"], json!(["openai/gpt-4.1"]), "{up}");
    let refused = decision(&home, &picture("auto"), &["--tenant", "vault"]);
    assert_eq!(refused["refused"]["status"], 400);
    assert!(refused["refused"]["why"].as_str().unwrap().contains("messages[0].content[1] is image_url"), "{refused}");
}
