//! The life of the server: accept, drain, cut, close.
//!
//! hyper's HTTP/1.1 connection is driven here, not by `axum::serve`, because three bounds are wanted together: a time
//! limit for a request's head, a number of connections, and a graceful stop that does not wait for ever. HTTP/1.1
//! alone: it is what inference clients and gateways speak to a backend, and a connection that closes is a request that
//! ends.
//!
//! Invariant: [`run`] returns within the shutdown timeout and twice `flush_timeout`, whatever clients do.

use std::{future::Future, io, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::timeout,
};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Limits, ServerConfig},
    router::router,
    slot::ModelSlot,
    state::{AppState, SharedState},
};

/// Pause after an `accept` that failed for lack of something (file descriptors), which the next would lack as well.
const ACCEPT_RETRY_PAUSE: Duration = Duration::from_millis(50);

/// Serves on an already bound listener until `shutdown` ends, then drains: `/ready` turns false, new requests get 503
/// with `retry-after`, running ones finish within `shutdown_timeout`, then the rest is cut with an error event. The
/// engine goes on: whoever loaded the model stops it.
pub async fn run(
    listener: TcpListener,
    config: ServerConfig,
    slot: ModelSlot,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let limits = Limits::new(&config);
    run_with_limits(listener, config, limits, slot, shutdown).await
}

/// [`run`] with other bounds.
pub async fn run_with_limits(
    listener: TcpListener,
    config: ServerConfig,
    limits: Limits,
    slot: ModelSlot,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let state = AppState::new(config, limits, slot);
    let app = router(&state);
    let permits = Arc::new(Semaphore::new(state.limits.max_connections));
    let closing = CancellationToken::new();
    let mut connections = JoinSet::new();
    let mut stopped = std::pin::pin!(drain(&state, shutdown));
    loop {
        tokio::select! {
            () = &mut stopped => break,
            (stream, permit) = accept(&listener, &permits) => {
                let connection = Connection { app: app.clone(), limits: state.limits.clone(), closing: closing.clone() };
                connections.spawn(connection.serve(stream, permit));
            }
            // Ended connections are collected while others run.
            Some(ended) = connections.join_next() => log_end(ended),
        }
    }
    drop(listener);
    // Idle connections close at once, those that still write get a moment, stalled ones are dropped.
    closing.cancel();
    let all_closed = async { while connections.join_next().await.is_some() {} };
    if timeout(state.limits.flush_timeout, all_closed).await.is_err() {
        tracing::info!(num_connections = connections.len(), "connections were still open: dropped");
    }
    connections.shutdown().await;
    Ok(())
}

/// Waits for the signal, then until nothing is in flight or the time is over, and cuts what is left.
async fn drain(state: &SharedState, shutdown: impl Future<Output = ()>) {
    shutdown.await;
    let lifecycle = &state.lifecycle;
    lifecycle.drain();
    tracing::info!(timeout_s = state.config.shutdown_timeout.as_secs_f64(), "draining: no new requests");
    if timeout(state.config.shutdown_timeout, lifecycle.wait_idle()).await.is_err() {
        tracing::warn!("requests were still running after the shutdown timeout: cut");
        lifecycle.cut();
        // Their error events go out; a reader that takes none is not waited for.
        let _ = timeout(state.limits.flush_timeout, lifecycle.wait_idle()).await;
    }
}

/// The next connection, when there is room for one.
async fn accept(listener: &TcpListener, permits: &Arc<Semaphore>) -> (TcpStream, OwnedSemaphorePermit) {
    loop {
        let permit = Arc::clone(permits).acquire_owned().await.expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, _)) => return (stream, permit),
            Err(error) => {
                tracing::debug!(%error, "accept failed");
                if !is_about_one_connection(&error) {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_RETRY_PAUSE).await;
                }
            }
        }
    }
}

fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// What one connection needs.
struct Connection {
    app: Router,
    limits: Limits,
    /// Ends when no further request is taken on it.
    closing: CancellationToken,
}

impl Connection {
    async fn serve(self, stream: TcpStream, _permit: OwnedSemaphorePermit) {
        // A token is a small packet that somebody waits for.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY could not be set");
        }
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(self.limits.write_timeout));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.header_read_timeout)
            .max_buf_size(self.limits.max_head_bytes)
            .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(self.app));
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.closing.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            // A client that goes away in the middle is everyday life.
            tracing::debug!(%error, "a connection ended early");
        }
    }
}

fn log_end(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a connection's task failed");
    }
}
