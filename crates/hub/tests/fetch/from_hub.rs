//! Files and whole models from the hub.

use std::time::Duration;

use axum::http::StatusCode;
use bindery_hub::HubError;

use crate::support::{COMMIT, HubDouble, Machine, Served, noise, sha256};

const HUB_SOURCE: &str = "[[sources]]\nkind = \"hub\"\nrepo = \"org/repo\"\nfile = \"m.gguf\"\n";

#[tokio::test]
async fn a_file_arrives_in_the_layout_all_hugging_face_tools_share() {
    let bytes = noise(300_000);
    let hub = HubDouble::start(&[("m.gguf", Served::new(&bytes))]).await;
    let machine = Machine::new(Some(&hub.url));
    let files = machine.resolve("org/repo:m.gguf").await.unwrap();
    assert_eq!(std::fs::read(&files.path).unwrap(), bytes);
    assert_eq!(files.digest, Some(format!("sha256:{}", sha256(&bytes))));
    assert_eq!(files.name, "org/repo");
    assert_eq!(
        machine.files_below("hf"),
        [
            format!("models--org--repo/blobs/{}", sha256(&bytes)),
            "models--org--repo/refs/main".to_owned(),
            format!("models--org--repo/snapshots/{COMMIT}/m.gguf"),
        ]
    );
    assert_eq!(machine.listener.bytes_of("downloading"), 300_000);
    assert!(hub.tokens().iter().all(|token| token.as_deref() == Some("Bearer secret-token")));
}

#[tokio::test]
async fn a_second_start_asks_nobody_and_reads_nothing_again() {
    let hub = HubDouble::start(&[("m.gguf", Served::new(&noise(1000)))]).await;
    let machine = Machine::new(Some(&hub.url));
    let first = machine.resolve("org/repo:m.gguf").await.unwrap();
    let (requests, checked) = (hub.num_requests(), machine.listener.bytes_of("checking"));
    assert_eq!(machine.resolve("org/repo:m.gguf").await.unwrap(), first);
    assert_eq!((hub.num_requests(), machine.listener.bytes_of("checking")), (requests, checked));
}

#[tokio::test]
async fn a_cut_transfer_goes_on_where_it_stopped() {
    let bytes = noise(100_000);
    let hub = HubDouble::start(&[("m.gguf", Served { cut_after: Some(40_000), ..Served::new(&bytes) })]).await;
    let machine = Machine::new(Some(&hub.url));
    let files = machine.resolve("org/repo:m.gguf").await.unwrap();
    assert_eq!(std::fs::read(&files.path).unwrap(), bytes);
    let ranges: Vec<_> = hub.gets().into_iter().map(|(_, range)| range).collect();
    assert_eq!(ranges[0], None);
    assert!(ranges.len() >= 3, "{ranges:?}");
    for range in &ranges[1..] {
        assert!(
            range.as_ref().is_some_and(|range| range.ends_with("-99999") && !range.starts_with("bytes=0-")),
            "{ranges:?}"
        );
    }
}

#[tokio::test]
async fn a_transfer_given_up_keeps_its_partial_file_and_the_next_run_goes_on() {
    let bytes = noise(100_000);
    let hub = HubDouble::start(&[("m.gguf", Served { cut_after: Some(0), ..Served::new(&bytes) })]).await;
    let machine = Machine::new(Some(&hub.url));
    let partial = machine.folder.path().join(format!("hf/models--org--repo/blobs/{}.incomplete", sha256(&bytes)));
    std::fs::create_dir_all(partial.parent().unwrap()).unwrap();
    std::fs::write(&partial, &bytes[..60_000]).unwrap();

    let error = machine.resolve("org/repo:m.gguf").await.unwrap_err();
    assert!(matches!(error, HubError::Cut { received: 60_000, total: 100_000, .. }), "{error}");
    assert!(error.hint().unwrap().contains("goes on where it stopped"));
    assert_eq!(std::fs::metadata(&partial).unwrap().len(), 60_000);

    hub.change("m.gguf", |file| file.cut_after = None);
    let files = machine.resolve("org/repo:m.gguf").await.unwrap();
    assert_eq!(std::fs::read(&files.path).unwrap(), bytes);
    assert_eq!(hub.gets().last().unwrap().1.as_deref(), Some("bytes=60000-99999"));
    assert!(!partial.exists());
}

#[tokio::test]
async fn a_partial_file_of_something_else_is_started_over() {
    let bytes = noise(50_000);
    let hub = HubDouble::start(&[("m.gguf", Served::new(&bytes))]).await;
    let machine = Machine::new(Some(&hub.url));
    let partial = machine.folder.path().join(format!("hf/models--org--repo/blobs/{}.incomplete", sha256(&bytes)));
    std::fs::create_dir_all(partial.parent().unwrap()).unwrap();
    std::fs::write(&partial, vec![7; 20_000]).unwrap();
    let files = machine.resolve("org/repo:m.gguf").await.unwrap();
    assert_eq!(std::fs::read(&files.path).unwrap(), bytes);
    assert!(machine.listener.notes().contains("starting over"), "{}", machine.listener.notes());
}

#[tokio::test]
async fn a_server_without_ranges_sends_the_whole_file_again() {
    let bytes = noise(50_000);
    let hub = HubDouble::start(&[("m.gguf", Served { ignores_ranges: true, ..Served::new(&bytes) })]).await;
    let machine = Machine::new(Some(&hub.url));
    let partial = machine.folder.path().join(format!("hf/models--org--repo/blobs/{}.incomplete", sha256(&bytes)));
    std::fs::create_dir_all(partial.parent().unwrap()).unwrap();
    std::fs::write(&partial, &bytes[..20_000]).unwrap();
    let files = machine.resolve("org/repo:m.gguf").await.unwrap();
    assert_eq!(std::fs::read(&files.path).unwrap(), bytes);
}

#[tokio::test]
async fn bytes_that_do_not_match_the_digest_are_not_kept() {
    let bytes = noise(5_000);
    let hub = HubDouble::start(&[("m.gguf", Served { etag: sha256(b"something else"), ..Served::new(&bytes) })]).await;
    let machine = Machine::new(Some(&hub.url));
    let error = machine.resolve("org/repo:m.gguf").await.unwrap_err();
    assert!(matches!(error, HubError::WrongDigest { .. }), "{error}");
    assert!(
        error.to_string().contains(&sha256(&bytes)) && error.to_string().contains(&sha256(b"something else")),
        "{error}"
    );
    assert_eq!(machine.files_below("hf"), Vec::<String>::new());
}

#[tokio::test]
async fn more_bytes_than_promised_are_not_taken() {
    let bytes = noise(5_000);
    let hub = HubDouble::start(&[("m.gguf", Served { claimed_size: Some(1_000), ..Served::new(&bytes) })]).await;
    let machine = Machine::new(Some(&hub.url));
    let error = machine.resolve("org/repo:m.gguf").await.unwrap_err();
    assert!(matches!(error, HubError::WrongSize { expected: 1_000, .. }), "{error}");
    assert_eq!(machine.files_below("hf"), Vec::<String>::new());
}

#[tokio::test]
async fn a_card_whose_hub_file_has_changed_is_refused_before_anything_is_downloaded() {
    let bytes = noise(5_000);
    let other = noise(5_001)[1..].to_vec();
    let hub = HubDouble::start(&[("m.gguf", Served::new(&other))]).await;
    let machine = Machine::new(Some(&hub.url));
    machine.add_card(&bytes, HUB_SOURCE);
    let error = machine.resolve("toy").await.unwrap_err();
    assert!(matches!(error, HubError::WrongDigest { .. }), "{error}");
    assert_eq!(hub.gets(), []);
}

#[tokio::test]
async fn gits_small_files_are_checked_by_their_blob_id() {
    // git hash-object of "hello\n"
    let good = Served { etag: "ce013625030ba8dba906f756967f9e9ca394464a".into(), ..Served::new(b"hello\n") };
    let bad = Served { etag: "ce013625030ba8dba906f756967f9e9ca394464b".into(), ..Served::new(b"hello\n") };
    let hub = HubDouble::start(&[("a.gguf", good), ("b.gguf", bad)]).await;
    let machine = Machine::new(Some(&hub.url));
    assert!(machine.resolve("org/repo:a.gguf").await.is_ok());
    assert!(matches!(machine.resolve("org/repo:b.gguf").await, Err(HubError::WrongDigest { .. })));
}

#[tokio::test]
async fn refusals_of_the_hub_say_what_to_do() {
    let gated = Served { status: StatusCode::UNAUTHORIZED, ..Served::new(b"x") };
    let forbidden = Served { status: StatusCode::FORBIDDEN, ..Served::new(b"x") };
    let hub = HubDouble::start(&[("gated.gguf", gated), ("forbidden.gguf", forbidden)]).await;
    let machine = Machine::new(Some(&hub.url));
    for file in ["gated.gguf", "forbidden.gguf"] {
        let error = machine.resolve(&format!("org/repo:{file}")).await.unwrap_err();
        assert!(matches!(error, HubError::Gated { .. }), "{error}");
        assert!(error.hint().unwrap().contains("HF_TOKEN"));
    }
    let error = machine.resolve("org/repo:missing.gguf").await.unwrap_err();
    assert!(matches!(error, HubError::NotOnHub { .. }) && error.to_string().contains("missing.gguf"), "{error}");
}

#[tokio::test]
async fn a_model_is_fetched_whole_and_nothing_beside_it() {
    let index = br#"{"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;
    let mut files: Vec<(&str, Served)> = [
        "config.json",
        "tokenizer.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "consolidated.safetensors",
        "README.md",
    ]
    .into_iter()
    .map(|name| (name, Served::new(name.as_bytes())))
    .collect();
    files.push(("model.safetensors.index.json", Served::new(index)));
    let hub = HubDouble::start(&files).await;
    let machine = Machine::new(Some(&hub.url));
    let local = machine.resolve("org/repo").await.unwrap();
    let mut names: Vec<String> = std::fs::read_dir(&local.path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    );
    // Afterwards the copy is enough, also without a network.
    let requests = hub.num_requests();
    let offline =
        Machine { options: bindery_hub::FetchOptions { offline: true, ..machine.options.clone() }, ..machine };
    assert_eq!(offline.resolve("org/repo").await.unwrap(), local);
    assert_eq!(hub.num_requests(), requests);

    // A shard that has been cut short since is noticed.
    let shard = std::fs::canonicalize(local.path.join("model-2.safetensors")).unwrap();
    std::fs::write(&shard, "model").unwrap();
    let error = offline.resolve("org/repo").await.unwrap_err();
    assert!(matches!(error, HubError::Offline { .. }), "{error}");
    assert!(offline.listener.notes().contains("model-2.safetensors"), "{}", offline.listener.notes());
}

#[tokio::test]
async fn a_repository_of_gguf_files_wants_a_choice_unless_there_is_one() {
    let one = HubDouble::start(&[("only.gguf", Served::new(b"1")), ("README.md", Served::new(b"2"))]).await;
    let machine = Machine::new(Some(&one.url));
    assert!(machine.resolve("org/repo").await.unwrap().path.ends_with("only.gguf"));

    let two = HubDouble::start(&[("a.gguf", Served::new(b"1")), ("b.gguf", Served::new(b"2"))]).await;
    let machine = Machine::new(Some(&two.url));
    let error = machine.resolve("org/repo").await.unwrap_err();
    assert!(matches!(error, HubError::ChooseFile { .. }), "{error}");
    assert_eq!(error.hint().unwrap(), "name one: org/repo:a.gguf");

    let none = HubDouble::start(&[("README.md", Served::new(b"2"))]).await;
    let machine = Machine::new(Some(&none.url));
    assert!(matches!(machine.resolve("org/repo").await, Err(HubError::NoWeights { .. })));
}

#[tokio::test]
async fn offline_asks_nobody_and_says_how_to_bring_the_file() {
    let bytes = noise(1_000);
    let hub = HubDouble::start(&[("m.gguf", Served::new(&bytes))]).await;
    let mut machine = Machine::new(Some(&hub.url));
    machine.add_card(&bytes, HUB_SOURCE);
    machine.options.offline = true;
    for model in ["toy", "org/repo:m.gguf", "org/repo"] {
        let error = machine.resolve(model).await.unwrap_err();
        assert!(matches!(error, HubError::Offline { .. }), "{error}");
        assert!(error.hint().unwrap().contains(&format!("bindery pull {model}")), "{model}");
    }
    assert_eq!(hub.num_requests(), 0);

    // The card's hint is true: a file copied to where it says is found.
    let target = machine.options.cache_dir.join("models/toy/toy.gguf");
    assert!(machine.resolve("toy").await.unwrap_err().hint().unwrap().contains(target.to_str().unwrap()));
    std::fs::create_dir_all(target.parent().unwrap()).unwrap();
    std::fs::write(&target, &bytes).unwrap();
    assert_eq!(machine.resolve("toy").await.unwrap().path, target);
    assert_eq!(hub.num_requests(), 0);
}

#[tokio::test]
async fn two_fetches_at_once_download_once() {
    let bytes = noise(2_000_000);
    let hub = HubDouble::start(&[("m.gguf", Served::new(&bytes))]).await;
    let machine = Machine::new(Some(&hub.url));
    machine.add_card(&bytes, HUB_SOURCE);
    let (first, second, third) =
        tokio::join!(machine.resolve("toy"), machine.resolve("toy"), machine.resolve("org/repo:m.gguf"));
    for files in [first, second, third] {
        assert_eq!(std::fs::read(files.unwrap().path).unwrap(), bytes);
    }
    assert_eq!(hub.gets().len(), 1);
}

#[tokio::test]
async fn a_cached_file_that_has_changed_is_noticed_and_replaced() {
    let bytes = noise(10_000);
    let hub = HubDouble::start(&[("m.gguf", Served::new(&bytes))]).await;
    let machine = Machine::new(Some(&hub.url));
    machine.add_card(&bytes, HUB_SOURCE);
    let path = machine.resolve("toy").await.unwrap().path;
    let blob = std::fs::canonicalize(&path).unwrap();
    let mut broken = bytes.clone();
    broken[5_000] ^= 1;
    std::fs::write(&blob, &broken).unwrap();
    std::fs::File::options()
        .write(true)
        .open(&blob)
        .unwrap()
        .set_modified(std::time::SystemTime::now() + Duration::from_mins(1))
        .unwrap();
    assert_eq!(std::fs::read(machine.resolve("toy").await.unwrap().path).unwrap(), bytes);
    assert!(machine.listener.notes().contains("broken"), "{}", machine.listener.notes());
    assert_eq!(hub.gets().len(), 2);
}

#[tokio::test]
async fn verify_reads_again_what_the_records_would_believe() {
    let bytes = noise(10_000);
    let hub = HubDouble::start(&[("m.gguf", Served::new(&bytes))]).await;
    let machine = Machine::new(Some(&hub.url));
    machine.add_card(&bytes, HUB_SOURCE);
    let blob = std::fs::canonicalize(machine.resolve("toy").await.unwrap().path).unwrap();
    let progress: bindery_hub::SharedProgress = machine.listener.clone();
    let cards = bindery_hub::Cards::load(machine.options.cards_dir.as_deref()).unwrap();
    let card = cards.find("toy").unwrap();
    let verify = || bindery_hub::inventory::verify(card, &machine.options, &progress);
    assert_eq!(verify().await.unwrap(), bindery_hub::cache::Checked::Good);

    // Bits that rot in place change neither size nor inode, and here not even the time.
    let time = std::fs::metadata(&blob).unwrap().modified().unwrap();
    let mut broken = bytes;
    broken[1] ^= 1;
    std::fs::write(&blob, broken).unwrap();
    std::fs::File::options().write(true).open(&blob).unwrap().set_modified(time).unwrap();
    assert!(matches!(verify().await.unwrap(), bindery_hub::cache::Checked::Broken(_)));
}

#[tokio::test]
async fn a_disk_that_is_too_small_is_told_before_the_download() {
    let bytes = noise(10_000);
    let hub = HubDouble::start(&[("m.gguf", Served::new(&bytes))]).await;
    let mut machine = Machine::new(Some(&hub.url));
    machine.options.free_space = |_| Ok(1_000_000);
    let error = machine.resolve("org/repo:m.gguf").await.unwrap_err();
    assert!(matches!(error, HubError::DiskFull { free: 1_000_000, .. }), "{error}");
    assert_eq!(hub.gets(), []);
}

/// The disk fills while the file comes (other programs write, too). `/dev/full` stands for such a disk: it opens, and
/// refuses every byte.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_disk_that_fills_meanwhile_is_named_and_leaves_nothing_broken() {
    let bytes = noise(300_000);
    let hub = HubDouble::start(&[("m.gguf", Served::new(&bytes))]).await;
    let machine = Machine::new(Some(&hub.url));
    let partial = machine.folder.path().join(format!("hf/models--org--repo/blobs/{}.incomplete", sha256(&bytes)));
    std::fs::create_dir_all(partial.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", &partial).unwrap();

    let error = machine.resolve("org/repo:m.gguf").await.unwrap_err();
    let (text, hint) = (error.to_string(), error.hint().unwrap());
    assert!(text.contains("No space left") && text.contains(".incomplete"), "{text}");
    assert!(hint.contains("free some space") && hint.contains("HF_HOME"), "{hint}");
    assert!(!machine.files_below("hf").iter().any(|file| file.contains("snapshots")), "nothing looks finished");

    // Space again: the same command ends well.
    std::fs::remove_file(&partial).unwrap();
    assert_eq!(std::fs::read(machine.resolve("org/repo:m.gguf").await.unwrap().path).unwrap(), bytes);
}

/// The card `toy`: the hub first, then a file of this machine, whose path comes back and which does not exist yet.
fn add_card_with_next_source(machine: &Machine, bytes: &[u8]) -> std::path::PathBuf {
    let here = machine.folder.path().join("here.gguf");
    let next = format!("[[sources]]\nkind = \"path\"\npath = \"{}\"\n", here.display());
    machine.add_card(bytes, &format!("{HUB_SOURCE}{next}"));
    here
}

#[tokio::test]
async fn a_hub_that_never_answers_gives_way_in_time() {
    // Accepts connections and says nothing.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut machine = Machine::new(Some(&format!("http://{}", listener.local_addr().unwrap())));
    // Half of it is the connection's, which must come to be, on any machine.
    machine.options.limits.reach = Duration::from_secs(2);
    let bytes = noise(1_000);
    let here = add_card_with_next_source(&machine, &bytes);
    std::fs::write(&here, &bytes).unwrap();
    assert_eq!(machine.resolve("toy").await.unwrap().path, here);
    let notes = machine.listener.notes();
    assert!(notes.contains("no answer within") && notes.contains("trying the next source"), "{notes}");
}

/// The hub describes the file, but where it lies nobody answers: a firewall that knows one of two hosts.
#[tokio::test]
async fn a_storage_that_never_sends_gives_way_like_a_hub_that_never_answers() {
    let bytes = noise(1_000);
    let hub = HubDouble::start(&[("m.gguf", Served { never_sends: true, ..Served::new(&bytes) })]).await;
    let mut machine = Machine::new(Some(&hub.url));
    // Within it the hub's own answers must come, on any machine.
    machine.options.limits.reach = Duration::from_secs(2);
    let here = add_card_with_next_source(&machine, &bytes);
    std::fs::write(&here, &bytes).unwrap();
    assert_eq!(machine.resolve("toy").await.unwrap().path, here);
    assert_eq!(hub.gets().len(), 1, "one try: no byte ever came");
    let notes = machine.listener.notes();
    assert!(notes.contains("nothing came") && notes.contains("trying the next source"), "{notes}");
}

/// The hub's folder cannot be written to; the next source has a folder of its own.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_full_disk_under_the_hub_does_not_keep_the_next_source_from_trying() {
    let bytes = noise(1_000);
    let hub = HubDouble::start(&[("m.gguf", Served::new(&bytes))]).await;
    let machine = Machine::new(Some(&hub.url));
    let partial = machine.folder.path().join(format!("hf/models--org--repo/blobs/{}.incomplete", sha256(&bytes)));
    std::fs::create_dir_all(partial.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", &partial).unwrap();
    let here = add_card_with_next_source(&machine, &bytes);
    let error = machine.resolve("toy").await.unwrap_err();
    assert!(error.hint().unwrap().contains("free some space"), "{error}: {:?}", error.hint());
    std::fs::write(&here, &bytes).unwrap();
    assert_eq!(machine.resolve("toy").await.unwrap().path, here);
}

#[tokio::test]
async fn a_hub_that_refuses_more_requests_is_told_as_such() {
    let served = Served { status: StatusCode::TOO_MANY_REQUESTS, ..Served::new(&noise(10)) };
    let hub = HubDouble::start(&[("m.gguf", served)]).await;
    let error = Machine::new(Some(&hub.url)).resolve("org/repo:m.gguf").await.unwrap_err();
    assert!(matches!(error, HubError::RateLimited { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("HF_TOKEN"));
}

#[tokio::test]
async fn an_update_that_cannot_be_had_leaves_the_copy_in_use() {
    let bytes = noise(1_000);
    let hub = HubDouble::start(&[("m.gguf", Served::new(&bytes))]).await;
    let mut machine = Machine::new(Some(&hub.url));
    let files = machine.resolve("org/repo:m.gguf").await.unwrap();
    machine.options.refresh = true;
    machine.options.hub.endpoint = Some("http://127.0.0.1:9".into());
    assert_eq!(machine.resolve("org/repo:m.gguf").await.unwrap(), files);
    assert!(machine.listener.notes().contains("using the copy that is here"), "{}", machine.listener.notes());
}
