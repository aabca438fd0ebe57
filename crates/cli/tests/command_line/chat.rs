//! `chat` driven through pipes against a scripted server.

use std::{io::Write as _, process::Stdio};

use serde_json::json;

use crate::support::{Ended, Script, Server, bindery};

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
    if let Ok(saved) = std::fs::read_to_string(home.path().join("saved.json")) {
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
