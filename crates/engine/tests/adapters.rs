//! Adapters from the door to the last token, over a model that notices a key of another version.
//!
//! The double's logits depend on the adapter's tag, which is written in its file; [`naive`] says independently which tokens a
//! tag gives. Nothing sleeps but looks at watched folders: gates hold steps and readings.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bindery_engine::{
    AdapterError, AdapterLease, AdapterPoolConfig, LocalModel, Prompt, SamplingParams, TextEvent, TextRequest, TokenId,
    adapters::{AdapterFolder, AdapterRoots, AdapterSource, AdapterSpec, AdapterState, AdapterUse, Unload},
    sample::{PreparedSampling, SampleState, Sampler},
    testing::{EOS, FakeModelOptions, FakeReader, VOCAB_SIZE, expected_logits, fake_local_model, gate, small_limits},
};

fn write(root: &Path, name: &str, tag: &str) -> PathBuf {
    let folder = root.join(name);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("adapter_config.json"), "{}").unwrap();
    fs::write(folder.join("adapter_model.safetensors"), tag).unwrap();
    folder
}

fn spec(root: &Path, name: &str) -> AdapterSpec {
    AdapterSpec { name: name.to_owned(), source: AdapterSource::Path(root.join(name)), tenants: None, pinned: false }
}

fn pool(max_loras: usize, max_cpu_loras: usize) -> AdapterPoolConfig {
    AdapterPoolConfig { max_loras, max_cpu_loras, ..AdapterPoolConfig::default() }
}

fn model(options: FakeModelOptions) -> LocalModel {
    fake_local_model(small_limits(), options).unwrap()
}

fn prompt(start: u32, length: usize) -> Vec<TokenId> {
    (0..length as u32).map(|index| TokenId((start * 31 + index * 7) % 200)).collect()
}

fn params(max_tokens: usize) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens, ignore_eos: true, ..SamplingParams::default() }
}

/// What the model gives through an adapter of this tag.
fn naive(tag: Option<u32>, prompt: &[TokenId], max_tokens: usize) -> Vec<TokenId> {
    let prepared = PreparedSampling::new(&params(max_tokens), prompt, &[EOS]);
    let mut state = SampleState::new(0);
    let mut history: Vec<u32> = tag.into_iter().chain(prompt.iter().map(|token| token.0)).collect();
    let (mut logits, mut tokens) = (vec![0.0; VOCAB_SIZE], Vec::new());
    while tokens.len() < max_tokens {
        expected_logits(&history, 0.0, &mut logits);
        let token = Sampler::default().sample(&logits, &prepared, &state, None).unwrap();
        tokens.push(token);
        history.push(token.0);
        state.record(token, &prepared);
    }
    tokens
}

/// The answer's tokens; with n > 1 of the first sample, the others being the same.
async fn answer(
    model: &LocalModel,
    lease: Option<AdapterLease>,
    prompt: &[TokenId],
    max_tokens: usize,
    n: u32,
) -> Vec<TokenId> {
    let request = TextRequest {
        params: params(max_tokens),
        max_tokens: Some(max_tokens),
        num_samples: n,
        skip_special_tokens: false,
        ..TextRequest::new(Prompt::Tokens(prompt.to_vec()))
    };
    let mut prepared = model.prepare(request).await.unwrap();
    if let Some(lease) = lease {
        prepared.set_adapter(lease);
    }
    let mut stream = model.submit_all(vec![prepared]).await.unwrap().pop().unwrap();
    let mut tokens = vec![Vec::new(); n as usize];
    while let Some(event) = stream.next().await {
        if let TextEvent::Delta { sample, tokens: new, .. } = event.unwrap() {
            tokens[sample as usize].extend(new.iter().map(|token| token.id));
        }
    }
    assert!(tokens.iter().all(|sample| *sample == tokens[0]), "greedy samples are alike");
    tokens.swap_remove(0)
}

#[tokio::test]
async fn each_row_goes_through_its_own_adapter_and_the_base_through_none() {
    let temp = tempfile::tempdir().unwrap();
    let batches = Arc::default();
    let (steps, keeper) = gate();
    let model = Arc::new(model(FakeModelOptions {
        adapters: pool(4, 4),
        gate: Some(steps),
        batches: Some(Arc::clone(&batches)),
        ..Default::default()
    }));
    for (name, tag) in [("a", "1001"), ("b", "1002"), ("c", "1003")] {
        write(temp.path(), name, tag);
        model.adapters.register(spec(temp.path(), name)).unwrap();
    }
    let ways =
        [None, Some(("a", 1001)), Some(("b", 1002)), Some(("a", 1001)), Some(("c", 1003)), None, Some(("b", 1002))];
    let answers: Vec<_> = (0..ways.len())
        .map(|at| {
            let model = Arc::clone(&model);
            tokio::spawn(async move {
                let lease = match ways[at] {
                    None => None,
                    Some((name, _)) => Some(model.adapters.acquire(name, None).await.unwrap()),
                };
                let prompt = prompt(at as u32, 3 + 9 * at);
                let found = answer(&model, lease, &prompt, 12, 1 + at as u32 % 3).await;
                assert_eq!(found, naive(ways[at].map(|(_, tag)| tag), &prompt, 12), "{:?}", ways[at]);
            })
        })
        .collect();
    // The first step waits until all are there, so that they meet in one batch.
    while model.engine.num_unfinished() < ways.len() {
        tokio::task::yield_now().await;
    }
    drop(keeper);
    for answer in answers {
        answer.await.unwrap();
    }
    model.engine.idle().await;
    assert_eq!(model.adapters.in_use(), AdapterUse::default());
    // Rows of one adapter follow each other, the base's come first.
    let mut largest = 0;
    for batch in batches.lock().unwrap().iter() {
        let ways: Vec<Option<u32>> = batch.sequences.iter().map(|sequence| sequence.adapter).collect();
        assert!(ways.is_sorted(), "{ways:?}");
        let mut distinct = ways;
        distinct.dedup();
        largest = largest.max(distinct.len());
    }
    assert!(largest > 2, "adapters were mixed in one batch");
}

#[tokio::test]
async fn an_adapter_is_read_once_for_all_who_wait_and_nobody_else_waits() {
    let temp = tempfile::tempdir().unwrap();
    let (reading, keeper) = gate();
    let model = model(FakeModelOptions {
        adapters: pool(2, 2),
        reader: FakeReader { gate: Some(reading), ..FakeReader::default() },
        ..FakeModelOptions::default()
    });
    write(temp.path(), "slow", "77");
    model.adapters.register(spec(temp.path(), "slow")).unwrap();
    let acquire = || {
        let pool = model.adapters.clone();
        tokio::spawn(async move { pool.acquire("slow", None).await })
    };
    let (first, second, third) = (acquire(), acquire(), acquire());
    let keeper = tokio::task::spawn_blocking(move || {
        keeper.wait_for_step();
        keeper
    })
    .await
    .unwrap();
    // The base answers meanwhile, and the one that waits is told of.
    let prompt = prompt(1, 8);
    assert_eq!(answer(&model, None, &prompt, 5, 1).await, naive(None, &prompt, 5));
    while model.adapters.in_use().waiting.is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(model.adapters.list()[0].state, AdapterState::Loading);
    // One goes away; the reading goes on for the others.
    third.abort();
    keeper.let_go();
    let (first, second) = (first.await.unwrap().unwrap(), second.await.unwrap().unwrap());
    assert_eq!(first.id(), second.id(), "read once");
    assert_eq!(answer(&model, Some(first), &prompt, 5, 1).await, naive(Some(77), &prompt, 5));
    let status = &model.adapters.list()[0];
    assert_eq!((status.version, status.state), (1, AdapterState::Resident));
    assert!(status.digest.as_ref().unwrap().starts_with("sha256:"));
}

#[tokio::test]
async fn no_more_requests_wait_for_adapters_than_may_be_queued() {
    let temp = tempfile::tempdir().unwrap();
    let (reading, keeper) = gate();
    let limit = 3;
    let options = FakeModelOptions {
        adapters: pool(4, 4),
        reader: FakeReader { gate: Some(reading), ..FakeReader::default() },
        ..Default::default()
    };
    let mut limits = small_limits();
    limits.max_queued_requests = limit;
    let model = Arc::new(fake_local_model(limits, options).unwrap());
    for name in ["slow", "other"] {
        write(temp.path(), name, "1001");
        model.adapters.register(spec(temp.path(), name)).unwrap();
    }
    let waiting: Vec<_> = (0..limit)
        .map(|_| {
            let model = Arc::clone(&model);
            tokio::spawn(async move { model.adapters.acquire("slow", None).await })
        })
        .collect();
    // Tasks of this thread's runtime: after so many turns all of them wait.
    for _ in 0..=limit {
        tokio::task::yield_now().await;
    }
    for name in ["slow", "other"] {
        let refused = model.adapters.acquire(name, None).await.unwrap_err();
        assert_eq!(refused, AdapterError::QueueFull { max_waiting: limit });
    }
    assert_eq!(model.adapters.in_use().num_waiting, limit);
    drop(keeper);
    for waited in waiting {
        waited.await.unwrap().unwrap();
    }
    assert_eq!(model.adapters.in_use().num_waiting, 0);
    // The refused request has had its adapter read all the same.
    model.adapters.acquire("other", None).await.unwrap();
    model.adapters.acquire("slow", None).await.unwrap();
}

#[tokio::test]
async fn a_running_request_keeps_its_version_and_new_ones_get_the_new() {
    let temp = tempfile::tempdir().unwrap();
    let (steps, keeper) = gate();
    let model =
        Arc::new(model(FakeModelOptions { adapters: pool(2, 3), gate: Some(steps), ..FakeModelOptions::default() }));
    write(temp.path(), "a", "11");
    model.adapters.load(spec(temp.path(), "a"), false).await.unwrap();
    let exists = model.adapters.load(spec(temp.path(), "a"), false).await.unwrap_err();
    assert!(matches!(exists, AdapterError::Exists { .. }), "{exists}");
    let prompt = prompt(3, 30);
    let lease = model.adapters.acquire("a", None).await.unwrap();
    let running = tokio::spawn({
        let (model, prompt) = (Arc::clone(&model), prompt.clone());
        async move { answer(&model, Some(lease), &prompt, 20, 3).await }
    });
    let keeper = tokio::task::spawn_blocking(move || {
        for _ in 0..3 {
            keeper.wait_for_step();
            keeper.let_go();
        }
        keeper.wait_for_step();
        keeper
    })
    .await
    .unwrap();
    write(temp.path(), "a", "22");
    model.adapters.load(spec(temp.path(), "a"), true).await.unwrap();
    // A broken third version changes nothing.
    write(temp.path(), "a", "broken");
    let broken = model.adapters.load(spec(temp.path(), "a"), true).await.unwrap_err();
    assert!(matches!(&broken, AdapterError::Unreadable { reason, .. } if reason.contains("broken")), "{broken}");
    let lease = model.adapters.acquire("a", None).await.unwrap();
    let states: Vec<_> =
        model.adapters.list().iter().map(|status| (status.version, status.state, status.num_users)).collect();
    assert_eq!(states, [(2, AdapterState::Resident, 1), (1, AdapterState::Draining, 1)]);
    drop(keeper);
    assert_eq!(answer(&model, Some(lease), &prompt, 20, 1).await, naive(Some(22), &prompt, 20));
    assert_eq!(running.await.unwrap(), naive(Some(11), &prompt, 20));
    model.engine.idle().await;
    let states: Vec<_> = model.adapters.list().iter().map(|status| (status.version, status.num_users)).collect();
    assert_eq!(states, [(2, 0)], "the old version is gone with its last request");
}

#[tokio::test]
async fn unloading_waits_or_refuses_as_asked_and_the_name_is_gone_at_once() {
    let temp = tempfile::tempdir().unwrap();
    let model = model(FakeModelOptions { adapters: pool(1, 2), ..FakeModelOptions::default() });
    write(temp.path(), "a", "5");
    model.adapters.load(spec(temp.path(), "a"), false).await.unwrap();
    let lease = model.adapters.acquire("a", None).await.unwrap();
    let refused = model.adapters.unload("a", Unload::RefuseIfUsed).await.unwrap_err();
    assert_eq!(refused, AdapterError::InUse { name: "a".to_owned(), num_users: 1 });
    let late = model.adapters.unload("a", Unload::Wait(Some(Duration::ZERO))).await.unwrap_err();
    assert_eq!(late, AdapterError::StillDraining { name: "a".to_owned(), num_users: 1 });
    assert!(matches!(model.adapters.acquire("a", None).await.unwrap_err(), AdapterError::Unknown { .. }));
    // The name is free for another, while the old one still answers.
    write(temp.path(), "a", "6");
    let prompt = prompt(9, 5);
    let waiting = tokio::spawn({
        let pool = model.adapters.clone();
        async move { pool.unload("a", Unload::Wait(None)).await }
    });
    assert!(matches!(waiting.await.unwrap().unwrap_err(), AdapterError::Unknown { .. }));
    model.adapters.load(spec(temp.path(), "a"), false).await.unwrap();
    assert_eq!(answer(&model, Some(lease), &prompt, 4, 1).await, naive(Some(5), &prompt, 4));
    let lease = model.adapters.acquire("a", None).await.unwrap();
    assert_eq!(answer(&model, Some(lease), &prompt, 4, 1).await, naive(Some(6), &prompt, 4));
    model.engine.idle().await;
    model.adapters.unload("a", Unload::Wait(None)).await.unwrap();
    assert!(model.adapters.list().is_empty());
}

#[tokio::test]
async fn a_request_waits_for_a_place_until_another_has_ended() {
    let temp = tempfile::tempdir().unwrap();
    let model = model(FakeModelOptions { adapters: pool(1, 2), ..FakeModelOptions::default() });
    for (name, tag) in [("a", "1"), ("b", "2"), ("c", "3")] {
        write(temp.path(), name, tag);
        model.adapters.register(spec(temp.path(), name)).unwrap();
    }
    let lease = model.adapters.acquire("a", None).await.unwrap();
    let pool = model.adapters.clone();
    let waiting = tokio::spawn(async move { pool.acquire("b", None).await });
    while !model.adapters.in_use().waiting.contains(&"b".to_owned()) {
        tokio::task::yield_now().await;
    }
    drop(lease);
    let lease = waiting.await.unwrap().unwrap();
    let prompt = prompt(2, 6);
    assert_eq!(answer(&model, Some(lease), &prompt, 4, 1).await, naive(Some(2), &prompt, 4));
    model.engine.idle().await;
    // The third one finds a place in memory, too: the one unused for longest is let go.
    let lease = model.adapters.acquire("c", None).await.unwrap();
    assert_eq!(answer(&model, Some(lease), &prompt, 4, 1).await, naive(Some(3), &prompt, 4));
    assert!(!model.adapters.is_in_memory("a"));
    write(temp.path(), "a", "broken");
    let broken = model.adapters.acquire("a", None).await.unwrap_err();
    assert!(matches!(broken, AdapterError::Unreadable { .. }), "{broken}");
    assert!(model.adapters.list()[0].failure.as_ref().unwrap().contains("broken"));
}

#[tokio::test]
async fn a_load_that_waits_for_memory_is_known_when_it_is_placed_and_not_before() {
    let temp = tempfile::tempdir().unwrap();
    let model = model(FakeModelOptions { adapters: pool(1, 1), ..FakeModelOptions::default() });
    for (name, tag) in [("a", "1"), ("b", "2")] {
        write(temp.path(), name, tag);
    }
    model.adapters.load(spec(temp.path(), "a"), false).await.unwrap();
    let lease = model.adapters.acquire("a", None).await.unwrap();
    let load = tokio::spawn({
        let (pool, spec) = (model.adapters.clone(), spec(temp.path(), "b"));
        async move { pool.load(spec, false).await }
    });
    // However far the load has come: to the end of the running request there is one adapter.
    for _ in 0..1000 {
        tokio::task::yield_now().await;
        assert_eq!(model.adapters.specs().len(), 1, "requests cannot name it yet");
    }
    drop(lease);
    load.await.unwrap().unwrap();
    assert_eq!(model.adapters.list()[1].version, 1);
    // A load for which there never is a place leaves no name behind either.
    let pinned = AdapterSpec { pinned: true, ..spec(temp.path(), "b") };
    model.adapters.load(pinned, true).await.unwrap();
    write(temp.path(), "c", "3");
    let refused = model.adapters.load(spec(temp.path(), "c"), false).await.unwrap_err();
    assert!(matches!(refused, AdapterError::NoRoom { .. }), "{refused}");
    assert!(model.adapters.spec("c").is_none());
}

/// Loads, replacements, unloadings, requests and disconnects at random: every answer is of a version that the name had
/// while its request asked for it, and nothing is left behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn churn_gives_right_answers_and_leaves_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let root = Arc::new(temp.path().to_owned());
    let model = Arc::new(model(FakeModelOptions { adapters: pool(3, 5), ..FakeModelOptions::default() }));
    // A name's tag is its number times 1000 and the version; readers may find any that was current meanwhile.
    let newest: Arc<Vec<AtomicU32>> = Arc::new((0..6).map(|_| AtomicU32::new(0)).collect());
    for at in 0..6 {
        write(&root, &format!("n{at}"), &format!("{}", at * 1000));
        model.adapters.register(spec(&root, &format!("n{at}"))).unwrap();
    }
    let rounds = if std::env::var_os("BINDERY_TEST_FULL").is_some() { 2_000 } else { 40 };
    let changer = tokio::spawn({
        let (model, newest, root) = (Arc::clone(&model), Arc::clone(&newest), Arc::clone(&root));
        async move {
            for round in 0..rounds {
                let at = (round * 5 + round / 3) % 6;
                let name = format!("n{at}");
                if round % 7 == 6 {
                    let gone = model.adapters.unload(&name, Unload::Wait(None)).await;
                    assert!(matches!(gone, Ok(()) | Err(AdapterError::Unknown { .. })), "{gone:?}");
                }
                let version = newest[at].load(Ordering::SeqCst) + 1;
                // Whole, as an operator should: a new folder, then its name.
                write(&root, &format!(".{name}-{version}"), &format!("{}", at as u32 * 1000 + version));
                let source = AdapterSource::Path(root.join(format!(".{name}-{version}")));
                newest[at].store(version, Ordering::SeqCst);
                model.adapters.load(AdapterSpec { source, ..spec(&root, &name) }, true).await.unwrap();
            }
        }
    });
    let clients: Vec<_> = (0..8_u32)
        .map(|client| {
            let (model, newest) = (Arc::clone(&model), Arc::clone(&newest));
            tokio::spawn(async move {
                let owner: Arc<str> = format!("tenant {}", client % 3).into();
                for round in 0..rounds as u32 {
                    let at = (client * 3 + round * 7) as usize % 6;
                    let prompt = prompt(client * 50 + round, 4 + (round % 20) as usize);
                    let before = newest[at].load(Ordering::SeqCst).saturating_sub(1);
                    let lease = match model.adapters.acquire(&format!("n{at}"), Some(&owner)).await {
                        Ok(lease) => lease,
                        Err(AdapterError::Unknown { .. }) => continue,
                        Err(error) => panic!("{error}"),
                    };
                    let after = newest[at].load(Ordering::SeqCst);
                    if round % 5 == 4 {
                        // Goes away in the middle.
                        let cut =
                            tokio::time::timeout(Duration::ZERO, answer(&model, Some(lease), &prompt, 400, 2)).await;
                        assert!(cut.is_err(), "nobody is that quick");
                        continue;
                    }
                    let found = answer(&model, Some(lease), &prompt, 6, 1).await;
                    let possible: Vec<_> =
                        (before..=after).map(|version| naive(Some(at as u32 * 1000 + version), &prompt, 6)).collect();
                    assert!(possible.contains(&found), "n{at}: of no version from {before} to {after}");
                }
            })
        })
        .collect();
    changer.await.unwrap();
    for client in clients {
        client.await.unwrap();
    }
    model.engine.idle().await;
    assert_eq!(model.adapters.in_use(), AdapterUse::default());
    for status in model.adapters.list() {
        assert_eq!(status.num_users, 0, "{status:?}");
        assert_ne!(status.state, AdapterState::Draining, "{status:?}");
    }
    let names: Vec<String> = model.adapters.specs().into_iter().map(|spec| spec.name).collect();
    for name in names {
        model.adapters.unload(&name, Unload::RefuseIfUsed).await.unwrap();
    }
    assert_eq!(model.engine.stats().num_failed_steps, 0);
}

/// Looks often enough for tests; renamed versions count at the second look.
const LOOKS: Duration = Duration::from_millis(5);

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..2_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(LOOKS).await;
    }
    panic!("it never came: {what}");
}

fn watched(model: &LocalModel, path: &Path) -> AdapterFolder {
    AdapterFolder::new(model.adapters.clone(), path.to_owned(), AdapterRoots::default(), None, Arc::new(|_| false))
}

/// Found where an adapter of one tenant was forgotten with its files and came back for everybody.
#[tokio::test]
async fn an_adapter_given_by_name_stays_its_tenants_whatever_becomes_of_its_files() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path().canonicalize().unwrap();
    let model = model(FakeModelOptions::default());
    let acmes = AdapterSpec { tenants: Some(vec!["acme".to_owned()]), ..spec(&root, "given") };
    let (given, own) = (write(&root, "given", "1001"), write(&root, "own", "1002"));
    model.adapters.load(acmes, false).await.unwrap();
    let mut folder = watched(&model, &root);
    folder.install(true).unwrap();
    let watching = tokio::spawn(folder.watch(LOOKS));
    let tenants = |name: &str| model.adapters.spec(name).map(|spec| spec.tenants);
    assert_eq!((tenants("given"), tenants("own")), (Some(Some(vec!["acme".to_owned()])), Some(None)));

    for folder in [&given, &own] {
        fs::rename(folder, root.join(format!(".{}", folder.file_name().unwrap().to_string_lossy()))).unwrap();
    }
    until("what the folder brought is gone with it", || tenants("own").is_none()).await;
    assert_eq!(tenants("given"), Some(Some(vec!["acme".to_owned()])));
    let digest = || model.adapters.identity("given").unwrap().digest.clone();
    let first = digest();
    fs::rename(write(&root, ".new", "1003"), &given).unwrap();
    until("the new version is in use", || digest() != first).await;
    assert_eq!(tenants("given"), Some(Some(vec!["acme".to_owned()])));

    // Unloaded by hand, its next version does not come back for everybody.
    model.adapters.unload("given", Unload::Wait(None)).await.unwrap();
    fs::rename(&given, root.join(".old")).unwrap();
    fs::rename(write(&root, ".newer", "1004"), &given).unwrap();
    fs::rename(root.join(".own"), &own).unwrap();
    until("the other one comes back", || tenants("own").is_some()).await;
    assert_eq!(tenants("given"), None);
    watching.abort();
}

#[tokio::test]
async fn a_name_that_an_earlier_folder_gives_up_is_the_next_ones() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path().canonicalize().unwrap();
    let model = model(FakeModelOptions::default());
    let first = write(&root.join("first"), "a", "1001");
    write(&root.join("second"), "a", "1002");
    let mut watching = Vec::new();
    for name in ["first", "second"] {
        let mut folder = watched(&model, &root.join(name));
        folder.install(true).unwrap();
        watching.push(tokio::spawn(folder.watch(LOOKS)));
    }
    let source = || model.adapters.spec("a").map(|spec| spec.source.to_string());
    assert_eq!(source(), Some(first.display().to_string()));
    fs::remove_dir_all(&first).unwrap();
    let second = root.join("second/a").display().to_string();
    until("the second has it", || source().as_ref() == Some(&second)).await;
    watching.iter().for_each(tokio::task::JoinHandle::abort);
}
