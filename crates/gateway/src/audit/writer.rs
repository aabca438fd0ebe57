//! The thread that writes the log, and the queue before it.
//!
//! A request hands its record over and may wait until it is kept. Records that wait together are written together and share one
//! sync. When a record cannot be kept (the disk is full, the store of the head is away, the queue is full), [`OnFailure`] decides: `Closed`
//! tells the request, which then fails; `Open` lets it go on, counts it, and writes a `gap` record as soon as writing
//! works again.
//!
//! Bounds: the queue; a batch of [`MAX_BATCH`]. **Invariant**: a record was acknowledged as kept only after it, and the head that names it, were stored
//! as configured.

use std::{
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::{AuditError, Contents, Fsync, Journal, RequestRecord};
use crate::failure::OnFailure;

/// The most records that share a sync.
const MAX_BATCH: usize = 256;
/// How long a thread that has nothing to sync sleeps at most.
const IDLE: Duration = Duration::from_hours(1);

/// What became of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It is in the log.
    As {
        /// Under this number.
        seq: u64,
    },
    /// It is not, and is counted.
    Dropped,
}

struct Job {
    record: Box<RequestRecord>,
    contents: Option<Contents>,
    reply: oneshot::Sender<Result<Kept, Arc<AuditError>>>,
}

/// The running log. Dropping it writes what is queued and ends the thread.
#[derive(Debug)]
pub struct Audit {
    /// None: it takes no more.
    queue: RwLock<Option<SyncSender<Job>>>,
    max_queued: usize,
    on_failure: OnFailure,
    num_dropped: Arc<AtomicU64>,
    /// None: somebody has waited for it.
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Job({})", self.record.request_id)
    }
}

/// A record on its way.
#[derive(Debug)]
pub struct Pending(State);

#[derive(Debug)]
enum State {
    Done(Result<Kept, Arc<AuditError>>),
    Waiting(oneshot::Receiver<Result<Kept, Arc<AuditError>>>),
}

impl Pending {
    /// What became of it.
    pub async fn kept(self) -> Result<Kept, Arc<AuditError>> {
        match self.0 {
            State::Done(result) => result,
            State::Waiting(receiver) => receiver.await.unwrap_or_else(|_| Err(Arc::new(AuditError::WriterGone))),
        }
    }

    /// The same, for threads that may block.
    pub fn kept_blocking(self) -> Result<Kept, Arc<AuditError>> {
        match self.0 {
            State::Done(result) => result,
            State::Waiting(receiver) => {
                receiver.blocking_recv().unwrap_or_else(|_| Err(Arc::new(AuditError::WriterGone)))
            }
        }
    }
}

impl Audit {
    /// Starts the thread. At most `max_queued` records wait.
    pub fn start(journal: Journal, on_failure: OnFailure, max_queued: usize) -> Result<Self, AuditError> {
        let (queue, jobs) = sync_channel(max_queued.max(1));
        let num_dropped = Arc::new(AtomicU64::new(0));
        let writer = Writer { journal, on_failure, num_dropped: Arc::clone(&num_dropped), is_unsettled: false };
        let thread = std::thread::Builder::new()
            .name("audit".to_owned())
            .spawn(move || writer.run(&jobs))
            .map_err(|error| AuditError::Config(format!("cannot start its thread: {error}")))?;
        let (queue, thread) = (RwLock::new(Some(queue)), Mutex::new(Some(thread)));
        Ok(Self { queue, max_queued, on_failure, num_dropped, thread })
    }

    /// Hands a record over. Never blocks.
    pub fn record(&self, record: RequestRecord, contents: Option<Contents>) -> Pending {
        let (reply, receiver) = oneshot::channel();
        let job = Job { record: Box::new(record), contents, reply };
        let queue = self.queue.read().unwrap_or_else(PoisonError::into_inner);
        let sent = queue.as_ref().map(|queue| queue.try_send(job));
        drop(queue);
        let error = match sent {
            Some(Ok(())) => return Pending(State::Waiting(receiver)),
            Some(Err(TrySendError::Full(_))) => AuditError::QueueFull { max: self.max_queued },
            Some(Err(TrySendError::Disconnected(_))) | None => AuditError::WriterGone,
        };
        Pending(State::Done(match self.on_failure {
            OnFailure::Closed => Err(Arc::new(error)),
            OnFailure::Open => {
                self.num_dropped.fetch_add(1, Ordering::Relaxed);
                Ok(Kept::Dropped)
            }
        }))
    }

    /// Requests that went on without a record and of which the log does not tell yet. For metrics.
    pub fn num_dropped(&self) -> u64 {
        self.num_dropped.load(Ordering::Relaxed)
    }

    /// Writes what is queued and ends.
    pub fn close(self) {
        self.finish();
    }

    /// Likewise, where others hold it still: what they record from now on is not kept. Blocks.
    pub fn finish(&self) {
        *self.queue.write().unwrap_or_else(PoisonError::into_inner) = None;
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the audit log's writer has panicked");
        }
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        self.finish();
    }
}

struct Writer {
    journal: Journal,
    on_failure: OnFailure,
    num_dropped: Arc<AtomicU64>,
    /// Something was appended that no head names yet.
    is_unsettled: bool,
}

impl Writer {
    fn run(mut self, jobs: &Receiver<Job>) {
        let mut settled_at = Instant::now();
        loop {
            let wait = match self.journal.fsync() {
                Fsync::Every(period) if self.is_unsettled => period.saturating_sub(settled_at.elapsed()),
                _ => IDLE,
            };
            let first = match jobs.recv_timeout(wait) {
                Ok(job) => Some(job),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let batch: Vec<Job> = first.into_iter().chain(jobs.try_iter().take(MAX_BATCH - 1)).collect();
            let is_due = match self.journal.fsync() {
                Fsync::Every(period) => settled_at.elapsed() >= period,
                Fsync::EveryBatch | Fsync::Never => true,
            };
            self.write(batch, is_due);
            if is_due {
                settled_at = Instant::now();
            }
        }
        self.tell_gap();
        if let Err(error) = self.journal.settle() {
            tracing::error!(%error, "the end of the audit log may not be on disk");
        }
    }

    fn write(&mut self, batch: Vec<Job>, is_due: bool) {
        self.tell_gap();
        let mut written = Vec::with_capacity(batch.len());
        for job in batch {
            let result = self.journal.append_request(&job.record, job.contents);
            self.is_unsettled |= result.is_ok();
            written.push((job.reply, result.map_err(Arc::new)));
        }
        let settled = if is_due && self.is_unsettled { self.journal.settle().map_err(Arc::new) } else { Ok(()) };
        self.is_unsettled &= !is_due || settled.is_err();
        for (reply, result) in written {
            let result = match (result, &settled) {
                (Ok(seq), Ok(())) => Ok(Kept::As { seq }),
                // It is in the log; that it stays there is not certain.
                (Ok(_), Err(error)) => self.failed(Arc::clone(error), InLog::Yes),
                (Err(error), _) => self.failed(error, InLog::No),
            };
            // Whoever asked may have gone.
            let _ = reply.send(result);
        }
    }

    fn failed(&self, error: Arc<AuditError>, in_log: InLog) -> Result<Kept, Arc<AuditError>> {
        tracing::error!(%error, on_failure = ?self.on_failure, "a request's audit record was not kept");
        match self.on_failure {
            OnFailure::Closed => Err(error),
            OnFailure::Open => {
                if in_log == InLog::No {
                    self.num_dropped.fetch_add(1, Ordering::Relaxed);
                }
                Ok(Kept::Dropped)
            }
        }
    }

    fn tell_gap(&mut self) {
        let num_dropped = self.num_dropped.load(Ordering::Relaxed);
        if num_dropped > 0 && self.journal.append_gap(num_dropped).is_ok() {
            self.is_unsettled = true;
            self.num_dropped.fetch_sub(num_dropped, Ordering::Relaxed);
        }
    }
}

/// Whether a record that may not stay is there: then no `gap` has to tell of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum InLog {
    Yes,
    No,
}
