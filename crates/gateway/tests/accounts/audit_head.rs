//! The audit log's head in the store: a log that was cut or begun anew does not pass, whatever was done to its folder.

use std::time::Duration;

use bindery_gateway::{
    audit::{
        AuditError, AuditKey, Fsync, Head, HeadStore as _, HeadStoreError, Journal, JournalConfig, RequestRecord,
        Retention, line::Mac, verify,
    },
    store::{LogWriter, Store, StoreHeads},
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
    named_heads(store, &log.display().to_string(), "one")
}

fn named_heads(store: &Store, log: &str, writer: &str) -> StoreHeads {
    StoreHeads::new(store.clone(), tokio::runtime::Handle::current(), LogWriter { log, writer })
}

/// Off the runtime's threads, as the log's own thread is.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

async fn load(heads: &StoreHeads) -> Option<Head> {
    let heads = heads.clone();
    blocking(move || heads.load().unwrap()).await
}

async fn save(heads: &StoreHeads, seq: u64) -> Result<(), HeadStoreError> {
    let heads = heads.clone();
    blocking(move || heads.save(&Head { seq, mac: Mac([7; 32]) })).await
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
        blocking(move || saved.load().and_then(|_| saved.save(&written))).await.unwrap();
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

    /// Nodes of one configuration: the same folder's name on each, and one store.
    async fn logs_of_several_nodes_lie_side_by_side(place) {
        let (here, _here) = place.open().await;
        let (there, _there) = place.open().await;
        let (one, two) = (named_heads(&here, "a:/var/log", "a"), named_heads(&there, "b:/var/log", "b"));
        for seq in [1, 5, 9] {
            assert_eq!(load(&one).await, load(&two).await);
            save(&one, seq).await.unwrap();
            save(&two, seq).await.unwrap();
        }
        save(&one, 10).await.unwrap();
        assert_eq!((one.newest().await.unwrap().unwrap().seq, two.newest().await.unwrap().unwrap().seq), (10, 9));
    }

    async fn of_two_that_write_one_log_one_is_refused_by_name(place) {
        let (here, _here) = place.open().await;
        let (there, _there) = place.open().await;
        let (one, two) = (named_heads(&here, "log", "node-a"), named_heads(&there, "log", "node-b"));
        // Both find no log and begin one: the later of the two first saves fails.
        assert_eq!((load(&one).await, load(&two).await), (None, None));
        save(&one, 1).await.unwrap();
        let refused = save(&two, 1).await.unwrap_err();
        assert!(matches!(&refused, HeadStoreError::OtherWriter { writer, .. } if writer == "node-a"), "{refused}");
        save(&one, 2).await.unwrap();
        // A process that starts after it takes over, as after a restart; the earlier one learns of it and of who it is.
        assert_eq!(load(&two).await.unwrap().seq, 2);
        save(&two, 3).await.unwrap();
        save(&two, 4).await.unwrap();
        let refused = save(&one, 3).await.unwrap_err();
        assert!(matches!(&refused, HeadStoreError::OtherWriter { writer, .. } if writer == "node-b"), "{refused}");
        assert_eq!(one.newest().await.unwrap().unwrap().seq, 4, "what was refused has changed nothing");
    }

    /// A second node with the first one's name and a folder of its own finds a log that is not there.
    async fn a_log_of_a_name_that_is_taken_is_not_begun(place) {
        let folder = tempfile::tempdir().unwrap();
        let (store, _thread) = place.open().await;
        let begin = async |folder: std::path::PathBuf| {
            let (config, heads) = (config(&folder), named_heads(&store, "log", "node"));
            blocking(move || Journal::open(config, Box::new(heads))).await
        };
        let mut first = begin(folder.path().join("a")).await.unwrap();
        let second = begin(folder.path().join("b")).await.unwrap_err();
        assert!(matches!(second, AuditError::Vanished { seq: 1, .. }) && second.to_string().contains("[audit] name"), "{second}");
        // Which has not disturbed the first.
        blocking(move || first.append_request(&RequestRecord::default(), None)).await.unwrap();
    }
}

/// The log's thread may also run on the runtime that serves the store, as long as another worker goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_are_read_and_saved_from_wherever_blocking_may_be() {
    let place = Place::sqlite();
    let (store, _thread) = place.open().await;
    let heads = heads(&store, std::path::Path::new("log"));
    assert_eq!(heads.load().unwrap(), None);
    for seq in [1, 2, u64::try_from(i64::MAX).unwrap()] {
        let head = Head { seq, mac: Mac([7; 32]) };
        heads.save(&head).unwrap();
        assert_eq!(heads.load().unwrap(), Some(head));
    }
    let error = heads.save(&Head { seq: u64::MAX, mac: Mac::NONE }).unwrap_err().to_string();
    assert!(error.contains("the largest number"), "{error}");
}
