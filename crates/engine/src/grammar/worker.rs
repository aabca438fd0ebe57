//! Who computes masks: a few threads, so that it happens beside the forward pass and not before it.
//!
//! A sample's automaton travels to a worker with the token it has to take and comes back with the mask of the next one.
//! The loop plans no step for a sample whose automaton is away (it is held), and is woken when one comes back; so a
//! grammar that is slow keeps its own requests waiting, and those of other grammars at worst, but no others.
//!
//! It must not know tokenizers or grammars' sources. Its invariant: an automaton is at one place at a time, with its
//! sample or with a worker.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::Instant,
};

use bindery_scheduler::TokenId;
use llguidance::Matcher;

use super::explain;
use crate::sample::TokenMask;

/// Threads, at most. A usual mask takes some microseconds to some hundred, so a few serve a full batch.
pub const MAX_WORKERS: usize = 4;

/// Called by a worker when a mask has become ready.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// The way to the threads. They end when the last way to them is gone.
#[derive(Debug)]
pub(super) struct Workers {
    jobs: mpsc::Sender<Job>,
}

#[derive(Debug)]
struct Job {
    automaton: Box<Automaton>,
    token: TokenId,
    done: mpsc::SyncSender<Box<Automaton>>,
}

impl Workers {
    pub(super) fn start(wake: &Wake) -> io::Result<Arc<Self>> {
        let num_cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let (jobs, inbox) = mpsc::channel();
        let inbox = Arc::new(Mutex::new(inbox));
        for index in 0..(num_cores / 2).clamp(1, MAX_WORKERS) {
            let (inbox, wake) = (Arc::clone(&inbox), Arc::clone(wake));
            thread::Builder::new().name(format!("bindery-mask-{index}")).spawn(move || work(&inbox, &wake))?;
        }
        Ok(Arc::new(Self { jobs }))
    }
}

fn work(inbox: &Mutex<mpsc::Receiver<Job>>, wake: &Wake) {
    loop {
        let job = inbox.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { mut automaton, token, done }) = job else { return };
        automaton.take(token);
        let _sample_has_ended = done.send(automaton);
        wake();
    }
}

/// A grammar's automaton and what it says about the next token.
struct Automaton {
    matcher: Matcher,
    mask: Result<TokenMask, String>,
}

impl std::fmt::Debug for Automaton {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Automaton").field("mask", &self.mask).finish_non_exhaustive()
    }
}

impl Automaton {
    /// llguidance catches its own panics and reports them as errors.
    fn take(&mut self, token: TokenId) {
        let mask = self.matcher.consume_token(token.0).and_then(|()| self.matcher.compute_mask_or_eos());
        self.mask = mask.map(|mask| TokenMask::from_words(mask.into())).map_err(|error| explain(&format!("{error:#}")));
    }
}

/// Where one sample stands in its grammar. Dropped, it ends the work on its next mask.
#[derive(Debug)]
pub(crate) struct GrammarState {
    place: Place,
    workers: Arc<Workers>,
    _cancels_when_dropped: Cancel,
}

/// Where the automaton is.
#[derive(Debug)]
enum Place {
    Here(Box<Automaton>),
    WithWorker(mpsc::Receiver<Box<Automaton>>),
    Lost,
}

/// Ends the work on an automaton that nobody waits for any more.
#[derive(Debug)]
struct Cancel(Option<llguidance::CancellationHandle>);

impl Drop for Cancel {
    fn drop(&mut self) {
        if let Some(handle) = &self.0 {
            handle.cancel();
        }
    }
}

impl GrammarState {
    /// Before the first token.
    pub(super) fn new(matcher: Matcher, first_mask: TokenMask, workers: &Arc<Workers>) -> Self {
        let matcher = matcher.into_cancellable();
        let cancel = Cancel(matcher.cancellation_handle());
        let automaton = Automaton { matcher, mask: Ok(first_mask) };
        Self { place: Place::Here(Box::new(automaton)), workers: Arc::clone(workers), _cancels_when_dropped: cancel }
    }

    /// The sample's newest token, which must be one that [`GrammarState::mask`] allows. Returns at once; a worker
    /// begins with the next mask.
    pub(crate) fn advance(&mut self, token: TokenId) {
        self.wait();
        self.place = match std::mem::replace(&mut self.place, Place::Lost) {
            Place::Here(automaton) => {
                let (done, receiver) = mpsc::sync_channel(1);
                let sent = self.workers.jobs.send(Job { automaton, token, done });
                sent.map_or(Place::Lost, |()| Place::WithWorker(receiver))
            }
            elsewhere => elsewhere,
        };
    }

    /// Whether [`GrammarState::mask`] would answer at once; waits until `deadline` for it.
    pub(crate) fn is_ready(&mut self, deadline: Instant) -> bool {
        let Place::WithWorker(done) = &self.place else { return true };
        match done.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(automaton) => self.place = Place::Here(automaton),
            Err(mpsc::RecvTimeoutError::Timeout) => return false,
            Err(mpsc::RecvTimeoutError::Disconnected) => self.place = Place::Lost,
        }
        true
    }

    /// What may come next, once it has been [waited](GrammarState::wait) for. An error says why the grammar cannot be followed
    /// any further (it has become too large).
    pub(crate) fn mask(&self) -> Result<&TokenMask, String> {
        match &self.place {
            Place::Here(automaton) => automaton.mask.as_ref().map_err(Clone::clone),
            Place::WithWorker(_) => Err("its mask is not there yet".to_owned()),
            Place::Lost => Err("the thread that computed its masks has ended".to_owned()),
        }
    }

    /// Until the worker that computes the mask has it.
    pub(crate) fn wait(&mut self) {
        if let Place::WithWorker(done) = &self.place {
            self.place = done.recv().map_or(Place::Lost, Place::Here);
        }
    }
}
