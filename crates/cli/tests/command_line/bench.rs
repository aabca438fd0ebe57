//! `bench` against a scripted server: what it sends, what it counts, what it says when it fails. And once with a small
//! model of its own.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::support::{Ended, Script, Server, TINY_LLAMA, run};

fn script() -> Script {
    Script { pieces: vec!["one", " two", " three"], usage: Some((7, 4)), ..Script::default() }
}

/// Runs it against a server; `flags` are separated by blanks.
fn bench(server: &Server, flags: &str) -> Ended {
    run(&["bench", "--url", &server.url].into_iter().chain(flags.split_whitespace()).collect::<Vec<_>>())
}

fn report_of(ended: &Ended) -> Value {
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    serde_json::from_str(&ended.stdout).unwrap()
}

#[test]
fn every_request_is_sent_once_and_counted_by_usage() {
    let server = Server::start(script());
    let ended =
        bench(&server, "--concurrency 1,4 --num-requests 6 --rounds 2 --output-tokens 4 --input-words 5 --json");
    let report = report_of(&ended);
    for (row, clients) in report["rows"].as_array().unwrap().iter().zip([1, 4]) {
        assert_eq!(row["load"]["clients"], clients);
        assert_eq!((&row["answered"], &row["failed"]), (&12.into(), &0.into()));
        assert_eq!((&row["mean_prompt_tokens"], &row["mean_output_tokens"]), (&7.0.into(), &4.0.into()));
        assert_eq!(row["output_tokens_per_second_by_round"].as_array().unwrap().len(), 2);
        assert!(row["ttft_ms"]["p50"].as_f64().unwrap() <= row["e2e_ms"]["p50"].as_f64().unwrap());
    }
    // One to warm up, then 2 loads x 2 rounds x 6.
    let asked = server.asked();
    assert_eq!(asked.len(), 25);
    let prompts: BTreeSet<&str> = asked.iter().map(|(_, body)| body["prompt"].as_str().unwrap()).collect();
    assert_eq!(prompts.len(), 25, "no prompt is sent twice");
    for (route, body) in &asked {
        assert_eq!(route, "completions");
        assert_eq!(body["prompt"].as_str().unwrap().split(' ').count(), 5);
        assert_eq!((&body["temperature"], &body["max_tokens"]), (&0.0.into(), &4.into()));
        assert_eq!((&body["ignore_eos"], &body["stream"]), (&true.into(), &true.into()));
        assert_eq!(body["model"], "scripted");
    }
}

#[test]
fn requests_are_spread_over_adapters_in_turns() {
    let (a, b) = (Server::start(script()), Server::start(script()));
    let flags = format!("--adapters fr,de --compare {} --concurrency 1 --num-requests 4 --rounds 1 --json", b.url);
    let report = report_of(&bench(&a, &flags));
    assert_eq!(report["servers"][0]["model"], "fr, de", "{report}");
    let asked: Vec<String> = a.asked().iter().map(|(_, body)| body["model"].as_str().unwrap().to_owned()).collect();
    assert_eq!(asked.len(), 6, "each name once to warm up, then the requests");
    assert_eq!(asked[2..], ["fr", "de", "fr", "de"]);
    assert!(asked[..2].contains(&"fr".to_owned()) && asked[..2].contains(&"de".to_owned()), "{asked:?}");
    assert!(b.asked().iter().all(|(_, body)| body["model"] == "scripted"));
}

#[test]
fn without_usage_pieces_are_counted() {
    let server = Server::start(Script { usage: None, ..script() });
    let ended =
        bench(&server, "--concurrency 1 --num-requests 2 --rounds 1 --output-tokens 3 --temperature 0.5 --json");
    let report = report_of(&ended);
    assert_eq!(report["rows"][0]["mean_output_tokens"], 3.0);
    assert_eq!(report["settings"]["temperature"], 0.5, "{report}");
    assert!(server.asked().iter().all(|(_, body)| body["temperature"] == 0.5));
}

#[test]
fn failures_are_counted_and_quoted() {
    let server = Server::start(Script { refuse_every: Some(5), ..script() });
    let arguments = "--concurrency 2 --num-requests 10 --rounds 1 --output-tokens 4 --json";
    let ended = bench(&server, arguments);
    let report = report_of(&ended);
    // Requests 5 and 10 of all 11, the first of which warms up.
    assert_eq!((&report["rows"][0]["answered"], &report["rows"][0]["failed"]), (&8.into(), &2.into()));
    assert_eq!(report["rows"][0]["failures"]["503: the queue is full"], 2);
    assert!(ended.stderr.contains("2 failed: 503: the queue is full"), "{}", ended.stderr);
}

#[test]
fn an_open_loop_sends_all_of_its_requests() {
    let server = Server::start(script());
    let ended = bench(&server, "--rate 500,1000 --num-requests 20 --rounds 1 --output-tokens 4 --json");
    let report = report_of(&ended);
    assert_eq!(report["rows"][0]["load"]["requests_per_second"], 500.0);
    for row in report["rows"].as_array().unwrap() {
        assert_eq!(row["answered"], 20);
    }
    assert_eq!(server.asked().len(), 41);
}

#[test]
fn the_table_has_a_row_a_load_and_names_what_was_sent() {
    let server = Server::start(script());
    let ended = bench(&server, "--concurrency 1,2 --num-requests 2 --rounds 1 --output-tokens 4");
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    for expected in ["OUT TOK/S", "TTFT ms", "ITL ms", "E2E s", "scripted at", "110 words in (7 tokens), 4 tokens out"]
    {
        assert!(ended.stdout.contains(expected), "{expected}: {}", ended.stdout);
    }
    assert!(!ended.stderr.contains("warning"), "{}", ended.stderr);
}

#[test]
fn answers_of_another_length_are_warned_about() {
    let server = Server::start(script());
    let ended = bench(&server, "--concurrency 1 --num-requests 2 --rounds 1 --output-tokens 64");
    assert!(ended.stderr.contains("answers have 4.0 tokens on average instead of 64"), "{}", ended.stderr);
}

#[test]
fn two_servers_take_turns_with_the_same_prompts() {
    let (a, b) = (Server::start(script()), Server::start(script()));
    let ended =
        bench(&a, &format!("--compare {} --concurrency 1 --num-requests 3 --rounds 2 --output-tokens 4", b.url));
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(ended.stdout.contains("A/B") && ended.stdout.contains("x "), "{}", ended.stdout);
    let prompts = |server: &Server| server.asked().iter().map(|(_, body)| body["prompt"].clone()).collect::<Vec<_>>();
    assert_eq!(prompts(&a).len(), 7);
    assert_eq!(prompts(&a), prompts(&b));
}

#[test]
fn a_server_that_refuses_ignore_eos_is_told_apart_and_can_be_tested() {
    let server = Server::start(Script { refuses_ignore_eos: true, ..script() });
    let arguments = "--concurrency 1 --num-requests 1 --rounds 1 --output-tokens 4";
    let refused = bench(&server, arguments);
    assert_eq!(refused.code, 1);
    assert!(
        refused.stderr.contains("unknown field ignore_eos") && refused.stderr.contains("--no-ignore-eos"),
        "{}",
        refused.stderr
    );
    assert_eq!(bench(&server, &format!("{arguments} --no-ignore-eos")).code, 0);
}

#[test]
fn a_bad_request_is_hinted_at_by_what_the_server_said() {
    let hint = |error: Value| {
        let ended = bench(&Server::start(Script { bad_request: Some(error), ..script() }), "--concurrency 1");
        assert_eq!(ended.code, 1, "{}", ended.stderr);
        ended.stderr.lines().find_map(|line| line.strip_prefix("hint: ").map(str::to_owned))
    };
    let shorten = Some("ask for less with --input-words or --output-tokens".to_owned());
    assert_eq!(hint(json!({"message": "64 tokens are the limit", "code": "context_length_exceeded"})), shorten);
    // As vLLM says it, whose code is a number.
    let words = "This model's maximum context length is 64 tokens. However, you requested 174 tokens.";
    assert_eq!(hint(json!({"message": words, "code": 400})), shorten);
    let refused = hint(json!({"message": "extra fields not permitted: ignore_eos"}));
    assert!(refused.is_some_and(|hint| hint.contains("--no-ignore-eos")));
    assert_eq!(hint(json!({"message": "stream_options is not known"})), None);
}

#[test]
fn the_chat_route_can_be_tested_and_the_key_is_sent() {
    let server = Server::start(Script { key: Some("k"), ..script() });
    let base = "--concurrency 1 --num-requests 1 --rounds 1 --output-tokens 4";
    let refused = bench(&server, base);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("hint: give the server's key"), "{}", refused.stderr);
    let ended = bench(&server, &format!("{base} --api-key k --endpoint chat"));
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(server.asked().iter().all(|(route, body)| route == "chat" && body["messages"][0]["role"] == "user"));
}

#[test]
fn nobody_there_is_a_clear_error() {
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let ended = run(&["bench", "--url", &format!("http://{unused}")]);
    assert_eq!(ended.code, 1);
    assert!(ended.stderr.contains("cannot connect to") && ended.stderr.contains("hint: "), "{}", ended.stderr);
    let nonsense = run(&["bench", "--url", "localhost:8000"]);
    assert_eq!(nonsense.code, 2);
    assert!(nonsense.stderr.contains("is not the URL of a server"), "{}", nonsense.stderr);
}

#[test]
fn a_stream_that_is_cut_has_failed() {
    let server = Server::start(Script { cuts: true, ..script() });
    let ended = bench(&server, "--concurrency 1 --num-requests 2");
    assert_eq!(ended.code, 1);
    assert!(ended.stderr.contains("it ended without [DONE]"), "{}", ended.stderr);
}

#[test]
fn a_profile_of_another_server_is_refused_by_name() {
    let server = Server::start(script());
    let ended = run(&["bench", "--url", &server.url, "--profile"]);
    assert_eq!(ended.code, 1, "{}", ended.stderr);
    assert!(ended.stderr.contains("--profile needs a Bindery as the first server"), "{}", ended.stderr);
}

#[test]
fn a_model_in_this_process_is_served_measured_and_stopped() {
    let flags = "--load-format dummy --threads 1 --concurrency 1,3 --num-requests 6 --rounds 2 --input-words 4 \
                 --output-tokens 5 --profile";
    let arguments =
        |more| ["bench", TINY_LLAMA].into_iter().chain(flags.split_whitespace()).chain(more).collect::<Vec<_>>();
    let ended = run(&arguments(Some("--json")));
    let report = report_of(&ended);
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        assert_eq!((&row["answered"], &row["failed"]), (&12.into(), &0.into()), "{row}");
        assert_eq!(row["mean_output_tokens"], 5.0, "{row}");
    }
    let is_about_the_model = |line: &str| line.starts_with("tiny-llama: ") && line.ends_with(" KV blocks");
    assert!(ended.stderr.lines().any(is_about_the_model), "{}", ended.stderr);
    let ended = run(&arguments(None));
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    for expected in ["OUT TOK/S", "tiny-llama at http://127.0.0.1:", "4 words in (", "5 tokens out"] {
        assert!(ended.stdout.contains(expected), "{expected}: {}", ended.stdout);
    }
    let (header, phases) = phases_of(&ended.stdout);
    assert_eq!(header, "PHASE 1 clients: ms a step, share 3 clients: ms a step, share");
    assert_eq!(phases.iter().map(|(name, _)| *name).collect::<Vec<_>>(), STEP_PHASES, "{}", ended.stdout);
    for column in 0..2 {
        // "1.234 56.7 %", one after the other.
        let shares = phases.iter().map(|(_, cells)| cells[3 * column + 1].parse::<f64>().unwrap());
        let sum: f64 = shares.sum();
        assert!((99.0..101.0).contains(&sum), "{sum} % of {}", ended.stdout);
    }
}

const STEP_PHASES: [&str; 10] =
    ["commands", "schedule", "embed", "qkv", "attention", "output", "mlp", "head", "sample", "emit"];

/// With single blanks.
fn words_of(line: Option<&str>) -> String {
    line.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The header of the last table with a row for each phase, and the words of each row after its phase.
fn phases_of(stdout: &str) -> (String, Vec<(&str, Vec<&str>)>) {
    let start = stdout.rfind("PHASE").unwrap_or_else(|| panic!("no phases: {stdout}"));
    let mut lines = stdout[start..].lines();
    let header = words_of(lines.next());
    let rows = lines.map_while(|line| {
        let mut words = line.split_whitespace();
        words.next().filter(|name| STEP_PHASES.contains(name)).map(|name| (name, words.collect()))
    });
    (header, rows.collect())
}

#[test]
fn roofs_are_taken_beside_each_load_and_every_phase_has_its_share_or_none() {
    let flags = "--load-format dummy --threads 1 --concurrency 1,2 --num-requests 4 --rounds 1 --input-words 4 \
                 --output-tokens 5 --roofline";
    let arguments =
        |more| ["bench", TINY_LLAMA].into_iter().chain(flags.split_whitespace()).chain(more).collect::<Vec<_>>();
    let ended = run(&arguments(None));
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let table = ended.stdout.split("what the machine could do").nth(1).unwrap_or_else(|| panic!("{}", ended.stdout));
    let mut lines = table.lines().skip(2);
    assert_eq!(words_of(lines.next()), "LOAD GB/s read GOP/s int8 GFLOP/s f32", "{table}");
    for load in ["1 clients", "2 clients"] {
        let roofs = lines.next().and_then(|line| line.strip_prefix(load)).unwrap_or_else(|| panic!("{load}: {table}"));
        let roofs: Vec<f64> = roofs.split_whitespace().map(|roof| roof.parse().unwrap()).collect();
        assert!(roofs.len() == 3 && roofs.iter().all(|roof| *roof > 0.0), "{load}: {table}");
    }
    let (header, phases) = phases_of(table);
    assert_eq!(header, "PHASE 1 clients: MB, share of 2 clients: MB, share of");
    assert_eq!(phases.iter().map(|(name, _)| *name).collect::<Vec<_>>(), STEP_PHASES, "{table}");
    for (phase, cells) in phases {
        if ["qkv", "attention", "output", "mlp", "head"].contains(&phase) {
            // "1.5 12 % memory" for each load.
            assert!(cells.len() == 8 && cells[2] == "%" && cells[6] == "%", "{phase}: {table}");
            assert!(["memory", "compute"].contains(&cells[3]), "{phase}: {table}");
        } else {
            assert_eq!(cells, ["–", "–"], "{phase}: {table}");
        }
    }
    assert!(table.contains("–: nothing to hold it against"), "{table}");
    let report = report_of(&run(&arguments(Some("--json"))));
    let roofs = report["roofline"]["roofs"].as_array().unwrap();
    assert_eq!(roofs.iter().map(|of| of["load"].as_str().unwrap()).collect::<Vec<_>>(), ["1 clients", "2 clients"]);
    assert_eq!(
        report["roofline"]["shares"].as_array().unwrap().len(),
        10,
        "four products and attention under two loads: {report}"
    );
}

/// A shape whose weights nobody has: its config.json is all there is of the folder.
#[test]
fn a_shape_is_measured_by_its_config_alone() {
    let folder = tempfile::tempdir().unwrap();
    let config = std::fs::read(std::path::Path::new(TINY_LLAMA).join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    // Room for the tokens of single bytes, which is what it is served with.
    config["vocab_size"] = 512.into();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let model = folder.path().to_str().unwrap();
    let flags = "--threads 1 --num-requests 2 --rounds 1 --concurrency 1 --input-words 4 --output-tokens 3 --json";
    let flags: Vec<&str> = flags.split_whitespace().collect();
    let ended = run(&[&["bench", model, "--load-format", "dummy", "--quantize", "int4"], &flags[..]].concat());
    assert_eq!(report_of(&ended)["rows"][0]["answered"], 2, "{}", ended.stderr);
    // With weights to be read, it is no model.
    let ended = run(&[&["bench", model], &flags[..]].concat());
    assert_eq!(ended.code, 1, "{}", ended.stderr);
    assert!(ended.stderr.contains("holds no weights that can be used"), "{}", ended.stderr);
}
