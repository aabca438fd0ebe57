//! The end of the log, where records are appended: numbers, the chain, rotation, retention, repair.
//!
//! At start the log is read from the record that the head names. What a crash has torn is moved aside and told in a record of its own; a log that
//! was touched is not appended to. A record is one write; one that fails is taken back, so that the next begins where it did.
//!
//! Durability: the head is saved after what it names is on disk as [`Fsync`] asks. With `EveryBatch` nothing acknowledged is lost to a power cut; with
//! `Every`, at most that long; with `Never`, what the system had not written, and the log then ends before its head. A killed
//! process loses nothing in any case.
//!
//! **Invariant**: the file ends in a whole line after every call, or nothing is appended any more.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use chrono::{DateTime, Utc};
use data_encoding::HEXLOWER;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{
    AuditError, AuditKey, Contents, ContentsKey, Head, HeadStore, HeadStoreError, RequestRecord,
    folder::{self, FolderLock, Segment, SegmentFile},
    key::SealedFor,
    line::{self, Next},
    scan::{Position, Scanner, Torn},
};

/// The longest reason why a log was begun anew.
const MAX_REASON_BYTES: usize = 500;

/// When appended records are made to last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fsync {
    /// Before they are acknowledged. Records that wait together share one.
    EveryBatch,
    /// Once in this time.
    Every(Duration),
    /// When the system does it.
    Never,
}

/// When old segments go. What both allow stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// The most segments, with the one that is written.
    pub max_segments: Option<u64>,
    /// The oldest age of a segment's newest record.
    pub max_age: Option<Duration>,
}

/// How the log is kept.
#[derive(Clone, Debug)]
pub struct JournalConfig {
    /// The folder.
    pub path: PathBuf,
    /// Signs records.
    pub key: AuditKey,
    /// Encrypts contents; none: they are not kept.
    pub contents_key: Option<ContentsKey>,
    /// The longest prompt and the longest answer that are kept; the rest is cut off.
    pub max_contents_bytes: usize,
    /// When records are made to last.
    pub fsync: Fsync,
    /// A segment that has got so long ends.
    pub max_segment_bytes: u64,
    /// A segment that is older ends.
    pub max_segment_age: Duration,
    /// When old segments go.
    pub retention: Retention,
}

type OpenFile = Box<dyn Fn(&Path) -> std::io::Result<Box<dyn SegmentFile>> + Send>;
type Clock = Box<dyn Fn() -> DateTime<Utc> + Send>;

/// The segment that is written.
struct Current {
    segment: Segment,
    file: Box<dyn SegmentFile>,
    num_bytes: u64,
    begun_at: DateTime<Utc>,
}

/// The log's end.
pub struct Journal {
    config: JournalConfig,
    heads: Box<dyn HeadStore>,
    open_file: OpenFile,
    clock: Clock,
    next: Next,
    current: Option<Current>,
    is_broken: bool,
    _lock: FolderLock,
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal").field("path", &self.config.path).field("next", &self.next).finish_non_exhaustive()
    }
}

impl Journal {
    /// Takes the log up where it ends, or begins one.
    pub fn open(config: JournalConfig, heads: Box<dyn HeadStore>) -> Result<Self, AuditError> {
        Self::open_with(config, heads, Box::new(folder::open_file), Box::new(Utc::now))
    }

    pub(super) fn open_with(
        config: JournalConfig,
        heads: Box<dyn HeadStore>,
        open_file: OpenFile,
        clock: Clock,
    ) -> Result<Self, AuditError> {
        fs::create_dir_all(&config.path).map_err(AuditError::io("create", &config.path))?;
        let lock = folder::lock(&config.path)?;
        let head = heads.load()?;
        let segments = folder::segments(&config.path)?;
        if let (Some(head), []) = (head, &segments[..]) {
            return Err(AuditError::Vanished { seq: head.seq, path: config.path });
        }
        let mut scanner = Scanner::new(&config.key);
        let begun_at = read_end(&mut scanner, &segments, head, &config.path)?;
        if let Some(problem) = scanner.problems.first() {
            return Err(AuditError::Touched { problem: problem.clone() });
        }
        let (next, torn) = (scanner.next(), scanner.torn.take());
        let mut journal = Self { config, heads, open_file, clock, next, current: None, is_broken: false, _lock: lock };
        let repaired = match &torn {
            Some(torn) => Some(journal.set_aside(torn)?),
            None => None,
        };
        journal.take_up(segments.last(), begun_at)?;
        if let Some(repaired) = repaired {
            tracing::warn!(%repaired, "the audit log's last record was torn by a crash and is set aside");
            journal.append("repaired", &repaired)?;
        }
        journal.retire()?;
        journal.settle()?;
        Ok(journal)
    }

    /// Begins the log anew in a folder that has none, although the store knows the head of another, which is forgotten and
    /// returned. The new log's first record says so, and why.
    pub fn begin_anew(config: JournalConfig, heads: Box<dyn HeadStore>, reason: &str) -> Result<Head, AuditError> {
        if reason.trim().is_empty() || reason.len() > MAX_REASON_BYTES || reason.chars().any(char::is_control) {
            let text = format!("a reason has 1 to {MAX_REASON_BYTES} bytes and no control characters; give another");
            return Err(AuditError::Config(text));
        }
        let forgotten = heads.load()?.ok_or(AuditError::NothingToForget)?;
        fs::create_dir_all(&config.path).map_err(AuditError::io("create", &config.path))?;
        let lock = folder::lock(&config.path)?;
        if !folder::segments(&config.path)?.is_empty() {
            return Err(AuditError::StillThere { path: config.path });
        }
        let next = Next { seq: 1, prev: line::Mac::NONE };
        let first = Segment::new(&config.path, 1);
        let (open_file, clock): (OpenFile, Clock) = (Box::new(folder::open_file), Box::new(Utc::now));
        let mut journal = Self { config, heads, open_file, clock, next, current: None, is_broken: false, _lock: lock };
        let told = json!({"reason": reason, "seq": forgotten.seq, "mac": forgotten.mac.to_string()});
        journal.begin(first, Some(told))?;
        journal.sync()?;
        journal.save_head()?;
        Ok(forgotten)
    }

    /// The newest record.
    pub fn head(&self) -> Head {
        Head { seq: self.next.seq - 1, mac: self.next.prev }
    }

    /// How records are made to last.
    pub(super) fn fsync(&self) -> Fsync {
        self.config.fsync
    }

    /// Appends a request. Contents are kept only where there is a key for them.
    pub fn append_request(&mut self, record: &RequestRecord, contents: Option<Contents>) -> Result<u64, AuditError> {
        // The number that contents are bound to must be the one that the record gets.
        self.rotate_if_due()?;
        let mut data = serde_json::to_value(record).map_err(|error| AuditError::Config(error.to_string()))?;
        if let (Some(key), Some(contents)) = (&self.config.contents_key, contents) {
            let contents = serde_json::to_vec(&contents.cut_to(self.config.max_contents_bytes))
                .map_err(|error| AuditError::Config(error.to_string()))?;
            let of = SealedFor { seq: self.next.seq, tenant: &record.tenant, request_id: &record.request_id };
            data["contents"] = json!(key.seal(of, &contents)?);
        }
        self.write("request", &data)
    }

    /// Tells that requests ran of which there is no record.
    pub(super) fn append_gap(&mut self, num_dropped: u64) -> Result<u64, AuditError> {
        self.append("gap", &json!({"dropped": num_dropped}))
    }

    /// Makes all that was appended last, as configured, and saves the head.
    pub(super) fn settle(&mut self) -> Result<(), AuditError> {
        if self.config.fsync != Fsync::Never {
            self.sync()?;
        }
        self.save_head()
    }

    /// Where another process writes the log, this one never does again: two chains would grow from one record.
    fn save_head(&mut self) -> Result<(), AuditError> {
        let saved = self.heads.save(&self.head());
        self.is_broken |= matches!(saved, Err(HeadStoreError::OtherWriter { .. }));
        Ok(saved?)
    }

    fn sync(&mut self) -> Result<(), AuditError> {
        let Some(current) = &mut self.current else { return Ok(()) };
        current.file.sync().map_err(AuditError::io("sync", &current.segment.path))
    }

    fn append(&mut self, kind: &str, data: &Value) -> Result<u64, AuditError> {
        self.rotate_if_due()?;
        self.write(kind, data)
    }

    /// Writes a line to the segment that is there.
    fn write(&mut self, kind: &str, data: &Value) -> Result<u64, AuditError> {
        if self.is_broken {
            return Err(AuditError::Broken);
        }
        let (bytes, mac) = line::write(&self.config.key, self.next, (self.clock)(), (kind, data))?;
        let Some(current) = &mut self.current else { return Err(AuditError::Broken) };
        let path = current.segment.path.clone();
        let failure = match current.file.append(&bytes) {
            Ok(taken) if taken == bytes.len() => None,
            // A write that takes less has met the end of the disk.
            Ok(_) => Some(std::io::Error::from(std::io::ErrorKind::StorageFull)),
            Err(error) => Some(error),
        };
        if let Some(error) = failure {
            self.is_broken = current.file.truncate(current.num_bytes).is_err();
            return Err(AuditError::io("write", path)(error));
        }
        current.num_bytes += bytes.len() as u64;
        let seq = self.next.seq;
        self.next = Next { seq: seq + 1, prev: mac };
        Ok(seq)
    }

    /// Begins another segment where this one is full or old.
    fn rotate_if_due(&mut self) -> Result<(), AuditError> {
        let now = (self.clock)();
        let is_due = self.current.as_ref().is_none_or(|current| {
            let age = (now - current.begun_at).to_std().unwrap_or_default();
            current.num_bytes >= self.config.max_segment_bytes || age >= self.config.max_segment_age
        });
        if self.is_broken || !is_due {
            return Ok(());
        }
        self.sync()?;
        let number = self.current.as_ref().map_or(0, |current| current.segment.number) + 1;
        self.begin(Segment::new(&self.config.path, number), None)?;
        self.retire()
    }

    /// A new file and its first record. If that fails, the segment before is the current one still.
    /// `forgotten` is what became of the log that was here before.
    fn begin(&mut self, segment: Segment, forgotten: Option<Value>) -> Result<(), AuditError> {
        let file = (self.open_file)(&segment.path).map_err(AuditError::io("create", &segment.path))?;
        let mut data = json!({"segment": segment.number, "key": self.config.key.id(), "version": 1});
        if let Some(forgotten) = forgotten {
            data["forgotten"] = forgotten;
        }
        let path = segment.path.clone();
        let before = self.current.replace(Current { segment, file, num_bytes: 0, begun_at: (self.clock)() });
        let written = self
            .write("segment", &data)
            .and_then(|_| folder::sync_folder(&self.config.path).map_err(AuditError::io("sync", &self.config.path)));
        if let Err(error) = written {
            // Whatever is in the file was not acknowledged.
            let is_written = self.current.as_ref().is_some_and(|current| current.num_bytes > 0);
            if !is_written {
                self.current = before;
                self.is_broken = fs::remove_file(&path).is_err();
            }
            return Err(error);
        }
        Ok(())
    }

    /// The last segment, for appending; a first one where there is none, or it has no record.
    fn take_up(&mut self, last: Option<&Segment>, begun_at: Option<DateTime<Utc>>) -> Result<(), AuditError> {
        let Some(last) = last else { return self.begin(Segment::new(&self.config.path, 1), None) };
        let num_bytes = fs::metadata(&last.path).map_err(AuditError::io("read", &last.path))?.len();
        if num_bytes == 0 {
            return self.begin(last.clone(), None);
        }
        let file = (self.open_file)(&last.path).map_err(AuditError::io("open", &last.path))?;
        let begun_at = begun_at.unwrap_or_else(|| (self.clock)());
        self.current = Some(Current { segment: last.clone(), file, num_bytes, begun_at });
        Ok(())
    }

    /// Copies what is torn to a file of its own, then cuts it off.
    fn set_aside(&self, torn: &Torn) -> Result<Value, AuditError> {
        let path = self.config.path.join(&torn.segment);
        let bytes = fs::read(&path).map_err(AuditError::io("read", &path))?;
        let piece = bytes.get(torn.offset as usize..).unwrap_or_default();
        let name = format!("{}.torn-{}", torn.segment, self.next.seq);
        let aside = self.config.path.join(&name);
        fs::write(&aside, piece)
            .and_then(|()| fs::File::open(&aside)?.sync_all())
            .map_err(AuditError::io("write", &aside))?;
        let file = fs::OpenOptions::new().write(true).open(&path).map_err(AuditError::io("open", &path))?;
        file.set_len(torn.offset).and_then(|()| file.sync_all()).map_err(AuditError::io("cut", &path))?;
        Ok(json!({
            "segment": torn.segment, "after_line": torn.line, "bytes": torn.bytes,
            "sha256": HEXLOWER.encode(&Sha256::digest(piece)), "kept_as": name,
        }))
    }

    /// Removes segments whose time is over, after a record that says so is on disk.
    fn retire(&mut self) -> Result<(), AuditError> {
        let Some(current) = &self.current else { return Ok(()) };
        let segments = folder::segments(&self.config.path)?;
        let now = (self.clock)();
        let Retention { max_segments, max_age } = self.config.retention;
        let mut over: Option<(usize, Next)> = None;
        for (index, pair) in segments.windows(2).enumerate() {
            if pair[1].number > current.segment.number {
                break;
            }
            let Some((at, first)) = first_line(&self.config.key, &pair[1])? else { break };
            let is_too_many = max_segments.is_some_and(|max| (segments.len() - index) as u64 > max.max(1));
            let is_too_old = max_age.is_some_and(|max| (now - at).to_std().unwrap_or_default() > max);
            if !is_too_many && !is_too_old {
                break;
            }
            over = Some((index + 1, first));
        }
        let Some((num_over, first)) = over else { return Ok(()) };
        let names: Vec<String> = segments[..num_over].iter().map(Segment::name).collect();
        let data = json!({
            "segments": names, "through_seq": first.seq - 1, "through_mac": first.prev.to_string(),
        });
        self.write("retired", &data)?;
        self.sync()?;
        self.save_head()?;
        for segment in &segments[..num_over] {
            fs::remove_file(&segment.path).map_err(AuditError::io("remove", &segment.path))?;
        }
        folder::sync_folder(&self.config.path).map_err(AuditError::io("sync", &self.config.path))
    }
}

/// Reads the log from the segment that the head is in, and says when the last one was begun.
fn read_end(
    scanner: &mut Scanner<'_>,
    segments: &[Segment],
    head: Option<Head>,
    path: &Path,
) -> Result<Option<DateTime<Utc>>, AuditError> {
    let mut from = segments.len().saturating_sub(1);
    // Without a head there is nothing to compare an earlier segment with.
    while from > 0
        && let Some(head) = head
    {
        match first_line(scanner.key(), &segments[from])? {
            Some((_, first)) if first.seq <= head.seq => break,
            _ => from -= 1,
        }
    }
    let (mut at_head, mut begun_at) = (None, None);
    for (index, segment) in segments.iter().enumerate().skip(from) {
        let position = if index + 1 == segments.len() { Position::Last } else { Position::Inner };
        begun_at = None;
        scanner.read(segment, position, &mut |line| {
            begun_at = begun_at.or(Some(line.at));
            if head.is_some_and(|head| head.seq == line.seq) {
                at_head = Some(line.mac);
            }
            Ok(())
        })?;
    }
    if scanner.problems.is_empty() {
        let none = Segment::new(path, 1);
        scanner.compare_with_head(head, at_head, segments.last().unwrap_or(&none));
    }
    Ok(begun_at)
}

/// When the segment was begun, and what its first record followed. None: it has no record.
fn first_line(key: &AuditKey, segment: &Segment) -> Result<Option<(DateTime<Utc>, Next)>, AuditError> {
    use std::io::{BufRead as _, BufReader, Read as _};
    let file = fs::File::open(&segment.path).map_err(AuditError::io("open", &segment.path))?;
    let mut bytes = Vec::new();
    BufReader::new(file)
        .take(line::MAX_LINE_BYTES as u64)
        .read_until(b'\n', &mut bytes)
        .map_err(AuditError::io("read", &segment.path))?;
    let Some((b'\n', bytes)) = bytes.split_last() else { return Ok(None) };
    Ok(line::read(key, bytes).ok().map(|line| (line.at, Next { seq: line.seq, prev: line.prev })))
}
