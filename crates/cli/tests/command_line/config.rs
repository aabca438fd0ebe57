//! The config file: `check`, `--explain`, and who wins.

use crate::support::{Ended, bindery, run};

/// Runs with this config file in the working folder.
fn with_config(text: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Ended {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("bindery.toml"), text).unwrap();
    bindery(home.path()).args(arguments).envs(environment.iter().copied()).output().unwrap().into()
}

/// The row of a key in `check`'s table, its columns one blank apart.
fn row(stdout: &str, key: &str) -> String {
    let line =
        stdout.lines().find(|line| line.trim_start().starts_with(key)).unwrap_or_else(|| panic!("{key}: {stdout}"));
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn check_says_what_a_config_means() {
    let text = "[server]\nhost = \"0.0.0.0\"\nport = 9000\n[model]\nsource = \"smollm2-135m\"\nquantize = \"int8\"\n";
    let ended = with_config(text, &["check", "bindery.toml"], &[("BINDERY_MAX_NUM_SEQS", "17")]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert_eq!(row(&ended.stdout, "server.port"), "server.port 9000 file");
    assert_eq!(row(&ended.stdout, "model.max_num_seqs"), "model.max_num_seqs 17 environment (BINDERY_MAX_NUM_SEQS)");
    assert_eq!(row(&ended.stdout, "model.block_size"), "model.block_size 16 default");
    assert!(ended.stdout.contains("other machines could connect"), "{}", ended.stdout);
    assert!(ended.stdout.contains("It would serve smollm2-135m, the card of"), "{}", ended.stdout);
    assert!(ended.stdout.contains("bindery.toml is valid"), "{}", ended.stdout);
}

/// A small model without a tokenizer of its own, which random weights do not need. It was made for 256 tokens.
fn tiny_model(keys: &str) -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/checkpoints/tiny-llama");
    format!("[model]\nsource = {path:?}\nload_format = \"dummy\"\n{keys}\n")
}

#[test]
fn check_refuses_what_serve_refuses_in_the_same_words() {
    for (text, expected) in [
        ("[server]\nhost = \"no-such-host.invalid\"".to_owned(), "the host no-such-host.invalid has no address"),
        ("[server]\nhost = \"999.1.1.1\"".to_owned(), "the host 999.1.1.1 has no address"),
        // An address for documentation, which no machine has.
        ("[server]\nhost = \"192.0.2.1\"".to_owned(), "this machine has no address 192.0.2.1"),
        ("[model]\nsource = \"no-such-card\"".to_owned(), "there is no model card named `no-such-card`"),
        ("[model]\nsource = \"./nowhere\"".to_owned(), "there is no file or folder"),
        ("[model]\nsource = \"./bindery.toml\"".to_owned(), "bindery.toml"),
        ("[model]\nsource = \".\"".to_owned(), "holds no weights that can be used"),
        ("[model]\nbackend = \"reference\"\nquantize = \"int4\"".to_owned(), "the reference backend does not quantise"),
        (tiny_model("max_model_len = 257"), "--max-model-len is 257, this model was made for at most 256 tokens"),
        (tiny_model("kv_cache_memory = \"1 KiB\""), "of KV cache and there are 0 MiB"),
        (tiny_model("kv_cache_memory = \"1 PiB\""), "--kv-cache-memory 1 PiB is more than"),
        // Before the model is here, too.
        ("[model]\nkv_cache_memory = \"1 PiB\"".to_owned(), "--kv-cache-memory 1 PiB is more than"),
    ] {
        let check = with_config(&text, &["check", "bindery.toml"], &[]);
        let serve = with_config(&text, &["serve", "--config", "bindery.toml", "--port", "0"], &[]);
        for ended in [&check, &serve] {
            assert!(ended.stderr.contains(expected), "{text}: {} {}", ended.stdout, ended.stderr);
        }
        assert_eq!((check.code, check.stdout.as_str()), (serve.code, ""), "{text}: {}", check.stderr);
        assert!((1..=2).contains(&check.code), "{text}");
    }
}

#[test]
fn check_reads_the_model_where_it_is_and_says_what_it_did_not_look_at() {
    let here = with_config(&tiny_model("max_model_len = 100"), &["check", "bindery.toml"], &[]);
    assert_eq!(here.code, 0, "{}", here.stderr);
    assert!(here.stdout.contains("llama, contexts of up to 100 tokens."), "{}", here.stdout);
    assert!(here.stdout.contains("Not checked: whether the memory that is free"), "{}", here.stdout);
    assert!(here.stdout.ends_with("bindery.toml is valid\n"), "{}", here.stdout);
    let given = with_config(&tiny_model("kv_cache_memory = \"1 MiB\""), &["check", "bindery.toml"], &[]);
    assert!(given.stdout.contains("contexts of up to 256 tokens.") && !given.stdout.contains("Not checked"));
    for (offline, expected) in [("1", "the network may not be used"), ("0", "would be fetched first")] {
        let absent = with_config("", &["check", "bindery.toml"], &[("HF_HUB_OFFLINE", offline)]);
        assert_eq!(absent.code, 0, "{}", absent.stderr);
        assert!(absent.stdout.contains(expected), "{}", absent.stdout);
        assert!(absent.stdout.contains("Not checked, as that takes the files"), "{}", absent.stdout);
        assert!(absent.stdout.ends_with("is valid, as far as could be seen without the model's files\n"));
    }
}

#[test]
fn a_port_in_use_is_no_fault_of_a_config() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let text = format!("[server]\nport = {}\n", taken.local_addr().unwrap().port());
    let ended = with_config(&text, &["check", "bindery.toml"], &[]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(ended.stdout.contains("Another program is using this port now"), "{}", ended.stdout);
}

#[test]
fn an_ipv6_host_is_written_as_in_a_url() {
    let shown = with_config("[server]\nhost = \"::1\"\n", &["check", "bindery.toml"], &[]);
    if shown.code == 0 {
        assert!(shown.stdout.contains("It would listen on [::1]:8000."), "{}", shown.stdout);
    } else {
        assert!(shown.stderr.contains("::1"), "a machine without IPv6 says so: {}", shown.stderr);
    }
}

#[test]
fn a_bare_check_names_both_ways_on() {
    let ended = run(&["check"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (2, ""));
    assert!(ended.stderr.contains("`bindery check FILE`"), "{}", ended.stderr);
    assert!(ended.stderr.contains("hint: `bindery check --explain` documents every key"), "{}", ended.stderr);
}

#[test]
fn a_wrong_variable_is_told_as_one() {
    for (variable, value) in [
        ("BINDERY_PORT", "many"),
        ("BINDERY_HOST", "http://x"),
        ("BINDERY_KV_CACHE_MEMORY", "lots"),
        ("BINDERY_SHUTDOWN_TIMEOUT", "bogus"),
        ("BINDERY_SERVED_MODEL_NAME", "good, ,better"),
        ("BINDERY_OFFLINE", "maybe"),
    ] {
        for arguments in [&["check", "bindery.toml"][..], &["serve", "--config", "bindery.toml"]] {
            let ended = with_config("", arguments, &[(variable, value)]);
            assert_eq!((ended.code, ended.stdout.as_str()), (2, ""), "{variable}");
            let hint = format!("hint: the value comes from the environment variable {variable}\n");
            assert!(ended.stderr.starts_with("error: ") && ended.stderr.ends_with(&hint), "{}", ended.stderr);
        }
    }
    // A flag's own value is no variable's.
    for flag in [&["--port", "many"][..], &["--port=many"]] {
        let ended = with_config("", &[&["serve"][..], flag].concat(), &[("BINDERY_PORT", "many")]);
        assert_eq!(ended.code, 2);
        assert!(ended.stderr.contains("'many'") && !ended.stderr.contains("environment"), "{}", ended.stderr);
    }
}

#[test]
fn the_environment_wins_over_the_file_in_check_too() {
    let ended = with_config("[server]\nport = 9000\n", &["check", "bindery.toml"], &[("BINDERY_PORT", "9001")]);
    assert_eq!(row(&ended.stdout, "server.port"), "server.port 9001 environment (BINDERY_PORT), over the file");
}

#[test]
fn broken_configs_name_file_line_and_way_out() {
    for (text, expected) in [
        ("[server]\nprot = 1\n", "bindery.toml:2: in [server]: unknown key `prot`; did you mean `port`?"),
        ("[server]\nport = \"x\"\n", "bindery.toml:2: server.port must be a whole number"),
        ("[server\n", "bindery.toml:1: "),
        ("[[routes]]\nmodel = \"a\"\n", "bindery.toml:1: missing field `rules`"),
        ("[server]\napi_key = \"s3cret\"\n", "bindery.toml:2: `api_key`: a key itself is refused in a config file"),
    ] {
        for arguments in [&["check", "bindery.toml"][..], &["serve", "--config", "bindery.toml", "--port", "0"]] {
            let ended = with_config(text, arguments, &[]);
            assert_eq!((ended.code, ended.stdout.as_str()), (2, ""), "{text}: {}", ended.stderr);
            assert!(ended.stderr.contains(expected) && ended.stderr.contains("hint: "), "{text}: {}", ended.stderr);
            assert!(!ended.stderr.contains("s3cret"));
        }
    }
    let missing = run(&["check", "nowhere.toml"]);
    assert_eq!(missing.code, 2);
    assert!(missing.stderr.contains("nowhere.toml") && missing.stderr.contains("check the path"), "{}", missing.stderr);
}

#[test]
fn a_config_in_another_encoding_is_told_apart_from_a_wrong_path() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("bindery.toml"), b"[model]\nsource = \"mod\xe8le\"\n").unwrap();
    let ended = Ended::from(bindery(home.path()).args(["check", "bindery.toml"]).output().unwrap());
    assert_eq!((ended.code, ended.stdout.as_str()), (2, ""));
    let expected = "error: bindery.toml:2: the config file is not UTF-8: byte 0xe8 begins no character\n\
                    hint: save it as UTF-8, the encoding of TOML\n";
    assert_eq!(ended.stderr, expected);
}

#[test]
fn explain_documents_every_key_that_check_shows() {
    let explained = run(&["check", "--explain"]).stdout;
    let shown = with_config("", &["check", "bindery.toml"], &[]).stdout;
    let keys: Vec<&str> =
        shown.lines().filter_map(|line| line.split_whitespace().next()).filter(|word| word.contains('.')).collect();
    let keys: Vec<&str> =
        keys.into_iter().filter(|key| key.starts_with("server.") || key.starts_with("model.")).collect();
    assert!(keys.len() >= 19, "{shown}");
    for key in keys {
        let name = key.split_once('.').unwrap().1;
        assert!(explained.contains(&format!("# {name}: ")), "{key}");
        assert!(explained.contains(&format!("--{}", name.replace('_', "-"))) || name == "source", "{key}");
    }
}

/// Which port `serve` tries is seen by taking one and asking whether it is the one in use.
#[test]
fn flags_win_over_environment_over_file() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let serve = |file: &str, environment: Option<&str>, flag: Option<&str>| {
        let mut arguments = vec!["serve", "--config", "bindery.toml"];
        arguments.extend(flag.iter().flat_map(|port| ["--port", port]));
        let environment: Vec<(&str, &str)> = environment.iter().map(|port| ("BINDERY_PORT", *port)).collect();
        with_config(&format!("[server]\nport = {file}\n"), &arguments, &environment).stderr.contains("is in use")
    };
    assert!(serve(&port, None, None), "the file counts");
    assert!(serve("0", Some(&port), None), "the environment wins over the file");
    assert!(!serve(&port, Some("0"), None), "the environment wins over the file");
    assert!(serve("0", Some("0"), Some(&port)), "a flag wins over both");
    assert!(!serve(&port, Some(&port), Some("0")), "a flag wins over both");
}

#[test]
fn the_model_of_flag_environment_and_file() {
    let text = "[model]\nsource = \"from-file\"\n";
    let named = |arguments: &[&str], environment: &[(&str, &str)]| {
        let mut all = vec!["serve", "--config", "bindery.toml", "--port", "0"];
        all.extend(arguments);
        with_config(text, &all, environment).stderr
    };
    assert!(named(&[], &[]).contains("`from-file`"));
    assert!(named(&[], &[("BINDERY_MODEL", "from-environment")]).contains("`from-environment`"));
    assert!(named(&["from-argument"], &[("BINDERY_MODEL", "from-environment")]).contains("`from-argument`"));
    assert!(named(&["--model", "from-flag"], &[("BINDERY_MODEL", "from-environment")]).contains("`from-flag`"));
}
