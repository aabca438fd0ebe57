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
    assert!(ended.stdout.contains("smollm2-135m is the card of"), "{}", ended.stdout);
    assert!(ended.stdout.contains("bindery.toml is valid"), "{}", ended.stdout);
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
        ("[[tenants]]\nname = \"a\"\n", "bindery.toml:1: [tenants] is not in this version yet"),
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
    assert!(missing.stderr.contains("nowhere.toml"), "{}", missing.stderr);
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
