//! `bindery keys`: what goes to stdout, what opens a door and what no longer does.

use std::time::Duration;

use bindery_gateway::{
    clock::UnixMillis,
    keys::{KeyError, KeyRing, RingOptions},
};
use serde_json::Value;

use crate::{gateway::Home, support::run};

const CONFIG: &str =
    "[store]\nurl = \"sqlite://bindery.db\"\n[[tenants]]\nname = \"acme\"\n[[tenants]]\nname = \"globex\"\n";

/// Whose key a server would say it is.
fn opens(home: &Home, key: &str) -> Result<String, KeyError> {
    home.in_store(async |store| {
        let options = RingOptions { poll_every: Duration::from_secs(1), stale_after: Duration::from_mins(1) };
        let ring = KeyRing::open(store, options, UnixMillis::now()).await?;
        ring.authenticate(key, UnixMillis::now()).map(|owner| owner.tenant.to_string())
    })
}

/// The key that was printed, which is all that was.
fn printed(stdout: &str) -> String {
    let key = stdout.strip_suffix('\n').unwrap();
    assert!(key.starts_with("bdy_") && !key.contains(char::is_whitespace), "{stdout}");
    key.to_owned()
}

fn id_of(key: &str) -> &str {
    key.split('_').nth(1).unwrap()
}

#[test]
fn a_key_is_printed_alone_once_and_opens_for_its_tenant() {
    let home = Home::new(CONFIG);
    let made = home.run(&["keys", "create", "--tenant", "acme", "--name", "laptop", "--expires", "90d"]);
    assert_eq!(made.code, 0, "{}", made.stderr);
    let key = printed(&made.stdout);
    assert!(made.stderr.contains(id_of(&key)) && made.stderr.contains("opens until 20"), "{}", made.stderr);
    assert!(!made.stderr.contains(&key), "{}", made.stderr);
    assert_eq!(opens(&home, &key).unwrap(), "acme");
    for entry in std::fs::read_dir(home.folder.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let held = std::fs::read(&path).unwrap();
            assert!(!held.windows(key.len()).any(|part| part == key.as_bytes()), "{} holds the key", path.display());
        }
    }
    let listed = home.run(&["keys", "list"]);
    assert_eq!((listed.code, listed.stdout.lines().count()), (0, 2), "{}", listed.stderr);
    let row = listed.stdout.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>();
    assert_eq!(row[..3], [id_of(&key), "acme", "laptop"]);
    assert!(!listed.stdout.contains(&key));
    let json: Value = serde_json::from_str(&home.run(&["keys", "list", "--json"]).stdout).unwrap();
    let ninety_days = 90 * 24 * 3_600_000;
    assert_eq!(
        json[0]["expires_at"].as_i64().unwrap() - json[0]["created_at"].as_i64().unwrap(),
        ninety_days,
        "{json}"
    );
}

#[test]
fn a_revoked_key_opens_nothing_and_revoking_again_says_so() {
    let home = Home::new(CONFIG);
    let key = printed(&home.run(&["keys", "create", "--tenant", "globex"]).stdout);
    let revoked = home.run(&["keys", "revoke", id_of(&key)]);
    assert_eq!((revoked.code, revoked.stdout.as_str()), (0, ""), "{}", revoked.stderr);
    assert!(revoked.stderr.contains("is revoked"), "{}", revoked.stderr);
    assert!(matches!(opens(&home, &key), Err(KeyError::Revoked { .. })));
    assert!(home.run(&["keys", "list"]).stdout.contains("revoked 20"));
    assert!(home.run(&["keys", "revoke", id_of(&key)]).stderr.contains("already"));
    let unknown = home.run(&["keys", "revoke", "abcdefghijklmnop"]);
    assert_eq!(unknown.code, 1);
    assert!(unknown.stderr.contains("there is no key abcdefghijklmnop"), "{}", unknown.stderr);
    let whole = home.run(&["keys", "revoke", &key]);
    assert_eq!(whole.code, 2);
    assert!(whole.stderr.contains("a key's id is asked for") && !whole.stderr.contains(&key), "{}", whole.stderr);
}

#[test]
fn a_rotated_key_opens_beside_the_new_one_for_the_overlap() {
    let home = Home::new(CONFIG);
    let old = printed(&home.run(&["keys", "create", "--tenant", "acme", "--name", "ci"]).stdout);
    let rotated = home.run(&["keys", "rotate", id_of(&old), "--overlap", "1h"]);
    assert_eq!(rotated.code, 0, "{}", rotated.stderr);
    let new = printed(&rotated.stdout);
    assert_eq!((opens(&home, &old).unwrap(), opens(&home, &new).unwrap()), ("acme".to_owned(), "acme".to_owned()));
    assert!(home.run(&["keys", "list"]).stdout.contains(&format!("replaced by {}", id_of(&new))));
    let again = home.run(&["keys", "rotate", id_of(&old)]);
    assert_eq!((again.code, again.stdout.as_str()), (1, ""), "{}", again.stderr);
    let newest = printed(&home.run(&["keys", "rotate", id_of(&new), "--overlap", "0s"]).stdout);
    assert!(matches!(opens(&home, &new), Err(KeyError::Expired { .. })), "without an overlap the old key ends at once");
    assert_eq!(opens(&home, &newest).unwrap(), "acme");
}

#[test]
fn what_cannot_be_is_refused_with_a_way_out() {
    let home = Home::new(CONFIG);
    let stranger = home.run(&["keys", "create", "--tenant", "acne"]);
    assert_eq!((stranger.code, stranger.stdout.as_str()), (2, ""));
    assert!(
        stranger.stderr.contains("no tenant \"acne\" in bindery.toml; did you mean \"acme\"?"),
        "{}",
        stranger.stderr
    );
    assert!(stranger.stderr.contains("hint: the tenants there are: acme, globex"), "{}", stranger.stderr);
    assert!(!home.folder.path().join("bindery.db").exists(), "no store is made for a stranger");
    let no_store = Home::new("[[tenants]]\nname = \"acme\"\n").run(&["keys", "create", "--tenant", "acme"]);
    assert_eq!((no_store.code, no_store.stdout.as_str()), (2, ""));
    assert!(no_store.stderr.contains("bindery.toml names no store"), "{}", no_store.stderr);
    assert!(no_store.stderr.contains("hint: add [store] with url = \"sqlite://bindery.db\""), "{}", no_store.stderr);
    let nowhere = "[store]\nurl = \"sqlite:///nowhere/x.db\"\n[[tenants]]\nname = \"acme\"\n";
    let unreachable = Home::new(nowhere).run(&["keys", "create", "--tenant", "acme"]);
    assert_eq!(unreachable.code, 1);
    assert!(unreachable.stderr.contains("sqlite:///nowhere/x.db") && unreachable.stderr.contains("hint: check that"));
    let no_config = run(&["keys", "list"]);
    assert_eq!(no_config.code, 2);
    assert!(no_config.stderr.contains("no config file was named"), "{}", no_config.stderr);
    home.in_store(async |_| {});
    assert_eq!(home.run(&["keys", "list"]).stdout, "no keys\n");
}

/// Otherwise a mistyped path, or another folder to run in, leaves an empty file that looks like a store without keys.
#[test]
fn a_verb_that_only_reads_makes_no_store_and_says_that_there_is_none() {
    let home = Home::new(&format!("{CONFIG}budget = {{ usd_per_day = 5.0 }}\n"));
    std::fs::write(home.folder.path().join("r.json"), "{\"model\": \"local\", \"messages\": []}").unwrap();
    for verb in [
        &["keys", "list"][..],
        &["keys", "list", "--json"],
        &["keys", "revoke", "a"],
        &["keys", "rotate", "a"],
        &["costs"],
    ] {
        let ended = home.run(verb);
        assert_eq!((ended.code, ended.stdout.as_str()), (1, ""), "{verb:?}: {}", ended.stderr);
        assert!(ended.stderr.contains("there is no store yet at sqlite://bindery.db"), "{verb:?}: {}", ended.stderr);
        assert!(ended.stderr.contains("hint: "), "{}", ended.stderr);
    }
    let explained = home.run(&["route", "explain", "r.json", "--tenant", "globex"]);
    assert!(explained.stderr.contains("there is no store yet"), "{}", explained.stderr);
    let files: Vec<_> =
        std::fs::read_dir(home.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files.len(), 2, "the config and the request: {files:?}");
    // What an earlier version left: an empty file is no store either, and stays as it is.
    std::fs::write(home.folder.path().join("bindery.db"), "").unwrap();
    assert_eq!(home.run(&["keys", "list"]).code, 1);
    assert_eq!(std::fs::read(home.folder.path().join("bindery.db")).unwrap(), b"");
}

#[test]
fn what_a_key_may_use_is_listed_and_kept_when_it_is_replaced() {
    let home = Home::new(CONFIG);
    let limits = ["--requests-per-minute", "60", "--tokens-per-minute", "5000", "--concurrent", "2"];
    let lists = ["--models", "base,openai/*", "--adapters", "fr"];
    let made = home.run(&[&["keys", "create", "--tenant", "acme"], &limits[..], &lists].concat());
    let old = printed(&made.stdout);
    let new = printed(&home.run(&["keys", "rotate", id_of(&old)]).stdout);
    let plain = printed(&home.run(&["keys", "create", "--tenant", "acme"]).stdout);
    let told = "60 requests/min; 5,000 tokens/min; 2 at once; models base, openai/*; adapters fr";
    let listed = home.run(&["keys", "list"]).stdout;
    for (key, expected) in [(&old, told), (&new, told), (&plain, "what the tenant may")] {
        let row = listed.lines().find(|line| line.starts_with(id_of(key))).unwrap();
        assert!(row.contains(expected), "{row}");
    }
    let json: Value = serde_json::from_str(&home.run(&["keys", "list", "--json"]).stdout).unwrap();
    let row = json.as_array().unwrap().iter().find(|row| row["id"] == id_of(&new)).unwrap();
    assert_eq!((&row["requests_per_minute"], &row["concurrent"]), (&60.into(), &2.into()), "{row}");
    assert_eq!(row["models"], serde_json::json!(["base", "openai/*"]));
    for wrong in [&["--concurrent", "0"][..], &["--requests-per-minute", "-1"], &["--models", " "]] {
        let ended = home.run(&[&["keys", "create", "--tenant", "acme"], wrong].concat());
        assert_eq!((ended.code, ended.stdout.as_str()), (2, ""), "{wrong:?}: {}", ended.stderr);
    }
}
