//! Whether a request has begun to leave this machine.
//!
//! A provider can do nothing, and charge nothing, for a request whose body it has no byte of. The HTTP client asks for the body once it
//! has a connection to write to, so a [`WatchedBody`] knows: while nobody has asked for it, whoever gives up has spent nothing. Giving
//! up takes the body back: what was told to have cost nothing cannot leave afterwards, though the client may still hold it. It errs to
//! one side only: a body that was asked for may still never have arrived.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use crate::providers::error::Spent;

/// Of one call: shared by the door, which sends it, and by whoever pays for it and may drop the sending.
#[derive(Clone, Debug, Default)]
pub struct Departure(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Counts from 0; bodies of earlier ones are taken back.
    attempt: u32,
    phase: Phase,
    has_ever_left: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Waiting,
    Left,
    TakenBack,
}

impl Departure {
    /// Gives the attempt up, and says what it may have cost of which nothing else is known.
    pub fn give_up(&self) -> Spent {
        let mut state = self.lock();
        if state.phase == Phase::Left {
            return Spent::Unknown;
        }
        state.phase = Phase::TakenBack;
        Spent::Nothing
    }

    /// Whether any of it has left, in any attempt: for who asks where a text has been, not what it cost.
    pub fn has_left(&self) -> bool {
        self.lock().has_ever_left
    }

    /// An attempt is over that has cost nothing: the next one has not left yet.
    pub(super) fn begin_another(&self) {
        let mut state = self.lock();
        (state.attempt, state.phase) = (state.attempt + 1, Phase::Waiting);
    }

    /// The attempt's body.
    pub(super) fn watch(&self, bytes: Bytes) -> WatchedBody {
        WatchedBody { bytes: Some(bytes), attempt: self.lock().attempt, departure: self.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A body that notes when it is asked for.
pub(super) struct WatchedBody {
    bytes: Option<Bytes>,
    attempt: u32,
    departure: Departure,
}

impl Body for WatchedBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        let mut state = this.departure.lock();
        if state.attempt != this.attempt || state.phase == Phase::TakenBack {
            return Poll::Ready(Some(Err(io::Error::other("the request was given up before it left"))));
        }
        (state.phase, state.has_ever_left) = (Phase::Left, true);
        drop(state);
        Poll::Ready(this.bytes.take().map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
    }
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;

    use super::*;

    fn first(body: &mut WatchedBody) -> Option<io::Result<Frame<Bytes>>> {
        block_on(std::future::poll_fn(|context| Pin::new(&mut *body).poll_frame(context)))
    }

    #[test]
    fn what_was_told_to_cost_nothing_cannot_leave_any_more() {
        let departure = Departure::default();
        let mut given_up = departure.watch(Bytes::from_static(b"x"));
        assert_eq!((departure.give_up(), departure.give_up()), (Spent::Nothing, Spent::Nothing));
        assert!(first(&mut given_up).unwrap().is_err() && !departure.has_left());
        departure.begin_another();
        let mut next = departure.watch(Bytes::from_static(b"x"));
        assert!(first(&mut given_up).unwrap().is_err(), "an earlier attempt's body stays where it is");
        assert!(first(&mut next).unwrap().is_ok());
        assert_eq!((departure.give_up(), departure.has_left()), (Spent::Unknown, true));
        departure.begin_another();
        assert_eq!((departure.give_up(), departure.has_left()), (Spent::Nothing, true), "it has been out all the same");
    }
}
