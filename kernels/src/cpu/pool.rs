//! The worker pool: threads made once, which spin briefly for the next region and then park.
//!
//! A region is `run(num_tasks, task)`: the caller and the workers draw task numbers from one counter until none is
//! left. The pool knows nothing of what a task does; tasks begin in order, each after those of lower numbers have begun, and
//! nothing more is promised: results must not depend on who ran what.
//!
//! How a region opens and closes: one atomic word holds the region's number, an OPEN bit and the count of workers
//! inside. A worker enters by raising the count while OPEN is set; the caller, out of tasks itself, clears OPEN and
//! waits until the count is zero. So a worker that was still parked is not waited for, and nobody can touch a region
//! after `run` returned, which is what makes lending out a borrowed closure sound.
//!
//! Invariant: while the count is above zero, or OPEN is set, the job behind `job` is alive.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
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
    num_tasks: usize,
}

struct Shared {
    /// Region number (upper half), OPEN, count of workers inside.
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    next_task: AtomicUsize,
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
    /// One region at a time.
    region: Mutex<()>,
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
            next_task: AtomicUsize::new(0),
            panic: Mutex::new(None),
            shutdown: AtomicBool::new(false),
            num_parked: AtomicUsize::new(0),
            park: Mutex::new(()),
            wake: Condvar::new(),
        });
        let workers = (1..threads)
            .map_while(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new().name(format!("bindery-cpu-{index}")).spawn(move || work(&shared)).ok()
            })
            .collect();
        Self { shared, workers, region: Mutex::new(()) }
    }

    /// Threads that take part, the caller included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0)` to `task(num_tasks - 1)`, each exactly once, on any thread, and returns when all are done. A
    /// panic in a task is raised again here (tasks not yet begun are then skipped); the pool stays usable.
    pub(crate) fn run(&self, num_tasks: usize, task: impl Fn(usize) + Sync) {
        if num_tasks <= 1 || self.workers.is_empty() || INSIDE.get() {
            for index in 0..num_tasks {
                task(index);
            }
            return;
        }
        self.run_region(num_tasks, &task);
    }

    fn run_region(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let region = lock(&self.region);
        let shared = &*self.shared;
        // SAFETY: only the lifetime is changed. The pointer is used by workers inside this region alone, and `close`
        // below waits for them before this function returns or unwinds.
        let task: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        // SAFETY: this thread holds the region lock and no region is open, so nobody else looks at `job`.
        unsafe { *shared.job.get() = Some(Job { task, num_tasks }) };
        shared.next_task.store(0, Ordering::Relaxed);
        let number = shared.state.load(Ordering::Relaxed) & !(REGION - 1);
        // SeqCst pairs with the parking worker: it counts itself as parked, then looks at the state; here the state is
        // written, then the count is read. One of the two sees the other.
        shared.state.store(number.wrapping_add(REGION) | OPEN, Ordering::SeqCst);
        if shared.num_parked.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.park));
            shared.wake.notify_all();
        }
        shared.draw_tasks(task, num_tasks);
        shared.close();
        // SAFETY: closed: as above.
        unsafe { *shared.job.get() = None };
        let panic = lock(&shared.panic).take();
        drop(region);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Shared {
    fn draw_tasks(&self, task: &(dyn Fn(usize) + Sync), num_tasks: usize) {
        INSIDE.set(true);
        loop {
            let index = self.next_task.fetch_add(1, Ordering::Relaxed);
            if index >= num_tasks {
                break;
            }
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| task(index))) {
                self.next_task.store(num_tasks, Ordering::Relaxed);
                lock(&self.panic).get_or_insert(payload);
                break;
            }
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
/// turn: tasks are drawn in order, so a task may wait for those of lower numbers that wait for none.
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

fn work(shared: &Shared) {
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
            shared.draw_tasks(unsafe { &*job.task }, job.num_tasks);
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
