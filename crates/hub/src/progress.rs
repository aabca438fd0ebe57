//! How a fetch tells a person what it is doing. The command line draws bars; tests listen; libraries stay silent.
//!
//! At most one task is under way at a time: `start`, any number of `advance`, `finish`. Notes may come at any time.

use std::sync::Arc;

/// A listener. Calls are short and may come from any thread.
pub trait Progress: Send + Sync {
    /// A task begins; `total_bytes` where the size is known.
    fn start(&self, what: &str, total_bytes: Option<u64>);
    /// `bytes` more are done.
    fn advance(&self, bytes: u64);
    /// The task is over, done or given up.
    fn finish(&self);
    /// Something a person should know although it goes on: a source was given up, another process is waited for.
    fn note(&self, message: &str);
}

/// Shared with the threads that hash and unpack.
pub type SharedProgress = Arc<dyn Progress>;

/// Says nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn start(&self, _what: &str, _total_bytes: Option<u64>) {}
    fn advance(&self, _bytes: u64) {}
    fn finish(&self) {}
    fn note(&self, _message: &str) {}
}

/// One task that ends with its scope, so that an early return leaves no bar behind.
pub(crate) struct Task<'a> {
    progress: &'a dyn Progress,
}

impl<'a> Task<'a> {
    pub(crate) fn start(progress: &'a dyn Progress, what: &str, total_bytes: Option<u64>) -> Self {
        progress.start(what, total_bytes);
        Self { progress }
    }

    pub(crate) fn advance(&self, bytes: u64) {
        self.progress.advance(bytes);
    }
}

impl Drop for Task<'_> {
    fn drop(&mut self) {
        self.progress.finish();
    }
}
