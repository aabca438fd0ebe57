//! Server-sent events out of bytes, within bounds.
//!
//! The standard's parsing is a crate's; it would buffer a line without end, so a guard in front counts the bytes of each
//! event. Knows no provider. Invariant: nothing is buffered beyond one event's bound, and an event that the connection cut
//! is not given out.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use eventsource_stream::{EventStream, EventStreamError, Eventsource as _};
use futures::{Stream, StreamExt as _};

use crate::providers::SseEvent;

/// What can be wrong with the bytes.
#[derive(Debug, thiserror::Error)]
pub(super) enum SseError<E> {
    /// The connection.
    #[error(transparent)]
    Transport(E),
    /// An event above its bound.
    #[error("an event of the stream is longer than {limit} bytes")]
    EventTooLong { limit: usize },
    /// The stream above its bound.
    #[error("the stream is longer than {limit} bytes")]
    StreamTooLong { limit: usize },
    /// Not UTF-8.
    #[error("the stream is not UTF-8")]
    Encoding,
}

/// Bounds of a stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct SseLimits {
    pub(super) max_event_bytes: usize,
    pub(super) max_stream_bytes: usize,
}

/// Events of a stream of bytes.
pub(super) struct Events<S> {
    inner: EventStream<Guard<S>>,
}

impl<S, E> Events<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    pub(super) fn new(bytes: S, limits: SseLimits) -> Self {
        Self { inner: Guard { bytes, limits, total: 0, event: 0, newline: false }.eventsource() }
    }

    /// The next event; `None`: the bytes have ended in good order.
    pub(super) async fn next(&mut self) -> Option<Result<SseEvent, SseError<E>>> {
        let event = self.inner.next().await?;
        Some(event.map(|event| SseEvent { event: event.event, data: event.data }).map_err(|error| match error {
            EventStreamError::Transport(error) => error,
            EventStreamError::Utf8(_) | EventStreamError::Parser(_) => SseError::Encoding,
        }))
    }
}

/// Counts bytes on their way.
struct Guard<S> {
    bytes: S,
    limits: SseLimits,
    total: usize,
    /// Of the event that is being read.
    event: usize,
    /// The last byte ended a line.
    newline: bool,
}

impl<S> Guard<S> {
    /// An empty line ends an event.
    fn admit<E>(&mut self, bytes: &[u8]) -> Result<(), SseError<E>> {
        self.total = self.total.saturating_add(bytes.len());
        if self.total > self.limits.max_stream_bytes {
            return Err(SseError::StreamTooLong { limit: self.limits.max_stream_bytes });
        }
        for byte in bytes {
            self.event += 1;
            match byte {
                b'\n' if self.newline => self.event = 0,
                b'\n' => self.newline = true,
                // The other half of a line's end.
                b'\r' => {}
                _ => self.newline = false,
            }
            if self.event > self.limits.max_event_bytes {
                return Err(SseError::EventTooLong { limit: self.limits.max_event_bytes });
            }
        }
        Ok(())
    }
}

impl<S, E> Stream for Guard<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    type Item = Result<Bytes, SseError<E>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<Option<Self::Item>> {
        self.bytes.poll_next_unpin(context).map(|next| {
            next.map(|bytes| {
                let bytes = bytes.map_err(SseError::Transport)?;
                self.admit(&bytes)?;
                Ok(bytes)
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use futures::{executor::block_on, stream};
    use proptest::prelude::*;

    use super::*;

    const LIMITS: SseLimits = SseLimits { max_event_bytes: 64, max_stream_bytes: 1000 };

    fn read(pieces: Vec<&[u8]>) -> Result<Vec<SseEvent>, String> {
        let bytes =
            stream::iter(pieces.into_iter().map(|piece| Ok::<_, std::io::Error>(Bytes::copy_from_slice(piece))));
        let mut events = Events::new(bytes, LIMITS);
        block_on(async {
            let mut found = Vec::new();
            while let Some(event) = events.next().await {
                found.push(event.map_err(|error| error.to_string())?);
            }
            Ok(found)
        })
    }

    #[test]
    fn bounds_hold_for_lines_events_and_streams() {
        let long = [b'x'; 100];
        assert!(read(vec![b"data: ", &long]).unwrap_err().contains("64 bytes"));
        let many = b"data: abcdefgh\n".repeat(10);
        assert!(read(vec![&many]).unwrap_err().contains("64 bytes"));
        let events = b"data: abcdefgh\n\n".repeat(100);
        assert!(read(vec![&events]).unwrap_err().contains("1000 bytes"));
        assert_eq!(read(vec![&events[..320]]).unwrap().len(), 20);
        assert!(read(vec![b"data: \xff\xfe\n\n"]).unwrap_err().contains("UTF-8"));
        assert_eq!(read(vec![b"data: whole\n\ndata: cut\n"]).unwrap().len(), 1);
    }

    proptest! {
        /// Where the network cuts the bytes is nobody's business.
        #[test]
        fn any_split_of_the_bytes_gives_the_same_events(cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12), crlf in any::<bool>()) {
            let text = "event: a\ndata: {\"text\":\"h\u{e9}llo \u{1f980}\"}\n\n: ping\n\ndata: one\ndata: two\n\nid: 3\ndata: [DONE]\n\n";
            let text = if crlf { text.replace('\n', "\r\n") } else { text.to_owned() };
            let bytes = text.as_bytes();
            let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            places.extend([0, bytes.len()]);
            places.sort_unstable();
            let pieces = places.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            let found: Vec<(String, String)> = read(pieces).unwrap().into_iter().map(|event| (event.event, event.data)).collect();
            let expected = [("a", "{\"text\":\"h\u{e9}llo \u{1f980}\"}"), ("message", "one\ntwo"), ("message", "[DONE]")];
            let expected: Vec<(String, String)> = expected.map(|(event, data)| (event.to_owned(), data.to_owned())).into();
            prop_assert_eq!(found, expected);
        }
    }
}
