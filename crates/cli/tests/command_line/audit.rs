//! `bindery audit`: a log as a server writes it, and what is said of one that was touched.

use std::{fs, path::PathBuf, time::Duration};

use bindery_gateway::{
    audit::{
        AuditKey, Contents, ContentsKey, Fsync, HeadStore as _, Journal, JournalConfig, ModelUsed, RequestRecord,
        Retention,
    },
    store::{LogWriter, StoreHeads},
};
use serde_json::Value;

use crate::{gateway::Home, support::Ended};

const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const CONFIG: &str = "[store]\nurl = \"sqlite://bindery.db\"\n[audit]\npath = \"log\"\nname = \"the log\"\ncontents = \"encrypted\"\n\
                      contents_key_env = \"CONTENTS\"\n";

/// A log of two requests, its head in the store.
fn written() -> Home {
    let home = Home::new(CONFIG);
    let path = home.folder.path().join("log");
    home.in_store(async |store| {
        // By the config's name of it, as a server would.
        let writer = LogWriter { log: "the log", writer: "test" };
        let heads = StoreHeads::new(store, tokio::runtime::Handle::current(), writer);
        let config = JournalConfig {
            path,
            key: AuditKey::parse(KEY).unwrap(),
            contents_key: Some(ContentsKey::parse(KEY).unwrap()),
            max_contents_bytes: 1024,
            fsync: Fsync::EveryBatch,
            max_segment_bytes: 1 << 20,
            max_segment_age: Duration::from_hours(24),
            retention: Retention::default(),
        };
        let write = move || {
            let mut journal = Journal::open(config, Box::new(heads.clone())).unwrap();
            for tenant in ["acme", "globex"] {
                let model = ModelUsed { name: "smollm2".to_owned(), ..ModelUsed::default() };
                let record = RequestRecord { tenant: tenant.to_owned(), model, ..RequestRecord::default() };
                let contents =
                    Contents { prompt: "what is secret?".to_owned(), answer: "this".to_owned(), ..Contents::default() };
                journal.append_request(&record, Some(contents)).unwrap();
            }
            // As the log's writer does when it acknowledges.
            heads.save(&journal.head()).unwrap();
        };
        tokio::task::spawn_blocking(write).await.unwrap();
    });
    home
}

fn audit(home: &Home, arguments: &[&str]) -> Ended {
    home.run_in(&[&["audit"], arguments].concat(), &[("BINDERY_AUDIT_KEY", KEY), ("CONTENTS", KEY)])
}

fn segment(home: &Home) -> PathBuf {
    let mut files = fs::read_dir(home.folder.path().join("log")).unwrap().map(|entry| entry.unwrap().path());
    files.find(|path| path.extension().is_some_and(|end| end == "jsonl")).unwrap()
}

#[test]
fn a_log_that_is_what_was_written_passes() {
    let home = written();
    let ended = audit(&home, &["verify"]);
    assert_eq!(ended.code, 0, "{} {}", ended.stdout, ended.stderr);
    assert!(ended.stdout.contains("log is what was written: 3 records in 1 files, numbers 1 to 3"), "{}", ended.stdout);
    assert!(!ended.stderr.contains("warning"), "{}", ended.stderr);
    let json: Value = serde_json::from_str(&audit(&home, &["verify", "--json"]).stdout).unwrap();
    assert_eq!((json["intact"].as_bool(), json["last"].as_u64()), (Some(true), Some(3)), "{json}");
}

#[test]
fn an_edit_a_removal_and_a_cut_each_show() {
    type Touch = fn(&str) -> String;
    let edit: Touch = |text| text.replace("globex", "acme");
    let removal: Touch = |text| {
        let lines: Vec<&str> = text.lines().collect();
        format!("{}\n{}\n", lines[0], lines[2])
    };
    let cut: Touch = |text| text[..=text.trim_end().rfind('\n').unwrap()].to_owned();
    for (what, touch) in [("edit", edit), ("removal", removal), ("cut", cut)] {
        let home = written();
        let path = segment(&home);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, touch(&text)).unwrap();
        let ended = audit(&home, &["verify"]);
        assert_eq!(ended.code, 1, "{what}: {} {}", ended.stdout, ended.stderr);
        assert!(ended.stdout.contains("touched: ") && ended.stderr.contains("the audit log log was touched"), "{what}");
    }
}

#[test]
fn without_a_store_a_cut_does_not_show_and_that_is_said() {
    let home = written();
    fs::write(home.folder.path().join("bindery.toml"), "[audit]\npath = \"log\"\n").unwrap();
    let ended = audit(&home, &["verify"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(ended.stderr.contains("warning: without [store]"), "{}", ended.stderr);
}

#[test]
fn requests_are_exported_and_contents_only_when_asked_for() {
    let home = written();
    let lines = audit(&home, &["export", "--tenant", "acme"]);
    assert_eq!((lines.code, lines.stdout.lines().count()), (0, 1), "{}", lines.stderr);
    let row: Value = serde_json::from_str(&lines.stdout).unwrap();
    assert_eq!((&row["tenant"], &row["model"]["name"]), (&"acme".into(), &"smollm2".into()));
    assert!(!lines.stdout.contains("secret"), "{}", lines.stdout);
    let opened = audit(&home, &["export", "--json", "--contents"]);
    assert_eq!(opened.stdout.matches("what is secret?").count(), 2, "{}", opened.stdout);
    let csv = audit(&home, &["export", "--csv"]);
    assert!(csv.stdout.starts_with("seq,at,request_id,tenant"), "{}", csv.stdout);
    assert_eq!(csv.stdout.lines().count(), 3);
    let none = audit(&home, &["export", "--until", "2020-01-01"]);
    assert_eq!((none.code, none.stdout.as_str()), (0, ""), "{}", none.stderr);
}

#[test]
fn what_is_missing_is_named() {
    let home = written();
    let no_key = home.run(&["audit", "verify"]);
    assert_eq!(no_key.code, 1);
    assert!(no_key.stderr.contains("the environment has no `BINDERY_AUDIT_KEY`"), "{}", no_key.stderr);
    let no_audit = Home::new("").run(&["audit", "verify"]);
    assert_eq!(no_audit.code, 2);
    assert!(no_audit.stderr.contains("bindery.toml keeps no audit log") && no_audit.stderr.contains("add [audit]"));
    let no_log = audit(&Home::new(CONFIG), &["verify"]);
    assert_eq!(no_log.code, 1);
    assert!(no_log.stderr.contains("there is no audit log at log"), "{}", no_log.stderr);
}

/// A folder that was moved away on purpose: the store's memory of it goes by a verb alone, and the new log tells.
#[test]
fn a_log_that_was_moved_away_is_begun_anew_by_a_verb_that_is_on_record() {
    let home = written();
    let forget = ["forget-head", "--reason", "moved to the archive"];
    let still = audit(&home, &forget);
    assert!(still.code == 1 && still.stderr.contains("is not begun anew"), "{}", still.stderr);
    fs::rename(home.folder.path().join("log"), home.folder.path().join("archive")).unwrap();
    let unexplained = audit(&home, &["forget-head"]);
    assert_eq!(unexplained.code, 2, "{}", unexplained.stderr);
    // The key that signs is all it needs.
    let begun = home.run_in(&[&["audit"], &forget[..]].concat(), &[("BINDERY_AUDIT_KEY", KEY)]);
    assert_eq!(begun.code, 0, "{}", begun.stderr);
    assert!(begun.stderr.contains("begins anew") && begun.stderr.contains("that 3 records"), "{}", begun.stderr);
    let ended = audit(&home, &["verify"]);
    assert_eq!(ended.code, 0, "{} {}", ended.stdout, ended.stderr);
    assert!(ended.stdout.contains("moved to the archive") && ended.stdout.contains("1 records"), "{}", ended.stdout);
    // The old one still verifies where it lies, without a head.
    let old = "[audit]\npath = \"archive\"\n";
    fs::write(home.folder.path().join("bindery.toml"), old).unwrap();
    assert_eq!(audit(&home, &["verify"]).code, 0);
}

#[test]
fn the_key_of_contents_is_asked_for_where_they_are_opened_and_told_by_name_where_it_is_another() {
    let home = written();
    let signing = ("BINDERY_AUDIT_KEY", KEY);
    let verified = home.run_in(&["audit", "verify"], &[signing]);
    assert_eq!(verified.code, 0, "{}", verified.stderr);
    assert_eq!(home.run_in(&["audit", "export"], &[signing]).code, 0);
    let none = home.run_in(&["audit", "export", "--contents"], &[signing]);
    assert!(none.code == 1 && none.stderr.contains("the environment has no `CONTENTS`"), "{}", none.stderr);
    let other = KEY.replace("00", "ff");
    let wrong = home.run_in(&["audit", "export", "--contents"], &[signing, ("CONTENTS", &other)]);
    let (sealed, given) = (ContentsKey::parse(KEY).unwrap(), ContentsKey::parse(&other).unwrap());
    assert_eq!((wrong.code, wrong.stdout.as_str()), (1, ""), "{}", wrong.stderr);
    assert!(wrong.stderr.contains(sealed.id()) && wrong.stderr.contains(given.id()), "{}", wrong.stderr);
    // After a rotation: the old one opens.
    let rotated = CONFIG.replace("\"CONTENTS\"", "\"NEW\"") + "contents_old_key_envs = [\"CONTENTS\"]\n";
    fs::write(home.folder.path().join("bindery.toml"), rotated).unwrap();
    let opened = home.run_in(&["audit", "export", "--contents"], &[signing, ("NEW", &other), ("CONTENTS", KEY)]);
    assert_eq!(opened.stdout.matches("what is secret?").count(), 2, "{}", opened.stderr);
}

#[test]
fn a_log_whose_store_is_not_there_is_read_and_not_called_good() {
    let home = written();
    for end in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(home.folder.path().join(format!("bindery.db{end}")));
    }
    let ended = audit(&home, &["verify"]);
    assert!(ended.code == 1 && ended.stderr.contains("there is no store yet"), "{}", ended.stderr);
    assert!(!home.folder.path().join("bindery.db").exists());
}
