//! Whether a request has begun to leave this machine.
//!
//! A provider can do nothing, and charge nothing, for a request whose body it has no byte of. The HTTP client asks for the body once it
//! has a connection to write to, so a [`WatchedBody`] knows: while nobody has asked for it, whoever gives up has spent nothing.
//! It errs to one side only: a body that was asked for may still never have arrived.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use crate::providers::error::Spent;

/// Of one call: shared by the door, which sends it, and by whoever pays for it and may drop the sending.
#[derive(Clone, Debug, Default)]
pub struct Departure(Arc<AtomicBool>);

impl Departure {
    /// What a call may have cost of which nothing else is known.
    pub fn spent(&self) -> Spent {
        if self.0.load(Ordering::Acquire) { Spent::Unknown } else { Spent::Nothing }
    }

    /// An attempt is over that has cost nothing: the next one has not left yet.
    pub(super) fn cost_nothing(&self) {
        self.0.store(false, Ordering::Release);
    }
}

/// A body that notes when it is asked for.
pub(super) struct WatchedBody {
    bytes: Option<Bytes>,
    departure: Departure,
}

impl WatchedBody {
    pub(super) fn new(bytes: Bytes, departure: Departure) -> Self {
        Self { bytes: Some(bytes), departure }
    }
}

impl Body for WatchedBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        this.departure.0.store(true, Ordering::Release);
        Poll::Ready(this.bytes.take().map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
    }
}
