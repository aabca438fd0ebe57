//! The audit log's head in the store: a log that was cut or begun anew does not pass, whatever was done to its folder.

use std::time::Duration;

use bindery_gateway::{
    audit::{
        AuditError, AuditKey, Fsync, Head, HeadStore as _, Journal, JournalConfig, RequestRecord, Retention, line::Mac,
        verify,
    },
    store::{Store, StoreHeads},
};

use crate::{on_every_store, support::*};

fn config(path: &std::path::Path) -> JournalConfig {
    JournalConfig {
        path: path.to_owned(),
        key: AuditKey::parse(&"ab".repeat(32)).unwrap(),
        contents_key: None,
        max_contents_bytes: 1024,
        fsync: Fsync::EveryBatch,
        max_segment_bytes: 1 << 20,
        max_segment_age: Duration::from_hours(24),
        retention: Retention::default(),
    }
}

fn heads(store: &Store, log: &std::path::Path) -> StoreHeads {
    StoreHeads::new(store.clone(), tokio::runtime::Handle::current(), log)
}

/// Off the runtime's threads, as the log's own thread is.
async fn open(store: &Store, log: &std::path::Path) -> Result<Journal, AuditError> {
    let (heads, config) = (heads(store, log), config(log));
    tokio::task::spawn_blocking(move || Journal::open(config, Box::new(heads))).await.unwrap()
}

on_every_store! {
    async fn a_log_that_was_cut_shows(place) {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let (store, thread) = place.open().await;
        assert_eq!(heads(&store, &log).newest().await.unwrap(), None);
        let mut journal = open(&store, &log).await.unwrap();
        journal.append_request(&RequestRecord::default(), None).unwrap();
        let written = journal.head();
        // As the log's writer does when it acknowledges.
        let saved = heads(&store, &log);
        tokio::task::spawn_blocking(move || saved.save(&written)).await.unwrap().unwrap();
        drop(journal);
        drop(store);
        thread.join();

        let (store, _thread) = place.open().await;
        let head = heads(&store, &log).newest().await.unwrap();
        assert_eq!(head, Some(written), "it outlives the process");
        let other = heads(&store, &folder.path().join("other"));
        assert_eq!(other.newest().await.unwrap(), None, "each log has its own");
        let key = config(&log).key;
        assert!(verify(&log, &key, head).unwrap().is_intact());

        let segment = std::fs::read_dir(&log).unwrap().map(|entry| entry.unwrap().path());
        let segment = segment.into_iter().find(|path| path.extension().is_some_and(|end| end == "jsonl")).unwrap();
        let text = std::fs::read_to_string(&segment).unwrap();
        let without_last = &text[..=text.trim_end().rfind('\n').unwrap()];
        std::fs::write(&segment, without_last).unwrap();
        assert!(verify(&log, &key, None).unwrap().is_intact(), "the folder alone does not show it");
        assert!(!verify(&log, &key, head).unwrap().is_intact());
        // A neighbouring test's child holds the folder's lock from its fork to its exec.
        let reopened = loop {
            match open(&store, &log).await {
                Err(AuditError::InUse { .. }) => tokio::task::yield_now().await,
                other => break other,
            }
        };
        assert!(matches!(reopened, Err(AuditError::Touched { .. })));
    }
}

/// The log's thread may also run on the runtime that serves the store, as long as another worker goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_are_read_and_saved_from_wherever_blocking_may_be() {
    let place = Place::sqlite();
    let (store, _thread) = place.open().await;
    let heads = heads(&store, std::path::Path::new("log"));
    for seq in [1, 2, u64::try_from(i64::MAX).unwrap()] {
        let head = Head { seq, mac: Mac([7; 32]) };
        heads.save(&head).unwrap();
        assert_eq!(heads.load().unwrap(), Some(head));
    }
    let error = heads.save(&Head { seq: u64::MAX, mac: Mac::NONE }).unwrap_err().to_string();
    assert!(error.contains("the largest number"), "{error}");
}
