//! The worker pool: threads made once, which spin briefly for the next region and then park.
//!
//! A region is `run(num_tasks, task)`: every thread has a share of the task numbers, one after the other, takes its own
//! from the front, and when they are gone the others' from the back. So a thread finds what follows its last task in its
//! cache and the same weights in every step, and cores tell each other little: with one counter for all, each task cost a
//! line's way between them (on a Zen 4 26 ns or, between cores that share no cache, 153). The pool knows nothing of what a
//! task does; of two phases, tasks of the second begin when all of the first have begun, and nothing more is promised:
//! results must not depend on who ran what.
//!
//! How a region opens and closes: one atomic word holds the region's number, an OPEN bit and the count of workers
//! inside. A worker enters by raising the count while OPEN is set; the caller, out of tasks itself, clears OPEN and
//! waits until the count is zero. So a worker that was still parked is not waited for, and nobody can touch a region
//! after `run` returned, which is what makes lending out a borrowed closure sound.
//!
//! Invariant: while the count is above zero, or OPEN is set, the job behind `job` is alive.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker looks for the next region before it parks. Regions of one step follow each other within some
/// ten microseconds; waking a parked thread costs about fifty.
const SPIN: Duration = Duration::from_micros(100);
/// Looks between two glances at the clock.
const LOOKS_PER_CLOCK: u32 = 64;
/// Looks of a thread that waits for another's task before it gives its core away between looks.
const LOOKS_BEFORE_YIELD: u32 = 4096;

const OPEN: u64 = 1 << 31;
const COUNT: u64 = OPEN - 1;
const REGION: u64 = 1 << 32;

thread_local! {
    /// Set while this thread runs a task: a region inside a region runs inline.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

struct Job {
    task: *const (dyn Fn(usize) + Sync),
    phases: [Phase; 2],
}

/// Tasks that may all run at once.
#[derive(Clone, Copy)]
struct Phase {
    num_tasks: usize,
    /// Which use of its shares this is.
    epoch: u64,
}

/// Of each thread, which tasks of its share nobody has taken.
///
/// Nobody deals: a share that is not of the present epoch is still whole, and whoever takes from it first says so. Every
/// share is of the epoch when its phase is over, since the caller does not leave before it has seen all of them empty;
/// so a share is of the present epoch or the last one, and it does no harm that epochs begin anew.
struct Shares(Box<[Share]>);

/// Epoch, first and end (not included) of what is left. Alone on its cache line, and on the one that the processor may
/// fetch with it.
#[repr(align(128))]
struct Share(AtomicU64);

/// Bits of the two task numbers of a share; the epoch has what is left.
const TASK_BITS: u32 = 28;
const TASK_MASK: u64 = (1 << TASK_BITS) - 1;
const EPOCH_MASK: u64 = u64::MAX >> (2 * TASK_BITS);

impl Shares {
    fn of(threads: usize) -> Self {
        Self((0..threads).map(|_| Share(AtomicU64::new(0))).collect())
    }

    /// The next task for thread number `me`, if any is left. `num_empty` counts the shares that it has seen empty, its own first.
    fn take(&self, phase: Phase, me: usize, num_empty: &mut usize) -> Option<usize> {
        let threads = self.0.len();
        while *num_empty < threads {
            let owner = (me + *num_empty) % threads;
            if let Some(task) = self.take_of(phase, owner, *num_empty == 0) {
                return Some(task);
            }
            *num_empty += 1;
        }
        None
    }

    /// A task of a share, its first or its last one. What tasks wrote is handed on when the region closes, not here.
    fn take_of(&self, phase: Phase, owner: usize, is_own: bool) -> Option<usize> {
        let share = &self.0[owner].0;
        // Acquires what `clear` did before.
        let mut seen = share.load(Ordering::Acquire);
        loop {
            let present = Left::of(seen, phase);
            let is_whole = present.is_none();
            let Left { first, end } = present.unwrap_or_else(|| {
                let Range { start, end } = share_of(phase.num_tasks, self.0.len(), owner);
                Left { first: start as u64, end: end as u64 }
            });
            let (task, left) = if first < end && is_own {
                (Some(first), Left { first: first + 1, end })
            } else if first < end {
                (Some(end - 1), Left { first, end: end - 1 })
            } else if is_whole {
                // A share of nothing, too, must be of the epoch when the phase is over.
                (None, Left::NOTHING)
            } else {
                return None;
            };
            match share.compare_exchange_weak(seen, left.word(phase), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return task.map(|task| task as usize),
                Err(newer) => seen = newer,
            }
        }
    }

    /// Nobody finds anything any more.
    fn clear(&self, phase: Phase) {
        for share in &self.0 {
            share.0.store(Left::NOTHING.word(phase), Ordering::Release);
        }
    }
}

/// Nobody finds anything any more in either phase; in the second before the first: nobody shall go on to wait for tasks that
/// will never begin.
fn abandon(shares: &[Shares; 2], phases: &[Phase; 2]) {
    shares.iter().zip(phases).rev().for_each(|(shares, &phase)| shares.clear(phase));
}

/// What nobody has taken of a share.
struct Left {
    first: u64,
    end: u64,
}

impl Left {
    const NOTHING: Self = Self { first: 0, end: 0 };

    /// None where the word is of an earlier phase.
    fn of(word: u64, phase: Phase) -> Option<Self> {
        let is_present = word >> (2 * TASK_BITS) == phase.epoch;
        is_present.then_some(Self { first: (word >> TASK_BITS) & TASK_MASK, end: word & TASK_MASK })
    }

    fn word(&self, phase: Phase) -> u64 {
        (phase.epoch << (2 * TASK_BITS)) | (self.first << TASK_BITS) | self.end
    }
}

/// Number `at` of so many shares of `0..len`, one after the other and as even as can be.
pub(super) fn share_of(len: usize, num_shares: usize, at: usize) -> Range<usize> {
    at * len / num_shares..(at + 1) * len / num_shares
}

/// Which of the tasks, longest first, stands at a place of all shares: each share has long ones before short ones, and all
/// have about as much to do.
fn dealt(place: usize, num_tasks: usize, threads: usize) -> usize {
    let thread = ((place + 1) * threads - 1) / num_tasks;
    let first = share_of(num_tasks, threads, thread).start;
    let (round, rounds) = (place - first, num_tasks / threads);
    // The last round goes to the shares with one task more alone.
    if round < rounds { round * threads + thread } else { rounds * threads + first - thread * rounds }
}

struct Shared {
    /// Region number (upper half), OPEN, count of workers inside.
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    /// Of both phases.
    shares: [Shares; 2],
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    shutdown: AtomicBool,
    num_parked: AtomicUsize,
    park: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is written only by the caller of `run` while no region is open and nobody is inside (it holds
// `Pool::region`), and read only by workers inside an open region.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointer in `job` points to a `Sync` closure and is used only during its region.
unsafe impl Send for Shared {}

/// A fixed set of threads, the calling one included.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One region at a time. The epochs of its phases' last uses.
    region: Mutex<[u64; 2]>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No lock here is held across user code, so a poisoned one guards nothing broken.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// `threads` in all, the caller being one of them. If the system refuses a thread, the pool goes on with those it
    /// has; [`Pool::threads`] tells.
    pub(crate) fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            shares: [Shares::of(threads), Shares::of(threads)],
            panic: Mutex::new(None),
            shutdown: AtomicBool::new(false),
            num_parked: AtomicUsize::new(0),
            park: Mutex::new(()),
            wake: Condvar::new(),
        });
        let workers = (1..threads)
            .map_while(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("bindery-cpu-{index}"))
                    .spawn(move || work(&shared, index))
                    .ok()
            })
            .collect();
        Self { shared, workers, region: Mutex::new([0; 2]) }
    }

    /// Threads that take part, the caller included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0)` to `task(num_tasks - 1)`, each exactly once, on any thread, and returns when all are done. A
    /// panic in a task is raised again here (tasks not yet begun are then skipped); the pool stays usable.
    pub(crate) fn run(&self, num_tasks: usize, task: impl Fn(usize) + Sync) {
        self.run_in_two(0, num_tasks, task);
    }

    /// As [`Pool::run`] of `num_first + num_tasks`, but the others begin when the first ones have begun: they may wait for them.
    pub(crate) fn run_in_two(&self, num_first: usize, num_tasks: usize, task: impl Fn(usize) + Sync) {
        let total = num_first + num_tasks;
        if total <= 1 || self.workers.is_empty() || INSIDE.get() {
            for index in 0..total {
                task(index);
            }
            return;
        }
        self.run_region([num_first, num_tasks], &task);
    }

    /// As [`Pool::run`]; tasks of lower numbers take longer, so they should begin earlier.
    pub(crate) fn run_longest_first(&self, num_tasks: usize, task: impl Fn(usize) + Sync) {
        let threads = self.shared.shares[1].0.len();
        self.run(num_tasks, |place| task(dealt(place, num_tasks, threads)));
    }

    fn run_region(&self, num_tasks: [usize; 2], task: &(dyn Fn(usize) + Sync)) {
        assert!(num_tasks.iter().all(|&num| num as u64 <= TASK_MASK), "{num_tasks:?} tasks, of {TASK_MASK} at most");
        let mut epochs = lock(&self.region);
        let shared = &*self.shared;
        let phases = [0, 1].map(|at| {
            // Shares of an empty phase are not looked at, so their epoch stays.
            epochs[at] = (epochs[at] + u64::from(num_tasks[at] > 0)) & EPOCH_MASK;
            Phase { num_tasks: num_tasks[at], epoch: epochs[at] }
        });
        // SAFETY: only the lifetime is changed. The pointer is used by workers inside this region alone, and `close`
        // below waits for them before this function returns or unwinds.
        let task: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        // SAFETY: this thread holds the region lock and no region is open, so nobody else looks at `job`.
        unsafe { *shared.job.get() = Some(Job { task, phases }) };
        let number = shared.state.load(Ordering::Relaxed) & !(REGION - 1);
        // SeqCst pairs with the parking worker: it counts itself as parked, then looks at the state; here the state is
        // written, then the count is read. One of the two sees the other.
        shared.state.store(number.wrapping_add(REGION) | OPEN, Ordering::SeqCst);
        if shared.num_parked.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.park));
            shared.wake.notify_all();
        }
        shared.run_tasks(task, &phases, 0);
        shared.close();
        // SAFETY: closed: as above.
        unsafe { *shared.job.get() = None };
        let panic = lock(&shared.panic).take();
        drop(epochs);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Shared {
    /// What thread number `me` finds to do.
    fn run_tasks(&self, task: &(dyn Fn(usize) + Sync), phases: &[Phase; 2], me: usize) {
        INSIDE.set(true);
        let mut before = 0;
        for (shares, &phase) in self.shares.iter().zip(phases).filter(|(_, phase)| phase.num_tasks > 0) {
            let mut num_empty = 0;
            while let Some(index) = shares.take(phase, me, &mut num_empty) {
                if let Err(payload) = catch_unwind(AssertUnwindSafe(|| task(before + index))) {
                    abandon(&self.shares, phases);
                    lock(&self.panic).get_or_insert(payload);
                }
            }
            before += phase.num_tasks;
        }
        INSIDE.set(false);
    }

    /// Ends the region: nobody enters any more, and everybody inside has left. Acquires what they wrote.
    fn close(&self) {
        self.state.fetch_and(!OPEN, Ordering::AcqRel);
        wait_until(|| self.state.load(Ordering::Acquire) & COUNT == 0);
    }

    /// Enters the region that `state` shows, if it is still open.
    fn try_enter(&self, state: u64) -> bool {
        self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    fn is_news(state: u64, seen: u64) -> bool {
        state & OPEN != 0 && state & !(REGION - 1) != seen
    }

    /// Spins, then parks, until a region newer than `seen` is open or the pool shuts down (none).
    fn wait_for_news(&self, seen: u64) -> Option<u64> {
        loop {
            let begin = Instant::now();
            // Looks once at least: on a machine so slow that the time is up at once, it would park and wake for ever.
            loop {
                for _ in 0..LOOKS_PER_CLOCK {
                    let state = self.state.load(Ordering::Acquire);
                    if Self::is_news(state, seen) {
                        return Some(state);
                    }
                    std::hint::spin_loop();
                }
                if self.shutdown.load(Ordering::Acquire) {
                    return None;
                }
                if begin.elapsed() >= SPIN {
                    break;
                }
            }
            let guard = lock(&self.park);
            self.num_parked.fetch_add(1, Ordering::SeqCst);
            let quiet = |(): &mut ()| {
                !Self::is_news(self.state.load(Ordering::SeqCst), seen) && !self.shutdown.load(Ordering::SeqCst)
            };
            drop(self.wake.wait_while(guard, quiet).unwrap_or_else(PoisonError::into_inner));
            self.num_parked.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Waits for what a running task of another thread is about to do, microseconds as a rule. What it waits for must not wait in
/// turn: a task of a region's second phase may wait for those of the first, which wait for none.
pub(crate) fn wait_until(is_done: impl Fn() -> bool) {
    let mut looks = 0_u32;
    while !is_done() {
        looks = looks.saturating_add(1);
        if looks < LOOKS_BEFORE_YIELD {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

fn work(shared: &Shared, me: usize) {
    let mut seen = 0;
    while let Some(state) = shared.wait_for_news(seen) {
        if !shared.try_enter(state) {
            continue;
        }
        seen = state & !(REGION - 1);
        // SAFETY: inside an open region, the job is alive and nobody writes it.
        let job = unsafe { &*shared.job.get() };
        if let Some(job) = job {
            // SAFETY: as above: `run_region` waits for this thread before the closure's borrow ends.
            shared.run_tasks(unsafe { &*job.task }, &job.phases, me);
        }
        shared.state.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.shutdown.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.park));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches panics of tasks and has none of its own.
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish_non_exhaustive()
    }
}

/// A slice that several tasks write, each its own elements.
pub(crate) struct SharedMut<T>(*mut T, usize);

impl<T> Clone for SharedMut<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedMut<T> {}

// SAFETY: every access goes through `slice`, whose callers keep tasks apart.
unsafe impl<T: Send> Sync for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr(), slice.len())
    }

    /// The same buffer, from one element to another: nothing is borrowed yet.
    pub(crate) fn part(&self, range: std::ops::Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.1, "{range:?} of {} elements", self.1);
        Self(self.0.wrapping_add(range.start), range.len())
    }

    /// Where a part of it begins; nothing is borrowed, so that parts of several tasks may lie between each other.
    #[inline(always)]
    pub(crate) fn pointer(&self, range: std::ops::Range<usize>) -> *mut T {
        assert!(range.start <= range.end && range.end <= self.1, "{range:?} of {} elements", self.1);
        self.0.wrapping_add(range.start)
    }

    /// A part of it, to read.
    ///
    /// # Safety
    /// - Nobody writes that part meanwhile.
    /// - The slice given to `new` is still borrowed.
    pub(crate) unsafe fn read(&self, range: std::ops::Range<usize>) -> &[T] {
        // SAFETY: in bounds, which `pointer` asserts; not written, by the caller's duty.
        unsafe { std::slice::from_raw_parts(self.pointer(range.clone()), range.len()) }
    }

    /// A part of it, borrowed.
    ///
    /// # Safety
    /// - Parts that live at the same time do not overlap.
    /// - The slice given to `new` is still borrowed.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's duty, stated above")]
    pub(crate) unsafe fn slice(&self, range: std::ops::Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.1, "{range:?} of {} elements", self.1);
        // SAFETY: in bounds by the assertion, exclusive by the caller's duty.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Miri interprets, so there a few rounds must do: it follows what threads may see, not luck.
    const ROUNDS: usize = if cfg!(miri) { 2 } else { 20 };
    const MANY_TASKS: usize = if cfg!(miri) { 30 } else { 1000 };

    #[test]
    fn every_task_runs_exactly_once() {
        for threads in 1..=4 {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for num_tasks in [0, 1, 2, 3, 17, MANY_TASKS] {
                for _ in 0..ROUNDS {
                    let counts: Vec<AtomicUsize> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(num_tasks, |index| {
                        counts[index].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn a_panicking_task_reaches_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(3);
        for round in 0..ROUNDS {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(50, |index| assert!(index != round, "task {index} fell over"));
            }));
            let payload = result.unwrap_err();
            assert_eq!(payload.downcast_ref::<String>().unwrap(), &format!("task {round} fell over"));
            let sum = AtomicUsize::new(0);
            pool.run(50, |index| {
                sum.fetch_add(index, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 49 * 50 / 2);
        }
    }

    #[test]
    fn the_second_phase_begins_when_all_of_the_first_have_begun() {
        for threads in 1..=4 {
            let pool = Pool::new(threads);
            for (num_first, num_tasks) in [(1, 5), (3, 1), (4, 40), (17, 17), (0, 9), (9, 0)] {
                for _ in 0..ROUNDS {
                    let (num_done, num_others) = (AtomicUsize::new(0), AtomicUsize::new(0));
                    pool.run_in_two(num_first, num_tasks, |index| {
                        if index < num_first {
                            num_done.fetch_add(1, Ordering::Release);
                        } else {
                            wait_until(|| num_done.load(Ordering::Acquire) == num_first);
                            num_others.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                    assert_eq!((num_done.into_inner(), num_others.into_inner()), (num_first, num_tasks));
                }
            }
        }
    }

    /// A task of the second phase would wait for ever for those of the first that a panic kept from beginning.
    #[test]
    fn after_a_panic_in_the_first_phase_nobody_waits() {
        struct Done<'a>(&'a AtomicUsize);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::Release);
            }
        }
        let pool = Pool::new(4);
        for round in 0..8 * ROUNDS {
            let num_done = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run_in_two(16, 16, |index| {
                    if index < 16 {
                        let _done = Done(&num_done);
                        assert!(index != round % 16, "task {index} fell over");
                    } else {
                        wait_until(|| num_done.load(Ordering::Acquire) == 16);
                    }
                });
            }));
            assert!(result.is_err());
        }
    }

    #[test]
    fn whoever_finds_the_first_phase_abandoned_finds_the_second_so() {
        let num_shares = if cfg!(miri) { 3 } else { 256 };
        let shares = [Shares::of(num_shares), Shares::of(num_shares)];
        for epoch in 1..if cfg!(miri) { 4 } else { 200 } {
            let phases = [Phase { num_tasks: TASK_MASK as usize, epoch }; 2];
            let last = num_shares - 1;
            let num_tasks = share_of(TASK_MASK as usize, num_shares, last).len();
            let begin = std::sync::Barrier::new(2);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    begin.wait();
                    abandon(&shares, &phases);
                });
                begin.wait();
                // The last share is cleared last. It has more tasks than can be taken before, unless the other thread is kept
                // from running: then the end that is seen is that of the tasks, and says nothing.
                let mut num_taken = 0;
                while shares[0].take_of(phases[0], last, false).is_some() {
                    num_taken += 1;
                }
                if num_taken < num_tasks {
                    assert_eq!(shares[1].take_of(phases[1], last, false), None, "epoch {epoch}");
                }
            });
        }
    }

    /// Epochs begin anew after 256 regions: a share must not look like one that was emptied long ago.
    #[test]
    fn many_regions_of_either_kind_follow_each_other() {
        let pool = Pool::new(3);
        for round in 0..if cfg!(miri) { 3 } else { 2000 } {
            let sum = AtomicUsize::new(0);
            let add = |index: usize| {
                sum.fetch_add(index + 1, Ordering::Relaxed);
            };
            if round % 300 == 7 {
                pool.run_in_two(2, 5, add);
            } else {
                pool.run(7, add);
            }
            assert_eq!(sum.into_inner(), 28, "round {round}");
        }
    }

    #[test]
    fn the_longest_are_dealt_out_in_turns() {
        for threads in 1..6 {
            for num_tasks in 1..40 {
                let mut met: Vec<usize> = (0..num_tasks).map(|place| dealt(place, num_tasks, threads)).collect();
                for thread in 0..threads {
                    let share = &met[share_of(num_tasks, threads, thread)];
                    assert!(share.is_sorted(), "{share:?} of {num_tasks} tasks, {threads} threads");
                    assert!(share.iter().enumerate().all(|(round, &task)| task / threads == round), "{share:?}");
                }
                met.sort_unstable();
                assert!(met.into_iter().eq(0..num_tasks), "{num_tasks} tasks, {threads} threads");
            }
        }
    }

    #[test]
    fn regions_nest_and_callers_take_turns() {
        let pool = Pool::new(3);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..3 * ROUNDS {
                        pool.run(5, |_| {
                            pool.run(3, |index| {
                                sum.fetch_add(index, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * 3 * ROUNDS * 5 * 3);
    }
}
