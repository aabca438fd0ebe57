//! A streamed answer, chunk by chunk, until its end mark.
//!
//! Invariant: the last item is an error unless the answer is complete; after an error there is nothing more; dropping it
//! closes the connection, and so ends the call upstream.

use std::{collections::VecDeque, fmt, pin::Pin, sync::Arc};

use bytes::Bytes;
use futures::Stream;
use reqwest::Response;

use super::{
    Limits,
    door::{Attempt, idle, late, transport},
    sse::{Events, SseError, SseLimits},
};
use crate::providers::{
    AnswerReader, Chunk, Ended, UpstreamError, Usage,
    error::{Cause, Spent},
};

type ByteStream = Pin<Box<dyn Stream<Item = reqwest::Result<Bytes>> + Send>>;

/// Chunks of one answer.
pub struct AnswerStream {
    /// `None`: over.
    events: Option<Events<ByteStream>>,
    reader: AnswerReader,
    limits: Arc<Limits>,
    waiting: VecDeque<Chunk>,
    /// The upstream's verdict is open until the end.
    attempt: Option<Attempt>,
    /// Of the whole answer; before the first chunk it is the sender's to keep.
    deadline: Option<tokio::time::Instant>,
    /// Once complete.
    usage: Option<Usage>,
}

impl fmt::Debug for AnswerStream {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("AnswerStream").field("is_over", &self.events.is_none()).finish_non_exhaustive()
    }
}

impl AnswerStream {
    pub(super) fn new(response: Response, reader: AnswerReader, limits: Arc<Limits>) -> Self {
        let sse = SseLimits { max_event_bytes: limits.max_event_bytes, max_stream_bytes: limits.max_answer_bytes };
        let bytes: ByteStream = Box::pin(response.bytes_stream());
        let events = Some(Events::new(bytes, sse));
        Self { events, reader, limits, waiting: VecDeque::new(), attempt: None, deadline: None, usage: None }
    }

    /// One that is at its end already.
    pub(super) fn ended(reader: AnswerReader, ended: Ended, limits: Arc<Limits>) -> Self {
        let Ended { chunks, usage } = ended;
        Self { events: None, reader, limits, waiting: chunks.into(), attempt: None, deadline: None, usage: Some(usage) }
    }

    /// Waits for the first chunk, and keeps it for [`AnswerStream::next`].
    pub(super) async fn begin(&mut self) -> Result<(), UpstreamError> {
        while self.waiting.is_empty() && self.events.is_some() {
            self.advance().await?;
        }
        Ok(())
    }

    /// From here on the stream has its own verdict to give, and its own deadline to keep.
    pub(super) fn keep(&mut self, mut attempt: Attempt, deadline: tokio::time::Instant) {
        self.deadline = Some(deadline);
        if self.events.is_none() {
            attempt.succeeded();
        } else {
            attempt.begun();
        }
        self.attempt = Some(attempt);
    }

    /// The next chunk; `None`: the answer is complete, or has failed.
    pub async fn next(&mut self) -> Option<Result<Chunk, UpstreamError>> {
        loop {
            if let Some(chunk) = self.waiting.pop_front() {
                return Some(Ok(chunk));
            }
            self.events.as_ref()?;
            if let Err(error) = self.advance().await {
                return Some(Err(error));
            }
        }
    }

    /// What was used: counted where the stream is complete, else estimated from what came.
    pub fn usage(&self) -> Usage {
        self.usage.unwrap_or_else(|| self.reader.partial_usage())
    }

    /// Whether its end has been seen.
    pub fn is_complete(&self) -> bool {
        self.usage.is_some()
    }

    /// Reads one event, or the end.
    async fn advance(&mut self) -> Result<(), UpstreamError> {
        let stepped = match self.deadline {
            Some(deadline) => tokio::time::timeout_at(deadline, self.step()).await.unwrap_or_else(|_| {
                // It answered all the while: that says nothing of its health.
                self.attempt = None;
                Err(late())
            }),
            None => self.step().await,
        };
        stepped.map_err(|error| {
            self.events = None;
            if let Some(mut attempt) = self.attempt.take() {
                attempt.failed(&error);
            }
            error.having_spent(self.usage())
        })
    }

    async fn step(&mut self) -> Result<(), UpstreamError> {
        let Some(events) = &mut self.events else { return Ok(()) };
        let event = match tokio::time::timeout(self.limits.idle, events.next()).await {
            Err(_) => return Err(idle(self.limits.idle)),
            Ok(Some(Ok(event))) => Some(event),
            Ok(Some(Err(SseError::Transport(error)))) => return Err(transport(&error, Spent::Unknown)),
            Ok(Some(Err(error))) => return Err(UpstreamError::new(broken(&error), error.to_string())),
            Ok(None) => None,
        };
        let is_over = event.is_none();
        if let Some(event) = event {
            self.waiting.extend(self.reader.event(&event)?);
        }
        if is_over || self.reader.is_done() {
            let ended = self.reader.end()?;
            self.waiting.extend(ended.chunks);
            self.usage = Some(ended.usage);
            self.events = None;
            if let Some(mut attempt) = self.attempt.take() {
                attempt.succeeded();
            }
        }
        Ok(())
    }
}

/// Length is the model's doing, and the bytes are the server's.
fn broken<E>(error: &SseError<E>) -> Cause {
    match error {
        SseError::EventTooLong { .. } | SseError::StreamTooLong { .. } => Cause::Unfit,
        SseError::Transport(_) | SseError::Encoding => Cause::Malformed,
    }
}
