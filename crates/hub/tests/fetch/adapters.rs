//! Adapters of the hub: peft's two files of one commit, GGUF files by name, offline, and repositories of something else.

use bindery_hub::{AdapterRef, FetchOptions, HubError, SharedProgress, locate_adapter, resolve_adapter};

use crate::support::{COMMIT, HubDouble, Machine, Served, noise};

async fn fetch(machine: &Machine, adapter: &str, options: &FetchOptions) -> Result<std::path::PathBuf, HubError> {
    let progress: SharedProgress = machine.listener.clone();
    resolve_adapter(&AdapterRef::parse(adapter).unwrap(), options, &progress).await
}

#[tokio::test]
async fn a_repository_is_fetched_once_and_found_offline_after() {
    let weights = noise(40_000);
    let hub = HubDouble::start(&[
        ("adapter_config.json", Served::new(b"{}")),
        ("adapter_model.safetensors", Served::new(&weights)),
        ("README.md", Served::new(b"words")),
    ])
    .await;
    let machine = Machine::new(Some(&hub.url));
    let reference = AdapterRef::parse("org/repo").unwrap();
    assert_eq!(locate_adapter(&reference, &machine.options), None);
    let folder = fetch(&machine, "org/repo", &machine.options).await.unwrap();
    assert_eq!(folder.file_name().unwrap(), COMMIT);
    assert_eq!(std::fs::read(folder.join("adapter_model.safetensors")).unwrap(), weights);
    assert_eq!(std::fs::read(folder.join("adapter_config.json")).unwrap(), b"{}");
    let fetched: Vec<String> = hub.gets().into_iter().map(|(file, _)| file).collect();
    assert_eq!(fetched, ["adapter_config.json", "adapter_model.safetensors"], "nothing else is fetched");

    let num_requests = hub.num_requests();
    let offline = FetchOptions { offline: true, ..machine.options.clone() };
    assert_eq!(fetch(&machine, "org/repo", &offline).await.unwrap(), folder);
    assert_eq!(fetch(&machine, "org/repo", &machine.options).await.unwrap(), folder);
    assert_eq!(hub.num_requests(), num_requests, "what is here is not asked for again");
    assert_eq!(locate_adapter(&reference, &machine.options), Some(folder));
}

#[tokio::test]
async fn a_gguf_file_is_named() {
    let bytes = noise(3_000);
    let hub = HubDouble::start(&[("lora.gguf", Served::new(&bytes))]).await;
    let machine = Machine::new(Some(&hub.url));
    let path = fetch(&machine, "org/repo@main:lora.gguf", &machine.options).await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), bytes);
}

#[tokio::test]
async fn a_broken_copy_is_fetched_again() {
    let hub = HubDouble::start(&[
        ("adapter_config.json", Served::new(b"{}")),
        ("adapter_model.safetensors", Served::new(&noise(4_000))),
    ])
    .await;
    let machine = Machine::new(Some(&hub.url));
    let weights = fetch(&machine, "org/repo", &machine.options).await.unwrap().join("adapter_model.safetensors");
    std::fs::write(std::fs::canonicalize(&weights).unwrap(), b"short").unwrap();
    fetch(&machine, "org/repo", &machine.options).await.unwrap();
    assert_eq!(std::fs::read(&weights).unwrap(), noise(4_000));
    assert!(machine.listener.notes().contains("is broken"), "{}", machine.listener.notes());
}

#[tokio::test]
async fn what_cannot_be_had_says_why_and_what_to_do() {
    let pickled = [("adapter_config.json", Served::new(b"{}")), ("adapter_model.bin", Served::new(b"x"))];
    for (files, expected) in [
        (&pickled[..], "pickle (adapter_model.bin)"),
        (&pickled[..1], "it has no adapter_model.safetensors"),
        (&[("config.json", Served::new(b"{}"))], "it has no adapter_config.json and adapter_model.safetensors"),
    ] {
        let hub = HubDouble::start(files).await;
        let machine = Machine::new(Some(&hub.url));
        let error = fetch(&machine, "org/repo", &machine.options).await.unwrap_err();
        assert!(matches!(error, HubError::NoAdapter { .. }) && error.hint().is_some(), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(hub.gets(), [], "nothing is fetched in vain");
    }
    let machine = Machine::new(None);
    let offline = FetchOptions { offline: true, ..machine.options.clone() };
    let error = fetch(&machine, "org/repo@v1", &offline).await.unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("org/repo@v1 is not on this machine and the network may not be used"), "{text}");
    assert!(text.contains("adapter_config.json and adapter_model.safetensors"), "{text}");
    assert!(error.hint().unwrap().contains("give the path"), "{error}");
}
