//! Rows of local requests on their way to the store: as many as wait go as one statement.
//!
//! The store's group commit shares a commit; each operation in a group is still a round trip to the database, and for a row that is all
//! it costs. Here the rows that arrive while one statement is under way become the next one, so that a row costs little where there are
//! many, and nobody waits for more than the statement under way and his own.
//!
//! Bounds: [`MAX_ROWS`] a statement; whoever waits is a request, and their number is bounded elsewhere. **Invariant**: whoever is told
//! that his row is written has it committed; where a statement fails for one row's sake, each goes by itself.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::{
    Inner,
    operations::{Record, Records},
};
use crate::store::StoreError;

/// Keeps a statement's parameters (18 a row) far below any database's limit.
const MAX_ROWS: usize = 64;

type Answer = oneshot::Sender<Result<(), StoreError>>;

/// Rows that wait.
#[derive(Default)]
pub(super) struct Rows(Mutex<State>);

#[derive(Default)]
struct State {
    waiting: Vec<(Record, Answer)>,
    /// Somebody sends them, and will look here again.
    is_sending: bool,
}

impl Rows {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether whoever puts it there has to have it sent.
    fn push(&self, row: Record, answer: Answer) -> bool {
        let mut state = self.lock();
        state.waiting.push((row, answer));
        !std::mem::replace(&mut state.is_sending, true)
    }

    /// Empty: there is nothing more to send, and the next one who comes begins again.
    fn take(&self) -> Vec<(Record, Answer)> {
        let mut state = self.lock();
        state.is_sending = !state.waiting.is_empty();
        let count = state.waiting.len().min(MAX_ROWS);
        state.waiting.drain(..count).collect()
    }
}

impl Inner {
    /// Committed when this returns `Ok`. Dropped while it waits, the row is written all the same, or not.
    pub(super) async fn write_row(self: &Arc<Self>, row: Record) -> Result<(), StoreError> {
        let (answer, answered) = oneshot::channel();
        if self.rows.push(row, answer) {
            // By a task of its own: whoever asked may leave, and others wait for the same statement.
            tokio::spawn(send(Arc::clone(self)));
        }
        answered.await.unwrap_or_else(|_| Err(self.store.closed()))
    }
}

async fn send(inner: Arc<Inner>) {
    loop {
        let (rows, answers): (Vec<Record>, Vec<Answer>) = inner.rows.take().into_iter().unzip();
        match rows.len() {
            0 => return,
            // Rows that came with them have no part in one row's failure.
            num_rows => match inner.store.submit(Records(rows.clone())).await {
                Err(StoreError::Statement { .. }) if num_rows > 1 => {
                    for (row, answer) in rows.into_iter().zip(answers) {
                        tell(answer, inner.store.submit(Records(vec![row])).await);
                    }
                }
                done => answers.into_iter().for_each(|answer| tell(answer, done.clone())),
            },
        }
    }
}

fn tell(answer: Answer, done: Result<(), StoreError>) {
    let _whoever_asked_may_have_left = answer.send(done);
}
