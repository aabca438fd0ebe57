//! The server's phases: serving, draining (no new model requests), cut (what still runs ends with an error).
//!
//! Invariant: phases only go forward, and every model request holds an [`InFlight`] from its admission until its
//! response body has ended, so `wait_idle` means that nothing is left to lose.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Shared by the accept loop and every request.
pub(crate) struct Lifecycle {
    draining: AtomicBool,
    cut: CancellationToken,
    num_in_flight: watch::Sender<usize>,
}

impl Lifecycle {
    pub(crate) fn new() -> Self {
        Self { draining: AtomicBool::new(false), cut: CancellationToken::new(), num_in_flight: watch::Sender::new(0) }
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    /// Ends when running requests must end.
    pub(crate) fn cut_token(&self) -> &CancellationToken {
        &self.cut
    }

    pub(crate) fn cut(&self) {
        self.cut.cancel();
    }

    /// Ends when no model request is in flight.
    pub(crate) async fn wait_idle(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.num_in_flight.subscribe().wait_for(|count| *count == 0).await;
    }

    /// Admits a model request, or says that the server is draining. Counting comes before the check: a request that
    /// sees "not draining" is seen by the drain that begins after it.
    pub(crate) fn admit(self: &Arc<Self>) -> Option<InFlight> {
        self.num_in_flight.send_modify(|count| *count += 1);
        let guard = InFlight { lifecycle: Arc::clone(self) };
        (!self.is_draining()).then_some(guard)
    }
}

/// One model request, from its admission to the end of its response body.
pub(crate) struct InFlight {
    lifecycle: Arc<Lifecycle>,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.lifecycle.num_in_flight.send_modify(|count| *count -= 1);
    }
}
