//! What the log promises: any change shows, a crash is no change, a full disk is decided.

use std::{
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use chrono::DateTime;
use proptest::prelude::*;
use serde_json::Value;

use super::{
    export::ExportKeys,
    folder::{self, SegmentFile},
    verify::What,
    *,
};
use crate::failure::OnFailure;

const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const CONTENTS_KEY: &str = "ff0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

fn key() -> AuditKey {
    AuditKey::parse(KEY).unwrap()
}

fn config(path: &Path) -> JournalConfig {
    JournalConfig {
        path: path.to_path_buf(),
        key: key(),
        contents_key: None,
        max_contents_bytes: 1000,
        fsync: Fsync::EveryBatch,
        max_segment_bytes: 1500,
        max_segment_age: Duration::from_hours(1),
        retention: Retention::default(),
    }
}

fn request(number: usize) -> RequestRecord {
    RequestRecord {
        request_id: format!("req-{number}"),
        tenant: if number.is_multiple_of(2) { "acme" } else { "=cmd" }.to_owned(),
        model: ModelUsed {
            name: "llama".to_owned(),
            digest: Some("sha256:1".to_owned()),
            licence: Some("apache-2.0".to_owned()),
            adapter: Some(AdapterUsed { name: "fr".to_owned(), digest: "sha256:2".to_owned(), licence: None }),
        },
        route: RouteTaken { to: "local".to_owned(), why: "rule 3".to_owned() },
        tokens: TokenCounts { prompt: 10, completion: number as u64, ..TokenCounts::default() },
        outcome: "stop".to_owned(),
        ..RequestRecord::default()
    }
}

fn contents() -> Contents {
    Contents { prompt: "who is ann@x.org?".to_owned(), answer: "nobody".to_owned(), ..Contents::default() }
}

/// A log of this many requests, and its head.
fn written(config: &JournalConfig, num_requests: usize) -> Head {
    written_from(config, 0..num_requests)
}

fn written_from(config: &JournalConfig, requests: std::ops::Range<usize>) -> Head {
    let heads = MemoryHeadStore::default();
    let mut journal = Journal::open(config.clone(), Box::new(heads.clone())).unwrap();
    for number in requests {
        journal.append_request(&request(number), Some(contents())).unwrap();
    }
    journal.settle().unwrap();
    heads.head().unwrap()
}

fn heads(head: Head) -> MemoryHeadStore {
    let heads = MemoryHeadStore::default();
    heads.save(&head).unwrap();
    heads
}

/// The segments' bytes, in order.
fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let segments = folder::segments(folder).unwrap();
    segments.into_iter().map(|segment| (segment.path.clone(), fs::read(segment.path).unwrap())).collect()
}

fn lines(bytes: &[u8]) -> Vec<Vec<u8>> {
    bytes.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect()
}

fn what(report: &Report) -> Vec<What> {
    report.problems.iter().map(|problem| problem.what).collect()
}

#[test]
fn a_log_that_was_not_touched_passes_over_segments_and_restarts() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let store = MemoryHeadStore::default();
    for start in 0..3 {
        let mut journal = Journal::open(config.clone(), Box::new(store.clone())).unwrap();
        for number in 0..4 {
            journal.append_request(&request(start * 4 + number), None).unwrap();
        }
        journal.settle().unwrap();
    }
    let report = verify(folder.path(), &key(), store.head()).unwrap();
    assert!(report.is_intact() && report.torn.is_none(), "{report:?}");
    assert!(report.num_segments > 2, "{report:?}");
    assert_eq!((report.first, report.last, report.num_after_head), (Some(1), store.head(), 0));
    assert_eq!(report.num_records, 12 + report.num_segments);
}

/// The chain as anyone can recompute it, with another library's view of the bytes: text up to the mark, HMAC, hex.
#[test]
fn records_have_the_documented_bytes() {
    use hmac::{Hmac, KeyInit as _, Mac as _};
    let folder = tempfile::tempdir().unwrap();
    written(&config(folder.path()), 2);
    let mut prev = "0".repeat(64);
    for line in lines(&files(folder.path())[0].1) {
        let text = String::from_utf8(line).unwrap();
        let (body, tail) = text.rsplit_once(",\"mac\":\"").unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        let secret = data_encoding::HEXLOWER.decode(KEY.as_bytes()).unwrap();
        let mut hmac = Hmac::<sha2::Sha256>::new_from_slice(&secret).unwrap();
        hmac.update(body.as_bytes());
        let mac = data_encoding::HEXLOWER.encode(&hmac.finalize().into_bytes());
        assert_eq!(tail, format!("{mac}\"}}\n"));
        assert_eq!(value["prev"], prev);
        prev = mac;
    }
}

#[test]
fn another_key_or_a_log_written_anew_does_not_pass() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let head = written(&config, 5);
    let other = AuditKey::parse(CONTENTS_KEY).unwrap();
    assert!(what(&verify(folder.path(), &other, Some(head)).unwrap()).contains(&What::Signature));
    // Whoever has the key itself can write other requests, but the store knows better.
    let anew = tempfile::tempdir().unwrap();
    written_from(&JournalConfig { path: anew.path().to_path_buf(), ..config }, 1..6);
    assert_eq!(what(&verify(anew.path(), &key(), Some(head)).unwrap()), [What::OtherHead { head: head.seq }]);
}

#[test]
fn problems_name_the_segment_and_the_line() {
    let folder = tempfile::tempdir().unwrap();
    let head = written(&config(folder.path()), 6);
    let (path, bytes) = files(folder.path())[1].clone();
    let mut rows = lines(&bytes);
    rows.remove(1);
    fs::write(&path, rows.concat()).unwrap();
    let problem = verify(folder.path(), &key(), Some(head)).unwrap().problems[0].clone();
    assert_eq!((problem.segment.as_str(), problem.line), ("segment-00000002.jsonl", 2));
    assert!(problem.to_string().contains("was removed, repeated or moved"), "{problem}");
}

#[test]
fn files_renamed_or_joined_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let head = written(&config(folder.path()), 8);
    let all = files(folder.path());
    // The second segment's lines at the end of the first.
    fs::write(&all[0].0, [all[0].1.clone(), all[1].1.clone()].concat()).unwrap();
    fs::remove_file(&all[1].0).unwrap();
    assert!(what(&verify(folder.path(), &key(), Some(head)).unwrap()).contains(&What::Misplaced));
    // All names one further.
    fs::write(&all[0].0, &all[0].1).unwrap();
    fs::write(&all[1].0, &all[1].1).unwrap();
    for (path, _) in all.iter().rev() {
        let number: u64 = path.file_stem().unwrap().to_str().unwrap()["segment-".len()..].parse().unwrap();
        fs::rename(path, folder.path().join(format!("segment-{:08}.jsonl", number + 1))).unwrap();
    }
    assert!(what(&verify(folder.path(), &key(), Some(head)).unwrap()).contains(&What::Misplaced));
}

#[test]
fn old_segments_go_only_with_a_record_that_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.retention.max_segments = Some(3);
    let head = written(&config, 20);
    let report = verify(folder.path(), &key(), Some(head)).unwrap();
    assert!(report.is_intact(), "{report:?}");
    assert!(report.first > Some(1) && report.num_segments == 3, "{report:?}");
    assert!(report.events.iter().any(|event| event.contains("retired")));
    // One more, by hand.
    fs::remove_file(&files(folder.path())[0].0).unwrap();
    assert!(matches!(what(&verify(folder.path(), &key(), Some(head)).unwrap())[..], [What::Beheaded { .. }]));
}

#[test]
fn segments_end_and_go_by_age() {
    let folder = tempfile::tempdir().unwrap();
    let hours = Arc::new(AtomicI64::new(0));
    let clock = Arc::clone(&hours);
    let mut config = config(folder.path());
    config.retention.max_age = Some(Duration::from_hours(10));
    let store = MemoryHeadStore::default();
    let mut journal = Journal::open_with(
        config,
        Box::new(store.clone()),
        Box::new(folder::open_file),
        Box::new(move || DateTime::from_timestamp(clock.load(Ordering::Relaxed) * 3600, 0).unwrap()),
    )
    .unwrap();
    let mut segments = Vec::new();
    for hour in [0, 2, 4, 13, 30] {
        hours.store(hour, Ordering::Relaxed);
        journal.append_request(&request(0), None).unwrap();
        segments.push(files(folder.path()).len());
    }
    journal.settle().unwrap();
    // At 13 the one of 0 is gone, whose newest record is more than ten hours old when the next one began at 2.
    assert_eq!(segments, [1, 2, 3, 3, 2]);
    assert!(verify(folder.path(), &key(), store.head()).unwrap().is_intact());
}

#[test]
fn a_torn_record_is_told_from_a_cut_one_and_repaired() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let head = written(&config, 3);
    let store = heads(head);
    let mut journal = Journal::open(config.clone(), Box::new(store.clone())).unwrap();
    journal.append_request(&request(3), None).unwrap();
    drop(journal);
    // The crash came before the head was saved, and in the middle of the write.
    let store = heads(head);
    let (path, bytes) = files(folder.path()).pop().unwrap();
    let last = lines(&bytes).pop().unwrap();
    let torn = &bytes[..bytes.len() - last.len() / 2];
    fs::write(&path, torn).unwrap();
    let report = verify(folder.path(), &key(), Some(head)).unwrap();
    assert!(report.is_intact(), "{report:?}");
    assert_eq!(report.torn.as_ref().map(|torn| torn.bytes as usize), Some(last.len() - last.len() / 2));
    let mut journal = Journal::open(config.clone(), Box::new(store.clone())).unwrap();
    journal.append_request(&request(4), None).unwrap();
    journal.settle().unwrap();
    drop(journal);
    let report = verify(folder.path(), &key(), store.head()).unwrap();
    assert!(report.is_intact() && report.torn.is_none(), "{report:?}");
    assert!(report.events[0].contains("repaired") && report.events[0].contains("sha256"), "{:?}", report.events);
    let aside = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
    let aside = aside.filter(|path| path.to_string_lossy().contains(".torn-")).collect::<Vec<_>>();
    assert_eq!(fs::read(&aside[0]).unwrap(), &last[..last.len() - last.len() / 2]);
}

#[test]
fn an_acknowledged_record_that_looks_torn_was_cut() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let head = written(&config, 3);
    let (path, bytes) = files(folder.path()).pop().unwrap();
    fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
    let report = verify(folder.path(), &key(), Some(head)).unwrap();
    assert_eq!(what(&report), [What::Truncated { head: head.seq, last: head.seq - 1 }]);
    assert!(report.torn.is_none());
    let refused = Journal::open(config, Box::new(heads(head))).unwrap_err();
    assert!(matches!(refused, AuditError::Touched { .. }), "{refused}");
    assert!(refused.to_string().contains("bindery audit verify"));
}

#[test]
fn a_begin_that_is_not_the_next_records_is_not_taken_for_torn() {
    let folder = tempfile::tempdir().unwrap();
    let head = written(&config(folder.path()), 2);
    let (path, bytes) = files(folder.path()).pop().unwrap();
    for (tail, is_torn) in [
        (&b"{\"seq\":4,\"at\":\"20"[..], true),
        (&[0; 40][..], true),
        (b"{\"seq\":5,\"at\"", false),
        (b"{\"sEq\":4", false),
        (b"garbage", false),
    ] {
        fs::write(&path, [&bytes[..], tail].concat()).unwrap();
        let report = verify(folder.path(), &key(), Some(head)).unwrap();
        assert_eq!((report.torn.is_some(), report.is_intact()), (is_torn, is_torn), "{tail:?}");
    }
}

#[test]
fn two_processes_do_not_write_one_log() {
    let folder = tempfile::tempdir().unwrap();
    let _first = Journal::open(config(folder.path()), Box::new(MemoryHeadStore::default())).unwrap();
    let second = Journal::open(config(folder.path()), Box::new(MemoryHeadStore::default()));
    assert!(matches!(second, Err(AuditError::InUse { .. })));
}

#[test]
fn a_log_that_vanished_is_not_begun_anew() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let head = written(&config, 3);
    for (path, _) in files(folder.path()) {
        fs::remove_file(path).unwrap();
    }
    let vanished = Journal::open(config.clone(), Box::new(heads(head))).unwrap_err();
    assert!(matches!(vanished, AuditError::Vanished { seq, .. } if seq == head.seq), "{vanished}");
    assert!(vanished.to_string().contains("forget-head"), "{vanished}");

    // Meant to go: the new log tells of it in its first record, and goes on as any other.
    let store = heads(head);
    let begin =
        |reason: &str, store: &MemoryHeadStore| Journal::begin_anew(config.clone(), Box::new(store.clone()), reason);
    assert!(matches!(begin(" ", &store), Err(AuditError::Config(_))));
    assert!(matches!(begin("moved", &MemoryHeadStore::default()), Err(AuditError::NothingToForget)));
    assert_eq!(begin("moved to the archive", &store).unwrap(), head);
    assert!(matches!(begin("moved", &store), Err(AuditError::StillThere { .. })));
    let mut journal = Journal::open(config.clone(), Box::new(store.clone())).unwrap();
    journal.append_request(&request(0), None).unwrap();
    journal.settle().unwrap();
    let report = verify(&config.path, &key(), store.head()).unwrap();
    assert!(report.is_intact() && report.num_records == 2, "{report:?}");
    assert!(report.events.len() == 1 && report.events[0].contains("moved to the archive"), "{report:?}");
    assert!(report.events[0].contains(&format!("\"seq\":{}", head.seq)), "{report:?}");
    let first: Value = serde_json::from_slice(&lines(&files(&config.path)[0].1)[0]).unwrap();
    assert_eq!(first["data"]["forgotten"]["mac"], head.mac.to_string());
}

#[test]
fn contents_are_read_with_their_key_alone() {
    let folder = tempfile::tempdir().unwrap();
    let contents_key = ContentsKey::parse(CONTENTS_KEY).unwrap();
    let mut config = config(folder.path());
    written(&config, 1);
    assert!(!String::from_utf8(files(folder.path())[0].1.clone()).unwrap().contains("contents"), "no key, no contents");
    fs::remove_dir_all(folder.path()).unwrap();
    config.contents_key = Some(contents_key.clone());
    let head = written(&config, 4);
    let all: Vec<u8> = files(folder.path()).into_iter().flat_map(|(_, bytes)| bytes).collect();
    assert!(!String::from_utf8(all).unwrap().contains("ann@x.org"));
    let export = |contents, filter: ExportFilter, format| {
        let mut out = Vec::new();
        let keys = ExportKeys { key: &key(), contents };
        let num_rows = export(folder.path(), keys, (&filter, format), &mut out).unwrap();
        (num_rows, String::from_utf8(out).unwrap())
    };
    let contents_keys = ContentsKeys(vec![contents_key]);
    let (num_rows, rows) = export(Some(&contents_keys), ExportFilter::default(), ExportFormat::JsonLines);
    assert_eq!((num_rows, rows.lines().count(), rows.matches("ann@x.org").count()), (4, 4, 4));
    let row: Value = serde_json::from_str(rows.lines().next().unwrap()).unwrap();
    assert_eq!((&row["model"]["adapter"]["digest"], &row["tokens"]["prompt"]), (&"sha256:2".into(), &10.into()));
    assert!(!export(None, ExportFilter::default(), ExportFormat::JsonLines).1.contains("contents"));
    let acme = ExportFilter { tenant: Some("acme".to_owned()), ..ExportFilter::default() };
    assert!(verify(folder.path(), &key(), Some(head)).unwrap().is_intact(), "which needs no key of contents");
    let (num_rows, table) = export(Some(&contents_keys), acme, ExportFormat::Csv);
    assert_eq!((num_rows, table.lines().count()), (2, 3));
    assert!(table.starts_with("seq,at,request_id,tenant,") && table.contains("who is ann@x.org?"));
    let (_, table) = export(None, ExportFilter::default(), ExportFormat::Csv);
    assert!(table.contains(",'=cmd,"), "no formulas: {table}");
    let one = ExportFilter { request_id: Some("req-3".to_owned()), ..ExportFilter::default() };
    assert_eq!(export(None, one, ExportFormat::JsonLines).0, 1);
}

fn contents_key(first_byte: &str) -> ContentsKey {
    ContentsKey::parse(&format!("{first_byte}{}", &CONTENTS_KEY[2..])).unwrap()
}

fn opened(folder: &Path, keys: &[&ContentsKey]) -> Result<Vec<Value>, AuditError> {
    let keys = ContentsKeys(keys.iter().map(|&key| key.clone()).collect());
    let keys = ExportKeys { key: &key(), contents: Some(&keys) };
    let mut out = Vec::new();
    export(folder, keys, (&ExportFilter::default(), ExportFormat::JsonLines), &mut out)?;
    Ok(String::from_utf8(out).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

/// A key that takes another's place seals from then on; the old one goes on opening what it sealed.
#[test]
fn keys_of_contents_are_rotated_and_told_apart_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (contents_key("ff"), contents_key("fe"));
    let store = MemoryHeadStore::default();
    for (number, sealing) in [(0, &old), (1, &new)] {
        let config = JournalConfig { contents_key: Some(sealing.clone()), ..config(folder.path()) };
        let mut journal = Journal::open(config, Box::new(store.clone())).unwrap();
        journal.append_request(&request(number), Some(contents())).unwrap();
        journal.settle().unwrap();
    }
    let rows = opened(folder.path(), &[&new, &old]).unwrap();
    assert_eq!(rows.len(), 2);
    assert!(rows.iter().all(|row| row["contents"]["answer"] == "nobody"), "{rows:?}");
    let missing = opened(folder.path(), &[&new]).unwrap_err().to_string();
    assert!(missing.contains(old.id()) && missing.contains(new.id()) && missing.contains("record 2"), "{missing}");
    let wrong = contents_key("00");
    let refused = opened(folder.path(), &[&wrong]).unwrap_err().to_string();
    assert!(refused.contains(wrong.id()) && refused.contains("contents_key_env"), "{refused}");
    let bytes: Vec<u8> = files(folder.path()).into_iter().flat_map(|(_, bytes)| bytes).collect();
    for secret in [KEY, CONTENTS_KEY, "ann@x.org", "nobody"] {
        assert!(!bytes.windows(secret.len()).any(|part| part == secret.as_bytes()), "{secret}");
    }
}

/// Whoever has the key that signs can write lines that verify; without the contents' key he can move or change none of those.
#[test]
fn sealed_contents_that_were_moved_or_changed_are_refused_even_in_a_log_that_was_signed_anew() {
    let folder = tempfile::tempdir().unwrap();
    let sealing = contents_key("ff");
    let config = JournalConfig { contents_key: Some(sealing.clone()), ..config(folder.path()) };
    written(&config, 4);
    let (path, bytes) = files(folder.path())[0].clone();
    let signed_anew = |change: &dyn Fn(&mut Vec<Value>)| {
        let mut data: Vec<Value> = lines(&bytes).iter().map(|line| serde_json::from_slice(line).unwrap()).collect();
        change(&mut data);
        let (mut text, mut next) = (Vec::new(), line::Next { seq: 1, prev: line::Mac::NONE });
        for value in &data {
            let kind = value["kind"].as_str().unwrap();
            let (bytes, mac) = line::write(&key(), next, DateTime::UNIX_EPOCH, (kind, &value["data"])).unwrap();
            text.extend(bytes);
            next = line::Next { seq: next.seq + 1, prev: mac };
        }
        fs::remove_dir_all(folder.path()).unwrap();
        fs::create_dir(folder.path()).unwrap();
        fs::write(&path, text).unwrap();
        assert!(verify(folder.path(), &key(), None).unwrap().is_intact(), "it was signed with the key");
        opened(folder.path(), &[&sealing])
    };
    assert!(signed_anew(&|_| {}).is_ok());
    let swapped = signed_anew(&|lines| {
        let first = lines[1]["data"]["contents"].take();
        lines[1]["data"]["contents"] = lines[2]["data"]["contents"].take();
        lines[2]["data"]["contents"] = first;
    });
    let other_tenant = signed_anew(&|lines| lines[1]["data"]["tenant"] = "globex".into());
    let other_request = signed_anew(&|lines| lines[1]["data"]["request_id"] = "req-9".into());
    let a_bit = signed_anew(&|lines| {
        let sealed = lines[1]["data"]["contents"]["sealed"].as_str().unwrap();
        let other = if sealed.starts_with('A') { "B" } else { "A" };
        lines[1]["data"]["contents"]["sealed"] = format!("{other}{}", &sealed[1..]).into();
    });
    for refused in [swapped, other_tenant, other_request, a_bit] {
        let told = refused.unwrap_err().to_string();
        assert!(told.contains("record 2 were changed, or belong to another record"), "{told}");
    }
}

#[test]
fn long_contents_are_cut_and_the_log_says_by_how_much() {
    let folder = tempfile::tempdir().unwrap();
    let sealing = contents_key("ff");
    let config = JournalConfig { contents_key: Some(sealing.clone()), max_contents_bytes: 5, ..config(folder.path()) };
    let mut journal = Journal::open(config, Box::new(MemoryHeadStore::default())).unwrap();
    let long =
        Contents {
            prompt: "Äpfel".to_owned(), answer: "ééé!".to_owned(), answer_bytes_cut: 10, ..Contents::default()
        };
    journal.append_request(&request(1), Some(long)).unwrap();
    let row = opened(folder.path(), &[&sealing]).unwrap().remove(0);
    // Six bytes of which five fit; seven of which a fifth would be half a letter.
    let kept = serde_json::json!({"prompt": "Äpfe", "answer": "éé", "prompt_bytes_cut": 1, "answer_bytes_cut": 13});
    assert_eq!(row["contents"], kept);
}

#[test]
fn an_export_ends_at_the_first_record_that_was_touched() {
    let folder = tempfile::tempdir().unwrap();
    written(&config(folder.path()), 3);
    let (path, bytes) = files(folder.path())[0].clone();
    let touched = String::from_utf8(bytes).unwrap().replacen("acme", "evil", 1);
    fs::write(path, touched).unwrap();
    let keys = ExportKeys { key: &key(), contents: None };
    let mut out = Vec::new();
    let ended = export(folder.path(), keys, (&ExportFilter::default(), ExportFormat::JsonLines), &mut out).unwrap_err();
    assert!(matches!(ended, AuditError::Touched { .. }));
    assert!(!String::from_utf8(out).unwrap().contains("evil"));
}

/// A disk with this much room; a write beyond it takes what fits, as a real one does.
struct SmallDisk {
    file: Box<dyn SegmentFile>,
    room: Arc<AtomicUsize>,
}

impl SegmentFile for SmallDisk {
    fn append(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.room.load(Ordering::Relaxed);
        if room == 0 {
            return Err(ErrorKind::StorageFull.into());
        }
        let taken = bytes.len().min(room);
        self.room.fetch_sub(taken, Ordering::Relaxed);
        self.file.append(&bytes[..taken])
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.file.truncate(length)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync()
    }
}

fn on_a_small_disk(folder: &Path, store: &MemoryHeadStore, room: &Arc<AtomicUsize>) -> Journal {
    let room = Arc::clone(room);
    let open = move |path: &Path| {
        let file = folder::open_file(path)?;
        Ok(Box::new(SmallDisk { file, room: Arc::clone(&room) }) as Box<dyn SegmentFile>)
    };
    Journal::open_with(config(folder), Box::new(store.clone()), Box::new(open), Box::new(chrono::Utc::now)).unwrap()
}

#[test]
fn a_full_disk_fails_requests_where_the_log_comes_first() {
    let folder = tempfile::tempdir().unwrap();
    let store = MemoryHeadStore::default();
    let room = Arc::new(AtomicUsize::new(2000));
    let audit = Audit::start(on_a_small_disk(folder.path(), &store, &room), OnFailure::Closed, 100).unwrap();
    let results: Vec<_> = (0..8).map(|number| audit.record(request(number), None).kept_blocking()).collect();
    let num_kept = results.iter().filter(|result| result.is_ok()).count();
    assert!(num_kept > 0 && num_kept < 8, "{results:?}");
    let said = results.last().unwrap().as_ref().unwrap_err().to_string();
    assert!(said.contains("cannot") && said.contains("segment-"), "{said}");
    // Room again: the log goes on where it ended.
    room.store(1 << 20, Ordering::Relaxed);
    assert!(audit.record(request(8), None).kept_blocking().is_ok());
    audit.close();
    let report = verify(folder.path(), &key(), store.head()).unwrap();
    assert!(report.is_intact() && report.torn.is_none(), "{report:?}");
    assert_eq!(report.num_records - report.num_segments, num_kept as u64 + 1);
}

#[test]
fn a_full_disk_lets_requests_go_on_where_configured_and_the_log_tells_how_many() {
    let folder = tempfile::tempdir().unwrap();
    let store = MemoryHeadStore::default();
    let room = Arc::new(AtomicUsize::new(2000));
    let audit = Audit::start(on_a_small_disk(folder.path(), &store, &room), OnFailure::Open, 100).unwrap();
    let kept: Vec<_> = (0..8).map(|number| audit.record(request(number), None).kept_blocking().unwrap()).collect();
    let num_dropped = kept.iter().filter(|kept| **kept == Kept::Dropped).count();
    assert!(num_dropped > 0 && num_dropped < 8, "{kept:?}");
    assert_eq!(audit.num_dropped(), num_dropped as u64);
    room.store(1 << 20, Ordering::Relaxed);
    assert!(matches!(audit.record(request(8), None).kept_blocking(), Ok(Kept::As { .. })));
    assert_eq!(audit.num_dropped(), 0);
    audit.close();
    let report = verify(folder.path(), &key(), store.head()).unwrap();
    assert!(report.is_intact(), "{report:?}");
    assert!(report.events[0].contains(&format!("gap {{\"dropped\":{num_dropped}}}")), "{:?}", report.events);
}

/// A store that does not answer before it is let.
struct SlowStore {
    gate: Arc<Mutex<()>>,
    inner: MemoryHeadStore,
}

impl HeadStore for SlowStore {
    fn load(&self) -> Result<Option<Head>, HeadStoreError> {
        self.inner.load()
    }

    fn save(&self, head: &Head) -> Result<(), HeadStoreError> {
        let _gate = self.gate.lock().unwrap();
        self.inner.save(head)
    }
}

#[test]
fn a_queue_that_is_full_answers_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let gate = Arc::new(Mutex::new(()));
    let store = SlowStore { gate: Arc::clone(&gate), inner: MemoryHeadStore::default() };
    let journal = Journal::open(config(folder.path()), Box::new(store)).unwrap();
    let audit = Audit::start(journal, OnFailure::Closed, 2).unwrap();
    let closed = gate.lock().unwrap();
    let mut waiting: Vec<Pending> = Vec::new();
    // One batch is being written and the queue holds two: soon one is refused.
    let refused = (0..10_000).find_map(|number| {
        let pending = audit.record(request(number), None);
        if format!("{pending:?}").contains("QueueFull") {
            return Some(pending);
        }
        waiting.push(pending);
        None
    });
    let refused = refused.unwrap().kept_blocking().unwrap_err().to_string();
    assert!(refused.contains("2 records wait"), "{refused}");
    drop(closed);
    for pending in waiting {
        assert!(matches!(pending.kept_blocking(), Ok(Kept::As { .. })));
    }
}

struct FailingStore;

impl HeadStore for FailingStore {
    fn load(&self) -> Result<Option<Head>, HeadStoreError> {
        Ok(None)
    }

    fn save(&self, _: &Head) -> Result<(), HeadStoreError> {
        Err(HeadStoreError::Failed { doing: "written to", why: "it is away".to_owned() })
    }
}

#[test]
fn a_head_that_cannot_be_saved_is_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    let failed = Journal::open(config(folder.path()), Box::new(FailingStore)).unwrap_err();
    assert!(failed.to_string().contains("it is away"), "{failed}");
}

#[test]
fn many_threads_get_numbers_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let store = MemoryHeadStore::default();
    let journal = Journal::open(config(folder.path()), Box::new(store.clone())).unwrap();
    let audit = Audit::start(journal, OnFailure::Closed, 1000).unwrap();
    let mut numbers: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let audit = &audit;
                scope.spawn(move || {
                    let pending: Vec<_> =
                        (0..25).map(|number| audit.record(request(thread * 25 + number), None)).collect();
                    pending
                        .into_iter()
                        .map(|pending| match pending.kept_blocking().unwrap() {
                            Kept::As { seq } => seq,
                            Kept::Dropped => panic!("dropped"),
                        })
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), 100);
    audit.close();
    let report = verify(folder.path(), &key(), store.head()).unwrap();
    assert!(report.is_intact(), "{report:?}");
}

/// Segments by name.
type Files = Vec<(String, Vec<u8>)>;

/// A log of three segments, made once.
fn example() -> &'static (Files, Head) {
    static EXAMPLE: std::sync::OnceLock<(Files, Head)> = std::sync::OnceLock::new();
    EXAMPLE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let head = written(&config(folder.path()), 6);
        let name = |path: PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        (files(folder.path()).into_iter().map(|(path, bytes)| (name(path), bytes)).collect(), head)
    })
}

fn report_of(files: &[(String, Vec<u8>)], head: Head) -> Report {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    verify(folder.path(), &key(), Some(head)).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_byte_changed_is_found(place in any::<prop::sample::Index>(), change in 1_u8..=255) {
        let (files, head) = example();
        let mut files = files.clone();
        let mut place = place.index(files.iter().map(|(_, bytes)| bytes.len()).sum());
        for (_, bytes) in &mut files {
            if place < bytes.len() {
                bytes[place] ^= change;
                break;
            }
            place -= bytes.len();
        }
        prop_assert!(!report_of(&files, *head).is_intact());
    }

    #[test]
    fn any_byte_removed_or_put_in_is_found(
        file in any::<prop::sample::Index>(), place in any::<prop::sample::Index>(), added in any::<Option<u8>>(),
    ) {
        let (files, head) = example();
        let mut files = files.clone();
        let file = file.index(files.len());
        let bytes = &mut files[file].1;
        let place = place.index(bytes.len());
        match added {
            Some(byte) => bytes.insert(place, byte),
            None => { bytes.remove(place); }
        }
        prop_assert!(!report_of(&files, *head).is_intact());
    }

    #[test]
    fn any_line_removed_repeated_or_moved_is_found(
        from in any::<prop::sample::Index>(), to in any::<prop::sample::Index>(), kind in 0..3,
    ) {
        let (files, head) = example();
        let rows: Vec<(usize, Vec<u8>)> = files.iter().enumerate()
            .flat_map(|(file, (_, bytes))| lines(bytes).into_iter().map(move |line| (file, line)))
            .collect();
        let (from, to) = (from.index(rows.len()), to.index(rows.len()));
        let mut changed = rows.clone();
        match kind {
            0 => { changed.remove(from); }
            1 => changed.insert(to, rows[from].clone()),
            _ => {
                let (a, b) = (rows[from].1.clone(), rows[to].1.clone());
                changed[from].1 = b;
                changed[to].1 = a;
            }
        }
        prop_assume!(kind != 2 || from != to);
        let mut touched = files.clone();
        for (file, (_, bytes)) in touched.iter_mut().enumerate() {
            *bytes = changed.iter().filter(|(of, _)| *of == file).flat_map(|(_, line)| line.clone()).collect();
        }
        prop_assert!(!report_of(&touched, *head).is_intact());
    }

    #[test]
    fn any_truncation_is_found(file in any::<prop::sample::Index>(), length in any::<prop::sample::Index>()) {
        let (files, head) = example();
        let file = file.index(files.len());
        let length = length.index(files[file].1.len());
        // At the end of the log: all later files are gone, too. And in the middle: they are still there.
        for keeps_later in [false, true] {
            let mut cut = files.clone();
            cut[file].1.truncate(length);
            if !keeps_later {
                cut.truncate(file + 1);
            }
            prop_assert!(!report_of(&cut, *head).is_intact(), "{keeps_later}");
        }
    }

    #[test]
    fn any_segment_removed_is_found(file in any::<prop::sample::Index>()) {
        let (files, head) = example();
        let mut left = files.clone();
        left.remove(file.index(files.len()));
        prop_assert!(!report_of(&left, *head).is_intact());
    }

    /// Where the head was not saved yet, any piece of the last record is a crash's doing, and the log goes on.
    #[test]
    fn any_torn_last_record_is_repaired(length in any::<prop::sample::Index>()) {
        let (files, _) = example();
        let folder = tempfile::tempdir().unwrap();
        let (last, others) = files.split_last().unwrap();
        for (name, bytes) in others {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        let rows = lines(&last.1);
        let whole: Vec<u8> = rows[..rows.len() - 1].concat();
        let torn = length.index(rows[rows.len() - 1].len());
        fs::write(folder.path().join(&last.0), &last.1[..whole.len() + torn]).unwrap();
        let before = verify(folder.path(), &key(), None).unwrap();
        let store = heads(before.last.unwrap());
        let mut journal = Journal::open(config(folder.path()), Box::new(store.clone())).unwrap();
        journal.append_request(&request(9), None).unwrap();
        journal.settle().unwrap();
        drop(journal);
        let report = verify(folder.path(), &key(), store.head()).unwrap();
        prop_assert!(report.is_intact() && report.torn.is_none(), "{report:?}");
        prop_assert_eq!(report.events.len(), usize::from(torn > 0));
    }
}
