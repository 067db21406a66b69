//! Threads that wait for the next operation of a step without going to sleep.
//!
//! A decode step is some hundred operations of ten to a few hundred microseconds. Waking a
//! sleeping thread costs as much as a small one of them, so workers spin for a while first.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Rounds of waiting before a worker goes to sleep: about a tenth of a millisecond.
const SPINS: u32 = 6_000;
/// Rounds of waiting between two offers of the processor to other threads.
const SPINS_PER_YIELD: u32 = 500;

/// What the threads of one call share: `run(thread, item)`.
type Task<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// A fixed set of threads, the caller's included.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One call at a time.
    turn: Mutex<()>,
}

struct Shared {
    /// The number of the call, whether workers may still join it, and how many have and are not
    /// done: see [`State`].
    state: AtomicU64,
    /// The running call's task. Written by the caller before it opens the call, read by workers
    /// that have joined it.
    task: UnsafeCell<Option<(Task<'static>, usize)>>,
    /// The next item to take.
    next: AtomicUsize,
    /// Workers that sleep.
    sleeping: AtomicUsize,
    stop: AtomicBool,
    /// The first panic of a worker in the running call.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    bed: Mutex<()>,
    alarm: Condvar,
}

// SAFETY: `task` is written only by the one caller that holds `turn`, while the call is closed and
// no worker has joined it, and read only by workers that have joined an open call and not left it.
unsafe impl Sync for Shared {}

/// The upper half counts calls, the lowest bits the workers that have joined the running one.
///
/// A worker that wakes up too late finds the call closed and does not join: nobody waits for it.
#[derive(Clone, Copy)]
struct State(u64);

impl State {
    const OPEN: u64 = 1 << 31;

    /// The next call, open, with no worker in it.
    fn next_open(self) -> Self {
        Self((((self.0 >> 32) + 1) << 32) | Self::OPEN)
    }

    fn call(self) -> u64 {
        self.0 >> 32
    }

    fn is_open(self) -> bool {
        self.0 & Self::OPEN != 0
    }

    fn joined(self) -> u64 {
        self.0 & (Self::OPEN - 1)
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Pool {
    /// The thread that calls, and no other.
    pub(super) fn callers() -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            task: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            sleeping: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            bed: Mutex::new(()),
            alarm: Condvar::new(),
        });
        Self { shared, workers: Vec::new(), turn: Mutex::new(()) }
    }

    /// Starts `threads - 1` workers; the thread that calls [`Self::run`] is the last one.
    pub(super) fn new(threads: usize) -> std::io::Result<Self> {
        let mut pool = Self::callers();
        for thread in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let name = format!("tinyserve-cpu-{thread}");
            let worker = std::thread::Builder::new().name(name).spawn(move || shared.work(thread));
            pool.workers.push(worker?);
        }
        Ok(pool)
    }

    /// Threads, the caller's included.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(thread, item)` once for each item below `items`, on all threads, and returns
    /// when all are done. `thread` is below [`Self::threads`], and no two calls with the same one
    /// run at the same time.
    ///
    /// # Panics
    /// When the task panics, after every thread has stopped working on it.
    pub(super) fn run(&self, items: usize, task: Task<'_>) {
        // A panic in an earlier call left nothing behind: the turn itself guards no data.
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if self.workers.is_empty() || items <= 1 {
            for item in 0..items {
                task(0, item);
            }
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The reference is used by workers that have
        // joined this call, which waits for them below whether the task panics or not.
        #[expect(clippy::disallowed_methods, reason = "bytemuck does not cast lifetimes")]
        let task: Task<'static> = unsafe { std::mem::transmute::<Task<'_>, Task<'static>>(task) };
        shared.next.store(0, Ordering::Relaxed);
        // SAFETY: this thread holds `turn`, the last call is closed, and no worker is in it.
        unsafe { *shared.task.get() = Some((task, items)) };
        let state = State(shared.state.load(Ordering::Relaxed));
        shared.state.store(state.next_open().0, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) > 0 {
            let _bed = shared.bed.lock().unwrap_or_else(PoisonError::into_inner);
            shared.alarm.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| shared.take_items(0, task, items)));
        let mut state = State(shared.state.fetch_and(!State::OPEN, Ordering::AcqRel));
        let mut spins = 0;
        while state.joined() > 0 {
            wait_a_little(&mut spins);
            state = State(shared.state.load(Ordering::Acquire));
        }
        let theirs = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(turn);
        if let Some(panic) = own.err().or(theirs) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // A new call, and not an open one.
        self.shared.state.fetch_add(1 << 32, Ordering::SeqCst);
        {
            let _bed = self.shared.bed.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.alarm.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches what its tasks panic with; there is nothing to pass on.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work(&self, thread: usize) {
        let mut seen = 0;
        loop {
            seen = self.wait_for_call(seen);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            let join = |state| State(state).is_open().then_some(state + 1);
            let joined = self.state.try_update(Ordering::AcqRel, Ordering::Acquire, join);
            let Ok(state) = joined else { continue };
            // It may be a later call than the one that woke this worker up.
            seen = State(state).call();
            // SAFETY: the caller wrote the task before it opened the call, and does not write it
            // again before this worker has left.
            if let Some((task, items)) = unsafe { *self.task.get() } {
                let done = catch_unwind(AssertUnwindSafe(|| self.take_items(thread, task, items)));
                if let Err(panic) = done {
                    let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert(panic);
                }
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    fn take_items(&self, thread: usize, task: Task<'_>, items: usize) {
        loop {
            let item = self.next.fetch_add(1, Ordering::Relaxed);
            if item >= items {
                return;
            }
            task(thread, item);
        }
    }

    /// Waits until the call is no longer `seen`; returns what it is.
    fn wait_for_call(&self, seen: u64) -> u64 {
        let mut spins = 0;
        while spins < SPINS {
            let call = State(self.state.load(Ordering::Acquire)).call();
            if call != seen {
                return call;
            }
            wait_a_little(&mut spins);
        }
        let mut bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        let call = loop {
            let call = State(self.state.load(Ordering::SeqCst)).call();
            if call != seen {
                break call;
            }
            bed = self.alarm.wait(bed).unwrap_or_else(PoisonError::into_inner);
        };
        self.sleeping.fetch_sub(1, Ordering::SeqCst);
        call
    }
}

fn wait_a_little(spins: &mut u32) {
    *spins = spins.wrapping_add(1);
    if spins.is_multiple_of(SPINS_PER_YIELD) {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_done_once_whatever_the_threads() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for items in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..50 {
                    pool.run(items, &|thread, item| {
                        assert!(thread < threads);
                        counts[item].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 50));
            }
        }
    }

    #[test]
    fn threads_that_slept_wake_up() {
        let pool = Pool::new(3).unwrap();
        for _ in 0..5 {
            std::thread::sleep(std::time::Duration::from_millis(30));
            let sum = AtomicUsize::new(0);
            pool.run(10, &|_, item| {
                sum.fetch_add(item, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(3).unwrap();
        for bad in [0, 50, 99] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, &|_, item| assert!(item != bad, "item {item}"));
            }));
            assert!(result.is_err());
            let count = AtomicUsize::new(0);
            pool.run(100, &|_, _| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 100);
        }
    }

    #[test]
    fn callers_take_turns() {
        let pool = Pool::new(2).unwrap();
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(5, &|_, _| {
                            count.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 2000);
    }
}
