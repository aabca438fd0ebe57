//! Verbs, flags, exit codes, and the models that can be named.

use std::io::Write as _;

use crate::support::{Ended, bindery, run};

#[test]
fn unknown_flags_and_bad_values_are_usage_errors() {
    for arguments in [
        vec!["serve", "--no-such-flag"],
        vec!["serve", "--port", "70000"],
        vec!["serve", "--port", "-1"],
        vec!["serve", "--host", "http://x"],
        vec!["serve", "--dtype", "f64"],
        vec!["serve", "--quantize", "int3"],
        vec!["serve", "--kv-cache-dtype", "fp8"],
        vec!["serve", "--threads", "0"],
        vec!["serve", "--block-size", "0"],
        vec!["serve", "--max-num-seqs", "0"],
        vec!["serve", "--max-model-len", "0"],
        vec!["serve", "--kv-cache-memory", "lots"],
        vec!["serve", "--kv-cache-memory", "0"],
        vec!["serve", "--max-body-size", "lots"],
        vec!["serve", "--max-body-size", "0"],
        vec!["serve", "--shutdown-timeout", "soon"],
        vec!["serve", "--log-format", "xml"],
        vec!["serve", "--device", "tpu"],
        vec!["serve", "--load-format", "pickle"],
        vec!["serve", "--served-model-name", " "],
        vec!["serve", "a", "--model", "b"],
        vec!["serve", "--enable-prefix-caching"],
        vec!["serve", "--adapter", "a"],
        vec!["serve", "--lora-modules", "{\"name\": \"a\"}"],
        vec!["serve", "--max-loras", "0"],
        vec!["serve", "--max-lora-rank", "0"],
        vec!["serve", "--max-cpu-loras", "0"],
        vec!["adapters", "load", "a"],
        vec!["adapters", "unload", "a", "--mode", "hope"],
        vec!["adapters", "unload", "a", "--timeout-s", "-1"],
        vec!["bench", "--concurrency", "0"],
        vec!["bench", "--rate", "0"],
        vec!["bench", "--rate", "nan"],
        vec!["bench", "--concurrency", "1", "--rate", "1"],
        vec!["bench", "--compare-model", "x"],
        vec!["chat", "--temperature", "3"],
        vec!["perplexity"],
        vec!["perplexity", "--file", "x", "--ctx-size", "7"],
        vec!["perplexity", "--file", "x", "--chunks", "0"],
        vec!["perplexity", "--file", "x", "--chunks", "-2"],
        vec!["perplexity", "--file", "x", "--base=f64"],
        vec!["perplexity", "--file", "x", "--max-num-seqs", "1"],
        vec!["keys", "create"],
        vec!["keys", "create", "--tenant", "acme", "--expires", "soon"],
        vec!["keys", "revoke"],
        vec!["costs", "--by", "colour"],
        vec!["audit", "export", "--from", "soon"],
        vec!["route", "explain"],
        vec!["route", "explain", "x.json", "--privacy", "open"],
        vec!["route", "explain", "x.json", "--draw", "2"],
        vec!["pull"],
        vec!["check"],
        vec!["completions", "tcsh"],
        vec!["no-such-verb"],
    ] {
        let ended = run(&arguments);
        assert_eq!((ended.code, ended.stdout.as_str()), (2, ""), "{arguments:?}: {ended:?}");
        assert!(ended.stderr.starts_with("error:"), "{arguments:?}: {}", ended.stderr);
    }
}

#[test]
fn a_wrong_time_is_answered_with_what_is_expected_alone() {
    for time in ["bogus", "30", "5 parsecs", ""] {
        let ended = run(&["serve", "--shutdown-timeout", time]);
        assert_eq!(ended.code, 2, "{time}");
        let expected =
            format!("error: invalid value '{time}' for '--shutdown-timeout <TIME>': expected a time like 30s or 2m\n");
        assert!(ended.stderr.starts_with(&expected), "{}", ended.stderr);
    }
}

#[test]
fn cuda_is_refused_clearly() {
    for device in ["cuda", "cuda:1"] {
        let ended = run(&["serve", "--device", device]);
        assert_eq!(ended.code, 2);
        assert!(ended.stderr.contains("CUDA is not in this version yet"), "{}", ended.stderr);
    }
}

/// The flags of the contract that there are not; with the words that would follow them.
#[test]
fn what_comes_later_is_answered_by_its_name() {
    for flag in [
        &["--enable-prefix-caching"][..],
        &["--no-enable-prefix-caching"],
        &["--tensor-parallel-size", "1"],
        &["--gpu-memory-utilization=0.9"],
    ] {
        let ended = run(&[&["serve"], flag].concat());
        assert_eq!((ended.code, ended.stdout.as_str()), (2, ""), "{flag:?}: {}", ended.stderr);
        let name = flag[0].split('=').next().unwrap();
        let expected = format!("error: {name} is not in this version yet\nhint: ");
        assert!(ended.stderr.starts_with(&expected), "{flag:?}: {}", ended.stderr);
    }
}

/// Offline with an empty cache: were the model looked for first, that would be the error, and its code another.
#[test]
fn what_no_model_could_be_loaded_with_is_refused_before_one_is_fetched() {
    for verb in ["serve", "chat", "bench"] {
        for (flag, value, expected) in [
            ("--kv-cache-memory", "1EiB", "--kv-cache-memory 1 EiB is more than"),
            ("--device", "cuda", "CUDA is not in this version yet"),
        ] {
            let ended = run(&[verb, flag, value]);
            assert_eq!((ended.code, ended.stdout.as_str()), (2, ""), "{verb} {flag}: {}", ended.stderr);
            assert!(ended.stderr.contains(expected), "{verb} {flag}: {}", ended.stderr);
        }
    }
}

#[test]
fn help_and_version_go_to_stdout() {
    let help = run(&["--help"]);
    assert_eq!(help.code, 0);
    for verb in ["serve", "chat", "bench", "pull", "models", "adapters", "check", "completions"] {
        assert!(help.stdout.contains(verb), "{verb}");
    }
    let serve = run(&["serve", "--help"]);
    for flag in [
        "--host",
        "--port",
        "--kv-cache-memory",
        "--max-num-batched-tokens",
        "--api-key",
        "--max-body-size",
        "--shutdown-timeout",
        "--adapter <NAME=PATH>",
        "--max-cpu-loras",
        "[default: 8000]",
    ] {
        assert!(serve.stdout.contains(flag), "{flag}");
    }
    assert_eq!(run(&["--version"]).stdout, format!("bindery {}\n", env!("CARGO_PKG_VERSION")));
    let bare = run(&[]);
    assert_eq!(bare.code, 2);
    assert!(bare.stderr.contains("Usage:"), "{}", bare.stderr);
}

#[test]
fn nothing_is_coloured_where_no_person_reads() {
    for ended in [run(&["models"]), run(&["serve", "--nope"]), run(&["pull", "nope"])] {
        assert!(!ended.stdout.contains('\x1b') && !ended.stderr.contains('\x1b'), "{ended:?}");
    }
}

#[test]
fn completions_are_for_each_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let ended = run(&["completions", shell]);
        assert_eq!(ended.code, 0);
        assert!(ended.stdout.contains("serve") && ended.stdout.contains("max-num-seqs"), "{shell}");
    }
}

#[test]
fn an_unknown_model_is_answered_with_the_nearest_names() {
    for verb in ["serve", "pull", "chat", "bench"] {
        // A free port: the model is what fails.
        let arguments: Vec<&str> =
            if verb == "serve" { vec![verb, "smolm2", "--port", "0"] } else { vec![verb, "smolm2"] };
        let Ended { code, stdout, stderr } = run(&arguments);
        assert_eq!((code, stdout.as_str()), (1, ""), "{verb}: {stderr}");
        assert!(stderr.contains("error: there is no model card named `smolm2`; did you mean smollm2-135m"), "{stderr}");
        assert!(stderr.contains("\nhint: "), "{stderr}");
    }
}

#[test]
fn models_that_cannot_be_had_say_what_to_do() {
    for (model, expected) in [
        ("smollm2-135m", "the network may not be used"),
        ("org/repo", "the network may not be used"),
        ("./no-such-folder", "there is no file or folder ./no-such-folder"),
        ("no-such.gguf", "there is no file or folder no-such.gguf"),
        ("a/b/c", "is not a model"),
    ] {
        let ended = run(&["pull", model]);
        assert_eq!(ended.code, 1, "{model}");
        assert!(ended.stderr.contains(expected) && ended.stderr.contains("hint: "), "{model}: {}", ended.stderr);
    }
}

#[test]
fn a_file_that_is_no_model_fails_at_load_with_its_name() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("broken.gguf");
    std::fs::File::create(&path).unwrap().write_all(b"GGUF but not really").unwrap();
    for verb in ["serve", "chat", "bench"] {
        let mut command = bindery(home.path());
        command.args([verb, "./broken.gguf"]);
        if verb == "serve" {
            command.args(["--port", "0"]);
        }
        let ended = Ended::from(command.output().unwrap());
        assert_eq!((ended.code, ended.stdout.as_str()), (1, ""), "{verb}: {}", ended.stderr);
        assert!(ended.stderr.contains("error: cannot load ./broken.gguf"), "{verb}: {}", ended.stderr);
        assert_eq!(ended.stderr.matches("broken.gguf").count(), 1, "{verb}: {}", ended.stderr);
    }
}

#[test]
fn a_port_in_use_is_told_before_anything_is_fetched() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    // Offline with an empty cache: were the model looked for first, that would be the error.
    let ended = run(&["serve", "--port", &port]);
    assert_eq!(ended.code, 1);
    assert!(ended.stderr.contains(&format!("127.0.0.1:{port} is in use")), "{}", ended.stderr);
    assert!(ended.stderr.contains("hint: choose another port"), "{}", ended.stderr);
}

#[test]
fn an_open_server_is_warned_about_and_a_key_silences_it() {
    let warned = run(&["serve", "--host", "0.0.0.0", "--port", "0"]);
    assert!(warned.stderr.contains("warning: 0.0.0.0 can be reached from other machines"), "{}", warned.stderr);
    let silent = run(&["serve", "--host", "0.0.0.0", "--port", "0", "--api-key", "k"]);
    assert!(!silent.stderr.contains("warning"), "{}", silent.stderr);
    let local = run(&["serve", "--port", "0"]);
    assert!(!local.stderr.contains("warning"), "{}", local.stderr);
}

#[test]
fn an_empty_key_never_opens_a_server() {
    let home = tempfile::tempdir().unwrap();
    for (name, value) in [("BINDERY_API_KEY", ""), ("BINDERY_API_KEY", "a,,b"), ("BINDERY_ADMIN_KEY", " ")] {
        let ended = Ended::from(bindery(home.path()).args(["serve", "--port", "0"]).env(name, value).output().unwrap());
        assert_eq!(ended.code, 2, "{name}={value}: {}", ended.stderr);
        assert!(ended.stderr.contains("key is empty"), "{}", ended.stderr);
    }
}

#[test]
fn models_lists_cards_and_what_is_cached() {
    let ended = run(&["models"]);
    assert_eq!(ended.code, 0);
    for card in ["smollm2-135m *", "gemma3-270m", "llama3.2-1b", "mistral-7b", "98.4 MB", "Apache-2.0"] {
        assert!(ended.stdout.contains(card), "{card}: {}", ended.stdout);
    }
    assert!(ended.stdout.contains("gated: accept the licence"), "{}", ended.stdout);
    let json: serde_json::Value = serde_json::from_str(&run(&["models", "--json"]).stdout).unwrap();
    assert_eq!(json[0]["name"], "smollm2-135m");
    assert_eq!(json[0]["path"], serde_json::Value::Null);
}

#[test]
fn verify_and_remove_work_on_cached_cards() {
    let home = tempfile::tempdir().unwrap();
    std::fs::create_dir(home.path().join("cards")).unwrap();
    // sha256 of "hello\n"
    let card = "name = \"toy\"\ntitle = \"Toy\"\narchitecture = \"llama\"\nparameters = 1\ncontext = 8\nlicense = \"MIT\"\n\
        [file]\nname = \"toy.gguf\"\nsize = 6\nsha256 = \"5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03\"\n\
        [[sources]]\nkind = \"hub\"\nrepo = \"org/repo\"\nfile = \"toy.gguf\"\n";
    std::fs::write(home.path().join("cards/toy.toml"), card).unwrap();
    let go = |arguments: &[&str]| Ended::from(bindery(home.path()).args(arguments).output().unwrap());

    let missing = go(&["models", "verify", "toy"]);
    assert_eq!(missing.code, 1);
    assert!(
        missing.stderr.contains("toy is not cached") && missing.stderr.contains("bindery pull toy"),
        "{}",
        missing.stderr
    );

    let path = home.path().join("cache/models/toy/toy.gguf");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, "hello\n").unwrap();
    assert_eq!(go(&["pull", "toy"]).stdout, format!("{}\n", path.display()));
    assert!(go(&["models"]).stdout.contains(path.to_str().unwrap()));
    assert_eq!(go(&["models", "verify"]).stdout, "toy: good\n");

    std::fs::write(&path, "hellO\n").unwrap();
    let broken = go(&["models", "verify"]);
    assert_eq!(broken.code, 1);
    assert!(broken.stdout.starts_with("toy: broken: its digest is"), "{}", broken.stdout);

    assert_eq!(go(&["models", "remove", "toy"]).code, 0);
    assert!(!path.exists());
    assert_eq!(go(&["models", "remove", "toy"]).code, 1);
}

#[test]
fn a_cache_that_cannot_be_created_is_told_once_with_a_way_out() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("file"), "").unwrap();
    let cache = home.path().join("file/cache");
    for verb in [&["pull", "smollm2-135m"][..], &["serve", "--port", "0"]] {
        let mut command = bindery(home.path());
        let ended: Ended =
            command.args(verb).env("BINDERY_CACHE", &cache).env("HF_HUB_OFFLINE", "0").output().unwrap().into();
        assert_eq!((ended.code, ended.stdout.as_str()), (1, ""), "{}", ended.stderr);
        let lines: Vec<&str> = ended.stderr.lines().filter(|line| !line.starts_with("note: ")).collect();
        let [error, hint] = lines[..] else { panic!("an error and a hint: {}", ended.stderr) };
        let expected = format!("error: the cache folder {} cannot be created: ", cache.display());
        assert!(error.starts_with(&expected) && error.matches("os error").count() == 1, "{error}");
        assert!(hint.starts_with("hint: set BINDERY_CACHE to a folder"), "{hint}");
    }
}

/// Ten million zero bytes are found at a path, checked with a word about it, and are no model.
#[test]
fn what_is_told_of_a_fetch_is_json_where_the_log_is() {
    let home = tempfile::tempdir().unwrap();
    std::fs::create_dir(home.path().join("cards")).unwrap();
    let file = home.path().join("zeroes.gguf");
    std::fs::File::create(&file).unwrap().set_len(10_000_000).unwrap();
    let card = format!(
        "name = \"toy\"\ntitle = \"Toy\"\narchitecture = \"llama\"\nparameters = 1\ncontext = 8\nlicense = \"MIT\"\n\
         [file]\nname = \"zeroes.gguf\"\nsize = 10000000\n\
         sha256 = \"f5e02aa71e67f41d79023a128ca35bad86cf7b6656967bfe0884b3a3c4325eaf\"\n\
         [[sources]]\nkind = \"path\"\npath = {file:?}\n"
    );
    std::fs::write(home.path().join("cards/toy.toml"), card).unwrap();
    for format in ["text", "json"] {
        std::fs::remove_dir_all(home.path().join("cache")).ok();
        let mut command = bindery(home.path());
        let ended: Ended =
            command.args(["serve", "toy", "--port", "0", "--log-format", format]).output().unwrap().into();
        assert_eq!(ended.code, 1, "{}", ended.stderr);
        let is_of_the_end = |line: &str| line.starts_with("error: cannot load") || line.starts_with("hint: ");
        let lines: Vec<&str> = ended.stderr.lines().filter(|line| !is_of_the_end(line)).collect();
        if format == "text" {
            assert!(lines.iter().any(|line| line.ends_with(": 50 %")), "{}", ended.stderr);
            continue;
        }
        let events: Vec<serde_json::Value> =
            lines.iter().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line:?}"))).collect();
        assert!(events.iter().any(|event| event["bytes"] == 10_000_000), "{}", ended.stderr);
        assert!(events.iter().any(|event| event["percent"] == 50), "{}", ended.stderr);
    }
}
