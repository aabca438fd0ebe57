//! Adapters from the command line and the config file: what a start is told, what it refuses, and `bindery adapters`
//! against a running server.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::{
    serving::Serving,
    support::{Ended, TINY_LLAMA, bindery, run},
};

fn adapters() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/adapters").canonicalize().unwrap()
}

/// NAME=PATH of one of them.
fn given(name: &str) -> String {
    format!("{name}={}", adapters().join(name).display())
}

/// `bindery adapters` against a server, with its admin key.
fn manage(serving: &Serving, arguments: &[&str]) -> Ended {
    let fixed = ["adapters", "--url", serving.url(), "--admin-key", "boss"];
    run(&[&fixed[..], arguments].concat())
}

#[test]
fn a_running_servers_adapters_are_listed_loaded_and_unloaded() {
    let root = adapters();
    let flags = ["--admin-key", "boss", "--adapter", &given("llama-qv")];
    let serving = Serving::start(&flags, &[]);
    let listed = manage(&serving, &["list"]);
    assert_eq!(listed.code, 0, "{}", listed.stderr);
    assert!(listed.stdout.starts_with("NAME "), "{}", listed.stdout);
    assert!(listed.stdout.lines().all(|line| line.chars().count() <= 80), "{}", listed.stdout);
    let row = listed.stdout.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>();
    assert_eq!(row[..5], ["llama-qv", "1", "host", "0", "8"], "{row:?}");
    assert_eq!(row.last(), Some(&"everyone"));

    // The folder that the first adapter lies in is open to loading.
    let loaded = manage(&serving, &["load", "patterns", "llama-patterns", "--pinned"]);
    let said = "Success: LoRA adapter 'patterns' added successfully.\n";
    assert_eq!((loaded.code, loaded.stdout.as_str()), (0, said), "{}", loaded.stderr);
    let json: Value = serde_json::from_str(&manage(&serving, &["list", "--json"]).stdout).unwrap();
    assert_eq!((&json["data"][1]["name"], &json["data"][1]["pinned"]), (&json!("patterns"), &json!(true)));
    assert!(manage(&serving, &["list"]).stdout.contains("resident, pinned"));
    let (status, answer) = serving.post(&json!({"model": "patterns", "prompt": [1, 2], "max_tokens": 2}));
    assert_eq!((status.as_u16(), &answer["model"]), (200, &json!("patterns")), "{answer}");

    let again = manage(&serving, &["load", "patterns", "llama-qv"]);
    assert_eq!((again.code, again.stdout.as_str()), (1, ""));
    assert!(again.stderr.contains("answered 400: the adapter \"patterns\" is there already"), "{}", again.stderr);
    let path = root.join("llama-qv").display().to_string();
    assert_eq!(manage(&serving, &["load", "patterns", &path, "--inplace"]).code, 0);
    let outside = manage(&serving, &["load", "x", TINY_LLAMA]);
    assert_eq!(outside.code, 1);
    assert!(outside.stderr.contains("403: there is no adapter at") && outside.stderr.contains(root.to_str().unwrap()));
    assert!(!outside.stderr.contains("hint:"), "the key is right: {}", outside.stderr);
    // Made for another base.
    let wrong = manage(&serving, &["load", "x", "qwen3-tied-head"]);
    assert_eq!(wrong.code, 1);
    assert!(wrong.stderr.contains("400: the adapter \"x\" cannot be loaded: "), "{}", wrong.stderr);
    // However long a reason is, it comes whole.
    let wrong = manage(&serving, &["load", "x", "mistral-layers"]);
    assert!(wrong.stderr.trim_end().ends_with("this adapter was made for another model"), "{}", wrong.stderr);

    let unloaded = manage(&serving, &["unload", "patterns", "--mode", "refuse"]);
    assert_eq!(unloaded.stdout, "Success: LoRA adapter 'patterns' removed successfully.\n", "{}", unloaded.stderr);
    let gone = manage(&serving, &["unload", "patterns", "--timeout-s", "1.5"]);
    assert_eq!(gone.code, 1);
    assert!(gone.stderr.contains("404: there is no adapter \"patterns\""), "{}", gone.stderr);
    assert_eq!(manage(&serving, &["list"]).stdout.lines().count(), 2, "the first one and the head");

    let stranger = run(&["adapters", "list", "--url", serving.url(), "--admin-key", "other"]);
    assert_eq!((stranger.code, stranger.stdout.as_str()), (1, ""));
    assert!(
        stranger.stderr.contains("403") && stranger.stderr.contains("hint: the key must be the server's admin key")
    );
}

#[test]
fn what_cannot_be_asked_is_said_before_anything_is_sent() {
    let no_key = run(&["adapters", "list"]);
    assert_eq!(no_key.code, 2);
    assert!(no_key.stderr.contains("hint: set BINDERY_ADMIN_KEY"), "{}", no_key.stderr);
    let no_server = run(&["adapters", "list", "--admin-key", "k", "--url", "http://127.0.0.1:9"]);
    assert_eq!(no_server.code, 1);
    assert!(no_server.stderr.contains("cannot connect to http://127.0.0.1:9"), "{}", no_server.stderr);
    assert!(no_server.stderr.contains("hint: start the server first, or give its URL"), "{}", no_server.stderr);
    let both = run(&["adapters", "unload", "x", "--mode", "refuse", "--timeout-s", "3", "--admin-key", "k"]);
    assert_eq!(both.code, 2);
    assert!(both.stderr.contains("--mode refuse does not wait"), "{}", both.stderr);
    let negative = run(&["adapters", "unload", "x", "--timeout-s", "-3", "--admin-key", "k"]);
    assert_eq!(negative.code, 2);
    assert!(negative.stderr.contains("expected a number of seconds, 0 or more"), "{}", negative.stderr);
}

/// `serve` and `check` with a config for the tiny model.
fn with_config(text: &str, verb: &[&str], environment: &[(&str, &str)]) -> Ended {
    let home = tempfile::tempdir().unwrap();
    let text = format!("{text}\n[model]\nsource = {TINY_LLAMA:?}\nload_format = \"dummy\"\nmax_loras = 1\n");
    std::fs::write(home.path().join("bindery.toml"), text).unwrap();
    bindery(home.path()).args(verb).envs(environment.iter().copied()).output().unwrap().into()
}

#[test]
fn what_a_config_says_wrongly_of_adapters_is_refused_by_check_and_serve_in_the_same_words() {
    let adapter = |name: &str, rest: &str| {
        format!("[[adapters]]\nname = {name:?}\nsource = {:?}\n{rest}\n", adapters().join("llama-qv"))
    };
    let tenant = "[[tenants]]\nname = \"acme\"\napi_key_env = \"ACME_KEY\"\n";
    for (text, environment, expected) in [
        (
            "[[adapters]]\nname = \"a\"\nsource = \"./nowhere\"\n".to_owned(),
            &[][..],
            "bindery.toml:1: there is no adapter \"./nowhere\"",
        ),
        (adapter("a", "") + &adapter("a", ""), &[], "bindery.toml:6: the adapter \"a\" is in line 1 already"),
        (adapter("tiny-llama", ""), &[], "bindery.toml:1: \"tiny-llama\" is the base's own name"),
        (
            adapter("a", "pinned = true") + &adapter("b", "pinned = true"),
            &[],
            "bindery.toml:5: 2 adapters are pinned and max_loras is 1",
        ),
        (
            adapter("a", "tenants = [\"acne\"]") + tenant,
            &[],
            "bindery.toml:1: the adapter \"a\" is for the tenant \"acne\"",
        ),
        (
            tenant.to_owned(),
            &[],
            "bindery.toml:1: the tenant \"acme\" has no key: the environment variable ACME_KEY is not set",
        ),
        (tenant.to_owned(), &[("ACME_KEY", "a,,b")], "the environment variable ACME_KEY is empty, or has an empty key"),
        (
            tenant.to_owned(),
            &[("ACME_KEY", "k"), ("BINDERY_API_KEY", "k")],
            "a key of the tenant \"acme\" is a key of everybody",
        ),
        (
            "[adapter_dir]\npath = \"nowhere\"\n".to_owned(),
            &[],
            "bindery.toml:1: the adapters' folder nowhere is not there",
        ),
        ("[server]\nadapter_root = \"nowhere\"\n".to_owned(), &[], "--adapter-root: nowhere: "),
        (
            adapter("a", ""),
            &[("BINDERY_ADAPTER", "a=org/repo")],
            "the adapter \"a\" is given twice: by --adapter a=org/repo and by bindery.toml:1",
        ),
        (String::new(), &[("BINDERY_ADAPTER", "a=./nowhere")], "--adapter a=./nowhere: there is no adapter"),
    ] {
        for verb in [&["check", "bindery.toml"][..], &["serve", "--config", "bindery.toml", "--port", "0"]] {
            let ended = with_config(&text, verb, environment);
            assert_eq!((ended.code, ended.stdout.as_str()), (2, ""), "{text}: {}", ended.stderr);
            assert!(ended.stderr.contains(expected), "{expected}: {}", ended.stderr);
            assert!(ended.stderr.contains("\nhint: "), "{expected}: {}", ended.stderr);
        }
    }
}

#[test]
fn check_says_what_a_config_of_adapters_means() {
    let text = format!(
        "[[adapters]]\nname = \"fr\"\nsource = {:?}\ntenants = [\"acme\"]\n\
         [[adapters]]\nname = \"hub\"\nsource = \"org/repo@v1\"\n\
         [adapter_dir]\npath = {:?}\nwatch = false\n\
         [[tenants]]\nname = \"acme\"\napi_key_env = \"ACME_KEY\"\n",
        adapters().join("llama-qv"),
        adapters()
    );
    let ended = with_config(&text, &["check", "bindery.toml"], &[("ACME_KEY", "k1,k2"), ("HF_HUB_OFFLINE", "0")]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    for expected in [
        &format!("Adapter fr: {}; for acme; read when first asked for.", adapters().join("llama-qv").display())[..],
        "Adapter hub: org/repo@v1, to be fetched first; for everyone; read when first asked for.",
        "(looked at once; for everyone): 15, falcon-40b, ",
        "Tenants with keys of their own: acme.",
        "Clients would have to send one of 2 keys of tenants.",
    ] {
        assert!(ended.stdout.contains(expected), "{expected}: {}", ended.stdout);
    }
    assert!(!ended.stdout.contains("k1"), "{}", ended.stdout);
    let explained = run(&["check", "--explain"]).stdout;
    for key in
        ["[[adapters]]", "# pinned: ", "[adapter_dir]", "# watch: ", "[[tenants]]", "# api_key_env: ", "# max_loras: "]
    {
        assert!(explained.contains(key), "{key}: {explained}");
    }
}

#[test]
fn an_adapter_that_cannot_be_had_or_read_fails_the_start() {
    let serve =
        |adapter: &str| run(&["serve", TINY_LLAMA, "--load-format", "dummy", "--port", "0", "--adapter", adapter]);
    let offline = serve("x=org/repo");
    assert_eq!(offline.code, 1);
    let expected =
        "error: cannot fetch the adapter \"x\": org/repo is not on this machine and the network may not be used";
    assert!(offline.stderr.contains(expected) && offline.stderr.contains("\nhint: "), "{}", offline.stderr);
    // Made for a base of another shape.
    let wrong = serve(&given("qwen3-tied-head"));
    assert_eq!(wrong.code, 1);
    assert!(wrong.stderr.contains("error: the adapter \"qwen3-tied-head\" cannot be loaded: "), "{}", wrong.stderr);
    assert!(!wrong.stderr.contains("ready: "), "{}", wrong.stderr);
}
