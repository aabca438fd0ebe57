//! One request's way back: from the model thread to whoever reads its tokens.
//!
//! The model thread never waits for a reader. The channel itself has no bound, its content has: generated tokens are
//! counted, and at the bound the request is given up ([`EngineError::SlowReader`]); log-probabilities of a prompt come
//! once, are as many as the prompt has tokens, and are not counted; errors end the channel. It must not know what a
//! token means.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    time::Instant,
};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::Command;
use crate::{EngineError, TokenEvent};

/// What travels, with the time at which the model thread sent it.
type Envelope = (Instant, Message);

#[derive(Debug)]
enum Message {
    Event(TokenEvent),
    /// The last word of a request that did not end well.
    Error(EngineError),
    /// The last word of a request that generates nothing.
    Scored,
}

/// The model thread's end.
#[derive(Debug)]
pub(crate) struct Outbox {
    sender: UnboundedSender<Envelope>,
    num_buffered: Arc<AtomicUsize>,
    max_buffered: usize,
}

/// The reader is too slow; this many tokens wait.
#[derive(Debug)]
pub(crate) struct OutboxFull {
    pub(crate) num_buffered: usize,
}

impl Outbox {
    /// Never waits. A reader that has gone is not an error: its abort is on the way.
    pub(crate) fn send(&self, at: Instant, event: TokenEvent) -> Result<(), OutboxFull> {
        if matches!(event, TokenEvent::Token { .. }) {
            let num_buffered = self.num_buffered.fetch_add(1, Ordering::AcqRel);
            if num_buffered >= self.max_buffered {
                return Err(OutboxFull { num_buffered });
            }
        }
        let _reader_gone = self.sender.send((at, Message::Event(event)));
        Ok(())
    }

    /// Ends the request with an error.
    pub(crate) fn fail(&self, at: Instant, error: EngineError) {
        let _reader_gone = self.sender.send((at, Message::Error(error)));
    }

    /// Ends a request that asked for its prompt's log-probabilities and nothing else.
    pub(crate) fn end_scored(&self, at: Instant) {
        let _reader_gone = self.sender.send((at, Message::Scored));
    }
}

/// One request's events. Dropping it aborts the request; its blocks are free before the next step.
#[derive(Debug)]
pub struct TokenStream {
    receiver: UnboundedReceiver<Envelope>,
    num_buffered: Arc<AtomicUsize>,
    commands: mpsc::Sender<Command>,
    key: u64,
    num_samples: u32,
    /// One bit for each sample that has ended, by the model thread or by [`TokenStream::abort_sample`].
    ended: [AtomicU64; 2],
    has_failed: bool,
    last_event_at: Instant,
}

/// Both ends for the request `key`; `max_buffered` tokens may wait.
pub(crate) fn channel(
    commands: mpsc::Sender<Command>,
    key: u64,
    num_samples: u32,
    max_buffered: usize,
) -> (Outbox, TokenStream) {
    let (sender, receiver) = unbounded_channel();
    let num_buffered = Arc::new(AtomicUsize::new(0));
    let outbox = Outbox { sender, num_buffered: Arc::clone(&num_buffered), max_buffered };
    let stream = TokenStream {
        receiver,
        num_buffered,
        commands,
        key,
        num_samples,
        ended: [AtomicU64::new(0), AtomicU64::new(0)],
        has_failed: false,
        last_event_at: Instant::now(),
    };
    (outbox, stream)
}

impl TokenStream {
    /// The next event; `None` once all samples have ended, or after an error. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<TokenEvent, EngineError>> {
        loop {
            if self.has_failed || self.all_ended() {
                return None;
            }
            let Some((at, message)) = self.receiver.recv().await else {
                // Without a last word: the engine stopped before it had seen the request.
                self.has_failed = true;
                return Some(Err(EngineError::ShuttingDown));
            };
            self.last_event_at = at;
            match message {
                Message::Event(event) => {
                    if let TokenEvent::Token { sample, finish, .. } = event {
                        self.num_buffered.fetch_sub(1, Ordering::AcqRel);
                        if self.has_ended(sample) {
                            continue;
                        }
                        if finish.is_some() {
                            self.mark_ended(sample);
                        }
                    }
                    return Some(Ok(event));
                }
                Message::Error(error) => {
                    self.has_failed = true;
                    return Some(Err(error));
                }
                Message::Scored => {
                    for sample in 0..self.num_samples {
                        self.mark_ended(sample);
                    }
                }
            }
        }
    }

    /// One sample ended by a stop string: the engine drops it, the others go on. Its tokens that are already on the way
    /// are not delivered any more.
    pub fn abort_sample(&self, sample: u32) {
        if sample < self.num_samples && self.mark_ended(sample) {
            let _engine_gone = self.commands.send(Command::AbortSample { key: self.key, sample });
        }
    }

    /// When the model thread sent the event that [`TokenStream::next`] returned last.
    pub fn last_event_at(&self) -> Instant {
        self.last_event_at
    }

    fn has_ended(&self, sample: u32) -> bool {
        self.ended[sample as usize / 64].load(Ordering::Acquire) >> (sample % 64) & 1 == 1
    }

    /// False where it had ended before.
    fn mark_ended(&self, sample: u32) -> bool {
        let bit = 1 << (sample % 64);
        self.ended[sample as usize / 64].fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    fn all_ended(&self) -> bool {
        let num_ended: u32 = self.ended.iter().map(|word| word.load(Ordering::Acquire).count_ones()).sum();
        num_ended >= self.num_samples
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        if !self.has_failed && !self.all_ended() {
            let _engine_gone = self.commands.send(Command::Abort { key: self.key });
        }
    }
}
