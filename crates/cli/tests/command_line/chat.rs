//! `chat` driven through pipes, against a scripted server and with a small model of its own.

use std::{fs, io::Write as _, path::Path, process::Stdio};

use serde_json::{Map, Value, json};

use crate::support::{Ended, Script, Server, TINY_LLAMA, bindery};

/// Types these lines, then ends the input.
fn talk(arguments: &[&str], lines: impl AsRef<[u8]>) -> Ended {
    let home = tempfile::tempdir().unwrap();
    let mut child = bindery(home.path())
        .arg("chat")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Who has refused a line reads no further.
    let _ = child.stdin.take().unwrap().write_all(lines.as_ref());
    let ended = Ended::from(child.wait_with_output().unwrap());
    if let Ok(saved) = fs::read_to_string(home.path().join("saved.json")) {
        return Ended { stderr: format!("{}{saved}", ended.stderr), ..ended };
    }
    ended
}

fn script() -> Script {
    Script { pieces: vec!["Hel", "lo, ", "wörld"], ..Script::default() }
}

#[test]
fn each_line_is_a_turn_and_only_answers_are_printed() {
    let server = Server::start(script());
    let ended =
        talk(&["--url", &server.url, "--system", "Be brief.", "--temperature", "0", "--seed", "5"], "hi\n\nand now?\n");
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "Hello, wörld\nHello, wörld\n"), "{}", ended.stderr);
    assert_eq!(ended.stderr, "");
    let asked = server.asked();
    assert_eq!(asked.len(), 2);
    // The second turn carries the conversation.
    assert_eq!(
        asked[1].1["messages"],
        json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "Hello, wörld"},
            {"role": "user", "content": "and now?"},
        ])
    );
    assert_eq!(
        (&asked[0].1["model"], &asked[0].1["seed"], &asked[0].1["temperature"]),
        (&"scripted".into(), &5.into(), &0.0.into())
    );
}

#[test]
fn commands_change_the_conversation_and_are_not_sent() {
    let server = Server::start(script());
    let ended = talk(
        &["--url", &server.url, "--max-tokens", "9", "a-name"],
        "/system Speak French.\none\n/clear\n/nonsense\ntwo\n/save saved.json\n/quit\nnever said\n",
    );
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let asked = server.asked();
    assert_eq!(asked.len(), 2);
    assert_eq!(
        asked[1].1["messages"],
        json!([{"role": "system", "content": "Speak French."}, {"role": "user", "content": "two"}])
    );
    assert_eq!((&asked[1].1["model"], &asked[1].1["max_tokens"]), (&"a-name".into(), &9.into()));
    assert!(ended.stderr.contains("/nonsense is no command"), "{}", ended.stderr);
    assert!(ended.stderr.contains("Hello, wörld"), "the saved file holds the answer: {}", ended.stderr);
}

#[test]
fn help_lists_the_commands() {
    let server = Server::start(script());
    let ended = talk(&["--url", &server.url], "/help\n");
    for command in ["/clear", "/system", "/save", "/quit"] {
        assert!(ended.stderr.contains(command), "{}", ended.stderr);
    }
}

#[test]
fn a_failing_turn_ends_a_piped_chat_with_its_reason() {
    let server = Server::start(Script { refuse_every: Some(2), ..script() });
    let ended = talk(&["--url", &server.url], "one\ntwo\nthree\n");
    assert_eq!((ended.code, ended.stdout.as_str()), (1, "Hello, wörld\n"));
    assert!(ended.stderr.contains("error: 503: the queue is full"), "{}", ended.stderr);
    assert_eq!(server.asked().len(), 2);

    let cut = Server::start(Script { cuts: true, ..script() });
    let ended = talk(&["--url", &cut.url], "one\n");
    assert_eq!(ended.code, 1);
    assert!(ended.stderr.contains("the stream was cut"), "{}", ended.stderr);
}

#[test]
fn a_line_that_cannot_be_a_turn_is_named_by_its_number() {
    let server = Server::start(script());
    let ended = talk(&["--url", &server.url], b"one\nca\xe7a\n");
    assert_eq!((ended.code, ended.stdout.as_str()), (1, "Hello, wörld\n"));
    let expected = "error: line 2 of the input is not UTF-8: byte 0xe7 at its place 3 begins no character\n\
                    hint: convert it first, for example with iconv\n";
    assert_eq!(ended.stderr, expected);

    // The longest line there may be ends in a character of two bytes.
    let longest = format!("{}ä", "x".repeat((1 << 20) - 2));
    let ended = talk(&["--url", &server.url], &longest);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let ended = talk(&["--url", &server.url], format!("x{longest}\n"));
    assert_eq!((ended.code, ended.stdout.as_str()), (1, ""));
    assert!(ended.stderr.contains("line 1 of the input has more than 1048576 bytes"), "{}", ended.stderr);
}

#[test]
fn a_key_is_asked_for_by_name_and_nobody_there_is_a_clear_error() {
    let server = Server::start(Script { key: Some("k2"), ..script() });
    let ended = talk(&["--url", &server.url], "hi\n");
    assert_eq!(ended.code, 1);
    assert!(ended.stderr.contains("hint: give the server's key"), "{}", ended.stderr);
    assert_eq!(talk(&["--url", &server.url, "--api-key", "k2,other"], "hi\n").stdout, "Hello, wörld\n");

    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let ended = talk(&["--url", &format!("http://{unused}")], "hi\n");
    assert_eq!(ended.code, 1);
    assert!(ended.stderr.contains("cannot connect to") && ended.stderr.contains("bindery serve"), "{}", ended.stderr);
}

/// Token 5 as the word w5.
fn words(tokens: &Value) -> Vec<String> {
    tokens.as_array().unwrap().iter().map(|token| format!("w{token}")).collect()
}

/// The small checkpoint with a tokenizer of its 128 words, and a template that puts what was said as it is.
fn speaking_checkpoint(folder: &Path) {
    for file in ["config.json", "model.safetensors"] {
        fs::copy(Path::new(TINY_LLAMA).join(file), folder.join(file)).unwrap();
    }
    let vocabulary: Map<String, Value> = (0..128).map(|id| (format!("w{id}"), id.into())).collect();
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let template = "{% for message in messages %}{{ message.content }}\n{% endfor %}";
    fs::write(folder.join("tokenizer_config.json"), json!({"chat_template": template}).to_string()).unwrap();
}

#[test]
fn a_model_in_this_process_says_what_transformers_says() {
    let folder = tempfile::tempdir().unwrap();
    speaking_checkpoint(folder.path());
    let golden: Value =
        serde_json::from_str(&fs::read_to_string(Path::new(TINY_LLAMA).join("golden.json")).unwrap()).unwrap();
    let prompt = &golden["prompts"][0];
    let (said, answer) = (words(&prompt["tokens"]).join(" "), words(&prompt["greedy"]));
    let (num_tokens, expected) = (answer.len().to_string(), answer.concat());
    let model = folder.path().to_str().unwrap();
    let ended = talk(
        &[model, "--temperature", "0", "--max-tokens", &num_tokens, "--dtype", "f32", "--threads", "1"],
        format!("{said}\n/save saved.json\n/clear\n{said}\n"),
    );
    assert_eq!((ended.code, ended.stdout), (0, format!("{expected}\n{expected}\n")), "{}", ended.stderr);
    assert!(ended.stderr.contains(&expected), "the saved file holds the answer: {}", ended.stderr);
}

#[test]
fn through_an_adapter_it_says_what_peft_says() {
    let folder = tempfile::tempdir().unwrap();
    speaking_checkpoint(folder.path());
    let adapter = Path::new(TINY_LLAMA).join("../../adapters/llama-qv");
    let golden: Value = serde_json::from_str(&fs::read_to_string(adapter.join("golden.json")).unwrap()).unwrap();
    let prompt = &golden["prompts"][0];
    let (said, answer) = (words(&prompt["tokens"]).join(" "), words(&prompt["greedy"]));
    let (model, num_tokens) = (folder.path().to_str().unwrap(), answer.len().to_string());
    let given = format!("qv={}", adapter.display());
    let flags = ["--temperature", "0", "--max-tokens", &num_tokens, "--dtype", "f32", "--threads", "1"];
    let ended = talk(&[&[model, "--adapter", &given], &flags[..]].concat(), format!("{said}\n"));
    assert_eq!((ended.code, ended.stdout), (0, format!("{}\n", answer.concat())), "{}", ended.stderr);

    let missing = talk(&[model, "--adapter", "x=./nowhere"], "hi\n");
    assert_eq!((missing.code, missing.stdout.as_str()), (2, ""), "{}", missing.stderr);
    assert!(missing.stderr.contains("--adapter x=./nowhere: there is no adapter"), "{}", missing.stderr);
}

#[test]
fn a_model_in_this_process_without_a_template_says_so() {
    let ended = talk(&[TINY_LLAMA, "--load-format", "dummy", "--threads", "1"], "hi\n");
    assert_eq!((ended.code, ended.stdout.as_str()), (1, ""));
    assert!(ended.stderr.contains("error: this model has no chat template"), "{}", ended.stderr);
}
