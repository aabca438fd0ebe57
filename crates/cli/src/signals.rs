//! Signals: the first asks for a clean stop, the second ends the process at once.

use std::{future::Future, io};

#[cfg(unix)]
use futures::FutureExt as _;

/// Listens from now on. SIGINT and SIGTERM on Unix, ctrl-c elsewhere.
pub(crate) struct StopSignals {
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
}

impl StopSignals {
    /// Must be called inside the runtime; signals that come later are never lost.
    pub(crate) fn listen() -> io::Result<Self> {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
        }
        #[cfg(not(unix))]
        Ok(Self {})
    }

    /// The next signal's name.
    pub(crate) async fn next(&mut self) -> &'static str {
        #[cfg(unix)]
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
        #[cfg(not(unix))]
        {
            // An error means that no handler could be set, and then ctrl-c ends the process anyway.
            let _ = tokio::signal::ctrl_c().await;
            "ctrl-c"
        }
    }

    /// The next SIGTERM: for a prompt, where ctrl-c is a key. Never, where there is no such signal.
    pub(crate) async fn terminated(&mut self) {
        #[cfg(unix)]
        let _ = self.terminate.recv().await;
        #[cfg(not(unix))]
        std::future::pending::<()>().await;
    }

    /// Forgets a ctrl-c that has come and that nobody waited for; a SIGTERM stays.
    pub(crate) fn forget_interrupt(&mut self) {
        // However many have come, they are one.
        #[cfg(unix)]
        let _ = self.interrupt.recv().now_or_never();
    }

    /// Runs `work` until it is done or a signal comes (None).
    pub(crate) async fn unless_stopped<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            _ = self.next() => None,
            result = work => Some(result),
        }
    }
}
