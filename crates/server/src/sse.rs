//! Server-sent events: a generation's events, encoded by a route, one JSON text an event, `[DONE]` at the end.
//!
//! Invariant: an error is the last event of its stream, and no `[DONE]` follows it; dropping the response drops the
//! generation.

use std::{collections::VecDeque, convert::Infallible, panic::AssertUnwindSafe, time::Duration};

use axum::{
    body::Bytes,
    http::{HeaderName, HeaderValue, header},
    response::{
        IntoResponse, Response,
        sse::{Event as SseEvent, KeepAlive, Sse},
    },
};
use futures::{Stream, StreamExt, stream};

use crate::{
    context::{RequestContext, panic_text},
    error::ApiError,
    generation::{Event, Generation},
};

/// A comment goes out after so long a silence (a long prompt, a preempted request), so that neither proxies nor
/// clients take the connection for dead, and a dead one is noticed.
pub(crate) const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(15);

/// What a route makes of a generation's events. Chunks are appended to `out` as JSON texts.
pub(crate) trait ChunkEncoder: Send + 'static {
    /// An event of `generation`, which has counted it already.
    fn event(&mut self, event: Event, generation: &Generation, out: &mut VecDeque<String>);
    /// Everything has ended well.
    fn end(&mut self, generation: &Generation, out: &mut VecDeque<String>);
}

/// The streamed response.
pub(crate) fn respond(generation: Generation, encoder: impl ChunkEncoder, context: RequestContext) -> Response {
    let texts = AssertUnwindSafe(chunks(generation, encoder, context.clone())).catch_unwind().map(move |text| {
        text.unwrap_or_else(|panic| {
            let error = ApiError::internal(&context.id, &format_args!("panic: {}", panic_text(&*panic)));
            let _ = context.counts.stream_error.set(error.status().as_u16());
            error.to_json()
        })
    });
    events(texts)
}

/// Texts as a response, an event each.
pub(crate) fn events(texts: impl Stream<Item = String> + Send + 'static) -> Response {
    let events = texts.map(|text| Ok::<_, Infallible>(SseEvent::default().data(text)));
    let mut response = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE_INTERVAL)).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect events otherwise.
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

/// Our own events with a comment in every long silence: what holds them back (guardrails that ask somebody) also holds back the
/// comments of the stream within.
pub(crate) fn kept_alive<E: Send + 'static>(
    interval: Duration,
    events: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
) -> impl Stream<Item = Result<Bytes, E>> + Send {
    stream::unfold(Box::pin(events), move |mut events| async move {
        match tokio::time::timeout(interval, events.next()).await {
            Ok(event) => Some((event?, events)),
            Err(_) => Some((Ok(Bytes::from_static(b":\n\n")), events)),
        }
    })
}

/// The events' JSON texts.
fn chunks(
    generation: Generation,
    encoder: impl ChunkEncoder,
    context: RequestContext,
) -> impl Stream<Item = String> + Send {
    let progress = Progress { generation: Some(generation), encoder, pending: VecDeque::new(), context };
    stream::unfold(progress, |mut progress| async move {
        loop {
            if let Some(text) = progress.pending.pop_front() {
                return Some((text, progress));
            }
            progress.advance().await?;
        }
    })
}

struct Progress<E> {
    /// `None`: over; what is pending is all that is left.
    generation: Option<Generation>,
    encoder: E,
    pending: VecDeque<String>,
    context: RequestContext,
}

impl<E: ChunkEncoder> Progress<E> {
    /// Waits for the next event and encodes it. `None`: the stream is over.
    async fn advance(&mut self) -> Option<()> {
        let generation = self.generation.as_mut()?;
        match generation.next().await {
            Some(Ok(event)) => self.encoder.event(event, generation, &mut self.pending),
            Some(Err(error)) => {
                let _ = self.context.counts.stream_error.set(error.status().as_u16());
                self.pending.push_back(error.to_json());
                self.generation = None;
            }
            None => {
                self.encoder.end(generation, &mut self.pending);
                self.pending.push_back("[DONE]".to_owned());
                self.generation = None;
            }
        }
        Some(())
    }
}

/// JSON of a chunk.
pub(crate) fn to_json<T: serde::Serialize>(chunk: &T) -> String {
    serde_json::to_string(chunk).expect("wire types serialise: string keys, no maps of maps")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An interval of nothing has passed at once, and what is ready comes first all the same.
    #[tokio::test]
    async fn a_silence_is_filled_with_comments_and_nothing_is_lost() {
        let (send, receive) = futures::channel::mpsc::unbounded::<Result<Bytes, Infallible>>();
        let mut events = Box::pin(kept_alive(Duration::ZERO, receive));
        for _ in 0..3 {
            assert_eq!(events.next().await.unwrap().unwrap(), ":\n\n");
        }
        send.unbounded_send(Ok(Bytes::from_static(b"data: 1\n\n"))).unwrap();
        drop(send);
        assert_eq!(events.next().await.unwrap().unwrap(), "data: 1\n\n");
        assert!(events.next().await.is_none());
    }
}
